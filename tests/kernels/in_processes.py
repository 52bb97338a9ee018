"""Tests that run in other processes, whose code is for another processor, while this one waits."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from edgelm.threads import default_threads


def run_tests(environment: dict[str, str], *tests: str) -> subprocess.CompletedProcess[str]:
    """Files of tests, or other arguments of pytest, in a process with these environment variables, too."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def under_way(
    request: pytest.FixtureRequest, parameter: str, prepare: Callable[[str], Callable[[], Any]]
) -> Iterator[dict[str, Future[Any]]]:
    """Runs, by the values of the parameter that tests of this file will be asked for with; as many at a time as there
    are cores: they compile. prepare(value) gives what is to be run, or skips it."""
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params[parameter] for item in items]
    with ThreadPoolExecutor(default_threads()) as pool:
        runs: dict[str, Future[Any]] = {}
        for value in asked:
            with contextlib.suppress(pytest.skip.Exception):
                runs[value] = pool.submit(prepare(value))
        yield runs
