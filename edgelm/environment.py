"""What a call tells the kernels: where its tokens stand, whose pages and which angles they read, which have an output.

An `Environment` owns the fields of `kernels.abi.Env` and what they point to; it changes from call to call, where the op
table does not. Knows nothing of operations, weights or threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .cache import Batch, Sequence
from .kernels.abi import ENVS, Env
from .kernels.matrix_unit import LEAST, permitted
from .rope import RopeTable

Part = tuple[int, int]  # tokens [begin, end) of a batch
# Plain integers: an enumeration's members are slow to index with.
N_TOKENS, N_OUTPUTS, LOGITS, OF_OUTPUTS = (int(f) for f in (Env.N_TOKENS, Env.N_OUTPUTS, Env.LOGITS, Env.SIZE))


class Environment:
    """The environments of a program: that of all tokens, and that of the tokens that want an output.

    Attributes:
        address: of the first one.
        workspace: uint8, the buffers of activations.
        n_positions: for which there are angles.
        n_tokens: of the last `take`.
    """

    def __init__(
        self, max_tokens: int, n_groups: int, n_threads: int, yield_address: int, matrix_unit: bool = True
    ) -> None:
        self._fields = np.zeros((ENVS, Env.SIZE), np.int64)
        self.address = self._fields.ctypes.data
        self._words = self._fields.reshape(-1).data
        self._tokens, self._outputs = (np.zeros(max_tokens, np.int32) for _ in range(2))
        self._positions, self._rows = (np.zeros((ENVS, max_tokens), np.int32) for _ in range(2))
        self._point(Env.TOKENS, self._tokens)
        self._point(Env.OUTPUTS, self._outputs)
        for fields, positions, rows in zip(self._fields, self._positions, self._rows, strict=True):
            fields[Env.POSITIONS], fields[Env.ROWS] = positions.ctypes.data, rows.ctypes.data
        self._fields[:, Env.N_THREADS], self._fields[:, Env.N_GROUPS] = n_threads, n_groups
        self._fields[:, Env.YIELD] = yield_address
        self._fields[:, Env.TILES] = LEAST if matrix_unit and permitted() else 0
        self.workspace = np.zeros(0, np.uint8)
        self._ropes: list[RopeTable] = []
        self._angles: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self.n_positions, self.n_tokens, self._n_groups = 0, 0, n_groups
        self._room_for_sequences(8)

    def _point(self, field: int, array: NDArray[np.generic]) -> None:
        self._fields[:, field] = array.ctypes.data

    def work_in(self, workspace: NDArray[np.uint8]) -> None:
        self.workspace = workspace
        self._point(Env.WORKSPACE, workspace)

    @property
    def n_ropes(self) -> int:
        return len(self._ropes)

    def add_rope(self, rope: RopeTable) -> None:
        """Its index is the number of those before it. There are angles of it after the next `reach`."""
        self._ropes.append(rope)
        self.n_positions = 0

    def reach(self, n_positions: int, most: int) -> None:
        """Makes cosines and sines for at least so many positions, and at most `most`."""
        if n_positions <= self.n_positions:
            return
        n = min(max(n_positions, 2 * self.n_positions), most)
        self._angles = [rope.tables(n) for rope in self._ropes]
        self._cos, self._sin = (
            np.array([angles[i].ctypes.data for angles in self._angles], np.int64) for i in range(2)
        )
        self._point(Env.COS, self._cos)
        self._point(Env.SIN, self._sin)
        self.n_positions = n

    def _room_for_sequences(self, n: int) -> None:
        self._lengths, self._tables = np.zeros(n, np.int32), np.zeros((n, self._n_groups), np.int64)
        self._point(Env.LENGTHS, self._lengths)
        self._point(Env.TABLES, self._tables)

    def point_to(self, sequences: tuple[Sequence, ...]) -> None:
        """Fills in where the pages of each sequence are, and how many tokens it had."""
        if len(sequences) > len(self._lengths):
            self._room_for_sequences(2 * len(sequences))
        for i, sequence in enumerate(sequences):
            self._lengths[i] = sequence.length
            for g in range(self._n_groups):
                self._tables[i, g] = sequence.table(g).ctypes.data

    def take(self, batch: Batch, part: Part, results: NDArray[np.float32]) -> None:
        """Fills in some tokens of a batch, the next ones of its sequences, whose outputs go to `results`."""
        begin, end = part
        n_tokens, n_outputs, words = end - begin, len(results), self._words
        words[N_TOKENS], words[N_OUTPUTS], words[OF_OUTPUTS + N_TOKENS] = n_tokens, n_outputs, n_outputs
        self.n_tokens = n_tokens
        self._tokens[:n_tokens] = batch.tokens[begin:end]
        positions, rows = self._positions[0, :n_tokens], self._rows[0, :n_tokens]
        positions[:], rows[:] = batch.positions[begin:end], batch.rows[begin:end]
        if n_outputs:
            at, outputs = np.searchsorted(batch.outputs, begin) if begin else 0, self._outputs[:n_outputs]
            np.subtract(batch.outputs[at : at + n_outputs], begin, out=outputs)
            self._positions[1, :n_outputs], self._rows[1, :n_outputs] = positions[outputs], rows[outputs]
            words[LOGITS] = results.ctypes.data
        n = len(batch.sequences)
        one_each = n_tokens == n == len(batch.tokens)
        self._lengths[:n] += 1 if one_each else np.bincount(rows, minlength=n).astype(np.int32)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Those of the last `take`; `positions` where they stand."""
        return self._tokens[: self.n_tokens]

    @property
    def positions(self) -> NDArray[np.int32]:
        return self._positions[0, : self.n_tokens]
