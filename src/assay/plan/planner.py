"""What a run will need and how fast it will go, before anything is paid for.

Three depths, each saying how sure it is: from the spec alone (`memory`, `work`), compiled for the
machine itself where its compiler is here (`compiled`), and a roofline for the time (`roofline`).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from typing import Any, Literal

from assay.errors import AssayError, did_you_mean
from assay.model.flash import Kernel
from assay.plan.compiled import Compiled, DoesNotFitError, can_compile, compile_step
from assay.plan.memory import Memory, Serving, serving_memory, training_memory
from assay.plan.roofline import Speed, predict
from assay.plan.topology import Topology
from assay.plan.work import (
    System,
    attending,
    collective_bytes,
    global_flops,
    keeps_scores,
    mesh_sizes,
)
from assay.spec.run import MeshSpec, RunSpec
from assay.train.speed import USABLE

POLICIES = {
    "none": "none",
    "dots": "dots",
    "weights": "weights",
    "offload": "weights",
    "block": "block",
}
"""ComputeSpec.remat -> what the backward pass computes again (`plan/work.py`)."""

AUTO = ("none", "weights", "block")
"""What `auto` tries, fastest first."""

TPU_KERNELS = "flash"
"""The kernels that `auto` means on a TPU."""


@dataclass(frozen=True)
class Plan:
    """The answer for one run on one machine. Bytes are of one device, FLOPs of all of them.

    `bytes_per_device` is the compiler's figure where there is one, else the estimate.
    """

    run: RunSpec
    topology: Topology
    memory: Memory
    serving: Serving
    compiled: Compiled | None
    refused: DoesNotFitError | None
    speed: Speed
    scores: int
    """Attentions whose scores are kept, for no kernel makes them."""

    @property
    def bytes_per_device(self) -> float:
        if self.compiled is not None:
            return self.compiled.bytes_per_device
        if self.refused is not None and self.refused.needed is not None:
            return self.refused.needed
        return self.memory.total

    @property
    def fits(self) -> bool:
        if self.refused is not None:
            return False
        return self.bytes_per_device <= self.room

    @property
    def room(self) -> float:
        """Bytes of a device that a program may have."""
        return USABLE * self.topology.chip.memory

    def as_json(self) -> dict[str, Any]:
        """The fields that scripts read."""
        mesh = {axis: size for axis, size in mesh_sizes(self.run.mesh).items() if size > 1}
        compiled = self.compiled
        return {
            "model": self.run.preset,
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "mesh": mesh,
            "batch_size": self.run.data.batch_size,
            "accumulate": self.run.train.accumulate,
            "seq_len": self.run.data.seq_len,
            "dtype": self.run.compute.dtype,
            "remat": self.run.compute.remat,
            "offload_optimizer": self.run.compute.offload_optimizer,
            "fits": self.fits,
            "bytes_per_device": round(self.bytes_per_device),
            "memory_per_device": self.topology.chip.memory,
            "breakdown": {name: round(size) for name, size in asdict(self.memory).items()},
            "serving": {
                "parameters": round(self.serving.parameters),
                "kv_bytes_per_token": self.serving.kv_per_token,
                "kv_bytes_per_sequence": self.serving.kv_per_sequence,
                "kv_cache": round(self.serving.kv_cache),
                "bytes_per_device": round(self.serving.total),
                "fits": self.serving.total <= self.room,
                "sequences_that_fit": self.serving.sequences,
            },
            "flops_per_step": global_flops(self.run),
            "collective_bytes_per_step": {axis: round(size) for axis, size in self._sent().items()},
            "predicted_step_seconds": self.speed.step_seconds,
            "predicted_seconds": asdict(self.speed.time),
            "predicted_tokens_per_second": self.speed.tokens_per_second,
            "predicted_tokens_per_second_pi90": self.speed.interval,
            "predicted_mfu": self.speed.mfu,
            "dollars_per_billion_tokens": self.speed.dollars_per_billion_tokens,
            "attentions_with_scores": self.scores,
            "compiled": compiled is not None or self.refused is not None,
            "compiler": None
            if compiled is None
            else {
                "bytes_per_device": compiled.bytes_per_device,
                "arguments": compiled.arguments,
                "temporaries": compiled.temporaries,
                "collectives": {
                    kind: {"count": count, "bytes": size}
                    for kind, (count, size) in compiled.collectives.items()
                },
                "pallas_kernels": compiled.kernels,
                "seconds": compiled.seconds,
            },
        }

    def _sent(self) -> dict[str, float]:
        return collective_bytes(self.run, POLICIES[self.run.compute.remat])


@dataclass(frozen=True)
class Training:
    """What the updates of a whole training take. `interval`: seconds, as far as the speed's goes.

    Evaluations, checkpoints and machines that fail are not in it.
    """

    tokens: int
    updates: int
    seconds: float
    interval: tuple[float, float] | None
    device_hours: float
    dollars: float | None


def training(plan: Plan, tokens: int) -> Training:
    """The whole training of a planned run: as many updates as `tokens` take."""
    speed, chip = plan.speed, plan.topology.chip
    updates = math.ceil(tokens / (plan.run.data.batch_size * plan.run.data.seq_len))
    seconds = updates * speed.step_seconds
    interval = None
    if speed.interval is not None:
        low, high = speed.interval
        of = speed.tokens_per_second * seconds
        interval = (of / high, of / low)
    hours = seconds / 3600 * plan.topology.devices
    dollars = None if chip.price is None else hours * chip.price
    return Training(tokens, updates, seconds, interval, hours, dollars)


def ranked(plans: list[Plan]) -> list[Plan]:
    """The same run on several machines: cheapest first where all have a price, else fastest.

    What does not fit comes last.
    """

    def place(plan: Plan) -> tuple[bool, float]:
        dollars = plan.speed.dollars_per_billion_tokens
        return not plan.fits, dollars if priced else -plan.speed.tokens_per_second

    priced = all(plan.topology.chip.price is not None for plan in plans)
    return sorted(plans, key=place)


def make_plan(run: RunSpec, topology: Topology, remat: str = "auto", *, compile: bool) -> Plan:
    """Plans a run. `remat` auto takes the policy that recomputes least and fits.

    Raises:
        AssayError: if the mesh has not as many devices as the topology; if the policy is unknown.
    """
    run = for_target(on_mesh(run, topology), topology)
    if remat != "auto":
        return _plan(run.at("compute.remat", _known(remat)), topology, compile)
    candidates = [run.at("compute.remat", policy) for policy in AUTO]
    roomy = [c for c in candidates if _plan(c, topology, False).fits] or candidates[-1:]
    for candidate in roomy:
        plan = _plan(candidate, topology, compile)
        if plan.fits:
            return plan
    return plan


def _known(remat: str) -> str:
    if remat not in POLICIES:
        raise AssayError(f"remat: '{remat}' is no policy; {did_you_mean(remat, POLICIES)}")
    return remat


def on_mesh(run: RunSpec, topology: Topology) -> RunSpec:
    """The run on all devices: where its mesh names none, they share the parameters (fsdp).

    Raises:
        AssayError: if the mesh has another number of devices.
    """
    devices = topology.devices
    if run.mesh.devices == 1 and devices > 1:
        return run.replace(mesh=MeshSpec(fsdp=devices))
    if run.mesh.devices != devices:
        axes = ", ".join(f"{axis}={size}" for axis, size in mesh_sizes(run.mesh).items())
        raise AssayError(
            f"mesh: {axes} is {run.mesh.devices} devices, but {topology.name} has {devices}."
        )
    return run


def _plan(run: RunSpec, topology: Topology, compile: bool) -> Plan:
    policy = POLICIES[run.compute.remat]
    system = System(flash=kernel_of(run, topology))
    compiled = refused = None
    if compile and can_compile(topology):
        try:
            compiled = compile_step(run, topology)
        except DoesNotFitError as error:
            refused = error
    return Plan(
        run=run,
        topology=topology,
        memory=training_memory(run, policy, system),
        serving=serving_memory(run, USABLE * topology.chip.memory),
        compiled=compiled,
        refused=refused,
        speed=predict(run, topology, policy, system),
        scores=sum(keeps_scores(one, run, system) for one in chain(*attending(run.model))),
    )


def kernel_of(run: RunSpec, topology: Topology) -> Kernel | Literal[False]:
    """The kernel that makes attention there, where it fits: one that never keeps scores."""
    if topology.chip.name == "cpu" or run.compute.kernels not in ("auto", "flash"):
        return False
    return "splash" if topology.is_tpu else "cudnn"


def for_target(run: RunSpec, topology: Topology) -> RunSpec:
    """The run as it would be computed there, not on the machine that plans it.

    Layers are scanned, so that an 80-layer model compiles as soon as a small one; what `auto`
    would pick by the device is picked for the target.
    """
    if not topology.is_tpu:
        return run
    compute = run.compute.replace(scan_layers=True)
    if compute.kernels == "auto":
        compute = compute.replace(kernels=TPU_KERNELS)
    if compute.moe_dispatch == "auto":
        compute = compute.replace(moe_dispatch="ragged")
    return run.replace(compute=compute)


# ---------------------------------------------------------------------------- search


ENOUGH = 0.98
"""Of the fastest batch's tokens a second: a smaller one that reaches it is proposed."""


