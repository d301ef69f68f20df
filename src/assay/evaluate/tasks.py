"""The standard small tasks, scored by likelihood as the evaluation harness scores them.

Prompts, normalisation and metrics are those of EleutherAI's lm-evaluation-harness, zero-shot:
the choice of the largest log-likelihood is the answer (`accuracy`), or of the largest a
character (`accuracy_norm`). Documents have the fields of the data sets on the Hugging Face Hub,
and come from there or from a local file.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from assay.data.tokenizers import Tokenizer
from assay.errors import AssayError, did_you_mean, how_to_get, need_extra
from assay.evaluate.likelihood import Request, loglikelihoods
from assay.model.transformer import Transformer

Document = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is scored: (context, continuation) texts, which of them is right, and what it is worth.

    `choices` are the texts whose lengths normalise. One pair alone is right if greedy decoding
    would write it. `part` is the part of the task that it belongs to, where there are several.
    """

    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold: int
    part: str = ""


@dataclass(frozen=True)
class Task:
    """A named task: where its documents are on the Hub, and how one becomes a question.

    `hub` is a data set, its configurations (each a part of the task, if there are several), and
    its split. Of a task of parts the accuracy is the mean of theirs, whatever their sizes.
    """

    name: str
    hub: tuple[str, tuple[str | None, ...], str]
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


BLIMP = tuple(
    """
    adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive
    animate_subject_trans causative complex_NP_island
    coordinate_structure_constraint_complex_left_branch
    coordinate_structure_constraint_object_extraction determiner_noun_agreement_1
    determiner_noun_agreement_2 determiner_noun_agreement_irregular_1
    determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2
    determiner_noun_agreement_with_adj_irregular_1
    determiner_noun_agreement_with_adj_irregular_2 determiner_noun_agreement_with_adjective_1
    distractor_agreement_relational_noun distractor_agreement_relative_clause drop_argument
    ellipsis_n_bar_1 ellipsis_n_bar_2 existential_there_object_raising
    existential_there_quantifiers_1 existential_there_quantifiers_2
    existential_there_subject_raising expletive_it_object_raising inchoative intransitive
    irregular_past_participle_adjectives irregular_past_participle_verbs
    irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2
    left_branch_island_echo_question left_branch_island_simple_question
    matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present
    only_npi_scope passive_1 passive_2 principle_A_c_command principle_A_case_1
    principle_A_case_2 principle_A_domain_1 principle_A_domain_2 principle_A_domain_3
    principle_A_reconstruction regular_plural_subject_verb_agreement_1
    regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present
    sentential_negation_npi_scope sentential_subject_island superlative_quantifiers_1
    superlative_quantifiers_2 tough_vs_raising_1 tough_vs_raising_2 transitive wh_island
    wh_questions_object_gap wh_questions_subject_gap wh_questions_subject_gap_long_distance
    wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap
    wh_vs_that_with_gap_long_distance
    """.split()
)
"""BLiMP's 67 paradigms, by their configurations' names on the Hub."""

TASKS = {
    task.name: task
    for task in (
        Task("hellaswag", ("Rowan/hellaswag", (None,), "validation"), _hellaswag),
        Task("arc_easy", ("allenai/ai2_arc", ("ARC-Easy",), "test"), _arc),
        Task("arc_challenge", ("allenai/ai2_arc", ("ARC-Challenge",), "test"), _arc),
        Task("piqa", ("baber/piqa", (None,), "validation"), _piqa),
        Task(
            "winogrande",
            ("allenai/winogrande", ("winogrande_xl",), "validation"),
            _winogrande,
            False,
        ),
        Task(
            "lambada_openai", ("EleutherAI/lambada_openai", ("default",), "test"), _lambada, False
        ),
        Task("blimp", ("nyu-mll/blimp", BLIMP, "train"), _blimp, False),
        *(
            Task(f"blimp/{paradigm}", ("nyu-mll/blimp", (paradigm,), "train"), _blimp, False)
            for paradigm in BLIMP
        ),
    )
}
"""By name; `blimp` is all its paradigms, `blimp/NAME` one of them."""


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        AssayError: if there is none; the nearest names are given.
    """
    if name not in TASKS:
        raise AssayError(f"--task: '{name}' is not a task; {did_you_mean(name, TASKS)}")
    return TASKS[name]


# ---------------------------------------------------------------------------- documents


PART = "UID"
"""The field in which BLiMP's documents name their paradigm."""


def documents(
    task: Task, file: str | Path | None = None, *, limit: int | None = None
) -> list[Document]:
    """The documents of a file (.jsonl, .json, .parquet) or of a folder of such, or the Hub's.

    A task of parts finds a document's part in its field `UID`, else in its file's name. With
    `limit`, only the first of each part.

    Raises:
        AssayError: if the file cannot be read, or the Hub is out of reach.
    """
    found = _of_hub(task) if file is None else _of_files(task, Path(file))
    if len(task.hub[1]) == 1:
        return found[:limit]
    taken: Counter[str] = Counter()
    kept = []
    for document in found:
        taken[document[PART]] += 1
        if limit is None or taken[document[PART]] <= limit:
            kept.append(document)
    return kept


