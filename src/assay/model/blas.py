"""Training's heavy parts in C++ (`blas.cc`) around a BLAS, where there is a compiler.

XLA's CPU products are as fast as any for large matrices on some processors, and slower than
OpenBLAS on others; its attention lays queries, keys and values out anew and computes what a causal
mask then hides; norms and activations pass over memory several times. Where a C++ compiler is at
hand, `blas.cc` is compiled once (seconds) into the cache folder and called through JAX's FFI:
products in float32 by OpenBLAS or MKL (the extra `mkl`), attention in blocks whose scores
stay in the processor's cache (arXiv:2205.14135), norms and activations in one pass. Elsewhere, on a
mesh, and with `ASSAY_NATIVE=0`, XLA computes the same. docs/performance.md has the figures of both.

Axes: B batch, T queries, S keys, H heads, G kv heads, C head width; M rows, K summed, N columns.
"""

import ctypes
import threading
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from assay.model.compiled import (
    NotCompiledError,
    library,
    processor_features,
    processor_is,
)

TYPES = (jnp.float32, jnp.bfloat16)
_building = threading.Lock()
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")  # in the order of blas.cc


def build() -> tuple[bool, str]:
    """Whether the calls are there, and a sentence that says so, or why not."""
    with _building:  # of two threads that trace, one waits for the other
        return _build()


@lru_cache(maxsize=1)
def _build() -> tuple[bool, str]:
    try:
        compiled, whose = library("blas"), "Intel's MKL"
        if hasattr(compiled, "set_sgemm"):  # not linked with MKL
            compiled.set_sgemm.argtypes = [ctypes.c_void_p]
            compiled.set_sgemm(_openblas())
            whose = "SciPy's OpenBLAS"
        jax.ffi.register_ffi_target("assay_blas", jax.ffi.pycapsule(compiled.make), platform="cpu")
    except NotCompiledError as error:
        return False, f"XLA computes all of training: {error}"
    return True, f"Training is computed in C++, products by {whose}."


def usable() -> bool:
    """Whether what is traced now is computed by one CPU device, and the calls are there."""
    alone = jax.sharding.get_abstract_mesh().empty
    return alone and jax.default_backend() == "cpu" and build()[0]


def _openblas() -> int:
    """The address of SciPy's sgemm, set to one thread: XLA's threads each call it.

    Raises:
        NotCompiledError: if SciPy brings no OpenBLAS of its own, as its wheels do.
    """
    import scipy
    from scipy.linalg import cython_blas

    beside = Path(scipy.__file__).parent
    for folder in (beside.parent / "scipy.libs", beside / ".dylibs"):
        for path in folder.glob("libscipy_openblas*"):
            try:
                ctypes.CDLL(str(path)).scipy_openblas_set_num_threads(1)
            except (OSError, AttributeError):
                continue
            capsule = cython_blas.__pyx_capi__["sgemm"]
            name, pointer = (
                ctypes.pythonapi.PyCapsule_GetName,
                ctypes.pythonapi.PyCapsule_GetPointer,
            )
            name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
            pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            return pointer(capsule, name(capsule))
    raise NotCompiledError("SciPy brings no OpenBLAS of its own.")


# ---------------------------------------------------------------------------- products


@lru_cache(maxsize=2)
def multiplies(dtype: jnp.dtype) -> bool:
    """Whether products of this type are faster here than XLA's.

    Intel's processors without AMX multiply bfloat16 no faster than float32, AMD's twice as fast;
    of those XLA makes use, OpenBLAS does not.
    """
    if dtype == jnp.float32:
        return True
    fast = {"amx_bf16"} if processor_is("GenuineIntel") else {"amx_bf16", "avx512_bf16"}
    return dtype == jnp.bfloat16 and not fast & set(processor_features())


def matmul(
    a: Float[Array, "..."], b: Float[Array, "..."], *, ta: bool = False, tb: bool = False
) -> Float[Array, "m n"]:
    """op(a) op(b), each turned where its flag says so: (M, K) x (K, N), summed in float32."""
    rows, columns = a.shape[1 if ta else 0], b.shape[0 if tb else 1]
    result = jax.ShapeDtypeStruct((rows, columns), a.dtype)
    return _call("matmul", result, a, b, ta=ta, tb=tb)


@jax.custom_vjp
def grouped(
    x: Float[Array, "m k"], w: Float[Array, "e k n"], sizes: Int32[Array, "e"]
) -> Float[Array, "m n"]:
    """As `jax.lax.ragged_dot`: the first `sizes[0]` rows by w[0], and so on; 0 behind the last."""
    return _grouped(x, w, sizes, turned=False)


def _grouped(x, w, sizes, *, turned):
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[1 if turned else 2]), x.dtype)
    return _call("grouped", result, x, w, sizes, turned=turned)


def _grouped_backward(saved, g):
    x, w, sizes = saved
    dw = _call("grouped_gradient", jax.ShapeDtypeStruct(w.shape, w.dtype), x, g, sizes)
    return _grouped(g, w, sizes, turned=True), dw, None


grouped.defvjp(lambda x, w, sizes: (grouped(x, w, sizes), (x, w, sizes)), _grouped_backward)


# ---------------------------------------------------------------------------- attention


def attends(dtype: jnp.dtype, bias: tuple[int, ...]) -> bool:
    """Whether `attend` takes this type and a bias of this shape: the same for all heads."""
    return dtype in TYPES and bias[1] == 1


