"""Prompts to tokens: one prefill, then one compiled loop over a cache of fixed size.

Three programs are compiled for each shape (rows, prompt bucket, slots) and kept: `prefill` reads
the padded prompts, `extend` chooses a token for each row, and `decode` runs up to n steps of both
in a `lax.while_loop`, n being traced. Parameters are arguments, and the cache is donated to
`decode`, which changes it in place.

With an encoder the prompts are what it reads, in the same prefill, and each row's target begins
with `start_token`; all else is as for a decoder.

Axes: B batch, P prompt tokens (padded), S slots of the cache, R source tokens (padded),
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from time import perf_counter
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from assay.errors import AssayError, counted, did_you_mean
from assay.generate import sampling
from assay.generate.sampling import PerRow, Rules
from assay.model.cache import Cache, empty_cache
from assay.model.decoding import (
    bytes_read,
    prepare,
    reads_only_what_is_seen,
    uses_native,
    weight_bytes,
)
from assay.model.transformer import Transformer
from assay.spec.model import TransformerSpec

Ids = Sequence[int] | np.ndarray
FinishReason = Literal["stop", "length"]
CACHE_DTYPES = ("float32", "bfloat16")
FIRST_SLOTS = 1024
"""Slots of a cache to begin with, where prompts are no longer; it doubles when it is full."""

# ---------------------------------------------------------------------------- on the device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What is large, and donated: the cache, and which tokens each row has seen."""

    cache: Cache
    seen: Bool[Array, "b v"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """What is small, and read by the host: the tokens so far, and who is done.

    `tokens` and `logprobs` hold prompt and output by position, `ends` how many there are.
    `stopped` rows met a stop token, which is not kept.
    """

    tokens: Int32[Array, "b s"]
    logprobs: Float32[Array, "b s"]
    ends: Int32[Array, "b"]
    done: Bool[Array, "b"]
    stopped: Bool[Array, "b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Limits:
    """Where a row ends: at so many tokens, prompt included, or before a stop token (-1: none)."""

    lengths: Int32[Array, "b"]
    stop_tokens: Int32[Array, "n"]


def _extend(
    logits: Float32[Array, "b v"],
    seen: Bool[Array, "b v"],
    progress: Progress,
    rules: Rules,
    limits: Limits,
) -> tuple[Bool[Array, "b v"], Progress]:
    """Each live row takes one more token, or ends."""
    ends, live = progress.ends, ~progress.done
    token = sampling.choose(logits, seen, rules, ends)
    rows = jnp.arange(token.shape[0])
    logprob = logits[rows, token] - jax.nn.logsumexp(logits, axis=-1)
    stop = live & jnp.any(token[:, None] == limits.stop_tokens[None, :], axis=-1)
    grows = live & ~stop
    here = (jnp.arange(progress.tokens.shape[1])[None, :] == ends[:, None]) & grows[:, None]
    return seen.at[rows, token].set(True), Progress(
        jnp.where(here, token[:, None], progress.tokens),
        jnp.where(here, logprob[:, None], progress.logprobs),
        ends + grows,
        progress.done | stop | (ends + grows >= limits.lengths),
        progress.stopped | stop,
    )


def _prefill(
    structure,
    slots: int,
    cache_dtype: str,
    parameters: list[Array],
    tokens: Int32[Array, "b p"],
    lengths: Int32[Array, "b"],
    source: Int32[Array, "b r"] | None = None,
    source_mask: Bool[Array, "b r"] | None = None,
) -> tuple[Float32[Array, "b v"], Memory]:
    """Reads prompts padded on the right: the logits that follow each, and what to remember."""
    model = jax.tree.unflatten(structure, parameters)
    batch, padded = tokens.shape
    rows = jnp.arange(batch)
    # Prompts see no slot but their own. Where XLA would read the others too, they come afterwards.
    room = slots if reads_only_what_is_seen(model) else padded
    cache = empty_cache(model.spec, batch, room, cache_dtype)
    read = {} if source is None else {"source": source, "source_mask": source_mask}
    x, cache = model.hidden(tokens, cache=cache, **read)
    logits = model.logits(x[rows, lengths - 1][:, None])[:, 0]
    valid = jnp.arange(padded)[None, :] < lengths[:, None]
    seen = jnp.zeros((batch, model.spec.vocab_size), bool)
    seen = seen.at[rows[:, None], tokens].max(valid)
    # What the padding left in the slots behind a prompt is never read, and is written over.
    return logits, Memory(cache.with_lengths(lengths).grown(slots), seen)


def _decode(
    structure,
    parameters: list[Array],
    memory: Memory,
    progress: Progress,
    rules: Rules,
    limits: Limits,
    halted: Bool[Array, "b"],
    steps: Int32[Array, ""],
) -> tuple[Memory, Progress]:
    """Up to `steps` more tokens in each row; ends early when all rows are done.

    `halted` rows are done because the host says so.
    """
    model = jax.tree.unflatten(structure, parameters)
    progress = replace(progress, done=progress.done | halted)
    rows = jnp.arange(progress.ends.shape[0])

    def unfinished(carry):
        step, _, progress = carry
        return (step < steps) & ~jnp.all(progress.done)

    def one_step(carry):
        step, memory, progress = carry
        before = memory.cache.lengths
        tokens = progress.tokens[rows, before]  # the one token that the cache does not hold yet
        logits, cache = model(tokens[:, None], cache=memory.cache)
        cache = cache.with_lengths(jnp.where(progress.done, before, cache.lengths))
        seen, progress = _extend(logits[:, 0], memory.seen, progress, rules, limits)
        return step + 1, Memory(cache, seen), progress

    _, memory, progress = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), memory, progress))
    return memory, progress


