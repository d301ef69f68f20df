"""Specs are frozen data, JSON both ways, and say in a sentence what is wrong with them."""

import inspect
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from assay.errors import AssayError
from assay.spec import model, run
from assay.spec.base import Spec
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    InitSpec,
    LayerNorm,
    Llama3Scaling,
    MlpSpec,
    MoeSpec,
    RmsNorm,
    Rope,
    StackSpec,
    TransformerSpec,
    YarnScaling,
)
from assay.spec.presets import PRESETS, get
from assay.spec.run import BpeTokenizerSpec, DataSpec, MeshSpec, RunSpec, SourceSpec, TrainSpec

CLASSES = [
    cls
    for module in (model, run)
    for _, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, Spec) and cls.__module__ == module.__name__
]
BLOCK = BlockSpec(
    attention=AttentionSpec(
        heads=4, positions=Rope(scaling=YarnScaling(factor=4, original_context=64))
    ),
    feed_forward=MlpSpec(hidden=64),
)
MODEL = TransformerSpec(
    vocab_size=100, d_model=32, context=64, decoder=StackSpec(pattern=(BLOCK,), num_layers=2)
)
RUN = RunSpec(model=MODEL)
EXPERTS = {"experts": 4, "expert": {"hidden": 8}}


def routed(router: dict) -> dict:
    """A block of experts, as data."""
    return {"attention": None, "feed_forward": {"kind": "moe", **EXPERTS, "router": router}}


def complaint(call, *arguments, **fields) -> str:
    """The message of the AssayError that a call raises; it must be one plain sentence."""
    with pytest.raises(AssayError) as raised:
        call(*arguments, **fields)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith((".", "?", ".)")), message
    assert "validation error" not in message
    assert "pydantic" not in message
    assert raised.value.__cause__ is None  # no second traceback under it
    return message


# ---------------------------------------------------------------------------- data


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    spec = get(name).run
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == spec.to_json()
    assert RunSpec.from_json(spec.to_json(indent=None)) == spec
    assert RunSpec.from_data(json.loads(spec.to_json())) == spec
    assert spec.preset == name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_frozen_closed_and_documented(cls):
    assert cls.model_config["frozen"]
    assert cls.model_config["extra"] == "forbid"
    assert cls.__doc__


def test_a_field_cannot_be_set():
    with pytest.raises(Exception, match="frozen"):
        MODEL.d_model = 64
    with pytest.raises(Exception, match="frozen"):
        MODEL.decoder.pattern[0].attention.heads = 8
    with pytest.raises(TypeError):
        MODEL.decoder.pattern[0] = BLOCK


def test_equal_specs_are_one_key():
    assert {MODEL: 1}[TransformerSpec.from_json(MODEL.to_json())] == 1
    assert MODEL.at("d_model", 64) not in {MODEL}


def test_replace_validates():
    assert MODEL.replace(d_model=64).d_model == 64
    assert "d_model" in complaint(MODEL.replace, d_model=33)
    assert MODEL.replace() == MODEL


# ---------------------------------------------------------------------------- at


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model.d_model", 64, lambda r: r.model.d_model == 64),
        ("model.decoder.num_layers", 3, lambda r: r.model.decoder.num_layers == 3),
        ("model.decoder.pattern.0.attention.heads", 8, lambda r: _attention(r).heads == 8),
        ("model.decoder.pattern.*.attention.heads", 8, lambda r: _attention(r).heads == 8),
        ("model.decoder.pattern.0.attention", None, lambda r: _attention(r) is None),
        ("model.decoder.pattern.0.norm.kind", "layernorm", lambda r: _norm(r) == LayerNorm()),
        ("model.decoder.pattern.0.norm", "layernorm", lambda r: _norm(r) == LayerNorm()),
        (
            "model.decoder.pattern.0.norm",
            {"epsilon": 1e-3, "kind": "rmsnorm"},
            lambda r: _norm(r) == RmsNorm(epsilon=1e-3),
        ),
        ("model.decoder.final_norm", {"kind": "rmsnorm"}, lambda r: r.model.decoder.final_norm),
        (
            "model.decoder.pattern.0.feed_forward.hidden",
            [8, 16],
            lambda r: _mlp(r).widths == (8, 16),
        ),
        ("optimizer", "muon", lambda r: r.optimizer.ns_steps == 5),
        ("schedule.kind", "wsd", lambda r: r.schedule.decay == 0.2),
        (
            "data.sources.0.corpus",
            "x.txt",
            lambda r: r.data.sources == (SourceSpec(corpus="x.txt"),),
        ),
        ("optimizer.lr", "3e-4", lambda r: r.optimizer.lr == 3e-4),  # as a command gives it
        ("seed", "7", lambda r: r.seed == 7),
    ],
)
def test_at_changes_one_thing(path, value, expected):
    changed = RUN.at(path, value)
    assert expected(changed)
    assert changed != RUN
    assert RunSpec(model=MODEL) == RUN  # and not the original


