"""What a line of JSONL means. All commands that read rows ask this file, before they use one.

    {"messages": [{"role", "content"}, ...]}   {"prompt", "completion"}   {"inputs", "targets"}
    {"prompt", "chosen", "rejected"}           {"prompt"} or {"inputs"}   {"text"}
    {"text", "label"} (classify)

Each may have a "language" and a "system" (the system turn of its prompt). "weight" (0, 1) or "train" (true,
false), of a row or of a message, says whether it is supervised; "finish_reason" says that an answer was cut
at its limit. Other keys are kept, or refused by name (rows_keys.py).
"""

import re
from pathlib import Path

from . import distributed
from .command import shortened
from .files import parse_object, read_bytes
from .languages import SPELLINGS, language_code
from .rows_keys import (ENDINGS, MEDIA, OF_PAIRS, TOOLS, NotRead, check_columns, is_empty, renamed,
                        shapes_in)

# The finish_reason of an unfinished answer: OpenAI, vLLM; Anthropic, Gemini; Mistral; our own chat after
# Ctrl-C.
CUT = {"length", "max_tokens", "model_length", "interrupted", "content_filter", "error"}

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
OTHER_ROLES = {**dict.fromkeys(["tool", "function", "ipython", "observation"], TOOLS),
               **dict.fromkeys(["human", "gpt", "bot", "model", "chatbot"], "write user or assistant")}

# The bytes of a line without a row. They include the byte-order mark, with which a file may begin.
BLANK = b" \t\r\xef\xbb\xbf"
ARRAY = "a JSON array over several lines (jq -c '.[]' takes it apart)"
OTHER_FILES = {b"\x1f\x8b": "a gzip file, unpack it", b"PK\x03\x04": "a zip file, unpack it",
               b"[\n": ARRAY, b"[\r\n": ARRAY, b"PAR1": "a parquet file, convert it (results/GUIDE.md)"}


# ---- a file's rows -----------------------------------------------------------------------------------------

def read_jsonl(path, reading=None, also=()):
    """[(where, row), ...] of a JSONL file, or of a drawn mixture (mixture_rows.Drawn); where is "file:line".

    reading: a config.Reading, whose columns rename keys. Names of languages become the codes used here. Keys
    that nothing knows are reported. also: keys that this caller reads and others do not. ValueError at the
    first wrong line.
    """
    if hasattr(path, "read_rows"):
        return path.read_rows()
    path, columns = Path(path), reading.columns if reading else None
    check_columns(columns)
    data = read_bytes(path)
    refuse_other_files(data, path)
    rows, not_read = [], NotRead(also, columns)
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip(BLANK):
            where = f"{path}:{number}"
            rows.append((where, parse_row(line, where, columns, not_read)))
    if not rows:
        raise ValueError(f"{path}: the file is empty; it needs one JSON object a line")
    for text in not_read.lines():
        distributed.say(text, [path])
    return rows


def refuse_other_files(begin, path):
    """ValueError if the first bytes of a file are those of another kind of file than JSONL."""
    for magic, what in OTHER_FILES.items():
        if begin.startswith(magic):
            raise ValueError(f"{path}: {what}; it needs one JSON object a line")


def parse_row(line, where, columns, not_read):
    """The row of a line's bytes, with its keys renamed and checked. not_read: a rows_keys.NotRead."""
    row = parse_object(line, where, "one whole object a line")
    if columns:
        not_read.has_columns(row)
        row = renamed(row, columns, where)
    name_language(row, where)
    not_read.look(row, where)
    return row


def name_language(row, where):
    """Give a row the code used here as its "language".

    The Aya data sets write a name and a code in "language" and "language_code" (Standard Arabic, arb), or a
    code and its "script" (zho, Hant). A name that is not known gives way to the code. A script stands in the
    code where the language is usually written in another.
    """
    named, coded, script = (row.get(key) for key in ("language", "language_code", "script"))
    if named is None or (coded is not None and isinstance(named, str) and language_code(named) is None):
        named = coded
    if named is None:
        return
    code = canonical(named, where)
    if isinstance(script, str) and re.fullmatch("[A-Z][a-z]{3}", script) and code.isalpha():
        code = language_code(f"{code}-{script}") or code
    row["language"] = code


