"""Dtypes: the one for arithmetic on weights, and what a narrow one can't hold."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def wide(dtype: Any) -> np.dtype:
    """Return the dtype for arithmetic on weights: float32, or `dtype` itself if it is wider.

    `jnp.promote_types` refuses floats of 8 bits.

    >>> wide("bfloat16"), wide("float8_e4m3fn"), wide("float64")
    (dtype('float32'), dtype('float32'), dtype('float64'))
    """
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def narrow(dtype: Any) -> bool:
    """Return whether a float dtype has fewer than 16 bits, so that rounding to it is quantization."""
    return jnp.finfo(dtype).bits < 16


def has_adams_eps(dtype: Any) -> bool:
    """Return whether 1e-8 isn't 0 in a dtype. In float16 it is, and Adam divides 0 by 0 where a gradient is small.

    >>> has_adams_eps("bfloat16"), has_adams_eps("float16")
    (True, False)
    """
    return bool(np.asarray(1e-8, jnp.dtype(dtype)))
