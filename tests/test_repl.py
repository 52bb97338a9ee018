"""The conversation: its commands on a tiny model, and a real terminal where the system has pseudo-terminals."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from edgelm import conversation, load
from edgelm.errors import UsageError
from edgelm.model import Model
from edgelm.repl import COMMANDS, Leave, Repl
from edgelm.terminal import NO_MEMORY, Bars, say

PROMPT_BEGINS, PROMPT_ENDS = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste, on and off
SETTINGS = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-gqa", folder=tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load(path, chat_template="chatml", ctx_size=128)


@pytest.fixture
def repl(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repl:
    monkeypatch.setattr("edgelm.conversation.data_folder", lambda: tmp_path / "data")
    return Repl(model, settings=SETTINGS, quiet=True)


def test_a_message_is_answered_and_remembered(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("hello")
    shown = capsys.readouterr()
    assert [m["role"] for m in repl.messages] == ["user", "assistant"]
    assert shown.out == repl.messages[1]["content"] + "\n" and shown.err == ""
    repl.handle("more")
    assert repl.last.cached_tokens > 0, "the second turn computes only what is new"


def test_one_interrupt_too_many_keeps_the_conversation(
    repl: Repl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = iter([KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def read(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr(repl, "interactive", True)
    monkeypatch.setattr(repl, "terminal_reader", lambda: read)
    assert list(repl.inputs()) == ["hello"] and next(keys) == "never read"
    assert capsys.readouterr().err.count("once more leaves") == 2


def test_a_first_message_may_begin_with_a_slash(repl: Repl) -> None:
    repl.run(first="/etc/hosts is what?", single_turn=True)
    assert repl.messages[0]["content"] == "/etc/hosts is what?" and repl.messages[1]["content"]


def test_an_interrupt_before_the_answer_leaves_everything_as_it_was(
    repl: Repl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Interrupting(Bars):
        def __call__(self, stage: str, done: int, total: int) -> None:
            raise KeyboardInterrupt

    (tmp_path / "note.txt").write_text("the secret is 42", encoding="utf-8")
    repl.interactive = True
    repl.handle(f"/read {tmp_path / 'note.txt'}")
    with monkeypatch.context() as patch:
        patch.setattr("edgelm.repl.Bars", Interrupting)
        repl.handle("hello")
    assert repl.messages == [] and "42" in repl.pending and repl.last is None
    repl.handle("hello")
    assert "42" in repl.messages[0]["content"]


def test_an_interrupt_ends_a_command_and_not_the_conversation(
    repl: Repl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(*_: object, **more: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgelm.repl.glob.glob", endless)
    repl.interactive = True
    repl.handle("/read **")
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_window_is_told(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.settings["max_tokens"] = -1
    repl.handle("hello")
    assert repl.last.finish_reason == "context" and "/clear" in capsys.readouterr().err


def test_a_terminal_gets_nothing_that_it_would_obey(
    repl: Repl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a model says, and what its file says of itself, may be meant for the terminal and not for its reader."""
    monkeypatch.setattr(type(repl.model), "name", "\x1b]0;title\x07")
    repl.messages = [{"role": "user", "content": "\x1b[2J"}]
    repl.greet()
    repl.handle("/show messages")
    say("as \x1b[2J it is")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say("\x1b]52;c;aGk=\x07")
    shown = capsys.readouterr()
    assert "\x1b" not in shown.err and "\\x1b]0;title" in shown.err
    assert shown.out == "as \x1b[2J it is\\x1b]52;c;aGk=\\x07"


