"""Object files without LLVM: the same code as LLVM's loader makes of them, and nothing but that or `Unknown`."""

from __future__ import annotations

import ctypes
import random
import re

import pytest

from edgelm.kernels import compiler, elf, processor, sources

pytestmark = pytest.mark.skipif(not elf.USABLE, reason="objects are loaded by LLVM here")
SOME = ["walk:run", "packing_kernels:pack_q4_k", "linear_kernels:linear_q4_0", "sampling_wide_kernels:choose"]
NAME = re.compile(r"edgelm\.kernels\.(\w+)\.(\w+)\.([0-9a-f]{16})\.o")


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    """Object files by symbol: of `SOME`, and of what else there is in the cache of today's sources."""
    compiler.compile_all(SOME)
    found = {}
    for file in (compiler.cache_dir() / compiler.compiled_for().folder).iterdir():
        name = NAME.fullmatch(file.name)
        if name and name[3] == sources.digest(compiler._file_of(f"edgelm.kernels.{name[1]}")):
            code = compiler._read(file)
            if code is not None:
                found[file.name.removesuffix(".o")] = code
    assert len(found) >= len(SOME)
    return found


def loaded(code: bytes, symbol: str, entry: int) -> dict[int, bytes]:
    """Sections by number as they lie in memory, with zeros where addresses were filled in; each address that was leads
    to a section, or outside."""
    sections, symbols = elf._sections(code), elf._symbols(code, elf._sections(code))
    [own] = [s for s in symbols if s.name == symbol]
    places, found, todo = {own.section: entry - own.value}, dict[int, bytes](), [own.section]
    while todo:
        at = todo.pop()
        memory = bytearray(ctypes.string_at(places[at], sections[at].size))
        tables = [elf._bytes(code, s) for s in sections if s.type == elf._RELOCATIONS and s.info == at]
        for offset, _, number, addend in (r for table in tables for r in elf._RELOCATION.iter_unpack(table)):
            target, address = symbols[number], int.from_bytes(memory[offset : offset + 8], "little")
            memory[offset : offset + 8] = bytes(8)
            if target.section:
                place = address - addend - target.value
                if target.section not in places:
                    todo.append(target.section)
                assert places.setdefault(target.section, place) == place
            else:
                assert address  # which library has the function may differ: Numba, if it is there, names some to LLVM
        found[at] = bytes(memory)
    return found


def test_the_same_as_llvm_makes(objects: dict[str, bytes]) -> None:
    engine, outside = compiler._engine(), 0
    for symbol, code in objects.items():
        engine.add_object_file(processor.llvm().ObjectFileRef.from_data(code))
        engine.finalize_object()
        ours = loaded(code, symbol, elf.load(code, symbol))
        assert ours == loaded(code, symbol, engine.get_function_address(symbol)), symbol
        outside += any(not s.section and s.name for s in elf._symbols(code, elf._sections(code)))
    assert outside  # some call the C library


def test_damaged_objects_are_unknown(objects: dict[str, bytes]) -> None:
    """Whatever is changed in an object: it is refused, or loaded, and never written outside its own memory."""
    [(symbol, whole)] = [(name, code) for name, code in objects.items() if ".pack_q4_k." in name]
    for n in (0, 3, 63, 64, 200, len(whole) // 2, len(whole) - 1):
        with pytest.raises(elf.Unknown):
            elf.load(whole[:n], symbol)
    with pytest.raises(elf.Unknown, match="no object"):
        elf.load(whole, "another")
    chance, refused = random.Random(5), 0
    text = next(s for s in elf._sections(whole) if s.flags & elf._CODE and s.size)
    rest = [i for i in range(len(whole)) if not text.offset <= i < text.offset + text.size]
    for _ in range(1500):
        code = bytearray(whole)
        for i in chance.choices([*range(64), *rest], k=chance.randint(1, 4)):
            code[i] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, code[i] ^ 1 << chance.randrange(8)))
        try:
            elf.load(bytes(code), symbol)
        except (elf.Unknown, OSError):
            refused += 1
    assert refused > 300


def test_code_is_not_writable(objects: dict[str, bytes]) -> None:
    symbol, code = next(iter(objects.items()))
    address = elf.load(code, symbol)
    with open("/proc/self/maps") as maps:
        spans = [line.split()[:2] for line in maps]
    [rights] = [r for span, r in spans for a, b in [span.split("-")] if int(a, 16) <= address < int(b, 16)]
    assert rights == "r-xp"
