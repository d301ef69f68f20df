"""A run that is stopped and goes on is, bit for bit, the run that was not stopped."""

import errno
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from assay import folders
from assay.errors import AssayError
from assay.model.transformer import layout
from assay.spec.run import ComputeSpec, MeshSpec
from assay.train import loop
from assay.train.checkpoint import (
    Checkpoints,
    NoRoomError,
    NotSavedError,
    flatten_state,
    safe_from_the_next_step,
)
from assay.train.loop import read_run, train
from assay.train.progress import Silent
from assay.train.step import initial_state
from tests.train.conftest import lines


def arrays(run, out, step):
    """Every array of a checkpoint by name."""
    form = layout(run.model, run.compute)
    checkpoints = Checkpoints(out / "checkpoints")
    state, _ = checkpoints.restore(step, initial_state(run), form)
    checkpoints.close()
    return {name: np.asarray(leaf) for name, leaf in flatten_state(state, form).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stop_at_and_resume_is_bit_exact(run, tmp_path, optimizer):
    run = run.at("optimizer", optimizer)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(run, whole)
    stopped = train(run, halves, stop_at=20)
    assert (stopped.steps, stopped.finished) == (20, False)
    resumed = train(read_run(halves), halves, resume=True)
    assert (resumed.steps, resumed.finished) == (40, True)
    assert lines(whole) == lines(halves)
    assert_same(arrays(run, whole, 40), arrays(run, halves, 40))


def command(run, out, *more):
    (out.parent / "spec.json").write_text(run.to_json())
    return [sys.executable, "-m", "tests.train.run_spec", out.parent / "spec.json", out, *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed_is_bit_exact(run, tmp_path, number):
    # Slow enough to be killed in the middle: many steps, a save every five.
    run = run.changed({"train.budget.amount": 300, "train.checkpoint_every": 5})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(run, whole)
    with subprocess.Popen(command(run, killed), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            saved = [p.name for p in (killed / "checkpoints").glob("*") if p.name.isdigit()]
            if any(int(name) >= 20 for name in saved):
                break
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(number)
        if number == signal.SIGINT:  # twice, as people press it
            time.sleep(0.1)
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert not (killed / "result.json").exists(), f"not killed in time: {errors}"
    if number != signal.SIGKILL:
        assert time.monotonic() - began < 30
        assert number.name in errors
    done = Checkpoints(killed / "checkpoints").latest()
    assert 20 <= done < 300
    result = train(read_run(killed), killed, resume=True)
    assert result.steps == 300
    assert lines(whole)[-1] == lines(killed)[-1]
    by_step = {line["step"]: line for line in lines(whole)}
    # A run that was stopped between two lines has one more, for its last step.
    assert all(by_step[line["step"]] == line for line in lines(killed) if line["step"] in by_step)
    assert by_step.keys() <= {line["step"] for line in lines(killed)}
    assert_same(arrays(run, whole, 300), arrays(run, killed, 300))


def test_resume_with_no_checkpoint_starts_again(run, tmp_path):
    notes = []

    class Listener(Silent):
        def note(self, text):
            notes.append(text)

    out = tmp_path / "out"
    train(run.changed({"train.budget.amount": 3}), out)
    for path in (out / "checkpoints").iterdir():
        for inner in sorted(path.rglob("*"), reverse=True):
            inner.unlink() if inner.is_file() else inner.rmdir()
        path.rmdir()
    (out / "result.json").unlink()
    before = lines(out)
    result = train(read_run(out), out, resume=True, reporter=Listener())
    assert result.steps == 3
    assert any("no checkpoint" in note for note in notes)
    assert lines(out) == before


def test_no_room_is_told_before_the_first_step_and_at_a_save(run, tmp_path, monkeypatch):
    run, out = run.changed({"train.checkpoint_every": 5}), tmp_path / "out"
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    with pytest.raises(NoRoomError, match=r"takes [\d.]+ MB, but its disk has 0.0 MB left\.$"):
        train(run, out)
    free[0] = 2**40
    train(run, out, resume=True, stop_at=10)

    class Full(Silent):  # from the first line of the metrics on
        def update(self, share, record):
            free[0] = 1000

    with pytest.raises(NoRoomError, match="That of step 15 is whole: --resume goes on"):
        train(read_run(out), out, resume=True, reporter=Full())
    free[0] = 2**40
    assert train(read_run(out), out, resume=True).finished


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ValueError("RESOURCE_EXHAUSTED: d/58: No [os_error_code='28']"),
            "No space left on device",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), None),
        (TimeoutError("Timed out while waiting for async_write_complete barrier."), None),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: another task died"), None),
    ],
    ids=["full", "forbidden", "lost", "barrier", "runtime"],
)
def test_only_what_the_disk_refused_is_told_as_such(tmp_path, monkeypatch, error, told):
    """The others keep their type: of a process that is gone the loop has more to say."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def fail():
        raise error

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(NotSavedError if told else type(error)) as raised:
        checkpoints.wait()
    if told:
        assert f"could not be written: {told}. None was saved before." in str(raised.value)
    else:
        assert raised.value is error
    monkeypatch.undo()
    checkpoints.close()


def test_metrics_that_cannot_be_written_are_told(run, tmp_path, monkeypatch):
    full = Path("/dev/full")
    monkeypatch.setattr(loop, "_continue_lines", lambda *_: (full.open("w"), None))
    with pytest.raises(NotSavedError, match=r"^/dev/full: No space left on device\. --resume goes"):
        train(run, tmp_path / "out")


def test_a_finished_run_tells_its_result_again(run, tmp_path):
    run = run.changed({"train.budget.amount": 3})
    first = train(run, tmp_path / "out")
    assert train(read_run(tmp_path / "out"), tmp_path / "out", resume=True) == first


def test_killed_between_its_last_update_and_its_result(run, tmp_path):
    run, out = run.changed({"train.budget.amount": 3}), tmp_path / "out"
    first, written = train(run, out), (out / "metrics.jsonl").read_text()
    for kept in (written, written[: written.rindex("{")]):  # scored, and not yet
        (out / "result.json").unlink()
        (out / "metrics.jsonl").write_text(kept)
        again = train(read_run(out), out, resume=True)
        assert (again.train_loss, again.val_loss) == (first.train_loss, first.val_loss)
        assert (again.steps, again.tokens, again.finished) == (3, first.tokens, True)
        assert (out / "metrics.jsonl").read_text() == written


def test_scanned_and_unrolled_checkpoints_load_each_other(run, tmp_path):
    """And so do meshes: a checkpoint is by layer, and by nothing else."""
    out = tmp_path / "out"
    train(run, out, stop_at=20)
    plain = arrays(run, out, 20)
    for compute, mesh in (
        (ComputeSpec(scan_layers=True), MeshSpec()),
        (ComputeSpec(), MeshSpec(data=2, tensor=2)),
        (ComputeSpec(scan_layers=True, remat="block"), MeshSpec(fsdp=4)),
    ):
        other = run.replace(compute=compute, mesh=mesh)
        assert_same(plain, arrays(other, out, 20))
    resumed = train(run.replace(mesh=MeshSpec(data=2, tensor=2)), out, resume=True)
    whole = train(run, tmp_path / "whole")
    assert resumed.train_loss == pytest.approx(whole.train_loss, rel=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_saved_shares_no_buffer_with_the_state(run, scan):
    """The next step gives its buffers away while they are written."""
    run = run.replace(compute=ComputeSpec(scan_layers=scan))
    state, form = initial_state(run), layout(run.model, run.compute)
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params)}
    saved = safe_from_the_next_step(state, form)
    assert saved.keys() == flatten_state(state, form).keys()
    assert not own & {leaf.unsafe_buffer_pointer() for leaf in saved.values()}


def test_a_checkpoint_of_another_architecture_is_refused(run, tmp_path):
    out = tmp_path / "out"
    train(run, out, stop_at=2)
    wider = run.changed({"model.d_model": 64})
    with pytest.raises(AssayError, match=r"another architecture.*shape"):
        arrays(wider, out, 2)
    other = run.changed({"model.decoder.num_layers": 4})
    with pytest.raises(AssayError, match=r"'params/layers.3.*' is not in it"):
        arrays(other, out, 2)
    with pytest.raises(AssayError, match="another architecture or optimizer"):
        arrays(run.at("optimizer", "sgd"), out, 2)


def test_a_folder_with_another_run_is_never_overwritten(run, tmp_path):
    out = tmp_path / "out"
    train(run, out, stop_at=1)
    held = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(AssayError, match="holds another run"):
        train(run, out)
    assert held == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(AssayError, match="not empty"):
        train(run, tmp_path / "mine")


def test_resuming_on_other_data_is_refused(run, tmp_path, corpus):
    train(run, tmp_path / "out", stop_at=1)
    corpus.write_text(corpus.read_text() + " and more")
    with pytest.raises(AssayError, match="other data"):
        train(read_run(tmp_path / "out"), tmp_path / "out", resume=True)


# ---------------------------------------------------------------------------- whose folder it is


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_goes_on_with_its_own_run_only(run, tmp_path, finished):
    run = run.at("train.budget.amount", 4)
    train(run, tmp_path / "run", stop_at=None if finished else 2)
    for changes, told in (
        ({"optimizer.lr": 0.5}, "begun with optimizer.lr = "),
        ({"model.decoder.pattern.0.attention.window": 4}, "attention.window = None, not 4"),
        ({"train.budget.amount": 3}, "begun with train.budget.amount = 4"),
    ):
        with pytest.raises(AssayError, match=told):
            train(run.changed(changes), tmp_path / "run", resume=True)
    moved = run.changed({"train.checkpoint_every": 1, "compute.remat": "block"})
    assert train(moved, tmp_path / "run", resume=True).finished


def test_a_folder_is_one_processes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.0)
    with folders.held(tmp_path / "run", "assay train"):
        for resume in (False, True):
            with pytest.raises(AssayError, match="another assay train is at work there"):
                train(run, tmp_path / "run", resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [folders.LOCK]
    assert train(run.at("train.budget.amount", 1), tmp_path / "run").finished  # once it is free
    (tmp_path / "file").touch()
    with pytest.raises(AssayError, match="it is a file, where a folder is expected"):
        train(run, tmp_path / "file")
