"""Patterns: suffixes of whole components, regular expressions, presets, precedence and the errors."""

import re

import jax
import numpy as np
import pytest
from public_trees import leaves_of

import lora_jax
from lora_jax import Axes, KernelAxes, LoRAConfig, Override

LLAMA = [
    *(f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"),
    "layers/self_attn/q_proj/bias",
    "layers/mlp/up_proj/kernel",
    "layers/norm/scale",
    "embed_tokens/embedding",
    "lm_head/kernel",
]


def tree_of(paths):
    """A tree that has a matrix at each path."""
    tree = {}
    for path in paths:
        *parents, name = path.split("/")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
        level[name] = np.ones((4, 4), np.float32)
    return tree


def ranks(tree, axes=None, rank=1, **settings):
    """The rank of each kernel that is selected, by its path."""
    config = LoRAConfig(rank=rank, alpha=1, **settings)
    made = lora_jax.init(jax.random.key(0), tree, config, axes=axes)
    return {row.path: row.rank for row in lora_jax.describe(made).rows}


def hits(pattern, paths, axes=None):
    return set(ranks(tree_of(paths), axes, targets=[pattern]))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", {"layers/self_attn/q_proj/kernel", "layers/self_attn/q_proj/bias"}),
        ("q_proj/kernel", {"layers/self_attn/q_proj/kernel"}),
        ("self_attn/q_proj", {"layers/self_attn/q_proj/kernel", "layers/self_attn/q_proj/bias"}),
        ("bias", {"layers/self_attn/q_proj/bias"}),
        ("lm_head", {"lm_head/kernel"}),
        ("embed_tokens", {"embed_tokens/embedding"}),
        ("norm", {"layers/norm/scale"}),
        ("/.*(q|v)_proj/kernel/", {"layers/self_attn/q_proj/kernel", "layers/self_attn/v_proj/kernel"}),
        ("attention", {path for path in LLAMA if "self_attn" in path}),
    ],
)
def test_a_pattern_matches(pattern, expected):
    """Kernels as targets, and any leaf as one that is trained in full."""
    if kernels := {path for path in expected if path.endswith(("kernel", "embedding"))}:
        assert hits(pattern, LLAMA) == kernels
    if pattern != "attention":
        adapter = lora_jax.split(tree_of(LLAMA), [pattern])[1]
        assert set(leaves_of(adapter)) == expected


@pytest.mark.parametrize("pattern", ["proj", "attn", "q_pro", "layers", "self_attn", "/q_proj/", "/layers.*bia/"])
def test_parts_of_components_dont_match(pattern):
    with pytest.raises(ValueError, match=r"^targets: .* matches no leaf; ") as error:
        hits(pattern, LLAMA)
    assert "\n" not in str(error.value)


def test_a_component_of_plain_dicts_is_no_final_leaf_name():
    assert hits("q", ["attn/q", "attn/k"]) == {"attn/q"}
    with pytest.raises(ValueError, match=r"matches no leaf"):
        hits("attn", ["attn/q", "attn/k"])


def test_haiku_names_are_split():
    tree = {"mlp/~/linear_0": {"w": np.ones((4, 4), np.float32)}}
    assert set(ranks(tree, targets=["linear_0"])) == {"mlp/~/linear_0/w"}


def test_the_first_match_wins():
    patterns = ("/.*q_proj.*/", "q_proj", "/.*kernel/")
    overrides = [Override(target=pattern, rank=rank) for rank, pattern in enumerate(patterns, 2)]
    chosen = ranks(tree_of(LLAMA), targets=["/.*/"], overrides=overrides)
    assert chosen["layers/self_attn/q_proj/kernel"] == 2
    assert chosen["lm_head/kernel"] == 4
    assert chosen["embed_tokens/embedding"] == 1


def test_nearest_names_are_listed():
    with pytest.raises(ValueError, match=r"nearest: 'q_proj'"):
        hits("qproj", LLAMA)
    with pytest.raises(ValueError, match=r"nearest: 'self_attn/q_proj'"):
        hits("selfattn/q_proj", LLAMA)
    with pytest.raises(ValueError, match=r"the tree has 'embed_tokens', .*'q_proj', 'v_proj'"):
        hits("zzz", LLAMA)
    with pytest.raises(ValueError, match=r"the tree has no leaves"):
        hits("q_proj", [])


SLASHES = "regular expressions match whole paths and stand between slashes: "


