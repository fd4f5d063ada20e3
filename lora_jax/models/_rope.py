"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), with the scalings that checkpoints use.

Frequencies are computed in float32 and in transformers' order of operations, with which models were trained: at
position 100,000 one unit in the last place of a frequency turns a pair of channels by up to 0.006 radians.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """The rotation of the pairs of channels by position; hashable, as a module's fields must be.

    Attributes:
        frequencies: The angular frequency of each pair of channels, in radians per position.
        attention_factor: The factor of cosines and sines; attention's logits are multiplied by its square.
        context: The length up to which `frequencies` are used; longer rows have others, if `long` or `growth` is given.
        long: The frequencies beyond `context` (LongRoPE).
        theta: With `growth`, the base that grows with the length beyond `context` (dynamic NTK).
        growth: The factor of that growth.
    """

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    context: int = 0
    long: tuple[float, ...] = ()
    theta: float = 0.0
    growth: float = 0.0


class _Settings(NamedTuple):
    """The inputs of a scaling: `rope_parameters`, and the model's sizes."""

    parameters: Mapping[str, Any]
    powers: np.ndarray  # θ^(2i/d) of each pair, float32
    head_dim: int
    max_positions: int

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """Return a setting that must be a finite number above `above`; null means absent."""
        value = self.parameters.get(name)
        value = default if value is None else value
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or not real or not above < value < 1e30:
            raise ValueError(f"rope_parameters: {name} {value!r:.40} given, expected a number above {above:g}")
        return float(value)

    @property
    def context(self) -> float:
        """The length that the model was trained with before scaling."""
        return self.number("original_max_position_embeddings", self.max_positions)

    @property
    def factor(self) -> float:
        """The longest length divided by the original context; some configurations only have the two lengths."""
        return self.number("factor", self.max_positions / self.context)


