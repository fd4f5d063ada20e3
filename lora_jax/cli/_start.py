"""The start of a run: the model, and its parameters with a new adapter or with one that the run goes on from."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

import lora_jax
from lora_jax._config import CHANGES_KERNELS
from lora_jax.cli import _base, _choices, _labels, _mesh, _new_tokens, inspect
from lora_jax.cli._rows import Rows
from lora_jax.peft import adapter_folder
from lora_jax.train import TrainConfig


class Start(NamedTuple):
    """A run's model and parameters."""

    model: Any
    params: Any  # with the adapter's nodes
    mesh: Mesh | None


def check_adapter(
    adapter: Path, output: Path, lora: lora_jax.LoRAConfig, prefix_length: int, add_tokens: Path | None
) -> None:
    """Refuse settings that the adapter to go on from has decided already, and an output folder that is this adapter's.

    Raises:
        ValueError: Such a setting is given.
        FileExistsError: The output folder is the adapter's, or has a tokenizer that would be replaced.
    """
    _base.check_free(output, True, adapter)
    if _new_tokens.has_own(adapter):
        if add_tokens is not None:
            raise ValueError(
                f"add_tokens: {add_tokens} given, but {adapter} trains the rows of its own tokens (--from-adapter);"
                " leave it out"
            )
        _new_tokens.check_replaced(output)
    if prefix_length:
        raise ValueError(
            f"prefix_length: {prefix_length} given, but {adapter} decides it (--from-adapter); leave it out"
        )
    for field in dataclasses.fields(lora):
        given = getattr(lora, field.name)
        if given not in (getattr(_base.LORA, field.name), getattr(_base.LORA_EMBEDDED, field.name)):
            raise ValueError(f"{field.name}: {given} given, but {adapter} decides it (--from-adapter); leave it out")


def check_reference(train: TrainConfig, prefix_length: int) -> None:
    """Refuse a new prefix where a run has a reference, which would be the model with that prefix before any step.

    No file has that prefix, so the adapter couldn't be evaluated against the reference.
    """
    if prefix_length and train.objective == "dpo":
        raise ValueError(
            f"prefix_length: {prefix_length} given for {train.objective}, whose reference would have the untrained"
            " prefix; leave it out, or train it on examples first and pass --from-adapter"
        )


def labels_of_adapter(rows: Rows, adapter: Path) -> Rows:
    """Return the rows with the adapter's labels, in its order.

    Raises:
        ValueError: The rows have a label that the adapter doesn't have, or have none where the adapter has.
    """
    saved = _labels.load(adapter)
    own = () if rows.labels is None else rows.labels.names
    if saved is None:
        return rows
    if rows.labels is None or not set(own) <= set(saved.names):
        raise ValueError(
            f"{adapter}: trained on the labels {', '.join(saved.names):.60}, but the data have"
            f" {', '.join(map(str, own)) or 'none':.60}; give data of these labels"
        )
    return dataclasses.replace(rows, labels=saved)


def begin(
    base: _base.TrainedBase,
    rows: Rows,
    train: TrainConfig,
    show: Console,
    *,
    lora: lora_jax.LoRAConfig,
    prefix_length: int,
    adapter: Path | None,
    add_tokens: Path | None = None,
) -> Start:
    """Load the model with its adapter, and print what trains.

    Args:
        base: The model's flags.
        rows: The rows, whose labels the model predicts.
        train: The run's settings.
        show: Where it is printed.
        lora: The settings of a new adapter.
        prefix_length: Tokens of a new prefix.
        adapter: The folder of the adapter that the run goes on from, if any.
        add_tokens: A file of new tokens, whose rows train, if any.

    Raises:
        ValueError: A new token is there already.
    """
    _check_packing(train, rows, prefix_length)
    key = jax.random.fold_in(jax.random.key(train.seed), 0)  # training folds in the steps, from 1
    model = base.abstract(labels=rows.label_names)
    _base.check_prefix(prefix_length, model)
    if adapter is None:
        show.print(str(inspect.match(model, _labels.with_head(lora, model))), markup=False, soft_wrap=True)
    mesh = base.devices(train.micro_batch_size)
    _mesh.check_rows(mesh, train.batch_size, train.gradient_accumulation_steps)
    changes = lora.init in CHANGES_KERNELS and adapter is None
    # Such an init starts from the weights as they are, and rounds what is left.
    rounds = changes and base.quantize is not None
    loaded = dataclasses.replace(base, quantize=None, quantize_activations=None) if rounds else base
    model = loaded.load(labels=rows.label_names, key=jax.random.fold_in(key, 1), mesh=mesh)
    new_rows = {}
    if add_tokens is not None:
        model, new_rows = _new_tokens.add(add_tokens, model, jax.random.fold_in(key, 2), show)
    params = _base.with_adapter(model, adapter)
    if adapter is not None:
        params = _new_tokens.gone_on_with(
            params, model.params, adapter_folder.token_rows(adapter, model.params, model.names)
        )
        show.print(f"going on from {adapter}", markup=False, soft_wrap=True)
        show.print(str(lora_jax.describe(params)), markup=False, soft_wrap=True)
    if rows.label_names is not None:
        show.print(f"labels: {', '.join(rows.label_names)}. {_labels.new_parts(model)}", markup=False)
    show.print(_choices.line(model, train), markup=False, soft_wrap=True)
    if mesh is not None:
        show.print(_mesh.line(mesh), markup=False)
    if adapter is None:
        how = base.quantize_config(_base.head_leaves(model)) if changes else None
        config = _labels.with_head(lora, model)
        params = lora_jax.init(key, params, config, axes=_base.kernel_axes(model), quantize=how)
    params = lora_jax.init_rows(params, new_rows)
    if changes:
        line = f"init {lora.init}: took A₀ B₀ out of each kernel; the adapter is saved for the model as it is"
        show.print(f"{line}, as A B - A₀ B₀ of twice the rank", markup=False, soft_wrap=True)
    if prefix_length:
        # The run's key itself is free: training uses its folds by step, and init its fold 0.
        place = _base.prefix_place(model)
        params = lora_jax.prefix.init(jax.random.key(train.seed), params, prefix_length, after=place)
    if length := lora_jax.prefix.length(params):
        size = sum(leaf.size for leaf in jax.tree.leaves(lora_jax.prefix.take(params)[1]))
        show.print(f"prefix: {length} tokens, {size:,} parameters")
    return Start(model, params, mesh)


def _check_packing(train: TrainConfig, rows: Rows, prefix_length: int) -> None:
    """Refuse packing where a row has something that each of its documents would need."""
    if train.packing and rows.labels is not None:
        raise ValueError("packing: given, but of rows with labels a row has one label; leave it out")
    if (train.packing or train.eval_packing) and prefix_length:
        raise ValueError(f"packing: given with prefix_length {prefix_length}, but a row has one prefix; leave one out")
