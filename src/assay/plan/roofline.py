"""Seconds of an update: products, memory traffic and links, each at the speed of its hardware.

Products run at the chip's peak times its `efficiency`, attention's at `ATTENTION` of that (its
tiles are small and its softmax is between two products). Memory traffic between products is not
hidden behind them. Gathering and reducing parameters hides behind the products of other layers,
all but `EXPOSED` of it; sums of activations (tensor) and experts' exchanges hide by half. These
shares are round numbers, the same for every chip and every run.
"""

import math
from dataclasses import dataclass

from assay.plan.topology import Topology
from assay.plan.work import Work, global_flops, mesh_sizes, step_work
from assay.spec.run import RunSpec

ATTENTION = 0.6
MEMORY = 0.8
LINKS = 0.8
"""Shares of the products' speed, of the memory's and of the links' that are reached."""

EXPOSED = {"fsdp": 0.1, "data": 0.1, "tensor": 0.5, "expert": 0.5}
"""The share of a collective's time that waits for nothing else to do, at the least."""


@dataclass(frozen=True)
class Time:
    """Seconds of an update by what they are spent on; `collectives` are those not hidden."""

    products: float
    attention: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.collectives


@dataclass(frozen=True)
class Speed:
    """What a roofline says of a run. `mfu` counts no recomputation, against bfloat16's peak."""

    time: Time
    tokens_per_second: float
    mfu: float
    dollars_per_billion_tokens: float | None

    @property
    def step_seconds(self) -> float:
        return self.time.total


def step_time(
    work: Work, run: RunSpec, topology: Topology, efficiency: float | None = None
) -> Time:
    """Seconds of one update whose share of work a device has."""
    chip = topology.chip
    peak = chip.peak * (efficiency or chip.efficiency)
    if run.compute.dtype == "float32":
        peak *= chip.float32
    products, attention = work.products / peak, work.attention / (peak * ATTENTION)
    hidden_behind = products + attention
    exposed, hideable = 0.0, 0.0
    for axis, size in work.sent.items():
        seconds = size / (LINKS * axis_bandwidth(axis, run, topology))
        exposed += EXPOSED[axis] * seconds
        hideable += (1 - EXPOSED[axis]) * seconds
    exposed += max(0.0, hideable - hidden_behind)
    return Time(products, attention, work.traffic / (MEMORY * chip.bandwidth), exposed)


def axis_bandwidth(axis: str, run: RunSpec, topology: Topology) -> float:
    """Bytes a second at which a device sends along one axis of the mesh.

    On a torus an axis of the mesh gets as many of the torus' as its share of the mesh's size, in
    powers, but at least one. Behind a switch the axes are laid out innermost last (tensor, then
    expert, then fsdp, then data); an axis that reaches beyond the island is as fast as all of
    the island's network cards together, the island's own links, or what is slower of the two.
    """
    chip, mesh = topology.chip, mesh_sizes(run.mesh)
    if chip.axes:
        sides = sum(side > 1 for side in topology.shape) or 1
        share = math.log(max(mesh[axis], 2)) / math.log(max(topology.devices, 2))
        return chip.link * max(1.0, share * sides)
    inner = 1
    for name in ("tensor", "expert", "fsdp", "data"):
        if name == axis:
            break
        inner *= mesh[name]
    if inner * mesh[axis] <= chip.island:
        return chip.link
    sharing = max(1, chip.island // inner)  # devices of one island that belong to the same ring
    return min(chip.link, sharing * chip.network)


def predict(
    run: RunSpec,
    topology: Topology,
    recompute: str,
    *,
    fused: bool = True,
    flash: bool = True,
    efficiency: float | None = None,
) -> Speed:
    """Seconds an update, tokens a second and MFU of a run on machines that need not be there."""
    time = step_time(step_work(run, recompute, fused=fused, flash=flash), run, topology, efficiency)
    tokens = run.data.batch_size * run.data.seq_len
    devices = run.mesh.devices
    speed = tokens / time.total
    dollars = None
    if topology.chip.price is not None:
        dollars = 1e9 / speed / 3600 * topology.chip.price * devices
    mfu = global_flops(run) / time.total / (topology.chip.peak * devices)
    return Speed(time, speed, mfu, dollars)
