"""Counts from the spec against published figures, the real arrays, and XLA's own FLOPs."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.model.loss import token_losses
from assay.model.transformer import abstract, named_parameters
from assay.spec import accounting, presets
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNorm,
    LearnedPositions,
    MlpSpec,
    NoPositions,
    QkNorm,
    RmsNorm,
    Rope,
    SinusoidalPositions,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import ComputeSpec

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "vgpt": 124_439_808,
    "smollm-135m": 134_515_008,
    "smollm-360m": 361_821_120,
    "llama-3-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
}

# JaxPT's own figures, in millions, as its README prints them.
PRINTED = {
    "gpt": "124.48",
    "nope-gpt": "123.69",
    "glu-gpt": "152.74",
    "rope-gpt": "123.69",
    "glu-rope-gpt": "151.95",
    "gqa-gpt": "82.72",
    "gqa-glu-rope-gpt": "142.48",
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_counts(name, count):
    assert accounting.parameters(presets.get(name).model).total == count


@pytest.mark.parametrize(("name", "millions"), PRINTED.items())
def test_printed_counts(name, millions):
    assert f"{accounting.parameters(presets.get(name).model).total / 1e6:.2f}" == millions


def counted(spec, **compute):
    """Parameters by part of the real arrays' shapes."""
    parts = dict.fromkeys(accounting.PARTS, 0)
    for name, leaf in named_parameters(abstract(spec, ComputeSpec(**compute))).items():
        parts[accounting.part_of(name)] += math.prod(leaf.shape)
    return parts


def totals(spec):
    return {part: count.total for part, count in accounting.parameters(spec).parts.items()}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_equal_the_arrays(name):
    spec = presets.get(name).model
    assert totals(spec) == counted(spec)


norms = st.one_of(
    st.builds(LayerNorm, scale=st.booleans(), bias=st.booleans()),
    st.builds(RmsNorm, scale=st.booleans()),
)


@st.composite
def blocks(draw):
    kv_heads = draw(st.sampled_from([1, 2]))
    attention = AttentionSpec(
        heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([None, 6])),
        positions=draw(st.sampled_from([NoPositions(), Rope()])),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        qk_norm=draw(
            st.one_of(
                st.none(),
                st.builds(QkNorm, norm=norms, over=st.sampled_from(["head", "projection"])),
            )
        ),
    )
    gated = draw(st.booleans())
    hidden = draw(st.sampled_from([12, (12,)] if gated else [12, (10, 20), (8, 8, 8)]))
    feed_forward = MlpSpec(hidden=hidden, gated=gated, bias=draw(st.booleans()))
    missing = draw(st.sampled_from([None, "attention", "feed_forward"]))
    return BlockSpec(
        attention=None if missing == "attention" else attention,
        feed_forward=None if missing == "feed_forward" else feed_forward,
        norm=draw(norms),
        norm_position=draw(st.sampled_from(["pre", "post", "both"])),
    )


@st.composite
def specs(draw):
    pattern = tuple(draw(st.lists(blocks(), max_size=2)))
    return TransformerSpec(
        vocab_size=draw(st.integers(1, 40)),
        vocab_multiple=draw(st.sampled_from([1, 16])),
        d_model=8,
        context=draw(st.integers(1, 20)),
        embedding=EmbeddingSpec(
            positions=draw(
                st.sampled_from([NoPositions(), LearnedPositions(), SinusoidalPositions()])
            ),
            norm=draw(st.one_of(st.none(), norms)),
        ),
        decoder=StackSpec(
            pattern=pattern,
            num_layers=len(pattern) and draw(st.integers(len(pattern), 5)),
            final_norm=draw(st.one_of(st.none(), norms)),
        ),
        head=HeadSpec(tied=draw(st.booleans()), bias=draw(st.booleans())),
    )


@settings(max_examples=40, deadline=None)
@given(specs(), st.booleans())
def test_any_spec_equals_the_arrays(spec, scan_layers):
    assert totals(spec) == counted(spec, scan_layers=scan_layers)
    parameters = accounting.parameters(spec)
    assert parameters.active == parameters.total


