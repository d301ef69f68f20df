"""What a run IS: data, optimizer, schedule, budget, and how the arithmetic is carried out."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from assay.spec.base import Spec, differences
from assay.spec.model import TransformerSpec

Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# ---------------------------------------------------------------------------- data


class ByteTokenizerSpec(Spec):
    """UTF-8 bytes, and one id that ends a document: 257 tokens."""

    kind: Literal["byte"] = "byte"


class CharTokenizerSpec(Spec):
    """One token a character of the training text, one for unseen ones, one document end."""

    kind: Literal["char"] = "char"


class BpeTokenizerSpec(Spec):
    """Byte-level BPE, trained on the training part of the corpus."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257)] = 4096


class FileTokenizerSpec(Spec):
    """A Hugging Face `tokenizer.json`, or a folder that holds one."""

    kind: Literal["file"] = "file"
    path: str


class IdsTokenizerSpec(Spec):
    """Only a vocabulary's size: for token shards whose tokenizer is not at hand."""

    kind: Literal["ids"] = "ids"
    vocab_size: PositiveInt = 50257


TokenizerSpec = Annotated[
    ByteTokenizerSpec | CharTokenizerSpec | BpeTokenizerSpec | FileTokenizerSpec | IdsTokenizerSpec,
    Field(discriminator="kind"),
]


class SourceSpec(Spec):
    """A corpus (a name or a path) and its share of the training tokens, relative to the others."""

    corpus: str
    weight: PositiveFloat = 1.0


class DataSpec(Spec):
    """Text to batches.

    `packing`: stream cuts windows of `seq_len` from the documents laid end to end; documents
    packs whole documents into rows and lets none see another; pairs has a source and a target in
    each row, for models with an encoder. `batch_size` is the global number of sequences an update.
    `source_len` is the room for a source (None: `seq_len`, which is then a target's); longer pairs
    are left out of training. `held_out` is the last part of each corpus, cut before any shuffling.
    `validation` is the last share of what is left, cut likewise: text to choose settings by, so
    that the held-out text is not chosen by.
    """

    sources: tuple[SourceSpec, ...] = (SourceSpec(corpus="python-docs"),)
    tokenizer: TokenizerSpec = ByteTokenizerSpec()
    seq_len: PositiveInt = 256
    batch_size: PositiveInt = 16
    source_len: PositiveInt | None = None
    packing: Literal["stream", "documents", "pairs"] = "stream"
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _some(self):
        if not self.sources:
            raise ValueError("sources: found none; name at least one corpus.")
        if self.source_len is not None and self.packing != "pairs":
            raise ValueError(
                f"source_len: found {self.source_len}, but only pairs have a source; packing is "
                f"{self.packing}."
            )
        return self

    @property
    def room_for_source(self) -> int | None:
        """Tokens a source, where there is one."""
        return (self.source_len or self.seq_len) if self.packing == "pairs" else None


# ---------------------------------------------------------------------------- optimizer


class AdamWSpec(Spec):
    """Loshchilov and Hutter (arXiv:1711.05101). Weight decay falls on matrices only."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat | None = 1.0


class MuonSpec(Spec):
    """Muon for the blocks' matrices, AdamW at `adam_lr` for tables, vectors and the head.

    `nesterov` is of both, as in Optax. Weight decay falls on the matrices.

    Source: Jordan et al. (2024), kellerjordan.github.io/posts/muon.
    """

    kind: Literal["muon"] = "muon"
    lr: PositiveFloat = 0.02
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: PositiveInt = 5
    weight_decay: NonNegativeFloat = 0.0
    adam_lr: PositiveFloat = 3e-3
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    clip: PositiveFloat | None = 1.0


class SgdSpec(Spec):
    """Stochastic gradient descent, with momentum where it is over 0."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    momentum: Fraction = 0.0
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat | None = None


OptimizerSpec = Annotated[AdamWSpec | MuonSpec | SgdSpec, Field(discriminator="kind")]


# A schedule gives the factor on the learning rate, of the step and of the share of the budget
# spent. Warm-up is in steps; what follows is in shares of the budget, so that a budget of seconds
# decays to its end as one of steps does.


class ConstantSchedule(Spec):
    """1 after the warm-up."""

    kind: Literal["constant"] = "constant"
    warmup: NonNegativeInt = 0


