"""Weights in few bits in a folder's files, as bitsandbytes and transformers' fp8 write them.

4 bits   weight u8[n/2], weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (JSON), and of nested
         scales weight.nested_absmax, weight.nested_quant_map:    W = quant_map[codes] · absmax, by blocks of [out, in]
int8     weight i8[out, in], SCB f32[out], weight_format:         W = weight · SCB / 127
fp8      weight e4m3[out, in], weight_scale_inv:                  W = weight · weight_scale_inv, by blocks of a matrix
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora_jax._quantize.codes import DYNAMIC, NF4
from lora_jax.models._files import DTYPES, Stored, TensorFiles

READ = ("bitsandbytes", "fp8")  # the values of `quant_method` that are read
SCALES_IN_A_BLOCK = 256  # of the nested scales of `lora_jax.Quantized`

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_MOST_STATE = 4096  # bytes of the JSON that describes a weight
_LARGEST_E4M3 = 448.0
_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
_BITS = {
    **DTYPES,
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class Packed(NamedTuple):
    """A weight in few bits, [out, in] in its file whichever way the plain weight would be there.

    Attributes:
        scheme: "nf4", "fp4", "int8" or "fp8".
        group_size: The inputs of an output that share a scale; 0 for all.
        why: The reason why it can't stay in few bits, as a `lora_jax.Quantized` of its scheme; empty if it can.
        parts: () -> the data of such a node, of one kernel: codes [in, out] and scales.
        numbers: () -> f32[out, in].
    """

    scheme: str
    group_size: int
    why: str
    parts: Callable[[], dict[str, Any]]
    numbers: Callable[[], np.ndarray]


def check_method(quantization: Any) -> str:
    """Return the method by which a configuration's weights are quantized; empty for plain weights.

    Raises:
        ValueError: It isn't one that is read.

    >>> check_method({"quant_method": "gptq", "bits": 4})
    Traceback (most recent call last):
    ValueError: quantization_config: quant_method 'gptq' given, expected 'bitsandbytes' or 'fp8'; take the 16-bit model
    """
    if not quantization:
        return ""
    fields = quantization if isinstance(quantization, dict) else {}
    in_bits = fields.get("load_in_4bit") or fields.get("load_in_8bit")
    method = fields.get("quant_method", "bitsandbytes" if in_bits else None)
    if method not in READ:
        raise ValueError(
            f"quantization_config: quant_method {str(method)[:40]!r} given, expected 'bitsandbytes' or 'fp8'; take the"
            " 16-bit model"
        )
    if fields.get("expert_dtype", "fp8") != "fp8":
        raise ValueError("quantization_config: expert_dtype 'fp4' given, expected 'fp8'; take the 16-bit model")
    return method


def take(files: TensorFiles, quantization: Any, dtype: np.dtype) -> None:
    """Replace, in the table of a folder's tensors, each weight in few bits and its scales by the weight that they mean.

    Args:
        files: The files, whose `tensors` and `packed` are changed.
        quantization: The configuration's `quantization_config`.
        dtype: The dtype of weights whose files don't say it.

    Raises:
        ValueError: Tensors don't belong together.
    """
    if not (method := check_method(quantization)):
        return
    for name in list(files.tensors):
        if method == "fp8" and name.endswith(".weight_scale_inv"):
            _replace(files, name.removesuffix("_scale_inv"), _fp8, (quantization.get("weight_block_size"), dtype))
        elif method == "bitsandbytes" and (match := _STATE.fullmatch(name)):
            _replace(files, match[1], _four_bits, (name,))
        elif method == "bitsandbytes" and name.endswith(".SCB"):
            _replace(files, name.removesuffix("SCB") + "weight", _int8, (dtype,))


def _replace(files: TensorFiles, weight: str, reader: Any, arguments: tuple[Any, ...]) -> None:
    if weight not in files.tensors:
        raise ValueError(f"{files.folder}: {weight} is missing, though its scales are there; download the folder again")
    try:
        taken, shape, kind, packed = reader(_Reader(files), weight, *arguments)
    except ValueError as error:
        raise ValueError(f"{files.tensors[weight].file}: {weight[:200]}: {error}") from None
    place = files.tensors[weight]
    for name in taken:
        files.tensors.pop(name, None)
    files.tensors[weight] = place._replace(shape=shape, dtype=_NAMES[kind.name])
    files.packed[weight] = packed


class _Reader:
    """The tensors of a file at the places that they have now, checked for dtype and size."""

    def __init__(self, files: TensorFiles):
        self._files, self._tensors = files, dict(files.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def place(self, name: str, dtypes: str, count: int | None = None) -> Stored:
        where = self._tensors.get(name)
        if where is None:
            raise ValueError(f"{name.rpartition('.')[2]} is missing")
        if where.dtype not in dtypes.split():
            raise ValueError(f"{name.rpartition('.')[2]} is {where.dtype}, expected {dtypes.replace(' ', ' or ')}")
        if count is not None and int(np.prod(where.shape, dtype=np.int64)) != count:
            raise ValueError(f"{name.rpartition('.')[2]} has shape {where.shape}, expected {count} numbers")
        return where

    def get(self, name: str, dtypes: str, count: int | None = None) -> np.ndarray:
        where = self.place(name, dtypes, count)
        return self._files.data(name, where).view(_BITS[where.dtype]).reshape(where.shape)

    def raw(self, name: str) -> np.ndarray:
        return self._files.data(name, self._tensors[name])


# bitsandbytes -------------------------------------------------------------------------------------------------------


def _four_bits(read: _Reader, weight: str, state_name: str) -> tuple[list[str], tuple[int, ...], np.dtype, Packed]:
    state = _state(read, state_name)
    shape, size = tuple(state["shape"]), state["blocksize"]
    count, blocks = shape[0] * shape[1], -(-shape[0] * shape[1] // size)
    if read.place(weight, " ".join(_BITS)).size != -(-count // 2):
        raise ValueError(f"has {read.place(weight, ' '.join(_BITS)).size} bytes, expected 4 bits for each of {shape}")
    nested = "nested_offset" in state
    absmax = f"{weight}.absmax", "U8" if nested else "F32", blocks
    second = f"{weight}.nested_absmax", "F32", -(-blocks // state.get("nested_blocksize", 1))
    read.place(*absmax)
    table = read.get(f"{weight}.quant_map", "F32", 16)
    dynamic = DYNAMIC
    if nested:
        read.place(*second)
        dynamic = read.get(f"{weight}.nested_quant_map", "F32", DYNAMIC.size)

    def codes() -> np.ndarray:
        data = read.raw(weight)
        return np.stack([data >> 4, data & 15], -1).reshape(-1)[:count]

    def scales() -> np.ndarray:
        if not nested:
            return read.get(*absmax).reshape(-1)
        outer = np.repeat(read.get(*second).reshape(-1), state["nested_blocksize"])[:blocks]
        return dynamic[read.get(*absmax).reshape(-1)] * outer + np.float32(state["nested_offset"])

    def numbers() -> np.ndarray:
        return (table[codes()] * np.repeat(scales(), size)[:count]).reshape(shape)

    def parts() -> dict[str, Any]:
        return {
            "values": codes().reshape(shape).T.astype(ml_dtypes.uint4),
            "scales": read.get(*absmax).reshape(shape[0], -1).T,
            "outer": read.get(*second).reshape(-1) if nested else None,
            "offset": np.float32(state["nested_offset"]) if nested else None,
        }

    why = _other(state, shape, np.array_equal(table, NF4), np.array_equal(dynamic, DYNAMIC))
    taken = [state_name, *(f"{weight}.{end}" for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))]
    return taken, shape, DTYPES[_NAMES[state["dtype"]]], Packed(state["quant_type"], size, why, parts, numbers)


def _other(state: Mapping[str, Any], shape: tuple[int, ...], nf4: bool, dynamic: bool) -> str:
    """Return the reason why `lora_jax.Quantized` can't hold a weight's 4 bits; empty if it can."""
    if state["quant_type"] != "nf4":
        return f"{state['quant_type']} isn't one of nf4, int8 and fp8"
    if shape[1] % state["blocksize"]:
        return f"blocks of {state['blocksize']} don't divide {shape[1]} inputs"
    if not nf4 or not dynamic or state.get("nested_blocksize", SCALES_IN_A_BLOCK) != SCALES_IN_A_BLOCK:
        return "its tables of numbers or blocks of scales aren't NF4's"
    return ""


def _state(read: _Reader, name: str) -> dict[str, Any]:
    """Return the JSON that describes a weight, with its fields checked."""
    where = read.place(name, "U8")
    try:
        state = json.loads(read.raw(name).tobytes()) if where.size <= _MOST_STATE else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ValueError("quant_state isn't a JSON object")

    def whole(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**31

    shape = state.get("shape")
    nested = "nested_offset" in state or "nested_blocksize" in state
    checks = {
        "quant_type": state.get("quant_type") in ("nf4", "fp4"),
        "blocksize": whole(state.get("blocksize")),
        "dtype": state.get("dtype") in _NAMES,
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(whole, shape)),
        "nested_blocksize": not nested or whole(state.get("nested_blocksize")),
        "nested_offset": not nested or isinstance(state.get("nested_offset"), int | float),
    }
    if wrong := [field for field, right in checks.items() if not right]:
        raise ValueError(f"quant_state: {wrong[0]} is {str(state.get(wrong[0]))[:40]}, which no version of it writes")
    return state


def _int8(read: _Reader, weight: str, dtype: np.dtype) -> tuple[list[str], tuple[int, ...], np.dtype, Packed]:
    stem = weight.removesuffix("weight")
    shape = read.place(weight, "I8").shape
    if len(shape) != 2:
        raise ValueError(f"has shape {shape}, expected a matrix")
    if f"{stem}weight_format" in read and (order := int(read.get(f"{stem}weight_format", "U8", 1).reshape(()))):
        raise ValueError(f"weight_format is {order}, expected 0 (rows); save the model again with a newer bitsandbytes")
    read.place(f"{stem}SCB", "F32", shape[0])

    def scales() -> np.ndarray:
        return read.get(f"{stem}SCB", "F32").reshape(-1)

    def parts() -> dict[str, Any]:
        return {"values": read.get(weight, "I8").T, "scales": scales(), "outer": None, "offset": None}

    def numbers() -> np.ndarray:
        return read.get(weight, "I8").astype(np.float32) * (scales() / np.float32(127))[:, None]

    return [f"{stem}SCB", f"{stem}weight_format"], shape, dtype, Packed("int8", 0, "", parts, numbers)


# fp8 ----------------------------------------------------------------------------------------------------------------


def _fp8(
    read: _Reader, weight: str, block: Any, dtype: np.dtype
) -> tuple[list[str], tuple[int, ...], np.dtype, Packed]:
    shape, scale = read.place(weight, "F8_E4M3").shape, f"{weight}_scale_inv"
    if len(shape) != 2:
        raise ValueError(f"has shape {shape}, expected a matrix")
    rows, columns = (min(size, whole) for size, whole in zip(_block(block, shape), shape, strict=True))
    blocks = -(-shape[0] // rows), -(-shape[1] // columns)
    kinds = "F32 BF16 F16 F8_E8M0"
    if read.place(scale, kinds, blocks[0] * blocks[1]).shape not in (blocks, (), (1,)):
        raise ValueError(f"weight_scale_inv has shape {read.place(scale, kinds).shape}, expected {blocks}")

    def scales() -> np.ndarray:
        """Return the scale of each output in each block of inputs, f32[out, blocks]."""
        return np.repeat(read.get(scale, kinds).astype(np.float32).reshape(blocks), rows, 0)[: shape[0]]

    def numbers() -> np.ndarray:
        spread = np.repeat(scales(), columns, 1)[:, : shape[1]]
        return read.get(weight, "F8_E4M3").astype(np.float32) * spread

    def parts() -> dict[str, Any]:
        laid = scales().T * np.float32(_LARGEST_E4M3)
        return {
            "values": read.get(weight, "F8_E4M3").T,
            "scales": laid[0] if block is None else laid,
            "outer": None,
            "offset": None,
        }

    why = f"blocks of {columns} don't divide {shape[1]} inputs" if shape[1] % columns else ""
    stem = weight.removesuffix("weight")
    taken = [scale, f"{stem}activation_scale", f"{stem}input_scale"]
    return taken, shape, dtype, Packed("fp8", 0 if block is None else columns, why, parts, numbers)


def _block(block: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    if block is None:
        return shape[0], shape[1]
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"weight_block_size is {str(block)[:40]}, expected two whole numbers")
    return block[0], block[1]
