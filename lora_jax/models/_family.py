"""The description of a model family: its module, and the names of its weights."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from transformers import PretrainedConfig

from lora_jax.models._axis_rules import Layout
from lora_jax.models._execution import Execution

Tree = dict[str, Any]
DType = Any


class Weight(NamedTuple):
    """The place of a leaf in a Hugging Face file.

    Attributes:
        name: The tensor's name; each `{}` stands for a stack index (a layer, an expert), in order.
        transpose: Whether the last two axes are swapped in the file; `nn.Linear` stores (out, in), Flax (in, out).
        tied: Names of further tensors that are this same leaf, such as the output head of a model with tied embeddings.
        untied: For each of these, the path of its own leaf in an untied tree, and the place of that leaf in a file.
        parameter: The name of the leaf's parameter in transformers' model, if it isn't the name in files: the experts
            of a layer are one parameter there, and so are their gate and up kernels. A family's table has the leaves of
            one parameter in its order.

    >>> Weight("model.layers.{}.mlp.up_proj.weight", transpose=True).name.format(3)
    'model.layers.3.mlp.up_proj.weight'
    """

    name: str
    transpose: bool = False
    tied: tuple[str, ...] = ()
    untied: "tuple[tuple[str, Weight], ...]" = ()
    parameter: str = ""


class Family(NamedTuple):
    """A model family: the module that a configuration describes, and the names of its weights.

    Attributes:
        config_class: The transformers configuration; `config.json` of a folder has its `model_type`.
        architecture: The transformers class whose folders are read and written.
        module: `(config, dtype, param_dtype, execution) -> nn.Module`, called as
            `module(input_ids, attention_mask, ...)`; its `attention(rows, length, dtype)` is the form of a call.
        weights: `config -> {leaf path: Weight}`, one entry for every leaf of the tree.
        init_cache: `(config, batch, length, dtype, execution) -> pytree` of empty keys and values; None for encoders.
        unembed: `(config, layout, params) -> x -> logits`, from the last hidden states; None for encoders.
        ignored: Regular expressions of names that files may have besides the weights (buffers of old checkpoints).
        copies: `config -> {name: name}`, tensors that may be in files as copies of another (a tied head).
        heads: For each copy that an untied tree has as a leaf of its own: the leaf's path, a dense layer's kernel.
        prefix: The prefix of the names that files of the bare model (its base class in transformers) lack.
        head: The path of the classification head in the tree; empty for a family without one.
        before_head: Parts just before the head, which files with other heads may lack.
        other_heads: Regular expressions of the names of heads that a new head replaces.
        positions: `config -> int`, the most tokens of a row.
    """

    config_class: type[PretrainedConfig]
    architecture: str
    module: Callable[[Any, DType, DType, Execution], Any]
    weights: Callable[[Any], dict[str, Weight]]
    init_cache: Callable[[Any, int, int, DType, Execution], Tree] | None = None
    unembed: Callable[[Any, Layout, Tree], Callable[[Any], Any]] | None = None
    ignored: tuple[str, ...] = ()
    copies: Callable[[Any], dict[str, str]] = lambda config: {}
    heads: Mapping[str, str] = MappingProxyType({})
    prefix: str = ""
    head: str = ""
    before_head: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()
    positions: Callable[[Any], int] = lambda config: config.max_position_embeddings

    def names(self, config: Any) -> dict[str, Weight]:
        """Return the weights by leaf path, each with the names of its copies."""
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


def predicts_labels(decoder: Family) -> Family:
    """Return the family of a decoder whose head `score` sees each row's last token, in place of
    its head of the vocabulary.
    """
    return decoder._replace(
        init_cache=None,
        unembed=None,
        copies=lambda config: {},
        heads={},
        head="score",
        other_heads=(r"lm_head\..*", r"score\..*"),
    )


def untied(names: Mapping[str, Weight]) -> dict[str, str]:
    """Return the heads that share an embedding: the path of the head's own leaf, and the path of the embedding."""
    return {own: path for path, weight in names.items() for own, _ in weight.untied}


def flatten(tree: Tree) -> dict[str, Any]:
    """Return a nested dict as `{"a/b": leaf}`; a leaf is what has a shape, and so a quantized kernel is one leaf.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> Tree:
    """Return the inverse of `flatten`.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    return traverse_util.unflatten_dict(leaves, sep="/")
