"""Cross-entropy of tokens: the one place for it, read by training and evaluation alike.

Axes: B batch, T tokens, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from assay.model import blas
from assay.model.layers import CpuKernels


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_losses(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"], cpu: CpuKernels = False
) -> Float32[Array, "*b"]:
    """-log softmax(logits)[target] of every token, in nats, (..., V) and (...) -> (...).

    The softmax is in float32 whatever the logits' dtype. The gradient is written out,
    (softmax - onehot) g: one pass over the logits, where autodiff scatters. A target outside
    0 ... V-1 is a caller's mistake; nothing is raised inside jit.
    """
    return _token_losses_forward(logits, targets, cpu)[0]


def _token_losses_forward(logits, targets, cpu):
    if cpu == "blas" and blas.pays(logits):  # XLA's takes one thread
        normaliser = blas.logsumexp(logits)
    else:
        normaliser = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normaliser - picked.astype(jnp.float32), (logits, normaliser, targets)


def _token_losses_backward(cpu, saved, g):
    del cpu
    logits, normaliser, targets = saved
    probabilities = jnp.exp(logits.astype(jnp.float32) - normaliser[..., None])
    places = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    onehot = (places == targets[..., None]).astype(jnp.float32)
    return ((probabilities - onehot) * g[..., None]).astype(logits.dtype), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)
