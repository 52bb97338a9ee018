"""Adapters: what peft computes with them beside a model is what the model computes with them merged into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hf_folder
import lora_folder
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from test_convert import nmse, outputs

from converters import lora
from converters.conversion import Options
from converters.convert_flags import adapter
from converters.lora_export import write_adapter
from converters.pipeline import convert, prepare
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.arch import Config, tensors
from edgelm.cli import main
from edgelm.errors import EdgelmError, FormatError, SourceError, UnsupportedError, UsageError

GOLDEN = Path(__file__).parent.parent / "golden"
DATA: dict[str, Any] = json.loads((GOLDEN / "lora.json").read_text())


def case(name: str, folder: Path) -> tuple[Path, Path]:
    """(the folder of the model, the folder of the adapter) of a case."""
    model = hf_folder.write(folder, lora_folder.CASES[name].variant)
    return model, lora_folder.write(folder / "adapter", DATA[name]["config"], DATA[name]["shapes"])


def merged(model: Path, folder: Path, out: Path, scale: float = 1.0) -> Any:
    return convert(model, out, Recipe("f32"), Options(lora=((folder, scale),)))


@pytest.mark.parametrize("name", lora_folder.CASES)
def test_merged_gives_what_peft_gives(name: str, tmp_path: Path) -> None:
    model, folder = case(name, tmp_path)
    report = merged(model, folder, tmp_path / "out.gguf")
    with np.load(GOLDEN / "lora.npz") as golden:
        n_ctx = tiny.VARIANTS[lora_folder.CASES[name].variant].n_ctx
        ours = outputs(tmp_path / "out.gguf", golden[f"{name}/tokens"], n_ctx)[golden["positions"]]
        assert nmse(ours, golden[f"{name}/logits"]) < 1e-11
    (fact,) = report.transformations["lora"]
    assert fact["adapter"] == "adapter" and fact["scale"] == 1.0 and len(fact["sha256"]) == 64
    assert json.loads(gguf.read(tmp_path / "out.gguf").metadata["edgelm.lora"]) == [fact]


def test_merging_is_a_sum_of_matrices(tmp_path: Path) -> None:
    """Base + scale * alpha / r * B A, in Hugging Face's arrangement and then in ours; everything else as it was."""
    model, folder = case("permuted", tmp_path)
    hf = tiny.hf_config("llama-gqa")
    config, expected = Config.from_hf(hf), hf_folder.state("llama-gqa", hf)
    for name, shape in DATA["permuted"]["shapes"].items():
        if not name.endswith("lora_A.weight"):
            continue
        other = name.replace("lora_A", "lora_B")
        b = lora_folder.factor(other, tuple(DATA["permuted"]["shapes"][other]))
        product = b @ lora_folder.factor(name, tuple(shape))
        key = name.removeprefix("base_model.model.").replace(".lora_A", "")
        expected[key] = expected[key] + np.float32(0.5 * 8 / 4) * product
    merged(model, folder, tmp_path / "out.gguf", 0.5)
    found = gguf.read(tmp_path / "out.gguf").tensors
    specs = {spec.hf: spec for spec in tensors(config) if spec.hf}
    for key, array in expected.items():
        np.testing.assert_allclose(found[specs[key].gguf].dequantize(), specs[key].from_hf(array, config), atol=1e-6)


def test_a_gguf_file_is_a_base_as_well(tmp_path: Path) -> None:
    model, folder = case("permuted", tmp_path)
    merged(model, folder, tmp_path / "direct.gguf")
    convert(model, tmp_path / "base.gguf", Recipe("f32"))
    merged(tmp_path / "base.gguf", folder, tmp_path / "out.gguf")
    direct, out = gguf.read(tmp_path / "direct.gguf").tensors, gguf.read(tmp_path / "out.gguf").tensors
    assert all(np.array_equal(direct[name].data, out[name].data) for name in direct)
    assert prepare(tmp_path / "base.gguf", Recipe("auto"), Options(lora=((folder, 1.0),))).plan.type == "F16"
    with pytest.raises(UsageError, match="source itself"):
        merged(model, folder, folder / "adapter_model.safetensors")


def test_twice_half_is_once(tmp_path: Path) -> None:
    model, folder = case("fused", tmp_path)
    merged(model, folder, tmp_path / "once.gguf")
    report = convert(model, tmp_path / "twice.gguf", Recipe("f32"), Options(lora=((folder, 0.5),) * 2))
    assert [fact["scale"] for fact in report.transformations["lora"]] == [0.5, 0.5]
    once, twice = gguf.read(tmp_path / "once.gguf").tensors, gguf.read(tmp_path / "twice.gguf").tensors
    for name in once:
        np.testing.assert_allclose(once[name].dequantize(), twice[name].dequantize(), atol=1e-6)


