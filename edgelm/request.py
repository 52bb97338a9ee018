"""What a caller asks of a generation: its keyword arguments, checked, and the stop strings they name.

Knows the names of parameters, llama.cpp's and the usual others; knows no model.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UsageError
from .sampling import Sampling
from .sampling_parameters import texts

OVERFLOWS = ("error", "truncate-middle", "shift")

ALIASES = {  # names that other systems use -> ours
    "temp": "temperature",
    "typical": "typical_p",
    "repetition_penalty": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "mirostat_mode": "mirostat",
    "mirostat_ent": "mirostat_tau",
    "mirostat_lr": "mirostat_eta",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop_strings": "stop",
    "top_logprobs": "logprobs",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to continue a text.

    Attributes:
        sampling: how each token is chosen.
        max_tokens: to write at most; negative: until the model stops or the context window is full.
        stop: texts that end the answer; they are no part of it.
        logprobs: how many alternatives to report for each token, 0 for its own probability alone, None for nothing.
        overflow: what happens when the context window is full, see `Session`.
        keep: tokens at the start that are never dropped.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    overflow: str = "error"
    keep: int = 0

    def __post_init__(self) -> None:
        if self.overflow not in OVERFLOWS:
            raise UsageError(f"overflow is {self.overflow!r}; it must be one of {', '.join(OVERFLOWS)}")
        for name in ("max_tokens", "keep", "logprobs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise UsageError(f"{name} is {value!r}; it must be a whole number")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs is {self.logprobs}; it must be the number of alternatives, 0 or more")
        if self.keep < 0:
            raise UsageError(f"keep is {self.keep}; it must be a number of tokens, 0 or more")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise UsageError("stop takes texts that are not empty")

    @classmethod
    def of(cls, settings: Mapping[str, Any], base: Request | None = None) -> Request:
        """The request that keyword arguments mean, beginning from `base`; None stands for the default.

        `sampling=` gives a whole `Sampling`, which single parameters then change.

        Raises:
            UsageError: an unknown name (the message offers a similar one), two names for the same thing, or a value
                that cannot be meant.
        """
        base = base or cls()
        own = {f.name for f in dataclasses.fields(cls)}
        chosen = {f.name for f in dataclasses.fields(Sampling)}
        values: dict[str, Any] = {}
        for given, value in settings.items():
            name = ALIASES.get(given, given)
            if name not in own | chosen:
                close = difflib.get_close_matches(given, [*own, *chosen, *ALIASES], 1)
                hint = f"; do you mean {close[0]}?" if close else f"; there are {', '.join(sorted(own | chosen))}"
                raise UsageError(f"there is no parameter {given!r}{hint}")
            if value is None:
                continue
            if name in values:
                raise UsageError(f"{name} is given twice, once as {given}")
            values[name] = value
        sampling = values.pop("sampling", base.sampling)
        if not isinstance(sampling, Sampling):
            raise UsageError(f"sampling is a {type(sampling).__name__}; it must be an edgelm.Sampling")
        single = {name: values.pop(name) for name in list(values) if name in chosen}
        if "stop" in values:
            values["stop"] = texts("stop", values["stop"])
        if isinstance(values.get("logprobs"), bool):
            values["logprobs"] = 0 if values["logprobs"] else None
        return dataclasses.replace(base, sampling=dataclasses.replace(sampling, **single), **values)


class StopStrings:
    """Looks for stop strings in text that arrives in pieces, and holds back what may yet become one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain to belong to the answer, whether a stop string was met).

        Of several stop strings the one that begins first ends the text; nothing from its first character on is given.
        """
        held = self._held + text
        found = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=-1)
        if found >= 0:
            self._held = ""
            return held[:found], True
        n_held = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - n_held :]
        return held[: len(held) - n_held], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning, but not all, of `stop`."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
