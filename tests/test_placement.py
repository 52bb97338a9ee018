"""Scheduling and allocation against a slow checker of what they promise, on random graphs."""

from __future__ import annotations

import random

import pytest

from edgelm.placement import Step, Value, allocate, schedule


def random_steps(rng: random.Random) -> list[Step]:
    """Steps that read what earlier ones wrote; some may overwrite an operand."""
    steps: list[Step] = []
    values: list[Value] = []
    for i in range(rng.randrange(1, 60)):
        recent = values[-rng.choice([1, 3, 8, 60]) :]
        reads = tuple(dict.fromkeys(rng.choice(recent) for _ in range(rng.randrange(0, 4)))) if recent else ()
        writes = tuple(
            Value("tokens", rng.choice([0, 64, 64, 128, 1024]), single=rng.random() < 0.2)
            for _ in range(rng.choice([1, 1, 1, 2]))
        )
        reuses = rng.choice(reads) if reads and rng.random() < 0.6 else None
        steps.append(Step(f"step {i}", reads, writes, list, reuses))
        values += writes
    return steps


def places(values: tuple[Value, ...], n_rows: int) -> list[tuple[int, int, Value]]:
    return [(v.offset, v.offset + size(v, n_rows), v) for v in values if v.stride]


def size(value: Value, n_rows: int) -> int:
    return value.stride * (1 if value.single else n_rows)


def meet(a: tuple[int, int, Value], b: tuple[int, int, Value]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@pytest.mark.parametrize("seed", range(200))
def test_every_step_finds_what_it_reads(seed: int) -> None:
    """Levels are executed with all their steps at once: whatever a step reads must be there until the level ends."""
    rng = random.Random(seed)
    n_rows = rng.choice([1, 3, 16])
    steps = schedule(random_steps(rng))
    result = rng.choice([value for step in steps for value in step.writes])
    n_bytes = allocate(steps, n_rows, result)
    made = {value: step.level for step in steps for value in step.writes}
    memory: dict[int, Value] = {}  # 64-byte line -> whose it is
    for level in range(steps[-1].level + 1):
        now = [step for step in steps if step.level == level]
        for step in now:
            for value in step.reads:
                assert made[value] < level
                lines = range(value.offset, value.offset + size(value, n_rows), 64)
                assert all(memory[line] is value for line in lines)
        for step in now:
            for place in places(step.writes, n_rows):
                assert place[0] >= 0 and place[1] <= n_bytes
                for other in now:
                    if other is not step:
                        assert not any(meet(place, p) for p in places((*other.reads, *other.writes), n_rows))
                for p in places(step.reads, n_rows):  # only on purpose
                    assert not meet(place, p) or (p[2] is step.reuses and p[0] == place[0])
            for begin, end, value in places(step.writes, n_rows):
                for line in range(begin, end, 64):
                    memory[line] = value
    assert all(memory[line] is result for line in range(result.offset, result.offset + size(result, n_rows), 64))


def test_memory_is_shared() -> None:
    """A chain needs two places, not as many as it has links; in place, one."""
    for reuse, expected in ((False, 2), (True, 1)):
        value = Value("tokens", 1024)
        steps = [Step("first", (), (value,), list)]
        for i in range(20):
            following = Value("tokens", 1024)
            steps.append(Step(f"{i}", (value,), (following,), list, value if reuse else None))
            value = following
        assert allocate(schedule(steps), 4, value) // (4 * 1024) == expected
