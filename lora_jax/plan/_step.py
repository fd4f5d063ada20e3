"""The training step as `lora_jax.train` runs it, with arguments that are shapes and places only."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import models
from lora_jax._config import CHANGES_KERNELS, LoRAConfig
from lora_jax._forward import kernel_axes
from lora_jax._init import init
from lora_jax._optim import state_shardings
from lora_jax._quantize.node import bits_of
from lora_jax._quantize.transform import quantize
from lora_jax._sharding import shardings
from lora_jax._tree import is_quantized, split
from lora_jax.plan._request import Request
from lora_jax.train import LANGUAGE_MODELLING, losses_in_chunks, make_optimizer, make_step

STEPS = 1000  # of the schedule; how many there are changes no shape
TRACED_TOKENS = 8  # of the abstract call that shows how each kernel is used
EVERYTHING = "/.*/"


class Step(NamedTuple):
    """A step and what it takes.

    Attributes:
        jitted: The jitted function, which donates adapter and state, as the trainer's does.
        adapter, state, base, batch, key: Its arguments, `jax.ShapeDtypeStruct`s with shardings; no key without dropout.
        model: The model, without weights.
        attention: The form of attention of a batch.
    """

    jitted: Any
    adapter: Any
    state: Any
    base: Any
    batch: Any
    key: Any
    model: Any
    attention: Any

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.adapter, self.state, self.base, self.batch, self.key)


def open_model(request: Request, platform: str | None) -> Any:
    """Read the configuration of the model, without weights.

    Raises:
        ValueError: The model is an encoder.
    """
    names: Any = {name: getattr(request, name) for name in ("attention", "remat", "layers")}
    given: Any = platform
    model = models.load_abstract(request.model, request.dtype, platform=given, **names)
    if not model.generates:
        raise ValueError(
            f"model: {request.model} predicts no next token ({model.config.model_type}); expected"
            " a decoder, because a plan is of a step on text"
        )
    return model


def make(request: Request, model: Any, devices: Sequence[Any], *, full: bool = False) -> Step:
    """Make the step on these devices: LoRA's, or full fine-tuning's with a float32 copy of every weight.

    Raises:
        ValueError: The mesh isn't of these devices.
    """
    request.check_devices(len(devices))
    sizes = request.sizes(len(devices))
    auto = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)
    if len(devices) > 1:
        model = model.on_mesh(mesh)
    config = LoRAConfig(rank=1, alpha=1, targets=(), also_train=(EVERYTHING,)) if full else request.lora
    axes = None if full else kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, TRACED_TOKENS), jnp.int32))
    if config.init in CHANGES_KERNELS:  # which is of the kernels' numbers; the shapes are those of any other
        config = dataclasses.replace(config, init="kaiming_normal")
    kernels = None if full else request.quantize
    weights = model.params if full else models.load_abstract(request.model, request.dtype, few_bits=True).params

    def started(base: Any) -> Any:
        held = base if kernels is None else quantize(base, kernels, axes=axes)
        return init(jax.random.key(0), held, config, axes=axes)

    params = jax.eval_shape(started, weights)
    base, adapter = split(_at(params, shardings(params, models.shardings(model, mesh))))
    train = request.train
    shape = (train.batch_size, train.max_length if train.packing else min(train.max_length, model.max_length))
    tx = make_optimizer(train, STEPS)
    logits = (train.micro_batch_size, shape[1], model.config.vocab_size) if request.is_local else None
    apply_fn = losses_in_chunks(model.apply, LANGUAGE_MODELLING, train.loss_chunk, base, adapter, logits=logits)
    step = make_step(
        apply_fn,
        tx,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        dropout=0.0 if full else train.dropout,
    )
    copied = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(tuple(name for name in sizes if name != "model") or None))
    dtypes = {"input_ids": jnp.int32, "attention_mask": jnp.int32, "loss_weights": jnp.float32}
    if train.packing:
        dtypes["segment_ids"] = jnp.int32
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Step(
        jitted=jax.jit(step, donate_argnums=(0, 1)),
        adapter=adapter,
        state=_at(jax.eval_shape(tx.init, adapter), state_shardings(tx, adapter)),
        base=base,
        batch={name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()},
        key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=copied) if train.dropout and not full else None,
        model=model,
        attention=model.attention(train.micro_batch_size, shape[1], **({"packed": True} if train.packing else {})),
    )


def schemes(tree: Any) -> dict[str, int]:
    """Return the number of kernels in each scheme of few bits."""
    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    return dict(Counter(sorted(leaf.scheme for leaf in leaves if is_quantized(leaf))))


def bytes_on_a_device(tree: Any) -> int:
    """Return bytes that arrays take on one device, without the padding of their tiles.

    >>> sharding = NamedSharding(jax.make_mesh((1,), ("fsdp",)), PartitionSpec("fsdp"))
    >>> bytes_on_a_device({"w": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=sharding)})
    64
    """
    sizes = ((math.prod(leaf.sharding.shard_shape(leaf.shape)), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(count * _bits(dtype) // 8 for count, dtype in sizes)


def _bits(dtype: Any) -> int:
    return 8 * dtype.itemsize if jnp.issubdtype(dtype, jax.dtypes.prng_key) else bits_of(dtype)


def _at(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)
