"""What the training loop costs beside its steps: data, Python, and fetching metrics.

A real run is trained, and its own calls are timed; nothing is modelled.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import jax

from assay.data import loader
from assay.spec.run import RunSpec
from assay.train.loop import train
from assay.train.progress import Silent


@dataclass(frozen=True)
class Loop:
    """Milliseconds a step, of a run's steps behind the first lines of its metrics.

    `step` is wall time; `make_batch` the making of a batch alone, which a thread does beside the
    steps; `wait_for_batch` what the loop waits for one; `python` the processor time of the loop's
    own thread, metrics included, without `dispatch`, which is that thread's in the call of a
    compiled step: XLA takes and gives every array of the state there (and where the calling
    thread computes, the step); `fetch` the longest fetch of a line's metrics.
    """

    step: float
    make_batch: float
    wait_for_batch: float
    python: float
    dispatch: float
    fetch: float
    steps: int

    @property
    def data_share(self) -> float:
        return self.make_batch / self.step

    @property
    def fetch_share(self) -> float:
        return self.fetch / self.step


class _Lines(Silent):
    """Notes the clocks at every line of the metrics."""

    def __init__(self):
        self.marks: list[tuple[int, float, float]] = []

    def update(self, share: float, record: dict[str, Any]) -> None:
        self.marks.append((record["step"], time.perf_counter(), time.thread_time()))


@contextmanager
def _timed(
    owner: Any, name: str, clock: Callable[[], float] = time.perf_counter
) -> Iterator[list[tuple[float, float]]]:
    """(when, seconds by the clock) of every call of a function while this lasts."""
    calls, real = [], getattr(owner, name)

    def timed(*args, **kwargs):
        at, began = time.perf_counter(), clock()
        try:
            return real(*args, **kwargs)
        finally:
            calls.append((at, clock() - began))

    with patch.object(owner, name, timed):
        yield calls


def bench_loop(run: RunSpec, *, steps: int = 60) -> Loop:
    """Trains `run` for so many steps in a folder that is then gone, and times the loop."""
    warm = 2  # lines that are left out: the first steps are not like the others
    run = run.changed({"train.budget": {"unit": "steps", "amount": steps}, "train.log_every": 10})
    lines = _Lines()
    with (
        tempfile.TemporaryDirectory() as folder,
        _timed(loader.Batches, "__next__") as waits,
        _timed(jax, "device_get") as fetches,
        _timed(jax.stages.Compiled, "__call__", time.thread_time) as dispatches,
    ):
        train(run, Path(folder) / "run", reporter=lines)
    # Behind the last line come the last steps, a checkpoint and the score: not the loop's.
    (first, began, before), (last, ended, after) = lines.marks[warm - 1], lines.marks[-2]
    counted = last - first

    def inside(calls):
        return [seconds for at, seconds in calls if began < at < ended]

    dispatch = 1e3 * sum(inside(dispatches)) / counted
    return Loop(
        step=1e3 * (ended - began) / counted,
        make_batch=1e3 * _making(run),
        wait_for_batch=1e3 * sum(inside(waits)) / counted,
        python=1e3 * (after - before) / counted - dispatch,
        dispatch=dispatch,
        fetch=1e3 * max(inside(fetches)),
        steps=counted,
    )


def _making(run: RunSpec, batches: int = 40) -> float:
    """Seconds of processor time to make a batch, by all threads, with nothing else to do."""
    made = loader.batches(loader.prepare(run.data), run.seed)
    with made:
        for _ in range(4):
            next(made)
        costs = []
        for _ in range(batches):
            began = time.process_time()
            next(made)
            costs.append(time.process_time() - began)
    # The thread works ahead, so single waits vary; together they are what was made.
    return max(sum(costs) / batches, median(costs))
