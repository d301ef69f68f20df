"""Log-likelihoods of continuations: what multiple-choice tasks and the evaluation harness ask for.

Requests that share a context have it computed once: its keys and values are kept, and every
continuation starts from them. So is the beginning that many contexts share (the examples before a
few-shot question). Contexts are padded to powers of two, so that few programs compile.

Axes: G contexts, R requests, T context tokens, C continuation tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from assay.errors import AssayError
from assay.model.cache import Cache, empty_cache
from assay.model.transformer import Transformer

Request = tuple[Sequence[int], Sequence[int]]
"""(context ids, continuation ids), neither empty."""

SHARED = 32
"""Tokens that contexts have in common, at least, where their beginning is computed apart."""

LOGITS_AT_ONCE = 2**26
"""Numbers in the logits of one call, at most: 256 MB of float32."""


@dataclass(frozen=True)
class Likelihood:
    """`nats`: log p(continuation | context), at most 0. `greedy`: whether argmax would give it."""

    nats: float
    greedy: bool


def loglikelihoods(
    model: Transformer, requests: Sequence[Request], *, batch_size: int = 8
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its context, `batch_size` contexts at once.

    What is longer than the model's context loses its first tokens, as in the evaluation harness.

    Raises:
        AssayError: if a context or continuation is empty, or a continuation alone is too long.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    limit = model.spec.context
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise AssayError(f"request {number}: an empty context or continuation has no score.")
        if len(continuation) > limit:
            raise AssayError(
                f"request {number}: its continuation has {len(continuation)} tokens, but the "
                f"model's context is {limit}."
            )
        # The last token of a continuation is never read, so that one more token has room.
        kept = tuple(context)[-max(1, limit + 1 - len(continuation)) :]
        groups.setdefault(kept, []).append(number)
    results: list[Likelihood | None] = [None] * len(requests)
    for prefix, contexts in _families(list(groups), batch_size):
        begun = None
        if prefix:
            tokens, lengths = _padded([prefix], 1)
            _, begun = _prefill(model, None, tokens, lengths, tokens.shape[1])
        ordered = sorted(contexts, key=len, reverse=True)
        for start in range(0, len(ordered), batch_size):
            part = ordered[start : start + batch_size]
            rests = [context[len(prefix) :] for context in part]
            _score(model, begun, rests, [groups[c] for c in part], requests, batch_size, results)
    return results


def _families(
    contexts: list[tuple[int, ...]], least: int
) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """(beginning, the contexts that have it): apart where they fill a batch, the others as one."""
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for context in contexts:
        alike.setdefault(context[:SHARED], []).append(context)
    families, others = [], []
    for start, family in alike.items():
        if len(family) < max(least, 2) or len(start) < SHARED:
            others += family
            continue
        first, last = min(family), max(family)  # what these two share, all share
        most = min(map(len, family)) - 1  # one token stays, whose logits come next
        end = next((i for i in range(most) if first[i] != last[i]), most)
        families.append((first[:end], family))
    return [*families, ((), others)]


def _padded(rows: Sequence[Sequence[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [count, width] and lengths [count]; rows that are missing hold one token."""
    tokens = np.zeros((count, _power_of_two(max(map(len, rows)), least=16)), np.int32)
    lengths = np.ones(count, np.int32)
    for g, row in enumerate(rows):
        tokens[g, : len(row)] = row
        lengths[g] = len(row)
    return tokens, lengths


def _score(model, begun, contexts, numbers, requests, batch_size, results) -> None:
    """Fills in the results of the requests that have these contexts, behind what is `begun`."""
    rows = [(g, number) for g, group in enumerate(numbers) for number in group]
    longest = _power_of_two(max(len(requests[number][1]) for _, number in rows))
    tokens, lengths = _padded(contexts, batch_size)
    room = tokens.shape[1] + longest + (begun.capacity or 0 if begun else 0)
    first, cache = _prefill(model, begun, tokens, lengths, room)
    most = max(1, LOGITS_AT_ONCE // (longest * model.spec.vocab_size))
    chunk = min(1 << (most.bit_length() - 1), _power_of_two(len(rows)))
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        of = np.zeros(chunk, np.int32)
        continuations = np.zeros((chunk, longest), np.int32)
        counts = np.ones(chunk, np.int32)
        for row, (g, number) in enumerate(part):
            ids = requests[number][1]
            of[row], counts[row] = g, len(ids)
            continuations[row, : len(ids)] = ids
        nats, greedy = jax.device_get(_continue(model, first, cache, of, continuations, counts))
        for row, (_, number) in enumerate(part):
            results[number] = Likelihood(float(nats[row]), bool(greedy[row]))


@partial(jax.jit, static_argnums=4)
def _prefill(
    model: Transformer,
    begun: Cache | None,
    tokens: Int32[Array, "g t"],
    lengths: Int32[Array, "g"],
    capacity: int,
) -> tuple[Float32[Array, "g v"], Cache]:
    """Log-probabilities of what follows each context, and the cache that holds it.

    `begun` is a cache of one row, which every context goes on from.
    """
    if begun is None:
        cache = empty_cache(model.spec, tokens.shape[0], capacity, model.compute.dtype)
    else:
        cache = jax.tree.map(
            lambda x: jnp.repeat(x, tokens.shape[0], axis=0), begun.grown(capacity)
        )
    places, lengths = lengths - 1, lengths + cache.lengths
    x, cache = model.hidden(tokens, cache=cache)
    last = jnp.take_along_axis(x, places[:, None, None], axis=1)
    return jax.nn.log_softmax(model.logits(last)[:, 0], axis=-1), cache.with_lengths(lengths)


@jax.jit
def _continue(
    model: Transformer,
    first: Float32[Array, "g v"],
    cache: Cache,
    of: Int32[Array, "r"],
    continuations: Int32[Array, "r c"],
    counts: Int32[Array, "r"],
) -> tuple[Float32[Array, "r"], Bool[Array, "r"]]:
    """Sums over each continuation, whose context is row `of` of the cache."""
    logprobs = first[of][:, None]
    if continuations.shape[1] > 1:
        own = jax.tree.map(lambda x: x[of], cache)
        logits, _ = model(continuations[:, :-1], cache=own)
        logprobs = jnp.concatenate([logprobs, jax.nn.log_softmax(logits, axis=-1)], axis=1)
    picked = jnp.take_along_axis(logprobs, continuations[..., None], axis=-1)[..., 0]
    inside = jnp.arange(continuations.shape[1])[None] < counts[:, None]
    best = jnp.argmax(logprobs, axis=-1) == continuations
    return jnp.sum(jnp.where(inside, picked, 0.0), axis=-1), jnp.all(best | ~inside, axis=-1)


def _power_of_two(size: int, least: int = 1) -> int:
    return max(least, 1 << (size - 1).bit_length())
