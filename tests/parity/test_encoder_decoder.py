"""Encoder-decoders against PyTorch's: T5 by its own layout, the 2017 wiring by Marian's.

Small models with random weights; 1e-4 in float32, never relaxed. Marian keeps sines and cosines
in two halves where the paper interleaves them: its weights are ours with the features in another
order. Axes: B batch, S source tokens, T target tokens, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

from assay.generate import engine
from assay.generate.beams import beam_search
from assay.interop.huggingface import (
    from_huggingface,
    load_folder,
    save_folder,
    spec_from_config,
    to_huggingface,
)
from assay.interop.huggingface_config import config_from_spec, family_of
from assay.model.loss import token_losses
from assay.model.positions import distance_buckets, relative_bias
from assay.model.transformer import Transformer, from_named_parameters, named_parameters
from assay.spec import presets
from assay.spec.model import RelativeBias, TransformerSpec
from assay.spec.run import ComputeSpec

TOLERANCE = 1e-4
B, S, T, V = 2, 11, 9, 61
SOURCE_LENGTHS = np.array([[S], [S - 4]])

T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
CONFIGS = {
    "t5": T5,
    "t5-v1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-uneven": T5 | {"num_decoder_layers": 3, "d_kv": 6, "num_heads": 2},
    "t5-silu": T5 | {"feed_forward_proj": "gated-silu"},
}
WAYS = [ComputeSpec(), ComputeSpec(scan_layers=True), ComputeSpec(kernels="plain")]


def every_way(test):
    """Each layout by one way of computing, the first by all."""
    cases = [("t5", way) for way in WAYS]
    cases += [(name, WAYS[i % len(WAYS)]) for i, name in enumerate(CONFIGS) if name != "t5"]
    ids = [f"{name}-{way.kernels}-{way.scan_layers}" for name, way in cases]
    return pytest.mark.parametrize(("layout", "compute"), cases, ids=ids)(test)


@dataclass(frozen=True)
class Example:
    """A model of theirs, its config as in a file, its architecture, and what both are given."""

    theirs: T5ForConditionalGeneration
    config: dict[str, Any]
    spec: TransformerSpec
    source: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray

    def ours(self, compute: ComputeSpec = WAYS[0]) -> Transformer:
        named = from_huggingface(state_of(self.theirs), self.spec, "t5")
        return from_named_parameters(self.spec, named, compute)

    def logits(self) -> torch.Tensor:
        return self.theirs(
            input_ids=torch.from_numpy(self.source),
            attention_mask=torch.from_numpy(self.mask).long(),
            decoder_input_ids=torch.from_numpy(self.tokens),
        ).logits

    @property
    def given(self) -> dict[str, Any]:
        return {"source": jnp.int32(self.source), "source_mask": jnp.asarray(self.mask)}


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def make_noisy(model: torch.nn.Module, std: float) -> None:
    """Weights so large that nothing is hidden in a rounding, norms' and biases among them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape)
            parameter.copy_(noise + (parameter.ndim == 1 and name.endswith("norm.weight")))


@functools.cache
def example(layout: str) -> Example:
    theirs = T5ForConditionalGeneration(T5Config(**CONFIGS[layout]))
    if CONFIGS[layout].get("tie_word_embeddings") is False:  # transformers 5.24 ties them still
        theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(V, CONFIGS[layout]["d_model"]))
    make_noisy(theirs, 0.2)
    with torch.no_grad():
        theirs.shared.weight.mul_(5)
    config = {"model_type": "t5"} | CONFIGS[layout]
    rng = np.random.default_rng(1)
    return Example(
        theirs.eval(),
        config,
        spec_from_config(config),
        rng.integers(0, V, (B, S)),
        np.arange(S) < SOURCE_LENGTHS,
        rng.integers(0, V, (B, T)),
    )


def assert_close(ours, theirs, where: str, tolerance: float = TOLERANCE) -> None:
    ours = np.asarray(ours)
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape, where
    assert theirs.std() > 0.05, f"{where}: too small to tell anything"
    worst = float(np.abs(ours - theirs).max())
    assert worst <= tolerance, f"{where}: differs by {worst:.2e}"


# ---------------------------------------------------------------------------- T5


@every_way
def test_logits(layout, compute):
    ex = example(layout)
    assert_close(ex.ours(compute)(jnp.int32(ex.tokens), **ex.given), ex.logits(), "logits")


