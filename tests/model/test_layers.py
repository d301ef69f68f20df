"""Products, activations, norms, dropout and initial values against plain formulas."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.model.layers import (
    ACTIVATIONS,
    Linear,
    Mlp,
    Norm,
    activate,
    dropout,
    glu,
    linears,
    normalise,
    product,
)
from assay.model.sharding import initial_values
from assay.model.transformer import Transformer, abstract, named_parameters
from assay.spec import presets
from assay.spec.model import (
    FanInInit,
    InitSpec,
    LayerNorm,
    MlpSpec,
    NormalInit,
    RmsNorm,
    TruncatedNormalInit,
    XavierInit,
    ZeroInit,
)
from assay.spec.run import ComputeSpec

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def value_and_gradients(function, *arguments):
    """The value, and the gradients of a weighted sum of it."""
    value, pullback = jax.vjp(function, *arguments)
    return value, *pullback(normal(9, *value.shape))


# ---------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)], ids=len)
@pytest.mark.parametrize("transposed", [False, True])
def test_cpu_product_is_the_product(shape, transposed):
    x, w = normal(0, *shape), normal(1, *((4, 5) if transposed else (5, 4)))
    found, wanted = (
        value_and_gradients(lambda x, w: product(x, w, transposed=transposed, cpu=cpu), x, w)  # noqa: B023
        for cpu in (True, False)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    np.testing.assert_allclose(found[0], np.asarray(x) @ (w.T if transposed else w), **CLOSE)


TRANSFORMS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: lambda x, w: jax.vmap(f, in_axes=(0, None))(x, w),
    "scan": lambda f: lambda x, w: jax.lax.scan(lambda c, row: (c, f(row, w)), None, x)[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("transposed", [False, True])
def test_cpu_kernels_under_transforms(transform, transposed):
    x, w = normal(0, 2, 3, 5), normal(1, *((4, 5) if transposed else (5, 4)))

    def layer(x, w, cpu):
        return activate(product(x, w, transposed=transposed, cpu=cpu), "gelu", cpu=cpu)

    found = value_and_gradients(transform(partial(layer, cpu=True)), x, w)
    for a, b in zip(found, value_and_gradients(partial(layer, cpu=False), x, w), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_are_one_product(bias):
    """And give what each gives alone, of plain autodiff, gradients too."""

    def layers(kernels):
        how = {"axes": (None, None), "init": NormalInit(), "compute": ComputeSpec(kernels=kernels)}
        widths = ((0, 6), (1, 2), (2, 2))
        made = [Linear(jax.random.key(i), 5, n, bias=bias, **how) for i, n in widths]
        graph, params = nnx.split(nnx.List(made))
        return graph, jax.tree.map(lambda p: p + 0.1, params)

    def loss(params, x, graph):
        made = linears(x, *nnx.merge(graph, params))
        return sum(jnp.sum(y * normal(i, *y.shape)) for i, y in enumerate(made)), made

    def found(kernels):
        graph, params = layers(kernels)
        gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
        grads, made = gradients(params, normal(0, 2, 64, 5), graph)
        products = str(jax.make_jaxpr(loss, static_argnums=2)(params, normal(0, 2, 64, 5), graph))
        return products.count("dot_general"), jax.tree.leaves((grads, made))

    (one, ours), (three, theirs) = found("cpu"), found("plain")
    assert (one, three) == (1, 3)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpu_activations(activation):
    x = normal(0, 3, 7)
    found, wanted = (
        value_and_gradients(lambda x: activate(x, activation, cpu=cpu), x)  # noqa: B023
        for cpu in (True, False)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_cpu_gated_units(transform, activation):
    gate, up = normal(0, 2, 3, 7), normal(1, 3, 7)

    def units(gate, up, cpu):
        return glu(gate, jnp.broadcast_to(up, gate.shape), activation, cpu=cpu)

    found = value_and_gradients(transform(partial(units, cpu=True)), gate, up)
    for a, b in zip(found, value_and_gradients(partial(units, cpu=False), gate, up), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_cpu_norms(transform, centred, affine):
    x, scale = normal(0, 2, 3, 6), normal(1, 6)

    def norm(x, scale, cpu):
        scale, bias = (scale, 2 * scale) if affine else (None, None)
        return normalise(x, scale, bias, centred=centred, epsilon=1e-5, cpu=cpu)

    found = value_and_gradients(transform(partial(norm, cpu=True)), x, scale)
    for a, b in zip(found, value_and_gradients(partial(norm, cpu=False), x, scale), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_activations_by_their_formulas():
    x = np.linspace(-4, 4, 33)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x])
    wanted = {
        "gelu": x * (1 + erf) / 2,
        "gelu_tanh": x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "silu": x / (1 + np.exp(-x)),
        "relu": np.maximum(x, 0),
        "relu_squared": np.maximum(x, 0) ** 2,
        "sigmoid": 1 / (1 + np.exp(-x)),
    }
    assert wanted.keys() == ACTIVATIONS.keys()
    for name, y in wanted.items():
        np.testing.assert_allclose(activate(jnp.float32(x), name), y, **CLOSE, err_msg=name)


def test_dtypes_are_kept():
    x = normal(0, 2, 4).astype(jnp.bfloat16)
    for cpu in (True, False):
        assert product(x, normal(1, 4, 4), cpu=cpu).dtype == jnp.bfloat16
        assert activate(x, "silu", cpu=cpu).dtype == jnp.bfloat16
        gradient = jax.grad(lambda w: product(x, w, cpu=cpu).sum().astype(jnp.float32))  # noqa: B023
        assert gradient(normal(1, 4, 4)).dtype == jnp.float32


# ---------------------------------------------------------------------------- norms and dropout


@pytest.mark.parametrize("spec", [LayerNorm(), RmsNorm(), RmsNorm(epsilon=0.5)])
def test_norms(spec):
    norm = Norm(6, spec)
    norm.scale[...] = normal(1, 6)
    x = np.asarray(3 + 2 * normal(0, 2, 3, 6), np.float64)
    y = x - x.mean(-1, keepdims=True) if spec.kind == "layernorm" else x
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + spec.epsilon) * np.asarray(norm.scale[...])
    if spec.kind == "layernorm":
        norm.bias[...] = normal(2, 6)
        y = y + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.float32(x)), y, **CLOSE)
    assert norm(jnp.bfloat16(x)).dtype == jnp.bfloat16


def test_norms_of_bf16_are_computed_in_float32():
    x = (100 + normal(0, 3, 256)).astype(jnp.bfloat16)
    for spec in (LayerNorm(), RmsNorm()):
        norm = Norm(256, spec)
        wanted = norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(norm(x).astype(jnp.float32), wanted.astype(jnp.float32))


def test_dropout_keeps_the_mean():
    x = jnp.ones((100, 1000))
    y = dropout(x, 0.3, jax.random.key(0))
    assert float(y.mean()) == pytest.approx(1, abs=0.01)
    assert float((y == 0).mean()) == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_of_whole_rows_and_of_an_odd_width():
    rows = dropout(jnp.ones((5000, 7)), 0.3, jax.random.key(0), whole=True)
    assert set(np.asarray((rows == 0).sum(-1)).tolist()) == {0, 7}
    assert float((rows == 0).mean()) == pytest.approx(0.3, abs=0.02)
    odd = dropout(jnp.ones((5000, 7)), 0.3, jax.random.key(0)) == 0
    for column in odd.T:  # the two halves of a word among them
        assert float(column.mean()) == pytest.approx(0.3, abs=0.02)
    agree = (odd[:, :, None] == odd[:, None]).mean(0) - jnp.eye(7) * (1 - 0.58)
    np.testing.assert_allclose(agree, 0.58, atol=0.03)  # 0.3 ** 2 + 0.7 ** 2: independent


# ---------------------------------------------------------------------------- feed-forward


def mlp(spec, key=0):
    how = {"init": NormalInit(std=0.5), "residual_init": NormalInit(std=0.5)}
    return Mlp(jax.random.key(key), 6, spec, residual_scale=1.0, compute=ComputeSpec(), **how)


def test_mlp_of_several_widths():
    layer, x = mlp(MlpSpec(hidden=(8, 10), activation="relu", bias=True)), normal(0, 2, 3, 6)
    layer.up[1].b[...] = normal(1, 10)
    first, second, down = (np.asarray(part.w[...]) for part in (*layer.up, layer.down))
    y = np.maximum(np.asarray(x) @ first, 0)
    y = np.maximum(y @ second + np.asarray(layer.up[1].b[...]), 0) @ down
    np.testing.assert_allclose(layer(x), y, **CLOSE)


def test_gated_mlp():
    layer, x = mlp(MlpSpec(hidden=8, activation="sigmoid", gated=True)), normal(0, 2, 3, 6)
    gate = 1 / (1 + np.exp(-np.asarray(x) @ layer.gate.w[...]))
    wanted = (gate * (np.asarray(x) @ layer.up[0].w[...])) @ layer.down.w[...]
    np.testing.assert_allclose(layer(x), wanted, **CLOSE)


# ---------------------------------------------------------------------------- initial values


@pytest.mark.parametrize(
    ("init", "std"),
    [
        (NormalInit(std=0.05), 0.05),
        (XavierInit(), math.sqrt(2 / 500)),
        (XavierInit(distribution="normal"), math.sqrt(2 / 500)),
        (FanInInit(gain=math.sqrt(2)), math.sqrt(2 / 200)),
        (FanInInit(distribution="uniform"), math.sqrt(1 / 200)),
    ],
)
def test_initial_spread(init, std):
    w = initial_values(jax.random.key(0), (200, 300), init)
    assert float(w.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(w.mean())) < 0.02 * std
    if getattr(init, "distribution", None) == "uniform":
        assert float(jnp.abs(w).max()) <= std * math.sqrt(3)


def test_truncated_and_zero():
    w = initial_values(jax.random.key(0), (200, 300), TruncatedNormalInit(std=0.1, bound=2.0))
    assert float(jnp.abs(w).max()) <= 0.2
    assert float(w.std()) == pytest.approx(0.1 * 0.8796, rel=0.02)  # of N(0, 1) cut at 2
    assert not initial_values(jax.random.key(0), (3, 4), ZeroInit()).any()


RESIDUAL = ("attention.o.w", "feed_forward.down.w")


def test_residual_scaling_is_exact():
    spec = presets.shrink(presets.get("gpt2").model)  # two layers

    def initial(residual):
        model = Transformer(spec.replace(init=InitSpec(residual=residual)), rngs=jax.random.key(0))
        return named_parameters(model)

    same, scaled, zero = initial("same"), initial("depth_scaled"), initial("zero")
    for name, w in same.items():
        if name.endswith(RESIDUAL):
            np.testing.assert_allclose(scaled[name], w / math.sqrt(2 * 2), rtol=1e-6)
            assert not zero[name].any()
        else:
            np.testing.assert_array_equal(scaled[name], w)
            np.testing.assert_array_equal(zero[name], w)
        if name.endswith((".b", ".bias")):
            assert not w.any()
        if name.endswith(".scale"):
            assert (w == 1).all()


def test_linear_bias_and_float32_parameters():
    layer = Linear(
        jax.random.key(0),
        3,
        4,
        axes=("embed", "mlp"),
        init=NormalInit(),
        bias=True,
        compute=ComputeSpec(dtype="bfloat16"),
    )
    layer.b[...] = jnp.arange(4.0)
    np.testing.assert_allclose(layer(jnp.zeros((2, 3))), [[0, 1, 2, 3]] * 2)
    model = abstract(presets.get("nano").model, ComputeSpec(dtype="bfloat16"))
    assert {leaf.dtype for leaf in named_parameters(model).values()} == {np.dtype("float32")}