def rope_of(parameters: Any, head_dim: int, max_positions: int) -> Rope:
    """Return the rotation that a configuration describes: θ^(-2i/d), scaled according to its `rope_type`.

    The reference is transformers 5.23, modeling_rope_utils.py.

    Args:
        parameters: `rope_parameters` of a transformers configuration: `rope_theta`, `rope_type` and its settings.
        head_dim: D, the channels of one head; all of them are rotated.
        max_positions: `max_position_embeddings`, the default of the original length.

    Raises:
        ValueError: The scaling isn't implemented, or a setting is out of its range.

    >>> rope_of({"rope_theta": 10000.0, "rope_type": "default"}, 4, 2048).frequencies
    (1.0, 0.009999999776482582)
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters: {parameters!r:.60} given, expected an object with rope_theta and rope_type")
    scaling = parameters.get("rope_type", "default")
    if not isinstance(scaling, str) or scaling not in _SCALINGS:
        raise ValueError(f"rope_type {scaling!r:.40} is not supported; supported are {', '.join(_SCALINGS)}")
    if scaling != "proportional" and parameters.get("partial_rotary_factor") not in (None, 1.0):
        share = parameters["partial_rotary_factor"]
        raise ValueError(
            f"partial_rotary_factor {share!r:.40} is not supported with rope_type {scaling!r}; only 1.0 (all) is"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} given, expected an even number: channels are rotated in pairs")
    base = _Settings(parameters, np.empty(0), head_dim, max_positions)
    theta = np.float64(base.number("rope_theta", above=1.0 if scaling == "yarn" else 0.0))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A power in float64 rounds to torch's float32 power; numpy's float32 power differs for one of six exponents.
    with np.errstate(all="ignore"):  # `_floats` refuses frequencies that aren't finite
        powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        return _SCALINGS[scaling](base._replace(powers=powers))


def reach(parameters: Any, max_positions: int) -> int:
    """Return the longest row that the rotation is made for: `max_positions` of some configurations is the one before
    scaling.

    >>> reach({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768)
    131072
    """
    scaling = parameters.get("rope_type") if isinstance(parameters, Mapping) else None
    if scaling not in ("dynamic", "yarn", "longrope"):
        return max_positions
    settings = _Settings(parameters, np.empty(0), 0, max_positions)
    return max(max_positions, int(settings.factor * (max_positions if scaling == "dynamic" else settings.context)))


def _default(settings: _Settings) -> Rope:
    return Rope(_floats(1 / settings.powers))


def _linear(settings: _Settings) -> Rope:
    """Linear scaling: positions are divided by `factor`."""
    return Rope(_floats(1 / settings.powers / np.float32(settings.number("factor"))))


def _proportional(settings: _Settings) -> Rope:
    """Partial rotation: only the first pairs turn, a share of `partial_rotary_factor`."""
    share = settings.number("partial_rotary_factor", 1.0)
    turning = int(min(share, 1.0) * settings.head_dim // 2)
    frequencies = 1 / settings.powers / np.float32(settings.number("factor", 1.0))
    return Rope(_floats(np.where(np.arange(len(frequencies)) < turning, frequencies, 0)))


def _dynamic(settings: _Settings) -> Rope:
    """Dynamic NTK: beyond the model's length the base grows, so that the slowest pair turns no further than trained.

    All rows of a call have the frequencies of the longest row, as in transformers; the keys in a cache keep the
    frequencies that they were written with.
    """
    if settings.head_dim < 4:
        raise ValueError(f"head_dim {settings.head_dim} given, expected 4 or more with rope_type 'dynamic'")
    return Rope(
        _floats(1 / settings.powers),
        context=settings.max_positions,
        theta=settings.number("rope_theta"),
        growth=settings.number("factor"),
    )


def _yarn(settings: _Settings) -> Rope:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow pairs are interpolated, fast pairs aren't, with a ramp between.

    The ramp goes from the pair that makes `beta_fast` turns in the original context to the pair of `beta_slow` turns.
    """
    factor, d = settings.factor, settings.head_dim

    def pair_of(turns: float) -> float:
        theta = settings.number("rope_theta")
        return d * math.log(settings.context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    fast, slow = pair_of(settings.number("beta_fast", 32.0)), pair_of(settings.number("beta_slow", 1.0))
    if settings.parameters.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, d - 1)
    slow = slow + 0.001 if fast == slow else slow
    ramp = np.clip((np.arange(d // 2, dtype=np.float32) - np.float32(fast)) / np.float32(slow - fast), 0, 1)
    unscaled = 1 - ramp
    interpolated = 1 / (np.float32(factor) * settings.powers)
    frequencies = interpolated * (1 - unscaled) + 1 / settings.powers * unscaled
    return Rope(_floats(frequencies), _yarn_attention(settings, factor))


def _yarn_attention(settings: _Settings, factor: float) -> float:
    """0.1 ln(factor) + 1, unless the configuration has another value, or the weights of a ratio of two such values."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if settings.parameters.get("attention_factor") is not None:
        return settings.number("attention_factor")
    if settings.parameters.get("mscale") and settings.parameters.get("mscale_all_dim"):
        return scale(settings.number("mscale")) / scale(settings.number("mscale_all_dim"))
    return scale(1.0)


def _longrope(settings: _Settings) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor for each pair, and another beyond the original context.

    All rows of a call have the frequencies of the longest row, as in transformers.
    """
    short, long = (
        _floats(1 / (_divisors(settings, name) * settings.powers)) for name in ("short_factor", "long_factor")
    )
    factor, context = settings.factor, settings.context
    if settings.parameters.get("attention_factor") is not None:
        attention = settings.number("attention_factor")
    elif factor > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(max(context, 2)))
    else:
        attention = 1.0
    return Rope(short, attention, context=int(context), long=long)


def _divisors(settings: _Settings, name: str) -> np.ndarray:
    given, pairs = settings.parameters.get(name), settings.head_dim // 2
    listed = given if isinstance(given, list | tuple) else []
    if len(listed) != pairs or not all(type(x) in (int, float) and 0 < x < 1e30 for x in listed):
        raise ValueError(f"rope_parameters: {name} {given!r:.40} given, expected {pairs} numbers above 0")
    return np.asarray(listed, np.float32)


def _llama3(settings: _Settings) -> Rope:
    """Llama 3.1: long wavelengths are slowed down by `factor`, short ones aren't, with a linear blend between."""
    factor, context = np.float32(settings.number("factor")), settings.context
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if high <= low:
        raise ValueError(
            f"rope_parameters: high_freq_factor {high:g} given, expected one above low_freq_factor {low:g}"
        )
    frequencies = 1 / settings.powers
    wavelength = np.float32(2 * math.pi) / frequencies
    unscaled = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    blend = (1 - unscaled) * frequencies / factor + unscaled * frequencies
    slowed = np.where(wavelength > context / low, frequencies / factor, blend)
    return Rope(_floats(np.where(wavelength < context / high, frequencies, slowed)))


_SCALINGS: dict[str, Callable[[_Settings], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def _floats(frequencies: np.ndarray) -> tuple[float, ...]:
    if not np.isfinite(frequencies).all():
        raise ValueError("rope_parameters: with these settings frequencies aren't finite")
    return tuple(frequencies.astype(np.float32).tolist())


def rotation(rope: Rope, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of the angles at positions int32[B, T], each dtype[B, T, 1, d/2]."""
    angles = positions[:, :, None, None].astype(jnp.float32) * _frequencies(rope, positions)
    cos, sin = ((turn(angles) * rope.attention_factor).astype(dtype) for turn in (jnp.cos, jnp.sin))
    return cos, sin


def _frequencies(rope: Rope, positions: jax.Array) -> jax.Array:
    """Return the frequencies for the length of the longest row."""
    usual = jnp.asarray(rope.frequencies, jnp.float32)
    if not rope.long and not rope.growth:
        return usual
    length = jnp.max(positions) + 1
    if rope.long:
        beyond = jnp.asarray(rope.long, jnp.float32)
    else:
        d = 2 * len(rope.frequencies)
        stretch = rope.growth * length.astype(jnp.float32) / rope.context - (rope.growth - 1)
        theta = rope.theta * jnp.maximum(stretch, 1.0) ** (d / (d - 2))
        beyond = 1 / theta ** (np.arange(0, d, 2, dtype=np.float32) / np.float32(d))
    return jnp.where(length > rope.context, beyond, usual)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x_i, x_{i+d/2}) of x, [B, T, N, d], by their angles."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
