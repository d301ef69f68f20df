"""A field that changes nothing is a bug.

Each field of each spec is changed where it is active. Parameters, output, batches, updates or the
compiled program must then differ, or the change must be refused. A new field without a case fails.
"""

import functools
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.data import loader, tokenizers
from assay.errors import AssayError
from assay.model.sharding import make_mesh, parameter_shardings
from assay.model.transformer import Transformer, abstract, named_parameters
from assay.spec import model, run
from assay.spec.base import Spec
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    InitSpec,
    LayerNorm,
    MlpSpec,
    NormalInit,
    QkNorm,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import (
    AdamWSpec,
    BpeTokenizerSpec,
    ByteTokenizerSpec,
    CharTokenizerSpec,
    ComputeSpec,
    ConstantSchedule,
    CosineSchedule,
    DataSpec,
    FileTokenizerSpec,
    IdsTokenizerSpec,
    InverseSqrtSchedule,
    LinearSchedule,
    MeshSpec,
    MuonSpec,
    RunSpec,
    SgdSpec,
    SourceSpec,
    TrainSpec,
    WsdSchedule,
)
from assay.train.loop import train
from assay.train.optimizer import make_optimizer, schedule_factor
from assay.train.step import initial_state, make_step

TESTS = Path(__file__).parents[1]

# Fields of the loop: what they do shows in a run only. The file that covers each names it.
COVERED_ELSEWHERE = {
    "BudgetSpec.unit": "train/test_loop.py",
    "BudgetSpec.amount": "train/test_loop.py",
    "TrainSpec.budget": "train/test_loop.py",
    "TrainSpec.log_every": "house/test_spec_fields.py",  # below
    "TrainSpec.eval_every": "train/test_loop.py",
    "TrainSpec.checkpoint_every": "train/test_loop.py",
    "TrainSpec.target_loss": "train/test_loop.py",
    "TrainSpec.score": "train/test_loop.py",
}
# Fields that are there to be read by people, and change no computation.
LABELS = {"RunSpec.preset"}

FIELDS = [
    f"{cls.__name__}.{field}"
    for module in (model, run)
    for _, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, Spec) and cls.__module__ == module.__name__
    for field in cls.model_fields
]


# ---------------------------------------------------------------------------- what a spec decides

QUICKLY = {"xla_backend_optimization_level": 0}  # each program runs once


def of_model(spec: TransformerSpec) -> Any:
    """Parameters, and the logits of the training forward: op by op, most compiled before."""
    net = Transformer(spec, rngs=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 8)
    source = {} if spec.encoder is None else {"source": tokens[:, :7]}
    return named_parameters(net), net(tokens, key=jax.random.key(2), train=True, **source)


def of_run(spec: RunSpec) -> Any:
    """The programs of the initial state and of one update, and where parameters are placed."""
    net = abstract(spec.model, spec.compute)
    begin = jax.jit(lambda: initial_state(spec)).lower().as_text()
    state = jax.eval_shape(lambda: initial_state(spec))
    ids = jax.ShapeDtypeStruct((spec.data.batch_size, spec.data.seq_len), jnp.int32)
    batch = {"tokens": ids, "targets": ids}
    update = jax.jit(make_step(spec, net)).lower(state, batch, jnp.float32(0)).as_text()
    mesh = make_mesh(spec.mesh)
    places = None if mesh is None else str(parameter_shardings(net, mesh))
    return begin, update, places


def of_loss(spec: RunSpec) -> Any:
    """The metrics of one update."""

    @jax.jit
    def compute():
        tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 8)
        batch = {"tokens": tokens, "targets": tokens}
        step = make_step(spec, abstract(spec.model, spec.compute))
        return step(initial_state(spec), batch, jnp.float32(0))[1]

    return compute.lower().compile(QUICKLY)()


