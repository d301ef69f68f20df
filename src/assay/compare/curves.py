"""Learning curves of several seeds: bands, crossing points, and their shape as numbers.

A curve is `x` (tokens, FLOPs or seconds, growing) and `y` (loss). Runs of one variant are a list
of such curves, one a seed, each with its own places of x; they are compared on a common grid, by
linear interpolation, where all of them have values.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from assay.compare.statistics import mean_interval

Curve = tuple[ArrayLike, ArrayLike]

# ---------------------------------------------------------------------------- bands


@dataclass(frozen=True)
class Band:
    """The mean of S curves on a grid of G places, and its planned-n interval at each place.

    The interval is of each place by itself, not of all at once. It is infinite for one curve.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    curves: int


def common_grid(curves: Sequence[Curve], points: int = 200, log: bool = False) -> np.ndarray:
    """Places of x at which all curves have values, evenly spaced; empty where they share none."""
    kept = [_finite(x, y)[0] for x, y in curves]
    if not kept or any(len(x) == 0 for x in kept):
        return np.empty(0)
    low = max(x[0] for x in kept)
    high = min(x[-1] for x in kept)
    if low > high or points < 1:
        return np.empty(0)
    if log and low > 0:
        return np.clip(np.geomspace(low, high, points), low, high)
    return np.linspace(low, high, points)


def on_grid(curves: Sequence[Curve], grid: np.ndarray) -> np.ndarray:
    """The curves' values at the grid's places, (S, G)."""
    return np.array([np.interp(grid, *_finite(x, y)) for x, y in curves])


def band(
    curves: Sequence[Curve], *, points: int = 200, log: bool = False, level: float = 0.95
) -> Band:
    """The mean curve over seeds, with its planned-n interval at each place."""
    grid = common_grid(curves, points, log)
    if len(grid) == 0:
        return Band(grid, grid, grid, grid, len(curves))
    values = on_grid(curves, grid)
    low, high = mean_interval(values.T, level)
    return Band(grid, values.mean(0), low, high, len(curves))


# ---------------------------------------------------------------------------- crossings


@dataclass(frozen=True)
class Crossing:
    """Where two mean curves change places.

    `low` to `high` are the places about it at which the paired planned-n interval of the
    difference still holds 0: a test turned around, so it covers a true crossing as often as that
    interval its truth. `bootstrap95` is the percentile interval over resampled seeds, narrower
    than it should be at few seeds; `support` the share of resamples in which the curves cross at
    all. All four are None for one seed. `leader_before` is 0 or 1: whose loss is lower until then.
    """

    x: float
    loss: float
    leader_before: int
    low: float | None
    high: float | None
    bootstrap95: tuple[float, float] | None
    support: float | None


def crossings(
    a: Sequence[Curve],
    b: Sequence[Curve],
    *,
    points: int = 400,
    log: bool = True,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Crossing, ...]:
    """The places at which the lower of two mean curves becomes the higher, paired by seed.

    Between two crossings one curve must be told from the other somewhere, by the interval of the
    place: what is not is noise about 0, and is no change of places. With one seed every change of
    sign counts, and nothing is said of how sure it is.

    Args:
        a, b: curves of the same seeds, in the same order.
    """
    grid = common_grid([*a, *b], points, log)
    if len(grid) < 2:
        return ()
    values_a, values_b = on_grid(a, grid), on_grid(b, grid)
    differences = values_a - values_b
    seeds = len(differences)
    mean = differences.mean(0)
    if seeds > 1:
        low, high = mean_interval(differences.T, level)
        told = np.where(low > 0, 1, np.where(high < 0, -1, 0))
    else:
        told = np.sign(mean).astype(int)
    sure = np.flatnonzero(told)
    found = []
    random = np.random.default_rng(seed)
    resampled = differences[random.integers(seeds, size=(resamples, seeds))].mean(1)
    for left, right in pairwise(sure):
        if told[left] == told[right]:
            continue
        x = _zeros(grid[left : right + 1], mean[left : right + 1], log)
        place = float(np.median(x))
        again = [_nearest(grid, row, place, log) for row in resampled] if seeds > 1 else []
        again = [zero for zero in again if zero is not None]
        found.append(
            Crossing(
                x=place,
                loss=float(np.interp(place, grid, (values_a.mean(0) + values_b.mean(0)) / 2)),
                leader_before=0 if told[left] < 0 else 1,
                low=float(grid[left]) if seeds > 1 else None,
                high=float(grid[right]) if seeds > 1 else None,
                bootstrap95=(
                    tuple(float(q) for q in np.quantile(again, (0.025, 0.975))) if again else None
                ),
                support=len(again) / resamples if seeds > 1 else None,
            )
        )
    return tuple(found)