def canonical(language, where):
    """The code of a language that a row names by a code, a tag or a name."""
    code = language_code(language) if isinstance(language, str) else None
    if code is None:
        raise ValueError(f"{where}: unknown language {shortened(language)}; {SPELLINGS}, or leave the key "
                         "out")
    return code


# ---- texts and turns ---------------------------------------------------------------------------------------

def is_parts(value):
    """True if a value is a text in parts, as OpenAI writes them, and not a list of messages."""
    return isinstance(value, list) and value != [] and all(
        isinstance(part, dict) and "type" in part and "role" not in part for part in value)


def text_of(value, key, where):
    """The text of a value: a string, or parts of {"type": "text", "text"}. ValueError if it is blank."""
    if is_parts(value):
        for part in value:
            if part["type"] != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{where}: {key!r} has a part of type {shortened(part['type'])}; {MEDIA}: "
                                 "{'type': 'text', 'text': ...}")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty; remove the line or fill it")
    return value


def is_supervised(found, key, where):
    """Whether a row or a message is supervised, by its "weight" or "train": True, False, or None without
    either.

    key: what stands before these names in a message, such as "messages[1].".
    """
    weight, train = found.get("weight"), found.get("train")
    if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
        raise ValueError(f"{where}: {key}weight must be 0 or 1, got {shortened(weight)}; other "
                         "loss weights are not supported")
    if train is not None and type(train) is not bool:
        raise ValueError(f"{where}: {key}train must be true or false, got {shortened(train)}")
    said = {bool(value) for value in (weight, train) if value is not None}
    if len(said) > 1:
        raise ValueError(f"{where}: {key}weight and {key}train contradict each other; leave one")
    return said.pop() if said else None


def is_cut(found, keys=ENDINGS):
    """True if a row or a message says that its answer was cut at its limit."""
    return any(isinstance(found.get(key), str) and found[key].lower() in CUT for key in keys)


def finish_reason(row, where):
    """The finish_reason or stop_reason of a row, or of the last message of its answer; None without one."""
    lists = [row[key] for key in ("messages", "completion", "targets") if isinstance(row.get(key), list)]
    for part in (row, *(messages[-1] for messages in lists if messages)):
        for key in ENDINGS if isinstance(part, dict) else ():
            if isinstance(value := part.get(key), str):
                return value
            if value is not None:
                raise ValueError(f"{where}: {key!r} must be a text such as stop or length, got "
                                 f"{shortened(value)}")
    return None


def role_of(message, place, where):
    """The role of a message: system, user or assistant. place: such as "messages[1]", for errors."""
    role = message.get("role") if isinstance(message, dict) else None
    if isinstance(role, str) and role in ROLES:
        return ROLES[role]
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        raise ValueError(f"{where}: {place} is ShareGPT's (from, value); write role (system, user, "
                         "assistant) and content")
    got = "" if role is None else f", got {shortened(role)}"
    reason = f": {OTHER_ROLES[role]}" if isinstance(role, str) and role in OTHER_ROLES else ""
    raise ValueError(f"{where}: {place} needs a role of system, user or assistant{got}{reason}")


