"""A saved session: which model it belongs to, its tokens, and their cached keys and values.

Little-endian: magic; uint32 length of a JSON header {"model": fingerprint, "n_tokens": n}; the header; int32 tokens;
uint32 CRC-32 of all that; the sequence as `cache_file` writes it. What is read is hostile until proven otherwise.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from .cache import CachedSequence, SequenceCache
from .disk import replacing
from .errors import FormatError, SourceError

if TYPE_CHECKING:
    from .model import Model

MAGIC = b"edgelm session 1\n"
MAX_HEADER_BYTES = 4096


def save(path: Path, model: Model, tokens: list[int], sequence: CachedSequence) -> None:
    """Writes a session, in place of an older file only when it is complete."""
    header = json.dumps({"model": model.fingerprint, "n_tokens": len(tokens)}).encode()
    head = MAGIC + struct.pack("<I", len(header)) + header + np.asarray(tokens, "<i4").tobytes()
    try:
        with replacing(path) as file:
            file.write(head + struct.pack("<I", zlib.crc32(head)))
            sequence.save(cast(BinaryIO, file))
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror or error}") from error


def load(path: Path, model: Model, cache: SequenceCache) -> tuple[list[int], CachedSequence]:
    """The tokens of a saved session, and a new sequence of `cache` that holds them."""
    try:
        with open(path, "rb") as file:
            tokens = _tokens(path, file, model)
            sequence = cache.load(file, max_length=model.n_ctx)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    if sequence.length != len(tokens):
        sequence.release()
        raise FormatError(f"{path}: {len(tokens)} tokens, but keys and values of {sequence.length}; it is damaged")
    return tokens, sequence


def _tokens(path: Path, file: BinaryIO, model: Model) -> list[int]:
    start = file.read(len(MAGIC) + 4)
    if start[: len(MAGIC)] != MAGIC or len(start) != len(MAGIC) + 4:
        raise FormatError(f"{path} is not a saved session of this version of edgelm")
    n_bytes = struct.unpack("<I", start[len(MAGIC) :])[0]
    header = file.read(n_bytes) if n_bytes <= MAX_HEADER_BYTES else b""
    try:
        facts = json.loads(header)
        fingerprint, n_tokens = facts["model"], facts["n_tokens"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(f"{path}: the header of this saved session is damaged") from None
    if fingerprint != model.fingerprint:
        raise FormatError(
            f"{path} was saved with another model than {model.name}, or with a --ctx-size that takes other RoPE "
            "factors; load that one"
        )
    if not isinstance(n_tokens, int) or not 0 <= n_tokens <= model.n_ctx:
        raise FormatError(f"{path} holds {n_tokens} tokens; the context window has {model.n_ctx}, see --ctx-size")
    data, check = file.read(4 * n_tokens), file.read(4)
    if len(data) != 4 * n_tokens or check != struct.pack("<I", zlib.crc32(start + header + data)):
        raise FormatError(f"{path}: the tokens of this saved session are damaged")
    tokens = np.frombuffer(data, "<i4")
    if n_tokens and (tokens.min() < 0 or tokens.max() >= model.vocab_size):
        raise FormatError(f"{path}: a token outside the vocabulary of {model.vocab_size}")
    return [int(t) for t in tokens]
