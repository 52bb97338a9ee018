"""The only place that imports numba and llvmlite: what runs at the speed of the memory.

`simd` gives vectors, `isa` how a machine multiplies int8, the other modules the operations. Kernels trust their
arguments: whoever calls one has proven every shape, offset and length.
"""
