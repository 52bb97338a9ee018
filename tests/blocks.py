"""Random blocks of any format, as a file could hold them: finite scales of a sensible size, every other bit random."""

from __future__ import annotations

import numpy as np

from edgelm.formats import Format
from edgelm.formats.format import Blocks


def random_blocks(format: type[Format], n: int, rng: np.random.Generator) -> Blocks:
    """(n,) blocks of `format`."""
    blocks = rng.integers(0, 256, n * format.n_bytes, dtype=np.uint8).view(format.layout)
    for name in format.layout.names or ():
        if format.layout[name].kind == "f":
            blocks[name] = rng.normal(size=blocks[name].shape) * 0.02
    if format.name == "BF16":
        blocks["x"] = rng.normal(size=n).astype(np.float32).view(np.uint32) >> 16
    elif format.name == "IQ1_M":  # its float16 scale hides in the upper nibbles: keep the exponent low
        blocks["scales"][:, 3] &= 0xBFFF
    elif format.name == "MXFP4":
        blocks["e"] = rng.integers(110, 136, n)
    return blocks