class CosineSchedule(Spec):
    """From 1 down to `floor` along half a cosine."""

    kind: Literal["cosine"] = "cosine"
    warmup: NonNegativeInt = 20
    floor: Fraction = 0.1


class LinearSchedule(Spec):
    """From 1 down to `floor` along a line."""

    kind: Literal["linear"] = "linear"
    warmup: NonNegativeInt = 20
    floor: Fraction = 0.0


class WsdSchedule(Spec):
    """Warm-up, stable, decay (Hu et al., arXiv:2404.06395): 1, then linear to `floor`.

    `decay` is the last share of the budget.
    """

    kind: Literal["wsd"] = "wsd"
    warmup: NonNegativeInt = 20
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    floor: Fraction = 0.0


class InverseSqrtSchedule(Spec):
    """sqrt(warmup / step) after the warm-up (Vaswani et al., arXiv:1706.03762)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: PositiveInt = 100


ScheduleSpec = Annotated[
    ConstantSchedule | CosineSchedule | LinearSchedule | WsdSchedule | InverseSqrtSchedule,
    Field(discriminator="kind"),
]


# ---------------------------------------------------------------------------- training


class BudgetSpec(Spec):
    """How long to train. Steps are optimizer updates; seconds do not count compilation."""

    unit: Literal["steps", "tokens", "flops", "seconds"] = "steps"
    amount: PositiveFloat = 1000


class TrainSpec(Spec):
    """The loop. `accumulate` splits a batch into so many parts, one gradient step in all.

    `score` is the text that a run is scored on, along the way and at its end; validation leaves
    the held-out text unseen.
    """

    budget: BudgetSpec = BudgetSpec()
    accumulate: PositiveInt = 1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    z_loss: NonNegativeFloat = 0.0
    log_every: Annotated[int, Field(ge=1, le=10)] = 10
    eval_every: PositiveInt | None = None
    checkpoint_every: PositiveInt | None = None
    target_loss: PositiveFloat | None = None
    score: Literal["held_out", "validation"] = "held_out"


class ComputeSpec(Spec):
    """How the arithmetic is done; never part of the architecture or of a checkpoint.

    Parameters are float32 always; `dtype` is that of the products and the residual stream.
    `scan_layers` compiles one period of the stack instead of every layer. `remat` says what the
    backward pass computes again: block, all but each block's input; weights, all but products
    with weights (attention, activations and norms); dots, all but any product; offload, as
    weights, with the products kept in the host's memory. `offload_optimizer` keeps the
    optimizer's statistics there. `loss_chunk` is of how many tokens (of a device) logits stand at
    a time; 0 is all, and by default it is what fits where all would be large. `kernels`: auto
    picks the fast form for the device that JAX runs on; plain is autodiff of the plain formula;
    cpu is what suits XLA's CPU backend, without the BLAS that auto takes there (`model/blas.py`).
    `moe_dispatch` is how tokens get to their experts (`model/moe.py`); auto is ragged, or blocks
    where XLA's CPU backend computes it.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    remat: Literal["none", "block", "weights", "dots", "offload"] = "none"
    offload_optimizer: bool = False
    loss_chunk: NonNegativeInt | None = None
    kernels: Literal["auto", "plain", "cpu", "flash"] = "auto"
    moe_dispatch: Literal["auto", "dense", "ragged", "blocks", "capacity"] = "auto"


