"""From a plain Python function to the address of machine code, kept on disk.

A kernel is a module-level function ``def name(op, env, begin, end)`` over int64; `address` compiles it when it is first
asked for. Numba's own disk cache would do, but it takes 0.5 s to come up, never notices an edit in a file that a kernel
inlines from, and keeps the bitcode of every part. So a kernel is linked with all that it calls into one object file of
a few kilobytes that needs nothing but the C library, and `elf`, or llvmlite, loads it in a later process: Numba is only
imported to compile. Hence kernels cannot raise, allocate, or touch Python.

Objects lie in the user's cache under what may change them: the versions of Python, Numba and llvmlite, the processor,
and a hash of the sources that a kernel's module is made of, itself and what it imports of edgelm. Knows nothing of what
kernels do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from edgelm.disk import Progress, bytes_below, user_cache
from edgelm.kernels import child, elf, processor, sources

if TYPE_CHECKING:
    import subprocess

Kernel = Callable[[int, int, int, int], None]
VERSION = 2  # to be raised when `_compile` makes other code of the same source
MOST_PROCESSES = 8  # that compile at the same time
PROCESS_BYTES = 256 << 20  # that each of them takes, with Numba
KEEP_DAYS = 30  # compiled code that was not used for so long is removed

_OURS = re.compile(r"[\w.-]+-[0-9a-f]{8}-v\d+")  # names of `cache_dir`
_DRAFT = ".o.part"

_lock = threading.RLock()
_loaded: dict[Kernel | str, int] = {}
_here = threading.local()
_symbols: dict[str, int] = {}  # the same, by name: a kernel may be given both ways


# --- where compiled code is kept ---------------------------------------------------------------------------------

def _base() -> Path:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    return Path(chosen) if chosen else user_cache() / "kernels"


@functools.cache
def cache_dir() -> Path:
    """Folder for compiled code: below NUMBA_CACHE_DIR, else in the user's cache; a temporary one where that fails."""
    base = _base()
    tag, machine = sys.implementation.cache_tag, platform.machine()
    name = f"{tag}-{sys.platform}-{machine}-{_versions()}-v{VERSION}"
    with contextlib.suppress(OSError):
        (base / name).mkdir(parents=True, exist_ok=True)
        if os.access(base / name, os.W_OK | os.X_OK):
            return base / name
    import atexit
    import shutil
    import tempfile
    import warnings

    warnings.warn(
        f"{base} cannot be written to: what is compiled is lost at the end; NUMBA_CACHE_DIR names another folder",
        stacklevel=2,
    )
    folder = Path(tempfile.mkdtemp(prefix="edgelm-kernels-"), name)
    folder.mkdir()
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    return folder


