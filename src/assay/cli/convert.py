"""Converting checkpoints."""

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from assay.cli.application import Json, Quiet, app, emit, mesh_of, out, progress_options, short


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A run, a Hugging Face folder or id, a .gguf, a model folder.")
    ],
    destination: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    to: Annotated[
        str | None,
        typer.Option(help="hf or assay (a model folder); assay if left out and SOURCE is hf."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare logits with the source's own implementation; where PyTorch is, it does.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; each weight keeps its own if left out.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Hugging Face's model_type; the first that fits.")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="Verify on devices by axis: data=2,tensor=4.")
    ] = None,
    vocab_multiple: Annotated[
        int | None, typer.Option(help="Pad a model folder's vocabulary to a multiple.", min=1)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A checkpoint in another form, whole or not at all; never over what is there.

    Example: assay convert model.gguf exported --to hf
    """
    from assay.interop.convert import convert as run_conversion
    from assay.loading import open_source
    from assay.model.sharding import make_mesh
    from assay.spec.run import MeshSpec

    # As Ctrl-C does: what was written so far is taken away again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    devices = make_mesh(MeshSpec(**mesh_of(mesh))) if mesh else None
    opened = open_source(source)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, **progress_options(quiet)) as bar:
        task = bar.add_task("writing", total=None)
        result = run_conversion(
            opened,
            destination,
            to=to or ("assay" if opened.kind == "huggingface" else "hf"),
            verify=verify,
            dtype=dtype,
            family=family,
            vocab_multiple=vocab_multiple,
            mesh=devices,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not as_json:
        table = Table(box=None, show_header=False)
        table.add_column(style="bold")
        dtypes = ", ".join(f"{short(n)} {name}" for name, n in result.dtype.items())
        difference = result.max_logit_difference
        rows = {
            "source": f"{result.source} ({opened.kind})",
            "destination": f"{result.destination} ({result.format})",
            "parameters": f"{result.params:,}",
            "weights": dtypes,
            "verified": f"no: {result.note}"
            if difference is None
            else f"logits differ by at most {difference:.2e}, of {result.tolerance:.2e} allowed",
        }
        for name, value in rows.items():
            table.add_row(name, escape(value))
        out().print(table)
    emit(asdict(result), as_json)
