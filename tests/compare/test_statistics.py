"""Intervals, verdicts and numbers of seeds: against SciPy, closed forms, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from assay.compare.statistics import (
    BETTER,
    EQUIVALENT,
    UNDECIDED,
    WORSE,
    Design,
    all_pairs,
    anytime_e,
    anytime_interval,
    anytime_p,
    anytime_width,
    compare_pairs,
    deviation_interval,
    holm,
    judge,
    mean_interval,
    planned_p,
    power,
    probability_best,
    rank_ranges,
    seeds_needed,
    seeds_needed_anytime,
    seeds_needed_for_equivalence,
    smallest_difference,
    spend,
)
from assay.errors import AssayError

EXPERIMENTS = 4000
ERROR = 3 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)  # of a share of about 5 %, three deviations


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def simulated(experiments, variants, seeds, *, effects=0.0, seed=0):
    """Losses of paired runs: a seed's luck is shared; (experiments, variants, seeds)."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((experiments, 1, seeds)) * 3
    own = random.standard_normal((experiments, variants, seeds))
    return np.asarray(effects, float).reshape(-1, 1) + shared + own


def differences(scores):
    """Of all pairs: (experiments, pairs, seeds)."""
    return np.stack([scores[:, a] - scores[:, b] for a, b in all_pairs(range(scores.shape[1]))], 1)


# ---------------------------------------------------------------------------- against SciPy


def test_the_planned_interval_and_test_are_scipys():
    x, y = gaussian(2, 7)
    low, high = mean_interval(x - y)
    theirs = stats.ttest_rel(x, y)
    np.testing.assert_allclose((low, high), theirs.confidence_interval(0.95), rtol=1e-12)
    np.testing.assert_allclose(planned_p(x - y), theirs.pvalue, rtol=1e-12)


def test_power_is_the_noncentral_t_and_simulation():
    seeds, difference = 6, 1.5
    x = gaussian(40_000, seeds) + difference
    found = (planned_p(x) < 0.05).mean()
    assert power(difference, 1.0, seeds) == pytest.approx(found, abs=0.01)
    assert power(0.0, 1.0, seeds) == pytest.approx(0.05, abs=1e-9)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.6]), [1.0, 1.0])
    np.testing.assert_allclose(holm([[0.01], [0.2]]), [[0.01], [0.2]])


def test_the_evidence_is_the_ratio_of_noncentral_and_central_t():
    """The mixture over effects N(0, g) by quadrature, of the densities of Student's t."""
    from assay.compare.statistics import _mixture

    x = gaussian(6) + 0.8
    n = len(x)
    g = _mixture(8, 0.05)
    t = stats.ttest_1samp(x, 0).statistic
    effects = np.linspace(-14, 14, 40_001) * math.sqrt(g)
    prior = stats.norm.pdf(effects, scale=math.sqrt(g))
    density = stats.nct.pdf(t, n - 1, effects * math.sqrt(n))
    density = np.nan_to_num(density)  # 0 far out, where SciPy's series ends
    ratio = np.trapezoid(prior * density, effects) / stats.t.pdf(t, n - 1)
    assert anytime_e(x, planned=8) == pytest.approx(ratio, rel=1e-4)


def test_the_anytime_interval_holds_what_the_evidence_does_not_refute():
    x = gaussian(9) + 5
    low, high = anytime_interval(x, planned=6)
    for mu, inside in ((low, 1e-6), (low, -1e-6), (high, -1e-6), (high, 1e-6)):
        e = anytime_e(x - (mu + inside), planned=6)
        assert (e < 20) == (low < mu + inside < high)


