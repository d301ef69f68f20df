import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tests.train.conftest import made_text

from assay.data import cache, loader, shards, tokenizers
from assay.data.corpora import open_corpus
from assay.data.prepare import prepare, read_manifest, refuse_other_tokenizer
from assay.errors import AssayError
from assay.spec.run import (
    BpeTokenizerSpec,
    ByteTokenizerSpec,
    CharTokenizerSpec,
    DataSpec,
    FileTokenizerSpec,
    IdsTokenizerSpec,
    SourceSpec,
)

BYTE = ByteTokenizerSpec()


@pytest.fixture
def corpus(tmp_path):
    """Documents of many lengths; one longer than any shard here, and one that is empty."""
    lengths = [1, 40, 3, 600, 7, 25, 1, 90, 12, 33]
    texts = [made_text(n, seed=i) for i, n in enumerate(lengths)] + ["", "Öl 猫"]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def ids_of(folder):
    manifest = read_manifest(folder)
    arrays = [shards.read(folder / shard["file"])[0] for shard in manifest["shards"]]
    return np.concatenate(arrays)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["modded", "nanogpt", "npy"])
@pytest.mark.parametrize("spec", [BYTE, BpeTokenizerSpec(vocab_size=300)], ids=["byte", "bpe"])
def test_shards_hold_what_training_makes_of_the_text(corpus, tmp_path, form, spec):
    out = tmp_path / "out"
    manifest = prepare(corpus, out, spec, shard_tokens=500, workers=1, form=form)
    tokenizer = tokenizers.load(out)
    expected = loader.tokenize(open_corpus(corpus), tokenizer).ids[1:]  # the first is context
    assert ids_of(out).tolist() == expected.tolist()
    assert {shard["tokens"] for shard in manifest["shards"][:-1]} == {500}
    assert manifest["bytes"] == manifest["text_bytes"] == open_corpus(corpus).size
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    first = (out / manifest["shards"][0]["file"]).read_bytes()
    if form == "nanogpt":
        assert first == expected[:500].astype("<u2").tobytes()
    if form == "modded":
        assert np.frombuffer(first[:1024], "<i4")[:4].tolist() == [20240520, 1, 500, 0]
        assert first[1024:] == expected[:500].astype("<u2").tobytes()


