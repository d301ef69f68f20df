"""Every preset passes every check, and each check fails on a model broken on purpose."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.errors import AssayError
from assay.evaluate import checks
from assay.evaluate.checks import check
from assay.model.layers import Linear
from assay.model.sharding import constant_parameter
from assay.model.transformer import Source, Transformer
from assay.spec import presets
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerNorm,
    LearnedPositions,
    MlpSpec,
    NormalInit,
    QkNorm,
    RmsNorm,
    Rope,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import ComputeSpec

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SHRUNK = {presets.shrink(preset.model): name for name, preset in presets.PRESETS.items()}


@pytest.mark.parametrize("name", SHRUNK.values())
def test_every_preset_passes(name):
    report = check(name)
    assert report.passed, [c for c in report.checks if not c.passed]
    reads = presets.get(name).model.encoder is not None
    assert [c.name for c in report.checks] == [
        "causality_values",
        "causality_gradient",
        "cache_equality",
        *(["sees_the_source", "source_padding_is_hidden"] if reads else []),
        "batch_independence",
        "gradients_reach",
        "finite_bf16",
    ]
    assert report["batch_independence"].note == "bit-exact"


def tiny(attention=None, **fields) -> TransformerSpec:
    block = BlockSpec(
        attention=attention or AttentionSpec(heads=2),
        feed_forward=MlpSpec(hidden=24),
        norm=RmsNorm(),
    )
    defaults = {
        "vocab_size": 17,
        "d_model": 16,
        "context": 12,
        "decoder": StackSpec(pattern=(block,), num_layers=1, final_norm=RmsNorm()),
        "embedding": EmbeddingSpec(positions=LearnedPositions()),
    }
    return TransformerSpec(**{**defaults, **fields})


SPEC = tiny()


def test_all_that_is_rare_at_once_passes():
    spec = tiny(
        AttentionSpec(heads=4, kv_heads=2, window=5, softcap=3.0, dropout=0.1),
        context=70,  # longer than the sample: some positions are never reached
        vocab_size=61,
        vocab_multiple=16,
        head=HeadSpec(tied=False, bias=True, softcap=10.0),
    )
    report = check(
        spec, compute=ComputeSpec(scan_layers=True, remat="block", dtype="bfloat16"), seed=3
    )
    assert report.passed, report
    note = report["gradients_reach"].note
    assert "head.w: these rows only pad the vocabulary" in note
    assert "embedding.positions: these places are not in the batch" in note


# ---------------------------------------------------------------------------- broken models


def broken(cls, spec=SPEC):
    return checks.at_random(nnx.eval_shape(lambda: cls(spec, rngs=jax.random.key(0))), 0)


def failures(model, *names):
    """Of the named checks those that fail, by name."""
    sample = checks.Sample(model.spec, 0)
    found = (getattr(checks, name)(model, sample) for name in names)
    return {check.name: check for check in found if not check.passed}


CAUSALITY = ("causality_values", "causality_gradient")


def test_a_stack_that_is_not_causal():
    model = broken(Transformer, SPEC.replace(decoder=SPEC.decoder.replace(causal=False)))
    failed = failures(model, *CAUSALITY, "cache_equality")
    assert {*failed} == {*CAUSALITY, "cache_equality"}
    assert "logits of token" in failed["causality_values"].where
    assert "gradient by the embedding of token" in failed["causality_gradient"].where


ENCODER = SPEC.replace(decoder=SPEC.decoder.replace(causal=False))
READING = tiny(
    decoder=StackSpec(
        pattern=(SPEC.decoder.pattern[0].replace(cross=AttentionSpec(heads=2, qkv_bias=True)),),
        num_layers=2,
    ),
    encoder=StackSpec(pattern=SPEC.decoder.pattern, num_layers=1, causal=False),
    source_embedding=EmbeddingSpec(positions=LearnedPositions()),
    head=HeadSpec(tied=False),
    vocab_multiple=16,
)


@pytest.mark.parametrize("how", [{}, {"scan_layers": True, "remat": "block"}], ids=str)
def test_a_model_that_only_encodes(how):
    local = AttentionSpec(heads=2, window=3)
    for spec in (ENCODER, tiny(local, decoder=tiny(local).decoder.replace(causal=False))):
        report = check(spec, compute=ComputeSpec(**how))
        assert report.passed, report
        assert [c.name for c in report.checks][:2] == ["sees_both_ways", "padding_is_hidden"]


def test_an_encoder_decoder_with_all_of_its_own():
    report = check(READING, compute=ComputeSpec(scan_layers=True, remat="block"))
    assert report.passed, report
    note = report["gradients_reach"].note
    assert "layers.1.cross.k.b: it cancels in the softmax" in note
    assert "source_embedding.table: these tokens are not in the batch" in note


class SeesOneWay(Transformer):
    """An encoder with the mask of a decoder."""

    def geometry(self, positions, d_model, **options):
        shared = super().geometry(positions, d_model, **options)
        hidden = jnp.triu(jnp.full((1, 1, *[len(positions)] * 2), -1e30), k=1)
        biases = {
            k: v + hidden.reshape((1,) * (v.ndim - 2) + v.shape[-2:])
            for k, v in shared.biases.items()
        }
        return replace(shared, biases=biases)


def test_an_encoder_that_sees_one_way():
    failed = failures(broken(SeesOneWay, ENCODER), "sees_both_ways", "padding_is_hidden")
    assert {*failed} == {"sees_both_ways"}
    assert "logits of token 0 do not see token 1" in failed["sees_both_ways"].where


class ReadsPadding(Transformer):
    """The source's mask goes no further than the encoder."""

    def _encode(self, source, mask, key, train):
        read, routing = super()._encode(source, mask, key, train)
        return replace(read, mask=jnp.ones_like(read.mask)), routing