@pytest.mark.parametrize(
    ("pattern", "here"),
    [
        (".*q_proj", f"here it is 'q_proj'; {SLASHES}'/.*q_proj/kernel/'"),
        ("*q_proj", f"here it is 'q_proj'; {SLASHES}'/.*q_proj/kernel/'"),
        ("model.layers.*.q_proj", f"here it is 'q_proj'; {SLASHES}'/.*q_proj/kernel/'"),
        ("model.layers.0.self_attn.q_proj", f"here it is 'self_attn/q_proj'; {SLASHES}'/.*self_attn/q_proj/kernel/'"),
        (r"^.*\.self_attn\.q_proj$", f"here it is 'self_attn/q_proj'; {SLASHES}'/.*self_attn/q_proj/kernel/'"),
        ("q_proj.weight", f"here it is 'q_proj'; {SLASHES}'/.*q_proj/kernel/'"),
        ("q_proj,k_proj", "here these are several: 'q_proj', 'k_proj'"),
        ("q_proj|k_proj", "here these are several: 'q_proj', 'k_proj'"),
        ("q_proj k_proj", "here these are several: 'q_proj', 'k_proj'"),
        (r".*\.(q|k)_proj", f"{SLASHES}'/.*/(q|k)_proj/kernel/'"),
        ("*_proj", f"{SLASHES}'/.*_proj/kernel/'"),
        ("layers/*/kernel", f"{SLASHES}'/layers/.*/kernel/'"),
        ("(", f"{SLASHES}'/.*/'"),
        ("/.*q_proj/", "it must match whole paths, the name of the leaf included: '/.*q_proj/kernel/'"),
    ],
)
def test_patterns_of_others_are_told_how_to_write_them_here(pattern, here):
    with pytest.raises(ValueError, match=r"^targets: ") as caught:
        hits(pattern, LLAMA)
    assert str(caught.value) == f"targets: {pattern!r} matches no leaf; {here}"
    assert len(str(caught.value)) < 200
    for written in re.findall("'([^']+)'", here):  # what is told works
        assert hits(written, LLAMA)


def test_a_long_pattern_is_shown_in_part():
    with pytest.raises(ValueError, match=r"\.\.\. matches no leaf") as caught:
        hits("(" + "|".join(f"layers.{n}.x" for n in range(500)) + ")", LLAMA)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("parent", "names"),
    [
        ("attn", ("query", "key", "value", "out")),
        ("MultiHeadDotProductAttention_0", ("query", "key", "value", "out")),
        ("multi_head_attention", ("query", "key", "value", "linear")),
        ("encoder/layer/0/attention", ("self/query", "self/key", "self/value", "output/dense")),
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("SelfAttention", ("q", "k", "v", "o")),
        ("attention", ("q_lin", "k_lin", "v_lin", "out_lin")),
        ("h/0/attn", ("c_attn", "c_proj")),
        ("attention", ("query_key_value", "dense")),
        ("self_attn", ("qkv_proj", "o_proj")),
        ("attn", ("Wqkv", "out_proj")),
        ("attn", ("q_einsum", "kv_einsum", "attn_vec_einsum")),
        ("attn", ("qkv_einsum", "attn_vec_einsum")),
    ],
)
def test_the_attention_preset_knows_the_usual_names(parent, names):
    attention = {f"{parent}/{name}/w" for name in names}
    others = ["mlp/dense/w", "mlp/c_proj/w", "value/w", "out/w", "output/dense/w", "linear/w", "head/query/w"]
    assert hits("attention", [*attention, *others]) == attention


def test_the_attention_preset_says_when_it_finds_nothing():
    with pytest.raises(ValueError, match=r"'attention' matches no leaf"):
        hits("attention", ["policy/value/kernel", "out/kernel"])


def test_all_linear_is_what_the_trace_said():
    assert hits("all-linear", LLAMA, KernelAxes({"layers/mlp/up_proj/kernel": Axes()})) == {"layers/mlp/up_proj/kernel"}
    with pytest.raises(ValueError, match=r"pass axes=lora_jax.kernel_axes"):
        hits("all-linear", LLAMA)


@pytest.mark.parametrize("pattern", ["", "/", "//", 3, None, "/(/"])
def test_a_pattern_that_can_match_nothing_is_refused(pattern):
    with pytest.raises(ValueError, match=r"^targets: "):
        LoRAConfig(rank=1, alpha=1, targets=[pattern])
