"""Routing by its formulas; every dispatch the same; capacity, and what it may not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.evaluate import checks
from assay.model import moe
from assay.model.cache import empty_cache
from assay.model.moe import Moe
from assay.model.transformer import Transformer, named_parameters
from assay.spec import presets
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    CapacitySpec,
    ExpertChoice,
    MlpSpec,
    MoeSpec,
    NoisyTopK,
    NormalInit,
    SigmoidTopK,
    Soft,
    StackSpec,
    TopK,
    TransformerSpec,
    spec_exceptions,
)
from assay.spec.run import ComputeSpec

B, T, D, E = 2, 12, 8, 4
DISPATCHES = ("dense", "ragged", "blocks", "capacity")
GLU = MlpSpec(hidden=16, activation="silu", gated=True, bias=True)
PLAIN = MlpSpec(hidden=(8, 12), activation="relu")
TOP_2 = TopK(k=2)


def layer(router=TOP_2, expert=GLU, dispatch="dense", seed=0, **fields) -> Moe:
    spec = MoeSpec(experts=E, expert=expert, router=router, **fields)
    wide = NormalInit(std=0.5)
    made = Moe(
        jax.random.key(seed),
        D,
        spec,
        init=wide,
        residual_init=wide,
        residual_scale=1.0,
        compute=ComputeSpec(moe_dispatch=dispatch),
    )
    graph, state = nnx.split(made)
    keys = iter(jax.random.split(jax.random.key(9), 50))

    def stir(leaf):  # biases too: those begin at 0, and would hide a mistake
        return leaf + 0.3 * jax.random.normal(next(keys), leaf.shape)

    return nnx.merge(graph, jax.tree.map(stir, state))


X = jax.random.normal(jax.random.key(1), (B, T, D))
run = jax.jit(
    lambda layer, x, key=None, train=False, real=None: layer(x, key=key, train=train, real=real),
    static_argnames="train",
)


def one_expert(made: Moe, expert: int, x):
    """A single expert in plain numpy, x (D,)."""
    act = {"silu": lambda v: v / (1 + np.exp(-v)), "relu": lambda v: np.maximum(v, 0)}
    act = act[made.spec.expert.activation]

    def linear(x, part):
        bias = 0 if part.b is None else np.asarray(part.b[...])[expert]
        return x @ np.asarray(part.w[...])[expert] + bias

    experts = made.experts
    if experts.gate is not None:
        return linear(act(linear(x, experts.gate)) * linear(x, experts.up[0]), experts.down)
    for up in experts.up:
        x = act(linear(x, up))
    return linear(x, experts.down)


def by_hand(made: Moe, x, experts, weights):
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        for e, w in zip(experts[place], weights[place], strict=True):
            out[place] += w * one_expert(made, e, np.asarray(x)[place])
    return out


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def scores(made: Moe, x=X):
    bias = 0 if made.router.b is None else np.asarray(made.router.b[...])
    return np.asarray(x) @ np.asarray(made.router.w[...]) + bias


# ---------------------------------------------------------------------------- routers


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("expert", [GLU, PLAIN], ids=["glu", "plain"])
def test_top_k_is_its_formula(renormalise, expert):
    made = layer(TopK(k=2, renormalise=renormalise, bias=True), expert)
    y, routing = run(made, X)
    probabilities = softmax(scores(made))
    experts = np.argsort(-probabilities, axis=-1)[..., :2]
    weights = np.take_along_axis(probabilities, experts, -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(y, by_hand(made, X, experts, weights), rtol=1e-4, atol=1e-5)


def test_noisy_top_k_is_makemoes_formula():
    """Softmax over the kept top-k of xW + eps softplus(xW_noise); no noise without training."""
    made, key = layer(NoisyTopK(k=2, bias=True)), jax.random.key(5)
    for train, eps in ((False, 0.0), (True, np.asarray(jax.random.normal(key, (B, T, E))))):
        y, routing = run(made, X, key, train)
        noise = np.asarray(X) @ np.asarray(made.router.noise_w[...])
        noise = np.log1p(np.exp(noise + np.asarray(made.router.noise_b[...])))
        logits = scores(made) + eps * noise
        experts = np.argsort(-logits, axis=-1)[..., :2]
        weights = softmax(np.take_along_axis(logits, experts, -1))
        np.testing.assert_array_equal(routing.experts, experts)
        np.testing.assert_allclose(y, by_hand(made, X, experts, weights), rtol=1e-4, atol=1e-5)


def test_sigmoid_top_k_is_deepseeks_formula():
    """The bias chooses, and does not weigh."""
    made = layer(SigmoidTopK(k=2, scale=2.5))
    made.router.balance[...] = jnp.array([3.0, 0.0, 0.0, -3.0])
    y, routing = run(made, X)
    gates = 1 / (1 + np.exp(-scores(made)))
    experts = np.argsort(-(gates + np.asarray(made.router.balance[...])), axis=-1)[..., :2]
    assert (np.asarray(routing.experts)[..., 0] == 0).all()
    assert not (np.asarray(routing.experts) == 3).any()
    weights = np.take_along_axis(gates, experts, -1)
    weights = 2.5 * weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(y, by_hand(made, X, experts, weights), rtol=1e-4, atol=1e-5)


def test_expert_choice_is_its_formula():
    """Each expert takes load x T / E = 6 of the 12 tokens of a row."""
    made = layer(ExpertChoice(load=2.0))
    y, routing = run(made, X)
    probabilities = softmax(scores(made))
    out = np.zeros(X.shape)
    for b in range(B):
        for e in range(E):
            for t in np.argsort(-probabilities[b, :, e])[:6]:
                assert routing.kept[b, t, e]
                out[b, t] += probabilities[b, t, e] * one_expert(made, e, np.asarray(X)[b, t])
    np.testing.assert_allclose(y, out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(routing.load, np.full(E, 1 / E), rtol=1e-6)


@pytest.mark.parametrize("over", ["sequence", "token"])
def test_soft_is_its_formula(over):
    """arXiv:2308.00951, Algorithm 1, over the row's tokens or over each token alone."""
    made = layer(Soft(slots=3, over=over))
    y, _ = run(made, X)
    out = np.zeros(X.shape)
    x, logits = np.asarray(X), scores(made)  # (B, T, E S)
    for b in range(B):
        groups = [slice(0, T)] if over == "sequence" else [slice(t, t + 1) for t in range(T)]
        for group in groups:
            tokens, phi = x[b, group], logits[b, group]
            slots = softmax(phi.T) @ tokens  # a softmax over tokens; (S E, D)
            made_of = np.stack([one_expert(made, s // 3, slot) for s, slot in enumerate(slots)])
            out[b, group] = softmax(phi) @ made_of
    np.testing.assert_allclose(y, out, rtol=1e-4, atol=1e-5)


def test_a_shared_expert_is_added():
    made = layer(shared=MlpSpec(hidden=8))
    y, _ = run(made, X)
    shared, made.shared = made.shared, None
    np.testing.assert_allclose(y, run(made, X)[0] + shared(X), rtol=1e-5, atol=1e-5)


def test_jitter_is_of_training():
    made, key = layer(TopK(k=2, jitter=0.5)), jax.random.key(3)
    plain = run(made, X)[0]
    np.testing.assert_array_equal(plain, run(made, X, key)[0])
    assert np.abs(plain - run(made, X, key, True)[0]).max() > 1e-3


def test_the_router_is_float32():
    made = layer()
    x = X.astype(jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x: made.router.logits(x, None))(x))
    assert "f32[2,12,4]" in text
    assert "bf16[2,12,4]" not in text
    assert made(x)[0].dtype == jnp.bfloat16


# ---------------------------------------------------------------------------- dispatch


def value_and_gradients(made: Moe, x, train=False):
    @jax.jit
    def compute(made, x):
        def loss(made, x):
            y, _ = made(x, train=train)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(made, x)

    gradients, y = compute(made, x)
    return [y, *jax.tree.leaves(gradients)]


def assert_same(ours, theirs, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("expert", [GLU, PLAIN], ids=["glu-bias", "deep"])
@pytest.mark.parametrize("capacity", [None, CapacitySpec(load=0.5)], ids=["dropless", "drops"])
def test_dispatches_are_the_same(expert, capacity):
    """Output and every gradient: where nothing is dropped, and where the same choices are."""
    x = jax.random.normal(jax.random.key(2), (3, 40, D))
    train = capacity is not None
    wanted = value_and_gradients(layer(expert=expert, capacity=capacity), x, train)
    for dispatch in DISPATCHES[1:]:
        made = layer(expert=expert, dispatch=dispatch, capacity=capacity)
        assert_same(value_and_gradients(made, x, train), wanted)


@pytest.mark.parametrize("shift", [0.0, 50.0], ids=["spread", "all-to-two"])
def test_blocks_of_many_sizes(monkeypatch, shift):
    """Several blocks an expert, some not full; and all tokens on the same two experts."""
    monkeypatch.setattr(moe, "BLOCK", 8)
    x = jax.random.normal(jax.random.key(2), (3, 40, D))

    def made(dispatch):
        made = layer(TopK(k=2, bias=True), dispatch=dispatch)
        made.router.b[...] = jnp.array([shift, 0.0, shift, 0.0])
        return made

    assert_same(value_and_gradients(made("blocks"), x), value_and_gradients(made("dense"), x))


def test_one_token_is_routed():
    x = X[:1, :1]
    for dispatch in DISPATCHES[1:]:
        np.testing.assert_allclose(
            run(layer(dispatch=dispatch), x)[0], run(layer(), x)[0], rtol=1e-4, atol=1e-5
        )


# ---------------------------------------------------------------------------- capacity


def test_rank_counts_within_a_group():
    groups = jnp.array([[1, 0, 1, 1, 0]])
    np.testing.assert_array_equal(moe.rank(groups, 2), [[0, 0, 1, 2, 1]])
    priority = jnp.array([[3.0, 1.0, 1.0, 2.0, 0.0]])
    np.testing.assert_array_equal(moe.rank(groups, 2, priority), [[2, 1, 0, 1, 0]])


def within(experts, weights, capacity, by_weight):
    experts, weights = jnp.array([experts]), jnp.array([weights])
    kept = jnp.ones(experts.shape, bool)
    return np.asarray(
        moe.within_capacity(
            experts, weights, kept, num_experts=3, capacity=capacity, by_weight=by_weight
        )
    )[0].tolist()


def test_places_go_in_the_order_of_the_row():
    """Both choices of a token before those of the next: its second choice keeps its place."""
    experts = [[0, 1], [1, 0], [1, 0]]
    weights = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]
    assert within(experts, weights, 1, False) == [[True, True], [False, False], [False, False]]
    assert within(experts, weights, 1, True) == [[True, False], [False, False], [True, False]]
    assert within(experts, weights, 2, False) == [[True, True], [True, True], [False, False]]


def test_what_places_there_are():
    assert moe.places_per_row(1.25, 2, 64, 8) == 20
    assert moe.places_per_row(0.01, 2, 64, 8) == 1
    assert moe.places_per_row(9.0, 2, 64, 8) == 64  # a token chooses an expert once


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_dropped_token_reads_nobodys_output(dispatch):
    made = layer(TopK(k=1), dispatch=dispatch, capacity=CapacitySpec(load=0.3))
    y, routing = run(made, X, None, True)
    dropped = ~np.asarray(routing.kept)[..., 0]
    assert 0 < dropped.sum() < dropped.size
    assert (np.asarray(y)[dropped] == 0).all()
    assert float(routing.dropped) == pytest.approx(dropped.mean())
    free, routing = run(made, X)  # evaluation drops nothing
    np.testing.assert_allclose(np.asarray(y)[~dropped], np.asarray(free)[~dropped], atol=1e-5)
    assert routing.kept.all()
    assert float(routing.dropped) == 0


@pytest.mark.parametrize("priority", ["token", "weight"])
def test_only_weight_priority_sees_the_future(priority):
    """Capacity so tight that most choices are dropped; the last tokens of each row change."""
    made = layer(capacity=CapacitySpec(load=0.4, priority=priority))
    x = jax.random.normal(jax.random.key(2), (4, 32, D))
    before = np.asarray(run(made, x, None, True)[1].kept)
    changed = 0
    for seed in range(8):
        other = x.at[:, 16:].set(jax.random.normal(jax.random.key(seed), (4, 16, D)))
        after = np.asarray(run(made, other, None, True)[1].kept)
        changed += (before[:, :16] != after[:, :16]).any()
    assert changed == (8 if priority == "weight" else 0)


def test_what_sees_the_future_is_named():
    """For a comparison to show beside the row; of all presets only tiny-moe has such an option."""
    named = {name: spec_exceptions(preset.model) for name, preset in presets.PRESETS.items()}
    assert {name: found for name, found in named.items() if found} == {
        "tiny-moe": [
            "decoder.pattern.0.feed_forward.capacity.priority='weight' lets a later token push "
            "out an earlier one in training."
        ]
    }


def test_padding_takes_no_place_and_counts_nowhere():
    made = layer(capacity=CapacitySpec(load=0.5))
    real = jnp.arange(T)[None] >= jnp.array([[5], [0]])  # padding in front of the first row
    y, routing = run(made, X, None, True, real)
    assert (np.asarray(y)[0, :5] == 0).all()
    assert not routing.kept[0, :5].any()
    other = X.at[0, :5].set(7.0)
    y_other, routing_other = run(made, other, None, True, real)
    np.testing.assert_array_equal(np.asarray(y)[0, 5:], np.asarray(y_other)[0, 5:])
    for name in ("load", "entropy", "dropped", "balance_loss", "z_loss"):
        assert np.array_equal(getattr(routing, name), getattr(routing_other, name)), name


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_loss_is_one_where_all_is_even(k):
    """Uniform probabilities; and loads that are even, whatever k."""
    made = layer(TopK(k=k))
    made.router.w[...] = jnp.zeros((D, E))
    _, routing = run(made, X)
    assert float(routing.balance_loss) == pytest.approx(1.0, abs=1e-5)
    assert float(routing.entropy) == pytest.approx(np.log(E), abs=1e-5)
    assert float(routing.z_loss) == pytest.approx(np.log(E) ** 2, abs=1e-5)
    assert float(routing.load.sum()) == pytest.approx(1.0, abs=1e-6)
    even = jnp.full((E,), 1 / E)
    assert float(moe.balance_loss(even, even)) == 1.0
    one = jnp.zeros(E).at[0].set(1.0)
    assert float(moe.balance_loss(one, one)) == E  # all on one expert


# ---------------------------------------------------------------------------- in the model

STACK = StackSpec(
    pattern=(
        BlockSpec(
            attention=AttentionSpec(heads=2),
            feed_forward=MoeSpec(experts=E, expert=GLU, capacity=CapacitySpec(load=1.0)),
        ),
        BlockSpec(attention=None, feed_forward=MlpSpec(hidden=8)),
    ),
    num_layers=3,
)
MODEL = TransformerSpec(vocab_size=17, d_model=D, context=T, decoder=STACK)
TOKENS = jax.random.randint(jax.random.key(4), (B, T), 0, 17)


def made_model(**compute) -> Transformer:
    return Transformer(MODEL, ComputeSpec(**compute), rngs=jax.random.key(0))


@jax.jit
def all_of_it(model):
    def loss(model):
        output = model.forward(TOKENS, train=True)
        return jnp.sum(jnp.sin(output.logits)), output

    gradient, output = jax.grad(loss, has_aux=True)(model)
    return output, gradient


def test_scanned_and_recomputed_are_the_same():
    wanted, gradient = all_of_it(made_model())
    assert len(wanted.routing) == 2
    assert wanted.routing[0].experts.shape == (B, T, 2)
    for compute in ({"scan_layers": True}, {"remat": "block"}):
        output, other = all_of_it(made_model(**compute))
        assert_same(jax.tree.leaves(output), jax.tree.leaves(wanted))
        named, wanted_named = named_parameters(other), named_parameters(gradient)
        assert_same([named[name] for name in wanted_named], wanted_named.values())


def test_the_cache_decodes_the_same():
    model = made_model()
    step = jax.jit(lambda model, token, cache: model.forward(token, cache=cache))
    cache, logits = empty_cache(MODEL, B, T), []
    for t in range(T):
        output = step(model, TOKENS[:, t : t + 1], cache)
        cache = output.cache
        logits.append(output.logits)
    full = jax.jit(lambda model: model(TOKENS))(model)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), full, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------- the check


def sample_of(spec):
    return checks.Sample(spec, 0)


def test_the_check_names_weight_priority_and_catches_it_elsewhere(monkeypatch):
    spec = MODEL.at("context", 32).at("decoder.num_layers", 2)
    spec = spec.at("decoder.pattern.0.feed_forward.capacity.priority", "weight")
    model = Transformer(spec, rngs=jax.random.key(0))
    result = checks.causality_values(model, sample_of(spec))
    assert result.passed
    assert "exception: decoder.pattern.0.feed_forward.capacity.priority='weight'" in result.note
    # The same leak under another name: a spec that says nothing of it.
    quiet = MODEL.at("context", 32).at("decoder.num_layers", 2)
    real = moe.within_capacity
    monkeypatch.setattr(moe, "within_capacity", lambda *a, **k: real(*a, **k | {"by_weight": True}))
    model = checks.at_random(Transformer(quiet, rngs=jax.random.key(0)), 1)
    jax.clear_caches()
    result = checks.causality_values(model, sample_of(quiet))
    assert not result.passed
    assert "training forward: layer of experts 0 routed token" in result.where


def records(experts, margin=1.0):
    experts = jnp.asarray(experts, jnp.int32)
    b, t, _ = experts.shape
    zero = jnp.float32(0)
    return (
        moe.Routing(
            jnp.zeros(E), zero, zero, zero, zero, zero, experts,
            jnp.ones(experts.shape, bool), jnp.full((b, t), margin),
        ),
    )  # fmt: skip


def test_a_flip_between_equals_is_no_leak():
    places = np.ones((1, 3), bool)
    a, b = [[[0, 1], [2, 1], [3, 0]]], [[[1, 0], [2, 1], [3, 1]]]
    assert checks.compare_decisions(records(a), records(a), places).leak is None
    found = checks.compare_decisions(records(a), records(b), places)
    assert found.leak == "layer of experts 0 routed token 2 otherwise"  # the order is no decision
    found = checks.compare_decisions(records(a, 1e-7), records(b, 1e-7), places)
    assert found.leak is None
    assert found.rows.tolist() == [True]


def test_exceptions_of_gradients():
    """An idle expert, a renormalised top-1 router and a balancing bias get no gradient."""
    routers = {"top": TopK(k=1), "sigmoid": SigmoidTopK(k=1), "noisy": NoisyTopK(k=1)}
    blocks = tuple(
        BlockSpec(
            attention=None,
            feed_forward=MoeSpec(experts=16, expert=MlpSpec(hidden=4), router=router),
        )
        for router in routers.values()
    )
    spec = MODEL.replace(decoder=StackSpec(pattern=blocks, num_layers=3), context=6)
    model = checks.at_random(Transformer(spec, rngs=jax.random.key(0)), 0)
    result = checks.gradients_reach(model, sample_of(spec))
    assert result.passed, result
    for words in (
        "layers.0.feed_forward.router.w: a single choice weighs 1",
        "layers.1.feed_forward.router.balance: it only chooses",
        "layers.2.feed_forward.router.noise_w: its noise is drawn in training only",
        "layers.0.feed_forward.experts.down.w: no token of the batch chose these experts",
    ):
        assert words in result.note


def test_presets_keep_their_choices_when_shrunk():
    for preset in presets.PRESETS.values():
        small = presets.shrink(preset.model)
        for old, new in zip(preset.model.decoder.pattern, small.decoder.pattern, strict=True):
            old, new = old.feed_forward, new.feed_forward
            if old is not None and old.kind == "moe":
                assert new.experts >= 4
                assert getattr(new.router, "k", 0) == getattr(old.router, "k", 0)
                assert new.capacity == old.capacity