def test_undo_and_regen(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("one")
    answer = repl.messages[-1]["content"]
    repl.handle("/regen")
    assert repl.messages[-1]["content"] == answer and len(repl.messages) == 2  # greedy: the same again
    repl.handle("two")
    repl.handle("/undo")
    assert [m["content"] for m in repl.messages] == ["one", answer]
    assert capsys.readouterr().err == "taken back; 1 message left\n"
    repl.handle("/undo")
    assert repl.messages == [] and capsys.readouterr().err == "taken back; 0 messages left\n"


def test_clear_keeps_the_system_prompt(repl: Repl) -> None:
    repl.handle("/set system be brief")
    repl.handle("hello")
    repl.handle("/clear")
    assert repl.messages == [{"role": "system", "content": "be brief"}]
    assert len(repl.session.tokens) == 0
    repl.handle("/set system")
    assert repl.messages == []


def test_parameters_are_checked_and_used(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/set parameter num_predict 2")
    repl.handle("hello")
    assert repl.last.generation_tokens == 2
    repl.handle("/set parameter top_p=0.5")
    repl.handle("/set parameter no_such_thing 1")
    repl.handle("/set parameter top_k many")
    err = capsys.readouterr().err
    assert "no_such_thing" in err and "top_k" in err and repl.settings["top_p"] == 0.5
    repl.handle("/show parameters")
    assert "top_p                    0.5" in capsys.readouterr().err


def test_save_and_load(repl: Repl, model: Model) -> None:
    repl.handle("/set system be brief")
    repl.handle("hello")
    repl.handle("/save a talk")
    other = Repl(model, quiet=True)
    other.handle("/load a talk")
    assert other.messages == repl.messages and other.settings == repl.settings
    conversation.save("half", model.path, [{"role": "user", "content": "gr\udcfcn"}], {})
    assert conversation.load("half")[0][0]["content"] == "gr?n", "bytes that are no text are not kept"


def test_a_damaged_conversation_is_refused(repl: Repl, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    for text in ("", "[]", '{"messages": 3, "settings": {}}', '{"messages": [{"role": "user"}], "settings": {}}',
                 "[" * 100_000, '{"messages": [], "settings": {"temperature": "hot"}}',
                 '{"messages": [], "settings": {"nonsense": 1}}'):
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="not a saved conversation"):
            conversation.load(str(broken))
    assert conversation.path_of("name").parent.name == "conversations"
    assert conversation.path_of("folder/name") == Path("folder/name")


def test_read_goes_before_the_next_message(repl: Repl, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("the secret is 42", encoding="utf-8")
    repl.handle(f"/read {tmp_path / '*.txt'}")
    repl.handle("what is it?")
    assert "the secret is 42" in repl.messages[0]["content"]
    assert repl.messages[0]["content"].endswith("what is it?") and repl.pending == ""


def test_mistakes_are_told_and_change_nothing(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("/nonsense", "/set nonsense", "/show nonsense", "/undo", "/regen", "/load nothing", "/read nothing",
                    "/save"):
        repl.handle(command)
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("edgelm: "), command
    assert repl.messages == []


def test_a_conversation_that_does_not_fit_is_told(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.interactive = True
    repl.handle("word " * 300)
    assert "context window" in capsys.readouterr().err and repl.messages == []


def test_memory_that_is_not_enough_ends_an_answer_and_not_the_conversation(
    repl: Repl, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(*_: object, **more: object) -> Iterator[Any]:
        raise MemoryError
        yield

    repl.interactive = True
    repl.handle("one")
    before = list(repl.messages)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(repl.session, "chat", chat)
        repl.handle("two")
    assert capsys.readouterr().err == f"edgelm: {NO_MEMORY}\n" and repl.messages == before
    repl.handle("two")
    assert len(repl.messages) == 4


def test_show_context_stats_and_help(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/stats")
    assert "nothing was said" in capsys.readouterr().err
    repl.handle("hello")
    for command, expected in {
        "/stats": "tokens/s", "/context": "of 128 tokens", "/show info": "architecture", "/show template": "chatml",
        "/show messages": "[user] hello", "/show system": "(none)", "/show license": "", "/?": "/regen",
    }.items():  # fmt: skip
        repl.handle(command)
        assert expected in capsys.readouterr().err, command
    repl.handle("/?")
    listed = capsys.readouterr().err
    for command in COMMANDS.values():
        assert (command.__doc__ or "").split(":")[0] in listed


def test_bye(repl: Repl) -> None:
    with pytest.raises(Leave):
        repl.handle("/bye")


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_in_a_terminal(path: Path, tmp_path: Path) -> None:
    """A real terminal: greeting, an answer, several lines as one message, Ctrl-C in an answer, Ctrl-D at the end."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it
        os.environ.update(XDG_DATA_HOME=str(tmp_path), TERM="xterm", HOME=str(tmp_path / "home"))
        command = [sys.executable, "-P", "-m", "edgelm", "chat", str(path), "--chat-template", "chatml", "--temp", "0"]
        os.execv(sys.executable, [*command, "--ignore-eos", "-c", "128", "--overflow", "shift"])
    seen = ""

    def read(timeout_s: float) -> bool:
        """Adds what the program shows within `timeout_s` to `seen`; False once it has ended."""
        nonlocal seen
        if select.select([terminal], [], [], timeout_s)[0]:
            try:
                chunk = os.read(terminal, 4096)
            except OSError:
                return False
            if b"\x1b[6n" in chunk:  # "where is the cursor?"
                os.write(terminal, b"\x1b[1;1R")
            seen += chunk.decode("utf-8", "replace")
            return bool(chunk)
        return True

    def expect(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 600
        while text not in seen:
            assert read(0.2), f"waited for {text!r}, the end was {seen[-2000:]!r}"
            assert time.monotonic() < deadline, f"waited for {text!r}, saw {seen[-2000:]!r}"
        seen = seen.split(text, 1)[1]

    def type_(text: str) -> None:
        os.write(terminal, text.encode())

    try:
        expect("/? for help")
        expect(">>>")
        type_("/set parameter max_tokens 3\r")
        expect("max_tokens = 3")
        type_('"""one\r')
        expect("...")
        type_('two"""\r')
        expect(">>>")
        type_("/show messages\r")
        expect("[user] one")
        type_("/set parameter max_tokens 100000\r")
        expect("max_tokens = 100000")
        type_("go on\r")
        expect(PROMPT_ENDS)
        for _ in range(20):  # into the answer, which would be long
            assert read(0.05)
        seen = ""
        type_("\x03")
        expect(PROMPT_BEGINS)
        type_("/stats\r")
        expect("tokens/s")
        expect(PROMPT_BEGINS)
        type_("/set nohistory\r")
        expect(PROMPT_BEGINS)
        type_("/show license\r")
        expect("the file does not say")
        expect(PROMPT_BEGINS)
        type_("/set history\r")
        expect(PROMPT_BEGINS)
        type_("/context\r")
        expect("of 128 tokens")
        expect(PROMPT_BEGINS)
        type_("\x04")
        deadline = time.monotonic() + 600
        while read(0.2):
            assert time.monotonic() < deadline, "it did not leave"
        _, status = os.waitpid(pid, 0)
        pid = 0
        assert os.waitstatus_to_exitcode(status) == 0
        [history] = tmp_path.rglob("history")
        kept = [line for line in history.read_text().splitlines() if line.startswith("+/")]
        assert kept[-3:] == ["+/stats", "+/set nohistory", "+/context"] and history.stat().st_mode & 0o77 == 0
    finally:
        if pid:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        os.close(terminal)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_standard_output_in_a_file_gets_answers_alone(path: Path, tmp_path: Path) -> None:
    import pty

    command = [sys.executable, "-P", "-m", "edgelm", "chat", str(path), "--chat-template", "chatml", "--temp", "0"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(XDG_DATA_HOME=str(tmp_path), TERM="xterm", HOME=str(tmp_path / "home"))
        os.dup2(os.open(tmp_path / "out.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.execv(sys.executable, [*command, "--ignore-eos", "-n", "6"])
    seen, typed, deadline = b"", [b"hello\r", b"\x04"], time.monotonic() + 600
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    chunk = os.read(terminal, 4096)
                except OSError:
                    break
                if b"\x1b[6n" in chunk:  # "where is the cursor?"
                    os.write(terminal, b"\x1b[1;1R")
                seen += chunk
                if not chunk:
                    break
            if typed and seen.count(PROMPT_BEGINS.encode()) == 3 - len(typed):
                os.write(terminal, typed.pop(0))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)
    expected = load(path, chat_template="chatml").chat("hello", max_tokens=6, temperature=0, ignore_eos=True)
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "".join(r.text for r in expected) + "\n"
    assert b">>> " in seen
