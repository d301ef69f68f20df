"""Comparisons that run: in this process, in others that are killed, and on a Ray cluster."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from assay import folders
from assay.compare import runner
from assay.compare.experiment import read, resolve
from assay.compare.record import read_run
from assay.compare.report import losses_csv
from assay.compare.results import Results, read_results
from assay.compare.runner import compare
from assay.compare.worker import perform
from assay.data import loader
from assay.errors import AssayError
from assay.evaluate import checks
from assay.model.transformer import abstract

# A bigram, so that its check and its steps cost next to nothing.
FILE = """
[base]
preset = "bigram"
set = {{ optimizer = "sgd", "optimizer.lr" = 1.0 }}
[data]
corpus = "{corpus}"
tokenizer = "byte"
seq_len = 32
batch_size = 8
[budget]
unit = "steps"
amount = {steps}
[design]
seeds = {seeds}
[running]
evaluations = 4
checkpoint_every = 20
[variants.slow]
[variants.fast]
set."optimizer.lr" = 20.0
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, size=n))) for n in rng.integers(2, 8, size=80)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(" ".join(words[i] for i in rng.zipf(1.3, size=4000) % len(words)))
    return path


@pytest.fixture
def write(tmp_path, corpus):
    def file(text: str = FILE, steps: int = 40, seeds: int = 2) -> Path:
        path = tmp_path / "experiment.toml"
        path.write_text(text.format(corpus=corpus, steps=steps, seeds=seeds))
        return path

    return file


class Here:
    """Does the tasks in this process, whose compiled programs are kept from test to test."""

    jobs = 1

    def __init__(self):
        self.tasks, self.drawn = [], []

    def run(self, tasks):
        for task in tasks:
            self.tasks.append(task)
            yield task, perform(task)
            yield None

    def settle(self): ...
    def close(self): ...


@pytest.fixture
def here(monkeypatch):
    pool = Here()
    monkeypatch.setattr(runner, "Processes", lambda *_: pool)
    monkeypatch.setattr(runner, "draw", lambda results, out: pool.drawn.append(out))
    return pool


def without_clocks(results: Results):
    """All of results.json but the clocks, and what says how it was run."""

    def strip(data):
        if isinstance(data, dict):
            clocks = ("seconds", "compile_seconds", "tokens_per_second", "started", "command")
            return {k: strip(v) for k, v in data.items() if k not in (*clocks, "environment")}
        return [strip(entry) for entry in data] if isinstance(data, list) else data

    data = strip(results.model_dump(mode="json"))
    del data["notes"]  # how many runs shared the machine
    return data


# ---------------------------------------------------------------------------- what comes out


def test_a_comparison_leaves_what_is_promised(write, here, tmp_path):
    out = tmp_path / "out"
    results = compare(write(), out)
    assert read_results(out) == results
    assert results.complete
    assert [row.name for row in results.rows] == ["slow", "fast"]
    assert [row.seeds for row in results.rows] == [(0, 1), (0, 1)]
    slow, fast = results.rows
    assert fast.val_bpb_mean < slow.val_bpb_mean  # 20 times the rate, in 40 steps
    assert (fast.rank, slow.rank) == (1, 2)
    assert slow.tokens == 40 * 8 * 32
    assert slow.train_flops == slow.tokens * slow.flops_per_token_train
    assert "optimizer differs from the first variant's" in fast.flags
    assert {check.name for check in slow.checks} >= {"causality_values", "causality_gradient"}
    (pair,) = results.pairs
    finals = {
        (run.variant, run.seed): json.loads((out / run.folder / "result.json").read_text())
        for run in results.runs
    }
    differences = [
        finals["slow", seed]["val_bpb"] - finals["fast", seed]["val_bpb"] for seed in (0, 1)
    ]
    assert pair.difference == pytest.approx(np.mean(differences))
    assert (pair.a, pair.b, pair.seeds) == ("slow", "fast", (0, 1))
    for run in results.runs:
        assert [p.step for p in run.curve] == [10, 20, 30, 40]
        assert all(p.val_bpb is not None for p in run.curve)
        assert run.curve[-1].val_bpb == run.val_bpb
    with (out / "losses.csv").open() as file:
        lines = [*csv.reader(file)]
    assert lines[0] == [
        "Step",
        "slow-s0 - loss",
        "fast-s0 - loss",
        "slow-s1 - loss",
        "fast-s1 - loss",
    ]
    assert [line[0] for line in lines[1:]] == ["10", "20", "30", "40"]
    assert float(lines[1][1]) == results.runs[0].curve[0].train_loss
    assert here.drawn == [out]


