"""Maximal update parametrisation (Yang et al., arXiv:2203.03466): a model is its base, widened.

All that muP changes of a model is here; what it changes of the updates is `width_factors` of
`train/optimizer.py`. The base is the same architecture at `Mup.base_width`, whose shapes and
multipliers are those of the standard parametrisation. So nothing depends on which field made a
width larger.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from assay.errors import AssayError
from assay.model.sharding import deviation, kind_of
from assay.spec.model import AttentionSpec, BlockSpec, InitSpec, TransformerSpec, WeightInit


@dataclass(frozen=True)
class Growth:
    """A parameter's fan-in and fan-out, as multiples of the base's. 1 where it has none."""

    fan_in: float = 1.0
    fan_out: float = 1.0


def base_of(model: nnx.Module) -> nnx.Module:
    """The abstract model of the base width, in the standard parametrisation."""
    spec = model.spec.at_width(model.spec.mup.base_width)
    make = type(model)
    return nnx.eval_shape(lambda: make(spec, model.compute, rngs=jax.random.key(0)))


def growth(model: nnx.Module) -> dict:
    """What each parameter has grown by, as a pure dict like the parameters'."""
    base = dict(nnx.to_flat_state(nnx.state(base_of(model), nnx.Param)))
    grown = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if kind_of(param.axes) in ("matrix", "table"):
            pairs = zip(param.shape[-2:], base[path].shape[-2:], strict=True)
            grown[path] = Growth(*(ours / theirs for ours, theirs in pairs))
        else:
            grown[path] = Growth()
    return nnx.traversals.unflatten_mapping(grown)


def parametrise(model: nnx.Module) -> None:
    """Gives a model that was just made muP's multipliers and initial values."""
    mup, base = model.spec.mup, base_of(model)
    for embedding, standard in zip(_embeddings(model), _embeddings(base), strict=True):
        embedding.scale, embedding.multiplier = standard.scale, mup.embedding
    for block, standard in zip(_blocks(model), _blocks(base), strict=True):
        block.multiplier = mup.hidden
        for part in ("attention", "cross"):
            ours, theirs = getattr(block, part), getattr(standard, part)
            if ours is not None:
                ours.scale = theirs.scale * theirs.width / ours.width
    model.head.scale = base.head.scale * mup.output * mup.base_width / model.spec.d_model
    shapes = dict(nnx.to_flat_state(nnx.state(base, nnx.Param)))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if kind_of(param.axes) in ("matrix", "table"):
            init = _init_of(path, model.spec.init)
            factor = _initial_factor(init, kind_of(param.axes), param.shape, shapes[path].shape)
            param[...] = param[...] * factor


def _initial_factor(init: WeightInit, kind: str, ours: tuple, base: tuple) -> float:
    """From the initial values that the shape has to the base's, matrices by 1/sqrt(fan-in)."""
    standard = deviation(init, *ours[-2:])
    if standard == 0.0:
        return 1.0
    wanted = deviation(init, *base[-2:])
    if kind == "matrix":
        wanted *= math.sqrt(base[-2] / ours[-2])
    return wanted / standard


def _init_of(path: tuple, init: InitSpec) -> WeightInit:
    if path[0] in ("embedding", "source_embedding"):
        return init.embedding
    if path[0] == "head":
        return init.head_init()
    return init.query_init() if path[-2] == "q" else init.weights


def _embeddings(model: nnx.Module) -> list[nnx.Module]:
    return [e for e in (model.embedding, model.source_embedding) if e is not None]


def _blocks(model: nnx.Module) -> Iterator[nnx.Module]:
    for stack in filter(None, (model.encoder, model)):
        yield from stack.stacked
        yield from stack.layers
    yield from (module.block for module in model.ahead)


# ---------------------------------------------------------------------------- without multipliers


def folded(
    spec: TransformerSpec, named: Mapping[str, np.ndarray]
) -> tuple[TransformerSpec, dict[str, np.ndarray]]:
    """The same function without muP: every multiplier in the weights that it follows.

    Exact where the factors are powers of two, else to a rounding of each weight. The result is
    for use: trained on, it would be another parametrisation.

    Raises:
        AssayError: if a multiplier has no weights to go into, which are named.
    """
    if spec.mup is None:
        return spec, dict(named)
    factors = dict(_factors(spec, named))
    unknown = factors.keys() - named.keys()
    assert not unknown, unknown
    weights = {
        name: (value * np.float32(factors.get(name, 1.0))).astype(value.dtype)
        for name, value in named.items()
    }
    return spec.replace(mup=None), weights


