"""The numbers that codes stand for: NormalFloat's sixteen, and the 256 of the dynamic map for scales."""

import numpy as np

# Quantiles of N(0, 1), scaled to [-1, 1] and with a zero (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_EXPONENTS = 7


def _dynamic_map() -> np.ndarray:
    """Return the 256 numbers of a signed 8-bit code with as many bits of fraction as its exponent leaves.

    Of each exponent, the middles of equal parts of [0.1, 1], twice as many as of the one below (Dettmers 2015, arXiv
    1511.04561, and bitsandbytes' `create_dynamic_map`); with 0 and 1.
    """
    positive: list[float] = []
    first, last = float(np.float32(0.1)), 1.0
    for exponent in range(_EXPONENTS):
        # As torch's linspace rounds: counted from the nearer end, in steps of float32, with one rounding at the end.
        parts = 2**exponent
        step, k = float((np.float32(last) - np.float32(first)) / np.float32(parts)), np.arange(parts + 1)
        ends = np.where(2 * k < parts, first + step * k, last - step * (parts - k)).astype(np.float32)
        middles = (ends[:-1] + ends[1:]) / np.float32(2)
        positive += (np.float32(10.0 ** (exponent + 1 - _EXPONENTS)) * middles).tolist()
    return np.array(sorted([*(-x for x in positive), 0.0, *positive, 1.0]), np.float32)


DYNAMIC = _dynamic_map()
