"""Parameters, FLOPs and bytes of an architecture, counted from its spec alone.

What is counted:

- **FLOPs** are those of matrix products, 2 a multiply-add; norms, softmax, activations and the
  embedding's look-up are free. Attention's two products are counted as the program computes
  them: every query against all T keys, masked or outside a window alike (`scores="computed"`),
  or only against the keys it may see (`scores="needed"`: about half of T in a causal stack).
- **With an encoder** a token is one of the target's, and carries its share of the source: a
  source of S tokens is read once for T target tokens, so each counts S / T of the encoder and of
  the keys and values that cross-attention makes of its output. Cross-attention is attention.
- **Training** is three times forward: each product has two in its backward pass. Multi-token
  prediction (`ahead`) belongs to training alone: no FLOPs forward, no active parameters.
- **Active** parameters are those that one token meets; they differ from the total only where a
  token is routed.

Both are checked: the parameters against the real arrays, the FLOPs against XLA's own count
(`tests/spec/test_accounting.py`).

Axes: D model, H heads, K kv heads, C head width, F hidden, V vocabulary (padded), T tokens,
S source tokens.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from assay.errors import counted
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    MoeSpec,
    NormSpec,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import RunSpec

PARTS = ("embedding", "positions", "attention", "feed_forward", "norms", "head", "ahead")
"""The rows of the tables, in the order of the forward pass."""

TRAINING_OVER_FORWARD = 3

BYTES = {"float32": 4, "bfloat16": 2}

Scores = Literal["computed", "needed"]


@dataclass(frozen=True)
class Count:
    """Parameters of one part, and those of them that one token meets."""

    total: int = 0
    active: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.total + other.total, self.active + other.active)


@dataclass(frozen=True)
class Parameters:
    """Parameters by part (the keys are `PARTS`), and in all."""

    parts: dict[str, Count]

    @property
    def total(self) -> int:
        return sum(count.total for count in self.parts.values())

    @property
    def active(self) -> int:
        return sum(count.active for count in self.parts.values())


@dataclass(frozen=True)
class Flops:
    """FLOPs a token of the forward pass by part, in all, and of a training step.

    `ahead` are those of multi-token prediction, which training alone computes.
    """

    parts: dict[str, int]
    ahead: int = 0

    @property
    def forward(self) -> int:
        return sum(self.parts.values())

    @property
    def train(self) -> int:
        return TRAINING_OVER_FORWARD * (self.forward + self.ahead)


@lru_cache(maxsize=64)  # a search asks it of one spec thousands of times
def parameters(spec: TransformerSpec) -> Parameters:
    """Every parameter once (a tied head's are the embedding's), padded rows included."""
    parts = dict.fromkeys(PARTS, Count())
    for part, count in _parameter_counts(spec):
        parts[part] += count
    return Parameters(parts)


@lru_cache(maxsize=64)
def flops_per_token(
    spec: TransformerSpec,
    seq_len: int | None = None,
    *,
    scores: Scores = "computed",
    source_len: int | None = None,
) -> Flops:
    """FLOPs a token, averaged over a sequence of `seq_len` tokens (None: `spec.context`).

    `source_len` is that of the source, where there is an encoder (None: as `seq_len`).
    """
    seq_len = seq_len or spec.context
    parts = dict.fromkeys(PARTS, 0)
    for part, flops in _flop_counts(spec, seq_len, source_len or seq_len, scores):
        parts[part] += flops
    return Flops(
        {part: round(flops) for part, flops in parts.items() if part != "ahead"},
        round(parts["ahead"]),
    )


def run_flops_per_token(run: RunSpec) -> Flops:
    """FLOPs a token at the lengths that a run trains at."""
    data = run.data
    return flops_per_token(run.model, data.seq_len, source_len=data.room_for_source)


def training_flops(
    spec: TransformerSpec, tokens: int, seq_len: int | None = None, source_len: int | None = None
) -> int:
    """FLOPs of training on `tokens` tokens in sequences of `seq_len`, as the program computes."""
    return tokens * flops_per_token(spec, seq_len, source_len=source_len).train


def planned_steps(run: RunSpec) -> int | None:
    """How many updates a run's budget buys; None where it is one of seconds."""
    budget, tokens = run.train.budget, run.data.batch_size * run.data.seq_len
    match budget.unit:
        case "steps":
            return math.ceil(budget.amount)
        case "tokens":
            return math.ceil(budget.amount / tokens)
        case "flops":
            return math.ceil(budget.amount / (run_flops_per_token(run).train * tokens))
    return None