def _zeros(x: np.ndarray, y: np.ndarray, log: bool) -> np.ndarray:
    """Where a polygon passes through 0."""
    place = np.flatnonzero(np.sign(y[:-1]) * np.sign(y[1:]) < 0)
    exact = x[y == 0]
    share = y[place] / (y[place] - y[place + 1])
    if log and x[0] > 0:
        between = np.exp(np.log(x[place]) * (1 - share) + np.log(x[place + 1]) * share)
    else:
        between = x[place] * (1 - share) + x[place + 1] * share
    return np.sort(np.concatenate([exact, between]))


def _nearest(grid: np.ndarray, y: np.ndarray, place: float, log: bool) -> float | None:
    zeros = _zeros(grid, y, log)
    if len(zeros) == 0:
        return None
    away = np.abs(np.log(zeros / place)) if log and place > 0 else np.abs(zeros - place)
    return float(zeros[np.argmin(away)])


# ---------------------------------------------------------------------------- shape


@dataclass(frozen=True)
class Features:
    """A curve's shape as three numbers (the convergence heuristics of JAX-AttentionNet).

    slope: how steeply it fell at first: the loss lost for each tenfold of x, by least squares
    over the places from the start to the one where nine tenths of the whole fall were done.
    late_slope: the same over the last half of x; near 0 is a plateau.
    floor: the mean of y over the last tenth of x.
    smoothness: the standard deviation of y about its own trend, so smaller is smoother. Each
    value is held against the line through its two neighbours (Gasser, Sroka and Jennen-Steinmetz,
    1986, Biometrika 73(3)), over the last half of x, where the trend is nearly straight.

    nan where there are too few places.
    """

    slope: float
    late_slope: float
    floor: float
    smoothness: float


def curve_features(x: ArrayLike, y: ArrayLike) -> Features:
    """The shape of one curve; of several seeds, take each one's and then `mean_interval`."""
    x, y = _finite(x, y)
    if len(x) == 0:
        return Features(math.nan, math.nan, math.nan, math.nan)
    span = x[-1] - x[0]
    last_tenth = y[x >= x[-1] - span / 10]
    floor = float(last_tenth.mean())
    positive = x > 0
    x, y = x[positive], y[positive]
    fall = y[0] - floor if len(y) else 0.0
    done = np.flatnonzero(y <= y[0] - 0.9 * fall) if fall > 0 else []
    first = slice(0, int(done[0]) + 1) if len(done) else slice(None)
    late = x >= x[-1] - span / 2 if len(x) else slice(None)
    return Features(
        slope=-_steepness(x[first], y[first]),
        late_slope=-_steepness(x[late], y[late]),
        floor=floor,
        smoothness=_roughness(x[late], y[late]),
    )


def features_of(curves: Sequence[Curve], level: float = 0.95) -> dict[str, dict[str, object]]:
    """Each feature's mean over seeds and its planned-n interval, as plain data."""
    each = [asdict(curve_features(x, y)) for x, y in curves]
    summary = {}
    for name in ("slope", "late_slope", "floor", "smoothness"):
        values = np.array([features[name] for features in each])
        values = values[np.isfinite(values)]
        low, high = mean_interval(values, level) if len(values) > 1 else (-np.inf, np.inf)
        summary[name] = {
            "mean": float(values.mean()) if len(values) else None,
            "ci95": [float(v) if np.isfinite(v) else None for v in (low, high)],
        }
    return summary


def _steepness(x: np.ndarray, y: np.ndarray) -> float:
    """The least-squares slope of y against log10 x."""
    if len(x) < 2 or x[0] == x[-1]:
        return math.nan
    return float(stats.linregress(np.log10(x), y).slope)


def _roughness(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3:
        return math.nan
    weight = (x[2:] - x[1:-1]) / (x[2:] - x[:-2])  # of the left neighbour
    rest = weight * y[:-2] + (1 - weight) * y[2:] - y[1:-1]
    return float(np.sqrt(np.mean(rest**2 / (weight**2 + (1 - weight) ** 2 + 1))))


def smooth(y: ArrayLike, weight: float) -> np.ndarray:
    """An exponential moving average that begins unbiased: 0 leaves y as it is, 0.9 is smooth.

    s_i = sum_j weight^(i-j) y_j / sum_j weight^(i-j), over j <= i. A nan leaves the average be.
    """
    y = np.asarray(y, float)
    total, count, out = 0.0, 0.0, np.empty_like(y)
    for i, value in enumerate(y):
        if np.isfinite(value):
            total, count = weight * total + value, weight * count + 1
        out[i] = total / count if count else np.nan
    return out


def _finite(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Finite places only, with growing x: of two values at one x the later holds."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    last = np.append(np.diff(x) > 0, True)[: len(x)]
    return x[last], y[last]
