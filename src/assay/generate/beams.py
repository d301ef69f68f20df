"""Beam search: the likeliest continuations of a prompt, or targets of a source, that it finds.

As `transformers` does it with its default settings, so that the ids are the same: of twice as
many candidates as beams (more with several stop tokens), those among the first N that end are
kept, the N best that do not end go on, and a row is done when its best running beam, at its
present length, no longer beats the worst of N finished ones. A finished beam's score is

    log P(tokens) / length^alpha,

where length counts the generated tokens, the stop token among them: `transformers`' and
OpenNMT's formula, not Wu et al.'s ((5 + length) / 6)^alpha (arXiv:1609.08144). 0 is no penalty;
more favours longer ones.

The rows' caches are reordered by the beams that go on; a source's keys and values are kept once
and serve all its beams. One program reads the prompts, one searches; neither depends on the
lengths but by their buckets.

Axes: R rows, N beams, K candidates, L room for new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from assay.errors import AssayError
from assay.generate import engine
from assay.generate.engine import FinishReason, Generator, Ids, Program, Timing
from assay.generate.sampling import PerRow
from assay.model.cache import Cache
from assay.model.transformer import Transformer

NEVER = -1e9
"""Added to the score of what must not be chosen: finite, as in `transformers`."""


@dataclass(frozen=True)
class Beam:
    """One finished sequence: its new ids without the stop token, and its penalised score."""

    ids: list[int]
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class Beams:
    """For each prompt its finished beams, the best first. `notes` are warnings, in sentences."""

    rows: list[list[Beam]]
    notes: tuple[str, ...] = ()
    timing: Timing = field(default_factory=Timing, compare=False)


# ---------------------------------------------------------------------------- on the device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Search:
    """Running beams and finished ones, the best first; `open` rows may still improve."""

    running: Int32[Array, "r n l"]
    running_scores: Float32[Array, "r n"]
    finished: Int32[Array, "r n l"]
    scores: Float32[Array, "r n"]
    lengths: Int32[Array, "r n"]
    stopped: Bool[Array, "r n"]
    open: Bool[Array, "r"]


def _begin(rows: int, beams: int, room: int) -> Search:
    tokens = jnp.zeros((rows, beams, room), jnp.int32)
    # All beams begin alike: only the first counts, or the same token would be taken N times.
    running = jnp.where(jnp.arange(beams)[None] == 0, 0.0, NEVER) + jnp.zeros((rows, beams))
    scores = jnp.full((rows, beams), NEVER, jnp.float32)
    none = jnp.zeros((rows, beams), jnp.int32)
    return Search(tokens, running, tokens, scores, none, none > 0, jnp.ones((rows,), bool))


def _take(x: Array, chosen: Int32[Array, "r m"]) -> Array:
    """x[r, chosen[r]] for every row."""
    return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2)), axis=1)


def _extend(
    n: Int32[Array, ""],
    logits: Float32[Array, "r n v"],
    search: Search,
    counts: Int32[Array, "r"],
    stop_tokens: Int32[Array, "s"],
    candidates: int,
    length_penalty: Float32[Array, ""],
) -> tuple[Search, Int32[Array, "r n"]]:
    """The search after token n of every beam, and which beam each running one comes from."""
    r, beams, v = logits.shape
    totals = jax.nn.log_softmax(logits, axis=-1) + search.running_scores[..., None]
    totals, index = jax.lax.top_k(totals.reshape(r, beams * v), candidates)
    parents, token = index // v, index % v
    here = jnp.arange(search.running.shape[-1]) == n
    tokens = jnp.where(here[None, None], token[..., None], _take(search.running, parents))
    stop = jnp.any(token[..., None] == stop_tokens[None, None], axis=-1)
    ends = stop | (n + 1 >= counts)[:, None]

    running_scores, chosen = jax.lax.top_k(totals + jnp.where(ends, NEVER, 0.0), beams)

    length = (n + 1).astype(jnp.float32)
    among_first = jnp.arange(candidates)[None] < beams
    final = ends & among_first & search.open[:, None]
    scores = jnp.where(final, totals / length**length_penalty, 2 * NEVER)
    scores, best = jax.lax.top_k(jnp.concatenate([search.scores, scores], axis=1), beams)

    def merged(old: Array, new: Array) -> Array:
        return _take(jnp.concatenate([old, new], axis=1), best)

    lengths = merged(search.lengths, jnp.full_like(token, n + 1))
    worst = jnp.where(jnp.all(scores > NEVER, axis=1), scores[:, -1], NEVER)
    better = running_scores[:, 0] / length**length_penalty > worst
    search = Search(
        _take(tokens, chosen),
        running_scores,
        merged(search.finished, tokens),
        scores,
        lengths,
        merged(search.stopped, stop),
        search.open & better & (n + 1 < counts),
    )
    return search, _take(parents, chosen)


def _search(
    structure,
    beams: int,
    room: int,
    candidates: int,
    parameters: list[Array],
    logits: Float32[Array, "r v"],
    cache: Cache,
    counts: Int32[Array, "r"],
    stop_tokens: Int32[Array, "s"],
    length_penalty: Float32[Array, ""],
) -> tuple[Search, Int32[Array, ""]]:
    """All of the search after the prompts were read, and how many steps it took."""
    model = jax.tree.unflatten(structure, parameters)
    rows = logits.shape[0]

    def of_rows(cache: Cache, index: Int32[Array, "b"]) -> Cache:
        """The cache of other rows; the source's is the same for all beams of one."""
        kept = cache.layers, cache.lengths, cache.tokens
        layers, lengths, tokens = jax.tree.map(lambda x: x[index], kept)
        return replace(cache, layers=layers, lengths=lengths, tokens=tokens)

    def extend(n, logits, search):
        logits = logits.astype(jnp.float32).reshape(rows, beams, -1)
        return _extend(n, logits, search, counts, stop_tokens, candidates, length_penalty)

    def one_step(carry):
        n, cache, search, parents = carry
        index = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)
        tokens = jnp.take(search.running, n - 1, axis=2).reshape(-1, 1)
        logits, cache = model(tokens, cache=of_rows(cache, index))
        search, parents = extend(n, logits[:, 0], search)
        return n + 1, cache, search, parents

    cache = of_rows(cache, jnp.repeat(jnp.arange(rows), beams))
    logits = jnp.repeat(logits, beams, axis=0)
    search, parents = extend(jnp.int32(0), logits, _begin(rows, beams, room))
    carry = (jnp.int32(1), cache, search, parents)
    n, _, search, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[2].open), one_step, carry)
    return search, n