def _block(run):
    return run.model.decoder.pattern[0]


def _attention(run):
    return _block(run).attention


def _norm(run):
    return _block(run).norm


def _mlp(run):
    return _block(run).feed_forward


def test_changes_are_validated_together():
    changes = {"model.d_model": 36, "model.decoder.pattern.0.attention.heads": 6}
    assert RUN.changed(changes).model.d_model == 36
    complaint(RUN.changed, {"model.d_model": 35})


def test_the_fields_of_a_new_kind_follow_it():
    changed = RUN.changed({"optimizer": "muon", "optimizer.ns_steps": 3})
    assert changed.optimizer.ns_steps == 3


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("modle.d_model", 64, ["modle", "'model'"]),
        ("model.d_modle", 64, ["d_modle", "'d_model'"]),
        ("model.num_layers", 3, ["num_layers", "decoder.num_layers"]),
        ("model.heads", 3, ["heads", "decoder.pattern.0.attention.heads"]),
        ("model.decoder.pattern.0.attention.hedas", 8, ["hedas", "'heads'"]),
        ("model.decoder.pattern.*.attention.hedas", 8, ["hedas", "'heads'"]),
        ("model.decoder.pattern.7.attention.heads", 8, ["'7'", "0", "*"]),
        ("model.decoder.pattern.first.attention.heads", 8, ["'first'", "0", "*"]),
        ("model.d_model.x", 1, ["d_model", "32", "no fields"]),
        ("model.decoder.final_norm.scale", True, ["final_norm", "None", "as a whole"]),
        ("model.d_model", 0, ["model.d_model", "0", "greater than 0"]),
        ("model.d_model", "wide", ["model.d_model", "'wide'", "integer"]),
        ("model.d_model", 33, ["model.decoder.pattern.0.attention.heads", "4", "33"]),
        ("model.decoder", 3, ["model.decoder", "3"]),
        ("model.decoder.pattern.0.norm_position", "pst", ["norm_position", "'pst'", "'post'"]),
        (
            "model.decoder.pattern.0.norm.kind",
            "layernrom",
            ["norm.kind", "'layernrom'", "'layernorm'"],
        ),
        ("model.decoder.pattern.0.norm", "layernrom", ["norm.kind", "'layernrom'", "'layernorm'"]),
        ("model.decoder.pattern.0.attention.positions", "ropes", ["positions.kind", "'rope'"]),
        ("model.decoder.pattern.0.attention.kv_heads", 3, ["attention.kv_heads", "3", "4"]),
        ("model.decoder.pattern.0.dropout", 1.0, ["dropout", "1.0", "less than 1"]),
        ("optimizer", "adam", ["optimizer.kind", "'adam'", "'adamw'"]),
        ("train.accumulate", 3, ["train.accumulate", "3", "16"]),
        ("train.log_every", 11, ["train.log_every", "11", "10"]),
        ("mesh.data", 3, ["mesh", "3", "16"]),
        ("data.sources", [], ["data.sources", "at least one"]),
        ("optimizer", {"lr": 0.1}, ["optimizer.kind: this field is required"]),
        ("data.packing", "document", ["data.packing", "'documents'"]),
    ],
)
def test_at_says_what_is_wrong(path, value, said):
    message = complaint(RUN.at, path, value)
    for words in said:
        assert words in message, message


