"""Planning a run before it is paid for."""

import math
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from assay.cli.application import Architecture, Json, Settings, app, changes_of, emit, mesh_of, out
from assay.cli.describe import run_of
from assay.errors import AssayError, counted, how_to_get
from assay.spec.run import MeshSpec

RUNNERS_UP = 7
"""Plans that a search shows behind the first."""


@app.command()
def plan(
    model: Architecture,
    topology: Annotated[
        str,
        typer.Option(
            help="Chips: v5p:4x4x4, v6e:16x16, h100:8, cpu. Several, as v5e:16x16,h100:64, are "
            "compared."
        ),
    ] = "cpu",
    mesh: Annotated[
        str | None, typer.Option(help="Devices by axis: fsdp=16,tensor=4. All fsdp if left out.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Sequences an update, over all devices: the run's (a preset's on a CPU), else one "
            "a device.",
            min=1,
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a sequence: the run's, else the context.", min=1)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16, the default; of a run, and on a CPU of a preset, its own."
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, muon or sgd.")] = None,
    remat: Annotated[
        str | None,
        typer.Option(
            help="What the backward pass computes again: the run's if it says so; auto, the "
            "default, the least that fits."
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Propose what is not given: mesh, remat, the batch or its parts."
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile for a TPU that is not there.")
    ] = True,
    price: Annotated[
        str | None,
        typer.Option(
            metavar="<float>",
            help="US dollars a chip-hour. Of several machines: one for all, or one each, as "
            "1.2,2.99.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="<int>",
            help="Of the whole training, as 300B or 15T: adds its time and cost.",
        ),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Memory, FLOPs, bytes sent and speed of a training step, before anything runs.

    Example: assay plan llama-3-8b --topology v5p:4x4x4 --mesh fsdp=16,tensor=4 --batch-size 64
    """
    from assay.loading import has_run
    from assay.plan.topology import parse_topology, with_price

    flags = {
        "data.batch_size": batch_size,
        "data.seq_len": seq_len,
        "compute.dtype": dtype,
        "optimizer": optimizer,
        "mesh": mesh_of(mesh),
    }
    changes = {path: value for path, value in flags.items() if value is not None}
    changes = changes_of(settings, changes)
    names = [name.strip() for name in topology.split(",")]
    prices = _prices(price, names)
    machines = [
        with_price(parse_topology(name), of) for name, of in zip(names, prices, strict=True)
    ]
    whole = None if tokens is None else _tokens(tokens)
    free = "data.batch_size" not in changes
    is_run = has_run(model)  # its own batches and dtype, then
    given = {path.split(".")[0] for path in changes}

    def run_on(machine):
        """As it would be trained there: a preset on a CPU as it is, else one sequence a device."""
        alone = machine.chip.name == "cpu" and len(machines) == 1
        own, each = is_run or alone, {}
        if search:  # what is not given is proposed
            each = {"train.accumulate": 1, "mesh": MeshSpec().model_dump()}
        if free and (search or not own):
            parts = changes.get("train.accumulate", 1)
            each["data.batch_size"] = machine.devices * (parts if isinstance(parts, int) else 1)
        if not own and not {"compute", "compute.dtype"} & changes.keys():
            each["compute.dtype"] = "bfloat16"
        run = run_of(model, each | changes)
        if "data.seq_len" in changes or is_run:
            return run
        return run.at("data.seq_len", run.model.context)

    from assay.plan import planner

    runs = [run_on(machine) for machine in machines]
    if remat is None:
        of = runs[0].compute.remat
        remat = of if of != "none" or "compute.remat" in changes else "auto"
    mesh = runs[0].mesh if "mesh" in given else None
    held = {"batch": free, "remat": remat, "mesh": mesh}
    if "train.accumulate" in changes:
        held["parts"] = (changes["train.accumulate"],)
    if len(machines) > 1:
        plans = [
            _on_machine(run, machine, search=search, **held)
            for run, machine in zip(runs, machines, strict=True)
        ]
        plans = planner.ranked(plans)
        if not as_json:
            _print_machines(model, plans, whole)
        emit({"model": model, "machines": [_as_json(p, model, whole) for p in plans]}, as_json)
        return

    (machine,), (run,) = machines, runs
    if search:
        plans = planner.search(run, machine, most=200, **held)
        if not plans:
            raise AssayError(_what_would_fit(run, machine, mesh))
        best, others = planner.confirmed(plans) if compile else (plans[0], plans[1:])
        others = others[:RUNNERS_UP]
    else:
        best, others = planner.make_plan(run, machine, remat, compile=compile), []
    if not as_json:
        _print(model, best, others, whole, asked=compile, priced=price is not None)
    data = _as_json(best, model, whole)
    if search:
        data["runners_up"] = [_as_json(other, model, whole) for other in others]
    emit(data, as_json)


def _on_machine(run, machine, *, search: bool, **held):
    """The best estimated plan of one machine; where a search finds none, what needs least."""
    from assay.plan import planner

    if not search:
        return planner.make_plan(run, machine, held["remat"], compile=False)
    found = planner.search(run, machine, most=1, **held)
    plan = found[0] if found else planner.least(run, machine, held["mesh"])
    if plan is None:
        raise AssayError(_what_would_fit(run, machine, held["mesh"]))
    return plan


def _as_json(plan, model: str, whole: int | None) -> dict:
    from assay.plan.planner import training

    data = plan.as_json() | {"model": model}
    return data if whole is None else data | {"training": asdict(training(plan, whole))}


def _prices(text: str | None, names: list[str]) -> list[float | None]:
    """One price for all machines, or one each; one that is left empty is the list's."""
    if text is None:
        return [None] * len(names)
    try:
        prices = [float(one) if one.strip() else None for one in text.split(",")]
    except ValueError:
        prices = [-1.0]
    if not all(one is None or 0 <= one < math.inf for one in prices):
        raise AssayError(f"--price: found '{text}'; dollars a chip-hour are expected, as in 2.99.")
    if len(prices) not in (1, len(names)):
        found = f"{counted(len(prices), 'price')} of {counted(len(names), 'machine')}"
        raise AssayError(f"--price: found {found}; one for all is expected, or one each.")
    return prices * (len(names) if len(prices) == 1 else 1)


TIMES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def _tokens(text: str) -> int:
    number, times = text, TIMES.get(text[-1:].lower())
    if times is not None:
        number = text[:-1]
    try:
        tokens = float(number) * (times or 1)
    except ValueError:
        tokens = 0.0
    if not 1 <= tokens < math.inf:
        raise AssayError(f"--tokens: found '{text}'; a number is expected, as in 300B or 15T.")
    return round(tokens)


def _what_would_fit(run, machine, mesh) -> str:
    """Why a search found nothing, and what is nearest."""
    from assay.plan import planner

    data = run.data
    where = machine.name if mesh is None else f"{machine.name} on that mesh"
    sentence = f"plan: nothing that was tried fits {where} at {data.seq_len:,} tokens a sequence"
    best = planner.least(run, machine, mesh)
    if best is None:
        return f"{sentence}: no mesh is legal for {counted(data.batch_size, 'sequence')}."
    sizes = best.as_json()["mesh"].items()
    axes = ", ".join(f"{axis}={size}" for axis, size in sizes) or "one device"
    sentence += (
        f". The least is {_size(best.memory.total)} a device of {_size(best.room)} ({axes}; blocks "
        "recomputed, the optimizer offloaded, a sequence at a time)"
    )
    length = data.seq_len
    while length > 128 and not best.fits:
        length //= 2
        best = planner.least(run.at("data.seq_len", length), machine, mesh) or best
    if best.fits and length < data.seq_len:
        return f"{sentence}. {length:,} tokens would fit; or take more chips."
    if best.fits:
        return f"{sentence}: take a smaller batch, or one that meshes and parts divide."
    return f"{sentence}: take more chips, or larger ones."


def _print(model: str, plan, others, whole, *, asked: bool, priced: bool) -> None:
    data, chip, console = plan.as_json(), plan.topology.chip, out()
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    axes = ", ".join(f"{axis}={size}" for axis, size in data["mesh"].items()) or "one device"
    console.print(
        f"[bold]{model}[/] on {plan.topology.name} ({axes}), {_batch(plan.run)} x "
        f"{data['seq_len']:,} tokens an update, {data['dtype']}, remat {data['remat']}"
        f"{', optimizer offloaded' if data['offload_optimizer'] else ''}: {verdict}."
    )
    how = "compiled for it" if data["compiled"] else "estimated from the spec"
    console.print(f"\n[italic]memory a device, {how}[/]")
    table = Table(box=None, show_header=False)
    table.add_column("what", style="bold")
    table.add_column("GiB", justify="right")
    for name, size in data["breakdown"].items():
        if size:
            table.add_row(f"{name} (estimate)" if data["compiled"] else name, _size(size))
    table.add_row("in all", _size(data["bytes_per_device"]))
    table.add_row("there is", _size(chip.memory))
    console.print(table)
    if data["serving"]["kv_bytes_per_token"]:
        _print_serving(data, plan.topology)
    if data["attentions_with_scores"] and chip.name != "cpu":
        console.print(
            f"{counted(data['attentions_with_scores'], 'attention')} of it that no kernel makes: "
            "scores lie in memory."
        )
    console.print("\n[italic]time of an update, by roofline[/]")
    table = Table(box=None, show_header=False)
    table.add_column("what", style="bold")
    table.add_column("ms", justify="right")
    for name, seconds in data["predicted_seconds"].items():
        if name == "host" and not seconds:
            continue
        table.add_row(name, f"{1e3 * seconds:,.1f} ms")
    table.add_row("in all", f"{1e3 * data['predicted_step_seconds']:,.1f} ms")
    console.print(table)
    speed = data["predicted_tokens_per_second"]
    console.print(
        f"\n{speed:,.0f} tokens/s, {speed / plan.topology.devices:,.0f} a device, "
        f"MFU {data['predicted_mfu']:.1%}, {data['flops_per_step']:.3g} FLOPs an update"
    )
    if data["predicted_tokens_per_second_pi90"]:
        low, high = data["predicted_tokens_per_second_pi90"]
        kind = "TPU" if plan.topology.is_tpu else "GPU"
        console.print(
            f"{low:,.0f} to {high:,.0f} tokens/s, by how far nine in ten published runs on {kind}s "
            "were off"
        )
    if data["dollars_per_billion_tokens"] is not None:
        console.print(
            f"${data['dollars_per_billion_tokens']:,.2f} a billion tokens at "
            f"${chip.price:.2f} a chip-hour"
            + ("" if priced else " (list price; --price sets yours)")
        )
    elif chip.name != "cpu":
        console.print(f"no list price of {chip.kind}: --price gives the cost")
    if whole is not None:
        _print_training(plan, whole)
    for axis, size in data["collective_bytes_per_step"].items():
        console.print(f"{axis} sends {size / 1e9:,.2f} GB a device and update")
    if data["compiler"]:
        kinds = data["compiler"]["collectives"].items()
        parts = ", ".join(f"{row['count']} {kind}" for kind, row in kinds)
        console.print(
            f"compiled in {data['compiler']['seconds']:.0f} s; collectives: {parts or 'none'}; "
            f"{data['compiler']['pallas_kernels']} Pallas kernels"
        )
    elif asked and plan.topology.is_tpu and not data["compiled"]:
        console.print(
            "not compiled: the TPU's compiler, libtpu, is not installed; "
            + escape(how_to_get("plan"))
        )
    if others:
        if not plan.fits:
            console.print(
                "None that was compiled fits; the others are estimates. Take more chips, or fewer "
                "tokens (--batch-size, --seq-len).",
                style="red",
            )
        console.print("\n[italic]runners-up, estimated[/]")
        table = Table("mesh", "batch", "remat", "memory", "tokens/s", "MFU", box=None)
        for other in others:
            row = other.as_json()
            table.add_row(
                ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items()),
                _batch(other.run),
                row["remat"],
                _size(row["bytes_per_device"]),
                f"{row['predicted_tokens_per_second']:,.0f}",
                f"{row['predicted_mfu']:.1%}",
            )
        console.print(table)


def _print_training(plan, whole: int) -> None:
    from assay.plan.planner import training

    of = training(plan, whole)
    between = ""
    if of.interval is not None:
        size, unit = _unit(of.interval[0])
        low, high = (f"{seconds / size:,.1f}" for seconds in of.interval)
        between = f" ({low} to {high} {unit})"
    cost = "" if of.dollars is None else f", ${_rounded(of.dollars)}"
    out().print(
        f"{of.tokens:,} tokens: {counted(of.updates, 'update')}, {_time(of.seconds)}{between}, "
        f"{_rounded(of.device_hours)} chip-hours{cost}, updates alone"
    )


def _print_machines(model: str, plans, whole: int | None) -> None:
    from assay.plan.planner import training
    from assay.plan.roofline import NINE_IN_TEN

    console = out()
    console.print(
        f"[bold]{model}[/], {plans[0].run.data.seq_len:,} tokens a sequence, "
        f"{plans[0].run.compute.dtype}, estimated; none was compiled.\n"
    )
    table = Table("machine", "mesh", "batch", "memory", "tokens/s", "MFU", "$/B", box=None)
    if whole is not None:
        table.add_column("time")
        table.add_column("$")
    for plan in plans:
        row, speed = plan.as_json(), plan.speed
        cost = speed.dollars_per_billion_tokens
        cells = [
            plan.topology.name,
            ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items()) or "-",
            _batch(plan.run),
            _size(row["bytes_per_device"]),
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.mfu:.0%}",
            "-" if cost is None else _rounded(cost),
        ]
        if whole is not None:
            of = training(plan, whole)
            cells += [_time(of.seconds), "-" if of.dollars is None else _rounded(of.dollars)]
        table.add_row(*cells, style=None if plan.fits else "red")
    console.print(table)
    for plan in plans:
        if not plan.fits:
            console.print(f"{plan.topology.name}: does not fit.", style="red")
    kinds = {"TPU" if plan.topology.is_tpu else "GPU" for plan in plans if plan.speed.interval}
    for kind in sorted(kinds):
        low, high = NINE_IN_TEN[kind.lower()]
        console.print(
            f"Nine in ten published runs on {kind}s had {low} to {high} times the speed predicted."
        )
    if unpriced := [plan.topology.name for plan in plans if plan.topology.chip.price is None]:
        console.print(f"no list price of {', '.join(unpriced)}: --price gives the cost")


def _rounded(amount: float) -> str:
    """Dollars or hours: small ones with cents."""
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def _time(seconds: float) -> str:
    """As people say it: 43.0 s, 12.5 min, 5.2 h, 3.4 days."""
    size, unit = _unit(seconds)
    return f"{seconds / size:,.1f} {unit}"


def _unit(seconds: float) -> tuple[int, str]:
    units = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    return next((of for of in units if seconds >= 2 * of[0]), units[-1])


def _print_serving(data: dict, topology) -> None:
    serving, console = data["serving"], out()
    console.print("\n[italic]memory a device to decode the same batch, estimated[/]")
    table = Table(box=None, show_header=False)
    table.add_column("what", style="bold")
    table.add_column("GiB", justify="right")
    table.add_row(f"parameters, {data['dtype']}", _size(serving["parameters"]))
    table.add_row(
        f"KV cache, {counted(data['batch_size'], 'sequence')}", _size(serving["kv_cache"])
    )
    console.print(table)
    console.print(
        f"KV cache: {serving['kv_bytes_per_token']:,} bytes a token, "
        f"{_size(serving['kv_bytes_per_sequence'])} a sequence of {data['seq_len']:,}; "
        f"{topology.name} holds {serving['sequences_that_fit']:,} of them."
    )


def _batch(run) -> str:
    """Sequences an update, and in how many parts."""
    parts = run.train.accumulate
    return f"{run.data.batch_size}" + (f" in {parts}" if parts > 1 else "")


def _size(size: float) -> str:
    """In GiB; in MiB where that would be 0.0 something."""
    if size < 0.1 * 2**30:
        return f"{size / 2**20:,.2f} MiB"
    return f"{size / 2**30:,.2f} GiB"
