"""Log-likelihoods of continuations: what multiple-choice tasks and the evaluation harness ask for.

Requests that share a context have it computed once: its keys and values are kept, and every
continuation starts from them. Contexts are padded to powers of two, so that few programs compile.

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
    ordered = sorted(groups, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        contexts = ordered[start : start + batch_size]
        _score(model, contexts, [groups[c] for c in contexts], requests, batch_size, results)
    return results


def _score(model, contexts, numbers, requests, batch_size, results) -> None:
    """Fills in the results of the requests that have these contexts."""
    rows = [(g, number) for g, group in enumerate(numbers) for number in group]
    longest = _power_of_two(max(len(requests[number][1]) for _, number in rows))
    width = _power_of_two(max(map(len, contexts)), least=16)
    tokens = np.zeros((batch_size, width), np.int32)
    lengths = np.ones(batch_size, np.int32)
    for g, context in enumerate(contexts):
        tokens[g, : len(context)] = context
        lengths[g] = len(context)
    first, cache = _prefill(model, tokens, lengths, width + longest)
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


@partial(jax.jit, static_argnums=3)
def _prefill(
    model: Transformer, tokens: Int32[Array, "g t"], lengths: Int32[Array, "g"], capacity: int
) -> tuple[Float32[Array, "g v"], Cache]:
    """Log-probabilities of what follows each context, and the cache that holds it."""
    cache = empty_cache(model.spec, tokens.shape[0], capacity, model.compute.dtype)
    x, cache = model.hidden(tokens, cache=cache)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
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
