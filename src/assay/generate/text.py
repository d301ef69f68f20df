"""Text to text: a prompt is encoded, ids are decoded as they come, stop strings are looked for.

No character is ever split: text is given when the last byte of a character is there, and what
might be the beginning of a stop string is held back until it is known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from assay.data.tokenizers import StreamDecoder, Tokenizer
from assay.errors import AssayError, check_text
from assay.generate.beams import beam_search
from assay.generate.engine import FinishReason, Generator, Session, Timing, ready
from assay.model.transformer import Transformer
from assay.spec.model import TransformerSpec

CHUNK = 16
"""Decode steps between two looks at the text, where nobody reads along."""


@dataclass(frozen=True)
class Completion:
    """One prompt's continuation, or with an encoder its target.

    `text` ends before the stop string; `ids` are all that were generated, those that spell the
    stop string too, but no stop token. `timing` is of the whole batch.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    logprobs: list[float]
    notes: tuple[str, ...]
    timing: Timing
    score: float | None = None  # of the best beam, where there are several


USUAL = 200
"""Tokens that are made where nobody says how many."""

Prompt = str | Sequence[int] | np.ndarray
"""A text, or its ids (a conversation's, say)."""


def complete(
    model: Transformer | Generator,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    **settings,
) -> Completion:
    """Continues a text. It goes in as it is, and ends before the document's end.

    With an encoder the text is the source, and its target is made; `start_token` is then the id
    that it begins with, if not the tokenizer's own. `max_new_tokens` None is `USUAL`, or what
    learned positions leave room for. `stop` are strings before which the text ends; `settings`
    are those of `engine.generate`.

    Raises:
        AssayError: as `engine.generate`, or if the prompt is empty and the tokenizer has no id
            that starts a document.
    """
    return complete_batch(
        model, tokenizer, [prompt], max_new_tokens=max_new_tokens, stop=stop, **settings
    )[0]


def complete_batch(
    model: Transformer | Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    **settings,
) -> list[Completion]:
    """`complete` for several prompts in one batch, each as if it were alone."""
    session, ids = _start(model, tokenizer, prompts, max_new_tokens, settings)
    writers = [_Writer(tokenizer, stop) for _ in prompts]
    chunk = CHUNK if stop or max_new_tokens is None else int(np.max(max_new_tokens))
    _write(session, writers)
    while not session.done:
        session.advance(chunk)
        _write(session, writers)
    return [
        _completion(session, row, len(prompt), writer)
        for row, (prompt, writer) in enumerate(zip(ids, writers, strict=True))
    ]


def complete_by_beams(
    model: Transformer | Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    beams: int,
    length_penalty: float = 1.0,
    max_new_tokens: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    start_token: int | None = None,
) -> list[list[Completion]]:
    """The likeliest continuations (or targets) of each prompt by beam search, the best first.

    `length_penalty` is explained in `beams.py`. `stop` strings cut the texts when they are there.

    Raises:
        AssayError: as `beams.beam_search`.
    """
    model = ready(model)
    ids, begin = _encode(model.spec, tokenizer, prompts, start_token)
    found = beam_search(
        model,
        ids,
        beams=beams,
        length_penalty=length_penalty,
        max_new_tokens=_room(model.spec, ids, max_new_tokens),
        stop_tokens=[*stop_tokens, *_ends(model.spec, tokenizer)],
        **begin,
    )
    rows = []
    for prompt, row in zip(ids, found.rows, strict=True):
        rows.append([])
        for beam in row:
            writer = _Writer(tokenizer, stop)
            for token in beam.ids:
                writer.feed(token)
            writer.close()
            reason = "stop" if writer.stopped else beam.finish_reason
            rows[-1].append(
                Completion(
                    writer.written,
                    beam.ids,
                    len(prompt),
                    reason,
                    [],
                    found.notes,
                    found.timing,
                    beam.score,
                )
            )
    return rows


def stream_text(
    model: Transformer | Generator,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    chunk: int = 1,
    **settings,
) -> "TextStream":
    """As `complete`, but to be iterated over: pieces of text, as soon as they are certain.

    The prompt is read, and the first token chosen, before this returns.
    """
    return TextStream(model, tokenizer, prompt, max_new_tokens, stop, chunk, settings)


class TextStream:
    """Pieces of the continuation; `completion()` tells the rest, at any time."""

    def __init__(self, model, tokenizer, prompt, max_new_tokens, stop, chunk, settings):
        self._session, ids = _start(model, tokenizer, [prompt], max_new_tokens, settings)
        self._writer, self._chunk = _Writer(tokenizer, stop), chunk
        self._prompt_tokens = len(ids[0])

    def __iter__(self) -> Iterator[str]:
        session = self._session
        while True:
            (piece,) = _write(session, [self._writer])
            if piece:
                yield piece
            if session.done:
                return
            session.advance(self._chunk)

    def completion(self) -> Completion:
        """What was generated so far."""
        return _completion(self._session, 0, self._prompt_tokens, self._writer)


