"""Loss, perplexity and bits per byte over a whole held-out split, and what n-grams reach on it.

What a figure means:

- Every token is scored once. `loss` is nats a token; a token that nothing stands before (where
  the tokenizer has no separator) is charged log V, as by a model that knows nothing.
- `bpb` is the same total over the UTF-8 bytes of the text, in bits. Separators between documents
  have no bytes and do cost. A character that the tokenizer does not know costs, beyond its
  `<unk>`, the log2(1,114,112) bits that name one of Unicode's code points: otherwise a tokenizer
  would gain by knowing less. That charge is in `bpb` alone.

Axes: B sequences, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from assay.errors import AssayError
from assay.model.layers import use_cpu_kernels
from assay.model.loss import token_losses
from assay.model.sharding import constrain
from assay.model.transformer import Transformer

CODE_POINTS = 1_114_112
"""How many code points Unicode has: what one unknown character is charged for."""


class Part(Protocol):
    """One held-out text as ids, `unknown` of which are the tokenizer's `<unk>`."""

    unknown: int


class ScoredBatches(Protocol):
    """What is evaluated: `assay.data.loader.evaluation_batches` gives one.

    Each batch has `tokens` and `targets` int32 [B, T], `weights` float32 [B, T] (0 or 1), perhaps
    `segment_ids` and `positions` int32 [B, T], and for an encoder `source` int32 [B, S] and
    `source_mask` bool [B, S]. Over all of them, every token has weight
    1 once, but `unscored` ones that are in none.
    """

    parts: Sequence[Part]
    seq_len: int
    stride: int

    @property
    def bytes(self) -> int | None: ...
    @property
    def unscored(self) -> int: ...
    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...


_NOTHING = (
    "evaluation: found no token to score; the held-out part is empty, or all of its weights are 0."
)


@dataclass(frozen=True)
class Evaluation:
    """Figures over a split.

    loss: nats a token. perplexity: exp(loss). bpb: bits a UTF-8 byte, None without bytes.
    tokens: all that are in `loss`, of which `unscored` were charged log V.
    bytes: of the scored text. unknown: ids charged as unknown characters.
    window, stride: tokens a window, and from one window's start to the next's.
    seconds: wall time, compilation included.
    """

    loss: float
    perplexity: float
    bpb: float | None
    tokens: int
    bytes: int | None
    window: int
    stride: int
    unscored: int
    unknown: int
    seconds: float


def evaluate(
    model: Transformer,
    batches: ScoredBatches,
    losses: Callable | None = None,
    place: Callable[[Mapping[str, np.ndarray]], Mapping[str, Array]] = dict,
) -> Evaluation:
    """The model's figures over all batches, computed in the dtype that the model computes in.

    `losses` is `row_losses`, or what it was compiled to for this model and these batches. `place`
    puts a batch on the devices of a mesh; where several processes each read some of its rows, it
    makes one batch of theirs.

    Losses are float32, and so is their sum over a row; all beyond a row is summed in float64 on
    the host, one batch behind the device.

    Raises:
        AssayError: if there is no token to score, or if learned positions end before a window.
    """
    _check_positions(model, batches)
    started = time.perf_counter()
    nats, scored, pending = 0.0, 0, None
    losses = losses or row_losses
    for batch in batches:
        rows = losses(model, dict(place(batch)))
        (nats, scored), pending = _add(nats, scored, pending), rows
    nats, scored = _add(nats, scored, pending)
    unscored, unknown = batches.unscored, sum(part.unknown for part in batches.parts)
    tokens = scored + unscored
    if not tokens:
        raise AssayError(_NOTHING)
    nats += unscored * math.log(model.spec.vocab_size)
    loss = nats / tokens
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        bpb=bits_per_byte(nats, batches.bytes, unknown),
        tokens=tokens,
        bytes=batches.bytes,
        window=batches.seq_len,
        stride=batches.stride,
        unscored=unscored,
        unknown=unknown,
        seconds=time.perf_counter() - started,
    )


def _check_positions(model: Transformer, batches: ScoredBatches) -> None:
    spec = model.spec
    lengths = {"target": (spec.embedding, batches.seq_len)}
    if spec.encoder is not None:
        own = spec.source_embedding or spec.embedding
        lengths["source"] = own, getattr(batches, "source_len", 0)
    for what, (embedding, length) in lengths.items():
        if embedding.positions.kind == "learned" and length > spec.context:
            what = what if spec.encoder is not None else "window"
            raise AssayError(
                f"evaluation: a {what} of {length} tokens is longer than the model's learned "
                f"positions, which end at {spec.context}."
            )


