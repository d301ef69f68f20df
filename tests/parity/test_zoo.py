"""ALiBi, Gemma 2's layout and gated attention against `transformers`: logits, and with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextConfig,
    Qwen3NextRotaryEmbedding,
)

from assay.evaluate.checks import at_random
from assay.model.attention import Attention, attend, geometry
from assay.model.cache import empty_cache
from assay.model.positions import alibi_slopes
from assay.model.transformer import abstract, from_named_parameters, named_parameters
from assay.spec import presets
from assay.spec.model import AttentionSpec, NormalInit, QkNorm, RmsNorm, Rope
from assay.spec.run import ComputeSpec

TOLERANCE = 1e-4
B, T = 2, 48


def drawn(model):
    """Every parameter anew, so large that a mistake shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(1.0 if name.endswith(("norm.weight", "ln_f.weight")) else 0.0, 0.15)
    return model.eval()


def logits_both_ways(spec, named, tokens):
    """The full forward's logits, and a prefill's of half and then each token's."""
    model = from_named_parameters(spec, named, ComputeSpec())

    @jax.jit
    def run(model, tokens):
        half = tokens.shape[1] // 2
        cache = empty_cache(spec, B, tokens.shape[1])
        first, cache = model(tokens[:, :half], cache=cache)

        def step(cache, token):
            logits, cache = model(token[:, None], cache=cache)
            return cache, logits[:, 0]

        _, later = jax.lax.scan(step, cache, tokens[:, half:].T)
        return model(tokens), jnp.concatenate([first, later.swapaxes(0, 1)], axis=1)

    return run(model, tokens)


def assert_parity(spec, named, theirs):
    tokens = np.random.default_rng(0).integers(spec.vocab_size, size=(B, T), dtype=np.int32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(wanted).max() > 0.5
    for found in logits_both_ways(spec, named, tokens):
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def weight(module):
    return module.weight.detach().numpy().T


# ---------------------------------------------------------------------------- ALiBi


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 15])
def test_slopes_are_the_published_ones(heads):
    """As in the paper's code, which splits at the power of two below."""

    def of_power(n):
        start = 2 ** (-(2 ** -(np.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    below = 2 ** int(np.floor(np.log2(heads)))
    wanted = of_power(below) + of_power(2 * below)[0::2][: heads - below]
    np.testing.assert_allclose(alibi_slopes(heads), wanted, rtol=1e-6)


@pytest.mark.parametrize("heads", [4, 6], ids=["power-of-two", "between"])
def test_alibi_is_blooms(heads):
    spec = presets.shrink(presets.get("bloom-560m").model)
    spec = spec.replace(d_model=8 * heads).at("decoder.pattern.0.attention.heads", heads)
    spec = spec.at("decoder.pattern.0.feed_forward.hidden", 32 * heads)
    d, layers = spec.d_model, spec.decoder.num_layers
    config = BloomConfig(
        vocab_size=spec.vocab_size, hidden_size=d, n_layer=layers, n_head=heads, use_cache=False
    )
    theirs = drawn(BloomForCausalLM(config))
    body = theirs.transformer
    named = {"embedding.table": body.word_embeddings.weight.detach().numpy()}

    def norm(ours, module):
        named[f"{ours}.scale"] = module.weight.detach().numpy()
        named[f"{ours}.bias"] = module.bias.detach().numpy()

    def linear(ours, w, b):
        named[f"{ours}.w"], named[f"{ours}.b"] = w, b

    norm("embedding.norm", body.word_embeddings_layernorm)
    norm("final_norm", body.ln_f)
    for i, block in enumerate(body.h):
        at = f"layers.{i}"
        norm(f"{at}.attention_norm", block.input_layernorm)
        norm(f"{at}.feed_forward_norm", block.post_attention_layernorm)
        fused = block.self_attention.query_key_value
        # Rows are (heads, q k v, width).
        w = fused.weight.detach().numpy().reshape(heads, 3, 8, d)
        b = fused.bias.detach().numpy().reshape(heads, 3, 8)
        for n, part in enumerate("qkv"):
            linear(f"{at}.attention.{part}", w[:, n].reshape(-1, d).T, b[:, n].reshape(-1))
        dense, mlp = block.self_attention.dense, block.mlp
        linear(f"{at}.attention.o", weight(dense), dense.bias.detach().numpy())
        for ours, module in (("up.0", mlp.dense_h_to_4h), ("down", mlp.dense_4h_to_h)):
            linear(f"{at}.feed_forward.{ours}", weight(module), module.bias.detach().numpy())
    assert_parity(spec, named, theirs)


# ---------------------------------------------------------------------------- Gemma 2


def test_gemma_2():
    """Windows in every other layer, caps on scores and logits, norms on both sides, wide heads."""
    spec = presets.shrink(presets.get("gemma-2-2b").model)
    block = spec.decoder.pattern[0]
    attention = block.attention
    assert attention.window < T  # the window hides something
    config = Gemma2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        intermediate_size=block.feed_forward.hidden,
        num_hidden_layers=spec.decoder.num_layers,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        query_pre_attn_scalar=round(attention.scale**-2),
        sliding_window=attention.window,
        max_position_embeddings=spec.context,
        attn_implementation="eager",  # the only one with caps
    )
    theirs = drawn(Gemma2ForCausalLM(config))
    body = theirs.model
    named = {"embedding.table": body.embed_tokens.weight.detach().numpy()}

    def norm(ours, module):
        named[f"{ours}.scale"] = 1.0 + module.weight.detach().numpy()

    norm("final_norm", body.norm)
    for i, layer in enumerate(body.layers):
        at = f"layers.{i}"
        norm(f"{at}.attention_norm", layer.input_layernorm)
        norm(f"{at}.attention_post_norm", layer.post_attention_layernorm)
        norm(f"{at}.feed_forward_norm", layer.pre_feedforward_layernorm)
        norm(f"{at}.feed_forward_post_norm", layer.post_feedforward_layernorm)
        for part in "qkvo":
            named[f"{at}.attention.{part}.w"] = weight(getattr(layer.self_attn, f"{part}_proj"))
        for ours, part in (("gate", "gate"), ("up.0", "up"), ("down", "down")):
            named[f"{at}.feed_forward.{ours}.w"] = weight(getattr(layer.mlp, f"{part}_proj"))
    assert_parity(spec, named, theirs)


# ---------------------------------------------------------------------------- gates


def attention_layer(spec, d_model, named) -> Attention:
    layer = Attention(
        jax.random.key(0),
        d_model,
        spec,
        init=NormalInit(),
        residual_init=NormalInit(),
        residual_scale=1.0,
        compute=ComputeSpec(),
    )
    for path, x in named.items():
        at = layer
        for step in path.split("."):
            at = getattr(at, step)
        at[...] = jnp.asarray(x)
    return layer


def test_gated_attention_is_qwen3_nexts():
    """A sigmoid gate for each feature of each head, of the layer's input (arXiv:2505.06708)."""
    d, heads, kv_heads, width = 32, 4, 2, 16
    config = Qwen3NextConfig(
        hidden_size=d,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        partial_rotary_factor=1.0,
        attn_implementation="eager",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 1.0,
        },
    )
    theirs = drawn(Qwen3NextAttention(config, layer_idx=0))
    q_and_gate = theirs.q_proj.weight.detach().numpy().reshape(heads, 2, width, d)
    named = {part + ".w": weight(getattr(theirs, f"{part}_proj")) for part in "kvo"}
    named["q.w"] = q_and_gate[:, 0].reshape(-1, d).T
    named["gate.w"] = q_and_gate[:, 1].reshape(-1, d).T
    for part in ("q_norm", "k_norm"):
        named[f"{part}.scale"] = 1.0 + getattr(theirs, part).weight.detach().numpy()
    spec = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        positions=Rope(),
        gate="feature",
        qk_norm=QkNorm(norm=RmsNorm(epsilon=config.rms_norm_eps)),
    )
    layer = attention_layer(spec, d, named)
    x = np.random.default_rng(0).standard_normal((B, T, d), np.float32)
    angles = Qwen3NextRotaryEmbedding(config)(torch.from_numpy(x), torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        wanted, _ = theirs(torch.from_numpy(x), angles, mask)
    shared = geometry([spec], d, jnp.arange(T), causal=True)
    found, _ = layer(jnp.asarray(x), shared)
    assert np.abs(wanted.numpy()).max() > 0.05
    np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE, rtol=TOLERANCE)