def _versions() -> str:
    """Stands for the installed Numba and llvmlite, without importing them or reading through what is installed."""
    digest = hashlib.sha256()
    for name in ("numba", "llvmlite"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            digest.update(Path(spec.origin).with_name("_version.py").read_bytes())
    return digest.hexdigest()[:8]


def kept() -> tuple[Path, int]:
    """Where compiled code of all versions is, and its bytes."""
    base = _base()
    ours = (folder for folder in base.glob("*") if _OURS.fullmatch(folder.name))
    return base, sum(map(bytes_below, ours))


def prune(base: Path) -> None:
    """Removes compiled code that nothing has used for a long time, of any version of edgelm. `base` may be the folder
    of others, too: only what lies in one of the names of `cache_dir` is ours."""
    for folder in base.iterdir():
        if not _OURS.fullmatch(folder.name):
            continue
        for file in (*folder.rglob("*.o"), *folder.rglob(f"*{_DRAFT}")):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > KEEP_DAYS * 86400:
                    file.unlink()


# --- addresses ---------------------------------------------------------------------------------------------------

def address(kernel: Kernel | str) -> int:
    """Address of a compiled kernel, given as a function or as "module:function" (of this package, if there is no dot).

    Compiled or loaded at most once in a process. By name, its module is not even imported if it was compiled before.

    Raises:
        TypeError: the kernel calls something that is not there without Python, such as raising an exception.
    """
    found = _loaded.get(kernel)
    if found is None:
        wanted = getattr(_here, "wanted", None)
        if wanted is not None:
            wanted.append(kernel)
            return 0
        with _lock:
            found = _loaded.get(kernel)
            if found is None:
                found = _loaded[kernel] = _find(kernel)
    return found


@contextlib.contextmanager
def only_wanted() -> Iterator[list[Kernel | str]]:
    """Within it `address` compiles nothing in this thread: what it would have to find, it adds to a list, and gives 0.

    So a table can be written once to learn which kernels it takes, and again when they are there.
    """
    _here.wanted = []
    try:
        yield _here.wanted
    finally:
        _here.wanted = None


def is_compiled(kernel: Kernel | str) -> bool:
    """Whether its code is on disk."""
    return _path_of(kernel)[1].is_file()


def n_cores() -> int:
    """Cores of the machine that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_all(
    kernels: Iterable[Kernel | str],
    progress: Progress | None = None,
    n_processes: Callable[[], int] = n_cores,
) -> None:
    """Compiles or loads all of `kernels`. `progress("compiling kernels", done, total)` is called after each one, and
    again and again while one is waited for.

    Those given by name are compiled by other processes, because Numba compiles on one core only, and because Numba,
    once imported, takes more memory than many a model. Where no process can be started this one does it. There are at
    most `n_processes()`, of PROCESS_BYTES each; never more than MOST_PROCESSES, or than one for two kernels.
    """
    todo = list(dict.fromkeys(kernels))
    missing = [kernel for kernel in todo if isinstance(kernel, str) and not is_compiled(kernel)]
    done = 0

    def tell() -> None:
        if progress is not None:
            progress("compiling kernels", done, len(todo))

    with contextlib.closing(_Helpers(missing, n_processes() if missing else 0)) as helpers:
        for kernel in sorted(todo, key=missing.__contains__):  # by the time that it gets to them, they are there
            while helpers.are_at(kernel):
                time.sleep(0.01)
                tell()
            address(kernel)
            done += 1
            tell()


class _Helpers:
    """Processes that compile kernels into the cache, each one after the other.

    What kernels of a module have in common is compiled once in a process, and takes most of the time. So a process goes
    on with the module that it is at, and then with one that no other has begun.
    """

    def __init__(self, missing: list[str], n_processes: int) -> None:
        self._left = list(missing)
        self._at: dict[subprocess.Popen[bytes], list[str]] = {}  # what each was given; it is at the last of them
        if not missing or not sys.executable or getattr(sys, "frozen", False):
            return
        for _ in range(min(n_processes, MOST_PROCESSES, -(-len(missing) // 2))):
            with contextlib.suppress(OSError):  # then this process compiles them
                self._at[_start_helper()] = []

    def are_at(self, kernel: Kernel | str) -> bool:
        """Whether a kernel, of those that are missing or any other one, is still to come. Hands out work."""
        for helper, given in list(self._at.items()):
            if helper.poll() is not None:
                self._end(helper)  # what it was at is left to this process, which will see why it failed
            elif self._left and (not given or is_compiled(given[-1])):
                self._give(helper, given)
        under_way = kernel in self._left or any(kernel in given for given in self._at.values())
        return bool(self._at) and under_way and not is_compiled(kernel)

    def _give(self, helper: subprocess.Popen[bytes], given: list[str]) -> None:
        begun = {_parts(name)[0] for names in self._at.values() for name in names}
        mine = _parts(given[-1])[0] if given else None
        modules = [_parts(name)[0] for name in self._left]
        others = (i for i, module in enumerate(modules) if module not in begun)
        given.append(self._left.pop(modules.index(mine) if mine in modules else next(others, 0)))
        with contextlib.suppress(OSError):  # it has just ended
            helper.stdin.write(f"{given[-1]}\n".encode())  # type: ignore[union-attr]

    def _end(self, helper: subprocess.Popen[bytes]) -> None:
        del self._at[helper]
        helper.terminate()
        helper.wait()
        helper.stdin.close()  # type: ignore[union-attr]

    def close(self) -> None:
        for helper in list(self._at):
            self._end(helper)


def _start_helper() -> subprocess.Popen[bytes]:
    import subprocess

    return subprocess.Popen(
        child.command("-c", "from edgelm.kernels import compiler; compiler.help_out()"),
        env={**child.environment(), "NUMBA_CACHE_DIR": str(cache_dir().parent)},
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, bufsize=0,
    )


def help_out() -> None:
    """Compiles the kernels whose names come in, a line each, as long as they can be kept."""
    for name in map(str.strip, sys.stdin):
        address(name)
        if not is_compiled(name):
            return


def _path_of(kernel: Kernel | str) -> tuple[str, Path]:
    """The symbol of a kernel's code, and the file it is kept in."""
    if isinstance(kernel, str):
        module, name = _parts(kernel)
        file = _file_of(module)
    else:
        assert isinstance(kernel, FunctionType)
        module, name, file = kernel.__module__, kernel.__qualname__, kernel.__code__.co_filename
    symbol = f"{module}.{name}.{sources.digest(file)}"
    return symbol, cache_dir() / compiled_for().folder / f"{symbol}.o"


def _find(kernel: Kernel | str) -> int:
    symbol, path = _path_of(kernel)
    if symbol in _symbols:
        return _symbols[symbol]
    code = _read(path)
    if code is None:
        code = _compile(_function(kernel), symbol)
        _write(path, code)
    _symbols[symbol] = _load(code, symbol)
    return _symbols[symbol]


def _function(kernel: Kernel | str) -> FunctionType:
    if isinstance(kernel, FunctionType):
        return kernel
    module, name = _parts(kernel)
    function: FunctionType = getattr(importlib.import_module(module), name)
    return function


def _parts(kernel: str) -> tuple[str, str]:
    """Module and function of "module:function"."""
    module, _, name = kernel.partition(":")
    return module if "." in module else f"edgelm.kernels.{module}", name


def _file_of(module: str) -> str:
    """Where a module's source is, without importing it."""
    if module.startswith("edgelm.kernels."):
        return os.path.join(os.path.dirname(__file__), module.rpartition(".")[2] + ".py")
    spec = importlib.util.find_spec(module)
    return spec.origin if spec and spec.origin else ""


def _read(path: Path) -> bytes | None:
    """The object file at `path`, if it is there and whole: it ends with its own checksum."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code, checksum = data[:-32], data[-32:]
    if hashlib.sha256(code).digest() != checksum:
        return None
    with contextlib.suppress(OSError):  # another process may have removed it meanwhile
        if time.time() - path.stat().st_mtime > 86400:
            os.utime(path)  # still in use
    return code


def _write(path: Path, code: bytes) -> None:
    import tempfile

    with contextlib.suppress(OSError):  # then it is compiled again next time
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)  # which another process may do as well
            prune(cache_dir().parent)
        file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=_DRAFT, delete=False)  # noqa: SIM115
        try:
            with file:
                file.write(code + hashlib.sha256(code).digest())
            os.replace(file.name, path)
        except OSError:  # a full disk
            os.unlink(file.name)
            raise


@functools.cache
def compiled_for() -> processor.Processor:
    """The processor that kernels are for."""
    return processor.find(cache_dir())


@functools.cache
def _engine() -> Any:
    """What LLVM loads code into. Never freed: threads may be in it to the very end."""
    llvm = processor.llvm()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _load(code: bytes, symbol: str) -> int:
    """Address of `symbol` in an object file, whose only public name it is."""
    if elf.USABLE:
        with contextlib.suppress(elf.Unknown, OSError):  # then LLVM may know more
            return elf.load(code, symbol)
    engine = _engine()
    engine.add_object_file(processor.llvm().ObjectFileRef.from_data(code))
    engine.finalize_object()
    return int(engine.get_function_address(symbol))


def forget_llvm() -> None:
    """Gives back the pages of LLVM's code, 30 MB that loading has touched: those of the file, which come again."""
    import ctypes
    import mmap

    if not sys.platform.startswith("linux") or "llvmlite.binding" not in sys.modules:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if "libllvmlite" in line and line.split()[1] == "r-xp":  # never written to
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                madvise(start, end - start, mmap.MADV_DONTNEED)


# --- compiling: the only part that needs Numba, and its insides -----------------------------------------------------

def _compile(kernel: FunctionType, symbol: str) -> bytes:
    """Object file with the one public function `symbol`: the kernel, and inside it whatever it calls."""
    from llvmlite import ir
    from numba import types
    from numba.core.ccallback import _CFuncCompiler
    from numba.core.compiler import Compiler
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    class Bare(_CFuncCompiler):
        """Compiles a function up to LLVM's language, without any wrapper."""

        def _customize_flags(self, flags: Any) -> Any:
            flags = super()._customize_flags(flags)
            flags.no_cfunc_wrapper = True
            return flags

    signature = (types.int64,) * 4
    with global_compiler_lock, _only_linked():
        bare = Bare(kernel, cpu_target, {"nopython": True, "error_model": "numpy"}, {}, Compiler)
        compiled = bare.compile(signature, types.void)
        library, context = compiled.library, cpu_target.target_context

        # A C function around Numba's, which takes places for a result and an exception that never come.
        wrapper = context.create_module(f"entry of {symbol}")
        inner_type = context.call_conv.get_function_type(types.void, signature)
        inner = ir.Function(wrapper, inner_type, compiled.fndesc.llvm_func_name)
        entry = ir.Function(wrapper, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4), symbol)
        builder = ir.IRBuilder(entry.append_basic_block())
        status, _ = context.call_conv.call_function(builder, inner, types.void, signature, entry.args)
        with builder.if_then(status.is_error, likely=False):
            # Nobody is there to catch it. If the optimiser cannot show that this never runs, `_prove_bare` sees it.
            builder.call(ir.Function(wrapper, ir.FunctionType(ir.VoidType(), []), "numba_raise"), [])
        builder.ret_void()
        library.add_ir_module(wrapper)

        module = library._final_module
        for part in dict.fromkeys(library._linking_libraries):
            module.link_in(part._get_module_for_linking(), preserve=True)
        for item in (*module.functions, *module.global_variables):
            if not item.is_declaration and item.name != symbol:
                item.linkage = "internal"
        passes, settings = library._codegen._module_pass_manager()
        passes.run(module, settings)
        _prove_bare(module, symbol)
        return library._codegen._tm.emit_object(module)


