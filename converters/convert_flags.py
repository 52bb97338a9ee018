"""The flags of `edgelm convert` and `edgelm quantize`, and what their texts mean. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.errors import UsageError

if TYPE_CHECKING:
    from .recipe import Recipe

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


class Count(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number that may have a unit: 800M, 1.5G, 135000000."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGB]?)", str(value).strip(), re.IGNORECASE)
        if not match or not float(match[1]):
            self.fail(f"{value!r:.40} is no number such as 800M or 1.5G", param, ctx)
        return round(float(match[1]) * _UNITS[match[2].upper()])


# How a file is made; `convert` and `quantize` have them all.
RECIPE_FLAGS = (
    click.option("--allow-requantize", is_flag=True, help="Quantize weights that are quantized already."),
    click.option(
        "--tensor-type", "tensor_types", multiple=True, metavar="PATTERN=TYPE",
        help="Another type for tensors in whose name the regular expression is found. May be repeated.",
    ),
    click.option("--output-tensor-type", "output_type", default="", help="Type of output.weight."),
    click.option("--token-embedding-type", "embedding_type", default="", help="Type of the embedding."),
    click.option("--leave-output-tensor", "leave_output", is_flag=True, help="Leave output.weight as it is."),
    click.option("--pure", is_flag=True, help="One type for all matrices, no mix."),
    click.option("--no-fallback", is_flag=True, help="Fail where the blocks of a type do not divide a tensor's rows."),
    click.option("--imatrix", type=_FILE, help="Which columns matter, measured by `edgelm imatrix` or llama-imatrix."),
    click.option(
        "--override-kv", "overrides", multiple=True, metavar="KEY=TYPE:VALUE", help="Change or add metadata."
    ),
    click.option("--dry-run", is_flag=True, help="Only print what would become of each tensor."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
)  # fmt: skip

# What may be done to a model on its way: fields of `conversion.Options`.
OPTION_FLAGS = (
    click.option(
        "--format", type=click.Choice(["gguf", "hf", "onnx"]), default="gguf", show_default=True,
        help="What is written: a GGUF file, or a folder for transformers or onnxruntime.",
    ),
    click.option(
        "--onnx-ops", type=click.Choice(["ort", "standard"]), default="ort", show_default=True,
        help="Operators of onnxruntime, or of the standard alone.",
    ),
    click.option("--onnx-block", type=int, default=0, help="Weights that share a scale: 16, 32, 64, 128 or 256."),
    click.option("--model-name", "name", default="", help="Name of the model in the file."),
    click.option("--pre", default="", help="Name of the pre-tokenizer, instead of what tokenizer.json defines."),
    click.option("--no-tokenizer-check", is_flag=True, help="Do not compare the tokenizer with the source's."),
    click.option("--offline", is_flag=True, help="Never touch the network."),
    click.option(
        "--lora", multiple=True, metavar="DIR[:SCALE]", help="Merge an adapter of peft's. May be repeated."
    ),
    click.option("--calibrate", type=_FILE, help="A text that tells which weights matter."),
    click.option(
        "--calibrate-ctx", "n_ctx", type=click.IntRange(8), default=512, show_default=True,
        help="Tokens of a chunk of text.",
    ),
    click.option(
        "--calibrate-chunks", type=click.IntRange(0), default=16, show_default=True,
        help="Read so many chunks at most (0: all).",
    ),
    click.option(
        "--method", type=click.Choice(["auto", "rtn", "imatrix", "gptq", "awq"]), default="auto", show_default=True,
        help="How weights are rounded; all but rtn need --calibrate. auto: gptq with it, rtn without or at 8 bits.",
    ),
    click.option(
        "--prune", multiple=True, metavar="SPEC", help="Cut away: depth=25%, ffn=20%, heads=…, hidden=…, vocab=FILE."
    ),
    click.option("--target-params", type=Count(), help="Prune until so many parameters are left."),
    click.option(
        "--target-bpw", type=click.FloatRange(1, 32),
        help="Choose types by what they cost: so many bits per weight.",
    ),
    click.option("--target-size", "target_bytes", type=Count(), help="The same: so many bytes, 800M, 1.5G."),
    click.option(
        "--eval", "evaluate", type=_FILE,
        help="A text to measure the loss on; by default the end of the text of --calibrate, then kept back.",
    ),
    click.option(
        "--eval-chunks", "evaluate_chunks", type=click.IntRange(1), default=16, show_default=True,
        help="Measure on so many chunks at most.",
    ),
    click.option("--max-kld", type=click.FloatRange(0), help="Fail if the mean KL divergence is higher."),
    click.option(
        "--report-html", "html", type=click.Path(dir_okay=False, path_type=Path), help="Draw the report as a page."
    ),
)  # fmt: skip


def adapter(text: str) -> tuple[Path, float]:
    """DIR[:SCALE] of --lora."""
    folder, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(folder), float(scale)
    except ValueError:
        return Path(text), 1.0


def override(text: str) -> tuple[str, Any]:
    """KEY=TYPE:VALUE, as llama-quantize takes it; types are int, float, bool and str."""
    match = re.fullmatch(r"([^=]+)=(int|float|bool|str):(.*)", text, re.DOTALL)
    if not match:
        raise UsageError(f"--override-kv {text}: not of the form KEY=TYPE:VALUE with TYPE int, float, bool or str")
    key, kind, value = match.groups()
    try:
        if kind == "bool":
            return key, {"true": True, "false": False}[value]
        if kind == "int" and not -(2**63) <= int(value) < 2**64:
            raise ValueError
        return key, {"int": int, "float": float, "str": str}[kind](value)
    except (KeyError, ValueError):
        raise UsageError(f"--override-kv {key}: {value!r:.40} is no {kind}") from None


def recipe(type_: str, flags: dict[str, Any]) -> Recipe:
    """The recipe that the flags say; takes out of `flags` what it used."""
    from .recipe import Recipe

    pairs = []
    for text in flags.pop("tensor_types"):
        pattern, equals, format = text.rpartition("=")
        if not equals or not pattern or not re.fullmatch(r"\w+", format):
            raise UsageError(f"--tensor-type {text}: not of the form PATTERN=TYPE")
        pairs.append((pattern, format))
    names = ("output_type", "embedding_type", "leave_output", "pure", "no_fallback", "allow_requantize")
    return Recipe(type_, tuple(pairs), **{name: flags.pop(name) for name in names})
