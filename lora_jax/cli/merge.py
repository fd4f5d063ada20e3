"""`lora-jax merge`: the adapter added into the weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lora_jax
from lora_jax.cli import _base, _compare, _labels, _show
from lora_jax.cli._merged import Merged, check_tensors, merged
from lora_jax.data import Labels

MOST_PARAMETERS = 10**9  # of a model whose logits are compared unasked: float32 takes 4 GB


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write W + scale · A B as an ordinary Hugging Face folder, which needs no LoRA to run.

    Tensors are read, merged and written one at a time, in the shards of the model's folder: this takes the memory of
    about one shard. The new folder is read back and compared before it takes its place.
    """

    adapter: Path
    """folder of an adapter, as `lora-jax train` writes it"""
    output: Path
    """folder to write"""
    output_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the merged weights; the model's if not given. float32 loses nothing of the adapter"""
    check: Literal["auto", "always", "never"] = "auto"
    """compare merged and adapted logits on text before anything is kept; auto: of models up to 1e9 parameters, which
    are held whole for it in float32"""
    text: Path | None = None
    """text file whose first lines are compared on; sentences of our own if not given"""
    overwrite: bool = False
    """replace the merged model that is in the output folder; any other is refused"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()


def run(settings: Settings) -> None:
    settings = replace(settings, base=settings.base.of(settings.adapter))
    _base.check_free(settings.output, settings.overwrite, settings.adapter, settings.base.folder)
    lora_jax.models.check_free(settings.output, overwrite=settings.overwrite)
    labels = _labels.of_adapter(settings.adapter, settings.base)
    model = settings.base.load_streamed(labels and labels.names)
    rows = _compare.rows_of(model, settings.text) if _compares(settings, model) else None
    new = merged(model, _base.with_adapter(model, settings.adapter), settings.output_dtype)
    lines: list[str] = []

    def check(folder: Path) -> None:
        lines.append(f"{check_tensors(folder, new)} tensors read back: each is W + ΔW, rounded once")
        if rows is not None:
            lines.extend(_logits(settings, labels, new, folder, rows))
        else:
            lines.append("logits weren't compared: `--check always` holds the whole model in float32 for it")

    with _show.working("merging"):
        lora_jax.models.save(
            settings.output, model, new.tree(), dtype=settings.output_dtype, overwrite=settings.overwrite, check=check
        )
    show = _show.results()
    report = new.report()
    show.print(str(report), markup=False, soft_wrap=True)
    if any(row.dtype != "float32" for row in report.rows):
        show.print("`--output-dtype float32` keeps all of it, in larger files", markup=False)
    for line in lines:
        show.print(line, markup=False, soft_wrap=True)
    show.print(f"merged model: {settings.output}", markup=False)
    next_words = "generate --model {} --prompt ..." if labels is None else "evaluate --model {} --data ..."
    show.print(f"next: lora-jax {next_words.format(settings.output)}", markup=False)


def _compares(settings: Settings, model: Any) -> bool:
    if settings.check != "auto":
        return settings.check == "always"
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.params)) <= MOST_PARAMETERS


def _logits(settings: Settings, labels: Labels | None, new: Merged, folder: Path, rows: _compare.Rows) -> list[str]:
    """Merged against adapted, everything in float32, so that only the weights' rounding can tell them apart.

    Raises:
        ValueError: they disagree with the weights unrounded: beyond rounding, that is.
    """
    # Rounded as it was loaded to be merged, and then held in float32.
    model = settings.base.load_streamed(labels and labels.names)
    model = replace(model, params=jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), model.params))
    plain = jax.jit(model.apply)
    params = _base.with_adapter(model, settings.adapter)
    adapted = _compare.outputs(jax.jit(lora_jax.adapt(model.apply)), params, rows)
    del model, params  # one model at a time is held
    exact = _compare.outputs(plain, jax.tree.map(np.asarray, new.tree("float32")), rows)
    found = _compare.difference(exact, adapted)
    if not found.largest <= _compare.TOLERANCE:
        raise ValueError(
            f"{settings.output}: not written: merged and adapted logits differ by {found.largest:.2g} of the largest "
            f"on {rows.what}, {_compare.TOLERANCE:g} is allowed; report it with the adapter's configuration"
        )
    rounded = _compare.outputs(plain, lora_jax.models.load(folder, "float32").params, rows)
    cost = _compare.difference(rounded, adapted)
    return [
        f"merged and adapted logits differ by {found.largest:.2g} of the largest ({_compare.TOLERANCE:g} is allowed), "
        f"on {rows.what}: {len(rows.ids)} rows, {rows.mask.sum()} tokens",
        f"with the weights as they are written, by {cost.largest:.2g}; the first choice is the same "
        f"at {cost.same} of {cost.places} places",
    ]
