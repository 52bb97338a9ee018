"""The workshop: a trained checkpoint becomes GGUF or ONNX, quantized and pruned. The runtime never needs it.

from converters import Options, Recipe, convert

options = Options(calibrate=Path("text.txt"), prune=("depth=25%",), max_kld=0.1)
report = convert("path/of/a/checkpoint", "model.gguf", Recipe("q4_k_m"), options, progress=print)
"""

from typing import Any

EDGELM_CONVERTERS = True  # the command line looks for this mark: another package of the same name exists

_HOMES = {
    "Options": "conversion", "Recipe": "recipe", "Report": "report",
    "convert": "pipeline", "prepare": "pipeline", "run": "pipeline",
}  # fmt: skip
__all__ = ["EDGELM_CONVERTERS", "Options", "Recipe", "Report", "convert", "prepare", "run"]


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is asked for: `edgelm --help` imports this package, too."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
