"""How fast text is decoded here, against `transformers`' own `generate`, turn by turn.

Both have the same random weights: ours go out through the Hugging Face export and in again on
their side. Beside the figures stands the limit: a step of decoding reads every weight once, so it
cannot be faster than this machine reads memory, which is measured in the same run.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from assay.bench.timing import Spread
from assay.errors import AssayError, did_you_mean, need_extra
from assay.generate.engine import Generator
from assay.interop.huggingface import save_folder
from assay.model import native
from assay.model.layers import use_cpu_kernels
from assay.model.transformer import Transformer, named_parameters
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec

DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Side:
    """Tokens a second of decoding and of reading the prompt, and seconds to the first token."""

    decode: Spread
    prefill: Spread
    time_to_first_token: Spread


@dataclass(frozen=True)
class Decoding:
    """`ratio` and `prefill_ratio` over 1 say that ours is faster.

    `limit` is tokens a second where nothing took time but reading the weights at
    `read_bandwidth` bytes a second (None for experts, of which a step reads some only).
    `same_tokens` is the share of ids that are equal on both sides; `their_cache` the kind of
    cache that was faster for them; `native` says whether ours is C++ (`model/native.py`), or why
    not.
    """

    ours: Side
    theirs: Side | None
    ratio: Spread | None
    prefill_ratio: Spread | None
    read_bandwidth: float
    bytes_read: int
    weight_bytes: int
    limit: float | None
    same_tokens: float | None
    their_cache: str | None
    native: str
    compile_seconds: float
    threads: int
    versions: dict[str, str]


Turn = tuple[float, float, list[list[int]]]
"""Seconds to the first token, seconds for the others, and all ids."""


def bench_decode(
    spec: TransformerSpec,
    *,
    dtype: str = "float32",
    against: str | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 5,
) -> Decoding:
    """Times greedy decoding after a random prompt; each round is a turn of ours, then of theirs.

    For "int8", theirs is in bfloat16: `transformers` has no int8 of its own on a CPU.

    Raises:
        AssayError: if `dtype` or `against` is not known, `transformers` is not installed or
            cannot express the model, or learned positions do not reach.
    """
    if dtype not in DTYPES:
        raise AssayError(f"--dtype {dtype}: {did_you_mean(dtype, DTYPES)}")
    if against not in (None, "torch"):
        raise AssayError(f"--against {against}: {did_you_mean(against, ['torch'])}")
    if new_tokens < 2:
        raise AssayError(f"--new-tokens: found {new_tokens}, but two are needed to time one.")
    weights, compute = ("int8", "float32") if dtype == "int8" else (dtype, dtype)
    made_for = ComputeSpec(dtype=compute)
    made = jax.jit(lambda key: Transformer(spec, made_for, rngs=key))
    model = made(jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = rng.integers(spec.vocab_size, size=(batch_size, prompt_tokens), dtype=np.int32)

    theirs, cache, versions = None, None, {"jax": jax.__version__}
    if against:
        theirs, cache, more = their_turn(model, prompts, new_tokens, dtype)
        versions |= more
    generator = Generator(model, weights=weights)
    del model
    ours = our_turn(generator, prompts, new_tokens)
    began = time.perf_counter()
    ours()
    compile_seconds = time.perf_counter() - began
    bandwidth = read_bandwidth()
    our_turns, their_turns = [], []
    for _ in range(rounds):
        our_turns.append(ours())
        if theirs:
            their_turns.append(theirs())
    decoded, read = batch_size * (new_tokens - 1), batch_size * prompt_tokens
    our_side, their_side = (
        Side(
            decode=Spread.of([decoded / rest for _, rest, _ in turns]),
            prefill=Spread.of([read / first for first, _, _ in turns]),
            time_to_first_token=Spread.of([first for first, _, _ in turns]),
        )
        if turns
        else None
        for turns in (our_turns, their_turns)
    )
    pairs = list(zip(our_turns, their_turns, strict=False))
    experts = any(
        block.feed_forward is not None and block.feed_forward.kind == "moe"
        for block in spec.decoder.pattern
    )
    return Decoding(
        ours=our_side,
        theirs=their_side,
        ratio=Spread.of([t[1] / o[1] for o, t in pairs]) if pairs else None,
        prefill_ratio=Spread.of([t[0] / o[0] for o, t in pairs]) if pairs else None,
        read_bandwidth=bandwidth,
        bytes_read=generator.bytes_read,
        weight_bytes=generator.weight_bytes,
        limit=None if experts else batch_size * bandwidth / generator.bytes_read,
        same_tokens=same_share(our_turns[0][2], their_turns[0][2]) if pairs else None,
        their_cache=cache,
        native=native.build()[1] if use_cpu_kernels(made_for) else "XLA computes all of it.",
        compile_seconds=compile_seconds,
        threads=os.cpu_count() or 1,
        versions=versions,
    )


def our_turn(generator: Generator, prompts: np.ndarray, new_tokens: int) -> Callable[[], Turn]:
    def turn() -> Turn:
        session = generator.start(list(prompts), max_new_tokens=new_tokens, temperature=0.0)
        while not session.done:
            session.advance(new_tokens)
        result = session.result()
        return result.timing.time_to_first_token, result.timing.decode_seconds, result.ids

    return turn


def their_turn(
    model: Transformer, prompts: np.ndarray, new_tokens: int, dtype: str
) -> tuple[Callable[[], Turn], str, dict[str, str]]:
    """`transformers` with our weights and the faster of its caches, which it names.

    Its first token is timed by a call that makes one alone.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise need_extra(error.name, "parity", "Timing against PyTorch") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_folder(path, named_parameters(model), model.spec)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32 if dtype == "float32" else torch.bfloat16
        )
    network.eval()
    network.generation_config.eos_token_id = None  # nobody stops early
    ids = torch.from_numpy(prompts).long()

    def tokens(count: int, cache: str) -> Any:
        return network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )

    def timed(count: int, cache: str) -> tuple[float, Any]:
        began = time.perf_counter()
        result = tokens(count, cache)
        return time.perf_counter() - began, result

    few = min(new_tokens, 8)
    speeds = {}
    for cache in ("dynamic", "static"):
        tokens(few, cache)
        speeds[cache] = timed(few, cache)[0]
    fastest = min(speeds, key=speeds.get)

    def turn() -> Turn:
        first, _ = timed(1, fastest)
        all_of_it, result = timed(new_tokens, fastest)
        return first, max(all_of_it - first, 1e-9), result[:, prompts.shape[1] :].tolist()

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return turn, fastest, versions


def same_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of places with equal ids. After one that differs, the texts are different."""
    pairs = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=False)]
    return sum(pairs) / max(len(pairs), 1)


def read_bandwidth(size: int = 256 * 2**20, rounds: int = 8) -> float:
    """Bytes a second at which all cores together read memory: the best of several rounds."""
    threads = os.cpu_count() or 1
    parts = np.ones((threads, size // 4 // threads), np.float32)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return parts.nbytes / best
