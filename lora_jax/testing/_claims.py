"""`certify` checks, before anything is allocated, that a compiled LoRA training step does no unnecessary work."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._jaxprs import inner_jaxprs, opened, used_inputs
from lora_jax._program import Collective, Cost, collectives, cost_of
from lora_jax.testing._step import Step, dims, read_step

STATE_LIMIT = 4  # numbers of optimizer state for each trainable parameter: Adam has 2, Adan 3


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The result of `certify`; `print` shows it.

    Attributes:
        kernels: The number of adapted kernels.
        idle: Kernels whose factors no gradient reaches, whatever the data: the function doesn't use them.
        trained: The number of trainable parameters.
        base: The number of parameters in the base.
        state: The number of entries in the optimizer's state.
        flops: FLOPs of all matrix products of one step, loop bodies times their trip counts.
        plain_flops: FLOPs of the unadapted model's loss and of its gradient for the whole base; None without `plain`.
        collectives: Collectives on arrays of a kernel's size in the compiled step; the plain step has them too.
        argument_bytes: Memory of the compiled step's arguments on one device.
        output_bytes: Memory of its outputs on one device, without those that reuse a donated argument's memory.
        temporary_bytes: Memory of its temporary arrays on one device.
        uncounted: Work that isn't in `flops`.

    >>> sizes = {"argument_bytes": 2**20, "output_bytes": 2**18, "temporary_bytes": 2**18}
    >>> found = Certificate(kernels=2, idle=(), trained=64, base=4096, state=128, flops=10**6, plain_flops=None,
    ...                     collectives=(), uncounted=(), **sizes)
    >>> found.trained / found.base
    0.015625
    """

    kernels: int
    idle: tuple[str, ...]
    trained: int
    base: int
    state: int
    flops: int
    plain_flops: int | None
    collectives: tuple[str, ...]
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    uncounted: tuple[str, ...]

    def __str__(self) -> str:
        share = f", {self.flops / self.plain_flops:.3f} of the plain gradient's" if self.plain_flops else ""
        mib = lambda size: f"{size / 2**20:.1f} MiB"
        sent = [f"{count} × {what}" if count > 1 else what for what, count in Counter(self.collectives).items()]
        lines = {
            "trained": f"{self.trained:,} numbers beside {self.kernels} kernels, of a base of {self.base:,}",
            "gradient": "none of a kernel's shape" + (f"; none at all for {_first(self.idle)}" if self.idle else ""),
            "outputs": f"no copy of the base; {mib(self.output_bytes)} written",
            "base": "an argument, no constant",
            "state": f"{self.state:,} numbers, {self.state / max(self.trained, 1):.1f} for each trained one",
            "sent": "of a kernel's shape, " + (", ".join(sent) or "nothing"),
            "products": f"{self.flops:,} FLOPs{share}" + "".join(f"; not counted: {what}" for what in self.uncounted),
            "memory": f"{mib(self.argument_bytes)} arguments, {mib(self.temporary_bytes)} temporary",
        }
        return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def certify(
    step: Callable[..., Any], *args: Any, plain: Callable[..., Any] | None = None, **kwargs: Any
) -> Certificate:
    """Compile a training step and check that it costs no more than LoRA should.

    Claims: a gradient reaches the factors; neither a gradient of a kernel's shape nor W + ΔW is computed; no output is
    a copy of the base; the base is an argument, not a captured constant; the optimizer's state is proportional to the
    adapter; no collective moves an array of a kernel's shape unless the plain step does, nor the activations of a whole
    batch whose rows a mesh cuts; and, with `plain`, the step has fewer FLOPs than the plain forward and backward.

    Args:
        step: A function that does one training step. It takes the adapter (as `split` returns it, or the whole tree),
            the optimizer's state, the base and a batch, in any order, and returns at least the new adapter and state.
            Jitted or not.
        *args: The arguments of `step`: arrays, or `jax.ShapeDtypeStruct` with or without shardings. The adapter is
            recognised by its LoRA nodes, the base by the kernels at the nodes' paths, and the state by its structure,
            which the step returns too.
        plain: The unadapted model's loss. It is called with the plain parameters and with the arguments in `args` that
            are neither adapter, state nor base.
        **kwargs: Keyword arguments of `step`.

    Returns:
        A certificate with the numbers that were found.

    Raises:
        ValueError: There is no LoRA node in `args`, or claims fail (one line for each).

    >>> import jax, jax.numpy as jnp, optax, lora_jax
    >>> def loss(params, x):
    ...     return jnp.mean((x @ params["dense"]["kernel"]) ** 2)
    >>> params = {"dense": {"kernel": jnp.ones((64, 32))}}
    >>> config = lora_jax.LoRAConfig(rank=2, alpha=4.0, targets=("dense",))
    >>> base, adapter = lora_jax.split(lora_jax.init(jax.random.key(0), params, config))
    >>> tx = lora_jax.masked(optax.adam(1e-3))
    >>> def step(adapter, state, base, x):
    ...     grads = jax.grad(lambda a: lora_jax.adapt(loss)(lora_jax.combine(base, a), x))(adapter)
    ...     updates, state = tx.update(grads, state, adapter)
    ...     return optax.apply_updates(adapter, updates), state
    >>> report = lora_jax.testing.certify(step, adapter, tx.init(adapter), base, jnp.ones((128, 64)), plain=loss)
    >>> report.trained, report.state, report.flops < report.plain_flops
    (192, 385, True)

    Source: Hu et al. 2021, section 4.2 (no gradients or optimizer state of the frozen parameters).
    """
    jitted = step if hasattr(step, "trace") else jax.jit(step)
    traced = jitted.trace(*args, **kwargs)
    parts = read_step(args, traced.out_info)
    lowered = traced.lower()
    compiled = lowered.compile()
    cost = cost_of(traced.jaxpr, parts.data + [True for _ in jax.tree.leaves(kwargs)])
    sent = collectives(compiled.as_text() or "")
    found = [c for c in sent if dims(c.shape) in parts.shards]
    plain_cost, plain_found = (None, None) if plain is None else _plain(plain, parts)
    idle = _idle(traced.jaxpr, parts)
    failures = [
        *_no_gradient(idle, parts),
        *_captured(traced.jaxpr, parts),
        *_materialised(cost, parts),
        *_copies(traced, lowered, parts),
        *_state(parts),
        *_new_collectives(found, plain_found),
        *_whole_batches(sent, parts),
        *_more_flops(cost, plain_cost),
    ]
    if failures:
        raise ValueError("\n".join(failures))
    memory: Any = compiled.memory_analysis()
    return Certificate(
        kernels=len(parts.kernels),
        idle=idle,
        trained=parts.trained,
        base=sum(math.prod(leaf.shape) for leaf in parts.base),
        state=sum(math.prod(leaf.shape) for leaf in parts.state),
        flops=cost.flops,
        plain_flops=None if plain_cost is None else plain_cost.flops,
        collectives=tuple(map(str, found)),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        uncounted=tuple(cost.uncounted),
    )


