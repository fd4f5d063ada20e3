"""`lora-jax inspect`: the kernels that would be adapted, from the model's configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import tyro

import lora_jax
from lora_jax.cli import _base, _show


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Show which kernels would be adapted and what that costs. Only the model's configuration is read."""

    json: bool = False
    """print one JSON object, and nothing else, on standard output"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()
    lora: tyro.conf.OmitArgPrefixes[_base.LoRAFlags] = _base.LORA


def defaults(words: Sequence[str]) -> Settings:
    """Return the default settings: without --model, the settings that `lora-jax train` uses for the embedded model."""
    given = any(word.split("=")[0] == "--model" for word in words)
    return Settings(lora=_base.LORA if given else _base.LORA_EMBEDDED)


def run(settings: Settings) -> None:
    model = settings.base.abstract()
    matched = match(model, settings.lora)
    memory = memory_of(model, matched)
    if settings.json:
        _show.print_json(as_json(settings, matched, memory))
        return
    show = _show.results()
    show.print(str(matched), markup=False, soft_wrap=True)
    show.print("\nmemory while training, without activations:")
    for name, size in memory.items():
        show.print(f"  {name.replace('_', ' '):32} {_show.size(size):>10}")


def match(model: Any, lora: lora_jax.LoRAConfig) -> Any:
    """Return the kernels that `lora` selects, as `lora_jax.describe` reports them, without making an array."""
    axes = _base.kernel_axes(model)
    lora = replace(lora, init="kaiming_normal")  # a table of shapes, whatever the numbers are
    params = jax.eval_shape(lambda base: lora_jax.init(jax.random.key(0), base, lora, axes=axes), model.params)
    return lora_jax.describe(params, lora)


def memory_of(model: Any, matched: Any) -> dict[str, int]:
    """Return bytes of the weights, and of float32 gradients and Adam's two moments for all trained parameters."""
    base = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.params))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return {
        "base": base,
        "adapter": 4 * matched.trainable,
        "gradients_and_optimizer": 12 * matched.trainable,
        "the_same_for_full_fine-tuning": 12 * parameters,
    }


def as_json(settings: Settings, matched: Any, memory: dict[str, int]) -> dict[str, Any]:
    """Return the same information as a JSON object."""
    return {
        "model": settings.base.name,
        "rank": settings.lora.rank,
        "alpha": settings.lora.alpha,
        "trainable": matched.trainable,
        "total": matched.total,
        "share": matched.share,
        "leaves": [
            {
                "path": row.path,
                "shape": row.shape,
                "axes": None if row.axes is None else row.axes._asdict(),
                "rank": row.rank,
                "trainable": row.trainable,
            }
            for row in matched.rows
        ],
        "memory_bytes": memory,
    }
