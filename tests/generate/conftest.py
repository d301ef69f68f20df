"""Small models whose every parameter matters: no zero weights, no norm scale of exactly 1."""

import zlib
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import pytest

from assay.model.transformer import Transformer, abstract, merge_named, named_parameters
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec


@lru_cache
def _noisy(spec: TransformerSpec, compute: ComputeSpec) -> Transformer:
    model = abstract(spec, compute)

    def values(name: str, shape: tuple[int, ...]):
        noise = 0.2 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        return jnp.asarray(noise + name.endswith("norm.scale"), jnp.float32)

    shapes = {name: leaf.shape for name, leaf in named_parameters(model).items()}
    return merge_named(model, {name: values(name, shape) for name, shape in shapes.items()})


@pytest.fixture(scope="session")
def noisy():
    """noisy(spec, **compute fields): a model of that spec with noise on every parameter."""
    return lambda spec, **compute: _noisy(spec, ComputeSpec(**compute))
