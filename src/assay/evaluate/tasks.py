"""The standard small tasks, scored by likelihood as the evaluation harness scores them.

Prompts, normalisation and metrics are those of EleutherAI's lm-evaluation-harness, zero-shot:
the choice of the largest log-likelihood is the answer (`accuracy`), or of the largest a
character (`accuracy_norm`). Documents have the fields of the data sets on the Hugging Face Hub,
and come from there or from a local file.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assay.data.tokenizers import Tokenizer
from assay.errors import AssayError, did_you_mean
from assay.evaluate.likelihood import Request, loglikelihoods
from assay.model.transformer import Transformer

Document = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is scored: (context, continuation) texts, which of them is right, and what it is worth.

    `choices` are the texts whose lengths normalise. One pair alone is right if greedy decoding
    would write it.
    """

    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A named task: where its documents are on the Hub, and how one becomes a question."""

    name: str
    hub: tuple[str, str | None, str]
    question: Callable[[Document], Question]
    normalised: bool = True


# ---------------------------------------------------------------------------- the tasks


def _among(context: str, choices: Sequence[str], gold: int) -> Question:
    pairs = tuple((context, " " + choice) for choice in choices)
    return Question(pairs, tuple(choices), gold)


def _clean(text: str) -> str:
    """WikiHow's marks taken out of HellaSwag's texts."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(doc: Document) -> Question:
    context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
    return _among(_clean(context), [_clean(end) for end in doc["endings"]], int(doc["label"]))


