"""What a chat template may do: operators, string methods, attributes, global functions, each paid for beforehand.

Results are those of jinja2 and Python. Left out are methods that prompts have no use for (`str.encode`,
`str.translate`). Knows no messages; the filters are in `template_filters`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2.runtime import LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2.runtime import Context

    from .sandbox import Budget, Sandbox

SEQUENCES: tuple[type, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
REPR_BYTES = 12  # of one character in the representation of a container or in JSON, at most
MAX_BITS = 1 << 14  # of an integer
MAX_SEARCH = 1 << 30  # length of a text times length of what is searched in it from the right, or stripped off it


class LimitExceeded(Exception):
    """A template takes more than it is allowed to."""


class Refused(Exception):
    """A template called `raise_exception`: it does not like the messages."""


def size(value: Any) -> int:
    """Bytes of a value on its own, without what it refers to."""
    if isinstance(value, str | list | tuple | dict):
        return sys.getsizeof(value)
    return 64


def item_bytes(value: str | list[Any] | tuple[Any, ...]) -> int:
    """Bytes of one character or item of a value like this one, at most."""
    return (1 if value.isascii() else 4) if isinstance(value, str) else 8


def drawn(budget: Budget, items: Iterable[Any]) -> list[Any]:
    """The items as a list, each of them counted."""
    found = []
    for item in items:
        budget.take(64)
        found.append(item)
    return found


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ------------------------------------------------------------------------------------------------------------ operators


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Counts what `left operator right` will cost, and refuses what costs too much."""
    budget.step()
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            bits = left.bit_length() + right.bit_length()
        elif operator == "**":
            bits = left.bit_length() * max(right, 1)
        else:
            bits = max(left.bit_length(), right.bit_length())
        if bits > MAX_BITS:
            raise LimitExceeded("it computes with numbers that are too large")
        budget.take(bits >> 3)
    elif operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            budget.take((len(left) + len(right)) * max(item_bytes(left), item_bytes(right)))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            budget.take(8 * (len(left) + len(right)))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int) and times > 0:
                budget.take(len(value) * times * item_bytes(value))
                if not isinstance(value, str) and budget.weigh(value) * times > budget.max_weight:
                    raise LimitExceeded("it makes a value that is too large")
    elif operator == "%" and isinstance(left, str):
        check_percent(budget, left, right)


def check_percent(budget: Budget, pattern: str, values: Any) -> None:
    """Widths and precisions stand as digits in the pattern, or, for an asterisk, among the values."""
    budget.take(len(pattern) * item_bytes(pattern) + _sum_of_digits(pattern))
    if "*" in pattern:
        numbers = [value for value in (values if isinstance(values, tuple) else ()) if isinstance(value, int)]
        budget.take(sum(map(abs, numbers)))
    repeats = pattern.count("%") if isinstance(values, Mapping) else 1
    budget.take(REPR_BYTES * repeats * budget.weigh(values))


def _sum_of_digits(pattern: str) -> int:
    runs = re.findall(r"\d+", pattern)
    if any(len(run) > 9 for run in runs):
        raise LimitExceeded("it formats with a width that is too large")
    return sum(map(int, runs))


class _Formatter(SandboxedFormatter):
    _env: Sandbox

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = self._env.budget
        budget.take(_sum_of_digits(format_spec) + REPR_BYTES * budget.weigh(value))
        return super().format_field(value, format_spec)


class _EscapeFormatter(SandboxedEscapeFormatter):
    _env: Sandbox

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = self._env.budget
        budget.take(_sum_of_digits(format_spec) + REPR_BYTES * budget.weigh(value))
        return super().format_field(value, format_spec)


# ------------------------------------------------------------------------------------------------------- string methods


_CHEAP = names(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper lower partition removeprefix removesuffix startswith swapcase title "
    "upper"
)
_SEARCHING = names("lstrip rfind rindex rpartition rstrip strip")


def string_method(sandbox: Sandbox, text: str, name: str) -> Callable[..., Any] | None:
    """The method `name` of a string, bounded; None if templates may not have it."""
    special = _METHODS.get(name)
    if special is not None:
        return partial(special, sandbox, text)
    return getattr(text, name) if name in _CHEAP else None


def _searching(name: str) -> Callable[..., Any]:
    def method(sandbox: Sandbox, text: str, *args: Any) -> Any:
        check_search(sandbox.budget, text, *args)
        return getattr(text, name)(*args)

    return method


def check_search(budget: Budget, text: str, *args: Any) -> None:
    """Python searches from the right, and strips, in time that may grow with the product of the two lengths."""
    for arg in args:
        if isinstance(arg, str):
            if len(text) * len(arg) > MAX_SEARCH:
                raise LimitExceeded("it searches for a text that is too long")
            budget.step(len(text) * len(arg) >> 12)