def test_the_anytime_interval_is_infinite_at_few_seeds_and_wider_always():
    for planned in (3, 5, 10, 50):
        widths = [anytime_width(n, 0.95, planned) for n in range(1, 200)]
        student = [stats.t.isf(0.025, n - 1) for n in range(2, 200)]
        assert math.isinf(widths[0])
        assert math.isinf(widths[1])  # 2 seeds tell nothing, whoever planned for 3 or more
        assert math.isfinite(widths[planned - 1])
        assert all(ours > theirs for ours, theirs in zip(widths[1:], student, strict=True))
        here = anytime_width(planned, 0.95, planned)
        others = [anytime_width(planned, 0.95, other) for other in (3, 5, 10, 50)]
        assert here <= min(others) * (1 + 1e-6)  # narrowest where it was meant to be


# ---------------------------------------------------------------------------- by simulation


def covers(low, high, truth=0.0):
    return (low <= truth) & (truth <= high)


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_the_planned_interval_covers_the_truth_95_of_100_times(seeds):
    scores = simulated(EXPERIMENTS, 2, seeds, effects=[0.3, 0.0], seed=seeds)
    share = covers(*mean_interval(scores[:, 0] - scores[:, 1]), 0.3).mean()
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("planned", [3, 5, 20])
def test_the_anytime_interval_covers_the_truth_at_every_look_at_once(planned):
    scores = simulated(EXPERIMENTS, 2, 40, effects=[0.3, 0.0], seed=planned)
    x = scores[:, 0] - scores[:, 1]
    always = np.ones(EXPERIMENTS, bool)
    student = np.ones(EXPERIMENTS, bool)
    for n in range(1, 41):
        always &= covers(*anytime_interval(x[:, :n], planned=planned), 0.3)
        student &= covers(*mean_interval(x[:, :n]), 0.3)
    assert always.mean() >= 0.95
    assert student.mean() < 0.85  # what it is needed for: looking at each n, Student's misses


def test_the_anytime_p_value_is_rarely_small_at_any_time():
    x = gaussian(EXPERIMENTS, 40, seed=3)
    least = np.min([anytime_p(x[:, :n], planned=10) for n in range(1, 41)], axis=0)
    for alpha in (0.01, 0.05, 0.2):
        assert (least <= alpha).mean() <= alpha + 3 * math.sqrt(alpha / EXPERIMENTS)


@pytest.mark.parametrize("looks", ["end", "every", (3, 5, 8)], ids=str)
def test_equal_variants_are_called_different_in_5_of_100_experiments_however_one_looks(looks):
    """Three equal variants, all pairs; the user looks after every seed, stops at the first call."""
    design = Design(seeds=8, looks=looks)
    x = differences(simulated(EXPERIMENTS, 3, 14, seed=1))
    called = np.zeros(EXPERIMENTS, bool)
    naive = np.zeros(EXPERIMENTS, bool)
    for n in range(1, 15):  # also past the plan
        verdicts = judge(x[..., :n], design)
        called |= np.isin(verdicts.verdict, (BETTER, WORSE)).any(-1)
        naive |= (holm(planned_p(x[..., :n])) <= 0.05).any(-1)
    assert called.mean() <= 0.05 + ERROR
    assert naive.mean() > 0.1  # what people do


def test_a_planned_look_spends_all_its_error():
    """Not conservative for nothing: at one pair the rate is 5 %, not less."""
    x = differences(simulated(EXPERIMENTS, 2, 5, seed=2))
    called = judge(x, Design(seeds=5)).verdict != UNDECIDED
    assert called.mean() == pytest.approx(0.05, abs=ERROR)


@pytest.mark.parametrize("design", [Design(6), Design(6, "every"), Design(6, (3, 6))], ids=str)
def test_simultaneous_intervals_cover_all_truths_together(design):
    effects = [0.0, 0.0, 1.5, 4.0]
    x = differences(simulated(EXPERIMENTS, 4, 6, effects=effects, seed=4))
    truths = np.array([effects[a] - effects[b] for a, b in all_pairs(range(4))])
    together = np.ones(EXPERIMENTS, bool)
    for n in (3, 6):
        found = judge(x[..., :n], design)
        if n == 6 or design.looks != "end":
            together &= covers(found.low, found.high, truths).all(-1)
    assert together.mean() >= 0.95 - ERROR


