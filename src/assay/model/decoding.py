"""A model made ready to decode: each weight as the device reads it fastest, one token a row.

A step of decoding reads every weight once and does little with it, so it is as fast as memory.
On a CPU (docs/performance.md has the figures):

- the layers of one input (q, k, v; gate, up) are one product;
- float32 weights lie as (K, N): XLA reads them at the speed of memory for one row;
- bfloat16 weights lie as (N, K), and one row is padded to two: alone it takes a slow loop;
- int8 weights lie as (N, K), with a factor for each output. The rows are quantised too, each by
  its largest entry: XLA has a fast product of int8 with int8 and none of int8 with floats;
- where `native.py` could be compiled, all three are packed for its products instead, which read
  them at the speed of memory, and its attention reads no slot but those that are filled. Each
  half of a block is then one call where C++ has all that it is made of (`NativeBlock`).

A tied head gets a copy of the embedding in its own form. Experts and routers stay as they are.

Axes: B batch, T tokens, R rows, K fan-in, N fan-out.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8, Int32

from assay.model import native
from assay.model.attention import Attention
from assay.model.layers import Linear, Mlp, Norm, along_last, use_cpu_kernels
from assay.model.transformer import (
    Block,
    Head,
    Transformer,
    abstract,
    merge_named,
    named_parameters,
)

Weights = Literal["float32", "bfloat16", "int8"]
WEIGHTS = ("float32", "bfloat16", "int8")


def quantise(
    x: Float[Array, "r k"],
) -> tuple[Int8[Array, "r k"], Float32[Array, "r"]]:
    """Symmetric int8 of each row, and the factors that give it back: x ~ q * factor.

    The largest entry of a row becomes 127; a row of zeros stays one.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    factor = jnp.where(largest > 0, largest, 1.0) / 127.0
    return jnp.round(x / factor[:, None]).astype(jnp.int8), factor


class Projection(nnx.Module):
    """Linear layers of one input as one product, (..., K) -> (..., N), in the input's dtype."""

    def __init__(
        self,
        matrices: Sequence[Float32[Array, "k n"]],
        biases: Sequence[Float32[Array, "n"] | None],
        weights: Weights,
        native_calls: bool,
    ):
        w = jnp.concatenate(matrices, axis=1) if len(matrices) > 1 else matrices[0]
        self.weights, factor = weights, None
        self.fan_out, self.native = w.shape[1], native_calls and native.fits(w.shape[0])
        match weights:
            case "float32":
                pass
            case "bfloat16":
                w = w.T.astype(jnp.bfloat16)
            case "int8":
                w, factor = quantise(w.T)
        if self.native:
            w = native.pack(w if weights == "float32" else w.T)
        self.w = nnx.Param(w)
        self.factor = None if factor is None else nnx.Param(factor)
        present = [b for b in biases if b is not None]
        self.b = nnx.Param(jnp.concatenate(present)) if present else None

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
        rows = x.reshape(-1, x.shape[-1])
        y = self._product(rows).reshape(*x.shape[:-1], -1).astype(x.dtype)
        return y if self.b is None else y + along_last(self.b[...].astype(x.dtype), y)

    def _product(self, x: Float[Array, "r k"]) -> Float[Array, "r n"]:
        w = self.w[...]
        if self.native:
            return native.product(x, w, self.fan_out, factor=self._factor())
        match self.weights:
            case "float32":
                return jnp.einsum("rk,kn->rn", x, w)
            case "bfloat16":
                return jnp.einsum("rk,nk->rn", _two_rows(x), w)[: x.shape[0]]
            case "int8":
                q, factor = quantise(x)
                y: Int32[Array, "r n"] = jnp.einsum(
                    "rk,nk->rn", _two_rows(q), w, preferred_element_type=jnp.int32
                )[: x.shape[0]]
                return y.astype(jnp.float32) * factor[:, None] * self.factor[...][None, :]

    def _factor(self) -> Float32[Array, "n"] | None:
        return None if self.factor is None else self.factor[...]

    def packed(self) -> native.Packed:
        """As the calls of a block's half take it."""
        return native.Packed(self.w[...], self._factor(), None if self.b is None else self.b[...])


def _two_rows(x: Array) -> Array:
    return jnp.pad(x, ((0, 1), (0, 0))) if x.shape[0] == 1 else x