class EncodesPadding(Transformer):
    """The encoder does not hide it from itself."""

    def _encode(self, source, mask, key, train):
        read, routing = super()._encode(source, None, key, train)
        return replace(read, mask=mask), routing


class SeesHalfTheSource(Transformer):
    def _encode(self, source, mask, key, train):
        read, routing = super()._encode(source, mask, key, train)
        kept = jnp.arange(source.shape[1])[None, :] % 2 == 0
        return Source(jnp.where(kept[..., None], read.hidden, 0), read.mask), routing


READS = ("sees_the_source", "source_padding_is_hidden")


@pytest.mark.parametrize("cls", [ReadsPadding, EncodesPadding])
def test_padding_that_is_read(cls):
    failed = failures(broken(cls, READING), *READS)
    assert {*failed} == {*READS}
    assert "padding" in failed["sees_the_source"].where


def test_a_source_that_is_half_seen():
    spec = READING.at("encoder.pattern.0.attention", None)
    failed = failures(broken(SeesHalfTheSource, spec), *READS)
    assert {*failed} == {"sees_the_source"}
    assert "no gradient by source token 1" in failed["sees_the_source"].where


class NeverReads(Transformer):
    """Cross-attention's output is thrown away: its weights get no gradient."""

    def run(self, x, shared, cache, key, source=None, **experts):
        return super().run(x, shared, cache, key, source * 0, **experts)


def test_an_encoder_that_is_never_read():
    failed = failures(broken(NeverReads, READING), "gradients_reach", *READS)
    assert {*failed} == {"gradients_reach", "sees_the_source"}
    assert "encoder.layers.0" in failed["gradients_reach"].where


class EncodesAgain(Transformer):
    """Decoding goes on with another source's keys and values."""

    def remember(self, source, dtype):
        return super().remember(replace(source, hidden=source.hidden[::-1]), dtype)


def test_a_cache_of_another_source():
    failed = failures(broken(EncodesAgain, READING), "cache_equality", "causality_values")
    assert {*failed} == {"cache_equality"}


class LeaksInTraining(Transformer):
    """Its training forward alone sees the mean of the sequence, faintly."""

    def hidden(self, tokens, *, key=None, **rest):
        x, cache = super().hidden(tokens, key=key, **rest)
        if key is not None:
            x = x + 1e-3 * jnp.mean(x, axis=1, keepdims=True)
        return x, cache


