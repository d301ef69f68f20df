"""Curves from metrics, and the answer in words."""

import json
from dataclasses import replace

import pytest

from assay.compare.experiment import Entry, Experiment, Plan
from assay.compare.record import Job, notes, read_run, sentence, surroundings
from assay.compare.results import Pair, Row
from assay.compare.sizes import only_warmed_up
from assay.spec import presets
from assay.spec.accounting import flops_per_token, only_warm_up

RUN = presets.get("tiny-gpt").run.changed({"train.budget": {"unit": "steps", "amount": 30}})
ENTRY = Entry("a", "a", None, RUN, {}, (), {"params": 1, "active_params": 1}, ())


def folder_with(path, lines):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Job("a-s0", ENTRY, RUN, path)


def line(step, **more):
    defaults = {
        "tokens": step * 768,
        "seconds": step / 10,
        "loss": 3.0,
        "loss_window": 5 - step / 10,
    }
    return {"step": step} | defaults | more


def test_a_curve_is_the_same_for_a_run_that_was_stopped_on_its_way(tmp_path):
    whole = [line(10), line(20), {"step": 20, "val_loss": 2.0, "val_bpb": 1.5}, line(30)]
    stopped = [whole[0], line(17, loss_window=9.0), *whole[1:]]
    a = read_run(folder_with(tmp_path / "whole", whole), tmp_path)
    b = read_run(folder_with(tmp_path / "stopped", stopped), tmp_path)
    assert a.curve == b.curve
    assert [p.step for p in a.curve] == [10, 20, 30]
    assert [p.val_bpb for p in a.curve] == [None, 1.5, None]
    assert [p.train_loss for p in a.curve] == [4.0, 3.0, 2.0]
    a_step = flops_per_token(RUN.model, RUN.data.seq_len).train * 12 * 64
    assert a.curve[1].flops == 20 * a_step
    assert a.status == "running"


def test_a_long_curve_keeps_means_of_what_it_leaves_out(tmp_path):
    lines = [line(10 * i, loss_window=float(i)) for i in range(1, 1001)]
    record = read_run(folder_with(tmp_path / "long", lines), tmp_path)
    assert len(record.curve) == 200
    assert record.curve[0].step == 50
    assert record.curve[0].train_loss == pytest.approx(3.0)  # of windows 1 to 5
    assert record.curve[-1].step == 10_000


# ---------------------------------------------------------------------------- in words


def row(name, mean):
    return Row(
        name=name, variant=name, params=1, active_params=1, train_flops=1.0, tokens=1.0,
        seconds=1.0, seeds=(0, 1, 2), val_bpb_mean=mean, val_bpb_ci95=(None, None),
        val_bpb_anytime95=(None, None), rank=None, lr=None, flops_per_token_forward=1,
        flops_per_token_train=3, kv_bytes_per_token=1,
    )  # fmt: skip


def pair(a, b, difference, verdict):
    return Pair(
        a=a, b=b, difference=difference, ci95=(difference - 0.01, difference + 0.01),
        anytime95=(None, None), simultaneous95=(None, None), deviation=0.01, p=0.01,
        p_adjusted=0.01, verdict=verdict, reason="", seeds=(0, 1, 2), seeds_needed=None,
        seeds_needed_anytime=None, smallest_difference=None,
    )  # fmt: skip


def plan(base=None, unit="steps"):
    experiment = Experiment.from_data(
        {
            "base": {"preset": "tiny-gpt"},
            "budget": {"unit": unit, "amount": 1},
            "variants": {"a": {}, "b": {}, "c": {}},
            "design": {"base": base} if base else {},
        }
    )
    return Plan(experiment, (ENTRY,), {})


@pytest.mark.parametrize(
    ("verdicts", "base", "says"),
    [
        (
            ("better", "better", "undecided"),
            None,
            "a is the best of 3 with 3 seeds: 1.0000 bits per byte, 0.1000 below b (95 % interval "
            "0.0900 to 0.1100).",
        ),
        (("undecided",) * 3, None, "No difference between a, b and c could be told with 3 seeds"),
        (("equivalent",) * 3, None, "a, b and c are equivalent, with 3 seeds"),
        (
            ("undecided", "better", "better"),
            None,
            "Which of a or b is best could not be told with 3 seeds; c is worse.",
        ),
        (
            ("equivalent", "better", "undecided"),
            None,
            "a and b are equivalent and the best of 3, with 3 seeds; c is worse than at least one",
        ),
    ],
)
def test_the_answer_in_words(verdicts, base, says):
    rows = [row("a", 1.0), row("b", 1.1), row("c", 1.2)]
    names = [("a", "b"), ("a", "c"), ("b", "c")]
    pairs = [pair(*n, -0.1, v) for n, v in zip(names, verdicts, strict=True)]
    assert says in sentence(plan(base), rows, pairs)


