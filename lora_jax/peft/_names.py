"""Where each Hugging Face tensor lives in our tree.

`names` maps a tree path to the tensor's name, one `{}` for each stack axis: `layers/self_attn/q_proj/kernel` is
`model.layers.{}.self_attn.q_proj.weight`, so index 3 of the stacked leaf is `model.layers.3.self_attn.q_proj.weight`.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from lora_jax._tree import Axes
from lora_jax.peft._config import PREFIX

# The linear layer that PEFT's "all-linear" leaves out. Heads that tell labels it leaves out where they are saved whole.
HEAD = "lm_head"


class Weight(Protocol):
    """How a leaf is spelled in a Hugging Face checkpoint: `lora_jax.models.Weight`, or anything with its fields."""

    @property
    def name(self) -> str: ...
    @property
    def transpose(self) -> bool: ...


class Tensor(NamedTuple):
    """One tensor of the Hugging Face model, and its place in our tree.

    Attributes:
        path: the leaf's path.
        index: the position on the leaf's stack axes, `()` when it has none.
        module: dotted name of the module, such as `model.layers.3.self_attn.q_proj`.
        parameter: `weight` or `bias`.
        transpose: the checkpoint has (out, in) where the tree has (in, out).
        shape: the leaf's shape behind the stack axes.
        tied: other modules that hold the same tensor: the output head of a model with tied embeddings.
    """

    path: str
    index: tuple[int, ...]
    module: str
    parameter: str
    transpose: bool
    shape: tuple[int, ...]
    tied: tuple[str, ...]

    @property
    def is_embedding(self) -> bool:
        return self.path.rpartition("/")[2] == "embedding"

    @property
    def is_linear(self) -> bool:
        """One of those that `"all-linear"` selects."""
        return self.takes_lora and not self.is_embedding and self.module != HEAD

    @property
    def takes_lora(self) -> bool:
        return self.parameter == "weight" and len(self.shape) > 1

    @property
    def saved_shape(self) -> tuple[int, ...]:
        """The tensor's shape in a checkpoint."""
        return self.shape[::-1] if self.transpose else self.shape


def tensors(names: Mapping[str, Weight], leaves: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the model by its full name, from the leaves (arrays or their shapes) by path."""
    found = {}
    for path in names.keys() & leaves.keys():
        weight, shape = names[path], tuple(leaves[path].shape)
        depth = weight.name.count("{}")
        for index in itertools.product(*map(range, shape[:depth])):
            name = weight.name.format(*index)
            module, _, parameter = name.rpartition(".")
            tied = tuple(other.rpartition(".")[0] for other in getattr(weight, "tied", ()))
            found[name] = Tensor(path, index, module, parameter, weight.transpose, shape[depth:], tied)
    return found


def modules(names: Mapping[str, Weight], table: Mapping[str, Tensor]) -> set[str]:
    """Every module of the model; of those whose leaves aren't at hand, the one in layer 0."""
    present = {tensor.path for tensor in table.values()}
    absent = {path: weight for path, weight in names.items() if path not in present}
    others = [name for weight in absent.values() for name in (weight.name, *getattr(weight, "tied", ()))]
    found = {module for tensor in table.values() for module in (tensor.module, *tensor.tied)}
    return found | {name.replace("{}", "0").rpartition(".")[0] for name in others}


def axes_of(tensor: Tensor, axes: Mapping[str, Axes] | None) -> Axes:
    """The axes of the whole leaf that `tensor` is a part of: as given, or a matrix behind its stack axes."""
    depth = len(tensor.index)
    if axes is not None and tensor.path in axes:
        check_axes(tensor, axes[tensor.path])
        return axes[tensor.path]
    if len(tensor.shape) != 2:
        raise ValueError(
            f"{tensor.path}: a kernel of shape {tensor.shape} has no obvious inputs and outputs: "
            "pass axes=lora_jax.kernel_axes(...)"
        )
    return Axes(tuple(range(depth)), (depth,), (depth + 1,))


def check_axes(tensor: Tensor, axes: Axes) -> None:
    """Raises ValueError unless the name's `{}` are the axes' stack, in front."""
    if axes.stack != tuple(range(len(tensor.index))):
        depth = len(tensor.index)
        raise ValueError(f"{tensor.path}: stack axes {axes.stack}, where its name has {depth} {{}}, for the first axes")


def factor_names(tensor: Tensor) -> tuple[str, str]:
    """The names of A and B in the file."""
    start = PREFIX + tensor.module
    if tensor.is_embedding:
        return f"{start}.lora_embedding_A", f"{start}.lora_embedding_B"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def magnitude_name(tensor: Tensor) -> str:
    """The name of DoRA's magnitude in the file."""
    return f"{PREFIX}{tensor.module}.lora_magnitude_vector"


def head_factor_names(head: str) -> tuple[str, str]:
    """The names of A and B of a head that shares the embedding's weight: its A is the embedding's Bᵀ, its B the Aᵀ."""
    return f"{PREFIX}{head}.lora_A.weight", f"{PREFIX}{head}.lora_B.weight"


def looks_up(tensor: Tensor, axes: Axes) -> bool:
    """Whether `a` is on the embedding's vocabulary side, PEFT's side of A; a tied kernel may be seen from the head."""
    return axes.inputs == (len(tensor.index),)


def widths(tensor: Tensor, axes: Axes) -> tuple[int, int]:
    """The outer dimensions of A and B in the file: how many numbers go in and come out."""
    if tensor.is_embedding:
        return tensor.shape[0], tensor.shape[1]
    start = len(tensor.index)
    inputs, outputs = (math.prod(tensor.shape[axis - start] for axis in group) for group in (axes.inputs, axes.outputs))
    return inputs, outputs
