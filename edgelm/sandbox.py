"""Runs chat templates that may be hostile: jinja2's immutable sandbox, with everything counted. Knows no messages.

jinja2's own sandbox keeps a template away from Python's insides, but not from eating all memory or time. Here every way
in which a template can make something larger or do something again passes through a `Budget`:

    loops, macros, blocks      a first statement in each body, put there before the template is compiled
    + - * / // ** % ~          operators are calls of the environment; their cost is known before they are carried out
    calls, filters, methods    only those of `template_functions` and `template_filters`, which pay for results
    x[a:b], set x = ...        rewritten as filters that count
    {{ ... }}                  counted as it is written

Memory is counted when it is allocated and never given back, with one exception, for templates that build the prompt in
one variable: `set ns.out = ns.out ~ x` pays for x alone. In return any other use of a namespace's text is paid for.
Nothing is folded while compiling. There are no threads, no signals and no process: it works the same everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, cast

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import FilterArgumentError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_environment, pass_eval_context
from jinja2.visitor import NodeTransformer

from . import template_functions as functions
from .template_filters import filters

MAX_SOURCE_CHARS = 1 << 17  # the largest templates in use have 16 thousand
MAX_NODES = 8_000  # of the syntax tree; the largest in use have 1,300
MAX_DEPTH = 100  # of the syntax tree; in use: 29
MAX_CALL_DEPTH = 60
MAX_WORK = 4_000_000  # counted operations
MAX_CPU_S = 2.0  # of this thread; both grow with the messages, also with the square of their number
MAX_BYTES = 1 << 28  # of all texts and lists ever made, and 32 times the messages
MAX_WEIGHT = 4_000_000  # characters in one value, and four times the messages
MAX_ITEMS = 200_000  # in one value, and two for each character of the messages
MAX_NESTING = 100  # of one value
CLOCK_EVERY = 512  # units of work

# Filters that no template can write.
STEP, JOIN, SLICE, KEEP, STORE, PEEK, APPEND = "#step", "#join", "#slice", "#keep", "#store", "#peek", "#append"


class Budget:
    """What one rendering may still spend.

    `variables` is the plain data that it is given; the more of it, the more may be spent.
    """

    def __init__(self, variables: Any = None) -> None:
        self._given: dict[int, tuple[int, int]] = {}  # items and characters of each container in it, by id
        n_items, n_chars = self._survey(variables)
        input_weight = n_items + n_chars
        scale = input_weight / 1e6 + (n_items / 2000) ** 2
        self.work = int(MAX_WORK * (1 + scale))
        self.bytes = MAX_BYTES + 32 * input_weight
        self.max_weight = MAX_WEIGHT + 4 * input_weight
        self.max_items = MAX_ITEMS + 2 * input_weight
        self.deadline = time.thread_time() + MAX_CPU_S + scale
        self.depth = 0
        self._clock_at = self.work

    def step(self, n: int = 1) -> None:
        """Count `n` units of work, each of which may take up to a microsecond or so."""
        self.work -= n
        if self.work < 0:
            raise functions.LimitExceeded("it does not come to an end (too many steps)")
        if self.work < self._clock_at:
            self._clock_at = self.work - CLOCK_EVERY
            if time.thread_time() > self.deadline:
                raise functions.LimitExceeded("it takes too long")

    def take(self, n_bytes: int) -> None:
        """Count memory before it is allocated. What is given back is not counted back."""
        self.bytes -= n_bytes
        self.step(1 + (n_bytes >> 12))
        if self.bytes < 0:
            raise functions.LimitExceeded("it takes too much memory")

    def weigh(self, value: Any) -> int:
        """Characters and items in a value, shared parts as often as they appear: what printing it would cost."""
        if value is None or isinstance(value, bool | int | float):
            return 1
        n_items = n_chars = n_seen = 0
        levels: list[Iterator[Any]] = [iter((value,))]
        while levels:
            for item in levels[-1]:
                n_items += 1
                n_seen += 1
                if isinstance(item, str):
                    n_chars += len(item)
                elif (known := self._given.get(id(item))) is not None:
                    n_items += known[0]
                    n_chars += known[1]
                elif isinstance(item, Mapping):
                    levels.append(part for pair in item.items() for part in pair)
                    break
                elif isinstance(item, functions.SEQUENCES):
                    levels.append(iter(cast(Iterable[Any], item)))
                    break
                if n_items > self.max_items or n_chars > self.max_weight:
                    raise functions.LimitExceeded("it makes a value that is too large")
            else:
                levels.pop()
            if len(levels) > MAX_NESTING:
                raise functions.LimitExceeded("it nests values too deeply")
        self.step(n_seen)
        return n_items + n_chars

    def _survey(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str):
            return 0, len(value)
        if not isinstance(value, dict | list):
            return 0, 0
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        counts = [self._survey(part) for part in parts]
        self._given[id(value)] = found = len(parts) + sum(n for n, _ in counts), sum(n for _, n in counts)
        return found


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; means nothing here."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering (or, without a budget to speak of, of compiling)."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, budget: Budget | None = None) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], optimized=False, cache_size=0
        )
        self.budget = budget or Budget()
        self.filters = filters() | _COUNTING
        self.globals = functions.global_functions()
        self.finalize = _write

    # -- compiling

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateSyntaxError(f"it has {len(source)} characters; {MAX_SOURCE_CHARS} are allowed", 1)
        tree = super()._parse(source, name, filename)
        _check_tree(tree)
        _Rewriter().visit(tree)
        tree.set_environment(self)
        return tree

    # -- what templates may touch

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return functions.may_read(obj, attr)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.step()
        if isinstance(obj, str) and (method := functions.string_method(self, obj, attribute)) is not None:
            return method
        value = super().getattr(obj, attribute)
        if isinstance(obj, Namespace) and isinstance(value, str):
            self.budget.take(functions.size(value))
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.step()
        if isinstance(obj, str) and isinstance(argument, str):
            method = functions.string_method(self, obj, argument)
            return self.undefined(obj=obj, name=argument) if method is None else method
        if isinstance(obj, Namespace):
            return self.getattr(obj, str(argument))
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.step(4 + len(args) + len(kwargs))
        values = [*args, *(value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars"))]
        weight = sum(map(budget.weigh, values))
        if isinstance(__obj, type) and issubclass(__obj, Namespace):
            budget.take(4 * weight)
        if budget.depth >= MAX_CALL_DEPTH:
            raise functions.LimitExceeded("its macros call each other too deeply")
        budget.depth += 1
        try:
            result = super().call(__context, __obj, *args, **kwargs)
        finally:
            budget.depth -= 1
        budget.take(functions.size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        functions.check_operator(self.budget, operator, left, right)
        return self.binop_table[operator](left, right)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in _COUNTING:  # as in `map("#peek")`
            raise FilterArgumentError(f"no filter named {name!r}")
        return super().call_filter(name, *args, **kwargs)

    # -- rendering

    def render(self, code: CodeType, variables: Mapping[str, Any]) -> str:
        """The text that compiled `code` makes of `variables`, for which the budget was made."""
        template = Template.from_code(self, code, dict(self.globals))
        context = template.new_context(dict(variables))
        return "".join(template.root_render_func(context))


def _check_tree(tree: nodes.Template) -> None:
    """Refuses what would overflow the stack of a compiler, and what reaches for other templates."""
    level: list[nodes.Node] = [tree]
    count = depth = 0
    while level:
        depth += 1
        count += len(level)
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise TemplateSyntaxError("it is too large or nested too deeply", getattr(level[0], "lineno", 1) or 1)
        for node in level:
            if isinstance(node, nodes.Extends | nodes.Include | nodes.Import | nodes.FromImport):
                raise TemplateSyntaxError("a chat template cannot load other templates", node.lineno)
        level = [child for node in level for child in node.iter_child_nodes()]


class _Rewriter(NodeTransformer):
    """Puts calls of the counting filters into a syntax tree."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(JOIN, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends: tuple[nodes.Expr | None, ...] = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(SLICE, node.node, *(nodes.Const(None) if end is None else end for end in ends))

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        parts = _appended(node.target, node.node)
        if parts is not None:
            target = cast(nodes.NSRef, node.target)
            name = nodes.Name(target.name, "load", lineno=node.lineno)
            old = _filter(PEEK, name, nodes.Const(target.attr))
            new = [cast(nodes.Expr, self.visit(part)) for part in parts]
            whole = nodes.Tuple([old, *new], "load", lineno=node.lineno)
            node.node = _filter(APPEND, whole, nodes.Const(isinstance(node.node, nodes.Concat)))
        else:
            self.generic_visit(node)
            into_namespace = isinstance(node.target, nodes.NSRef) or node.target.find(nodes.NSRef) is not None
            node.node = _filter(STORE if into_namespace else KEEP, cast(nodes.Expr, node.node))
        return node

    def _body(self, node: Any) -> nodes.Node:
        """Each time the body is run costs a step, and the memory of the text that stands in it."""
        self.generic_visit(node)
        n_chars = sum(len(text.data) for part in node.body for text in _texts(part))
        step = nodes.ExprStmt(_filter(STEP, nodes.Const(n_chars)), lineno=node.lineno)
        node.body.insert(0, step)
        return cast(nodes.Node, node)

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _body


