"""Chat templates of the shape that other families publish, written here, and small tokenizers that have their
control tokens and cut texts as theirs do."""

import json
from functools import cache

from tokenizers import Regex, Tokenizer as BPE, decoders, models, normalizers, pre_tokenizers, trainers

from aya_min.tokenizer import Tokenizer
from aya_min.world import questions

# Llama 3.1 and 3.2: a system turn of its own words, contents trimmed, a date that may be today's.
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = DATE %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set said = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set said = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: " + tools | tojson }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- said }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim \
+ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
# Qwen 2.5: a default system turn, contents as they are.
CHATML = """{%- if tools %}{{- tools | tojson }}{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) \
or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Qwen 3: an empty thought before the answer that follows the last question.
THINKING = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(looking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" and message.content is string \
and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.looking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' \
+ content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Gemma 3; Gemma 2 raises an exception instead of the first branch.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    FIRST
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
# Mistral 0.3 and, without the two spaces, Tekken: the system text moves to the last question.
INST = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}{{- tools | tojson }}{%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Mistral Small: a system turn of its own.
TEKKEN = """{%- if messages[0]["role"] != "system" %}
    {%- set said = "You are small." %}
    {%- set rest = messages %}
{%- else %}
    {%- set said = messages[0]["content"] %}
    {%- set rest = messages[1:] %}
{%- endif %}
{{- bos_token + "[SYSTEM_PROMPT]" + said + "[/SYSTEM_PROMPT]" }}
{%- set filtered = [] %}
{%- for message in rest %}
    {%- if message["role"] not in ["tool"] and not message.get("tool_calls") %}
        {%- set filtered = filtered + [message] %}
    {%- endif %}
{%- endfor %}
{%- for message in filtered %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("alternate") }}
    {%- endif %}
{%- endfor %}
{%- for message in rest %}
    {%- if message["role"] == "user" %}{{- "[INST]" + message["content"] + "[/INST]" }}
    {%- else %}{{- message["content"] + eos_token }}{%- endif %}
{%- endfor %}
"""
_LLAMA = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"]
_QWEN = [None, "<|im_end|>", "<|im_start|>", "<|endoftext|>"]
_GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>"]
_MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>"]
# {name: (template, [BOS, EOS, ..., PAD], how texts are cut)}
FORMATS = {
    "llama 3.1": (LLAMA3.replace("DATE", '"26 Jul 2024"'), _LLAMA, "bytes"),
    "llama 3.2": (LLAMA3.replace("DATE", 'strftime_now("%d %b %Y") if strftime_now is defined else "-"'),
                  _LLAMA, "bytes"),
    "qwen 2.5": (CHATML, _QWEN, "bytes"), "qwen 3": (THINKING, _QWEN, "bytes"),
    "gemma 2": (GEMMA.replace("FIRST", "{{ raise_exception('System role not supported') }}"), _GEMMA,
                "spaces"),
    "gemma 3": (GEMMA.replace("FIRST", "{%- set prefix = messages[0]['content'] + '\\n\\n' -%}"), _GEMMA,
                "spaces"),
    "mistral 0.3": (INST, _MISTRAL, "metaspace"),
    "nemo": (INST.replace('"[INST] "', '"[INST]"').replace('" " + ', ""), _MISTRAL, "bytes"),
    "mistral small": (TEKKEN, _MISTRAL, "bytes")}
# How Llama 3 and Qwen cut a text before the merges.
CUT = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def source_of(name):
    """(tokenizer.json, tokenizer_config.json) of a format, as text and dict."""
    template, tokens, way = FORMATS[name]
    bpe, names = BPE(models.BPE()), [token for token in tokens if token]
    letters = pre_tokenizers.ByteLevel.alphabet()
    if way == "bytes":
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
    else:
        bpe = BPE(models.BPE(byte_fallback=True, unk_token=None))
        letters = [f"<0x{i:02X}>" for i in range(256)]
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse()])
        if way == "spaces":
            bpe.normalizer = normalizers.Replace(" ", "▁")
            bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    extra = ["<think>", "</think>"] if name == "qwen 3" else []
    trainer = trainers.BpeTrainer(
        vocab_size=400 - len(extra), show_progress=False, special_tokens=names,
        initial_alphabet=letters if way == "bytes" else [])
    texts = [row["prompt"] for row in questions("train", 480, 0, level="tiny")]
    bpe.train_from_iterator(texts + ["\n\n \n"] * 50, trainer)
    bpe.add_tokens(extra)
    if way != "bytes":
        spec = json.loads(bpe.to_str())
        vocab, start = spec["model"]["vocab"], bpe.get_vocab_size()
        spec["model"]["vocab"] = vocab | {letter: start + i for i, letter in enumerate(letters)}
        bpe = BPE.from_str(json.dumps(spec))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[0], "eos_token": tokens[1],
             "pad_token": tokens[-1], "chat_template": template}
    return bpe.to_str(), about


def tokenizer_of(name):
    """The Tokenizer of a format."""
    text, about = source_of(name)
    files = {"tokenizer.json": text.encode(), "tokenizer_config.json": json.dumps(about).encode()}
    return Tokenizer(BPE.from_str(text), dict(about), files)
