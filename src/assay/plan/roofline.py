"""Seconds of an update: products, memory traffic and links, each at the speed of its hardware.

Products run at the chip's peak times its `efficiency`, attention's at `ATTENTION` of that (its
tiles are small and its softmax is between two products). Memory traffic between products is not
hidden behind them; products that have few tokens take the time in which their weights are read.
Gathering and reducing parameters hides behind the products of other layers, all but `EXPOSED` of
it; sums of activations (tensor) do by half on TPUs and not on GPUs, experts' exchanges nowhere.
These shares are round numbers, the same for every chip and every run.
"""

import math
from dataclasses import dataclass

from assay.plan.topology import Topology
from assay.plan.work import ASSAY, Sent, System, Work, global_flops, mesh_sizes, step_work
from assay.spec.run import RunSpec

ATTENTION = 0.6
MEMORY = 0.8
LINKS = 0.8
"""Shares of the products' speed, of the memory's and of the links' that are reached."""

EXPOSED = {"gather": 0.1, "sum": 0.1, "late": 1.0, "stream": 1.0, "exchange": 1.0}
"""The share of a collective's time that waits for nothing else to do, at the least. Nothing hides
what is gathered late, a sum of activations or an exchange: what comes next needs it."""

IN_PIECES = EXPOSED | {"stream": 0.5}
"""The same where products are taken in pieces, as a TPU's compiler does."""

NINE_IN_TEN = {"tpu": (0.93, 1.08), "gpu": (0.86, 1.08)}
"""Between which shares of what is predicted of them nine in ten published runs lie
(`published.nine_in_ten`)."""


@dataclass(frozen=True)
class Time:
    """Seconds of an update by what they are spent on; `collectives` are those not hidden.

    `host`: the optimizer's statistics, where they lie in the host's memory, come before the update
    and go after it; nothing is taken to hide that.
    """

    products: float
    attention: float
    memory: float
    collectives: float
    host: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Speed:
    """What a roofline says of a run.

    `mfu` counts no recomputation, against bfloat16's peak; on a CPU, against its run's dtype's.
    `interval`: tokens a second, lowest and highest, as far as published runs of such machines were
    from what is predicted of them, in nine of ten; None of a CPU, of which none were published.
    """

    time: Time
    tokens_per_second: float
    interval: tuple[float, float] | None
    mfu: float
    dollars_per_billion_tokens: float | None

    @property
    def step_seconds(self) -> float:
        return self.time.total


def step_time(
    work: Work,
    run: RunSpec,
    topology: Topology,
    system: System = ASSAY,
    efficiency: float | None = None,
) -> Time:
    """Seconds of one update whose share of work a device has.

    Collectives hide behind the products of their own pass, forward ones behind forward; what is
    sent once an update, behind those of one pass.
    """
    chip, passes = topology.chip, run.train.accumulate
    peak = chip.peak * (chip.float32 if run.compute.dtype == "float32" else 1)
    reached = peak * (efficiency or chip.efficiency)
    memory = MEMORY * chip.bandwidth
    products = max(work.products / reached, work.weights / memory)
    attention = work.attention / (
        peak * system.attention if system.attention else reached * ATTENTION
    )
    pieces = chip.axes > 0 if system.pieces is None else system.pieces
    share = IN_PIECES if pieces else EXPOSED
    exposed, each, once = 0.0, [0.0, 0.0], [0.0, 0.0]
    for sent in work.sent:
        seconds = sent.size / (LINKS * bandwidth(sent, run, topology))
        exposed += share[sent.kind] * seconds
        into = once if sent.kind == "sum" else each
        for phase, of in enumerate((sent.forward, 1 - sent.forward)):
            into[phase] += (1 - share[sent.kind]) * seconds * of
    for phase, of in enumerate((work.forward, 1 - work.forward)):
        room, mine = of * (products + attention) / passes, each[phase] / passes
        exposed += (passes - 1) * max(0.0, mine - room) + max(0.0, mine + once[phase] - room)
    host = work.host / (LINKS * chip.host)
    return Time(products, attention, work.traffic / memory, exposed, host)


def bandwidth(sent: Sent, run: RunSpec, topology: Topology) -> float:
    """Bytes a second at which a device sends along one axis of the mesh.

    On a torus an axis of the mesh gets as many of the torus' as its share of the mesh's size, in
    powers, but at least one; what is exchanged passes n / 4 devices on its way around a ring of n.
    Behind a switch the axes are laid out innermost last (tensor, then expert, then fsdp, then
    data). An axis that reaches beyond the island: a ring leaves the island once for all that are
    in it, so it is as fast as their network cards together, the island's own links, or what is
    slower of the two; what is exchanged leaves by each device's own card. Where each pair of an
    island has links of its own, fewer devices than the island's use only those between them.
    """
    chip, mesh = topology.chip, mesh_sizes(run.mesh)
    size = mesh[sent.axis]
    if chip.axes:
        sides = sum(side > 1 for side in topology.shape) or 1
        axes = max(1.0, sides * math.log(max(size, 2)) / math.log(max(topology.devices, 2)))
        if sent.kind == "exchange":
            side = size ** (1 / axes)
            return chip.link * (1 - 1 / size) / (side / 4)
        return chip.link * axes
    inner = 1
    for name in ("tensor", "expert", "fsdp", "data"):
        if name == sent.axis:
            break
        inner *= mesh[name]
    if inner * size <= chip.island:
        return chip.link if chip.switch else chip.link * (size - 1) / (chip.island - 1)
    together = max(1, chip.island // inner)  # devices of one island that belong to the same ring
    if sent.kind == "exchange":
        return chip.network * (size - 1) / (size - together)  # the rest stays in the island
    return min(chip.link, together * chip.network)


def predict(
    run: RunSpec,
    topology: Topology,
    recompute: str,
    system: System = ASSAY,
    *,
    efficiency: float | None = None,
) -> Speed:
    """Seconds an update, tokens a second and MFU of a run on machines that need not be there."""
    time = step_time(step_work(run, recompute, system), run, topology, system, efficiency)
    tokens = run.data.batch_size * run.data.seq_len
    devices = run.mesh.devices
    speed = tokens / time.total
    dollars = None
    chip = topology.chip
    if chip.price is not None:
        dollars = 1e9 / speed / 3600 * chip.price * devices
    peak = chip.peak
    if chip.name == "cpu" and run.compute.dtype == "float32":
        peak *= chip.float32
    mfu = global_flops(run) / time.total / (peak * devices)
    interval = None
    if chip.name != "cpu":
        low, high = NINE_IN_TEN["tpu" if topology.is_tpu else "gpu"]
        interval = (low * speed, high * speed)
    return Speed(time, speed, interval, mfu, dollars)