class Program:
    """A function, compiled once for each shape of its arguments."""

    def __init__(self, function, **options):
        self.jitted = jax.jit(function, **options)
        self.compiled = {}

    def executable(self, *arguments, statics: tuple = ()):
        """What is compiled for arguments like these (after the `statics`); called without them."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = (statics, structure, shapes)
        if key not in self.compiled:
            self.compiled[key] = self.jitted.lower(*statics, *arguments).compile()
        return self.compiled[key]


@lru_cache(maxsize=32)
def _programs(structure) -> tuple[Program, Program]:
    """`prefill` and `decode` of a tree structure: models of one architecture share them."""
    return (
        Program(partial(_prefill, structure), static_argnums=(0, 1)),
        Program(partial(_decode, structure), donate_argnums=1),
    )


_extend_program = Program(_extend)


# ---------------------------------------------------------------------------- on the host


@dataclass(frozen=True)
class Timing:
    """Wall time on the host's clock, without compilation.

    `time_to_first_token`: from handing the padded prompts to the compiled prefill until the first
    token of every row is on the host (less compiling `extend` in between, the first time).
    `decode_seconds`: the sum over all calls of the compiled decode loop, each until its tokens are
    on the host; it yields every row's tokens but the first, `decode_tokens` in all (stop tokens
    are computed, but not counted).
    """

    compile_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of all rows together, decoding alone; None where one token was all."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else None


@dataclass(frozen=True)
class Result:
    """What was generated, row by row.

    `ids` are without the prompt and without the stop token. `finish_reasons`: "stop" (a stop
    token, or the caller) or "length". `logprobs` are the model's own, of its logits before any
    rule. `notes` are warnings, in sentences.
    """

    ids: list[list[int]]
    finish_reasons: list[FinishReason]
    logprobs: list[list[float]]
    notes: tuple[str, ...] = ()
    timing: Timing = field(default_factory=Timing, compare=False)


class Generator:
    """A model made ready to generate, once: `model/decoding.py` says how its weights are kept.

    Dropout is off. `weights` None is the model's compute dtype; "int8" keeps them in a byte each.
    `cache_dtype` None is the model's compute dtype. `weight_bytes` is what its parameters take,
    beside the model that it was made from; `bytes_read` what a step reads of them; `native` says
    whether its products are those of `model/native.py`.

    Raises:
        AssayError: if the model is not causal.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        weights: str | None = None,
        cache_dtype: str | None = None,
    ):
        self.spec, compute = model.spec, model.compute
        if not self.spec.decoder.causal:
            raise AssayError("decoder.causal: found false; only a causal model generates text.")
        self.cache_dtype = compute.dtype if cache_dtype is None else cache_dtype
        if self.cache_dtype not in CACHE_DTYPES:
            known = did_you_mean(str(cache_dtype), CACHE_DTYPES)
            raise AssayError(f"cache_dtype: found {cache_dtype!r}; {known}")
        if weights not in (None, compute.dtype, "int8"):
            known = did_you_mean(str(weights), (compute.dtype, "int8"))
            raise AssayError(f"weights: found {weights!r} in a {compute.dtype} model; {known}")
        model = prepare(model, weights)
        self.native = uses_native(model)
        self.weight_bytes, self.bytes_read = weight_bytes(model), bytes_read(model)
        self.parameters, self.structure = jax.tree.flatten(model)
        self.prefill, self.decode = _programs(self.structure)

    def start(
        self,
        prompts: Sequence[Ids] | Ids,
        *,
        max_new_tokens: PerRow[int],
        stop_tokens: Sequence[int] = (),
        start_token: int | None = None,
        end_token: int | None = None,
        **settings,
    ) -> "Session":
        """Reads the prompts and takes the first token of each; see `generate`."""
        reading = Reading(self, prompts, max_new_tokens, start_token)
        stops = stop_ids(stop_tokens, end_token, self.spec.vocab_size)
        return Session(self, reading, stops, settings)


