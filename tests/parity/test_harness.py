"""Our adapter against the harness' own Hugging Face backend, request by request."""

import json

import pytest

from assay.errors import AssayError
from assay.evaluate.harness import harness_model
from assay.loading import load


class Request:
    """What the harness hands over, as far as it is read."""

    def __init__(self, *args):
        self.args = args
        self.arguments = args


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, the harness' Hugging Face model) of the same random weights and tokenizer, which
    begins every text with a token, as Llama's does."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from assay.data.tokenizers import train_bpe

    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_bpe(["the cat sat on the mat; a dog ran off. " * 30], 300)
    library = Library.from_str(tokenizer.to_files()["tokenizer.json"])
    begin = (tokenizer.eos_token, tokenizer.eos_id)
    library.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token=tokenizer.eos_token,
        eos_token=tokenizer.eos_token,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=fast, device="cpu", batch_size=4, max_length=128)
    loaded = load(folder)
    assert loaded.tokenizer.prefix_ids == (tokenizer.eos_id,)
    return harness_model(loaded.model, loaded.tokenizer, batch_size=4), theirs, loaded


PAIRS = [
    ("the cat", " sat on the mat"),
    ("the cat", " ran off"),
    ("the cat", " sat on the dog"),
    ("", "a dog ran"),
    ("a dog ", "ran off."),
    ("the cat sat on the mat; " * 20, "a dog"),
]


def test_every_loglikelihood_is_the_harness(both):
    ours, theirs, _ = both
    requests = [Request(*pair) for pair in PAIRS]
    mine = ours.loglikelihood(requests, disable_tqdm=True)
    for (a, a_greedy), (b, b_greedy) in zip(
        mine, theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-3)
        assert a_greedy == b_greedy


def test_rolling_likelihoods_are_the_harness(both):
    ours, theirs, _ = both
    requests = [Request("the cat sat on the mat; " * n) for n in (1, 40, 2)]
    mine = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == pytest.approx(
        theirs.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3
    )


def test_greedy_texts_are_the_harness(both):
    """In their order, though those that stop alike are made together; by any of the names that
    the harness has for a length."""
    ours, theirs, _ = both
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    other = {"until": "o", "max_new_tokens": 5, "do_sample": False, "temperature": 0.7}
    requests = [
        Request("the cat sat", settings),
        Request("a dog", other),
        Request("a dog", settings),
        Request("the cat sat on the mat; a", settings),
    ]
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(
        requests, disable_tqdm=True
    )


def test_sampled_texts_are_refused(both):
    ours, *_ = both
    with pytest.raises(AssayError, match="asks for sampled text"):
        ours.generate_until([Request("a", {"until": ["."], "do_sample": True})])


WORDS = ["the cat", "a dog", "the mat", "ran off", "sat on", "a cat ran"]


def documents(name: str) -> list[dict]:
    """Some, with the fields that the task's data set has on the Hub; no two choices are alike."""
    import random

    draw = random.Random(name)

    def text(n=2):
        return " ".join(draw.choice(WORDS) for _ in range(n))

    def one(i):
        match name:
            case "hellaswag":
                return {
                    "activity_label": text(1),
                    "ctx_a": f"{text()} [title] {text(1)}.",
                    "ctx_b": text(1),
                    "endings": [f"{text(1 + n % 2)} [step] {WORDS[n]}." for n in range(4)],
                    "label": str(i % 4),
                }
            case "arc_easy" | "arc_challenge":
                labels = ["A", "B", "C", "D"] if i % 2 else ["1", "2", "3"]
                return {
                    "question": text(3),
                    "choices": {
                        "text": [f"{text(1 + n % 2)} {WORDS[n]}" for n in range(len(labels))]
                    }
                    | {"label": labels},
                    "answerKey": labels[i % 3],
                }
            case "piqa":
                ways = {"sol1": f"{text(1)} mat", "sol2": f"{text(2)} ran"}
                return {"goal": text(), "label": i % 2} | ways
            case "winogrande":
                options = {"option1": "the cat", "option2": "a dog", "answer": str(1 + i % 2)}
                return {"sentence": f"{text(1)} on _ {text(1)}."} | options
            case "lambada_openai":
                return {"text": f"{text(3)} mat"}
        return {"sentence_good": f"{text()} ran", "sentence_bad": f"{text()} sat", "UID": name}

    return [one(i) for i in range(6)]


