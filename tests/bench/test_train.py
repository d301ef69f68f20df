"""The twin that speed is compared with computes the same thing."""

import jax
import numpy as np
import pytest
import torch

from assay.bench import train as bench
from assay.bench.train import bench_train, torch_twin, transformers_twin
from assay.errors import AssayError
from assay.model.transformer import Transformer, named_parameters
from assay.spec import accounting
from assay.spec.presets import PRESETS, shrink


def twin_weights(named, layers):
    """Our parameters by the twin's names; PyTorch's linear weights are (out, in)."""
    theirs = {"table.weight": named["embedding.table"]}
    if "embedding.positions" in named:
        theirs["positions.weight"] = named["embedding.positions"]
    for i in range(layers):
        ours, to = f"layers.{i}", f"blocks.{i}"
        for kind, suffix in (("w", "weight"), ("b", "bias")):
            if f"{ours}.attention.q.{kind}" in named:
                parts = [named[f"{ours}.attention.{part}.{kind}"].T for part in "qkv"]
                theirs[f"{to}.attention.qkv.{suffix}"] = np.concatenate(parts)
        for mine, place in (
            ("attention.o", "attention.out"),
            ("feed_forward.up.0", "mlp.up"),
            ("feed_forward.gate", "mlp.gate"),
            ("feed_forward.down", "mlp.down"),
        ):
            for kind, suffix in (("w", "weight"), ("b", "bias")):
                if f"{ours}.{mine}.{kind}" in named:
                    theirs[f"{to}.{place}.{suffix}"] = named[f"{ours}.{mine}.{kind}"].T
        if f"{ours}.feed_forward.router.w" in named:
            router, at = named[f"{ours}.feed_forward.router.w"], f"{to}.mlp"
            theirs[f"{at}.router.weight"] = router.T
            for mine, place in (("up.0", "up"), ("gate", "gate"), ("down", "down")):
                for e, w in enumerate(named.get(f"{ours}.feed_forward.experts.{mine}.w", ())):
                    theirs[f"{at}.experts.{e}.{place}.weight"] = w.T
        for mine, place in (("attention_norm", "norm_1"), ("feed_forward_norm", "norm_2")):
            theirs[f"{to}.{place}.weight"] = named[f"{ours}.{mine}.scale"]
            if f"{ours}.{mine}.bias" in named:
                theirs[f"{to}.{place}.bias"] = named[f"{ours}.{mine}.bias"]
    theirs["norm.weight"] = named["final_norm.scale"]
    if "final_norm.bias" in named:
        theirs["norm.bias"] = named["final_norm.bias"]
    theirs["head.weight"] = named["head.w"].T if "head.w" in named else named["embedding.table"]
    return {name: torch.from_numpy(np.array(leaf)) for name, leaf in theirs.items()}


@pytest.mark.parametrize(
    "name", ["gpt2", "baby-gpt", "llama-3-8b", "nano", "baby-moe", "mixtral-8x7b"]
)
def test_the_twin_gives_our_logits(name):
    spec = shrink(PRESETS[name].model)
    model = Transformer(spec, rngs=jax.random.key(1))
    tokens = np.random.default_rng(0).integers(spec.vocab_size, size=(2, 12), dtype=np.int32)
    twin = torch_twin(spec)
    named = {k: np.asarray(v) for k, v in named_parameters(model).items()}
    weights = twin_weights(named, spec.decoder.num_layers)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    with torch.no_grad():
        theirs = twin(torch.from_numpy(tokens).long()).numpy()[..., : spec.vocab_size]
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "baby-llama"])
def test_the_peer_in_transformers_is_of_the_same_shape(name):
    spec = shrink(PRESETS[name].model)
    twin = transformers_twin(spec)
    assert sum(p.numel() for p in twin.parameters()) == accounting.parameters(spec).total
    assert twin.model.config._attn_implementation == "sdpa"
    assert twin(torch.zeros((2, 12), dtype=torch.long)).shape == (2, 12, spec.vocab_size)


def test_a_bench_gives_figures_of_both(monkeypatch):
    monkeypatch.setattr(bench, "COMPILE_LIMIT", 0.01)  # torch.compile takes a minute
    run = PRESETS["tiny-gpt"].run.changed(
        {"model.decoder.num_layers": 1, "data.batch_size": 2, "data.seq_len": 8}
    )
    result = bench_train(run, against="torch", rounds=1)
    assert result.ours.median > 0
    assert result.theirs == result.forms[result.better]
    assert result.theirs.median == max(form.median for form in result.forms.values())
    assert result.ratio.median == pytest.approx(result.ours.median / result.theirs.median)
    assert abs(result.first_loss - result.their_first_loss) < 0.5
    assert result.not_timed == {"compiled": "it did not compile within 0.01 seconds"}


def test_what_the_twin_cannot_do_is_said():
    spec = PRESETS["nano"].model.at("decoder.pattern.0.attention.window", 8)
    with pytest.raises(AssayError, match=r"decoder.pattern.0: attention.window is set"):
        torch_twin(spec)
