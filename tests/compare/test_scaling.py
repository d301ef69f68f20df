"""Scaling laws: published fits come back, from their own numbers and from their runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from assay.compare.scaling import (
    ChinchillaLaw,
    Ladder,
    PowerLaw,
    bootstrap,
    fit_chinchilla,
    fit_isoflops,
    fit_ladder,
    fit_power_law,
    independent,
    outlook,
    predict_largest,
    scope_of,
    study,
)
from assay.errors import AssayError

HOFFMANN = ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
BESIROGLU = ChinchillaLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def published_runs():
    """The 240 runs of Hoffmann et al.'s figure 4 that Besiroglu et al. keep: (N, D, L)."""
    path = Path(__file__).parent / "chinchilla_figure_4.csv"
    n, c, y = np.loadtxt(path, delimiter=",", comments="#", skiprows=3).T
    kept = y < np.sort(y)[-5]
    return n[kept], (c / (6 * n))[kept], y[kept]


def grid(sizes=8, lengths=8):
    n, d = np.meshgrid(np.geomspace(4e7, 1.6e10, sizes), np.geomspace(1e9, 1e12, lengths))
    return n.ravel(), d.ravel()


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU], ids=["hoffmann", "besiroglu"])
def test_a_law_comes_back_from_its_own_losses(law):
    n, d = grid()
    found = fit_chinchilla(n, d, law.loss(n, d))
    for name, value in vars(law).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU], ids=["hoffmann", "besiroglu"])
def test_a_law_comes_back_from_noisy_losses(law):
    n, d = grid(12, 12)
    noise = np.exp(0.005 * np.random.default_rng(0).standard_normal(len(n)))
    noise[::29] *= 1.3  # a few runs that went wrong: what Huber is for
    found = fit_chinchilla(n, d, law.loss(n, d) * noise)
    assert found.alpha == pytest.approx(law.alpha, abs=0.02)
    assert found.beta == pytest.approx(law.beta, abs=0.02)
    assert vars(found)["E"] == pytest.approx(law.E, abs=0.04)


def test_the_published_runs_give_the_published_replication():
    """Besiroglu et al.: E 1.8172 (0.03), A 482.01, B 2085.43, alpha 0.3478 (0.02), beta 0.3658
    (0.02), standard errors in brackets."""
    n, d, y = published_runs()
    assert len(n) == 240
    found = fit_chinchilla(n, d, y)
    assert vars(found)["E"] == pytest.approx(1.8172, abs=0.003)
    assert found.alpha == pytest.approx(0.3478, abs=0.003)
    assert found.beta == pytest.approx(0.3658, abs=0.003)
    assert found.params_exponent == pytest.approx(0.512, abs=0.003)
    # and not the original one, which they show does not fit these runs
    assert abs(found.beta - HOFFMANN.beta) > 0.05


def test_the_published_runs_without_the_largest_predict_it():
    """What the large runs lose, from those of less than a fifth of their FLOPs."""
    n, d, y = published_runs()
    ladder = Ladder.of(n, d, 6 * n * d, y)
    small = ladder.flops < ladder.flops.max() / 5
    law = fit_chinchilla(n[small], d[small], y[small])
    rest = law.loss(n[~small], d[~small]) / y[~small] - 1
    assert np.abs(rest).mean() < 0.02


def test_the_optimum_is_the_least_loss_at_its_budget():
    n, d = HOFFMANN.optimum(5.76e23)
    assert 6 * n * d == pytest.approx(5.76e23)
    for factor in (0.9, 1.1):
        assert HOFFMANN.loss(n, d) < HOFFMANN.loss(n * factor, d / factor)
    # Chinchilla's own: at Gopher's budget about 40 billion by approach 3 (their table 3: 40e9)
    assert n == pytest.approx(40e9, rel=0.25)
    assert HOFFMANN.params_exponent == pytest.approx(0.46, abs=0.01)  # their table 2: 0.46, 0.54
    assert np.isnan(ChinchillaLaw(1, 0, 1, 0.3, 0.3).optimum(1e20)[0])


