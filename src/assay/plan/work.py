"""What one training step makes a device do: products, memory traffic, and bytes sent.

Counted from the spec alone, for the share of one device. Axes: D model, F hidden, H heads, K kv
heads, C head width, E experts, N the tokens that a device holds in one pass.

How a mesh shares the work: `data` and `fsdp` (and `expert`) split the batch; `fsdp` also keeps
parameters in parts, gathered when a layer needs them; `tensor` splits heads, hidden width and
vocabulary; `expert` splits the experts, so that tokens travel to them and back.
"""

from dataclasses import dataclass, field
from itertools import pairwise

from assay.spec.accounting import BYTES, flops_per_token, mean_keys, parameters, run_flops_per_token
from assay.spec.model import BlockSpec, MlpSpec, MoeSpec, TransformerSpec
from assay.spec.run import MeshSpec, RunSpec

RECOMPUTED = ("none", "dots", "weights", "mlp", "block")
"""What the backward pass computes again, least first: nothing; all but products; also attention's
products; a feed-forward's first products in their stead, attention kept; all of a block but its
last product, whose output nobody needs."""


@dataclass(frozen=True)
class Work:
    """One device's share of one update.

    `products` and `attention`: FLOPs of matrix products with weights, and of attention's two
    products with every key that may be seen (a kernel that skips the rest). `traffic`: bytes that
    norms, activations, residuals, losses and the optimizer read and write. `sent`: bytes that
    collectives carry, by mesh axis, as (bytes of the full array) x the share that travels.
    """

    products: float
    attention: float
    traffic: float
    sent: dict[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        return self.products + self.attention


def mesh_sizes(mesh: MeshSpec) -> dict[str, int]:
    """Devices along each axis that the mesh has."""
    return mesh.model_dump()


def step_work(run: RunSpec, recompute: str, *, fused: bool = True, flash: bool = True) -> Work:
    """The work of one update on one device.

    `fused`: chains of elementwise operations read and write memory once, as compilers make them;
    otherwise each operation does. `flash`: attention never keeps its scores, and skips those that
    a mask hides; otherwise all T x T are computed and kept.
    """
    spec, mesh = run.model, mesh_sizes(run.mesh)
    width = BYTES[run.compute.dtype]
    tokens = run.data.batch_size * run.data.seq_len / run.mesh.batch_shards
    products, again, a_key = _flops(spec)
    share = 1 / mesh["tensor"]
    forward = sum(products.values())
    flops = 3 * forward + again[recompute]
    again_too = recompute in ("weights", "block")
    if flash:  # the scores are computed again on the way back: 2.5 times forward
        scores = a_key * _seen(spec, run.data.seq_len) * (3.5 + again_too)
    else:
        scores = a_key * run.data.seq_len * (3 + again_too)
    traffic = _block_traffic(spec, mesh["tensor"], width, recompute, fused)
    if not flash:
        passes = KEPT_SCORES + 3 * again_too
        traffic += share * passes * width * run.data.seq_len * _heads(spec)
    traffic = tokens * (traffic + _head_traffic(spec, mesh))
    traffic += optimizer_traffic(run)
    return Work(
        products=tokens * flops * share,
        attention=tokens * scores * share,
        traffic=traffic,
        sent=collective_bytes(run, recompute),
    )


def _flops(spec: TransformerSpec) -> tuple[dict[str, float], dict[str, float], float]:
    """Forward FLOPs a token: of weights' products by part; those again by policy; of a key."""
    one, two = (flops_per_token(spec, t).parts for t in (1, 2))
    a_key = two["attention"] - one["attention"]
    products = one | {"attention": one["attention"] - a_key}
    products["feed_forward"] += _empty_places(spec)
    last = sum(_last_product(block.feed_forward, spec.d_model) for block in blocks_of(spec))
    inside = products["attention"] + products["feed_forward"]
    again = {
        "none": 0.0,
        "dots": 0.0,
        "weights": 0.0,
        "mlp": products["feed_forward"] - last,
        "block": inside - last,
    }
    return products, again, a_key


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


def _heads(spec: TransformerSpec) -> int:
    """Query heads of all layers together."""
    return sum(block.attention.heads for block in blocks_of(spec) if block.attention)


def blocks_of(spec: TransformerSpec) -> tuple[BlockSpec, ...]:
    """Every block, an encoder's first: a source is taken to be as long as its target."""
    encoder = () if spec.encoder is None else spec.encoder.blocks()
    return encoder + spec.decoder.blocks()


def _seen(spec: TransformerSpec, seq_len: int) -> float:
    """Keys that a query sees, on average over layers and places."""
    stacks = [stack for stack in (spec.encoder, spec.decoder) if stack is not None]
    keys = [
        mean_keys(seq_len, window=block.attention.window, causal=stack.causal)
        for stack in stacks
        for block in stack.blocks()
        if block.attention is not None
    ]
    keys += [seq_len for block in spec.decoder.blocks() if block.cross is not None]
    return sum(keys) / max(len(keys), 1)


def _last_product(feed_forward: MlpSpec | MoeSpec | None, d: int) -> float:
    """FLOPs a token of the projection back into the residual stream."""
    match feed_forward:
        case None:
            return 0
        case MoeSpec():
            shared = _last_product(feed_forward.shared, d)
            return shared + feed_forward.active_experts * _last_product(feed_forward.expert, d)
    return 2 * feed_forward.widths[-1] * d


# ---------------------------------------------------------------------------- memory traffic

# Times that a block's tensors are read or written by elementwise operations in the forward pass,
# where a compiler fuses what it can; backward is twice that.
STREAM = 8  # two norms and two sums with the residual, each two reads and two writes of D
FEW = 2  # one read and one write: rotations, activations
KEPT_SCORES = 12  # of T x T: written, softmax, weighed; and back, where they are read twice more
UNFUSED = 2.5
"""Elementwise traffic without fusion: each norm is three passes, each activation two."""


def _block_traffic(
    spec: TransformerSpec, tensor: int, width: int, recompute: str, fused: bool
) -> float:
    """Bytes a token, forward and backward, of all blocks."""
    passes = 0.0
    for block in blocks_of(spec):
        passes += STREAM * spec.d_model + _inner_passes(block, spec.d_model) / tensor
    times = 3 + (recompute != "none")
    return times * passes * width * (1 if fused else UNFUSED)


def _inner_passes(block: BlockSpec, d: int) -> float:
    passes = 0.0
    if block.attention is not None:
        attention = block.attention
        passes += FEW * (attention.heads + attention.num_kv_heads) * attention.width(d)
    match block.feed_forward:
        case MlpSpec() as mlp:
            passes += _activation_passes(mlp)
        case MoeSpec() as moe:
            chosen = moe.active_experts
            passes += chosen * (_activation_passes(moe.expert) + 4 * d)  # to experts and back
            passes += _activation_passes(moe.shared) if moe.shared else 0
    return passes


def _activation_passes(mlp: MlpSpec) -> float:
    return sum((3 if mlp.gated else FEW) * f for f in mlp.widths)


def _head_traffic(spec: TransformerSpec, mesh: dict[str, int]) -> float:
    """Bytes a token: logits in float32 written, read for the softmax, their gradient written."""
    return 3 * 4 * spec.padded_vocab / mesh["tensor"] if spec.head is not None else 0


def optimizer_traffic(run: RunSpec) -> float:
    """Bytes of the update: parameter, gradient, statistics read; all but the gradient written."""
    statistics = {"adamw": 2, "muon": 1, "sgd": 0}[run.optimizer.kind]
    return 4 * (2 * (1 + statistics) + 2) * parameters(run.model).total / parameter_ways(run)


def parameter_ways(run: RunSpec) -> float:
    """Into how many parts the parameters are split, on average over them."""
    mesh = mesh_sizes(run.mesh)
    total, experts = parameters(run.model).total, expert_parameters(run.model)
    split = mesh["fsdp"] * mesh["tensor"]
    held = experts / (split * mesh["expert"]) + (total - experts) / split
    return total / held


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


def collective_bytes(run: RunSpec, recompute: str) -> dict[str, float]:
    """Bytes that one device sends in one update, by mesh axis.

    fsdp: each parameter is gathered for the forward and again for the backward pass, and its
    gradient reduced and scattered, once a pass over part of a batch. data: gradients are summed
    (sent twice). tensor: two sums of the residual stream a block, forward and backward. expert:
    each choice's vector travels to its expert and back, forward and backward.
    """
    mesh, width = mesh_sizes(run.mesh), BYTES[run.compute.dtype]
    spec, passes = run.model, run.train.accumulate
    tokens = run.data.batch_size * run.data.seq_len / run.mesh.batch_shards
    total, experts = parameters(spec).total, expert_parameters(spec)
    held = (total - experts + experts / mesh["expert"]) / mesh["tensor"]
    again = recompute in ("mlp", "block")
    parts = sum(
        (block.attention is not None) + (block.feed_forward is not None)
        for block in blocks_of(spec)
    )
    chosen = sum(
        block.feed_forward.active_experts
        for block in blocks_of(spec)
        if isinstance(block.feed_forward, MoeSpec)
    )
    stream = tokens * spec.d_model * width
    sent = {
        "fsdp": 3 * passes * held * width * _travels(mesh["fsdp"]),
        "data": 2 * held * width / mesh["fsdp"] * _travels(mesh["data"]),
        "tensor": (2 + again / 2) * parts * 2 * stream * _travels(mesh["tensor"]),
        "expert": (4 + 2 * again) * chosen * stream * _travels(mesh["expert"])
        + 2 * (total - experts) / mesh["tensor"] / mesh["fsdp"] * width * _travels(mesh["expert"]),
    }
    return {axis: size for axis, size in sent.items() if size}


def _travels(ways: int) -> float:
    """The share of an array that leaves a device in a ring."""
    return (ways - 1) / ways


def global_flops(run: RunSpec) -> float:
    """FLOPs of one update on all devices, recomputation not counted, as `assay show` counts."""
    tokens = run.data.batch_size * run.data.seq_len
    return tokens * run_flops_per_token(run).train
