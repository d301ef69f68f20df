"""A run that goes on elsewhere: which examples it has seen, and what it computes from then on.

The corpus counts upwards, so that the first id of a row says where in the text the row is from.
"""

import numpy as np
import pytest

from assay.data import loader
from assay.loading import load
from assay.model.sharding import make_mesh
from assay.spec import presets
from assay.spec.run import MeshSpec
from assay.train import loop
from tests.train.conftest import lines

SEQ_LEN, BATCH, STEPS = 4, 4, 20
CHAIN = [  # 20 updates on each
    MeshSpec(fsdp=4, tensor=2),
    MeshSpec(fsdp=4, tensor=2),
    MeshSpec(data=2, fsdp=2),
    MeshSpec(tensor=2),
    MeshSpec(),
]


@pytest.fixture
def run(tmp_path):
    """As many windows as the chain's updates have rows: one epoch."""
    windows = STEPS * len(CHAIN) * BATCH
    train = (windows - 1) * SEQ_LEN + 2  # a window more than fit, wherever an epoch begins
    ids = np.arange(-(-10 * train // 9), dtype=np.uint16)  # the last tenth is held out
    np.save(tmp_path / "ids.npy", ids)
    return presets.get("tiny-gpt").run.changed(
        {
            "model.d_model": 32,
            "model.decoder.num_layers": 1,
            "model.decoder.pattern.*.feed_forward.hidden": 64,
            "data.sources": [{"corpus": str(tmp_path / "ids.npy")}],
            "data.tokenizer": {"kind": "ids", "vocab_size": len(ids)},
            "data.seq_len": SEQ_LEN,
            "data.batch_size": BATCH,
            "train.budget.amount": STEPS * len(CHAIN),
            "train.log_every": 1,
        }
    )


@pytest.fixture
def seen(monkeypatch):
    """Number of a batch -> its ids, of every batch that a run takes."""
    taken: dict[int, np.ndarray] = {}

    class Watched(loader.Batches):
        def __next__(self):
            index = self.index
            batch = super().__next__()
            taken[index] = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
            return batch

    monkeypatch.setattr(loader, "Batches", Watched)
    return taken


def test_eight_devices_go_on_as_four_two_and_one(run, seen, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    every = run.replace(mesh=CHAIN[0])
    loop.train(every, whole)
    alone = dict(seen)
    losses = {line["step"]: line["loss"] for line in lines(whole)}
    steps = range(1, STEPS * len(CHAIN) + 1)
    assert list(losses) == list(steps)
    seen.clear()
    for number, mesh in enumerate(CHAIN):
        loop.train(run.replace(mesh=mesh), out, resume=number > 0, stop_at=STEPS * (number + 1))
        if number == 1:
            same_mesh = {line["step"]: line["loss"] for line in lines(out)}
    # ---- no example lost, none twice: each id of the training part is a target, no row comes again
    assert seen.keys() == alone.keys() == {step - 1 for step in steps}
    for index, rows in alone.items():
        np.testing.assert_array_equal(seen[index], rows)
    rows = np.concatenate(list(seen.values()))
    assert len(np.unique(rows[:, 0])) == len(rows) == STEPS * len(CHAIN) * BATCH
    prepared = loader.prepare(run.data)
    assert set(rows[:, 1:].ravel()) == set(np.asarray(prepared.train[0].ids[1:]))
    # ---- the same losses: bit for bit on the same mesh, to 1e-4 after each change
    found = {line["step"]: line["loss"] for line in lines(out)}
    assert same_mesh == {step: losses[step] for step in steps[: 2 * STEPS]}
    assert found.keys() == losses.keys()
    for step in steps:
        assert found[step] == pytest.approx(losses[step], rel=1e-4), step
    # ---- what was trained is read onto a mesh, each device's part alone
    matrix = load(out).model.layers[0].attention.q.w[...]
    split = load(out, mesh=make_mesh(MeshSpec(data=2, fsdp=2))).model.layers[0].attention.q.w[...]
    assert split.sharding.shard_shape(split.shape) == (matrix.shape[0] // 2, matrix.shape[1])
    np.testing.assert_array_equal(split, matrix)
