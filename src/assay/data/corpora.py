"""Text, or ids already made of it: named corpora and paths, read document by document.

A corpus is never held whole in memory as text. `split` cuts the held-out part off its end,
before anything is shuffled.
"""

import codecs
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from assay.data import cache
from assay.errors import AssayError, check_text, did_you_mean, need_extra

if TYPE_CHECKING:
    from assay.data.shards import Joined

TEXT = (".txt", ".jsonl", ".parquet")
TOKENS = (".bin", ".npy", ".npz")

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


PAIRS = {
    "copy-pairs": "20,000 short strings, each with itself as the target",
    "reverse-pairs": "20,000 short strings, each with itself turned round as the target",
    "sort-pairs": "20,000 short strings, each with its letters in order as the target",
}
"""Named corpora of pairs, for models with an encoder (`pairs.py`)."""

_ONLY_PAIRS = (
    "holds pairs of source and target, which only a model with an encoder is trained on "
    "(nano-seq2seq, t5-small); a decoder takes 'prompt' and 'completion'."
)


class NoCorpusError(AssayError):
    """There is no corpus, and no file, of a name."""

    def of_run(self, folder: Path, otherwise: str = "") -> AssayError:
        """The same, where it was not the user who named it but the run in a folder."""
        return AssayError(
            f"{self} {folder / 'run.json'} names it; a relative path begins where the run was "
            f"trained: run this there{otherwise}."
        )


class Segment(NamedTuple):
    """A stretch of text and the weight of its tokens in the training loss."""

    text: str
    weight: float = 1.0