def turns_of(value, key, where):
    """[({"role", "content"}, train, cut), ...] of a list of messages.

    train: whether the message is supervised (see `is_supervised`). cut: whether it was cut at its limit.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key!r} must be a non-empty list of {{role, content}}")
    turns = []
    for i, message in enumerate(value):
        place = f"{key}[{i}]"
        role = role_of(message, place, where)
        train = is_supervised(message, f"{place}.", where)
        if train and role != "assistant":
            raise ValueError(f"{where}: {place} is a turn of the {role}, and only the assistant's are "
                             "supervised; remove its weight or train")
        content = message.get("content")
        # Only a system turn may be blank.
        if role != "system" or content is None or str(content).strip():
            content = text_of(content, f"{place}.content", where)
        turns.append(({"role": role, "content": content}, train, is_cut(message)))
    return turns


def alternating(turns, key, where):
    """The messages of turns (see `turns_of`). ValueError unless user and assistant alternate in them, after
    an optional system turn."""
    messages = [message for message, _, _ in turns]
    for i, message in enumerate(messages[1:] if messages[0]["role"] == "system" else messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"{where}: {key}: after an optional system turn, user and assistant must "
                             "alternate, user first")
    return messages


def with_system(messages, row, where):
    """The messages with the row's "system" as their system turn. ValueError if they have another one."""
    if is_empty(row.get("system")) or str(row["system"]).isspace():
        return messages
    system = text_of(row["system"], "system", where)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise ValueError(f"{where}: 'system' and the system turn of the messages differ; leave one")
    return messages


def prompt_messages(value, row, where, key="prompt", context=False):
    """The messages of a prompt, a string or messages that end with a user turn.

    context: the prompt is only the context of an answer, so that none of its turns may ask to be supervised.
    """
    if isinstance(value, list) and not is_parts(value):
        turns = turns_of(value, key, where)
        if context and any(train for _, train, _ in turns):
            raise ValueError(f"{where}: a turn of {key!r} has weight 1 or train true, but only the answer "
                             "after it is supervised; write the whole conversation as messages")
        messages = alternating(turns, key, where)
    else:
        messages = [{"role": "user", "content": text_of(value, key, where)}]
    return ends_with_user(with_system(messages, row, where), where)


def ends_with_user(messages, where):
    if not messages or messages[-1]["role"] != "user":
        got = f"got {messages[-1]['role']!r}" if messages else "got no turns"
        raise ValueError(f"{where}: the prompt must end with a user turn, {got}")
    return messages


def answer_of(value, prompt, key, where):
    """(text, train, cut) of an answer, as in `turns_of`: a string, or one assistant turn, alone or after the
    prompt."""
    if not isinstance(value, list) or is_parts(value):
        return text_of(value, key, where), None, False
    turns = turns_of(value, key, where) if value else []
    before = [message for message, _, _ in turns[:-1]]
    without_system = [message for message in prompt if message["role"] != "system"]
    if not turns or turns[-1][0]["role"] != "assistant" or before not in ([], prompt, without_system):
        raise ValueError(f"{where}: {key!r} must be one assistant turn, alone or after the same prompt, "
                         f"got {len(turns)} turns; put earlier turns in the prompt")
    message, train, cut = turns[-1]
    return message["content"], train, cut


# ---- what a row is -----------------------------------------------------------------------------------------

RENAME = "--columns OURS=THEIRS renames keys"


def refuse_two(row, where, *wanted):
    """ValueError if a row has a shape beside the wanted keys, because one of them would be dropped.

    A second shape may say the same as the first, as in data sets on the hub: messages and their prompt, or a
    chosen conversation and its messages.
    """
    found = shapes_in(row)
    other = found - set(wanted)
    if other == {"prompt"} and "messages" in wanted and begins(row["messages"], row["prompt"], where):
        return
    if other == {"messages"} and "chosen" in wanted and row["messages"] == row["chosen"]:
        return
    if other:
        first, second = (" + ".join(sorted(keys)) for keys in (found - other, other))
        raise ValueError(f"{where}: two shapes in one row, {first} and {second}; leave one of them")


def begins(messages, prompt, where):
    """True if messages begin with a prompt, which is the text of their first user turn, or turns."""
    turns = [message for message, _, _ in turns_of(messages, "messages", where)]
    spoken = [message for message in turns if message["role"] != "system"]
    if isinstance(prompt, str):
        return bool(spoken) and spoken[0]["content"].strip() == prompt.strip()
    return isinstance(prompt, list) and prompt in (turns[:len(prompt)], spoken[:len(prompt)])


