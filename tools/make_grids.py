"""Write edgelm/formats/grids.py: the codebooks of the IQ formats, from the tables of the `gguf` package.

    python tools/make_grids.py        # needs `pip install gguf`; edgelm itself does not

A codebook lists points whose coordinates are indices ("digits") into a few magnitudes. In every one of them the points
ascend when the first coordinate is the least significant digit, so a codebook is a set of numbers, and one bit per
possible number stores it: 821 bytes instead of up to 16,384.
"""

from __future__ import annotations

import base64
import textwrap
from pathlib import Path

import numpy as np
from gguf import quants

TARGET = Path(__file__).parent.parent / "edgelm" / "formats" / "grids.py"
HEADER = '''"""The codebooks of the IQ formats: facts of ggml, written by tools/make_grids.py. Do not edit.

Each is a set of points with coordinates from a few `levels`. A point is a number whose digits, first coordinate least
significant, index the levels; the codebook holds, ascending, the numbers whose bit is set (lowest bit of a byte first).
"""

from __future__ import annotations

import base64
from functools import cache

import numpy as np
from numpy.typing import NDArray


@cache
def grid(name: str) -> NDArray[np.float32]:
    """The codebook of a format: float32 (points, coordinates), read-only."""
    levels, n_coordinates, bits = _GRIDS[name]
    numbers = np.flatnonzero(np.unpackbits(np.frombuffer(base64.b85decode(bits), np.uint8), bitorder="little"))
    digits = numbers[:, None] // len(levels) ** np.arange(n_coordinates) % len(levels)
    points: NDArray[np.float32] = np.array(levels, np.float32)[digits]
    points.flags.writeable = False
    return points


_GRIDS: dict[str, tuple[tuple[int, ...], int, str]] = {
'''


def main() -> None:
    text = HEADER
    for quant in (quants.IQ2_XXS, quants.IQ2_XS, quants.IQ2_S, quants.IQ3_XXS, quants.IQ3_S, quants.IQ1_S):
        quant.init_grid()
        levels = tuple(int(level) for level in quant.grid_map)
        points = quant.grid.reshape(quant.grid_shape)
        n_coordinates = points.shape[1]
        numbers = (np.searchsorted(levels, points) * len(levels) ** np.arange(n_coordinates)).sum(axis=1)
        assert (np.diff(numbers) > 0).all(), f"{quant.__name__} does not ascend"
        member = np.zeros(len(levels) ** n_coordinates, np.uint8)
        member[numbers] = 1
        bits = base64.b85encode(np.packbits(member, bitorder="little").tobytes()).decode()
        lines = "\n".join(f'        "{line}"' for line in textwrap.wrap(bits, 108))
        text += f'    "{quant.__name__}": (\n        {levels},\n        {n_coordinates},\n{lines},\n    ),\n'
    TARGET.write_text(text + "}\n")


if __name__ == "__main__":
    main()
