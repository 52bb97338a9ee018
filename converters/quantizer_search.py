"""The search for scales and minima: weighted least squares, with the numbers that a file can hold in the loop.

A block of weights x with importances w becomes integers q, a scale s and perhaps a minimum m, so that

    E(s, m) = sum of w (x - s q + m)²

is small; q is x + m over s, rounded to the format's grid. For fixed q, E is a parabola whose lowest point is a linear
system of two unknowns; for a fixed scale the best q is plain rounding. Taking turns never makes E larger (Lloyd,
"Least squares quantization in PCM", 1982), but where it ends depends on where it starts: so it starts from a row of
scales. The super-blocks of K-quants and IQ4_XS hold integers in place of scales, times a scale of their own:

  1. each sub-block on its own: the best of a row of scales, each mended by one step of least squares; then a few turns;
  2. d, then dmin: of a row of scales the one that rounds those of the sub-blocks best, each error weighed by the
     curvature of its E, and the minimum that a scale wants moving along with it;
  3. for each sub-block the integers around, tried with the true numbers: d and dmin as float16, q rounded again;
  4. d and dmin once more, by least squares over all 256 weights with the integers fixed, and 3 again; the best stays.

The formats are those of llama.cpp (pull request 1684 introduced K-quants); it weighs errors by a guess where there is
no importance, and rounds scales before it looks at minima. Everything here is lanes: see `quantizer_words`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from edgelm.kernels.words import Emitter, Value, function

from .quantizer_words import HUGE, LINE, Grid, absolute, as_f16, clamp, inverse, nearest_integer, number

# Lines of the state of a search, one for each sub-block: SUBS of them for each field.
SUBS = 16
SCALE, MINIMUM, CURVE, CROSS, WEIGHT, INT_SCALE, INT_MINIMUM, BEST_SCALE, BEST_MINIMUM, INVERSE = range(10)
D, DMIN, BEST_D, BEST_DMIN = range(4)  # lines of the super-block, after those of the sub-blocks
STATE_LINES = 10 * SUBS + 4
ULP = 2.0**-10.5  # between two float16 numbers, in relation to them
STEPS = 16  # scales of a super-block that are tried


@dataclass(frozen=True)
class Plan:
    """How a format is searched.

    name: of the format, part of the names of functions; sub: weights of a sub-block; n_subs: sub-blocks of a block;
    grid: what weights are rounded to; affine: has minima; offset: they may be negative, too (x = d q + m in the file);
    scales: least and largest integer scale, minima: largest integer minimum; None where a float16 stands instead;
    starts: (first, step, number): a row of scales to start from, the range of the block over (width + first + step i);
    turns: of least squares after the row; rounds: of step 3; around: integers tried on both sides of a minimum.
    """

    name: str
    sub: int
    n_subs: int
    grid: Grid
    affine: bool = False
    offset: bool = False
    scales: tuple[int, int] | None = None
    minima: int | None = None
    starts: tuple[float, float, int] = (-0.9, 0.15, 12)
    turns: int = 2
    rounds: int = 2
    around: int = 0


def field(state: Value, name: int, sub: Value | int) -> Value:
    """Address of the line of a sub-block."""
    return state + (sub + name * SUBS) * LINE


def whole(state: Value, name: int) -> Value:
    """Address of a line of the super-block."""
    return state + (10 * SUBS + name) * LINE


@dataclass
class Sums:
    """Over a sub-block, with r = x - s q + m: of w r², w r q, w r, w q², w q, w."""

    error: Value
    slope: Value
    residual: Value
    curve: Value
    cross: Value
    weight: Value


def sums(e: Emitter, plan: Plan, x: Value, w: Value, s: Value, m: Value | None) -> Sums:
    """Rounds the weights with scale s and minimum m, and adds up."""
    inv = inverse(e, s)
    totals = [e.variable(e.vector(0.0)) for _ in range(6)]
    with e.loop(0, plan.sub) as i:
        weight, t = e.load(w + i * LINE), e.load(x + i * LINE)
        if m is not None:
            t = t + m
        q = plan.grid.level(e, t * inv)
        r = t - s * q
        wr, wq = weight * r, weight * q
        for total, term in zip(totals, (wr * r, wr * q, wr, wq * q, wq, weight), strict=True):
            total.set(total.get() + term)
    return Sums(*(total.get() for total in totals))


def error_of(e: Emitter, plan: Plan, x: Value, w: Value, s: Value, m: Value | None) -> Value:
    """E(s, m) alone."""
    inv = inverse(e, s)
    total = e.variable(e.vector(0.0))
    with e.loop(0, plan.sub) as i:
        t = e.load(x + i * LINE)
        if m is not None:
            t = t + m
        r = t - s * plan.grid.level(e, t * inv)
        total.set(total.get() + e.load(w + i * LINE) * r * r)
    return total.get()


def step(e: Emitter, plan: Plan, n: Sums, s: Value, m: Value | None) -> tuple[Value, Value | None, Value]:
    """The lowest point (s, m) of the parabola, and E there."""
    if m is None:
        ds = n.slope * inverse(e, n.curve)
        return s + ds, None, n.error - n.slope * ds
    determinant = n.curve * n.weight - n.cross * n.cross
    regular = determinant > n.curve * n.weight * 1e-5
    ds = e.select(regular, (n.slope * n.weight - n.residual * n.cross) * inverse(e, determinant), 0.0)
    dm = (ds * n.cross - n.residual) * inverse(e, n.weight)
    if not plan.offset:  # a minimum below zero: the lowest point with none
        below = m + dm < 0.0
        dm = e.select(below, 0.0 - m, dm)
        ds = e.select(below, (n.slope + dm * n.cross) * inverse(e, n.curve), ds)
    error = n.error - (n.slope * ds - n.residual * dm) * 2.0
    error = error + ds * ds * n.curve - ds * dm * n.cross * 2.0 + dm * dm * n.weight
    return s + ds, m + dm, error


class Best:
    """The best of what was tried: values that change together."""

    def __init__(self, e: Emitter, *values: Value) -> None:
        self.e, self.error = e, e.variable(e.vector(HUGE))
        self.values = [e.variable(value) for value in values]

    def offer(self, error: Value, *values: Value) -> None:
        better = error < self.error.get()
        for variable, value in zip((self.error, *self.values), (error, *values), strict=True):
            variable.set(self.e.select(better, value, variable.get()))

    def get(self) -> list[Value]:
        return [variable.get() for variable in self.values]


def extremes(e: Emitter, plan: Plan, x: Value) -> tuple[Value, Value]:
    """(smallest, largest) weight of a sub-block; zero lies between them unless the format's minima are free."""
    zero = e.vector(0.0)
    first = e.load(x)
    low = e.variable(first if plan.offset else e.min(first, zero))
    high = e.variable(first if plan.offset or plan.affine else e.max(first, zero))
    with e.loop(1, plan.sub) as i:
        value = e.load(x + i * LINE)
        low.set(e.min(low.get(), value))
        high.set(e.max(high.get(), value))
    return low.get(), high.get()


