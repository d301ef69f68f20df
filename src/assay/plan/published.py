"""Training speeds that others measured and published, which the planner is held to.

Each row says where it is from. `leave_one_out` predicts every row with an efficiency calibrated
on the other rows of the same chip, so that no constant is fitted to the row that it predicts.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median, quantiles

from assay.plan.published_mpt import RUNS
from assay.plan.roofline import step_time
from assay.plan.topology import CHIPS, Topology, parse_topology
from assay.plan.work import ASSAY, System, Work, step_work
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
BRIDGE = "Megatron Bridge, docs/performance-summary-archive.md"
FORGE = "KempnerForge, benchmarks/mfu_scaling (2026-04-05)"
GPU_RECIPES = "AI-Hypercomputer/gpu-recipes, training/a3ultra"
GPU_RECIPES_B200 = "AI-Hypercomputer/gpu-recipes, training/a4/custom/qwen2-5-7b (logs of 2025)"
TITAN_TP = "torchtitan, benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
TEST_HOSTS = "KempnerForge, benchmarks/config_validation"

# ---- what the systems are documented to do

FIRST_FLASH = 0.32
"""FlashAttention before its second version, of an A100's peak: 30 to 50 % forward, 25 to 35 %
backward (Dao, arXiv:2307.08691), which is 2.5 times the work. llm-foundry's (`triton`) was such."""

NOT_FOR_HOPPER = 0.62
"""What a kernel without Hopper's own instructions gets of its peak (Luo, arXiv:2402.13499)."""

TORCH = System(sums="float32")  # FSDP2: MixedPrecisionPolicy(reduce_dtype=float32)
TORCH_EAGER = replace(TORCH, fused=False)
TORCH_TENSOR = replace(TORCH, in_parts=True)
TORCH_ASYNC = replace(TORCH_TENSOR, pieces=True)  # async TP: products in pieces
FORGE_SYSTEM = replace(TORCH_TENSOR, gathers_each=True, whole_logits=True, sums_once=True)
MEGATRON = System(zero1=True, exact=True)
# GPT-OSS has biases, for which `bias_dropout_fusion` is off and those of experts added one by one.
MEGATRON_BIASES = replace(MEGATRON, fused=False)

# ---- machines that are not the chip's usual ones

FOUR = {"island": 4, "switch": False}  # HGX with four GPUs: each pair has a third of the links
# "HBM2e ... 2.4 TB/sec", 500 W: its peak "between SXM and NVL", 989 and 835 TFLOP/s; their mean.
GRAND_TETON = {"bandwidth": 2.4e12, "peak": 912e12}


