"""What is computed in C++ against plain autodiff: values, gradients, and transforms."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from assay.model import blas
from assay.model.attention import attend, hide
from assay.model.layers import (
    activate,
    glu,
    glu_of,
    normalise,
    product,
    use_cpu_kernels,
)
from assay.model.loss import token_losses
from assay.model.transformer import abstract
from assay.spec.presets import PRESETS
from assay.spec.run import ComputeSpec
from assay.train.step import initial_state, make_step

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TRANSFORMS = {
    "jit": lambda f: jax.jit(f),
    "remat": lambda f: jax.jit(jax.checkpoint(f)),
    "vmap": lambda f: lambda *x: jax.vmap(f)(*(jnp.stack([y, y + 0.1]) for y in x)),
    "scan": lambda f: lambda *x: jax.lax.scan(lambda c, _: (c, f(*x)), None, None, length=2)[1],
}


@pytest.fixture(autouse=True)
def compiled():
    there, why = blas.build()
    assert there, why  # a compiler is what the tests' machine has


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def with_gradients(f, *x):
    value, pullback = jax.vjp(f, *x)
    return value, *pullback(normal(9, *value.shape, dtype=value.dtype))


def assert_same(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (a, b)), **tolerance)


def names(f, *x):
    return [t for t in str(jax.make_jaxpr(f)(*x)).split() if "assay_" in t]


# ---------------------------------------------------------------------------- products


# The last is large enough to be cut among threads, at a side that does not divide.
@pytest.mark.parametrize(
    "shape", [(5, 7, 3), (1, 16, 1), (33, 20, 70), (70, 20, 33), (205, 96, 131)]
)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul(shape, turned, dtype):
    m, k, n = shape
    ta, tb = turned
    a, b = normal(0, m, k, dtype=dtype), normal(1, k, n, dtype=dtype)
    wanted = jnp.dot(a, b, preferred_element_type=jnp.float32).astype(dtype)
    found = blas.matmul(a.T if ta else a, b.T if tb else b, ta=ta, tb=tb)
    close = CLOSE if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 1e-5}
    assert_same([found], [wanted], **close)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("transposed", [False, True])
def test_product(transform, transposed):
    x, w = normal(0, 2, 3, 5), normal(1, *((4, 5) if transposed else (5, 4)))
    layer = partial(product, transposed=transposed)
    assert names(partial(layer, cpu="blas"), x, w)
    found = with_gradients(transform(partial(layer, cpu="blas")), x, w)
    assert_same(found, with_gradients(transform(layer), x, w), **CLOSE)


# A group with no row, one of several pieces, rows behind the last.
GROUPS = [[3, 0, 4], [0, 1300, 5], [0, 0, 0]]


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grouped(sizes, dtype):
    x = normal(0, sum(sizes) + 2, 20, dtype=dtype)
    w, sizes = normal(1, 3, 20, 7, dtype=dtype), jnp.array(sizes)
    found = with_gradients(lambda x, w: blas.grouped(x, w, sizes), x, w)
    wide = (y.astype(jnp.float32) for y in (x, w))
    value, pullback = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), *wide)
    wanted = value, *pullback(normal(9, *value.shape, dtype=dtype).astype(jnp.float32))
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 1e-5}
    assert_same(found, [y.astype(dtype) for y in wanted], **close)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_grouped_under_transforms(transform):
    sizes, owner = jnp.array([2, 6, 1]), jnp.array([0] * 2 + [1] * 6 + [2])

    def one_by_one(x, w):
        return jnp.einsum("mk,mkn->mn", x, w[owner])

    def ours(x, w):
        return blas.grouped(x, w, sizes)

    arrays = normal(0, 9, 5), normal(1, 3, 5, 4)
    found, wanted = (with_gradients(transform(f), *arrays) for f in (ours, one_by_one))
    assert_same(found, wanted, **CLOSE)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_a_blas_for_each_vendor(vendor):
    """Each in a process of its own; whichever it is, PyTorch keeps its threads."""
    code = f"""
