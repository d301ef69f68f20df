"""What keeps memory and compilation small computes the same, and keeps them small."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.model.sharding import make_mesh, parameter_shardings, partition, use_mesh
from assay.model.transformer import Transformer, abstract
from assay.spec.model import HeadSpec
from assay.spec.run import ComputeSpec, MeshSpec
from assay.train.loop import read_run, train
from assay.train.loss import chunk_size, summed_objective
from assay.train.step import initial_state, make_step, state_shardings
from tests.train.conftest import lines

# ---------------------------------------------------------------------------- logits in chunks


def objective_and_gradient(run, batch, chunk: int, mesh: MeshSpec | None = None):
    compute = run.compute.replace(loss_chunk=chunk)
    model = Transformer(run.model, compute, rngs=jax.random.key(1))
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    def objective(params, batch):
        return summed_objective(nnx.merge(graph, params), batch, run.train, None)

    with use_mesh(make_mesh(mesh or MeshSpec())) as devices:
        if devices is not None:
            params = jax.device_put(params, parameter_shardings(model, devices))
            rows = jax.sharding.NamedSharding(devices, partition(("batch", None)))
            batch = jax.device_put(batch, rows)
        (total, logged), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch)
    return jax.device_get((total, logged["loss"], grads))


def batch_of(vocabulary: int, shape=(8, 16)) -> dict:
    drawn = np.random.default_rng(2)
    tokens = drawn.integers(0, vocabulary, (shape[0], shape[1] + 1), np.int32)
    weights = drawn.integers(0, 3, shape).astype(np.float32) / 2
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@pytest.mark.parametrize(
    ("tied", "mesh"),
    [
        (True, None),
        (False, None),
        (False, MeshSpec(data=2, fsdp=2, tensor=2)),
        (True, MeshSpec(data=2, tensor=4)),
    ],
    ids=["tied", "own", "own-2x2x2", "tied-data2-tensor4"],
)
def test_logits_in_chunks_give_the_same_loss_and_gradient(run, tied, mesh):
    """5 tokens at a time, which divides neither a row nor a device's part; all terms of it."""
    head = HeadSpec(tied=tied, bias=not tied, softcap=8.0)
    first = run.model.decoder.pattern[0].changed({"attention.kv_heads": 4})
    stack = run.model.decoder.replace(pattern=(first,), num_layers=1)
    run = run.replace(model=run.model.replace(decoder=stack))
    run = run.changed({"train.z_loss": 0.01, "train.label_smoothing": 0.1})
    run = run.replace(model=run.model.replace(head=head))
    whole = objective_and_gradient(run, batch_of(257), 0)
    parts = objective_and_gradient(run, batch_of(257), 5, mesh)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6)
    close = 1e-6 if mesh is None else 1e-5
    for ours, theirs in zip(jax.tree.leaves(parts[2]), jax.tree.leaves(whole[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=close * np.abs(theirs).max())


def program(run, batch_size: int, seq_len: int):
    """The compiled update, of which nothing is run."""
    state = jax.eval_shape(lambda: initial_state(run))
    ids = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    step = jax.jit(make_step(run, abstract(run.model, run.compute)), donate_argnums=0)
    batch = {"tokens": ids, "targets": ids}
    return step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)).compile()


def temporary(run, batch_size=8, seq_len=256) -> int:
    return program(run, batch_size, seq_len).memory_analysis().temp_size_in_bytes


def test_the_logits_never_stand_whole(run):
    """2,048 tokens by 8,192 in float32 are 64 MiB; in chunks of 128 they are 4."""
    run = run.changed(
        {"model.vocab_size": 8192, "model.decoder.num_layers": 0, "model.decoder.pattern": []}
    )
    logits = 4 * 2048 * 8192
    whole = temporary(run.at("compute.loss_chunk", 0))
    parts = temporary(run.at("compute.loss_chunk", 128))
    assert whole > logits
    assert parts < logits / 2


def test_chunks_are_made_where_logits_are_large(run):
    model = abstract(run.model.replace(vocab_size=32_000), run.compute)
    assert chunk_size(model, (8, 256)) == 0  # 250 MiB
    assert chunk_size(model, (64, 1024)) == 512  # 62.5 MiB of 7.8 GiB
    with use_mesh(make_mesh(MeshSpec(data=8))):
        assert chunk_size(model, (16, 1024)) == 0
    never = abstract(run.model.replace(vocab_size=32_000), ComputeSpec(loss_chunk=0))
    assert chunk_size(never, (64, 1024)) == 0


# ---------------------------------------------------------------------------- recomputing


def test_remat_trades_memory_and_changes_nothing(run):
    stack = run.model.decoder.replace(pattern=run.model.decoder.pattern[:1], num_layers=4)
    run = run.replace(
        model=run.model.replace(decoder=stack),
        compute=ComputeSpec(kernels="plain", scan_layers=True),
    )
    batch = batch_of(257)
    memory, gradients = {}, {}
    for remat in ("none", "dots", "weights", "offload", "block"):
        policy = run.at("compute.remat", remat)
        memory[remat] = temporary(policy, seq_len=128)  # offloaded to itself: a CPU's is the host's
        gradients[remat] = objective_and_gradient(policy, batch, 0)[2]
    assert memory["block"] < memory["weights"] < memory["dots"] < memory["none"]
    for remat, gradient in gradients.items():
        (
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()),
                gradient,
                gradients["none"],
            ),
            remat,
        )


@pytest.mark.parametrize("devices", [1, 2])
def test_an_offloaded_optimizer_takes_the_same_steps(run, tmp_path, devices):
    """Its statistics lie in the host's memory between steps."""
    run = run.changed({"train.budget.amount": 6, "train.log_every": 1, "mesh": {"fsdp": devices}})
    train(run, tmp_path / "device")
    host = run.at("compute.offload_optimizer", True)
    train(host, tmp_path / "host", stop_at=3)
    train(read_run(tmp_path / "host"), tmp_path / "host", resume=True)
    on_host, on_device = lines(tmp_path / "host"), lines(tmp_path / "device")
    if devices > 1:
        assert on_host == on_device
    for here, there in zip(on_host, on_device, strict=True):  # other kernels where there is no mesh
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
    with use_mesh(make_mesh(run.mesh, of_one=True)) as mesh:
        state = jax.eval_shape(lambda: initial_state(host))
        params = parameter_shardings(abstract(run.model, run.compute), mesh)
        places = state_shardings(state, params, mesh, offload=True)
    statistics = jax.tree.leaves(state.optimizer)
    for place, leaf in zip(jax.tree.leaves(places.optimizer), statistics, strict=True):
        assert place.memory_kind == ("pinned_host" if leaf.ndim else "device")


# ---------------------------------------------------------------------------- many layers


def test_eighty_layers_compile_as_fast_as_two(run):
    """CPU time of tracing and compiling, with nothing from the cache."""
    run = run.changed({"model.decoder.pattern": [run.model.decoder.pattern[0].model_dump()]})
    run = run.at("compute.scan_layers", True)

    def seconds(layers: int) -> float:
        began = time.process_time()
        program(run.at("model.decoder.num_layers", layers), 2, 16)
        return time.process_time() - began

    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        seconds(2)  # what is done once
        turns = [(seconds(2), seconds(80)) for _ in range(4)]  # the least: others compute too
        two, eighty = map(min, zip(*turns, strict=True))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    assert eighty < 1.5 * two