def test_a_vocabulary_of_more_than_16_bits(tmp_path):
    """llm.c's other header in the default format; nanoGPT's has no room."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w69999 w1 w65536 w2 w3")
    named = FileTokenizerSpec(path=str(tmp_path / "tokenizer.json"))
    text, out = str(tmp_path / "text.txt"), tmp_path / "out"
    manifest = prepare(text, out, named, shard_tokens=3, workers=1)
    assert (manifest["format"], manifest["dtype"]) == ("modded", "uint32")
    first = (out / "shard_000000.bin").read_bytes()
    assert np.frombuffer(first[:12], "<i4").tolist() == [20240801, 7, 3]
    assert ids_of(out).tolist() == [69999, 1, 65536, 2, 3]
    with pytest.raises(AssayError, match=r"vocabulary is 70000, but nanoGPT's .bin holds uint16"):
        prepare(text, tmp_path / "other", named, form="nanogpt")


def test_processes_change_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("assay.data.prepare._TASK_CHARACTERS", 300)
    prepare(corpus, tmp_path / "one", BYTE, shard_tokens=700, workers=1)
    prepare(corpus, tmp_path / "two", BYTE, shard_tokens=700, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_broken_off_at_any_write_it_goes_on(corpus, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    settings = {"shard_tokens": 900, "workers": 1}
    prepare(corpus, whole, BYTE, **settings)
    write = cache.write

    for last in range(100):
        out, left = tmp_path / f"broken-{last}", last

        def broken(path, content):
            nonlocal left
            if out in path.parents:  # noqa: B023, called in this round alone
                left -= 1
                if left < 0:
                    path.parent.mkdir(exist_ok=True)
                    (path.parent / f".{path.name}.draft").write_bytes(content[:7])
                    raise KeyboardInterrupt
            write(path, content)

        monkeypatch.setattr(cache, "write", broken)
        try:
            prepare(corpus, out, BYTE, **settings)
        except KeyboardInterrupt:
            pass
        else:
            break
        if (out / "manifest.json").is_file():
            with pytest.raises(AssayError, match="preparation is not finished; run 'assay data"):
                open_corpus(str(out))
        finished = [shard["file"] for shard in (read_manifest(out) or {"shards": []})["shards"]]
        before = {name: (out / name).stat().st_ino for name in finished}
        monkeypatch.setattr(cache, "write", write)
        assert prepare(corpus, out, BYTE, **settings)["kept"] == len(before)
        assert {name: (out / name).stat().st_ino for name in before} == before
        assert contents(out) == contents(whole)
    assert last == 2 + 2 * len(read_manifest(whole)["shards"]) + 1


def test_killed_it_goes_on(tmp_path):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out"
    corpus.write_text(made_text(1000))
    many = tmp_path / "many.jsonl"
    many.write_text((json.dumps({"text": corpus.read_text()}) + "\n") * 1000)
    command = [sys.executable, "-m", "assay.cli", "data", "prepare", str(many), "--out", str(out)]
    command += ["--tokenizer", "byte", "--shard-tokens", "20000", "--workers", "2", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len((read_manifest(out) or {"shards": []})["shards"]) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    manifest = read_manifest(out)
    assert not manifest["complete"]
    before = {s["file"]: (out / s["file"]).stat().st_ino for s in manifest["shards"]}
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["complete"]
    assert result["kept"] == len(before) >= 2
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert result["bytes"] == open_corpus(str(many)).size
    text = (corpus.read_text().encode() + b"\0") * 1000
    found = ids_of(out)
    assert np.where(found == 256, 0, found).astype(np.uint8).tobytes() == text


def test_other_settings_are_refused(corpus, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text(made_text(50))
    prepare(corpus, out, BYTE, shard_tokens=900, workers=1)
    before = contents(out)
    for match, name, spec, settings in [
        ("another text", str(other), BYTE, {}),
        ("with shard_tokens 900, but here it is 901", corpus, BYTE, {"shard_tokens": 901}),
        ("with format modded, but here it is nanogpt", corpus, BYTE, {"form": "nanogpt"}),
        (r"tokenizer byte of 257 ids, but here it is char of", corpus, CharTokenizerSpec(), {}),
    ]:
        with pytest.raises(AssayError, match=match):
            prepare(name, out, spec, **{"shard_tokens": 900, "workers": 1} | settings)
    assert contents(out) == before
    assert prepare(corpus, out, BYTE, shard_tokens=900)["kept"] == len(before) - 2

    damaged = out / "shard_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(AssayError, match=r"shard_000001\.bin: is not what was written"):
        prepare(corpus, out, BYTE, shard_tokens=900)
    damaged.write_bytes(b"")
    with pytest.raises(AssayError, match=r"shard_000001\.bin: the manifest tells of 2824 bytes"):
        open_corpus(str(out))


def test_what_shards_cannot_hold_is_refused(corpus, tmp_path):
    out = tmp_path / "out"
    weighted = tmp_path / "weighted.jsonl"
    weighted.write_text('{"prompt": "a", "completion": "b"}\n')
    np.save(tmp_path / "ids.npy", np.arange(9))
    with pytest.raises(AssayError, match="has weights"):
        prepare(str(weighted), tmp_path / "w", BYTE, workers=1)
    with pytest.raises(AssayError, match="holds ids already"):
        prepare(str(tmp_path / "ids.npy"), out, BYTE)
    with pytest.raises(AssayError, match="found 'ids', which reads no text"):
        prepare(corpus, out, IdsTokenizerSpec())
    with pytest.raises(AssayError, match="format: found 'modedd'; did you mean 'modded'"):
        prepare(corpus, out, BYTE, form="modedd")
    with pytest.raises(AssayError, match="holds other files already"):
        prepare(corpus, tmp_path, BYTE)
    assert not out.exists()


def spec_of(folder, **changes):
    return DataSpec(sources=(SourceSpec(corpus=str(folder)),), seq_len=16, batch_size=4, **changes)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_training_takes_the_folder_as_it_is(corpus, tmp_path, packing):
    """The same documents, bytes and tokens as of the text: a shard's end ends no document."""
    out = tmp_path / "out"
    prepare(corpus, out, BpeTokenizerSpec(vocab_size=300), shard_tokens=100, workers=1)
    tokenizer = tokenizers.load(out)
    ready = loader.prepare(spec_of(out, packing=packing))  # the spec's own tokenizer is byte
    assert ready.tokenizer.fingerprint == tokenizer.fingerprint
    total = ready.train_bytes + ready.held_out_bytes
    assert total == open_corpus(corpus).size
    text = loader.tokenize(open_corpus(corpus), tokenizer)
    shard = loader.tokenize(open_corpus(str(out)), tokenizer, tokenizer.eos_id)
    assert shard.documents.tolist() == text.documents.tolist()
    assert (shard.bytes, shard.unknown) == (text.bytes, text.unknown)
    with loader.batches(ready, seed=0) as batches:
        assert next(batches)["tokens"].max() < tokenizer.vocab_size