def of_optimizer(spec: Any) -> Any:
    """What three updates make of a matrix, a table and a vector."""
    kinds = {"matrix": "matrix", "table": "table", "vector": "vector"}
    shapes = {"matrix": (6, 4), "table": (5, 4), "vector": (4,)}

    def draw(seed) -> dict[str, jax.Array]:
        return {kind: jax.random.normal(jax.random.key(seed), shapes[kind]) for kind in shapes}

    @jax.jit
    def compute():
        optimizer = make_optimizer(spec, kinds)
        params = draw(0)

        def update(carry, seed):
            params, state = carry
            updates, state = optimizer.update(draw(seed), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(1, 4))[0][0]

    return compute.lower().compile(QUICKLY)()


def of_schedule(spec: Any) -> Any:
    """The factor over 300 steps, the last at the end of the budget."""
    steps = jnp.arange(300)
    return jax.vmap(lambda step: schedule_factor(spec, step, step / jnp.float32(299)))(steps)


TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def of_tokenizer(spec: Any) -> Any:
    tokenizer = tokenizers.build(spec, [TEXT])
    if isinstance(spec, IdsTokenizerSpec):  # it has no text
        return tokenizer.vocab_size
    return tokenizer.vocab_size, np.asarray(tokenizer.encode(TEXT))


def of_data(spec: DataSpec) -> Any:
    """The first training batches, and the held-out ones."""
    prepared = loader.prepare(spec)
    with loader.batches(prepared, seed=0) as batches:
        first = [next(batches) for _ in range(3)]
    return first, [*loader.evaluation_batches(prepared, spec.batch_size)]


@functools.cache
def observed(observe: Any, spec: Spec) -> Any:
    """Bases are many cases'."""
    return observe(spec)


