"""The model: embedding, blocks, head. It reads as the paper, and branches while it is built.

Axes: B batch, T tokens, D model, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from assay.errors import AssayError, did_you_mean
from assay.model.attention import Attention, Geometry, geometry
from assay.model.cache import Cache, LayerCache
from assay.model.layers import (
    Mlp,
    Norm,
    along_last,
    depth_scale,
    dropout,
    product,
    use_cpu_kernels,
)
from assay.model.moe import Moe, Routing
from assay.model.positions import sinusoidal
from assay.model.sharding import constant_parameter, constrain, parameter, table_rows
from assay.spec.model import BlockSpec, InitSpec, TransformerSpec, ZeroInit
from assay.spec.run import ComputeSpec


class Embedding(nnx.Module):
    """Tokens (and their places) to vectors."""

    def __init__(self, key: Key[Array, ""], spec: TransformerSpec):
        token_key, position_key = jax.random.split(key)
        init = spec.init.embedding
        table_shape = (spec.padded_vocab, spec.d_model)
        self.spec = spec.embedding
        self.table = parameter(token_key, table_shape, ("vocab", "embed"), init)
        learned = spec.embedding.positions.kind == "learned"
        shape = (spec.context, spec.d_model)
        self.positions = parameter(position_key, shape, (None, "embed"), init) if learned else None
        self.norm = Norm(spec.d_model, spec.embedding.norm) if spec.embedding.norm else None

    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        positions: Int32[Array, "*b t"],
        key: Key[Array, ""] | None,
    ) -> Float32[Array, "b t d"]:
        x = table_rows(self.table, tokens)
        if self.spec.scale_by_sqrt_width:
            x = x * math.sqrt(x.shape[-1])
        if self.spec.positions.kind == "learned":
            added = table_rows(self.positions, positions)
            x = x + (added if added.ndim == 3 else added[None])
        elif self.spec.positions.kind == "sinusoidal":
            table = sinusoidal(positions, x.shape[-1], self.spec.positions.theta)
            x = x + (table if table.ndim == 3 else table[None])
        if self.norm is not None:
            x = self.norm(x)
        return dropout(x, self.spec.dropout, key)


class Block(nnx.Module):
    """Attention, then feed-forward, each with its norm and its residual."""

    def __init__(
        self,
        key: Key[Array, ""],
        d_model: int,
        spec: BlockSpec,
        init: InitSpec,
        num_layers: int,
        compute: ComputeSpec,
    ):
        attention_key, feed_forward_key = jax.random.split(key)
        how = {
            "init": init.weights,
            "residual_init": ZeroInit() if init.residual == "zero" else init.weights,
            "residual_scale": depth_scale(num_layers) if init.residual == "depth_scaled" else 1.0,
            "compute": compute,
        }
        attends, feeds = spec.attention is not None, spec.feed_forward is not None
        before, after = (
            spec.norm_position in ("pre", "both"),
            spec.norm_position in ("post", "both"),
        )

        def norm(present: bool) -> Norm | None:
            return Norm(d_model, spec.norm) if present else None

        self.dropout = spec.dropout
        self.norm_after_sum = spec.norm_position == "post"
        self.attention_norm = norm(attends and before)
        self.attention = (
            Attention(attention_key, d_model, spec.attention, **how) if attends else None
        )
        self.attention_post_norm = norm(attends and after)
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
        real: Bool[Array, "b t"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None, Routing | None]:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        routing = None
        if self.attention is not None:
            y = x if self.attention_norm is None else self.attention_norm(x)
            y, cache = self.attention(y, geometry, cache, keys[0])
            x = self._add(x, y, self.attention_post_norm, keys[1])
        if self.feed_forward is not None:
            y = x if self.feed_forward_norm is None else self.feed_forward_norm(x)
            if isinstance(self.feed_forward, Moe):
                noise = None if key is None else jax.random.fold_in(keys[2], 1)
                y, routing = self.feed_forward(y, real=real, key=noise, train=train)
            else:
                y = self.feed_forward(y)
            x = self._add(x, y, self.feed_forward_post_norm, keys[2])
        return x, cache, routing

    def _add(self, x, y, post_norm, key):
        """x + y, with the norm that follows: of the sum (2017), or of y alone (Gemma 2)."""
        if self.norm_after_sum:
            return post_norm(x + dropout(y, self.dropout, key))
        if post_norm is not None:
            y = post_norm(y)
        return x + dropout(y, self.dropout, key)


class Head(nnx.Module):
    """Vectors to logits, by a table of its own or the embedding's."""

    def __init__(self, key: Key[Array, ""], spec: TransformerSpec, compute: ComputeSpec):
        shape = (spec.d_model, spec.padded_vocab)
        self.spec, self.cpu = spec.head, use_cpu_kernels(compute)
        tied, bias = spec.head.tied, spec.head.bias
        init = spec.init.head_init()
        self.w = None if tied else parameter(key, shape, ("embed", "vocab"), init)
        self.b = constant_parameter((spec.padded_vocab,), ("vocab",), 0.0) if bias else None

    def __call__(
        self, x: Float[Array, "b t d"], table: Float32[Array, "v d"]
    ) -> Float32[Array, "b t v"]:
        if self.w is None:
            logits = product(x, table, transposed=True, cpu=self.cpu)
        else:
            logits = product(x, self.w[...], cpu=self.cpu)
        logits = logits.astype(jnp.float32)
        if self.b is not None:
            logits = logits + along_last(self.b[...], logits)
        if self.spec.softcap is not None:
            logits = self.spec.softcap * jnp.tanh(logits / self.spec.softcap)
        return logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """All that a forward gives: `routing` has a record for each layer of experts, in order."""

    logits: Float32[Array, "b t v"]
    cache: Cache | None
    routing: tuple[Routing, ...]


