"""Prefill and decode give the full forward's logits, for every preset (shrunk) and then some.

Axes: B batch, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.generate.engine import generate
from assay.model.cache import empty_cache
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    MlpSpec,
    QkNorm,
    Rope,
    SinusoidalPositions,
    StackSpec,
    TransformerSpec,
    YarnScaling,
)
from assay.spec.presets import PRESETS, shrink, vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

nano = PRESETS["nano"].model
gpt2 = PRESETS["gpt2"].model
(block,) = nano.decoder.pattern
local = block.replace(attention=block.attention.replace(window=40))
distant = block.replace(
    attention=block.attention.replace(positions=Rope(theta=1e6, scaling=LinearScaling(factor=8)))
)
SPECS = {
    name: shrink(preset.model) for name, preset in PRESETS.items() if preset.model.encoder is None
} | {
    "window": shrink(
        nano.replace(decoder=nano.decoder.replace(pattern=(local, distant), num_layers=5))
    ),
    "sinusoidal": shrink(
        gpt2.replace(embedding=EmbeddingSpec(positions=SinusoidalPositions(), norm=LayerNorm()))
    ),
    "yarn, capped": shrink(
        vary(
            nano,
            head=HeadSpec(tied=False, bias=True, softcap=5.0),
            block={
                "norm_position": "both",
                "attention": {
                    "positions": Rope(scaling=YarnScaling(factor=4, original_context=16)),
                    "softcap": 3.0,
                    "qk_norm": QkNorm(over="projection"),
                },
            },
        )
    ),
    "llama3 scaling, post": shrink(
        vary(
            nano,
            block={
                "norm_position": "post",
                "attention": {"positions": Rope(scaling=Llama3Scaling(original_context=16))},
            },
        )
    ),
    "some blocks without attention": TransformerSpec(
        vocab_size=61,
        vocab_multiple=8,
        d_model=32,
        context=64,
        embedding=EmbeddingSpec(positions=LearnedPositions(), scale_by_sqrt_width=True),
        decoder=StackSpec(
            pattern=(
                BlockSpec(attention=None, feed_forward=MlpSpec(hidden=(16, 24), bias=True)),
                BlockSpec(attention=AttentionSpec(heads=2), feed_forward=None),
            ),
            num_layers=3,
        ),
    ),
}


@jax.jit
def both_ways(model, tokens, lengths):
    """Full logits, and those of a padded prefill of `lengths` and then token by token."""
    full = model(tokens)
    cache = empty_cache(model.spec, tokens.shape[0], 32)
    prompt = max(LENGTHS)
    prefill, cache = model(tokens[:, :prompt], cache=cache)
    cache = cache.with_lengths(lengths)

    def one(cache, _):
        token = jnp.take_along_axis(tokens, cache.lengths[:, None], axis=1)
        logits, cache = model(token, cache=cache)
        return cache, logits[:, 0]

    _, steps = jax.lax.scan(one, cache, length=tokens.shape[1] - prompt)
    return full, prefill, steps


LENGTHS = (3, 8, 5)


PROMPTS = ([1, 2, 3], [7, 6, 5, 4, 3, 2, 1, 0], [9])


def same_when_shrunk() -> list:
    """Names by spec: presets that differ in size alone are one when shrunk, and tested once."""
    names = {}
    for name, spec in SPECS.items():
        names.setdefault(spec, []).append(name)
    return [pytest.param(spec, id=", ".join(group)) for spec, group in names.items()]


@pytest.mark.parametrize("spec", same_when_shrunk())
def test_cached_decoding_is_the_full_forward(spec, noisy):
    """One test for logits and greedy ids, so that the full forward is compiled once."""
    model = noisy(spec)
    tokens = np.random.default_rng(2).integers(0, spec.vocab_size, (3, 24), np.int32)
    full, prefill, steps = map(np.asarray, both_ways(model, tokens, jnp.array(LENGTHS)))
    assert full.std() > 0.01
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(prefill[row, :length], full[row, :length], atol=1e-4, rtol=0)
        decoded = full[row, length : length + len(steps)]
        np.testing.assert_allclose(steps[:, row], decoded, atol=1e-4, rtol=0)

    # Greedy ids are the argmax of the full forward recomputed for each token. The model being
    # causal, one forward of the outcome is every forward that led to it.
    result = generate(model, PROMPTS, max_new_tokens=16, temperature=0.0)
    rows = [[*prompt, *ids] for prompt, ids in zip(PROMPTS, result.ids, strict=True)]
    tokens = np.stack([np.pad(row, (0, 24 - len(row))) for row in rows]).astype(np.int32)
    logits = np.asarray(both_ways(model, tokens, jnp.array(LENGTHS))[0])
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for i, (prompt, ids) in enumerate(zip(PROMPTS, result.ids, strict=True)):
        places = np.arange(len(prompt) - 1, len(prompt) + 15)
        assert ids == logits[i, places].argmax(-1).tolist()
        np.testing.assert_allclose(result.logprobs[i], logprobs[i, places, ids], atol=1e-4, rtol=0)
    assert result.finish_reasons == ["length"] * 3
    assert result.notes == ()


@pytest.mark.parametrize("name", ["gpt2", "window", "bigram"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_the_same_alone(name, temperature, noisy):
    settings = {"max_new_tokens": 20, "temperature": temperature, "top_p": 0.9}
    together = generate(noisy(SPECS[name]), PROMPTS, seed=[3, 3, 8], **settings)
    for prompt, seed, ids in zip(PROMPTS, [3, 3, 8], together.ids, strict=True):
        assert generate(noisy(SPECS[name]), prompt, seed=seed, **settings).ids == [ids]