def test_an_embedding_that_was_only_saved_stays_the_output(tmp_path: Path) -> None:
    """Peft writes embeddings beside an adapter when a vocabulary grew; unchanged, they change nothing."""
    model, folder = case("tied head", tmp_path)
    embedding = hf_folder.state("llama-mqa", tiny.hf_config("llama-mqa"))["model.embed_tokens.weight"]
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    arrays = {n: lora_folder.factor(n, tuple(DATA["tied head"]["shapes"][n])) for n in map(name.format, "AB")}
    lora_folder.write_arrays(folder, {**arrays, "base_model.model.model.embed_tokens.weight": embedding})
    merged(model, folder, tmp_path / "out.gguf")
    assert "output.weight" not in gguf.read(tmp_path / "out.gguf").tensors
    lora_folder.write_arrays(folder, {**arrays, "base_model.model.model.embed_tokens.weight": embedding + 1})
    report = merged(model, folder, tmp_path / "out.gguf")
    found = gguf.read(tmp_path / "out.gguf").tensors
    assert np.array_equal(found["output.weight"].dequantize(), embedding)
    assert np.array_equal(found["token_embd.weight"].dequantize(), embedding + 1)
    assert any("no longer the embedding" in text for text in report.notes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", 1.0)), ("a:0.5", ("a", 0.5)), ("C:\\x", ("C:\\x", 1.0)), ("C:\\x:2", ("C:\\x", 2.0))],
)
def test_the_flag(text: str, expected: tuple[str, float]) -> None:
    assert adapter(text) == (Path(expected[0]), expected[1])


# ---------------------------------------------------------------------------------------------------- GGUF adapters


@pytest.mark.parametrize("name", ["permuted", "rslora", "patterns", "head", "conv1d", "fused"])
def test_a_gguf_adapter_adds_the_same(name: str, tmp_path: Path) -> None:
    """alpha / r * b a of the file, as llama.cpp adds it, is what merging adds."""
    model, folder = case(name, tmp_path)
    facts = write_adapter(folder, model, tmp_path / "adapter.gguf")
    merged(model, folder, tmp_path / "merged.gguf")
    convert(model, tmp_path / "base.gguf", Recipe("f32"))
    file = gguf.read(tmp_path / "adapter.gguf")
    assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.type"] == "lora"
    base, whole = gguf.read(tmp_path / "base.gguf").tensors, gguf.read(tmp_path / "merged.gguf").tensors
    changed = {n for n in base if not np.array_equal(base[n].data, whole[n].data)}
    assert changed == {n.rpartition(".")[0] for n in file.tensors} and len(facts["tensors"]) == 2 * len(changed)
    for tensor in changed:
        a, b = (file.tensors[f"{tensor}.lora_{half}"].dequantize() for half in "ab")
        rank = b.shape[1]
        added = (b @ a if tensor != "token_embd.weight" else a @ b.T) * (file.metadata["adapter.lora.alpha"] / rank)
        np.testing.assert_allclose(whole[tensor].dequantize() - base[tensor].dequantize(), added, atol=2e-6)


def test_what_no_runtime_can_add(tmp_path: Path) -> None:
    for name, message in (("in full", "in full"), ("tied head", "no tensor of its own")):
        model, folder = case(name, tmp_path / name)
        with pytest.raises(UnsupportedError, match=f"{message}.*--lora"):
            write_adapter(folder, model, tmp_path / "adapter.gguf")
    with pytest.raises(UsageError, match="f32, f16"):
        write_adapter(folder, model, tmp_path / "adapter.gguf", "q4_k_m")
    assert not (tmp_path / "adapter.gguf").exists()


def test_the_command(tmp_path: Path) -> None:
    model, folder = case("permuted", tmp_path)
    for type_, formats in (("f16", {"F16"}), ("q8_0", {"Q8_0", "F16"})):
        arguments = ["convert", folder, tmp_path / "a.gguf", "--base", model, "--type", type_, "--json", "-q"]
        done = CliRunner().invoke(main, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        assert {t["to"] for t in json.loads(done.stdout)["tensors"]} == formats
        assert {t.format.name for t in gguf.read(tmp_path / "a.gguf").tensors.values()} == formats
    done = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "b.gguf")])
    assert done.exit_code == 2 and "--base" in done.stderr
    done = CliRunner().invoke(main, ["convert", str(model), str(tmp_path / "m.gguf"), "--lora", f"{folder}:0.5", "-q"])
    assert done.exit_code == 0 and '"scale": 0.5' in gguf.read(tmp_path / "m.gguf").metadata["edgelm.lora"]


# --------------------------------------------------------------------------------------------------- what is refused

