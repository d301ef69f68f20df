"""Attention against loops over heads, queries and keys in float64; kernels against each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.model import attention
from assay.model.attention import HIDDEN, Attention, attend, geometry
from assay.spec.model import AttentionSpec, NormalInit, QkNorm, RmsNorm, Rope
from assay.spec.run import ComputeSpec

B, T, D = 2, 7, 12
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def qkv(heads, kv_heads, width=4, keys=T):
    shapes = [(B, T, heads, width), (B, keys, kv_heads, width), (B, keys, kv_heads, width)]
    return [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]


def naive(q, k, v, seen, scale, softcap=None):
    """One query at a time over the keys it may see; kv head of query head h is h // (H / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = [s for s in range(k.shape[1]) if seen(b, t, s)]
        scores = np.array([q[b, t, h] @ k[b, s, h // group] for s in keys]) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, h] = sum(w * v[b, s, h // group] for w, s in zip(weights, keys, strict=True))
    return out


def mask(seen):
    table = [[[seen(b, t, s) for s in range(T)] for t in range(T)] for b in range(B)]
    return jnp.where(jnp.array(table), 0.0, HIDDEN).astype(jnp.float32)


def causal(b, t, s):
    return s <= t


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(0.5, None), (0.3, 2.0)])
def test_attend(kv_heads, cpu, scale, softcap):
    q, k, v = qkv(4, kv_heads)
    found = attend(q, k, v, mask(causal)[0], scale=scale, softcap=softcap, cpu=cpu)
    np.testing.assert_allclose(found, naive(q, k, v, causal, scale, softcap), **CLOSE)


@pytest.mark.parametrize("cpu", [True, False])
def test_a_bias_of_each_row(cpu):
    def seen(b, t, s):
        return s <= t and (s >= 3) == (t >= 3) if b else s <= t

    q, k, v = qkv(2, 2)
    found = attend(q, k, v, mask(seen)[:, None], scale=0.5, cpu=cpu)
    np.testing.assert_allclose(found, naive(q, k, v, seen, 0.5), **CLOSE)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [False, True], ids=["shared", "by-row"])
def test_cpu_gradients(kv_heads, rows):
    bias = mask(causal)[:, None] if rows else mask(causal)[0]

    def gradients(cpu):
        def loss(q, k, v):
            out = attend(q, k, v, bias, scale=0.5, cpu=cpu)
            return jnp.sum(out * jax.random.normal(jax.random.key(9), out.shape))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv(4, kv_heads))

    for a, b in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize(("kv_heads", "by_head"), [(4, False), (2, False), (2, True)])
