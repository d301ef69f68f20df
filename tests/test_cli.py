"""The command as scripts use it: fields of --json, exit statuses, one plain sentence."""

import json
import math
import subprocess
import sys

import pytest

from assay import cli
from assay.errors import AssayError
from assay.spec import presets
from tests.train.conftest import made_text


@pytest.fixture
def assay(assay_command):
    return assay_command


@pytest.fixture
def last_json(assay):
    def run(*arguments):
        status, out, err = assay(*arguments, "--json")
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    return run


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(made_text(2000))
    return path


SMALL = (
    *("--set", "model.decoder.num_layers=1", "--set", "model.d_model=32"),
    *("--set", "model.decoder.pattern.0.feed_forward.hidden=64"),
    *("--seq-len", 16, "--batch-size", 4, "--tokenizer", "byte", "--quiet"),
)


def test_presets_lists_every_one(last_json):
    rows = {row["name"]: row for row in last_json("presets")["presets"]}
    assert rows["gpt2"]["total_params"] == 124_439_808
    assert rows["llama-3-8b"]["context"] == 8192
    assert rows["bigram"]["total_params"] == 257**2
    fields = "name family source total_params active_params context vocabulary".split()
    assert all(list(row) == fields and row["source"] for row in rows.values())


def test_show_tells_what_an_architecture_costs(last_json, assay):
    shown = last_json("show", "gpt2")
    assert shown["total_params"] == shown["active_params"] == sum(shown["parameters"].values())
    assert shown["kv_bytes_per_token"] == 2 * 12 * 768 * 4
    assert shown["flops_per_token_train"] == 3 * shown["flops_per_token_forward"]
    assert shown["spec"]["d_model"] == 768
    changed = last_json("show", "gpt2", "--set", "model.decoder.num_layers=6")
    assert changed["spec"]["decoder"]["num_layers"] == 6
    _, out, _ = assay("show", "gpt2")
    assert "124,439,808" in out


def test_plan_says_what_it_planned(last_json, assay, monkeypatch):
    from assay.plan import planner

    monkeypatch.setattr(planner, "can_compile", lambda topology: False)
    assert last_json("plan", "nano", "--set", "data.seq_len=128")["seq_len"] == 128
    small = assay("plan", "nano", "--batch-size", 1)[1]
    assert "0.00 GiB" not in small
    assert "1 sequence " in small
    large = ("plan", "gpt2", "--topology", "v5e:2x2")
    said = " ".join(assay(*large)[1].split())
    assert "libtpu, is not installed; in Assay's folder: make dev, or uv pip install" in said
    assert "-e '.[plan]'" in said
    assert "(list price; --price sets yours)" in said
    asked = assay(*large, "--no-compile", "--price", "3")[1]
    assert "at $3.00 a chip-hour\n" in asked
    assert "not compiled" not in asked


def test_plan_of_a_whole_training(last_json, assay):
    asked = ("plan", "gpt2", "--topology", "v5e:2x2", "--no-compile", "--tokens", "2.5B")
    of = last_json(*asked, "--price", "2")["training"]
    assert of["tokens"] == 2_500_000_000
    assert of["updates"] == math.ceil(2.5e9 / (4 * 1024))
    assert of["dollars"] == pytest.approx(2 * of["device_hours"])
    assert of["device_hours"] == pytest.approx(4 * of["seconds"] / 3600)
    low, high = of["interval"]
    assert low < of["seconds"] < high
    assert "2,500,000,000 tokens: 610,352 updates, " in " ".join(assay(*asked)[1].split())


def test_plan_compares_machines(last_json, assay):
    asked = ("plan", "llama-3-8b", "--topology", "v5e:2x2,v5p:2x2x2,h100:8", "--search")
    speeds = [p["predicted_tokens_per_second"] for p in last_json(*asked)["machines"][:2]]
    assert speeds == sorted(speeds, reverse=True)  # a price is missing, so by speed
    plans = last_json(*asked, "--price", ",,2.99", "--tokens", "1T")["machines"]
    assert plans[-1]["topology"] == "v5e:2x2"  # in which it does not fit
    assert [plan["fits"] for plan in plans] == [True, True, False]
    costs = [plan["training"]["dollars"] for plan in plans]
    assert costs[0] < costs[1]
    said = " ".join(assay(*asked)[1].split())
    assert "v5e:2x2: does not fit." in said
    assert "no list price of h100:8" in said


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--tokens", "many"), "--tokens: found 'many'; a number is expected, as in 300B"),
        (("--tokens", "-5B"), "--tokens: found '-5B'"),
        (("--price", "cheap"), "--price: found 'cheap'; dollars a chip-hour are expected"),
        (("--price", "1,2,3"), "--price: found 3 prices of 2 machines; one for all"),
        (("--price", "-1"), "--price: found '-1'"),
    ],
)
def test_plan_refuses_what_is_no_number(assay, asked, told):
    code, _, error = assay("plan", "nano", "--topology", "v5e:2x2,h100:8", *asked)
    assert code == 2
    assert told in " ".join(error.split())


