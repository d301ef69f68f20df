"""The memory of a training step at its peak, ours and PyTorch's, each in a process of its own.

What a process has ever held (`getrusage`) includes its libraries and, for ours, the compiler's
own memory. The kernel's high-water mark can be set back, so that of the steps alone stands beside.
"""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from assay.errors import AssayError, did_you_mean, need_extra
from assay.spec.run import RunSpec


@dataclass(frozen=True)
class Peak:
    """Bytes: `imported` before the model is made, `steps` at most during steps that follow a
    first one (None where there is no /proc), `process` at most from start to end."""

    imported: int
    steps: int | None
    process: int


@dataclass(frozen=True)
class Memory:
    """`ratio` is of ours to theirs, of the steps where they are known: under 1 is less."""

    ours: Peak
    theirs: Peak | None
    ratio: float | None
    steps: int


def bench_memory(run: RunSpec, *, against: str | None = None, steps: int = 4) -> Memory:
    """Peak memory of equal steps on random tokens; theirs is eager PyTorch.

    Raises:
        AssayError: if `against` is not known or not installed, or a side fails.
    """
    if against not in (None, "torch"):
        raise AssayError(f"--against {against}: {did_you_mean(against, ['torch'])}")
    ours = _measured("ours", run, steps)
    theirs = _measured("torch", run, steps) if against else None
    ratio = None
    if theirs:
        known = ours.steps and theirs.steps
        ratio = ours.steps / theirs.steps if known else ours.process / theirs.process
    return Memory(ours, theirs, ratio, steps)


def _measured(side: str, run: RunSpec, steps: int) -> Peak:
    task = json.dumps({"side": side, "run": run.model_dump(mode="json"), "steps": steps})
    command = [sys.executable, "-m", "assay.bench.memory"]
    done = subprocess.run(command, input=task, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise AssayError(f"bench memory: the process of {side} failed: {last}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def high_water() -> int | None:
    """The most bytes resident since the start, or since `lower_mark`; None without /proc."""
    return _status("VmHWM")


def lower_mark() -> None:
    """Sets the high-water mark back to what is resident now, where the kernel can."""
    mark = Path("/proc/self/clear_refs")
    if mark.exists():
        mark.write_text("5")


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _ever() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    """One side, in its own process: the task comes by standard input, the peak goes out as JSON."""
    task = json.loads(sys.stdin.read())
    run, steps = RunSpec.from_data(task["run"]), task["steps"]
    shape = (run.data.batch_size, run.data.seq_len)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(run.model.vocab_size, size=shape, dtype=np.int32)
        for name in ("tokens", "targets")
    }
    from assay.bench.train import jax_step, torch_step  # JAX comes in here

    if task["side"] == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise need_extra("torch", "parity", "Measuring PyTorch") from None
    imported = _ever()
    step = (torch_step if task["side"] == "torch" else jax_step)(run, batch)
    step()
    lower_mark()
    for _ in range(steps):
        step()
    print(json.dumps(asdict(Peak(imported, high_water(), _ever()))))


if __name__ == "__main__":
    main()
