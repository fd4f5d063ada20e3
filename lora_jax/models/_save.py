"""Writing models as Hugging Face folders."""

import contextlib
import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from lora_jax import _disk
from lora_jax._processes import one_writes
from lora_jax.models import _end_tokens, _family, _folder, _shards, _weights
from lora_jax.models._families import FAMILIES
from lora_jax.models._family import flatten
from lora_jax.models._files import TensorFiles
from lora_jax.models._model import Model
from lora_jax.models._tokenizer import copy as copy_tokenizer
from lora_jax.models._untied import untied
from lora_jax.models._weights import Streamed

WRITTEN = "a model written here"


def save(
    folder: str | os.PathLike[str],
    model: Model,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard_bytes: int = 5 * 10**9,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `params` as a Hugging Face folder, completely or not at all: configuration, tokenizer, safetensors.

    `Streamed` leaves are written one tensor at a time, into the same shards as in the model's own folder. Of several
    processes all must call it: the first one writes, and tensors that are cut over them are gathered one by one.

    Args:
        folder: The folder, which is created with its parents.
        model: The model, which has the names of the weights; its generation files and its tokenizer are copied.
        params: A tree like `model.params`, or like the `untied` model's; of an adapted or quantized one
            `lora_jax.dequantize(lora_jax.merge(params))`.
        dtype: The dtype of the written weights; None keeps each leaf's.
        overwrite: Replace a folder that `save` has written, or the model's own; it stays until the new one is complete.
        tokenizer: Written instead of the model's own.
        shard_bytes: The largest size of a file; more weights are divided into several files with an index.
        check: Called with the complete new folder before it is moved into place; if it raises, nothing changes.

    Raises:
        FileExistsError: The folder isn't empty and `overwrite` is False, or it has files that `save` hasn't written.
        ValueError: `params` has other leaves or shapes than `model.params`, a kernel is quantized, or a value isn't
            finite.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from transformers import LlamaConfig
    >>> from lora_jax import models
    >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> config = LlamaConfig(vocab_size=11, **sizes)
    >>> folder = tempfile.mkdtemp()
    >>> config.save_pretrained(folder)
    >>> model = models.load_abstract(folder)  # zeros for weights
    >>> models.save(folder + "/zeros", model, jax.tree.map(lambda x: jnp.zeros(x.shape), model.params))
    >>> sorted(path.name for path in Path(folder, "zeros").iterdir())
    ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    leaves = flatten(dict(params))
    if leaves.keys() & _family.untied(model.names).keys():
        model = untied(model)
    _check_leaves(leaves, flatten(model.params))
    config = copy.deepcopy(model.config)
    config.architectures = [_folder.family_of(config.model_type, config.architectures, FAMILIES).architecture]
    config.dtype = str(jnp.dtype(dtype or next(iter(leaves.values())).dtype))
    ours = _shards.ours(folder, model.folder)
    layout = _layout(model, leaves)
    shards = _shards.divided(leaves, model.names, dtype=dtype, shard_bytes=shard_bytes, layout=layout)
    with contextlib.ExitStack() as stack:
        writes, tensors = stack.enter_context(one_writes()), stack.enter_context(_shards.gathered(shards, leaves))
        if not writes:
            return
        temporary = stack.enter_context(_disk.replacing(folder, overwrite=overwrite, what=WRITTEN, ours=ours))
        config.save_pretrained(temporary)
        tokenizer = model.new_tokenizer if tokenizer is None else tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if model.folder is not None:
            patterns = _folder.TEXT_FILES if tokenizer is None else (_end_tokens.GENERATION,)
            _folder.copy_text_files(model.folder, temporary, patterns)
            if tokenizer is None and model.adapter is not None:
                copy_tokenizer(model.adapter, temporary)
        _shards.write(temporary, shards, tensors, model.names)
        if check is not None:
            check(temporary)


def check_free(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse a folder that `save` can't write to, before anything is computed for it.

    Raises:
        FileExistsError: As `save`, for a model of another folder.

    >>> import tempfile
    >>> check_free(tempfile.mkdtemp(), overwrite=False)  # an empty folder is free
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "notes.txt").write_text("mine")
    >>> check_free(folder, overwrite=True)
    Traceback (most recent call last):
    FileExistsError: ...
    """
    folder = Path(folder)
    _disk.check_free(folder, overwrite=overwrite, what=WRITTEN, ours=_shards.ours(folder, None))


def _layout(model: Model, leaves: Mapping[str, Any]) -> dict[str, Path] | None:
    """Return the file of each tensor in the model's folder, in the files' order; None if no leaf is streamed."""
    if model.folder is None or not any(isinstance(leaf, Streamed) for leaf in leaves.values()):
        return None
    files = TensorFiles(model.folder)
    family = _folder.family_of(model.config.model_type, model.config.architectures, FAMILIES)
    cut = _weights.missing_prefix(files, family.prefix)
    names = [name for path, leaf in leaves.items() for _, name, _ in _weights.entries(model.names[path], leaf.shape)]
    written_as = {name.removeprefix(cut): name for name in names}
    layout = {written_as[name]: stored.file for name, stored in files.tensors.items() if name in written_as}
    last = next(reversed(layout.values()))
    return layout | {name: last for name in names if name not in layout}  # the tensors of a new head


def _check_leaves(leaves: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for path, leaf in leaves.items():
        if scheme := getattr(leaf, "scheme", None):  # a `lora_jax.Quantized`
            raise ValueError(
                f"{path}: is quantized ({scheme}), and can't be written so; save"
                " lora_jax.dequantize(lora_jax.merge(params))"
            )
    problems = [f"{path} is missing" for path in expected if path not in leaves]
    problems += [f"{path} is unexpected" for path in leaves if path not in expected]
    problems += [
        f"{path} has shape {leaves[path].shape}, expected {leaf.shape}"
        for path, leaf in expected.items()
        if path in leaves and leaves[path].shape != leaf.shape
    ]
    if problems:
        hint = " (merge the adapter first)" if any("_lora/" in problem for problem in problems) else ""
        raise ValueError(f"params don't fit the model: {'; '.join(problems[: _weights.MOST_SHOWN])}{hint}")
