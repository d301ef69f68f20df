"""GGUF files: blocks by hand and by `gguf.quants`, names and permutations, tokenizers, damage."""

import json
import re
import struct
from dataclasses import replace

import gguf
import jax
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tests.interop.test_convert import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from assay.data import chat
from assay.errors import AssayError
from assay.interop.convert import convert
from assay.interop.gguf import ARCHITECTURES, GgufFile
from assay.interop.huggingface import from_huggingface, to_huggingface
from assay.interop.huggingface_config import spec_from_config
from assay.loading import kind_of, load, open_source, spec_of
from assay.model.transformer import abstract, from_named_parameters, named_parameters

ALPHABET = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)]]
TEMPLATE = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}{% endfor %}"

# ---------------------------------------------------------------------------- writing files


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py: LlamaModel.permute."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def write(
    path,
    family: str,
    state,
    config,
    *,
    pre="gpt-2",
    kinds=lambda name: Type.F32,
    split=False,
    parts_of=0,
    **more,
):
    """A file as llama.cpp's converter writes it, from tensors by Hugging Face's names.

    With `split`, a tensor for each expert, as it did before April 2024. With `parts_of`, so many
    tensors a file.
    """
    architecture = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}.get(family, family)
    out = gguf.GGUFWriter(path, architecture, split_max_tensors=parts_of)
    gpt2 = family == "gpt2"
    out.add_context_length(config["n_positions" if gpt2 else "max_position_embeddings"])
    out.add_embedding_length(config["n_embd" if gpt2 else "hidden_size"])
    out.add_block_count(config["n_layer" if gpt2 else "num_hidden_layers"])
    heads = config["n_head" if gpt2 else "num_attention_heads"]
    out.add_head_count(heads)
    if gpt2:
        out.add_feed_forward_length(4 * config["n_embd"])
        out.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        kv_heads = config["num_key_value_heads"]
        out.add_feed_forward_length(config["intermediate_size"])
        out.add_head_count_kv(kv_heads)
        out.add_layer_norm_rms_eps(config["rms_norm_eps"])
        out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        if config.get("head_dim"):
            out.add_key_length(config["head_dim"])
            out.add_value_length(config["head_dim"])
        experts = config.get("num_experts") or config.get("num_local_experts")
        if experts:
            out.add_expert_count(experts)
            out.add_expert_used_count(config["num_experts_per_tok"])
        if config.get("moe_intermediate_size"):
            out.add_expert_feed_forward_length(config["moe_intermediate_size"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    size = config["vocab_size"]
    tokens = [*ALPHABET, "th", "the", "<|end|>"]
    assert size >= len(tokens)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    out.add_token_list(tokens)
    out.add_token_types(
        [
            3 if token == "<|end|>" else 5 if "[" in token[:1] and len(token) > 1 else 1
            for token in tokens
        ]
    )
    out.add_token_merges(["t h", "th e"])
    out.add_eos_token_id(tokens.index("<|end|>"))
    out.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), 8
    )
    stacks = {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if family in ("llama", "mixtral") and module.endswith(("q_proj", "k_proj")):
            tensor = permuted(tensor, heads if module.endswith("q_proj") else kv_heads)
        if gpt2 and module.endswith(("c_attn", "c_proj", "c_fc")) and part == "weight":
            tensor = tensor.T
        if ".experts." in module and split:
            i, e, kind = re.findall(r"layers\.(\d+).*experts\.(\d+)\.(w\d)", module)[0]
            old = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}[kind]
            add(out, f"blk.{i}.{old}.{e}.weight", tensor, kinds)
            continue
        if ".experts." in module:
            before, _, after = module.partition(".experts.")
            stacks.setdefault(f"{before}.experts.{after.split('.')[1]}", []).append(tensor)
            continue
        add(out, f"{names.get_name(module)}.{part}", tensor, kinds)
    for module, tensors in stacks.items():
        add(out, f"{names.get_name(module)}.weight", np.stack(tensors), kinds)
    for name, tensor in more.items():
        out.add_tensor(f"{name}.weight", tensor)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def add(out, name, tensor, kinds):
    kind = kinds(name) if tensor.ndim > 1 else Type.F32
    out.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)


