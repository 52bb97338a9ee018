"""The command line on tiny models: what goes to standard output, what to standard error, and with which exit code."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hostile.cases import CASES
from tiny import tiny

from edgelm import model as edgelm_model
from edgelm.cli import main
from edgelm.terminal import NO_MEMORY, json_text, printable, readable, table, told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny("llama-gqa", folder=tmp_path_factory.mktemp("models"))
    path.with_name(path.name + ".txt").write_text("hello there. " * 100)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("bert-mean", folder=tmp_path_factory.mktemp("models"))


def edgelm(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def test_run_prints_the_completion_alone(model: Path) -> None:
    result = edgelm("run", model, "-p", "hello", "-n", 8, "--temp", 0)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    again = edgelm("run", "-m", model, "-n", 8, "--temp", 0, stdin="hello")
    assert again.stdout == result.stdout == edgelm("run", model, "hello", "-n", 8, "--temp", 0).stdout
    assert result.stdout == edgelm("run", "-m", model, "hello", "-n", 8, "--temp", 0).stdout
    echoed = edgelm("run", model, "-p", "hello", "-n", 8, "--temp", 0, "--echo", "--stats")
    assert echoed.stdout == "hello" + result.stdout
    assert "tokens/s" in echoed.stderr


def test_run_json_counts_and_logprobs(model: Path) -> None:
    result = edgelm("run", model, "-p", "hello", "-n", 4, "--temp", 0, "--json", "--logprobs", 3, "--ignore-eos")
    record = json.loads(result.stdout)
    assert record["generation_tokens"] == 4 and record["finish_reason"] == "length"
    assert len(record["logprobs"]) == 4
    for step in record["logprobs"]:
        assert len(step["top_logprobs"]) == 3
        assert step["token"] == step["top_logprobs"][0][0]  # greedy takes the likeliest
        assert step["logprob"] == pytest.approx(step["top_logprobs"][0][1])


def test_a_seed_repeats_an_answer_and_samplers_are_heard(model: Path) -> None:
    flags = ("-p", "hello", "-n", 12, "-s", 7, "--temp", 1.5, "--ignore-eos")
    first, second = (edgelm("run", model, *flags).stdout for _ in range(2))
    assert first == second
    forced = edgelm("run", model, "-p", "hello", "-n", 3, "--logit-bias", "65+1000", "--json", "--logprobs", 0)
    assert [step["token"] for step in json.loads(forced.stdout)["logprobs"]] == [65, 65, 65]
    assert edgelm("run", model, "-p", "x", "-n", 1, "--samplers", "top_k;temperature").exit_code == 0
    assert edgelm("run", model, "-p", "x", "-n", 1, "--sampler-seq", "kt").exit_code == 0


def test_chat_answers_a_piped_input_line_by_line(model: Path) -> None:
    flags = ("--chat-template", "chatml", "--temp", 0, "-n", 6, "-q")
    both = edgelm("chat", model, *flags, stdin="one\ntwo\n")
    assert both.exit_code == 0, both.output
    first = edgelm("chat", model, *flags, stdin="one\n")
    assert both.stdout.startswith(first.stdout) and len(both.stdout) > len(first.stdout)
    single = edgelm("chat", model, *flags, "-st", stdin="one\ntwo\n")
    assert single.stdout == first.stdout
    ends, closed = (edgelm("chat", model, *flags, stdin='"""one\ntwo\n' + end).stdout for end in ("", '"""\n'))
    assert ends == closed and ends.strip(), "a file that ends within a message ends it"


def test_the_default_model_knows_the_capital_of_france(smollm2_path: Path) -> None:
    result = edgelm("chat", "--temp", 0, "-q", stdin="What is the capital of France?\n")
    assert result.stdout == "The capital of France is Paris.\n"


def test_embed_gives_a_line_for_each_text(encoder: Path) -> None:
    result = edgelm("embed", encoder, "-p", "hello", "-p", "there")
    rows = [[float(x) for x in line.split()] for line in result.stdout.splitlines()]
    assert len(rows) == 2 and len(rows[0]) == 64
    assert sum(x * x for x in rows[0]) == pytest.approx(1, abs=1e-5)
    record = json.loads(edgelm("embed", encoder, "--json", stdin="hello\nthere\n").stdout)
    assert [d["index"] for d in record["data"]] == [0, 1]
    assert record["data"][0]["embedding"] == pytest.approx(rows[0], rel=1e-5, abs=1e-6)


def test_warm_is_for_encoders_too(model: Path, encoder: Path) -> None:
    for path in (model, encoder):
        result = edgelm("warm", path, "-q")
        assert result.exit_code == 0 and result.stdout == "" and "ready in" in result.stderr


def test_tokenize_shows_ids_and_texts(model: Path) -> None:
    ids = json.loads(edgelm("tokenize", model, "-p", "hello there", "--ids").stdout)
    table = json.loads(edgelm("tokenize", model, "-p", "hello there", "--json").stdout)
    assert [t["id"] for t in table] == ids
    assert edgelm("tokenize", model, "-p", "hello there", "--show-count").stdout.strip() == str(len(ids))
    assert len(edgelm("tokenize", model, "-p", "hello there").stdout.splitlines()) == len(ids)


def test_info_comes_from_the_header(model: Path) -> None:
    facts = json.loads(edgelm("info", model, "--json", "-c", 64).stdout)
    assert facts["architecture"] == "llama" and facts["memory"]["context"] == 64
    double = json.loads(edgelm("info", model, "--json", "-c", 128).stdout)
    assert double["memory"]["kv_cache"] == 2 * facts["memory"]["kv_cache"]
    assert "bits per weight" in edgelm("info", model).stdout


def test_eval_against_itself_is_no_distance(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    flags = ("-f", text, "-c", 32, "--chunks", 2, "--json")
    report = json.loads(edgelm("eval", model, *flags, "--against", model).stdout)
    assert report["perplexity"] > 1 and report["n_chunks"] == 2
    assert report["mean_kl"] == pytest.approx(0, abs=1e-9)
    assert report["same_top"] in (1, 100)
    assert {"kl_99", "rms_dp"} <= set(report)


def test_bench_prints_llama_bench_records(model: Path) -> None:
    result = edgelm("bench", model, "-p", 16, "-n", 4, "-t", 1, "-r", 2, "-o", "json", "-q")
    records = json.loads(result.stdout)
    assert [(r["n_prompt"], r["n_gen"], r["n_threads"]) for r in records] == [(16, 0, 1), (0, 4, 1)]
    for record in records:
        assert len(record["samples_ts"]) == 2
        assert record["avg_ts"] == pytest.approx(sum(record["samples_ts"]) / 2)
        assert record["stddev_ts"] >= 0
    table = edgelm("bench", model, "-p", 16, "-n", 0, "-pg", "8,2", "-d", 8, "-t", 1, "-r", 1, "-q").stdout
    assert "pp 16 @ d8" in table and "pp 8+tg 2 @ d8" in table


def test_bench_holds_one_model_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, held = edgelm_model.load, list[weakref.ref[object]]()

    def watched(*source: object, **settings: object) -> object:
        assert not any(ref() for ref in held), "its memory is free by now, without a search for cycles"
        loaded = load(*source, **settings)
        held.extend(map(weakref.ref, (loaded, loaded.runner, loaded.runner._resources)))
        return loaded

    monkeypatch.setattr(edgelm_model, "load", watched)
    gc.disable()
    try:
        result = edgelm("bench", model, "-p", 8, "-n", 1, "-t", "1,2,1", "-r", 1, "-q")
    finally:
        gc.enable()
    assert result.exit_code == 0, result.exception
    assert len(held) == 9


def test_bench_times_the_start_of_processes(model: Path) -> None:
    record = json.loads(edgelm("bench", model, "--startup", "-r", 2, "-o", "json", "--packed", "memory").stdout)
    assert len(record["first_token_s"]) == len(record["end_s"]) == 2
    assert all(0 < first <= end for first, end in zip(record["first_token_s"], record["end_s"], strict=True))
    assert "| first token |" in edgelm("bench", model, "--startup", "-r", 1).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "no-such-file.gguf", "-p", "x"), "no-such-file.gguf"),
        (("run", "smolm2", "-p", "x"), "did you mean smollm2?"),
        (("run", "{model}", "x", "-m", "{model}"), "two models"),
        (("run", "-m", "{model}", "-hf", "a/b", "x"), "two models"),
        (("run", "x", "-m", "{model}", "-p", "y"), "two texts are given, by the argument and by -p"),
        (("eval", "{model}", "-m", "{model}", "-f", "{model}.txt"), "two models"),
        (("run", "{model}", "x", "-p", "y"), "two texts are given, by the argument and by -p"),
        (("run", "{model}", "x", "-f", "-"), "two texts are given, by the argument and by -f"),
        (("tokenize", "{model}", "-p", "x", "-f", "-"), "two texts"),
        (("chat", "{model}", "-sys", "x", "-sysf", "-"), "two system prompts"),
        (("chat", "{model}", "--chat-template", "chatml", "--chat-template-file", "-"), "two chat templates"),
        (("run", "{model}", "x", "--samplers", "top_k", "--sampler-seq", "k"), "two orders of samplers"),
        (("run", "{model}", "x", "--overflow", "error", "--context-shift"), "two policies"),
        (("run", "{model}", "x", "--packed", "file", "--no-mmap"), "two places of weights"),
        (("run", "{model}", "x", "--logprobs", "3"), "--json"),
        (("run", "{model}", "x", "--keep", "-4"), "keep is -4"),
        (("run", "{model}", "x", "-c", "99999999999999999999"), "ctx_size is"),
        (("run", "{model}", "x", "-t", "100000"), "threads is 100000"),
        (("run", "{model}", "-p", "x", "--top-p", "-3"), "top_p"),
        (("run", "{model}", "-p", "x", "--logit-bias", "nonsense"), "logit bias"),
        (("run", "{model}", "-p", "hello " * 200), "context"),
        (("chat", "{model}", "--chat-template", "no-such-template"), "no-such-template"),
        (("run", "{model}", "x", "--packed", "mem"), "mem: cannot be opened"),
        (("embed", "{model}", "-p", "x", "--embd-normalize", "1"), "--embd-normalize"),
        (("bench", "{model}", "-p", "a,b"), "-p"),
        (("bench", "{model}", "-p", "0", "-n", "0"), "nothing to measure"),
        (("bench", "{model}", "--memory", "--startup"), "choose one"),
        (("bench", "{model}", "--memory", "-c", "16"), "ctx_size is 16"),
        (("bench", "{model}", "--memory", "-c", "100000000000000"), "ctx_size is 100000000000000"),
        (("bench", "{model}", "-t", "0", "-p", "1", "-n", "0"), "threads is 0"),
        (("embed", "{model}", "-p", "hello " * 200, "-c", "8"), "--truncate"),
        (("imatrix", "{model}", "-m", "{model}", "-f", "{model}"), "two models"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(model: Path, arguments: tuple[str, ...], said: str) -> None:
    result = edgelm(*(a.replace("{model}", str(model)) for a in arguments), stdin="")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_a_full_window_ends_an_answer(model: Path) -> None:
    result = edgelm("run", model, "-p", "x", "-c", 4, "-n", 20, "--ignore-eos", "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0 and record["finish_reason"] == "context" and record["generation_tokens"] < 5


def test_a_model_that_cannot_converse_is_told_before_the_first_message(
    model: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, said in ((encoder, "is an encoder"), (model, "has no chat template")):
        with monkeypatch.context() as patch:
            patch.setattr("edgelm.gguf_model.GGUFModel._own_template", lambda self: None)
            result = edgelm("chat", path, stdin="")
        assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert edgelm("chat", model, stdin="").exit_code == 0


@pytest.mark.parametrize("name", sorted(CASES))
def test_hostile_files_end_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(CASES[name]())
    result = edgelm("run", path, "-p", "x", "-n", 1, "-q")
    assert result.exception is None or isinstance(result.exception, SystemExit), (name, result.exception)
    assert result.exit_code in (0, 2), (name, result.output)
    if result.exit_code == 2:
        assert len(result.stderr.strip().splitlines()) == 1, (name, result.stderr)


@pytest.mark.parametrize(
    "command",
    [("run", "-f"), ("tokenize", "-f"), ("embed", "-f"), ("eval", "-f"), ("chat", "-sysf"),
     ("chat", "--chat-template-file"), ("imatrix", "-f"), ("quantize", "q.gguf", "q4_0", "--tensor-type-file")],
)  # fmt: skip
def test_a_file_that_is_no_text_is_told_in_one_line(model: Path, command: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Grüße".encode("latin-1"))
    result = edgelm(command[0], model, *command[1:], path, stdin="")
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
    assert "latin.txt: no text in UTF-8: invalid start byte at byte 2" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""


@pytest.mark.parametrize("rest", [("run",), ("run", "-f", "-"), ("tokenize",), ("embed",), ("eval", "-f", "-")])
def test_standard_input_that_is_no_text_is_told_in_one_line(model: Path, rest: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [rest[0], str(model), *rest[1:]], input="Grüße".encode("latin-1"))
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
    assert result.stderr == "edgelm: standard input: no text in UTF-8: invalid start byte at byte 2\n"
    assert result.stdout == ""


def test_the_newline_that_ends_a_file_is_not_part_of_a_prompt(model: Path, tmp_path: Path) -> None:
    def n_tokens(*rest: object, stdin: str | None = None) -> int:
        record = json.loads(edgelm("run", model, *rest, "-n", 0, "--json", stdin=stdin).stdout)
        return int(record["prompt_tokens"])

    (tmp_path / "text.txt").write_text("hello\n", encoding="utf-8")
    plain = n_tokens("-p", "hello")
    assert plain == n_tokens("-f", tmp_path / "text.txt") == n_tokens(stdin="hello\n") == n_tokens(stdin="hello")
    assert plain < n_tokens("-p", "hello\n") == n_tokens(stdin="hello\n\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [(FileNotFoundError(2, "No such file or directory", "a b"), "a b: No such file or directory"),
     (OSError(28, "No space left on device"), "No space left on device"),
     (OSError(12, "Cannot allocate memory"), NO_MEMORY), (OSError("two\nlines"), "two lines")],
)  # fmt: skip
def test_an_error_of_the_system_is_told_without_its_number(error: OSError, line: str) -> None:
    assert told(error) == line


def test_files_of_text_and_standard_input_say_the_same(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello\nthere\n", encoding="utf-8")
    for command in ("tokenize", "embed"):
        from_file = edgelm(command, model, "-f", tmp_path / "text.txt", "--json")
        assert from_file.exit_code == 0 and len(json.loads(from_file.stdout)) > 1
        for rest in ((), ("-f", "-")):
            assert edgelm(command, model, *rest, "--json", stdin="hello\nthere\n").stdout == from_file.stdout
    flag = edgelm("tokenize", model, "-p", "hello", "--ids")
    assert flag.exit_code == 0 and edgelm("tokenize", model, "hello", "--ids").stdout == flag.stdout


def test_no_tokens_asked_for_are_counted_too(model: Path) -> None:
    record = json.loads(edgelm("run", model, "hello", "-n", 0, "--json").stdout)
    assert record["text"] == "" and record["generation_tokens"] == 0 and record["finish_reason"] == "length"
    assert record["prompt_tokens"] == int(edgelm("tokenize", model, "hello", "--show-count").stdout)


def test_streams_that_were_closed_are_taken_as_empty(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    try:
        assert main(["tokenize", str(model)], standalone_mode=False) is None
    finally:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.close()


def test_an_interrupt_while_modules_are_read_is_quiet() -> None:
    program = (
        "import builtins, runpy, sys\nown = builtins.__import__\n"
        "def interrupted(name, *rest, **more):\n"
        "    if name == 'click': raise KeyboardInterrupt\n"
        "    return own(name, *rest, **more)\n"
        "builtins.__import__ = interrupted\nrunpy.run_module('edgelm', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_memory_that_is_not_enough_is_told_in_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **more: object) -> None:
        raise MemoryError

    monkeypatch.setattr("edgelm.model.load", allocate)
    result = edgelm("run", model, "hello", "-n", 1)
    assert (result.exit_code, result.stderr) == (2, f"edgelm: {NO_MEMORY}\n")


def test_debug_shows_the_traceback() -> None:
    command = ("run", "no-such-file.gguf", "-p", "x")
    for arguments in (("--debug", *command), (*command, "--debug"), (*command, "--debug", "--")):
        result = edgelm(*arguments)
        assert result.exception is not None and not isinstance(result.exception, SystemExit)
    assert isinstance(edgelm("run", "no-such-file.gguf", "--", "--debug").exception, SystemExit)


def test_flags_of_llama_cpp_that_change_nothing_are_taken_and_told(model: Path) -> None:
    plain = edgelm("run", model, "-p", "hello", "-n", 4, "--temp", 0)
    flags = ("-ngl", 99, "-fa", "-b", 2048, "-no-cnv", "--no-display-prompt", "--flash-attn", "auto", "--no-warmup")
    same = edgelm("run", model, "-p", "hello", "-n", 4, "--temp", 0, *flags)
    assert (same.exit_code, same.stdout) == (0, plain.stdout) and plain.stderr == ""
    told = sorted(line.split()[1] for line in same.stderr.splitlines() if "changes nothing here: " in line)
    assert told == ["--no-display-prompt", "--no-warmup", "-b", "-fa", "-ngl", "-no-cnv"]
    assert "-ngl" not in edgelm("run", "--help").stdout


@pytest.mark.parametrize(("command", "said"), [("show", "edgelm info"), ("serve", "edgelm.load()")])
def test_commands_of_others_lead_to_ours(command: str, said: str) -> None:
    result = edgelm(command, "smollm2")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_every_command_and_flag_has_help() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        shown = edgelm(name, "--help")
        assert shown.exit_code == 0 and "Usage" in shown.stdout
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[0] in shown.stdout and option.help, (name, option.opts)


def test_help_imports_nothing_heavy() -> None:
    """What makes `edgelm --help` immediate: no numeric library, tokenizer or terminal toolkit is imported for it."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from edgelm.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "heavy = {'numpy', 'numba', 'llvmlite', 'tokenizers', 'jinja2', 'rich', 'prompt_toolkit'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_settings_of_the_process_come_before_numpy_and_yield_to_the_user() -> None:
    code = (
        "import os, sys\n"
        "from edgelm.__main__ import prepare\n"
        "prepare()\n"
        "print(os.environ['OPENBLAS_THREAD_TIMEOUT'], 'numpy' in sys.modules)"
    )
    for asked, found in ((None, "20"), ("26", "26")):
        rest = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"}
        settings = rest if asked is None else {**rest, "OPENBLAS_THREAD_TIMEOUT": asked}
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, check=True)
        assert done.stdout.split() == [found, "False"]


