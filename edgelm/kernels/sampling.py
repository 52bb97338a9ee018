"""The usual chain of samplers as one call of machine code: changed logits, top-k, top-p, min-p, temperature, a draw.

`edgelm.sampling` uses it where a process runs compiled models anyway; what it does not know of a chain, and everything
elsewhere, is done by `edgelm.filters`. Both give the same token, but for rounding in the last place. Loads Numba only
to compile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.kernels import compiler

KERNEL = "sampling_kernels:choose"
ADD, PENALISE, TOP_K, TOP_P, MIN_P, TEMPERATURE = range(6)
CAPACITY = 128  # the largest k: candidates are kept in order by insertion
MAX_OPS = 16

# The state, in bytes from its beginning. Words are int64, or float64 where they hold a fraction.
WORD = 8
N_OPS, SCRATCH, UNIFORM, MIN_KEEP, COUNT, RESULT = range(0, 6 * WORD, WORD)
OP, OP_CODE, OP_ITEMS, OP_N_ITEMS, OP_A = 8 * WORD, 0, WORD, 2 * WORD, 3 * WORD  # OP_A: up to three parameters
OPS = 8 * WORD
VALUES = OPS + MAX_OPS * OP  # float32: logits as they were selected
IDS = VALUES + 4 * CAPACITY  # int64
LOGITS = IDS + 8 * CAPACITY  # float64
WEIGHTS = LOGITS + 8 * CAPACITY  # float64
STATE = WEIGHTS + 8 * CAPACITY

ITEM = np.dtype([("token", np.int64), ("amount", np.float64)])

_CHANGES = {"add": ADD, "penalise": PENALISE}
_CUTS = {"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P, "temperature": TEMPERATURE}


@cache
def _choose() -> Any:
    return ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 4)(compiler.address(KERNEL))


class Chooser:
    """One chain, and the memory it works in: for one thread at a time.

    Args:
        vocab_size: logits in a row.
        steps: (name, parameters) in order: "add" (none), "penalise" (repeat, frequency, presence), "top_k" (k),
            "top_p" (p), "min_p" (p), "temperature" (t); as far as `knows` says.
        min_keep: how many candidates top-p and min-p leave at least.
    """

    @staticmethod
    def knows(steps: Sequence[tuple[str, tuple[float, ...]]]) -> int:
        """How many steps of a chain it can do, from the first on: changes, then a top-k that is not too large, then
        others. 0 if there is no such top-k, without which it can do nothing."""
        n = 0
        while n < len(steps) and steps[n][0] in _CHANGES:
            n += 1
        if steps[n : n + 1] and steps[n][0] == "top_k" and 0 < steps[n][1][0] <= CAPACITY and n < MAX_OPS:
            while n < min(len(steps), MAX_OPS) and steps[n][0] in _CUTS:
                n += 1
            return n
        return 0

    def __init__(self, vocab_size: int, steps: Sequence[tuple[str, tuple[float, ...]]], min_keep: int) -> None:
        self._call = _choose()
        self.vocab_size = vocab_size
        memory = np.zeros(STATE + 64, np.uint8)
        skip = -memory.ctypes.data % 64
        self._words = memory[skip : skip + STATE].view(np.int64)
        self._numbers = self._words.view(np.float64)
        self._address = self._words.ctypes.data
        self._changes = []
        words, numbers = self._words, self._numbers
        words[N_OPS // WORD], words[MIN_KEEP // WORD] = len(steps), min(min_keep, CAPACITY)
        for i, (name, parameters) in enumerate(steps):
            at = (OPS + i * OP) // WORD
            words[at] = (_CHANGES | _CUTS)[name]
            numbers[at + OP_A // WORD : at + OP_A // WORD + len(parameters)] = parameters
            if name in _CHANGES:
                self._changes.append(at)
        if self._changes:
            self._scratch = np.empty(vocab_size, np.float32)
            words[SCRATCH // WORD] = self._scratch.ctypes.data

    def token(self, logits: NDArray[np.float32], changes: Sequence[Mapping[int, float]], uniform: float) -> int | None:
        """Draws a token; None where a logit is NaN or +inf, or all are -inf: the filters can explain it.

        Args:
            logits: (vocab_size,), contiguous.
            changes: for each "add" the amounts by token, for each "penalise" the counts.
            uniform: a number in [0, 1).
        """
        self._run(logits, changes, uniform)
        token = int(self._words[RESULT // WORD])
        return token if token >= 0 else None

    def candidates(
        self, logits: NDArray[np.float32], changes: Sequence[Mapping[int, float]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """Ids and logits of the candidates that are left, best first; None as above."""
        self._run(logits, changes, 0.0)
        n = int(self._words[COUNT // WORD])
        if not n:
            return None
        return (
            self._words[IDS // WORD : IDS // WORD + n].copy(),
            self._numbers[LOGITS // WORD : LOGITS // WORD + n].copy(),
        )

    def _run(self, logits: NDArray[np.float32], changes: Sequence[Mapping[int, float]], uniform: float) -> None:
        kept = []  # until the kernel has read them
        for at, items in zip(self._changes, changes, strict=True):
            array = np.fromiter(items.items(), ITEM, len(items))
            self._words[at + OP_ITEMS // WORD], self._words[at + OP_N_ITEMS // WORD] = array.ctypes.data, len(items)
            kept.append(array)
        self._numbers[UNIFORM // WORD] = uniform
        self._call(logits.ctypes.data, self.vocab_size, self._address, 0)
