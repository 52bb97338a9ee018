"""How a tokenizer.json cuts text -> the name that GGUF has for it (`tokenizer.ggml.pre`).

Definitions are compared, regular expression by regular expression, with the table `edgelm.pretokenizers`; nothing is
guessed from what a tokenizer gives for some text. A definition that the table does not have is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgelm.errors import UnsupportedError
from edgelm.pretokenizers import PRE_TOKENIZERS

# Of the names that mean the same, the one to write.
_PREFERRED = ("gpt-2", "llama-bpe", "qwen2", "smollm", "gpt-4o", "deepseek-v3")
_GPT2 = PRE_TOKENIZERS["gpt-2"].splits[0]


def name_of(tokenizer: Mapping[str, Any]) -> str:
    """The name for a parsed tokenizer.json of byte-level byte pairs. UnsupportedError when there is none."""
    splits = tuple(_splits(tokenizer.get("pre_tokenizer")))
    ignore_merges = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    names = [
        name
        for name, row in PRE_TOKENIZERS.items()
        if row.splits == splits and row.byte_level and row.ignore_merges == ignore_merges
    ]
    if not names:
        raise UnsupportedError(
            f"no GGUF pre-tokenizer cuts text as this tokenizer.json does: {splits!r:.300}, "
            f"ignore_merges {ignore_merges}; name the nearest one with --pre NAME"
        )
    return next((name for name in _PREFERRED if name in names), names[0])


def _splits(step: Any) -> Iterator[str]:
    """The regular expressions of a pre-tokenizer, in the order in which they cut."""
    kind = step.get("type") if isinstance(step, dict) else None
    match kind:
        case "Sequence":
            for inner in step.get("pretokenizers", ()):
                yield from _splits(inner)
        case "Split":
            yield _split(step)
        case "Digits":
            yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        case "ByteLevel":
            if step.get("add_prefix_space"):
                raise UnsupportedError("a byte-level tokenizer that puts a space before the text (add_prefix_space)")
            if step.get("use_regex", True):
                yield _GPT2
        case _:
            raise UnsupportedError(f"a tokenizer of byte pairs that cuts text by {kind!r:.40}")


def _split(step: Mapping[str, Any]) -> str:
    pattern, behaviour, invert = step.get("pattern") or {}, step.get("behavior"), bool(step.get("invert"))
    # To isolate what matches, or to remove what does not where everything matches, is the same.
    if "Regex" not in pattern or (behaviour, invert) not in (("Isolated", False), ("Removed", True)):
        raise UnsupportedError(f"a tokenizer that cuts text by {pattern!r:.60} with the behaviour {behaviour!r:.20}")
    return str(pattern["Regex"])
