"""A model in memory: what `load` gives. Text to text, text to vectors, text to logits, and sessions.

Puts the parts together: a source becomes a file (`hub`), the file weights (`gguf`, `weights`), the weights a runner
(`program`, or `reference` where there is no Numba). Frozen after loading and shared by any number of sessions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import gguf, hub
from .arch import Config
from .cache import Batch, KVCache
from .describe import describe, describe_file
from .errors import ContextFull, UnsupportedError, UsageError
from .formats import QTensor
from .gguf import GGUF
from .memory import bytes_per_token, context_window, estimate
from .models import model_of
from .session import Message, Progress, Response, Session
from .threads import default_threads
from .tokenizer import Tokenizer
from .weights import Weights

if TYPE_CHECKING:
    from .chat import ChatTemplate

__all__ = ["Model", "Runner", "describe", "generate", "load", "stream_generate"]

INTERPRETERS = ("auto", "program", "reference")


class Runner(Protocol):
    """What computes a model: `program.Program` or `reference.Reference`."""

    max_tokens: int  # of one batch

    def new_cache(self, kv_type: str) -> KVCache: ...

    def forward(self, batch: Batch) -> NDArray[np.float32]: ...


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    ctx_size: int = 0,
    threads: int | None = None,
    threads_batch: int | None = None,
    kv_type: str | None = None,
    interpreter: str = "auto",
    chat_template: str | None = None,
    max_tokens_per_run: int | None = None,
    packed: str = "auto",
    offline: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Loads a model.

    Args:
        source: a GGUF file, a known name, hf:…, pypi:… (see `edgelm.hub`); None for the default model.
        ctx_size: context window in tokens; 0 for that of the model.
        threads, threads_batch: for single tokens and for prompts; None for the physical cores.
        kv_type: what keys and values are stored as: "f16", "f32", "q8_0" or "q4_0", or two of them as "q8_0/f16", first
            that of keys. None for "f16", for the reference "f32".
        interpreter: "program" (compiled kernels), "reference" (NumPy, slow and exact), "auto" for the first of them
            that can run here.
        chat_template: source or built-in name of a template to use instead of the file's own.
        max_tokens_per_run: tokens of a prompt that are computed at a time.
        packed: where the weights are, in the order that kernels read: "memory", "file" (mapped; made if there is
            none), the path of one, or "auto": the file that `edgelm pack` has made, else memory, else, if they do not
            fit, a file.
        offline: never touch the network.
        progress: called as progress(stage, done, total) while something takes its time.

    Raises:
        SourceError: the model cannot be had.
        FormatError: its file is broken.
        UnsupportedError: its file is fine, but needs what this version of edgelm does not have.
        UsageError: an argument that cannot be meant.
    """
    path = hub.resolve(source, offline=offline, progress=progress)
    return Model(
        gguf.read(path),
        ctx_size=ctx_size,
        threads=threads,
        threads_batch=threads_batch,
        kv_type=kv_type,
        interpreter=interpreter,
        chat_template=chat_template,
        max_tokens_per_run=max_tokens_per_run,
        packed=packed,
        progress=progress,
    )


def generate(model: Model | str, prompt: str | Sequence[int], **settings: Any) -> str:
    """`Model.generate` of a model, or of the one that a source names."""
    return (model if isinstance(model, Model) else load(model)).generate(prompt, **settings)


def stream_generate(
    model: Model | str, prompt: str | Sequence[int], **settings: Any
) -> Generator[Response, None, None]:
    """`Model.stream_generate` of a model, or of the one that a source names."""
    return (model if isinstance(model, Model) else load(model)).stream_generate(prompt, **settings)


