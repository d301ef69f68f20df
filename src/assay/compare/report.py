"""The report of a comparison: one HTML file that needs no network, its figures, and losses.csv.

It reads results.json, or a CSV with columns `"<run> - loss"`, and never a model. All numbers that
it shows are of the results, or made of their runs by `statistics.py`, `curves.py` and
`scaling.py`; the page only draws them.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from assay.compare import figures
from assay.compare.block_diagram import draw_diagram
from assay.compare.curves import Curve, common_grid, crossings, curve_features, on_grid
from assay.compare.results import FILE, Results, RunRecord, read_results
from assay.compare.statistics import mean_interval, probability_best, rank_ranges
from assay.errors import AssayError

LOSS = " - loss"
STEPS = ("Step", "step", "_step", "Epoch", "epoch", "tokens")
UNIT = "bits per byte"
NOTHING = "\N{EN DASH}"  # in a cell without a number
NAMES = {
    "flops": "training FLOPs",
    "params": "parameters",
    "active_params": "active parameters",
    "flops_per_token": "FLOPs a token",
}


@dataclass(frozen=True)
class Drawn:
    """What was written: the page, the figures (PNG, SVG, GIF), and the names of the series."""

    report: Path
    series: tuple[str, ...]
    figures: tuple[Path, ...]


def draw(source: Results | Path | str, out: Path | str, *, animate: bool = False) -> Drawn:
    """Draws a comparison, or a CSV of losses, into the folder `out`.

    Of a comparison: `report.html`, `losses.csv`, and `figures/` with each figure as PNG and SVG.
    Of a CSV: `report.html` and `figures/losses.png`, `.svg`. With `animate` also
    `figures/losses.gif`, the losses drawing themselves. Each file is written whole or not at all,
    and takes the place of an earlier drawing, but of nothing else.

    Args:
        source: results, a folder that holds results.json, that file, or a CSV.

    Raises:
        AssayError: if there is nothing of that kind to read, or if the folder holds what is no
            drawing of it.
    """
    out = Path(out)
    if not isinstance(source, Results):
        path = Path(source)
        if path.is_file() and path.suffix.lower() == ".csv":
            _refuse_others(out, None)
            return _draw_csv(path, out, animate)
        if not path.exists():
            raise AssayError(
                f"{path}: there is no such file or folder; give a comparison's folder, its "
                f"{FILE}, or a CSV with columns '<run>{LOSS}'."
            )
        source = read_results(path)
        _refuse_others(out, path if path.is_dir() else path.parent)
    return _draw_results(source, out, animate)


GENERATOR = b'<meta name="generator" content="Assay">'


def _refuse_others(out: Path, comparison: Path | None) -> None:
    """What lies in the folder is kept, unless it is an earlier drawing.

    Raises:
        AssayError: if it is another comparison's folder, or holds a report or figures of others.
    """
    if (out / FILE).exists():
        if comparison is None or not out.samefile(comparison):
            raise AssayError(f"{out}: it holds a comparison; name another folder by --out.")
        return
    page = out / "report.html"
    if page.is_file() and GENERATOR in page.read_bytes()[:4096]:
        return
    for name in ("report.html", "figures", *(["losses.csv"] if comparison else [])):
        if (out / name).exists():
            raise AssayError(
                f"{out / name}: it is there already, and was not drawn by 'assay report'; nothing "
                f"is overwritten: name another folder by --out."
            )


# ---------------------------------------------------------------------------- of results


def _draw_results(results: Results, out: Path, animate: bool) -> Drawn:
    data = page_data(results)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "losses.csv", losses_csv(results))
    drawn = figures.draw_figures(data, out / "figures")
    series = read_series(out / "losses.csv")[0] if data["runs_with_losses"] else []
    variants = {run.name: run.variant for run in results.runs}
    series = [run | {"group": variants[run["name"]]} for run in series]
    if series:
        drawn += figures.draw_series(series, "step", out / "figures")
        if animate:
            drawn.append(figures.animate_series(series, "step", out / "figures"))
    _write(out / "report.html", page(data, results))
    return Drawn(out / "report.html", tuple(run["name"] for run in series), tuple(drawn))


def page_data(results: Results) -> dict[str, Any]:
    """All that the figures show, as plain data that JSON takes (an infinite end is None)."""
    rows = _rows(results)
    curves = [
        curve
        for kind, label in (
            ("train_loss", "training loss (nats a token)"),
            ("val_bpb", f"held-out {UNIT}"),
        )
        if (curve := _curves(results, kind, label))["series"]
    ]
    shared = "" if results.environment.seconds_comparable else " (on a shared machine)"
    unit, *equal = results.design.matched
    pairs = [pair.model_dump(mode="json") | {"n": len(pair.seeds)} for pair in results.pairs]
    return _plain(
        {
            "title": results.title,
            "sentence": results.sentence,
            "unit": UNIT,
            "budget": f"{_amounts(results)} {NAMES.get(unit, unit)}",
            "equal": [NAMES.get(quantity, quantity) for quantity in equal],
            "margin": results.design.margin,
            "rows": rows,
            "pairs": pairs,
            "reach": figures.forest_reach(pairs, results.design.margin),
            "curves": curves,
            "features": _features(results),
            "crossings": _crossings(results),
            "experts": _experts(results),
            "scaling": results.scaling if (results.scaling or {}).get("fits") else None,
            "decision": results.decision and results.decision.model_dump(mode="json"),
            "warnings": warnings(results),
            "axes": figures.AXES | {"seconds": figures.AXES["seconds"] + shared},
            "costs": figures.COSTS | {"seconds": figures.COSTS["seconds"] + shared},
            "colours": figures.COLOURS,
            "runs_with_losses": sum(bool(run.curve) for run in results.runs),
        }
    )


def _amounts(results: Results) -> str:
    """What a run may spend; of a ladder from the least to the most."""
    every = results.design.amount
    rungs = results.experiment.get("ladder", {}).values()
    amounts = [rung["amount"] or every for rung in rungs] or [every]
    return " to ".join(dict.fromkeys([si(min(amounts)), si(max(amounts))]))


def runs_of(results: Results, row: Any) -> list[RunRecord]:
    """A row's finished runs, in the plan's order of seeds."""
    order = {seed: i for i, seed in enumerate(results.design.seeds)}
    found = [
        run
        for run in results.runs
        if (run.variant, run.rung) == (row.variant, row.rung) and run.status == "done"
    ]
    return sorted(found, key=lambda run: (order.get(run.seed, len(order)), run.seed))


def _rows(results: Results) -> list[dict[str, Any]]:
    colours = _colours(results)
    rows = []
    for place, rung in enumerate(dict.fromkeys(row.rung for row in results.rows)):
        members = [row for row in results.rows if row.rung == rung]
        names = [row.name for row in members]
        pairs = [p for p in results.pairs if p.a in names and p.b in names]
        ranges = rank_ranges(names, pairs)
        best = _best(results, members)
        for row in members:
            record = row.model_dump(mode="json", exclude={"spec", "diagram"})
            record |= {
                "mean": row.val_bpb_mean,
                "ci95": row.val_bpb_ci95,
                "anytime95": row.val_bpb_anytime95,
                "kv_bytes": row.kv_bytes_per_token,
                "ranks": ranges[row.name] if row.rank is not None else None,
                "best": best.get(row.name),
                "colour": colours[row.variant],
                "n": len(row.seeds),
                "order": (place, len(members) if row.rank is None else row.rank),
            }
            rows.append(record)
    return rows


def _colours(results: Results) -> dict[str, int]:
    """A variant has one colour, at whatever rung of a ladder."""
    return {name: i for i, name in enumerate(dict.fromkeys(r.variant for r in results.rows))}


def last_rung(results: Results) -> list[Any]:
    """The rows that stand for their variants: all, or those of a ladder's last rung."""
    return [row for row in results.rows if row.rung == results.rows[-1].rung]


