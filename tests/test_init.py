"""Configs and init: validation, what is chosen, how factors start (PEFT, loralib), ranks by layer, and every error."""

import collections
import copy
import dataclasses
import importlib.util
import inspect
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from trees import nodes_in

import lora_jax
from lora_jax import Axes, KernelAxes, LoRAConfig, Override
from lora_jax._config import PEFT_NAMES

KEY = jax.random.key(0)
GOLDEN = Path(__file__).parent / "golden"


def config(**settings):
    return LoRAConfig(**{"rank": 2, "alpha": 4, **settings})


def layer(*names, shape=(6, 8), dtype=jnp.float32):
    return {name: {"kernel": jnp.ones(shape, dtype), "bias": jnp.ones(shape[-1], dtype)} for name in names}


def adapted_paths(params, settings, axes=None):
    whole = jax.eval_shape(lambda tree: lora_jax.init(KEY, tree, settings, axes=axes), params)
    return set(nodes_in(whole))


# The config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: 0 given, expected a whole number of 1 or more"),
        ({"rank": 2.0}, "rank: 2.0 given"),
        ({"rank": True}, "rank: True given"),
        ({"alpha": -1}, "alpha: -1 given, expected a finite number above 0"),
        ({"alpha": 0}, "alpha: 0 given"),
        ({"alpha": float("nan")}, "alpha: nan given"),
        ({"alpha": "16"}, "alpha: '16' given"),
        ({"scaling": "rslora"}, "scaling: 'rslora' given, expected 'standard' or 'rank_stabilized'"),
        (
            {"init": "zeros"},
            "init: 'zeros' given, expected 'kaiming_normal', 'kaiming_uniform', 'gaussian', 'pissa' or 'loftq'",
        ),
        ({"dtype": "int8"}, "dtype: 'int8' given, expected a floating-point type"),
        ({"dtype": "flaot32"}, "dtype: 'flaot32' given"),
        ({"targets": ["/(/"]}, r"targets: '/\(/' is not a regular expression"),
        ({"also_train": [""]}, "also_train: '' is not a name"),
        ({"targets": ()}, "targets: none given, and also_train is empty too"),
        (
            {"targets": (), "also_train": ["head"], "exclude": ["q"]},
            "targets: none given, but exclude or overrides are",
        ),
    ],
)
def test_a_bad_setting_is_a_one_line_error(settings, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        config(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "overrides: 'q': rank: 0 given"),
        ({"rank": (1, -1)}, "overrides: 'q': rank: -1 given, expected a whole number of 0 or more"),
        ({"rank": (0, 0)}, "overrides: 'q': rank is 0 everywhere"),
        ({"alpha": (1, 0)}, "overrides: 'q': alpha: 0 given"),
    ],
)
def test_a_bad_override_is_a_one_line_error(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Override(target="q", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"r": 8, "lora_alpha": 16, "dropout": 0.1},
            "LoRAConfig: r is here rank; lora_alpha is alpha; dropout is adapt's: adapt(fn, dropout=...) (these are",
        ),
        ({"rank": 8, "alpha": 8, "use_rslora": True}, "use_rslora is here scaling='rank_stabilized'"),
        ({"rank": 8, "alpha": 8, "bias": "none"}, "bias is here also_train=['q_proj/bias', ...]"),
        (dict.fromkeys(PEFT_NAMES, 1), " more (these are PEFT's names)"),
    ],
)
def test_pefts_settings_are_told_their_names_here(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LoRAConfig(**settings)
    assert len(str(error.value)) < 200


def test_every_setting_of_pefts_is_known_or_none_of_ours():
    fields = {field.name for field in dataclasses.fields(LoRAConfig)}
    assert not fields & PEFT_NAMES.keys()
    named = {re.match(r"\w+", name)[0] for name in PEFT_NAMES.values()}
    assert fields - {"dtype"} <= named


def test_settings_go_by_name():
    with pytest.raises(ValueError, match=r"^LoRAConfig: 8 given by position; settings go by name, as in rank=8$"):
        LoRAConfig(8, 16)
    with pytest.raises(ValueError, match=r"^Override: r is here rank \(these are PEFT's names\)$"):
        Override(target="q", r=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpah'"):
        LoRAConfig(rank=8, alpah=16)
    settings = config()
    assert list(inspect.signature(LoRAConfig).parameters) == [field.name for field in dataclasses.fields(settings)]
    assert dataclasses.replace(settings, rank=4).rank == 4
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings


def test_rank_and_alpha_have_no_default():
    with pytest.raises(TypeError):
        LoRAConfig(rank=8)
    with pytest.raises(TypeError):
        LoRAConfig(alpha=8)


def test_a_config_can_be_hashed_and_compared():
    assert config(targets=["q"], dtype=jnp.float32) == config(targets=("q",))
    assert hash(config(overrides=[Override(target="q", rank=[1, 2])])) is not None
    assert config(targets="query").targets == ("query",)


# What is chosen


def test_the_default_is_attention():
    params = {"attn": layer("query", "key", "value", "out"), "mlp": layer("up")}
    assert adapted_paths(params, config()) == {f"attn/{name}/kernel" for name in ("query", "key", "value", "out")}


def test_exclude_takes_kernels_out():
    params = {"attn": layer("query", "key", "value", "out")}
    assert adapted_paths(params, config(exclude=["out", "key"])) == {"attn/query/kernel", "attn/value/kernel"}
    with pytest.raises(ValueError, match=r"^exclude: leaves none of the targets"):
        adapted_paths(params, config(exclude=["attention"]))
    with pytest.raises(ValueError, match=r"^exclude: 'quary' matches no leaf; nearest: 'query'"):
        adapted_paths(params, config(exclude=["quary"]))


def test_all_linear_leaves_heads_and_embeddings_out():
    params = {**layer("up", "down", "head"), "embed": {"embedding": jnp.ones((9, 6))}}
    axes = KernelAxes(
        {f"{name}/kernel": Axes() for name in ("up", "down", "head")} | {"embed/embedding": Axes()},
        embeddings=["embed/embedding"],
        heads=["head/kernel"],
    )
    assert adapted_paths(params, config(targets=["all-linear"]), axes) == {"up/kernel", "down/kernel"}
    assert adapted_paths(params, config(targets=["all-linear", "head"]), axes) == set(axes) - {"embed/embedding"}
    with pytest.raises(ValueError, match=r"'all-linear' must know how each kernel is used"):
        adapted_paths(params, config(targets=["all-linear"]))


COPIES = {
    "| {}": lambda axes: axes | {},
    "{} |": lambda axes: {} | axes,
    ".copy()": lambda axes: axes.copy(),
    "dict()": dict,
    "{**axes}": lambda axes: {**axes},
    "a comprehension": lambda axes: {path: entry for path, entry in axes.items() if path != "query/kernel"},
    "replaced": lambda axes: {path: entry._replace(stack=entry.stack) for path, entry in axes.items()},
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda axes: pickle.loads(pickle.dumps(axes)),
    "ChainMap": lambda axes: collections.ChainMap(axes),
}


@pytest.mark.parametrize("name", COPIES)
def test_axes_are_exact_and_keep_their_roles_however_they_are_copied(name):
    """A path is no pattern (`up/kernel` ends `deep/up/kernel` too), and a table looked up starts with A at zero."""
    params = {**layer("up", "query", "head"), "deep": layer("up"), "table": {"w": jnp.ones((9, 6))}}
    roles = {"embeddings": ["table/w"], "heads": ["head/kernel"]}
    paths = ("up/kernel", "query/kernel", "head/kernel", "table/w")
    axes = COPIES[name](KernelAxes(dict.fromkeys(paths, Axes()), **roles))
    kept = set(paths[:2]) & set(axes)
    assert adapted_paths(params, config(targets=["all-linear"]), axes) == kept
    with pytest.raises(ValueError, match=r"^deep/up/kernel: the traced function never contracts"):
        adapted_paths(params, config(targets=["up"]), axes)
    node = lora_jax.init(KEY, params, config(targets=["table"]), axes=axes)["table"]["w_lora"]
    assert not node.a.any()
    assert node.b.all()
    assert type(node.axes) is Axes


def test_a_copy_of_axes_is_one_and_equals_plain_ones():
    axes = KernelAxes({"q/kernel": Axes()}, heads=["q/kernel"])
    for same in (axes | {}, {} | axes, axes.copy(), copy.copy(axes)):
        assert isinstance(same, KernelAxes)
        assert same == axes == {"q/kernel": Axes()}
        assert same.heads == {"q/kernel"}
    assert (axes | {"k/kernel": Axes()}).heads == {"q/kernel"}


def test_rules_beside_traced_axes_are_patterns():
    traced = KernelAxes({"q/kernel": Axes()})
    axes = {**traced, "experts": Axes((0,), (1,), (2,))}
    params = {**layer("q"), "experts": {"w": jnp.ones((2, 6, 8))}, "table": {"embedding": jnp.ones((9, 6))}}
    assert adapted_paths(params, config(targets=["all-linear"]), axes) == {"q/kernel", "experts/w"}
    with pytest.raises(ValueError, match=r"^table/embedding: the traced function never"):
        adapted_paths(params, config(targets=["table"]), axes)


def test_biases_never_match_even_where_they_have_several_axes():
    params = {"q_proj": {"kernel": jnp.ones((3, 6, 8)), "bias": jnp.ones((3, 8))}, "norm": {"scale": jnp.ones((3, 8))}}
    axes = {"kernel": Axes((0,), (1,), (2,))}
    assert adapted_paths(params, config(targets=["q_proj"]), axes) == {"q_proj/kernel"}
    assert adapted_paths(params, config(targets=["/.*/"]), axes) == {"q_proj/kernel"}
    with pytest.raises(ValueError, match=r"^targets: 'norm' matches no kernel, only biases, norms and such"):
        adapted_paths(params, config(targets=["norm"]), axes)


# Factors


def test_shapes_and_the_start_of_every_kind_of_kernel():
    params = {
        "dense": {"kernel": jnp.ones((6, 8))},
        "torch": {"weight": jnp.ones((8, 6))},
        "heads": {"kernel": jnp.ones((3, 6, 2, 4), jnp.bfloat16)},
        "embed": {"embedding": jnp.ones((9, 6))},
    }
    axes = {"torch": Axes((), (1,), (0,)), "heads": Axes((0,), (1,), (2, 3))}
    whole = lora_jax.init(KEY, params, config(targets=["/.*/"]), axes=axes)
    shapes = {path: (node.a.shape, node.b.shape, node.scale.shape) for path, node in nodes_in(whole).items()}
    assert shapes == {
        "dense/kernel": ((6, 2), (2, 8), ()),
        "torch/weight": ((6, 2), (2, 8), ()),
        "heads/kernel": ((3, 6, 2), (3, 2, 2, 4), (3,)),
        "embed/embedding": ((9, 2), (2, 6), ()),
    }
    for path, node in nodes_in(whole).items():
        assert node.a.dtype == node.b.dtype == node.scale.dtype == jnp.float32
        np.testing.assert_array_equal(node.scale, np.full(node.scale.shape, 2.0))
        zero, drawn = (node.a, node.b) if path.startswith("embed") else (node.b, node.a)
        assert not zero.any()
        assert len(np.unique(drawn)) == drawn.size
    same_kernels = lora_jax.merge(whole)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all(), same_kernels, params)))