# ---------------------------------------------------------------------------- FLOPs

B, T = 2, 256


def wide(heads=8, kv_heads=None, *, tied=True, hidden=2048, gated=False, window=None, bias=False):
    """d 512, 2 layers: wide enough that matrix products are nearly all there is."""
    return TransformerSpec(
        vocab_size=2000,
        vocab_multiple=128,
        d_model=512,
        context=T,
        embedding=EmbeddingSpec(positions=LearnedPositions()),
        decoder=StackSpec(
            num_layers=2,
            pattern=(
                BlockSpec(
                    attention=AttentionSpec(
                        heads=heads, kv_heads=kv_heads, qkv_bias=bias, out_bias=bias, window=window
                    ),
                    feed_forward=MlpSpec(hidden=hidden, gated=gated, activation="relu", bias=bias),
                ),
            ),
            final_norm=RmsNorm(),
        ),
        head=HeadSpec(tied=tied),
    )


LAYOUTS = {
    "mha-bias-tied": (wide(bias=True), "plain"),
    "mha-untied": (wide(tied=False), "cpu"),
    "gqa-glu": (wide(kv_heads=2, gated=True), "plain"),
    "gqa-cpu": (wide(kv_heads=2, gated=True), "cpu"),
    "mqa-deep-mlp-window": (wide(kv_heads=1, hidden=(1024, 2048), window=64), "plain"),
}


@pytest.mark.parametrize(("spec", "kernels"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flops_agree_with_xla(spec, kernels):
    model = abstract(spec, ComputeSpec(kernels=kernels))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    graph, state = nnx.split(model)

    def forward(state, tokens):
        return nnx.merge(graph, state)(tokens)

    def loss(state, tokens):
        return token_losses(forward(state, tokens), tokens).mean()

    def xla_flops(function):
        return jax.jit(function).lower(state, tokens).compile().cost_analysis()["flops"]

    ours = accounting.flops_per_token(spec)
    assert xla_flops(forward) / (B * T) == pytest.approx(ours.forward, rel=0.03)
    assert xla_flops(jax.grad(loss)) / (B * T) == pytest.approx(ours.train, rel=0.03)


def test_flops_by_hand():
    spec = wide(heads=8, kv_heads=2)
    d, f, c = 512, 2048, 64
    weights = d * d + 2 * d * 2 * c + d * d
    flops = accounting.flops_per_token(spec, seq_len=100)
    assert flops.parts["attention"] == 2 * (2 * weights + 2 * 2 * 100 * d)
    assert flops.parts["feed_forward"] == 2 * (2 * 2 * d * f)
    assert flops.parts["head"] == 2 * d * 2048  # padded rows are computed
    assert flops.parts["embedding"] == flops.parts["norms"] == 0
    assert flops.train == 3 * flops.forward
    assert accounting.training_flops(spec, 1000, 100) == 1000 * flops.train


@pytest.mark.parametrize("seq_len", [1, 2, 7, 20])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("causal", [True, False])
def test_mean_keys_counts_the_mask(seq_len, window, causal):
    reach = window or seq_len
    seen = [
        abs(q - k) < reach and (q >= k or not causal)
        for q in range(seq_len)
        for k in range(seq_len)
    ]
    mean = accounting.mean_keys(seq_len, window=window, causal=causal)
    assert mean == pytest.approx(sum(seen) / seq_len)


def test_needed_scores_are_about_half():
    spec = wide()
    computed = accounting.flops_per_token(spec).parts["attention"]
    needed = accounting.flops_per_token(spec, scores="needed").parts["attention"]
    assert computed - needed == 2 * 2 * 2 * (T - (T + 1) / 2) * 512


def test_kv_bytes():
    assert accounting.kv_bytes_per_token(presets.get("llama-3-8b").model, "bfloat16") == 131_072
    assert accounting.kv_bytes_per_token(presets.get("gpt2").model) == 2 * 12 * 768 * 4
    assert accounting.kv_bytes_per_token(presets.get("bigram").model) == 0
