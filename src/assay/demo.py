"""Two minutes from text to samples, and every part of the journey on the way."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from assay.data import loader
from assay.evaluate.perplexity import ngram_baselines
from assay.generate.text import complete
from assay.loading import load
from assay.spec import presets
from assay.train.loop import train
from assay.train.plot import plot_losses
from assay.train.progress import default_reporter

PROMPT = 'The "for" statement'


def run_demo(
    seconds: float,
    corpus: str,
    folder: Path,
    console: Console,
    as_json: bool,
    quiet: bool,
    emit: Callable[[dict[str, Any], bool], None],
) -> None:
    """Trains `nano` on a corpus for some seconds, scores it beside two baselines, lets it write."""
    run = presets.get("nano").run.changed(
        {
            "data.sources": [{"corpus": corpus}],
            "train.budget": {"unit": "seconds", "amount": seconds},
        }
    )
    prepared = loader.prepare(run.data)
    if not quiet:
        console.print(
            f"Training [bold]nano[/] on [bold]{corpus}[/]: {prepared.train_bytes:,} bytes to "
            f"learn from, the last {prepared.held_out_bytes:,} held out, "
            f"{seconds:g} seconds.",
            soft_wrap=True,
        )
    result = train(run, folder, reporter=default_reporter(quiet))
    baselines = ngram_baselines(
        [part.ids for part in prepared.train],
        [part.ids for part in prepared.held_out],
        prepared.tokenizer.vocab_size,
        prepared.held_out_bytes,
    )
    unigram, bigram = baselines.unigram, baselines.bigram
    picture = plot_losses(
        folder,
        title=f"nano on {corpus}: {result.steps} steps in {result.seconds:.0f} s",
        baselines={"unigram": unigram, "bigram": bigram},
    )
    loaded = load(folder)
    written = complete(
        loaded.model,
        loaded.tokenizer,
        PROMPT,
        max_new_tokens=160,
        temperature=0.7,
        top_p=0.95,
        seed=0,
    )
    sample = PROMPT + written.text
    if not as_json:
        table = Table("held-out text", "bits per byte", box=None)
        table.add_row("unigram (tokens)", f"{unigram:.3f}")
        table.add_row("bigram (tokens)", f"{bigram:.3f}")
        table.add_row("[bold]nano[/]", f"[bold]{result.val_bpb:.3f}[/]")
        console.print()
        console.print(table)
        console.print("\n[bold]It writes:[/]\n")
        console.print(sample, markup=False)
        console.print(f"\nloss plot   {picture}", soft_wrap=True)
        console.print(f"more text   assay generate {folder} --prompt 'The'", soft_wrap=True)
    emit(
        {
            **asdict(result),
            "unigram_bpb": unigram,
            "bigram_bpb": bigram,
            "sample": sample,
            "plot": str(picture),
        },
        as_json,
    )
