"""Chat templates that attack, loop or explode: all are stopped, in bounded time and memory, with a TemplateError."""

from __future__ import annotations

import re
import sys
import time

import pytest
from in_threads import in_threads

from edgelm import sandbox
from edgelm.chat import ChatTemplate
from edgelm.errors import TemplateError

CPU_S = 0.4  # what templates get here; the limit in use has a test of its own
SLACK_S = 0.8  # for the one operation that is under way when time is up
MEMORY_BYTES = 600 << 20
MESSAGES = [{"role": "user", "content": "hello"}]


def render(source: str) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", origin="evil").render(MESSAGES)


def peak_bytes() -> int:
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(autouse=True)
def little_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_limits" not in request.fixturenames:
        monkeypatch.setattr(sandbox, "MAX_CPU_S", CPU_S)


@pytest.fixture
def real_limits() -> None:
    """Asks for the limits as they are."""


def stopped(source: str) -> str:
    """What is said of a template that must not get to its end."""
    start, memory = time.thread_time(), peak_bytes()
    with pytest.raises(TemplateError, match=r"\(evil\)") as error:
        render(source)
    assert time.thread_time() - start < CPU_S + SLACK_S
    assert peak_bytes() - memory < MEMORY_BYTES
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------- reaching outside

ATTACKS = """
{{ lipsum.__globals__['os'].popen('id').read() }}
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ ''['__class__'] }}
{{ ''|attr('__class__') }}
{{ ['']|map(attribute='__class__')|list }}
{{ ['']|map('attr', '__class__')|list }}
{{ '{0.__class__.__mro__}'.format('') }}
{{ '{a.__class__}'.format_map({'a': 1}) }}
{{ ('{0.__class__}'|attr('format'))('') }}
{{ ['{0.__class__}']|map('format', 1)|list }}
{{ '%(a)s'|format(a=range.__class__) }}
{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ m.__call__ }}
{{ cycler.__init__.__globals__ }}
{{ joiner().__init__ }}
{{ namespace.__init__.__globals__ }}
{{ namespace().__class__ }}
{% set ns = namespace() %}{{ ns._Namespace__attrs }}{{ ns['__class__'] }}
{{ self._TemplateReference__context }}{{ self.__class__ }}
{% for x in [1] %}{{ loop.__class__ }}{{ loop._iterable }}{{ loop._recurse }}{% endfor %}
{{ nope.__class__ }}{{ nope._undefined_exception }}
{{ messages.__class__ }}{{ messages[0].__class__ }}{{ messages.__len__ }}{{ messages[0]['__class__'] }}
{{ [1]|sort(attribute='__class__')|first|attr('__class__') }}
{{ [1]|groupby('__class__') }}
{{ (messages|map('upper')).gi_frame }}{{ (messages|selectattr('role')).__iter__ }}
{{ dict.mro() }}{{ dict.fromkeys('ab') }}{{ dict.__subclasses__() }}
{{ range.__class__ }}{{ raise_exception.__globals__ }}{{ strftime_now.__code__ }}
{{ environment }}{{ context }}{{ caller }}{{ _step }}
{{ messages[0]['clear']() }}
{{ messages.append(1) }}
{{ 'a'.encode() }}{{ 'a'.translate({97: 98}) }}{{ 'a'.maketrans('a', 'b') }}
{% include 'x' %}
{% import 'x' as y %}
{% from 'x' import y %}
{% extends 'x' %}
{{ [1]|map('#step', -99999999)|list }}
{{ [namespace(s='a')]|map('#peek', 's')|list }}
{{ messages|pprint }}{{ 'a'|random }}{{ '<a>'|striptags }}{{ 'a'|urlize }}
""".strip().splitlines()


@pytest.mark.parametrize("source", ATTACKS)
def test_nothing_of_python_is_reached(source: str) -> None:
    try:
        text = render(source)
    except TemplateError:
        return
    # What may not be read prints as nothing, as everything undefined does.
    assert re.fullmatch(r"(Undefined|[\[\](), 1'\"a])*", text), text


# ------------------------------------------------------------------------------------------------------- growing, time


def grow(expression: str, start: str = "'aaaaaaaaaaaaaaaa'", times: int = 60) -> str:
    """ns.s becomes `expression` again and again."""
    return (
        f"{{% set ns = namespace(s={start}) %}}{{% for i in range({times}) %}}"
        f"{{% set ns.s = {expression} %}}{{% endfor %}}{{{{ ns.s }}}}"
    )


def hoard(start: str, expression: str, before: str = "") -> str:
    """ns.k keeps the value of `expression` each time."""
    return (
        f"{{% set ns = namespace(s={start}, k=[]) %}}{{% for i in range(9999) %}}{before}"
        f"{{% set ns.k = ns.k + [{expression}] %}}{{% endfor %}}"
    )


