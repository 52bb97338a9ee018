"""What to leave out when a text does not fit into the context window. Pure functions over tokens and messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ContextFull
from .request import Request

Message = Mapping[str, Any]


def room(request: Request, n_ctx: int) -> int:
    """Tokens to leave for an answer when something has to be dropped anyway: those asked for, at most half the window;
    a quarter of it when nobody said how many."""
    return min(request.max_tokens, n_ctx // 2) if request.max_tokens > 0 else n_ctx // 4


def fit_tokens(tokens: list[int], request: Request, n_ctx: int, n_fixed: int) -> tuple[list[int], int]:
    """(the tokens that fit, how many were dropped).

    "truncate-middle" keeps the first half and the last half of what fits, "shift" the first `n_fixed` and the last.
    Nothing is dropped from a prompt that fits, even if no room is left for an answer.

    Raises:
        ContextFull: they do not fit, and the request's overflow is "error".
    """
    if len(tokens) <= n_ctx:
        return tokens, 0
    if request.overflow == "error":
        raise ContextFull(len(tokens), n_ctx)
    target = max(1, n_ctx - room(request, n_ctx))
    head = max(n_fixed, target // 2) if request.overflow == "truncate-middle" else n_fixed
    head = min(head, target - 1)  # the last token is what the answer follows
    return tokens[:head] + tokens[len(tokens) - (target - head) :], len(tokens) - target


def fit_messages(
    messages: list[Message], render: Callable[[Sequence[Message]], list[int]], request: Request, n_ctx: int
) -> tuple[list[int], int]:
    """(tokens of the messages that fit, how many tokens were dropped with the others).

    Whole messages are dropped, the oldest first, so that what is left is still a conversation. System messages at the
    beginning and the last message stay, with "truncate-middle" also the first after them. What is left may still be
    too long.
    """
    tokens = render(messages)
    if len(tokens) <= n_ctx or request.overflow == "error":
        return tokens, 0
    target, n_all, kept = n_ctx - room(request, n_ctx), len(tokens), list(messages)
    first = 0
    while first < len(kept) and kept[first].get("role") == "system":
        first += 1
    first += request.overflow == "truncate-middle"
    while len(tokens) > target and len(kept) - first > 1:
        _drop_exchange(kept, first)
        tokens = render(kept)
    return tokens, n_all - len(tokens)


def _drop_exchange(messages: list[Message], at: int) -> None:
    """Takes out a message and what follows up to the next of its role: templates want the roles to alternate."""
    role = messages.pop(at).get("role")
    while len(messages) - at > 1 and messages[at].get("role") != role:
        del messages[at]
    if at and messages[at].get("role") == messages[at - 1].get("role"):  # only the last message is left
        del messages[at - 1]


def shift(tokens: list[int], n_fixed: int) -> tuple[list[int], int]:
    """A full context without half of what follows the first `n_fixed` tokens, and how many tokens that is."""
    n_fixed = min(n_fixed, max(0, len(tokens) - 2))
    n_dropped = max(1, (len(tokens) - n_fixed) // 2)
    return tokens[:n_fixed] + tokens[n_fixed + n_dropped :], n_dropped
