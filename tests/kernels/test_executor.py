"""The executor against kernels that record what they did: every unit once, and in the order that barriers demand."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from in_threads import in_threads
from numba import njit

from edgelm.kernels import compiler
from edgelm.kernels.abi import Env, Row
from edgelm.kernels.executor import Executor
from edgelm.kernels.walk import atomic_get, atomic_set, compare_exchange, get, pause

SEEN, GROUP, DONE, GOALS, ERRORS, SPIN = range(8 * Row.ARGS, 8 * Row.ARGS + 48, 8)


@njit
def add(address, n):
    seen = atomic_get(address)
    while True:
        now = compare_exchange(address, seen, seen + n)
        if now == seen:
            return
        seen = now


def record(op, env, begin, end):
    """Counts each unit, and the units of its group that are done; an error if the group before is not complete."""
    group, done = get(op + GROUP), get(op + DONE)
    if group > 0 and atomic_get(done + 8 * (group - 1)) != get(get(op + GOALS) + 8 * (group - 1)):
        add(get(op + ERRORS), 1)
    for unit in range(begin, end):
        address = get(op + SEEN) + 8 * unit
        atomic_set(address, atomic_get(address) + 1)
        for _ in range(get(op + SPIN) * (unit % 3)):
            pause()
    add(done + 8 * group, end - begin)


def _end_of_memory(n_bytes: int) -> tuple[mmap.mmap, int]:
    """Memory, and the address after its end: where the system has `mprotect`, no byte from there on may be read."""
    area = mmap.mmap(-1, 2 * n_bytes)
    end = ctypes.addressof(ctypes.c_char.from_buffer(area)) + n_bytes
    if sys.platform != "win32":
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(n_bytes), 0) == 0
    return area, end


_area, CONSTANTS = _end_of_memory(mmap.ALLOCATIONGRANULARITY)  # what rows read ends where reading is an error


class Recorder:
    """A random table of `record` rows, and what they should leave behind."""

    def __init__(self, rng: random.Random) -> None:
        n = rng.choice([1, 2, 3, 10, 60])
        self.table = np.zeros((n, Row.SIZE), np.int64)
        self.counts = [(rng.randrange(0, 8), rng.randrange(0, 4)) for _ in range(3)]  # (tokens, outputs) of a few runs
        self.seen = [np.zeros(2000, np.int64) for _ in range(n)]
        self.done, self.goals, self.errors = (np.zeros(k, np.int64) for k in (n + 1, n + 1, 1))
        self.env = np.zeros(Env.SIZE, np.int64)
        group = 0
        for row, seen in zip(self.table, self.seen, strict=True):
            row[[Row.KERNEL, Row.GRAIN]] = compiler.address(record), rng.choice([1, 1, 3, 8])
            row[Row.BARRIER] = rng.random() < 0.6
            row[Row.UNITS] = rng.choice([0, 1, 2, 7, 100])
            row[Row.UNITS_PER] = rng.choice([0, 0, 1, 3])
            row[Row.READ_BYTES] = rng.choice([1, 7, 40])
            row[Row.READS] = rng.choice([0, CONSTANTS - row[Row.UNITS] * row[Row.READ_BYTES]])
            row[Row.COUNT] = rng.choice([Env.N_TOKENS, Env.N_OUTPUTS])
            row[[Row.ARGS, Row.ARGS + 1, Row.ARGS + 5]] = seen.ctypes.data, group, rng.choice([0, 0, 20, 300])
            row[Row.ARGS + 2 : Row.ARGS + 5] = self.done.ctypes.data, self.goals.ctypes.data, self.errors.ctypes.data
            group += int(row[Row.BARRIER])

    def units(self, row: np.ndarray) -> int:
        if not row[Row.UNITS_PER]:
            return int(row[Row.UNITS])
        return int(row[Row.UNITS] * -(-self.env[row[Row.COUNT]] // row[Row.UNITS_PER]))

    def run(self, executor: Executor, n_threads: int | None = None) -> None:
        for tokens, outputs in self.counts:
            self.env[[Env.N_TOKENS, Env.N_OUTPUTS]] = tokens, outputs
            for array in (*self.seen, self.done, self.goals):
                array[:] = 0
            for row in self.table:
                self.goals[row[Row.ARGS + 1]] += self.units(row)
            executor.run(self.table, len(self.table), self.env.ctypes.data, n_threads)
            assert self.errors[0] == 0
            assert np.array_equal(self.done, self.goals)
            for row, seen in zip(self.table, self.seen, strict=True):
                assert np.array_equal(seen, np.arange(len(seen)) < self.units(row))


@pytest.fixture(params=[1, 2, 3, 7])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with Executor(request.param) as executor:
        yield executor


def test_every_unit_once_and_in_order(executor: Executor) -> None:
    rng = random.Random(executor.n_threads)
    for _ in range(150 if executor.n_threads <= 3 else 40):
        Recorder(rng).run(executor, rng.choice([None, None, 1, 2]))


def test_same_table_thousands_of_times() -> None:
    recorder = Recorder(random.Random(5))
    with Executor(2) as executor:
        for _ in range(1000):
            recorder.run(executor)


def test_workers_that_were_parked_come_back() -> None:
    """Pauses around the time after which workers park, where a lost wake-up would show as a worker that never helps:
    its clock, of the time that it computes, stands still from then on."""
    rng, recorder = random.Random(1), Recorder(random.Random(11))
    with Executor(3) as executor:
        for _ in range(150):
            recorder.run(executor)
            time.sleep(rng.choice([0, 0.0002, 0.0008, 0.001, 0.0012, 0.003]))
        assert all(thread.is_alive() for thread in executor._crew._threads)
        if not hasattr(time, "pthread_getcpuclockid"):
            return
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in executor._crew._threads]
        before, hangs = [time.clock_gettime(clock) for clock in clocks], time.monotonic() + 600
        while not all(time.clock_gettime(clock) > start for clock, start in zip(clocks, before, strict=True)):
            assert time.monotonic() < hangs
            recorder.run(executor)
            time.sleep(0.003)


def toil(op, env, begin, end):
    for _ in range((end - begin) * get(op + SPIN)):
        pause()


def test_workers_do_take_part() -> None:
    table = np.zeros((1, Row.SIZE), np.int64)
    table[0, [Row.KERNEL, Row.UNITS, Row.GRAIN, Row.ARGS + 5]] = compiler.address(toil), 64, 1, 10000
    env = np.zeros(Env.SIZE, np.int64)
    with Executor(2) as executor:
        executor.run(table, 1, env.ctypes.data)
        time.sleep(0.05)  # the worker is parked
        total, own = time.process_time(), time.thread_time()
        for _ in range(5):
            executor.run(table, 1, env.ctypes.data)
        own = time.thread_time() - own
        assert time.process_time() - total > 1.2 * own


def test_idle_workers_cost_nothing() -> None:
    recorder = Recorder(random.Random(3))
    with Executor(4) as executor:
        recorder.run(executor)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02


def test_several_executors_at_once() -> None:
    def work(seed: int) -> None:
        rng = random.Random(seed)
        with Executor(3) as executor:
            for _ in range(10):
                Recorder(rng).run(executor)

    in_threads(work, 4)


def test_one_executor_from_many_threads() -> None:
    """Runs are one after the other, so a recorder of its own for each thread must find its table done."""
    with Executor(2) as executor:
        in_threads(lambda seed: Recorder(random.Random(seed)).run(executor), 8)


def test_closed_executor_starts_again() -> None:
    recorder = Recorder(random.Random(2))
    executor = Executor(2)
    recorder.run(executor)
    threads = executor._crew._threads
    executor.close()
    assert not any(thread.is_alive() for thread in threads)
    recorder.run(executor)
    executor.close()
    executor.close()


def test_wrong_tables_are_refused() -> None:
    with Executor(2) as executor, pytest.raises(ValueError, match="op table"):
        executor.run(np.zeros((2, Row.SIZE), np.int32), 2, 0)


def _child(body: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import random, sys, os, signal, threading, time; sys.path[:0] = ['tests', 'tests/kernels', '.']\n"
        "from test_executor import Recorder, Executor\n" + body
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def test_exit_with_live_workers_is_clean() -> None:
    done = _child("e = Executor(3); Recorder(random.Random(1)).run(e); print('end')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_threads_that_cannot_all_be_started_do_not_stay() -> None:
    done = _child(
        "import resource\n"
        "from edgelm.errors import UsageError\n"
        "e = Executor(4); r = Recorder(random.Random(1)); r.run(e); e.close()\n"
        "threading.stack_size(1 << 30)\n"  # room for one such stack, and half of another one
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limits = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), limits[1]))\n"
        "try: r.run(e)\n"
        "except UsageError as error: print(error)\n"
        "assert not [t for t in threading.enumerate() if t.name.startswith('edgelm')]\n"
        "resource.setrlimit(resource.RLIMIT_AS, limits); threading.stack_size(0)\n"
        "r.run(e); print('end')\n"
    )
    told = "the system starts 1 more threads, not 3; use fewer (--threads)\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, told + "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_starts_its_own_workers() -> None:
    done = _child(
        "import warnings; warnings.simplefilter('ignore')\n"
        "e = Executor(3); r = Recorder(random.Random(1)); r.run(e)\n"
        "pid = os.fork()\n"
        "r.run(e)\n"
        "assert len([t for t in threading.enumerate() if t.name.startswith('edgelm')]) == 2\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0; print('end')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to a process here")
def test_interrupts_leave_the_executor_usable() -> None:
    done = _child(
        "def interrupt(*_):\n"  # once, and only where it is caught
        "    global running\n"
        "    if running: running = False; raise KeyboardInterrupt\n"
        "running = False; signal.signal(signal.SIGINT, interrupt)\n"
        "e = Executor(3); rng = random.Random(7); caught = 0\n"
        "Recorder(rng).run(e)\n"
        "def tease():\n"
        "    while caught < 25: time.sleep(0.003); os.kill(os.getpid(), signal.SIGINT)\n"
        "t = threading.Thread(target=tease); t.start()\n"
        "r = Recorder(random.Random(5))\n"
        "while t.is_alive():\n"
        "    try:\n"
        "        running = True; r.run(e); running = False\n"
        "    except KeyboardInterrupt:\n"
        "        caught += 1\n"
        "for _ in range(20): Recorder(rng).run(e)\n"
        "print('end')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