def test_what_is_done_is_not_done_again(write, here, tmp_path):
    file, out = write(), tmp_path / "out"
    first = compare(file, out)
    tasks = len(here.tasks)
    again = compare(file, out)
    assert len(here.tasks) == tasks
    assert without_clocks(again) == without_clocks(first)
    with pytest.raises(AssayError, match=r"another comparison \(design.seeds differs\)"):
        compare(write(seeds=3), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(AssayError, match="not empty and holds no comparison"):
        compare(file, tmp_path / "mine")


def test_a_seed_means_the_same_batches_for_every_variant(write, here, tmp_path):
    plan = resolve(read(write()))
    one, other = (entry.run for entry in plan.entries)
    first = loader.batches(loader.prepare(one.data), seed=1)
    second = loader.batches(loader.prepare(other.data), seed=1)
    for _ in range(3):
        a, b = next(first), next(second)
        assert all((a[name] == b[name]).all() for name in a)
    first.close()
    second.close()


LEAK = """
[base]
preset = "tiny-gpt"
set = {{ "model.decoder.num_layers" = 1 }}
[data]
corpus = "{corpus}"
tokenizer = "byte"
seq_len = 32
[budget]
unit = "steps"
amount = {steps}
[design]
seeds = {seeds}
[variants.honest]
[variants.prophet]
set."model.decoder.causal" = false
"""


@pytest.fixture
def causality_alone(monkeypatch):
    """Only that check, to save time."""

    def check(spec, causal):
        assert causal
        model = checks.at_random(abstract(spec), 0)
        found = checks.causality_values(model, checks.Sample(spec, 0))
        return checks.Report(found.passed, (found,))

    monkeypatch.setattr(checks, "check", check)


def test_a_variant_that_sees_the_future_is_refused_with_the_place(
    write, here, causality_alone, tmp_path
):
    with pytest.raises(
        AssayError,
        match=r"variants\.prophet: it sees the future.* logits of token \d+ moved when .* \d+",
    ):
        compare(write(LEAK), tmp_path / "out")
    assert all(task["do"] == "check" for task in here.tasks)  # nothing was spent
    assert not (tmp_path / "out" / "runs").exists()


def test_an_exception_that_a_spec_declares_is_a_flag(write, here, causality_alone, tmp_path):
    text = LEAK.replace('set."model.decoder.causal" = false', 'set."{path}" = {{ {moe} }}')
    text = text.replace("{path}", "model.decoder.pattern.*.feed_forward").replace(
        "{moe}",
        'kind = "moe", experts = 4, expert = {{ hidden = 32 }}, '
        'capacity = {{ load = 1.0, priority = "weight" }}',
    )
    results = compare(write(text, steps=2, seeds=1), tmp_path / "out")
    honest, prophet = results.rows
    assert honest.flags == ()
    (flag,) = prophet.flags
    assert flag.startswith("not causal in training: decoder.pattern.0.feed_forward.capacity")
    assert prophet.seeds == (0,)
    assert results.runs[1].experts.steps == (2,)
    (loads,) = results.runs[1].experts.load[0]
    assert sum(loads) == pytest.approx(1)


def test_rates_are_tuned_at_equal_cost_and_the_best_is_used(write, here, tmp_path):
    text = FILE + '[learning_rate]\nkind = "tune"\ngrid = [0.1, 1.0, 3.0]\nseeds = [9]\n'
    results = compare(write(text, steps=20, seeds=1), tmp_path / "out")
    assert len(results.tuning) == 2 * 3
    for row in results.rows:
        trials = [run for run in results.tuning if run.variant == row.name]
        assert {run.steps for run in trials} == {20}
        best = min(trials, key=lambda run: run.val_bpb)
        assert row.lr == best.lr
    (slow, _) = results.rows
    assert slow.lr == pytest.approx(3.0)
    assert any("upper end of the grid" in flag for flag in slow.flags)


def test_a_run_that_diverges_is_recorded_and_holds_the_verdict(write, here, tmp_path):
    text = FILE + 'set."train.z_loss" = 1.0\n'  # the square of 1e35 is no number
    text = text.replace('lr" = 20.0', 'lr" = 1e38')
    results = compare(write(text, steps=20, seeds=2), tmp_path / "out")
    assert [run.status for run in results.runs] == ["done", "failed"] * 2
    assert "seeds failed" in results.rows[1].flags[-1]
    assert results.pairs[0].verdict == "undecided"
    tasks = len(here.tasks)
    compare(write(text, steps=20, seeds=2), tmp_path / "out")
    assert len(here.tasks) == tasks  # it would diverge again


def test_seeds_stop_once_every_pair_is_decided(write, here, tmp_path):
    text = FILE.replace("[running]", "looks = [3, 6]\nstop_when_decided = true\n[running]")
    results = compare(write(text, steps=10, seeds=6), tmp_path / "out")
    assert [row.seeds for row in results.rows] == [(0, 1, 2)] * 2
    assert results.pairs[0].verdict == "worse"
    assert "fast is better than slow with 3 seeds" in results.sentence


def test_a_ladder_is_fitted_and_extrapolated(write, here, tmp_path):
    model = '"model.decoder.num_layers" = 0, "model.decoder.pattern" = []'  # a table and a head
    text = FILE.replace('"bigram"', '"tiny-gpt"').replace(
        'optimizer = "sgd"', f'{model}, optimizer = "sgd"'
    )
    text = text + "".join(f"[ladder.r{n}]\namount = {n}\n" for n in (5, 10, 20))
    results = compare(write(text, seeds=1), tmp_path / "out", target_flops=1e8)
    assert [row.name for row in results.rows if row.variant == "fast"] == [
        "fast@r5", "fast@r10", "fast@r20",
    ]  # fmt: skip
    assert set(results.scaling["fits"]) | set(results.scaling["errors"]) == {"slow", "fast"}
    if results.decision:
        assert results.sentence.startswith(results.decision.sentence)
    with pytest.raises(AssayError, match="no ladder of sizes"):
        compare(write(), tmp_path / "other", target_flops=1e9)


def test_a_design_is_costed_and_nothing_is_spent(write, here, tmp_path):
    told = SimpleNamespace(note=(notes := []).append)
    plan, found = runner.design(write(seeds=4), None, watcher=told)
    assert notes[0] == "Compiling and timing a few updates of 2 rows."
    assert [note.split("  ")[:2] for note in notes[1:]] == [["1/2", "slow"], ["2/2", "fast"]]
    assert found.runs == 8
    assert [cost.steps for cost in found.costs] == [40, 40]
    assert found.flops == sum(
        4 * 40 * 8 * 32 * entry.sizes["flops_per_token"] for entry in plan.entries
    )
    assert found.seconds > 0
    assert found.ladders == {}
    smallest = dict(found.smallest)
    assert smallest[4] < smallest[3] < smallest[2]
    assert {task["do"] for task in here.tasks} == {"measure"}
    compare(write(seeds=2), tmp_path / "pilot")
    _, found = runner.design(write(seeds=4), None, pilot=tmp_path / "pilot")
    (pair,) = read_results(tmp_path / "pilot").pairs
    assert found.deviation.value == pytest.approx(pair.deviation)


# ---------------------------------------------------------------------------- killed


def command(file, out, *more):
    line = [sys.executable, "-m", "assay.cli", "compare", file, "--out", out, "--quiet", *more]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment(file))


