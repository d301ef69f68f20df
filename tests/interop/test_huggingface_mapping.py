"""Names, configs and refusals of the Hugging Face mapping; the arithmetic is in tests/parity."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from assay.errors import AssayError
from assay.interop.huggingface import (
    TABLES,
    from_huggingface,
    iterate_ours,
    layout,
    load_folder,
    save_folder,
    to_huggingface,
)
from assay.interop.huggingface_config import (
    CONFIG_FAMILIES,
    canonical,
    config_from_spec,
    family_of,
    spec_from_config,
)
from assay.model.transformer import Transformer, named_parameters
from assay.spec import presets
from assay.spec.model import LinearScaling, Llama3Scaling, TransformerSpec, YarnScaling

# What the Hub holds, but for tokens, dropout and the keys that say nothing of the architecture.
PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "smollm-135m": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.02,
        "intermediate_size": 1536,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 49152,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 128256,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}

TINY = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
TINY_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 13,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
}


def random_parameters(spec: TransformerSpec) -> dict[str, np.ndarray]:
    return named_parameters(Transformer(spec, rngs=jax.random.key(0)))


def random_state(config: dict) -> dict[str, np.ndarray]:
    spec = spec_from_config(config)
    return to_huggingface(random_parameters(spec), spec, config["model_type"])


# ---------------------------------------------------------------------------- configs


def test_every_family_has_a_table():
    assert CONFIG_FAMILIES.keys() == TABLES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_config(name):
    spec = presets.get(name).model
    written = config_from_spec(spec)
    published = PUBLISHED[name]
    assert {key: written[key] for key in published} == published
    assert spec_from_config(written) == spec
    assert json.loads(json.dumps(written)) == written
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    assert spec_from_config(no_dropout | published) == spec


def test_dropout_of_gpt2_is_read():
    spec = spec_from_config({"model_type": "gpt2"} | {"resid_pdrop": 0.2, "embd_pdrop": 0.3})
    assert spec.embedding.dropout == 0.3
    assert spec.decoder.pattern[0].dropout == 0.2
    assert spec.decoder.pattern[0].attention.dropout == 0.1
    assert spec_from_config(config_from_spec(spec)) == spec


def test_unknown_architecture_is_named():
    supported = "supported are: gpt2, llama, mistral, qwen2, qwen3"
    with pytest.raises(AssayError, match=f"'mamba', not supported; {supported}"):
        spec_from_config({"model_type": "mamba"})
    with pytest.raises(AssayError, match="None, not supported"):
        spec_from_config({})


ROPES = {
    "linear": ({"factor": 2.0}, LinearScaling(factor=2.0)),
    "llama3": (
        {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        Llama3Scaling(factor=32.0, original_context=16),
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.5},
        YarnScaling(factor=4.0, original_context=8, attention_factor=1.5),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_in_old_and_new_form(kind):
    fields, scaling = ROPES[kind]
    new = TINY | {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **fields}}
    old = TINY | {"rope_theta": 5e4, "rope_scaling": {"rope_type": kind, **fields}}
    older = TINY | {"rope_theta": 5e4, "rope_scaling": {"type": kind, **fields}}
    for config in (new, old, older):
        spec = spec_from_config(config)
        assert spec.decoder.pattern[0].attention.positions.scaling == scaling
        assert spec.decoder.pattern[0].attention.positions.theta == 5e4
        assert spec_from_config(config_from_spec(spec)) == spec


def test_yarn_in_other_words():
    """The original context may be max_position_embeddings; mscale is two factors' ratio."""
    config = TINY | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    scaling = spec_from_config(config).decoder.pattern[0].attention.positions.scaling
    assert scaling.original_context == 32
    config["rope_parameters"] |= {"mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = spec_from_config(config).decoder.pattern[0].attention.positions.scaling
    wanted = (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1)
    assert scaling.attention_factor == pytest.approx(wanted)


def test_windows():
    qwen = TINY | {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8}

    def windows(config):
        return [block.attention.window for block in spec_from_config(config).decoder.blocks()]

    assert windows(qwen) == [None] * 4  # use_sliding_window is off by default
    last = qwen | {"use_sliding_window": True, "max_window_layers": 3}
    assert windows(last) == [None, None, None, 8]
    types = ["sliding_attention", "full_attention"] * 2
    mixed = qwen | {"use_sliding_window": True, "layer_types": types}
    assert windows(mixed) == [8, None, 8, None]
    assert len(spec_from_config(mixed).decoder.pattern) == 2
    for config in (qwen, last, mixed):
        spec = spec_from_config(config)
        assert spec_from_config(config_from_spec(spec)) == spec
    assert windows(TINY | {"model_type": "mistral"}) == [4096] * 2
    assert windows(TINY | {"model_type": "mistral", "sliding_window": None}) == [None] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 3}, "heads: found 3"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"model_type": "qwen3", "layer_types": ["chunked"] * 2}, "layer_types has 'chunked'"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
            "use_sliding_window is false",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_configs_that_a_spec_cannot_say(change, message):
    with pytest.raises(AssayError, match=message):
        spec_from_config(TINY | change)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("decoder.pattern.0.norm_position", "both"),
        ("decoder.pattern.0.dropout", 0.1),
        ("decoder.pattern.0.feed_forward.gated", False),
        ("decoder.pattern.0.attention.softcap", 30.0),
        ("decoder.pattern.0.attention.out_bias", True),
        ("decoder.pattern.0.attention.window", 8),
        ("decoder.pattern.0.attention.scale", 0.3),
        ("decoder.pattern.0.attention.positions.kind", "none"),
        ("decoder.final_norm", None),
        ("decoder.causal", False),
        ("embedding.scale_by_sqrt_width", True),
        ("head.softcap", 30.0),
        ("head.bias", True),
    ],
)
def test_specs_that_llama_cannot_say(path, value):
    spec = spec_from_config(TINY).at(path, value)
    named = path.removesuffix(".kind")
    with pytest.raises(AssayError, match=f"^{named}: found .*'llama' cannot express"):
        config_from_spec(spec, "llama")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nano",
            "'llama': decoder.pattern.0.attention.qk_norm: found set, legal is none, and 3 more",
        ),
        ("alibi-gpt", "'gpt2': decoder.pattern.0.attention.positions: found alibi, legal is none"),
        ("make-moe", "decoder.pattern.0.feed_forward.router: found noisy_top_k, legal is top_k."),
        ("tiny-moe", "'mixtral': decoder.pattern.1.feed_forward: found mlp, legal is moe."),
        ("nano-seq2seq", "'t5': decoder.pattern.0.attention.positions: found rope, legal is rela"),
        ("bigram", "decoder.num_layers: found 0, legal is at least 1."),
    ],
)
def test_what_no_family_can_hold_is_told_of_the_nearest_in_one_sentence(name, says):
    with pytest.raises(AssayError, match="no Hugging Face family can hold") as told:
        family_of(presets.get(name).model)
    assert says in str(told.value)
    assert len(str(told.value)) <= 300


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_block_without_a_part_is_named_in_either_stack(stack, part):
    preset = next(name for name in presets.PRESETS if name.startswith("t5"))
    spec = presets.get(preset).model.at(f"{stack}.pattern.0.{part}", None)
    with pytest.raises(AssayError, match=rf"^{stack}\.pattern\.0\.{part}: found none"):
        config_from_spec(spec, "t5")
    with pytest.raises(AssayError, match="no Hugging Face family can hold"):
        family_of(spec)


