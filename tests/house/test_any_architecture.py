"""Architectures that no preset has: parts drawn together at random, each held to what all must be.

`-m fuzz` draws FUZZ of them (40, or as many as the variable ASSAY_FUZZ says); the rest of the
suite draws a few. A number always draws the same one.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assay.errors import AssayError
from assay.evaluate.checks import check
from assay.generate.engine import generate
from assay.interop.huggingface_config import canonical, config_from_spec, spec_from_config
from assay.model.transformer import Transformer, abstract, named_parameters
from assay.plan.memory import training_memory
from assay.spec.accounting import parameters, run_flops_per_token
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec, DataSpec, RunSpec
from assay.train.step import initial_state, make_step

FEW, FUZZ = 3, int(os.environ.get("ASSAY_FUZZ", "40"))
SEEDS = [
    *range(FEW),
    *(pytest.param(seed, marks=pytest.mark.fuzz) for seed in range(FEW, FUZZ)),
]

VOCABULARY, CONTEXT = 29, 24


class Draw:
    """Choices from one seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def one(self, *of: Any) -> Any:
        return of[self.rng.integers(len(of))]

    def maybe(self, value: Any, chance: float = 0.3) -> Any:
        return value if self.rng.random() < chance else None

    def some(self, chance: float = 0.3, **fields: Any) -> dict[str, Any]:
        """Each of the fields with that chance."""
        return {name: value for name, value in fields.items() if self.rng.random() < chance}

    # ---- parts, as data

    def norm(self) -> dict:
        kind = self.one("rmsnorm", "layernorm")
        more = {"bias": False} if kind == "layernorm" else {}
        return {"kind": kind, **self.some(scale=False, epsilon=1e-3, **more)}

    def positions(self) -> dict:
        scaling = self.one(
            None,
            {"kind": "linear", "factor": 2.0},
            {"kind": "llama3", "original_context": 16},
            {"kind": "yarn", "factor": 2.0, "original_context": 16},
        )
        return self.one(
            {"kind": "none"},
            {"kind": "rope", "theta": 100.0, "scaling": scaling},
            {"kind": "rope"},
            {"kind": "alibi"},
            {"kind": "relative", "buckets": 8, "max_distance": 8},
        )

    def attention(self, *, cross: bool = False) -> dict:
        heads = self.one(1, 2, 4)
        fields = {
            "heads": heads,
            "kv_heads": self.one(*(n for n in (1, 2, 4) if heads % n == 0)),
            **self.some(
                head_dim=self.one(4, 10),
                qkv_bias=True,
                out_bias=True,
                qk_norm={"norm": self.norm(), "over": self.one("head", "projection")},
                scale=0.3,
                softcap=5.0,
                gate=self.one("head", "feature"),
            ),
        }
        if not cross:
            fields |= self.some(window=self.one(2, 3, 40), value_embedding={"gate_channels": 4})
            fields |= {"positions": self.positions()}
        return fields

    def mlp(self, hidden: int) -> dict:
        gated = self.one(True, False)
        layers = hidden if gated else self.one(hidden, (hidden, 12))
        activation = self.one("gelu", "gelu_tanh", "relu", "relu_squared", "silu", "sigmoid")
        more = self.some(bias=True)
        return {"kind": "mlp", "hidden": layers, "activation": activation, "gated": gated, **more}

    def experts(self, *, causal: bool) -> dict:
        routers = [
            {"kind": "top_k", "k": self.one(1, 2), **self.some(renormalise=False, bias=True)},
            {"kind": "noisy_top_k", "k": 2},
            {"kind": "sigmoid_top_k", "k": 2, **self.some(scale=2.0)},
            {"kind": "soft", "slots": self.one(1, 2), "over": "token"},
        ]
        if not causal:
            routers.append({"kind": "expert_choice"})
            routers.append({"kind": "soft", "over": "sequence"})
        fields = self.some(
            shared=self.mlp(8),
            capacity={"load": self.one(0.5, 1.25), "priority": "token"},
            balance_loss=0.01,
            z_loss=0.01,
        )
        router = self.one(*routers)
        return {"kind": "moe", "experts": 4, "expert": self.mlp(8), "router": router, **fields}

    def block(self, *, causal: bool, cross: bool = False) -> dict:
        attention = self.maybe(self.attention(), 0.85)
        feed_forward = self.one(self.mlp(24), self.mlp(24), self.experts(causal=causal))
        return {
            "attention": attention,
            "feed_forward": feed_forward if attention is None else self.maybe(feed_forward, 0.9),
            "cross": self.attention(cross=True) if cross else None,
            "norm": self.norm(),
            "norm_position": self.one("pre", "pre", "post", "both"),
        }

    def stack(self, *, causal: bool, cross: bool = False) -> dict:
        pattern = [self.block(causal=causal, cross=cross) for _ in range(self.one(1, 1, 2))]
        return {
            "pattern": pattern,
            "num_layers": len(pattern) + self.one(0, 1, 2),
            "final_norm": self.maybe(self.norm(), 0.7),
            "causal": causal,
        }

    def embedding(self) -> dict:
        positions = self.one("none", "none", "learned", "sinusoidal")
        return {
            "positions": {"kind": positions},
            **self.some(
                scale_by_sqrt_width=True,
                norm=self.norm(),
                ngrams={"orders": self.one((2,), (2, 3)), "rows": 64},
            ),
        }

    def model(self) -> dict:
        reads = self.one(False, False, False, True)
        return {
            "vocab_size": VOCABULARY,
            "d_model": self.one(16, 24),
            "context": CONTEXT,
            "decoder": self.stack(causal=True, cross=reads),
            "encoder": self.stack(causal=False) if reads else None,
            "embedding": self.embedding(),
            "head": {
                "tied": self.one(True, False),
                **self.some(scale_by_inverse_sqrt_width=True, bias=True, softcap=5.0),
            },
            "init": {
                "weights": {"kind": "normal", "std": 0.2},
                "embedding": {"kind": "normal", "std": 0.5},
                "residual": self.one("same", "depth_scaled"),
            },
            **self.some(0.2, vocab_multiple=8, multi_token={"depth": self.one(1, 2)}),
        }

    def of_family(self) -> dict:
        """As Llama, Mistral, Qwen or Mixtral, or as GPT-2, are."""
        heads, epsilon = self.one(2, 4), self.one(1e-5, 1e-6)
        common = {"vocab_size": VOCABULARY, "d_model": 16, "context": CONTEXT}
        if self.one(True, False, False):
            norm = {"kind": "layernorm", "epsilon": epsilon}
            feed_forward = {"kind": "mlp", "hidden": 40, "activation": "gelu_tanh", "bias": True}
            attention = {"heads": heads, "qkv_bias": True, "out_bias": True}
            common |= {"embedding": {"positions": {"kind": "learned"}}, "head": {"tied": True}}
        else:
            norm = {"kind": "rmsnorm", "epsilon": epsilon}
            feed_forward = {"kind": "mlp", "hidden": 40, "activation": "silu", "gated": True}
            qk_norm = {"norm": {"kind": "rmsnorm", "epsilon": epsilon}}
            of_kind = self.one({}, {"window": 8}, {"qkv_bias": True}, {"qk_norm": qk_norm})
            attention = {
                "heads": heads,
                "kv_heads": self.one(1, 2),
                "positions": {"kind": "rope", "theta": self.one(1e4, 5e5)},
                **of_kind,
            }
            if of_kind in ({}, {"window": 8}) and self.one(True, False):
                feed_forward = {"kind": "moe", "experts": 4, "expert": feed_forward}
            common |= {"head": {"tied": self.one(True, False)}}
        block = {"attention": attention, "feed_forward": feed_forward, "norm": norm}
        stack = {"pattern": [block], "num_layers": self.one(1, 3), "final_norm": norm}
        return {**common, "decoder": stack}


