"""Multi-token prediction by its formula; no part of evaluation and decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.errors import AssayError
from assay.evaluate import checks
from assay.evaluate.checks import at_random, check
from assay.generate.engine import generate
from assay.model.cache import empty_cache
from assay.model.transformer import (
    Transformer,
    abstract,
    from_named_parameters,
    named_parameters,
    shifted,
)
from assay.spec import accounting
from assay.spec.model import (
    Alibi,
    AttentionSpec,
    BlockSpec,
    CapacitySpec,
    MlpSpec,
    MoeSpec,
    MultiToken,
    Rope,
    StackSpec,
    TransformerSpec,
    ValueEmbedding,
)
from assay.spec.run import ComputeSpec, TrainSpec
from assay.train.loss import summed_objective

B, T, V, D, DEPTH = 3, 10, 23, 16, 2
PLAIN = TransformerSpec(
    vocab_size=V,
    d_model=D,
    context=T,
    decoder=StackSpec(
        pattern=(
            BlockSpec(
                attention=AttentionSpec(heads=2, positions=Rope()),
                feed_forward=MlpSpec(hidden=24),
            ),
        ),
        num_layers=2,
    ),
)
SPEC = PLAIN.replace(multi_token=MultiToken(depth=DEPTH, loss=0.25))
TOKENS, TARGETS = np.random.default_rng(0).integers(V, size=(2, B, T)).astype(np.int32)


def made(spec=SPEC, **compute):
    return at_random(abstract(spec, ComputeSpec(**compute)), 0)


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def by_hand(model, segments=None):
    """The paper's equations 21 to 25, a place at a time but for the block itself."""
    named = {name: np.asarray(x, np.float64) for name, x in named_parameters(model).items()}
    table = named["embedding.table"]
    h = np.asarray(model.hidden(TOKENS, segment_ids=segments)[0], np.float64)
    shared = model.geometry(jnp.arange(T), D, segment_ids=segments)
    total = 0.0
    for k in range(1, DEPTH + 1):
        at = f"ahead.{k - 1}"
        joined = np.zeros((B, T, D))
        for b, i in np.ndindex(B, T):
            later = table[TOKENS[b, i + k]] if i + k < T else np.zeros(D)
            both = [
                rms_norm(h[b, i], named[f"{at}.hidden_norm.scale"]),
                rms_norm(later, named[f"{at}.token_norm.scale"]),
            ]
            joined[b, i] = np.concatenate(both) @ named[f"{at}.join.w"]
        x, _, _ = model.ahead[k - 1].block(jnp.asarray(joined, jnp.float32), shared)
        h = rms_norm(np.asarray(x, np.float64), named[f"{at}.final_norm.scale"])
        logits = h @ table.T
        for b, i in np.ndindex(B, T):
            if i + k >= T or (segments is not None and segments[b, i] != segments[b, i + k]):
                continue
            z = logits[b, i] - logits[b, i].max()
            total += (np.log(np.exp(z).sum()) - z[TARGETS[b, i + k]]) / DEPTH
    return total


@pytest.mark.parametrize("cut", [False, True], ids=["whole rows", "segments"])
def test_the_loss_is_its_formula(cut):
    segments = np.where(np.arange(T) < 4, 1, 2)[None].repeat(B, 0).astype(np.int32)
    batch = {"tokens": TOKENS, "targets": TARGETS} | ({"segment_ids": segments} if cut else {})
    model = made()
    objective, logged = summed_objective(model, batch, TrainSpec(), None)
    wanted = by_hand(model, segments if cut else None)
    np.testing.assert_allclose(logged["ahead_loss"], wanted, rtol=2e-5)
    np.testing.assert_allclose(objective, logged["loss"] + 0.25 * wanted, rtol=1e-5)


def test_a_tokens_weight_is_that_of_the_answer():
    """Answers of weight 0 do not count: of one module, the same as leaving the last ones out."""
    model = made()
    weights = (np.arange(T) < T - 3).astype(np.float32)[None].repeat(B, 0)
    batch = {"tokens": TOKENS, "targets": TARGETS, "weights": weights}
    _, logged = summed_objective(model, batch, TrainSpec(), None)
    short = {name: x[:, : T - 3] for name, x in batch.items()}
    _, wanted = summed_objective(model, short, TrainSpec(), None)
    np.testing.assert_allclose(logged["ahead_loss"], wanted["ahead_loss"], rtol=1e-5)


