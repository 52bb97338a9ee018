"""What a chat template may call: filters, string methods, global functions, each with its cost known beforehand.

Results are those of jinja2 and Python; what is missing has no use in a prompt and no cheap bound (`pprint`, `urlize`,
`wordwrap`, `striptags`, `xmlattr`, `random`, `str.encode`, `str.translate`). Knows no messages.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import cache, partial, wraps
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from jinja2 import filters as stock
from jinja2.runtime import LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, _PassArg, pass_context, pass_environment
from markupsafe import Markup, soft_str

if TYPE_CHECKING:
    from jinja2.runtime import Context

    from .sandbox import Budget, Sandbox

SEQUENCES: tuple[type, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
REPR_BYTES = 12  # of one character in the representation of a container or in JSON, at most
MAX_BITS = 1 << 14  # of an integer
MAX_INDENT = 64
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
        _check_percent(budget, left, right)


def _check_percent(budget: Budget, pattern: str, values: Any) -> None:
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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CHEAP = _names(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper lower partition removeprefix removesuffix startswith swapcase title "
    "upper"
)
_SEARCHING = _names("lstrip rfind rindex rpartition rstrip strip")


def string_method(sandbox: Sandbox, text: str, name: str) -> Callable[..., Any] | None:
    """The method `name` of a string, bounded; None if templates may not have it."""
    special = _METHODS.get(name)
    if special is not None:
        return partial(special, sandbox, text)
    return getattr(text, name) if name in _CHEAP else None


def _searching(name: str) -> Callable[..., Any]:
    def method(sandbox: Sandbox, text: str, *args: Any) -> Any:
        _check_search(sandbox.budget, text, *args)
        return getattr(text, name)(*args)

    return method


def _check_search(budget: Budget, text: str, *args: Any) -> None:
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
            _check_search(sandbox.budget, text, separator)
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


def _check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.take(4 * (len(text) + text.count(old) * len(new)))


def _replace(sandbox: Sandbox, text: str, old: str, new: str, count: int = -1) -> str:
    _check_replace(sandbox.budget, text, old, new)
    return text.replace(old, new, count)


def _join(sandbox: Sandbox, text: str, items: Iterable[str]) -> str:
    parts = _drawn(sandbox.budget, items)
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
    (dict, _names("get items keys values copy")),
    ((list, tuple), _names("count index copy grouper list")),  # the last two: what groupby gives
    (
        LoopContext,
        _names("index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle changed"),
    ),
    (Macro, _names("name arguments catch_kwargs catch_varargs caller")),
    (Cycler, _names("current next reset")),
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
    if len(pattern) > 200 or re.search(r"%[^a-zA-Z%]?[^a-zA-Z%]", pattern):  # C libraries take widths: %999999999d
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


# -------------------------------------------------------------------------------------------------------------- filters

_PLAIN = _names(
    "abs attr capitalize count d default dictsort e escape filesizeformat first float forceescape groupby items last "
    "length list lower map max min reject rejectattr reverse safe select selectattr sort string title truncate unique "
    "upper urlencode wordcount"
)


def _drawn(budget: Budget, items: Iterable[Any]) -> list[Any]:
    """The items as a list, each of them counted."""
    drawn = []
    for item in items:
        budget.take(64)
        drawn.append(item)
    return drawn


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A stock filter that pays for its arguments, its items and its result."""
    wants = _PassArg.from_obj(function)

    @wraps(function, updated=())
    def counted(context: Context, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        sandbox: Any = context.environment
        budget: Budget = sandbox.budget
        weight = sum(map(budget.weigh, (value, *args, *kwargs.values())))
        # The most that one character can cost: as a string of its own in a list, or escaped.
        budget.take((64 if isinstance(value, str) and function in _LISTING else REPR_BYTES) * weight)
        lead = {_PassArg.context: (context,), _PassArg.eval_context: (context.eval_ctx,), None: ()}.get(
            wants, (sandbox,)
        )
        result = function(*lead, value, *args, **kwargs)
        if isinstance(result, GeneratorType):  # drawn at once; the iterator is used up when read, like the generator
            return iter(_drawn(budget, result))
        budget.take(size(result))
        return result

    return pass_context(counted)


_LISTING = frozenset(
    stock.FILTERS[name]
    for name in _names("list sort unique map select reject selectattr rejectattr groupby wordcount title truncate")
)


@pass_environment
def _filter_batch(sandbox: Sandbox, value: Any, linecount: int, fill_with: Any = None) -> Any:
    sandbox.budget.take(16 * max(linecount, 0) + 64 * sandbox.budget.weigh(value))
    return iter(_drawn(sandbox.budget, stock.do_batch(value, linecount, fill_with)))


@pass_environment
def _filter_center(sandbox: Sandbox, value: str, width: int = 80) -> str:
    sandbox.budget.take(4 * (max(width, 0) + sandbox.budget.weigh(value)))
    return stock.do_center(value, width)


@pass_environment
def _filter_format(sandbox: Sandbox, value: str, *args: Any, **kwargs: Any) -> str:
    sandbox.budget.weigh(value)
    _check_percent(sandbox.budget, soft_str(value), kwargs or args)
    return stock.do_format(value, *args, **kwargs)


@pass_environment
def _filter_indent(sandbox: Sandbox, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    n_lines = len(s) + 1 if isinstance(s, str) and not s.isascii() else str(s).count("\n") + str(s).count("\r") + 8
    n_lines += sum(str(s).count(char) for char in "\v\f\x1c\x1d\x1e") if isinstance(s, str) else 0
    sandbox.budget.take(4 * n_lines * (len(width) if isinstance(width, str) else max(width, 0)) + 8 * len(s))
    return stock.do_indent(s, width, first, blank)


@pass_environment
def _filter_int(sandbox: Sandbox, value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str) and len(value) > MAX_BITS // 6:
        raise LimitExceeded("it reads a number that is too long")
    sandbox.budget.step()
    return stock.do_int(value, default, base)


@pass_context
def _filter_join(context: Context, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    sandbox: Any = context.environment
    budget: Budget = sandbox.budget
    parts = _drawn(budget, value)
    n_bytes = len(parts) * (len(d) if isinstance(d, str) else budget.weigh(d)) + budget.weigh(parts)
    budget.take(REPR_BYTES * n_bytes)
    return stock.sync_do_join(context.eval_ctx, parts, d, attribute)


@pass_context
def _filter_replace(context: Context, s: str, old: str, new: str, count: int | None = None) -> str:
    sandbox: Any = context.environment
    for value in (s, old, new):
        sandbox.budget.weigh(value)
    _check_replace(sandbox.budget, str(s), str(old), str(new))
    return stock.do_replace(context.eval_ctx, s, old, new, count)


@pass_environment
def _filter_round(sandbox: Sandbox, value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 300:
        raise LimitExceeded("it rounds to too many digits")
    return stock.do_round(value, precision, method)


@pass_environment
def _filter_slice(sandbox: Sandbox, value: Any, slices: int, fill_with: Any = None) -> Any:
    sandbox.budget.take(64 * (max(slices, 0) + sandbox.budget.weigh(value)))
    return iter(_drawn(sandbox.budget, stock.sync_do_slice(value, slices, fill_with)))


@pass_context
def _filter_sum(context: Context, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    sandbox: Any = context.environment
    if attribute is not None:
        iterable = map(stock.make_attrgetter(sandbox, attribute), iterable)
    total = start
    for item in iterable:
        total = sandbox.call_binop(context, "+", total, item)
    return total


@pass_environment
def _filter_tojson(
    sandbox: Sandbox,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it: without the escapes for HTML that jinja2 would put in."""
    width = indent if isinstance(indent, int) else len(indent or "")
    widths = [width, *map(len, separators or ())]
    if max(widths) > MAX_INDENT:
        raise LimitExceeded("it indents JSON too far")
    sandbox.budget.take((REPR_BYTES + sum(max(w, 0) for w in widths)) * sandbox.budget.weigh(value))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _filter_trim(sandbox: Sandbox, value: str, chars: str | None = None) -> str:
    sandbox.budget.take(REPR_BYTES * sandbox.budget.weigh(value))
    _check_search(sandbox.budget, str(value), chars)
    return stock.do_trim(value, chars)


@cache
def filters() -> dict[str, Callable[..., Any]]:
    """Every filter that templates may use."""
    own = {
        name.removeprefix("_filter_"): function for name, function in globals().items() if name.startswith("_filter_")
    }
    return {name: _counted(stock.FILTERS[name]) for name in _PLAIN} | own


@pass_context
def join_texts(context: Context, parts: Any) -> str:
    """The operator `~`."""
    sandbox: Any = context.environment
    budget: Budget = sandbox.budget
    for part in parts:
        budget.take(4 * len(part) if isinstance(part, str) else REPR_BYTES * budget.weigh(part))
    return markup_join(parts) if context.eval_ctx.autoescape else str_join(parts)
