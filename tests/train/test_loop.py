import json
import math
import re
from pathlib import Path

import jax
import pytest

import assay
import assay.api
from assay.errors import AssayError
from assay.spec.run import BudgetSpec
from assay.train import loop, plot
from assay.train.checkpoint import Checkpoints
from assay.train.loop import read_run, train
from assay.train.progress import Reporter, Silent
from assay.train.tracking import Tracker
from tests.train.conftest import lines

DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def test_what_the_docs_pass_from_python_works(corpus, capsys, monkeypatch):
    trained = []
    monkeypatch.setattr(assay.api, "train", lambda *args, **options: trained.append(options))
    reporter, loop = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    exec(reporter, {"assay": assay})
    asked = {name for name in vars(Reporter) if not name.startswith("_")}
    assert all(callable(getattr(trained[0]["reporter"], name)) for name in asked)
    small = f'"data.sources": [{{"corpus": "{corpus}"}}], "model.d_model": 32, "data.batch_size": 4'
    small = f'"model.decoder.num_layers": 1, {small}'
    exec(loop.replace('"data.batch_size": 4', small).replace("run.seed), 20", "run.seed), 2"), {})
    assert re.fullmatch(r"5\.\d+ nats a token\n", capsys.readouterr().out)


def test_a_run_leaves_what_is_promised(run, tmp_path):
    out = tmp_path / "out"
    result = train(run.changed({"train.budget.amount": 25}), out)
    for name in ("run.json", "metrics.jsonl", "result.json", "assay_tokenizer.json"):
        assert (out / name).is_file(), name
    about = json.loads((out / "run.json").read_text())
    assert about["spec"]["model"]["vocab_size"] == 257
    assert about["versions"]["jax"]
    assert len(about["data"]["fingerprint"]) == 64
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [10, 20, 25, 25]
    assert records[1]["tokens"] == 20 * 8 * 16
    assert {name for record in records for name in record} <= {*re.findall(r"`(\w+)`", DOCS)}
    assert records[-1]["val_loss"] == result.val_loss
    assert records[2]["loss"] == result.train_loss
    assert (result.steps, result.tokens, result.finished) == (25, 25 * 8 * 16, True)
    assert result.val_loss < math.log(257)
    bytes_held = about["data"]["sources"][0]["held_out_bytes"]
    tokens_held = about["data"]["sources"][0]["held_out_tokens"]
    expected = result.val_loss * tokens_held / bytes_held / math.log(2)
    assert result.val_bpb == pytest.approx(expected, rel=1e-6)
    assert json.loads((out / "result.json").read_text())["val_bpb"] == result.val_bpb


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (BudgetSpec(unit="tokens", amount=1000), 8),  # 128 tokens an update: rounded up
        (BudgetSpec(unit="flops", amount=1e7), None),
    ],
)
def test_budgets_in_other_units(run, tmp_path, budget, steps):
    from assay.spec.accounting import flops_per_token

    changes = {"train.budget": budget.model_dump(), "schedule.warmup": 8}
    reporter, notes = Silent(), []
    reporter.note = notes.append
    result = train(run.changed(changes), tmp_path / "out", reporter=reporter)
    warm = [note for note in notes if "warm-up of 8 updates (schedule.warmup) takes the" in note]
    assert len(warm) == (result.steps <= 8)
    a_token = flops_per_token(run.model, 16).train
    assert result.steps == (steps or math.ceil(1e7 / (a_token * 128)))


def test_a_budget_of_seconds_is_kept_and_decays_to_its_end(run, tmp_path):
    budget = {"unit": "seconds", "amount": 3.0}
    result = train(run.changed({"train.budget": budget, "schedule": "linear"}), tmp_path / "out")
    assert result.finished
    assert 3.0 <= result.seconds < 5.0
    rates = [line["lr"] for line in lines(tmp_path / "out")]
    assert rates[-1] < 0.2 * run.optimizer.lr


def test_a_loss_that_is_no_number_stops_the_run(run, tmp_path):
    """With the step and the cause, and the last good checkpoint whole."""
    out = tmp_path / "out"
    wild = run.changed(
        {
            "optimizer": {"kind": "sgd", "lr": 1e22},  # logits then overflow in the next step
            "model.decoder.final_norm": None,
            "schedule": {"kind": "constant", "warmup": 0},
            "train.checkpoint_every": 1,
        }
    )
    with pytest.raises(AssayError, match=r"step \d+") as caught:
        train(wild, out)
    assert "nan" in str(caught.value) or "inf" in str(caught.value)
    assert "last good one" in str(caught.value)
    step = Checkpoints(out / "checkpoints").latest()
    assert f"The checkpoint of step {step} is" in str(caught.value)
    from assay.loading import load

    assert load(out).step == step
    assert not (out / "result.json").exists()


def test_the_target_ends_the_run(run, tmp_path):
    run = run.changed({"train.target_loss": 5.0, "train.eval_every": 5})
    result = train(run, tmp_path / "out")
    assert result.stopped_by == "target"
    assert result.val_loss <= 5.0
    assert result.steps < 40
    assert result.steps % 5 == 0


