"""Training an encoder-decoder on pairs, by the same loop as everything else."""

import json
import math

import jax
import numpy as np
import pytest

from assay.errors import AssayError
from assay.loading import load
from assay.model.transformer import abstract, layout, name_leaves
from assay.spec.presets import PRESETS, shrink
from assay.spec.run import ConstantSchedule
from assay.train.loop import train
from assay.train.step import initial_state, make_step
from tests.train.conftest import lines


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "pairs.tsv"
    words = np.random.default_rng(0).integers(0, 5, (300, 4))
    texts = ["".join("abcde"[i] for i in row) for row in words]
    path.write_text("".join(f"{text}\té{text[::-1]}\n" for text in texts))
    changes = {
        "data.sources": [{"corpus": str(path)}],
        "data.seq_len": 8,
        "data.batch_size": 8,
        "model.d_model": 32,
        "model.encoder.num_layers": 1,
        "model.decoder.num_layers": 1,
        "model.encoder.pattern.0.attention.heads": 2,
        "model.decoder.pattern.0.attention.heads": 2,
        "model.decoder.pattern.0.cross.heads": 2,
        "model.encoder.pattern.0.feed_forward.hidden": 32,
        "model.decoder.pattern.0.feed_forward.hidden": 32,
        "model.decoder.pattern.0.dropout": 0.1,
        "model.vocab_multiple": 8,
        "optimizer": "adamw",
        "train.budget.amount": 12,
    }
    return PRESETS["nano-seq2seq"].run.changed(changes)


def test_a_run_and_its_resumption(run, tmp_path):
    """Stopped, gone on with, and scanned on a mesh: the same losses; bits per byte of targets."""
    whole = train(run, tmp_path / "whole")
    train(run, tmp_path / "parts", stop_at=10)
    parts = train(run, tmp_path / "parts", resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert (parts.val_loss, parts.val_bpb) == (whole.val_loss, whole.val_bpb)
    size, tokens = 30 * (2 + 4), 30 * (2 + 4 + 1)  # é is two bytes, and the end is a token
    bits = whole.val_loss * tokens / math.log(2) / size
    assert whole.val_bpb == pytest.approx(bits)
    about = json.loads((tmp_path / "whole" / "run.json").read_text())["data"]["sources"][0]
    assert about["pairs"] == 270
    assert about["held_out_bytes"] == size
    sharded = run.changed({"mesh": {"data": 2, "tensor": 2}, "compute.scan_layers": True})
    other = train(sharded, tmp_path / "sharded")
    assert other.val_loss == pytest.approx(whole.val_loss, abs=2e-3)
    loaded = load(tmp_path / "sharded")
    assert loaded.model.encoder is not None
    split = run.at("train.accumulate", 2)
    assert train(split.at("train.budget.amount", 1), tmp_path / "split").train_loss > 0


def test_what_cannot_be_trained(run, tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("words " * 500)
    with pytest.raises(AssayError, match="holds no pairs of source and target"):
        train(run.at("data.sources.0.corpus", str(path)), tmp_path / "a")
    alone = PRESETS["nano"].run.changed(
        {"model.decoder.causal": False, "data.sources.0.corpus": str(path), "data.seq_len": 16}
    )
    with pytest.raises(AssayError, match=r"model.decoder.causal: found false"):
        train(alone, tmp_path / "b")
    learned = run.changed({"model.embedding.positions": "learned", "model.context": 8})
    long = tmp_path / "long.tsv"
    long.write_text("ab\tc\n" * 90 + "abcdefghijk\tc\n" * 10)
    with pytest.raises(AssayError, match="a source of 12 tokens is longer than"):
        train(learned.at("data.sources.0.corpus", str(long)), tmp_path / "c")


def test_the_loss_is_of_shifted_targets(run, tmp_path):
    """Fault of makeMoE: with unshifted targets a model learns to repeat its input at once.

    Targets are drawn apart from their sources: nothing can be learned but how often letters come,
    which is log 5 nats for each of 4 letters, and nearly 0 for the end after them.
    """
    rng = np.random.default_rng(1)
    drawn = ["".join("abcde"[i] for i in row) for row in rng.integers(0, 5, (800, 4))]
    path = tmp_path / "noise.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in zip(drawn[::2], drawn[1::2], strict=True)))
    run = run.changed(
        {
            "data.sources.0.corpus": str(path),
            "train.budget.amount": 150,
            "data.batch_size": 32,
            "optimizer.lr": 3e-3,
        }
    )
    result = train(run, tmp_path / "out")
    optimum = 4 * math.log(5) / 5
    assert optimum - 0.02 < result.val_loss < optimum + 0.15


@pytest.mark.parametrize("name", ["transformer-base", "jaxformers", "t5-small"])
def test_every_weight_moves_from_where_it_begins(name):
    """Fault of jaxformers: its encoder's feed-forward began at 0 in both matrices, for ever."""
    spec = shrink(PRESETS[name].model)
    run = PRESETS[name].run.replace(model=spec, schedule=ConstantSchedule())
    rng = np.random.default_rng(0)
    ids = rng.integers(spec.vocab_size, size=(3, 8, 16), dtype=np.int32)
    batch = dict(zip(("tokens", "targets", "source"), ids, strict=True))
    form, state = layout(spec, run.compute), initial_state(run)
    before = name_leaves(state.params, form)
    step = jax.jit(make_step(run, abstract(spec, run.compute)))
    for _ in range(2):
        state, _ = step(state, batch, np.float32(0))
    after = name_leaves(state.params, form)
    still = {key for key in before if np.array_equal(before[key], after[key])}
    assert not {key for key in still if not key.endswith(".k.b")}  # which the softmax cancels
    assert any(key.startswith("encoder.layers.1.feed_forward") for key in before)
