"""How a format's bits lie in memory once 16 rows stand side by side: the facts. `blocks` has the code.

A packed matrix is a sequence of groups of 16 rows. A group is a sequence of units of `blocks` blocks of 32 inputs:
first the scales of the unit, lane by lane, then for each block its quants as bit planes. A plane of p bits is p vectors
of 64 bytes; bit field k of vector v holds *chunk* v + p * k, a chunk being four neighbouring inputs of each of the 16
rows: row r in lane r of 32 bits. Zero bytes are zero weights in every format, so what pads needs no care.

Apart from the code, so that a start, whose kernels are compiled already, imports nothing that writes code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelm.formats import TQ2_0, by_name
from edgelm.formats.codebooks import E2M1_TWICE, IQ4_LEVELS, LEVELED, Leveled

ROWS = 16  # of a group


@dataclass(frozen=True)
class Unit:
    """A weight format, packed.

    header: bytes before the quants of a unit; blocks: blocks of 32 inputs in a unit; planes: (bits, lowest bit of the
    quant that they are) of each bit plane; bits: of a weight as the kernels see it; zero: whether 2 ** (bits - 1)
    stands for zero; halves: 2 when each 16 inputs have a scale of their own; minimum: whether there is something to add
    to each weight; table: values that quants are indices of; file_blocks, file_bytes: a block in the file; source: what
    `transcode` makes of such a block, whose bytes then count, where kernels cannot pack it.
    """

    name: str
    file_bytes: int
    file_blocks: int
    header: int
    blocks: int = 8
    planes: tuple[tuple[int, int], ...] = ((4, 0),)
    bits: int = 4
    zero: bool = True
    halves: int = 1
    minimum: bool = False
    table: tuple[int, ...] | None = None
    source: np.dtype[Any] | None = None

    @property
    def quant_bytes(self) -> int:
        """Bytes of the quants of a block."""
        return 64 * sum(bits for bits, _ in self.planes)

    @property
    def unit_bytes(self) -> int:
        return self.header + self.blocks * self.quant_bytes


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
        planes=_THREE_BITS if few else ((4, 0),),
        bits=8,
        halves=groups // 8,
        table=format.values + (0,) * ((8 if few else 16) - n),
    )


_ONE_BIT, _TWO_BITS, _THREE_BITS = ((1, 0),), ((2, 0),), ((2, 0), (1, 2))
_FIVE_BITS, _EIGHT_BITS = ((4, 0), (1, 4)), ((8, 0),)
_LEVELS, _E2M1 = (tuple(table.astype(int).tolist()) for table in (IQ4_LEVELS, E2M1_TWICE))

UNITS = {
    unit.name: unit
    for unit in (
        _of_file("Q8_0", header=64, blocks=2, planes=_EIGHT_BITS, bits=8),
        _of_file("Q4_0", header=64, blocks=2),
        _of_file("Q4_1", header=64, blocks=1, zero=False, minimum=True),
        _of_file("Q5_0", header=64, blocks=2, planes=_FIVE_BITS, bits=5),
        _of_file("Q5_1", header=64, blocks=1, planes=_FIVE_BITS, bits=5, zero=False, minimum=True),
        _of_file("Q4_K", header=256, zero=False, minimum=True),
        _of_file("Q5_K", header=256, planes=_FIVE_BITS, bits=5, zero=False, minimum=True),
        _of_file("Q6_K", header=320, planes=((4, 0), (2, 4)), bits=6, halves=2),
        _of_file("Q3_K", header=320, planes=_THREE_BITS, bits=3, halves=2),
        _of_file("Q2_K", header=320, planes=_TWO_BITS, bits=2, zero=False, halves=2, minimum=True),
        _of_file("IQ4_NL", header=64, blocks=2, bits=8, table=_LEVELS),
        _of_file("IQ4_XS", header=192, bits=8, table=_LEVELS),
        _of_file("MXFP4", header=32, blocks=2, bits=8, table=_E2M1),
        _of_file("Q8_1", header=64, blocks=2, planes=_EIGHT_BITS, bits=8),
        _of_file("Q8_K", header=64, planes=_EIGHT_BITS, bits=8),
        _of_file("Q1_0", header=32, blocks=4, planes=_ONE_BIT, bits=8, table=(-1, 1)),
        _of_file("Q2_0", header=32, blocks=2, planes=_TWO_BITS, bits=2),
        _of_file("TQ2_0", header=32, planes=_TWO_BITS, bits=2),
        _of_file("TQ1_0", header=32, planes=_TWO_BITS, bits=2, source=TQ2_0.layout),
        _of_file("NVFP4", header=64, blocks=2, bits=8, halves=2, table=_E2M1),
        *(_of_levels(format) for format in LEVELED),
    )
}
