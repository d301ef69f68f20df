"""Where a comparison's tasks are done: processes of this machine, or a Ray cluster.

Both take tasks (`worker.perform`'s) and give answers in the order in which they come; None in
between, now and then, is a moment to look at how the runs get on.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from assay.compare.worker import Answer, Task, perform
from assay.errors import AssayError

TICK = 0.5
"""Seconds between moments to look."""


class Pool(Protocol):
    """`jobs` tasks are done at once."""

    jobs: int

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Answer] | None]: ...
    def settle(self) -> None: ...
    def close(self) -> None: ...


def free_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def has_accelerator() -> bool:
    """Whether there is a device that one process takes for itself."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return False
    return any([*Path("/dev").glob(name)] for name in ("nvidia[0-9]*", "accel*", "kfd"))


class Processes:
    """`jobs` processes, each on its share of the cores; they end with this one, however it ends.

    `log` gets what they print. `held` are open files that stay open as long as any of them lives.
    """

    def __init__(self, jobs: int, log: Path, held: Sequence[int] = ()):
        self.jobs, self.log, self.held = jobs, log, tuple(held)
        self.processes: list[subprocess.Popen] = []
        self.listeners: list[threading.Thread] = []
        self.doing: dict[int, Task] = {}
        self.answers: queue.SimpleQueue[tuple[int, Answer | None]] = queue.SimpleQueue()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Answer] | None]:
        """Does the tasks.

        Raises:
            AssayError: if a process dies of something that is no answer.
        """
        waiting, doing = [*tasks], self.doing
        idle = [*range(len(self.processes))]
        while waiting or doing:
            while waiting and (idle or len(self.processes) < self.jobs):
                number = idle.pop(0) if idle else self._start()
                doing[number] = waiting.pop(0)
                stream = self.processes[number].stdin
                try:
                    stream.write(json.dumps(doing[number]) + "\n")
                    stream.flush()
                except BrokenPipeError:
                    raise self._died(number) from None
            try:
                number, answer = self.answers.get(timeout=TICK)
            except queue.Empty:
                yield None
                continue
            if answer is None:
                raise self._died(number)
            idle.append(number)
            yield doing.pop(number), answer

    def _start(self) -> int:
        number, cores = len(self.processes), free_cores()
        mine = cores[number :: self.jobs] if self.jobs > 1 else []
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "assay.compare.worker", *map(str, mine)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                pass_fds=self.held,
            )
        self.processes.append(process)
        listener = threading.Thread(target=self._listen, args=(number, process), daemon=True)
        listener.start()
        self.listeners.append(listener)
        return number

    def _listen(self, number: int, process: subprocess.Popen) -> None:
        with process.stdout as lines:
            for line in lines:
                self.answers.put((number, json.loads(line)))
        self.answers.put((number, None))

    def _died(self, number: int) -> AssayError:
        status = self.processes[number].wait()
        return AssayError(
            f"a process of the comparison ended with status {status}; what it said is in "
            f"{self.log}. The same command goes on from here."
        )

    def settle(self, seconds: float = 30) -> None:
        """After an interrupt from the terminal, which they got too: until their runs are saved."""
        for _ in self.doing:
            with suppress(queue.Empty):
                self.answers.get(timeout=seconds)

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()  # ends it
        for process in self.processes:
            process.wait()
        for listener in self.listeners:  # each closes what it read from
            listener.join()


# ---------------------------------------------------------------------------- Ray


class Ray:
    """A Ray cluster: `ray` starts one here or joins the one that runs; `ray://HOST:PORT` is far.

    Each run is one task. Where a node sees the comparison's folder, its runs are kept there, and
    half-done ones go on; elsewhere what a run found out is brought back when it ends, and its
    checkpoints are left behind. `gpus` are reserved for each run.
    """

    def __init__(self, address: str, jobs: int | None, folder: Path, gpus: float = 0):
        far = address.startswith("ray://")
        if far and _has_token():  # Ray's client alone does not show it of itself
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray  # reads the environment

        self.ray = ray
        options: dict[str, Any] = {"address": address} if far else {}
        if far:  # the nodes have Assay's dependencies, but perhaps not this Assay
            options["runtime_env"] = {"py_modules": [str(Path(__file__).parents[1])]}
        try:
            ray.init(log_to_driver=False, logging_level="warning", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = f"no cluster answers there, or it wants another token: {error}."
            raise AssayError(f"--on {address}: {why}") from None
        self.jobs = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(perform_there)
        self.folder = folder.absolute()
        self.mark = str(uuid.uuid4())
        (self.folder / MARK).write_text(self.mark)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Answer] | None]:
        """Does the tasks.

        Raises:
            AssayError: if a task dies of something that is no answer, as a lost node.
        """
        waiting, doing = [*tasks], {}
        while waiting or doing:
            while waiting and len(doing) < self.jobs:
                task = waiting.pop(0)
                there = task
                if "folder" in task:
                    there = task | {"folder": str(Path(task["folder"]).absolute())}
                reference = self.remote.remote(there, str(self.folder), self.mark, os.getcwd())
                doing[reference] = task
            ready, _ = self.ray.wait([*doing], num_returns=1, timeout=TICK)
            if not ready:
                yield None
                continue
            task = doing.pop(ready[0])
            try:
                answer, files = self.ray.get(ready[0])
            except self.ray.exceptions.RayError as error:
                first = str(error).strip().splitlines()[-1]
                raise AssayError(
                    f"a task on the Ray cluster failed: {first}. The same command goes on from "
                    f"here."
                ) from None
            _bring_back(Path(task.get("folder", ".")), files)
            yield task, answer

    def settle(self) -> None:
        """The cluster got no interrupt: what is not finished goes on from its last checkpoint."""

    def close(self) -> None:
        (self.folder / MARK).unlink(missing_ok=True)
        self.ray.shutdown()


def _has_token() -> bool:
    """Whether there is a token where Ray looks for one; a cluster that was begun here may ask."""
    named = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


MARK = ".here"
BROUGHT_BACK = ("run.json", "metrics.jsonl", "result.json", "failed.json")


def perform_there(task: Task, folder: str, mark: str, cwd: str) -> tuple[Answer, dict[str, str]]:
    """A task on a cluster's node: its answer, and the files of a run that is kept elsewhere."""
    seen = Path(folder) / MARK
    shared = seen.is_file() and seen.read_text() == mark
    if shared:
        os.chdir(cwd)
    if shared or "folder" not in task:
        return perform(task), {}
    with tempfile.TemporaryDirectory(prefix="assay-") as scratch:
        there = Path(scratch) / "run"
        answer = perform(task | {"folder": str(there)})
        files = {
            name: (there / name).read_text() for name in BROUGHT_BACK if (there / name).is_file()
        }
        return answer, files


def _bring_back(folder: Path, files: dict[str, str]) -> None:
    """The result last: a folder that holds it is whole."""
    for name in sorted(files, key=lambda name: name in ("result.json", "failed.json")):
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{name}.new"
        draft.write_text(files[name])
        draft.replace(folder / name)
