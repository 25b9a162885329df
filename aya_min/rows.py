"""What a line of JSONL means. One place decides, for every command that reads rows, before one is used.

    {"messages": [{"role", "content"}, ...]}   {"prompt", "completion"}   {"inputs", "targets"}
    {"prompt", "chosen", "rejected"}           {"prompt"} or {"inputs"}   {"text"}

Each may carry "language" and "system" (the system turn of its prompt). "weight" (0, 1) or "train" (true,
false) of a row or of a message says what is learnt, "finish_reason" that an answer was cut at its limit.
Other keys are kept as they are, but for those that would change what a row means: these are refused by name.
"""

from pathlib import Path

from . import distributed
from .command import shortened
from .files import parse_object, read_bytes
from .languages import SPELLINGS, language_code

SHAPES = ("messages", "prompt", "completion", "inputs", "targets", "chosen", "rejected", "text")
ENDINGS = ("finish_reason", "stop_reason")
OF_PAIRS = ("chosen_finish_reason", "rejected_finish_reason")
KNOWN = (*SHAPES, "system", "language", "weight", "train", "label", *ENDINGS, *OF_PAIRS, "question_id", "id",
         "task", "args", "cluster")
OF_MESSAGES = {"role", "content", "weight", "train", *ENDINGS}
# What rows carry along that says nothing of their texts: our own files, and the usual columns of data sets.
CARRIED = set("""
    source kind level category subcategory cluster task args candidates teacher scores reward score grade
    seen_language why model seed sample logp num_tokens chosen_reward rejected_reward chosen_teacher
    rejected_teacher dataset url user_id annotation_type template_id dataset_name sub_dataset_name split idx
    index uid uuid prompt_id split_type created license script task_type annotator_id""".split())

# Ends of an answer that is not finished: OpenAI, vLLM; Anthropic, Gemini; Mistral; our own chat after Ctrl-C.
CUT = {"length", "max_tokens", "model_length", "interrupted", "content_filter", "error"}

# Keys that change what a row means and that nothing here honours, with the reason. Empty ones say nothing.
TOOLS = "no tools are called here"
MEDIA = "only text is read here"
DOCUMENTS = "no documents are put into prompts here; write them into the prompt's text"
THOUGHTS = "no thoughts are kept apart from an answer here"
LOSS = "say what is learnt with weight (0 or 1) or train (true or false)"
CONTINUED = "no answer is continued here"
BOTH = {**dict.fromkeys(["tools", "functions", "tool_choice", "tool_calls", "function_call"], TOOLS),
        **dict.fromkeys(["image", "images", "video", "videos", "audio", "audios"], MEDIA),
        **dict.fromkeys(["loss_scale", "loss_mask", "assistant_masks", "train_detail"], LOSS),
        "documents": DOCUMENTS}