def repeat(expression: str, times: int = 99999) -> str:
    return f"{{% for i in range({times}) %}}{{{{ {expression} }}}}{{% endfor %}}"


APPEND = "{% set ns.s = ns.s ~ 'b' %}"
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
EXPLOSIONS = {
    "range": repeat("i", 10**9),
    "loops": LOOP * 3 + END * 3,
    "loops that filter": LOOP + "{% for j in range(99999) if false %}" + END * 2,
    "sums": repeat("range(99999)|sum"),
    "lists": repeat("range(99999)|list|length"),
    "sorts": repeat("range(99999)|sort|first"),
    "uniques": repeat("range(99999)|unique|list|length"),
    "cyclers": repeat("cycler(*range(99999)).next()"),
    "product": "{{ 'a' * 10 ** 10 }}",
    "product, turned": "{{ 10 ** 10 * 'a' }}",
    "product of constants": "{% set x = 'aaaaaaaaaaaaaaaa' * 999999999999 %}",
    "product of lists": "{{ ([0] * 10 ** 10)|length }}",
    "product of long items": "{% set s = 'a' * 1000000 %}{{ [s ~ 'b'] * 100000 == [s ~ 'b'] * 100000 }}",
    "search among long items": "{% set s = 'a' * 1000000 %}{{ (s ~ 'b') in [s ~ 'c'] * 100000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power, negative": "{{ (-9) ** (9 ** 9) }}",
    "squares": grow("ns.s * ns.s", "9", 99),
    "sum of texts": grow("ns.s + ns.s"),
    "sum of three": grow("ns.s + ns.s + ns.s"),
    "sum of lists": grow("ns.s + ns.s", "[1]"),
    "concatenation": grow("ns.s ~ ns.s"),
    "other way round": grow("'' ~ ns.s ~ ns.s"),
    "join": grow("[ns.s, ns.s]|join(ns.s)"),
    "method join": grow("ns.s.join([ns.s, ns.s, ns.s])"),
    "replace": grow("ns.s|replace('a', ns.s)"),
    "method replace": grow("ns.s.replace('a', ns.s)"),
    "format": grow("'{0}{0}'.format(ns.s)"),
    "percent": grow("'%s%s' % (ns.s, ns.s)"),
    "filter format": grow("'%s%s'|format(ns.s, ns.s)"),
    "JSON of JSON": grow("ns.s|tojson|tojson ~ ns.s"),
    "list of lists": grow("[ns.s, ns.s]"),
    "tuple of tuples": grow("(ns.s, ns.s)"),
    "dict of dicts": grow("{'a': ns.s, 'b': ns.s}"),
    "deep list": grow("[ns.s]", times=99999),
    "deep tuple": grow("(ns.s,)", times=99999),
    "deep batch": grow("[ns.s]|batch(1)|list", times=99999),
    "hash of a deep tuple": grow("(ns.s,)", times=99999) + "{{ {ns.s: 1} }}",
    "set block": grow("x").replace("{% set ns.s", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s"),
    "filter block": grow("x").replace(
        "{% set ns.s", "{% set x %}{% filter replace('a', ns.s) %}aaaa{% endfilter %}{% endset %}{% set ns.s"
    ),
    "macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + grow("m(ns.s)"),
    "macro with lists": "{% macro m(x, n) %}{{ m([x, x], n - 1) if n else x }}{% endmacro %}{{ m(1, 50) }}",
    "macro with rest": "{% macro m() %}{% set ns.s = (varargs, varargs) %}{% endmacro %}"
    "{% set ns = namespace(s=1) %}" + LOOP + "{{ m(ns.s, ns.s) }}" + END,
    "autoescape": "{% autoescape true %}" + repeat("'<' * 100000000") + "{% endautoescape %}",
    "output": repeat("'a' * 1000000"),
    "output of text": LOOP * 2 + "x" * 1000 + END * 2,
    "output in a block": "{% set x %}" + LOOP + "x" * 100000 + END + "{% endset %}",
    "output of macros": "{% macro m() %}" + "x" * 100000 + "{% endmacro %}" + hoard("1", "m()"),
    "hoard of lists": hoard("1", "range(99999)|list"),
    "hoard of ends": hoard("'a' * 3000000", "ns.s[i:]"),
    "hoard of list ends": hoard("[1] * 100000", "ns.s[i:]"),
    "hoard of variables": hoard("'a' * 3000000", "ns.s", APPEND),
    "hoard of items": hoard("'a' * 3000000", "ns['s']", APPEND),
    "hoard of attributes": hoard("'a' * 3000000", "ns|attr('s')", APPEND),
    "hoard by map": hoard("'a' * 3000000", "[ns]|map(attribute='s')|list", APPEND),
    "hoard of namespaces": hoard("'a' * 3000000", "b", "{% set b = namespace(s=ns.s) %}{% set b.s = b.s ~ 'b' %}"),
    "hoard of more namespaces": hoard(
        "'a' * 3000000", "b", "{% set b = namespace({'s': ns.s}) %}{% set b.s = b.s + 'b' %}"
    ),
    "hoard of names": "{% set ns = namespace(s='a' * 3000000) %}"
    + "".join(f"{APPEND}{{% set v{i} = ns.s %}}" for i in range(600)),
    "hoard in a tuple": "{% macro m() %}" + APPEND + "{% endmacro %}{% set ns = namespace(s='a' * 3000000) %}"
    "{{ (" + "ns.s, m(), " * 900 + ")|length }}",
    "hoard on the stack": "{% set ns = namespace(s='a' * 3000000) %}{% macro m(n) %}{% if n %}"
    + APPEND
    + "{% set ns.s = ns.s ~ m(n - 1) %}{% endif %}{% endmacro %}{{ m(55) }}",
    "refund": repeat("[{'s': 'a' * 1000000}]|map('#peek', 's')|list|length"),
    "refill": repeat("[-99999999999]|map('#step')|list"),
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion, branching": "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive loop, branching": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 50 }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "recursive caller": "{% macro m() %}{{ caller() }}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}"
    "{% call m() %}x{% endcall %}",
    "center": "{{ 'a'.center(10 ** 10) }}",
    "filter center": "{{ 'a'|center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10) }}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "percent width": "{{ '%9999999999d' % 1 }}",
    "percent smaller width": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 9, 1) }}",
    "percent precision": "{{ '%.999999999f' % 1.0 }}",
    "filter width": "{{ '%999999999d'|format(1) }}",
    "format width": "{{ '{:9999999999}'.format(1) }}",
    "format alignment": "{{ '{:>999999999}'.format('a') }}",
    "format nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "format precision": "{{ '{:.999999999f}'.format(1.0) }}",
    "format repeated": "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "percent repeated": "{{ ('%(a)s' * 100000) % {'a': 'a' * 1000000} }}",
    "indent": "{{ 'a\\nb'|indent(10 ** 10) }}",
    "indent of many lines": "{{ ('\\n' * 100000)|indent(100000, blank=true) }}",
    "indent of odd lines": "{{ ('a\\x0b' * 1000000)|indent(100000) }}",
    "indent by text": "{{ ('a\\n' * 100000)|indent('a' * 100000) }}",
    "wordwrap": "{{ ('a ' * 100000)|wordwrap(1) }}",
    "batch": "{{ [1]|batch(10 ** 10, 0)|list }}",
    "slice": "{{ [1]|slice(10 ** 10)|list|length }}",
    "round": "{{ 5|round(-10 ** 10) }}",
    "round up": "{{ 5|round(10 ** 9, 'ceil') }}",
    "int": "{{ ('9' * 1000000)|int }}",
    "int of a base": "{{ ('f' * 10000000)|int(0, 16) }}",
    "JSON indent": "{{ messages|tojson(indent=10 ** 9) }}",
    "JSON separators": "{{ (range(1000)|list)|tojson(separators=('a' * 1000000, 'b')) }}",
    "JSON escapes": repeat("('\\U000e0001' * 1000000)|tojson(ensure_ascii=true)|length"),
    "representation": repeat("['\\U000e0001' * 1000000]|string|length"),
    "urlencode": repeat("('\\U000e0001' * 1000000)|urlencode|length"),
    "title": repeat("('a ' * 1000000)|title|length"),
    "wide join": "{{ range(99999)|join('a' * 1000000) }}",
    "wide method join": "{{ ('a' * 1000000).join([''] * 100000) }}",
    "map to long defaults": "{{ ([nope] * 100000)|map('default', 'a' * 1000000)|join }}",
    "sum of many lists": "{{ ([[1]] * 90000)|sum(start=[])|length }}",
    "sum of many texts": "{{ (['a' * 1000] * 90000)|sum(start='')|length }}",
    "date": "{{ strftime_now('%999999999d') }}",
    "date, padded": "{{ strftime_now('%_9999999d') }}",
    "dates": "{{ strftime_now('%Y' * 10000000) }}",
    "search from the right": "{{ ('a' * 3000000).rfind('b' + 'a' * 1500000) }}",
    "split from the right": "{{ ('a' * 3000000).rsplit('b' + 'a' * 1500000) }}",
    "strip": "{{ ('a' * 1000000).strip('b' * 1000000 ~ 'a') }}",
    "trim": "{{ ('a' * 1000000)|trim('b' * 1000000 ~ 'a') }}",
    "split": "{{ ('a ' * 30000000).split() }}",
    "splitlines": "{{ ('\\n' * 60000000).splitlines()|length }}",
    "characters": "{{ ('\\u1234' * 60000000)|list|length }}",
    "words": "{{ ('a ' * 30000000)|wordcount }}",
    "graph of namespaces": "{% set a = namespace() %}{% set ns = namespace(c=a) %}{% for i in range(60) %}"
    "{% set b = namespace() %}{% set c = ns.c %}{% set c.x = [b, b] %}{% set ns.c = b %}{% endfor %}{{ a.x|tojson }}",
    "long message": "{{ raise_exception('a' * 10000000) }}",
    "long key": "{{ {}['" + "a" * 1000 + "'].b }}",
}