def test_a_leak_in_training_alone():
    failed = failures(broken(LeaksInTraining), *CAUSALITY, "cache_equality")
    assert {*failed} == {*CAUSALITY}
    assert failed["causality_values"].where.startswith("training forward")
    assert failed["causality_gradient"].where.startswith("training forward")


class LeaksOneAhead(Transformer):
    """Each token sees the next."""

    def hidden(self, tokens, **rest):
        x, cache = super().hidden(tokens, **rest)
        return x + jnp.roll(x, -1, axis=1), cache


def test_where_a_leak_is():
    failed = failures(broken(LeaksOneAhead), *CAUSALITY)
    words = failed["causality_values"].where.split()
    moved, changed = words[words.index("token") + 1], words[-2]
    assert int(moved) + 1 == int(changed) or words[-1] == "changed"
    words = failed["causality_gradient"].where.split()
    assert int(words[5]) + 1 == int(words[-1]), words


class LeaksTooLittleToSee(Transformer):
    """A leak far below float32's rounding: only the gradient tells."""

    def hidden(self, tokens, **rest):
        x, cache = super().hidden(tokens, **rest)
        return x + 1e-12 * jnp.mean(x, axis=1, keepdims=True), cache


def test_a_leak_below_rounding():
    assert {*failures(broken(LeaksTooLittleToSee), *CAUSALITY)} == {"causality_gradient"}


class SeesOnlyItself(Transformer):
    """Nothing of the past arrives."""

    def hidden(self, tokens, *, positions=None, key=None, **rest):
        return self.embedding(tokens, jnp.zeros((1, 1), jnp.int32), None), None


def test_no_sight_of_the_past():
    failed = failures(broken(SeesOnlyItself), *CAUSALITY)
    assert {*failed} == {"causality_gradient"}
    assert "no gradient by any earlier embedding" in failed["causality_gradient"].where


class CacheOffByOne(Transformer):
    """While decoding, tokens are taken to stand one place further on."""

    def hidden(self, tokens, *, cache=None, positions=None, **rest):
        if cache is not None and tokens.shape[1] == 1:
            positions = cache.lengths[:, None] + 1
        return super().hidden(tokens, cache=cache, positions=positions, **rest)


def test_a_cache_off_by_one():
    failed = failures(broken(CacheOffByOne), *CAUSALITY, "cache_equality")
    assert {*failed} == {"cache_equality"}
    assert failed["cache_equality"].where.startswith("decoding")


class MixesTheBatch(Transformer):
    """Each row has something of the batch's mean."""

    def hidden(self, tokens, **rest):
        x, cache = super().hidden(tokens, **rest)
        return x + 0.01 * jnp.mean(x, axis=0, keepdims=True), cache


def test_rows_that_depend_on_each_other():
    failed = failures(broken(MixesTheBatch), "batch_independence")
    assert "when the other rows changed" in failed["batch_independence"].where


class HasADeadParameter(Transformer):
    def __init__(self, *arguments, **rest):
        super().__init__(*arguments, **rest)
        self.dead = constant_parameter((3,), (None,), 0.0)


def test_a_dead_parameter():
    failed = failures(broken(HasADeadParameter), "gradients_reach")
    assert failed["gradients_reach"].where == "dead gets no gradient"


class HasADeadLayer(Transformer):
    """A gradient stopped in the second layer's feed-forward."""

    def __init__(self, spec, **rest):
        super().__init__(spec, **rest)
        like = {"axes": ("mlp", "embed"), "init": NormalInit(), "bias": False}
        self.layers[1].feed_forward.down = Stopped(
            jax.random.key(0), 24, spec.d_model, compute=ComputeSpec(), **like
        )


class Stopped(Linear):
    def __call__(self, x):
        return jax.lax.stop_gradient(super().__call__(x))


def test_a_dead_layer():
    spec = SPEC.replace(decoder=SPEC.decoder.replace(num_layers=2))
    where = failures(broken(HasADeadLayer, spec), "gradients_reach")["gradients_reach"].where
    assert "layers.1.feed_forward.up.0.w gets no gradient" in where
    assert "layers.0" not in where


