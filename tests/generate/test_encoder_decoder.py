"""Generation with an encoder, and beams: against the full forward; transformers' in parity."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.data.tokenizers import ByteTokenizer
from assay.errors import AssayError
from assay.generate.beams import NEVER, beam_search
from assay.generate.engine import Generator, generate
from assay.generate.text import complete, complete_by_beams
from assay.spec.presets import PRESETS, shrink

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SPECS = {
    name: shrink(PRESETS[name].model) for name in ("transformer-base", "jaxformers", "t5-small")
}
SOURCES = ([5, 9, 2, 33, 7], [4, 4], [60, 1, 17, 23, 42, 8, 11, 3, 9])
START, NEW = 1, 9
GREEDY = {"max_new_tokens": NEW, "temperature": 0, "start_token": START}


def full_logits(model, sources, targets) -> np.ndarray:
    """Of padded sources and targets, by one forward without a cache."""
    width = max(map(len, sources))
    source = np.stack([np.pad(s, (0, width - len(s))) for s in sources]).astype(np.int32)
    mask = np.arange(width) < np.array([len(s) for s in sources])[:, None]
    length = max(map(len, targets))
    tokens = np.stack([np.pad(t, (0, length - len(t))) for t in targets]).astype(np.int32)
    forward = jax.jit(lambda m, t, s, k: m(t, source=s, source_mask=k))
    return np.asarray(forward(model, tokens, source, mask))


@pytest.mark.parametrize("name", SPECS)
def test_greedy_is_the_argmax_of_the_full_forward(name, noisy):
    model = noisy(SPECS[name])
    result = generate(model, SOURCES, **GREEDY)
    targets = [[START, *ids] for ids in result.ids]
    logits = full_logits(model, SOURCES, targets)
    for row, ids in enumerate(result.ids):
        assert len(ids) == NEW
        top = logits[row, :NEW].max(axis=-1)
        chosen = logits[row, np.arange(NEW), ids]
        np.testing.assert_allclose(chosen, top, atol=1e-4)
        logprobs = np.asarray(jax.nn.log_softmax(logits[row, :NEW]))[np.arange(NEW), ids]
        np.testing.assert_allclose(result.logprobs[row], logprobs, atol=1e-4)


def test_it_ends_at_the_end_token(noisy):
    """Fault of jaxformers: `end_token` was accepted and never read."""
    model = noisy(SPECS["t5-small"])
    free = generate(model, SOURCES, **GREEDY).ids
    end = free[0][4]
    result = generate(model, SOURCES, **GREEDY, end_token=end)
    for ids, all_ids, reason in zip(result.ids, free, result.finish_reasons, strict=True):
        stops = end in all_ids
        assert ids == (all_ids[: all_ids.index(end)] if stops else all_ids)
        assert reason == ("stop" if stops else "length")


def test_each_row_is_as_if_alone(noisy):
    generator = Generator(noisy(SPECS["t5-small"]))
    settings = {"max_new_tokens": NEW, "temperature": 0.8, "start_token": START}
    together = generate(generator, SOURCES, **settings, seed=[3, 4, 5])
    for source, seed, ids in zip(SOURCES, (3, 4, 5), together.ids, strict=True):
        assert generate(generator, source, **settings, seed=seed).ids == [ids]
    assert together.ids != generate(generator, SOURCES, **settings, seed=[6, 7, 8]).ids


def test_no_token_compiles_anything(noisy):
    generator = Generator(noisy(SPECS["t5-small"]))
    session = generator.start(SOURCES, max_new_tokens=20, temperature=0, start_token=START)
    session.advance(1)
    with jax.log_compiles(False), jax.numpy_rank_promotion("raise"):
        before = len(generator.decode.compiled)
        while not session.done:
            session.advance(1)
    assert len(generator.decode.compiled) == before


def test_the_source_is_encoded_once(noisy):
    """The decoding program has no product with an encoder's weight: it asks for none of them."""
    model = noisy(SPECS["t5-small"])
    tokens, source = jnp.ones((2, 1), jnp.int32), jnp.ones((2, 5), jnp.int32)
    from assay.model.cache import empty_cache

    _, cache = model(tokens, cache=empty_cache(model.spec, 2, 8), source=source)
    assert cache.source.mask.shape == (2, 5)
    pullback = jax.grad(lambda m: jnp.sum(m(tokens, cache=cache)[0]))(model)
    from assay.model.transformer import named_parameters

    for name, gradient in named_parameters(pullback).items():
        if name.startswith("encoder.") or ".cross.k" in name or ".cross.v" in name:
            assert not np.asarray(gradient).any(), name


