"""What training minimises: cross-entropy in nats a token, over the tokens that count.

Axes: B batch, T tokens, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from assay.model.loss import token_losses
from assay.model.moe import Routing
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
    output = model.forward(
        batch["tokens"],
        source=batch.get("source"),
        source_mask=batch.get("source_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        key=key,
        train=True,
    )
    logits, routing = output.logits, output.routing
    losses = token_losses(logits, batch["targets"])
    objective = losses
    if spec.label_smoothing or spec.z_loss:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        uniform = log_z - jnp.mean(logits, axis=-1)  # cross-entropy against the uniform
        objective = losses + spec.label_smoothing * (uniform - losses)
        objective = objective + spec.z_loss * jnp.square(log_z)
    weights = batch.get("weights")
    if weights is not None:
        losses, objective = losses * weights, objective * weights
    objective, logged = jnp.sum(objective), {"loss": jnp.sum(losses)}
    if output.ahead:
        logged["ahead_loss"] = ahead_loss(output.ahead, batch)
        objective = objective + model.spec.multi_token.loss * logged["ahead_loss"]
    if routing:
        tokens = count_tokens(batch)
        objective = objective + tokens * auxiliary_loss(model.spec, routing)
        logged |= jax.tree.map(lambda x: tokens * x, routing_metrics(routing))
    return objective, logged


def ahead_loss(
    ahead: tuple[Float32[Array, "b t v"], ...], batch: dict[str, Array]
) -> Float32[Array, ""]:
    """The modules' cross-entropies of tokens further on, each summed, and their mean.

    Module k answers, at each place, with the token k + 1 places on. Nothing is asked beyond the
    row's end, nor of another segment (arXiv:2412.19437, equations 24 and 25).
    """
    targets, segments = batch["targets"], batch.get("segment_ids")
    weights = batch.get("weights")
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    total = jnp.float32(0)
    for k, logits in enumerate(ahead, start=1):
        counted = shifted(weights, k)
        if segments is not None:
            counted = counted * (shifted(segments, k) == segments)
        total = total + jnp.sum(counted * token_losses(logits, shifted(targets, k)))
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