def test_plan_of_a_run_takes_its_batches_and_dtype(last_json, tmp_path):
    changes = {"data.batch_size": 24, "data.seq_len": 48, "compute.dtype": "float32"}
    run = presets.get("tiny-gpt").run.changed(changes)
    (tmp_path / "run.json").write_text(json.dumps({"spec": run.model_dump(mode="json")}))
    fields = ("batch_size", "seq_len", "dtype")
    planned = last_json("plan", tmp_path)
    assert [planned[field] for field in fields] == [24, 48, "float32"]
    asked = ("--batch-size", 2, "--seq-len", 32, "--dtype", "bfloat16")
    planned = last_json("plan", tmp_path, *asked)
    assert [planned[field] for field in fields] == [2, 32, "bfloat16"]
    planned = last_json("plan", "tiny-gpt", "--topology", "h100:2")
    assert [planned[field] for field in fields] == [2, run.model.context, "bfloat16"]
    planned = last_json("plan", "tiny-gpt")  # on a CPU, as it would be trained
    assert [planned[field] for field in fields] == [12, run.model.context, "float32"]


@pytest.mark.parametrize(
    "asked",
    [
        ("--seq-len", 32, "--set", "data.seq_len=64"),
        ("--set", "seed=1", "--set", "seed=2"),
    ],
)
def test_a_field_has_one_value(assay, tmp_path, asked):
    code, _, error = assay("train", "nano", *asked, "--out", tmp_path / "run")
    assert code == 2
    assert "given twice, as " in error


def test_plan_holds_to_what_is_set(last_json, tmp_path):
    on = ("plan", "gpt2", "--topology", "h100:8", "--no-compile")
    assert last_json(*on, "--set", "compute.remat=block")["remat"] == "block"
    assert last_json(*on, "--set", "compute.remat=block", "--remat", "auto")["remat"] == "none"
    assert last_json(*on, "--search", "--set", "mesh.data=8")["mesh"] == {"data": 8}
    asked = ("--search", "--batch-size", 64, "--set", "train.accumulate=4")
    assert last_json(*on, *asked)["accumulate"] == 4
    run = presets.get("gpt2").run.at("compute.remat", "block")
    (tmp_path / "run.json").write_text(json.dumps({"spec": run.model_dump(mode="json")}))
    assert last_json("plan", tmp_path, "--topology", "h100:8")["remat"] == "block"


@pytest.fixture
def spec_file(tmp_path):
    def write(data, name="my.json"):
        (tmp_path / name).write_text(data if isinstance(data, str) else data.to_json())
        return tmp_path / name

    return write


def test_a_spec_of_ones_own_is_a_model_where_no_parameters_are_needed(last_json, spec_file):
    model = presets.get("tiny-gpt").model.replace(context=128)
    assert last_json("show", spec_file(model))["spec"] == model.model_dump(mode="json")
    planned = last_json("plan", spec_file(model), "--topology", "h100:2")
    fields = ("batch_size", "seq_len", "dtype")
    assert [planned[field] for field in fields] == [2, 128, "bfloat16"]  # as of a preset
    changes = {"data.batch_size": 24, "data.seq_len": 48, "model.context": 64}
    run = presets.get("tiny-gpt").run.changed(changes)
    planned = last_json("plan", spec_file(run), "--topology", "h100:2")
    assert [planned[field] for field in fields] == [24, 48, "float32"]  # as of a run