def test_isoflop_parabolas_find_the_optimum_of_a_known_law():
    """With approach 2's own known bias (a parabola is not the law) below 0.02 in the exponent."""
    law, budgets = BESIROGLU, np.geomspace(1e18, 1e21, 6)
    c = np.repeat(budgets, 7)
    n = np.concatenate([law.optimum(b)[0] * np.geomspace(0.5, 2, 7) for b in budgets])
    d = c / (6 * n)
    found = fit_isoflops(n, d, c, law.loss(n, d))
    assert found.params_exponent == pytest.approx(law.params_exponent, abs=0.005)
    assert found.params_exponent + found.tokens_exponent == pytest.approx(1)
    assert len(found.parabolas) == 6
    assert all(p.inside and p.runs == 7 for p in found.parabolas)
    np.testing.assert_allclose(found.optimum(1e20), law.optimum(1e20), rtol=0.05)


def test_isoflops_leave_out_what_shows_no_least():
    law, c = BESIROGLU, np.repeat([1e18, 1e19, 1e20], 4)
    n = np.concatenate([law.optimum(b)[0] * np.geomspace(0.5, 2, 4) for b in (1e18, 1e19, 1e20)])
    n[8:] *= 50  # all far too large: the least is outside
    d = c / (6 * n)
    found = fit_isoflops(n, d, c, law.loss(n, d))
    assert [p.inside for p in found.parabolas] == [True, True, False]
    with pytest.raises(AssayError, match="flops: found 1 budgets"):
        fit_isoflops(n[4:], d[4:], c[4:], law.loss(n, d)[4:])


def test_a_power_law_in_flops_comes_back():
    law, c = PowerLaw(E=0.9, A=2e3, alpha=0.21), np.geomspace(1e15, 1e19, 6)
    found = fit_power_law(c, law.loss(c))
    assert found.alpha == pytest.approx(0.21, rel=1e-3)
    assert vars(found)["E"] == pytest.approx(0.9, rel=1e-3)
    with pytest.raises(AssayError, match="found 2 different budgets"):
        fit_power_law([1e15, 1e16], [3.0, 2.0])


