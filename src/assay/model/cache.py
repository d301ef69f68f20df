"""The key-value cache: arrays of fixed size, so that decoding never recompiles.

The keys and values that cross-attention makes of a source never grow: they are made once.

Slot s of a row holds the key and value of the token at position s. `lengths` counts the valid
slots of each row; what lies behind is never read, because a query only sees slots up to its own
position.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from assay.spec.model import TransformerSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, and the number of valid slots in each row."""

    keys: Float[Array, "b s k c"]
    values: Float[Array, "b s k c"]
    lengths: Int32[Array, "b"]

    def append(self, keys: Float[Array, "b t k c"], values: Float[Array, "b t k c"]):
        """The cache with T more tokens in each row; the caller sees to it that there is room."""
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0)))
        return LayerCache(
            write(self.keys, keys.astype(self.keys.dtype), self.lengths),
            write(self.values, values.astype(self.values.dtype), self.lengths),
            self.lengths + keys.shape[1],
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SourceCache:
    """(keys, values) of the source [R, S, K, C] for each layer with cross-attention, else None.

    `mask` is True where a source token is real. Each of the R rows may serve several rows of the
    decoder that follow one another: the beams of one source.
    """

    layers: tuple[tuple[Float[Array, "r s k c"], Float[Array, "r s k c"]] | None, ...]
    mask: Bool[Array, "r s"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The caches of all layers (None where a layer has no attention), and of the source.

    `tokens` are kept in slots as keys are, where n-grams are read of them; else None.
    """

    layers: tuple[LayerCache | None, ...]
    lengths: Int32[Array, "b"]
    source: SourceCache | None = None
    tokens: Int32[Array, "b s"] | None = None

    @property
    def capacity(self) -> int | None:
        """Slots a row; None where no layer keeps any."""
        return next((layer.keys.shape[1] for layer in self.layers if layer), None)

    def grown(self, capacity: int) -> "Cache":
        """A copy with room for so many tokens a row."""

        def more(x: Float[Array, "b s k c"]) -> Float[Array, "b s2 k c"]:
            return jnp.pad(x, ((0, 0), (0, capacity - x.shape[1]), (0, 0), (0, 0)))

        layers = tuple(
            layer and LayerCache(more(layer.keys), more(layer.values), layer.lengths)
            for layer in self.layers
        )
        tokens = self.tokens
        if tokens is not None:
            tokens = jnp.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])))
        return replace(self, layers=layers, tokens=tokens)

    def with_tokens(self, tokens: Int32[Array, "b t"]) -> "Cache":
        """The tokens written behind the valid slots, where they are kept."""
        if self.tokens is None:
            return self
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        return replace(self, tokens=write(self.tokens, tokens, self.lengths))

    def with_lengths(self, lengths: Int32[Array, "b"]) -> "Cache":
        """The same slots, of which others are valid: prompts of different lengths, padded."""
        layers = tuple(
            layer and LayerCache(layer.keys, layer.values, lengths) for layer in self.layers
        )
        return replace(self, layers=layers, lengths=lengths)


def empty_cache(
    spec: TransformerSpec, batch: int, capacity: int, dtype: jnp.dtype | str = jnp.float32
) -> Cache:
    """A cache with no tokens in it, for `batch` rows of at most `capacity` tokens.

    Of an encoder-decoder it holds no source yet: the first call that is given one puts it there.
    """
    lengths = jnp.zeros((batch,), jnp.int32)

    def layer(attention) -> LayerCache | None:
        if attention is None:
            return None
        shape = (batch, capacity, attention.num_kv_heads, attention.width(spec.d_model))
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), lengths)

    layers = tuple(layer(block.attention) for block in spec.decoder.blocks())
    tokens = jnp.zeros((batch, capacity), jnp.int32) if spec.embedding.ngrams else None
    return Cache(layers, lengths, tokens=tokens)
