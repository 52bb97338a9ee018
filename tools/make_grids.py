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

TARGET = Path(__file__).parent.parent / "edgelm" / "formats" / "grids.py"  # its last statement is written again


def main() -> None:
    head, table, _ = TARGET.read_text().partition("_GRIDS: dict[str, tuple[tuple[int, ...], int, str]] = {\n")
    text = head + table
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
