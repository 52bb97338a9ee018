"""The flags that several commands share, under llama.cpp's names, as one table each; and what they mean together.

A flag of `SAMPLING_FLAGS` is a field of `edgelm.sampling.Sampling`; its default is that field's. A flag left out
stays None and is not passed on.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from edgelm.errors import FormatError, UsageError
from edgelm.sampling_parameters import Sampling
from edgelm.terminal import bars, note

if TYPE_CHECKING:
    from edgelm.model import Model

Command = TypeVar("Command", bound=Callable[..., Any])
Given = TypeVar("Given")
# What `edgelm.load` takes of them.
LOAD_SETTINGS = (
    "ctx_size", "threads", "threads_batch", "kv_type", "max_tokens_per_run", "interpreter", "packed", "offline",
    "chat_template", "batch_invariant",
)  # fmt: skip
CACHE_TYPES = ("f16", "bf16", "f32", "q8_0", "q4_0")  # `kv_types.KV_TYPES`, which --help has no time to import


def standard_input() -> str:
    """All of standard input. FormatError if it is no text in UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise FormatError(f"standard input: no text in UTF-8: {error.reason} at byte {error.start}") from None


def the_text(text: str | None, prompt: str | None, file: str | None, whole: bool = True) -> str:
    """The text of the argument, of -p or of -f, else that of standard input.

    whole: with the newline that ends a file or standard input.
    """
    found = one_of("texts", {"the argument": text, "-p": prompt, "-f": file})
    if found is None:
        if sys.stdin.isatty():
            note("edgelm: reads the text from the terminal; Ctrl-D ends it")
        found = file = standard_input()
    return found if whole or file is None else found.removesuffix("\n")


