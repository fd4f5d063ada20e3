"""The use of each axis of a kernel, and the mapping of them that `kernel_axes` returns."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Axes(NamedTuple):
    """The axes of a kernel W by their use; together the three groups name every axis of W once, in any order.

    Attributes:
        stack: Axes along which W is many kernels (layers, experts): each index has factors and a scale of its own.
        inputs: Axes contracted with the activation; for an embedding, the axis that is looked up.
        outputs: Axes of the result.

    >>> Axes()  # a Flax Dense kernel, f32[in, out]
    Axes(stack=(), inputs=(0,), outputs=(1,))
    >>> Axes(stack=(0,), inputs=(1,), outputs=(2, 3))  # DenseGeneral under nn.scan, f32[layers, in, heads, head]
    Axes(stack=(0,), inputs=(1,), outputs=(2, 3))
    """

    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)


class TracedAxes(Axes):
    """The axes of one leaf that a trace found, and the kernel's roles; equal to the `Axes` with the same numbers.

    Attributes:
        embedding: Whether the kernel is looked up (gather).
        head: Whether its product reaches the function's output through no other kernel.
    """

    embedding: bool
    head: bool

    def __new__(cls, stack: Any, inputs: Any, outputs: Any, *, embedding: bool = False, head: bool = False) -> Any:
        entry = super().__new__(cls, tuple(stack), tuple(inputs), tuple(outputs))
        entry.embedding, entry.head = embedding, head
        return entry

    @classmethod
    def of(cls, axes: Any, *, embedding: bool = False, head: bool = False) -> "TracedAxes":
        """Return the entry for these axes, with the given roles added to its own."""
        roles = embedding or getattr(axes, "embedding", False), head or getattr(axes, "head", False)
        return cls(*axes, embedding=roles[0], head=roles[1])

    def _replace(self, **changes: Any) -> "TracedAxes":
        return TracedAxes.of(Axes(*self)._replace(**changes), embedding=self.embedding, head=self.head)

    def __repr__(self) -> str:
        roles = "".join(f", {role}=True" for role in ("embedding", "head") if getattr(self, role))
        return f"{Axes(*self)!r}"[:-1] + roles + ")"


class KernelAxes(dict[str, Axes]):
    """A dict from leaf path to `Axes`, as `lora_jax.kernel_axes` finds them in a trace of a function.

    Each entry has its kernel's roles, so that a part of the dict, or a plain dict made from it, has them too.

    Attributes:
        embeddings: Paths of kernels that are looked up (gather).
        heads: Paths of kernels whose product reaches the function's output through no other kernel.

    >>> axes = KernelAxes({"embed/embedding": Axes(), "up/kernel": Axes()}, embeddings=["embed/embedding"])
    >>> {path: entry for path, entry in axes.items() if path != "up/kernel"}
    {'embed/embedding': Axes(stack=(), inputs=(0,), outputs=(1,), embedding=True)}
    """

    def __init__(
        self, axes: Mapping[str, Axes] = {}, *, embeddings: Collection[str] = (), heads: Collection[str] = ()
    ) -> None:
        super().__init__(
            {
                path: TracedAxes.of(entry, embedding=path in embeddings, head=path in heads)
                for path, entry in axes.items()
            }
        )

    @property
    def embeddings(self) -> frozenset[str]:
        return frozenset(path for path, entry in self.items() if getattr(entry, "embedding", False))

    @property
    def heads(self) -> frozenset[str]:
        return frozenset(path for path, entry in self.items() if getattr(entry, "head", False))

    def copy(self) -> "KernelAxes":
        return KernelAxes(self)

    def __or__(self, other: Any) -> Any:
        return self._joined(self, other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return self._joined(other, self) if isinstance(other, Mapping) else NotImplemented

    @staticmethod
    def _joined(first: Mapping[str, Axes], second: Mapping[str, Axes]) -> "KernelAxes":
        joined = KernelAxes()
        for part in (first, second):
            joined.update(part)  # not through __init__, which would make traced entries of the others
        return joined