from assay.model import compiled
compiled.processor_is = {vendor!r}.__eq__
from assay.model import blas
print(blas.build())
import jax.numpy as jnp, numpy as np, torch
a, b = (np.random.default_rng(i).normal(size=(64, 64)).astype(np.float32) for i in range(2))
np.testing.assert_allclose(blas.matmul(jnp.asarray(a), jnp.asarray(b)), a @ b, rtol=1e-4, atol=1e-4)
assert torch.get_num_threads() == {torch.get_num_threads()}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra = any((Path(sys.prefix) / "lib").glob("libmkl_core.so.*"))
    mkl = vendor == "GenuineIntel" and extra
    assert ("Intel's MKL" if mkl else "SciPy's OpenBLAS") in done.stdout


def test_bfloat16_is_multiplied_where_that_is_not_slower(monkeypatch):
    def fast(vendor, *features):
        blas.multiplies.cache_clear()
        monkeypatch.setattr(blas, "processor_is", vendor.__eq__)
        monkeypatch.setattr(blas, "processor_features", lambda: list(features))
        return not blas.multiplies(jnp.bfloat16)

    assert not fast("GenuineIntel", "avx512_bf16")
    assert fast("GenuineIntel", "avx512_bf16", "amx_bf16")
    assert fast("AuthenticAMD", "avx512_bf16")
    assert not fast("AuthenticAMD")
    assert blas.multiplies(jnp.float32)
    assert not blas.multiplies(jnp.float16)
    blas.multiplies.cache_clear()


# ---------------------------------------------------------------------------- attention


def places(t, window=None):
    seen = np.tril(np.ones((t, t), bool))
    return seen if window is None else seen & ~np.tril(np.ones((t, t), bool), -window)


# queries, heads, kv heads, width, window; 300 takes three blocks of queries.
SHAPES = [(7, 3, 3, 5, None), (300, 2, 1, 16, None), (200, 2, 2, 8, 50), (64, 4, 2, 32, None)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention(shape, dtype):
    t, h, g, c, window = shape
    q, k, v = (normal(i, 2, t, n, c, dtype=dtype) for i, n in enumerate((h, g, g)))
    bias = hide(jnp.asarray(places(t, window)))
    how = {"bias": bias, "scale": c**-0.5, "causal": True, "window": window}
    assert names(partial(attend, **how, cpu="blas"), q, k, v)
    found = with_gradients(jax.jit(partial(attend, **how, cpu="blas")), q, k, v)
    value, pullback = jax.vjp(
        jax.jit(partial(attend, **how)), *(x.astype(jnp.float32) for x in (q, k, v))
    )
    wanted = value, *pullback(normal(9, *value.shape, dtype=dtype).astype(jnp.float32))
    close = CLOSE if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 0.01}
    assert_same(found, [x.astype(dtype) for x in wanted], **close)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_attention_under_transforms(transform):
    q, k, v = (normal(i, 2, 9, n, 4) for i, n in enumerate((4, 2, 2)))
    how = {"bias": hide(jnp.asarray(places(9))), "scale": 0.5, "causal": True}
    found = with_gradients(transform(partial(attend, **how, cpu="blas")), q, k, v)
    assert_same(found, with_gradients(transform(partial(attend, **how)), q, k, v), **CLOSE)


def test_masks_of_each_row_and_of_a_source():
    """Segments differ by row; a source's mask is the same for all queries; rows may see nothing."""
    q, k, v = (normal(i, 2, 6, 2, 4) for i in range(3))
    segments = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    own = places(6) & (segments[:, :, None] == segments[:, None])
    own[1, 3] = False
    source = np.array([[[[1, 1, 0, 1, 1, 0]]], [[[1, 0, 1, 1, 1, 1]]]], bool)
    for seen, causal in ((own[:, None], False), (source, False), (own[:, None], True)):
        how = {"bias": hide(jnp.asarray(seen)), "scale": 0.5, "causal": causal}
        found = with_gradients(partial(attend, **how, cpu="blas"), q, k, v)
        wanted = with_gradients(partial(attend, **how), q, k, v)
        rows = [row for row in range(6) if not causal or row != 3]  # it sees other keys there
        assert_same([found[0][:, rows]], [wanted[0][:, rows]], **CLOSE)
        if not causal:
            assert_same(found, wanted, **CLOSE)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cpu", [True, "blas"])