def test_no_family_at_all():
    with pytest.raises(AssayError, match=r"no Hugging Face family .*gpt2.*llama.*mistral.*qwen3"):
        family_of(presets.get("nano").model)
    with pytest.raises(AssayError, match="num_layers: found 0"):
        config_from_spec(presets.get("bigram").model, "llama")
    with pytest.raises(AssayError, match="'lama' is no supported family; supported are"):
        config_from_spec(presets.get("smollm-135m").model, "lama")


def test_canonical_is_the_same_model():
    spec = presets.get("smollm-135m").model
    block = spec.decoder.pattern[0]
    spelt = block.replace(
        attention=block.attention.replace(head_dim=64, scale=0.125),
        feed_forward=block.feed_forward.replace(hidden=(1536,)),
    )
    wordy = spec.replace(decoder=spec.decoder.replace(pattern=(spelt, block)), vocab_multiple=64)
    assert canonical(wordy) == canonical(spec)
    assert config_from_spec(wordy) == config_from_spec(spec)


# ---------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("config", [TINY, TINY_GPT2], ids=["llama", "gpt2"])
def test_names_without_the_prefix_and_known_buffers(config):
    """Files of the bare model, with causal masks, frequencies, and the tied head beside."""
    state = random_state(config)
    wanted = from_huggingface(state, config)
    prefix = TABLES[config["model_type"]].prefix
    bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 16, 16), bool)
    bare["h.0.attn.masked_bias"] = np.float32(-1e4)
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    table = "wte.weight" if config is TINY_GPT2 else "embed_tokens.weight"
    bare["lm_head.weight"] = bare[table]
    found = from_huggingface(bare, config)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_gpt2_queries_keys_and_values_are_parted():
    state = random_state(TINY_GPT2)
    fused = state["transformer.h.1.attn.c_attn.weight"]
    named = from_huggingface(state, TINY_GPT2)
    assert fused.shape == (8, 24)
    for i, part in enumerate("qkv"):
        assert np.array_equal(named[f"layers.1.attention.{part}.w"], fused[:, 8 * i : 8 * i + 8])


