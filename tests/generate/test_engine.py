"""The engine: one program, nothing recompiled, the cache in place, and where a row ends."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from assay.errors import AssayError
from assay.generate.engine import Generator, context_notes, generate, stream
from assay.model.transformer import merge_named, named_parameters
from assay.spec.presets import PRESETS, shrink, vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NANO, GPT2 = (shrink(PRESETS[name].model) for name in ("nano", "gpt2"))
PROMPTS = ([1, 2, 3], [7, 6, 5, 4, 3, 2, 1, 0], [9])


@pytest.fixture(scope="module")
def nano(noisy):
    return Generator(noisy(NANO))


@pytest.fixture
def compilations():
    """Seconds of every compilation of XLA's since the test began."""
    seconds = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_recompiled(nano, noisy, compilations):
    """Not for a token, a setting, a seed, a length, a prompt in the same bucket, another model."""
    generate(nano, PROMPTS, max_new_tokens=10)
    list(stream(nano, PROMPTS, max_new_tokens=10))
    compilations.clear()
    generate(nano, PROMPTS, max_new_tokens=20, temperature=0.0, seed=3)
    generate(nano, [[5], [6] * 7, [4]], max_new_tokens=[7, 24, 1], top_k=5, top_p=0.3, min_p=0.1)
    generate(nano, PROMPTS, max_new_tokens=9, repetition_penalty=1.5, stop_tokens=(1, 2, 3, 4))
    assert len(list(stream(nano, PROMPTS, max_new_tokens=12))) == 12
    assert len(list(stream(nano, PROMPTS, max_new_tokens=12, chunk=4))) == 4
    named = named_parameters(noisy(NANO))
    other = merge_named(noisy(NANO), dict(named))
    generate(other, PROMPTS, max_new_tokens=8)
    assert compilations == []
    generate(nano, [[1] * 9], max_new_tokens=8)  # another bucket: the counter counts
    assert len(compilations) >= 2


def test_the_cache_is_donated_and_stays_in_place(nano):
    session = nano.start(PROMPTS, max_new_tokens=12)
    session.advance(1)
    before = session._memory
    places = [layer.keys.unsafe_buffer_pointer() for layer in before.cache.layers]
    session.advance(3)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    after = [layer.keys.unsafe_buffer_pointer() for layer in session._memory.cache.layers]
    assert after == places


def test_the_loop_ends_when_all_rows_have(nano):
    """2^30 steps would take weeks."""
    session = nano.start(PROMPTS, max_new_tokens=[2, 5, 3])
    session.advance(2**30)
    assert session.done
    assert [len(ids) for ids in session.result().ids] == [2, 5, 3]
    np.testing.assert_array_equal(session._memory.cache.lengths, [4, 12, 3])  # but the last token


def test_seeds_reproduce(nano):
    def ids(seed):
        return generate(nano, [[1, 2]] * 3, max_new_tokens=16, seed=seed).ids

    first = ids(7)
    assert first == ids(7)
    assert first != ids(8)
    assert len({tuple(row) for row in first}) == 3  # one seed, three samples
    assert ids([7, 7, 9]) == [first[0], first[0], first[2]]


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_streaming_gives_the_same(chunk, nano):
    settings = {"max_new_tokens": 17, "top_p": 0.9, "seed": 1, "stop_tokens": [3, 10]}
    rows = [[], [], []]
    for news in stream(nano, PROMPTS, chunk=chunk, **settings):
        assert max(map(len, news)) <= chunk
        for row, ids in zip(rows, news, strict=True):
            row += ids
    assert rows == generate(nano, PROMPTS, **settings).ids


def test_stop_tokens_end_a_row_and_are_left_out(nano):
    free = generate(nano, PROMPTS, max_new_tokens=20, temperature=0.0)
    stop = free.ids[1][6]
    stopped = generate(nano, PROMPTS, max_new_tokens=20, temperature=0.0, stop_tokens=[63, stop])
    for before, after, why in zip(free.ids, stopped.ids, stopped.finish_reasons, strict=True):
        ends = [i for i, token in enumerate(before) if token in (63, stop)]
        assert after == before[: ends[0] if ends else 20]
        assert why == ("stop" if ends else "length")
    assert "stop" in stopped.finish_reasons
    first = generate(nano, PROMPTS[0], max_new_tokens=5, temperature=0.0, stop_tokens=free.ids[0])
    assert (first.ids, first.finish_reasons, first.logprobs) == ([[]], ["stop"], [[]])


def test_repetition_penalty_sees_prompt_and_output(nano):
    """A huge penalty turns every seen token's logit to nothing: none comes twice."""
    result = generate(
        nano, [list(range(8))], max_new_tokens=20, temperature=0.0, repetition_penalty=1e9
    )
    plain = generate(nano, [list(range(8))], max_new_tokens=20, temperature=0.0)
    (ids,), (free,) = result.ids, plain.ids
    assert len(set(ids)) == 20
    assert len(set(free)) < 20
    # A logit that is positive becomes about 0, so a seen token may only win where all are below.
    assert not set(ids) & set(range(8))


def test_scanned_models_give_the_same(noisy):
    spec = NANO.replace(decoder=NANO.decoder.replace(num_layers=3))
    plain, scanned = noisy(spec), noisy(spec, scan_layers=True)
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    assert generate(plain, PROMPTS, **settings) == generate(scanned, PROMPTS, **settings)


