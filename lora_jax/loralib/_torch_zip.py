"""The zip that `torch.save` writes, read without unpickling.

A pickle is a program for a stack machine: its opcodes push values, build tuples and call functions by name. This file
is an interpreter for the few opcodes that a dictionary of tensors needs, in which "calling" knows three functions (a
tensor from a storage, a parameter, an ordered dict), and names are looked up in a fixed table of dtypes. Nothing is
imported, nothing is called, and whatever isn't in the tables is an error.

A `pickle.Unpickler` whose `find_class` has a closed table isn't enough: it hashes every key of a dict, and a key of
500,000 nested tuples (half a megabyte) overflows the C stack and ends the process. A pass over the opcodes beforehand
can refuse such a key only if it keeps the stack as this file does, and the unpickler would come on top.

The format: https://docs.pytorch.org/docs/stable/notes/serialization.html, opcodes: `pickletools`.
"""

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora_jax._untrusted import git_lfs_pointer, not_a_file

# Views of one storage share its bytes in the file but not in memory: all tensors together may take this many times the
# file's size, or this many bytes where the file is small.
MOST_SHARED = 4
LEAST_ROOM = 64 * 2**20
MAX_PICKLE = 16 * 2**20  # bytes; a tensor's entry takes a few hundred
MAX_OPCODES = 2**20  # a tensor's entry takes some forty
MAX_AXES = 64  # NumPy's own limit

STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
ORDERED_DICT, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)


class _Global(NamedTuple):
    """A name that the pickle mentions; it is never looked up."""

    name: str


class _Mark(NamedTuple):
    """The mark at which a tuple or a run of items begins on the stack."""


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the tensors of a file that `torch.save` wrote from a state dict.

    Args:
        path: The file; nothing in it is executed.

    Returns:
        The array of each tensor by its name, in the file's order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `torch.save` didn't write the file, it is damaged, or it holds anything but tensors by name.

    >>> import pickle, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "adapter.bin"
    >>> _ = path.write_bytes(pickle.dumps(print))  # a pickle that isn't a table of tensors
    >>> read(path)
    Traceback (most recent call last):
    ValueError: ...
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if what := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {what}; expected a file that torch.save wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, path.stat().st_size).tensors()
    except (zipfile.BadZipFile, EOFError, struct.error):
        raise ValueError(f"{path}: not a zip of tensors as torch.save writes since PyTorch 1.6, or cut short") from None
    except (ValueError, OverflowError, NotImplementedError) as error:  # zipfile's, for a compression it doesn't have
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


