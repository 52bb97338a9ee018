"""Runs rows of an op table from Python, units in random order and in random portions, as threads would."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
from numba.core.registry import cpu_target

from edgelm.kernels import amx, matrix_unit
from edgelm.kernels.abi import ENVS, Env, Row

UNIT = matrix_unit.permitted() and amx.has_tiles(cpu_target.target_context)  # whether kernels may use a matrix unit
NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


class Workspace:
    """Activation buffers, and the environment that points to them."""

    def __init__(self, n_bytes: int = 1 << 24, seed: int = 0) -> None:
        self._memory = np.full(n_bytes + 64, 0x7F, np.uint8)  # large floats: what is read by mistake shows
        self._at = -self._memory.ctypes.data % 64
        self._base = self._memory.ctypes.data
        self.rng = np.random.default_rng(seed)
        self._envs = np.zeros((ENVS, Env.SIZE), np.int64)
        self._envs[:, Env.WORKSPACE] = self._base
        self.env, self.env_of_outputs = self._envs
        self._keep: list[np.ndarray] = []

    def take(self, n_bytes: int) -> int:
        """Offset of a new buffer."""
        at, self._at = self._at, self._at + -(-n_bytes // 64) * 64
        assert self._at <= len(self._memory)
        return at

    def buffer(self, rows: int, n_cols: int) -> tuple[int, int, np.ndarray]:
        """(offset, stride in bytes, view (rows, n_cols)) of a new float32 buffer."""
        stride = -(-n_cols * 4 // 64) * 64
        offset = self.take(rows * stride)
        whole = self._memory[offset : offset + rows * stride].view(np.float32).reshape(rows, stride // 4)
        return offset, stride, whole[:, :n_cols]

    def put(self, x: np.ndarray) -> tuple[int, int]:
        """(offset, stride) of a new buffer that holds x."""
        offset, stride, view = self.buffer(*x.shape)
        view[:] = x
        return offset, stride

    def bytes_at(self, offset: int, n_bytes: int) -> np.ndarray:
        return self._memory[offset : offset + n_bytes]

    def set(self, field: int, value: int | np.ndarray) -> None:
        """An environment field: a number, or an array whose address it gets."""
        if isinstance(value, np.ndarray):
            self._keep.append(value)
            value = value.ctypes.data
        self.env[field] = value

    def set_outputs(self, outputs: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> None:
        """The environment of tokens that want an output, from where all tokens stand; after all other fields."""
        self.set(Env.N_OUTPUTS, len(outputs))
        of_tokens = self.env.copy()
        self.set(Env.N_TOKENS, len(outputs))
        self.set(Env.POSITIONS, positions[outputs])
        self.set(Env.ROWS, rows[outputs])
        self.env_of_outputs[:], self.env[:] = self.env, of_tokens

    def run(self, *rows: list[int], portions: int | None = 3) -> None:
        """portions: into how many ranges the units of a row are divided, at least; None: one."""
        for row in rows:
            op = np.array(row, np.int64)
            units = op[Row.UNITS]
            if op[Row.UNITS_PER]:
                units *= -(-self.env[op[Row.COUNT]] // op[Row.UNITS_PER])
            cuts = {0, int(units)}
            if portions is not None and units > 1:
                cuts |= {int(c) for c in self.rng.integers(1, units, portions)}
            edges = sorted(cuts)
            ranges = list(itertools.pairwise(edges))
            self.rng.shuffle(ranges)
            kernel = NATIVE(int(op[Row.KERNEL]))
            for begin, end in ranges:
                kernel(op.ctypes.data, self.env.ctypes.data, int(begin), int(end))