def drawn(seed: int) -> TransformerSpec:
    """What the seed draws; what is refused must be so in one sentence, and is drawn anew."""
    draw = Draw(seed)
    for _ in range(50):
        try:
            return TransformerSpec.from_data(draw.model())
        except AssayError as error:
            message = str(error)
        assert "\n" not in message
        assert message.endswith((".", "?", ".)")), message
    raise AssertionError("fifty draws were refused")


def run_of(spec: TransformerSpec) -> RunSpec:
    packing = "pairs" if spec.encoder else "stream"
    return RunSpec(model=spec, data=DataSpec(seq_len=16, batch_size=4, packing=packing))


@pytest.fixture(params=SEEDS, scope="module")
def spec(request) -> TransformerSpec:
    return drawn(request.param)


@pytest.mark.usefixtures("quick_to_compile")
def test_what_is_proved_of_every_model(spec):
    report = check(spec)
    failed = [c for c in report.checks if not c.passed]
    assert not failed, spec.to_json(indent=None)


def test_data_both_ways_and_counts(spec):
    assert TransformerSpec.from_json(spec.to_json()) == spec
    net = Transformer(spec, rngs=jax.random.key(0))
    assert sum(x.size for x in named_parameters(net).values()) == parameters(spec).total
    run = run_of(spec)
    assert run_flops_per_token(run).train > 0
    assert training_memory(run, "none").total >= training_memory(run, "block").total > 0