class TextFile(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A file of text in UTF-8, - for standard input; the value is the text."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from edgelm.disk import read_text

        if value == "-":
            return standard_input()
        try:
            return read_text(Path(value))
        except (OSError, ValueError) as error:
            self.fail(f"{value!r}: {getattr(error, 'strerror', None) or error}", param, ctx)


def one_of(what: str, given: Mapping[str, Given | None]) -> Given | None:
    """The value that was given, of flags that mean the same (None: not given); UsageError if several were."""
    found = {flag: value for flag, value in given.items() if value is not None}
    if len(found) > 1:
        raise UsageError(f"two {what} are given, by {' and by '.join(found)}; give one")
    return next(iter(found.values()), None)


def _flag(*names: str, **settings: Any) -> Callable[[Command], Command]:
    return click.option(*names, default=settings.pop("default", None), **settings)


MODEL_FLAGS = (
    _flag("-c", "--ctx-size", type=click.IntRange(0), help="Context window in tokens (0: as the model was trained)."),
    _flag("-t", "--threads", type=click.IntRange(1), help="Threads for generation."),
    _flag("-tb", "--threads-batch", type=click.IntRange(1), help="Threads for prompts."),
    _flag(
        "-ub",
        "--ubatch-size",
        "max_tokens_per_run",
        type=click.IntRange(1),
        help="Tokens of a prompt that are computed at a time.",
    ),
    _flag(
        "-ctk", "--cache-type-k", type=click.Choice(CACHE_TYPES),
        help="Type of cached keys; else bf16 where the processor multiplies pairs of them, f16 elsewhere.",
    ),
    _flag("-ctv", "--cache-type-v", type=click.Choice(CACHE_TYPES), help="The same of cached values."),
    _flag(
        "--interpreter",
        type=click.Choice(["auto", "program", "reference", "onnxruntime"]),
        help="What computes: compiled kernels, or plain NumPy (slow, exact); of ONNX models, onnxruntime.",
    ),
    _flag(
        "--packed",
        metavar="[auto|memory|file|PATH]",
        help="Where packed weights are: in memory, or in a mapped file, such as `edgelm pack` makes.",
    ),
    _flag("--no-mmap", "no_mmap", is_flag=True, default=False, help="The same as --packed memory."),
    _flag(
        "--batch-invariant",
        is_flag=True,
        default=False,
        help="Do without a processor's matrix unit: a cached answer is then the same bit for bit.",
    ),
    _flag("--offline", is_flag=True, default=False, help="Never touch the network."),
)


def _without_effect(*names: str, why: str, **settings: Any) -> Callable[[Command], Command]:
    """A flag that scripts for llama.cpp have, and that changes nothing here, which is told."""

    def tell(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value not in (None, False):
            note(f"edgelm: {names[0]} changes nothing here: {why}")

    return _flag(*names, expose_value=False, hidden=True, callback=tell, help=why, **settings)


FOREIGN_FLAGS = (
    _without_effect("-ngl", "--gpu-layers", "--n-gpu-layers", why="all layers are computed by the processor"),
    _without_effect(
        "-fa", "--flash-attn", is_flag=False, flag_value="on", type=click.Choice(["on", "off", "auto", "0", "1"]),
        why="attention never writes its matrix down",
    ),
    _without_effect("-b", "--batch-size", why="a prompt is cut by -ub, --ubatch-size alone"),
)  # fmt: skip

FOREIGN_TEXT_FLAGS = (
    _without_effect("-no-cnv", "--no-conversation", is_flag=True, why="`edgelm chat` converses, `edgelm run` does not"),
    _without_effect("-cnv", "--conversation", is_flag=True, why="`edgelm chat` converses, `edgelm run` does not"),
    _without_effect("--no-display-prompt", is_flag=True, why="the prompt is only printed with --echo"),
    _without_effect("--no-warmup", is_flag=True, why="there is no first run for warming up"),
    _without_effect("--simple-io", is_flag=True, why="a pipe gets nothing but the answer"),
)

TEMPLATE_FLAGS = (
    _flag("--chat-template", help="A template's source, or the name of a built-in one, instead of the file's own."),
    _flag("--chat-template-file", type=TextFile(), help="The same, from a file."),
)

def _sampler(*names: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """A flag of a field of `Sampling`, with that field's default in its help."""
    name = next((n for n in names if not n.startswith("-")), names[0].lstrip("-").replace("-", "_"))
    default = next(f.default for f in dataclasses.fields(Sampling) if f.name == name)
    return _flag(*names, help=f"{help}  [default: {default}]", **settings)


SAMPLING_FLAGS = (
    _sampler("-s", "--seed", "seed", type=int, help="Random seed (-1: a new one each time)."),
    _sampler(
        "--temp", "--temperature", "temperature", type=float, help="0: the likeliest token each time; 1: as trained."
    ),
    _sampler("--top-k", type=int, help="Keep the k most probable tokens (0: all)."),
    _sampler("--top-p", type=float, help="Keep the most probable tokens that together have this probability (1: all)."),
    _sampler("--min-p", type=float, help="Keep tokens at least this probable, relative to the best one (0: all)."),
    _sampler("--typical", "--typical-p", "typical_p", type=float, help="Keep tokens of typical surprise (1: all)."),
    _sampler(
        "--top-n-sigma", "--top-nsigma", "top_n_sigma", type=float,
        help="Keep tokens within n standard deviations of the best logit (-1: all).",
    ),
    _sampler("--repeat-last-n", type=int, help="How many tokens back the penalties look (0: off, -1: all)."),
    _sampler("--repeat-penalty", type=float, help="Divides the logits of tokens seen (1: off)."),
    _sampler("--presence-penalty", type=float, help="Subtracted once from the logit of a token seen (0: off)."),
    _sampler("--frequency-penalty", type=float, help="Subtracted for each time that a token was seen (0: off)."),
    _sampler("--dry-multiplier", type=float, help="Strength of DRY, against repeated sequences (0: off)."),
    _sampler("--dry-base", type=float, help="How DRY grows with the length of the sequence."),
    _sampler("--dry-allowed-length", type=int, help="Shorter sequences may repeat."),
    _sampler("--dry-penalty-last-n", type=int, help="How many tokens back DRY looks (0: off, -1: all)."),
    _flag(
        "--dry-sequence-breaker", "dry_sequence_breakers", multiple=True, default=(),
        help="A text over which DRY follows no repetition; none for no such text. May be repeated.",
    ),
    _sampler("--xtc-probability", type=float, help="How often XTC removes the best tokens (0: never)."),
    _sampler("--xtc-threshold", type=float, help="XTC removes tokens that reach it, but for the least probable."),
    _sampler("--dynatemp-range", type=float, help="By how much the temperature varies with the uncertainty (0: not)."),
    _sampler("--dynatemp-exp", "dynatemp_exponent", type=float, help="How uncertainty maps to the temperature."),
    _sampler("--mirostat", type=click.IntRange(0, 2), help="Mirostat's version (0: off)."),
    _sampler("--mirostat-lr", "mirostat_eta", type=float, help="Mirostat's learning rate."),
    _sampler("--mirostat-ent", "mirostat_tau", type=float, help="Mirostat's surprise that is aimed at."),
    _flag(
        "-l",
        "--logit-bias",
        multiple=True,
        default=(),
        metavar="ID(+/-)B",
        help="Adds B to the logit of a token: 15043+1, or 15043-inf.",
    ),
    _flag("--samplers", help="The samplers and their order, separated by ';'."),
    _flag("--sampler-seq", "--sampling-seq", "sampler_seq", help="The same, one letter each: edskypmxt."),
    _flag("--ignore-eos", is_flag=True, help="Never stop at the end-of-text token."),
)

GENERATION_FLAGS = (
    _flag(
        "-n",
        "--predict",
        "--n-predict",
        "max_tokens",
        type=int,
        help="Tokens to write at most (-1: until the model stops).",
    ),
    _flag("-r", "--reverse-prompt", "stop", multiple=True, default=(), help="Stop at this text. May be repeated."),
    _flag(
        "--overflow",
        type=click.Choice(["error", "truncate-middle", "shift"]),
        help="What happens when the context window is full.",
    ),
    _flag("--context-shift", "context_shift", is_flag=True, default=False, help="The same as --overflow shift."),
    _flag("--keep", type=int, help="Tokens at the start that --overflow never drops."),
)


def with_flags(*tables: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
    """Decorates a command with every flag of the tables, in their order."""

    def decorate(command: Command) -> Command:
        for flag in reversed([flag for table in tables for flag in table]):
            command = flag(command)
        return command

    return decorate


@dataclass(frozen=True)
class Choice:
    """The model that the command line names; bars show how long it takes, unless that shall be quiet."""

    source: str | None
    quiet: bool = False

    def path(self, offline: bool = False) -> Path:
        """Its file, fetched if need be."""
        from edgelm import hub

        with bars(self.quiet) as progress:
            return hub.resolve(self.source, offline=offline, progress=progress)

    def load(self, flags: dict[str, Any]) -> Model:
        """The model, with the settings that the tables MODEL_FLAGS and TEMPLATE_FLAGS name."""
        from edgelm.model import load

        settings = {name: value for name, value in given(flags).items() if name in LOAD_SETTINGS}
        settings |= cache_type(flags)
        packed = {"--packed": flags.get("packed"), "--no-mmap": "memory" if flags.get("no_mmap") else None}
        templates = {f"--{n.replace('_', '-')}": flags.get(n) for n in ("chat_template", "chat_template_file")}
        settings |= given(
            {"packed": one_of("places of weights", packed), "chat_template": one_of("chat templates", templates)}
        )
        with bars(self.quiet) as progress:
            return load(self.source, progress=progress, **settings)


def of_a_model(command: Command) -> Command:
    """Decorates a command that has a `Choice` for its first argument: MODEL, -m or -hf, and -q.

    With -m or -hf what stands first is the second argument, TEXT or OUT, of a command that has one.
    """

    @functools.wraps(command)
    def call(model: str | None, model_flag: str | None, hf_repo: str | None, quiet: bool, **rest: Any) -> Any:
        second = next((name for name in ("text", "out") if name in rest), None)
        if model and (model_flag or hf_repo) and second is not None and rest[second] is None:
            model, rest[second] = None, model
        named = [source for source in (model, model_flag, f"hf:{hf_repo}" if hf_repo else None) if source]
        if len(named) > 1:
            raise UsageError(f"two models are named, {named[0]!r} and {named[1]!r}; name one")
        return command(Choice(named[0] if named else None, quiet), **rest)

    parameters = (
        click.argument("model", required=False),
        click.option("-m", "--model", "model_flag", metavar="MODEL", help="The same as the argument MODEL."),
        click.option(
            "-hf", "--hf-repo", "hf_repo", metavar="USER/REPO[:QUANT]", help="A model of the Hugging Face hub."
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
    )
    for parameter in reversed(parameters):
        call = parameter(call)
    return cast(Command, call)


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The values that somebody gave: everything but None, False and empty tuples."""
    return {name: value for name, value in values.items() if value is not None and value is not False and value != ()}


# --- what the flags mean --------------------------------------------------------------------------------------------


def cache_type(flags: dict[str, Any]) -> dict[str, str]:
    """The setting `kv_type` that -ctk and -ctv mean; none if neither was given. One alone leaves the other as it is."""
    types = [flags.get("cache_type_k"), flags.get("cache_type_v")]
    if not any(types):
        return {}
    from edgelm.gguf_model import usual_kv_type
    from edgelm.kv_types import named

    default = usual_kv_type("reference" if flags.get("interpreter") == "reference" else "auto")
    return {"kv_type": named(types[0] or default, types[1] or default)}


def generation_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """What `stream_generate` takes, from the flags of the tables SAMPLING_FLAGS and GENERATION_FLAGS."""
    import dataclasses

    from edgelm.request import Request
    from edgelm.sampling import Sampling

    names = {f.name for kind in (Request, Sampling) for f in dataclasses.fields(kind)}
    settings = {name: value for name, value in given(flags).items() if name in names}
    orders = {"--samplers": flags.get("samplers"), "--sampler-seq": flags.get("sampler_seq")}
    shift = "shift" if flags.get("context_shift") else None
    policies = {"--overflow": flags.get("overflow"), "--context-shift": shift}
    settings |= given(
        {"samplers": one_of("orders of samplers", orders), "overflow": one_of("policies", policies)}
    )
    Request.of(settings)  # a value that cannot be meant is told before a model is loaded
    return settings
