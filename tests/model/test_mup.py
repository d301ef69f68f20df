"""muP: the base width is the standard form, what grows by what, and folding it away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.errors import AssayError
from assay.model.mup import folded, growth
from assay.model.transformer import (
    Transformer,
    from_named_parameters,
    layout,
    name_leaves,
    named_parameters,
)
from assay.spec import presets
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    InitSpec,
    LayerNorm,
    LearnedPositions,
    MlpSpec,
    MoeSpec,
    Mup,
    NormalInit,
    QkNorm,
    RmsNorm,
    Rope,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import ComputeSpec, MuonSpec, RunSpec
from assay.train.optimizer import parameter_kinds, width_factors

PLAIN = TransformerSpec(
    vocab_size=29,
    d_model=32,
    context=16,
    decoder=StackSpec(
        pattern=(
            BlockSpec(
                attention=AttentionSpec(heads=4, kv_heads=2, positions=Rope(), qkv_bias=True),
                feed_forward=MlpSpec(hidden=64, bias=True),
                norm=LayerNorm(),
            ),
        ),
        num_layers=2,
        final_norm=LayerNorm(),
    ),
    init=InitSpec(weights=NormalInit(std=0.3), embedding=NormalInit(std=0.3), residual="same"),
)
BLOCK = "decoder.pattern.*"
EXPERTS = MoeSpec(experts=4, expert=MlpSpec(hidden=16), shared=MlpSpec(hidden=16))
FORMS = {
    "tied": PLAIN,
    "untied": PLAIN.replace(head=HeadSpec(tied=False, bias=True)),
    "learned": PLAIN.replace(embedding=EmbeddingSpec(positions=LearnedPositions())),
    "scaled": PLAIN.changed(
        {"embedding.scale_by_sqrt_width": True, "head.scale_by_inverse_sqrt_width": True}
    ),
    "normed": PLAIN.replace(embedding=EmbeddingSpec(norm=LayerNorm())),
    "qk_norm": PLAIN.changed({f"{BLOCK}.attention.qk_norm": QkNorm(norm=RmsNorm()).model_dump()}),
    "both": PLAIN.at(f"{BLOCK}.norm_position", "both"),
    "experts": PLAIN.at(f"{BLOCK}.feed_forward", EXPERTS.model_dump()),
    "head_dim": PLAIN.at(f"{BLOCK}.attention.head_dim", 16),
}
CONSTANTS = {"embedding": 2.0, "hidden": 0.75, "output": 3.0}
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)


def made(spec: TransformerSpec, **compute) -> Transformer:
    return Transformer(spec, ComputeSpec(**compute), rngs=jax.random.key(0))


@pytest.mark.parametrize("form", ["untied", "both", "experts"])
def test_the_base_width_is_the_standard_parametrisation(form):
    spec = FORMS[form]
    ours, theirs = made(spec.replace(mup=Mup(base_width=32))), made(spec)
    for name, leaf in named_parameters(theirs).items():
        np.testing.assert_array_equal(named_parameters(ours)[name], leaf, err_msg=name)
    np.testing.assert_array_equal(ours(TOKENS), theirs(TOKENS))


@pytest.mark.parametrize("form", FORMS)
def test_folded_it_is_the_same_function_without_mup(form):
    spec = FORMS[form].replace(mup=Mup(base_width=16, **CONSTANTS))
    model = made(spec)
    named = {name: np.asarray(leaf) for name, leaf in named_parameters(model).items()}
    named |= {n: x + 0.1 for n, x in named.items() if n.endswith((".b", ".bias"))}
    wanted = from_named_parameters(spec, named)(TOKENS)
    plain, weights = folded(spec, named)
    assert plain.mup is None
    assert not np.allclose(wanted, from_named_parameters(plain, named)(TOKENS), rtol=1e-2)
    found = from_named_parameters(plain, weights)(TOKENS)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_factor_that_no_weight_takes_in_is_refused():
    bare = PLAIN.changed({"decoder.final_norm": None, "mup": {"base_width": 8}})
    with pytest.raises(AssayError, match=r"mup: there is no final_norm\.scale to take"):
        folded(bare, named_parameters(made(bare)))


def test_matrices_begin_smaller_and_scores_and_logits_are_divided():
    wide = PLAIN.at_width(128)
    ours, standard = made(wide.replace(mup=Mup(base_width=32))), made(wide)
    for name, leaf in named_parameters(standard).items():
        matrix = leaf.ndim > 1 and "table" not in name
        np.testing.assert_allclose(
            named_parameters(ours)[name], leaf / (2.0 if matrix else 1.0), rtol=1e-6
        )
    # A head is 4 times as wide: 1/32 where the base has 1/sqrt(8).
    assert ours.layers[0].attention.scale == pytest.approx(8**0.5 / 32)
    assert ours.head.scale == 0.25
    by_fan_in = wide.changed({"init.weights": "fan_in", "mup": {"base_width": 32}})
    named = named_parameters(made(by_fan_in))
    # What falls with the fan-in already is left.
    assert float(jnp.std(named["layers.0.feed_forward.up.0.w"])) == pytest.approx(
        128**-0.5, rel=0.02
    )


@pytest.mark.parametrize("scan", [False, True])
def test_rates_follow_what_each_parameter_has_grown_by(scan):
    """AdamW's as 1 / fan-in; Muon's as it is, but where the outputs do not grow: the router."""
    spec = FORMS["experts"].at_width(128).replace(mup=Mup(base_width=32))
    model = made(spec, scan_layers=scan)
    form = layout(spec, model.compute)
    kinds, grown = parameter_kinds(model), growth(model)

    def rates(optimizer) -> dict[str, float]:
        factors = width_factors(optimizer, kinds, grown)
        return {
            name: float(np.ravel(leaf)[0])
            for name, leaf in name_leaves(
                jax.tree.map(lambda p, f: jnp.full(p.shape[:1], f), params, factors), form
            ).items()
        }

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    adam, muon = rates(RunSpec(model=spec).optimizer), rates(MuonSpec())
    for name in adam:
        router = "router" in name
        matrix = name.endswith(".w")
        assert adam[name] == (0.25 if matrix else 1.0), name
        assert muon[name] == (0.5 if router else 1.0), name


def test_another_width_keeps_ratios():
    experts = FORMS["experts"].at_width(64)
    assert experts.decoder.pattern[0].feed_forward.expert.hidden == 32
    assert experts.decoder.pattern[0].attention.heads == 4
    more = FORMS["head_dim"].at_width(64).decoder.pattern[0].attention
    assert (more.heads, more.kv_heads, more.head_dim) == (8, 4, 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mup": {"base_width": 12, "embedding": 1.0}}, "hidden|kv_heads|heads"),
        ({"mup": {"base_width": 3}}, "mup.base_width: found 3, but there is no such model"),
    ],
)
def test_a_base_that_cannot_be_made_is_refused(change, says):
    with pytest.raises(AssayError, match=says):
        PLAIN.at(f"{BLOCK}.feed_forward.hidden", 65).changed(change)


def test_what_mup_does_not_know_is_refused():
    with pytest.raises(AssayError, match="mup: a table of logits has no width"):
        presets.get("bigram").model.at("mup", {"base_width": 8})
    spec = PLAIN.replace(mup=Mup(base_width=8))
    with pytest.raises(AssayError, match=r"optimizer\.kind: found sgd"):
        RunSpec(model=spec, optimizer={"kind": "sgd"})
    assert presets.shrink(presets.get("nano").model.at("mup", {"base_width": 64})).mup
