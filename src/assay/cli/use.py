"""Using a model: generate, eval, check."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from assay.cli.application import (
    Architecture,
    Json,
    Model,
    Quiet,
    Seed,
    Settings,
    app,
    changes_of,
    emit,
    out,
    refuse_idle,
    refuse_picture,
)
from assay.errors import AssayError

if TYPE_CHECKING:
    from assay.loading import Loaded

WeightsDtype = Annotated[
    str, typer.Option(help="float32, bfloat16, or int8: a byte a weight, sums in float32.")
]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option(help="Goes in as it is; with an encoder, it is the source.")
    ] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="200 if left out, or what learned positions have room for."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Over 0, at most 1.")] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Over 0; 1 is none.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, in the model's own template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system's message.")] = None,
    beams: Annotated[
        int | None, typer.Option(help="Search for the likeliest text; nothing is drawn.", min=1)
    ] = None,
    length_penalty: Annotated[
        float, typer.Option(help="Of beams: log P / length^PENALTY. More favours longer ones.")
    ] = 1.0,
    seed: Seed = 0,
    dtype: WeightsDtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Says what computes: C++ compiled here, or XLA.")
    ] = False,
) -> None:
    """Text from a model, streamed as it comes. With --beams it comes when it is found.

    Example: assay generate runs/first --prompt "The for statement" --temperature 0.7
    """
    if beams is not None:
        refuse_idle(
            "with --beams",
            temperature=temperature not in (0.0, 1.0),
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty != 1.0,
        )
    else:
        refuse_idle("without --beams", length_penalty=length_penalty != 1.0)
    from assay.generate.engine import Generator
    from assay.generate.text import complete_by_beams, stream_text
    from assay.loading import load
    from assay.model import native
    from assay.model.layers import use_cpu_kernels

    loaded = load(model, "float32" if dtype == "int8" else dtype)
    if loaded.tokenizer is None:
        raise AssayError(f"{model}: it has no tokenizer, so there is no text to make; train it.")
    if loaded.step is None and loaded.run is not None and not quiet:
        print("note: a preset has random weights; this is noise.", file=sys.stderr)
    if system is not None and not chat:
        raise AssayError("--system: is the message of a chat; give --chat too.")
    text, stop_tokens = prompt, list(loaded.end_tokens)
    if chat:
        from assay.data import chat as templates

        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = templates.encode(loaded.tokenizer, messages)
        stop_tokens += templates.end_of_turn_ids(loaded.tokenizer)
    reads = loaded.model.spec.encoder is not None
    begins = {"start_token": loaded.start_token} if reads else {}
    generator = Generator(loaded.model, weights=dtype)
    if verbose:
        reason = native.build()[1] if use_cpu_kernels(loaded.model.compute) else "XLA's kernels."
        print(f"note: {reason}", file=sys.stderr)
    if beams is not None:
        (found,) = complete_by_beams(
            generator,
            loaded.tokenizer,
            [text],
            beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            stop=tuple(stop or ()),
            stop_tokens=stop_tokens,
            **begins,
        )
        if not as_json:
            print(found[0].text if reads or chat else prompt + found[0].text)
        for note in found[0].notes if not quiet else ():
            print(f"note: {note}", file=sys.stderr)
        emit(
            _completion(found[0])
            | {
                "score": found[0].score,
                "beams": [
                    {"text": beam.text, "tokens": beam.ids, "score": beam.score} for beam in found
                ],
            },
            as_json,
        )
        return
    stream = stream_text(
        generator,
        loaded.tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        stop_tokens=stop_tokens,
        seed=seed,
        **begins,
    )
    show_text = not as_json
    if show_text and not (chat or reads):
        print(prompt, end="", flush=True)
    for piece in stream:
        if show_text:
            print(piece, end="", flush=True)
    if show_text:
        print()
    result = stream.completion()
    for note in result.notes if not quiet else ():
        print(f"note: {note}", file=sys.stderr)
    emit(_completion(result), as_json)


def _completion(result) -> dict[str, Any]:
    return {
        "text": result.text,
        "tokens": result.ids,
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "tokens_per_second": result.timing.tokens_per_second,
        "time_to_first_token": result.timing.time_to_first_token,
    }


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
    task: Annotated[
        str | None,
        typer.Option(
            help="hellaswag, arc_easy, arc_challenge, piqa, winogrande, lambada_openai, blimp, or "
            "blimp/PARADIGM, instead."
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="The task's documents: .jsonl, .json, .parquet, or a folder."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another MODEL on the same task, paired.")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, by commas.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --harness: a folder of further task files (YAML).")
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(help="With --harness: examples before each; a task's own number.", min=0),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents.", min=1)] = None,
    dtype: WeightsDtype = "float32",
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte over the whole held-out part of a corpus; or a task.

    Example: assay eval runs/first --data python-docs

    Example: assay eval MODEL --harness hellaswag,arc_easy
    """
    ways = {"--harness": harness, "--task": task, "--data": data}
    found = [name for name, value in ways.items() if value is not None]
    if len(found) > 1:
        raise AssayError(f"{found[0]} and {found[1]}: give one of them.")
    way = found[0] if found else "--data"
    beside = {
        "--task-data": (task_data, ("--task",)),
        "--against": (against, ("--task",)),
        "--include-path": (include_path, ("--harness",)),
        "--fewshot": (fewshot, ("--harness",)),
        "--limit": (limit, ("--task", "--harness")),
        "--seq-len": (seq_len, ("--data",)),
        "--stride": (stride, ("--data",)),
        "--split": (None if split == "held-out" else split, ("--data",)),
    }
    for option, (value, goes_with) in beside.items():
        if value is not None and way not in goes_with:
            raise AssayError(f"{option}: goes with {' or '.join(goes_with)}.")
    if way != "--data":
        if dtype == "int8":
            raise AssayError("--dtype: tasks are scored in float32 or bfloat16, found int8.")
        if way == "--harness":
            names = [name.strip() for name in harness.split(",")]
            _evaluate_harness(
                model, names, include_path, fewshot, limit, batch_size, dtype, as_json
            )
        else:
            _evaluate_task(model, task, task_data, against, limit, batch_size, dtype, as_json)
        return
    if split not in ("held-out", "train", "all"):
        raise AssayError(f"--split: found '{split}'; legal are held-out, train, all.")
    from assay.data import corpora as files
    from assay.data import loader
    from assay.data.pairs import open_pairs
    from assay.evaluate.perplexity import evaluate as score
    from assay.loading import load
    from assay.model.decoding import prepare

    loaded = load(model, "float32" if dtype == "int8" else dtype)
    if loaded.tokenizer is None:
        raise AssayError(f"{model}: it has no tokenizer, so no text can be scored by it.")
    if data is None and loaded.step is None:
        raise AssayError("--data: name a corpus; only a run has one of its own.")
    run = loaded.run
    sources = data or [source.corpus for source in run.data.sources]
    held_out = run.data.held_out if run is not None else 0.1
    window = seq_len or (run.data.seq_len if run is not None else loaded.model.spec.context)
    paired = loaded.model.spec.encoder is not None
    parts = []
    for source in sources:
        try:
            corpus = open_pairs(source) if paired else files.open_corpus(source)
        except files.NoCorpusError as error:
            if data is not None:
                raise
            raise error.of_run(Path(model), ", or name the corpus by --data") from None
        tokenize = loader.tokenize_pairs if paired else loader.tokenize
        if split == "all":
            parts.append(tokenize(corpus, loaded.tokenizer))
            continue
        first, last = files.split(corpus, held_out)
        if split == "train" or paired:
            parts.append(tokenize(first if split == "train" else last, loaded.tokenizer))
            continue
        before = tokenize(first, loaded.tokenizer)
        parts.append(tokenize(last, loaded.tokenizer, int(before.ids[-1:][0])))
    packing = "pairs" if paired else run.data.packing if run is not None else "stream"
    batches = loader.evaluation_batches(parts, batch_size, window, stride, packing)
    scored = prepare(loaded.model, "int8") if dtype == "int8" else loaded.model
    result = score(scored, batches)
    if not as_json:
        table = Table(box=None, show_header=False)
        table.add_column(style="bold")
        for name, value in asdict(result).items():
            table.add_row(name, _shown(value))
        out().print(table)
    emit({"model": model, "data": sources, "split": split, **asdict(result)}, as_json)


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _to_be_asked(which: str, dtype: str) -> "Loaded":
    from assay.loading import load

    found = load(which, dtype)
    if found.tokenizer is None:
        raise AssayError(f"{which}: it has no tokenizer, so no text can be scored by it.")
    if found.model.spec.encoder is not None:
        raise AssayError(f"{which}: tasks are for decoders; it has an encoder.")
    return found