def only_warm_up(run: RunSpec, steps: int) -> str | None:
    """Says that so many updates are all warm-up."""
    if steps > run.schedule.warmup:
        return None
    return (
        f"The warm-up of {counted(run.schedule.warmup, 'update')} (schedule.warmup) takes the "
        f"whole run of {counted(steps, 'update')}: the learning rate is not at its peak "
        f"before the last of them."
    )


def kv_bytes_per_token(spec: TransformerSpec, dtype: str = "float32") -> int:
    """Bytes that a token's keys and values take in the cache, all layers together.

    A sliding window saves none: its layer's cache is as long as the others'.
    """
    return _cached_bytes((b.attention for b in spec.decoder.blocks()), spec.d_model, dtype)


def kv_bytes_per_source_token(spec: TransformerSpec, dtype: str = "float32") -> int:
    """Bytes that a source token takes in the cache of cross-attention, all layers together."""
    return _cached_bytes((b.cross for b in spec.decoder.blocks()), spec.d_model, dtype)


def _cached_bytes(attentions: Iterable[AttentionSpec | None], d: int, dtype: str) -> int:
    widths = (2 * one.num_kv_heads * one.width(d) for one in attentions if one is not None)
    return BYTES[dtype] * sum(widths)


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in a checkpoint.

    `layers.0.attention.q.w` is attention's, `layers.0.attention.q_norm.scale` the norms'.
    """
    path = name.split(".")
    if path[0] == "ahead":
        return "ahead"
    if any(step.endswith("norm") for step in path):
        return "norms"
    if path[-1] == "positions" or "relative_bias" in path:
        return "positions"
    if path[0].endswith("embedding"):
        return "embedding"
    if "cross" in path:
        return "attention"
    return next(part for part in PARTS if part in path)


# ---------------------------------------------------------------------------- parameters


def _everywhere(parameters: int) -> Count:
    return Count(parameters, parameters)


def _parameter_counts(spec: TransformerSpec) -> Iterator[tuple[str, Count]]:
    d, rows, head = spec.d_model, spec.padded_vocab, spec.head
    for embedding in (spec.embedding, spec.source_embedding):
        if embedding is not None:
            yield "embedding", _everywhere(rows * d)
            ngrams = embedding.ngrams
            for order in ngrams.orders if ngrams else ():
                yield "embedding", _everywhere(ngrams.table_rows(order, spec.vocab_size) * d)
            if embedding.positions.kind == "learned":
                yield "positions", _everywhere(spec.context * d)
            yield "norms", _norm(embedding.norm, d)
    for stack in (spec.encoder, spec.decoder):
        if stack is not None:
            yield from _stack_parameters(stack, d, rows)
    for block in spec.ahead():  # no token meets them but in training
        inner = [count for _, count in _block_parameters(block, d, rows)]
        inner += 3 * [_norm(spec.decoder.final_norm or block.norm, d)]
        yield "ahead", Count(2 * d * d + sum(count.total for count in inner), 0)
    if head is not None:
        yield "head", _everywhere((0 if head.tied else d * rows) + (rows if head.bias else 0))


def _stack_parameters(stack: StackSpec, d: int, rows: int) -> Iterator[tuple[str, Count]]:
    if relative := stack.relative():
        positions, heads = relative
        yield "positions", _everywhere(positions.buckets * heads)
    for block in stack.blocks():
        yield from _block_parameters(block, d, rows)
    yield "norms", _norm(stack.final_norm, d)


def _block_parameters(block: BlockSpec, d: int, rows: int) -> Iterator[tuple[str, Count]]:
    norms_a_part = 2 if block.norm_position == "both" else 1
    attentions = block.attentions().values()
    for _ in range(norms_a_part * (len(attentions) + (block.feed_forward is not None))):
        yield "norms", _norm(block.norm, d)
    for attention in attentions:
        yield from _attention_parameters(attention, d, rows)
    if block.feed_forward is not None:
        yield "feed_forward", _feed_forward_parameters(block.feed_forward, d)


def _attention_parameters(
    attention: AttentionSpec, d: int, rows: int
) -> Iterator[tuple[str, Count]]:
    c = attention.width(d)
    wide, narrow = attention.heads * c, attention.num_kv_heads * c
    weights = sum(fan_in * fan_out for fan_in, fan_out in _attention_matrices(attention, d))
    biases = (wide + 2 * narrow) * attention.qkv_bias + d * attention.out_bias
    gates = sum(fan_in * fan_out for fan_in, fan_out in _attention_gates(attention, d))
    yield "attention", _everywhere(weights + biases + gates)
    if attention.value_embedding is not None:
        numbers = 0 if attention.value_embedding.gate_channels else 2
        yield "attention", _everywhere(rows * narrow + numbers)
    if attention.qk_norm is not None:
        by_head = attention.qk_norm.over == "head"
        for width in (c, c) if by_head else (wide, narrow):
            yield "norms", _norm(attention.qk_norm.norm, width)


def _attention_matrices(attention: AttentionSpec, d: int) -> list[tuple[int, int]]:
    """(fan_in, fan_out) of the queries', keys', values' and output's matrices."""
    c = attention.width(d)
    wide, narrow = attention.heads * c, attention.num_kv_heads * c
    return [(d, wide), (d, narrow), (d, narrow), (wide, d)]


def _attention_gates(attention: AttentionSpec, d: int) -> list[tuple[int, int]]:
    """(fan_in, fan_out) of the gates on the output and on the values' table."""
    gates = []
    if attention.gate is not None:
        features = attention.width(d) if attention.gate == "feature" else 1
        gates.append((d, attention.heads * features))
    if attention.value_embedding is not None and attention.value_embedding.gate_channels:
        gates.append((attention.value_embedding.gate_channels, attention.num_kv_heads))
    return gates


