"""The named architectures: one registry, and a variant is a small diff of another.

Each names its source. A preset is an architecture with a default run; flags win over it.
"""

import math
from dataclasses import dataclass

from assay.errors import AssayError, did_you_mean
from assay.spec.model import (
    Alibi,
    AttentionSpec,
    BlockSpec,
    CapacitySpec,
    EmbeddingSpec,
    FanInInit,
    HeadSpec,
    InitSpec,
    LayerNorm,
    LearnedPositions,
    MlpSpec,
    MoeSpec,
    Ngrams,
    NoisyTopK,
    NoPositions,
    NormalInit,
    QkNorm,
    RelativeBias,
    RmsNorm,
    Rope,
    SinusoidalPositions,
    Soft,
    StackSpec,
    TopK,
    TransformerSpec,
    ValueEmbedding,
    XavierInit,
    ZeroInit,
)
from assay.spec.run import (
    AdamWSpec,
    BpeTokenizerSpec,
    BudgetSpec,
    CharTokenizerSpec,
    ComputeSpec,
    CosineSchedule,
    DataSpec,
    InverseSqrtSchedule,
    LinearSchedule,
    MuonSpec,
    RunSpec,
    SourceSpec,
    TrainSpec,
)


@dataclass(frozen=True)
class Preset:
    """A named architecture: `family` groups the list, `source` says where it is from."""

    name: str
    family: str
    source: str
    run: RunSpec

    @property
    def model(self) -> TransformerSpec:
        return self.run.model


PRESETS: dict[str, Preset] = {}


def get(name: str) -> Preset:
    """The preset of that name.

    Raises:
        AssayError: if there is none; the nearest names are given.
    """
    if name not in PRESETS:
        raise AssayError(f"'{name}' is not a preset; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def register(
    name: str, family: str, source: str, model: TransformerSpec, run: RunSpec | None = None
) -> TransformerSpec:
    """Adds a preset; its model is returned, to be the base of the next."""
    if run is None:
        run = RunSpec(model=model, data=DataSpec(seq_len=min(model.context, 256)))
    PRESETS[name] = Preset(name, family, source, run.replace(model=model, preset=name))
    return model


def vary(model: TransformerSpec, *, block=None, stack=None, **fields) -> TransformerSpec:
    """The model with a small difference: in every decoder's `block`, its `stack`, in `fields`.

    A dict in `block` changes fields of the part that is there; anything else replaces the part.
    """

    def changed(old: BlockSpec) -> BlockSpec:
        parts = {
            name: getattr(old, name).replace(**value) if isinstance(value, dict) else value
            for name, value in (block or {}).items()
        }
        return old.replace(**parts)

    pattern = tuple(changed(old) for old in model.decoder.pattern)
    decoder = model.decoder.replace(**{"pattern": pattern} | (stack or {}))
    return model.replace(decoder=decoder, **fields)


