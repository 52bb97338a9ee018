"""Messages -> prompt, by the model's own chat template. Knows no model and no tokenizer beyond two texts.

Templates come with model files and are hostile until proven otherwise: they run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .errors import FormatError, TemplateError
from .tokenizer import Tokenizer

BUILTIN: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


class ChatTemplate:
    """A chat template, compiled.

    Attributes:
        origin: where it comes from ("file", "--chat-template chatml", ...): what is said whenever it is used or fails.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str, origin: str) -> None:
        from jinja2.exceptions import TemplateError as JinjaError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source, self.origin = source, origin
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now, bos_token=bos_token, eos_token=eos_token)
        try:
            self._template = environment.from_string(source)
        except JinjaError as error:
            raise TemplateError(f"the chat template ({origin}) is wrong: {error}") from None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of the file, or None if it has none."""
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            return None
        if not isinstance(source, str):
            raise FormatError(f"tokenizer.chat_template is not a string but {type(source).__name__}")
        return cls(
            source,
            bos_token=_text(tokenizer, tokenizer.bos_id),
            eos_token=_text(tokenizer, tokenizer.eos_id),
            origin="file",
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`.

        Raises:
            TemplateError: the template failed, refused the messages, or took more than it is allowed to.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs
            )
        except Exception as error:
            raise TemplateError(f"the chat template ({self.origin}) failed: {error}") from None


def _text(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.token_bytes(token).decode(errors="replace")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> str:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