def test_the_answer_of_two():
    rows = [row("a", 1.0), row("b", 0.9)]
    assert sentence(plan(), rows, [pair("a", "b", 0.1, "worse")]) == (
        "b is better than a with 3 seeds: 0.9000 bits per byte, 0.1000 below (95 % interval "
        "0.0900 to 0.1100)."
    )


def test_the_answer_against_a_fixed_base():
    rows = [row("a", 1.0), row("b", 1.1), row("c", 1.2)]
    pairs = [pair("b", "a", 0.1, "worse"), pair("c", "a", 0.2, "undecided")]
    assert sentence(plan("a"), rows, pairs) == (
        "Against a, with 3 seeds: b (+0.1000 bits per byte, 95 % interval of the difference "
        "+0.0900 to +0.1100) is worse; no difference could be told for c."
    )


# ---------------------------------------------------------------------------- at what cost


def costing(flops, seconds=(1.0, 1.0)):
    rows = [row("a", 1.0), row("b", 0.9)]
    costs = zip(rows, flops, seconds, strict=True)
    return [r.replace(train_flops=spent, seconds=time) for r, spent, time in costs]


@pytest.mark.parametrize(
    ("unit", "flops", "says"),
    [
        ("steps", (1.28e10, 3.4e10), "not at equal cost: b spends 2.7 times a's training FLOPs."),
        ("tokens", (0.0, 3.4e10), "not at equal cost: b spends training FLOPs, a none."),
        ("steps", (1e10, 1.09e10), "0.0900 to 0.1100)."),
        ("flops", (1e10, 2e10), "0.0900 to 0.1100)."),
        ("seconds", (1e10, 2e10), "0.0900 to 0.1100)."),
    ],
)  # fmt: skip
def test_the_answer_says_where_the_costs_were_not_equal(unit, flops, says):
    told = sentence(plan(unit=unit), costing(flops), [pair("a", "b", 0.1, "worse")])
    assert told.endswith(says)


FLOPS = (
    "At equal {unit} the variants do not spend equal training FLOPs: a run of a 1.28e+10, of b "
    "3.4e+10, 2.7 times as much. budget.unit = 'flops' makes them equal."
)
SECONDS = (
    "At equal {unit} the variants do not spend equal seconds of training: a run of a 1, of b 1.5, "
    "1.5 times as much. budget.unit = 'seconds' makes them equal."
)


def test_a_run_of_warm_up_alone_is_noted():
    said = (
        "The warm-up of {} updates (schedule.warmup) takes the whole run of 30 updates: the "
        "learning rate is not at its peak before the last of them."
    )
    longer = RUN.at("schedule.warmup", 50)
    assert only_warm_up(longer, 30) == said.format(50)
    assert only_warm_up(longer, 51) is None
    a = replace(ENTRY, run=RUN.at("schedule.warmup", 5))
    b = replace(ENTRY, name="b", run=longer)

    def noted(*entries):
        found = notes(Plan(plan().experiment, entries, {}), [], surroundings(1, 2, ""))
        return [note for note in found if "warm-up" in note]

    assert noted(a) == []
    assert noted(b) == [said.format(50)]
    assert noted(a, b) == [f"{said.format(50)} This is so of b."]
    assert only_warmed_up([("a", longer, None)]) is None  # of seconds, before it is measured


@pytest.mark.parametrize(
    ("unit", "jobs", "says"),
    [
        ("steps", 1, [FLOPS, SECONDS]),
        ("tokens", 2, [FLOPS]),  # of seconds nothing is known
        ("flops", 1, [SECONDS]),
        ("seconds", 1, [FLOPS]),
    ],
)
def test_costs_that_the_budget_left_unequal_are_noted(unit, jobs, says):
    rows = costing((1.28e10, 3.4e10), (1.0, 1.5))
    found = notes(plan(unit=unit), rows, surroundings(jobs, 2, "assay compare"))
    assert [note for note in found if "At equal" in note] == [s.format(unit=unit) for s in says]
    same = notes(plan(unit=unit), costing((1e10, 1e10)), surroundings(jobs, 2, ""))
    assert not [note for note in same if "At equal" in note]
