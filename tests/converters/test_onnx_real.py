"""Real models as ONNX: MiniLM against transformers' vectors, SmolLM2's and Gemma's integers against the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_case import EXACT, Runtime, nmse, padded

from converters import onnx_export, pipeline
from converters.conversion import Options
from converters.onnx_export import DIALECTS
from converters.onnx_nodes import Settings
from converters.recipe import Recipe
from edgelm import gguf
from edgelm.arch import Config
from edgelm.cache import Batch
from edgelm.models import model_of
from edgelm.reference import Reference
from edgelm.tokenizer import Tokenizer
from edgelm.weights import Weights

GOLDEN = Path(__file__).parent.parent / "golden"


def export(source: Path, folder: Path, type_: str, ops: str = "ort", settings: Settings | None = None) -> Runtime:
    conversion = pipeline.prepare(source, Recipe(type_), Options(check_tokenizer=False, format="onnx"))
    onnx_export.export(conversion, folder, ops=ops, settings=settings)
    return Runtime(folder)


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("type_", ["fp32", "int8"])
def test_minilm(type_: str, ops: str, minilm_path: Path, tmp_path: Path) -> None:
    """tests/golden/minilm.npz: `transformers`, mean of the token vectors, length one."""
    with np.load(GOLDEN / "minilm.npz") as file:
        texts, expected = [row[row >= 0].tolist() for row in file["tokens"]], file["embeddings"]
    ids, mask = padded(texts)
    session = export(minilm_path, tmp_path / "onnx", type_, ops).session
    [vectors] = session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})
    if type_ == "fp32":
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert ((vectors * expected).sum(axis=1) > 0.99).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2_path", "gemma3_path"])
def test_integers_of_real_files(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """SmolLM2 is Q4_1, Gemma a mix of Q5_0, Q4_K, Q6_K and Q8_0: the logits of the file's own weights."""
    path = request.getfixturevalue(name)
    runtime = export(path, tmp_path / "onnx", "copy", settings=EXACT)
    file = gguf.read(path)
    config = Config.from_gguf(file.metadata)
    ids = Tokenizer.from_gguf(file.metadata).encode("The capital of France is")
    r = Reference(model_of(config), config, Weights.from_gguf(config, file.tensors), n_ctx=64)
    want = r.forward(Batch.of([(r.new_cache().new_sequence(), ids, "last")]))
    last = runtime.run(np.array([ids]), np.ones((1, len(ids)), np.int64), outputs_from=np.array([-1]))
    assert nmse(last[0], want) < 1e-9