class Model:
    """A loaded model; safe to use from several threads (one computation at a time runs).

    Attributes:
        gguf, config, weights, tokenizer: its file and what was read from it.
        template: its chat template, or None if the file has none and none was given.
        runner: what computes it.
        interpreter: "program" or "reference", which one that is.
        n_ctx: size of the context window, in tokens.
        kv_type: type of cached keys and values.
        packed_file: the file that the packed weights are in; None: they are in memory.
    """

    def __init__(
        self,
        file: GGUF,
        *,
        ctx_size: int = 0,
        threads: int | None = None,
        threads_batch: int | None = None,
        kv_type: str | None = None,
        interpreter: str = "auto",
        chat_template: str | None = None,
        max_tokens_per_run: int | None = None,
        packed: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        self.gguf = file
        self.packed_file: Path | None = None
        self.config = Config.from_gguf(file.metadata)
        self.weights = Weights.from_gguf(self.config, file.tensors)
        self.tokenizer = Tokenizer.from_gguf(file.metadata)
        self.n_ctx = context_window(self.config, ctx_size)
        self.interpreter = _choose(interpreter)
        self.kv_type = kv_type or ("f32" if self.interpreter == "reference" else "f16")
        self._chat_template = chat_template
        self._threads, self._max_tokens, self._place = (threads, threads_batch), max_tokens_per_run, packed
        if chat_template is not None:
            _ = self.template  # a wrong one is said now
        self.runner = self._new_runner("hidden" if self.is_encoder else "logits", progress)
        if self.interpreter == "program":
            file.forget()  # everything was read
        self._cache = self.runner.new_cache(self.kv_type)

    # ------------------------------------------------------------------------------------------------------- what it is

    @property
    def path(self) -> Path:
        """The file; of a split model, its first part."""
        return self.gguf.paths[0]

    @property
    def name(self) -> str:
        """The name that the file gives its model, else that of the file."""
        named = self.gguf.metadata.get("general.name")
        return named if isinstance(named, str) and named else self.path.stem

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def is_encoder(self) -> bool:
        """Whether it gives vectors and no logits."""
        return self.config.spec.family == "encoder"

    @property
    def n_threads(self) -> int:
        """Threads that compute single tokens."""
        return int(getattr(self.runner, "n_threads", 1))

    @cached_property
    def template(self) -> ChatTemplate | None:
        from .chat import ChatTemplate

        if self._chat_template is None:
            return ChatTemplate.from_gguf(self.gguf.metadata, self.tokenizer)
        return _given_template(self._chat_template, self.tokenizer)

    @cached_property
    def system(self) -> str | None:
        """A system prompt that suits the model better than what its template says by itself; `edgelm chat` begins with
        it. None for models that `hub.KNOWN` does not name. A file that may be one of them is read to be sure."""
        known = hub.recognise(self.path)
        return None if known is None else known.system

    @cached_property
    def fingerprint(self) -> str:
        """Tells this model from others, by its shape and a sample of each tensor: saved sessions are checked by it."""
        digest = hashlib.sha256(repr(self.config).encode())
        for tensor in self.weights:
            digest.update(f"{tensor.name} {tensor.format.name} {tensor.shape}".encode())
            digest.update(tensor.data.reshape(-1)[:64].tobytes())
        if self.interpreter == "program":
            self.gguf.forget()
        return digest.hexdigest()

    def info(self) -> dict[str, Any]:
        """Facts about the model and how it runs here; see `edgelm.describe.describe`."""
        facts = describe_file(self.gguf, ctx_size=self.n_ctx, kv_type=self.kv_type)
        facts |= {"interpreter": self.interpreter, "threads": self.n_threads, "context_window": self.n_ctx}
        if self.interpreter == "program":
            facts["packed_weights"] = "memory" if self.packed_file is None else str(self.packed_file)
        if self.template is not None:
            facts["chat_template"] = self.template.origin
        return facts

    def bytes_per_token(self, n_cached: float) -> float:
        """Bytes that one token reads, after `n_cached` others: see `edgelm.memory`."""
        return bytes_per_token(self.config, self.weights, n_cached, self.kv_type)

    # ------------------------------------------------------------------------------------------------------------- text

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids; see `Tokenizer.decode`."""
        return self.tokenizer.decode(tokens, skip_special=skip_special)

    def render(self, messages: Sequence[Message], **kwargs: Any) -> list[int]:
        """Token ids of a conversation, by the chat template; `kwargs` go to the template.

        A BOS token that the template writes itself is not written twice.

        Raises:
            UsageError: there is no chat template.
            TemplateError: the template refuses these messages.
        """
        if self.template is None:
            raise UsageError(
                f"{self.name} has no chat template: it may be no chat model. Complete text with `run` or generate(), "
                "or choose a template with --chat-template, such as chatml"
            )
        return self.tokenizer.encode_chat(self.template.render(messages, **kwargs))

    def session(self, **settings: Any) -> Session:
        """A new conversation; `settings` are defaults of its answers, as in `Session.stream`."""
        self.require_logits()
        return Session(self, **settings)

    def stream_generate(
        self, prompt: str | Sequence[int], *, progress: Progress | None = None, **settings: Any
    ) -> Generator[Response, None, None]:
        """Continues a text, token by token; parameters and errors as for `Session.stream`."""
        return self.session().stream(prompt, progress=progress, **settings)

    def generate(self, prompt: str | Sequence[int], **settings: Any) -> str:
        """The continuation of a text; parameters and errors as for `Session.stream`.

        Without `max_tokens` it goes on until the model ends it or the context window is full.
        """
        return "".join(response.text for response in self.stream_generate(prompt, **settings))

    def chat(self, messages: str | Sequence[Message], **settings: Any) -> Generator[Response, None, None]:
        """Answers a conversation, token by token; parameters and errors as for `Session.chat`.

        For a conversation of several turns take `session()`, which keeps what it has computed.
        """
        return self.session().chat(messages, **settings)

    def require_logits(self) -> None:
        """Raises UsageError if this model cannot generate text."""
        if self.is_encoder:
            raise UsageError(f"{self.name} is an encoder ({self.config.arch}): it gives embeddings, and no text")

    # ---------------------------------------------------------------------------------------------------------- numbers

    def new_cache(self) -> KVCache:
        """The cache that all sessions of this model share: pages that one of them gives back serve the others."""
        return self._cache

    def logits(self, prompt: str | Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a prompt: float32 (T, vocabulary).

        Raises:
            ContextFull: the prompt is longer than the context window.
        """
        self.require_logits()
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        if len(tokens) > self.n_ctx:
            raise ContextFull(len(tokens), self.n_ctx)
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        sequence, step = self._cache.new_sequence(), self.runner.max_tokens
        try:
            for at in range(0, len(tokens), step):
                out[at : at + step] = self.runner.forward(Batch.of([(sequence, tokens[at : at + step], "all")]))
        finally:
            sequence.release()
        return out

    def embed(
        self,
        texts: str | Sequence[str | Sequence[int]],
        pooling: str | None = None,
        normalize: bool = True,
        *,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Vectors of texts (or of token ids): float32 (n, D). A single text gives (1, D).

        Args:
            pooling: how the vectors of tokens become one: "mean", "cls" (the first), "last", or "none", which takes
                one text and gives (T, D). None is what the file says; of a file that says nothing, "mean".
            normalize: scale each vector to length one.
            truncate: cut texts that are longer than the context window, instead of raising ContextFull.
        """
        from .embedding import embed

        return embed(self, [texts] if isinstance(texts, str) else list(texts), pooling, normalize, truncate, progress)

    @cached_property
    def hidden_runner(self) -> Runner:
        """What computes the last hidden states. A decoder gets a second runner of the same weights when first asked."""
        return self.runner if self.is_encoder else self._new_runner("hidden", None, self.runner)

    def _new_runner(self, head: str, progress: Progress | None, shared: Any = None) -> Runner:
        function = model_of(self.config)
        if self.interpreter == "reference":
            from .reference import Reference

            return Reference(function, self.config, self.weights, head=head, n_ctx=self.n_ctx)
        from .program import Program

        batch = {} if self._max_tokens is None else {"max_tokens": self._max_tokens}
        return Program(
            function,
            self.config,
            self.weights,
            head=head,
            n_ctx=self.n_ctx,
            n_threads=self._threads[0],
            n_threads_batch=self._threads[1],
            kv_type=self.kv_type,
            shared=shared,
            pack=lambda tensors: self._pack(tensors, progress),
            progress=progress,
            **batch,
        )

    def _pack(self, tensors: list[QTensor], progress: Progress | None) -> list[Any]:
        """The weights that a program asks for."""
        from . import packed

        # The window may be large and never be filled: room for a conversation is what has to be there.
        need = estimate(self.config, (), min(self.n_ctx, 4096), self.kv_type)
        result, self.packed_file = packed.load(
            self.gguf, tensors, self._place, need.total, default_threads(), progress
        )
        return result

    def close(self) -> None:
        """Ends the threads; the memory goes when the model is collected. Using it again starts new threads."""
        for runner in (self.runner, self.__dict__.get("hidden_runner")):
            close: Callable[[], None] | None = getattr(runner, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _choose(interpreter: str) -> str:
    """ "program" or "reference"."""
    if interpreter not in INTERPRETERS:
        raise UsageError(f"interpreter is {interpreter!r}; it must be one of {', '.join(INTERPRETERS)}")
    has_numba = importlib.util.find_spec("numba") is not None
    if interpreter == "program" and not has_numba:
        raise UnsupportedError("compiled kernels need the package numba: pip install numba; or interpreter reference")
    if interpreter == "auto":
        return "program" if has_numba else "reference"
    return interpreter


def _given_template(text: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A template by the name of a built-in one, or by its source."""
    from .chat import BUILTIN, ChatTemplate

    if text not in BUILTIN and "{" not in text:
        raise UsageError(f"there is no built-in chat template {text!r}; there are {', '.join(BUILTIN)}")
    bos, eos = (
        "" if token is None else tokenizer.token_bytes(token).decode("utf-8", "replace")
        for token in (tokenizer.bos_id, tokenizer.eos_id)
    )
    origin = f"--chat-template {text}" if text in BUILTIN else "--chat-template"
    return ChatTemplate(BUILTIN.get(text, text), bos_token=bos, eos_token=eos, origin=origin)