@contextlib.contextmanager
def _only_linked() -> Iterator[None]:
    """Within it Numba makes of what a kernel calls only what is linked into the kernel, and optimised as a part of it.

    As it does it else, each of these functions is optimised with all that it calls, again by who calls it, becomes
    machine code, and has wrappers to be called by Python: a third of the time that it takes to compile.
    """
    from numba.core.codegen import JITCodeLibrary
    from numba.core.dispatcher import _FunctionCompiler
    from numba.core.registry import cpu_target

    class Linked(JITCodeLibrary):
        def _optimize_final_module(self) -> None: ...

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

    def executable(library: Any, function: Any, environment: object) -> Callable[..., object]:
        """For Numba to know a function by, each by another one; nobody has a reason to call it, and it refuses."""
        library._ensure_finalized()
        return cast(Callable[..., object], function.mangled_name.join)

    def without_wrappers(self: object, flags: Any) -> Any:
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        return flags

    context, customized = cpu_target.target_context, _FunctionCompiler._customize_flags
    context.codegen()._library_class, context.get_executable = Linked, executable
    _FunctionCompiler._customize_flags = without_wrappers
    try:
        yield
    finally:
        _FunctionCompiler._customize_flags = customized
        del context.codegen()._library_class, context.get_executable


def _prove_bare(module: Any, symbol: str) -> None:
    """Nothing may be left that only a process with Numba and Python has."""
    for item in (*module.functions, *module.global_variables):
        if item.is_declaration and not item.name.startswith("llvm."):
            known = processor.llvm().address_of_symbol(item.name)
            if known is None or item.name.startswith(("numba_", "NRT_", "Py", "_Py", ".numba")):
                raise TypeError(
                    f"kernel {symbol} needs {item.name}, which is not there: kernels neither raise, nor allocate, nor "
                    "use Python"
                )


def _after_fork() -> None:
    """A thread that was compiling has stayed behind, with the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