def test_the_tokenizer_goes_with_the_ids(corpus, tmp_path, assay_command):
    out, char = tmp_path / "out", tmp_path / "char"
    prepare(corpus, out, BpeTokenizerSpec(vocab_size=300), workers=1)
    prepare(corpus, char, CharTokenizerSpec(), workers=1)
    # The last document's letters were held out of what the tokenizer learnt from.
    part = loader.tokenize(open_corpus(str(char)), tokenizers.load(char))
    assert part.unknown == loader.tokenize(open_corpus(corpus), tokenizers.load(char)).unknown > 0
    named = loader.prepare(spec_of(out, tokenizer=FileTokenizerSpec(path=str(out))))
    assert named.held_out_bytes
    with pytest.raises(AssayError, match=r"was made by another tokenizer \('char'"):
        loader.prepare(spec_of(char, tokenizer=FileTokenizerSpec(path=str(out))))
    for asked in (CharTokenizerSpec(), BYTE, BpeTokenizerSpec(vocab_size=301)):
        with pytest.raises(AssayError, match=r"prepared with its own \(bpe of \d+ ids\)"):
            refuse_other_tokenizer(str(out), asked)
    size = tokenizers.load(out).vocab_size
    refuse_other_tokenizer(str(out), BpeTokenizerSpec(vocab_size=size))
    refuse_other_tokenizer(corpus, BYTE)
    status, _, err = assay_command(
        *("train", "nano", "--data", out, "--tokenizer", "byte", "--out", tmp_path / "run")
    )
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith("assay: tokenizer: found byte, but ")
    assert not (tmp_path / "run").exists()
    both = DataSpec(
        sources=(SourceSpec(corpus=str(out)), SourceSpec(corpus=corpus)), seq_len=16, batch_size=4
    )
    assert loader.prepare(both).tokenizer.vocab_size == tokenizers.load(out).vocab_size


def test_assay_trains_on_it(corpus, tmp_path):
    from assay.spec.presets import get
    from assay.train.loop import train

    out = tmp_path / "out"
    prepare(corpus, out, BYTE, shard_tokens=800, workers=1)
    changes = {
        "data.sources": [{"corpus": str(out)}],
        "data.seq_len": 16,
        "data.batch_size": 2,
        "model.decoder.num_layers": 1,
        "train.budget": {"unit": "steps", "amount": 2},
    }
    result = train(get("nano").run.changed(changes), tmp_path / "run")
    assert result.val_bpb > 0
