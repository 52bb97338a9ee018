"""Runs tests, and a model, as an ARM processor would: in an emulator, on an x86-64 Linux machine that has apt.

    python tools/arm_test.py                                  # each feature set; then SmolLM2 for eight tokens
    python tools/arm_test.py neon i8mm --tests tests/kernels/test_linear.py --flags="-x -k Q4_0" --model ""

It sets everything up in a folder of the cache, without an administrator's rights and without executing anything that it
fetches but the emulator: apt, with a state of its own, brings qemu and an arm64 Python from this machine's mirror;
pip brings the aarch64 wheels of what edgelm depends on. Kernels are compiled here, by `tools/cross_compile.py`:
under emulation that takes ten times as long.

What is emulated is a processor of each set, so that an instruction that it does not have ends the test. That proves
results, never speed; and as it runs on an x86-64, it cannot show a missing barrier between threads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import platformdirs

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["python3", "libgomp1", "libstdc++6"]  # of Debian and what descends from it
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (34, 31, 28, 27, 17)] + ["manylinux2014_aarch64"]
TESTS = ["tests/kernels", "tests/test_program.py"]
# Without those that measure time or wait for it, limit memory, compile for other processors, or take minutes.
LEFT_OUT = [
    "interrupts", "take_part", "cost_nothing", "exit_with_live", "several_processes", "other_processors",
    "every_format_on", "inner_loops", "real_model", "single_tokens", "cannot_all_be_started",
]  # fmt: skip
PROMPT = "The capital of France is"
PROBE = """
import json, platform
from edgelm.kernels import compiler, isas
folder = str(compiler.cache_dir() / compiler.compiled_for().folder)
from numba.core.registry import cpu_target
print(json.dumps([platform.machine(), folder, type(isas.select(cpu_target.target_context)).__name__]))
"""


class Features(NamedTuple):
    """What Numba is told (LLVM's names), the processor that is emulated (qemu's), and what must be chosen."""

    features: str
    emulated: str
    isa: str


SETS = {
    "neon": Features("+neon", "cortex-a72", "Neon"),  # Raspberry Pi 4
    "dotprod": Features("+neon,+dotprod", "cortex-a76", "NeonDot"),  # Raspberry Pi 5, Apple M1, Neoverse N1
    "i8mm": Features("+neon,+dotprod,+i8mm", "max", "NeonI8mm"),  # Apple M2 and later, Neoverse V1
    "fp16": Features("+neon,+dotprod,+fullfp16", "cortex-a76", "NeonDot"),  # arithmetic in float16
}


class Missing(Exception):
    """Something that is needed is not there; says what."""


def command(arguments: Sequence[str | Path], what: str, **options: object) -> str:
    """Output of a command. Where it fails, `what` is what could not be done."""
    try:
        done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, **options)  # type: ignore
    except OSError as error:
        raise Missing(f"{what}: {error}") from None
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise Missing(f"{what}: {next((line for line in lines if line.startswith(('E:', 'ERROR'))), lines[-1])}")
    return done.stdout


# --- setting up


def unpack_packages(architecture: str, names: list[str], folder: Path, dependencies: bool) -> None:
    """Downloads packages of the distribution and unpacks them, as files, to `folder`."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Missing(f"{program} is not there: give --emulator, --root and --site, or use a Debian or an Ubuntu")
    work = folder.with_suffix(".apt")
    for place in ("state/lists/partial", "cache/archives/partial", "download"):
        (work / place).mkdir(parents=True, exist_ok=True)
    (work / "status").touch()
    settings = {
        "APT::Architecture": architecture, "APT::Architectures": architecture, "Dir::State": work / "state",
        "Dir::State::status": work / "status", "Dir::Cache": work / "cache", "Dir::Log": work,
        "APT::Install-Recommends": "false", "APT::Sandbox::User": "", "Debug::NoLocking": "true",
    }  # fmt: skip
    apt = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in settings.items())]
    command([*apt, "update"], f"apt has no list of packages for {architecture}")
    if dependencies:
        command([*apt, "--download-only", "install", *names], f"apt cannot fetch {' '.join(names)} for {architecture}")
    else:
        command([*apt, "download", *names], f"apt cannot fetch {' '.join(names)}", cwd=work / "download")
    unpacked = folder.with_suffix(".new")
    for package in sorted([*work.glob("cache/archives/*.deb"), *work.glob("download/*.deb")]):
        command(["dpkg-deb", "-x", package, unpacked], f"{package.name} cannot be unpacked")
    shutil.rmtree(work)
    unpacked.rename(folder)