def test_garbage_is_collected_seldom_but_in_conversions() -> None:
    code = (
        "import gc\n"
        "from edgelm.__main__ import prepare\n"
        "from edgelm.cli import main\n"
        "before = gc.get_threshold()[0]\n"
        "prepare()\n"
        "for name in ('run', 'convert'):\n"
        "    main.get_command(None, name)\n"
        "    print(gc.get_threshold()[0] / before > 1)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_closed_pipe_is_no_error(model: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgelm", "run", str(model), "-p", "x", "-n", "64", "--ignore-eos", "-q"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert "Traceback" not in done.stderr and done.returncode in (2, 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["pull", "--list"], ["list", "--json"]]
)
def test_a_full_disk_is_told_in_a_line(arguments: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-P", "-m", "edgelm", *arguments]
    with open("/dev/full", "w") as full:
        settings = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=settings)
    assert (done.stderr, done.returncode) == ("edgelm: No space left on device\n", 2)


def test_readable_names_and_sizes() -> None:
    facts = {"n_bytes": 2048, "types": {"Q4_0": 3}, "rows": [{"a": 1, "b": "x"}], "ratio": 1.23456789, "no_types": {},
             "ends": ["0 <a>", "2 <b>"]}  # fmt: skip
    lines = readable(facts)
    assert lines[0].split() == ["n", "bytes", "2.0", "KiB"]
    assert lines[2].split() == ["Q4_0", "3"]
    assert lines[4].split() == ["1", "x"]
    assert lines[5].split() == ["ratio", "1.23457"] and lines[6].split() == ["no", "types", "none"]
    assert lines[7].split() == ["ends", "0", "<a>,", "2", "<b>"]


