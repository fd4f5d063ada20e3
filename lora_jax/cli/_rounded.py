"""A model's kernels as a run with --quantize had them: rounded to few bits, and dequantized, one tensor at a time."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

import lora_jax
from lora_jax._config import CHANGES_KERNELS
from lora_jax.cli import _base, _run_file


def scheme_of_run(adapter: Path) -> str | None:
    """Return the scheme in which a run had its base, from the `run.yaml` beside its adapter; None if that says none.

    After PiSSA and LoftQ it is None too: their adapters belong beside the plain model.
    """
    settings = _settings(adapter)
    scheme = None if settings.get("init") in CHANGES_KERNELS else settings.get("quantize")
    return scheme if isinstance(scheme, str) else None


def rounds_activations(adapter: Path) -> bool:
    """Return whether a run rounded its activations too, as `run.yaml` says: no merged model does."""
    return _settings(adapter).get("quantize_activations") is not None


def _settings(adapter: Path) -> dict[str, Any]:
    """Return the settings in the `run.yaml` beside an adapter; empty if there is none that can be read."""
    try:
        settings = yaml.safe_load((adapter / _run_file.FILE).read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class Rounded:
    """A model from `models.load_streamed` with rounded kernels.

    Attributes:
        model: The model.
        squares: (path, index) -> the sums of squares of W - dequantized and of W, once it has been read.
    """

    model: Any
    squares: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """‖W - dequantized‖ / ‖W‖ over the kernels that have been read."""
        lost, all_of_it = (sum(pair[k] for pair in self.squares.values()) for k in (0, 1))
        return math.sqrt(lost / all_of_it) if all_of_it else 0.0


def rounded(model: Any, scheme: Any) -> Rounded:
    """Return the model with those kernels rounded that `--quantize` rounds.

    Raises:
        ValueError: They are in few bits already, or groups of the scheme don't divide a kernel's inputs.
    """
    config = lora_jax.QuantizeConfig(scheme=scheme, exclude=_base.head_leaves(model))
    leaves = lora_jax.models.flatten(model.params)
    if held := [path for path, leaf in leaves.items() if getattr(leaf, "scheme_in_files", "")]:
        raise ValueError(f"quantize: {scheme} given, but {held[0]} is in few bits in {model.folder}; leave it out")
    axes = _base.kernel_axes(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    nodes = jax.eval_shape(lambda params: lora_jax.quantize(params, config, axes=axes), shapes)
    found = Rounded(model)
    for path, node in lora_jax.models.flatten(nodes).items():
        if isinstance(node, lora_jax.Quantized):
            leaves[path] = _leaf(path, leaves[path], node, scheme, found)
    return replace(found, model=replace(model, params=lora_jax.models.unflatten(leaves)))


def _leaf(path: str, leaf: Any, node: lora_jax.Quantized, scheme: Any, found: Rounded) -> Any:
    inside = lora_jax.Axes(*(tuple(k - leaf.stack for k in group if k >= leaf.stack) for group in node.axes))
    config = lora_jax.QuantizeConfig(scheme=scheme, targets="kernel")

    def read(index: tuple[int, ...]) -> np.ndarray:
        kernel = jnp.asarray(leaf.read(index), leaf.dtype)
        made = lora_jax.dequantize(lora_jax.quantize({"kernel": kernel}, config, axes={"kernel": inside}))["kernel"]
        wide, back = (np.asarray(x.astype(jnp.float32), np.float64) for x in (kernel, made))
        found.squares[path, index] = float(np.sum((wide - back) ** 2)), float(np.sum(wide**2))
        return np.asarray(made)

    return replace(leaf, read=read)
