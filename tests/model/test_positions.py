"""Sinusoids and rotations against their papers' formulas, in float64 numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.model.positions import rope_frequencies, rope_tables, rotate, sinusoidal
from assay.spec.model import LinearScaling, Llama3Scaling, Rope, YarnScaling


def test_sinusoids_as_in_the_paper():
    width, theta = 16, 10_000.0
    found = sinusoidal(jnp.arange(100), width, theta)
    for p in (0, 1, 7, 99):
        for i in range(width // 2):
            angle = p / theta ** (2 * i / width)
            assert found[p, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert found[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)
    by_row = sinusoidal(jnp.array([[3, 4], [50, 0]]), width, theta)
    np.testing.assert_array_equal(by_row, found[jnp.array([[3, 4], [50, 0]])])


def rotated(x, position, spec):
    """One vector (C,) as it stands at a position."""
    cos, sin = rope_tables(jnp.array([position]), x.shape[-1], spec)
    return rotate(x[None, None, None], cos, sin)[0, 0, 0]


@pytest.mark.parametrize("scaling", [None, LinearScaling(factor=4)])
def test_scores_depend_on_the_distance_alone(scaling):
    spec = Rope(scaling=scaling)
    q, k = jax.random.normal(jax.random.key(0), (2, 32))
    for distance in (0, 1, 5, 40):
        scores = [
            float(rotated(q, i + distance, spec) @ rotated(k, i, spec)) for i in (0, 3, 100, 500)
        ]
        np.testing.assert_allclose(scores, scores[0], atol=1e-3)
    assert abs(float(rotated(q, 0, spec) @ rotated(k, 0, spec)) - float(q @ k)) < 1e-4


def test_rotation_by_complex_numbers():
    """Features (i, i + C/2) are one complex number, turned by p theta^(-2i/C)."""
    width, theta, p = 8, 100.0, 13
    x = np.asarray(jax.random.normal(jax.random.key(0), (width,)), np.float64)
    turned = (x[:4] + 1j * x[4:]) * np.exp(1j * p * theta ** (-2 * np.arange(4) / width))
    found = rotated(jnp.asarray(x, jnp.float32), p, Rope(theta=theta))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag]), atol=1e-5)


def test_no_two_positions_collide():
    """In float32 they are all told apart up to a million; in bfloat16 they collide past 256."""
    positions = jnp.arange(2**20)
    cos, sin = rope_tables(positions, 16, Rope())
    assert cos.dtype == sin.dtype == jnp.float32
    table = np.concatenate([cos, sin], axis=1)
    assert len(np.unique(table, axis=0)) == len(positions)
    x = jnp.ones((1, 2, 1, 16), jnp.bfloat16)
    assert rotate(x, cos[:2], sin[:2]).dtype == jnp.bfloat16


def frequencies(scaling, width=64, theta=10_000.0):
    found, sharpen = rope_frequencies(width, Rope(theta=theta, scaling=scaling))
    return np.asarray(found, np.float64), sharpen, theta ** (-np.arange(0, width, 2) / width)


def test_linear_scaling():
    found, sharpen, plain = frequencies(LinearScaling(factor=8))
    np.testing.assert_allclose(found, plain / 8, rtol=1e-5)
    assert sharpen == 1.0


def test_llama3_scaling():
    """The reference code of Llama 3.1, pair by pair."""
    scaling = Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_context=8192)
    found, sharpen, plain = frequencies(scaling, 128, 500_000.0)
    wanted = []
    for rate in plain:
        wavelength = 2 * math.pi / rate
        if wavelength < 8192 / 4:
            wanted.append(rate)
        elif wavelength > 8192 / 1:
            wanted.append(rate / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * rate / 8 + smooth * rate)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    assert sharpen == 1.0
    assert found[0] == pytest.approx(plain[0])
    assert found[-1] == pytest.approx(plain[-1] / 8)


@pytest.mark.parametrize("attention_factor", [None, 1.5])
def test_yarn_scaling(attention_factor):
    """YaRN's equations 22 to 25; its bounds are rounded outwards, as in its reference code."""
    width, theta, factor, original = 64, 10_000.0, 16.0, 2048
    scaling = YarnScaling(
        factor=factor, original_context=original, attention_factor=attention_factor
    )
    found, sharpen, plain = frequencies(scaling, width, theta)

    def pair(turns):
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(pair(32)), math.ceil(pair(1))
    keep = 1 - np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found, (1 - keep) * plain / factor + keep * plain, rtol=2e-5)
    assert sharpen == pytest.approx(attention_factor or 0.1 * math.log(factor) + 1)
    cos, sin = rope_tables(jnp.arange(3), width, Rope(theta=theta, scaling=scaling))
    np.testing.assert_allclose(cos**2 + sin**2, sharpen**2, rtol=1e-5)
