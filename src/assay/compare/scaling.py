"""Scaling laws: the loss as a function of size and data, fitted to runs and carried to a budget.

    L(N, D) = E + A / N^alpha + B / D^beta            (Hoffmann et al., arXiv:2203.15556, eq. 2)

N parameters, D training tokens, C training FLOPs, L loss (nats a token or bits a byte: E, A and B
are in its unit). A fit is plain data; its uncertainty is a bootstrap over runs. What no bootstrap
shows is whether the law still holds where nothing was measured: intervals at a far budget are of
the fit, given the form.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from assay.compare.statistics import Interval
from assay.errors import AssayError

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""C = 6 N D, the usual count of training; a ladder's own is `flops_factor` of its runs."""

# ---------------------------------------------------------------------------- the law in N and D


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        n, d = np.asarray(params, float), np.asarray(tokens, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def optimum(
        self, flops: ArrayLike, factor: float = FLOPS_PER_PARAMETER_AND_TOKEN
    ) -> tuple[np.ndarray, np.ndarray]:
        """The N and D of least loss where factor x N x D = `flops` (Hoffmann et al., eq. 4).

        Where one of the two terms is absent (its coefficient or exponent is 0) there is none: nan.
        """
        c = np.asarray(flops, float) / factor
        a, b = self.alpha, self.beta
        if min(a, b, self.A, self.B) <= 0:
            return np.full_like(c, np.nan), np.full_like(c, np.nan)
        scale = (a * self.A / (b * self.B)) ** (1 / (a + b))
        n = scale * c ** (b / (a + b))
        return n, c / n

    @property
    def params_exponent(self) -> float:
        """a in N_opt ~ C^a; D's is 1 - a."""
        total = self.alpha + self.beta
        return self.beta / total if total else math.nan


@dataclass(frozen=True)
class PowerLaw:
    """L(C) = E + A / C^alpha: for a ladder along which N and D grow together."""

    E: float
    A: float
    alpha: float

    def loss(self, flops: ArrayLike) -> np.ndarray:
        return self.E + self.A * np.asarray(flops, float) ** -self.alpha


STARTING_EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)
POLISHED_STARTS = 4


def fit_chinchilla(
    params: ArrayLike, tokens: ArrayLike, losses: ArrayLike, *, delta: float = 1e-3
) -> ChinchillaLaw:
    """The law of least Huber loss between the logarithms of measured and predicted losses.

    As Hoffmann et al., appendix D.3: Huber with delta 1e-3 of log L - logsumexp(a - alpha log N,
    b - beta log D, e), a = log A and so on, by BFGS from a grid of starts. Here the grid is of the
    two exponents only: given them the law is linear in E, A and B, so each start takes the best
    non-negative ones (relative errors, `scipy.optimize.nnls`), and the best few starts are
    polished.

    Args:
        params, tokens, losses: (R,) of R runs, all positive.

    Raises:
        AssayError: with fewer than 5 different (N, D), or if N or D is the same in all runs, or
            each a fixed power of the other: the law's five numbers are then not determined.
    """
    n, d, y = _runs(params=params, tokens=tokens, losses=losses)
    places = {*zip(n.tolist(), d.tolist(), strict=True)}
    if len(places) < 5:
        raise AssayError(
            f"params, tokens: found {len(places)} different pairs of them; the law has five "
            f"numbers and needs at least 5."
        )
    if not independent(n, d):
        raise AssayError(
            "params, tokens: they grow together in these runs, so what each is worth cannot be "
            "told; vary one at the same value of the other, or fit a law in FLOPs."
        )
    starts = _starts(n, d, y, [(a, b) for a in STARTING_EXPONENTS for b in STARTING_EXPONENTS])
    found = [_polish(n, d, y, start, delta) for start in starts[:POLISHED_STARTS]]
    return _chinchilla(min(found, key=_value).x)


