"""The commands `edgelm convert` and `edgelm quantize`. `edgelm.cli` finds them here; the rest is `gguf_export`.

Standard output carries the answer; bars and notes go to standard error. Heavy modules are imported by the commands.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.errors import UsageError
from edgelm.flags import with_flags
from edgelm.terminal import bars, note, print_json, size

if TYPE_CHECKING:
    from .gguf_export import Conversion
    from .recipe import Recipe
    from .report import Report

QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only print what would become of each tensor.")
ALLOW_REQUANTIZE = click.option("--allow-requantize", is_flag=True, help="Quantize weights that are quantized already.")
TENSOR_TYPE = click.option(
    "--tensor-type",
    "tensor_types",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Another type for tensors in whose name the regular expression is found. May be repeated.",
)
OUTPUT_TYPE = click.option("--output-tensor-type", "output_type", default="", help="Type of output.weight.")
EMBEDDING_TYPE = click.option("--token-embedding-type", "embedding_type", default="", help="Type of the embedding.")
LEAVE_OUTPUT = click.option("--leave-output-tensor", "leave_output", is_flag=True, help="Leave output.weight as it is.")
PURE = click.option("--pure", is_flag=True, help="One type for all matrices, no mix.")
NO_FALLBACK = click.option(
    "--no-fallback", is_flag=True, help="Fail where the blocks of a type do not divide a tensor's rows."
)
OVERRIDE = click.option(
    "--override-kv", "overrides", multiple=True, metavar="KEY=TYPE:VALUE", help="Change or add metadata."
)
IMATRIX = click.option(
    "--imatrix", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Which columns matter, measured by `edgelm imatrix` or llama-imatrix.",
)  # fmt: skip
# How a file is made; `convert` and `quantize` have them all.
RECIPE_FLAGS = (
    ALLOW_REQUANTIZE, TENSOR_TYPE, OUTPUT_TYPE, EMBEDDING_TYPE, LEAVE_OUTPUT, PURE, NO_FALLBACK, IMATRIX, OVERRIDE,
    DRY_RUN, JSON, QUIET,
)  # fmt: skip


@click.command("convert")
@click.argument("source")
@click.argument("out", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--type", "--outtype", "type_", default="auto", show_default=True, metavar="TYPE", help="f16, q8_0, q4_k_m, …"
)
@click.option("--format", "format_", type=click.Choice(["gguf"]), default="gguf", show_default=True)
@click.option("--outfile", type=click.Path(dir_okay=False, path_type=Path), help="The same as the argument OUT.")
@click.option("--model-name", "name", default="", help="Name of the model in the file.")
@click.option("--pre", default="", help="Name of the pre-tokenizer, instead of what tokenizer.json defines.")
@click.option("--no-tokenizer-check", is_flag=True, help="Do not compare the tokenizer with the source's.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@with_flags(RECIPE_FLAGS)
def convert_command(
    source: str,
    out: Path | None,
    type_: str,
    format_: str,
    outfile: Path | None,
    name: str,
    pre: str,
    no_tokenizer_check: bool,
    imatrix: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Convert a trained checkpoint into a GGUF file, quantized as asked for.

    SOURCE is a folder with a Hugging Face checkpoint, a GGUF file, or hf:ORG/REPO. Without OUT the file is named after
    the source and the type. Stopped for any reason, the same command goes on where it stopped.
    """
    settings: dict[str, Any] = {"name": name, "pre": pre, "check_tokenizer": not no_tokenizer_check, "offline": offline}
    settings["imatrix"] = imatrix
    out = out if out is not None else outfile
    _convert(source, out, _recipe(type_, choices), settings, overrides, dry_run, as_json, quiet)