class _Archive:
    """An open zip, with its members checked: stored as they are, and all of them together no larger than the file.

    Members may name the same bytes of the file: thousands that overlap would be read into memory thousands of times.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self.archive, self.size = archive, size
        self.read: dict[str, bytes] = {}
        self.members = {member.filename: member for member in archive.infolist()}
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size > size:
                raise ValueError(f"{member.filename[:80]!r} is compressed or encrypted, which torch.save never does")
        total = sum(member.file_size for member in archive.infolist())
        if total > size:
            raise ValueError(f"its members take {total:,} bytes, in a file of {size:,}: they overlap")
        pickles = [name for name in self.members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no data.pkl; only files that torch.save wrote can be read")
        self.root = pickles[0].removesuffix("data.pkl")
        if self._optional("byteorder") not in (None, b"little"):
            raise ValueError("its numbers aren't little-endian")

    def _optional(self, name: str) -> bytes | None:
        member = self.members.get(self.root + name)
        if member is None:
            return None
        if name not in self.read:  # tensors may name one storage several times, and read it as other types of numbers
            self.read[name] = self.archive.read(member)
        return self.read[name]

    def tensors(self) -> dict[str, np.ndarray]:
        if self.members[f"{self.root}data.pkl"].file_size > MAX_PICKLE:
            raise ValueError("its data.pkl is too large for a table of tensors")
        found = interpret(self._optional("data.pkl") or b"", self.storage)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, np.ndarray):
                raise ValueError(f"{str(name)[:80]!r} is no tensor; only a state dict can be read")
        taken = sum(value.size * value.itemsize for value in found.values())
        if taken > max(MOST_SHARED * self.size, LEAST_ROOM):
            raise ValueError(
                f"its tensors take {taken:,} bytes, in a file of {self.size:,}: they are views of one another"
            )
        return {name: value.copy() for name, value in found.items()}

    def storage(self, reference: Any) -> np.ndarray:
        """Return the numbers that a persistent id names: ("storage", type, key, device, count)."""
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, count = reference
        dtype = STORAGES.get(kind.name) if isinstance(kind, _Global) else None
        if dtype is None or not isinstance(key, str) or not key.isdecimal() or type(count) is not int:
            raise ValueError(f"it holds a storage of an unknown kind: {_show(kind)}")
        data = self._optional(f"data/{key}")
        if data is None or len(data) != count * dtype.itemsize:
            raise ValueError(
                f"storage {key[:20]} is missing or not of {count} numbers: the file is cut short or damaged"
            )
        return np.frombuffer(data, dtype)


def interpret(program: bytes, storage: Callable[[Any], np.ndarray]) -> Any:
    """Return the value that a pickle describes, built from tables: dicts, tuples, strings, numbers and tensors, nothing
    else.

    >>> import pickle
    >>> interpret(pickle.dumps({"a": (1, True)}, protocol=2), storage=lambda reference: None)
    {'a': (1, True)}
    >>> interpret(b"cos\\nsystem\\n(tR.", storage=lambda reference: None)  # pickle.loads would call os.system
    Traceback (most recent call last):
    ValueError: it calls for something other than tensors: 'os system'
    """
    machine = _Machine(storage)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if count >= MAX_OPCODES:
            raise ValueError("its pickle is too long for a table of tensors")
        if opcode.name == "STOP":
            return machine.pop()
        machine.step(opcode.name, argument)
    raise ValueError("its pickle has no end")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSHED = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack machine that a pickle is a program for: its stack, and its memo of values to be used again.

    The pickle of {"a": 1} takes these steps:

        EMPTY_DICT            stack [{}]
        BINUNICODE "a"        stack [{}, "a"]
        BININT1 1             stack [{}, "a", 1]
        SETITEM               stack [{"a": 1}]
        STOP                  the result is the top of the stack
    """

    def __init__(self, storage: Callable[[Any], np.ndarray]):
        self.storage = storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes more than it has: damaged")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        items = []
        while not isinstance(item := self.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _PUSHED:
            self.stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "GLOBAL":
            self.stack.append(_Global(argument))
        elif name == "MARK":
            self.stack.append(_Mark())
        elif name == "EMPTY_DICT":
            self.stack.append({})
        elif name == "TUPLE":
            self.stack.append(tuple(self.pop_to_mark()))
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(items[::-1]))
        else:
            self.act(name, argument)

    def act(self, name: str, argument: Any) -> None:
        """Execute an opcode that uses what is on the stack or in the memo."""
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError("its pickle recalls what it never stored: damaged")
            self.stack.append(self.memo[argument])
        elif name == "BINPERSID":
            self.stack.append(self.storage(self.pop()))
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            _set(self.top(), [key, value])
        elif name == "SETITEMS":
            items = self.pop_to_mark()
            _set(self.top(), items)
        elif name == "BUILD":  # sets attributes: torch writes the versions of its modules as one of the state dict
            self.pop()
            if not isinstance(self.top(), dict):
                raise ValueError("it sets attributes of something other than a state dict")
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            self.stack.append(_call(function, arguments))
        else:
            raise ValueError(f"it calls for something other than tensors: {name!r}")


def _set(target: Any, items: list[Any]) -> None:
    """Put `[key, value, key, value, ...]` into a dict."""
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("it sets items of something other than a dict: damaged")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # before it is hashed: the hash of deeply nested tuples overflows the stack
            raise ValueError(f"it has a key that is no name: {_show(key)}")
        target[key] = value


def _call(function: Any, arguments: Any) -> Any:
    """Return the value that a call of one of the three known functions would return."""
    name = function.name if isinstance(function, _Global) else None
    count = len(arguments) if isinstance(arguments, tuple) else -1
    if name == ORDERED_DICT and count == 0:
        return {}
    if name == TENSOR and count in (6, 7):
        return _tensor(*arguments[:4])
    if name == PARAMETER and count == 3 and isinstance(arguments[0], np.ndarray):
        return arguments[0]
    raise ValueError(f"it calls for something other than tensors: {_show(function)}")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """Return the view of a storage that a tensor is, as `_rebuild_tensor_v2` makes it.

    A tensor of size (2, 3) with stride (3, 1) and offset 6 has the entries 6 to 11 of its storage. Sizes and strides
    come from the file, so a view that reaches beyond its storage is refused: NumPy would read memory that isn't its
        own.
    """
    numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [-1]
    if (
        not isinstance(storage, np.ndarray)
        or len(size) != len(stride)
        or len(size) > MAX_AXES
        or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers)
    ):
        raise ValueError("it holds a tensor without a shape: damaged")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.size or (math.prod(size) and last >= storage.size):
        raise ValueError(f"a tensor of shape {size} reaches beyond its storage of {storage.size} numbers")
    if not math.prod(size):
        return np.zeros(size, storage.dtype)
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _show(value: Any) -> str:
    text = value.name if isinstance(value, _Global) else type(value).__name__
    return repr(text[:80])
