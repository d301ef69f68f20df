"""A shrunk preset trained for some steps on a mesh: its gradients, losses and program."""

from dataclasses import dataclass
from itertools import product

import jax
import numpy as np

from assay.errors import AssayError
from assay.model.sharding import make_mesh, parameter_shardings, partition, use_mesh
from assay.model.transformer import abstract, layout, name_leaves
from assay.spec import presets
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec, ConstantSchedule, DataSpec, MeshSpec, RunSpec, SgdSpec
from assay.train.step import initial_state, make_step, state_shardings

SEQ_LEN = 16


def small(name: str) -> TransformerSpec:
    """The shrunk preset without dropout, each stack one period of its pattern."""
    model = presets.shrink(presets.get(name).model)
    changes = {"embedding.dropout": 0.0}
    if model.source_embedding is not None:
        changes |= {"source_embedding.dropout": 0.0}
    for side in ("decoder", "encoder"):
        if (stack := getattr(model, side)) is not None and stack.num_layers:
            changes |= {f"{side}.num_layers": min(stack.num_layers, len(stack.pattern))}
            changes |= {f"{side}.pattern.*.dropout": 0.0}
    return model.changed(changes)


def wide(name: str) -> TransformerSpec:
    """`small` with twice the heads (one kv head stays one), so that four devices share them."""
    model = small(name)
    if not model.decoder.num_layers:
        return model
    changes = {"d_model": 2 * model.d_model}
    for side in ("decoder", "encoder"):
        stack = getattr(model, side)
        for i, block in enumerate(stack.pattern if stack is not None else ()):
            for part, attention in block.attentions().items():
                at = f"{side}.pattern.{i}.{part}"
                changes[f"{at}.heads"] = 2 * attention.heads
                if attention.kv_heads is not None and attention.num_kv_heads > 1:
                    changes[f"{at}.kv_heads"] = 2 * attention.kv_heads
    return model.changed(changes)


def run_of(model: TransformerSpec, mesh: MeshSpec, **compute) -> RunSpec:
    """Momentum's first statistic is the gradient itself."""
    return RunSpec(
        model=model,
        data=DataSpec(
            seq_len=SEQ_LEN, batch_size=8, packing="pairs" if model.encoder else "stream"
        ),
        optimizer=SgdSpec(lr=0.1, momentum=0.9),
        schedule=ConstantSchedule(),
        compute=ComputeSpec(**compute),
        mesh=mesh,
    )


def legal_meshes(model: TransformerSpec, devices: int = 8) -> list[MeshSpec]:
    """Every mesh of so many devices that the model can lie on."""
    meshes = []
    for data, fsdp, expert, tensor in product((1, 2, 4, 8), repeat=4):
        mesh = MeshSpec(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
        if mesh.devices != devices:
            continue
        try:
            run_of(model, mesh)
        except AssayError:
            continue
        meshes.append(mesh)
    return meshes


@dataclass
class Trained:
    gradients: dict[str, np.ndarray]
    losses: list[float]
    program: jax.stages.Compiled


def batch_of(run: RunSpec) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(1).integers(0, run.model.vocab_size, (8, SEQ_LEN + 1), np.int32)
    batch = {"tokens": drawn[:, :-1], "targets": drawn[:, 1:]}
    if run.model.encoder is not None:
        batch |= {"source": drawn[:, :9], "source_mask": np.ones((8, 9), bool)}
    return batch


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For hundreds of programs: they compile in half the time, partitioned as ever."""


def trained(run: RunSpec, steps: int = 20, options: dict | None = None) -> Trained:
    model, batch, losses = abstract(run.model, run.compute), batch_of(run), []
    form = layout(run.model, run.compute)
    with use_mesh(make_mesh(run.mesh)) as mesh:
        state, update = initial_state(run), jax.jit(make_step(run, model))
        if mesh is not None:
            places = state_shardings(state, parameter_shardings(model, mesh), mesh)
            rows = jax.sharding.NamedSharding(mesh, partition(("batch", None)))
            state, batch = jax.device_put(state, places), jax.device_put(batch, rows)
            update = jax.jit(make_step(run, model), out_shardings=(places, None))
        program = update.lower(state, batch, np.float32(0)).compile(options)
        for step in range(steps):
            state, metrics = program(state, batch, np.float32(0))
            losses.append(float(metrics["loss"]))
            if step == 0:
                gradients = name_leaves(jax.device_get(state.optimizer[1][0].trace), form)
    return Trained(gradients, losses, program)


def assert_same(ours: Trained, alone: Trained) -> tuple[float, float]:
    """Gradients of the first step to 1e-5 of their largest entry; every loss to 1e-4.

    What is zero but for rounding (the bias of keys cancels in the softmax) must be so in both.
    The largest differences of both kinds, relative, are returned.
    """
    largest, worst = max(float(np.abs(g).max()) for g in alone.gradients.values()), 0.0
    for name, gradient in alone.gradients.items():
        scale = float(np.abs(gradient).max())
        if scale < 1e-6 * largest:
            assert np.abs(ours.gradients[name]).max() < 1e-6 * largest, name
            continue
        np.testing.assert_allclose(
            ours.gradients[name], gradient, rtol=0, atol=1e-5 * scale, err_msg=name
        )
        worst = max(worst, float(np.abs(ours.gradients[name] - gradient).max()) / scale)
    np.testing.assert_allclose(ours.losses, alone.losses, rtol=1e-4)
    return worst, float(np.abs(np.array(ours.losses) / np.array(alone.losses) - 1).max())