def _factors(spec: TransformerSpec, names: Mapping) -> Iterator[tuple[str, float]]:
    """(name, factor) of every parameter that takes one in."""
    mup, base = spec.mup, spec.at_width(spec.mup.base_width)
    m = spec.d_model / base.d_model
    tables = {"embedding": spec.embedding, "source_embedding": spec.source_embedding}
    in_table = 1.0  # what the shared table carries
    for name, embedding in tables.items():
        if embedding is None:
            continue
        factor = 1.0 / math.sqrt(m) if embedding.scale_by_sqrt_width else 1.0
        if embedding.norm is None:
            factor *= mup.embedding
        elif mup.embedding != 1.0:
            yield from _norm(f"{name}.norm", names, mup.embedding)
        if embedding.positions.kind == "sinusoidal" and mup.embedding != 1.0 and not embedding.norm:
            raise AssayError(
                f"mup.embedding: found {mup.embedding}, which sinusoidal positions cannot take in."
            )
        yield f"{name}.table", factor
        if embedding.positions.kind == "learned" and embedding.norm is None:
            yield f"{name}.positions", mup.embedding
        for i in range(len(embedding.ngrams.orders) if embedding.ngrams else 0):
            yield f"{name}.ngrams.{i}", 1.0 if embedding.norm else mup.embedding
        if name == "embedding":
            in_table = factor
    wide_and_narrow = zip(spec.layers(), base.layers(), strict=True)
    for (layer, block), (_, narrow) in wide_and_narrow:
        yield from _block_factors(layer, block, narrow, spec, base, names)
    output = mup.output / m
    if spec.head.scale_by_inverse_sqrt_width:
        output *= math.sqrt(m)
    if not spec.head.tied:
        yield "head.w", output
    elif (output := output / in_table) != 1.0:
        yield from _norm("final_norm", names, output)
        for i in range(len(spec.ahead())):
            yield from _norm(f"ahead.{i}.final_norm", names, output)


def _block_factors(
    layer: str,
    block: BlockSpec,
    narrow: BlockSpec,
    spec: TransformerSpec,
    base: TransformerSpec,
    names: Mapping,
) -> Iterator[tuple[str, float]]:
    hidden, after = spec.mup.hidden, block.norm_position == "both"
    for part, attention in block.attentions().items():
        where, scale = f"{layer}.{part}", _score_scale(attention, spec)
        wanted = _score_scale(narrow.attentions()[part], base)
        wanted *= narrow.attentions()[part].width(base.d_model) / attention.width(spec.d_model)
        if attention.qk_norm is None:
            yield from _linear(f"{where}.q", names, wanted / scale)
        elif wanted != scale:
            yield from _norm(f"{where}.q_norm", names, wanted / scale)
        if not after:
            yield from _linear(f"{where}.o", names, hidden)
        elif hidden != 1.0:
            yield from _norm(f"{where}_post_norm", names, hidden)
    if block.feed_forward is None:
        return
    where = f"{layer}.feed_forward"
    if after and hidden != 1.0:
        yield from _norm(f"{where}_post_norm", names, hidden)
    elif not after:
        for inner in ("down", "experts.down", "shared.down"):
            if f"{where}.{inner}.w" in names:
                yield from _linear(f"{where}.{inner}", names, hidden)


def _score_scale(attention: AttentionSpec, spec: TransformerSpec) -> float:
    return attention.scale or 1.0 / math.sqrt(attention.width(spec.d_model))


def _linear(where: str, names: Mapping, factor: float) -> Iterator[tuple[str, float]]:
    yield f"{where}.w", factor
    if f"{where}.b" in names:
        yield f"{where}.b", factor


def _norm(where: str, names: Mapping, factor: float) -> Iterator[tuple[str, float]]:
    if f"{where}.scale" not in names:
        raise AssayError(
            f"mup: there is no {where}.scale to take a factor of {factor:.4g} in, so the model "
            f"cannot be written without muP."
        )
    yield f"{where}.scale", factor
    if f"{where}.bias" in names:
        yield f"{where}.bias", factor
