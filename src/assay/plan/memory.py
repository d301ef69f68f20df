"""Bytes that one device holds during an update, estimated from the spec alone.

Parameters are float32, and so are the optimizer's statistics. The rest is what the training step
keeps between its forward and its backward pass, by remat policy, and what it needs at its worst
moment: one block in full, and the logits.
"""

import math
from dataclasses import dataclass

from assay.plan.work import (
    ASSAY,
    System,
    attending,
    blocks_of,
    expert_parameters,
    head_ways,
    keeps_scores,
    mesh_sizes,
    parameter_ways,
    places,
    statistics,
)
from assay.spec.accounting import (
    BYTES,
    kv_bytes_per_source_token,
    kv_bytes_per_token,
    parameters,
)
from assay.spec.model import BlockSpec, MlpSpec, MoeSpec, TransformerSpec
from assay.spec.run import MeshSpec, RunSpec
from assay.train.loss import CHUNK, LARGE


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by what they hold."""

    parameters: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    working: float
    logits: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def training_memory(run: RunSpec, recompute: str, system: System = ASSAY) -> Memory:
    """What one device holds; `recompute` as in `plan/work.py`."""
    spec, mesh, width = run.model, mesh_sizes(run.mesh), BYTES[run.compute.dtype]
    total = parameters(spec).total
    held, offloaded = total / parameter_ways(run), run.compute.offload_optimizer
    rows = run.data.batch_size / run.mesh.batch_shards / run.train.accumulate
    tokens, tensor = rows * run.data.seq_len, mesh["tensor"]
    blocks = blocks_of(spec)
    kept = sum(_kept(block, spec.d_model, run.mesh, recompute) for block in blocks)
    if recompute == "none":
        kept += sum(_float32(block, spec.d_model, run.mesh) for block in blocks) * 4 / width
    largest = max((_worst(block, spec.d_model, run.mesh) for block in blocks), default=0)
    scores = [
        sum(one.spec.heads for one in block if keeps_scores(one, run, system))
        for block in attending(spec)
    ]
    # Scores and weights, both in float32, and the weights again in the products' dtype.
    each = (1 + 2 * 4 / width) * run.data.seq_len / tensor
    largest += each * max(scores, default=0)
    kept += each * sum(scores) if recompute in ("none", "dots") else 0
    # Two layers' parameters, one in use and one on its way; and experts' gradients, made whole.
    each = max(len(blocks), 1) * tensor
    experts = expert_parameters(spec) / each / mesh["expert"]
    layers = 2 * (total - expert_parameters(spec)) / each + 3 * experts
    vocabulary = spec.padded_vocab / head_ways(run)
    return Memory(
        parameters=4 * held,
        optimizer=0 if offloaded else statistics(run),
        gradients=4 * held,
        gathered=(layers * width if mesh["fsdp"] > 1 else 0)
        + (held * width if width < 4 and mesh["fsdp"] == 1 else 0),
        activations=tokens * kept * width,
        working=tokens * largest * width,
        logits=2 * _logits(run, tokens * vocabulary * 4) if spec.head is not None else 0,
    )


@dataclass(frozen=True)
class Serving:
    """Bytes of decoding with the run's model, in the run's dtype, on the run's mesh.

    Of a token, and of a sequence as long as the run's (with its source, where there is an
    encoder), the keys and values of all layers are meant, wherever they lie. On a device are
    those of its rows (data, fsdp and expert share the batch) and of its kv heads (tensor shares
    them), beside its part of the parameters. `sequences` is how many sequences of that length all
    devices hold together.
    """

    parameters: float
    kv_per_token: int
    kv_per_sequence: int
    kv_cache: float
    sequences: int

    @property
    def total(self) -> float:
        """Bytes a device, with the run's batch."""
        return self.parameters + self.kv_cache