def environment(file):
    """Ray's token lies beside the experiment: it would make one in the user's home."""
    token = Path(file).with_name("token")
    token.write_text("0" * 64)
    return os.environ | {"XLA_FLAGS": "", "RAY_AUTH_TOKEN_PATH": str(token)}


def wait_for(process, happened, what):
    deadline = time.monotonic() + 180
    while not happened():
        assert process.poll() is None, f"ended before {what}: {process.stderr.read()}"
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_killed_twice_no_number_changes_but_the_clocks(write, tmp_path):
    file = write(steps=1500)
    out = tmp_path / "killed"

    def checkpoints(run):
        folder = out / "runs" / run / "checkpoints"
        return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]

    def half_done(run):
        return bool(checkpoints(run)) and not (out / "runs" / run / "result.json").exists()

    for run in ("slow-s0", "fast-s0"):
        with command(file, out, "--jobs", "1") as process:
            wait_for(process, lambda run=run: half_done(run), f"a checkpoint of {run}")
            process.kill()  # the process alone: its worker must see that it is gone
        assert process.returncode == -signal.SIGKILL
        assert half_done(run)
    finished = out / "runs" / "slow-s0" / "result.json"
    when = finished.stat().st_mtime_ns
    with command(file, out, "--jobs", "2") as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert finished.stat().st_mtime_ns == when  # it was not run again
    whole = compare(file, tmp_path / "whole", jobs=2)
    assert without_clocks(read_results(out)) == without_clocks(whole)
    assert (out / "losses.csv").read_text() == losses_csv(whole)
    assert "fast" in (out / "report.html").read_text()


