import hashlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.data import cache, corpora, shards
from assay.data.corpora import Document, Segment, TextCorpus, open_corpus, split
from assay.errors import AssayError, need_extra


def corpus_of(*texts):
    return TextCorpus("made", lambda: (Document((Segment(t),)) for t in texts))


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def read_text(corpus):
    return "".join(document.text for document in corpus)


def test_importing_corpora_is_light():
    heavy = ["jax", "numpy", "grain", "datasets", "pyarrow", "tokenizers"]
    code = f"import sys, assay.data.corpora; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_docs_are_the_topics_in_order():
    from pydoc_data.topics import topics

    documents = list(open_corpus("python-docs"))
    assert [d.text for d in documents] == [topics[key] for key in sorted(topics)]


def test_python_stdlib_is_text_without_tests_or_this_machine():
    corpus = open_corpus("python-stdlib")
    texts = [document.text for document in corpus]
    assert 8e6 < corpus.size < 16e6
    assert texts == [document.text for document in corpus]
    assert any("class TestCase(object)" in text for text in texts)  # unittest is the library's
    assert not any("build_time_vars = {" in text[:200] for text in texts)


def test_every_named_corpus_without_network_opens():
    for named in corpora.corpora():
        if not named.needs_network:
            assert open_corpus(named.name).size == pytest.approx(named.size, rel=0.3)


# ---------------------------------------------------------------------------- files


def test_txt_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\nb\n".encode())
    (document,) = open_corpus(str(tmp_path / "a.txt"))
    assert document.text == "é\r\nb\n"


def test_jsonl_prompt_has_no_weight(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x\\u00e9"}\n\n{"prompt": "q", "completion": "a", "weight": 0.5}\n')
    assert list(open_corpus(str(path))) == [
        Document((Segment("xé", 1.0),)),
        Document((Segment("q", 0.0), Segment("a", 0.5))),
    ]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": ["a", "é"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert [d.text for d in open_corpus(str(tmp_path / "a.parquet"))] == ["a", "é"]
    parquet.write_table(pa.table({"content": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(AssayError, match="no column 'text'; found 'content'"):
        list(open_corpus(str(tmp_path / "b.parquet")))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(AssayError, match=r"c\.parquet: is not a whole parquet file"):
        list(open_corpus(str(tmp_path / "c.parquet")))


def test_folder_is_sorted_and_skips_hidden_and_unknown(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "b.txt": "2",
        "a.txt": "1",
        "sub/c.txt": "3",
        ".git/d.txt": "no",
        ".hidden.txt": "no",
        "readme.md": "no",
    }.items():
        (tmp_path / name).write_text(text)
    assert [d.text for d in open_corpus(str(tmp_path))] == ["1", "2", "3"]
    assert [d.text for d in open_corpus(str(tmp_path / "[ab].*"))] == ["1", "2"]
    assert [d.text for d in open_corpus(str(tmp_path / "**" / "*.txt"))] == ["1", "2", "3"]


def test_shards_are_joined_in_order(tmp_path):
    shards.write(tmp_path / "b.bin", np.array([3, 4]))
    shards.write(tmp_path / "a.npy", np.array([1, 2]))
    corpus = open_corpus(str(tmp_path))
    assert corpus.kind == "tokens"
    assert corpus.ids[0:4].tolist() == [1, 2, 3, 4]


def test_mixed_kinds_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", "x")
    shards.write(tmp_path / "b.bin", np.array([1]))
    with pytest.raises(AssayError, match=r"mixes text .*a\.jsonl.* with tokens .*b\.bin"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
        (b'{"text": "a"}\n\n{"body": 1}\n', r"line 3 has neither 'text' nor .*found 'body'"),
        (b"[1]\n", r"line 1 is list"),
        (b'{"text": 3}\n', r"line 1: 'text' is int, not text"),
        (b'{"text": "\\ud800"}\n', r"line 1: 'text' has half a surrogate pair at character 0"),
        (
            b'{"text": "a", "prompt": "b", "completion": "c"}',
            r"line 1 has 'text', and 'prompt' and",
        ),
        (b'{"text": "a", "weight": -1}\n', r"line 1: 'weight' is -1"),
        (b'{"text": "a", "weight": NaN}\n', r"line 1: 'weight' is nan"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"byte 0xff at offset 24 \(line 2\)"),
    ],
)
def test_bad_jsonl_is_told_by_line(tmp_path, content, sentence):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(AssayError, match=rf"a\.jsonl: .*{sentence}"):
        list(open_corpus(str(path)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the corpus is empty"),
        (b"ab\0c", "NUL byte at offset 2"),
        (b"ab\xffc", "byte 0xff at offset 2"),
        ("aé".encode()[:-1], "byte 0xc3 at offset 1"),
    ],
)
def test_bad_text_is_told_by_offset(tmp_path, content, sentence):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(AssayError, match=sentence):
        list(open_corpus(str(tmp_path / "a.txt")))


def test_missing_corpora_are_answered_with_the_nearest(tmp_path):
    (tmp_path / "stories.txt").write_text("x")
    with pytest.raises(AssayError, match="did you mean 'python-docs'"):
        open_corpus("python-doc")
    with pytest.raises(AssayError, match=r"did you mean '.*stories\.txt'"):
        open_corpus(str(tmp_path / "storys.txt"))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(AssayError, match=r"extension '\.md'; legal are: \.txt, \.jsonl"):
        open_corpus(str(tmp_path / "a.md"))
    (tmp_path / "void").mkdir()
    with pytest.raises(AssayError, match="holds no corpus files"):
        open_corpus(str(tmp_path / "void"))


# ---------------------------------------------------------------------------- the network


def test_shakespeare_is_fetched_once_verified_and_kept(tmp_path, monkeypatch):
    text = b"First Citizen:\n"
    calls = []
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda url, timeout: calls.append(url) or io.BytesIO(text)
    )
    assert read_text(open_corpus("shakespeare")) == text.decode()
    assert read_text(open_corpus("shakespeare")) == text.decode()
    assert len(calls) == 1
    (tmp_path / "corpora" / "shakespeare.txt").write_bytes(b"First Cit")  # cut short on disk
    assert read_text(open_corpus("shakespeare")) == text.decode()
    assert len(calls) == 2


def test_shakespeare_with_other_contents_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"sorry"))
    with pytest.raises(AssayError, match="sent other contents"):
        list(open_corpus("shakespeare"))
    assert not (tmp_path / "corpora" / "shakespeare.txt").exists()


