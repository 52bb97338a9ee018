"""All kernels on other instruction sets: the same tests, in a process whose code is restricted to them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest
from in_processes import run_tests, under_way
from numba.core.registry import cpu_target

from edgelm.kernels import isas
from edgelm.kernels.isa_x86 import AMD

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
    # what AVX-VNNI has, on 32 of the bytes of AVX-512: for machines without it
    "vnni256": ("cascadelake", f"{AVX2},+avx512f,+avx512vl,+avx512vnni", "Vnni256", "avx512vnni"),
    "avx512": ("skylake-avx512", AVX512, "Avx512", "avx512bw"),
    "avx512vnni": ("cascadelake", f"{AVX512},+avx512vnni", "Vnni512", "avx512vnni"),
    "zen4": ("znver4", f"{AVX512},+avx512vnni,+sse4a", "Vnni512Zen", "avx512vnni"),
}
FILES = [
    f"test_{kernels}.py"
    for kernels in ("linear", "float_linear", "attention", "elementwise", "vector_math", "compiled_sampling")
]
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
    """The instruction set that was chosen, and the tests with it."""
    command = [sys.executable, "-P", "-c", CHOSEN]
    chosen = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return chosen.stdout.strip(), run_tests(environment, *(str(Path(__file__).with_name(name)) for name in FILES))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    yield from under_way(request, "target", lambda target: partial(run, restricted(target)))


@pytest.mark.slow
@ON_X86
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_on(target: str, runs: dict[str, Future[Any]]) -> None:
    restricted(target)
    chosen, done = runs[target].result(timeout=1800)
    assert chosen == TARGETS[target][2]
    assert done.returncode == 0, done.stdout[-4000:]