@dataclass(frozen=True)
class Row:
    """One published run: `tokens` a second and device. `recompute` as in `plan/work.py`.

    `chip`: what its machines had other than the chip's usual.
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
    system: System = ASSAY
    chip: dict[str, float] = field(default_factory=dict)

    @cached_property
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

    @cached_property
    def where(self) -> Topology:
        topology = parse_topology(self.topology)
        return replace(topology, chip=replace(topology.chip, **self.chip))

    @cached_property
    def work(self) -> Work:
        return step_work(self.run, self.recompute, self.system)

    @cached_property
    def own_efficiency(self) -> float:
        """At which it would be predicted exactly, by bisection."""
        low, high = 0.05, 1.5
        for _ in range(30):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if predicted(self, middle) < self.tokens else (low, middle)
        return math.sqrt(low * high)


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


def gpt_oss(layers: int, experts: int) -> TransformerSpec:
    """GPT-OSS: every other layer sees 128 keys; 4 of many small experts a token."""
    expert = MlpSpec(hidden=2880, activation="silu", gated=True)
    experts_of = MoeSpec(experts=experts, expert=expert, router=TopK(k=4))
    blocks = tuple(
        BlockSpec(
            attention=AttentionSpec(
                heads=64, kv_heads=8, head_dim=64, positions=Rope(), window=window
            ),
            feed_forward=experts_of,
        )
        for window in (128, None)
    )
    return TransformerSpec(
        vocab_size=201088,
        d_model=2880,
        context=131072,
        decoder=StackSpec(pattern=blocks, num_layers=layers, final_norm=RmsNorm()),
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
GPT_OSS_120B = gpt_oss(36, 128)
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
    "70b": (80, 8192, 64),
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


def _foundry(line: str) -> Row:
    """Gradients are summed in bfloat16 where the table says PURE, in float32 where it says DEFAULT.

    Its parameters are gathered as Composer does unless told otherwise, after a layer is done; the
    runs of 128 H100 and more were told otherwise (sweep.py), and two sizes to keep them.
    """
    gpu, size, seq_len, devices, batch, passes, recompute, tokens = line.split()
    pure = gpu == "a100-40gb" or (gpu, size) == ("a100", "70b")
    large = gpu == "h100" and int(devices) >= 128
    kept = large and size in ("1b", "3b")  # SHARD_GRAD_OP
    return Row(
        name=f"MPT {size}",
        model=gpt(*MPT[size], context=int(seq_len)),
        topology=f"{gpu}:{devices}",
        mesh=MeshSpec(fsdp=int(devices)),
        batch=int(batch),
        seq_len=int(seq_len),
        recompute=recompute,
        tokens=float(tokens),
        source=FOUNDRY,
        accumulate=int(passes),
        system=System(
            fused=False,
            attention=FIRST_FLASH * (NOT_FOR_HOPPER if gpu == "h100" else 1),
            sums=None if pure else "float32",
            back=None if kept else "gather" if large else "late",
        ),
    )


def _forge(
    name, model, mesh, batch, accumulate, tokens, *, fused=True, seq_len=4096, source=FORGE
) -> Row:
    """Machines of four; `batch` of a device with its own tokens, `tokens` of all together."""
    return Row(
        *(name, model, f"h200:{mesh.devices}", mesh, batch / mesh.tensor, seq_len, "block"),
        *(tokens / mesh.devices, source),
        accumulate=accumulate,
        system=replace(FORGE_SYSTEM, fused=fused),
        chip=FOUR,
    )


def _titan(name, model, mesh, batch, recompute, tokens, source, system=TORCH) -> Row:
    return Row(
        *(name, model, f"h100:{mesh.devices}", mesh, batch / mesh.tensor, 8192, recompute),
        *(tokens, source),
        system=system,
        chip=GRAND_TETON,
    )


V6E_POD, FSDP_256, FSDP_64 = "v6e:16x16", MeshSpec(fsdp=256), MeshSpec(fsdp=64)
FSDP_8, FSDP_128 = MeshSpec(fsdp=8), MeshSpec(fsdp=128)
TENSOR_8, TENSOR_32 = MeshSpec(fsdp=8, tensor=8), MeshSpec(fsdp=32, tensor=8)

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
    _titan("Llama 3.1 8B", LLAMA_3_8B, FSDP_8, 2, "mlp", 6667, TITAN),
    _titan("Llama 3.1 8B, eager", LLAMA_3_8B, FSDP_8, 2, "mlp", 5762, TITAN, TORCH_EAGER),
    _titan("Llama 3.1 8B", LLAMA_3_8B, FSDP_128, 2, "mlp", 6514, TITAN),
    _titan("Llama 3.1 8B, eager", LLAMA_3_8B, FSDP_128, 2, "mlp", 5605, TITAN, TORCH_EAGER),
    _titan("Llama 3.1 8B", LLAMA_3_8B, TENSOR_8, 12, "mlp", 4378, TITAN_TP, TORCH_TENSOR),
    _titan("Llama 3.1 8B, async", LLAMA_3_8B, TENSOR_8, 12, "mlp", 4809.4, TITAN_TP, TORCH_ASYNC),
    _titan("Llama 3.1 70B", LLAMA_3_70B, TENSOR_32, 16, "block", 597.3, TITAN_TP, TORCH_TENSOR),
    _titan(
        "Llama 3.1 70B, async", LLAMA_3_70B, TENSOR_32, 16, "block", 652.4, TITAN_TP, TORCH_ASYNC
    ),
    # ---- H200
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(), 2, 4, 10471),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=2), 2, 4, 18728),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=4), 4, 2, 38983),
    _forge("Llama 3 13B", FORGE_13B, MeshSpec(fsdp=8), 4, 4, 35405, fused=False),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=4), 8, 4, 38858, source=TEST_HOSTS),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=32), 4, 4, 297384, source=TEST_HOSTS),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(tensor=2), 4, 2, 13163),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(tensor=4), 4, 2, 25135),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=2, tensor=2), 4, 2, 25980),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=2, tensor=4), 4, 2, 44299),
    _forge("Llama 3 13B", FORGE_13B, MeshSpec(fsdp=2, tensor=4), 4, 4, 27345),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=4, tensor=4), 4, 2, 82988),
    _forge("Llama 3 13B", FORGE_13B, MeshSpec(fsdp=4, tensor=4), 4, 4, 53814),
    _forge("Llama 3 8B", LLAMA_3_8B, MeshSpec(fsdp=8, tensor=4), 4, 2, 155917),
    _forge("Llama 3 13B", FORGE_13B, MeshSpec(fsdp=8, tensor=4), 4, 4, 104309),
    _forge("Llama 3.1 70B", LLAMA_3_70B, MeshSpec(fsdp=8, tensor=4), 2, 4, 17657),
    Row(
        *("Llama 3.1 70B", LLAMA_3_70B, "h200:256", MeshSpec(data=2, fsdp=128)),
        *(2, 8192, "mlp", 1055.949, GPU_RECIPES),
    ),
    Row(
        *("Mixtral 8x7B", MIXTRAL_NEMO, "h200:256", MeshSpec(data=32, expert=8)),
        *(2, 4096, "none", 1024 * 4096 / 2.7396 / 256, GPU_RECIPES),
        accumulate=2,
        system=MEGATRON,
    ),
    # ---- B200
    Row(
        *("Qwen2.5 7B", QWEN_2_5_7B, "b200:8", MeshSpec(data=8)),
        *(4, 4096, "none", 512 * 4096 / 11.11 / 8, GPU_RECIPES_B200),
        accumulate=16,
        system=MEGATRON,
    ),
    Row(
        *("Qwen2.5 7B", QWEN_2_5_7B, "b200:16", MeshSpec(data=16)),
        *(4, 4096, "none", 512 * 4096 / 5.62 / 16, GPU_RECIPES_B200),
        accumulate=8,
        system=MEGATRON,
    ),
    Row(
        *("GPT-OSS 120B", GPT_OSS_120B, "b200:64", MeshSpec(data=8, expert=8)),
        *(4, 4096, "elementwise", 13722, BRIDGE),
        accumulate=5,
        system=MEGATRON_BIASES,
    ),
    Row(
        *("GPT-OSS 120B", GPT_OSS_120B, "b200:64", MeshSpec(expert=64)),
        *(4, 4096, "elementwise", 8047, BRIDGE),
        accumulate=5,
        system=MEGATRON_BIASES,
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
        system=System(flash=False, sums="float32"),
    ),
    Row(
        "Llama 3 8B", LLAMA_3_8B, "a100:64", FSDP_64, 1, 8192, "mlp", 2904, TITAN_A100, system=TORCH
    ),
    Row(
        "Llama 3 70B",
        LLAMA_3_70B,
        "a100:64",
        FSDP_64,
        1,
        8192,
        "block",
        331,
        TITAN_A100,
        system=TORCH,
    ),
    # ---- A100 and H100, all that one source has
    *(_foundry(line) for line in RUNS.split("\n") if line and line[0] != "#"),
)


def predicted(row: Row, efficiency: float) -> float:
    """Tokens a second and device, at a given efficiency of the chip's products."""
    seconds = step_time(row.work, row.run, row.where, row.system, efficiency).total
    return row.run.data.batch_size * row.seq_len / seconds / row.mesh.devices


def calibrate(rows: list[Row]) -> float:
    """The median of the efficiencies at which each row would be predicted exactly."""
    return median(row.own_efficiency for row in rows)


MISSED = {("MPT 30b", "a100:8", 8192), ("MPT 70b", "a100-40gb:64", 2048)}
"""(name, machine, length) of rows off by over 30 %; `docs/planner.md` says what is known."""


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


def nine_in_ten(*, tpu: bool) -> tuple[float, float]:
    """The shares of what is predicted between which one more run would lie, nine times in ten.

    The 5th and 95th percentile of a population of which the rows are a sample.
    """
    cuts = quantiles(
        (row.tokens / speed for row, _, speed in leave_one_out() if row.where.is_tpu == tpu), n=20
    )
    return cuts[0], cuts[-1]


def efficiencies() -> dict[str, float]:
    """Each chip's efficiency from all of its rows."""
    return {
        name: calibrate([row for row in ROWS if family(row) == name])
        for name in CHIPS
        if any(family(row) == name for row in ROWS)
    }
