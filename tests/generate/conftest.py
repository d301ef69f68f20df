"""Small models whose every parameter matters: no zero weights, no norm scale of exactly 1."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import pytest

from assay.model.transformer import Transformer, merge_named, named_parameters
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec


@lru_cache
def _noisy(spec: TransformerSpec, compute: ComputeSpec) -> Transformer:
    model = Transformer(spec, compute, rngs=jax.random.key(0))
    named = named_parameters(model)
    keys = jax.random.split(jax.random.key(1), len(named))
    moved = {
        name: value + 0.2 * jax.random.normal(key, value.shape, jnp.float32)
        for key, (name, value) in zip(keys, sorted(named.items()), strict=True)
    }
    return merge_named(model, moved)


@pytest.fixture(scope="session")
def noisy():
    """noisy(spec, **compute fields): a model of that spec with noise on every parameter."""
    return lambda spec, **compute: _noisy(spec, ComputeSpec(**compute))