PARTS = (1, 2, 4, 8, 16, 32, 64)
"""Into how many a batch may be cut (gradient accumulation)."""


def search(
    run: RunSpec,
    topology: Topology,
    *,
    batch: bool = False,
    mesh: MeshSpec | None = None,
    remat: str = "auto",
    parts: tuple[int, ...] = PARTS,
    most: int = 8,
) -> list[Plan]:
    """The fastest plans that fit, by estimate: every mesh of the devices, and remat policy.

    The batch is the run's; where it does not fit at once, it goes in as few of `parts` as fit. With
    `batch` it is proposed too: 1 to 32 sequences a device, the fewest that lose no speed. A `mesh`
    or a policy that is given is held to. If nothing fits otherwise, the optimizer's statistics go
    to the host's memory.
    """
    run = for_target(run, topology)
    policies = AUTO if remat == "auto" else (_known(remat),)
    tried = list(meshes(topology.devices)) if mesh is None else [on_mesh(run, topology).mesh]
    propose = _batch_of if batch else partial(_parts_of, parts)
    for offload in (run.compute.offload_optimizer, True):
        plans = [
            propose(
                run.changed({"compute.remat": policy, "compute.offload_optimizer": offload}),
                mesh,
                topology,
            )
            for mesh, policy in product(tried, policies)
        ]
        found = sorted(filter(None, plans), key=lambda plan: -plan.speed.tokens_per_second)
        if found or offload:
            return found[:most]
    return []