def _of_files(task: Task, path: Path) -> list[Document]:
    if not path.exists():
        raise AssayError(f"--task-data: there is no file or folder {path}.")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS)
    found = []
    for file in files:
        for document in _read(file):
            if not isinstance(document, dict):
                raise AssayError(f"{file}: found {document!r}, where a document has fields.")
            found.append(document)
            if len(task.hub[1]) > 1:
                document.setdefault(PART, file.stem)
    if not found:
        raise AssayError(f"{path}: found no documents.")
    # Of a file of several paradigms, the one that was asked for.
    (part, *others) = task.hub[1]
    named = [] if others else [document for document in found if document.get(PART) == part]
    return named or found


def _of_hub(task: Task) -> list[Document]:
    try:
        import datasets
    except ImportError:
        raise AssayError(
            f"--task: data sets of the Hub need the package 'datasets', which is not installed "
            f"({how_to_get('data')}); or name a local file by --task-data."
        ) from None
    path, configs, split = task.hub
    found = []
    try:
        for config in configs:
            part = {PART: config} if len(configs) > 1 else {}
            loaded = datasets.load_dataset(path, config, split=split)
            found += [document | part for document in loaded]
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise AssayError(
            f"--task {task.name}: cannot read {path} from the Hub ({reason}); name a local file "
            f"of the same fields by --task-data."
        ) from None
    return found


_ENDINGS = (".jsonl", ".json", ".parquet")


def _read(path: Path) -> Iterator[Document]:
    if path.suffix not in _ENDINGS:
        raise AssayError(f"{path}: found '{path.suffix}'; legal are {', '.join(_ENDINGS)}.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise need_extra("pyarrow", "data", f"{path}: parquet") from None
        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise AssayError(f"{path}: is not a whole parquet file ({error}).") from None
        return
    try:
        text = path.read_text(encoding="utf-8")
        listed = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise AssayError(f"{path}: is not JSON ({error}).") from None
    if path.suffix == ".json":
        if not isinstance(listed, list):
            raise AssayError(f"{path}: holds no list of documents.")
        yield from listed
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
            question = task.question(document)
            part = document.get(PART, "") if len(task.hub[1]) > 1 else ""
            made.append(replace(question, part=part))
        except KeyError as error:
            raise AssayError(
                f"--task {task.name}: document {number} has no field {error}; "
                f"it has {', '.join(map(repr, document))}."
            ) from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise AssayError(f"--task {task.name}: document {number}: {error}.") from None
    return made


# ---------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class TaskResult:
    """`stderr` is of `accuracy`: the sample's standard deviation over sqrt(examples).

    `right` and `right_norm` say of each example whether it was answered rightly; `part_of` to
    which part of the task it belongs, and `parts` has each one's accuracy, where there are several.
    """

    task: str
    accuracy: float
    accuracy_norm: float | None
    stderr: float
    stderr_norm: float | None
    examples: int
    right: tuple[bool, ...]
    right_norm: tuple[bool, ...] | None
    part_of: tuple[str, ...]
    parts: dict[str, float]


def score(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    asked: Sequence[Question],
    *,
    batch_size: int = 8,
) -> TaskResult:
    """The share of questions that the model answers rightly; of parts, the mean of their shares.

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
    part_of = tuple(question.part for question in asked)
    shares = _by_part(right, part_of)
    parts = {part: float(np.mean(answers)) for part, answers in shares.items()}
    return TaskResult(
        task=task.name,
        accuracy=float(np.mean(list(parts.values()))),
        accuracy_norm=None if normalised is None else float(np.mean(normalised)),
        stderr=math.hypot(*map(standard_error, shares.values())) / len(shares),
        stderr_norm=None if normalised is None else standard_error(normalised),
        examples=len(right),
        right=tuple(right),
        right_norm=normalised,
        part_of=part_of,
        parts=parts if len(parts) > 1 else {},
    )


def _by_part(right: Sequence[bool], part_of: Sequence[str]) -> dict[str, list[bool]]:
    shares: dict[str, list[bool]] = {}
    for answer, part in zip(right, part_of, strict=True):
        shares.setdefault(part, []).append(answer)
    return shares


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
    return [*tokenizer.prefix_ids, *whole[: len(before)]], whole[len(before) :]


def standard_error(right: Sequence[bool]) -> float:
    """Of the mean of 0s and 1s."""
    if len(right) < 2:
        return math.nan
    return float(np.std(np.asarray(right, float), ddof=1) / math.sqrt(len(right)))


def paired_difference(
    a: Sequence[bool], b: Sequence[bool], part_of: Sequence[str] = (), *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean of a - b over the same examples, and its 95 % interval by the paired bootstrap (BCa).

    With `part_of`, the part of each example, every part weighs the same, as in the accuracy.
    """
    from scipy import stats

    differences = np.asarray(a, float) - np.asarray(b, float)
    if part_of:
        size = Counter(part_of)
        differences *= [len(part_of) / len(size) / size[part] for part in part_of]
    mean = float(differences.mean())
    if np.all(differences == differences[0]):
        return mean, (mean, mean)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, rng=np.random.default_rng(seed)
    ).confidence_interval
    return mean, (float(interval.low), float(interval.high))
