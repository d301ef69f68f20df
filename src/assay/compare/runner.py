"""A comparison from its file to its report: check, tune, train, judge, write. Killed, it goes on.

The folder holds `experiment.toml` (as given), `plan.json` (every run, resolved: what must be the
same to go on), `checks.json`, `runs/` and perhaps `tuning/` (a folder a run, as `assay train`
makes them), `log.txt` (what the processes printed), and what it is for: `results.json`,
`losses.csv`, `report.html`, written anew whenever a run ends.
"""

import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from assay.compare.design import Outline, outline
from assay.compare.experiment import Entry, Experiment, Plan, read, resolve, tuned, with_rate
from assay.compare.live import Silent, Watcher
from assay.compare.pools import Pool, Processes, Ray, free_cores, has_accelerator
from assay.compare.record import (
    Job,
    gather,
    plain,
    progress,
    read_run,
    surroundings,
    with_device,
    write_text,
)
from assay.compare.report import draw, losses_csv
from assay.compare.results import FILE, CheckRecord, Environment, Results, RunRecord
from assay.compare.worker import Task
from assay.errors import AssayError, counted, need_extra
from assay.folders import LOCK, held
from assay.spec import presets

# ---------------------------------------------------------------------------- the whole


def compare(
    file: Path | str,
    out: Path | str,
    *,
    steps: int | None = None,
    target_flops: float | None = None,
    jobs: int | None = None,
    on: str | None = None,
    watcher: Watcher | None = None,
) -> Results:
    """Trains every variant of an experiment file with every seed, and says which is better.

    Args:
        out: the folder; one that holds the same comparison, half-done, is gone on with.
        steps: replaces the file's budget.
        target_flops: the budget to be spent in earnest; needs a `ladder` in the file.
        jobs: how many runs at once.
        on: `ray` or `ray://HOST:PORT`, a Ray cluster; else processes here.

    Raises:
        AssayError: for all that is wrong with the file; if a variant sees the future; if `out`
            holds something else.
    """
    file, out, watcher = Path(file), Path(out), watcher or Silent()
    experiment = read(file)
    jobs = decide_jobs(experiment, jobs, on)
    check_place(on)
    if target_flops is not None and not experiment.ladder:
        raise AssayError(
            f"--target-flops: {file} has no ladder of sizes to extrapolate from; add at least "
            f"three rungs, as in [ladder.small] amount = 1e12."
        )
    plan = resolve(experiment, file.parent, steps=steps)
    command = f"assay compare {shlex.quote(str(file))} --out {shlex.quote(str(out))}"
    command += f" --steps {steps}" if steps is not None else ""
    command += f" --target-flops {target_flops:g}" if target_flops is not None else ""
    with held(out, "assay compare") as lock:
        text = open_folder(out, file, plan)
        with pool_for(on, jobs, out, [lock], experiment) as pool:
            environment = surroundings(pool.jobs, len(free_cores()), command)
            comparison = Comparison(plan, out, file, text, environment, target_flops, watcher)
            comparison.check(pool)
            comparison.tune(pool)
            comparison.train(pool)
        return comparison.write(complete=True)


def design(
    file: Path | str,
    out: Path | None = None,
    *,
    steps: int | None = None,
    pilot: Path | None = None,
    jobs: int | None = None,
    on: str | None = None,
    watcher: Watcher | None = None,
) -> tuple[Plan, Outline]:
    """What `compare` would cost and could show, by a few updates of each row; no folder is made.

    Raises:
        AssayError: as `compare`.
    """
    file = Path(file)
    experiment = read(file)
    jobs = decide_jobs(experiment, jobs, on)
    check_place(on)
    plan = resolve(experiment, file.parent, steps=steps)
    with (
        tempfile.TemporaryDirectory(prefix="assay-") as scratch,
        # One at a time: what a step takes is measured.
        pool_for(on, 1, Path(scratch), (), experiment) as pool,
    ):
        return plan, outline(plan, pool, pilot, out, jobs, (watcher or Silent()).note)


def decide_jobs(experiment: Experiment, asked: int | None, on: str | None) -> int | None:
    """How many runs at once: where time is a result or the budget, one; None: as a cluster can.

    Raises:
        AssayError: if more were asked for there.
    """
    running = experiment.running
    asked = asked or running.jobs
    timed = running.timed or experiment.budget.unit == "seconds"
    if timed and (asked or 1) > 1:
        why = "running.timed" if running.timed else "budget.unit = 'seconds'"
        raise AssayError(
            f"jobs: found {asked}, but with {why} one run has the machine to itself; runs at "
            f"once would take each other's time."
        )
    if asked is not None or on is not None:
        return 1 if timed else asked
    if timed or has_accelerator():
        return 1
    runs = len(experiment.variants) * len(experiment.design.seed_list)
    return min(len(free_cores()), runs * max(len(experiment.ladder), 1))


