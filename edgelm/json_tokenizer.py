"""Text <-> token ids, after a tokenizer.json: cut by the `tokenizers` library itself, behind `tokenizer.Tokenizer`.

What a GGUF file says in its own keys is gathered here from tokenizer.json and the files around it: which tokens steer,
which end an answer, what is put around a text, and how a token is spelled in bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FormatError, SourceError, UnsupportedError
from .forks import lock_of
from .onnx_folder import OnnxFolder, read_text
from .pretokenizers import PreTokenizer
from .subwords import SPACE
from .tokenizer import Tokenizer, _well_formed
from .vocabulary import MAX_PIECE_CHARS, Kind, Vocabulary, end_of_generation

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROBE = "a"  # what is put around any text is seen around this one


class JsonTokenizer(Tokenizer):
    """A tokenizer whose text is cut by the library; `Tokenizer` has the rest."""

    def __init__(self, v: Vocabulary, cutter: Any, around: tuple[list[int], list[int]]) -> None:
        super().__init__(v)
        self._cutter, self._around, self._lock = cutter, around, lock_of(self)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        with self._lock:
            self._cutter.encode_special_tokens = not parse_special  # the library's word for "as ordinary text"
            ids: list[int] = self._cutter.encode(_well_formed(text), add_special_tokens=False).ids
        before, after = self._around if add_special else ([], [])
        return [*before, *ids, *after]


def read(folder: OnnxFolder) -> JsonTokenizer:
    """The tokenizer of a folder.

    Raises:
        SourceError: there is none.
        FormatError: it is broken, or that of another model.
        UnsupportedError: a kind of tokenizer that has no tokenizer.json.
    """
    text = read_text(folder.path, "tokenizer.json")
    if text is None:
        raise SourceError(f"{folder.path} has no tokenizer.json; take it from the model that the graph was made of")
    n, cutter = folder.vocab_size, opened(text, folder.path / "tokenizer.json")
    if any(token >= n for token in cutter.get_added_tokens_decoder()):  # such as an image's mark
        cutter = opened(_without_added(text, n), folder.path / "tokenizer.json")
    model = _family(cutter)
    pieces, kinds = _tokens(cutter, n, folder)
    ids = {piece: i for i, piece in enumerate(pieces)}
    around = _around(cutter)
    special, ends = _special(folder, ids, around, n)
    if not around[0] and cutter.post_processor is None and folder.tokenizer_config.get("add_bos_token") is True:
        around = [token for token in (special["bos"],) if token is not None], around[1]
    v = Vocabulary(
        model=model,
        pre_name="tokenizer.json",
        pre=PreTokenizer((), byte_level=model == "gpt2"),
        pieces=pieces,
        kinds=kinds,
        scores=np.zeros(0, np.float32),
        merges=(),
        charsmap=b"",
        bos_id=special["bos"],
        eos_id=special["eos"],
        unk_id=special["unk"],
        sep_id=special["sep"],
        pad_id=special["pad"],
        eog_ids=end_of_generation(pieces, ids, kinds, special) | ends,
        add_bos=bool(around[0]) and around[0][-1] == special.get("bos"),
        add_eos=bool(around[1]) and model != "bert" and around[1][0] == special.get("eos"),
        add_sep=bool(around[1]) and model == "bert",
        add_space_prefix=model != "gpt2" and prefixes(cutter.normalizer, cutter.pre_tokenizer),
        remove_extra_whitespaces=False,
        lowercase=False,
        strip_accents=False,
        ids=ids,
    )
    return JsonTokenizer(v, cutter, around)


def opened(text: str, path: Path) -> Any:
    """The library's tokenizer of a tokenizer.json, which may be hostile; FormatError where the library fails on it."""
    import tokenizers

    try:
        cutter = tokenizers.Tokenizer.from_str(text)
        cutter.no_truncation()
        cutter.no_padding()
        cutter.encode(_PROBE)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library panics over some broken files, which is no Exception
        reason = " ".join(str(error).split())
        raise FormatError(f"{path}: the tokenizers library cannot read it: {reason:.200}") from None
    return cutter


def _without_added(text: str, n: int) -> str:
    """A tokenizer.json, which the library has read, without added tokens that the model has no row for."""
    parsed = json.loads(text)
    parsed["added_tokens"] = [entry for entry in parsed["added_tokens"] if entry["id"] < n]
    return json.dumps(parsed)


