"""Matrix products on other instruction sets: the same tests, in a process whose code is restricted to them."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest
from numba.core.registry import cpu_target

from edgelm.kernels import isas
from edgelm.kernels.isa_x86 import AMD
from edgelm.threads import default_threads

SSE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16"
AVX2 = f"{SSE},+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"
# CPU, features that Numba is told, what must come out of `isas.select`, features this machine must have
TARGETS = {
    "portable": ("x86-64", "+sse,+sse2", "Portable", ""),
    "sse4": ("nehalem", SSE, "Ssse3", "sse4.2"),
    "avx2": ("haswell", AVX2, "Avx2", "avx2"),
    "zen3": ("znver3", f"{AVX2},+sse4a", "Avx2", "avx2"),  # weights are read in another order: `tiles.in_order`
    "avxvnni": ("alderlake", f"{AVX2},+avxvnni", "Vnni256", "avxvnni"),
    "avx512": ("skylake-avx512", AVX512, "Avx512", "avx512bw"),
    "avx512vnni": ("cascadelake", f"{AVX512},+avx512vnni", "Vnni512", "avx512vnni"),
    "zen4": ("znver4", f"{AVX512},+avx512vnni,+sse4a", "Vnni512Zen", "avx512vnni"),
}
CHOSEN = """
from edgelm.kernels import isas
from numba.core.registry import cpu_target
print(type(isas.select(cpu_target.target_context)).__name__)
"""


ON_X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")


def restricted(target: str) -> dict[str, str]:
    """Environment variables that restrict generated code to a target; skips the test where this machine is less."""
    cpu, features, expected, needed = TARGETS[target]
    if needed and not llvm.get_host_cpu_features().get(needed):
        pytest.skip(f"this processor has no {needed}")
    context = cpu_target.target_context
    if type(isas.select(context)).__name__ == expected and isas.is_amd(context) == (AMD in features):
        pytest.skip("what this processor does anyway")
    return {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}


def run(environment: dict[str, str]) -> tuple[str, subprocess.CompletedProcess[str]]:
    """The instruction set that was chosen, and the tests of products with it."""
    known: dict[str, Any] = {"env": {**os.environ, **environment}, "capture_output": True, "text": True}
    chosen = subprocess.run([sys.executable, "-P", "-c", CHOSEN], check=True, **known)
    tests = str(Path(__file__).with_name("test_linear.py"))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    return chosen.stdout.strip(), subprocess.run(command, check=False, **known)


@pytest.fixture(scope="module")
def under_way(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    """The runs of all targets that will be asked for, as many at a time as there are cores: they compile."""
    asked = [item.callspec.params["target"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(default_threads()) as pool:
        runs: dict[str, Future[Any]] = {}
        for target in asked:
            with contextlib.suppress(pytest.skip.Exception):
                runs[target] = pool.submit(run, restricted(target))
        yield runs


@pytest.mark.slow
@ON_X86
@pytest.mark.parametrize("target", TARGETS)
def test_every_format_on(target: str, under_way: dict[str, Future[Any]]) -> None:
    restricted(target)
    chosen, done = under_way[target].result(timeout=1800)
    assert chosen == TARGETS[target][2]
    assert done.returncode == 0, done.stdout[-4000:]
