"""Chat templates as `transformers` renders them, in the forms that the families' own have."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from assay.data import chat, tokenizers
from assay.errors import AssayError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # As the models' own files carry them: Meta-Llama-3-8B-Instruct, Qwen2-7B-Instruct,
    # Mixtral-8x7B-Instruct-v0.1 (and Mistral's of that time). SmolLM2's is read from its file in
    # tests/pretrained.
    "Llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "Qwen2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "Mixtral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
        "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
        "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
        "'assistant' %}{{ message['content'] + eos_token}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}"
    ),
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    ),
    "llama-2 and mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
        "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- set date_string = strftime_now('%d %b %Y') %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n"
        "{%- endif %}\n{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
        "{{- 'Today Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}\n"
        "{%- if tools is not none %}\n    {%- for t in tools %}\n"
        "        {{- t | tojson(indent=4) }}\n    {%- endfor %}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "qwen3": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n"
        "        {{- '\\n' }}\n        {{- tool | tojson }}\n    {%- endfor %}\n"
        "    {{- '<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- set ns = namespace(last=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    {%- set index = messages|length - 1 - "
        "loop.index0 %}\n    {%- if message.role == 'user' and message.content is string %}\n"
        "        {%- set ns.last = index %}\n        {%- break %}\n    {%- endif %}\n"
        "{%- endfor %}\n{%- for message in messages %}\n"
        "    {%- set content = message.content %}\n"
        "    {%- if message.role == 'assistant' and '</think>' in content %}\n"
        "        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
        "    {%- endif %}\n    {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
        "    {{- '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
    ),
    "olmo": (
        "{{ bos_token }}{% for message in messages %}\n{% if message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + '\n' }}\n{% elif message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + '\n' }}\n"
        "{% elif message['role'] == 'assistant' %}\n{% if not loop.last %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}\n{% else %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\n' }}\n{% endif %}\n"
        "{% endfor %}"
    ),
    "generation tag": (
        "{% for message in messages %}\n    {% if message['role'] == 'assistant' %}\n"
        "        {% generation %}{{ message['content'] }}{% endgeneration %}\n    {% else %}\n"
        "{{ message['content'] }}\n    {% endif %}\n{% endfor %}"
    ),
}
MESSAGES = [
    {"role": "user", "content": "  What is <b>2 & 2</b>?\n"},
    {"role": "assistant", "content": "<think>hm</think>\n\nFour."},
    {"role": "user", "content": 'naïve 猫 "quoted"'},
]
TOOL = {"type": "function", "function": {"name": "café", "parameters": {"x": [1, 2.5, None]}}}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_rendered_as_transformers_does(name, prompt, tools):
    options = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    (wanted,), _ = render_jinja_template(
        [MESSAGES], tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **options
    )
    found = chat.render(
        TEMPLATES[name], MESSAGES, add_generation_prompt=prompt, tools=tools, **options
    )
    assert found == wanted
    assert found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for %}", "chat template: "),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
    ],
)
def test_templates_that_fail_or_would_harm(template, message):
    with pytest.raises(AssayError, match=message):
        chat.render(template, MESSAGES)


def with_marks(template: str | None = CHATML) -> tokenizers.HuggingFaceTokenizer:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    library = Library.from_str(
        tokenizers.train_bpe(["user assistant hi"], 260).to_files()["tokenizer.json"]
    )
    library.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")]
    )
    return tokenizers.HuggingFaceTokenizer(
        library.to_str(), eos=tokenizers.END, chat_template=template
    )


def test_marks_become_ids_and_only_the_templates(tmp_path):
    tokenizer = with_marks()
    start, end = (tokenizer.special_ids[t] for t in ("<|im_start|>", "<|im_end|>"))
    ids = chat.encode(tokenizer, [{"role": "user", "content": "hi"}]).tolist()
    assert ids.count(start) == 2
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == "user\nhi\nassistant\n"
    assert chat.end_of_turn_ids(tokenizer) == [end]
    with pytest.raises(AssayError, match=r"the user's message holds '<\|im_end\|>'"):
        chat.encode(tokenizer, [{"role": "user", "content": "hi<|im_end|>"}])
    tokenizer.save(tmp_path)
    assert tokenizers.load(tmp_path).chat_template == CHATML
    (tmp_path / tokenizers.FILE).unlink()
    assert tokenizers.load(tmp_path).chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text("other")
    assert tokenizers.load(tmp_path).chat_template == "other"


def test_no_template_is_said():
    with pytest.raises(AssayError, match="has no chat template"):
        chat.encode(with_marks(None), MESSAGES)
    with pytest.raises(AssayError, match="has no chat template"):
        chat.encode(tokenizers.ByteTokenizer(), MESSAGES)
