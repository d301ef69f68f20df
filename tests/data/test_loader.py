import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.data import shards
from assay.data.corpora import Document, Segment, TextCorpus
from assay.data.loader import Tokens, batches, evaluation_batches, pack, prepare, tokenize
from assay.data.tokenizers import ByteTokenizer
from assay.errors import AssayError
from assay.spec.run import (
    BpeTokenizerSpec,
    CharTokenizerSpec,
    DataSpec,
    IdsTokenizerSpec,
    SourceSpec,
)

END = 256


def text_of(rng, length, letters="abcdefgh é猫\n"):
    return "".join(rng.choice(list(letters), length))


def corpus(folder, name, count=40, longest=60, letters="abcdefgh é猫\n"):
    rng = np.random.default_rng(len(name))
    texts = [text_of(rng, int(n), letters) for n in rng.integers(1, longest, count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path), texts


@pytest.fixture
def data(tmp_path):
    """A DataSpec of two small corpora; fields as given."""

    def make(**fields):
        sources = (
            SourceSpec(corpus=corpus(tmp_path, "first")[0], weight=3),
            SourceSpec(corpus=corpus(tmp_path, "other", letters="ABCDEFG\n")[0]),
        )
        return DataSpec(**{"sources": sources, "seq_len": 16, "batch_size": 8} | fields)

    return make


def one(spec):
    return spec.replace(sources=spec.sources[:1])


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys()
        and all(np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in zip(a, b, strict=True)
    )


# ---------------------------------------------------------------------------- preparing


def test_parts_are_the_text_and_nothing_else(tmp_path, data):
    spec = one(data())
    prepared = prepare(spec)
    _, texts = corpus(tmp_path, "first")
    whole = "".join(texts).encode()
    (train,), (held,) = prepared.train, prepared.held_out
    text = ByteTokenizer().decode_bytes
    assert text(train.ids[:]) + text(held.ids[1:]) == whole
    assert prepared.held_out_bytes == len(text(held.ids[1:]))
    assert prepared.held_out_bytes + prepared.train_bytes == len(whole)
    assert len(whole) / 10 <= prepared.held_out_bytes < len(whole) / 10 + 4
    assert held.ids[0] == train.ids[-1]
    assert train.ids[0] == END
    ends = (train.ids[1:] == END).sum() + (held.ids[1:] == END).sum()
    assert ends == len(texts)  # the cut document ends once, in the held-out part
    assert prepared.train_tokens == train.targets == len(train.ids) - 1


def test_a_validation_part_is_cut_between_the_two(tmp_path, data):
    two, three = prepare(one(data())), prepare(one(data(validation=0.2)))
    (train,), (middle,), (held,) = three.train, three.validation, three.held_out
    assert (*two.validation,) == ()
    text = ByteTokenizer().decode_bytes
    before = text(two.train[0].ids[:])
    assert text(train.ids[:]) + text(middle.ids[1:]) == before
    assert held.ids[:].tolist() == two.held_out[0].ids[:].tolist()
    assert middle.bytes == pytest.approx(len(before) / 5, abs=4)
    assert middle.ids[0] == train.ids[-1]
    assert held.ids[0] == middle.ids[-1]
    assert three.fingerprint != two.fingerprint
    scored = [*evaluation_batches(three, 4, part="validation")]
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in scored])
    assert targets.tolist() == middle.ids[1:].tolist()


def test_learnt_tokenizers_see_the_training_part_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab " * 300 + "猫" * 33 + "!")  # 1000 bytes, the last tenth of them cats
    spec = DataSpec(sources=(SourceSpec(corpus=str(path)),), seq_len=8)
    char = prepare(spec.replace(tokenizer=CharTokenizerSpec()))
    assert char.tokenizer.alphabet == " ab"
    assert char.summary()["sources"][0]["held_out_unknown"] == 34
    bpe = prepare(spec.replace(tokenizer=BpeTokenizerSpec(vocab_size=300)))
    assert not any("猫".encode()[:2] in piece for piece in bpe.tokenizer.pieces)
    cut = prepare(spec.replace(tokenizer=CharTokenizerSpec(), held_out=0.01, validation=0.1))
    assert cut.tokenizer.alphabet == " ab"
    assert bpe.held_out_bytes == char.held_out_bytes == 100


