"""Chat templates from files, rendered here and by `transformers`: the same text, or both refuse.

python benchmarks/chat_templates.py FOLDER    (of .jinja files; it needs transformers)
"""

import itertools
import sys
from collections import Counter
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from assay.data import chat
from assay.errors import AssayError

FUNCTION = {
    "name": "weather",
    "description": 'Says "it" <now>',
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "naïve"}},
        "required": ["city"],
    },
}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2.5, None]}},
}


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "a question": [said("user", "Hello, <b>you</b> & 'I'?\n")],
    "turns": [
        said("user", "  What is 2 & 2?\n"),
        said("assistant", "<think>hm</think>\n\nFour."),
        said("user", 'naïve 猫 "quoted" '),
    ],
    "a system's": [said("system", " Be brief. "), said("user", "Hi"), said("assistant", "Hi.")],
    "a tool's": [
        said("user", "Weather?"),
        said("assistant", "", tool_calls=[CALL]),
        said("tool", '{"t": 21}', name="weather", tool_call_id="call12345"),
        said("assistant", "21 degrees."),
        said("user", "Thanks"),
    ],
    "two of one role": [said("user", "a"), said("user", "b")],
    "in parts": [said("user", [{"type": "text", "text": "look"}])],
    "nothing": [],
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def theirs(template: str, messages: list, tools, prompt: bool, options: dict) -> str | None:
    try:
        (text,), _ = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt, **options
        )
    except Exception:  # whatever it is, it is a refusal
        return None
    return text


def ours(template: str, messages: list, tools, prompt: bool, options: dict) -> str | None:
    try:
        return chat.render(template, messages, tools=tools, add_generation_prompt=prompt, **options)
    except AssayError:
        return None


tools = [{"type": "function", "function": FUNCTION}]
files = sorted(path for folder in sys.argv[1:] for path in Path(folder).glob("**/*.jinja"))
count = Counter()
for path, (name, messages) in itertools.product(files, CONVERSATIONS.items()):
    for given, prompt, thinking in itertools.product((None, tools), (True, False), (None, False)):
        options = TOKENS | ({} if thinking is None else {"enable_thinking": thinking})
        case = (path.read_text(), messages, given, prompt, options)
        wanted, found = theirs(*case), ours(*case)
        same = "differ" if wanted != found else "refused" if wanted is None else "same"
        count[same] += 1
        if same == "differ":
            print(f"{path}, {name}, tools {bool(given)}, prompt {prompt}, thinking {thinking}")
print(f"{len(files)} templates: {dict(count)}")
