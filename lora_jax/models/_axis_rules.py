"""Names of the axes of weights and activations, and the rules that map them to the axes of a mesh."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any

from flax.linen.spmd import logical_to_mesh
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...] | None
Rules = Mapping[str, Axes]

# In the order of precedence, since each axis of the mesh divides one axis of an array: the "batch" of an activation is
# divided along "fsdp", so its "embed" isn't, while the "embed" of a weight is.
RULES: MappingProxyType[str, Axes] = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "length": None,
        "vocab": "model",
        "heads": "model",
        "kv_heads": "model",
        "mlp": "model",
        "head_dim": None,
        "embed": "fsdp",
        "expert": None,
        "layers": None,
    }
)
"""The axes of a mesh along which an axis of weights and activations is divided, by its name; None for none."""


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that divide named axes along its axes; without a mesh, nothing is divided. Hashable."""

    mesh: Mesh | None = None
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def first(self, name: str) -> "Layout":
        """Return the same layout with the rule for a name before the others."""
        return Layout(self.mesh, tuple(sorted(self.rules, key=lambda rule: rule[0] != name)))

    def parts(self, name: str) -> int:
        """Return the number of parts that the mesh divides an axis with this name into."""
        return 1 if self.mesh is None else _size(self.mesh, dict(self.rules).get(name, ()))

    def spec(self, names: Sequence[str | None], counts: Sequence[int]) -> PartitionSpec:
        """Return the axes of the mesh for each axis of an array, by name; an axis whose count isn't divisible isn't
        divided.

        If several axes of the mesh are for one axis of the array and don't divide it, the last ones are left out first.
        """
        # Rules for all subsets of the axes: Flax uses the first rule of a name all of whose axes are still unused.
        rules = [
            (name, part) for name, axes in self.rules for n in range(len(axes), 0, -1) for part in combinations(axes, n)
        ]
        wanted = logical_to_mesh(PartitionSpec(*names), rules)
        return PartitionSpec(*(self._dividing(axes, count) for axes, count in zip(wanted, counts, strict=True)))

    def rows(self) -> NamedSharding:
        """Return the sharding of a batch, whose first axis is its rows."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(dict(self.rules).get("batch")))

    def constrain(self, x: Any, *names: str | None) -> Any:
        """Constrain `x` to the sharding for the names of its axes; without a mesh, return `x` unchanged."""
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(names, x.shape)))

    def _dividing(self, axes: Any, count: int) -> Any:
        assert self.mesh is not None
        kept = _tuple(axes)
        while kept and count % _size(self.mesh, kept):
            kept = kept[:-1]
        return kept[0] if len(kept) == 1 else kept or None


ONE_DEVICE = Layout()


def auto_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh with Auto axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def layout_of(mesh: Mesh, rules: Rules = RULES) -> Layout:
    """Make the layout of a mesh, whose axes become Auto: XLA derives all shardings from the constraints.

    Args:
        mesh: With axes of any type; `jax.make_mesh` makes Explicit ones, which need a sharding of each operation.
        rules: The mesh's axes for each name, in the order of precedence. Axes that the mesh lacks are ignored.

    Raises:
        ValueError: No rule names an axis of the mesh, so that all its devices would compute the same.

    >>> import jax
    >>> layout_of(jax.make_mesh((1, 1), ("fsdp", "model"))).spec(("batch", "length", "mlp"), (8, 16, 64))
    P('fsdp', None, 'model')
    """
    given = {name: (axes,) if isinstance(axes, str) else tuple(axes or ()) for name, axes in rules.items()}
    named = {axis for axes in given.values() for axis in axes}
    if idle := [axis for axis in mesh.axis_names if axis not in named and mesh.shape[axis] > 1]:
        raise ValueError(f"mesh: axis {idle[0]!r} is in no rule; expected {', '.join(sorted(named))}, or rules= for it")
    auto = auto_mesh(mesh)
    kept = tuple((name, tuple(axis for axis in axes if axis in mesh.shape)) for name, axes in given.items())
    return Layout(auto, tuple((name, axes) for name, axes in kept if axes))


def shardings_of(layout: Layout, shapes: Mapping[str, Any], axes: Mapping[str, Any], counts: Mapping[str, int]) -> Any:
    """Return the NamedSharding of each leaf by path; warns of axes that can't be divided.

    Args:
        layout: A layout with a mesh.
        shapes: Leaf path -> array or ShapeDtypeStruct.
        axes: Leaf path -> names of its axes; other leaves are copied to all devices.
        counts: Name of an axis -> its number of units, if that isn't its size: heads, not their channels.
    """
    assert layout.mesh is not None
    found, uncut = {}, {}
    for path, leaf in shapes.items():
        names = axes.get(path, (None,) * len(leaf.shape))
        sizes = [counts.get(name, size) for name, size in zip(names, leaf.shape, strict=True)]
        spec = layout.spec(names, sizes)
        for name, size, got in zip(names, sizes, spec, strict=True):
            if name is not None and size % layout.parts(name) and _size(layout.mesh, _tuple(got)) < layout.parts(name):
                uncut.setdefault((name, size), []).append(path)
        found[path] = NamedSharding(layout.mesh, spec)
    for line in _lines(layout, uncut):
        warnings.warn(line, stacklevel=3)
    return found


def _lines(layout: Layout, uncut: Mapping[tuple[str, int], list[str]]) -> Iterable[str]:
    for (name, size), paths in uncut.items():
        along = ", ".join(dict(layout.rules)[name])
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield (
            f"{paths[0]}{more}: {size} {name} don't divide by {layout.parts(name)} devices along {along}, "
            "each of which has a copy"
        )


def _tuple(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _size(mesh: Mesh, axes: Iterable[str]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size