def shrink(model: TransformerSpec) -> TransformerSpec:
    """The same architecture, small enough to run in a test. The rule:

    - kept: the pattern of blocks, norms and their places, positions and their scaling, biases,
      activations, gating, dropout, caps, initialisation, tying, causality, the encoder and what
      reads it;
    - layers, of the encoder too: at most two whole periods of the pattern, and the broken last one
      where there is one;
    - heads: at most 2 kv heads, each serving as many query heads as before (at most 8);
    - d_model: the smallest multiple of 8 features for every head that is at least 32; head_dim,
      where given, and the hidden widths keep their ratio to it;
    - experts: at most 8, or twice as many as a token chooses, which is kept; at most 4 slots of a
      soft mixture; capacity, losses and shared experts are kept;
    - channels that a gate of values reads: at most d_model; modules of multi-token prediction: all;
    - n-grams: all orders, over at most 256 rows each;
    - context: 64; windows keep their ratio to it, but are at least 4; relative positions have at
      most 8 buckets over a distance of 16, so that all of them are met;
    - muP: its multipliers, the width being the base;
    - vocabulary: 64 (61 padded to 64 where the tables are padded); without a head, d_model.

    Nothing becomes larger than it was.
    """
    stacks = [stack for stack in (model.encoder, model.decoder) if stack is not None]
    attentions = [
        attention
        for stack in stacks
        for block in stack.pattern
        for attention in block.attentions().values()
    ]

    def small_heads(attention: AttentionSpec) -> tuple[int, int]:
        kv_heads = min(attention.num_kv_heads, 2)
        return kv_heads * min(attention.heads // attention.num_kv_heads, 8), kv_heads

    unit = 8 * math.lcm(*(small_heads(attention)[0] for attention in attentions))
    width = unit * math.ceil(32 / unit)
    narrower = width < model.d_model
    ratio = width / model.d_model
    context = min(model.context, 64)

    def small_attention(old: AttentionSpec) -> AttentionSpec:
        new = old
        if old.window is not None:
            window = max(4, old.window * context // model.context)
            new = new.replace(window=min(old.window, window))
        if old.positions.kind == "relative":
            buckets = min(old.positions.buckets, 8)
            distance = min(old.positions.max_distance, 2 * buckets)
            positions = old.positions.replace(buckets=buckets, max_distance=distance)
            new = new.replace(positions=positions)
        if not narrower:
            return new
        heads, kv_heads = small_heads(old)
        new = new.replace(heads=heads, kv_heads=old.kv_heads and kv_heads)
        if old.value_embedding is not None and old.value_embedding.gate_channels:
            channels = min(old.value_embedding.gate_channels, width)
            new = new.replace(value_embedding=ValueEmbedding(gate_channels=channels))
        if old.head_dim is not None:
            exact = old.head_dim * old.heads / model.d_model * width / heads
            new = new.replace(head_dim=2 * max(1, round(exact / 2)))
        return new

    def small_mlp(old: MlpSpec) -> MlpSpec:
        if not narrower:
            return old
        small = tuple(min(f, max(8, 8 * round(f * ratio / 8))) for f in old.widths)
        return old.replace(hidden=small if isinstance(old.hidden, tuple) else small[0])

    def small_feed_forward(old: MlpSpec | MoeSpec) -> MlpSpec | MoeSpec:
        if old.kind == "mlp":
            return small_mlp(old)
        router = old.router
        if router.kind == "soft":
            router = router.replace(slots=min(router.slots, 4))
        chosen = 1 if router.kind in ("soft", "expert_choice") else router.k
        return old.replace(
            experts=min(old.experts, max(8, 2 * chosen)),
            router=router,
            expert=small_mlp(old.expert),
            shared=old.shared and small_mlp(old.shared),
        )

    def small_stack(stack: StackSpec) -> StackSpec:
        blocks = tuple(
            block.replace(
                attention=block.attention and small_attention(block.attention),
                cross=block.cross and small_attention(block.cross),
                feed_forward=block.feed_forward and small_feed_forward(block.feed_forward),
            )
            for block in stack.pattern
        )
        layers = stack.num_layers
        if blocks:
            periods, rest = divmod(layers, len(blocks))
            layers = min(periods, 2) * len(blocks) + rest
        return stack.replace(pattern=blocks, num_layers=layers)

    d_model = width if narrower else model.d_model

    def small_embedding(old: EmbeddingSpec | None) -> EmbeddingSpec | None:
        if old is None or old.ngrams is None:
            return old
        return old.replace(ngrams=old.ngrams.replace(rows=min(old.ngrams.rows, 256)))

    padded = model.padded_vocab != model.vocab_size
    vocab = d_model if model.head is None else min(model.vocab_size, 61 if padded else 64)
    return model.replace(
        vocab_size=vocab,
        vocab_multiple=min(model.vocab_multiple, 8),
        d_model=d_model,
        context=context,
        embedding=small_embedding(model.embedding),
        source_embedding=small_embedding(model.source_embedding),
        decoder=small_stack(model.decoder),
        encoder=model.encoder and small_stack(model.encoder),
        mup=model.mup and model.mup.replace(base_width=d_model),
    )


# ---------------------------------------------------------------------------- GPT-2 and its line

GPT2_PAPER = "Radford et al. 2019; counts as released"
JAXPT = "JaxPT"

gpt2 = TransformerSpec(
    vocab_size=50257,
    d_model=768,
    context=1024,
    embedding=EmbeddingSpec(positions=LearnedPositions()),
    decoder=StackSpec(
        num_layers=12,
        pattern=(
            BlockSpec(
                norm=LayerNorm(),
                attention=AttentionSpec(heads=12, qkv_bias=True, out_bias=True),
                feed_forward=MlpSpec(hidden=3072, activation="gelu_tanh", bias=True),
            ),
        ),
        final_norm=LayerNorm(),
    ),
)


def gpt2_sized(layers: int, width: int, heads: int) -> TransformerSpec:
    return vary(
        gpt2,
        d_model=width,
        stack={"num_layers": layers},
        block={"attention": {"heads": heads}, "feed_forward": {"hidden": 4 * width}},
    )


register("gpt2", "gpt2", GPT2_PAPER, gpt2)
register("gpt2-medium", "gpt2", GPT2_PAPER, gpt2_sized(24, 1024, 16))
register("gpt2-large", "gpt2", GPT2_PAPER, gpt2_sized(36, 1280, 20))
register("gpt2-xl", "gpt2", GPT2_PAPER, gpt2_sized(48, 1600, 25))
register("vgpt", "gpt2", JAXPT, gpt2)

no_positions = EmbeddingSpec(positions=NoPositions())
rope = Rope(theta=10_000.0)
swiglu = {"gated": True, "activation": "silu", "bias": False}
no_bias = {"qkv_bias": False, "out_bias": False}
biased = {"qkv_bias": True, "out_bias": True}

gpt = gpt2.replace(vocab_size=50304)
nope_gpt = vary(gpt, embedding=no_positions, block={"feed_forward": {"activation": "relu"}})
glu_gpt = vary(gpt, block={"feed_forward": swiglu})
rope_gpt = vary(gpt, embedding=no_positions, block={"attention": {"positions": rope}})
glu_rope_gpt = vary(rope_gpt, block={"feed_forward": swiglu})
gqa_gpt = vary(gpt, d_model=576, block={"attention": {"heads": 9, "kv_heads": 3, **no_bias}})
gqa_glu_rope_gpt = vary(glu_rope_gpt, block={"attention": {"kv_heads": 4, **no_bias}})

register("gpt", "jaxpt", JAXPT, gpt)
register("nope-gpt", "jaxpt", f"{JAXPT} (ReLU, as its README says)", nope_gpt)
register("glu-gpt", "jaxpt", JAXPT, glu_gpt)
register("rope-gpt", "jaxpt", JAXPT, rope_gpt)
register("glu-rope-gpt", "jaxpt", JAXPT, glu_rope_gpt)
register("gqa-gpt", "jaxpt", JAXPT, gqa_gpt)
register("gqa-glu-rope-gpt", "jaxpt", JAXPT, gqa_glu_rope_gpt)

alibi_gpt = vary(gpt, embedding=no_positions, block={"attention": {"positions": Alibi()}})
register("alibi-gpt", "gpt2", "GPT-2 with ALiBi (arXiv:2108.12409)", alibi_gpt)
register(
    "bloom-560m",
    "bloom",
    "BLOOM (arXiv:2211.05100)",
    vary(
        gpt2_sized(24, 1024, 16),
        vocab_size=250880,
        context=2048,
        embedding=EmbeddingSpec(norm=LayerNorm()),
        block={"attention": {"positions": Alibi()}},
    ),
)

# JaxPT's characters: 65, as of Shakespeare. Its mesh is --mesh data=2,tensor=4, its kernel
# compute.kernels=flash, which a TPU gets by itself.
charformer = vary(
    gpt2_sized(30, 960, 15), vocab_size=65, block={"feed_forward": {"activation": "relu"}}
)
register(
    "charformer",
    "jaxpt",
    f"{JAXPT}, with a causal mask and 1/sqrt(d)",
    charformer,
    RunSpec(
        model=charformer,
        data=DataSpec(tokenizer=CharTokenizerSpec(), seq_len=1024, batch_size=8),
        compute=ComputeSpec(dtype="bfloat16"),
    ),
)

# ---------------------------------------------------------------------------- Llama and its line

llama_3_8b = TransformerSpec(
    vocab_size=128256,
    d_model=4096,
    context=8192,
    decoder=StackSpec(
        num_layers=32,
        pattern=(
            BlockSpec(
                norm=RmsNorm(epsilon=1e-5),
                attention=AttentionSpec(heads=32, kv_heads=8, positions=Rope(theta=500_000.0)),
                feed_forward=MlpSpec(hidden=14336, activation="silu", gated=True),
            ),
        ),
        final_norm=RmsNorm(epsilon=1e-5),
    ),
    head=HeadSpec(tied=False),
)
register("llama-3-8b", "llama", "Meta Llama 3 (arXiv:2407.21783)", llama_3_8b)


def smollm(layers: int, width: int, heads: int, kv_heads: int, hidden: int) -> TransformerSpec:
    return vary(
        llama_3_8b,
        vocab_size=49152,
        d_model=width,
        context=2048,
        head=HeadSpec(tied=True),
        stack={"num_layers": layers},
        block={
            "attention": {"heads": heads, "kv_heads": kv_heads, "positions": rope},
            "feed_forward": {"hidden": hidden},
        },
    )


SMOLLM = "SmolLM (Hugging Face, 2024)"
register("smollm-135m", "llama", SMOLLM, smollm(30, 576, 9, 3, 1536))
register("smollm-360m", "llama", SMOLLM, smollm(32, 960, 15, 5, 2560))

qwen3_norm = RmsNorm(epsilon=1e-6)
qwen3_06b = vary(
    llama_3_8b,
    vocab_size=151936,
    d_model=1024,
    context=40960,
    head=HeadSpec(tied=True),
    stack={"num_layers": 28, "final_norm": qwen3_norm},
    block={
        "norm": qwen3_norm,
        "attention": {
            "heads": 16,
            "kv_heads": 8,
            "head_dim": 128,
            "positions": Rope(theta=1_000_000.0),
            "qk_norm": QkNorm(norm=qwen3_norm, over="head"),
        },
        "feed_forward": {"hidden": 3072},
    },
)
register("qwen3-0.6b", "qwen3", "Qwen3 (arXiv:2505.09388)", qwen3_06b)

# Every other layer sees a window of half the context; norms on both sides of each part.
gemma_norm = RmsNorm(epsilon=1e-6)
gemma_global = BlockSpec(
    norm=gemma_norm,
    norm_position="both",
    attention=AttentionSpec(
        heads=8, kv_heads=4, head_dim=256, scale=256**-0.5, softcap=50.0, positions=rope
    ),
    feed_forward=MlpSpec(hidden=9216, activation="gelu_tanh", gated=True),
)
gemma_local = gemma_global.replace(attention=gemma_global.attention.replace(window=4096))
register(
    "gemma-2-2b",
    "gemma",
    "Gemma 2 (arXiv:2408.00118)",
    TransformerSpec(
        vocab_size=256000,
        d_model=2304,
        context=8192,
        embedding=EmbeddingSpec(scale_by_sqrt_width=True),
        decoder=StackSpec(
            num_layers=26, pattern=(gemma_local, gemma_global), final_norm=gemma_norm
        ),
        head=HeadSpec(softcap=30.0),
    ),
)

# ---------------------------------------------------------------------------- experts

swiglu_of = {"activation": "silu", "gated": True}

tiny_moe_norm = RmsNorm(epsilon=1e-6)
tiny_moe_attention = AttentionSpec(heads=12, kv_heads=4, positions=rope)
tiny_moe_experts = MoeSpec(
    experts=8,
    expert=MlpSpec(hidden=2304, bias=True, **swiglu_of),
    router=TopK(k=2),
    capacity=CapacitySpec(load=1.1, priority="weight"),
    balance_loss=1e-2,
    z_loss=1e-3,
)


def tiny_moe_block(feed_forward: MlpSpec | MoeSpec) -> BlockSpec:
    return BlockSpec(norm=tiny_moe_norm, attention=tiny_moe_attention, feed_forward=feed_forward)


tiny_moe = TransformerSpec(
    vocab_size=50304,
    d_model=576,
    context=2048,
    decoder=StackSpec(
        num_layers=32,
        pattern=(
            tiny_moe_block(tiny_moe_experts),
            tiny_moe_block(MlpSpec(hidden=2304, **swiglu_of)),
        ),
        final_norm=tiny_moe_norm,
    ),
)
tiny_moe_2 = vary(
    tiny_moe,
    d_model=672,
    stack={
        "num_layers": 30,
        "final_norm": RmsNorm(),
        "pattern": (
            BlockSpec(
                norm=RmsNorm(),
                attention=tiny_moe_attention.replace(qk_norm=QkNorm(norm=RmsNorm())),
                feed_forward=tiny_moe_experts.replace(
                    expert=MlpSpec(hidden=2048, **swiglu_of),
                    capacity=CapacitySpec(load=1.25),
                    z_loss=1e-4,
                ),
            ),
        ),
    },
)
# The author's mixture over the sequence sees the future; over the token it cannot.
tiny_moe_3 = vary(
    tiny_moe,
    stack={
        "pattern": (
            tiny_moe_block(
                MoeSpec(
                    experts=8,
                    expert=tiny_moe_experts.expert,
                    router=Soft(slots=256, over="token"),
                )
            ),
            tiny_moe.decoder.pattern[1],
        )
    },
)


def tiny_moe_run(model: TransformerSpec) -> RunSpec:
    return RunSpec(model=model, data=DataSpec(seq_len=256), compute=ComputeSpec(dtype="bfloat16"))


register("tiny-moe", "jaxpt", JAXPT, tiny_moe, tiny_moe_run(tiny_moe))
register("tiny-moe-2", "jaxpt", JAXPT, tiny_moe_2, tiny_moe_run(tiny_moe_2))
register(
    "tiny-moe-3",
    "jaxpt",
    f"{JAXPT}, its soft mixture over the token instead of the sequence",
    tiny_moe_3,
    tiny_moe_run(tiny_moe_3),
)


def with_experts(model: TransformerSpec, experts: MoeSpec, **changes) -> TransformerSpec:
    """The model with experts in the place of every feed-forward."""
    block = {"feed_forward": experts} | changes.pop("block", {})
    return vary(model, block=block, **changes)


register(
    "mixtral-8x7b",
    "mixtral",
    "Mixtral (arXiv:2401.04088)",
    with_experts(
        llama_3_8b,
        MoeSpec(
            experts=8,
            expert=MlpSpec(hidden=14336, **swiglu_of),
            router=TopK(k=2),
            balance_loss=0.02,
        ),
        vocab_size=32000,
        context=32768,
        block={"attention": {"positions": Rope(theta=1_000_000.0)}},
    ),
)
register(
    "olmoe-1b-7b",
    "olmoe",
    "OLMoE (arXiv:2409.02060)",
    with_experts(
        llama_3_8b,
        MoeSpec(
            experts=64,
            expert=MlpSpec(hidden=1024, **swiglu_of),
            router=TopK(k=8, renormalise=False),
            balance_loss=0.01,
            z_loss=0.001,
        ),
        vocab_size=50304,
        d_model=2048,
        context=4096,
        stack={"num_layers": 16},
        block={
            "attention": {
                "heads": 16,
                "kv_heads": 16,
                "positions": rope,
                "qk_norm": QkNorm(norm=RmsNorm(), over="projection"),
            }
        },
    ),
)
register(
    "qwen3-30b-a3b",
    "qwen3",
    "Qwen3 (arXiv:2505.09388)",
    with_experts(
        qwen3_06b,
        MoeSpec(
            experts=128,
            expert=MlpSpec(hidden=768, **swiglu_of),
            router=TopK(k=8),
            balance_loss=0.001,
        ),
        d_model=2048,
        head=HeadSpec(tied=False),
        stack={"num_layers": 48},
        block={"attention": {"heads": 32, "kv_heads": 4}},
    ),
)

# ---------------------------------------------------------------------------- encoder-decoders


def with_encoder(decoder: TransformerSpec, **fields) -> TransformerSpec:
    """The decoder reads an encoder of as many blocks like its own, after each attention."""

    def reading(block: BlockSpec) -> BlockSpec:
        return block.replace(cross=block.attention.replace(positions=NoPositions()))

    stack = decoder.decoder
    return decoder.replace(
        encoder=stack.replace(causal=False),
        decoder=stack.replace(pattern=tuple(map(reading, stack.pattern))),
        **fields,
    )


def pairs_run(model: TransformerSpec, **options) -> RunSpec:
    data = DataSpec(
        sources=(SourceSpec(corpus="reverse-pairs"),), packing="pairs", seq_len=64, batch_size=32
    )
    return RunSpec(model=model, data=data, **options)


# The paper's text: no bias in attention, biases in the feed-forward; its schedule and smoothing.
paper_block = BlockSpec(
    norm=LayerNorm(epsilon=1e-6),
    norm_position="post",
    attention=AttentionSpec(heads=8),
    feed_forward=MlpSpec(hidden=2048, activation="relu", bias=True),
    dropout=0.1,
)
paper_embedding = EmbeddingSpec(
    positions=SinusoidalPositions(), scale_by_sqrt_width=True, dropout=0.1
)
xavier = InitSpec(weights=XavierInit(), residual="same", embedding=NormalInit(std=512**-0.5))
transformer_base = with_encoder(
    TransformerSpec(
        vocab_size=37000,
        d_model=512,
        context=512,
        embedding=paper_embedding,
        decoder=StackSpec(num_layers=6, pattern=(paper_block,)),
        init=xavier,
    )
)
paper_training = {
    "optimizer": AdamWSpec(
        lr=(512 * 4000) ** -0.5, b2=0.98, epsilon=1e-9, weight_decay=0.0, clip=None
    ),
    "schedule": InverseSqrtSchedule(warmup=4000),
    "train": TrainSpec(label_smoothing=0.1),
}
register(
    "transformer-base",
    "transformer",
    "Vaswani et al. (arXiv:1706.03762)",
    transformer_base,
    pairs_run(transformer_base, **paper_training),
)

JAXFORMERS = "jaxformers, its attention with weights"
jaxformers_lm = TransformerSpec(
    vocab_size=10000,
    d_model=512,
    context=512,
    embedding=EmbeddingSpec(positions=LearnedPositions(), scale_by_sqrt_width=True, dropout=0.1),
    decoder=StackSpec(
        num_layers=6,
        pattern=(paper_block.replace(attention=AttentionSpec(heads=8, **biased)),),
    ),
    head=HeadSpec(tied=False, bias=True),
    init=xavier,
)
jaxformers = with_encoder(
    jaxformers_lm, embedding=paper_embedding, source_embedding=paper_embedding
)
register("jaxformers", "transformer", JAXFORMERS, jaxformers, pairs_run(jaxformers))
register("jaxformers-lm", "transformer", f"{JAXFORMERS}; decoder only", jaxformers_lm)

t5_norm = RmsNorm(epsilon=1e-6)
t5_small = with_encoder(
    TransformerSpec(
        vocab_size=32128,
        d_model=512,
        context=512,
        embedding=EmbeddingSpec(dropout=0.1),
        decoder=StackSpec(
            num_layers=6,
            pattern=(
                BlockSpec(
                    norm=t5_norm,
                    attention=AttentionSpec(
                        heads=8, head_dim=64, scale=1.0, positions=RelativeBias(), dropout=0.1
                    ),
                    feed_forward=MlpSpec(hidden=2048, activation="relu"),
                    dropout=0.1,
                ),
            ),
            final_norm=t5_norm,
        ),
        head=HeadSpec(scale_by_inverse_sqrt_width=True),
        init=InitSpec(
            weights=FanInInit(),
            queries=FanInInit(gain=64**-0.5),
            residual="same",
            embedding=NormalInit(std=1.0),
        ),
    )
)
register("t5-small", "t5", "T5 (arXiv:1910.10683)", t5_small, pairs_run(t5_small))

# ---------------------------------------------------------------------------- small ones to train

register(
    "mqa",
    "small",
    "Jax Transformer (multi-query)",
    TransformerSpec(
        vocab_size=257,
        d_model=64,
        context=256,
        embedding=EmbeddingSpec(positions=LearnedPositions()),
        decoder=StackSpec(
            num_layers=6,
            pattern=(
                BlockSpec(
                    norm=LayerNorm(),
                    attention=AttentionSpec(heads=8, kv_heads=1),
                    feed_forward=MlpSpec(hidden=256, activation="relu"),
                ),
            ),
            final_norm=LayerNorm(),
        ),
    ),
)

bigram = TransformerSpec(
    vocab_size=257,
    d_model=257,
    context=256,
    decoder=StackSpec(pattern=(), num_layers=0),
    head=None,
    init=InitSpec(embedding=ZeroInit()),
)
register(
    "bigram",
    "small",
    f"{JAXPT}: a table of V x V",
    bigram,
    RunSpec(
        model=bigram,
        data=DataSpec(seq_len=256, batch_size=32),
        optimizer=AdamWSpec(lr=0.1, weight_decay=0.0, clip=None),
    ),
)

# nanoGPT's recipes leave out biases and dropout on a CPU; a table of 65 characters.
NANOGPT = "nanoGPT (Karpathy)"


def nanogpt_sized(layers: int, width: int, heads: int, context: int) -> TransformerSpec:
    norm = LayerNorm(bias=False)
    return vary(
        gpt2,
        vocab_size=65,
        d_model=width,
        context=context,
        stack={"num_layers": layers, "final_norm": norm},
        block={
            "norm": norm,
            "attention": {"heads": heads, **no_bias},
            "feed_forward": {"hidden": 4 * width, "bias": False, "activation": "gelu"},
        },
    )


def nanogpt_run(model: TransformerSpec, batch_size: int, steps: int) -> RunSpec:
    return RunSpec(
        model=model,
        data=DataSpec(tokenizer=CharTokenizerSpec(), seq_len=model.context, batch_size=batch_size),
        optimizer=AdamWSpec(lr=1e-3, b2=0.99),
        schedule=CosineSchedule(warmup=100),
        train=TrainSpec(budget=BudgetSpec(amount=steps)),
    )


tiny_gpt = nanogpt_sized(4, 128, 4, 64)
register("tiny-gpt", "small", f"{NANOGPT}, CPU recipe", tiny_gpt, nanogpt_run(tiny_gpt, 12, 2000))
baby_gpt = nanogpt_sized(6, 384, 6, 256)
register("baby-gpt", "small", f"{NANOGPT}, GPU recipe", baby_gpt, nanogpt_run(baby_gpt, 64, 5000))

# Llama's blocks at that size, for longer rows.
baby_llama = vary(
    llama_3_8b,
    vocab_size=65,
    d_model=384,
    context=1024,
    head=HeadSpec(tied=True),
    stack={"num_layers": 6},
    block={
        "attention": {"heads": 6, "kv_heads": 2, "positions": rope},
        "feed_forward": {"hidden": 1152},
    },
)
register(
    "baby-llama",
    "small",
    "Llama 3's blocks at baby-gpt's size",
    baby_llama,
    nanogpt_run(baby_llama, 16, 5000),
)

# baby-gpt with 8 experts, of which a token meets as much as it did of the MLP.
baby_moe = with_experts(
    baby_gpt,
    MoeSpec(
        experts=8,
        expert=MlpSpec(hidden=768, activation="gelu"),
        router=TopK(k=2),
        balance_loss=1e-2,
    ),
)
register("baby-moe", "small", "baby-gpt with 8 experts", baby_moe, nanogpt_run(baby_moe, 64, 5000))

# makeMoE and AttentionNet read Shakespeare by the character: 65 of them.
make_moe_norm = LayerNorm()
make_moe = TransformerSpec(
    vocab_size=65,
    d_model=128,
    context=64,
    embedding=EmbeddingSpec(positions=LearnedPositions()),
    decoder=StackSpec(
        num_layers=4,
        pattern=(
            BlockSpec(
                norm=make_moe_norm,
                attention=AttentionSpec(heads=8, out_bias=True, dropout=0.1),
                feed_forward=MoeSpec(
                    experts=8,
                    expert=MlpSpec(hidden=512, activation="relu", bias=True),
                    router=NoisyTopK(k=2, bias=True),
                ),
                dropout=0.1,
            ),
        ),
        final_norm=make_moe_norm,
    ),
    head=HeadSpec(tied=False, bias=True),
)
register("make-moe", "small", "makeMoE-JAX", make_moe, nanogpt_run(make_moe, 16, 2000))

ATTENTION_NET = "JAX-AttentionNet, with a causal mask"
attention_net = vary(
    gpt2,
    vocab_size=65,
    d_model=256,
    context=64,
    stack={"num_layers": 4},
    block={
        "attention": {"heads": 8},
        "feed_forward": {"hidden": (512, 1024), "activation": "gelu"},
    },
)
attention_net_plain = vary(attention_net, block={"feed_forward": {"hidden": 1024}})
attention_net_moe = with_experts(
    attention_net,
    MoeSpec(
        experts=4,
        expert=MlpSpec(hidden=1024, bias=True),
        router=TopK(k=2, bias=True),
        balance_loss=1e-2,
    ),
)
for name, model, what in (
    ("attention-net", attention_net, "3-layer feed-forward"),
    ("attention-net-plain", attention_net_plain, "2-layer feed-forward"),
    ("attention-net-moe", attention_net_moe, "4 experts"),
):
    register(name, "small", f"{ATTENTION_NET}: {what}", model, nanogpt_run(model, 16, 2000))

# Assay's own: what is known to train fast today, small enough for two cores. The demo's corpus is
# half a megabyte, read several times over: dropout, a small vocabulary and decay keep it honest.
nano = TransformerSpec(
    vocab_size=1024,
    d_model=256,
    context=256,
    embedding=EmbeddingSpec(dropout=0.1),
    decoder=StackSpec(
        num_layers=4,
        pattern=(
            BlockSpec(
                norm=RmsNorm(),
                attention=AttentionSpec(heads=4, kv_heads=2, positions=rope, qk_norm=QkNorm()),
                feed_forward=MlpSpec(hidden=1024, activation="relu_squared"),
                dropout=0.1,
            ),
        ),
        final_norm=RmsNorm(),
    ),
    init=InitSpec(residual="zero"),
)
register(
    "nano",
    "small",
    "Assay's demo",
    nano,
    RunSpec(
        model=nano,
        data=DataSpec(tokenizer=BpeTokenizerSpec(vocab_size=1024), seq_len=256, batch_size=8),
        optimizer=AdamWSpec(lr=3e-3),
        schedule=LinearSchedule(warmup=50),
        train=TrainSpec(budget=BudgetSpec(unit="seconds", amount=100)),
        compute=ComputeSpec(dtype="bfloat16"),
    ),
)
nano_char = vary(
    nano,
    vocab_size=65,
    d_model=128,
    context=64,
    embedding=EmbeddingSpec(ngrams=Ngrams(rows=8192)),
    stack={"num_layers": 1},
    block={"attention": {"kv_heads": None}, "feed_forward": {"hidden": 512}, "dropout": 0.0},
)
# Its like with an encoder, for tasks of a minute.
nano_seq2seq = with_encoder(
    vary(
        nano,
        vocab_size=257,
        d_model=128,
        context=64,
        embedding=EmbeddingSpec(dropout=0.0),
        stack={"num_layers": 2},
        block={"attention": {"kv_heads": None}, "feed_forward": {"hidden": 512}, "dropout": 0.0},
    )
)
register(
    "nano-seq2seq",
    "small",
    "Assay's own, an encoder-decoder",
    nano_seq2seq,
    RunSpec(
        model=nano_seq2seq,
        data=DataSpec(
            sources=(SourceSpec(corpus="reverse-pairs"),),
            packing="pairs",
            seq_len=16,
            batch_size=64,
        ),
        optimizer=MuonSpec(),
        schedule=LinearSchedule(warmup=20),
        train=TrainSpec(budget=BudgetSpec(amount=500)),
    ),
)

register(
    "nano-char",
    "small",
    "Assay's time-to-quality record",
    nano_char,
    RunSpec(
        model=nano_char,
        data=DataSpec(tokenizer=CharTokenizerSpec(), seq_len=64, batch_size=16),
        optimizer=MuonSpec(lr=0.03, adam_lr=0.02, ns_steps=3),
        schedule=LinearSchedule(warmup=0),
        train=TrainSpec(budget=BudgetSpec(amount=180), eval_every=180),
        compute=ComputeSpec(dtype="bfloat16"),
    ),
)

# The long record: nanoGPT's 1.4697, on two cores.
small_char = vary(
    nano,
    vocab_size=65,
    embedding=EmbeddingSpec(
        ngrams=Ngrams(orders=(2, 3, 4, 5), rows=32768, dropout=0.4), dropout=0.1
    ),
    block={"attention": {"kv_heads": None}},
)
register(
    "small-char",
    "small",
    "Assay's long time-to-quality record",
    small_char,
    RunSpec(
        model=small_char,
        data=DataSpec(tokenizer=CharTokenizerSpec(), seq_len=256, batch_size=16),
        optimizer=MuonSpec(lr=0.02, adam_lr=5e-3, weight_decay=0.1),
        schedule=LinearSchedule(warmup=20),
        train=TrainSpec(budget=BudgetSpec(amount=1200), eval_every=1200),
        compute=ComputeSpec(dtype="bfloat16"),
    ),
)
