"""Types chosen for each tensor by what they cost: the least loss that fits into a number of bytes.

    costs = measured(checkpoint, plan, calibration, importance)
    types = chosen(costs, n_bytes)

The loss of a tensor in a format is taken as s e², e² the relative squared error that quantizing makes (each column
weighed by how strongly the text drives it), s what such an error costs: the KL divergence of the model's predictions
when this tensor alone is quantized coarsely, over the e² of that. Losses of tensors add up. So the best choice lies on
the lower convex hulls of (bytes, loss), and is found by taking, of all steps on them, those first that gain most for a
byte (Lagrange, as in Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelm.disk import Progress, nothing, replacing
from edgelm.errors import UsageError
from edgelm.formats import QTensor, by_name

from . import block_codes, mixes
from .arrays import Array, Floats
from .chunks import Source
from .conversion import Options
from .gguf_writer import ALIGNMENT
from .probe import Probe
from .quantizers import quantize
from .recipe import Plan, Step

# What may be chosen, where the blocks divide a row; F16 is for what must not lose anything.
CANDIDATES = (
    "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "IQ4_NL", "Q4_0", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0",
)  # fmt: skip
_PROBES = ("Q3_K", "Q4_0")  # by which a tensor's sensitivity is measured: the first that its rows allow
_SAMPLE = 1 << 19  # weights of a tensor that its errors are measured on
N_SEQUENCES = 3  # that sensitivities are measured on
_SPARE = 4096  # bytes of metadata that are known later


@dataclass(frozen=True)
class Cost:
    """What a tensor costs in a format: bytes, and the loss that is expected, in nats."""

    format: str
    n_bytes: int
    loss: float


@dataclass
class Costs:
    """Of each tensor whose type may be chosen: its costs in every format; n_fixed: bytes of all other tensors.

    sensitivity: KL divergence per relative squared error, by tensor, for the report.
    """

    tensors: dict[str, list[Cost]] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    n_fixed: int = 0

    def save(self, path: Path | None) -> None:
        """As JSON, if there is a path."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path | None) -> Costs | None:
        """What `save` has written; None if that is not there."""
        if path is None or not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        tensors = {name: [Cost(**cost) for cost in costs] for name, costs in found["tensors"].items()}
        return cls(tensors, found["sensitivity"], found["n_fixed"])


# ------------------------------------------------------------------------------------------------------- the choice


def chosen(costs: Costs, n_bytes: int) -> dict[str, str]:
    """The format of each tensor: the least expected loss in at most n_bytes for all weights.

    The same costs give the same choice, on every machine. Raises UsageError when nothing is small enough.
    """
    hulls = {name: hull(found) for name, found in sorted(costs.tensors.items())}
    places = dict.fromkeys(hulls, 0)
    left = n_bytes - costs.n_fixed - sum(found[0].n_bytes for found in hulls.values())
    if left < 0:
        raise UsageError(
            f"this model cannot be as small as {n_bytes} bytes: with the smallest types that its rows allow it takes "
            f"{n_bytes - left}; prune it as well, or ask for more"
        )
    steps = [
        ((after.loss - before.loss) / (after.n_bytes - before.n_bytes), name, i + 1, after.n_bytes - before.n_bytes)
        for name, found in hulls.items()
        for i, (before, after) in enumerate(itertools.pairwise(found))
    ]
    for _, name, place, n_more in sorted(steps):
        if n_more <= left and places[name] == place - 1:  # a step that does not fit ends its tensor's way up
            places[name], left = place, left - n_more
    return {name: hulls[name][place].format for name, place in places.items()}


def hull(costs: Sequence[Cost]) -> list[Cost]:
    """The lower convex hull of (bytes, loss), smallest first: each step up gains less for a byte than the last."""
    found: list[Cost] = []
    for cost in sorted(costs, key=lambda c: (c.n_bytes, c.loss, c.format)):
        if found and cost.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], cost):
            found.pop()
        if found and cost.n_bytes == found[-1].n_bytes:
            continue
        found.append(cost)
    return found


def _slope(a: Cost, b: Cost) -> float:
    return (b.loss - a.loss) / (b.n_bytes - a.n_bytes)


# ------------------------------------------------------------------------------------------------- what it costs