OFFICIAL = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "blimp/wh_island": "blimp/wh_island.yaml",
    "blimp/causative": "blimp/causative.yaml",
}
"""Our name of a task -> the harness' own file of it."""


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder of its official tasks, of which nothing but the documents is ours."""
    from pathlib import Path

    import lm_eval.tasks

    folder, theirs = tmp_path_factory.mktemp("tasks"), Path(lm_eval.tasks.__file__).parent
    for name, file in OFFICIAL.items():
        plain = name.replace("/", "_")
        docs = folder / f"{plain}.jsonl"
        docs.write_text("\n".join(map(json.dumps, documents(name))))
        split = "test_split" if name.startswith(("arc", "lambada")) else "validation_split"
        (folder / f"{plain}.yaml").write_text(
            f"include: {theirs / file}\n"
            f"task: local_{plain}\n"
            "tag: null\n"
            "dataset_path: json\n"
            "dataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{train: {docs}}}}}\n"
            "training_split: null\nvalidation_split: null\ntest_split: null\n"
            f"{split}: train\n"
        )
    return folder


def test_its_official_tasks(both, official, monkeypatch):
    """Each by the harness on its own backend, by the harness on ours, and by our own scorer.

    The documents are local; wording, metrics and all else are the official files'. Every single
    log-likelihood within 1e-3, and accuracies, normalised ones and standard errors the same.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from assay.evaluate import tasks

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # its bootstrap of a perplexity forks
    ours, theirs, loaded = both
    manager = TaskManager(include_path=str(official), include_defaults=False)
    names = {f"local_{name.replace('/', '_')}": name for name in OFFICIAL}
    mine, reference = (
        simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            bootstrap_iters=20,
            log_samples=True,
        )
        for model in (ours, theirs)
    )
    seen = set()
    for task, name in names.items():
        one = tasks.task(name)
        asked = tasks.questions(one, tasks.documents(one, official / f"{task[6:]}.jsonl"))
        own = tasks.score(loaded.model, loaded.tokenizer, one, asked)
        pairs = []
        for a, b in zip(mine["samples"][task], reference["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            pairs.append([tuple(pair[:2]) for pair in b["arguments"]])
            for ((x, x_greedy),), ((y, y_greedy),) in zip(a["resps"], b["resps"], strict=True):
                assert x == pytest.approx(y, abs=1e-3)
                assert x_greedy == y_greedy
        assert pairs == [list(question.pairs) for question in asked]
        a, b = mine["results"][task], reference["results"][task]
        assert a["acc,none"] == b["acc,none"] == own.accuracy
        assert a["acc_stderr,none"] == b["acc_stderr,none"] == pytest.approx(own.stderr)
        assert a.get("acc_norm,none") == b.get("acc_norm,none") == own.accuracy_norm
        if own.accuracy_norm is not None:
            assert b["acc_norm_stderr,none"] == pytest.approx(own.stderr_norm)
        seen |= {own.accuracy, own.accuracy_norm}
    assert seen - {None, 0.0, 1.0}  # not all right, nor all wrong


def test_the_command_runs_a_local_task(both, official, assay_command):
    """With standard errors: of a mean by its formula, of a perplexity by a bootstrap."""
    *_, loaded = both
    status, out, err = assay_command(
        *("eval", loaded.name, "--harness", "local_piqa,local_lambada_openai"),
        *("--include-path", official, "--limit", 5, "--json"),
    )
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])["harness"]
    assert found["local_piqa"]["acc_stderr,none"] > 0
    assert found["local_lambada_openai"]["perplexity_stderr,none"] > 0


def test_few_shot_is_the_harness(both, tmp_path, assay_command):
    """`--fewshot`: its examples go before each question, and their beginning is read once."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    _, theirs, loaded = both
    docs = tmp_path / "docs.jsonl"
    docs.write_text("\n".join(map(json.dumps, documents("piqa"))))
    official = f"{lm_eval.tasks.__path__[0]}/piqa/piqa.yaml"
    (tmp_path / "few.yaml").write_text(
        f"include: {official}\ntask: local_few\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {docs}, validation: {docs}}}}}\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    reference = simple_evaluate(
        model=theirs, tasks=["local_few"], num_fewshot=1, task_manager=manager
    )
    status, out, err = assay_command(
        *("eval", loaded.name, "--harness", " local_few", "--include-path", tmp_path),
        *("--fewshot", 1, "--json"),
    )
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])["harness"]["local_few"]
    for metric in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert found[metric] == pytest.approx(reference["results"]["local_few"][metric])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--harness", "piqa", "--task", "piqa"], "--harness and --task: give one of them."),
        (["--harness", "piqa", "--against", "nano"], "--against: goes with --task."),
        (["--task", "piqa", "--fewshot", 2], "--fewshot: goes with --harness."),
        (["--limit", 2], "--limit: goes with --task or --harness."),
    ],
)
def test_options_that_do_not_go_together(options, sentence, assay_command):
    status, _, err = assay_command("eval", "nano", *options)
    assert (status, err) == (2, f"assay: {sentence}\n")


def test_documents_out_of_reach_are_a_sentence(both, assay_command):
    *_, loaded = both
    status, out, err = assay_command("eval", loaded.name, "--harness", "piqa")
    assert (status, out) == (2, "")
    assert "assay: --harness: the documents of piqa cannot be had" in err
    status, _, err = assay_command("eval", loaded.name, "--harness", "lambada_opnai")
    assert status == 2
    assert "has no task 'lambada_opnai'; did you mean 'lambada_openai'" in err
