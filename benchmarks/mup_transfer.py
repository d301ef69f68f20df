"""Does the best learning rate of a narrow model suit a wide one? Under muP, and without.

    python benchmarks/mup_transfer.py --out mup-transfer.json --picture mup-transfer.png

Two layers, 64 bytes a row, 8 rows, the same batches for all; rates on a grid of factors of two.
A figure is the mean training loss over the last 20 of 120 updates and over 2 seeds.
"""

import argparse
import json
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from assay.model.transformer import Transformer, abstract
from assay.spec import presets
from assay.spec.model import Mup
from assay.spec.run import LinearSchedule, RunSpec
from assay.train.step import TrainState, make_step, optimizer_of

WIDTHS = (64, 256)
UPDATES, LAST = 120, 20
ROWS, LENGTH = 8, 64
SEEDS = (0, 1)  # of the parameters and of the batches
GRIDS = {
    "adamw": [2.0**i / 1000 for i in range(5)],  # 0.001 ... 0.016
    "muon": [0.005 * 2.0**i for i in range(6)],  # 0.005 ... 0.16
}


def run_of(width: int, optimizer: str, form: str) -> RunSpec:
    """The wide model narrowed; the narrowest width is muP's base."""
    wide = presets.get("nano").model.changed(
        {
            "d_model": max(WIDTHS),
            "vocab_size": 257,
            "context": LENGTH,
            "decoder.num_layers": 2,
            "decoder.pattern.*.feed_forward.hidden": 4 * max(WIDTHS),
            "decoder.pattern.*.dropout": 0.0,
            "embedding.dropout": 0.0,
        }
    )
    mup = Mup(base_width=min(WIDTHS)) if form == "mup" else None
    model = wide.at_width(width).replace(mup=mup)
    run = presets.get("nano").run.replace(model=model, schedule=LinearSchedule(warmup=10))
    return run.changed({"optimizer": optimizer, "compute.dtype": "float32"})


def losses_of(run: RunSpec, rates: list[float], text: np.ndarray) -> list[float]:
    """The last training losses at each rate: the program is compiled once, the rate its input."""
    model = abstract(run.model, run.compute)
    step = make_step(run, model)
    full = run.optimizer.lr

    @jax.jit
    def train(rate, key, windows):
        params = nnx.to_pure_dict(nnx.state(Transformer(run.model, run.compute, rngs=key)))
        state = TrainState(params, optimizer_of(run, model).init(params), jnp.int32(0), key)

        def one(state, batch):
            progress = state.step / UPDATES
            given = {"tokens": batch[:, :-1], "targets": batch[:, 1:]}
            after, metrics = step(state, given, progress)
            # The update is the full rate's; a rate is a share of it.
            params = jax.tree.map(
                lambda old, new: old + rate / full * (new - old), state.params, after.params
            )
            return TrainState(params, after.optimizer, after.step, after.key), metrics["loss"]

        return jnp.mean(jax.lax.scan(one, state, windows)[1][-LAST:])

    def loss(rate, seed):
        starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, (UPDATES, ROWS))
        windows = jnp.asarray(text[starts[..., None] + np.arange(LENGTH + 1)], jnp.int32)
        return float(train(jnp.float32(rate), jax.random.key(seed), windows))

    return [float(np.mean([loss(rate, seed) for seed in SEEDS])) for rate in rates]


def sweep(optimizer: str, form: str) -> dict[int, list[float]]:
    """The losses of each width at each rate of the grid."""
    text = "\n".join(topics.values())[:400_000].encode()  # as the corpus python-docs
    data = np.frombuffer(text, np.uint8)
    return {w: losses_of(run_of(w, optimizer, form), GRIDS[optimizer], data) for w in WIDTHS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--picture")
    parser.add_argument("--forms", default="mup,standard")
    args = parser.parse_args()
    found = {}
    for optimizer in GRIDS:
        for form in args.forms.split(","):
            began = time.time()
            found[f"{optimizer} {form}"] = losses = sweep(optimizer, form)
            for width, row in losses.items():
                best = GRIDS[optimizer][int(np.argmin(row))]
                shown = " ".join(f"{loss:.3f}" for loss in row)
                print(f"{optimizer:6} {form:9} {width:4}  {shown}  best at {best:g}", flush=True)
            print(f"  {time.time() - began:.0f} s", flush=True)
            with open(args.out, "w") as file:
                json.dump({"grids": GRIDS, "losses": found}, file, indent=1)
    if args.picture:
        draw(found, args.picture)


def draw(found: dict[str, dict[int, list[float]]], path: str) -> None:
    from matplotlib.figure import Figure

    forms = [*dict.fromkeys(name.split()[1] for name in found)]
    figure = Figure(figsize=(8, 3.2 * len(GRIDS)), dpi=100, layout="constrained")
    axes = figure.subplots(len(GRIDS), len(forms), squeeze=False, sharey="row")
    for row, optimizer in zip(axes, GRIDS, strict=True):
        for ax, form in zip(row, forms, strict=True):
            for i, (width, losses) in enumerate(found[f"{optimizer} {form}"].items()):
                best = int(np.argmin(losses))
                ax.plot(GRIDS[optimizer], losses, marker="o", markersize=3, color=f"C{i}")
                at = GRIDS[optimizer][best], losses[best]
                ax.plot(*at, marker="o", markersize=8, color=f"C{i}", label=f"width {width}")
            ax.set_xscale("log", base=2)
            ax.set_xticks(GRIDS[optimizer], [f"{rate:g}" for rate in GRIDS[optimizer]], fontsize=7)
            name = {"mup": "muP", "standard": "standard"}[form]
            ax.set_title(f"{optimizer}, {name}", fontsize=10)
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8)
        row[0].set_ylabel("training loss (nats a byte)")
    for ax in axes[-1]:
        ax.set_xlabel("learning rate")
    figure.savefig(path)


if __name__ == "__main__":
    main()