def test_factors_come_in_the_dtype_asked_for():
    node = lora_jax.init(KEY, layer("q"), config(targets=["q"], dtype="bfloat16"))["q"]["kernel_lora"]
    assert (node.a.dtype, node.b.dtype, node.scale.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_a_dtype_that_adam_cant_train_is_said_to_be_one(dtype):
    with pytest.raises(ValueError, match=rf"^dtype: A and B in {dtype} can't be trained, for Adam's eps of 1e-8 is 0"):
        lora_jax.init(KEY, layer("q"), config(targets=["q"], dtype=dtype))
    lora_jax.init(KEY, layer("q", dtype=dtype), config(targets=["q"]))  # a base may be


@pytest.fixture(scope="module")
def reference(live):
    """What PEFT and loralib do: live with --oracle, else as tests/golden/make_init.py wrote it."""
    if not live:
        return dict(np.load(GOLDEN / "init.npz"))
    spec = importlib.util.spec_from_file_location("make_init", GOLDEN / "make_init.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference()


LAYERS = {
    "linear": ({"kernel": jnp.zeros((400, 300))}, Axes()),
    "conv": ({"kernel": jnp.zeros((5, 10, 8, 12))}, Axes((), (0, 1, 2), (3,))),
    "embedding": ({"embedding": jnp.zeros((400, 300))}, Axes()),
}


CASES = [
    *itertools.product(["peft"], LAYERS, ["gaussian", "kaiming_uniform"], ["standard", "rank_stabilized"]),
    *itertools.product(["loralib"], ["linear", "embedding"], ["kaiming_uniform"], ["standard"]),
]


@pytest.mark.filterwarnings("ignore:.* the rank of the kernel itself:UserWarning")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_start_is_that_of_peft_and_loralib(reference, case):
    _, kind, initializer, scaling = case
    name = "/".join(case)
    params, axes = LAYERS[kind]
    settings = LoRAConfig(rank=16, alpha=24, targets=[kind], init=initializer, scaling=scaling)
    whole = lora_jax.init(KEY, {kind: params}, settings, axes={kind: axes})
    (node,) = nodes_in(whole).values()
    assert float(node.scale) == reference[f"{name}/scale"]
    for factor, quantiles in ((node.a, reference[f"{name}/a"]), (node.b, reference[f"{name}/b"])):
        if not quantiles.any():
            assert not factor.any()
            continue
        # Two samples of one distribution, 4,800 values or more each: the extremes differ, what lies between doesn't.
        ours = np.quantile(np.asarray(factor), np.linspace(0, 1, len(quantiles)))[5:-5]
        theirs = quantiles[5:-5]
        assert np.abs(ours - theirs).max() < 0.15 * theirs.std()
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.03)


@pytest.mark.filterwarnings("ignore:.* the rank of the kernel itself:UserWarning")
@pytest.mark.parametrize(("kind", "inputs"), [("linear", 400), ("conv", 5 * 10 * 8)])
def test_the_default_is_gaussian_with_the_variance_of_loralibs(kind, inputs):
    params, axes = LAYERS[kind]
    whole = lora_jax.init(KEY, {kind: params}, LoRAConfig(rank=16, alpha=24, targets=[kind]), axes={kind: axes})
    (node,) = nodes_in(whole).values()
    a = np.asarray(node.a).ravel() * np.sqrt(3 * inputs)  # of 6,400 draws from N(0, 1)
    assert abs(a.mean()) < 0.05
    assert abs(a.std() - 1) < 0.04
    assert abs((a**4).mean() - 3) < 0.3  # a uniform distribution's is 1.8
    assert not node.b.any()


def test_a_kernels_factors_depend_on_its_path_alone():
    few = lora_jax.init(KEY, layer("a", "b"), config(targets=["a"]))
    more = lora_jax.init(KEY, {**layer("0"), **layer("a", "b", "c")}, config(targets=["b", "a", "c"]))
    np.testing.assert_array_equal(few["a"]["kernel_lora"].a, more["a"]["kernel_lora"].a)
    factors = [more[name]["kernel_lora"].a for name in ("a", "b", "c")]
    assert not any((x == y).any() for x, y in itertools.pairwise(factors))
    other = lora_jax.init(jax.random.key(1), layer("a"), config(targets=["a"]))["a"]["kernel_lora"].a
    assert not (other == factors[0]).any()


@pytest.mark.slow
def test_factors_are_the_same_in_another_process_and_with_old_keys():
    program = (
        "import jax, jax.numpy as jnp, lora_jax\n"
        "c = lora_jax.LoRAConfig(rank=2, alpha=4, targets=['q'])\n"
        "p = {'q': {'kernel': jnp.ones((2, 2))}}\n"
        "print(lora_jax.init(jax.random.key(0), p, c)['q']['kernel_lora'].a.tolist())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    params = {"q": {"kernel": jnp.ones((2, 2))}}
    for key in (KEY, jax.random.PRNGKey(0)):
        node = lora_jax.init(key, params, config(targets=["q"]))["q"]["kernel_lora"]
        assert run.stdout.strip() == str(node.a.tolist())


def test_stacked_kernels_have_factors_of_their_own():
    params = layer("q", shape=(3, 6, 8))
    node = lora_jax.init(KEY, params, config(targets=["q"]), axes={"q/kernel": Axes((0,), (1,), (2,))})["q"][
        "kernel_lora"
    ]
    assert not (node.a[0] == node.a[1]).any()


# Ranks and alphas of some targets, and of some layers


def test_overrides_change_rank_and_alpha():
    overrides = [Override(target="q", rank=4), Override(target="/.*(q|k)/kernel/", rank=3, alpha=9)]
    whole = lora_jax.init(KEY, layer("q", "k", "v"), config(targets=["/.*/"], overrides=overrides))
    got = {name: (whole[name]["kernel_lora"].a.shape[-1], float(whole[name]["kernel_lora"].scale)) for name in "qkv"}
    assert got == {"q": (4, 1.0), "k": (3, 3.0), "v": (2, 2.0)}


def test_layers_of_a_stack_differ_by_padding_and_scale():
    axes = {"q/kernel": Axes((0,), (1,), (2,))}
    overrides = [Override(target="q", rank=(3, 0, 1), alpha=(6, 1, 8))]
    params = layer("q", shape=(3, 6, 8))
    whole = lora_jax.init(KEY, params, config(targets=["q"], overrides=overrides), axes=axes)
    node = whole["q"]["kernel_lora"]
    assert node.a.shape == (3, 6, 3)
    np.testing.assert_array_equal(node.scale, [2, 0, 8])
    assert [row.rank for row in lora_jax.describe(whole).rows] == [(3, 0, 1)]
    assert not node.a[1].any()
    assert not node.a[2, :, 1:].any()
    assert (node.a[2, :, :1] != 0).all()
    assert lora_jax.describe(whole).trainable == (3 + 0 + 1) * (6 + 8)


@pytest.mark.filterwarnings("ignore:.* the rank of the kernel itself:UserWarning")
def test_each_layer_starts_by_its_own_rank():
    axes = {"q/kernel": Axes((0,), (1,), (2,))}
    overrides = [Override(target="q", rank=(2, 32))]
    params = {"q": {"kernel": jnp.zeros((2, 500, 8))}}
    settings = config(targets=["q"], overrides=overrides, init="gaussian")
    node = lora_jax.init(KEY, params, settings, axes=axes)["q"]["kernel_lora"]
    np.testing.assert_allclose([node.a[0, :, :2].std(), node.a[1].std()], [1 / 2, 1 / 32], rtol=0.1)


def test_a_rank_above_the_kernels_own_is_said():
    params = layer("q", "k", shape=(6, 8)) | {"wide": {"kernel": jnp.zeros((9, 20))}}
    message = r"^k/kernel: rank 7 is above 6, the rank of the kernel itself, as in 1 more: .* ΔW can't; 6 is enough$"
    with pytest.warns(UserWarning, match=message) as said:
        whole = lora_jax.init(KEY, params, config(rank=7, targets=["/.*/"]))
    assert len(said) == 1
    assert said[0].filename == __file__
    assert whole["q"]["kernel_lora"].a.shape == (6, 7)
    lora_jax.init(KEY, params, config(rank=6, targets=["/.*/"]))
    stacked = {"q": {"kernel": jnp.zeros((2, 6, 8))}}
    overrides = [Override(target="q", rank=(1, 7))]
    with pytest.warns(UserWarning, match=r"^q/kernel: rank 7 is above 6, the rank of the kernel itself: A and B"):
        lora_jax.init(KEY, stacked, config(targets=["q"], overrides=overrides), axes={"q": Axes((0,), (1,), (2,))})


def test_values_for_layers_must_count_the_layers():
    axes = {"q/kernel": Axes((0,), (1,), (2,))}
    settings = config(targets=["q"], overrides=[Override(target="q", rank=(1, 2))])
    with pytest.raises(ValueError, match=r"^q/kernel: rank: 2 values given, the kernel has 3 stack indices"):
        adapted_paths(layer("q", shape=(3, 6, 8)), settings, axes)
    with pytest.raises(ValueError, match=r"^q/kernel: rank: 2 values given, the kernel has 1 stack indices"):
        adapted_paths(layer("q"), settings)


def test_an_override_of_nothing_targeted_is_an_error():
    with pytest.raises(ValueError, match=r"^overrides: 'k' matches no leaf"):
        adapted_paths(layer("q", "k"), config(targets=["q"], overrides=[Override(target="k", rank=1)]))


# Abstract and placed


def test_shapes_are_enough():
    params = jax.eval_shape(lambda: layer("q"))
    whole = jax.eval_shape(lambda tree: lora_jax.init(KEY, tree, config(targets=["q"], also_train=["bias"])), params)
    assert whole["q"]["kernel_lora"].a == jax.ShapeDtypeStruct((6, 2), jnp.float32)
    made = lora_jax.init(KEY, params, config(targets=["q"]))
    np.testing.assert_array_equal(
        made["q"]["kernel_lora"].a, lora_jax.init(KEY, layer("q"), config(targets=["q"]))["q"]["kernel_lora"].a
    )


# Errors


@pytest.mark.parametrize("axes", [None, {"q": Axes()}, {"q": Axes((0,), (1,), ())}, {"q": Axes((0,), (1,), (1,))}])
def test_axes_are_never_guessed(axes):
    with pytest.raises(ValueError, match=r"^q/kernel: ") as error:
        adapted_paths({"q": {"kernel": jnp.ones((3, 6, 8))}}, config(targets=["q"]), axes)
    assert "kernel_axes" in str(error.value) or "must name each axis" in str(error.value)


def test_a_rule_for_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"^axes: 'k' matches no leaf"):
        adapted_paths(layer("q"), config(targets=["q"]), {"k": Axes()})


def test_a_target_that_the_function_never_contracts_is_an_error():
    with pytest.raises(ValueError, match=r"^unused/kernel: the traced function never contracts"):
        adapted_paths(layer("q", "unused"), config(targets=["/.*kernel/"]), KernelAxes({"q/kernel": Axes()}))


@pytest.mark.parametrize(
    ("params", "pattern", "message"),
    [
        ({"q": [jnp.ones((2, 3))]}, "/q.0/", "q/0: is in a list, a tuple, an object or under an integer key"),
        ({"q": (jnp.ones((2, 3)),)}, "/q.0/", "q/0: is in a list, a tuple, an object or under an integer key"),
        ({"q": {0: jnp.ones((2, 3))}}, "/q.0/", "q/0: is in a list, a tuple, an object or under an integer key"),
        ({"q": {"kernel": jnp.ones((2, 3), jnp.int8)}}, "q", "q/kernel: is int8, expected a floating-point kernel"),
        (
            {"q": {"kernel": jnp.ones((2, 3)), "kernel_lora": jnp.ones(3)}},
            "q",
            "q/kernel_lora: the tree has a leaf of that name",
        ),
        ({"q": {"kernel": jnp.ones((2, 3)), "kernel_lora": {}}}, "q", "q/kernel_lora: the tree has a leaf of that"),
        ({"a/b": {"c": jnp.ones(2)}, "a": {"b/c": jnp.ones(2)}}, "q", "a/b/c: two leaves have this path"),
        ({}, "q", "targets: 'q' matches no leaf; the tree has no leaves"),
    ],
)
def test_a_kernel_that_cant_be_adapted_is_an_error(params, pattern, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        lora_jax.init(KEY, params, config(targets=[pattern]))
    assert "\n" not in str(error.value)


PARAMS, CONFIG = layer("q"), config(targets=["q"])


class Linear(nnx.Module):
    def __init__(self):
        self.q = nnx.Linear(6, 8, rngs=nnx.Rngs(0))


SWAPPED = {
    "params first": (PARAMS, KEY, CONFIG, r"key: a dict given, and a key as params; the order is init\(key, params"),
    "config second": (KEY, CONFIG, PARAMS, r"config: a dict given, .*; the order is init\(key, params, config\)"),
    "a seed": (0, PARAMS, CONFIG, r"key: an int given, expected one JAX random key, such as jax\.random\.key\(0\)"),
    "several keys": (jax.random.split(KEY, 3), PARAMS, CONFIG, r"key: an array key<fry>\[3\] given, expected one"),
    "settings": (KEY, PARAMS, {"rank": 2}, r"config: a dict given, expected lora_jax\.LoRAConfig\("),
    "a function": (KEY, jax.nn.relu, CONFIG, r"params: the function relu given, expected a tree of arrays"),
    "an array": (KEY, jnp.ones((2, 3)), CONFIG, r"params: an array float32\[2, 3\] given, expected a tree"),
    "NNX": (KEY, Linear(), CONFIG, r"params: an NNX module Linear given; .*nnx\.split\(model, nnx\.Param, \.\.\.\)"),
    "Linen": (KEY, linen.Dense(3), CONFIG, r"params: a Linen module Dense given; pass the variables that module\.init"),
    "Equinox": (KEY, equinox.nn.Linear(2, 3, key=KEY), CONFIG, r"params: an Equinox module Linear given; pass its arr"),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_arguments_in_another_order_or_of_another_kind(name):
    *arguments, message = SWAPPED[name]
    with pytest.raises(ValueError, match=f"^{message}") as error:
        lora_jax.init(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


ELSEWHERE = {
    "without": (
        KernelAxes({"q/kernel": Axes()}),
        {"params": PARAMS},
        "'params/q/kernel'.*'q/kernel', without 'params/'",
    ),
    "with": (KernelAxes({"params/q/kernel": Axes()}), PARAMS, "'q/kernel'.*'params/q/kernel', with 'params/'"),
    "other": (KernelAxes({"k/kernel": Axes()}), PARAMS, "'q/bias'; they have 'k/kernel'"),
}


@pytest.mark.parametrize("target", ["q", "all-linear"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_axes_of_another_tree_say_by_what_the_paths_differ(name, target):
    axes, params, message = ELSEWHERE[name]
    for copied in (axes, dict(axes)):
        with pytest.raises(
            ValueError, match=rf"^axes: none is of a leaf of this tree, .*{message}.*same tree"
        ) as error:
            lora_jax.init(KEY, params, config(targets=[target]), axes=copied)
        assert len(str(error.value)) < 200
    lora_jax.init(KEY, params, config(targets=(), also_train=["q"]), axes=axes)  # nothing asks for axes


def test_one_leaf_of_another_tree():
    params, axes = {**layer("k"), "params": PARAMS}, KernelAxes({"q/kernel": Axes(), "k/kernel": Axes()})
    with pytest.raises(ValueError, match=r"^params/q/kernel: .*; they have 'q/kernel', without 'params/': give kernel"):
        lora_jax.init(KEY, params, CONFIG, axes=axes)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (lora_jax.kernel_axes, r"axes: the function kernel_axes given, expected what lora_jax\.kernel_axes\("),
        (Axes(), r"axes: an Axes given, expected what lora_jax\.kernel_axes\("),
        (PARAMS, r"axes: 'q' has a dict, expected lora_jax\.Axes\("),
    ],
)
def test_what_isnt_axes(axes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        lora_jax.init(KEY, PARAMS, CONFIG, axes=axes)
    with pytest.raises(ValueError, match=r"^apply_fn: dict given, expected a function; the order is kernel_axes\("):
        lora_jax.kernel_axes(PARAMS, jax.nn.relu)


def test_a_second_init_is_an_error_over_a_node_and_fine_elsewhere():
    once = lora_jax.init(KEY, layer("q", "k"), config(targets=["q"]))
    with pytest.raises(ValueError, match=r"^q/kernel: is adapted already"):
        lora_jax.init(KEY, once, config(targets=["q"]))
    twice = lora_jax.init(KEY, once, config(targets=["k"]))
    assert twice["q"]["kernel_lora"] is once["q"]["kernel_lora"]
    assert set(nodes_in(twice)) == {"q/kernel", "k/kernel"}


def test_a_target_cant_train_whole():
    with pytest.raises(ValueError, match=r"^q/kernel: is a target and trained in full too"):
        lora_jax.init(KEY, layer("q"), config(targets=["q"], also_train=["q"]))
    with pytest.raises(ValueError, match=r"^steps: is int32, and only floating-point leaves train"):
        lora_jax.init(KEY, {**layer("q"), "steps": jnp.int32(0)}, config(targets=["q"], also_train=["steps"]))


def test_rules_beside_traced_axes_count_and_must_match():
    params = {"q": {"kernel": jnp.ones((4, 4))}, "v": {"kernel": jnp.ones((4, 4))}}
    traced = lora_jax.kernel_axes(lambda p, x: x @ p["q"]["kernel"] @ p["v"]["kernel"], params, jnp.ones((2, 4)))
    other = Axes((), (1,), (0,))
    for axes in (traced | {"q": other}, {"q": other, **traced}, {**traced, "q": other}, {**traced, "q/kernel": other}):
        tree = lora_jax.init(KEY, params, config(targets=["q", "v"]), axes=axes)
        assert tree["q"]["kernel_lora"].axes == other
        assert tree["v"]["kernel_lora"].axes == Axes()
    with pytest.raises(ValueError, match=r"^axes: 'nonsense' matches no leaf"):
        lora_jax.init(KEY, params, config(targets=["q"]), axes=traced | {"nonsense": other})


def test_train_alone_needs_no_targets():
    whole = lora_jax.init(KEY, layer("q", dtype=jnp.bfloat16), config(targets=(), also_train=["q"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(lora_jax.split(whole)[1]))