# ---------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("cls", "fields", "said"),
    [
        (AttentionSpec, {"heads": 4, "kv_head": 2}, ["kv_head:", "'kv_heads'"]),
        (AttentionSpec, {}, ["heads: this field is required"]),
        (AttentionSpec, {"heads": 4, "kv_heads": 3}, ["kv_heads: found 3", "4"]),
        (AttentionSpec, {"heads": 4, "dropout": -0.1}, ["dropout", "-0.1"]),
        (AttentionSpec, {"heads": 4, "positions": {"kind": "rop"}}, ["positions.kind", "'rope'"]),
        (
            AttentionSpec,
            {"heads": 4, "positions": {"kind": "rope", "thetas": 1.0}},
            ["positions.thetas", "'theta'"],
        ),
        (
            AttentionSpec,
            {"heads": 4, "positions": {"kind": "rope", "scaling": {"kind": "yarn", "factor": 2}}},
            ["positions.scaling.original_context", "required"],
        ),
        (
            AttentionSpec,
            {"heads": 4, "positions": {"kind": "rope", "scaling": {"kind": "linear", "factr": 2}}},
            ["positions.scaling.factr", "'factor'"],
        ),
        (Llama3Scaling, {"low_freq_factor": 4.0}, ["high_freq_factor: found 4.0", "4.0"]),
        (YarnScaling, {"factor": 0.5, "original_context": 8}, ["factor", "0.5", "1"]),
        (MlpSpec, {"hidden": ()}, ["hidden", "empty"]),
        (MlpSpec, {"hidden": (8, 16), "gated": True}, ["hidden", "gated"]),
        (MlpSpec, {"hidden": 0}, ["hidden", "0"]),
        (MlpSpec, {"hidden": (8, -1)}, ["hidden", "-1"]),
        (MlpSpec, {"hidden": 8, "activation": "gelu_tan"}, ["activation", "'gelu_tanh'"]),
        (MoeSpec, {**EXPERTS, "experts": 1}, ["experts", "1", "2"]),
        (MoeSpec, {**EXPERTS, "router": {"kind": "top_k", "k": 5}}, ["router.k: found 5", "4"]),
        (MoeSpec, {**EXPERTS, "router": {"kind": "topk"}}, ["router.kind", "'top_k'"]),
        (
            MoeSpec,
            {**EXPERTS, "router": {"kind": "soft"}, "capacity": {"load": 1.0}},
            ["capacity", "soft"],
        ),
        (MoeSpec, {**EXPERTS, "router": {"kind": "soft"}, "z_loss": 1.0}, ["z_loss: found 1.0"]),
        (
            MoeSpec,
            {**EXPERTS, "router": {"kind": "expert_choice"}, "balance_loss": 0.1},
            ["balance_loss: found 0.1", "expert_choice"],
        ),
        (
            MoeSpec,
            {**EXPERTS, "router": {"kind": "expert_choice", "load": 5.0}},
            ["router.load: found 5.0", "4"],
        ),
        (
            StackSpec,
            {"pattern": (routed({"kind": "expert_choice"}),), "num_layers": 1},
            ["pattern.0.feed_forward.router", "causal", "top-k"],
        ),
        (
            StackSpec,
            {"pattern": (routed({"kind": "soft", "over": "sequence"}),), "num_layers": 1},
            ["pattern.0.feed_forward.router", "causal", "over='token'"],
        ),
        (BlockSpec, {"attention": None, "feed_forward": None}, ["neither"]),
        (StackSpec, {"pattern": (), "num_layers": 2}, ["pattern", "at least one"]),
        (StackSpec, {"pattern": (BLOCK, BLOCK), "num_layers": 1}, ["pattern", "2", "1"]),
        (StackSpec, {"pattern": (BLOCK,), "num_layers": -1}, ["num_layers", "-1"]),
        (
            StackSpec,
            {"pattern": ({"attention": {"hedas": 2}, "feed_forward": None},), "num_layers": 1},
            ["pattern.0.attention.hedas", "'heads'"],
        ),
        (EmbeddingSpec, {"positions": {"kind": "rope"}}, ["positions.kind", "'rope'", "learned"]),
        (InitSpec, {"weights": {"kind": "norml"}}, ["weights.kind", "'normal'"]),
        (InitSpec, {"residual": "depth"}, ["residual", "'depth'"]),
        (BpeTokenizerSpec, {"vocab_size": 256}, ["vocab_size", "256", "257"]),
        (DataSpec, {"held_out": 1.0}, ["held_out", "1.0"]),
        (TrainSpec, {"budget": {"units": "steps"}}, ["budget.units", "'unit'"]),
        (MeshSpec, {"data": 1.5}, ["data", "1.5"]),
        (RunSpec, {}, ["model", "required"]),
        (
            RunSpec,
            {"model": MODEL, "optimizer": {"kind": "adamw", "weight_dcay": 1}},
            ["optimizer.weight_dcay", "'weight_decay'"],
        ),
    ],
)
def test_construction_says_what_is_wrong(cls, fields, said):
    for make in (lambda: cls(**fields), lambda: cls.from_data(fields)):
        message = complaint(make)
        for words in said:
            assert words in message, message


