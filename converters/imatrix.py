"""Importance matrices: how strongly each input of each linear layer is driven by a text, measured by running the model.

For a layer y = x Wᵀ the error that quantizing W makes in y is, if inputs are taken as uncorrelated, the sum over
columns of mean(x²) times the squared errors of that column: these means are the importances. They are exchanged in
llama.cpp's files, of which there are two forms: GGUF (sums of squares and counts), and an older one (.dat).

Measuring runs the reference interpreter on many chunks of text at once, so that each weight is dequantized once for
thousands of tokens; memory is bounded by the activations of one layer and the weights of one (`chunks`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import gguf
from edgelm.cache import Batch
from edgelm.disk import Progress, replacing
from edgelm.errors import FormatError
from edgelm.formats import F32, QTensor
from edgelm.reference import Reference
from edgelm.weights import Layer

from .chunks import Chunks, Source, chunked, forward, need_numbers, parts
from .gguf_writer import Layout, Planned, write

Floats = NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_LIMIT = 1 << 24  # entries, or characters of a name, beyond which an old file is damaged


@dataclass
class Entry:
    """Of one tensor: sums of squared inputs, float32 (matrices, columns), and of how many rows, float32 (matrices,)."""

    sums: Floats
    counts: Floats

    def means(self) -> Floats:
        """Mean squares (matrices, columns); 1 for a matrix (an expert) that no row of the text went through."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1).astype(np.float32)


