"""The KV cache against a plain model of it: arrays in lists. And its pages, limits and files."""

from __future__ import annotations

import gc
import itertools
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from in_threads import in_threads

from edgelm.cache import PAGE, Batch, GroupLayout, KVCache, Sequence
from edgelm.errors import CacheFull, UsageError
from edgelm.pages import Pool


@dataclass(frozen=True)
class Group:
    layers: tuple[int, ...]
    n_kv_heads: int = 1
    head_dim: int = 2
    v_head_dim: int = 3
    window: int = 0


GROUPS = (Group((0, 3)), Group((1,), n_kv_heads=2, head_dim=3, v_head_dim=2), Group((2, 4), window=90))


def rows(cache: KVCache, n: int, rng: np.random.Generator) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Keys and values of n positions for every layer, exact in float16."""
    def random(*shape: int) -> np.ndarray:
        return rng.integers(-1000, 1000, shape).astype(np.float32)

    return {
        layer: (random(n, g.n_kv_heads, g.head_dim), random(n, g.n_kv_heads, g.v_head_dim))
        for g in cache.groups for layer in g.layers
    }


def append(sequence: Sequence, data: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
    n = len(data[0][0])
    sequence.reserve(n)
    for layer, (k, v) in data.items():
        sequence.write(layer, sequence.length, k, v)
    sequence.advance(n)


def joined(parts: list[dict[int, tuple[np.ndarray, np.ndarray]]], layer: int, which: int) -> np.ndarray:
    return np.concatenate([part[layer][which] for part in parts])


def needed(cache: KVCache, sequence: Sequence, g: int) -> int:
    """The first position of a group that the next token, or one after any allowed truncation, may look at."""
    window = cache.groups[g].window
    lowest = min(sequence.floor, sequence.length)
    return max(0, lowest - window + 1) if window else 0


class Machine(RuleBasedStateMachine):
    """Sequences appended to, forked, truncated and released in any order; a dictionary of arrays says what is right."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(GROUPS, "f16", undo=20)
        self.rng = np.random.default_rng(0)
        self.right: dict[Sequence, dict[int, tuple[np.ndarray, np.ndarray]]] = {}

    @rule(target=sequences)
    def new(self) -> Sequence:
        sequence = self.cache.new_sequence()
        self.right[sequence] = rows(self.cache, 0, self.rng)
        return sequence

    @rule(sequence=sequences, n=st.one_of(st.integers(0, 8), st.integers(50, 150), st.just(PAGE)))
    def append(self, sequence: Sequence, n: int) -> None:
        data = rows(self.cache, n, self.rng)
        append(sequence, data)
        old = self.right[sequence]
        self.right[sequence] = {
            layer: tuple(np.concatenate(pair) for pair in zip(old[layer], data[layer], strict=True)) for layer in data
        }

    @rule(sequence=sequences, n=st.integers(1, 200))
    def reserve_in_vain(self, sequence: Sequence, n: int) -> None:
        """A call that failed after reserving, or reserved too much."""
        sequence.reserve(n)
        k, v = rows(self.cache, n, self.rng)[1]
        sequence.write(1, sequence.length, k, v)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        before = self.cache.n_pages
        twin = sequence.fork()
        assert self.cache.n_pages == before
        self.right[twin] = dict(self.right[sequence])
        return twin

    @rule(sequence=sequences, part=st.floats(0, 1))
    def truncate(self, sequence: Sequence, part: float) -> None:
        n = int(part * sequence.length)
        if 0 < n < sequence.floor:
            with pytest.raises(UsageError, match="no longer complete"):
                sequence.truncate(n)
            return
        sequence.truncate(n)
        self.right[sequence] = {layer: (k[:n], v[:n]) for layer, (k, v) in self.right[sequence].items()}

    @rule(sequence=consumes(sequences))
    def release(self, sequence: Sequence) -> None:
        del self.right[sequence]
        sequence.release()
        sequence.release()

    @rule(target=sequences, sequence=sequences)
    def save_and_load(self, sequence: Sequence) -> Sequence:
        twin = self.cache.from_bytes(sequence.to_bytes())
        assert (twin.length, twin.floor) == (sequence.length, sequence.floor)
        self.right[twin] = dict(self.right[sequence])
        return twin

    @rule(target=sequences, sequence=sequences, count=st.integers(2, 4))
    def beam(self, sequence: Sequence, count: int) -> object:
        return multiple(*(self.fork(sequence) for _ in range(count)))

    @invariant()
    def contents(self) -> None:
        for sequence, data in self.right.items():
            assert sequence.length == len(data[0][0])
            assert sequence.floor <= sequence.length or sequence.length == 0
            for g, group in enumerate(self.cache.groups):
                first = needed(self.cache, sequence, g)
                for layer in group.layers:
                    for got, want in zip(sequence.read(layer, sequence.length), data[layer], strict=True):
                        np.testing.assert_array_equal(got[first:], want[first:])

    @invariant()
    def pages(self) -> None:
        """Each page is counted as often as it is in tables, none is lost, and none is both free and used."""
        for g, pool in enumerate(self.cache._pools):
            used: dict[int, int] = {}
            for sequence in self.right:
                for address in sequence.table(g).tolist():
                    if address:
                        used[address] = used.get(address, 0) + 1
            assert used == pool.counts
            assert len(set(pool.free)) == len(pool.free)
            assert set(pool.free) | set(used) == set(pool.pages)
            assert not set(pool.free) & set(used)
            size = pool.layout.page_bytes
            assert all(b - a >= size for a, b in zip(sorted(pool.pages), sorted(pool.pages)[1:], strict=False))

    def teardown(self) -> None:
        self.right.clear()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_layout():
    group = Group((0, 5, 7), n_kv_heads=2, head_dim=24, v_head_dim=40)
    for kv_type, k_bytes, v_bytes in (
        ("f16", 2 * 24 * PAGE * 2, 2 * PAGE * 48 * 2), ("q8_0", 2 * 32 * PAGE * 17 // 16, 2 * 64 * PAGE * 17 // 16),
        ("q4_0/f32", 2 * 32 * PAGE * 9 // 16, 2 * PAGE * 48 * 4),
    ):
        layout = GroupLayout(group, kv_type)
        assert (layout.keys.n_bytes, layout.values.n_bytes) == (k_bytes, v_bytes)
        assert layout.page_bytes == 3 * (k_bytes + v_bytes)
        assert layout.k_offset(2) == 2 * (k_bytes + v_bytes)
        assert layout.v_offset(1) == layout.k_offset(1) + k_bytes
        assert all(offset(i) % 64 == 0 for offset in (layout.k_offset, layout.v_offset) for i in range(3))
    for wrong in ("q3", "", "/", "q8_0/", "f16/f16/f16", "/f16"):
        with pytest.raises(UsageError, match="f16, f32, q8_0, q4_0"):
            GroupLayout(group, wrong)


def test_pages_are_aligned_and_never_move():
    cache = KVCache((Group((0,), head_dim=3, v_head_dim=3),), "f16")
    sequence = cache.new_sequence()
    sequence.reserve(10 * PAGE)
    before = sequence.table(0).tolist()
    assert all(address % 64 == 0 for address in before)
    sequence.reserve(3000 * PAGE)
    assert sequence.table(0).tolist()[:10] == before


def test_freed_pages_are_used_again():
    cache = KVCache(GROUPS)
    for _ in range(50):
        sequence = cache.new_sequence()
        sequence.reserve(5 * PAGE)
        size = cache.n_bytes
        sequence.release()
    assert cache.n_bytes == size
    assert cache.n_pages == 0


def test_a_window_keeps_what_may_be_needed():
    cache = KVCache((Group((0,), window=100), Group((1,))), "f32", undo=50)
    sequence, rng = cache.new_sequence(), np.random.default_rng(1)
    data = [rows(cache, 10, rng) for _ in range(100)]
    for part in data:
        append(sequence, part)
    assert sequence.floor <= 1000 - 50
    assert np.count_nonzero(sequence.table(0)) <= (100 + 50) // PAGE + 2
    assert np.count_nonzero(sequence.table(1)) == -(-1000 // PAGE)
    sequence.truncate(sequence.floor)
    first = sequence.floor - 100 + 1
    keys, _ = sequence.read(0, sequence.length)
    np.testing.assert_array_equal(keys[first:], joined(data, 0, 0)[first : sequence.length])
    with pytest.raises(UsageError, match="no longer complete"):
        sequence.truncate(sequence.floor - 1)
    sequence.truncate(0)
    assert sequence.floor == 0
    assert cache.n_pages == 0
    append(sequence, data[0])
    np.testing.assert_array_equal(sequence.read(0, 10)[0], data[0][0][0])


def test_what_is_collected_is_freed():
    cache = KVCache(GROUPS)
    sequence = cache.new_sequence()
    sequence.reserve(5 * PAGE)
    sequence.advance(5 * PAGE)
    twin = sequence.fork()
    del sequence
    gc.collect()
    assert cache.n_pages == 15
    del twin
    gc.collect()
    assert cache.n_pages == 0
    orphan = cache.new_sequence()
    del cache
    gc.collect()
    orphan.reserve(1)  # a sequence keeps its cache


def test_limit():
    cache = KVCache(GROUPS, max_bytes=50_000)
    sequence = cache.new_sequence()
    with pytest.raises(CacheFull, match=r"limit.*bytes"):
        sequence.reserve(10_000)
    assert (sequence.length, sequence.capacity, cache.n_pages) == (0, 0, 0)
    assert cache.n_bytes <= 50_000
    sequence.reserve(PAGE)  # something still fits
    sequence.advance(PAGE)
    other = sequence.fork()
    taken = cache.n_pages
    with pytest.raises(CacheFull):
        for _ in range(1000):
            other.reserve(PAGE)
            other.advance(PAGE)
    other.release()
    assert cache.n_pages == taken
    sequence.reserve(PAGE)


def test_out_of_memory_is_an_error_of_ours(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    sequence = KVCache(GROUPS).new_sequence()
    monkeypatch.setattr("edgelm.pages.np.zeros", no_memory)
    with pytest.raises(CacheFull, match="ctx-size"):
        sequence.reserve(1)


def test_copy_on_write_copies_one_page():
    cache = KVCache((Group((0,)),), "f32")
    trunk, rng = cache.new_sequence(), np.random.default_rng(2)
    append(trunk, rows(cache, 2 * PAGE + 5, rng))
    before = trunk.read(0, trunk.length)[0]
    branch = trunk.fork()
    assert cache.n_pages == 3
    append(branch, rows(cache, 3, rng))
    assert cache.n_pages == 4
    append(trunk, rows(cache, 3, rng))  # alone again: no copy
    assert cache.n_pages == 4
    np.testing.assert_array_equal(trunk.table(0)[:2], branch.table(0)[:2])
    assert trunk.table(0)[2] != branch.table(0)[2]
    for sequence in (trunk, branch):
        np.testing.assert_array_equal(sequence.read(0, len(before))[0], before)
    assert (trunk.read(0, trunk.length)[0][-3:] != branch.read(0, branch.length)[0][-3:]).any()


def test_misuse():
    cache = KVCache(GROUPS)
    sequence = cache.new_sequence()
    k, v = rows(cache, 2, np.random.default_rng(3))[0]
    with pytest.raises(UsageError, match="not reserved"):
        sequence.write(0, 0, k, v)
    with pytest.raises(UsageError, match="advance"):
        sequence.advance(1)
    with pytest.raises(UsageError, match="truncate"):
        sequence.truncate(1)
    with pytest.raises(UsageError, match="read"):
        sequence.read(0, 1)
    with pytest.raises(UsageError, match="reserve"):
        sequence.reserve(-1)
    sequence.reserve(2)
    sequence.write(0, 0, k, v)
    sequence.advance(2)
    twin = sequence.fork()
    with pytest.raises(UsageError, match="shared"):
        twin.write(0, 2, k, v)
    twin.release()
    with pytest.raises(UsageError, match="released"):
        twin.reserve(1)


def test_threads():
    """Sequences of several threads, with collected ones in between, leave nothing behind."""
    cache = KVCache(GROUPS)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i in range(40):
            sequence, data = cache.new_sequence(), rows(cache, int(rng.integers(1, 150)), rng)
            append(sequence, data)
            branch = sequence.fork()
            append(branch, rows(cache, 9, rng))
            for layer, (k, _) in data.items():
                first = needed(cache, sequence, next(g for g, x in enumerate(GROUPS) if layer in x.layers))
                np.testing.assert_array_equal(sequence.read(layer, len(k))[0][first:], k[first:])
            if i % 2:
                sequence.release()
                branch.release()

    in_threads(work, 4)
    gc.collect()
    assert cache.n_pages == 0


def interrupt(call: Callable[[], None], at: int) -> bool:
    """Calls, and has a KeyboardInterrupt come before the `at`-th line of the cache that runs; whether there were so
    many lines. None comes before `try` and `with`, where Python takes none either: a lock would be kept."""
    n_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal n_lines
        if frame.f_globals["__name__"] not in ("edgelm.cache", "edgelm.pages"):
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split()
        if event == "line" and line[0] not in ("with", "try:"):
            n_lines += 1
            if n_lines == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def check_after_interrupt(cache: KVCache, sequences: list[Sequence], data: dict[int, tuple[np.ndarray, ...]]) -> None:
    """No page is in a table and free, or in more tables than it is counted; what sequences hold is complete."""
    for g, pool in enumerate(cache._pools):
        used = [address for sequence in sequences for address in sequence.table(g).tolist() if address]
        assert all(pool.counts.get(address, 0) >= used.count(address) for address in used)
        assert not set(used) & set(pool.free) and len(set(pool.free)) == len(pool.free)
        for sequence in sequences:
            first = needed(cache, sequence, g)
            assert sequence.length <= sequence.capacity and sequence.table(g)[first // PAGE :].all()
            for layer in cache.groups[g].layers:
                keys, _ = sequence.read(layer, sequence.length)
                np.testing.assert_array_equal(keys[first:], data[layer][0][first : sequence.length])


CALLS: dict[str, Callable[[Sequence], object]] = {
    "reserve": lambda s: s.reserve(150), "advance": lambda s: s.advance(150), "fork": lambda s: s.fork(),
    "truncate": lambda s: s.truncate(s.floor + 1), "reset": lambda s: s.truncate(0), "release": lambda s: s.release(),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_interrupts_spoil_nothing(name):
    """Wherever they come: a page may be lost, but none has two owners, and who was interrupted goes on."""
    for at in itertools.count(1):
        cache, rng = KVCache(GROUPS, undo=150), np.random.default_rng(4)
        data = rows(cache, 700, rng)
        trunk = cache.new_sequence()
        for begin in range(0, 310, 10):
            append(trunk, {layer: (k[begin : begin + 10], v[begin : begin + 10]) for layer, (k, v) in data.items()})
        twin = trunk.fork()
        if name == "advance":
            trunk.reserve(150)
            for layer, (k, v) in data.items():
                trunk.write(layer, 310, k[310:460], v[310:460])
        done = not interrupt(lambda trunk=trunk: CALLS[name](trunk), at)
        if trunk._finaliser.alive:
            check_after_interrupt(cache, [trunk, twin], data)
            trunk.truncate(0)
            append(trunk, {layer: (k[:200], v[:200]) for layer, (k, v) in data.items()})
            check_after_interrupt(cache, [trunk, twin], data)
        else:
            trunk.truncate(trunk.length)
            check_after_interrupt(cache, [twin], data)
            with pytest.raises(UsageError, match="released"):
                trunk.reserve(1)
        if done:
            break


def test_an_interrupt_while_pages_are_taken_loses_none(monkeypatch):
    cache = KVCache(GROUPS)
    sequence, taken, take = cache.new_sequence(), itertools.count(), Pool.take

    def interrupted(pool: Pool, limit: int | None) -> int:
        if next(taken) == 7:
            raise KeyboardInterrupt
        return take(pool, limit)

    sequence.reserve(PAGE)
    monkeypatch.setattr(Pool, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.reserve(6 * PAGE)
    assert cache.n_pages == len(GROUPS) and sequence.capacity == PAGE


# --- batches

def test_batch():
    cache = KVCache(GROUPS)
    a, b = cache.new_sequence(), cache.new_sequence()
    append(b, rows(cache, 7, np.random.default_rng(7)))
    batch = Batch.of([(a, [5, 6, 7], "last"), (b, np.array([8, 9]), "all")])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 7, 8]
    assert batch.rows.tolist() == [0, 0, 0, 1, 1]
    assert batch.outputs.tolist() == [2, 3, 4]
    assert batch.sequences == (a, b)
    assert {x.dtype for x in (batch.tokens, batch.positions, batch.rows, batch.outputs)} == {np.dtype(np.int32)}
    assert Batch.of([(a, [1], "none")]).outputs.shape == (0,)
    for parts, message in (
        ([], "no tokens"), ([(a, [], "all")], "no tokens"), ([(a, [1], "some")], "some"),
        ([(a, [1], "all"), (a, [2], "all")], "once"), ([(a, [1 << 40], "all")], "whole numbers"),
        ([(a, ["x"], "all")], "whole numbers"), ([(a, np.zeros((2, 2)), "all")], "whole numbers"),
    ):
        with pytest.raises(UsageError, match=message):
            Batch.of(parts)
