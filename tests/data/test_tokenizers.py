import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from assay.data import tokenizers
from assay.data.tokenizers import END, StreamDecoder, build, load, parse
from assay.errors import AssayError
from assay.spec import run

TRAINING = ["the cat sat on the mat\nand the dog on the log\n\n  the end. " * 5, "naïve café 猫 🐈"]
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


def metaspace():
    """A tokenizer.json as SentencePiece's are: `▁` for a space, bytes for what is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdeht"]
    pieces += ["th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    library = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return library


BPE = tokenizers.train_bpe(TRAINING, 400)
CHAR = tokenizers.CharTokenizer("".join(TRAINING))
SPM = tokenizers.HuggingFaceTokenizer(metaspace().to_str(), eos="</s>", bos="<s>")
EXACT = {"byte": tokenizers.ByteTokenizer(), "bpe": BPE, "spm": SPM}
ALL = EXACT | {"char": CHAR}


@pytest.mark.parametrize("name", EXACT)
@given(text=TEXTS)
def test_bytes_come_back_exactly(name, text):
    assume(name != "spm" or "▁" not in text)  # which is how SentencePiece writes a space
    tokenizer = EXACT[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    if name != "spm":  # it puts a space first, which decoding takes off again
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@given(text=st.text(alphabet=sorted(set("".join(TRAINING)))))
def test_char_is_exact_on_its_alphabet(text):
    assert CHAR.decode(CHAR.encode(text)) == text
    assert len(CHAR.encode(text)) == len(text)
    assert CHAR.unknown_id not in CHAR.encode(text)


def test_char_knows_what_it_does_not_know():
    ids = CHAR.encode("aZt")
    assert ids.tolist()[1] == CHAR.unknown_id
    assert CHAR.decode(ids) == "a\ufffdt"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("special", [END, "<unk>", "</s>", "<s>"])
def test_text_cannot_smuggle_special_tokens_in(name, special):
    tokenizer = ALL[name]
    ids = tokenizer.encode(f"the {special} cat").tolist()
    forbidden = set(tokenizer.special_ids.values()) - {tokenizer.unknown_id}
    assert not forbidden & set(ids)
    if name != "char":
        assert tokenizer.decode(ids) == f"the {special} cat"


def test_training_text_cannot_smuggle_special_tokens_in():
    tokenizer = tokenizers.train_bpe([f"a{END}b " * 50], 400)
    assert tokenizer.eos_id not in tokenizer.encode(f"a{END}b")
    assert tokenizer.decode(tokenizer.encode(END)) == END


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_have_no_bytes(name):
    tokenizer = ALL[name]
    assert tokenizer.decode_bytes([tokenizer.eos_id]) == b""
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(AssayError, match=f"{outside} is outside the vocabulary"):
            tokenizer.decode([outside])


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_are_the_same(name, tmp_path):
    tokenizer = ALL[name]
    tokenizer.save(tmp_path)
    loaded = load(tmp_path)
    text = "the naïve cat's 猫\n"
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert loaded.fingerprint == tokenizer.fingerprint
    for field in ("kind", "vocab_size", "eos_id", "bos_id", "unknown_id", "special_ids"):
        assert getattr(loaded, field) == getattr(tokenizer, field)


def test_fingerprints_differ():
    others = [tokenizers.train_bpe(TRAINING, 265), tokenizers.CharTokenizer("abc")]
    assert len({t.fingerprint for t in [*ALL.values(), *others]}) == 6


def test_bpe_is_deterministic_and_learns():
    again = tokenizers.train_bpe(iter(TRAINING), 400)
    assert again.fingerprint == BPE.fingerprint
    assert BPE.vocab_size <= 400
    assert len(BPE.encode("the cat sat on the mat")) < 12
    assert tokenizers.train_bpe(TRAINING, 257).vocab_size == 257
    asked = run.BpeTokenizerSpec(vocab_size=200_000)
    few = tokenizers.fewer_than_asked(asked, 4021)
    assert few.startswith("The tokenizer has 4,021 ids of the 200,000 asked for")
    assert tokenizers.fewer_than_asked(asked, 200_000) is None
    assert tokenizers.fewer_than_asked(run.ByteTokenizerSpec(), 257) is None


@given(
    st.lists(
        st.sampled_from(["ab", "the", " ", "\n", "\n\n", "猫", "c\n"]), min_size=20, max_size=60
    )
)
def test_long_texts_in_pieces_are_the_same_ids(parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PIECE", 10)
        assert "".join(tokenizers._pieces(text)) == text
        for tokenizer in (BPE, SPM):  # the second may not be cut: each piece would get a space
            whole = tokenizer._library.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text).tolist() == whole


@pytest.mark.parametrize("name", EXACT)
@given(text=TEXTS)
def test_stream_decoder_never_splits_a_character(name, text):
    assume(name != "spm" or "▁" not in text)  # which is how SentencePiece writes a space
    tokenizer = EXACT[name]
    decoder = StreamDecoder(tokenizer)
    chunks = [decoder.feed(i) for i in tokenizer.encode(text).tolist()]
    streamed = "".join(chunks) + decoder.finish()
    assert streamed == (" " + text if name == "spm" and text else text)
    if "\ufffd" not in text:
        assert "\ufffd" not in streamed


def test_stream_decoder_at_a_cut_character():
    decoder = StreamDecoder(EXACT["byte"])
    assert [decoder.feed(i) for i in "é".encode()[:1]] == [""]
    assert decoder.finish() == "\ufffd"


# ---------------------------------------------------------------------------- files of others


def test_hugging_face_folder_names_its_ends(tmp_path):
    metaspace().save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).eos_id == 2  # the usual name
    assert load(tmp_path).bos_id == 1
    assert load(tmp_path).unknown_id == 0
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load(tmp_path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<s>"}, "bos_token": None})
    )
    assert load(tmp_path).eos_id == 1
    assert build(run.FileTokenizerSpec(path=str(tmp_path / "tokenizer.json")), ()).eos_id == 1


def test_spm_decodes_as_the_library_does():
    library = metaspace()
    text = "the bed à"
    ids = SPM.encode(text).tolist()
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert SPM.decode(ids) == library.decode(ids) == text


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"added_tokens": [], "model": 3}'])
def test_a_malformed_tokenizer_is_a_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(AssayError, match=r"tokenizer\.json"):
        load(tmp_path)
    (tmp_path / tokenizers.FILE).write_text(content)
    with pytest.raises(AssayError, match=r"assay_tokenizer\.json"):
        load(tmp_path)


def test_a_missing_tokenizer_is_a_sentence(tmp_path):
    with pytest.raises(AssayError, match="there is no such file"):
        load(tmp_path)


# ---------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("byte", run.ByteTokenizerSpec()),
        ("char", run.CharTokenizerSpec()),
        ("bpe", run.BpeTokenizerSpec()),
        ("bpe:2048", run.BpeTokenizerSpec(vocab_size=2048)),
        ("ids:512", run.IdsTokenizerSpec(vocab_size=512)),
    ],
)
def test_parse(text, spec):
    assert parse(text) == spec


def test_parse_refuses_with_the_nearest(tmp_path):
    assert parse(str(tmp_path)) == run.FileTokenizerSpec(path=str(tmp_path))
    with pytest.raises(AssayError, match="did you mean 'byte'"):
        parse("bytes")
    with pytest.raises(AssayError, match="found 'bpe:many'"):
        parse("bpe:many")
    with pytest.raises(AssayError, match="256"):
        parse("bpe:256")


def test_ids_read_no_text():
    tokenizer = build(run.IdsTokenizerSpec(vocab_size=10), ())
    assert tokenizer.decode([1, 9]) == "1 9 "
    with pytest.raises(AssayError, match="reads no text"):
        tokenizer.encode("a")
    with pytest.raises(AssayError, match="bytes are not known"):
        tokenizer.token_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("model"), "could not be read"),
        (lambda d: d["model"].update(merges=["th e"]), "could not be read"),
        (lambda d: d["model"]["vocab"].update(a=-1), "could not be read"),
        (lambda d: d["added_tokens"][0].update(id=[1]), "is not a Hugging Face tokenizer.json"),
    ],
    ids=["model", "merges", "id", "added"],
)
def test_spoilt_definitions_are_a_sentence(change, message, tmp_path):
    """The library itself panics on some of these."""
    tokenizers.train_bpe(["the cat sat "], 300).save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    change(definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(AssayError, match=message) as found:
        tokenizers.read_file(tmp_path)
    assert len(str(found.value).splitlines()) == 1


def test_a_template_that_is_no_text(tmp_path):
    tokenizers.train_bpe(["the cat sat "], 300).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(AssayError, match=r"chat_template.jinja: is not UTF-8 text"):
        tokenizers.read_file(tmp_path)