class NativeBlock(nnx.Module):
    """A block of which each half is one call of `native.py`, where that has all it is made of.

    Norm before, sum after, and between them an attention without norms of its heads, or an MLP of
    one hidden layer. All else is the block's own.
    """

    def __init__(self, block: Block):
        self.block = block
        plain = block.multiplier == 1.0
        self.attends = plain and _half_attends(block)
        self.feeds = plain and _half_feeds(block)

    def __call__(self, x, geometry, cache=None, key=None, *, source=None, real=None, train=False):
        """As `Block`'s."""
        block = self.block
        if cache is None or key is not None:
            how = {"source": source, "real": real, "train": train}
            return block(x, geometry, cache, key, **how)
        attended = self._attended if self.attends else block.attended
        x, cache = attended(x, geometry, cache)
        if self.feeds:
            return self._fed(x), cache, None
        if block.feed_forward is None:
            return x, cache, None
        x, routing = block.fed(x, real=real, train=train)
        return x, cache, routing

    def _attended(self, x, geometry, cache):
        attention, rotation = self.block.attention, None
        if attention.spec.positions.kind == "rope":
            tables = geometry.rotations[attention.spec.positions, attention.width]
            shape = (*x.shape[:2], attention.width // 2)
            rotation = tuple(jnp.broadcast_to(t if t.ndim == 3 else t[None], shape) for t in tables)
        return native.attention_half(
            x,
            _normalisation(self.block.attention_norm),
            attention.qkv.packed(),
            attention.o.packed(),
            rotation,
            cache,
            heads=attention.spec.heads,
            scale=attention.scale,
            window=attention.spec.window,
        )

    def _fed(self, x):
        mlp, norm = self.block.feed_forward, self.block.feed_forward_norm
        gated = mlp.gate_up is not None
        y = native.mlp_half(
            x.reshape(-1, x.shape[-1]),
            _normalisation(norm),
            (mlp.gate_up if gated else mlp.up[0]).packed(),
            mlp.down.packed(),
            activation=mlp.activation,
            gated=gated,
        )
        return y.reshape(x.shape)


def _half_attends(block: Block) -> bool:
    attention = block.attention
    if not isinstance(attention, Attention) or block.attention_norm is None:
        return False
    more = (attention.q_norm, attention.k_norm, attention.gate, attention.value_embedding)
    return (
        all(part is None for part in (*more, block.attention_post_norm))
        and attention.is_plain()
        and _are_native(attention.qkv, attention.o)
    )


def _half_feeds(block: Block) -> bool:
    mlp = block.feed_forward
    if not isinstance(mlp, Mlp) or block.feed_forward_norm is None:
        return False
    first = [mlp.gate_up] if mlp.gate_up is not None else list(mlp.up)
    return (
        block.feed_forward_post_norm is None
        and mlp.activation in native.ACTIVATIONS
        and len(first) == 1
        and _are_native(*first, mlp.down)
    )


def _are_native(*projections: Projection | None) -> bool:
    return all(p is not None and p.native for p in projections)


def _normalisation(norm: Norm) -> native.Normalisation:
    scale, bias = (None if p is None else p[...] for p in (norm.scale, norm.bias))
    return native.Normalisation(scale, bias, norm.epsilon, norm.centred)


def prepare(
    model: Transformer, weights: Weights | None = None, *, native_calls: bool | None = None
) -> Transformer:
    """The same model for decoding: layers unstacked, weights as above; the original is kept.

    `native_calls` says whether C++ is used (`native.py`): by default, where it can be compiled.

    `weights` None is the model's compute dtype. Where the kernels are not the CPU's, only int8
    changes the form of a weight. The results are the model's own: up to the order of sums in
    float32, exactly rounded weights in bfloat16, and near in int8.
    """
    compute = model.compute
    weights = weights or compute.dtype
    rounded = compute.dtype != "float32"
    if compute.scan_layers or rounded:
        # `product` rounds its weight in any case: rounded here, it is done once.
        named = {
            name: value.astype(compute.dtype) if rounded and _in_products(name) else value
            for name, value in named_parameters(model).items()
        }
        model = merge_named(abstract(model.spec, compute.replace(scan_layers=False)), named)
    cpu = use_cpu_kernels(compute)
    if weights != "int8" and not cpu:
        return model
    if native_calls is None:
        native_calls = cpu and native.build()[0]
    model = nnx.clone(model, variables=False)
    for layer in model.layers:
        if isinstance(layer.attention, Attention):
            _prepare_attention(layer.attention, weights, native_calls)
        if isinstance(layer.feed_forward, Mlp):
            _prepare_mlp(layer.feed_forward, weights, native_calls)
    if native_calls:
        crosses = any(layer.cross is not None for layer in model.layers)
        model.layers = model.layers if crosses else nnx.List(map(NativeBlock, model.layers))
    if model.head is not None:
        _prepare_head(model.head, model.embedding.table[...], weights, native_calls)
    return model


def _in_products(name: str) -> bool:
    return name.endswith(".w") and not name.endswith(".router.w")


def _projection(linears: Sequence[Linear], *how: Weights | bool) -> Projection:
    biases = [None if linear.b is None else linear.b[...] for linear in linears]
    return Projection([linear.w[...] for linear in linears], biases, *how)


def _prepare_attention(attention: Attention, *how: Weights | bool) -> None:
    attention.qkv = _projection([attention.q, attention.k, attention.v], *how)
    attention.q = attention.k = attention.v = None
    attention.o = _projection([attention.o], *how)
    attention.native = how[-1]


def _prepare_mlp(mlp: Mlp, *how: Weights | bool) -> None:
    if mlp.gate is not None:
        mlp.gate_up = _projection([mlp.gate, mlp.up[0]], *how)
        mlp.gate, mlp.up = None, nnx.List([])
    else:
        mlp.up = nnx.List([_projection([up], *how) for up in mlp.up])
    mlp.down = _projection([mlp.down], *how)


def _prepare_head(head: Head, table: Float32[Array, "v d"], *how: Weights | bool) -> None:
    head.projection = Projection([table.T if head.w is None else head.w[...]], [None], *how)
    head.w = None


def uses_native(model: Transformer) -> bool:
    """Whether a model made ready calls `native.py` anywhere."""
    return any(getattr(part, "native", False) for _, part in nnx.iter_modules(model))


def reads_only_what_is_seen(model: Transformer) -> bool:
    """Whether all attention to a cache is C++, which reads no slot that no query sees."""
    parts = [part for _, part in nnx.iter_modules(model) if isinstance(part, Attention)]
    return all(part.native and part.is_plain() for part in parts)


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters, as they are kept."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def bytes_read(model: Transformer) -> int:
    """Bytes that a step of decoding reads: all but the tables of which it takes single rows."""
    embedding = model.embedding
    tables = [embedding.table, embedding.positions, *(embedding.ngrams or ())]
    if model.head is None or (model.head.projection is None and model.head.w is None):
        tables = tables[1:]  # the head reads the whole table
    return weight_bytes(model) - sum(t[...].nbytes for t in tables if t is not None)