def test_the_dtype_is_kept_until_the_end():
    state = {name: x.astype(ml_dtypes.bfloat16) for name, x in random_state(TINY).items()}
    for name, array in iterate_ours(state, spec_from_config(TINY)):
        assert array.dtype == ml_dtypes.bfloat16, name
    assert all(array.dtype == jnp.float32 for array in from_huggingface(state, TINY).values())


def test_padding_of_the_vocabulary():
    """Rows that only pad are not exported, and are zeros when they come back."""
    spec = spec_from_config(TINY | {"tie_word_embeddings": False}).replace(vocab_multiple=8)
    named = random_parameters(spec)
    state = to_huggingface(named, spec)
    assert state["model.embed_tokens.weight"].shape == (13, 8)
    assert state["lm_head.weight"].shape == (13, 8)
    assert [t.shape for t in layout(spec) if t.row.vocab] == [(13, 8), (13, 8)]
    back = from_huggingface(state, spec)
    assert back["embedding.table"].shape == (16, 8)
    assert back["head.w"].shape == (8, 16)
    assert np.array_equal(back["embedding.table"][:13], named["embedding.table"][:13])
    assert np.array_equal(back["head.w"][:, :13], named["head.w"][:, :13])
    assert not back["embedding.table"][13:].any()
    assert not back["head.w"][:, 13:].any()


def spoil(change):
    state = random_state(TINY)
    change(state)
    return state


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(NAME), f"^{NAME}: this tensor is missing"),
        (lambda s: s.update(extra=s[NAME]), "^extra: this tensor has no place"),
        (lambda s: s.update({NAME: s[NAME][:-1]}), rf"^{NAME}: found shape \(11, 8\).*\(12, 8\)"),
        (lambda s: s.update({NAME: s[NAME] * np.nan}), f"^{NAME}: .* not finite"),
        (lambda s: s.update({NAME: s[NAME].astype(np.int8)}), f"^{NAME}: found int8; quantised"),
        (
            lambda s: s.update({"lm_head.weight": 2 * s["model.embed_tokens.weight"]}),
            "^lm_head.weight: differs from model.embed_tokens.weight",
        ),
    ],
)
def test_spoilt_checkpoints(change, message):
    with pytest.raises(AssayError, match=message):
        from_huggingface(spoil(change), TINY)


def test_our_own_parameters_are_checked_too():
    spec = spec_from_config(TINY)
    named = random_parameters(spec)
    with pytest.raises(AssayError, match=r"^extra: unknown parameter"):
        to_huggingface(named | {"extra": named["final_norm.scale"]}, spec)
    with pytest.raises(AssayError, match=r"^final_norm.scale: found shape \(8, 8\)"):
        to_huggingface(named | {"final_norm.scale": named["layers.0.attention.q.w"]}, spec)
    del named["final_norm.scale"]
    with pytest.raises(AssayError, match=r"^final_norm.scale: this parameter is missing"):
        to_huggingface(named, spec)


# ---------------------------------------------------------------------------- folders


def saved(folder, **how):
    spec = spec_from_config(TINY)
    save_folder(folder, random_parameters(spec), spec, **how)
    return folder


def test_folders_are_never_overwritten_nor_half_written(tmp_path):
    folder = saved(tmp_path / "model")
    with pytest.raises(AssayError, match="already exists"):
        saved(folder)
    spec = spec_from_config(TINY)
    with pytest.raises(AssayError, match="missing"):
        save_folder(tmp_path / "other", {}, spec)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bad_folders(tmp_path):
    with pytest.raises(AssayError, match=r"no config\.json"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AssayError, match="is not JSON"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(AssayError, match=r"no model\.safetensors"):
        load_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AssayError, match="pickle"):
        load_folder(tmp_path)


def test_damaged_files(tmp_path):
    folder = saved(tmp_path / "single")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AssayError, match="cannot be read as safetensors"):
        load_folder(folder)
    folder = saved(tmp_path / "sharded", shard_bytes=500)
    first, *_ = sorted(folder.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(AssayError, match=first.name):
        load_folder(folder)
    save_file({"other": np.zeros(3, np.float32)}, first)
    with pytest.raises(AssayError, match="cannot be read"):
        load_folder(folder)
