"""Training speeds that others measured and published, which the planner is held to.

Each row says where it is from. `leave_one_out` predicts every row with an efficiency calibrated
on the other rows of the same chip, so that no constant is fitted to the row that it predicts.
"""

import math
from dataclasses import dataclass, replace
from statistics import median

from assay.plan.roofline import predict
from assay.plan.topology import CHIPS, Topology, parse_topology
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    CapacitySpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNorm,
    LearnedPositions,
    MlpSpec,
    MoeSpec,
    RmsNorm,
    Rope,
    StackSpec,
    TopK,
    TransformerSpec,
)
from assay.spec.run import ComputeSpec, DataSpec, MeshSpec, RunSpec, TrainSpec

MAXTEXT = "MaxText, docs/reference/models/tiering.md"
MAXTEXT_V5P = "MaxText, configs/v5p/README.md and its scripts"
MAXTEXT_V4 = "MaxText, configs/v4/README.md and its scripts"
MAXTEXT_V5E = "MaxText, configs/v5e/README.md and its scripts"
RECIPES = "AI-Hypercomputer/tpu-recipes, training/trillium"
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "torchtitan, docs/performance.md (2024)"
FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md"
NANOGPT = "nanoGPT, README.md"
FORGE = "KempnerForge, benchmarks/mfu_scaling (2026-04-05)"
GPU_RECIPES = "AI-Hypercomputer/gpu-recipes, training/a3ultra"
GPU_RECIPES_B200 = "AI-Hypercomputer/gpu-recipes, training/a4/custom/qwen2-5-7b (logs of 2025)"


@dataclass(frozen=True)
class Row:
    """One published run: `tokens` a second and device. `recompute` as in `plan/work.py`.

    `island`: how many devices its machines joined, where that is not the chip's usual number.
    """

    name: str
    model: TransformerSpec
    topology: str
    mesh: MeshSpec
    batch: float  # sequences a device and pass
    seq_len: int
    recompute: str
    tokens: float
    source: str
    accumulate: int = 1
    fused: bool = True
    flash: bool = True
    island: int | None = None

    @property
    def run(self) -> RunSpec:
        devices = self.mesh.devices
        return RunSpec(
            model=self.model,
            data=DataSpec(
                batch_size=round(self.batch * devices * self.accumulate), seq_len=self.seq_len
            ),
            train=TrainSpec(accumulate=self.accumulate),
            compute=ComputeSpec(dtype="bfloat16"),
            mesh=self.mesh,
        )

    @property
    def where(self) -> Topology:
        topology = parse_topology(self.topology)
        if self.island is None:
            return topology
        return replace(topology, chip=replace(topology.chip, island=self.island))


def llama(
    layers, d, heads, kv, hidden, vocab, context, *, experts: int = 0, load: float = 1.25
) -> TransformerSpec:
    """A Llama-shaped decoder, with top-2 experts in place of its feed-forward where asked."""
    feed_forward = MlpSpec(hidden=hidden, activation="silu", gated=True)
    if experts:
        feed_forward = MoeSpec(
            experts=experts, expert=feed_forward, router=TopK(k=2), capacity=CapacitySpec(load=load)
        )
    block = BlockSpec(
        attention=AttentionSpec(heads=heads, kv_heads=kv, head_dim=128, positions=Rope()),
        feed_forward=feed_forward,
    )
    return TransformerSpec(
        vocab_size=vocab,
        d_model=d,
        context=context,
        decoder=StackSpec(pattern=(block,), num_layers=layers, final_norm=RmsNorm()),
        head=HeadSpec(tied=False),
    )


def plain(layers, d, heads, hidden) -> TransformerSpec:
    """MaxText's first models: heads of 256, no gate in the feed-forward, as their sizes say."""
    block = BlockSpec(
        attention=AttentionSpec(heads=heads, head_dim=256, positions=Rope()),
        feed_forward=MlpSpec(hidden=hidden, activation="relu"),
    )
    return TransformerSpec(
        vocab_size=32000,
        d_model=d,
        context=2048,
        decoder=StackSpec(pattern=(block,), num_layers=layers, final_norm=RmsNorm()),
        head=HeadSpec(tied=False),
    )


