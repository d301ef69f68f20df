"""Several processes that train as one: how they meet, what they agree on, who does what.

The engine is `jax.distributed`. Every process runs the same loop over the same steps; what one of
them alone can know (a signal, a clock, a refused folder) must be agreed on before any acts on it.
"""

import os
import re
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from assay.errors import AssayError

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost, and all others end."""

LOST = 3
"""The exit status where another process was lost."""

MEETING = 300
"""Seconds in which all processes must have come, from when this one has."""

WAITING = 10
"""Seconds of these after which it is said what is waited for."""


OWN_FAULT = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""How errors of JAX's runtime begin that no other process is the cause of."""


class LostProcessError(AssayError):
    """Another process of the run is gone: nothing can be computed, nor tidied up together."""


def another_lost(error: BaseException | None) -> str | None:
    """JAX's words for it, where an error of a run of several is that another process is gone.

    Gloo's errors come out of JAX as ValueErrors too, those of a barrier out of Orbax as a timeout.
    """
    if jax.process_count() == 1 or isinstance(error, AssayError):
        return None
    while error is not None:
        said = str(error)
        if said.startswith(OWN_FAULT):
            return None
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in said:
            return (said.splitlines() or [type(error).__name__])[0]
        error = error.__cause__
    return None


def join(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several; must come before JAX is first used.

    Args:
        coordinator: HOST:PORT of process 0, or `auto`: what JAX finds of Slurm, Open MPI,
            Kubernetes or a TPU pod. By default `JAX_COORDINATOR_ADDRESS`; without, nothing is done.
        processes, process_id: by default `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Where they have not met within `MEETING` seconds, it says so and ends this process, status 2.

    Raises:
        AssayError: if it is not told enough, or the port is taken.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        if processes is not None or process_id is not None:
            raise AssayError("--processes, --process-id: they need --coordinator HOST:PORT.")
        return
    auto = coordinator == "auto"
    if not auto:
        processes = _number("--processes", processes, "JAX_NUM_PROCESSES")
        process_id = _number("--process-id", process_id, "JAX_PROCESS_ID")
        port = _port(coordinator)
        if processes < 1:
            raise AssayError(f"--processes: found {processes}, legal are 1 and more.")
        if not 0 <= process_id < processes:
            raise AssayError(f"--process-id: found {process_id}, legal are 0 to {processes - 1}.")
        if process_id == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            _refuse_taken(port)
    jax.config.update("jax_enable_preemption_service", False)  # the loop itself hears signals
    # Gloo has one line between two processes: programs must take their turns on it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        with _meeting(coordinator, processes, process_id):
            jax.distributed.initialize(
                None if auto else coordinator,
                processes,
                process_id,
                cluster_detection_method=None if auto else "deactivate",
                initialization_timeout=MEETING + 60,  # ends in C++, so it must never be reached
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
    except ValueError as error:
        raise AssayError(
            f"--coordinator auto: JAX finds no Slurm, Open MPI, Kubernetes or TPU pod here "
            f"({error}) Name it by --coordinator HOST:PORT --processes N --process-id I."
        ) from None
    except RuntimeError as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        met = isinstance(error, jax.errors.JaxRuntimeError)  # else they never tried
        what = "the processes did not meet" if met else "they cannot meet"
        raise AssayError(f"--coordinator {coordinator}: {what} ({why}).") from None


@contextmanager
def _meeting(coordinator: str, processes: int | None, process_id: int | None) -> Iterator[None]:
    """Tells what is waited for, and ends the process in time: JAX would abort it in C++."""
    if coordinator == "auto":
        whom, who = "the others, found by --coordinator auto", "one of those found by auto"
        check = "that process 0's host can be reached from the others"
    else:
        whom = f"{processes} processes at {coordinator}"
        who = f"process {process_id} of {processes}"
        check = (
            "with the same --coordinator and each with its own --process-id, that process 0 runs "
            "on that host, and that its port can be reached from the others"
        )

    def tell() -> None:
        print(f"assay: waiting for {whom}, at most {MEETING} s.", file=sys.stderr, flush=True)

    def end() -> None:
        print(
            f"assay: --coordinator {coordinator}: the processes did not meet within {MEETING} s; "
            f"this is {who}. Check that all were started, {check}.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the thread that waits is in C++, and hears of no exception

    # Nor does it hear Ctrl-C, so the system is to act on that.
    heard = threading.current_thread() is threading.main_thread()
    heard = heard and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with after(WAITING, tell), after(MEETING, end):
            yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def after(seconds: float, do: Callable[[], None]) -> Iterator[None]:
    """Does it in a thread, if what is done meanwhile has not ended by then."""
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _port(coordinator: str) -> int:
    found = re.fullmatch(r"(?:[^\s:/\[\]]+|\[[^\s\[\]]+\]):([0-9]+)", coordinator)
    if not found:
        raise AssayError(f"--coordinator: found '{coordinator}', expected HOST:PORT or auto.")
    port = int(found[1])
    if not 1 <= port <= 65535:
        raise AssayError(f"--coordinator {coordinator}: port {port}, legal are 1 to 65535.")
    return port


def _refuse_taken(port: int) -> None:
    """Process 0 listens there, and JAX's service crashes where it cannot."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("", port))
        except OSError as error:
            raise AssayError(
                f"--coordinator: port {port} cannot be listened at here, as process 0 must "
                f"({error.strerror}); name another one to all."
            ) from None


def _number(flag: str, given: int | None, variable: str) -> int:
    found = os.environ.get(variable) if given is None else given
    try:
        return int(found)
    except (TypeError, ValueError):
        raise AssayError(
            f"{flag}: found {found!r}; give it, or set {variable}, with --coordinator."
        ) from None


def count() -> int:
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def all_or_none(action: Callable[[], Any]) -> Any:
    """The action's result, where it succeeds in every process; else its AssayError, everywhere."""
    if jax.process_count() == 1:
        return action()
    value = error = None
    try:
        value = action()
    except AssayError as found:
        error = found
    failed = multihost_utils.process_allgather(np.int32(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise AssayError(f"process {int(failed.argmax())} could not go on; it says why.")
    return value


def assert_same(text: str, what: str) -> None:
    """Raises AssayError where `what` is not the same in every process."""
    if jax.process_count() == 1:
        return
    ours = np.frombuffer(text.encode().ljust(64)[:64], np.uint8)
    everyones = multihost_utils.process_allgather(ours)
    if (everyones != everyones[0]).any():
        raise AssayError(f"the processes differ in {what}; all must be started alike.")


class Agreed(NamedTuple):
    """stop: some process was told to. save: it is time for it. share: of the budget, spent."""

    stop: bool
    save: bool
    share: float


class Agreement:
    """What every process acts on at the same step.

    What a process knows is sent at one step and read `delay` steps later, when it has long
    arrived: nobody waits. Clocks are those of process 0.
    """

    def __init__(self, share: float, delay: int):
        self.share, self.delay = share, delay
        self.alone = jax.process_count() == 1
        self.sent: deque[jax.Array] = deque()
        self.unheard = 0  # of the coming answers, how many were asked before the last save
        if not self.alone:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self.split, whole = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())
            self.largest = jax.jit(lambda x: x.max(axis=0), out_shardings=whole)

    def on(self, *, stop: bool, save: bool, share: float) -> Agreed:
        """Tells the others, and gives what all have known for `delay` steps."""
        if self.alone:
            return Agreed(stop, save, share)
        known = np.array([stop, *((save, share) if is_first() else (0, 0))], np.float32)
        rows = np.tile(known, (jax.local_device_count(), 1))
        self.sent.append(self.largest(jax.make_array_from_process_local_data(self.split, rows)))
        if len(self.sent) <= self.delay:
            return Agreed(False, False, self.share)
        stop, save, self.share = np.asarray(self.sent.popleft()).tolist()
        heard = self.unheard == 0
        self.unheard -= not heard
        return Agreed(bool(stop), bool(save) and heard, self.share)

    def saved(self) -> None:
        """Requests that are still on their way were for this save."""
        self.unheard = len(self.sent)


class Rows:
    """The rows of a batch that this process reads, and how all make one array of theirs."""

    def __init__(self, sharding: NamedSharding, batch_size: int):
        self.sharding, self.batch_size = sharding, batch_size
        places = sharding.addressable_devices_indices_map((batch_size, 1)).values()
        own = {row for place in places for row in range(*place[0].indices(batch_size))}
        self.own = sorted(own)

    def join(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Own rows (b, T) of each array to the whole batch's (B, T), each row in its place."""

        def whole(x: np.ndarray) -> jax.Array:
            def part(index):
                first, *_ = rows = range(*index[0].indices(self.batch_size))
                start = self.own.index(first)
                return x[(slice(start, start + len(rows)), *index[1:])]

            return jax.make_array_from_callback(
                (self.batch_size, *x.shape[1:]), self.sharding, part
            )

        return {name: whole(x) for name, x in batch.items()}
