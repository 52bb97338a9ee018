"""The metadata of a GGUF file in its very bytes, so that a copy keeps the types that its writer chose.

`edgelm.gguf` reads values and forgets whether a number was a uint32 or an int64; other loaders insist on it. It has
proven the file before this module walks over it.
"""

from __future__ import annotations

import struct
from pathlib import Path

from .gguf_writer import Typed
from .safetensors_file import open_map

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def typed(path: Path) -> dict[str, Typed]:
    """Every key of a file that `edgelm.gguf.read` has accepted, in order."""
    data = open_map(path)
    (n_keys,) = struct.unpack_from("<Q", data, 16)
    at, found = 24, {}
    for _ in range(n_keys):
        end = _string_end(data, at)
        key, (kind,) = bytes(data[at + 8 : end]).decode(), struct.unpack_from("<I", data, end)
        at = _value_end(data, end + 4, kind)
        found[key] = Typed(kind, bytes(data[end + 4 : at]))
    return found


def _string_end(data: object, at: int) -> int:
    return at + 8 + int(struct.unpack_from("<Q", data, at)[0])  # type: ignore[arg-type]


def _value_end(data: object, at: int, kind: int) -> int:
    if kind == _STRING:
        return _string_end(data, at)
    if kind != _ARRAY:
        return at + _SIZES[kind]
    of, n = struct.unpack_from("<IQ", data, at)  # type: ignore[arg-type]
    at += 12
    if of != _STRING:
        return at + int(n) * _SIZES[of]
    for _ in range(n):
        at = _string_end(data, at)
    return at