def test_training_begins_with_a_spec(spec_file, tmp_path):
    from assay.cli.train import _configure
    from assay.loading import read_spec, untrained

    model = presets.get("tiny-gpt").model.replace(context=128)
    run = _configure(str(spec_file(model)), {"seed": 3}, None)
    assert run.model == model
    assert (run.data.seq_len, run.seed, run.preset) == (128, 3, None)
    file = spec_file(run)
    assert untrained(str(file)) == run
    (tmp_path / "run.json").write_text(json.dumps({"spec": run.model_dump(mode="json")}))
    assert read_spec(tmp_path) == read_spec(tmp_path / "run.json") == run
    assert _configure(str(file), {}, tmp_path) == run
    other = spec_file(model.replace(d_model=64), "other.json")
    with pytest.raises(AssayError, match=r"another model than .*other.json \(model.d_model is 128"):
        _configure(str(other), {}, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"d_model": 3}', "my.json: vocab_size: this field is required"),
        ('{"d_modl": 3}', "is neither a model's spec"),
        ('{"context": 3, "d_modl": 3}', "d_modl: there is no such field; did you mean 'd_model'"),
        ('{"model": {"d_modl": 3}}', "my.json: model.d_modl: there is no such field; did you"),
        ('{"a": 1}', "my.json: is neither a model's spec (vocab_size, "),
        ("[1]", "found no fields"),
        ("{", "my.json: is no JSON file"),
        ('{"model_type": "gpt2"}', "name its folder"),
        (None, "my.json: there is no such file"),
    ],
)
def test_a_file_that_is_no_spec_is_told_by_its_field(assay, spec_file, tmp_path, content, said):
    if content is not None:
        spec_file(content)
    for command in ("show", "train"):
        status, _, err = assay(command, tmp_path / "my.json")
        assert status == 2
        assert said in err
        assert err.count("\n") == 1


def test_a_spec_has_no_parameters(assay, spec_file, tmp_path):
    file = spec_file(presets.get("nano").model)
    for command in (("generate", file), ("eval", file), ("convert", file, tmp_path / "out")):
        status, _, err = assay(*command)
        assert status == 2
        assert "is a spec, which has no parameters: train it first (assay train " in err


def test_what_is_trained_already_is_no_beginning(assay, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for name, how in (("smollm2-135m-instruct", "RUN"), (tmp_path, str(tmp_path))):
        status, _, err = assay("train", name, "--data", "prompts.jsonl")
        assert status == 2
        assert "training begins from random parameters: name a preset or a spec" in err
        assert err.endswith(f"assay train --resume --out {how}\n")


def test_show_tells_what_mup_changes(last_json, assay):
    """nano is 256 wide: four times the base."""
    mup = 'model.mup={"base_width": 64}'
    changes = last_json("show", "nano", "--set", mup)["mup"]
    assert (changes["base_width"], changes["width_multiple"]) == (64, 4)
    assert changes["groups"]["matrices"] == {"std": 0.5, "adamw_lr": 0.25, "muon_lr": 1.0}
    assert changes["multipliers"]["logits"] == 0.25
    _, out, _ = assay("show", "nano", "--set", mup)
    assert "muP: width 4 times the base's 64" in out
    assert last_json("show", "nano")["mup"] is None


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["check", "nano", "--coordinates", "--widths", "64,wide"], "give numbers"),
        (["check", "nano", "--coordinates", "--out", "picture.gif"], "name a .png or a .svg"),
        (["check", "nano", "--coordinates", "--out", "there.png"], "nothing is overwritten"),
        (["bench", "growth", "--plot", "picture.gif"], "name a .png or a .svg"),
        (["bench", "growth", "--plot", "there.png"], "nothing is overwritten"),
    ],
)
def test_what_cannot_be_done_is_refused_before_minutes_are_spent(
    assay, arguments, found, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").touch()
    status, out, err = assay(*arguments)
    assert (status, out) == (2, "")
    assert found in err


def test_what_the_system_refuses_is_a_sentence(assay, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "text.txt").write_text("the quick brown fox " * 500)
    inside = tmp_path / "file" / "run"
    status, out, err = assay("train", "bigram", "--data", tmp_path / "text.txt", "--out", inside)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"assay: {inside}: the folder cannot be made (Not a directory)."


def test_corpora_are_listed(last_json, assay):
    names = [row["name"] for row in last_json("corpora")["corpora"]]
    assert {"python-docs", "python-stdlib", "shakespeare"} <= set(names)
    assert "…" not in assay("corpora")[1]


@pytest.mark.parametrize(
    "arguments", [["presets"], ["corpora"], ["show", "mqa"], ["show", "tiny-moe"], ["--help"]]
)
def test_what_people_read_fits_80_columns(assay, arguments):
    status, out, err = assay(*arguments)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) > 5
    assert max(map(len, out.splitlines())) <= 80
    assert " at 0x" not in out


