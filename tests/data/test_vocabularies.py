"""tiktoken's ranks against its algorithm written plainly; the vocabularies of GGUF files."""

import base64
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.data import tokenizers, vocabularies
from assay.data.tokenizers import StreamDecoder, parse, read_file
from assay.data.vocabularies import GGUF_CUTS, KNOWN_RANKS, from_gguf, read_ranks
from assay.errors import AssayError

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
WORDS = [b"th", b"he", b"the", b" t", b" the", b"aa", b"aaa", "é".encode(), b"in", b"ing", b"\n\n"]
RANKS = {bytes([i]): i for i in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)}


def write(path, ranks=RANKS):
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return read_ranks(write(tmp_path_factory.mktemp("ranks") / "small.tiktoken"))


def merged(piece: bytes) -> list[int]:
    """tiktoken's byte_pair_merge: the pair of lowest rank, leftmost first, until there is none."""
    if piece in RANKS:
        return [RANKS[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [
            (RANKS[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in RANKS
        ]
        if not pairs:
            return [RANKS[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(
    words=st.lists(st.sampled_from(["the", "thing", "aaaa", "é", "in", "he", "xaaath"]), max_size=6)
)
def test_ranks_merge_as_tiktoken_does(small, words):
    text = " ".join(words)
    pieces = re.findall(r" ?[^\W\d_]+", text)  # what the expression cuts, of such texts
    assert "".join(pieces) == text
    wanted = [i for piece in pieces for i in merged(piece.encode())]
    assert small.encode(text).tolist() == wanted


@given(text=TEXTS)
def test_ranks_come_back(small, text):
    assert small.decode(small.encode(text)) == text


@given(ids=st.lists(st.integers(0, 266), max_size=40))
def test_any_ids_decode_to_their_bytes_and_stream(small, ids):
    """Byte-exact, and never half a character: what is streamed is the whole, decoded at once."""
    inverse = {rank: token for token, rank in RANKS.items()}
    content = b"".join(inverse[i] for i in ids)
    assert small.decode_bytes(ids) == content
    decoder = StreamDecoder(small)
    pieces = [decoder.feed(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == content.decode(errors="replace")
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in content.decode()


def test_a_rank_file_is_a_tokenizer_everywhere(tmp_path, small):
    path = write(tmp_path / "small.tiktoken")
    assert tokenizers.build(parse(str(path)), []).encode("the").tolist() == [258]
    assert read_file(path).eos_id == 267 == small.special_ids[tokenizers.END]
    small.save(tmp_path / "saved")
    assert (
        tokenizers.load(tmp_path / "saved").encode("thing é").tolist()
        == small.encode("thing é").tolist()
    )


def test_llama_3s_ranks_are_known_by_their_count(tmp_path, monkeypatch):
    """Meta's file is called tokenizer.model; a text begins with a token, whose id follows."""
    path = write(tmp_path / "tokenizer.model")
    count = len(path.read_bytes().splitlines())
    monkeypatch.setitem(vocabularies.BY_COUNT, count, "llama3")
    ours = read_file(path)
    assert ours.vocab_size == 128256
    assert len(ours.special_ids) == 256
    assert ours.encode("the").tolist() == [258]
    assert ours.prefix_ids == (128000,)
    assert (ours.eos_id, ours.bos_id) == (128001, 128000)
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(AssayError, match=r"SentencePiece's models are not read"):
        read_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dGhl 1\nnonsense\n", "line 2 is not a token in base64 and its rank"),
        (b"dGhl one\n", "line 1 is not"),
        (b"dGhl 1\n", "256 of the 256 bytes have no rank"),
    ],
)
def test_malformed_ranks(content, message, tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(AssayError, match=message):
        read_file(tmp_path / "x.tiktoken")


def test_every_expression_is_one_that_the_library_takes():
    from tokenizers import Regex

    for cut in {*GGUF_CUTS.values(), *(cut for cut, _ in KNOWN_RANKS.values())}:
        Regex(cut)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_cuts_are_those_that_transformers_has(pre):
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    text = "Hello  world's 12345 naïve\n\n  x = y+1; DON'T 猫🐈 ÀÉ/\r\n"
    ours, theirs = (
        pre_tokenizers.Split(Regex(cut), "isolated").pre_tokenize_str(text)
        for cut in (GGUF_CUTS[pre], GGUF_PRE_TOKENIZER_SPLITS[pre])
    )
    assert ours == theirs


def test_digits_stand_alone_in_smollm():
    characters = sorted(tokenizers.BYTE_OF, key=lambda c: tokenizers.BYTE_OF[c])
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*characters, "12", "Ġ1"],
        "tokenizer.ggml.merges": ["1 2", "Ġ 1"],
    }
    assert from_gguf(metadata).encode("a 12").tolist() == [97, 32, 49, 50]
    whole = from_gguf(metadata | {"tokenizer.ggml.pre": "gpt-2"})
    assert whole.encode("a12").tolist() == [97, 256]


# SentencePiece's vocabulary, as a Llama 2's GGUF has it: scores are minus the order of merging.
SPM = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
SPM += ["▁t", "he", "▁the", "▁", *"abcdehit"]
SPM_METADATA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SPM,
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(SPM) - 259)],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(SPM) - 259)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


@given(text=TEXTS)
def test_sentencepiece_as_transformers_rebuilds_it(text):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    names = {
        "tokenizer_type": "model",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
    }
    theirs, _ = convert_gguf_tokenizer(
        "llama", {name: SPM_METADATA[f"tokenizer.ggml.{key}"] for name, key in names.items()}
    )
    ours = from_gguf(SPM_METADATA)
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    if not text.startswith(" "):
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.unknown_id) == (1, 2, 0)


def test_what_begins_every_text():
    """SentencePiece's `<s>`, unless the file says that there is none; byte-level, only if so."""
    assert from_gguf(SPM_METADATA).prefix_ids == (1,)
    assert 1 not in from_gguf(SPM_METADATA).encode("the")
    assert from_gguf(SPM_METADATA | {"tokenizer.ggml.add_bos_token": False}).prefix_ids == ()
    again = tokenizers.HuggingFaceTokenizer(from_gguf(SPM_METADATA).to_files()["tokenizer.json"])
    assert again.prefix_ids == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert', not supported"),
        ({"tokenizer.ggml.scores": None}, "scores is missing"),
    ],
)
def test_vocabularies_that_are_not_known(changes, message):
    with pytest.raises(AssayError, match=message):
        from_gguf(SPM_METADATA | changes)
