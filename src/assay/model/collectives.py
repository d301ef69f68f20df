"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8}
_WIDTHS |= {"s64": 8, "u64": 8}
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shape>.*?) (?:ragged-)?"
    rf"(?P<kind>{'|'.join(KINDS)})(?:-start)?\(",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction: its kind, and the bytes of its result on each device."""

    kind: str
    bytes: int


def collectives(program: str) -> list[Collective]:
    """Those of an optimised HLO text, as `compiled.as_text()` gives it, in its order.

    One that stands in a loop's body is listed once, however often the loop runs.
    """
    return [
        Collective(found["kind"], sum(map(_bytes, _ARRAY.findall(found["shape"]))))
        for found in _INSTRUCTION.finditer(program)
    ]


def counted(program: str) -> dict[str, int]:
    """How many of each kind there are."""
    return dict(sorted(Counter(c.kind for c in collectives(program)).items()))


def _bytes(array: tuple[str, str]) -> int:
    dtype, sizes = array
    return _WIDTHS.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)
