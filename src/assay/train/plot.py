"""The pictures of a run, from `metrics.jsonl` alone: loss against tokens, and experts' loads.

And that of a coordinate check."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.train.coordinates import Coordinates


def load() -> None:
    """Imports what draws, where there is time to spare."""
    import matplotlib.figure  # noqa: F401


def plot_losses(
    out: Path, *, title: str, baselines: Mapping[str, float] | None = None
) -> Path | None:
    """Draws a run's losses into `loss.png` in its folder, in bits a byte where that is known.

    `baselines` are horizontal lines, by name. Returns the picture's path; None where there is
    nothing to draw yet.
    """
    from matplotlib.figure import Figure  # the object alone: no window system, no global state

    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    training = [r for r in records if "loss" in r]
    if not training:
        return None
    tokens_at = {r["step"]: r["tokens"] for r in training}
    gaps = [later["step"] - r["step"] for r, later in pairwise(training)]
    if len(gaps) > 1 and gaps[-1] < gaps[-2]:
        training = training[:-1]  # the mean of fewer losses than the others: noise
    bits = all("bpb" in r for r in training)
    unit = "val_bpb" if bits else "val_loss"
    held_out = [  # without bits where the held-out part has no bytes that are scored
        (tokens_at[r["step"]], r[unit])
        for r in records
        if r.get(unit) is not None and r["step"] in tokens_at
    ]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [r["tokens"] for r in training],
        [r["bpb" if bits else "loss_window"] for r in training],
        color="#2a6fdb",
        linewidth=1.5,
        label="training",
    )
    if held_out:
        style = {"color": "#d1495b", "marker": "o", "markersize": 5, "linewidth": 1.2}
        axes.plot(*zip(*held_out, strict=True), label="held out", **style)
        axes.annotate(
            f"{held_out[-1][1]:.3f}",
            held_out[-1],
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color="#d1495b",
        )
    for (name, level), dash in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(level, color="0.45", linestyle=dash, linewidth=1, label=f"{name} {level:.3f}")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("bits per byte" if bits else "loss (nats per token)")
    axes.set_title(title)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = out / "loss.png"
    figure.savefig(picture)
    return picture


def plot_experts(out: Path, *, title: str) -> Path | None:
    """Draws how the load of each layer's experts changed over training, into `experts.png`.

    A column is a logged step's histogram: an expert's share of the layer's choices, 1 where all
    are loaded alike. Over it two lines, shares of the height: the router's entropy (solid; the
    top is log E, all experts alike) and the dropped choices (dotted; the top is all of them).
    Returns the picture's path; None where the model has no experts.
    """
    from matplotlib.figure import Figure

    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r.get("expert_load")]
    if not records:
        return None
    layers = len(records[0]["expert_load"])
    columns = min(4, layers)
    rows = -(-layers // columns)
    figure = Figure(figsize=(2 + 2.6 * columns, 0.8 + 2 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    steps = [r["step"] for r in records]
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_axis_off()
            continue
        experts = len(records[0]["expert_load"][layer])
        # Transposed by hand: an expert a row, a step a column.
        loads = [[experts * r["expert_load"][layer][e] for r in records] for e in range(experts)]
        image = axes.imshow(
            loads,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, experts - 0.5),
        )
        entropy, dropped = (
            [r[of][layer] for r in records] for of in ("router_entropy", "dropped_share")
        )
        about = f"layer of experts {layer}: entropy {entropy[-1]:.2f}, {dropped[-1]:.1%} dropped"
        axes.set_title(about, fontsize=7)
        # Both as shares of the height: of log E, and of all choices.
        height = experts - 1
        for shares, style in (([e / math.log(experts) for e in entropy], "-"), (dropped, ":")):
            axes.plot(steps, [share * height for share in shares], style, color="black", lw=0.8)
    figure.supxlabel("step; solid: entropy of log E, dotted: dropped share", fontsize=8)
    figure.supylabel("expert", fontsize=9)
    figure.colorbar(image, ax=grid, label="load over the mean", extend="max")
    figure.suptitle(title, fontsize=10)
    picture = out / "experts.png"
    figure.savefig(picture)
    return picture


def plot_coordinates(path: Path, forms: Sequence["Coordinates"], *, title: str) -> None:
    """Draws a coordinate check: each part's change after each update against the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(forms), sharey=True)
    for ax, form in zip(axes, forms, strict=True):
        for i, part in enumerate(form.parts):
            for step, changes in enumerate(part.changes[1:], start=1):
                last = step == len(part.changes) - 1
                ax.plot(
                    form.widths,
                    changes,
                    color=f"C{i % 10}",
                    alpha=1.0 if last else 0.25,
                    marker="o" if last else None,
                    markersize=4,
                    linewidth=1.5 if last else 0.8,
                    label=f"{part.name} ({part.slope:+.2f})" if last else None,
                )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(form.widths, [str(width) for width in form.widths])
        ax.set_xlabel("d_model")
        name = "muP" if form.parametrisation == "mup" else "standard parametrisation"
        ax.set_title(f"{name}, {form.optimizer}", fontsize=10)
        ax.grid(alpha=0.25)
        # Below: within, it would lie on a line, wherever that is.
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "frameon": False}
        ax.legend(fontsize=7, title="part (slope)", title_fontsize=7, ncols=2, **below)
    updates = len(forms[0].parts[0].changes) - 1
    axes[0].set_ylabel(f"change in up to {updates} updates (RMS)")
    figure.suptitle(f"{title}: what changes more, the wider the model?", fontsize=11)
    figure.savefig(path)
