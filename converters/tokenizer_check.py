"""Does the tokenizer of the file that is being written cut text as the one it was made from? Compared, not believed.

The original is run by the `tokenizers` library from tokenizer.json; ours reads the very keys that the file gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgelm.disk import read_text
from edgelm.errors import FormatError
from edgelm.json_tokenizer import opened
from edgelm.tokenizer import Tokenizer
from edgelm.vocabulary import Kind

from .special_tokens import Folder

# Where tokenizers differ: spaces in runs, digits, apostrophes, case, accents, scripts, emoji, code, bytes that pair up.
TEXTS = (
    "Hello world", " Hello world", "hello", "HELLO", "Hello, y'all! How are you 😁 ?", " (normal) ", "\t\tindented",
    "a", " ", "  ", "   ", "    four spaces", "trailing   ", "two\nlines", "three\n\n\nbreaks\n", "\r\nwindows\r\n",
    " \n \n\n", "tab\tand\t\ttabs", "1", "12", "123", "1234", "12345", "3.14159", "1,000,000", "2024-11-22T06:00:00",
    "I'm you're he'll they've we'd it's isn't", "I'M YOU'RE", "'tis the ’90s", "\"quoted\" 'single' `code`",
    "naïve café façade", "Zürich Straße Ärger", "Ελληνικά", "нещо на Български", "Việt Nam", "हिन्दी में पाठ",
    "我想在apple工作1314151天～", "日本語のテキスト", "한국어 텍스트", "ภาษาไทย", "العربية", "עברית", "កាន់តែពិសេសអាច",
    "🚀 🦙🦙 ✅", "😶‍🌫️ family 👨‍👩‍👧", "½ ² № ™ …", "x = (a+b)*c; // comment", "def f(x):\n    return x**2\n",
    "<html><b>bold</b></html>", "https://example.com/a?b=c&d=e#f", "user@example.com", "C:\\path\\file.txt",
    "-----", "======", "!!!???...", "$100 €50 £20", "ALLCAPS camelCase snake_case kebab-case", "a\u00a0fixed space",
    "zero\u200bwidth", "The quick brown fox jumps over the lazy dog.", "\u4e00\u3000\uff01", "ﬁ ligature",
)  # fmt: skip


def compare(keys: Mapping[str, Any], folder: Folder) -> tuple[int, list[str]]:
    """The number of texts that were compared with the source's own tokens, and notes on what cannot be the same.

    Text must give the same tokens, or it is a FormatError. What is put around a text, and text with special tokens
    in it, may differ where GGUF cannot say it: that is noted. Without a tokenizer.json nothing can be compared.
    """
    ours = Tokenizer.from_gguf(keys)  # raises what a runtime would raise
    path = folder.path / "tokenizer.json"
    if not path.exists():
        return 0, ["not compared with its source: there is no tokenizer.json"]
    source = opened(read_text(path), path)
    for text in TEXTS:
        _same(text, source.encode(text, add_special_tokens=False).ids, ours.encode(text, add_special=False), source)
    return len(TEXTS), _notes(ours, source, keys)


def _same(text: str, theirs: Sequence[int], ours: Sequence[int], source: Any) -> None:
    if list(theirs) != list(ours):
        shorter = min(len(theirs), len(ours))
        at = next((i for i in range(shorter) if theirs[i] != ours[i]), shorter)
        raise FormatError(
            f"the converted tokenizer cuts {text!r} differently from token {at} on: "
            f"{_shown(source, ours[at : at + 4])} where the source has {_shown(source, theirs[at : at + 4])}; "
            "--no-tokenizer-check converts nevertheless"
        )


def _shown(source: Any, ids: Sequence[int]) -> str:
    return " ".join(repr(source.id_to_token(i)) for i in ids) or "nothing"


def _notes(ours: Tokenizer, source: Any, keys: Mapping[str, Any]) -> list[str]:
    notes = []
    theirs, own = source.encode("Hello").ids, ours.encode("Hello")
    if theirs != own:
        notes.append(f"around a text the source has {_shown(source, theirs)}, the file {_shown(source, own)}")
    kinds = keys["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(keys["tokenizer.ggml.tokens"], kinds, strict=True) if kind == Kind.CONTROL]
    for token in special[:8]:
        text = f"Hello {token} world{token}\nbye"
        if source.encode(text, add_special_tokens=False).ids != ours.encode(text, add_special=False):
            notes.append(f"text around the special token {token!r} is cut in another way than by the source")
            break
    return notes
