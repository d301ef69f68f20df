"""What can be proved of a model by running it: `assay check`.

Values (causality, cache, batch, bfloat16) are checked on the model as it is. What holds of the
architecture whatever its weights (gradients) is checked on random ones, since weights of zero, as
some projections begin, would hide a leak and stop a gradient alike.

A stack that is not causal only encodes: every place must see both ways, and padding nothing. An
encoder-decoder is held to what a decoder is, given a source, and must see all of the source.

Axes: B rows, T tokens, S source tokens, V vocabulary, D model.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from assay.model.cache import empty_cache
from assay.model.loss import token_losses
from assay.model.moe import Moe, Routing
from assay.model.ngrams import ngram_rows, preceding
from assay.model.transformer import Output, Transformer, abstract, merge_named, named_parameters
from assay.spec import presets
from assay.spec.model import AttentionSpec, CapacitySpec, TransformerSpec, spec_exceptions
from assay.spec.run import ComputeSpec

ROWS = 4
LENGTH = 64
"""Tokens a row, or the model's context where that is less."""

SAME = 1e-6
"""Allowed between two runs of one program on the same shapes, as a share of the largest logit.

There the arithmetic of a row or place does not depend on its neighbours' values: hidden scores
become weights of exactly 0, so a dense model is unchanged to the bit. Grouping tokens by expert
may change the order of a sum, which costs a few units of float32's last place (1.2e-7). A leak
through attention weighs about 1/T; one too small to be seen here shows in the gradient, which is
held to exactly 0.
"""

CLOSE = {"float32": 1e-4, "bfloat16": 0.05}
"""Allowed between two programs for the same thing (decoding and the full forward), likewise.

Their products have other shapes, so sums run in another order, in every layer anew.
"""

BF16_ERROR = 0.1
"""Allowed root mean square of bfloat16's error, over that of float32's centred logits."""

NEAR_TIE = 1e-5
"""Scores of two experts so close that a sum in another order may choose the other."""

CONGESTED = 0.5
"""The load that the checks force on capacity limits: at most half of the choices find a place."""

CANCELS = 1e-3
"""A gradient that cancels leaves rounding noise: allowed, as a share of the key matrix's."""


EMPTY: Mapping[str, Array] = {}
"""What a model without an encoder is given besides its tokens."""


@dataclass(frozen=True)
class Check:
    """One proof: what was the worst seen, where, and what it means."""

    name: str
    passed: bool
    worst: float
    where: str
    note: str


@dataclass(frozen=True)
class Report:
    """All checks of one model; passed if every one is."""

    passed: bool
    checks: tuple[Check, ...]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)


def check(
    model: Transformer | TransformerSpec | str,
    *,
    seed: int = 0,
    compute: ComputeSpec | None = None,
    full: bool = False,
    causal: bool | None = None,
) -> Report:
    """Every check of a model, of an architecture at random weights, or of a preset.

    Args:
        model: a preset, by its name, is shrunk (`presets.shrink`) unless `full`.
        seed: of the tokens, and of random weights.
        compute: how to compute; a model's own by default.
        causal: whether the decoder is held to see no later token; by default, as its spec says.

    Raises:
        AssayError: if there is no preset of that name.
    """
    if isinstance(model, str):
        spec = presets.get(model).model
        model = spec if full else presets.shrink(spec)
    if isinstance(model, TransformerSpec):
        model = random = at_random(abstract(model, compute), seed)
    else:
        model = model if compute is None else computing(model, compute)
        random = at_random(model, seed)
    sample = Sample(model.spec, seed)
    checks = []
    if model.spec.decoder.causal if causal is None else causal:
        checks += [causality_values(model, sample), causality_gradient(random, sample)]
        if model.spec.decoder.causal:  # else nothing can be kept of an earlier token
            checks.append(cache_equality(model, sample))
    else:
        checks += [sees_both_ways(random, sample), padding_is_hidden(model, sample)]
    if model.spec.encoder is not None:
        checks += [sees_the_source(random, sample), source_padding_is_hidden(model, sample)]
    checks += [
        batch_independence(model, sample),
        gradients_reach(random, sample),
        finite_bf16(model, sample),
    ]
    return Report(all(c.passed for c in checks), tuple(checks))


