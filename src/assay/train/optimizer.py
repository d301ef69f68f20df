"""Optimizers from Optax, told apart by what a parameter is; schedules as one factor.

A parameter is a `matrix` (it maps features to features), a `table` (a row for each token or
position), a `vector` (biases and norm scales), or a `balance` (a router's bias that evens out the
loads of experts). Weight decay falls on matrices and tables; Muon takes matrices only; a balance
is no optimizer's, but moves by steps of one size (`balanced`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32
from optax.contrib import MuonState

from assay.spec.run import MuonSpec, OptimizerSpec, ScheduleSpec


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


def make_optimizer(
    spec: OptimizerSpec, kinds: dict, products: str = "float32"
) -> optax.GradientTransformation:
    """Updates at the spec's full learning rate; the step multiplies them by the schedule.

    `products` is the dtype of Muon's matrix products; all else is float32.
    """
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
            # As optax.contrib.muon, and with its state, but for the products of all at once.
            main = optax.partition(
                {
                    "muon": optax.chain(
                        scale_by_muon(spec, products),
                        optax.identity(),  # Optax's factor by shape has its place here
                        optax.add_decayed_weights(spec.weight_decay),
                        optax.scale_by_learning_rate(spec.lr),
                    ),
                    "adam": optax.adamw(
                        spec.adam_lr,
                        b1=spec.b1,
                        b2=spec.b2,
                        eps=spec.epsilon,
                        weight_decay=0.0,
                        nesterov=spec.nesterov,
                    ),
                },
                jax.tree.map(lambda kind: "muon" if kind == "matrix" else "adam", kinds),
            )
        case "sgd":
            main = optax.chain(
                optax.add_decayed_weights(spec.weight_decay, mask=decayed),
                optax.sgd(spec.lr, momentum=spec.momentum or None),
            )
    if spec.clip is None:
        return main
    return optax.chain(optax.clip_by_global_norm(spec.clip), main)


def scale_by_muon(spec: MuonSpec, products: str) -> optax.GradientTransformation:
    """Optax's, times its factor by shape: momentum, orthogonalised.

    Matrices of one shape go through the iteration together, as one batch: a small model has
    dozens, and each alone is too small to keep a machine busy. On a mesh each stays where it is.
    """

    def update(updates, state: MuonState, params=None):
        del params
        beta, count = spec.momentum, optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(updates, state.mu, beta, 1)
        if spec.nesterov:
            ahead = optax.tree.bias_correction(momentum, beta, optax.safe_increment(count))
            fresh = optax.tree.bias_correction(updates, beta, count)
            steps = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, fresh)
        else:
            steps = optax.tree.bias_correction(momentum, beta, count)
        leaves, structure = jax.tree.flatten(steps)
        leaves = _orthogonal(leaves, state.ns_coeffs, spec, products)
        return jax.tree.unflatten(structure, leaves), MuonState(count, momentum, state.ns_coeffs)

    return optax.GradientTransformation(optax.contrib.scale_by_muon().init, update)


def _orthogonal(
    matrices: list[Float32[Array, "..."]], coefficients: Array, spec: MuonSpec, products: str
) -> list[Float32[Array, "..."]]:
    """Each matrix (..., I, O), orthogonalised, times sqrt(max(1, O / I))."""
    apart = not jax.sharding.get_abstract_mesh().empty
    groups: dict[tuple, list[int]] = {}
    for i, x in enumerate(matrices):
        groups.setdefault((min(x.shape[-2:]), max(x.shape[-2:]), i * apart), []).append(i)
    done: dict[int, Array] = {}
    for (low, high, _), members in groups.items():
        flat = [x.reshape(-1, *x.shape[-2:]) for x in (matrices[i] for i in members)]
        wide = [x if x.shape[1:] == (low, high) else x.swapaxes(1, 2) for x in flat]
        ends = np.cumsum([len(x) for x in wide])[:-1].tolist()
        batch = newton_schulz(jnp.concatenate(wide), coefficients, spec, products)
        for i, x, y in zip(members, flat, jnp.split(batch, ends), strict=True):
            y = y if x.shape[1:] == (low, high) else y.swapaxes(1, 2)
            factor = math.sqrt(max(1.0, x.shape[2] / x.shape[1]))
            done[i] = factor * y.reshape(matrices[i].shape)
    return [done[i] for i in range(len(matrices))]


def newton_schulz(
    x: Float32[Array, "l m n"], coefficients: Float32[Array, "3"], spec: MuonSpec, products: str
) -> Float32[Array, "l m n"]:
    """Each matrix (M <= N) with its singular values near 1: a x + (b A + c A A) x, A = x x^T."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
    x = (x / (norm + spec.epsilon)).astype(products)
    a, b, c = coefficients.astype(products)
    for _ in range(spec.ns_steps):
        gram = jnp.einsum("lmn,lkn->lmk", x, x)
        inner = b * gram + c * jnp.einsum("lmk,lkj->lmj", gram, gram)
        x = a * x + jnp.einsum("lmk,lkn->lmn", inner, x)
    return x.astype(jnp.float32)


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
