"""Which variant is better, by how much, and how sure that is: numbers in, verdicts out.

Scores are losses (bits per byte, say): less is better. They are paired by seed: seed s of every
variant saw the same data in the same order, so differences are taken seed by seed. Shapes:
P pairs, S seeds; `...` is any number of leading axes, so that many simulated experiments are
judged at once. `nan` is a run that is not there (yet).

A 95 % interval is given twice, and always by its name:

- planned-n, Student's: right for the number of seeds that was planned, looked at as planned;
- anytime-valid: covers the truth at all numbers of seeds at once, so that anyone may look after
  each seed and stop when they like. Wide, or infinite, at few seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from assay.errors import AssayError, did_you_mean

Verdict = Literal["better", "worse", "equivalent", "undecided"]
VERDICTS: tuple[Verdict, ...] = ("better", "worse", "equivalent", "undecided")
BETTER, WORSE, EQUIVALENT, UNDECIDED = range(4)
Interval = tuple[float, float]
Looks = Literal["end", "every"] | tuple[int, ...]

# ---------------------------------------------------------------------------- the design


@dataclass(frozen=True)
class Design:
    """What a comparison declares before it runs.

    `seeds` is the most that will be run. `looks` says at how many of them a verdict may be given:
    end, once, when all are in; every, after each (the anytime-valid interval then decides); or
    some numbers of seeds, the last of which is `seeds` (the level is then spent over them). Scores
    that differ by less than `margin` count as equivalent; 0 never calls two variants equivalent.

    Raises:
        AssayError: if a field is out of its range.
    """

    seeds: int
    looks: Looks = "end"
    margin: float = 0.0
    level: float = 0.95

    def __post_init__(self):
        if self.seeds < 1:
            raise AssayError(f"seeds: found {self.seeds}; at least 1 seed is needed.")
        if not 0 < self.level < 1:
            raise AssayError(f"level: found {self.level}, which must be between 0 and 1.")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise AssayError(f"margin: found {self.margin}, which must be 0 or more.")
        if isinstance(self.looks, str):
            if self.looks not in ("end", "every"):
                raise AssayError(
                    f"looks: found '{self.looks}'; {did_you_mean(self.looks, ['end', 'every'])}"
                )
        elif [*self.looks, self.seeds] != [*sorted({*self.looks}), *self.looks[-1:]]:
            raise AssayError(
                f"looks: found {list(self.looks)}; give growing numbers of seeds, the last being "
                f"all {self.seeds}."
            )

    @property
    def alpha(self) -> float:
        return 1 - self.level

    def planned_looks(self) -> tuple[tuple[int, float], ...]:
        """(seeds, alpha spent) of each planned look; none where every look is allowed."""
        if self.looks == "every":
            return ()
        numbers = (self.seeds,) if self.looks == "end" else self.looks
        numbers = [n for n in numbers if n > 1]  # one seed tells nothing, and needs no alpha
        return tuple(zip(numbers, spend(numbers, self.alpha), strict=True))


def spend(looks: Sequence[int], alpha: float = 0.05) -> tuple[float, ...]:
    """How much of `alpha` each planned look may use: little early, most at the end.

    The increments of Lan and DeMets' (1983) spending function of the O'Brien-Fleming type,
    2 - 2 Phi(z / sqrt(t)) at share t of the seeds, z the normal quantile of 1 - alpha/2. Each
    look's test is held to its own increment, so by the union bound the sum holds exactly for
    t-tests at any number of seeds; the usual boundaries, which use the correlation of looks, are
    a little less strict and exact only for many seeds.
    """
    z = stats.norm.isf(alpha / 2)
    if not looks:
        return ()
    spent = [2 * stats.norm.sf(z / math.sqrt(n / looks[-1])) for n in looks]
    return tuple(float(step) for step in np.diff(spent, prepend=0.0))


# ---------------------------------------------------------------------------- intervals


def mean_interval(x: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval of a mean, planned-n: right at one number of seeds, chosen beforehand.

    Args:
        x: (..., S) values, one a seed.

    Returns:
        (...) low and high; infinite with fewer than 2 seeds.
    """
    mean, error, n = _moments(x)
    if n < 2:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    half = stats.t.isf((1 - level) / 2, n - 1) * error
    return mean - half, mean + half