def _best(results: Results, rows: Sequence[Any]) -> dict[str, float]:
    """The probability of being best, by name, where two seeds are whole."""
    scores = []
    for row in rows:
        by_seed = {run.seed: run.val_bpb for run in runs_of(results, row)}
        scores.append([by_seed.get(seed) for seed in results.design.seeds])
    if not scores or not scores[0]:
        return {}
    found = probability_best(np.array(scores, float))
    return {row.name: float(p) for row, p in zip(rows, found, strict=True) if math.isfinite(p)}


def _points(run: RunRecord, kind: str, axis: str) -> Curve:
    points = [p for p in run.curve if getattr(p, kind) is not None]
    return [getattr(p, axis) for p in points], [getattr(p, kind) for p in points]


def _curves(results: Results, kind: str, label: str) -> dict[str, Any]:
    series, colours = [], _colours(results)
    for row in results.rows:
        runs = runs_of(results, row)
        axes = {}
        for axis in figures.AXES:
            each = [_points(run, kind, axis) for run in runs]
            kept = [(run, curve) for run, curve in zip(runs, each, strict=True) if len(curve[0])]
            if not kept:
                continue
            entry = _banded([curve for _, curve in kept])
            if entry is not None:
                axes[axis] = entry
        if axes:
            look = {"variant": row.variant, "colour": colours[row.variant]}
            series.append({"name": row.name, "axes": axes} | look)
    return {"kind": kind, "label": label, "series": series}


