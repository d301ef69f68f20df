"""Text in, text out: no character is split, and stop strings end it exactly."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from assay.data.tokenizers import ByteTokenizer, IdsTokenizer
from assay.errors import AssayError
from assay.generate.engine import Generator
from assay.generate.text import complete, complete_batch, stream_text
from assay.model.transformer import Transformer, abstract, merge_named, named_parameters
from assay.spec.presets import PRESETS

pytestmark = pytest.mark.usefixtures("quick_to_compile")

TOKENIZER = ByteTokenizer()
BIGRAM = PRESETS["bigram"].model


def follows(ids: list[int], vocab_size: int = 257) -> Transformer:
    """A table in which each id has one successor: the next in the list."""
    model = abstract(BIGRAM.with_vocab(vocab_size))
    table = np.zeros((vocab_size, vocab_size), np.float32)
    for a, b in pairwise(ids):
        table[a, b] = 50.0
    (name,) = named_parameters(model)
    return merge_named(model, {name: jnp.asarray(table)})


@pytest.fixture(scope="module")
def reciter():
    # Every byte occurs once; ŵ is of two and € of three.
    return Generator(follows([*"abc ŵx€yz".encode(), 256]))


def test_it_recites_and_ends_at_the_document_end(reciter):
    done = complete(reciter, TOKENIZER, "a", max_new_tokens=50)
    assert done.text == "bc ŵx€yz"
    assert done.finish_reason == "stop"
    assert done.ids == TOKENIZER.encode(done.text).tolist()
    assert done.prompt_tokens == 1
    assert len(done.logprobs) == len(done.ids)
    assert max(map(abs, done.logprobs)) < 1e-3


def test_no_character_is_split(reciter):
    pieces = list(stream_text(reciter, TOKENIZER, "a", max_new_tokens=50))
    assert pieces == ["b", "c", " ", "ŵ", "x", "€", "y", "z"]
    cut = complete(reciter, TOKENIZER, "a", max_new_tokens=7)  # ends within the €
    assert cut.text == "bc ŵx\ufffd"
    assert cut.finish_reason == "length"
    assert list(stream_text(reciter, TOKENIZER, "a", max_new_tokens=7)) == [*"bc ŵx\ufffd"]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("x€", "bc ŵ", 9),
        (["zzz", "€y", "yz"], "bc ŵx", 10),
        ("z", "bc ŵx€y", 11),
        ("b", "", 1),
        (["€yw", "nothing"], "bc ŵx€yz", 11),  # held back, then not a stop after all
        ("yza", "bc ŵx€yz", 11),  # held back to the end
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_stop_strings(stop, text, tokens, chunk, reciter):
    stream = stream_text(reciter, TOKENIZER, "a", max_new_tokens=50, stop=stop, chunk=chunk)
    assert "".join(stream) == text
    done = complete(reciter, TOKENIZER, "a", max_new_tokens=50, stop=stop)
    told = stream.completion()
    assert done.text == told.text == text
    assert len(done.ids) == len(told.ids) == tokens
    assert done.finish_reason == told.finish_reason == "stop"


def test_a_batch_is_each_alone(reciter):
    prompts = ["a", "abc", "y", "bc "]
    settings = {"max_new_tokens": 7, "stop": "x€", "seed": [1, 2, 3, 4]}
    together = complete_batch(reciter, TOKENIZER, prompts, **settings)
    assert [c.text for c in together] == ["bc ŵx\ufffd", " ŵ", "z", "ŵ"]
    assert [c.finish_reason for c in together] == ["length", "stop", "stop", "stop"]
    for prompt, one in zip(prompts, together, strict=True):
        alone = complete(reciter, TOKENIZER, prompt, max_new_tokens=7, stop="x€", seed=1)
        assert (alone.text, alone.ids, alone.finish_reason) == (
            one.text,
            one.ids,
            one.finish_reason,
        )


def test_an_empty_prompt_starts_a_document():
    model = follows([256, *b"Hi", 256])
    done = complete(model, TOKENIZER, "", max_new_tokens=9)
    assert (done.text, done.prompt_tokens) == ("Hi", 1)
    with pytest.raises(AssayError, match="prompt: found an empty text"):
        complete(model, IdsTokenizer(257), "", max_new_tokens=9)


def test_ids_beyond_the_tokenizer_are_no_text():
    model = follows([97, 259, 98, 256], vocab_size=260)
    assert complete(model, TOKENIZER, "a", max_new_tokens=9).text == "\ufffdb"


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (b"Es", "prompt: found bytes, but it must be a text or a row of ids"),
        (None, "prompt: found NoneType"),
        ([1.5], "prompt: found list"),
        ("a\udcff", "the prompt has half a surrogate pair at character 1"),
    ],
)
def test_a_prompt_that_is_none_is_told(reciter, prompt, told):
    with pytest.raises(AssayError, match=told):
        complete(reciter, TOKENIZER, prompt, max_new_tokens=5)


def test_an_empty_stop_string_is_refused(reciter):
    with pytest.raises(AssayError, match="stop: found an empty string"):
        complete(reciter, TOKENIZER, "a", max_new_tokens=5, stop=["x", ""])


@pytest.mark.parametrize(("prompt", "made"), [("ab", 18), ("a" * 19, 1)])
def test_what_nobody_asks_for_has_room_in_learned_positions(prompt, made):
    spec = PRESETS["gpt2"].run.model.changed(
        {
            "vocab_size": 300,
            "d_model": 32,
            "context": 20,
            "decoder.num_layers": 1,
            "decoder.pattern.0.attention.heads": 2,
        }
    )
    model = Transformer(spec, rngs=nnx.Rngs(0))
    found = complete(model, ByteTokenizer(), prompt, seed=1)
    assert len(found.ids) == made or found.finish_reason == "stop"
    with pytest.raises(AssayError, match="positions end at 20; shorten it"):
        complete(model, ByteTokenizer(), "a" * 20)
