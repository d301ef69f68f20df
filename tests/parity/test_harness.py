"""Our adapter against the harness' own Hugging Face backend, request by request."""

import pytest

from assay.evaluate.harness import harness_model, run_harness
from assay.loading import load


class Request:
    """What the harness hands over, as far as it is read."""

    def __init__(self, *args):
        self.args = args
        self.arguments = args


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, the harness' Hugging Face model) of the same random weights and tokenizer."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from assay.data.tokenizers import train_bpe

    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_bpe(["the cat sat on the mat; a dog ran off. " * 30], 300)
    tokenizer.save(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
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
    requests = [Request("the cat sat on the mat; " * n) for n in (1, 40)]
    mine = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == pytest.approx(
        theirs.loglikelihood_rolling(requests, disable_tqdm=True), abs=2e-2
    )


def test_greedy_texts_are_the_harness(both):
    ours, theirs, _ = both
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    requests = [Request("the cat sat", settings), Request("a dog", settings)]
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(
        requests, disable_tqdm=True
    )


def test_an_official_kind_of_task_gives_the_same_accuracy(both, tmp_path):
    """A local file in PIQA's form, run by the harness on both models, and by our own scorer."""
    import json

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from assay.evaluate import tasks

    _, theirs, loaded = both
    documents = [
        {"goal": f"the {x} {y}", "sol1": "sat on the mat", "sol2": "ran off", "label": n % 2}
        for n, (x, y) in enumerate((x, y) for x in ("cat", "dog", "mat") for y in ("sat", "ran"))
    ]
    file = tmp_path / "local.jsonl"
    file.write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "local.yaml").write_text(
        "task: local_piqa\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {file}}}}}\n"
        "output_type: multiple_choice\n"
        "validation_split: validation\n"
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\n'
        "doc_to_target: label\n"
        'doc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    mine = run_harness(loaded.model, loaded.tokenizer, ["local_piqa"], include_path=str(tmp_path))[
        "local_piqa"
    ]
    reference = simple_evaluate(
        model=theirs,
        tasks=["local_piqa"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )["results"]["local_piqa"]
    one = tasks.task("piqa")
    own = tasks.score(loaded.model, loaded.tokenizer, one, tasks.questions(one, documents))
    assert mine["acc,none"] == reference["acc,none"] == own.accuracy
    assert mine["acc_norm,none"] == reference["acc_norm,none"] == own.accuracy_norm
