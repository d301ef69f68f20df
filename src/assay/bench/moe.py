"""What experts cost: a training step beside that of a dense model of equal active size.

The same step is also timed with every expert on every token, which is what a dispatch saves.
Ratios are of one run, turn by turn.
"""

from dataclasses import dataclass
from importlib import metadata

import jax
import numpy as np

from assay.bench.timing import Spread, seconds
from assay.bench.train import jax_step, torch_step
from assay.errors import AssayError, did_you_mean
from assay.spec.model import BlockSpec, MlpSpec, MoeSpec, TransformerSpec
from assay.spec.run import RunSpec


@dataclass(frozen=True)
class MoeComparison:
    """Tokens a second of `ours` and of what it is compared with, by name.

    `dense` is the dense twin, `every_expert` the same experts with dense dispatch, `torch` a loop
    over the experts in PyTorch. A ratio is of our speed to the other's, round by round: over 1 says
    that ours is faster.
    """

    speeds: dict[str, Spread]
    ratios: dict[str, Spread]
    losses: dict[str, float]
    versions: dict[str, str]


def bench_moe(run: RunSpec, *, against: str | None = None, rounds: int = 5) -> MoeComparison:
    """Times whole updates (forward, backward, optimizer) on random tokens, in turns.

    Raises:
        AssayError: if the model has no experts, no dense model is of its active size, or `against`
            is not known or not installed, or cannot express the model.
    """
    if against not in (None, "torch"):
        raise AssayError(f"--against {against}: {did_you_mean(against, ['torch'])}")
    rng = np.random.default_rng(0)
    shape = (run.data.batch_size, run.data.seq_len)
    batch = {
        name: rng.integers(run.model.vocab_size, size=shape, dtype=np.int32)
        for name in ("tokens", "targets")
    }
    runs = {
        "ours": run,
        "dense": run.replace(model=dense_twin(run.model)),
        "every_expert": run.at("compute.moe_dispatch", "dense"),
    }
    steps = {name: jax_step(each, batch) for name, each in runs.items()}
    versions = {"jax": jax.__version__}
    if against:
        steps["torch"] = torch_step(run, batch)
        versions["torch"] = metadata.version("torch")
    losses = {name: step() for name, step in steps.items()}
    # So many steps a turn that a turn of the fastest takes about a second.
    count = max(1, round(1.0 / max(seconds(steps["dense"], 1), 1e-3)))
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            speeds[name].append(count * batch["tokens"].size / seconds(step, count))

    def over(other: str) -> Spread:
        return Spread.of([a / b for a, b in zip(speeds["ours"], speeds[other], strict=True)])

    return MoeComparison(
        {name: Spread.of(values) for name, values in speeds.items()},
        {name: over(name) for name in speeds if name != "ours"},
        losses,
        versions,
    )


def dense_twin(model: TransformerSpec) -> TransformerSpec:
    """The model with an MLP for every layer of experts, as wide as what one token meets.

    Raises:
        AssayError: if there are no experts, or theirs and a shared MLP are of different kinds.
    """

    def dense(i: int, block: BlockSpec) -> BlockSpec:
        experts = block.feed_forward
        if experts is None or experts.kind != "moe":
            return block
        return block.replace(feed_forward=_of_active_size(experts, f"decoder.pattern.{i}"))

    pattern = tuple(dense(i, block) for i, block in enumerate(model.decoder.pattern))
    if pattern == model.decoder.pattern:
        raise AssayError("decoder.pattern: found no experts; bench moe needs a model with some.")
    return model.replace(decoder=model.decoder.replace(pattern=pattern))


def _of_active_size(experts: MoeSpec, where: str) -> MlpSpec:
    mlp, shared = experts.expert, experts.shared
    hidden = [round(experts.active_experts * width) for width in mlp.widths]
    if shared is not None:
        if shared.replace(hidden=mlp.hidden) != mlp or len(shared.widths) > 1:
            raise AssayError(
                f"{where}.feed_forward.shared: another kind of MLP than the experts; no single "
                f"dense MLP is of their active size."
            )
        hidden[0] += shared.widths[0]
    if len(hidden) > 1:
        raise AssayError(
            f"{where}.feed_forward.expert.hidden: found {len(hidden)} widths; a dense MLP of "
            f"equal active size needs experts of one."
        )
    return mlp.replace(hidden=hidden[0])
