"""Documents to batches. B sequences, T tokens a sequence, N tokens of a part of a corpus.

Every part is one row of ids, documents laid end to end, a separator (the end-of-document token)
after each. Its first id is context only: the separator, or for a held-out part the last id of the
training part. So each further id is predicted once from the one before it.

A part of a corpus of pairs is two such rows, of the sources and of the targets, document i of
each being pair i. A target is predicted after a start token: the one that begins a document.

Everything drawn at random is a function of (seed, index), so a position in the data is a number.
"""

import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from assay.data import cache, corpora, pairs, tokenizers
from assay.data.corpora import Corpus, Document, TokenCorpus
from assay.data.pairs import PairCorpus
from assay.data.shards import Joined
from assay.data.tokenizers import Tokenizer
from assay.errors import AssayError
from assay.spec.run import DataSpec

type Batch = dict[str, np.ndarray]
"""`tokens`, `targets` int32 [B, T]; perhaps `weights` float32 [B, T], of the targets; for packed
documents and pairs `segment_ids` int32 [B, T] (0 is padding), for documents `positions` int32
[B, T]; for pairs `source` int32 [B, S] and `source_mask` bool [B, S], False at padding."""

PREFETCH = 8
CACHE_FORMAT = "tokens-1"


@dataclass(frozen=True)
class Tokens:
    """One part of one corpus as ids.

    ids: integers [N], sliced, perhaps mapped from disk; `ids[0]` is context only.
    weights: float32 [N], of each id as a target, or None where all are 1.
    documents: int64 [documents, 2], the span of each document's targets in `ids`.
    bytes: UTF-8 bytes of the text, None where it is not known. Separators have none.
    scored_bytes: those of the text whose weight is over 0.
    unscored_first: the part's first token has no token before it, so `ids[0]` is that token.
    unknown: how many ids are the tokenizer's `<unk>`, whose text is lost.
    """

    ids: np.ndarray | Joined
    weights: np.ndarray | None
    documents: np.ndarray
    bytes: int | None
    scored_bytes: int | None
    unscored_first: bool
    unknown: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many ids are predicted."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class PairTokens:
    """One part of one corpus of pairs as ids. Each source ends with the end-of-document token.

    start: the id that stands before a target's first.
    rows: int64 [rows], the pairs that are used; those too long for training are left out.
    """

    source: Tokens
    target: Tokens
    start: int
    rows: np.ndarray

    def within(self, seq_len: int, source_len: int) -> "PairTokens":
        """The same without the pairs that are longer, in source or target."""
        fits = (_lengths(self.target) <= seq_len) & (_lengths(self.source) <= source_len)
        return replace(self, rows=np.flatnonzero(fits))

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest target and of the longest source that are used."""
        return tuple(int(_lengths(x)[self.rows].max()) for x in (self.target, self.source))

    @property
    def left_out(self) -> int:
        return len(self.target.documents) - len(self.rows)

    @property
    def targets(self) -> int:
        """Ids of all targets, ends among them."""
        return self.target.targets

    @property
    def weights(self) -> np.ndarray | None:
        return self.target.weights

    @property
    def bytes(self) -> int | None:
        """UTF-8 bytes of all targets."""
        return self.target.bytes

    @property
    def scored_bytes(self) -> int | None:
        return self.target.scored_bytes

    @property
    def unknown(self) -> int:
        return self.target.unknown


def _lengths(tokens: Tokens) -> np.ndarray:
    return tokens.documents[:, 1] - tokens.documents[:, 0]


type Part = Tokens | PairTokens


@dataclass(frozen=True)
class Prepared:
    """A DataSpec's corpora as ids: of each a training, a held-out and perhaps a validation part."""

    spec: DataSpec
    tokenizer: Tokenizer
    train: tuple[Part, ...]
    held_out: tuple[Part, ...]
    fingerprints: tuple[str, ...]
    validation: tuple[Part, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the batches but seed, batch size and sequence length."""
        decides = [
            list(self.fingerprints),
            [source.weight for source in self.spec.sources],
            self.spec.held_out,
            self.spec.packing,
            self.tokenizer.fingerprint,
            *([self.spec.validation] if self.spec.validation else []),
        ]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @property
    def train_tokens(self) -> int:
        return sum(part.targets for part in self.train)

    @property
    def held_out_tokens(self) -> int:
        """Tokens that evaluation predicts, separators among them."""
        return sum(part.targets for part in self.held_out)

    @property
    def train_bytes(self) -> int | None:
        return _sum(part.bytes for part in self.train)

    @property
    def held_out_bytes(self) -> int | None:
        """UTF-8 bytes of the held-out text; separators have none."""
        return _sum(part.bytes for part in self.held_out)

    @property
    def left_out(self) -> int:
        """Pairs of the training parts that are too long."""
        return sum(part.left_out for part in self.train if isinstance(part, PairTokens))

    def summary(self) -> dict[str, Any]:
        """What `run.json` keeps of the data."""
        sources = [
            {
                "corpus": source.corpus,
                "fingerprint": fingerprint,
                "train_bytes": train.bytes,
                "train_tokens": train.targets,
                "held_out_bytes": held.bytes,
                "held_out_tokens": held.targets,
                "held_out_unknown": held.unknown,
            }
            for source, fingerprint, train, held in zip(
                self.spec.sources, self.fingerprints, self.train, self.held_out, strict=True
            )
        ]
        for about, part in zip(sources, self.train, strict=True):
            if isinstance(part, PairTokens):
                about |= {"pairs": len(part.rows), "pairs_left_out": part.left_out}
        for about, part in zip(sources, self.validation, strict=False):  # perhaps there is none
            about |= {"validation_bytes": part.bytes, "validation_tokens": part.targets}
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "sources": sources,
        }


def _sum(counts: Iterable[int | None]) -> int | None:
    counts = list(counts)
    return None if None in counts else sum(counts)


# ---------------------------------------------------------------------------- text to ids


def prepare(spec: DataSpec, tokenizer: Tokenizer | None = None) -> Prepared:
    """Cuts the held-out parts off, learns the tokenizer from the rest, and makes ids of both.

    A validation part is cut off what the held-out one left, before anything is learnt from it.

    The ids are kept in the cache folder, by the contents of corpus and tokenizer, and mapped
    from there. `tokenizer` replaces the spec's.

    Raises:
        AssayError: for all that is wrong with a corpus; if a training part is shorter than one
            window; if shards hold ids that the vocabulary does not.
    """
    open_one = pairs.open_pairs if spec.packing == "pairs" else corpora.open_corpus
    sources = [open_one(source.corpus) for source in spec.sources]
    parts = [_parts(corpus, spec) for corpus in sources]
    if tokenizer is None:
        tokenizer = tokenizer_of(spec, sources, [train for train, *_ in parts])
    train, held_out, validation = [], [], []
    for corpus, (first, *middle, last) in zip(sources, parts, strict=True):
        key = _cut_key(corpus, spec)
        if corpus.kind == "pairs":
            train.append(_training_pairs(tokenize_pairs(first, tokenizer, f"{key} train"), spec))
            validation += [tokenize_pairs(part, tokenizer, f"{key} middle") for part in middle]
            held_out.append(tokenize_pairs(last, tokenizer, f"{key} held-out"))
            continue
        train.append(tokenize(first, tokenizer, key=f"{key} train"))
        found = len(train[-1])
        if found < spec.seq_len + 1:
            raise AssayError(
                f"{corpus.name}: its training part is {found} tokens, shorter than one window of "
                f"seq_len + 1 = {spec.seq_len + 1}; shorten data.seq_len or name a longer corpus."
            )
        context = int(train[-1].ids[found - 1 : found][0])
        for part in middle:
            validation.append(tokenize(part, tokenizer, context, key=f"{key} validation"))
            context = int(validation[-1].ids[len(validation[-1]) - 1 :][0])
        held_out.append(tokenize(last, tokenizer, context, key=f"{key} held-out"))
    fingerprints = tuple(corpus.fingerprint for corpus in sources)
    return Prepared(spec, tokenizer, tuple(train), tuple(held_out), fingerprints, tuple(validation))


def tokenize_pairs(corpus: PairCorpus, tokenizer: Tokenizer, key: str | None = None) -> PairTokens:
    """A whole corpus of pairs as ids, from the cache folder where it was done before.

    Raises:
        AssayError: if the tokenizer has no token that ends a text, or makes nothing of one.
    """
    if tokenizer.eos_id is None:
        raise AssayError(
            f"{corpus.name}: the tokenizer '{tokenizer.kind}' has no token that ends a text, "
            f"without which no target would end; name another."
        )
    key = key or corpus.fingerprint
    source = tokenize(corpus.sources, tokenizer, key=f"{key} sources")
    target = tokenize(corpus.targets, tokenizer, key=f"{key} targets")
    if len(source.documents) != len(target.documents):
        raise AssayError(
            f"{corpus.name}: the tokenizer makes no token at all of some source or target; "
            f"perhaps it is only white space."
        )
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return PairTokens(source, target, start, np.arange(len(target.documents)))


def _training_pairs(part: PairTokens, spec: DataSpec) -> PairTokens:
    fitting = part.within(spec.seq_len, spec.room_for_source)
    if not len(fitting.rows):
        target, source = part.longest()
        raise AssayError(
            f"data.seq_len: no pair fits into {spec.seq_len} tokens of target and "
            f"{spec.room_for_source} of source; the longest have {target} and {source}."
        )
    return fitting


def _parts(corpus: Corpus, spec: DataSpec) -> tuple[Corpus, ...]:
    """The training part, perhaps the validation part, and the held-out part, in this order."""
    first, last = corpora.split(corpus, spec.held_out)
    if not spec.validation:
        return first, last
    return *corpora.split(first, spec.validation), last


def _cut_key(corpus: Corpus, spec: DataSpec) -> str:
    """What names the parts of a corpus in the cache."""
    cuts = [spec.held_out, *([spec.validation] if spec.validation else [])]
    return " ".join([corpus.fingerprint, *map(repr, cuts)])


def tokenizer_of(spec: DataSpec, sources: list[Corpus], train: list[Corpus]) -> Tokenizer:
    """The spec's tokenizer; one that learns is learnt from the training parts' text only.

    Where a source is a prepared folder, its own tokenizer is taken, unless the spec names a file
    or mere ids.
    """
    if spec.tokenizer.kind in ("byte", "char", "bpe"):
        for corpus in sources:
            if corpus.kind == "tokens" and corpus.prepared:
                return tokenizers.load(corpus.prepared)
    learns = spec.tokenizer.kind in ("char", "bpe")
    if not learns:
        return tokenizers.build(spec.tokenizer, ())
    for corpus in sources:
        if corpus.kind == "tokens":
            raise AssayError(
                f"{corpus.name}: holds ids, of which a '{spec.tokenizer.kind}' tokenizer learns "
                f"nothing; name the tokenizer that made them, or ids:VOCABULARY."
            )
    key = [*(_cut_key(c, spec) for c in sources), spec.tokenizer.to_json()]
    folder = cache.folder() / "tokenizers" / _hash("tokenizer-1", *key)
    if (folder / tokenizers.FILE).is_file():
        return tokenizers.load(folder)
    tokenizer = tokenizers.build(
        spec.tokenizer, (document.text for corpus in train for document in corpus)
    )
    tokenizer.save(folder)
    return tokenizer


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, context: int | None = None, *, key: str | None = None
) -> Tokens:
    """A whole corpus as ids, from the cache folder where it was done before.

    Args:
        context: the id before the first one; the tokenizer's end-of-document id by default.
        key: what names the contents; the corpus's fingerprint by default.
    """
    if corpus.kind == "tokens":
        return _shards(corpus, tokenizer, context)
    if context is None:
        context = tokenizer.eos_id
    key = _hash(CACHE_FORMAT, key or corpus.fingerprint, tokenizer.fingerprint, str(context))
    folder = cache.folder() / "tokens" / key
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError):  # not there, or damaged: made anew
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key[:16]}."))
        try:
            _write(draft, corpus, tokenizer, context)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if not folder.is_dir():  # where it is one, another process was first, with the same
            raise cache.cannot_write(folder, error) from None
    return _read(folder)


def _write(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, context: int | None):
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    spans, count, size, scored, unknown, weighted = [], 0, 0, 0, 0, False
    with (folder / "ids").open("wb") as ids_file, (folder / "weights").open("wb") as weights_file:

        def put(ids: np.ndarray, weight: float) -> None:
            nonlocal count, weighted
            ids.astype(dtype).tofile(ids_file)
            np.full(len(ids), weight, np.float32).tofile(weights_file)
            count += len(ids)
            weighted = weighted or weight != 1

        if context is not None:
            put(np.array([context]), 1.0)
        for document in documents:
            start = count
            for text, weight in document.segments:
                ids = tokenizer.encode(text)
                size += len(text.encode())
                scored += len(text.encode()) if weight > 0 else 0
                if tokenizer.unknown_id is not None:
                    unknown += int((ids == tokenizer.unknown_id).sum())
                put(ids, weight)
            if count > start and document.ends and tokenizer.eos_id is not None:
                put(np.array([tokenizer.eos_id]), document.segments[-1].weight)
            # With no separator, a document's first token follows on nothing of its own.
            begin = start + (start == 0 or (tokenizer.eos_id is None and bool(spans)))
            if count > begin:
                spans.append((begin, count))
    if count == (context is not None):
        raise AssayError("a part of the corpus has no tokens; name a longer one.")
    if not weighted:
        (folder / "weights").unlink()
    np.save(folder / "documents.npy", np.array(spans, np.int64).reshape(-1, 2))
    about = {
        "count": count,
        "dtype": np.dtype(dtype).name,
        "bytes": size,
        "scored_bytes": scored,
        "weighted": weighted,
        "unscored_first": context is None,
        "unknown": unknown,
    }
    (folder / "about.json").write_text(json.dumps(about))


def _read(folder: Path) -> Tokens:
    about = json.loads((folder / "about.json").read_text())
    count = about["count"]

    def mapped(name: str, dtype: str) -> np.ndarray:
        if os.path.getsize(folder / name) != count * np.dtype(dtype).itemsize:
            raise ValueError(f"{folder / name} is damaged")
        # asarray keeps the mapping but drops the subclass, whose slices are slow.
        return np.asarray(np.memmap(folder / name, dtype, "r", shape=(count,)))

    return Tokens(
        mapped("ids", about["dtype"]),
        mapped("weights", "float32") if about["weighted"] else None,
        np.load(folder / "documents.npy"),
        about["bytes"],
        about["scored_bytes"],
        about["unscored_first"],
        about["unknown"],
    )


def _shards(corpus: TokenCorpus, tokenizer: Tokenizer, context: int | None) -> Tokens:
    """Ids as they were found, unmoved. A document ends at each end-of-document id and array.

    Of a prepared folder it is at each end-of-document id alone.
    """
    known = tokenizer.token_bytes() if tokenizer.kind != "ids" else None
    if corpus.prepared and known is not None:
        made_by = tokenizers.load(corpus.prepared)
        if (made_by.eos_id, [*made_by.pieces]) != (tokenizer.eos_id, [*tokenizer.pieces]):
            raise AssayError(
                f"{corpus.name}: was made by another tokenizer ('{made_by.kind}' of "
                f"{made_by.vocab_size} ids) than this '{tokenizer.kind}' of "
                f"{tokenizer.vocab_size} ids; prepare the text again with this one."
            )
    size, unknown, separators, ends, position, context_ids = 0, 0, [], [], 0, []
    if context is not None:
        context_ids, position = [np.array([context], np.uint32)], 1
    for array in corpus.ids.arrays:
        for start in range(0, len(array), 1 << 22):
            ids = np.asarray(array[start : start + (1 << 22)])
            worst = int(ids[np.argmax((ids < 0) | (ids >= tokenizer.vocab_size))])
            if not 0 <= worst < tokenizer.vocab_size:
                raise AssayError(
                    f"{corpus.name}: holds token id {worst}, but the vocabulary is "
                    f"{tokenizer.vocab_size}; name the tokenizer that made it, or ids:VOCABULARY."
                )
            if known is not None:
                size += int(known[ids].sum(dtype=np.int64))
            if tokenizer.unknown_id is not None:
                unknown += int((ids == tokenizer.unknown_id).sum())
            if tokenizer.eos_id is not None:
                separators.append(np.flatnonzero(ids == tokenizer.eos_id) + position + start + 1)
        position += len(array)
        ends.append(position)
    # The first token of a document has a token before it only if that is a separator.
    separated = np.concatenate([*separators, [1] if context is not None else []])
    if corpus.prepared:  # its arrays are cut for their size, inside documents
        ends = ends[-1:]
    ends = np.unique(np.concatenate([*separators, np.array(ends)]).astype(np.int64))
    starts = np.concatenate([[len(context_ids)], ends[:-1]])
    spans = np.stack([starts + ~np.isin(starts, separated), ends], axis=1)
    joined = Joined([*context_ids, *corpus.ids.arrays])
    size = size if known is not None else None
    spans = spans[spans[:, 0] < spans[:, 1]]
    return Tokens(joined, None, spans, size, size, context is None, unknown)


# ---------------------------------------------------------------------------- rows


class _Windows:
    """Stream packing: window i of an epoch, cut at that epoch's own offset.

    One window more than fit, so that whatever the offset, every target is in some window; those
    at the ends are moved inside.
    """

    def __init__(self, part: Tokens, seq_len: int, seed: int):
        self.part, self.seq_len, self.seed = part, seq_len, seed

    def __len__(self) -> int:
        return math.ceil((self.part.targets - 1) / self.seq_len) + 1

    def spans(self, index: int, epoch: int) -> list[tuple[int, int]]:
        start = index * self.seq_len - _offset(self.seed, epoch, self.seq_len)
        start = min(max(start, 0), self.part.targets - self.seq_len)
        return [(start + 1, start + 1 + self.seq_len)]


@functools.lru_cache(maxsize=256)
def _offset(seed: int, epoch: int, seq_len: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(seq_len))


class _Packed:
    """Documents packing: row i holds whole documents, the longer ones cut; the plan is fixed."""

    def __init__(self, part: Tokens, seq_len: int):
        self.rows = pack(part.documents, seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def spans(self, index: int, epoch: int = 0) -> list[tuple[int, int]]:
        return self.rows[index]


def pack(documents: np.ndarray, seq_len: int) -> list[list[tuple[int, int]]]:
    """Rows of spans, at most `seq_len` targets each, by best fit of the longest first.

    Args:
        documents: int64 [documents, 2], spans of targets. Longer ones are cut into pieces, each
            of which sees nothing of the one before it but its last token.
    """
    pieces = [
        (start, min(start + seq_len, end))
        for begin, end in documents.tolist()
        for start in range(begin, end, seq_len)
    ]
    pieces.sort(key=lambda span: (span[0] - span[1], span[0]))
    rows: list[list[tuple[int, int]]] = []
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows, by the room they have
    rooms = 0  # bit r is set where some row has room for r
    for span in pieces:
        length = span[1] - span[0]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            row, room = len(rows), seq_len
            rows.append([])
        rows[row].append(span)
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def _batch(
    rows: list[tuple[Tokens, list[tuple[int, int]]]],
    seq_len: int,
    *,
    weighted: bool,
    packed: bool,
) -> Batch:
    """Gathers rows, each a list of spans of targets in one part; what is left is padding."""
    shape = len(rows), seq_len
    batch = {"tokens": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32)}
    if weighted:
        batch["weights"] = np.zeros(shape, np.float32)
    if packed:
        batch["segment_ids"] = np.zeros(shape, np.int32)
        batch["positions"] = np.zeros(shape, np.int32)
    for b, (part, spans) in enumerate(rows):
        at = 0
        for number, (start, end) in enumerate(spans, 1):
            here = slice(at, at + end - start)
            ids = part.ids[start - 1 : end]
            batch["tokens"][b, here] = ids[:-1]
            batch["targets"][b, here] = ids[1:]
            if weighted:
                batch["weights"][b, here] = 1 if part.weights is None else part.weights[start:end]
            if packed:
                batch["segment_ids"][b, here] = number
                batch["positions"][b, here] = np.arange(end - start)
            at = here.stop
    return batch


class _OneEach:
    """Pairs: row i is one pair, that of the part's `rows[i]`."""

    def __init__(self, part: PairTokens):
        self.rows = part.rows

    def __len__(self) -> int:
        return len(self.rows)

    def spans(self, index: int, epoch: int = 0) -> int:
        return int(self.rows[index])


def _pair_batch(rows: list[tuple[PairTokens, int | None]], seq_len: int, source_len: int) -> Batch:
    """Gathers pairs, one a row; None is a row of padding."""
    spans = [
        [] if pair is None else [tuple(part.target.documents[pair].tolist())] for part, pair in rows
    ]
    targets = [(part.target, span) for (part, _), span in zip(rows, spans, strict=True)]
    batch = _batch(targets, seq_len, weighted=True, packed=True)
    del batch["positions"]  # there is one segment a row
    batch["source"] = np.zeros((len(rows), source_len), np.int32)
    batch["source_mask"] = np.zeros((len(rows), source_len), bool)
    for b, (part, pair) in enumerate(rows):
        if pair is not None:
            batch["tokens"][b, 0] = part.start
            start, end = part.source.documents[pair]
            batch["source"][b, : end - start] = part.source.ids[start:end]
            batch["source_mask"][b, : end - start] = True
    return batch


# ---------------------------------------------------------------------------- training batches


class Batches(Iterator[Batch]):
    """An endless iterator over batches whose whole state is the index of the next one.

    A thread makes the next few; `state` counts only those taken. `close` ends the thread.
    """

    def __init__(self, batches: Any, identity: Mapping[str, Any], start: int):
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._identity = dict(identity)
        self._seek(start)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.index += 1
        return batch

    def state(self) -> dict[str, Any]:
        """JSON-able: the index of the next batch, and what the batches are a function of."""
        return {"index": self.index, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken, under any number of processes.

        Raises:
            AssayError: if the state is of other data, another seed or another shape of batch.
        """
        for name, ours in self._identity.items():
            if (theirs := state.get(name)) != ours:
                raise AssayError(
                    f"the saved position in the data has {name} {theirs!r}, but this run has "
                    f"{ours!r}; they must be the same to go on."
                )
        if not isinstance(index := state.get("index"), int) or index < 0:
            raise AssayError(f"the saved position in the data has index {index!r}.")
        self._seek(index)

    def _seek(self, index: int) -> None:
        self._iterator.set_state({"next_index": index})
        self.index = index

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches(
    prepared: Prepared,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Batches:
    """Training batches from number `start` on, shuffled anew each epoch of each source.

    Global batch i is a function of (prepared, seed, i) alone. Of its rows only `rows` are read,
    those that this process needs (all by default): whoever shares the rows, the order is the
    same. Sources take turns by weight, so that any stretch of sequences holds
    them in proportion; each goes through its own epochs. Weights are to within 1% of the least.
    """
    import grain

    spec = prepared.spec
    own = range(spec.batch_size) if rows is None else tuple(rows)
    seeds = np.random.SeedSequence(seed).generate_state(len(prepared.train)).tolist()
    packed, paired = spec.packing == "documents", spec.packing == "pairs"

    def plan(part: Part, source_seed: int) -> _Windows | _Packed | _OneEach:
        if paired:
            return _OneEach(part)
        return _Packed(part, spec.seq_len) if packed else _Windows(part, spec.seq_len, source_seed)

    plans = [plan(*both) for both in zip(prepared.train, seeds, strict=True)]
    weighted = packed or any(part.weights is not None for part in prepared.train)

    def examples(source: int) -> Any:
        count = len(plans[source])
        # Endless, but for Grain's float arithmetic on lengths near 2**63.
        order = grain.MapDataset.range(count).shuffle(seed=seeds[source])
        order = order.repeat(max(1, 2**40 // count))
        return order.map_with_index(lambda index, row: (source, row, index // count))

    def gather(rows: list[tuple[int, int, int]]) -> Batch:
        mine = (rows[i] for i in own)
        chosen = [(prepared.train[s], plans[s].spans(row, epoch)) for s, row, epoch in mine]
        if paired:
            return _pair_batch(chosen, spec.seq_len, spec.room_for_source)
        return _batch(chosen, spec.seq_len, weighted=weighted, packed=packed)

    mixed = examples(0)
    if len(plans) > 1:  # of one it would change nothing, and take a tenth of a batch's time
        weights = [source.weight for source in spec.sources]
        mixed = grain.MapDataset.mix([mixed, *map(examples, range(1, len(plans)))], weights)
    identity = {
        "fingerprint": prepared.fingerprint,
        "seed": seed,
        "seq_len": spec.seq_len,
        "batch_size": spec.batch_size,
        **({"source_len": spec.room_for_source} if paired else {}),
    }
    return Batches(mixed.batch(spec.batch_size, batch_fn=gather), identity, start)


# ---------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """Batches that predict every token of some parts once; iterate as often as you like.

    bytes: UTF-8 bytes of the scored text, None where not known. Separators between documents
        are predicted as well, but have no bytes: they cost, as they do when text is generated.
    tokens: how many targets have weight 1, over all batches.
    unscored: how many tokens are in no batch; charge each log(vocabulary).
    """

    parts: tuple[Tokens, ...]
    batch_size: int
    seq_len: int
    stride: int
    packed: bool
    rows: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int | None:
        return _sum(part.scored_bytes for part in self.parts)

    @property
    def unscored(self) -> int:
        """Tokens with nothing before them: none, where the tokenizer has a separator."""
        given = sum(not part.unscored_first for part in self.parts)
        predicted = sum(int(np.diff(part_spans).sum()) for _, part_spans in self._spans())
        return sum(map(len, self.parts)) - given - predicted

    @property
    def unscored_first(self) -> bool:
        return self.unscored > 0

    @functools.cached_property
    def tokens(self) -> int:
        return sum(
            end - start if part.weights is None else int((part.weights[start:end] > 0).sum())
            for part, part_spans in self._spans()
            for start, end in part_spans.tolist()
        )

    def _spans(self) -> list[tuple[Tokens, np.ndarray]]:
        whole = [(part, np.array([[1, len(part)]])) for part in self.parts]
        return [(part, part.documents) for part in self.parts] if self.packed else whole

    def _rows(self) -> Iterator[tuple[Tokens, list[tuple[int, int]], int]]:
        """Each row: a part, spans of its targets, and how many of the first are context only."""
        for part in self.parts:
            if self.packed:
                yield from ((part, spans, 0) for spans in pack(part.documents, self.seq_len))
                continue
            scored_to = 1
            for start in range(1, len(part), self.stride):
                if scored_to >= len(part):
                    break
                end = min(start + self.seq_len, len(part))
                yield part, [(start, end)], scored_to - start
                scored_to = end

    def __len__(self) -> int:
        return math.ceil(sum(1 for _ in self._rows()) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches with `weights` 0 or 1; the last one is filled with rows of weight 0."""
        rows = []
        for row in self._rows():
            rows.append(row)
            if len(rows) == self.batch_size:
                yield self._batch(rows)
                rows = []
        if rows:
            yield self._batch(rows + [(rows[0][0], [], 0)] * (self.batch_size - len(rows)))

    def _batch(self, rows: list[tuple[Tokens, list[tuple[int, int]], int]]) -> Batch:
        rows = rows if self.rows is None else [rows[i] for i in self.rows]
        batch = _batch(
            [(part, spans) for part, spans, _ in rows],
            self.seq_len,
            weighted=True,
            packed=self.packed,
        )
        for b, (_, _, context) in enumerate(rows):
            batch["weights"][b, :context] = 0
        batch["weights"] = (batch["weights"] > 0).astype(np.float32)
        return batch


@dataclass(frozen=True)
class PairEvaluation:
    """Batches that predict every target of some parts once, whole, each from its own source.

    They are as long as the longest target and source, whatever training's room is.
    """

    pairs: tuple[PairTokens, ...]
    batch_size: int
    rows: tuple[int, ...] | None = None

    unscored = 0  # the start token stands before each target

    @property
    def parts(self) -> tuple[Tokens, ...]:
        return tuple(part.target for part in self.pairs)

    @property
    def seq_len(self) -> int:
        return max(part.longest()[0] for part in self.pairs)

    @property
    def source_len(self) -> int:
        return max(part.longest()[1] for part in self.pairs)

    @property
    def stride(self) -> int:
        return self.seq_len

    @property
    def bytes(self) -> int | None:
        """UTF-8 bytes of the targets."""
        return _sum(part.scored_bytes for part in self.pairs)

    def __len__(self) -> int:
        return math.ceil(sum(len(part.rows) for part in self.pairs) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches with `weights` 0 or 1; the last one is filled with rows of weight 0."""
        seq_len, source_len = self.seq_len, self.source_len
        rows = [(part, int(row)) for part in self.pairs for row in part.rows]
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            chosen += [(chosen[0][0], None)] * (self.batch_size - len(chosen))
            chosen = chosen if self.rows is None else [chosen[i] for i in self.rows]
            batch = _pair_batch(chosen, seq_len, source_len)
            batch["weights"] = (batch["weights"] > 0).astype(np.float32)
            yield batch


def evaluation_batches(
    data: Prepared | Iterable[Part],
    batch_size: int,
    seq_len: int | None = None,
    stride: int | None = None,
    packing: str | None = None,
    part: str = "held_out",
    rows: Sequence[int] | None = None,
) -> Evaluation | PairEvaluation:
    """The held-out parts (or any), every token predicted exactly once, in order.

    `part` names those of prepared data: held_out or validation. Of each batch's rows only `rows`
    are read, those that this process needs (all by default).

    Stream packing: windows of `seq_len` that start every `stride` (by default they do not
    overlap); of a window that overlaps the one before only the new targets have weight. Documents
    packing: as in training, no document sees another. Pairs: a row each, whole. Training weights
    count as 0 or 1.

    Raises:
        AssayError: if the stride is not in 1 to seq_len, or with packed documents.
    """
    if isinstance(data, Prepared):
        seq_len, packing = seq_len or data.spec.seq_len, packing or data.spec.packing
        data = data.validation if part == "validation" else data.held_out
    data, rows = tuple(data), None if rows is None else tuple(rows)
    if packing == "pairs":
        return PairEvaluation(data, batch_size, rows)
    if seq_len is None:
        raise AssayError("evaluation: seq_len is required where only tokens are given.")
    packed = packing == "documents"
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len or (packed and stride != seq_len):
        raise AssayError(
            f"stride: found {stride}; legal are 1 to seq_len ({seq_len}), and seq_len alone "
            f"where documents are packed."
        )
    return Evaluation(data, batch_size, seq_len, stride, packed, rows)
