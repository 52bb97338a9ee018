"""How a format's bits lie in memory once 16 rows stand side by side: the facts. `blocks` has the code.

A packed matrix is a sequence of groups of 16 rows. A group is a sequence of units of `blocks` blocks of 32 inputs:
first the scales of the unit, lane by lane, then for each block its quants as bit planes. A plane of p bits is p vectors
of 64 bytes; bit field k of vector v holds *chunk* v + p * k, a chunk being four neighbouring inputs of each of the 16
rows: row r in lane r of 32 bits. Zero bytes are zero weights in every format, so what pads needs no care.

Apart from the code, so that a start, whose kernels are compiled already, imports nothing that writes code.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = 16  # of a group

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Unit:
    """A weight format, packed.

    header: bytes before the quants of a unit; blocks: blocks of 32 inputs in a unit; planes: (bits, lowest bit of the
    quant that they are) of each bit plane; bits: of a weight as the kernels see it; zero: whether 2 ** (bits - 1)
    stands for zero; halves: 2 when each 16 inputs have a scale of their own; minimum: whether there is something to add
    to each weight; table: values that quants are indices of; file_blocks, file_bytes: a block in the file.
    """

    name: str
    file_bytes: int
    header: int
    file_blocks: int = 1
    blocks: int = 8
    planes: tuple[tuple[int, int], ...] = ((4, 0),)
    bits: int = 4
    zero: bool = True
    halves: int = 1
    minimum: bool = False
    table: tuple[int, ...] | None = None

    @property
    def quant_bytes(self) -> int:
        """Bytes of the quants of a block."""
        return 64 * sum(bits for bits, _ in self.planes)

    @property
    def unit_bytes(self) -> int:
        return self.header + self.blocks * self.quant_bytes


_TWO_BITS, _FIVE_BITS, _EIGHT_BITS = ((2, 0),), ((4, 0), (1, 4)), ((8, 0),)

# INT8 is what formats without kernels of their own become: two float32 scales, then 32 int8 (40 bytes a block).
UNITS = {
    unit.name: unit
    for unit in (
        Unit("Q8_0", file_bytes=34, header=64, blocks=2, planes=_EIGHT_BITS, bits=8),
        Unit("Q4_0", file_bytes=18, header=64, blocks=2),
        Unit("Q4_1", file_bytes=20, header=64, blocks=1, zero=False, minimum=True),
        Unit("Q5_0", file_bytes=22, header=64, blocks=2, planes=_FIVE_BITS, bits=5),
        Unit("Q5_1", file_bytes=24, header=64, blocks=1, planes=_FIVE_BITS, bits=5, zero=False, minimum=True),
        Unit("Q4_K", file_bytes=144, file_blocks=8, header=256, zero=False, minimum=True),
        Unit("Q5_K", file_bytes=176, file_blocks=8, header=256, planes=_FIVE_BITS, bits=5, zero=False, minimum=True),
        Unit("Q6_K", file_bytes=210, file_blocks=8, header=320, planes=((4, 0), (2, 4)), bits=6, halves=2),
        Unit("Q3_K", file_bytes=110, file_blocks=8, header=320, planes=((2, 0), (1, 2)), bits=3, halves=2),
        Unit(
            "Q2_K", file_bytes=84, file_blocks=8, header=320, planes=_TWO_BITS, bits=2, zero=False, halves=2,
            minimum=True,
        ),
        Unit("IQ4_NL", file_bytes=18, header=64, blocks=2, bits=8, table=_IQ4_LEVELS),
        Unit("IQ4_XS", file_bytes=136, file_blocks=8, header=192, bits=8, table=_IQ4_LEVELS),
        Unit("MXFP4", file_bytes=17, header=32, blocks=2, bits=8, table=_E2M1_TWICE),
        Unit("INT8", file_bytes=40, header=128, blocks=1, planes=_EIGHT_BITS, bits=8, halves=2),
    )
}
