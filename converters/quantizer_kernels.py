"""Kernels that quantize: one for each format, found by name through `edgelm.kernels.compiler`. `quantizers` calls them.

A job is int64: address of the weights (float32, block after block), of the importances (float32, the same for each
row), of the blocks that come out, of room to work in; number of blocks, and of blocks with importances of their own.
A unit is 16 blocks. What is written here is where a format keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgelm.kernels.words import Emitter, Value, intrinsic_of

from .quantizer_search import (
    DMIN,
    INT_MINIMUM,
    INT_SCALE,
    STATE_LINES,
    D,
    Plan,
    block,
    code,
    field,
    super_block,
    whole,
)
from .quantizer_words import LINE, Grid, Image, Levels, gather, integer_of, scatter

ROOM = 2 * 256 * LINE + STATE_LINES * LINE + 256 * 16  # bytes: tiles of weights and importances, state, image

_IQ4 = Levels("iq4", (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))

PLANS = {
    plan.name: plan
    for plan in (
        Plan("Q4_0", 32, 1, Grid(-8, 7), starts=(-1.2, 0.1, 24)),
        Plan("Q4_1", 32, 1, Grid(0, 15), affine=True, offset=True, starts=(-0.9, 0.1, 28)),
        Plan("Q5_0", 32, 1, Grid(-16, 15), starts=(-1.2, 0.1, 24)),
        Plan("Q5_1", 32, 1, Grid(0, 31), affine=True, offset=True, starts=(-0.9, 0.1, 28)),
        Plan("Q8_0", 32, 1, Grid(-127, 127), starts=(-0.5, 0.25, 6)),
        Plan("IQ4_NL", 32, 1, _IQ4, starts=(-12.0, 2.0, 16)),
        Plan("Q2_K", 16, 16, Grid(0, 3), affine=True, scales=(0, 15), minima=15, starts=(-0.9, 0.1, 24), around=1),
        Plan("Q3_K", 16, 16, Grid(-4, 3), scales=(-32, 31), starts=(-1.2, 0.1, 24), turns=3, rounds=3),
        Plan("Q4_K", 32, 8, Grid(0, 15), affine=True, scales=(0, 63), minima=63, starts=(-1.0, 0.1, 26), rounds=3),
        Plan("Q5_K", 32, 8, Grid(0, 31), affine=True, scales=(0, 63), minima=63, starts=(-0.9, 0.2, 12)),
        Plan("Q6_K", 16, 16, Grid(-32, 31), scales=(-128, 127), starts=(-1.2, 0.15, 16)),
        Plan("IQ4_XS", 32, 8, _IQ4, scales=(-32, 31), starts=(-10.0, 2.0, 14)),
    )
}


class Block:
    """16 searched blocks, for the code that writes their bits."""

    def __init__(self, e: Emitter, plan: Plan, x: Value, state: Value, image: Image) -> None:
        self.e, self.plan, self.x, self.state, self.image = e, plan, x, state, image

    def code(self, i: Value) -> Value:
        return code(self.e, self.plan, self.x, self.state, i)

    def put_d(self, index: int) -> None:
        self.image.put_f16(index, self.e.load(whole(self.state, D)))

    def put_dmin(self, index: int, sign: float = 1.0) -> None:
        self.image.put_f16(index, self.e.load(whole(self.state, DMIN)) * sign)

    def scale(self, j: Any, offset: int = 0) -> Value:
        """Integer scale of sub-block j plus offset: int32, not negative."""
        return integer_of(self.e, self.e.load(field(self.state, INT_SCALE, j)) + offset)

    def minimum(self, j: Any) -> Value:
        return integer_of(self.e, self.e.load(field(self.state, INT_MINIMUM, j)))


# --- where the bits lie


def _nibbles(k: Block, first: int, group: int, high: bool = False) -> None:
    """Four low bits of each weight: a byte holds weights l and l + group, for each 2 * group weights."""
    n = k.plan.sub * k.plan.n_subs
    for c in range(0, n, 2 * group):

        def byte(l: Value, c: int = c) -> list[tuple[Value, int]]:
            low, up = k.code(l + c), k.code(l + (c + group))
            return [(low % 16, 0), (up % 16, 4)] if high else [(low, 0), (up, 4)]

        k.image.pack(first + c // 2, group, byte)


def _bits(k: Block, first: int, divisor: int, bits: int) -> None:
    """Higher bits of each weight, code // divisor: 32 bytes hold 256 / 32 * bits planes of 32 weights each."""
    per_byte = 8 // bits
    for c in range(0, 256, 32 * per_byte):

        def byte(l: Value, c: int = c) -> list[tuple[Value, int]]:
            return [(k.code(l + (c + 32 * p)) // divisor % (1 << bits), bits * p) for p in range(per_byte)]

        k.image.pack(first + c // per_byte, 32, byte)


def _fifth_bits(k: Block, first: int) -> None:
    """Bit i of 32: the fifth bit of weight i."""
    k.image.pack(first, 4, lambda l: [(k.code(l * 8 + i) // 16, i) for i in range(8)])


def _six_bit_scales(k: Block, first: int) -> None:
    """Scales and minima of Q4_K and Q5_K: see `edgelm.formats.k_quants`."""
    for j in range(4):
        k.image.put(first + j, k.scale(j) | k.scale(j + 4) // 16 * 64)
        k.image.put(first + 4 + j, k.minimum(j) | k.minimum(j + 4) // 16 * 64)
        k.image.put(first + 8 + j, k.scale(j + 4) % 16 | k.minimum(j + 4) % 16 * 16)


def _write_q4_0(k: Block) -> None:
    k.put_d(0)
    _nibbles(k, 2, 16)


def _write_q4_1(k: Block) -> None:
    k.put_d(0)
    k.put_dmin(2, -1.0)
    _nibbles(k, 4, 16)


def _write_q5_0(k: Block) -> None:
    k.put_d(0)
    _fifth_bits(k, 2)
    _nibbles(k, 6, 16, high=True)


def _write_q5_1(k: Block) -> None:
    k.put_d(0)
    k.put_dmin(2, -1.0)
    _fifth_bits(k, 4)
    _nibbles(k, 8, 16, high=True)


def _write_q8_0(k: Block) -> None:
    k.put_d(0)
    k.image.pack(2, 32, lambda l: [(k.code(l) - 127, 0)])


def _write_q2_k(k: Block) -> None:
    k.image.pack(0, 16, lambda j: [(k.scale(j), 0), (k.minimum(j), 4)])
    _bits(k, 16, 1, 2)
    k.put_d(80)
    k.put_dmin(82)


def _write_q3_k(k: Block) -> None:
    _bits(k, 0, 4, 1)
    _bits(k, 32, 1, 2)
    k.image.pack(96, 8, lambda j: [(k.scale(j, 32) % 16, 0), (k.scale(j + 8, 32) % 16, 4)])
    k.image.pack(104, 4, lambda j: [(k.scale(j + 4 * i, 32) // 16, 2 * i) for i in range(4)])
    k.put_d(108)


def _write_q4_k(k: Block) -> None:
    k.put_d(0)
    k.put_dmin(2)
    _six_bit_scales(k, 4)
    _nibbles(k, 16, 32)


def _write_q5_k(k: Block) -> None:
    k.put_d(0)
    k.put_dmin(2)
    _six_bit_scales(k, 4)
    _bits(k, 16, 16, 1)
    _nibbles(k, 48, 32, high=True)


def _write_q6_k(k: Block) -> None:
    _nibbles(k, 0, 64, high=True)
    _bits(k, 128, 16, 2)
    k.image.pack(192, 16, lambda j: [(k.scale(j, 128) - 128, 0)])
    k.put_d(208)


def _write_iq4_xs(k: Block) -> None:
    k.put_d(0)
    k.image.pack(2, 2, lambda l: [(k.scale(l * 4 + i, 32) // 16, 2 * i) for i in range(4)])
    k.image.pack(4, 4, lambda l: [(k.scale(l * 2, 32) % 16, 0), (k.scale(l * 2 + 1, 32) % 16, 4)])
    _nibbles(k, 8, 16)


# --- kernels


def _kernel(name: str, n_bytes: int, write: Callable[[Block], None]) -> Any:
    plan = PLANS[name]
    n_weights = plan.sub * plan.n_subs
    search = super_block(plan) if plan.scales else block(plan)

    def run(e: Emitter, job: Value, unused: Value, begin: Value, end: Value) -> None:
        source, importance, target, room, n_blocks, period = (e.load_word(job + 8 * i) for i in range(6))
        x, w = room, room + 256 * LINE
        state, image = w + 256 * LINE, w + (256 + STATE_LINES) * LINE
        with e.loop(begin, end) as unit:
            first = unit * 16
            gather(e, source, n_weights, first, n_blocks, x)
            gather(e, importance, n_weights, first, period, w)
            search(e, x, w, state)
            write(Block(e, plan, x, state, Image(e, image)))
            scatter(e, image, n_bytes, e.min(n_blocks - first, 16), target + first * n_bytes)

    return intrinsic_of(run)


_q4_0, _q4_1 = _kernel("Q4_0", 18, _write_q4_0), _kernel("Q4_1", 20, _write_q4_1)
_q5_0, _q5_1 = _kernel("Q5_0", 22, _write_q5_0), _kernel("Q5_1", 24, _write_q5_1)
_q8_0, _iq4_nl = _kernel("Q8_0", 34, _write_q8_0), _kernel("IQ4_NL", 18, _write_q4_0)
_q2_k, _q3_k = _kernel("Q2_K", 84, _write_q2_k), _kernel("Q3_K", 110, _write_q3_k)
_q4_k, _q5_k = _kernel("Q4_K", 144, _write_q4_k), _kernel("Q5_K", 176, _write_q5_k)
_q6_k, _iq4_xs = _kernel("Q6_K", 210, _write_q6_k), _kernel("IQ4_XS", 136, _write_iq4_xs)


def q4_0(job: int, unused: int, begin: int, end: int) -> None:
    _q4_0(job, unused, begin, end)


def q4_1(job: int, unused: int, begin: int, end: int) -> None:
    _q4_1(job, unused, begin, end)


def q5_0(job: int, unused: int, begin: int, end: int) -> None:
    _q5_0(job, unused, begin, end)


def q5_1(job: int, unused: int, begin: int, end: int) -> None:
    _q5_1(job, unused, begin, end)


def q8_0(job: int, unused: int, begin: int, end: int) -> None:
    _q8_0(job, unused, begin, end)


def iq4_nl(job: int, unused: int, begin: int, end: int) -> None:
    _iq4_nl(job, unused, begin, end)


def q2_k(job: int, unused: int, begin: int, end: int) -> None:
    _q2_k(job, unused, begin, end)


def q3_k(job: int, unused: int, begin: int, end: int) -> None:
    _q3_k(job, unused, begin, end)


def q4_k(job: int, unused: int, begin: int, end: int) -> None:
    _q4_k(job, unused, begin, end)


def q5_k(job: int, unused: int, begin: int, end: int) -> None:
    _q5_k(job, unused, begin, end)


def q6_k(job: int, unused: int, begin: int, end: int) -> None:
    _q6_k(job, unused, begin, end)


def iq4_xs(job: int, unused: int, begin: int, end: int) -> None:
    _iq4_xs(job, unused, begin, end)
