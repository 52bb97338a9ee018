"""The whole conversion: Hugging Face folders of every architecture become files that compute what transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest
import tiny
import tiny_vocabulary

from converters import gguf_export
from converters.conversion import Options
from converters.pipeline import convert, prepare
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.arch import Config
from edgelm.cache import Batch
from edgelm.errors import FormatError, UnsupportedError, UsageError
from edgelm.formats import QTensor, by_name
from edgelm.models import model_of
from edgelm.reference import Reference
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

GOLDEN = Path(__file__).parent.parent / "golden"


def outputs(path: Path, tokens: Any, n_ctx: int) -> Any:
    """What the reference interpreter makes of a file, at every token."""
    file = gguf.read(path)
    config = Config.from_gguf(file.metadata)
    runner = Reference(model_of(config), config, Weights.from_gguf(config, file.tensors), n_ctx=n_ctx)
    return runner.forward(Batch.of([(runner.new_cache("f32").new_sequence(), tokens, "all")]))


def nmse(ours: Any, theirs: Any) -> float:
    return float(np.sum((ours - theirs) ** 2) / np.sum(theirs**2))


@pytest.mark.parametrize("name", tiny.ALL)
def test_f32_gives_what_transformers_gives(name: str, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, name)
    out = tmp_path / "out.gguf"
    report = convert(folder, out, Recipe("f32"))
    assert report.tokenizer_texts > 50 and not report.notes and not report.fallbacks
    with np.load(GOLDEN / f"{name}.npz") as golden:
        ours = outputs(out, golden["tokens"], tiny.VARIANTS[name].n_ctx)[golden["positions"]]
        assert nmse(ours, golden["outputs"]) < 2e-12
    assert json.loads((tmp_path / "out.report.json").read_text()) == report.to_dict()
    metadata = gguf.read(out).metadata
    assert metadata["edgelm.bits_per_weight"] == 32.0
    read, meant = vars(Config.from_gguf(metadata)), vars(Config.from_hf(tiny.hf_config(name)))
    assert read == {key: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for key, v in meant.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "out.gguf", "out.report.json"])


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2", "bert-cls"])
@pytest.mark.parametrize("source", ["one safetensors", "shards", "F16", "BF16", "torch", "torch shards"])
def test_every_source_gives_the_same_file(name: str, source: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "shards": 3 if "shards" in source else 1,
        "weights": "torch" if "torch" in source else "safetensors",
        "dtype": source if source in ("F16", "BF16") else "F32",
    }
    expected = hf_folder.state(name, tiny.hf_config(name))
    if source == "F16":
        expected = {n: a.astype(np.float16).astype(np.float32) for n, a in expected.items()}
    elif source == "BF16":
        expected = {n: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for n, a in expected.items()}
    convert(hf_folder.write(tmp_path, name, **options), tmp_path / "out.gguf", Recipe("f32"))
    tensors = gguf.read(tmp_path / "out.gguf").tensors
    config = Config.from_hf(tiny.hf_config(name))
    specs = {spec.hf: spec for spec in tiny.hf_specs(name, config, tiny.hf_config(name))}
    assert len(tensors) == len(expected)
    for hf_name, array in expected.items():
        assert np.array_equal(tensors[specs[hf_name].gguf].dequantize(), specs[hf_name].from_hf(array, config))


@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"])
def test_types_by_their_definition(type_: str, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "qwen3", hidden_size=256, num_attention_heads=8, intermediate_size=256)
    convert(folder, tmp_path / "f32.gguf", Recipe("f32"))
    report = convert(folder, tmp_path / "out.gguf", Recipe(type_, pure=True))
    exact, out = gguf.read(tmp_path / "f32.gguf").tensors, gguf.read(tmp_path / "out.gguf").tensors
    assert not report.fallbacks
    for name, tensor in out.items():
        whole = len(tensor.shape) == 1
        assert tensor.format.name == ("F32" if whole else type_.upper())
        expected = QTensor.from_array(name, exact[name].dequantize(), tensor.format)
        assert np.array_equal(tensor.data, expected.data)


@pytest.mark.parametrize("n_weights", [1, 64, 700, 10_000])
def test_blocks_of_rows_change_nothing(n_weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama-gqa", "gpt2", "gemma"):
        folder = hf_folder.write(tmp_path / str(n_weights), name)
        with monkeypatch.context() as patch:
            convert(folder, tmp_path / "whole.gguf", Recipe("q8_0"))
            patch.setattr(gguf_export, "BLOCK_WEIGHTS", n_weights)
            convert(folder, tmp_path / "blocks.gguf", Recipe("q8_0"))
        assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "blocks.gguf").read_bytes()


# --------------------------------------------------------------------------------------------------------- from GGUF


def test_a_gguf_file_is_a_source(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "gemma2")
    for type_ in ("f32", "q8_0", "f16"):
        convert(folder, tmp_path / f"{type_}.gguf", Recipe(type_))
        convert(tmp_path / "f32.gguf", tmp_path / "again.gguf", Recipe(type_))
        direct, again = gguf.read(tmp_path / f"{type_}.gguf"), gguf.read(tmp_path / "again.gguf")
        for name, tensor in direct.tensors.items():
            assert np.array_equal(tensor.data, again.tensors[name].data)
        changed = {key for key in direct.metadata if not np.array_equal(direct.metadata[key], again.metadata.get(key))}
        assert changed <= {"edgelm.source"}


def test_the_types_of_metadata_stay(tmp_path: Path) -> None:
    import gguf as oracle

    source = tiny.tiny("llama-gqa", folder=tmp_path)
    keys = {
        "a.u8": ("add_uint8", 3),
        "a.i64": ("add_int64", -3),
        "a.f64": ("add_float64", 0.1),
        "a.b": ("add_bool", True),
    }
    file = gguf.read(source)
    writer = oracle.GGUFWriter(tmp_path / "typed.gguf", "llama")
    for key, (method, value) in keys.items():
        getattr(writer, method)(key, value)
    for key, value in file.metadata.items():
        if key.startswith("llama."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, tensor.dequantize())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "typed.gguf", tmp_path / "out.gguf", Recipe("copy"))
    reader = oracle.GGUFReader(tmp_path / "out.gguf")
    kinds = {"a.u8": "UINT8", "a.i64": "INT64", "a.f64": "FLOAT64", "a.b": "BOOL", "llama.block_count": "UINT32"}
    for key, kind in kinds.items():
        assert reader.fields[key].types[0].name == kind
        assert key not in keys or reader.fields[key].contents() == keys[key][1]


def test_requantizing_must_be_allowed(tmp_path: Path) -> None:
    source = tiny.tiny("qwen3", fmt="Q8_0", folder=tmp_path)
    with pytest.raises(UsageError, match="--allow-requantize"):
        convert(source, tmp_path / "out.gguf", Recipe("q4_0"))
    report = convert(source, tmp_path / "out.gguf", Recipe("q4_0", allow_requantize=True))
    assert "quantized already" in report.notes[0]
    assert not convert(source, tmp_path / "out.gguf", Recipe("copy")).notes


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = tiny.tiny("qwen3", folder=tmp_path)
    before = source.read_bytes()
    with pytest.raises(UsageError, match="the source itself"):
        convert(source, source, Recipe("q8_0"))
    with pytest.raises(UsageError, match="folder"):
        convert(source, tmp_path, Recipe("q8_0"))
    assert source.read_bytes() == before


# ---------------------------------------------------------------------------------------------- what is in the file


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa", hidden_size=128)
    (folder / "generation_config.json").write_text(
        json.dumps({"top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05, "eos_token_id": [1, 2]})
    )
    options = Options(name="A Name", overrides={"general.license": "mit"})
    report = convert(folder, tmp_path / "out.gguf", Recipe("q4_k_m"), options)
    metadata = gguf.read(tmp_path / "out.gguf").metadata
    assert metadata["general.name"] == "A Name" and metadata["general.license"] == "mit"
    assert (metadata["general.file_type"], metadata["general.quantization_version"]) == (15, 2)
    assert metadata["general.size_label"] == "304K"
    assert metadata["general.sampling.top_k"] == 20
    assert metadata["general.sampling.temp"] == pytest.approx(0.7)
    assert metadata["edgelm.fallbacks"] == report.fallbacks != []
    assert metadata["edgelm.bits_per_weight"] == pytest.approx(report.bits_per_weight, abs=1e-4)
    assert len(metadata["edgelm.tensors.sha256"]) == 64 and set(metadata["edgelm.tensors.sha256"]) != {"0"}
    assert 2 in Tokenizer.from_gguf(metadata).eog_ids  # which no runtime would know by its text


def test_auto_keeps_the_type_of_the_source(tmp_path: Path) -> None:
    for dtype, type_ in (("F32", "F16"), ("F16", "F16"), ("BF16", "BF16")):
        folder = hf_folder.write(tmp_path / dtype, "qwen2", dtype=dtype)
        assert prepare(folder, Recipe("auto")).plan.type == type_
    convert(folder, tmp_path / "out.gguf", Recipe("q8_0"))
    assert prepare(tmp_path / "out.gguf", Recipe("auto")).plan.type == "copy"


def test_a_tied_head_is_not_written_twice(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "tie_word_embeddings": True}))
    report = convert(folder, tmp_path / "out.gguf", Recipe("f16"))
    assert "output.weight" not in gguf.read(tmp_path / "out.gguf").tensors
    assert "lm_head.weight" in report.notes[0]


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer.")),
        ("bert-mean", lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma")),
        ("gemma3", lambda name: "language_model." + name),
        ("gemma3", lambda name: name.replace("model.", "model.language_model.", 1)),
    ],
)
def test_names_of_other_checkpoints(name: str, rename: Any, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, name)
    convert(folder, tmp_path / "plain.gguf", Recipe("f32"))
    arrays = {rename(n): ("F32", a.shape, a.tobytes()) for n, a in hf_folder.state(name, tiny.hf_config(name)).items()}
    arrays |= {"model.vision_tower.x.weight": ("F32", (1,), bytes(4))} if name == "gemma3" else {}
    (folder / "model.safetensors").write_bytes(hf_folder.safetensors_bytes(arrays))
    convert(folder, tmp_path / "renamed.gguf", Recipe("f32"))
    plain, renamed = gguf.read(tmp_path / "plain.gguf").tensors, gguf.read(tmp_path / "renamed.gguf").tensors
    assert plain.keys() == renamed.keys()
    assert all(np.array_equal(plain[n].data, renamed[n].data) for n in plain)


# ------------------------------------------------------------------------------------------------- what is refused


def broken(folder: Path, how: str) -> None:
    """Damages a folder of llama-gqa in one way."""
    config = json.loads((folder / "config.json").read_text())
    arrays = {
        n: ("F32", a.shape, a.tobytes()) for n, a in hf_folder.state("llama-gqa", tiny.hf_config("llama-gqa")).items()
    }
    query = "model.layers.0.self_attn.q_proj.weight"
    match how:
        case "missing tensor":
            del arrays[query]
        case "unknown tensor":
            arrays["model.layers.7.mystery.weight"] = ("F32", (1,), bytes(4))
        case "wrong shape":
            arrays[query] = ("F32", (64, 32), bytes(64 * 32 * 4))
        case "missing head":
            del arrays["lm_head.weight"]
        case "NaN":
            arrays[query] = ("F32", (64, 64), np.full(64 * 64, np.nan, np.float32).tobytes())
        case "too large for F16":
            arrays[query] = ("F32", (64, 64), np.full(64 * 64, 1e5, np.float32).tobytes())
        case "unknown key":
            config["mystery_factor"] = 2
        case "experts":
            config["num_local_experts"] = 8
        case "no architecture":
            del config["architectures"]
        case "unknown architecture":
            config["architectures"] = ["MysteryForCausalLM"]
        case "quantized by nobody knows what":
            config["quantization_config"] = {"quant_method": "mystery"}
        case "garbled RoPE":
            config["rope_scaling"] = {"rope_type": "llama3"}
        case "negative layers":
            config["num_hidden_layers"] = -1
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(hf_folder.safetensors_bytes(arrays))


BROKEN: dict[str, type[Exception]] = {
    "missing tensor": FormatError,
    "unknown tensor": FormatError,
    "wrong shape": FormatError,
    "missing head": FormatError,
    "NaN": FormatError,
    "too large for F16": FormatError,
    "unknown key": UnsupportedError,
    "experts": UnsupportedError,
    "no architecture": FormatError,
    "unknown architecture": UnsupportedError,
    "quantized by nobody knows what": UnsupportedError,
    "garbled RoPE": FormatError,
    "negative layers": FormatError,
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints(how: str, tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "llama-gqa")
    broken(folder, how)
    with pytest.raises(BROKEN[how]):
        convert(folder, tmp_path / "out.gguf", Recipe("f16"))
    assert not (tmp_path / "out.gguf").exists()


def test_text_of_the_vocabulary_goes_through(tmp_path: Path) -> None:
    """The tokenizer of the file cuts the text that the vocabulary was learned from as it did before."""
    for name in ("llama-gqa", "llama-mha", "gemma", "bert-mean"):
        keys = tiny_vocabulary.metadata(*tiny.VARIANTS[name].vocabulary, tiny.VOCAB_SIZE)
        arrays = {"token_type": np.int32, "scores": np.float32}
        before = {
            k: np.array(v, arrays[k.rpartition(".")[2]]) if k.rpartition(".")[2] in arrays else v
            for k, v in keys.items()
        }
        words = prepare(hf_folder.write(tmp_path, name), Recipe("f16")).keys
        ids = Tokenizer.from_gguf(before).encode(tiny_vocabulary.TEXT)
        assert Tokenizer.from_gguf(words).encode(tiny_vocabulary.TEXT) == ids


def test_formats_that_are_only_read_cannot_be_asked_for(tmp_path: Path) -> None:
    folder = hf_folder.write(tmp_path, "qwen2", hidden_size=256, num_attention_heads=8, intermediate_size=256)
    assert by_name("IQ2_XS").block == 256
    for recipe in (Recipe("q4_0", overrides=(("attn_q", "iq2_xs"),)), Recipe("tq1_0")):
        with pytest.raises(UnsupportedError, match="only be read"):
            prepare(folder, recipe)  # before any text is read


def test_the_package_is_a_library(tmp_path: Path) -> None:
    import converters

    stages = set()
    report = converters.convert(
        hf_folder.write(tmp_path, "qwen2"),
        tmp_path / "out.gguf",
        converters.Recipe("q8_0"),
        progress=lambda stage, done, total: stages.add((stage, done <= total)),
    )
    assert Path(report.out).stat().st_size == report.n_bytes
    assert stages == {("write", True)}
    assert not [name for name in converters.__all__ if not hasattr(converters, name)]
    with pytest.raises(AttributeError):
        converters.mystery  # noqa: B018