def _family(cutter: Any) -> str:
    """How pieces are spelled, by the name that GGUF has for it."""
    kind = type(cutter.model).__name__
    if kind == "BPE":
        steps = [*_steps(cutter.decoder), *_steps(cutter.pre_tokenizer)]
        return "gpt2" if any(step.get("type") == "ByteLevel" for step in steps) else "llama"
    if kind in ("Unigram", "WordPiece"):
        return "t5" if kind == "Unigram" else "bert"
    raise UnsupportedError(f"tokenizer.json: a tokenizer of the kind {kind:.40}")


def _tokens(
    cutter: Any, n: int, folder: OnnxFolder
) -> tuple[list[str], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Piece and kind of each of the n tokens of the model; those that the tokenizer does not have are unused."""
    where, ids = folder.path / "tokenizer.json", cutter.get_vocab(with_added_tokens=True)
    if max(ids.values(), default=n) >= n:
        text = max(ids, key=ids.__getitem__, default="")
        raise FormatError(f"{where}: the token {text[:50]!r} is {ids.get(text)}, the model has {n}; it is another's")
    if len(ids) < n // 4:
        raise FormatError(f"{where} has {len(ids)} tokens, the model {n}; it is another's")
    pieces = [f"[PAD{i}]" for i in range(n)]
    kinds = np.full(n, Kind.UNUSED, np.uint8)
    is_words = type(cutter.model).__name__ == "WordPiece"
    added = cutter.get_added_tokens_decoder()
    unknown = getattr(cutter.model, "unk_token", None)
    for text, token in ids.items():
        if len(text) > MAX_PIECE_CHARS:
            raise FormatError(f"{where}: a token of {len(text)} characters; {MAX_PIECE_CHARS} are allowed")
        if token in added:
            kinds[token] = Kind.CONTROL if added[token].special else Kind.USER_DEFINED
        else:
            kinds[token] = Kind.UNKNOWN if text == unknown else Kind.BYTE if _BYTE.fullmatch(text) else Kind.NORMAL
            if is_words:  # as GGUF has it: the beginning of a word is marked, not what continues one
                text = text[2:] if text.startswith("##") else SPACE + text
        pieces[token] = text
    return pieces, kinds


def _around(cutter: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare: list[int] = cutter.encode(_PROBE, add_special_tokens=False).ids
    full: list[int] = cutter.encode(_PROBE, add_special_tokens=True).ids
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    raise FormatError("tokenizer.json changes a text when it puts special tokens around it")


def _special(
    folder: OnnxFolder, ids: Mapping[str, int], around: tuple[list[int], list[int]], n: int
) -> tuple[dict[str, int | None], frozenset[int]]:
    """The special tokens by name, and all that are said to end an answer."""
    sources = (folder.genai, folder.generation, folder.config)
    found: dict[str, int | None] = {}
    ends: set[int] = set()
    for name in ("bos", "eos", "unk", "sep", "pad"):
        entry = folder.tokenizer_config.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        token = ids.get(text) if isinstance(text, str) else None
        said = [token for source in sources for token in _ids(source, f"{name}_token_id", n)]
        if name == "eos":
            ends.update(said)
        found[name] = token if token is not None else said[0] if said else None
    if found["bos"] is None and around[0]:
        found["bos"] = around[0][-1]
    if found["sep"] is None and around[1]:
        found["sep"] = around[1][0]
    if found["eos"] is None and "[SEP]" in ids:  # BERT's texts end with it
        found["eos"] = ids["[SEP]"]
    return found, frozenset(ends)


def _ids(source: Mapping[str, Any], key: str, n: int) -> list[int]:
    """The ids, one or several, that a configuration gives for a special token."""
    value = source.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and -1 <= token < 1 << 31 for token in values):
        raise FormatError(f"{key} is {value!r:.60}, which is no token")
    return [token for token in values if 0 <= token < n]


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, one after the other."""
    if step is not None and not isinstance(step, dict):
        step = json.loads(step.__getstate__())  # as the library would write it down
    if isinstance(step, dict):
        yield step
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in step[key] if isinstance(step.get(key), list) else ():
                yield from _steps(inner)


def prefixes(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether these two, as a tokenizer.json or the library has them, put a space before the text."""
    for step in (*_steps(normalizer), *_steps(pre_tokenizer)):
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            always = "always" if step.get("add_prefix_space", True) else "never"
            return bool(step.get("prepend_scheme", always) != "never")
    return False
