"""The training loop, open: data, step, log, evaluate, save, in that order, in one function."""

import json
import math
import os
import platform
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from assay.data import loader, tokenizers
from assay.data.corpora import NoCorpusError
from assay.errors import AssayError, counted, out_of_memory
from assay.evaluate.perplexity import Evaluation, evaluate, row_losses
from assay.folders import LOCK, held
from assay.model.sharding import make_mesh, parameter_shardings, partition, use_mesh
from assay.model.transformer import Layout, Transformer, abstract, layout, name_leaves
from assay.spec.accounting import only_warm_up, planned_steps, run_flops_per_token
from assay.spec.run import RunSpec
from assay.startup import compute_in_the_calling_thread, keep_compiled_programs
from assay.train import plot, processes
from assay.train.checkpoint import Checkpoints, NotSavedError, need_room, write_json
from assay.train.progress import Reporter, Silent
from assay.train.speed import peak_flops, take_what_is_planned_of_a_gpu
from assay.train.step import TrainState, initial_state, make_step, state_shardings
from assay.train.tracking import Tracker

IN_FLIGHT = 2
"""Steps the host may be ahead of the device: enough to hide its work, too few to pile up."""

LESS_MEMORY = (
    "a smaller data.batch_size, a larger train.accumulate or compute.remat=block takes less, "
    "and 'assay plan' says how much before anything is run."
)

SCORED = 8192
"""Tokens that are scored at a time, unless an update has more."""


class DivergedError(AssayError):
    """The loss or a parameter is no longer a number."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are nats a token; `val_bpb` bits per UTF-8 byte of held-out text.

    `seconds` is training alone, without compilation, evaluation and set-up. `finished` is False
    where the run was stopped before its budget was spent.
    """

    out: str
    steps: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    val_bpb: float | None
    seconds: float
    compile_seconds: float
    tokens_per_second: float | None
    mfu: float | None
    finished: bool
    stopped_by: str


def train(
    run: RunSpec,
    out: Path | str,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    reporter: Reporter | None = None,
    trackers: tuple[str, ...] | None = (),
) -> TrainResult:
    """Trains as `run` says, in the folder `out`.

    The folder gets `run.json`, `metrics.jsonl`, `checkpoints/`, the tokenizer, and at the end
    `result.json`. `stop_at` stops after so many steps, the schedule unchanged.

    Raises:
        AssayError: if the folder holds another run, or another process trains in it; if the data is
            no good; if the loss is no longer a number (the last good checkpoint stays); if another
            process was lost.
    """
    out, reporter, trackers = Path(out), reporter or Silent(), tuple(trackers or ())
    if stop_at is not None and stop_at < 0:
        raise AssayError(f"stop_at: found {stop_at}, but it must be at least 0.")

    if resume and (out / "run.json").is_file():
        _hold_to_its_own(out, run)
    if resume and (ended := read_result(out)) is not None:
        reporter.note(f"The run in {out} is finished; this is its result.")
        return ended

    keep_compiled_programs()
    compute_in_the_calling_thread()
    take_what_is_planned_of_a_gpu()
    count, found = jax.process_count(), jax.device_count()
    if count > 1 and run.mesh.devices != found:
        raise AssayError(
            f"mesh: it has {counted(run.mesh.devices, 'device')}, but {count} processes have "
            f"{found}, and each must take part: --mesh data={found}."
        )
    try:
        mesh = make_mesh(run.mesh, of_one=run.compute.offload_optimizer)
        with use_mesh(mesh), ExitStack() as leaving:
            return _train(run, out, mesh, leaving, resume, stop_at, reporter, trackers)
    except Exception as error:
        why = processes.another_lost(error)
        if why is None:
            if (told := out_of_memory(error, LESS_MEMORY)) is not None:
                raise told from None
            raise
        raise processes.LostProcessError(
            f"process {jax.process_index()} of {jax.process_count()}: another process of the run "
            f"was lost, so this one ends too. Start all of them again with --resume: they go on "
            f"from the newest checkpoint in {out}. ({why[:200]})"
        ) from None


