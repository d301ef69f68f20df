"""The report's figures as files, PNG and SVG: from the report's own plain data, by Matplotlib."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours (jfly.uni-koeln.de/color), told apart by colour-blind readers; without
# their yellow and black, which vanish on white or on a dark page. Dashes tell what they cannot.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
DASHES = ("solid", "dashed", "dashdot", "dotted")
AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
COSTS = {
    "params": "parameters",
    "train_flops": "training FLOPs",
    "seconds": "seconds of training",
    "kv_bytes": "cache bytes a token",
}


def look(i: int) -> dict[str, Any]:
    """The i-th line's colour and dashes."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
    }


def draw_figures(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws every figure that the data allow into `folder`, each as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for curve in data["curves"]:
        for axis in AXES:
            if any(axis in series["axes"] for series in curve["series"]):
                drawn[f"{curve['kind']}-{axis}"] = _curves(curve, axis, data["axes"][axis])
    if data["pairs"]:
        drawn["differences"] = _forest(data)
    if any(row["mean"] is not None for row in data["rows"]):
        drawn["pareto"] = _pareto(data["rows"], data["costs"])
    for i, experts in enumerate(data["experts"]):
        drawn[f"experts-{i}"] = _experts(experts)
    if data["scaling"] and data["scaling"]["fits"]:
        drawn["scaling"] = _scaling(data["scaling"], data["unit"])
        if any(fit["isoflops"] for fit in data["scaling"]["fits"].values()):
            drawn["isoflops"] = _isoflops(data["scaling"], data["unit"])
    return [path for name, figure in drawn.items() for path in save(figure, folder / name)]


def save(figure: "Figure", stem: Path) -> list[Path]:
    """Writes a figure as `stem`.png and .svg, each whole or not at all."""
    import matplotlib

    paths = []
    with matplotlib.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "path"}):
        for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            path = stem.with_name(f"{stem.name}.{kind}")
            begun = path.with_name(f".{path.name}.{os.getpid()}")
            figure.savefig(begun, format=kind, **options)
            os.replace(begun, path)
            paths.append(path)
    return paths


def _new(width: float = 8, height: float = 4.8, **grid: int):
    from matplotlib.figure import Figure  # the object alone: no window system, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(squeeze=False, **grid).flatten()
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _short(ax) -> None:
    """Few ticks on x, in few characters: 200k, 3.5T."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def plain(text: str) -> str:
    """A name as Matplotlib should draw it: no mathematics in it, and not hidden from legends."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def once(name: str, named: set[str]) -> str | None:
    """A name for the legend, or None where it is there already: rungs and seeds share theirs."""
    if name in named:
        return None
    named.add(name)
    return plain(name)


def _curves(curve: Mapping[str, Any], axis: str, label: str) -> "Figure":
    figure, (ax,) = _new()
    named = set()
    for series in curve["series"]:
        if axis not in series["axes"]:
            continue
        entry = series["axes"][axis]
        found = {name: _array(entry[name]) for name in ("x", "mean", "low", "high")}
        style = look(series["colour"])
        name = once(series["variant"], named)
        ax.plot(found["x"], found["mean"], label=name, linewidth=1.6, **style)
        if np.isfinite(found["low"]).all():
            ax.fill_between(
                found["x"], found["low"], found["high"], color=style["color"], alpha=0.18, lw=0
            )
    ax.set_xlabel(label)
    ax.set_ylabel(curve["label"])
    ax.set_title("mean over seeds, with the planned-n 95 % band of each place", fontsize=9)
    ax.legend(frameon=False)
    _short(ax)
    _clip_start(ax, curve["series"], axis)
    return figure


