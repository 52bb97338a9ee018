"""Messages -> prompt, by the model's own chat template. Knows no model, and only the special tokens of a tokenizer.

Templates come with model files and may be hostile: `sandbox` runs them. No template is ever replaced by another; what
goes wrong is a `TemplateError` that names the template by its origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from .errors import FormatError, TemplateError, UsageError
from .tokenizer import Tokenizer

MAX_MESSAGE_DEPTH = 60

# For --chat-template, where a file has none or a wrong one: the formats that most models were trained on.
BUILTIN: dict[str, str] = {
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "llama2": """\
{% set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}
{% set ns.system = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' %}
{% elif message.role == 'user' %}
{{ bos_token + '[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' %}
{% else %}
{{ ' ' + message.content + ' ' + eos_token }}
{%- endif %}
{% endfor %}
""",
    "llama3": """\
{{ bos_token }}
{%- for message in messages %}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "gemma": """\
{{ bos_token }}
{%- set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}
{% set ns.system = message.content | trim + '\n\n' %}
{% else %}
{% set role = 'model' if message.role == 'assistant' else message.role %}
{{ '<start_of_turn>' + role + '\n' + ns.system + message.content | trim + '<end_of_turn>\n' }}
{%- set ns.system = '' %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<start_of_turn>model\n' }}
{%- endif %}
""",
    "phi3": """\
{% for message in messages %}
{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' }}
{%- endif %}
""",
    "zephyr": """\
{% for message in messages %}
{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' }}
{%- endif %}
""",
    "mistral": """\
{{ bos_token }}
{%- set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}
{% set ns.system = message.content + '\n\n' %}
{% elif message.role == 'user' %}
{{ ' [INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' %}
{% else %}
{{ ' ' + message.content + eos_token }}
{%- endif %}
{% endfor %}
""",
}


class ChatTemplate:
    """A chat template, compiled. May be used by several threads at once.

    Attributes:
        source: its text.
        origin: where it comes from ("file", "--chat-template chatml", ...), to be said wherever it is used.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str, origin: str) -> None:
        """Compile `source`.

        Raises:
            TemplateError: it is no template, or larger or more deeply nested than any that is needed.
        """
        from .sandbox import Sandbox

        self.source, self.origin = source, origin
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._code = Sandbox().compile(source)
        except Exception as error:  # whatever a hostile text can provoke in lexer, parser and compiler
            line = getattr(error, "lineno", None)
            raise TemplateError(
                f"the chat template ({origin}) is not usable{_at(line)}: {_reason(error)}; choose another "
                "one with --chat-template"
            ) from None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of the file, or None if it has none."""
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            return None
        if not isinstance(source, str):
            raise FormatError(f"tokenizer.chat_template is not a string but {type(source).__name__}")
        bos, eos = (
            "" if token is None else tokenizer.token_bytes(token).decode(errors="replace")
            for token in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(source, bos_token=bos, eos_token=eos, origin="file")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`, as `transformers` would make it.

        Args:
            messages: mappings with `role`, `content` and whatever else the template reads; plain data, as in JSON.
            add_generation_prompt: end where the assistant's answer begins.
            tools: descriptions of functions that the model may call, plain data.
            kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            TemplateError: the template failed, refused the messages, or took more than it is allowed to.
            UsageError: the messages are no plain data.
        """
        from .sandbox import Budget, Sandbox
        from .template_functions import LimitExceeded, Refused

        given = {"messages": messages, "tools": tools, "documents": None} | kwargs
        variables = {name: _plain(value, name) for name, value in given.items()}
        sandbox = Sandbox(Budget(variables))
        variables = self._tokens | variables | {"add_generation_prompt": bool(add_generation_prompt)}
        try:
            return sandbox.render(self._code, variables)
        except Refused as error:
            reason = f"refuses these messages: {_reason(error)}"
        except LimitExceeded as error:
            reason = f"was stopped{_at(_line(error.__traceback__))}: {_reason(error)}"
        except Exception as error:
            reason = f"failed{_at(_line(error.__traceback__))}: {_reason(error)}"
        raise TemplateError(f"the chat template ({self.origin}) {reason}")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain data, of Python's own types alone: what a template gets can neither change nor do anything."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if depth > MAX_MESSAGE_DEPTH:
        raise UsageError(f"{where} is nested too deeply for a chat template")
    if isinstance(value, Mapping):
        return {_plain(key, where, depth + 1): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise UsageError(f"{where} holds a {type(value).__name__}; a chat template takes only what JSON can hold")


def _reason(error: BaseException) -> str:
    """An error's text on one line of bounded length: it may hold anything that the template says."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:300] + "...") or type(error).__name__


def _at(line: int | None) -> str:
    return f" (line {line})" if line else ""


def _line(trace: TracebackType | None) -> int | None:
    """The line of the template where an error happened."""
    line = None
    while trace is not None:
        template = trace.tb_frame.f_globals.get("__jinja_template__")
        if template is not None:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line