def test_columns_are_aligned_and_a_row_is_a_line() -> None:
    assert table([["A", "B"], ["xyz\n", "1"], ["C:\\y", ""]]) == ["A      B", "xyz\\n  1", "C:\\y"]


def test_json_is_valid_whatever_the_numbers_are() -> None:
    facts = {"a": float("nan"), "b": [float("inf"), 1.5], "c": ({"d": -float("inf")}, "é"), "e": Path("x")}

    def never(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(json_text(facts), parse_constant=never)
    assert read == {"a": None, "b": [None, 1.5], "c": [{"d": None}, "é"], "e": "x"}


def test_nothing_of_a_file_reaches_the_terminal_as_a_command() -> None:
    assert printable("a\x1b[2Jb\tc\n\x07") == "a\\x1b[2Jb\tc\n\\x07"
    assert printable("\u202eexe.txt\u2028\x9b") == "\\u202eexe.txt\\u2028\\x9b"
    for text in ("日本語\u3000です", "1\u00a0000", "👩\u200d🚀", "می\u200cشود", "co\u00adop"):
        assert printable(text) == text, "spaces and joiners of other languages stay"
    assert "\x1b" not in "".join(readable({"name": "\x1b]0;owned\x07", "rows": [{"a": "\x1b"}]}))