@pytest.mark.usefixtures("quick_to_compile")
def test_one_update_however_it_is_computed(spec):
    """Unrolled or scanned, kept or made again, by our kernels or plainly."""
    rng = np.random.default_rng(0)
    shape = (4, 16)
    names = ["tokens", "targets"] + (["source"] if spec.encoder else [])
    batch = {name: rng.integers(VOCABULARY, size=shape, dtype=np.int32) for name in names}

    def update(**compute):
        run = run_of(spec).replace(compute=ComputeSpec(**compute))
        step = jax.jit(make_step(run, abstract(run.model, run.compute)))
        return step(initial_state(run), batch, np.float32(0.5))[1]

    wanted = update(kernels="plain")
    assert np.isfinite(wanted["loss"])
    for compute in ({}, {"scan_layers": True}, {"remat": "block"}):
        found = update(**compute)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, err_msg=str(compute))


@pytest.mark.usefixtures("quick_to_compile")
def test_what_it_writes_is_what_it_says(spec):
    """The log-probabilities of a written text are those of the whole text read at once."""
    net = Transformer(spec, rngs=jax.random.key(0))
    prompts, new = [[3, 1, 4, 1, 5], [9]], 6
    sources = {"start_token": 0} if spec.encoder else {}
    result = generate(net, prompts, max_new_tokens=new, seed=0, **sources)
    for prompt, ids, logprobs in zip(prompts, result.ids, result.logprobs, strict=True):
        begun = [0] if spec.encoder else prompt
        whole = jnp.array([begun + ids])
        read = {"source": jnp.array([prompt])} if spec.encoder else {}
        logits = jax.nn.log_softmax(net(whole, **read)[0, :, :VOCABULARY])
        places = np.arange(len(begun) - 1, len(begun) - 1 + len(ids))
        np.testing.assert_allclose(logprobs, logits[places, np.array(ids)], atol=1e-3)


def test_hugging_face_s_config_is_the_spec_or_refused(spec):
    config, message = None, ""
    try:
        config = config_from_spec(spec)
    except AssayError as error:
        message = str(error)
    assert "\n" not in message
    assert config is None or canonical(spec_from_config(config)) == canonical(spec)


@pytest.mark.parametrize("seed", range(20))
def test_a_family_s_architecture_goes_to_hugging_face_and_back(seed):
    spec = TransformerSpec.from_data(Draw(seed).of_family())
    assert canonical(spec_from_config(config_from_spec(spec))) == canonical(spec)
