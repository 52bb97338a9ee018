"""Every error that edgelm raises on purpose.

    EdgelmError
    ├── FormatError          the file is broken: truncated, inconsistent, or a lie about its own sizes
    ├── UnsupportedError     the file is fine, but this version of edgelm cannot do what it asks for
    ├── SourceError          a model could not be found, fetched or verified
    ├── ContextFull          the prompt or the conversation does not fit into the context window
    ├── CacheFull            there is no memory for the keys and values of all conversations together
    ├── TemplateError        a chat template failed, or exceeded its limits
    └── UsageError           a request that makes no sense: an unknown name, a value out of range

A message says where, what, and what to do. The command line prints it on one line and exits with 2.
"""

from __future__ import annotations

from typing import Any


class EdgelmError(Exception):
    """Base of every error raised on purpose; anything else that escapes is a bug in edgelm."""


class FormatError(EdgelmError):
    """A file contradicts its own format."""


class UnsupportedError(EdgelmError):
    """A well-formed file or request needs something that edgelm does not have."""


class SourceError(EdgelmError):
    """A model source could not be found, downloaded or verified."""


class ContextFull(EdgelmError):
    """The tokens do not fit into the context window.

    Attributes:
        n_tokens: tokens that were asked for.
        n_ctx: size of the context window, in tokens.
    """

    def __init__(self, n_tokens: int, n_ctx: int, hint: str = "") -> None:
        self.n_tokens, self.n_ctx, self._hint = n_tokens, n_ctx, hint
        super().__init__(
            f"{n_tokens} tokens do not fit into the context window of {n_ctx}; "
            + (hint or "shorten the prompt, raise --ctx-size, or choose --overflow truncate-middle or shift")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which a pool of processes passes errors on with."""
        return ContextFull, (self.n_tokens, self.n_ctx, self._hint)


class CacheFull(EdgelmError):
    """The KV cache would exceed its limit, or the memory of the machine."""


class TemplateError(EdgelmError):
    """A chat template is wrong, hostile, or took more than it is allowed to."""


class UsageError(EdgelmError):
    """A request that cannot be meant: an unknown name, or a value out of its range."""
