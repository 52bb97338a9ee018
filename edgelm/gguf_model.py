"""A model from a GGUF file, computed by `program`, or by `reference` where there is no Numba."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import memory
from .arch import Config
from .errors import UnsupportedError, UsageError
from .formats import QTensor
from .gguf import GGUF
from .kv_types import both, named
from .model import Model, Runner, Settings
from .models import model_of
from .program import TOKENS_AT_ONCE, Program
from .rope import factors_that_apply
from .threads import default_threads
from .weights import Weights

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .disk import Progress
    from .tokenizer import Tokenizer

INTERPRETERS = ("auto", "program", "reference")


class GGUFModel(Model):
    """See `Model`.

    Attributes:
        gguf, config, weights: the file and what was read from it.
        packed_file: the file that the packed weights are in; None: they are in memory.
    """

    def __init__(self, file: GGUF, settings: Settings, progress: Progress | None = None) -> None:
        self.gguf, self.path, self._settings = file, file.paths[0], settings
        self.packed_file: Path | None = None
        self.config = Config.from_gguf(file.metadata)
        self.weights = Weights.from_gguf(self.config, file.tensors)
        self.n_ctx = memory.context_window(self.config, settings.ctx_size)
        self.interpreter = _choose(settings.interpreter)
        self.kv_type = named(*both(settings.kv_type or usual_kv_type(self.interpreter)))
        self._chat_template = settings.chat_template
        self.runner = self._new_runner("hidden" if self.is_encoder else "logits", progress)
        try:
            self.tokenizer = _tokenizer(file)  # last: weights may be packed meanwhile
            if settings.chat_template is not None:
                _ = self.template  # a wrong one is said now
        except BaseException:
            self.close()
            raise
        if self.interpreter == "program":
            file.forget()  # everything was read
        self._cache = self.runner.new_cache(self.kv_type)

    @property
    def name(self) -> str:
        named = self.gguf.metadata.get("general.name")
        return named if isinstance(named, str) and named else self.path.stem

    @property
    def architecture(self) -> str:
        return self.config.arch

    @property
    def licence(self) -> str:
        keys = self.gguf.metadata
        return str(keys.get("general.license.link") or keys.get("general.license") or "")

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def is_encoder(self) -> bool:
        return self.config.spec.family == "encoder"

    @property
    def pooling(self) -> str:
        return self.config.pooling

    @cached_property
    def fingerprint(self) -> str:
        """By the model's shape, a sample of each tensor, and the RoPE factors that the context window asks for."""
        digest = hashlib.sha256(repr(self.config).encode())
        for tensor in self.weights:
            digest.update(f"{tensor.name} {tensor.format.name} {tensor.shape}".encode())
            digest.update(tensor.data.reshape(-1)[:64].tobytes())
        if factors := self.weights.factors():
            for rope in filter(None, map(self.config.rope, range(self.config.n_layers))):
                digest.update(factors_that_apply(rope, factors, self.n_ctx).encode())
        if self.interpreter == "program":
            self.gguf.forget()
        return digest.hexdigest()

    def info(self) -> dict[str, Any]:
        from .describe import describe_file

        facts = describe_file(self.gguf, ctx_size=self.n_ctx, kv_type=self.kv_type)
        facts |= {"interpreter": self.interpreter, "threads": self.n_threads, "context_window": self.n_ctx}
        if self.interpreter == "program":
            facts["packed_weights"] = "memory" if self.packed_file is None else str(self.packed_file)
        if self.template is not None:
            facts["chat_template"] = self.template.origin
        return facts

    def bytes_per_token(self, n_cached: float) -> float:
        return memory.bytes_per_token(self.config, self.weights, n_cached, self.kv_type)

    def memory(self, n_tokens: int) -> memory.Memory:
        return memory.estimate(self.config, self.weights, n_tokens, self.kv_type, self._tokens_at_once)

    @property
    def _tokens_at_once(self) -> int:
        return self._settings.max_tokens_per_run or TOKENS_AT_ONCE

    def _own_template(self) -> ChatTemplate | None:
        from .chat import ChatTemplate

        return ChatTemplate.from_gguf(self.gguf.metadata, self.tokenizer)

    @cached_property
    def hidden_runner(self) -> Runner:
        return self.runner if self.is_encoder else self._new_runner("hidden", None, self.runner)

    def _new_runner(self, head: str, progress: Progress | None, shared: Any = None) -> Runner:
        function = model_of(self.config)
        if self.interpreter == "reference":
            from .reference import Reference

            return Reference(function, self.config, self.weights, head=head, n_ctx=self.n_ctx)
        settings = self._settings
        return Program(
            function,
            self.config,
            self.weights,
            head=head,
            n_ctx=self.n_ctx,
            n_threads=settings.threads,
            n_threads_batch=settings.threads_batch,
            max_tokens=self._tokens_at_once,
            kv_type=self.kv_type,
            matrix_unit=not settings.batch_invariant,
            shared=shared,
            pack=lambda tensors, pairs: self._pack(tensors, pairs, progress),
            progress=progress,
        )

    def _pack(
        self, tensors: list[QTensor], pairs: list[tuple[int, int]], progress: Progress | None
    ) -> tuple[list[Any], Any]:
        """The weights that a program asks for, and their packing, if it is under way."""
        from . import packed

        # The window may be large and never be filled: room for a conversation is what has to be there.
        need = memory.estimate(self.config, (), min(self.n_ctx, 4096), self.kv_type, self._tokens_at_once)
        n_threads = self._settings.threads_batch or self._settings.threads or default_threads()
        forms, place = packed.load(self.gguf, tensors, self._settings.packed, need.total, n_threads, progress, pairs)
        if not isinstance(place, Path):
            return forms, place
        self.packed_file = place
        return forms, None


def _tokenizer(file: GGUF) -> Tokenizer:
    from .tokenizer import Tokenizer

    return Tokenizer.from_gguf(file.metadata)


def usual_kv_type(interpreter: str) -> str:
    """What keys and values are stored as if nothing else is asked for."""
    if _choose(interpreter) == "reference":
        return "f32"
    from .kernels.attention import usual_kv_type

    return usual_kv_type()


def _choose(interpreter: str) -> str:
    """ "program" or "reference"."""
    if interpreter == "onnxruntime":
        raise UsageError("onnxruntime runs models in ONNX; for this GGUF file take auto, program or reference")
    if interpreter not in INTERPRETERS:
        raise UsageError(f"interpreter is {interpreter!r}; it must be one of {', '.join(INTERPRETERS)}")
    has_numba = importlib.util.find_spec("numba") is not None
    if interpreter == "program" and not has_numba:
        raise UnsupportedError("compiled kernels need the package numba: pip install numba; or interpreter reference")
    if interpreter == "auto":
        return "program" if has_numba else "reference"
    return interpreter