@pytest.mark.parametrize("how", [{"scan_layers": True}, {"remat": "block"}])
def test_the_same_however_it_is_computed(how):
    batch = {"tokens": TOKENS, "targets": TARGETS}
    model = made()
    other = from_named_parameters(SPEC, named_parameters(model), ComputeSpec(**how))

    def gradient(model):
        grads = jax.grad(lambda m: summed_objective(m, batch, TrainSpec(), None)[0])(model)
        return named_parameters(grads)

    found, wanted = gradient(other), gradient(model)
    assert {*found} == {*wanted}
    for name, x in wanted.items():
        assert np.abs(x).max() > 0, name
        np.testing.assert_allclose(found[name], x, atol=1e-5, rtol=1e-4)


def test_evaluation_and_decoding_leave_it_out():
    model = made()
    named = {name: x for name, x in named_parameters(model).items() if "ahead" not in name}
    without = from_named_parameters(PLAIN, named)
    np.testing.assert_array_equal(model(TOKENS), without(TOKENS))
    assert model.forward(TOKENS).ahead == ()
    assert len(model.forward(TOKENS, train=True).ahead) == DEPTH
    logits, _ = model(TOKENS, cache=empty_cache(SPEC, B, T))
    np.testing.assert_allclose(logits, without(TOKENS), atol=1e-4)
    options = {"max_new_tokens": 4, "temperature": 0.0}
    assert generate(model, [[1, 2]], **options).ids == generate(without, [[1, 2]], **options).ids


def test_what_it_costs_is_counted():
    """2 D D, a block, three norms a module; FLOPs in training alone."""
    plain, spec = (accounting.parameters(s) for s in (PLAIN, SPEC))
    block = 4 * D * D + 2 * D * 24 + 2 * D
    assert spec.total - plain.total == DEPTH * (2 * D * D + block + 3 * D)
    assert spec.active == plain.active
    plain, spec = (accounting.flops_per_token(s) for s in (PLAIN, SPEC))
    assert spec.forward == plain.forward
    layer = (plain.parts["attention"] + plain.parts["feed_forward"]) // 2
    assert spec.ahead == DEPTH * (2 * 2 * D * D + layer + plain.parts["head"])
    assert spec.train == 3 * (spec.forward + spec.ahead)


def test_what_it_needs_is_said():
    with pytest.raises(AssayError, match="multi_token: only a causal decoder"):
        SPEC.at("decoder.causal", False)


def test_with_all_that_is_new_at_once_it_passes_every_check():
    """ALiBi, gates and tables of values; experts in the modules too, under forced congestion."""
    attention = AttentionSpec(
        heads=6,
        kv_heads=2,
        positions=Alibi(),
        gate="head",
        value_embedding=ValueEmbedding(gate_channels=8),
    )
    experts = MoeSpec(experts=4, expert=MlpSpec(hidden=16), capacity=CapacitySpec(load=1.0))
    pattern = (
        BlockSpec(
            attention=attention.replace(
                gate="feature", value_embedding=ValueEmbedding(gate_channels=None)
            ),
            feed_forward=MlpSpec(hidden=24),
        ),
        BlockSpec(attention=attention, feed_forward=experts),
    )
    spec = TransformerSpec(
        vocab_size=29,
        vocab_multiple=8,
        d_model=24,
        context=24,
        decoder=StackSpec(pattern=pattern, num_layers=2),
        multi_token=MultiToken(),
    )
    report = check(spec)
    assert report.passed, [c for c in report.checks if not c.passed]
    assert "value_embedding.table: these tokens are not in the batch" in str(report)


class ReadsItsAnswer(Transformer):
    """What its modules read is one token further on than it may be."""

    def _run_ahead(self, x, tokens, *rest):
        return super()._run_ahead(x, shifted(tokens, 1), *rest)


def test_a_module_that_reads_its_answer_is_found():
    model = at_random(nnx.eval_shape(lambda: ReadsItsAnswer(SPEC, rngs=jax.random.key(0))), 0)
    found = checks.causality_values(model, checks.Sample(SPEC, 0))
    assert not found.passed
    assert found.where.startswith("training, ")