def _appended(target: nodes.Node, value: nodes.Node) -> list[nodes.Expr] | None:
    """What is added in `set ns.out = ns.out ~ a ~ b` or `set ns.out = ns.out + a + b`, else None."""
    parts: list[nodes.Expr] = []
    if isinstance(value, nodes.Concat):
        value, *parts = value.nodes
    else:
        while isinstance(value, nodes.Add):
            parts.insert(0, value.right)
            value = value.left
    same = (
        isinstance(target, nodes.NSRef)
        and isinstance(value, nodes.Getattr)
        and isinstance(value.node, nodes.Name)
        and (value.node.name, value.attr) == (target.name, target.attr)
    )
    return parts if same and parts else None


def _texts(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def _filter(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


@pass_environment
def _step(sandbox: Sandbox, n_chars: Any) -> None:
    sandbox.budget.take(4 * n_chars if isinstance(n_chars, int) and n_chars > 0 else 1)


@pass_environment
def _keep(sandbox: Sandbox, value: Any) -> Any:
    sandbox.budget.weigh(value)
    return value


@pass_environment
def _store(sandbox: Sandbox, value: Any) -> Any:
    sandbox.budget.take(4 * sandbox.budget.weigh(value))
    return value


@pass_environment
def _peek(sandbox: Sandbox, namespace: Any, name: Any) -> Any:
    """A text that is about to be replaced by a longer one; inside of macros many of them might be waiting for that."""
    value = ImmutableSandboxedEnvironment.getattr(sandbox, namespace, name)
    if sandbox.budget.depth:
        sandbox.budget.take(functions.size(value))
    return value


@pass_context
def _append(context: Context, parts: tuple[Any, ...], as_text: bool) -> Any:
    """The sum of a variable's old value and what is added to it: the old value is paid for already."""
    sandbox = cast(Sandbox, context.environment)
    old, *others = parts
    if type(old) is str and not context.eval_ctx.autoescape and (as_text or all(type(part) is str for part in others)):
        added = functions.join_texts(context, others)
        if len(old) + len(added) > sandbox.budget.max_weight:
            raise functions.LimitExceeded("it makes a value that is too large")
        sandbox.budget.take(4 * len(old) if old.isascii() and not added.isascii() else 1)
        sandbox.budget.step(len(old) >> 12)
        return old + added
    if as_text:
        return functions.join_texts(context, parts)
    for part in others:
        old = sandbox.call_binop(context, "+", old, part)
    sandbox.budget.weigh(old)
    return old


@pass_environment
def _slice(sandbox: Sandbox, value: Any, start: Any, stop: Any, step: Any) -> Any:
    if isinstance(value, str | list | tuple):
        sandbox.budget.take(len(range(*slice(start, stop, step).indices(len(value)))) * functions.item_bytes(value))
    return value[start:stop:step]


@pass_eval_context
def _write(context: nodes.EvalContext, value: Any) -> Any:
    """Runs on the value of each `{{ ... }}`, before it becomes text."""
    budget = cast(Sandbox, context.environment).budget
    if isinstance(value, str) and not context.autoescape:
        budget.take(functions.size(value))
    else:
        budget.take(functions.REPR_BYTES * budget.weigh(value))
    return value


_COUNTING = {STEP: _step, JOIN: functions.join_texts, SLICE: _slice, KEEP: _keep} | {
    STORE: _store,
    PEEK: _peek,
    APPEND: _append,
}
