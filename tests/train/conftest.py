import json
from pathlib import Path

import numpy as np
import pytest

from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    RmsNorm,
    Rope,
    StackSpec,
    TransformerSpec,
)
from assay.spec.run import BudgetSpec, CosineSchedule, DataSpec, RunSpec, SourceSpec, TrainSpec

WORDS = ("the quick brown fox jumps over lazy dogs while seven wizards brew amber potions").split()


def made_text(words: int, seed: int = 0) -> str:
    """Text of known words in an order drawn from `seed`: the same on every Python."""
    drawn = np.random.default_rng(seed).integers(0, len(WORDS), words)
    return " ".join(WORDS[i] for i in drawn)


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(made_text(3000))
    return path


@pytest.fixture
def model() -> TransformerSpec:
    """Two kinds of block in turn, and a broken last period: three layers in all."""
    attention = AttentionSpec(heads=4, kv_heads=2, positions=Rope())
    pattern = (
        BlockSpec(attention=attention, feed_forward=MlpSpec(hidden=48, gated=True)),
        BlockSpec(
            attention=attention.replace(window=8), feed_forward=MlpSpec(hidden=48), dropout=0.1
        ),
    )
    stack = StackSpec(pattern=pattern, num_layers=3, final_norm=RmsNorm())
    # 264 rows, so that a mesh divides them.
    return TransformerSpec(vocab_size=257, vocab_multiple=8, d_model=32, context=32, decoder=stack)


@pytest.fixture
def run(model, corpus) -> RunSpec:
    return RunSpec(
        model=model,
        data=DataSpec(sources=(SourceSpec(corpus=str(corpus)),), seq_len=16, batch_size=8),
        schedule=CosineSchedule(warmup=5),
        train=TrainSpec(budget=BudgetSpec(amount=40)),
        seed=3,
    )


def lines(out: Path) -> list[dict]:
    """The training lines of a run's metrics, without what depends on the clock."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in clocks} for r in records if "loss" in r]
