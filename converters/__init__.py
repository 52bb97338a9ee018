"""The workshop: a trained checkpoint becomes GGUF or ONNX. The runtime never needs it.

from converters import Recipe, convert

report = convert("path/of/a/checkpoint", "model.gguf", Recipe("q4_k_m"), progress=print)
"""

from typing import Any

EDGELM_CONVERTERS = True  # the command line looks for this mark: another package of the same name exists

__all__ = ["EDGELM_CONVERTERS", "Recipe", "convert", "prepare"]
_HOMES = {"Recipe": "recipe", "convert": "gguf_export", "prepare": "gguf_export"}


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is asked for: `edgelm --help` imports this package, too."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
