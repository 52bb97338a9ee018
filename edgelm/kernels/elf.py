"""Object files of kernels become code in this process without LLVM, whose library would take 30 ms of each start.

A kernel's object is small and needs next to nothing: sections of code and of constants, places in them that want the
address of one of these sections or of a function of the C library, and one public name. That is so on Linux on x86-64,
where addresses of all 64 bits are compiled for. Whatever else an object may have is `Unknown` here, and left to LLVM.

Objects come from the user's cache and are executed: as elsewhere, whoever can write there can run code. What is checked
is that they are of this kind, and that nothing is written outside the memory that is taken for them.

Source: System V Application Binary Interface, its ELF-64 and AMD64 supplements.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import struct
import sys
from typing import Any, NamedTuple

USABLE = sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 1 << 32

_HEADER = struct.Struct("<4s4B8x2HIQQQI6H")
_SECTION = struct.Struct("<2I4Q2I2Q")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QIIq")
_LITTLE_64 = (2, 1, 1, 0)  # 64 bits, little endian, version 1, System V
_RELOCATABLE, _X86_64 = 1, 62
_PROGRAM, _SYMBOLS, _RELOCATIONS, _EMPTY = 1, 2, 4, 8  # types of sections; empty: zeroed memory without bytes
_WRITABLE, _LOADED, _CODE = 1, 2, 4  # flags of sections
_OUTSIDE = 0  # instead of the number of the section that a symbol is in
_ADDRESS_64 = 1  # type of a relocation: symbol + addend, absolute


class Unknown(Exception):
    """An object with something in it that this module does not know."""


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


def load(code: bytes, symbol: str) -> int:
    """Address of the function `symbol` of an object file. It stays to the end of the process: threads may be in it.

    Raises:
        Unknown: the object needs more than this module can do, or is damaged.
        OSError: there is no memory for it, or none that may be executed.
    """
    try:
        sections = _sections(code)
        symbols = _symbols(code, sections)
        places, boundary, size = _places(sections)
        parts = {place: _bytes(code, sections[i]) for i, place in places.items()}
        base, image = _memory(size), bytearray(size)
        for place, part in parts.items():
            image[place : place + len(part)] = part
        addresses = [_address(s, sections, places, base) for s in symbols]
        for section in sections:
            if section.type == _RELOCATIONS and section.info in places:
                _relocate(image, _bytes(code, section), places[section.info], sections[section.info].size, addresses)
        entry = addresses[[s.name for s in symbols].index(symbol)]
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise Unknown(f"no object file of a kernel: {error}") from error
    if entry is None or entry < base + boundary:
        raise Unknown(f"{symbol} is no function of the object")
    ctypes.memmove(base, bytes(image), size)
    _protect(base, boundary, mmap.PROT_READ)
    _protect(base + boundary, size - boundary, mmap.PROT_READ | mmap.PROT_EXEC)
    return entry


def _sections(code: bytes) -> list[_Section]:
    magic, *kind, type_, machine, _, _, _, start, _, _, _, _, size, n, _ = _HEADER.unpack_from(code)
    if magic != b"\x7fELF" or tuple(kind) != _LITTLE_64 or (type_, machine) != (_RELOCATABLE, _X86_64):
        raise Unknown("no object file for x86-64")
    if size != _SECTION.size:
        raise Unknown(f"sections are described in {size} bytes")
    return [_Section(*_SECTION.unpack_from(code, start + i * size)) for i in range(n)]


def _bytes(code: bytes, section: _Section) -> bytes:
    found = code[section.offset : section.offset + section.size]
    if len(found) != section.size:
        raise Unknown("a section is cut short")
    return found


def _symbols(code: bytes, sections: list[_Section]) -> list[_Symbol]:
    [table] = [section for section in sections if section.type == _SYMBOLS]
    names = _bytes(code, sections[table.link])
    return [
        _Symbol(names[name : names.index(0, name)].decode(), section, value)
        for name, _, _, section, value, _ in _SYMBOL.iter_unpack(_bytes(code, table))
    ]


def _places(sections: list[_Section]) -> tuple[dict[int, int], int, int]:
    """Where each loaded section lies: constants, then code on pages of its own, which begin at the second result; and
    bytes in all. Tables for unwinding the stack are left out: a kernel raises nothing."""
    loaded = {i: s for i, s in enumerate(sections) if s.flags & _LOADED and s.type in (_PROGRAM, _EMPTY)}
    if any(s.flags & _WRITABLE or s.type == _EMPTY for s in loaded.values()):
        raise Unknown("an object with variables")
    places: dict[int, int] = {}
    at = boundary = 0
    for is_code in (False, True):
        boundary = at
        for i, section in loaded.items():
            if bool(section.flags & _CODE) == is_code:
                align = max(1, section.align)
                if align > mmap.PAGESIZE or align & (align - 1):
                    raise Unknown(f"a section at multiples of {align} bytes")
                places[i] = at = -(-at // align) * align
                at += section.size
        at = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
    return places, boundary, at


def _address(symbol: _Symbol, sections: list[_Section], places: dict[int, int], base: int) -> int | None:
    """None for what is nowhere: an error only if something refers to it."""
    if symbol.section in places:
        return base + places[symbol.section] + symbol.value if symbol.value <= sections[symbol.section].size else None
    if symbol.section == _OUTSIDE and symbol.name:
        try:
            return ctypes.cast(getattr(_libc(), symbol.name), ctypes.c_void_p).value
        except AttributeError:
            return None
    return None


def _relocate(image: bytearray, relocations: bytes, place: int, size: int, addresses: list[int | None]) -> None:
    for offset, type_, symbol, addend in _RELOCATION.iter_unpack(relocations):
        address = addresses[symbol]
        if type_ != _ADDRESS_64 or address is None or offset + 8 > size:
            raise Unknown(f"a relocation of type {type_}")
        struct.pack_into("<Q", image, place + offset, (address + addend) % (1 << 64))


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long
    libc.mmap.restype = ctypes.c_void_p
    libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return libc


def _memory(size: int) -> int:
    """Address of memory that may be written to. Not a `mmap`, which Python would give back at its end."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"no {size} bytes of memory for code")
    return int(address)


def _protect(address: int, size: int, how: int) -> None:
    """Never writable and executable at once: some systems allow only that."""
    if size and _libc().mprotect(address, size, how):
        raise OSError(ctypes.get_errno(), "memory for code may not be executed")
