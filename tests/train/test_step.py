import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.model import attention
from assay.model.sharding import make_mesh, parameter_shardings, use_mesh
from assay.model.transformer import abstract, layout, name_leaves
from assay.spec.run import ComputeSpec, MeshSpec, SgdSpec
from assay.train.loss import summed_objective
from assay.train.step import initial_state, make_step, state_shardings, uses_randomness


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(7), 3)
    return {
        "tokens": jax.random.randint(keys[0], (8, 16), 0, 257),
        "targets": jax.random.randint(keys[1], (8, 16), 0, 257),
        "weights": jnp.round(jax.random.uniform(keys[2], (8, 16))),
    }


@pytest.fixture
def plain(run):
    """A run whose update is the gradient itself, large beside the parameters' rounding."""
    sgd = SgdSpec(lr=1000.0)
    run = run.changed({"model.decoder.pattern.*.dropout": 0.0, "schedule": "constant"})
    return run.replace(optimizer=sgd)


def stepped(run, batch):
    step = jax.jit(make_step(run, abstract(run.model, run.compute)))
    return step(initial_state(run), batch, jnp.float32(0))


def assert_close(ours, theirs, rtol):
    for name, leaf in ours.items():
        scale = float(np.abs(theirs[name]).max()) or 1.0
        np.testing.assert_allclose(leaf, theirs[name], atol=rtol * scale, rtol=0, err_msg=name)


def test_accumulated_parts_make_the_whole_batch(plain, batch):
    """With weights that differ from part to part, so that a mean of means would be wrong."""
    whole, metrics = stepped(plain, batch)
    parts, in_parts = stepped(plain.at("train.accumulate", 4), batch)
    form = layout(plain.model, plain.compute)
    assert_close(name_leaves(parts.params, form), name_leaves(whole.params, form), 1e-5)
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(in_parts[name]), rel=1e-5), name


def test_tokens_of_weight_zero_teach_nothing(plain, batch):
    other = dict(batch)
    other["targets"] = jnp.where(batch["weights"] > 0, batch["targets"], 3)
    ours, _ = stepped(plain, batch)
    theirs, _ = stepped(plain, other)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_label_smoothing_is_the_mixture_of_two_cross_entropies(plain, batch):
    state = initial_state(plain)
    model = nnx.merge(nnx.graphdef(abstract(plain.model, plain.compute)), state.params)
    spec = plain.train.replace(label_smoothing=0.1, z_loss=0.01)
    objective, logged = summed_objective(model, batch, spec, None)
    loss = logged["loss"]
    logs = jax.nn.log_softmax(model(batch["tokens"]))
    log_z = jax.nn.logsumexp(model(batch["tokens"]), axis=-1)
    truth = jax.nn.one_hot(batch["targets"], 257) * 0.9 + 0.1 / 257
    expected = -jnp.sum(truth * logs, axis=-1) + 0.01 * log_z**2
    assert float(objective) == pytest.approx(float(jnp.sum(expected * batch["weights"])), rel=1e-5)
    assert float(loss) < float(objective)


def test_the_old_state_is_given_away(plain, batch):
    step = jax.jit(make_step(plain, abstract(plain.model, plain.compute)), donate_argnums=0)
    state = jax.jit(lambda: initial_state(plain))()
    new, _ = step(state, batch, jnp.float32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new.params))


def test_nothing_is_compiled_twice(plain, batch):
    step = jax.jit(make_step(plain, abstract(plain.model, plain.compute)))
    state = jax.jit(lambda: initial_state(plain))()
    for share in (0.0, 0.25, 0.5):
        state, _ = step(state, batch, np.float32(share))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "how",
    [{}, {"scan_layers": True}, {"remat": "block"}, {"scan_layers": True, "remat": "weights"}],
    ids=["unrolled", "scan", "remat", "both"],
)
def test_the_forms_for_a_cpu_change_no_update(plain, batch, monkeypatch, how):
    """Against plain autodiff; queries in two blocks, one of the layers with a window."""
    monkeypatch.setattr(attention, "QUERIES_AT_A_TIME", 8)
    fast = plain.replace(compute=ComputeSpec(kernels="cpu", **how))
    slow = plain.replace(compute=ComputeSpec(kernels="plain"))
    assert_same_change(fast, stepped(fast, batch)[0], slow, stepped(slow, batch)[0])


def test_seeds_side_by_side_are_each_as_alone(plain, batch):
    fast = plain.replace(compute=ComputeSpec(kernels="cpu"))
    runs = [fast.replace(seed=seed) for seed in (3, 4)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(initial_state, runs))
    step = make_step(fast, abstract(fast.model, fast.compute))
    together, _ = jax.jit(jax.vmap(step, (0, None, None)))(states, batch, jnp.float32(0))
    for i, run in enumerate(runs):
        slow = run.replace(compute=ComputeSpec(kernels="plain"))
        state = jax.tree.map(lambda x, i=i: x[i], together)
        assert_same_change(run, state, slow, stepped(slow, batch)[0])


def assert_same_change(run, state, other, expected):
    """Of two runs with the same start, however each keeps its layers."""
    start = name_leaves(initial_state(other).params, layout(other.model, other.compute))
    ours = name_leaves(state.params, layout(run.model, run.compute))
    theirs = name_leaves(expected.params, layout(other.model, other.compute))
    changes = ({name: np.asarray(x[name]) - start[name] for name in start} for x in (ours, theirs))
    assert_close(*changes, 1e-5)


@pytest.mark.parametrize(
    ("mesh", "kernels"),
    [
        (MeshSpec(data=8), "plain"),
        (MeshSpec(fsdp=4), "plain"),
        (MeshSpec(data=2, fsdp=2, tensor=2), "plain"),
        (MeshSpec(data=2, fsdp=2, tensor=2), "cpu"),
    ],
)
def test_a_mesh_changes_no_gradient(plain, batch, mesh, kernels):
    alone, metrics = stepped(plain, batch)
    run = plain.replace(mesh=mesh, compute=ComputeSpec(kernels=kernels))
    model = abstract(run.model, run.compute)
    with use_mesh(make_mesh(mesh)) as devices:
        form = jax.eval_shape(lambda: initial_state(run))
        places = state_shardings(form, parameter_shardings(model, devices), devices)
        state = jax.jit(lambda: initial_state(run), out_shardings=places)()
        step = jax.jit(make_step(run, model), out_shardings=(places, None))
        state, split = step(state, batch, jnp.float32(0))
    assert float(split["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    form = layout(run.model, run.compute)
    start = name_leaves(initial_state(plain).params, form)
    ours, theirs = name_leaves(state.params, form), name_leaves(alone.params, form)
    gradient = {name: np.asarray(leaf) - start[name] for name, leaf in ours.items()}
    expected = {name: np.asarray(leaf) - start[name] for name, leaf in theirs.items()}
    assert_close(gradient, expected, 1e-5)
    table = state.params["embedding"]["table"]
    if mesh.fsdp > 1:
        assert table.sharding.shard_shape(table.shape)[1] == table.shape[1] // mesh.fsdp


def test_dropout_draws_anew_each_step_and_the_same_each_time(run, batch):
    assert uses_randomness(run.model)
    still = run.replace(optimizer=SgdSpec(lr=1e-12))
    step = jax.jit(make_step(still, abstract(still.model, still.compute)))
    first, one = step(initial_state(still), batch, jnp.float32(0))
    _, two = step(first, batch, jnp.float32(0))
    _, again = step(initial_state(still), batch, jnp.float32(0))
    assert float(one["loss"]) == float(again["loss"])
    assert float(one["loss"]) != float(two["loss"])
