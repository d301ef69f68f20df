"""How a training step's time grows: with tokens, width, depth, context and experts.

Each axis doubles from one small model, the rest staying as it is. The slope between neighbours
is of log time to log size: 1 where time doubles, 2 where it is fourfold, 0 where it stays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import numpy as np

from assay.bench.timing import seconds
from assay.bench.train import jax_step
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    MoeSpec,
    Rope,
    StackSpec,
    TopK,
    TransformerSpec,
)
from assay.spec.run import RunSpec

BEND = 0.3
"""How much a slope must change from one doubling to the next to be called a bend."""


def _run(
    *, batch: int = 8, context: int = 128, width: int = 128, layers: int = 4, experts: int = 0
) -> RunSpec:
    mlp = MlpSpec(hidden=4 * width if not experts else 2 * width)
    block = BlockSpec(
        attention=AttentionSpec(heads=max(width // 32, 1), positions=Rope()),
        feed_forward=MoeSpec(experts=experts, expert=mlp, router=TopK(k=2)) if experts else mlp,
    )
    model = TransformerSpec(
        vocab_size=512,
        d_model=width,
        context=context,
        decoder=StackSpec(num_layers=layers, pattern=(block,)),
    )
    return RunSpec(model=model).changed({"data.batch_size": batch, "data.seq_len": context})


AXES: dict[str, tuple[str, tuple[int, ...], Callable[[int], RunSpec]]] = {
    "tokens": ("sequences of 128", (1, 2, 4, 8, 16, 32), lambda n: _run(batch=n)),
    "width": ("d_model", (32, 64, 128, 256, 512), lambda n: _run(width=n)),
    "depth": ("layers", (1, 2, 4, 8, 16), lambda n: _run(layers=n)),
    "context": (
        "tokens a sequence, 2,048 in all",
        (64, 128, 256, 512, 1024, 2048),
        lambda n: _run(batch=2048 // n, context=n),
    ),
    "experts": ("experts, 2 of them active", (2, 4, 8, 16, 32), lambda n: _run(experts=n)),
}


@dataclass(frozen=True)
class Growth:
    """Milliseconds a step (median) for each size along an axis.

    `slopes` are between neighbours, `slope` of the line through all (least squares). `bend` is
    the size where the slope changes most, None where no change is over `BEND`.
    """

    axis: str
    unit: str
    sizes: tuple[int, ...]
    milliseconds: tuple[float, ...]
    slopes: tuple[float, ...]
    slope: float
    bend: int | None


def slopes_of(sizes, times) -> tuple[float, ...]:
    """Slopes of log time to log size between neighbours."""
    x, y = np.log(sizes), np.log(times)
    return tuple((np.diff(y) / np.diff(x)).tolist())


def bend_of(sizes, slopes) -> int | None:
    """The size at which the slope changes most, if by more than `BEND`."""
    changes = np.abs(np.diff(slopes))
    if not len(changes) or changes.max() <= BEND:
        return None
    return sizes[int(changes.argmax()) + 1]


def bench_growth(
    *, dtype: str = "float32", axes: tuple[str, ...] = tuple(AXES), rounds: int = 5, tell=None
) -> list[Growth]:
    """Times whole updates on random tokens, each size in turn; `tell` gets each axis when done."""
    grown = []
    for axis in axes:
        unit, sizes, make = AXES[axis]
        steps = []
        for size in sizes:
            run = make(size).at("compute.dtype", dtype)
            shape = (run.data.batch_size, run.data.seq_len)
            rng = np.random.default_rng(0)
            batch = {
                name: rng.integers(run.model.vocab_size, size=shape, dtype=np.int32)
                for name in ("tokens", "targets")
            }
            steps.append(jax_step(run, batch))
            steps[-1]()
        times = [[] for _ in sizes]
        for _ in range(rounds):  # turn by turn: a busy moment touches all sizes alike
            for step, taken in zip(steps, times, strict=True):
                taken.append(seconds(step, 1))
        milliseconds = tuple(1e3 * median(taken) for taken in times)
        slopes = slopes_of(sizes, milliseconds)
        slope = float(np.polyfit(np.log(sizes), np.log(milliseconds), 1)[0])
        grown.append(Growth(axis, unit, sizes, milliseconds, slopes, slope, bend_of(sizes, slopes)))
        if tell:
            tell(grown[-1])
        jax.clear_caches()
    return grown


def plot_growth(grown: list[Growth], path: Path, title: str) -> None:
    """Time against size on logarithmic axes, a panel each, with the slope of every doubling."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    columns = min(3, len(grown))
    rows = math.ceil(len(grown) / columns)
    figure = Figure(figsize=(3.7 * columns, 3.1 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, growth in zip(panels, grown, strict=False):
        sizes, times = np.array(growth.sizes), np.array(growth.milliseconds)
        panel.loglog(sizes, times, "o-", color="#2563eb", markersize=4, linewidth=1.5)
        middles = np.sqrt(sizes[1:] * sizes[:-1]), np.sqrt(times[1:] * times[:-1])
        for x, y, slope in zip(*middles, growth.slopes, strict=True):
            panel.annotate(
                f"{slope:.2f}", (x, y), (0, 7), textcoords="offset points", ha="right", fontsize=8
            )
        if growth.bend is not None:
            panel.axvline(growth.bend, color="#9ca3af", linestyle=":", linewidth=1)
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        panel.set_title(f"{growth.axis}: slope {growth.slope:.2f} over all", fontsize=9)
        panel.set_xlabel(growth.unit, fontsize=8)
        panel.set_ylim(times.min() / 1.6, times.max() * 1.8)
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
    for panel in panels[::columns]:
        panel.set_ylabel("ms a step", fontsize=8)
    for panel in panels[len(grown) :]:
        panel.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
