"""Every architecture as ONNX, in both dialects, against the reference interpreter on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from onnx_case import EXACT, Evaluator, Runtime, expected, export, in_steps, nmse, padded, tokens

from converters.onnx_export import DIALECTS
from edgelm.arch import ARCHS, Config

ENCODERS = tuple(name for name in tiny.ALL if ARCHS[tiny.VARIANTS[name].arch].family == "encoder")
DECODERS = tuple(name for name in tiny.ALL if name not in ENCODERS)
N_CACHED = 32
GOLDEN = Path(__file__).parent.parent / "golden"


def test_every_architecture_has_a_variant() -> None:
    assert {tiny.VARIANTS[name].arch for name in tiny.ALL} == set(ARCHS)


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, ops: str, tmp_path: Path) -> None:
    """A prompt and 32 cached steps; then three texts of different lengths in a batch, and a step more of each."""
    case = export(tmp_path, name, ops=ops)
    ids = tokens(case, 12 + N_CACHED)
    want = expected(case, ids)
    assert nmse(in_steps(Runtime(case.folder), ids, [12] + [1] * N_CACHED), want) < 1e-6
    if ops == "standard":
        assert nmse(in_steps(Evaluator(case.folder), ids[:24], [12, 7, 1, 1, 1, 1, 1]), want[:24]) < 1e-6

    texts = [tokens(case, n, seed=n) for n in (5, 16, 11)]
    for left in (False, True) if ops == "standard" else (False,):  # GroupQueryAttention has keys begin at the left
        prompts, mask = padded([text[:-1] for text in texts], left)
        runtime = Runtime(case.folder)
        first = runtime.run(prompts, mask)
        last = runtime.run(np.array([text[-1:] for text in texts]), np.append(mask, np.ones_like(mask[:, :1]), axis=1))
        for i, text in enumerate(texts):
            want = expected(case, text)
            assert nmse(first[i][mask[i] == 1], want[:-1]) < 1e-6
            assert nmse(last[i], want[-1:]) < 1e-6


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str, ops: str, tmp_path: Path) -> None:
    case = export(tmp_path, name, ops=ops)
    texts = [tokens(case, n, seed=n) for n in (5, 16, 11)]
    for run in (Runtime, Evaluator) if ops == "standard" else (Runtime,):
        for left in (False, True):
            ids, mask = padded(texts, left)
            states = run(case.folder).run(ids, mask)
            for i, text in enumerate(texts):
                assert nmse(states[i][mask[i] == 1], expected(case, text)) < 1e-6


@pytest.mark.parametrize("name", tiny.ALL)
def test_gives_what_transformers_gives(name: str, tmp_path: Path) -> None:
    """The very outputs that `transformers` gave for these weights (tools/make_golden.py)."""
    case = export(tmp_path, name, settings=replace(EXACT, n_ctx=tiny.VARIANTS[name].n_ctx))
    with np.load(GOLDEN / f"{name}.npz") as file:
        ids, positions, outputs = file["tokens"].astype(np.int64)[None], file["positions"], file["outputs"]
    found = Runtime(case.folder).run(ids, np.ones_like(ids))[0]
    assert nmse(found[positions], outputs) < 1e-10


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("name", ["gemma3", "llama-gqa"])
def test_decoder_that_sees_what_follows(name: str, ops: str, tmp_path: Path) -> None:
    """A model of text embeddings: hidden states, windows to both sides, no cache."""
    case = export(tmp_path, name, ops=ops, is_causal=False, pooling_type=1)
    texts = [tokens(case, n, seed=n) for n in (5, 30, 11)]
    ids, mask = padded(texts)
    states = Runtime(case.folder).run(ids, mask)
    for i, text in enumerate(texts):
        assert nmse(states[i][mask[i] == 1], expected(case, text)) < 1e-6


@pytest.mark.parametrize("ops", DIALECTS)
def test_logits_of_the_last_token_alone(ops: str, tmp_path: Path) -> None:
    case = export(tmp_path, "gemma3", ops=ops)
    ids = np.array([tokens(case, 9)])
    runtime = Runtime(case.folder)
    last = runtime.run(ids, np.ones_like(ids), outputs_from=np.array([-1]))
    assert last.shape == (1, 1, case.config.vocab_size)
    assert nmse(last[0], expected(case, ids[0].tolist())[-1:]) < 1e-6


def test_longrope_by_context(tmp_path: Path) -> None:
    """A window up to the original context has the short factors."""
    case = export(tmp_path, "phi3-longrope", settings=replace(EXACT, n_ctx=32))
    ids = tokens(case, 20)
    assert nmse(in_steps(Runtime(case.folder), ids, [20]), expected(case, ids)) < 1e-6


def test_config_is_told(tmp_path: Path) -> None:
    """The graph says which model it is."""
    import json

    import onnx

    case = export(tmp_path, "gemma2")
    model = onnx.load(case.folder / "model.onnx", load_external_data=False)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert Config.from_gguf(json.loads(told["edgelm.config"])) == case.config