def test_one_gate_a_head_is_the_same_gate_for_its_features():
    d, heads, width = 32, 4, 8
    gates = np.random.default_rng(1).standard_normal((d, heads)).astype(np.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, d), np.float32))
    by_head = AttentionSpec(heads=heads, gate="head")
    by_feature = by_head.replace(gate="feature")
    shared = geometry([by_head], d, jnp.arange(T), causal=True)
    y, _ = attention_layer(by_head, d, {"gate.w": gates})(x, shared)
    repeated = np.repeat(gates, width, axis=1)
    z, _ = attention_layer(by_feature, d, {"gate.w": repeated})(x, shared)
    np.testing.assert_allclose(y, z, atol=1e-6)
    closed, _ = attention_layer(by_head, d, {"gate.w": np.zeros_like(gates)})(x, shared)
    open_, _ = attention_layer(AttentionSpec(heads=heads), d, {})(x, shared)
    np.testing.assert_allclose(closed, 0.5 * open_, atol=1e-6)  # sigmoid(0)


# ---------------------------------------------------------------------------- value embeddings


@pytest.mark.parametrize("channels", [8, None])
def test_value_embeddings_are_their_formula(channels):
    """nanochat's gate of the first channels, or modded-nanogpt's two numbers."""
    spec = presets.shrink(presets.get("tiny-gpt").model)
    path = "decoder.pattern.0.attention.value_embedding"
    spec = spec.at(path, {"gate_channels": channels}).at("decoder.num_layers", 1)
    model = at_random(abstract(spec), 0)
    named = named_parameters(model)
    tokens = np.random.default_rng(0).integers(spec.vocab_size, size=(B, T), dtype=np.int32)
    layer = model.layers[0].attention
    x = jax.random.normal(jax.random.key(3), (B, T, spec.d_model))
    shared = model.geometry(jnp.arange(T), spec.d_model, tokens=jnp.asarray(tokens))
    at = "layers.0.attention.value_embedding"
    rows = named[f"{at}.table"][tokens]
    v = np.asarray(layer.v(x))
    heads, width = layer.spec.num_kv_heads, layer.width
    if channels:
        gate = 2 / (1 + np.exp(-np.asarray(x)[..., :channels] @ named[f"{at}.gate"]))
        v = v + np.repeat(gate, width, axis=-1) * rows
    else:
        own, row = named[f"{at}.mix"]
        v = own * v + row * rows
    # The rest of the layer with these values in place of its own.
    q, k = (y.reshape(B, T, heads, width) for y in (layer.q(x), layer.k(x)))
    y = attend(q, k, v.reshape(B, T, heads, width), shared.bias(layer.spec), scale=layer.scale)
    found, _ = layer(x, shared)
    np.testing.assert_allclose(found, layer.o(y.reshape(B, T, -1)), atol=1e-5)
