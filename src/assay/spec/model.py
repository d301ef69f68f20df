"""What an architecture IS: frozen data, no JAX.

A model is an embedding, a stack of blocks, and a head; perhaps with an encoder, a second stack,
whose output the blocks read by their `cross`. Block i of a stack is `pattern[i % len(pattern)]`,
so a plain stack, alternating kinds of layers, and local/global patterns are one mechanism. How a
model is run (dtype, scan, mesh) is not here but in `run.py`.

Widths: D = `d_model`, H = `heads`, K = `kv_heads`, C = `head_dim`, F = `hidden`, V = vocabulary.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from assay.errors import AssayError
from assay.spec.base import Spec

Probability = Annotated[float, Field(ge=0, lt=1)]


# ---------------------------------------------------------------------------- positions


class LinearScaling(Spec):
    """Position interpolation: angles divided by `factor` (Chen et al., arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat


class Llama3Scaling(Spec):
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept.

    Source: Llama 3 (arXiv:2407.21783) and its reference code.
    """

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_context: PositiveInt = 8192

    @model_validator(mode="after")
    def _band(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor: found {self.high_freq_factor}, which must be more than "
                f"low_freq_factor ({self.low_freq_factor})."
            )
        return self


class YarnScaling(Spec):
    """YaRN (Peng et al., arXiv:2309.00071): interpolate by wavelength, and sharpen the softmax.

    `attention_factor` multiplies the rotated queries and keys; None is YaRN's own
    0.1 ln(factor) + 1.
    """

    kind: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1)]
    original_context: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class NoPositions(Spec):
    """Nothing here: order comes from the causal mask alone, or from the other place."""

    kind: Literal["none"] = "none"


class LearnedPositions(Spec):
    """A trained vector for each of `context` positions, added to the embedding."""

    kind: Literal["learned"] = "learned"


class SinusoidalPositions(Spec):
    """Fixed sines and cosines, interleaved as in Vaswani et al. (arXiv:1706.03762), section 3.5."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    theta: PositiveFloat = 10_000.0


class Rope(Spec):
    """Rotary positions (Su et al., arXiv:2104.09864), the two halves of a head rotated together."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10_000.0
    scaling: RopeScaling | None = None


class RelativeBias(Spec):
    """T5's relative positions (Raffel et al., arXiv:1910.10683, 2.1).

    A trained number a head, added to the scores, for each of so many `buckets` of distance. Half
    of the buckets hold one distance each, the other half ever wider ranges up to `max_distance`
    and beyond; where a stack is not causal, each direction has half of the buckets. A stack owns
    one table, that all its layers share.
    """

    kind: Literal["relative"] = "relative"
    buckets: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    max_distance: PositiveInt = 128

    @model_validator(mode="after")
    def _beyond(self):
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"max_distance: found {self.max_distance}, which must be more than half of the "
                f"buckets ({self.buckets})."
            )
        return self


class Alibi(Spec):
    """Scores fall with distance, by another slope in each head (Press et al., arXiv:2108.12409).

    -slope x distance is added after scaling. Of n heads the slopes are 2^(-8/n), 2^(-16/n), ...
    where n is a power of two; otherwise those of the power below, and then every other one of the
    power above. Nothing is trained.
    """

    kind: Literal["alibi"] = "alibi"


EmbeddingPositions = Annotated[
    NoPositions | LearnedPositions | SinusoidalPositions, Field(discriminator="kind")
]
AttentionPositions = Annotated[
    NoPositions | Rope | RelativeBias | Alibi, Field(discriminator="kind")
]


# ---------------------------------------------------------------------------- norms


class LayerNorm(Spec):
    """Ba et al. (arXiv:1607.06450)."""

    kind: Literal["layernorm"] = "layernorm"
    epsilon: PositiveFloat = 1e-5
    scale: bool = True
    bias: bool = True


class RmsNorm(Spec):
    """Zhang and Sennrich (arXiv:1910.07467)."""

    kind: Literal["rmsnorm"] = "rmsnorm"
    epsilon: PositiveFloat = 1e-5
    scale: bool = True


NormSpec = Annotated[LayerNorm | RmsNorm, Field(discriminator="kind")]


# ---------------------------------------------------------------------------- initialisation


class NormalInit(Spec):
    """N(0, std)."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.02


class TruncatedNormalInit(Spec):
    """N(0, std), redrawn beyond `bound` standard deviations."""

    kind: Literal["truncated_normal"] = "truncated_normal"
    std: PositiveFloat = 0.02
    bound: PositiveFloat = 3.0


class XavierInit(Spec):
    """Variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010)."""

    kind: Literal["xavier"] = "xavier"
    distribution: Literal["uniform", "normal"] = "uniform"


class FanInInit(Spec):
    """Variance gain^2 / fan_in: LeCun's at gain 1, He's at gain sqrt(2)."""

    kind: Literal["fan_in"] = "fan_in"
    gain: PositiveFloat = 1.0
    distribution: Literal["uniform", "normal"] = "normal"


class ZeroInit(Spec):
    """All zeros."""

    kind: Literal["zero"] = "zero"


WeightInit = Annotated[
    NormalInit | TruncatedNormalInit | XavierInit | FanInInit | ZeroInit,
    Field(discriminator="kind"),
]


class InitSpec(Spec):
    """How parameters begin. Biases are 0 and norm scales 1, always.

    `residual` is for the projections that write into the residual stream: as the other
    `weights`; scaled by 1/sqrt(2 x layers) (GPT-2); or zero, so that every block begins as
    the identity. `queries` is for the queries' matrices: T5's are smaller by sqrt(head_dim), since
    its scores are not scaled.
    """

    weights: WeightInit = NormalInit()
    queries: WeightInit | None = None  # None: as `weights`
    residual: Literal["same", "depth_scaled", "zero"] = "depth_scaled"
    embedding: WeightInit = NormalInit()
    head: WeightInit | None = None  # None: as `weights`

    def head_init(self) -> WeightInit:
        return self.weights if self.head is None else self.head

    def query_init(self) -> WeightInit:
        return self.weights if self.queries is None else self.queries


# ---------------------------------------------------------------------------- block parts


class QkNorm(Spec):
    """Norm of queries and keys before the rotation (Henry et al., arXiv:2010.04245).

    `over` each head's C features with one scale for all heads (Qwen3), or the whole
    projection of H x C (OLMoE).
    """

    norm: NormSpec = RmsNorm(epsilon=1e-6)
    over: Literal["head", "projection"] = "head"


class ValueEmbedding(Spec):
    """A table of the layer's own, whose row of a token is added to that token's values.

    With `gate_channels`, each kv head takes the row 2 sigmoid(x W) times, W from 0 and reading the
    first channels of the attention's input (nanochat). None: values and row are weighed by two
    trained numbers, from 1/2 each (modded-nanogpt, after arXiv:2410.17897).
    """

    gate_channels: PositiveInt | None = 32


class AttentionSpec(Spec):
    """Scaled dot-product attention; `kv_heads` = heads, 1, or between: MHA, MQA, GQA.

    `head_dim` None is d_model / heads. `scale` None is 1 / sqrt(head_dim). `window` W lets a
    query see itself and the W - 1 tokens before it. `softcap` c bounds scores to c tanh(s / c)
    (Gemma 2, arXiv:2408.00118). `gate` multiplies what is attended to by sigmoid(x W), x being the
    attention's input, before the output projection: one number a head, or one for every feature
    (arXiv:2505.06708). `dropout` falls on the attention weights.
    """

    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    positions: AttentionPositions = NoPositions()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    scale: PositiveFloat | None = None
    softcap: PositiveFloat | None = None
    window: PositiveInt | None = None
    gate: Literal["head", "feature"] | None = None
    value_embedding: ValueEmbedding | None = None
    dropout: Probability = 0.0

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    def width(self, d_model: int) -> int:
        """C, the width of one head."""
        return self.head_dim or d_model // self.heads

    @model_validator(mode="after")
    def _groups(self):
        if self.heads % self.num_kv_heads:
            raise ValueError(
                f"kv_heads: found {self.kv_heads}, which must divide heads ({self.heads})."
            )
        return self


Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared", "sigmoid"]


class MlpSpec(Spec):
    """Position-wise feed-forward; gated, it is the GLU family (Shazeer, arXiv:2002.05202).

    `hidden` is one width or several: (2d, 4d) is d -> 2d -> 4d -> d, activated in between.
    `bias` is on every linear layer inside.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: PositiveInt | tuple[PositiveInt, ...]
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        return self.hidden if isinstance(self.hidden, tuple) else (self.hidden,)

    @model_validator(mode="after")
    def _shape(self):
        if not self.widths:
            raise ValueError("hidden: found an empty list; give one width or several.")
        if self.gated and len(self.widths) > 1:
            raise ValueError("hidden: a gated MLP has one hidden width, not several.")
        return self


# ---------------------------------------------------------------------------- experts


class TopK(Spec):
    """The k experts with the largest softmax probabilities (arXiv:1701.06538, 2101.03961).

    A choice weighs its probability; with `renormalise`, its share among the k. `jitter` j
    multiplies what the router reads by uniform(1 - j, 1 + j), in training only (Switch).
    """

    kind: Literal["top_k"] = "top_k"
    k: PositiveInt = 2
    renormalise: bool = True
    jitter: Probability = 0.0
    bias: bool = False


class NoisyTopK(Spec):
    """Softmax over the k largest of x W + eps softplus(x W_noise), eps ~ N(0, 1) (makeMoE).

    Noise is drawn in training only; elsewhere it is the softmax over the k largest of x W. The
    form is Shazeer et al.'s (arXiv:1701.06538), section 2.1. `bias` is on both projections.
    """

    kind: Literal["noisy_top_k"] = "noisy_top_k"
    k: PositiveInt = 2
    bias: bool = False


class SigmoidTopK(Spec):
    """Sigmoid scores, balanced by a bias and no loss (DeepSeek-V3, arXiv:2412.19437, 2.1.2).

    The k experts are chosen by score + bias, and weigh their scores alone, `renormalise`d to sum
    to 1, times `scale`. After each update an expert's bias moves by `bias_rate` towards the mean
    load; no gradient moves it.
    """

    kind: Literal["sigmoid_top_k"] = "sigmoid_top_k"
    k: PositiveInt = 2
    renormalise: bool = True
    scale: PositiveFloat = 1.0
    bias_rate: Annotated[float, Field(ge=0)] = 1e-3


class ExpertChoice(Spec):
    """Each expert takes the tokens of a row that suit it best (Zhou et al., arXiv:2202.09368).

    It takes `load` x T / experts of T tokens, by softmax probability, which is also the weight.
    A token's fate depends on later tokens, so a causal stack refuses it.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    load: PositiveFloat = 2.0


class Soft(Spec):
    """Soft mixture (Puigcerver et al., arXiv:2308.00951): every expert reads mixtures of tokens.

    Each expert has `slots`. Over the sequence, as published, a slot reads a softmax mixture of
    all T tokens, and a token a softmax mixture of all slots: later tokens too, so a causal stack
    refuses it. Over the token, the mixed group is one token: each slot then reads that token
    (a softmax over one is 1), and the outputs are mixed by the softmax over slots. It cannot see
    the future, and costs every expert for every token.
    """

    kind: Literal["soft"] = "soft"
    slots: PositiveInt = 1
    over: Literal["sequence", "token"] = "token"


RouterSpec = Annotated[
    TopK | NoisyTopK | SigmoidTopK | ExpertChoice | Soft, Field(discriminator="kind")
]


class CapacitySpec(Spec):
    """At most `load` x k T / experts of a row's choices for one expert, in training only.

    What is over is dropped: the token passes by the residual. `priority`: token fills the places
    in the order of the row, which is causal; weight gives them to the largest router weights, as
    JaxPT meant it, and lets a later token push out an earlier one: training then sees the future.
    Evaluation and decoding drop nothing.
    """

    load: PositiveFloat = 1.25
    priority: Literal["token", "weight"] = "token"


class MoeSpec(Spec):
    """A mixture of experts in the feed-forward's place.

    `shared` is read by every token besides the routed experts. `balance_loss` weighs
    E sum_e f_e P_e, which is 1 where loads are equal (Switch, arXiv:2101.03961, for any k);
    `z_loss` the mean squared logsumexp of the router's logits (ST-MoE, arXiv:2202.08906).
    """

    kind: Literal["moe"] = "moe"
    experts: Annotated[int, Field(ge=2)]
    expert: MlpSpec
    router: RouterSpec = TopK()
    shared: MlpSpec | None = None
    capacity: CapacitySpec | None = None
    balance_loss: Annotated[float, Field(ge=0)] = 0.0
    z_loss: Annotated[float, Field(ge=0)] = 0.0

    @property
    def active_experts(self) -> float:
        """How many experts a token meets, on average where tokens do not choose."""
        match self.router.kind:
            case "expert_choice":
                return self.router.load
            case "soft":
                return self.experts
        return self.router.k

    @model_validator(mode="after")
    def _consistent(self):
        kind = self.router.kind
        if kind == "expert_choice" and self.router.load > self.experts:
            raise ValueError(
                f"router.load: found {self.router.load}, which is more than all {self.experts} "
                f"experts can take."
            )
        if kind not in ("expert_choice", "soft"):
            if self.router.k > self.experts:
                raise ValueError(
                    f"router.k: found {self.router.k}, but there are {self.experts} experts."
                )
            return self
        if self.capacity is not None:
            raise ValueError(f"capacity: {kind} fills every expert alike; nothing can overflow.")
        if self.balance_loss:
            raise ValueError(
                f"balance_loss: found {self.balance_loss}; {kind} loads every expert alike."
            )
        if kind == "soft" and self.z_loss:
            raise ValueError(f"z_loss: found {self.z_loss}; it is of no use to a soft mixture.")
        return self


FeedForward = Annotated[MlpSpec | MoeSpec, Field(discriminator="kind")]


class BlockSpec(Spec):
    """One layer: attention, then `cross`, then feed-forward, each with its residual.

    `cross` is attention whose keys and values are of the encoder's output; it has no positions.
    `norm_position`: pre, x + f(norm(x)); post, norm(x + f(x)) (2017); both,
    x + norm(f(norm(x))) (Gemma 2). `dropout` falls on each part's output.
    """

    attention: AttentionSpec | None
    feed_forward: FeedForward | None
    cross: AttentionSpec | None = None
    norm: NormSpec = RmsNorm()
    norm_position: Literal["pre", "post", "both"] = "pre"
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _not_empty(self):
        if self.attention is None and self.feed_forward is None:
            raise ValueError("a block needs attention, feed_forward, or both; found neither.")
        cross = self.cross
        if cross is not None and cross.value_embedding is not None:
            raise ValueError("cross.value_embedding: its table is of tokens that it does not read.")
        if cross is not None and cross.positions.kind != "none":
            raise ValueError(
                f"cross.positions: found {cross.positions.kind}; places of the source and of the "
                f"target are not on one line, so cross-attention has none."
            )
        if cross is not None and cross.window is not None:
            raise ValueError(
                f"cross.window: found {cross.window}; cross-attention reads the whole source."
            )
        return self

    def attentions(self) -> dict[str, AttentionSpec]:
        """The attentions that are there, by their field."""
        parts = {"attention": self.attention, "cross": self.cross}
        return {name: part for name, part in parts.items() if part is not None}


def spec_exceptions(model: "TransformerSpec") -> list[str]:
    """Options of an architecture that let training see the future, a sentence each.

    They are legal because they are named. A comparison shows them beside the model's row, and
    `assay check` prints them and holds all else to be causal.
    """
    return [
        f"{path}='weight' lets a later token push out an earlier one in training."
        for path in weight_priorities(model)
    ]


def weight_priorities(model: "TransformerSpec") -> list[str]:
    """The paths of capacity limits that give places by weight."""
    return [
        f"{name}.pattern.{i}.feed_forward.capacity.priority"
        for name, stack in (("decoder", model.decoder), ("encoder", model.encoder))
        if stack is not None and stack.causal
        for i, block in enumerate(stack.pattern)
        if block.feed_forward is not None
        and block.feed_forward.kind == "moe"
        and block.feed_forward.capacity is not None
        and block.feed_forward.capacity.priority == "weight"
    ]


def _sees_future(feed_forward: MlpSpec | MoeSpec | None) -> str | None:
    """Why a feed-forward cannot stand in a causal stack; None if it can."""
    if feed_forward is None or feed_forward.kind != "moe":
        return None
    router = feed_forward.router
    if router.kind == "expert_choice":
        return (
            "expert choice lets a later token take an earlier one's place in an expert, so a "
            "causal stack cannot have it; use a top-k router."
        )
    if router.kind == "soft" and router.over == "sequence":
        return (
            "a soft mixture over the sequence mixes later tokens into earlier ones, so a causal "
            "stack cannot have it; use over='token'."
        )
    return None


class StackSpec(Spec):
    """`num_layers` blocks; block i is `pattern[i % len(pattern)]`."""

    pattern: tuple[BlockSpec, ...]
    num_layers: Annotated[int, Field(ge=0)]
    final_norm: NormSpec | None = None
    causal: bool = True

    @model_validator(mode="after")
    def _covered(self):
        if self.num_layers and not self.pattern:
            raise ValueError("pattern: found no block for the layers; give at least one.")
        if len(self.pattern) > self.num_layers:
            raise ValueError(
                f"pattern: found {len(self.pattern)} blocks, but num_layers is "
                f"{self.num_layers}: the last ones would never be used."
            )
        for i, block in enumerate(self.pattern):
            future = _sees_future(block.feed_forward)
            if self.causal and future:
                raise ValueError(f"pattern.{i}.feed_forward.router: {future}")
        relative = {
            (block.attention.positions, block.attention.heads)
            for block in self.pattern
            if block.attention is not None and block.attention.positions.kind == "relative"
        }
        if len(relative) > 1:
            raise ValueError(
                "pattern: its relative positions or their heads differ, but a stack has one table "
                "for all its layers."
            )
        return self

    def relative(self) -> tuple[RelativeBias, int] | None:
        """The relative positions that the stack's layers share, and for how many heads."""
        for block in self.pattern:
            if block.attention is not None and block.attention.positions.kind == "relative":
                return block.attention.positions, block.attention.heads
        return None

    def blocks(self) -> tuple[BlockSpec, ...]:
        """The block of every layer, in order."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))


class Ngrams(Spec):
    """Tables of n-grams (Pagnoni et al., arXiv:2412.09871, section 3.2.1).

    For each n of `orders` a table, whose row of the last n tokens is added to a token's vector.
    It has a row for every n-gram, places before the first token included, where those are at most
    `rows`; else so many rows, over which a hash spreads the n-grams: some share one.

    `dropout` falls on whole rows, each token's and order's alone. A text that is read several
    times is else learnt by heart; so the model must do with what is before a rare n-gram.
    """

    orders: tuple[Annotated[int, Field(ge=2)], ...] = (2, 3)
    rows: PositiveInt = 16384
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _different(self):
        if not self.orders or len(set(self.orders)) < len(self.orders):
            raise ValueError(
                f"orders: found {list(self.orders)}; give one or several different lengths."
            )
        return self

    def table_rows(self, order: int, vocab_size: int) -> int:
        """Rows of the table of one order."""
        return min((vocab_size + 1) ** order, self.rows)


class EmbeddingSpec(Spec):
    """Tokens to vectors. `scale_by_sqrt_width` multiplies them by sqrt(D) (2017)."""

    positions: EmbeddingPositions = NoPositions()
    ngrams: Ngrams | None = None
    scale_by_sqrt_width: bool = False
    norm: NormSpec | None = None
    dropout: Probability = 0.0

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return self.dropout > 0 or (self.ngrams is not None and self.ngrams.dropout > 0)


class HeadSpec(Spec):
    """Vectors to logits. `tied` uses the embedding's table; `softcap` as in Gemma 2.

    `scale_by_inverse_sqrt_width` multiplies the vectors by 1/sqrt(D), as T5 does where it ties.
    """

    tied: bool = True
    scale_by_inverse_sqrt_width: bool = False
    bias: bool = False
    softcap: PositiveFloat | None = None


class MultiToken(Spec):
    """Prediction of further tokens, in training (DeepSeek-V3, arXiv:2412.19437, section 2.2).

    Of `depth` modules the k-th reads, at each place, what the one before it made (the first: the
    stack's output) beside the embedding of the token k places on; both are normed and projected
    to d_model, and pass a block like the stack's last one. The shared head makes of it logits of
    the token k + 1 places on. The objective adds `loss` times the modules' mean cross-entropy.
    Evaluation and decoding leave the modules out.
    """

    depth: PositiveInt = 1
    loss: PositiveFloat = 0.3


class Mup(Spec):
    """Maximal update parametrisation (Yang et al., arXiv:2203.03466, table 8): width transfer.

    The model is read as its base, `TransformerSpec.at_width(base_width)`, made wider: what suits
    the base (learning rates, initial deviations, multipliers) is carried over by what each
    parameter's fan-in and fan-out have grown by, and suits this width too. Where all widths are m
    times the base's: matrices begin smaller by sqrt(m); AdamW moves them by 1/m of its rate, Muon
    by its own (`train/optimizer.py`); logits are divided by m, and scores by the growth of a
    head's width, times what the base's are scaled by. At the base width nothing changes. Depth
    does not transfer.

    `embedding` multiplies what the embedding gives, `hidden` what each part of a block adds to
    the residual stream, `output` the logits: constants to be chosen at the base width.
    """

    base_width: PositiveInt
    embedding: PositiveFloat = 1.0
    hidden: PositiveFloat = 1.0
    output: PositiveFloat = 1.0


def _at_width(block: BlockSpec, width: int, d_model: int) -> BlockSpec:
    """A block of a model of `d_model`, as it is at another width."""

    def scaled(field: str, size: int) -> int:
        if size * width % d_model:
            raise ValueError(
                f"{field}: found {size}, of which {width} / {d_model} (the widths) is no whole "
                f"number."
            )
        return size * width // d_model

    def mlp(old: MlpSpec | None) -> MlpSpec | None:
        if old is None:
            return None
        hidden = tuple(scaled("hidden", f) for f in old.widths)
        return old.replace(hidden=hidden if isinstance(old.hidden, tuple) else hidden[0])

    def heads(old: AttentionSpec | None) -> AttentionSpec | None:
        if old is None or old.head_dim is None:
            return old
        kv_heads = old.kv_heads
        if kv_heads is not None and kv_heads > 1:
            kv_heads = scaled("kv_heads", kv_heads)
        return old.replace(heads=scaled("heads", old.heads), kv_heads=kv_heads)

    feed_forward = block.feed_forward
    if feed_forward is not None and feed_forward.kind == "moe":
        feed_forward = feed_forward.replace(
            expert=mlp(feed_forward.expert), shared=mlp(feed_forward.shared)
        )
    else:
        feed_forward = mlp(feed_forward)
    return block.replace(
        attention=heads(block.attention), cross=heads(block.cross), feed_forward=feed_forward
    )


class TransformerSpec(Spec):
    """A whole architecture.

    `vocab_size` counts the tokens that logits are given for; tables have it rounded up to
    `vocab_multiple`. `context` is the length it is made for: the rows of a learned position
    table, and the default length of training sequences. `head` None makes the embedding's row
    the logits (a bigram table), and `d_model` is then the vocabulary.

    With an `encoder` (a stack that is not causal), the decoder's blocks read its output by their
    `cross`. Source and target have one vocabulary, and one embedding, or the source its own
    (`source_embedding`). A model that only encodes is a `decoder` that is not causal.
    """

    vocab_size: PositiveInt
    d_model: PositiveInt
    context: PositiveInt
    decoder: StackSpec
    encoder: StackSpec | None = None
    embedding: EmbeddingSpec = EmbeddingSpec()
    source_embedding: EmbeddingSpec | None = None
    head: HeadSpec | None = HeadSpec()
    init: InitSpec = InitSpec()
    vocab_multiple: PositiveInt = 1
    multi_token: MultiToken | None = None
    mup: Mup | None = None

    @property
    def padded_vocab(self) -> int:
        """Rows of the token tables."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def with_vocab(self, vocab_size: int) -> "TransformerSpec":
        """The same architecture over another vocabulary."""
        if self.head is None:
            return self.replace(vocab_size=vocab_size, d_model=vocab_size)
        return self.replace(vocab_size=vocab_size)

    def at_width(self, width: int) -> "TransformerSpec":
        """The same architecture with another `d_model`, in the standard parametrisation.

        Hidden widths keep their ratio to it. Heads become wider where their width follows from
        d_model; where `head_dim` is given, there are more of them, and of kv heads, but for one.

        Raises:
            AssayError: if a width or a number of heads would be no whole number.
        """
        stacks = {
            name: stack
            and stack.replace(
                pattern=tuple(_at_width(block, width, self.d_model) for block in stack.pattern)
            )
            for name, stack in (("decoder", self.decoder), ("encoder", self.encoder))
        }
        return self.replace(d_model=width, mup=None, **stacks)

    def layers(self) -> Iterator[tuple[str, BlockSpec]]:
        """Every layer by its name in a checkpoint (`encoder.layers.0`), in the order of a forward.

        Those of multi-token prediction come last.
        """
        for prefix, stack in (("encoder.", self.encoder), ("", self.decoder)):
            for i, block in enumerate(stack.blocks() if stack else ()):
                yield f"{prefix}layers.{i}", block
        for i, block in enumerate(self.ahead()):
            yield f"ahead.{i}.block", block

    def ahead(self) -> tuple[BlockSpec, ...]:
        """The blocks of multi-token prediction: as the decoder's last one."""
        depth = self.multi_token.depth if self.multi_token else 0
        return self.decoder.blocks()[-1:] * depth

    def patterns(self) -> Iterator[tuple[str, BlockSpec]]:
        """Every block of the stacks' patterns, by its path: `decoder.pattern.0`."""
        for name, stack in (("decoder", self.decoder), ("encoder", self.encoder)):
            for i, block in enumerate(stack.pattern if stack else ()):
                yield f"{name}.pattern.{i}", block

    @model_validator(mode="after")
    def _fits(self):
        if self.head is None and (self.d_model != self.vocab_size or self.vocab_multiple != 1):
            raise ValueError(
                f"d_model: found {self.d_model}; without a head the embedding's row is the "
                f"logits, so d_model must be vocab_size ({self.vocab_size}) and "
                f"vocab_multiple 1."
            )
        for embedding in (self.embedding, self.source_embedding):
            if embedding and embedding.positions.kind == "sinusoidal" and self.d_model % 2:
                raise ValueError(
                    f"d_model: found {self.d_model}; sinusoidal positions need it even."
                )
        self._check_encoder()
        for where, attention in self._attentions():
            if attention.head_dim is None and self.d_model % attention.heads:
                raise ValueError(
                    f"{where}.heads: found {attention.heads}, which must divide d_model "
                    f"({self.d_model}), or head_dim must be given."
                )
            if attention.positions.kind == "rope" and attention.width(self.d_model) % 2:
                raise ValueError(
                    f"{where}.head_dim: found {attention.width(self.d_model)}; "
                    f"rotary positions need it even."
                )
            channels = attention.value_embedding and attention.value_embedding.gate_channels
            if channels and channels > self.d_model:
                raise ValueError(
                    f"{where}.value_embedding.gate_channels: found {channels}, but there are "
                    f"{self.d_model} (d_model)."
                )
        if self.multi_token is not None:
            self._check_multi_token()
        if self.mup is not None:
            self._check_mup()
        return self

    def _check_mup(self) -> None:
        if self.head is None:
            raise ValueError("mup: a table of logits has no width; the model needs a head.")
        try:
            self.at_width(self.mup.base_width)
        except (AssayError, ValueError) as error:
            raise ValueError(
                f"mup.base_width: found {self.mup.base_width}, but there is no such model: {error}"
            ) from None

    def _check_multi_token(self) -> None:
        if not self.decoder.num_layers or self.head is None:
            raise ValueError("multi_token: it needs a block to be like, and a head to share.")
        if not self.decoder.causal or self.encoder is not None:
            raise ValueError("multi_token: only a causal decoder without an encoder has it.")

    def _attentions(self) -> Iterator[tuple[str, AttentionSpec]]:
        """(path, attention) of every attention in the patterns."""
        for path, block in self.patterns():
            for part, attention in block.attentions().items():
                yield f"{path}.{part}", attention

    def _check_encoder(self) -> None:
        crossing = [i for i, block in enumerate(self.decoder.pattern) if block.cross is not None]
        if self.encoder is None:
            if crossing:
                raise ValueError(
                    f"decoder.pattern.{crossing[0]}.cross: there is no encoder for it to read; "
                    f"give one, or leave cross out."
                )
            if self.source_embedding is not None:
                raise ValueError("source_embedding: there is no encoder that would read it.")
            return
        if self.encoder.causal:
            raise ValueError(
                "encoder.causal: found true, but an encoder sees the whole source; it must be "
                "false."
            )
        if not self.decoder.causal:
            raise ValueError(
                "decoder.causal: found false; beside an encoder the decoder must be causal."
            )
        if not crossing:
            raise ValueError(
                "encoder: no block of the decoder has cross, so nothing would read it."
            )
        for i, block in enumerate(self.encoder.pattern):
            if block.cross is not None:
                raise ValueError(
                    f"encoder.pattern.{i}.cross: an encoder has nothing else to read; only blocks "
                    f"of the decoder have it."
                )
        if self.head is None:
            raise ValueError("head: found none; a model with an encoder needs one.")
