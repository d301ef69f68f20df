"""`assay convert`: there and back bit for bit, loaded by transformers, in little memory, or not
at all."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.train.conftest import made_text
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

import assay
from assay.data import tokenizers
from assay.errors import AssayError
from assay.interop import reference
from assay.interop.convert import convert, open_run, place
from assay.interop.huggingface import SafetensorsFolder, layout, spec_from_config
from assay.loading import kind_of, load, open_source, spec_of
from assay.model.sharding import make_mesh
from assay.model.transformer import Transformer, named_parameters
from assay.spec.model import Mup
from assay.spec.run import MeshSpec

V = 64
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "gpt2": lambda: GPT2Config(
        vocab_size=V, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: LlamaConfig(**SMALL),
    "smollm": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**SMALL, **EXPERTS),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, **EXPERTS, head_dim=16, moe_intermediate_size=24, mlp_only_layers=[]
    ),
    "t5": lambda: T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    ),
}


def auto(family: str):
    return AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM


def make(folder: Path, family: str, dtype=torch.float32, **changes) -> Path:
    """A folder as transformers writes it, with random weights."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.update(changes)
    model = auto(family).from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_byte_identical(family, tmp_path):
    """bfloat16, but the norms in float32: each weight keeps its own, and the logits agree."""
    start = make(tmp_path / "start", family, torch.bfloat16)
    mixed = {
        name: tensor.astype(np.float32) if "norm" in name or "ln_" in name else tensor
        for name, tensor in tensors(start).items()
    }
    save_file(mixed, start / "model.safetensors", metadata={"format": "pt"})
    there = convert(open_source(start), tmp_path / "there", to="assay")
    assert there.max_logit_difference <= there.tolerance
    assert kind_of(tmp_path / "there") == "assay"
    back = convert(open_source(tmp_path / "there"), tmp_path / "back", to="hf", shard_bytes=20_000)
    assert back.max_logit_difference <= back.tolerance
    assert back.params == there.params
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert_same(tmp_path / "back", start)
    wanted = json.loads((start / "config.json").read_text())
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    for key in ("model_type", "architectures", "bos_token_id", "eos_token_id", "dtype"):
        assert found.get(key) == wanted.get(key), key
    _, info = auto(family).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    for name in ("README.md", "generation_config.json", "config.json"):
        assert (tmp_path / "back" / name).is_file()


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_of_one_layer_keep_each_its_own_dtype(family, tmp_path):
    """Here they are one array, of a dtype that holds them all; there each has its own again."""
    start = make(tmp_path / "start", family)
    dtypes = (np.float32, jnp.bfloat16, np.float16)
    mixed = {name: t.astype(dtypes[i % 3]) for i, (name, t) in enumerate(tensors(start).items())}
    save_file(mixed, start / "model.safetensors", metadata={"format": "pt"})
    there = convert(open_source(start), tmp_path / "there", to="assay")
    assert there.max_logit_difference <= there.tolerance
    again = convert(open_source(tmp_path / "there"), tmp_path / "again", to="assay")
    assert again.max_logit_difference == 0
    back = convert(open_source(tmp_path / "again"), tmp_path / "back", to="hf")
    assert back.max_logit_difference <= back.tolerance
    assert_same(tmp_path / "back", start)
    cast = convert(open_source(tmp_path / "there"), tmp_path / "cast", to="hf", dtype="float32")
    assert set(cast.dtype) == {"float32"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_there_and_back_in_other_dtypes(dtype, tmp_path):
    start = make(tmp_path / "start", "llama")
    cast = {name: tensor.astype(dtype) for name, tensor in tensors(start).items()}
    save_file(cast, start / "model.safetensors", metadata={"format": "pt"})
    convert(open_source(start), tmp_path / "there", to="assay", verify=False)
    convert(open_source(tmp_path / "there"), tmp_path / "back", to="hf", verify=False)
    assert_same(tmp_path / "back", start)


TOKENIZERS = {
    "byte": tokenizers.ByteTokenizer(),
    "char": tokenizers.CharTokenizer(made_text(50)),
    "bpe": tokenizers.train_bpe([made_text(200)], 300),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_run_becomes_what_transformers_loads(kind, tmp_path):
    """With a tokenizer that gives the same ids, and the padding of the vocabulary left out."""
    tokenizer = TOKENIZERS[kind]
    small = spec_from_config(FAMILIES["smollm"]().to_dict())
    spec = small.replace(vocab_size=tokenizer.vocab_size, vocab_multiple=64)
    named = named_parameters(Transformer(spec, rngs=jax.random.key(0)))
    result = convert(open_run(tmp_path / "run", spec, named, tokenizer), tmp_path / "hf", to="hf")
    assert 0 <= result.max_logit_difference <= result.tolerance
    table = tensors(tmp_path / "hf")["model.embed_tokens.weight"]
    assert len(table) == tokenizer.vocab_size < spec.padded_vocab
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = made_text(20)
    ids = tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert theirs.decode(ids) == text
    assert load(tmp_path / "hf").tokenizer.fingerprint == tokenizer.fingerprint


def test_a_model_under_mup_keeps_its_logits(tmp_path):
    """Their formats know no muP: its factors go into the weights, and what is read has none."""
    tokenizer = TOKENIZERS["byte"]
    small = spec_from_config(FAMILIES["smollm"]().to_dict())
    mup = Mup(base_width=small.d_model // 2, hidden=0.7, output=3.0)
    spec = small.replace(vocab_size=tokenizer.vocab_size, mup=mup)
    named = named_parameters(Transformer(spec, rngs=jax.random.key(0)))
    result = convert(open_run(tmp_path / "run", spec, named, tokenizer), tmp_path / "hf", to="hf")
    assert 0 <= result.max_logit_difference <= result.tolerance
    assert load(tmp_path / "hf").model.spec.mup is None


def test_the_command(tmp_path, assay_command):
    """A run to both forms; every command takes what was written, and gives the run's own text."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(made_text(600))
    status, _, err = assay_command(
        *("train", "smollm-135m", "--data", corpus, "--out", tmp_path / "run", "--steps", 1),
        *("--set", "model.decoder.num_layers=1", "--set", "model.d_model=32"),
        *("--set", "model.decoder.pattern.0.attention.heads=4"),
        *("--set", "model.decoder.pattern.0.attention.kv_heads=2"),
        *("--set", "model.decoder.pattern.0.feed_forward.hidden=64"),
        *("--seq-len", 16, "--batch-size", 2, "--quiet", "--tokenizer", "byte"),
    )
    assert status == 0, err
    texts = []
    for form in ("hf", "assay"):
        status, out, err = assay_command(
            "convert", tmp_path / "run", tmp_path / form, "--to", form, "--json"
        )
        assert status == 0, err
        data = json.loads(out.splitlines()[-1])
        fields = ["source", "destination", "format", "params", "max_logit_difference"]
        assert list(data)[:5] == fields
        assert data["format"] == form
        assert 0 <= data["max_logit_difference"] <= data["tolerance"]
    for folder in ("run", "hf", "assay"):
        status, out, err = assay_command(
            *("generate", tmp_path / folder, "--prompt", "the ", "--temperature", 0),
            *("--max-new-tokens", 6, "--json"),
        )
        assert status == 0, err
        texts.append(json.loads(out.splitlines()[-1])["tokens"])
        status, out, err = assay_command("show", tmp_path / folder, "--json")
        assert json.loads(out.splitlines()[-1])["total_params"] == data["params"]
    assert texts[0] == texts[1] == texts[2]
    status, _, err = assay_command("eval", tmp_path / "assay", "--data", corpus, "--json")
    assert status == 0, err


def test_every_id_that_ends_a_text_is_known(tmp_path):
    """generation_config.json may name several, as Llama 3's does; any of them ends what is made."""
    folder = make(tmp_path / "start", "llama")
    for name, text in tokenizers.huggingface_files(tokenizers.CharTokenizer("the cats")).items():
        (folder / name).write_text(text)
    about = folder / "generation_config.json"
    about.unlink()
    assert load(folder).end_tokens == (2,)  # the model's own configuration
    whole = assay.generate(folder, "the", max_new_tokens=4, temperature=0.0)
    third, other = whole.ids[2], next(i for i in range(V) if i not in whole.ids)
    about.write_text(json.dumps({"eos_token_id": [third, other, 99]}))
    loaded = load(folder)
    assert loaded.end_tokens == (third, other)
    ended = assay.generate(loaded, "the", max_new_tokens=4, temperature=0.0)
    assert ended.ids == whole.ids[: whole.ids.index(third)]
    assert ended.finish_reason == "stop"
    about.write_text("{")
    with pytest.raises(AssayError, match=r"generation_config.json: is not JSON"):
        load(folder)


@pytest.mark.parametrize(("vocabulary", "rows"), [(50257, 50304), (50304, 50304)])
def test_padding_of_the_vocabulary_both_ways(vocabulary, rows, tmp_path):
    """50257 tokens in 50304 rows here, and 50257 there; a table of 50304 there is kept whole."""
    config = GPT2Config(vocab_size=vocabulary, n_positions=32, n_embd=4, n_layer=1, n_head=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    there = convert(
        open_source(tmp_path / "start"), tmp_path / "there", to="assay", vocab_multiple=64
    )
    assert there.max_logit_difference <= there.tolerance
    table = tensors(tmp_path / "there")["embedding.table"]
    assert table.shape == (rows, 4)
    assert not table[vocabulary:].any()
    assert load(tmp_path / "there").model(jnp.zeros((1, 2), int)).shape == (1, 2, vocabulary)
    convert(open_source(tmp_path / "there"), tmp_path / "back", to="hf", verify=False)
    assert_same(tmp_path / "back", tmp_path / "start")


def test_a_cast(tmp_path):
    start = make(tmp_path / "start", "llama")
    result = convert(open_source(start), tmp_path / "half", to="hf", dtype="bfloat16")
    assert result.max_logit_difference <= result.tolerance
    assert result.dtype == {"bfloat16": result.params}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in tensors(tmp_path / "half").items():
        assert tensor.tobytes() == tensors(start)[name].astype(jnp.bfloat16).tobytes()


def test_straight_onto_a_mesh(tmp_path):
    """Each device is given its part alone, and the logits are those of one device."""
    start = make(tmp_path / "start", "llama")
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
    source = open_source(start)
    named = place(source.entries("assay", source.spec, None, None), source.spec, mesh)
    whole = place(source.entries("assay", source.spec, None, None), source.spec)
    split = named["layers.0.attention.q.w"]
    assert split.sharding.shard_shape(split.shape) == (16, 16)
    for name, array in named.items():
        assert np.array_equal(array, whole[name]), name
    result = convert(source, tmp_path / "there", to="assay", mesh=mesh)
    assert result.max_logit_difference <= result.tolerance
    loaded = load(start, mesh=mesh).model.layers[0].attention.q.w[...]
    assert loaded.sharding.shard_shape(loaded.shape) == (16, 16)
    drawn = load("tiny-gpt", mesh=mesh).model.layers[0].attention.q.w[...]
    assert drawn.sharding.shard_shape(drawn.shape) == (64, 64)


MEMORY = """
import json, resource, sys
from pathlib import Path
import ml_dtypes, numpy as np
from assay.interop.convert import convert
from assay.loading import open_source

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

small, large, out = map(Path, sys.argv[1:])
convert(open_source(small), out / "warm", to="assay", verify=False)
convert(open_source(out / "warm"), out / "warm-back", to="hf", verify=False)
before = peak()
convert(open_source(large), out / "there", to="assay", verify=False)
convert(open_source(out / "there"), out / "back", to="hf", verify=False, shard_bytes=2**26)
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read in /proc")
def test_peak_memory_is_a_little_over_the_largest_tensor(tmp_path):
    """A sharded folder of 350 MB, the largest tensor 64 MB, both ways, in a process of its own."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 7}
    config = LlamaConfig(
        **SMALL | sizes | {"vocab_size": 16384}, tie_word_embeddings=True
    ).to_dict()
    small = LlamaConfig(**SMALL).to_dict()
    for name, entry in (("small", small), ("large", config)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(entry))
        spec = spec_of(folder)
        shards, index = {}, {}
        for tensor in layout(spec, "llama"):
            shards.setdefault("embed" if "embed" in tensor.name else tensor.name[:14], []).append(
                tensor
            )
        for i, shard in enumerate(shards.values()):
            file = f"model-{i}.safetensors"
            save_file({t.name: np.full(t.shape, i + 1, np.float32) for t in shard}, folder / file)
            index |= {t.name: file for t in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    total = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    largest = 16384 * 1024 * 4
    assert total > 4 * largest
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "large", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert_same(tmp_path / "back", tmp_path / "large")
    assert int(run.stdout) < 1.25 * largest + 32 * 2**20, f"{int(run.stdout) / 2**20:.0f} MiB"


# ---------------------------------------------------------------------------- refusals


def test_never_over_what_is_there(tmp_path):
    start = make(tmp_path / "start", "llama")
    (tmp_path / "taken").mkdir()
    with pytest.raises(AssayError, match="already exists; nothing was written"):
        convert(open_source(start), tmp_path / "taken", to="assay", verify=False)
    assert not list((tmp_path / "taken").iterdir())


def test_folders_above_are_taken_away_again(tmp_path, assay_command):
    """Those that were made for the destination, where another's file is not in them."""
    folder = make(tmp_path / "bad", "llama")
    spoil(folder, lambda s: s[NAME].__setitem__((3, 4), np.nan))
    (tmp_path / "mine").mkdir()
    status, _, err = assay_command("convert", folder, tmp_path / "mine" / "a" / "b" / "out")
    assert (status, "not finite" in err) == (2, True)
    assert not list((tmp_path / "mine").iterdir())


def test_ended_from_outside_nothing_is_left(tmp_path):
    """By SIGTERM while it writes, as a scheduler does it."""
    start = make(tmp_path / "start", "llama")
    script = (
        "import os, signal, sys; from assay import cli; from assay.interop import convert as c;"
        "write = c.write_safetensors;"
        "c.write_safetensors = lambda *a, **b: (write(*a, **b), os.kill(os.getpid(), 15));"
        "cli.main()"
    )
    (tmp_path / "mine").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", script, "convert", start, tmp_path / "mine" / "out"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 130, run.stderr
    assert not list((tmp_path / "mine").iterdir())


def test_over_tolerance_nothing_is_left(tmp_path, monkeypatch):
    start = make(tmp_path / "start", "llama")
    theirs = reference.logits
    monkeypatch.setattr(reference, "logits", lambda *a: theirs(*a) * 1.01)
    with pytest.raises(AssayError, match=r"logits differ .* over the tolerance"):
        convert(open_source(start), tmp_path / "there", to="assay")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_what_could_not_be_verified_is_said(tmp_path, monkeypatch):
    start = make(tmp_path / "start", "llama")
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    result = convert(open_source(start), tmp_path / "there", to="assay")
    assert result.max_logit_difference is None
    assert result.note.startswith("torch and transformers must be installed")
    with pytest.raises(AssayError, match=r"--verify: .*torch"):
        convert(open_source(start), tmp_path / "other", to="assay", verify=True)
    # Between two forms of our own, nothing else is needed.
    mine = convert(open_source(tmp_path / "there"), tmp_path / "mine", to="assay")
    assert mine.max_logit_difference == 0


def spoil(folder: Path, change) -> None:
    state = tensors(folder)
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def another_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def a_missing_shard(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(tensors(folder), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def a_large_tokenizer(folder: Path) -> None:
    tokenizers.ByteTokenizer().save(folder)


def a_config_of_nonsense(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": "four"}))


def a_negative_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": -32}))


BAD = {
    "config": (a_config_of_nonsense, "num_attention_heads is 'four'; expected a whole number of"),
    "size": (a_negative_size, "hidden_size is -32; expected a whole number of at least 1"),
    "truncated": (cut_short, "model.safetensors: cannot be read as safetensors"),
    "shape": (
        lambda f: spoil(f, lambda s: s.update({NAME: s[NAME][:-1]})),
        r"up_proj.weight: found shape \(47, 32\), but the architecture has \(48, 32\)",
    ),
    "nan": (
        lambda f: spoil(f, lambda s: s[NAME].__setitem__((3, 4), np.nan)),
        "up_proj.weight: holds values that are not finite",
    ),
    "architecture": (another_architecture, "'mamba', not supported; supported are: gpt2, llama"),
    "pickle": (only_a_pickle, r"is a pickle \(.bin\), and reading it could run code"),
    "shard": (a_missing_shard, "model-00001-of-00001.safetensors: .* it is not there"),
    "tokenizer": (a_large_tokenizer, "tokenizer has 257 tokens, but the model's vocabulary is 64"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(fault, tmp_path, assay_command):
    change, sentence = BAD[fault]
    folder = make(tmp_path / "bad", "llama")
    change(folder)
    for command in (["convert", folder, tmp_path / "out"], ["generate", folder, "--prompt", "a"]):
        status, out, err = assay_command(*command, "--quiet")
        assert status == 2
        assert not out
        assert err.startswith("assay: ")
        assert len(err.splitlines()) == 1
        assert re.search(sentence, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(AssayError, match=r"is a pickle \(.pt\), and reading it could run code"):
        kind_of(tmp_path / "weights.pt")
    (tmp_path / "weights.txt").write_bytes(b"x")
    with pytest.raises(AssayError, match="is no model"):
        kind_of(tmp_path / "weights.txt")
    with pytest.raises(AssayError, match="a preset has no weights"):
        open_source("gpt2")


def test_a_model_folder_of_other_shapes_is_refused(tmp_path):
    start = make(tmp_path / "start", "smollm")
    convert(open_source(start), tmp_path / "there", to="assay", verify=False)
    state = tensors(tmp_path / "there")
    name = "layers.0.attention.q.w"
    save_file(state | {name: state[name][:-1]}, tmp_path / "there" / "model.safetensors")
    with pytest.raises(AssayError, match=rf"{name}: found shape \(31, 32\)"):
        load(tmp_path / "there")


def test_architectures_that_no_family_has(tmp_path):
    spec = assay.preset("nano").model.replace(context=16)
    named = named_parameters(Transformer(spec, rngs=jax.random.key(0)))
    source = open_run(tmp_path / "run", spec, named, tokenizers.ByteTokenizer())
    with pytest.raises(AssayError, match="no Hugging Face family can hold this architecture"):
        convert(source, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
    assert convert(source, tmp_path / "mine", to="assay").max_logit_difference == 0


# ---------------------------------------------------------------------------- the Hub


def test_the_hub_without_a_network(tmp_path, monkeypatch):
    """An id is looked for in the Hub's cache; not found, one sentence says so."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert kind_of("someone/some-model") == "hub"
    with pytest.raises(AssayError, match="someone/some-model: is not in the cache"):
        load("someone/some-model")


def test_the_hub_from_its_cache(tmp_path, monkeypatch, assay_command):
    """As huggingface_hub lays a model out: blobs, a folder of links to them for each commit, and
    the commit of a branch. Found by its id, and used by the commands without a network."""
    folder, cache, commit = make(tmp_path / "start", "smollm"), tmp_path / "cache", "0" * 40
    for name, text in tokenizers.huggingface_files(tokenizers.CharTokenizer("the cats")).items():
        (folder / name).write_text(text)
    model = cache / "models--someone--some-model"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (model / part).mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(model / "blobs" / blob)
        (model / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert spec_of("someone/some-model").d_model == 32
    assert load("someone/some-model").model(jnp.ones((1, 3), int)).shape == (1, 3, V)
    status, out, err = assay_command(
        *("generate", "someone/some-model", "--prompt", "the cat", "--max-new-tokens", 3, "--json")
    )
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["prompt_tokens"] == 7
    status, out, err = assay_command("convert", "someone/some-model", tmp_path / "mine", "--json")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["max_logit_difference"] < 1e-4
    (model / "snapshots" / commit / "model.safetensors").unlink()
    status, out, err = assay_command("generate", "someone/some-model", "--prompt", "the cat")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "there is no model.safetensors" in err


def test_every_tensor_is_a_view(tmp_path):
    folder = SafetensorsFolder(make(tmp_path / "start", "llama"))
    assert not any(folder[name].flags.owndata for name in folder)
