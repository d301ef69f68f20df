"""Assay from Python: `train`, `generate`, `compare`, beside `assay.loading.load`.

Each imports what it needs when it is called: who trains does not wait for statistics.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import AssayError, did_you_mean

if TYPE_CHECKING:
    from assay.compare.results import Results
    from assay.generate.text import Completion
    from assay.loading import Loaded
    from assay.spec.run import RunSpec
    from assay.train.loop import TrainResult


_OF_THE_RUN = " The run says the rest: assay.preset('nano', {'train.budget.amount': 3})."


def _refuse_others(options: dict[str, Any], legal: Sequence[str], more: str = "") -> None:
    for name in options:
        if name not in legal:
            raise AssayError(f"{name}: there is no such option; {did_you_mean(name, legal)}{more}")


def preset(name: str, changes: dict[str, Any] | None = None) -> "RunSpec":
    """A preset's run, with the fields at some dotted paths changed.

    Raises:
        AssayError: if there is no such preset, or no such field.
    """
    from assay.spec import presets

    return presets.get(name).run.changed(changes or {})


def train(run: "RunSpec | str", out: str | Path, **options: Any) -> "TrainResult":
    """Trains a run, or that of a preset or a spec's file, in the folder `out`; draws `loss.png`.

    Where the model has experts, `experts.png` shows their loads.

    `options` are those of `assay.train.loop.train`: resume, stop_at, reporter, trackers.
    """
    _refuse_others(options, ("resume", "stop_at", "reporter", "trackers"), _OF_THE_RUN)
    from assay.loading import untrained
    from assay.train.loop import train as _train
    from assay.train.plot import plot_experts, plot_losses
    from assay.train.processes import is_first

    run = untrained(run) if isinstance(run, str) else run
    result = _train(run, out, **options)
    if not is_first():
        return result
    title = run.preset or Path(out).name
    plot_losses(Path(out), title=title)
    plot_experts(Path(out), title=title)
    return result


def compare(file: str | Path, out: str | Path, **options: Any) -> "Results":
    """Compares the variants of an experiment file in the folder `out`; draws the report.

    `options` are those of `assay.compare.runner.compare`: steps, target_flops, jobs, on, watcher.
    """
    from assay.compare.runner import compare as _compare

    return _compare(file, out, **options)


def generate(model: "Loaded | str | Path", prompt: str, **options: Any) -> "Completion":
    """Continues a prompt, or makes the target of a source. `options` are those of
    `assay.generate.text.complete`; `beams=N` and `length_penalty` search for the likeliest text.

    Raises:
        AssayError: if the model has no tokenizer, or if there is no such option.
    """
    from assay.generate import sampling
    from assay.generate.text import complete, complete_by_beams
    from assay.loading import Loaded, load

    loaded = model if isinstance(model, Loaded) else load(model)
    if loaded.tokenizer is None:
        raise AssayError(f"{loaded.name}: it has no tokenizer, so there is no text to make.")
    if loaded.model.spec.encoder is not None:
        options = {"start_token": loaded.start_token} | options
    ends = [*options.get("stop_tokens", ()), *loaded.end_tokens]
    options |= {"stop_tokens": ends}
    if options.get("beams") is not None:
        for name in sampling.SETTINGS:
            if name in options:
                raise AssayError(f"{name}: it changes nothing with beams; leave it out.")
        _refuse_others(options, inspect.getfullargspec(complete_by_beams).kwonlyargs)
        return complete_by_beams(loaded.model, loaded.tokenizer, [prompt], **options)[0][0]
    options.pop("beams", None)
    if "length_penalty" in options:
        raise AssayError("length_penalty: it changes nothing without beams; leave it out.")
    return complete(loaded.model, loaded.tokenizer, prompt, **options)
