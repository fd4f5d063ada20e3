"""`init` adds LoRA nodes to a parameter tree: it selects kernels, and makes their factors."""

import collections
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding

from lora_jax._arguments import check_arguments, known_elsewhere, read_axes
from lora_jax._axes import Axes, TracedAxes
from lora_jax._config import CHANGES_KERNELS, LoRAConfig, Override
from lora_jax._dora import magnitude_of
from lora_jax._node import SUFFIX, LoRA, place
from lora_jax._paths import is_embedding, is_vector, match
from lora_jax._quantize.config import QuantizeConfig
from lora_jax._quantize.kernel import check_groups, check_plain, quantize_kernel, quantized_axes
from lora_jax._residual import take_out
from lora_jax._trained import Trained, trained
from lora_jax._tree import attach, holders, leaves_with_paths, rebox, refuse_quantized, unbox


def init(
    key: jax.Array,
    params: Any,
    config: LoRAConfig,
    *,
    axes: Mapping[str, Axes] | None = None,
    quantize: QuantizeConfig | None = None,
) -> Any:
    """Put a LoRA node beside each targeted kernel.

        kernel: f[...]   →   kernel: f[...],  kernel_lora: LoRA(a random, b = 0, scale = alpha / rank)

    The function computes the same as before until training changes B: the product A B is zero at first. An embedding
    has A, the side that is looked up, at zero and B ~ N(0, 1) instead, as in loralib. Each kernel's key depends on its
    path alone, so that another target never changes the factors of this one. Factors of a sharded base are created on
    the devices of their kernel. With `config.dora` the node has a magnitude too, ‖W‖, with which the function is the
    same up to rounding.

    With `init="pissa"` or `"loftq"` W changes too, and the function is the same up to rounding:

        kernel: W   →   kernel: W - scale · A₀ B₀,  kernel_lora: LoRA(a = A₀, b = B₀, scale, start = (A₀, B₀))

    A₀ B₀ is the best approximation of rank r, of W itself (PiSSA) or of what W's quantization loses (LoftQ). The node
    keeps its start, and files get scale · (A B - A₀ B₀), of rank 2r, which belongs beside the plain W.

    Args:
        key: A JAX random key.
        params: The parameters: mappings, at any depth, of arrays. Works on ShapeDtypeStructs under `jax.eval_shape`.
        config: The settings.
        axes: How the kernels are used. Best from `lora_jax.kernel_axes(apply_fn, params, *inputs)`; then a target that
            the function doesn't contract is an error. Or a dict from patterns to `Axes`, for kernels that aren't
            f[inputs, outputs].
        quantize: Kernels to quantize as `lora_jax.quantize` does, after PiSSA has changed them; LoftQ needs it.

    Returns:
        The tree with its nodes. A leaf trained in full (`config.also_train`) is marked as such, and gets a buffer of
        its own: float32 where its own dtype is narrower.

    Warns:
        UserWarning: A rank is above the kernel's full rank, the smaller of its inputs and outputs, which adds nothing.

    Raises:
        ValueError: Arguments have wrong types or are in another order; factors are in float16 or narrower, where Adam's
            eps of 1e-8 is 0 and its second step gives nan; the axes are another tree's; a pattern matches nothing; a
            kernel isn't floating-point, has more than two axes and no rule, is adapted already, has no string key in a
            mapping, or is trained in full too; with PiSSA or LoftQ, a kernel is an embedding, traced, or quantized
            before.

    >>> params = {"query": {"kernel": jnp.ones((4, 6))}, "out": {"kernel": jnp.ones((6, 4))}}
    >>> params = init(jax.random.key(0), params, LoRAConfig(rank=2, alpha=4, targets=["query"]))
    >>> node = params["query"]["kernel_lora"]
    >>> node.a.shape, node.b.shape, float(node.scale)
    ((4, 2), (2, 6), 2.0)
    """
    check_arguments(key, params, config)
    leaves = by_path(params)
    kernels = select(leaves, config, axes)
    _check_places(params, kernels)
    in_full = match(config.also_train, leaves, what="also_train")
    both = sorted(set(in_full) & set(kernels))
    if both:
        raise ValueError(f"{both[0]}: is a target and trained in full too; take it out of also_train, or exclude it")
    ranks = _ranks(kernels, config)
    _warn_of_ranks(kernels, {path: max(each) for path, (each, _) in ranks.items()})
    rounded = _to_quantize(leaves, quantize, axes, in_full)
    new: dict[str, Any] = {}
    if config.init in CHANGES_KERNELS:
        nodes = {}
        if tables := [path for path, kernel in kernels.items() if kernel.embedding]:
            raise ValueError(f"{tables[0]}: is an embedding, and init={config.init!r} is for products; exclude it")
        for path, kernel in kernels.items():
            how, w = quantize if path in rounded else None, unbox(leaves[path])
            nodes[path], new[path] = take_out(path, w, Axes(*kernel.axes), ranks[path], config, how)
    else:
        nodes = {path: _node(key, path, kernel, ranks[path], config) for path, kernel in kernels.items()}
    if quantize is not None:
        for path in rounded.keys() - new.keys():
            new[path] = quantize_kernel(unbox(leaves[path]), quantize, quantized_axes(rounded[path]))
    new = {path: rebox(leaves[path], w) for path, w in new.items()}
    if config.dora:
        nodes = {path: _with_magnitude(node, unbox(leaves[path]), kernels[path]) for path, node in nodes.items()}
    return attach(params, nodes, new | {path: _master(path, leaves[path]) for path in in_full})


