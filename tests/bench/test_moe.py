"""The dense twin is of equal active size, and a bench of experts gives figures of all three."""

import json
import sys

import pytest

from assay import cli
from assay.bench.moe import bench_moe, dense_twin
from assay.errors import AssayError
from assay.spec import accounting
from assay.spec.presets import PRESETS, get

SMALL = {
    "model.decoder.num_layers": 1,
    "model.d_model": 16,
    "model.decoder.pattern.0.attention.heads": 2,
    "model.decoder.pattern.0.feed_forward.expert.hidden": 16,
    "data.batch_size": 2,
    "data.seq_len": 8,
}


@pytest.mark.parametrize("name", ["baby-moe", "make-moe", "mixtral-8x7b", "qwen3-30b-a3b"])
def test_the_twin_is_of_equal_active_size(name):
    """But for the router, and biases that each of a token's experts adds."""
    model = get(name).model
    twin = dense_twin(model)
    assert not any(b.feed_forward.kind == "moe" for b in twin.decoder.blocks())
    active = accounting.parameters(model).active
    assert accounting.parameters(twin).total == pytest.approx(active, rel=0.01)


def test_what_has_no_twin_is_said():
    with pytest.raises(AssayError, match=r"decoder.pattern: found no experts"):
        dense_twin(PRESETS["nano"].model)
    path = "decoder.pattern.0.feed_forward"
    deep = get("baby-moe").model.at(f"{path}.expert.hidden", [8, 8])
    with pytest.raises(AssayError, match=r"pattern.0.feed_forward.expert.hidden: found 2 widths"):
        dense_twin(deep)
    shared = get("baby-moe").model.at(f"{path}.shared", {"hidden": 8, "gated": True})
    with pytest.raises(AssayError, match=r"pattern.0.feed_forward.shared: another kind"):
        dense_twin(shared)


def test_a_bench_gives_figures_of_all():
    result = bench_moe(get("baby-moe").run.changed(SMALL), against="torch", rounds=1)
    for name, ratio in result.ratios.items():
        speeds = result.speeds["ours"].median, result.speeds[name].median
        assert ratio.median == pytest.approx(speeds[0] / speeds[1])
    # The dispatches compute the same thing.
    assert result.losses["ours"] == pytest.approx(result.losses["every_expert"], abs=1e-5)
    assert {*result.ratios} == {"dense", "every_expert", "torch"}


def test_the_command(monkeypatch, capsys):
    settings = [x for path, value in SMALL.items() for x in ("--set", f"{path}={value}")]
    arguments = ["bench", "moe", "baby-moe", "--rounds", "1", "--json", *settings]
    monkeypatch.setattr(sys, "argv", ["assay", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*data["ratio"]} == {"min", "median", "max"}
    assert {*data["theirs"]["tokens_per_second"]} == {"min", "median", "max"}
