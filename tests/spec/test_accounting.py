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
    CapacitySpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNorm,
    LearnedPositions,
    MlpSpec,
    MoeSpec,
    NoisyTopK,
    NoPositions,
    QkNorm,
    RmsNorm,
    Rope,
    SigmoidTopK,
    SinusoidalPositions,
    Soft,
    StackSpec,
    TopK,
    TransformerSpec,
)
from assay.spec.run import ComputeSpec

PUBLISHED = {
    "t5-small": 60_506_624,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "vgpt": 124_439_808,
    "smollm-135m": 134_515_008,
    "smollm-360m": 361_821_120,
    "llama-3-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
}

ACTIVE = {
    # As published: Mixtral 12.9B (arXiv:2401.04088), OLMoE 1.3B (2409.02060), Qwen3 3.3B.
    "mixtral-8x7b": 12_879_925_248,
    "olmoe-1b-7b": 1_282_017_280,
    "qwen3-30b-a3b": 3_353_032_704,
    # JaxPT's README: ~249M, ~318M; a soft mixture meets every expert.
    "tiny-moe": 248_666_688,
    "tiny-moe-2": 317_862_720,
    "tiny-moe-3": 650_170_944,
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
    "tiny-moe": "631.37",  # ~631M
    "tiny-moe-2": "1061.04",  # ~1.061B
    "tiny-moe-3": "650.17",  # ~650M
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_counts(name, count):
    assert accounting.parameters(presets.get(name).model).total == count


@pytest.mark.parametrize(("name", "millions"), PRINTED.items())
def test_printed_counts(name, millions):
    assert f"{accounting.parameters(presets.get(name).model).total / 1e6:.2f}" == millions


@pytest.mark.parametrize(("name", "count"), ACTIVE.items())
def test_active_counts(name, count):
    assert accounting.parameters(presets.get(name).model).active == count


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


ROUTERS = (
    TopK(k=1),
    TopK(k=2, bias=True),
    NoisyTopK(k=2),
    NoisyTopK(k=2, bias=True),
    SigmoidTopK(k=3),
    Soft(slots=2),
)


@st.composite
def mlps(draw):
    gated = draw(st.booleans())
    hidden = draw(st.sampled_from([12, (12,)] if gated else [12, (10, 20), (8, 8, 8)]))
    return MlpSpec(hidden=hidden, gated=gated, bias=draw(st.booleans()))


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
    feed_forward = draw(mlps())
    if draw(st.booleans()):
        router = draw(st.sampled_from(ROUTERS))
        shared = draw(st.one_of(st.none(), mlps()))
        feed_forward = MoeSpec(experts=3, expert=feed_forward, router=router, shared=shared)
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
    layers = [block.feed_forward for block in spec.decoder.blocks()]
    some = any(ff and ff.kind == "moe" and ff.active_experts < ff.experts for ff in layers)
    assert (parameters.active < parameters.total) == some


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


@pytest.mark.parametrize("source_len", [T, T // 2])
def test_flops_of_a_pair_agree_with_xla(source_len):
    """t5-small's layout at a third of its depth: the source's share follows its length."""
    spec = presets.get("t5-small").model
    encoder, decoder = (stack.replace(num_layers=2) for stack in (spec.encoder, spec.decoder))
    spec = spec.replace(encoder=encoder, decoder=decoder)
    # XLA does not count what another library computes.
    graph, state = nnx.split(abstract(spec, ComputeSpec(kernels="cpu")))
    target = jax.ShapeDtypeStruct((B, T), jnp.int32)
    source = jax.ShapeDtypeStruct((B, source_len), jnp.int32)

    def forward(state, target, source):
        return nnx.merge(graph, state)(target, source=source)

    def loss(state, target, source):
        return token_losses(forward(state, target, source), target).mean()

    def xla_flops(function):
        compiled = jax.jit(function).lower(state, target, source).compile()
        return compiled.cost_analysis()["flops"] / (B * T)

    ours = accounting.flops_per_token(spec, T, source_len=source_len)
    assert xla_flops(forward) == pytest.approx(ours.forward, rel=0.03)
    assert xla_flops(jax.grad(loss)) == pytest.approx(ours.train, rel=0.03)


def with_experts(**fields):
    stack = wide().decoder
    experts = MoeSpec(experts=8, expert=MlpSpec(hidden=1024, activation="relu"), **fields)
    block = stack.pattern[0].replace(feed_forward=experts)
    return wide().replace(decoder=stack.replace(pattern=(block,)))


def test_only_the_chosen_experts_are_computed():
    """XLA's own count is within 15 % of twice the parameters a token meets, attention aside."""
    spec = with_experts(router=TopK(k=2), capacity=CapacitySpec(load=1.0))
    graph, state = nnx.split(abstract(spec, ComputeSpec(moe_dispatch="capacity", kernels="cpu")))

    def forward(state, tokens):
        return nnx.merge(graph, state)(tokens, train=True)

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    found = jax.jit(forward).lower(state, tokens).compile().cost_analysis()["flops"] / (B * T)
    ours = accounting.flops_per_token(spec)
    assert found == pytest.approx(ours.forward, rel=0.05)
    active = accounting.parameters(spec).active - spec.context * spec.d_model
    scores = 2 * 2 * 2 * T * spec.d_model  # two products a layer
    assert found - scores == pytest.approx(2 * active, rel=0.15)
    total = accounting.parameters(spec).total
    assert found < total  # of which all would be twice that


def test_experts_flops_by_hand():
    d, expert = 512, 2 * 2 * 512 * 1024
    shared = MlpSpec(hidden=256)
    top = with_experts(router=TopK(k=2), shared=shared)
    parts = accounting.flops_per_token(top).parts
    assert parts["feed_forward"] == 2 * (2 * d * 8 + 2 * expert + 2 * 2 * d * 256)
    soft = accounting.flops_per_token(with_experts(router=Soft(slots=2))).parts
    assert soft["feed_forward"] == 2 * (2 * d * 16 + 8 * expert + 8 * 2 * d)


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
