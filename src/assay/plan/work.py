"""What one training step makes a device do: products, memory traffic, and bytes sent.

Counted from the spec alone, for the share of one device. Axes: D model, F hidden, H heads, K kv
heads, C head width, E experts, N the tokens that a device holds in one pass.

How a mesh shares the work: `data` and `fsdp` (and `expert`) split the batch; `fsdp` also keeps
parameters in parts, gathered when a layer needs them; `tensor` splits heads, hidden width and
vocabulary; `expert` splits the experts, so that tokens travel to them and back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

from assay.model.flash import Kernel, fits
from assay.spec.accounting import BYTES, flops_per_token, mean_keys, parameters, run_flops_per_token
from assay.spec.model import AttentionSpec, BlockSpec, MlpSpec, MoeSpec, StackSpec, TransformerSpec
from assay.spec.run import MeshSpec, RunSpec

RECOMPUTED = ("none", "elementwise", "dots", "weights", "mlp", "block")
"""What the backward pass computes again, least first: nothing; all but products; also those of
experts, which are no plain products to JAX's policies; also attention's products; a
feed-forward's first products in their stead, attention kept; all of a block but its last product,
whose output nobody needs."""


@dataclass(frozen=True)
class System:
    """How the software that trains does what a spec leaves open: what it is documented to do.

    `fused`: chains of elementwise operations read and write memory once, as compilers make them;
    otherwise each operation does. `flash`: attention never keeps its scores, and skips those that
    a mask hides; otherwise all T x T are computed and kept. Assay's own runs name the kernel, which
    does so where it fits. `attention`: the share of the chip's peak that its attention kernel is
    known to reach, where it is not a present one.

    Along `tensor`, `in_parts`: norms and residuals lie in parts of the sequence, which are
    gathered before products and scattered after them, and copied into order each time (PyTorch's
    SequenceParallel). `gathers_each`: every product gathers its own input, also those that share
    it (ColwiseParallel with input_layouts=Shard). `whole_logits`: the logits are gathered, and
    each device computes the whole loss. `pieces`: a product and the collective beside it are
    taken in pieces, so that one goes on behind the other; if None, on TPUs.

    `exact`: tokens that are exchanged take the places they need; otherwise as many as could be
    needed (`places`).

    `back`: how parameters are gathered for the backward pass: `gather`, hidden behind products;
    `late`, after the products of the layer before, so that nothing hides them (FSDP's
    BACKWARD_POST); None, not at all, for they were kept (FSDP's SHARD_GRAD_OP).

    `sums`: the dtype in which gradients are summed over devices, if not the products'.
    `sums_once`: with gradient accumulation they are summed after the last pass only, also where
    parameters lie in parts. `zero1`: each device updates a part of the parameters, which are
    gathered again during the next forward pass.
    """

    fused: bool = True
    flash: bool | Kernel = True
    attention: float | None = None
    in_parts: bool = False
    gathers_each: bool = False
    whole_logits: bool = False
    pieces: bool | None = None
    exact: bool = False
    back: str | None = "gather"
    sums: str | None = None
    sums_once: bool = False
    zero1: bool = False


STATISTICS = {"adamw": 2, "muon": 1, "sgd": 0}
"""Float32 numbers a parameter that an optimizer keeps (Muon's tables keep two, not counted)."""

ASSAY = System()
"""What XLA makes of Assay's program."""


@dataclass(frozen=True)
class Sent:
    """Bytes that a device sends along an axis of the mesh in one update.

    `kind`: `gather`, of parameters and of their gradients' parts, which other layers' products
    hide; `late`, of parameters, which nothing hides; `sum`, of gradients once an update, which only
    one pass can hide; `stream`, sums of activations; `exchange`, tokens to their experts and back.
    `forward`: the share of it that belongs to the forward pass.
    """

    axis: str
    kind: str
    size: float
    forward: float


@dataclass(frozen=True)
class Work:
    """One device's share of one update.

    `products` and `attention`: FLOPs of matrix products with weights, and of attention's two
    products with every key that may be seen (a kernel that skips the rest). `weights`: bytes of
    weights and of their gradients that the products read and write. `forward`: the share of the
    products that belongs to the forward pass. `traffic`: bytes that norms, activations,
    residuals, losses and the optimizer read and write. `sent`: what collectives carry, as (bytes
    of the full array) x the share that travels. `host`: bytes copied from the
    host's memory and back.
    """

    products: float
    attention: float
    weights: float
    forward: float
    traffic: float
    sent: tuple[Sent, ...] = ()
    host: float = 0.0

    @property
    def flops(self) -> float:
        return self.products + self.attention


def mesh_sizes(mesh: MeshSpec) -> dict[str, int]:
    """Devices along each axis that the mesh has."""
    return mesh.model_dump()


def step_work(run: RunSpec, recompute: str, system: System = ASSAY) -> Work:
    """The work of one update on one device."""
    spec, mesh = run.model, mesh_sizes(run.mesh)
    width = BYTES[run.compute.dtype]
    tokens = run.data.batch_size * run.data.seq_len / run.mesh.batch_shards
    products, again = _flops(spec)
    share = 1 / mesh["tensor"]
    forward = sum(products.values())
    flops = 3 * forward + again[recompute]
    if not system.whole_logits:  # where they do not share the head, each along tensor does it
        flops += 3 * products["head"] * (mesh["tensor"] / head_ways(run) - 1)
    again_too = recompute in ("weights", "block")
    traffic, scores = _block_traffic(run, width, recompute, system), 0.0
    for one in chain(*attending(spec)):
        a_key = 4 * one.spec.heads * one.spec.width(spec.d_model)
        if keeps_scores(one, run, system):
            scores += a_key * run.data.seq_len * (3 + again_too)
            passes = KEPT_SCORES + 3 * again_too
            traffic += share * passes * width * run.data.seq_len * one.spec.heads
        else:  # they are computed again on the way back: 2.5 times forward
            scores += a_key * one.keys(run.data.seq_len) * (3.5 + again_too)
    traffic = tokens * (traffic + _head_traffic(run, system))
    traffic += optimizer_traffic(run)
    return Work(
        products=tokens * flops * share,
        attention=tokens * scores * share,
        weights=_weight_traffic(run, width),
        forward=forward / flops if flops else 1 / 3,  # a bigram has no products
        traffic=traffic,
        sent=_sent(run, recompute, system),
        host=2 * statistics(run) if run.compute.offload_optimizer else 0.0,
    )


def _flops(spec: TransformerSpec) -> tuple[dict[str, float], dict[str, float]]:
    """Forward FLOPs a token: of weights' products by part; and of those done again, by policy."""
    one, two = (flops_per_token(spec, t).parts for t in (1, 2))
    products = one | {"attention": 2 * one["attention"] - two["attention"]}  # without its keys
    products["feed_forward"] += _empty_places(spec)
    last = sum(_last_product(block.feed_forward, spec.d_model) for block in blocks_of(spec))
    routed = sum(
        block.feed_forward.active_experts * _but_last(block.feed_forward.expert, spec.d_model)
        for block in blocks_of(spec)
        if isinstance(block.feed_forward, MoeSpec)
    )
    inside = products["attention"] + products["feed_forward"]
    again = {
        "none": 0.0,
        "elementwise": 0.0,
        "dots": routed,
        "weights": routed,
        "mlp": products["feed_forward"] - last,
        "block": inside - last,
    }
    return products, again


def _empty_places(spec: TransformerSpec) -> float:
    """FLOPs a token that a capacity limit adds: its buffers are computed whole, full or not."""
    return sum(
        2
        * (block.feed_forward.capacity.load - 1)
        * block.feed_forward.active_experts
        * _mlp_weights(block.feed_forward.expert, spec.d_model)
        for block in blocks_of(spec)
        if isinstance(block.feed_forward, MoeSpec) and block.feed_forward.capacity is not None
    )


def blocks_of(spec: TransformerSpec) -> tuple[BlockSpec, ...]:
    """Every block, an encoder's first: a source is taken to be as long as its target."""
    encoder = () if spec.encoder is None else spec.encoder.blocks()
    return encoder + spec.decoder.blocks()


@dataclass(frozen=True)
class Attending:
    """One attention of a block. `source`: its keys are a source's, whose padding is masked."""

    spec: AttentionSpec
    causal: bool
    source: bool

    def keys(self, seq_len: int) -> float:
        """Those that a query sees, on average over places."""
        return mean_keys(seq_len, window=self.spec.window, causal=self.causal)


def attending(spec: TransformerSpec) -> tuple[tuple[Attending, ...], ...]:
    """The attentions of every block, as `blocks_of` has them."""

    def of(block: BlockSpec, stack: StackSpec) -> Iterator[Attending]:
        if block.attention is not None:
            yield Attending(block.attention, stack.causal, source=stack is spec.encoder)
        if block.cross is not None:
            yield Attending(block.cross, False, source=True)

    stacks = [stack for stack in (spec.encoder, spec.decoder) if stack is not None]
    return tuple(tuple(of(block, stack)) for stack in stacks for block in stack.blocks())


def keeps_scores(one: Attending, run: RunSpec, system: System) -> bool:
    """Whether the scores of an attention lie in memory: no kernel makes it (`model/flash.py`)."""
    if isinstance(system.flash, bool):
        return not system.flash
    spec = one.spec
    if one.source or spec.dropout > 0 or spec.positions.kind in ("alibi", "relative"):
        return True
    shape = (run.compute.dtype, run.data.seq_len, spec.width(run.model.d_model))
    causal, window, softcap = one.causal, spec.window, spec.softcap
    return not fits(system.flash, *shape, causal=causal, window=window, softcap=softcap)


def _last_product(feed_forward: MlpSpec | MoeSpec | None, d: int) -> float:
    """FLOPs a token of the projection back into the residual stream."""
    match feed_forward:
        case None:
            return 0
        case MoeSpec():
            shared = _last_product(feed_forward.shared, d)
            return shared + feed_forward.active_experts * _last_product(feed_forward.expert, d)
    return 2 * feed_forward.widths[-1] * d


def _but_last(mlp: MlpSpec, d: int) -> float:
    """FLOPs a token of an MLP's products but the last."""
    return 2 * _mlp_weights(mlp, d) - _last_product(mlp, d)


def places(moe: MoeSpec, ways: int) -> float:
    """Places a token in the buffers of experts that lie on so many devices.

    On one device its choices. On several, each must have room for as many of a token's choices as
    it has experts, or for the capacity limit if that is less.
    """
    choices = moe.active_experts
    if ways == 1:
        return choices
    room = ways * min(choices, moe.experts // ways)
    return room if moe.capacity is None else min(room, moe.capacity.load * choices)


# ---------------------------------------------------------------------------- memory traffic

# Times that a block's tensors are read or written by elementwise operations in the forward pass,
# where a compiler fuses what it can; backward is twice that.
STREAM = 4  # of an attention or feed-forward: a norm and a sum with the residual, of D
FEW = 2  # one read and one write: rotations, activations
KEPT_SCORES = 12  # of T x T: written, softmax, weighed; and back, where they are read twice more
SORTED = 4  # a choice's vector copied to its expert's place and back
EXCHANGED = 8  # read to be sent and written on arrival, put in order of the experts; and back
UNFUSED = 2.5
"""Elementwise traffic without fusion: each norm is three passes, each activation two."""


def _block_traffic(run: RunSpec, width: int, recompute: str, system: System) -> float:
    """Bytes a token, forward and backward, of all blocks."""
    spec, tensor, passes = run.model, run.mesh.tensor, 0.0
    for block in blocks_of(spec):
        passes += STREAM * _parts(block) * spec.d_model / (tensor if system.in_parts else 1)
        passes += _inner_passes(block, spec.d_model, run.mesh.expert, system) / tensor
    times = 3 + (recompute != "none")
    traffic = times * passes * (1 if system.fused else UNFUSED)
    if system.in_parts and tensor > 1:  # into order: one read and one write
        traffic += 2 * spec.d_model * _gathers_and_scatters(spec, recompute, system)
    return traffic * width


def _inner_passes(block: BlockSpec, d: int, ways: int, system: System) -> float:
    passes = 0.0
    for attention in block.attentions().values():
        passes += FEW * (attention.heads + attention.num_kv_heads) * attention.width(d)
    match block.feed_forward:
        case MlpSpec() as mlp:
            passes += _activation_passes(mlp)
        case MoeSpec() as moe:
            sorting = SORTED + (EXCHANGED if ways > 1 else 0)
            each = moe.active_experts if system.exact else places(moe, ways)
            passes += each * (_activation_passes(moe.expert) + sorting * d)
            passes += _activation_passes(moe.shared) if moe.shared else 0
    return passes


def _activation_passes(mlp: MlpSpec) -> float:
    return sum((3 if mlp.gated else FEW) * f for f in mlp.widths)


def _head_traffic(run: RunSpec, system: System) -> float:
    """Bytes a token: logits in float32 written, read for the softmax, their gradient written."""
    if run.model.head is None:
        return 0
    return 3 * 4 * run.model.padded_vocab / (1 if system.whole_logits else head_ways(run))


def _weight_traffic(run: RunSpec, width: int) -> float:
    """Bytes of an update's products: weights read twice a pass, gradients added up in float32."""
    held = _gathered(run) / run.mesh.tensor
    return run.train.accumulate * held * (2 * width + 2 * 4)


def optimizer_traffic(run: RunSpec) -> float:
    """Bytes of the update: parameter, gradient, statistics read; all but the gradient written."""
    own = 4 * 4 * parameters(run.model).total / parameter_ways(run)
    return own + 2 * statistics(run)


def statistics(run: RunSpec) -> float:
    """Bytes of the optimizer's statistics on a device."""
    optimizer = run.optimizer
    each = STATISTICS[optimizer.kind]
    if optimizer.kind == "sgd" and optimizer.momentum > 0:
        each = 1
    return 4 * each * parameters(run.model).total / parameter_ways(run)


def parameter_ways(run: RunSpec) -> float:
    """Into how many parts the parameters are split, on average over them."""
    mesh = mesh_sizes(run.mesh)
    total, experts = parameters(run.model).total, expert_parameters(run.model)
    split, whole = mesh["fsdp"] * mesh["tensor"], whole_tables(run)
    held = experts / (split * mesh["expert"]) + (total - experts - whole) / split
    return total / (held + whole / mesh["fsdp"])


def whole_tables(run: RunSpec) -> int:
    """Parameters of tables whose rows `tensor` does not divide: each device along it has all."""
    spec, rows = run.model, []
    for embedding in (spec.embedding, spec.source_embedding):
        if embedding is not None:
            rows.append(spec.padded_vocab)
            orders = embedding.ngrams.orders if embedding.ngrams else ()
            rows += [embedding.ngrams.table_rows(order, spec.vocab_size) for order in orders]
    if spec.head is not None and not spec.head.tied:
        rows.append(spec.padded_vocab)
    return spec.d_model * sum(each for each in rows if each % run.mesh.tensor)


def head_ways(run: RunSpec) -> int:
    """Devices along `tensor` that share the vocabulary: all, or 1 where they do not divide it."""
    return 1 if run.model.padded_vocab % run.mesh.tensor else run.mesh.tensor


def expert_parameters(spec: TransformerSpec) -> int:
    """Parameters of routed experts, all together."""
    return sum(
        block.feed_forward.experts * _mlp_weights(block.feed_forward.expert, spec.d_model)
        for block in blocks_of(spec)
        if isinstance(block.feed_forward, MoeSpec)
    )


def _mlp_weights(mlp: MlpSpec, d: int) -> int:
    sizes = (d, *mlp.widths, d)
    return sum(a * b for a, b in pairwise(sizes)) + mlp.gated * d * sizes[1]


# ---------------------------------------------------------------------------- collectives


def collective_bytes(run: RunSpec, recompute: str, system: System = ASSAY) -> dict[str, float]:
    """Bytes that one device sends in one update, by mesh axis."""
    sizes: dict[str, float] = {}
    for sent in _sent(run, recompute, system):
        sizes[sent.axis] = sizes.get(sent.axis, 0.0) + sent.size
    return sizes


def _gathered(run: RunSpec) -> float:
    """Parameters that a device computes with, gathered along fsdp; not yet split by tensor."""
    total, experts = parameters(run.model).total, expert_parameters(run.model)
    return total - experts + experts / run.mesh.expert


def _sent(run: RunSpec, recompute: str, system: System) -> tuple[Sent, ...]:
    """What one device sends in one update, as the parts in which it can hide.

    fsdp: each parameter is gathered for the forward and again for the backward pass, and its
    gradient reduced and scattered, once a pass over part of a batch. data: gradients are summed
    (sent twice). tensor: two sums of the residual stream a block, forward and backward. expert:
    each choice's vector (or as many as there is room for) travels to its expert and back, forward
    and backward, and again where its experts' products are not kept.
    """
    mesh, width = mesh_sizes(run.mesh), BYTES[run.compute.dtype]
    spec, passes = run.model, run.train.accumulate
    tokens = run.data.batch_size * run.data.seq_len / run.mesh.batch_shards
    held = _gathered(run) / mesh["tensor"]
    split = mesh["tensor"] * mesh["fsdp"]
    dense = (parameters(spec).total - expert_parameters(spec)) / split
    part = parameters(spec).total / split / mesh["expert"]  # dense ones were scattered by expert
    summed = BYTES[system.sums] if system.sums else width
    again = recompute in ("mlp", "block")
    routed = [b.feed_forward for b in blocks_of(spec) if isinstance(b.feed_forward, MoeSpec)]
    rows = sum(m.active_experts if system.exact else places(m, mesh["expert"]) for m in routed)
    exchanges = 4 if recompute in ("none", "elementwise") else 6
    stream = tokens * spec.d_model * width
    if system.in_parts:
        activations = stream * _gathers_and_scatters(spec, recompute, system)
    else:
        # A part's output forward, its input's gradient backward; of a cross-attention, the source's
        # too.
        blocks = blocks_of(spec)
        sums = sum((2 + again / 2) * _parts(block) + (block.cross is not None) for block in blocks)
        activations = sums * 2 * stream
    if system.whole_logits and spec.head is not None:
        activations += tokens * spec.padded_vocab * width
    reduced, once = held * summed * _travels(mesh["fsdp"]), system.sums_once
    exchanged = exchanges * rows * stream * _travels(mesh["expert"])
    # Of what goes both ways, forward's share; of sums, that of gathering what was updated.
    half, updated = 2 / (4 + again), 0.5 if system.zero1 else 0.0
    gathered = passes * held * width * _travels(mesh["fsdp"])
    sent = (
        Sent("fsdp", "gather", gathered, 1.0),
        Sent("fsdp", system.back or "gather", gathered if system.back else 0.0, 0.0),
        Sent("fsdp", "sum", reduced, 0.0)
        if once
        else Sent("fsdp", "gather", passes * reduced, 0.0),
        Sent("data", "sum", part * (summed + width) * _travels(mesh["data"]), updated),
        Sent("tensor", "stream", activations * _travels(mesh["tensor"]), half),
        Sent("expert", "exchange", exchanged, 2 / exchanges),
        Sent("expert", "sum", dense * (summed + width) * _travels(mesh["expert"]), updated),
    )
    return tuple(one for one in sent if one.size)


def _parts(block: BlockSpec) -> int:
    """Attentions and feed-forwards of a block."""
    return len(block.attentions()) + (block.feed_forward is not None)


def _gathers_and_scatters(spec: TransformerSpec, recompute: str, system: System) -> int:
    """Gathers and scatters of activations in an update, where they lie in parts.

    Forward a block gathers for its first products (q, k, v; the feed-forward's first) and scatters
    after its last; backward the other way round; again what is computed again, but for the last
    scatter of a block, whose output nobody needs.
    """
    count = 0
    for block in blocks_of(spec):
        attention, mlp = block.attention is not None, block.feed_forward
        qkv = attention * (3 if system.gathers_each else 1)
        first = 0
        if isinstance(mlp, MlpSpec):
            first = 1 + (mlp.gated and system.gathers_each)
        forward = qkv + first + attention + (first > 0)
        again = {"block": forward - 1, "mlp": first}.get(recompute, 0)
        count += 2 * forward + again
    return count


def _travels(ways: int) -> float:
    """The share of an array that leaves a device in a ring."""
    return (ways - 1) / ways


def global_flops(run: RunSpec) -> float:
    """FLOPs of one update on all devices, recomputation not counted, as `assay show` counts."""
    tokens = run.data.batch_size * run.data.seq_len
    return tokens * run_flops_per_token(run).train
