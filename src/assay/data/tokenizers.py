"""Text to ids and back: bytes, characters, BPE trained here, any Hugging Face tokenizer.json.

Other forms (GGUF, tiktoken) are `vocabularies`'; chat templates are `chat`'s.

Text is never read as a special token: `<|endoftext|>` inside a corpus or a prompt is thirteen
characters. A program that means the special token puts its id there.
"""

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from assay.data import cache
from assay.errors import AssayError, did_you_mean
from assay.spec import run

END = "<|endoftext|>"
UNKNOWN = "<unk>"
FILE = "assay_tokenizer.json"

type Ids = np.ndarray
"""Token ids, int32 [tokens]."""


class Tokenizer(Protocol):
    """What the rest of Assay asks of a tokenizer.

    `pieces[i]` are the bytes that id i stands for; special tokens stand for none. `prefix_ids`
    begin every text that a model is given alone (Llama's `<s>`); `encode` leaves them out.
    """

    kind: str
    vocab_size: int
    prefix_ids: tuple[int, ...]
    eos_id: int | None
    bos_id: int | None
    unknown_id: int | None
    special_ids: dict[str, int]
    pieces: Sequence[bytes]

    def encode(self, text: str) -> Ids: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self) -> np.ndarray: ...
    def to_files(self) -> dict[str, str]: ...
    @property
    def fingerprint(self) -> str: ...
    def save(self, folder: str | Path) -> None: ...


