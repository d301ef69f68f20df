"""Training a model."""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from assay.cli.application import (
    LAST_SEED,
    Json,
    Quiet,
    Settings,
    app,
    changes_of,
    emit,
    figure,
    mesh_of,
    next_folder,
    out,
)
from assay.errors import AssayError


@app.command()
def train(
    preset: Annotated[str | None, typer.Argument(help="A preset, or a spec (.json).")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A corpus or path; again, with @WEIGHT, to blend several."),
    ] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="The run's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    stop_at: Annotated[
        int | None, typer.Option(help="Stop after this step, the schedule unchanged.", min=0)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in updates.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget in seconds of training.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Budget in tokens, padding too.")] = None,
    flops: Annotated[float | None, typer.Option(help="Budget in training FLOPs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences an update.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, muon or sgd.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, cosine, linear, wsd or inverse_sqrt.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="byte, char, bpe, bpe:N, or a tokenizer.json.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything drawn at random.", min=0, max=LAST_SEED)
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices by axis: data=2,tensor=4.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between saves.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    target_loss: Annotated[
        float | None, typer.Option(help="Stop when the held-out loss (nats a token) is reached.")
    ] = None,
    settings: Settings = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write its files.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases.")] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0, or auto (Slurm, Kubernetes, TPU).")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many train as one.", min=1)] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is.", min=0)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Trains a preset on a corpus, with every flag a difference from the preset's own run.

    Parameters begin at random; a spec of one's own is a .json file, as its `to_json` gives it.

    Example: assay train nano --data python-docs --seconds 60 --out runs/first
    """
    flags = {
        "train.budget": _budget(steps=steps, seconds=seconds, tokens=tokens, flops=flops),
        "data.sources": _sources(data),
        "data.batch_size": batch_size,
        "data.seq_len": seq_len,
        "data.tokenizer": _tokenizer(tokenizer),
        "optimizer": optimizer,
        "optimizer.lr": lr,
        "schedule": schedule,
        "compute.dtype": dtype,
        "mesh": mesh_of(mesh),
        "seed": seed,
        "train.checkpoint_every": checkpoint_every,
        "train.eval_every": eval_every,
        "train.target_loss": target_loss,
    }
    changes = {path: value for path, value in flags.items() if value is not None}
    changes = changes_of(settings, changes)
    if out_folder is None and resume:
        raise AssayError("--resume: name the run's folder by --out.")
    if out_folder is None and (coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")):
        raise AssayError("--out: name the run's folder; every process must use the same.")
    name = Path(preset).stem if preset and preset.endswith(".json") else preset
    folder = out_folder or next_folder(name or "run")
    run = _configure(preset, changes, folder if resume else None)
    if not resume and (folder / "run.json").is_file():
        raise _occupied(folder, run)
    if any(path.startswith("data.tokenizer") for path in changes):
        from assay.data.prepare import refuse_other_tokenizer

        for source in run.data.sources:
            refuse_other_tokenizer(source.corpus, run.data.tokenizer)

    from assay.train.processes import LOST, LostProcessError, is_first, join

    join(coordinator, processes, process_id)
    if not is_first():  # Gloo, in C++, says of every process that it is connected
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    from assay.api import train as run_training
    from assay.train.checkpoint import NotSavedError
    from assay.train.progress import default_reporter

    trackers = tuple(name for name, on in (("tensorboard", tensorboard), ("wandb", wandb)) if on)
    try:
        result = run_training(
            run,
            folder,
            resume=resume,
            stop_at=stop_at,
            reporter=default_reporter(quiet or not is_first()),
            trackers=trackers,
        )
    except LostProcessError as error:
        print(f"assay: {error}", file=sys.stderr, flush=True)
        os._exit(LOST)  # a tidy end would wait for the lost one
    except NotSavedError as error:
        if "--debug" in sys.orig_argv:
            raise
        print(f"assay: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # a tidy end would have each write that is still waiting tell of itself
    if not is_first():
        return
    if not as_json:
        _print_result(result)
    emit(asdict(result), as_json)


def _configure(preset: str | None, changes: dict[str, Any], resumed: Path | None):
    """The run that the flags describe, or that the folder holds, held to the flags."""
    from assay.loading import untrained

    if resumed is None:
        if preset is None:
            raise AssayError("PRESET: name one ('assay presets' lists them), or give --resume.")
        return untrained(preset).changed(changes)

    from assay.spec.base import differences
    from assay.spec.run import resumable
    from assay.train.loop import read_run

    held = read_run(resumed)
    begun = None if preset is None else untrained(preset)
    is_file = preset is not None and Path(preset).is_file()
    if begun is not None and not is_file and begun.preset != held.preset:
        raise AssayError(
            f"{resumed}: it holds a run of {_what(held)}, not of '{preset}'; "
            f"--resume goes on with what is there."
        )
    if is_file:
        model = begun.changed(changes).model.with_vocab(held.model.vocab_size)
        if found := differences(held.model, model):
            path, before, after = found[0]
            raise AssayError(
                f"{resumed}: it holds a run of another model than {preset} (model.{path} is "
                f"{before} there, {after} here); --resume goes on with what is there."
            )
    for path, value in changes.items():
        if resumable(path) or (wanted := held.at(path, value)) == held:
            continue
        found = differences(held, wanted)
        where, before, after = found[0] if len(found) == 1 else (path, *_listed(found, path))
        raise AssayError(
            f"{where}: {after} is not what the run in {resumed} was begun with ({before}); "
            f"--resume goes on with the same settings; for others, begin anew in another --out."
        )
    return held.changed(changes)


def _occupied(folder: Path, run) -> AssayError:
    """Why nothing is begun where a run is: whether it is this one, and how to go on."""
    from assay.train.loop import read_result, read_run

    held = read_run(folder)
    found = run.other_than(held)
    if held.preset != run.preset:
        what = f"it holds another run, of {_what(held)}, and nothing is overwritten"
        how = "go on with that by --resume"
    elif found:
        path, there, here = found[0]
        what = f"it holds another run ({path} is {there} there, {here} here)"
        how = "go on with that by --resume without these options"
    elif read_result(folder) is not None:
        what, how = "it holds this very run, finished", "--resume shows its result"
    else:
        what, how = "it holds this very run, not finished", "go on with it by --resume"
    return AssayError(f"{folder}: {what}; {how}, or name another folder by --out.")


def _what(run) -> str:
    return "a spec" if run.preset is None else f"'{run.preset}'"


def _listed(found: list[tuple[str, Any, Any]], path: str) -> tuple[str, str]:
    """What three differences were, and what they are to be, each named from `path` on."""
    some = [(name.removeprefix(f"{path}."), a, b) for name, a, b in found[:3]]
    return tuple(", ".join(f"{entry[0]} = {entry[i]}" for entry in some) for i in (1, 2))


def _budget(**amounts: float | None) -> dict[str, Any] | None:
    given = {unit: amount for unit, amount in amounts.items() if amount is not None}
    if len(given) > 1:
        raise AssayError(f"--{' and --'.join(given)}: give one budget, not several.")
    return next(({"unit": unit, "amount": amount} for unit, amount in given.items()), None)


def _sources(data: list[str] | None) -> list[dict[str, Any]] | None:
    """CORPUS or CORPUS@WEIGHT, each."""
    sources = []
    for entry in data or []:
        corpus, at, weight = entry.rpartition("@")
        try:
            sources.append({"corpus": corpus, "weight": float(weight)} if at else {"corpus": entry})
        except ValueError:
            sources.append({"corpus": entry})
    return sources or None


def _tokenizer(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    from assay.data.tokenizers import parse

    return parse(text).model_dump(mode="json")


def _print_result(result) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    rows = {
        "run": result.out,
        "steps": f"{result.steps:,}" + ("" if result.finished else f"  ({result.stopped_by})"),
        "tokens": f"{result.tokens:,}",
        "training loss": figure(result.train_loss, "nats/token"),
        "held-out loss": figure(result.val_loss, "nats/token"),
        "held-out": figure(result.val_bpb, "bits/byte"),
        "time": f"{result.seconds:.1f} s, and {result.compile_seconds:.1f} s to compile",
        "speed": figure(result.tokens_per_second, "tokens/s", ",.0f"),
        "loss plot": str(Path(result.out) / "loss.png"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out().print(table)
    out().print(_what_next(result), soft_wrap=True)


def _what_next(result) -> str:
    from assay.train.processes import count

    folder = shlex.quote(result.out)
    if not result.finished and count() > 1:
        return (
            f"\nTo go on, start all {count()} processes again: assay train --resume --out {folder}"
        )
    if not result.finished:
        return f"\nTo go on: assay train --resume --out {folder}"
    if result.stopped_by == "target":
        return "\nThe target was reached: to train longer, begin anew without it in another --out."
    return (
        "\nThe schedule has run to its end: to train longer, begin anew with a larger budget and "
        "another --out."
    )