def gpt(layers, d, heads, context, vocab=50304) -> TransformerSpec:
    """A GPT-2- or MPT-shaped decoder: plain feed-forward of 4 d, tied head."""
    block = BlockSpec(
        attention=AttentionSpec(heads=heads),
        feed_forward=MlpSpec(hidden=4 * d, activation="gelu"),
        norm=LayerNorm(bias=False),
    )
    return TransformerSpec(
        vocab_size=vocab,
        d_model=d,
        context=context,
        decoder=StackSpec(pattern=(block,), num_layers=layers, final_norm=LayerNorm(bias=False)),
        embedding=EmbeddingSpec(positions=LearnedPositions()),
    )


LLAMA_2_70B = llama(80, 8192, 64, 8, 28672, 32000, 4096)
LLAMA_3_8B = llama(32, 4096, 32, 8, 14336, 128256, 8192)
LLAMA_3_70B = llama(80, 8192, 64, 8, 28672, 128256, 8192)
MISTRAL_7B = llama(32, 4096, 32, 8, 14336, 32000, 8192)
MIXTRAL = llama(32, 4096, 32, 8, 14336, 32000, 4096, experts=8)
MIXTRAL_NEMO = llama(32, 4096, 32, 8, 14336, 50304, 4096, experts=8, load=1.0)
QWEN_2_5_7B = llama(28, 3584, 28, 4, 18944, 152064, 4096)
FORGE_13B = llama(40, 5120, 40, 8, 17920, 128256, 4096)
# MaxText's own sizes ("global_parameter_scale"), by its rule for widths and depth.
SCALE_16 = llama(32, 4096, 64, 64, 28672, 32000, 2048)
SCALE_32 = llama(32, 8192, 64, 64, 28672, 32000, 2048)
SCALE_64 = llama(64, 8192, 64, 64, 28672, 32000, 2048)
SCALE_128 = llama(64, 8192, 128, 128, 57344, 32000, 2048)
PLAIN_22 = plain(48, 6144, 24, 24576)
PLAIN_52 = plain(32, 12288, 32, 49152)

MPT = {  # layers, d, heads
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
}


def maxtext_tokens(model: TransformerSpec, seq_len: int, tflops: float) -> float:
    """Tokens a second of MaxText's TFLOP/s a chip, by its formula of that time.

    6 FLOPs a parameter of products (the head's, not the embedding's), and 12 a layer, head
    feature and token of the sequence.
    """
    from assay.spec.accounting import flops_per_token

    return tflops * 1e12 / flops_per_token(model, seq_len).train


