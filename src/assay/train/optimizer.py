"""Optimizers from Optax, told apart by what a parameter is; schedules as one factor.

A parameter is a `matrix` (it maps features to features), a `table` (a row for each token or
position), a `vector` (biases and norm scales), or a `balance` (a router's bias that evens out the
loads of experts). Weight decay falls on matrices and tables; Muon takes matrices only; a balance
is no optimizer's, but moves by steps of one size (`balanced`).
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32
from optax.contrib import MuonDimensionNumbers

from assay.spec.run import OptimizerSpec, ScheduleSpec


def parameter_kinds(model: nnx.Module) -> dict:
    """The kind of each parameter, as a pure dict like the parameters'."""

    def kind(axes) -> str:
        if axes == ("balance",):
            return "balance"
        if axes[0] == "expert":  # a batch of parameters, one an expert
            axes = axes[1:]
        if len(axes) < 2:
            return "vector"
        return "table" if "vocab" in axes or axes[0] is None else "matrix"

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    kinds = {path: kind(param.axes) for path, param in flat}
    return nnx.traversals.unflatten_mapping(kinds)


def make_optimizer(spec: OptimizerSpec, kinds: dict) -> optax.GradientTransformation:
    """Updates at the spec's full learning rate; the step multiplies them by the schedule."""
    decayed = jax.tree.map(lambda kind: kind in ("matrix", "table"), kinds)
    match spec.kind:
        case "adamw":
            main = optax.adamw(
                spec.lr,
                b1=spec.b1,
                b2=spec.b2,
                eps=spec.epsilon,
                weight_decay=spec.weight_decay,
                mask=decayed,
            )
        case "muon":
            # A stack of layers is a batch of matrices, so the axes are counted from the end.
            matrix = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
            main = optax.contrib.muon(
                spec.lr,
                ns_steps=spec.ns_steps,
                beta=spec.momentum,
                nesterov=spec.nesterov,
                weight_decay=spec.weight_decay,
                adam_learning_rate=spec.adam_lr,
                adam_b1=spec.b1,
                adam_b2=spec.b2,
                eps=spec.epsilon,
                muon_weight_dimension_numbers=jax.tree.map(
                    lambda kind: matrix if kind == "matrix" else None, kinds
                ),
            )
        case "sgd":
            main = optax.chain(
                optax.add_decayed_weights(spec.weight_decay, mask=decayed),
                optax.sgd(spec.lr, momentum=spec.momentum or None),
            )
    if spec.clip is None:
        return main
    return optax.chain(optax.clip_by_global_norm(spec.clip), main)


def balance_rates(model: nnx.Module) -> dict:
    """The step of each balancing bias, 0 for every other parameter, like the parameters' dict."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    rates = {path: param.get_metadata().get("rate", 0.0) for path, param in flat}
    return nnx.traversals.unflatten_mapping(rates)


def without_balance(grads: dict, kinds: dict) -> dict:
    """The gradients, 0 where they are none: for a balancing bias it is the experts' excess load.

    It must count neither in the gradient's norm nor in the optimizer's statistics.
    """
    return jax.tree.map(lambda g, kind: jnp.zeros_like(g) if kind == "balance" else g, grads, kinds)


def balanced(params: dict, excess: dict, rates: dict) -> dict:
    """Balancing biases moved one step against their expert's excess load; the rest as it is.

    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2). No schedule: the step has one size.
    """
    return jax.tree.map(
        lambda p, e, rate: p - rate * jnp.sign(e) if rate else p, params, excess, rates
    )


def schedule_factor(
    spec: ScheduleSpec, step: Int32[Array, ""], progress: Float32[Array, ""]
) -> Float32[Array, ""]:
    """The factor on the learning rate of the update that follows `step` completed ones.

    `progress` is the share of the budget spent, 0 to 1. Warm-up rises from 1/warmup to 1.
    """
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(spec.warmup, 1))
    match spec.kind:
        case "constant":
            factor = 1.0
        case "cosine":
            factor = spec.floor + (1 - spec.floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        case "linear":
            factor = 1 - (1 - spec.floor) * progress
        case "wsd":
            left = jnp.clip((1 - progress) / spec.decay, 0.0, 1.0)
            factor = spec.floor + (1 - spec.floor) * left
        case "inverse_sqrt":
            factor = jnp.sqrt(spec.warmup / jnp.maximum(step + 1, spec.warmup))
    return warm * factor