def example(family: str, vocabulary: int = 260, **changes):
    """A config of a small model, and its tensors by their names in a file."""
    config = FAMILIES[family]().to_diff_dict() | {"vocab_size": vocabulary, **changes}
    config.pop("scale_decoder_outputs", None)  # T5's, which follows from tie_word_embeddings
    config = AutoConfig.for_model(**config).to_dict()
    spec = spec_from_config(config)
    rng = np.random.default_rng(0)
    named = {
        name: rng.normal(0.3, 0.2, leaf.shape).astype(np.float32)
        for name, leaf in named_parameters(abstract(spec)).items()
    }
    return config, spec, to_huggingface(named, spec, config["model_type"])


# ---------------------------------------------------------------------------- values

BLOCKS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def by_hand(kind: str, raw: bytes) -> np.ndarray:
    """One block, value by value, from the layout in ggml-common.h."""

    def half(at):
        return float(np.frombuffer(raw, "<f2", 1, at)[0])

    if kind == "Q8_0":
        return np.array([half(0) * q for q in struct.unpack("<32b", raw[2:34])])
    if kind in ("Q4_0", "Q4_1"):
        start = 2 if kind == "Q4_0" else 4
        qs = [raw[start + i] & 15 for i in range(16)] + [raw[start + i] >> 4 for i in range(16)]
        if kind == "Q4_0":
            return np.array([half(0) * (q - 8) for q in qs])
        return np.array([half(0) * q + half(2) for q in qs])
    if kind == "Q4_K":
        d, dmin, packed, qs = half(0), half(2), raw[4:16], raw[16:144]
        values = []
        for j in range(8):
            if j < 4:
                scale, low = packed[j] & 63, packed[j + 4] & 63
            else:
                scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
                low = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
            for i in range(32):
                q = (qs[32 * (j // 2) + i] >> (4 * (j % 2))) & 15
                values.append(d * scale * q - dmin * low)
        return np.array(values)
    assert kind == "Q6_K"
    low, high = raw[:128], raw[128:192]
    scales, d = struct.unpack("<16b", raw[192:208]), half(208)
    values = []
    for n in range(2):
        for part in range(4):
            for i in range(32):
                q4 = (low[64 * n + 32 * (part % 2) + i] >> (4 * (part // 2))) & 15
                q2 = (high[32 * n + i] >> (2 * part)) & 3
                q = (q4 | (q2 << 4)) - 32
                values.append(d * scales[8 * n + 2 * part + i // 16] * q)
    return np.array(values)


@pytest.mark.parametrize("kind", BLOCKS)
def test_values(kind, tmp_path):
    """In a file: as gguf.quants has them, bit for bit, and as blocks read by hand."""
    config, _, state = example("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    type_ = Type[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rng = np.random.default_rng(1)
    if kind in ("Q4_K", "Q6_K"):  # gguf.quants cannot make these: random bytes, finite halves
        raw = rng.integers(0, 256, (256, size), np.uint8)
        halves = (0, 2) if kind == "Q4_K" else (208,)
        for at in halves:
            raw[:, at : at + 2] = rng.normal(0, 0.1, (256, 1)).astype("<f2").view(np.uint8)
    else:
        raw = gguf.quants.quantize(state[name], type_).view(np.uint8).reshape(256, -1)
    data = raw.view({"F32": "<f4", "F16": "<f2"}.get(kind, np.uint8))
    out, original = tmp_path / "x.gguf", add

    def patched(file, tensor_name, tensor, kinds):
        if tensor_name == "blk.0.ffn_up.weight":
            file.add_tensor(tensor_name, data, raw_dtype=type_)
        else:
            original(file, tensor_name, tensor, kinds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "add", patched)
        write(out, "llama", state, config)
    file = GgufFile(out)
    found = file[name]
    assert found.shape == (256, 256)
    assert file.peek(name) == (found.dtype, found.shape)
    kept = {"F16": "float16", "BF16": "bfloat16"}
    assert found.dtype.name == kept.get(kind, "float32")
    wanted = gguf.quants.dequantize(data, type_).reshape(256, 256)
    assert np.array_equal(found.astype(np.float32), wanted)
    if kind.startswith("Q"):
        content = raw.tobytes()
        for b in (0, 1, 100):
            hand = by_hand(kind, content[b * size : (b + 1) * size])
            ours = found.reshape(-1)[b * block : (b + 1) * block]
            np.testing.assert_allclose(ours, hand, rtol=1e-5, atol=1e-6)


def test_a_tensor_takes_little_more_memory_than_its_values(tmp_path, monkeypatch):
    """Read block by block, and nothing of the file stays mapped behind it."""
    import tracemalloc

    from assay.interop import gguf as reading

    config, _, state = example("llama", hidden_size=256, intermediate_size=4096)
    path = write(tmp_path / "x.gguf", "llama", state, config, kinds=lambda name: Type.Q8_0)
    file, name = GgufFile(path), "model.layers.0.mlp.up_proj.weight"
    whole = file[name]
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2**18)
    tracemalloc.start()
    parts = file[name]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(parts, whole)
    assert most < 1.25 * whole.nbytes


# ---------------------------------------------------------------------------- models


# What transformers does not read of a GGUF file, and takes by default.
ITS_DEFAULTS = {
    "gpt2": {"n_positions": 1024},
    "llama": {},
    "smollm": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"moe_intermediate_size": 768, "norm_topk_prob": True},
}


@pytest.mark.parametrize("family", ITS_DEFAULTS)
def test_models_against_transformers(family, tmp_path, capsys):
    """Its own GGUF loader gives the logits that ours are compared with."""
    config, spec, state = example(family, **ITS_DEFAULTS[family])
    path = write(tmp_path / "x.gguf", config["model_type"], state, config)
    assert kind_of(path) == "gguf"
    assert spec_of(path) == spec
    file = GgufFile(path)
    assert all(np.array_equal(file[name], state[name]) for name in state)
    capsys.readouterr()
    result = convert(open_source(path), tmp_path / "hf", to="hf")
    assert result.max_logit_difference <= result.tolerance
    assert "GGUF" not in capsys.readouterr().err  # no bar but the command's own
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs, own = AutoTokenizer.from_pretrained(tmp_path / "hf"), file.tokenizer()
    for text in ("the th", "naïve 猫"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode(text).tolist()
    said = [{"role": "user", "content": "x"}]
    assert theirs.apply_chat_template(said, tokenize=False) == chat.conversation(own, said)
    tokens = np.arange(12)[None] % 260
    ours = from_named_parameters(spec, from_huggingface(state, spec, config["model_type"]))
    with torch.no_grad():
        wanted = again(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(jax.jit(lambda t: ours(t))(tokens), wanted, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_experts(family, tmp_path):
    """transformers reads no such GGUF: the tensors that were written come back, and its model of
    them is what a conversion is held to."""
    config, spec, state = example(family)
    path = write(tmp_path / "x.gguf", family, state, config)
    file = GgufFile(path)
    assert file.spec == spec
    assert file.family == family
    assert file.keys() == state.keys()
    assert all(np.array_equal(file[name], state[name]) for name in state)
    result = convert(open_source(path), tmp_path / "own", to="assay", verify=True)
    assert result.max_logit_difference <= result.tolerance


def test_experts_in_a_tensor_each(tmp_path, assay_command):
    """Mixtral's files before llama.cpp stacked the experts of a layer."""
    config, spec, state = example("mixtral")
    path = write(tmp_path / "x.gguf", "mixtral", state, config, split=True)
    file = GgufFile(path)
    assert file.has("blk.1.ffn_down.3.weight")
    assert file.spec == spec
    assert file.keys() == state.keys()
    assert all(np.array_equal(file[name], state[name]) for name in state)
    status, out, err = assay_command("convert", path, tmp_path / "own", "--json")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["max_logit_difference"] < 1e-4
    wrong = spec.changed({"decoder.pattern.*.feed_forward.router.k": 1})
    with pytest.raises(AssayError, match="the converted model's logits differ"):
        convert(replace(open_source(path), spec=wrong), tmp_path / "wrong", to="assay")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe"])
def test_a_model_in_several_files(family, tmp_path, assay_command):
    """By its first; each of the others must be there."""
    config, spec, state = example(family, **ITS_DEFAULTS[family])
    write(tmp_path / "x.gguf", family, state, config, parts_of=10)
    first, *others = sorted(tmp_path.iterdir())
    assert first.name.startswith("x-00001-of-")
    assert others
    file = GgufFile(first)
    assert file.spec == spec
    assert all(np.array_equal(file[name], state[name]) for name in state)
    result = convert(open_source(first), tmp_path / "own", to="assay", verify=True)
    assert result.max_logit_difference <= result.tolerance
    status, _, err = assay_command("show", others[0])
    assert (status, "name the first" in err) == (2, True)
    others[-1].unlink()
    with pytest.raises(AssayError, match="is not there, but x-00001-of-"):
        GgufFile(first)


def write_t5(path, state, config, pieces):
    out = gguf.GGUFWriter(path, "t5")
    out.add_context_length(512)
    out.add_embedding_length(config["d_model"])
    out.add_feed_forward_length(config["d_ff"])
    out.add_block_count(config["num_layers"])
    out.add_head_count(config["num_heads"])
    out.add_key_length(config["d_kv"])
    out.add_value_length(config["d_kv"])
    out.add_layer_norm_eps(config["layer_norm_epsilon"])
    out.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    out.add_relative_attn_buckets_count(config["relative_attention_num_buckets"])
    out.add_decoder_start_token_id(0)
    size = config["vocab_size"]
    tokens = [*pieces, *(f"[PAD{i}]" for i in range(len(pieces), size))]
    out.add_tokenizer_model("t5")
    out.add_tokenizer_pre("default")
    out.add_token_list(tokens)
    out.add_token_scores([*(score for score in pieces.values()), *[-1000.0] * (size - len(pieces))])
    out.add_token_types([3, 3, 2, *[1] * (len(pieces) - 3), *[5] * (size - len(pieces))])
    out.add_eos_token_id(1)
    out.add_unk_token_id(2)
    out.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 8)
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        add(out, f"{names.get_name(module)}.{part}", tensor, lambda name: Type.F32)
    out.add_tensor("dec.blk.0.cross_attn_rel_b.weight", np.zeros((32, 4), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


PIECES = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0, "▁the": -3.0, "▁cat": -4.0}
PIECES |= {letter: -6.0 - i / 10 for i, letter in enumerate("abcehnst")} | {"▁sat": -4.5}


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
def test_t5(gated, tmp_path, assay_command):
    """Its first layout and that of version 1.1; tensors, config, tokenizer, and what it writes."""
    from transformers import T5Tokenizer

    form = {"feed_forward_proj": "gated-gelu" if gated else "relu"}
    tied = {"tie_word_embeddings": not gated}
    config, spec, state = example("t5", 128, **form, **tied)
    assert ("lm_head.weight" in state) == gated
    path = write_t5(tmp_path / "x.gguf", state, config, PIECES)
    file = GgufFile(path)
    assert file.keys() == state.keys()
    assert all(np.array_equal(file[name], state[name]) for name in state)
    assert file.spec == spec
    result = convert(open_source(path), tmp_path / "hf", to="hf")
    assert result.max_logit_difference <= result.tolerance
    ours = load(path)
    assert ours.start_token == 0
    named = [*PIECES, *(f"<extra_id_{99 - i}>" for i in range(100))]
    vocabulary = list(zip(named, [*PIECES.values(), *[-1000.0] * 100], strict=True))
    theirs = T5Tokenizer(vocab=vocabulary)
    for text in ("the cat sat", " thecats  at the\nnest", "x the", ""):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.tokenizer.encode(text).tolist() == wanted, text
    assert ours.tokenizer.decode(ours.tokenizer.encode("the cat sat")) == "the cat sat"
    assert ours.tokenizer.special_ids["<extra_id_0>"] == theirs.convert_tokens_to_ids(
        "<extra_id_0>"
    )
    assert (ours.tokenizer.eos_id, ours.tokenizer.unknown_id) == (1, 2)
    status, out, err = assay_command(
        *("generate", path, "--prompt", "the cat", "--max-new-tokens", 4, "--temperature", 0),
        *("--json", "--quiet"),
    )
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["prompt_tokens"]


def test_a_quantised_file_becomes_float32(tmp_path):
    config, _, state = example("llama")

    def kinds(name):
        return Type.Q8_0 if "ffn_up" in name else Type.F16 if "attn" in name else Type.BF16

    path = write(tmp_path / "x.gguf", "llama", state, config, kinds=kinds)
    result = convert(open_source(path), tmp_path / "hf", to="hf", dtype="float32")
    assert set(result.dtype) == {"float32"}
    mixed = convert(open_source(path), tmp_path / "own", to="assay")
    assert set(mixed.dtype) == {"float32", "float16", "bfloat16"}
    assert mixed.max_logit_difference <= mixed.tolerance


def test_llama3_scaling_is_recovered(tmp_path):
    """llama.cpp keeps what each frequency is divided by; here it is made of transformers' own."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config, spec, state = example("llama", head_dim=64, rope_parameters=scaling)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.rotary_emb
    plain = 500_000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / theirs.inv_freq.numpy()).astype(np.float32)
    file = GgufFile(write(tmp_path / "x.gguf", "llama", state, config, rope_freqs=factors))
    found = file.spec.decoder.pattern[0].attention.positions
    assert found.scaling.factor == pytest.approx(32, rel=1e-6)
    wanted = spec.decoder.pattern[0].attention.positions
    assert found.replace(scaling=found.scaling.replace(factor=32.0)) == wanted
    other = factors[::-1].copy()
    wrong = GgufFile(write(tmp_path / "y.gguf", "llama", state, config, rope_freqs=other))
    with pytest.raises(AssayError, match="is not Llama 3's scaling"):
        _ = wrong.spec


# ---------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config, _, state = example("llama")
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf", "llama", state, config)


def test_the_tokenizer_is_in_the_file(small):
    tokenizer = load(small).tokenizer
    assert tokenizer.vocab_size == 260
    assert [tokenizer.pieces[i] for i in tokenizer.encode("the th")] == [b"the", b" ", b"th"]
    assert tokenizer.decode(tokenizer.encode("naïve 猫")) == "naïve 猫"
    assert tokenizer.eos_id == tokenizer.special_ids["<|end|>"]
    assert chat.conversation(tokenizer, [{"role": "user", "content": "x"}]) == "<|end|>user: x"


def test_show_check_and_generate_take_it(small, assay_command):
    status, out, err = assay_command("show", small, "--json")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["spec"]["vocab_size"] == 260
    status, out, err = assay_command(
        *("generate", small, "--chat", "--prompt", "the", "--max-new-tokens", 4, "--json")
    )
    assert status == 0, err
    assert len(json.loads(out.splitlines()[-1])["tokens"]) <= 4


# ---------------------------------------------------------------------------- damage


def test_every_truncation_is_a_sentence(small, tmp_path, assay_command):
    content = small.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 20, 100, 1000, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        status, out, err = assay_command("convert", path, tmp_path / "out", "--quiet")
        assert (status, out) == (2, ""), size
        assert err.startswith("assay: ")
        assert len(err.splitlines()) == 1
        assert "cut.gguf: is" in err
    assert [p.name for p in tmp_path.iterdir()] == ["cut.gguf"]


def test_other_architectures_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    supported = ", ".join(ARCHITECTURES)
    with pytest.raises(AssayError, match=f"'mamba', not supported; supported are: {supported}"):
        spec_of(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "model.norm.weight: .* missing"),
        (
            lambda s: s.update({"model.norm.weight": np.full(32, np.nan, np.float32)}),
            "model.norm.weight: .* not finite",
        ),
        (
            lambda s: s.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"model.norm.weight: found shape \(31,\)",
        ),
    ],
    ids=["missing", "nan", "shape"],
)
def test_spoilt_tensors(change, message, tmp_path):
    config, _, state = example("llama")
    change(state)
    path = write(tmp_path / "x.gguf", "llama", state, config)
    with pytest.raises(AssayError, match=message):
        convert(open_source(path), tmp_path / "out", to="hf", verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_unknown_cuts_are_refused(tmp_path):
    config, _, state = example("llama")
    path = write(tmp_path / "x.gguf", "llama", state, config, pre="never-heard")
    with pytest.raises(AssayError, match=r"tokenizer.ggml.pre is 'never-heard'"):
        load(path)


@pytest.mark.parametrize("fault", ["names", "rows"])
def test_experts_are_not_held_to_our_own_reading(fault, tmp_path, monkeypatch):
    """A wrong table of names here, or rows in a wrong order, is found by the conversion."""
    from assay.interop import gguf as reading

    config, _, state = example("mixtral")
    path = write(tmp_path / "x.gguf", "mixtral", state, config)
    if fault == "names":
        key = "model.layers.{i}.block_sparse_moe.experts.{e}."
        names = reading.MIXTRAL | {f"{key}w1": "blk.{i}.ffn_up_exps"}
        monkeypatch.setitem(reading.NAMES, "mixtral", names | {f"{key}w3": "blk.{i}.ffn_gate_exps"})
    else:
        monkeypatch.setattr(reading, "_unpermute", lambda array, heads: array)
    with pytest.raises(AssayError, match="the converted model's logits differ"):
        convert(open_source(path), tmp_path / "own", to="assay")
