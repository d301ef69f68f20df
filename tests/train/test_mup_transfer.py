"""The best learning rate of a width, under muP, suits one four times as wide. Minutes: slow."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mup_transfer.py"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_best_rate_of_width_64_is_within_a_grid_step_of_that_of_256(optimizer):
    spec = importlib.util.spec_from_file_location("mup_transfer", SCRIPT)
    transfer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(transfer)
    losses = transfer.sweep(optimizer, "mup")
    narrow, wide = (int(np.argmin(losses[width])) for width in transfer.WIDTHS)
    assert abs(narrow - wide) <= 1, losses
    last = len(transfer.GRIDS[optimizer]) - 1
    for best in (narrow, wide):
        assert 0 < best < last, f"a best at the end of the grid shows nothing: {losses}"
    assert min(losses[256]) < min(losses[64]), "a wider model must be better"