def check_place(on: str | None) -> None:
    """Refuses a place where nothing can be run, before a folder is made.

    Raises:
        AssayError: if it is no cluster's address; if Ray is not installed.
    """
    if on is None:
        return
    if on != "ray" and not on.startswith("ray://"):
        raise AssayError(f"--on {on}: legal are ray (a cluster here) and ray://HOST:PORT.")
    if find_spec("ray") is None:
        raise need_extra("ray", "ray", "Running on a Ray cluster")


@contextmanager
def pool_for(
    on: str | None, jobs: int | None, out: Path, held: Sequence[int], experiment: Experiment
) -> Iterator[Pool]:
    """The pool, closed at the end; after an interrupt, once its runs are saved."""
    if on is None:
        pool: Pool = Processes(jobs, out / "log.txt", held)
    else:
        pool = Ray(on, jobs, out, experiment.running.gpus)
    try:
        yield pool
    except KeyboardInterrupt:
        pool.settle()
        raise
    finally:
        pool.close()


# ---------------------------------------------------------------------------- the folder


def open_folder(out: Path, file: Path, plan: Plan) -> str:
    """Writes down what is to be run, or holds it against what the folder was begun with.

    Returns the experiment file's text.

    Raises:
        AssayError: if the folder holds something else.
    """
    text, record = file.read_text(), out / "plan.json"
    identity = json.loads(json.dumps(plan.identity()))
    if record.is_file():
        begun = json.loads(record.read_text())
        if begun != identity:
            raise AssayError(
                f"{out}: it holds another comparison ({_difference(begun, identity)} differs); "
                f"name another folder by --out. A design is declared before the first run."
            )
        return text
    if [path for path in out.iterdir() if path.name != LOCK]:
        raise AssayError(f"{out}: it is not empty and holds no comparison; name another by --out.")
    write_text(out / "experiment.toml", text)
    write_text(record, json.dumps(identity, indent=1))
    return text


