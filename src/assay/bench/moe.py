"""What experts cost: a training step beside that of a dense model of equal active size.

The same step is also timed with every expert on every token, which is what a dispatch saves; and
one layer alone beside the same layer written plainly. Ratios are of one run, turn by turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from assay.bench.timing import Spread, seconds
from assay.bench.train import jax_step, torch_step
from assay.errors import AssayError, did_you_mean
from assay.model.layers import ACTIVATIONS, along_last
from assay.model.moe import Moe
from assay.spec.model import BlockSpec, MlpSpec, MoeSpec, NormalInit, TransformerSpec
from assay.spec.run import RunSpec


@dataclass(frozen=True)
class MoeComparison:
    """Tokens a second of `ours` and of what it is compared with, by name.

    `dense` is the dense twin, `every_expert` the same experts with dense dispatch, `torch` a loop
    over the experts in PyTorch. A ratio is of our speed to the other's, round by round: over 1 says
    that ours is faster. `layer` is one layer of experts, forward and backward, and `plain_layer`
    the same one as `plain_layer` below writes it (where it can): their ratio is between the two.
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
    layers = layer_steps(run)
    losses = {name: step() for name, step in steps.items()}
    for step in layers.values():
        step()
    steps |= layers
    # So many steps a turn that a turn of the fastest takes about a second.
    count = max(1, round(1.0 / max(seconds(steps["dense"], 1), 1e-3)))
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            speeds[name].append(count * batch["tokens"].size / seconds(step, count))

    def over(other: str) -> Spread:
        ours = speeds["layer" if other == "plain_layer" else "ours"]
        return Spread.of([a / b for a, b in zip(ours, speeds[other], strict=True)])

    return MoeComparison(
        {name: Spread.of(values) for name, values in speeds.items()},
        {name: over(name) for name in speeds if name not in ("ours", "layer")},
        losses,
        versions,
    )


def layer_steps(run: RunSpec) -> dict[str, Callable[[], Array]]:
    """Forward and backward of its first layer of experts, ours and plain; perhaps neither."""
    spec = next(
        block.feed_forward
        for block in run.model.decoder.pattern
        if block.feed_forward is not None and block.feed_forward.kind == "moe"
    )
    router = spec.router
    shares = router.kind == "noisy_top_k" or (router.kind == "top_k" and router.renormalise)
    if not shares or spec.shared is not None or len(spec.expert.widths) > 1:
        return {}
    init = {"init": NormalInit(), "residual_init": NormalInit(), "residual_scale": 1.0}
    layer = Moe(jax.random.key(0), run.model.d_model, spec, **init, compute=run.compute)
    shape = (run.data.batch_size, run.data.seq_len, run.model.d_model)
    x = jax.random.normal(jax.random.key(1), shape).astype(run.compute.dtype)

    def step(forward):
        def loss(layer, x):
            return jnp.sum(jnp.square(forward(layer, x).astype(jnp.float32)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(layer, x).compile()
        return lambda: jax.block_until_ready(compiled(layer, x))

    return {
        "layer": step(lambda layer, x: layer(x)[0]),
        "plain_layer": step(plain_layer),
    }


def plain_layer(layer: Moe, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """As one first writes it, left to autodiff: every expert on every token, one after another.

    Each output is weighted by the softmax over the token's k largest scores, which is 0 for most.
    """
    router, experts = layer.router, layer.experts

    def linear(x, part, e):
        y = x @ part.w[...][e].astype(x.dtype)
        return y if part.b is None else y + along_last(part.b[...][e].astype(x.dtype), y)

    scores = router.logits(x, None)
    least = jax.lax.top_k(scores, layer.spec.router.k)[0][..., -1:]
    gates = jax.nn.softmax(jnp.where(scores < least, -jnp.inf, scores)).astype(x.dtype)
    activation, y = ACTIVATIONS[experts.activation], jnp.zeros_like(x)
    for e in range(layer.spec.experts):
        hidden = linear(x, experts.up[0], e)
        if experts.gate is None:
            hidden = activation(hidden)
        else:
            hidden = activation(linear(x, experts.gate, e)) * hidden
        y = y + gates[..., e : e + 1] * linear(hidden, experts.down, e)
    return y


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