class _Base:
    """What follows from `pieces` and `to_files`, the same for every kind."""

    kind: ClassVar[str]
    vocab_size: int
    prefix_ids: tuple[int, ...] = ()
    eos_id: int | None = None
    bos_id: int | None = None
    unknown_id: int | None = None
    special_ids: dict[str, int]
    pieces: Sequence[bytes]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, exactly; an id outside the vocabulary raises AssayError."""
        return b"".join(self.pieces[i] for i in self._checked(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """How many bytes each id stands for, int32 [vocab]."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides what `encode` gives."""
        return hashlib.sha256(json.dumps(self.to_files(), sort_keys=True).encode()).hexdigest()

    def to_files(self) -> dict[str, str]:
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files into a folder, each atomically; `load` reads them."""
        for name, content in self.to_files().items():
            cache.write(Path(folder) / name, content.encode())

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).reshape(-1).tolist()
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise AssayError(f"token id {i} is outside the vocabulary of {self.vocab_size}.")
        return ids


class ByteTokenizer(_Base):
    """UTF-8 bytes as ids 0 to 255, and 256 that ends a document."""

    kind = "byte"
    vocab_size = 257
    eos_id = bos_id = 256
    special_ids: ClassVar = {END: 256}
    pieces = (*(bytes([i]) for i in range(256)), b"")

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def to_files(self) -> dict[str, str]:
        return {FILE: json.dumps({"kind": "byte"})}


class CharTokenizer(_Base):
    """One id a character of the alphabet, in code point order, then `<unk>`, `<|endoftext|>`.

    `unknown_id` stands for every other character, and decodes to U+FFFD.
    """

    kind = "char"

    def __init__(self, alphabet: Iterable[str]):
        self.alphabet = "".join(sorted(set(alphabet)))
        count = len(self.alphabet)
        self.vocab_size = count + 2
        self.unknown_id, self.eos_id = count, count + 1
        self.bos_id = self.eos_id
        self.special_ids = {UNKNOWN: self.unknown_id, END: self.eos_id}
        self.pieces = (*(c.encode() for c in self.alphabet), "\ufffd".encode(), b"")
        self._points = np.array([ord(c) for c in self.alphabet], np.uint32)

    def encode(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        if not self.alphabet:
            return np.full(len(points), self.unknown_id, np.int32)
        ids = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        known = self._points[ids] == points
        return np.where(known, ids, self.unknown_id).astype(np.int32)

    def to_files(self) -> dict[str, str]:
        return {FILE: json.dumps({"kind": "char", "alphabet": self.alphabet})}


class IdsTokenizer(_Base):
    """Only a vocabulary's size, for token shards whose tokenizer is not at hand.

    Ids decode to their decimal numbers; how many bytes of text they stood for is not known.
    """

    kind = "ids"
    special_ids: ClassVar = {}

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.pieces = [f"{i} ".encode() for i in range(vocab_size)]

    def encode(self, text: str) -> Ids:
        raise AssayError("tokenizer: found 'ids', which reads no text; name a tokenizer.json.")

    def token_bytes(self) -> np.ndarray:
        raise AssayError("tokenizer: found 'ids', of which the bytes are not known.")

    def to_files(self) -> dict[str, str]:
        return {FILE: json.dumps({"kind": "ids", "vocab_size": self.vocab_size})}


# A long text is taken in pieces, by the library's threads. They start where a line does that
# neither follows nor starts with blank: there most pre-tokenisers cut in any case.
_LINE_START = re.compile(r"(?<=\S\n)(?=\S)")
_PIECE = 1 << 16
_PROBES = (("ab\n", "cd"), ("1\n", "23"), (";\n", "(a"), ("a,\n", "é"), ("猫\n", "'s"))


def _pieces(text: str) -> list[str]:
    """A text cut at starts of lines, each piece at least `_PIECE` characters but the last."""
    cuts = [0]
    while cut := _LINE_START.search(text, cuts[-1] + _PIECE):
        cuts.append(cut.start())
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def _cuts_at_lines(library: Any) -> bool:
    """Whether pieces give the ids of the whole."""
    if library.normalizer is not None or library.pre_tokenizer is None:
        return False

    def words(text: str) -> list[str]:
        return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]

    return all(words(a + b) == words(a) + words(b) for a, b in _PROBES)


class HuggingFaceTokenizer(_Base):
    """A `tokenizer.json`: BPE trained here (kind "bpe") or made elsewhere ("file").

    The post-processor's special tokens (a leading `<s>`, say) are not added by `encode`: the
    loader puts document ends itself. Those that lead are `prefix_ids`, for prompts.
    """

    def __init__(
        self,
        definition: str,
        *,
        kind: str = "file",
        eos: str | None = None,
        bos: str | None = None,
        chat_template: str | None = None,
    ):
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_str(definition)
        except BaseException as error:  # the library raises the bare class, or it panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise AssayError(f"tokenizer.json: could not be read ({reason}).") from None
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # specials inside a text are text
        self.kind, self.eos_token, self.bos_token = kind, eos, bos
        self.chat_template = chat_template
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = vocabulary.get(eos)
        self.bos_id = vocabulary.get(bos, self.eos_id)
        self.prefix_ids = _leading(self._library)
        added = self._library.get_added_tokens_decoder()
        self.special_ids = {t.content: i for i, t in sorted(added.items()) if t.special}
        for name in (eos, bos):
            if name in vocabulary:
                self.special_ids[name] = vocabulary[name]
        parsed = json.loads(definition)
        model = parsed["model"]  # unigrams name the id, the others the token
        self.unknown_id = model.get("unk_id", vocabulary.get(model.get("unk_token")))
        decoders = _kinds(parsed.get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        self._drop_first_space = bool({"Metaspace", "Strip"} & decoders)
        self._cut_lines = _cuts_at_lines(self._library)
        specials = set(self.special_ids.values())
        self.pieces = [b""] * self.vocab_size
        for token, i in vocabulary.items():
            if i not in specials:
                self.pieces[i] = token.encode() if i in added else self._bytes_of(token)

    def _bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            return b"".join(BYTE_OF.get(c) or c.encode() for c in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def encode(self, text: str) -> Ids:
        pieces = _pieces(text) if self._cut_lines else [text]
        encoded = self._library.encode_batch_fast(pieces, add_special_tokens=False)
        return np.concatenate([np.array(e.ids, np.int32) for e in encoded])

    def encode_with_special(self, text: str) -> Ids:
        """As `encode`, but special tokens in the text are read as such: for chat templates."""
        return np.array(self._reads_special.encode(text, add_special_tokens=False).ids, np.int32)

    @cached_property
    def _reads_special(self) -> Any:
        from tokenizers import Tokenizer as Library

        return Library.from_str(self._library.to_str())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        content = super().decode_bytes(ids)
        return content.removeprefix(b" ") if self._drop_first_space else content

    def to_files(self) -> dict[str, str]:
        about = {"kind": self.kind, "eos": self.eos_token, "bos": self.bos_token}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "bos_token": self.bos_token,
        }
        if self.chat_template is not None:
            about["chat_template"] = config["chat_template"] = self.chat_template
        return {
            "tokenizer.json": self._library.to_str(),
            "tokenizer_config.json": json.dumps(config),
            FILE: json.dumps(about),
        }


def huggingface_files(tokenizer: Tokenizer) -> dict[str, str]:
    """`tokenizer.json` and its configuration, which `transformers` reads; none of mere ids."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {name: text for name, text in tokenizer.to_files().items() if name != FILE}
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {character: value[0] for character, value in BYTE_OF.items()}
        library = Library(models.BPE(vocabulary | {END: tokenizer.eos_id}, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: i for i, character in enumerate(tokenizer.alphabet)}
        library = Library(models.WordLevel(vocabulary | tokenizer.special_ids, unk_token=UNKNOWN))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        library.decoder = decoders.Fuse()
    else:
        return {}
    specials = [AddedToken(token, special=True) for token in tokenizer.special_ids]
    library.add_special_tokens(specials)
    made = HuggingFaceTokenizer(library.to_str(), eos=END, bos=END)
    return {name: text for name, text in made.to_files().items() if name != FILE}


def _leading(library: Any) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    alone, whole = (library.encode("a", add_special_tokens=add).ids for add in (False, True))
    for at in range(len(whole)):
        if alone and whole[at : at + len(alone)] == alone:
            return tuple(whole[:at])
    return ()


def _kinds(part: Any) -> set[str]:
    """The names of the parts, nested ones too, of a tokenizer.json's decoder or the like."""
    if isinstance(part, list):
        return {kind for entry in part for kind in _kinds(entry)}
    if not isinstance(part, dict):
        return set()
    nested = {kind for value in part.values() for kind in _kinds(value)}
    return nested | ({part["type"]} if isinstance(part.get("type"), str) else set())


def _byte_of() -> dict[str, bytes]:
    """The printable character that stands for each byte in GPT-2's vocabulary, backwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


BYTE_OF = _byte_of()


def fewer_than_asked(spec: run.TokenizerSpec, found: int) -> str | None:
    """Says that a BPE learnt fewer ids than it was to."""
    if spec.kind != "bpe" or found >= spec.vocab_size:
        return None
    return (
        f"The tokenizer has {found:,} ids of the {spec.vocab_size:,} asked for: the text holds no "
        f"more pairs to merge."
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Byte-level BPE with GPT-2's pre-tokenisation, learnt from `texts`.

    Id 0 is `<|endoftext|>`, 1 to 256 are the bytes. The vocabulary is smaller than asked where
    the texts hold no more pairs. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return HuggingFaceTokenizer(library.to_str(), kind="bpe", eos=END, bos=END)


# Tried in this order where no configuration names them.
_ENDS = (END, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]", "<|end|>")
_STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")


def read_file(path: str | Path) -> HuggingFaceTokenizer:
    """A Hugging Face tokenizer: a `tokenizer.json`, or a folder that holds one.

    The ids that end and start a document are those that `tokenizer_config.json`,
    `special_tokens_map.json`, `generation_config.json` or `config.json` beside it name, else the
    first of the usual names that is in the vocabulary.

    A file that ends in `.tiktoken` or `.model` holds ranks (`vocabularies.read_ranks`).

    Raises:
        AssayError: if there is no such file, or if it is malformed.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise AssayError(f"{file}: there is no such file; expected a Hugging Face tokenizer.json.")
    if file.suffix in (".tiktoken", ".model"):
        from assay.data.vocabularies import read_ranks

        return read_ranks(file)
    try:
        definition = file.read_text(encoding="utf-8")
        added = json.loads(definition)["added_tokens"]
        vocabulary = {token["content"]: token["id"] for token in added}
        named = {i: token for token, i in vocabulary.items()}
    except (ValueError, KeyError, TypeError):
        raise AssayError(f"{file}: is not a Hugging Face tokenizer.json.") from None

    def find(role: str, usual: tuple[str, ...]) -> str | None:
        for config in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _json(file.with_name(config)).get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
        for config in ("generation_config.json", "config.json"):
            i = _json(file.with_name(config)).get(f"{role}_token_id")
            i = i[0] if isinstance(i, list) and i else i
            if isinstance(i, int) and i in named:
                return named[i]
        return next((token for token in usual if token in vocabulary), None)

    eos, bos, template = find("eos", _ENDS), find("bos", _STARTS), _chat_template(file.parent)
    try:
        return HuggingFaceTokenizer(definition, eos=eos, bos=bos, chat_template=template)
    except AssayError as error:
        raise AssayError(f"{file}: {error}") from None


def _chat_template(folder: Path) -> str | None:
    """A folder's chat_template.jinja, or the one (or the default one) of its configuration."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError:
            raise AssayError(f"{file}: is not UTF-8 text.") from None
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def build(spec: run.TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a spec; `texts` (the training part's documents) are read if it learns."""
    match spec.kind:
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer(set().union(*map(set, texts)))
        case "bpe":
            return train_bpe(texts, spec.vocab_size)
        case "file":
            return read_file(spec.path)
        case "ids":
            return IdsTokenizer(spec.vocab_size)
    raise AssertionError(spec.kind)


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote, or a Hugging Face folder's.

    Raises:
        AssayError: if the folder holds neither, or if a file is malformed.
    """
    folder = Path(folder)
    file = folder / FILE
    if not file.is_file():
        return read_file(folder)
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        match about["kind"]:
            case "byte":
                return ByteTokenizer()
            case "char":
                return CharTokenizer(about["alphabet"])
            case "ids":
                return IdsTokenizer(about["vocab_size"])
            case "bpe" | "file":
                definition = (folder / "tokenizer.json").read_text(encoding="utf-8")
                return HuggingFaceTokenizer(definition, **about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssayError(f"{file}: could not be read ({error}).") from None
    raise AssayError(f"{file}: kind: found '{about['kind']}'; {did_you_mean(about['kind'], KINDS)}")


KINDS = ("byte", "char", "bpe", "ids", "file")


def parse(text: str) -> run.TokenizerSpec:
    """A spec from the command line: byte, char, bpe, bpe:2048, ids:50257, or a path.

    Raises:
        AssayError: if it is none of them; the nearest name is told.
    """
    name, _, size = text.partition(":")
    if name in ("bpe", "ids") and (size.isdigit() or not size):
        spec = run.BpeTokenizerSpec if name == "bpe" else run.IdsTokenizerSpec
        return spec(vocab_size=int(size)) if size else spec()
    if text == "byte":
        return run.ByteTokenizerSpec()
    if text == "char":
        return run.CharTokenizerSpec()
    if Path(text).expanduser().exists():
        return run.FileTokenizerSpec(path=text)
    legal = ["byte", "char", "bpe", "bpe:4096", "ids:50257", "a path of a tokenizer.json"]
    raise AssayError(f"tokenizer: found '{text}'; {did_you_mean(text, legal)}")


class StreamDecoder:
    """Text of ids that come one at a time; a character is given when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer):
        self._pieces = tokenizer.pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this id completes, often none."""
        return self._utf8.decode(self._pieces[token])

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD where a character was cut short."""
        return self._utf8.decode(b"", final=True)
