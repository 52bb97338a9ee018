"""What the bytes of a weight mean: one class per ggml tensor type, and `QTensor`, a weight as it lies in a file.

Knows nothing of files, models, kernels or speed: `dequantize` is the meaning of a format in NumPy, and everything that
is faster is tested against it. Block layouts and arithmetic are those of ggml; results are bit-equal to `gguf.quants`.

    format.py      Format, the registry, and the pieces that formats share
    simple.py      plain numbers, and blocks with one scale: F32 … Q8_0, Q4_0 …, Q1_0, TQ1_0 …
    k_quants.py    super-blocks of 256 weights with quantized scales: Q2_K … Q6_K
    codebooks.py   formats that look their weights up: IQ1_S … IQ4_XS, MXFP4, NVFP4; the tables are in grids.py
    tensor.py      QTensor

A new format is one class in one of these files. Kernels that read it fast live in `edgelm.kernels`.
"""

from . import codebooks, k_quants, simple
from .codebooks import *  # noqa: F403
from .format import FORMATS, Format, by_name
from .k_quants import *  # noqa: F403
from .simple import *  # noqa: F403
from .tensor import QTensor

__all__ = ["FORMATS", "Format", "QTensor", "by_name"]
__all__ += simple.__all__
__all__ += k_quants.__all__
__all__ += codebooks.__all__
