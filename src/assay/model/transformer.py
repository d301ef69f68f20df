"""The model: embedding, blocks, head. It reads as the paper, and branches while it is built.

Axes: B batch, T tokens, R rows of the source (B, or fewer in beam search), S source tokens,
D model, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from assay.errors import AssayError, did_you_mean
from assay.model.attention import Attention, Geometry, geometry
from assay.model.cache import Cache, LayerCache, SourceCache
from assay.model.layers import (
    PRODUCT,
    Linear,
    Mlp,
    Norm,
    along_last,
    depth_scale,
    dropout,
    product,
    use_cpu_kernels,
)
from assay.model.moe import Moe, Routing
from assay.model.mup import parametrise
from assay.model.ngrams import ngram_rows, preceding
from assay.model.positions import sinusoidal
from assay.model.sharding import constant_parameter, constrain, parameter, table_rows
from assay.spec.model import (
    BlockSpec,
    EmbeddingSpec,
    InitSpec,
    StackSpec,
    TransformerSpec,
    ZeroInit,
)
from assay.spec.run import ComputeSpec

_kept = jax.checkpoint_policies
_and_products = partial(_kept.save_from_both_policies, _kept.save_only_these_names(PRODUCT))
REMAT = {
    "block": _kept.nothing_saveable,
    "weights": _and_products(_kept.dots_with_no_batch_dims_saveable),
    "dots": _and_products(_kept.dots_saveable),
    "offload": _kept.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
"""What the backward pass finds of a block beside its input, by `ComputeSpec.remat`."""


class Embedding(nnx.Module):
    """Tokens (and their places) to vectors."""

    def __init__(
        self,
        key: Key[Array, ""],
        spec: TransformerSpec,
        embedding: EmbeddingSpec,
        compute: ComputeSpec,
    ):
        token_key, position_key = jax.random.split(key)
        init = spec.init.embedding
        table_shape = (spec.padded_vocab, spec.d_model)
        self.spec = embedding
        self.scale = math.sqrt(spec.d_model) if embedding.scale_by_sqrt_width else 1.0
        self.multiplier = 1.0  # muP's (`mup.py`)
        self.table = parameter(token_key, table_shape, ("vocab", "embed"), init)
        self.vocab_size, self.ngrams = spec.vocab_size, self._ngrams(key, spec, embedding)
        learned = embedding.positions.kind == "learned"
        shape = (spec.context, spec.d_model)
        self.positions = parameter(position_key, shape, (None, "embed"), init) if learned else None
        norm = embedding.norm
        self.norm = Norm(spec.d_model, norm, compute) if norm else None

    def _ngrams(self, key, spec, embedding) -> nnx.List | None:
        """A table for each order."""
        if (ngrams := embedding.ngrams) is None:
            return None

        def table(order: int) -> nnx.Param:
            shape = (ngrams.table_rows(order, spec.vocab_size), spec.d_model)
            own_key = jax.random.fold_in(key, order)
            return parameter(own_key, shape, ("vocab", "embed"), spec.init.embedding)

        return nnx.List(table(order) for order in ngrams.orders)

    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        positions: Int32[Array, "*b t"],
        key: Key[Array, ""] | None,
        *,
        segment_ids: Int32[Array, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Float32[Array, "b t d"]:
        """`cache` holds these tokens already, behind its valid slots."""
        x = self.rows(tokens)
        if self.ngrams is not None:
            orders, rate = self.spec.ngrams.orders, self.spec.ngrams.dropout
            before = preceding(tokens, max(orders) - 1, segment_ids=segment_ids, cache=cache)
            for order, table in zip(orders, self.ngrams, strict=True):
                last = (tokens, *before[: order - 1])
                row = table_rows(table, ngram_rows(last, table.shape[0], self.vocab_size))
                order_key = None if key is None else jax.random.fold_in(key, order)
                x = x + dropout(row, rate, order_key, whole=True)
        if self.spec.positions.kind == "learned":
            added = table_rows(self.positions, positions)
            x = x + (added if added.ndim == 3 else added[None])
        elif self.spec.positions.kind == "sinusoidal":
            table = sinusoidal(positions, x.shape[-1], self.spec.positions.theta)
            x = x + (table if table.ndim == 3 else table[None])
        if self.norm is not None:
            x = self.norm(x)
        if self.multiplier != 1.0:
            x = x * self.multiplier
        return dropout(x, self.spec.dropout, key)

    def rows(self, tokens: Int32[Array, "b t"]) -> Float32[Array, "b t d"]:
        """The tokens' vectors alone: no positions, no n-grams."""
        x = table_rows(self.table, tokens)
        return x if self.scale == 1.0 else x * self.scale