@jax.jit
def row_losses(
    model: Transformer, batch: dict[str, Array]
) -> tuple[Float32[Array, "b"], Int32[Array, "b"]]:
    """(nats, number) of the weighted targets of each row. `batch` as `ScoredBatches` says."""
    logits = model(
        batch["tokens"],
        source=batch.get("source"),
        source_mask=batch.get("source_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
    )
    losses = token_losses(logits, batch["targets"], use_cpu_kernels(model.compute))
    nats = jnp.sum(losses * batch["weights"], axis=-1)
    scored = jnp.sum(batch["weights"] > 0, axis=-1, dtype=jnp.int32)
    return constrain(nats, None), constrain(scored, None)  # every process reads them


def _add(nats: float, scored: int, rows: tuple[Array, Array] | None) -> tuple[float, int]:
    if rows is None:
        return nats, scored
    losses, numbers = map(np.asarray, rows)
    return nats + float(losses.astype(np.float64).sum()), scored + int(numbers.sum())


def _exp(loss: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def bits_per_byte(nats: float, size: int | None, unknown: int = 0) -> float | None:
    """All nats of a text over its `size` bytes, in bits; None where the bytes are not known.

    Each of `unknown` ids is charged as one character of which nothing is known.
    """
    if not size:
        return None
    return (nats / math.log(2) + unknown * math.log2(CODE_POINTS)) / size


# ---------------------------------------------------------------------------- n-grams

type Ids = np.ndarray
"""Token ids [N], the first of which is context only; only sliced, so perhaps on disk."""

PIECE = 1 << 22  # tokens that are counted at a time


class Bigrams:
    """Unigram and bigram probabilities, interpolated after Witten and Bell (1991).

    With N training tokens of which T differ, and n(h) of them after h of which t(h) differ:

        P(w)     = (count(w)    + T    / V)    / (N    + T)
        P(w | h) = (count(h, w) + t(h) P(w)) / (n(h) + t(h)), or P(w) where h was never seen.

    Both sum to 1 over the vocabulary, and nothing has probability 0.
    """

    def __init__(self, train: Ids | list[Ids], vocab_size: int):
        self.vocab_size = vocab_size
        unigrams = np.zeros(vocab_size, np.int64)
        codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for history, word in _pairs(train):
            unigrams += np.bincount(word, minlength=vocab_size)
            more, times = np.unique(history * vocab_size + word, return_counts=True)
            codes, where = np.unique(np.concatenate([codes, more]), return_inverse=True)
            counts = np.bincount(where, np.concatenate([counts, times]), minlength=len(codes))
        seen = np.count_nonzero(unigrams)
        self._unigram = (unigrams + max(seen, 1) / vocab_size) / (unigrams.sum() + max(seen, 1))
        self._codes, self._counts = codes, counts
        histories = codes // vocab_size
        self._followed = np.bincount(histories, counts, minlength=vocab_size)
        self._followers = np.bincount(histories, minlength=vocab_size)

    def unigram(self, word: np.ndarray) -> np.ndarray:
        """P(word), float64, in word's shape."""
        return self._unigram[word]

    def bigram(self, history: np.ndarray, word: np.ndarray) -> np.ndarray:
        """P(word | history), float64, in their shape."""
        code = history * self.vocab_size + word
        counts = np.zeros(code.shape)
        if len(self._codes):
            at = np.searchsorted(self._codes, code).clip(max=len(self._codes) - 1)
            counts = np.where(self._codes[at] == code, self._counts[at], 0.0)
        followed, followers = self._followed[history], self._followers[history]
        smoothed = counts + followers * self._unigram[word]
        total = np.maximum(followed + followers, 1)
        return np.where(followed > 0, smoothed / total, self._unigram[word])


@dataclass(frozen=True)
class Baselines:
    """What n-grams reach: bits a byte (None without bytes), and nats a token (`_loss`)."""

    unigram: float | None
    bigram: float | None
    unigram_loss: float
    bigram_loss: float


def ngram_baselines(
    train: Ids | list[Ids],
    held_out: Ids | list[Ids],
    vocab_size: int,
    size: int | None,
    *,
    unknown: int = 0,
    unscored: int = 0,
) -> Baselines:
    """Figures to stand beside a model's, over the same tokens and bytes, charged alike.

    Args:
        train, held_out: ids, or a list of them, one a source; the first id is context only.
        size: UTF-8 bytes of the held-out text.
        unknown: how many held-out ids are the tokenizer's `<unk>`, charged as `evaluate` does.
        unscored: held-out tokens with nothing before them, each charged log V.

    Raises:
        AssayError: if there is no token to score.
    """
    model = Bigrams(train, vocab_size)
    start = unscored * math.log(vocab_size)
    unigram, bigram, tokens = start, start, unscored
    for history, word in _pairs(held_out):
        unigram -= np.log(model.unigram(word)).sum()
        bigram -= np.log(model.bigram(history, word)).sum()
        tokens += len(word)
    if not tokens:
        raise AssayError(_NOTHING)
    return Baselines(
        unigram=bits_per_byte(float(unigram), size, unknown),
        bigram=bits_per_byte(float(bigram), size, unknown),
        unigram_loss=float(unigram / tokens),
        bigram_loss=float(bigram / tokens),
    )


def _pairs(sources: Ids | list[Ids]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(history, word) of every id but the first of each source, int64, a piece at a time."""
    for ids in sources if isinstance(sources, list) else [sources]:
        for start in range(1, len(ids), PIECE):
            piece = np.asarray(ids[start - 1 : start + PIECE], np.int64)
            yield piece[:-1], piece[1:]
