"""Chat templates: messages to the text that a model was trained on, as `transformers` renders it.

Templates are others' programs, so they run in Jinja's sandbox, and see nothing but plain data.
What a message says is never read as a special token: such a message is refused.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from assay.data.tokenizers import Tokenizer
from assay.errors import AssayError, check_text

Message = Mapping[str, Any]
"""`role` (system, user, assistant) and `content`, a text."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said; the text within is rendered as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller) -> str:
        return caller()


def _raise(message: str):
    raise jinja2.exceptions.TemplateError(message)


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation. `variables` are what else the template reads (`bos_token`).

    Raises:
        AssayError: if the template is no good, or refuses these messages.
    """
    plain = json.loads(
        json.dumps({"messages": messages, "tools": tools, "documents": documents}, default=str)
    )
    try:
        return _compile(template).render(
            **plain, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.exceptions.TemplateError, TypeError, ValueError) as error:
        raise AssayError(f"chat template: {error}.") from None


def conversation(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> str:
    """`render` by a tokenizer's own template and special tokens.

    Raises:
        AssayError: as `render`, if the tokenizer has no template, or if a message holds the
            text of a special token.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise AssayError("chat: the model's tokenizer has no chat template.")
    for message in messages:
        content = str(message.get("content") or "")
        check_text(f"chat: the {message.get('role')}'s message", content)
        for special in tokenizer.special_ids:
            if special in content:
                raise AssayError(
                    f"chat: the {message.get('role')}'s message holds '{special}', which is one "
                    f"of the model's own marks."
                )
    roles = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    named = {role: token for role, token in roles.items() if token is not None}
    return render(template, messages, **named | options)


def encode(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> np.ndarray:
    """The ids of a conversation up to where the assistant speaks, int32 [tokens].

    Raises:
        AssayError: as `conversation`.
    """
    text = conversation(tokenizer, messages, **options)
    return tokenizer.encode_with_special(text)


def end_of_turn_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end what the assistant says, as the template writes them."""
    said = "ok"
    try:
        text = conversation(
            tokenizer,
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}],
            add_generation_prompt=False,
        )
    except AssayError:
        return []
    after = tokenizer.encode_with_special(text[text.rindex(said) + len(said) :]).tolist()
    return [i for i in after if i in set(tokenizer.special_ids.values())][:1]
