"""What a process of a comparison does: `perform` one task, or, run as a program, one after another.

As a program it reads a task a line from standard input and writes an answer a line to standard
output, both JSON; what anything prints goes to standard error. It ends with its input, also in the
middle of a task: nothing goes on where the one who asked is gone. A run that was cut off like that
goes on from its last checkpoint when it is asked for again.
"""

import json
import os
import queue
import shutil
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assay.errors import AssayError
from assay.folders import LOCK, held
from assay.spec.model import TransformerSpec
from assay.spec.run import RunSpec

Task = dict[str, Any]
Answer = dict[str, Any]

FAILED = "failed.json"
"""In a run's folder: why it can have no result. It is not tried again."""


def perform(task: Task) -> Answer:
    """Does what `task["do"]` says: train, check or measure. A user's mistake is `error`."""
    try:
        match task["do"]:
            case "train":
                return _train(RunSpec.from_data(task["run"]), Path(task["folder"]))
            case "check":
                return _check(TransformerSpec.from_data(task["model"]))
            case "measure":
                return _measure(RunSpec.from_data(task["run"]))
        raise NotImplementedError(task["do"])
    except AssayError as error:
        return {"error": str(error)}


def _train(run: RunSpec, folder: Path) -> Answer:
    """Trains, or goes on, to the end; `stopped` where a signal came first."""
    from assay.train.checkpoint import write_json
    from assay.train.loop import DivergedError, train

    begun = (folder / "run.json").is_file()
    if not begun and folder.exists():  # cut off before anything was worth keeping
        with held(folder, "assay train"):
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
    try:
        result = train(run, folder, resume=begun)
    except DivergedError as error:
        write_json(folder / FAILED, {"error": str(error)})
        return {"failed": str(error)}
    return {"finished": True} if result.finished else {"stopped": result.stopped_by}


def _check(model: TransformerSpec) -> Answer:
    from assay.evaluate.checks import check
    from assay.startup import compute_in_the_calling_thread, keep_compiled_programs

    keep_compiled_programs()
    compute_in_the_calling_thread()
    # What is trained predicts the next token, so that no stack may see it, whatever its spec says.
    return {"checks": [asdict(found) for found in check(model, causal=True).checks]}


def _measure(run: RunSpec, steps: int = 3) -> Answer:
    """Seconds of an update, the best of a few, and of its compilation; on random tokens."""
    import jax
    import numpy as np

    from assay.model.transformer import abstract
    from assay.startup import compute_in_the_calling_thread, keep_compiled_programs
    from assay.train.step import initial_state, make_step

    keep_compiled_programs()
    compute_in_the_calling_thread()
    rng = np.random.default_rng(0)
    shape = (run.data.batch_size, run.data.seq_len)
    batch = {
        name: rng.integers(run.model.vocab_size, size=shape, dtype=np.int32)
        for name in ("tokens", "targets")
    }
    began = time.perf_counter()
    state = initial_state(run)
    update = jax.jit(make_step(run, abstract(run.model, run.compute)), donate_argnums=0)
    update = update.lower(state, batch, np.float32(0)).compile()
    compiled = time.perf_counter() - began
    taken = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = update(state, batch, np.float32(0))
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - began)
    return {"step_seconds": min(taken[1:]), "compile_seconds": compiled}


def main(cores: list[int]) -> None:
    """Takes tasks until there are no more, on these cores (all, where none are named)."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        answer = perform(json.loads(tasks.get()))
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


if __name__ == "__main__":
    main([int(core) for core in sys.argv[1:]])
