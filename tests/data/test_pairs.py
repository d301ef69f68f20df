"""Pairs of source and target: files, what is refused, ids, batches, whole held-out pairs."""

import json

import numpy as np
import pytest

from assay.data import loader
from assay.data.corpora import open_corpus
from assay.data.pairs import LETTERS, TASKS, open_pairs, split
from assay.errors import AssayError
from assay.spec.presets import PRESETS
from assay.spec.run import ByteTokenizerSpec, DataSpec, IdsTokenizerSpec, RunSpec, SourceSpec

PAIRS = [(f"s{i:02d}" * (1 + i % 3), f"ü{i}" * (1 + i % 2)) for i in range(40)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [
        json.dumps({"source": s, "target": t, "weight": 1 + i % 2})
        for i, (s, t) in enumerate(PAIRS)
    ]
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{s}\t{t}\r\n" for s, t in PAIRS))
    return path


def spec_of(path, **fields) -> DataSpec:
    fields = {"seq_len": 12, "source_len": 10, "batch_size": 4} | fields
    return DataSpec(sources=(SourceSpec(corpus=str(path)),), packing="pairs", **fields)


def test_both_kinds_of_file(jsonl, tsv):
    for path in (jsonl, tsv):
        assert [(p.source, p.target) for p in open_pairs(str(path)).read()] == PAIRS
    assert [p.weight for p in open_pairs(str(jsonl)).read()][:3] == [1, 2, 1]
    assert open_pairs(str(jsonl)).fingerprint != open_pairs(str(tsv)).fingerprint  # weights count


def test_the_cut_is_of_pairs(tsv):
    corpus = open_pairs(str(tsv))
    first, last = split(corpus, 0.1)
    assert [(p.source, p.target) for p in [*first.read(), *last.read()]] == PAIRS
    assert last.count == 4
    with pytest.raises(AssayError, match="40 pairs are too few"):
        split(corpus, 0.99)


@pytest.mark.parametrize("name", TASKS)
def test_made_pairs(name):
    pairs = [*open_pairs(name).read()]
    assert len(pairs) == len({p.source for p in pairs}) == 20_000
    assert {len(p.source) for p in pairs} == {*range(4, 13)}
    assert {*"".join(p.source for p in pairs[:500])} == {*LETTERS}
    made = {"copy-pairs": "fade", "reverse-pairs": "edaf", "sort-pairs": "adef"}
    assert TASKS[name]("fade") == made[name]
    assert all(TASKS[name](p.source) == p.target for p in pairs[:50])


def test_batches(jsonl):
    """Shifted targets behind the start token; ends on both sides; padding counts nowhere."""
    prepared = loader.prepare(spec_of(jsonl))
    seen = {}
    with loader.batches(prepared, seed=0) as batches:
        for batch in (next(batches) for _ in range(9)):
            assert batch["tokens"].shape == batch["targets"].shape == (4, 12)
            assert batch["source"].shape == batch["source_mask"].shape == (4, 10)
            for b in range(4):
                length = int((batch["segment_ids"][b] > 0).sum())
                assert batch["tokens"][b, 0] == 256
                np.testing.assert_array_equal(
                    batch["tokens"][b, 1:length], batch["targets"][b, : length - 1]
                )
                assert batch["targets"][b, length - 1] == 256
                assert (batch["weights"][b, :length] > 0).all()
                assert not batch["weights"][b, length:].any()
                mask = batch["source_mask"][b]
                source = batch["source"][b][mask]
                assert mask[: len(source)].all()
                assert source[-1] == 256
                text = bytes(source[:-1].astype(np.uint8)).decode()
                seen[text] = bytes(batch["targets"][b, : length - 1].astype(np.uint8)).decode()
                weight = 1 + PAIRS.index((text, seen[text])) % 2
                assert (batch["weights"][b, :length] == weight).all()
    assert seen == dict(PAIRS[:36])  # one epoch, the held-out tenth never


def test_a_position_is_resumed(tsv):
    prepared = loader.prepare(spec_of(tsv))
    with loader.batches(prepared, seed=1) as batches:
        for _ in range(5):
            next(batches)
        state, wanted = batches.state(), next(batches)
    with loader.batches(prepared, seed=1) as again:
        again.restore(state)
        found = next(again)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    other = loader.prepare(spec_of(tsv, source_len=11))
    with loader.batches(other, seed=1) as batches, pytest.raises(AssayError, match="source_len"):
        batches.restore(state)


def test_every_held_out_pair_is_scored_whole(tsv):
    """Also those that are longer than training's room, which leaves out what does not fit."""
    prepared = loader.prepare(spec_of(tsv, seq_len=4, source_len=4))
    fits = [len(s.encode()) < 4 and len(t.encode()) < 4 for s, t in PAIRS[:36]]
    assert 0 < sum(fits) < 36
    assert prepared.left_out == 36 - sum(fits)
    about = prepared.summary()["sources"][0]
    assert (about["pairs"], about["pairs_left_out"]) == (sum(fits), prepared.left_out)
    batches = loader.evaluation_batches(prepared, 3)
    held = [*batches]
    assert len(held) == len(batches) == 2
    assert sum(int(batch["weights"].sum()) for batch in held) == sum(
        len(t.encode()) + 1 for _, t in PAIRS[36:]
    )
    assert batches.bytes == sum(len(t.encode()) for _, t in PAIRS[36:])
    assert held[0]["source"].shape[1] == max(len(s) for s, _ in PAIRS[36:]) + 1
    assert not held[1]["source_mask"][1:].any()  # rows that only fill the batch


def test_a_third_part(tsv):
    prepared = loader.prepare(spec_of(tsv, validation=0.25))
    parts = (*prepared.train, *prepared.validation, *prepared.held_out)
    assert [len(part.target.documents) for part in parts] == [27, 9, 4]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n', "line 1 has not 'source' and 'target'"),
        ("a.jsonl", '{"source": "x", "target": ""}\n', "line 1: 'target' is empty"),
        ("a.jsonl", '{"source": 3, "target": "y"}\n', "line 1: 'source' is int, not text"),
        ("a.jsonl", '{"source": "x", "target": "y", "weight": -1}\n', "'weight' is -1"),
        ("a.jsonl", "[1]\n", "line 1 has not 'source' and 'target'"),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.jsonl", "\n", "the corpus is empty"),
        ("a.tsv", "a\tb\nc\n", "line 2 has 1 columns"),
        ("a.tsv", "a\tb\tc\n", "line 1 has 3 columns"),
        ("a.txt", "plain text", "holds no pairs of source and target"),
    ],
    ids=range(10),
)
def test_what_is_no_pairs(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(AssayError, match=said):
        list(open_pairs(str(tmp_path / name)).read())


def test_text_where_pairs_belong_and_the_reverse(jsonl, tsv, tmp_path):
    with pytest.raises(AssayError, match="python-docs: holds no pairs"):
        open_pairs("python-docs")
    for name in (str(tsv), "sort-pairs"):
        with pytest.raises(AssayError, match="only a model with an encoder"):
            open_corpus(name)
    with pytest.raises(AssayError, match=r"is trained on \(nano-seq2seq, t5-small\)"):
        open_corpus("sort-pairs")
    for content, said in (("", "the corpus is empty"), ("a\n", "line 1 has 1 columns")):
        (tmp_path / "bad.tsv").write_text(content)
        with pytest.raises(AssayError, match=said):
            open_corpus(str(tmp_path / "bad.tsv"))
    with pytest.raises(AssayError, match="line 1 holds pairs of source and target"):
        list(open_corpus(str(jsonl)))
    with pytest.raises(AssayError, match="there is no such corpus"):
        open_pairs(str(tmp_path / "nothing.tsv"))
    legal = "encoder: copy-pairs, reverse-pairs, sort-pairs, or a path of .jsonl, .tsv"
    with pytest.raises(AssayError, match=legal):
        open_pairs("zzz")
    with pytest.raises(AssayError, match=r"hf:OWNER/DATASET or .*for a model .* copy-pairs, rev"):
        open_corpus("zzz")
    with pytest.raises(AssayError, match="did you mean 'copy-pairs'"):
        open_pairs("copy-pair")
    nano, reads = PRESETS["nano"].run, PRESETS["t5-small"].run
    with pytest.raises(AssayError, match=r"packing: found pairs, but the model has no"):
        nano.at("data.packing", "pairs")
    with pytest.raises(AssayError, match=r"packing: found stream, but a model with an"):
        RunSpec(model=reads.model)
    with pytest.raises(AssayError, match=r"data.source_len: found 9"):
        nano.at("data.source_len", 9)


def test_tokenizers_and_lengths_that_do_not_do(tsv):
    with pytest.raises(AssayError, match="no token that ends a text"):
        loader.prepare(spec_of(tsv, tokenizer=IdsTokenizerSpec(vocab_size=300)))
    with pytest.raises(AssayError, match=r"data.seq_len: no pair fits into 1 tokens of target"):
        loader.prepare(spec_of(tsv, seq_len=1, tokenizer=ByteTokenizerSpec()))