def independent(params: ArrayLike, tokens: ArrayLike) -> bool:
    """Whether N and D vary enough beside each other that a law can tell their parts."""
    x = np.log(np.array([params, tokens], float))
    x = x - x.mean(1, keepdims=True)
    spread = np.sqrt((x**2).mean(1))
    if spread.min() < 0.05:  # one of them hardly varies
        return False
    return abs((x[0] * x[1]).mean() / spread.prod()) < 0.995


def _starts(n, d, y, exponents) -> list[np.ndarray]:
    """(e, a, b, alpha, beta) of each pair of exponents, the best first."""
    return _ranked(y, [((alpha, beta), (n**-alpha, d**-beta)) for alpha, beta in exponents])


def _ranked(y: np.ndarray, candidates) -> list[np.ndarray]:
    """For (exponents, columns): the logarithms of the best coefficients, then the exponents.

    A coefficient of 0 would have no gradient in its logarithm, so each begins with at least a
    hundredth of the loss.
    """
    scored = []
    for exponents, columns in candidates:
        basis = np.stack([np.ones_like(y), *columns], 1)
        scale = basis.max(0)
        found, residual = optimize.nnls(basis / scale / y[:, None], np.ones_like(y))
        coefficients = np.maximum(found, 0.01 * y.min()) / scale
        scored.append((residual, [*np.log(coefficients), *exponents]))
    scored.sort(key=lambda entry: entry[0])
    return [np.array(start) for _, start in scored]


def _polish(n, d, y, start, delta):
    return _minimise([np.log(n), np.log(d)], np.log(y), start, delta)


def _minimise(logs: list[np.ndarray], log_y: np.ndarray, start: np.ndarray, delta: float):
    """BFGS on the Huber loss of log(e^x0 + sum_i e^(x_i - exponent_i logs_i)) - log_y."""
    terms = len(logs)
    level = np.zeros_like(log_y)

    def objective(x):
        parts = np.stack(
            [x[0] + level, *(x[1 + i] - x[1 + terms + i] * logs[i] for i in range(terms))]
        )
        predicted = np.logaddexp.reduce(parts, axis=0)
        rest = predicted - log_y
        # Divided by delta, so that BFGS sees numbers near 1.
        value = special.huber(delta, rest).sum() / delta
        slope = np.clip(rest, -delta, delta) / delta * np.exp(parts - predicted)
        exponents = [-(slope[1 + i] @ logs[i]) for i in range(terms)]
        return value, np.array([*slope.sum(1), *exponents])

    return optimize.minimize(objective, start, jac=True, method="BFGS", options={"maxiter": 300})


def _value(result) -> float:
    return result.fun if np.isfinite(result.fun) else math.inf


def _chinchilla(x) -> ChinchillaLaw:
    e, a, b, alpha, beta = (float(v) for v in x)
    return ChinchillaLaw(E=math.exp(e), A=math.exp(a), B=math.exp(b), alpha=alpha, beta=beta)


def fit_power_law(flops: ArrayLike, losses: ArrayLike, *, delta: float = 1e-3) -> PowerLaw:
    """L(C) = E + A / C^alpha, fitted as `fit_chinchilla` does.

    Raises:
        AssayError: with fewer than 3 different budgets.
    """
    c, y = _runs(flops=flops, losses=losses)
    if len({*c.tolist()}) < 3:
        raise AssayError(
            f"flops: found {len({*c.tolist()})} different budgets; the law has three numbers and "
            f"needs at least 3."
        )
    centre = math.exp(np.log(c).mean())  # so that A is no number of 1e12
    x = c / centre
    starts = _ranked(y, [((alpha,), (x**-alpha,)) for alpha in (0.02, *STARTING_EXPONENTS)])
    found = [_minimise([np.log(x)], np.log(y), start, delta) for start in starts[:2]]
    e, a, alpha = (float(v) for v in min(found, key=_value).x)
    return PowerLaw(E=math.exp(e), A=math.exp(a) * centre**alpha, alpha=alpha)