def their_parts(model: torch.nn.Module, call) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each module of theirs by name -> its (input, output) in one forward pass."""
    seen, hooks = {}, []

    def record(name):
        def hook(module, args, kwargs, output):
            x = args[0] if args else kwargs.get("hidden_states")
            y = output[0] if isinstance(output, tuple) else output
            if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
                seen[name] = x.numpy(), y.numpy()

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(record(name), with_kwargs=True))
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return seen


@every_way
def test_module_by_module(layout, compute):
    """Each of our modules, given what theirs was given, returns what theirs returned."""
    ex = example(layout)
    theirs = their_parts(ex.theirs, ex.logits)
    model, checked = ex.ours(compute), []

    def check(name, function):
        x, wanted = theirs[name]
        assert_close(function(jnp.asarray(x)), wanted, name)
        checked.append(name)

    places, d = jnp.arange(S, dtype=jnp.int32), ex.spec.d_model
    shared = model.encoder.geometry(places, d, mask=jnp.asarray(ex.mask))
    for i, block in enumerate(model.encoder.unstacked_layers()):
        at = f"encoder.block.{i}.layer"
        check(f"{at}.0.layer_norm", block.attention_norm)
        check(f"{at}.0.SelfAttention", lambda x, block=block: block.attention(x, shared)[0])
        check(f"{at}.1.layer_norm", block.feed_forward_norm)
        check(f"{at}.1.DenseReluDense", block.feed_forward)
    check("encoder.final_layer_norm", model.encoder.final_norm)
    memory = jnp.asarray(theirs["encoder.final_layer_norm"][1])
    places = jnp.arange(T, dtype=jnp.int32)
    shared = model.geometry(places, d, source_mask=jnp.asarray(ex.mask))
    for i, block in enumerate(model.unstacked_layers()):
        at = f"decoder.block.{i}.layer"
        check(f"{at}.0.layer_norm", block.attention_norm)
        check(f"{at}.0.SelfAttention", lambda x, block=block: block.attention(x, shared)[0])
        check(f"{at}.1.layer_norm", block.cross_norm)
        check(
            f"{at}.1.EncDecAttention",
            lambda x, b=block: b.cross.read(x, b.cross.keys_values(memory), shared.source),
        )
        check(f"{at}.2.layer_norm", block.feed_forward_norm)
        check(f"{at}.2.DenseReluDense", block.feed_forward)
    check("decoder.final_layer_norm", model.final_norm)
    assert len(checked) == 2 + 4 * ex.spec.encoder.num_layers + 6 * ex.spec.decoder.num_layers


@pytest.mark.parametrize(
    ("layout", "compute"),
    [("t5", WAYS[0]), ("t5", WAYS[1]), ("t5-v1.1", WAYS[2])],
    ids=["t5-cpu", "t5-scanned", "t5-v1.1-plain"],
)
def test_gradients(layout, compute):
    """Of the mean cross-entropy with respect to every weight, 1e-4 of the largest in it."""
    ex = example(layout)
    targets = np.roll(ex.tokens, -1, axis=1)
    ex.theirs.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        ex.logits().reshape(-1, V), torch.from_numpy(targets).reshape(-1)
    )
    loss.backward()
    wanted = {name: parameter.grad.numpy() for name, parameter in ex.theirs.named_parameters()}

    @jax.jit
    def gradient(model):
        def mean_loss(model):
            logits = model(jnp.int32(ex.tokens), **ex.given)
            return jnp.mean(token_losses(logits, jnp.int32(targets)))

        return jax.grad(mean_loss)(model)

    found = to_huggingface(named_parameters(gradient(ex.ours(compute))), ex.spec, "t5")
    assert wanted.keys() - {"lm_head.weight"} <= found.keys()
    for name, ours in found.items():
        size = np.abs(wanted[name]).max()
        assert size > 0, name
        assert np.abs(ours - wanted[name]).max() <= TOLERANCE * size, name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", [RelativeBias(), RelativeBias(buckets=8, max_distance=20)])
def test_buckets_are_t5s(causal, spec):
    """Every distance up to beyond the last border, in both directions."""
    behind = np.arange(-300, 301)[:, None]
    table = np.arange(spec.buckets, dtype=np.float32)[:, None]
    ours = relative_bias(jnp.asarray(behind), jnp.asarray(table), spec, causal=causal)[0, 0]
    theirs = T5Attention._relative_position_bucket(
        torch.from_numpy(-behind), not causal, spec.buckets, spec.max_distance
    )
    seen = behind >= 0 if causal else np.ones_like(behind, bool)
    np.testing.assert_array_equal(np.asarray(ours)[seen], theirs.numpy()[seen])
    assert len(distance_buckets(spec, causal=causal)) == spec.max_distance + 1


def test_an_encoder_alone():
    """`encode` is T5EncoderModel; so is a model that only encodes: a stack that is not causal."""
    ex = example("t5")
    theirs = T5EncoderModel(T5Config(**T5))
    state = {k: v for k, v in ex.theirs.state_dict().items() if not k.startswith(("dec", "lm"))}
    theirs.load_state_dict(state)
    with torch.no_grad():
        wanted = theirs.eval()(
            input_ids=torch.from_numpy(ex.source), attention_mask=torch.from_numpy(ex.mask).long()
        ).last_hidden_state.numpy()[ex.mask]
    model, mask = ex.ours(), jnp.asarray(ex.mask)
    source = jnp.int32(ex.source)
    assert_close(model.encode(source, mask).hidden[ex.mask], wanted, "encode")
    alone = ex.spec.replace(decoder=ex.spec.encoder, encoder=None)
    named = {
        name.removeprefix("encoder."): value
        for name, value in named_parameters(model).items()
        if name.startswith(("encoder.", "embedding."))
    }
    encoder = from_named_parameters(alone, named)
    assert_close(encoder.hidden(source, mask=mask)[0][ex.mask], wanted, "encoder-only")


@pytest.mark.parametrize("layout", CONFIGS)
def test_our_folder_is_loaded_by_transformers(layout, tmp_path):
    """Nothing missing, nothing unexpected, the same logits; and ours come back unchanged."""
    ex = example(layout)
    named = named_parameters(ex.ours())
    assert family_of(ex.spec) == "t5"
    save_folder(tmp_path / "out", named, ex.spec)
    theirs, about = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert not about["mismatched_keys"]
    with torch.no_grad():
        again = theirs.eval()(
            input_ids=torch.from_numpy(ex.source),
            attention_mask=torch.from_numpy(ex.mask).long(),
            decoder_input_ids=torch.from_numpy(ex.tokens),
        ).logits
    assert_close(again.numpy(), ex.logits(), "logits")
    spec, loaded = load_folder(tmp_path / "out")
    assert spec == ex.spec
    assert loaded.keys() == named.keys()
    assert all(np.array_equal(loaded[name], named[name]) for name in named)
    theirs.save_pretrained(tmp_path / "again")
    spec, loaded = load_folder(tmp_path / "again")
    assert spec.replace(context=512) == ex.spec
    assert all(np.array_equal(loaded[name], named[name]) for name in named)


def test_the_comparison_would_notice():
    ex = example("t5")
    named = named_parameters(ex.ours())
    given = (jnp.int32(ex.tokens), ex.given)
    for path, value in {
        "decoder.pattern.0.attention.positions.max_distance": 12,
        "encoder.pattern.0.attention.positions.max_distance": 12,
        "decoder.pattern.0.cross.scale": 0.9,
        "head.scale_by_inverse_sqrt_width": False,
        "encoder.final_norm.epsilon": 1e-2,
    }.items():
        other = from_named_parameters(ex.spec.at(path, value), named)
        difference = ex.ours()(given[0], **given[1]) - other(given[0], **given[1])
        assert float(jnp.abs(difference).max()) > 2 * TOLERANCE, path


def test_the_preset_is_the_published_one():
    """t5-small's config.json, and what transformers counts for it."""
    config = T5Config().to_dict() | {"model_type": "t5", "n_positions": 512}
    assert spec_from_config(config) == presets.get("t5-small").model
    theirs = T5Config(**config_from_spec(presets.get("t5-small").model))
    with torch.device("meta"):
        count = sum(p.numel() for p in T5ForConditionalGeneration(theirs).parameters())
    assert count == 60_506_624


