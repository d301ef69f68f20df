"""Training's products and attention by SciPy's BLAS (`blas.cc`), where there is a compiler.

XLA's CPU products are as fast as any for large matrices on some processors, and slower than
OpenBLAS on others; its attention lays queries, keys and values out anew and computes what a causal
mask then hides. Where a C++ compiler is at hand, `blas.cc` is compiled once (seconds) into the
cache folder and called through JAX's FFI: products in float32 by SciPy's own OpenBLAS, and
attention in blocks whose scores stay in the processor's cache (arXiv:2205.14135). Elsewhere, on a
mesh, and with `ASSAY_NATIVE=0`, XLA computes the same. docs/performance.md has the figures of both.

Axes: B batch, T queries, S keys, H heads, G kv heads, C head width; M rows, K summed, N columns.
"""

import ctypes
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from assay.model.compiled import NotCompiledError, library, processor_features, processor_is

CALLS = (
    "matmul_float32",
    "matmul_bfloat16",
    "attend_float32",
    "attend_bfloat16",
    "attend_backward_float32",
    "attend_backward_bfloat16",
)


@lru_cache(maxsize=1)
def build() -> tuple[bool, str]:
    """Whether the calls are there, and a sentence that says so, or why not."""
    try:
        sgemm = _openblas()
        compiled = library("blas")
        compiled.set_sgemm.argtypes = [ctypes.c_void_p]
        compiled.set_sgemm(sgemm)
        for call in CALLS:
            function = jax.ffi.pycapsule(getattr(compiled, call))
            jax.ffi.register_ffi_target(f"assay_{call}", function, platform="cpu")
    except NotCompiledError as error:
        return False, f"XLA computes products and attention: {error}"
    return True, "SciPy's OpenBLAS computes products and attention."


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
    return _call(f"matmul_{a.dtype.name}", result)(a, b, ta=ta, tb=tb)


# ---------------------------------------------------------------------------- attention


def attends(dtype: jnp.dtype, bias: tuple[int, ...]) -> bool:
    """Whether `attend` takes this type and a bias of this shape: the same for all heads."""
    return dtype in (jnp.float32, jnp.bfloat16) and bias[1] == 1


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
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
    return _attend_forward(q, k, v, bias, scale, causal, window)[0]


def _attend_forward(q, k, v, bias, scale, causal, window):
    b, t, h, _ = q.shape
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((b, h, t, 2), jnp.float32),  # the largest score; 1 / sum of exp
    )
    how = _how(scale, causal, window)
    y, kept = _call(f"attend_{q.dtype.name}", results)(q, k, v, bias, **how)
    return y, (q, k, v, bias, y, kept)


def _attend_backward(scale, causal, window, saved, g):
    q, k, v, bias, y, kept = saved
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    call = _call(f"attend_backward_{q.dtype.name}", results)
    gradients = call(q, k, v, bias, y, kept, g, **_how(scale, causal, window))
    return (*gradients, None)


attend.defvjp(_attend_forward, _attend_backward)


def _how(scale, causal, window):
    most = np.iinfo(np.int32).max if window is None else window
    return {"scale": np.float32(scale), "causal": causal, "window": np.int64(most)}


def _call(name: str, results):
    # Every call takes more axes before its own, and all operands then have them.
    return jax.ffi.ffi_call(f"assay_{name}", results, vmap_method="broadcast_all")
