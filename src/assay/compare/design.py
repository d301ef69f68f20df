"""What a comparison will cost and can show, told before anything is spent: `--design`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.compare import scaling, statistics
from assay.compare.experiment import Entry, Plan, tuned
from assay.compare.pools import Pool
from assay.compare.results import Pair, read_results
from assay.compare.sizes import measure, only_warmed_up, unequal
from assay.errors import AssayError, counted
from assay.spec.accounting import planned_steps, training_flops

ASSUMED_DEVIATION = 0.01
"""Bits per byte, where there is no pilot: about what a small model on half a megabyte has."""

CHANCE = 0.8
"""Of calling the difference that is said to be the smallest that shows."""


@dataclass(frozen=True)
class Cost:
    """What one row costs: of one run, and of all its runs (those that tune its rate included).

    `seconds` of training and compilation, one run after the other; None where the step was not
    measured. Evaluation is not in it.
    """

    name: str
    steps: int | None
    tokens: float | None
    flops: float | None
    seconds: float | None
    runs: int
    tuning_runs: int


@dataclass(frozen=True)
class Deviation:
    """The deviation of differences between two variants of one seed, and where it is from.

    `low`, `high`: its own 95 % interval, where it was measured.
    """

    value: float
    low: float | None
    high: float | None
    source: str


@dataclass(frozen=True)
class Outline:
    """A design, costed. `smallest`: (seeds, smallest difference that they show), bits per byte.

    `seconds` are of all runs one after the other, `jobs` how many will run at once (None: as many
    as a cluster can). `ladders`: by variant, what its ladder can show; empty where there is none.
    `unequal`: says that the budget leaves the variants' training FLOPs unequal; `warm_up`, that
    runs are warm-up alone.
    """

    costs: tuple[Cost, ...]
    runs: int
    flops: float | None
    seconds: float | None
    deviation: Deviation
    smallest: tuple[tuple[int, float], ...]
    pairs: int
    seeds: int
    margin: float
    equivalence_seeds: int | None
    ladders: dict[str, scaling.Scope]
    jobs: int | None
    unequal: str | None
    warm_up: str | None = None


def outline(
    plan: Plan,
    pool: Pool,
    pilot: Path | None,
    out: Path | None,
    jobs: int | None,
    note: Callable[[str], None],
) -> Outline:
    """Costs by a few measured steps of each row; differences by the pilot's deviation.

    Args:
        pilot: an earlier comparison's folder; by default `out`, where it holds one.
        note: told of each row whose step was measured.

    Raises:
        AssayError: if the pilot has no pair with two seeds.
    """
    tasks = [
        {"do": "measure", "run": entry.run.model_dump(mode="json"), "row": entry.name}
        for entry in plan.entries
    ]
    measured: dict[str, dict[str, Any]] = {}
    note(f"Compiling and timing a few updates of {counted(len(tasks), 'row')}.")
    for done in pool.run(tasks):
        if done is not None:
            task, answer = done
            if "error" in answer:
                raise AssayError(answer["error"])
            measured[task["row"]] = answer
            step = answer["step_seconds"]
            note(f"{len(measured)}/{len(tasks)}  {task['row']}  {step:.3g} s an update")
    costs = tuple(_cost(entry, plan, measured[entry.name]) for entry in plan.entries)
    flops = [cost.flops for cost in costs]
    seconds = [cost.seconds for cost in costs]
    pairs, seeds = len(plan.pairs()), len(plan.seeds)
    spread = deviation(plan, pilot, out)
    held = {"comparisons": max(pairs, 1), "chance": CHANCE}
    numbers = sorted({*range(2, max(seeds, 5) + 1), 10, 20, seeds} - {0, 1})
    return Outline(
        costs=costs,
        runs=sum(cost.runs + cost.tuning_runs for cost in costs),
        flops=None if None in flops else math.fsum(flops),
        seconds=None if None in seconds else math.fsum(seconds),
        deviation=spread,
        smallest=tuple(
            (n, statistics.smallest_difference(n, spread.value, **held)) for n in numbers
        ),
        pairs=pairs,
        seeds=seeds,
        margin=plan.experiment.design.margin,
        equivalence_seeds=statistics.seeds_needed_for_equivalence(
            plan.experiment.design.margin, spread.value, **held
        ),
        ladders=_ladders(plan, costs),
        jobs=jobs,
        unequal=_unequal(plan, costs),
        warm_up=only_warmed_up(
            (entry.name, entry.run, cost.steps)
            for entry, cost in zip(plan.entries, costs, strict=True)
        ),
    )


def _unequal(plan: Plan, costs: Sequence[Cost]) -> str | None:
    """Of one run of each row, by rung."""
    rungs: dict[str | None, dict[str, float]] = {}
    for entry, cost in zip(plan.entries, costs, strict=True):
        flops = training_flops(entry.run.model, cost.tokens, entry.run.data.seq_len)
        rungs.setdefault(entry.rung, {})[entry.name] = flops
    return unequal(rungs.values(), plan.experiment.budget.unit, "flops")


def _ladders(plan: Plan, costs: Sequence[Cost]) -> dict[str, scaling.Scope]:
    if not plan.experiment.ladder:
        return {}
    places: dict[str, list[tuple[float, float, float]]] = {}
    for entry, cost in zip(plan.entries, costs, strict=True):
        run = entry.run
        flops = training_flops(run.model, cost.tokens, run.data.seq_len)
        if flops > 0:  # a table of bigrams has none
            place = entry.sizes["active_params"], cost.tokens, flops
            places.setdefault(entry.variant, []).append(place)
    return {name: scaling.scope_of(*zip(*found, strict=True)) for name, found in places.items()}


def _cost(entry: Entry, plan: Plan, measured: dict[str, float]) -> Cost:
    run, rate = entry.run, plan.experiment.learning_rate
    narrow = next((run for run, rows in tuned(plan) if rows[0] is entry), None)
    tuning = 0 if narrow is None else len(rate.grid) * len(rate.seeds)
    cost = 0.0  # of a run that tunes, as a share of one that is reported
    if narrow is not None:
        cost = rate.share * measure(narrow, "flops_per_token") / measure(run, "flops_per_token")
    step, compiling = measured["step_seconds"], measured["compile_seconds"]
    steps = planned_steps(run)
    if steps is None:
        steps = round(run.train.budget.amount / step)
    tokens = steps * run.data.batch_size * run.data.seq_len
    whole = len(plan.seeds) + tuning * cost
    runs = len(plan.seeds) + tuning
    return Cost(
        name=entry.name,
        steps=steps,
        tokens=tokens,
        flops=whole * training_flops(run.model, tokens, run.data.seq_len),
        seconds=whole * steps * step + runs * compiling,
        runs=len(plan.seeds),
        tuning_runs=tuning,
    )


def deviation(plan: Plan, pilot: Path | None, out: Path | None) -> Deviation:
    """Measured by a pilot, or by what `out` holds; declared in the file; or assumed, in that order.

    Of a pilot's pairs the root mean square is taken.
    """
    held = out is not None and (out / "results.json").is_file()
    source = pilot or (out if held else None)
    if source is not None:
        results = read_results(source)
        found = [p for p in results.pairs if p.deviation is not None and len(p.seeds) > 1]
        if found:
            return _measured(found, source)
        if pilot is not None:
            raise AssayError(f"--pilot {pilot}: it has no two rows with two seeds each.")
    declared = plan.experiment.design.deviation
    if declared is not None:
        return Deviation(declared, None, None, "design.deviation, an assumption of the file")
    return Deviation(ASSUMED_DEVIATION, None, None, "an assumption; --pilot DIR measures it")


def _measured(pairs: Sequence[Pair], source: Path) -> Deviation:
    value = math.sqrt(math.fsum(p.deviation**2 for p in pairs) / len(pairs))
    # The pairs share runs, so their freedom does not add up: that of one is claimed.
    low, high = statistics.deviation_interval(value, min(len(p.seeds) for p in pairs))
    return Deviation(value, low, high, f"{len(pairs)} pairs in {source}")
