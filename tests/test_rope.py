"""Rotary embeddings against transformers' (tests/golden/rope.npz; live with `--oracle`), and settings that are none."""

import importlib
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rope_cases import CASES, HEAD_DIM, LENGTHS, LLAMA3, LONG, MAX_POSITIONS, YARN

from lora_jax.models._rope import reach, rope_of, rotation

GOLDEN = Path(__file__).parent / "golden" / "rope.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_rotation(name, live, golden):
    """Up to a unit in the last place of a frequency, which turns the last position of the longest row by 0.004."""
    found = importlib.import_module("golden.make_rope").reference(name) if live else golden
    rope = rope_of(CASES[name], HEAD_DIM, MAX_POSITIONS)
    np.testing.assert_allclose(rope.frequencies, found[name], rtol=2e-7)
    for length in LENGTHS:
        ours = np.stack([side[0, :, 0] for side in rotation(rope, jnp.arange(length - 16, length)[None], jnp.float32)])
        reach = 4e-7 if length <= MAX_POSITIONS or name != "dynamic" else 2e-6  # its base is a power taken in float32
        np.testing.assert_allclose(ours, found[f"{name}/{length}"], atol=1e-6 + reach * length)


def test_frequencies_are_those_of_a_power_in_float32():
    """As models were trained with: the correctly rounded ones differ from them in three of ten."""
    rope = rope_of({"rope_type": "default", "rope_theta": 1e6}, 256, MAX_POSITIONS)
    exact = 1e6 ** -(np.arange(0, 256, 2) / 256)
    theirs = np.float32(1) / (1e6 ** (np.arange(0, 256, 2, dtype=np.float32) / 256).astype(np.float64)).astype(
        np.float32
    )
    np.testing.assert_array_equal(np.float32(rope.frequencies), theirs)
    assert 0.1 < np.mean(theirs != exact.astype(np.float32)) < 0.6


def test_a_short_row_has_the_frequencies_of_the_longest_beside_it():
    rope = rope_of(CASES["dynamic"], HEAD_DIM, 8)
    alone = rotation(rope, jnp.arange(6)[None], jnp.float32)
    beside = rotation(rope, jnp.stack([jnp.arange(6), jnp.arange(10, 16)]), jnp.float32)
    same = rotation(rope, jnp.stack([jnp.arange(6), jnp.arange(2, 8)]), jnp.float32)
    np.testing.assert_array_equal(alone[0][0], same[0][0])
    assert np.max(np.abs(alone[0][0] - beside[0][0])) > 0.1


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("linear", "rope_parameters: 'linear' given, expected an object"),
        ({"rope_type": "axial", "rope_theta": 1e4}, "rope_type 'axial' is not supported; supported are default, lin"),
        ({"rope_type": ["yarn"], "rope_theta": 1e4}, r"rope_type \['yarn'\] is not supported"),
        ({"rope_type": "default"}, "rope_theta None given, expected a number above 0"),
        ({"rope_type": "default", "rope_theta": "1e4"}, "rope_theta '1e4' given"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta -1.0 given"),
        ({"rope_type": "default", "rope_theta": math.nan}, "rope_theta nan given"),
        ({"rope_type": "default", "rope_theta": 10**400}, "rope_theta 1000.* given"),
        ({"rope_type": "default", "rope_theta": 1e-300}, "aren't finite"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not"),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": "four"},
            "factor 'four' given, expected a number above 0",
        ),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": True}, "factor True given"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor 0 given"),
        ({"rope_type": "dynamic", "rope_theta": 1e4}, "factor None given"),
        (YARN | {"rope_theta": 1}, "rope_theta 1 given, expected a number above 1"),
        (YARN | {"beta_fast": []}, r"beta_fast \[\] given"),
        (YARN | {"original_max_position_embeddings": -5}, "original_max_position_embeddings -5 given"),
        (YARN | {"mscale": "a", "mscale_all_dim": 1}, "mscale 'a' given"),
        (LONG | {"long_factor": [1.0]}, r"long_factor \[1.0\] given, expected 8 numbers above 0"),
        (LONG | {"short_factor": "abcdefgh"}, "short_factor 'abcdefgh' given"),
        (LONG | {"short_factor": [0] * 8}, "short_factor .* given, expected 8 numbers"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "high_freq_factor 4 given, expected one above low_freq_factor 4"),
        (LLAMA3 | {"high_freq_factor": {}}, "high_freq_factor {} given"),
    ],
)
def test_what_is_no_setting_is_named(parameters, words):
    with pytest.raises(ValueError, match=words) as caught:
        rope_of(parameters, HEAD_DIM, MAX_POSITIONS)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("parameters", "length"),
    [
        (CASES["linear"], 4096),
        (LLAMA3, 4096),
        (CASES["dynamic"], 4 * 4096),
        (YARN, 4096),
        (YARN | {"factor": 16.0}, 16 * 1024),
        (LONG, 4096),
        ({"full_attention": YARN}, 4096),
        (None, 4096),
    ],
)
def test_reach(parameters, length):
    assert reach(parameters, MAX_POSITIONS) == length


@pytest.mark.parametrize(("head_dim", "kind"), [(7, "default"), (2, "dynamic")])
def test_heads_that_cannot_turn(head_dim, kind):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} given"):
        rope_of(CASES[kind], head_dim, MAX_POSITIONS)
