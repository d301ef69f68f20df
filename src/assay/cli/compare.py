"""Comparing architectures: compare, report."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from assay.cli.application import Json, Quiet, app, emit, next_folder, out, refuse_idle, short
from assay.errors import counted

PLANNED = "95 %\nplanned-n"  # narrow, so that long names have room
LAWS = {"chinchilla": "L(N, D) = E + A/N^alpha + B/D^beta", "power": "L(C) = E + A/C^alpha"}


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="The experiment, a TOML file.")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Its folder; a half-done one is gone on with.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Updates a run, in the place of the file's budget.", min=1)
    ] = None,
    design: Annotated[
        bool,
        typer.Option(
            "--design", help="Say what it will cost and can show, by a few timed updates a row."
        ),
    ] = False,
    pilot: Annotated[
        Path | None, typer.Option(help="With --design: a comparison that tells the noise.")
    ] = None,
    target_flops: Annotated[
        float | None,
        typer.Option(help="The budget meant to be spent: who wins there, by the ladder's fits."),
    ] = None,
    on: Annotated[
        str | None, typer.Option(help="ray (here) or ray://HOST:PORT: a Ray cluster.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at once; one a core, if time is no result.", min=1)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Trains several architectures at one budget, several seeds each, and says which is better.

    May be stopped at any moment; the same command goes on where it was.

    Example: assay compare examples/compare/quick.toml --out runs/quick
    """
    if design:
        refuse_idle("with --design", target_flops=target_flops)
        _design(file, out_folder, steps, pilot, on, jobs, as_json, quiet)
        return
    refuse_idle("without --design", pilot=pilot)
    from assay.compare.live import default_watcher
    from assay.compare.runner import compare as run_comparison

    folder = out_folder or next_folder(file.stem)
    results = run_comparison(
        file,
        folder,
        steps=steps,
        target_flops=target_flops,
        jobs=jobs,
        on=on,
        watcher=default_watcher(quiet),
    )
    if not as_json:
        _print(results, folder)
    emit(_summary(results, folder), as_json)


def _summary(results, folder: Path) -> dict[str, Any]:
    """results.json without what is long: specs, curves, the file's text."""
    rows = [
        row.model_dump(mode="json", exclude={"spec", "diagram", "checks"}) for row in results.rows
    ]
    return {
        "out": str(folder),
        "report": str(folder / "report.html"),
        "sentence": results.sentence,
        "complete": results.complete,
        "rows": rows,
        "pairs": [pair.model_dump(mode="json") for pair in results.pairs],
        "decision": results.decision and results.decision.model_dump(mode="json"),
        "design": results.design.model_dump(mode="json"),
        "environment": results.environment.model_dump(mode="json"),
        "notes": list(results.notes),
    }


