"""A checkpoint that `torch.save` wrote (.bin, .pt, .pth) -> named arrays, without torch and without running anything.

Such a file is a zip archive: a pickle that describes the tensors, and one member for each storage. A pickle is a
program, and Python's own `pickle` runs it; so this reader is a stack machine of its own that knows only the
instructions below, and only the names in `_KNOWN`. Everything it builds is a tuple, a list, a dict or one of the three
plain classes below; a call is looked at, never made. What it does not know is an error. Storages stay on disk.

(Pickle: https://peps.python.org/pep-3154/ and `pickletools`; torch: `torch/serialization.py`, `torch/_utils.py`.)
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import FormatError, UnsupportedError

from .arrays import STORED, Array, stored
from .safetensors_file import open_map

MAX_PICKLE_BYTES = 64 << 20
MAX_STEPS = 1 << 22  # instructions; a checkpoint takes about 40 for each tensor
MAX_DIMS = 8

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
_KNOWN = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    *(f"torch {name}" for name in _STORAGES),
}


@dataclass(frozen=True)
class _Name:
    """A name that the pickle refers to; nothing is imported."""

    full: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    n_items: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a group on the stack begins."""


_MARK = _Mark()


def read(path: Path) -> dict[str, Array]:
    """The arrays of a checkpoint by name, in its order.

    A dict of dicts (such as {"model": {...}}) is flattened when only one of them holds tensors.
    Raises SourceError when the file cannot be opened, FormatError when it is broken, UnsupportedError when it is of
    torch's oldest kind, compressed, or asks for anything but the rebuilding of tensors.
    """
    data = open_map(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if PurePosixPath(name).name == "data.pkl"]
            if len(pickles) != 1:
                raise FormatError(f"{path}: a zip archive that is no checkpoint of torch: it has no data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise FormatError(f"{path}: its data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
            order = members.get(root + "byteorder")
            if order is not None and order.file_size <= 16 and archive.read(order) != b"little":
                raise UnsupportedError(f"{path}: a big-endian checkpoint")
            with archive.open(pickles[0]) as file:
                program = file.read(MAX_PICKLE_BYTES + 1)
    except (FormatError, UnsupportedError):
        raise
    except Exception as error:  # whatever a hostile archive may find in the library
        if data[:2] != b"PK":
            raise UnsupportedError(
                f"{path}: no zip archive; checkpoints older than torch 1.6 must be saved again, best as safetensors"
            ) from None
        raise FormatError(f"{path}: a damaged zip archive: {error}") from None
    tensors = _state_dict(path, _Machine(path, program).run())
    return {name: _array(path, data, members, root, name, tensor) for name, tensor in tensors.items()}


def _state_dict(path: Path, value: Any) -> dict[str, _Tensor]:
    for _ in range(3):
        if not isinstance(value, dict):
            break
        tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, _Tensor)}
        if tensors:
            return tensors
        inner = [v for v in value.values() if isinstance(v, dict) and v]
        value = inner[0] if len(inner) == 1 else None
    raise FormatError(f"{path}: holds no dict of tensors by name")


def _array(path: Path, data: Any, members: dict[str, zipfile.ZipInfo], root: str, name: str, tensor: _Tensor) -> Array:
    """The view of a tensor in its storage, after proof that it stays inside."""
    storage, what = tensor.storage, f"{path}: tensor {name!r:.80}"
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
        raise FormatError(f"{what} lies in the storage {storage.key!r:.40}, which the file lacks")
    if member.compress_type != zipfile.ZIP_STORED:
        raise UnsupportedError(f"{what} is compressed; save the checkpoint again, best as safetensors")
    dtype = np.dtype(STORED[storage.kind])
    start = _begin(what, data, member)
    if member.file_size != storage.n_items * dtype.itemsize or start + member.file_size > len(data):
        raise FormatError(f"{what} needs {storage.n_items} numbers; its storage has {member.file_size} bytes")
    last, n_weights = tensor.offset, 1
    for size, stride in zip(tensor.shape, tensor.strides, strict=True):
        last += (size - 1) * stride
        n_weights *= size
    if n_weights > storage.n_items or (n_weights and last >= storage.n_items):
        raise FormatError(f"{what} of shape {tensor.shape} does not lie inside its storage of {storage.n_items}")
    flat = np.frombuffer(data, dtype, storage.n_items, start)
    view: NDArray[Any] = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :] if n_weights else flat[:0],
        tensor.shape,
        tuple(stride * dtype.itemsize for stride in tensor.strides),
        writeable=False,
    )
    return stored(name, storage.kind, view, data)


