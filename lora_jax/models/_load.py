"""Loading models from folders, from configurations alone, and making them with random weights."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PretrainedConfig

from lora_jax.models import _folder, _heads, _settings, _weights
from lora_jax.models._axis_rules import RULES, Rules
from lora_jax.models._execution import Attention, Execution, Layers, Platform, Remat, execution
from lora_jax.models._families import FAMILIES
from lora_jax.models._family import flatten, unflatten
from lora_jax.models._kept import PackedReader, shapes_of
from lora_jax.models._model import Model, abstract
from lora_jax.models._model import shardings as places
from lora_jax.models._packed import check_method
from lora_jax.models._weights import Streamed


class ExecutionOptions(TypedDict, total=False):
    """Options of computing a model: keyword arguments of `load`, `load_streamed`, `load_abstract` and `init`.

    >>> options: ExecutionOptions = {"attention": "xla", "remat": "full", "layers": "scan"}
    >>> sorted(options)  # models.load(folder, **options)
    ['attention', 'layers', 'remat']
    """

    compute_dtype: Any
    """The dtype of the activations; defaults to the embedding's dtype, and to float32 for float16 weights."""

    attention: Attention
    """The form of attention: "xla" computes all scores at once, "blockwise" for a block of queries at a time; "cudnn"
    (CUDA, 16-bit) and "splash" (TPU) are kernels that never store scores; "auto", the default, is the fastest one.
    cuDNN's backward pass isn't promised to give the same bits twice."""

    remat: Remat
    """The values of a layer that the backward pass recomputes: "none"; "lean", all except the products with kernels and
    attention's output; "full", all. "auto", the default, is "none" on CPUs and "lean" elsewhere."""

    layers: Layers
    """ "scan" is a loop over layers; "unrolled" takes longer to compile and saves 5 to 9 % of a step on CUDA, where it
    is the meaning of "auto", the default. Generation without the loop copies no kernel for every token, but holds a
    copy of all layers' leaves meanwhile: for it "auto" is "unrolled" on CUDA, and on CPUs if enough is generated."""

    platform: Platform | None
    """The platform that the model will be compiled for: "cpu", "cuda", "rocm" or "tpu"; defaults to JAX's default."""


def load(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    *,
    labels: Sequence[str] | None = None,
    key: jax.Array | None = None,
    transform: Callable[[Any], Any] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    shardings: Any = None,
    **options: Unpack[ExecutionOptions],
) -> Model:
    """Load a model from a Hugging Face folder, or from the hub by name.

    Kernels that the folder has in few bits stay so, as `lora_jax.Quantized` nodes, where there is a scheme for them:
    bitsandbytes' NF4 and int8, and transformers' fp8, whose blocks become groups. `lora_jax.dequantize(model.params)`
    has them as arrays, and so does `load_streamed`.

    Args:
        path_or_hub_id: A folder with `config.json` and safetensors weights, or `owner/model`.
        dtype: The dtype of the weights; None keeps the dtype of each one in the files.
        labels: The names of the labels that the model is to predict; a single name means a score. The folder's own head
            is used if it has these labels (or as many without names); otherwise the leaves of a new head are
            `newly_initialized`.
        key: The random key of a new head; defaults to `jax.random.key(0)`.
        transform: Maps the tree of `Streamed` leaves before any is read. A leaf that it reads and replaces isn't held
            in memory, for example where `lora_jax.quantize` rounds it to fewer bits.
        mesh: The devices to spread the model over: `Model.on_mesh`, with each weight where `models.shardings` puts it.
            The host's memory then holds the parts of this process's devices, and one tensor.
        rules: The axes of the mesh by the names of the model's axes, as for `models.shardings`.
        shardings: Other places of the weights: one sharding, or a tree of them as `params`.
        options: How the model is computed: `ExecutionOptions`.

    Raises:
        FileNotFoundError: There is no such folder, or it has no configuration or no weights.
        OSError: The weights can't be read, or there isn't enough memory for them.
        ValueError: The architecture isn't supported, or the weights don't fit the configuration.

    Warns:
        UserWarning: Kernels in few bits are dequantized, for there is no scheme for them (fp4; groups that don't divide
            the inputs; layers of which some are in 16 bits).

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> from lora_jax import models
    >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> config = LlamaConfig(vocab_size=11, **sizes)
    >>> folder = tempfile.mkdtemp()
    >>> config.save_pretrained(folder)
    >>> model = models.load_abstract(folder)  # zeros for weights
    >>> models.save(folder + "/zeros", model, jax.tree.map(lambda x: jnp.zeros(x.shape), model.params))
    >>> loaded = models.load(folder + "/zeros", "bfloat16")
    >>> loaded.params["lm_head"]["kernel"].dtype.name, loaded.names["embed_tokens/embedding"].name
    ('bfloat16', 'model.embed_tokens.weight')
    """
    model = load_streamed(path_or_hub_id, dtype, labels=labels, key=key, **options)
    if mesh is not None:
        model = model.on_mesh(mesh, rules)
        shardings = places(model) if shardings is None else shardings
    leaves = flatten(model.params)
    where = flatten(shardings) if isinstance(shardings, dict) else dict.fromkeys(leaves, shardings)
    if leaves.keys() != where.keys():
        path = min(leaves.keys() ^ where.keys())
        raise ValueError(f"{path}: {'no sharding given' if path in leaves else 'the model has no such leaf'}")
    try:
        params = model.params if transform is None else transform(model.params)
        _warn_of_dequantized(model.folder, params)

        def read(key_path: Any, leaf: Any) -> Any:
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            return _weights.materialize(leaf, where[path]) if isinstance(leaf, Streamed) else leaf

        return replace(model, params=jax.tree_util.tree_map_with_path(read, params))
    except MemoryError:
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flatten(model.params).values())
        raise OSError(f"{model.folder}: the weights take {size:,} bytes, more than the free memory") from None