def _to_quantize(
    leaves: Mapping[str, Any], config: QuantizeConfig | None, axes: Mapping[str, Axes] | None, in_full: Collection[str]
) -> dict[str, "_Kernel"]:
    """Return the kernels that are quantized too."""
    if config is None:
        return {}
    kernels = select(leaves, config, axes)
    for path, kernel in kernels.items():
        if path in in_full:
            raise ValueError(f"{path}: is to be quantized, and trained in full too; take it out of one of the two")
        check_plain(path, unbox(leaves[path]))
        check_groups(path, [kernel.shape[axis] for axis in quantized_axes(kernel).inputs], config)
    return kernels


class Selection(Protocol):
    """Patterns of kernels, as a config has them."""

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def exclude(self) -> tuple[str, ...]: ...


class _Kernel(NamedTuple):
    shape: tuple[int, ...]
    sharding: Any  # None: JAX chooses the device
    axes: Axes
    embedding: bool

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Return sizes of the stack, the inputs and the outputs."""
        return tuple(tuple(self.shape[axis] for axis in group) for group in self.axes)


def by_path(params: Any) -> dict[str, Any]:
    """Return the leaves outside nodes by path; boxed leaves stay in their boxes."""
    pairs = [(path, leaf) for path, leaf in leaves_with_paths(params) if not isinstance(leaf, LoRA)]
    twice = [path for path, count in collections.Counter(path for path, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: two leaves have this path once their keys are joined with slashes; rename one")
    return dict(pairs)


# Selecting ----------------------------------------------------------------------------------------------------------


def select(leaves: Mapping[str, Any], config: Selection, axes: Mapping[str, Axes] | None) -> dict[str, _Kernel]:
    """Return the kernels that the config targets."""
    exact, rules = read_axes(axes, leaves, used=bool(config.targets))
    adaptable = {path for path, leaf in leaves.items() if _is_matrix(path, unbox(leaf), exact)}
    linear = None if exact is None else adaptable & _linear(exact, rules)
    chosen: set[str] = set()
    for pattern in config.targets:
        hits = adaptable & set(match([pattern], leaves, what="targets", linear=linear))
        if not hits:
            raise ValueError(
                f"targets: {pattern!r} matches no kernel, only biases, norms and such; name them in also_train"
            )
        chosen |= hits
    excluded = match(config.exclude, leaves, what="exclude", linear=linear)
    if config.targets and chosen <= set(excluded):
        raise ValueError("exclude: leaves none of the targets")
    return {
        path: _kernel(path, unbox(leaves[path]), exact, rules)
        for path in leaves
        if path in chosen and path not in excluded
    }


def _linear(exact: Mapping[str, TracedAxes], rules: Collection[str]) -> set[str]:
    """Return the kernels of `"all-linear"`: contracted with activations in the trace and no head,
    or given axes by a rule.
    """
    traced = {path for path, entry in exact.items() if not entry.embedding and not entry.head}
    return traced | {path for path in rules if path not in exact and not is_embedding(path)}


def _is_matrix(path: str, leaf: Any, exact: Mapping[str, TracedAxes] | None) -> bool:
    """Return whether a leaf has an input and an output side, as far as can be known."""
    if isinstance(leaf, Trained) or len(np.shape(leaf)) < 2:
        return False
    if exact is not None and path in exact:
        return bool(exact[path].inputs and exact[path].outputs)
    return not is_vector(path)


def _kernel(path: str, leaf: Any, exact: Mapping[str, TracedAxes] | None, rules: Mapping[str, Axes]) -> _Kernel:
    shape, dtype = tuple(leaf.shape), jnp.dtype(leaf.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{path}: is {dtype.name}, expected a floating-point kernel; dequantize it, or exclude it")
    traced = exact.get(path) if exact is not None else None
    if path in rules:  # written by hand, so it overrides the traced axes
        axes = rules[path]
    elif traced is not None:
        axes = Axes(*traced)
    elif exact is not None:
        hint = known_elsewhere(path, exact) or "; exclude it"
        raise ValueError(f"{path}: the traced function never contracts or looks up this leaf{hint}")
    elif len(shape) == 2:
        axes = Axes()
    else:
        raise ValueError(
            f"{path}: has shape {shape}, and which axes are inputs isn't known;"
            " pass axes=lora_jax.kernel_axes(apply_fn, params, *inputs)"
        )
    if sorted(sum(axes, ())) != list(range(len(shape))) or not axes.inputs or not axes.outputs:
        raise ValueError(f"{path}: {axes} must name each axis of shape {shape} once, with inputs and outputs")
    embedding = is_embedding(path) if traced is None else traced.embedding
    return _Kernel(shape, _sharding_of(leaf), axes, embedding)


def _sharding_of(leaf: Any) -> Any:
    """Return the sharding of a real array, or of a ShapeDtypeStruct that has one; None lets JAX
    choose one for the factors.
    """
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding  # known only under a mesh with explicit axes
        return sharding if any(axis is not None for axis in sharding.spec) else None
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _check_places(params: Any, kernels: Collection[str]) -> None:
    known = holders(params)
    for path in kernels:
        if path not in known:
            raise ValueError(
                f"{path}: is in a list, a tuple, an object or under an integer key, where {SUFFIX!r} can't be added"
                " to its name; put it in a dict under a string, or exclude it"
            )
        sibling = known[path].get(path.rpartition("/")[2] + SUFFIX)
        if isinstance(sibling, LoRA):
            raise ValueError(f"{path}: is adapted already; merge it first, or start from the base that split gives")
        if sibling is not None:
            raise ValueError(f"{path}{SUFFIX}: the tree has a leaf of that name, which the LoRA node needs; rename it")


def _ranks(kernels: Mapping[str, _Kernel], config: LoRAConfig) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Return the rank and the scale of each stack index of each kernel; one of each for a kernel that isn't stacked."""
    matched = match([override.target for override in config.overrides], kernels, what="overrides")
    plain = Override(target="/.*/")
    result = {}
    for path, kernel in kernels.items():
        override = config.overrides[matched[path]] if path in matched else plain
        count = math.prod(kernel.sizes()[0])
        ranks = _each(config.rank if override.rank is None else override.rank, count, f"{path}: rank")
        alphas = _each(config.alpha if override.alpha is None else override.alpha, count, f"{path}: alpha")
        result[path] = ranks, tuple(config.scale(*pair) for pair in zip(ranks, alphas, strict=True))
    return result