def test_bfloat16(noisy):
    """Close to float32. What becomes of the weights: `test_decoding.py`."""
    model = noisy(NANO, dtype="bfloat16")
    generator = Generator(model)
    result = generate(generator, PROMPTS, max_new_tokens=16, temperature=0.0)
    rows = [[*prompt, *ids] for prompt, ids in zip(PROMPTS, result.ids, strict=True)]
    tokens = np.stack([np.pad(row, (0, 24 - len(row))) for row in rows])
    logits = jax.jit(lambda m, t: m(t))(noisy(NANO), jnp.asarray(tokens))
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for i, (prompt, ids) in enumerate(zip(PROMPTS, result.ids, strict=True)):
        places = np.arange(len(prompt) - 1, len(prompt) + 15)
        np.testing.assert_allclose(result.logprobs[i], logprobs[i, places, ids], atol=0.3)
    session = generator.start(PROMPTS, max_new_tokens=4)
    assert session._memory.cache.layers[0].keys.dtype == jnp.bfloat16


def test_a_cache_of_another_dtype(nano, noisy):
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    exact = generate(nano, PROMPTS, **settings)
    half = generate(noisy(NANO), PROMPTS, cache_dtype="bfloat16", **settings)
    np.testing.assert_allclose(half.logprobs[0][:2], exact.logprobs[0][:2], atol=0.1)
    with pytest.raises(AssayError, match="cache_dtype: found 'bfloat'; did you mean 'bfloat16'"):
        generate(noisy(NANO), PROMPTS, cache_dtype="bfloat", **settings)


def test_learned_positions_end_at_the_context(noisy):
    model = noisy(GPT2.replace(context=20))  # no power of two: the prompt's bucket would overrun
    full = generate(model, [list(range(17)), [1]], max_new_tokens=[3, 19], temperature=0.0)
    assert [len(ids) for ids in full.ids] == [3, 19]
    assert full.notes == ()
    with pytest.raises(AssayError) as error:
        generate(model, [list(range(17)), [1]], max_new_tokens=4)
    assert str(error.value) == (
        "max_new_tokens: 17 prompt tokens and 4 new ones are 21, but the model's learned "
        "positions end at 20; at most 3 new ones fit."
    )


def test_one_token_is_not_called_tokens(noisy):
    with pytest.raises(AssayError, match="1 prompt token and 20 new ones are 21"):
        generate(noisy(GPT2.replace(context=20)), [[1]], max_new_tokens=20)


def test_other_positions_may_run_past_it_with_a_note(nano):
    result = generate(nano, [[1, 2], [3]], max_new_tokens=70)
    assert [len(ids) for ids in result.ids] == [70, 70]
    assert result.notes == (
        "2 prompt tokens and 70 new ones are 72, past the 64 that the model was made for: "
        "quality may suffer.",
    )


def test_a_text_that_ended_in_time_has_no_note(nano):
    greedy = {"max_new_tokens": 70, "temperature": 0.0}
    (ids,) = generate(nano, [[1, 2]], **greedy).ids
    ended = generate(nano, [[1, 2]], **greedy, stop_tokens=[ids[5]])
    assert len(ended.ids[0]) <= 5
    assert ended.notes == ()


def test_the_token_that_a_target_begins_with_is_no_prompt():
    spec = PRESETS["nano-seq2seq"].model
    lengths, most = np.array([1]), spec.context
    assert context_notes(spec, lengths, np.array([most - 1])) == ()
    assert context_notes(spec, lengths, np.array([most])) == (
        f"the token that a target begins with and {most} new ones are {most + 1}, past the {most} "
        f"that the model was made for: quality may suffer.",
    )


def test_dropout_is_off(noisy):
    rate = {"dropout": 0.5, "attention": {"dropout": 0.5}}
    dropping = noisy(vary(NANO, block=rate))
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    assert generate(dropping, PROMPTS, **settings) == generate(noisy(NANO), PROMPTS, **settings)


def test_timing_counts_what_it_says(nano):
    timing = generate(nano, PROMPTS, max_new_tokens=[9, 4, 1]).timing
    assert timing.decode_tokens == 8 + 3 + 0
    assert timing.time_to_first_token > 0
    assert timing.tokens_per_second == timing.decode_tokens / timing.decode_seconds
    assert generate(nano, PROMPTS, max_new_tokens=1).timing.tokens_per_second is None


@pytest.mark.parametrize(
    ("prompts", "settings", "sentence"),
    [
        ([], {}, "prompt 0: found no tokens; generation starts from at least one."),
        ([[1], []], {}, "prompt 1: found no tokens"),
        ([[1], [64]], {}, "prompt 1: token id 64 is outside the vocabulary of 64."),
        ([[1], [-1]], {}, "prompt 1: token id -1 is outside"),
        ([[0.5]], {}, "prompt 0: found no list of token ids."),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: found 0, but it must be a whole number"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens: found 2.5, but it must be a whole number"),
        ([1], {"max_new_tokens": [3, 4]}, "max_new_tokens: found 2 values for 1 prompts."),
        ([1], {"stop_tokens": [99]}, "stop_tokens: token id 99 is outside"),
        ([1], {"temperature": -1}, "temperature: found -1"),
    ],
    ids=str,
)
def test_bad_input_gets_a_sentence(prompts, settings, sentence, nano):
    with pytest.raises(AssayError) as error:
        generate(nano, prompts, **{"max_new_tokens": 4, **settings})
    assert sentence in str(error.value)


def test_a_broken_model_gets_a_sentence(noisy):
    named = named_parameters(noisy(NANO))
    named["final_norm.scale"] = jnp.full_like(named["final_norm.scale"], jnp.nan)
    with pytest.raises(AssayError, match=r"prompt 0: the logits for new token 1 are not finite"):
        generate(merge_named(noisy(NANO), named), PROMPTS, max_new_tokens=4)


def test_a_model_that_sees_the_future_is_refused(noisy):
    spec = NANO.replace(decoder=NANO.decoder.replace(causal=False))
    with pytest.raises(AssayError, match=r"decoder\.causal: found false"):
        generate(noisy(spec), [1], max_new_tokens=4)
