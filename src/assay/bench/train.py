"""How fast a training step is here, and against PyTorch's, turn by turn in one process.

Ratios of one run mean something; seconds on a shared machine do not.
"""

import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from statistics import median
from typing import Any

import jax
import numpy as np

from assay.bench.timing import Spread, seconds
from assay.errors import AssayError, did_you_mean, need_extra
from assay.interop.huggingface_config import config_from_spec
from assay.model.transformer import abstract
from assay.spec.model import BlockSpec, TransformerSpec
from assay.spec.run import RunSpec
from assay.startup import compute_in_the_calling_thread
from assay.train.step import initial_state, make_step

COMPILE_LIMIT = 180.0
"""Seconds that `torch.compile` may take before only eager PyTorch is timed, which is then said."""

PEERS = ("torch", "transformers")
"""Whom a step can be timed against: a plain PyTorch twin, or `transformers`' own model."""


@dataclass(frozen=True)
class Comparison:
    """Tokens a second of ours and (perhaps) theirs; `ratio` over 1 says that ours is faster.

    `theirs` is the `better` of their `forms`, eager and compiled, by the median; `not_timed` says
    why a form is missing.
    """

    ours: Spread
    theirs: Spread | None
    ratio: Spread | None
    forms: dict[str, Spread]
    better: str | None
    not_timed: dict[str, str]
    first_step_seconds: float
    first_loss: float
    their_first_loss: float | None
    threads: int
    versions: dict[str, str]


def bench_train(run: RunSpec, *, against: str | None = None, rounds: int = 5) -> Comparison:
    """Times whole updates (forward, backward, optimizer) on random tokens.

    Each round times ours, then theirs, for the same batch; the ratios are of each round. A turn
    begins with an untimed step: the memory that it takes back was another's in between.

    Raises:
        AssayError: if `against` is not known or not installed, or cannot express the model.
    """
    if against not in (None, *PEERS):
        raise AssayError(f"--against {against}: {did_you_mean(against, PEERS)}")
    shape = (run.data.batch_size, run.data.seq_len)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(run.model.vocab_size, size=shape, dtype=np.int32)
        for name in ("tokens", "targets")
    }
    began = time.perf_counter()
    ours = jax_step(run, batch)
    first_loss = ours()
    first_step = time.perf_counter() - began
    theirs: dict[str, Callable[[], float]] = {}
    not_timed: dict[str, str] = {}
    if against:
        theirs["eager"] = torch_step(run, batch, network=against)
        their_first_loss = theirs["eager"]()
        compiled = torch_step(run, batch, network=against, compiled=True)
        if reason := _why_not_within(COMPILE_LIMIT, compiled):
            not_timed["compiled"] = reason
        else:
            theirs["compiled"] = compiled

    ours()
    # So many steps a turn that a turn takes about a second.
    steps = max(1, round(1.0 / max(seconds(ours, 1), 1e-3)))
    tokens = steps * batch["tokens"].size

    def turn(step: Callable[[], float]) -> float:
        step()
        return tokens / seconds(step, steps)

    our_speeds, their_speeds = [], {form: [] for form in theirs}
    for _ in range(rounds):
        our_speeds.append(turn(ours))
        for form, step in theirs.items():
            their_speeds[form].append(turn(step))
    versions = {"jax": jax.__version__}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not theirs:
        return Comparison(
            Spread.of(our_speeds),
            None,
            None,
            {},
            None,
            {},
            first_step,
            first_loss,
            None,
            threads,
            versions,
        )
    import torch

    versions["torch"] = torch.__version__
    if against != "torch":
        versions[against] = metadata.version(against)
    better = max(theirs, key=lambda form: median(their_speeds[form]))
    ratios = [a / b for a, b in zip(our_speeds, their_speeds[better], strict=True)]
    return Comparison(
        Spread.of(our_speeds),
        Spread.of(their_speeds[better]),
        Spread.of(ratios),
        {form: Spread.of(speeds) for form, speeds in their_speeds.items()},
        better,
        not_timed,
        first_step,
        first_loss,
        their_first_loss,
        torch.get_num_threads(),
        versions,
    )


