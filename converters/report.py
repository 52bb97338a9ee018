"""What a conversion did, for people and for scripts: `Report`, written as JSON beside the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.disk import replacing
from edgelm.terminal import json_text

if TYPE_CHECKING:
    from .conversion import Conversion
    from .loss import Told


@dataclass(frozen=True)
class Report:
    """Facts of a finished conversion.

    format: "gguf", "hf" or "onnx"; bits_per_weight: of all weights, without the header; types: bytes by format;
    fallbacks: tensors that got another format than the recipe says; notes: what a user should know; tokenizer_texts:
    texts on which the tokenizer was compared with its source (0: not at all); transformations: what was done to the
    model itself ("lora", "pruned", …); calibration: the text, its sha256 and how much of it was read; loss: see
    `loss.Loss`; tensors: every step with its sha256, its relative error, and the method by which it was rounded.
    """

    source: str
    out: str
    format: str
    type: str
    n_bytes: int
    n_weights: int
    bits_per_weight: float
    types: dict[str, int]
    fallbacks: list[str]
    notes: list[str]
    tokenizer_texts: int
    transformations: dict[str, Any]
    calibration: dict[str, Any] | None
    loss: dict[str, Any] | None
    tensors: list[dict[str, Any]]

    @classmethod
    def of(cls, conversion: Conversion, path: Path, hashes: Mapping[str, str], told: Told) -> Report:
        """The report of a conversion whose output lies at `path`."""
        plan, types = conversion.plan, dict[str, int]()
        for step in plan.steps:
            types[step.format.name] = types.get(step.format.name, 0) + step.n_bytes
        return cls(
            source=str(conversion.checkpoint.path),
            out=str(path),
            format=conversion.options.format,
            type=plan.type,
            n_bytes=sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()),
            n_weights=plan.n_weights,
            bits_per_weight=round(plan.bits_per_weight, 4),
            types=types,
            fallbacks=[f"{s.name}: {s.wanted.name} -> {s.format.name}" for s in plan.fallbacks],
            notes=list(conversion.notes),
            tokenizer_texts=conversion.n_compared,
            transformations=dict(conversion.checkpoint.facts),
            calibration=_calibration(conversion),
            loss=None if told.loss is None else told.loss.to_dict(),
            tensors=[
                {
                    **step.facts(),
                    "error": told.errors.get(step.name),
                    "method": conversion.methods.get(step.name),
                    "sha256": hashes.get(step.name),
                }
                for step in plan.steps
            ],
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def path(self) -> Path:
        """Where it is written: model.gguf -> model.report.json, folder -> folder.report.json."""
        out = Path(self.out)
        return out.with_name(f"{out.stem if out.suffix == '.gguf' else out.name}.report.json")

    def write(self, html: Path | None = None) -> None:
        """As JSON beside the file; as a page, too, if `html` says where."""
        _write(self.path, json_text(self.to_dict()) + "\n")
        if html is not None:
            from .report_page import page

            _write(html, page(self.to_dict()))


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _calibration(conversion: Conversion) -> dict[str, Any] | None:
    c = conversion.calibration
    if c is None:
        return None
    return {"text": c.text.name, "text_sha256": c.text.sha256, "n_ctx": c.n_ctx, "chunks": c.chunks}
