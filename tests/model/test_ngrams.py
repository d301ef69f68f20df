"""Tables of n-grams, held to a loop over the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.evaluate.checks import check
from assay.generate.engine import generate
from assay.model.cache import empty_cache
from assay.model.ngrams import ngram_rows, preceding
from assay.model.transformer import Transformer, named_parameters
from assay.spec import accounting, presets
from assay.train.step import uses_randomness

PLAIN = presets.shrink(presets.get("llama-3-8b").model)
SPEC = PLAIN.at("embedding.ngrams", {"orders": [3, 2], "rows": 5000})  # of 3 hashed, of 2 exact
TOKENS = np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 12)).astype(np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 12], np.int32)


def by_hand(ids: list[int], order: int, rows: int, vocab: int) -> int:
    """The row of the n-gram that ends a text, its last token first; Python's integers."""
    last = [ids[-1 - k] + 1 if k < len(ids) else 0 for k in range(order)]
    number = 0
    if (vocab + 1) ** order <= rows:
        for one in last:
            number = number * (vocab + 1) + one
        return number
    for one in last:
        number = (number * 0x9E3779B1 + one) % 2**32
    number = (number ^ (number >> 15)) * 0x85EBCA6B % 2**32
    return (number ^ (number >> 13)) % rows


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["stream", "documents"])
def test_rows_are_those_of_a_loop(order, segments):
    before = preceding(jnp.asarray(TOKENS), order - 1, segment_ids=segments)
    rows = np.asarray(ngram_rows((TOKENS, *before), 5000, SPEC.vocab_size))
    for b, row in enumerate(TOKENS.tolist()):
        for t in range(len(row)):
            start = 0 if segments is None else int(np.argmax(segments[b] == segments[b, t]))
            assert rows[b, t] == by_hand(row[start : t + 1], order, 5000, SPEC.vocab_size)


def test_where_there_is_room_each_ngram_has_its_own_row():
    pairs = np.array([[a, b] for a in range(7) for b in range(7)], np.int32)
    rows = np.asarray(ngram_rows((pairs, *preceding(jnp.asarray(pairs), 1)), 64, 7))
    assert len(set(rows.ravel().tolist())) == 49 + 7
    assert rows.max() < 64
    hashed = np.asarray(ngram_rows((pairs, *preceding(jnp.asarray(pairs), 1)), 63, 7))
    assert hashed.max() < 63
    assert len(set(hashed.ravel().tolist())) > 25


def test_the_tables_rows_are_added():
    model = Transformer(SPEC, rngs=jax.random.key(0))
    named = named_parameters(model)
    assert sum(leaf.size for leaf in named.values()) == accounting.parameters(SPEC).total
    positions = jnp.arange(12)
    x = model.embedding(jnp.asarray(TOKENS), positions, None)
    expected = np.asarray(named["embedding.table"])[TOKENS]
    for i, order in enumerate((3, 2)):
        table = np.asarray(named[f"embedding.ngrams.{i}"])
        for b, row in enumerate(TOKENS.tolist()):
            for t in range(12):
                at = by_hand(row[: t + 1], order, len(table), SPEC.vocab_size)
                expected[b, t] += table[at]
    np.testing.assert_allclose(x, expected, atol=1e-6)


def test_decoding_by_pieces_is_the_full_forward():
    model = Transformer(SPEC, rngs=jax.random.key(0))
    full = model(jnp.asarray(TOKENS))
    cache, made = empty_cache(SPEC, 2, 12), []
    for start, end in ((0, 1), (1, 2), (2, 7), (7, 12)):
        logits, cache = model(jnp.asarray(TOKENS[:, start:end]), cache=cache)
        made.append(logits)
    np.testing.assert_allclose(jnp.concatenate(made, axis=1), full, atol=1e-4)


def test_prompts_of_different_lengths_decode_as_each_alone():
    model = Transformer(SPEC, rngs=jax.random.key(0))
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :9].tolist()]
    together = generate(model, prompts, max_new_tokens=6, temperature=0.0)
    for prompt, ids in zip(prompts, together.ids, strict=True):
        alone = generate(model, [prompt], max_new_tokens=6, temperature=0.0)
        assert alone.ids[0] == ids


def test_the_check_passes():
    report = check(SPEC)
    assert report.passed, report
    assert "these n-grams are not in the batch" in str(report)


def test_dropout_falls_on_whole_rows_of_each_order_alone():
    spec = SPEC.at("embedding.ngrams", {"orders": [3, 2], "rows": 5000, "dropout": 0.5})
    embedding = Transformer(spec, rngs=jax.random.key(0)).embedding
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, spec.vocab_size, (20, 50)), jnp.int32)
    positions = jnp.arange(50)
    parts = []  # what each order adds to a token's vector
    for kept in (0, 1):
        other = jax.tree.map(lambda x: x, embedding)
        other.ngrams[1 - kept][...] = jnp.zeros_like(other.ngrams[1 - kept][...])
        whole = other(tokens, positions, None) - other.rows(tokens)
        trained = other(tokens, positions, jax.random.key(2)) - other.rows(tokens)
        gone = np.asarray(jnp.all(trained == 0, axis=-1))
        np.testing.assert_allclose(trained[~gone], 2 * whole[~gone], atol=1e-5)
        assert gone.mean() == pytest.approx(0.5, abs=0.07)
        parts.append(gone)
    assert (parts[0] == parts[1]).mean() == pytest.approx(0.5, abs=0.07)
    assert uses_randomness(spec)
    assert not uses_randomness(SPEC)
