"""The loop that continues a text: what it says, what it computes again, and how it ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from answers import GREEDY, PROMPT, read, says

from edgelm.cache import KVCache
from edgelm.errors import ContextFull, TemplateError, UsageError
from edgelm.kernels.matrix_unit import LEAST
from edgelm.model import Model

# ------------------------------------------------------------------------------------------------------------ an answer


def test_an_answer(model: Model) -> None:
    text, tokens, last = read(model.session().stream(PROMPT, max_tokens=12, **GREEDY))
    assert len(tokens) == 12
    assert text == model.generate(PROMPT, max_tokens=12, **GREEDY)
    assert last.finish_reason == "length" and last.generation_tokens == 12
    assert last.prompt_tokens == len(model.tokenize(PROMPT)) and last.cached_tokens == last.dropped_tokens == 0
    assert last.prompt_tps > 0 and last.generation_tps > 0
    assert last.logprob is None and last.logprobs == ()


def test_each_token_follows_from_the_logits_before_it(model: Model) -> None:
    tokens = model.tokenize(PROMPT)
    _, answer, _ = read(model.session().stream(PROMPT, max_tokens=10, **GREEDY))
    logits = model.logits(tokens + answer)
    eog = sorted(model.tokenizer.eog_ids)
    logits[:, eog] = -np.inf  # ignore_eos
    assert logits[len(tokens) - 1 : -1].argmax(axis=1).tolist() == answer


def test_the_same_seed_gives_the_same_text(model: Model) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "ignore_eos": True, "top_k": 0}
    one, other, third = (model.generate(PROMPT, seed=seed, **settings) for seed in (7, 7, 8))
    assert one == other != third


def test_logprobs(model: Model) -> None:
    tokens = model.tokenize(PROMPT)
    responses = list(model.stream_generate(PROMPT, max_tokens=5, logprobs=3, **GREEDY))
    logits = model.logits(tokens + [r.token for r in responses]).astype(np.float64)
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for i, response in enumerate(responses):
        row = log[len(tokens) - 1 + i]
        assert response.logprob == pytest.approx(row[response.token], abs=1e-4)
        assert [t for t, _ in response.logprobs] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [p for _, p in response.logprobs] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)
    [only] = model.stream_generate(PROMPT, max_tokens=1, logprobs=True, **GREEDY)
    assert only.logprob is not None and only.logprobs == ()


def test_progress_of_a_long_prompt(load: Callable[..., Model], interpreter: str) -> None:
    model = load(max_tokens_per_run=16) if interpreter == "program" else load()
    step, tokens, seen = model.runner.max_tokens, [5] * 100, []
    session = model.session()
    list(session.stream(tokens, max_tokens=1, progress=lambda *args: seen.append(args), **GREEDY))
    expected = [*range(step, 100, step), 100]
    assert seen == [("prompt", n, 100) for n in expected]
    seen.clear()
    list(session.stream([*tokens, 6], max_tokens=1, progress=lambda *args: seen.append(args), **GREEDY))
    assert seen == [("prompt", 1, 1)]


def test_no_tokens_only_fills_the_cache(model: Model) -> None:
    session = model.session()
    assert list(session.stream(PROMPT, max_tokens=0)) == []
    assert session.tokens == tuple(model.tokenize(PROMPT))


def test_requests_that_cannot_be_meant_fail_at_the_call(model: Model, load: Callable[..., Model]) -> None:
    session = model.session()
    for settings in ({"temprature": 1}, {"top_p": -1}, {"logit_bias": {10**6: 1}}, {"overflow": "x"}):
        with pytest.raises(UsageError):
            session.stream(PROMPT, **settings)
    for prompt in ([], [-1], [model.vocab_size]):
        with pytest.raises(UsageError):
            session.stream(prompt)
    with pytest.raises(UsageError, match="encoder"):
        load("bert-mean").session()
    with pytest.raises(UsageError, match="encoder"):
        load("bert-mean").generate("x")


# ------------------------------------------------------------------------------------------------- what is not repeated


def test_only_the_new_tail_is_computed(model: Model, computed: list[int]) -> None:
    session, n = model.session(), len(model.tokenize(PROMPT))
    _, answer, _ = read(session.stream(PROMPT, max_tokens=4, **GREEDY))
    assert computed == [n, 1, 1, 1]
    computed.clear()
    longer = [*model.tokenize(PROMPT), *answer, 9, 8, 7]
    _, _, last = read(session.stream(longer, max_tokens=2, **GREEDY))
    assert last.cached_tokens == n + 3 and last.prompt_tokens == len(longer)
    assert computed == [4, 1]  # the last token of the answer was chosen, but not computed yet


def test_cached_is_uncached(model: Model) -> None:
    """Whatever a session was asked before, its answer is that of a new one."""
    session = model.session()
    ends = ["", "the capital", "", "the fox and the hen . " * 3, "the"]
    prompts = [*(PROMPT + end for end in ends), "once upon", PROMPT]
    for prompt in prompts:
        cached = read(session.stream(prompt, max_tokens=10, **GREEDY))
        fresh = read(model.session().stream(prompt, max_tokens=10, **GREEDY))
        assert cached[:2] == fresh[:2]


def test_cached_logits_are_the_uncached_ones_bit_for_bit(load: Callable[..., Model], interpreter: str) -> None:
    """With a matrix unit, if that is asked for."""
    if interpreter == "reference":
        pytest.skip("NumPy's products depend on the shape of the batch")
    model, prompt = load(batch_invariant=True), 6 * PROMPT
    assert len(model.tokenize(prompt)) > LEAST
    session = model.session()
    list(session.stream(prompt, max_tokens=9, **GREEDY))
    list(session.stream(prompt + "the dog", max_tokens=0))
    responses = list(session.stream(prompt + "the fox", max_tokens=6, logprobs=5, **GREEDY))
    fresh = list(model.session().stream(prompt + "the fox", max_tokens=6, logprobs=5, **GREEDY))
    assert responses[0].cached_tokens > 0
    assert [(r.token, r.logprob, r.logprobs) for r in responses] == [(r.token, r.logprob, r.logprobs) for r in fresh]


def test_regenerate_computes_one_token(model: Model, computed: list[int]) -> None:
    session = model.session()
    first = read(session.stream(PROMPT, max_tokens=5, **GREEDY))
    computed.clear()
    again = read(session.stream(PROMPT, max_tokens=5, **GREEDY))
    assert again[:2] == first[:2] and computed == [1, 1, 1, 1, 1]


def test_truncate_and_reset(model: Model) -> None:
    session = model.session()
    list(session.stream(PROMPT, max_tokens=5, **GREEDY))
    before = session.tokens
    session.truncate(4)
    assert session.tokens == before[:4]
    assert read(session.stream(PROMPT, max_tokens=3, **GREEDY))[2].cached_tokens == 4
    with pytest.raises(UsageError, match="cannot go back"):
        session.truncate(len(session.tokens) + 1)
    session.reset()
    assert session.tokens == ()


def test_windowed_layers_that_cannot_go_back_start_over(load: Callable[..., Model]) -> None:
    model = load("gemma3")
    session = model.session()
    session._sequence = KVCache(model.config.cache_groups(), model.kv_type, undo=0).new_sequence()
    tokens = list(range(10, 110)) + [5] * 20
    list(session.stream(tokens, max_tokens=1, **GREEDY))
    assert session._sequence.floor > 64
    for prompt, cached in ((tokens[:118], 117), ([*tokens[:50], 7], 0), ([*tokens[:40], 7], 40)):
        _, answer, last = read(session.stream(prompt, max_tokens=5, **GREEDY))
        assert last.cached_tokens == cached
        assert answer == read(model.session().stream(prompt, max_tokens=5, **GREEDY))[1]


def test_fork(model: Model, computed: list[int]) -> None:
    session = model.session()
    list(session.stream(PROMPT, max_tokens=3, **GREEDY))
    other = session.fork()
    computed.clear()
    one = read(session.stream(PROMPT + "the fox", max_tokens=6, **GREEDY))
    two = read(other.stream(PROMPT + "a dog", max_tokens=6, **GREEDY))
    assert one[2].cached_tokens > 0 and two[2].cached_tokens > 0
    assert one[0] == model.generate(PROMPT + "the fox", max_tokens=6, **GREEDY)
    assert two[0] == model.generate(PROMPT + "a dog", max_tokens=6, **GREEDY)


def test_sessions_give_their_memory_back(model: Model) -> None:
    before = model.new_cache().n_pages
    session = model.session()
    list(session.stream(PROMPT, max_tokens=3, **GREEDY))
    assert model.new_cache().n_pages > before
    generating = session.stream(PROMPT, max_tokens=9, **GREEDY)
    next(generating)
    session.close()
    session.close()
    assert model.new_cache().n_pages == before
    for use in (lambda: next(generating), lambda: session.stream(PROMPT), session.fork, session.reset):
        with pytest.raises(UsageError, match="this session was closed"):
            use()
    with model.session() as another:
        list(another.stream(PROMPT, max_tokens=1, **GREEDY))
    model.generate(PROMPT, max_tokens=1, **GREEDY)
    assert model.new_cache().n_pages == before


# ----------------------------------------------------------------------------------------------------------------- chat


def test_chat_turns_compute_only_what_is_new(model: Model, computed: list[int]) -> None:
    session = model.session()
    messages = [{"role": "system", "content": "the fox"}, {"role": "user", "content": PROMPT}]
    text, _, first = read(session.chat(messages, max_tokens=6, **GREEDY))
    assert first.cached_tokens == 0 and first.prompt_tokens == len(model.render(messages))
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "the dog"}]
    computed.clear()
    second_text, _, second = read(session.chat(messages, max_tokens=6, **GREEDY))
    assert second.cached_tokens >= first.prompt_tokens
    assert computed[0] == second.prompt_tokens - second.cached_tokens
    assert second_text == read(model.chat(messages, max_tokens=6, **GREEDY))[0]


def test_a_text_is_a_message_of_the_user(model: Model) -> None:
    assert (
        read(model.chat("the fox", max_tokens=5, **GREEDY))[:2]
        == read(model.chat([{"role": "user", "content": "the fox"}], max_tokens=5, **GREEDY))[:2]
    )


def test_the_bos_token_comes_once(load: Callable[..., Model]) -> None:
    """Whether the template writes it or not (a model that sees two answers worse)."""
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with_bos, without = load(chat_template=source), load(chat_template=source.removeprefix("{{ bos_token }}"))
    bos = with_bos.tokenizer.bos_id
    messages = [{"role": "user", "content": "the fox"}]
    assert with_bos.tokenizer.add_bos
    assert with_bos.render(messages) == without.render(messages) == with_bos.tokenize("the fox")
    assert with_bos.render(messages).count(bos) == 1


def test_templates_that_were_given(load: Callable[..., Model]) -> None:
    assert load().template is not None and load().template.origin == "file"
    named = load(chat_template="chatml")
    assert named.template is not None and named.template.origin == "--chat-template chatml"
    with pytest.raises(UsageError, match=r"no built-in chat template 'chatmll'; there are .*chatml"):
        load(chat_template="chatmll")
    with pytest.raises(TemplateError):
        load(chat_template="{% if %}")


def test_a_model_without_a_template_says_so(load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("qwen3")
    monkeypatch.setitem(model.__dict__, "template", None)
    with pytest.raises(UsageError, match=r"has no chat template.*--chat-template"):
        model.chat("hello")


# -------------------------------------------------------------------------------------------------- when it is too long


def test_a_prompt_that_does_not_fit(load: Callable[..., Model]) -> None:
    model = load(ctx_size=40)
    tokens = list(range(10, 60))
    with pytest.raises(ContextFull) as caught:
        model.session().stream(tokens)
    assert (caught.value.n_tokens, caught.value.n_ctx) == (50, 40)
    with pytest.raises(ContextFull):
        model.logits(tokens)

    session = model.session(overflow="truncate-middle", **GREEDY)
    _, answer, last = read(session.stream(tokens, max_tokens=6))
    assert last.dropped_tokens == 16 and last.prompt_tokens == 34
    assert list(session.tokens[:34]) == tokens[:17] + tokens[-17:]
    assert answer == read(model.session().stream(tokens[:17] + tokens[-17:], max_tokens=6, **GREEDY))[1]


def test_an_answer_that_reaches_the_end(load: Callable[..., Model]) -> None:
    model = load(ctx_size=40)
    prompt = list(range(10, 45))
    for policy in ("error", "truncate-middle"):
        _, tokens, last = read(model.session().stream(prompt, overflow=policy, **GREEDY))
        assert last.finish_reason == "context" and len(tokens) == 6 and last.dropped_tokens == 0
    _, tokens, last = read(model.session().stream(list(range(10, 50)), **GREEDY))  # no room at all
    assert last.finish_reason == "context" and len(tokens) == 1


def test_a_shift_goes_on(load: Callable[..., Model], interpreter: str) -> None:
    model = load(ctx_size=40)
    prompt = model.tokenize(PROMPT)
    responses = list(model.session().stream(prompt, overflow="shift", keep=5, max_tokens=100, **GREEDY))
    assert len(responses) == 100 and responses[-1].finish_reason == "length"
    dropped = [r.dropped_tokens for r in responses]
    first = next(i for i, n in enumerate(dropped) if n)
    assert first == 40 - len(prompt) + 1 and dropped == sorted(dropped)
    text = prompt + [r.token for r in responses]
    now = text[:5] + text[5 + dropped[first] : len(prompt) + first]  # what is in the context when that token is chosen
    assert len(now) == 40 - (40 - 5) // 2 + 1
    if interpreter == "program":  # recomputed at its new positions: the same as if it had been the prompt
        assert read(model.session().stream(now, max_tokens=1, **GREEDY))[1] == [responses[first].token]


def test_a_shift_in_a_window_of_one_token(load: Callable[..., Model]) -> None:
    model = load(ctx_size=1)
    responses = list(model.session().stream([5], overflow="shift", max_tokens=4, **GREEDY))
    assert [r.dropped_tokens for r in responses] == [0, 1, 2, 3]
    said = [5, *(r.token for r in responses)]
    for before, token in itertools.pairwise(said):
        assert read(model.session().stream([before], max_tokens=1, **GREEDY))[1] == [token]


def test_a_conversation_that_does_not_fit(load: Callable[..., Model]) -> None:
    model = load(ctx_size=100)
    messages = [{"role": "user", "content": "the fox " * 4}, {"role": "assistant", "content": "the hen " * 4}] * 6
    messages += [{"role": "user", "content": "last"}]
    with pytest.raises(ContextFull):
        model.chat(messages)
    for policy in ("truncate-middle", "shift"):
        _, _, last = read(model.chat(messages, overflow=policy, max_tokens=5, **GREEDY))
        assert last.dropped_tokens == len(model.render(messages)) - last.prompt_tokens > 0
        assert last.prompt_tokens <= 95


# --------------------------------------------------------------------------------------------- stopping, text of tokens


def plain(model: Model, text: str) -> list[int]:
    return model.tokenize(text, add_special=False, parse_special=False)


def test_the_end_of_generation(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for end in sorted(model.tokenizer.eog_ids):
        session = says(model, monkeypatch, [*plain(model, "hello fox"), end, 9, 9])
        text, tokens, last = read(session.stream([5]))
        assert text == "hello fox" and tokens[-1] == end and last.finish_reason == "stop"
        assert last.generation_tokens == len(tokens)


@pytest.mark.parametrize(("stop", "expected"), [
    (["o f"], "hell"), (["fox and"], "hello "), ("hello", ""), (["n", "x"], "hello fo"), (["xyz"], "hello fox and"),
    (["and the"], "hello fox and"),
])  # fmt: skip
def test_stop_strings_over_token_borders(
    model: Model, monkeypatch: pytest.MonkeyPatch, stop: Any, expected: str
) -> None:
    script = [t for c in "hello fox and" for t in plain(model, c)]  # a token for each letter
    session = says(model, monkeypatch, script)
    responses = list(session.stream([5], stop=stop, max_tokens=len(script)))
    assert "".join(r.text for r in responses) == expected
    stopped = expected != "hello fox and"
    assert responses[-1].finish_reason == ("stop" if stopped else "length")
    assert all(r.finish_reason is None for r in responses[:-1])


def test_a_special_token_as_stop_string(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is never part of the text, but who asks to stop at it means the token."""
    special = model.tokenize("<|im_start|>", add_special=False)
    assert len(special) == 1
    session = says(model, monkeypatch, [*plain(model, "fox"), *special, *plain(model, "hen"), 9])
    text, _, last = read(session.stream([5], stop="<|im_start|>"))
    assert (text, last.finish_reason) == ("fox", "stop")
    session = says(model, monkeypatch, [*plain(model, "fox"), *special, *plain(model, "hen")])
    assert read(session.stream([5], max_tokens=3))[0].startswith("fox") and "<|" not in text


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha"])
def test_streamed_text_never_has_half_a_character(
    load: Callable[..., Model], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = load(name), "naïve 日本 🦊🏽 ok"
    script = plain(model, text)
    assert len(script) > len(text)
    session = says(model, monkeypatch, [*script, min(model.tokenizer.eog_ids)])
    pieces = [r.text for r in session.stream([5])]
    assert "".join(pieces).strip() == text and not any("\ufffd" in piece for piece in pieces)
    cut = next(i for i, t in enumerate(script) if len(model.tokenizer.token_bytes(t)) == 1 and i > 8)
    session = says(model, monkeypatch, script)
    assert "\ufffd" not in "".join(r.text for r in session.stream([5], max_tokens=cut))
