"""Attention: who sees whom, the product itself, and the layer around it.

Axes: B batch, T queries, S keys, D model, H heads, K kv heads, G = H / K, C head width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from assay.model import blas, native
from assay.model.cache import LayerCache
from assay.model.flash import fits, flash_attend, flash_kernel
from assay.model.layers import (
    CpuKernels,
    Linear,
    Norm,
    activate,
    dropout,
    linears,
    one_product,
    side_by_side,
    use_cpu_kernels,
)
from assay.model.positions import alibi_bias, relative_bias, rope_tables, rotate
from assay.model.sharding import constant_parameter, constrain, parameter, table_rows
from assay.spec.model import Alibi, AttentionSpec, RelativeBias, Rope, ValueEmbedding, WeightInit
from assay.spec.run import ComputeSpec

HIDDEN = -1e30
"""Added to a score that must not count. Finite, so that a row with no key at all is no NaN."""


@dataclass(frozen=True)
class Geometry:
    """What every layer of one forward shares.

    Masks by window, rotations by kind, biases of each head by kind and number of heads; the mask
    of the source; the tokens, for tables that are read in a layer. `in_order` is None where masks
    follow from more than the places of a row: a cache, given positions, padding.
    """

    biases: dict[int | None, Float32[Array, "*b t s"]]
    rotations: dict[tuple[Rope, int], tuple[Array, Array]]
    by_head: dict[tuple[RelativeBias | Alibi, int], Float32[Array, "#b h t s"]] = field(
        default_factory=dict
    )
    source: Float32[Array, "r 1 1 s"] | None = None
    tokens: Int32[Array, "b t"] | None = None
    in_order: "InOrder | None" = None

    def bias(self, attention: AttentionSpec) -> Float32[Array, "..."]:
        """What is added to the scores of an attention."""
        bias = self.biases[attention.window]
        kind = (attention.positions, attention.heads)
        if kind not in self.by_head:
            return bias
        return self.by_head[kind] + bias.reshape((-1, 1, *bias.shape[-2:]))


class InOrder(NamedTuple):
    """All that masks are made of where a row's places say who is behind whom."""

    causal: bool
    segment_ids: Int32[Array, "b t"] | None


def hide(mask: Bool[Array, "..."]) -> Float32[Array, "..."]:
    """A bias: 0 where the mask is True, `HIDDEN` elsewhere."""
    return jnp.where(mask, 0.0, HIDDEN).astype(jnp.float32)


def four_axes(bias: Float32[Array, "*b t s"]) -> Float32[Array, "b h t s"]:
    """A bias with an axis of the batch and one of heads, each of them 1 where it had none."""
    return bias if bias.ndim == 4 else bias.reshape((-1, 1, *bias.shape[-2:]))


