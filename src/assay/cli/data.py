"""Corpora made ready for training."""

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from assay.cli.application import Json, Quiet, app, emit, out, progress_options, short
from assay.errors import counted

data = typer.Typer(help="Make a corpus ready for training.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.callback()
def _group() -> None:
    """Make a corpus ready for training."""


@data.command()
def prepare(
    corpus: Annotated[str, typer.Argument(help="A corpus of text: a name, a path, a glob.")],
    folder: Annotated[
        Path, typer.Option("--out", help="A new folder, or one whose preparation broke off.")
    ],
    tokenizer: Annotated[
        str, typer.Option(help="byte, char, bpe, bpe:4096, or a path of a tokenizer.json.")
    ] = "bpe",
    shard_tokens: Annotated[int, typer.Option(help="Tokens a shard.", min=1)] = 100_000_000,
    workers: Annotated[
        int | None, typer.Option(help="Processes; one for each CPU if left out.", min=1)
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format", help="modded (llm.c's header), nanogpt (no header), npy (any vocabulary)."
        ),
    ] = "modded",
    held_out: Annotated[
        float, typer.Option(help="The share at the end that a tokenizer learns nothing of.")
    ] = 0.1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokenises a corpus to shards, which `assay train --data FOLDER` maps from disk.

    Killed at any moment, the same command goes on: finished shards are kept.

    Example: assay data prepare python-docs --out tokens --tokenizer bpe:4096
    """
    from assay.data.prepare import prepare as run_preparation
    from assay.data.tokenizers import fewer_than_asked, parse

    start, asked = time.perf_counter(), parse(tokenizer)
    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, **progress_options(quiet)) as bar:
        task = bar.add_task("tokenising", total=None)
        manifest = run_preparation(
            corpus,
            folder,
            asked,
            shard_tokens=shard_tokens,
            workers=workers,
            form=form,
            held_out=held_out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    seconds = time.perf_counter() - start
    if not quiet and (few := fewer_than_asked(asked, manifest["tokenizer"]["vocab_size"])):
        print(f"note: {few}", file=sys.stderr)
    if not as_json:
        about, made = manifest["tokenizer"], len(manifest["shards"])
        documents = counted(manifest["documents"], "document")
        table = Table(box=None, show_header=False)
        table.add_column(style="bold")
        rows = {
            "folder": f"{folder}: {counted(made, 'shard')}, {manifest['kept']} of them kept",
            "text": f"{manifest['text_bytes']:,} bytes, {documents}",
            "tokens": f"{short(manifest['tokens'])} ({manifest['dtype']}, {manifest['format']})",
            "tokenizer": f"{about['kind']}, {about['vocab_size']:,} ids ({about['file']})",
            "time": f"{seconds:.1f} s",
            "next": f"assay train PRESET --data {shlex.quote(str(folder))}",
        }
        for name, value in rows.items():
            table.add_row(name, escape(value))
        out().print(table)
    emit(manifest | {"out": str(folder), "seconds": seconds}, as_json)
