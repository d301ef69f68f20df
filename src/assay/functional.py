"""The model's operations on plain arrays: pure functions, no Flax, nothing hidden.

Arrays first, then keywords. Weights are NamedTuples of float32 arrays, so that `jax.grad`,
`jax.jit` and `jax.vmap` take them as they are; an `init_...` function draws them from a key. The
mathematics is `assay.model`'s own, called from here.

    params = init_transformer_decoder(key, num_layers=6, num_heads=8, d_model=64, d_ff=256)
    y = transformer_decoder(
        x, causal_mask(10), num_layers=6, num_heads=8, d_model=64, d_ff=256, params=params
    )

Axes: B batch, T queries, S keys, D model, F hidden, H heads, K kv heads, C head width,
V vocabulary. A split head lies before its tokens, (..., H, T, C), but for `rotate`, which takes
the model's (B, T, H, C).

Masks are boolean, where True may attend, or float, added to the scores (0 changes nothing, -inf
hides). A mask is (T, S), or has an axis for each of the scores'; an axis of 1 is repeated. A query
that may attend to nothing gets the mean of all values, never NaN.

Dropout falls only where a rate and a key are given. `mixture_of_experts` routes, dispatches and
combines by `assay.model.moe`'s own functions, which are named here too; its gradient is written
out, so that `jax.grad` takes it and `jax.jvp` does not.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from assay.errors import AssayError
from assay.model.attention import HIDDEN, attend
from assay.model.layers import activate, depth_scale, dropout, linear, normalise
from assay.model.moe import (
    Layout,
    balance_loss,
    blocks_layout,
    capacity_layout,
    choose,
    combine,
    dispatch,
    expert_choice,
    noisy,
    normalised,
    places_per_row,
    ragged_layout,
    router_logits,
    router_z_loss,
    within_capacity,
)
from assay.model.positions import rope_tables, rotate, sinusoidal
from assay.model.sharding import initial_values
from assay.spec.model import Activation, InitSpec, Rope, WeightInit, XavierInit, ZeroInit

__all__ = [
    "AttentionParams",
    "DecoderBlockParams",
    "DecoderParams",
    "FeedForwardParams",
    "Layout",
    "MoeOutput",
    "MoeParams",
    "NormParams",
    "Rope",
    "balance_loss",
    "blocks_layout",
    "capacity_layout",
    "causal_mask",
    "choose",
    "combine",
    "dispatch",
    "expert_choice",
    "feed_forward",
    "grouped_query_attention",
    "init_attention",
    "init_embedding",
    "init_feed_forward",
    "init_mixture_of_experts",
    "init_transformer_decoder",
    "init_transformer_decoder_block",
    "layer_norm",
    "log_probabilities",
    "mixture_of_experts",
    "multi_head_attention",
    "multi_query_attention",
    "noisy",
    "normalised",
    "padding_mask",
    "places_per_row",
    "ragged_layout",
    "rms_norm",
    "rope_tables",
    "rotate",
    "router_logits",
    "router_z_loss",
    "scaled_dot_product_attention",
    "sinusoidal_positions",
    "token_embedding",
    "transformer_decoder",
    "transformer_decoder_block",
    "transformer_embedding",
    "within_capacity",
]

GPT2_INIT = InitSpec()
"""N(0, 0.02), projections into the residual stream divided by sqrt(2 x layers)."""

XAVIER = XavierInit(distribution="normal")

Mask = Bool[Array, "..."] | Float[Array, "..."]
NormPosition = Literal["pre", "post"]


def _refuse(what: str, found: object, expected: str) -> AssayError:
    return AssayError(f"{what}: found {found}; {expected}.")


# ---------------------------------------------------------------------------- masks


def causal_mask(seq_len: int) -> Bool[Array, "t t"]:
    """True at (t, s) where s <= t: a token sees itself and what lies before it."""
    return jnp.tril(jnp.ones((seq_len, seq_len), bool))


def padding_mask(tokens: Int[Array, "b s"], pad_token: int) -> Bool[Array, "b 1 1 s"]:
    """True at every key that is not padding. `&` joins it with a causal mask's [None, None]."""
    return (tokens != pad_token)[:, None, None, :]