def _warn_of_ranks(kernels: Mapping[str, _Kernel], ranks: Mapping[str, int]) -> None:
    """Warn of ranks above the full rank of a kernel: allowed, as in PEFT, but without any effect on what ΔW can be."""
    largest = {path: min(map(math.prod, kernel.sizes()[1:])) for path, kernel in kernels.items()}
    above = [path for path in kernels if ranks[path] > largest[path]]
    if above:
        path, more = above[0], f", as in {len(above) - 1} more" if len(above) > 1 else ""
        warnings.warn(
            f"{path}: rank {ranks[path]} is above {largest[path]}, the rank of the kernel itself{more}: A and B grow, "
            f"ΔW can't; {largest[path]} is enough",
            stacklevel=3,
        )


def _each(value: Any, count: int, what: str) -> tuple:
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{what}: {len(value)} values given, the kernel has {count} stack indices")
    return value


# Initialising -------------------------------------------------------------------------------------------------------


def _node(key: jax.Array, path: str, kernel: _Kernel, ranks_scales: tuple[tuple, tuple], config: LoRAConfig) -> LoRA:
    ranks, scales = ranks_scales
    a, b = _maker(kernel, ranks, config.init, config.dtype)(_fold(key, path))
    return LoRA(a, b, np.reshape(scales, kernel.sizes()[0]), axes=kernel.axes)


