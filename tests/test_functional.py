"""Plain-array functions against float64 formulas, PyTorch, and the Flax model's own outputs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from assay import functional as fn
from assay.errors import AssayError
from assay.model.attention import Attention, geometry
from assay.model.positions import rope_tables
from assay.model.transformer import Transformer, merge_named, named_parameters
from assay.spec import presets
from assay.spec.accounting import parameters
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    InitSpec,
    LayerNorm,
    MlpSpec,
    NormalInit,
    Rope,
    SinusoidalPositions,
    StackSpec,
    TransformerSpec,
    ZeroInit,
)
from assay.spec.run import ComputeSpec

B, H, K, T, S, C, D, FF = 2, 4, 2, 5, 7, 8, 32, 48
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SIZES = {"num_layers": 3, "num_heads": H, "d_model": D, "d_ff": FF}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def f64(x):
    return np.asarray(x, np.float64)


def to_torch(x):
    return torch.from_numpy(np.array(x))


def heads(kv_heads=H, keys=S):
    return normal(0, B, H, T, C), normal(1, B, kv_heads, keys, C), normal(2, B, kv_heads, keys, C)


def naive_attention(q, k, v, added, scale):
    """The formula in float64, one head at a time; `added` is (B, H, T, S)."""
    q, k, v = f64(q), f64(k), f64(v)
    out = np.zeros_like(q)
    for b, h in np.ndindex(q.shape[:2]):
        scores = q[b, h] @ k[b, h].T * scale + added[b, h]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[b, h] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, h]
    return out


MASK_SHAPES = [(T, S), (1, S), (B, 1, T, S), (B, H, T, S), (1, H, 1, S)]


def boolean_mask(shape):
    mask = np.random.default_rng(0).random(shape) < 0.6
    mask[..., 0] = True  # no query is left without a key
    return mask


# ---------------------------------------------------------------------------- the product


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [None, *MASK_SHAPES])
def test_product_against_the_formula(shape, scale):
    q, k, v = heads()
    mask = None if shape is None else boolean_mask(shape)
    added = np.zeros((B, H, T, S))
    if mask is not None:
        added = np.broadcast_to(np.where(mask, 0.0, -np.inf), added.shape)
    out = fn.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    np.testing.assert_allclose(out, naive_attention(q, k, v, added, scale or C**-0.5), **CLOSE)


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_product_against_torch(shape, kind):
    q, k, v = heads()
    mask = boolean_mask(shape) if kind == "boolean" else np.array(normal(3, *shape))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *map(to_torch, (q, k, v)), attn_mask=torch.from_numpy(mask)
    )
    ours = fn.scaled_dot_product_attention(q, k, v, mask)
    np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize("hidden", [-np.inf, -1e9, -1e30, np.finfo(np.float32).min])
def test_boolean_masks_are_additive_masks(hidden):
    q, k, v = heads()
    mask = boolean_mask((T, S))
    added = np.where(mask, 0.0, hidden).astype(np.float32)
    by_truth = fn.scaled_dot_product_attention(q, k, v, mask)
    np.testing.assert_array_equal(by_truth, fn.scaled_dot_product_attention(q, k, v, added))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_axes_lead(leading):
    q, k, v = normal(0, *leading, T, C), normal(1, *leading, S, C), normal(2, *leading, S, C)
    out = fn.scaled_dot_product_attention(q, k, v, boolean_mask((T, S)))
    assert out.shape == q.shape
    last = fn.scaled_dot_product_attention(
        *(x.reshape(-1, *x.shape[-2:])[-1] for x in (q, k, v)), boolean_mask((T, S))
    )
    np.testing.assert_allclose(out.reshape(-1, T, C)[-1], last, **CLOSE)


@pytest.mark.parametrize("mask", [np.zeros((T, S), bool), np.full((T, S), -np.inf, np.float32)])
def test_a_query_that_sees_nothing_is_no_nan(mask):
    q, k, v = heads()
    out = fn.scaled_dot_product_attention(q, k, v, mask)
    mean = jnp.broadcast_to(v.mean(axis=2, keepdims=True), out.shape)
    np.testing.assert_allclose(out, mean, **CLOSE)
    grads = jax.grad(lambda q: fn.scaled_dot_product_attention(q, k, v, mask).sum())(q)
    assert jnp.isfinite(grads).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((T, S), np.int32), "booleans"),
        (np.ones((S, T), bool), r"give \(5, 7\)"),
        (np.ones((B, T, S), bool), r"\(2, 4, 5, 7\)"),
        (np.ones((S,), bool), r"give \(5, 7\)"),
        (np.ones((1, 1, B, H, T, S), bool), r"give \(5, 7\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(AssayError, match=f"^mask: found .*{message}"):
        fn.scaled_dot_product_attention(*heads(), mask)


def test_arrays_that_do_not_fit_are_refused():
    q, k, v = heads()
    with pytest.raises(AssayError, match=r"^k: found"):
        fn.scaled_dot_product_attention(q, k[:, :1], v)
    with pytest.raises(AssayError, match=r"^v: found"):
        fn.scaled_dot_product_attention(q, k, v[..., :-1])
    with pytest.raises(AssayError, match=r"^key: found 3 kv heads"):
        fn.grouped_query_attention(q, normal(0, B, 3, S, C), normal(0, B, 3, S, C))


def test_the_softmax_is_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in heads())
    out = fn.scaled_dot_product_attention(q * 8, k * 8, v)
    assert out.dtype == jnp.bfloat16
    exact = naive_attention(q * 8, k * 8, v, np.zeros((B, H, T, S)), C**-0.5)
    np.testing.assert_allclose(f64(out), exact, rtol=0.02, atol=0.02)


def test_dropout_needs_a_key():
    q, k, v = heads()
    plain = fn.scaled_dot_product_attention(q, k, v)
    without = fn.scaled_dot_product_attention(q, k, v, dropout_rate=0.5)
    np.testing.assert_array_equal(plain, without)

    def dropped(seed):
        return fn.scaled_dot_product_attention(
            q, k, v, dropout_rate=0.5, dropout_key=jax.random.key(seed)
        )

    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert not jnp.array_equal(dropped(0), dropped(1))
    mean = jnp.mean(jnp.stack([dropped(seed) for seed in range(400)]), axis=0)
    np.testing.assert_allclose(mean, plain, atol=0.3)


# ---------------------------------------------------------------------------- groups of heads


@pytest.mark.parametrize("shape", [(T, S), (B, 1, T, S), (B, H, T, S)])
def test_grouped_is_multi_head_with_repeated_heads(shape):
    q, k, v = heads(kv_heads=K)
    mask = boolean_mask(shape)
    added = np.broadcast_to(np.where(mask, 0.0, -np.inf), (B, H, T, S))
    repeated = [np.stack([x[:, h // (H // K)] for h in range(H)], axis=1) for x in (k, v)]
    out = fn.grouped_query_attention(q, k, v, mask)
    np.testing.assert_allclose(out, naive_attention(q, *repeated, added, C**-0.5), **CLOSE)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *map(to_torch, (q, k, v)), attn_mask=torch.from_numpy(mask), enable_gqa=True
    )
    np.testing.assert_allclose(out, theirs, **CLOSE)


def test_multi_query_is_multi_head_with_repeated_heads():
    q, k, v = heads(kv_heads=1)
    mask = boolean_mask((T, S))
    out = fn.multi_query_attention(q, k[:, 0], v[:, 0], mask, scale=0.2)
    repeated = [jnp.tile(x, (1, H, 1, 1)) for x in (k, v)]
    whole = fn.scaled_dot_product_attention(q, *repeated, mask, scale=0.2)
    np.testing.assert_allclose(out, whole, **CLOSE)


# ---------------------------------------------------------------------------- the layer


def with_biases(params, seed=0):
    """Every None that ends in `bias` replaced by random numbers."""
    matrices = {"q": params.q, "k": params.k, "v": params.v, "o": params.o}
    drawn = {f"{n}_bias": normal(seed + i, w.shape[1]) for i, (n, w) in enumerate(matrices.items())}
    return params._replace(**drawn)


WIDE = InitSpec(weights=NormalInit(std=0.3), residual="same")


@pytest.mark.parametrize("masked", ["none", "boolean", "float", "per head"])
def test_layer_against_torchs(masked):
    params = with_biases(fn.init_attention(jax.random.key(0), d_model=D, num_heads=H, init=WIDE))
    layer = torch.nn.MultiheadAttention(D, H, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(to_torch(jnp.concatenate(params[:3], axis=1).T))
        layer.in_proj_bias.copy_(to_torch(jnp.concatenate(params[4:7])))
        layer.out_proj.weight.copy_(to_torch(params.o.T))
        layer.out_proj.bias.copy_(to_torch(params.o_bias))
    query, key, value = normal(1, B, T, D), normal(2, B, S, D), normal(3, B, S, D)
    mask = theirs_mask = None
    if masked == "boolean":
        mask = boolean_mask((T, S))
        theirs_mask = torch.from_numpy(~mask)  # True hides, there
    elif masked == "float":
        mask = np.array(normal(4, T, S))
        theirs_mask = torch.from_numpy(mask)
    elif masked == "per head":
        mask = boolean_mask((B, H, T, S))
        theirs_mask = torch.from_numpy(~mask.reshape(B * H, T, S))
    ours = fn.multi_head_attention(query, key, value, mask, num_heads=H, params=params)
    with torch.no_grad():
        theirs, _ = layer(*map(to_torch, (query, key, value)), attn_mask=theirs_mask)
    np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, K])
def test_fewer_kv_heads_are_repeated_columns(kv_heads):
    few = fn.init_attention(
        jax.random.key(0), d_model=D, num_heads=H, num_kv_heads=kv_heads, bias=True, init=WIDE
    )
    assert few.k.shape == few.v.shape == (D, kv_heads * C)
    few = with_biases(few)

    def repeated(x):
        by_head = x.reshape(*x.shape[:-1], kv_heads, C)
        return jnp.repeat(by_head, H // kv_heads, axis=-2).reshape(*x.shape[:-1], -1)

    many = few._replace(**{n: repeated(getattr(few, n)) for n in ("k", "v", "k_bias", "v_bias")})
    x, mask = normal(1, B, T, D), fn.causal_mask(T)
    np.testing.assert_allclose(
        fn.multi_head_attention(x, x, x, mask, num_heads=H, params=few),
        fn.multi_head_attention(x, x, x, mask, num_heads=H, params=many),
        **CLOSE,
    )


def test_rotation_turns_queries_and_keys():
    """Only distances count: positions moved together change nothing, and moved apart do."""
    params = fn.init_attention(jax.random.key(0), d_model=D, num_heads=H, init=WIDE)
    x = normal(1, B, T, D)

    def out(positions):
        tables = fn.rope_tables(jnp.asarray(positions, jnp.int32), C, fn.Rope())
        return fn.multi_head_attention(x, x, x, num_heads=H, params=params, rotation=tables)

    plain = fn.multi_head_attention(x, x, x, num_heads=H, params=params)
    np.testing.assert_allclose(out([0] * T), plain, **CLOSE)
    np.testing.assert_allclose(out(range(T)), out(range(9, 9 + T)), rtol=1e-4, atol=1e-4)
    assert jnp.abs(out(range(T)) - plain).max() > 1e-2
    assert fn.rope_tables is rope_tables


def test_weights_that_do_not_split_are_refused():
    with pytest.raises(AssayError, match=r"^num_heads: found 5; it must divide d_model"):
        fn.init_attention(jax.random.key(0), d_model=D, num_heads=5)
    with pytest.raises(AssayError, match=r"^num_kv_heads: found 3; it must divide num_heads"):
        fn.init_attention(jax.random.key(0), d_model=D, num_heads=4, num_kv_heads=3)
    params = fn.init_attention(jax.random.key(0), d_model=D, num_heads=H)
    x = normal(0, B, T, D)
    with pytest.raises(AssayError, match=r"^params.q: .*num_heads \(5\)"):
        fn.multi_head_attention(x, x, x, num_heads=5, params=params)
    with pytest.raises(AssayError, match=r"^params.k: .*head width \(8\)"):
        fn.multi_head_attention(
            x, x, x, num_heads=H, params=params._replace(k=params.k[:, :12], v=params.v[:, :12])
        )


# ---------------------------------------------------------------------------- the other pieces


def test_causal_and_padding_masks():
    mask = fn.causal_mask(4)
    assert mask.dtype == bool
    assert all(bool(mask[t, s]) == (s <= t) for t in range(4) for s in range(4))
    tokens = jnp.asarray([[3, 4, 0], [5, 0, 0]])
    hidden = fn.padding_mask(tokens, 0)
    assert hidden.shape == (2, 1, 1, 3)
    assert hidden[:, 0, 0].tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("affine", [True, False])
def test_norms_against_the_formulas(affine):
    x = 3 * normal(0, B, T, D) + 1
    scale, bias = (normal(1, D), normal(2, D)) if affine else (None, None)
    y = f64(x)
    centred = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-3)
    rms = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3)
    if affine:
        centred, rms = centred * f64(scale) + f64(bias), rms * f64(scale)
    np.testing.assert_allclose(fn.layer_norm(x, scale, bias, epsilon=1e-3), centred, **CLOSE)
    np.testing.assert_allclose(fn.rms_norm(x, scale, epsilon=1e-3), rms, **CLOSE)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_against_the_formula(gated, bias):
    params = fn.init_feed_forward(
        jax.random.key(0), d_model=D, d_ff=FF, gated=gated, bias=bias, init=WIDE
    )
    if bias:
        drawn = {"up_bias": normal(1, FF), "down_bias": normal(2, D)}
        if gated:
            drawn["gate_bias"] = normal(3, FF)
        params = params._replace(**drawn)
    x = normal(4, B, T, D)

    def affine(x, w, b):
        return x @ f64(w) + (0 if b is None else f64(b))

    hidden = affine(f64(x), params.up, params.up_bias)
    if gated:
        hidden = np.maximum(affine(f64(x), params.gate, params.gate_bias), 0) * hidden
    else:
        hidden = np.maximum(hidden, 0)
    expected = affine(hidden, params.down, params.down_bias)
    np.testing.assert_allclose(fn.feed_forward(x, params=params), expected, rtol=1e-4, atol=1e-4)


def test_feed_forward_takes_other_activations():
    params = fn.init_feed_forward(jax.random.key(0), d_model=D, d_ff=FF, gated=True, init=WIDE)
    x = normal(1, B, T, D)
    hidden = jax.nn.silu(x @ params.gate) * (x @ params.up)
    out = fn.feed_forward(x, params=params, activation="silu")
    np.testing.assert_allclose(out, hidden @ params.down, rtol=1e-4, atol=1e-4)


def test_positions_against_the_formula():
    table = fn.sinusoidal_positions(9, 6, theta=100.0)
    for p, i in np.ndindex(9, 3):
        angle = p / 100.0 ** (2 * i / 6)
        pair = [math.sin(angle), math.cos(angle)]
        np.testing.assert_allclose(table[p, 2 * i : 2 * i + 2], pair, **CLOSE)
    with pytest.raises(AssayError, match=r"^d_model: found 5"):
        fn.sinusoidal_positions(9, 5)


def test_embeddings():
    table, places = normal(0, 11, 6), normal(1, 4, 6)
    tokens = jnp.asarray([[1, 5, 10], [0, 0, 2]])
    scaled = f64(table)[np.asarray(tokens)] * math.sqrt(6)
    np.testing.assert_allclose(fn.token_embedding(tokens, table=table), scaled, **CLOSE)
    learned = fn.transformer_embedding(tokens, table=table, positions=places)
    np.testing.assert_allclose(learned, scaled + f64(places)[None, :3], **CLOSE)
    fixed = fn.transformer_embedding(tokens, table=table)
    np.testing.assert_allclose(fixed, scaled + f64(fn.sinusoidal_positions(3, 6))[None], **CLOSE)
    with pytest.raises(AssayError, match=r"^tokens: found 3 of them; the positions end at 2"):
        fn.transformer_embedding(tokens, table=table, positions=places[:2])


def test_embedding_tables_are_xavier_drawn():
    table = fn.init_embedding(jax.random.key(0), 500, 100)
    assert table.shape == (500, 100)
    assert float(table.std()) == pytest.approx(math.sqrt(2 / 600), rel=0.02)


def test_log_probabilities():
    x, w, b = normal(0, B, T, D), normal(1, D, 11), normal(2, 11)
    logits = (f64(x) @ f64(w) + f64(b)) / 0.7
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    out = fn.log_probabilities(x, w=w, b=b, temperature=0.7)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- the decoder


def decoder_params(named, num_layers):
    """The Flax model's parameters, by their names, as the plain decoder's."""

    def norm(name):
        return fn.NormParams(named.get(f"{name}.scale"), named.get(f"{name}.bias"))

    def block(i):
        at = f"layers.{i}"
        place = "norm" if f"{at}.attention_norm.scale" in named else "post_norm"
        attention = {n: named[f"{at}.attention.{n}.w"] for n in "qkvo"}
        biases = {f"{n}_bias": named.get(f"{at}.attention.{n}.b") for n in "qkvo"}
        ff = f"{at}.feed_forward"
        return fn.DecoderBlockParams(
            attention=fn.AttentionParams(**attention, **biases),
            attention_norm=norm(f"{at}.attention_{place}"),
            feed_forward=fn.FeedForwardParams(
                up=named[f"{ff}.up.0.w"],
                down=named[f"{ff}.down.w"],
                up_bias=named.get(f"{ff}.up.0.b"),
                down_bias=named.get(f"{ff}.down.b"),
                gate=named.get(f"{ff}.gate.w"),
                gate_bias=named.get(f"{ff}.gate.b"),
            ),
            feed_forward_norm=norm(f"{at}.feed_forward_{place}"),
        )

    final = norm("final_norm") if "final_norm.scale" in named else None
    return fn.DecoderParams(tuple(block(i) for i in range(num_layers)), final)


def spec_of(norm_position="pre", **mlp):
    block = BlockSpec(
        norm=LayerNorm(epsilon=1e-6),
        norm_position=norm_position,
        attention=AttentionSpec(heads=H, kv_heads=K, qkv_bias=True, out_bias=True),
        feed_forward=MlpSpec(hidden=FF, activation="relu", bias=True, **mlp),
    )
    final = LayerNorm(epsilon=1e-6) if norm_position == "pre" else None
    return TransformerSpec(
        vocab_size=19,
        d_model=D,
        context=16,
        embedding=EmbeddingSpec(positions=SinusoidalPositions(), scale_by_sqrt_width=True),
        decoder=StackSpec(pattern=(block,), num_layers=2, final_norm=final),
        init=WIDE,
    )


@pytest.mark.parametrize("kernels", ["plain", "cpu"])
@pytest.mark.parametrize(
    "spec",
    [
        presets.shrink(presets.get("mqa").model),
        spec_of(),
        spec_of("post"),
        spec_of(gated=True),
    ],
    ids=["mqa", "pre", "post", "gated"],
)
def test_decoder_is_the_flax_models(spec, kernels):
    model = Transformer(spec, ComputeSpec(kernels=kernels), rngs=jax.random.key(0))
    named = {
        # away from 0 and 1, so that every scale and bias counts
        name: leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(named_parameters(model).items())
    }
    model = merge_named(model, named)
    tokens = jax.random.randint(jax.random.key(1), (B, 9), 0, spec.vocab_size, jnp.int32)
    table = named["embedding.table"]
    if spec.embedding.scale_by_sqrt_width:
        x = fn.transformer_embedding(tokens, table=table)
    else:
        x = table[tokens] + named["embedding.positions"][None, :9]
    block = spec.decoder.pattern[0]
    ours = fn.transformer_decoder(
        x,
        fn.causal_mask(9),
        num_layers=spec.decoder.num_layers,
        num_heads=block.attention.heads,
        d_model=spec.d_model,
        d_ff=block.feed_forward.hidden,
        params=decoder_params(named, spec.decoder.num_layers),
        norm_position=block.norm_position,
        epsilon=block.norm.epsilon,
    )
    np.testing.assert_allclose(ours, model.hidden(tokens)[0], **CLOSE)


def test_rope_layer_is_the_flax_models():
    spec = AttentionSpec(heads=H, kv_heads=K, positions=Rope(theta=100.0))
    init = {"init": NormalInit(std=0.3), "residual_init": NormalInit(std=0.3), "residual_scale": 1}
    layer = Attention(jax.random.key(0), D, spec, **init, compute=ComputeSpec())
    positions = jnp.arange(T, dtype=jnp.int32)
    x = normal(1, B, T, D)
    params = fn.AttentionParams(*(getattr(layer, n).w[...] for n in "qkvo"))
    tables = fn.rope_tables(positions, C, fn.Rope(theta=100.0))
    ours = fn.multi_head_attention(
        x, x, x, fn.causal_mask(T), num_heads=H, params=params, rotation=tables
    )
    theirs, _ = layer(x, geometry([spec], D, positions, causal=True))
    np.testing.assert_allclose(ours, theirs, **CLOSE)


def decode(x, mask, params, **options):
    return fn.transformer_decoder(x, mask, **SIZES, params=params, **options)


@pytest.fixture(scope="module")
def params():
    return fn.init_transformer_decoder(jax.random.key(0), **SIZES)


def test_readme_call():
    sizes = {"num_layers": 6, "num_heads": 8, "d_model": 64, "d_ff": 256}
    x, key = normal(0, 2, 10, 64), jax.random.key(1)
    out = fn.transformer_decoder(x, fn.causal_mask(10), **sizes, key=key)
    assert out.shape == x.shape
    drawn = fn.init_transformer_decoder(key, **sizes)
    assert {block.attention.k.shape for block in drawn.blocks} == {(64, 8)}  # one kv head
    again = fn.transformer_decoder(x, fn.causal_mask(10), **sizes, params=drawn)
    np.testing.assert_array_equal(out, again)


def test_parameter_count_is_the_presets():
    model = presets.get("mqa").model
    drawn = fn.init_transformer_decoder(
        jax.random.key(0), num_layers=6, num_heads=8, d_model=64, d_ff=256
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(drawn))
    tables = (model.vocab_size + model.context) * model.d_model
    assert count == parameters(model).total - tables


def test_initial_values_follow_the_spec():
    deep = fn.init_transformer_decoder(
        jax.random.key(0), num_layers=8, num_heads=4, d_model=128, d_ff=512, cross=True
    )
    block = deep.blocks[0]
    residual = [block.attention.o, block.feed_forward.down, block.cross.o]
    for w in (block.attention.q, block.feed_forward.up):
        assert float(w.std()) == pytest.approx(0.02, rel=0.05)
    for w in residual:
        assert float(w.std()) == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 x 8) = 4
    zero = fn.init_transformer_decoder(jax.random.key(0), **SIZES, init=InitSpec(residual="zero"))
    assert not zero.blocks[0].attention.o.any()
    assert not zero.blocks[0].feed_forward.down.any()
    x = normal(1, B, T, D)
    expected = fn.layer_norm(x)  # every block is the identity
    np.testing.assert_allclose(decode(x, None, zero), expected, **CLOSE)
    nothing = InitSpec(weights=ZeroInit())
    assert not fn.init_attention(jax.random.key(0), d_model=D, num_heads=H, init=nothing).q.any()


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_no_output_sees_the_future(norm_position):
    params = fn.init_transformer_decoder(
        jax.random.key(0), **SIZES, norm_position=norm_position, init=WIDE
    )
    x, mask = normal(1, 1, T, D), fn.causal_mask(T)
    jacobian = jax.jacrev(lambda x: decode(x, mask, params, norm_position=norm_position)[0])(x)
    influence = jnp.abs(jacobian[:, :, 0]).max(axis=(1, 3))  # of input s on output t
    assert ((influence > 0) == mask).all()
    unmasked = jax.jacrev(lambda x: decode(x, None, params, norm_position=norm_position)[0])(x)
    assert (jnp.abs(unmasked[:, :, 0]).max(axis=(1, 3)) > 0).all()


def test_every_weight_gets_a_finite_gradient():
    x, memory = normal(1, B, T, D), normal(2, B, S, D)
    params = fn.init_transformer_decoder(
        jax.random.key(0), **SIZES, cross=True, bias=True, gated=True, init=WIDE
    )
    params = jax.tree.map(lambda p: p + 0.1 * normal(3, *p.shape), params)
    target = normal(4, B, T, D)

    def loss(params):
        out = decode(x, fn.causal_mask(T), params, memory=memory, activation="silu")
        return jnp.mean(jnp.square(out - target))

    for path, grad in jax.tree.leaves_with_path(jax.grad(loss)(params)):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(grad).all(), name
        if not name.endswith("k_bias"):  # it cancels in the softmax
            assert jnp.abs(grad).max() > 1e-6, name


def test_jit_vmap_and_forward_mode(params):
    x, mask = normal(1, 3, B, T, D), fn.causal_mask(T)
    one_by_one = jnp.stack([decode(row, mask, params) for row in x])
    jitted = jax.jit(jax.vmap(decode, in_axes=(0, None, None)))
    np.testing.assert_allclose(jitted(x, mask, params), one_by_one, **CLOSE)
    many = jax.vmap(lambda key: fn.init_transformer_decoder(key, **SIZES))(
        jax.random.split(jax.random.key(5), 2)
    )
    outs = jax.vmap(decode, in_axes=(None, None, 0))(x[0], mask, many)
    second = jax.tree.map(lambda leaf: leaf[1], many)
    np.testing.assert_allclose(outs[1], decode(x[0], mask, second), **CLOSE)
    _, tangent = jax.jvp(lambda x: decode(x, mask, params), (x[0],), (jnp.ones_like(x[0]),))
    assert jnp.isfinite(tangent).all()


def test_memory_is_read_and_its_padding_is_not():
    params = fn.init_transformer_decoder(jax.random.key(0), **SIZES, cross=True, init=WIDE)
    x, memory = normal(1, B, T, D), normal(2, B, S, D)
    tokens = jnp.ones((B, S), jnp.int32).at[:, -2:].set(0)
    mask = fn.causal_mask(T)

    def out(memory):
        return decode(x, mask, params, memory=memory, memory_mask=fn.padding_mask(tokens, 0))

    padding_changed = memory.at[:, -2:].set(9.0)
    np.testing.assert_array_equal(out(memory), out(padding_changed))
    assert jnp.abs(out(memory) - out(memory.at[:, 0].set(9.0))).max() > 1e-3
    with pytest.raises(AssayError, match=r"^memory: found no memory"):
        decode(x, mask, params)
    plain = fn.init_transformer_decoder(jax.random.key(0), **SIZES)
    with pytest.raises(AssayError, match=r"^memory: found a memory"):
        decode(x, mask, plain, memory=memory)


def test_decoder_dropout_needs_a_key(params):
    x, mask = normal(1, B, T, D), fn.causal_mask(T)
    plain = decode(x, mask, params)
    np.testing.assert_array_equal(decode(x, mask, params, dropout_rate=0.5), plain)
    key = jax.random.key(0)
    dropped = decode(x, mask, params, dropout_rate=0.5, dropout_key=key)
    assert not jnp.allclose(dropped, plain)
    again = decode(x, mask, params, dropout_rate=0.5, dropout_key=key)
    np.testing.assert_array_equal(dropped, again)


@pytest.mark.parametrize("name", ["num_layers", "d_model", "d_ff"])
def test_sizes_are_checked_against_the_weights(params, name):
    sizes = SIZES | {name: SIZES[name] * 2}
    x = normal(1, B, T, sizes["d_model"])
    with pytest.raises(AssayError, match=f"^{name}: found {sizes[name]}; the weights have"):
        fn.transformer_decoder(x, fn.causal_mask(T), **sizes, params=params)


def test_weights_come_from_one_place(params):
    x, mask = normal(1, B, T, D), fn.causal_mask(T)
    with pytest.raises(AssayError, match=r"^params or key: found neither"):
        fn.transformer_decoder(x, mask, **SIZES)
    with pytest.raises(AssayError, match=r"^params or key: found both"):
        fn.transformer_decoder(x, mask, **SIZES, params=params, key=jax.random.key(0))
    with pytest.raises(AssayError, match=r"^x: found"):
        decode(x[..., :8], mask, params)


# ---------------------------------------------------------------------------- experts


@pytest.mark.parametrize("noise", [False, True], ids=["top-k", "noisy top-k"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_a_mixture_against_the_formula(noise, renormalise):
    """makeMoE's layer in float64, a token at a time, every token by its two experts alone."""
    experts, k = 4, 2
    params = fn.init_mixture_of_experts(
        jax.random.key(0),
        experts=experts,
        d_model=D,
        d_ff=FF,
        noisy=noise,
        bias=True,
        init=InitSpec(weights=NormalInit(std=0.4)),
    )
    params = jax.tree.map(lambda p: p + 0.1 * normal(5, *p.shape), params)  # biases too
    x, key = normal(1, B, T, D), jax.random.key(2)
    found = jax.jit(
        lambda x, p: fn.mixture_of_experts(
            x, params=p, k=k, renormalise=renormalise, noise_key=key if noise else None
        )
    )(x, params)
    logits = f64(x) @ f64(params.router) + f64(params.router_bias)
    if noise:
        spread = np.log1p(np.exp(f64(x) @ f64(params.noise) + f64(params.noise_bias)))
        logits = logits + f64(jax.random.normal(key, logits.shape)) * spread
    np.testing.assert_allclose(found.logits, logits, **CLOSE)
    wanted = np.zeros((B, T, D))
    for place in np.ndindex(B, T):
        chosen = np.argsort(-logits[place])[:k]
        scores = np.exp(logits[place])
        weights = scores[chosen] / (scores[chosen] if renormalise else scores).sum()
        for e, weight in zip(chosen, weights, strict=True):
            p = [f64(a)[e] for a in params.experts if a is not None]
            up, down, up_bias, down_bias = p
            hidden = np.maximum(f64(x)[place] @ up + up_bias, 0)
            wanted[place] += weight * (hidden @ down + down_bias)
    np.testing.assert_allclose(found.y, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.load.sum(), 1.0, rtol=1e-6)