def _warn_of_dequantized(folder: Any, params: Any) -> None:
    """Warn of kernels that are in few bits in the files, and don't stay so."""
    readers = {path: leaf.read for path, leaf in flatten(params).items() if isinstance(leaf, Streamed)}
    reasons = {path: read.why for path, read in readers.items() if isinstance(read, PackedReader) and read.why}
    if reasons:
        path, why = next(iter(reasons.items()))
        more = f", as {len(reasons) - 1} more" if len(reasons) > 1 else ""
        warnings.warn(f"{folder}: {path} is dequantized{more}: {why}", stacklevel=3)


def load_streamed(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    *,
    labels: Sequence[str] | None = None,
    key: jax.Array | None = None,
    **options: Unpack[ExecutionOptions],
) -> Model:
    """Load a model like `load`, but with `Streamed` leaves, which are read one tensor at a time when they are used.

    So a folder can be rewritten, changed or in another dtype, in much less memory than the model takes:

        model = models.load_streamed("path/to/folder")
        models.save("half", model, model.params, dtype="bfloat16")

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> from lora_jax import models
    >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> config = LlamaConfig(vocab_size=11, **sizes)
    >>> folder = tempfile.mkdtemp()
    >>> config.save_pretrained(folder)
    >>> model = models.load_abstract(folder)  # zeros for weights
    >>> models.save(folder + "/zeros", model, jax.tree.map(lambda x: jnp.zeros(x.shape), model.params))
    >>> streamed = models.load_streamed(folder + "/zeros")
    >>> type(streamed.params["lm_head"]["kernel"]).__name__, streamed.params["lm_head"]["kernel"].shape
    ('Streamed', (4, 11))
    """
    chosen, compute_dtype = _resolved(options)
    folder = _folder.find(path_or_hub_id, weights=True)
    family, config = _folder.read_config(folder, FAMILIES)
    new, ignored = (), family.ignored
    if labels is not None:
        family, config, own_head = _heads.labelled(family, config, labels, FAMILIES)
        new = _heads.absent(folder, family.names(config), family, own_head)
        ignored = family.ignored + family.other_heads
    model = abstract(family, config, dtype, compute_dtype, chosen, folder)
    leaves = _weights.stream(
        folder,
        {path: leaf for path, leaf in flatten(model.params).items() if path not in new},
        model.names,
        dtype=dtype,
        ignored=ignored,
        copies=family.copies(config),
        prefix=family.prefix,
        quantization=_settings.read(folder).get("quantization_config"),
        packed_dtype=_settings.param_dtype(config, None),
    )
    found = next(iter(leaves.values())).dtype
    if dtype is None and found != _settings.param_dtype(
        config, None
    ):  # the files' dtype may differ from the configuration's
        model = abstract(family, config, found, compute_dtype, chosen, folder)
    if new:
        module = family.module(config, compute_dtype, next(iter(leaves.values())).dtype, chosen)
        leaves |= _initialized(module, jax.random.key(0) if key is None else key, new)
    return replace(model, params=unflatten(leaves), newly_initialized=new)


