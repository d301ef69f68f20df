"""Memory, the loop's own cost, and growth: what is measured is what it says."""

import subprocess
import sys

import pytest

from assay.bench import growth
from assay.bench.growth import Growth, bench_growth, bend_of, plot_growth, slopes_of
from assay.bench.loop import bench_loop
from assay.bench.memory import bench_memory
from assay.errors import AssayError
from assay.spec.presets import PRESETS

TINY = PRESETS["tiny-gpt"].run.changed(
    {"data.batch_size": 2, "data.seq_len": 32, "model.decoder.num_layers": 1}
)


def test_memory_of_a_larger_batch_is_larger():
    small, large = (
        bench_memory(TINY.changed({"data.batch_size": size, "data.seq_len": 64}), steps=2).ours
        for size in (2, 256)
    )
    assert small.imported <= small.process
    assert large.steps <= large.process
    # 16,384 tokens by 128 features, float32, are 8 MB; a step keeps a dozen of such arrays.
    assert large.steps - small.steps > 30e6


def test_a_side_that_fails_is_named():
    with pytest.raises(AssayError, match="--against jax"):
        bench_memory(TINY, against="jax")


def test_the_loop_is_timed():
    result = bench_loop(TINY, steps=40)
    assert result.steps >= 10
    assert result.make_batch > 0
    assert 0 <= result.wait_for_batch < result.step
    assert 0 < result.python < result.step * 1.5
    assert 0 < result.dispatch < result.step * 1.5
    assert 0 < result.fetch < result.step * 10


def test_slopes_of_known_laws():
    sizes = (1, 2, 4, 8)
    assert slopes_of(sizes, [3 * n**2 for n in sizes]) == pytest.approx((2, 2, 2))
    bent = [10, 10, 20, 40]
    assert slopes_of(sizes, bent) == pytest.approx((0, 1, 1))
    assert bend_of(sizes, slopes_of(sizes, bent)) == 2
    assert bend_of(sizes, (1.0, 1.1, 1.2)) is None


def test_growth_is_measured_and_drawn(monkeypatch, tmp_path):
    make = growth._run
    monkeypatch.setitem(
        growth.AXES,
        "tokens",
        ("sequences", (1, 8), lambda n: make(batch=n, context=32, width=32, layers=1)),
    )
    told = []
    (grown,) = bench_growth(axes=("tokens",), rounds=2, tell=told.append)
    assert told == [grown]
    assert len(grown.milliseconds) == 2
    assert grown.slope == pytest.approx(grown.slopes[0])
    path = tmp_path / "growth.svg"
    plot_growth([grown], path, "a step")
    assert "<svg" in path.read_text()
    many = [Growth("width", "d", (1, 2), (1.0, 2.0), (1.0,), 1.0, None)] * 5
    plot_growth(many, tmp_path / "many.png", "five panels")
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_every_size_is_a_model():
    for axis, (_, sizes, make) in growth.AXES.items():
        for n in sizes:
            run = make(n)
            tokens = run.data.batch_size * run.data.seq_len
            assert axis == "tokens" or tokens in (1024, 2048)


def test_a_preset_is_asked_for():
    done = subprocess.run(
        [sys.executable, "-m", "assay.cli", "bench", "loop"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "name a preset" in done.stderr
