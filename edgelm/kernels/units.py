"""How a format's bits lie in memory once 16 rows stand side by side: the facts. `blocks` has the code.

A packed matrix is a sequence of groups of 16 rows. A group is a sequence of units of `blocks` blocks of 32 inputs:
first the scales of the unit, lane by lane, then for each block its quants. Quants of p bits take p vectors of 64 bytes
for the eight *chunks* of a block, a chunk being four neighbouring inputs of each of the 16 rows: row r in lane r of 32
bits. A byte has as many whole quants as fit in its lower bits: bit field k of vector v is of chunk v + p * k. What is
left at the top of the bytes, vector after vector, has the bits of the last chunks, one after the other (`Unit.fields`).
Zero bytes are zero weights in every format, so what pads needs no care.

Apart from the code, so that a start, whose kernels are compiled already, imports nothing that writes code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from edgelm.formats import TQ2_0, by_name
from edgelm.formats.codebooks import E2M1_TWICE, IQ4_LEVELS, LEVELED, Leveled

ROWS = 16  # of a group


class Field(NamedTuple):
    """Bits from bit `at` on of the bytes of a vector: those of a quant from bit `to` on."""

    vector: int
    at: int
    to: int
    bits: int


@dataclass(frozen=True)
class Unit:
    """A weight format, packed.

    header: bytes before the quants of a unit; blocks: blocks of 32 inputs in a unit; stored: bits of a quant; bits: of
    a weight as the kernels see it; zero: whether 2 ** (bits - 1) stands for zero; halves: 2 when each 16 inputs have a
    scale of their own; minimum: whether there is something to add to each weight; table: values that quants are
    indices of; file_blocks, file_bytes: a block in the file; source: what `transcode` makes of such a block, whose
    bytes then count, where kernels cannot pack it.
    """

    name: str
    file_bytes: int
    file_blocks: int
    header: int
    blocks: int = 8
    stored: int = 4
    bits: int = 4
    zero: bool = True
    halves: int = 1
    minimum: bool = False
    table: tuple[int, ...] | None = None
    source: np.dtype[Any] | None = None

    @property
    def quant_bytes(self) -> int:
        """Bytes of the quants of a block."""
        return 64 * self.stored

    @property
    def unit_bytes(self) -> int:
        return self.header + self.blocks * self.quant_bytes

    @property
    def fields(self) -> list[list[Field]]:
        """Where the bits of each chunk's quants are."""
        n = self.stored
        chunks = [[Field(v, n * k, 0, n)] for k in range(8 // n) for v in range(n)]
        left = [(v, at) for v in range(n) for at in range(8 // n * n, 8)]
        for start in range(0, len(left), n):
            bits = list(enumerate(left[start : start + n]))
            runs = [list(run) for _, run in groupby(bits, lambda bit: bit[1][0])]
            chunks.append([Field(*run[0][1], run[0][0], len(run)) for run in runs])
        return chunks


def _of_file(name: str, source: np.dtype[Any] | None = None, **facts: Any) -> Unit:
    """The unit of a format that files have."""
    format = by_name(name)
    n_bytes = format.n_bytes if source is None else source.itemsize
    return Unit(name, n_bytes, format.block // 32, source=source, **facts)


def _of_levels(format: type[Leveled]) -> Unit:
    """Points of a codebook have a number for each level: in three or four bits, with its sign."""
    groups, n = format.groups, len(format.values)
    few = n <= 8
    return _of_file(
        format.__name__,
        source=np.dtype([("d", "<f4"), ("scales", "i1", groups), ("numbers", "u1", 256)]),
        header=64 + ROWS * groups,
        stored=3 if few else 4,
        bits=8,
        halves=groups // 8,
        table=format.values + (0,) * ((8 if few else 16) - n),
    )


_LEVELS, _E2M1 = (tuple(table.astype(int).tolist()) for table in (IQ4_LEVELS, E2M1_TWICE))

UNITS = {
    unit.name: unit
    for unit in (
        _of_file("Q8_0", header=64, blocks=2, stored=8, bits=8),
        _of_file("Q4_0", header=64, blocks=2),
        _of_file("Q4_1", header=64, blocks=1, zero=False, minimum=True),
        _of_file("Q5_0", header=64, blocks=2, stored=5, bits=5),
        _of_file("Q5_1", header=64, blocks=1, stored=5, bits=5, zero=False, minimum=True),
        _of_file("Q4_K", header=256, zero=False, minimum=True),
        _of_file("Q5_K", header=256, stored=5, bits=5, zero=False, minimum=True),
        _of_file("Q6_K", header=320, stored=6, bits=6, halves=2),
        _of_file("Q3_K", header=320, stored=3, bits=3, halves=2),
        _of_file("Q2_K", header=320, stored=2, bits=2, zero=False, halves=2, minimum=True),
        _of_file("IQ4_NL", header=64, blocks=2, bits=8, table=_LEVELS),
        _of_file("IQ4_XS", header=192, bits=8, table=_LEVELS),
        _of_file("MXFP4", header=32, blocks=2, bits=8, table=_E2M1),
        _of_file("Q8_1", header=64, blocks=2, stored=8, bits=8),
        _of_file("Q8_K", header=64, stored=8, bits=8),
        _of_file("Q1_0", header=32, blocks=4, stored=1, bits=8, table=(-1, 1)),
        _of_file("Q2_0", header=32, blocks=2, stored=2, bits=2),
        _of_file("TQ2_0", header=32, stored=2, bits=2),
        _of_file("TQ1_0", header=32, stored=2, bits=2, source=TQ2_0.layout),
        _of_file("NVFP4", header=64, blocks=2, bits=8, halves=2, table=_E2M1),
        *(_of_levels(format) for format in LEVELED),
    )
}
