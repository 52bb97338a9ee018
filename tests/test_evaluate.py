"""Perplexity and divergence: which tokens are scored after what, and the figures against plain arithmetic."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import tiny

import edgelm
from edgelm.arch import CacheGroup
from edgelm.cache import KVCache
from edgelm.errors import FormatError, UsageError
from edgelm.evaluate import EvalReport, perplexity, score

VOCAB, BOS = 50, 1


class Bigram:
    """A model whose logits depend on the last token and its position: what it saw can be told from what it gave.

    A real runner in all that evaluation sees: it takes batches of limited size, and its sequences grow.
    """

    def __init__(self, seed, noise=0.0, vocab_size=VOCAB, max_tokens=7, add_bos=True):
        rng = np.random.default_rng(seed)
        self.table = (rng.standard_normal((vocab_size, vocab_size)) * 2).astype(np.float32)
        self.table += (np.random.default_rng(seed + 1).standard_normal(self.table.shape) * noise).astype(np.float32)
        self.vocab_size, self.max_tokens, self.runner = vocab_size, max_tokens, self
        self.tokenizer = SimpleNamespace(
            add_bos=add_bos, bos_id=BOS, encode=lambda text, **how: self.asked.append(how) or [ord(c) for c in text]
        )
        self.asked, self.fed, self.n_rows = [], [], []

    def require_logits(self):
        pass

    def new_cache(self):
        self.cache = KVCache((CacheGroup((0,), 1, 8, 8, 0),), "f16")
        self.fed.append([])
        return self.cache

    def forward(self, batch):
        assert 0 < len(batch.tokens) <= self.max_tokens
        (sequence,) = batch.sequences
        assert batch.positions[0] == sequence.length == len(self.fed[-1])
        sequence.reserve(len(batch.tokens))
        sequence.advance(len(batch.tokens))
        self.fed[-1] += batch.tokens.tolist()
        self.n_rows.append(len(batch.outputs))
        at = batch.outputs
        return self.table[batch.tokens[at]] * (1 + np.float32(0.01) * batch.positions[at, None])


def log_softmax(row):
    """The definition, in float64."""
    row = np.asarray(row, np.float64)
    best = max(row)
    return row - best - math.log(sum(math.exp(x - best) for x in row))


def expected(model, tokens, n_ctx, chunks, base=None):
    """llama-perplexity, step by step."""
    nlls, base_nlls, kls, tops, dps = [], [], [], [], []
    for chunk in range(chunks):
        part = list(tokens[chunk * n_ctx : (chunk + 1) * n_ctx])
        if model.tokenizer.add_bos:
            part[0] = BOS
        for position in range(n_ctx // 2, n_ctx - 1):
            q = log_softmax(model.table[part[position]] * (1 + np.float32(0.01) * np.float32(position)))
            target = tokens[chunk * n_ctx + position + 1]
            nlls.append(-q[target])
            if base:
                p = log_softmax(base.table[part[position]] * (1 + np.float32(0.01) * np.float32(position)))
                base_nlls.append(-p[target])
                kls.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
                tops.append(p.argmax() == q.argmax())
                dps.append(math.exp(q[target]) - math.exp(p[target]))
    n, mean = len(nlls), sum(nlls) / len(nlls)
    deviation = math.sqrt((sum(x * x for x in nlls) / n - mean * mean) / (n - 1))
    figures = {
        "perplexity": math.exp(mean), "stderr": math.exp(mean) * deviation, "n_tokens": n, "n_chunks": chunks,
        "n_ctx": n_ctx,
    }  # fmt: skip
    if base:
        kls.sort()
        at = 0.99 * (n - 1)
        low, part = int(at), at - int(at)
        figures |= {
            "base_perplexity": math.exp(sum(base_nlls) / n), "ppl_ratio": math.exp(mean - sum(base_nlls) / n),
            "mean_kl": sum(kls) / n, "kl_max": kls[-1],
            "kl_99": (1 - part) * kls[low] + part * kls[min(low + 1, n - 1)],
            "kl_median": kls[n // 2] if n % 2 else (kls[n // 2] + kls[n // 2 - 1]) / 2, "same_top": sum(tops) / n,
            "mean_dp": sum(dps) / n, "rms_dp": math.sqrt(sum(x * x for x in dps) / n),
        }  # fmt: skip
    return figures


TOKENS = np.random.default_rng(3).integers(0, VOCAB, 100).tolist()


@pytest.mark.parametrize("n_ctx", [4, 16, 17, 32, 50])
@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 7, 512])
def test_perplexity_is_llama_cpps(n_ctx, add_bos, max_tokens):
    model = Bigram(0, max_tokens=max_tokens, add_bos=add_bos)
    report = perplexity(model, TOKENS, n_ctx=n_ctx)
    assert report.to_dict() == pytest.approx(expected(model, TOKENS, n_ctx, 100 // n_ctx), rel=1e-5)


@pytest.mark.parametrize("noise", [0.01, 0.5])
@pytest.mark.parametrize("base_max_tokens", [7, 3])
def test_divergence_is_its_definition(noise, base_max_tokens):
    model, base = Bigram(0, noise), Bigram(0, max_tokens=base_max_tokens)
    report = perplexity(model, TOKENS, n_ctx=20, chunks=3, against=base).to_dict()
    figures = expected(model, TOKENS, 20, 3, base)
    assert {key: report[key] for key in figures} == pytest.approx(figures, rel=1e-4, abs=1e-7)
    assert set(report) == set(figures) | {"mean_kl_stderr", "ppl_ratio_stderr"}


def test_a_model_against_itself():
    report = perplexity(Bigram(0), TOKENS, n_ctx=20, against=Bigram(0))
    assert (report.mean_kl, report.kl_max, report.rms_dp, report.same_top, report.ppl_ratio) == (0, 0, 0, 1, 1)


def test_what_the_model_is_fed():
    """Each chunk alone in a fresh cache, BOS instead of its first token, never the last one; memory is given back."""
    model = Bigram(0)
    perplexity(model, TOKENS, n_ctx=30)
    assert model.fed == [[BOS, *TOKENS[i + 1 : i + 29]] for i in (0, 30, 60)]
    assert sum(model.n_rows) == 3 * 14  # of a chunk of 30 the positions 15 to 28 predict the tokens 16 to 29
    assert model.cache.n_pages == 0


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2"])
def test_a_model_from_a_file(name, tmp_path):
    """A Q8_0 file against its F32 original: the figures follow from the logits that both give by themselves."""
    models = [edgelm.load(tiny(name, fmt=fmt, folder=tmp_path), interpreter="reference") for fmt in ("Q8_0", "F32")]
    tokens = [t % 300 for t in range(7, 7 + 11 * 70, 11)]
    report = perplexity(models[0], tokens, n_ctx=32, against=models[1])
    scores = []
    for chunk in (tokens[:32], tokens[32:64]):
        start = [models[0].tokenizer.bos_id] if models[0].tokenizer.add_bos else chunk[:1]
        logits, base = (model.logits([*start, *chunk[1:]])[16:31] for model in models)
        scores.append(score(logits, np.array(chunk[17:]), base))
    assert report.n_tokens == 30 and report.n_chunks == 2
    assert report.perplexity == pytest.approx(math.exp(np.concatenate([s.nll for s in scores]).mean()), rel=1e-4)
    assert report.mean_kl == pytest.approx(np.concatenate([s.kl for s in scores]).mean(), rel=1e-2)
    assert 0 < report.mean_kl < 0.01


def test_an_encoder_predicts_nothing(tmp_path):
    model = edgelm.load(tiny("bert-mean", folder=tmp_path), interpreter="reference")
    with pytest.raises(UsageError, match="encoder"):
        perplexity(model, TOKENS, n_ctx=20)


def test_text_is_tokenized_as_text():
    model = Bigram(0, vocab_size=128)
    text = "abcd" * 5 + "\n\n"
    assert perplexity(model, text, n_ctx=8) == perplexity(model, list(text[:-1].encode()), n_ctx=8)
    assert model.asked == [{"add_special": True, "parse_special": False}]


def test_progress():
    seen = []
    perplexity(Bigram(0), TOKENS, n_ctx=30, progress=lambda *step: seen.append(step))
    assert seen == [("evaluate", i, 3) for i in range(4)]


def test_memory_stays_bounded_with_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr("edgelm.evaluate._MAX_LOGIT_BYTES", 4 * VOCAB * 3)
    model, base = Bigram(0, 0.5, max_tokens=512), Bigram(0, max_tokens=512)
    report = perplexity(model, TOKENS, n_ctx=40, against=base).to_dict()
    assert max(model.n_rows) == max(base.n_rows) == 3
    figures = expected(model, TOKENS, 40, 2, base)
    assert {key: report[key] for key in figures} == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n_ctx": 51}, "the text has 100 tokens"),
        ({"n_ctx": 3}, "at least 4"),
        ({"chunks": 0}, "at least one"),
        ({"against": Bigram(0, vocab_size=51)}, "different vocabularies"),
    ],
)
def test_requests_that_make_no_sense(how, message):
    with pytest.raises(UsageError, match=message):
        perplexity(Bigram(0), TOKENS, **{"n_ctx": 20} | how)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_a_number_is_reported(wrong):
    model = Bigram(0)
    model.table[:, 7] = wrong
    with pytest.raises(FormatError, match="not a number"):
        perplexity(model, TOKENS, n_ctx=20)
    assert model.cache.n_pages == 0


@settings(deadline=None)
@given(
    arrays(np.float32, (3, 40), elements=st.floats(-200, 200, width=32)),
    arrays(np.float32, (3, 40), elements=st.floats(-200, 200, width=32)),
    st.floats(-1000, 1000, width=32),
)
def test_scores_of_any_logits(logits, base, shift):
    targets = np.array([0, 20, 39])
    scores = score(logits, targets, base)
    p, q = (np.stack([log_softmax(row) for row in x]) for x in (base, logits))
    assert scores.nll == pytest.approx(-q[range(3), targets], rel=1e-5, abs=1e-5)
    assert scores.base_nll == pytest.approx(-p[range(3), targets], rel=1e-5, abs=1e-5)
    assert scores.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1), rel=1e-5, abs=1e-4)
    assert (scores.kl > -1e-5).all()
    # A constant added to all logits of a row changes no prediction.
    assert score(logits, targets, base + np.float32(shift)).kl == pytest.approx(scores.kl, abs=0.05)


def test_a_small_divergence_keeps_its_digits():
    """Two models this near differ by less than float32 can tell of their log-probabilities."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((4, 20000)) * 3 + 15).astype(np.float32)
    logits = base + (rng.standard_normal(base.shape) * 1e-3).astype(np.float32)
    p, q = (np.stack([log_softmax(row) for row in x]) for x in (base, logits))
    exact = (np.exp(p) * (p - q)).sum(axis=1)
    assert (exact < 1e-6).all()
    assert score(logits, np.zeros(4, int), base).kl == pytest.approx(exact, rel=0.02)


def test_an_impossible_token():
    """Logits of -inf are a prediction like any other: infinite surprise, no divergence where both models agree."""
    base = np.array([[0.0, 0.0, -math.inf]], np.float32)
    assert score(base, np.array([0]), base).kl[0] == 0
    assert score(base, np.array([2])).nll[0] == math.inf
    assert score(np.array([[0.0, -math.inf, 0.0]], np.float32), np.array([0]), base).kl[0] == math.inf


def test_a_hopeless_model_has_an_infinite_perplexity():
    model = Bigram(0)
    model.table *= 1e5
    assert perplexity(model, TOKENS, n_ctx=20).perplexity == math.inf


def test_a_report_without_a_reference_has_no_empty_figures():
    report = EvalReport(perplexity=2.0, stderr=0.1, n_tokens=5, n_chunks=1, n_ctx=8)
    assert report.to_dict() == {"perplexity": 2.0, "stderr": 0.1, "n_tokens": 5, "n_chunks": 1, "n_ctx": 8}
