"""Flash attention is the plain path's: values, gradients, on a mesh; and it compiles for a TPU."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.model import flash
from assay.model.attention import attend
from assay.model.sharding import make_mesh, use_mesh
from assay.model.transformer import Transformer, abstract
from assay.spec.model import (
    Alibi,
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    NormalInit,
    Rope,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import ComputeSpec, MeshSpec

ROOT = Path(__file__).parents[2]
B, T, H, K, C = 2, 128, 4, 2, 16
SCALE = 0.3


def arrays(t=T, kv_heads=K, dtype=jnp.float32):
    shapes = [(B, t, H, C), (B, t, kv_heads, C), (B, t, kv_heads, C), (B, t, H, C)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def documents(t=T):
    """Three segments a row, cut at other places in each."""
    cuts = ((20, 90), (61, 100))
    rows = [np.searchsorted(cut, np.arange(t), side="right") for cut in cuts]
    return np.stack(rows).astype(np.int32) + 1


def mask_bias(t, causal, window, segment_ids):
    behind = np.arange(t)[:, None] - np.arange(t)[None]
    seen = behind >= 0 if causal else np.ones_like(behind, bool)
    if window is not None:
        seen = seen & (np.abs(behind) < window)
    seen = np.broadcast_to(seen, (B, t, t))
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return jnp.where(seen, 0.0, -1e30).astype(jnp.float32)[:, None]


CASES = {
    "causal, grouped, window, segments, cap": (T, K, True, 70, True, 5.0),
    "several blocks, causal": (3 * T, 1, True, None, False, None),
    "both ways, window": (T, H, False, 40, False, None),
}


@pytest.mark.parametrize(
    ("t", "kv_heads", "causal", "window", "cut", "softcap"), CASES.values(), ids=CASES.keys()
)
def test_splash_is_the_plain_path(t, kv_heads, causal, window, cut, softcap):
    """Values and all three gradients; the kernel is interpreted here."""
    q, k, v, g = arrays(t, kv_heads)
    segments = documents(t) if cut else None

    def ours(q, k, v):
        return flash.flash_attend(
            *(q, k, v, segments),
            kernel="splash",
            causal=causal,
            window=window,
            scale=SCALE,
            softcap=softcap,
        )

    def plain(q, k, v):
        bias = mask_bias(t, causal, window, segments)
        return attend(q, k, v, bias, scale=SCALE, softcap=softcap)

    def both(f):
        @jax.jit
        def compute(q, k, v):
            y, pullback = jax.vjp(f, q, k, v)
            return y, *pullback(g)

        return compute(q, k, v)

    for a, b in zip(both(ours), both(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "cut"), [(None, False), (9, True)])
def test_cudnns_arguments_mean_the_same(window, cut):
    """Through XLA's implementation of the same function: no GPU is asked for."""
    q, k, v, _ = arrays()
    segments = documents() if cut else None
    settings = {"causal": True, "window": window, "scale": SCALE}
    y = flash.cudnn_attend(q, k, v, segments, implementation="xla", **settings)
    wanted = attend(q, k, v, mask_bias(T, True, window, segments), scale=SCALE)
    np.testing.assert_allclose(y, wanted, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------- in the model


def model(context=T, dropout=0.0, positions=None, heads=H, kv_heads=K) -> TransformerSpec:
    attention = AttentionSpec(
        heads=heads, kv_heads=kv_heads, positions=positions or Rope(), dropout=dropout
    )
    wide = NormalInit(std=0.2)
    spec = TransformerSpec(
        vocab_size=32,
        d_model=heads * 8,
        context=context,
        decoder=StackSpec(
            pattern=(BlockSpec(attention=attention, feed_forward=MlpSpec(hidden=16)),), num_layers=1
        ),
    )
    return spec.replace(init=spec.init.replace(weights=wide, embedding=wide))


def tokens(rows=B, t=T):
    return np.random.default_rng(0).integers(32, size=(rows, t), dtype=np.int32)


def logits_and_gradient(spec, compute, ids, mesh=None, segment_ids=None):
    net = Transformer(spec, compute, rngs=jax.random.key(0))

    @jax.jit
    def run(net, ids):
        def loss(net):
            logits = net(ids, segment_ids=segment_ids)
            return jnp.sum(jnp.sin(logits)), logits

        gradient, logits = jax.grad(loss, has_aux=True)(net)
        return logits, jax.tree.leaves(gradient)

    with use_mesh(mesh):
        return jax.tree.map(np.asarray, run(net, ids))


def uses_the_kernel(spec, ids, compute=None, **options) -> bool:
    net = abstract(spec, compute or ComputeSpec(kernels="flash"))
    program = jax.make_jaxpr(lambda net: net(ids, **options))(net)
    return "pallas_call" in str(program)


def test_a_model_with_flash_attention_is_the_plain_one():
    spec, ids, segments = model(), tokens(), documents()
    wanted = logits_and_gradient(spec, ComputeSpec(kernels="plain"), ids, segment_ids=segments)
    found = logits_and_gradient(spec, ComputeSpec(kernels="flash"), ids, segment_ids=segments)
    assert uses_the_kernel(spec, ids, segment_ids=segments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["heads split", "kv heads whole"])
def test_on_a_mesh(heads):
    """data 2 x tensor 4: each device has its rows and its heads, where these divide."""
    spec, ids = model(heads=heads[0], kv_heads=heads[1]), tokens()
    mesh = make_mesh(MeshSpec(data=2, tensor=4))
    wanted = logits_and_gradient(spec, ComputeSpec(kernels="plain"), ids)
    found = logits_and_gradient(spec, ComputeSpec(kernels="flash"), ids, mesh)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_what_the_kernel_cannot_do_goes_the_plain_way():
    assert uses_the_kernel(model(), tokens())
    assert not uses_the_kernel(model(), tokens(t=100))
    assert not uses_the_kernel(model(positions=Alibi()), tokens())
    dropped = model(dropout=0.1)
    assert uses_the_kernel(dropped, tokens())  # without a key nothing is dropped
    assert not uses_the_kernel(dropped, tokens(), key=jax.random.key(0))
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    assert not uses_the_kernel(model(), tokens(), positions=places)
    assert not uses_the_kernel(model(), tokens(), ComputeSpec(kernels="plain"))


# ---------------------------------------------------------------------------- for a TPU

FOR_A_TPU = """
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from flax import nnx
    from assay.model.loss import token_losses
    from assay.model.sharding import MESH_AXES, parameter_shardings, partition
    from assay.model.transformer import abstract
    from assay.spec.presets import get
    from assay.spec.run import ComputeSpec

    run = get("charformer").run.changed({
        "model.decoder.num_layers": 1,
        "model.d_model": 1024,  # so that heads divide
        "model.decoder.pattern.*.attention.heads": 16,
    })
    topology = topologies.get_topology_desc("v5p:2x2x1", platform="tpu")
    shape = [{"data": 2, "tensor": 2}.get(axis, 1) for axis in MESH_AXES]
    mesh = topologies.make_mesh(topology, shape, MESH_AXES)
    net = abstract(run.model, run.compute.replace(kernels="flash"))
    graph, state = nnx.split(net)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nnx.to_pure_dict(state), parameter_shardings(net, mesh))
    rows = jax.sharding.NamedSharding(mesh, partition(("batch", None)))
    ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=rows)

    def loss(params, ids):
        return jnp.mean(token_losses(nnx.merge(graph, params)(ids), ids))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(params, ids).compile()
    text = compiled.as_text()
    scores = [shape for shape in ("[2,8,1024,1024]", "[2,1024,8,1024]") if shape in text]
    print("kernels:", text.count('custom_call_target="tpu_custom_call"'), "scores:", scores)
"""


def test_it_compiles_for_a_tpu():
    """libtpu compiles charformer's step for four chips that are not here, forward and backward."""
    pytest.importorskip("libtpu", reason="only the tpu extra has it")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOR_A_TPU)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"PYTHONPATH": str(ROOT / "src"), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.split("kernels:")[1].split()
    assert int(found[0]) >= 3  # forward; backward by keys and values, and by queries
    assert found[-1] == "[]"  # no array of all scores is left