def _plain(loss: Callable[..., Any], step: Step) -> tuple[Cost, list[Collective]]:
    """The products and collectives of full fine-tuning, the plain loss and its gradient by every leaf of the base."""
    leaves, treedef = jax.tree.flatten(step.plain)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def of_leaves(trained: Sequence[Any], frozen: Sequence[Any], *rest: Any) -> Any:
        parts = {True: iter(trained), False: iter(frozen)}
        out = loss(jax.tree.unflatten(treedef, [next(parts[flag]) for flag in inexact]), *rest)
        return jax.tree.leaves(out)[0]

    trained, frozen = (
        [leaf for leaf, flag in zip(leaves, inexact, strict=True) if flag is kind] for kind in (True, False)
    )
    traced = jax.jit(jax.value_and_grad(of_leaves)).trace(trained, frozen, *step.rest)
    cost = cost_of(traced.jaxpr, [True] * len(traced.jaxpr.in_avals))
    return cost, collectives(traced.lower().compile().as_text() or "")


# Claims: each yields a line for each violation ----------------------------------------------------------------------


def _idle(jaxpr: Any, step: Step) -> tuple[str, ...]:
    """Paths of the kernels whose gradient is zero by construction.

    The gradient of A is a product with B, and that of B a product with A. So where a kernel is used, the new A depends
    on B, or the new B depends on A. One of the two is enough: with a frozen A, as in LoRA-FA, only the new B depends on
    A.
    """
    if not step.trained_first:
        return ()

    def reached(outputs: Sequence[int]) -> list[bool]:
        return used_inputs(jaxpr, [i in outputs for i in range(len(jaxpr.out_avals))])

    by_first, by_second = reached(step.trained_first), reached([place + 1 for place in step.trained_first])
    return tuple(path for path, b in step.second.items() if not by_first[b] and not by_second[b - 1])


