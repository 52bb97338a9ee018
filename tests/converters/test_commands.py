"""`edgelm convert` and `edgelm quantize` as commands: what they print, what they leave behind, how they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_folder
import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result

from converters import imatrix
from edgelm import gguf
from edgelm.cli import main


def edgelm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_conversion(tmp_path: Path) -> None:
    folder, out = hf_folder.write(tmp_path, "qwen3"), tmp_path / "out.gguf"
    done = edgelm("convert", folder, out, "--type", "q8_0", "--json", "-q")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["out"] == str(out) and report["n_bytes"] == out.stat().st_size
    assert {t["to"] for t in report["tensors"]} == {"F32", "Q8_0"}
    assert all(len(t["sha256"]) == 64 for t in report["tensors"])
    done = edgelm("convert", folder, out, "--type", "q4_k_m")
    assert done.exit_code == 0
    assert "fallback: Q4_K -> Q5_0" in done.stdout
    assert gguf.read(out).metadata["general.file_type"] == 15


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    folder, out = hf_folder.write(tmp_path, "llama-gqa"), tmp_path / "out.gguf"
    before = sorted(tmp_path.rglob("*"))
    done = edgelm("convert", folder, out, "--type", "q4_k_m", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    query = next(t for t in plan["tensors"] if t["tensor"] == "blk.0.attn_q.weight")
    assert query["source"] == ["model.layers.0.self_attn.q_proj.weight"]
    assert (query["from"], query["to"], query["fallback_from"], query["n_bytes"]) == ("F32", "Q5_0", "Q4_K", 2816)
    assert "interleaved" in query["change"]
    text = edgelm("convert", folder, out, "--type", "q4_k_m", "--dry-run").stdout
    assert "blk.0.attn_q.weight" in text and "instead of Q4_K" in text and "tensors fall back" in text
    assert sorted(tmp_path.rglob("*")) == before
    edgelm("convert", folder, out, "--type", "q4_k_m", "-q")
    assert out.stat().st_size == plan["n_bytes"]


def test_names_of_files_that_are_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_folder.write(tmp_path, "qwen2")
    monkeypatch.chdir(tmp_path)
    assert edgelm("convert", folder).exit_code == 0
    assert Path("qwen2-F16.gguf").exists()
    assert edgelm("quantize", "qwen2-F16.gguf", "q8_0").exit_code == 0
    assert Path("ggml-model-Q8_0.gguf").exists()
    assert edgelm("quantize", "qwen2-F16.gguf", "third.gguf", "7", "2").exit_code == 0
    theirs, ours = Path("third.gguf").read_bytes(), Path("ggml-model-Q8_0.gguf").read_bytes()
    assert theirs == ours


def test_quantize_as_llama_quantize_does(tmp_path: Path) -> None:
    source = tiny.tiny("llama-gqa", folder=tmp_path, hidden_size=256, num_attention_heads=8, intermediate_size=256)
    (tmp_path / "types.txt").write_text("ffn_up=q5_1\nffn_gate=q4_1 ")
    flags = [
        "--tensor-type",
        "attn_v=q8_0",
        "--tensor-type-file",
        tmp_path / "types.txt",
        "--output-tensor-type",
        "f16",
    ]
    flags += ["--override-kv", "llama.rope.freq_base=float:20000", "--override-kv", "general.name=str:Other"]
    done = edgelm("quantize", *flags, source, tmp_path / "out.gguf", "q4_0", 2)
    assert done.exit_code == 0, done.output
    file = gguf.read(tmp_path / "out.gguf")
    formats = {name.split(".", 2)[-1]: t.format.name for name, t in file.tensors.items() if "norm" not in name}
    assert formats["attn_v.weight"] == "Q8_0" and formats["attn_q.weight"] == "Q4_0"
    assert formats["ffn_up.weight"] == "Q5_1" and formats["ffn_gate.weight"] == "Q4_1"
    assert file.tensors["output.weight"].format.name == "F16"
    assert (file.metadata["llama.rope.freq_base"], file.metadata["general.name"]) == (20000.0, "Other")


def test_measured_columns_are_quantized_better(tmp_path: Path) -> None:
    """From a text to an imatrix to a file whose error counts where the text drives it."""
    folder, text = hf_folder.write(tmp_path, "qwen3"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    plain, measured, other = (tmp_path / f"{name}.gguf" for name in ("plain", "measured", "other"))
    assert edgelm("convert", folder, plain, "--type", "f32", "-q").exit_code == 0
    done = edgelm("imatrix", plain, "-f", text, "-c", 32, "-o", tmp_path / "imatrix.gguf", "-q")
    assert done.exit_code == 0, done.output
    done = edgelm("quantize", "--imatrix", tmp_path / "imatrix.gguf", plain, measured, "q4_0", "-q")
    assert done.exit_code == 0, done.output
    assert edgelm("quantize", plain, other, "q4_0", "-q").exit_code == 0
    source, file, unweighted = gguf.read(plain), gguf.read(measured), gguf.read(other)
    assert file.metadata["quantize.imatrix.file"] == "imatrix.gguf"
    assert file.metadata["quantize.imatrix.entries_count"] == len(imatrix.read(tmp_path / "imatrix.gguf").entries)
    name = "blk.0.ffn_down.weight"
    weights = imatrix.read(tmp_path / "imatrix.gguf").importance(name)
    exact = source.tensors[name].dequantize()
    errors = [(weights * (f.tensors[name].dequantize() - exact) ** 2).sum() for f in (file, unweighted)]
    assert errors[0] < errors[1]


def test_an_imatrix_of_another_model(tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": imatrix.Entry(np.ones((1, 7), np.float32), np.ones(1, np.float32))}
    imatrix.save(tmp_path / "imatrix.gguf", imatrix.Imatrix(entries))
    source = tiny.tiny("llama-gqa", folder=tmp_path)
    done = edgelm("quantize", "--imatrix", tmp_path / "imatrix.gguf", source, tmp_path / "out.gguf", "q8_0")
    assert done.exit_code == 2 and "another model" in done.stderr and not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("convert nothing out.gguf", "Hugging Face folder"),
        ("convert {folder} out.gguf --type q9_k", ""),
        ("convert {folder} out.gguf --tensor-type attn_v", ""),
        ("convert {folder} out.gguf --type q8_0 --tensor-type nothing=q8_0", ""),
        ("convert {folder} out.gguf --pre mystery --type f16", ""),
        ("convert {folder} out.gguf --override-kv a=b", ""),
        ("convert {folder} out.gguf --override-kv a=int:99999999999999999999", "is no int"),
        ("convert {folder} out.gguf --outfile other.gguf", "two places to write"),
        ("convert {folder} out.gguf --type q4_k --no-fallback", ""),
        ("convert {folder}/model.safetensors out.gguf", ""),
        ("convert hf:no/such/../thing out.gguf", ""),
        ("convert {folder}/.. out.gguf", "no config.json"),
        ("convert {folder} {folder}/no/folder/out.gguf", "no folder"),
        ("convert {folder} out.gguf --report-html {folder}/no/page.html", "no folder"),
        ("quantize {folder}", ""),
        ("quantize a.gguf b.gguf", "TYPE"),
        ("quantize nothing.gguf q8_0", ""),
        ("quantize a b c d e", ""),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: str, said: str, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa")
    done = edgelm(*arguments.format(folder=folder).replace("out.gguf", str(tmp_path / "out.gguf")).split())
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("edgelm: ")
    assert said in done.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """As an administrator one could have written over /dev/null."""
    folder, pipe = hf_folder.write(tmp_path, "llama-gqa"), tmp_path / "pipe"
    source, text = tmp_path / "source.gguf", tmp_path / "text.txt"
    assert edgelm("convert", folder, source).exit_code == 0
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    os.mkfifo(pipe)
    for command in (
        ("convert", folder, pipe), ("convert", folder, tmp_path / "out.gguf", "--report-html", pipe),
        ("quantize", source, pipe, "q8_0"), ("imatrix", source, "-f", text, "-o", pipe), ("pack", source, pipe),
    ):  # fmt: skip
        done = edgelm(*command, "-q")
        assert done.exit_code == 2 and f"{pipe} is no file; name the file to write" in done.stderr, command
        assert pipe.is_fifo() and not (tmp_path / "out.gguf").exists()
    assert not list(tmp_path.glob("pipe?*"))


TEXT = ("--calibrate", "text.txt", "--calibrate-ctx", "32", "--eval-chunks", "2")
CALIBRATED, PRUNED = (*TEXT, "--method", "gptq"), (*TEXT, "--method", "rtn", "--prune", "ffn=32,hidden=32")


def whole_and_command(folder: Path, *flags: str) -> tuple[Path, list[str], float]:
    """(a file that a conversion made in peace, the command that makes out.gguf, how long it takes in seconds)."""
    source = hf_folder.write(folder, "llama-gqa", hidden_size=256, num_attention_heads=8)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and runs. " * 60)
    command = [sys.executable, "-m", "edgelm", "convert", str(source), "out.gguf", "--type", "q4_k_m", "-q", *flags]
    for _ in range(2):  # the first one compiles
        began = time.perf_counter()
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        seconds = time.perf_counter() - began
    return (folder / "out.gguf").rename(folder / "whole.gguf"), command, seconds


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
@pytest.mark.parametrize(
    ("flags", "n"), [((), 20), (CALIBRATED, 3), (PRUNED, 2)], ids=["plain", "calibrated", "pruned"]
)
def test_kill_9_at_random_moments(flags: tuple[str, ...], n: int, tmp_path: Path) -> None:
    """Conversions in a row die; the last one goes on and gives the bytes of one that was left in peace."""
    whole, command, seconds = whole_and_command(tmp_path, *flags)
    rng = np.random.default_rng(1)
    for _ in range(n):
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            time.sleep(rng.uniform(0.3, 1.0) * seconds)
            child.send_signal(signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("out.gguf.*"))


@pytest.mark.skipif(os.name != "posix", reason="limits of files are of POSIX")
@pytest.mark.parametrize("flags", [(), CALIBRATED], ids=["plain", "calibrated"])
def test_no_room_on_the_disk(flags: tuple[str, ...], tmp_path: Path) -> None:
    """A clear line, exit code 2, nothing under the final name; with room, the same command makes the same file."""
    import resource

    whole, command, _ = whole_and_command(tmp_path, *flags)
    (tmp_path / "out.report.json").unlink()
    limit = whole.stat().st_size // 2
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "make room" in done.stderr and not (tmp_path / "out.gguf").exists()
    assert not (tmp_path / "out.report.json").exists()
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "out.gguf").read_bytes() == whole.read_bytes()


def test_another_package_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "converters").mkdir()
    (tmp_path / "converters" / "__init__.py").write_text("")
    shutil.copytree(Path(gguf.__file__).parent, tmp_path / "edgelm", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "edgelm"]
    done = subprocess.run([*command, "convert", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "another one of that name" in done.stderr
    assert "convert " not in subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True).stdout
