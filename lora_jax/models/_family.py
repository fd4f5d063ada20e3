"""What a family of models has to say about itself: one module, one table of names."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from transformers import PretrainedConfig

from lora_jax.models._execution import Execution

Tree = dict[str, Any]
DType = Any


class Weight(NamedTuple):
    """Where one leaf of the tree lives in a Hugging Face file.

    Attributes:
        name: the tensor's name; each `{}` stands for a stack index (a layer, an expert), filled in order.
        transpose: the file holds the last two axes the other way round; `nn.Linear` stores (out, in), Flax (in, out).
        tied: names of further tensors that are this same leaf, such as the output head of a model with tied embeddings.
        untied: for each of these the leaf that holds it where a tree has it apart, and where that is in a file.
        parameter: what transformers' model calls the parameter that holds the leaf, where that isn't its name in files:
            the experts of a layer are one parameter there, and their gate and up kernels too. Leaves of one parameter
            stand in its order in a family's table.
    """

    name: str
    transpose: bool = False
    tied: tuple[str, ...] = ()
    untied: "tuple[tuple[str, Weight], ...]" = ()
    parameter: str = ""


class Family(NamedTuple):
    """One model family: how its configuration becomes a module, and what its weights are called.

    Attributes:
        config_class: the transformers configuration; its `model_type` is what a folder's `config.json` names.
        architecture: the transformers class whose folders are read and written.
        module: `(config, dtype, param_dtype, execution) -> nn.Module`, called as
            `module(input_ids, attention_mask, ...)`; its `attention(rows, length, dtype)` is a call's form.
        weights: `config -> {leaf path: Weight}`, one entry for every leaf of the tree.
        init_cache: `(config, batch, length, dtype) -> pytree` of empty keys and values; None where nothing is decoded.
        ignored: regular expressions of names that files may hold besides the weights (buffers of old checkpoints).
        copies: `config -> {name: name}`, tensors that files may hold as copies of another (a tied head).
        heads: for a copy that is used by itself where a tree has it: the path of that leaf, a dense layer's kernel.
        prefix: of the names; files of the bare model (its base class in transformers) lack it.
        head: path of the classification head in the tree; empty where none does.
        before_head: parts just before it, which files of other heads may lack.
        other_heads: regular expressions of names of the heads that a new one takes the place of.
        positions: `config -> int`, the most tokens of a row.
    """

    config_class: type[PretrainedConfig]
    architecture: str
    module: Callable[[Any, DType, DType, Execution], Any]
    weights: Callable[[Any], dict[str, Weight]]
    init_cache: Callable[[Any, int, int, DType], Tree] | None = None
    ignored: tuple[str, ...] = ()
    copies: Callable[[Any], dict[str, str]] = lambda config: {}
    heads: Mapping[str, str] = MappingProxyType({})
    prefix: str = ""
    head: str = ""
    before_head: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()
    positions: Callable[[Any], int] = lambda config: config.max_position_embeddings

    def names(self, config: Any) -> dict[str, Weight]:
        """The weights, each with the names of its copies."""
        copies: dict[str, tuple[str, ...]] = {}
        for copy, original in self.copies(config).items():
            copies[original] = (*copies.get(original, ()), copy)
        return {
            path: weight._replace(tied=tied, untied=self._apart(tied))
            for path, weight in self.weights(config).items()
            for tied in [copies.get(weight.name, ())]
        }

    def _apart(self, tied: Collection[str]) -> tuple[tuple[str, Weight], ...]:
        return tuple((self.heads[name], Weight(name, transpose=True)) for name in tied if name in self.heads)


def untied(names: Mapping[str, Weight]) -> dict[str, str]:
    """The heads that share an embedding: the path of the head's own leaf, and that of the embedding."""
    return {own: path for path, weight in names.items() for own, _ in weight.untied}


def flatten(tree: Tree) -> dict[str, Any]:
    """A nested dict as `{"a/b": leaf}`.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> Tree:
    """The inverse of `flatten`.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    return traverse_util.unflatten_dict(leaves, sep="/")