def test_train_generate_eval_and_train_again(last_json, assay, corpus, tmp_path):
    out = tmp_path / "run"
    result = last_json("train", "nano", "--data", corpus, "--steps", 6, "--out", out, *SMALL)
    fields = "out steps tokens train_loss val_loss val_bpb seconds compile_seconds"
    assert {*fields.split(), "tokens_per_second", "mfu"} <= result.keys()
    assert (result["steps"], result["tokens"]) == (6, 6 * 4 * 16)
    assert (out / "loss.png").is_file()

    scored = last_json("eval", out)
    assert scored["bpb"] == pytest.approx(result["val_bpb"], rel=1e-5)
    assert scored["bytes"] == corpus.stat().st_size - int(corpus.stat().st_size * 0.9)
    assert {"loss", "perplexity", "tokens"} <= scored.keys()

    text = last_json(
        *("generate", out, "--prompt", "the ", "--max-new-tokens", 8, "--temperature", 0)
    )
    assert len(text["tokens"]) == 8
    assert text["prompt_tokens"] == 4
    assert {"text", "tokens_per_second", "time_to_first_token"} <= text.keys()
    _, plain, _ = assay(
        *("generate", out, "--prompt", "the ", "--max-new-tokens", 8, "--temperature", 0)
    )
    assert plain == f"the {text['text']}\n"

    assert last_json("train", "--resume", "--out", out) == result
    status, _, err = assay("train", "gpt2", "--resume", "--out", out)
    assert status == 2
    assert "holds a run of 'nano', not of 'gpt2'" in err
    status, _, err = assay("train", "--resume", "--out", out, "--lr", "0.5")
    assert status == 2
    assert err.startswith("assay: optimizer.lr: 0.5 is not what the run")
    assert "was begun with (0.003); --resume goes on" in err
    _, _, err = assay("train", "--resume", "--out", out, "--tokens", "500")
    assert err.startswith("assay: train.budget: unit = tokens, amount = 500.0 is not what the run")
    assert "was begun with (unit = steps, amount = 6.0)" in err

    about = json.loads((out / "run.json").read_text())
    about["spec"]["data"]["sources"][0]["corpus"] = "my/text.txt"
    (out / "run.json").write_text(json.dumps(about))
    status, _, err = assay("eval", out)
    assert status == 2
    assert "my/text.txt: there is no such corpus or file" in err
    assert "run.json names it; a relative path begins where the run was trained: run this" in err
    assert err.endswith(" there, or name the corpus by --data.\n")
    (out / "result.json").unlink()
    status, _, err = assay("train", "--resume", "--out", out)
    assert status == 2
    assert err.endswith(
        "names it; a relative path begins where the run was trained: run this there.\n"
    )