def refuse_unwanted(row, where):
    """ValueError if a row is a preference pair, or if its label (KTO) says that the answer is bad: supervised
    training would make the bad answer likelier."""
    if sides := {"chosen", "rejected"} & shapes_in(row):
        remedy = ("rename the right answer: --columns completion=chosen" if sides == {"chosen"} else
                  "one with the right answer as completion and without the rejected one")
        raise ValueError(f"{where}: a preference pair ({' + '.join(sorted(sides))}), which reward and dpo "
                         f"learn from; give another file, or {remedy}")
    label = row.get("label")
    says_false = isinstance(label, str) and label.strip().lower() == "false"
    # Beside a completion 0 is TRL's false, and 0.0 what pandas makes of it; elsewhere it may be a class.
    is_zero = type(label) in (int, float) and label == 0 and "completion" in row
    if label is False or says_false or is_zero:
        raise ValueError(f"{where}: label {label!r} says that this answer is unwanted, and training would "
                         "make it likelier; remove such rows, or rename the key (kto learns from them)")


def conversation_of(row, where):
    """(messages, supervised, cut) of an example; supervised and cut hold a bool for each assistant turn.

    Of a prompt and its completion only the completion is supervised; of messages all assistant turns are, but
    for those of weight 0.
    """
    of_row = is_supervised(row, "", where)
    refuse_unwanted(row, where)
    if row.get("messages") is not None:
        refuse_two(row, where, "messages")
        turns = turns_of(row["messages"], "messages", where)
        messages = with_system(alternating(turns, "messages", where), row, where)
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's answer, "
                             f"got {messages[-1]['role']!r}")
        answers = [(train, cut) for message, train, cut in turns if message["role"] == "assistant"]
    else:
        shapes = (("prompt", "completion"), ("inputs", "targets"))
        keys = next((keys for keys in shapes if keys[0] in row and keys[1] in row), None)
        if not keys:
            raise ValueError(f"{where}: no example in keys {sorted(row)}; needs messages, or prompt + "
                             f"completion, or inputs + targets; {RENAME}")
        refuse_two(row, where, *keys)
        messages = prompt_messages(row[keys[0]], row, where, keys[0], context=True)
        text, train, cut = answer_of(row[keys[1]], messages, keys[1], where)
        earlier = [(False, False) for message in messages if message["role"] == "assistant"]
        answers = earlier + [(train, cut)]
        messages = messages + [{"role": "assistant", "content": text}]
    supervised = [train is not False and of_row is not False for train, _ in answers]
    return messages, supervised, [cut for _, cut in answers[:-1]] + [answers[-1][1] or is_cut(row)]


def pair_of(row, where):
    """(prompt messages, chosen text, rejected text, cut, supervised) of a preference pair.

    cut: whether one of the answers was cut at its limit. supervised: False for a row of weight 0.
    """
    missing = [key for key in ("chosen", "rejected") if key not in row]
    implicit = row.get("prompt") is None
    if missing or (implicit and not isinstance(row["chosen"], list)):
        raise ValueError(f"{where}: no preference pair in keys {sorted(row)}; "
                         f"needs prompt, chosen, rejected; {RENAME}")
    refuse_two(row, where, "prompt", "chosen", "rejected")
    # TRL's implicit prompt: chosen and rejected are whole conversations that differ in the answer only.
    prompt = prompt_messages(row["chosen"][:-1] if implicit else row["prompt"], row, where, context=True)
    sides = [answer_of(row[key], prompt, key, where) for key in ("chosen", "rejected")]
    if any(train is False for _, train, _ in sides):
        raise ValueError(f"{where}: an answer of weight 0 in a preference pair cannot be honoured; "
                         "remove the row, or the weight")
    cut = any(cut for _, _, cut in sides) or is_cut(row, (*ENDINGS, *OF_PAIRS))
    return prompt, sides[0][0], sides[1][0], cut, is_supervised(row, "", where) is not False