class Block(nnx.Module):
    """Attention, cross-attention, feed-forward, each with its norm and its residual."""

    def __init__(
        self,
        key: Key[Array, ""],
        d_model: int,
        spec: BlockSpec,
        init: InitSpec,
        num_layers: int,
        compute: ComputeSpec,
        vocab_rows: int,
    ):
        attention_key, feed_forward_key = jax.random.split(key)
        how = {
            "init": init.weights,
            "residual_init": ZeroInit() if init.residual == "zero" else init.weights,
            "residual_scale": depth_scale(num_layers) if init.residual == "depth_scaled" else 1.0,
            "compute": compute,
        }
        attends, feeds = spec.attention is not None, spec.feed_forward is not None
        crosses = spec.cross is not None
        attention = how | {"query_init": init.query_init(), "vocab_rows": vocab_rows}
        before, after = (
            spec.norm_position in ("pre", "both"),
            spec.norm_position in ("post", "both"),
        )

        def norm(present: bool) -> Norm | None:
            return Norm(d_model, spec.norm, compute) if present else None

        self.dropout = spec.dropout
        self.multiplier = 1.0  # muP's (`mup.py`)
        self.norm_after_sum = spec.norm_position == "post"
        self.attention_norm = norm(attends and before)
        self.attention = (
            Attention(attention_key, d_model, spec.attention, **attention) if attends else None
        )
        self.attention_post_norm = norm(attends and after)
        self.cross_norm = norm(crosses and before)
        cross_key = jax.random.fold_in(key, 2)
        self.cross = Attention(cross_key, d_model, spec.cross, **attention) if crosses else None
        self.cross_post_norm = norm(crosses and after)
        self.feed_forward_norm = norm(feeds and before)
        layer = Moe if feeds and spec.feed_forward.kind == "moe" else Mlp
        self.feed_forward = (
            layer(feed_forward_key, d_model, spec.feed_forward, **how) if feeds else None
        )
        self.feed_forward_post_norm = norm(feeds and after)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        geometry: Geometry,
        cache: LayerCache | None = None,
        key: Key[Array, ""] | None = None,
        *,
        source: Float[Array, "r s d"] | tuple[Array, Array] | None = None,
        real: Bool[Array, "b t"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None, Routing | None]:
        """`source` is the encoder's output, or the keys and values made of it before."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        routing = None
        if self.attention is not None:
            x, cache = self.attended(x, geometry, cache, keys[:2])
        if self.cross is not None:
            weights_key, cross_key = (None,) * 2
            if key is not None:
                weights_key, cross_key = jax.random.split(jax.random.fold_in(key, 3))
            y = x if self.cross_norm is None else self.cross_norm(x)
            made = source if isinstance(source, tuple) else self.cross.keys_values(source)
            y = self.cross.read(y, made, geometry.source, weights_key)
            x = self._add(x, y, self.cross_post_norm, cross_key)
        if self.feed_forward is not None:
            x, routing = self.fed(x, keys[2], real=real, train=train)
        return x, cache, routing

    def attended(self, x, geometry, cache, keys=(None, None)):
        """x after its attention, and the cache."""
        y = x if self.attention_norm is None else self.attention_norm(x)
        y, cache = self.attention(y, geometry, cache, keys[0])
        return self._add(x, y, self.attention_post_norm, keys[1]), cache

    def fed(self, x, key=None, *, real=None, train=False):
        """x after its feed-forward, and what its router did."""
        y, routing = x if self.feed_forward_norm is None else self.feed_forward_norm(x), None
        if isinstance(self.feed_forward, Moe):
            noise = None if key is None else jax.random.fold_in(key, 1)
            y, routing = self.feed_forward(y, real=real, key=noise, train=train)
        else:
            y = self.feed_forward(y)
        return self._add(x, y, self.feed_forward_post_norm, key), routing

    def _add(self, x, y, post_norm, key):
        """x + y, with the norm that follows: of the sum (2017), or of y alone (Gemma 2)."""
        if post_norm is not None and not self.norm_after_sum:
            y = post_norm(y)
        if self.multiplier != 1.0:
            y = y * self.multiplier
        if self.norm_after_sum:
            return post_norm(x + dropout(y, self.dropout, key))
        return x + dropout(y, self.dropout, key)


class Head(nnx.Module):
    """Vectors to logits, by a table of its own or the embedding's."""

    def __init__(self, key: Key[Array, ""], spec: TransformerSpec, compute: ComputeSpec):
        shape = (spec.d_model, spec.padded_vocab)
        self.scale = 1 / math.sqrt(spec.d_model) if spec.head.scale_by_inverse_sqrt_width else 1.0
        self.spec, self.cpu = spec.head, use_cpu_kernels(compute)
        tied, bias = spec.head.tied, spec.head.bias
        init = spec.init.head_init()
        self.w = None if tied else parameter(key, shape, ("embed", "vocab"), init)
        self.b = constant_parameter((spec.padded_vocab,), ("vocab",), 0.0) if bias else None
        self.projection = nnx.data(None)  # in a model made ready to decode (`decoding.py`)

    def __call__(
        self, x: Float[Array, "b t d"], table: Float32[Array, "v d"]
    ) -> Float32[Array, "b t v"]:
        if self.scale != 1.0:
            x = x * self.scale
        if self.projection is not None:
            logits = self.projection(x)
        elif self.w is None:
            logits = product(x, table, transposed=True, cpu=self.cpu)
        else:
            logits = product(x, self.w[...], cpu=self.cpu)
        logits = logits.astype(jnp.float32)
        if self.b is not None:
            logits = logits + along_last(self.b[...], logits)
        if self.spec.softcap is not None:
            logits = self.spec.softcap * jnp.tanh(logits / self.spec.softcap)
        return logits


