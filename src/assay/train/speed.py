"""The most that a device could do, so that a run can say what share of it was used."""

import os
import time
from functools import cache

import jax
import jax.numpy as jnp

PEAK_BFLOAT16 = {
    # Dense bfloat16 FLOPs a second of one device, as the makers publish them.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

USABLE = 0.92
"""The share of a device's memory that a program may have: the rest is the runtime's."""


def take_what_is_planned_of_a_gpu() -> None:
    """JAX by itself takes three quarters of a GPU's memory; a plan counts on `USABLE` of it.

    What the user has set is left as it is. Once JAX has its devices, nothing changes.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = str(USABLE)


@cache
def peak_flops(dtype: str, devices: int = 1) -> float | None:
    """FLOPs a second of `devices` of this kind; None where the kind is not known.

    A CPU has no published figure that says much: it is measured, by a matrix product of 2,048.
    Simulated CPU devices share one machine.
    """
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        return _measured(dtype)
    known = [peak for name, peak in PEAK_BFLOAT16.items() if kind.startswith(name)]
    return devices * known[-1] if known else None


@cache
def memory_bandwidth() -> float:
    """Bytes a second that this CPU reads and writes, measured on a sum over 256 MB."""
    x = jnp.ones(2**26, jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / _best_seconds(total, x)


def _measured(dtype: str) -> float:
    size = 2048
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _best_seconds(jax.jit(jnp.matmul), x, x)


def _best_seconds(function, *arguments) -> float:
    """The shortest of three runs, after one that compiles."""
    function(*arguments).block_until_ready()
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        function(*arguments).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return best