class _Writer:
    """The text of one row, up to its stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str]):
        self._decoder, self._vocab_size = StreamDecoder(tokenizer), tokenizer.vocab_size
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stops:
            raise AssayError("stop: found an empty string, which would stop at once.")
        self._held = ""
        self.written = ""
        self.tokens = 0
        self.stopped = self._closed = False

    def feed(self, token: int) -> str:
        """The text that is certain now. After a stop string, nothing more is."""
        self.tokens += 1
        known = token < self._vocab_size  # a model's table may be longer than its tokenizer's
        return self._release(self._decoder.feed(token) if known else "\ufffd")

    def close(self) -> str:
        """What was held back; a character that never got its last byte is U+FFFD."""
        if self.stopped or self._closed:
            return ""
        self._closed = True
        return self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, last: bool = False) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self._held) - (0 if last else self._possible_start())
        piece, self._held = self._held[:end], self._held[end:]
        self.written += piece
        return piece

    def _possible_start(self) -> int:
        """How many of the last characters may be the start of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def _encode(
    spec: TransformerSpec, tokenizer: Tokenizer, prompts: Sequence[Prompt], start_token: int | None
) -> tuple[list[np.ndarray], dict[str, int]]:
    """The prompts' ids, and how a target begins where there is an encoder."""
    start_id = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            check_text("the prompt", prompt)
            tokens = tokenizer.encode(prompt) if prompt else np.zeros((0,), np.int32)
            tokens = np.concatenate([np.array(tokenizer.prefix_ids, np.int32), tokens])
        else:
            tokens = np.asarray(prompt)
            if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
                found = type(prompt).__name__
                raise AssayError(f"prompt: found {found}, but it must be a text or a row of ids.")
        if spec.encoder is not None and tokenizer.eos_id is not None and isinstance(prompt, str):
            tokens = np.append(tokens, tokenizer.eos_id)  # as sources end in training
        if not len(tokens):
            if start_id is None:
                raise AssayError(
                    "prompt: found an empty text, and the tokenizer has no id that starts a "
                    "document; give at least one character."
                )
            tokens = np.array([start_id], np.int32)
        ids.append(tokens)
    if spec.encoder is None:
        return ids, {}
    start_token = start_id if start_token is None else start_token
    if start_token is None:
        raise AssayError(
            "start_token: the tokenizer has no id that starts a text, and a target begins with "
            "one; name it."
        )
    return ids, {"start_token": start_token}


def _ends(spec: TransformerSpec, tokenizer: Tokenizer) -> list[int]:
    """The id that ends a document, where the model knows it."""
    known = tokenizer.eos_id is not None and tokenizer.eos_id < spec.vocab_size
    return [tokenizer.eos_id] if known else []


def _start(model, tokenizer, prompts, max_new_tokens, settings) -> tuple[Session, list]:
    cache_dtype = settings.pop("cache_dtype", None)
    if not isinstance(model, Generator):
        model = Generator(model, cache_dtype=cache_dtype)
    ids, begin = _encode(model.spec, tokenizer, prompts, settings.pop("start_token", None))
    stops = [*settings.pop("stop_tokens", ()), *_ends(model.spec, tokenizer)]
    settings |= begin | {"max_new_tokens": _room(model.spec, ids, max_new_tokens)}
    return model.start(ids, stop_tokens=stops, **settings), ids


def _room(spec: TransformerSpec, ids: Sequence[np.ndarray], asked):
    """What was asked for; where nothing was, `USUAL`, or what learned positions have room for."""
    if asked is not None:
        return asked
    if spec.embedding.positions.kind != "learned":
        return USUAL
    before = 1 if spec.encoder is not None else max(map(len, ids))
    return max(1, min(USUAL, spec.context - before))


def _write(session: Session, writers: Sequence[_Writer]) -> list[str]:
    """Decodes what is new, ends the rows that met a stop string, and gives the new text."""
    pieces = [""] * len(writers)
    for row, (writer, ids) in enumerate(zip(writers, session.take(), strict=True)):
        for token in ids:
            pieces[row] += writer.feed(token)
            if writer.stopped:
                session.finish(row, writer.tokens)
                break
        if session.ended(row):
            pieces[row] += writer.close()
            if writer.stopped:  # the last bytes completed it
                session.finish(row, writer.tokens)
    return pieces


def _completion(session: Session, row: int, prompt_tokens: int, writer: _Writer) -> Completion:
    result = session.result()
    return Completion(
        writer.written,
        result.ids[row],
        prompt_tokens,
        result.finish_reasons[row],
        result.logprobs[row],
        result.notes,
        result.timing,
    )
