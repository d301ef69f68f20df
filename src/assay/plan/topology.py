"""Machines that a run may be planned for: their chips, and how the chips are joined.

Peaks are dense bfloat16 as the makers publish them. `efficiency` is the share of the peak that
matrix products reach in practice, calibrated on published training runs (`plan/published.py`,
`docs/planner.md`), never on the run that is being predicted when the two are held together.
"""

import math
import re
from dataclasses import dataclass, replace

from assay.errors import AssayError, did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    `peak`: bfloat16 FLOPs a second. `memory`: bytes. `bandwidth`: bytes a second of its memory.
    `link`: bytes a second that one device sends and receives over one torus axis (TPU, both
    directions together), or over its switch (GPU, one direction). `axes`: torus axes; 0 is a
    switch. `island`: devices that the fast links join; beyond them `network`, bytes a second a
    device. Without `switch` each pair of an island has its own share of the links. `float32`: the
    float32 peak as a share of `peak`. `host`: bytes a second to the host's memory and from it.
    """

    name: str
    kind: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    island: int
    network: float
    efficiency: float
    float32: float = 1 / 3
    price: float | None = None
    source: str = ""
    switch: bool = True
    host: float = 1.6e10


CLOUD_TPU = "Google Cloud TPU documentation; link speeds: How To Scale Your Model, chapter 2"
NVIDIA = "NVIDIA data sheet"

PCIE_4, PCIE_5 = 3.2e10, 6.4e10  # 16 lanes, one direction; before v6e a TPU has half of the first

# A TPU's float32 product is several bfloat16 ones, a GPU's is TF32 (half of bfloat16). Prices are
# US dollars a chip-hour on demand, where the maker of the cloud publishes one (us, 2025).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", "TPU v4", 275e12, 32 * GIB, 1.2e12, 9e10, 3, 4096, 6.25e9),
            *(0.72, 1 / 6, 3.22, CLOUD_TPU),
        ),
        Chip(
            *("v5e", "TPU v5e", 197e12, 16 * GIB, 8.2e11, 9e10, 2, 256, 3.125e9),
            *(0.86, 1 / 6, 1.20, CLOUD_TPU),
        ),
        Chip(
            *("v5p", "TPU v5p", 459e12, 95 * GIB, 2.765e12, 1.8e11, 3, 8960, 6.25e9),
            *(0.81, 1 / 6, 4.20, CLOUD_TPU),
        ),
        Chip(
            *("v6e", "TPU v6e", 918e12, 32 * GIB, 1.64e12, 1.8e11, 2, 256, 1.25e10),
            *(0.59, 1 / 6, 2.70, CLOUD_TPU, True, PCIE_4),
        ),
        Chip(
            *("a100", "NVIDIA A100 80GB", 312e12, 80 * GIB, 2.04e12, 3e11, 0, 8, 2.5e10),
            *(0.76, 1 / 2, None, NVIDIA, True, PCIE_4),
        ),
        Chip(
            *("a100-40gb", "NVIDIA A100 40GB", 312e12, 40 * GIB, 1.555e12, 3e11, 0, 8, 2.5e10),
            *(0.76, 1 / 2, None, NVIDIA, True, PCIE_4),
        ),
        Chip(
            *("h100", "NVIDIA H100 SXM", 989e12, 80 * GIB, 3.35e12, 4.5e11, 0, 8, 5e10),
            *(0.58, 1 / 2, None, NVIDIA, True, PCIE_5),
        ),
        Chip(
            *("h200", "NVIDIA H200", 989e12, 141 * GIB, 4.8e12, 4.5e11, 0, 8, 5e10),
            *(0.63, 1 / 2, None, NVIDIA, True, PCIE_5),
        ),
        Chip(
            *("b200", "NVIDIA B200", 2250e12, 180 * GIB, 7.7e12, 9e11, 0, 8, 5e10),
            *(0.53, 1 / 2, None, NVIDIA, True, PCIE_5),
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """`shape` chips of a kind: a torus for TPUs, a number of them for GPUs and CPUs."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def is_tpu(self) -> bool:
        return self.chip.axes > 0


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4` (chips along each torus axis), `v5e:16x16`, `h100:8`, `cpu`.

    `v5p-128` and `v4-128` are Cloud TPU's names, which count cores (two a chip); `v5e-16` and
    `v6e-16` count chips. Such a slice gets a torus as square as it can be.

    Raises:
        AssayError: if the chip is unknown, or the shape is not one.
    """
    if text.lower() in ("cpu", "cpu:1"):
        return Topology(measured_cpu(), (1,))
    match = re.fullmatch(r"([\w-]+?)(?::(\d+(?:x\d+)*)|-(\d+))?", text.lower())
    if match is None:
        raise AssayError(f"topology: found '{text}'; expected CHIP:SHAPE, as v5p:4x4x4 or h100:8.")
    name, shape, slice_size = match.groups()
    if text.lower() in CHIPS:
        name, shape, slice_size = text.lower(), "1", None
    if name == "cpu":
        raise AssayError(f"topology: found '{text}'; 'cpu' is this machine, and one device.")
    if name not in CHIPS:
        known = did_you_mean(name, ["cpu", *CHIPS])
        raise AssayError(f"topology: '{name}' is no known chip; {known}")
    chip = CHIPS[name]
    if shape is not None:
        sizes = tuple(map(int, shape.split("x")))
    elif slice_size is None:
        sizes = (1,)
    elif not chip.axes:
        raise AssayError(f"topology: found '{text}'; give the number of GPUs as {name}:8.")
    else:
        cores = 2 if chip.axes == 3 else 1
        chips, odd = divmod(int(slice_size), cores)
        if odd:
            raise AssayError(
                f"topology: found '{text}', but {name}-N counts cores, of which a chip has two; "
                f"chips are named as {name}:2x2x1."
            )
        sizes = _squarest(chips, chip.axes)
    if 0 in sizes:
        raise AssayError(f"topology: found '{text}', which has no chips.")
    if chip.axes:
        if len(sizes) > chip.axes:
            raise AssayError(
                f"topology: found '{text}', but {chip.kind} has {chip.axes} torus axes."
            )
        sizes += (1,) * (chip.axes - len(sizes))
        if math.prod(sizes) > chip.island:
            raise AssayError(
                f"topology: found {math.prod(sizes)} chips, but a pod of {chip.kind} has "
                f"{chip.island}."
            )
    elif len(sizes) > 1:
        raise AssayError(f"topology: found '{text}'; give the number of GPUs as {name}:8.")
    return Topology(chip, sizes)


def _squarest(chips: int, axes: int) -> tuple[int, ...]:
    """Torus sides, smallest first, as near to each other as powers of two allow."""
    sides, axis = [1] * axes, axes - 1
    left = chips
    while left > 1:
        factor = 2 if left % 2 == 0 else left
        sides[axis] *= factor
        left //= factor
        axis = (axis - 1) % axes
    return tuple(sorted(sides))


def measured_cpu() -> Chip:
    """This machine's CPU: its products, its memory's speed and size, measured now."""
    import os

    from assay.train.speed import memory_bandwidth, peak_flops

    peak, bandwidth = peak_flops("bfloat16"), memory_bandwidth()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(
        *("cpu", "this CPU", peak, memory, bandwidth, bandwidth, 0, 1, bandwidth),
        *(0.9, peak_flops("float32") / peak, None, "measured at start", True, math.inf),
    )


def with_price(topology: Topology, price: float | None) -> Topology:
    """The same machines at another price, US dollars a chip-hour."""
    if price is None:
        return topology
    return replace(topology, chip=replace(topology.chip, price=price))
