"""The GGUF writer: its bytes against `gguf.GGUFWriter`'s, and what it leaves behind when it is stopped anywhere."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from converters import gguf_writer
from converters.gguf_writer import Layout, Planned, Typed, write
from edgelm import gguf
from edgelm.errors import FormatError
from edgelm.formats import QTensor, by_name

KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "A name — with an accent: é",
    "a.bool": True,
    "a.number": 7,
    "a.negative": np.int32(-7),
    "a.long": 1 << 40,
    "a.float": 0.1,
    "a.double": np.float64(0.1),
    "a.u16": np.uint16(3),
    "an.array.of.strings": ["a", "", "¿"],
    "an.array.of.ints": [1, -2, 3],
    "an.array.of.floats": [0.5, 0.25],
    "an.array.of.bools": [True, False],
    "some.bytes": b"\x00\x01\xff",
}
_ADD = {np.int32: "add_int32", np.float64: "add_float64", np.uint16: "add_uint16", bool: "add_bool",
        float: "add_float32", str: "add_string", list: "add_array", bytes: "add_array"}  # fmt: skip


def weights() -> dict[str, QTensor]:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": ((3, 64), "Q4_0"), "b.weight": ((5,), "F32"), "c.weight": ((2, 3, 4), "F16"),
              "d.weight": ((7, 32), "Q8_0"), "e.bias": ((1,), "F32")}  # fmt: skip
    return {
        name: QTensor.from_array(name, rng.standard_normal(shape), by_name(format))
        for name, (shape, format) in shapes.items()
    }


def planned(tensors: dict[str, QTensor]) -> list[Planned]:
    return [Planned(t.name, t.shape, t.format) for t in tensors.values()]


def by_rows(tensors: dict[str, QTensor]) -> gguf_writer.Contents:
    def contents(tensor: Planned) -> Iterator[NDArray[np.uint8]]:
        yield from tensors[tensor.name].data

    return contents


def test_the_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    import gguf as oracle

    tensors = weights()
    writer = oracle.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    for key, value in KEYS.items():
        if key == "general.architecture":
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            (writer.add_uint32 if value < 1 << 32 else writer.add_uint64)(key, value)
        else:
            getattr(writer, _ADD[type(value)])(key, value)
    for name, tensor in tensors.items():
        data = tensor.data.reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(name, data, raw_dtype=oracle.GGMLQuantizationType(tensor.format.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    hashes = write(tmp_path / "ours.gguf", Layout(KEYS, planned(tensors)), by_rows(tensors))
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert hashes == {name: hashlib.sha256(t.data.tobytes()).hexdigest() for name, t in tensors.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.gguf", "theirs.gguf"]


@given(
    st.dictionaries(
        st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20),
        st.one_of(
            st.booleans(),
            st.integers(-(1 << 31), (1 << 64) - 1),
            st.floats(width=32, allow_nan=False),
            st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
            st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=9), min_size=1, max_size=9),
            st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=9),
        ),
        max_size=12,
    )
)
def test_what_was_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("written") / "file.gguf"
    keys = {key: value for key, value in keys.items() if key.isprintable()}
    tensors = weights()
    write(path, Layout(keys, planned(tensors)), by_rows(tensors))
    read = gguf.read(path)
    assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in read.metadata.items()} == keys
    for name, tensor in tensors.items():
        assert read.tensors[name].shape == tensor.shape
        assert np.array_equal(read.tensors[name].data, tensor.data)


@pytest.mark.parametrize("value", [None, {}, [], [1, "a"], [[1]], 1 << 64, np.complex64(1), np.zeros(2, np.float16)])
def test_what_gguf_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"a\.key"):
        Layout({"a.key": value}, [])


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(FormatError, match="two tensors"):
        Layout({}, [Planned("a", (1,), by_name("F32"))] * 2)


def test_values_may_be_copied_in_their_own_bytes() -> None:
    copied = Layout({"a": Typed(2, b"\x07\x00")}, [])
    assert copied.header == Layout({"a": np.uint16(7)}, []).header


class Stop(Exception):
    pass


@pytest.mark.parametrize("when", range(6))
def test_a_stopped_run_goes_on(tmp_path: Path, when: int) -> None:
    tensors, path = weights(), tmp_path / "file.gguf"
    layout = Layout({**KEYS, "edgelm.sha256": "0" * 64}, planned(tensors))

    def seal(hashes: Any) -> dict[str, str]:
        return {"edgelm.sha256": hashlib.sha256("".join(hashes.values()).encode()).hexdigest()}

    write(tmp_path / "whole.gguf", layout, by_rows(tensors), seal=seal)
    asked: list[str] = []

    def stopping(tensor: Planned) -> Iterator[NDArray[np.uint8]]:
        asked.append(tensor.name)
        for row in tensors[tensor.name].data:
            yield row
            if len(asked) == when:
                raise Stop

    if when:
        with pytest.raises(Stop):
            write(path, layout, stopping, seal=seal)
        assert not path.exists()
    again: list[str] = []

    def counting(tensor: Planned) -> Iterator[NDArray[np.uint8]]:
        again.append(tensor.name)
        yield from tensors[tensor.name].data

    write(path, layout, counting, seal=seal)
    assert again == list(tensors)[max(0, when - 1) :]
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert (
        gguf.read(path).metadata["edgelm.sha256"]
        == seal({n: hashlib.sha256(t.data.tobytes()).hexdigest() for n, t in tensors.items()})["edgelm.sha256"]
    )


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "torn journal", "other fingerprint", "no part"])
def test_only_what_is_true_is_kept(tmp_path: Path, damage: str) -> None:
    tensors, path = weights(), tmp_path / "file.gguf"
    layout = Layout(KEYS, planned(tensors))
    write(tmp_path / "whole.gguf", layout, by_rows(tensors))

    def stopping(tensor: Planned) -> Iterator[NDArray[np.uint8]]:
        if tensor.name == "e.bias":
            raise Stop
        yield from tensors[tensor.name].data

    with pytest.raises(Stop):
        write(path, layout, stopping)
    part, journal = tmp_path / "file.gguf.part", tmp_path / "file.gguf.part.journal"
    if damage == "flipped bit":
        data = bytearray(part.read_bytes())
        data[layout.offsets[1]] ^= 1
        part.write_bytes(data)
    elif damage == "cut short":
        os.truncate(part, layout.offsets[1] + 3)
    elif damage == "torn journal":
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]) + b'{"tensor": "b.we')
    elif damage == "no part":
        part.unlink()
    again: list[str] = []

    def counting(tensor: Planned) -> Iterator[NDArray[np.uint8]]:
        again.append(tensor.name)
        yield from tensors[tensor.name].data

    write(path, layout, counting, fingerprint="new" if damage == "other fingerprint" else "")
    assert again == list(tensors)[0 if damage in ("other fingerprint", "no part") else 1 :]
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_disk_without_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "SPARE_DISK", 1 << 60)
    with pytest.raises(OSError, match="make room and give the same command again") as caught:
        write(tmp_path / "file.gguf", Layout(KEYS, planned(weights())), by_rows(weights()))
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the error comes from the same call to write."""
    program = f"""
import errno, os, resource, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_gguf_writer import KEYS, Layout, by_rows, planned, weights, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tensors, path = weights(), Path({str(tmp_path / "file.gguf")!r})
layout = Layout(KEYS, planned(tensors))
resource.setrlimit(resource.RLIMIT_FSIZE, (layout.offsets[3] + 40, resource.RLIM_INFINITY))
try:
    write(path, layout, by_rows(tensors))
except OSError as error:
    assert error.errno == errno.EFBIG and not path.exists()
    sys.exit(7)
"""
    if os.name != "posix":
        pytest.skip("this system has no limit on the size of files")
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    tensors = weights()
    layout = Layout(KEYS, planned(tensors))
    write(tmp_path / "whole.gguf", layout, by_rows(tensors))
    write(tmp_path / "file.gguf", layout, by_rows(tensors))
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("kill -9 is of POSIX")
    program = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_gguf_writer import KEYS, Layout, planned, weights, write
tensors = weights()
def contents(tensor):
    for row in tensors[tensor.name].data:
        time.sleep(0.004)
        yield row
print("go", flush=True)
write(Path({str(tmp_path / "file.gguf")!r}), Layout(KEYS, planned(tensors)), contents)
"""
    rng = np.random.default_rng(5)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.uniform(0, 0.06))
            child.send_signal(signal.SIGKILL)
    tensors = weights()
    layout = Layout(KEYS, planned(tensors))
    write(tmp_path / "file.gguf", layout, by_rows(tensors))
    write(tmp_path / "whole.gguf", layout, by_rows(tensors))
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
