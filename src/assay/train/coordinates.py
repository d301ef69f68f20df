"""The coordinate check of muP (Yang et al., arXiv:2203.03466, appendix D.1).

A model is made at several widths, a few updates are made on one batch, and what each part gives is
held against the width. Under muP it changes by as much at every width; in the standard
parametrisation it changes by more the wider the model is, which is why a learning rate that suits
one width is too high for a wider one.

Axes: B rows, T tokens, D model, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from assay.errors import AssayError
from assay.model.transformer import Transformer, abstract
from assay.spec.model import Mup
from assay.spec.run import ConstantSchedule, RunSpec
from assay.train.step import TrainState, make_step, optimizer_of

WIDTHS = (64, 128, 256)
UPDATES, SEEDS = 4, 4
ROWS, LENGTH, VOCABULARY = 4, 32, 64
"""Of the batch. A larger vocabulary is cut: its rows are of no interest here."""

GROWS = 0.25
"""A slope over this is growth. The standard parametrisation's steepest are 0.8 to 2 (twice the
width, up to 4 times the change); what is left under muP is the noise of narrow models."""


@dataclass(frozen=True)
class Part:
    """What one part of the model does at each width.

    `sizes` [update][width] are root mean squares of its output, from before the first update on;
    `changes` those of its difference from then. `slope` is that of the last changes, log against
    log: the power of the width that they grow with.
    """

    name: str
    sizes: tuple[tuple[float, ...], ...]
    changes: tuple[tuple[float, ...], ...]
    slope: float


@dataclass(frozen=True)
class Coordinates:
    """All parts in one parametrisation: `mup` or `standard`."""

    parametrisation: str
    optimizer: str
    widths: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def steepest(self) -> Part:
        return max(self.parts, key=lambda part: part.slope)

    @property
    def passed(self) -> bool:
        """Whether nothing grows with the width."""
        return self.steepest.slope <= GROWS


def check_coordinates(
    run: RunSpec, widths: Sequence[int] = WIDTHS, updates: int = UPDATES
) -> tuple[Coordinates, Coordinates]:
    """The run's model and optimizer in the standard parametrisation, and under muP.

    The narrowest width is the base. At most two periods of layers are made, and no warm-up.

    Raises:
        AssayError: if the model cannot be made at a width, or is no plain decoder.
    """
    model, widths = run.model, tuple(sorted({*widths}))
    if model.head is None or model.encoder is not None or not model.decoder.causal:
        raise AssayError("--coordinates: it is of decoders that have a head.")
    if len(widths) < 2 or updates < 1:
        raise AssayError("--coordinates: it needs two widths or more, and an update.")
    layers = min(model.decoder.num_layers, 2 * len(model.decoder.pattern))
    small = model.with_vocab(min(model.vocab_size, VOCABULARY)).at("decoder.num_layers", layers)
    tokens = _tokens(small.vocab_size, min(LENGTH, model.context))
    mup = (model.mup or Mup(base_width=1)).replace(base_width=widths[0])
    data = run.data.replace(batch_size=tokens.shape[0], seq_len=tokens.shape[1] - 1)
    found = []
    for name, parametrisation in (("standard", None), ("mup", mup)):
        recorded = []
        for width in widths:
            wide = small.at_width(width).replace(mup=parametrisation)
            of_width = run.replace(
                model=wide,
                data=data,
                schedule=ConstantSchedule(),
                train=run.train.replace(accumulate=1),
            )
            recorded.append(_record(of_width, tokens, updates))
        parts = tuple(_part(part, recorded, widths) for part in recorded[0][0])
        found.append(Coordinates(name, run.optimizer.kind, widths, parts))
    return tuple(found)


def _tokens(vocabulary: int, length: int) -> Int32[Array, "b t+1"]:
    """Drawn by Zipf's law, as words are: some are frequent, and all pull the same way."""
    frequency = 1.0 / np.arange(1, vocabulary + 1)
    rng = np.random.default_rng(0)
    shape = (ROWS, length + 1)
    return jnp.asarray(rng.choice(vocabulary, shape, p=frequency / frequency.sum()), jnp.int32)


def _record(run: RunSpec, tokens: Int32[Array, "b t+1"], updates: int) -> list[dict]:
    """(size, change) of every part, before the first update and after each, over all seeds."""
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    model = abstract(run.model, run.compute)
    graph, step = nnx.graphdef(model), make_step(run, model)

    def squares(params, first):
        now = outputs(nnx.merge(graph, params), batch["tokens"])
        first = now if first is None else first
        mean = jax.tree.map(lambda x, y: (_mean_square(x), _mean_square(x - y)), now, first)
        return now, mean

    @jax.jit
    def of_seed(key):
        params = nnx.to_pure_dict(nnx.state(Transformer(run.model, run.compute, rngs=key)))
        state = TrainState(params, optimizer_of(run, model).init(params), jnp.int32(0), key)
        first, before = squares(params, None)

        def one(state, _):
            state, _ = step(state, batch, jnp.float32(0))
            return state, squares(state.params, first)[1]

        _, after = jax.lax.scan(one, state, length=updates)
        return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), before, after)

    found = [of_seed(jax.random.key(seed)) for seed in range(SEEDS)]
    mean = jax.tree.map(lambda *x: np.sqrt(np.mean(x, axis=0)), *found)
    return [
        {n: (float(a[i]), float(b[i])) for n, (a, b) in mean.items()} for i in range(updates + 1)
    ]


def outputs(model: Transformer, tokens: Int32[Array, "b t"]) -> dict[str, Float[Array, "..."]]:
    """What each part of a decoder gives: the embedding, attentions, layers, and the logits."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    x = model.embedding(tokens, positions, None).astype(model.compute.dtype)
    shared = model.geometry(positions, model.spec.d_model, tokens=tokens)
    given = {"embedding": x}
    for i, block in enumerate(model.unstacked_layers()):
        if block.attention is not None:
            y = x if block.attention_norm is None else block.attention_norm(x)
            given[f"layers.{i}.attention"] = block.attention(y, shared)[0]
        x, _, _ = block(x, shared)
        given[f"layers.{i}"] = x
    last = x if model.final_norm is None else model.final_norm(x)
    return given | {"logits": model.logits(last)}


def _mean_square(x: Float[Array, "..."]) -> Float32[Array, ""]:
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def _part(name: str, recorded: list[list[dict]], widths: Sequence[int]) -> Part:
    steps = range(len(recorded[0]))
    sizes = tuple(tuple(of[step][name][0] for of in recorded) for step in steps)
    changes = tuple(tuple(of[step][name][1] for of in recorded) for step in steps)
    if not all(c > 0 and math.isfinite(c) for c in changes[-1]):
        raise AssayError(f"--coordinates: {name} did not change, or not by a finite number.")
    slope = np.polyfit(np.log(widths), np.log(changes[-1]), 1)[0]
    return Part(name, sizes, changes, float(slope))


def shown(slope: float, cells: int = 8) -> str:
    """A slope as a bar of characters, a whole one being growth with the width itself."""
    return "█" * max(0, min(cells, round(slope * cells)))