def test_a_mixture_over_capacity():
    """In the order of the row: later tokens change no earlier one, and a dropped one gets 0."""
    params = fn.init_mixture_of_experts(jax.random.key(0), experts=4, d_model=D, d_ff=FF)
    x = normal(1, B, 16, D)
    mixture = jax.jit(lambda x: fn.mixture_of_experts(x, params=params, k=1, load=0.5))
    found = mixture(x)
    dropped = ~np.asarray(found.kept)[..., 0]
    assert 0 < dropped.sum() < dropped.size
    assert (np.asarray(found.y)[dropped] == 0).all()
    other = mixture(x.at[:, 8:].set(normal(7, B, 8, D)))
    np.testing.assert_array_equal(other.kept[:, :8], found.kept[:, :8])
    np.testing.assert_allclose(other.y[:, :8], found.y[:, :8], atol=1e-6)


def test_noise_needs_its_projection():
    params = fn.init_mixture_of_experts(jax.random.key(0), experts=2, d_model=D, d_ff=FF)
    with pytest.raises(AssayError, match="noise_key: found one; the router has no noise"):
        fn.mixture_of_experts(normal(1, B, T, D), params=params, noise_key=jax.random.key(0))


def test_every_public_name_is_there():
    assert list(fn.__all__) == sorted(fn.__all__)
    for name in fn.__all__:
        assert getattr(fn, name).__doc__
