"""What training minimises: cross-entropy in nats a token, over the tokens that count.

Axes: B batch, T tokens, E experts.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key

from assay.model.layers import CpuKernels, use_cpu_kernels
from assay.model.loss import token_losses
from assay.model.moe import Routing
from assay.model.sharding import batch_shards, on_batch_shards, summed_over_batch
from assay.model.transformer import Transformer, shifted
from assay.spec.model import TransformerSpec
from assay.spec.run import TrainSpec


def summed_objective(
    model: Transformer, batch: dict[str, Array], spec: TrainSpec, key: Key[Array, ""] | None
) -> tuple[Float32[Array, ""], dict[str, Any]]:
    """(objective, what is logged), each summed over the batch's weighted tokens.

    `batch` holds `tokens` and `targets`, int32 (B, T), and where they differ from the default
    `weights` float32 (B, T), `segment_ids` and `positions` int32 (B, T); for an encoder `source`
    int32 (B, S), and `source_mask` bool (B, S), False at padding. The objective adds
    label smoothing (Szegedy et al., arXiv:1512.00567) and the z-loss (PaLM, arXiv:2204.02311);
    and of each layer of experts its balance loss and its router's z-loss, which are means, so
    that they count as much for each token; and `ahead_loss`, where there is multi-token
    prediction. Logged are `loss`, the cross-entropy, that, and `routing_metrics`.
    """
    x, _, routing, ahead = model.before_head(
        batch["tokens"],
        source=batch.get("source"),
        source_mask=batch.get("source_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        key=key,
        train=True,
        ahead=True,
    )
    targets, weights = batch["targets"], batch.get("weights")
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    objective, loss = head_sums(model, spec, x, targets, weights)
    logged = {"loss": loss}
    if ahead:
        logged["ahead_loss"] = ahead_loss(model, ahead, targets, weights, batch.get("segment_ids"))
        objective = objective + model.spec.multi_token.loss * logged["ahead_loss"]
    if routing:
        tokens = count_tokens(batch)
        objective = objective + tokens * auxiliary_loss(model.spec, routing)
        logged |= jax.tree.map(lambda x: tokens * x, routing_metrics(routing))
    return objective, logged


def head_sums(
    model: Transformer,
    spec: TrainSpec,
    x: Float[Array, "b t d"],
    targets: Int32[Array, "b t"],
    weights: Float32[Array, "b t"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """`sums` of what the head makes of x, a chunk at a time where its logits would be large."""
    chunk = chunk_size(model, targets.shape)
    if chunk:
        return in_chunks(model, spec, chunk, x, targets, weights)
    return sums(spec, model.logits(x), targets, weights, use_cpu_kernels(model.compute))


def sums(
    spec: TrainSpec,
    logits: Float32[Array, "*b v"],
    targets: Int32[Array, "*b"],
    weights: Float32[Array, "*b"],
    cpu: CpuKernels = False,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(objective, cross-entropy), each summed over tokens by their weights."""
    smooth = spec.label_smoothing > 0 or spec.z_loss > 0
    # Where more is made of it, XLA's log sum exp, once for both.
    losses = token_losses(logits, targets, False if smooth else cpu)
    objective = losses
    if smooth:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        uniform = log_z - jnp.mean(logits, axis=-1)  # cross-entropy against the uniform
        objective = losses + spec.label_smoothing * (uniform - losses)
        objective = objective + spec.z_loss * jnp.square(log_z)
    return jnp.sum(objective * weights), jnp.sum(losses * weights)


# ---------------------------------------------------------------------------- in chunks

LARGE, CHUNK = 256 * 2**20, 64 * 2**20
"""Bytes of a device's logits from which on they are made in chunks, and of a chunk's."""


