"""From the folders of runs to `results.json`: curves, rows, pairs, and the answer in a sentence."""

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from assay.compare import curves, scaling, statistics
from assay.compare.diagram import diagram
from assay.compare.experiment import Entry, Plan
from assay.compare.results import (
    CheckRecord,
    Decision,
    Design,
    Environment,
    ExpertLoads,
    Interval,
    Pair,
    Point,
    Prediction,
    Results,
    Row,
    RunRecord,
)
from assay.compare.sizes import far_apart, only_warmed_up, unequal
from assay.compare.worker import FAILED
from assay.errors import counted
from assay.spec.accounting import flops_per_token, kv_bytes_per_token, planned_steps
from assay.spec.run import RunSpec

POINTS = 200
"""At most so many points of a run's curve are kept."""

LOADS = 50
"""At most so many records of experts' loads."""


@dataclass(frozen=True)
class Job:
    """One run to be made: `run` in `folder`, for a row's `entry`."""

    name: str
    entry: Entry
    run: RunSpec
    folder: Path

    def ended(self) -> bool:
        return any((self.folder / name).is_file() for name in ("result.json", FAILED))


# ---------------------------------------------------------------------------- one run


def read_run(job: Job, root: Path) -> RunRecord:
    """What a run's folder says of it so far."""
    result = _json(job.folder / "result.json")
    failed = _json(job.folder / FAILED)
    lines = _lines(job.folder / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    tokens_a_step = job.run.data.batch_size * job.run.data.seq_len
    a_token = flops_per_token(job.run.model, job.run.data.seq_len).train
    if result is not None:
        status = "done"
    elif failed is not None:
        status = "failed"
    else:
        status = "running" if lines else "planned"
    last = training[-1] if training else {}
    known = result or {
        "steps": last.get("step", 0),
        "tokens": last.get("tokens", 0),
        "seconds": last.get("seconds", 0.0),
        "train_loss": last.get("loss"),
    }
    fields = ("steps", "tokens", "seconds", "compile_seconds", "tokens_per_second", "train_loss")
    return RunRecord(
        name=job.name,
        variant=job.entry.variant,
        rung=job.entry.rung,
        seed=job.run.seed,
        status=status,
        folder=str(job.folder.relative_to(root)),
        lr=job.run.optimizer.lr,
        params=job.entry.sizes["params"],
        active_params=job.entry.sizes["active_params"],
        train_flops=float(known["steps"] * tokens_a_step * a_token),
        val_loss=result and result["val_loss"],
        val_bpb=result and result["val_bpb"],
        error=failed and failed["error"],
        curve=_curve(lines, job.run, tokens_a_step * a_token),
        experts=_experts(training),
        **{name: known[name] for name in fields if name in known},
    )


def progress(job: Job) -> tuple[float, dict[str, Any]]:
    """The share of the budget that a run has spent, and its last line of metrics."""
    last: dict[str, Any] = {}
    try:
        with (job.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            for line in file.read().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                last |= record if isinstance(record, dict) else {}
    except FileNotFoundError:
        return 0.0, last
    steps = planned_steps(job.run)
    if steps is None:
        return min(1.0, last.get("seconds", 0.0) / job.run.train.budget.amount), last
    return last.get("step", 0) / steps, last


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; the half line of a run under way is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _curve(lines: Sequence[Mapping], run: RunSpec, flops_a_step: float) -> tuple[Point, ...]:
    """The curve at fixed steps, so that a run that was stopped on its way has the same ones."""
    log = run.train.log_every
    last = lines[-1]["step"] if lines else 0
    kept = {line["step"]: line for line in lines if "loss" in line and _fixed(line, log, last)}
    scored = {line["step"]: line for line in lines if "val_loss" in line}
    every = max(1, math.ceil(len(kept) / POINTS))
    points = []
    for _, group in groupby(sorted(kept), key=lambda step: (step - 1) // (every * log)):
        steps = [*group]
        record = kept[steps[-1]]
        windows = [(min(log, (step - 1) % log + 1), kept[step]["loss_window"]) for step in steps]
        weight = sum(count for count, _ in windows)
        points.append(
            {
                "step": steps[-1],
                "tokens": record["tokens"],
                "seconds": record["seconds"],
                "train_loss": sum(count * loss for count, loss in windows) / weight,
            }
        )
    by_step = {point["step"]: point for point in points}
    for step, line in scored.items():
        nearest = kept.get(step) or max(
            (r for s, r in kept.items() if s <= step), key=lambda r: r["step"], default=None
        )
        if nearest is None:
            continue
        point = by_step.setdefault(
            step,
            {"step": step, "tokens": nearest["tokens"], "seconds": nearest["seconds"]},
        )
        point |= {"val_loss": line["val_loss"], "val_bpb": line["val_bpb"]}
    return tuple(
        Point(flops=float(step * flops_a_step), **by_step[step]) for step in sorted(by_step)
    )


def _fixed(line: Mapping, log: int, last: int) -> bool:
    """Whether a line is where one always is: a stop adds one more, between two of them."""
    return line["step"] % log == 0 or line["step"] == last


def _experts(training: Sequence[Mapping]) -> ExpertLoads | None:
    routed = [line for line in training if line.get("expert_load")]
    if not routed:
        return None
    some = routed[:: max(1, math.ceil(len(routed) / LOADS))]
    return ExpertLoads(
        steps=tuple(line["step"] for line in some),
        load=tuple(line["expert_load"] for line in some),
        entropy=tuple(line["router_entropy"] for line in some),
        dropped=tuple(line["dropped_share"] for line in some),
    )


# ---------------------------------------------------------------------------- all of them


def gather(
    plan: Plan,
    jobs: Sequence[Job],
    *,
    root: Path,
    file: Path,
    text: str,
    checks: Mapping[str, Sequence[CheckRecord]],
    environment: Environment,
    tuning: Sequence[RunRecord] = (),
    flags: Mapping[str, Sequence[str]],
    target_flops: float | None = None,
    complete: bool,
) -> Results:
    """Everything that is known of a comparison, with the statistics of what has finished."""
    runs = tuple(read_run(job, root) for job in jobs)
    by_row = {
        entry.name: {
            run.seed: run for job, run in zip(jobs, runs, strict=True) if job.entry is entry
        }
        for entry in plan.entries
    }
    values = {
        name: [_final(found.get(seed)) for seed in plan.seeds] for name, found in by_row.items()
    }
    design = plan.experiment.design
    judged = statistics.compare_pairs(
        values,
        plan.pairs(),
        planned=len(plan.seeds),
        looks=design.looks,
        margin=design.margin,
    )
    pairs = tuple(_pair(pair, values, plan.seeds) for pair in judged)
    rows = _ranked(
        [
            _row(entry, by_row[entry.name], plan, checks.get(entry.name, ()), flags)
            for entry in plan.entries
        ]
    )
    budget = plan.experiment.budget
    study = _scaling(plan, runs, target_flops) if complete else None
    decision = _decision(study)
    return Results(
        sentence=sentence(plan, rows, pairs, decision),
        title=plan.experiment.title or file.stem,
        complete=complete,
        file=file.name,
        text=text,
        experiment=plan.experiment.model_dump(mode="json"),
        design=Design(
            seeds=plan.seeds,
            looks=design.looks,
            margin=design.margin,
            base=design.base,
            matched=(budget.unit, *budget.equal),
            amount=budget.amount,
            learning_rates=plan.experiment.learning_rate.kind,
        ),
        environment=environment,
        data=plan.data,
        rows=rows,
        pairs=pairs,
        runs=runs,
        tuning=tuple(tuning),
        features=_features(by_row),
        scaling=study,
        decision=decision,
        notes=notes(plan, rows, environment),
    )


def _final(run: RunRecord | None) -> float:
    """A run's bits per byte; nan while it has none."""
    return math.nan if run is None or run.val_bpb is None else run.val_bpb


def finite(number: float | None) -> float | None:
    """JSON has no infinity and no nan."""
    return None if number is None or not math.isfinite(number) else float(number)


def _interval(bounds: Iterable[float]) -> Interval:
    low, high = bounds
    return finite(low), finite(high)


def _pair(pair: statistics.Pair, values: Mapping[str, list[float]], seeds: Sequence[int]) -> Pair:
    both = tuple(
        seed
        for seed, a, b in zip(seeds, values[pair.a], values[pair.b], strict=True)
        if math.isfinite(a) and math.isfinite(b)
    )
    return Pair(
        a=pair.a,
        b=pair.b,
        difference=finite(pair.difference),
        ci95=_interval(pair.ci95),
        anytime95=_interval(pair.anytime95),
        simultaneous95=_interval(pair.simultaneous95),
        deviation=finite(pair.deviation),
        p=finite(pair.p),
        p_adjusted=finite(pair.p_adjusted),
        verdict=pair.verdict,
        reason=pair.reason,
        seeds=both,
        seeds_needed=pair.seeds_needed,
        seeds_needed_anytime=pair.seeds_needed_anytime,
        smallest_difference=finite(pair.smallest_difference),
    )


def _row(
    entry: Entry,
    found: Mapping[int, RunRecord],
    plan: Plan,
    checks: Sequence[CheckRecord],
    flags: Mapping[str, Sequence[str]],
) -> Row:
    done = [run for run in found.values() if run.status == "done"]
    scores = [run.val_bpb for run in done if run.val_bpb is not None]
    failed = [run for run in found.values() if run.status == "failed"]
    notes = [*flags.get(entry.name, ())]
    if entry.differs:
        notes.append(f"{', '.join(entry.differs)} differs from the first variant's")
    if failed:
        seeds = counted(len(plan.seeds), "seed")
        notes.append(f"{len(failed)} of {seeds} failed; the first: {failed[0].error}")
    model, seq_len = entry.run.model, entry.run.data.seq_len
    flops = flops_per_token(model, seq_len)
    nothing = (-math.inf, math.inf)
    return Row(
        name=entry.name,
        variant=entry.variant,
        rung=entry.rung,
        params=entry.sizes["params"],
        active_params=entry.sizes["active_params"],
        train_flops=_mean([run.train_flops for run in done]),
        tokens=_mean([run.tokens for run in done]),
        seconds=_mean([run.seconds for run in done]),
        seeds=tuple(run.seed for run in done),
        val_bpb_mean=_mean(scores) if scores else None,
        val_bpb_ci95=_interval(statistics.mean_interval(scores) if scores else nothing),
        val_bpb_anytime95=_interval(
            statistics.anytime_interval(scores, planned=len(plan.seeds)) if scores else nothing
        ),
        rank=None,
        lr=next((run.lr for run in found.values()), entry.run.optimizer.lr),
        flops_per_token_forward=flops.forward,
        flops_per_token_train=flops.train,
        kv_bytes_per_token=kv_bytes_per_token(model),
        flags=tuple(notes),
        changes=entry.changes,
        solved=entry.solved,
        checks=tuple(checks),
        spec=model.model_dump(mode="json"),
        diagram=diagram(model),
    )


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def _ranked(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Ranks by the mean, within a rung."""
    ranks = {}
    for rung in {row.rung for row in rows}:
        scored = [row for row in rows if row.rung == rung and row.val_bpb_mean is not None]
        for rank, row in enumerate(sorted(scored, key=lambda row: row.val_bpb_mean), 1):
            ranks[row.name] = rank
    return tuple(row.replace(rank=ranks.get(row.name)) for row in rows)


def _features(by_row: Mapping[str, Mapping[int, RunRecord]]) -> dict[str, Any]:
    """Of each row: slope, floor and smoothness of its training curves, by tokens."""
    features = {}
    for name, found in by_row.items():
        lines = [
            ([p.tokens for p in kept], [p.train_loss for p in kept])
            for run in found.values()
            if run.status == "done"
            for kept in [[p for p in run.curve if p.train_loss is not None]]
        ]
        if lines:
            features[name] = curves.features_of(lines)
    return plain(features)


def _scaling(
    plan: Plan, runs: Sequence[RunRecord], target_flops: float | None
) -> dict[str, Any] | None:
    """The fits of a ladder, by variant; None where there is no ladder."""
    if not plan.experiment.ladder:
        return None
    ladders = {}
    for variant in plan.experiment.variants:
        done = [run for run in runs if run.variant == variant and run.val_bpb is not None]
        if done and all(run.train_flops > 0 for run in done):  # a table of bigrams has none
            ladders[variant] = scaling.Ladder.of(
                [run.active_params for run in done],
                [run.tokens for run in done],
                [run.train_flops for run in done],
                [run.val_bpb for run in done],
                [run.seed for run in done],
            )
    return scaling.study(ladders, target_flops)


def _decision(study: Mapping[str, Any] | None) -> Decision | None:
    """What the fits say of the budget that is meant to be spent."""
    found = (study or {}).get("outlook")
    if found is None:
        return None
    winner, target = found["winner_then"], found["flops"]
    low, high = found["ci95"][winner]
    best, flip = found["best"][winner], found["flip"]
    text = f"At {target:.3g} training FLOPs "
    if len(found["predicted"]) > 1:
        text += f"{winner} is the best with a probability of {_chance(best)} by the fits"
    else:
        text += f"{winner} is extrapolated"
    text += f": {found['predicted'][winner]:.4f} bits per byte"
    if low is not None and high is not None:
        text += f" (95 % interval {low:.4f} to {high:.4f})"
    if len(found["predicted"]) > 1 and flip is not None:
        text += (
            f"; the chance that the winner at the {found['measured_flops']:.3g} FLOPs that were "
            f"measured is another is {_chance(flip)}"
        )
    return Decision(
        target_flops=target,
        winner=winner,
        predictions=tuple(
            Prediction(name=name, val_bpb=loss, ci95=tuple(found["ci95"][name]))
            for name, loss in found["predicted"].items()
        ),
        flip_probability=flip,
        ranks_flip_probability=found["ranks_flip"],
        sentence=f"{text}.",
    )


def _chance(share: float) -> str:
    """A share of 200 resamples in words: all of them are no certainty, none no impossibility."""
    if share < 0.005:
        return "under 1 %"
    return "over 99 %" if share > 0.995 else f"{100 * share:.0f} %"


def plain(data: Any) -> Any:
    """Plain data with None for what JSON has no number for."""
    if isinstance(data, Mapping):
        return {name: plain(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return finite(data) if isinstance(data, float) else data


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text)
    draft.replace(path)


def notes(plan: Plan, rows: Sequence[Row], environment: Environment) -> tuple[str, ...]:
    """What a reader must know of all rows before believing the answer."""
    found = _unequal(plan, rows, environment)
    updates = ((entry.name, entry.run, planned_steps(entry.run)) for entry in plan.entries)
    if (warmed := only_warmed_up(updates)) is not None:
        found.append(warmed)
    if not environment.seconds_comparable:
        found.append(
            f"{environment.jobs} runs shared the machine at a time, so seconds are no result here; "
            f"running.timed = true runs one at a time."
        )
    if any(entry.differs for entry in plan.entries):
        found.append("Rows that differ in more than the model did not all see the same batches.")
    if plan.experiment.learning_rate.kind == "one" and len(plan.entries) > 1:
        found.append(
            "One learning rate served all variants; the one that suits it best is favoured."
        )
    rate = plan.experiment.learning_rate
    if rate.kind == "mup":
        how = "tuned" if rate.lr is None else "given"
        found.append(
            f"Learning rates were {how} at width {rate.base_width} and carried over by muP."
        )
    return tuple(found)


def _unequal(plan: Plan, rows: Sequence[Row], environment: Environment) -> list[str]:
    """Costs that the budget left unequal; seconds only where they are a result."""
    unit = plan.experiment.budget.unit
    done = [row for row in rows if row.seeds]
    by_rung = [[row for row in done if row.rung == rung] for rung in {row.rung for row in done}]
    said = [unequal([{r.name: r.train_flops for r in rung} for rung in by_rung], unit, "flops")]
    if environment.seconds_comparable:
        clocks = [{row.name: row.seconds for row in rung} for rung in by_rung]
        said.append(unequal(clocks, unit, "seconds"))
    return [note for note in said if note is not None]


# ---------------------------------------------------------------------------- the environment


def surroundings(jobs: int, cores: int, command: str) -> Environment:
    """What is known before a run has said what device it ran on."""
    return Environment(
        versions={},
        device="",
        cores=cores,
        platform=f"{platform.system()} {platform.machine()}",
        jobs=jobs,
        seconds_comparable=jobs == 1,
        command=command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def with_device(environment: Environment, jobs: Sequence[Job]) -> Environment:
    """Versions and device as the first run that began wrote them down."""
    for job in jobs:
        about = _json(job.folder / "run.json")
        if about is not None:
            return environment.replace(versions=about["versions"], device=about["device"])
    return environment


# ---------------------------------------------------------------------------- in words


def sentence(
    plan: Plan, rows: Sequence[Row], pairs: Sequence[Pair], decision: Decision | None = None
) -> str:
    """The answer in plain words: at the budget meant to be spent, if any, then as measured.

    Where there is a ladder, its last rung's.
    """
    if decision is not None:
        return f"{decision.sentence} As measured: {sentence(plan, rows, pairs)}"
    rung = plan.entries[-1].rung
    rows = [row for row in rows if row.rung == rung]
    pairs = [pair for pair in pairs if {pair.a, pair.b} <= {row.name for row in rows}]
    scored = sorted((r for r in rows if r.val_bpb_mean is not None), key=lambda r: r.val_bpb_mean)
    if not scored:
        return "No run has finished yet."
    seeds = len(min((row.seeds for row in scored), key=len))
    told = f"with {counted(seeds, 'seed')}"
    if len(rows) == 1:
        return f"{scored[0].name} has {scored[0].val_bpb_mean:.4f} bits per byte {told}."
    unequal = _at_unequal_cost(plan.experiment.budget.unit, scored)
    if plan.experiment.design.base is not None:
        base = next(row for row in rows if row.variant == plan.experiment.design.base)
        return _against(base.name, scored[0], pairs, told) + unequal
    return _among([row.name for row in rows], scored, pairs, told) + unequal


def _at_unequal_cost(unit: str, rows: Sequence[Row]) -> str:
    """What must be said with the answer where a budget of steps or tokens left costs unequal."""
    flops = {row.name: row.train_flops for row in rows}
    found = far_apart(flops) if unit in ("steps", "tokens") else None
    if found is None:
        return ""
    least, most = found
    cost = f"{most} spends training FLOPs, {least} none."
    if flops[least]:
        cost = f"{most} spends {flops[most] / flops[least]:.2g} times {least}'s training FLOPs."
    return f" This is at equal {unit}, not at equal cost: {cost}"


def _against(base: str, lowest: Row, pairs: Sequence[Pair], told: str) -> str:
    if all(pair.verdict == "undecided" for pair in pairs):
        others = _and([pair.a for pair in pairs], "or")
        return (
            f"No difference between {base} and {others} could be told {told}; {lowest.name} has "
            f"the lowest mean, {lowest.val_bpb_mean:.4f} bits per byte."
        )
    parts = []
    for verdict in ("better", "worse", "equivalent"):
        named = [f"{pair.a} ({_by(pair)})" for pair in pairs if pair.verdict == verdict]
        if named:
            parts.append(f"{_and(named)} {'is' if len(named) == 1 else 'are'} {verdict}")
    undecided = [pair.a for pair in pairs if pair.verdict == "undecided"]
    if undecided:
        parts.append(f"no difference could be told for {_and(undecided)}")
    return f"Against {base}, {told}: {'; '.join(parts)}."


def _among(names: Sequence[str], scored: Sequence[Row], pairs: Sequence[Pair], told: str) -> str:
    ranges = statistics.rank_ranges(names, pairs)
    best = scored[0].name
    by_pair = {(p.a, p.b): p for p in pairs} | {(p.b, p.a): p for p in pairs}
    if ranges[best][1] == 1:
        second = scored[1]
        pair = by_pair[best, second.name]
        low, high = pair.ci95 if pair.a == second.name else [_negative(v) for v in pair.ci95[::-1]]
        among = "better" if len(names) == 2 else f"the best of {len(names)}"
        than = f" than {second.name}" if len(names) == 2 else ""
        below = "below" if len(names) == 2 else f"below {second.name}"
        if low is None or high is None:
            bounds = "interval unbounded"
        else:
            bounds = f"interval {low:.4f} to {high:.4f}"
        return (
            f"{best} is {among}{than} {told}: {scored[0].val_bpb_mean:.4f} bits per byte, "
            f"{abs(pair.difference):.4f} {below} (95 % {bounds})."
        )
    decided = [pair for pair in pairs if pair.verdict in ("better", "worse")]
    if not decided:
        if all(pair.verdict == "equivalent" for pair in pairs):
            return f"{_and(names)} are equivalent, {told}: no two differ by more than the margin."
        return (
            f"No difference between {_and(names)} could be told {told}; "
            f"{best} has the lowest mean, {scored[0].val_bpb_mean:.4f} bits per byte."
        )
    first = [name for name in names if ranges[name][0] == 1]
    rest = [name for name in names if name not in first]
    equivalent = all(by_pair[a, b].verdict == "equivalent" for a, b in combinations(first, 2))
    if equivalent:
        text = f"{_and(first)} are equivalent and the best of {len(names)}, {told}"
    else:
        text = f"Which of {_and(first, 'or')} is best could not be told {told}"
    lost = {(p.b, p.a) if p.verdict == "better" else (p.a, p.b) for p in decided}
    by_all = all((name, winner) in lost for name in rest for winner in first)
    than = "" if by_all else " than at least one of them"
    return f"{text}; {_and(rest)} {'is' if len(rest) == 1 else 'are'} worse{than}."


def _negative(number: float | None) -> float | None:
    return None if number is None else -number


def _by(pair: Pair) -> str:
    return f"{pair.difference:+.4f} bits per byte, 95 % {_bounds(pair)}"


def _bounds(pair: Pair) -> str:
    low, high = pair.ci95
    if low is None or high is None:
        return "interval unbounded"
    return f"interval of the difference {low:+.4f} to {high:+.4f}"


def _and(names: Sequence[str], word: str = "and") -> str:
    *rest, last = names
    return f"{', '.join(rest)} {word} {last}" if rest else last