def test_ids_are_kept_and_mapped_and_made_anew_when_damaged(tmp_path, monkeypatch, data):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    spec = one(data(tokenizer=BpeTokenizerSpec(vocab_size=300)))
    first = prepare(spec)
    ids = first.train[0].ids.tolist()
    monkeypatch.setattr(
        "assay.data.tokenizers.HuggingFaceTokenizer.encode",
        lambda *_: pytest.fail("tokenised although it was kept"),
    )
    again = prepare(spec)
    assert again.fingerprint == first.fingerprint
    assert again.train[0].ids.tolist() == ids
    assert not again.train[0].ids.flags.owndata
    monkeypatch.undo()
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    for file in (tmp_path / "cache" / "tokens").glob("*/ids"):
        file.write_bytes(file.read_bytes()[:-2])
    assert prepare(spec).train[0].ids.tolist() == ids
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))  # no drafts are left


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, data):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssayError, match="ASSAY_CACHE names another"):
        prepare(data())


def test_fingerprint_follows_what_decides_the_batches(tmp_path, data):
    spec = data()
    prints = [prepare(spec).fingerprint, prepare(spec).fingerprint]
    others = [
        spec.replace(packing="documents"),
        spec.replace(held_out=0.2),
        spec.replace(tokenizer=CharTokenizerSpec()),
        spec.replace(sources=spec.sources[::-1]),
        spec.at("sources.0.weight", 2),
    ]
    prints += [prepare(other).fingerprint for other in others]
    with open(spec.sources[0].corpus, "a") as file:
        file.write('{"text": "more"}\n')
    prints.append(prepare(spec).fingerprint)
    assert len(set(prints)) == len(prints) - 1
    assert json.loads(json.dumps(prepare(spec).summary())) == prepare(spec).summary()


def test_corpora_shorter_than_a_window(data):
    with pytest.raises(AssayError, match=r"shorter than one window of seq_len \+ 1 = 100001"):
        prepare(data(seq_len=100_000))


def test_documents_with_weights(tmp_path):
    path = tmp_path / "a.jsonl"
    record = {"prompt": "pp", "completion": "cé", "weight": 0.5}
    path.write_text((json.dumps(record) + "\n") * 20)
    spec = DataSpec(sources=(SourceSpec(corpus=str(path)),), seq_len=6, batch_size=4)
    prepared = prepare(spec)
    for packing in ("stream", "documents"):
        with batches(prepare(spec.replace(packing=packing)), seed=0) as iterator:
            for batch in take(iterator, 10):
                expected = np.where(batch["targets"] == ord("p"), 0.0, 0.5)
                expected[batch["targets"] == 0] = 0.0  # padding
                assert np.array_equal(batch["weights"], expected)
    evaluation = evaluation_batches(prepared, 3)
    assert evaluation.bytes == 2 * 3  # two of twenty records, the completions of which count
    assert evaluation.tokens == 2 * (3 + 1)
    weights = np.concatenate([b["weights"] for b in evaluation])
    assert set(weights.ravel().tolist()) == {0.0, 1.0}
    assert weights.sum() == evaluation.tokens


# ---------------------------------------------------------------------------- token shards


def test_shards_are_windows_of_their_ids(tmp_path):
    shards.write(tmp_path / "a.bin", np.arange(0, 300), header=False)
    shards.write(tmp_path / "b.npy", np.arange(300, 1000))
    spec = DataSpec(
        sources=(SourceSpec(corpus=str(tmp_path)),),
        tokenizer=IdsTokenizerSpec(vocab_size=1000),
        seq_len=16,
        batch_size=8,
    )
    prepared = prepare(spec)
    assert prepared.held_out_bytes is None
    assert prepared.held_out[0].ids[:].tolist() == list(range(899, 1000))
    with batches(prepared, seed=0) as iterator:
        seen = take(iterator, 8)
    for batch in seen:
        assert np.array_equal(batch["targets"], batch["tokens"] + 1)
        assert (np.diff(batch["tokens"]) == 1).all()
    assert max(batch["targets"].max() for batch in seen) == 899
    with pytest.raises(AssayError, match="holds token id 256, but the vocabulary is 256"):
        prepare(spec.replace(tokenizer=IdsTokenizerSpec(vocab_size=256)))
    with pytest.raises(AssayError, match="a 'bpe' tokenizer learns nothing"):
        prepare(spec.replace(tokenizer=BpeTokenizerSpec()))