def test_a_folder_with_a_run_in_it_says_which_and_how_to_go_on(assay, corpus, tmp_path):
    out = tmp_path / "run"
    command = ("train", "nano", "--data", corpus, "--out", out, *SMALL)
    status, printed, _ = assay(*command, "--steps", 2, "--stop-at", 1)
    assert status == 0
    assert f"To go on: assay train --resume --out {out}" in printed
    status, _, err = assay(*command, "--steps", 2)
    assert status == 2
    assert "holds this very run, not finished; go on with it by --resume, or name another" in err
    _, printed, _ = assay("train", "--resume", "--out", out)
    assert "to train longer, begin anew with a larger budget and another --out" in printed
    _, _, err = assay(*command, "--steps", 2)
    assert "holds this very run, finished; --resume shows its result" in err
    _, _, err = assay(*command, "--steps", 3)
    assert "another run (train.budget.amount is 2.0 there, 3.0 here)" in err
    _, _, err = assay("train", "mqa", "--out", out)
    assert "holds another run, of 'nano', and nothing is overwritten" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nanoo"], "did you mean 'nano'"),
        (["train"], "PRESET"),
        (["train", "--resume"], "--resume: name the run's folder by --out"),
        (["check", "mqa", "--out", "picture.png"], "--out: it changes nothing without"),
        (["check", "mqa", "--widths", "64,128"], "--widths: it changes nothing without"),
        (["check", "mqa", "--coordinates", "--full"], "--full: it changes nothing with"),
        (["generate", "mqa", "--beams", "2", "--top-k", "3"], "--top-k: it changes nothing with"),
        (["generate", "mqa", "--length-penalty", "2"], "--length-penalty: it changes nothing"),
        (["eval", "mqa", "--task", "piqa", "--stride", "8"], "--stride: goes with --data"),
        (["compare", "a.toml", "--pilot", "runs"], "--pilot: it changes nothing without"),
        (["compare", "a.toml", "--design", "--target-flops", "1e9"], "--target-flops: it changes"),
        (["train", "nano", "--set", "model.decoder.num_layrs=2"], "did you mean 'num_layers'?"),
        (["train", "nano", "--set", "model.num_layers=2"], "at decoder.num_layers"),
        (["train", "nano", "--set", "model.decoder.pattern.*.attention.kv_heads=3"], "divide"),
        (["train", "nano", "--optimizer", "adam"], "did you mean 'adamw'"),
        (["train", "nano", "--steps", "3", "--seconds", "2"], "give one budget"),
        (["train", "nano", "--data", "python-doc"], "did you mean 'python-docs'"),
        (["train", "nano", "--mesh", "tensors=2"], "did you mean 'tensor'"),
        (["train", "nano", "--mesh", "tensor"], "AXIS=DEVICES"),
        (["train", "nano", "--dtype", "float16"], "did you mean 'bfloat16'"),
        (["train", "nano", "--set", "seed=4294967296"], "seed: found 4294967296, but"),
        (["show", "gpt-2"], "did you mean 'gpt2'"),
        (["generate", "gpt2", "--prompt", "x"], "no tokenizer"),
        (["eval", "mqa"], "--data"),
        (["check", "nowhere"], "neither a preset"),
        (
            ["convert", "nowhere", "there"],
            "is neither a folder of a run or of a model, nor a .gguf",
        ),
    ],
)
def test_bad_input_is_one_plain_sentence(assay, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = assay(*arguments)
    assert status == 2
    assert said in err
    assert err.startswith("assay: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.iterdir()), "something was left behind"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"text\x00\x01\x02" * 100, "is not text: a NUL byte at offset 4"),
        (b"short", "shorter than one window"),
        (None, "no such"),
    ],
)
def test_a_bad_corpus_is_one_plain_sentence(assay, tmp_path, content, said):
    path, out = tmp_path / "corpus.txt", tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    status, _, err = assay("train", "nano", "--data", path, "--out", out, *SMALL)
    assert status == 2
    assert said in err
    assert str(path.name) in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not JSON", "run.json: it is not JSON"),
        ("{}", "run.json: it is not a run's, which is an object with 'spec'"),
        ('{"spec": {"model": 4}}', "run.json: model: found 4, but"),
    ],
)
def test_a_run_json_that_is_not_a_runs(assay, tmp_path, content, said):
    (tmp_path / "run.json").write_text(content)
    for arguments in (("generate", tmp_path), ("train", "--resume", "--out", tmp_path)):
        status, _, err = assay(*arguments)
        assert status == 2
        assert said in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1610612736 bytes."),
            "memory: there is no room for 1.5 GiB more; a smaller batch, a shorter text or "
            "--dtype bfloat16 takes less.",
        ),
        (
            OSError(28, "No space left on device", "a"),
            "a: No space left on device (--debug shows where).",
        ),
    ],
)
def test_what_there_is_no_room_for_is_a_sentence(assay, monkeypatch, error, told):
    def fails(app):
        raise error

    monkeypatch.setattr("typer.Typer.__call__", fails)
    status, _, err = assay("generate", "mqa")
    assert (status, err) == (2, f"assay: {told}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_it_wherever_it_falls():
    """Also in a callback of the garbage collector, where Python forgets an exception."""
    code = """
import gc, signal, sys
from assay import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell had it ignored
def work():
    gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
    gc.collect()
    print("went on")
cli._run = work
sys.argv = ["assay", "generate"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "assay: interrupted.\n")


def test_eval_of_all_holds_nothing_out(assay, tmp_path, monkeypatch):
    from assay.evaluate import perplexity

    def scored(model, batches):
        (part,) = batches.parts
        return perplexity.Evaluation(1.0, 2.7, None, len(part.ids) - 1, None, 1, 1, 0, 0, 0.1)

    monkeypatch.setattr(perplexity, "evaluate", scored)
    (tmp_path / "one.txt").write_text("x")
    status, out, err = assay("eval", "bigram", "--data", tmp_path / "one.txt", "--split", "all")
    assert status == 0, err
    rows = dict(line.split() for line in out.splitlines())
    assert rows["tokens"] == "2"
    assert rows["bpb"] == "-"


def test_debug_gives_the_traceback(monkeypatch):
    from assay.errors import AssayError

    monkeypatch.setattr(sys, "argv", ["assay", "show", "nothing", "--debug"])
    with pytest.raises(AssayError):
        cli.main()


def test_debug_is_told_of(assay):
    assert "--debug shows where" in assay("--help")[1]


def test_check_says_what_it_proved(last_json):
    report = last_json("check", "mqa")
    assert report["passed"]
    assert {"name", "passed", "worst", "where"} <= report["checks"][0].keys()
