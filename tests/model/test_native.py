"""What is compiled from C++ computes what XLA does; without it decoding goes the old way."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.generate.engine import Generator, generate
from assay.model import compiled as compiling
from assay.model import native
from assay.model.cache import LayerCache, empty_cache
from assay.model.decoding import prepare, quantise
from assay.model.transformer import Transformer, merge_named, named_parameters
from assay.spec.presets import PRESETS, shrink, vary
from assay.spec.run import ComputeSpec

BUILT, WHY = native.build()
compiled = pytest.mark.skipif(not BUILT, reason=WHY)
SHAPES = [(1, 4, 5), (2, 64, 48), (7, 60, 100), (8, 128, 96), (19, 576, 200)]


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_packed_weight_comes_back(dtype):
    w = (draw(12, 50) * 40).astype(dtype)
    np.testing.assert_array_equal(native.unpack(native.pack(w), 50), w)


@compiled
@pytest.mark.parametrize(("r", "k", "n"), SHAPES)
def test_products(r, k, n):
    x, w = draw(r, k), draw(k, n, seed=1)
    ours = jax.jit(native.product, static_argnums=2)
    np.testing.assert_allclose(ours(x, native.pack(w), n), x @ w, atol=1e-5 * k**0.5)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    exact = x.astype(jnp.float32) @ w.astype(jnp.float32)
    got = ours(x, native.pack(w), n)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=1e-4, rtol=2**-8)


@compiled
@pytest.mark.parametrize(("r", "k", "n"), SHAPES)
def test_int8_products_are_exact(r, k, n):
    """Whole numbers: the same, bit for bit."""
    x = draw(r, k).at[0].set(0.0)
    w, columns = quantise(draw(n, k, seed=1))
    q, rows = quantise(x)
    whole = np.asarray(q, np.int32) @ np.asarray(w, np.int32).T
    wanted = whole.astype(np.float32) * rows[:, None] * columns[None, :]
    np.testing.assert_array_equal(native.product(x, native.pack(w.T), n, columns), wanted)


@compiled
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 64), (3, 1, 72)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tokens", [1, 70])
def test_attention_to_a_cache(tokens, heads, kv_heads, width, window, kept):
    """Slots behind the text hold no number, and are not read."""
    slots, lengths = 39 + tokens, jnp.array([0, 16, 39], jnp.int32)
    q = draw(3, tokens, heads, width)
    k, v = (draw(3, tokens, kv_heads, width, seed=s) for s in (3, 4))
    empty = jnp.arange(slots)[None, :, None, None] >= lengths[:, None, None, None]
    keys, values = (
        jnp.where(empty, jnp.nan, draw(3, slots, kv_heads, width, seed=s)).astype(kept)
        for s in (1, 2)
    )
    cache = LayerCache(keys, values, lengths)
    ours = jax.jit(lambda *args: native.attend(*args, scale=0.3, window=window))
    got, cache = ours(q, k, v, cache)
    behind = jnp.arange(3)[:, None], lengths[:, None] + jnp.arange(tokens)[None]
    for now, before, new in ((cache.keys, keys, k), (cache.values, values, v)):
        wanted = before.at[behind].set(new.astype(kept))
        np.testing.assert_array_equal(np.float32(now), np.float32(wanted))
    np.testing.assert_array_equal(cache.lengths, lengths + tokens)
    for b, t in itertools.product(range(3), {0, 1, 37, tokens - 1} & set(range(tokens))):
        end = int(lengths[b]) + t + 1
        seen = slice(max(0, end - (window or end)), end)
        k, v = (
            np.float64(x[b, seen]).repeat(heads // kv_heads, axis=1)
            for x in (cache.keys, cache.values)
        )
        weights = np.exp(np.einsum("shc,hc->hs", k, np.float64(q[b, t])) * 0.3)
        wanted = np.einsum("hs,shc->hc", weights / weights.sum(axis=1, keepdims=True), v)
        # Of 70 times as many entries, some are further off.
        np.testing.assert_allclose(got[b, t], wanted, atol=2e-6 if tokens == 1 else 5e-6)


def windowed(spec):
    """The same, each token seeing six."""
    return vary(spec, block={"attention": {"window": 6}})


HALVES = {
    "grouped, rotated, gated": shrink(PRESETS["smollm-135m"].model),
    "LayerNorm, biases, GELU": shrink(PRESETS["gpt2"].model),
    "a window": windowed(shrink(PRESETS["smollm-135m"].model)),
    "norms of heads": shrink(PRESETS["qwen3-0.6b"].model),
    "experts": shrink(PRESETS["mixtral-8x7b"].model),
    "norms on both sides, softcap": shrink(PRESETS["gemma-2-2b"].model),
}


# In bfloat16 two experts' scores may be equal but for rounding, which then decides.
ROUNDED = ("experts", "bfloat16")
WAYS = [(n, w) for n in HALVES for w in ("float32", "bfloat16", "int8") if (n, w) != ROUNDED]


@compiled
@pytest.mark.parametrize(("name", "weights"), WAYS)
def test_a_block_is_the_same(name, weights):
    """Prompts of different lengths, then two tokens; whatever C++ has of the block."""
    spec = HALVES[name]
    dtype = "float32" if weights == "int8" else weights
    key = jax.random.key(0)
    model = Transformer(spec, ComputeSpec(dtype=dtype, kernels="cpu"), rngs=key)
    named = named_parameters(model)
    noise = {n: 0.1 * draw(*x.shape, seed=i) for i, (n, x) in enumerate(named.items())}
    model = merge_named(model, {n: x + noise[n] for n, x in named.items()})
    tokens = np.random.default_rng(0).integers(spec.vocab_size, size=(2, 12), dtype=np.int32)
    forward = jax.jit(lambda m, t, cache: m(t, cache=cache))
    got = []
    for native_calls in (True, False):
        ready = prepare(model, weights, native_calls=native_calls)
        logits, cache = forward(ready, tokens[:, :10], empty_cache(spec, 2, 16, dtype))
        cache = cache.with_lengths(jnp.array([10, 4], jnp.int32))
        steps = [logits]
        for i in (10, 11):
            logits, cache = forward(ready, tokens[:, i : i + 1], cache)
            steps.append(logits)
        got.append(np.concatenate([np.asarray(s, np.float32) for s in steps], axis=1))
    spread = np.abs(got[1]).max()
    atol = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.02}[weights]
    np.testing.assert_allclose(*got, atol=atol * spread, rtol=0)


def test_which_halves_are_one_call():
    how = {
        name: prepare(Transformer(spec, rngs=jax.random.key(0)), native_calls=True).layers[0]
        for name, spec in HALVES.items()
    }
    assert {name: (block.attends, block.feeds) for name, block in how.items()} == {
        "grouped, rotated, gated": (True, True),
        "LayerNorm, biases, GELU": (True, True),
        "a window": (True, True),
        "norms of heads": (False, True),
        "experts": (True, False),
        "norms on both sides, softcap": (False, False),
    }


@compiled
def test_many_calls_from_several_threads():
    """Calls that meet are done each by its own thread; none loses a task."""
    w, ours = draw(64, 4800, seed=1), jax.jit(native.product, static_argnums=2)
    packed = native.pack(w)
    xs = [draw(2, 64, seed=s) for s in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            for x, y in zip(xs, pool.map(lambda x: ours(x, packed, 4800), xs), strict=True):
                np.testing.assert_allclose(y, x @ w, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_text_is_the_same_without(dtype, monkeypatch):
    spec = shrink(PRESETS["smollm-135m"].model)
    model = Transformer(spec, ComputeSpec(dtype=dtype, kernels="cpu"), rngs=jax.random.key(0))
    ready = Generator(model)
    monkeypatch.setattr(native, "build", lambda: (False, "for the test"))
    plain = Generator(model)
    assert not plain.native
    assert ready.native == BUILT
    settings = {"max_new_tokens": 20, "temperature": 0.0}
    ours, theirs = (generate(g, [[1, 2, 3], [4]], **settings) for g in (ready, plain))
    if dtype == "float32":
        assert ours.ids == theirs.ids
    first = [[row[0] for row in r.logprobs] for r in (ours, theirs)]
    np.testing.assert_allclose(*first, atol=1e-4 if dtype == "float32" else 0.05)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    build = native.build.__wrapped__  # what it found for this process is left alone
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "processor_features", list)
    assert "no AVX-512" in build()[1]
    monkeypatch.setattr(native, "processor_features", lambda: sorted(native.NEEDED))
    with monkeypatch.context() as patched:
        patched.setenv("ASSAY_NATIVE", "0")
        assert build() == (False, "XLA computes all of it: ASSAY_NATIVE is 0.")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert "no C++ compiler" in build()[1]
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/bin/false")
    assert "did not compile" in build()[1]
    assert not list(tmp_path.rglob("*.so"))