class MeshSpec(Spec):
    """Devices along each axis; 1 everywhere is one device.

    data: each has a part of the batch. fsdp: that, and a part of every matrix along d_model.
    tensor: each has some heads, hidden features and rows of the vocabulary. expert: each has a
    part of the batch, and some experts.
    """

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1
    expert: PositiveInt = 1

    @property
    def devices(self) -> int:
        return self.batch_shards * self.tensor

    @property
    def batch_shards(self) -> int:
        """How many parts the batch is in."""
        return self.data * self.fsdp * self.expert

    def check(self, model: TransformerSpec) -> None:
        """Raises ValueError, with what does not divide, where the model cannot lie on this mesh.

        A vocabulary that does not divide is legal: its tables are kept whole along `tensor`. So
        are heads that do not, if at most an eighth of them must be added to fill the devices.
        """

        def divides(axis: str, size: int, where: str) -> None:
            ways = getattr(self, axis)
            if size % ways:
                raise ValueError(f"mesh: {axis}={ways} does not divide {where} ({size}).")

        divides("fsdp", model.d_model, "model.d_model")
        experts = False
        for where, block in model.patterns():
            where, feed_forward = f"model.{where}", block.feed_forward
            for part, attention in block.attentions().items():
                heads, kv_heads = attention.heads, attention.num_kv_heads
                at = f"{where}.{part}"
                width = attention.width(model.d_model)
                if kv_heads < heads or -heads % self.tensor > heads // 8:
                    divides("tensor", kv_heads, f"{at}.{'kv_' * (kv_heads < heads)}heads")
                divides("tensor", heads * width, f"{at}.heads x head_dim")
            if feed_forward is None:
                continue
            moe = feed_forward.kind == "moe"
            experts |= moe
            if moe:
                divides("expert", feed_forward.experts, f"{where}.feed_forward.experts")
                parts = {"expert": feed_forward.expert, "shared": feed_forward.shared}
            else:
                parts = {"": feed_forward}
            for part, mlp in parts.items():
                for hidden in mlp.widths if mlp else ():
                    at = ".".join(filter(None, (where, "feed_forward", part, "hidden")))
                    divides("tensor", hidden, at)
        if self.expert > 1 and not experts:
            raise ValueError(f"mesh: expert={self.expert}, but the model has no experts.")


RESUMABLE = ("compute", "mesh", "train.checkpoint_every", "train.eval_every", "train.log_every")
"""What may differ when a run goes on: none of it changes what is computed, but for rounding."""


def resumable(path: str) -> bool:
    return any(path == of or path.startswith(f"{of}.") for of in RESUMABLE)


class RunSpec(Spec):
    """Everything that decides what a run computes. `run.json` holds it."""

    model: TransformerSpec
    preset: str | None = None
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = AdamWSpec()
    schedule: ScheduleSpec = CosineSchedule()
    train: TrainSpec = TrainSpec()
    compute: ComputeSpec = ComputeSpec()
    mesh: MeshSpec = MeshSpec()
    seed: Seed = 0

    def other_than(self, begun: "RunSpec") -> list[tuple[str, Any, Any]]:
        """(dotted path, there, here) of what a run that was begun cannot go on as this one.

        `begun` has its tokenizer's vocabulary, which is this one's then, whatever it says.
        """
        run = self.replace(model=self.model.with_vocab(begun.model.vocab_size))
        found = differences(begun, run)
        return [each for each in found if each[0] != "preset" and not resumable(each[0])]

    @model_validator(mode="after")
    def _fits(self):
        batch, parts = self.data.batch_size, self.train.accumulate
        if batch % parts:
            raise ValueError(
                f"train.accumulate: found {parts}, which must divide data.batch_size ({batch})."
            )
        shards = self.mesh.batch_shards
        if (batch // parts) % shards:
            raise ValueError(
                f"mesh: data x fsdp x expert is {shards}, which must divide the "
                f"{batch // parts} sequences of one pass (data.batch_size / train.accumulate)."
            )
        if self.train.score == "validation" and not self.data.validation:
            raise ValueError(
                "train.score: found 'validation', but data.validation is 0: there is no such text."
            )
        self.mesh.check(self.model)
        if self.model.mup is not None and self.optimizer.kind == "sgd":
            raise ValueError(
                "optimizer.kind: found sgd, but model.mup carries over the rates of adamw and muon."
            )
        pairs = self.data.packing == "pairs"
        if pairs and self.model.encoder is None:
            raise ValueError(
                "data.packing: found pairs, but the model has no encoder to read a source."
            )
        if self.model.encoder is not None and not pairs:
            raise ValueError(
                f"data.packing: found {self.data.packing}, but a model with an encoder is trained "
                f"on pairs."
            )
        own = self.model.source_embedding or self.model.embedding
        lengths = {"seq_len": (self.model.embedding, self.data.seq_len)}
        if pairs:
            lengths["source_len"] = own, self.data.room_for_source
        for field, (embedding, length) in lengths.items():
            if embedding.positions.kind == "learned" and length > self.model.context:
                raise ValueError(
                    f"data.{field}: found {length}, but the learned positions end at "
                    f"model.context ({self.model.context})."
                )
        return self
