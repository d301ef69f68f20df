"""Sampling rules against transformers' LogitsProcessors, and against the softmax itself."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from assay.errors import AssayError
from assay.generate import sampling

V = 50


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 3, (4, V)).astype(np.float32)


choose, warp, truncate = map(jax.jit, (sampling.choose, sampling.warp, sampling.truncate))


def rows(batch, **settings):
    return sampling.rules(batch, **settings)


def unseen(logits):
    return jnp.zeros(logits.shape, bool)


def kept(logits, *, top_k=0, top_p=1.0, min_p=0.0):
    """Ids that survive, for one row of logits."""
    row = jnp.asarray([logits], jnp.float32)
    out = truncate(row, jnp.array([top_k]), jnp.array([top_p]), jnp.array([min_p]))
    return np.flatnonzero(np.isfinite(out[0])).tolist()


SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": V + 10},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.3, "repetition_penalty": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_transformers(settings, logits):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    history = np.random.default_rng(1).integers(0, V, (4, 12))
    processors = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    theirs = transformers.LogitsProcessorList(
        make(settings[name]) for name, make in processors.items() if name in settings
    )(torch.tensor(history), torch.tensor(logits))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, history, True, axis=1)
    ours = warp(jnp.asarray(logits), jnp.asarray(seen), rows(4, **settings))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
    np.testing.assert_allclose(
        jax.nn.softmax(ours), torch.softmax(theirs, -1).numpy(), atol=1e-6, rtol=0
    )


@hypothesis.settings(max_examples=60)
@given(
    hnp.arrays(np.float32, 12, elements=st.integers(-4, 4).map(float)),
    st.floats(0.01, 1.0),
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(row, p):
    """Small integers, so that ties are frequent."""
    probs = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
    ids = kept(row, top_p=p)
    descending = np.sort(probs)[::-1]
    mass = probs[ids].sum()
    assert mass >= p - 1e-5
    assert len(ids) == 1 or descending[: len(ids) - 1].sum() <= p + 1e-5 or p >= 1
    np.testing.assert_allclose(np.sort(probs[ids])[::-1], descending[: len(ids)])


@pytest.mark.parametrize(
    ("logits", "cuts", "ids"),
    [
        ([0.0, 0, 0, 0], {"top_p": 0.5}, [0, 1]),  # ties: the lower ids
        ([0.0, 0, 0, 0], {"top_p": 0.51}, [0, 1, 2]),
        ([0.0, 0, 0, 0], {"top_p": 1.0}, [0, 1, 2, 3]),
        ([0.0, 0, 0, 0], {"top_p": 1e-6}, [0]),
        ([0.0, -0.0, 0.0], {"top_p": 0.5}, [0, 1]),  # there is one zero
        ([9.0, 0, 0], {"top_p": 0.5}, [0]),
        ([-9.0, 0, 5], {"top_p": 1e-6}, [2]),  # always one
        ([1.0, 3, 2, 3], {"top_k": 1}, [1, 3]),  # ties with the last: kept, as in transformers
        ([1.0, 3, 2, 3], {"top_k": 3}, [1, 2, 3]),
        ([1.0, 3, 2, 3], {"top_k": 9}, [0, 1, 2, 3]),
        ([-1.0, -3, -2], {"top_k": 2}, [0, 2]),
        ([0.0, 0, -1], {"min_p": 1.0}, [0, 1]),
        ([0.0, 0, -1], {"min_p": 0.36}, [0, 1, 2]),
        ([0.0, 0, -1], {"min_p": 0.37}, [0, 1]),
        ([0.0, -np.inf, -1], {"top_k": 3}, [0, 2]),
        ([2.0, 1, 0, 0], {"top_k": 2, "top_p": 0.74}, [0, 1]),  # of what top-k kept: .73, .27
        ([2.0, 1, 0, 0], {"top_k": 2, "top_p": 0.73}, [0]),
        ([1e30, 1e30, -1e30], {"top_p": 0.6}, [0, 1]),
    ],
)
def test_edges(logits, cuts, ids):
    assert kept(logits, **cuts) == ids


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 2.0}, {"top_p": 0.7}, {"top_k": 3, "temperature": 0.5}],
    ids=str,
)
def test_draws_follow_the_softmax(settings):
    draws = 20_000
    row = jnp.asarray([[1.0, 0.2, -0.5, 0.9, -3.0, 0.0, 0.3]])
    warped = np.asarray(warp(row, unseen(row), rows(1, **settings)), np.float64)[0]
    expected = np.exp(warped) / np.exp(warped).sum()
    many = jnp.broadcast_to(row, (draws, 7))
    ids = choose(many, unseen(many), rows(draws, **settings), jnp.zeros((draws,), jnp.int32))
    counts = np.bincount(ids, minlength=7)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], draws * expected[possible]).pvalue > 1e-3
    # The same over positions, with one seed.
    rules = rows(1, seed=5, **settings)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws,)), rules)
    ids = choose(many, unseen(many), same, jnp.arange(draws))
    counts = np.bincount(ids, minlength=7)
    assert stats.chisquare(counts[possible], draws * expected[possible]).pvalue > 1e-3


def test_greedy_is_argmax(logits):
    rules = rows(4, temperature=0.0, top_k=3, seed=9)
    ids = choose(jnp.asarray(logits), unseen(logits), rules, jnp.arange(4))
    np.testing.assert_array_equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37])
def test_a_temperature_near_zero_is_greedy_too(temperature, logits):
    rules = rows(4, temperature=temperature, top_p=0.9)
    ids = choose(jnp.asarray(logits), unseen(logits), rules, jnp.arange(4))
    np.testing.assert_array_equal(ids, logits.argmax(-1))


def test_a_row_does_not_depend_on_the_others(logits):
    """Each row has rules of its own; alone, it gives the same token."""
    mixed = {
        "temperature": [0.0, 1.0, 1.5, 0.7],
        "top_k": [None, 7, None, 2],
        "top_p": [0.3, None, None, 0.9],
        "min_p": [None, None, None, 0.01],
        "repetition_penalty": [1.0, 1.0, 1.3, 1.0],
        "seed": [4, 4, 5, 6],
    }
    positions = jnp.array([3, 9, 1, 2], jnp.int32)
    x = jnp.asarray(logits)
    together = choose(x, x > 1, rows(4, **mixed), positions)
    for i in range(4):
        rules = rows(1, **{name: values[i] for name, values in mixed.items()})
        one = slice(i, i + 1)
        assert choose(x[one], x[one] > 1, rules, positions[one])[0] == together[i]


def test_settings_never_recompile(logits):
    traced = jax.jit(partial(sampling.choose))
    for settings in SETTINGS:
        traced(jnp.asarray(logits), unseen(logits), rows(4, **settings), jnp.arange(4))
    assert traced._cache_size() == 1


def test_one_seed_gives_rows_of_their_own():
    a, b = rows(3, seed=2**32 - 2), rows(3, seed=[2**32 - 2, 2**32 - 1, 0])
    assert (jax.random.key_data(a.keys) == jax.random.key_data(b.keys)).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"temperature": -1},
            "temperature: found -1, but it must be finite, at least 0 (0: greedy).",
        ),
        ({"temperature": float("inf")}, "temperature: found inf, but it must be finite"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"top_p": 0}, "top_p: found 0, but it must be over 0 and at most 1."),
        ({"top_p": "0.5"}, "top_p: found '0.5'"),
        ({"top_k": 2.5}, "top_k: found 2.5, but it must be a whole number"),
        ({"min_p": 2}, "min_p: found 2, but it must be from 0 to 1."),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0"),
        ({"seed": -1}, "seed: found -1"),
        ({"top_k": [1, 2, 3]}, "top_k: found 3 values for 2 prompts."),
        ({"topp": 1}, "topp: there is no such setting; did you mean 'top_p'"),
    ],
    ids=str,
)
def test_bad_settings_get_a_sentence(settings, sentence):
    with pytest.raises(AssayError) as error:
        sampling.rules(2, **settings)
    assert sentence in str(error.value)