def _clip_start(ax, series: Sequence[Mapping[str, Any]], axis: str) -> None:
    """Shows the last nine tenths of the way at full height: the first fall would flatten all.

    Bands are shown as far down as the means are spread, since those of 2 seeds would too.
    """
    late, edges = [], []
    for entry in series:
        if axis in entry["axes"]:
            x, y, low = (_array(entry["axes"][axis][name]) for name in ("x", "mean", "low"))
            shown = x >= x[0] + (x[-1] - x[0]) * 0.1
            late += [*y[shown]]
            edges += [*low[shown & np.isfinite(low)]]
    if late:
        low, high = min(late), max(late)
        gap = high - low or 1
        bottom = max(min([low, *edges]), low - gap)
        ax.set_ylim(bottom - 0.05 * gap, high + 0.25 * gap)


def forest_reach(pairs: Sequence[Mapping[str, Any]], margin: float) -> float:
    """How far from 0 the figure of differences goes.

    Anytime-valid intervals are held in it too, but for ends at more than three times the others'.
    """
    near = [abs(v) for p in pairs for v in (*p["ci95"], p["difference"]) if v is not None]
    reach = max([*near, margin, 1e-9])
    wide = [abs(v) for p in pairs for v in p["anytime95"] if v is not None]
    return max([1.3 * reach, *(1.05 * v for v in wide if v <= 3 * reach)])


def _forest(data: Mapping[str, Any]) -> "Figure":
    pairs, margin, reach = data["pairs"], data["margin"], data["reach"]
    figure, (ax,) = _new(8, 1.6 + 0.5 * len(pairs))
    arrows = {}
    for i, pair in enumerate(pairs):
        y = len(pairs) - i
        style = {"color": _verdict_colour(pair["verdict"])}
        for ends, width, alpha in (
            (pair["anytime95"], 1.5, 0.8),
            (pair["ci95"], 5, 0.9),
        ):
            low, high = (
                side * reach * 2 if end is None else end
                for end, side in zip(ends, (-1, 1), strict=True)
            )
            ax.plot([low, high], [y, y], linewidth=width, alpha=alpha, **style)
            for end, drawn, mark in ((ends[0], low, "<"), (ends[1], high, ">")):
                if abs(drawn) > reach:  # it goes on
                    said = "infinite" if end is None else "too long to be shown"
                    arrows[said] = fill = "full" if end is None else "none"
                    at = [math.copysign(reach, drawn)]
                    ax.plot(at, [y], mark, clip_on=False, fillstyle=fill, **style)
        if pair["difference"] is not None:
            ax.plot([pair["difference"]], [y], "o", markersize=6, mec="white", **style)
    ax.axvline(0, color="0.3", linewidth=1)
    if margin:
        ax.axvspan(-margin, margin, color="0.5", alpha=0.15, lw=0)
    ax.set_xlim(-reach, reach)
    ax.set_ylim(0.4, len(pairs) + 0.6)
    ax.set_yticks(
        range(len(pairs), 0, -1),
        [plain(f"{p['a']} less {p['b']}: {p['verdict']}") for p in pairs],
    )
    ax.set_xlabel(f"difference in {data['unit']} (left: the first is better)")
    names = {"full": "filled", "none": "open"}
    figure.suptitle(  # over the names as well, which may take half of the width
        "thick: planned-n 95 %; thin: anytime-valid 95 %"
        + ("; shaded: the margin of equivalence" if margin else "")
        + "".join(f"\n{names[fill]} arrow: {said}" for said, fill in sorted(arrows.items())),
        fontsize=9,
    )
    return figure


def _verdict_colour(verdict: str) -> str:
    return {"better": COLOURS[0], "worse": COLOURS[4], "equivalent": COLOURS[2]}.get(verdict, "0.5")