def test_a_trained_bias_has_its_gradient(heads, cpu):
    q, k, v = (normal(i, 2, 6, heads, 4) for i in range(3))
    table = normal(3, 1, heads, 6, 6) + hide(jnp.asarray(places(6)))[None, None]

    def found(cpu):
        return with_gradients(lambda bias: attend(q, k, v, bias, scale=0.5, cpu=cpu), table)

    assert_same(found(cpu), found(False), **CLOSE)
    assert float(jnp.abs(found(cpu)[1]).max()) > 0


def test_what_is_no_number_stays_so():
    q, k, v = (normal(i, 1, 20, 2, 4) for i in range(3))
    how = {"bias": hide(jnp.asarray(places(20))), "scale": 0.5, "causal": True, "cpu": "blas"}
    y = attend(q.at[0, 3].set(jnp.nan), k, v, **how)
    assert bool(jnp.all(jnp.isnan(y[0, 3])))
    assert not bool(jnp.any(jnp.isnan(jnp.delete(y, 3, axis=1))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_attention_to_what_one_product_made(kv_heads, dtype):
    qkv = normal(0, 2, 150, (3 + 2 * kv_heads) * 4, dtype=dtype)
    bias = hide(jnp.asarray(places(150, window=20)))[None, None]

    def apart(qkv):
        q, k, v = jnp.split(qkv.reshape(2, 150, -1, 4), (3, 3 + kv_heads), axis=2)
        return blas.attend(q, k, v, bias, 0.5, True, 20)

    def together(qkv):
        return blas.attend_together(qkv, bias, 3, 4, 0.5, True, 20)

    assert_same(with_gradients(together, qkv), with_gradients(apart, qkv), rtol=0, atol=0)


# ---------------------------------------------------------------------------- norms, activations


@pytest.fixture
def however_few(monkeypatch):
    monkeypatch.setattr(blas, "FEW", 1)


BOTH = (True, True)


# The second is cut among threads, at rows that do not divide.
@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "vectors"),
    [
        ((2, 3, 5), jnp.float32, BOTH),
        ((7, 11, 300), jnp.float32, BOTH),
        ((7, 11, 300), jnp.float32, (True, False)),
        ((4, 16), jnp.float32, (False, True)),
        ((4, 16), jnp.float32, (False, False)),
        ((7, 11, 300), jnp.bfloat16, BOTH),
    ],
    ids=str,
)
def test_norm(shape, dtype, vectors, centred):
    x = normal(0, *shape, dtype=dtype) + 1
    given = [normal(i, shape[-1]) for i in (1, 2) if vectors[i - 1]]

    def norm(x, *given, cpu):
        rest = iter(given)
        scale, bias = (next(rest) if there else None for there in vectors)
        return normalise(x, scale, bias, centred=centred, epsilon=1e-5, cpu=cpu)

    assert names(partial(norm, cpu="blas"), x, *given)
    found, wanted = (with_gradients(partial(norm, cpu=cpu), x, *given) for cpu in ("blas", False))
    # Autodiff rounds a bfloat16's gradient in its middle too.
    close = CLOSE if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 2**-5}
    assert_same(found, wanted, **close)


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_norm_under_transforms(transform):
    arrays = normal(0, 4, 6, 32), normal(1, 32), normal(2, 32)

    def norm(cpu):
        return lambda x, *given: normalise(x, *given, centred=True, epsilon=1e-5, cpu=cpu)

    found, wanted = (with_gradients(transform(norm(cpu)), *arrays) for cpu in ("blas", False))
    assert_same(found, wanted, **CLOSE)