class Sample:
    """Random tokens and targets [B, T], a key for the training forward, and a generator.

    `given` is what a model with an encoder is called with besides: sources [B, S] of different
    lengths, S being three quarters of T, and their mask.
    """

    def __init__(self, spec: TransformerSpec, seed: int):
        self.rng = np.random.default_rng(seed)
        self.vocab = spec.vocab_size
        shape = (ROWS, min(LENGTH, spec.context))
        self.tokens = self.rng.integers(self.vocab, size=shape, dtype=np.int32)
        self.targets = self.rng.integers(self.vocab, size=shape, dtype=np.int32)
        self.key = jax.random.key(seed)
        self.given: dict[str, np.ndarray] = {}
        if spec.encoder is not None:
            s = max(1, 3 * shape[1] // 4)
            lengths = np.linspace(s, max(1, s // 2), ROWS).astype(int)
            source = self.rng.integers(self.vocab, size=(ROWS, s), dtype=np.int32)
            mask = np.arange(s) < lengths[:, None]
            self.given = {"source": source, "source_mask": mask}

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def others(self, tokens: np.ndarray | None = None) -> Int32[np.ndarray, "b t"]:
        """Tokens that differ from these (the sample's own) at every place."""
        tokens = self.tokens if tokens is None else tokens
        shift = self.rng.integers(1, max(self.vocab, 2), size=tokens.shape)
        return ((tokens + shift) % self.vocab).astype(np.int32)


# ---------------------------------------------------------------------------- causality


@jax.jit
def both_outputs(
    model: Transformer,
    tokens: Int32[Array, "b t"],
    key: Key[Array, ""],
    given: Mapping[str, Array] = EMPTY,
) -> dict[str, Output]:
    """The two ways a model is run, `given` a source where it has an encoder.

    The training forward draws what training draws (dropout, routers' noise), and the same
    whatever the tokens; experts' capacity limits are so tight that choices are dropped.
    """
    if model.spec.multi_token is not None:
        trained = congested(model).forward(tokens, key=key, train=True, **given)
        # What is made of place i and of later tokens up to i + k stands at i + k here: after it,
        # no token may matter.
        ahead = {
            f"training, {k + 1} ahead,": Output(
                jnp.pad(logits, ((0, 0), (k, 0), (0, 0)))[:, : tokens.shape[1]], None, ()
            )
            for k, logits in enumerate(trained.ahead, start=1)
        }
        return {"evaluation": Output(model(tokens, **given), None, ()), **ahead} | {
            "training": Output(trained.logits, None, ())
        }
    if not _expert_layers(model):
        training = model(tokens, key=key, train=True, **given)
        return {
            "evaluation": Output(model(tokens, **given), None, ()),
            "training": Output(training, None, ()),
        }
    return {
        "evaluation": model.forward(tokens, **given),
        "training": congested(model).forward(tokens, key=key, train=True, **given),
    }


def both_forwards(
    model: Transformer,
    tokens: Int32[Array, "b t"],
    key: Key[Array, ""],
    given: Mapping[str, Array] = EMPTY,
) -> dict[str, Float32[Array, "b t v"]]:
    """Logits of `both_outputs`."""
    outputs = both_outputs(model, tokens, key, given)
    return {path: output.logits for path, output in outputs.items()}


def congested(model: Transformer, priority: str | None = None) -> Transformer:
    """The same arrays, every capacity limit tightened to `CONGESTED`, perhaps of one priority."""
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    for layer in _expert_layers(other):
        if layer.capacity is not None:
            load = min(layer.capacity.load, CONGESTED)
            layer.capacity = CapacitySpec(load=load, priority=priority or layer.capacity.priority)
    return other


def _expert_layers(model: Transformer) -> list[Moe]:
    stacks = [stack for stack in (model.encoder, model) if stack is not None]
    blocks = [block for stack in stacks for block in (*stack.stacked, *stack.layers)]
    blocks += [module.block for module in model.ahead]
    return [b.feed_forward for b in blocks if isinstance(b.feed_forward, Moe)]


@dataclass(frozen=True)
class Decisions:
    """Where two forwards route the tokens before a place otherwise.

    rows: bool [B], where that may be rounding: from its first difference on, the row's values
    mean nothing. leak: a sentence about a difference that is none of rounding.
    """

    rows: Bool[np.ndarray, "b"]
    leak: str | None = None


def compare_decisions(
    before: tuple[Routing, ...], after: tuple[Routing, ...], places: Bool[np.ndarray, "b t"]
) -> Decisions:
    """Compares the choices of the tokens at `places`, layer by layer.

    A choice that flips between two experts of nearly one score is rounding; so may be all that
    follows it in the same row.
    """
    rows = np.zeros(places.shape[0], bool)
    for layer, (a, b) in enumerate(zip(before, after, strict=True)):
        # Which experts keep the token, in no order: two choices of one score may change places.
        other = _taken(a) != _taken(b)
        other = other.any(axis=-1) & places & ~rows[:, None]
        tie = np.minimum(np.asarray(a.margin), np.asarray(b.margin)) < NEAR_TIE
        tied_before = np.cumsum(tie & places, axis=1) > 0  # a flip may drop a later token instead
        if (other & ~tied_before).any():
            token = np.argwhere(other & ~tied_before)[0, 1]
            return Decisions(rows, f"layer of experts {layer} routed token {token} otherwise")
        rows |= other.any(axis=1)
    return Decisions(rows)


def _taken(routing: Routing) -> Bool[np.ndarray, "b t e"]:
    experts, kept = np.asarray(routing.experts), np.asarray(routing.kept)
    onehot = experts[..., None] == np.arange(len(routing.load))
    return (onehot & kept[..., None]).any(axis=-2)


def causality_values(model: Transformer, sample: Sample) -> Check:
    """Tokens are replaced, one or all from a place on: no logit before that place may change.

    Nor may an earlier token go to other experts, but where their scores all but tie.
    """
    model, exception = without_weight_priority(model, sample)
    before, worst = both_outputs(model, sample.tokens, sample.key, sample.given), _Worst()
    for start, name, tokens in _changed_futures(sample):
        after = both_outputs(model, tokens, sample.key, sample.given)
        earlier = np.broadcast_to(np.arange(sample.length) < start, tokens.shape)
        for path, was in before.items():
            what = f"when {name} changed"
            layers = slice(-len(_routed_layers(model.spec)) or None, None)  # the decoder's
            decisions = compare_decisions(was.routing[layers], after[path].routing[layers], earlier)
            if decisions.leak:
                worst.see(math.inf, f"{path} forward: {decisions.leak} {what}")
            difference = _difference(after[path].logits, was.logits)[:, :start]
            difference = np.where(decisions.rows[:, None], 0.0, difference)
            _, place = _argmax(difference)
            worst.see(
                difference.max() / _scale(was.logits),
                f"{path} forward: logits of token {place} moved {what}",
            )
    note = "no logit moves when later tokens change"
    return worst.check("causality_values", SAME, note + exception)


def _changed_futures(sample: Sample) -> Iterator[tuple[int, str, Int32[np.ndarray, "b t"]]]:
    """(first changed place, what changed, tokens): one token, or all from a place on."""
    others, places = sample.others(), np.arange(sample.length)
    for start in _spread(1, sample.length - 1, 5):
        yield start, f"token {start}", np.where(places == start, others, sample.tokens)
        changed = np.where(places >= start, others, sample.tokens)
        yield start, f"the tokens from {start} on", changed


def without_weight_priority(model: Transformer, sample: Sample) -> tuple[Transformer, str]:
    """The model with places given in the order of the row, and a note where that is a change.

    `priority="weight"` is known to let training see the future, and its name is in the spec. All
    else is held to be causal: with that option alone undone, nothing may leak.
    """
    options = spec_exceptions(model.spec)
    if not options:
        return model, ""
    given = sample.given
    before = both_forwards(model, sample.tokens, sample.key, given)["training"]
    moved = [
        (_difference(after, before)[:, :start] > SAME * _scale(before)).any()
        for start, _, tokens in _changed_futures(sample)
        for after in [both_forwards(model, tokens, sample.key, given)["training"]]
    ]
    graph, state = nnx.split(model)
    ordered = nnx.merge(graph, state)
    for layer in _expert_layers(ordered):
        if layer.capacity is not None:
            layer.capacity = layer.capacity.replace(priority="token")
    return ordered, (
        f"; exception: {options[0].removesuffix('.')} "
        f"(seen in {sum(moved)} of {len(moved)} changed futures); checked without it"
    )


def _routed_layers(spec: TransformerSpec) -> list[int]:
    """The decoder's layers of experts."""
    layers = enumerate(block.feed_forward for block in spec.decoder.blocks())
    return [i for i, layer in layers if layer is not None and layer.kind == "moe"]


class _Nudged(nnx.Module):
    """An embedding with something added to what it gives, to differentiate by."""

    def __init__(self, embedding: nnx.Module, nudge: Float32[Array, "b t d"]):
        self.embedding, self.nudge = embedding, nnx.data(nudge)
        self.table = embedding.table

    def __call__(self, *arguments, **row) -> Float32[Array, "b t d"]:
        return self.embedding(*arguments, **row) + self.nudge


@jax.jit
def sight(
    model: Transformer,
    tokens: Int32[Array, "b t"],
    key: Key[Array, ""],
    place: Int32[Array, ""],
    direction: Float32[Array, "b v"],
    given: Mapping[str, Array] = EMPTY,
) -> dict[str, Float32[Array, "b t"]]:
    """How strongly the logits at one place depend on each token's embedding: max over D.

    It is |d (logits[place] . direction) / d embedding|, for both forwards.
    """

    def gradient(model, **options) -> Float32[Array, "b t"]:
        source = {"source": model.encode(*given.values(), **options)} if given else {}

        def read(nudge) -> Float32[Array, "b v"]:
            graph, state = nnx.split(model)
            nudged = nnx.merge(graph, state)
            nudged.embedding = _Nudged(nudged.embedding, nudge)
            logits = nudged(tokens, **source, **options)
            return jax.lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False)

        shape = (*tokens.shape, model.spec.d_model)
        _, pullback = jax.vjp(read, jnp.zeros(shape, jnp.float32))
        return jnp.max(jnp.abs(pullback(direction)[0]), axis=-1)

    return {
        "evaluation": gradient(model),
        "training": gradient(congested(model), key=key, train=True),
    }


def causality_gradient(model: Transformer, sample: Sample) -> Check:
    """Logits have a gradient of exactly 0 by later embeddings, and not 0 by some earlier one."""
    worst = _Worst()
    attends = any(_looks_back(block.attention) for block in model.spec.decoder.blocks())
    direction = sample.rng.normal(size=(ROWS, sample.vocab)).astype(np.float32)
    for place in _spread(0, sample.length - 1, 5):
        seen = sight(model, sample.tokens, sample.key, np.int32(place), direction, sample.given)
        for path, by_token in seen.items():
            by_token = np.nan_to_num(np.asarray(by_token), nan=np.inf)
            later = by_token[:, place + 1 :]
            if later.size:
                _, at = _argmax(later)
                worst.see(
                    later.max() / max(by_token.max(), np.finfo(np.float32).tiny),
                    f"{path} forward: logits of token {place} have a gradient by the embedding "
                    f"of token {place + 1 + at}",
                )
            blind = not by_token[:, place].any()
            if blind or (attends and place and not by_token[:, :place].any()):
                what = "its own embedding" if blind else "any earlier embedding"
                worst.see(
                    math.inf,
                    f"{path} forward: logits of token {place} have no gradient by {what}",
                )
    return worst.check("causality_gradient", 0.0, "exactly 0 by every later embedding")


def _looks_back(attention: AttentionSpec | None) -> bool:
    return attention is not None and attention.window != 1


# ---------------------------------------------------------------------------- encoders


def sees_both_ways(model: Transformer, sample: Sample) -> Check:
    """Logits have a gradient by every embedding, or with windows by some on either side."""
    attentions = [block.attention for block in model.spec.decoder.blocks() if block.attention]
    whole = any(attention.window is None for attention in attentions)
    direction = sample.rng.normal(size=(ROWS, sample.vocab)).astype(np.float32)
    places = np.arange(sample.length)
    for place in _spread(0, sample.length - 1, 5):
        seen = sight(model, sample.tokens, sample.key, np.int32(place), direction)
        for path, by_token in seen.items():
            sees = np.asarray(by_token) > 0
            if whole:
                blind = np.argwhere(~sees)
            elif attentions:
                sides = [side for side in (places < place, places > place) if side.any()]
                blind = [(0, place) for side in sides if not sees[:, side].any(axis=1).all()]
            else:
                blind = np.argwhere(~sees[:, [place]])
            if len(blind):
                where = f"{path} forward: logits of token {place} do not see token {blind[0][1]}"
                return Check("sees_both_ways", False, math.inf, where, "")
    reach = "every" if whole else "some earlier and some later"
    note = f"a gradient by {reach} embedding"
    return Check("sees_both_ways", True, 0.0, "", note)


def padding_is_hidden(model: Transformer, sample: Sample) -> Check:
    """What stands at masked places changes no logit at the others."""
    lengths = np.linspace(sample.length, max(1, sample.length // 2), ROWS).astype(int)
    mask = np.arange(sample.length) < lengths[:, None]
    before = both_forwards(model, sample.tokens, sample.key, {"mask": mask})
    tokens, worst = np.where(mask, sample.tokens, sample.others()), _Worst()
    for path, after in both_forwards(model, tokens, sample.key, {"mask": mask}).items():
        difference = np.where(mask, _difference(after, before[path]), 0.0)
        row, place = _argmax(difference)
        worst.see(
            difference.max() / _scale(before[path]),
            f"{path} forward: logits of token {place} in row {row} moved when padding changed",
        )
    return worst.check("padding_is_hidden", SAME, "no logit moves when padding changes")


@jax.jit
def source_sight(
    model: Transformer,
    tokens: Int32[Array, "b t"],
    key: Key[Array, ""],
    place: Int32[Array, ""],
    direction: Float32[Array, "b v"],
    given: Mapping[str, Array],
) -> dict[str, Float32[Array, "b s"]]:
    """How strongly the logits at one place depend on each source token's embedding, as `sight`."""

    def gradient(model, **options) -> Float32[Array, "b s"]:
        def read(nudge) -> Float32[Array, "b v"]:
            graph, state = nnx.split(model)
            nudged = nnx.merge(graph, state)
            own = model.source_embedding is not None
            name = "source_embedding" if own else "embedding"
            setattr(nudged, name, _Nudged(getattr(nudged, name), nudge))
            source = nudged.encode(*given.values(), **options)
            logits = model(tokens, source=source, **options)
            return jax.lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False)

        shape = (*given["source"].shape, model.spec.d_model)
        _, pullback = jax.vjp(read, jnp.zeros(shape, jnp.float32))
        return jnp.max(jnp.abs(pullback(direction)[0]), axis=-1)

    return {
        "evaluation": gradient(model),
        "training": gradient(congested(model), key=key, train=True),
    }


def sees_the_source(model: Transformer, sample: Sample) -> Check:
    """Logits have a gradient by every real source token, and of exactly 0 by padding."""
    mask = sample.given["source_mask"]
    direction = sample.rng.normal(size=(ROWS, sample.vocab)).astype(np.float32)
    worst = _Worst()
    for place in _spread(0, sample.length - 1, 3):
        seen = source_sight(
            model, sample.tokens, sample.key, np.int32(place), direction, sample.given
        )
        for path, by_token in seen.items():
            by_token = np.nan_to_num(np.asarray(by_token), nan=np.inf)
            hidden = np.where(mask, 0.0, by_token)
            row, at = _argmax(hidden)
            worst.see(
                hidden.max() / max(by_token.max(), np.finfo(np.float32).tiny),
                f"{path} forward: logits of token {place} have a gradient by the padding at "
                f"source token {at} in row {row}",
            )
            blind = np.argwhere(mask & (by_token == 0))
            if len(blind):
                row, at = blind[0]
                worst.see(
                    math.inf,
                    f"{path} forward: logits of token {place} have no gradient by source token "
                    f"{at} in row {row}",
                )
    return worst.check("sees_the_source", 0.0, "a gradient by every source token, 0 by padding")


def source_padding_is_hidden(model: Transformer, sample: Sample) -> Check:
    """Other tokens in the source's padding change no logit; nor does more padding, but rounding."""
    source, mask = sample.given.values()
    before = both_forwards(model, sample.tokens, sample.key, sample.given)
    worst = _Worst()
    other = {"source": np.where(mask, source, sample.others(source)), "source_mask": mask}
    for path, after in both_forwards(model, sample.tokens, sample.key, other).items():
        difference = _difference(after, before[path])
        row, place = _argmax(difference)
        worst.see(
            difference.max() / _scale(before[path]),
            f"{path} forward: logits of token {place} in row {row} moved when padding changed",
        )
    wider = ((0, 0), (0, min(8, model.spec.context - source.shape[1])))
    longer = {"source": np.pad(source, wider), "source_mask": np.pad(mask, wider)}
    after = both_forwards(model, sample.tokens, sample.key, longer)["evaluation"]
    difference = _difference(after, before["evaluation"])
    row, place = _argmax(difference)
    ratio = difference.max() / _scale(before["evaluation"])
    if not ratio <= CLOSE[model.compute.dtype]:
        worst.see(ratio, f"logits of token {place} in row {row} moved with more padding")
    note = f"no logit moves when padding changes, and by {ratio:.1e} when there is more of it"
    return worst.check("source_padding_is_hidden", SAME, note)


# ---------------------------------------------------------------------------- cache and batch


@partial(jax.jit, static_argnames="prompt")
def decoded(
    model: Transformer,
    tokens: Int32[Array, "b t"],
    lengths: Int32[Array, "b"],
    prompt: int,
    given: Mapping[str, Array] = EMPTY,
) -> tuple[Float32[Array, "b p v"], Float32[Array, "s b v"]]:
    """Logits of a prefill of `prompt` tokens, and of decoding the rest from each row's length.

    Step i of the second stands at place `lengths + i`; past the row's end it means nothing. A
    source is given to the prefill alone.
    """
    rows, total = tokens.shape
    cache = empty_cache(model.spec, rows, total, model.compute.dtype)
    first, cache = model(tokens[:, :prompt], cache=cache, **given)

    def step(cache, i):
        places = jnp.minimum(lengths + i, total - 1)
        token = jnp.take_along_axis(tokens, places[:, None], axis=1)
        logits, cache = model(token, cache=cache)
        return cache, logits[:, 0]

    _, later = jax.lax.scan(step, cache.with_lengths(lengths), jnp.arange(total - 1))
    return first, later


def cache_equality(model: Transformer, sample: Sample) -> Check:
    """Prompts of different lengths prefilled together, then token by token: as the full forward."""
    full = both_forwards(model, sample.tokens, sample.key, sample.given)["evaluation"]
    full = np.asarray(full)
    total, worst = sample.length, _Worst()
    prompt = max(1, total // 2)
    lengths = np.linspace(prompt, 1, ROWS).astype(np.int32)
    first, later = map(np.asarray, decoded(model, sample.tokens, lengths, prompt, sample.given))
    for row, length in enumerate(lengths):
        cached = np.concatenate([first[row, :length], later[: total - length, row]])
        difference = _difference(cached, full[row])
        _, place = _argmax(difference)
        step = "prefill" if place < length else "decoding"
        worst.see(
            difference.max() / _scale(full),
            f"{step}: logits of token {place} after a prompt of {length}",
        )
    dtype = model.compute.dtype
    return worst.check("cache_equality", CLOSE[dtype], f"of the largest logit, in {dtype}")


def batch_independence(model: Transformer, sample: Sample) -> Check:
    """All rows but one are replaced: that one's logits may not change."""
    before, worst = both_forwards(model, sample.tokens, sample.key, sample.given), _Worst()
    others, given = sample.others(), dict(sample.given)
    other_sources = sample.others(given["source"]) if given else None
    for row in range(ROWS):
        tokens = others.copy()
        tokens[row] = sample.tokens[row]
        if given:
            given["source"] = other_sources.copy()
            given["source"][row] = sample.given["source"][row]
        after = both_forwards(model, tokens, sample.key, given)
        for path in before:
            difference = _difference(after[path], before[path])[row]
            worst.see(
                difference.max() / _scale(before[path]),
                f"{path} forward: logits of token {difference.argmax()} in row {row} moved when "
                f"the other rows changed",
            )
    note = "bit-exact" if worst.value == 0 else "of the largest logit: sums in another order"
    return worst.check("batch_independence", SAME, note)


# ---------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Unreached:
    """Entries of a parameter that no gradient can reach, and why.

    units: bool, over the entries of the parameter that are told apart (see `_units`).
    cancels: the gradient is a sum that cancels, so rounding leaves a little; otherwise it is 0.
    """

    units: np.ndarray
    reason: str
    cancels: bool = False


def unreached(
    spec: TransformerSpec,
    tokens: Int32[np.ndarray, "b t"],
    routing: tuple[Routing, ...] = (),
    given: Mapping[str, np.ndarray] = EMPTY,
) -> Iterator[tuple[str, Unreached]]:
    """The proved exceptions: parameters, by name, that get no gradient from these tokens."""
    yield from _unreached_by_routing(spec, routing)
    rows = np.arange(spec.padded_vocab)
    padding = rows >= spec.vocab_size
    tied = spec.head is not None and spec.head.tied
    read = given["source"][given["source_mask"]] if given else tokens[:0]
    own = spec.source_embedding is not None
    absent = ~np.isin(rows, tokens if own else np.concatenate([tokens.ravel(), read.ravel()]))
    if padding.any():
        why = "these rows only pad the vocabulary"
        for name in ("embedding.table", "source_embedding.table", "head.w", "head.b"):
            yield name, Unreached(padding, why)
    why_absent = "these tokens are not in the batch"
    if not tied:
        yield "embedding.table", Unreached(absent, why_absent)
    yield "source_embedding.table", Unreached(~np.isin(rows, read), why_absent)
    yield from _unreached_ngrams(spec, tokens, given)
    places, source = np.arange(spec.context), given["source"].shape[1] if given else 0
    beyond = places >= (tokens.shape[1] if own else max(tokens.shape[1], source))
    why = "these places are not in the batch"
    yield "embedding.positions", Unreached(beyond, why)
    yield "source_embedding.positions", Unreached(places >= source, why)
    for layer, block in spec.layers():
        for part, attention in block.attentions().items():
            if attention.value_embedding is not None:
                table = f"{layer}.{part}.value_embedding.table"
                met = read if layer.startswith("encoder.") else tokens[:, _steps_ahead(layer) :]
                yield table, Unreached(~np.isin(rows, met), why_absent)
                yield table, Unreached(padding, "these rows only pad the vocabulary")
            if attention.positions.kind == "rope" or attention.softcap:
                continue  # a rotation or a cap makes the scores differ by more than a constant
            # q . (k + b) = q . k + q . b: the same for every key, which the softmax does not see.
            name = "k.b" if attention.qk_norm is None else "k_norm.bias"
            yield (
                f"{layer}.{part}.{name}",
                Unreached(np.ones(1, bool), "it cancels in the softmax", cancels=True),
            )


def _unreached_ngrams(
    spec: TransformerSpec, tokens: Int32[np.ndarray, "b t"], given: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, Unreached]]:
    """Rows of n-grams that are not in the batch."""
    every = np.ones(tokens.shape, bool)
    own = spec.source_embedding is not None
    read = [(given["source"], given["source_mask"])] if given else []
    both = {"source_embedding": (spec.source_embedding, read)} if own else {}
    both["embedding"] = spec.embedding, [(tokens, every), *([] if own else read)]
    for name, (embedding, texts) in both.items():
        if embedding.ngrams is None:
            continue
        for i, order in enumerate(embedding.ngrams.orders):
            absent = np.ones(embedding.ngrams.table_rows(order, spec.vocab_size), bool)
            for ids, real in texts:
                last = (ids, *preceding(jnp.asarray(ids), order - 1))
                rows = ngram_rows(last, len(absent), spec.vocab_size)
                absent[np.asarray(rows)[real]] = False
            yield f"{name}.ngrams.{i}", Unreached(absent, "these n-grams are not in the batch")


def _steps_ahead(layer: str) -> int:
    """How far on the tokens are that a layer reads: `ahead.0` is one of multi-token prediction."""
    return int(layer.split(".")[1]) + 1 if layer.startswith("ahead.") else 0


def _unreached_by_routing(
    spec: TransformerSpec, routing: tuple[Routing, ...]
) -> Iterator[tuple[str, Unreached]]:
    records, all_of_it = iter(routing), np.ones(1, bool)
    for name, block in spec.layers():
        layer, path = block.feed_forward, f"{name}.feed_forward"
        if layer is None or layer.kind != "moe":
            continue
        record, router = next(records), layer.router
        if router.kind != "soft":
            idle = ~_taken(record).any(axis=(0, 1))
            linears = ["down", "gate", *(f"up.{n}" for n in range(len(layer.expert.widths)))]
            for name in linears:
                for part in "wb":
                    why = "no token of the batch chose these experts"
                    yield f"{path}.experts.{name}.{part}", Unreached(idle, why)
        if router.kind == "sigmoid_top_k":
            yield f"{path}.router.balance", Unreached(all_of_it, "it only chooses")
        if router.kind == "noisy_top_k":
            for name in ("noise_w", "noise_b"):
                why = "its noise is drawn in training only"
                yield f"{path}.router.{name}", Unreached(all_of_it, why)
        shares = router.kind == "noisy_top_k" or getattr(router, "renormalise", False)
        if shares and router.k == 1:
            why = "a single choice weighs 1, whatever its score"
            # A share s / s leaves the rounding of its gradient; a softmax over one leaves 0.
            for name in ("w", "b"):
                yield f"{path}.router.{name}", Unreached(all_of_it, why, cancels=True)


@jax.jit
def gradients(
    model: Transformer,
    tokens: Int32[Array, "b t"],
    targets: Int32[Array, "b t"],
    given: Mapping[str, Array] = EMPTY,
) -> tuple[Float32[Array, "b t v"], tuple[Routing, ...], Transformer]:
    """Logits, what the routers did, and the mean loss's gradient as a model."""

    def loss(model):
        if model.spec.multi_token is not None:
            output = model.forward(tokens, ahead=True, **given)
            total = jnp.mean(token_losses(output.logits, targets))
            further = ahead_losses(output.ahead, targets)
            return total + further, (output.logits, output.routing)
        routed = model.forward(tokens, **given) if _expert_layers(model) else None
        logits = routed.logits if routed else model(tokens, **given)
        return jnp.mean(token_losses(logits, targets)), (logits, routed.routing if routed else ())

    gradient, (logits, routing) = jax.grad(loss, has_aux=True)(model)
    return logits, routing, gradient


def ahead_losses(
    ahead: tuple[Float32[Array, "b t v"], ...], targets: Int32[Array, "b t"]
) -> Float32[Array, ""]:
    """Mean cross-entropies of multi-token prediction, of the places that have an answer, summed."""
    total = jnp.float32(0)
    for k, logits in enumerate(ahead, start=1):
        total = total + jnp.mean(token_losses(logits[:, :-k], targets[:, k:]))
    return total


def gradients_reach(model: Transformer, sample: Sample) -> Check:
    """Every parameter, table row and vocabulary column has a gradient, but the exceptions.

    An exception that has one fails too. In float32; of a matrix, some entry must have one, since
    a unit that no token of the batch activates is chance.
    """
    model = computing(model, model.compute.replace(dtype="float32"))
    given = sample.given
    _, routing, gradient = gradients(model, sample.tokens, sample.targets, given)
    sizes = {name: _units(name, np.asarray(g)) for name, g in named_parameters(gradient).items()}
    excused = {name: np.zeros(len(units), bool) for name, units in sizes.items()}
    wrong, notes = [], []
    for name, exception in unreached(model.spec, sample.tokens, routing, given):
        if name not in sizes or not exception.units.any():
            continue
        allowed = 0.0
        if exception.cancels:
            allowed = CANCELS * sizes[_beside(name)].max()
        has = exception.units & ~(sizes[name] <= allowed)
        if has.any():
            size = sizes[name][has].max()
            wrong.append((size, f"{_spot(name, has)} has a gradient, though {exception.reason}"))
        excused[name] |= exception.units
        notes.append(f"{name}: {exception.reason}")
    for name, units in sizes.items():
        silent = ~excused[name] & ~((units > 0) & np.isfinite(units))
        if silent.any():
            what = "no gradient" if (units[silent] == 0).all() else "a gradient that is not finite"
            wrong.append((0.0, f"{_spot(name, silent)} gets {what}"))
    worst = max((size for size, _ in wrong), default=0.0)
    where = "; ".join(text for _, text in wrong[:3]) + ("; …" if len(wrong) > 3 else "")
    note = "exceptions: " + "; ".join(notes) if notes else "no exceptions"
    return Check("gradients_reach", not wrong, float(worst), where, note)


def _beside(name: str) -> str:
    """The matrix whose gradient is the measure of what cancels in a parameter's."""
    for part, inner in (("attention", "k.w"), ("cross", "k.w"), ("feed_forward", "experts.down.w")):
        layer, found, _ = name.partition(f".{part}.")
        if found:
            return f"{layer}.{part}.{inner}"
    raise NotImplementedError(name)


def _units(name: str, gradient: np.ndarray) -> np.ndarray:
    """The largest gradient in each unit: a table's row, a vocabulary column, an expert, or all."""
    size = np.abs(gradient)
    match name:
        case _ if _is_table(name):
            return size.max(axis=1)
        case "head.w":
            return size.max(axis=0)
        case "head.b":
            return size
    if ".experts." in name:
        return size.reshape(len(size), -1).max(axis=1)
    return size.max().reshape(1)


def _is_table(name: str) -> bool:
    """Whether it has a row for each token, place or n-gram."""
    return name.endswith(("embedding.table", "embedding.positions")) or ".ngrams." in name


def _spot(name: str, units: np.ndarray) -> str:
    return name if len(units) == 1 else f"{name}[{int(units.argmax())}]"


# ---------------------------------------------------------------------------- bfloat16


def finite_bf16(model: Transformer, sample: Sample) -> Check:
    """Logits and gradients in bfloat16 are finite, and the logits close to float32's.

    Tokens that go to other experts in bfloat16 are told apart: that is a coarse score's choice
    between near equals, and no error of the arithmetic. They must be the fewer.
    """
    name = "finite_bf16"
    exact = computing(model, model.compute.replace(dtype="float32"))
    wanted, routing, _ = gradients(exact, sample.tokens, sample.targets, sample.given)
    wanted = np.asarray(wanted)
    rounded = computing(model, model.compute.replace(dtype="bfloat16"))
    logits, rerouting, gradient = gradients(rounded, sample.tokens, sample.targets, sample.given)
    found = {"logits": logits}
    found |= {f"gradient of {k}": g for k, g in named_parameters(gradient).items()}
    for what, array in found.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            return Check(name, False, math.inf, what, "not finite in bfloat16")
    same = np.ones(sample.tokens.shape, bool)
    for a, b in zip(routing, rerouting, strict=True):
        alike = (_taken(a) == _taken(b)).all(axis=-1)
        # An encoder's token that goes elsewhere moves every logit of its row.
        same &= alike if alike.shape == same.shape else alike.all(axis=-1, keepdims=True)
    error = np.where(same[..., None], np.asarray(logits, np.float64) - wanted, 0.0)
    centred = wanted - wanted.mean(axis=-1, keepdims=True)
    ratio = _rms(error[same]) / max(_rms(centred[same]), np.finfo(np.float32).tiny)
    place = np.unravel_index(np.abs(error).argmax(), error.shape)[1]
    note = f"rms error over the rms of float32's centred logits, at most {BF16_ERROR}"
    if not same.all():
        note += f"; {(~same).sum()} of {same.size} tokens go to other experts in bfloat16"
    passed = ratio <= BF16_ERROR and same.mean() > 0.5
    return Check(name, bool(passed), ratio, f"most at token {place}", note)


# ---------------------------------------------------------------------------- helpers


def computing(model: Transformer, compute: ComputeSpec) -> Transformer:
    """The same arrays, computed in another dtype; layers stay stacked or not as they are."""
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    for stack in (other, other.encoder):
        if stack is not None:
            stack.compute = model.compute.replace(dtype=compute.dtype, remat=compute.remat)
    return other


def at_random(model: Transformer, seed: int) -> Transformer:
    """The same (perhaps abstract) model, every parameter drawn anew: none is 0, signals are O(1).

    Matrices have variance 1 / fan_in, tables 1 / D, norm scales are about 1, biases about 0.
    """

    def draw(name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        noise = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return 0.2 * noise + name.endswith(".scale")
        fan_in = shape[-1] if _is_table(name) else shape[-2]
        return noise / np.float32(math.sqrt(fan_in))

    named = named_parameters(model)
    drawn = {name: draw(name, leaf.shape).astype(leaf.dtype) for name, leaf in named.items()}
    return merge_named(model, drawn)


class _Worst:
    """The largest value seen, and where."""

    def __init__(self):
        self.value, self.where = 0.0, ""

    def see(self, value: float, where: str) -> None:
        if not value <= self.value:
            self.value, self.where = float(value), where

    def check(self, name: str, allowed: float, note: str) -> Check:
        return Check(name, self.value <= allowed, self.value, self.where, note)


def _spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` different places from first to last, both ends among them."""
    if last < first:
        return []
    return sorted(set(np.linspace(first, last, count).astype(int).tolist()))


def _difference(a: Array, b: Array) -> Float32[np.ndarray, "*b"]:
    """Largest absolute difference over the vocabulary; infinite where one is not a number."""
    difference = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max(axis=-1)
    return np.nan_to_num(difference, nan=np.inf)


def _argmax(x: np.ndarray) -> tuple[int, int]:
    """(row, place) of the largest entry of a [B, T] array; row 0 of a [T] one."""
    x = np.atleast_2d(x)
    row, place = np.unravel_index(x.argmax(), x.shape)
    return int(row), int(place)


def _scale(logits: Array) -> float:
    return max(float(np.abs(np.asarray(logits)).max()), np.finfo(np.float32).tiny)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
