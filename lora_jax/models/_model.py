"""A model as data and pure functions, and making one without arrays."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lora_jax.models import _end_tokens, _family, _settings, _tokenizer
from lora_jax.models._attention_choice import Choice
from lora_jax.models._axis_rules import RULES, Layout, Rules, auto_mesh, layout_of, shardings_of
from lora_jax.models._execution import Execution, decodes
from lora_jax.models._family import Family, Weight, flatten, unflatten


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model as data and pure functions.

    Attributes:
        config: The transformers configuration.
        params: A nested dict of arrays (`jax.ShapeDtypeStruct` from `load_abstract`); leaves under `layers` are
            stacked, with the axis of layers first.
        names: Leaf path -> `Weight`, its name in Hugging Face files.
        apply: `(params, input_ids, attention_mask=None, *, positions=None, segment_ids=None, cache=None,
            more_embeddings=None)` with
            `input_ids` int32[B, T] and `attention_mask` [B, T], 1 at real tokens (padding may be on either side)
            -> logits [B, T, V], or `(logits, cache)` when a cache is given. `positions` int32[B, T] default to the
            positions among the real tokens. `segment_ids` int32[B, T] are for rows with several documents, in place of
            the mask: the documents' numbers, 0 at padding; a token attends to its own document, where positions start
            anew. Ids below 0 are looked up in `more_embeddings`, f[E, D], as further rows
            of the table of embeddings: -1 is the first. With `hidden=True` it computes no logits and returns the last
            hidden states, [B, T, D]. Encoders take `token_type_ids` int32[B, T] instead of a cache and of `hidden`, and
            return the output of their head.
        unembed: `params -> (x -> logits)`, the model's head as a function of the last hidden states [B, T, D] or of
            some of them. The head's kernel is gathered once for each call with `params`.
        init_cache: `(batch, length, dtype=None)` -> an empty cache for `length` tokens a row, padding included.
        attention: `(rows, length)` -> the `form` of attention of a batch of that shape, and `why` it isn't the
            platform's fastest; as a string it is a line to print. Decoders take `cached=True` too.
        remat: "none", "lean" or "full".
        layers: "scan" or "unrolled".
        folder: The folder that it was loaded from; None for `init`.
        adapter: The folder of an adapter whose tokenizer or chat template, if any, replaces the model's; set with
            `dataclasses.replace(model, adapter=folder)`.
        template: A file with a chat template, which replaces the tokenizer's own.
        generates: Whether it predicts next tokens; encoders don't.
        head: The path of the classification head in `params`, whose labels are `label_names(config)`; empty without.
        newly_initialized: The paths of the leaves of a new head, which the folder lacks.
        max_length: The most tokens of a row.
        axes: Leaf path -> the names of its axes, for rules like `RULES`; leaves without names are copied everywhere.
        counts: Name of an axis -> its number of units, if that isn't its size: an axis of "heads" has the channels of
            all heads, and is divided between heads only.
        mesh: The mesh that activations are spread over, from `on_mesh`, with Auto axes; None for one device.
        rules: The rules of that mesh.
        remade: `(layout) -> apply, init_cache, unembed, attention` of this model on another mesh.
        of_config: `config -> Model` of another configuration of the same family, without arrays and on one device.
        new_tokenizer: A tokenizer that replaces that of the folders, from `add_tokens`.

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> from lora_jax import models
    >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> config = LlamaConfig(vocab_size=11, **sizes)
    >>> folder = tempfile.mkdtemp()
    >>> config.save_pretrained(folder)
    >>> model = models.load_abstract(folder)
    >>> model.generates, model.max_length, model.names["layers/mlp/up_proj/kernel"].name
    (True, 2048, 'model.layers.{}.mlp.up_proj.weight')
    """

    config: PretrainedConfig
    params: dict[str, Any]
    names: Mapping[str, Weight]
    apply: Callable[..., Any]
    init_cache: Callable[..., Any]
    unembed: Callable[[Any], Callable[[Any], Any]] | None = None
    attention: Callable[..., Choice] = lambda rows, length: Choice("xla", "")
    remat: str = "none"
    layers: str = "scan"
    folder: Path | None = None
    adapter: Path | None = None
    template: Path | None = None
    generates: bool = True
    head: str = ""
    newly_initialized: tuple[str, ...] = ()
    max_length: int = 0
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    mesh: Mesh | None = None
    rules: Rules = field(default_factory=lambda: RULES)
    remade: Callable[[Layout], dict[str, Any]] = lambda layout: {}
    of_config: Callable[[Any], "Model"] = lambda config: _no_family(config)
    new_tokenizer: PreTrainedTokenizerBase | None = None

    def on_mesh(self, mesh: Mesh, rules: Rules | None = None) -> "Model":
        """Return the same model with activations that are spread over a mesh, between the layers and within them.

        `params` aren't moved; `shardings(model)` are the shardings for them:

            model = models.load("path/to/folder").on_mesh(mesh)
            params = jax.device_put(model.params, models.shardings(model))

        Args:
            mesh: A mesh with axes of any type.
            rules: The axes of the mesh for each name of an axis, in the order of precedence: `RULES | {...}` changes
                some.

        Raises:
            ValueError: No rule names an axis of the mesh.
        """
        rules = self.rules if rules is None else rules
        layout = layout_of(mesh, rules)
        return replace(self, mesh=layout.mesh, rules=rules, **self.remade(layout))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder, or of the adapter, loaded at the first access; or the one with new tokens.

        Raises:
            ValueError: There is none.
        """
        if self.new_tokenizer is not None:
            return self.new_tokenizer
        return _tokenizer.load(self.folder, self.adapter, self.config, self.template)

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text, from the configuration and the folder's `generation_config.json`.

        The tokenizer may have another end token.

        Raises:
            ValueError: The file is damaged.
        """
        return _end_tokens.end_tokens(self.config, self.folder)