def _pareto(rows: Sequence[Mapping[str, Any]], costs: Mapping[str, str]) -> "Figure":
    figure, axes = _new(9, 7, nrows=2, ncols=2)
    for ax, (cost, label) in zip(axes, costs.items(), strict=True):
        shown = [row for row in rows if row["mean"] is not None and row[cost] is not None]
        named = set()
        for row in shown:
            error = _errors(row)
            ax.errorbar(
                [row[cost]],
                [row["mean"]],
                yerr=error,
                fmt="o",
                color=look(row["colour"])["color"],
                capsize=3,
                label=once(row["variant"], named),
            )
        front = [row for row in shown if row["name"] in pareto_front(rows, cost)]
        front.sort(key=lambda row: row[cost])
        ax.step(
            [row[cost] for row in front],
            [row["mean"] for row in front],
            where="post",
            color="0.5",
            linewidth=1,
            linestyle="dashed",
            zorder=0,
        )
        ax.set_xlabel(label)
        places = [row[cost] for row in shown]
        if places and max(places) < 1.02 * min(places):  # equal by design: no axis of last digits
            ax.set_xlim(0.9 * min(places), 1.1 * max(places))
        _short(ax)
    for ax in axes[::2]:
        ax.set_ylabel("held-out bits per byte")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _errors(row: Mapping[str, Any]) -> list[list[float]] | None:
    low, high = row["ci95"]
    if low is None or high is None:
        return None
    return [[row["mean"] - low], [high - row["mean"]]]


def pareto_front(rows: Sequence[Mapping[str, Any]], cost: str) -> set[str]:
    """Names of rows that no other undercuts in both cost and loss."""
    known = [row for row in rows if row["mean"] is not None and row[cost] is not None]
    return {
        row["name"]
        for row in known
        if not any(
            other[cost] <= row[cost]
            and other["mean"] <= row["mean"]
            and (other[cost], other["mean"]) != (row[cost], row["mean"])
            for other in known
        )
    }