def test_two_at_work_in_one_folder_is_refused(write, here, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.0)
    with (
        folders.held(tmp_path / "out", "assay compare"),
        pytest.raises(AssayError, match="another assay compare is at work"),
    ):
        compare(write(), tmp_path / "out")


# ---------------------------------------------------------------------------- Ray


@pytest.mark.parametrize(
    ("on", "says"), [("ray", "needs the package 'ray'"), ("slurm", "legal are ray")]
)
def test_where_nothing_can_be_run_nothing_is_written(write, tmp_path, monkeypatch, on, says):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(AssayError, match=says):
        compare(write(), tmp_path / "out", on=on)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_numbers(write, here, tmp_path):
    """One that is started here, whose workers see the folder; Ray forks, so not in this process."""
    file = write(seeds=1)
    with command(file, tmp_path / "ray", "--on", "ray", "--jobs", "2") as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    there = read_results(tmp_path / "ray")
    assert there.environment.jobs == 2
    assert without_clocks(there) == without_clocks(compare(file, tmp_path / "here"))
    assert (tmp_path / "ray" / "runs" / "slow-s0" / "checkpoints").is_dir()


@pytest.fixture
def head(tmp_path):
    """The address of a cluster with a server for clients, in a process group of its own.

    It has a token, which it then asks of clients.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port=0"]
    start += [f"--ray-client-server-port={port}", "--num-cpus=2", "--include-dashboard=false"]
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quietly |= {"start_new_session": True, "env": environment(tmp_path / "experiment.toml")}
    cluster = subprocess.Popen([*start, "--disable-usage-stats"], **quietly)
    try:
        for _ in range(240):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.5)
        else:
            pytest.fail("the cluster did not start")
        yield f"ray://127.0.0.1:{port}"
    finally:
        os.killpg(cluster.pid, signal.SIGKILL)  # it takes minutes to end of itself
        cluster.wait()


@pytest.mark.slow
def test_a_far_ray_cluster_gives_the_same_numbers(write, here, tmp_path, head):
    """By Ray's client: this Assay is sent along, and the runs are one task each over there."""
    file = write(seeds=1)
    with command(file, tmp_path / "far", "--on", head, "--jobs", "2") as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert without_clocks(read_results(tmp_path / "far")) == without_clocks(
        compare(file, tmp_path / "here")
    )


def test_runs_of_a_far_node_are_brought_back(write, tmp_path):
    """A node that does not see the folder sends what a run found out."""
    from assay.compare.pools import _bring_back, perform_there

    plan = resolve(read(write()))
    (job, *_) = runner.reported_jobs(plan, tmp_path / "out", {})
    task = runner.train_task(job)
    answer, files = perform_there(task, str(tmp_path / "nowhere"), "mark", ".")
    assert answer == {"finished": True}
    assert not job.folder.exists()
    _bring_back(job.folder, files)
    record = read_run(job, tmp_path / "out")
    assert (record.status, record.steps) == ("done", 40)
    assert [p.step for p in record.curve] == [10, 20, 30, 40]
