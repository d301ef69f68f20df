"""Experts in training: what is minimised, logged and drawn, and biases that no gradient moves."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay import api, loading
from assay.model.transformer import Transformer, abstract, layout, name_leaves, named_parameters
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    CapacitySpec,
    MlpSpec,
    MoeSpec,
    NoisyTopK,
    RmsNorm,
    SigmoidTopK,
    StackSpec,
    TopK,
)
from assay.spec.run import MuonSpec
from assay.train.loss import summed_objective
from assay.train.optimizer import balance_rates, parameter_kinds
from assay.train.plot import plot_experts
from assay.train.step import initial_state, make_step, uses_randomness

MOE = MoeSpec(
    experts=4,
    expert=MlpSpec(hidden=16, bias=True),
    capacity=CapacitySpec(load=1.0),
    balance_loss=0.3,
    z_loss=0.2,
)


@pytest.fixture
def run(run):
    """The run of the other tests, with experts in every second layer."""

    def block(feed_forward):
        return BlockSpec(attention=AttentionSpec(heads=4), feed_forward=feed_forward)

    pattern = (block(MOE), block(MlpSpec(hidden=48)))
    stack = StackSpec(pattern=pattern, num_layers=3, final_norm=RmsNorm())
    return run.replace(model=run.model.replace(decoder=stack))


def with_router(run, router):
    moe = MOE.replace(router=router, balance_loss=0.0, z_loss=0.0, capacity=None)
    return run.at("model.decoder.pattern.0.feed_forward", moe.model_dump())


@pytest.fixture
def batch():
    tokens = jax.random.randint(jax.random.key(7), (8, 16), 0, 257)
    segments = jnp.where(jnp.arange(16)[None] < jnp.arange(9, 17)[:, None], 1, 0)
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "weights": segments.astype(jnp.float32),
        "segment_ids": segments,
    }


def test_the_objective_adds_both_losses(run, batch):
    model = Transformer(run.model, rngs=jax.random.key(0))
    objective, logged = jax.jit(lambda m: summed_objective(m, batch, run.train, None))(model)
    tokens = float(batch["weights"].sum())
    logged = jax.tree.map(lambda x: x / tokens, logged)
    # Two layers of experts; the logged losses are means over them.
    auxiliary = 2 * (0.3 * logged["balance_loss"] + 0.2 * logged["router_z_loss"])
    assert float(objective) / tokens == pytest.approx(float(logged["loss"] + auxiliary), rel=1e-5)
    assert float(logged["balance_loss"]) == pytest.approx(1.0, abs=0.2)  # near to even at first
    assert float(logged["router_z_loss"]) == pytest.approx(math.log(4) ** 2, rel=0.2)
    assert len(logged["expert_load"]) == 2
    for load in logged["expert_load"]:
        assert float(load.sum()) == pytest.approx(1.0, rel=1e-5)


def test_noise_needs_randomness(run):
    assert not uses_randomness(run.model)
    assert uses_randomness(with_router(run, NoisyTopK()).model)
    assert uses_randomness(with_router(run, TopK(jitter=0.1)).model)
    assert not uses_randomness(with_router(run, SigmoidTopK()).model)


def test_kinds_of_experts_parameters(run):
    model = abstract(with_router(run, SigmoidTopK(bias_rate=0.05)).model)
    form = layout(model.spec, model.compute)
    kinds = name_leaves(parameter_kinds(model), form)
    rates = name_leaves(balance_rates(model), form)
    layer = "layers.0.feed_forward"
    assert kinds[f"{layer}.experts.up.0.w"] == "matrix"
    assert kinds[f"{layer}.experts.up.0.b"] == "vector"  # one for each expert, not a matrix
    assert kinds[f"{layer}.router.w"] == "matrix"
    assert kinds[f"{layer}.router.balance"] == "balance"
    assert {name: rate for name, rate in rates.items() if rate} == {
        f"layers.{i}.feed_forward.router.balance": 0.05 for i in (0, 2)
    }


@pytest.mark.parametrize("accumulate", [1, 4])
def test_biases_move_one_step_against_the_load(run, batch, accumulate):
    """No gradient, no decay, no schedule; in parts as in one."""
    spec = with_router(run, SigmoidTopK(k=1, bias_rate=0.05)).replace(optimizer=MuonSpec())
    spec = spec.at("train.accumulate", accumulate)
    step = jax.jit(make_step(spec, abstract(spec.model, spec.compute)))
    state, metrics = step(initial_state(spec), batch, jnp.float32(0.5))
    named = name_leaves(state.params, layout(spec.model, spec.compute))
    for load, i in zip(metrics["expert_load"], (0, 2), strict=True):
        moved = named[f"layers.{i}.feed_forward.router.balance"]
        np.testing.assert_allclose(moved, -0.05 * np.sign(load - 0.25), rtol=1e-6)
        assert np.abs(moved).max() > 0


def test_biases_balance_the_load(run, batch):
    """From a router that sends all to one expert, with no auxiliary loss."""
    spec = with_router(run, SigmoidTopK(k=1, bias_rate=0.02)).at("optimizer.lr", 1e-6)
    step = jax.jit(make_step(spec, abstract(spec.model, spec.compute)))
    state = initial_state(spec)
    balance = state.params["layers"][0]["feed_forward"]["router"]["balance"]
    state.params["layers"][0]["feed_forward"]["router"]["balance"] = balance.at[0].set(0.5)
    largest = []
    for _ in range(40):
        state, metrics = step(state, batch, jnp.float32(0))
        largest.append(float(metrics["expert_load"][0].max()))
    assert largest[0] == pytest.approx(1.0)
    assert np.mean(largest[-5:]) < 0.45


def test_a_run_logs_and_draws_its_experts(run, tmp_path):
    spec = with_router(run, SigmoidTopK(k=2)).at("train.budget.amount", 20)
    spec = spec.at("compute.scan_layers", True)
    out = tmp_path / "run"
    api.train(spec, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert [len(load) for load in last["expert_load"]] == [4, 4]
    assert last["dropped_share"] == [0.0, 0.0]
    assert all(0 < entropy <= math.log(4) + 1e-5 for entropy in last["router_entropy"])
    assert last["objective"] == pytest.approx(last["loss"], rel=1e-6)
    assert (out / "experts.png").is_file()
    loaded = named_parameters(loading.load(out).model)  # the biases come back with the rest
    assert float(jnp.abs(loaded["layers.0.feed_forward.router.balance"]).max()) > 0


def test_no_experts_no_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert plot_experts(tmp_path, title="") is None
