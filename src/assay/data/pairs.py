"""Pairs of a source and a target text: what a model with an encoder is trained on.

A file holds one pair a line: `.jsonl` with `source` and `target` (and perhaps `weight`, of the
target's tokens in the loss), or `.tsv` with two columns. Three made corpora are always there.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple

from assay.data import corpora
from assay.data.corpora import Document, Segment, TextCorpus
from assay.errors import AssayError, check_text

FILES = (".jsonl", ".tsv")


class Pair(NamedTuple):
    """A source, its target, and the weight of the target's tokens in the training loss."""

    source: str
    target: str
    weight: float = 1.0


@dataclass(frozen=True)
class PairCorpus:
    """Pairs, in order. `read` starts again from the first one at every call."""

    name: str
    read: Callable[[], Iterator[Pair]]
    kind: ClassVar[str] = "pairs"

    def __iter__(self) -> Iterator[Document]:
        """All the text, each source before its target: what a tokenizer learns from."""
        for pair in self.read():
            yield Document((Segment(pair.source),))
            yield Document((Segment(pair.target, pair.weight),))

    @cached_property
    def _summary(self) -> tuple[int, str]:
        count, digest = 0, hashlib.sha256()
        for source, target, weight in self.read():
            count += 1
            contents = source.encode(), target.encode()
            digest.update(f"{[*map(len, contents)]} {weight!r} ".encode())
            digest.update(b"".join(contents))
        return count, digest.hexdigest()

    @property
    def count(self) -> int:
        return self._summary[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the contents."""
        return self._summary[1]

    @property
    def sources(self) -> TextCorpus:
        """The sources, a document each."""
        return TextCorpus(
            f"{self.name}'s sources", lambda: (Document((Segment(p.source),)) for p in self.read())
        )

    @property
    def targets(self) -> TextCorpus:
        """The targets, a document each."""
        return TextCorpus(
            f"{self.name}'s targets",
            lambda: (Document((Segment(p.target, p.weight),)) for p in self.read()),
        )


def split(corpus: PairCorpus, held_out: float) -> tuple[PairCorpus, PairCorpus]:
    """The training part, and the last `held_out` of the pairs. Nothing is drawn at random.

    Raises:
        AssayError: if either part would be empty.
    """
    cut = int(corpus.count * (1 - held_out))
    if not 0 < cut < corpus.count:
        raise AssayError(
            f"{corpus.name}: {corpus.count} pairs are too few to hold {held_out:g} of them out "
            f"and train on the rest."
        )
    return (
        PairCorpus(corpus.name, lambda: islice(corpus.read(), cut)),
        PairCorpus(corpus.name, lambda: islice(corpus.read(), cut, None)),
    )


# ---------------------------------------------------------------------------- made ones

LETTERS = "abcdefghij"
TASKS: dict[str, Callable[[str], str]] = {
    "copy-pairs": str,
    "reverse-pairs": lambda text: text[::-1],
    "sort-pairs": lambda text: "".join(sorted(text)),
}
"""Name -> the target of a source."""


def _made(task: str) -> Iterator[Pair]:
    """20,000 different strings of 4 to 12 letters, the same on every machine."""
    rng, seen = random.Random("assay pairs"), set()
    while len(seen) < 20_000:
        length = 4 + int(9 * rng.random())
        text = "".join(LETTERS[int(len(LETTERS) * rng.random())] for _ in range(length))
        if text not in seen:
            seen.add(text)
            yield Pair(text, TASKS[task](text))


# ---------------------------------------------------------------------------- by name or path


def open_pairs(name: str) -> PairCorpus:
    """The pairs of a name, a file, a folder or a glob; checked as they are read.

    Raises:
        AssayError: if there are none, or what is there is no pairs; while reading, if a line is
            malformed.
    """
    if name in TASKS:
        return PairCorpus(name, partial(_made, name))
    named = any(name == corpus.name for corpus in corpora.corpora()) or name.startswith("hf:")
    if named or (Path(name).is_file() and Path(name).suffix not in FILES):
        raise AssayError(
            f"{name}: holds no pairs of source and target, which a model with an encoder is "
            f"trained on; they are .jsonl with 'source' and 'target', .tsv with two columns, or "
            f"one of {', '.join(TASKS)}."
        )
    files = corpora.files_of(name, FILES, pairs=True)
    return PairCorpus(name, lambda: _pairs(name, files))


def _pairs(name: str, files: list[Path]) -> Iterator[Pair]:
    empty = True
    for file in files:
        read = _jsonl_pair if file.suffix == ".jsonl" else _tsv_pair
        for where, line in corpora.lines_of(file):
            pair = read(where, line)
            for field, text in (("source", pair.source), ("target", pair.target)):
                check_text(f"{where}: '{field}'", text)
                if not text:
                    raise AssayError(f"{where}: '{field}' is empty; leave the pair out.")
            empty = False
            yield pair
    if empty:
        raise AssayError(f"{name}: the corpus is empty.")


def _jsonl_pair(where: str, line: str) -> Pair:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise AssayError(f"{where} is not JSON ({error}).") from None
    if not isinstance(record, dict) or "source" not in record or "target" not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
        raise AssayError(
            f"{where} has not 'source' and 'target', which a model with an encoder is trained "
            f"on; found {found or 'no fields'}."
        )
    weight = corpora.weight_of(where, record)
    return Pair(record["source"], record["target"], weight)


def _tsv_pair(where: str, line: str) -> Pair:
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != 2:
        raise AssayError(
            f"{where} has {len(columns)} columns; expected two, source and target, with one tab "
            f"between them."
        )
    return Pair(*columns)
