"""What `results.json` holds: everything that a comparison found out, for the report and scripts.

The data flows one way. The runner fills `runs` (and what is known before them: `experiment`,
`design`, `environment`); `statistics.py` makes numbers of the runs' final bits per byte; `rows`,
`pairs` and `sentence` are those numbers in the words of the interface; `report.py` draws from this
alone, and never needs a model.

`statistics.py` takes plain float arrays (S seeds, paired by place, nan where a run is not there):

    mean_interval(values[S], level) -> low, high                    planned-n: Student's t
    anytime_interval(values[S], level, planned=) -> low, high       a confidence sequence
    compare_pairs(values {name: [S]}, pairs, planned=, looks=, margin=, level=) -> Pair each
    smallest_difference(seeds, deviation, alpha=, chance=, comparisons=) -> float
    deviation_interval(deviation, seeds) -> low, high               how rough a pilot's figure is

`curves.py`: `features_of(curves)` of a row is its entry of `features`;
`scaling.py`: `study(ladders, target_flops)` is `scaling`, fits and what they say at a
budget. An interval's end that is infinite is None here, since JSON has no infinity.

Units: loss nats a token, bpb bits a UTF-8 byte, FLOPs of the matrix products of training as
`spec/accounting.py` counts them, seconds of training alone.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from assay.errors import AssayError
from assay.spec.base import Spec

FILE = "results.json"
FORMAT = 1

Verdict = Literal["better", "worse", "equivalent", "undecided"]
Interval = tuple[float | None, float | None]
"""(low, high); None is unbounded."""


class Point(Spec):
    """One place of a run's curve. `train_loss` is the mean since the point before.

    `val_loss` and `val_bpb` are of the validation split if there is one, else of the held-out
    text; None where the run was not scored at this step.
    """

    step: int
    tokens: int
    flops: float
    seconds: float
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None


class ExpertLoads(Spec):
    """How a run's experts were used. `load[i][l][e]`: at `steps[i]`, layer l, expert e's share.

    Shares of a layer sum to 1. `entropy[i][l]`: of the router's probabilities, nats.
    `dropped[i][l]`: the share of choices over capacity.
    """

    steps: tuple[int, ...]
    load: tuple[tuple[tuple[float, ...], ...], ...]
    entropy: tuple[tuple[float, ...], ...]
    dropped: tuple[tuple[float, ...], ...]


class RunRecord(Spec):
    """One variant trained with one seed.

    Runs that tune the learning rate are in `Results.tuning`, and in no row. `rung` names the size
    where the experiment has a ladder of them. `val_loss` and `val_bpb` are final, over the whole
    held-out text. `error` says why a run failed.
    """

    name: str
    variant: str
    seed: int
    rung: str | None = None
    status: Literal["planned", "running", "done", "failed"]
    folder: str
    lr: float
    params: int
    active_params: int
    steps: int = 0
    tokens: int = 0
    train_flops: float = 0.0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    tokens_per_second: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    error: str | None = None
    curve: tuple[Point, ...] = ()
    experts: ExpertLoads | None = None


class CheckRecord(Spec):
    """What `assay check` found of a variant's shrunk spec. `note` holds the exceptions."""

    name: str
    passed: bool
    worst: float | None
    where: str
    note: str


class Solution(Spec):
    """A field that was solved for, so that variants meet: what it was, and what came of it.

    `found` and `wanted` are of `quantity`: params, active_params or flops_per_token.
    """

    path: str
    before: Any
    after: Any
    quantity: str
    wanted: float
    found: float


class Row(Spec):
    """One variant (of one rung): what it is, what it cost, what it reached.

    Costs are means over its finished runs. `seeds` are those that finished. `rank` 1 is the lowest
    mean; None while no run has finished. `flags` are sentences about what a reader must know, as
    an option that is not causal in training, or seeds that failed. `changes` are the differences
    from the base, by dotted path; `spec` is the whole model; `diagram` a text picture of it.
    """

    name: str
    variant: str
    rung: str | None = None
    params: int
    active_params: int
    train_flops: float
    tokens: float
    seconds: float
    seeds: tuple[int, ...]
    val_bpb_mean: float | None
    val_bpb_ci95: Interval
    val_bpb_anytime95: Interval
    rank: int | None
    lr: float | None
    flops_per_token_forward: int
    flops_per_token_train: int
    kv_bytes_per_token: int
    flags: tuple[str, ...] = ()
    changes: dict[str, Any] = Field(default_factory=dict)
    solved: tuple[Solution, ...] = ()
    checks: tuple[CheckRecord, ...] = ()
    spec: dict[str, Any] = Field(default_factory=dict)
    diagram: str = ""


