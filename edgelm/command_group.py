"""What holds for every command of `edgelm`: where it is found, and how it ends when something goes wrong.

An error that was raised on purpose, or by the system, is one line on standard error and exit code 2 (`--debug` shows
the traceback); Ctrl-C is 130, a reader of standard output that has gone 141.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from edgelm.errors import EdgelmError, UsageError
from edgelm.terminal import note, printable, told

# Commands that live in the package `converters`, which a runtime may lack, and their modules.
CONVERTERS = {"convert": "commands", "quantize": "commands", "imatrix": "imatrix_cli"}

ALSO = {"ls": "list"}  # other names of commands, that ollama has, too
ELSEWHERE = {  # commands of ollama, and what is there instead
    "show": "`edgelm info MODEL` shows what is in a model's file",
    "serve": "there is no server: a program loads a model by edgelm.load(), or starts `edgelm run --json`",
}


def converters_are_ours() -> bool:
    """Whether the converter is installed: a dead project on PyPI has the same name, and a folder may have it, too."""
    try:
        return getattr(importlib.import_module("converters"), "EDGELM_CONVERTERS", False) is True
    except ImportError:
        return False


class Commands(click.Group):
    """Turns every error raised on purpose into one line and exit code 2; has the converter's commands where it is."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *(CONVERTERS if converters_are_ours() else ())])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in ELSEWHERE:
            raise UsageError(f"there is no command {name!r}: {ELSEWHERE[name]}")
        if name not in CONVERTERS:
            return super().get_command(ctx, ALSO.get(name, name))
        if not converters_are_ours():
            raise UsageError("the package 'converters' is missing, or another one of that name hides edgelm's own")
        home = importlib.import_module(f"converters.{CONVERTERS[name]}")
        gc.set_threshold(700)  # as Python has it: what a conversion throws away may hold matrices
        command: click.Command = getattr(home, f"{name}_command")
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        if "--debug" in own:  # wherever it stands
            args = ["--debug", *(arg for arg in own if arg != "--debug"), *args[len(own) :]]
        with errors_in_a_line(ctx):  # --help and --version print here
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with errors_in_a_line(ctx), warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **more: note(f"edgelm: {message}")
            result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk is told now
            return result


@contextmanager
def errors_in_a_line(ctx: click.Context) -> Iterator[None]:
    """Turns errors raised on purpose, and the system's, into a line on standard error and an exit code."""
    try:
        yield
    except (EdgelmError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            silence_stdout()
            ctx.exit(141)
        try:
            sys.stdout.flush()
        except OSError:  # it was not to be written, and the interpreter would try again at its end
            silence_stdout()
        if ctx.params.get("debug"):
            raise
        click.echo(f"edgelm: {printable(told(error))}", err=True)
        ctx.exit(2)
    except KeyboardInterrupt:
        if ctx.params.get("debug"):
            raise
        click.echo("", err=True)
        ctx.exit(130)


def silence_stdout() -> None:
    """After a closed pipe or a full disk: nothing more may be written, not even by the interpreter at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