def _arc(doc: Document) -> Question:
    gold = list(doc["choices"]["label"]).index(doc["answerKey"])
    return _among(f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"], gold)


def _piqa(doc: Document) -> Question:
    choices = [doc["sol1"], doc["sol2"]]
    return _among(f"Question: {doc['goal']}\nAnswer:", choices, int(doc["label"]))


def _winogrande(doc: Document) -> Question:
    """The blank is filled in by each option; what follows it is scored."""
    before, _, after = doc["sentence"].partition("_")
    contexts = [before + doc["option1"], before + doc["option2"]]
    pairs = tuple((context, " " + after.strip()) for context in contexts)
    return Question(pairs, tuple(contexts), int(doc["answer"]) - 1)


def _lambada(doc: Document) -> Question:
    context, _, last = doc["text"].rpartition(" ")
    return Question(((context, " " + last),), (last,), 0)


def _blimp(doc: Document) -> Question:
    return _among("", [doc["sentence_good"], doc["sentence_bad"]], 0)


TASKS = {
    task.name: task
    for task in (
        Task("hellaswag", ("Rowan/hellaswag", None, "validation"), _hellaswag),
        Task("arc_easy", ("allenai/ai2_arc", "ARC-Easy", "test"), _arc),
        Task("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge", "test"), _arc),
        Task("piqa", ("baber/piqa", None, "validation"), _piqa),
        Task(
            "winogrande", ("allenai/winogrande", "winogrande_xl", "validation"), _winogrande, False
        ),
        Task("lambada_openai", ("EleutherAI/lambada_openai", "default", "test"), _lambada, False),
        Task("blimp", ("nyu-mll/blimp", "adjunct_island", "train"), _blimp, False),
    )
}
"""BLiMP is one of its 67 paradigms here; give another's file, or `--harness blimp` for all."""


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        AssayError: if there is none; the nearest names are given.
    """
    if name not in TASKS:
        raise AssayError(f"--task: '{name}' is not a task; {did_you_mean(name, TASKS)}")
    return TASKS[name]


# ---------------------------------------------------------------------------- documents


def documents(task: Task, file: str | Path | None) -> list[Document]:
    """A file's documents (.jsonl, .json, .parquet), or the Hub's.

    Raises:
        AssayError: if the file cannot be read, or the Hub is out of reach.
    """
    if file is not None:
        found = list(_read(Path(file)))
        if not found:
            raise AssayError(f"{file}: found no documents.")
        return found
    try:
        import datasets
    except ImportError:
        raise AssayError(
            "--task: data sets of the Hub need the 'data' extra; pip install 'assay[data]', or "
            "name a local file by --task-data."
        ) from None
    path, config, split = task.hub
    try:
        return list(datasets.load_dataset(path, config, split=split))
    except (OSError, ValueError) as error:
        raise AssayError(
            f"--task {task.name}: cannot read {path} from the Hub ({error}); name a local file "
            f"of the same fields by --task-data."
        ) from None


def _read(path: Path) -> Iterator[Document]:
    if not path.is_file():
        raise AssayError(f"--task-data: there is no file {path}.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise AssayError(
                f"{path}: parquet needs the 'data' extra; pip install 'assay[data]'."
            ) from None
        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        yield from json.loads(text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise AssayError(f"{path}, line {number}: it is not JSON ({error.msg}).") from None


def questions(task: Task, found: Sequence[Document]) -> list[Question]:
    """The documents as questions.

    Raises:
        AssayError: if a document lacks a field, or has one that makes no sense.
    """
    made = []
    for number, document in enumerate(found):
        try:
            made.append(task.question(document))
        except KeyError as error:
            raise AssayError(
                f"--task {task.name}: document {number} has no field {error}; "
                f"it has {', '.join(map(repr, document))}."
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise AssayError(f"--task {task.name}: document {number}: {error}.") from None
    return made


# ---------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class TaskResult:
    """`stderr` is of `accuracy`: the sample's standard deviation over sqrt(examples).

    `right` and `right_norm` say of each example whether it was answered rightly.
    """

    task: str
    accuracy: float
    accuracy_norm: float | None
    stderr: float
    examples: int
    right: tuple[bool, ...]
    right_norm: tuple[bool, ...] | None


def score(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    asked: Sequence[Question],
    *,
    batch_size: int = 8,
) -> TaskResult:
    """The share of questions that the model answers rightly.

    Raises:
        AssayError: if an empty context needs a token that the tokenizer does not have.
    """
    requests = [
        encode_pair(tokenizer, context, continuation)
        for question in asked
        for context, continuation in question.pairs
    ]
    found = iter(loglikelihoods(model, requests, batch_size=batch_size))
    right, right_norm = [], []
    for question in asked:
        scored = [next(found) for _ in question.pairs]
        if len(scored) == 1:
            right.append(scored[0].greedy)
            continue
        nats = np.array([one.nats for one in scored])
        lengths = np.array([float(len(choice)) for choice in question.choices])
        right.append(bool(nats.argmax() == question.gold))
        right_norm.append(bool((nats / lengths).argmax() == question.gold))
    normalised = tuple(right_norm) if task.normalised else None
    return TaskResult(
        task=task.name,
        accuracy=float(np.mean(right)),
        accuracy_norm=None if normalised is None else float(np.mean(normalised)),
        stderr=standard_error(right),
        examples=len(right),
        right=tuple(right),
        right_norm=normalised,
    )


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Both as ids, cut where the context's own ids end; a space at its end goes to what follows.

    An empty context is the token that starts a document.
    """
    if not context:
        if tokenizer.bos_id is None:
            raise AssayError("an empty context: the tokenizer has no token that starts a document.")
        return [tokenizer.bos_id], list(tokenizer.encode(continuation))
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole, before = list(tokenizer.encode(context + continuation)), tokenizer.encode(context)
    return whole[: len(before)], whole[len(before) :]


def standard_error(right: Sequence[bool]) -> float:
    """Of the mean of 0s and 1s."""
    if len(right) < 2:
        return math.nan
    return float(np.std(np.asarray(right, float), ddof=1) / math.sqrt(len(right)))


def paired_difference(
    a: Sequence[bool], b: Sequence[bool], *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean of a - b over the same examples, and its 95 % interval by the paired bootstrap (BCa)."""
    from scipy import stats

    differences = np.asarray(a, float) - np.asarray(b, float)
    mean = float(differences.mean())
    if np.all(differences == differences[0]):
        return mean, (mean, mean)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, rng=np.random.default_rng(seed)
    ).confidence_interval
    return mean, (float(interval.low), float(interval.high))
