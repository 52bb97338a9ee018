"""A model as a program: its function recorded once, then run for every batch as one walk over an op table.

`Program` packs the weights, holds the op table and the threads, and cuts batches into runs. How a graph becomes a table
is `edgelm.lowering`'s matter, what a run tells its kernels that of `edgelm.environment`, how a row computes that of
`edgelm.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arch import Config
from .cache import Batch, KVCache, Sequence, paged
from .environment import Environment, Part
from .errors import ContextFull, UsageError
from .forks import lock_of
from .formats import QTensor
from .graph import Matrix, Node, Recorder, gates, in_order, matrices
from .kernels.abi import Env
from .kernels.attention import usual_kv_type
from .mapped_file import unreadable
from .rope import RopeTable
from .threads import default_threads
from .weights import Weights

if TYPE_CHECKING:
    from .lowering import Plan, Resources

Progress = Callable[[str, int, int], None]
Pack = Callable[[list[QTensor], list[tuple[int, int]]], tuple[list[Any], Any]]

TOKENS_AT_ONCE = 512  # if nothing else is said: as many as a unit of work takes, for each of two threads (docs/LOG.md)


class Program:
    """Runs a model on compiled kernels and threads. Safe to call from several threads; one at a time runs.

    Args:
        model: a function of `edgelm.models`.
        head: "logits" or "hidden", what the model function returns.
        n_ctx: longest sequence, in tokens; None = what the model was made for.
        n_threads: threads for one token at a time; None = the fast cores that this process has.
        n_threads_batch: threads for more; None = as n_threads.
        max_tokens: tokens that are computed at once. Longer batches are cut; the results are the same bit for bit,
            unless some of them go through a matrix unit and others do not.
            Models in which all tokens see each other take as many as the context has.
        kv_type: of the caches that are to be expected; those of another type cost time at their first call.
        matrix_unit: whether many tokens go through the matrix unit, if there is one: see `kernels.matrix_unit`.
        shared: a program of the same weights, whose packed matrices serve here too.
        pack: gives the packed forms of weights, and the `packing.Packing` that makes them, if it still does; is told
            which of them are read in pairs, see `edgelm.packed`. None packs them into memory.
        progress: called as progress(stage, done, total) while weights are packed and kernels compiled.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: Config,
        weights: Weights,
        *,
        head: str = "logits",
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        max_tokens: int = TOKENS_AT_ONCE,
        kv_type: str | None = None,
        matrix_unit: bool = True,
        shared: Program | None = None,
        pack: Pack | None = None,
        progress: Progress | None = None,
    ) -> None:
        from .kernels.executor import Executor, yield_address

        self.config, self.head = config, head
        self.n_ctx = n_ctx or config.context_length
        self._limit = min(self.n_ctx, config.max_position or self.n_ctx)
        self.n_threads = max(1, n_threads or default_threads())
        self.n_threads_batch = max(1, n_threads_batch or self.n_threads)
        self._progress = progress or (lambda stage, done, total: None)
        self._nodes = in_order([model(Recorder(config, head), config, weights)])
        self._whole = any(node.kind == "attention" and not node.args["causal"] for node in self._nodes)
        self.max_tokens = max(max_tokens, self.n_ctx) if self._whole else min(max_tokens, self.n_ctx)
        self._n_cols = self._nodes[-1].n_cols
        self._resources = self._packed(shared, pack or self._into_memory, matrix_unit)
        self._factors = weights.factors()
        self._groups = config.cache_groups()
        self._lock, self._first_run = lock_of(self), True
        n = max(self.n_threads, self.n_threads_batch)
        self._environment = Environment(self.max_tokens, len(self._groups), n, yield_address(), matrix_unit)
        self._plans: dict[str, Plan] = {}
        try:
            self._plan(kv_type or usual_kv_type())
            self._executor = Executor(n)
        except BaseException:
            self._stop_packing()
            raise

    @property
    def n_bytes(self) -> int:
        """Of all packed weights."""
        return sum(packed.n_bytes for packed in self._resources.packed.values())

    def new_cache(self, kv_type: str | None = None, max_bytes: int | None = None) -> KVCache:
        """A cache for sequences of this model; None: of the type that is multiplied fastest in 16 bits."""
        return KVCache(self._groups, kv_type or usual_kv_type(), max_bytes)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Runs a batch: logits (R, vocabulary) or hidden states (R, D) of `batch.outputs`; its sequences grow.

        Raises:
            UsageError: a token is outside the vocabulary, or the sequences belong to caches of another kind.
            ContextFull: a sequence would outgrow the context window.
            CacheFull: there is no memory for its pages.
        """
        tokens = batch.tokens
        self._check(tokens, batch.positions)
        with self._lock:
            sequences = paged(batch.sequences)
            plan = self._plan(self._kv_type(sequences))
            if len(tokens) == len(sequences):
                counts = [1] * len(sequences)
            else:
                counts = np.bincount(batch.rows, minlength=len(sequences)).tolist()
            first = 0
            for sequence, n in zip(sequences, counts, strict=True):
                if batch.positions[first] != sequence.length:  # kernels write where the batch says
                    raise UsageError("a sequence has changed since this batch of its tokens was made")
                first += n
                sequence.reserve(n)
            self._environment.point_to(sequences)
            results = np.empty((len(batch.outputs), self._n_cols), np.float32)
            if len(tokens) <= self.max_tokens:
                self._run(plan, batch, (0, len(tokens)), results)
            else:
                for part in self._parts(counts):
                    first, last = np.searchsorted(batch.outputs, part)
                    self._run(plan, batch, part, results[first:last])
            for sequence, n in zip(sequences, counts, strict=True):
                sequence.advance(n)
        return results

    def wait(self) -> None:
        """Returns when all weights are packed, which may go on behind a new program."""
        if self._resources.packing is not None:
            self._resources.packing.finish()

    def close(self) -> None:
        """Ends the threads, those that pack weights, too. A later call starts new ones."""
        self._stop_packing()
        self._executor.close()

    def _stop_packing(self) -> None:
        if self._resources.packing is not None:
            self._resources.packing.stop()

    # --- a call ---

    def _check(self, tokens: NDArray[np.int32], positions: NDArray[np.int32]) -> None:
        """Everything kernels trust: ids index the embedding, positions the RoPE and position tables."""
        if len(tokens) == 1:
            low = high = int(tokens[0])
            longest = int(positions[0]) + 1
        else:
            low, high = int(tokens.min()), int(tokens.max())
            longest = int(positions.max()) + 1
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(f"a token is outside the vocabulary of {self.config.vocab_size}")
        if longest > self._limit:
            raise ContextFull(longest, self._limit)
        if longest > self._environment.n_positions:
            with self._lock:
                self._environment.reach(longest, self.n_ctx)

    def _kv_type(self, sequences: tuple[Sequence, ...]) -> str:
        cache = sequences[0].cache
        for sequence in sequences:
            other = sequence.cache
            if other is not cache and (other.kv_type != cache.kv_type or other.groups != cache.groups):
                raise UsageError("the sequences of a batch must have caches of the same kind")
        if cache.groups is not self._groups and cache.groups != self._groups:
            raise UsageError("the cache of a sequence was made for another model; use this model's new_cache()")
        return cache.kv_type

    def _parts(self, counts: list[int]) -> list[Part]:
        """Cuts a batch into runs of at most max_tokens; between sequences only, where all tokens see each other."""
        if not self._whole:
            total = sum(counts)
            return [(begin, min(begin + self.max_tokens, total)) for begin in range(0, total, self.max_tokens)]
        parts, begin, end = [], 0, 0
        for n in counts:
            if end + n - begin > self.max_tokens:
                parts.append((begin, end))
                begin = end
            end += n
        return [*parts, (begin, end)]

    def _run(self, plan: Plan, batch: Batch, part: Part, results: NDArray[np.float32]) -> None:
        """Computes some tokens of a batch and writes what they give to `results`."""
        self._environment.take(batch, part, results)
        n_threads, n_outputs = self.n_threads if part[1] - part[0] == 1 else self.n_threads_batch, len(results)
        self._walk(plan, n_threads)
        if plan.hidden is not None:
            results[:] = self._view(plan.hidden, n_outputs)
        elif plan.cap is not None and n_outputs:
            env = np.zeros(Env.SIZE, np.int64)
            env[Env.WORKSPACE], env[Env.N_OUTPUTS] = results.ctypes.data, n_outputs * plan.cap_pieces
            self._executor.run(plan.cap, 1, env.ctypes.data, n_threads)

    def _walk(self, plan: Plan, n_threads: int) -> None:
        """Runs the table. The first run does not wait for weights that are not packed yet, the second one does."""
        packing, table = self._resources.packing, plan.table
        if packing is not None and not packing.finished:
            if self._first_run:
                self._first_run = False
                if self._walk_unpacked(plan):
                    return
            packing.finish()
        self._executor.run(table, len(table), self._environment.address, n_threads)

    def _walk_unpacked(self, plan: Plan) -> bool:
        """The same without the weights that are not packed, on all threads that pack; False if all are packed."""
        from .kernels.executor import Executor
        from .kernels.streamed import streamed

        packing, packed = self._resources.packing, self._resources.packed
        with packing.paused() as left:
            if not left:
                return False
            places, environment = {matrix: i for i, matrix in enumerate(packed)}, self._environment
            for embed in (node.args for node in self._nodes if node.kind == "embed"):
                rows = environment.tokens if embed["by"] == "tokens" else environment.positions + embed["offset"]
                if places[embed["table"]] in left:
                    packing.pack_rows(places[embed["table"]], rows.tolist())
            weights = list(zip(packing.tensors, packed.values(), strict=True))
            table, _buffers, failed = streamed(plan.table, weights, left, packing.find)
            with Executor(packing.n_threads) as executor:
                executor.run(table, len(table), environment.address)
            if failed[0]:
                raise unreadable()
        return True

    def _into_memory(self, tensors: list[QTensor], pairs: list[tuple[int, int]]) -> tuple[list[Any], Any]:
        from .kernels.packing import pack_all

        return pack_all(tensors, self.n_threads_batch, self._progress, pairs=pairs), None

    def _view(self, place: tuple[int, int], n_rows: int) -> NDArray[np.float32]:
        """Rows of a value in the workspace."""
        offset, stride = place
        rows = self._environment.workspace[offset : offset + n_rows * stride].view(np.float32)
        return rows.reshape(n_rows, stride // 4)[:, : self._n_cols]

    # --- what a call needs, made once ---

    def _plan(self, kv_type: str) -> Plan:
        """The op table for caches of a type."""
        found = self._plans.get(kv_type)
        if found is not None:
            return found
        from .kernels.weight_layout import zeroed
        from .lowering import plan
        from .pages import GroupLayout

        layouts = tuple(GroupLayout(group, kv_type) for group in self._groups)
        made = plan(self._nodes, self._resources, layouts, self.max_tokens, self._progress)
        environment = self._environment
        if made.workspace_bytes > len(environment.workspace):
            environment.work_in(zeroed(made.workspace_bytes))
        for rope in self._resources.ropes[environment.n_ropes :]:
            environment.add_rope(RopeTable(rope, self._factors, self.n_ctx))
        environment.reach(min(256, self.n_ctx), self.n_ctx)
        self._plans[kv_type] = made
        return made

    def _packed(self, shared: Program | None, pack: Pack, matrix_unit: bool) -> Resources:
        """Every weight matrix in the order of bytes that its kernel reads: those of `shared`, and what it has not."""
        from .lowering import Resources

        if shared is not None:
            shared.wait()
        there = {} if shared is None else shared._resources.packed
        packed, packing = _pack(self._nodes, there, pack)
        if shared is not None and packing is not None:
            packing.finish()
        return Resources(self.config, packed, self.n_ctx, packing, matrix_unit)


def _pack(nodes: list[Node], there: Mapping[Matrix, Any], pack: Pack) -> tuple[dict[Matrix, Any], Any]:
    """Every weight matrix of a graph in the order of bytes that its kernel reads, and the packing of those that were
    not `there`, if it is under way."""
    needed = matrices(nodes)
    missing = [matrix for matrix in needed if matrix not in there]
    forms, packing = pack([matrix.slice() for matrix in missing], gates(nodes, missing)) if missing else ([], None)
    packed = dict(zip(missing, forms, strict=True))
    return {matrix: packed[matrix] if matrix in packed else there[matrix] for matrix in needed}, packing