def _scale(name, model, topology, tensor, batch, recompute, tflops, source) -> Row:
    devices = parse_topology(topology).devices
    mesh = MeshSpec(fsdp=devices // tensor, tensor=tensor)
    speed = maxtext_tokens(model, 2048, tflops)
    return Row(name, model, topology, mesh, batch, 2048, recompute, speed, source)


def _foundry(size, gpu, devices, seq_len, batch, accumulate, remat, tokens) -> Row:
    return Row(
        name=f"MPT {size}, T {seq_len}",
        model=gpt(*MPT[size], context=seq_len),
        topology=f"{gpu}:{devices}",
        mesh=MeshSpec(fsdp=devices),
        batch=batch,
        seq_len=seq_len,
        recompute="block" if remat else "none",
        tokens=tokens,
        source=FOUNDRY,
        accumulate=accumulate,
        fused=False,
    )


def _forge(name, model, mesh, batch, accumulate, tokens, *, fused=True) -> Row:
    """Machines of four; `tokens` of all devices together."""
    return Row(
        *(name, model, f"h200:{mesh.devices}", mesh, batch, 4096, "block"),
        *(tokens / mesh.devices, FORGE),
        accumulate=accumulate,
        fused=fused,
        island=4,
    )


V6E_POD, FSDP_256, FSDP_64 = "v6e:16x16", MeshSpec(fsdp=256), MeshSpec(fsdp=64)

ROWS = (
    # ---- TPU v4
    _scale("22B", PLAIN_22, "v4:4x4x4", 1, 13, "block", 156, MAXTEXT_V4),
    _scale("52B", PLAIN_52, "v4:4x4x12", 1, 7, "block", 154, MAXTEXT_V4),
    # ---- TPU v5p
    Row("Llama 2 70B", LLAMA_2_70B, "v5p:8x8x8", MeshSpec(fsdp=512), 4, 4096, "mlp", 692, MAXTEXT),
    Row("Mixtral 8x7B", MIXTRAL, "v5p:4x8x8", MeshSpec(fsdp=256), 8, 4096, "mlp", 2909, MAXTEXT),
    _scale("32B", SCALE_32, "v5p-128", 4, 7, "dots", 328, MAXTEXT_V5P),
    _scale("64B", SCALE_64, "v5p-128", 4, 3, "dots", 323, MAXTEXT_V5P),
    _scale("128B", SCALE_128, "v5p-256", 8, 1, "dots", 315, MAXTEXT_V5P),
    # ---- TPU v5e
    _scale("16B", SCALE_16, "v5e:16x16", 1, 6, "block", 120, MAXTEXT_V5E),
    _scale("32B", SCALE_32, "v5e:16x16", 1, 4, "block", 132, MAXTEXT_V5E),
    # ---- TPU v6e
    Row("Llama 3.1 8B", LLAMA_3_8B, V6E_POD, FSDP_256, 4, 8192, "mlp", 7207, MAXTEXT),
    Row("Llama 3.1 70B", LLAMA_3_70B, V6E_POD, FSDP_256, 5, 8192, "mlp", 960, MAXTEXT),
    Row("Mixtral 8x7B", MIXTRAL, V6E_POD, FSDP_256, 12, 4096, "mlp", 3899, MAXTEXT),
    Row("Llama 2 70B", LLAMA_2_70B, V6E_POD, FSDP_256, 2, 4096, "mlp", 900, MAXTEXT),
    Row("Llama 3.1 8B", LLAMA_3_8B, "v6e:2x4", MeshSpec(fsdp=8), 3, 8192, "mlp", 7139, RECIPES),
    Row("Llama 3.1 70B", LLAMA_3_70B, "v6e:8x8", MeshSpec(fsdp=64), 2, 8192, "mlp", 877, RECIPES),
    Row("Mistral 7B", MISTRAL_7B, "v6e:2x4", MeshSpec(fsdp=8), 6, 8192, "mlp", 7777, RECIPES),
    # ---- H100
    Row("Llama 3.1 8B", LLAMA_3_8B, "h100:8", MeshSpec(fsdp=8), 2, 8192, "mlp", 6667, TITAN),
    Row("Llama 3.1 8B", LLAMA_3_8B, "h100:128", MeshSpec(fsdp=128), 2, 8192, "mlp", 6514, TITAN),
    _foundry("760m", "h100", 8, 2048, 24, 2, False, 63147),
    _foundry("1b", "h100", 8, 2048, 14, 1, False, 45455),
    _foundry("3b", "h100", 16, 2048, 10, 3, False, 24142),
    _foundry("7b", "h100", 8, 2048, 6, 1, False, 10643),
    _foundry("7b", "h100", 8, 8192, 8, 2, True, 6935),
    _foundry("13b", "h100", 8, 4096, 10, 3, True, 4717),
    _foundry("13b", "h100", 64, 2048, 2, 1, False, 4800),
    _foundry("30b", "h100", 32, 2048, 14, 3, True, 2308),
    # ---- H200
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(), 2, 4, 10471),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=2), 2, 4, 18728),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=4), 4, 2, 38983),
    _forge("Llama 3 13B", FORGE_13B, MeshSpec(fsdp=8), 4, 4, 35405, fused=False),
    Row(
        *("Llama 3.1 70B", LLAMA_3_70B, "h200:256", MeshSpec(data=2, fsdp=128)),
        *(2, 8192, "mlp", 1055.949, GPU_RECIPES),
    ),
    Row(
        *("Mixtral 8x7B", MIXTRAL_NEMO, "h200:256", MeshSpec(data=32, expert=8)),
        *(2, 4096, "none", 1024 * 4096 / 2.7396 / 256, GPU_RECIPES),
        accumulate=2,
    ),
    # ---- B200
    Row(
        *("Qwen2.5 7B", QWEN_2_5_7B, "b200:8", MeshSpec(data=8)),
        *(4, 4096, "none", 512 * 4096 / 11.11 / 8, GPU_RECIPES_B200),
        accumulate=16,
    ),
    Row(
        *("Qwen2.5 7B", QWEN_2_5_7B, "b200:16", MeshSpec(data=16)),
        *(4, 4096, "none", 512 * 4096 / 7.05 / 16, GPU_RECIPES_B200),
        accumulate=8,
    ),
    # ---- A100
    Row(
        "GPT-2 124M",
        gpt(12, 768, 12, 1024),
        "a100-40gb:8",
        MeshSpec(data=8),
        12,
        1024,
        "none",
        491520 / (4 * 86400 / 600000) / 8,
        NANOGPT,
        accumulate=5,
        flash=False,
    ),
    Row("Llama 3 8B", LLAMA_3_8B, "a100:64", FSDP_64, 1, 8192, "mlp", 2904, TITAN_A100),
    Row("Llama 3 70B", LLAMA_3_70B, "a100:64", FSDP_64, 1, 8192, "block", 331, TITAN_A100),
    _foundry("125m", "a100", 8, 2048, 32, 2, False, 141737),
    _foundry("350m", "a100", 8, 2048, 32, 2, False, 58782),
    _foundry("760m", "a100", 8, 2048, 24, 2, False, 32434),
    _foundry("1b", "a100", 8, 2048, 14, 4, False, 20513),
    _foundry("3b", "a100", 8, 2048, 10, 2, False, 10811),
    _foundry("7b", "a100", 8, 2048, 6, 2, False, 4641),
    _foundry("7b", "a100", 8, 8192, 8, 2, True, 3206),
    _foundry("13b", "a100", 8, 2048, 2, 3, False, 2262),
    _foundry("13b", "a100", 8, 4096, 10, 3, True, 2060),
    _foundry("30b", "a100", 8, 2048, 3, 21, True, 916),
)