def test_bytes_and_documents_of_shards_come_from_the_tokenizer(tmp_path):
    text = [*b"one", END, *b"two!", END, *b"three", END, *b"fourfour", END]
    shards.write(tmp_path / "a.bin", np.array(text))
    spec = DataSpec(
        sources=(SourceSpec(corpus=str(tmp_path / "a.bin")),), seq_len=8, packing="documents"
    )
    prepared = prepare(spec.replace(held_out=0.4))
    assert prepared.train_bytes + prepared.held_out_bytes == 20
    # The first token of all has none before it; every other follows a separator.
    assert prepared.train[0].documents.tolist() == [[1, 4], [4, 9], [9, 14]]
    assert prepared.train[0].unscored_first
    assert prepared.held_out[0].documents.tolist() == [[1, 2], [2, 11]]
    assert not prepared.held_out[0].unscored_first


# ---------------------------------------------------------------------------- stream packing


def test_an_epoch_covers_every_token(data):
    spec = one(data(batch_size=4))
    prepared = prepare(spec)
    (train,) = prepared.train
    rows = math.ceil((train.targets - 1) / 16) + 1
    stream = train.ids[:].tolist()
    starts = {tuple(stream[i : i + 17]): i for i in range(len(stream) - 16)}
    assert len(starts) == len(stream) - 16  # so that a window tells where it was cut
    with batches(prepared, seed=3) as iterator:
        windows = [
            (*row[0].tolist(), int(row[1][-1]))
            for batch in take(iterator, rows)
            for row in zip(batch["tokens"], batch["targets"], strict=True)
        ]
    epochs = [[starts[w] for w in windows[e * rows : (e + 1) * rows]] for e in range(4)]
    for epoch in epochs:
        covered = Counter(t for start in epoch for t in range(start + 1, start + 17))
        assert set(covered) == set(range(1, len(stream)))
        assert sum(covered.values()) < len(stream) + 3 * 16
        assert epoch != sorted(epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(s % 16 for s in epoch[:9]) for epoch in epochs}) > 1  # other cuts


def test_targets_are_the_next_tokens(data):
    with batches(prepare(data()), seed=0) as iterator:
        for batch in take(iterator, 5):
            assert set(batch) == {"tokens", "targets"}
            assert batch["tokens"].shape == batch["targets"].shape == (8, 16)
            assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
            assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_seeds_differ(data):
    prepared = prepare(data())
    with batches(prepared, 1) as a, batches(prepared, 1) as b, batches(prepared, 2) as c:
        first, again, other = take(a, 5), take(b, 5), take(c, 5)
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_sources_are_drawn_by_weight(data, packing):
    prepared = prepare(data(packing=packing))  # weights 3 and 1
    with batches(prepared, seed=0) as iterator:
        for group in (take(iterator, 10) for _ in range(5)):
            rows = np.concatenate([b["tokens"] for b in group])
            capitals = ((rows >= ord("A")) & (rows <= ord("G"))).any(axis=1)
            assert capitals.mean() == pytest.approx(0.25, abs=0.02)