def _evaluate_harness(
    model: str,
    names: list[str],
    include_path: Path | None,
    fewshot: int | None,
    limit: int | None,
    batch_size: int,
    dtype: str,
    as_json: bool,
) -> None:
    from assay.evaluate.harness import run_harness

    subject = _to_be_asked(model, dtype)
    results = run_harness(
        subject.model,
        subject.tokenizer,
        names,
        batch_size=batch_size,
        limit=limit,
        include_path=None if include_path is None else str(include_path),
        fewshot=fewshot,
        stop_tokens=subject.end_tokens,
    )
    if not as_json:
        table = Table("task", "metric", "value", "± s.e.", box=None)
        for of, metrics in results.items():
            for metric, value in metrics.items():
                name, _, how = metric.partition(",")
                if isinstance(value, float) and not name.endswith("_stderr"):
                    error = metrics.get(f"{name}_stderr,{how}")
                    shown = f"{error:.4f}" if isinstance(error, float) else "-"
                    table.add_row(of, name, f"{value:.4f}", shown)
        out().print(table)
    emit({"model": model, "harness": results}, as_json)


def _evaluate_task(
    model: str,
    name: str,
    file: Path | None,
    against: str | None,
    limit: int | None,
    batch_size: int,
    dtype: str,
    as_json: bool,
) -> None:
    from assay.evaluate import tasks

    one = tasks.task(name)
    asked = tasks.questions(one, tasks.documents(one, file, limit=limit))
    results = {}
    for which in filter(None, (model, against)):
        subject = _to_be_asked(which, dtype)
        results[which] = tasks.score(
            subject.model, subject.tokenizer, one, asked, batch_size=batch_size
        )
    if not as_json:
        table = Table("model", "accuracy", "normalised", "examples", box=None)
        for which, result in results.items():
            norm = "-"
            if result.accuracy_norm is not None:
                norm = f"{result.accuracy_norm:.4f} ± {result.stderr_norm:.4f}"
            row = (f"{result.accuracy:.4f} ± {result.stderr:.4f}", norm, str(result.examples))
            table.add_row(which, *row)
        out().print(table)
        out().print("accuracy ± its standard error")
        if parts := results[model].parts:
            table = Table("part", *results, box=None)
            for part in parts:
                table.add_row(part, *(f"{result.parts[part]:.4f}" for result in results.values()))
            out().print(table)
    result = results[model]
    data = {
        "model": model,
        "task": result.task,
        "accuracy": result.accuracy,
        "accuracy_norm": result.accuracy_norm,
        "stderr": result.stderr,
        "stderr_norm": result.stderr_norm,
        "examples": result.examples,
        "parts": result.parts,
    }
    if against is not None:
        other = results[against]
        difference, interval = tasks.paired_difference(result.right, other.right, result.part_of)
        data |= {
            "against": against,
            "against_accuracy": other.accuracy,
            "difference": difference,
            "difference_ci95": list(interval),
        }
        said = {"difference": (difference, interval)}
        if result.right_norm is not None:
            normalised = tasks.paired_difference(result.right_norm, other.right_norm)
            said["normalised"] = normalised
            data |= {
                "difference_norm": normalised[0],
                "difference_norm_ci95": list(normalised[1]),
            }
        for what, (mean, (low, high)) in said.items() if not as_json else ():
            out().print(
                f"{what} {mean:+.4f}, 95 % between {low:+.4f} and {high:+.4f} (paired bootstrap)"
            )
    emit(data, as_json)


