"""A SentencePiece model (tokenizer.model) -> its pieces and switches. A small reader of protocol buffers, bounded.

Fields are those of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto; the encoding is
https://protobuf.dev/programming-guides/encoding/: a tag (field number and kind) before each value.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import FormatError, UnsupportedError

from .safetensors_file import open_map

MAX_BYTES = 1 << 28
MAX_PIECES = 1 << 22
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True)
class Piece:
    """text, score, and kind with SentencePiece's number: 1 normal, 2 unknown, 3 control, 4 user's, 5 unused, 6 byte."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What tokenizer.model says; ids of special tokens are None where it has none."""

    pieces: tuple[Piece, ...]
    is_unigram: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


def read(path: Path) -> SentencePieceModel:
    """The model in a file. FormatError when it is broken; UnsupportedError for models of words or of characters."""
    data = open_map(path)
    if len(data) > MAX_BYTES:
        raise FormatError(f"{path}: {len(data)} bytes are too many for a vocabulary")
    pieces, trainer, normalizer = [], dict[int, int | bytes](), dict[int, int | bytes]()
    try:
        for field, value in _fields(bytes(data)):
            if field == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
                if len(pieces) > MAX_PIECES:
                    raise ValueError(f"more than {MAX_PIECES} pieces")
            elif field in (2, 3) and isinstance(value, bytes):
                (trainer if field == 2 else normalizer).update(_fields(value))
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise FormatError(f"{path}: no SentencePiece model, or a damaged one: {error}") from None
    if not pieces:
        raise FormatError(f"{path}: no SentencePiece model: it has no pieces")
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise UnsupportedError(f"{path}: a SentencePiece model of words or of characters")
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        tuple(pieces),
        kind == _UNIGRAM,
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
        charsmap if isinstance(charsmap, bytes) else b"",
        *(_id(trainer.get(field, default), len(pieces)) for field, default in ((40, 0), (41, 1), (42, 2), (43, -1))),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
        raise ValueError("a piece is not text, score and kind")
    return Piece(text.decode(), struct.unpack("<f", score)[0], kind)


def _id(value: int | bytes, n: int) -> int | None:
    return value if isinstance(value, int) and 0 <= value < n else None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order: whole numbers as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)  # a call less: there are a million
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if kind == 2:
            n_bytes, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
        elif kind in (1, 5):
            n_bytes = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if n_bytes > len(data) - at:
            raise ValueError("it ends too soon")
        yield field, data[at : at + n_bytes]
        at += n_bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")