def chunk_size(model: Transformer, shape: tuple[int, int]) -> int:
    """Of how many of a device's tokens logits are to stand at a time; 0 where of all."""
    if model.head is None:
        return 0
    if model.compute.loss_chunk is not None:
        return model.compute.loss_chunk
    a_token = 4 * model.spec.padded_vocab
    if math.prod(shape) // batch_shards() * a_token <= LARGE:
        return 0
    return max(128, CHUNK // a_token // 128 * 128)


def in_chunks(
    model: Transformer,
    spec: TrainSpec,
    chunk: int,
    x: Float[Array, "b t d"],
    targets: Int32[Array, "b t"],
    weights: Float32[Array, "b t"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """`sums` of the model's logits, of which never more than a chunk of tokens stands.

    The gradient is made on the way forward, chunk by chunk, while its logits are there: the
    backward pass only scales it. The second result has none.
    """
    graph, head = nnx.split(model.head)
    params, cpu = {"head": head}, use_cpu_kernels(model.compute)
    if model.head.w is None:
        params["table"] = model.embedding.table[...]

    def chunk_sums(params, x, targets, weights):
        logits = nnx.merge(graph, params["head"])(x, params.get("table"))
        return sums(spec, logits[..., : model.spec.vocab_size], targets, weights, cpu)

    return _chunked(chunk_sums, chunk, params, x, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunk_sums, chunk, params, x, targets, weights):
    def one(params, *part):
        return chunk_sums(params, *part), ()

    return _over_chunks(one, chunk, params, x, targets, weights)[0]


def _chunked_forward(chunk_sums, chunk, params, x, targets, weights):
    def one(params, *part):
        both, (dparams, dx) = jax.value_and_grad(chunk_sums, (0, 1), has_aux=True)(params, *part)
        return (both, jax.tree.map(lambda g: g.astype(jnp.float32), dparams)), dx

    (both, dparams), dx = _over_chunks(one, chunk, params, x, targets, weights)
    return both, (dparams, dx, weights)


def _chunked_backward(chunk_sums, chunk, saved, g):
    dparams, dx, weights = saved
    dparams = jax.tree.map(lambda d: d * g[0], dparams)
    return dparams, (dx * g[0]).astype(dx.dtype), None, jnp.zeros_like(weights)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _over_chunks(one, chunk, params, x, targets, weights):
    """(the sum of `one(...)[0]` over chunks and devices, its [1] (1, C, D) as (B, T, D)).

    On a mesh every device goes through the chunks of its own rows, and sums are exchanged once at
    the end.
    """

    def local(params, x, targets, weights):
        n = targets.size
        size = min(chunk, n)
        count = -(-n // size)

        def split(a):
            a = a.reshape(n, *a.shape[2:])
            a = jnp.pad(a, [(0, count * size - n)] + [(0, 0)] * (a.ndim - 1))
            return a.reshape(count, 1, size, *a.shape[1:])

        def body(total, part):
            summed, rest = one(params, *part)
            return jax.tree.map(jnp.add, total, summed), rest

        parts = tuple(map(split, (x, targets, weights)))
        shapes = jax.eval_shape(lambda: one(params, *(a[0] for a in parts))[0])
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        total, rest = jax.lax.scan(body, zeros, parts)
        rest = jax.tree.map(lambda a: a.reshape(count * size, -1)[:n].reshape(x.shape), rest)
        return summed_over_batch(total), rest

    return on_batch_shards(local, whole=1, rows=3)(params, x, targets, weights)


def ahead_loss(
    model: Transformer,
    ahead: tuple[Float[Array, "b t d"], ...],
    targets: Int32[Array, "b t"],
    weights: Float32[Array, "b t"],
    segments: Int32[Array, "b t"] | None,
) -> Float32[Array, ""]:
    """The modules' cross-entropies of tokens further on, each summed, and their mean.

    Module k answers, at each place, with the token k + 1 places on. Nothing is asked beyond the
    row's end, nor of another segment (arXiv:2412.19437, equations 24 and 25).
    """
    total, plain = jnp.float32(0), TrainSpec()
    for k, x in enumerate(ahead, start=1):
        counted = shifted(weights, k)
        if segments is not None:
            counted = counted * (shifted(segments, k) == segments)
        total = total + head_sums(model, plain, x, shifted(targets, k), counted)[0]
    return total / len(ahead)


def auxiliary_loss(spec: TransformerSpec, routing: tuple[Routing, ...]) -> Float32[Array, ""]:
    """What the layers of experts add to the objective, all together."""
    layers = [b.feed_forward for _, b in spec.layers() if b.feed_forward is not None]
    experts = [layer for layer in layers if layer.kind == "moe"]
    total = jnp.float32(0)
    for layer, record in zip(experts, routing, strict=True):
        total = total + layer.balance_loss * record.balance_loss + layer.z_loss * record.z_loss
        total = total + record.steer
    return total


def routing_metrics(routing: tuple[Routing, ...]) -> dict[str, Any]:
    """The auxiliary losses' means over layers; lists of the loads, entropies and drops of each."""
    return {
        "balance_loss": sum(r.balance_loss for r in routing) / len(routing),
        "router_z_loss": sum(r.z_loss for r in routing) / len(routing),
        "expert_load": [r.load for r in routing],
        "router_entropy": [r.entropy for r in routing],
        "dropped_share": [r.dropped for r in routing],
    }


def count_tokens(batch: dict[str, Array]) -> Float32[Array, ""]:
    """The sum of the tokens' weights."""
    weights = batch.get("weights")
    return jnp.float32(batch["targets"].size) if weights is None else jnp.sum(weights)