def test_no_network_tells_where_the_file_goes(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise OSError("no route")

    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(AssayError, match=rf"no route.*{tmp_path}/corpora/shakespeare\.txt by hand"):
        list(open_corpus("shakespeare"))


class Rows(list):
    def take(self, count):
        return self[:count]


def test_hugging_face_datasets_are_streamed_to_a_file(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Rows([{"body": "a"}, {"body": "é"}, {"body": "c"}])

    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = open_corpus("hf:some/set/part:validation:2#body")
    assert [d.text for d in corpus] == [d.text for d in corpus] == ["a", "é"]
    assert asked == [(("some/set", "part"), {"split": "validation", "streaming": True})]
    with pytest.raises(AssayError, match="column 'bodi': did you mean 'body'"):
        list(open_corpus("hf:some/set#bodi"))
    assert len(list((tmp_path / "corpora").iterdir())) == 1  # no draft is left
    with pytest.raises(AssayError, match="is not of the form"):
        list(open_corpus("hf:some/set#a#b"))


def test_the_package_itself_streams(tmp_path, monkeypatch):
    """`datasets` takes a folder here as it takes the Hub's: parquet, in two files."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i, texts in enumerate((["a", "é"], ["c", "d"])):
        folder = tmp_path / "some" / "set" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"body": texts}), folder / f"train-0000{i}-of-00002.parquet")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert [d.text for d in open_corpus("hf:some/set:train#body")] == ["a", "é", "c", "d"]
    assert [d.text for d in open_corpus("hf:some/set:train:3#body")] == ["a", "é", "c"]


@pytest.mark.slow
def test_hugging_face_without_network_is_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    with pytest.raises(AssayError, match="could not be read from the Hugging Face Hub"):
        list(open_corpus("hf:some/set"))


def test_optional_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(AssayError, match=r"uv pip install -e '\.\[data\]'"):
        list(open_corpus("hf:some/set"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(AssayError, match=r"needs the package 'pyarrow'"):
        list(open_corpus(str(tmp_path / "a.parquet")))


def test_a_file_is_never_half_written(tmp_path):
    cache.write(tmp_path / "a", b"before")
    with pytest.raises(TypeError):
        cache.write(tmp_path / "a", "not bytes")
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_only_the_cache_folder_is_told_how_to_be_another(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    error = OSError(30, "Read-only file system")
    assert "ASSAY_CACHE" in str(cache.cannot_write(cache.folder() / "corpora" / "a", error))
    assert str(cache.cannot_write(tmp_path / "a", error)).endswith("(Read-only file system).")


# ---------------------------------------------------------------------------- fingerprint, split


def test_fingerprint_follows_every_content():
    same = corpus_of("ab", "c").fingerprint
    assert same == corpus_of("ab", "c").fingerprint
    weighted = TextCorpus(
        "made", lambda: iter([Document((Segment("ab", 0.5),)), Document((Segment("c"),))])
    )
    others = [corpus_of("a", "bc"), corpus_of("abc"), corpus_of("ab", "d"), weighted]
    assert len({same, *(other.fingerprint for other in others)}) == 5


def test_fingerprint_of_shards(tmp_path):
    def fingerprint(name, *arrays):
        for i, array in enumerate(arrays):
            shards.write(tmp_path / f"{name}{i}.npy", np.array(array))
        return open_corpus(str(tmp_path / f"{name}*.npy")).fingerprint

    assert fingerprint("a", [1, 2, 3]) == fingerprint("b", [1, 2, 3])
    assert len({fingerprint("c", [1, 2], [3]), fingerprint("d", [1], [2, 3])}) == 2


@given(
    st.lists(st.text(max_size=12), min_size=1, max_size=6),
    st.floats(0.05, 0.95),
)
def test_split_cuts_bytes_at_a_character(texts, held_out):
    corpus = corpus_of(*texts)
    try:
        train, held = split(corpus, held_out)
    except AssayError as error:
        assert "too few" in str(error)  # noqa: PT017
        assert corpus.size < 4 / min(held_out, 1 - held_out)
        return
    assert read_text(train) + read_text(held) == "".join(texts)
    assert 0 < train.size < corpus.size
    assert train.size + held.size == corpus.size
    wanted = int(corpus.size * (1 - held_out))
    assert wanted - 3 <= train.size <= wanted
    # What is cut is told, and only that.
    assert all(document.ends for document in held)
    pieces = len([t for t in texts if t]) - sum(1 for part in (train, held) for d in part if d.text)
    assert pieces == -sum(not document.ends for document in train)


def test_split_keeps_weights():
    corpus = TextCorpus(
        "made", lambda: iter([Document((Segment("abcd", 0.0), Segment("efgh", 2.0)))])
    )
    train, held = split(corpus, 0.25)
    assert list(train) == [Document((Segment("abcd", 0.0), Segment("ef", 2.0)), ends=False)]
    assert list(held) == [Document((Segment("gh", 2.0),))]


def test_split_of_shards_is_by_tokens(tmp_path):
    shards.write(tmp_path / "a.bin", np.arange(7))
    shards.write(tmp_path / "b.bin", np.arange(7, 20))
    train, held = split(open_corpus(str(tmp_path)), 0.1)
    assert train.ids[0:99].tolist() == list(range(18))
    assert held.ids[0:99].tolist() == [18, 19]
    shards.write(tmp_path / "b.bin", np.arange(7, 10))
    train, held = split(open_corpus(str(tmp_path)), 0.5)
    assert train.ids[0:99].tolist() == list(range(5))
    assert held.ids[0:99].tolist() == list(range(5, 10))


def test_too_short_to_split():
    with pytest.raises(AssayError, match="1 bytes are too few"):
        split(corpus_of("a"), 0.1)


def test_a_cached_file_can_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "plain").write_bytes(b"any file")
    cache.write(tmp_path / "cached", b"ours")
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "cached")]
    assert modes[0] == modes[1]


def test_the_group_parity_is_named_as_a_group():
    assert "uv pip install --group parity." in str(need_extra("torch", "parity", "Timing"))