def _feed_forward_parameters(feed_forward: MlpSpec | MoeSpec, d: int) -> Count:
    match feed_forward.kind:
        case "mlp":
            return _everywhere(_mlp_parameters(feed_forward, d))
        case "moe":
            one = _mlp_parameters(feed_forward.expert, d)
            routed = Count(feed_forward.experts * one, round(feed_forward.active_experts * one))
            shared = feed_forward.shared
            always = _router_parameters(feed_forward, d)
            return routed + _everywhere(always + (_mlp_parameters(shared, d) if shared else 0))
    raise NotImplementedError(feed_forward.kind)


def _mlp_parameters(mlp: MlpSpec, d: int) -> int:
    matrices = _mlp_matrices(mlp, d)
    biases = sum(fan_out for _, fan_out in matrices) * mlp.bias
    return sum(fan_in * fan_out for fan_in, fan_out in matrices) + biases


def _router_parameters(moe: MoeSpec, d: int) -> int:
    router, experts = moe.router, moe.experts
    match router.kind:
        case "top_k":
            return (d + router.bias) * experts
        case "noisy_top_k":
            return 2 * (d + router.bias) * experts
        case "sigmoid_top_k":
            return (d + 1) * experts
        case "expert_choice":
            return d * experts
        case "soft":
            return d * experts * router.slots
    raise NotImplementedError(router.kind)


def _mlp_matrices(mlp: MlpSpec, d: int) -> list[tuple[int, int]]:
    """(fan_in, fan_out) of every matrix, the gate's first."""
    return [(d, mlp.widths[0])] * mlp.gated + list(pairwise((d, *mlp.widths, d)))