class Transformer(nnx.Module):
    """The architecture that a spec describes; a pytree that `jax.jit` takes.

    `rngs` is an `nnx.Rngs` or a key. How it is computed (dtype, scan, kernels) is `compute`'s;
    parameters are float32 always, and the same whatever `compute` says, but that scanned
    layers are kept stacked.
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
        decoder = spec.decoder
        self.spec, self.compute = spec, compute
        self.embedding = Embedding(embedding_key, spec)
        layers = [
            Block(k, spec.d_model, block, spec.init, decoder.num_layers, compute)
            for k, block in zip(
                jax.random.split(stack_key, max(decoder.num_layers, 1)),
                decoder.blocks(),
                strict=False,
            )
        ]
        # Scanned: layer i of each period is stacked with its like; a last, broken period is not.
        period, repeats = layout(spec, compute)
        self.stacked = nnx.List(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[i : repeats * period : period])
            for i in range(period if repeats else 0)
        )
        self.layers = nnx.List(layers[repeats * period :])
        self.final_norm = Norm(spec.d_model, decoder.final_norm) if decoder.final_norm else None
        self.head = Head(head_key, spec, compute) if spec.head else None

    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        *,
        positions: Int32[Array, "b t"] | None = None,
        segment_ids: Int32[Array, "b t"] | None = None,
        cache: Cache | None = None,
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Float32[Array, "b t v"] | tuple[Float32[Array, "b t v"], Cache]:
        """Logits of the next token at every place; with a cache, also the cache grown by T.

        `key` turns dropout on. `segment_ids` keep packed documents apart, and `positions` then
        count within each. `train` has experts' capacity limits act, and with a key their
        routers' noise; tokens of segment 0 are then padding, and take no place.
        """
        x, cache = self.hidden(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            key=key,
            train=train,
        )
        logits = self.logits(x)
        return logits if cache is None else (logits, cache)

    def forward(self, tokens: Int32[Array, "b t"], **options) -> Output:
        """As a call with the same `options`; gives also what the routers did."""
        x, cache, routing = self._run(tokens, **options)
        return Output(self.logits(x), cache, routing)

    def hidden(
        self, tokens: Int32[Array, "b t"], **options
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """The last layer's output, normed: what the head reads. `options` as in a call."""
        x, cache, _ = self._run(tokens, **options)
        return x, cache

    def _run(
        self,
        tokens: Int32[Array, "b t"],
        *,
        positions: Int32[Array, "b t"] | None = None,
        segment_ids: Int32[Array, "b t"] | None = None,
        cache: Cache | None = None,
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], Cache | None, tuple[Routing, ...]]:
        spec = self.spec
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            if cache is not None:
                positions = cache.lengths[:, None] + positions[None]
        embedding_key = stack_key = None
        if key is not None:
            embedding_key, stack_key = jax.random.split(key)
        x = self.embedding(tokens, positions, embedding_key)
        x = constrain(x.astype(self.compute.dtype), "batch", None, None)
        shared = geometry(
            [block.attention for block in spec.decoder.pattern if block.attention],
            spec.d_model,
            positions,
            causal=spec.decoder.causal,
            segment_ids=segment_ids,
            slots=cache.capacity if cache is not None else None,
        )
        experts = {"train": train}
        if train and segment_ids is not None:
            experts["real"] = segment_ids != 0
        x, layers, routing = self._run_layers(x, shared, cache, stack_key, experts)
        if cache is not None:
            cache = Cache(layers, cache.lengths + tokens.shape[1])
        return x if self.final_norm is None else self.final_norm(x), cache, routing

    def logits(self, x: Float[Array, "b t d"]) -> Float32[Array, "b t v"]:
        """The head alone. Rows that only pad the vocabulary give no logit."""
        if self.head is None:
            return x.astype(jnp.float32)
        return self.head(x, self.embedding.table[...])[..., : self.spec.vocab_size]

    def _run_layers(self, x, shared, cache, key, experts):
        def run(block, x, layer_cache, index):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, layer_cache, routing = block(x, shared, layer_cache, layer_key, **experts)
            return constrain(x, "batch", None, None), layer_cache, routing

        if self.compute.remat == "block":
            run = jax.checkpoint(run)
        period, records = len(self.stacked), []
        if period and cache is None:

            def one_period(carry, blocks):
                x, index = carry
                routings = []
                for i, block in enumerate(blocks):
                    x, _, routing = run(block, x, None, index + i)
                    routings.append(routing)
                return (x, index + period), tuple(routings)

            (x, _), stacks = jax.lax.scan(one_period, (x, jnp.int32(0)), tuple(self.stacked))
            for r in range(layout(self.spec, self.compute).repeats):
                records += [jax.tree.map(lambda leaf, r=r: leaf[r], stack) for stack in stacks]
            blocks = list(self.layers)
        else:
            blocks = list(self.unstacked_layers())
        first = self.spec.decoder.num_layers - len(blocks)
        caches = cache.layers if cache is not None else (None,) * self.spec.decoder.num_layers
        grown = []
        for index, block in enumerate(blocks, start=first):
            x, layer_cache, routing = run(block, x, caches[index], index)
            grown.append(layer_cache)
            records.append(routing)
        return x, tuple(grown), tuple(record for record in records if record is not None)

    def unstacked_layers(self):
        """Every layer in order, whether they are kept stacked or not."""
        if self.stacked:
            for r in range(layout(self.spec, self.compute).repeats):
                for stack in self.stacked:
                    yield jax.tree.map(lambda leaf, r=r: leaf[r], stack)
        yield from self.layers


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
    """How layers are kept: `repeats` of each of the `period` stacked ones, the rest by itself."""

    period: int
    repeats: int


