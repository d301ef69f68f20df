"""Where a token stands: sinusoidal tables, rotary angles, relative biases, always in float32.

In bfloat16, positions past 256 would collide.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from assay.spec.model import RelativeBias, Rope


def _angles(
    positions: Int32[Array, "*b t"], rates: Float32[Array, "half"]
) -> Float32[Array, "*b t half"]:
    rates = rates.reshape((1,) * positions.ndim + rates.shape)
    return positions[..., None].astype(jnp.float32) * rates


def sinusoidal(
    positions: Int32[Array, "*b t"], width: int, theta: float
) -> Float32[Array, "*b t d"]:
    """PE(p, 2i) = sin(p / theta^(2i/d)), PE(p, 2i+1) = cos(same) (arXiv:1706.03762, 3.5)."""
    rates = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = _angles(positions, rates)
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*angles.shape[:-1], width)


def rope_frequencies(width: int, spec: Rope) -> tuple[Float32[Array, "half"], float]:
    """Radians a position for each pair of features, and the factor on rotated vectors.

    Pair i turns at theta^(-2i/width), changed by the spec's scaling.
    """
    half = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    rates = spec.theta**-half
    scaling = spec.scaling
    if scaling is None:
        return rates, 1.0
    match scaling.kind:
        case "linear":
            return rates / scaling.factor, 1.0
        case "llama3":
            wavelength = 2 * math.pi / rates
            ratio = scaling.original_context / wavelength
            blend = (ratio - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            blend = jnp.clip(blend, 0.0, 1.0)  # 0: a long wave, fully slowed; 1: a short one, kept
            return (1 - blend) * rates / scaling.factor + blend * rates, 1.0
        case "yarn":

            def pair_turning(rotations: float) -> float:
                """The (fractional) pair that turns so often within the original context."""
                span = scaling.original_context / (rotations * 2 * math.pi)
                return width * math.log(span) / (2 * math.log(spec.theta))

            low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
            high = min(math.ceil(pair_turning(scaling.beta_slow)), width - 1)
            ramp = (jnp.arange(width // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
            slowed = jnp.clip(ramp, 0.0, 1.0)
            sharpen = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
            return slowed * rates / scaling.factor + (1 - slowed) * rates, sharpen


def rope_tables(
    positions: Int32[Array, "*b t"], width: int, spec: Rope
) -> tuple[Float32[Array, "*b t half"], Float32[Array, "*b t half"]]:
    """Cosine and sine of every angle."""
    rates, sharpen = rope_frequencies(width, spec)
    angles = _angles(positions, rates)
    return jnp.cos(angles) * sharpen, jnp.sin(angles) * sharpen


def rotate(
    x: Float[Array, "b t h c"],
    cos: Float32[Array, "*b t half"],
    sin: Float32[Array, "*b t half"],
) -> Float[Array, "b t h c"]:
    """Turns (first half, second half) of each head by the angle of its position."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    if cos.ndim == 2:  # positions shared by the batch
        cos, sin = cos[None], sin[None]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The published slopes, for any number of heads (arXiv:2108.12409, and its code)."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2.0 ** (-4 * i / below) for i in range(1, 2 * below + 1, 2)]
    return (*slopes, *between[: heads - below])


def alibi_bias(behind: Int[Array, "*b t s"], heads: int) -> Float32[Array, "#b h t s"]:
    """-slope x distance for each head: (T, S) gives (1, H, T, S), (B, T, S) gives (B, H, T, S)."""
    slopes = jnp.asarray(alibi_slopes(heads), jnp.float32)[None, :, None, None]
    distance = jnp.abs(behind).astype(jnp.float32)
    distance = distance[None, None] if distance.ndim == 2 else distance[:, None]
    return -slopes * distance


def distance_buckets(spec: RelativeBias, *, causal: bool) -> Int32[np.ndarray, "n"]:
    """The bucket of each distance from 0 to `max_distance`, which stands for all beyond.

    The arithmetic is T5's, in float32: the border between two buckets is where it rounds to.
    """
    buckets = spec.buckets if causal else spec.buckets // 2
    exact = buckets // 2
    distance = np.arange(spec.max_distance + 1)
    share = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    share = share / np.float32(math.log(spec.max_distance / exact)) * np.float32(buckets - exact)
    wide = np.minimum(exact + share.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, wide).astype(np.int32)


def relative_bias(
    behind: Int[Array, "*b t s"], table: Float[Array, "n h"], spec: RelativeBias, *, causal: bool
) -> Float32[Array, "#b h t s"]:
    """What is added to the scores, of how far each key lies behind its query (negative: ahead).

    (T, S) gives (1, H, T, S), and (B, T, S) gives (B, H, T, S).
    """
    of_distance = jnp.asarray(distance_buckets(spec, causal=causal))
    if causal:
        bucket = of_distance[jnp.clip(behind, 0, spec.max_distance)]
    else:
        bucket = of_distance[jnp.minimum(jnp.abs(behind), spec.max_distance)]
        bucket = bucket + jnp.where(behind < 0, spec.buckets // 2, 0)
    bias = jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, -3)
    return bias if bias.ndim == 4 else bias[None]
