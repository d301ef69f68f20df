"""Every legal mesh computes what one device computes, sends what it must, and keeps only its part.

Gradients of the first step agree to 1e-5 (float32), the losses of 20 steps to 1e-4. Here are a
cover of the pairs of axes and the kinds of model; `-m slow` runs every preset on every mesh.
"""

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from assay.errors import AssayError
from assay.model.collectives import collectives, counted
from assay.model.sharding import make_mesh, parameter_shardings, use_mesh
from assay.model.transformer import abstract
from assay.spec import presets
from assay.spec.model import TransformerSpec
from assay.spec.run import MeshSpec
from assay.train.step import initial_state, state_shardings
from tests.mesh.conftest import QUICK, assert_same, legal_meshes, run_of, small, trained, wide

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "collectives.json").read_text())


@cache
def alone(model: TransformerSpec):
    return trained(run_of(model, MeshSpec()))


# Between them: each pair of axes; learned, rotary and no positions; MHA, GQA; tied tables or not;
# experts with a limit, without one and soft; each kind of mesh of one axis.
COVER = [
    ("gpt2", {"data": 8}),
    ("gpt2", {"fsdp": 8}),
    ("gpt2", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("llama-3-8b", {"data": 4, "tensor": 2}),
    ("charformer", {"data": 2, "tensor": 4}),
    ("mixtral-8x7b", {"expert": 8}),
    ("mixtral-8x7b", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("tiny-moe", {"data": 2, "expert": 2, "tensor": 2}),
    ("tiny-moe-3", {"data": 2, "fsdp": 2, "expert": 2}),
]


def mesh_name(mesh: MeshSpec) -> str:
    return "-".join(f"{axis}{ways}" for axis, ways in mesh.model_dump().items() if ways > 1)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [pytest.param(n, MeshSpec(**m), id=f"{n}-{mesh_name(MeshSpec(**m))}") for n, m in COVER],
)
def test_a_mesh_changes_no_gradient_and_no_loss(name, mesh):
    model = wide(name) if mesh.tensor > 2 else small(name)
    ours = trained(run_of(model, mesh))
    assert_same(ours, alone(model))
    # ---- what it sends
    program = ours.program.as_text()
    assert counted(program) == GOLDEN[f"{name} {mesh_name(mesh)}"]
    sizes = [4 * gradient.size for gradient in ours.gradients.values()]
    batch = 4 * 8 * 16 * max(model.d_model, model.padded_vocab)
    gathered = [c.bytes for c in collectives(program) if c.kind == "all-gather"]
    assert max(gathered, default=0) <= max(*sizes, batch)  # a parameter at a time, or a batch
    if mesh.fsdp == mesh.tensor == mesh.expert == 1:
        assert not gathered
    if mesh.expert > 1:
        assert any(c.kind == "all-to-all" for c in collectives(program))


@cache
def on_mesh(model: TransformerSpec, mesh: MeshSpec) -> tuple[float, float]:
    """How far gradient and losses are from one device's; presets that shrink alike are one."""
    return assert_same(trained(run_of(model, mesh), options=QUICK), on_one_device(model))


@cache
def on_one_device(model: TransformerSpec):
    return trained(run_of(model, MeshSpec()), options=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_trains_on_every_legal_mesh(name):
    """Prints a row for each mesh (pytest -s); the worst are in docs/distributed.md."""
    model = wide(name)
    meshes = legal_meshes(model)
    assert meshes
    for mesh in meshes:
        gradient, loss = on_mesh(model, mesh)
        print(f"\n| {name} | {mesh_name(mesh)} | {gradient:.1e} | {loss:.1e} |", flush=True)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameters_are_made_in_their_places(scan_layers):
    """The program that makes them sends nothing, and no device ever has room for the whole."""
    run = run_of(
        small("llama-3-8b").changed({"d_model": 256, "decoder.num_layers": 2}),
        MeshSpec(fsdp=4, tensor=2),
        scan_layers=scan_layers,
    )
    with use_mesh(make_mesh(run.mesh)) as mesh:
        shapes = jax.eval_shape(lambda: initial_state(run))
        places = state_shardings(
            shapes, parameter_shardings(abstract(run.model, run.compute), mesh), mesh
        )
        program = jax.jit(lambda: initial_state(run), out_shardings=places).lower().compile()
        state = program()
    assert not collectives(program.as_text())
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.params))
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 0.6 * whole
    matrices = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size > 4096]
    assert matrices
    for leaf in matrices:
        parts = {tuple(map(str, shard.index)) for shard in leaf.addressable_shards}
        assert len(parts) == 8
        assert all(shard.data.size == leaf.size // 8 for shard in leaf.addressable_shards)
    # One device makes the same, but for rounding.
    for ours, theirs in zip(*map(jax.tree.leaves, (state, initial_state(run))), strict=True):
        if not jax.dtypes.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "mesh", "says"),
    [
        ("gpt2", {"tensor": 8}, r"tensor=8 does not divide model.*attention.heads \(12\)"),
        ("llama-3-8b", {"tensor": 16}, r"tensor=16 does not divide .*attention.kv_heads \(8\)"),
        ("mqa", {"tensor": 2}, r"tensor=2 does not divide .*attention.kv_heads \(1\)"),
        ("bigram", {"fsdp": 3}, r"fsdp=3 does not divide model.d_model"),
        ("mixtral-8x7b", {"expert": 3}, r"expert=3 does not divide .*feed_forward.experts \(8\)"),
        ("gpt2", {"expert": 2}, "expert=2, but the model has no experts"),
        ("gpt2", {"data": 5}, r"data x fsdp x expert is 5, which must divide"),
        ("gpt2", {"data": 0}, "mesh.data"),
    ],
)
def test_an_illegal_mesh_is_named_with_what_does_not_divide(name, mesh, says):
    with pytest.raises(AssayError, match=says):
        presets.get(name).run.changed({"data.batch_size": 12, "mesh": mesh})


def test_hidden_features_that_do_not_divide_are_named():
    run = presets.get("gpt2").run.at("model.decoder.pattern.0.feed_forward.hidden", 1001)
    with pytest.raises(AssayError, match=r"tensor=2 does not divide .*feed_forward.hidden \(1001"):
        run.at("mesh", {"tensor": 2})


def test_a_vocabulary_and_heads_that_do_not_divide_are_legal():
    """The table is whole along `tensor`; 15 heads on 4 devices are 4, 4, 4 and 3."""
    model = small("gpt2").changed(
        {
            "vocab_size": 61,
            "vocab_multiple": 1,
            "d_model": 60,
            "decoder.pattern.*.attention.heads": 15,
            "decoder.pattern.*.attention.kv_heads": None,
        }
    )
    ours = trained(run_of(model, MeshSpec(data=2, tensor=4)))
    assert_same(ours, trained(run_of(model, MeshSpec())))
