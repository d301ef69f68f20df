"""The experiment file: a base run, variants as differences of it, and what is equal between them.

    title = "Do fewer key/value heads cost quality?"

    [base]
    preset = "nano"

    [budget]
    unit = "flops"                      # steps, tokens, flops or seconds: what each run may spend
    amount = 2e12
    equal = ["params"]                  # sizes that must be equal too

    [variants.mha]

    [variants.gqa]
    set."model.decoder.pattern.*.attention.kv_heads" = 1
    solve.path = "model.decoder.pattern.*.feed_forward.hidden"

`read` makes an `Experiment` of the file, `resolve` the runs that it describes: a `Plan`.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from assay.compare import statistics
from assay.compare.results import Solution
from assay.compare.sizes import QUANTITIES, Quantity, measure, solve
from assay.data import loader
from assay.errors import AssayError, did_you_mean
from assay.loading import read_spec
from assay.spec import presets
from assay.spec.accounting import planned_steps
from assay.spec.base import Spec
from assay.spec.model import Mup
from assay.spec.run import BudgetSpec, DataSpec, RunSpec

Paths = dict[str, Any]
"""Values by dotted path, as in `model.decoder.num_layers`."""

# ---------------------------------------------------------------------------- the file


class Changes(Spec):
    """Fields that are `set`, by dotted path, and fields that are to hold nothing (`unset`).

    TOML has no null, which is what unset fields are in JSON.
    """

    set: Paths = Field(default_factory=dict)
    unset: tuple[str, ...] = ()

    @property
    def paths(self) -> Paths:
        return self.set | dict.fromkeys(self.unset)


class Base(Changes):
    """What every variant starts from: a preset, or a `spec`: a JSON file, or a run's folder."""

    preset: str | None = None
    spec: str | None = None

    @model_validator(mode="after")
    def _one(self):
        if (self.preset is None) == (self.spec is None):
            raise ValueError("preset: give either a preset or a spec (a JSON file), one of them.")
        return self


class Solve(Spec):
    """A field that is to be found, so that the variant meets another one's `quantity`.

    `path` is a width or a number of layers; of several, the first is found and the others keep
    their ratio to it. The value is a multiple of `multiple` (1 for numbers of layers and experts,
    else 8). `like` is the variant to be met, the first one by default. A miss by more than
    `tolerance`, a share, is refused.
    """

    path: str | tuple[str, ...]
    quantity: Quantity = "params"
    like: str | None = None
    multiple: PositiveInt | None = None
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.02

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


class Variant(Changes):
    """A difference from the base: another preset's architecture, changed fields, or both."""

    preset: str | None = None
    solve: Solve | None = None

    @model_validator(mode="after")
    def _leaves_what_is_matched(self):
        for path in self.paths:
            for fixed in ("seed", "train.budget", "train.score", "data.validation"):
                if f"{path}.".startswith(f"{fixed}."):
                    raise ValueError(f"set: found '{path}', which is the same for all variants.")
        return self


class Budget(Spec):
    """What each run may spend, and the sizes that must be `equal` between variants as well.

    Equal sizes are held to `tolerance`, a share of the first variant's.
    """

    unit: Literal["steps", "tokens", "flops", "seconds"]
    amount: PositiveFloat
    equal: tuple[Quantity, ...] = ()
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.02