# ---------------------------------------------------------------------------- beams


def test_as_many_beams_as_sequences_find_the_best(noisy):
    """Of 3 tokens each 3 long, all 27 targets are tried: the first beam is the likeliest."""
    spec = SPECS["t5-small"].replace(vocab_size=3, vocab_multiple=1)
    model, source = noisy(spec), [2, 0, 1]
    found = beam_search(
        model, source, beams=3, max_new_tokens=2, start_token=0, length_penalty=0.0
    ).rows[0]
    every = [list(ids) for ids in itertools.product(range(3), repeat=2)]
    logits = full_logits(model, [source] * len(every), [[0, *ids] for ids in every])
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    totals = {
        tuple(ids): logprobs[i, 0, ids[0]] + logprobs[i, 1, ids[1]] for i, ids in enumerate(every)
    }
    best = sorted(totals, key=totals.get, reverse=True)[:3]
    assert [tuple(beam.ids) for beam in found] == best
    np.testing.assert_allclose([b.score for b in found], [totals[ids] for ids in best], atol=1e-4)


def test_rows_of_beams_are_as_if_alone(noisy):
    generator = Generator(noisy(SPECS["jaxformers"]))
    how = {"beams": 3, "start_token": START, "end_token": 7}
    together = beam_search(generator, SOURCES, **how, max_new_tokens=[4, 9, 6]).rows
    for source, new, row in zip(SOURCES, (4, 9, 6), together, strict=True):
        (alone,) = beam_search(generator, source, **how, max_new_tokens=new).rows
        assert [b.ids for b in alone] == [b.ids for b in row]
        assert all(len(b.ids) <= new and b.score > NEVER / 2 for b in row)


def test_one_beam_is_greedy(noisy):
    generator = Generator(noisy(SPECS["transformer-base"]))
    found = beam_search(generator, SOURCES, beams=1, max_new_tokens=NEW, start_token=START)
    assert [row[0].ids for row in found.rows] == generate(generator, SOURCES, **GREEDY).ids
    decoder = Generator(noisy(shrink(PRESETS["nano"].model)))
    found = beam_search(decoder, SOURCES, beams=1, max_new_tokens=NEW)
    greedy = generate(decoder, SOURCES, max_new_tokens=NEW, temperature=0)
    assert [row[0].ids for row in found.rows] == greedy.ids


def test_text(noisy):
    """A source goes in with the end token behind it; targets come out as text."""
    spec = PRESETS["nano-seq2seq"].model
    model, tokenizer = noisy(shrink(spec).replace(vocab_size=257)), ByteTokenizer()
    how = {"max_new_tokens": 5}
    done = complete(model, tokenizer, "abc", temperature=0, **how)
    ids = generate(
        model, [97, 98, 99, 256], **how, temperature=0, start_token=256, end_token=256
    ).ids
    assert done.ids == ids[0]
    assert done.prompt_tokens == 4
    ((best, *_),) = complete_by_beams(model, tokenizer, ["abc"], beams=1, **how)
    assert (best.text, best.ids) == (done.text, done.ids)
    assert best.score < 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, _: generate(m, [1], max_new_tokens=1), "start_token: the model has an encoder"),
        (lambda m, _: generate(m, [1], max_new_tokens=1, start_token=99), "start_token: token id"),
        (lambda _, d: generate(d, [1], max_new_tokens=1, start_token=1), "start_token: found 1"),
        (
            lambda m, _: generate(m, [1], max_new_tokens=1, start_token=1, end_token=-4),
            "end_token: token id -4",
        ),
        (lambda _, d: beam_search(d, [1], beams=0, max_new_tokens=1), "beams: found 0"),
        (
            lambda _, d: beam_search(d, [1], beams=2, max_new_tokens=1, length_penalty=np.inf),
            "length_penalty: found inf",
        ),
    ],
    ids=["no-start", "start-outside", "start-of-a-decoder", "end-outside", "no-beams", "penalty"],
)
def test_what_is_refused(call, said, noisy):
    with pytest.raises(AssayError, match=said):
        call(noisy(SPECS["t5-small"]), noisy(shrink(PRESETS["nano"].model)))