Q = "base_model.model.model.layers.0.self_attn.q_proj."
CONFIGS: dict[str, tuple[dict[str, Any], type[EdgelmError]]] = {
    "DoRA": ({"use_dora": True}, UnsupportedError),
    "another kind": ({"peft_type": "IA3"}, UnsupportedError),
    "no kind": ({"peft_type": None}, UnsupportedError),
    "layers repeated": ({"layer_replication": [[0, 1], [0, 1]]}, UnsupportedError),
    "a bias of the product": ({"lora_bias": True}, UnsupportedError),
    "no alpha": ({"lora_alpha": None}, FormatError),
    "alpha is text": ({"lora_alpha": "8"}, FormatError),
    "alpha is true": ({"lora_alpha": True}, FormatError),
    "alpha is infinite": ({"lora_alpha": float("inf")}, FormatError),
    "alpha by a regular expression": ({"alpha_pattern": {"(a+)+$": 2}}, UnsupportedError),
    "alphas are a list": ({"alpha_pattern": [1]}, FormatError),
}
TENSORS: dict[str, tuple[dict[str, tuple[int, ...]], type[EdgelmError]]] = {
    "half of it": ({Q + "lora_A.weight": (4, 64)}, FormatError),
    "ranks differ": ({Q + "lora_A.weight": (4, 64), Q + "lora_B.weight": (64, 3)}, FormatError),
    "of another model": ({Q + "lora_A.weight": (4, 96), Q + "lora_B.weight": (96, 4)}, FormatError),
    "no rank": ({Q + "lora_A.weight": (0, 64), Q + "lora_B.weight": (64, 0)}, FormatError),
    "a vector": ({Q + "lora_A.weight": (64,), Q + "lora_B.weight": (64,)}, FormatError),
    "three dimensions": ({Q + "lora_A.weight": (1, 4, 64), Q + "lora_B.weight": (1, 64, 4)}, FormatError),
    "unknown layer": ({"base_model.model.model.layers.9.x.lora_A.weight": (1, 1)}, FormatError),
    "a path": ({"base_model.model.../../etc/passwd.lora_A.weight": (1, 1)}, FormatError),
    "a norm": ({"base_model.model.model.norm.lora_A.weight": (1, 64)}, FormatError),
    "a magnitude": ({Q + "lora_magnitude_vector": (64,)}, UnsupportedError),
    "a bias of B": ({Q + "lora_B.bias": (64,)}, UnsupportedError),
    "twice": ({Q + "lora_A.weight": (4, 64), Q + "lora_A.default.weight": (4, 64)}, FormatError),
    "in full and in parts": (
        {Q + "lora_A.weight": (4, 64), Q + "lora_B.weight": (64, 4), Q + "weight": (64, 64)}, FormatError,
    ),
    "in full, of another shape": ({"base_model.model.lm_head.weight": (3, 64)}, FormatError),
    "nothing": ({}, FormatError),
}  # fmt: skip


@pytest.mark.parametrize("how", CONFIGS)
def test_settings_that_are_refused(how: str, tmp_path: Path) -> None:
    model, folder = case("permuted", tmp_path)
    changes, error = CONFIGS[how]
    (folder / "adapter_config.json").write_text(json.dumps({**DATA["permuted"]["config"], **changes}))
    refused(model, folder, error, tmp_path)


@pytest.mark.parametrize("how", TENSORS)
def test_tensors_that_are_refused(how: str, tmp_path: Path) -> None:
    model, folder = case("permuted", tmp_path)
    shapes, error = TENSORS[how]
    lora_folder.write_arrays(folder, {name: lora_folder.factor(name, shape) for name, shape in shapes.items()})
    refused(model, folder, error, tmp_path)


@pytest.mark.parametrize("how", ["no config", "no weights", "a list", "nested", "truncated", "pickle", "no folder"])
def test_folders_that_are_refused(how: str, tmp_path: Path) -> None:
    model, folder = case("permuted", tmp_path)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    match how:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "a list":
            config.write_text("[1]")
        case "nested":
            config.write_text('{"a":' * 100_000)
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-5])
        case "pickle":
            weights.unlink()
            (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
        case "no folder":
            shutil.rmtree(folder)
    refused(model, folder, (SourceError, FormatError, UnsupportedError), tmp_path)


def refused(model: Path, folder: Path, error: Any, where: Path) -> None:
    before = sorted(where.rglob("*"))
    with pytest.raises(error):
        merged(model, folder, where / "out.gguf")
    assert sorted(where.rglob("*")) == before, "nothing is written"


def test_every_bit_of_a_file_may_be_flipped(tmp_path: Path) -> None:
    model, folder = case("fused", tmp_path)
    good = (folder / "adapter_model.safetensors").read_bytes()
    config = prepare(model, Recipe("f32")).checkpoint.config
    rng = np.random.default_rng(3)
    for _ in range(200):
        bad = bytearray(good)
        bad[int(rng.integers(0, 1200))] ^= 1 << int(rng.integers(8))
        (folder / "adapter_model.safetensors").write_bytes(bad)
        try:
            lora.read(folder, config)
        except EdgelmError:
            continue
