"""A conversation with a model: its tokens, its part of the KV cache, and the loop that continues it.

A session keeps what it has computed. Whatever it is asked to continue next, it reuses the longest prefix that it
has already and computes the rest. Kernels sum in an order that does not depend on how a text was cut, so a
cached answer is the answer that would have come without a cache; to the last bit, unless a matrix unit computes
prompts (`load(batch_invariant=True)` does without).

Knows tokens, a runner and a sampler; nothing of files, terminals or kernels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import overflow
from .cache import Batch
from .errors import UsageError
from .forks import lock_of
from .request import Request, StopStrings
from .sampling import Sampler, logprobs

if TYPE_CHECKING:
    import os

    from .disk import Progress
    from .model import Model
    from .overflow import Message


@dataclass(frozen=True)
class Response:
    """One step of an answer. The texts of all responses, joined, are the answer.

    Attributes:
        text: what this step adds; empty while a character or a possible stop string is incomplete.
        token: id of the token that was chosen.
        logprob: natural logarithm of its probability before any sampler; None unless logprobs were asked for.
        logprobs: the most probable tokens and theirs, the best first: as many as were asked for.
        prompt_tokens: tokens of the prompt, after anything was dropped.
        cached_tokens: how many of them were not computed again.
        prompt_tps: computed tokens of the prompt per second.
        generation_tokens: tokens chosen so far, this one included.
        generation_tps: tokens computed after the prompt, per second.
        finish_reason: None while the answer goes on; then "stop" (the model or a stop string ended it), "length"
            (max_tokens) or "context" (the context window is full).
        dropped_tokens: tokens left out of the prompt or the context so far, because they did not fit.
    """

    text: str
    token: int
    logprob: float | None
    logprobs: tuple[tuple[int, float], ...]
    prompt_tokens: int
    cached_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None
    dropped_tokens: int


@dataclass
class _Counts:
    """What is counted while an answer is made; seconds are those spent here, not with whoever reads the answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    prompt_s: float = 0.0
    generation_tokens: int = 0
    steps: int = 0
    generation_s: float = 0.0
    dropped_tokens: int = 0

    def rates(self) -> tuple[float, float]:
        return (
            self.computed_tokens / self.prompt_s if self.prompt_s > 0 else 0.0,
            self.steps / self.generation_s if self.generation_s > 0 and self.steps else 0.0,
        )


