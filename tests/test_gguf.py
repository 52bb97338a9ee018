"""The GGUF reader: right on good files (by the gguf package's reader), and never more than an error on bad ones."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from blocks import random_blocks
from hostile import build
from hostile.build import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    gguf_file,
    key,
    llama,
)
from hostile.cases import CASES, CONTAINER, GOOD, GOOD_KEYS, MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm import gguf
from edgelm.errors import FormatError, SourceError, UnsupportedError
from edgelm.formats import FORMATS, QTensor

UNSUPPORTED = {
    "version_1", "version_future", "version_byte_swapped", "array_of_arrays", "array_nested_2000_deep", "type_removed",
    "type_43", "type_2^32",
}  # fmt: skip
Read = Callable[..., gguf.GGUF]


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Read]:
    """Writes bytes into a file and reads it."""

    def write_and_read(data: bytes, name: str = "model.gguf") -> gguf.GGUF:
        (tmp_path / name).write_bytes(data)
        return gguf.read(tmp_path / name)

    yield write_and_read


def use(model: gguf.GGUF) -> None:
    """Everything that is in there, once: nothing of it may fail, whatever the bytes were."""
    for tensor in model.tensors.values():
        assert tensor.dequantize().shape == tensor.shape
        assert tensor.n_bytes == len(tensor.data) * tensor.format.row_bytes(tensor.shape[-1]) <= model.n_bytes
    for name, content in model.metadata.items():
        assert name and isinstance(content, (bool, int, float, str, list, np.ndarray))
        if isinstance(content, np.ndarray):
            assert content.ndim == 1 and not content.flags.writeable and content.dtype.isnative
        str(content).encode()


# ----------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", CONTAINER)
def test_hostile_file(name: str, read: Read, tmp_path: Path) -> None:
    data = CONTAINER[name]()
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedError if name in UNSUPPORTED else FormatError) as caught:
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(tmp_path) in message and len(message) < 400 + len(str(tmp_path)) and message.isprintable()


@pytest.mark.parametrize("name", MODEL)
def test_files_that_are_hostile_to_a_model_are_well_formed(name: str, read: Read) -> None:
    use(read(MODEL[name]()))


def test_names_of_hostile_files_are_unique() -> None:
    assert len(CASES) == len(CONTAINER) + len(MODEL) > 200


def small_file() -> bytes:
    """Every kind of value, and tensors of several types: 700 bytes."""
    return gguf_file(
        [
            *GOOD_KEYS,
            key("a.u8", U8, 7),
            key("a.i16", I16, -7),
            key("a.u64", U64, 1 << 60),
            key("a.f32", F32, 1.5),
            key("a.f64", F64, 2.5),
            key("a.bool", BOOL, 1),
            key("a.strings", ARRAY, (STRING, ["a", "", "größer", "ab"])),
            key("a.numbers", ARRAY, (I32, [1, -2, 3])),
            key("a.bools", ARRAY, (BOOL, [1, 0])),
            key("general.alignment", U32, 16),
        ],
        [GOOD, Tensor("q", (32, 2), build.Q8_0_TYPE, bytes(range(68))), Tensor("h", (3,), build.F16_TYPE, b"123456")],
        alignment=16,
    )


def test_every_truncation(read: Read) -> None:
    data = small_file()
    use(read(data))
    for n in range(len(data)):
        with pytest.raises(FormatError):
            read(data[:n])


def test_truncations_of_a_model(read: Read) -> None:
    data = llama()
    for n in np.linspace(0, len(data) - 1, 200, dtype=int):
        with pytest.raises(FormatError):
            read(data[:n])


def test_ten_thousand_byte_flips(tmp_path: Path) -> None:
    """Each gives an error of ours, or a file that can be used."""
    original, rng, path, n_accepted = small_file(), random.Random(1), tmp_path / "flipped.gguf", 0
    path.write_bytes(original)
    with path.open("r+b", buffering=0) as file:
        for _ in range(10_000):
            at = rng.randrange(len(original))
            file.seek(at)
            file.write(bytes([original[at] ^ rng.randrange(1, 256)]))
            try:
                use(gguf.read(path))
                n_accepted += 1
            except (FormatError, UnsupportedError):
                pass
            file.seek(at)
            file.write(original[at : at + 1])
    assert path.read_bytes() == original
    assert 2_000 < n_accepted < 8_000  # flips in weights and in values make other files, not broken ones


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit(read: Read, data: st.DataObject) -> None:
    """Bytes replaced, removed or inserted, numbers of eight bytes overwritten with extreme ones."""
    content = bytearray(small_file())
    for _ in range(data.draw(st.integers(1, 4))):
        at, n = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 16))
        extreme = st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]).map(
            lambda x: struct.pack("<Q", x)
        )
        content[at : at + n] = data.draw(st.binary(max_size=16) | extreme)
    with contextlib.suppress(FormatError, UnsupportedError):
        use(read(bytes(content)))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_behind_a_right_beginning(read: Read, tail: bytes) -> None:
    with contextlib.suppress(FormatError, UnsupportedError):
        use(read(struct.pack("<4sIQQ", b"GGUF", 3, 1, 2) + tail))


def test_limits_on_counts(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    read(llama())
    for limit, value in {
        "MAX_STRINGS": 100,
        "MAX_KEYS": 3,
        "MAX_TENSORS": 3,
        "MAX_STRING_BYTES": 2,
        "MAX_ARRAY_BYTES": 64,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(gguf, limit, value)
            with pytest.raises(FormatError):
                read(llama())


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path, tmp_path / "a\0b.gguf", tmp_path / ("x" * 5000)):
        with pytest.raises(SourceError):
            gguf.read(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(SourceError, match="not a file"):
            gguf.read(tmp_path / "pipe.gguf")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "secret.gguf").write_bytes(small_file())
    (tmp_path / "secret.gguf").chmod(stat.S_IWUSR)
    with pytest.raises(SourceError):
        gguf.read(tmp_path / "secret.gguf")


# ---------------------------------------------------------------------------------------------------------- good files


def test_every_kind_of_value(read: Read) -> None:
    contents: dict[str, tuple[int, Any]] = {
        "u8": (U8, 255), "i8": (I8, -128), "u16": (U16, 65535), "i16": (I16, -32768), "u32": (U32, 2**32 - 1),
        "i32": (I32, -(2**31)), "f32": (F32, 0.5), "bool": (BOOL, True), "string": (STRING, "naïve 中文 \0 🦙"),
        "u64": (U64, 2**64 - 1), "i64": (I64, -(2**63)), "f64": (F64, 0.1), "empty": (STRING, ""),
    }  # fmt: skip
    arrays: dict[str, tuple[int, list[Any]]] = {
        "strings": (STRING, ["a", "", "中", "a" * 1000]), "no strings": (STRING, []), "bools": (BOOL, [True, False]),
        "no numbers": (I32, []), "bytes": (U8, [1, 255]), "words": (U64, [2**64 - 1]), "reals": (F64, [0.1, -0.1]),
    }  # fmt: skip
    file = [key(f"x.{name}", *content) for name, content in contents.items()]
    model = read(gguf_file([*file, *(key(f"x.{name}", ARRAY, content) for name, content in arrays.items())]))
    for name, (_, content) in contents.items():
        got = model.metadata[f"x.{name}"]
        assert got == content and type(got) is type(content)
    for name, (kind, items) in arrays.items():
        got = model.metadata[f"x.{name}"]
        assert list(got) == items and isinstance(got, list) == (kind == STRING)
    assert model.metadata["x.bools"].dtype == np.bool_ and model.metadata["x.reals"].dtype == np.float64
    use(model)


@given(
    st.lists(st.text(st.sampled_from("a\0é中🦙"), max_size=4) | st.integers(0, 70_000).map("x".__mul__), max_size=40),
    st.lists(st.integers(0, 2000), max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_strings_read_many_at_once_are_those_that_were_written(read: Read, odd: list[str], places: list[int]) -> None:
    """Plain ones are told by their lengths alone; between them nulls, none, several bytes, texts of 64 KB."""
    items = [f"word {i}" for i in range(2000)]
    for place in places:
        items[place:place] = odd
    model = read(gguf_file([key("x.strings", ARRAY, (STRING, items)), key("x.after", U32, 7)]))
    assert model.metadata["x.strings"] == items
    assert model.metadata["x.after"] == 7


@pytest.mark.parametrize("at", [0, 1000, 1999])
@pytest.mark.parametrize("damage", [b"\xff", b"\xc3"])
def test_a_string_among_many_that_is_not_utf8_is_found(read: Read, at: int, damage: bytes) -> None:
    data = gguf_file([key("x.strings", ARRAY, (STRING, [f"word {i:04}" for i in range(2000)]))])
    start = data.index(f"word {at:04}".encode()) + 8
    with pytest.raises(FormatError, match=f"at offset {start - 8} that is not valid UTF-8"):
        read(data[:start] + damage + data[start + 1 :])


def test_odd_but_right(read: Read) -> None:
    assert not read(gguf_file()).tensors
    assert read(gguf_file(GOOD_KEYS, [GOOD], version=2)).version == 2
    assert read(gguf_file(GOOD_KEYS, [GOOD], cut=-77)).tensors["good.weight"].dequantize()[1, 3] == 7
    far = [
        Tensor("b", (2,), 0, bytes(256) + struct.pack("<2f", 1, 2), offset=256),
        Tensor("a", (2,), 0, b"", offset=64),
    ]
    model = read(gguf_file([], far))  # out of order, and with gaps between
    assert list(model.tensors) == ["b", "a"] and model.tensors["b"].dequantize().tolist() == [1, 2]
    scalar = read(gguf_file([], [Tensor("s", (), 0, struct.pack("<f", 3))])).tensors["s"]
    assert scalar.shape == (1,) and scalar.dequantize() == [3]
    for alignment in (8, 64, 4096):
        aligned = gguf_file(
            [key("general.alignment", U32, alignment)], [GOOD, Tensor("t", (2,), 0, bytes(8))], alignment=alignment
        )
        assert read(aligned).tensors["good.weight"].dequantize().ravel().tolist() == list(range(8))


def assert_equals_oracle(model: gguf.GGUF, path: Path) -> None:
    reader = oracle.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(model.metadata)
    for name, field in fields.items():
        ours, theirs = model.metadata[name], field.contents()
        assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == theirs, name
    assert [t.name for t in reader.tensors] == list(model.tensors)
    for theirs in reader.tensors:
        ours = model.tensors[theirs.name]
        assert (ours.format.id, ours.shape) == (theirs.tensor_type, tuple(reversed(theirs.shape.tolist())))
        assert np.array_equal(ours.data.reshape(-1), theirs.data.view(np.uint8).reshape(-1))
        assert not ours.data.flags.writeable and not ours.data.flags.owndata


names = st.text(st.characters(categories=["L", "N"], include_characters="._-"), min_size=1, max_size=20)
scalars = st.booleans() | st.integers(-(2**31), 2**31 - 1) | st.text(max_size=20) | st.floats(allow_nan=False, width=32)
lists = st.lists(st.text(max_size=9), min_size=1, max_size=9) | st.lists(
    st.integers(-99, 2**31 - 1), min_size=1, max_size=9
)


@given(
    metadata=st.dictionaries(names.map(lambda name: "x." + name), scalars | lists, max_size=8),
    types=st.lists(st.sampled_from([t for t in oracle.GGMLQuantizationType if t.name != "Q8_1"]), max_size=4),
    dims=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    alignment=st.sampled_from([8, 32, 128]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_written_by_the_gguf_package(
    tmp_path: Path, metadata: dict[str, Any], types: list[oracle.GGMLQuantizationType], dims: list[int], alignment: int
) -> None:
    writer = oracle.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for name, content in metadata.items():
        kind = oracle.GGUFValueType.get_type(content)
        writer.add_key_value(name, content, kind)
    for i, type in enumerate(types):
        format = FORMATS[type]
        n_blocks = int(np.prod(dims))
        data = random_blocks(format, n_blocks, np.random.default_rng(i)).view(np.uint8)
        writer.add_tensor(f"t{i}", data.reshape(*dims[:-1], -1), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = gguf.read(tmp_path / "model.gguf")
    assert_equals_oracle(model, tmp_path / "model.gguf")
    use(model)


def test_real_model_equals_the_oracle(smollm2_path: Path) -> None:
    assert_equals_oracle(gguf.read(smollm2_path), smollm2_path)


def test_large_vocabulary_is_read_whole(read: Read) -> None:
    """151,936 tokens and as many merges, as Qwen has."""
    rng = random.Random(0)
    tokens = ["".join(rng.choices("abcdefgĠĊéü中文", k=rng.randint(1, 12))) for _ in range(151_936)]
    merges = [f"{a} {b}" for a, b in zip(tokens, reversed(tokens), strict=True)]
    model = read(gguf_file([key("t", ARRAY, (STRING, tokens)), key("m", ARRAY, (STRING, merges))]))
    assert model.metadata["t"] == tokens and model.metadata["m"] == merges


def test_weights_stay_on_disk(tmp_path: Path) -> None:
    """A tensor of 8 GB (a hole in the file) opens at once, and one row of it can be read."""
    n_rows, path = 1 << 15, tmp_path / "large.gguf"
    path.write_bytes(gguf_file([], [Tensor("w", (1 << 16, n_rows), 0, struct.pack("<f", 5))]))
    os.truncate(path, path.stat().st_size + 4 * n_rows * (1 << 16) - 4)
    tracemalloc.start()
    try:
        w = gguf.read(path).tensors["w"]
        assert w.rows([n_rows - 1, 0])[:, 0].tolist() == [0, 5]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------- split files


def part(number: int, count: int, *tensors: Tensor, n_tensors: int = 3, keys: tuple[bytes, ...] = ()) -> bytes:
    split = (key("split.no", U16, number), key("split.count", U16, count), key("split.tensors.count", I32, n_tensors))
    return gguf_file([*split, *keys], tensors)


def weight(name: str, value: float) -> Tensor:
    return Tensor(name, (2,), 0, struct.pack("<2f", value, value))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(
        part(0, 3, weight("a", 1), keys=(key("general.name", STRING, "whole"),))
    )
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(part(1, 3, weight("b", 2)))
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(part(2, 3, weight("c", 3)))
    return tmp_path


@pytest.mark.parametrize("number", [1, 2, 3])
def test_split_model_from_any_part(parts: Path, number: int) -> None:
    model = gguf.read(parts / f"m-0000{number}-of-00003.gguf")
    assert [(name, w.dequantize()[0]) for name, w in model.tensors.items()] == [("a", 1), ("b", 2), ("c", 3)]
    assert model.metadata["general.name"] == "whole" and len(model.paths) == 3
    assert model.n_bytes == sum(path.stat().st_size for path in model.paths)


@pytest.mark.parametrize(
    ("replaced", "by", "error"),
    [
        ("m-00002-of-00003.gguf", None, SourceError),
        ("m-00002-of-00003.gguf", part(1, 4, weight("b", 2)), FormatError),
        ("m-00002-of-00003.gguf", part(2, 3, weight("b", 2)), FormatError),
        ("m-00002-of-00003.gguf", part(1, 3, weight("a", 2)), FormatError),
        ("m-00002-of-00003.gguf", part(1, 3), FormatError),
        ("m-00002-of-00003.gguf", gguf_file([], [weight("b", 2)]), FormatError),
        ("m-00002-of-00003.gguf", b"GGUF", FormatError),
        ("m-00001-of-00003.gguf", part(0, 3, weight("a", 2), n_tensors=2), FormatError),
    ],
)
def test_broken_split(parts: Path, replaced: str, by: bytes | None, error: type[Exception]) -> None:
    (parts / replaced).unlink()
    if by is not None:
        (parts / replaced).write_bytes(by)
    with pytest.raises(error, match="m-0000"):
        gguf.read(parts / "m-00001-of-00003.gguf")


@pytest.mark.parametrize("name", ["m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-00000.gguf"])
def test_part_that_cannot_be(parts: Path, name: str) -> None:
    with pytest.raises(FormatError, match="cannot be"):
        gguf.read(parts / name)


def test_renamed_part(parts: Path) -> None:
    (parts / "m-00001-of-00003.gguf").rename(parts / "renamed.gguf")
    with pytest.raises(FormatError, match="00001-of-0000N"):
        gguf.read(parts / "renamed.gguf")


def test_a_weight_equals_itself_alone() -> None:
    """QTensor compares by identity: comparing weights would read gigabytes."""
    a, b = (QTensor.from_array("w", np.zeros((2, 2))) for _ in range(2))
    assert a == a and a != b and len({a, b}) == 2


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
def test_what_was_read_can_be_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    values = np.arange(1 << 20, dtype="<f4")
    tensor = Tensor("w", (1 << 20,), 0, values.tobytes())
    path.write_bytes(gguf_file([key("general.architecture", STRING, "x")], [tensor]))
    file = gguf.read(path)

    def resident_kib() -> int:
        """Of the mapping of the file."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        ours = (found for found in lines if found.endswith(str(path)))
        sizes = (next(line for line in lines if line.startswith("Rss:")) for _ in ours)
        return sum(int(line.split()[1]) for line in sizes)

    assert file.tensors["w"].dequantize()[-1] == values[-1]
    assert resident_kib() >= 4096
    file.forget()
    assert resident_kib() < 1024
    assert file.tensors["w"].dequantize()[-1] == values[-1]


def test_weights_can_be_found_in_their_file(tmp_path: Path) -> None:
    """Also when the file has another name by now, or none; descriptors are closed with the mapping."""
    path = tmp_path / "m.gguf"
    path.write_bytes(llama())
    open_before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    file = gguf.read(path)
    if os.name == "posix":
        path.rename(tmp_path / "other.gguf")
        path.write_bytes(b"something else")
    for tensor in file.tensors.values():
        found = file.find(tensor.data[1:])
        assert found is not None
        with os.fdopen(os.dup(found[0]), "rb") as same:
            same.seek(found[1])
            assert same.read(tensor.data[1:].nbytes) == tensor.data[1:].tobytes()
    assert file.find(np.zeros((2, 2), np.uint8)) is None
    del file, tensor
    if open_before:
        assert set(os.listdir("/proc/self/fd")) == open_before
