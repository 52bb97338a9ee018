"""What ARM processors would run, read from assembly that is emitted here: the instructions are used, nothing spills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from edgelm.kernels import isas

TOOL = Path(__file__).parents[2] / "tools" / "read_assembly.py"
LINUX, MACOS, WINDOWS = "aarch64-unknown-linux-gnu", "arm64-apple-darwin23.0.0", "aarch64-pc-windows-msvc"
# Triple, processor and features as Numba finds them there, what must be chosen: no system lists dotprod.
PROCESSORS = {
    "Raspberry Pi 4": (LINUX, "cortex-a72", "+crc,+fp-armv8,+neon,-sve", "Neon"),
    "Raspberry Pi 5": (LINUX, "cortex-a76", "+aes,+crc,+fp-armv8,+lse,+neon,-rand,+sha2,-sve", "NeonDot"),
    "Graviton 2": (LINUX, "neoverse-n1", "+aes,+crc,+fp-armv8,+lse,+neon,-rand,+sha2,-sve", "NeonDot"),
    "Graviton 3": (LINUX, "neoverse-v1", "+aes,+crc,+fp-armv8,+lse,+neon,+rand,+sha2,+sve", "NeonI8mm"),
    "M1": (MACOS, "apple-m1", "", "NeonDot"),
    "M2": (MACOS, "apple-m2", "", "NeonI8mm"),
    "Snapdragon X": (WINDOWS, "oryon-1", "+neon", "NeonI8mm"),
    "unknown": (LINUX, "generic", "+neon", "Neon"),
    "told so": (LINUX, "generic", "+neon,+dotprod", "NeonDot"),
}
FORMATS = ["Q4_0", "Q8_0", "Q4_K", "Q6_K"]
# By what a processor multiplies one token, and several.
CPUS = {
    "cortex-a72": ("smull", "smull"),
    "cortex-a76": ("sdot", "sdot"),
    "neoverse-n1": ("sdot", "sdot"),
    "neoverse-v1": ("sdot", "smmla"),
    "apple-m1": ("sdot", "sdot"),
    "apple-m2": ("sdot", "smmla"),
}
# The most instructions per block of 32 inputs, 16 rows and one token, and the most of them that load from the stack or
# store to it: what there was on any of these processors when it was written down, and a tenth more.
MOST = {
    ("_direct", "smull"): {"Q4_0": (217, 15), "Q8_0": (221, 0), "Q4_K": (372, 54), "Q6_K": (438, 69)},
    ("_direct", "sdot"): {"Q4_0": (141, 0), "Q8_0": (119, 0), "Q4_K": (323, 44), "Q6_K": (308, 23)},
    ("_tile", "smull"): {"Q4_0": (151, 0), "Q8_0": (212, 9), "Q4_K": (160, 0), "Q6_K": (156, 2)},
    ("_tile", "sdot"): {"Q4_0": (95, 7), "Q8_0": (95, 7), "Q4_K": (102, 8), "Q6_K": (97, 9)},
    ("_tile", "smmla"): {"Q4_0": (68, 0), "Q8_0": (77, 0), "Q4_K": (79, 0), "Q6_K": (82, 0)},
    ("_rest", "sdot"): {"Q4_0": (103, 0), "Q8_0": (103, 0), "Q4_K": (112, 1), "Q6_K": (105, 0)},
    ("_rest", "smmla"): {"Q4_0": (91, 0), "Q8_0": (91, 0), "Q4_K": (102, 0), "Q6_K": (96, 0)},
    ("_rest", "smull"): {"Q4_0": (171, 17), "Q8_0": (236, 31), "Q4_K": (174, 12), "Q6_K": (160, 2)},
}


def has_back_end() -> bool:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        llvm.Target.from_triple(LINUX)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_back_end(), reason="this llvmlite cannot compile for ARM")


class Context:
    """As much of Numba's target context as tells which processor it compiles for."""

    def __init__(self, *processor: str) -> None:
        self.processor = processor

    def codegen(self) -> Context:
        return self

    def magic_tuple(self) -> tuple[str, ...]:
        return self.processor


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_best_instructions_are_chosen(name: str) -> None:
    *processor, expected = PROCESSORS[name]
    assert type(isas.select(Context(*processor))).__name__ == expected


@pytest.mark.slow
@pytest.mark.skipif(not TOOL.exists(), reason="the tool that reads assembly is not there")
@pytest.mark.parametrize("cpu", CPUS)
def test_inner_loops(cpu: str) -> None:
    command = [sys.executable, str(TOOL), "--json", "--cpu", cpu, "--format", *FORMATS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    loops = [json.loads(line) for line in done.stdout.splitlines()]
    few, many = CPUS[cpu]
    for function, product in (("_direct", few), ("_tile", many), ("_rest", many)):
        for format, (instructions, spills) in MOST[function, product].items():
            loop = next(loop for loop in loops if f"{loop['function']}.".startswith(f"{function}.{format}."))
            assert loop["product"] == product, loop
            assert loop["instructions"] <= instructions * loop["blocks"], loop
            assert loop["spills"] <= spills * loop["blocks"], loop
