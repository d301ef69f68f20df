"""Several processes that train as one: how they meet, what they agree on, who does what.

The engine is `jax.distributed`. Every process runs the same loop over the same steps; what one of
them alone can know (a signal, a clock, a refused folder) must be agreed on before any acts on it.
"""

import os
from collections import deque
from collections.abc import Callable
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


class LostProcessError(AssayError):
    """Another process of the run is gone: nothing can be computed, nor tidied up together."""


def join(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several; must come before JAX is first used.

    Args:
        coordinator: HOST:PORT of process 0, or `auto`: what JAX finds of Slurm, Open MPI,
            Kubernetes or a TPU pod. By default `JAX_COORDINATOR_ADDRESS`; without, nothing is done.
        processes, process_id: by default `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Raises:
        AssayError: if it is not told enough, or the others do not come within five minutes.
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
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise AssayError(f"--coordinator: found '{coordinator}', expected HOST:PORT or auto.")
        if not 0 <= process_id < processes:
            raise AssayError(f"--process-id: found {process_id}, legal are 0 to {processes - 1}.")
    jax.config.update("jax_enable_preemption_service", False)  # the loop itself hears signals
    # Gloo has one line between two processes: programs must take their turns on it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            processes,
            process_id,
            cluster_detection_method=None if auto else "deactivate",
            initialization_timeout=300,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:
        raise AssayError(
            f"--coordinator auto: JAX finds no Slurm, Open MPI, Kubernetes or TPU pod here "
            f"({error}) Name it by --coordinator HOST:PORT --processes N --process-id I."
        ) from None
    except jax.errors.JaxRuntimeError as error:
        why = str(error).splitlines()[0]
        raise AssayError(
            f"--coordinator {coordinator}: the processes did not meet ({why})."
        ) from None


def _number(flag: str, given: int | None, variable: str) -> int:
    found = os.environ.get(variable) if given is None else given
    try:
        return int(found)
    except (TypeError, ValueError):
        raise AssayError(
            f"{flag}: found {found!r}; give it, or set {variable}, with --coordinator."
        ) from None


def rank() -> int:
    return jax.process_index()


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
