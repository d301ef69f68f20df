"""Results as a comparison writes them, with curves and scores of a known law."""

import numpy as np

from assay.compare.results import (
    CheckRecord,
    Design,
    Environment,
    ExpertLoads,
    Pair,
    Point,
    Results,
    Row,
    RunRecord,
    Solution,
)
from assay.compare.scaling import Ladder, study
from assay.compare.statistics import all_pairs, anytime_interval, compare_pairs, mean_interval
from assay.spec import presets


def finite(interval):
    return tuple(float(end) if np.isfinite(end) else None for end in interval)


def make_results(
    names=("dense", "gqa", "moe"), seeds=(0, 1, 2), *, margin=0.01, points=60, **changes
) -> Results:
    """Three variants: the second equal to the first, the last better and with experts."""
    random = np.random.default_rng(0)
    effects = dict(zip(names, (0.0, 0.001, -0.06), strict=False))
    presets_of = dict(zip(names, ("tiny-gpt", "gqa-gpt", "make-moe"), strict=False))
    runs, scores = [], {name: [] for name in names}
    for seed in seeds:
        luck = 0.02 * random.standard_normal()
        for name in names:
            noise = 0.002 * random.standard_normal()
            final = 2.0 + effects[name] + luck + noise
            scores[name].append(final)
            runs.append(_run(name, seed, final, points, random, name == names[-1]))
    spec = {name: presets.get(presets_of[name]).model for name in names}
    rows = []
    for place, name in enumerate(names):
        values = np.array(scores[name])
        rank = 1 + sum(np.mean(scores[other]) < values.mean() for other in names)
        rows.append(
            Row(
                name=name,
                variant=name,
                params=200_000 * (1 + place),
                active_params=200_000,
                train_flops=3e12 * (1 + 0.1 * place),
                tokens=1e6,
                seconds=40.0 + 15 * place,
                seeds=seeds,
                val_bpb_mean=float(values.mean()),
                val_bpb_ci95=finite(mean_interval(values)),
                val_bpb_anytime95=finite(anytime_interval(values, planned=len(seeds))),
                rank=int(rank),
                lr=3e-3,
                flops_per_token_forward=1_000_000,
                flops_per_token_train=3_000_000,
                kv_bytes_per_token=4096 // (1 + place),
                changes={} if not place else {"decoder.pattern.*.attention.kv_heads": place},
                solved=()
                if not place
                else (
                    Solution(
                        path="d_model",
                        before=128,
                        after=132,
                        quantity="params",
                        wanted=2e5,
                        found=2.01e5,
                    ),
                ),
                checks=(CheckRecord(name="causality", passed=True, worst=0.0, where="-", note=""),),
                spec=spec[name].model_dump(mode="json"),
                diagram="embedding",
            )
        )
    pairs = []
    for found in compare_pairs(scores, all_pairs(list(names)), planned=len(seeds), margin=margin):
        record = {**vars(found), "seeds": seeds}
        for key in ("ci95", "anytime95", "simultaneous95"):
            record[key] = finite(record[key])
        for key in ("deviation", "smallest_difference", "difference"):
            record[key] = record[key] if np.isfinite(record[key]) else None
        pairs.append(Pair(**record))
    fields = {
        "sentence": f"{names[-1]} is better than the others at 1M tokens, by 0.06 bits per byte.",
        "title": "Experts or not",
        "complete": True,
        "file": "quick.toml",
        "text": 'seeds = [0, 1, 2]\n[variants."<moe>"]\n',
        "experiment": {},
        "design": Design(
            seeds=seeds,
            looks="end",
            margin=margin,
            matched=("tokens",),
            amount=1e6,
            learning_rates="one",
        ),
        "environment": Environment(
            versions={"assay": "0.1.0", "jax": "0.12.0"},
            device="cpu",
            cores=2,
            platform="Linux",
            jobs=1,
            seconds_comparable=True,
            command="assay compare quick.toml --out runs/quick",
            started="2026-11-24T22:00:00Z",
        ),
        "rows": tuple(rows),
        "pairs": tuple(pairs),
        "runs": tuple(runs),
    }
    return Results(**(fields | changes))


