"""An ONNX graph as a runner: onnxruntime computes, past and present are bound to the arrays of `onnx_cache`.

The sequences of a batch run one after the other: nothing is padded, so that nobody's numbers depend on who else is in
the batch. Only here is onnxruntime imported, and only when a model is loaded.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import Batch
from .errors import ContextFull, FormatError, UnsupportedError, UsageError
from .forks import lock_of
from .onnx_cache import OnnxCache, OnnxSequence
from .onnx_folder import FROM, IDS, MASK, POOLED, POSITIONS, TYPES, OnnxFolder
from .threads import default_threads

MOST_TOKENS = 512  # of one run
MAX_LOGIT_BYTES = 64 << 20  # of one run: the graph gives logits of every token, also of those that nobody wants
SPIN_US = 200  # that threads wait for the next operation before they sleep: others need the cores, too (docs/LOG.md)
OLDEST = (1, 26)  # of onnxruntime: those before believe lengths that a graph gives attention, and crash
NOT_INSTALLED = "models in ONNX need the package onnxruntime: pip install edgelm[onnx]"


class OnnxRunner:
    """Runs a graph. Safe to call from several threads; one at a time runs.

    Args:
        folder: the graph, proven.
        n_ctx: longest sequence, in tokens.
        n_threads: None = the fast cores that this process has.
        max_tokens: tokens of a text that are computed at once; None = as many as memory for their logits allows. A
            graph that keeps nothing takes any number.
    """

    def __init__(
        self, folder: OnnxFolder, *, n_ctx: int, n_threads: int | None = None, max_tokens: int | None = None
    ) -> None:
        self.folder, self.n_ctx = folder, n_ctx
        self.n_threads = max(1, n_threads or default_threads())
        self._tensors, self._output = folder.cache, folder.output
        self._has_cache = bool(self._tensors)
        self._chooses = self._has_cache and FROM in folder.graph.defaults
        self._pools = self._output.name in POOLED
        self._n_cols = folder.dim if folder.is_encoder else folder.vocab_size
        most = MOST_TOKENS if self._chooses else min(MOST_TOKENS, MAX_LOGIT_BYTES // (4 * max(1, self._n_cols)))
        # A text without a cache cannot be cut: all of its tokens see each other, or are computed anew each time.
        self.max_tokens = min(max_tokens or max(16, most), n_ctx) if self._has_cache else n_ctx
        self._lock = lock_of(self)
        self._ort: Any = None
        self._session = self._open()
        self._inputs = {each.name: self._dtype(each) for each in self._session.get_inputs()}
        self._plain = self._session.io_binding()  # of sequences that keep nothing
        self._dtype_out = self._dtype(next(o for o in self._session.get_outputs() if o.name == self._output.name))

    def new_cache(self, kv_type: str = "") -> OnnxCache:
        """A cache for sequences of this graph, which says itself what type they have."""
        return OnnxCache(self._tensors, self.n_ctx, shared=self.folder.shares_buffers)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Runs a batch: logits (R, vocabulary) or hidden states (R, D) of `batch.outputs`; its sequences grow. Of a
        graph that pools, a row is the vector of the whole text.

        Raises:
            UsageError: a token is outside the vocabulary, or a sequence belongs to another model.
            ContextFull: a sequence would outgrow the context window.
            CacheFull: there is no memory for its keys and values.
            FormatError: the graph does not compute what it promises.
        """
        tokens = batch.tokens
        if tokens.min() < 0 or tokens.max() >= self.folder.vocab_size:
            raise UsageError(f"a token is outside the vocabulary of {self.folder.vocab_size}")
        if (longest := int(batch.positions.max()) + 1) > self.n_ctx:
            raise ContextFull(longest, self.n_ctx)
        results = np.empty((len(batch.outputs), self._n_cols), np.float32)
        with self._lock:
            ends = np.cumsum(np.bincount(batch.rows, minlength=len(batch.sequences))).tolist()
            begin = 0
            for sequence, end in zip(batch.sequences, ends, strict=True):
                if not isinstance(sequence, OnnxSequence) or sequence.cache.tensors != self._tensors:
                    raise UsageError("the cache of a sequence was made for another model; use this model's new_cache()")
                if batch.positions[begin] != sequence.length:
                    raise UsageError("a sequence has changed since this batch of its tokens was made")
                first, last = np.searchsorted(batch.outputs, (begin, end))
                wanted = batch.outputs[first:last] - begin
                for at in range(begin, end, self.max_tokens):
                    stop = min(at + self.max_tokens, end)
                    a, b = np.searchsorted(wanted, (at - begin, stop - begin))
                    rows = wanted[a:b] - (at - begin)
                    self._run(sequence, tokens[at:stop], rows, results[first + a : first + b])
                begin = end
        return results

    def close(self) -> None:
        """Nothing is kept running between calls."""

    # --- a run ---

    def _run(
        self, sequence: OnnxSequence, tokens: NDArray[np.int32], wanted: NDArray[np.int32], results: NDArray[np.float32]
    ) -> None:
        """Computes tokens that follow those of a sequence, and writes the rows that are wanted to `results`."""
        sequence.reserve(len(tokens))
        start = sequence.length if self._has_cache else 0
        ids = tokens if self._has_cache else np.concatenate([sequence.tokens, tokens])
        binding = self._bound(sequence, len(tokens))
        total = start + len(ids)
        given = {
            IDS: ids,
            MASK: np.ones(total, np.int64),
            POSITIONS: np.arange(start, total),
            TYPES: np.zeros(len(ids), np.int64),
        }
        for name, values in given.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(values[None], self._inputs[name]))
        # Of our own graphs only the rows from the first wanted one on; of none that is wanted, the last.
        first = (int(wanted[0]) if len(wanted) else len(ids) - 1) if self._chooses else 0
        if self._chooses:  # as a value of onnxruntime's: its bindings know inputs that may be left out no other way
            binding.bind_ortvalue_input(FROM, self._ort.OrtValue.ortvalue_from_numpy(np.array([first])))
        rows = (1,) if self._pools else (1, len(ids) - first)
        out = np.empty((*rows, self._n_cols), self._dtype_out)
        binding.bind_output(self._output.name, "cpu", 0, self._dtype_out, out.shape, out.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise FormatError(f"{self.folder.graph.path} failed while it ran: {_reason(error)}") from None
        sequence.advance(tokens)
        if self._pools:
            results[:] = out
        elif len(wanted):
            results[:] = out[0, wanted + (len(ids) - len(tokens) - first)]

    def _bound(self, sequence: OnnxSequence, n_more: int) -> Any:
        """A binding whose past and present are the arrays of a sequence."""
        if not self._has_cache:
            return self._plain
        kept = sequence.binding
        if kept is not None and kept[0] == sequence.version and sequence.cache.shared:
            return kept[1]
        binding = self._session.io_binding() if kept is None else kept[1]
        for tensor, past, present in zip(
            self._tensors, sequence.past(), sequence.present(n_more), strict=True
        ):
            binding.bind_input(tensor.past, "cpu", 0, past.dtype, past.shape, past.ctypes.data)
            binding.bind_output(tensor.present, "cpu", 0, present.dtype, present.shape, present.ctypes.data)
        sequence.binding = sequence.version, binding
        return binding

    # --- onnxruntime ---

    def _open(self) -> Any:
        try:
            import onnxruntime as ort
        except ImportError:
            raise UnsupportedError(NOT_INSTALLED) from None
        if tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2]) < OLDEST:
            raise UnsupportedError(
                f"onnxruntime {ort.__version__} is too old to be given models of others: pip install -U edgelm[onnx]"
            )
        self._ort = ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.n_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file is called
        path = self.folder.graph.path
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            kind = UnsupportedError if "NOT_IMPLEMENTED" in str(error) else FormatError
            raise kind(f"onnxruntime cannot load {path}: {_reason(error)}") from None

    def _dtype(self, value: Any) -> np.dtype[Any]:
        names = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
        names["tensor(int32)"] = "int32"
        if value.type not in names:
            raise UnsupportedError(f"{self.folder.graph.path}: {value.name} is a {value.type}")
        return np.dtype(names[value.type])


def _reason(error: BaseException) -> str:
    """What onnxruntime says, on one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " …"
