"""Runs op tables on threads: the Python half, which owns the memory and the threads. See `walk` for the native half.

Workers are started once. For about a millisecond after a run they wait for the next one without the interpreter lock,
then park on a lock and cost nothing. The thread that calls `run` takes part, and could finish alone: a worker that is
slow to wake, or that the system has taken away, only does less of the work. After a fork the child starts its own.

Knows nothing of models. Imports no Numba: only compiling `walk` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np

from edgelm.errors import UsageError
from edgelm.kernels import compiler
from edgelm.kernels.abi import Row

KERNELS = ("walk:run", "walk:run_alone", "walk:serve", "walk:spin")  # what an executor needs compiled
LINE = 128  # bytes that two threads may write without meeting: two cache lines, because they are fetched in pairs
UNIT_BITS = 24  # of a shared word; the rest is the generation: enough for 17 years of 1000 runs a second

# Control block, byte offsets.
TICKET = 0  # 2 * generation; odd while a job is being written
JOB_TABLE, JOB_ENV, JOB_N_ROWS, JOB_N_THREADS, JOB_N_TOKENS, JOB_N_OUTPUTS, JOB_SLOTS = range(LINE, LINE + 56, 8)
SLOTS, YIELD, SLEEP, SLEEP_TIME, SPINS, YIELDS, SPINS_PER_US, IDLE = range(2 * LINE, 2 * LINE + 64, 8)
WORKERS = 3 * LINE
WORKER = LINE  # bytes of a worker's own words
WORKER_PARKED, WORKER_LAST, WORKER_STOPPED = 0, 8, 16

# A row's shared words: units finished up to the next barrier, and for each thread where the rest of its part begins.
DONE, TAKEN = 0, LINE

# How long to spin for the others before giving the core away. Not longer: on a busy machine a thread loses its core
# anyway, and had better lose it here than in the middle of a chunk that the others then wait for.
SPIN_US = 8
YIELD_COUNT = 200  # and how often to do that before sleeping
SLEEP_MS = 0.05
STOP_S = 60  # how long to wait for a worker that the system has taken away: what it may look at is freed then
HOT_US = 1000  # how long workers stay awake after a run: longer than sampling and printing a token

# A kernel, to be called from Python.
Native = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_executors: weakref.WeakSet[Executor]


def _walk(name: str) -> Any:
    """A function of `walk`, callable from Python; releases the interpreter lock."""
    return Native(compiler.address(f"walk:{name}"))


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def yield_address() -> int:
    """Address of a C function of no arguments that gives the core to another thread (`Env.YIELD`)."""
    return _address_of(_system().SwitchToThread if sys.platform == "win32" else _system().sched_yield)


@functools.cache
def read_address() -> int:
    """Address of C's function `pread`, where reading into the cache is faster than mapping and giving back pages, as it
    is on Linux; else 0."""
    return _address_of(_system().pread) if sys.platform == "linux" and ctypes.sizeof(ctypes.c_long) == 8 else 0


def _sleep() -> tuple[int, int]:
    """Address of a C function that sleeps, and its argument for SLEEP_MS."""
    if sys.platform == "win32":
        return _address_of(_system().Sleep), 1
    return _address_of(_system().usleep), int(SLEEP_MS * 1000)


def _system() -> Any:
    return ctypes.WinDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)  # type: ignore[attr-defined]


def slot_bytes(n_threads: int) -> int:
    """Bytes of a row's shared words."""
    return TAKEN + LINE * n_threads


def _aligned(n_bytes: int) -> np.ndarray:
    """Zeroed bytes at a multiple of LINE."""
    memory = np.zeros(n_bytes + LINE, np.uint8)
    skip = -memory.ctypes.data % LINE
    return memory[skip : skip + n_bytes]