class Pair(Spec):
    """Two rows compared, paired by seed: `difference` is the mean of a - b in bits per byte.

    Negative: a has the lower loss. The verdict is of a: better or worse than b, equivalent
    (within the margin), or undecided; `reason` says by what. `ci95` (planned-n) and `anytime95` are
    of this pair alone; `simultaneous95` holds for all pairs together, and is what the verdict goes
    by. `deviation` is that of the differences. `seeds_needed` planned seeds in all would call this
    difference, if it were the true one, with a chance of 0.8; `smallest_difference` is what all
    planned seeds can show.
    """

    a: str
    b: str
    difference: float | None
    ci95: Interval
    anytime95: Interval
    simultaneous95: Interval
    deviation: float | None
    p: float | None
    p_adjusted: float | None
    verdict: Verdict
    reason: str
    seeds: tuple[int, ...]
    seeds_needed: int | None
    seeds_needed_anytime: int | None
    smallest_difference: float | None


class Design(Spec):
    """What was declared before the first run.

    seeds: all that are planned. looks: end, every, or after how many of them the pairs are judged.
    margin: bits per byte within which variants count as equivalent. base: the variant that all
    others are compared with; None compares all pairs. matched: what is equal, the budget's unit
    first, then sizes; `amount` is of the budget.
    """

    seeds: tuple[int, ...]
    looks: Literal["end", "every"] | tuple[int, ...]
    margin: float
    level: float = 0.95
    correction: Literal["holm"] = "holm"
    base: str | None = None
    matched: tuple[str, ...]
    amount: float
    learning_rates: str


class Prediction(Spec):
    """A variant's bits per byte at the target budget, by its fit."""

    name: str
    val_bpb: float
    ci95: Interval


class Decision(Spec):
    """Who wins at the budget that is meant to be spent, by the fits of a ladder.

    `flip_probability`: that the winner at the largest budget that was run is not the winner at
    the target. `ranks_flip_probability`: that any two change places on the way.
    """

    target_flops: float
    winner: str | None
    predictions: tuple[Prediction, ...]
    flip_probability: float | None
    ranks_flip_probability: float | None
    sentence: str


class Environment(Spec):
    """Where and how it ran. `seconds_comparable` is False where runs shared the cores: seconds
    are then no result."""

    versions: dict[str, str]
    device: str
    cores: int
    platform: str
    jobs: int
    seconds_comparable: bool
    command: str
    started: str
    """UTC, ISO 8601."""


class Results(Spec):
    """The whole of results.json. `sentence` comes first: the answer in plain words.

    `experiment` is the file as it was given; `file` its name and `text` its source. `data` is
    what the runs say of their corpora and splits. `features` are the curves' slope, floor and
    smoothness by row; `scaling` the fits of a ladder: both are made by the statistics, as plain
    data.
    """

    format: Literal[1] = FORMAT
    sentence: str
    title: str
    complete: bool
    file: str
    text: str
    experiment: dict[str, Any]
    design: Design
    environment: Environment
    data: dict[str, Any] = Field(default_factory=dict)
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    runs: tuple[RunRecord, ...]
    tuning: tuple[RunRecord, ...] = ()
    features: dict[str, Any] = Field(default_factory=dict)
    scaling: dict[str, Any] | None = None
    decision: Decision | None = None
    notes: tuple[str, ...] = ()


def read_results(folder: Path | str) -> Results:
    """The results in a comparison's folder.

    Raises:
        AssayError: if there are none, or they are of another format.
    """
    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise AssayError(f"{folder}: there is no comparison in it (no {FILE}).")
    try:
        return Results.from_json(path.read_bytes())
    except AssayError as error:
        raise AssayError(f"{path}: {error}") from None