def least(run: RunSpec, topology: Topology, mesh: MeshSpec | None = None) -> Plan | None:
    """The plan that needs the least memory, whether it fits or not: for a sentence on what would.

    Blocks are done again, the optimizer is offloaded, and the batch is one sequence a pass and
    group of devices that share one.
    """
    run = for_target(run, topology)
    run = run.changed({"compute.remat": "block", "compute.offload_optimizer": True})
    plans = []
    for one in meshes(topology.devices) if mesh is None else [on_mesh(run, topology).mesh]:
        parts = max(1, run.data.batch_size // one.batch_shards)
        train = run.train.replace(accumulate=parts)
        plans.append(_estimated(run, topology, mesh=one, train=train))
    return min(filter(None, plans), key=lambda plan: plan.memory.total, default=None)


def _parts_of(
    parts: tuple[int, ...], run: RunSpec, mesh: MeshSpec, topology: Topology
) -> Plan | None:
    """The run's batch in as few parts as fit: more are never faster."""
    for count in parts:
        if count > run.data.batch_size:
            break
        train = run.train.replace(accumulate=count)
        plan = _estimated(run, topology, mesh=mesh, train=train)
        if plan is not None and plan.fits:
            return plan
    return None


def _batch_of(run: RunSpec, mesh: MeshSpec, topology: Topology) -> Plan | None:
    """The smallest batch, at once, that is as fast as any that fits."""
    plans = []
    for each in (1, 2, 4, 8, 16, 32):
        data = run.data.replace(batch_size=each * topology.devices)
        plan = _estimated(run, topology, mesh=mesh, data=data)
        if plan is not None and plan.fits:
            plans.append(plan)
    fastest = max((plan.speed.tokens_per_second for plan in plans), default=0.0)
    enough = (plan for plan in plans if plan.speed.tokens_per_second >= ENOUGH * fastest)
    return next(enough, None)


def _estimated(run: RunSpec, topology: Topology, **changes: Any) -> Plan | None:
    """From the spec alone; None where the mesh is not legal."""
    try:
        return _plan(run.replace(**changes), topology, False)
    except AssayError:
        return None


def confirmed(plans: list[Plan]) -> tuple[Plan, list[Plan]]:
    """The first of estimated plans that the compiler says fits, compiled; and all others.

    What it needs more than was estimated, the plans that come after are taken to need too: those
    that then have no room are passed over. At most three are compiled; if none of them fits, the
    first of them is returned with the compiler's answer. Where there is no compiler for the
    machine the first plan is taken as it is.
    """
    tried, more = [], 1.0
    for number, plan in enumerate(plans):
        if more * plan.memory.total > plan.room:
            continue
        tried.append(_plan(plan.run, plan.topology, True))
        if tried[-1].fits:
            return tried[-1], plans[:number] + plans[number + 1 :]
        if len(tried) == 3:
            break
        more = max(more, tried[-1].bytes_per_device / plan.memory.total)
    return tried[0], plans[1:]


def meshes(devices: int) -> Iterator[MeshSpec]:
    """Every mesh of so many devices."""
    for tensor in _divisors(devices):
        for expert in _divisors(devices // tensor):
            for fsdp in _divisors(devices // tensor // expert):
                data = devices // tensor // expert // fsdp
                yield MeshSpec(data=data, fsdp=fsdp, expert=expert, tensor=tensor)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