def predicted(row: Row, efficiency: float) -> float:
    """Tokens a second and device, at a given efficiency of the chip's products."""
    speed = predict(
        row.run, row.where, row.recompute, fused=row.fused, flash=row.flash, efficiency=efficiency
    )
    return speed.tokens_per_second / row.mesh.devices


def calibrate(rows: list[Row]) -> float:
    """The efficiency at which the median of predicted over published is 1, by bisection."""
    low, high = 0.05, 1.5
    for _ in range(40):
        middle = math.sqrt(low * high)
        ratio = median(predicted(row, middle) / row.tokens for row in rows)
        low, high = (middle, high) if ratio < 1 else (low, middle)
    return math.sqrt(low * high)


def family(row: Row) -> str:
    """Rows of one chip, whatever its memory."""
    return row.where.chip.name.removesuffix("-40gb")


def leave_one_out() -> list[tuple[Row, float, float]]:
    """(row, efficiency from the other rows of its chip, predicted tokens a second and device)."""
    results = []
    for row in ROWS:
        others = [other for other in ROWS if family(other) == family(row) and other is not row]
        efficiency = calibrate(others)
        results.append((row, efficiency, predicted(row, efficiency)))
    return results


def efficiencies() -> dict[str, float]:
    """Each chip's efficiency from all of its rows."""
    return {
        name: calibrate([row for row in ROWS if family(row) == name])
        for name in CHIPS
        if any(family(row) == name for row in ROWS)
    }
