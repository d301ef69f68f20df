"""Decoding's hot loops in C++ (`native.cc`), compiled here where there is a compiler.

XLA's CPU backend reads weights of fewer bits no faster than a third of what memory gives, and
runs the attention of one query, norms and activations as rows of small programs. Where a C++
compiler and AVX-512 with bfloat16 and VNNI are at hand, `native.cc` is compiled once (seconds)
into the cache folder and called through JAX's FFI; elsewhere, and with `ASSAY_NATIVE=0`, nothing
is compiled, and XLA computes the same. docs/performance.md has the figures of both.

Axes: R rows, K fan-in, N fan-out, B batch, D model, H heads, G kv heads, S slots, C head width.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from assay.model.blas import of_attention, or_nothing
from assay.model.cache import LayerCache
from assay.model.compiled import NotCompiledError, library, processor_features

CALLS = ("product", "attend", "attention_half", "mlp_half")
NEEDED = {"avx512_bf16", "avx512_vnni", "avx512bw"}
TILE = 48
"""Outputs that lie side by side in packed weights."""
ACTIVATIONS = ("silu", "gelu_tanh", "relu", "relu_squared")
"""Those that are written in C++, by their number there."""


@lru_cache(maxsize=1)
def build() -> tuple[bool, str]:
    """Whether the calls are there, and a sentence that says so, or why not."""
    try:
        if not set(processor_features()) >= NEEDED:
            raise NotCompiledError("the processor has no AVX-512 with bfloat16.")
        compiled = library("native")
    except NotCompiledError as error:
        return False, f"XLA computes all of it: {error}"
    for call in CALLS:
        function = jax.ffi.pycapsule(getattr(compiled, call))
        jax.ffi.register_ffi_target(f"assay_{call}", function, platform="cpu")
    return True, "products and attention of a token in C++, compiled here."


def fits(fan_in: int) -> bool:
    """Whether a product over so many features can be packed: whole words of four bytes."""
    return fan_in % 4 == 0


def pack(w: Array) -> Array:
    """(K, N) to (N / 48, K / e, 48, e), e entries in four bytes; N is filled up with zeros.

    int8 becomes unsigned, 128 added: so the processor multiplies it.
    """
    entries = 4 // w.dtype.itemsize
    k, n = w.shape
    if w.dtype == jnp.int8:
        w = jax.lax.bitcast_convert_type(w, jnp.uint8) ^ jnp.uint8(128)
    w = jnp.pad(w, ((0, 0), (0, -n % TILE)))
    return w.reshape(k // entries, entries, -1, TILE).transpose(2, 0, 3, 1)


def unpack(packed: Array, n: int) -> Array:
    """The (K, N) weight that `pack` was given."""
    tiles, words, _, entries = packed.shape
    w = packed.transpose(1, 3, 0, 2).reshape(words * entries, tiles * TILE)[:, :n]
    if w.dtype == jnp.uint8:
        w = jax.lax.bitcast_convert_type(w ^ jnp.uint8(128), jnp.int8)
    return w


class Packed(NamedTuple):
    """A packed weight, the factor of each output where it is int8, and perhaps a bias."""

    w: Array
    factor: Float32[Array, "n"] | None = None
    bias: Float32[Array, "n"] | None = None


class Normalisation(NamedTuple):
    """A LayerNorm (`centred`) or an RMSNorm."""

    scale: Float32[Array, "d"] | None
    bias: Float32[Array, "d"] | None
    epsilon: float
    centred: bool


def product(
    x: Float[Array, "r k"], packed: Array, n: int, factor: Float32[Array, "n"] | None = None
) -> Float[Array, "r n"]:
    """x w for a packed w of x's dtype, summed in float32; or of int8, with a factor an output.

    For int8 x is quantised too, row by row.
    """
    result = jax.ShapeDtypeStruct((x.shape[0], n), x.dtype)
    return _call("product", result)(x, packed, or_nothing(factor))


def attend(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b t g c"],
    v: Float[Array, "b t g c"],
    cache: LayerCache,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Float[Array, "b t h c"], LayerCache]:
    """Appends T tokens to each row of the cache, and attends to the row from them.

    softmax(q k^T scale) v over the slots up to a token's own, `window` of them at most; all sums
    are in float32, and no other slot is read. The cache's memory is changed in place.
    """
    kept = (cache.keys, cache.values)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *kept)]
    call = _call("attend", results, input_output_aliases={3: 1, 4: 2})
    y, keys, values = call(q, k, v, *kept, cache.lengths, **of_attention(scale, window))
    return y, LayerCache(keys, values, cache.lengths + q.shape[1])


def attention_half(
    x: Float[Array, "b t d"],
    norm: Normalisation,
    qkv: Packed,
    out: Packed,
    rotation: tuple[Float32[Array, "b t half"], Float32[Array, "b t half"]] | None,
    cache: LayerCache,
    *,
    heads: int,
    scale: float,
    window: int | None = None,
) -> tuple[Float[Array, "b t d"], LayerCache]:
    """x + out(attention(qkv(norm(x)))), q and k rotated where a rotation is given.

    The cache is treated as by `attend`. What lies between is rounded to x's dtype, as it is when
    each step is a call of its own.
    """
    kept = (cache.keys, cache.values)
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, *kept)]
    arrays = (x, *_arrays(norm, qkv, out), *map(or_nothing, rotation or (None, None)))
    first = len(arrays)
    call = _call("attention_half", results, input_output_aliases={first: 1, first + 1: 2})
    y, keys, values = call(
        *arrays,
        *kept,
        cache.lengths,
        **_of_norm(norm),
        heads=np.int64(heads),
        **of_attention(scale, window),
    )
    return y, LayerCache(keys, values, cache.lengths + x.shape[1])


def mlp_half(
    x: Float[Array, "r d"],
    norm: Normalisation,
    up: Packed,
    down: Packed,
    *,
    activation: str,
    gated: bool,
) -> Float[Array, "r d"]:
    """x + down(activation(up(norm(x)))); gated, `up` makes the gate and what it multiplies."""
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    how = {"gated": gated, "activation": np.int64(ACTIVATIONS.index(activation))}
    return _call("mlp_half", result)(x, *_arrays(norm, up, down), **_of_norm(norm), **how)


def _arrays(norm: Normalisation, *weights: Packed) -> tuple[Array, ...]:
    packed = (array for weight in weights for array in (weight.w, *weight[1:]))
    return tuple(map(or_nothing, (norm.scale, norm.bias, *packed)))


def _of_norm(norm: Normalisation) -> dict[str, np.float32 | bool]:
    return {"epsilon": np.float32(norm.epsilon), "centred": norm.centred}


def _call(name: str, results, **options):
    return jax.ffi.ffi_call(f"assay_{name}", results, vmap_method="sequential", **options)
