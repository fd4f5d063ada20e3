"""Convolutions: layouts, strides, dilation, groups."""

import jax.numpy as jnp
from jax import lax

from battery.case import Axes, Catalogue, normal

CASES = case = Catalogue()

SEQUENCE = normal(2, 12, 8)
IMAGE = normal(2, 9, 9, 8)
CONV1, CONV2 = Axes((), (0, 1), (2,)), Axes((), (0, 1, 2), (3,))


def conv(x, w, strides=(1,), padding="SAME", **kw):
    layout = ("NWC", "WIO", "NWC") if x.ndim == 3 else ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **kw)


def low_conv(n, x, *args, **kw):
    return (conv(x, n["w"].a, *args, **kw) * n["w"].scale) @ n["w"].b


@case(SEQUENCE, w=(3, 8, 10), axes=CONV1, plus=low_conv)
def convolution(p, x):
    return conv(x, p["w"])


@case(IMAGE, w=(3, 3, 8, 10), axes=CONV2, plus=lambda n, x: low_conv(n, x, (2, 2)))
def strided_convolution(p, x):
    return conv(x, p["w"], (2, 2))


@case(IMAGE, w=(3, 3, 8, 10), axes=CONV2, plus=lambda n, x: low_conv(n, x, (1, 1), "VALID", rhs_dilation=(2, 2)))
def dilated_convolution(p, x):
    return conv(x, p["w"], (1, 1), "VALID", rhs_dilation=(2, 2))


@case(SEQUENCE, w=(3, 8, 10), axes=CONV1, plus=lambda n, x: low_conv(n, x, (1,), ((2, 2),), lhs_dilation=(2,)))
def fractionally_strided_convolution(p, x):
    return conv(x, p["w"], (1,), ((2, 2),), lhs_dilation=(2,))


@case(SEQUENCE, w=(3, 10, 8), axes=Axes((), (0, 2), (1,)))
def transposed_convolution(p, x):
    return lax.conv_transpose(x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=True)


@case(SEQUENCE, w=(3, 2, 12), axes=CONV1, plus=lambda n, x: low_grouped(n["w"], x, 4))
def grouped_convolution(p, x):
    return conv(x, p["w"], feature_group_count=4)


def low_grouped(n, x, groups):
    z = conv(x, jnp.tile(n.a, (1, 1, groups)), feature_group_count=groups).reshape(*x.shape[:-1], groups, -1)
    return jnp.einsum("bwgr,rgo->bwgo", z * n.scale, n.b.reshape(n.b.shape[0], groups, -1)).reshape(*x.shape[:-1], -1)


@case(SEQUENCE, w=(3, 1, 8), axes=CONV1, plus=lambda n, x: low_grouped(n["w"], x, 8))
def depthwise_convolution(p, x):
    return conv(x, p["w"], feature_group_count=8)


@case(normal(6, 12, 8), w=(3, 8, 10), axes=CONV1)
def batch_grouped_convolution(p, x):
    return conv(x, p["w"], batch_group_count=2)


@case(
    SEQUENCE.transpose(0, 2, 1), w=(10, 8, 3), axes=Axes((), (1, 2), (0,)), plus=lambda n, x: low_torch_conv(n["w"], x)
)
def convolution_in_torch_layout(p, x):
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME")


def low_torch_conv(n, x):
    z = lax.conv_general_dilated(x, jnp.moveaxis(n.a, -1, 0), (1,), "SAME")
    return jnp.einsum("brw,ro->bow", z * n.scale, n.b)
