"""How each axis of a kernel is used, and the mapping of it that a trace of a function gives."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Axes(NamedTuple):
    """What each axis of a kernel W is for; together the three groups name every axis of W once, in any order.

    Attributes:
      stack: Axes along which W is many kernels (layers, experts): each index has factors and a scale of its own.
      inputs: Axes contracted with the activation; of an embedding, the axis that is looked up.
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
    """Axes of one leaf as a trace showed them, and the kernel's roles. Equal to the `Axes` of the same numbers.

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
        """The entry for these axes, with the roles given and those that it has."""
        roles = embedding or getattr(axes, "embedding", False), head or getattr(axes, "head", False)
        return cls(*axes, embedding=roles[0], head=roles[1])

    def _replace(self, **changes: Any) -> "TracedAxes":
        return TracedAxes.of(Axes(*self)._replace(**changes), embedding=self.embedding, head=self.head)

    def __repr__(self) -> str:
        roles = "".join(f", {role}=True" for role in ("embedding", "head") if getattr(self, role))
        return f"{Axes(*self)!r}"[:-1] + roles + ")"


class KernelAxes(dict[str, Axes]):
    """How a function uses its kernels: leaf path to `Axes`, as `lora_jax.kernel_axes` reads them off a trace.

    What each kernel is belongs to its entry: a part of the dict, and a plain dict made from it, say the same of the
    kernels that they have.

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
            joined.update(part)  # entries that no trace gave stay what they are: rules
        return joined
