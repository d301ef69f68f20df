"""Sizes that variants may be asked to share, and a width or depth that makes them equal."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal

from assay.compare.results import Solution
from assay.errors import AssayError
from assay.spec.accounting import flops_per_token, only_warm_up, parameters
from assay.spec.run import RunSpec

Quantity = Literal["params", "active_params", "flops_per_token"]
QUANTITIES: tuple[Quantity, ...] = ("params", "active_params", "flops_per_token")

COUNTS = ("num_layers", "experts", "heads", "kv_heads")
"""Fields that are counts of things: found to 1. Others are widths, found to a multiple of 8."""

MOST = 1 << 20
"""No width or depth is looked for beyond."""

ALIKE = 0.1
"""Variants whose cost is further apart than this share are said to be unequal."""


def measure(run: RunSpec, quantity: Quantity) -> int:
    """Parameters in all, those that one token meets, or training FLOPs a token at its length."""
    match quantity:
        case "params":
            return parameters(run.model).total
        case "active_params":
            return parameters(run.model).active
        case "flops_per_token":
            return flops_per_token(run.model, run.data.seq_len).train


def far_apart(amounts: Mapping[str, float]) -> tuple[str, str] | None:
    """Who has the least and who the most, where they are more than `ALIKE` apart."""
    if not amounts:
        return None
    least, most = min(amounts, key=amounts.__getitem__), max(amounts, key=amounts.__getitem__)
    return (least, most) if amounts[most] > (1 + ALIKE) * amounts[least] else None


def unequal(rungs: Iterable[Mapping[str, float]], unit: str, cost: str) -> str | None:
    """Says that rows of one rung differ in a cost, and which budget would make it equal.

    Args:
        rungs: of each rung, what a run of each row spends; the rung that differs most is told of.
        cost: `flops` or `seconds`, the budget's unit that would make it equal.
    """
    found = [(amounts, *ends) for amounts in rungs if (ends := far_apart(amounts))]
    if not found or unit == cost:
        return None
    amounts, least, most = max(found, key=lambda f: f[0][f[2]] / (f[0][f[1]] or 1e-9))
    what = {"flops": "training FLOPs", "seconds": "seconds of training"}[cost]
    often = f", {amounts[most] / amounts[least]:.2g} times as much" if amounts[least] else ""
    return (
        f"At equal {unit} the variants do not spend equal {what}: a run of {least} "
        f"{amounts[least]:.3g}, of {most} {amounts[most]:.3g}{often}. budget.unit = '{cost}' "
        f"makes them equal."
    )


def only_warmed_up(updates: Iterable[tuple[str, RunSpec, int | None]]) -> str | None:
    """Says of which rows a run is all warm-up, of each row's run and how many updates it has."""
    rows = [*updates]
    found = {
        name: said
        for name, run, steps in rows
        if steps is not None and (said := only_warm_up(run, steps)) is not None
    }
    if not found:
        return None
    of: dict[str, list[str]] = {}
    for name, said in found.items():
        of.setdefault(said, []).append(name)
    if len(of) == 1 and len(found) == len(rows):
        return next(iter(of))
    return " ".join(f"{said} This is so of {', '.join(names)}." for said, names in of.items())


def solve(
    run: RunSpec,
    paths: Sequence[str],
    quantity: Quantity,
    wanted: float,
    *,
    multiple: int | None = None,
) -> tuple[RunSpec, tuple[Solution, ...]]:
    """The run with the field at `paths[0]` such that the quantity is the nearest to `wanted`.

    Fields at further paths keep their ratio to the first, rounded to `multiple` likewise. The
    quantity must grow with the field; values at which the spec is not legal (heads that do not
    divide a width) are passed over.

    Raises:
        AssayError: if a path holds no whole number, or no legal value comes near.
    """
    before = [_whole(run, path) for path in paths]
    steps = [multiple or _step(path) for path in paths]

    def at(count: int) -> tuple[RunSpec, list[int]]:
        first = count * steps[0]
        values = [first] + [
            max(step, step * round(old * first / before[0] / step))
            for old, step in zip(before[1:], steps[1:], strict=True)
        ]
        return run.changed(dict(zip(paths, values, strict=True))), values

    @cache
    def size(count: int) -> int | None:
        try:
            return measure(at(count)[0], quantity)
        except AssayError:  # not a legal value
            return None

    def legal(counts: Iterable[int]) -> int | None:
        return next((count for count in counts if size(count) is not None), None)

    # Double until it is enough, then halve the gap.
    low, high, start = None, None, 1
    while high is None:
        if start * steps[0] > MOST:
            raise AssayError(
                f"no legal value of {paths[0]} brings {quantity} to {wanted:,.0f}; it is "
                f"{measure(run, quantity):,} at {before[0]}."
            )
        count = legal(range(start, 2 * start))
        if count is not None and size(count) >= wanted:
            high = count
        elif count is not None:
            low = count
        start *= 2
    while low is not None:
        middle = (low + high) // 2
        middle = legal([*range(max(middle, low + 1), high), *range(middle, low, -1)])
        if middle is None:
            break
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    best = min((c for c in (low, high) if c is not None), key=lambda c: abs(size(c) - wanted))
    changed, values = at(best)
    record = partial(Solution, quantity=quantity, wanted=wanted, found=size(best))
    return changed, tuple(
        record(path=path, before=old, after=new)
        for path, old, new in zip(paths, before, values, strict=True)
    )


def _step(path: str) -> int:
    return 1 if path.split(".")[-1] in COUNTS else 8


def _whole(run: RunSpec, path: str) -> int:
    """The whole number at a path; with `*`, the one that all entries share."""
    found = {_key(value) for value in _at(run.model_dump(mode="json"), path.split("."), path)}
    if len(found) != 1 or not isinstance(value := next(iter(found)), int):
        shown = ", ".join(map(str, sorted(found, key=str)))
        raise AssayError(f"{path}: found {shown}; a size to be solved for is one whole number.")
    return value


def _at(data: Any, parts: list[str], path: str) -> list[Any]:
    if not parts:
        return [data]
    head, rest = parts[0], parts[1:]
    if isinstance(data, list):
        inner = data if head == "*" else data[int(head) : int(head) + 1] if head.isdigit() else []
        return [value for entry in inner for value in _at(entry, rest, path)]
    if isinstance(data, dict) and head in data:
        return _at(data[head], rest, path)
    raise AssayError(f"{path}: there is no field '{head}' there.")


def _key(value: Any) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) else repr(value)