def same(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


# ---------------------------------------------------------------------------- bases and changes


class Case(NamedTuple):
    """`base` with `path` set to `value` is another thing to `observe`, or it is refused."""

    observe: Any
    base: Spec
    path: str
    value: Any
    refused: bool = False


ATTENTION, FEED_FORWARD = "decoder.pattern.0.attention", "decoder.pattern.0.feed_forward"
POSITIONS, NORM = f"{ATTENTION}.positions", "decoder.pattern.0.norm"
WEIGHTS = "init.weights"

# Weights large enough for scores and caps to matter.
PLAIN = TransformerSpec(
    vocab_size=29,
    d_model=16,
    context=12,
    decoder=StackSpec(
        pattern=(
            BlockSpec(
                attention=AttentionSpec(heads=4, kv_heads=2),
                feed_forward=MlpSpec(hidden=24),
                norm=LayerNorm(),
            ),
        ),
        num_layers=2,
    ),
    init=InitSpec(weights=NormalInit(std=0.3), embedding=NormalInit(std=0.3)),
)
TABLE = TransformerSpec(
    vocab_size=16,
    d_model=16,
    context=12,
    decoder=StackSpec(pattern=(), num_layers=0),
    head=None,
    init=PLAIN.init,
)


def scaled(**scaling) -> TransformerSpec:
    rope = {"kind": "rope", "theta": 1000.0, "scaling": scaling}
    wide = PLAIN.at(f"{ATTENTION}.head_dim", 16)  # so many pairs that each band holds some
    return wide.at(POSITIONS, rope)


ROPE = PLAIN.at(POSITIONS, "rope")
LINEAR = scaled(kind="linear", factor=4.0)
LLAMA3 = scaled(kind="llama3", original_context=64)
YARN = scaled(kind="yarn", factor=4.0, original_context=1024)
LEARNED = PLAIN.at("embedding.positions", "learned")
SINES = PLAIN.at("embedding.positions", "sinusoidal")
RMS = PLAIN.at(NORM, "rmsnorm")
RELATIVE = PLAIN.at(POSITIONS, {"kind": "relative", "buckets": 8, "max_distance": 8})
BLOCK = PLAIN.decoder.pattern[0]
READING = PLAIN.replace(
    encoder=PLAIN.decoder.replace(causal=False),
    decoder=PLAIN.decoder.replace(pattern=(BLOCK.replace(cross=BLOCK.attention),)),
)
ALIBI = PLAIN.at(POSITIONS, "alibi")
VALUES = PLAIN.at(f"{ATTENTION}.value_embedding", {"gate_channels": 4})
MUP = PLAIN.at("mup", {"base_width": 8})
NGRAMS = PLAIN.at("embedding.ngrams", {"orders": [2], "rows": 64})
FURTHER = PLAIN.at("multi_token", {"depth": 1})
UNTIED = PLAIN.at("head.tied", False)
TRUNCATED = PLAIN.at(WEIGHTS, {"kind": "truncated_normal", "std": 0.3})
XAVIER = PLAIN.at(WEIGHTS, "xavier")
FAN_IN = PLAIN.at(WEIGHTS, "fan_in")
ZERO = PLAIN.at(WEIGHTS, "zero")
QK_NORM = PLAIN.at(f"{ATTENTION}.qk_norm", QkNorm().model_dump())
EXPERTS = PLAIN.at(
    FEED_FORWARD, {"kind": "moe", "experts": 4, "expert": {"hidden": 8}, "capacity": {"load": 0.5}}
)
ROUTER, CAPACITY = f"{FEED_FORWARD}.router", f"{FEED_FORWARD}.capacity"
NOISY = EXPERTS.at(ROUTER, "noisy_top_k")
SIGMOID = EXPERTS.at(ROUTER, "sigmoid_top_k")
UNLIMITED = EXPERTS.at(CAPACITY, None)
CHOOSING = UNLIMITED.changed({"decoder.causal": False, ROUTER: "expert_choice"})
ENCODING_SOFT = UNLIMITED.changed(
    {"decoder.causal": False, ROUTER: {"kind": "soft", "over": "sequence"}}
)
TINY = RunSpec(model=PLAIN, data=DataSpec(seq_len=8, batch_size=4))
BIGRAM = TINY.replace(model=TABLE)


def models(base: TransformerSpec, path: str, changes: dict[str, Any]) -> dict[str, Case]:
    """Cases on one base, for several fields of the spec at `path`."""
    dot = f"{path}." if path else ""
    return {field: Case(of_model, base, dot + field, value) for field, value in changes.items()}


def name_all(cls: type[Spec] | str, cases: dict[str, Case]) -> dict[str, Case]:
    return {f"{cls}.{field}": case for field, case in cases.items()}


def optimizer(spec: Spec, **changes) -> dict[str, Case]:
    kind = Case(of_run, TINY.replace(optimizer=spec), "optimizer", changes.pop("kind"))
    rest = {field: Case(of_optimizer, spec, field, value) for field, value in changes.items()}
    return name_all(type(spec).__name__, {"kind": kind} | rest)


def schedule(spec: Spec, **changes) -> dict[str, Case]:
    kind = Case(of_run, TINY.replace(schedule=spec), "schedule", changes.pop("kind"))
    rest = {field: Case(of_schedule, spec, field, value) for field, value in changes.items()}
    return name_all(type(spec).__name__, {"kind": kind} | rest)


def tokenizer(spec: Spec, kind: str, **changes) -> dict[str, Case]:
    """Where the other kind has no text to be the same of, the vocabulary tells them apart."""
    switch = Case(
        lambda data: of_tokenizer(data.tokenizer), DataSpec(tokenizer=spec), "tokenizer", kind
    )
    rest = {field: Case(of_tokenizer, spec, field, value) for field, value in changes.items()}
    return name_all(type(spec).__name__, {"kind": switch} | rest)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two corpora of several documents, and two tokenizers."""
    folder = tmp_path_factory.mktemp("fields")
    for name in ("a", "b"):
        lines = [f'{{"text": "{name} {i} {"word " * (i % 7)}"}}\n' for i in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    pairs = [f'{{"source": "{i} {"word " * (i % 4)}", "target": "{i}"}}\n' for i in range(200)]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    for name, size in (("small", 260), ("large", 280)):
        tokenizers.build(BpeTokenizerSpec(vocab_size=size), [TEXT]).save(folder / name)
    return folder


def data_cases(folder: Path) -> dict[str, Case]:
    a, b = (str(folder / f"{name}.jsonl") for name in "ab")
    both = (SourceSpec(corpus=a), SourceSpec(corpus=b))
    base = DataSpec(sources=both, seq_len=32, batch_size=4)
    paired = DataSpec(
        sources=(SourceSpec(corpus=str(folder / "pairs.jsonl")),),
        packing="pairs",
        seq_len=32,
        batch_size=4,
    )
    small, large = (str(folder / name / "tokenizer.json") for name in ("small", "large"))
    return {
        "SourceSpec.corpus": Case(of_data, base, "sources.0.corpus", b),
        "SourceSpec.weight": Case(of_data, base, "sources.0.weight", 3.0),
        "DataSpec.sources": Case(of_data, base, "sources", [{"corpus": a}]),
        "DataSpec.tokenizer": Case(of_data, base, "tokenizer", "char"),
        "DataSpec.seq_len": Case(of_data, base, "seq_len", 16),
        "DataSpec.batch_size": Case(of_data, base, "batch_size", 2),
        "DataSpec.packing": Case(of_data, base, "packing", "documents"),
        "DataSpec.source_len": Case(of_data, paired, "source_len", 12),
        "DataSpec.held_out": Case(of_data, base, "held_out", 0.3),
        "DataSpec.validation": Case(of_data, base, "validation", 0.2),
        **tokenizer(FileTokenizerSpec(path=small), "char", path=large),
    }


DATA_FIELDS = [
    *("SourceSpec.corpus", "SourceSpec.weight"),
    *(f"DataSpec.{field}" for field in DataSpec.model_fields),
    *(f"FileTokenizerSpec.{field}" for field in FileTokenizerSpec.model_fields),
]

CASES: dict[str, Case] = {
    # ---- positions
    **name_all("LinearScaling", models(LINEAR, f"{POSITIONS}.scaling", {
        "kind": "llama3", "factor": 8.0})),
    **name_all("Llama3Scaling", models(LLAMA3, f"{POSITIONS}.scaling", {
        "factor": 2.0, "low_freq_factor": 2.0, "high_freq_factor": 16.0, "original_context": 32})),
    "Llama3Scaling.kind": Case(
        of_model, LLAMA3, f"{POSITIONS}.scaling", {"kind": "linear", "factor": 8.0}),
    **name_all("YarnScaling", models(YARN, f"{POSITIONS}.scaling", {
        "kind": "llama3", "factor": 8.0, "original_context": 256, "beta_fast": 2.0,
        "beta_slow": 8.0, "attention_factor": 2.0})),
    **name_all("NoPositions", models(PLAIN, POSITIONS, {"kind": "rope"})),
    **name_all("LearnedPositions", models(LEARNED, "embedding.positions", {"kind": "none"})),
    **name_all("SinusoidalPositions", models(SINES, "embedding.positions", {
        "kind": "none", "theta": 100.0})),
    **name_all("Rope", models(ROPE, POSITIONS, {
        "kind": "none", "theta": 100.0, "scaling": {"kind": "linear", "factor": 2.0}})),
    **name_all("RelativeBias", models(RELATIVE, POSITIONS, {
        "kind": "none", "buckets": 4, "max_distance": 6})),
    **name_all("Alibi", models(ALIBI, POSITIONS, {"kind": "none"})),
    # ---- norms
    **name_all("LayerNorm", models(PLAIN, NORM, {
        "kind": "rmsnorm", "epsilon": 1e-2, "scale": False, "bias": False})),
    **name_all("RmsNorm", models(RMS, NORM, {
        "kind": "layernorm", "epsilon": 1e-2, "scale": False})),
    # ---- initialisation
    **name_all("NormalInit", models(PLAIN, WEIGHTS, {"kind": "zero", "std": 0.1})),
    **name_all("TruncatedNormalInit", models(TRUNCATED, WEIGHTS, {
        "kind": "normal", "std": 0.1, "bound": 1.0})),
    **name_all("XavierInit", models(XAVIER, WEIGHTS, {
        "kind": "normal", "distribution": "normal"})),
    **name_all("FanInInit", models(FAN_IN, WEIGHTS, {
        "kind": "normal", "gain": 2.0, "distribution": "uniform"})),
    **name_all("ZeroInit", models(ZERO, WEIGHTS, {"kind": "normal"})),
    **name_all("InitSpec", models(UNTIED, "init", {
        "weights": "fan_in", "queries": {"kind": "fan_in"}, "residual": "same",
        "embedding": "fan_in", "head": {"kind": "zero"}})),
    # ---- blocks
    **name_all("QkNorm", models(QK_NORM, f"{ATTENTION}.qk_norm", {
        "norm": "layernorm", "over": "projection"})),
    **name_all("AttentionSpec", models(PLAIN, ATTENTION, {
        "heads": 2, "kv_heads": 1, "head_dim": 8, "positions": "rope", "qkv_bias": True,
        "out_bias": True, "qk_norm": {}, "scale": 0.1, "softcap": 1.0, "window": 3,
        "gate": "head", "value_embedding": {"gate_channels": 4}, "dropout": 0.5})),
    **name_all("ValueEmbedding", models(
        VALUES, f"{ATTENTION}.value_embedding", {"gate_channels": 8})),
    **name_all("MlpSpec", models(PLAIN, FEED_FORWARD, {
        "hidden": 32, "activation": "relu", "gated": True, "bias": True})),
    "MlpSpec.kind": Case(of_model, PLAIN, f"{FEED_FORWARD}.kind", "another", refused=True),
    # ---- experts
    **name_all("TopK", models(EXPERTS, ROUTER, {
        "kind": "noisy_top_k", "k": 1, "renormalise": False, "jitter": 0.5, "bias": True})),
    **name_all("NoisyTopK", models(NOISY, ROUTER, {"kind": "top_k", "k": 1, "bias": True})),
    **name_all("SigmoidTopK", models(SIGMOID, ROUTER, {
        "kind": "top_k", "k": 1, "renormalise": False, "scale": 2.0})),
    "SigmoidTopK.bias_rate": Case(
        of_run, TINY.replace(model=SIGMOID), f"model.{ROUTER}.bias_rate", 0.1),
    **name_all("ExpertChoice", models(CHOOSING, ROUTER, {"kind": "top_k", "load": 1.0})),
    **name_all("Soft", models(ENCODING_SOFT, ROUTER, {
        "kind": "top_k", "slots": 2, "over": "token"})),
    **name_all("CapacitySpec", models(EXPERTS, CAPACITY, {"load": 0.9, "priority": "weight"})),
    **name_all("MoeSpec", models(EXPERTS, FEED_FORWARD, {
        "experts": 5, "expert": {"hidden": 9}, "router": {"kind": "top_k", "k": 1},
        "shared": {"hidden": 8}, "capacity": None})),
    "MoeSpec.kind": Case(of_model, EXPERTS, FEED_FORWARD, MlpSpec(hidden=24).model_dump()),
    "MoeSpec.balance_loss": Case(
        of_loss, TINY.replace(model=EXPERTS), f"model.{FEED_FORWARD}.balance_loss", 0.5),
    "MoeSpec.z_loss": Case(
        of_loss, TINY.replace(model=EXPERTS), f"model.{FEED_FORWARD}.z_loss", 0.5),
    **name_all("BlockSpec", models(PLAIN, "decoder.pattern.0", {
        "attention": None, "feed_forward": None, "norm": "rmsnorm", "norm_position": "post",
        "dropout": 0.5})),
    "BlockSpec.cross": Case(of_model, READING, "decoder.pattern.0.cross.heads", 2),
    # ---- the whole
    **name_all("StackSpec", models(PLAIN, "decoder", {
        "pattern": 2 * [PLAIN.decoder.pattern[0].at("norm", "rmsnorm").model_dump()],
        "num_layers": 3, "final_norm": {"kind": "rmsnorm"}, "causal": False})),
    **name_all("EmbeddingSpec", models(PLAIN, "embedding", {
        "positions": "learned", "ngrams": {"rows": 64}, "scale_by_sqrt_width": True,
        "norm": {"kind": "rmsnorm"}, "dropout": 0.5})),
    **name_all("Ngrams", models(NGRAMS, "embedding.ngrams", {
        "orders": [2, 3], "rows": 65, "dropout": 0.5})),
    **name_all("HeadSpec", models(PLAIN, "head", {
        "tied": False, "bias": True, "softcap": 1.0, "scale_by_inverse_sqrt_width": True})),
    **name_all("TransformerSpec", models(PLAIN, "", {
        "vocab_size": 31, "d_model": 32, "decoder": PLAIN.decoder.at("num_layers", 1).model_dump(),
        "embedding": EmbeddingSpec(norm=LayerNorm()).model_dump(),
        "init": InitSpec().model_dump(), "vocab_multiple": 8})),
    "TransformerSpec.encoder": Case(of_model, READING, "encoder.num_layers", 1),
    "TransformerSpec.source_embedding": Case(of_model, READING, "source_embedding", {}),
    "TransformerSpec.context": Case(of_model, LEARNED, "context", 16),
    "TransformerSpec.head": Case(of_model, TABLE, "head", HeadSpec().model_dump()),
    "TransformerSpec.multi_token": Case(of_model, PLAIN, "multi_token", {"depth": 1}),
    "MultiToken.depth": Case(of_model, FURTHER, "multi_token.depth", 2),
    "MultiToken.loss": Case(of_loss, TINY.replace(model=FURTHER), "model.multi_token.loss", 0.9),
    "TransformerSpec.mup": Case(of_model, PLAIN, "mup", {"base_width": 8}),
    **name_all("Mup", models(MUP, "mup", {
        "base_width": 4, "embedding": 2.0, "hidden": 2.0, "output": 2.0})),
    # ---- tokenizers
    **tokenizer(ByteTokenizerSpec(), "char"),
    **tokenizer(CharTokenizerSpec(), "byte"),
    **tokenizer(BpeTokenizerSpec(vocab_size=260), "byte", vocab_size=280),
    **tokenizer(IdsTokenizerSpec(vocab_size=9), "byte", vocab_size=10),
    # ---- optimizers and schedules
    **optimizer(AdamWSpec(), kind="sgd", lr=2e-3, b1=0.5, b2=0.5, epsilon=1e-2, weight_decay=0.0,
                clip=None),
    **optimizer(MuonSpec(), kind="adamw", lr=0.1, momentum=0.5, nesterov=False, ns_steps=1,
                weight_decay=0.1, adam_lr=0.1, b1=0.5, b2=0.5, epsilon=1e-2, clip=1e-9),
    **optimizer(SgdSpec(), kind="adamw", lr=0.2, momentum=0.9, weight_decay=0.1, clip=0.1),
    **schedule(ConstantSchedule(), kind="linear", warmup=10),
    **schedule(CosineSchedule(), kind="linear", warmup=10, floor=0.5),
    **schedule(LinearSchedule(), kind="cosine", warmup=10, floor=0.5),
    **schedule(WsdSchedule(), kind="linear", warmup=10, decay=0.5, floor=0.5),
    **schedule(InverseSqrtSchedule(), kind="linear", warmup=10),
    # ---- the run
    "TrainSpec.accumulate": Case(of_run, TINY, "train.accumulate", 2),
    "TrainSpec.label_smoothing": Case(of_loss, BIGRAM, "train.label_smoothing", 0.1),
    "TrainSpec.z_loss": Case(of_loss, BIGRAM, "train.z_loss", 0.1),
    "ComputeSpec.dtype": Case(of_run, TINY, "compute.dtype", "bfloat16"),
    "ComputeSpec.scan_layers": Case(of_run, TINY, "compute.scan_layers", True),
    "ComputeSpec.remat": Case(of_run, TINY, "compute.remat", "block"),
    "ComputeSpec.offload_optimizer": Case(of_run, TINY, "compute.offload_optimizer", True),
    "ComputeSpec.loss_chunk": Case(of_run, TINY, "compute.loss_chunk", 4),
    "ComputeSpec.kernels": Case(of_run, TINY, "compute.kernels", "plain"),
    "ComputeSpec.moe_dispatch": Case(
        of_run, TINY.replace(model=EXPERTS), "compute.moe_dispatch", "dense"),
    "MeshSpec.data": Case(of_run, TINY, "mesh.data", 2),
    "MeshSpec.fsdp": Case(of_run, TINY, "mesh.fsdp", 2),
    "MeshSpec.tensor": Case(of_run, TINY, "mesh.tensor", 2),
    "MeshSpec.expert": Case(of_run, TINY.replace(model=EXPERTS), "mesh.expert", 2),
    "RunSpec.model": Case(of_run, TINY, "model", TABLE.model_dump()),
    "RunSpec.data": Case(of_run, TINY, "data", DataSpec(seq_len=4, batch_size=4).model_dump()),
    "RunSpec.optimizer": Case(of_run, TINY, "optimizer", "sgd"),
    "RunSpec.schedule": Case(of_run, TINY, "schedule", "linear"),
    "RunSpec.train": Case(of_run, TINY, "train", TrainSpec(z_loss=0.1).model_dump()),
    "RunSpec.compute": Case(of_run, TINY, "compute", ComputeSpec(dtype="bfloat16").model_dump()),
    "RunSpec.mesh": Case(of_run, TINY, "mesh", MeshSpec(data=2).model_dump()),
    "RunSpec.seed": Case(of_run, TINY, "seed", 1),
}  # fmt: skip


# ---------------------------------------------------------------------------- the tests


def values(spec: Any, cls: str, field: str) -> list[Any]:
    """Every value that a field has anywhere in a spec."""
    if isinstance(spec, tuple):
        return [value for entry in spec for value in values(entry, cls, field)]
    if not isinstance(spec, Spec):
        return []
    own = [getattr(spec, field)] if type(spec).__name__ == cls else []
    parts = (getattr(spec, name) for name in type(spec).model_fields)
    return own + [value for part in parts for value in values(part, cls, field)]


@pytest.mark.parametrize("name", [f for f in FIELDS if f not in COVERED_ELSEWHERE.keys() | LABELS])
def test_every_field_changes_something(name, files):
    cases = data_cases(files) if name in DATA_FIELDS else CASES
    assert name in cases, f"{name} is a new field: give it a case here"
    case = cases[name]
    if case.refused:
        with pytest.raises(AssayError):
            case.base.at(case.path, case.value)
        return
    changed = case.base.at(case.path, case.value)
    cls, field = name.split(".")
    assert values(case.base, cls, field), "the case's base has no such field"
    assert values(case.base, cls, field) != values(changed, cls, field), "the case is another's"
    before = observed(case.observe, case.base)
    assert not same(before, case.observe(changed)), f"{name} changes nothing"


@pytest.mark.parametrize(
    ("observe", "spec"),
    [
        (of_model, PLAIN),
        (of_run, TINY),
        (of_loss, BIGRAM),
        (of_optimizer, MuonSpec()),
        (of_schedule, WsdSchedule()),
        (of_tokenizer, BpeTokenizerSpec(vocab_size=260)),
    ],
)
def test_what_did_not_change_is_the_same(observe, spec):
    """Else the test above would pass for any field."""
    assert same(observe(spec), observe(spec))


def test_data_that_did_not_change_is_the_same(files):
    spec = data_cases(files)["DataSpec.seq_len"].base
    assert same(of_data(spec), of_data(spec))


def test_metrics_are_written_every_log_every_updates(files, tmp_path):
    data = DataSpec(sources=(SourceSpec(corpus=str(files / "a.jsonl")),), seq_len=8, batch_size=4)
    spec = BIGRAM.replace(data=data).at("train.budget.amount", 5)
    for every, expected in ((2, [2, 4, 5]), (3, [3, 5])):
        out = tmp_path / str(every)
        train(spec.at("train.log_every", every), out)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "loss" in record] == expected


def test_no_case_is_left_over():
    assert {*CASES, *DATA_FIELDS, *COVERED_ELSEWHERE, *LABELS} == {*FIELDS}
    assert len(CASES) + len(DATA_FIELDS) + len(COVERED_ELSEWHERE) + len(LABELS) == len(FIELDS)


@pytest.mark.parametrize("name", COVERED_ELSEWHERE)
def test_what_is_covered_elsewhere_is(name):
    assert name.split(".")[1] in (TESTS / COVERED_ELSEWHERE[name]).read_text()