def _no_gradient(idle: Sequence[str], step: Step) -> Iterator[str]:
    """No kernel's factors get a gradient."""
    if idle and len(idle) == len(step.kernels):
        yield (
            f"{_first(idle)}: the gradient is zero whatever the data, for the function ignores its LoRA nodes; "
            "take the gradient of lora_jax.adapt(fn)"
        )


def _captured(jaxpr: Any, step: Step) -> Iterator[str]:
    """The base, or an array of a kernel's shape, is a constant of the program."""
    if not step.base:
        path, shape = next(iter(step.kernels.items()))
        yield f"{path}: no argument has this kernel of shape {shape}, so it is a constant; pass the base to the step"
    shapes = {dims(leaf.shape) for leaf in step.base} | set(step.forms)
    for const in _constants(jaxpr):
        if len(dims(const.shape)) > 1 and dims(const.shape) in shapes:
            yield f"a constant of shape {const.shape} is captured, a kernel's shape; pass the base as an argument"


def _constants(jaxpr: Any) -> Iterator[Any]:
    jaxpr, consts = opened(jaxpr)
    for const in consts:
        if hasattr(const, "shape"):
            yield const
    for eqn in jaxpr.eqns:
        for inner in inner_jaxprs(eqn):
            yield from _constants(inner)


def _materialised(cost: Cost, step: Step) -> Iterator[str]:
    """A product has a kernel's shape: of data and data it is the kernel's gradient, of factor and factor it is ΔW."""
    forms = dict(step.forms)
    sizes = {math.prod(form): names for form, names in forms.items()}
    for product in cost.products:
        # A kernel may be reshaped before it is used, and then its gradient has the shape that it has there.
        for shape, origin in zip(product.operands, product.origins, strict=True):
            if origin in step.owners and math.prod(shape) in sizes:
                forms.setdefault(dims(shape), [step.owners[origin]])
    forms = {form: names for form, names in forms.items() if form not in step.trained_in_full | step.factors}
    reported = set()
    for product in cost.products:
        names = forms.get(dims(product.shape))
        what = "its gradient" if all(product.data) else "W + ΔW" if step.parts.issuperset(product.origins) else None
        if names and what and (*names, what) not in reported:
            reported.add((*names, what))
            yield (
                f"{_either(names)}: {what} is materialised, as {product.shape} at {product.source}; "
                "keep the kernel factored (if an activation has that shape, certify at another batch size)"
            )