class Ahead(nnx.Module):
    """One module of multi-token prediction (arXiv:2412.19437, equations 21 to 23)."""

    def __init__(
        self, key: Key[Array, ""], spec: TransformerSpec, block: BlockSpec, compute: ComputeSpec
    ):
        join_key, block_key = jax.random.split(key)
        d, norm = spec.d_model, spec.decoder.final_norm or block.norm
        self.hidden_norm, self.token_norm = Norm(d, norm, compute), Norm(d, norm, compute)
        axes, init = ("mlp", "embed"), spec.init.weights
        self.join = Linear(join_key, 2 * d, d, axes=axes, init=init, bias=False, compute=compute)
        layers = spec.decoder.num_layers
        self.block = Block(block_key, d, block, spec.init, layers, compute, spec.padded_vocab)
        self.final_norm = Norm(d, norm, compute)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        later: Float[Array, "b t d"],
        geometry: Geometry,
        key: Key[Array, ""] | None,
        **experts: Array | bool | None,
    ) -> tuple[Float[Array, "b t d"], Routing | None]:
        """From what is made of each place, and the vector of a `later` token, to the next."""
        x = jnp.concatenate([self.hidden_norm(x), self.token_norm(later)], axis=-1)
        x, _, routing = self.block(self.join(x), geometry, None, key, **experts)
        return self.final_norm(x), routing


