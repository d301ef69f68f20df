"""One update, as a pure function of state and batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32, Key

from assay.model.mup import growth
from assay.model.transformer import Transformer
from assay.spec.model import BlockSpec, TransformerSpec
from assay.spec.run import RunSpec
from assay.train.loss import count_tokens, summed_objective
from assay.train.optimizer import (
    balance_rates,
    balanced,
    global_norm,
    make_optimizer,
    parameter_kinds,
    schedule_factor,
    without_balance,
)

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes. `step` counts completed updates; `key` never changes."""

    params: dict[str, Any]
    optimizer: optax.OptState
    step: Int32[Array, ""]
    key: Key[Array, ""]


Metrics = dict[str, Any]
Step = Callable[[TrainState, Batch, Float32[Array, ""]], tuple[TrainState, Metrics]]


def optimizer_of(run: RunSpec, model: Transformer) -> optax.GradientTransformation:
    """The run's optimizer for a (perhaps abstract) model.

    Under muP gradients fall as the width grows, and so does the epsilon that they are held to.
    """
    spec, mup, grown = run.optimizer, run.model.mup, None
    if mup is not None:
        grown = growth(model)
        spec = spec.replace(epsilon=spec.epsilon * mup.base_width / run.model.d_model)
    return make_optimizer(spec, parameter_kinds(model), run.compute.dtype, grown)


def initial_state(run: RunSpec) -> TrainState:
    """Parameters and optimizer at step 0, from the run's seed alone."""
    init_key, train_key = jax.random.split(jax.random.key(run.seed))
    model = Transformer(run.model, run.compute, rngs=init_key)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = optimizer_of(run, model).init(params)
    if run.compute.offload_optimizer:
        optimizer = moved(optimizer, jax.memory.Space.Host)
    return TrainState(params, optimizer, jnp.int32(0), train_key)


def make_step(run: RunSpec, abstract_model: Transformer) -> Step:
    """The function (state, batch, progress) -> (state, metrics), to be jitted by the caller.

    `progress` is the share of the budget spent before this update. Metrics: loss (nats a
    token), objective (what was minimised), grad_norm (before clipping), lr, tokens; and where
    there are experts those of `loss.routing_metrics`, with a list entry for each layer of them.
    """
    graph = nnx.graphdef(abstract_model)
    kinds, rates = parameter_kinds(abstract_model), balance_rates(abstract_model)
    tx = optimizer_of(run, abstract_model)
    parts = run.train.accumulate
    random, offload = uses_randomness(run.model), run.compute.offload_optimizer

    def gradients(params, batch, key, share):
        """Of sums over the tokens times `share`: scaled here, the gradient needs no pass for it."""

        def objective(params):
            sums = summed_objective(nnx.merge(graph, params), batch, run.train, key)
            return jax.tree.map(lambda x: x * share, sums)

        (total, parts), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, total, parts

    def accumulated(params, batch, key, share):
        """The same sums, a part of the batch at a time."""
        split = {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}

        def one(sums, part):
            index, batch = part
            part_key = None if key is None else jax.random.fold_in(key, index)
            return jax.tree.map(jnp.add, sums, gradients(params, batch, part_key, share)), None

        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(gradients, params, first, key, share)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sums, _ = jax.lax.scan(one, zeros, (jnp.arange(parts), split))
        return sums

    def step(state: TrainState, batch: Batch, progress) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step) if random else None
        compute = gradients if parts == 1 else accumulated
        tokens = count_tokens(batch)
        with_balance, objective, logged = compute(
            state.params, batch, key, 1.0 / jnp.maximum(tokens, 1.0)
        )
        grads = without_balance(with_balance, kinds)
        factor = schedule_factor(run.schedule, state.step, progress)
        statistics = moved(state.optimizer, jax.memory.Space.Device) if offload else state.optimizer
        updates, optimizer = tx.update(grads, statistics, state.params)
        optimizer = moved(optimizer, jax.memory.Space.Host) if offload else optimizer
        params = jax.tree.map(lambda p, u: p + factor * u, state.params, updates)
        params = balanced(params, with_balance, rates)
        metrics = {
            **logged,
            "objective": objective,
            "grad_norm": global_norm(grads),
            "lr": factor * run.optimizer.lr,
            "tokens": tokens,
        }
        return TrainState(params, optimizer, state.step + 1, state.key), metrics

    return step


def moved(optimizer: optax.OptState, space: jax.memory.Space) -> optax.OptState:
    """The optimizer's arrays in the device's memory, or the host's; counts stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, optimizer)


def state_shardings(
    state: TrainState, params: dict, mesh: jax.sharding.Mesh, *, offload: bool = False
) -> TrainState:
    """Placings for a whole (abstract) state, given the parameters': statistics go with them.

    With `offload` the statistics lie in the host's memory.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_path = {
        tuple(part.key for part in path): sharding
        for path, sharding in jax.tree_util.tree_flatten_with_path(params)[0]
    }

    def place(path, leaf):
        _, parameter_path = split_statistic(path)
        place = by_path.get(parameter_path, whole)
        return place.with_memory_kind("pinned_host") if offload and leaf.ndim else place

    return TrainState(
        params, jax.tree_util.tree_map_with_path(place, state.optimizer), whole, whole
    )


def split_statistic(path: tuple) -> tuple[str, tuple]:
    """An optimizer leaf's place, as (which statistic it is, the path of its parameter).

    A parameter's path is the run of dict keys at the end; a count has none.
    """
    last = len(path)
    while last and isinstance(path[last - 1], jax.tree_util.DictKey):
        last -= 1
    return jax.tree_util.keystr(path[:last]), tuple(part.key for part in path[last:])


def uses_randomness(model: TransformerSpec) -> bool:
    """Whether the training forward draws random numbers."""

    def draws(block: BlockSpec) -> bool:
        feed_forward = block.feed_forward
        if block.dropout > 0 or any(part.dropout > 0 for part in block.attentions().values()):
            return True
        if feed_forward is None or feed_forward.kind != "moe":
            return False
        router = feed_forward.router
        return router.kind == "noisy_top_k" or (router.kind == "top_k" and router.jitter > 0)

    embeddings = (model.embedding, model.source_embedding)
    if any(embedding is not None and embedding.drops for embedding in embeddings):
        return True
    return any(draws(block) for _, block in model.layers())