@lru_cache(maxsize=32)
def _program(structure) -> Program:
    return Program(partial(_search, structure), static_argnums=(0, 1, 2))


# ---------------------------------------------------------------------------- on the host


def beam_search(
    model: Transformer | Generator,
    prompts: Sequence[Ids] | Ids,
    *,
    beams: int,
    max_new_tokens: PerRow[int],
    length_penalty: float = 1.0,
    start_token: int | None = None,
    end_token: int | None = None,
    stop_tokens: Sequence[int] = (),
    cache_dtype: str | None = None,
) -> Beams:
    """The likeliest continuations of each prompt, or with an encoder the targets of each source.

    `start_token`, `end_token` and `stop_tokens` are as in `engine.generate`. A row's beams depend
    only on its own prompt. One beam is greedy decoding.

    Raises:
        AssayError: as `engine.generate`; if `beams` is not from 1 to the vocabulary's size, or
            the penalty is no number.
    """
    generator = engine.ready(model, cache_dtype)
    spec = generator.spec
    if isinstance(beams, bool) or not isinstance(beams, int) or not 1 <= beams <= spec.vocab_size:
        raise AssayError(
            f"beams: found {beams!r}, but it must be a whole number from 1 to {spec.vocab_size}."
        )
    if not np.isfinite(length_penalty):
        raise AssayError(f"length_penalty: found {length_penalty}, but it must be a number.")
    read = engine.Reading(generator, prompts, max_new_tokens, start_token)
    stops = engine.stop_ids(stop_tokens, end_token, spec.vocab_size)
    most = int(read.new.max())
    room = engine.power_of_two(max(most, 8))
    candidates = min(max(2, 1 + len(stops)) * beams, beams * spec.vocab_size)
    logits, memory = read.prefill(read.padded + room)
    arguments = (
        generator.parameters,
        logits,
        memory.cache,
        jnp.asarray(read.new),
        jnp.asarray(engine.padded_stops(stops)),
        jnp.float32(length_penalty),
    )
    statics = (beams, room, candidates)
    began = perf_counter()
    search = _program(generator.structure).executable(*arguments, statics=statics)
    compiled = perf_counter()
    found, steps = jax.device_get(search(*arguments))
    seconds = perf_counter() - compiled
    if not np.isfinite(found.scores).all():
        raise AssayError(
            "the model's logits are not finite; its parameters hold no sensible values."
        )
    finished = [_finished(found, row) for row in range(len(read.new))]
    made = np.array([max((len(beam.ids) for beam in row), default=0) for row in finished])
    return Beams(
        finished,
        engine.context_notes(spec, read.lengths, made),
        Timing(
            compile_seconds=read.compile_seconds + compiled - began,
            time_to_first_token=read.seconds + seconds,  # nothing is certain before the end
            decode_seconds=seconds,
            decode_tokens=int(steps) * len(read.new),
        ),
    )


def _finished(found: Search, row: int) -> list[Beam]:
    """The beams of a row that were finished, the best first."""
    beams = []
    for beam in np.flatnonzero(found.scores[row] > NEVER / 2).tolist():
        stopped, length = bool(found.stopped[row, beam]), int(found.lengths[row, beam])
        ids = found.finished[row, beam, : length - stopped].tolist()
        score = float(found.scores[row, beam])
        beams.append(Beam(ids, score, "stop" if stopped else "length"))
    return beams
