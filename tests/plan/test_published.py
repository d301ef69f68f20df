"""The planner against what others measured."""

from statistics import median

import pytest

from assay.plan.published import ROWS, efficiencies, leave_one_out
from assay.plan.topology import CHIPS
from assay.spec.accounting import parameters

RESULTS = leave_one_out()


def test_the_median_miss_is_small_and_none_is_large():
    misses = [abs(predicted / row.tokens - 1) for row, _, predicted in RESULTS]
    assert median(misses) <= 0.15
    assert max(misses) <= 0.30


def test_chips_carry_the_efficiency_of_their_rows():
    for name, efficiency in efficiencies().items():
        assert CHIPS[name].efficiency == pytest.approx(efficiency, abs=0.006)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama 2 70B", 68.98),
        ("Llama 3.1 8B", 8.03),
        ("Llama 3.1 70B", 70.55),
        ("Mixtral 8x7B", 46.70),
        ("Mistral 7B", 7.24),
        ("16B", 15.8),
        ("22B", 22.1),
        ("52B", 52.3),
        ("32B", 31.7),
        ("64B", 62.8),
        ("128B", 125.0),
        ("GPT-2 124M", 0.1244),
        ("MPT 7b, T 2048", 6.659),
        ("MPT 30b, T 2048", 29.975),
    ],
)
def test_rows_have_the_published_sizes(name, billions):
    row = next(row for row in ROWS if row.name == name)
    assert parameters(row.model).total / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_row_says_where_it_is_from():
    assert all(row.source and row.tokens > 0 for row in ROWS)
    assert len(ROWS) >= 30
