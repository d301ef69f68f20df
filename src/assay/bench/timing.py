"""Figures of several turns, and what a comparison of two gives.

Ratios of one run mean something; seconds on a shared machine do not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Least, middle and greatest of several measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(min(values), median(values), max(values))


def seconds(step: Callable[[], Any], steps: int) -> float:
    """Wall time of so many steps, each waited for by the step itself."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - began