class Executor:
    """`n_threads` threads, the caller's included, that run op tables of `abi.Row`s. Thread-safe: one run at a time."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = max(1, n_threads)
        self._run, self._run_alone = _walk("run"), _walk("run_alone")
        self._reset()
        _executors.add(self)

    def _reset(self) -> None:
        """State without threads; what a forked child begins with."""
        self._lock = threading.RLock()
        self._crew: _Crew | None = None
        self._tables: dict[int, tuple[np.ndarray, int]] = {}  # by id, with address: late workers look at them
        self._slots: list[np.ndarray] = []  # the same for these

    def run(self, table: np.ndarray, n_rows: int, env_address: int, n_threads: int | None = None) -> None:
        """Runs the first `n_rows` rows of `table`, int64 (rows, Row.SIZE), with environments, int64 (ENVS, Env.SIZE).

        The table must not change afterwards. No row may have 2**24 units or more. Raises UsageError if the system does
        not start the threads; a later call tries again.
        """
        n = self.n_threads if n_threads is None else max(1, min(n_threads, self.n_threads))
        with self._lock:
            known = self._tables.get(id(table)) or self._add(table)
            if n == 1:
                self._run_alone(known[1], env_address, n_rows, 0)
                return
            crew = self._crew or self._start()
            crew.wake(n - 1)
            self._run(crew.address, known[1], env_address, n << 32 | n_rows)

    def _add(self, table: np.ndarray) -> tuple[np.ndarray, int]:
        if table.dtype != np.int64 or not table.flags.c_contiguous or table.ndim != 2 or table.shape[1] != Row.SIZE:
            raise ValueError("an op table is a contiguous int64 array of rows of Row.SIZE words")
        self._tables[id(table)] = table, table.ctypes.data
        n_bytes = len(table) * slot_bytes(self.n_threads)
        if not self._slots or len(self._slots[-1]) < n_bytes:
            self._slots.append(_aligned(n_bytes))
            if self._crew is not None:
                self._crew.set(SLOTS, self._slots[-1].ctypes.data)
        return self._tables[id(table)]

    def _start(self) -> _Crew:
        self._crew = _Crew(self.n_threads - 1)
        self._crew.set(SLOTS, self._slots[-1].ctypes.data)
        self._closer = weakref.finalize(self, self._crew.stop)  # also at exit, before threads are torn down
        return self._crew

    def close(self) -> None:
        """Ends the workers. A later `run` starts new ones."""
        with self._lock:
            if self._crew is not None:
                self._closer()
                self._crew, self._tables, self._slots = None, {}, []

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Crew:
    """The workers of an executor and the control block that they share with whoever runs a table."""

    def __init__(self, n_workers: int) -> None:
        self._memory = _aligned(WORKERS + n_workers * WORKER)
        self._words = self._memory.view(np.int64)
        self.address = self._memory.ctypes.data
        per_us = _spins_per_us()
        sleep, sleep_time = _sleep()
        for field, value in (
            (YIELD, yield_address()), (SLEEP, sleep), (SLEEP_TIME, sleep_time), (YIELDS, YIELD_COUNT),
            (SPINS_PER_US, per_us), (SPINS, SPIN_US * per_us), (IDLE, HOT_US),
        ):
            self.set(field, value)
        self._parked = [self._words[i : i + 1].data for i in range(WORKERS // 8, len(self._words), WORKER // 8)]
        self._locks = [threading.Lock() for _ in range(n_workers)]
        self._threads: list[threading.Thread] = []
        try:
            self._start()
        except BaseException as error:  # those that were started must not stay
            self.stop()
            if isinstance(error, RuntimeError):
                raise UsageError(
                    f"the system starts {len(self._threads)} more threads, not {n_workers}; use fewer (--threads)"
                ) from error
            raise

    def _start(self) -> None:
        for worker, lock in enumerate(self._locks):
            lock.acquire()
            arguments = (_walk("serve"), self._memory, worker, lock)
            thread = threading.Thread(target=_work, args=arguments, name=f"edgelm-{worker + 1}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def set(self, field: int, value: int) -> None:
        self._words[field // 8] = value

    def wake(self, n: int) -> None:
        """Releases the parked among the first `n` workers. One that parks at this very moment misses one run."""
        for parked, lock in zip(self._parked[:n], self._locks, strict=False):
            if parked[0] and lock.locked():
                lock.release()

    def stop(self) -> None:
        _walk("run")(self.address, 0, 0, 0)
        self.wake(len(self._locks))
        for thread in self._threads:
            thread.join(timeout=STOP_S)


def _work(serve: Any, memory: np.ndarray, worker: int, lock: threading.Lock) -> None:
    """A worker thread: serves until nothing comes, then sleeps on its lock."""
    control = memory.ctypes.data
    stopped = memory.view(np.int64)[(WORKERS + worker * WORKER + WORKER_STOPPED) // 8 :].data
    while True:
        serve(control, worker, 0, 0)
        if stopped[0]:
            return
        lock.acquire()


@functools.cache
def _spins_per_us() -> int:
    """Pauses in a microsecond. One takes 5 to 200 ns, by processor."""
    spin, best = _walk("spin"), 1.0
    for _ in range(5):
        start = time.perf_counter()
        spin(500, 0, 0, 0)
        best = min(best, time.perf_counter() - start)
    return max(1, int(500 / (best * 1e6)))


_executors = weakref.WeakSet()


def _after_fork() -> None:
    for executor in list(_executors):
        with contextlib.suppress(AttributeError):
            executor._closer.detach()
        executor._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
