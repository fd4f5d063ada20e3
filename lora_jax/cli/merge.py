"""`lora-jax merge`: adds an adapter to its model's weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lora_jax
from lora_jax._quantize.schemes import SCHEMES
from lora_jax.cli import _base, _compare, _labels, _show
from lora_jax.cli._merged import MergedWeights, check_tensors, merged
from lora_jax.cli._rounded import Rounded, rounded, rounds_activations, scheme_of_run
from lora_jax.data import Labels

DTYPES = ("float32", "bfloat16", "float16")
MOST_PARAMETERS = 10**9  # of a model whose logits `--check auto` compares: 4 GB in float32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write W + scale · A B as an ordinary Hugging Face folder, which needs no LoRA to run.

    Tensors are read, merged and written one at a time, in the same shards as in the model's folder, so that merging
    takes about the memory of one shard. The new folder is read back and compared before it replaces another.
    """

    adapter: Path
    """folder of an adapter, as `lora-jax train` writes it"""
    output: Path
    """folder to write"""
    output_dtype: Annotated[str | None, tyro.conf.arg(metavar="{float32,bfloat16,float16}")] = None
    """dtype of the merged weights; the model's if not given. With float32 no part of the adapter is rounded away"""
    quantize: Literal["nf4", "int4", "int8", "fp8"] | None = None
    """number format of the run's base (train --quantize): the adapter is added to the kernels as they are after
    rounding to it, and written in the output's dtype; to the model's own kernels if not given"""
    check: Literal["auto", "always", "never"] = "auto"
    """compare merged and adapted logits on a text before the output is kept. auto: for models of at most 1e9
    parameters, because the complete model is in memory for it, in float32"""
    text: Path | None = None
    """text file whose first lines are used for this comparison; built-in sentences if not given"""
    overwrite: bool = False
    """replace the merged model that is in the output folder; any other is refused"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()

    def __post_init__(self) -> None:
        given = self.output_dtype
        if given in SCHEMES:
            raise ValueError(
                f"output_dtype: {given!r} given, expected float32, bfloat16 or float16: few bits would lose most of the"
                f" update; merge into 16 bits, then load the result with --quantize {given}"
            )
        if given not in (None, *DTYPES):
            raise ValueError(f"output_dtype: {given!r} given, expected float32, bfloat16 or float16")


def run(settings: Settings) -> None:
    settings = replace(settings, base=settings.base.for_adapter(settings.adapter))
    _base.check_free(settings.output, settings.overwrite, settings.adapter, settings.base.folder)
    lora_jax.models.check_free(settings.output, overwrite=settings.overwrite)
    labels = _labels.of_adapter(settings.adapter, settings.base)
    model, base = _streamed(settings, labels)
    rows = _compare.tokenized(model, settings.text) if _compares(settings, model) else None
    new = merged(model, _base.with_adapter(model, settings.adapter), settings.output_dtype)
    lines: list[str] = []

    def check(folder: Path) -> None:
        lines.append(f"{check_tensors(folder, new)} tensors read back: each is W + ΔW, rounded once")
        if rows is not None:
            lines.extend(_compare_logits(settings, labels, new, folder, rows))
        else:
            lines.append("logits weren't compared: `--check always` does it, with the complete model in float32")

    with _show.working("merging"):
        lora_jax.models.save(
            settings.output, model, new.tree(), dtype=settings.output_dtype, overwrite=settings.overwrite, check=check
        )
    show = _show.results()
    report = new.report()
    show.print(str(report), markup=False, soft_wrap=True)
    if any(row.dtype != "float32" for row in report.rows):
        show.print("`--output-dtype float32` keeps all of the update, in larger files", markup=False)
    for line in lines:
        show.print(line, markup=False, soft_wrap=True)
    if line := _about_bases(settings, base):
        show.print(line, markup=False, soft_wrap=True)
    if rounds_activations(settings.adapter):
        line = "the run rounded activations (--quantize-activations), which the merged model doesn't"
        show.print(f"{line}: they agree up to that", markup=False, soft_wrap=True)
    show.print(f"merged model: {settings.output}", markup=False)
    next_words = "generate --model {} --prompt ..." if labels is None else "evaluate --model {} --data ..."
    show.print(f"next: lora-jax {next_words.format(settings.output)}", markup=False)


def _streamed(settings: Settings, labels: Labels | None) -> tuple[Any, Rounded | None]:
    """Return the model with its weights in their files, and how its kernels are rounded if they are."""
    model = settings.base.load_streamed(labels and labels.names)
    if settings.quantize is None:
        return model, None
    base = rounded(model, settings.quantize)
    return base.model, base


def _about_bases(settings: Settings, base: Rounded | None) -> str:
    """Return a line on the kernels that the adapter was added to, if the run had others or they are in few bits."""
    if method := lora_jax.models.quant_method(settings.base.folder):
        line = f"the base is in few bits ({method}): the adapter was added to its dequantized kernels"
        return f"{line}, not to the original; nothing was rounded to few bits again"
    if base is not None:
        line = f"the adapter was added to the kernels as {settings.quantize} has them, dequantized"
        return f"{line}; they differ from the model's own by {base.difference:.2%}"
    if scheme := scheme_of_run(settings.adapter):
        line = f"the adapter was trained beside kernels in {scheme}, and added to the model's own, which differ by"
        return f"{line} {scheme}'s rounding; --quantize {scheme} adds it to the rounded ones"
    return ""


def _compares(settings: Settings, model: Any) -> bool:
    """Return whether logits are to be compared."""
    if settings.check != "auto":
        return settings.check == "always"
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.params)) <= MOST_PARAMETERS


def _compare_logits(
    settings: Settings, labels: Labels | None, new: MergedWeights, folder: Path, rows: _compare.TokenRows
) -> list[str]:
    """Compare merged and adapted logits in float32, so that they differ only by the rounding of the weights.

    Raises:
        ValueError: They differ by more than `TOLERANCE` before the weights are rounded.
    """
    # The base's weights have the dtype in which they were merged, and are then computed with in float32.
    model, _ = _streamed(settings, labels)
    model = replace(model, params=jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), model.params))
    plain = jax.jit(model.apply)
    params = _base.with_adapter(model, settings.adapter)
    adapted = _compare.outputs(jax.jit(lora_jax.adapt(model.apply)), params, rows)
    del model, params  # only one model at a time is in memory
    exact = _compare.outputs(plain, jax.tree.map(np.asarray, new.tree("float32")), rows)
    unrounded = _compare.difference(exact, adapted)
    if not unrounded.largest <= _compare.TOLERANCE:
        raise ValueError(
            f"{settings.output}: not written: merged and adapted logits differ by {unrounded.largest:.2g} of the "
            f"largest on {rows.source}, {_compare.TOLERANCE:g} is allowed; report it with the adapter's configuration"
        )
    written = _compare.outputs(plain, lora_jax.models.load(folder, "float32").params, rows)
    rounded = _compare.difference(written, adapted)
    return [
        f"merged and adapted logits differ by {unrounded.largest:.2g} of the largest "
        f"({_compare.TOLERANCE:g} is allowed), on {rows.source}: {len(rows.ids)} rows, {rows.mask.sum()} tokens",
        f"with the weights as they are written, they differ by {rounded.largest:.2g}; the largest logit is "
        f"the same one at {rounded.same} of {rounded.positions} positions",
    ]