def _experts(experts: Mapping[str, Any]) -> "Figure":
    layers = experts["load"]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = _new(2 + 2.6 * columns, 1 + 2 * rows, nrows=rows, ncols=columns)
    steps = experts["steps"]
    for layer, ax in enumerate(axes):
        ax.grid(False)
        if layer >= len(layers):
            ax.set_axis_off()
            continue
        image = ax.imshow(
            layers[layer],
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(layers[layer]) - 0.5),
        )
        ax.set_title(f"layer of experts {layer}", fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.colorbar(image, ax=axes, label="load over the mean", extend="max")
    figure.suptitle(plain(f"{experts['name']}, seed {experts['seed']}"), fontsize=10)
    return figure


def _scaling(scaling: Mapping[str, Any], unit: str) -> "Figure":
    figure, (ax,) = _new()
    for i, (name, fit) in enumerate(scaling["fits"].items()):
        style = look(i)
        curve = {key: _array(values) for key, values in fit["curve"].items()}
        ax.plot(fit["points"]["flops"], fit["points"]["losses"], "o", ms=4, color=style["color"])
        ax.plot(curve["flops"], curve["loss"], label=plain(name), **style)
        ax.fill_between(
            curve["flops"], curve["low"], curve["high"], color=style["color"], alpha=0.15, lw=0
        )
    if scaling["outlook"]:
        ax.axvline(scaling["outlook"]["flops"], color="0.4", linestyle="dotted")
        ax.annotate(
            "target", (scaling["outlook"]["flops"], ax.get_ylim()[1]), fontsize=8, ha="right"
        )
    ax.set_xscale("log")
    ax.set_xlabel("training FLOPs")
    ax.set_ylabel(f"held-out {unit}")
    ax.legend(frameon=False)
    return figure


def _isoflops(scaling: Mapping[str, Any], unit: str) -> "Figure":
    figure, (ax,) = _new()
    named: set[str] = set()
    for i, (name, fit) in enumerate(scaling["fits"].items()):
        style, points = look(i), {key: _array(values) for key, values in fit["points"].items()}
        ax.plot(points["params"], points["losses"], "o", ms=3, alpha=0.6, color=style["color"])
        for parabola in (fit["isoflops"] or {"parabolas": ()})["parabolas"]:
            budget = np.abs(np.log(points["flops"] / parabola["flops"])) < 0.1
            sizes = points["params"][budget]
            x = np.geomspace(sizes.min(), sizes.max(), 60)
            y = parabola["loss"] + parabola["curvature"] * np.log(x / parabola["params"]) ** 2
            ax.plot(x, y, label=once(name, named), **style)
            if parabola["inside"]:
                least = [parabola["params"]], [parabola["loss"]]
                ax.plot(*least, "D", ms=8, mec="white", color=style["color"])
    ax.set_xscale("log")
    ax.set_xlabel("active parameters")
    ax.set_ylabel(f"held-out {unit}")
    ax.set_title("a parabola a budget; diamond: its least, where that was measured", fontsize=9)
    ax.legend(frameon=False)
    return figure


# ---------------------------------------------------------------------------- of a CSV


def draw_series(series: Sequence[Mapping[str, Any]], x_label: str, folder: Path) -> list[Path]:
    """The comparison figure of JAX-AttentionNet: a line a run, the raw index on a second axis.

    `series`: `name`, `x`, `y` and `index` (the row of each value) of each run; those of one
    `group`, if there is any, look alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure, ax = _series_axes(series, x_label)
    for run, style in zip(series, _looks(series), strict=True):
        ax.plot(run["x"], run["y"], linewidth=1.4, **style)
    ax.legend(frameon=False)
    return save(figure, folder / "losses")


def animate_series(
    series: Sequence[Mapping[str, Any]], x_label: str, folder: Path, frames: int = 40
) -> Path:
    """The same figure drawing itself from left to right, as `losses.gif`."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    folder.mkdir(parents=True, exist_ok=True)
    figure, ax = _series_axes(series, x_label)
    lines = [ax.plot([], [], **style)[0] for style in _looks(series)]
    ax.legend(frameon=False, loc="upper right")
    places = np.concatenate([np.asarray(run["x"], float) for run in series])
    ends = np.linspace(places.min(), places.max(), frames)

    def draw(frame: int):
        for line, run in zip(lines, series, strict=True):
            x, y = _array(run["x"]), _array(run["y"])
            shown = x <= ends[frame]
            line.set_data(x[shown], y[shown])
        return lines

    path = folder / "losses.gif"
    begun = folder / f".losses.{os.getpid()}.gif"
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for every frame
    movie = FuncAnimation(figure, draw, frames=frames, blit=False)
    movie.save(begun, writer=PillowWriter(fps=15), dpi=80)
    os.replace(begun, path)
    return path


def _looks(series: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Colour, dashes and legend of each run."""
    groups = [run.get("group", run["name"]) for run in series]
    places, named = {name: i for i, name in enumerate(dict.fromkeys(groups))}, set()
    return [look(places[name]) | {"label": once(name, named)} for name in groups]


def _series_axes(series: Sequence[Mapping[str, Any]], x_label: str):
    figure, (ax,) = _new(9, 5.2)
    x = np.concatenate([_array(run["x"]) for run in series])
    y = np.concatenate([_array(run["y"]) for run in series])
    index = np.concatenate([_array(run["index"]) for run in series])
    pad = 0.02 * (np.ptp(x) or 1)
    ax.set_xlim(x.min() - pad, x.max() + pad)
    ax.set_ylim(y.min() - 0.05 * (np.ptp(y) or 1), y.max() + 0.05 * (np.ptp(y) or 1))
    ax.set_xlabel(x_label)
    ax.set_ylabel("loss")
    places, first = np.unique(x, return_index=True)
    rows = np.maximum.accumulate(index[first])
    if len(places) > 1 and np.ptp(rows) > 0:
        # Strictly growing both ways, as an axis must be, and straight on beyond the ends.
        rows = rows + np.arange(len(rows)) * 1e-9

        def to_index(value):
            return _interpolated(value, places, rows)

        def to_x(value):
            return _interpolated(value, rows, places)

        second = ax.secondary_xaxis("top", functions=(to_index, to_x))
        second.set_xlabel("raw index")
    return figure, ax


def _interpolated(value, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    value = np.asarray(value, float)
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    inside = np.interp(value, x, y)
    below, above = np.minimum(value - x[0], 0), np.maximum(value - x[-1], 0)
    return inside + slope * (below + above)


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)
