"""Tiny models as ONNX folders, run by onnxruntime and by the reference interpreter on the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
from numpy.typing import NDArray

from converters import onnx_export, pipeline
from converters.conversion import Conversion, Options
from converters.onnx_nodes import Settings
from converters.recipe import Recipe
from edgelm.cache import Batch
from edgelm.formats import QTensor
from edgelm.models import model_of
from edgelm.reference import Reference
from edgelm.weights import Weights

EXACT = Settings(accuracy_level=1)  # activations stay floats, so that results are those of the weights


@dataclass
class Case:
    """An exported model: where it lies, what it was made of, and what the reference interpreter makes of the same."""

    folder: Path
    conversion: Conversion
    reference: Reference

    @property
    def config(self) -> Any:
        return self.conversion.checkpoint.config


def export(
    tmp_path: Path,
    name: str,
    type_: str = "f32",
    *,
    ops: str = "ort",
    settings: Settings = EXACT,
    block: int = 0,
    recipe: dict[str, Any] | None = None,
    **overrides: Any,
) -> Case:
    """The variant `name` of `tiny.VARIANTS` as an ONNX folder, checked by onnx, with its twin."""
    import onnx

    source = hf_folder.write(tmp_path, name, **overrides)
    options = Options(check_tokenizer=False, format="onnx")
    conversion = pipeline.prepare(source, Recipe(type_, **(recipe or {})), options)
    folder = tmp_path / "onnx"
    onnx_export.export(conversion, folder, ops=ops, settings=settings, block=block)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)  # with shape inference
    config = conversion.checkpoint.config
    planned = onnx_export.weights_of(conversion, block).by_name
    same = {key: QTensor.from_array(key, tensor.dequantize()) for key, tensor in planned.items()}
    n_ctx = settings.n_ctx or config.context_length
    head = "logits" if config.causal else "hidden"
    twin = Reference(model_of(config), config, Weights(config, same), head=head, n_ctx=n_ctx)
    return Case(folder, conversion, twin)


def tokens(case: Case, n: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, case.config.vocab_size, n).tolist()
    return found


def expected(case: Case, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits or hidden states of every position: (T, columns)."""
    return case.reference.forward(Batch.of([(case.reference.new_cache().new_sequence(), list(ids), "all")]))


class Runtime:
    """onnxruntime with a growing cache; what it is fed is what other programs feed it."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self.names = [output.name for output in self.session.get_outputs()]
        self.inputs = self.session.get_inputs()
        self.past: dict[str, NDArray[Any]] = {}

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], **more: NDArray[Any]) -> NDArray[np.float32]:
        """The first output for the next tokens (batch, sequence) of texts whose mask is (batch, total)."""
        return run(self, lambda feeds: self.session.run(None, feeds), ids, mask, more)


class Evaluator(Runtime):
    """`onnx.reference`: a second runtime."""

    def __init__(self, folder: Path) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        super().__init__(folder)
        self.evaluator = ReferenceEvaluator(onnx.load(folder / "model.onnx"))

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], **more: NDArray[Any]) -> NDArray[np.float32]:
        if "logits" in self.names:
            more.setdefault("outputs_from", np.zeros(1, np.int64))
        return run(self, lambda feeds: self.evaluator.run(None, feeds), ids, mask, more)


def run(runtime: Runtime, call: Any, ids: Any, mask: Any, more: dict[str, Any]) -> NDArray[np.float32]:
    feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask, **more}
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    for entry in runtime.inputs:
        if entry.name.startswith("past"):
            shape = (len(ids), entry.shape[1], 0, entry.shape[3])
            feeds[entry.name] = runtime.past.get(entry.name, np.zeros(shape, kinds[entry.type]))
    outputs = dict(zip(runtime.names, call(feeds), strict=True))
    runtime.past = {key.replace("present", "past_key_values"): v for key, v in outputs.items() if "present" in key}
    first: NDArray[np.float32] = outputs[runtime.names[0]] if "logits" not in outputs else outputs["logits"]
    if "last_hidden_state" in outputs:
        first = outputs["last_hidden_state"]
    return first


def in_steps(runtime: Runtime, ids: Sequence[int], steps: Sequence[int]) -> NDArray[np.float32]:
    """All logits of one text, its tokens given a few at a time: (T, vocabulary)."""
    rows, at = [], 0
    for n in steps:
        part = np.array([ids[at : at + n]], np.int64)
        at += n
        rows.append(runtime.run(part, np.ones((1, at), np.int64))[0])
    assert at == len(ids)
    return np.concatenate(rows)


def padded(texts: Sequence[Sequence[int]], left: bool = False) -> Iterator[NDArray[np.int64]]:
    """Texts of different lengths as one batch (batch, longest), and the mask of it."""
    longest = max(map(len, texts))
    ids, mask = np.zeros((len(texts), longest), np.int64), np.zeros((len(texts), longest), np.int64)
    for i, text in enumerate(texts):
        place = slice(longest - len(text), longest) if left else slice(0, len(text))
        ids[i, place], mask[i, place] = text, 1
    yield ids
    yield mask


def nmse(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.sum((ours.astype(np.float64) - theirs) ** 2) / np.sum(theirs.astype(np.float64) ** 2))


def level(settings: Settings, accuracy_level: int) -> Settings:
    return replace(settings, accuracy_level=accuracy_level)