class Reading:
    """Prompts that were checked, padded to a bucket, and are ready to be read.

    prompts: what the decoder begins with, one a row; with an encoder the start token alone.
    lengths, new: int32 [B], tokens of each prompt, and how many may follow.
    padded: the bucket. sources: arrays [B, R] of what an encoder reads, and their mask.
    """

    def __init__(self, generator: Generator, prompts, max_new_tokens, start_token: int | None):
        spec = self._spec = generator.spec
        self._generator = generator
        prompts = _checked_prompts(prompts, spec.vocab_size)
        self.new = _checked_counts(max_new_tokens, len(prompts))
        self.sources: tuple[np.ndarray, ...] = ()
        if spec.encoder is not None:
            self.sources = _padded_sources(spec, prompts)
            start = _checked_start(start_token, spec.vocab_size)
            prompts = [start] * len(prompts)
        elif start_token is not None:
            raise AssayError(
                f"start_token: found {start_token}, but only a model with an encoder begins a "
                f"target of its own; put the token into the prompt."
            )
        self.prompts = prompts
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        learned = spec.embedding.positions.kind == "learned"
        past = past_context(spec, self.lengths, self.new)
        if learned and past is not None:
            raise _past_the_table(spec, past, int(self.lengths[(self.lengths + self.new).argmax()]))
        # Buckets bound how many programs are compiled. A learned table bounds the prompt's.
        padded = max(power_of_two(self.lengths.max()), 8 if spec.encoder is None else 1)
        self.padded = min(padded, spec.context) if learned else padded
        self.tokens = np.stack([_pad(prompt, self.padded) for prompt in prompts])
        self.seconds = self.compile_seconds = 0.0

    def prefill(self, slots: int) -> tuple[Array, Memory]:
        """Reads them into a cache of so many slots: the logits that follow, and the memory."""
        generator = self._generator
        inputs = (generator.parameters, *map(jnp.asarray, (self.tokens, self.lengths)))
        inputs += tuple(map(jnp.asarray, self.sources))
        start = perf_counter()
        statics = (slots, generator.cache_dtype)
        program = generator.prefill.executable(*inputs, statics=statics)
        self.compile_seconds = perf_counter() - start
        start = perf_counter()
        read = jax.block_until_ready(program(*inputs))
        self.seconds = perf_counter() - start
        return read


