"""The whole model: however it is run, it is the same function."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from assay.errors import AssayError
from assay.evaluate.checks import at_random
from assay.model.loss import token_losses
from assay.model.sharding import make_mesh, parameter_shardings, partition, use_mesh
from assay.model.transformer import (
    Transformer,
    abstract,
    from_named_parameters,
    merge_named,
    named_parameters,
)
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNorm,
    LearnedPositions,
    MlpSpec,
    NoPositions,
    RmsNorm,
    Rope,
    SinusoidalPositions,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import ComputeSpec, MeshSpec

B, T = 4, 10


def spec_of(layers=2, **fields) -> TransformerSpec:
    """Two kinds of layers in turn: local attention and an MLP, global attention and a GLU."""
    local = BlockSpec(
        attention=AttentionSpec(heads=4, kv_heads=2, positions=Rope(), window=4, qkv_bias=True),
        feed_forward=MlpSpec(hidden=24, activation="relu_squared", bias=True),
        norm=LayerNorm(),
    )
    whole = BlockSpec(
        attention=AttentionSpec(heads=2),
        feed_forward=MlpSpec(hidden=40, activation="silu", gated=True),
        norm=RmsNorm(),
        norm_position="both",
    )
    defaults = {
        "vocab_size": 29,
        "vocab_multiple": 8,
        "d_model": 16,
        "context": 16,
        "embedding": EmbeddingSpec(positions=LearnedPositions()),
        "decoder": StackSpec(
            pattern=(local, whole)[:layers], num_layers=layers, final_norm=RmsNorm()
        ),
    }
    return TransformerSpec(**{**defaults, **fields})


def model_of(spec, **compute) -> Transformer:
    """Random parameters, the same however the model is run."""
    return at_random(abstract(spec, ComputeSpec(**compute)), 0)


TOKENS = jax.random.randint(jax.random.key(5), (B, T), 0, 29)


@jax.jit
def run(model, tokens, key=None):
    """Logits, and the gradient of their loss, by parameter name."""

    def loss(model):
        logits = model(tokens, key=key)
        return token_losses(logits, jnp.roll(tokens, -1, axis=1)).mean(), logits

    gradient, logits = jax.grad(loss, has_aux=True)(model)
    return logits, named_parameters(gradient)


def assert_same(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        size = max(float(jnp.abs(gradient).max()), 1e-3)
        np.testing.assert_allclose(
            found[1][name], gradient, atol=tolerance * size, rtol=0, err_msg=name
        )


FIVE = spec_of(layers=5)  # two whole periods, and one layer of a third


@pytest.fixture(scope="module")
def plain():
    return run(model_of(FIVE, kernels="plain"), TOKENS)


@pytest.mark.parametrize(
    "compute",
    [
        {"kernels": "cpu"},
        {"scan_layers": True, "kernels": "plain"},
        {"scan_layers": True, "remat": "block", "kernels": "cpu"},
        {"remat": "block", "kernels": "plain"},
    ],
    ids=["cpu", "scan", "scan-remat-cpu", "remat"],
)
def test_however_it_is_run(compute, plain):
    assert_same(run(model_of(FIVE, **compute), TOKENS), plain)


def test_bf16_is_close(plain):
    logits, gradients = run(model_of(FIVE, dtype="bfloat16"), TOKENS)
    assert logits.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((logits - plain[0]) ** 2) / jnp.var(plain[0]))
    assert 1e-4 < error < 0.05
    assert {g.dtype for g in gradients.values()} == {np.dtype("float32")}


def test_dropout():
    """By key alone, the same scanned or not, different in every layer and at every step."""
    block = FIVE.decoder.pattern[1].replace(
        dropout=0.2, attention=AttentionSpec(heads=2, dropout=0.3)
    )
    spec = spec_of(
        decoder=StackSpec(pattern=(block,), num_layers=2),
        embedding=EmbeddingSpec(dropout=0.1),
    )
    model, key = model_of(spec), jax.random.key(7)
    first = run(model, TOKENS, key)
    assert_same(run(model, TOKENS, key), first, 0)
    assert_same(run(model_of(spec, scan_layers=True, remat="block"), TOKENS, key), first)
    assert float(jnp.abs(run(model, TOKENS, jax.random.key(8))[0] - first[0]).max()) > 0.1
    assert float(jnp.abs(run(model, TOKENS)[0] - first[0]).max()) > 0.1


def test_each_layer_drops_its_own():
    """Two layers that only write a constant into the stream: what they drop differs."""
    block = BlockSpec(
        attention=None, feed_forward=MlpSpec(hidden=4, bias=True), norm=RmsNorm(), dropout=0.5
    )
    spec = spec_of(decoder=StackSpec(pattern=(block,), num_layers=2), embedding=EmbeddingSpec())
    named = {k: jnp.zeros_like(v) for k, v in named_parameters(model_of(spec)).items()}
    ones = jnp.ones(16)
    named |= {"layers.0.feed_forward.down.b": ones, "layers.1.feed_forward.down.b": 10 * ones}
    x, _ = from_named_parameters(spec, named).hidden(TOKENS, key=jax.random.key(0))
    values, counts = np.unique(np.asarray(x), return_counts=True)
    assert values.tolist() == [0, 2, 20, 22]  # the same mask in both would give 0 and 22 only
    np.testing.assert_allclose(counts / x.size, 0.25, atol=0.06)


# ---------------------------------------------------------------------------- parameters by name


@pytest.mark.parametrize("scan_layers", [False, True])
def test_names_round_trip(scan_layers):
    model = model_of(FIVE, scan_layers=scan_layers)
    named = named_parameters(model)
    assert named["layers.4.attention.q.w"].shape == (16, 16)
    assert "embedding.table" in named
    assert "final_norm.scale" in named
    other = from_named_parameters(FIVE, named, ComputeSpec(scan_layers=not scan_layers))
    back = named_parameters(other)
    assert back.keys() == named.keys()
    for name, leaf in named.items():
        np.testing.assert_array_equal(back[name], leaf)


def test_parameters_begin_alike_however_it_is_run():
    unrolled, scanned = (
        named_parameters(Transformer(FIVE, ComputeSpec(scan_layers=s), rngs=jax.random.key(1)))
        for s in (False, True)
    )
    for name, leaf in unrolled.items():
        np.testing.assert_array_equal(scanned[name], leaf)
    w = unrolled["layers.0.feed_forward.up.0.w"]
    assert not np.array_equal(w, unrolled["layers.2.feed_forward.up.0.w"])
    rngs = named_parameters(Transformer(FIVE, rngs=nnx.Rngs(0)))
    assert rngs.keys() == unrolled.keys()


def test_wrong_parameters_are_told():
    spec = spec_of()
    named = named_parameters(model_of(spec))
    missing = {k: v for k, v in named.items() if k != "final_norm.scale"}
    with pytest.raises(AssayError, match=r"^final_norm.scale: this parameter is missing\.$"):
        from_named_parameters(spec, missing)
    with pytest.raises(AssayError, match=r"unknown parameter; did you mean 'final_norm\.scale'"):
        from_named_parameters(spec, {**named, "final_norm.scales": jnp.ones(16)})
    with pytest.raises(AssayError, match=r"final_norm.scale: found shape \(3,\).* \(16,\)"):
        from_named_parameters(spec, {**named, "final_norm.scale": jnp.ones(3)})


def test_a_tied_table_has_one_owner():
    """One leaf, whose gradient is the sum of what an untied pair would get."""
    tied, untied = spec_of(), spec_of(head=HeadSpec(tied=False))
    named = named_parameters(model_of(tied))
    assert "head.w" not in named
    leaves = jax.tree.leaves(nnx.state(model_of(tied), nnx.Param))
    assert sum(leaf.shape == (32, 16) for leaf in leaves) == 1
    pair = from_named_parameters(untied, {**named, "head.w": named["embedding.table"].T})
    found, wanted = run(model_of(tied), TOKENS), run(pair, TOKENS)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    both = wanted[1]["embedding.table"] + wanted[1]["head.w"].T
    np.testing.assert_allclose(found[1]["embedding.table"], both, atol=1e-6)
    assert float(jnp.abs(wanted[1]["embedding.table"]).max()) > 1e-3


def test_plain_jit_takes_the_module():
    model, compiled = model_of(spec_of()), []

    @jax.jit
    def forward(model, tokens):
        compiled.append(1)
        return model(tokens)

    first = forward(model, TOKENS)
    named = named_parameters(model)
    changed = merge_named(model, {**named, "final_norm.scale": 2 * named["final_norm.scale"]})
    np.testing.assert_allclose(forward(changed, TOKENS), 2 * first, atol=1e-5)
    assert len(compiled) == 1


# ---------------------------------------------------------------------------- what a forward means


def rope_only(**fields):
    return spec_of(embedding=EmbeddingSpec(positions=NoPositions()), **fields)


@pytest.mark.parametrize(
    "spec",
    [spec_of(), rope_only(), spec_of(embedding=EmbeddingSpec(positions=SinusoidalPositions()))],
    ids=["learned", "rope", "sinusoidal"],
)
def test_packed_documents_see_nothing_of_each_other(spec):
    model = model_of(spec)
    packed = model(
        TOKENS,
        segment_ids=jnp.array([[1] * 4 + [2] * 6] * B),
        positions=jnp.array([[*range(4), *range(6)]] * B),
    )
    apart = jnp.concatenate([model(TOKENS[:, :4]), model(TOKENS[:, 4:])], axis=1)
    np.testing.assert_allclose(packed, apart, atol=2e-5)


def test_padded_rows_give_no_logits():
    model = model_of(spec_of())
    assert named_parameters(model)["embedding.table"].shape == (32, 16)
    assert model(TOKENS).shape == (B, T, 29)


def test_soft_cap_bounds_the_logits():
    capped, free = (
        np.asarray(model_of(spec_of(head=HeadSpec(softcap=cap)))(TOKENS)) for cap in (0.5, None)
    )
    assert np.abs(free).max() > 1
    assert np.abs(capped).max() < 0.5
    np.testing.assert_allclose(capped, 0.5 * np.tanh(free / 0.5), atol=1e-5)


def test_embedding_and_norm_places_by_hand():
    """Post-norm as in 2017: norm(x + f(x)), over sqrt(D)-scaled embeddings with sinusoids."""
    block = BlockSpec(
        attention=None,
        feed_forward=MlpSpec(hidden=8, activation="relu"),
        norm=RmsNorm(),
        norm_position="post",
    )
    spec = spec_of(
        embedding=EmbeddingSpec(positions=SinusoidalPositions(), scale_by_sqrt_width=True),
        decoder=StackSpec(pattern=(block,), num_layers=1),
        head=HeadSpec(tied=False, bias=True),
    )
    model = model_of(spec)
    named = {k: np.asarray(v, np.float64) for k, v in named_parameters(model).items()}
    angles = np.arange(T)[:, None] / 10_000 ** (np.arange(0, 16, 2) / 16)
    sinusoids = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(T, 16)
    x = named["embedding.table"][TOKENS] * math.sqrt(16) + sinusoids
    hidden = np.maximum(x @ named["layers.0.feed_forward.up.0.w"], 0)
    x = x + hidden @ named["layers.0.feed_forward.down.w"]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    x = x * named["layers.0.feed_forward_post_norm.scale"]
    logits = (x @ named["head.w"] + named["head.b"])[..., :29]
    np.testing.assert_allclose(model(TOKENS), logits, atol=2e-5)


def test_no_layers_and_no_head_is_a_table():
    table = TransformerSpec(
        vocab_size=29,
        d_model=29,
        context=8,
        decoder=StackSpec(pattern=(), num_layers=0),
        head=None,
    )
    model = model_of(table)
    np.testing.assert_array_equal(model(TOKENS), model.embedding.table[...][TOKENS])


# ---------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("mesh", "scan_layers"),
    [
        (MeshSpec(data=2, fsdp=2, tensor=2), False),
        (MeshSpec(tensor=2, fsdp=4), True),
        (MeshSpec(data=4), False),
    ],
    ids=["2x2x2", "fsdp4-tensor2-scan", "data4"],
)
def test_any_mesh_computes_the_same(mesh, scan_layers):
    spec = spec_of()
    wanted = run(model_of(spec), TOKENS)
    model = model_of(spec, scan_layers=scan_layers)
    with use_mesh(make_mesh(mesh)) as devices:
        graph, state = nnx.split(model)
        state = nnx.to_pure_dict(state)
        placed = nnx.merge(graph, jax.device_put(state, parameter_shardings(model, devices)))
        tokens = jax.device_put(TOKENS, NamedSharding(devices, partition(("batch", None))))
        found = run(placed, tokens)
        assert len(placed.embedding.table[...].sharding.device_set) == mesh.devices
    assert_same(found, wanted)


def test_parameters_are_really_split():
    mesh = make_mesh(MeshSpec(fsdp=2, tensor=4))
    model = abstract(spec_of(), ComputeSpec(scan_layers=True))
    shardings = parameter_shardings(model, mesh)
    table = shardings["embedding"]["table"]
    assert table.shard_shape((32, 16)) == (8, 8)
    down = shardings["stacked"][0]["feed_forward"]["down"]["w"]
    assert down.shard_shape((1, 24, 16)) == (1, 6, 8)


def test_a_mesh_that_does_not_fit_is_told():
    with pytest.raises(AssayError, match="needs 16 devices; found 8"):
        make_mesh(MeshSpec(data=16))
    mesh = make_mesh(MeshSpec(fsdp=3))
    with pytest.raises(AssayError, match=r"does not divide the 16 of axis 'embed' of embedding"):
        parameter_shardings(abstract(spec_of()), mesh)