# ---------------------------------------------------------------------------- 2017


def in_halves(d: int) -> np.ndarray:
    """Marian's feature j is our feature order[j]."""
    return np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])


MARIAN = {"attention": "self_attn", "cross": "encoder_attn"}


def marian_state(spec: TransformerSpec, named: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Our parameters under Marian's names, every axis of the residual stream reordered."""
    order = in_halves(spec.d_model)
    ours = {name: np.asarray(value) for name, value in named.items()}
    table = ours["embedding.table"][:, order]
    source = ours.get("source_embedding.table", ours["embedding.table"])[:, order]
    state = {
        "model.shared.weight": table,
        "model.encoder.embed_tokens.weight": source,
        "model.decoder.embed_tokens.weight": table,
        "lm_head.weight": ours["head.w"].T[:, order] if "head.w" in ours else table,
    }
    bias = ours.get("head.b", np.zeros(spec.vocab_size, np.float32))
    state["final_logits_bias"] = bias[None]

    def put(theirs: str, name: str, *, reads: bool, writes: bool) -> None:
        w = ours[f"{name}.w"].T
        b = ours.get(f"{name}.b", np.zeros(len(w), np.float32))
        state[f"{theirs}.weight"] = w[order if writes else slice(None)][
            :, order if reads else slice(None)
        ]
        state[f"{theirs}.bias"] = b[order] if writes else b

    for prefix, stack, side in (
        ("encoder.", spec.encoder, "encoder"),
        ("", spec.decoder, "decoder"),
    ):
        for i, block in enumerate(stack.blocks()):
            at, layer = f"model.{side}.layers.{i}", f"{prefix}layers.{i}"
            norms = {"feed_forward": "final_layer_norm"}
            for part in block.attentions():
                norms[part] = f"{MARIAN[part]}_layer_norm"
                for x in "qkv":
                    put(
                        f"{at}.{MARIAN[part]}.{x}_proj",
                        f"{layer}.{part}.{x}",
                        reads=True,
                        writes=False,
                    )
                put(f"{at}.{MARIAN[part]}.out_proj", f"{layer}.{part}.o", reads=False, writes=True)
            put(f"{at}.fc1", f"{layer}.feed_forward.up.0", reads=True, writes=False)
            put(f"{at}.fc2", f"{layer}.feed_forward.down", reads=False, writes=True)
            for part, theirs in norms.items():
                norm = f"{layer}.{part}_post_norm"
                state[f"{at}.{theirs}.weight"] = ours[f"{norm}.scale"][order]
                state[f"{at}.{theirs}.bias"] = ours[f"{norm}.bias"][order]
    return state


@pytest.mark.parametrize(
    ("name", "compute"),
    [("transformer-base", WAYS[0]), ("jaxformers", WAYS[1]), ("jaxformers", WAYS[2])],
    ids=["transformer-base", "jaxformers-scanned", "jaxformers-plain"],
)
def test_the_2017_wiring_is_marians(name, compute):
    """Embeddings, every layer and the logits; the preset shrunk, every parameter random."""
    spec = presets.shrink(presets.get(name).model).replace(vocab_size=V)
    d, block = spec.d_model, spec.encoder.pattern[0]
    rng = np.random.default_rng(0)
    named = {
        key: (0.2 * rng.standard_normal(x.shape) + key.endswith("norm.scale")).astype(np.float32)
        for key, x in named_parameters(Transformer(spec, rngs=jax.random.key(0))).items()
    }
    shared = spec.source_embedding is None
    config = MarianConfig(
        vocab_size=V,
        d_model=d,
        encoder_layers=spec.encoder.num_layers,
        decoder_layers=spec.decoder.num_layers,
        encoder_attention_heads=block.attention.heads,
        decoder_attention_heads=block.attention.heads,
        encoder_ffn_dim=block.feed_forward.hidden,
        decoder_ffn_dim=block.feed_forward.hidden,
        activation_function="relu",
        scale_embedding=True,
        share_encoder_decoder_embeddings=shared,
        tie_word_embeddings=spec.head.tied,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    theirs = MarianMTModel(config).eval()
    missing, unexpected = theirs.load_state_dict(
        {k: torch.from_numpy(v.copy()) for k, v in marian_state(spec, named).items()},
        strict=False,
    )
    assert all("embed_positions" in key for key in missing)  # the sines, made there
    assert set(unexpected) <= {"model.shared.weight"}
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = block.norm.epsilon
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.padding_idx = None
    source, tokens = rng.integers(0, V, (B, S)), rng.integers(0, V, (B, T))
    mask = np.arange(S) < SOURCE_LENGTHS
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.from_numpy(source),
            attention_mask=torch.from_numpy(mask).long(),
            decoder_input_ids=torch.from_numpy(tokens),
            output_hidden_states=True,
        )
    model = from_named_parameters(spec, {k: jnp.asarray(v) for k, v in named.items()}, compute)
    order = in_halves(d)
    embed = model.embedding if shared else model.source_embedding
    x = embed(jnp.int32(source), jnp.arange(S), None)
    assert_close(x[..., order], wanted.encoder_hidden_states[0], "embedded source")
    geometry = model.encoder.geometry(jnp.arange(S), d, mask=jnp.asarray(mask))
    for i, block in enumerate(model.encoder.unstacked_layers()):
        x = block(x, geometry)[0]
        theirs_x = wanted.encoder_hidden_states[i + 1].numpy()
        assert_close(x[..., order][mask], theirs_x[mask], f"encoder {i}")
    memory = x
    x = model.embedding(jnp.int32(tokens), jnp.arange(T), None)
    assert_close(x[..., order], wanted.decoder_hidden_states[0], "embedded target")
    geometry = model.geometry(jnp.arange(T), d, source_mask=jnp.asarray(mask))
    for i, block in enumerate(model.unstacked_layers()):
        x = block(x, geometry, source=memory)[0]
        assert_close(x[..., order], wanted.decoder_hidden_states[i + 1], f"decoder {i}")
    logits = model(jnp.int32(tokens), source=jnp.int32(source), source_mask=jnp.asarray(mask))
    assert_close(logits, wanted.logits, "logits")


# ---------------------------------------------------------------------------- generation

PROMPTS = [[5, 9, 2, 33, 7], [4, 4], [60, 1, 17, 23, 42, 8, 11, 3]]
NEW = 12


def their_ids(theirs, prompt: list[int], end: int, **options) -> list[list[int]]:
    """What transformers generates, without its start and from the end token on."""
    sequences = theirs.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=end,
        pad_token_id=0,
        decoder_start_token_id=0,
        **options,
    )
    start = 1 if theirs.config.is_encoder_decoder else len(prompt)
    rows = [row[start:] for row in sequences.tolist()]
    return [row[: row.index(end)] if end in row else row[:NEW] for row in rows]


