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
from assay.cli.costs import bench_growth, bench_loop, bench_memory
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
    what: Annotated[str, typer.Argument(help="train, moe, decode, memory, loop or growth.")],
    model: Annotated[
        str | None, typer.Argument(help="A preset or a spec (.json); growth has models of its own.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="torch, or (train) transformers: timed in turn.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; decode: int8 too.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    seq_len: Annotated[int | None, typer.Option(min=1)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="decode: tokens read.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="decode: tokens written.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Turns each.", min=1)] = 5,
    plot: Annotated[Path | None, typer.Option(help="growth: a .png or .svg.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Speed of training or decoding, against PyTorch's in the same run, turn by turn.

    `moe` compares a model of experts with the dense one of equal active size, and with every
    expert on every token. `memory` is the peak of a training step; `loop` what data, Python and
    metrics cost beside the steps; `growth` a step's time against tokens, width, depth, context
    and experts.

    Example: assay bench train tiny-gpt --against torch

    Example: assay bench decode smollm-135m --against torch --dtype bfloat16
    """
    from assay.errors import did_you_mean
    from assay.loading import untrained

    benches = {"train": _bench_train, "moe": _bench_moe}
    costs = {"memory": bench_memory, "loop": bench_loop}
    if what == "growth":
        bench_growth(dtype or "float32", plot, rounds, as_json)
        return
    if model is None:
        raise AssayError(f"bench {what}: name a preset, as in: assay bench {what} nano")
    if what == "decode":
        run = untrained(model).changed(changes_of(settings))
        sizes = (batch_size or 1, prompt_tokens, new_tokens)
        _bench_decode(model, run, dtype or "float32", sizes, against, rounds, as_json)
        return
    if what not in benches and what not in costs:
        known = [*benches, *costs, "decode", "growth"]
        raise AssayError(f"bench {what}: {did_you_mean(what, known)}")
    flags = {
        "compute.dtype": dtype,
        "data.batch_size": batch_size,
        "data.seq_len": seq_len,
    }
    changes = {path: value for path, value in flags.items() if value is not None}
    run = untrained(model).changed(changes_of(settings, changes))
    if what in costs:
        of = (against, as_json) if what == "memory" else (as_json,)
        costs[what](model, run, *of)
        return
    benches[what](model, run, against, rounds, as_json)


def _bench_train(
    model: str, run: "RunSpec", against: str | None, rounds: int, as_json: bool
) -> None:
    from assay.bench.train import bench_train

    result = bench_train(run, against=against, rounds=rounds)
    peer = against or "torch"
    data = {
        "model": model,
        "dtype": run.compute.dtype,
        "ours": {"tokens_per_second": asdict(result.ours)},
        "theirs": result.theirs and {"tokens_per_second": asdict(result.theirs)},
        "ratio": result.ratio and asdict(result.ratio),
        "better": result.better,
        "not_timed": result.not_timed,
        "forms": {k: {"tokens_per_second": asdict(v)} for k, v in result.forms.items()},
        "first_step_seconds": result.first_step_seconds,
        "losses": {"ours": result.first_loss, "theirs": result.their_first_loss},
        "threads": result.threads,
        "versions": result.versions,
    }
    if not as_json:
        rows = {"ours, tokens/s": (result.ours, ",.0f")}
        if result.theirs:
            for form, spread in result.forms.items():
                rows[f"{peer} {form}, tokens/s"] = (spread, ",.0f")
            rows[f"ours / {peer} {result.better}"] = (result.ratio, ".2f")
        title = f"{model}, {run.compute.dtype}, batch {run.data.batch_size} x {run.data.seq_len}"
        _print_spreads(title, rows)
        for form, reason in result.not_timed.items():
            out().print(f"{peer} {form} was not timed: {reason}")
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


def _bench_decode(
    model: str,
    run: "RunSpec",
    dtype: str,
    sizes: tuple[int, int, int],
    against: str | None,
    rounds: int,
    as_json: bool,
) -> None:
    from assay.bench.decode import Side, bench_decode

    batch_size, prompt_tokens, new_tokens = sizes
    result = bench_decode(
        run.model,
        dtype=dtype,
        against=against,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
    )
    ours, theirs, limit = result.ours, result.theirs, result.limit

    def side(of: Side | None) -> dict | None:
        return of and {
            "tokens_per_second": asdict(of.decode),
            "prefill_tokens_per_second": asdict(of.prefill),
            "time_to_first_token": asdict(of.time_to_first_token),
        }

    data = {
        "model": model,
        "dtype": dtype,
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ours": side(ours),
        "theirs": side(theirs),
        "ratio": result.ratio and asdict(result.ratio),
        "prefill_ratio": result.prefill_ratio and asdict(result.prefill_ratio),
        "read_bandwidth": result.read_bandwidth,
        "bytes_read": result.bytes_read,
        "weight_bytes": result.weight_bytes,
        "limit": limit,
        "share_of_limit": limit and ours.decode.median / limit,
        "same_tokens": result.same_tokens,
        "their_cache": result.their_cache,
        "native": result.native,
        "compile_seconds": result.compile_seconds,
        "threads": result.threads,
        "versions": result.versions,
    }
    if not as_json:
        rows = {"decode, ours, tokens/s": (ours.decode, ",.1f")}
        if theirs:
            rows["decode, transformers"] = (theirs.decode, ",.1f")
            rows["ours / transformers"] = (result.ratio, ".2f")
        rows["prefill, ours, tokens/s"] = (ours.prefill, ",.0f")
        if theirs:
            rows["prefill, transformers"] = (theirs.prefill, ",.0f")
            rows["ours / transformers "] = (result.prefill_ratio, ".2f")
        rows["first token, ours, s"] = (ours.time_to_first_token, ".3f")
        if theirs:
            rows["first token, transformers"] = (theirs.time_to_first_token, ".3f")
        title = f"{model}, {dtype}, batch {batch_size}, {prompt_tokens} + {new_tokens} tokens"
        _print_spreads(title, rows)
        gigabytes = f"memory is read at {result.read_bandwidth / 1e9:.1f} GB/s"
        if limit is not None:
            out().print(
                f"{gigabytes}, a step reads {result.bytes_read / 1e6:,.0f} MB of weights: "
                f"at most {limit:,.1f} tokens/s, of which {ours.decode.median / limit:.0%} "
                "are reached"
            )
        else:
            out().print(f"{gigabytes}; how many experts a step reads depends on the text")
        if theirs:
            precision = ", in bfloat16" if dtype == "int8" else ""
            out().print(
                f"transformers with its {result.their_cache} cache{precision}; "
                f"{result.same_tokens:.0%} of the ids are the same"
            )
        out().print(result.native)
        versions = ", ".join(f"{k} {v}" for k, v in result.versions.items())
        out().print(f"{versions}, {result.threads} threads")
    emit(data, as_json)


def _print_spreads(title: str, rows: dict[str, tuple[Spread, str]]) -> None:
    """A table of figures of several turns, each with the form of its numbers."""
    table = Table("", "min", "median", "max", box=None, title=title, title_justify="left")
    for name, (spread, form) in rows.items():
        table.add_row(name, *(f"{x:{form}}" for x in (spread.min, spread.median, spread.max)))
    out().print(table)