def _print(results, folder: Path) -> None:
    console = out()
    console.print(f"\n[bold]{escape(results.sentence)}[/]\n", soft_wrap=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("bits/byte", PLANNED, "params", "active", "FLOPs", "seconds", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    timed = results.environment.seconds_comparable
    rungs = [*dict.fromkeys(row.rung for row in results.rows)]
    for row in sorted(results.rows, key=lambda row: (rungs.index(row.rung), row.rank or 0)):
        table.add_row(
            f"{row.name}{' *' if row.flags else ''}",
            "-" if row.val_bpb_mean is None else f"{row.val_bpb_mean:.4f}",
            _half(row.val_bpb_ci95),
            short(row.params),
            short(row.active_params),
            f"{row.train_flops:.2e}",
            f"{row.seconds:.0f}" + ("" if timed else "?"),
            str(len(row.seeds)),
        )
    console.print(table)
    if results.pairs:
        console.print()
        table = Table(box=None, pad_edge=False)
        table.add_column("pair", overflow="fold")
        for name in ("difference", PLANNED, "anytime-valid", "p (Holm)", "verdict"):
            table.add_column(name, justify="right", no_wrap=True)
        for pair in results.pairs:
            table.add_row(
                f"{pair.a}\n- {pair.b}" if "@" in pair.a else f"{pair.a} - {pair.b}",
                "-" if pair.difference is None else f"{pair.difference:+.4f}",
                _half(pair.ci95),
                _half(pair.anytime95),
                "-" if pair.p_adjusted is None else f"{pair.p_adjusted:.3g}",
                pair.verdict,
            )
        console.print(table)
    if results.scaling:
        _print_scaling(results.scaling)
    said = Table.grid(padding=(0, 1))  # so that a line that goes on is indented as it began
    for row in results.rows:
        for flag in row.flags:
            said.add_row("*", f"{row.name}: {escape(flag)}")
        for found in row.solved:
            said.add_row("", f"{row.name}: {escape(_solution(found))}")
    for note in results.notes:
        said.add_row("", escape(note))
    if said.row_count:
        console.print(said)
    console.print(f"\nreport   {folder / 'report.html'}", soft_wrap=True)


def _print_scaling(scaling) -> None:
    """Of each variant's ladder the law, and how far off it was where that could be seen."""
    console = out()
    console.print()
    for name, fit in scaling["fits"].items():
        numbers = (f"{key} {_ends(number)}" for key, number in fit["parameters"].items())
        console.print(f"{name}: {LAWS[fit['form']]}, {', '.join(numbers)}")
        held, iso, best = fit["held_out"], fit["isoflops"], fit["optimum"]
        if held:
            console.print(
                f"  held out: {held['predicted']:.4f} predicted at {held['flops']:.3g} FLOPs from "
                f"the smaller ones, {held['measured']:.4f} measured: a miss of "
                f"{100 * held['relative_miss']:+.2f} %"
                + ("" if held["inside"] else ", outside of its interval")
            )
        if iso:
            exponent = {"value": iso["params_exponent"], "ci95": iso["params_exponent_ci95"]}
            console.print(f"  IsoFLOP parabolas: the best N grows as C to the {_ends(exponent)}")
        if best and best["params"]:
            console.print(
                f"  best at the target: {short(int(best['params']))} active parameters, "
                f"{short(int(best['tokens']))} tokens"
            )
    for name, error in scaling["errors"].items():
        console.print(f"{name} has no fit: {escape(error)}")
    if there := scaling["outlook"]:
        console.print(f"At {there['flops']:.3g} FLOPs, by the fits:")
        for name, loss in there["predicted"].items():
            ends = {"value": loss, "ci95": there["ci95"][name]}
            console.print(f"  {name} {_ends(ends, '.4f')}")
    console.print()


def _ends(number, form: str = ".3g") -> str:
    """A figure with the ends of its interval."""
    low, high = number["ci95"]
    known = "unbounded" if low is None or high is None else f"{low:{form}} to {high:{form}}"
    return f"{number['value']:{form}} ({known})"


def _solution(found) -> str:
    return (
        f"{found.path} = {found.after} (was {found.before}) gives {found.quantity} "
        f"{found.found:,.0f}, wanted {found.wanted:,.0f}"
    )


def _half(bounds) -> str:
    """An interval that lies evenly about the figure beside it."""
    low, high = bounds
    return "unbounded" if low is None or high is None else f"± {(high - low) / 2:.4f}"


def _design(file, folder, steps, pilot, on, jobs, as_json, quiet) -> None:
    from assay.compare.live import default_watcher
    from assay.compare.runner import design as outline_of

    watcher = default_watcher(quiet or as_json)
    asked = {"steps": steps, "pilot": pilot, "on": on, "jobs": jobs}
    plan, found = outline_of(file, folder, **asked, watcher=watcher)
    if not as_json:
        _print_design(plan, found)
    emit(asdict(found), as_json)


def _print_design(plan, found) -> None:
    console = out()
    amounts = [entry.run.train.budget.amount for entry in plan.entries]
    spent = " to ".join(dict.fromkeys(f"{end:g}" for end in (min(amounts), max(amounts))))
    console.print(
        f"{counted(found.runs, 'run')}: {counted(len(found.costs), 'row')}, "
        f"{counted(found.seeds, 'seed')} each, "
        f"{spent} {plan.experiment.budget.unit} a run."
    )
    table = Table(box=None)
    table.add_column("", overflow="fold")
    for name in ("params", "steps", "tokens", "FLOPs in all", "seconds in all"):
        table.add_column(name, justify="right")
    for entry, cost in zip(plan.entries, found.costs, strict=True):
        table.add_row(
            cost.name,
            short(entry.sizes["params"]),
            f"{cost.steps:,}",
            short(int(cost.tokens)),
            f"{cost.flops:.2e}",
            f"{cost.seconds:.0f}",
        )
    console.print(table)
    for entry in plan.entries:
        for solution in entry.solved:
            console.print(f"{entry.name}: {escape(_solution(solution))}")
    minutes = f"{found.seconds / 60:.1f} minutes one run after the other"
    if (found.jobs or 1) > 1:
        minutes += f", {found.seconds / 60 / found.jobs:.1f} with {found.jobs} at once"
    console.print(f"In all {found.flops:.3g} FLOPs and about {minutes}; evaluation not counted.\n")
    for note in filter(None, (found.unequal, found.warm_up)):
        console.print(f"{escape(note)}\n")
    spread = found.deviation
    known = "" if spread.low is None else f" (95 %: {spread.low:.4f} to {spread.high:.4f})"
    console.print(
        f"Differences between two variants of one seed deviate by {spread.value:.4f} bits per "
        f"byte{known}: {escape(spread.source)}."
    )
    table = Table("seeds", "smallest difference that shows, with a chance of 80 %", box=None)
    for seeds, difference in found.smallest:
        mark = "  <- planned" if seeds == found.seeds else ""
        table.add_row(str(seeds), f"{difference:.4f} bits per byte{mark}")
    console.print(table)
    if found.margin:
        needed = found.equivalence_seeds
        console.print(
            f"To call two equal variants equivalent, within {found.margin:g}: "
            + (f"{needed} seeds." if needed is not None else "no number of seeds is enough.")
        )
    for text, names in _ladders(found.ladders).items():
        whose = "The ladder" if len(names) == len(found.ladders) else f"{', '.join(names)}: it"
        console.print(f"\n{whose} {text}")


def _ladders(ladders) -> dict[str, list[str]]:
    """What can be made of the ladders, in words, and which variants' each is."""
    said: dict[str, list[str]] = {}
    for name, scope in ladders.items():
        if scope.form is None:
            text = "has fewer than 3 budgets: no law can be fitted."
        else:
            text = f"bears {LAWS[scope.form]}"
            if scope.form == "power":
                text += " (N and D grow together, or there are fewer than 6 pairs of them)"
            text += (
                f"; its runs of {scope.largest:.3g} FLOPs are predicted from the smaller ones by "
                f"{LAWS[scope.held_out_form]}."
                if scope.held_out_form
                else "; the smaller budgets are too few to predict the largest from."
            )
            budgets = len(scope.isoflops)
            text += (
                f" {budgets} budgets have 3 sizes or more, for IsoFLOP parabolas."
                if budgets > 1
                else " No IsoFLOP parabolas: they need 2 budgets of 3 sizes each."
            )
        said.setdefault(text, []).append(name)
    return said


@app.command()
def report(
    source: Annotated[
        Path, typer.Argument(help="A comparison's folder, or a CSV with columns 'RUN - loss'.")
    ],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Where to; by default the source's own folder.")
    ] = None,
    animate: Annotated[
        bool, typer.Option("--animate", help="Also figures/losses.gif, drawing itself.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draws the report of a comparison, or the curves of a CSV, again.

    Example: assay report runs/quick
    """
    from assay.compare.report import draw

    folder = out_folder or (source if source.is_dir() else source.parent)
    drawn = draw(source, folder, animate=animate)
    if not as_json:
        out().print(f"report   {drawn.report}", soft_wrap=True)
        for figure in drawn.figures:
            out().print(f"figure   {figure}", soft_wrap=True)
    emit(
        {
            "report": str(drawn.report),
            "series": list(drawn.series),
            "figures": [str(figure) for figure in drawn.figures],
        },
        as_json,
    )
