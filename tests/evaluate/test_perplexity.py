"""Whole-split figures against sums done by hand, and n-grams against their definition."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from assay.data import loader
from assay.data.corpora import open_corpus
from assay.data.tokenizers import ByteTokenizer, CharTokenizer
from assay.errors import AssayError
from assay.evaluate import perplexity
from assay.evaluate.perplexity import Bigrams, bits_per_byte, evaluate, ngram_baselines
from assay.model.transformer import Transformer, merge_named, named_parameters
from assay.spec import presets

TEXT = "the cat sat on the mat. " * 9 + "naïve ☃!"


@pytest.fixture(scope="module")
def model():
    spec = presets.shrink(presets.get("gpt2").model).replace(vocab_size=257)
    model = Transformer(spec, rngs=jax.random.key(0))
    rng = np.random.default_rng(0)
    named = {k: v + rng.normal(size=v.shape) * 0.2 for k, v in named_parameters(model).items()}
    return merge_named(model, {k: v.astype(np.float32) for k, v in named.items()})


def tokenized(tmp_path, text=TEXT, tokenizer=None):
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    return loader.tokenize(open_corpus(str(file)), tokenizer or ByteTokenizer())


def nats_of(model, ids, start, stop):
    """-log p of ids[start:stop] given all from ids[start - 1] on."""
    logits = np.asarray(model(np.asarray(ids[start - 1 : stop - 1], np.int32)[None]), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logp[np.arange(stop - start), ids[start:stop]]


def test_every_byte_once(model, tmp_path):
    part = tokenized(tmp_path)
    ids = np.asarray(part.ids[:], np.int64)
    result = evaluate(model, loader.evaluation_batches([part], batch_size=3, seq_len=16))
    nats = sum(
        nats_of(model, ids, start, min(start + 16, len(ids))).sum()
        for start in range(1, len(ids), 16)
    )
    assert result.tokens == len(ids) - 1
    assert result.bytes == len(TEXT.encode())
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bpb == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-5)
    assert (result.window, result.stride, result.unscored, result.unknown) == (16, 16, 0, 0)


def test_overlapping_windows_score_only_the_new_tokens(model, tmp_path):
    part = tokenized(tmp_path)
    ids = np.asarray(part.ids[:], np.int64)
    result = evaluate(model, loader.evaluation_batches([part], batch_size=4, seq_len=16, stride=4))
    nats, scored_to = 0.0, 1
    for start in range(1, len(ids), 4):
        end = min(start + 16, len(ids))
        nats += nats_of(model, ids, start, end)[scored_to - start :].sum()
        scored_to = max(scored_to, end)
        if end == len(ids):
            break
    assert result.tokens == len(ids) - 1
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5)


@dataclass
class Batches:
    """A list of batches with what `ScoredBatches` asks for."""

    batches: list
    unscored: int = 0
    bytes: int | None = None
    parts: list = field(default_factory=list)
    seq_len: int = 4
    stride: int = 4

    def __iter__(self):
        return iter(self.batches)


def uniform_model(vocab):
    """Logits are all 0: each token costs log V exactly."""
    spec = presets.get("bigram").model.with_vocab(vocab)
    return Transformer(spec, rngs=jax.random.key(0))


def batch(weights):
    weights = np.asarray(weights, np.float32)
    tokens = np.zeros(weights.shape, np.int32)
    return {"tokens": tokens, "targets": tokens, "weights": weights}


def test_what_has_no_context_or_is_unknown_is_charged():
    parts = [SimpleNamespace(unknown=2), SimpleNamespace(unknown=1)]
    batches = Batches([batch([[1, 1, 0, 1]])], unscored=2, bytes=10, parts=parts)
    result = evaluate(uniform_model(8), batches)
    assert result.tokens == 5
    assert result.unknown == 3
    assert result.loss == pytest.approx(math.log(8), rel=1e-6)
    assert result.bpb == pytest.approx((5 * 3 + 3 * math.log2(1_114_112)) / 10, rel=1e-6)


def test_unknown_characters_of_a_text_are_charged(tmp_path):
    tokenizer = CharTokenizer("abc ")
    part = tokenized(tmp_path, "abc ☃ xa", tokenizer)
    result = evaluate(
        uniform_model(tokenizer.vocab_size), loader.evaluation_batches([part], 1, seq_len=4)
    )
    assert result.unknown == 2
    separators = result.tokens - 8
    bits = (8 + separators) * math.log2(6) + 2 * math.log2(1_114_112)
    assert result.bpb == pytest.approx(bits / 10, rel=1e-6)


def test_without_bytes_there_are_no_bits_per_byte():
    assert evaluate(uniform_model(8), Batches([batch([[1]])])).bpb is None


def test_nothing_to_score_is_refused():
    with pytest.raises(AssayError, match="no token to score"):
        evaluate(uniform_model(8), Batches([]))


def test_sums_are_exact_over_many_batches():
    """Float32 sums over the whole split would be off by 1e-4 here; losses are exactly alike."""
    many = Batches([batch(np.ones((4, 64)))] * 2000)
    result = evaluate(uniform_model(8), many)
    row = float(perplexity.row_losses(uniform_model(8), batch(np.ones((1, 64))))[0][0])
    assert result.loss == pytest.approx(row / 64, rel=1e-12)


# ---------------------------------------------------------------------------- n-grams

TRAIN = np.array([0, 1, 2, 1, 2, 3, 1, 2, 0])  # ids[0] is context only


def test_probabilities_sum_to_one():
    model, words = Bigrams(TRAIN, 6), np.arange(6)
    assert model.unigram(words).sum() == pytest.approx(1)
    assert (model.unigram(words) > 0).all()
    for history in words:  # 4 and 5 were never seen
        p = model.bigram(np.full(6, history), words)
        assert p.sum() == pytest.approx(1)
        assert (p > 0).all()


def test_witten_bell_by_hand():
    model = Bigrams(TRAIN, 6)
    unigram = (np.array([1, 3, 3, 1, 0, 0]) + 4 / 6) / (8 + 4)
    np.testing.assert_allclose(model.unigram(np.arange(6)), unigram)
    # after 2 stood 1, 3 and 0, once each
    np.testing.assert_allclose(
        model.bigram(np.full(6, 2), np.arange(6)),
        (np.array([1, 1, 0, 1, 0, 0]) + 3 * unigram) / (3 + 3),
    )
    np.testing.assert_allclose(model.bigram(np.full(6, 5), np.arange(6)), unigram)


def test_baselines_are_the_sums(monkeypatch):
    held_out = np.array([2, 1, 2, 3, 3, 5])
    model = Bigrams(TRAIN, 6)
    unigram = -np.log(model.unigram(held_out[1:])).sum()
    bigram = -np.log(model.bigram(held_out[:-1], held_out[1:])).sum()
    found = ngram_baselines(TRAIN, held_out, 6, 20, unknown=2)
    assert found.unigram_loss == pytest.approx(unigram / 5)
    assert found.bigram_loss == pytest.approx(bigram / 5)
    assert found.unigram == pytest.approx(bits_per_byte(unigram, 20, 2))
    assert found.bigram == pytest.approx(bits_per_byte(bigram, 20, 2))
    monkeypatch.setattr(perplexity, "PIECE", 2)  # and however they are cut into pieces
    assert ngram_baselines(TRAIN, held_out, 6, 20, unknown=2) == found


def test_baselines_of_several_sources_and_a_lone_first_token():
    one = ngram_baselines([TRAIN, TRAIN[:4]], [TRAIN[2:5], TRAIN[4:]], 6, None, unscored=1)
    assert one.unigram is None
    model = Bigrams([TRAIN, TRAIN[:4]], 6)
    words = np.concatenate([TRAIN[3:5], TRAIN[5:]])
    nats = -np.log(model.unigram(words)).sum() + math.log(6)
    assert one.unigram_loss == pytest.approx(nats / (len(words) + 1))


def test_nothing_seen_is_uniform():
    found = ngram_baselines(np.array([0]), np.array([0, 1, 2]), 4, 2)
    assert found.unigram_loss == pytest.approx(math.log(4))
    assert found.bigram == pytest.approx(2.0)
