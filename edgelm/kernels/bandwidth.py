"""How fast this machine reads memory: the roof that generation is measured against."""

from __future__ import annotations

import threading
import time

import numpy as np
from numba import config, njit

from edgelm.kernels import compiler
from edgelm.kernels.simd import add_i32, load_i32x16, splat_i32, sum_i32

# Numba's own cache, for functions that Python calls. No variable of the environment: children would inherit it.
config.CACHE_DIR = config.CACHE_DIR or str(compiler.cache_dir().parent)


@njit(nogil=True, cache=True)
def _read(address, n_bytes):
    """Adds up all 32-bit words of [address, address + n_bytes), 256 bytes at a time."""
    a = b = c = d = splat_i32(0)
    for at in range(address, address + n_bytes - 255, 256):
        a = add_i32(a, load_i32x16(at))
        b = add_i32(b, load_i32x16(at + 64))
        c = add_i32(c, load_i32x16(at + 128))
        d = add_i32(d, load_i32x16(at + 192))
    return sum_i32(add_i32(add_i32(a, b), add_i32(c, d)))


def read_bandwidth(n_threads: int, n_bytes: int, n_passes: int) -> list[float]:
    """Bytes/s of each pass over `n_bytes` of memory, read by `n_threads` threads that start together."""
    memory = np.ones(n_bytes // 8, np.int64)
    share = n_bytes // n_threads // 256 * 256
    _read(memory.ctypes.data, 256)
    rates = []
    for _ in range(n_passes):
        start = threading.Barrier(n_threads + 1)

        def work(i: int, start: threading.Barrier = start) -> None:
            start.wait()
            _read(memory.ctypes.data + i * share, share)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
        for thread in threads:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        rates.append(share * n_threads / (time.perf_counter() - began))
    return rates
