"""The filters of chat templates: jinja2's own, each paying for what it makes before or as it makes it.

Left out, because prompts have no use for them and their cost no cheap bound: `pprint`, `random`, `striptags`, `urlize`,
`wordwrap`, `xmlattr`. Knows no messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, wraps
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from jinja2 import filters as stock
from jinja2.utils import _PassArg, pass_context, pass_environment
from markupsafe import soft_str

from .template_functions import (
    MAX_BITS,
    REPR_BYTES,
    LimitExceeded,
    check_percent,
    check_replace,
    check_search,
    drawn,
    names,
    size,
)

if TYPE_CHECKING:
    from jinja2.runtime import Context

    from .sandbox import Budget, Sandbox

MAX_INDENT = 64

# Stock filters by what one character or item of their value may cost, in bytes, before there is a result to measure.
_STOCK: dict[int, frozenset[str]] = {
    0: names("abs attr capitalize count d default first items last length lower reverse safe string upper"),
    8: names("e escape forceescape"),
    REPR_BYTES: names("filesizeformat float urlencode"),
    64: names(
        "dictsort groupby list map max min reject rejectattr select selectattr sort title truncate unique wordcount"
    ),
}
_OF_TEXT = names(
    "capitalize e escape filesizeformat float forceescape lower safe string title truncate upper urlencode wordcount"
)


def _counted(name: str, cost: int) -> Callable[..., Any]:
    """A stock filter that pays for its value, its items and its result."""
    function = stock.FILTERS[name]
    wants = _PassArg.from_obj(function)
    of_text = name in _OF_TEXT

    @wraps(function, updated=())
    def counted(context: Context, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        sandbox: Any = context.environment
        budget: Budget = sandbox.budget
        if of_text and not isinstance(value, str):
            budget.take(REPR_BYTES * budget.weigh(value))  # it becomes text
        elif isinstance(value, str | list | tuple | dict | range):
            budget.take(cost * len(value))
        budget.step()
        for arg in (*args, *kwargs.values()):
            budget.weigh(arg)
        lead = {_PassArg.context: (context,), _PassArg.eval_context: (context.eval_ctx,), None: ()}.get(
            wants, (sandbox,)
        )
        result = function(*lead, value, *args, **kwargs)
        if isinstance(result, GeneratorType):  # drawn at once; the iterator is used up when read, like the generator
            return iter(drawn(budget, result))
        if result is not value:
            budget.take(size(result))
        return result

    return pass_context(counted)


@pass_environment
def _filter_batch(sandbox: Sandbox, value: Any, linecount: int, fill_with: Any = None) -> Any:
    sandbox.budget.take(16 * max(linecount, 0) + 64 * sandbox.budget.weigh(value))
    return iter(drawn(sandbox.budget, stock.do_batch(value, linecount, fill_with)))


@pass_environment
def _filter_center(sandbox: Sandbox, value: str, width: int = 80) -> str:
    sandbox.budget.take(4 * (max(width, 0) + sandbox.budget.weigh(value)))
    return stock.do_center(value, width)


@pass_environment
def _filter_format(sandbox: Sandbox, value: str, *args: Any, **kwargs: Any) -> str:
    sandbox.budget.weigh(value)
    check_percent(sandbox.budget, soft_str(value), kwargs or args)
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
    parts = drawn(budget, value)
    n_bytes = len(parts) * (len(d) if isinstance(d, str) else budget.weigh(d)) + budget.weigh(parts)
    budget.take(REPR_BYTES * n_bytes)
    return stock.sync_do_join(context.eval_ctx, parts, d, attribute)


@pass_context
def _filter_replace(context: Context, s: str, old: str, new: str, count: int | None = None) -> str:
    sandbox: Any = context.environment
    for value in (s, old, new):
        sandbox.budget.weigh(value)
    check_replace(sandbox.budget, str(s), str(old), str(new))
    return stock.do_replace(context.eval_ctx, s, old, new, count)


@pass_environment
def _filter_round(sandbox: Sandbox, value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 300:
        raise LimitExceeded("it rounds to too many digits")
    return stock.do_round(value, precision, method)


@pass_environment
def _filter_slice(sandbox: Sandbox, value: Any, slices: int, fill_with: Any = None) -> Any:
    sandbox.budget.take(64 * (max(slices, 0) + sandbox.budget.weigh(value)))
    return iter(drawn(sandbox.budget, stock.sync_do_slice(value, slices, fill_with)))


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
    if not isinstance(value, str):
        sandbox.budget.take(REPR_BYTES * sandbox.budget.weigh(value))
    check_search(sandbox.budget, str(value), chars)
    result = stock.do_trim(value, chars)
    sandbox.budget.take(size(result))
    return result


@cache
def filters() -> dict[str, Callable[..., Any]]:
    """Every filter that templates may use."""
    own = {
        name.removeprefix("_filter_"): function for name, function in globals().items() if name.startswith("_filter_")
    }
    return {name: _counted(name, cost) for cost, names in _STOCK.items() for name in names} | own
