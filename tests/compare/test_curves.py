"""Bands, crossing points and shapes of learning curves whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from assay.compare.curves import (
    band,
    common_grid,
    crossings,
    curve_features,
    features_of,
    on_grid,
    smooth,
)

X = np.linspace(1e3, 1e6, 120)


def curves(seeds, height, exponent, noise, seed=0, x=X):
    """Power laws that share their seeds' luck, with noise of their own."""
    random = np.random.default_rng(seed)
    luck = np.random.default_rng(99).standard_normal(seeds) * 0.05
    return [
        (x, height * x**-exponent + 1 + luck[s] + noise * random.standard_normal(len(x)))
        for s in range(seeds)
    ]


def test_curves_of_different_places_meet_on_one_grid():
    runs = [([0, 10, 20], [3.0, 2.0, 1.0]), ([5, 15], [2.0, 1.0])]
    grid = common_grid(runs, points=3)
    assert grid.tolist() == [5, 10, 15]
    np.testing.assert_allclose(on_grid(runs, grid), [[2.5, 2.0, 1.5], [2.0, 1.5, 1.0]])
    assert len(common_grid([([0, 1], [1, 1]), ([2, 3], [1, 1])])) == 0
    assert len(band([([1.0], [math.nan])]).x) == 0
    log = common_grid([([1, 100], [1, 1])], points=3, log=True)
    np.testing.assert_allclose(log, [1, 10, 100])


def test_a_band_is_students_interval_at_each_place():
    runs = curves(4, 20, 0.3, 0.01)
    found = band(runs, points=7)
    values = on_grid(runs, found.x)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), theirs)
    assert np.isinf(band(runs[:1]).low).all()


def test_a_crossing_is_found_and_its_interval_covers_it():
    """Two exact power laws cross at (20 / 5)^(1 / (0.3 - 0.15)); covered 95 of 100 times."""
    truth = (20 / 5) ** (1 / 0.15)
    inside, told = 0, 0
    for seed in range(200):
        a = curves(5, 20, 0.3, 0.03, seed=2 * seed)
        b = curves(5, 5, 0.15, 0.03, seed=2 * seed + 1)
        found = crossings(a, b, points=60, resamples=2)
        told += len(found) == 1
        inside += any(c.low <= truth <= c.high for c in found)
        assert all(c.leader_before == 1 for c in found)
    assert told >= 190
    assert inside >= 180


def test_a_crossing_has_a_bootstrap_interval():
    a, b = curves(6, 20, 0.3, 0.01), curves(6, 5, 0.15, 0.01, seed=1)
    (found,) = crossings(a, b)
    low, high = found.bootstrap95
    assert found.low <= found.x <= found.high
    assert low <= found.x <= high
    assert found.support == 1
    assert found.x == pytest.approx((20 / 5) ** (1 / 0.15), rel=0.15)
    assert (found,) == crossings(a, b)  # the same resamples again


def test_noise_about_no_difference_is_no_crossing():
    def a(seed):
        return curves(5, 20, 0.3, 0.05, seed)

    found = [len(crossings(a(2 * s), a(2 * s + 1), resamples=2)) for s in range(20)]
    mean_signs = [
        np.abs(np.diff(np.sign(band(curves(5, 20, 0.3, 0.05, s)).mean - 1.3))).sum()
        for s in range(20)
    ]
    assert sum(mean_signs) > 20  # while the signs of means change all the time
    assert np.median(found) <= 4
    assert crossings([], []) == ()


def test_one_seed_gives_a_place_and_no_certainty():
    x = np.geomspace(1e3, 1e6, 400)
    a, b = curves(1, 20, 0.3, 0.0, x=x), curves(1, 5, 0.15, 0.0, x=x)
    (found,) = crossings(a, b)
    assert found.x == pytest.approx((20 / 5) ** (1 / 0.15), rel=0.002)
    assert (found.low, found.high, found.bootstrap95, found.support) == (None,) * 4


def test_slope_and_floor_of_a_straight_line_in_log_x():
    x = np.geomspace(1, 1e4, 200)
    found = curve_features(x, 5 - np.log10(x))
    assert found.slope == pytest.approx(1.0)
    assert found.late_slope == pytest.approx(1.0)
    assert found.floor == pytest.approx((5 - np.log10(x))[x >= 9000 + 0.1].mean(), abs=1e-3)


def test_a_plateau_has_a_late_slope_of_0():
    x = np.linspace(1, 1000, 500)
    found = curve_features(x, 1 + 4 * np.exp(-x / 40))
    assert found.slope > 2
    assert abs(found.late_slope) < 1e-3
    assert found.floor == pytest.approx(1, abs=1e-6)


def test_smoothness_is_the_deviation_of_the_noise_whatever_the_trend():
    random = np.random.default_rng(0)
    x = np.sort(random.uniform(1e5, 1e6, 4000))  # uneven places too
    for trend in (0 * x, 3 - 2e-6 * x, 8 * x**-0.1):
        found = curve_features(x, trend + 0.07 * random.standard_normal(len(x)))
        assert found.smoothness == pytest.approx(0.07, rel=0.05)
    assert curve_features(x, 3 - 2e-6 * x).smoothness < 1e-12


def test_short_and_broken_curves_have_no_shape():
    assert all(math.isnan(v) for v in vars(curve_features([], [])).values())
    found = curve_features([1, 2, 3, 4], [4.0, math.nan, math.inf, 2.0])
    assert found.floor == 2.0
    assert math.isnan(found.smoothness)


def test_features_over_seeds_have_intervals():
    found = features_of(curves(3, 20, 0.3, 0.01))
    assert found["floor"]["ci95"][0] < found["floor"]["mean"] < found["floor"]["ci95"][1]
    assert features_of(curves(1, 20, 0.3, 0.01))["floor"]["ci95"] == [None, None]
    assert features_of([])["slope"]["mean"] is None


def test_smoothing_begins_unbiased_and_passes_gaps():
    assert smooth([2.0, 4.0], 0.0).tolist() == [2.0, 4.0]
    np.testing.assert_allclose(smooth([2.0, 4.0, np.nan], 0.5), [2.0, 10 / 3, 10 / 3])
    np.testing.assert_allclose(smooth(np.full(50, 3.0), 0.95), 3.0)