def abstract(family: Family, config, dtype, compute_dtype, chosen: Execution, folder: Path | None) -> Model:
    """Make a model without arrays.

    Raises:
        ValueError: The settings don't describe a model; the message starts with the folder's `config.json`, if any.
    """
    param_dtype = _settings.param_dtype(config, dtype)
    if compute_dtype is None and param_dtype == jnp.float16:
        compute_dtype = jnp.float32  # float16 has no range for activations and gradients, and no dot products on CPU
    where = "" if folder is None else f"{folder / _settings.CONFIG}: "
    try:
        module = family.module(config, compute_dtype, param_dtype, chosen)
        boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        shapes, axes = nn.meta.unbox(boxed), _axes(boxed)
        names, max_length = family.names(config), family.positions(config)
        _settings.check_size(flatten(shapes))
    except ValueError as error:
        raise ValueError(f"{where}{_settings.one_line(error)}") from error
    except Exception as error:  # modules raise many types for settings that don't fit together
        what = f"{type(error).__name__}: {_settings.one_line(error, 100)}"
        raise ValueError(f"{where}these settings don't describe a {family.architecture} ({what})") from error

    counts = module.counts

    def remade(layout: Layout) -> dict[str, Any]:
        return _functions(
            family, config, (compute_dtype, param_dtype), replace(chosen, layout=layout), shapes, (axes, counts)
        )

    return Model(
        config=config,
        params=shapes,
        names=names,
        remat=chosen.remat,
        layers=chosen.layers,
        folder=folder,
        generates=family.init_cache is not None,
        head=family.head,
        max_length=max_length,
        axes=axes,
        counts=counts,
        remade=remade,
        of_config=lambda config: abstract(family, config, dtype, compute_dtype, chosen, folder),
        **remade(chosen.layout),
    )


def _no_family(config: Any) -> Model:
    raise ValueError("of_config: this model was made by hand, so that nothing says what another configuration means")


class OnMesh(NamedTuple):
    """A model's function on a mesh, for those who have the function alone: `apply.on_mesh(mesh, rules)` gives it.

    Attributes:
        apply: The function whose activations are spread over the mesh.
        shardings: Leaf path -> where it belongs, of every leaf that the tree may have.
        rows: Where a batch belongs: its first axis is cut.
    """

    apply: Callable[..., Any]
    shardings: dict[str, NamedSharding]
    rows: NamedSharding


