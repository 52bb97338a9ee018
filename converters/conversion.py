"""What a conversion is told, and what it is while it runs: `Options`, `Calibration`, `Conversion`. Data, no action.

`pipeline` makes a `Conversion` and carries it out; the exporters and the report read it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.disk import read_text
from edgelm.errors import UsageError

from .arrays import Floats
from .checkpoint import Checkpoint
from .recipe import Plan, Recipe

METHODS = ("auto", "rtn", "imatrix", "gptq", "awq")
HELD_OUT = 0.1  # of a calibration text: its end, kept back to measure the loss on, if no other text is given


@dataclass(frozen=True)
class Options:
    """What is asked of a conversion beside the types of its tensors, which are the `Recipe`'s.

    format: "gguf", "hf" or "onnx".
    name: `general.name`, instead of the source's. pre: the pre-tokenizer, instead of what tokenizer.json defines.
    check_tokenizer: compare the new tokenizer with the source's. overrides: metadata to add or to change.
    offline: never touch the network.
    lora: adapters to merge: (folder, scale).
    imatrix: a file that tells which columns of the weights matter, and how much (`edgelm imatrix` makes it).
    calibrate: a text that the model reads before it is pruned or quantized, so that what it needs is known.
    n_ctx, calibrate_chunks: the text is cut into chunks of so many tokens; None: all of them are read.
    method: how weights are rounded, of METHODS; "auto" chooses.
    prune, target_params: what to cut away, or how many parameters to leave.
    target_bpw, target_bytes: choose the types so that this many bits per weight, or bytes in all, are met.
    evaluate: a text to measure the loss on; None: the end of the calibration text, which is not calibrated on then.
    evaluate_chunks: so many chunks of it at most.
    max_kld: fail if the mean KL divergence from the source is higher.
    html: also draw the report as a page.
    onnx_ops, onnx_block: operators of onnxruntime ("ort") or of the standard alone ("standard"); weights that share a
    scale (0: as in the type).
    """

    format: str = "gguf"
    name: str = ""
    pre: str = ""
    check_tokenizer: bool = True
    overrides: Mapping[str, Any] = field(default_factory=dict)
    offline: bool = False
    lora: tuple[tuple[Path, float], ...] = ()
    imatrix: str | Path | None = None
    calibrate: Path | None = None
    n_ctx: int = 512
    calibrate_chunks: int | None = 16
    method: str = "auto"
    prune: tuple[str, ...] = ()
    target_params: int | None = None
    target_bpw: float | None = None
    target_bytes: int | None = None
    evaluate: Path | None = None
    evaluate_chunks: int = 16
    max_kld: float | None = None
    html: Path | None = None
    onnx_ops: str = "ort"
    onnx_block: int = 0

    @property
    def has_target(self) -> bool:
        """Whether types are chosen to meet a size."""
        return self.target_bpw is not None or self.target_bytes is not None

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be meant."""
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r:.40}: there are {', '.join(METHODS)}")
        if self.method in ("gptq", "awq") and self.calibrate is None:
            raise UsageError(f"--method {self.method} has to read a text: --calibrate FILE")
        if self.method == "imatrix" and self.calibrate is None and self.imatrix is None:
            raise UsageError("--method imatrix needs --calibrate FILE, or --imatrix FILE")
        if self.imatrix is not None and self.method not in ("auto", "imatrix"):
            raise UsageError(f"--method {self.method} does not use --imatrix; leave one of them out")
        if self.has_target and self.calibrate is None:
            raise UsageError("choosing types by what they cost has to read a text: --calibrate FILE")
        if self.max_kld is not None and self.calibrate is None and self.evaluate is None:
            raise UsageError("--max-kld has to measure the loss on a text: --eval FILE, or --calibrate FILE")
        if self.target_bpw and self.target_bytes:
            raise UsageError("--target-bpw and --target-size say the same twice: give one of them")
        for flag, value in (("--max-kld", self.max_kld), ("--target-bpw", self.target_bpw)):
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{flag} {value}: it must be a number, 0 or more")
        if self.format != "onnx" and (self.onnx_ops != "ort" or self.onnx_block):
            raise UsageError("--onnx-ops and --onnx-block go with --format onnx")


@dataclass(frozen=True)
class Text:
    """A text of the user's: what it says, the name of its file, and the sha256 of what is used of it."""

    text: str
    name: str
    sha256: str

    @classmethod
    def of(cls, text: str, name: str) -> Text:
        return cls(text, name, hashlib.sha256(text.encode()).hexdigest())

    @classmethod
    def read(cls, path: Path) -> Text:
        """Raises FormatError for a file that is no text in UTF-8."""
        return cls.of(read_text(path), path.name)


@dataclass(frozen=True)
class Calibration:
    """A text to calibrate on, and how much of it: chunks of n_ctx tokens, all of them if `chunks` is None.

    For tokens, int32 (chunks, n_ctx): `chunks.chunked(source, c.text.text, c.n_ctx, c.chunks)`.
    """

    text: Text
    n_ctx: int = 512
    chunks: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """A text to measure the loss on; is_held_out: it is the end of the calibration text."""

    text: Text
    n_ctx: int = 512
    chunks: int | None = None
    is_held_out: bool = False


def texts(options: Options) -> tuple[Calibration | None, Evaluation | None]:
    """What is calibrated on and what the loss is measured on; the two never overlap."""
    calibration = None if options.calibrate is None else Text.read(options.calibrate)
    evaluation = None if options.evaluate is None else Text.read(options.evaluate)
    is_held_out = evaluation is None and calibration is not None
    if calibration is not None and is_held_out:
        cut = calibration.text.rfind("\n", 0, int(len(calibration.text) * (1 - HELD_OUT))) + 1
        cut = cut or int(len(calibration.text) * (1 - HELD_OUT))
        name, whole = calibration.name, calibration.text
        calibration, evaluation = Text.of(whole[:cut], name), Text.of(whole[cut:], f"the end of {name}")
    return (
        None if calibration is None else Calibration(calibration, options.n_ctx, options.calibrate_chunks),
        None if evaluation is None else Evaluation(evaluation, options.n_ctx, options.evaluate_chunks, is_held_out),
    )


@dataclass(frozen=True)
class Conversion:
    """A conversion whose plan is made.

    checkpoint: what is written: the source with everything done to it that leaves it a model of floats; original: what
    the loss is measured against; keys: metadata of the output; notes: what a user should know; n_compared: texts on
    which its tokenizer was compared with the source's; importance: of the columns of tensors, by GGUF name, float32
    (columns,); ready: tensors whose bytes are chosen already, uint8 (rows, bytes of a row), by GGUF name; methods: how
    each quantized tensor was rounded.
    """

    checkpoint: Checkpoint
    original: Checkpoint
    recipe: Recipe
    options: Options
    plan: Plan
    keys: Mapping[str, Any]
    notes: tuple[str, ...]
    n_compared: int = 0
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    importance: Mapping[str, Floats] = field(default_factory=dict)
    ready: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
