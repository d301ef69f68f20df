"""The `assay` command: parse, call, print. Nothing is computed here, and JAX is imported late."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assay.errors import AssayError

app = typer.Typer(
    name="assay",
    help="Decide which transformer to train: describe, train, compare, plan.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no notes.")]
Model = Annotated[str, typer.Argument(help="A preset, a run's folder, or a Hugging Face folder.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Any field, as model.decoder.num_layers=2."),
]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn at random.", min=0)]


def out() -> Console:
    """Standard output, at the terminal's width; 80 columns where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=80)


def emit(data: dict[str, Any], as_json: bool) -> None:
    """The JSON object, where it was asked for. JSON has no infinity: such a number is null."""
    if as_json:
        print(json.dumps(_finite(data), allow_nan=False, default=str), flush=True)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def main() -> None:
    """Runs the command; a user's mistake is one sentence on standard error and status 2."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except AssayError as error:
        if debug:
            raise
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("assay: interrupted.", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------- describe


@app.command()
def presets(as_json: Json = False) -> None:
    """The named architectures.

    Example: assay presets
    """
    from assay.spec.accounting import parameters
    from assay.spec.presets import PRESETS

    rows = []
    for preset in PRESETS.values():
        count = parameters(preset.model)
        rows.append(
            {
                "name": preset.name,
                "family": preset.family,
                "source": preset.source,
                "total_params": count.total,
                "active_params": count.active,
                "context": preset.model.context,
                "vocabulary": preset.model.vocab_size,
            }
        )
    if not as_json:
        table = Table("name", "params", "active", "context", "vocab", "source", box=None)
        for row in rows:
            table.add_row(
                f"[bold]{row['name']}[/]",
                _count(row["total_params"]),
                _count(row["active_params"]),
                f"{row['context']:,}",
                f"{row['vocabulary']:,}",
                escape(row["source"]),
            )
        out().print(table)
    emit({"presets": rows}, as_json)


@app.command()
def corpora(as_json: Json = False) -> None:
    """The named corpora; any path of text or tokens is one too.

    Example: assay corpora
    """
    from assay.data.corpora import corpora as named

    rows = [
        {
            "name": corpus.name,
            "size": corpus.size,
            "needs_network": corpus.needs_network,
            "description": corpus.description,
        }
        for corpus in named()
    ]
    if not as_json:
        table = Table("name", "size", "network", "what it is", box=None)
        for row in rows:
            network = "needed" if row["needs_network"] else ""
            size = f"{row['size'] / 1e6:.1f} MB" if row["size"] else "-"
            table.add_row(
                f"[bold]{escape(row['name'])}[/]", size, network, escape(row["description"])
            )
        out().print(table)
    emit({"corpora": rows}, as_json)


@app.command()
def show(model: Model, as_json: Json = False, settings: Settings = None) -> None:
    """One architecture: its spec, its parameters by part, its cost a token.

    Example: assay show llama-3-8b
    """
    from assay.spec.accounting import flops_per_token, kv_bytes_per_token, parameters

    spec = _spec_of(model, settings)
    count, flops = parameters(spec), flops_per_token(spec)
    data = {
        "spec": spec.model_dump(mode="json"),
        "parameters": {name: part.total for name, part in count.parts.items()},
        "total_params": count.total,
        "active_params": count.active,
        "flops_per_token_forward": flops.forward,
        "flops_per_token_train": flops.train,
        "kv_bytes_per_token": kv_bytes_per_token(spec),
    }
    if not as_json:
        console = out()
        console.print_json(spec.to_json())
        table = Table("part", box=None, title=f"\n{model}", title_justify="left")
        table.add_column("parameters", justify="right")
        table.add_column("forward FLOPs a token", justify="right")
        for name in {**count.parts, **flops.parts}:
            part = count.parts[name].total if name in count.parts else 0
            table.add_row(name, f"{part:,}", f"{flops.parts.get(name, 0):,}")
        table.add_row("[bold]all", f"[bold]{count.total:,}", f"[bold]{flops.forward:,}")
        console.print(table)
        if count.active != count.total:
            console.print(f"active parameters      {count.active:,}")
        console.print(f"training FLOPs a token {flops.train:,} at {spec.context:,} tokens")
        console.print(f"KV cache a token       {data['kv_bytes_per_token']:,} bytes in float32")
    emit(data, as_json)


def _spec_of(model: str, settings: list[str] | None):
    """The architecture alone: no weights are read."""
    from assay.loading import kind_of
    from assay.spec.presets import PRESETS

    match kind_of(model):
        case "preset":
            run = PRESETS[model].run
        case "run":
            from assay.train.loop import read_run

            run = read_run(model)
        case "huggingface":
            from assay.interop.huggingface import read_config
            from assay.spec.run import RunSpec

            run = RunSpec(model=read_config(Path(model)))
    return run.changed(_settings(settings)).model


def _settings(settings: list[str] | None) -> dict[str, Any]:
    """PATH=VALUE pairs; a value is JSON where it reads as such, else text."""
    changes = {}
    for setting in settings or []:
        path, equals, value = setting.partition("=")
        if not equals:
            raise AssayError(f"--set {setting}: expected PATH=VALUE.")
        try:
            changes[path] = json.loads(value)
        except json.JSONDecodeError:
            changes[path] = value
    return changes


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


# ---------------------------------------------------------------------------- train


@app.command()
def train(
    preset: Annotated[str | None, typer.Argument(help="A preset's name.")] = None,
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
    tokens: Annotated[float | None, typer.Option(help="Budget in tokens.")] = None,
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
    seed: Annotated[int | None, typer.Option(help="Of everything drawn at random.", min=0)] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices by axis: data=2,tensor=4.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between saves.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    target_loss: Annotated[
        float | None, typer.Option(help="Stop when the held-out loss (nats a token) is reached.")
    ] = None,
    settings: Settings = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write its files.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Trains a preset on a corpus, with every flag a difference from the preset's own run.

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
        "mesh": _mesh(mesh),
        "seed": seed,
        "train.checkpoint_every": checkpoint_every,
        "train.eval_every": eval_every,
        "train.target_loss": target_loss,
    }
    changes = {path: value for path, value in flags.items() if value is not None}
    changes |= _settings(settings)
    folder = out_folder or _next_folder(preset or "run")
    run = _configure(preset, changes, folder if resume else None)

    from assay.api import train as run_training
    from assay.train.progress import default_reporter

    trackers = tuple(name for name, on in (("tensorboard", tensorboard), ("wandb", wandb)) if on)
    result = run_training(
        run,
        folder,
        resume=resume,
        stop_at=stop_at,
        reporter=default_reporter(quiet),
        trackers=trackers,
    )
    if not as_json:
        _print_result(result)
    emit(asdict(result), as_json)


RESUMABLE = ("compute", "mesh", "train.checkpoint_every", "train.eval_every", "train.log_every")
"""What may differ when a run goes on: none of it changes what is computed, but for rounding."""


def _configure(preset: str | None, changes: dict[str, Any], resumed: Path | None):
    """The run that the flags describe, or that the folder holds, held to the flags."""
    from assay.spec import presets

    if resumed is None:
        if preset is None:
            raise AssayError("PRESET: name one ('assay presets' lists them), or give --resume.")
        return presets.get(preset).run.changed(changes)

    from assay.train.loop import read_run

    held = read_run(resumed)
    if preset is not None and presets.get(preset).name != held.preset:
        raise AssayError(
            f"{resumed}: it holds a run of '{held.preset}', not of '{preset}'; "
            f"--resume goes on with what is there."
        )
    for path, value in changes.items():
        if not path.startswith(RESUMABLE) and held.at(path, value) != held:
            raise AssayError(
                f"{path}: {value!r} is not what the run in {resumed} was begun with; "
                f"--resume goes on with the same settings."
            )
    return held.changed(changes)


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


def _mesh(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    axes = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if not equals or not size.isdigit():
            raise AssayError(f"--mesh {text}: expected AXIS=DEVICES, as in data=2,tensor=4.")
        axes[name.strip()] = int(size)
    return axes


def _next_folder(name: str) -> Path:
    """runs/NAME-1, or the next number that is free."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def _print_result(result) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    rows = {
        "run": result.out,
        "steps": f"{result.steps:,}" + ("" if result.finished else f"  ({result.stopped_by})"),
        "tokens": f"{result.tokens:,}",
        "training loss": _figure(result.train_loss, "nats/token"),
        "held-out loss": _figure(result.val_loss, "nats/token"),
        "held-out": _figure(result.val_bpb, "bits/byte"),
        "time": f"{result.seconds:.1f} s, and {result.compile_seconds:.1f} s to compile",
        "speed": _figure(result.tokens_per_second, "tokens/s", ",.0f"),
        "loss plot": str(Path(result.out) / "loss.png"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out().print(table)


def _figure(number: float | None, unit: str, form: str = ".4f") -> str:
    return "-" if number is None else f"{number:{form}} {unit}"


# ---------------------------------------------------------------------------- use


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Goes in as it is.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0)] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Text from a model, streamed as it comes.

    Example: assay generate runs/first --prompt "The for statement" --temperature 0.7
    """
    from assay.generate.text import stream_text
    from assay.loading import load

    loaded = load(model, dtype)
    if loaded.tokenizer is None:
        raise AssayError(f"{model}: it has no tokenizer, so there is no text to make; train it.")
    if loaded.step is None and loaded.run is not None and not quiet:
        print("note: a preset has random weights; this is noise.", file=sys.stderr)
    stream = stream_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    show_text = not as_json
    if show_text:
        print(prompt, end="", flush=True)
    for piece in stream:
        if show_text:
            print(piece, end="", flush=True)
    if show_text:
        print()
    result = stream.completion()
    for note in result.notes if not quiet else ():
        print(f"note: {note}", file=sys.stderr)
    emit(
        {
            "text": result.text,
            "tokens": result.ids,
            "prompt_tokens": result.prompt_tokens,
            "finish_reason": result.finish_reason,
            "tokens_per_second": result.timing.tokens_per_second,
            "time_to_first_token": result.timing.time_to_first_token,
        },
        as_json,
    )


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None, typer.Option(help="A corpus; a run's own if left out.")
    ] = None,
    split: Annotated[str, typer.Option(help="held-out, train or all.")] = "held-out",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window.", min=1)] = None,
    stride: Annotated[
        int | None, typer.Option(help="Less than a window: each token sees more before it.")
    ] = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte over the whole held-out part of a corpus.

    Example: assay eval runs/first --data python-docs
    """
    from assay.data import corpora as files
    from assay.data import loader
    from assay.evaluate.perplexity import evaluate as score
    from assay.loading import load

    loaded = load(model, dtype)
    if loaded.tokenizer is None:
        raise AssayError(f"{model}: it has no tokenizer, so no text can be scored by it.")
    if data is None and loaded.step is None:
        raise AssayError("--data: name a corpus; only a run has one of its own.")
    run = loaded.run
    sources = data or [source.corpus for source in run.data.sources]
    held_out = run.data.held_out if run is not None else 0.1
    window = seq_len or (run.data.seq_len if run is not None else loaded.model.spec.context)
    parts = []
    for source in sources:
        corpus = files.open_corpus(source)
        first, last = files.split(corpus, held_out)
        if split == "all":
            parts.append(loader.tokenize(corpus, loaded.tokenizer))
            continue
        before = loader.tokenize(first, loaded.tokenizer)
        if split == "train":
            parts.append(before)
        elif split == "held-out":
            parts.append(loader.tokenize(last, loaded.tokenizer, int(before.ids[-1:][0])))
        else:
            raise AssayError(f"--split: found '{split}'; legal are held-out, train, all.")
    packing = run.data.packing if run is not None else "stream"
    batches = loader.evaluation_batches(parts, batch_size, window, stride, packing)
    result = score(loaded.model, batches)
    if not as_json:
        table = Table(box=None, show_header=False)
        table.add_column(style="bold")
        for name, value in asdict(result).items():
            table.add_row(name, f"{value:.5g}" if isinstance(value, float) else str(value))
        out().print(table)
    emit({"model": model, "data": sources, "split": split, **asdict(result)}, as_json)