class DesignSpec(Spec):
    """What is declared before anything runs, so that the answer cannot be fished for.

    seeds: how many at most (0, 1, ...), or which. looks: end judges once, when all seeds are in;
    every after each seed, by anytime-valid intervals; or a list of numbers of seeds, the last
    being all. margin: bits per byte within which variants count as equivalent. base: the variant
    that all others are compared with; without it, all pairs. stop_when_decided: no further seeds
    once a look has decided every pair. deviation: of the differences between two variants of one
    seed, in bits per byte: an assumption, for `--design` where there is no pilot.
    """

    seeds: PositiveInt | tuple[NonNegativeInt, ...] = 5
    looks: Literal["end", "every"] | tuple[PositiveInt, ...] = "end"
    margin: Annotated[float, Field(ge=0)] = 0.01
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    base: str | None = None
    stop_when_decided: bool = False
    deviation: PositiveFloat | None = None

    @property
    def seed_list(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @model_validator(mode="after")
    def _different(self):
        seeds = self.seed_list
        if not seeds or len({*seeds}) < len(seeds):
            raise ValueError(f"seeds: found {list(seeds)}; give different seeds, at least one.")
        try:
            statistics.Design(len(seeds), self.looks, self.margin)
        except AssayError as error:
            raise ValueError(str(error)) from None
        if self.stop_when_decided and self.looks == "end":
            raise ValueError("stop_when_decided: there is one look, at the end; name more looks.")
        return self


class OneRate(Spec):
    """One learning rate for all variants: the base run's, or `lr`."""

    kind: Literal["one"] = "one"
    lr: PositiveFloat | None = None


class _Grid(Spec):
    """`grid` are factors on the run's own rate. Each is tried on `seeds`, none of which is a seed
    that is reported, at `share` of the budget, and scored on a validation split: the last
    `validation` of the training text, which no reported run is scored on or trained on.
    """

    grid: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[NonNegativeInt, ...] = (1000,)
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _some(self):
        if len({*self.grid}) < 2 or len({*self.grid}) < len(self.grid):
            raise ValueError(f"grid: found {list(self.grid)}; give two different factors or more.")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds: found {list(self.seeds)}; give different seeds.")
        return self


class TunedRate(_Grid):
    """The best of a small grid for each variant, at equal cost."""

    kind: Literal["tune"] = "tune"


class MupRate(_Grid):
    """The best of a small grid at `base_width`, carried over by muP (arXiv:2203.03466).

    Every variant (of every rung) is trained under muP with that base. Each different model of the
    base width is tuned once, with as many updates as the first row that it stands for. `lr` is a
    rate that is known to suit the base width: nothing is tuned then.
    """

    kind: Literal["mup"] = "mup"
    base_width: PositiveInt
    lr: PositiveFloat | None = None


LearningRate = Annotated[OneRate | TunedRate | MupRate, Field(discriminator="kind")]


class Rung(Changes):
    """One size of a ladder: changes of the base, and what its runs may spend."""

    amount: PositiveFloat | None = None


class Running(Spec):
    """How the runs are carried out; nothing here changes a number but the clocks.

    jobs: how many at once; by default one where time is a result (`timed`, or a budget of
    seconds) and else one a core. evaluations: how often a run is scored on its way. gpus: that a
    Ray cluster reserves for each run.
    """

    jobs: PositiveInt | None = None
    timed: bool = False
    evaluations: PositiveInt = 10
    checkpoint_every: PositiveInt | None = None
    gpus: Annotated[float, Field(ge=0)] = 0


class Experiment(Spec):
    """A whole experiment file."""

    title: str = ""
    base: Base
    data: dict[str, Any] = Field(default_factory=dict)
    budget: Budget
    variants: dict[str, Variant]
    design: DesignSpec = DesignSpec()
    learning_rate: LearningRate = OneRate()
    ladder: dict[str, Rung] = Field(default_factory=dict)
    running: Running = Running()

    @model_validator(mode="after")
    def _consistent(self):
        if not self.variants:
            raise ValueError("variants: found none; name at least one.")
        for field, names in (("variants", self.variants), ("ladder", self.ladder)):
            for name in names:
                if not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
                    raise ValueError(
                        f"{field}: found '{name}'; names are letters, digits, '-', '.' and '_'."
                    )
        names = [*self.variants]
        if self.design.base is not None and self.design.base not in names:
            raise ValueError(
                f"design.base: found '{self.design.base}'; {did_you_mean(self.design.base, names)}"
            )
        for name, variant in self.variants.items():
            like = variant.solve and variant.solve.like
            if like is not None and like not in names:
                raise ValueError(
                    f"variants.{name}.solve.like: found '{like}'; {did_you_mean(like, names)}"
                )
        first = self.variants[names[0]].solve
        if first is not None and first.like is None:
            raise ValueError(
                f"variants.{names[0]}.solve.like: the first variant is what others are solved to "
                f"meet; name the one that this one is to meet."
            )
        if self.learning_rate.kind != "one":
            both = {*self.learning_rate.seeds} & {*self.design.seed_list}
            if both:
                raise ValueError(
                    f"learning_rate.seeds: found {min(both)}, which is a reported seed as well; "
                    f"a rate must be chosen on others."
                )
        return self


def read(path: Path | str) -> Experiment:
    """The experiment of a TOML file.

    Raises:
        AssayError: if the file is not there or not TOML, or if a field is unknown or not legal.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise AssayError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AssayError(f"{path}: cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise AssayError(f"{path}: it is not TOML: {error}.") from None
    try:
        return Experiment.from_data(data)
    except AssayError as error:
        raise AssayError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Entry:
    """One row: a variant (of one rung), its run at seed 0, and how it came about.

    `differs` says what but the model is another than the first variant's: such rows do not see
    the same batches. `sizes` are `QUANTITIES` of the model.
    """

    name: str
    variant: str
    rung: str | None
    run: RunSpec
    changes: Paths
    solved: tuple[Solution, ...]
    sizes: dict[str, int]
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """An experiment with everything decided: what `compare` runs. `data` is what runs say of it."""

    experiment: Experiment
    entries: tuple[Entry, ...]
    data: dict[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.experiment.design.seed_list

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    def pairs(self) -> list[tuple[str, str]]:
        """Every two rows of one rung, or each against the base."""
        base = self.experiment.design.base
        pairs = []
        for rung in self.experiment.ladder or [None]:
            names = {e.variant: e.name for e in self.entries if e.rung == rung}
            order = [*names]
            pairs += [
                (names[a], names[b])
                for i, a in enumerate(order)
                for b in (order[i + 1 :] if base is None else [base])
                if a != b
            ]
        return pairs

    def identity(self) -> dict[str, Any]:
        """What must be the same for a comparison to go on: everything that decides a number."""
        return {
            "design": self.experiment.design.model_dump(mode="json"),
            "learning_rate": self.experiment.learning_rate.model_dump(mode="json"),
            "runs": {entry.name: entry.run.model_dump(mode="json") for entry in self.entries},
            "data": self.data,
        }


def resolve(experiment: Experiment, folder: Path | str = ".", *, steps: int | None = None) -> Plan:
    """Every variant's run: differences applied, vocabulary known, sizes solved for and compared.

    Args:
        folder: where a base's `spec` file is looked for.
        steps: replaces the budget.

    Raises:
        AssayError: if a path does not exist or a value is not legal there; if sizes that must be
            equal are not; if a size cannot be solved for.
    """
    if steps is not None:
        rungs = {name: rung.replace(amount=None) for name, rung in experiment.ladder.items()}
        experiment = experiment.replace(
            budget=experiment.budget.replace(unit="steps", amount=steps), ladder=rungs
        )
    base = _base_run(experiment, Path(folder))
    vocabularies: dict[DataSpec, loader.Prepared] = {}
    entries = []
    for rung_name, rung in (experiment.ladder or {None: Rung()}).items():
        runs, made = {}, {}
        below = _changed(base, rung.paths, f"ladder.{rung_name}.set")
        if rung.amount is not None:
            below = below.at("train.budget.amount", rung.amount)
        for name, variant in experiment.variants.items():
            run = below
            if variant.preset is not None:
                preset = presets.get(variant.preset)
                run = run.replace(model=preset.model, preset=preset.name)
            run = _changed(run, variant.paths, f"variants.{name}.set")
            if run.data not in vocabularies:
                vocabularies[run.data] = _prepared(run.data)
            vocab = vocabularies[run.data].tokenizer.vocab_size
            runs[name] = run.replace(model=run.model.with_vocab(vocab))
        for name, variant in experiment.variants.items():
            run, solved = _solved(experiment, runs, name, variant)
            made[name] = _with_mup(run, experiment.learning_rate, f"variants.{name}"), solved
        first = made[next(iter(made))][0]
        for name, (run, solved) in made.items():
            row = name if rung_name is None else f"{name}@{rung_name}"
            sizes = {q: measure(run, q) for q in QUANTITIES}
            entries.append(
                Entry(
                    row,
                    name,
                    rung_name,
                    _with_stops(run, experiment.running),
                    experiment.variants[name].paths | {s.path: s.after for s in solved},
                    solved,
                    sizes,
                    _differs(run, first),
                )
            )
        _hold_equal(experiment.budget, [e for e in entries if e.rung == rung_name])
    data = vocabularies[entries[0].run.data].summary()
    return Plan(experiment, tuple(entries), data)


def _prepared(spec: DataSpec) -> loader.Prepared:
    prepared = loader.prepare(spec)
    if prepared.held_out_bytes is None:
        raise AssayError(
            "data: it is token ids of which no text is known, so no bits per byte; name the "
            "tokenizer that made them."
        )
    return prepared


def _base_run(experiment: Experiment, folder: Path) -> RunSpec:
    base = experiment.base
    run = presets.get(base.preset).run if base.preset else _read_base(folder / base.spec)
    changes = {f"data.{name}": value for name, value in experiment.data.items()}
    if "data.corpus" in changes:
        corpora = changes.pop("data.corpus")
        names = [corpora] if isinstance(corpora, str) else corpora
        changes["data.sources"] = [{"corpus": name} for name in names]
    run = _changed(run, changes, "data")
    rate = experiment.learning_rate
    decided = {
        "train.budget": {"unit": experiment.budget.unit, "amount": experiment.budget.amount},
        "train.target_loss": None,
        "seed": 0,
    }
    if tunes(rate):
        decided["data.validation"] = rate.validation
    if rate.kind != "tune" and rate.lr is not None:
        decided |= with_rate(run, rate.lr / run.optimizer.lr)
    return _changed(run, base.paths, "base.set").changed(decided)


def _read_base(path: Path) -> RunSpec:
    try:
        return read_spec(path)
    except AssayError as error:
        raise AssayError(f"base.spec: {error}") from None


def _changed(run: RunSpec, changes: Paths, where: str) -> RunSpec:
    """The run with some paths changed; errors say which part of the file asked for it."""
    try:
        return run.changed(changes) if changes else run
    except AssayError as error:
        raise AssayError(f"{where}: {error}") from None


def tunes(rate: LearningRate) -> bool:
    """Whether runs are made to choose learning rates by."""
    return rate.kind == "tune" or (rate.kind == "mup" and rate.lr is None)


def _with_mup(run: RunSpec, rate: LearningRate, where: str) -> RunSpec:
    """The run under muP, where rates are carried over by it; constants of its own are kept."""
    if rate.kind != "mup":
        return run
    mup = (run.model.mup or Mup(base_width=rate.base_width)).replace(base_width=rate.base_width)
    return _changed(run, {"model.mup": mup.model_dump()}, where)


def tuned(plan: "Plan") -> list[tuple[RunSpec, tuple["Entry", ...]]]:
    """Each run that a learning rate is chosen for, and the rows that then have it.

    A row's own run; under muP its model at the base width, once for all rows that share it.
    """
    rate = plan.experiment.learning_rate
    if not tunes(rate):
        return []
    if rate.kind == "tune":
        return [(entry.run, (entry,)) for entry in plan.entries]
    groups: dict[str, tuple[RunSpec, tuple[Entry, ...]]] = {}
    for entry in plan.entries:
        model = entry.run.model
        narrow = model.at_width(rate.base_width).replace(mup=model.mup)
        run = entry.run.replace(model=narrow)
        if (steps := planned_steps(entry.run)) is not None:
            run = run.at("train.budget", {"unit": "steps", "amount": steps})
        alike = {"budget": BudgetSpec(), "eval_every": None, "checkpoint_every": None}
        others = run.replace(train=entry.run.train.replace(**alike), seed=0)
        first, rows = groups.get(others.to_json(None), (run, ()))
        groups[others.to_json(None)] = first, (*rows, entry)
    return [*groups.values()]


def with_rate(run: RunSpec, factor: float) -> Paths:
    """Changes that multiply the run's learning rates by a factor."""
    optimizer = run.optimizer.model_dump()
    names = [name for name in ("lr", "adam_lr") if name in optimizer]
    return {f"optimizer.{name}": optimizer[name] * factor for name in names}


def _solved(
    experiment: Experiment, runs: dict[str, RunSpec], name: str, variant: Variant
) -> tuple[RunSpec, tuple[Solution, ...]]:
    wanted = variant.solve
    if wanted is None:
        return runs[name], ()
    like = wanted.like or next(iter(runs))
    if like == name or experiment.variants[like].solve is not None:
        raise AssayError(
            f"variants.{name}.solve.like: found '{like}'; name a variant that is not solved for "
            f"itself."
        )
    target = measure(runs[like], wanted.quantity)
    try:
        run, solutions = solve(
            runs[name], wanted.paths, wanted.quantity, target, multiple=wanted.multiple
        )
    except AssayError as error:
        raise AssayError(f"variants.{name}.solve: {error}") from None
    miss = abs(solutions[0].found / target - 1)
    if miss > wanted.tolerance:
        raise AssayError(
            f"variants.{name}.solve: the nearest is {solutions[0].path} = {solutions[0].after}, "
            f"with {wanted.quantity} {solutions[0].found:,.0f} where '{like}' has {target:,.0f} "
            f"({miss:.1%} apart, over the tolerance of {wanted.tolerance:.1%}); allow more, or a "
            f"smaller multiple."
        )
    return run, solutions


def _hold_equal(budget: Budget, entries: list[Entry]) -> None:
    first = entries[0]
    for quantity in budget.equal:
        for entry in entries[1:]:
            found, wanted = entry.sizes[quantity], first.sizes[quantity]
            if abs(found / wanted - 1) > budget.tolerance:
                raise AssayError(
                    f"budget.equal: '{entry.name}' has {quantity} {found:,}, but '{first.name}' "
                    f"{wanted:,}; change its widths or layers, or let one be found: "
                    f'variants.{entry.variant}.solve = {{path = ..., quantity = "{quantity}"}}.'
                )


def _with_stops(run: RunSpec, running: Running) -> RunSpec:
    """Evaluations and checkpoints spread over the run, both where a line of metrics is written."""
    log = run.train.log_every
    steps = planned_steps(run)

    def every(parts: int) -> int:
        # Of a budget of seconds the number of steps is not known.
        return 5 * log if steps is None else max(log, steps // parts // log * log)

    return run.changed(
        {
            "train.eval_every": every(running.evaluations),
            "train.checkpoint_every": running.checkpoint_every or every(5),
        }
    )


def _differs(run: RunSpec, first: RunSpec) -> tuple[str, ...]:
    """What but the model is another than the first variant's."""
    ours, theirs = run.model_dump(mode="json"), first.model_dump(mode="json")
    parts = [name for name in ours if name not in ("model", "preset", "data", "train")]
    different = [name for name in parts if ours[name] != theirs[name]]
    for part in ("data", "train"):
        different += [
            f"{part}.{name}" for name in ours[part] if ours[part][name] != theirs[part][name]
        ]
    return tuple(different)