def test_holm_keeps_its_rate_where_some_differences_are_real():
    effects = [0.0, 0.0, 3.0]
    x = differences(simulated(EXPERIMENTS, 3, 5, effects=effects, seed=5))
    found = judge(x, Design(5)).verdict
    assert (found[:, 0] != UNDECIDED).mean() <= 0.05 + ERROR  # the pair that is equal
    assert (found[:, 1:] == BETTER).mean() > 0.5
    assert (found[:, 1:] == WORSE).mean() < 0.001


def test_equivalence_is_called_wrongly_in_5_of_100_at_most_and_rightly_when_there_are_seeds():
    at_the_margin = simulated(EXPERIMENTS, 2, 20, effects=[0.8, 0.0], seed=6)
    wrong = judge(differences(at_the_margin), Design(20, margin=0.8)).verdict == EQUIVALENT
    assert wrong.mean() <= 0.025 + ERROR  # each side has half of the error
    needed = seeds_needed_for_equivalence(0.8, math.sqrt(2))
    equal = differences(simulated(EXPERIMENTS, 2, needed, seed=7))
    right = judge(equal, Design(needed, margin=0.8)).verdict == EQUIVALENT
    assert 0.78 <= right.mean() <= 0.86


@pytest.mark.slow
def test_simulation_at_length():
    """The figures of docs/statistics.md: 200,000 experiments. Run with -m slow -s to see them."""
    experiments = 200_000
    for seeds in (3, 5, 10):
        x = gaussian(experiments, seeds, seed=seeds)
        share = covers(*mean_interval(x)).mean()
        print(f"planned-n, {seeds} seeds: covers {share:.2%}")
        assert 0.948 <= share <= 0.952
    x = gaussian(experiments, 100, seed=1)
    for planned in (3, 5, 10, 20):
        always, naive = np.ones(experiments, bool), np.zeros(experiments, bool)
        shares = {}
        for n in range(2, 101):
            always &= covers(*anytime_interval(x[:, :n], planned=planned))
            naive |= planned_p(x[:, :n]) <= 0.05
            if n in (20, 100):
                shares[n] = (always.mean(), naive.mean())
        for n, (ours, theirs) in shares.items():
            print(f"anytime, tuned to {planned}: covers {ours:.2%} at all looks to {n};", end=" ")
            print(f"naive looks call {theirs:.1%}")
        assert always.mean() >= 0.95
    for looks in ("end", "every", (5, 10), (3, 5, 8, 10)):
        design = Design(10, looks)
        called = np.zeros(50_000, bool)
        scores = differences(simulated(50_000, 3, 20, seed=2))
        for n in range(1, 21):
            found = judge(scores[..., :n], design).verdict
            called |= (found != UNDECIDED).any(-1)
        print(f"looks {looks}: 3 equal variants called different in {called.mean():.2%}")
        assert called.mean() <= 0.05 + 3 * math.sqrt(0.05 / 50_000)


# ---------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("comparisons", [1, 6])
def test_the_smallest_difference_is_seen_with_the_chance_that_was_asked(comparisons):
    for seeds in (2, 3, 5, 10, 100):
        least = smallest_difference(seeds, 0.02, comparisons=comparisons, chance=0.9)
        seen = power(least, 0.02, seeds, comparisons=comparisons)
        assert seen == pytest.approx(0.9, abs=1e-6)
    assert math.isinf(smallest_difference(1, 0.02))
    assert smallest_difference(3, 0.0) == 0


def test_seeds_needed_are_the_fewest():
    for difference in (5.0, 1.0, 0.3, 0.05):
        seeds = seeds_needed(difference, 1.0)
        assert power(difference, 1.0, seeds) >= 0.8
        assert seeds == 2 or power(difference, 1.0, seeds - 1) < 0.8
    assert seeds_needed(1.0, 1.0) == 10  # as G*Power and R's power.t.test say
    assert seeds_needed(0.5, 1.0) == 34
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1e-9, 1.0) is None
    assert seeds_needed(0.1, math.nan) is None
    assert seeds_needed_anytime(1.0, 1.0, planned=10) > 10