class NeverReadsOneRow(Transformer):
    """One token reads another's row of the table: every row but its own has a gradient."""

    def hidden(self, tokens, **rest):
        first = tokens[0, 0]
        return super().hidden(jnp.where(tokens == first, (first + 1) % 17, tokens), **rest)


def test_a_dead_row():
    spec = SPEC.replace(head=HeadSpec(tied=False))
    failed = failures(broken(NeverReadsOneRow, spec), "gradients_reach")
    row = checks.Sample(spec, 0).tokens[0, 0]
    assert failed["gradients_reach"].where == f"embedding.table[{row}] gets no gradient"


BIASED = AttentionSpec(heads=2, qkv_bias=True)
LAYERNORMED = QkNorm(norm=LayerNorm())


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        (BIASED, "attention.k.b"),
        (BIASED.replace(qk_norm=LAYERNORMED), "attention.k_norm.bias"),
        (BIASED.replace(positions=Rope()), None),
        (BIASED.replace(qk_norm=QkNorm()), None),
        (BIASED.replace(qk_norm=LAYERNORMED, positions=Rope()), None),
        (BIASED.replace(softcap=2.0), None),
    ],
    ids=["plain", "layernorm", "rope", "rmsnorm", "layernorm-rope", "softcap"],
)
def test_when_a_key_bias_cancels(attention, name):
    spec = tiny(attention)
    result = checks.gradients_reach(broken(Transformer, spec), checks.Sample(spec, 0))
    assert result.passed, result
    assert (name is None) == ("cancels" not in result.note)
    assert name is None or name in result.note


class UsesItsKeyBias(Transformer):
    """The key bias also goes another way, so the exception no longer holds."""

    def hidden(self, tokens, **rest):
        x, cache = super().hidden(tokens, **rest)
        return x + self.layers[0].attention.k.b[...].reshape(1, 1, -1), cache


def test_an_exception_that_has_a_gradient():
    failed = failures(broken(UsesItsKeyBias, tiny(BIASED)), "gradients_reach")
    assert failed["gradients_reach"].where == (
        "layers.0.attention.k.b has a gradient, though it cancels in the softmax"
    )


class OverflowsInBf16(Transformer):
    """Float32's largest number rounds up to bfloat16's infinity."""

    def hidden(self, tokens, **rest):
        x, cache = super().hidden(tokens, **rest)
        return x + 0 * jnp.float32(np.finfo(np.float32).max).astype(x.dtype), cache


def test_an_overflow_in_bf16():
    failed = failures(broken(OverflowsInBf16), "causality_values", "finite_bf16")
    assert {*failed} == {"finite_bf16"}
    assert failed["finite_bf16"].where == "logits"


class CountsInBf16(Transformer):
    """Finite, but wrong: bfloat16 has no odd numbers beyond 256, and positions collide."""

    def hidden(self, tokens, *, positions=None, **rest):
        far = 256 + jnp.arange(tokens.shape[1], dtype=self.compute.dtype)
        return super().hidden(tokens, positions=far.astype(jnp.int32)[None] - 256, **rest)


def test_positions_that_collide_in_bf16():
    failed = failures(broken(CountsInBf16), "finite_bf16")
    assert failed["finite_bf16"].worst > 0.1


class NotANumber(Transformer):
    def logits(self, x):
        return super().logits(x) + jnp.nan


def test_not_a_number_passes_nothing():
    names = ("causality_values", "cache_equality", "batch_independence", "gradients_reach")
    assert {*failures(broken(NotANumber), *names, "finite_bf16")} == {*names, "finite_bf16"}


def test_a_model_at_its_beginning_is_no_fault():
    """Residual projections that begin at 0 stop gradients: those are checked at random weights."""
    spec = SPEC.replace(init=SPEC.init.replace(residual="zero"))
    assert check(Transformer(spec, rngs=jax.random.key(0))).passed


def test_an_unknown_preset():
    with pytest.raises(AssayError, match="did you mean 'gpt2'"):
        check("gpt-2")