def _banded(curves: Sequence[Curve]) -> dict[str, Any] | None:
    """Mean and band on places that suit a linear and a logarithmic axis alike."""
    linear, log = common_grid(curves, 150), common_grid(curves, 100, log=True)
    grid = np.unique(np.concatenate([linear, log]))
    if len(grid) == 0:
        return None
    most = max(len(x) for x, _ in curves)
    if most < len(grid):  # few measured places: show those, and nothing in between
        x = np.unique(np.concatenate([np.asarray(x, float) for x, _ in curves]))
        grid = x[(x >= grid[0]) & (x <= grid[-1])]
    values = on_grid(curves, grid)
    low, high = mean_interval(values.T)
    return {
        "x": grid.tolist(),
        "mean": values.mean(0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "n": len(curves),
    }


def _features(results: Results) -> list[dict[str, Any]]:
    """Slope, floor and smoothness of each row's training loss against tokens."""
    found = []
    for row in results.rows:
        each = [
            asdict(curve_features(*_points(run, "train_loss", "tokens")))
            for run in runs_of(results, row)
            if run.curve
        ]
        if not each:
            continue
        entry: dict[str, Any] = {"name": row.name}
        for name in each[0]:
            values = np.array([features[name] for features in each])
            values = values[np.isfinite(values)]
            ends = mean_interval(values) if len(values) > 1 else (-math.inf, math.inf)
            entry[name] = {
                "mean": float(values.mean()) if len(values) else None,
                "ci95": [float(end) for end in ends],
            }
        found.append(entry)
    return found


def _crossings(results: Results) -> list[dict[str, Any]]:
    """Where the curves of two rows of one rung cross: of held-out scores if there are enough."""
    found = []
    for a, b in combinations(results.rows, 2):
        if a.rung != b.rung:
            continue
        of_a = {run.seed: run for run in runs_of(results, a)}
        of_b = {run.seed: run for run in runs_of(results, b)}
        seeds = [seed for seed in of_a if seed in of_b]
        if not seeds:
            continue
        scored = all(
            sum(p.val_bpb is not None for p in run.curve) >= 5
            for seed in seeds
            for run in (of_a[seed], of_b[seed])
        )
        kind = "val_bpb" if scored else "train_loss"
        for axis in figures.AXES:
            curves = [[_points(of[s], kind, axis) for s in seeds] for of in (of_a, of_b)]
            if not all(len(x) for side in curves for x, _ in side):
                continue
            found += [
                {"a": a.name, "b": b.name, "axis": axis, "kind": kind} | asdict(crossing)
                for crossing in crossings(*curves, points=200, resamples=300)
            ]
    return found


def _experts(results: Results) -> list[dict[str, Any]]:
    """The loads over training of each row with experts, of its first seed."""
    found, shown = [], {row.name for row in last_rung(results)}
    for row in results.rows:
        for run in runs_of(results, row):
            loads = run.experts
            if loads is None or not loads.steps:
                continue
            # [step][layer][expert] shares, to [layer][expert][step] in units of the mean.
            layers = [
                (np.array([step[layer] for step in loads.load]).T * len(loads.load[0][layer]))
                for layer in range(len(loads.load[0]))
            ]
            found.append(
                {
                    "name": row.name,
                    "seed": run.seed,
                    "shown": row.name in shown,
                    "steps": list(loads.steps),
                    "load": [layer.tolist() for layer in layers],
                    "dropped": [float(share) for share in loads.dropped[-1]]
                    if loads.dropped
                    else [],
                }
            )
            break
    return found


def warnings(results: Results) -> list[str]:
    """What a reader must know before believing a row: sentences."""
    found = []
    design, planned = results.design, len(results.design.seeds)
    if not results.complete:
        done = sum(run.status == "done" for run in results.runs)
        found.append(f"Not finished: {done} of {len(results.runs)} runs are done.")
    for row in results.rows:
        missing = planned - len(row.seeds)
        if missing > 0 and results.complete:
            found.append(
                f"{row.name} has {len(row.seeds)} of {planned} planned seeds. A run that diverged "
                f"is not left out of a verdict, it prevents one."
            )
        found += [f"{row.name}: {flag}" for flag in row.flags]
        found += [
            f"{row.name}: the check {check.name} did not pass ({check.where})."
            for check in row.checks
            if not check.passed
        ]
    found += [f"{run.name} failed: {run.error}" for run in results.runs if run.status == "failed"]
    found += _doubts(results.scaling or {})
    if planned < 5:
        found.append(
            f"{planned} planned seeds are few. The interval of a deviation from so few is wide, "
            f"and only large differences can be told."
        )
    endless = [p for p in results.pairs if None in tuple(p.anytime95)]
    if endless:
        found.append(
            f"{len(endless)} of {len(results.pairs)} anytime-valid intervals are infinite at this "
            f"number of seeds: nothing can be said of these pairs that would hold at every look."
        )
    if results.pairs and not design.margin:
        found.append("No margin was declared, so no pair can be called equivalent.")
    return [*dict.fromkeys([*found, *results.notes])]


def _doubts(scaling: Mapping[str, Any]) -> list[str]:
    """Where the fits were further off than the variants that they rank are apart."""
    there = scaling.get("outlook") or {"predicted": {}}
    losses = sorted(loss for loss in there["predicted"].values() if loss is not None)
    misses = [abs(f["held_out"]["miss"]) for f in scaling.get("fits", {}).values() if f["held_out"]]
    if len(losses) < 2 or not misses or max(misses) <= losses[1] - losses[0]:
        return []
    return [
        f"Fitted to the smaller budgets, the laws missed the largest by up to {max(misses):.4f} "
        f"bits per byte; at the target the first two variants are {losses[1] - losses[0]:.4f} "
        f"apart. The probabilities take the laws to be right."
    ]


# ---------------------------------------------------------------------------- losses.csv


def losses_csv(results: Results) -> str:
    """A column `"<run> - loss"` for each run with losses, by step; its end is left empty."""
    runs = [run for run in results.runs if any(p.train_loss is not None for p in run.curve)]
    losses = [{p.step: p.train_loss for p in run.curve if p.train_loss is not None} for run in runs]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Step", *(f"{run.name}{LOSS}" for run in runs)])
    for step in sorted({step for run in losses for step in run}):
        writer.writerow([step, *(_cell(run.get(step)) for run in losses)])
    return text.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def read_series(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The runs of a CSV with columns `"<run> - loss"` (a Weights & Biases export), and x's name.

    x is the first column of steps or epochs, if there is one, else the row's number. What is
    empty or no finite number is left out: trailing gaps, so that runs have several lengths, and
    the gaps of runs that were logged at other steps.

    Raises:
        AssayError: if there is no such column, or none has a value.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AssayError(f"{path}: it cannot be read as a CSV ({error}).") from None
    header = [name.strip() for name in table[0]] if table else []
    columns = [i for i, name in enumerate(header) if name.endswith(LOSS) and name != LOSS]
    if not columns:
        raise AssayError(
            f"{path}: found the columns {', '.join(map(repr, header[:6])) or 'none'}; at least "
            f"one must be named '<run>{LOSS}'."
        )
    by = next((header.index(name) for name in STEPS if name in header), None)
    body = table[1:]
    places = [_number(row, by) if by is not None else float(i) for i, row in enumerate(body)]
    if any(place is None for place in places):
        by, places = None, [float(i) for i in range(len(body))]
    series = []
    for column in columns:
        kept = [
            (places[i], value, i)
            for i, row in enumerate(body)
            if (value := _number(row, column)) is not None
        ]
        if kept:
            x, y, index = (list(values) for values in zip(*kept, strict=True))
            name = header[column].removesuffix(LOSS)
            series.append({"name": name, "x": x, "y": y, "index": index})
    if not series:
        raise AssayError(f"{path}: its columns '<run>{LOSS}' hold no numbers.")
    return series, header[by] if by is not None else "row"


def _number(row: Sequence[str], column: int) -> float | None:
    try:
        value = float(row[column])
    except (IndexError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _draw_csv(path: Path, out: Path, animate: bool) -> Drawn:
    series, x_label = read_series(path)
    drawn = figures.draw_series(series, x_label, out / "figures")
    if animate:
        drawn.append(figures.animate_series(series, x_label, out / "figures"))
    for run in series:
        run["features"] = asdict(curve_features(run["x"], run["y"]))
    data = _plain(
        {
            "title": path.stem,
            "series": series,
            "x_label": x_label,
            "axes": figures.AXES,
            "colours": figures.COLOURS,
        }
    )
    _write(out / "report.html", page(data, None))
    return Drawn(out / "report.html", tuple(run["name"] for run in series), tuple(drawn))


# ---------------------------------------------------------------------------- the page


def page(data: Mapping[str, Any], results: Results | None) -> str:
    """The whole HTML text: style, Plotly and data are in it, and nothing is fetched."""
    return _template().render(
        data=data,
        results=results,
        embedded=embedded(data),
        plotly=_plotly(),
        script=_part("report.js"),
        style=_part("report.css"),
        shown=last_rung(results) if results else [],
        diagrams=_diagrams(results),
    )


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no `<`, so no `</script>` and no `<!--`."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _diagrams(results: Results | None) -> dict[str, str]:
    return {row.name: draw_diagram(row.spec) for row in last_rung(results)} if results else {}


def _part(name: str) -> str:
    return (resources.files("assay.compare") / "page" / name).read_text()


@lru_cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _template():
    from jinja2 import Environment
    from markupsafe import Markup, escape

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "si": si,
        "bpb": lambda v: NOTHING if v is None else f"{v:.4f}",
        "signed": lambda v: NOTHING if v is None else f"{v:+.4f}",
        "ends": ends,
        "p": lambda v: NOTHING if v is None else "< 0.0001" if v < 1e-4 else f"{v:.4f}",
        "share": lambda v: NOTHING if v is None else f"{v:.0%}",
        "number": lambda v: NOTHING if v is None else f"{v:.4g}",
        "dotted": lambda path: escape(path).replace(".", Markup(".<wbr>")),  # may be broken there
    }
    return environment.from_string(_part("report.html"))


def si(value: float | None) -> str:
    """A count in few characters: 1.23M, 4.5e+18 where letters end."""
    if value is None:
        return NOTHING
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 1e18 > abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def ends(interval: Iterable[float | None], form: str = ".4f") -> str:
    """An interval in words: numbers, or that it is infinite."""
    low, high = interval
    if low is None and high is None:
        return "infinite"
    left = "\N{MINUS SIGN}∞" if low is None else f"{low:{form}}"
    right = "∞" if high is None else f"{high:{form}}"
    return f"{left} to {right}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    begun.write_text(text, encoding="utf-8")
    os.replace(begun, path)


def _plain(data: Any) -> Any:
    """Numbers that JSON does not have become None, tuples lists."""
    if isinstance(data, Mapping):
        return {str(name): _plain(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return float(data) if math.isfinite(data) else None
    return data
