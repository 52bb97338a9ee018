"""A model and what is becoming of it, run side by side: each matrix is cut and refitted when its inputs come by.

One run of the reference interpreter carries every token of the calibration text twice: in the first half of the rows as
the original model sees it, in the second half as the pruned one does. When the run comes to a matrix that adds to the
residual stream, it is decided which of its inputs go (channels of the feed-forward network, heads), and the weights
that stay are fitted so that the residual stream of the pruned model becomes the original's at that place: what earlier
cuts have spoiled is mended by the later ones, as far as a linear layer can. Where layers are taken out, the last matrix
before them is fitted to the stream behind them.

So one run is enough, and what it holds is the activations of one layer and one hessian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.arch import TensorSpec
from edgelm.cache import Batch
from edgelm.disk import Progress, nothing
from edgelm.formats import QTensor
from edgelm.reference import Reference
from edgelm.tensors import COMPOSED
from edgelm.weights import Layer

from .chunks import Source
from .fits import Fit, Fits
from .refit import Sums, choose, fit
from .streams import Keeping, Streams, adds_to_stream, layer_of, rms, run

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]


_JUDGE = 5  # one in so many tokens judges the fits
_MASSIVE = 10  # times the median: the size of the stream of tokens that all others attend to


@dataclass(frozen=True)
class Goal:
    """What is to be cut, decided beforehand.

    gone: layers that are taken out. n_gone: how many of "ffn_dim" and of "n_kv_heads" (with their queries) each layer
    loses, and of "n_heads" each group of queries. dim: the channels of the residual stream that stay (None: all).
    refit: whether what stays is fitted.
    """

    gone: frozenset[int] = frozenset()
    n_gone: Mapping[str, int] = field(default_factory=dict)
    dim: Indices | None = None
    refit: bool = True


@dataclass
class Result:
    """What a run found.

    stays: by layer, what stays of each size. changed: refitted arrays by name, without the columns that go. errors: by
    name, the relative error of what the matrix adds to the residual stream, before and after it was refitted.
    """

    stays: dict[int, dict[str, Indices]] = field(default_factory=dict)
    changed: dict[str, Floats] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def last_before(gone: frozenset[int]) -> dict[int, int]:
    """{the layer before each run of layers that go: the last layer of that run}."""
    return {i - 1: _end(i, gone) for i in sorted(gone) if i and i - 1 not in gone}


def _end(i: int, gone: frozenset[int]) -> int:
    while i + 1 in gone:
        i += 1
    return i


def fitted(source: Source, tokens: NDArray[np.int32], goal: Goal, fits: Fits, progress: Progress = nothing) -> Result:
    """Cuts a model as `goal` says, and fits what stays, on chunks of tokens (chunks, n_ctx).

    What is in `fits` is taken; what is not there yet comes out as if nothing were.

    Raises FormatError when the model computes something that is not a number.
    """
    c, ahead = source.config, dict[int, Floats]()
    if goal.refit and c.spec.family == "decoder":  # an encoder's stream is normalised behind each sum
        wanted = frozenset(end + 1 for end in last_before(goal.gone).values())
        if wanted:
            run(source, tokens, lambda runner, batch: Keeping(runner, batch, wanted, ahead))
    result = Result()
    run(
        source,
        np.concatenate([tokens, tokens]),
        lambda runner, batch: Fitting(runner, batch, goal, ahead, result, fits, progress),
    )
    return result


class Fitting(Streams):
    """Operations on rows of which the first half is the original model's, the second the pruned one's."""

    def __init__(
        self, runner: Reference, batch: Batch, goal: Goal, ahead: Mapping[int, Floats], result: Result,
        fits: Fits, progress: Progress,
    ) -> None:  # fmt: skip
        super().__init__(runner, batch)
        self._goal, self._result, self._fits, self._progress = goal, result, fits, progress
        self._half = len(batch.tokens) // 2
        self._dim = np.arange(self._c.dim) if goal.dim is None else goal.dim
        only_layers = goal.dim is None and not goal.n_gone
        self._first = min(goal.gone, default=0) - 1 if only_layers else 0  # layer in which anything changes
        before = last_before(goal.gone)
        self._ahead = {layer: ahead[end + 1] for layer, end in before.items() if end + 1 in ahead}

    def entering(self, layer: int, x: Floats) -> None:
        self._progress("prune", layer, self._c.n_layers)

    def norm(self, x: Floats, weight: QTensor, bias: QTensor | None, compute: Any) -> Floats:
        w, b = self._dense(weight), None if bias is None else self._dense(bias)
        n, dim = self._half, self._dim
        out = np.zeros_like(x)
        out[:n] = compute(x[:n], w, b)
        if layer_of(weight.name) in self._goal.gone:
            out[n:] = x[n:]  # behind the sum, a norm of a layer that goes is skipped; before it, it does not matter
            return out
        w, b = w[dim], None if b is None else b[dim]
        own: Floats = compute(x[n:, dim], w, b)
        if self._goal.dim is not None and self._goal.refit:
            # The mean square is one over fewer channels: each weight is fitted to give what it gave.
            shift = 0.0 if b is None else b
            wanted, given = out[:n, dim] - shift, own - shift
            squares = np.einsum("ij,ij->j", given, given)
            factor = np.einsum("ij,ij->j", wanted, given) / np.where(squares > 0, squares, 1)
            own = given * factor + shift
            self._result.changed[weight.name] = (w * factor).astype(np.float32)
        out[n:, dim] = own
        return out

    def linear(self, x: Floats, layer: Layer) -> Floats:
        name, n = layer.weight.name, self._half
        self._at(name, x)
        spec, i = self._specs[name], layer_of(name)
        w = self._dense(layer.weight)
        b = None if layer.bias is None else self._dense(layer.bias)
        out = np.zeros((len(x), len(w)), np.float32)
        out[:n] = _affine(x[:n], w, b)
        if i in self._goal.gone:
            return out
        if i is not None and i < self._first:
            out[n:] = out[:n]
        elif adds_to_stream(spec):
            out[n:, self._dim] = self._fit(spec, x, out[:n], w, b)
        elif spec.shape[1] == "dim" and self._goal.dim is not None:
            out[n:] = self._reading(spec, x, out[:n], w, b)
        else:
            out[n:] = _affine(x[n:], w, b)
        return out

    def _fit(self, spec: TensorSpec, x: Floats, y: Floats, w: Floats, b: Floats | None) -> Floats:
        """What a matrix that adds to the stream adds in the pruned model, after it was cut and fitted."""
        n, i, goal = self._half, layer_of(spec.gguf), self._goal
        assert i is not None
        w, b = w[self._dim], None if b is None else b[self._dim]
        student = x[n:]
        groups, size = self._groups(spec)
        n_gone = goal.n_gone.get(size, 0)
        if spec.gguf in self._fits:
            done = self._fits[spec.gguf]
            if n_gone:
                self._remember(i, size, groups, done.kept)
            return self._taken(spec, student[:, done.kept], b, done)
        target, weights = self._target(spec, i, y)
        missing = target - _affine(student, w, b)
        if not n_gone and not (goal.refit and missing.any()):
            return target - missing
        kept = np.arange(w.shape[1])
        sums = self._sums(student * weights, missing * weights)
        if n_gone:
            kept = choose(w, sums[0] + sums[1], groups, n_gone)
            self._remember(i, size, groups, kept)
            sums = (sums[0].without(w, kept), sums[1].without(w, kept))
            student, w = student[:, kept], w[:, kept]
            missing = target - _affine(student, w, b)
        errors = _square(missing * weights), _square(target * weights)
        return self._settle(spec, student, w, b, kept, sums, errors)

    def _sums(self, x: Floats, missing: Floats) -> tuple[Sums, Sums]:
        """Of the tokens to fit, and of the last ones, to judge the fit by."""
        cut = len(x) - len(x) // _JUDGE
        return Sums.of(x[:cut], missing[:cut]), Sums.of(x[cut:], missing[cut:])

    def _settle(
        self, spec: TensorSpec, x: Floats, w: Floats, b: Floats | None, kept: Indices, sums: tuple[Sums, Sums],
        errors: tuple[float, float],
    ) -> Floats:  # fmt: skip
        """Fits w, the columns `kept` of a matrix, keeps what came of it, and goes on with that.

        errors: the squares of what is missing, and of the target, over all tokens.
        """
        missing, whole = errors[0], errors[1] or 1.0
        before = after = missing / whole
        if self._goal.refit:
            change = fit(*sums)
            if (gain := (sums[0] + sums[1]).gain(change)) > 0:
                w, after = w + change, max(0.0, missing - gain) / whole
        return self._taken(spec, x, b, self._fits.keep(spec.gguf, Fit(w, kept, (before, after))))

    def _taken(self, spec: TensorSpec, x: Floats, b: Floats | None, done: Fit) -> Floats:
        """What a matrix gives from now on, for the inputs that it has left."""
        self._result.errors[spec.gguf], self._result.changed[spec.gguf] = done.errors, done.w
        return _affine(x, done.w, b)

    def _target(self, spec: TensorSpec, i: int, y: Floats) -> tuple[Floats, Floats]:
        """What the matrix should give in the pruned model (T, dim that stays), and the weight of each token (T, 1).

        y: what it gives in the original. Tokens are weighed by how small the stream is, as every later layer divides by
        that. The few that are a hundred times as large as all others (massive activations: Sun et al., 2402.17762) get
        back a part of that: all tokens attend to them, and without them a model says nothing.
        """
        n, dim = self._half, self._dim
        theirs, own = self._stream[:n], self._stream[n:, dim]
        post = self.post_norm(spec.gguf)
        added = y if post is None else rms(y, post, self._c.norm_eps)
        wanted = theirs + added
        if i in self._ahead and spec.shape[1] == "ffn_dim":  # the layers behind it go
            wanted = self._ahead[i]
        weights = _importance(wanted)
        more: Floats = wanted[:, dim] - own
        if post is None:
            return more, weights
        change, size = _before_norm(more - added[:, dim], y, post, self._c.norm_eps, dim)
        return y[:, dim] + change, weights / size

    def _groups(self, spec: TensorSpec) -> tuple[Indices, str]:
        """The columns of a matrix in groups that go together, and the size that then shrinks.

        (families, groups, columns): of each family as many go, so that what is left is uniform.
        """
        c, size = self._c, str(spec.shape[1])
        columns = np.arange(getattr(c, size))
        ((name, width),) = COMPOSED.get(size, ((size, ""),))
        if not width:
            return columns.reshape(1, -1, 1), name
        if "n_kv_heads" in self._goal.n_gone:  # with all their queries
            return columns.reshape(1, c.n_kv_heads, -1), "n_kv_heads"
        return columns.reshape(c.n_kv_heads, -1, getattr(c, width)), name

    def _remember(self, i: int, size: str, groups: Indices, kept: Indices) -> None:
        first = groups.reshape(-1, groups.shape[2])[:, 0]
        units = np.flatnonzero(np.isin(first, kept))
        stays = self._result.stays.setdefault(i, {})
        stays[size] = units
        if size == "n_kv_heads":
            each = self._c.n_heads // self._c.n_kv_heads
            stays["n_heads"] = (units[:, None] * each + np.arange(each)).reshape(-1)

    def _reading(self, spec: TensorSpec, x: Floats, y: Floats, w: Floats, b: Floats | None) -> Floats:
        """What a matrix that reads the narrower stream gives, after it was fitted to give what it gave."""
        dim = self._dim
        student, name = np.ascontiguousarray(x[self._half :, dim]), spec.gguf
        if name in self._fits:
            return self._taken(spec, student, b, self._fits[name])
        start = _affine(student, w[:, dim], b)
        if not self._goal.refit:
            return start
        errors = _square(y - start), _square(y)
        return self._settle(spec, student, w[:, dim], b, np.arange(len(dim)), self._sums(student, y - start), errors)


def _importance(stream: Floats) -> Floats:
    """The weight of each token (T, 1), by how small the stream is; more for tokens that are massive."""
    size: Floats = np.sqrt(np.mean(stream * stream, axis=1, keepdims=True) + 1e-12)
    weights: Floats = np.sqrt(np.maximum(1, size / (_MASSIVE * np.median(size)))) / size
    return weights


def _before_norm(missing: Floats, y: Floats, w: Floats, eps: float, dim: Indices) -> tuple[Floats, Floats]:
    """What is missing behind a norm with weights w, as a change of what goes into it, y; and the size of y (T, 1).

    The norm divides by the size of what goes in: give it the original's size, and what comes out is as wanted.
    """
    size: Floats = np.sqrt(np.mean(y * y, axis=1, keepdims=True) + eps)
    w = w[dim]
    floor = 0.1 * float(np.mean(w * w))  # a channel that the norm nearly closes is no lever
    return missing * (w / (w * w + floor)) * size, size


def _square(x: Floats) -> float:
    return float(np.einsum("ij,ij->", x, x, dtype=np.float64))


def _affine(x: Floats, w: Floats, b: Floats | None) -> Floats:
    y: Floats = x @ w.T
    return y if b is None else y + b