class Session:
    """A batch that is being generated: `advance` goes on with it, `take` gives what is new.

    When it is made, the prompts have been read and each row has its first token.
    """

    def __init__(self, generator: Generator, reading: Reading, stops: np.ndarray, settings):
        lengths, new, padded = reading.lengths, reading.new, reading.padded
        batch = len(lengths)
        self.prompt_lengths = lengths
        longest = int((lengths + new).max())
        # Every slot is read for every token: the cache begins short, and grows where it must.
        self._room = slots = _slots(max(padded, min(longest, FIRST_SLOTS), 64))
        longest = max(slots, _slots(longest))

        self._generator = generator
        self._rules = sampling.rules(batch, **settings)
        self._limits = Limits(jnp.asarray(lengths + new), jnp.asarray(padded_stops(stops)))
        self._cuts = np.full((batch,), np.iinfo(np.int32).max, np.int32)  # ends set by the caller
        self._told = lengths.copy()  # up to where `take` has given tokens
        self._compile_seconds = self._decode_seconds = 0.0
        self._decode = None

        progress = Progress(
            jnp.asarray(np.pad(reading.tokens, ((0, 0), (0, longest - padded)))),
            jnp.zeros((batch, longest), jnp.float32),
            jnp.asarray(lengths),
            jnp.zeros((batch,), bool),
            jnp.zeros((batch,), bool),
        )
        logits, self._memory = reading.prefill(slots)
        self._compile_seconds = reading.compile_seconds

        inputs = (logits, self._memory.seen, progress, self._rules, self._limits)
        extend = self._compile(_extend_program, *inputs)
        start = perf_counter()
        seen, self._progress = extend(*inputs)
        self._fetch()
        self._first_seconds = reading.seconds + perf_counter() - start
        self._memory = replace(self._memory, seen=seen)
        self._check_finite()

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return bool(self._done.all())

    def ended(self, row: int) -> bool:
        """Whether this row has ended."""
        return bool(self._done[row])

    def advance(self, steps: int) -> None:
        """Up to `steps` more tokens in each row that has not ended."""
        while steps > 0 and not self.done:
            needed = int(self._ends[~self._done].max())  # slots, for one more step
            if needed > self._room:
                self._grow(needed)
            chunk = min(steps, self._room - needed + 1)
            self._run(chunk)
            steps -= chunk

    def _grow(self, needed: int) -> None:
        """A cache of twice the slots, as far as they can be used; other programs go with it."""
        most = self._progress.tokens.shape[1]
        self._room = max(_slots(needed), min(2 * self._room, most))
        cache = self._memory.cache
        if cache.capacity is not None:
            self._memory = replace(self._memory, cache=cache.grown(self._room))
        self._decode = None

    def _run(self, steps: int) -> None:
        arguments = (
            self._generator.parameters,
            self._memory,
            self._progress,
            self._rules,
            self._limits,
            jnp.asarray(self._done),
            jnp.int32(steps),
        )
        if self._decode is None:
            self._decode = self._compile(self._generator.decode, *arguments)
        start = perf_counter()
        self._memory, self._progress = self._decode(*arguments)
        self._fetch()
        self._decode_seconds += perf_counter() - start
        self._check_finite()

    def take(self) -> list[list[int]]:
        """The ids of each row that came since the last call."""
        spans = zip(self._tokens, self._told, self._ends, strict=True)
        news = [row[told:end].tolist() for row, told, end in spans]
        self._told = self._ends.copy()
        return news

    def finish(self, row: int, length: int) -> None:
        """Ends a row after `length` generated tokens: a stop that only the caller can see."""
        self._cuts[row] = min(self._cuts[row], self.prompt_lengths[row] + length)
        self._cut()

    def result(self) -> Result:
        """All that was generated so far."""
        starts, ends = self.prompt_lengths, self._ends

        def rows(array: np.ndarray) -> list[list]:
            return [x[a:b].tolist() for x, a, b in zip(array, starts, ends, strict=True)]

        return Result(
            ids=rows(self._tokens),
            finish_reasons=["stop" if stopped else "length" for stopped in self._stopped],
            logprobs=rows(self._logprobs),
            notes=context_notes(self._generator.spec, starts, ends - starts),
            timing=Timing(
                compile_seconds=self._compile_seconds,
                time_to_first_token=self._first_seconds,
                decode_seconds=self._decode_seconds,
                decode_tokens=int(np.maximum(ends - starts - 1, 0).sum()),
            ),
        )

    def _compile(self, program: Program, *arguments, statics: tuple = ()):
        start = perf_counter()
        executable = program.executable(*arguments, statics=statics)
        self._compile_seconds += perf_counter() - start
        return executable

    def _fetch(self) -> None:
        """Brings the progress to the host."""
        new = jax.device_get(self._progress)
        self._tokens, self._logprobs = new.tokens, new.logprobs
        self._ends, self._done, self._stopped = map(np.array, (new.ends, new.done, new.stopped))
        self._cut()

    def _cut(self) -> None:
        cut = self._cuts < np.iinfo(np.int32).max
        self._ends = np.minimum(self._ends, self._cuts)
        self._told = np.minimum(self._told, self._cuts)
        self._done, self._stopped = self._done | cut, self._stopped | cut

    def _check_finite(self) -> None:
        for row, (logprobs, end) in enumerate(zip(self._logprobs, self._ends, strict=True)):
            if np.isnan(logprobs[:end]).any():
                token = int(np.isnan(logprobs).argmax() - self.prompt_lengths[row]) + 1
                raise AssayError(
                    f"prompt {row}: the logits for new token {token} are not finite; the model's "
                    f"parameters hold no sensible values, or overflow in its dtype."
                )