def test_a_model_without_a_head_is_its_vocabulary():
    bare = {
        "d_model": 8,
        "context": 8,
        "decoder": StackSpec(pattern=(), num_layers=0),
        "head": None,
    }
    message = complaint(TransformerSpec, vocab_size=9, **bare)
    assert "d_model: found 8" in message
    assert "9" in message
    assert TransformerSpec(vocab_size=8, **bare).with_vocab(5).d_model == 5


def test_widths_that_positions_need_even():
    odd = MODEL.decoder.pattern[0].attention.replace(head_dim=7)
    message = complaint(MODEL.at, "decoder.pattern.0.attention", odd.model_dump())
    assert "decoder.pattern.0.attention.head_dim: found 7" in message
    plain = StackSpec(pattern=(BLOCK.replace(attention=None),), num_layers=1)
    sines = EmbeddingSpec(positions={"kind": "sinusoidal"})
    message = complaint(
        TransformerSpec, vocab_size=9, d_model=9, context=8, decoder=plain, embedding=sines
    )
    assert "d_model: found 9" in message


def test_a_sequence_longer_than_its_learned_positions():
    learned = MODEL.at("embedding.positions", "learned")
    message = complaint(RunSpec, model=learned, data=DataSpec(seq_len=65))
    assert "data.seq_len: found 65" in message
    assert "64" in message


@pytest.mark.parametrize(
    "router", [{"kind": "expert_choice"}, {"kind": "soft", "over": "sequence"}]
)
def test_routers_that_see_the_future_are_for_encoders(router):
    stack = {"pattern": (routed(router),), "num_layers": 1, "causal": False}
    assert StackSpec(**stack).pattern[0].feed_forward.router.kind == router["kind"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "{}", '{"model": 3}', "\0"])
def test_json_that_is_no_spec(text):
    complaint(RunSpec.from_json, text)
    complaint(RunSpec.from_json, text.encode())


def test_an_unknown_preset():
    assert "'tiny-gpt'" in complaint(get, "tinygpt")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("path", ["optimizer.lr", "train.target_loss", "model.init.weights.std"])
def test_no_field_is_infinite_or_no_number(path, value):
    """JSON has no such numbers, so they could not come back."""
    assert path in complaint(RUN.at, path, value)


# ---------------------------------------------------------------------------- any field at all


def paths(data, prefix: str = "") -> list[str]:
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for name, value in entries:
        found.append(f"{prefix}{name}")
        if isinstance(value, dict | list):
            found += paths(value, f"{prefix}{name}.")
    return found


PATHS = {name: paths(get(name).run.model_dump(mode="json")) for name in PRESETS}


@settings(max_examples=200)
@given(st.data())
def test_a_misspelt_field_is_answered_with_the_right_one(data):
    """One letter lost, anywhere in any preset: the sentence names the field that was meant."""
    name = data.draw(st.sampled_from([*PRESETS]))
    path = data.draw(st.sampled_from([p for p in PATHS[name] if not p.split(".")[-1].isdigit()]))
    *parents, field = path.split(".")
    assume(len(field) >= 4)
    at = data.draw(st.integers(0, len(field) - 1))
    wrong = field[:at] + field[at + 1 :]
    spec = get(name).run
    siblings = {p.split(".")[-1] for p in PATHS[name] if p.split(".")[:-1] == parents}
    assume(wrong not in siblings)
    message = complaint(spec.at, ".".join([*parents, wrong]), 1)
    assert f"'{field}'" in message


@settings(max_examples=300)
@given(st.data())
def test_any_value_anywhere_is_taken_or_refused_in_a_sentence(data):
    name = data.draw(st.sampled_from([*PRESETS]))
    path = data.draw(st.sampled_from(PATHS[name]))
    texts, numbers = st.text(max_size=5), st.integers()
    plain = st.one_of(st.none(), st.booleans(), numbers, st.floats(), texts)
    value = data.draw(plain | st.lists(plain, max_size=2) | st.dictionaries(texts, plain))
    try:
        changed = get(name).run.at(path, value)
    except AssayError:
        complaint(get(name).run.at, path, value)
    else:
        assert RunSpec.from_json(changed.to_json()) == changed