def _either(names: Sequence[str]) -> str:
    """The paths of the kernels of one shape, any of which may be meant."""
    return " or ".join(names[:3]) + (" or another of that shape" if len(names) > 3 else "")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _copies(traced: Any, lowered: Any, step: Step) -> Iterator[str]:
    """An output has a base leaf's shape, doesn't reuse a donated argument, and isn't an argument returned unchanged."""
    donated = [info for info in jax.tree.leaves(lowered.args_info) if info.donated]
    allowed = Counter((leaf.shape, leaf.dtype) for leaf in (*donated, *step.kept))
    inputs = set(traced.jaxpr.jaxpr.invars)
    shapes = {leaf.shape for leaf in step.base if len(dims(leaf.shape)) > 1}
    for var in traced.jaxpr.jaxpr.outvars:
        key = (var.aval.shape, var.aval.dtype)
        if var.aval.shape not in shapes or var in inputs:
            continue
        allowed[key] -= 1
        if allowed[key] < 0:
            yield f"an output of shape {var.aval.shape} is as large as a base leaf; return the adapter alone, or donate"


def _state(step: Step) -> Iterator[str]:
    """The optimizer's state is larger than an adapter's."""
    size = sum(math.prod(leaf.shape) for leaf in step.state if leaf.shape)
    if size > STATE_LIMIT * step.trained:
        yield (
            f"the optimizer's state has {size:,} numbers for {step.trained:,} trainable parameters; make it with "
            "lora_jax.masked(tx).init(adapter)"
        )


def _new_collectives(found: Sequence[Collective], plain: Sequence[Collective] | None) -> Iterator[str]:
    """A collective moves an array of a kernel's shape, and the plain step has no such collective.

    Without a plain step to compare with, sharded kernels may be gathered but never reduced.
    """
    of_plain = None if plain is None else {(collective.kind, collective.shape) for collective in plain}
    for kind, shape in dict.fromkeys((collective.kind, collective.shape) for collective in found):
        known = kind == "all-gather" if of_plain is None else (kind, shape) in of_plain
        if not known:
            what = Collective(kind, shape)
            yield f"{what}, a kernel's shape: the plain step has none; check the shardings of adapter and base"


def _whole_batches(sent: Sequence[Collective], step: Step) -> Iterator[str]:
    """Activations of all rows, where each device should see its own: left to itself, XLA may rather send these.

    An `all-to-all` has all rows too where it moves each device's share, as of an embedding whose columns are cut.
    """
    cut = [leaf.shape for leaf in jax.tree.leaves(step.rest) if getattr(leaf, "ndim", 0) > 1 and _rows_are_cut(leaf)]
    known = step.shards | step.factors | step.trained_in_full
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for one in sent:
        held = (shape[0] for shape in cut if one.kind != "all-to-all" and _holds(one.shape, shape))
        rows = next(held, None)
        if rows is not None and dims(one.shape) not in known and (one.kind, one.shape) not in seen:
            seen.add((one.kind, one.shape))
            runs = f", {one.times} times" if one.times > 1 else ""
            yield (
                f"{one}{runs}: activations of all {rows} rows, for {one.origin or 'an unnamed operation'}; "
                "constrain activations to their rows' sharding"
            )


def _rows_are_cut(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and sharding.shard_shape(leaf.shape)[0] < leaf.shape[0]


def _holds(shape: Sequence[int], batch: Sequence[int]) -> bool:
    """Return whether an array has every row and position of a batch [rows, length, ...], and several numbers for each.

    >>> _holds((16, 8, 2048, 64), (16, 2048)), _holds((16 * 2048, 64), (16, 2048)), _holds((2, 2048, 64), (16, 2048))
    (True, True, False)
    """
    sizes, (rows, length) = [size for size in shape if size != 1], batch[:2]
    apart = rows in sizes and length in sizes and len(sizes) > 2
    return apart or (rows * length in sizes and len(sizes) > 1)


def _more_flops(cost: Cost, plain: Cost | None) -> Iterator[str]:
    """The step has more FLOPs than the plain step."""
    if plain is not None and cost.flops > plain.flops:
        yield (
            f"{cost.flops:,} FLOPs in matrix products, {plain.flops:,} in plain forward and backward; "
            "lower the rank, or keep kernels factored"
        )
