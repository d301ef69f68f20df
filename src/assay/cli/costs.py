"""What `assay bench memory|loop|growth` print."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from assay.cli.application import emit, out, refuse_picture

if TYPE_CHECKING:
    from assay.spec.run import RunSpec


def bench_memory(model: str, run: "RunSpec", against: str | None, as_json: bool) -> None:
    from assay.bench.memory import bench_memory

    result = bench_memory(run, against=against)
    about = {"model": model, "dtype": run.compute.dtype}
    if not as_json:
        title = f"{model}, {run.compute.dtype}, batch {run.data.batch_size} x {run.data.seq_len}"
        table = Table("MB", "libraries", "peak of steps", "peak of process", box=None, title=title)
        for name, peak in (("ours", result.ours), ("PyTorch, eager", result.theirs)):
            if peak:
                figures = (peak.imported, peak.steps, peak.process)
                table.add_row(name, *("" if x is None else f"{x / 1e6:,.0f}" for x in figures))
        out().print(table)
        if result.ratio:
            out().print(f"a step of ours takes {result.ratio:.2f} times PyTorch's memory")
    emit(about | asdict(result), as_json)


def bench_loop(model: str, run: "RunSpec", as_json: bool) -> None:
    from assay.bench.loop import bench_loop

    result = bench_loop(run)
    if not as_json:
        shape = f"batch {run.data.batch_size} x {run.data.seq_len}, {result.steps} steps"
        table = Table("ms a step", "", "of a step", box=None, title=f"{model}, {shape}")
        for name, value in (
            ("a step of the loop, wall time", result.step),
            ("making a batch (a thread does it)", result.make_batch),
            ("waiting for a batch", result.wait_for_batch),
            ("Python, processor time", result.python),
            ("dispatch of the step, processor time", result.dispatch),
            ("the longest fetch of a line's metrics", result.fetch),
        ):
            table.add_row(name, f"{value:,.3f}", f"{value / result.step:.1%}")
        out().print(table)
    shares = {"data_share": result.data_share, "fetch_share": result.fetch_share}
    emit({"model": model} | asdict(result) | shares, as_json)


def bench_growth(dtype: str, plot: Path | None, rounds: int, as_json: bool) -> None:
    from assay.bench.growth import bench_growth, plot_growth

    refuse_picture("--plot", plot)

    def tell(growth) -> None:
        if as_json:
            return
        table = Table(growth.unit, "ms a step", "slope", box=None, title=growth.axis)
        slopes = ("", *(f"{slope:.2f}" for slope in growth.slopes))
        for size, time, slope in zip(growth.sizes, growth.milliseconds, slopes, strict=True):
            table.add_row(f"{size:,}", f"{time:,.1f}", slope)
        out().print(table)
        bend = f"bends most at {growth.bend:,}" if growth.bend else "no bend"
        out().print(f"slope {growth.slope:.2f} over all, {bend}\n")

    grown = bench_growth(dtype=dtype, rounds=rounds, tell=tell)
    if plot is not None:
        plot_growth(grown, plot, f"A training step on this machine, {dtype}")
        if not as_json:
            out().print(f"drawn: {plot}")
    data = {"dtype": dtype, "growth": [asdict(growth) for growth in grown]}
    emit(data | {"plot": plot and str(plot)}, as_json)