def measured(
    source: Source,
    arrays: Mapping[str, Array],
    plan: Plan,
    fixed: set[str],
    tokens: NDArray[np.int32],
    importance: Mapping[str, Floats],
    progress: Progress = nothing,
) -> Costs:
    """What each tensor would cost in each format that its rows allow.

    Args:
        plan: says which tensors are quantized at all. fixed: names of those whose type is not to be chosen.
        tokens: int32 (chunks, n_ctx) of the text; a few of them are what sensitivities are measured on.
        importance: of columns, by tensor.
    """
    free = [step for step in plan.steps if _is_free(step, fixed)]
    costs = Costs(n_fixed=sum(step.n_bytes for step in plan.steps if not _is_free(step, fixed)))
    probe = _Probed(source, tokens)
    for i, step in enumerate(free):
        progress("measure sensitivity", i, len(free))
        errors = _errors(step, arrays[step.name], importance.get(step.name))
        coarse = next(name for name in _PROBES if name in errors)
        weights = arrays[step.name].read().reshape(step.shape)
        values = _through(coarse, weights.reshape(-1, step.shape[-1]), importance.get(step.name)).reshape(step.shape)
        s = max(probe.kl(step.name, values), 0.0) / max(errors[coarse], 1e-12)
        costs.sensitivity[step.name] = s
        costs.tensors[step.name] = [
            Cost(name, _n_bytes(step, name), s * error) for name, error in errors.items()
        ]  # fmt: skip
    progress("measure sensitivity", len(free), len(free))
    return costs


def subject(plan: Plan, fixed: set[str]) -> list[tuple[str, tuple[int, ...], int]]:
    """All that costs depend on in a plan: name, shape, and the bytes of what is not to be chosen (0: it is)."""
    return [(s.name, s.shape, 0 if _is_free(s, fixed) else s.n_bytes) for s in plan.steps]


def _is_free(step: Step, fixed: set[str]) -> bool:
    return step.format.block > 1 and not step.is_kept and step.name not in fixed and step.shape[-1] % 32 == 0


def _n_bytes(step: Step, name: str) -> int:
    return step.n_weights // step.shape[-1] * by_name(name).row_bytes(step.shape[-1])


def _errors(step: Step, array: Array, importance: Floats | None) -> dict[str, float]:
    """Relative squared error of a sample of rows, by format."""
    n_rows, n_cols = step.n_weights // step.shape[-1], step.shape[-1]
    n = max(1, min(n_rows, _SAMPLE // n_cols))
    starts = np.unique(np.linspace(0, n_rows - n // 8, 8).astype(int)) if n < n_rows and n >= 8 else [0]
    length = n // 8 if len(starts) > 1 else n
    rows = np.concatenate([array.rows(int(s), int(s) + length).reshape(-1, n_cols) for s in starts])
    weights = np.ones(n_cols, np.float32) if importance is None else importance
    whole = max(float(np.einsum("ij,ij,j->", rows, rows, weights, dtype=np.float64)), 1e-30)
    found = {}
    for name in CANDIDATES:
        if n_cols % by_name(name).block == 0:
            e = _through(name, rows, importance) - rows
            found[name] = float(np.einsum("ij,ij,j->", e, e, weights, dtype=np.float64)) / whole
    return found


def _through(name: str, rows: Floats, importance: Floats | None) -> Floats:
    """Rows as they come out of a format."""
    return block_codes.decode(by_name(name), quantize(name, rows, importance, search=True))


class _Probed:
    """The weights of a model, one of which is another."""

    def __init__(self, source: Source, tokens: NDArray[np.int32]) -> None:
        self._probe = Probe(source, tokens, N_SEQUENCES)
        self._dense, self._name, self._values = self._probe.runner.dense, "", np.empty(0, np.float32)
        self._probe.runner.dense = self

    def __call__(self, tensor: QTensor) -> NDArray[np.float32]:
        return self._values if tensor.name == self._name else self._dense(tensor)

    def rows(self, tensor: QTensor, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        return self._values[indices] if tensor.name == self._name else self._dense.rows(tensor, indices)

    def kl(self, name: str, values: NDArray[np.float32]) -> float:
        """Mean KL divergence when the tensor `name` holds `values`."""
        self._name, self._values = name, values
        try:
            return self._probe.kl()
        finally:
            self._name = ""


# ---------------------------------------------------------------------------------------------------- of a conversion


def budget(plan: Plan, options: Options, n_header: int) -> int:
    """Bytes that all weights may take, for so many bits each, or for a file of a size with a header of n_header."""
    if options.target_bpw is not None:
        return math.floor(options.target_bpw * plan.n_weights / 8)
    assert options.target_bytes is not None
    return options.target_bytes - n_header - _SPARE - ALIGNMENT * len(plan.steps)


def named(plan: Plan) -> Plan:
    """The plan under the name of its size; its file type is that of the mix that most of its weights belong to."""
    sizes: dict[str, int] = {}
    for step in plan.steps:
        sizes[step.format.name] = sizes.get(step.format.name, 0) + step.n_weights
    most = max(sorted(sizes), key=lambda name: sizes[name])
    return replace(plan, file_type=mixes.mix(most).file_type, type=f"{plan.bits_per_weight:.2f}bpw")
