"""What every command shares: the application, common options, printing."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from assay.errors import AssayError

app = typer.Typer(
    name="assay",
    help="Decide which transformer to train: describe, train, compare, plan.",
    epilog="With any command, --debug shows where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

# ---------------------------------------------------------------------------- options

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no notes.")]
Model = Annotated[
    str,
    typer.Argument(help="A preset, a run, a Hugging Face folder or id, a .gguf, a model folder."),
]
Architecture = Annotated[
    str,
    typer.Argument(
        help="A preset, a spec (.json), a run, a Hugging Face folder or id, .gguf, model folder."
    ),
]
"""MODEL where no parameters are needed."""
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Any field, as model.d_model=64."),
]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
LAST_SEED = 2**32 - 1
Seed = Annotated[int, typer.Option(help="Of everything drawn at random.", min=0, max=LAST_SEED)]


# ---------------------------------------------------------------------------- printing


def out() -> Console:
    """Standard output, at the terminal's width; 80 columns where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=80)


def progress_options(quiet: bool) -> dict[str, Any]:
    """Of a bar on standard error; files and pipes get none, where Rich leaves empty lines."""
    console = Console(stderr=True)
    disable = quiet or not console.is_terminal
    return {"console": console, "disable": disable, "transient": True}


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


def figure(number: float | None, unit: str, form: str = ".4f") -> str:
    return "-" if number is None else f"{number:{form}} {unit}"


def short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


# ---------------------------------------------------------------------------- reading options


def changes_of(settings: list[str] | None, flags: dict[str, Any] | None = None) -> dict[str, Any]:
    """What flags change, by path, and PATH=VALUE pairs; a value is JSON where it reads as such.

    Raises:
        AssayError: if a pair is none, or one field is given two values.
    """
    changes = dict(flags or {})
    for setting in settings or []:
        path, equals, text = setting.partition("=")
        if not equals:
            raise AssayError(f"--set {setting}: expected PATH=VALUE.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if changes.get(path, value) != value:
            raise AssayError(f"{path}: given twice, as {changes[path]} and as {value}.")
        changes[path] = value
    return changes


def mesh_of(text: str | None) -> dict[str, Any] | None:
    """AXIS=DEVICES pairs, separated by commas."""
    if text is None:
        return None
    axes = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if not equals or not size.isdigit():
            raise AssayError(f"--mesh {text}: expected AXIS=DEVICES, as in data=2,tensor=4.")
        if (name := name.strip()) in axes:
            raise AssayError(f"--mesh {text}: names the axis '{name}' twice.")
        axes[name] = int(size)
    return axes


def next_folder(name: str) -> Path:
    """runs/NAME-1, or the next number that is free."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def refuse_idle(where: str, **options: Any) -> None:
    """An option that would change nothing is refused, not passed over.

    Raises:
        AssayError: of the first that has a value.
    """
    for name, value in options.items():
        if value:
            option = name.replace("_", "-")
            raise AssayError(f"--{option}: it changes nothing {where}; leave it out.")


def refuse_picture(option: str, path: Path | None) -> None:
    """To be asked before minutes are spent on what the picture shows.

    Raises:
        AssayError: if the file is there already, or is neither .png nor .svg.
    """
    if path is None:
        return
    if path.suffix not in (".png", ".svg"):
        raise AssayError(f"{option} {path}: name a .png or a .svg.")
    if path.exists():
        raise AssayError(f"{option} {path}: it is there already, and nothing is overwritten.")