def _run(name, seed, final, points, random, experts) -> RunRecord:
    steps = np.linspace(10, 600, points).astype(int)
    curve = []
    speed = 0.45 if experts else 0.35
    start = 1.6 if experts else 1.2
    for i, step in enumerate(steps):
        fall = start * (step / 10) ** -speed
        last = start * (steps[-1] / 10) ** -speed
        scored = i % 10 == 9
        bpb = final + fall - last
        curve.append(
            Point(
                step=int(step),
                tokens=int(step) * 1600,
                flops=float(step) * 5e9 * (1.1 if experts else 1.0),
                seconds=float(step) * (0.09 if experts else 0.07),
                train_loss=float(1.9 * bpb + 0.02 * random.standard_normal()),
                val_loss=float(1.9 * bpb) if scored else None,
                val_bpb=float(bpb) if scored else None,
            )
        )
    loads = None
    if experts:
        random_loads = random.dirichlet(np.full(8, 40), size=(points, 2))
        loads = ExpertLoads(
            steps=tuple(int(s) for s in steps),
            load=random_loads.tolist(),
            entropy=np.full((points, 2), 2.0).tolist(),
            dropped=np.full((points, 2), 0.01).tolist(),
        )
    return RunRecord(
        name=f"{name}-{seed}",
        variant=name,
        seed=seed,
        status="done",
        folder=f"runs/{name}-{seed}",
        lr=3e-3,
        params=200_000,
        active_params=200_000,
        steps=600,
        tokens=960_000,
        train_flops=3e12,
        seconds=42.0,
        val_loss=1.9 * final,
        val_bpb=final,
        curve=tuple(curve),
        experts=loads,
    )


SIZES = (
    *((5e4, 2e5, 1e11), (8e4, 1.4e5, 1e11), (16e4, 8e4, 1e11)),
    *((8e4, 4.4e5, 3e11), (16e4, 2.4e5, 3e11), (26e4, 1.5e5, 3e11)),
    *((16e4, 7.2e5, 9e11), (26e4, 4.6e5, 9e11), (54e4, 2.4e5, 9e11)),
)


def make_ladder(sizes=SIZES, target=1e14) -> Results:
    """Two variants at sizes (N, D, C), two seeds each, on a law with a least between them."""
    plain = make_results(names=("dense", "moe"), seeds=(0, 1), points=12)
    random = np.random.default_rng(0)
    rows, runs, ladders = [], [], {}
    for n, d, c in sizes:
        rung = f"n{n / 1000:g}-c{c:g}"
        for row, better in zip(plain.rows, (0.0, 0.03), strict=True):
            loss = 1.2 + 30 * n**-0.35 + 180 * d**-0.5 - better
            values = loss + 0.003 * random.standard_normal(2)
            at = {"rung": rung, "params": int(n), "active_params": int(n), "train_flops": c}
            scores = {"val_bpb_mean": float(values.mean()), "rank": 2 - (better > 0)}
            scores["val_bpb_ci95"] = finite(mean_interval(values))
            rows.append(row.replace(name=f"{row.variant}@{rung}", tokens=d, **at, **scores))
            for run in plain.runs:
                if run.variant == row.variant:
                    of_run = {"name": f"{rows[-1].name}-s{run.seed}", "tokens": int(d)}
                    of_run["val_bpb"] = float(values[run.seed])
                    runs.append(run.replace(**at, **of_run))
            ladders.setdefault(row.variant, []).extend((n, d, c, y) for y in values)
    found = {name: Ladder.of(*zip(*places, strict=True)) for name, places in ladders.items()}
    amounts = {row.rung: {"amount": row.train_flops} for row in rows}
    return plain.replace(
        rows=tuple(rows),
        runs=tuple(runs),
        pairs=(),
        scaling=study(found, target, resamples=6),
        experiment={"ladder": amounts},
    )
