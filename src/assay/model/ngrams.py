"""Which row of an n-gram's table is a token's: what stands before it, and the hash.

Source: the hash n-grams of Byte Latent Transformers (arXiv:2412.09871, section 3.2.1).

Axes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int32

from assay.model.cache import Cache

NOTHING = -1
"""Stands for a token before the first one of a row or a segment."""

FACTOR, MIX = 0x9E3779B1, 0x85EBCA6B  # odd, with bits spread evenly: of xxHash and MurmurHash


def preceding(
    tokens: Int32[Array, "b t"],
    count: int,
    *,
    segment_ids: Int32[Array, "b t"] | None = None,
    cache: Cache | None = None,
) -> list[Int32[Array, "b t"]]:
    """The tokens 1 ... `count` places before each, `NOTHING` where there is none.

    Nothing stands before the first token of a segment. `cache` holds `tokens` and what was before.
    """
    found = []
    for k in range(1, count + 1):
        if cache is not None:
            places = cache.lengths[:, None] + jnp.arange(tokens.shape[1])[None] - k
            kept = jnp.take_along_axis(cache.tokens, jnp.maximum(places, 0), axis=1)
            found.append(jnp.where(places >= 0, kept, NOTHING))
            continue
        before = _shifted(tokens, k)
        if segment_ids is not None:
            before = jnp.where(_shifted(segment_ids, k) == segment_ids, before, NOTHING)
        found.append(before)
    return found


def _shifted(x: Int32[Array, "b t"], by: int) -> Int32[Array, "b t"]:
    return jnp.pad(x[:, :-by], ((0, 0), (min(by, x.shape[1]), 0)), constant_values=NOTHING)


def ngram_rows(
    last: Sequence[Int32[Array, "b t"]], rows: int, vocab_size: int
) -> Int32[Array, "b t"]:
    """The row of each n-gram: its number where there is a row for each, else by a hash.

    `last` are the tokens, those one place before, and so on. The hash is a polynomial of the ids
    modulo 2^32, mixed, since its low bits are those of the last ids alone.
    """
    exact = (vocab_size + 1) ** len(last) <= rows
    factor = jnp.uint32(vocab_size + 1 if exact else FACTOR)
    number = jnp.zeros(last[0].shape, jnp.uint32)
    for ids in last:
        number = number * factor + (ids + 1).astype(jnp.uint32)
    if not exact:
        number = (number ^ (number >> 15)) * jnp.uint32(MIX)
        number = (number ^ (number >> 13)) % jnp.uint32(rows)
    return number.astype(jnp.int32)