# ---------------------------------------------------------------------------- documents packing


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_packing_holds_everything_once_and_closely(lengths, seq_len):
    ends = np.cumsum(lengths)
    documents = np.stack([ends - lengths, ends], axis=1)
    rows = pack(documents, seq_len)
    covered = Counter(t for row in rows for start, end in row for t in range(start, end))
    assert covered == Counter(range(sum(lengths)))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row in rows:
        assert 0 < sum(end - start for start, end in row) <= seq_len
        for start, end in row:
            assert owner[start] == owner[end - 1]
    # No two rows would have fitted into one.
    fill = sorted(sum(end - start for start, end in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > seq_len


def test_packed_rows_never_leak_and_cover_all(tmp_path, data):
    spec = one(data(packing="documents", batch_size=1))
    prepared = prepare(spec)
    (train,) = prepared.train
    stream = train.ids[:].tolist()
    rows = len(pack(train.documents, 16))
    counted = Counter()
    with batches(prepared, seed=0) as iterator:
        for batch in take(iterator, rows):
            row = {name: array[0] for name, array in batch.items()}
            segments = row["segment_ids"]
            assert np.array_equal(row["weights"], (segments > 0).astype(np.float32))
            assert (np.diff(segments[segments > 0]) >= 0).all()
            assert not row["tokens"][segments == 0].any()
            for n in range(1, segments.max() + 1):
                here = segments == n
                tokens, targets = row["tokens"][here].tolist(), row["targets"][here].tolist()
                assert row["positions"][here].tolist() == list(range(len(tokens)))
                assert tokens[1:] == targets[:-1]
                assert END not in tokens[1:]  # the separator only starts what it stands before
                counted[(tokens[0], *targets)] += 1
    expected = Counter()
    for start, end in train.documents.tolist():
        for begin in range(start, end, 16):
            expected[tuple(stream[begin - 1 : min(begin + 16, end)])] += 1
    assert counted == expected
    assert sum(len(piece) - 1 for piece in counted.elements()) == train.targets


# ---------------------------------------------------------------------------- going on


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("blended", [False, True])
def test_resume_is_exact(data, packing, blended):
    spec = data(packing=packing)
    prepared = prepare(spec if blended else one(spec))
    with batches(prepared, seed=7) as iterator:
        head = take(iterator, 13)
        state = json.loads(json.dumps(iterator.state()))
        assert state["index"] == 13  # of what was taken, not of what was made ahead
        tail = take(iterator, 30)
        iterator.restore(state)
        assert same(take(iterator, 30), tail)
        iterator.restore(state | {"index": 0})
        assert same(take(iterator, 13), head)
    with batches(prepare(prepared.spec), seed=7, start=40) as iterator:
        assert same(take(iterator, 3), tail[-3:])


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_every_number_of_processes_gives_the_same_batches(data, packing):
    prepared = prepare(data(packing=packing))
    with batches(prepared, seed=7) as iterator:
        take(iterator, 5)
        state = iterator.state()
        whole = take(iterator, 6)
    for count in (2, 4, 8):
        parts = []
        for process in range(count):
            rows = range(8)[process * 8 // count : (process + 1) * 8 // count]
            with batches(prepared, seed=7, rows=rows) as iterator:
                iterator.restore(state)
                parts.append(take(iterator, 6))
        joined = [
            {k: np.concatenate([part[i][k] for part in parts]) for k in whole[i]} for i in range(6)
        ]
        assert same(joined, whole)


def test_another_process_goes_on_exactly(tmp_path, data):
    spec = data(packing="documents", tokenizer=BpeTokenizerSpec(vocab_size=280))
    with batches(prepare(spec), seed=5) as iterator:
        take(iterator, 9)
        state = iterator.state()
        expected = [int(sum(int(a.sum()) for a in b.values())) for b in take(iterator, 5)]
    code = (
        "import json, sys; from assay.spec.run import DataSpec; from assay.data import loader;"
        "spec, state = DataSpec.from_json(sys.argv[1]), json.loads(sys.argv[2]);"
        "it = loader.batches(loader.prepare(spec), 5); it.restore(state);"
        "print([int(sum(int(a.sum()) for a in next(it).values())) for _ in range(5)]); it.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, spec.to_json(), json.dumps(state)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"ASSAY_CACHE": str(tmp_path / "empty")},  # tokenised anew as well
    )
    assert json.loads(done.stdout) == expected


def test_a_state_of_something_else_is_refused(data):
    spec = data()
    prepared = prepare(spec)
    with batches(prepared, seed=1) as iterator:
        state = iterator.state()
        changes = [
            (prepared, 2, "seed 1, but this run has 2"),
            (prepare(spec.replace(seq_len=8)), 1, "seq_len 16, but this run has 8"),
            (prepare(spec.replace(batch_size=4)), 1, "batch_size 8, but this run has 4"),
            (prepare(spec.replace(packing="documents")), 1, "fingerprint"),
        ]
        for other, seed, sentence in changes:
            with batches(other, seed) as theirs, pytest.raises(AssayError, match=sentence):
                theirs.restore(state)
        with pytest.raises(AssayError, match="index -1"):
            iterator.restore(state | {"index": -1})


# ---------------------------------------------------------------------------- evaluation


def part(text, *, context=END):
    """Tokens of a text of bytes, documents apart by newlines."""
    documents = [Document((Segment(line),)) for line in text.split("\n")]
    return tokenize(TextCorpus("made", lambda: iter(documents)), ByteTokenizer(), context)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_every_token_is_scored_once_with_the_context_told(lengths, seq_len, stride, batch_size):
    stride = min(stride, seq_len)
    parts = []
    for length in lengths:
        ids = np.arange(length + 1) + 1000 * len(parts)
        parts.append(Tokens(ids, None, np.array([[1, length + 1]]), length, length, False))
    evaluation = evaluation_batches(parts, batch_size, seq_len, stride)
    scored = Counter()
    for batch in evaluation:
        assert all(array.shape == (batch_size, seq_len) for array in batch.values())
        for tokens, targets, weights in zip(
            batch["tokens"], batch["targets"], batch["weights"], strict=True
        ):
            for t in np.flatnonzero(weights):
                scored[int(targets[t])] += 1
                assert targets[t] == tokens[t] + 1
                # All but the first tokens of a part see at least seq_len - stride before them.
                assert t >= min(seq_len - stride, int(tokens[t]) % 1000)
    assert scored == Counter(1000 * i + t for i, n in enumerate(lengths) for t in range(1, n + 1))
    assert evaluation.tokens == sum(lengths) == evaluation.bytes
    assert len(evaluation) == len(list(evaluation))
    assert not evaluation.unscored_first


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_held_out_text_is_scored_whole(data, packing):
    prepared = prepare(data(packing=packing))
    evaluation = evaluation_batches(prepared, batch_size=5)
    targets = Counter()
    for batch in evaluation:
        assert all(array.shape == (5, 16) for array in batch.values())
        targets.update(batch["targets"][batch["weights"] > 0].tolist())
    expected = Counter(i for held in prepared.held_out for i in held.ids[1:].tolist())
    assert targets == expected
    assert evaluation.tokens == sum(expected.values()) == prepared.held_out_tokens
    assert evaluation.bytes == prepared.held_out_bytes
    assert sum(n for i, n in targets.items() if i != END) == evaluation.bytes


def test_the_first_token_follows_the_training_part(data):
    prepared = prepare(one(data()))
    batch = next(iter(evaluation_batches(prepared, batch_size=2)))
    assert batch["tokens"][0, 0] == prepared.train[0].ids[-1]
    assert batch["weights"][0, 0] == 1


def test_what_has_nothing_before_it_is_told():
    class Endless(ByteTokenizer):
        eos_id = bos_id = None

    documents = [Document((Segment(text),)) for text in ("abc", "de", "f")]
    tokens = tokenize(TextCorpus("made", lambda: iter(documents)), Endless(), key="no ends")
    stream = evaluation_batches([tokens], 2, 4)
    assert (stream.unscored, stream.tokens, stream.bytes) == (1, 5, 6)
    packed = evaluation_batches([tokens], 2, 4, packing="documents")
    assert (packed.unscored, packed.tokens) == (3, 3)
    assert packed.unscored_first
    assert sum(b["weights"].sum() for b in packed) == 3
    given = evaluation_batches([part("abc\nde")], 2, 4)
    assert (given.unscored, given.tokens, given.bytes) == (0, 7, 5)


def test_strides_that_are_refused(data):
    prepared = prepare(data())
    for stride, packing in ((0, "stream"), (17, "stream"), (8, "documents")):
        with pytest.raises(AssayError, match=f"stride: found {stride}; legal are 1 to seq_len"):
            evaluation_batches(prepared, 4, stride=stride, packing=packing)
    with pytest.raises(AssayError, match="seq_len is required"):
        evaluation_batches(prepared.held_out, 4)


def test_prefetching_thread_ends():
    prepared = prepare(DataSpec(seq_len=8, batch_size=2))
    before = threading.active_count()
    iterator = batches(prepared, 0)
    next(iterator)
    iterator.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)
    assert threading.active_count() <= before


def test_batches_are_quick():
    """nano's batches take half a millisecond; ten times that would be a mistake."""
    prepared = prepare(DataSpec(seq_len=64, batch_size=12))
    with batches(prepared, 0) as iterator:
        take(iterator, 20)
        begin = time.perf_counter()
        take(iterator, 200)
        seconds = (time.perf_counter() - begin) / 200
    assert seconds < 5e-3, f"{seconds * 1e3:.2f} ms a batch"
