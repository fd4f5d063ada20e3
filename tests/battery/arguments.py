"""Calls as people write them: flags, strings, None, settings by keyword, nested trees, several kinds of output."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from battery.case import DENSE, PARAMS, Catalogue, X, low, normal

CASES = case = Catalogue()


def plain_low(n, x, *args, **kwargs):
    return low(n["w"], x)


@case(X, True, plus=plain_low)
def a_flag(p, x, train):
    return x @ p["w"] if train else x


@case(X, plus=lambda n, x, mode: low(n["w"], x[:, ::-1]), mode="reversed")
def a_string(p, x, *, mode):
    return (x[:, ::-1] if mode == "reversed" else x) @ p["w"]


@case(X, None, plus=plain_low)
def a_missing_mask(p, x, mask=None):
    y = x @ p["w"]
    return y if mask is None else jnp.where(mask, y, 0)


class Reduce(enum.Enum):
    SUM = "sum"
    MEAN = "mean"


@case(X, Reduce.MEAN, jnp.bfloat16, plus=lambda n, x, how, dtype: low(n["w"], x).mean(0).astype(dtype))
def an_enum_and_a_dtype(p, x, how, dtype):
    return getattr(x @ p["w"], how.value)(0).astype(dtype)


@case(X, jax.nn.relu, axis=0, by_hand=lambda p, n, x, f, axis: f(x @ p["w"] + low(n["w"], x)).sum(axis))
def a_function_and_a_number(p, x, activation, *, axis):
    return activation(x @ p["w"]).sum(axis)


@case({"x": X, "mask": None, "scale": 2.0, "kind": "a"}, plus=lambda n, batch: 2.0 * low(n["w"], batch["x"]))
def a_mixed_batch(p, batch):
    assert batch["mask"] is None
    assert batch["kind"] == "a"
    return batch["x"] @ p["w"] * batch["scale"]


@case(X)
def a_string_output(p, x):
    return {"logits": x @ p["w"], "model": "tiny", "layers": 1, "cache": None}


class Output(NamedTuple):
    logits: jax.Array
    best: jax.Array


@case(X)
def a_named_tuple_output(p, x):
    logits = x @ p["w"]
    return Output(logits, jnp.argmax(logits, -1))


@case(
    X,
    params={"params": {"mlp": {"kernel": (24, 20), "bias": (20,)}}, "batch_stats": {"mean": (20,)}},
    axes={"params/mlp/kernel": DENSE},
    by_hand=lambda v, n, x, mutable: (by_hand_of_variables(v, n, x), v["batch_stats"]),
    mutable=("batch_stats",),
)
def a_variables_dict(variables, x, *, mutable):
    mlp = variables["params"]["mlp"]
    y = x @ mlp["kernel"] + mlp["bias"] - variables["batch_stats"]["mean"]
    return y, {name: variables[name] for name in mutable}


def by_hand_of_variables(v, n, x):
    y = x @ v["params"]["mlp"]["kernel"] + low(n["params/mlp/kernel"], x)
    return y + v["params"]["mlp"]["bias"] - v["batch_stats"]["mean"]


@case(X, PARAMS)
def parameters_second(x, p):
    return x @ p["w"]


@case(X, weights=PARAMS)
def parameters_by_keyword(x, *, weights):
    return x @ weights["w"]


@case(jax.random.key(3), X, by_hand=lambda p, n, key, x: dropped(key, x @ p["w"] + low(n["w"], x)))
def a_random_key(p, key, x):
    return dropped(key, x @ p["w"])


def dropped(key, y):
    return jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y, 0)


@case(X, params={"w": (24, 20), "steps": np.int32(3), "frozen": np.bool_(True)})
def integer_and_boolean_leaves(p, x):
    return jnp.where(p["frozen"], x @ p["w"] * p["steps"], 0)


@case(X, params={"layers": [{"bias": (24,)}, {"bias": (24,)}], "w": (24, 20), "unused": None, "empty": {}})
def lists_and_empty_containers(p, x):
    assert p["unused"] is None
    assert p["empty"] == {}
    return sum((x + layer["bias"]) @ p["w"] for layer in p["layers"])


@case(X, params={"used": {"kernel": (24, 20)}, "other": {"kernel": (24, 20)}}, axes={"used/kernel": DENSE})
def an_unused_kernel(p, x):
    return x @ p["used"]["kernel"]


@case(X, 3, plus=lambda n, x, factor: factor * low(n["w"], x))
def a_python_scalar(p, x, factor):
    return x @ p["w"] * factor


@case(X)
def a_constant_inside(p, x):
    return x @ p["w"] @ jnp.asarray(normal(20, 20, seed=7))