def labelled_of(row, where):
    """(messages, label, cut, supervised) of a prompt and its completion that is labelled as wanted (true) or
    unwanted (false), as KTO learns from. supervised: False for a row of weight 0."""
    if sides := {"chosen", "rejected"} & shapes_in(row):
        raise ValueError(f"{where}: a preference pair ({' + '.join(sorted(sides))}), which reward and dpo "
                         "learn from; kto needs prompt, completion and label")
    if row.get("messages") is not None:
        raise ValueError(f"{where}: messages cannot be labelled; kto needs prompt (a text or messages), "
                         "completion and label")
    if type(row.get("label")) is not bool:
        got = shortened(row["label"]) if "label" in row else "none"
        raise ValueError(f"{where}: label must be true (a wanted answer) or false (an unwanted one), "
                         f"got {got}")
    messages, supervised, cut = conversation_of({**row, "label": None}, where)
    return messages, row["label"], cut[-1], supervised[-1]


def preference(row, where):
    """(prompt messages, chosen text, rejected text) of a preference pair."""
    return pair_of(row, where)[:3]


def prompt_of(row, where):
    """The messages of the prompt of a row of any shape but {"text"}."""
    answers = ("completion", "targets", "chosen", "rejected")
    if row.get("messages") is not None:
        refuse_two(row, where, "messages", *answers)
        messages = messages_of(row, where)
        return ends_with_user(messages[:-1] if messages[-1]["role"] == "assistant" else messages, where)
    for key in ("prompt", "inputs"):
        if row.get(key) is not None:
            refuse_two(row, where, key, *answers)
            return prompt_messages(row[key], row, where, key)
    raise ValueError(f"{where}: no prompt in keys {sorted(row)}; needs prompt, inputs or messages; {RENAME}")


def is_plain_text(row):
    """True if a row is {"text"} alone."""
    return "text" in row and (not is_empty(row["text"]) or not shapes_in(row))


def plain_text(row, where):
    """The text of a {"text"} row."""
    refuse_two(row, where, "text")
    if not is_empty(row.get("system")):
        raise ValueError(f"{where}: 'system' goes with a conversation, not with 'text'; write it into the "
                         "text")
    if "instruction" in row and ("output" in row or "response" in row):
        raise ValueError(f"{where}: two shapes in one row, text and instruction; leave one of them")
    return text_of(row["text"], "text", where)


def learned_of(row, where):
    """(messages, supervised, cut) as in `conversation_of`, of a conversation or of {"text"}, which is one
    message without a role."""
    if not is_plain_text(row):
        return conversation_of(row, where)
    message = {"content": plain_text(row, where)}
    return [message], [is_supervised(row, "", where) is not False], [is_cut(row)]


def classified_of(row, where):
    """(text, label) of a text whose class is named by its label."""
    if not is_plain_text(row):
        raise ValueError(f"{where}: no text in keys {sorted(row)}; classify and sidenet need text and label; "
                         f"{RENAME}")
    label = row.get("label")
    if not isinstance(label, str) or not label.strip():
        got = shortened(label) if "label" in row else "none"
        remedy = "put it into quotes" if isinstance(label, (int, float)) else RENAME
        raise ValueError(f"{where}: label must be a text, the name of a class, got {got}; {remedy}")
    return plain_text(row, where), label


def messages_of(row, where):
    """The messages of a row that has "messages", with its "system" as their system turn."""
    messages = alternating(turns_of(row["messages"], "messages", where), "messages", where)
    return with_system(messages, row, where)


def texts_in(row, where):
    """All texts of a row of any shape."""
    if is_plain_text(row):
        return [plain_text(row, where)]
    if {"chosen", "rejected"} & shapes_in(row):
        prompt, chosen, rejected = preference(row, where)
        return [*(message["content"] for message in prompt), chosen, rejected]
    if row.get("messages") is not None:
        messages = messages_of(row, where)
    elif {"completion", "targets"} & shapes_in(row):
        messages, *_ = conversation_of(row, where)
    else:
        messages = prompt_of(row, where)
    return [message["content"] for message in messages]
