"""The picture of a run: loss against tokens, from `metrics.jsonl` alone."""

import json
from collections.abc import Mapping
from pathlib import Path


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
    bits = all("bpb" in r for r in training)
    held_out = [
        (tokens_at[r["step"]], r["val_bpb" if bits else "val_loss"])
        for r in records
        if "val_loss" in r and r["step"] in tokens_at
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