def _why_not_within(limit: float, compiled: Callable[[], float]) -> str | None:
    """Compiles by one step; why that failed or took longer than `limit` seconds, else None."""

    ended = []
    late_message = f"it did not compile within {limit:g} seconds"

    def late(*_):
        ended.append(True)
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    # Again every 20 s: the compiler swallows what is raised in some of its parts, and goes on.
    signal.setitimer(signal.ITIMER_REAL, limit, 20.0)
    try:
        with warnings.catch_warnings():  # the compiler's, about Python's and processors' versions
            warnings.simplefilter("ignore")
            compiled()
        return late_message if ended else None
    except Exception as error:  # whatever its compiler meets: there is then only eager to beat
        if ended:  # the compiler may have wrapped what was raised in it
            return late_message
        message = next(filter(str.strip, str(error).splitlines()), "")
        return f"it did not compile ({type(error).__name__}: {message.strip()[:200]})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def jax_step(run: RunSpec, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """Our update; each call is one step, and gives its loss."""
    compute_in_the_calling_thread()
    step = jax.jit(make_step(run, abstract(run.model, run.compute)), donate_argnums=0)
    shapes = jax.eval_shape(lambda: initial_state(run))
    with ThreadPoolExecutor(1) as beside:  # as training does it
        compiling = beside.submit(lambda: step.lower(shapes, batch, np.float32(0)).compile())
        held = [initial_state(run)]
        compiled = compiling.result()

    def once() -> float:
        held[0], metrics = compiled(held[0], batch, np.float32(0))
        return float(metrics["loss"])

    return once


# ---------------------------------------------------------------------------- PyTorch's


def torch_step(
    run: RunSpec,
    batch: dict[str, np.ndarray],
    *,
    network: str = "torch",
    compiled: bool = False,
) -> Callable[[], float]:
    """The same update in PyTorch: fused AdamW, bfloat16 as autocast.

    `network` is "torch", the twin below, or "transformers", the model that a Hugging Face config
    of this architecture makes there, with PyTorch's fused attention.

    Autocast keeps parameters, norms, the residual stream and the loss in float32; ours keeps
    parameters, the insides of norms, softmax and activations, and the loss.
    """
    try:
        import torch
    except ImportError:
        raise need_extra("torch", "parity", "Timing against PyTorch") from None
    torch.manual_seed(0)
    model = torch_twin(run.model) if network == "torch" else transformers_twin(run.model)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(batch["tokens"]).long()
    targets = torch.from_numpy(batch["targets"]).long()
    half = run.compute.dtype == "bfloat16"

    def once() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            logits = forward(tokens)
            loss = torch.nn.functional.cross_entropy(
                logits.view(-1, logits.shape[-1]), targets.view(-1)
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return once


def transformers_twin(spec: TransformerSpec) -> Any:
    """Tokens (B, T) to logits by `transformers`' own model of this architecture.

    Raises:
        AssayError: if it is not installed, or none of its families can express the spec.
    """
    try:
        import transformers
    except ImportError:
        raise need_extra("transformers", "parity", "Timing against transformers") from None
    from torch import nn

    config = dict(config_from_spec(spec))
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    config.use_cache = False

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa"
            )

        def forward(self, tokens):
            return self.model(input_ids=tokens).logits

    return Logits().float().train()


def torch_twin(spec: TransformerSpec) -> Any:
    """A plain PyTorch decoder of the same shape, as one would write it, with its fused attention.

    Raises:
        AssayError: if the spec has a part that the twin does not.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    activations = {
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
        "relu": functional.relu,
        "relu_squared": lambda x: functional.relu(x).square(),
        "sigmoid": torch.sigmoid,
    }

    def norm(of):
        if of.kind == "rmsnorm":
            return nn.RMSNorm(spec.d_model, of.epsilon)
        return nn.LayerNorm(spec.d_model, of.epsilon, bias=of.bias)

    class Attention(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of, self.width = of, of.width(spec.d_model)
            wide, narrow = of.heads * self.width, of.num_kv_heads * self.width
            self.qkv = nn.Linear(spec.d_model, wide + 2 * narrow, bias=of.qkv_bias)
            self.out = nn.Linear(wide, spec.d_model, bias=of.out_bias)
            self.split = (wide, narrow, narrow)

        def forward(self, x, angles):
            b, t, _ = x.shape
            q, k, v = (
                y.view(b, t, -1, self.width).transpose(1, 2)
                for y in self.qkv(x).split(self.split, dim=-1)
            )
            if self.of.qk_norm is not None:
                q, k = (functional.rms_norm(y, (self.width,)) for y in (q, k))
            if self.of.positions.kind == "rope":
                q, k = self.turn(q, angles), self.turn(k, angles)
            y = functional.scaled_dot_product_attention(
                q, k, v.to(q.dtype), is_causal=True, enable_gqa=self.of.num_kv_heads < self.of.heads
            )
            return self.out(y.transpose(1, 2).reshape(b, t, -1))

        def turn(self, x, angles):
            cos, sin = angles
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    class Mlp(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.act = activations[of.activation]
            self.up = nn.Linear(spec.d_model, of.hidden, bias=of.bias)
            self.gate = nn.Linear(spec.d_model, of.hidden, bias=of.bias) if of.gated else None
            self.down = nn.Linear(of.hidden, spec.d_model, bias=of.bias)

        def forward(self, x):
            if self.gate is not None:
                return self.down(self.act(self.gate(x)) * self.up(x))
            return self.down(self.act(self.up(x)))

    class Experts(nn.Module):
        """A loop over the experts, each of the tokens that chose it."""

        def __init__(self, of):
            super().__init__()
            self.of = of
            self.router = nn.Linear(spec.d_model, of.experts, bias=of.router.bias)
            self.experts = nn.ModuleList(Mlp(of.expert) for _ in range(of.experts))

        def forward(self, x):
            flat, out = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).reshape(-1, x.shape[-1])
            with torch.autocast("cpu", enabled=False):
                scores = self.router(flat.float())
            chosen, experts = scores.topk(self.of.router.k, dim=-1)
            weights = chosen.softmax(dim=-1)
            if not self.of.router.renormalise:
                weights = scores.softmax(dim=-1).gather(1, experts)
            for e, expert in enumerate(self.experts):
                rows, choice = torch.where(experts == e)
                y = expert(flat[rows]) * weights[rows, choice, None]
                out = out.index_add(0, rows, y.to(out.dtype))
            return out.view(x.shape)

    class Block(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.norm_1, self.attention = norm(of.norm), Attention(of.attention)
            part = Experts if of.feed_forward.kind == "moe" else Mlp
            self.norm_2, self.mlp = norm(of.norm), part(of.feed_forward)

        def forward(self, x, angles):
            x = x + self.attention(self.norm_1(x), angles)
            return x + self.mlp(self.norm_2(x))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(spec.padded_vocab, spec.d_model)
            learned = spec.embedding.positions.kind == "learned"
            self.positions = nn.Embedding(spec.context, spec.d_model) if learned else None
            self.blocks = nn.ModuleList(Block(of) for of in spec.decoder.blocks())
            self.norm = norm(spec.decoder.final_norm)
            self.head = nn.Linear(spec.d_model, spec.padded_vocab, bias=False)
            if spec.head.tied:
                self.head.weight = self.table.weight
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, tokens):
            t = tokens.shape[1]
            x = self.table(tokens)
            if self.positions is not None:
                x = x + self.positions(torch.arange(t))
            angles = rotations(t)
            for block in self.blocks:
                x = block(x, angles)
            return self.head(self.norm(x))

    for i, block in enumerate(spec.decoder.pattern):
        if reason := _not_in_the_twin(block):
            raise AssayError(f"decoder.pattern.{i}: {reason}; the PyTorch twin has no such part.")
    if spec.embedding.ngrams is not None:
        raise AssayError("embedding.ngrams is set; the PyTorch twin has no such part.")
    if spec.multi_token is not None:
        raise AssayError("multi_token is set; the PyTorch twin has no such part.")
    if spec.head is None or spec.decoder.final_norm is None:
        raise AssayError("the PyTorch twin needs a head and a final norm.")
    rope = next(
        (b.attention for b in spec.decoder.pattern if b.attention.positions.kind == "rope"), None
    )

    def rotations(t):
        if rope is None:
            return None
        half = torch.arange(0, rope.width(spec.d_model), 2) / rope.width(spec.d_model)
        angles = torch.arange(t)[:, None] * rope.positions.theta**-half
        return angles.cos(), angles.sin()

    return Decoder()


def _not_in_the_twin(block: BlockSpec) -> str | None:
    attention, mlp = block.attention, block.feed_forward
    if attention is None or mlp is None:
        return "a block without attention or without feed-forward"
    for name in ("softcap", "window", "scale", "gate", "value_embedding"):
        if getattr(attention, name) is not None:
            return f"attention.{name} is set"
    if attention.positions.kind == "alibi":
        return "attention.positions are alibi"
    if block.norm_position != "pre":
        return f"norm_position is '{block.norm_position}'"
    if mlp.kind == "moe":
        if mlp.router.kind != "top_k" or mlp.router.jitter or mlp.shared or mlp.capacity:
            return "the experts are not a dropless top-k mixture"
        mlp = mlp.expert
    if len(mlp.widths) > 1:
        return "the feed-forward is not a plain or gated MLP"
    return None
