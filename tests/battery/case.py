"""A function under test as plain data, and the tree with its adapters in."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Axes, LoRA

RANK = 2
DENSE = Axes((), (0,), (1,))
TORCH = Axes((), (1,), (0,))
STACKED = Axes((0,), (1,), (2,))
PARAMS = object()  # where the parameters stand among the arguments, when they are not the first


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


X = normal(16, 24)  # rows of activations; kernels are (24, 20) where nothing else is said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`fn(params, *args, **kwargs)`, and what is known of it by hand.

    axes: how each adapted kernel is used; `kernel_axes` has to find the same.
    by_hand: the same function with LoRA written by hand, `by_hand(params, nodes, *args, **kwargs)`: the yardstick
        of the FLOPs; None where they aren't compared (the kernel can't be kept factored, or nothing new is computed).
    differentiable: False where JAX itself can't differentiate the plain function in reverse.
    bf16, vmap: False where the plain function refuses bfloat16, or a batch of kernels.
    rtol: relative to the norm of the merged function's output or gradient.
    """

    name: str
    fn: Callable
    params: Any
    axes: dict[str, Axes]
    args: tuple = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_hand: Callable | None = None
    differentiable: bool = True
    bf16: bool = True
    vmap: bool = True
    rtol: float = 1e-5

    @functools.cached_property
    def _settings(self):
        return jax.tree.flatten((self.args, self.kwargs))

    @property
    def arrays(self) -> list:
        """The arguments that are arrays; the rest are settings."""
        return [leaf for leaf in self._settings[0] if isinstance(leaf, np.ndarray | np.generic | jax.Array)]

    def call(self, fn, params, arrays):
        """`fn` called as the case says, with `params` and `arrays` in their places."""
        leaves, structure = self._settings
        rest = iter(arrays)
        place = lambda leaf: next(rest) if isinstance(leaf, np.ndarray | np.generic | jax.Array) else leaf
        args, kwargs = jax.tree.unflatten(structure, [params if leaf is PARAMS else place(leaf) for leaf in leaves])
        return fn(*args, **kwargs) if any(leaf is PARAMS for leaf in leaves) else fn(params, *args, **kwargs)


class Catalogue(dict):
    """Cases by name; `@catalogue(...)` adds the function below it."""

    def __call__(self, *args, w=(24, 20), params=None, axes=DENSE, plus=None, by_hand=None, **settings):
        """Register `fn`. A single kernel `w` of the given shape unless `params` gives shapes or arrays by name.

        settings: further fields of `Case` by name; the rest are the function's own keyword arguments.
        plus: what LoRA by hand adds to the plain output (`plus(nodes, *args)`), where the function is linear in it.
        """

        def register(fn):
            name = fn.__name__
            kwargs = dict(settings)
            fields = {key: kwargs.pop(key) for key in ("differentiable", "bf16", "vmap", "rtol") if key in kwargs}
            shapes = {"w": w} if params is None else params
            hand = by_hand
            if plus is not None:
                hand = lambda p, n, *a, **k: fn(p, *a, **k) + plus(n, *a, **k)
            assert name not in self, f"two functions are called {name}"
            self[name] = Case(
                name=name,
                fn=fn,
                params=_draw(shapes, zlib.crc32(name.encode())),
                axes=axes if isinstance(axes, dict) else {"w": axes},
                args=args,
                kwargs=kwargs,
                by_hand=hand,
                **fields,
            )
            return fn

        return register


def _draw(shapes, seed):
    if isinstance(shapes, dict):
        return {key: _draw(value, zlib.crc32(key.encode(), seed)) for key, value in shapes.items()}
    if isinstance(shapes, list):
        return [_draw(value, zlib.crc32(b"%d" % index, seed)) for index, value in enumerate(shapes)]
    return 0.3 * normal(*shapes, seed=seed) if isinstance(shapes, tuple) else shapes


def leaf(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def put(array):
    """The array on the device in float32; jnp.asarray would compile a conversion for each shape."""
    return jax.device_put(np.asarray(array, np.float32))


def make_nodes(params, axes: dict[str, Axes], seed=1) -> dict[str, LoRA]:
    """Adapters with b != 0 and another scale for each stack index, drawn without the library's help."""
    nodes = {}
    for path, (stack, inputs, outputs) in axes.items():
        shape = np.shape(leaf(params, path))
        sizes = lambda which, shape=shape: tuple(shape[axis] for axis in which)
        key = [seed, zlib.crc32(path.encode())]
        a, b, scale = (np.random.default_rng([*key, part]) for part in range(3))
        nodes[path] = LoRA(
            a=put(0.4 * a.normal(size=(*sizes(stack), *sizes(inputs), RANK))),
            b=put(0.4 * b.normal(size=(*sizes(stack), RANK, *sizes(outputs)))),
            # A leaf, so that one program does for all seeds.
            scale=put(scale.uniform(0.5, 1.5, size=sizes(stack))),
            axes=Axes(stack, inputs, outputs),
        )
    return nodes


def with_nodes(params, nodes: dict[str, LoRA], prefix=""):
    """`params` with each node beside its kernel."""
    out = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        out[key] = with_nodes(value, nodes, path + "/") if isinstance(value, dict) else value
        if path in nodes:
            out[f"{key}_lora"] = nodes[path]
    return out


def merge_by_hand(params, nodes: dict[str, LoRA], prefix=""):
    """W + scale A B, or DoRA's m (W + scale A B) / norm, from the definition: owes nothing to the library."""
    out = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            out[key] = merge_by_hand(value, nodes, path + "/")
        elif path in nodes:
            moved = value + delta_by_hand(nodes[path])
            out[key] = with_magnitude_by_hand(moved, nodes[path]).astype(value.dtype)
        else:
            out[key] = value
    return out


def delta_by_hand(node: LoRA):
    stack, inputs, outputs = node.axes
    s, i, o = "stuvw"[: len(stack)], "ijklm"[: len(inputs)], "opqxy"[: len(outputs)]
    product = jnp.einsum(f"{s},{s}{i}r,{s}r{o}->{s}{i}{o}", node.scale, node.a, node.b)
    return jnp.transpose(product, np.argsort([*stack, *inputs, *outputs]))


def with_magnitude_by_hand(kernel, node: LoRA):
    if node.magnitude is None:
        return kernel
    letters = "abcdefg"[: kernel.ndim]
    kept = "".join(letters[axis] for axis in (*node.axes.stack, *node.axes.outputs))
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.einsum(f"{letters},{letters}->{kept}", kernel, kernel)))
    return jnp.einsum(f"{letters},{kept}->{letters}", kernel, node.magnitude / norm)


def low(node: LoRA, x):
    """scale (x A) B for a two-axis kernel and activations whose last axis goes in."""
    return ((x @ node.a) * node.scale) @ node.b