def _begin(what: str, data: Any, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin: behind its local header."""
    at = member.header_offset
    if not 0 <= at <= len(data) - 30 or data[at : at + 4] != b"PK\x03\x04":
        raise FormatError(f"{what}: its storage is not where the archive says")
    n_name, n_extra = struct.unpack_from("<HH", data, at + 26)
    return int(at + 30 + n_name + n_extra)


class _Machine:
    """The stack machine: runs a pickle that only rebuilds tensors."""

    def __init__(self, path: Path, program: bytes) -> None:
        self.path, self.program, self.at = path, program, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the program leaves on the stack."""
        try:
            for _ in range(MAX_STEPS):
                code = self.take(1)
                if code == b".":
                    return self.pop()
                step = _STEPS.get(code)
                if step is None:
                    raise self.refused(f"the instruction {code!r}")
                step(self)
            raise FormatError(f"{self.path}: its data.pkl has more than {MAX_STEPS} instructions")
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(f"{self.path}: its data.pkl is broken at byte {self.at}: {error!r:.100}") from None

    def refused(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.path}: its data.pkl asks for {what:.100}, which no tensor needs; nothing was executed. "
            "Save the checkpoint again as safetensors"
        )

    # ------------------------------------------------------------------------------------------------ its parts

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.program) - self.at:
            raise ValueError("it ends too soon")
        self.at += n_bytes
        return self.program[self.at - n_bytes : self.at]

    def number(self, n_bytes: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(n_bytes), "little", signed=signed)

    def line(self) -> str:
        end = self.program.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def group(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        start = len(self.stack) - 1
        while not isinstance(self.stack[start], _Mark):
            start -= 1
            if start < 0:
                raise ValueError("there is no mark")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def name(self, module: str, name: str) -> None:
        full = f"{module} {name}"
        if full not in _KNOWN:
            raise self.refused(f"{module}.{name}")
        self.push(_Name(full))

    def named(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self.name(module, name)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("items for what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | bool | None):
                raise TypeError(f"a key of type {type(key).__name__}")
            self.stack[-1][key] = value

    def storage(self) -> None:
        """A reference to a storage: ("storage", its type, key, device, number of items)."""
        kind, of, key, _, n_items = self.pop()
        short = of.full.removeprefix("torch ")
        if kind != "storage" or short not in _STORAGES or type(key) is not str or type(n_items) is not int:
            raise ValueError("a reference to what is no storage")
        if not 0 <= n_items <= 1 << 48:
            raise ValueError(f"a storage of {n_items} items")
        self.push(_Storage(_STORAGES[short], key, n_items))

    def call(self) -> None:
        """What the call of a known name would give."""
        arguments, callee = self.pop(), self.pop()
        if not isinstance(callee, _Name) or not isinstance(arguments, tuple):
            raise self.refused("a call of something that is no known name")
        match callee.full.partition(" ")[2]:
            case "OrderedDict":
                if arguments not in ((), ([],)):
                    raise self.refused("an OrderedDict made of other things")
                self.push({})
            case "Size":
                self.push(tuple(arguments[0]))
            case "_rebuild_tensor" | "_rebuild_tensor_v2":
                storage, offset, shape, strides = arguments[:4]
                self.push(_tensor(storage, offset, shape, strides))
            case "_rebuild_parameter":
                if not isinstance(arguments[0], _Tensor):
                    raise TypeError("a parameter that is no tensor")
                self.push(arguments[0])
            case name:
                raise self.refused(f"a call of {name}")

    def build(self) -> None:
        """State for an object: only dicts have some here (the versions of modules), and it says nothing to us."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise self.refused("state for something that is no dict")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    sizes = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError("a tensor without a storage, shape or strides")
    whole = all(type(n) is int and 0 <= n < 1 << 48 for n in sizes)
    if len(shape) != len(strides) or len(shape) > MAX_DIMS or not whole:
        raise ValueError(f"a tensor of the impossible shape {shape!r:.60} with strides {strides!r:.60}")
    return _Tensor(storage, offset, shape, strides)


_STEPS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.push(_MARK),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.group())),
    b"\x85": lambda m: m.push((m.pop(),)),  # TUPLE1
    b"\x86": lambda m: m.push(tuple([m.pop(), m.pop()][::-1])),
    b"\x87": lambda m: m.push(tuple([m.pop(), m.pop(), m.pop()][::-1])),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number(4, signed=True)),  # BININT
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": lambda m: m.push(m.number(m.number(1), signed=True)),  # LONG1
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.push(m.take(m.number(4)).decode()),  # BINUNICODE
    b"\x8c": lambda m: m.push(m.take(m.number(1)).decode()),  # SHORT_BINUNICODE
    b"c": lambda m: m.name(m.line(), m.line()),  # GLOBAL
    b"\x93": _Machine.named,  # STACK_GLOBAL
    b"q": lambda m: m.remember(m.number(1)),  # BINPUT
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.push(m.memo[m.number(1)]),  # BINGET
    b"j": lambda m: m.push(m.memo[m.number(4)]),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.group()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.group()),
    b"Q": _Machine.storage,  # BINPERSID
    b"R": _Machine.call,  # REDUCE
    b"b": _Machine.build,
}
