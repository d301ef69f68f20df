"""jaxformers' decoder-only language model and its copy task, on plain arrays.

Its task drew every token at random, so no model could beat ln(vocabulary). Here the second half
of each sequence repeats the first, and the loss is taken where the answer is known.

Run: python examples/jaxformers_lm.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from assay.functional import (
    DecoderParams,
    causal_mask,
    init_embedding,
    init_transformer_decoder,
    log_probabilities,
    transformer_decoder,
    transformer_embedding,
)
from assay.spec.model import InitSpec, XavierInit

vocab_size = 32
max_seq_length = 32
half = 8  # tokens to copy
sizes = {"num_layers": 2, "num_heads": 4, "d_model": 64, "d_ff": 128}
batch_size = 32
num_steps = 600
learning_rate = 0.5  # at the beginning; it falls to 0 along a line


class TransformerLM(NamedTuple):
    """Every weight of the model."""

    tokens: Float[Array, "v d"]
    positions: Float[Array, "p d"]
    decoder: DecoderParams
    output_w: Float[Array, "d v"]
    output_b: Float[Array, "v"]


def init_transformer_lm(key: Key[Array, ""]) -> TransformerLM:
    keys = jax.random.split(key, 4)
    d_model = sizes["d_model"]
    decoder = init_transformer_decoder(
        keys[2],
        **sizes,
        num_kv_heads=None,  # as many as heads
        bias=True,
        norm_position="post",
        init=InitSpec(weights=XavierInit(distribution="normal"), residual="same"),
    )
    return TransformerLM(
        tokens=init_embedding(keys[0], vocab_size, d_model),
        positions=0.02 * jax.random.normal(keys[1], (max_seq_length, d_model)),
        decoder=decoder,
        output_w=init_embedding(keys[3], d_model, vocab_size),
        output_b=jnp.zeros(vocab_size),
    )


def transformer_lm(params: TransformerLM, tokens: Int32[Array, "b t"]) -> Float[Array, "b t v"]:
    """Log-probabilities of the next token at every place."""
    x = transformer_embedding(tokens, table=params.tokens, positions=params.positions)
    mask = causal_mask(tokens.shape[1])
    x = transformer_decoder(x, mask, **sizes, params=params.decoder, norm_position="post")
    return log_probabilities(x, w=params.output_w, b=params.output_b)


@jax.jit
def generate_copy_batch(key: Key[Array, ""]) -> Int32[Array, "b t"]:
    """Random tokens, then the same again. 0 is kept for padding."""
    first = jax.random.randint(key, (batch_size, half), 1, vocab_size)
    return jnp.concatenate([first, first], axis=1)


def copied(params: TransformerLM, sequences: Int32[Array, "b t"]):
    """Log-probabilities and targets over the second half, each token from those before it."""
    log_probs = transformer_lm(params, sequences[:, :-1])
    return log_probs[:, half - 1 :], sequences[:, half:]


def cross_entropy_loss(params: TransformerLM, sequences: Int32[Array, "b t"]) -> Array:
    log_probs, targets = copied(params, sequences)
    return -jnp.mean(jnp.take_along_axis(log_probs, targets[..., None], axis=-1))


@jax.jit
def accuracy(params: TransformerLM, sequences: Int32[Array, "b t"]) -> Array:
    log_probs, targets = copied(params, sequences)
    return jnp.mean(jnp.argmax(log_probs, axis=-1) == targets)


@jax.jit
def train_step(
    params: TransformerLM, sequences: Int32[Array, "b t"], rate: float
) -> tuple[TransformerLM, Array]:
    """One step of stochastic gradient descent."""
    loss, grads = jax.value_and_grad(cross_entropy_loss)(params, sequences)
    return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss


def main() -> float:
    key, model_key = jax.random.split(jax.random.key(42))
    params = init_transformer_lm(model_key)
    for step in range(num_steps):
        sequences = generate_copy_batch(jax.random.fold_in(key, step))
        rate = learning_rate * (1 - step / num_steps)
        params, loss = train_step(params, sequences, rate)
        if step % 100 == 0:
            print(f"step {step:4d}  loss {loss:.4f}")
    test = generate_copy_batch(jax.random.fold_in(key, num_steps))
    share = float(accuracy(params, test))
    print(f"copied right, in sequences never seen: {share:.1%}")
    return share


if __name__ == "__main__":
    main()
