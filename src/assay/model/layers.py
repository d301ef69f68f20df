"""Linear layers, activations, norms, feed-forward, dropout.

Axes: B batch, T tokens, K fan-in, N fan-out, D model, F hidden.

Every matrix product with a weight is `product`, so that how it is written is decided once. On a
CPU the backward products are written out: what autodiff makes of them costs up to three times as
much there (docs/performance.md). The results are the same.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from assay.model import blas
from assay.model.sharding import constant_parameter, parameter
from assay.spec.model import Activation, MlpSpec, NormSpec, WeightInit
from assay.spec.run import ComputeSpec


def along_last(vector: Float[Array, "d"], x: Float[Array, "*b d"]) -> Float[Array, "..."]:
    """A bias or scale with as many axes as x: ranks are never promoted silently."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


# ---------------------------------------------------------------------------- products


PRODUCT = "product"
"""What policies of remat know a product with a weight by that is no `dot_general`."""

CpuKernels = bool | Literal["blas"]
"""Whether the forms that suit XLA's CPU backend are used; "blas": and `blas.py` where it can be."""


def use_cpu_kernels(compute: ComputeSpec) -> CpuKernels:
    """What `compute.kernels` asks for; "auto" is "blas" on a CPU."""
    if compute.kernels == "auto" and jax.default_backend() == "cpu":
        return "blas"
    return compute.kernels == "cpu"


def product(
    x: Float[Array, "*b k"],
    w: Float[Array, "..."],
    *,
    transposed: bool = False,
    cpu: CpuKernels = False,
) -> Float[Array, "*b n"]:
    """x @ w, or x @ w.T for a `transposed` (N, K) weight; (..., K) -> (..., N), in x's dtype."""
    w = w.astype(x.dtype)
    if cpu == "blas" and blas.multiplies(x.dtype) and blas.usable():
        return checkpoint_name(_blas_product(x, w, transposed), PRODUCT)
    if cpu:
        return _cpu_product(x, w, transposed)
    return jnp.einsum("...k,nk->...n" if transposed else "...k,kn->...n", x, w)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_product(x, w, transposed):
    return jnp.einsum("...k,nk->...n" if transposed else "...k,kn->...n", x, w)


def _cpu_product_forward(x, w, transposed):
    return _cpu_product(x, w, transposed), (x, w)


def _cpu_product_backward(transposed, saved, g):
    x, w = saved
    # The barriers keep what made x and g (an activation, its derivative) out of the products:
    # XLA would compute it again, in the transposing copy that dw needs, as a slow loop.
    x, g = jax.lax.optimization_barrier((x, g))
    batch = "bcdefgh"[: x.ndim - 1]
    if transposed:
        dx = jnp.einsum("...n,nk->...k", g, w)
        dw = jnp.einsum(f"{batch}n,{batch}k->nk", g, x)
    else:
        dx = jnp.einsum("...n,kn->...k", g, w)
        dw = jnp.einsum(f"{batch}k,{batch}n->kn", x, g)
    return dx, dw


