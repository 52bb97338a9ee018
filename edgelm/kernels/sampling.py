"""A chain of samplers as one call of machine code: changed logits, cuts, temperatures, a draw.

There are two kernels: one for the usual chain, which begins with a top-k, and a wide one for those that do not.
`edgelm.sampling` uses them where a process runs compiled models anyway; what they do not know of a chain, and all of it
elsewhere, is done by `edgelm.filters`. Both give the same token, but for rounding in the last place. Loads Numba only
to compile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.kernels import compiler
from edgelm.kernels.executor import Native

if TYPE_CHECKING:
    from edgelm.repetition import Find

KERNEL = "sampling_kernels:choose"
WIDE_KERNEL = "sampling_wide_kernels:choose"
REPETITIONS = "sampling_wide_kernels:repetitions"
ADD, PENALISE, TOP_K, TOP_P, MIN_P, TEMPERATURE = range(6)
TOP_N_SIGMA, TYPICAL, XTC, DYNAMIC, MIROSTAT_1, MIROSTAT_2 = range(6, 12)
CAPACITY = 128  # the largest k: candidates are kept in order by insertion
MAX_OPS = 16

# The state, in bytes from its beginning. Words are int64, or float64 where they hold a fraction.
WORD = 8
N_OPS, SCRATCH, UNIFORM, MIN_KEEP, COUNT, RESULT, PROBABILITY = range(0, 7 * WORD, WORD)
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
_WIDE = _CUTS | {
    "top_n_sigma": TOP_N_SIGMA, "typical": TYPICAL, "xtc": XTC, "dynamic": DYNAMIC, "mirostat_1": MIROSTAT_1,
    "mirostat_2": MIROSTAT_2,
}  # fmt: skip
_HEATS = ("temperature", "dynamic")  # which leave the whole vocabulary
_MOST_PLACES = 4096  # where a repetition may have begun


@cache
def _kernel(name: str) -> Any:
    return Native(compiler.address(name))


def repetitions(history: NDArray[np.int64], shortest: int, longest: int) -> tuple[list[int], list[int]] | None:
    """Tokens that followed earlier sequences which equal the last tokens of `history`, and how long these are.

    The length is at least `shortest`, which must be positive, and at most `longest`. None: there are too many.
    """
    found = np.empty(3 + 2 * _MOST_PLACES, np.int64)
    found[:2] = shortest, longest
    _kernel(REPETITIONS)(history.ctypes.data, len(history), found.ctypes.data, _MOST_PLACES)
    n = int(found[2])
    return (found[3 : 3 + 2 * n : 2].tolist(), found[4 : 4 + 2 * n : 2].tolist()) if n >= 0 else None


def compiled_repetitions() -> Find:
    """`repetitions`, when there is machine code for it; ImportError where there is none, nor Numba to make it."""
    _kernel(REPETITIONS)
    return repetitions


class Chooser:
    """One chain, and the memory it works in: for one thread at a time.

    Args:
        vocab_size: logits in a row.
        steps: (name, parameters) in order: "add" (none), "penalise" (repeat, frequency, presence), "top_k" (k),
            "top_p" (p), "min_p" (p), "temperature" (t); as far as `knows` says. With `wide` also "top_n_sigma" (n),
            "typical" (p), "xtc" (threshold, 0 or 1: whether it is to be done), "dynamic" (t, span, exponent),
            "mirostat_1" (mu), "mirostat_2" (mu); all that `knows_all` accepts.
        min_keep: how many candidates the cuts leave at least.
        wide: use the kernel that can begin with the whole vocabulary.
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

    @staticmethod
    def knows_all(steps: Sequence[tuple[str, tuple[float, ...]]]) -> bool:
        """Whether the wide kernel can do this chain: changes first, then cuts, one xtc at most and that after a cut."""
        names = [name for name, _ in steps]
        n_changes = sum(name in _CHANGES for name in names)
        cuts = [i for i, name in enumerate(names) if name in _WIDE and name not in (*_HEATS, "xtc")]
        return (
            len(steps) <= MAX_OPS
            and all(name in _WIDE for name in names[n_changes:])
            and names.count("xtc") <= 1
            and ("xtc" not in names or (bool(cuts) and cuts[0] < names.index("xtc")))
        )

    def __init__(
        self, vocab_size: int, steps: Sequence[tuple[str, tuple[float, ...]]], min_keep: int, wide: bool = False
    ) -> None:
        self.wide, self.steps = wide, frozenset(name for name, _ in steps)
        self._call = _kernel(WIDE_KERNEL if wide else KERNEL)
        self._arrays = np.empty(6 * vocab_size if wide else 0)
        self._places = {name: (OPS + i * OP + OP_A) // WORD for i, (name, _) in enumerate(steps)}
        self.vocab_size = vocab_size
        memory = np.zeros(STATE + 64, np.uint8)
        skip = -memory.ctypes.data % 64
        self._words = memory[skip : skip + STATE].view(np.int64)
        self._numbers = self._words.view(np.float64)
        self._address = self._words.ctypes.data
        self._changes = []
        words, numbers = self._words, self._numbers
        words[N_OPS // WORD] = len(steps)
        words[MIN_KEEP // WORD] = min_keep if wide else min(min_keep, CAPACITY)
        for i, (name, parameters) in enumerate(steps):
            at = (OPS + i * OP) // WORD
            words[at] = (_CHANGES | _WIDE)[name]
            numbers[at + OP_A // WORD : at + OP_A // WORD + len(parameters)] = parameters
            if name in _CHANGES:
                self._changes.append(at)
        if self._changes or wide:
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
        self._call(logits.ctypes.data, self.vocab_size, self._address, self._arrays.ctypes.data)

    @property
    def probability(self) -> float:
        """Of the token that was drawn last, among the candidates; only of the wide kernel."""
        return float(self._numbers[PROBABILITY // WORD])

    def set(self, name: str, *parameters: float) -> None:
        """Other parameters for a step from here on."""
        at = self._places[name]
        self._numbers[at : at + len(parameters)] = parameters