def requirements() -> list[str]:
    """What edgelm and the tests that run here need, with the versions of Numba and llvmlite that are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tests = [name for name in project["optional-dependencies"]["test"] if not name.startswith("edgelm[")]  # ONNX's
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in ("numba", "llvmlite")]
    return [*project["dependencies"], *tests, *pinned]


def install_wheels(site: Path, python: str) -> None:
    """Unpacks aarch64 wheels for a version of Python, "3.11", to a folder."""
    new = site.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    command(
        [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", "--no-compile", "--implementation=cp",
         f"--python-version={python}", *platforms, "--target", new, *requirements()],
        "pip cannot fetch wheels for aarch64",
    )  # fmt: skip
    shutil.rmtree(site, ignore_errors=True)
    new.rename(site)


class Machine:
    """An emulated machine: the emulator, a folder with an arm64 Python, and one with its packages."""

    def __init__(self, cache: Path, emulator: Path | None, root: Path | None, site: Path | None) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        found = emulator or shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if found is None:
            found = cache / "qemu/usr/bin/qemu-aarch64-static"
            if not found.exists():
                unpack_packages("amd64", ["qemu-user-static"], cache / "qemu", dependencies=False)
        self.emulator, self.root = Path(found), root or cache / "arm64"
        if not self.root.exists():
            unpack_packages("arm64", PACKAGES, self.root, dependencies=True)
        pythons = sorted(self.root.glob("usr/bin/python3.*[0-9]"))
        if not pythons:
            raise Missing(f"{self.root} has no usr/bin/python3")
        self.python, version = pythons[-1], pythons[-1].name.removeprefix("python")
        wanted = "\n".join(requirements())
        digest = re.sub(r"\W", "", f"{hash_of(wanted)}-{version}")
        self.site = site or cache / f"site-{digest}"
        if not self.site.exists():
            install_wheels(self.site, version)

    def environment(self, features: Features) -> dict[str, str]:
        """For processes under emulation; their `sys.executable` is a script that emulates, too."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUMBA"))},
            "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features.features,
            "NUMBA_CACHE_DIR": str(self.cache / "kernels"), "PYTHONHOME": str(self.root / "usr"),
            "PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}", "PYTHONPYCACHEPREFIX": str(self.cache / "pyc"),
        }  # fmt: skip

    def interpreter(self, features: Features) -> Path:
        """A script that is Python on this machine with one processor."""
        script = self.cache / f"python-{features.emulated}"
        emulator = shlex.join([str(self.emulator), "-cpu", features.emulated, "-L", str(self.root)])
        script.write_text(f'#!/bin/sh\nexec {emulator} -0 "$0" {shlex.quote(str(self.python))} "$@"\n')
        script.chmod(0o755)
        return script


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- running


def compile_kernels(features: Features, folder: Path) -> None:
    """Fills the emulated machine's folder of kernels, on all cores."""
    n = os.cpu_count() or 1
    base = [sys.executable, ROOT / "tools/cross_compile.py", "--features", features.features, "--into", folder]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder.parents[1])}
    processes = [
        subprocess.Popen(
            [*map(str, base), "--share", f"{i}/{n}"], env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for i in range(n)
    ]
    errors = [process.communicate()[1].strip() for process in processes]
    if any(process.returncode for process in processes):
        raise Missing(f"kernels cannot be compiled: {max(errors).splitlines()[-1]}")


def run_tests(machine: Machine, features: Features, tests: list[str], flags: list[str], log: Path) -> tuple[bool, str]:
    """Whether the tests passed, and what pytest says in its last line."""
    arguments = [machine.interpreter(features), "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", *flags, *tests]
    if "-k" not in flags:
        arguments += ["-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    with log.open("w") as file:
        done = subprocess.run(
            [str(a) for a in arguments], cwd=ROOT, env=machine.environment(features), stdout=file,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return done.returncode == 0, re.sub(r"=+", "", lines[-1]).strip()


def generate(python: Path, model: Path, n_tokens: int, environment: dict[str, str]) -> str:
    arguments = [python, "-P", "-m", "edgelm", "run", model, "-p", PROMPT, "-n", str(n_tokens), "--temp", "0", "-q"]
    return command(arguments, "the model did not run", env=environment, cwd=ROOT)


def check(machine: Machine, name: str, options: argparse.Namespace, model: Path | None, expected: str) -> bool:
    """Tests and model on one feature set; prints its row of the table."""
    features = SETS[name]
    start = time.monotonic()
    environment = machine.environment(features)
    probe = command([machine.interpreter(features), "-c", PROBE], "the emulated Python does not run", env=environment)
    architecture, folder, isa = json.loads(probe)
    if (architecture, isa) != ("aarch64", features.isa):
        raise Missing(f"{name}: the emulated machine is {architecture} with {isa}, not aarch64 with {features.isa}")
    compile_kernels(features, Path(folder))
    log = machine.cache / f"{name}.log"
    passed, result = run_tests(machine, features, options.tests, shlex.split(options.flags), log)
    text = "—"
    if model is not None:
        found = generate(machine.interpreter(features), model, options.n_tokens, environment)
        passed &= found == expected
        text = "the same" if found == expected else f"{found.strip()!r}, not {expected.strip()!r}"
    minutes = (time.monotonic() - start) / 60
    print(f"| {name} | {features.emulated} | {isa} | {result} | {text} | {minutes:.1f} min |", flush=True)
    if not passed:
        print(f"{name}: see {log}", file=sys.stderr)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; without any, all of them")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders of tests")
    parser.add_argument("--flags", default="", help="for pytest, in one string")
    parser.add_argument("--model", default="smollm2", help='a model to run; "": none')
    parser.add_argument("-n", "--n-tokens", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("edgelm") / "arm")
    parser.add_argument("--emulator", type=Path, help="qemu-aarch64, if it is not to be fetched")
    parser.add_argument("--root", type=Path, help="a folder of unpacked arm64 packages with usr/bin/python3")
    parser.add_argument("--site", type=Path, help="a folder of unpacked aarch64 wheels")
    options = parser.parse_args()
    unknown = set(options.sets) - set(SETS)
    if unknown:
        parser.error(f"no set is called {', '.join(sorted(unknown))}")
    try:
        machine = Machine(options.cache.resolve(), options.emulator, options.root, options.site)
        model, expected = None, ""
        if options.model:
            from edgelm import hub

            model = hub.resolve(options.model)
            expected = generate(Path(sys.executable), model, options.n_tokens, dict(os.environ))
        print("| features | emulated | instructions | tests | text of the model | time |\n|---|---|---|---|---|---|")
        results = [check(machine, name, options, model, expected) for name in options.sets or SETS]
        return 0 if all(results) else 1
    except Missing as error:
        print(f"arm_test: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
