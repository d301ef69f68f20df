"""The demo and the benchmarks."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from assay.bench.timing import Spread
from assay.cli.application import (
    Json,
    Quiet,
    Settings,
    app,
    changes_of,
    emit,
    next_folder,
    out,
)
from assay.errors import AssayError

if TYPE_CHECKING:
    from assay.spec.run import RunSpec


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="Seconds of training.")] = 100,
    data: Annotated[str, typer.Option(help="A corpus.")] = "python-docs",
    out_folder: Annotated[Path | None, typer.Option("--out", help="The run's folder.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Two minutes from text to samples: trains `nano`, scores it, lets it write.

    Example: assay demo
    """
    from assay.demo import run_demo

    run_demo(seconds, data, out_folder or next_folder("demo"), out(), as_json, quiet, emit)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="train or moe.")],
    model: Annotated[str, typer.Argument(help="A preset.")],
    against: Annotated[str | None, typer.Option(help="torch: time PyTorch in turn.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    seq_len: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Turns each.", min=1)] = 5,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Speed of a training step, against PyTorch's in the same run, turn by turn.

    `moe` compares a model of experts with the dense one of equal active size, and with every
    expert on every token.

    Example: assay bench train tiny-gpt --against torch
    """
    from assay.errors import did_you_mean
    from assay.spec import presets

    benches = {"train": _bench_train, "moe": _bench_moe}
    if what not in benches:
        raise AssayError(f"bench {what}: {did_you_mean(what, benches)}")
    flags = {
        "compute.dtype": dtype,
        "data.batch_size": batch_size,
        "data.seq_len": seq_len,
    }
    changes = {path: value for path, value in flags.items() if value is not None}
    run = presets.get(model).run.changed(changes | changes_of(settings))
    benches[what](model, run, against, rounds, as_json)


def _bench_train(
    model: str, run: "RunSpec", against: str | None, rounds: int, as_json: bool
) -> None:
    from assay.bench.train import bench_train

    result = bench_train(run, against=against, rounds=rounds)
    data = {
        "model": model,
        "dtype": run.compute.dtype,
        "ours": {"tokens_per_second": asdict(result.ours)},
        "theirs": result.theirs and {"tokens_per_second": asdict(result.theirs)},
        "ratio": result.ratio and asdict(result.ratio),
        "first_step_seconds": result.first_step_seconds,
        "losses": {"ours": result.first_loss, "theirs": result.their_first_loss},
        "threads": result.threads,
        "versions": result.versions,
    }
    if not as_json:
        rows = {"ours, tokens/s": (result.ours, ",.0f")}
        if result.theirs:
            rows["torch, tokens/s"] = (result.theirs, ",.0f")
            rows["ours / torch"] = (result.ratio, ".2f")
        title = f"{model}, {run.compute.dtype}, batch {run.data.batch_size} x {run.data.seq_len}"
        _print_spreads(title, rows)
        out().print(f"first step, compilation included: {result.first_step_seconds:.1f} s")
        versions = ", ".join(f"{k} {v}" for k, v in result.versions.items())
        out().print(f"{versions}, {result.threads} threads")
    emit(data, as_json)


def _bench_moe(model: str, run: "RunSpec", against: str | None, rounds: int, as_json: bool) -> None:
    """`theirs` is the dense model of equal active size, or PyTorch's loop over the experts."""
    from assay.bench.moe import bench_moe

    result = bench_moe(run, against=against, rounds=rounds)
    theirs = against or "dense"
    data = {
        "model": model,
        "dtype": run.compute.dtype,
        "ours": {"tokens_per_second": asdict(result.speeds["ours"])},
        "theirs": {"tokens_per_second": asdict(result.speeds[theirs])},
        "ratio": asdict(result.ratios[theirs]),
        "speeds": {name: asdict(speed) for name, speed in result.speeds.items()},
        "ratios": {name: asdict(ratio) for name, ratio in result.ratios.items()},
        "losses": result.losses,
        "versions": result.versions,
    }
    if not as_json:
        names = {
            "ours": "experts",
            "dense": "dense of equal active size",
            "every_expert": "every expert on every token",
            "torch": "PyTorch, a loop over experts",
        }
        rows = {f"{names[name]}, tokens/s": (x, ",.0f") for name, x in result.speeds.items()}
        rows |= {f"experts / {names[name]}": (x, ".2f") for name, x in result.ratios.items()}
        title = f"{model}, {run.compute.dtype}, batch {run.data.batch_size} x {run.data.seq_len}"
        _print_spreads(title, rows)
        times = 1 / result.ratios["dense"].median
        out().print(f"a step costs {times:.2f} times the dense model's (median)")
    emit(data, as_json)


def _print_spreads(title: str, rows: dict[str, tuple[Spread, str]]) -> None:
    """A table of figures of several turns, each with the form of its numbers."""
    table = Table("", "min", "median", "max", box=None, title=title, title_justify="left")
    for name, (spread, form) in rows.items():
        table.add_row(name, *(f"{x:{form}}" for x in (spread.min, spread.median, spread.max)))
    out().print(table)