_cpu_product.defvjp(_cpu_product_forward, _cpu_product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _blas_product(x, w, transposed):
    y = blas.matmul(x.reshape(-1, x.shape[-1]), w, tb=transposed)
    return y.reshape(*x.shape[:-1], -1)


def _blas_product_forward(x, w, transposed):
    return _blas_product(x, w, transposed), (x, w)


def _blas_product_backward(transposed, saved, g):
    x, w = saved
    rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dx = blas.matmul(g, w, tb=not transposed).reshape(x.shape)
    dw = blas.matmul(g, rows, ta=True) if transposed else blas.matmul(rows, g, ta=True)
    return dx, dw


_blas_product.defvjp(_blas_product_forward, _blas_product_backward)


def linear(
    x: Float[Array, "*b k"],
    w: Float[Array, "k n"],
    b: Float[Array, "n"] | None = None,
    *,
    cpu: CpuKernels = False,
) -> Float[Array, "*b n"]:
    """x w + b, in x's dtype."""
    y = product(x, w, cpu=cpu)
    return y if b is None else y + along_last(b.astype(x.dtype), y)


class Linear(nnx.Module):
    """y = x w + b, (..., K) -> (..., N)."""

    def __init__(
        self,
        key: Key[Array, ""],
        fan_in: int,
        fan_out: int,
        *,
        axes: tuple[str | None, str | None],
        init: WeightInit,
        bias: bool,
        compute: ComputeSpec,
        scale: float = 1.0,
    ):
        self.w = parameter(key, (fan_in, fan_out), axes, init, scale=scale)
        self.b = constant_parameter((fan_out,), (axes[1],), 0.0) if bias else None
        self.cpu = use_cpu_kernels(compute)

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
        return linear(x, self.w[...], None if self.b is None else self.b[...], cpu=self.cpu)


MANY_ROWS = 128
"""From so many on, weights laid side by side cost little beside the product."""


def linears(x: Float[Array, "*b k"], *layers: Linear) -> tuple[Float[Array, "*b n"], ...]:
    """What each layer makes of the same x: (..., K) -> (..., N) of each."""
    if not one_product(x, *layers):
        return tuple(layer(x) for layer in layers)
    widths = np.cumsum([layer.w.shape[1] for layer in layers])
    return tuple(jnp.split(side_by_side(x, *layers), widths[:-1].tolist(), axis=-1))


def one_product(x: Float[Array, "*b k"], *layers: Linear) -> bool:
    """Whether these layers are faster as one.

    On one CPU they are, their backward pass too: one larger product is faster than several, x is
    laid out for it once, and its gradients need no sum.
    """
    alone = jax.sharding.get_abstract_mesh().empty
    return bool(layers[0].cpu) and alone and math.prod(x.shape[:-1]) >= MANY_ROWS


def side_by_side(x: Float[Array, "*b k"], *layers: Linear) -> Float[Array, "*b n"]:
    """What each layer makes of the same x, in one array along the last axis, by one product."""
    w = jnp.concatenate([layer.w[...].astype(x.dtype) for layer in layers], axis=1)
    b = None
    if layers[0].b is not None:
        b = jnp.concatenate([layer.b[...] for layer in layers])
    return linear(x, w, b, cpu=layers[0].cpu)


# ---------------------------------------------------------------------------- activations


def _relu_squared(x):
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": _relu_squared,
    "sigmoid": jax.nn.sigmoid,
}


def _gelu_by_erf(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x * (1.0 / math.sqrt(2.0))))


# JAX's own uses erfc, for small relative errors in the tail, and takes 2.7 times as long.
CPU_ACTIVATIONS = ACTIVATIONS | {"gelu": _gelu_by_erf}


def activate(x: Float[Array, "..."], activation: Activation, *, cpu=False) -> Float[Array, "..."]:
    """The activation and its derivative, both in float32, rounded once at the end."""
    if _by_blas(x, activation, cpu):
        return blas.activate(x, None, activation)
    return _cpu_activate(x, activation) if cpu else _rounded(ACTIVATIONS[activation], x)


def _by_blas(x, activation, cpu: CpuKernels) -> bool:
    return cpu == "blas" and activation in blas.ACTIVATIONS and blas.pays(x)