@functools.cache
def end_of(layout: str) -> int:
    """A token that this model likes, so that some sequences end before others."""
    free = engine.generate(
        example(layout).ours(), PROMPTS, max_new_tokens=NEW, temperature=0, start_token=0
    )
    return free.ids[0][3]


@pytest.mark.parametrize("layout", ["t5", "t5-v1.1"])
def test_greedy_ids_are_theirs(layout):
    ex, end = example(layout), end_of(layout)
    ours = engine.generate(
        ex.ours(), PROMPTS, max_new_tokens=NEW, temperature=0, start_token=0, end_token=end
    )
    wanted = [their_ids(ex.theirs, prompt, end)[0] for prompt in PROMPTS]
    assert ours.ids == wanted
    assert {*ours.finish_reasons} == {"stop", "length"} or all(len(ids) < NEW for ids in ours.ids)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beams_are_theirs(beams, length_penalty):
    """Every beam of every source, read together here and one by one there; and their scores."""
    ex, end = example("t5-v1.1"), end_of("t5-v1.1")
    found = beam_search(
        generator_of("t5-v1.1"),
        PROMPTS,
        beams=beams,
        length_penalty=length_penalty,
        max_new_tokens=NEW,
        start_token=0,
        end_token=end,
    )
    for prompt, row in zip(PROMPTS, found.rows, strict=True):
        wanted = their_ids(
            ex.theirs,
            prompt,
            end,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=length_penalty,
        )
        assert [beam.ids for beam in row] == wanted


@functools.cache
def generator_of(layout: str) -> engine.Generator:
    return engine.Generator(example(layout).ours())


def test_beams_of_a_decoder_are_theirs():
    config = GPT2Config(
        vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=None
    )
    theirs = GPT2LMHeadModel(config).eval()
    make_noisy(theirs, 0.3)
    spec = spec_from_config(theirs.config.to_dict())
    named = from_huggingface(state_of(theirs), spec, "gpt2")
    generator = engine.Generator(from_named_parameters(spec, named))
    end = engine.generate(generator, PROMPTS, max_new_tokens=NEW, temperature=0).ids[0][3]
    found = beam_search(generator, PROMPTS, beams=3, max_new_tokens=NEW, end_token=end)
    for prompt, row in zip(PROMPTS, found.rows, strict=True):
        wanted = their_ids(theirs, prompt, end, num_beams=3, num_return_sequences=3)
        assert [beam.ids for beam in row] == wanted