@click.command("quantize")
@click.argument("arguments", nargs=-1, required=True, metavar="IN.gguf [OUT.gguf] TYPE [NTHREADS]")
@click.option(
    "--tensor-type-file", type=click.File(encoding="utf-8"), help="PATTERN=TYPE, separated by spaces or newlines."
)
@with_flags(RECIPE_FLAGS)
def quantize_command(
    arguments: tuple[str, ...],
    tensor_type_file: Any,
    imatrix: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Quantize a GGUF file: llama-quantize's arguments, and COPY as a TYPE that changes nothing.

    Without OUT.gguf the file is called ggml-model-TYPE.gguf, beside IN.gguf.
    """
    from .mixes import mix

    given = list(arguments)
    if len(given) > 2 and given[-1].isdecimal() and not given[-2].lower().endswith(".gguf"):
        given.pop()  # how many threads: all of them are used
    if len(given) not in (2, 3):
        raise UsageError("edgelm quantize IN.gguf [OUT.gguf] TYPE [NTHREADS]")
    source, type_ = Path(given[0]), given[-1]
    name = "COPY" if type_.lower() == "copy" else mix(type_).name
    out = Path(given[1]) if len(given) == 3 else source.with_name(f"ggml-model-{name}.gguf")
    if tensor_type_file is not None:
        choices["tensor_types"] = (*choices["tensor_types"], *tensor_type_file.read().split())
    _convert(str(source), out, _recipe(type_, choices), {"imatrix": imatrix}, overrides, dry_run, as_json, quiet)


def _recipe(type_: str, choices: dict[str, Any]) -> Recipe:
    from .recipe import Recipe

    pairs = []
    for text in choices.pop("tensor_types"):
        pattern, equals, format = text.rpartition("=")
        if not equals or not pattern or not re.fullmatch(r"\w+", format):
            raise UsageError(f"--tensor-type {text}: not of the form PATTERN=TYPE")
        pairs.append((pattern, format))
    return Recipe(type_, tuple(pairs), **choices)


def _convert(
    source: str,
    out: Path | None,
    recipe: Recipe,
    settings: dict[str, Any],
    overrides: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from . import gguf_export

    settings["overrides"] = dict(gguf_export.parse_override(text) for text in overrides)
    with bars(quiet) as progress:
        conversion = gguf_export.prepare(source, recipe, progress=progress, **settings)
        if dry_run:
            progress.close()
            _print_plan(conversion, as_json)
            return
        path = out if out is not None else gguf_export.default_out(conversion)
        report = gguf_export.run(conversion, path, progress=progress)
    for text in report.notes:
        note(f"edgelm: {text}")
    if as_json:
        print_json(report.to_dict())
    else:
        _print_report(report)


def _print_plan(conversion: Conversion, as_json: bool) -> None:
    plan = conversion.plan
    if as_json:
        print_json(
            {
                "type": plan.type,
                "n_bytes": conversion.layout.n_bytes,
                "bits_per_weight": round(plan.bits_per_weight, 4),
                "notes": list(conversion.notes),
                "tensors": [step.facts() for step in plan.steps],
            }
        )
        return
    width = max(len(step.name) for step in plan.steps)
    for step in plan.steps:
        shape = " x ".join(map(str, step.shape))
        remarks = [f"instead of {step.wanted.name}"] if step.is_fallback else []
        remarks += [step.change] if step.change else []
        line = f"{step.name:<{width}}  {shape:>16}  {step.kind:>6} -> {step.format.name:<6} {step.n_bytes:>12}"
        print(f"{line}  {'; '.join(remarks)}".rstrip())
    fallbacks = f", {len(plan.fallbacks)} of {len(plan.steps)} tensors fall back" if plan.fallbacks else ""
    print(f"{plan.type}: {size(conversion.layout.n_bytes)}, {plan.bits_per_weight:.2f} bits per weight{fallbacks}")
    for text in conversion.notes:
        note(f"edgelm: {text}")


def _print_report(report: Report) -> None:
    types = ", ".join(f"{name} {size(n)}" for name, n in sorted(report.types.items(), key=lambda item: -item[1]))
    print(f"{report.out}: {report.type}, {size(report.n_bytes)}, {report.bits_per_weight:.2f} bits per weight")
    print(f"types: {types}")
    if report.tokenizer_texts:
        print(f"tokenizer: the same as the source's on {report.tokenizer_texts} texts")
    groups: dict[str, list[str]] = {}
    for text in report.fallbacks:
        name, _, change = text.partition(": ")
        groups.setdefault(change, []).append(name)
    for change, names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"fallback: {change} for {names[0]}{more}")