def attend(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    v: Float[Array, "b s g c"],
    bias: Float32[Array, "#b 1 #t s"],
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "b t h c"]:
    """softmax(scale q k^T + bias) v, all but the result in float32; the bias has no gradient.

    `causal` and `window` say which keys the bias hides by place, so that they are not read.
    """
    return _attend((q, k, v), bias, q.shape, scale, causal, window)


def attend_together(
    qkv: Float[Array, "b t n"],
    bias: Float32[Array, "#b 1 #t t"],
    heads: int,
    width: int,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "b t h c"]:
    """`attend` of queries, keys and values that lie side by side, as one product made them."""
    return _attend((qkv,), bias, (*qkv.shape[:2], heads, width), scale, causal, window)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _attend(arrays, bias, shape, scale, causal, window):
    """`arrays` are queries, keys and values, or one with all; the result has the `shape`."""
    return _attend_forward(arrays, bias, shape, scale, causal, window)[0]


def _attend_forward(arrays, bias, shape, scale, causal, window):
    b, t, h, _ = shape
    results = (
        jax.ShapeDtypeStruct(shape, arrays[0].dtype),
        jax.ShapeDtypeStruct((b, h, t, 2), jnp.float32),  # the largest score; 1 / sum of exp
    )
    how = of_attention(scale, window) | {"causal": causal, "together": len(arrays) == 1}
    y, kept = _call("attend", results, *arrays, bias, **how)
    return y, (arrays, bias, y, kept)


def _attend_backward(shape, scale, causal, window, saved, g):
    arrays, *rest = saved
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    how = of_attention(scale, window) | {"causal": causal, "together": len(arrays) == 1}
    return tuple(_call("attend_backward", results, *arrays, *rest, g, **how)), None


_attend.defvjp(_attend_forward, _attend_backward)


# ---------------------------------------------------------------------------- norms, activations


FEW = 1 << 14
"""Entries: of fewer, XLA makes a part of what it computes around them, for nothing."""


def pays(x: Array) -> bool:
    """Whether an operation on each entry of x is worth a call."""
    return x.dtype in TYPES and x.size >= FEW and usable()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: Float[Array, "*b d"],
    scale: Float32[Array, "d"] | None,
    bias: Float32[Array, "d"] | None,
    centred: bool,
    epsilon: float,
) -> Float[Array, "*b d"]:
    """LayerNorm (`centred`) or RMSNorm of the last axis, in float32 and back."""
    return _normalise_forward(x, scale, bias, centred, epsilon)[0]


def _normalise_forward(x, scale, bias, centred, epsilon):
    results = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((*x.shape[:-1], 2), jnp.float32),  # mean; 1 / deviation
    )
    how = {"centred": centred, "epsilon": np.float32(epsilon)}
    y, kept = _call("norm", results, x, or_nothing(scale), or_nothing(bias), **how)
    return y, (x, scale, bias, kept)


def _normalise_backward(centred, epsilon, saved, g):
    x, scale, bias, kept = saved
    vectors = [or_nothing(scale), or_nothing(bias)]
    results = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in (x, *vectors)]
    arrays = (x, vectors[0], kept, g)
    dx, d_scale, d_bias = _call("norm_backward", results, *arrays, centred=centred)
    return dx, None if scale is None else d_scale, None if bias is None else d_bias


normalise.defvjp(_normalise_forward, _normalise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def activate(
    x: Float[Array, "*b n"], up: Float[Array, "*b f"] | None, activation: str, gated: bool = False
) -> Float[Array, "*b f"]:
    """act(x); `gated` act(x) up, or act(gate) up of a x with both side by side and no `up`."""
    return _activate_forward(x, up, activation, gated)[0]


def _activate_forward(x, up, activation, gated):
    width = x.shape[-1] // (2 if gated and up is None else 1)
    result = jax.ShapeDtypeStruct((*x.shape[:-1], width), x.dtype)
    how = _of_activation(activation, gated)
    return _call("activate", result, x, or_nothing(up), **how), (x, up)


def _activate_backward(activation, gated, saved, g):
    x, up = saved[0], or_nothing(saved[1])
    results = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in (x, up)]
    how = _of_activation(activation, gated)
    dx, d_up = _call("activate_backward", results, x, up, g, **how)
    return dx, None if saved[1] is None else d_up


activate.defvjp(_activate_forward, _activate_backward)


def _of_activation(activation: str, gated: bool) -> dict[str, np.number | bool]:
    return {"activation": np.int64(ACTIVATIONS.index(activation)), "gated": gated}


def logsumexp(x: Float[Array, "*b v"]) -> Float32[Array, "*b"]:
    """log sum exp of the last axis, in float32; it has no gradient of its own."""
    return _call("logsumexp", jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32), x)


# ---------------------------------------------------------------------------- calls


def or_nothing(array: Array | None) -> Array:
    """An array of no entries stands for none."""
    return jnp.zeros((0,), jnp.float32) if array is None else array


def of_attention(scale: float, window: int | None) -> dict[str, np.number]:
    """Attributes of a call that attends; no window is one that no row exceeds."""
    most = np.iinfo(np.int32).max if window is None else window
    return {"window": np.int64(most), "scale": np.float32(scale)}


def _call(what: str, results, *arrays: Array, **how):
    # Every call takes more axes before its own, and all operands then have them.
    call = jax.ffi.ffi_call("assay_blas", results, vmap_method="broadcast_all")
    return call(*arrays, what=what, **how)
