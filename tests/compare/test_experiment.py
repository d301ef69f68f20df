"""Experiment files: what they mean, and what is refused before anything runs."""

from pathlib import Path

import pytest

from assay.compare.experiment import read, resolve, tuned
from assay.compare.runner import _difference, decide_jobs, reported_jobs, tuning_jobs
from assay.compare.sizes import measure, solve
from assay.errors import AssayError
from assay.spec import presets

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "compare").glob("*.toml"))

HEAD = """
[base]
preset = "tiny-gpt"
[base.set]
"model.decoder.num_layers" = 2
"""
BUDGET = """
[budget]
unit = "flops"
amount = 1e10
"""
TWO = """
[variants.plain]
[variants.gated]
set."model.decoder.pattern.*.feed_forward.gated" = true
"""


@pytest.fixture
def plan_of(tmp_path):
    """The plan of an experiment's text, on a small corpus of bytes."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("to be or not to be, that is the question. " * 200)
    data = f'[data]\ncorpus = "{corpus}"\ntokenizer = "byte"\nseq_len = 32\nbatch_size = 4\n'

    def plan(text: str, **options):
        (tmp_path / "e.toml").write_text(text + data)
        return resolve(read(tmp_path / "e.toml"), tmp_path, **options)

    return plan


# ---------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + BUDGET + TWO + "[desing]\nseeds = 3\n", "desing: .*did you mean 'design'"),
        (HEAD + BUDGET + TWO + "[design]\nseed = 3\n", "design.seed: .*did you mean 'seeds'"),
        (HEAD + TWO + '[budget]\nunit = "flop"\namount = 1\n', "budget.unit: .*'flops'"),
        (HEAD + BUDGET + '[variants."a b"]\n', "variants: found 'a b'"),
        (HEAD + BUDGET, "variants: this field is required"),
        (BUDGET + TWO + "[base]\n", "preset: give either a preset or a spec"),
        (HEAD + BUDGET + TWO + '[design]\nbase = "plan"\n', "did you mean 'plain'"),
        (HEAD + BUDGET + TWO + "[design]\nseeds = [1, 1]\n", "give different seeds"),
        (HEAD + BUDGET + TWO + "[design]\nseeds = 5\nlooks = [3, 6]\n", r"looks: found \[3, 6\]"),
        (HEAD + BUDGET + '[variants.a]\nset."seed" = 3\n', "'seed', which is the same for all"),
        (HEAD + BUDGET + '[variants.a]\nset."train.budget.amount" = 3\n', "the same for all"),
        (HEAD + BUDGET + '[variants.a]\nsolve.path = "model.d_model"\n', r"a\.solve\.like"),
        (
            HEAD + BUDGET + TWO + '[learning_rate]\nkind = "tune"\nseeds = [4]\n',
            "found 4, which is a reported seed",
        ),
        ("a = ", "it is not TOML"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path, text, says):
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(AssayError, match=says):
        read(tmp_path / "e.toml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            HEAD + BUDGET + '[variants.a]\nset."model.decoder.num_layer" = 3\n',
            r"variants\.a\.set: model\.decoder\.num_layer.*did you mean 'num_layers'",
        ),
        (
            HEAD + BUDGET + TWO + '[learning_rate]\nkind = "mup"\nbase_width = 50\n',
            r"variants\.plain: .*mup\.base_width: found 50, but there is no such model",
        ),
        (
            HEAD + BUDGET.replace("[budget]", '[budget]\nequal = ["params"]') + TWO,
            r"'gated' has params [\d,]+, but 'plain' [\d,]+; .*variants\.gated\.solve",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_is(plan_of, text, says):
    with pytest.raises(AssayError, match=says):
        plan_of(text)


def test_a_variant_is_the_base_with_its_difference(plan_of):
    plan = plan_of(HEAD + BUDGET + TWO)
    plain, gated = plan.entries
    base = presets.get("tiny-gpt").run
    assert plain.run.model.vocab_size == 257
    assert plain.run.model.decoder == base.model.decoder.replace(num_layers=2)
    path = "decoder.pattern.*.feed_forward.gated"
    assert gated.run.model == plain.run.model.at(path, True)
    assert gated.run.replace(model=plain.run.model) == plain.run
    assert gated.differs == ()
    assert plan.pairs() == [("plain", "gated")]
    assert plan.seeds == (0, 1, 2, 3, 4)


def test_another_presets_model_and_fields_that_hold_nothing(plan_of):
    text = HEAD + BUDGET + '[variants.a]\n[variants.b]\npreset = "mqa"\n'
    _, other = plan_of(text + 'unset = ["model.decoder.final_norm"]\n').entries
    assert other.run.model.decoder.pattern == presets.get("mqa").model.decoder.pattern
    assert other.run.model.decoder.final_norm is None
    assert other.run.data.seq_len == 32


def test_what_but_the_model_differs_is_said(plan_of):
    text = HEAD + BUDGET + '[variants.a]\n[variants.b]\nset."optimizer.lr" = 0.1\n'
    _, other = plan_of(text + 'set."data.batch_size" = 8\n').entries
    assert other.differs == ("optimizer", "data.batch_size")


def test_steps_replace_the_budget(plan_of):
    plan = plan_of(HEAD + BUDGET + TWO, steps=7)
    assert {e.run.train.budget.unit for e in plan.entries} == {"steps"}
    assert {e.run.train.budget.amount for e in plan.entries} == {7}


def test_stops_fall_on_lines_of_the_metrics(plan_of):
    train = plan_of(HEAD + BUDGET + TWO, steps=1234).entries[0].run.train
    assert (train.eval_every, train.checkpoint_every) == (120, 240)


def test_a_ladder_has_a_row_for_each_size_and_pairs_within_it(plan_of):
    text = HEAD + BUDGET + TWO + "[ladder.small]\n[ladder.large]\namount = 4e10\n"
    plan = plan_of(text + 'set."model.d_model" = 256\n')
    assert [e.name for e in plan.entries] == [
        "plain@small", "gated@small", "plain@large", "gated@large",
    ]  # fmt: skip
    assert plan.pairs() == [("plain@small", "gated@small"), ("plain@large", "gated@large")]
    assert [e.run.train.budget.amount for e in plan.entries] == [1e10, 1e10, 4e10, 4e10]
    assert plan.entries[2].run.model.d_model == 256


def test_a_base_may_be_a_spec_of_ones_own(plan_of, tmp_path):
    head = '[base]\nspec = "my.json"\n'
    run = presets.get("tiny-gpt").run.changed({"model.d_model": 64, "optimizer.lr": 0.5})
    for spec, rate in ((run, 0.5), (run.model, 1e-3)):  # a run's, or a model's in a default run
        (tmp_path / "my.json").write_text(spec.to_json())
        plain, _ = plan_of(head + BUDGET + TWO).entries
        assert plain.run.model == run.model.with_vocab(257)
        assert plain.run.optimizer.lr == rate
    (tmp_path / "my.json").write_text("{}")
    with pytest.raises(AssayError, match=r"base.spec: .*my.json: is neither a model's spec \(voc"):
        plan_of(head + BUDGET + TWO)


def test_a_base_is_what_the_others_are_compared_with(plan_of):
    text = HEAD + BUDGET + TWO + '[variants.third]\n[design]\nbase = "gated"\n'
    assert plan_of(text).pairs() == [("plain", "gated"), ("third", "gated")]


def test_a_design_that_changed_is_another_comparison(plan_of):
    one, other = plan_of(HEAD + BUDGET + TWO), plan_of(HEAD + BUDGET + TWO + "[design]\nseeds=6\n")
    assert one.identity() == plan_of(HEAD + BUDGET + TWO).identity()
    assert _difference(one.identity(), other.identity()) == "design.seeds"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_run(path):
    plan = resolve(read(path), path.parent)
    assert len(plan.seeds) >= 3
    assert len(plan.entries) >= 2


# ---------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("quantity", ["params", "active_params", "flops_per_token"])
def test_a_width_is_found_that_makes_variants_equal(plan_of, quantity):
    text = HEAD + BUDGET + TWO + f'solve = {{ path = "{HIDDEN}", quantity = "{quantity}" }}\n'
    plain, gated = plan_of(text).entries
    (found,) = gated.solved
    assert found.before == 512
    assert found.after == 344  # 2/3 of 512, to a multiple of 8
    assert found.found == gated.sizes[quantity] == pytest.approx(plain.sizes[quantity], rel=0.02)
    assert gated.run.model.decoder.pattern[0].feed_forward.hidden == found.after
    assert gated.changes[HIDDEN] == found.after


HIDDEN = "model.decoder.pattern.*.feed_forward.hidden"


def test_the_value_found_is_the_nearest_of_all():
    run = presets.get("tiny-gpt").run
    for wanted in (7e5, 1.1e6, 3e6):
        got, (found,) = solve(run, (HIDDEN,), "params", wanted)
        every = [measure(run.at(HIDDEN, 8 * i), "params") for i in range(1, 600)]
        assert abs(measure(got, "params") - wanted) == min(abs(size - wanted) for size in every)
        assert found.after % 8 == 0


def test_illegal_widths_are_passed_over_and_ratios_kept():
    run = presets.get("tiny-gpt").run  # 4 heads: d_model must be a multiple of 4
    got, found = solve(run, ("model.d_model", HIDDEN), "params", 2e6, multiple=6)
    assert got.model.d_model % 12 == 0
    assert found[1].after == pytest.approx(4 * got.model.d_model, abs=6)
    assert measure(got, "params") == pytest.approx(2e6, rel=0.1)


def test_layers_are_found_one_by_one():
    run = presets.get("tiny-gpt").run
    wanted = measure(run.at("model.decoder.num_layers", 7), "flops_per_token")
    got, _ = solve(run, ("model.decoder.num_layers",), "flops_per_token", wanted)
    assert got.model.decoder.num_layers == 7


def test_a_size_out_of_reach_is_refused(plan_of):
    run = presets.get("tiny-gpt").run
    with pytest.raises(AssayError, match="one whole number"):
        solve(run, ("model.decoder.pattern",), "params", 1e6)
    with pytest.raises(AssayError, match=r"no legal value of data\.batch_size"):
        solve(run, ("data.batch_size",), "params", 1e9)
    text = HEAD + BUDGET + TWO + f'solve = {{ path = "{HIDDEN}", multiple = 256 }}\n'
    with pytest.raises(AssayError, match=r"the nearest is .* = 256, .*over the tolerance of 2.0%"):
        plan_of(text)


# ---------------------------------------------------------------------------- runs


def test_tuning_touches_no_seed_and_no_text_that_is_reported(plan_of, tmp_path):
    text = HEAD + BUDGET + TWO + '[learning_rate]\nkind = "tune"\nseeds = [7, 8]\nshare = 0.5\n'
    plan = plan_of(text)
    trials = tuning_jobs(plan, tmp_path)
    reported = reported_jobs(plan, tmp_path, {"plain": 0.5, "gated": 2.0})
    assert len(trials) == 2 * 3
    tuned = [job.run for jobs in trials.values() for job in jobs]
    assert len(tuned) == 2 * 3 * 2
    assert {run.seed for run in tuned} == {7, 8}
    assert {run.train.score for run in tuned} == {"validation"}
    assert {run.train.budget.amount for run in tuned} == {0.5e10}
    assert not {job.run.seed for job in reported} & {7, 8}
    assert {job.run.train.score for job in reported} == {"held_out"}
    # Neither trains on the text that rates are chosen by.
    assert {run.data.validation for run in tuned} == {0.1}
    assert {job.run.data.validation for job in reported} == {0.1}
    lr = presets.get("tiny-gpt").run.optimizer.lr
    assert {(j.entry.name, j.run.optimizer.lr / lr) for j in reported} == {
        ("plain", 0.5),
        ("gated", 2.0),
    }


def test_runs_of_a_seed_share_everything_but_the_model(plan_of, tmp_path):
    jobs = reported_jobs(plan_of(HEAD + BUDGET + TWO), tmp_path, {})
    assert [job.name for job in jobs[:4]] == ["plain-s0", "gated-s0", "plain-s1", "gated-s1"]
    first, second = jobs[2].run, jobs[3].run
    assert first.seed == second.seed == 1
    assert first.replace(model=second.model) == second


def test_where_time_counts_one_run_goes_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "e.toml"

    def jobs(text, asked=None):
        file.write_text(text)
        return decide_jobs(read(file), asked, None)

    assert jobs(HEAD + BUDGET + TWO, 3) == 3
    assert jobs(HEAD + BUDGET + TWO) >= 1
    seconds = '[budget]\nunit = "seconds"\namount = 3\n'
    assert jobs(HEAD + seconds + TWO) == 1
    assert jobs(HEAD + BUDGET + TWO + "[running]\ntimed = true\n") == 1
    with pytest.raises(AssayError, match="one run has the machine to itself"):
        jobs(HEAD + seconds + TWO, 2)


MUP = '[learning_rate]\nkind = "mup"\nbase_width = 32\ngrid = [1.0, 2.0]\nshare = 0.5\n'
WIDTHS = """
[ladder.narrow]
set."model.d_model" = 64
set."model.decoder.pattern.*.feed_forward.hidden" = 256
[ladder.wide]
"""


def test_mup_tunes_each_variant_once_at_the_base_width(plan_of, tmp_path):
    """Two widths of one variant share their base; the rate is each one's own, the updates too."""
    plan = plan_of(HEAD + BUDGET + TWO + MUP + WIDTHS, steps=20)
    assert {entry.run.model.mup.base_width for entry in plan.entries} == {32}
    assert [entry.run.model.d_model for entry in plan.entries] == [64, 64, 128, 128]
    trials = tuning_jobs(plan, tmp_path)
    assert [*trials] == [(f"{name}@narrow", f) for name in ("plain", "gated") for f in (1.0, 2.0)]
    for (_, factor), (job,) in trials.items():
        assert job.run.model == job.entry.run.model.at_width(32).replace(mup=job.run.model.mup)
        assert (job.run.model.mup.base_width, job.run.model.d_model) == (32, 32)
        assert job.run.optimizer.lr == factor * job.entry.run.optimizer.lr
        assert job.run.train.budget.amount == 10
        assert job.run.train.score == "validation"


def test_rungs_of_other_lengths_share_a_trial(plan_of, tmp_path):
    """Their evaluations and checkpoints are at other steps, which are no part of what is tried."""
    plan = plan_of(HEAD + BUDGET + TWO + MUP + WIDTHS + "amount = 1e11\n")
    assert len({entry.run.train.eval_every for entry in plan.entries}) == 2
    rows = [("plain@narrow", "plain@wide"), ("gated@narrow", "gated@wide")]
    assert [tuple(entry.name for entry in entries) for _, entries in tuned(plan)] == rows


def test_a_rate_that_is_known_at_the_base_width_is_not_tuned(plan_of, tmp_path):
    plan = plan_of(HEAD + BUDGET + TWO + MUP + "lr = 0.02\n")
    assert tuning_jobs(plan, tmp_path) == {}
    assert {entry.run.optimizer.lr for entry in plan.entries} == {0.02}
    assert {entry.run.data.validation for entry in plan.entries} == {0.0}