def generate(
    model: Transformer | Generator,
    prompts: Sequence[Ids] | Ids,
    *,
    max_new_tokens: PerRow[int],
    temperature: PerRow[float] = 1.0,
    top_k: PerRow[int | None] = None,
    top_p: PerRow[float | None] = None,
    min_p: PerRow[float | None] = None,
    repetition_penalty: PerRow[float] = 1.0,
    stop_tokens: Sequence[int] = (),
    start_token: int | None = None,
    end_token: int | None = None,
    seed: PerRow[int] = 0,
    cache_dtype: str | None = None,
) -> Result:
    """Continues one prompt of ids, or a batch of prompts of any lengths.

    With an encoder, each prompt is a source, and what is generated its target: it begins behind
    `start_token`, which must be given. `end_token` is a stop token like the others.

    Settings are one value, or a list of one a prompt; one `seed` gives row i `seed + i`. A row's
    ids depend only on its own prompt, settings and seed. Use a `Generator` in place of the model
    for many calls.

    Raises:
        AssayError: if a prompt is empty or has an id outside the vocabulary, if a setting is out
            of its range, if prompt and new tokens do not fit into learned positions, or if the
            model's logits are not finite.
    """
    session = ready(model, cache_dtype).start(
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        start_token=start_token,
        end_token=end_token,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    while not session.done:
        session.advance(2**30)  # to the end, in one call
    return session.result()


def stream(
    model: Transformer | Generator,
    prompts: Sequence[Ids] | Ids,
    *,
    chunk: int = 1,
    cache_dtype: str | None = None,
    **settings,
) -> Iterator[list[list[int]]]:
    """As `generate`, but yields the new ids of each row after every `chunk` steps.

    `Generator.start` gives the session itself, and with it the result.
    """
    session = ready(model, cache_dtype).start(prompts, **settings)
    yield session.take()
    while not session.done:
        session.advance(chunk)
        yield session.take()


# ---------------------------------------------------------------------------- checks


def ready(model: Transformer | Generator, cache_dtype: str | None = None) -> Generator:
    """A generator, of the model where it is none yet."""
    return model if isinstance(model, Generator) else Generator(model, cache_dtype=cache_dtype)


def _slots(least: int) -> int:
    return power_of_two(least) if least <= 256 else -(-least // 256) * 256


def power_of_two(least: int) -> int:
    return 1 << max(int(least) - 1, 0).bit_length()


def stop_ids(
    stop_tokens: Sequence[int], end_token: int | None, vocab_size: int
) -> Int32[np.ndarray, "n"]:
    """All tokens that end a row, each once.

    Raises:
        AssayError: if one is outside the vocabulary.
    """
    stops = np.unique(_checked_ids("stop_tokens", stop_tokens, vocab_size))
    if end_token is None:
        return stops
    end = _checked_ids("end_token", [end_token], vocab_size)
    return np.unique(np.concatenate([stops, end])).astype(np.int32)


def padded_stops(stops: np.ndarray) -> np.ndarray:
    """The stop tokens and so many -1, which is no token, that few programs are compiled."""
    return _pad(stops, max(power_of_two(len(stops)), 8), fill=-1)


def _checked_start(start_token: int | None, vocab_size: int) -> np.ndarray:
    if start_token is None:
        raise AssayError(
            "start_token: the model has an encoder, so its target begins with a token of its own; "
            "name it."
        )
    return _checked_ids("start_token", [start_token], vocab_size)


def _padded_sources(spec: TransformerSpec, sources: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Sources padded to a bucket, and where they are real."""
    longest = max(map(len, sources))
    learned = (spec.source_embedding or spec.embedding).positions.kind == "learned"
    if learned and longest > spec.context:
        raise AssayError(
            f"prompt: found a source of {longest} tokens, but the model's learned positions end "
            f"at {spec.context}; shorten it."
        )
    padded = max(power_of_two(longest), 8)
    padded = min(padded, spec.context) if learned else padded
    mask = np.arange(padded) < np.array([len(source) for source in sources])[:, None]
    return np.stack([_pad(source, padded) for source in sources]), mask


def _pad(ids: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    return np.pad(ids, (0, length - len(ids)), constant_values=fill)


def _checked_ids(name: str, ids: Ids, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise AssayError(f"{name}: found no list of token ids.")
    for i in ids[(ids < 0) | (ids >= vocab_size)][:1]:
        raise AssayError(f"{name}: token id {i} is outside the vocabulary of {vocab_size}.")
    return ids.astype(np.int32)


def _checked_prompts(prompts: Sequence[Ids] | Ids, vocab_size: int) -> list[np.ndarray]:
    if len(prompts) == 0 or np.ndim(prompts[0]) == 0:
        prompts = [prompts]
    prompts = [_checked_ids(f"prompt {i}", ids, vocab_size) for i, ids in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise AssayError(f"prompt {i}: found no tokens; generation starts from at least one.")
    return prompts


def _checked_counts(max_new_tokens: PerRow[int], batch: int) -> np.ndarray:
    counts = np.asarray(max_new_tokens)
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 1).any():
        raise AssayError(
            f"max_new_tokens: found {max_new_tokens!r}, but it must be a whole number, at least 1."
        )
    if counts.ndim and counts.shape != (batch,):
        raise AssayError(f"max_new_tokens: found {counts.size} values for {batch} prompts.")
    return np.broadcast_to(counts, (batch,)).astype(np.int32)


def past_context(spec: TransformerSpec, lengths: np.ndarray, new: np.ndarray) -> str | None:
    """What is longer than the context, with so many new tokens; None where nothing is."""
    longest = int((lengths + new).argmax())
    before, made = int(lengths[longest]), int(new[longest])
    if before + made <= spec.context:
        return None
    first = counted(before, "prompt token")
    if spec.encoder is not None:
        first = "the token that a target begins with"
    new_ones = "1 new one" if made == 1 else f"{made} new ones"
    return f"{first} and {new_ones} are {before + made}"


def context_notes(spec: TransformerSpec, lengths: np.ndarray, new: np.ndarray) -> tuple[str, ...]:
    """A note where rows have run past the context: what they might have come to is no matter."""
    past = past_context(spec, lengths, new)
    if past is None:
        return ()
    return (f"{past}, past the {spec.context} that the model was made for: quality may suffer.",)


def _past_the_table(spec: TransformerSpec, past: str, before: int) -> AssayError:
    """There is no vector for positions that are learned and past the context."""
    room = spec.context - before
    fits = f"at most {room} new ones fit" if room > 0 else "shorten it"
    return AssayError(
        f"max_new_tokens: {past}, but the model's learned positions end at {spec.context}; {fits}."
    )
