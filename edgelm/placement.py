"""When the steps of a program run, and where their values lie.

`schedule` puts steps that need nothing of each other side by side, `allocate` gives values places in the workspace that
they share with values that live at other times. Knows nothing of what steps do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ALIGN = 64  # bytes; what rows and offsets are multiples of


@dataclass(eq=False)
class Value:
    """Rows of `stride` bytes in the workspace: float32, or records of quantized activations."""

    rows: str
    stride: int
    offset: int = -1
    single: bool = False  # one row, whatever the number of tokens
    home: Value | None = None  # the value whose place this one takes over
    first: int = 0  # the levels between which it lives, inclusive
    last: int = 0

    @property
    def place(self) -> Value:
        return self if self.home is None else self.home.place


@dataclass(eq=False)
class Step:
    """One row of the op table to be. `row` is called once all its values have offsets."""

    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    row: Callable[[], list[int]]
    reuses: Value | None = None  # of `reads`: its place may become that of the first of `writes`
    weights: tuple[str, int] = ("", 0)  # whose it reads, and how many bytes: for those who measure
    level: int = 0


def schedule(steps: list[Step]) -> list[Step]:
    """The steps in levels: each as early as what it reads allows. Steps of one level do not depend on each other."""
    made: dict[Value, int] = {}
    for step in steps:
        step.level = max((made[value] + 1 for value in step.reads), default=0)
        for value in step.writes:
            made[value] = step.level
    return sorted(steps, key=lambda step: step.level)


def allocate(steps: list[Step], n_rows: int, result: Value | None) -> int:
    """Gives every value an offset, for `n_rows` rows each; returns the bytes of the workspace.

    Two values share bytes only if they live at different levels, or one takes the other's place on purpose.
    """
    end = steps[-1].level + 1
    readers: dict[Value, list[Step]] = {}
    for step in steps:
        for value in step.writes:
            value.first = value.last = step.level
        for value in step.reads:
            value.last = step.level
            readers.setdefault(value, []).append(step)
    if result is not None:
        result.last = end
    for step in steps:
        old, new = step.reuses, step.writes[0]
        if old is None or old is result or (old.stride, old.single) != (new.stride, new.single):
            continue
        if all(other is step or other.level < step.level for other in readers[old]):
            new.home = old
            old.place.last = max(old.place.last, new.last)

    places = [value for step in steps for value in step.writes if value.home is None and value.stride]
    live: list[Value] = []
    total = 0
    for value in sorted(places, key=lambda v: v.first):
        live = [other for other in live if other.last >= value.first]
        size, offset = _size(value, n_rows), 0
        for other in sorted(live, key=lambda v: v.offset):
            if offset + size <= other.offset:
                break
            offset = max(offset, other.offset + _size(other, n_rows))
        value.offset = offset
        live.append(value)
        total = max(total, offset + size)
    for step in steps:
        for value in step.writes:
            if value.home is not None:
                value.offset = value.place.offset
    return total + ALIGN


def _size(value: Value, n_rows: int) -> int:
    return -(-value.stride * (1 if value.single else n_rows) // ALIGN) * ALIGN