@app.command()
def check(
    model: Model,
    full: Annotated[bool, typer.Option("--full", help="A preset at its own size.")] = False,
    seed: Seed = 0,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Proves what can be proved: no sight of the future, cache, gradients, bfloat16.

    Example: assay check gpt2
    """
    from assay.evaluate.checks import check as run_checks
    from assay.loading import kind_of, load
    from assay.spec.presets import PRESETS, shrink

    if kind_of(model) == "preset":
        run = PRESETS[model].run.changed(_settings(settings))
        subject = run.model if full else shrink(run.model)
    else:
        subject = load(model).model
    report = run_checks(subject, seed=seed)
    if not as_json:
        table = Table("", "check", "worst", "where", box=None)
        for row in report.checks:
            mark = "[green]✓[/]" if row.passed else "[red]✗[/]"
            table.add_row(mark, row.name, f"{row.worst:.3g}", escape(row.where or row.note or ""))
        out().print(table)
    emit({"model": model, **asdict(report)}, as_json)
    if not report.passed:
        raise typer.Exit(1)


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

    run_demo(seconds, data, out_folder or _next_folder("demo"), out(), as_json, quiet, emit)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="train.")],
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

    Example: assay bench train tiny-gpt --against torch
    """
    from assay.errors import did_you_mean
    from assay.spec import presets

    if what != "train":
        raise AssayError(f"bench {what}: {did_you_mean(what, ['train'])}")
    flags = {
        "compute.dtype": dtype,
        "data.batch_size": batch_size,
        "data.seq_len": seq_len,
    }
    changes = {path: value for path, value in flags.items() if value is not None}
    run = presets.get(model).run.changed(changes | _settings(settings))

    from assay.bench import bench_train

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
        title = f"{model}, {run.compute.dtype}, batch {run.data.batch_size} x {run.data.seq_len}"
        table = Table("", "min", "median", "max", box=None, title=title, title_justify="left")
        rows = {"ours, tokens/s": (result.ours, ",.0f")}
        if result.theirs:
            rows["torch, tokens/s"] = (result.theirs, ",.0f")
            rows["ours / torch"] = (result.ratio, ".2f")
        for name, (spread, form) in rows.items():
            table.add_row(name, *(f"{x:{form}}" for x in (spread.min, spread.median, spread.max)))
        out().print(table)
        out().print(f"first step, compilation included: {result.first_step_seconds:.1f} s")
        versions = ", ".join(f"{k} {v}" for k, v in result.versions.items())
        out().print(f"{versions}, {result.threads} threads")
    emit(data, as_json)


if __name__ == "__main__":
    main()
