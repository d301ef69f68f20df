"""jaxformers' encoder-decoder on plain arrays: it learns to reverse sequences, then generates.

The 2017 wiring (post-norm, ReLU, sinusoidal positions, embeddings scaled by sqrt(d)), with source
padding masked, the decoder causal, and generation that ends at `end_token`.

Run: python examples/jaxformers_seq2seq.py
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, Key

from assay.functional import (
    DecoderParams,
    causal_mask,
    init_embedding,
    init_transformer_decoder,
    log_probabilities,
    padding_mask,
    transformer_decoder,
    transformer_embedding,
)
from assay.spec.model import InitSpec, XavierInit

pad_token, start_token, end_token = 0, 1, 2
src_vocab_size = tgt_vocab_size = 16
max_seq_length = 8
sizes = {"num_layers": 2, "num_heads": 4, "d_model": 64, "d_ff": 128}
batch_size = 64
num_steps = 400


class Transformer(NamedTuple):
    """Every weight of the model."""

    src_table: Float[Array, "v d"]
    tgt_table: Float[Array, "v d"]
    encoder: DecoderParams
    decoder: DecoderParams
    output_w: Float[Array, "d v"]
    output_b: Float[Array, "v"]


def init_transformer(key: Key[Array, ""]) -> Transformer:
    keys = jax.random.split(key, 5)
    d_model = sizes["d_model"]
    stack = partial(
        init_transformer_decoder,
        **sizes,
        num_kv_heads=None,  # as many as heads
        bias=True,
        norm_position="post",
        init=InitSpec(weights=XavierInit(distribution="normal"), residual="same"),
    )
    return Transformer(
        src_table=init_embedding(keys[0], src_vocab_size, d_model),
        tgt_table=init_embedding(keys[1], tgt_vocab_size, d_model),
        encoder=stack(keys[2]),
        decoder=stack(keys[3], cross=True),
        output_w=init_embedding(keys[4], d_model, tgt_vocab_size),
        output_b=jnp.zeros(tgt_vocab_size),
    )


def encode(params: Transformer, src: Int32[Array, "b s"]) -> Float[Array, "b s d"]:
    """An encoder is the same stack with a mask that hides padding only."""
    x = transformer_embedding(src, table=params.src_table)
    mask = padding_mask(src, pad_token)
    return transformer_decoder(x, mask, **sizes, params=params.encoder, norm_position="post")


def decode(
    params: Transformer,
    tgt: Int32[Array, "b t"],
    memory: Float[Array, "b s d"],
    memory_mask: Bool[Array, "b 1 1 s"],
) -> Float[Array, "b t v"]:
    """Log-probabilities of the next target token at every place."""
    x = transformer_decoder(
        transformer_embedding(tgt, table=params.tgt_table),
        causal_mask(tgt.shape[1]),
        **sizes,
        params=params.decoder,
        memory=memory,
        memory_mask=memory_mask,
        norm_position="post",
    )
    return log_probabilities(x, w=params.output_w, b=params.output_b)


def transformer(
    params: Transformer, src: Int32[Array, "b s"], tgt: Int32[Array, "b t"]
) -> Float[Array, "b t v"]:
    return decode(params, tgt, encode(params, src), padding_mask(src, pad_token))


@partial(jax.jit, static_argnames=("max_length", "start_token", "end_token"))
def generate(
    params: Transformer,
    src: Int32[Array, "b s"],
    *,
    max_length: int,
    start_token: int,
    end_token: int,
    temperature: float = 1.0,
    key: Key[Array, ""] | None = None,
) -> Int32[Array, "b t"]:
    """Target tokens after `start_token`, padded after `end_token`; greedy without a key.

    The target has its full length from the beginning, so that all steps are one program; what is
    not yet written lies in the future, which the causal mask hides.
    """
    memory, memory_mask = encode(params, src), padding_mask(src, pad_token)
    tgt = jnp.full((src.shape[0], max_length + 1), pad_token, jnp.int32).at[:, 0].set(start_token)

    def write(i, state):
        tgt, ended = state
        log_probs = decode(params, tgt, memory, memory_mask)[:, i]
        if key is None:
            chosen = jnp.argmax(log_probs, axis=-1)
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, i), log_probs / temperature)
        chosen = jnp.where(ended, pad_token, chosen)
        return tgt.at[:, i + 1].set(chosen), ended | (chosen == end_token)

    ended = jnp.zeros(src.shape[0], bool)
    return jax.lax.fori_loop(0, max_length, write, (tgt, ended))[0][:, 1:]


@jax.jit
def reverse_batch(key: Key[Array, ""]) -> tuple[Int32[Array, "b s"], Int32[Array, "b t"]]:
    """Sources of 3 to 8 tokens, padded; targets are start, the source reversed, end, padding."""
    length_key, token_key = jax.random.split(key)
    lengths = jax.random.randint(length_key, (batch_size, 1), 3, max_seq_length + 1)
    src = jax.random.randint(token_key, (batch_size, max_seq_length), 3, src_vocab_size)
    place = jnp.arange(max_seq_length)[None]
    src = jnp.where(place < lengths, src, pad_token)
    backwards = jnp.take_along_axis(src, jnp.maximum(lengths - 1 - place, 0), axis=1)
    tgt = jnp.full((batch_size, max_seq_length + 2), pad_token).at[:, 0].set(start_token)
    tgt = tgt.at[:, 1:-1].set(jnp.where(place < lengths, backwards, pad_token))
    return src, tgt.at[jnp.arange(batch_size), lengths[:, 0] + 1].set(end_token)


def loss_fn(params: Transformer, src: Array, tgt: Array) -> Array:
    """Mean cross-entropy of the tokens that are not padding, each from those before it."""
    log_probs = transformer(params, src, tgt[:, :-1])
    targets = tgt[:, 1:]
    losses = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(losses, where=targets != pad_token) / jnp.sum(targets != pad_token)


def main() -> float:
    key, model_key = jax.random.split(jax.random.key(42))
    params = init_transformer(model_key)
    optimizer = optax.adam(optax.linear_schedule(3e-3, 0.0, num_steps))
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, key):
        loss, grads = jax.value_and_grad(loss_fn)(params, *reverse_batch(key))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    for step in range(num_steps):
        params, state, loss = train_step(params, state, jax.random.fold_in(key, step))
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss:.4f}")

    src, tgt = reverse_batch(jax.random.fold_in(key, num_steps))
    generated = generate(
        params, src, max_length=tgt.shape[1] - 1, start_token=start_token, end_token=end_token
    )
    print("source   ", src[0].tolist())
    print("generated", generated[0].tolist())
    share = float(jnp.all(generated == tgt[:, 1:], axis=1).mean())
    print(f"whole sequences reversed right, never seen before: {share:.1%}")
    return share


if __name__ == "__main__":
    main()
