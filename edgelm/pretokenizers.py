"""How the text is cut into words before byte-pair encoding: one row for each name that `tokenizer.ggml.pre` may hold.

Knows regular expressions and switches, no vocabulary. The expressions are those of the models' own `tokenizer.json`
(Oniguruma syntax); they are applied one after the other, each to the pieces that the one before it left, and what no
expression matches stays a piece. Where a published expression would take quadratic time on a long run of digits, the
row holds expressions that cut the same places in linear time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Attributes:
        splits: regular expressions, applied in this order, every match becoming a piece of its own.
        byte_level: pieces are spelled in GPT-2's 256 printable stand-ins for bytes; otherwise in plain characters,
            and a character without a token falls back to `<0xXX>` tokens.
        ignore_merges: a piece that is itself in the vocabulary is taken whole, without merging.
        escape_spaces: spaces become U+2581 first, as in SentencePiece.
        drop_space: white space separates words and disappears.
        whole_newlines: a run of newlines that is itself in the vocabulary is taken whole.
        add_bos: models of this family expect a BOS token unless the file says otherwise.
    """

    splits: tuple[str, ...]
    byte_level: bool = True
    ignore_merges: bool = False
    escape_spaces: bool = False
    drop_space: bool = False
    whole_newlines: bool = False
    add_bos: bool = False


_SUFFIX = r"'s|'t|'re|'ve|'m|'ll|'d"
_SUFFIX_ANY_CASE = f"(?i:{_SUFFIX})"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_SUFFIX}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _cl100k(
    *,
    suffix: str = _SUFFIX_ANY_CASE + "|",
    word: str = r"\p{L}+",
    number: str = r"\p{N}{1,3}",
    other: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    newlines: str = r"\s*[\r\n]+",
    spaces: str = _SPACES,
) -> str:
    """The expression that came with GPT-4's cl100k vocabulary, and the many that changed one part of it."""
    return rf"{suffix}[^\r\n\p{{L}}\p{{N}}]?{word}|{number}|{other}|{newlines}|{spaces}"


def _o200k(*, suffix: str = _SUFFIX_ANY_CASE + "?", number: str = r"\p{N}{1,3}", not_han: str = "") -> str:
    """The expression that came with GPT-4o's o200k vocabulary: words break where lower case turns to upper case."""
    upper, lower = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{not_han}]",
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{not_han}]",
    )
    lead = r"[^\r\n\p{L}\p{N}]?"
    other = r" ?[^\s\p{L}\p{N}]+[\r\n]*" if not_han else r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    words = f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
    return rf"{words}|{number}|{other}|\s*[\r\n]+|{_SPACES}"


def _deepseek3(*, other: str = r" ?[\p{P}\p{S}]+[\r\n]*", newlines: str = r"\s*[\r\n]+") -> str:
    punctuated = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    return rf"{punctuated}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+|{other}|{newlines}|{_SPACES}"


def _digits_from_the_right(digit: str, *, run: str) -> tuple[str, ...]:
    """Cut runs of digits into groups of three that end where the run ends: 1234567 -> 1 234 567.

    `run` isolates a run; the second expression cuts the short first group off, the third what remains. The published
    expressions look ahead to the end of the run at every group instead, which is quadratic.
    """
    return run, rf"\A{digit}{{1,2}}(?=(?:{digit}{{3}})+\z)", rf"{digit}{{3}}"


def _any_of(code_points: str) -> str:
    """A character class from hexadecimal code points and ranges (spelled so, because some have look-alikes)."""
    return "[" + "".join("-".join(rf"\x{{{c}}}" for c in item.split("-")) for item in code_points.split()) + "]"


_CJK = _any_of("4E00-9FA5 3040-309F 30A0-30FF") + "+"
_CJK_HANGUL = _any_of("4E00-9FA5 800-4E00 AC00-D7FF") + "+"
_ASIAN = (
    _any_of(
        "4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F "
        "AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
    )
    + "+"
)
_HANGUL = _any_of("AC00-D7A3 3131-318E") + "+"
_BOPOMOFO = _any_of("3105-312F") + "+"
_WIDE_MARKS = _any_of("FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F") + "+"
_MARKS = _any_of("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002") + "+"
# Letters with case, as the first DeepSeek vocabulary spells them out.
_CASED = (
    _any_of(
        "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
        "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
        "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE "
        "1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 "
        "2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
        "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
        "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
    )
    + "+"
)
_CASCADE = "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)).removeprefix("|")
_NEWLINE_RUNS = r"[^\n]+|\n+"

