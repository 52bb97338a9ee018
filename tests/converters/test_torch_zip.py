"""Checkpoints of torch: what `torch.save` writes is read, and nothing else is done, whatever the file asks for."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import torch_zip
from edgelm.errors import EdgelmError, FormatError, UnsupportedError


class Storage:
    """Pickled as torch pickles its storages: as a persistent id."""

    def __init__(self, kind: str, key: str, data: np.ndarray) -> None:
        self.kind, self.key, self.data = kind, key, data


class Global:
    """Pickled as a reference to a name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """Pickled as a call of a name."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.callee, self.arguments = Global(module, name), arguments


class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Python's own pickler in Python, which writes the two above without having what they name."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return ("storage", Global("torch", obj.kind), obj.key, "cpu", obj.data.size)
        return None

    def save(self, obj: Any, *rest: Any, **options: Any) -> None:
        if isinstance(obj, Global):
            self.write(b"c" + obj.module.encode() + b"\n" + obj.name.encode() + b"\n")
        elif isinstance(obj, Call):
            self.save(obj.callee)
            self.save(obj.arguments)
            self.write(b"R")
        else:
            super().save(obj, *rest, **options)


def tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Call:
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, collections.OrderedDict())


def save(path: Path, value: Any, storages: list[Storage] = [], compression: int = zipfile.ZIP_STORED) -> Path:  # noqa: B006
    """What `torch.save` would have written, or a hostile likeness of it; `value` may be the pickle itself."""
    out = io.BytesIO()
    if not isinstance(value, bytes):
        Pickler(out, 2).dump(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", value if isinstance(value, bytes) else out.getvalue())
        archive.writestr("archive/byteorder", "little")
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.data.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def test_tensors_of_all_types_and_strides(tmp_path: Path) -> None:
    floats = np.arange(24, dtype=np.float32)
    halves = np.linspace(-2, 2, 8).astype(np.float16)
    brains = (np.array([1.5, -2.0, 3.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    storages = [Storage("FloatStorage", "0", floats), Storage("HalfStorage", "1", halves),
                Storage("BFloat16Storage", "2", brains), Storage("LongStorage", "3", np.array([7]))]  # fmt: skip
    path = save(
        tmp_path / "a.bin",
        collections.OrderedDict(
            whole=tensor(storages[0], 0, (4, 6), (6, 1)),
            turned=tensor(storages[0], 0, (6, 4), (1, 6)),
            part=tensor(storages[0], 7, (2, 3), (6, 1)),
            half=tensor(storages[1], 0, (8,), (1,)),
            parameter=Call("torch._utils", "_rebuild_parameter", tensor(storages[2], 0, (3,), (1,)), True, {}),
            number=tensor(storages[3], 0, (), ()),
        ),
        storages,
    )
    arrays = torch_zip.read(path)
    assert list(arrays) == ["whole", "turned", "part", "half", "parameter", "number"]
    assert np.array_equal(arrays["whole"].read(), floats.reshape(4, 6))
    assert np.array_equal(arrays["turned"].read(), floats.reshape(4, 6).T)
    assert np.array_equal(arrays["turned"].rows(2, 4), floats.reshape(4, 6).T[2:4])
    assert np.array_equal(arrays["part"].read(), floats.reshape(4, 6)[1:3, 1:4])
    assert np.array_equal(arrays["half"].read(), halves.astype(np.float32))
    assert arrays["parameter"].read().tolist() == [1.5, -2.0, 3.0]
    assert arrays["number"].read() == 7


def test_a_dict_within_a_dict(tmp_path: Path) -> None:
    storage = Storage("FloatStorage", "0", np.ones(2, np.float32))
    path = save(tmp_path / "a.pth", {"epoch": 3, "model": {"w": tensor(storage, 0, (2,), (1,))}}, [storage])
    assert list(torch_zip.read(path)) == ["w"]


class Evil:
    """Writes a file when it is unpickled by anything that runs pickles."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