class Document(NamedTuple):
    """One text. `ends` is False where `split` cut it: no end-of-document token follows."""

    segments: tuple[Segment, ...]
    ends: bool = True

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class TextCorpus:
    """Documents of text. `read` starts again from the first one at every call."""

    name: str
    read: Callable[[], Iterator[Document]]
    kind: ClassVar[str] = "text"

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    @cached_property
    def _summary(self) -> tuple[int, str]:
        size, digest = 0, hashlib.sha256()
        for document in self:
            for text, weight in document.segments:
                content = text.encode()
                size += len(content)
                # Lengths come first, so that no two corpora hash the same stream of bytes.
                digest.update(f"{len(content)} {weight!r} ".encode())
                digest.update(content)
            digest.update(b"end " if document.ends else b"cut ")
        return size, digest.hexdigest()

    @property
    def size(self) -> int:
        """UTF-8 bytes of all the text."""
        return self._summary[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the contents: text, weights, and where documents end."""
        return self._summary[1]


@dataclass(frozen=True)
class TokenCorpus:
    """Ids [tokens] as they were found, without text. Each array is taken as one document.

    prepared: the folder that `prepare` made, which holds the tokenizer; its arrays are one row,
        cut only for their size, in which an end-of-document id ends each document.
    """

    name: str
    ids: "Joined"
    prepared: Path | None = None
    kind: ClassVar[str] = "tokens"

    @property
    def size(self) -> None:
        """Unknown without the tokenizer that made the ids."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ids as little-endian int64, and the arrays' lengths."""
        digest = hashlib.sha256(b"one row " if self.prepared else b"")
        for array in self.ids.arrays:
            digest.update(f"{len(array)} ".encode())
            for start in range(0, len(array), 1 << 20):
                digest.update(array[start : start + (1 << 20)].astype("<i8").tobytes())
        return digest.hexdigest()


type Corpus = TextCorpus | TokenCorpus

# ---------------------------------------------------------------------------- by name


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus that goes by a name. `size` is about right, in bytes, None where it varies."""

    name: str
    description: str
    size: int | None
    needs_network: bool
    read: Callable[[], Iterator[Document]] = field(repr=False)


def corpora() -> list[NamedCorpus]:
    """Every named corpus of text. `hf:` is a family: `hf:OWNER/DATASET:SPLIT#COLUMN`."""
    return [
        NamedCorpus(
            "python-docs",
            "Python's language reference, as pydoc_data.topics of the running Python has it",
            510_000,
            False,
            _python_docs,
        ),
        NamedCorpus(
            "python-stdlib",
            "the running Python's standard library in Python, without tests and pydoc_data",
            11_000_000,
            False,
            _python_stdlib,
        ),
        NamedCorpus(
            "shakespeare",
            "40,000 lines of Shakespeare (Karpathy's tinyshakespeare)",
            1_115_394,
            True,
            _shakespeare,
        ),
        NamedCorpus(
            "hf:",
            "a dataset of the Hugging Face Hub, hf:OWNER/DATASET[/CONFIG][:SPLIT[:COUNT]][#COLUMN]",
            None,
            True,
            lambda: _hugging_face("hf:"),
        ),
    ]


def _python_docs() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield _document(topics[name])


def _python_stdlib() -> Iterator[Document]:
    # pydoc_data is python-docs over again; _sysconfigdata holds one machine's paths.
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
    root = Path(os.__file__).parent
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(files):
        if skipped.isdisjoint(name.split("/")) and not name.startswith("_sysconfigdata"):
            yield _document(_decode(files[name]))


def _shakespeare() -> Iterator[Document]:
    path = cache.folder() / "corpora" / "shakespeare.txt"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        content = _fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256, path)
        cache.write(path, content)
    yield _document(content.decode())


def _fetch(url: str, sha256: str, path: Path) -> bytes:
    from http.client import HTTPException
    from urllib.request import urlopen

    by_hand = f"the file (SHA-256 {sha256}) may be put at {path} by hand."
    try:
        with urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        raise AssayError(f"{url}: could not be fetched ({error}); {by_hand}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise AssayError(f"{url}: sent other contents (SHA-256 {found}); {by_hand}")
    return content


def _hugging_face(name: str) -> Iterator[Document]:
    match = re.fullmatch(
        r"hf:(?P<path>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?"
        r"(:(?P<split>\w+)(:(?P<count>\d+))?)?(#(?P<column>\w+))?",
        name,
    )
    if not match:
        raise AssayError(
            f"{name}: is not of the form hf:OWNER/DATASET[/CONFIG][:SPLIT[:COUNT]][#COLUMN], "
            f"for example hf:roneneldan/TinyStories:train:10000#text."
        )
    # Kept as a file: the corpus is read several times, and the same on every machine's disk.
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = cache.folder() / "corpora" / f"hf-{key}.jsonl"
    if not path.is_file():
        _spool(name, match, path)
    return _jsonl(path)


def _spool(name: str, match: re.Match[str], path: Path) -> None:
    try:
        from datasets import load_dataset
    except ImportError:
        raise need_extra("datasets", "data", f"the corpus {name}") from None

    column, count = match["column"] or "text", match["count"]
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = load_dataset(
            match["path"], match["config"], split=match["split"] or "train", streaming=True
        )
        with draft.open("w", encoding="utf-8") as file:
            for row in rows.take(int(count)) if count else rows:
                if not isinstance(row.get(column), str):
                    raise AssayError(f"{name}: column '{column}': {did_you_mean(column, row)}")
                file.write(json.dumps({"text": row[column]}, ensure_ascii=False) + "\n")
        draft.replace(path)
    except AssayError:
        raise
    except Exception as error:  # the network, the Hub, the dataset's own code: anything at all
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise AssayError(f"{name}: could not be read from the Hugging Face Hub: {reason}") from None
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- by path


def open_corpus(name: str) -> Corpus:
    """The corpus of a name, a file, a folder or a glob. Text is checked as it is read.

    Raises:
        AssayError: if there is no such corpus, if its kind of file is not known, or if text and
            tokens are mixed; while reading, if a file is empty, binary, or malformed.
    """
    for named in corpora():
        if name == named.name and name != "hf:":
            return TextCorpus(name, _not_empty(name, named.read))
    if name.startswith("hf:"):
        return TextCorpus(name, _not_empty(name, lambda: _hugging_face(name)))
    if name in PAIRS or Path(name).suffix == ".tsv":
        from assay.data.pairs import open_pairs

        for _ in islice(open_pairs(name).read(), 1000):
            pass  # a file that is no good is told of as such
        raise AssayError(f"{name}: {_ONLY_PAIRS}")
    from assay.data import prepare

    if (manifest := prepare.read_manifest(folder := Path(name).expanduser())) is not None:
        return prepare.open_prepared(folder, manifest)
    files = files_of(name)
    tokens = [file for file in files if file.suffix in TOKENS]
    if not tokens:
        return TextCorpus(name, _not_empty(name, lambda: _texts(files)))
    if len(tokens) < len(files):
        text = next(file for file in files if file.suffix in TEXT)
        raise AssayError(f"{name}: mixes text ({text}) with tokens ({tokens[0]}); name one kind.")
    from assay.data import shards

    joined = shards.Joined([array for file in files for array in shards.read(file)])
    if not len(joined):
        raise AssayError(f"{name}: the corpus is empty.")
    return TokenCorpus(name, joined)


def files_of(
    name: str, suffixes: tuple[str, ...] = (*TEXT, *TOKENS), *, pairs: bool = False
) -> list[Path]:
    """The files with these suffixes that a path, a folder or a glob stands for, in order.

    Raises:
        AssayError: if there are none; what is legal is said of text, or of `pairs`.
    """
    path = Path(name).expanduser()
    legal = ", ".join(suffixes)
    if path.is_file():
        if path.suffix not in suffixes:
            raise AssayError(f"{name}: found extension '{path.suffix}'; legal are: {legal}.")
        return [path]
    if path.is_dir():
        found = [(file.relative_to(path), file) for file in path.rglob("*")]
    elif glob.has_magic(name):
        found = [
            (Path(file.name), file) for file in map(Path, glob.glob(str(path), recursive=True))
        ]
    else:
        raise NoCorpusError(
            f"{name}: there is no such corpus or file; {_nearest(name, path, suffixes, pairs)}"
        )
    files = sorted(
        file
        for shown, file in found
        if file.is_file()
        and file.suffix in suffixes
        and not any(part.startswith(".") for part in shown.parts)
    )
    if not files:
        raise AssayError(f"{name}: holds no corpus files; legal are: {legal}.")
    return files


def _nearest(name: str, path: Path, suffixes: tuple[str, ...], pairs: bool) -> str:
    """Ends a sentence: the nearest names, or all that are legal."""
    siblings = [
        str(path.with_name(entry.name))
        for entry in (path.parent.iterdir() if path.parent.is_dir() else ())
        if entry.is_dir() or entry.suffix in suffixes
    ]
    named = [corpus.name for corpus in corpora() if corpus.name != "hf:"]
    near = did_you_mean(name, [*([] if pairs else named), *PAIRS, *siblings])
    if near.startswith("did"):
        return near
    files = f"a path of {', '.join(suffixes)}"
    if pairs:
        return f"legal are pairs, for a model with an encoder: {', '.join(PAIRS)}, or {files}."
    return (
        f"legal are: {', '.join(named)}, hf:OWNER/DATASET or {files}; for a model with an encoder "
        f"{', '.join(PAIRS)}."
    )


def _not_empty(
    name: str, read: Callable[[], Iterator[Document]]
) -> Callable[[], Iterator[Document]]:
    def checked() -> Iterator[Document]:
        empty = True
        for document in read():
            empty = empty and not any(segment.text for segment in document.segments)
            yield document
        if empty:
            raise AssayError(f"{name}: the corpus is empty.")

    return checked


def _texts(files: list[Path]) -> Iterator[Document]:
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
    for file in files:
        yield from readers[file.suffix](file)


def _document(text: str) -> Document:
    return Document((Segment(text),))


def _txt(path: Path) -> Iterator[Document]:
    yield _document(_decode(path))


def _decode(path: Path) -> str:
    content = path.read_bytes()
    nul = content.find(0)
    if nul >= 0:
        raise AssayError(f"{path}: is not text: a NUL byte at offset {nul}.")
    try:
        return codecs.decode(content, "utf-8", "strict")
    except UnicodeDecodeError as error:
        raise AssayError(
            f"{path}: is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}."
        ) from None


def _jsonl(path: Path) -> Iterator[Document]:
    for where, line in lines_of(path):
        yield _record(where, line)


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """(where it is, text) of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise AssayError(
                    f"{path}: is not UTF-8 text: byte 0x{line[error.start]:02x} at offset "
                    f"{offset + error.start} (line {number})."
                ) from None
            offset += len(line)
            if text.strip():
                yield f"{path}: line {number}", text


def _record(where: str, line: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise AssayError(f"{where} is not JSON ({error}).") from None
    if not isinstance(record, dict):
        raise AssayError(f"{where} is {type(record).__name__}, not an object with 'text'.")
    weight = weight_of(where, record)
    pair = "prompt" in record and "completion" in record
    if "text" in record and pair:
        raise AssayError(
            f"{where} has 'text', and 'prompt' and 'completion' too; keep the one to train on."
        )
    if "text" in record:
        parts = {"text": weight}
    elif pair:
        parts = {"prompt": 0.0, "completion": weight}
    elif "source" in record and "target" in record:
        raise AssayError(f"{where} {_ONLY_PAIRS}")
    else:
        keys = ", ".join(map(repr, record)) or "no fields"
        raise AssayError(f"{where} has neither 'text' nor 'prompt' and 'completion'; found {keys}.")
    for key in parts:
        check_text(f"{where}: '{key}'", record[key])
    return Document(tuple(Segment(record[key], w) for key, w in parts.items()))


def weight_of(where: str, record: dict[str, Any]) -> float:
    """The weight of a record in the training loss; 1 where it names none."""
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
        raise AssayError(f"{where}: 'weight' is {weight!r}; expected a number, 0 or more.")
    return float(weight)


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise need_extra("pyarrow", "data", str(path)) from None
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                names = ", ".join(map(repr, file.schema_arrow.names))
                raise AssayError(f"{path}: has no column 'text'; found {names}.")
            row = 0
            for batch in file.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    check_text(f"{path}: row {row}", text)
                    yield _document(text)
                    row += 1
    except ArrowException as error:
        raise AssayError(f"{path}: is not a whole parquet file ({error}).") from None


# ---------------------------------------------------------------------------- held out


def split(corpus: Corpus, held_out: float = 0.1) -> tuple[Corpus, Corpus]:
    """The training part, and the last `held_out` of the corpus: of its bytes, or of its tokens.

    The cut falls at a character's start, just before the byte it was meant for where that one is
    inside a character. A document across the cut becomes two, the first of which does not end.
    Both parts laid end to end are the whole. Nothing is drawn at random.

    Raises:
        AssayError: if either part would be empty.
    """
    if corpus.kind == "pairs":
        from assay.data import pairs

        return pairs.split(corpus, held_out)
    if corpus.kind == "tokens":
        from assay.data.shards import Joined

        total = len(corpus.ids)
        cut = int(total * (1 - held_out))
        parts = [Joined(corpus.ids.parts(*span)) for span in ((0, cut), (cut, total))]
        if not all(map(len, parts)):
            raise _too_short(corpus, total, "tokens", held_out)
        return tuple(replace(corpus, ids=part) for part in parts)
    cut = character_start(corpus, int(corpus.size * (1 - held_out)))
    if not 0 < cut < corpus.size:
        raise _too_short(corpus, corpus.size, "bytes", held_out)
    return (
        TextCorpus(corpus.name, lambda: _slice(corpus, 0, cut)),
        TextCorpus(corpus.name, lambda: _slice(corpus, cut, corpus.size)),
    )


def _too_short(corpus: Corpus, size: int, unit: str, held_out: float) -> AssayError:
    return AssayError(
        f"{corpus.name}: {size} {unit} are too few to hold {held_out:g} of them out and train on "
        f"the rest."
    )


def character_start(corpus: TextCorpus, offset: int) -> int:
    """The last offset, in bytes, not after `offset` where a character of the text starts."""
    begin = 0
    for document in corpus:
        for text, _ in document.segments:
            content = text.encode()
            if begin <= offset < begin + len(content):
                while content[offset - begin] & 0xC0 == 0x80:
                    offset -= 1
                return offset
            begin += len(content)
    return offset


def _slice(corpus: TextCorpus, start: int, stop: int) -> Iterator[Document]:
    """The text from byte start to byte stop, both at a character's start."""
    begin = 0
    for document in corpus:
        kept, first = [], begin
        for text, weight in document.segments:
            content = text.encode()
            end = begin + len(content)
            if begin < stop and end > start:
                piece = content[max(start - begin, 0) : stop - begin]
                kept.append(Segment(piece.decode(), weight))
            begin = end
        if kept:
            yield Document(tuple(kept), document.ends and begin <= stop)
        elif first == begin and start <= begin < stop:
            yield document
        if begin >= stop:
            return