def _difference(a: Any, b: Any, path: str = "") -> str:
    """The dotted path of the first difference of two plain nested values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            if a.get(name) != b.get(name):
                return _difference(a.get(name), b.get(name), f"{path}.{name}".lstrip("."))
    return path


# ---------------------------------------------------------------------------- the steps


@dataclass
class Comparison:
    """One comparison under way. Each step finds out what it left undone, and does that."""

    plan: Plan
    out: Path
    file: Path
    text: str
    environment: Environment
    target_flops: float | None
    watcher: Watcher

    def __post_init__(self):
        self.checks: dict[str, tuple[CheckRecord, ...]] = {}
        self.flags: dict[str, list[str]] = {entry.name: [] for entry in self.plan.entries}
        self.tuning: list[RunRecord] = []
        self.factors: dict[str, float] = {}
        self.results: Results | None = None

    # ---- assay check

    def check(self, pool: Pool) -> None:
        """Puts each architecture, shrunk, through `assay check`.

        Raises:
            AssayError: if one sees the future in a way that its spec does not declare.
        """
        kept = self.out / "checks.json"
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        shrunk = {e.name: presets.shrink(e.run.model) for e in self.plan.entries}
        wanted = {model.to_json(None): model for model in shrunk.values()}
        tasks = [
            {"do": "check", "model": model.model_dump(mode="json"), "key": key}
            for key, model in wanted.items()
            if key not in known
        ]
        if tasks:
            self.watcher.note(
                f"Checking {counted(len(tasks), 'architecture')} for sight of the future."
            )
        for done in pool.run(tasks):
            if done is not None:
                task, answer = done
                known[task["key"]] = _good(answer)["checks"]
                write_text(kept, json.dumps(plain(known)))
        for entry in self.plan.entries:
            checks = known[shrunk[entry.name].to_json(None)]
            self.checks[entry.name] = tuple(CheckRecord.from_data(plain(check)) for check in checks)
            self._judge_checks(entry)

    def _judge_checks(self, entry: Entry) -> None:
        for check in self.checks[entry.name]:
            if not check.passed and check.name.startswith("causality"):
                raise AssayError(
                    f"variants.{entry.variant}: it sees the future, so its loss would mean "
                    f"nothing: {check.where} ({check.name} of assay check, on the shrunk model)."
                )
            if not check.passed:
                self.flags[entry.name].append(f"assay check: {check.name} fails: {check.where}")
            elif check.name.startswith("causality") and "exception: " in check.note:
                what = check.note.split("exception: ")[1].split("; checked")[0]
                self.flags[entry.name].append(f"not causal in training: {what}")

    # ---- learning rates

    def tune(self, pool: Pool) -> None:
        """Tries the grid of learning rates for each row, and keeps each one's best."""
        trials = tuning_jobs(self.plan, self.out)
        if not trials:
            return
        self._carry_out(pool, [job for group in trials.values() for job in group], "tuning")
        means: dict[str, dict[float, float]] = {}
        for (name, factor), jobs in trials.items():
            records = [read_run(job, self.out) for job in jobs]
            self.tuning += records
            scores = [r.val_bpb if r.val_bpb is not None else float("inf") for r in records]
            means.setdefault(name, {})[factor] = sum(scores) / len(scores)
        rows = {entries[0].name: entries for _, entries in tuned(self.plan)}
        for name, by_factor in means.items():
            best = min(by_factor, key=by_factor.__getitem__)
            if by_factor[best] == float("inf"):
                raise AssayError(
                    f"{name}: every learning rate of the grid diverged; try lower factors in "
                    f"learning_rate.grid."
                )
            for entry in rows[name]:
                self.factors[entry.name] = best
            if best in (min(by_factor), max(by_factor)):
                end = "lower" if best == min(by_factor) else "upper"
                self.flags[name].append(
                    f"its best learning rate ({best:g} times the run's) lies at the {end} end of "
                    f"the grid; a wider one may find a better"
                )

    # ---- the runs

    def train(self, pool: Pool) -> None:
        """Trains seed by seed, so that what is there can be paired; stops early if so designed."""
        design = self.plan.experiment.design
        seeds, looks = self.plan.seeds, design.looks
        stops = [len(seeds)]
        if design.stop_when_decided:
            stops = [*range(2, len(seeds) + 1)] if looks == "every" else [*looks]
        begun = 0
        for stop in stops or [len(seeds)]:
            jobs = [job for job in self.jobs() if job.run.seed in seeds[:stop]]
            self._carry_out(pool, jobs, "training")
            begun = stop
            if begun < len(seeds) and all(p.verdict != "undecided" for p in self.results.pairs):
                self.watcher.note(f"Every pair is decided after {begun} seeds: no more are run.")
                break

    def jobs(self) -> list[Job]:
        """Every reported run, seed by seed."""
        return reported_jobs(self.plan, self.out, self.factors)

    def _carry_out(self, pool: Pool, jobs: list[Job], what: str) -> None:
        by_folder = {str(job.folder): job for job in jobs}
        tasks = [train_task(job) for job in jobs if not job.ended()]
        before = [read_run(job, self.out) for job in jobs if job.ended()]
        self.watcher.begin(what, self.plan, jobs, before)
        self.write()
        for done in pool.run(tasks):
            self.watcher.look({job.name: progress(job) for job in jobs if not job.ended()})
            if done is None:
                continue
            task, answer = done
            if "stopped" in _good(answer):
                raise KeyboardInterrupt
            job = by_folder[task["folder"]]
            self.watcher.ended(read_run(job, self.out))
            if what == "training":
                self.write()
        self.watcher.end()

    # ---- what it is for

    def write(self, *, complete: bool = False) -> Results:
        """results.json and losses.csv as far as they are known; at the end the report as well."""
        jobs = self.jobs()
        self.environment = with_device(self.environment, jobs)
        results = gather(
            self.plan,
            jobs,
            root=self.out,
            file=self.file,
            text=self.text,
            checks=self.checks,
            environment=self.environment,
            tuning=self.tuning,
            flags=self.flags,
            target_flops=self.target_flops,
            complete=complete,
        )
        write_text(self.out / FILE, results.to_json() + "\n")
        write_text(self.out / "losses.csv", losses_csv(results))
        if complete:
            self.watcher.note("Drawing the report.")
            draw(results, self.out)
        self.results = results
        return results


def reported_jobs(plan: Plan, out: Path, factors: dict[str, float]) -> list[Job]:
    """Every run that is reported, seed by seed; `factors` on learning rates, by row."""
    jobs = []
    for seed in plan.seeds:
        for entry in plan.entries:
            changes = with_rate(entry.run, factors[entry.name]) if entry.name in factors else {}
            run = entry.run.changed(changes | {"seed": seed})
            name = f"{entry.name}-s{seed}"
            jobs.append(Job(name, entry, run, out / "runs" / name))
    return jobs


def tuning_jobs(plan: Plan, out: Path) -> dict[tuple[str, float], list[Job]]:
    """The runs that choose learning rates, by row and factor: other seeds, scored on other text."""
    rate = plan.experiment.learning_rate
    trials: dict[tuple[str, float], list[Job]] = {}
    for narrow, entries in tuned(plan):
        row = entries[0].name
        width = f"-w{rate.base_width}" if rate.kind == "mup" else ""
        for factor in rate.grid:
            for seed in rate.seeds:
                run = narrow.changed(
                    with_rate(narrow, factor)
                    | {
                        "seed": seed,
                        "train.score": "validation",
                        "train.budget.amount": narrow.train.budget.amount * rate.share,
                    }
                )
                name = f"{row}{width}-lr{factor:g}-s{seed}"
                job = Job(name, entries[0], run, out / "tuning" / name)
                trials.setdefault((row, factor), []).append(job)
    return trials


def train_task(job: Job) -> Task:
    return {"do": "train", "run": job.run.model_dump(mode="json"), "folder": str(job.folder)}


def _good(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise AssayError(answer["error"])
    return answer
