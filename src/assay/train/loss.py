"""What training minimises: cross-entropy in nats a token, over the tokens that count."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from assay.model.loss import token_losses
from assay.model.transformer import Transformer
from assay.spec.run import TrainSpec


def summed_objective(
    model: Transformer, batch: dict[str, Array], spec: TrainSpec, key: Key[Array, ""] | None
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(objective, cross-entropy), each summed over the batch's weighted tokens.

    `batch` holds `tokens` and `targets`, int32 (B, T), and where they differ from the default
    `weights` float32 (B, T), `segment_ids` and `positions` int32 (B, T). The objective adds
    label smoothing (Szegedy et al., arXiv:1512.00567) and the z-loss (PaLM, arXiv:2204.02311).
    """
    logits = model(
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        key=key,
    )
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
    return jnp.sum(objective), jnp.sum(losses)


def count_tokens(batch: dict[str, Array]) -> Float32[Array, ""]:
    """The sum of the tokens' weights."""
    weights = batch.get("weights")
    return jnp.float32(batch["targets"].size) if weights is None else jnp.sum(weights)
