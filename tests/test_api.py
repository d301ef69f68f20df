import subprocess
import sys

import pytest

import assay


def test_import_costs_nothing():
    code = "import sys, assay; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def untrained():
    return assay.load("bigram")


def test_every_public_name_is_there():
    for name in assay.__all__:
        assert getattr(assay, name) is not None
    assert set(assay.__all__) <= set(dir(assay))


def test_an_option_that_there_is_not_is_told_with_those_that_are():
    with pytest.raises(assay.AssayError, match=r"steps: .*resume, stop_at.*train\.budget\.amount"):
        assay.train("nano", "out", steps=3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"beams": 2, "temperature": 0.5}, "temperature: it changes nothing with beams"),
        ({"beams": 2, "length_penalti": 2}, "did you mean 'length_penalty'"),
        ({"length_penalty": 2}, "length_penalty: it changes nothing without beams"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(untrained, options, told):
    with pytest.raises(assay.AssayError, match=told):
        assay.generate(untrained, "x", **options)


def test_three_calls_from_preset_to_text(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("to be or not to be, that is the question. " * 200)
    run = assay.preset(
        "tiny-gpt",
        {
            "model.decoder.num_layers": 1,
            "data.sources": [{"corpus": str(corpus)}],
            "train.budget.amount": 3,
        },
    )
    result = assay.train(run, tmp_path / "out")
    assert result.steps == 3
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    loaded = assay.load(tmp_path / "out")
    assert loaded.step == 3
    first = assay.generate(loaded, "to be", max_new_tokens=5, temperature=0)
    assert len(first.ids) == 5
    again = assay.generate(str(tmp_path / "out"), "to be", max_new_tokens=5, temperature=0)
    assert again.ids == first.ids
