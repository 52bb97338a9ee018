"""The plan of a conversion: what becomes of each tensor. A pure function; it reads no weights and writes nothing.

    plan = make_plan(config, sources, Recipe("q4_k_m"))
    for step in plan.steps: print(step.name, step.shape, step.kind, step.format.name, step.n_bytes)

What `--dry-run` prints, and what every output format is made by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgelm.arch import Config, TensorSpec, tensors
from edgelm.errors import UnsupportedError, UsageError
from edgelm.formats import Format, by_name

from . import mixes
from .gguf_writer import Planned


class Source(Protocol):
    """What the plan must know of a tensor that exists already; `Array` is one."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Recipe:
    """What the user asked for.

    type: name of a mix (`mixes.MIXES`) or "copy"; overrides: (regular expression, format) pairs, the first that is
    found in a tensor's name decides; output_type, embedding_type: formats of those two matrices; leave_output: the
    output matrix is not quantized; pure: one type for everything; no_fallback: a row that the blocks of its type do not
    divide is an error; has_imatrix: some rules of the mixes ask for that; allow_requantize: quantized weights may be
    quantized again.
    """

    type: str
    overrides: tuple[tuple[str, str], ...] = ()
    output_type: str = ""
    embedding_type: str = ""
    leave_output: bool = False
    pure: bool = False
    no_fallback: bool = False
    has_imatrix: bool = False
    allow_requantize: bool = False


def exactly(types: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Overrides of a recipe that give these tensors, and no others, these types."""
    return tuple((f"^{re.escape(name)}$", format) for name, format in types.items())


@dataclass(frozen=True)
class Step:
    """What becomes of one tensor.

    name, shape: in the output; sources: names in the checkpoint; change: how values or their order differ ("" if they
    do not); kind: what the source holds; wanted: the format that the recipe says; format: the one it gets; is_kept: it
    holds the source's own integers.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    change: str
    kind: str
    wanted: type[Format]
    format: type[Format]
    is_kept: bool = False

    @property
    def planned(self) -> Planned:
        return Planned(self.name, self.shape, self.format)

    @property
    def n_bytes(self) -> int:
        return self.planned.n_bytes

    @property
    def n_weights(self) -> int:
        return self.planned.n_weights

    @property
    def is_fallback(self) -> bool:
        return self.format is not self.wanted

    @property
    def is_requantized(self) -> bool:
        changes = self.kind != self.format.name and not self.is_kept
        return changes and self.kind not in PLAIN and self.format.block > 1

    def facts(self) -> dict[str, Any]:
        """The step as it is printed."""
        return {
            "tensor": self.name,
            "shape": list(self.shape),
            "source": list(self.sources),
            "change": self.change,
            "from": self.kind,
            "to": self.format.name,
            "fallback_from": self.wanted.name if self.is_fallback else None,
            "n_bytes": self.n_bytes,
        }


# Kinds that hold what was trained; everything else was quantized once already.
PLAIN = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class Plan:
    """All steps, in the order in which they are written; file_type: `general.file_type`, None to keep the source's."""

    steps: tuple[Step, ...]
    file_type: int | None
    type: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Of all weights, without header and padding."""
        return sum(step.n_bytes for step in self.steps)

    @property
    def n_weights(self) -> int:
        return sum(step.n_weights for step in self.steps)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    @property
    def fallbacks(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_fallback)


def make_plan(config: Config, sources: Mapping[str, Source], recipe: Recipe) -> Plan:
    """What becomes of the tensors `sources` (by GGUF name, in the order of the output).

    Raises UnsupportedError for types that do not exist, cannot be written, or do not divide a row where no fallback is
    allowed; UsageError for an override that fits nothing or weights that are quantized already.
    """
    specs = {spec.gguf: spec for spec in tensors(config)}
    if recipe.type.lower() == "copy":
        wanted: dict[str, str] = {}
        mix = None
    else:
        mix = mixes.mix(recipe.type)
        wanted = _wanted(mix, config, {name: source.shape for name, source in sources.items()}, recipe)
    steps = []
    for name, source in sources.items():
        asked = by_name(wanted[name]) if name in wanted else _as_it_is(source)
        given = mixes.fallback(asked, source.shape[-1])
        is_kept = given.name in getattr(source, "kept", ())
        change = _change(specs.get(name))
        steps.append(Step(name, source.shape, (source.name,), change, source.kind, asked, given, is_kept))
    _prove(steps, recipe)
    return Plan(tuple(steps), None if mix is None else mix.file_type, "copy" if mix is None else mix.name)


def _as_it_is(source: Source) -> type[Format]:
    """The type of what is not to be quantized: a GGUF file's own; float32 for what comes from a checkpoint."""
    is_gguf_type = getattr(source, "as_is", None) is not None
    return by_name(source.kind) if is_gguf_type else by_name("F32")


def _wanted(mix: mixes.Mix, config: Config, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, str]:
    """The type of every tensor that takes one, by the mix and by what overrides it, as in llama-quantize."""
    names = [name for name, shape in shapes.items() if mixes.is_quantizable(name, len(shape))]
    if recipe.leave_output:
        names = [name for name in names if name != "output.weight"]
    is_mixed = by_name(mix.base).block > 1 and not recipe.pure
    decided: dict[str, str] = {}
    for pattern, format in recipe.overrides:
        fitting = [name for name in names if _search(pattern, name)]
        if not fitting:
            raise UsageError(f"--tensor-type {pattern}={format}: no tensor that could take it has such a name")
        decided = dict.fromkeys(fitting, format) | decided  # the first that fits decides
    if recipe.embedding_type:
        decided["token_embd.weight"] = recipe.embedding_type
    if recipe.output_type and "output.weight" in names:
        decided["output.weight"] = recipe.output_type
    elif recipe.output_type and "output.weight" not in shapes and is_mixed:
        decided.setdefault("token_embd.weight", recipe.output_type)
    found = dict.fromkeys(names, mix.base)
    if is_mixed:
        found |= mixes.assign(mix, config, shapes, recipe.has_imatrix, decided)
    return {name: decided.get(name, found[name]) for name in names}


def _search(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UsageError(f"--tensor-type {pattern}: no regular expression: {error}") from None


def _change(spec: TensorSpec | None) -> str:
    if spec is None or not spec.hf:
        return ""
    parts = ["transposed"] if spec.transpose else []
    parts += [f"rows of each of {spec.permute} interleaved"] if spec.permute else []
    return ", ".join(parts + ([f"{spec.offset:+g}"] if spec.offset else []))


def _prove(steps: list[Step], recipe: Recipe) -> None:
    for step in steps:
        if recipe.no_fallback and step.is_fallback:
            raise UnsupportedError(
                f"{step.name}: rows of {step.shape[-1]} are no whole number of {step.wanted.name} blocks of "
                f"{step.wanted.block}; without --no-fallback it would become {step.format.name}"
            )
        if step.is_requantized and not recipe.allow_requantize:
            raise UsageError(
                f"{step.name} is quantized already ({step.kind}); quantizing it to {step.format.name} would lose more "
                "than from the original weights. Convert those, or say --allow-requantize"
            )
