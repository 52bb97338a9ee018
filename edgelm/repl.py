"""The conversation in a terminal: reads a line, streams an answer, keeps the session.

With a terminal there are line editing and history (prompt_toolkit); a piped standard input is read line by line,
each line a message, and standard output gets the answers alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm import conversation
from edgelm.conversation import Message
from edgelm.errors import EdgelmError, UsageError
from edgelm.terminal import Bars, note, readable, say, statistics, told

if TYPE_CHECKING:
    from prompt_toolkit.history import History

    from edgelm.model import Model

FENCE = '"""'


class Leave(Exception):
    """The person wants to go."""


class Repl:
    """A conversation with `model`; `settings` are the keyword arguments of `Session.chat`.

    Without `system` it begins with the system prompt that came with the model; "" begins without any.
    """

    def __init__(
        self, model: Model, *, system: str | None = None, settings: dict[str, Any] | None = None, quiet: bool = False
    ) -> None:
        self.model, self.quiet = model, quiet
        self.settings = dict(settings or {})
        system = model.system if system is None else system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.session = model.session()
        self.last: Any = None  # the final Response of the last answer
        self.interactive = sys.stdin.isatty()
        self.verbose = False
        self.keep_history = True
        self.pending = ""  # text of /read, put before the next message

    def run(self, first: str | None = None, single_turn: bool = False) -> None:
        """Talks until the input ends or somebody leaves."""
        if self.interactive and not self.quiet:
            self.greet()
        try:
            if first is not None:
                self.ask(first)  # also one that begins with a slash
                if single_turn:
                    return
            for text in self.inputs():
                self.handle(text)
                if single_turn and self.last is not None:
                    return
        except Leave:
            pass

    def greet(self) -> None:
        template = self.model.template
        origin = f"chat template: {template.origin}" if template else "no chat template"
        note(f"{self.model.name} ({origin}; context {self.model.n_ctx} tokens). /? for help, Ctrl-D to leave.")
        for message in self.messages:
            note(f"{message['role']}: {message['content']}")

    def handle(self, text: str) -> None:
        """A command if it begins with a slash that we know, else a message."""
        if text.startswith("/") and not text.startswith("//"):
            word, _, rest = text[1:].partition(" ")
            command = COMMANDS.get(word.strip())
            try:
                if command is None:
                    raise UsageError(f"/{word} is not a command; /? lists them")
                command(self, rest.strip())
            except (EdgelmError, OSError) as error:
                note(f"edgelm: {told(error)}")
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                note("interrupted")
        else:
            self.ask(text)

    def ask(self, text: str) -> None:
        """Streams the answer to `text`. Ctrl-C keeps what was said so far."""
        if not text.strip():
            return
        asked = [*self.messages, {"role": "user", "content": self.pending + text}]
        answer = self.answer(asked)
        if answer is not None:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            self.pending = ""

    def answer(self, messages: list[Message]) -> str | None:
        """The answer to `messages`, printed as it comes; None if it did not begin."""
        said: list[str] = []
        waiting = Bars(self.interactive and not self.quiet)
        try:
            with contextlib.closing(self.session.chat(messages, progress=waiting, **self.settings)) as responses:
                for response in responses:
                    waiting.close()
                    said.append(response.text)
                    self.last = response
                    say(response.text)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        except (EdgelmError, MemoryError) as error:
            if not self.interactive:
                raise
            note(f"edgelm: {told(error)}")
            return None
        finally:
            waiting.close()
        print(flush=True)
        if not said:  # stopped while the prompt was read
            return None
        if self.last.dropped_tokens:
            note(f"({self.last.dropped_tokens} tokens of the conversation were dropped to fit the context window)")
        if self.last.finish_reason == "context":
            note("(the context window is full: /clear, or /set parameter overflow shift)")
        if self.verbose:
            self.stats("")
        return "".join(said)

    # --- reading ---------------------------------------------------------------------------------------------

    def inputs(self) -> Iterator[str]:
        """Messages and commands: what stands between two lines with triple quotes is one."""
        read = self.terminal_reader() if self.interactive else _piped_line
        is_leaving = False
        while True:
            try:
                text = read(">>> ")
                while text.lstrip().startswith(FENCE) and not _fence_closed(text):
                    try:
                        text += "\n" + read("... ")
                    except EOFError:
                        if self.interactive:
                            raise
                        text += "\n" + FENCE  # a file that ends within a message ends it, too
            except KeyboardInterrupt:  # one too many to stop an answer must not end the conversation
                if is_leaving or not self.interactive:
                    return
                is_leaving = True
                note("Ctrl-C once more leaves, as Ctrl-D does")
                continue
            except EOFError:
                return
            is_leaving = False
            text = text.encode("utf-8", "replace").decode()  # bytes that are no text came as halves of surrogates
            stripped = text.strip()
            yield stripped[3:-3].strip("\n") if stripped.startswith(FENCE) and _fence_closed(text) else text

    def terminal_reader(self) -> Callable[[str], str]:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("c-g")
        def _edit(event: KeyPressEvent) -> None:
            event.current_buffer.open_in_editor()

        @keys.add("c-c")
        def _interrupt(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        try:
            history = self.history(conversation.data_folder())
        except OSError:
            history = InMemoryHistory()
        session: PromptSession[str] = PromptSession(
            history=history,
            auto_suggest=AutoSuggestFromHistory(),
            key_bindings=keys,
            output=create_output(always_prefer_tty=True),  # standard output may be a file, which gets answers alone
            completer=WordCompleter(sorted(f"/{name}" for name in COMMANDS), sentence=True),
            complete_while_typing=False,
            reserve_space_for_menu=4,
        )

        return session.prompt

    def history(self, folder: Path) -> History:
        """What is typed, in a file that nobody else may read; it is kept there as long as /set history holds."""
        from prompt_toolkit.history import FileHistory

        class Kept(FileHistory):
            def store_string(_, string: str) -> None:
                if self.keep_history:
                    super().store_string(string)

        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "history"
        file.touch(mode=0o600)
        file.chmod(0o600)
        return Kept(str(file))

    # --- commands: the first line of each docstring is its help ---------------------------------------------------

    def help(self, topic: str) -> None:
        """/? [COMMAND]: this list."""
        shown: dict[Callable[..., None], list[str]] = {}
        for name, command in COMMANDS.items():
            shown.setdefault(command, []).append(f"/{name}")
        for command, names in shown.items():
            if topic and f"/{topic.lstrip('/')}" not in names:
                continue
            usage, _, text = (command.__doc__ or "").partition(": ")
            note(f"  {usage:34} {text.strip()}" + (f" Also {', '.join(names[1:])}." if len(names) > 1 else ""))
        if not topic:
            note(f"  {FENCE}                                begins and ends a message of several lines.")
            note("  Ctrl-C stops an answer, Ctrl-G opens an editor, Ctrl-D leaves.")

    def bye(self, _: str) -> None:
        """/bye: leave."""
        raise Leave

    def clear(self, _: str) -> None:
        """/clear: forget the conversation, keep the system prompt and the parameters."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self.session.reset()
        self.pending, self.last = "", None
        note("cleared")

    def set(self, what: str) -> None:
        """/set system|parameter|verbose|quiet|history|nohistory [...]: change a setting."""
        word, _, rest = what.partition(" ")
        rest = rest.strip().removeprefix(FENCE).removesuffix(FENCE)
        if word == "system":
            self.set_system(rest)
        elif word == "parameter":
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            self.set_parameter(name.strip(), value.strip())
        elif word in ("verbose", "quiet"):
            self.verbose = word == "verbose"
        elif word in ("history", "nohistory"):
            self.keep_history = word == "history"
        else:
            raise UsageError(f"/set {word or '…'}: there are system, parameter, verbose, quiet, history and nohistory")

    def set_system(self, text: str) -> None:
        """/system TEXT: what the model is told before the conversation; empty takes it away."""
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest
        note("system prompt set" if text else "system prompt removed")

    def set_parameter(self, name: str, text: str) -> None:
        """/set parameter NAME VALUE, with the names of the flags: temperature, top_k, num_predict …"""
        from edgelm.request import ALIASES, Request

        name = name.replace("-", "_")
        name = ALIASES.get(name, name)
        value: Any = text
        if name != "stop":
            with contextlib.suppress(ValueError):
                value = json.loads(text)
        proposed = self.settings | {name: value}
        Request.of(proposed)
        self.settings = proposed
        note(f"{name} = {value}")

    def show(self, what: str) -> None:
        """/show info|parameters|system|template|messages|license: show it."""
        if what == "info":
            for line in readable(self.model.info()):
                note(line)
        elif what == "parameters":
            from edgelm.request import Request

            request = Request.of(self.settings)
            values = dataclasses.asdict(request.sampling) | {
                f.name: getattr(request, f.name) for f in dataclasses.fields(Request) if f.name != "sampling"
            }
            for name, value in values.items():
                note(f"  {name:24} {value}" + ("" if name in self.settings else "  (default)"))
        elif what == "system":
            note(next((m["content"] for m in self.messages if m["role"] == "system"), "(none)"))
        elif what == "template":
            template = self.model.template
            note(f"({template.origin})\n{template.source}" if template else "(none)")
        elif what == "messages":
            for message in self.messages:
                note(f"[{message['role']}] {message['content']}")
        elif what == "license":
            note(self.model.licence or "(the file does not say)")
        else:
            raise UsageError(f"/show {what or '…'}: info, parameters, system, template, messages or license")

    def regen(self, _: str) -> None:
        """/regen: answer the last message again."""
        asked = self.messages
        while asked and asked[-1]["role"] == "assistant":
            asked = asked[:-1]
        if not asked or asked[-1]["role"] != "user":
            raise UsageError("there is nothing to answer again")
        answer = self.answer(asked)
        if answer is not None:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def undo(self, _: str) -> None:
        """/undo: take the last message and its answer back."""
        before = list(self.messages)
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages = self.messages[:-1]
        if not self.messages or self.messages[-1]["role"] != "user":
            self.messages = before
            raise UsageError("there is nothing to take back")
        self.messages = self.messages[:-1]
        note(f"taken back; {self.n_asked()} left")

    def n_asked(self) -> str:
        """How many messages are the user's, in words."""
        n = sum(message["role"] == "user" for message in self.messages)
        return "1 message" if n == 1 else f"{n} messages"

    def save(self, name: str) -> None:
        """/save NAME: keep the conversation and its parameters."""
        note(f"saved to {conversation.save(name, self.model.path, self.messages, self.settings)}")

    def load(self, name: str) -> None:
        """/load NAME: go on with a conversation that was saved."""
        self.messages, self.settings = conversation.load(name)
        note(f"{self.n_asked()} loaded")

    def read(self, pattern: str) -> None:
        """/read FILE: put a file's text before the next message. Patterns such as *.py work."""
        paths = [Path(p) for p in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))] if pattern else []
        if not paths:
            raise UsageError(f"/read {pattern!r}: no such file")
        for path in paths:
            self.pending += f"{path.name}:\n{path.read_text(encoding='utf-8', errors='replace')}\n\n"
            note(f"read {path} ({path.stat().st_size} bytes); it goes before your next message")

    def context(self, _: str) -> None:
        """/context: how full the context window is."""
        used, size = len(self.session.tokens), self.model.n_ctx
        filled = round(30 * used / size)
        note(f"[{'#' * filled}{'.' * (30 - filled)}] {used} of {size} tokens ({100 * used / size:.0f} %)")

    def stats(self, _: str) -> None:
        """/stats: counts and speed of the last answer."""
        note(statistics(self.last) if self.last is not None else "nothing was said yet")


COMMANDS: dict[str, Callable[[Repl, str], None]] = {
    "?": Repl.help,
    "help": Repl.help,
    "bye": Repl.bye,
    "exit": Repl.bye,
    "quit": Repl.bye,
    "clear": Repl.clear,
    "reset": Repl.clear,
    "set": Repl.set,
    "system": Repl.set_system,
    "system-prompt": Repl.set_system,
    "show": Repl.show,
    "regen": Repl.regen,
    "undo": Repl.undo,
    "forget": Repl.undo,
    "save": Repl.save,
    "load": Repl.load,
    "read": Repl.read,
    "glob": Repl.read,
    "context": Repl.context,
    "stats": Repl.stats,
}


def _fence_closed(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) >= 2 * len(FENCE) and stripped.endswith(FENCE)


def _piped_line(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