@pytest.mark.parametrize("name", EXPLOSIONS)
def test_explosions_are_stopped(name: str) -> None:
    stopped(EXPLOSIONS[name])


def test_namespaces_that_hold_themselves_can_be_printed() -> None:
    assert render("{% set a = namespace() %}{% set a.b = [a] %}{{ a }}{{ a.b }}") == "<Namespace>[<Namespace>]"


@pytest.mark.usefixtures("real_limits")
def test_the_limits_in_use() -> None:
    for source in (EXPLOSIONS["loops that filter"], EXPLOSIONS["recursion, branching"], EXPLOSIONS["sorts"]):
        start = time.thread_time()
        with pytest.raises(TemplateError, match="takes too long"):
            render(source)
        assert 1.5 < time.thread_time() - start < 3


def test_other_threads_are_stopped_too() -> None:
    def work(_: int) -> None:
        with pytest.raises(TemplateError):
            render(EXPLOSIONS["loops"])

    in_threads(work, 3)


# ------------------------------------------------------------------------------------------------------------ compiling

SOURCES = {
    "parentheses": "{{ " + "(" * 60000 + "1" + ")" * 60000 + " }}",
    "open parentheses": "{{ " + "(" * 100000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "not": "{{ " + "not " * 20000 + "1 }}",
    "minus": "{{ " + "-" * 100000 + "1 }}",
    "dots": "{{ a" + ".a" * 60000 + " }}",
    "calls": "{{ a" + "()" * 60000 + " }}",
    "filters": "{{ a" + "|e" * 60000 + " }}",
    "tests": "{{ a" + " is a" * 20000 + " }}",
    "sums": "{{ 1" + "+1" * 60000 + " }}",
    "concatenations": "{{ a" + "~a" * 60000 + " }}",
    "comparisons": "{{ a" + "<a" * 60000 + " }}",
    "and": "{{ a" + " and a" * 20000 + " }}",
    "conditions": "{{ " + "a if a else " * 9000 + "a }}",
    "keywords": "{{ a(" + "a=1," * 30000 + ") }}",
    "ifs": "{% if a %}" * 6000 + "{% endif %}" * 6000,
    "elifs": "{% if a %}" + "{% elif a %}" * 10000 + "{% endif %}",
    "fors": "{% for a in a %}" * 50 + "{% endfor %}" * 50,
    "outputs": "{{a}}" * 26000,
    "sets": "{% set a = 1 %}" * 8000,
    "too long": "a" * (1 << 24),
    "braces": "{{" * 65000,
    "tags": "{%" * 65000,
    "comments": "{#" * 65000,
    "quotes": "{{ '" * 43000,
    "number": "{{ " + "9" * 100000 + " }}",
    "hexadecimal": "{{ 0x" + "f" * 100000 + " }}",
    "spaces": " \t" * 65000 + "{% if a %}",
    "lines": "\n" * 130000 + "{{ a }",
    "raw": "{% raw %}" * 14000,
}


@pytest.mark.parametrize("name", SOURCES)
def test_templates_that_are_too_much_for_a_compiler(name: str) -> None:
    start, memory = time.thread_time(), peak_bytes()
    with pytest.raises(TemplateError, match=r"\(evil\)"):
        render(SOURCES[name])
    assert time.thread_time() - start < 2
    assert peak_bytes() - memory < MEMORY_BYTES


@pytest.mark.parametrize("source", ["\0{{ 1 }}", "\udc80{{ 1 }}", "", "\ufeff{{ 1 }}", "{{ '\\u0041' }}" * 1000])
def test_odd_templates_work(source: str) -> None:
    assert render(source) == source.replace("{{ 1 }}", "1").replace("{{ '\\u0041' }}", "A")
