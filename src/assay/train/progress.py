"""What a person sees while a run goes on. The loop only calls `start`, `update` and `stop`."""

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text


class Reporter(Protocol):
    """Told of the run's progress; `share` is of the budget, 0 to 1."""

    def note(self, text: str) -> None: ...
    def start(self, title: str) -> None: ...
    def update(self, share: float, record: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None: ...
    def start(self, title: str) -> None: ...
    def update(self, share: float, record: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class _TimeLeft(ProgressColumn):
    """From the share done since the start: what a resumed run did before took no time now."""

    def render(self, task) -> Text:
        seconds = task.fields["left"]
        if seconds is None:
            return Text("-:-- left", style="cyan")
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return Text(f"{clock} left", style="cyan")


class Bar:
    """A progress bar on a terminal; a line every tenth of the run where there is none."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.progress: Progress | None = None
        self.next_line = 0.0

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def start(self, title: str) -> None:
        self.began, self.first_share = time.monotonic(), None
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            _TimeLeft(),
            console=self.console,
            expand=True,
        )
        self.task = self.progress.add_task(title, total=1.0, figures="first steps", left=None)
        self.progress.start()

    def update(self, share: float, record: dict[str, Any]) -> None:
        if self.first_share is None:
            self.began, self.first_share = time.monotonic(), share
        done = share - self.first_share
        passed = time.monotonic() - self.began
        left = passed / done * (1 - share) if done > 0 else None
        figures = f"loss {record['loss']:.3f}"
        if record.get("bpb") is not None:
            figures += f"  {record['bpb']:.3f} bits/byte"
        figures += f"  {_short(record['tokens_per_second'])} tok/s"
        if self.progress is not None:
            self.progress.update(self.task, completed=share, figures=figures, left=left)
        elif share >= self.next_line:
            self.next_line = share + 0.1
            self.note(f"{share:4.0%}  step {record['step']}  {figures}")

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:,.0f}"


def default_reporter(quiet: bool) -> Reporter:
    """The bar, or nothing."""
    return Silent() if quiet else Bar(Console(stderr=True, file=sys.stderr))
