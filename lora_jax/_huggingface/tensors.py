"""The place of each tensor of a Hugging Face model in our tree.

`names` maps a tree path to the tensor's name, one `{}` for each stack axis: `layers/self_attn/q_proj/kernel` is
`model.layers.{}.self_attn.q_proj.weight`, so index 3 of the stacked leaf is `model.layers.3.self_attn.q_proj.weight`.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from lora_jax._axes import Axes

# The linear layer that PEFT's "all-linear" leaves out. A classification head is left out only if it is trained in full.
HEAD = "lm_head"


class Weight(Protocol):
    """The name of a leaf in a Hugging Face checkpoint: `lora_jax.models.Weight`, or anything with its fields."""

    @property
    def name(self) -> str: ...
    @property
    def transpose(self) -> bool: ...


class Tensor(NamedTuple):
    """One tensor of the Hugging Face model, and its place in our tree.

    Attributes:
        path: Path of the leaf.
        index: Position on the leaf's stack axes, `()` where it has none.
        module: Dotted name of the module, such as `model.layers.3.self_attn.q_proj`.
        parameter: `weight` or `bias`.
        transpose: Whether the checkpoint has (out, in) where the tree has (in, out).
        shape: Shape of the leaf behind the stack axes.
        tied: Other modules that hold the same tensor: the output head of a model with tied embeddings.
        held_in: Name of the parameter that contains it in transformers' model, where that isn't its own name in files:
            an expert's kernel is in `model.layers.3.mlp.experts.gate_up_proj`. Otherwise empty.
    """

    path: str
    index: tuple[int, ...]
    module: str
    parameter: str
    transpose: bool
    shape: tuple[int, ...]
    tied: tuple[str, ...]
    held_in: str = ""

    @property
    def is_embedding(self) -> bool:
        return self.path.rpartition("/")[2] == "embedding"

    @property
    def is_linear(self) -> bool:
        """Return whether `"all-linear"` selects it."""
        return self.takes_lora and not self.is_embedding and self.module != HEAD

    @property
    def takes_lora(self) -> bool:
        return self.parameter == "weight" and len(self.shape) > 1

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that holds it."""
        return self.module, *self.tied

    @property
    def saved_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in a checkpoint."""
        return self.shape[::-1] if self.transpose else self.shape

    def saved(self, part: Any) -> Any:
        """This part of the leaf as a checkpoint has it, or the checkpoint's tensor as the leaf has it."""
        return part.T if self.transpose else part


def tensors(names: Mapping[str, Weight], leaves: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return every tensor of the model by its full name, from the leaves (arrays or their shapes) by path.

    A leaf (3, 8, 6) named `layers.{}.query.weight` has one `{}`, so its first axis is the stack: three tensors with
    index (0,), (1,) and (2,), each of shape (8, 6).
    """
    found = {}
    for path, weight in names.items():
        if path not in leaves:
            continue
        shape = tuple(leaves[path].shape)
        depth = weight.name.count("{}")
        tied = tuple(other.rpartition(".")[0] for other in getattr(weight, "tied", ()))
        held_in = getattr(weight, "parameter", "")
        for index in itertools.product(*map(range, shape[:depth])):
            name = weight.name.format(*index)
            module, _, parameter = name.rpartition(".")
            # Experts' kernels have two indices and transformers' parameter one: format ignores the second.
            inside = held_in.format(*index)
            found[name] = Tensor(path, index, module, parameter, weight.transpose, shape[depth:], tied, inside)
    return found


def modules(names: Mapping[str, Weight], table: Mapping[str, Tensor]) -> set[str]:
    """Return the dotted name of every module; where an adapter tree lacks a stacked leaf, only the
    module in layer 0.
    """
    present = {tensor.path for tensor in table.values()}
    absent = {path: weight for path, weight in names.items() if path not in present}
    others = [name for weight in absent.values() for name in (weight.name, *getattr(weight, "tied", ()))]
    found = {module for tensor in table.values() for module in tensor.modules}
    return found | {name.replace("{}", "0").rpartition(".")[0] for name in others}


def axes_of(tensor: Tensor, axes: Mapping[str, Axes] | None) -> Axes:
    """Return axes of the whole leaf that `tensor` is a part of: as given, or of a matrix after its stack axes.

    Raises:
        ValueError: The leaf is no stack of matrices and isn't in `axes`, or its axes don't fit its name.
    """
    depth = len(tensor.index)
    if axes is not None and tensor.path in axes:
        check_axes(tensor, axes[tensor.path])
        return axes[tensor.path]
    if len(tensor.shape) != 2:
        raise ValueError(
            f"{tensor.path}: a kernel of shape {tensor.shape} has no obvious inputs and outputs: "
            "pass axes=lora_jax.kernel_axes(...)"
        )
    # (3, 8, 6) with one stack axis: stack (0,), inputs (1,), outputs (2,).
    return Axes(tuple(range(depth)), (depth,), (depth + 1,))


def check_axes(tensor: Tensor, axes: Axes) -> None:
    """Raise ValueError unless the stack axes come first, one for each `{}` of the tensor's name."""
    if axes.stack != tuple(range(len(tensor.index))):
        depth = len(tensor.index)
        raise ValueError(f"{tensor.path}: stack axes {axes.stack}, but its name has {depth} {{}}, for the first axes")


def looks_up(tensor: Tensor, axes: Axes) -> bool:
    """Return whether `a` is on the vocabulary's side of an embedding, as PEFT's A is.

    Where a tied kernel's axes were read off its use as a head, the vocabulary is its output, and `b` is on that side.
    """
    return axes.inputs == (len(tensor.index),)


def widths(tensor: Tensor, axes: Axes) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a kernel: the outer dimensions of A and B in the file.

    A DenseGeneral kernel (8, 4, 2) with inputs (0,) and outputs (1, 2) has widths (8, 8).
    """
    if tensor.is_embedding:
        return tensor.shape[0], tensor.shape[1]
    start = len(tensor.index)
    inputs, outputs = (math.prod(tensor.shape[axis - start] for axis in group) for group in (axes.inputs, axes.outputs))
    return inputs, outputs
