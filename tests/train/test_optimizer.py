from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from assay.model.transformer import Transformer, layout, name_leaves
from assay.spec.run import (
    AdamWSpec,
    ComputeSpec,
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    MuonSpec,
    SgdSpec,
    WsdSchedule,
)
from assay.train.optimizer import make_optimizer, parameter_kinds, schedule_factor


def built(model, **compute):
    module = Transformer(model, ComputeSpec(**compute), rngs=jax.random.key(0))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param)), parameter_kinds(module)


def updates_of(model, spec, **compute):
    """The updates of two steps on made-up gradients, by name."""
    params, kinds = built(model, **compute)
    form = layout(model, ComputeSpec(**compute))
    tx = make_optimizer(spec, kinds)
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: jnp.sin(100 * p) * 0.01, params)
        updates, state = tx.update(grads, state, params)
    return name_leaves(params, form), name_leaves(grads, form), name_leaves(updates, form)


def test_kinds_follow_what_a_parameter_is_for(model):
    _, kinds = built(model.at("embedding.positions", "learned"))
    named = name_leaves(kinds, layout(model, ComputeSpec()))
    assert named["embedding.table"] == named["embedding.positions"] == "table"
    assert named["layers.0.attention.q.w"] == named["layers.2.feed_forward.down.w"] == "matrix"
    assert named["final_norm.scale"] == "vector"


def test_weight_decay_falls_on_matrices_and_tables_only(model):
    decayed = updates_of(model, AdamWSpec(lr=0.1, weight_decay=0.5, clip=None))
    plain = updates_of(model, AdamWSpec(lr=0.1, weight_decay=0.0, clip=None))
    for name, parameter in decayed[0].items():
        by_decay = decayed[2][name] - plain[2][name]
        expected = 0.0 if parameter.ndim < 2 else -0.1 * 0.5 * parameter
        np.testing.assert_allclose(by_decay, np.broadcast_to(expected, by_decay.shape), atol=1e-6)


def test_muon_takes_the_matrices_and_adam_the_rest(model):
    spec = MuonSpec(lr=0.02, adam_lr=0.003, clip=None)
    params, grads, updates = updates_of(model, spec)
    adam = optax.nadam(0.003, b1=spec.b1, b2=spec.b2, eps=spec.epsilon)
    for name, parameter in params.items():
        if "table" in name or parameter.ndim < 2:
            state = adam.init(parameter)
            for _ in range(2):
                expected, state = adam.update(grads[name], state)
            np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-9)
        else:  # near-orthogonal: singular values about lr x the shape's factor
            factor = 0.02 * max(1.0, parameter.shape[1] / parameter.shape[0]) ** 0.5
            values = np.linalg.svd(np.asarray(updates[name]), compute_uv=False) / factor
            assert 0.4 < np.median(values) < 1.4, name
            assert values.max() < 1.4, name


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_optax_own(model, nesterov):
    """Its updates and its state, by structure and by value: checkpoints hold the latter."""
    params, kinds = built(model)
    spec = MuonSpec(clip=None, nesterov=nesterov, weight_decay=0.1)
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    theirs = optax.contrib.muon(
        spec.lr,
        beta=spec.momentum,
        nesterov=nesterov,
        weight_decay=spec.weight_decay,
        adam_learning_rate=spec.adam_lr,
        adam_b1=spec.b1,
        adam_b2=spec.b2,
        muon_weight_dimension_numbers=jax.tree.map(
            lambda kind: matrix if kind == "matrix" else None, kinds
        ),
    )
    results = []
    for tx in (make_optimizer(spec, kinds), theirs):
        state = tx.init(params)
        for _ in range(2):
            grads = jax.tree.map(lambda p: jnp.sin(100 * p) * 0.01, params)
            updates, state = jax.jit(tx.update)(grads, state, params)
        results.append((updates, state))
    (found, ours), (wanted, kept) = results
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, found, wanted)
    paths = [[p for p, _ in jax.tree_util.tree_flatten_with_path(s)[0]] for s in (ours, kept)]
    assert paths[0] == paths[1]
    jax.tree.map(close, jax.tree.leaves(ours), jax.tree.leaves(kept))


@pytest.mark.parametrize("spec", [AdamWSpec(), MuonSpec(), SgdSpec(momentum=0.9)])
def test_stacked_layers_are_updated_as_separate_ones(model, spec):
    _, _, listed = updates_of(model, spec)
    _, _, stacked = updates_of(model, spec, scan_layers=True)
    for name in listed:
        np.testing.assert_allclose(listed[name], stacked[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_clipping_bounds_the_gradient(model):
    params, kinds = built(model)
    huge = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    tx = make_optimizer(SgdSpec(lr=1.0, clip=1.0), kinds)
    updates, _ = tx.update(huge, tx.init(params), params)
    assert optax.tree.norm(updates) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("size", [1e-3, 100.0], ids=["within", "beyond"])
def test_adamw_with_clipping_is_optax_own(model, size):
    params, kinds = built(model)
    spec = AdamWSpec(weight_decay=0.1, clip=1.0)
    tx, decayed = make_optimizer(spec, kinds), jax.tree.map(lambda k: k != "vector", kinds)
    theirs = optax.chain(
        optax.clip_by_global_norm(spec.clip),
        optax.adamw(spec.lr, spec.b1, spec.b2, spec.epsilon, weight_decay=0.1, mask=decayed),
    )
    states = [tx.init(params), theirs.init(params)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for turn in (1, 2):
        grads = jax.tree.map(lambda p, turn=turn: size * jnp.sin(100 * turn * p), params)
        ours, states[0] = tx.update(grads, states[0], params)
        expected, states[1] = theirs.update(grads, states[1], params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), ours, expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ConstantSchedule(), {0: 1, 50: 1, 100: 1}),
        (ConstantSchedule(warmup=10), {0: 0.1, 4: 0.5, 9: 1, 50: 1}),
        (CosineSchedule(warmup=0, floor=0.2), {0: 1, 50: 0.6, 100: 0.2}),
        (LinearSchedule(warmup=0, floor=0.0), {0: 1, 25: 0.75, 100: 0}),
        (WsdSchedule(warmup=0, decay=0.2), {0: 1, 79: 1, 90: 0.5, 100: 0}),
        (InverseSqrtSchedule(warmup=4), {0: 0.25, 3: 1, 15: 0.5, 99: 0.2}),
    ],
)
def test_schedules_follow_their_formulas(spec, expected):
    for step, factor in expected.items():
        found = schedule_factor(spec, jnp.int32(step), jnp.float32(step / 100))
        assert float(found) == pytest.approx(factor, abs=1e-6), step
