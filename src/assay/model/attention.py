"""Attention: who sees whom, the product itself, and the layer around it.

Axes: B batch, T queries, S keys, D model, H heads, K kv heads, G = H / K, C head width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key

from assay.model.cache import LayerCache
from assay.model.layers import Linear, Norm, dropout, use_cpu_kernels
from assay.model.positions import rope_tables, rotate
from assay.model.sharding import constrain
from assay.spec.model import AttentionSpec, Rope, WeightInit
from assay.spec.run import ComputeSpec

HIDDEN = -1e30
"""Added to a score that must not count. Finite, so that a row with no key at all is no NaN."""


@dataclass(frozen=True)
class Geometry:
    """What every layer of one forward shares: masks by window, and rotations by kind."""

    biases: dict[int | None, Float32[Array, "*b t s"]]
    rotations: dict[tuple[Rope, int], tuple[Array, Array]]


def geometry(
    attentions: Iterable[AttentionSpec],
    d_model: int,
    positions: Int32[Array, "*b t"],
    *,
    causal: bool,
    segment_ids: Int32[Array, "b t"] | None = None,
    slots: int | None = None,
) -> Geometry:
    """Masks and rotations for queries at `positions`.

    Keys stand at the queries' own positions, or, with a cache, at its `slots` 0 ... S-1. With
    `segment_ids` a token sees only its own segment; `positions` may then restart in each, since
    order is taken from the place in the row.
    """
    seats = positions if segment_ids is None else jnp.arange(positions.shape[-1])
    keys = seats if slots is None else jnp.arange(slots)
    keys = keys.reshape((1,) * (seats.ndim - keys.ndim) + keys.shape)
    behind = seats[..., :, None] - keys[..., None, :]  # how far a key lies behind its query
    biases, rotations = {}, {}
    for attention in attentions:
        window = attention.window
        if window not in biases:
            seen = behind >= 0 if causal else jnp.ones_like(behind, bool)
            if window is not None:
                seen = seen & (behind < window) & (behind > -window)
            if segment_ids is not None:
                seen = seen[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
            bias = jnp.where(seen, 0.0, HIDDEN).astype(jnp.float32)
            biases[window] = bias if bias.ndim == 2 else bias[:, None]
        rope = attention.positions
        if rope.kind == "rope":
            width = attention.width(d_model)
            rotations[rope, width] = rope_tables(positions, width, rope)
    return Geometry(biases, rotations)


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
    cpu: bool = False,
) -> Float[Array, "b t h c"]:
    """softmax(q k^T scale + bias) v, the softmax in float32 (arXiv:1706.03762, section 3.2.1).

    `bias` is (T, S) or (B, 1, T, S). Each kv head serves H / K query heads.
    """
    b, t, h, c = q.shape
    groups = h // k.shape[2]
    if cpu and softcap is None and (key is None or dropout_rate == 0.0) and t > 1:
        k, v = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k, v))
        return _cpu_attend(q, k, v, bias, scale)
    q = q.reshape(b, t, h // groups, groups, c)
    scores = jnp.einsum("btkgc,bskc->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores + bias.reshape((-1, 1, 1, *bias.shape[-2:]))
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(q.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, v).reshape(b, t, h, c)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cpu_attend(q, k, v, bias, scale):
    return _cpu_attend_forward(q, k, v, bias, scale)[0]


def _cpu_attend_forward(q, k, v, bias, scale):
    # The layout (B, T, H, C) is kept throughout: XLA's CPU products are slow on any other.
    scores = jnp.einsum("bthc,bshc->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores * scale + bias.reshape((-1, 1, *bias.shape[-2:]))
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bhts,bshc->bthc", weights, v)
    return out, (q, k, v, weights, out)


def _cpu_attend_backward(scale, saved, g):
    q, k, v, weights, out = saved
    g = jax.lax.optimization_barrier(g)
    f32 = jnp.float32
    d_weights = jnp.einsum("bthc,bshc->bhts", g, v)
    row = jnp.sum(g.astype(f32) * out.astype(f32), axis=-1).swapaxes(1, 2)[..., None]
    d_scores = weights.astype(f32) * (d_weights.astype(f32) - row) * scale
    d_scores = jax.lax.optimization_barrier(d_scores.astype(q.dtype))
    dq = jnp.einsum("bhts,bshc->bthc", d_scores, k)
    dk = jnp.einsum("bhts,bthc->bshc", d_scores, q)
    dv = jnp.einsum("bhts,bthc->bshc", weights, g)
    return dq, dk, dv, None


_cpu_attend.defvjp(_cpu_attend_forward, _cpu_attend_backward)


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values, (B, T, D) -> (B, T, D)."""

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
    ):
        self.spec = spec
        self.cpu = use_cpu_kernels(compute)
        self.width = spec.width(d_model)
        self.scale = spec.scale or 1.0 / math.sqrt(self.width)
        wide, narrow = spec.heads * self.width, spec.num_kv_heads * self.width
        keys = jax.random.split(key, 4)
        qkv = {"init": init, "bias": spec.qkv_bias, "compute": compute}
        self.q = Linear(keys[0], d_model, wide, axes=("embed", "heads"), **qkv)
        self.k = Linear(keys[1], d_model, narrow, axes=("embed", "kv_heads"), **qkv)
        self.v = Linear(keys[2], d_model, narrow, axes=("embed", "kv_heads"), **qkv)
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
        by_head = spec.qk_norm is not None and spec.qk_norm.over == "head"
        q_width, k_width = (self.width,) * 2 if by_head else (wide, narrow)
        self.q_norm = Norm(q_width, spec.qk_norm.norm) if spec.qk_norm else None
        self.k_norm = Norm(k_width, spec.qk_norm.norm) if spec.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        geometry: Geometry,
        cache: LayerCache | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """The output, and the cache with these tokens in it where one was given."""
        spec = self.spec
        q, k, v = self.q(x), self.k(x), self.v(x)
        if spec.qk_norm is not None and spec.qk_norm.over == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], -1, self.width) for y in (q, k, v))
        # No head lies on two devices, even where their number does not divide.
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
        if spec.qk_norm is not None and spec.qk_norm.over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.positions.kind == "rope":
            cos, sin = geometry.rotations[spec.positions, self.width]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache = cache.append(k, v)
            k, v = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
        y = attend(
            q,
            k,
            v,
            geometry.biases[spec.window],
            scale=self.scale,
            softcap=spec.softcap,
            dropout_rate=spec.dropout,
            key=key,
            cpu=self.cpu,
        )
        return self.o(y.reshape(*y.shape[:2], -1)), cache
