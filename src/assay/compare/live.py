"""What a person sees while a comparison goes on. The runner only calls the `Watcher`'s methods."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from assay.compare.experiment import Plan
from assay.compare.record import Job
from assay.compare.results import RunRecord
from assay.errors import counted

Progress = Mapping[str, tuple[float, dict[str, Any]]]
"""By run: the share of its budget that is spent, and its last line of metrics."""

SEEDS_SHOWN = 5


class Watcher(Protocol):
    """Told of what is done; `begin` to `end` is one round of runs."""

    def note(self, text: str) -> None: ...
    def begin(self, what: str, plan: Plan, jobs: Sequence[Job], done: Sequence[RunRecord]): ...
    def look(self, progress: Progress) -> None: ...
    def ended(self, run: RunRecord) -> None: ...
    def end(self) -> None: ...


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None: ...
    def begin(self, what, plan, jobs, done) -> None: ...
    def look(self, progress: Progress) -> None: ...
    def ended(self, run: RunRecord) -> None: ...
    def end(self) -> None: ...


class Screen:
    """On a terminal a table, a line a row and a column a seed; elsewhere a line a finished run."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, file=sys.stderr)
        self.live: Live | None = None

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def begin(self, what, plan, jobs, done) -> None:
        self.what, self.jobs, self.began = what, {job.name: job for job in jobs}, time.monotonic()
        self.records = {run.name: run for run in done if run.status in ("done", "failed")}
        self.progress: Progress = {}
        self.before = len(self.records)
        left = len(jobs) - self.before
        self.note(
            f"{what.capitalize()}: {counted(left, 'run')}"
            + (f", {self.before} done before." if self.before else ".")
        )
        if self.console.is_terminal and left:
            self.live = Live(console=self.console, refresh_per_second=2, transient=True)
            self.live.start()

    def look(self, progress: Progress) -> None:
        self.progress = progress
        if self.live is not None:
            self.live.update(self.table())

    def ended(self, run: RunRecord) -> None:
        self.records[run.name] = run
        if self.live is not None:
            self.live.update(self.table())
            return
        what = f"failed: {run.error}" if run.status == "failed" else _score(run)
        self.note(f"{len(self.records)}/{len(self.jobs)}  {run.name}  {what}  {run.seconds:.1f} s")

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
            self.console.print(self.table())

    def table(self) -> Table:
        """Bits per byte of finished runs; the share done and the training loss of others."""
        grid: dict[str, dict[str, Job]] = {}
        for job in self.jobs.values():
            row, column = job.name.rsplit("-s", 1)
            grid.setdefault(row, {})[column] = job
        seeds = [*{column: None for jobs in grid.values() for column in jobs}]
        shown = seeds[-SEEDS_SHOWN:]  # what is on its way, and the latest of what is done
        table = Table(box=None, title=self._title(), title_justify="left", title_style="")
        table.add_column(self.what, overflow="fold")
        for seed in shown:
            table.add_column(f"seed {seed}", justify="right")
        for row, jobs in grid.items():
            table.add_row(row, *(self._cell(jobs.get(seed)) for seed in shown))
        return table

    def _title(self) -> str:
        done = len(self.records)
        fresh, passed = done - self.before, time.monotonic() - self.began
        title = f"{done} of {counted(len(self.jobs), 'run')}"
        if fresh and done < len(self.jobs):
            title += f", about {_clock(passed / fresh * (len(self.jobs) - done))} left"
        return title

    def _cell(self, job: Job | None) -> str:
        if job is None:
            return ""
        if (run := self.records.get(job.name)) is not None:
            return "[red]failed[/]" if run.status == "failed" else f"[bold]{_score(run)}[/]"
        share, last = self.progress.get(job.name, (0.0, {}))
        if "loss" not in last:
            return "[dim]·[/]"
        return f"[cyan]{share:.0%} {last['loss']:.2f}[/]"


def _score(run: RunRecord) -> str:
    return "done" if run.val_bpb is None else f"{run.val_bpb:.4f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def default_watcher(quiet: bool) -> Watcher:
    """The table, or nothing."""
    return Silent() if quiet else Screen()
