"""Run quantized language models on CPUs.

    import edgelm

    model = edgelm.load("smollm2")                                    # a path, an alias, hf:…, pypi:…
    print(model.generate("The capital of France is", max_tokens=8, temperature=0))
    for response in model.chat([{"role": "user", "content": "Hello!"}]):
        print(response.text, end="", flush=True)

Names are resolved when they are first used, so that importing the package loads neither NumPy nor Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    CacheFull,
    ContextFull,
    EdgelmError,
    FormatError,
    SourceError,
    TemplateError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .model import Model, generate, load, stream_generate
    from .sampling import GREEDY, Sampling
    from .session import Response, Session
    from .tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "GREEDY",
    "CacheFull",
    "ChatTemplate",
    "ContextFull",
    "EdgelmError",
    "FormatError",
    "Model",
    "Response",
    "Sampling",
    "Session",
    "SourceError",
    "TemplateError",
    "Tokenizer",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "generate",
    "load",
    "stream_generate",
]

_HOME = {  # where a name that is not loaded yet lives
    "ChatTemplate": "chat",
    "GREEDY": "sampling",
    "Model": "model",
    "Response": "session",
    "Sampling": "sampling",
    "Session": "session",
    "Tokenizer": "tokenizer",
    "generate": "model",
    "load": "model",
    "stream_generate": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgelm' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
