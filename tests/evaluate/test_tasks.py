"""Likelihoods against the full forward; questions as the harness words them; its own tasks."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.data.tokenizers import ByteTokenizer
from assay.errors import AssayError
from assay.evaluate import likelihood, tasks
from assay.evaluate.likelihood import loglikelihoods
from assay.model.transformer import Transformer
from assay.spec import presets

MODEL = Transformer(
    presets.shrink(presets.get("llama-3-8b").model).replace(vocab_size=257, context=96),
    rngs=jax.random.key(0),
)
TOKENIZER = ByteTokenizer()


def by_the_full_forward(context, continuation):
    ids = jnp.asarray([[*context, *continuation]], jnp.int32)
    logprobs = jax.nn.log_softmax(MODEL(ids)[0], axis=-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    pairs = list(zip(places, continuation, strict=True))
    greedy = all(int(logprobs[place].argmax()) == token for place, token in pairs)
    return float(sum(logprobs[place, token] for place, token in pairs)), greedy


def test_likelihoods_are_those_of_the_full_forward():
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 257, size=n).tolist() for n in (5, 17, 40, 1)]
    requests = [(ids[0], ids[3]), (ids[1], ids[0]), (ids[1], ids[2]), (ids[2], ids[1])]
    requests += [(ids[1], [7]), (ids[3], ids[2])]
    best = int(MODEL(jnp.asarray([ids[1]], jnp.int32))[0, -1].argmax())
    requests.append((ids[1], [best]))
    found = loglikelihoods(MODEL, requests, batch_size=2)
    for request, one in zip(requests, found, strict=True):
        nats, greedy = by_the_full_forward(*request)
        assert one.nats == pytest.approx(nats, abs=2e-4)
        assert one.greedy == greedy
    assert found[-1].greedy


def test_a_beginning_that_many_share_is_computed_once(monkeypatch):
    """The examples before a few-shot question: read once, and the values stay what they are."""
    rng = np.random.default_rng(1)
    examples = rng.integers(0, 257, size=50).tolist()
    contexts = [examples + rng.integers(0, 257, size=n).tolist() for n in (3, 9, 1, 14, 6)]
    contexts[2] = examples[:45]  # what all share ends before this one's last token
    requests = [(c, rng.integers(0, 257, size=n).tolist()) for c in contexts for n in (1, 4)]
    requests += [(rng.integers(0, 257, size=40).tolist(), [5])]
    computed, prefill = [], likelihood._prefill

    def counted(model, begun, tokens, lengths, capacity):
        computed.append(int(np.sum(lengths)))
        return prefill(model, begun, tokens, lengths, capacity)

    monkeypatch.setattr(likelihood, "_prefill", counted)
    found = loglikelihoods(MODEL, requests, batch_size=2)
    for request, one in zip(requests, found, strict=True):
        nats, greedy = by_the_full_forward(*request)
        assert one.nats == pytest.approx(nats, abs=2e-4)
        assert one.greedy == greedy
    rests = sum(len(context) - 44 for context in contexts)
    empty = 2  # rows that only fill a batch, of one token
    assert sum(computed) == 44 + rests + 40 + empty


def test_a_long_context_loses_its_beginning():
    context = list(range(1, 200))
    (one,) = loglikelihoods(MODEL, [(context, [3, 4, 5])])
    nats, _ = by_the_full_forward(context[-(96 + 1 - 3) :], [3, 4, 5])
    assert one.nats == pytest.approx(nats, abs=2e-4)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(AssayError, match="request 0: an empty"):
        loglikelihoods(MODEL, [([], [1])])
    with pytest.raises(AssayError, match="97 tokens, but the model's context is 96"):
        loglikelihoods(MODEL, [([1], [1] * 97)])


DOCUMENTS = {
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man stands [title] up.",
        "ctx_b": "he",
        "endings": ["sits [step] down.", "flies."],
        "label": "1",
    },
    "arc_easy": {
        "question": "What is wet?",
        "choices": {"text": ["fire", "water"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "piqa": {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 0},
    "winogrande": {
        "sentence": "Ann told Bea that _ won.",
        "option1": "Ann",
        "option2": "Bea",
        "answer": "2",
    },
    "lambada_openai": {"text": "once upon a time"},
    "blimp": {"sentence_good": "She runs.", "sentence_bad": "She run."},
}


@pytest.mark.parametrize(
    ("name", "pairs", "gold"),
    [
        (
            "hellaswag",
            [
                ("Cooking: A man stands.  up. He", " sits down."),
                ("Cooking: A man stands.  up. He", " flies."),
            ],
            1,
        ),
        (
            "arc_easy",
            [
                ("Question: What is wet?\nAnswer:", " fire"),
                ("Question: What is wet?\nAnswer:", " water"),
            ],
            1,
        ),
        (
            "piqa",
            [("Question: Open it\nAnswer:", " pull"), ("Question: Open it\nAnswer:", " push")],
            0,
        ),
        (
            "winogrande",
            [("Ann told Bea that Ann", " won."), ("Ann told Bea that Bea", " won.")],
            1,
        ),
        ("lambada_openai", [("once upon a", " time")], 0),
        ("blimp", [("", " She runs."), ("", " She run.")], 0),
    ],
)
def test_questions_are_worded_as_published(name, pairs, gold):
    (question,) = tasks.questions(tasks.task(name), [DOCUMENTS[name]])
    assert [(a.replace(".  up", ". up"), b) for a, b in question.pairs] == [
        (a.replace(".  up", ". up"), b) for a, b in pairs
    ]
    assert question.gold == gold


def test_scores_count_what_is_right(tmp_path):
    rng = np.random.default_rng(1)
    docs = [
        {"goal": f"do {n}", "sol1": "x" * 3, "sol2": "yes sir", "label": int(rng.integers(2))}
        for n in range(8)
    ]
    file = tmp_path / "piqa.jsonl"
    file.write_text("\n".join(map(json.dumps, docs)))
    one = tasks.task("piqa")
    asked = tasks.questions(one, tasks.documents(one, file))
    result = tasks.score(MODEL, TOKENIZER, one, asked)
    for doc, right, right_norm in zip(docs, result.right, result.right_norm, strict=True):
        context = TOKENIZER.encode(f"Question: {doc['goal']}\nAnswer:")
        nats = [
            by_the_full_forward(context, TOKENIZER.encode(" " + doc[sol]))[0]
            for sol in ("sol1", "sol2")
        ]
        assert right == (np.argmax(nats) == doc["label"])
        assert right_norm == (np.argmax(np.array(nats) / [3, 7]) == doc["label"])
    assert result.accuracy == np.mean(result.right)
    p, q = result.accuracy, result.accuracy_norm
    assert result.stderr == pytest.approx(math.sqrt(p * (1 - p) / 7))
    assert result.stderr_norm == pytest.approx(math.sqrt(q * (1 - q) / 7))


def test_blimp_is_the_mean_of_its_paradigms(tmp_path):
    """From a folder (a file a paradigm), or one file that names them; `limit` is for each."""
    names = ("passive_1", "causative", "wh_island")
    rng = np.random.default_rng(3)
    docs = {
        name: [
            {f"sentence_{way}": "".join(rng.choice(list("abcd"), 4)) for way in ("good", "bad")}
            for _ in range(size)
        ]
        for name, size in zip(names, (7, 3, 5), strict=True)
    }
    (tmp_path / "all").mkdir()
    for name, found in docs.items():
        lines = "\n".join(map(json.dumps, found))
        (tmp_path / "all" / f"{name}.jsonl").write_text(lines)
    named = [doc | {"UID": name} for name, found in docs.items() for doc in found]
    (tmp_path / "one.json").write_text(json.dumps(named))
    whole = tasks.task("blimp")
    assert len(whole.hub[1]) == 67
    results = {
        source: tasks.score(
            MODEL, TOKENIZER, whole, tasks.questions(whole, tasks.documents(whole, source))
        )
        for source in (tmp_path / "all", tmp_path / "one.json")
    }
    for result in results.values():
        assert result.examples == 15
        assert result.parts.keys() == set(names)
        errors = []
        for name in names:
            one = tasks.task(f"blimp/{name}")
            found = tasks.documents(one, tmp_path / "one.json")
            assert len(found) == len(docs[name])
            alone = tasks.score(MODEL, TOKENIZER, one, tasks.questions(one, found))
            assert alone.accuracy == result.parts[name]
            errors.append(alone.stderr)
        assert result.accuracy == pytest.approx(np.mean(list(result.parts.values())))
        assert result.accuracy != pytest.approx(np.mean(result.right))
        assert result.stderr == pytest.approx(np.sqrt(np.square(errors).sum()) / 3)
    few = tasks.documents(whole, tmp_path / "all", limit=4)
    assert len(few) == 4 + 3 + 4
    wrong = ~np.array(result.right)
    difference, _ = tasks.paired_difference(result.right, wrong, result.part_of)
    assert difference == pytest.approx(2 * result.accuracy - 1)


def test_bad_documents_are_named(tmp_path):
    with pytest.raises(AssayError, match="'hellaswag'"):
        tasks.task("helaswag")
    with pytest.raises(AssayError, match="document 0 has no field 'sol1'"):
        tasks.questions(tasks.task("piqa"), [{"goal": "x"}])
    with pytest.raises(AssayError, match="did you mean 'blimp/wh_island'"):
        tasks.task("blimp/wh_iland")
    with pytest.raises(AssayError, match="there is no file or folder"):
        tasks.documents(tasks.task("piqa"), tmp_path / "none.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{')
    with pytest.raises(AssayError, match=r"bad.jsonl, line 2"):
        tasks.documents(tasks.task("piqa"), bad)
    for content, message in [("{", "is not JSON"), ("{}", "no list of doc"), ("[1]", "has fields")]:
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(AssayError, match=message):
            tasks.documents(tasks.task("piqa"), tmp_path / "bad.json")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(AssayError, match="is not a whole parquet file"):
        tasks.documents(tasks.task("piqa"), tmp_path / "bad.parquet")
    with pytest.raises(AssayError, match=r"found '.txt'; legal are .jsonl"):
        tasks.documents(tasks.task("piqa"), bad.rename(tmp_path / "bad.txt"))


def test_two_models_are_compared_on_the_same_examples():
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.6
    b = np.where(rng.random(400) < 0.9, a, ~a)  # agree on nine in ten
    mean, (low, high) = tasks.paired_difference(a, b)
    assert mean == pytest.approx(a.mean() - b.mean())
    half = 1.96 * (a.astype(float) - b).std(ddof=1) / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
    assert tasks.paired_difference(a, a) == (0.0, (0.0, 0.0))
