"""What a line of JSONL means. One place decides for every command that reads rows, before any of them is used.

    {"messages": [{"role", "content"}, ...]}   {"prompt", "completion"}   {"inputs", "targets"}
    {"prompt", "chosen", "rejected"}           {"prompt"} or {"inputs"}   {"text"}

Each may carry "language" and "system" (the system turn of its prompt), and says with "weight" (0, 1) or "train"
(true, false), for a row or for one message, what is learnt. "finish_reason" tells an answer that was cut at its limit.
Other keys are kept as they are, but for those that would change what a row means: they are refused by name.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from . import distributed
from .files import parse_json, read_bytes
from .languages import SPELLINGS, language_code

SHAPES = ("messages", "prompt", "completion", "inputs", "targets", "chosen", "rejected", "text")
ENDINGS = ("finish_reason", "stop_reason")
KNOWN = (*SHAPES, "system", "language", "weight", "train", "label", *ENDINGS, "chosen_finish_reason", "rejected_finish_reason",
         "question_id", "id", "task", "args", "cluster")
OF_MESSAGES = {"role", "content", "weight", "train", *ENDINGS}

# How an answer ends that was not finished: OpenAI and vLLM; Anthropic and Gemini; Mistral; our own chat after Ctrl-C.
CUT = {"length", "max_tokens", "model_length", "interrupted"}

# Keys that change what a row means and that nothing here honours, each with the reason. Empty ones are nobody's loss.
TOOLS = "no tools are called here"
MEDIA = "only text is read here"
DOCUMENTS = "no documents are put into prompts here; write them into the prompt's text"
THOUGHTS = "no thoughts are kept apart from an answer here"
LOSS = "say what is learnt with weight (0 or 1) or train (true or false)"
CONTINUED = "no answer is continued here"
BOTH = {"tools": TOOLS, "functions": TOOLS, "tool_choice": TOOLS, "tool_calls": TOOLS, "function_call": TOOLS,
        "documents": DOCUMENTS, "image": MEDIA, "images": MEDIA, "video": MEDIA, "videos": MEDIA, "audio": MEDIA,
        "audios": MEDIA, "loss_scale": LOSS, "loss_mask": LOSS, "assistant_masks": LOSS, "train_detail": LOSS}
SYSTEM = "it is a system turn; give --columns system="
REFUSED = {
    "of a row": {**BOTH, "chat_template": "the model folder's chat template is followed",
                 "chat_template_kwargs": "the model folder's chat template is followed as it is for plain conversations",
                 "continue_final_message": CONTINUED, "history": "write earlier turns into prompt or messages",
                 "system_prompt": f"{SYSTEM}system_prompt", "system_message": f"{SYSTEM}system_message",
                 "conversations": "give --columns messages=conversations, with role and content in each turn"},
    "of a message": {**BOTH, "tool_call_id": TOOLS, "tool_plan": TOOLS, "citations": DOCUMENTS, "refusal": "write it as content",
                     "reasoning": THOUGHTS, "reasoning_content": THOUGHTS, "thinking": THOUGHTS, "loss": LOSS, "loss_weight": LOSS,
                     "trainable": LOSS, "training": LOSS, "prefix": CONTINUED, "partial": CONTINUED},
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
OTHER_ROLES = {**dict.fromkeys(["tool", "function", "ipython", "observation"], TOOLS),
               **dict.fromkeys(["human", "gpt", "bot", "model", "chatbot"], "write user or assistant")}

# Names of turn tokens: a text that spells one went through a chat template before, ours or another family's.
TEMPLATED = re.compile("|".join(map(re.escape, [
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",   # Cohere
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|START_ACTION|>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>",                                                    # ChatML: Qwen, Yi
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",      # Llama 3
    "<|header_start|>", "<|header_end|>", "<|eot|>",                                                  # Llama 4
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]",    # Llama 2, Mistral
    "<start_of_turn>", "<end_of_turn>",                                                               # Gemma
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|observation|>", "[gMASK]",               # Phi, GLM, Zephyr
    "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>",       # DeepSeek
    "<|start|>", "<|message|>", "<|channel|>", "<|return|>",                                          # gpt-oss
    "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"])))                                     # Granite


def say(paths, what):
    """One line on standard error, of one rank."""
    if distributed.is_main():
        print(f"{' '.join(map(str, paths))}: {what}", file=sys.stderr)


# ---- a file's rows -----------------------------------------------------------------------------------------

def read_jsonl(path, reading=None):
    """[(where, object), ...] of a JSONL file; where is "file:line". The first wrong line is refused.

    reading: a config.Reading, whose columns rename keys. Languages become the codes used here.
    """
    path, columns = Path(path), reading.columns if reading else None
    check_columns(columns)
    lines = read_bytes(path).split(b"\n")
    if not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty; it needs one JSON object a line")
    rows, unknown = [], {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        row = parse_json(line, where, "one whole object a line, no empty lines")
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object; one object a line")
        if columns:
            row = renamed(row, columns, where)
        if row.get("language") is not None:
            row["language"] = canonical(row["language"], where)
        check_keys(row, where, unknown)
        rows.append((where, row))
    if unknown:
        names = ", ".join(f"{name!r} ({count} times, the first: {first})" for name, (count, first) in unknown.items())
        say([path], f"keys of messages that are not read: {names}")
    return rows


def canonical(language, where):
    code = language_code(language) if isinstance(language, str) else None
    if code is None:
        raise ValueError(f"{where}: unknown language {str(language)[:40]!r}; {SPELLINGS}, or leave the key out")
    return code


def check_columns(columns):
    """Refuse a column (ours: theirs) whose first name is not one that is read here."""
    for ours in columns or ():
        if ours not in KNOWN:
            raise ValueError(f"--columns {ours}={columns[ours]}: {ours!r} is no key that is read here; known: {' '.join(KNOWN)}")


def renamed(row, columns, where):
    """The row with the names of keys that are used here. A whole number counts as its text."""
    theirs = set(columns.values())
    made = {key: value for key, value in row.items() if key not in theirs}
    for ours, key in columns.items():
        if key not in row:
            raise ValueError(f"{where}: no key {key!r}, which --columns {ours}={key} names; it has {' '.join(sorted(row))[:200]}")
        if made.get(ours) is not None:
            raise ValueError(f"{where}: both {ours!r} and {key!r}, which --columns {ours}={key} would rename to it; leave one")
        made[ours] = str(row[key]) if type(row[key]) is int and ours in SHAPES else row[key]
    if columns.get("prompt", columns.get("inputs")) == "instruction" and row.get("input"):
        raise ValueError(f"{where}: 'input' is part of what 'instruction' asks; join the two in the file")
    return made


def is_empty(value):
    return value is None or value is False or value == "" or value == [] or value == {}


def check_keys(row, where, unknown):
    """Refuse keys of a row or of its messages that carry a meaning which nothing here honours; count unknown keys of messages."""
    refuse_keys(row, "of a row", "", where)
    for key in SHAPES:
        if isinstance(row.get(key), list):
            for i, message in enumerate(row[key]):
                if isinstance(message, dict):
                    refuse_keys(message, "of a message", f"{key}[{i}].", where)
                    if "content" in message:
                        for name in message.keys() - OF_MESSAGES - REFUSED["of a message"].keys():
                            count, first = unknown.get(name, (0, where))
                            unknown[name] = count + 1, first


def refuse_keys(found, kind, place, where):
    for key in found.keys() & REFUSED[kind].keys():
        if not is_empty(found[key]) or (found[key] is False and REFUSED[kind][key] == LOSS):
            raise ValueError(f"{where}: {place + key!r} cannot be honoured: {REFUSED[kind][key]}; or remove the key")


# ---- texts and turns ---------------------------------------------------------------------------------------

def is_parts(value):
    """Whether a value is a text in parts, as OpenAI writes it, not a list of messages."""
    return isinstance(value, list) and value != [] and all(isinstance(part, dict) and "type" in part and "role" not in part for part in value)


def text_of(value, key, where):
    """A text that is not blank: a string, or a list of {"type": "text", "text"}, whose texts are put together."""
    if is_parts(value):
        other = [part["type"] for part in value if part["type"] != "text" or not isinstance(part.get("text"), str)]
        if other:
            raise ValueError(f"{where}: {key!r} has a part of type {str(other[0])[:40]!r}; {MEDIA}: {{'type': 'text', 'text': ...}}")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty; remove the line or fill it")
    return value


def trained(found, key, where):
    """What a row or a message says of its loss with "weight" and "train": True, False, or None for nothing."""
    weight, train = found.get("weight"), found.get("train")
    if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
        raise ValueError(f"{where}: {key}weight must be 0 or 1, got {str(weight)[:40]!r}; no other weight can be honoured")
    if train is not None and type(train) is not bool:
        raise ValueError(f"{where}: {key}train must be true or false, got {str(train)[:40]!r}")
    said = {bool(value) for value in (weight, train) if value is not None}
    if len(said) > 1:
        raise ValueError(f"{where}: {key}weight {weight} and {key}train {str(train).lower()} contradict each other; leave one")
    return said.pop() if said else None


def is_cut(found, keys=ENDINGS):
    """Whether a row or a message says that its answer was cut at its limit."""
    return any(isinstance(found.get(key), str) and found[key].lower() in CUT for key in keys)


def turns_of(value, key, where):
    """[({"role", "content"}, what it says of its loss, whether it was cut), ...] of a list of messages."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key!r} must be a non-empty list of {{role, content}}")
    turns = []
    for i, m in enumerate(value):
        place = f"{key}[{i}]"
        role = m.get("role") if isinstance(m, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            if isinstance(m, dict) and "from" in m and "value" in m:
                raise ValueError(f"{where}: {place} is ShareGPT's (from, value); write role (system, user, assistant) and content")
            reason = OTHER_ROLES.get(role) if isinstance(role, str) else None
            reason = f", got {str(role)[:40]!r}: {reason}" if reason else f", got {str(role)[:40]!r}" if role is not None else ""
            raise ValueError(f"{where}: {place} needs a role of system, user or assistant{reason}")
        role = ROLES[role]
        train = trained(m, f"{place}.", where)
        if train and role != "assistant":
            raise ValueError(f"{where}: {place} is a turn of the {role}, and only the assistant's are learnt; take its weight or train out")
        turns.append(({"role": role, "content": text_of(m.get("content"), f"{place}.content", where)}, train, is_cut(m)))
    return turns


def checked(messages, key, where):
    """The messages, if they are an optional system turn, then user and assistant in turn."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for i, m in enumerate(turns):
        if m["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"{where}: {key}: after an optional system turn, user and assistant must alternate, user first")
    return messages


def with_system(messages, row, where):
    """The messages with the row's "system" as their system turn."""
    if is_empty(row.get("system")) or str(row["system"]).isspace():
        return messages
    system = text_of(row["system"], "system", where)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise ValueError(f"{where}: 'system' and the system turn of the messages differ; leave one")
    return messages


def prompt_messages(value, row, where, key="prompt", context=False):
    """The messages of a prompt. context: it stands before an answer that is learnt, and nothing in it is."""
    if isinstance(value, list) and not is_parts(value):
        turns = turns_of(value, key, where)
        if context and any(train for _, train, _ in turns):
            raise ValueError(f"{where}: a turn of {key!r} has weight 1 or train true, but only the answer after it is learnt; "
                             "write the whole conversation as messages")
        messages = checked([message for message, _, _ in turns], key, where)
    else:
        messages = [{"role": "user", "content": text_of(value, key, where)}]
    messages = with_system(messages, row, where)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the prompt must end with a user turn, got {messages[-1]['role']!r}")
    return messages


def answer_of(value, prompt, key, where):
    """(text, what it says of its loss, whether it was cut) of an answer: a string, or messages that are one
    assistant turn, alone or after the prompt."""
    if not isinstance(value, list) or is_parts(value):
        return text_of(value, key, where), None, False
    turns = turns_of(value, key, where) if value else []
    before = [message for message, _, _ in turns[:-1]]
    if not turns or turns[-1][0]["role"] != "assistant" or before not in ([], prompt, [m for m in prompt if m["role"] != "system"]):
        raise ValueError(f"{where}: {key!r} must be one assistant turn, alone or after the same prompt, got {len(turns)} turns; "
                         "put earlier turns in the prompt")
    message, train, cut = turns[-1]
    return message["content"], train, cut


# ---- what a row is -----------------------------------------------------------------------------------------

def shapes_in(row):
    return {key for key in SHAPES if not is_empty(row.get(key))}


def refuse_two(row, where, *wanted):
    """Refuse a row of two shapes, of which one would be dropped; not a second one that says the same, which data sets on
    the hub have: messages with their prompt, messages that are the chosen conversation."""
    found, wanted = shapes_in(row), set(wanted)
    other = found - wanted
    if other == {"prompt"} and "messages" in wanted and says_the_beginning(row["prompt"], row["messages"], where):
        return
    if other == {"messages"} and "chosen" in wanted and row["messages"] == row["chosen"]:
        return
    if other:
        raise ValueError(f"{where}: two shapes in one row, {' + '.join(sorted(wanted & found))} and {' + '.join(sorted(other))}; "
                         "leave one of them")


def says_the_beginning(prompt, messages, where):
    """Whether a prompt is what messages begin with: the first user's turn, or some turns."""
    turns = [message for message, _, _ in turns_of(messages, "messages", where)]
    spoken = [message for message in turns if message["role"] != "system"]
    if isinstance(prompt, str):
        return bool(spoken) and spoken[0]["content"].strip() == prompt.strip()
    return isinstance(prompt, list) and prompt in (turns[:len(prompt)], spoken[:len(prompt)])


def supervised(row, where):
    """(messages, [for each assistant turn, whether it is learnt], [whether it was cut]) of an example.

    The loss of a prompt and its completion is on the completion only, of messages on all assistant turns, but for
    those of weight 0."""
    found, of_row = shapes_in(row), trained(row, "", where)
    if {"chosen", "rejected"} & found:
        raise ValueError(f"{where}: a preference pair ({' + '.join(sorted({'chosen', 'rejected'} & found))}), which reward and dpo learn "
                         "from; rename the right answer with --columns completion=chosen, or give another file")
    if row.get("label") is False or (row.get("label") == 0 and "completion" in row and type(row["label"]) is int):
        raise ValueError(f"{where}: label {row['label']!r} says that this answer is unwanted, and training would make it likelier; "
                         "take such rows out, or rename the key")
    if row.get("messages") is not None:
        refuse_two(row, where, "messages")
        turns = turns_of(row["messages"], "messages", where)
        messages = with_system(checked([message for message, _, _ in turns], "messages", where), row, where)
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's answer, got {messages[-1]['role']!r}")
        answers = [(train, cut) for message, train, cut in turns if message["role"] == "assistant"]
    else:
        keys = next((keys for keys in (("prompt", "completion"), ("inputs", "targets")) if keys[0] in row and keys[1] in row), None)
        if not keys:
            raise ValueError(f"{where}: no example in keys {sorted(row)}; needs messages, or prompt + completion, or inputs + targets; "
                             "--columns OURS=THEIRS renames keys")
        refuse_two(row, where, *keys)
        messages = prompt_messages(row[keys[0]], row, where, keys[0], context=True)
        text, train, cut = answer_of(row[keys[1]], messages, keys[1], where)
        earlier = sum(message["role"] == "assistant" for message in messages)
        messages, answers = messages + [{"role": "assistant", "content": text}], [(False, False)] * earlier + [(train, cut)]
    learnt = [train is not False and of_row is not False for train, _ in answers]
    return messages, learnt, [cut for _, cut in answers[:-1]] + [answers[-1][1] or is_cut(row)]


def conversation(row, where):
    """The messages of a supervised example, the last one the assistant's."""
    return supervised(row, where)[0]


def preference(row, where):
    """(prompt messages, chosen text, rejected text)."""
    return pair_of(row, where)[:3]


def pair_of(row, where):
    """(prompt messages, chosen text, rejected text, whether one of the two was cut, whether it is learnt)."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    implicit = row.get("prompt") is None
    if missing or (implicit and not isinstance(row["chosen"], list)):
        raise ValueError(f"{where}: no preference pair in keys {sorted(row)}; needs prompt, chosen, rejected; --columns OURS=THEIRS renames keys")
    refuse_two(row, where, "prompt", "chosen", "rejected")
    # Without a prompt it is TRL's implicit one: chosen and rejected are whole conversations, equal but for the answer.
    prompt = prompt_messages(row["chosen"][:-1] if implicit else row["prompt"], row, where, context=True)
    sides = [answer_of(row[key], prompt, key, where) for key in ("chosen", "rejected")]
    if any(train is False for _, train, _ in sides):
        raise ValueError(f"{where}: an answer of weight 0 in a preference pair cannot be honoured; take the row out, or the weight")
    cut = any(cut for _, _, cut in sides) or is_cut(row, (*ENDINGS, "chosen_finish_reason", "rejected_finish_reason"))
    return prompt, sides[0][0], sides[1][0], cut, trained(row, "", where) is not False


def prompt_of(row, where):
    """The prompt messages of any known shape."""
    answers = ("completion", "targets", "chosen", "rejected")
    if row.get("messages") is not None:
        refuse_two(row, where, "messages", *answers)
        messages = checked([message for message, _, _ in turns_of(row["messages"], "messages", where)], "messages", where)
        return prompt_messages(messages[:-1] if messages[-1]["role"] == "assistant" else messages, row, where)
    for key in ("prompt", "inputs"):
        if row.get(key) is not None:
            refuse_two(row, where, key, *answers)
            return prompt_messages(row[key], row, where, key)
    raise ValueError(f"{where}: no prompt in keys {sorted(row)}; needs prompt, inputs or messages; --columns OURS=THEIRS renames keys")


def plain_text(row, where):
    """The text of a {"text"} row."""
    refuse_two(row, where, "text")
    if not is_empty(row.get("system")):
        raise ValueError(f"{where}: 'system' goes with a conversation, not with 'text'; write it into the text")
    if not is_empty(row.get("instruction")) and not (is_empty(row.get("output")) and is_empty(row.get("response"))):
        raise ValueError(f"{where}: two shapes in one row, text and instruction; leave one of them")
    return text_of(row["text"], "text", where)


class Spelled:
    """Names of control tokens in texts, counted over all rows: such a text went through a chat template before."""

    def __init__(self, tokenizer=None):
        self.tokenizer, self.found, self.first = tokenizer, Counter(), None

    def look(self, texts, where):
        for text in texts:
            if "<" in text or "[" in text:
                match = TEMPLATED.search(text)
                name = match[0] if match else self.tokenizer.spelled(text) if self.tokenizer else None
                if name:
                    self.first = self.first or where
                    self.found[name] += 1
                    return

    def report(self, paths, total, reading):
        """Refuse what was found, or say it where it may be."""
        if self.found:
            names = " ".join(name for name, _ in self.found.most_common(4))
            what = f"{sum(self.found.values())} of {total} rows spell control tokens ({names}; the first: {self.first})"
            if not (reading and reading.allow_control_tokens):
                raise ValueError(f"{' '.join(map(str, paths))}: {what}, which are read as letters; give texts without a chat "
                                 "template's tokens, or --allow-control-tokens")
            say(paths, f"{what}, which are read as letters")
