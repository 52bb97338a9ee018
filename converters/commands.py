"""The commands `edgelm convert` and `edgelm quantize`. `edgelm.command_group` finds them here; the rest is `pipeline`.

Standard output carries the answer; bars and notes go to standard error. Heavy modules are imported by the commands.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.disk import need_place
from edgelm.errors import UsageError
from edgelm.flags import TextFile, one_of, with_flags
from edgelm.terminal import bars, note, print_json, size

from .convert_flags import OPTION_FLAGS, RECIPE_FLAGS, adapter, override, recipe

if TYPE_CHECKING:
    from .conversion import Conversion
    from .recipe import Recipe
    from .report import Report


@click.command("convert")
@click.argument("source")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option(
    "--type",
    "--outtype",
    "type_",
    default="auto",
    show_default=True,
    metavar="TYPE",
    help="f16, q8_0, q4_k_m … (any other word lists them all); auto: what the source has.",
)
@click.option("--outfile", type=click.Path(path_type=Path), help="The same as the argument OUT.")
@click.option("--base", metavar="SOURCE", help="The model that an adapter was made for: writes a GGUF adapter.")
@with_flags(OPTION_FLAGS, RECIPE_FLAGS)
def convert_command(
    source: str, out: Path | None, type_: str, outfile: Path | None, base: str | None, **flags: Any
) -> None:
    """Convert a trained checkpoint into a GGUF file, quantized and pruned as asked for.

    SOURCE is a folder with a Hugging Face checkpoint, a GGUF file, or hf:ORG/REPO. Without OUT the file is named after
    the source and the type. Stopped for any reason, the same command goes on where it stopped; what pruning has
    computed is only kept where OUT is named.

    A folder with a LoRA adapter of peft's becomes a GGUF adapter; --base says for which model.
    """
    from .lora_export import is_adapter

    out = one_of("places to write", {"OUT": out, "--outfile": outfile})
    if base is not None or is_adapter(source):
        _adapter(Path(source), base, out, type_, flags)
        return
    flags["check_tokenizer"] = not flags.pop("no_tokenizer_check")
    flags["lora"] = tuple(map(adapter, flags["lora"]))
    flags["calibrate_chunks"] = flags["calibrate_chunks"] or None
    _convert(source, out, type_, flags)


@click.command("quantize")
@click.argument("arguments", nargs=-1, required=True, metavar="IN.gguf [OUT.gguf] TYPE [NTHREADS]")
@click.option(
    "--tensor-type-file", type=TextFile(), help="PATTERN=TYPE, separated by spaces or newlines."
)
@with_flags(RECIPE_FLAGS)
def quantize_command(arguments: tuple[str, ...], tensor_type_file: str | None, **flags: Any) -> None:
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
    if type_.lower().endswith(".gguf"):
        raise UsageError("which TYPE? edgelm quantize IN.gguf [OUT.gguf] TYPE, such as q4_k_m")
    name = "COPY" if type_.lower() == "copy" else mix(type_).name
    out = Path(given[1]) if len(given) == 3 else source.with_name(f"ggml-model-{name}.gguf")
    if tensor_type_file is not None:
        flags["tensor_types"] = (*flags["tensor_types"], *tensor_type_file.split())
    _convert(str(source), out, type_, flags)


@dataclass(frozen=True)
class _Manner:
    """How a command says what it does."""

    dry_run: bool
    as_json: bool
    quiet: bool


def _convert(source: str, out: Path | None, type_: str, flags: dict[str, Any]) -> None:
    """A conversion as its flags say."""
    from . import pipeline
    from .conversion import Options

    manner = _Manner(flags.pop("dry_run"), flags.pop("as_json"), flags.pop("quiet"))
    asked: Recipe = recipe(type_, flags)
    options = Options(**{**flags, "overrides": dict(map(override, flags["overrides"]))})
    if out is not None and options.format == "gguf" and not manner.dry_run:
        need_place(out)  # before anything is measured
    with bars(manner.quiet) as progress:
        work = None if out is None or manner.dry_run else pipeline.work_folder(out)
        conversion = pipeline.prepare(source, asked, options, work=work, progress=progress)
        if manner.dry_run:
            progress.close()
            _print_plan(conversion, manner.as_json)
            return
        path = out if out is not None else pipeline.default_out(conversion)
        report = pipeline.run(conversion, path, progress=progress)
    for text in report.notes:
        note(f"edgelm: {text}")
    if manner.as_json:
        print_json(report.to_dict())
    else:
        _print_report(report)


def _adapter(folder: Path, base: str | None, out: Path | None, type_: str, flags: dict[str, Any]) -> None:
    """An adapter becomes a GGUF adapter."""
    from .lora_export import write_adapter

    if base is None:
        raise UsageError(f"{folder} is an adapter: say --base MODEL, or merge it: edgelm convert MODEL --lora {folder}")
    path = out if out is not None else Path(f"{folder.resolve().name}.gguf")
    with bars(flags["quiet"]) as progress:
        facts = write_adapter(folder, base, path, type_, flags["offline"], progress)
    if flags["as_json"]:
        print_json(facts)
    else:
        shapes = f"{len(facts['tensors']) // 2} tensors of a {facts['architecture']} model"
        print(f"{path}: adapter, {facts['type']}, {size(facts['n_bytes'])}, {shapes}, alpha {facts['alpha']:g}")


def _print_plan(conversion: Conversion, as_json: bool) -> None:
    from .gguf_export import layout

    plan, n_bytes = conversion.plan, layout(conversion).n_bytes
    if as_json:
        print_json(
            {
                "type": plan.type,
                "n_bytes": n_bytes,
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
    print(f"{plan.type}: {size(n_bytes)}, {plan.bits_per_weight:.2f} bits per weight{fallbacks}")
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
    if report.loss is not None:
        print(_loss(report.loss))


def _loss(loss: dict[str, Any]) -> str:
    """The loss as a line."""
    whole = f"perplexity {loss['perplexity']:.3f}, {loss['ppl_ratio'] - 1:+.2%} of the source's"
    kl = f"mean KL divergence {loss['mean_kl']:.4f} (99 %: {loss['kl_99']:.3f})"
    same = f"same top token {loss['same_top']:.1%}, RMS Δp {loss['rms_dp']:.2%}"
    return f"loss on {loss['n_tokens']} tokens of {loss['text']}: {whole}, {kl}, {same}"