def planned_p(x: ArrayLike) -> np.ndarray:
    """Two-sided p-value of Student's paired t-test that the mean difference is 0.

    Args:
        x: (..., S) differences, one a seed. Fewer than 2 tell nothing: p = 1.
    """
    mean, error, n = _moments(x)
    if n < 2:
        return np.ones_like(mean)
    return 2 * stats.t.sf(_statistic(mean, error), n - 1)


def anytime_interval(
    x: ArrayLike, level: float = 0.95, *, planned: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """A confidence sequence for the mean of Gaussian values of unknown variance.

    The chance that it misses the mean at any number of seeds, ever, is at most 1 - `level`. It
    holds the means that the e-process of `anytime_e` does not refute:

        |mean - mu| < s / sqrt(n) * sqrt((n - 1) (r - 1) / (1 - r / k)),
        k = 1 + n g,   r = (k / alpha^2)^(1/n)

    and is infinite while r >= k. The mixture's g is the one that makes it narrowest at `planned`
    seeds, a number that must be chosen before the data are seen: any is right, the real one best.

    Args:
        x: (..., S) values, one a seed, in the order that they came.

    Returns:
        (...) low and high.

    Source: Wang and Ramdas, arXiv:2310.03722, "Anytime-valid t-tests and confidence sequences
    for Gaussian means with unknown variance" (the scale-invariant t-test martingale; a Gaussian
    mixture in place of Lai's flat one, 1976), inverted in closed form.
    """
    mean, error, n = _moments(x)
    width = anytime_width(n, level, planned)
    half = np.full_like(mean, np.inf) if math.isinf(width) else width * error
    return mean - half, mean + half


def anytime_p(x: ArrayLike, *, planned: int, level: float = 0.95) -> np.ndarray:
    """An anytime-valid p-value, 1 / `anytime_e`: ever at most a with a chance of at most a."""
    return np.exp(-np.maximum(_log_e(x, _mixture(planned, 1 - level)), 0))


def anytime_e(x: ArrayLike, *, planned: int, level: float = 0.95) -> np.ndarray:
    """The evidence against a mean of 0: a martingale that begins at 1 where the mean is 0.

        e = (1 + n g)^(-1/2) * ((1 + t^2/(n-1)) / (1 + t^2/((n-1)(1 + n g))))^(n/2)

    t is Student's statistic. It is the likelihood ratio of the values' directions alone (their
    scale divided out) with the effect mean/deviation drawn from N(0, g), against an effect of 0.
    By Ville's inequality it ever exceeds 1/a with chance a at most.

    Args:
        x: (..., S) differences, one a seed.

    Source: Gönen et al. (2005), The American Statistician 59(3), for the ratio; Wang and Ramdas,
    arXiv:2310.03722, and Pérez-Ortiz et al., arXiv:2208.07610, for its validity at any time.
    """
    return np.exp(_log_e(x, _mixture(planned, 1 - level)))


def anytime_width(n: int, level: float, planned: int) -> float:
    """Half the anytime-valid interval's width in standard errors; infinite while nothing is told.

    Student's quantile is the planned-n counterpart.
    """
    return _width(n, 1 - level, _mixture(planned, 1 - level)) if n > 1 else math.inf


def _log_e(x: ArrayLike, g: float) -> np.ndarray:
    mean, error, n = _moments(x)
    if n < 2:
        return np.zeros_like(mean)
    k = 1 + n * g
    t2 = np.minimum(_statistic(mean, error) ** 2, 1e300)
    return (n * (np.log1p(t2 / (n - 1)) - np.log1p(t2 / ((n - 1) * k))) - math.log(k)) / 2


def _width(n: int, alpha: float, g: float) -> float:
    k = 1 + n * g
    r = math.exp((math.log(k) - 2 * math.log(alpha)) / n)
    return math.sqrt((n - 1) * (r - 1) / (1 - r / k)) if r < k else math.inf


@lru_cache
def _mixture(planned: int, alpha: float) -> float:
    """The g that makes the anytime-valid interval narrowest at `planned` seeds."""
    n = max(planned, 2)
    # Finite from k > alpha^(-2/(n-1)) on; the width then falls and rises again.
    least = math.log((alpha ** (-2 / (n - 1)) - 1) / n)
    best = optimize.minimize_scalar(
        lambda log_g: _width(n, alpha, math.exp(log_g)),
        bounds=(least + 1e-6, least + 12),
        method="bounded",
    )
    return math.exp(best.x)


def _moments(x: ArrayLike) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and its standard error over the last axis, and that axis's length."""
    x = np.asarray(x, float)
    n = x.shape[-1]
    if n == 0:
        nothing = np.full(x.shape[:-1], np.nan)
        return nothing, nothing, 0
    mean = x.mean(-1)
    error = x.std(-1, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, np.nan)
    # Equal values have a deviation of rounding errors only; it must not become evidence.
    return mean, np.where(np.ptp(x, axis=-1) == 0, 0.0, error), n


def _statistic(mean: np.ndarray, error: np.ndarray) -> np.ndarray:
    """|t|; 0 for equal scores throughout, infinite for one and the same difference."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, np.abs(mean) / error)


# ---------------------------------------------------------------------------- many comparisons


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's (1979) adjusted p-values over the last axis.

    Those below a are wrong in at most a of all experiments, however the tests depend. SciPy has
    no such correction (its `false_discovery_control` is of another rate).
    """
    p = np.asarray(p, float)
    m = p.shape[-1]
    order = np.argsort(p, axis=-1)
    stepped = np.take_along_axis(p, order, -1) * np.arange(m, 0, -1)
    stepped = np.minimum(np.maximum.accumulate(stepped, axis=-1), 1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, stepped, -1)
    return adjusted


@dataclass(frozen=True)
class Judgement:
    """Of P pairs of differences: (..., P) arrays.

    `verdict` are places in VERDICTS. `low`, `high` are simultaneous: all P cover their truths
    together in at least `level` of experiments, at every allowed look. `p_adjusted` at most
    1 - `level` calls a difference; `decided` is the number of seeds at which the verdict fell, 0
    where it has not.
    """

    verdict: np.ndarray
    p_adjusted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    decided: np.ndarray


def judge(differences: ArrayLike, design: Design) -> Judgement:
    """Verdicts on differences a - b of losses, as far as the design lets them be given.

    Different are those whose p-value is small after Holm's correction. Equivalent, before that,
    those whose simultaneous interval lies within the margin: two one-sided tests (Schuirmann,
    1987), at half the error that each might have. The first look that decides a pair stands.
    Seeds beyond the plan change no planned verdict; before the first planned look none is given,
    and `p_adjusted`, `low` and `high` are those that such a look would give.

    Args:
        differences: (..., P, S), one a seed, in the order of the plan.
    """
    x = np.asarray(differences, float)
    pairs, n = x.shape[-2:]
    shape = x.shape[:-1]
    verdict = np.full(shape, UNDECIDED)
    decided = np.zeros(shape, int)
    share = design.alpha / pairs
    if design.looks == "every":
        p = holm(anytime_p(x, planned=design.seeds, level=1 - share))
        low, high = anytime_interval(x, 1 - share, planned=design.seeds)
        verdict = _verdicts(x.mean(-1), p, design.alpha, low, high, design.margin)
        decided = np.where(verdict != UNDECIDED, n, 0)
        return Judgement(verdict, p, low, high, decided)
    p_adjusted = np.ones(shape)
    low, high = np.full(shape, -np.inf), np.full(shape, np.inf)
    looks = [look for look in design.planned_looks() if look[0] <= n]
    early = not looks
    for seeds, alpha in looks or [(n, design.alpha)]:
        seen = x[..., :seeds]
        p = holm(planned_p(seen))
        look_low, look_high = mean_interval(seen, 1 - alpha / pairs)
        # Looks that contradict each other (in 1 - level of experiments at most): the last holds.
        apart = (np.maximum(low, look_low) > np.minimum(high, look_high)) | early
        low = np.where(apart, look_low, np.maximum(low, look_low))
        high = np.where(apart, look_high, np.minimum(high, look_high))
        p_adjusted = np.minimum(p_adjusted, p * (design.alpha / alpha))
        if early:
            break
        found = _verdicts(seen.mean(-1), p, alpha, look_low, look_high, design.margin)
        new = (verdict == UNDECIDED) & (found != UNDECIDED)
        verdict, decided = np.where(new, found, verdict), np.where(new, seeds, decided)
    return Judgement(verdict, p_adjusted, low, high, decided)


def _verdicts(mean, p, alpha, low, high, margin) -> np.ndarray:
    within = (low > -margin) & (high < margin)
    different = np.where(mean < 0, BETTER, WORSE)
    return np.where(within, EQUIVALENT, np.where(p <= alpha, different, UNDECIDED))


# ---------------------------------------------------------------------------- how many seeds


def power(
    difference: float, deviation: float, seeds: int, *, alpha: float = 0.05, comparisons: int = 1
) -> float:
    """The chance that a paired t-test at `seeds` seeds calls a true `difference`.

    By the noncentral t distribution. `deviation` is that of the differences between two variants
    of one seed. With many comparisons each is held to alpha / comparisons, which is what Holm's
    correction asks of the first.
    """
    if seeds < 2:
        return 0.0
    if deviation == 0:
        return float(difference != 0)
    quantile = stats.t.isf(alpha / comparisons / 2, seeds - 1)
    shift = abs(difference) / deviation * math.sqrt(seeds)
    t = stats.nct(seeds - 1, shift)
    wrong_way = np.nan_to_num(t.cdf(-quantile))  # below 1e-10 SciPy's series may give nan
    return float(min(t.sf(quantile) + wrong_way, 1))


def seeds_needed(
    difference: float,
    deviation: float,
    *,
    alpha: float = 0.05,
    chance: float = 0.8,
    comparisons: int = 1,
    most: int = 100_000,
) -> int | None:
    """The fewest planned seeds that call a true `difference` with a `chance`; None beyond `most`.

    Said of a difference that was itself measured, it is an estimate, and a rough one at few seeds.
    """
    if difference == 0 or not math.isfinite(deviation):
        return None

    def enough(seeds: int) -> bool:
        return power(difference, deviation, seeds, alpha=alpha, comparisons=comparisons) >= chance

    return _first(enough, most)


def seeds_needed_for_equivalence(
    margin: float,
    deviation: float,
    *,
    alpha: float = 0.05,
    chance: float = 0.8,
    comparisons: int = 1,
    most: int = 100_000,
) -> int | None:
    """The fewest planned seeds that call two equal variants equivalent, with a `chance`.

    The planned-n interval must lie within the margin. Of its two ways to fail each has half of
    1 - chance; their overlap is left out, so this is at most a seed too many.
    """
    if margin == 0 or not math.isfinite(deviation):
        return None
    if deviation == 0:
        return 2

    def enough(seeds: int) -> bool:
        quantile = stats.t.isf(alpha / comparisons / 2, seeds - 1)
        shift = margin / deviation * math.sqrt(seeds)
        return stats.nct(seeds - 1, shift).sf(quantile) >= (1 + chance) / 2

    return _first(enough, most)


def seeds_needed_anytime(
    difference: float, deviation: float, *, planned: int, level: float = 0.95, most: int = 100_000
) -> int | None:
    """How many seeds bring the anytime-valid interval off 0, if both figures stay as they are."""
    if difference == 0 or not math.isfinite(deviation):
        return None

    def enough(seeds: int) -> bool:
        return anytime_width(seeds, level, planned) * deviation < abs(difference) * seeds**0.5

    return _first(enough, most)


def smallest_difference(
    seeds: int,
    deviation: float,
    *,
    alpha: float = 0.05,
    chance: float = 0.8,
    comparisons: int = 1,
) -> float:
    """The smallest true difference that `seeds` planned seeds call with a `chance`.

    Infinite with fewer than 2 seeds.
    """
    if seeds < 2:
        return math.inf
    if deviation == 0:
        return 0.0
    quantile = stats.t.isf(alpha / comparisons / 2, seeds - 1)

    def short(shift: float) -> float:
        difference = shift / math.sqrt(seeds)
        return power(difference, 1.0, seeds, alpha=alpha, comparisons=comparisons) - chance

    shift = optimize.brentq(short, 0, 31 + 2 * quantile, xtol=1e-9)
    return shift * deviation / math.sqrt(seeds)


def deviation_interval(deviation: float, seeds: int, level: float = 0.95) -> Interval:
    """The chi-squared interval of a standard deviation that was estimated from `seeds` values.

    A pilot's deviation is a rough figure: from 3 seeds the true one may be 6 times as large.
    """
    if seeds < 2:
        return 0.0, math.inf
    freedom = seeds - 1
    tail = (1 - level) / 2
    low = deviation * math.sqrt(freedom / stats.chi2.isf(tail, freedom))
    return low, deviation * math.sqrt(freedom / stats.chi2.ppf(tail, freedom))


def _first(enough, most: int) -> int | None:
    """The least number from 2 to `most` that is enough, where all above it are."""
    high = 2
    while not enough(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# ---------------------------------------------------------------------------- pairs of variants


@dataclass(frozen=True)
class Pair:
    """a against b: `difference` is a's loss less b's, so a negative one speaks for a.

    `seeds` counts the seeds that both have. `ci95` is planned-n and of this pair alone,
    `anytime95` anytime-valid and of this pair alone; `simultaneous95` is right for all pairs
    together, and what the verdict goes by. (Their level is the design's.) `p` is the plain paired
    t-test's. `seeds_needed` planned ones, in all, would call this difference, were it the true
    one, with a chance of 0.8; `seeds_needed_anytime` would bring the anytime-valid interval off 0
    (None: out of reach). `smallest_difference` is what all planned seeds can show.
    """

    a: str
    b: str
    seeds: int
    difference: float
    deviation: float
    ci95: Interval
    anytime95: Interval
    simultaneous95: Interval
    p: float
    p_adjusted: float
    verdict: Verdict
    reason: str
    seeds_needed: int | None
    seeds_needed_anytime: int | None
    smallest_difference: float


def compare_pairs(
    values: Mapping[str, ArrayLike],
    pairs: Sequence[tuple[str, str]],
    *,
    planned: int,
    looks: Looks = "end",
    margin: float = 0.0,
    level: float = 0.95,
) -> tuple[Pair, ...]:
    """Judges pairs of variants by their losses, paired by seed.

    The pairs must be chosen before the values are seen: all of them (`all_pairs`), or each variant
    against one that was named beforehand, never against the best of these very values.

    Args:
        values: for each variant its S losses, one a seed, in the plan's order of seeds; nan where
            a run is not finished, or diverged. A verdict needs all of a look's seeds: leaving out
            what diverged would flatter the variant that does.
        planned, looks, margin, level: see `Design`.

    Raises:
        AssayError: if lists differ in length, a pair names no variant, or the design is not legal.
    """
    design = Design(planned, looks, margin, level)
    arrays = {name: np.asarray(x, float) for name, x in values.items()}
    lengths = {len(x) for x in arrays.values()}
    if len(lengths) > 1:
        raise AssayError(
            f"values: found lists of {sorted(lengths)} losses; every variant needs one for each "
            f"seed, nan where there is none."
        )
    for name in (name for pair in pairs for name in pair):
        if name not in arrays:
            raise AssayError(f"pairs: found '{name}'; {did_you_mean(name, arrays)}")
    if not pairs:
        return ()
    with np.errstate(invalid="ignore"):  # inf - inf is nan, as it should be
        differences = np.array([arrays[a] - arrays[b] for a, b in pairs])
    there = np.isfinite(differences)
    # All pairs are judged at one number of seeds: those that every variant has, from the first.
    common = len(there[0]) if there.all() else int(np.argmin(there.all(0)))
    judgement = judge(differences[:, :common], design)
    return tuple(
        _pair(a, b, differences[i][there[i]], judgement, i, common, design)
        for i, (a, b) in enumerate(pairs)
    )


def all_pairs(names: Sequence[str], base: str | None = None) -> list[tuple[str, str]]:
    """Every two of `names`; with a `base`, each other one against it.

    Raises:
        AssayError: if the base is not among them.
    """
    if base is None:
        return list(combinations(names, 2))
    if base not in names:
        raise AssayError(f"base: found '{base}'; {did_you_mean(base, names)}")
    return [(name, base) for name in names if name != base]


def _pair(
    a: str, b: str, x: np.ndarray, judgement: Judgement, i: int, common: int, design: Design
) -> Pair:
    n, family = len(x), judgement.verdict.shape[-1]
    difference = float(x.mean()) if n else math.nan
    deviation = float(x.std(ddof=1)) if n > 1 else math.nan
    held = {"alpha": design.alpha, "comparisons": family}
    verdict = VERDICTS[judgement.verdict[i]]
    return Pair(
        a=a,
        b=b,
        seeds=n,
        difference=difference,
        deviation=deviation,
        ci95=_interval(mean_interval(x, design.level)),
        anytime95=_interval(anytime_interval(x, design.level, planned=design.seeds)),
        simultaneous95=_interval((judgement.low[i], judgement.high[i])),
        p=float(planned_p(x)) if n else 1.0,
        p_adjusted=float(judgement.p_adjusted[i]),
        verdict=verdict,
        reason=_reason(verdict, int(judgement.decided[i]), common, family, design),
        seeds_needed=seeds_needed(difference, deviation, **held) if n > 1 else None,
        seeds_needed_anytime=(
            seeds_needed_anytime(
                difference, deviation, planned=design.seeds, level=1 - design.alpha / family
            )
            if n > 1
            else None
        ),
        smallest_difference=(
            smallest_difference(design.seeds, deviation, **held) if n > 1 else math.inf
        ),
    )


def _reason(verdict: Verdict, decided: int, common: int, family: int, design: Design) -> str:
    if verdict != "undecided":
        name = "anytime-valid" if design.looks == "every" else "planned-n"
        corrected = f", corrected for {family} comparisons" if family > 1 else ""
        return f"by the {name} interval at {decided} seeds{corrected}"
    if design.seeds < 2 or (design.looks == "every" and common < 2):
        return "nothing can be told from fewer than 2 seeds"
    if design.looks == "every":
        return f"no difference could be told with {common} seeds, looking at any time"
    first = design.planned_looks()[0][0]
    if common < first:
        return f"{common} of the {first} seeds are in that the plan looks at first"
    if common < design.seeds:
        return f"no difference could be told with the first {common} of {design.seeds} seeds"
    return f"no difference could be told with {design.seeds} seeds"


def rank_ranges(names: Sequence[str], pairs: Sequence[Pair]) -> dict[str, tuple[int, int]]:
    """The best and the worst rank that the verdicts leave to each variant, 1 the best.

    All ranges hold together in at least `level` of experiments, since the verdicts do.
    """
    better = {(p.a, p.b) for p in pairs if p.verdict == "better"}
    better |= {(p.b, p.a) for p in pairs if p.verdict == "worse"}
    return {
        name: (
            1 + sum((other, name) in better for other in names),
            len(names) - sum((name, other) in better for other in names),
        )
        for name in names
    }


def probability_best(values: ArrayLike, *, draws: int = 20_000, seed: int = 0) -> np.ndarray:
    """The probability that each variant's true mean is the lowest.

    From the posterior of the two-way layout, score = variant + seed + error, errors Gaussian of
    one unknown variance, flat priors (Box and Tiao, 1973, section 2.11): the means less the
    seeds' part are t distributed about the measured ones. Not a test: it is no smaller for many
    variants, and it is not valid at every look.

    Args:
        values: (variants, S); seeds that any variant lacks are left out.

    Returns:
        (variants,) probabilities that sum to 1; nan with fewer than 2 whole seeds.
    """
    values = np.asarray(values, float)
    variants = len(values)
    if variants == 1:
        return np.ones(1)
    values = values[:, ~np.isnan(values).any(0)]
    n = values.shape[1]
    if n < 2:
        return np.full(variants, np.nan)
    means = values.mean(1)
    rest = values - means[:, None] - values.mean(0) + values.mean()
    freedom = (n - 1) * (variants - 1)
    random = np.random.default_rng(seed)
    scale = np.sqrt((rest**2).sum() / random.chisquare(freedom, draws) / n)
    drawn = means + scale[:, None] * random.standard_normal((draws, variants))
    return np.bincount(drawn.argmin(1), minlength=variants) / draws


def _interval(bounds: tuple[np.ndarray, np.ndarray]) -> Interval:
    low, high = (float(x) for x in bounds)
    return (-math.inf, math.inf) if math.isnan(low) or math.isnan(high) else (low, high)