def test_blocks_of_queries_read_only_what_they_see(monkeypatch, window, kv_heads, by_head):
    """Keys beyond a block's reach are left out, which changes neither values nor gradients."""
    monkeypatch.setattr(attention, "QUERIES_AT_A_TIME", 3)
    bias = mask(lambda b, t, s: s <= t and (window is None or t - s < window))[:1, None]
    if by_head:
        bias = bias + jax.random.normal(jax.random.key(3), (1, 4, T, T))

    def found(cpu):
        def loss(q, k, v, bias):
            out = attend(q, k, v, bias, scale=0.5, cpu=cpu, causal=True, window=window)
            return jnp.sum(out * jax.random.normal(jax.random.key(9), out.shape)), out

        arguments = (0, 1, 2, 3) if by_head else (0, 1, 2)  # a mask has no gradient
        gradients = jax.jit(jax.grad(loss, arguments, has_aux=True))
        grads, out = gradients(*qkv(4, kv_heads), bias)
        return out, *grads

    for a, b in zip(found(True), found(False), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_a_row_without_a_key_is_no_nan():
    q, k, v = qkv(2, 2)
    assert np.isfinite(attend(q, k, v, jnp.full((T, T), HIDDEN), scale=1.0)).all()


# ---------------------------------------------------------------------------- who sees whom


def visible(spec, **how):
    positions = how.pop("positions", jnp.arange(T))
    shared = geometry([spec], D, positions, **{"causal": True, **how})
    return np.asarray(shared.biases[spec.window] == 0)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("segments", [None, [[0, 0, 0, 1, 1, 2, 2], [1] * 7]])
def test_masks(window, is_causal, segments):
    spec = AttentionSpec(heads=2, window=window)
    ids = None if segments is None else jnp.array(segments)
    found = visible(spec, causal=is_causal, segment_ids=ids).reshape((-1, T, T))
    for b, t, s in np.ndindex(len(found), T, T):
        wanted = (s <= t or not is_causal) and abs(t - s) < (window or T)
        if segments is not None:
            wanted = wanted and segments[b][t] == segments[b][s]
        assert found[b, t, s] == wanted


def test_masks_over_a_cache():
    """A query at position p sees slots 0 ... p of its own row, and within its window."""
    positions = jnp.array([[4, 5], [0, 1]])
    found = visible(AttentionSpec(heads=2, window=3), positions=positions, slots=8)
    assert found.shape == (2, 1, 2, 8)
    for b, t, s in np.ndindex(2, 2, 8):
        p = int(positions[b, t])
        assert found[b, 0, t, s] == (p - 3 < s <= p)


def test_what_layers_share_is_made_once():
    local, plain = AttentionSpec(heads=2, window=3), AttentionSpec(heads=3)
    roped = AttentionSpec(heads=2, positions=Rope())
    shared = geometry([local, plain, roped, roped], D, jnp.arange(T), causal=True)
    assert set(shared.biases) == {3, None}
    assert set(shared.rotations) == {(Rope(), 6)}


# ---------------------------------------------------------------------------- the layer


def layer_of(spec):
    init = {"init": NormalInit(std=0.4), "residual_init": NormalInit(std=0.4)}
    key = jax.random.key(0)
    return Attention(key, D, spec, residual_scale=1.0, compute=ComputeSpec(), **init)


@pytest.mark.parametrize("over", ["head", "projection"])
def test_the_whole_layer(over):
    """Projections, their norms, the rotation, grouped attention and the output, step by step."""
    spec = AttentionSpec(
        heads=4,
        kv_heads=2,
        head_dim=6,
        positions=Rope(theta=50.0),
        qkv_bias=True,
        out_bias=True,
        qk_norm=QkNorm(norm=RmsNorm(), over=over),
        window=4,
    )
    layer, x = layer_of(spec), jax.random.normal(jax.random.key(1), (B, T, D))
    for i, part in enumerate((layer.q, layer.k, layer.v, layer.o)):
        part.b[...] = jax.random.normal(jax.random.key(i), part.b.shape)
    for i, norm in enumerate((layer.q_norm, layer.k_norm)):
        norm.scale[...] = jax.random.normal(jax.random.key(i), norm.scale.shape)
    found, cache = layer(x, geometry([spec], D, jnp.arange(T), causal=True))
    assert cache is None

    def linear(part, x):
        return x @ np.asarray(part.w[...], np.float64) + np.asarray(part.b[...])

    def rms(norm, y):
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
        return y * np.asarray(norm.scale[...])

    def turn(y):
        angles = np.arange(T)[:, None] * 50.0 ** (-np.arange(0, 6, 2) / 6)
        z = (y[..., :3] + 1j * y[..., 3:]) * np.exp(1j * angles)[None, :, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    x = np.asarray(x, np.float64)
    q, k, v = (linear(part, x) for part in (layer.q, layer.k, layer.v))
    if over == "projection":
        q, k = rms(layer.q_norm, q), rms(layer.k_norm, k)
    q, k, v = (y.reshape(B, T, -1, 6) for y in (q, k, v))
    if over == "head":
        q, k = rms(layer.q_norm, q), rms(layer.k_norm, k)
    out = naive(turn(q), turn(k), v, lambda b, t, s: 0 <= t - s < 4, 1 / math.sqrt(6))
    wanted = linear(layer.o, out.reshape(B, T, -1))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_falls_on_the_weights():
    """With one key to see, its weight is kept and scaled, or gone."""
    spec = AttentionSpec(heads=2, window=1, dropout=0.5)
    layer, x = layer_of(spec), jax.random.normal(jax.random.key(1), (B, T, D))
    layer.o.w[...] = jnp.eye(D)
    shared = geometry([spec], D, jnp.arange(T), causal=True)
    plain, dropped = layer(x, shared)[0], layer(x, shared, key=jax.random.key(0))[0]
    ratio = np.asarray(dropped / plain).reshape(B, T, 2, -1)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), atol=1e-4)
    np.testing.assert_allclose(np.unique(ratio.round(4)), [0, 2])
