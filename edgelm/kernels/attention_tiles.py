"""The inner loops of attention: small matrix products whose sums stay in registers.

The same product serves q·k, with positions in lanes, and p·v, with dimensions in lanes. Each sum runs over its index in
ascending order with one fused multiply-add at a time, whatever the number of rows of a tile: so how queries are put
together into tiles, and how wide the registers are, changes no bit of a result.

Knows nothing of pages or softmax.
"""

from __future__ import annotations

from edgelm.kernels.emit import target
from edgelm.kernels.words import Emitter, Value, function

WIDTH = 64  # columns of a product; 32 or 16 for what remains
ROWS = (6, 4, 3, 2, 1)  # of tiles; the largest that fits is taken
NARROW_ROWS = (6, 1)
LINE = 64  # bytes of a cache line


def _register_vectors(e: Emitter) -> int:
    """How many vectors of 16 lanes a tile of six rows is wide, so that all of it fits into the registers."""
    _, features = target(e.context)
    return 4 if "avx512f" in features else 1


def _tile(e, n_rows, n_vectors, half, n, x, x_stride, m, m_stride, sums, sums_stride, fresh, ahead):
    """`multiply` for a number of rows and vectors of columns that is known while it is written."""
    slots = []
    for r in range(n_rows):
        row = []
        for c in range(n_vectors):
            slot = e.variable(e.vector(0.0))
            with e.when(fresh.is_(0)):
                slot.set(e.load(sums + sums_stride * r + 64 * c))
            row.append(slot)
        slots.append(row)
    with e.loop(0, n) as i:
        line, column = m + m_stride * i, x + 4 * i
        if ahead is not None:
            n_bytes = 16 * n_vectors * (2 if half else 4)
            for at in range(0, n_bytes, LINE):
                e.prefetch(ahead + n_bytes * i + at)
        vectors = [e.load_f16(line + 32 * c) if half else e.load(line + 64 * c) for c in range(n_vectors)]
        for r, row in enumerate(slots):
            value = e.vector(e.load_f32(column + x_stride * r))
            for vector, slot in zip(vectors, row, strict=True):
                slot.set(e.fma(value, vector, slot.get()))
    for r, row in enumerate(slots):
        for c, slot in enumerate(row):
            e.store(sums + sums_stride * r + 64 * c, slot.get())


def _multiply(width: int, half: bool, tiles: tuple[int, ...]):
    def write(e, n_rows, n, x, x_stride, m, m_stride, sums, sums_stride, fresh, ahead):
        vectors = min(width // 16, _register_vectors(e))
        done = e.variable(0)
        for rows in tiles:
            with e.repeat(lambda rows=rows: done.get() + rows <= n_rows):
                r = done.get()
                for c in range(0, width // 16, vectors):
                    _tile(e, rows, vectors, half, n, x + x_stride * r, x_stride, m + (32 if half else 64) * c, m_stride,
                          sums + sums_stride * r + 64 * c, sums_stride, fresh,
                          ahead if width == WIDTH and rows < ROWS[0] else None)
                done.set(r + rows)

    write.__qualname__ = f"multiply_{width}_{'f16' if half else 'f32'}"
    return function(write)


_PRODUCTS = {
    (width, half): _multiply(width, half, ROWS if width == WIDTH else NARROW_ROWS)
    for width in (WIDTH, 32, 16) for half in (False, True)
}


def multiply(e: Emitter, width: Value, half: Value, *arguments) -> None:
    """sums (n_rows, width) += x (n_rows, n) @ m (n, width), width 64, 32 or 16; m is float16 if `half`, else float32.

    Arguments: n_rows, n, x, x_stride, m, m_stride, sums, sums_stride, fresh, ahead. Strides in bytes; if not fresh,
    sums are added to. `ahead` is the address of what will be needed next: with few rows memory is what there is to wait
    for, so as many bytes as are used are fetched from there.
    """
    for (columns, is_half), product in _PRODUCTS.items():
        with e.when(width.is_(columns) & half.is_not(0).is_(is_half)):
            product(e, *arguments)


@function
def convert(e, source, source_stride, to, n_rows, width):
    """n_rows rows of `width` float16 to rows of 64 float32."""
    with e.loop(0, n_rows) as r, e.loop(0, width, 16) as c:
        e.store(to + 4 * (WIDTH * r + c), e.load_f16(source + source_stride * r + 2 * c))