def test_a_deviation_from_few_seeds_is_rough():
    low, high = deviation_interval(1.0, 3)
    assert low == pytest.approx(0.5207, abs=1e-4)  # sqrt(2 / 7.378), sqrt(2 / 0.0506)
    assert high == pytest.approx(6.2847, abs=1e-4)
    assert deviation_interval(1.0, 1) == (0.0, math.inf)


def test_alpha_is_spent_once_and_late():
    spent = spend((3, 5, 10))
    assert sum(spent) == pytest.approx(0.05, abs=1e-12)
    assert list(spent) == sorted(spent)
    assert spend((4,)) == pytest.approx((0.05,))
    # Lan and DeMets: at half of the information, 2 - 2 Phi(1.96 sqrt 2) = 0.0056
    assert spend((5, 10))[0] == pytest.approx(0.0055746, abs=1e-6)


# ---------------------------------------------------------------------------- verdicts


LUCK = np.array([0.3, -0.2, 0.1, 0.4, -0.1])


def scores(**offsets):
    """Losses at five seeds, their noise small beside the seeds' own luck."""
    noise = gaussian(len(offsets), 5) * 1e-3
    return {name: 2 + LUCK + offset + noise[i] for i, (name, offset) in enumerate(offsets.items())}


def verdicts(values, **design):
    pairs = compare_pairs(values, all_pairs([*values]), **{"planned": 5} | design)
    return {(p.a, p.b): p.verdict for p in pairs}


def test_the_four_verdicts():
    values = scores(dense=0.0, moe=-0.1, gqa=0.0005)
    found = verdicts(values, margin=0.02)
    assert found == {
        ("dense", "moe"): "worse",
        ("dense", "gqa"): "equivalent",
        ("moe", "gqa"): "better",
    }
    assert verdicts(values)["dense", "gqa"] == "undecided"  # no margin was declared


def test_a_difference_within_the_margin_is_equivalent_even_if_it_is_real():
    values = scores(a=0.0, b=-0.01)
    assert verdicts(values) == {("a", "b"): "worse"}
    assert verdicts(values, margin=0.05) == {("a", "b"): "equivalent"}


def test_pairs_are_of_the_same_seeds():
    """The seeds' luck is a hundred times the difference, and cancels."""
    values = scores(a=0.0, b=-0.01)
    assert verdicts(values)["a", "b"] == "worse"
    values["b"] = values["b"][::-1]
    assert verdicts(values)["a", "b"] == "undecided"


def test_pairs_agree_with_their_own_intervals():
    (pair,) = compare_pairs(scores(a=0.0, b=-0.01), [("a", "b")], planned=5)
    assert pair.difference == pytest.approx(0.01, abs=1e-3)
    assert pair.simultaneous95 == pytest.approx(pair.ci95)  # of one pair
    assert pair.anytime95[0] < pair.ci95[0] < pair.ci95[1] < pair.anytime95[1]
    assert pair.p_adjusted == pytest.approx(pair.p)
    assert "5 seeds" in pair.reason


def test_before_the_plan_is_done_there_is_no_verdict_and_after_it_none_changes():
    values = scores(a=0.0, b=-0.1)
    early = {name: np.where(np.arange(5) < 3, x, np.nan) for name, x in values.items()}
    (pair,) = compare_pairs(early, [("a", "b")], planned=5)
    assert (pair.verdict, pair.seeds) == ("undecided", 3)
    assert "3 of the 5" in pair.reason
    assert verdicts(early, looks=(3, 5)) == {("a", "b"): "worse"}
    more = {name: np.append(x, [9.0 + 5 * (name == "a"), 9.0]) for name, x in values.items()}
    (pair,) = compare_pairs(more, [("a", "b")], planned=5)
    assert pair.verdict == "worse"
    assert pair.seeds == 7