def test_a_run_may_be_scored_on_validation_text_alone(run, tmp_path):
    with pytest.raises(AssayError, match=r"data\.validation is 0"):
        run.at("train.score", "validation")
    run = run.changed({"data.validation": 0.2, "train.budget.amount": 5})
    held = train(run, tmp_path / "held")
    chosen = train(run.at("train.score", "validation"), tmp_path / "chosen")
    assert chosen.train_loss == held.train_loss
    assert chosen.val_loss != held.val_loss
    (source,) = json.loads((tmp_path / "chosen" / "run.json").read_text())["data"]["sources"]
    expected = chosen.val_loss * source["validation_tokens"] / source["validation_bytes"]
    assert chosen.val_bpb == pytest.approx(expected / math.log(2), rel=1e-6)


def test_a_mesh_that_does_not_divide_is_named(run, tmp_path):
    with pytest.raises(AssayError, match=r"tensor=5 does not divide model\..*kv_heads \(2\)"):
        train(run.changed({"mesh.tensor": 5}), tmp_path / "out")
    with pytest.raises(AssayError, match=r"needs 16 devices; found 8 .*--mesh data=1"):
        train(run.changed({"mesh.tensor": 2, "mesh.data": 8}), tmp_path / "out2")


def test_where_no_folder_can_be(run, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(AssayError, match="file: it is a file, where a folder"):
        train(run, file)
    with pytest.raises(AssayError, match="x: the folder cannot be made"):
        train(run, file / "x")
    with pytest.raises(AssayError, match="stop_at: found -1"):
        train(run, tmp_path / "out", stop_at=-1)


def test_held_out_text_of_no_bytes_is_drawn_without_them(tmp_path):
    lines = [
        {"step": 1, "tokens": 4, "loss": 1.0, "loss_window": 1.0, "bpb": 2.0},
        {"step": 1, "val_loss": 1.0, "val_bpb": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert plot.plot_losses(tmp_path, title="run").is_file()


def test_no_memory_is_a_sentence_that_names_ways_out(run, tmp_path, monkeypatch):
    def fails(*_):
        raise jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: Out of memory allocating {3 * 2**29} bytes."
        )

    monkeypatch.setattr(loop, "_train", fails)
    with pytest.raises(AssayError, match=r"1\.5 GiB.*batch_size.*accumulate.*remat.*assay plan"):
        train(run, tmp_path / "out")


EXPECTED = {
    *("train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/tokens_per_second"),
    *("val/loss", "val/bpb"),
}


def tensorboard_scalars(out):
    """{tag: [(step, value), ...]}, as TensorBoard itself reads the run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_tensorboard_gets_the_names_people_expect(run, tmp_path):
    """Read back by its own reader, over a stop."""
    out = tmp_path / "out"
    run = run.changed({"train.budget.amount": 20})
    train(run, out, trackers=("tensorboard",), stop_at=10)
    train(run, out, trackers=("tensorboard",), resume=True)
    found = tensorboard_scalars(out)
    assert found.keys() >= EXPECTED
    for name, theirs in (("loss", "train/loss"), ("lr", "train/lr")):
        wanted = {line["step"]: line[name] for line in lines(out) if name in line}
        assert dict(found[theirs]) == pytest.approx(wanted)
    assert [step for step, _ in found["train/loss"]] == [10, 20]
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["val/loss"][-1] == (20, pytest.approx(last["val_loss"]))


def test_tensorboard_forgets_what_a_resumed_run_makes_again(run, tmp_path):
    for start, value in ((0, 3.0), (10, 2.0)):
        tracker = Tracker(tmp_path, run, ("tensorboard",), step=start)
        for step in (10, 20, 30)[start // 10 :]:
            tracker.write({"step": step, "loss": value})
        tracker.close()
    assert tensorboard_scalars(tmp_path)["train/loss"] == [(10, 3.0), (20, 2.0), (30, 2.0)]


def wandb_records(path):
    """The records of a W&B file, read by hand: LevelDB's log in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    raw, at, parts = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # too little for a header: filled with zeros
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_wandb_gets_the_same_offline(run, tmp_path):
    """And a run that goes on is the same one."""
    out = tmp_path / "out"
    run = run.changed({"train.budget.amount": 20})
    train(run, out, trackers=("wandb",), stop_at=10)
    train(run, out, trackers=("wandb",), resume=True)
    first, second = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.stem == second.stem
    history, config = {}, {}
    for record in [*wandb_records(first), *wandb_records(second)]:
        values = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
        if values:
            values = {name: json.loads(value) for name, value in values.items()}
            history.setdefault(values["_step"], {}).update(values)
        config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    assert history.keys() == {10, 20}
    assert history[20].keys() >= EXPECTED
    for line in lines(out):
        assert history[line["step"]]["train/loss"] == pytest.approx(line["loss"])
    assert config["seed"] == run.seed


def test_run_json_gives_the_run_back(run, tmp_path):
    train(run.changed({"train.budget.amount": 1}), tmp_path / "out")
    assert read_run(tmp_path / "out") == run.changed({"train.budget.amount": 1})
