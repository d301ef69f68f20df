"""Cross-entropy against numpy in float64, and its written-out gradient against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.model.loss import token_losses

B, T, V = 2, 5, 11


def example(scale=3.0, dtype=jnp.float32):
    a, b, c = jax.random.split(jax.random.key(0), 3)
    logits = (scale * jax.random.normal(a, (B, T, V))).astype(dtype)
    return logits, jax.random.randint(b, (B, T), 0, V), jax.random.normal(c, (B, T))


def plain(logits, targets):
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def test_values_against_float64():
    logits, targets, _ = example()
    z = np.asarray(logits, np.float64)
    wanted = (
        np.log(np.exp(z).sum(-1))
        - np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(token_losses(logits, targets), wanted, rtol=1e-6, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert token_losses(logits, jnp.array([1]))[0] == 2e4
    assert token_losses(logits, jnp.array([0]))[0] == 0.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"]
)
def test_gradient_against_autodiff(dtype, transform):
    logits, targets, g = example(dtype=dtype)

    def gradient(losses):
        return jax.grad(lambda x: jnp.sum(transform(losses)(x, targets) * g))(logits)

    found = gradient(token_losses)
    assert found.dtype == logits.dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(
        found.astype(jnp.float32),
        gradient(plain).astype(jnp.float32),
        atol=tolerance,
        rtol=tolerance,
    )


def test_under_vmap_and_scan():
    logits, targets, _ = example()
    wanted = token_losses(logits, targets)
    np.testing.assert_array_equal(jax.vmap(token_losses)(logits, targets), wanted)
    _, scanned = jax.lax.scan(lambda c, row: (c, token_losses(*row)), None, (logits, targets))
    np.testing.assert_array_equal(scanned, wanted)
