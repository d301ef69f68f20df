"""A run that is killed again and again, or has no room on its disk, is in the end the same run."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from assay.train.checkpoint import Checkpoints
from assay.train.loop import read_run, train
from tests.train.conftest import lines
from tests.train.test_resume import arrays, assert_same, command

KILLS = int(os.environ.get("ASSAY_KILLS", "12"))
STEPS = 400


def begin(run, out, *before) -> subprocess.Popen:
    """The run in a process of its own: `assay train --resume` where it was begun.

    `before`: a command that starts what is behind it.
    """
    arguments = command(run, out)
    if (out / "run.json").exists():
        arguments = [sys.executable, "-m", "assay", "train", "--resume", "--out", out, "--quiet"]
    return subprocess.Popen(
        [*before, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def newest(out) -> int:
    folder = out / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


@pytest.fixture
def long(run):
    return run.changed({"train.budget.amount": STEPS, "train.checkpoint_every": 2})


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(long, tmp_path, seed):
    """At any moment: while it begins, computes, saves, or tidies what it saved before."""
    drawn = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(long, whole)
    died = 0
    for _ in range(KILLS):
        before = newest(killed)
        with begin(long, killed) as process:
            soon = drawn.random() < 0.25  # perhaps before it computes
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if soon or newest(killed) > before:
                    break
                time.sleep(0.005)
            time.sleep(drawn.uniform(0, 4 if soon else 0.15))
            process.send_signal(signal.SIGKILL)
            errors = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), errors
        died += process.returncode != 0
    assert died >= KILLS / 2  # some may come when it has ended
    result = train(read_run(killed), killed, resume=True)
    assert result.steps == STEPS
    assert_same(arrays(long, whole, STEPS), arrays(long, killed, STEPS))
    told = lines(killed)
    assert len({line["step"] for line in told}) == len(told)
    assert told[-1] == lines(whole)[-1]


@pytest.mark.torture
def test_no_room_for_a_checkpoint(long, tmp_path):
    """The run ends with a sentence, what was saved before is whole, and with room it goes on."""
    whole, starved = tmp_path / "whole", tmp_path / "starved"
    train(long, whole)
    first = train(long, starved, stop_at=10)
    assert first.steps == 10

    small = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # 20 to 40 KB a file
    with begin(long, starved, *small) as process:
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    told = errors.splitlines()[-1]  # behind what TensorStore's threads say of each write
    assert "checkpoint could not be written: File too large." in told
    assert "That of step 10 is whole: --resume" in told
    checkpoints = Checkpoints(starved / "checkpoints")
    assert checkpoints.latest() == 10
    checkpoints.close()
    result = train(read_run(starved), starved, resume=True)
    assert result.steps == STEPS
    assert_same(arrays(long, whole, STEPS), arrays(long, starved, STEPS))
