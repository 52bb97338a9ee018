"""The matrix unit where there is none: the same tests, in processes that emulate its instructions: `emulated_unit`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_processes import run_tests, under_way
from numba.core.registry import cpu_target
from op_rows import UNIT

from edgelm.kernels import amx
from edgelm.kernels.emit import target

FOLDER = Path(__file__).with_name("emulated_unit")
NEEDS = {"fsgsbase", *(name for name in amx.NEEDS if not name.startswith("amx-"))}
HWCAP2, FSGSBASE = 26, 2  # of Linux on x86-64: whether programs may set the base of the segment GS
TESTS = {  # by pytest's -k, and in files: each about as long as the others, as most of the time goes into compiling
    "products": ("not IQ", ["kernels/test_amx.py", "kernels/test_matrix_unit.py"]),
    "products of IQ formats": ("IQ", ["kernels/test_matrix_unit.py"]),
    "attention": ("", ["kernels/test_attention_amx.py"]),
    "models": ("", [
        "test_program.py", "session/test_session.py",
        "test_packing.py::test_a_first_run_of_more_tokens_than_a_unit_of_work_has",
    ]),
}  # fmt: skip


def emulating() -> dict[str, str]:
    """Environment variables of processes that have a matrix unit; skips the test where that is not to be had."""
    machine, features = target(cpu_target.target_context)
    if UNIT:
        pytest.skip("this processor has a matrix unit, and the tests are run as they are")
    if machine != "x86_64" or sys.platform != "linux":
        pytest.skip("what is emulated is a part of x86-64, on Linux")
    if missing := NEEDS - features:
        pytest.skip(f"this processor has no {', no '.join(sorted(missing))}")
    if not ctypes.CDLL(None).getauxval(HWCAP2) & FSGSBASE:
        pytest.skip("this Linux lets no program set the base of GS")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))}


def run(environment: dict[str, str], name: str) -> Any:
    folder, (some, tests) = Path(__file__).parents[1], TESTS[name]
    return run_tests(environment, "-m", "not model", "-k", some, *(str(folder / test) for test in tests))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    yield from under_way(request, "name", lambda name: partial(run, emulating(), name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_with_a_unit(name: str, runs: dict[str, Future[Any]]) -> None:
    emulating()
    done = runs[name].result(timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "no matrix unit" not in done.stdout, "tests of it were skipped"