def layout(spec: TransformerSpec, compute: ComputeSpec) -> Layout:
    period = len(spec.decoder.pattern)
    if not compute.scan_layers or period == 0:
        return Layout(0, 0)
    return Layout(period, spec.decoder.num_layers // period)


def name_leaves(tree: dict, layout: Layout) -> dict[str, Array]:
    """The leaves of a pure dict in the parameters' form (gradients, say), named by layer."""
    named = {}
    for path, leaf in nnx.traversals.flatten_mapping(tree).items():
        if path[0] == "stacked":
            for r in range(layout.repeats):
                named[_layer_name(r * layout.period + path[1], path)] = _entry(leaf, r)
        elif path[0] == "layers":
            named[_layer_name(layout.period * layout.repeats + path[1], path)] = leaf
        else:
            named[".".join(map(str, path))] = leaf
    return named


def _layer_name(layer: int, path: tuple) -> str:
    return ".".join(map(str, ("layers", layer, *path[2:])))


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
        if path[0] == "stacked":
            layers = range(path[1], layout.period * layout.repeats, layout.period)
            return jnp.stack([named[_layer_name(layer, path)] for layer in layers])
        if path[0] == "layers":
            return jnp.asarray(named[_layer_name(layout.period * layout.repeats + path[1], path)])
        return jnp.asarray(named[".".join(map(str, path))])

    flat = nnx.traversals.flatten_mapping(like)
    return nnx.traversals.unflatten_mapping({path: pick(path) for path in flat})
