"""Chat templates: what plain jinja2 makes of them, the built-in ones, where they come from, what messages may be."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
import pytest
import tiny_vocabulary
from in_threads import in_threads
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from references import llama_cpp_models

from edgelm.chat import BUILTIN, ChatTemplate
from edgelm.errors import FormatError, TemplateError, UsageError
from edgelm.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": " You are  helpful.\n"},
    {"role": "user", "content": "Hi <b> \u00e9 \U0001f642"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "How are you?"},
]


class Generation(Extension):
    """As in transformers: a marker that changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Any) -> Any:
        return caller()


def plain_jinja2() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates."""

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def template(source: str, **kwargs: str) -> ChatTemplate:
    return ChatTemplate(source, **({"bos_token": "<s>", "eos_token": "</s>", "origin": "test"} | kwargs))


# ------------------------------------------------------------------------------------------------------- real templates

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather\nin a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": 'Name "x" \u00e9', "enum": ["a", "b"]},
                "days": {"type": "integer", "description": "how many", "default": 3},
                "more": {
                    "type": "array",
                    "description": "options",
                    "items": {"type": "object", "properties": {"z": {"type": ["string", "null"], "description": "z"}}},
                },
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
ARGUMENTS = {"city": "Paris", "days": 2}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    HELLO,
    TALK,
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "end", "reasoning_content": "deep"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
            ],
        },
        {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"t": 20}'},
        {"role": "assistant", "content": "20 degrees"},
        {"role": "user", "content": "thanks"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)},
                }
            ],
        },
        {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "20"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [{"role": "developer", "content": "dev"}, {"role": "user", "content": "q"}],
    [{"role": "assistant", "content": "x"}],
    [],
]
VARIABLES: list[dict[str, Any]] = [
    {},
    {"tools": [TOOL]},
    {"add_generation_prompt": False},
    {"enable_thinking": False, "functions": "[]", "datetime": "now"},
    {"enable_thinking": True, "tools": [TOOL], "date_string": "1 Jan 2025"},
]


def outcomes(source: str) -> Callable[[list[dict[str, Any]], Mapping[str, Any]], tuple[str | None, str | None]]:
    """A function: messages and variables -> what plain jinja2 and what edgelm make of them; None where it refuses."""
    try:
        plain = plain_jinja2().from_string(source)
    except jinja2.exceptions.TemplateError:
        plain = None
    try:
        ours = template(source)
    except TemplateError:
        ours = None

    def render(messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> tuple[str | None, str | None]:
        expected = found = None
        given = {"add_generation_prompt": True, "tools": None, "documents": None} | variables
        with contextlib.suppress(Exception):
            expected = plain and plain.render(
                messages=copy.deepcopy(messages), bos_token="<s>", eos_token="</s>", **given
            )
        try:
            found = ours and ours.render(messages, **variables)
        except TemplateError as error:
            assert "was stopped" not in str(error)
        return expected, found

    return render


@pytest.mark.model
def test_templates_of_llama_cpp_give_what_plain_jinja2_gives() -> None:
    files = sorted((llama_cpp_models() / "templates").glob("*.jinja"))
    rendered = set()
    for file in files:
        render = outcomes(file.read_text(encoding="utf-8"))
        for messages in CONVERSATIONS:
            for variables in VARIABLES:
                expected, found = render(messages, variables)
                assert found == expected, (file.name, messages, variables)
                if expected is not None:
                    rendered.add(file.name)
    assert len(files) == len(rendered) == 70


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_templates_give_what_plain_jinja2_gives(name: str) -> None:
    for messages in CONVERSATIONS:
        expected, found = outcomes(BUILTIN[name])(messages, {})
        assert found == expected


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("llama2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nR<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "gemma",
            "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nR"
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "phi3",
            "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\n",
        ),
        ("zephyr", "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nR</s>\n<|assistant|>\n"),
        ("mistral", "<s> [INST] S\n\nQ [/INST] A</s> [INST] R [/INST]"),
    ],
)
def test_built_in_templates(name: str, prompt: str) -> None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, "SQAR", strict=True)]
    assert template(BUILTIN[name]).render(messages) == prompt


# One template on each line.
FEATURES = r"""
{% set x = 1 %}{% for m in messages %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}
{% set ns = namespace(a='') %}{% for m in messages %}{% set ns.a = ns.a ~ m.role ~ loop.index %}{% endfor %}{{ ns.a }}
{% set ns = namespace(a='') %}{% for m in messages %}{% set ns.a = ns.a + '-' + m.role %}{% endfor %}{{ ns['a'] }}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 + 1 %}{% endfor %}{{ ns.n }}
{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.l }}
{% set ns = namespace(s='a') %}{% set ns.s = ns.s ~ ns.s ~ 1 %}{% set ns.s = ns.s + ns.s %}{{ ns.s }}{{ ns.nope }}
{% macro m(a, b=2) %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ m(1) }}{{ m(1, 3, 4, k=5) }}
{% macro m() %}<{{ caller(1) }}>{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}
{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}{% endfor %}
{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{% endfor %}
{% for m in messages %}{{ loop.previtem is defined }}{{ (loop.nextitem or {}).role }}{% else %}none{% endfor %}
{% for m in messages %}{{ loop.changed(m.role) }}{{ loop.cycle('a', 'b') }}{% endfor %}
{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}
{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }}{% endfor %}
{% for x in [] %}{% else %}e{% endfor %}
{{ messages[1:][0].role }}{{ messages[::-1][0].role }}{{ 'abcdef'[1:-1:2] }}{{ messages[-1].role }}{{ (1, 2)[1:] }}
{% set x %}a{{ 1 }}{% endset %}{{ x }}{% set y | upper %}b{% endset %}{{ y }}{% filter upper %}abc{% endfilter %}
{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{% block a %}x{% endblock %}{{ self.a() }}
{% generation %}{{ messages[0].role }}{% set q = 1 %}{% endgeneration %}{{ q }}
{{ nope }}{{ nope is defined }}{{ messages[0].nope }}{{ nope | default('d') }}{{ messages[0].nope is defined }}
{% autoescape true %}{{ '<' }}{{ '<' ~ '>' }}{{ '<' | safe }}{{ ['<'] | join(',') }}{{ '<%s' % '>' }}{% endautoescape %}
{{ 'yes' if messages | selectattr('role', 'equalto', 'nobody') else 'no' }}
{% set x = messages | map(attribute='role') %}{{ x | list }}{{ x | list }}
{{ messages | rejectattr('x') | list | length }}
{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ 7 / 2 }}{{ -3 }}{{ 3.5 | round }}{{ '42' | int + 1 }}{{ 1 < 2 <= 2 }}
{{ 3 * 'ab' }}
{{ 'a,b'.split(',') }}{{ ' x '.strip() }}{{ 'abc'.replace('b', 'x', 1) }}{{ 'aXb'.lower().title() }}{{ 'a'.center(5) }}
{{ '7'.zfill(3) }}{{ 'a\nb'.splitlines() }}{{ ','.join(['a', 'b']) }}{{ 'a-b'.partition('-') }}
{{ 'a b'.rsplit(' ', 1) }}
{{ 'x'.startswith(('x', 'y')) }}{{ 'abc'.find('c') }}{{ 'aab'.count('a') }}{{ 'x'['upper']() }}
{{ 'a\tb'.expandtabs(4) }}
{{ '{} {a:>5} {b!r}'.format('x', a=1.5, b='y') }}{{ '{0[0].role}'.format(messages) }}{{ '{a}'.format_map({'a': 1}) }}
{{ '%s-%03d' % ('a', 7) }}{{ '%(a)s' % {'a': 1} }}{{ '%s' | format(3) }}{{ '%.2f%%' % 1.5 }}{{ '%*d' % (4, 1) }}
{{ [3, 1, 2] | sort }}{{ [1, 1, 2] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2, 3] | batch(2) | list }}
{{ [1, 2, 3] | slice(2) | list }}{{ messages | groupby('role') | length }}{{ [1, 2] | sum }}
{{ [[1], [2]] | sum(start=[]) }}
{% for role, found in messages | groupby('role') %}{{ role }}{{ found | length }}{% endfor %}{{ 'ab' | list }}
{{ 'a b' | wordcount }}{{ 'hello world' | truncate(7) }}{{ 'a\nb' | indent(2, true) }}{{ 'x' | center(4) }}
{{ [1, 2] | map('string') | join('-') }}{{ [1, 2] | join }}{{ messages | join(',', attribute='role') }}
{{ 'abc' | join('.') }}
{{ [3, 1] | min }}{{ [3, 1] | max }}{{ 'a&b' | urlencode }}{{ '<a>' | e }}{{ 'aB' | capitalize }}{{ 'ab' | reverse }}
{{ [1, none] | select | list }}{{ -1 | abs }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ {'a': 1} | items | list }}
{{ '1.5' | float }}{{ 2000 | filesizeformat }}{{ 'x' | attr('nope') }}{{ 'ff' | int(base=16) }}
{{ 2.567 | round(1, 'floor') }}
{{ 'xxaxx' | trim('x') }}{{ 'aaa' | replace('a', 'b', 2) }}{{ 'a' | upper | lower | string | safe | title | length }}
{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ [1.5, none, true, '<é>'] | tojson }}
{{ {'b': '<é>', 'a': {}} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}
{{ 1 is odd }}{{ 'a' is string }}{{ {} is mapping }}{{ [] is sequence }}{{ 4 is divisibleby(2) }}{{ 1 is in([1]) }}
{{ none is none }}{{ 'a' if false }}{{ 1 if true else 2 }}{{ (none or 'x') }}{{ not true }}{{ 'a' in 'abc' }}
{{ 2 not in [1] }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('|') %}{{ j() }}x{{ j() }}y
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ (1, 2) }}{{ {1: 2} }}
{% if false %}{{ 1 | nothing }}{% endif %}{{ dict(a=1).get('a') }}{{ range(3) | list }}{{ {'a': 1}['a'] }}{{ {}.a }}
""".strip().splitlines()
REFUSED = """
{{ nope.a.b }}
{{ messages | map(attribute='role') | length }}
{{ messages.append(1) }}
{{ messages[0].update({}) }}
{{ 1 | nothing }}
{{ 1 is nothing }}
{{ 'a' + 1 }}
{{ [1] | tojson(nope=1) }}
{{ '%d' % 'a' }}
{{ '{}'.format() }}
{{ messages | map('upper') | tojson }}
{% set messages.x = 1 %}
{{ raise_exception('no') }}
{% do 1 %}
{% for a in 1 %}{% endfor %}
""".strip().splitlines()


@pytest.mark.parametrize("source", FEATURES)
def test_the_language_is_jinja2s(source: str) -> None:
    expected, found = outcomes(source)(TALK, {})
    assert expected is not None
    assert found == expected


@pytest.mark.parametrize("source", REFUSED)
def test_what_jinja2_refuses_is_refused(source: str) -> None:
    assert outcomes(source)(TALK, {}) == (None, None)


def test_dates() -> None:
    for pattern in ("%d %b %Y", "%-d %B", "%Y-%m-%dT%H", "100%%", "%A"):
        expected, found = outcomes(f"{{{{ strftime_now('{pattern}') }}}}")(HELLO, {})
        assert found == expected != ""


def test_white_space_is_trimmed_as_in_transformers() -> None:
    expected, found = outcomes("  {% if true %}  \n  a\n  {% endif %}\n{{ 1 }}\n\n{#- x -#}  b\n")(TALK, {})
    assert found == expected == "  \n  a\n1b"


# ------------------------------------------------------------------------------------------------- where it comes from


def test_the_template_of_a_file() -> None:
    metadata = tiny_vocabulary.metadata("bpe", "llama-bpe", 480)
    kinds = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.token_type": kinds})
    found = ChatTemplate.from_gguf(metadata, tokenizer)
    assert found is not None
    assert found.origin == "file"
    assert found.source == tiny_vocabulary.CHATML
    assert found.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    with_tokens = ChatTemplate.from_gguf({"tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}"}, tokenizer)
    assert with_tokens is not None
    assert with_tokens.render(HELLO) == "<|begin_of_text|><|end_of_text|>"
    assert ChatTemplate.from_gguf({}, tokenizer) is None
    with pytest.raises(FormatError, match="chat_template"):
        ChatTemplate.from_gguf({"tokenizer.chat_template": 3}, tokenizer)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", r"\(from here\) is not usable \(line 1\): "),
        ("a\n{{ b", r"\(from here\) is not usable \(line 2\): "),
        ("a\nb {{ 1 / 0 }}", r"\(from here\) failed \(line 2\): division by zero"),
        ("{% set a = 1 %}\n\n{{ nope.b }}", r"\(from here\) failed \(line 3\): 'nope' is undefined"),
        ("{{ raise_exception('only\nuser') }}", r"\(from here\) refuses these messages: only user$"),
        ("{% include 'x' %}", r"cannot load other templates"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", r"\(from here\) failed \(line 1\): Range too big"),
    ],
)
def test_errors_say_which_template_where_and_why(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said) as error:
        template(source, origin="from here").render(HELLO)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, print, Generation])
def test_messages_are_plain_data(value: Any) -> None:
    with pytest.raises(UsageError, match="messages holds"):
        template("").render([{"role": "user", "content": value}])
    with pytest.raises(UsageError, match="other holds"):
        template("").render(HELLO, other=value)


def test_messages_nested_too_deeply_are_refused() -> None:
    value: Any = "x"
    for _ in range(1000):
        value = [value]
    with pytest.raises(UsageError, match="nested too deeply"):
        template("").render([{"role": "user", "content": value}])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="nested too deeply"):
        template("").render(HELLO, tools=loop)


def test_what_a_template_gets_is_not_what_the_caller_has() -> None:
    class Text(str):
        def strip(self, *args: Any) -> str:
            raise AssertionError("called by a template")

    assert template("{{ messages[0].content.strip() }}").render([{"content": Text(" x ")}]) == "x"


def test_long_conversations_are_rendered() -> None:
    messages = [
        {"role": "user" if i % 2 else "assistant", "content": f"{i} " + "lorem ipsum \u00e9 " * 100}
        for i in range(1500)
    ]
    for name in ("chatml", "gemma"):
        expected, found = outcomes(BUILTIN[name])(messages, {})
        assert found == expected
    # In one variable, as some templates do: quadratic for Python too.
    source = (
        "{% set ns = namespace(o='') %}{% for m in messages %}{% set ns.o = ns.o ~ m.role ~ m.content %}{% endfor %}"
        "{{ ns.o }}"
    )
    expected, found = outcomes(source)(messages, {})
    assert found == expected
    # Passed around and cut.
    source = (
        "{% macro f(x, i) %}{{ x[i:][0].role }}{% endmacro %}"
        "{% for m in messages %}{{ f(messages, loop.index0) }}{% endfor %}"
    )
    expected, found = outcomes(source)(messages, {})
    assert found == expected


def test_one_template_in_many_threads() -> None:
    shared = template(BUILTIN["chatml"])

    def work(number: int) -> None:
        messages = [{"role": "user", "content": f"the number {number}"}]
        for _ in range(50):
            assert f"the number {number}" in shared.render(messages)

    in_threads(work, 4)