def _train(
    run: RunSpec,
    out: Path,
    mesh: Mesh | None,
    leaving: ExitStack,
    resume: bool,
    stop_at: int | None,
    reporter: Reporter,
    trackers: tuple[str, ...],
) -> TrainResult:
    # ---- text to batches
    tokenizer = tokenizers.load(out) if resume and (out / tokenizers.FILE).is_file() else None
    prepared = processes.all_or_none(lambda: _prepare(run, out, tokenizer, resume))
    processes.assert_same(prepared.fingerprint, "their data")
    run = run.replace(model=run.model.with_vocab(prepared.tokenizer.vocab_size))
    first = processes.is_first()  # alone prints and writes, but for its part of checkpoints
    if not run.model.decoder.causal:
        raise AssayError(
            "model.decoder.causal: found false; training predicts the next token, which such a "
            "stack would see."
        )
    if prepared.left_out:
        pairs = counted(prepared.left_out, "pair")
        reporter.note(f"Left out, as longer than data.seq_len: {pairs}.")
    steps, of_vocabulary = planned_steps(run), prepared.tokenizer.vocab_size
    few = tokenizers.fewer_than_asked(run.data.tokenizer, of_vocabulary)
    for note in (few, steps is not None and only_warm_up(run, steps)):
        if note and not resume:
            reporter.note(note)
    opening = partial(_open_folder, out, run, prepared, resume, leaving)
    processes.all_or_none(lambda: opening() if first else None)

    # ---- model and state, as shapes; each array will be made in its place
    model = abstract(run.model, run.compute)
    form, step_function = layout(run.model, run.compute), make_step(run, model)
    shapes = jax.eval_shape(lambda: initial_state(run))
    need_room(out, shapes)  # better known now than after the first hour
    if mesh is None:
        shared = scored = None
        # Not jitted: one small program a shape compiles sooner than one large one for all.
        make_state, update = partial(initial_state, run), jax.jit(step_function, donate_argnums=0)
    else:
        places = state_shardings(
            shapes,
            parameter_shardings(model, mesh),
            mesh,
            offload=run.compute.offload_optimizer,
        )
        rows = jax.sharding.NamedSharding(mesh, partition(("batch", None)))
        everywhere = jax.sharding.NamedSharding(mesh, partition(()))
        shared = processes.Rows(rows, run.data.batch_size)
        scored = processes.Rows(rows, scored_rows(run))
        make_state = jax.jit(lambda: initial_state(run), out_shardings=places)
        update = jax.jit(
            step_function,
            donate_argnums=0,
            in_shardings=(places, rows, None),
            out_shardings=(places, everywhere),
        )

    own, joined = (shared.own, shared.join) if shared else (None, dict)
    batches = loader.batches(prepared, run.seed, rows=own)
    own, place = (scored.own, scored.join) if scored else (None, dict)
    held_out = loader.evaluation_batches(prepared, scored_rows(run), part=run.train.score, rows=own)
    exact = nnx.graphdef(abstract(run.model, run.compute.replace(dtype="float32")))

    def score(state: TrainState) -> Evaluation:
        """The whole held-out split, in float32, as `assay eval` does it."""
        return evaluate(nnx.merge(exact, state.params), held_out, losses and losses.result(), place)

    # ---- compile, beside all else that is to be made: most of a compiler's work is on one core
    reporter.note(f"Compiling for {run.data.batch_size} x {run.data.seq_len} tokens an update.")
    began, position = time.monotonic(), batches.state()
    example = joined(next(batches))
    batches.restore(position)

    device, precision = jax.config.jax_default_device, jax.config.jax_default_matmul_precision

    def compiled_update():
        # What is a thread's own in JAX.
        with use_mesh(mesh), jax.default_device(device), jax.default_matmul_precision(precision):
            return update.lower(shapes, example, np.float32(0)).compile()

    # Traced there too: on a CPU that may first have to wait until C++ is compiled (`blas.py`).
    compiler = ThreadPoolExecutor()
    compiling = compiler.submit(compiled_update)
    state = make_state()
    losses = None if mesh else _compiled_losses(compiler, nnx.merge(exact, state.params), held_out)

    # ---- where it was
    checkpoints = Checkpoints(out / "checkpoints")
    spent = {"seconds": 0.0, "tokens": 0.0, "window": [], "loss": None}
    if resume and checkpoints.latest() is None:
        reporter.note("There is no checkpoint yet: starting from step 0.")
    elif resume:
        state, saved = checkpoints.restore(checkpoints.latest(), state, form)
        batches.restore(saved["position"])
        spent = spent | saved["spent"]
    step = int(state.step)

    # ---- the program
    if first:
        plot.load()  # it is drawn at the end, but here there is nothing to do but wait
    update = compiling.result()
    compile_seconds = time.monotonic() - began

    # ---- train
    clock = _Clock(run, spent["seconds"])
    log = _Log(out, run, prepared, step, spent, clock, reporter, trackers)
    val, val_step, why = None, None, "budget"
    eval_every = run.train.eval_every or (50 if run.train.target_loss else None)
    saving = _SavePlan(run.train.checkpoint_every, clock)
    signals, stopped, lost = _StopSignals(), False, False
    agreement = processes.Agreement(clock.share(step), IN_FLIGHT)
    reporter.start(run.preset or "training")
    try:
        with signals:
            while True:
                agreed = agreement.on(
                    stop=signals.received is not None,
                    save=saving.time(clock),
                    share=clock.share(step),
                )
                share = clock.share(step) if clock.seconds is None else agreed.share
                if share >= 1:
                    break
                if stop_at is not None and step >= stop_at:
                    why = "stop-at"
                    break
                if agreed.stop:
                    why, stopped = signals.received or "SIGTERM", True
                    break
                batch = joined(next(batches))
                state, metrics = update(state, batch, np.float32(share))
                step += 1
                log.push(step, metrics)
                last = clock.seconds is None and clock.share(step) >= 1  # saved, then scored
                if eval_every is not None and step % eval_every == 0 and not last:
                    log.flush()
                    with clock.paused():
                        val, val_step = score(state), step
                    log.evaluated(step, val)
                    if run.train.target_loss and val.loss <= run.train.target_loss:
                        why = "target"
                        break
                if saving.due(step, agreed.save):
                    saving.last = clock.elapsed()
                    agreement.saved()
                    log.flush()
                    _save(checkpoints, state, batches.state(), form, log)
            if not stopped:
                signals.release()  # what comes now acts at once, as during scoring
            log.flush(last=True)
            seconds = clock.elapsed()
            if checkpoints.latest() != step:
                _save(checkpoints, state, batches.state(), form, log)
            if stopped:
                checkpoints.wait()  # before another signal can end it
        finished = why in ("budget", "target")
        if val_step != step and not stopped:
            reporter.note("Scoring the held-out text.")
            val = score(state)
            log.evaluated(step, val)
        if why == "budget" and run.train.target_loss and val.loss <= run.train.target_loss:
            why = "target"
    except Exception as error:
        lost = processes.another_lost(error) is not None
        raise
    finally:
        reporter.stop()
        batches.close()
        log.close()
        if not lost:  # the lost one would be waited for, until JAX aborts
            checkpoints.close()

    # ---- tell
    speed = log.tokens_here / log.seconds_here if log.tokens_here else None
    peak = peak_flops(run.compute.dtype, run.mesh.devices) if first else None
    flops = run_flops_per_token(run).train
    result = TrainResult(
        out=str(out),
        steps=step,
        tokens=round(log.tokens),
        train_loss=log.loss,
        val_loss=val.loss if val else None,
        val_bpb=val.bpb if val else None,
        seconds=seconds,
        compile_seconds=compile_seconds,
        tokens_per_second=speed,
        mfu=speed * flops / peak if speed and peak else None,
        finished=finished,
        stopped_by=why,
    )
    if finished and first:
        write_json(out / "result.json", asdict(result))
    return result