def exact_gelu(x):
    below = scipy.special.ndtr(x)
    return x * below, below + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def exact_gelu_tanh(x):
    u, du = (np.sqrt(8 / np.pi) * y for y in (x + 0.044715 * x**3, 1 + 3 * 0.044715 * x**2))
    s = scipy.special.expit(u)
    return x * s, s + x * s * (1 - s) * du


def exact_silu(x):
    s = scipy.special.expit(x)
    return x * s, s + x * s * (1 - s)


EXACT = {"gelu": exact_gelu, "gelu_tanh": exact_gelu_tanh, "silu": exact_silu}


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((7, 11, 300), jnp.float32), ((2, 2500), jnp.float32), ((7, 11, 300), jnp.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("activation", blas.ACTIVATIONS)
def test_activation(shape, dtype, activation):
    x, up = (4 * normal(i, *shape, dtype=dtype) for i in range(2))
    close = CLOSE if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 1e-5}
    one = partial(activate, activation=activation, cpu="blas")
    two = partial(glu, activation=activation, cpu="blas")
    assert names(one, x)
    # JAX's float32 is less exact than what is tested.
    x64, up64, g = (np.asarray(y, np.float64) for y in (x, up, normal(9, *shape, dtype=dtype)))
    y, slope = EXACT[activation](x64)
    of_one, of_two = (y, g * slope), (y * up64, g * up64 * slope, g * y)
    for found, wanted in (
        (with_gradients(one, x), of_one),
        (with_gradients(two, x, up), of_two),
    ):
        assert_same(found, [y.astype(dtype) for y in wanted], **close)

    both = jnp.concatenate([x, up], axis=-1)
    found = with_gradients(partial(glu_of, activation=activation, cpu="blas"), both)
    wanted = with_gradients(two, x, up)
    assert_same(found, (wanted[0], jnp.concatenate(wanted[1:], axis=-1)), rtol=0, atol=0)


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_activation_under_transforms(transform):
    def function(cpu):
        return lambda x, up: glu(activate(x, "gelu", cpu=cpu), up, "silu", cpu=cpu)

    arrays = normal(0, 4, 6, 32), normal(1, 4, 6, 32)
    found, wanted = (with_gradients(transform(function(cpu)), *arrays) for cpu in ("blas", False))
    assert_same(found, wanted, **CLOSE)


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("activation", blas.ACTIVATIONS)
def test_activation_of_what_is_large_or_no_number(activation):
    x = jnp.array([[1e30, -1e30, 90.0, -90.0, 0.0, jnp.nan]])
    found, wanted = (
        with_gradients(partial(activate, activation=activation, cpu=cpu), x)
        for cpu in ("blas", False)
    )
    np.testing.assert_array_equal(np.isnan(found[0]), np.isnan(wanted[0]))
    assert_same([found[0][:, :5]], [wanted[0][:, :5]], **CLOSE)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_losses_under_transforms(transform):
    logits, targets = normal(0, 60, 700), jnp.arange(60)

    def losses(cpu):
        return lambda x: token_losses(x, targets, cpu)

    assert names(losses("blas"), logits)
    found, wanted = (with_gradients(transform(losses(cpu)), logits) for cpu in ("blas", False))
    assert_same(found, wanted, **CLOSE)


@pytest.mark.usefixtures("however_few")
def test_losses_of_what_is_large_or_no_number():
    inf, nan = jnp.inf, jnp.nan
    rows = [[1e30, 0, 0], [-1e30, 0, 1], [-inf, 0, 1], [inf, 0, 0], [nan, 0, 0], [-inf] * 3]
    rows += [[nan, inf, 0], [nan, -inf, -inf], [-inf, nan, -inf]]
    logits = jnp.array(rows)
    found = blas.logsumexp(logits)
    np.testing.assert_allclose(found, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)