def shifted(x: Array, by: int) -> Array:
    """What stands `by` places on in each row, (B, T) -> (B, T); 0 beyond the end."""
    return jnp.pad(x[:, by:], ((0, 0), (0, min(by, x.shape[1]))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """All that a forward gives: `routing` has a record for each layer of experts, in order.

    `ahead` has logits of the token k + 1 places on for each module k of multi-token prediction;
    the last k places of a row mean nothing there.
    """

    logits: Float32[Array, "b t v"]
    cache: Cache | None
    routing: tuple[Routing, ...]
    ahead: tuple[Float32[Array, "b t v"], ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Source:
    """A source that was encoded: the encoder's output, and where its tokens are real."""

    hidden: Float[Array, "r s d"]
    mask: Bool[Array, "r s"]


class Stack(nnx.Module):
    """Blocks one after the other, the norm behind them, and the relative positions they share."""

    def __init__(
        self, key: Key[Array, ""], spec: TransformerSpec, stack: StackSpec, compute: ComputeSpec
    ):
        self.stack, self.compute = stack, compute
        keys, blocks = jax.random.split(key, max(stack.num_layers, 1)), stack.blocks()
        rest = (spec.init, stack.num_layers, compute, spec.padded_vocab)

        def layer(i: int, key: Key[Array, ""]) -> Block:
            return Block(key, spec.d_model, blocks[i], *rest)

        # Scanned: layer i of each period is stacked with its like; a last, broken period is not.
        period, repeats, _ = stack_layout(stack, compute)
        whole = repeats * period
        self.stacked = nnx.List(
            jax.vmap(partial(layer, i))(keys[i:whole:period]) for i in range(period * (repeats > 0))
        )
        self.layers = nnx.List(layer(i, keys[i]) for i in range(whole, stack.num_layers))
        final = stack.final_norm
        self.final_norm = Norm(spec.d_model, final, compute) if final else None
        self.relative_bias = self._table(key, spec)

    def _table(self, key: Key[Array, ""], spec: TransformerSpec) -> nnx.Param | None:
        """A number for each bucket of distance and each head."""
        if (relative := self.stack.relative()) is None:
            return None
        (positions, heads), table_key = relative, jax.random.fold_in(key, self.stack.num_layers)
        return parameter(table_key, (positions.buckets, heads), (None, None), spec.init.weights)

    def geometry(
        self,
        positions: Int32[Array, "*b t"],
        d_model: int,
        **options: Array | int | None,
    ) -> Geometry:
        """What the layers share; `options` are those of `attention.geometry`."""
        table = None if self.relative_bias is None else self.relative_bias[...]
        attentions = [block.attention for block in self.stack.pattern if block.attention]
        return geometry(
            attentions, d_model, positions, causal=self.stack.causal, relative=table, **options
        )

    def run(self, x, shared, cache, key, source=None, **experts):
        """All layers and the norm: (B, T, D), the layers' caches, and what the routers did."""

        def run(block, x, layer_cache, index, source):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, layer_cache, routing = block(
                x, shared, layer_cache, layer_key, source=source, **experts
            )
            return constrain(x, "batch", None, None), layer_cache, routing

        if self.compute.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.compute.remat])
        if isinstance(x, jax.core.Tracer):
            run = jax.jit(run)  # traced once for layers that are alike; XLA writes it out for each
        period, records = len(self.stacked), []
        if period and cache is None:

            def one_period(carry, blocks):
                x, index = carry
                routings = []
                for i, block in enumerate(blocks):
                    x, _, routing = run(block, x, None, index + i, source)
                    routings.append(routing)
                return (x, index + period), tuple(routings)

            (x, _), stacks = jax.lax.scan(one_period, (x, jnp.int32(0)), tuple(self.stacked))
            for r in range(stack_layout(self.stack, self.compute).repeats):
                records += [jax.tree.map(lambda leaf, r=r: leaf[r], stack) for stack in stacks]
            blocks = list(self.layers)
        else:
            blocks = list(self.unstacked_layers())
        first = self.stack.num_layers - len(blocks)
        sources = (source,) * self.stack.num_layers
        if cache is not None and cache.source is not None:
            sources = cache.source.layers
        caches = cache.layers if cache is not None else (None,) * self.stack.num_layers
        grown = []
        for index, block in enumerate(blocks, start=first):
            x, layer_cache, routing = run(block, x, caches[index], index, sources[index])
            grown.append(layer_cache)
            records.append(routing)
        x = x if self.final_norm is None else self.final_norm(x)
        return x, tuple(grown), tuple(record for record in records if record is not None)

    def unstacked_layers(self):
        """Every layer in order, whether they are kept stacked or not."""
        if self.stacked:
            for r in range(stack_layout(self.stack, self.compute).repeats):
                for stack in self.stacked:
                    yield jax.tree.map(lambda leaf, r=r: leaf[r], stack)
        yield from self.layers


class Transformer(Stack):
    """The architecture that a spec describes; a pytree that `jax.jit` takes.

    It is the decoder's stack, with an embedding before it, a head behind it, and perhaps an
    encoder whose output it reads. `rngs` is an `nnx.Rngs` or a key. How it is computed (dtype,
    scan, kernels) is `compute`'s; parameters are float32 always, and the same whatever `compute`
    says, but that scanned layers are kept stacked.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        compute: ComputeSpec | None = None,
        *,
        rngs: nnx.Rngs | Key[Array, ""],
    ):
        compute = compute or ComputeSpec()
        key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
        embedding_key, head_key, stack_key = jax.random.split(key, 3)
        encoder_key, source_key = jax.random.split(jax.random.fold_in(key, 3))
        super().__init__(stack_key, spec, spec.decoder, compute)
        self.spec = spec
        self.embedding = Embedding(embedding_key, spec, spec.embedding, compute)
        own = spec.source_embedding
        self.source_embedding = Embedding(source_key, spec, own, compute) if own else None
        self.encoder = Stack(encoder_key, spec, spec.encoder, compute) if spec.encoder else None
        self.ahead = nnx.List(
            Ahead(jax.random.fold_in(key, 4 + i), spec, block, compute)
            for i, block in enumerate(spec.ahead())
        )
        self.head = Head(head_key, spec, compute) if spec.head else None
        if spec.mup is not None:
            parametrise(self)

    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        *,
        source: Int32[Array, "b s"] | Source | None = None,
        source_mask: Bool[Array, "b s"] | None = None,
        positions: Int32[Array, "b t"] | None = None,
        segment_ids: Int32[Array, "b t"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        cache: Cache | None = None,
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Float32[Array, "b t v"] | tuple[Float32[Array, "b t v"], Cache]:
        """Logits of the next token at every place; with a cache, also the cache grown by T.

        `source` is what an encoder reads, its padding hidden by `source_mask` (True is real); or
        what `encode` made of it. A cache keeps it, and further calls need none. `mask` hides
        padding among the tokens, which only a stack that is not causal could see behind them.

        `key` turns dropout on. `segment_ids` keep packed documents apart, and `positions` then
        count within each. `train` has experts' capacity limits act, and with a key their
        routers' noise; tokens of segment 0 are then padding, and take no place.
        """
        x, cache = self.hidden(
            tokens,
            source=source,
            source_mask=source_mask,
            positions=positions,
            segment_ids=segment_ids,
            mask=mask,
            cache=cache,
            key=key,
            train=train,
        )
        logits = self.logits(x)
        return logits if cache is None else (logits, cache)

    def forward(self, tokens: Int32[Array, "b t"], **options) -> Output:
        """As a call with the same `options`; gives also what the routers did.

        `ahead` (None: as `train`) has the modules of multi-token prediction run, where there are.
        """
        options["ahead"] = options.pop("ahead", options.get("train", False))
        x, cache, routing, ahead = self.before_head(tokens, **options)
        return Output(self.logits(x), cache, routing, tuple(map(self.logits, ahead)))

    def hidden(
        self, tokens: Int32[Array, "b t"], **options
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """The last layer's output, normed: what the head reads. `options` as in a call."""
        x, cache, _, _ = self.before_head(tokens, **options)
        return x, cache

    def encode(
        self,
        source: Int32[Array, "b s"],
        mask: Bool[Array, "b s"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Source:
        """What the encoder makes of a source, to be read by any number of calls.

        `mask` is True where a token is real (None: everywhere).
        """
        return self._encode(source, mask, key, train)[0]

    def _encode(self, source, mask, key, train) -> tuple[Source, tuple[Routing, ...]]:
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        positions = jnp.arange(source.shape[1], dtype=jnp.int32)
        x, key = self._embedded(embedding, source, positions, key)
        shared = self.encoder.geometry(positions, self.spec.d_model, mask=mask, tokens=source)
        x, _, routing = self.encoder.run(x, shared, None, key, real=mask, train=train)
        if mask is None:
            mask = jnp.ones(source.shape, bool)
        return Source(x, mask), routing

    def remember(self, source: Source, dtype: jnp.dtype | str) -> SourceCache:
        """The keys and values of every cross-attention, made once for all decoding."""
        layers = (block.cross for block in self.unstacked_layers())
        made = (cross and cross.keys_values(source.hidden) for cross in layers)
        kept = tuple(kv and tuple(y.astype(dtype) for y in kv) for kv in made)
        return SourceCache(kept, source.mask)

    def _embedded(self, embedding, tokens, positions, key, **row):
        """The first layer's input, and a key for the layers. `row` tells n-grams what is before."""
        embedding_key = stack_key = None
        if key is not None:
            embedding_key, stack_key = jax.random.split(key)
        x = embedding(tokens, positions, embedding_key, **row)
        return constrain(x.astype(self.compute.dtype), "batch", None, None), stack_key

    def before_head(
        self,
        tokens: Int32[Array, "b t"],
        *,
        source: Int32[Array, "b s"] | Source | None = None,
        source_mask: Bool[Array, "b s"] | None = None,
        positions: Int32[Array, "b t"] | None = None,
        segment_ids: Int32[Array, "b t"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        cache: Cache | None = None,
        key: Key[Array, ""] | None = None,
        train: bool = False,
        ahead: bool = False,
    ) -> tuple[Float[Array, "b t d"], Cache | None, tuple[Routing, ...], tuple[Array, ...]]:
        """As `forward`, with what the head reads in place of logits."""
        self._check_source(source, source_mask, cache)
        if mask is not None and cache is not None:
            raise AssayError("mask: a cache has lengths instead; give one of the two.")
        read = ()
        if source is not None and not isinstance(source, Source):
            source_key = None if key is None else jax.random.fold_in(key, 3)
            source, read = self._encode(source, source_mask, source_key, train)
        if cache is not None and source is not None:
            cache = replace(cache, source=self.remember(source, _dtype(cache, self.compute)))
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            if cache is not None:
                positions = cache.lengths[:, None] + positions[None]
        cache = None if cache is None else cache.with_tokens(tokens)
        row = {"segment_ids": segment_ids, "cache": cache}
        x, stack_key = self._embedded(self.embedding, tokens, positions, key, **row)
        held = cache.source if cache is not None else source
        shared = self.geometry(
            positions,
            self.spec.d_model,
            segment_ids=segment_ids,
            mask=mask,
            slots=cache.capacity if cache is not None else None,
            source_mask=None if held is None else held.mask,
            tokens=tokens,
        )
        real = mask
        if train and segment_ids is not None:
            real = segment_ids != 0
        hidden = None if source is None else source.hidden
        experts = {"real": real, "train": train}
        x, layers, routing = self.run(x, shared, cache, stack_key, hidden, **experts)
        if cache is not None:
            cache = replace(cache, layers=layers, lengths=cache.lengths + tokens.shape[1])
        further, records = (), ()
        if ahead and self.ahead:
            further, records = self._run_ahead(x, tokens, shared, stack_key, experts)
        return x, cache, read + routing + records, further

    def _run_ahead(self, x, tokens, shared, key, experts):
        """What each module of multi-token prediction makes, and what its router did."""
        made, records = [], []
        for k, module in enumerate(self.ahead, start=1):
            tokens = shifted(tokens, 1)
            later = self.embedding.rows(tokens).astype(x.dtype)
            layer_key = None if key is None else jax.random.fold_in(key, self.stack.num_layers + k)

            of_these = replace(shared, tokens=tokens)

            def run(module, x, later, geometry=of_these, key=layer_key):
                return module(x, later, geometry, key, **experts)

            if self.compute.remat != "none":
                run = jax.checkpoint(run, policy=REMAT[self.compute.remat])
            x, routing = run(module, x, later)
            made.append(x)
            records.append(routing)
        return tuple(made), tuple(record for record in records if record is not None)

    def _check_source(self, source, source_mask, cache) -> None:
        if self.encoder is None and source is not None:
            raise AssayError("source: the model has no encoder that would read it.")
        held = cache is not None and cache.source is not None
        if self.encoder is not None and source is None and not held:
            raise AssayError("source: the model has an encoder, and needs one to read.")
        if source_mask is not None and (source is None or isinstance(source, Source)):
            raise AssayError("source_mask: it goes with the source's tokens, which are not given.")

    def logits(self, x: Float[Array, "b t d"]) -> Float32[Array, "b t v"]:
        """The head alone. Rows that only pad the vocabulary give no logit."""
        if self.head is None:
            return x.astype(jnp.float32)
        return self.head(x, self.embedding.table[...])[..., : self.spec.vocab_size]


def _dtype(cache: Cache, compute: ComputeSpec) -> jnp.dtype | str:
    return next((layer.keys.dtype for layer in cache.layers if layer), compute.dtype)


def abstract(spec: TransformerSpec, compute: ComputeSpec | None = None) -> Transformer:
    """The model with shapes in place of arrays: no memory, whatever its size."""
    return nnx.eval_shape(lambda: Transformer(spec, compute, rngs=jax.random.key(0)))


# ---------------------------------------------------------------------------- parameters by name


def named_parameters(model: Transformer) -> dict[str, Array]:
    """Every parameter by its dotted path, layer by layer, however the model keeps its layers.

    This is the form of checkpoints and converters: `layers.0.attention.q.w`. Leaves of an
    abstract model are `jax.ShapeDtypeStruct`.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return name_leaves(params, layout(model.spec, model.compute))


class Layout(NamedTuple):
    """How layers are kept: `repeats` of each of the `period` stacked ones, the rest by itself.

    `encoder` is the same of an encoder's, whose names begin with `encoder`.
    """

    period: int
    repeats: int
    encoder: "Layout | None" = None

    def layer(self, path: tuple) -> tuple["Layout", tuple, tuple]:
        """The layout that a path is of, the path's prefix, and the path within the stack."""
        if self.encoder is not None and path[0] == "encoder":
            return self.encoder, path[:1], path[1:]
        return self, (), path


def layout(spec: TransformerSpec, compute: ComputeSpec) -> Layout:
    encoder = stack_layout(spec.encoder, compute) if spec.encoder else None
    return stack_layout(spec.decoder, compute)._replace(encoder=encoder)


def stack_layout(stack: StackSpec, compute: ComputeSpec) -> Layout:
    period = len(stack.pattern)
    if not compute.scan_layers or period == 0:
        return Layout(0, 0)
    return Layout(period, stack.num_layers // period)


def name_leaves(tree: dict, layout: Layout) -> dict[str, Array]:
    """The leaves of a pure dict in the parameters' form (gradients, say), named by layer."""
    named = {}
    for path, leaf in nnx.traversals.flatten_mapping(tree).items():
        (period, repeats, _), prefix, inner = layout.layer(path)
        if inner[0] == "stacked":
            for r in range(repeats):
                named[_layer_name(prefix, r * period + inner[1], inner)] = _entry(leaf, r)
        elif inner[0] == "layers":
            named[_layer_name(prefix, period * repeats + inner[1], inner)] = leaf
        else:
            named[".".join(map(str, path))] = leaf
    return named


def _layer_name(prefix: tuple, layer: int, path: tuple) -> str:
    return ".".join(map(str, (*prefix, "layers", layer, *path[2:])))


def _entry(leaf, r: int):
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[r]


def from_named_parameters(
    spec: TransformerSpec, named: Mapping[str, Array], compute: ComputeSpec | None = None
) -> Transformer:
    """The model with these parameters, kept as `compute` asks.

    Raises:
        AssayError: if a name is missing or unknown, or a shape is not the spec's.
    """
    model = abstract(spec, compute)
    wanted = named_parameters(model)
    for name in wanted.keys() - named.keys():
        raise AssayError(f"{name}: this parameter is missing.")
    for name in named.keys() - wanted.keys():
        raise AssayError(f"{name}: unknown parameter; {did_you_mean(name, wanted)}")
    for name, leaf in wanted.items():
        if named[name].shape != leaf.shape:
            raise AssayError(
                f"{name}: found shape {tuple(named[name].shape)}, but the architecture "
                f"has {tuple(leaf.shape)}."
            )
    return merge_named(model, named)


def merge_named(model: Transformer, named: Mapping[str, Array]) -> Transformer:
    """The same model with other arrays in it, given by name; nothing is checked."""
    graph, state = nnx.split(model)
    tree = nnx.to_pure_dict(state)
    return nnx.merge(graph, unname(tree, named, layout(model.spec, model.compute)))


def unname(like: dict, named: Mapping[str, Array], layout: Layout) -> dict:
    """A tree of `like`'s form (stacked or not) with the named arrays: the inverse of naming."""

    def pick(path):
        (period, repeats, _), prefix, inner = layout.layer(path)
        if inner[0] == "stacked":
            layers = range(inner[1], period * repeats, period)
            return jnp.stack([named[_layer_name(prefix, layer, inner)] for layer in layers])
        if inner[0] == "layers":
            return jnp.asarray(named[_layer_name(prefix, period * repeats + inner[1], inner)])
        return jnp.asarray(named[".".join(map(str, path))])

    flat = nnx.traversals.flatten_mapping(like)
    return nnx.traversals.unflatten_mapping({path: pick(path) for path in flat})
