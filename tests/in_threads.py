"""The same work in several threads of a test."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

Result = TypeVar("Result")


def in_threads(work: Callable[[int], Result], n: int) -> list[Result]:
    """work(0) to work(n - 1), each in a thread of its own, begun together. Raises what one of them raised."""
    begin = Barrier(n)

    def begun(i: int) -> Result:
        begin.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(begun, range(n)))