def geometry(
    attentions: Iterable[AttentionSpec],
    d_model: int,
    positions: Int32[Array, "*b t"],
    *,
    causal: bool,
    segment_ids: Int32[Array, "b t"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
    slots: int | None = None,
    relative: Float[Array, "n h"] | None = None,
    source_mask: Bool[Array, "r s"] | None = None,
    tokens: Int32[Array, "b t"] | None = None,
) -> Geometry:
    """Masks, rotations and biases for queries at `positions`.

    Keys stand at the queries' own positions, or, with a cache, at its `slots` 0 ... S-1. With
    `segment_ids` a token sees only its own segment; `positions` may then restart in each, since
    order is taken from the place in the row. Keys where `mask` is False are seen by nobody.
    `relative` is the stack's table of relative positions.
    """
    seats = positions if segment_ids is None else jnp.arange(positions.shape[-1])
    keys = seats if slots is None else jnp.arange(slots)
    keys = keys.reshape((1,) * (seats.ndim - keys.ndim) + keys.shape)
    behind = seats[..., :, None] - keys[..., None, :]  # how far a key lies behind its query
    biases, rotations, by_head = {}, {}, {}
    for attention in attentions:
        window = attention.window
        if window not in biases:
            seen = behind >= 0 if causal else jnp.ones_like(behind, bool)
            if window is not None:
                seen = seen & (behind < window) & (behind > -window)
            if segment_ids is not None:
                seen = seen[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
            if mask is not None:
                seen = (seen if seen.ndim == 3 else seen[None]) & mask[:, None, :]
            bias = hide(seen)
            biases[window] = bias if bias.ndim == 2 else bias[:, None]
        rope = attention.positions
        if rope.kind == "rope":
            width = attention.width(d_model)
            tables = rope_tables(positions, width, rope)
            if slots is not None:  # else XLA computes them again in every layer
                tables = jax.lax.optimization_barrier(tables)
            rotations[rope, width] = tables
        elif rope.kind == "relative":
            by_head[rope, attention.heads] = relative_bias(behind, relative, rope, causal=causal)
        elif rope.kind == "alibi":
            by_head[rope, attention.heads] = alibi_bias(behind, attention.heads)
    source = None if source_mask is None else hide(source_mask)[:, None, None, :]
    given = slots is not None or mask is not None or seats.ndim == 2
    in_order = None if given else InOrder(causal, segment_ids)
    return Geometry(biases, rotations, by_head, source, tokens, in_order)


def attend(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    bias: Float32[Array, "*b t s"],
    *,
    scale: float,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    cpu: CpuKernels = False,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "b t h c"]:
    """softmax(q k^T scale + bias) v, the softmax in float32 (arXiv:1706.03762, section 3.2.1).

    `bias` is (T, S), or (B, 1 or H, T or 1, S) where B may be 1. Each kv head serves H / K query
    heads. `causal` and `window` say what the bias hides by place alone, so that a kernel may leave
    it out.
    """
    b, t, h, c = q.shape
    bias = four_axes(bias)
    groups = h // k.shape[2]
    if cpu and softcap is None and (key is None or dropout_rate == 0.0) and t > 1:
        # A bias of one head may be a trained table's, and BLAS has no gradient for it.
        if cpu == "blas" and h > 1 and blas.attends(q.dtype, bias.shape) and blas.usable():
            square = causal and t == k.shape[1]
            return blas.attend(q, k, v, bias, scale, square, window if square else None)
        return _attend_in_blocks(q, k, v, bias, scale, _blocks(t, k.shape[1], causal, window))
    lying = cpu and t == 1
    q = q.reshape(b, t, h // groups, groups, c)
    if lying:
        scores = _scores_as_keys_lie(q, k) * scale
    else:
        scores = jnp.einsum("btkgc,bskc->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias.shape[1] == 1:
        scores = scores + bias[:, :, None]
    else:
        scores = scores + bias.reshape((-1, h // groups, groups, *bias.shape[-2:]))
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(q.dtype)
    if lying:
        return _sums_as_values_lie(weights, v).reshape(b, t, h, c)
    return jnp.einsum("bkgts,bskc->btkgc", weights, v).reshape(b, t, h, c)


def _scores_as_keys_lie(
    q: Float[Array, "b 1 k g c"], k: Float[Array, "b s k c"]
) -> Float32[Array, "b k g 1 s"]:
    """The scores of one query a row, with no copy of the keys.

    XLA's CPU backend turns (B, S, K, C) to (B, K, S, C) before a product for each head, at every
    token. With the queries on the diagonal of a matrix (K C, K G) it is one product of the keys
    as they lie: K times the arithmetic, which is little for one query, and no copy.
    """
    b, s, heads, c = k.shape
    diagonal = jnp.eye(heads, dtype=q.dtype)
    wide = jnp.einsum("bkgc,kj->bkgjc", q[:, 0], diagonal).reshape(b, -1, heads * c)
    scores = jnp.einsum(
        "bhn,bsn->bhs", wide, k.reshape(b, s, -1), preferred_element_type=jnp.float32
    )
    return scores.reshape(b, heads, -1, 1, s)


def _sums_as_values_lie(
    weights: Float[Array, "b k g 1 s"], v: Float[Array, "b s k c"]
) -> Float[Array, "b 1 k g c"]:
    """Every head's sum of every kv head's values, of which each head's own are taken."""
    b, s, heads, c = v.shape
    sums = jnp.einsum("bhs,bsn->bhn", weights.reshape(b, -1, s), v.reshape(b, s, -1))
    sums = sums.reshape(b, heads, -1, heads, c)
    return jnp.einsum("bkgkc->bkgc", sums)[:, None]


QUERIES_AT_A_TIME = 256
"""Of a causal attention, where there are more: each such block reads only the keys it can see."""


def _blocks(
    queries: int, keys: int, causal: bool, window: int | None
) -> tuple[tuple[slice, slice], ...]:
    """Blocks of queries, each with the keys that it may see."""
    if not causal or queries != keys or queries <= QUERIES_AT_A_TIME:
        return ((slice(queries), slice(keys)),)
    blocks = []
    for first in range(0, queries, QUERIES_AT_A_TIME):
        last = min(first + QUERIES_AT_A_TIME, queries)
        oldest = 0 if window is None else max(first - window + 1, 0)
        oldest -= oldest % QUERIES_AT_A_TIME
        blocks.append((slice(first, last), slice(oldest, last)))
    return tuple(blocks)


def _attend_in_blocks(q, k, v, bias, scale, blocks):
    if len(blocks) == 1:
        return _attend_in_groups(q, k, v, bias, scale)
    parts = (
        _attend_in_groups(q[:, rows], k[:, seen], v[:, seen], bias[:, :, rows, seen], scale)
        for rows, seen in blocks
    )
    return jnp.concatenate(list(parts), axis=1)


def _attend_in_groups(q, k, v, bias, scale):
    """Queries that share a kv head are so many more rows of one product: nothing is repeated."""
    b, t, h, c = q.shape
    heads, groups = k.shape[2], h // k.shape[2]
    if groups == 1:
        return _cpu_attend(q, k, v, bias, scale)
    rows = q.reshape(b, t, heads, groups, c).swapaxes(2, 3).reshape(b, t * groups, heads, c)
    if bias.shape[1] > 1:  # (B, K G, T, S) -> (B, K, T G, S)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], t, bias.shape[3]))
        bias = bias.reshape(bias.shape[0], heads, groups, *bias.shape[2:]).swapaxes(2, 3)
        bias = bias.reshape(bias.shape[0], heads, -1, bias.shape[-1])
    elif bias.shape[2] > 1:
        bias = jnp.repeat(bias, groups, axis=2)
    out = _cpu_attend(rows, k, v, bias, scale)
    return out.reshape(b, t, groups, heads, c).swapaxes(2, 3).reshape(b, t, h, c)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cpu_attend(q, k, v, bias, scale):
    return _cpu_attend_forward(q, k, v, bias, scale)[0]


def _cpu_attend_forward(q, k, v, bias, scale):
    # The layout (B, T, H, C) is kept throughout: XLA's CPU products are slow on any other.
    scores = jnp.einsum("bthc,bshc->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores * scale + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bhts,bshc->bthc", weights, v)
    return out, (q, k, v, bias, weights, out)


def _cpu_attend_backward(scale, saved, g):
    q, k, v, bias, weights, out = saved
    g = jax.lax.optimization_barrier(g)
    f32 = jnp.float32
    d_weights = jnp.einsum("bthc,bshc->bhts", g, v)
    row = jnp.sum(g.astype(f32) * out.astype(f32), axis=-1).swapaxes(1, 2)[..., None]
    d_scores = weights.astype(f32) * (d_weights.astype(f32) - row)
    # Of a trained table; where the bias is a mask nobody asks for it, and XLA leaves it out.
    broadcast = [axis for axis, size in enumerate(bias.shape) if size == 1]
    d_bias = jnp.sum(d_scores, axis=tuple(broadcast), keepdims=True)
    d_scores = jax.lax.optimization_barrier((d_scores * scale).astype(q.dtype))
    dq = jnp.einsum("bhts,bshc->bthc", d_scores, k)
    dk = jnp.einsum("bhts,bthc->bshc", d_scores, q)
    dv = jnp.einsum("bhts,bthc->bshc", weights, g)
    return dq, dk, dv, d_bias


_cpu_attend.defvjp(_cpu_attend_forward, _cpu_attend_backward)


class ValueTable(nnx.Module):
    """What a layer knows of each token besides its input: a row of a table, added to the values."""

    def __init__(
        self,
        key: Key[Array, ""],
        rows: int,
        kv_heads: int,
        width: int,
        spec: ValueEmbedding,
        init: WeightInit,
    ):
        self.kv_heads, self.channels = kv_heads, spec.gate_channels
        self.table = parameter(key, (rows, kv_heads * width), ("vocab", "kv_heads"), init)
        gate = (self.channels, kv_heads)
        self.gate = constant_parameter(gate, (None, "kv_heads"), 0.0) if self.channels else None
        self.mix = None if self.channels else constant_parameter((2,), (None,), 0.5)

    def __call__(
        self,
        v: Float[Array, "b t k c"],
        x: Float[Array, "b t d"],
        tokens: Int32[Array, "b t"],
    ) -> Float[Array, "b t k c"]:
        rows = table_rows(self.table, tokens).astype(v.dtype).reshape(v.shape)
        if self.gate is None:
            own, row = self.mix[...].astype(v.dtype)
            return own * v + row * rows
        read = x[..., : self.channels].astype(jnp.float32)
        gate = 2.0 * jax.nn.sigmoid(jnp.einsum("btn,nk->btk", read, self.gate[...]))
        return v + gate[..., None].astype(v.dtype) * rows


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values, (B, T, D) -> (B, T, D).

    Called, it reads its own input; `read` is cross-attention, of another's keys and values.
    """

    def __init__(
        self,
        key: Key[Array, ""],
        d_model: int,
        spec: AttentionSpec,
        *,
        init: WeightInit,
        residual_init: WeightInit,
        residual_scale: float,
        compute: ComputeSpec,
        query_init: WeightInit | None = None,
        vocab_rows: int = 0,
    ):
        self.spec = spec
        self.cpu, self.flash = use_cpu_kernels(compute), flash_kernel(compute)
        self.native = False  # True in a model made ready to decode, where C++ was compiled
        self.width = spec.width(d_model)
        self.scale = spec.scale or 1.0 / math.sqrt(self.width)
        wide, narrow = spec.heads * self.width, spec.num_kv_heads * self.width
        keys = jax.random.split(key, 4)
        qkv = {"init": init, "bias": spec.qkv_bias, "compute": compute}
        queries = qkv | {"init": query_init or init}
        self.q = Linear(keys[0], d_model, wide, axes=("embed", "heads"), **queries)
        self.k = Linear(keys[1], d_model, narrow, axes=("embed", "kv_heads"), **qkv)
        self.v = Linear(keys[2], d_model, narrow, axes=("embed", "kv_heads"), **qkv)
        # The three as one, in a model made ready to decode (`decoding.py`).
        self.qkv = nnx.data(None)
        self.o = Linear(
            keys[3],
            wide,
            d_model,
            axes=("heads", "embed"),
            init=residual_init,
            scale=residual_scale,
            bias=spec.out_bias,
            compute=compute,
        )
        gate_key, table_key = jax.random.fold_in(key, 4), jax.random.fold_in(key, 5)
        gates, gate = spec.heads if spec.gate == "head" else wide, qkv | {"bias": False}
        self.gate = (
            Linear(gate_key, d_model, gates, axes=("embed", "heads"), **gate) if spec.gate else None
        )
        shape = (vocab_rows, spec.num_kv_heads, self.width)
        self.value_embedding = (
            ValueTable(table_key, *shape, spec.value_embedding, init)
            if spec.value_embedding
            else None
        )
        by_head = spec.qk_norm is not None and spec.qk_norm.over == "head"
        q_width, k_width = (self.width,) * 2 if by_head else (wide, narrow)
        self.q_norm = Norm(q_width, spec.qk_norm.norm, compute) if spec.qk_norm else None
        self.k_norm = Norm(k_width, spec.qk_norm.norm, compute) if spec.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        geometry: Geometry,
        cache: LayerCache | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """The output, and the cache with these tokens in it where one was given."""
        spec = self.spec
        bias = four_axes(geometry.bias(spec))
        causal = geometry.in_order is not None and geometry.in_order.causal
        if cache is None and self._takes_together(x, bias, key):
            return self._out(self._together(x, bias, causal), x), None
        q, k, v = self._queries_keys_values(x)
        if self.value_embedding is not None:
            v = self.value_embedding(v, x, geometry.tokens)
        if spec.positions.kind == "rope":
            cos, sin = geometry.rotations[spec.positions, self.width]
            q, k = self._rotated(q, k, cos, sin)
        if cache is not None:
            if self.native and self.is_plain():
                y, cache = native.attend(q, k, v, cache, scale=self.scale, window=spec.window)
                return self._out(y, x), cache
            cache = cache.append(k, v)
            k, v = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
        order = None if spec.positions.kind in ("alibi", "relative") else geometry.in_order
        if order is not None and self._takes_flash(q, order.causal, key):
            y = flash_attend(
                *(q, k, v, order.segment_ids),
                kernel=self.flash,
                causal=order.causal,
                window=spec.window,
                scale=self.scale,
                softcap=spec.softcap,
            )
        else:
            y = self._attend(q, k, v, bias, key, causal=causal, window=spec.window)
        return self._out(y, x), cache

    def _rotated(self, q, k, cos, sin) -> tuple[Array, Array]:
        if not self.native:
            return rotate(q, cos, sin), rotate(k, cos, sin)
        # In one: a step of decoding is made of calls that take longer to begin than to end.
        both = rotate(jnp.concatenate([q, k], axis=2), cos, sin)
        return both[:, :, : q.shape[2]], both[:, :, q.shape[2] :]

    def _takes_together(self, x, bias: Float32[Array, "#b h #t s"], key) -> bool:
        """Whether queries, keys and values are attended to just as one product made them."""
        spec = self.spec
        rotated = spec.positions.kind == "rope"
        changed = rotated or self.q_norm is not None or self.value_embedding is not None
        drops = key is not None and spec.dropout > 0.0
        if self.cpu != "blas" or self.qkv is not None or changed or drops or spec.softcap:
            return False
        attends = spec.heads > 1 and blas.attends(x.dtype, bias.shape) and blas.usable()
        return attends and one_product(x, self.q, self.k, self.v)

    def _together(self, x, bias: Float32[Array, "#b 1 #t s"], causal: bool):
        return blas.attend_together(
            side_by_side(x, self.q, self.k, self.v),
            bias,
            self.spec.heads,
            self.width,
            self.scale,
            causal,
            self.spec.window if causal else None,
        )

    def is_plain(self) -> bool:
        """Whether a query sees all that lies before it, as it is: a mask that lengths say."""
        return self.spec.positions.kind not in ("alibi", "relative") and self.spec.softcap is None

    def _takes_flash(self, q, causal, key) -> bool:
        spec = self.spec
        if self.flash is None or (key is not None and spec.dropout > 0):
            return False
        shape = (self.flash, q.dtype.name, q.shape[1], q.shape[-1])
        return fits(*shape, causal=causal, window=spec.window, softcap=spec.softcap)

    def _out(self, y: Float[Array, "b t h c"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The heads' outputs, gated by the input where there is a gate, and projected."""
        if self.gate is not None:
            gate = activate(self.gate(x), "sigmoid", cpu=self.cpu)
            y = y * gate.reshape(*y.shape[:3], -1)
        return self.o(y.reshape(*y.shape[:2], -1))

    def read(
        self,
        x: Float[Array, "b t d"],
        source: tuple[Float[Array, "r s k c"], Float[Array, "r s k c"]],
        bias: Float32[Array, "r 1 1 s"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Cross-attention to the keys and values that `keys_values` made of a source.

        Where there are fewer sources than rows, each serves B / R rows that follow one another.
        """
        q, (k, v) = self.queries(x), (y.astype(x.dtype) for y in source)
        # Rows of one source are so many more queries: nothing is repeated.
        folded = q.reshape(k.shape[0], -1, *q.shape[2:])
        y = self._attend(folded, k, v, bias, key)
        return self._out(y.reshape(*x.shape[:2], -1, self.width), x)

    def queries(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h c"]:
        return self._heads(self.q(x), "heads", self.q_norm)

    def keys_values(
        self, x: Float[Array, "b s d"]
    ) -> tuple[Float[Array, "b s k c"], Float[Array, "b s k c"]]:
        return (
            self._heads(self.k(x), "kv_heads", self.k_norm),
            self._heads(self.v(x), "kv_heads", None),
        )

    def _heads(
        self, y: Float[Array, "b t n"], axis: str, norm: Norm | None
    ) -> Float[Array, "b t h c"]:
        """A projection cut into heads, its norm before or after."""
        over = None if norm is None else self.spec.qk_norm.over
        if over == "projection":
            y = norm(y)
        y = y.reshape(*y.shape[:2], -1, self.width)
        # No head lies on two devices, even where their number does not divide.
        y = constrain(y, "batch", None, axis, None)
        return norm(y) if over == "head" else y

    def _attend(self, q, k, v, bias, key, **hidden) -> Float[Array, "b t h c"]:
        return attend(
            q,
            k,
            v,
            bias,
            scale=self.scale,
            softcap=self.spec.softcap,
            dropout_rate=self.spec.dropout,
            key=key,
            cpu=self.cpu,
            **hidden,
        )

    def _queries_keys_values(self, x: Float[Array, "b t d"]) -> tuple[Array, Array, Array]:
        if self.qkv is None:
            q, k, v = linears(x, self.q, self.k, self.v)
        else:
            wide, narrow = self.spec.heads * self.width, self.spec.num_kv_heads * self.width
            q, k, v = jnp.split(self.qkv(x), (wide, wide + narrow), axis=-1)
        return (
            self._heads(q, "heads", self.q_norm),
            self._heads(k, "kv_heads", self.k_norm),
            self._heads(v, "kv_heads", None),
        )
