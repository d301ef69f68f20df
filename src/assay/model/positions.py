"""Where a token stands: sinusoidal tables and rotary angles, always in float32.

In bfloat16, positions past 256 would collide.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from assay.spec.model import Rope


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
