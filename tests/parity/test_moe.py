"""Mixtral, OLMoE and Qwen3-MoE against PyTorch's, by Hugging Face `transformers`.

Small models of random weights, shrunk from the presets; 1e-4 in float32, never relaxed. They go
through checkpoints on disk, which keep experts one by one where the modules stack them.
"""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralForCausalLM,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from assay.interop.huggingface import load_folder, save_folder
from assay.interop.huggingface_config import canonical, config_from_spec, spec_from_config
from assay.model.transformer import from_named_parameters
from assay.spec import presets
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec

TOLERANCE = 1e-4
B, T = 2, 24


def config_of(cls, spec: TransformerSpec, **more):
    block = spec.decoder.pattern[0]
    attention, experts = block.attention, block.feed_forward
    return cls(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        num_hidden_layers=spec.decoder.num_layers,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.width(spec.d_model),
        intermediate_size=experts.expert.hidden,
        max_position_embeddings=spec.context,
        rms_norm_eps=block.norm.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": attention.positions.theta},
        num_experts_per_tok=experts.router.k,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        **more,
    )


def mixtral(spec):
    experts = spec.decoder.pattern[0].feed_forward.experts
    config = config_of(MixtralConfig, spec, num_local_experts=experts, sliding_window=None)
    return MixtralForCausalLM(config)


def olmoe(spec):
    experts = spec.decoder.pattern[0].feed_forward
    more = {"num_experts": experts.experts, "norm_topk_prob": experts.router.renormalise}
    return OlmoeForCausalLM(config_of(OlmoeConfig, spec, **more))


def qwen3(spec):
    experts = spec.decoder.pattern[0].feed_forward
    config = config_of(
        Qwen3MoeConfig,
        spec,
        num_experts=experts.experts,
        norm_topk_prob=experts.router.renormalise,
        moe_intermediate_size=experts.expert.hidden,
    )
    return Qwen3MoeForCausalLM(config)


FAMILIES = {"mixtral-8x7b": mixtral, "olmoe-1b-7b": olmoe, "qwen3-30b-a3b": qwen3}


@pytest.mark.parametrize("name", FAMILIES)
def test_both_ways_with_losses(name, tmp_path):
    spec = presets.shrink(presets.get(name).model)
    torch.manual_seed(0)
    theirs = FAMILIES[name](spec).eval()
    with torch.no_grad():
        for parameter_name, x in theirs.named_parameters():
            x.normal_(1.0 if "norm" in parameter_name else 0.0, 0.15)
    theirs.save_pretrained(tmp_path / "theirs")
    found, named = load_folder(tmp_path / "theirs")
    layer, wanted_layer = (x.decoder.pattern[0].feed_forward for x in (found, spec))
    assert (layer.router, layer.expert) == (wanted_layer.router, wanted_layer.expert)
    model = from_named_parameters(found, named, ComputeSpec())
    tokens = np.random.default_rng(0).integers(spec.vocab_size, size=(B, T))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens), output_router_logits=True)
    output = jax.jit(lambda model, tokens: model.forward(tokens))(model, tokens.astype(np.int32))
    scale = np.abs(wanted.logits.numpy()).max()
    assert scale > 0.5
    np.testing.assert_allclose(output.logits, wanted.logits.numpy(), atol=TOLERANCE, rtol=TOLERANCE)
    for record, logits in zip(output.routing, wanted.router_logits, strict=True):
        experts = spec.decoder.pattern[0].feed_forward
        # Theirs counts each of the k choices as a whole, so it is k times ours.
        loss = load_balancing_loss_func((logits,), experts.experts, experts.router.k)
        assert float(record.balance_loss) == pytest.approx(
            float(loss) / experts.router.k, rel=TOLERANCE
        )
        z_loss = torch.logsumexp(logits, dim=-1).square().mean()
        assert float(record.z_loss) == pytest.approx(float(z_loss), rel=TOLERANCE)
    # And back.
    save_folder(tmp_path / "ours", named, spec)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        back = again(torch.from_numpy(tokens)).logits
    torch.testing.assert_close(back, wanted.logits, atol=1e-6, rtol=1e-6)
    assert canonical(spec_from_config(config_from_spec(spec))) == canonical(spec)
