"""The training step compiled for a machine that is not there: its memory and collectives, exactly.

XLA's TPU compiler comes with the `libtpu` package (the `plan` extra) and needs no TPU. What it
reports is of the very program that would run.
"""

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from assay.errors import AssayError, need_extra
from assay.plan.topology import Topology
from assay.spec.run import RunSpec

ENVIRONMENT = {
    # libtpu asks a cloud's metadata server where it is; there is none to ask.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-128",  # any: the topology is named when compiling
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans may be made at once
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device.

    `collectives`: how many of each kind run in one update, and the bytes of their results. Loops
    are counted as often as they run. `kernels`: calls of Pallas kernels in the program's text.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    collectives: dict[str, tuple[int, int]]
    kernels: int
    seconds: float

    @property
    def bytes_per_device(self) -> int:
        """The most that is held at once: donated arguments make room for outputs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.code


def can_compile(topology: Topology) -> bool:
    """Whether there is a compiler for it here."""
    return topology.is_tpu and find_spec("libtpu") is not None


def compile_step(run: RunSpec, topology: Topology) -> Compiled:
    """Compiles the training step of a run for a TPU topology.

    Raises:
        AssayError: if `libtpu` is not installed, or if the compiler refuses: the program does not
            fit, or the mesh does not divide a shape.
    """
    if find_spec("libtpu") is None:
        raise need_extra("libtpu", "plan", "plan: compiling for TPUs")
    with _no_cloud():
        import jax
        import jax.numpy as jnp
        from jax.experimental import mesh_utils, topologies

        from assay.model.sharding import MESH_AXES, parameter_shardings, partition, use_mesh
        from assay.model.transformer import abstract
        from assay.train.step import initial_state, make_step, state_shardings

        name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
        try:
            described = topologies.get_topology_desc(name, platform="tpu")
        except Exception as error:
            raise AssayError(
                f"topology: the TPU compiler does not know '{name}': {error}"
            ) from None
        sizes = tuple(getattr(run.mesh, axis) for axis in MESH_AXES)
        devices = mesh_utils.create_device_mesh(
            sizes, list(described.devices), allow_split_physical_axes=True
        )
        kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
        mesh = jax.sharding.Mesh(devices, MESH_AXES, axis_types=kinds)
        began = time.monotonic()
        with use_mesh(mesh):
            model = abstract(run.model, run.compute)
            state = jax.eval_shape(lambda: initial_state(run))
            places = state_shardings(
                state,
                parameter_shardings(model, mesh),
                mesh,
                offload=run.compute.offload_optimizer,
            )
            rows = jax.sharding.NamedSharding(mesh, partition(("batch", None)))
            ids = jax.ShapeDtypeStruct((run.data.batch_size, run.data.seq_len), jnp.int32)
            batch = {"tokens": ids, "targets": ids}
            if run.model.encoder is not None:
                shape = (run.data.batch_size, run.data.room_for_source or run.data.seq_len)
                batch["source"] = jax.ShapeDtypeStruct(shape, jnp.int32)
                batch["source_mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
            step = jax.jit(
                make_step(run, model),
                donate_argnums=0,
                in_shardings=(places, rows, None),
                out_shardings=(places, None),
            )
            lowered = step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32))
            try:
                with _not_cached():
                    program = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                raise _refused(str(error)) from None
        memory, text = program.memory_analysis(), program.as_text()
        return Compiled(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            collectives=collectives(text),
            kernels=text.count('custom_call_target="tpu_custom_call"'),
            seconds=time.monotonic() - began,
        )


class DoesNotFitError(AssayError):
    """The compiler found no way to run the program in a device's memory."""

    def __init__(self, needed: float | None, sentence: str):
        super().__init__(sentence)
        self.needed = needed


def _refused(message: str) -> AssayError:
    size = r"\(?([\d.]+)([KMGT]?)\)?"
    found = re.search(rf"{size} exceeds available HBM {size}", message) or re.search(
        rf"Used {size} of {size} hbm", message
    )
    if found is None:
        return AssayError(f"plan: the TPU compiler refused the program: {message[:300]}")
    needed, unit, limit, limit_unit = found.groups()
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return DoesNotFitError(
        float(needed) * scale[unit],
        f"plan: the program needs {needed} {unit}iB a device of {limit} {limit_unit}iB.",
    )


@contextmanager
def _no_cloud() -> Iterator[None]:
    """The environment that libtpu needs where there is no TPU; put back afterwards."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _not_cached() -> Iterator[None]:
    """A program for a device that is not here can be kept in JAX's cache, but not read back."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


# ---------------------------------------------------------------------------- the program's text

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|calls|branch_computations)=(%[\w.-]+|\{[^}]*\})")
_NAME = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """(how often, bytes of results) of each kind of collective in one run of an HLO module."""
    bodies: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = start[2]
            bodies[current] = []
            entry = current if start[1] else entry
        elif line == "}":
            current = None
        elif current is not None:
            bodies[current].append(line)
    totals: dict[str, tuple[int, int]] = {}

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _OPERATION.search(line)
            if found:
                count, size = totals.get(found[2], (0, 0))
                moved = times * _bytes(found[1], started=bool(found[3]))
                totals[found[2]] = (count + times, size + moved)
            inside = times * (_trips(line, bodies) if " while(" in line else 1)
            for called in _CALLED.finditer(line):
                for inner in _NAME.findall(called[1]):
                    walk(inner, inside)

    if entry is not None:
        walk(entry, 1)
    return totals


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler knows it, or the number its condition compares to."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.-]+)", line)
    text = "\n".join(bodies.get(condition[1], ())) if condition else ""
    return max((int(n) for n in re.findall(r"[su]32\[\][^=]* constant\((\d+)\)", text)), default=1)


def _bytes(shape: str, *, started: bool) -> int:
    """Bytes of a result; a started collective's is a tuple of its operand and its result."""
    sizes = []
    for dtype, sides in _SHAPE.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype.replace("bf", "")) or 16)
        sizes.append(bits * math.prod(int(side) for side in sides.split(",") if side) // 8)
    return max(sizes, default=0) if started else sum(sizes)