class Session:
    """One text that grows, with its cached keys and values. Made by `Model.session`.

    A session belongs to one thread at a time; sessions of one model in different threads share its weights.

    When the context window is full, `overflow` decides, and `Response.dropped_tokens` tells:
        "error": a prompt that does not fit raises `ContextFull`; an answer that reaches the end stops ("context").
        "truncate-middle": the middle of a prompt is dropped, of a conversation its oldest messages but the first;
            an answer that reaches the end stops.
        "shift": what follows the first `keep` tokens is dropped, of a conversation its oldest messages; an answer
            goes on, after half of what it may drop has been dropped and the rest computed again.

    Args:
        model: where the weights are.
        settings: defaults of every answer, as in `stream`.
    """

    def __init__(self, model: Model, **settings: Any) -> None:
        self.model = model
        self.defaults = Request.of(settings)
        self._tokens: list[int] = []  # exactly what `_sequence` holds, whenever nothing is being computed
        self._sequence = model.new_cache().new_sequence()
        self._busy = lock_of(self, "_busy")
        self._is_closed = False
        self._answer = 0  # which answer may go on: a later one ends those before it

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values are cached. The last token of an answer is not, until it is continued."""
        return tuple(self._tokens)

    @property
    def n_ctx(self) -> int:
        """Tokens that the context window holds."""
        return self.model.n_ctx

    # ----------------------------------------------------------------------------------------------- continuing a text

    def stream(
        self, prompt: str | Sequence[int], *, progress: Progress | None = None, **settings: Any
    ) -> Generator[Response, None, None]:
        """Continues `prompt`, which is the whole text (not an addition to it), token by token.

        Closing the iterator, or an exception such as KeyboardInterrupt, ends the answer; the session can be used on.

        Args:
            prompt: a text, or token ids.
            progress: called as progress("prompt", done, total) in tokens while the prompt is computed.
            **settings: fields of `Request` and `Sampling`, by llama.cpp's names and the usual others
                (max_tokens, temperature or temp, top_k, top_p, min_p, seed, stop, logprobs, overflow, keep ...).

        Raises:
            ContextFull: the prompt does not fit, and overflow is "error".
            UsageError: a setting that cannot be meant, or an empty prompt.
        """
        request = Request.of(settings, self.defaults)
        return self._begin(self.model.tokens_of(prompt), 0, request, progress)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Generator[Response, None, None]:
        """Answers a conversation, written with the model's own chat template: `stream` of what the template makes.

        Give all messages each time; what they have in common with the last answer's is not computed again.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}, or one text of the user.
            tools, template_kwargs: passed on to the template.

        Raises:
            UsageError: the model has no chat template.
            TemplateError: the template refuses these messages.
        """
        request = Request.of(settings, self.defaults)
        given: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)

        def render(kept: Sequence[Message]) -> list[int]:
            return self.model.render(kept, tools=tools, **(template_kwargs or {}))

        tokens, dropped = overflow.fit_messages(given, render, request, self.n_ctx)
        return self._begin(tokens, dropped, request, progress)

    def _begin(
        self, tokens: list[int], dropped: int, request: Request, progress: Progress | None
    ) -> Generator[Response, None, None]:
        """Checks everything at once, so that a wrong request fails at the call and not at the first token."""
        self._need_open()
        self.model.require_logits()
        if not tokens:
            raise UsageError("the prompt has no tokens; give at least one")
        if min(tokens) < 0 or max(tokens) >= self.model.vocab_size:
            raise UsageError(f"the prompt has a token outside the vocabulary of {self.model.vocab_size}")
        tokens, more = overflow.fit_tokens(tokens, request, self.n_ctx, self._n_fixed(request))
        tokenizer = self.model.tokenizer
        sampler = Sampler(
            request.sampling,
            self.model.vocab_size,
            eog_ids=tokenizer.eog_ids,
            token_text=lambda token: tokenizer.token_bytes(token).decode("utf-8", "replace"),
            encode=lambda text: tokenizer.encode(text, add_special=False, parse_special=False),
        )
        with self._alone():
            answer = self._answer = self._answer + 1
        counts = _Counts(prompt_tokens=len(tokens), dropped_tokens=dropped + more)
        return self._generate(tokens, request, sampler, counts, answer, progress)

    def _n_fixed(self, request: Request) -> int:
        """Tokens at the start that are never dropped: those asked for, and the BOS token."""
        return max(request.keep, int(self.model.tokenizer.add_bos and self.model.tokenizer.bos_id is not None))

    def _generate(
        self,
        tokens: list[int],
        request: Request,
        sampler: Sampler,
        counts: _Counts,
        answer: int,
        progress: Progress | None,
    ) -> Generator[Response, None, None]:
        tokenizer = self.model.tokenizer
        ends = tokenizer.eog_ids | self._stop_tokens(request)
        decoder, stops = tokenizer.stream(skip_special=True), StopStrings(request.stop)
        for token in tokens:
            sampler.accept(token)
        token, finish = -1, None
        while finish is None:
            with self._alone(answer):
                if token < 0:
                    logits = self._prefill(tokens, counts, progress)
                    if request.max_tokens == 0:  # somebody only wants the prompt in the cache
                        return
                else:
                    logits = self._step(token, request, counts)
                began = time.perf_counter()
                token = sampler(logits)
                sampler.accept(token)
                counts.generation_tokens += 1
                text, stopped = stops.push(decoder.flush() if token in ends else decoder.push(token))
                if stopped or token in ends:
                    finish = "stop"
                elif counts.generation_tokens == request.max_tokens:
                    finish = "length"
                elif len(self._tokens) >= self.n_ctx and request.overflow != "shift":
                    finish = "context"
                if finish and not stopped:  # what might have become a stop string did not; half a character is left out
                    text += stops.flush()
                own, best = logprobs(logits, token, request.logprobs) if request.logprobs is not None else (None, [])
                counts.generation_s += time.perf_counter() - began
            prompt_tps, generation_tps = counts.rates()
            yield Response(
                text, token, own, tuple(best), counts.prompt_tokens, counts.cached_tokens, prompt_tps,
                counts.generation_tokens, generation_tps, finish, counts.dropped_tokens,
            )  # fmt: skip

    def _stop_tokens(self, request: Request) -> frozenset[int]:
        """Stop strings that name a special token: those never appear in the text."""
        tokenizer = self.model.tokenizer
        found = [tokenizer.encode(text, add_special=False, parse_special=True) for text in request.stop]
        return frozenset(ids[0] for ids in found if len(ids) == 1 and tokenizer.is_special(ids[0]))

    # ------------------------------------------------------------------------------------------------------- computing

    def _prefill(self, tokens: list[int], counts: _Counts, progress: Progress | None) -> NDArray[np.float32]:
        """Makes the session hold `tokens`, and gives the logits after the last: float32 (vocab,)."""
        n_common = 0
        for ours, theirs in zip(self._tokens, tokens[:-1], strict=False):  # the last one is computed for its logits
            if ours != theirs:
                break
            n_common += 1
        self._truncate(n_common)
        counts.cached_tokens = start = len(self._tokens)
        counts.computed_tokens = total = len(tokens) - start
        began = time.perf_counter()
        step = self.model.runner.max_tokens
        while len(self._tokens) + step < len(tokens):
            at = len(self._tokens)
            self._compute(tokens[at : at + step], "none")
            if progress is not None:
                progress("prompt", len(self._tokens) - start, total)
        logits: NDArray[np.float32] = self._compute(tokens[len(self._tokens) :])[0]
        counts.prompt_s = time.perf_counter() - began
        if progress is not None:
            progress("prompt", total, total)
        return logits

    def _step(self, token: int, request: Request, counts: _Counts) -> NDArray[np.float32]:
        """Adds the token that was chosen, and gives the logits after it."""
        began = time.perf_counter()
        if len(self._tokens) >= self.n_ctx:
            self._shift(request, counts)
        logits: NDArray[np.float32] = self._compute([token])[0]
        counts.steps += 1
        counts.generation_s += time.perf_counter() - began
        return logits

    def _compute(self, tokens: Sequence[int], wanted: str = "last") -> NDArray[np.float32]:
        out = self.model.runner.forward(Batch.of([(self._sequence, tokens, wanted)]))
        self._tokens.extend(tokens)
        return out

    def _shift(self, request: Request, counts: _Counts) -> None:
        """Drops half of what may be dropped and computes what follows it again, at its new positions."""
        kept, dropped = overflow.shift(self._tokens, self._n_fixed(request))
        counts.dropped_tokens += dropped
        if kept:
            self._prefill(kept, _Counts(), None)
        else:  # a window of one token
            self._truncate(0)

    def _truncate(self, n_tokens: int) -> None:
        """Forgets all tokens from `n_tokens` on; all of them when layers with a window no longer allow less."""
        if n_tokens < self._sequence.floor:
            n_tokens = 0
        self._sequence.truncate(n_tokens)
        del self._tokens[n_tokens:]

    def _need_open(self) -> None:
        if self._is_closed:
            raise UsageError("this session was closed; make another one with Model.session()")

    @contextmanager
    def _alone(self, answer: int | None = None) -> Iterator[None]:
        """The session to ourselves, and in order, whatever ended the last computation; for an answer, if it may go on.

        Who ends the answer that is being read does so within: a call that is refused changes nothing.
        """
        self._need_open()
        if not self._busy.acquire(blocking=False):
            raise UsageError("a session is used by two threads at once; give each thread a session of its own")
        try:
            if answer is not None and answer != self._answer:
                raise UsageError("this answer is over: the session was asked for something else in the meantime")
            if len(self._tokens) != self._sequence.length:  # interrupted between the two
                self._truncate(min(len(self._tokens), self._sequence.length))
            yield
        finally:
            self._busy.release()

    # ------------------------------------------------------------------------------------- what else one does with it

    def truncate(self, n_tokens: int) -> None:
        """Takes everything from the `n_tokens`-th token on back. An answer that is being read ends."""
        with self._alone():
            if not 0 <= n_tokens <= len(self._tokens):
                raise UsageError(f"cannot go back to {n_tokens} tokens; the session has {len(self._tokens)}")
            self._answer += 1
            self._truncate(n_tokens)

    def reset(self) -> None:
        """Forgets everything."""
        self.truncate(0)

    def fork(self) -> Session:
        """Another session with the same text; what both have in common is stored once."""
        with self._alone():
            other = copy.copy(self)
            other._sequence, other._tokens = self._sequence.fork(), list(self._tokens)
            other._busy, other._answer = lock_of(other, "_busy"), 0
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokens and their cached keys and values to a file, for `load` with the same model."""
        from . import session_file

        with self._alone():
            session_file.save(Path(path), self.model, self._tokens, self._sequence)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over what `save` wrote.

        Raises:
            FormatError: the file is damaged or is of another model. The session is as it was then, as with the others.
            SourceError: the file cannot be opened.
            CacheFull: there is no memory for what it holds.
        """
        from . import session_file

        tokens, sequence = session_file.load(Path(path), self.model, self.model.new_cache())
        with self._alone():
            self._answer += 1
            before, self._tokens, self._sequence = self._sequence, tokens, sequence
            before.release()

    def close(self) -> None:
        """Gives the memory back to the model's other sessions; again it does nothing. Collecting it does the same."""
        if self._is_closed:
            return
        with self._alone():
            self._answer += 1
            self._sequence.release()
            self._tokens.clear()
            self._is_closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
