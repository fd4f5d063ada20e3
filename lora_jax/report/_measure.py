"""`measure`: the measures of section 7 for each adapted kernel, one kernel at a time."""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from lora_jax._node import LoRA
from lora_jax.analysis import (
    Amplification,
    Spectrum,
    amplification,
    matrices,
    random_similarity,
    spectrum,
    subspace_similarity,
)


class Overlap(NamedTuple):
    """φ between two adapters' factors of one kernel, and φ between two random factors of the same sizes."""

    phi: np.ndarray
    random: np.ndarray


class KernelMeasurements(NamedTuple):
    """The measures of one kernel. A measure that needs W, or a second adapter, is None without it.

    Attributes:
        name: The module's name.
        layer: The first number in the name; None if there is no number.
        kind: The part of the name after that number, such as `self_attn.q_proj`.
        shape: Sizes of inputs and outputs.
        rank: The adapter's rank.
        scale: Alpha/rank.
        update: ΔW's spectrum.
        weight: W's spectrum.
        amplification: Amplification of W by ΔW (table 7).
        right: Overlap of the two adapters' A, whose directions are ΔW's right singular vectors in the paper (figures 3
            and 4).
        left: Overlap of the two adapters' B.

    >>> import jax.numpy as jnp
    >>> from lora_jax import report
    >>> [found] = report.measure({"layers.3.q_proj": LoRA(jnp.eye(4)[:, :2], jnp.eye(2, 3), 2.0)})
    >>> found.layer, found.shape, found.rank, found.weight is None
    (3, (4, 3), 2, True)
    """

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float
    update: Spectrum
    weight: Spectrum | None = None
    amplification: Amplification | None = None
    right: Overlap | None = None
    left: Overlap | None = None


def measure(
    updates: Mapping[str, LoRA],
    *,
    weight: Callable[[str], ArrayLike] | None = None,
    against: Mapping[str, LoRA] | None = None,
    seed: int = 0,
) -> Iterator[KernelMeasurements]:
    """Measure each kernel's update, by kind and in the order of layers. One W is in memory at a time.

    Args:
        updates: Nodes by module name, without stack axes; `peft.updates` and `loralib.updates` read them from files.
        weight: Returns a module's W, f[inputs, outputs], given the module's name.
        against: The updates of another adapter of the same modules.
        seed: Seed of the random baselines.

    Raises:
        ValueError: The adapters don't change the same modules, or a value isn't finite, or a shape doesn't fit.

    >>> import jax.numpy as jnp
    >>> node = LoRA(jnp.eye(4)[:, :2], jnp.eye(2, 3), jnp.float32(2))
    >>> found = list(measure({"layers.0.q_proj": node}, weight=lambda name: jnp.ones((4, 3))))
    >>> found[0].layer, found[0].kind, found[0].update.singular_values.tolist()
    (0, 'q_proj', [2.0, 2.0])
    """
    if against is not None:
        check_comparable(updates, against)
    positions = positions_of(updates)
    for name in sorted(updates, key=lambda name: (positions[name].kind, positions[name].layer or 0, name)):
        # The key depends on the name alone: a kernel's baselines are the same whatever else the adapter changes.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        yield _measure_kernel(
            name, positions[name], updates[name], weight, None if against is None else against[name], key
        )


def check_comparable(updates: Mapping[str, LoRA], against: Mapping[str, LoRA]) -> None:
    """Refuse two adapters that don't change the same modules of the same sizes.

    Raises:
        ValueError: The modules that only one adapter changes, or the sizes that differ.

    >>> import jax.numpy as jnp
    >>> node = LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 2.0)
    >>> check_comparable({"q_proj": node}, {"q_proj": node})
    >>> check_comparable({"q_proj": node}, {"v_proj": node})
    Traceback (most recent call last):
    ValueError: ...
    """
    only, other = sorted(updates.keys() - against.keys()), sorted(against.keys() - updates.keys())
    if only or other:
        differences = [
            f"{len(names)} only in {where} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for names, where in ((only, "--adapter"), (other, "--against"))
            if names
        ]
        raise ValueError(
            f"the two adapters change different modules: {' and '.join(differences)}; compare two adapters of one model"
        )
    for name, node in updates.items():
        ours, theirs = _shape(node), _shape(against[name])
        if ours != theirs:
            raise ValueError(f"{name}: {ours} in --adapter, {theirs} in --against: they belong to different models")


class ModulePosition(NamedTuple):
    """A module's layer, and the kind that it shares with the same module of other layers."""

    layer: int | None
    kind: str


def positions_of(names: Mapping[str, object]) -> dict[str, ModulePosition]:
    """Layer and kind of each module. If several stacks have layers, a kind begins with its stack's name.

    >>> positions_of({"model.layers.3.self_attn.q_proj": 0, "lm_head": 0})
    {'model.layers.3.self_attn.q_proj': ModulePosition(layer=3, kind='self_attn.q_proj'),
     'lm_head': ModulePosition(layer=None, ...)}
    """
    cut = {name: _cut(name) for name in names}
    stacks = {before for before, layer, _ in cut.values() if layer is not None}
    return {
        name: ModulePosition(layer, f"{before}.{behind}" if len(stacks) > 1 and layer is not None else behind)
        for name, (before, layer, behind) in cut.items()
    }


def _cut(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdecimal() and len(part) < 10 and i + 1 < len(parts):
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, name


def _shape(node: LoRA) -> tuple[int, int]:
    inputs, outputs = (math.prod(shape) for shape in (node.a.shape[:-1], node.b.shape[1:]))
    return inputs, outputs


def _measure_kernel(
    name: str,
    position: ModulePosition,
    lora: LoRA,
    weight: Callable[[str], ArrayLike] | None,
    other: LoRA | None,
    key: jax.Array,
) -> KernelMeasurements:
    try:
        w = None if weight is None else np.asarray(weight(name))
        w_spectrum = None if w is None else spectrum(w, lora.axes)
        right, left = (None, None) if other is None else _overlaps(lora, other, key)
        return KernelMeasurements(
            name=name,
            layer=position.layer,
            kind=position.kind,
            shape=_shape(lora),
            rank=int(lora.a.shape[-1]),
            scale=float(lora.scale),
            update=spectrum(lora),
            weight=w_spectrum,
            amplification=None if w is None else amplification(key, w, lora, own=w_spectrum),
            right=right,
            left=left,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _overlaps(lora: LoRA, other: LoRA, key: jax.Array) -> list[Overlap]:
    overlaps = []
    for side, (ours, theirs) in enumerate(zip(matrices(lora), matrices(other), strict=True)):
        features, rank = ours.shape
        random = random_similarity(jax.random.fold_in(key, side), features, rank, theirs.shape[-1])
        overlaps.append(Overlap(subspace_similarity(ours, theirs), random))
    return overlaps