def _functions(
    family: Family, config: Any, dtypes: tuple[Any, Any], chosen: Execution, shapes: Any, named: tuple[Any, Any]
) -> dict[str, Any]:
    """Return the model's functions: fields of a `Model`."""
    compute_dtype, param_dtype = dtypes
    module = family.module(config, compute_dtype, param_dtype, chosen)
    leaves, names = flatten(shapes), family.names(config)
    heads = _family.untied(names)
    expected, known = jax.tree.structure(shapes), {*leaves, *heads}
    # Leaves of a stack have the layer's axis first.
    stacks = [leaves[path] for path, weight in names.items() if "{}" in weight.name and path in leaves]
    layer_bytes = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in stacks)

    def apply(params, input_ids, attention_mask=None, **keywords):
        if jax.tree.structure(params) != expected:
            _check_known(params, known)
        if keywords.get("segment_ids") is not None and (family.init_cache is None or family.head):
            raise ValueError(f"{family.architecture}: segment_ids given, but only decoders of text take packed rows")
        return module.apply({"params": params}, input_ids, attention_mask, **keywords)

    def init_cache(batch: int, length: int, dtype: Any = None):
        if family.init_cache is None:
            raise ValueError(f"{family.architecture}: predicts no next token, so it generates no text and has no cache")
        how = decodes(chosen, layer_bytes, length)
        cache = family.init_cache(config, batch, length, dtype or compute_dtype or param_dtype, how)
        axes = ("batch", "kv_heads", "length", "head_dim")  # of a layer's keys and values on a mesh

        def place(x: Any) -> Any:
            return chosen.layout.constrain(x, *("layers",) * (x.ndim - len(axes)), *axes)

        return (
            cache if chosen.layout.mesh is None else cache | {name: jax.tree.map(place, cache[name]) for name in "kv"}
        )

    def unembed(params):
        if family.unembed is None:
            raise ValueError(f"{family.architecture}: predicts no next token")
        return family.unembed(config, chosen.layout, params)

    def attention(rows: int, length: int, **call: bool) -> Choice:
        return module.attention(rows, length, compute_dtype or param_dtype, **call)

    def on_mesh(mesh: Mesh, rules: Rules | None = None) -> OnMesh:
        own = rules is None and auto_mesh(mesh) == chosen.layout.mesh  # and so are the rules that put it there
        layout = chosen.layout if own else layout_of(mesh, RULES if rules is None else rules)
        axes, counts = named
        spread = _functions(family, config, dtypes, replace(chosen, layout=layout), shapes, named)
        # A head that an adapter has untied is the transpose of the table it was tied to.
        leaves = flatten(shapes) | {
            untied: jax.eval_shape(jnp.transpose, flatten(shapes)[path]) for untied, path in heads.items()
        }
        axes = axes | {untied: axes[path][::-1] for untied, path in heads.items()}
        with warnings.catch_warnings():
            if layout == chosen.layout:  # whoever put the model there has been warned
                warnings.simplefilter("ignore")
            where = shardings_of(layout, leaves, axes, counts)
        return OnMesh(spread["apply"], where, layout.rows())

    # Where the trainer looks for them, which is given the function alone.
    apply.on_mesh = on_mesh  # pyright: ignore[reportFunctionMemberAccess]
    apply.unembed = unembed  # pyright: ignore[reportFunctionMemberAccess]
    return {"apply": apply, "init_cache": init_cache, "unembed": unembed, "attention": attention}


def shardings(model: Model, mesh: Mesh | None = None, rules: Rules | None = None) -> dict[str, Any]:
    """Return the shardings of a model's weights on a mesh, from which the shardings of factors and moments follow.

        model = models.load("path/to/folder")
        base = models.shardings(model, mesh)
        params = lora_jax.init(key, jax.device_put(model.params, base), config)
        where = lora_jax.shardings(params, base)

    An axis that can't be divided, such as an axis of 5 heads on 8 devices, is copied, with a warning.

    Args:
        model: A model from `load`, `load_abstract` or `init`.
        mesh: A mesh with axes of any type; the result has Auto axes. Defaults to the model's own.
        rules: The axes of the mesh for each name of an axis, in the order of precedence: `RULES | {...}` changes some.
            Defaults to the model's own.

    Returns:
        A tree like `model.params`, of NamedShardings. In place of a node, such as a quantized kernel, it has the
        kernel's, from which `lora_jax.shardings(params, base)` derives those of the node's arrays.

    Raises:
        ValueError: There is no mesh, or no rule names one of its axes.

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> from lora_jax import models
    >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> config = LlamaConfig(vocab_size=11, **sizes)
    >>> folder = tempfile.mkdtemp()
    >>> config.save_pretrained(folder)
    >>> model = models.load_abstract(folder)
    >>> where = models.shardings(model, jax.make_mesh((1,), ("fsdp",)))
    >>> where["lm_head"]["kernel"].spec
    P('fsdp', None)
    """
    mesh = model.mesh if mesh is None else mesh
    if mesh is None:
        raise ValueError("mesh: none given, and the model is on none; pass shardings(model, mesh)")
    layout = layout_of(mesh, model.rules if rules is None else rules)
    return unflatten(shardings_of(layout, flatten(model.params), model.axes, model.counts))


def _axes(boxed: Any) -> dict[str, tuple[str | None, ...]]:
    """Return the names of the axes of each leaf that has any, as Flax's boxes hold them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.names
        for path, leaf in leaves
        if isinstance(leaf, nn.LogicallyPartitioned)
    }


def _check_known(params: Any, known: Collection[str]) -> None:
    """Refuse leaves that no layer uses: Flax ignores them silently."""
    for path, _ in jax.tree.leaves_with_path(params):
        if (name := jax.tree_util.keystr(path, simple=True, separator="/")) not in known:
            raise ValueError(
                f"{name}: the model has no such leaf; for a tree with an adapter call lora_jax.adapt(model.apply), or"
                " merge it"
            )
