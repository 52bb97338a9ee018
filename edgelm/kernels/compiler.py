"""From a plain Python function to the address of machine code, kept on disk.

A kernel is a module-level function ``def name(op, env, begin, end)`` over int64; `address` compiles it when it is first
asked for. Numba's own disk cache would do, but it takes 0.5 s to come up, never notices an edit in a file that a kernel
inlines from, and keeps the bitcode of every part. So a kernel is linked with all that it calls into one object file of
a few kilobytes that needs nothing but the C library, and llvmlite alone loads it in a later process: Numba is only
imported to compile. Hence kernels cannot raise, allocate, or touch Python.

Objects lie in a folder of the user's cache named by what may change them: the sources of this package, the versions of
Python, Numba and llvmlite, and the processor. Knows nothing of what kernels do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

Kernel = Callable[[int, int, int, int], None]
KEEP_DAYS = 30  # folders of other versions that were not used for so long are removed

_lock = threading.RLock()
_loaded: dict[Kernel | str, int] = {}
_here = threading.local()
_symbols: dict[str, int] = {}  # the same, by name: a kernel may be given both ways


# --- where compiled code is kept ---------------------------------------------------------------------------------

@functools.cache
def fingerprint() -> str:
    """Hash of what compiled kernels depend on, but for the processor."""
    digest = hashlib.sha256()
    for package in ("numba", "llvmlite"):
        digest.update(f"{package} {metadata.version(package)}\n".encode())
    digest.update(f"{sys.implementation.cache_tag} {sys.platform} {platform.machine()}\n".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cache_dir() -> Path:
    """Folder for compiled code: below NUMBA_CACHE_DIR, else of the user's cache; a temporary one where that fails."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        base = Path(chosen)
    else:
        import platformdirs

        base = Path(platformdirs.user_cache_dir("edgelm", appauthor=False)) / "kernels"
    folder = base / fingerprint()
    try:
        new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.utime(folder)
        if new and not chosen:
            _prune(base, folder)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="edgelm-kernels-"))
    return folder


def _prune(base: Path, current: Path) -> None:
    """Removes what versions that nobody uses any more have left."""
    import shutil

    for folder in base.iterdir():
        with contextlib.suppress(OSError):
            if folder != current and time.time() - folder.stat().st_mtime > KEEP_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    """Points Numba's own cache to our folder, for functions called from Python. Comes before Numba is imported."""
    folder = str(cache_dir())
    config = sys.modules.get("numba.core.config")
    if config is None:
        os.environ.setdefault("NUMBA_CACHE_DIR", folder)
    elif not config.CACHE_DIR:
        config.CACHE_DIR = folder  # the application imported Numba first


@functools.cache
def _source_hash(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError:
        return "none"


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


def compile_all(
    kernels: Iterable[Kernel | str], progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Compiles or loads all of `kernels`. `progress(name of the kernel, done, total)` is called after each one."""
    todo = list(dict.fromkeys(kernels))
    for done, kernel in enumerate(todo, 1):
        address(kernel)
        if progress is not None:
            progress(kernel if isinstance(kernel, str) else kernel.__name__, done, len(todo))


def _find(kernel: Kernel | str) -> int:
    if isinstance(kernel, str):
        module, _, name = kernel.partition(":")
        module = module if "." in module else f"edgelm.kernels.{module}"
        source = ""
    else:
        assert isinstance(kernel, FunctionType)
        module, name = kernel.__module__, kernel.__qualname__
        inside = module.startswith("edgelm.kernels.")  # then the fingerprint knows its source
        source = "" if inside else "." + _source_hash(kernel.__code__.co_filename)
    symbol = f"{module}.{name}{source}"
    if symbol in _symbols:
        return _symbols[symbol]
    path = cache_dir() / _processor() / f"{symbol}.o"
    code = _read(path)
    if code is None:
        function = kernel if isinstance(kernel, FunctionType) else getattr(importlib.import_module(module), name)
        code = _compile(function, symbol)
        _write(path, code)
    _symbols[symbol] = _load(code, symbol)
    return _symbols[symbol]


def _read(path: Path) -> bytes | None:
    """The object file at `path`, if it is there and whole: it ends with its own checksum."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code, checksum = data[:-32], data[-32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> None:
    with contextlib.suppress(OSError):  # then it is compiled again next time
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code + hashlib.sha256(code).digest())
        os.replace(file.name, path)


@functools.cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    with contextlib.suppress(RuntimeError):  # newer versions do it themselves and refuse
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


@functools.cache
def _processor() -> str:
    """Name of a folder for what code is generated for: what Numba decides by."""
    llvm = _llvm()
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES") or llvm.get_host_cpu_features().flatten()
    return f"{name}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@functools.cache
def _engine() -> Any:
    """What all code of this process is loaded into. Never freed: threads may be in it to the very end."""
    llvm = _llvm()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _load(code: bytes, symbol: str) -> int:
    """Address of `symbol` in an object file, whose only public name it is."""
    engine = _engine()
    engine.add_object_file(_llvm().ObjectFileRef.from_data(code))
    engine.finalize_object()
    return int(engine.get_function_address(symbol))


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
    with global_compiler_lock:
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
        library._optimize_final_module()
        _prove_bare(module, symbol)
        return library._codegen._tm.emit_object(module)


def _prove_bare(module: Any, symbol: str) -> None:
    """Nothing may be left that only a process with Numba and Python has."""
    for item in (*module.functions, *module.global_variables):
        if item.is_declaration and not item.name.startswith("llvm."):
            known = _llvm().address_of_symbol(item.name)
            if known is None or item.name.startswith(("numba_", "NRT_", "Py", "_Py", ".numba")):
                raise TypeError(
                    f"kernel {symbol} needs {item.name}, which is not there: kernels neither raise, nor allocate, nor "
                    "use Python"
                )