@app.command()
def check(
    model: Architecture,
    full: Annotated[
        bool, typer.Option("--full", help="A preset or a spec at its own size.")
    ] = False,
    coordinates: Annotated[
        bool, typer.Option("--coordinates", help="muP's check: what grows with the width?")
    ] = False,
    widths: Annotated[
        str | None,
        typer.Option(help="With --coordinates: d_model, the base first; 64,128,256 if left out."),
    ] = None,
    updates: Annotated[
        int | None, typer.Option(help="With --coordinates; 4 if left out.", min=1)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--out", help="With --coordinates: a .png or .svg to draw.")
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Proves what can be proved: no sight of the future, cache, gradients, bfloat16.

    With `--coordinates`, instead: the model at several widths, a few updates, in the standard
    parametrisation and under muP, and how much each part's output changed.

    Example: assay check gpt2

    Example: assay check nano --coordinates --set optimizer=muon --out coordinates.png
    """
    changes = changes_of(settings)
    if coordinates:
        refuse_idle("with --coordinates", full=full, seed=seed)
        _check_coordinates(model, changes, widths or "64,128,256", updates or 4, picture, as_json)
        return
    refuse_idle("without --coordinates", widths=widths, updates=updates, out=picture)
    from assay.evaluate.checks import check as run_checks
    from assay.loading import kind_of, load, run_of
    from assay.spec.presets import shrink

    if kind_of(model) in ("preset", "spec"):
        run = run_of(model).changed(changes)
        subject = run.model if full else shrink(run.model)
    else:
        refuse_idle("of what is neither a preset nor a spec", full=full, set=changes)
        subject = load(model).model
    report = run_checks(subject, seed=seed)
    if not as_json:
        table = Table("", "check", "worst", box=None)
        table.add_column("where", overflow="fold")
        for row in report.checks:
            mark = "[green]✓[/]" if row.passed else "[red]✗[/]"
            table.add_row(mark, row.name, f"{row.worst:.3g}", escape(row.where or row.note or ""))
        out().print(table)
    emit({"model": model, **asdict(report)}, as_json)
    if not report.passed:
        raise typer.Exit(1)


def _check_coordinates(
    model: str,
    changes: dict,
    widths: str,
    updates: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    from assay.loading import run_of
    from assay.train.coordinates import check_coordinates, shown

    if not all(width.strip().isdigit() for width in widths.split(",")):
        raise AssayError(f"--widths: found '{widths}'; give numbers, as in 64,128,256.")
    refuse_picture("--out", picture)
    run = run_of(model).changed(changes)
    standard, mup = check_coordinates(run, [int(width) for width in widths.split(",")], updates)
    if not as_json:
        for form in (standard, mup):
            title = {"mup": "muP", "standard": "standard parametrisation"}[form.parametrisation]
            table = Table(
                "part", box=None, title=f"{title}, {form.optimizer}", title_justify="left"
            )
            for width in form.widths:
                table.add_column(f"{width}", justify="right")
            table.add_column("slope", justify="right")
            table.add_column("")
            for part in form.parts:
                changed = (f"{change:.4f}" for change in part.changes[-1])
                table.add_row(part.name, *changed, f"{part.slope:+.2f}", shown(part.slope))
            out().print(table)
            out().print()
        out().print(
            f"Each figure is how much an output changed in {updates} updates (root mean square); "
            f"the slope, the power of the width that it grows with."
        )
        steepest = mup.steepest
        found = f"{steepest.name} has {steepest.slope:+.2f}"
        out().print(
            f"Under muP nothing grows with the width: at most {found}."
            if mup.passed
            else f"Under muP something grows with the width: {found}."
        )
    if picture is not None:
        from assay.train.plot import plot_coordinates

        plot_coordinates(picture, (standard, mup), title=model)
        if not as_json:
            out().print(f"picture  {picture}", soft_wrap=True)
    emit(
        {
            "model": model,
            "passed": mup.passed,
            "updates": updates,
            "coordinates": [asdict(form) for form in (standard, mup)],
            "picture": picture and str(picture),
        },
        as_json,
    )
    if not mup.passed:
        raise typer.Exit(1)
