"""A model made ready to decode computes what the model does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import assay.generate.engine as engine
from assay.errors import AssayError
from assay.generate.engine import Generator, generate
from assay.model import native
from assay.model.decoding import prepare, quantise
from assay.model.transformer import named_parameters
from assay.spec.model import HeadSpec
from assay.spec.presets import PRESETS, shrink, vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NANO = shrink(PRESETS["nano"].model)
(BLOCK,) = NANO.decoder.pattern
LOCAL = BLOCK.replace(attention=BLOCK.attention.replace(window=4))
SPECS = {
    "dense": shrink(PRESETS["gpt2"].model),  # biases, no gate, learned positions
    "grouped": shrink(PRESETS["smollm-135m"].model),
    "experts": shrink(PRESETS["mixtral-8x7b"].model),
    "windows": NANO.replace(decoder=NANO.decoder.replace(pattern=(LOCAL, BLOCK), num_layers=3)),
    "head of its own, capped": vary(
        NANO,
        head=HeadSpec(tied=False, bias=True, softcap=5.0),
        block={"attention": {"softcap": 3.0}},
    ),
}
PROMPTS = ([1, 2, 3], [7, 6, 5, 4, 3, 2, 1, 0], [9])
GREEDY = {"max_new_tokens": 12, "temperature": 0.0}


@pytest.mark.parametrize("name", SPECS)
def test_the_fast_forms_give_the_same(name, noisy):
    fast = generate(noisy(SPECS[name], kernels="cpu"), PROMPTS, **GREEDY)
    plain = generate(noisy(SPECS[name], kernels="plain"), PROMPTS, **GREEDY)
    assert fast.ids == plain.ids
    for ours, theirs in zip(fast.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    alone = generate(noisy(SPECS[name], kernels="cpu"), PROMPTS[0], **GREEDY)  # one row
    assert alone.ids == plain.ids[:1]


def test_a_full_forward_is_the_models(noisy):
    """Prefill and training's forward share the forms: many tokens a row."""
    model = noisy(SPECS["grouped"], kernels="cpu")
    tokens = np.random.default_rng(0).integers(64, size=(2, 16), dtype=np.int32)
    forward = jax.jit(lambda m: m(tokens))
    np.testing.assert_allclose(forward(prepare(model)), forward(model), atol=1e-4, rtol=0)


def test_bfloat16_weights_are_the_rounded_ones(noisy):
    model = noisy(SPECS["grouped"], dtype="bfloat16", kernels="cpu")
    named = named_parameters(model)
    ready = prepare(model, native_calls=False)
    qkv = [named[f"layers.0.attention.{part}.w"] for part in "qkv"]
    wanted = jnp.concatenate(qkv, axis=1).T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(ready.layers[0].attention.qkv.w[...], wanted)
    table = named["embedding.table"]
    np.testing.assert_array_equal(ready.head.projection.w[...], table.astype(jnp.bfloat16))
    np.testing.assert_array_equal(ready.embedding.table[...], table)


def test_quantised_rows_come_back_within_half_a_step():
    x = np.random.default_rng(0).standard_normal((7, 33)).astype(np.float32)
    x[3] = 0
    q, factor = map(np.asarray, quantise(jnp.asarray(x)))
    assert q.dtype == np.int8
    assert (np.abs(q).max(axis=1) == [127, 127, 127, 0, 127, 127, 127]).all()
    assert (np.abs(x - q * factor[:, None]) <= factor[:, None] * 0.5001).all()


@pytest.mark.parametrize("name", ["dense", "grouped", "experts"])
def test_int8_is_near_and_keeps_the_contract(name, noisy):
    model = noisy(SPECS[name])
    generator = Generator(model, weights="int8")
    result = generate(generator, PROMPTS, **GREEDY)
    exact, ready = jax.jit(lambda m, t: m(t)), prepare(model, "int8")
    for prompt, ids, logprobs in zip(PROMPTS, result.ids, result.logprobs, strict=True):
        assert generate(generator, prompt, **GREEDY).ids == [ids]  # alone
        tokens = np.array([[*prompt, *ids]], np.int32)
        places = np.arange(len(prompt) - 1, len(prompt) + 11)
        full = np.asarray(exact(ready, tokens))[0, places]
        assert ids == full.argmax(-1).tolist()  # cached decoding is the full forward
        chosen = np.asarray(jax.nn.log_softmax(full))[np.arange(12), ids]
        # Entries on the border of two integers may round either way.
        np.testing.assert_allclose(logprobs, chosen, atol=0.05, rtol=0)
        floats = np.asarray(exact(model, tokens))[0, places]
        assert np.corrcoef(full.ravel(), floats.ravel())[0, 1] > 0.98
        assert np.abs(full - floats).max() > 1e-5  # something was rounded


def test_bytes_are_counted(noisy, monkeypatch):
    monkeypatch.setattr(native, "build", lambda: (False, "packed weights are filled up"))
    spec = SPECS["grouped"]
    params = sum(leaf.size for leaf in jax.tree.leaves(noisy(spec)))
    floats, small = (Generator(noisy(spec), weights=w) for w in (None, "int8"))
    table = spec.padded_vocab * spec.d_model
    assert floats.bytes_read == 4 * params
    assert floats.weight_bytes == 4 * (params + table)  # the tied table in two forms
    assert small.bytes_read < 0.35 * floats.bytes_read
    with pytest.raises(AssayError, match="weights: found 'int4' in a float32 model"):
        Generator(noisy(spec), weights="int4")


def test_the_cache_grows(noisy, monkeypatch):
    """From few slots to many, with the same ids and nothing lost; rows end at their own time."""
    model = noisy(SPECS["windows"])
    settings = {"max_new_tokens": [150, 40, 149], "temperature": 0.0}
    long = generate(model, PROMPTS, **settings)
    monkeypatch.setattr(engine, "FIRST_SLOTS", 16)
    session = Generator(model).start(PROMPTS, **settings)
    sizes = set()
    while not session.done:
        session.advance(7)
        sizes.add(session._memory.cache.capacity)
    assert sizes == {64, 128, 256}
    grown = session.result()
    assert grown.ids == long.ids
    for ours, theirs in zip(grown.logprobs, long.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert generate(model, PROMPTS, **settings).ids == long.ids  # in one call