def _prepare(run: RunSpec, out: Path, tokenizer, resume: bool) -> loader.Prepared:
    try:
        return loader.prepare(run.data, tokenizer)
    except NoCorpusError as error:
        if not resume:
            raise
        raise error.of_run(out) from None


def scored_rows(run: RunSpec) -> int:
    """Rows that are scored at a time: some update's batches, where those are small.

    Without a backward pass there is room for more.
    """
    batch = run.data.batch_size * run.data.seq_len
    return run.data.batch_size * max(1, SCORED // batch)


def _compiled_losses(
    compiler: ThreadPoolExecutor, model: Transformer, held_out: loader.Evaluation
) -> Future | None:
    """The program that scores, to be had when it is needed; None where there is nothing to."""
    batch = next(iter(held_out), None)
    return None if batch is None else compiler.submit(row_losses.lower(model, batch).compile)


class _SavePlan:
    """Every so many steps; every ten minutes where the run does not say."""

    def __init__(self, every: int | None, clock: "_Clock"):
        self.every, self.last = every, clock.elapsed()

    def time(self, clock: "_Clock") -> bool:
        return self.every is None and clock.elapsed() - self.last >= 600

    def due(self, step: int, time: bool) -> bool:
        return time if self.every is None else step % self.every == 0


# ---------------------------------------------------------------------------- the budget


class _Clock:
    """How much of the budget is spent. Seconds count training, not evaluation or compilation."""

    def __init__(self, run: RunSpec, seconds_before: float):
        budget = run.train.budget
        self.seconds = budget.amount if budget.unit == "seconds" else None
        self.steps = planned_steps(run)
        self.before = seconds_before
        self.began = time.monotonic()

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.began

    def share(self, step: int) -> float:
        if self.seconds is not None:
            return self.elapsed() / self.seconds
        return step / self.steps

    @contextmanager
    def paused(self):
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused


# ---------------------------------------------------------------------------- the folder


def _hold_to_its_own(out: Path, run: RunSpec) -> None:
    """Refuses to go on with the run in a folder as another one."""
    for path, there, here in run.other_than(read_run(out)):
        raise AssayError(
            f"{out}: its run was begun with {path} = {there}, not {here}; it goes on with the same "
            "settings; for others, begin anew in another folder."
        )


def _open_folder(
    out: Path, run: RunSpec, prepared: loader.Prepared, resume: bool, leaving: ExitStack
) -> None:
    """Writes `run.json` and the tokenizer into a new folder; holds a resumed run to its data.

    No other process gets the folder until it is left.
    """
    leaving.enter_context(held(out, "assay train"))
    record = out / "run.json"
    if record.is_file():
        if not resume:
            raise AssayError(
                f"{out}: it holds another run, and nothing is overwritten; "
                f"go on with it by --resume, or name another folder by --out."
            )
        if _read(record, "data").get("fingerprint") != prepared.fingerprint:
            raise AssayError(f"{out}: its run was trained on other data than is there now.")
        return
    if any(path.name != LOCK for path in out.iterdir()):
        raise AssayError(f"{out}: it is not empty and holds no run; name another folder by --out.")
    packages = ("assay", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    about = {
        "spec": run.model_dump(mode="json"),
        "seed": run.seed,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "data": prepared.summary(),
    }
    prepared.tokenizer.save(out)
    write_json(record, about)


def read_run(out: Path | str) -> RunSpec:
    """The spec of the run in a folder.

    Raises:
        AssayError: if there is none, or its `run.json` is no good.
    """
    record = Path(out) / "run.json"
    if not record.is_file():
        raise AssayError(f"{out}: there is no run in it (no run.json).")
    spec = _read(record, "spec")
    try:
        return RunSpec.from_data(spec)
    except AssayError as error:
        raise AssayError(f"{record}: {error}") from None


def read_result(out: Path | str) -> TrainResult | None:
    """How the run in a folder ended, if it has.

    Raises:
        AssayError: if its `result.json` is no good.
    """
    path = Path(out) / "result.json"
    if not path.is_file():
        return None
    try:
        return TrainResult(**_read(path))
    except TypeError:
        raise AssayError(f"{path}: it is not the result of a run.") from None


def _read(path: Path, part: str | None = None) -> dict:
    """The object in a run's JSON file, or the one that it has under a name."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise AssayError(f"{path}: it is not JSON ({error}).") from None
    if part is not None and isinstance(found, dict):
        found = found.get(part)
    if not isinstance(found, dict):
        what = "an object" if part is None else f"an object with '{part}'"
        raise AssayError(f"{path}: it is not a run's, which is {what}.")
    return found


def _save(checkpoints: Checkpoints, state: TrainState, position, form: Layout, log: "_Log"):
    """Saves, if every parameter is still a number: a checkpoint is good or it is not there."""
    finite = jax.device_get(_all_finite(name_leaves(state.params, form)))
    bad = [name for name, good in finite.items() if not good]
    if bad:
        raise DivergedError(
            f"the update of step {int(state.step)} left numbers that are not finite in "
            f"{bad[0]} and {len(bad) - 1} other parameters; the learning rate may be too high. "
            f"{log.last_good()}"
        )
    spent = {
        "seconds": log.clock.elapsed(),
        "tokens": log.tokens,
        "window": log.window,
        "loss": log.loss,
    }
    checkpoints.save(state, position, form, {"spent": spent})
    log.saved = int(state.step)


@jax.jit
def _all_finite(named: dict) -> dict:
    return {name: jnp.isfinite(leaf).all() for name, leaf in named.items()}


# ---------------------------------------------------------------------------- the log


class _Log:
    """`metrics.jsonl`, the progress bar, and the watch for numbers that are none.

    Metrics stay on the device until their step is surely done, so that fetching them waits for
    nothing.
    """

    def __init__(
        self,
        out: Path,
        run: RunSpec,
        prepared: loader.Prepared,
        step: int,
        spent: dict,
        clock: _Clock,
        reporter: Reporter,
        trackers: tuple[str, ...],
    ):
        self.run, self.clock, self.reporter = run, clock, reporter
        self.pending: list[tuple[int, dict]] = []
        self.loss, self.previous, self.saved = spent.get("loss"), None, step or None
        self.tokens, self.tokens_here, self.seconds_here = spent["tokens"], 0.0, 0.0
        self.since, self.window = clock.elapsed(), spent["window"]
        self.bits = None
        if prepared.train_bytes:
            self.bits = prepared.train_tokens / prepared.train_bytes / math.log(2)
        first = processes.is_first()
        path = out / "metrics.jsonl" if first else Path(os.devnull)
        self.file, self.scored = _continue_lines(path, step) if first else (path.open("w"), None)
        self.tracker = Tracker(out, run, trackers if first else (), step)

    def push(self, step: int, metrics: dict) -> None:
        """Takes a step's metrics without waiting for them."""
        self.pending.append((step, metrics))
        if len(self.pending) > IN_FLIGHT:
            jax.block_until_ready(self.pending[-1 - IN_FLIGHT][1])
        if len(self.pending) >= self.run.train.log_every + IN_FLIGHT:
            self._fetch(len(self.pending) - IN_FLIGHT)

    def flush(self, *, last: bool = False) -> None:
        """Waits for every step so far; the `last` one gets a line, whatever its number."""
        self._fetch(len(self.pending), last=last)

    def _fetch(self, count: int, *, last: bool = False) -> None:
        ready, self.pending = self.pending[:count], self.pending[count:]
        if not ready:
            return
        values = jax.device_get([metrics for _, metrics in ready])
        now, tokens = self.clock.elapsed(), sum(float(v["tokens"]) for v in values)
        seconds, self.since = now - self.since, now
        self.tokens_here += tokens
        self.seconds_here += seconds
        for (step, _), value in zip(ready, values, strict=True):
            record = jax.tree.map(lambda x: x.tolist(), value)
            self._watch(step, record)
            self.tokens += record.pop("tokens")
            self.loss, self.previous = record["loss"], record
            self.window.append(record["loss"])
            if step % self.run.train.log_every == 0 or (last and step == ready[-1][0]):
                self._line(step, record, now, tokens / seconds if seconds > 0 else 0.0)

    def _line(self, step: int, record: dict, now: float, speed: float) -> None:
        record = {
            "step": step,
            "tokens": round(self.tokens),
            "seconds": round(now, 3),
            **record,
            "loss_window": sum(self.window) / len(self.window),
            "tokens_per_second": speed,
        }
        if step % self.run.train.log_every == 0:  # a run that stops between lines goes on with it
            self.window = []
        if self.bits is not None:
            record["bpb"] = record["loss_window"] * self.bits
        self._write(record)
        self.reporter.update(min(self.clock.share(step), 1.0), record)

    def evaluated(self, step: int, val: Evaluation) -> None:
        """A line of its own for the held-out loss after a step; none where there is one."""
        if step != self.scored:
            self._write({"step": step, "val_loss": val.loss, "val_bpb": val.bpb})
        self.since = self.clock.elapsed()

    def _write(self, record: dict) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            more = "--resume goes on from the newest checkpoint."
            raise NotSavedError(f"{self.file.name}: {error.strerror}. {more}") from error
        self.tracker.write(record)

    def _watch(self, step: int, record: dict) -> None:
        for name in ("loss", "objective", "grad_norm"):
            if math.isfinite(record[name]):
                continue
            what = {"grad_norm": "gradient"}.get(name, name)
            before = ""
            if self.previous is not None:
                before = (
                    f" (the step before: loss {self.previous['loss']:.4g}, "
                    f"gradient norm {self.previous['grad_norm']:.4g})"
                )
            raise DivergedError(
                f"the {what} of step {step} is {record[name]}{before}, at learning rate "
                f"{record['lr']:.3g}; try a lower one, a longer warm-up, or clipping. "
                f"{self.last_good()}"
            )

    def last_good(self) -> str:
        if self.saved is None:
            return "No checkpoint had been saved."
        return f"The checkpoint of step {self.saved} is the last good one."

    def close(self) -> None:
        with suppress(OSError):  # each line was written at once, or told of
            self.file.close()
        self.tracker.close()


def _continue_lines(path: Path, step: int) -> tuple[TextIO, int | None]:
    """The file, open behind its lines up to a step: what came after is trained again.

    And the last step whose held-out loss is in it: a run that was killed between its last line
    and its result is scored again, but has the line.
    """
    kept, scored = [], None
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the half line of a killed process
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
                scored = record["step"] if "val_loss" in record else scored
    new = path.with_suffix(".new")
    new.write_text("".join(kept))
    new.replace(path)
    return path.open("a"), scored


class _StopSignals:
    """SIGTERM and the first SIGINT end the run after its step, saved; a later SIGINT at once."""

    TWICE = 1.0
    """Seconds in which two are one key pressed twice, or a terminal's and a launcher's."""

    def __init__(self):
        self.received: str | None = None
        self.when = 0.0

    def __enter__(self):
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        now = time.monotonic()
        if self.received is None:
            self.received, self.when = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self.when > self.TWICE:
            signal.default_int_handler(number, frame)

    def __exit__(self, *_):
        self.release()

    def release(self) -> None:
        while self.old:
            signal.signal(*self.old.popitem())