def evil_pickles(witness: Path) -> dict[str, bytes]:
    command = f"touch {witness}".encode()
    return {
        "reduce": pickle.dumps(Evil(witness), 2),
        "reduce, protocol 4": pickle.dumps(Evil(witness), 4),
        "reduce, protocol 0": pickle.dumps(Evil(witness), 0),
        "inst": b"(S'" + command + b"'\nios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"o.",
        "builtins": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.",
        "getattr": b"\x80\x02ctorch.serialization\nload\n.",
        "newobj": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "build on a name": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "call of a tuple": b"\x80\x02K\x01\x85)R.",
        "ordered dict of a call": b"\x80\x02ccollections\nOrderedDict\n]K\x01a\x85R.",
    }


@pytest.mark.parametrize("kind", evil_pickles(Path("x")))
def test_nothing_is_executed(tmp_path: Path, kind: str) -> None:
    witness = tmp_path / "witness"
    path = save(tmp_path / "evil.bin", evil_pickles(witness)[kind])
    with pytest.raises(UnsupportedError):
        torch_zip.read(path)
    assert not witness.exists()


BROKEN = {
    "empty": b"",
    "cut short": b"\x80\x02X\xff\xff\xff\xff",
    "no stop": b"\x80\x02}",
    "stack underflow": b"\x80\x02.",
    "no mark": b"\x80\x02K\x01t.",
    "unknown memo": b"\x80\x02h\x07.",
    "items of no dict": b"\x80\x02]K\x01K\x02s.",
    "odd items": b"\x80\x02}(K\x01u.",
    "unhashable key": b"\x80\x02}]K\x02s.",
    "bad text": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "a long of 255 bytes too few": b"\x80\x02\x8a\xff\x00.",
    "not a dict": b"\x80\x02K\x01.",
    "no tensors": b"\x80\x02}.",
    "persistent id of nothing": b"\x80\x02K\x01Q.",
    "million of marks": b"\x80\x02" + b"(" * 100_000,
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pickles(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FormatError):
        torch_zip.read(save(tmp_path / "a.bin", BROKEN[kind]))


LIES: dict[str, tuple[Any, ...]] = {  # offset, shape, strides of a tensor in a storage of 8
    "past the end": (1, (8,), (1,)),
    "stride past the end": (0, (2, 2), (7, 1)),
    "zero stride, endless": (0, (1 << 40,), (0,)),
    "negative size": (0, (-1,), (1,)),
    "negative stride": (7, (8,), (-1,)),
    "negative offset": (-1, (2,), (1,)),
    "product that would wrap": (0, (4194305, 4194305, 211106198978564), (0, 0, 0)),
    "too many dimensions": (0, (1,) * 40, (1,) * 40),
    "sizes that are no numbers": (0, ("8",), (1,)),
    "true as a size": (0, (True,), (1,)),
    "more strides than sizes": (0, (8,), (1, 1)),
}


@pytest.mark.parametrize("kind", LIES)
def test_lies_about_shapes(tmp_path: Path, kind: str) -> None:
    storage = Storage("FloatStorage", "0", np.ones(8, np.float32))
    with pytest.raises(FormatError):
        torch_zip.read(save(tmp_path / "a.bin", {"w": tensor(storage, *LIES[kind])}, [storage]))


def test_lies_about_storages(tmp_path: Path) -> None:
    storage = Storage("FloatStorage", "0", np.ones(8, np.float32))
    longer = Storage("FloatStorage", "0", np.ones(9, np.float32))
    value = {"w": tensor(storage, 0, (8,), (1,))}
    for storages in ([], [longer], [Storage("FloatStorage", "1", storage.data)]):
        with pytest.raises(FormatError):
            torch_zip.read(save(tmp_path / "a.bin", value, storages))
    with pytest.raises(UnsupportedError, match="compressed"):
        torch_zip.read(save(tmp_path / "a.bin", value, [storage], zipfile.ZIP_DEFLATED))


def test_what_is_no_zip(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    with pytest.raises(UnsupportedError, match="saved again"):
        torch_zip.read(path)


def test_any_flipped_byte_is_survived(tmp_path: Path) -> None:
    storage = Storage("FloatStorage", "0", np.arange(8, dtype=np.float32))
    path = save(tmp_path / "a.bin", {"w": tensor(storage, 0, (2, 4), (4, 1))}, [storage])
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for position in rng.permutation(len(whole))[:400]:
        data = bytearray(whole)
        data[position] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        with contextlib.suppress(EdgelmError, KeyError):
            torch_zip.read(path)["w"].read()
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(EdgelmError):
            torch_zip.read(path)