def _split(name: str) -> Callable[..., Any]:
    def method(sandbox: Sandbox, text: str, *args: Any, **kwargs: Any) -> Any:
        separator = args[0] if args else kwargs.get("sep")
        most = args[1] if len(args) > 1 else kwargs.get("maxsplit", -1)
        pieces = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
        if isinstance(most, int) and most >= 0:
            pieces = min(pieces, most)
        if name == "rsplit":
            check_search(sandbox.budget, text, separator)
        sandbox.budget.take(64 * (pieces + 1) + len(text) * item_bytes(text))
        return getattr(text, name)(*args, **kwargs)

    return method


def _splitlines(sandbox: Sandbox, text: str, *args: Any, **kwargs: Any) -> list[str]:
    sandbox.budget.take(64 * len(text))
    return text.splitlines(*args, **kwargs)


def _padded(name: str) -> Callable[..., Any]:
    def method(sandbox: Sandbox, text: str, width: int, *args: Any) -> Any:
        sandbox.budget.take(4 * max(width, 0))
        return getattr(text, name)(width, *args)

    return method


def _expandtabs(sandbox: Sandbox, text: str, tabsize: int = 8) -> str:
    sandbox.budget.take(4 * max(tabsize, 0) * text.count("\t"))
    return text.expandtabs(tabsize)


def check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.take(4 * (len(text) + text.count(old) * len(new)))


def _replace(sandbox: Sandbox, text: str, old: str, new: str, count: int = -1) -> str:
    check_replace(sandbox.budget, text, old, new)
    return text.replace(old, new, count)


def _join(sandbox: Sandbox, text: str, items: Iterable[str]) -> str:
    parts = drawn(sandbox.budget, items)
    sandbox.budget.take(4 * (sandbox.budget.weigh(parts) + len(parts) * len(text)))
    return text.join(parts)


def _format(sandbox: Sandbox, text: str, *args: Any, **kwargs: Any) -> str:
    formatter = _EscapeFormatter(sandbox, escape=text.escape) if isinstance(text, Markup) else _Formatter(sandbox)
    sandbox.budget.take(4 * len(text))
    return type(text)(formatter.vformat(text, args, kwargs))


def _format_map(sandbox: Sandbox, text: str, values: Mapping[str, Any]) -> str:
    return _format(sandbox, text, **values)


_METHODS: dict[str, Callable[..., Any]] = {
    **{name: _searching(name) for name in _SEARCHING},
    **{name: _split(name) for name in ("split", "rsplit")},
    **{name: _padded(name) for name in ("center", "ljust", "rjust", "zfill")},
    "splitlines": _splitlines,
    "expandtabs": _expandtabs,
    "replace": _replace,
    "join": _join,
    "format": _format,
    "format_map": _format_map,
}

# ----------------------------------------------------------------------------------------------------------- attributes

_READABLE: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (dict, names("get items keys values copy")),
    ((list, tuple), names("count index copy grouper list")),  # the last two: what groupby gives
    (
        LoopContext,
        names("index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle changed"),
    ),
    (Macro, names("name arguments catch_kwargs catch_varargs caller")),
    (Cycler, names("current next reset")),
)


def may_read(obj: Any, name: str) -> bool:
    """Whether a template may have this attribute of an object other than a string."""
    if isinstance(obj, Namespace):
        return not name.startswith("_")
    return any(isinstance(obj, types) and name in names for types, names in _READABLE)


# -------------------------------------------------------------------------------------------------------------- globals


class _Namespace(Namespace):
    def __repr__(self) -> str:  # not what is in it, which may be itself
        return "<Namespace>"


def _raise_exception(message: Any) -> None:
    raise Refused(str(message)[:2000] if isinstance(message, str) else type(message).__name__)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200 or "%" in re.sub(r"%[-_^#0:]?[A-Za-z%]", "", pattern):  # C libraries take widths: %99999999d
        raise LimitExceeded("it formats the date in a way that is not allowed")
    return datetime.now().strftime(pattern)


def global_functions() -> dict[str, Any]:
    """What a template finds without being given it, as in `transformers`."""
    return {
        "range": safe_range,
        "dict": dict,
        "namespace": _Namespace,
        "cycler": Cycler,
        "joiner": Joiner,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }


@pass_context
def join_texts(context: Context, parts: Any) -> str:
    """The operator `~`."""
    sandbox: Any = context.environment
    budget: Budget = sandbox.budget
    for part in parts:
        budget.take(4 * len(part) if isinstance(part, str) else REPR_BYTES * budget.weigh(part))
    return markup_join(parts) if context.eval_ctx.autoescape else str_join(parts)
