"""Our forward and backward pass against PyTorch's, by Hugging Face `transformers`.

Small models with random weights, biases and norms among them. 1e-4 in float32, never relaxed.
Axes: B batch, T tokens, V vocabulary.
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
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from assay.interop.huggingface import (
    from_huggingface,
    load_folder,
    save_folder,
    spec_from_config,
    to_huggingface,
)
from assay.interop.huggingface_config import config_from_spec
from assay.model.attention import geometry
from assay.model.loss import token_losses
from assay.model.positions import rope_frequencies
from assay.model.transformer import (
    Transformer,
    abstract,
    from_named_parameters,
    named_parameters,
)
from assay.spec import presets
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec

TOLERANCE = 1e-4
B, T, V = 2, 24, 61

LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
WIDE = LLAMA | {"head_dim": 16}


def scaled(kind: str, **fields) -> dict[str, Any]:
    return WIDE | {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **fields}}


LAYOUTS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=V,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt2-relu": lambda: GPT2Config(
        vocab_size=V,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_inner=40,
        activation_function="relu",
        layer_norm_epsilon=1e-3,
        scale_attn_weights=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": lambda: LlamaConfig(**LLAMA),
    "llama-biases": lambda: LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "smollm": lambda: LlamaConfig(
        **LLAMA | {"num_key_value_heads": 1, "hidden_size": 36, "num_attention_heads": 3},
        tie_word_embeddings=True,
    ),
    "rope-linear": lambda: LlamaConfig(**scaled("linear", factor=3.0)),
    "rope-llama3": lambda: LlamaConfig(
        **scaled(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "rope-yarn": lambda: LlamaConfig(
        **scaled(
            "yarn",
            factor=4.0,
            beta_fast=8.0,
            beta_slow=0.5,
            original_max_position_embeddings=64,
        )
    ),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen2-windows": lambda: Qwen2Config(
        **LLAMA | {"num_hidden_layers": 3},
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": lambda: Qwen3Config(**WIDE, tie_word_embeddings=True),
    "qwen3-biases": lambda: Qwen3Config(**WIDE, attention_bias=True, hidden_act="gelu"),
}
"""Layout -> the config of a small model. Windows are shorter than T."""

MAIN = ("gpt2", "llama", "smollm", "qwen3")


def every_way(layouts, thoroughly=MAIN):
    """Layouts, each plain and unrolled, and by CPU kernels and scanned; some also crosswise."""
    return pytest.mark.parametrize(
        ("layout", "compute"),
        [
            pytest.param(
                layout,
                ComputeSpec(kernels=kernels, scan_layers=scan),
                id=f"{layout}-{kernels}-{'scanned' if scan else 'unrolled'}",
            )
            for layout in layouts
            for kernels in ("plain", "cpu")
            for scan in (False, True)
            if layout in thoroughly or scan == (kernels == "cpu")
        ],
    )


@dataclass(frozen=True)
class Example:
    """A model of theirs, its state and architecture, and tokens (B, T)."""

    theirs: torch.nn.Module
    config: dict[str, Any]
    state: dict[str, np.ndarray]
    spec: TransformerSpec
    tokens: np.ndarray

    def ours(self, compute: ComputeSpec) -> Transformer:
        named = from_huggingface(self.state, self.config)
        return from_named_parameters(self.spec, named, compute)


@functools.cache
def example(layout: str) -> Example:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(LAYOUTS[layout](), attn_implementation="eager")
    theirs = theirs.to(torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # no zeros or ones anywhere, nor anything small
            parameter.normal_(0.0, 0.3)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    config = theirs.config.to_dict()
    state = {name: tensor.numpy().copy() for name, tensor in theirs.state_dict().items()}
    tokens = np.random.default_rng(0).integers(0, V, (B, T))
    return Example(theirs, config, state, spec_from_config(config), tokens)


def assert_close(ours, theirs, where: str):
    ours = np.asarray(ours)
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape, where
    assert theirs.std() > 0.1, f"{where}: too small to tell anything"
    worst = float(np.abs(ours - theirs).max())
    assert worst <= TOLERANCE, f"{where}: differs by {worst:.2e}"


# ---------------------------------------------------------------------------- forward


@every_way(LAYOUTS)
def test_logits(layout, compute):
    ex = example(layout)
    with torch.no_grad():
        wanted = ex.theirs(torch.from_numpy(ex.tokens)).logits
    assert_close(ex.ours(compute)(ex.tokens), wanted, "logits")


@dataclass(frozen=True)
class Names:
    """What transformers calls each part."""

    embedding: str
    block: str
    attention_norm: str
    attention: str
    feed_forward_norm: str
    feed_forward: str
    final_norm: str


GPT2_NAMES = Names(
    "transformer.drop", "transformer.h.{}", "ln_1", "attn", "ln_2", "mlp", "transformer.ln_f"
)
LLAMA_NAMES = Names(
    "model.embed_tokens",
    "model.layers.{}",
    "input_layernorm",
    "self_attn",
    "post_attention_layernorm",
    "mlp",
    "model.norm",
)


def their_parts(ex: Example) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each module of theirs by name -> its (input, output) in one forward pass."""
    seen, hooks = {}, []

    def record(name):
        def hook(module, args, kwargs, output):
            x = args[0] if args else kwargs.get("hidden_states")
            y = output[0] if isinstance(output, tuple) else output
            if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):  # not the whole model
                seen[name] = x.numpy(), y.numpy()

        return hook

    for name, module in ex.theirs.named_modules():
        hooks.append(module.register_forward_hook(record(name), with_kwargs=True))
    with torch.no_grad():
        ex.theirs(torch.from_numpy(ex.tokens), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@every_way(LAYOUTS)
def test_module_by_module(layout, compute):
    """Each of our modules, given what theirs was given, returns what theirs returned."""
    ex = example(layout)
    theirs = their_parts(ex)
    names = GPT2_NAMES if ex.config["model_type"] == "gpt2" else LLAMA_NAMES
    model = ex.ours(compute)
    positions = jnp.arange(T, dtype=jnp.int32)
    shared = geometry(
        [block.attention for block in ex.spec.decoder.pattern],
        ex.spec.d_model,
        positions,
        causal=True,
    )
    checked = set()

    def check(name, function):
        x, wanted = theirs[name]
        assert_close(function(jnp.asarray(x)), wanted, name)
        checked.add(name)

    check(names.embedding, lambda x: model.embedding(ex.tokens, positions, None))
    for i, block in enumerate(model.unstacked_layers()):
        at = names.block.format(i)
        check(f"{at}.{names.attention_norm}", block.attention_norm)
        check(f"{at}.{names.attention}", lambda x, block=block: block.attention(x, shared)[0])
        check(f"{at}.{names.feed_forward_norm}", block.feed_forward_norm)
        check(f"{at}.{names.feed_forward}", block.feed_forward)
        check(at, lambda x, block=block: block(x, shared)[0])
        if f"{at}.self_attn.q_norm" in theirs:
            check(f"{at}.self_attn.q_norm", block.attention.q_norm)
            check(f"{at}.self_attn.k_norm", block.attention.k_norm)
    check(names.final_norm, model.final_norm)
    check("lm_head", model.logits)
    assert len(checked) >= 3 + 5 * ex.spec.decoder.num_layers


SHARP = {
    "rope-linear": ("decoder.pattern.0.attention.positions.scaling", None),
    "rope-llama3": ("decoder.pattern.0.attention.positions.scaling", None),
    "rope-yarn": ("decoder.pattern.0.attention.positions.scaling.attention_factor", 1.0),
    "mistral": ("decoder.pattern.0.attention.window", 6),
    "qwen2-windows": ("decoder.pattern.1.attention.window", 6),
    "qwen3": ("decoder.pattern.0.attention.positions.theta", 9_000.0),
    "gpt2": ("decoder.pattern.0.feed_forward.activation", "gelu"),
}


@pytest.mark.parametrize("layout", SHARP)
def test_the_comparison_would_notice(layout):
    """A small change of the architecture moves the logits by more than the tolerance."""
    ex = example(layout)
    model = ex.ours(ComputeSpec())
    named = named_parameters(model)
    other = from_named_parameters(ex.spec.at(*SHARP[layout]), named)
    assert float(jnp.abs(model(ex.tokens) - other(ex.tokens)).max()) > 2 * TOLERANCE


@pytest.mark.parametrize("layout", ["rope-linear", "rope-llama3", "rope-yarn", "qwen3"])
def test_rotary_frequencies(layout):
    """The angle of each pair a position, equal to a few roundings."""
    ex = example(layout)
    rope = ex.spec.decoder.pattern[0].attention.positions
    rates, factor = rope_frequencies(16, rope)
    embedding = ex.theirs.model.rotary_emb
    np.testing.assert_allclose(rates, embedding.inv_freq.numpy(), rtol=5e-7)
    assert factor == pytest.approx(embedding.attention_scaling, rel=1e-7)


# ---------------------------------------------------------------------------- backward


@every_way(["gpt2", "qwen3", "llama-biases"], thoroughly=())
def test_gradients(layout, compute):
    """Of the mean cross-entropy with respect to every weight, 1e-4 of the largest in it.

    Under jit, with the logits that it gives on the way.
    """
    ex = example(layout)
    tokens = torch.from_numpy(ex.tokens)
    ex.theirs.zero_grad()
    logits = ex.theirs(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    wanted = {name: p.grad.numpy().copy() for name, p in ex.theirs.named_parameters()}
    ex.theirs.zero_grad()

    def objective(model):
        out = model(ex.tokens[:, :-1])
        return jnp.mean(token_losses(out, jnp.asarray(ex.tokens[:, 1:]))), out

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (ours, out), grads = step(ex.ours(compute))
    assert_close(out, logits, "logits")
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)
    found = to_huggingface(named_parameters(grads), ex.spec)
    assert found.keys() == wanted.keys()
    for name, theirs in wanted.items():
        largest = np.abs(theirs).max()
        assert largest > 1e-4, f"{name}: too small to tell anything"
        worst = np.abs(found[name] - theirs).max() / largest
        assert worst <= TOLERANCE, f"{name}: gradient differs by {worst:.2e} of {largest:.2e}"


# ---------------------------------------------------------------------------- files and names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_bit_identical(layout):
    ex = example(layout)
    back = to_huggingface(from_huggingface(ex.state, ex.config), ex.spec)
    tied = {"lm_head.weight"} if ex.config["tie_word_embeddings"] else set()
    assert back.keys() == ex.state.keys() - tied
    for name, array in back.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, ex.state[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [2**30, 8_000], ids=["single", "sharded"])
def test_they_load_what_we_save(layout, shard_bytes, tmp_path):
    """No missing key, no unexpected key, the same logits bit for bit; and we load it again."""
    ex = example(layout)
    named = from_huggingface(ex.state, ex.config)
    folder = tmp_path / "exported"
    save_folder(folder, named, ex.spec, shard_bytes=shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes < 2**30)
    again, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert again.dtype == torch.float32
    with torch.no_grad():
        tokens = torch.from_numpy(ex.tokens)
        assert torch.equal(again.eval()(tokens).logits, ex.theirs(tokens).logits)
    spec, loaded = load_folder(folder)
    assert spec == ex.spec
    assert loaded.keys() == named.keys()
    assert all(np.array_equal(loaded[name], named[name]) for name in named)


def test_we_load_what_they_save(tmp_path):
    ex = example("qwen2")
    ex.theirs.save_pretrained(tmp_path)
    spec, loaded = load_folder(tmp_path)
    assert spec == ex.spec
    named = from_huggingface(ex.state, ex.config)
    assert all(np.array_equal(loaded[name], named[name]) for name in named)


def test_bfloat16_files_are_read(tmp_path):
    ex = example("llama")
    half = AutoModelForCausalLM.from_config(ex.theirs.config).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    _, loaded = load_folder(tmp_path)
    wanted = half.model.layers[1].mlp.up_proj.weight.detach().float().numpy().T
    assert np.array_equal(loaded["layers.1.feed_forward.up.0.w"], wanted)


# ---------------------------------------------------------------------------- the real ones


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "smollm-135m", "llama-3-8b", "qwen3-0.6b"])
def test_parameter_counts_of_presets(name):
    """Theirs are counted on the meta device, from the config that we write."""
    spec = presets.get(name).model
    ours = sum(leaf.size for leaf in named_parameters(abstract(spec)).values())
    config = AutoConfig.for_model(**config_from_spec(spec))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert ours == theirs.num_parameters()