TEMPLATE = "the model folder's chat template is followed, as it is for plain conversations"
SYSTEM = "it is a system turn; give --columns system="
REFUSED = {
    "of a row": {
        **BOTH, **dict.fromkeys(["chat_template", "chat_template_kwargs"], TEMPLATE),
        "continue_final_message": CONTINUED, "history": "write earlier turns into prompt or messages",
        **{name: SYSTEM + name
           for name in ("system_prompt", "system_message", "system_instruction", "preamble")},
        **dict.fromkeys(["loss_weight", "sample_weight"], LOSS),
        **dict.fromkeys(["reasoning", "reasoning_content", "thinking"], THOUGHTS),
        **dict.fromkeys(["conversations", "conversation"],
                        "write messages, with role and content in each turn")},
    "of a message": {
        **BOTH, **dict.fromkeys(["tool_call_id", "tool_plan"], TOOLS), "citations": DOCUMENTS,
        **dict.fromkeys(["reasoning", "reasoning_content", "thinking"], THOUGHTS),
        **dict.fromkeys(["loss", "loss_weight", "trainable", "training", "mask", "masked", "is_masked",
                         "do_train", "train_on", "ignore", "supervise"], LOSS),
        **dict.fromkeys(["prefix", "partial"], CONTINUED), "refusal": "write it as content"},
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
OTHER_ROLES = {**dict.fromkeys(["tool", "function", "ipython", "observation"], TOOLS),
               **dict.fromkeys(["human", "gpt", "bot", "model", "chatbot"], "write user or assistant")}


READ = {*KNOWN, *CARRIED, *REFUSED["of a row"]}
BLANK = b" \t\r\xef\xbb\xbf"           # of a line without a row, the first one's byte-order mark included
ARRAY = "a JSON array over several lines (jq -c '.[]' takes it apart)"
KINDS = {b"\x1f\x8b": "a gzip file, unpack it", b"PK\x03\x04": "a zip file, unpack it", b"[\n": ARRAY,
         b"[\r\n": ARRAY, b"PAR1": "a parquet file, convert it (results/GUIDE.md)"}


# ---- a file's rows -----------------------------------------------------------------------------------------

def read_jsonl(path, reading=None):
    """[(where, object), ...] of a JSONL file; where is "file:line". The first wrong line is refused.

    reading: a config.Reading, whose columns rename keys. Languages become the codes used here.
    """
    path, columns = Path(path), reading.columns if reading else None
    check_columns(columns)
    data = read_bytes(path)
    for begin, what in KINDS.items():
        if data.startswith(begin):
            raise ValueError(f"{path}: {what}; it needs one JSON object a line")
    rows, unknown, unread = [], {}, {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip(BLANK):
            continue
        where = f"{path}:{number}"
        row = parse_object(line, where, "one whole object a line")
        if columns:
            row = renamed(row, columns, where)
        if row.get("language") is not None:
            row["language"] = canonical(row["language"], where)
        check_keys(row, where, unknown)
        for key in sorted(row.keys() - READ) if shapes_in(row) else ():      # else the row is refused
            if not is_empty(row[key]):
                unread[key] = (unread[key][0] + 1, unread[key][1]) if key in unread else (1, where)
        rows.append((where, row))
    if not rows:
        raise ValueError(f"{path}: the file is empty; it needs one JSON object a line")
    for kind, found in (("of messages ", unknown), ("", unread)):
        if found:
            names = [f"{name!r} ({count} times, the first: {first})"
                     for name, (count, first) in found.items()]
            distributed.say(f"keys {kind}that are not read: {', '.join(names[:8])}", [path])
    return rows


def canonical(language, where):
    code = language_code(language) if isinstance(language, str) else None
    if code is None:
        raise ValueError(f"{where}: unknown language {shortened(language)}; {SPELLINGS}, or leave the key "
                         "out")
    return code


def check_columns(columns):
    """Refuse a column (ours: theirs) whose first name is not one that is read here."""
    for ours in columns or ():
        if ours not in KNOWN:
            raise ValueError(f"--columns {ours}={columns[ours]}: {ours!r} is no key that is read here; "
                             f"known: {' '.join(KNOWN)}")
    if columns and len(set(columns.values())) < len(columns):
        raise ValueError(f"--columns {' '.join(map('='.join, columns.items()))}: a key has two names; "
                         "give it one")


def renamed(row, columns, where):
    """The row with the names of keys that are used here. A whole number counts as its text."""
    theirs = set(columns.values())
    made = {key: value for key, value in row.items() if key not in theirs}
    for ours, key in columns.items():
        if key not in row and row.get(ours) is not None:        # a file, or a row, that has our names
            continue
        if key not in row:
            raise ValueError(f"{where}: no key {key!r}, which --columns {ours}={key} names; "
                             f"it has {' '.join(sorted(row))[:200]}")
        if made.get(ours) is not None:
            raise ValueError(f"{where}: both {ours!r} and {key!r}, which --columns {ours}={key} would rename "
                             "to it; leave one")
        made[ours] = str(row[key]) if type(row[key]) is int and ours in SHAPES else row[key]
    if columns.get("prompt", columns.get("inputs")) == "instruction" and row.get("input"):
        raise ValueError(f"{where}: 'input' is part of what 'instruction' asks; join the two in the file")
    return made


def is_empty(value):
    return value is None or value is False or value == "" or value == [] or value == {}


def check_keys(row, where, unknown):
    """Refuse keys of a row or of its messages that mean something which nothing here honours.

    unknown: {other key of a message: (count, first place)}, which this adds to."""
    refuse_keys(row, "of a row", "", where)
    for key in SHAPES:
        if isinstance(row.get(key), list):
            for i, message in enumerate(row[key]):
                if isinstance(message, dict):
                    refuse_keys(message, "of a message", f"{key}[{i}].", where)
                    for name in message.keys() - OF_MESSAGES - REFUSED["of a message"].keys():
                        if "content" in message:
                            count, first = unknown.get(name, (0, where))
                            unknown[name] = count + 1, first


def refuse_keys(found, kind, place, where):
    for key in found.keys() & REFUSED[kind].keys():
        reason = REFUSED[kind][key]
        empty = is_empty(found[key]) or found[key] in ("[]", "{}", "null")      # tables have JSON as a text
        if not empty or (found[key] is False and reason == LOSS):
            raise ValueError(f"{where}: {place + key!r} cannot be honoured: {reason}; or remove the key")


# ---- texts and turns ---------------------------------------------------------------------------------------

def is_parts(value):
    """Whether a value is a text in parts, as OpenAI writes it, not a list of messages."""
    return isinstance(value, list) and value != [] and all(
        isinstance(part, dict) and "type" in part and "role" not in part for part in value)


def text_of(value, key, where):
    """A text that is not blank: a string, or {"type": "text", "text"} parts, whose texts are put together."""
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


def trained(found, key, where):
    """What "weight" and "train" of a row or a message say of its loss: True, False, or None for nothing."""
    weight, train = found.get("weight"), found.get("train")
    if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
        raise ValueError(f"{where}: {key}weight must be 0 or 1, got {shortened(weight)}; no other is "
                         "followed")
    if train is not None and type(train) is not bool:
        raise ValueError(f"{where}: {key}train must be true or false, got {shortened(train)}")
    said = {bool(value) for value in (weight, train) if value is not None}
    if len(said) > 1:
        raise ValueError(f"{where}: {key}weight and {key}train contradict each other; leave one")
    return said.pop() if said else None


def is_cut(found, keys=ENDINGS):
    """Whether a row or a message says that its answer was cut at its limit."""
    return any(isinstance(found.get(key), str) and found[key].lower() in CUT for key in keys)


def finish_reason(row, where):
    """What a row, or the last message of its answer, says of the answer's end; None if nothing."""
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
    """The role of a message, as it is called here."""
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
    """[({"role", "content"}, what it says of its loss, whether it was cut), ...] of a list of messages."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key!r} must be a non-empty list of {{role, content}}")
    turns = []
    for i, message in enumerate(value):
        place = f"{key}[{i}]"
        role = role_of(message, place, where)
        train = trained(message, f"{place}.", where)
        if train and role != "assistant":
            raise ValueError(f"{where}: {place} is a turn of the {role}, and only the assistant's are "
                             "learnt; take its weight or train out")
        content = message.get("content")
        if role != "system" or content is None or str(content).strip():     # a system turn may say nothing
            content = text_of(content, f"{place}.content", where)
        turns.append(({"role": role, "content": content}, train, is_cut(message)))
    return turns


def checked(turns, key, where):
    """The messages of turns, if they are an optional system turn, then user and assistant in turn."""
    messages = [message for message, _, _ in turns]
    for i, message in enumerate(messages[1:] if messages[0]["role"] == "system" else messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"{where}: {key}: after an optional system turn, user and assistant must "
                             "alternate, user first")
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
    """The messages of a prompt. context: an answer follows that is learnt, and nothing of the prompt is."""
    if isinstance(value, list) and not is_parts(value):
        turns = turns_of(value, key, where)
        if context and any(train for _, train, _ in turns):
            raise ValueError(f"{where}: a turn of {key!r} has weight 1 or train true, but only the answer "
                             "after it is learnt; write the whole conversation as messages")
        messages = checked(turns, key, where)
    else:
        messages = [{"role": "user", "content": text_of(value, key, where)}]
    return ends_with_user(with_system(messages, row, where), where)


def ends_with_user(messages, where):
    if not messages or messages[-1]["role"] != "user":
        got = f"got {messages[-1]['role']!r}" if messages else "there is none"
        raise ValueError(f"{where}: the prompt must end with a user turn, {got}")
    return messages


def answer_of(value, prompt, key, where):
    """(text, what it says of its loss, whether it was cut) of an answer: a string, or messages that are one
    assistant turn, alone or after the prompt."""
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


def shapes_in(row):
    return {key for key in SHAPES if not is_empty(row.get(key))}


def refuse_two(row, where, *wanted):
    """Refuse a row of two shapes, of which one would be dropped. A second one may say the same, as in data
    sets on the hub: messages and their prompt, a chosen conversation and its messages."""
    found = shapes_in(row)
    other = found - set(wanted)
    if other == {"prompt"} and "messages" in wanted and begins(row["messages"], row["prompt"], where):
        return
    if other == {"messages"} and "chosen" in wanted and row["messages"] == row["chosen"]:
        return
    if other:
        here, there = (" + ".join(sorted(keys)) for keys in (found - other, other))
        raise ValueError(f"{where}: two shapes in one row, {here} and {there}; leave one of them")


def begins(messages, prompt, where):
    """Whether messages begin with a prompt: their first user's turn, or some turns."""
    turns = [message for message, _, _ in turns_of(messages, "messages", where)]
    spoken = [message for message in turns if message["role"] != "system"]
    if isinstance(prompt, str):
        return bool(spoken) and spoken[0]["content"].strip() == prompt.strip()
    return isinstance(prompt, list) and prompt in (turns[:len(prompt)], spoken[:len(prompt)])


def refuse_unwanted(row, where):
    """Refuse what is no example to learn from: one of two answers, or one that its row calls bad (KTO)."""
    if sides := {"chosen", "rejected"} & shapes_in(row):
        raise ValueError(f"{where}: a preference pair ({' + '.join(sorted(sides))}), which "
                         "reward and dpo learn from; give another file, or rename the right answer: "
                         "--columns completion=chosen")
    label = row.get("label")
    if label is False or (type(label) is int and label == 0 and "completion" in row):
        raise ValueError(f"{where}: label {label!r} says that this answer is unwanted, and training would "
                         "make it likelier; take such rows out, or rename the key")


def supervised(row, where):
    """(messages, [for each assistant turn, whether it is learnt], [whether it was cut]) of an example.

    The loss of a prompt and its completion is on the completion only; of messages on all assistant turns, but
    for those of weight 0."""
    of_row = trained(row, "", where)
    refuse_unwanted(row, where)
    if row.get("messages") is not None:
        refuse_two(row, where, "messages")
        turns = turns_of(row["messages"], "messages", where)
        messages = with_system(checked(turns, "messages", where), row, where)
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
        answers = [(False, False) for message in messages if message["role"] == "assistant"] + [(train, cut)]
        messages = messages + [{"role": "assistant", "content": text}]
    learnt = [train is not False and of_row is not False for train, _ in answers]
    return messages, learnt, [cut for _, cut in answers[:-1]] + [answers[-1][1] or is_cut(row)]


def conversation(row, where):
    """The messages of a supervised example, the last one the assistant's."""
    return supervised(row, where)[0]


def pair_of(row, where):
    """(prompt messages, chosen text, rejected text, whether one of them was cut, whether they are learnt)."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    implicit = row.get("prompt") is None
    if missing or (implicit and not isinstance(row["chosen"], list)):
        raise ValueError(f"{where}: no preference pair in keys {sorted(row)}; "
                         f"needs prompt, chosen, rejected; {RENAME}")
    refuse_two(row, where, "prompt", "chosen", "rejected")
    # TRL's implicit prompt: chosen and rejected are whole conversations, equal but for the answer.
    prompt = prompt_messages(row["chosen"][:-1] if implicit else row["prompt"], row, where, context=True)
    sides = [answer_of(row[key], prompt, key, where) for key in ("chosen", "rejected")]
    if any(train is False for _, train, _ in sides):
        raise ValueError(f"{where}: an answer of weight 0 in a preference pair cannot be honoured; "
                         "take the row out, or the weight")
    cut = any(cut for _, _, cut in sides) or is_cut(row, (*ENDINGS, *OF_PAIRS))
    return prompt, sides[0][0], sides[1][0], cut, trained(row, "", where) is not False


def preference(row, where):
    """(prompt messages, chosen text, rejected text)."""
    return pair_of(row, where)[:3]


def prompt_of(row, where):
    """The prompt messages of any known shape."""
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
    """Whether a row is a plain {"text"}."""
    return "text" in row and (not is_empty(row["text"]) or not shapes_in(row))


def plain_text(row, where):
    """The text of a {"text"} row."""
    refuse_two(row, where, "text")
    if not is_empty(row.get("system")):
        raise ValueError(f"{where}: 'system' goes with a conversation, not with 'text'; write it into it")
    if "instruction" in row and ("output" in row or "response" in row):
        raise ValueError(f"{where}: two shapes in one row, text and instruction; leave one of them")
    return text_of(row["text"], "text", where)


def messages_of(row, where):
    """The messages of a row that has "messages", and its "system"."""
    messages = checked(turns_of(row["messages"], "messages", where), "messages", where)
    return with_system(messages, row, where)


def texts_in(row, where):
    """All texts of a row of any shape."""
    if is_plain_text(row):
        return [plain_text(row, where)]
    if {"chosen", "rejected"} & shapes_in(row):
        prompt, chosen, rejected = preference(row, where)
        return [*(message["content"] for message in prompt), chosen, rejected]
    answered = {"completion", "targets"} & shapes_in(row)
    read = messages_of if row.get("messages") is not None else conversation if answered else prompt_of
    return [message["content"] for message in read(row, where)]