def ladder(law, sizes, seeds, noise, seed=0, tokens=None):
    """Runs of several sizes; tokens 20 a parameter, or several lengths of each."""
    random = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(1e6, 1e8, sizes), seeds)
    d = 20 * n if tokens is None else np.tile(tokens, len(n) // len(tokens))
    y = law.loss(n, d) * np.exp(noise * random.standard_normal(len(n)))
    return Ladder.of(n, d, 6 * n * d, y, np.tile(np.arange(seeds), sizes))


def test_a_ladder_that_grows_one_way_gets_a_law_in_flops():
    runs = ladder(HOFFMANN, 5, 3, 0.003)
    fit = fit_ladder(runs, resamples=30)
    assert isinstance(fit.law, PowerLaw)
    assert fit.flops_factor == pytest.approx(6)
    assert len(fit.draws) == 30
    truth = HOFFMANN.loss(math.sqrt(1e20 / 120), 20 * math.sqrt(1e20 / 120))
    value, (low, high) = fit.predict(1e20)
    assert low < value < high
    assert value == pytest.approx(float(truth), rel=0.06)


def test_a_ladder_that_varies_both_gets_the_law_in_both():
    runs = ladder(BESIROGLU, 5, 8, 0.002, tokens=np.repeat(np.geomspace(2e7, 2e10, 4), 2))
    fit = fit_ladder(runs, resamples=20)
    assert isinstance(fit.law, ChinchillaLaw)
    value, (low, high) = fit.parameters()["alpha"]
    assert low <= value <= high
    assert value == pytest.approx(BESIROGLU.alpha, abs=0.02)
    predicted, (low, high) = fit.predict(1e19)
    assert predicted == pytest.approx(float(BESIROGLU.loss(*BESIROGLU.optimum(1e19))), rel=0.02)
    assert low <= predicted <= high


def test_what_a_ladder_can_show_is_known_before_it_is_run():
    n, c = np.tile([1e5, 2e5, 4e5], 3), np.repeat([1e11, 3e11, 9e11], 3)
    found = scope_of(n, c / (6 * n), c)
    assert (found.form, found.held_out_form, found.largest) == ("chinchilla", "chinchilla", 9e11)
    assert found.isoflops == pytest.approx((1e11, 3e11, 9e11))
    few = scope_of(n[:6], c[:6] / (6 * n[:6]), c[:6])  # three of one budget are left
    assert (few.form, few.held_out_form, len(few.isoflops)) == ("chinchilla", None, 2)
    n = np.geomspace(1e6, 1e8, 4)
    one_way = scope_of(n, 20 * n, 120 * n**2)
    assert (one_way.form, one_way.held_out_form, one_way.isoflops) == ("power", "power", ())
    assert scope_of(n[:2], n[:2], n[:2]).form is None


def test_bootstrap_intervals_cover_the_exponent():
    """Of a mean, where the truth is known: the percentile interval of 40 values."""
    inside = 0
    for seed in range(100):
        x = np.random.default_rng(seed).standard_normal(40)
        low, high = bootstrap(lambda chosen, x=x: x[chosen].mean(), 40, resamples=200)
        inside += low <= 0 <= high
    assert 88 <= inside <= 99


def test_the_largest_run_is_predicted_from_the_smaller_ones():
    runs = ladder(HOFFMANN, 6, 3, 0.002, seed=1)
    found = predict_largest(runs, resamples=60)
    assert found.runs == 3
    assert found.params == pytest.approx(1e8)
    assert abs(found.relative_miss) < 0.03
    assert found.miss == pytest.approx(found.predicted - found.measured)
    # a ladder that breaks at its top is caught
    broken = runs.losses.copy()
    broken[-3:] *= 1.5
    off = predict_largest(
        Ladder.of(runs.params, runs.tokens, runs.flops, broken, runs.seeds), resamples=60
    )
    assert off.relative_miss < -0.25
    assert not off.inside


def test_ranks_that_flip_on_the_way_are_foretold():
    """Two laws that cross between what is measured and what is meant."""
    early, late = PowerLaw(E=2.0, A=150.0, alpha=0.2), PowerLaw(E=1.5, A=40.0, alpha=0.1)
    c = np.repeat(np.geomspace(1e12, 1e16, 6), 3)

    def runs(law, seed, noise=0.001):
        random = np.random.default_rng(seed)
        y = law.loss(c) * np.exp(noise * random.standard_normal(len(c)))
        n = np.sqrt(c / 120)
        return Ladder.of(n, 20 * n, c, y)

    there = 1e40
    assert (early.loss(1e16) < late.loss(1e16)) != (early.loss(there) < late.loss(there))
    found = outlook({"early": runs(early, 0), "late": runs(late, 1)}, there, resamples=40)
    assert (found.winner_now, found.winner_then) == ("early", "late")
    assert found.flip > 0.9
    assert found.ranks_flip >= found.flip
    assert sum(found.best.values()) == pytest.approx(1)
    same = outlook({"early": runs(early, 0), "late": runs(late, 1)}, 1e16, resamples=40)
    assert same.flip == 0
    equal = outlook({"a": runs(early, 2), "b": runs(early, 3)}, 1e20, resamples=40)
    assert 0 < equal.best["a"] < 1


def test_a_study_is_plain_data():
    """And each variant that cannot be fitted says why, and spoils no other."""
    runs = ladder(BESIROGLU, 5, 8, 0.002, tokens=np.repeat(np.geomspace(2e7, 2e10, 4), 2))
    short = Ladder.of([1e6, 2e6], [1e8, 1e8], [6e14, 12e14], [3.0, 2.9])
    found = study({"dense": runs, "moe": short}, 1e20, resamples=8)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "needs at least 3" in found["errors"]["moe"]
    fit = found["fits"]["dense"]
    assert fit["form"] == "chinchilla"
    assert fit["curve"]["flops"][-1] == pytest.approx(1e20)
    assert abs(fit["held_out"]["relative_miss"]) < 0.05
    assert fit["optimum"]["params"] > 0
    assert found["outlook"]["winner_then"] == "dense"
    assert study({"moe": short}, resamples=8)["outlook"] is None


def test_what_cannot_be_told_is_refused():
    n = np.geomspace(1e6, 1e8, 6)
    assert not independent(n, 20 * n)
    assert not independent(n, np.full(6, 1e9))
    with pytest.raises(AssayError, match="grow together"):
        fit_chinchilla(n, 20 * n, HOFFMANN.loss(n, 20 * n))
    with pytest.raises(AssayError, match="different pairs"):
        fit_chinchilla(n[:4], n[:4], n[:4])
    with pytest.raises(AssayError, match="losses: found nan"):
        fit_power_law([1e9, 1e10, 1e11], [3.0, math.nan, 2.0])
    with pytest.raises(AssayError, match="different lengths"):
        fit_power_law([1e9, 1e10], [3.0])
    with pytest.raises(AssayError, match="ladders: found none"):
        outlook({}, 1e20)