def test_a_diverged_run_prevents_a_verdict():
    values = scores(a=0.0, b=-0.1)
    for broken in (np.nan, np.inf):
        values["b"][4] = broken
        (pair,) = compare_pairs(values, [("a", "b")], planned=5)
        assert (pair.verdict, pair.seeds) == ("undecided", 4)


def test_equal_and_constant_scores():
    same = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}
    (pair,) = compare_pairs(same, [("a", "b")], planned=3, margin=0.1)
    assert (pair.verdict, pair.p, pair.ci95) == ("equivalent", 1.0, (0.0, 0.0))
    apart = {"a": [1.1, 2.1, 3.1], "b": [1.0, 2.0, 3.0]}
    (pair,) = compare_pairs(apart, [("a", "b")], planned=3)
    assert pair.verdict == "worse"


def test_one_seed_tells_nothing():
    (pair,) = compare_pairs({"a": [1.0], "b": [2.0]}, [("a", "b")], planned=1)
    assert pair.verdict == "undecided"
    assert pair.ci95 == pair.anytime95 == pair.simultaneous95 == (-math.inf, math.inf)
    assert pair.seeds_needed is None
    assert "2 seeds" in pair.reason
    (pair,) = compare_pairs({"a": [np.nan] * 3, "b": [2.0] * 3}, [("a", "b")], planned=3)
    assert (pair.seeds, pair.verdict) == (0, "undecided")
    assert compare_pairs({"a": [1.0]}, [], planned=1) == ()


def test_against_a_base_each_other_one_is_compared_with_it():
    assert all_pairs(["a", "base", "b"], "base") == [("a", "base"), ("b", "base")]
    with pytest.raises(AssayError, match="did you mean 'base'"):
        all_pairs(["a", "base"], "bsae")


def test_ranks_and_the_probability_of_being_best():
    values = scores(dense=0.0, moe=-0.1, gqa=0.0002)
    pairs = compare_pairs(values, all_pairs([*values]), planned=5)
    assert rank_ranges([*values], pairs) == {"dense": (2, 3), "moe": (1, 1), "gqa": (2, 3)}
    best = probability_best(np.array([*values.values()]))
    assert best.sum() == pytest.approx(1)
    assert best[1] > 0.999


def test_the_probability_of_being_best_of_two_is_the_one_sided_p_value():
    x = gaussian(2, 6)
    one_sided = stats.ttest_rel(x[0], x[1], alternative="less").pvalue
    assert probability_best(x)[0] == pytest.approx(1 - one_sided, abs=0.01)
    assert np.isnan(probability_best(x[:, :1])).all()
    assert probability_best(x[:1]) == [1.0]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seeds": 0}, "seeds: found 0"),
        ({"seeds": 3, "looks": (2, 2, 3)}, "looks: found"),
        ({"seeds": 3, "looks": (2,)}, "looks: found"),
        ({"seeds": 3, "looks": ()}, "looks: found"),
        ({"seeds": 3, "looks": "evry"}, "did you mean 'every'"),
        ({"seeds": 3, "margin": -1.0}, "margin: found"),
        ({"seeds": 3, "level": 95.0}, "level: found"),
    ],
    ids=str,
)
def test_a_design_says_what_is_wrong(fields, sentence):
    with pytest.raises(AssayError, match=sentence):
        Design(**fields)


def test_values_must_be_paired():
    with pytest.raises(AssayError, match="every variant needs one for each seed"):
        compare_pairs({"a": [1.0, 2.0], "b": [1.0]}, [("a", "b")], planned=2)
    with pytest.raises(AssayError, match="did you mean 'moe'"):
        compare_pairs({"moe": [1.0, 2.0]}, [("moe", "mao")], planned=2)
