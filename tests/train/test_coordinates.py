"""muP's coordinate check: what grows with the width, and what does not."""

import numpy as np
import pytest

from assay.errors import AssayError
from assay.spec.run import DataSpec, RunSpec
from assay.train.coordinates import GROWS, check_coordinates


@pytest.fixture
def run(model) -> RunSpec:
    narrow = model.changed({"decoder.num_layers": 2, "init.residual": "same"})
    return RunSpec(model=narrow, data=DataSpec(seq_len=16, batch_size=4))


@pytest.mark.parametrize(("optimizer", "grows"), [("adamw", 0.7), ("muon", 0.5)])
def test_nothing_grows_with_the_width_under_mup_and_the_standard_form_does(run, optimizer, grows):
    run = run.changed({"optimizer": optimizer, "optimizer.clip": None})
    standard, mup = check_coordinates(run, widths=(32, 128), updates=3)
    assert (standard.parametrisation, mup.parametrisation) == ("standard", "mup")
    assert mup.passed
    assert all(abs(part.slope) < GROWS for part in mup.parts), mup.parts
    assert not standard.passed
    assert standard.steepest.slope > grows, standard.parts
    # At the base width they are one model.
    for ours, theirs in zip(mup.parts, standard.parts, strict=True):
        np.testing.assert_allclose(np.array(ours.changes)[:, 0], np.array(theirs.changes)[:, 0])


def test_what_has_no_coordinates_is_refused(run):
    with pytest.raises(AssayError, match="two widths or more"):
        check_coordinates(run, widths=(32,))
    with pytest.raises(AssayError, match="decoders that have a head"):
        check_coordinates(run.at("model.decoder.causal", False))
