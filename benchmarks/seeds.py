"""Several seeds of one model side by side in one program (`vmap`), against one after the other.

    python benchmarks/seeds.py [--seeds 4] [--reps 9] [PRESET:BATCHxTOKENS ...]

Whole updates, turn by turn; medians of milliseconds for all seeds, and their ratio (over 1: one
program is faster).
"""

import argparse
import statistics
import time

import jax
import numpy as np

from assay.model.transformer import abstract
from assay.spec.presets import PRESETS
from assay.startup import compute_in_the_calling_thread
from assay.train.step import initial_state, make_step

SHAPES = ("bigram:8x64", "tiny-gpt:4x32", "tiny-gpt:12x64", "nano:16x128", "baby-gpt:4x128")


def programs(shape: str, seeds: int):
    """(one after the other, side by side): each does one update of every seed."""
    preset, size = shape.split(":")
    rows, tokens = map(int, size.split("x"))
    run = PRESETS[preset].run.changed({"data.batch_size": rows, "data.seq_len": tokens})
    rng = np.random.default_rng(0)
    each = (seeds, rows, tokens)
    batch = {n: rng.integers(256, size=each, dtype=np.int32) for n in ("tokens", "targets")}
    run = run.replace(model=run.model.with_vocab(256))
    step = make_step(run, abstract(run.model, run.compute))

    def states():
        return [initial_state(run.replace(seed=seed)) for seed in range(seeds)]

    apart, update = states(), jax.jit(step, donate_argnums=0)
    rows_of = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(seeds)]
    together = jax.tree.map(lambda *x: jax.numpy.stack(x), *states())
    updates = jax.jit(jax.vmap(step, in_axes=(0, 0, None)), donate_argnums=0)

    def one_after_the_other():
        for seed in range(seeds):
            apart[seed], metrics = update(apart[seed], rows_of[seed], np.float32(0))
        return float(metrics["loss"])

    def side_by_side():
        nonlocal together
        together, metrics = updates(together, batch, np.float32(0))
        return float(metrics["loss"][-1])

    return one_after_the_other, side_by_side


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--reps", type=int, default=9)
    options = parser.parse_args()
    compute_in_the_calling_thread()
    print(f"{options.seeds} seeds, milliseconds for an update of each, {options.reps} turns")
    for shape in options.shapes:
        both, times = programs(shape, options.seeds), ([], [])
        first = [program() for program in both]
        np.testing.assert_allclose(*first, rtol=1e-4)
        for _ in range(options.reps):
            for program, seconds in zip(both, times, strict=True):
                began = time.perf_counter()
                program()
                seconds.append(time.perf_counter() - began)
        apart, together = (1e3 * statistics.median(seconds) for seconds in times)
        print(f"  {shape:16} {apart:8.1f} {together:8.1f}  {apart / together:5.2f}", flush=True)


if __name__ == "__main__":
    main()
