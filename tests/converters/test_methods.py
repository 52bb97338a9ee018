"""Methods of rounding: what each gives, what it loses on a text, and calibrations that were stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from side_by_side import hidden_states
from tiny import tiny

from converters import block_codes, calibrate, checkpoint, chunks, methods, structure
from converters.calibrated import Choices, quantize_model
from converters.checkpoint import Checkpoint
from converters.chunks import Opened
from converters.conversion import Calibration, Text
from converters.finished import Finished
from converters.quantizers import quantize
from converters.recipe import Plan, Recipe, make_plan
from edgelm.errors import FormatError, UsageError
from edgelm.formats import QTensor, by_name
from edgelm.weights import Weights

WORDS = "the quick brown fox jumps over the lazy dog and a cat that sat on the mat while it rained in the north "
TEXT = Calibration(Text.of(WORDS * 12, "words"), 32, 6)


def opened(variant: str, folder: Path, type_: str = "q4_0") -> tuple[Checkpoint, Plan]:
    read = checkpoint.read(tiny(variant, folder=folder))
    return read, make_plan(read.config, read.tensors, Recipe(type_))


def written(made: methods.Rounded, plan: Plan) -> dict[str, np.ndarray]:
    """All quantized tensors, as a writer makes them."""
    out = {}
    for name, type_ in methods.quantized(made.checkpoint, plan).items():
        data = made.ready.get(name)
        if data is None:
            w = made.checkpoint.tensors[name].read().reshape(-1, made.checkpoint.tensors[name].shape[-1])
            data = quantize(type_, w, made.importance.get(name))
        out[name] = np.array(data)
    return out


def error(read: Checkpoint, plan: Plan, made: methods.Rounded) -> float:
    """Mean square of what hidden states of the calibration text lose in the layers, relative to theirs."""
    source, changed = calibrate.opened(read), calibrate.opened(made.checkpoint)
    tokens = chunks.chunked(source, TEXT.text.text, 32, TEXT.chunks)
    types = {step.name: step.format for step in plan.steps}
    weights = dict(changed.weights.by_name)
    for name, data in written(made, plan).items():
        if name.startswith("blk."):
            weights[name] = QTensor(name, types[name], weights[name].shape, data)
    changed = Opened(source.config, Weights.from_gguf(source.config, weights), source.tokenizer)
    was, now = chunks.forward(source, tokens), chunks.forward(changed, tokens)
    return float(np.mean((now - was) ** 2) / np.mean(was**2))


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma3", "gpt2", "llama-fused", "bert-mean"])
def test_what_reads_the_text_loses_less(variant: str, tmp_path: Path) -> None:
    read, plan = opened(variant, tmp_path)
    lost = {}
    for method in ("rtn", "imatrix", "awq", "gptq"):
        made = methods.rounded(read, plan, method, None if method == "rtn" else TEXT, tmp_path / method)
        for name, how in made.methods.items():  # AWQ cannot scale what gpt2's ffn_down reads
            assert how in ((method, "imatrix") if name.startswith("blk.") and method == "awq" else (method, "rtn"))
        lost[method] = error(read, plan, made)
    assert lost["gptq"] < 0.8 * lost["imatrix"] and lost["imatrix"] < lost["rtn"] and lost["awq"] < 1.1 * lost["rtn"]


def test_importances_are_those_of_an_imatrix(tmp_path: Path) -> None:
    read, plan = opened("llama-gqa", tmp_path, "q8_0")
    by = {m: methods.rounded(read, plan, m, TEXT, tmp_path / m).importance for m in ("imatrix", "gptq")}
    assert by["gptq"].keys() == by["imatrix"].keys()
    for name, values in by["imatrix"].items():
        np.testing.assert_allclose(by["gptq"][name], values, rtol=0.1, atol=0.01 * values.mean())


@pytest.mark.parametrize(
    ("type_", "text", "method"), [("q4_0", TEXT, "gptq"), ("q8_0", TEXT, "rtn"), ("q4_0", None, "rtn")]
)
def test_auto_calibrates_where_that_gains(type_: str, text: Calibration | None, method: str, tmp_path: Path) -> None:
    read, plan = opened("llama-gqa", tmp_path, type_)
    auto = methods.rounded(read, plan, "auto", text, tmp_path / "auto")
    chosen = methods.rounded(read, plan, method, text, tmp_path / "chosen")
    assert auto.methods == chosen.methods and method in auto.methods.values()
    of_auto, of_chosen = written(auto, plan), written(chosen, plan)
    assert all(np.array_equal(of_auto[name], data) for name, data in of_chosen.items())


CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_methods import TEXT, checkpoint, make_plan, methods, Recipe

def kill(stage, done, total):
    if done == int(sys.argv[6]):
        os.kill(os.getpid(), signal.SIGKILL)

read = checkpoint.read(Path(sys.argv[3]))
plan = make_plan(read.config, read.tensors, Recipe("q4_0"))
methods.rounded(read, plan, sys.argv[5], TEXT, Path(sys.argv[4]), kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
@pytest.mark.parametrize(("method", "at"), [("gptq", 6), ("awq", 3)])
def test_a_process_that_was_killed_goes_on(method: str, at: int, tmp_path: Path) -> None:
    path, work, tests = tiny("qwen3", folder=tmp_path), tmp_path / "work", Path(__file__).parent
    arguments = [str(tests), str(tests.parent), str(path), str(work), method, str(at)]
    assert subprocess.run([sys.executable, "-c", CHILD, *arguments]).returncode == -signal.SIGKILL
    left = {file.name: file.read_bytes() for file in (work / method).glob("*.rows")}
    assert len(left) == at
    read = checkpoint.read(path)
    plan = make_plan(read.config, read.tensors, Recipe("q4_0"))
    again = written(methods.rounded(read, plan, method, TEXT, work), plan)
    whole = written(methods.rounded(read, plan, method, TEXT, tmp_path / "whole"), plan)
    assert all((work / method / name).read_bytes() == data for name, data in left.items())
    assert again.keys() == whole.keys()
    for name, data in again.items():
        np.testing.assert_array_equal(data, whole[name])


class Killed(BaseException):
    """What no code catches by mistake."""


@pytest.mark.parametrize("at", [1, 5, 13])
@pytest.mark.parametrize("part_bytes", [chunks.PART_BYTES, 4 * 2 * 32 * 96 * 2])
def test_a_calibration_that_was_killed_goes_on(
    at: int, part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "PART_BYTES", part_bytes)
    read, plan = opened("llama-gqa", tmp_path, "q4_1")
    whole = written(methods.rounded(read, plan, "gptq", TEXT, tmp_path / "whole"), plan)
    work = tmp_path / "killed"

    def kill(stage: str, done: int, total: int) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        methods.rounded(read, plan, "gptq", TEXT, work, kill)
    before = {path.name: path.stat().st_mtime_ns for path in (work / "gptq").glob("*.rows")}
    assert len(before) == at
    again = methods.rounded(read, plan, "gptq", TEXT, work)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in (work / "gptq").glob("*.rows")}.items()
    for name, data in written(again, plan).items():
        np.testing.assert_array_equal(data, whole[name])


def test_what_was_finished_for_something_else_is_not_taken(tmp_path: Path) -> None:
    read, plan = opened("llama-gqa", tmp_path)
    first = written(methods.rounded(read, plan, "gptq", TEXT, tmp_path / "work"), plan)
    other = Calibration(Text.of(WORDS.upper() * 12, "words"), 32, 6)
    second = written(methods.rounded(read, plan, "gptq", other, tmp_path / "work"), plan)
    clean = written(methods.rounded(read, plan, "gptq", other, tmp_path / "clean"), plan)
    for name in clean:
        np.testing.assert_array_equal(second[name], clean[name])
    assert any((first[name] != second[name]).any() for name in first)


DAMAGES = [lambda b: b[:-1], lambda b: b[:40], lambda b: b"", lambda b: b[:60] + b"\xff" + b[61:]]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_taken_for_none(damage: Any, tmp_path: Path) -> None:
    store = Finished(tmp_path, "me")
    rows = np.arange(200, dtype=np.uint8).reshape(4, 50)
    store.put("a.weight", rows)
    store.put("b.weight", rows[:1])
    path = tmp_path / "a.weight.rows"
    path.write_bytes(damage(path.read_bytes()))
    again = Finished(tmp_path, "me")
    assert list(again) == ["b.weight"] and len(again) == 1
    np.testing.assert_array_equal(again["b.weight"], rows[:1])
    assert again.get("a.weight") is None
    assert not Finished(tmp_path, "somebody else")


@pytest.mark.parametrize("method", ["imatrix", "gptq", "awq"])
def test_a_model_that_computes_no_numbers(method: str, tmp_path: Path) -> None:
    read, plan = opened("llama-gqa", tmp_path)
    norm = read.tensors["blk.1.attn_norm.weight"]
    broken = replace(norm, rows=lambda start, stop: np.full(stop - start, np.nan, np.float32), as_is=None)
    read = replace(read, tensors={**read.tensors, "blk.1.attn_norm.weight": broken})
    with pytest.raises(FormatError, match=r"blk\.1\.attn_q\.weight are no numbers"):
        methods.rounded(read, plan, method, TEXT, tmp_path / "work")


def test_chunks_come_from_all_over_the_text(tmp_path: Path) -> None:
    read, _ = opened("llama-gqa", tmp_path)
    source, text = calibrate.opened(read), Text.of(" ".join(map(str, range(400))), "numbers")
    whole = methods.chunks_of(source, Calibration(text, 32, None))
    np.testing.assert_array_equal(whole, chunks.chunked(source, text.text, 32, None))
    some = methods.chunks_of(source, Calibration(text, 32, 5))
    assert [int(np.flatnonzero((whole == chunk).all(axis=1))[0]) for chunk in some] == [
        0, (n := len(whole) - 1) // 4, n // 2, 3 * n // 4, n,
    ]  # fmt: skip
    np.testing.assert_array_equal(methods.chunks_of(source, Calibration(text, 32, 10**6)), whole)


def test_methods_that_cannot_be(tmp_path: Path) -> None:
    read, plan = opened("llama-gqa", tmp_path)
    with pytest.raises(UsageError, match="rtn"):
        methods.rounded(read, plan, "magic", TEXT, tmp_path)
    for method in ("imatrix", "gptq", "awq"):
        with pytest.raises(UsageError, match="text"):
            methods.rounded(read, plan, method, None, tmp_path)


@pytest.mark.parametrize("variant", ["gemma3", "gpt2", "phi3", "bert-mean", "nomic-bert", "mistral", "gemma2"])
def test_chunks_without_a_cache_are_chunks_with_one(variant: str, tmp_path: Path) -> None:
    source = Opened.read(tiny(variant, folder=tmp_path))
    tokens = np.random.default_rng(0).integers(3, 60, (3, 32)).astype(np.int32)
    from edgelm.models import model_of
    from edgelm.reference import Reference

    runner = Reference(model_of(source.config), source.config, source.weights, head="hidden", n_ctx=32)
    np.testing.assert_allclose(chunks.forward(source, tokens), hidden_states(runner, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("variant", "n"), [("llama-gqa", 4), ("gpt2", 4), ("gemma3", 0), ("bert-mean", 0)])
def test_who_adds_to_the_stream(variant: str, n: int, tmp_path: Path) -> None:
    source = Opened.read(tiny(variant, folder=tmp_path))
    found = structure.adding(structure.recorded(source.config, source.weights))
    assert len(found) == n and all("attn_output" in name or "ffn_down" in name for name in found)


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma3", "gemma2", "gpt2", "bert-mean"])
def test_targets_make_up_for_what_was_lost(variant: str, tmp_path: Path) -> None:
    read, plan = opened(variant, tmp_path)
    source = calibrate.opened(read)
    tokens = chunks.chunked(source, TEXT.text.text, 32, TEXT.chunks)
    types = dict.fromkeys(structure.linears(structure.recorded(source.config, source.weights)), "Q4_0")
    lost = []
    for mend in (False, True):
        found: dict[str, np.ndarray] = {}
        quantize_model(
            source, tokens, types, lambda name, data, _, found=found: found.__setitem__(name, data),
            choices=Choices(mend=mend),
        )  # fmt: skip
        lost.append(error(read, plan, methods.Rounded(read, ready=found)))
    assert lost[1] < 0.85 * lost[0]
    assert all(block_codes.decode(by_name("Q4_0"), data).any() for data in found.values())