def _initialized(module: Any, key: jax.Array, paths: Sequence[str]) -> dict[str, Streamed]:
    """Initialise some leaves of a model, without computing the others."""

    @jax.jit
    def initialize(key):
        leaves = flatten(nn.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
        return {path: leaves[path] for path in paths}

    return {
        path: Streamed(leaf.shape, np.dtype(leaf.dtype), 0, np.asarray(leaf).__getitem__)
        for path, leaf in initialize(key).items()
    }


def quant_method(path_or_hub_id: str | os.PathLike[str]) -> str:
    """Name the method by which a folder's weights are in few bits, "bitsandbytes" or "fp8"; empty for plain weights.

    Raises:
        FileNotFoundError: There is no such folder, or it has no configuration.
        ValueError: The method isn't one that `load` reads.

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> folder = tempfile.mkdtemp()
    >>> LlamaConfig(quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]}).save_pretrained(folder)
    >>> quant_method(folder)
    'fp8'
    """
    folder = _folder.find(path_or_hub_id, weights=False)
    try:
        return check_method(_settings.read(folder).get("quantization_config"))
    except ValueError as error:
        raise ValueError(f"{folder / _settings.CONFIG}: {error}") from None


def load_abstract(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    *,
    labels: Sequence[str] | None = None,
    few_bits: bool = False,
    **options: Unpack[ExecutionOptions],
) -> Model:
    """Load a model like `load`, but from `config.json` alone: every leaf is a `jax.ShapeDtypeStruct`.

    Without `dtype`, leaves have the dtype that the configuration names, or float32. With `few_bits`, kernels that stay
    in few bits when the folder is loaded are `lora_jax.Quantized` nodes of such shapes; which ones those are, the files
    of weights say, and so these are needed where `quant_method(folder)` isn't empty.

    Raises:
        ValueError: `few_bits` is given, and the files of weights that it needs aren't there.

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> from lora_jax import models
    >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> config = LlamaConfig(vocab_size=11, **sizes)
    >>> folder = tempfile.mkdtemp()
    >>> config.save_pretrained(folder)
    >>> models.load_abstract(folder).params["lm_head"]["kernel"]
    ShapeDtypeStruct(shape=(4, 11), dtype=float32)
    """
    chosen, compute_dtype = _resolved(options)
    folder = _folder.find(path_or_hub_id, weights=False)
    family, config = _folder.read_config(folder, FAMILIES)
    if labels is not None:
        family, config, _ = _heads.labelled(family, config, labels, FAMILIES)
    model = abstract(family, config, dtype, compute_dtype, chosen, folder)
    if not few_bits or not (method := quant_method(folder)):
        return model
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: has kernels in few bits ({method}), and no files of weights, which say which ones; take a"
            " folder with its weights, or the 16-bit model"
        )
    streamed = flatten(load_streamed(folder, dtype, labels=labels, **options).params)
    kept = {
        path: shapes_of(leaf, leaf.read)
        for path, leaf in streamed.items()
        if isinstance(leaf, Streamed) and isinstance(leaf.read, PackedReader) and leaf.read.scheme
    }
    return replace(model, params=unflatten(flatten(model.params) | kept))


def init(
    key: jax.Array, config: PretrainedConfig, dtype: Any = jnp.float32, **options: Unpack[ExecutionOptions]
) -> Model:
    """Make a model with random weights: normal with the configuration's `initializer_range`, norms one, biases zero.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> model = init(jax.random.key(0), config)
    >>> model.params["layers"]["self_attn"]["q_proj"]["kernel"].shape
    (2, 8, 8)
    >>> model.apply(model.params, jnp.ones((1, 3), jnp.int32)).shape
    (1, 3, 32)
    """
    chosen, compute_dtype = _resolved(options)
    family = _folder.family_of(config.model_type, config.architectures, FAMILIES)
    model = abstract(family, config, dtype, compute_dtype, chosen, None)
    module = family.module(config, compute_dtype, dtype, chosen)
    return replace(model, params=nn.meta.unbox(jax.jit(module.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]))


def _resolved(options: ExecutionOptions) -> tuple[Execution, Any]:
    """Return the choices, checked and resolved where they are "auto", and the dtype of the activations."""
    choices: Any = {name: value for name, value in options.items() if name != "compute_dtype"}
    return execution(**choices), options.get("compute_dtype")