def _norm(norm: NormSpec | None, width: int) -> Count:
    if norm is None:
        return Count()
    return _everywhere(width * (norm.scale + (norm.kind == "layernorm" and norm.bias)))


# ---------------------------------------------------------------------------- FLOPs


def _flop_counts(
    spec: TransformerSpec, seq_len: int, source_len: int, scores: Scores
) -> Iterator[tuple[str, float]]:
    d = spec.d_model
    if spec.encoder is not None:
        for part, flops in _stack_flops(spec.encoder, d, source_len, source_len, scores):
            yield part, flops * source_len / seq_len
    yield from _stack_flops(spec.decoder, d, seq_len, source_len, scores)
    if spec.head is not None:
        yield "head", _product(d, spec.padded_vocab)
    for block in spec.ahead():
        yield "ahead", _product(2 * d, d) + _product(d, spec.padded_vocab)
        for _, flops in _block_flops(block, spec.decoder.causal, d, seq_len, source_len, scores):
            yield "ahead", flops


def _stack_flops(
    stack: StackSpec, d: int, seq_len: int, source_len: int, scores: Scores
) -> Iterator[tuple[str, float]]:
    for block in stack.blocks():
        yield from _block_flops(block, stack.causal, d, seq_len, source_len, scores)


def _block_flops(
    block: BlockSpec, causal: bool, d: int, seq_len: int, source_len: int, scores: Scores
) -> Iterator[tuple[str, float]]:
    for name, attention in block.attentions().items():
        crosses = name == "cross"
        keys = source_len if crosses else seq_len
        if scores == "needed" and not crosses:
            keys = mean_keys(seq_len, window=attention.window, causal=causal)
        wide = attention.heads * attention.width(d)
        yield "attention", round(2 * _product(keys, wide))  # q k^T, and weights v
        q, k, v, o = (_product(*matrix) for matrix in _attention_matrices(attention, d))
        share = source_len / seq_len if crosses else 1  # keys and values are the source's
        gates = sum(_product(*gate) for gate in _attention_gates(attention, d))
        yield "attention", q + o + (k + v) * share + gates
    if block.feed_forward is not None:
        yield "feed_forward", _feed_forward_flops(block.feed_forward, d, seq_len)


def _feed_forward_flops(feed_forward: MlpSpec | MoeSpec, d: int, seq_len: int) -> int:
    match feed_forward.kind:
        case "mlp":
            return _mlp_flops(feed_forward, d)
        case "moe":
            shared = feed_forward.shared
            always = _mlp_flops(shared, d) if shared else 0
            return round(always + _routed_flops(feed_forward, d, seq_len))
    raise NotImplementedError(feed_forward.kind)


def _mlp_flops(mlp: MlpSpec, d: int) -> int:
    return sum(_product(*matrix) for matrix in _mlp_matrices(mlp, d))


def _routed_flops(moe: MoeSpec, d: int, seq_len: int) -> float:
    """The router's logits and the experts that a token meets, no other (noise not counted)."""
    router, one = moe.router, _mlp_flops(moe.expert, d)
    if router.kind != "soft":
        return _product(d, moe.experts) + moe.active_experts * one
    slots = moe.experts * router.slots
    if router.over == "token":
        return _product(d, slots) + moe.experts * (one + _product(1, d))
    # Logits, the mixing into slots and out of them; and the experts of all slots, once a row.
    return 3 * _product(d, slots) + slots * one / seq_len


def _product(fan_in: float, fan_out: int):
    return 2 * fan_in * fan_out


def mean_keys(seq_len: int, *, window: int | None, causal: bool) -> float:
    """How many keys a query may see, on average over a sequence's places."""
    reach = min(window or seq_len, seq_len)  # a query itself, and reach - 1 tokens behind it
    behind = (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len
    return behind if causal else 2 * behind - 1