def _rounded(function, x):
    return function(x.astype(jnp.float32)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cpu_activate(x, activation):
    return _rounded(CPU_ACTIVATIONS[activation], x)


def _cpu_activate_forward(x, activation):
    return _cpu_activate(x, activation), x  # nothing is kept but x: the rest is cheap to do again


def _cpu_activate_backward(activation, x, g):
    _, pullback = jax.vjp(CPU_ACTIVATIONS[activation], x.astype(jnp.float32))
    (dx,) = pullback(g.astype(jnp.float32))
    return (dx.astype(x.dtype),)


_cpu_activate.defvjp(_cpu_activate_forward, _cpu_activate_backward)


def glu(gate: Float[Array, "*b f"], up: Float[Array, "*b f"], activation: Activation, *, cpu=False):
    """activation(gate) * up (arXiv:2002.05202), of their dtype."""
    if _by_blas(gate, activation, cpu):
        return blas.activate(gate, up, activation, True)
    if cpu:
        return _cpu_glu(gate, up, activation)
    return activate(gate, activation) * up


def glu_of(gate_up: Float[Array, "*b n"], activation: Activation, *, cpu=False):
    """`glu` of a gate and what it lets through that lie side by side: (..., 2 F) -> (..., F)."""
    if _by_blas(gate_up, activation, cpu):
        return blas.activate(gate_up, None, activation, True)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return glu(gate, up, activation, cpu=cpu)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_glu(gate, up, activation):
    return _rounded(CPU_ACTIVATIONS[activation], gate) * up


def _cpu_glu_forward(gate, up, activation):
    return _cpu_glu(gate, up, activation), (gate, up)


def _cpu_glu_backward(activation, saved, g):
    gate, up = saved
    gate, up, g = (x.astype(jnp.float32) for x in jax.lax.optimization_barrier((gate, up, g)))
    activated, pullback = jax.vjp(CPU_ACTIVATIONS[activation], gate)
    (d_gate,) = pullback(g * up)
    return d_gate.astype(saved[0].dtype), (g * activated).astype(saved[0].dtype)


_cpu_glu.defvjp(_cpu_glu_forward, _cpu_glu_backward)


# ---------------------------------------------------------------------------- norms


def normalise(
    x: Float[Array, "*b d"],
    scale: Float[Array, "d"] | None = None,
    bias: Float[Array, "d"] | None = None,
    *,
    centred: bool,
    epsilon: float,
    cpu: CpuKernels = False,
) -> Float[Array, "*b d"]:
    """LayerNorm (`centred`) or RMSNorm of the last axis, in float32 and back."""
    if cpu == "blas" and blas.pays(x):
        scale, bias = (v if v is None else v.astype(jnp.float32) for v in (scale, bias))
        return blas.normalise(x, scale, bias, centred, epsilon)
    if cpu:
        return _cpu_normalise(x, scale, bias, centred, epsilon)
    y = x.astype(jnp.float32)
    if centred:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    if scale is not None:
        y = y * along_last(scale, y)
    if bias is not None:
        y = y + along_last(bias, y)
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cpu_normalise(x, scale, bias, centred, epsilon):
    return _cpu_normalise_forward(x, scale, bias, centred, epsilon)[0]


def _cpu_normalise_forward(x, scale, bias, centred, epsilon):
    y = x.astype(jnp.float32)
    mean = None
    if centred:
        mean = jax.lax.optimization_barrier(jnp.mean(y, axis=-1, keepdims=True))
        y = y - mean
    rate = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    rate = jax.lax.optimization_barrier(rate)  # a number a row: kept, not computed a feature
    y = y * rate
    if scale is not None:
        y = y * along_last(scale, y)
    if bias is not None:
        y = y + along_last(bias, y)
    # Made once: XLA would else make it again for the product that the backward pass has of it.
    y = jax.lax.optimization_barrier(y.astype(x.dtype))
    return y, (x, scale, bias, mean, rate)


def _cpu_normalise_backward(centred, epsilon, saved, g):
    x, scale, bias, mean, rate = saved
    g = jax.lax.optimization_barrier(g).astype(jnp.float32)
    y = x.astype(jnp.float32)
    y = (y if mean is None else y - mean) * rate
    by_y = g if scale is None else g * along_last(scale, g)
    along = jnp.mean(by_y * y, axis=-1, keepdims=True)
    shift = jnp.mean(by_y, axis=-1, keepdims=True) if centred else 0.0
    along, shift = jax.lax.optimization_barrier((along, shift))
    dx = ((by_y - shift - y * along) * rate).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    d_scale = None if scale is None else jnp.sum(g * y, axis=rows)
    d_bias = None if bias is None else jnp.sum(g, axis=rows)
    return dx, d_scale, d_bias


_cpu_normalise.defvjp(_cpu_normalise_forward, _cpu_normalise_backward)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, in float32 whatever the dtype around it."""

    def __init__(self, width: int, spec: NormSpec, compute: ComputeSpec | None = None):
        self.cpu = use_cpu_kernels(compute or ComputeSpec())
        self.centred = spec.kind == "layernorm"
        self.epsilon = spec.epsilon
        self.scale = constant_parameter((width,), (None,), 1.0) if spec.scale else None
        has_bias = spec.kind == "layernorm" and spec.bias
        self.bias = constant_parameter((width,), (None,), 0.0) if has_bias else None

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return normalise(x, scale, bias, centred=self.centred, epsilon=self.epsilon, cpu=self.cpu)


# ---------------------------------------------------------------------------- dropout


def dropout(
    x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None, *, whole: bool = False
) -> Float[Array, "..."]:
    """Zeroes a share `rate` of x and scales the rest to keep its mean; nothing without a key.

    `whole`: of the vectors along the last axis, not of their entries.

    Two entries share a random word, as words are what takes the time: the share is right to 2^-17.
    """
    if key is None or rate == 0.0:
        return x
    *rows, width = (*x.shape[:-1], 1) if whole else x.shape
    words = jax.random.bits(key, (*rows, -(-width // 2)), jnp.uint32)
    halves = jnp.concatenate([words & (2**16 - 1), words >> 16], axis=-1)[..., :width]
    keep = halves >= round(rate * 2**16)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


# ---------------------------------------------------------------------------- feed-forward


class Mlp(nnx.Module):
    """d -> hidden (-> hidden ...) -> d, activated in between; gated, act(x gate) * (x up)."""

    def __init__(
        self,
        key: Key[Array, ""],
        d_model: int,
        spec: MlpSpec,
        *,
        init: WeightInit,
        residual_init: WeightInit,
        residual_scale: float,
        compute: ComputeSpec,
    ):
        self.activation = spec.activation
        self.cpu = use_cpu_kernels(compute)
        widths = (d_model, *spec.widths)
        keys = jax.random.split(key, len(widths) + 1)
        shared = {"bias": spec.bias, "compute": compute}
        self.up = nnx.List(
            Linear(k, i, o, axes=("embed" if n == 0 else None, "mlp"), init=init, **shared)
            for n, (k, i, o) in enumerate(zip(keys[2:], widths[:-1], widths[1:], strict=True))
        )
        self.gate = (
            Linear(keys[1], d_model, widths[1], axes=("embed", "mlp"), init=init, **shared)
            if spec.gated
            else None
        )
        # Both as one, in a model made ready to decode (`decoding.py`).
        self.gate_up = nnx.data(None)
        self.down = Linear(
            keys[0],
            widths[-1],
            d_model,
            axes=("mlp", "embed"),
            init=residual_init,
            scale=residual_scale,
            **shared,
        )

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        if self.gate_up is not None:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
            return self.down(activate(gate, self.activation, cpu=self.cpu) * up)
        if self.gate is not None:
            if one_product(x, self.gate, self.up[0]):
                gate_up = side_by_side(x, self.gate, self.up[0])
                return self.down(glu_of(gate_up, self.activation, cpu=self.cpu))
            gate, up = self.gate(x), self.up[0](x)
            return self.down(glu(gate, up, self.activation, cpu=self.cpu))
        for up in self.up:
            x = activate(up(x), self.activation, cpu=self.cpu)
        return self.down(x)


def depth_scale(num_layers: int) -> float:
    """GPT-2's factor for projections into the residual stream, two a layer."""
    return 1.0 / math.sqrt(2 * max(num_layers, 1))
