"""What experts cost beside a dense MLP of equal active size: forward and backward, one layer.

    python benchmarks/moe_dispatch.py [--reps 7] [--dtype float32] [--skip ragged]

4,096 tokens, d 384, 8 experts of 768, top-2, against one MLP of 1,536. The programs take turns,
so that what else the machine does falls on all alike; medians, and their ratio to the dense MLP's.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from assay.model.layers import Mlp
from assay.model.moe import Moe
from assay.spec.model import CapacitySpec, MlpSpec, MoeSpec, NormalInit, TopK
from assay.spec.run import ComputeSpec

ROWS, LENGTH, D, HIDDEN, EXPERTS, K = 16, 256, 384, 768, 8, 2


def step(layer, x):
    """The function that is timed, compiled: output summed, and every gradient."""

    def loss(layer, x):
        y = layer(x, train=True)[0] if isinstance(layer, Moe) else layer(x)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(layer, x).compile()
    return lambda: jax.block_until_ready(compiled(layer, x))


def programs(dtype, skip):
    init = {"init": NormalInit(), "residual_init": NormalInit(), "residual_scale": 1.0}
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, D)).astype(dtype)
    dense = MlpSpec(hidden=K * HIDDEN)
    yield "dense MLP", step(Mlp(jax.random.key(0), D, dense, **init, compute=ComputeSpec()), x)
    spec = MoeSpec(experts=EXPERTS, expert=MlpSpec(hidden=HIDDEN), router=TopK(k=K))
    limited = spec.replace(capacity=CapacitySpec(load=1.25))
    for name, dispatch, moe, kernels in (
        ("auto", "auto", spec, "auto"),
        ("blocks", "blocks", spec, "auto"),
        ("capacity 1.25", "capacity", limited, "auto"),
        ("dense dispatch", "dense", spec, "auto"),
        # As small projects have it: every expert on every token, by autodiff.
        ("and plainly", "dense", spec, "plain"),
        ("ragged", "ragged", spec, "plain"),
    ):
        if dispatch not in skip:
            compute = ComputeSpec(moe_dispatch=dispatch, kernels=kernels)
            yield name, step(Moe(jax.random.key(0), D, moe, **init, compute=compute), x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--skip", nargs="*", default=[])
    options = parser.parse_args()
    for dtype in options.dtype:
        timed = dict(programs(dtype, options.skip))
        times = {name: [] for name in timed}
        for program in timed.values():
            program()
        for _ in range(options.reps):
            for name, program in timed.items():
                began = time.perf_counter()
                program()
                times[name].append(time.perf_counter() - began)
        medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
        print(f"{dtype}, milliseconds of {options.reps} turns, and over the dense MLP")
        for name, milliseconds in medians.items():
            print(f"  {name:15} {milliseconds:8.1f}  {milliseconds / medians['dense MLP']:5.2f}")


if __name__ == "__main__":
    main()
