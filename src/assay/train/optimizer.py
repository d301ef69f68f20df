"""Optimizers from Optax, told apart by what a parameter is; schedules as one factor.

A parameter is a `matrix` (it maps features to features), a `table` (a row for each token or
position), a `vector` (biases and norm scales), or a `balance` (a router's bias that evens out the
loads of experts). Weight decay falls on matrices and tables; Muon takes matrices only; a balance
is no optimizer's, but moves by steps of one size (`balanced`). Under muP each has its own share
of the rate (`width_factors`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32
from optax.contrib import MuonState

from assay.model.mup import Growth
from assay.model.sharding import kind_of
from assay.spec.run import MuonSpec, OptimizerSpec, ScheduleSpec


def parameter_kinds(model: nnx.Module) -> dict:
    """The kind of each parameter, as a pure dict like the parameters'."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    kinds = {path: kind_of(param.axes) for path, param in flat}
    return nnx.traversals.unflatten_mapping(kinds)


def make_optimizer(
    spec: OptimizerSpec, kinds: dict, products: str = "float32", growth: dict | None = None
) -> optax.GradientTransformation:
    """Updates at the spec's full learning rate; the step multiplies them by the schedule.

    `products` is the dtype of Muon's matrix products; all else is float32. `growth` (of
    `mup.growth`, like the parameters' dict) carries rates over from muP's base width.
    """
    rates = None if growth is None else width_factors(spec, kinds, growth)
    decayed = jax.tree.map(lambda kind: kind in ("matrix", "table"), kinds)
    match spec.kind:
        case "adamw":
            main = optax.chain(  # optax.adamw, but for the rates
                by_width(optax.scale_by_adam(spec.b1, spec.b2, spec.epsilon), rates),
                optax.add_decayed_weights(spec.weight_decay, decayed),
                optax.scale_by_learning_rate(spec.lr),
            )
        case "muon":
            # As optax.contrib.muon, and with its state, but for the products of all at once.
            main = optax.partition(
                {
                    "muon": optax.chain(
                        by_width(scale_by_muon(spec, products), rates),
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
    return optax.chain(clip_by_global_norm(spec.clip), main)


global_norm = jax.jit(optax.tree.norm)
"""The norm of all leaves as one vector; jitted, as a step asks twice and traces it once."""


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Optax's, as one factor on all: a division of each would be a pass over memory of its own."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, limit / global_norm(updates))
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(optax.clip_by_global_norm(limit).init, update)


def width_factors(spec: OptimizerSpec, kinds: dict, growth: dict) -> dict:
    """muP's factor on the rate of each parameter, like the parameters' dict.

    What a step adds to a matrix must change its output by as much at every width, so its largest
    singular value must go as sqrt(fan_out / fan_in) (arXiv:2310.17813). Adam moves each entry by
    the rate, along a direction that the inputs share, so that value is up to the rate times
    sqrt(fan_in fan_out), and the rate must fall as 1 / fan_in (arXiv:2203.03466, table 8). Muon's
    is the rate times sqrt(max(1, fan_out / fan_in)): right already where both widths grow alike,
    and it falls as 1 / sqrt(fan_in) where the outputs do not, as a router's. Tables and vectors,
    and a head whose logits are divided instead, keep their rates.

    Weight decay is left as it is: what a step takes off a weight is the same at every width.
    """

    def factor(kind: str, grown: Growth) -> float:
        if kind != "matrix":
            return 1.0
        if spec.kind == "muon":
            return math.sqrt(grown.fan_out / grown.fan_in)
        return 1.0 / grown.fan_in

    return jax.tree.map(factor, kinds, growth)


def by_width(
    inner: optax.GradientTransformation, factors: dict | None
) -> optax.GradientTransformation:
    """`inner`, each parameter's update times its factor; the state is `inner`'s own."""
    if factors is None:
        return inner

    def update(updates, state, params=None):
        updates, state = inner.update(updates, state, params)
        masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        scaled = jax.tree.map(
            lambda u, factor: u if masked(u) else u * factor, updates, factors, is_leaf=masked
        )
        return scaled, state

    return optax.GradientTransformation(inner.init, update)


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
