"""A corpus tokenised once, to shards that training maps from disk.

The folder holds the shards, the tokenizer, and `manifest.json`, which tells of both. Shards are
one row of ids, an end-of-document token after each document, cut every `shard_tokens` wherever
that falls. What is in them depends on the text, the tokenizer and `shard_tokens` alone: neither on
the number of processes, nor on where the work was broken off. After each shard the manifest says
which document, and which of its tokens, comes next.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from assay.data import cache, corpora, loader, shards, tokenizers
from assay.data.corpora import TextCorpus, TokenCorpus
from assay.data.tokenizers import Tokenizer
from assay.errors import AssayError, did_you_mean
from assay.spec.run import BpeTokenizerSpec, DataSpec, SourceSpec, TokenizerSpec

FILE = "manifest.json"
VERSION = "prepared-1"
FORMATS = {"modded": "bin", "nanogpt": "bin", "npy": "npy"}
"""modded: llm.c's header of 256 int32, then uint16, or uint32 where the vocabulary is larger.
nanogpt: uint16 alone. npy: uint16 or uint32."""

SHARD_TOKENS = 100_000_000
_TASK_CHARACTERS, _TASK_DOCUMENTS = 1 << 20, 4096

type Manifest = dict[str, Any]


def prepare(
    name: str,
    out: str | Path,
    tokenizer: TokenizerSpec | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    form: str = "modded",
    held_out: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Tokenises a corpus to shards in `out`; goes on where the same work was broken off.

    Args:
        name: a corpus of text, as `corpora.open_corpus` takes it.
        tokenizer: one that learns (bpe, char) learns nothing of the corpus's last `held_out`.
        workers: processes; one for each CPU by default.
        progress: called with the bytes of text done, and those of all of it.

    Returns:
        The manifest, with `kept`, the number of shards that were there already.

    Raises:
        AssayError: if the corpus holds ids or weights; if the ids do not fit in the format; if
            the folder holds anything else, a preparation of other settings, or a damaged shard.
    """
    out, tokenizer = Path(out).expanduser(), tokenizer or BpeTokenizerSpec()
    if form not in FORMATS:
        raise AssayError(f"format: found '{form}'; {did_you_mean(form, FORMATS)}")
    if shard_tokens < 1:
        raise AssayError(f"shard_tokens: found {shard_tokens}; it is at least 1.")
    if tokenizer.kind == "ids":
        raise AssayError("tokenizer: found 'ids', which reads no text; name a tokenizer.json.")
    corpus = corpora.open_corpus(name)
    if corpus.kind == "tokens":
        raise AssayError(f"{name}: holds ids already; train on it as it is.")
    _refuse_other_files(out)

    # The training part alone is what a tokenizer learns from, as when training reads the text.
    spec = DataSpec(sources=(SourceSpec(corpus=name),), tokenizer=tokenizer, held_out=held_out)
    training = corpora.split(corpus, held_out)[0] if tokenizer.kind in ("bpe", "char") else corpus
    made = loader.tokenizer_of(spec, [corpus], [training])
    if form == "nanogpt" and made.vocab_size > 2**16:
        raise AssayError(
            f"tokenizer: its vocabulary is {made.vocab_size}, but nanoGPT's .bin holds uint16, up "
            f"to 65536 ids; --format modded holds more."
        )
    wanted = {
        "version": VERSION,
        "source": name,
        "source_fingerprint": corpus.fingerprint,
        "text_bytes": corpus.size,
        "format": form,
        "dtype": "uint16" if made.vocab_size <= 2**16 else "uint32",
        "shard_tokens": shard_tokens,
        "tokenizer": {
            "file": _tokenizer_file(made),
            "fingerprint": made.fingerprint,
            "kind": made.kind,
            "vocab_size": made.vocab_size,
            "eos_id": made.eos_id,
        },
        "complete": False,
        "shards": [],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssayError(f"{out}: cannot be made ({error.strerror}).") from None
    with _alone(out):
        manifest = _begun(out, wanted)
        kept = len(manifest["shards"])
        if not manifest["complete"]:
            for whole in (FILE, "shard_*", *made.to_files()):
                for draft in out.glob(f".{whole}.*"):  # of a write that was broken off
                    draft.unlink()
            made.save(out)
            _make(out, manifest, corpus, made, workers or os.cpu_count() or 1, progress)
    return manifest | {"kept": kept}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a prepared folder, None where it is not one."""
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("version") == VERSION else None


def open_prepared(folder: Path, manifest: Manifest) -> TokenCorpus:
    """A prepared folder's ids, mapped, as one row.

    Raises:
        AssayError: if its preparation was broken off, or if a shard is not of the size told.
    """
    if not manifest["complete"]:
        raise AssayError(
            f"{folder}: its preparation is not finished; run 'assay data prepare "
            f"{manifest['source']} --out {folder}' again, with the same settings, to go on."
        )
    arrays = []
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        _check_size(path, shard)
        arrays += shards.read(path)
    return TokenCorpus(str(folder), shards.Joined(arrays), folder)


def refuse_other_tokenizer(corpus: str, asked: TokenizerSpec) -> None:
    """A prepared folder is read by its own tokenizer; this says so to who asks for another.

    Raises:
        AssayError: if the corpus is such a folder, and its tokenizer of another kind or size.
    """
    manifest = read_manifest(Path(corpus).expanduser())
    if manifest is None or asked.kind in ("file", "ids"):  # those are held to the ids themselves
        return
    own = manifest["tokenizer"]
    size = asked.vocab_size if asked.kind == "bpe" else own["vocab_size"]
    if (own["kind"], own["vocab_size"]) != (asked.kind, size):
        found = asked.kind + (f" of {size} ids" if asked.kind == "bpe" else "")
        raise AssayError(
            f"tokenizer: found {found}, but {corpus} was prepared with its own ({own['kind']} of "
            f"{own['vocab_size']} ids), which training takes; leave --tokenizer out."
        )


def _refuse_other_files(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise AssayError(f"{out}: is a file; name a folder.")
    others = out.is_dir() and any(not file.name.startswith(".") for file in out.iterdir())
    if others and read_manifest(out) is None:
        raise AssayError(f"{out}: holds other files already; name a new folder.")


def _tokenizer_file(tokenizer: Tokenizer) -> str:
    files = tokenizer.to_files()
    return "tokenizer.json" if "tokenizer.json" in files else next(iter(files))


def _begun(out: Path, wanted: Manifest) -> Manifest:
    """The manifest that is there, held to what is wanted and to its shards; else a new one."""
    found = read_manifest(out)
    if found is None:
        _put(out, wanted)
        return wanted
    if found["source_fingerprint"] != wanted["source_fingerprint"]:
        raise AssayError(
            f"{out}: holds the preparation of another text ({found['source']}, or what it was "
            f"then); name a new folder."
        )
    for name in ("tokenizer", "format", "shard_tokens"):
        theirs, ours = found[name], wanted[name]
        if theirs == ours:
            continue
        if name == "tokenizer":
            theirs, ours = (f"{x['kind']} of {x['vocab_size']} ids" for x in (theirs, ours))
            ours += " (another one)" if theirs == ours else ""
        raise AssayError(
            f"{out}: was begun with {name} {theirs}, but here it is {ours}; give the same, or "
            f"name a new folder."
        )
    for shard in found["shards"]:
        _check_size(out / shard["file"], shard)
        if _sha256(out / shard["file"]) != shard["sha256"]:
            raise AssayError(
                f"{out / shard['file']}: is not what was written (its SHA-256 differs); delete "
                f"{out} and prepare it again."
            )
    return found


def _check_size(path: Path, shard: dict[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != shard["file_bytes"]:
        found = "it is not there" if size is None else f"it has {size}"
        raise AssayError(
            f"{path}: the manifest tells of {shard['file_bytes']} bytes, but {found}; delete "
            f"{path.parent} and prepare it again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(out: Path, manifest: Manifest) -> None:
    cache.write(out / FILE, (json.dumps(manifest, indent=1) + "\n").encode())


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder against a second preparation; a process that dies lets go."""
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AssayError(f"{out}: another process is preparing it.") from None
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------- the work


def _make(
    out: Path,
    manifest: Manifest,
    corpus: TextCorpus,
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """The shards that are missing. A shard is whole before the manifest tells of it."""
    known, limit = tokenizer.token_bytes(), manifest["shard_tokens"]
    last = manifest["shards"][-1:] or [{"next_document": 0, "next_token": 0}]
    document, at = last[0]["next_document"], last[0]["next_token"]
    pending: list[np.ndarray] = []
    held = 0

    def finish(next_document: int, next_token: int) -> None:
        nonlocal held
        ids = np.concatenate(pending)
        suffix = FORMATS[manifest["format"]]
        path = out / f"shard_{len(manifest['shards']):06d}.{suffix}"
        shards.write(path, ids, header=manifest["format"] == "modded")
        about = {
            "file": path.name,
            "tokens": len(ids),
            "bytes": int(known[ids].sum(dtype=np.int64)),
            "file_bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "next_document": next_document,
            "next_token": next_token,
        }
        manifest["shards"].append(about)
        _put(out, manifest)
        pending.clear()
        held = 0

    done = 0

    def told(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, manifest["text_bytes"])

    tasks = _tasks(corpus, document, told)
    for ids, lengths, size in _encoded(tasks, out, workers, manifest["dtype"]):
        ends = np.cumsum(lengths)
        while at < len(ids):
            taken = min(limit - held, len(ids) - at)
            pending.append(ids[at : at + taken])
            held, at = held + taken, at + taken
            if held == limit:
                whole = int(np.searchsorted(ends, at, side="right"))
                finish(document + whole, at - int(ends[whole - 1] if whole else 0))
        document, at = document + len(lengths), 0
        told(size)
    if held:
        finish(document, 0)
    if not manifest["shards"]:
        raise AssayError(f"{corpus.name}: the tokenizer makes no token of it.")
    manifest["complete"] = True
    manifest["documents"] = document
    for name in ("tokens", "bytes"):
        manifest[name] = sum(shard[name] for shard in manifest["shards"])
    _put(out, manifest)


def _tasks(corpus: TextCorpus, skipped: int, told: Callable[[int], None]) -> Iterator[list[str]]:
    """Texts of documents in order, about a million characters together, after those `skipped`."""
    documents = iter(corpus)
    told(sum(len(document.text.encode()) for document in islice(documents, skipped)))
    texts, size = [], 0
    for document in documents:
        if any(weight != 1 for _, weight in document.segments):
            raise AssayError(
                f"{corpus.name}: has weights (or prompts, whose weight is 0), which shards do not "
                f"hold; train on it as it is."
            )
        texts.append(document.text)
        size += len(texts[-1])
        if size >= _TASK_CHARACTERS or len(texts) == _TASK_DOCUMENTS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


type _Encoded = tuple[np.ndarray, list[int], int]
"""Ids of some documents [tokens], how many each has, and the bytes of their text."""


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> _Encoded:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = [tokenizer.encode(text) for text in texts]
    rows = [np.append(row, end).astype(dtype) if len(row) else row.astype(dtype) for row in rows]
    size = sum(len(text.encode()) for text in texts)
    return np.concatenate(rows), [len(row) for row in rows], size


def _encoded(
    tasks: Iterable[list[str]], folder: Path, workers: int, dtype: str
) -> Iterator[_Encoded]:
    """Every task's ids, in order; a few tasks more than there are workers are under way."""
    if workers == 1:
        tokenizer = tokenizers.load(folder)
        yield from (_encode(texts, tokenizer, dtype) for texts in tasks)
        return
    # Spawned, not forked: the caller may have threads (JAX's, the tokenizer's).
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_begin, initargs=(folder, dtype)
    )
    waiting = deque()
    try:
        for texts in tasks:
            waiting.append(pool.submit(_encode_here, texts))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise AssayError(
            "a worker was ended from outside (out of memory, perhaps); what is finished is kept: "
            "run the same command again, with fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, str]


def _begin(folder: Path, dtype: str) -> None:
    global _worker
    _worker = tokenizers.load(folder), dtype
    # A parent that is killed says nothing to its workers, which would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _encode_here(texts: list[str]) -> _Encoded:
    return _encode(texts, *_worker)
