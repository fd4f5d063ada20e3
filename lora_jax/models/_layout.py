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

# In the order of precedence: an array is cut once along each axis of the mesh. So an activation, whose batch is cut
# along "fsdp", keeps its "embed" whole, and a weight's "embed" is cut.
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


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules of what is cut along which of its axes; without a mesh nothing is. Hashable, so a field."""

    mesh: Mesh | None = None
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def first(self, name: str) -> "Layout":
        """The same, where the rule of this name goes before the others."""
        return Layout(self.mesh, tuple(sorted(self.rules, key=lambda rule: rule[0] != name)))

    def parts(self, name: str) -> int:
        """How many parts the axes of the mesh cut an axis of this name into."""
        return 1 if self.mesh is None else _size(self.mesh, dict(self.rules).get(name, ()))

    def spec(self, names: Sequence[str | None], counts: Sequence[int]) -> PartitionSpec:
        """The mesh's axes of an array's, by name; an axis whose count isn't divisible isn't cut.

        Of several axes of the mesh for one of the array's, the last ones go first where they don't divide.
        """
        # Of several axes those that are free are taken: Flax takes the first rule of a name whose axes all are.
        rules = [
            (name, part) for name, axes in self.rules for n in range(len(axes), 0, -1) for part in combinations(axes, n)
        ]
        wanted = logical_to_mesh(PartitionSpec(*names), rules)
        return PartitionSpec(*(self._dividing(axes, count) for axes, count in zip(wanted, counts, strict=True)))

    def constrain(self, x: Any, *names: str | None) -> Any:
        """`x`, laid out as its axes' names say; without a mesh `x` itself."""
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


def layout_of(mesh: Mesh, rules: Rules = RULES) -> Layout:
    """The layout of a mesh, whose axes become Auto: constraints then say what is cut, and XLA what follows from it.

    Args:
      mesh: with axes of any type; `jax.make_mesh` gives Explicit ones, under which each operation needs a type.
      rules: the mesh's axes for each name, in the order of precedence. Axes that the mesh lacks are passed over.

    Raises:
      ValueError: an axis of the mesh that no rule names, so that its devices would all do the same.

    >>> layout_of(jax.make_mesh((1, 1), ("fsdp", "model"))).spec(("batch", "length", "mlp"), (8, 16, 64))
    PartitionSpec('fsdp', None, 'model')
    """
    given = {name: (axes,) if isinstance(axes, str) else tuple(axes or ()) for name, axes in rules.items()}
    named = {axis for axes in given.values() for axis in axes}
    if idle := [axis for axis in mesh.axis_names if axis not in named and mesh.shape[axis] > 1]:
        raise ValueError(f"mesh: axis {idle[0]!r} is in no rule; expected {', '.join(sorted(named))}, or rules= for it")
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    kept = tuple((name, tuple(axis for axis in axes if axis in mesh.shape)) for name, axes in given.items())
    return Layout(auto, tuple((name, axes) for name, axes in kept if axes))


def shardings_of(layout: Layout, shapes: Mapping[str, Any], axes: Mapping[str, Any], counts: Mapping[str, int]) -> Any:
    """A NamedSharding for each leaf by its path, and a warning where an axis can't be cut.

    Args:
      layout: with a mesh.
      shapes: leaf path -> array or ShapeDtypeStruct.
      axes: leaf path -> names of its axes; leaves that aren't in it have copies everywhere.
      counts: how many things an axis of that name holds, where that isn't its size: heads, not their channels.
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