def _there(*values: Value | None) -> list[Value]:
    return [value for value in values if value is not None]


def _named(write: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """A function of words of its own for each format."""
    write.__qualname__ = f"{write.__qualname__}.{plan.name}"
    return function(write)


# --- 1: each sub-block on its own


@cache
def affine_sub_block(plan: Plan) -> Callable[..., Any]:
    """Scale and minimum of sub-block j, and its parabola, to the state."""

    def search(e: Emitter, x: Value, w: Value, state: Value, j: Value) -> None:
        low, high = extremes(e, plan, x)
        width, m = high - low, 0.0 - low
        best = Best(e, e.vector(0.0), m)
        first, size, n = plan.starts
        with e.loop(0, n) as i:
            s = width * inverse(e, number(e, i) * size + (plan.grid.high + first))
            new_s, new_m, error = step(e, plan, sums(e, plan, x, w, s, m), s, m)
            best.offer(error, *_there(new_s, new_m))
        _turns(e, plan, x, w, best, state, j)

    return _named(search, plan)


@cache
def symmetric_sub_block(plan: Plan) -> Callable[..., Any]:
    """The same without a minimum: the largest weight goes to the lowest level or to the highest, or near them."""

    def search(e: Emitter, x: Value, w: Value, state: Value, j: Value) -> None:
        low, high = extremes(e, plan, x)
        largest = e.select(0.0 - low > high, low, high)
        best = Best(e, e.vector(0.0))
        first, size, n = plan.starts
        for end in (plan.grid.low, plan.grid.high):
            sign = -1.0 if end < 0 else 1.0
            with e.loop(0, n) as i:
                s = largest * inverse(e, number(e, i) * (sign * size) + (end + sign * first))
                new_s, _, error = step(e, plan, sums(e, plan, x, w, s, None), s, None)
                best.offer(error, new_s)
        _turns(e, plan, x, w, best, state, j)

    return _named(search, plan)


def _turns(e: Emitter, plan: Plan, x: Value, w: Value, best: Best, state: Value, j: Value) -> None:
    """Turns of rounding and least squares from the best so far, then the parabola there, to the state."""
    with e.loop(0, plan.turns):
        s, *m = best.get()
        minimum = m[0] if m else None
        new_s, new_m, error = step(e, plan, sums(e, plan, x, w, s, minimum), s, minimum)
        best.offer(error, *_there(new_s, new_m))
    s, *m = best.get()
    n = sums(e, plan, x, w, s, m[0] if m else None)
    for name, value in ((SCALE, s), (MINIMUM, m[0] if m else None), (CURVE, n.curve), (CROSS, n.cross),
                        (WEIGHT, n.weight)):  # fmt: skip
        if value is not None:
            e.store(field(state, name, j), value)


# --- 2: scales of the super-block, from what its sub-blocks want


def best_multiple(e: Emitter, plan: Plan, state: Value, name: int, limits: tuple[int, int], weight: Any) -> Value:
    """The scale whose multiples within limits come nearest to a field; weight(j): of the square of an error."""
    low, high = limits
    largest = e.variable(e.vector(0.0))
    with e.loop(0, plan.n_subs) as j:
        value = e.load(field(state, name, j))
        largest.set(e.select(absolute(e, value) > absolute(e, largest.get()), value, largest.get()))
    best = Best(e, e.vector(0.0))
    for end in (low, high):
        if end:
            size = (abs(end) + 1) // 16 / 4 * (-1 if end < 0 else 1)
            with e.loop(-1, STEPS - 1) as i:
                divisor = number(e, i) * -size + end
                d = as_f16(e, largest.get() * inverse(e, divisor))
                inv, total = inverse(e, d), e.variable(e.vector(0.0))
                with e.loop(0, plan.n_subs) as j:
                    value = e.load(field(state, name, j))
                    r = value - d * nearest_integer(clamp(e, value * inv, low, high))
                    total.set(total.get() + weight(j) * r * r)
                best.offer(total.get(), d)
    return best.get()[0]


@cache
def first_scales(plan: Plan) -> Callable[..., Any]:
    """d and dmin, and the integers that they make of scales and minima, to the state."""

    def choose(e: Emitter, state: Value) -> None:
        assert plan.scales is not None

        def load(name: int, j: Value) -> Value:
            return e.load(field(state, name, j))

        def curvature(j: Value) -> Value:
            """Of E over the scale, where the minimum follows."""
            curve = load(CURVE, j)
            if plan.minima is None:
                return curve
            return curve - load(CROSS, j) * load(CROSS, j) * inverse(e, load(WEIGHT, j))

        d = best_multiple(e, plan, state, SCALE, plan.scales, curvature)
        e.store(whole(state, D), d)
        inv = inverse(e, d)
        with e.loop(0, plan.n_subs) as j:
            whole_scale = nearest_integer(clamp(e, load(SCALE, j) * inv, *plan.scales))
            e.store(field(state, INT_SCALE, j), whole_scale)
            if plan.minima is not None:
                e.store(field(state, INT_MINIMUM, j), wanted_minimum(e, state, j, d * whole_scale))
        if plan.minima is not None:
            limits = 0, plan.minima
            e.store(whole(state, DMIN), best_multiple(e, plan, state, INT_MINIMUM, limits, lambda j: load(WEIGHT, j)))

    return _named(choose, plan)


def wanted_minimum(e: Emitter, state: Value, j: Value, s: Value) -> Value:
    """The minimum at the lowest point of the parabola of sub-block j for scale s; at least 0."""
    scale, minimum, cross, weight = (e.load(field(state, name, j)) for name in (SCALE, MINIMUM, CROSS, WEIGHT))
    return e.max(minimum + (s - scale) * cross * inverse(e, weight), 0.0)


# --- 3: the integers of each sub-block, with the true scales


@cache
def integers(plan: Plan) -> Callable[..., Any]:
    """Tries the integers around those of sub-block j, keeps the best in the state, adds E and slopes to `totals`."""

    def search(e: Emitter, x: Value, w: Value, state: Value, j: Value, totals: Value) -> None:
        assert plan.scales is not None
        d, dmin = e.load(whole(state, D)), e.load(whole(state, DMIN))
        now, inv = e.load(field(state, INT_SCALE, j)), inverse(e, dmin)
        best = Best(e, now, e.vector(0.0))
        with e.loop(-1, 2) as i:
            scale = clamp(e, now + number(e, i), *plan.scales)
            s = d * scale
            if plan.minima is None:
                best.offer(error_of(e, plan, x, w, s, None), scale, e.vector(0.0))
            else:
                middle = nearest_integer(clamp(e, wanted_minimum(e, state, j, s) * inv, 0, plan.minima))
                with e.loop(-plan.around, plan.around + 1) as k:
                    minimum = clamp(e, middle + number(e, k), 0, plan.minima)
                    best.offer(error_of(e, plan, x, w, s, dmin * minimum), scale, minimum)
        scale, minimum = best.get()
        s, m = d * scale, None if plan.minima is None else dmin * minimum
        n = sums(e, plan, x, w, s, m)
        new = scale, minimum, *(v if v is not None else s for v in step(e, plan, n, s, m)[:2]), n.curve, n.cross
        for name, value in zip((INT_SCALE, INT_MINIMUM, SCALE, MINIMUM, CURVE, CROSS), new, strict=True):
            e.store(field(state, name, j), value)
        terms = (n.error, scale * n.slope, minimum * n.residual, scale * scale * n.curve, scale * minimum * n.cross,
                 minimum * minimum * n.weight)  # fmt: skip
        for line, term in enumerate(terms):
            e.store(totals + line * LINE, e.load(totals + line * LINE) + term)

    return _named(search, plan)


# --- a block


@cache
def super_block(plan: Plan) -> Callable[..., Any]:
    """Everything that a file needs of 16 super-blocks whose weights and importances are the tiles x and w.

    Leaves in the state: D, DMIN, INT_SCALE, INT_MINIMUM; SCALE, MINIMUM and INVERSE for `code`.
    """

    def search(e: Emitter, x: Value, w: Value, state: Value) -> None:
        sub_block = affine_sub_block(plan) if plan.affine else symmetric_sub_block(plan)
        with e.loop(0, plan.n_subs) as j:
            sub_block(e, x + j * (plan.sub * LINE), w + j * (plan.sub * LINE), state, j)
        first_scales(plan)(e, state)
        totals, best_error = e.stack(6 * LINE), e.variable(e.vector(HUGE))
        with e.loop(0, plan.rounds):
            for line in range(6):
                e.store(totals + line * LINE, e.vector(0.0))
            with e.loop(0, plan.n_subs) as j:
                integers(plan)(e, x + j * (plan.sub * LINE), w + j * (plan.sub * LINE), state, j, totals)
            error, p, q, a, b, c = (e.load(totals + line * LINE) for line in range(6))
            better = error < best_error.get()
            best_error.set(e.select(better, error, best_error.get()))
            _keep(e, plan, state, better)
            d, dmin = e.load(whole(state, D)), e.load(whole(state, DMIN))
            if plan.minima is None:
                e.store(whole(state, D), as_f16(e, d + p * inverse(e, a)))
            else:
                determinant = a * c - b * b
                inv = e.select(determinant > a * c * 1e-5, inverse(e, determinant), 0.0)
                e.store(whole(state, D), as_f16(e, d + (c * p - b * q) * inv))
                e.store(whole(state, DMIN), as_f16(e, e.max(dmin + (b * p - a * q) * inv, 0.0)))
        _restore(e, plan, state)

    return _named(search, plan)


def _keep(e: Emitter, plan: Plan, state: Value, better: Value) -> None:
    """Copies the scales to the best ones, in lanes where they are better."""

    def copy(source: Value, target: Value) -> None:
        e.store(target, e.select(better, e.load(source), e.load(target)))

    for now, best in ((D, BEST_D), (DMIN, BEST_DMIN)):
        copy(whole(state, now), whole(state, best))
    with e.loop(0, plan.n_subs) as j:
        for now, best in ((INT_SCALE, BEST_SCALE), (INT_MINIMUM, BEST_MINIMUM)):
            copy(field(state, now, j), field(state, best, j))


def _restore(e: Emitter, plan: Plan, state: Value) -> None:
    d, dmin = e.load(whole(state, BEST_D)), e.load(whole(state, BEST_DMIN))
    e.store(whole(state, D), d)
    e.store(whole(state, DMIN), dmin)
    with e.loop(0, plan.n_subs) as j:
        scale, minimum = e.load(field(state, BEST_SCALE, j)), e.load(field(state, BEST_MINIMUM, j))
        e.store(field(state, INT_SCALE, j), scale)
        e.store(field(state, INT_MINIMUM, j), minimum)
        _use(e, state, j, d * scale, dmin * minimum)


def _use(e: Emitter, state: Value, j: Any, s: Value, m: Value) -> None:
    e.store(field(state, SCALE, j), s)
    e.store(field(state, MINIMUM, j), m)
    e.store(field(state, INVERSE, j), inverse(e, s))


@cache
def block(plan: Plan) -> Callable[..., Any]:
    """The same for blocks with one scale, a float16, and perhaps a minimum."""

    def search(e: Emitter, x: Value, w: Value, state: Value) -> None:
        sub_block = affine_sub_block(plan) if plan.affine else symmetric_sub_block(plan)
        sub_block(e, x, w, state, e.word(0))
        s, m, cross, weight = (e.load(field(state, name, 0)) for name in (SCALE, MINIMUM, CROSS, WEIGHT))
        best = Best(e, e.vector(0.0), e.vector(0.0))
        with e.loop(-1, 2) as i:  # the float16 numbers around the scale, each with the minimum that it wants
            d = as_f16(e, s * (number(e, i) * ULP + 1.0))
            dmin = as_f16(e, m + (d - s) * cross * inverse(e, weight)) if plan.affine else e.vector(0.0)
            best.offer(error_of(e, plan, x, w, d, dmin if plan.affine else None), d, dmin)
        d, dmin = best.get()
        e.store(whole(state, D), d)
        e.store(whole(state, DMIN), dmin)
        _use(e, state, 0, d, dmin)

    return _named(search, plan)


def code(e: Emitter, plan: Plan, x: Value, state: Value, i: Value) -> Value:
    """What stands for weight i of each block in the file: int32."""
    j = i // plan.sub
    t = e.load(x + i * LINE)
    if plan.affine:
        t = t + e.load(field(state, MINIMUM, j))
    return plan.grid.code(e, t * e.load(field(state, INVERSE, j)))
