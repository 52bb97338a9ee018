"""Compiles kernels for another kind of processor than the one it runs on: object files for its cache, or assembly.

    python tools/cross_compile.py --cpu cortex-a76 linear_kernels:linear_q4_0                # assembly, to read
    python tools/cross_compile.py --features +neon,+dotprod --into FOLDER                    # all kernels

Numba compiles for the machine that LLVM names; here LLVM names another, which is why this needs a process of its own.
llvmlite's wheels bring the back ends of all machines. The machine code in the object files is byte for byte that which
the other machine would make; names of symbols depend on the order in which kernels are compiled.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import sys
from pathlib import Path

TRIPLE = "aarch64-unknown-linux-gnu"
OTHERS = ["walk:run", "walk:serve", "walk:run_alone", "walk:spin", "sampling_kernels:choose",
          "sampling_wide_kernels:choose", "sampling_wide_kernels:repetitions"]  # kernels that take no units


def pretend(triple: str, cpu: str, features: str) -> None:
    """From here on Numba, which must not have been imported yet, takes this machine for another one."""
    if "numba" in sys.modules:
        raise RuntimeError("Numba has been imported already")
    import llvmlite.binding as llvm
    import llvmlite.binding.targets as targets

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    os.environ.update(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    for module in (llvm, targets):
        module.get_process_triple = module.get_default_triple = lambda: triple


def all_kernels() -> list[str]:
    """Names of all kernels of the machine that is compiled for, as `compiler.address` takes them."""
    import llvmlite.binding.targets as targets

    import edgelm.kernels

    found = list(OTHERS)
    for module in pkgutil.iter_modules(edgelm.kernels.__path__, "edgelm.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isfunction(value) and value.__module__ == module.name:
                parameters = list(inspect.signature(value).parameters)
                on_x86 = "x86_64" in targets.get_process_triple()
                here = on_x86 or not any(form in name for form in ("int12", "int16"))  # only x86 multiplies int16
                if here and len(parameters) == 4 and parameters[2:] == ["begin", "end"]:
                    found.append(f"{module.name.rpartition('.')[2]}:{name}")
    return found


def compile_into(folder: Path, kernels: list[str]) -> int:
    """Puts what is missing of `kernels` into a folder of object files: how many there were to compile."""
    from edgelm.kernels import compiler

    missing = 0
    for name in kernels:
        symbol = compiler._path_of(name)[0]
        path = folder / f"{symbol}.o"
        if compiler._read(path) is None:
            folder.mkdir(parents=True, exist_ok=True)
            compiler._write(path, compiler._compile(compiler._function(name), symbol))
            missing += 1
    return missing


def assembly(kernel: str) -> str:
    """What the machine that this process pretends to be would run."""
    import llvmlite.binding as llvm

    from edgelm.kernels import compiler

    emit_object, llvm.TargetMachine.emit_object = llvm.TargetMachine.emit_object, llvm.TargetMachine.emit_assembly
    try:
        return str(compiler._compile(compiler._function(kernel), compiler._path_of(kernel)[0]))
    finally:
        llvm.TargetMachine.emit_object = emit_object


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help="module:function; without any, all kernels")
    parser.add_argument("--triple", default=TRIPLE)
    parser.add_argument("--cpu", default="generic")
    parser.add_argument("--features", default="")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="write object files there")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="only every Nth kernel, from the Ith on")
    arguments = parser.parse_args()
    pretend(arguments.triple, arguments.cpu, arguments.features)
    first, step = map(int, arguments.share.split("/"))
    kernels = (arguments.kernels or all_kernels())[first::step]
    if arguments.into is not None:
        print(compile_into(arguments.into, kernels))
    else:
        for kernel in kernels:
            print(assembly(kernel))


if __name__ == "__main__":
    main()
