"""Seeds trained side by side in one program (`vmap`) beside one after another, in the same run.

    python benchmarks/seeds.py [--seeds 2 3 5] [--turns 7] [--dtype float32 bfloat16]

Whole updates of small models: `micro` (2 layers, d 64, 12 x 32 tokens), `tiny-gpt` at 12 x 64, and
`nano` at 4 x 128 without dropout. A ratio over 1 says that side by side is faster; medians, and the
least and greatest, of turns that alternate.
"""

import argparse
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from assay.model.transformer import abstract
from assay.spec.presets import PRESETS
from assay.train.step import initial_state, make_step

STACK = "model.decoder"
MICRO = {
    "model.d_model": 64,
    f"{STACK}.num_layers": 2,
    f"{STACK}.pattern.0.feed_forward.hidden": 256,
    "data.seq_len": 32,
}
MODELS = {
    "micro": ("tiny-gpt", MICRO),
    "tiny-gpt": ("tiny-gpt", {}),
    "nano": ("nano", {"data.batch_size": 4, f"{STACK}.pattern.*.dropout": 0.0}),
}


def programs(run, seeds):
    """(one after another, side by side): functions that make one update of every seed."""
    rng = np.random.default_rng(0)
    shape = (seeds, run.data.batch_size, run.data.seq_len)
    batch = {
        name: rng.integers(run.model.vocab_size, size=shape, dtype=np.int32)
        for name in ("tokens", "targets")
    }
    states = [initial_state(run.replace(seed=seed)) for seed in range(seeds)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    step, share = make_step(run, abstract(run.model, run.compute)), np.float32(0)
    each = [{name: x[i] for name, x in batch.items()} for i in range(seeds)]
    alone = jax.jit(step, donate_argnums=0).lower(states[0], each[0], share).compile()
    wide = jax.jit(jax.vmap(step, (0, 0, None)), donate_argnums=0)
    together, held = wide.lower(stacked, batch, share).compile(), [stacked]

    def in_turn():
        for i in range(seeds):
            states[i], metrics = alone(states[i], each[i], share)
            jax.block_until_ready(metrics)

    def side_by_side():
        held[0], metrics = together(held[0], batch, share)
        jax.block_until_ready(metrics)

    return in_turn, side_by_side


def seconds(step, count):
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 5])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    for name in options.models:
        preset, changes = MODELS[name]
        for dtype in options.dtype:
            run = PRESETS[preset].run.changed(changes | {"compute.dtype": dtype})
            for seeds in options.seeds:
                steps = programs(run, seeds)
                for step in steps:
                    step()
                count = max(1, round(0.3 / seconds(steps[0], 2)))
                turns = [[seconds(s, count) for s in steps] for _ in range(options.turns)]
                ratios = [a / b for a, b in turns]
                print(
                    f"{name} {dtype}, {seeds} seeds: {1e3 * median(a for a, _ in turns):.1f} ms "
                    f"one after another, {1e3 * median(b for _, b in turns):.1f} side by side, "
                    f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