_gpt2 = PreTokenizer((_GPT2,))
_single_digits = PreTokenizer((r"\p{N}", _GPT2))
_llama3 = PreTokenizer((_cl100k(),))
_qwen2 = PreTokenizer((_cl100k(number=r"\p{N}"),))
_gpt4o = PreTokenizer((_o200k(),))
_deepseek = PreTokenizer((r"\p{N}{1,3}", _CJK, _deepseek3()))
_words = PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",))
_bailing = PreTokenizer(
    (
        _cl100k(suffix=r"'(?i:[sdmt]|ll|ve|re)|", word=r"\p{L}+", number=r"\p{N}", newlines=r"\s*[\r\n]")
        .replace("]?\\p{L}+", "]?+\\p{L}+")
        .replace("[^\\s\\p{L}\\p{N}]+[", "[^\\s\\p{L}\\p{N}]++["),
    )
)
_gemma4 = PreTokenizer((_NEWLINE_RUNS,), byte_level=False, escape_spaces=True, whole_newlines=True, add_bos=True)
_aya = PreTokenizer((*_digits_from_the_right(r"\d", run=r"(?<!\d)\d++(?!\w)"), _o200k()))

_FAMILIES: tuple[tuple[PreTokenizer, str], ...] = (
    (
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "default",
    ),
    (
        _gpt2,
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 mpt olmo jais "
        "trillion granite-docling jina-v1-en jina-v2-code roberta-bpe",
    ),
    (_single_digits, "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (
        replace(_llama3, ignore_merges=True, add_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (_llama3, "dbrx smaug-bpe chatglm-bpe"),
    (replace(_llama3, ignore_merges=True), "glm4 glm5"),
    (_qwen2, "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (
        PreTokenizer((_cl100k(word=r"[\p{L}\p{M}]+", number=r"\p{N}", other=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)),
        "qwen35",
    ),
    (PreTokenizer((_NEWLINE_RUNS, *_qwen2.splits)), "laguna"),
    (PreTokenizer((_cl100k(suffix="", number=r"\p{N}"),)), "ufakzeka"),
    (PreTokenizer((r"\p{N}{1,3}", _cl100k(number=r"\p{N}+")), ignore_merges=True), "minicpm5"),
    (PreTokenizer((_cl100k(spaces=rf"{_CASCADE}|\s{{1,2}}(?!\S)|\s{{1}}"),)), "jais-2"),
    (PreTokenizer((_cl100k(number=r"\p{N}", other=r" ?[^\s\p{L}\p{N}\r\n]+"),)), "seed-coder"),
    (_bailing, "bailingmoe bailingmoe2 llada-moe"),
    (
        PreTokenizer(
            (
                _cl100k(
                    word=r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    number=r"\p{N}",
                    other=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    newlines=r"\s*[\r\n]",
                ),
            )
        ),
        "exaone-moe",
    ),
    (
        PreTokenizer((r"[\r\n]", r"\s?" + _CASED, r"\s?" + _MARKS, r"(?<!\s)\s+$", _CJK_HANGUL, r"\p{N}+")),
        "deepseek-llm",
    ),
    (PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, r"\p{N}")), "deepseek-coder"),
    (_deepseek, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (
        PreTokenizer(
            (r"\p{N}{1,3}", _CJK, _deepseek3(other=r" ?[\p{P}\p{S}]+", newlines=r"[\r\n]"), r"\p{N}"),
        ),
        "spark2_5",
    ),
    (
        PreTokenizer(
            (
                f"{_HANGUL}|{_WIDE_MARKS}|{_BOPOMOFO}|{_CJK}",
                _o200k(number=r"\p{N}"),
            ),
            ignore_merges=True,
        ),
        "youtu",
    ),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (_words, "poro-chat bloom gpt3-finnish"),
    (PreTokenizer((*_words.splits, r"\p{N}")), "viking"),
    (PreTokenizer((_o200k(suffix="", number=r"\p{N}"),), ignore_merges=True, add_bos=True), "tekken"),
    (_gpt4o, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (replace(_gpt4o, ignore_merges=True), "granite-embed-multi-97m"),
    (_aya, "tiny_aya cohere2moe"),
    (
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
        "chameleon",
    ),
    (PreTokenizer((r"\p{Han}+|" + _o200k(not_han=r"&&[^\p{Han}]"),)), "kimi-k2"),
    (PreTokenizer((r"\p{N}+", *_digits_from_the_right(r"\d", run=r"\d+"))), "superbpe"),
    (PreTokenizer((*_digits_from_the_right(r"\p{N}", run=r"\p{N}+"), _ASIAN, _deepseek3())), "afmoe"),
    (_gemma4, "gemma4 granite-embed-multi-311m"),
    (PreTokenizer((_NEWLINE_RUNS,), byte_level=False, escape_spaces=True), "sarvam-moe"),
    (PreTokenizer((r"\S+",), byte_level=False, drop_space=True), "whitespace"),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for row, names in _FAMILIES for name in names.split()}