def _fold(key: jax.Array, path: str) -> jax.Array:
    """Return the kernel's own key, from a hash of its path that is the same in every process,
    which Python's `hash` isn't.
    """
    digest = hashlib.sha256(path.encode()).digest()
    for word in np.frombuffer(digest[:8], "<u4"):
        key = jax.random.fold_in(key, word)
    return key


# A cache of compiled functions: a model has many kernels, and few combinations of shape, sharding and axes.
@functools.cache
def _maker(kernel: _Kernel, ranks: tuple[int, ...], initializer: str, dtype: str):
    """Return a function from a key to (a, b), which creates them on the devices of the kernel's
    sharding, and on no others.
    """
    stack, inputs, outputs = kernel.sizes()
    rank = max(ranks)

    def make(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = np.reshape(ranks, stack)
        used = np.arange(rank) < each[..., None]  # the rest is padding: columns of A and rows of B that stay zero
        used_a = used.reshape(*stack, *(1 for _ in inputs), rank)
        a_shape, b_shape = (*stack, *inputs, rank), (*stack, rank, *outputs)
        if kernel.embedding:
            drawn = jax.random.normal(key, b_shape)
            a, b = jnp.zeros(a_shape), jnp.where(used.reshape(*used.shape, *(1 for _ in outputs)), drawn, 0)
        else:
            bound = 1 / math.sqrt(math.prod(inputs))  # of Kaiming's uniform distribution with a = √5
            if initializer == "kaiming_uniform":
                drawn = jax.random.uniform(key, a_shape, minval=-bound, maxval=bound)
            elif initializer == "kaiming_normal":
                # U(±c) has the variance c²/3. The barrier keeps XLA from merging the factor with one inside `normal` in
                # some programs and not in others: alone and within a larger program, A has the same bits.
                drawn = lax.optimization_barrier(jax.random.normal(key, a_shape)) * (bound / math.sqrt(3))
            else:
                std = 1 / np.maximum(each, 1).reshape(*stack, *(1 for _ in inputs), 1)
                drawn = jax.random.normal(key, a_shape) * std
            a, b = jnp.where(used_a, drawn, 0), jnp.zeros(b_shape)
        return a.astype(dtype), b.astype(dtype)

    return _placed(make, kernel, lambda where: (where.a, where.b))


def _placed(make: Callable[..., Any], kernel: _Kernel, part: Callable[[LoRA], Any]) -> Callable[..., Any]:
    """`make`, compiled, with a sharding for its results: a part of the node has the kernel's."""
    if kernel.sharding is None:
        return jax.jit(make)
    where = part(place(kernel.sharding, LoRA(True, True, 1.0, True, kernel.axes)))
    if isinstance(kernel.sharding, NamedSharding) and isinstance(kernel.sharding.mesh, AbstractMesh):
        # Traced, with explicit axes: a jit inside a jit doesn't give its results the types that out_shardings says.
        return jax.jit(lambda given: jax.tree.map(jax.sharding.reshard, make(given), where))
    return jax.jit(make, out_shardings=where)


def _with_magnitude(node: LoRA, leaf: Any, kernel: _Kernel) -> LoRA:
    return node.replace(magnitude=_measure(kernel)((leaf, node.scale)))


@functools.cache
def _measure(kernel: _Kernel) -> Callable[..., Any]:
    """Return a function from (W, scale) to the magnitude: W's norms, and 0 at stack indices that aren't adapted."""

    def make(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, scale = given
        adapted = scale.reshape(scale.shape + (1,) * len(kernel.axes.outputs)) != 0
        return jnp.where(adapted, magnitude_of(w, kernel.axes), 0).astype(jnp.float32)

    return _placed(make, kernel, lambda where: where.magnitude)


def _master(path: str, leaf: Any) -> Any:
    """Return the leaf marked as trained in full, float32 where its dtype is narrower."""
    refuse_quantized(path, leaf)
    dtype = jnp.dtype(unbox(leaf).dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{path}: is {dtype.name}, and only floating-point leaves train; take it out of also_train")
    return leaf if isinstance(leaf, Trained) else trained(leaf)