def test_of_few_entries_xla_makes_a_part_of_the_rest():
    x = normal(0, 4, 8)
    assert not names(partial(activate, activation="gelu", cpu="blas"), x)
    assert not names(partial(normalise, centred=True, epsilon=1e-5, cpu="blas"), x)


# ---------------------------------------------------------------------------- where it is used


@pytest.mark.parametrize("how", [{}, {"scan_layers": True, "remat": "block"}], ids=str)
@pytest.mark.parametrize("name", ["tiny-gpt", "baby-llama"])
def test_an_update_is_that_of_plain_autodiff(name, how, monkeypatch):
    monkeypatch.setattr(blas, "FEW", 1)
    run = PRESETS[name].run.changed({"model.decoder.num_layers": 2, "model.vocab_size": 64})
    tokens = np.random.default_rng(0).integers(64, size=(2, 24), dtype=np.int32)
    batch = {"tokens": tokens, "targets": tokens[:, ::-1].copy()}

    def update(kernels):
        changed = run.replace(compute=ComputeSpec(kernels=kernels, **how))
        step = make_step(changed, abstract(changed.model, changed.compute))
        text = jax.jit(step).lower(initial_state(changed), batch, np.float32(0)).as_text()
        _, metrics = jax.jit(step)(initial_state(changed), batch, np.float32(0))
        called = set(re.findall(r'what = "(\w+)"', text))
        return called, metrics["loss"], metrics["grad_norm"]

    (ours, *found), (plain, *wanted) = update("auto"), update("plain")
    assert ours >= {"matmul", "norm", "norm_backward", "activate", "activate_backward", "logsumexp"}
    assert any("attend" in what for what in ours)
    assert not plain
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("remat", ["weights", "dots"])
def test_remat_keeps_what_the_blas_made(remat):
    """The backward pass has no product of the forward's again."""
    run = PRESETS["tiny-gpt"].run.changed({"model.decoder.num_layers": 2, "model.vocab_size": 64})
    batch = dict.fromkeys(("tokens", "targets"), np.zeros((2, 64), np.int32))

    def products(remat):
        changed = run.replace(compute=ComputeSpec(remat=remat))
        step = make_step(changed, abstract(changed.model, changed.compute))
        text = jax.jit(step).lower(initial_state(changed), batch, np.float32(0)).compile().as_text()
        return text.count('what = "matmul"')

    assert 0 < products(remat) == products("none") < products("block")


def test_a_mesh_and_other_kernels_do_without():
    assert use_cpu_kernels(ComputeSpec()) == "blas"
    assert use_cpu_kernels(ComputeSpec(kernels="cpu")) is True
    assert use_cpu_kernels(ComputeSpec(kernels="plain")) is False
    x, w = normal(0, 2, 3, 5), normal(1, 5, 4)
    assert not names(partial(product, cpu=True), x, w)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert not names(partial(product, cpu="blas"), x, w)


def test_an_mkl_that_does_not_link_is_left_out(tmp_path):
    """And is not tried again at each start."""
    code = """
from assay.model import compiled
compiled.mkl = lambda: ("-DMKL", "/nowhere/libmkl_core.so.2")
run, calls = compiled.subprocess.run, []
compiled.subprocess.run = lambda *x, **y: calls.append(x) or run(*x, **y)
from assay.model import blas
print(len(calls), *blas.build(), len(calls))
"""
    for compilations in (2, 0):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ASSAY_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("0 True"), done.stdout
        assert "SciPy's OpenBLAS" in done.stdout
        assert done.stdout.split()[-1] == str(compilations)


def test_without_a_compiler_xla_does_it(tmp_path):
    code = "from assay.model import blas; print(*blas.build())"
    for turned_off in ({"ASSAY_NATIVE": "0"}, {"PATH": str(tmp_path)}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | turned_off | {"ASSAY_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("False XLA computes all of training: ")