@dataclass
class Imatrix:
    """Entries by the name of their tensor; the texts they come from; chunks of `chunk_size` tokens of them."""

    entries: dict[str, Entry] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 512

    def importance(self, name: str) -> Floats | None:
        """Mean squares of the inputs of a tensor: float32 (columns,), or (experts, columns). None if not measured."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        means = entry.means()
        return means[0] if len(means) == 1 else means


# --- files


def read(path: str | Path) -> Imatrix:
    """An imatrix file of either form. FormatError when it is neither, or damaged."""
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(4)
    return _from_gguf(path) if magic == b"GGUF" else _from_dat(path)


def save(path: str | Path, imatrix: Imatrix, form: str | None = None) -> None:
    """Writes an imatrix in the form "gguf" or "dat"; by default "dat" if that is how the name of the file ends."""
    path = Path(path)
    if (form or path.suffix.removeprefix(".")) == "dat":
        with replacing(path) as file:
            file.write(_to_dat(imatrix))
        return
    arrays: dict[str, Floats] = {}
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        arrays[name + _SUMS], arrays[name + _COUNTS] = entry.sums, entry.counts[:, None]
    metadata: dict[str, Any] = {"general.type": "imatrix"}
    if imatrix.datasets:
        metadata["imatrix.datasets"] = list(imatrix.datasets)
    metadata |= {"imatrix.chunk_count": imatrix.n_chunks, "imatrix.chunk_size": imatrix.chunk_size}
    layout = Layout(metadata, [Planned(name, array.shape, F32) for name, array in arrays.items()])
    write(path, layout, lambda tensor: [np.ascontiguousarray(arrays[tensor.name]).view(np.uint8).reshape(-1)])


def _from_gguf(path: Path) -> Imatrix:
    file = gguf.read(path)
    if file.metadata.get("general.type") != "imatrix":
        raise FormatError(f"{path} is a GGUF file, but no imatrix")
    entries: dict[str, Entry] = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(_SUMS):
            continue
        stem = name.removesuffix(_SUMS)
        counts = file.tensors.get(stem + _COUNTS)
        if counts is None or tensor.format is not F32 or counts.format is not F32:
            raise FormatError(f"{path}: {name} has no counts, or is not F32")
        sums = tensor.dequantize().reshape(-1, tensor.shape[-1])
        each = counts.dequantize().reshape(-1)
        entry = Entry(sums, np.repeat(each, len(sums)) if len(each) == 1 else each)
        if len(entry.counts) != len(sums):
            raise FormatError(f"{path}: {name} has {len(sums)} matrices and {len(entry.counts)} counts")
        entries[stem] = entry
    datasets = file.metadata.get("imatrix.datasets", [])
    n_chunks, chunk_size = (int(file.metadata.get(f"imatrix.{key}", 0)) for key in ("chunk_count", "chunk_size"))
    return _proven(path, Imatrix(entries, tuple(str(d) for d in datasets), n_chunks, chunk_size or 512))


def _from_dat(path: Path) -> Imatrix:
    """The old form: for each tensor its name, calls, and mean squares times calls; then chunks and the text's name."""
    data, at = path.read_bytes(), 0

    def take(n: int) -> bytes:
        nonlocal at
        if not 0 <= n <= len(data) - at:
            raise FormatError(f"{path} is no imatrix file, or its end is missing")
        at += n
        return data[at - n : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    n_entries = number()
    if not 0 < n_entries < _LIMIT:
        raise FormatError(f"{path} is no imatrix file")
    entries: dict[str, Entry] = {}
    for _ in range(n_entries):
        name = take(number()).decode(errors="replace")
        n_calls, n_values = number(), number()
        if n_calls < 0 or n_values < 1:
            raise FormatError(f"{path}: the entry of {name!r:.80} is damaged")
        sums = np.frombuffer(take(4 * n_values), "<f4").astype(np.float32)
        entries[name] = Entry(sums[None], np.array([n_calls], np.float32))
    n_chunks, dataset = 0, ""
    if at < len(data):  # files of the first years end here
        n_chunks = number()
        dataset = take(number()).decode(errors="replace")
    return _proven(path, Imatrix(entries, (dataset,) if dataset else (), n_chunks))


def _to_dat(imatrix: Imatrix) -> bytes:
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        n_calls = int(-(-entry.counts.max() // imatrix.chunk_size))
        values = (entry.means() * np.float32(n_calls)).reshape(-1)
        parts += [struct.pack("<i", len(name.encode())), name.encode()]
        parts += [struct.pack("<ii", n_calls, values.size), values.astype("<f4").tobytes()]
    dataset = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
    return b"".join([*parts, struct.pack("<ii", imatrix.n_chunks, len(dataset)), dataset])


def _proven(path: Path, imatrix: Imatrix) -> Imatrix:
    for name, entry in imatrix.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all() and (entry.sums >= 0).all()):
            raise FormatError(f"{path}: the entry of {name!r:.80} holds what is no sum of squares")
    return imatrix


# --- measuring


class Watching(Chunks):
    """Operations that show the inputs of each linear layer to `see` before they go on."""

    def __init__(
        self, runner: Reference, batch: Batch, n_ctx: int, see: Callable[[QTensor, NDArray[Any]], None]
    ) -> None:
        super().__init__(runner, batch, n_ctx)
        self._see = see

    def linear(self, x: NDArray[Any], layer: Layer) -> NDArray[Any]:
        self._see(layer.weight, x)
        return super().linear(x, layer)


def collect(
    source: Source,
    text: str | Sequence[int],
    n_ctx: int = 512,
    chunks: int | None = None,
    progress: Progress | None = None,
    *,
    process_output: bool = False,
    dataset: str = "",
) -> Imatrix:
    """Importances of all linear layers of a model for a text, or tokens, cut into chunks of n_ctx tokens.

    chunks: how many of them; None for all. process_output: also for the matrix that makes logits (under its own name,
    which is that of the embeddings where they are the same). progress: called with ("imatrix", chunks done, chunks).

    Raises:
        UsageError: the text is shorter than one chunk.
        FormatError: the model computes something that is not a number.
    """
    tokens = chunked(source, text, n_ctx, chunks)
    entries: dict[str, Entry] = {}

    def see(weight: QTensor, x: NDArray[Any]) -> None:
        sums = np.einsum("ij,ij->j", x, x).astype(np.float64)
        found = totals.setdefault(weight.name, [np.zeros_like(sums), 0])
        found[0] += sums
        found[1] += len(x)

    totals: dict[str, list[Any]] = {}
    output = source.weights.by_name.get("output.weight", source.weights.by_name["token_embd.weight"])
    done = 0
    for part in parts(source, tokens):
        if progress:
            progress("imatrix", done, len(tokens))
        hidden = forward(source, part, partial(Watching, see=see))
        if process_output:
            see(output, hidden)
        done += len(part)
    if progress:
        progress("imatrix", len(tokens), len(tokens))
    for name, (sums, count) in totals.items():
        need_numbers(name, sums)
        entries[name] = Entry(sums.astype(np.float32)[None], np.array([count], np.float32))
    return Imatrix(entries, (dataset,) if dataset else (), len(tokens), n_ctx)