# ---------------------------------------------------------------------------- IsoFLOP parabolas


@dataclass(frozen=True)
class Parabola:
    """One budget's runs: the least of L as a parabola in ln N.

    `inside` says whether the least lies between the smallest and the largest model measured; one
    outside is an extrapolation and no measurement.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    curvature: float
    inside: bool
    runs: int


@dataclass(frozen=True)
class IsoFlops:
    """N_opt = G C^a and D_opt = H C^b through the parabolas' minima (a + b = 1 if C = k N D)."""

    parabolas: tuple[Parabola, ...]
    params_exponent: float
    tokens_exponent: float
    params_coefficient: float
    tokens_coefficient: float

    def optimum(self, flops: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        c = np.asarray(flops, float)
        return (
            self.params_coefficient * c**self.params_exponent,
            self.tokens_coefficient * c**self.tokens_exponent,
        )


def fit_isoflops(
    params: ArrayLike,
    tokens: ArrayLike,
    flops: ArrayLike,
    losses: ArrayLike,
    *,
    tolerance: float = 0.1,
) -> IsoFlops:
    """Approach 2 of Hoffmann et al.: a parabola of L in ln N at each budget, a line through minima.

    Runs are of one budget if their FLOPs differ by less than `tolerance` of them. Budgets with
    fewer than 3 sizes, a parabola that opens downwards, or a least that lies outside of what was
    measured are left out of the line.

    Raises:
        AssayError: if fewer than two budgets remain.
    """
    n, d, c, y = _runs(params=params, tokens=tokens, flops=flops, losses=losses)
    parabolas = []
    for group in _budgets(c, tolerance):
        sizes, drawn = np.log(n[group]), y[group]
        if len({*n[group].tolist()}) < 3:
            continue
        centre = sizes.mean()
        square, line, level = np.polyfit(sizes - centre, drawn, 2)
        if square <= 0:
            continue
        least = -line / (2 * square)
        size = math.exp(least + centre)
        budget = math.exp(np.log(c[group]).mean())
        per_token = math.exp((np.log(c[group] / (n[group] * d[group]))).mean())
        parabolas.append(
            Parabola(
                flops=budget,
                params=size,
                tokens=budget / (per_token * size),
                loss=float(level - line**2 / (4 * square)),
                curvature=float(square),
                inside=bool(n[group].min() <= size <= n[group].max()),
                runs=int(group.sum()),
            )
        )
    used = [p for p in parabolas if p.inside]
    if len({p.flops for p in used}) < 2:
        raise AssayError(
            f"flops: found {len(used)} budgets whose runs show a least loss between the smallest "
            f"and the largest model; a line through them needs 2, of at least 3 sizes each."
        )
    log_c = np.log([p.flops for p in used])
    a, log_g = np.polyfit(log_c, np.log([p.params for p in used]), 1)
    b, log_h = np.polyfit(log_c, np.log([p.tokens for p in used]), 1)
    return IsoFlops(tuple(parabolas), float(a), float(b), math.exp(log_g), math.exp(log_h))


def _budgets(flops: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """Masks of the runs of one budget each, growing."""
    order = np.argsort(flops)
    masks, start = [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or flops[order[i]] > flops[order[start]] * (1 + tolerance):
            mask = np.zeros(len(flops), bool)
            mask[order[start:i]] = True
            masks.append(mask)
            start = i
    return masks


# ---------------------------------------------------------------------------- a ladder of runs


@dataclass(frozen=True)
class Ladder:
    """The runs of one variant at several sizes or budgets: (R,) each, `seeds` for resampling."""

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    losses: np.ndarray
    seeds: np.ndarray

    @classmethod
    def of(
        cls,
        params: ArrayLike,
        tokens: ArrayLike,
        flops: ArrayLike,
        losses: ArrayLike,
        seeds: ArrayLike | None = None,
    ) -> "Ladder":
        n, d, c, y = _runs(params=params, tokens=tokens, flops=flops, losses=losses)
        return cls(n, d, c, y, np.zeros(len(n), int) if seeds is None else np.asarray(seeds))

    def take(self, chosen: np.ndarray) -> "Ladder":
        return Ladder(
            self.params[chosen],
            self.tokens[chosen],
            self.flops[chosen],
            self.losses[chosen],
            self.seeds[chosen],
        )

    @property
    def flops_factor(self) -> float:
        """FLOPs for each parameter and token: about 6, more where attention or the head weigh."""
        return float(np.exp(np.log(self.flops / (self.params * self.tokens)).mean()))


@dataclass(frozen=True)
class LadderFit:
    """A ladder's law, and what it says at any budget.

    `law` is Chinchilla's where N and D vary beside each other, else a power law in C: the
    ladder's own way of growing is then part of it. `draws` are fits of resampled runs.
    """

    law: ChinchillaLaw | PowerLaw
    draws: tuple[ChinchillaLaw | PowerLaw, ...]
    flops_factor: float

    def predict(self, flops: float, level: float = 0.95) -> tuple[float, Interval]:
        """The loss at a budget (by Chinchilla's law at its own best N and D), with its interval."""
        drawn = [self._at(law, flops) for law in self.draws]
        return self._at(self.law, flops), _percentiles(drawn, level)

    def _at(self, law: ChinchillaLaw | PowerLaw, flops: float) -> float:
        if isinstance(law, PowerLaw):
            return float(law.loss(flops))
        n, d = law.optimum(flops, self.flops_factor)
        return float(law.loss(n, d))

    def parameters(self, level: float = 0.95) -> dict[str, tuple[float, Interval]]:
        """Each of the law's numbers with its bootstrap interval."""
        return {
            name: (value, _percentiles([getattr(law, name) for law in self.draws], level))
            for name, value in vars(self.law).items()
        }


def fit_ladder(ladder: Ladder, *, resamples: int = 200, seed: int = 0) -> LadderFit:
    """Fits the law that a ladder can determine, and again to each of `resamples` resampled ones.

    Raises:
        AssayError: if the ladder has fewer than 3 budgets.
    """
    law = _fit(ladder)
    random = np.random.default_rng(seed)
    draws = [_refit(ladder.take(chosen), law) for chosen in _resampled(ladder, random, resamples)]
    return LadderFit(law, tuple(draw for draw in draws if draw is not None), ladder.flops_factor)


Form = Literal["chinchilla", "power"]


def form_of(params: ArrayLike, tokens: ArrayLike, flops: ArrayLike) -> Form | None:
    """The law that runs at these places can determine; None where there are too few budgets."""
    places = {*zip(np.asarray(params).tolist(), np.asarray(tokens).tolist(), strict=True)}
    if len(places) >= 6 and independent(params, tokens):
        return "chinchilla"
    return "power" if len({*np.asarray(flops).tolist()}) >= 3 else None


def _fit(ladder: Ladder) -> ChinchillaLaw | PowerLaw:
    if form_of(ladder.params, ladder.tokens, ladder.flops) == "chinchilla":
        return fit_chinchilla(ladder.params, ladder.tokens, ladder.losses)
    return fit_power_law(ladder.flops, ladder.losses)


@dataclass(frozen=True)
class Scope:
    """What a ladder can show, known before any of it is run.

    `form` of its law, and `held_out_form` of the one that its `largest` budget is predicted by;
    `isoflops`: the budgets with three sizes or more, each a parabola.
    """

    form: Form | None
    held_out_form: Form | None
    largest: float
    isoflops: tuple[float, ...]


def scope_of(
    params: ArrayLike, tokens: ArrayLike, flops: ArrayLike, *, tolerance: float = 0.1
) -> Scope:
    """What runs of these sizes, tokens and FLOPs will allow, whatever their losses."""
    n, d, c = _runs(params=params, tokens=tokens, flops=flops)
    rest = ~_largest(c, tolerance)
    return Scope(
        form=form_of(n, d, c),
        held_out_form=form_of(n[rest], d[rest], c[rest]) if rest.any() else None,
        largest=float(c.max()),
        isoflops=tuple(
            float(c[group].mean())
            for group in _budgets(c, tolerance)
            if len({*n[group].tolist()}) >= 3
        ),
    )


def _refit(ladder: Ladder, law: ChinchillaLaw | PowerLaw) -> ChinchillaLaw | PowerLaw | None:
    """The same form again, beginning at the first fit; None where the resample cannot bear it."""
    if isinstance(law, PowerLaw):
        if len({*ladder.flops.tolist()}) < 3:
            return None
        return fit_power_law(ladder.flops, ladder.losses)
    places = {*zip(ladder.params.tolist(), ladder.tokens.tolist(), strict=True)}
    if len(places) < 5 or not independent(ladder.params, ladder.tokens):
        return None
    n, d, y = ladder.params, ladder.tokens, ladder.losses
    near = [(law.alpha * s, law.beta * t) for s in (0.8, 1, 1.25) for t in (0.8, 1, 1.25)]
    first = np.array([math.log(law.E), math.log(law.A), math.log(law.B), law.alpha, law.beta])
    starts = [first, *_starts(n, d, y, near)[:1]]
    return _chinchilla(min((_polish(n, d, y, x, 1e-3) for x in starts), key=_value).x)


def _resampled(ladder: Ladder, random: np.random.Generator, resamples: int) -> list[np.ndarray]:
    """Places of runs, drawn with replacement.

    Where every rung has several seeds they are drawn within each, so that no rung is lost; where
    it has one run, over all runs.
    """
    rungs: dict[tuple[float, float], list[int]] = {}
    for i, rung in enumerate(zip(ladder.params, ladder.tokens, strict=True)):
        rungs.setdefault(rung, []).append(i)
    if min(len(members) for members in rungs.values()) > 1:
        groups = [np.array(members) for members in rungs.values()]
        return [
            np.concatenate([random.choice(group, len(group)) for group in groups])
            for _ in range(resamples)
        ]
    return [random.integers(len(ladder.losses), size=len(ladder.losses)) for _ in range(resamples)]


# ---------------------------------------------------------------------------- held out


@dataclass(frozen=True)
class HeldOut:
    """The largest budget's runs, predicted from all smaller ones.

    `miss` is predicted less measured; `inside` whether the measured mean is within the interval.
    """

    flops: float
    params: float
    tokens: float
    measured: float
    predicted: float
    ci95: Interval
    miss: float
    relative_miss: float
    inside: bool
    runs: int


def predict_largest(
    ladder: Ladder, *, tolerance: float = 0.1, resamples: int = 200, seed: int = 0
) -> HeldOut:
    """Leaves out the runs of the largest budget, fits the rest, and predicts what was left out.

    By Chinchilla's law at the left-out runs' own N and D.

    Raises:
        AssayError: if the rest is too small to fit.
    """
    largest = _largest(ladder.flops, tolerance)
    rest, left_out = ladder.take(~largest), ladder.take(largest)
    fit = fit_ladder(rest, resamples=resamples, seed=seed)

    def at(law: ChinchillaLaw | PowerLaw) -> float:
        if isinstance(law, PowerLaw):
            return float(law.loss(left_out.flops).mean())
        return float(law.loss(left_out.params, left_out.tokens).mean())

    measured, predicted = float(left_out.losses.mean()), at(fit.law)
    low, high = _percentiles([at(law) for law in fit.draws])
    return HeldOut(
        flops=float(np.exp(np.log(left_out.flops).mean())),
        params=float(left_out.params.mean()),
        tokens=float(left_out.tokens.mean()),
        measured=measured,
        predicted=predicted,
        ci95=(low, high),
        miss=predicted - measured,
        relative_miss=(predicted - measured) / measured,
        inside=bool(low <= measured <= high),
        runs=len(left_out.losses),
    )


def _largest(flops: np.ndarray, tolerance: float) -> np.ndarray:
    """Which runs are of the largest budget."""
    return flops > flops.max() / (1 + tolerance)


# ---------------------------------------------------------------------------- the decision


@dataclass(frozen=True)
class Outlook:
    """Variants at the budget that is meant to be spent.

    `predicted` and `ci95` by name; `best` the probability that a variant is the best there.
    `winner_then` is the one of least predicted loss, `winner_now` the one at the largest budget
    that all have measured, by the same fits. `flip` is the probability that these two budgets
    have different winners; `ranks_flip` that any two variants change places between them.
    """

    flops: float
    measured_flops: float
    predicted: dict[str, float]
    ci95: dict[str, Interval]
    best: dict[str, float]
    winner_now: str
    winner_then: str
    flip: float
    ranks_flip: float


def outlook(
    ladders: Mapping[str, Ladder],
    target_flops: float,
    *,
    resamples: int = 200,
    seed: int = 0,
    fits: Mapping[str, LadderFit] | None = None,
) -> Outlook:
    """Ranks variants at `target_flops` by their fits; says how likely ranks flip on the way.

    Each draw resamples every variant's runs and fits anew; with `fits`, their own draws are taken.
    Probabilities are shares of the draws. They are of the fits, given that the law holds so far.

    Raises:
        AssayError: if a ladder cannot be fitted.
    """
    if not ladders:
        raise AssayError("ladders: found none; give at least one variant's.")
    names = list(ladders)
    if fits is None:
        fits = {
            name: fit_ladder(ladder, resamples=resamples, seed=seed)
            for name, ladder in ladders.items()
        }
    now = min(float(ladder.flops.max()) for ladder in ladders.values())
    draws = min(len(fits[name].draws) for name in names)

    def at(flops: float) -> np.ndarray:
        return np.array(
            [[fits[n]._at(law, flops) for law in fits[n].draws[:draws]] for n in names]
        ).reshape(len(names), draws)

    here, there = at(now), at(target_flops)
    usable = np.isfinite(here).all(0) & np.isfinite(there).all(0)
    here, there = here[:, usable], there[:, usable]
    point_now = {n: fits[n]._at(fits[n].law, now) for n in names}
    point_then = {n: fits[n]._at(fits[n].law, target_flops) for n in names}
    winners = there.argmin(0)
    share = np.bincount(winners, minlength=len(names)) / max(len(winners), 1)
    flips = here.argmin(0) != winners
    ranks = (here.argsort(0) != there.argsort(0)).any(0)
    return Outlook(
        flops=float(target_flops),
        measured_flops=now,
        predicted=point_then,
        ci95={n: _percentiles(row) for n, row in zip(names, there, strict=True)},
        best={n: float(p) for n, p in zip(names, share, strict=True)},
        winner_now=min(point_now, key=point_now.get),
        winner_then=min(point_then, key=point_then.get),
        flip=float(flips.mean()) if len(flips) else math.nan,
        ranks_flip=float(ranks.mean()) if len(ranks) else math.nan,
    )


def bootstrap(
    estimate: Callable[[np.ndarray], float], runs: int, *, resamples: int = 200, seed: int = 0
) -> Interval:
    """The percentile interval of any estimate from chosen runs; those that cannot be made skip."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        try:
            drawn.append(estimate(random.integers(runs, size=runs)))
        except AssayError:
            continue
    return _percentiles(drawn)


def _percentiles(drawn: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    drawn = np.asarray(drawn, float)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2:
        return -math.inf, math.inf
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _runs(**columns: ArrayLike) -> list[np.ndarray]:
    """The columns as float arrays of one length, all positive and finite."""
    arrays = {name: np.asarray(values, float) for name, values in columns.items()}
    lengths = {name: len(values) for name, values in arrays.items()}
    if len({*lengths.values()}) > 1:
        raise AssayError(f"runs: found columns of different lengths, {lengths}.")
    for name, values in arrays.items():
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if len(wrong):
            raise AssayError(f"{name}: found {wrong[0]}; every run's must be more than 0.")
    return list(arrays.values())


# ---------------------------------------------------------------------------- as plain data


def study(
    ladders: Mapping[str, Ladder],
    target_flops: float | None = None,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """All that the ladders say, as plain data that JSON takes (an infinite end is None).

    Returns:
        `fits`: by variant `form` (chinchilla or power), `parameters` (each `value` and `ci95`),
        `flops_factor`, `points` (the runs), `curve` (`flops`, `loss`, `low`, `high`: the law from
        the smallest budget to the target), `held_out`, `isoflops` and `optimum` at the target
        (each None where the runs do not allow it). `errors`: by variant, why there is no fit.
        `outlook`: at the target, None without one, or with no fit.
    """
    fits, described, errors = {}, {}, {}
    for name, ladder in ladders.items():
        try:
            fits[name] = fit_ladder(ladder, resamples=resamples, seed=seed)
        except AssayError as error:
            errors[name] = str(error)
            continue
        described[name] = _described(ladder, fits[name], target_flops, resamples, seed)
    there = None
    if target_flops is not None and fits:
        kept = {name: ladders[name] for name in fits}
        there = asdict(outlook(kept, target_flops, fits=fits))
    return _plain({"fits": described, "errors": errors, "outlook": there})


def _described(
    ladder: Ladder, fit: LadderFit, target_flops: float | None, resamples: int, seed: int
) -> dict[str, Any]:
    chinchilla = isinstance(fit.law, ChinchillaLaw)
    end = max(float(ladder.flops.max()), target_flops or 0.0)
    grid = np.geomspace(ladder.flops.min(), end, 60)
    curve = [fit.predict(flops) for flops in grid]
    optimum = None
    if chinchilla and target_flops is not None:
        n, d = fit.law.optimum(target_flops, fit.flops_factor)
        drawn = [law.optimum(target_flops, fit.flops_factor)[0] for law in fit.draws]
        optimum = {"params": float(n), "params_ci95": _percentiles(drawn), "tokens": float(d)}
    return {
        "form": "chinchilla" if chinchilla else "power",
        "parameters": {
            name: {"value": value, "ci95": ends} for name, (value, ends) in fit.parameters().items()
        },
        "flops_factor": fit.flops_factor,
        "points": {name: column.tolist() for name, column in vars(ladder).items()},
        "curve": {
            "flops": grid.tolist(),
            "loss": [value for value, _ in curve],
            "low": [low for _, (low, _) in curve],
            "high": [high for _, (_, high) in curve],
        },
        "held_out": _or_none(
            lambda: asdict(predict_largest(ladder, resamples=resamples, seed=seed))
        ),
        "isoflops": _or_none(lambda: _isoflops(ladder, resamples, seed)),
        "optimum": optimum,
    }


def _isoflops(ladder: Ladder, resamples: int, seed: int) -> dict[str, Any]:
    columns = (ladder.params, ladder.tokens, ladder.flops, ladder.losses)

    def exponent(chosen: np.ndarray) -> float:
        return fit_isoflops(*(column[chosen] for column in columns)).params_exponent

    ends = bootstrap(exponent, len(ladder.losses), resamples=resamples, seed=seed)
    return asdict(fit_isoflops(*columns)) | {"params_exponent_ci95": ends}


def _or_none(make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return make()
    except AssayError:
        return None


def _plain(data: Any) -> Any:
    """Infinite and absent numbers as None, tuples as lists: what JSON takes."""
    if isinstance(data, Mapping):
        return {name: _plain(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return data
