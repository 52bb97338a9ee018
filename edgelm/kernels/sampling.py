"""The usual chain of samplers as one call of machine code: changed logits, top-k, top-p, min-p, temperature, a draw.

`edgelm.sampling` uses it where a process runs compiled models anyway, and `edgelm.filters` for every other chain and
everywhere else: both give the same token, but for rounding in the last place. Loads Numba only to compile.
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
N_OPS, SCRATCH, UNIFORM, MIN_KEEP, RESULT = range(0, 5 * WORD, WORD)
OP, OP_CODE, OP_ITEMS, OP_N_ITEMS, OP_A = 8 * WORD, 0, WORD, 2 * WORD, 3 * WORD  # OP_A: up to three parameters
OPS = 8 * WORD
VALUES = OPS + MAX_OPS * OP  # float32: logits as they were selected
IDS = VALUES + 4 * CAPACITY  # int64
LOGITS = IDS + 8 * CAPACITY  # float64
WEIGHTS = LOGITS + 8 * CAPACITY  # float64
STATE = WEIGHTS + 8 * CAPACITY

ITEM = np.dtype([("token", np.int64), ("amount", np.float64)])

_CODES = {
    "add": ADD, "penalise": PENALISE, "top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P, "temperature": TEMPERATURE,
}  # fmt: skip


@cache
def _choose() -> Any:
    return ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 4)(compiler.address(KERNEL))


class Chooser:
    """One chain, and the memory it works in: for one thread at a time.

    Args:
        vocab_size: logits in a row.
        steps: (name, parameters) in order: "add" (none), "penalise" (repeat, frequency, presence), "top_k" (k),
            "top_p" (p), "min_p" (p), "temperature" (t); such that `can` says yes.
        min_keep: how many candidates top-p and min-p leave at least.
    """

    @staticmethod
    def can(steps: Sequence[tuple[str, tuple[float, ...]]]) -> bool:
        """Whether it knows a chain: first all changes of logits, then a top-k that is not too large, then the rest."""
        names = [name for name, _ in steps]
        n_changes = next((i for i, name in enumerate(names) if name not in ("add", "penalise")), len(names))
        return (
            len(names) <= MAX_OPS
            and set(names) <= set(_CODES)
            and names[n_changes : n_changes + 1] == ["top_k"]
            and 0 < steps[n_changes][1][0] <= CAPACITY
            and not {"add", "penalise"} & set(names[n_changes:])
        )

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
            words[at] = _CODES[name]
            numbers[at + OP_A // WORD : at + OP_A // WORD + len(parameters)] = parameters
            if name in ("add", "penalise"):
                self._changes.append(at)
        if self._changes:
            self._scratch = np.empty(vocab_size, np.float32)
            words[SCRATCH // WORD] = self._scratch.ctypes.data

    def __call__(
        self, logits: NDArray[np.float32], uniform: float, changes: Sequence[Mapping[int, float]]
    ) -> int | None:
        """The token; None where a logit is NaN or infinite, or none is possible: then the filters explain it.

        Args:
            logits: (vocab_size,), contiguous.
            uniform: a number in [0, 1).
            changes: for each "add" the amounts by token, for each "penalise" the counts.
        """
        kept = []
        for at, items in zip(self._changes, changes, strict=True):
            array = np.fromiter(items.items(), ITEM, len(items))
            self._words[at + 1], self._words[at + 2] = array.ctypes.data, len(items)
            kept.append(array)
        self._numbers[UNIFORM // WORD] = uniform
        self._call(logits.ctypes.data, self.vocab_size, self._address, 0)
        token = int(self._words[RESULT // WORD])
        return token if token >= 0 else None