def serving_memory(run: RunSpec, room: float) -> Serving:
    """What one device of `room` bytes holds while the model decodes the run's batch."""
    spec, data, dtype = run.model, run.data, run.compute.dtype
    token = kv_bytes_per_token(spec, dtype)
    source = kv_bytes_per_source_token(spec, dtype) * (data.room_for_source or data.seq_len)
    sequence, shards = token * data.seq_len + source, run.mesh.batch_shards
    on_device = _largest_share(spec, run.mesh.tensor) * sequence
    parts = BYTES[dtype] * parameters(spec).total / parameter_ways(run)
    left = max(0.0, room - parts)
    return Serving(
        parameters=parts,
        kv_per_token=token,
        kv_per_sequence=sequence,
        kv_cache=math.ceil(data.batch_size / shards) * on_device,
        sequences=int(left // on_device) * shards if on_device else 0,
    )


def _largest_share(spec: TransformerSpec, tensor: int) -> float:
    """The part of all keys and values that a device has which has the most heads of each layer."""
    attentions = [a for block in blocks_of(spec) for a in (block.attention, block.cross) if a]
    widths = [(a.num_kv_heads, a.width(spec.d_model)) for a in attentions]
    whole = sum(heads * width for heads, width in widths)
    return sum(-(-heads // tensor) * width for heads, width in widths) / max(whole, 1)


def _logits(run: RunSpec, size: float) -> float:
    """Bytes of the logits that stand at a time: all, or where those would be large a chunk."""
    chunk = run.compute.loss_chunk
    if chunk is not None:
        return size if chunk == 0 else min(size, 4 * chunk * run.model.padded_vocab)
    return size if size < LARGE else CHUNK


def _kept(block: BlockSpec, d: int, mesh: MeshSpec, recompute: str) -> float:
    """Numbers a token that a block leaves for its backward pass."""
    match recompute:
        case "block":
            return d
        case "mlp":
            return 2 * d + _attention(block, d, mesh.tensor)
        case "dots" | "weights":
            kept = 3 * d + _attention(block, d, mesh.tensor)
            return kept + _plain_products(block.feed_forward) / mesh.tensor
    return _everything(block, d, mesh)


def _everything(block: BlockSpec, d: int, mesh: MeshSpec) -> float:
    """Numbers a token of all that a block computes: norms, products, activations, sums."""
    return 5 * d + _attention(block, d, mesh.tensor) + 2 * _feed_forward(block, d, mesh)


def _worst(block: BlockSpec, d: int, mesh: MeshSpec) -> float:
    """Numbers a token while a block's gradient is made: of experts', gradients beside features."""
    features = 0.0
    if isinstance(block.feed_forward, MoeSpec):
        moe = block.feed_forward
        features = 2 * places(moe, mesh.expert) * _widths(moe.expert) / mesh.tensor
    return _everything(block, d, mesh) + features


def _float32(block: BlockSpec, d: int, mesh: MeshSpec) -> float:
    """Numbers a token that norms and activations keep in float32, whatever the dtype around them.

    Held against the compiler: Llama 3 8B without recomputation, 96.1 GiB compiled, 96.7 so counted.
    """
    return 4 * d + 3 * _feed_forward(block, d, mesh) / 2


def _attention(block: BlockSpec, d: int, tensor: int) -> float:
    return sum(
        2 * (attention.heads + attention.num_kv_heads) * attention.width(d) / tensor
        for attention in (block.attention, block.cross)
        if attention is not None
    )


def _feed_forward(block: BlockSpec, d: int, mesh: MeshSpec) -> float:
    """Numbers a token of a feed-forward's first products, and of what goes to experts and back.

    An expert's features are of the places in its device's buffers, however few are taken.
    """
    match block.feed_forward:
        case MlpSpec() as mlp:
            return _widths(mlp) / mesh.tensor
        case MoeSpec() as moe:
            each = _widths(moe.expert) / mesh.tensor + VECTORS * d
            shared = _widths(moe.shared) / mesh.tensor if moe.shared else 0
            return places(moe, mesh.expert) * each + shared
    return 0


VECTORS = 8
"""Copies of a place's vector, halved: in order of the experts and back, in float32 where they are
summed, and their gradients. Held against the compiler, GiB estimated and compiled: Mixtral on
v6e:16x16 at 32,768 tokens a device, blocks recomputed, fsdp=256: 42.8, 41; fsdp=128, tensor=2:
31.4, 34.3; fsdp=64, tensor=4: 25.8, 26.3; on v5p:4x4x4 with fsdp=8, expert=8 and weights kept:
31.5, 32.5."""


def _plain_products(feed_forward: MlpSpec | MoeSpec | None) -> float:
    """Numbers a token of the first products that JAX's policies know as such: not of experts."""
    if isinstance(feed_forward, MoeSpec):
        feed_forward = feed_forward.shared
    return 0 if feed_forward is None else _widths(feed_forward)


def _widths(mlp: MlpSpec) -> float:
    return sum(mlp.widths) * (1 + mlp.gated)