def _bias(mask: Mask | None, leading: Sequence[int], t: int, s: int) -> Float32[Array, "*n t s"]:
    """The mask as `attend` adds it: (T, S), or (N, 1, T, S) with the leading axes in one."""
    if mask is None:
        return jnp.zeros((t, s), jnp.float32)
    if mask.dtype == bool:
        bias = jnp.where(mask, 0.0, HIDDEN).astype(jnp.float32)
    elif jnp.issubdtype(mask.dtype, jnp.floating):
        bias = jnp.maximum(mask.astype(jnp.float32), HIDDEN)
    else:
        expected = "give booleans (True may attend) or floats (added to the scores)"
        raise _refuse("mask", mask.dtype, expected)
    scores = (t, s) if mask.ndim == 2 else (*leading, t, s)
    fits = len(scores) == mask.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, scores, strict=True)
    )
    if not fits:
        expected = f"give ({t}, {s}), or {(*leading, t, s)}, where an axis may be 1"
        raise _refuse("mask", mask.shape, expected)
    bias = jnp.broadcast_to(bias, scores)
    return bias if bias.ndim == 2 else bias.reshape(-1, 1, t, s)


# ---------------------------------------------------------------------------- attention


def scaled_dot_product_attention(
    q: Float[Array, "*h t c"],
    k: Float[Array, "*h s c"],
    v: Float[Array, "*h s c"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "*h t c"]:
    """softmax(q k^T scale + mask) v over the last two axes (arXiv:1706.03762, section 3.2.1).

    Any axes may lead (batch, heads), the same in all three. `scale` None is 1 / sqrt(C). The
    softmax is in float32; the result has q's dtype. Dropout falls on the weights.

    Raises:
        AssayError: if shapes do not fit, or the mask is neither boolean nor float.
    """
    *leading, t, c = q.shape
    s = k.shape[-2]
    if k.shape != (*leading, s, c):
        raise _refuse("k", k.shape, f"q is {q.shape}, so only the last axis but one may differ")
    if v.shape != k.shape:
        raise _refuse("v", v.shape, f"it must have the shape of k, {k.shape}")
    rows = math.prod(leading)
    out = attend(
        q.reshape(rows, t, 1, c),
        k.reshape(rows, s, 1, c),
        v.reshape(rows, s, 1, c),
        _bias(mask, leading, t, s),
        scale=1.0 / math.sqrt(c) if scale is None else scale,
        dropout_rate=dropout_rate,
        key=dropout_key,
    )
    return out.reshape(q.shape)


def grouped_query_attention(
    query: Float[Array, "*b h t c"],
    key: Float[Array, "*b k s c"],
    value: Float[Array, "*b k s c"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "*b h t c"]:
    """Attention where each kv head serves H / K query heads (arXiv:2305.13245).

    Query head h reads kv head h // (H / K). With K = H it is multi-head attention's product.

    Raises:
        AssayError: if K does not divide H, or as `scaled_dot_product_attention`.
    """
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if heads % kv_heads:
        raise _refuse("key", f"{kv_heads} kv heads", f"they must divide the {heads} query heads")
    key, value = (jnp.repeat(x, heads // kv_heads, axis=-3) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, mask, scale=scale, dropout_rate=dropout_rate, dropout_key=dropout_key
    )


def multi_query_attention(
    query: Float[Array, "*b h t c"],
    key: Float[Array, "*b s c"],
    value: Float[Array, "*b s c"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "*b h t c"]:
    """Attention where all heads share one key and value, which have no head axis.

    Source: Shazeer (arXiv:1911.02150).

    Raises:
        AssayError: as `scaled_dot_product_attention`.
    """
    key, value = key[..., None, :, :], value[..., None, :, :]
    return grouped_query_attention(
        query, key, value, mask, scale=scale, dropout_rate=dropout_rate, dropout_key=dropout_key
    )


class AttentionParams(NamedTuple):
    """Projections to H query heads and K kv heads, and back. Matrices are (fan_in, fan_out)."""

    q: Float[Array, "d h_c"]
    k: Float[Array, "d k_c"]
    v: Float[Array, "d k_c"]
    o: Float[Array, "h_c d"]
    q_bias: Float[Array, "h_c"] | None = None
    k_bias: Float[Array, "k_c"] | None = None
    v_bias: Float[Array, "k_c"] | None = None
    o_bias: Float[Array, "d"] | None = None


def multi_head_attention(
    query: Float[Array, "b t d"],
    key: Float[Array, "b s d"],
    value: Float[Array, "b s d"],
    mask: Mask | None = None,
    *,
    num_heads: int,
    params: AttentionParams,
    rotation: tuple[Float32[Array, "*b t half"], Float32[Array, "*b t half"]] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "b t d"]:
    """The layer with its weights: project, split into heads, attend, merge, project back.

    The width of `params.k` says how many kv heads there are: H (multi-head), 1 (multi-query), or
    between (grouped). The mask is (T, S) or (B, 1 or H, T, S). `rotation` are `rope_tables` of
    the positions, which queries and keys then share.

    Raises:
        AssayError: if the weights do not split into heads, or as `scaled_dot_product_attention`.
    """
    width, rest = divmod(params.q.shape[1], num_heads)
    if rest:
        expected = f"num_heads ({num_heads}) must divide its columns"
        raise _refuse("params.q", params.q.shape, expected)
    if params.k.shape[1] % width:
        expected = f"its columns must be a multiple of the head width ({width})"
        raise _refuse("params.k", params.k.shape, expected)

    def split(x: Array, w: Array, b: Array | None) -> Float[Array, "b t h c"]:
        y = linear(x, w, b)
        return y.reshape(*y.shape[:2], -1, width)

    q = split(query, params.q, params.q_bias)
    k = split(key, params.k, params.k_bias)
    v = split(value, params.v, params.v_bias)
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = grouped_query_attention(
        q, k, v, mask, dropout_rate=dropout_rate, dropout_key=dropout_key
    ).swapaxes(1, 2)
    return linear(out.reshape(*out.shape[:2], -1), params.o, params.o_bias)


def init_attention(
    key: Key[Array, ""],
    *,
    d_model: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    bias: bool = False,
    init: InitSpec = GPT2_INIT,
    num_layers: int = 1,
) -> AttentionParams:
    """Weights of `multi_head_attention`; `num_kv_heads` None is `num_heads`.

    `num_layers` is for inits that make residual projections smaller in deeper stacks.

    Raises:
        AssayError: if `num_heads` does not divide `d_model`, or `num_kv_heads` `num_heads`.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if d_model % num_heads:
        raise _refuse("num_heads", num_heads, f"it must divide d_model ({d_model})")
    if num_heads % kv_heads:
        raise _refuse("num_kv_heads", kv_heads, f"it must divide num_heads ({num_heads})")
    narrow = d_model // num_heads * kv_heads
    keys = jax.random.split(key, 4)
    return AttentionParams(
        q=initial_values(keys[0], (d_model, d_model), init.weights),
        k=initial_values(keys[1], (d_model, narrow), init.weights),
        v=initial_values(keys[2], (d_model, narrow), init.weights),
        o=_residual_values(keys[3], (d_model, d_model), init, num_layers),
        q_bias=jnp.zeros(d_model) if bias else None,
        k_bias=jnp.zeros(narrow) if bias else None,
        v_bias=jnp.zeros(narrow) if bias else None,
        o_bias=jnp.zeros(d_model) if bias else None,
    )


def _residual_values(
    key: Key[Array, ""], shape: tuple[int, int], init: InitSpec, num_layers: int
) -> Float32[Array, "i o"]:
    """A projection into the residual stream, by `InitSpec.residual`."""
    scale = depth_scale(num_layers) if init.residual == "depth_scaled" else 1.0
    weights = ZeroInit() if init.residual == "zero" else init.weights
    return scale * initial_values(key, shape, weights)


# ---------------------------------------------------------------------------- feed-forward


class FeedForwardParams(NamedTuple):
    """d -> hidden -> d; with a `gate`, the GLU family. Matrices are (fan_in, fan_out)."""

    up: Float[Array, "d f"]
    down: Float[Array, "f d"]
    up_bias: Float[Array, "f"] | None = None
    down_bias: Float[Array, "d"] | None = None
    gate: Float[Array, "d f"] | None = None
    gate_bias: Float[Array, "f"] | None = None


def feed_forward(
    x: Float[Array, "*b d"], *, params: FeedForwardParams, activation: Activation = "relu"
) -> Float[Array, "*b d"]:
    """act(x up) down (arXiv:1706.03762, section 3.3); gated, (act(x gate) * x up) down.

    The gated form is Shazeer's (arXiv:2002.05202).
    """
    return _feed_forward(x, params, activation, linear)


def _feed_forward(x, params: FeedForwardParams, activation: Activation, linear):
    """With `linear(x, w, bias)` for its products."""
    hidden = linear(x, params.up, params.up_bias)
    if params.gate is None:
        hidden = activate(hidden, activation)
    else:
        hidden = activate(linear(x, params.gate, params.gate_bias), activation) * hidden
    return linear(hidden, params.down, params.down_bias)


def init_feed_forward(
    key: Key[Array, ""],
    *,
    d_model: int,
    d_ff: int,
    bias: bool = False,
    gated: bool = False,
    init: InitSpec = GPT2_INIT,
    num_layers: int = 1,
) -> FeedForwardParams:
    """Weights of `feed_forward`. Biases begin at 0."""
    keys = jax.random.split(key, 3)
    return FeedForwardParams(
        up=initial_values(keys[0], (d_model, d_ff), init.weights),
        down=_residual_values(keys[1], (d_ff, d_model), init, num_layers),
        up_bias=jnp.zeros(d_ff) if bias else None,
        down_bias=jnp.zeros(d_model) if bias else None,
        gate=initial_values(keys[2], (d_model, d_ff), init.weights) if gated else None,
        gate_bias=jnp.zeros(d_ff) if bias and gated else None,
    )


# ---------------------------------------------------------------------------- experts


class MoeParams(NamedTuple):
    """A router, and E experts as one `FeedForwardParams` whose arrays have E in front.

    `noise` is the second projection of a noisy router. Biases are (E,).
    """

    router: Float[Array, "d e"]
    experts: FeedForwardParams
    router_bias: Float[Array, "e"] | None = None
    noise: Float[Array, "d e"] | None = None
    noise_bias: Float[Array, "e"] | None = None


class MoeOutput(NamedTuple):
    """What a mixture gives, and what `balance_loss` and `router_z_loss` are made of."""

    y: Float[Array, "b t d"]
    logits: Float32[Array, "b t e"]
    experts: Int32[Array, "b t k"]
    kept: Bool[Array, "b t k"]
    load: Float32[Array, "e"]


def mixture_of_experts(
    x: Float[Array, "b t d"],
    *,
    params: MoeParams,
    k: int = 2,
    activation: Activation = "relu",
    renormalise: bool = True,
    noise_key: Key[Array, ""] | None = None,
    load: float | None = None,
) -> MoeOutput:
    """Each token through the k experts that its router scores highest, and no other.

    The weights are a softmax over the k chosen logits, or (`renormalise=False`) those of the
    softmax over all. A `noise_key` draws makeMoE's noise, eps softplus(x noise), where the router
    has it. `load` limits each expert to so many times the mean of a row's choices, in the order
    of the row; a token over the limit gets nothing from that expert. The router is in float32.
    """
    (b, t, d), e = x.shape, params.router.shape[1]
    logits = router_logits(x, params.router, params.router_bias)
    if noise_key is not None:
        if params.noise is None:
            raise _refuse("noise_key", "one", "the router has no noise projection")
        logits = noisy(logits, router_logits(x, params.noise, params.noise_bias), noise_key)
    experts, _ = choose(logits, k)
    chosen = jnp.take_along_axis(
        logits if renormalise else jax.nn.softmax(logits, axis=-1), experts, axis=-1
    )
    weights = jax.nn.softmax(chosen, axis=-1) if renormalise else chosen
    kept = jnp.ones(experts.shape, bool)
    if load is not None:
        places = places_per_row(load, k, t, e)
        limits = {"num_experts": e, "capacity": places, "by_weight": False}
        kept = within_capacity(experts, weights, kept, **limits)
    sort = blocks_layout if jax.default_backend() == "cpu" else ragged_layout
    layout = sort(experts, kept, e)
    y = _by_expert(dispatch(x.reshape(b * t, d), layout), layout, params.experts, activation)
    y = combine(y, layout, jnp.where(kept, weights, 0.0).reshape(b * t, k))
    choices = jnp.mean(jax.nn.one_hot(experts, e), axis=(0, 1, 2))
    return MoeOutput(y.reshape(b, t, d), logits, experts, kept, choices)


def _by_expert(x, layout: Layout, params: FeedForwardParams, activation: Activation):
    """`feed_forward`, each place by its own expert."""

    def linear(x, w, bias):
        y = layout.product(x, w.astype(x.dtype))
        return y if bias is None else y + layout.spread(bias.astype(x.dtype))

    return _feed_forward(x, params, activation, linear)


def init_mixture_of_experts(
    key: Key[Array, ""],
    *,
    experts: int,
    d_model: int,
    d_ff: int,
    noisy: bool = False,
    bias: bool = False,
    gated: bool = False,
    init: InitSpec = GPT2_INIT,
    num_layers: int = 1,
) -> MoeParams:
    """Weights of `mixture_of_experts`, each expert's drawn for itself. Biases begin at 0."""
    router_key, noise_key, experts_key = jax.random.split(key, 3)

    def expert(key: Key[Array, ""]) -> FeedForwardParams:
        return init_feed_forward(
            key,
            d_model=d_model,
            d_ff=d_ff,
            bias=bias,
            gated=gated,
            init=init,
            num_layers=num_layers,
        )

    shape = (d_model, experts)
    return MoeParams(
        router=initial_values(router_key, shape, init.weights),
        experts=jax.vmap(expert)(jax.random.split(experts_key, experts)),
        router_bias=jnp.zeros(experts) if bias else None,
        noise=initial_values(noise_key, shape, init.weights) if noisy else None,
        noise_bias=jnp.zeros(experts) if bias and noisy else None,
    )


# ---------------------------------------------------------------------------- norms


def layer_norm(
    x: Float[Array, "*b d"],
    scale: Float[Array, "d"] | None = None,
    bias: Float[Array, "d"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32 (arXiv:1607.06450)."""
    return normalise(x, scale, bias, centred=True, epsilon=epsilon)


def rms_norm(
    x: Float[Array, "*b d"],
    scale: Float[Array, "d"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*b d"]:
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32 (arXiv:1910.07467)."""
    return normalise(x, scale, centred=False, epsilon=epsilon)


class NormParams(NamedTuple):
    """LayerNorm's scale and bias; None leaves either out."""

    scale: Float[Array, "d"] | None = None
    bias: Float[Array, "d"] | None = None


def _init_norm(d_model: int) -> NormParams:
    return NormParams(jnp.ones(d_model), jnp.zeros(d_model))


# ---------------------------------------------------------------------------- the decoder


class DecoderBlockParams(NamedTuple):
    """One layer. `cross` is there where the block also reads a memory (an encoder's output)."""

    attention: AttentionParams
    attention_norm: NormParams
    feed_forward: FeedForwardParams
    feed_forward_norm: NormParams
    cross: AttentionParams | None = None
    cross_norm: NormParams | None = None


class DecoderParams(NamedTuple):
    """All layers, and the norm that follows the last (none after post-norm layers)."""

    blocks: tuple[DecoderBlockParams, ...]
    final_norm: NormParams | None


def transformer_decoder_block(
    x: Float[Array, "b t d"],
    mask: Mask | None,
    *,
    num_heads: int,
    params: DecoderBlockParams,
    memory: Float[Array, "b s d"] | None = None,
    memory_mask: Mask | None = None,
    activation: Activation = "relu",
    norm_position: NormPosition = "pre",
    epsilon: float = 1e-5,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "b t d"]:
    """Self-attention, attention to `memory` where there is one, feed-forward; each a residual.

    `norm_position`: pre, x + f(norm(x)); post, norm(x + f(x)) (arXiv:1706.03762). `mask` is over
    the block's own tokens, `memory_mask` (T, S) or (B, 1, T, S) over the memory's; None hides
    nothing, so an encoder's block is this one with a padding mask. Dropout falls on each part's
    output.

    Raises:
        AssayError: if there is a memory without weights to read it or the other way round, or
            as `multi_head_attention`.
    """
    if (memory is None) != (params.cross is None):
        found = "a memory" if params.cross is None else "no memory"
        raise _refuse("memory", found, "it goes with params.cross, both or neither")
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)

    def residual(x: Array, norm: NormParams, key: Key[Array, ""] | None, part) -> Array:
        if norm_position == "pre":
            return x + dropout(part(layer_norm(x, *norm, epsilon=epsilon)), dropout_rate, key)
        return layer_norm(x + dropout(part(x), dropout_rate, key), *norm, epsilon=epsilon)

    def attend_to_itself(y):
        return multi_head_attention(y, y, y, mask, num_heads=num_heads, params=params.attention)

    def attend_to_memory(y):
        return multi_head_attention(
            y, memory, memory, memory_mask, num_heads=num_heads, params=params.cross
        )

    def feed(y):
        return feed_forward(y, params=params.feed_forward, activation=activation)

    x = residual(x, params.attention_norm, keys[0], attend_to_itself)
    if memory is not None:
        x = residual(x, params.cross_norm, keys[1], attend_to_memory)
    return residual(x, params.feed_forward_norm, keys[2], feed)


def transformer_decoder(
    x: Float[Array, "b t d"],
    mask: Mask | None,
    *,
    num_layers: int,
    num_heads: int,
    d_model: int,
    d_ff: int,
    params: DecoderParams | None = None,
    key: Key[Array, ""] | None = None,
    memory: Float[Array, "b s d"] | None = None,
    memory_mask: Mask | None = None,
    activation: Activation = "relu",
    norm_position: NormPosition = "pre",
    epsilon: float = 1e-5,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "b t d"]:
    """A stack of decoder blocks, vectors in and out; no embedding and no head.

    Its weights are `params`, or, to look at shapes, drawn from `key`: multi-query, one kv head
    for all (arXiv:1911.02150). The sizes must be those of the weights. `mask` must be given:
    `causal_mask(T)` for a language model. The rest is as in `transformer_decoder_block`.

    Raises:
        AssayError: if not one of `params` and `key` is given, if a size is not the weights', or
            as `transformer_decoder_block`.
    """
    if (params is None) == (key is None):
        found = "neither" if params is None else "both"
        raise _refuse("params or key", found, "give the weights, or a key to draw them from")
    if params is None:
        params = init_transformer_decoder(
            key,
            num_layers=num_layers,
            num_heads=num_heads,
            d_model=d_model,
            d_ff=d_ff,
            cross=memory is not None,
            norm_position=norm_position,
        )
    _check_size("num_layers", num_layers, len(params.blocks))
    if x.shape[-1] != d_model:
        raise _refuse("x", x.shape, f"its last axis must be d_model ({d_model})")
    for i, block in enumerate(params.blocks):
        _check_size("d_model", d_model, block.feed_forward.up.shape[0])
        _check_size("d_ff", d_ff, block.feed_forward.up.shape[1])
        x = transformer_decoder_block(
            x,
            mask,
            num_heads=num_heads,
            params=block,
            memory=memory,
            memory_mask=memory_mask,
            activation=activation,
            norm_position=norm_position,
            epsilon=epsilon,
            dropout_rate=dropout_rate,
            dropout_key=None if dropout_key is None else jax.random.fold_in(dropout_key, i),
        )
    return x if params.final_norm is None else layer_norm(x, *params.final_norm, epsilon=epsilon)


def _check_size(name: str, given: int, found: int) -> None:
    if given != found:
        raise _refuse(name, given, f"the weights have {found}")


def init_transformer_decoder(
    key: Key[Array, ""],
    *,
    num_layers: int,
    num_heads: int,
    d_model: int,
    d_ff: int,
    num_kv_heads: int | None = 1,
    cross: bool = False,
    bias: bool = False,
    gated: bool = False,
    norm_position: NormPosition = "pre",
    init: InitSpec = GPT2_INIT,
) -> DecoderParams:
    """Weights of `transformer_decoder`, multi-query unless `num_kv_heads` says otherwise.

    `num_kv_heads` None is `num_heads`. Pre-norm stacks have a final norm, post-norm ones none.

    Raises:
        AssayError: as `init_attention`.
    """
    blocks = tuple(
        init_transformer_decoder_block(
            k,
            num_heads=num_heads,
            d_model=d_model,
            d_ff=d_ff,
            num_kv_heads=num_kv_heads,
            cross=cross,
            bias=bias,
            gated=gated,
            init=init,
            num_layers=num_layers,
        )
        for k in jax.random.split(key, max(num_layers, 1))[:num_layers]
    )
    return DecoderParams(blocks, _init_norm(d_model) if norm_position == "pre" else None)


def init_transformer_decoder_block(
    key: Key[Array, ""],
    *,
    num_heads: int,
    d_model: int,
    d_ff: int,
    num_kv_heads: int | None = 1,
    cross: bool = False,
    bias: bool = False,
    gated: bool = False,
    init: InitSpec = GPT2_INIT,
    num_layers: int = 1,
) -> DecoderBlockParams:
    """Weights of one layer of `num_layers`; `cross` adds those that read a memory.

    Raises:
        AssayError: as `init_attention`.
    """
    keys = jax.random.split(key, 3)
    heads = {"d_model": d_model, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    shared = {"bias": bias, "init": init, "num_layers": num_layers}
    return DecoderBlockParams(
        attention=init_attention(keys[0], **heads, **shared),
        attention_norm=_init_norm(d_model),
        feed_forward=init_feed_forward(keys[1], d_model=d_model, d_ff=d_ff, gated=gated, **shared),
        feed_forward_norm=_init_norm(d_model),
        cross=init_attention(keys[2], **heads, **shared) if cross else None,
        cross_norm=_init_norm(d_model) if cross else None,
    )


# ---------------------------------------------------------------------------- tokens and places


def sinusoidal_positions(
    seq_len: int, d_model: int, *, theta: float = 10_000.0
) -> Float32[Array, "t d"]:
    """Sines in the even features, cosines in the odd (arXiv:1706.03762, section 3.5).

    Raises:
        AssayError: if `d_model` is odd.
    """
    if d_model % 2:
        raise _refuse("d_model", d_model, "sinusoidal positions need it even")
    return sinusoidal(jnp.arange(seq_len, dtype=jnp.int32), d_model, theta)


def init_embedding(
    key: Key[Array, ""],
    rows: int,
    d_model: int,
    *,
    init: WeightInit = XAVIER,
) -> Float32[Array, "v d"]:
    """A table of vectors, for tokens or for learned positions."""
    return initial_values(key, (rows, d_model), init)


def token_embedding(
    tokens: Int[Array, "*b t"], *, table: Float[Array, "v d"]
) -> Float[Array, "*b t d"]:
    """Rows of the table times sqrt(D) (arXiv:1706.03762, section 3.4)."""
    return table[tokens] * math.sqrt(table.shape[1])


def transformer_embedding(
    tokens: Int32[Array, "b t"],
    *,
    table: Float[Array, "v d"],
    positions: Float[Array, "p d"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "b t d"]:
    """Tokens scaled by sqrt(D), plus the first T rows of `positions`; None is sinusoidal.

    Raises:
        AssayError: if there are more tokens than positions.
    """
    length, width = tokens.shape[1], table.shape[1]
    if positions is None:
        positions = sinusoidal_positions(length, width)
    elif length > positions.shape[0]:
        expected = f"the positions end at {positions.shape[0]}"
        raise _refuse("tokens", f"{length} of them", expected)
    x = token_embedding(tokens, table=table) + positions[None, :length]
    return dropout(x, dropout_rate, dropout_key)


def log_probabilities(
    x: Float[Array, "*b d"],
    *,
    w: Float[Array, "d v"],
    b: Float[Array, "v"] | None = None,
    temperature: float = 1.0,
) -> Float32[Array, "*b v"]:
    """log softmax((x w + b) / temperature), in float32."""
    return jax.nn.log_softmax(linear(x, w, b).astype(jnp.float32) / temperature, axis=-1)
