"""The keys that a row of JSONL and its messages may have: read, carried along, or refused by name.

A key that would change what a row means, and that nothing here honours, is refused with the reason. All other
keys are kept as they are; rows.py names those that nothing knows. --columns renames keys (`renamed`).
"""

# The keys that hold texts. Those that a row has are its shape, see rows.py.
SHAPES = ("messages", "prompt", "completion", "inputs", "targets", "chosen", "rejected", "text")
# The keys that say how an answer ended.
ENDINGS = ("finish_reason", "stop_reason")
OF_PAIRS = ("chosen_finish_reason", "rejected_finish_reason")
# What a reward model reads beside the answers (critiques.py). Where nothing reads them, they are reported.
CRITIQUES = ("critique", "chosen_critique", "rejected_critique")
KNOWN = (*SHAPES, "system", "language", "weight", "train", "label", *ENDINGS, *OF_PAIRS, *CRITIQUES,
         "question_id", "id", "task", "args", "cluster")
OF_MESSAGES = {"role", "content", "weight", "train", *ENDINGS}
# Keys that are carried along, because they do not change what the texts mean: those of our own files, and the
# usual columns of data sets.
CARRIED = set("""
    source kind critic level category subcategory cluster task args candidates teacher scores reward score
    grade seen_language why model seed sample logp num_tokens chosen_reward rejected_reward chosen_teacher
    rejected_teacher dataset url user_id annotation_type template_id dataset_name sub_dataset_name split idx
    index uid uuid prompt_id split_type created license script task_type annotator_id
    language_code source_id original_inputs original_targets approvals calls results""".split())

# Keys that would change what a row means and that nothing here honours, with the reason. They may be empty.
TOOLS = "no tools are called here"
MEDIA = "only text is read here"
DOCUMENTS = "no documents are put into prompts here; write them into the prompt's text"
THOUGHTS = "no thoughts are kept apart from an answer here"
LOSS = "say what is supervised with weight (0 or 1) or train (true or false)"
CONTINUED = "no answer is continued here"
OF_BOTH = {**dict.fromkeys(["tools", "functions", "tool_choice", "tool_calls", "function_call"], TOOLS),
           **dict.fromkeys(["image", "images", "video", "videos", "audio", "audios"], MEDIA),
           **dict.fromkeys(["loss_scale", "loss_mask", "assistant_masks", "train_detail"], LOSS),
           "documents": DOCUMENTS}
TEMPLATE = "the model folder's chat template is followed, without further variables"
SYSTEM = "it is a system turn; give --columns system="
REFUSED = {
    "of a row": {
        **OF_BOTH, **dict.fromkeys(["chat_template", "chat_template_kwargs"], TEMPLATE),
        "continue_final_message": CONTINUED, "history": "write earlier turns into prompt or messages",
        **{name: SYSTEM + name
           for name in ("system_prompt", "system_message", "system_instruction", "preamble")},
        **dict.fromkeys(["loss_weight", "sample_weight"], LOSS),
        **dict.fromkeys(["reasoning", "reasoning_content", "thinking"], THOUGHTS),
        **dict.fromkeys(["conversations", "conversation"],
                        "write messages, with role and content in each turn")},
    "of a message": {
        **OF_BOTH, **dict.fromkeys(["tool_call_id", "tool_plan"], TOOLS), "citations": DOCUMENTS,
        **dict.fromkeys(["reasoning", "reasoning_content", "thinking"], THOUGHTS),
        **dict.fromkeys(["loss", "loss_weight", "trainable", "training", "mask", "masked", "is_masked",
                         "do_train", "train_on", "ignore", "supervise"], LOSS),
        **dict.fromkeys(["prefix", "partial"], CONTINUED), "refusal": "write it as content"},
}
READ = {*KNOWN, *CARRIED, *REFUSED["of a row"]} - set(CRITIQUES)


def check_columns(columns):
    """ValueError unless columns, {our key: theirs}, renames keys that are read here, each once."""
    for ours in columns or ():
        if ours not in KNOWN:
            raise ValueError(f"--columns {ours}={columns[ours]}: {ours!r} is no key that is read here; "
                             f"known: {' '.join(KNOWN)}")
    if columns and len(set(columns.values())) < len(columns):
        raise ValueError(f"--columns {' '.join(map('='.join, columns.items()))}: a key has two names; "
                         "give it one")


def renamed(row, columns, where):
    """The row with its keys renamed by columns, {our key: theirs}. A whole number becomes a text.

    A row that has our key already, and not theirs, is left as it is.
    """
    theirs = set(columns.values())
    made = {key: value for key, value in row.items() if key not in theirs}
    for ours, key in columns.items():
        if key not in row and row.get(ours) is not None:
            continue
        if key not in row:
            raise ValueError(f"{where}: no key {key!r}, which --columns {ours}={key} names; "
                             f"it has {' '.join(sorted(row))[:200]}")
        if made.get(ours) is not None:
            raise ValueError(f"{where}: both {ours!r} and {key!r}, which --columns {ours}={key} would rename "
                             "to it; leave one")
        made[ours] = str(row[key]) if type(row[key]) is int and ours in SHAPES else row[key]
    if columns.get("prompt", columns.get("inputs")) == "instruction" and row.get("input"):
        raise ValueError(f"{where}: 'input' is part of what 'instruction' asks; write both into one key")
    return made


def is_empty(value):
    """True for the values that columns without data have: null, false, "", [] and {}."""
    return value is None or value is False or value == "" or value == [] or value == {}


def check_keys(row, where, unknown):
    """ValueError at a key of the row or of its messages that is in REFUSED and not empty.

    unknown: {key of a message that nothing knows: (count, first place)}; this row's are added to it.
    """
    refuse_keys(row, "of a row", "", where)
    for key in SHAPES:
        messages = row[key] if isinstance(row.get(key), list) else ()
        for i, message in enumerate(messages):
            if not isinstance(message, dict):
                continue
            refuse_keys(message, "of a message", f"{key}[{i}].", where)
            if "content" not in message:
                continue
            for name in message.keys() - OF_MESSAGES - REFUSED["of a message"].keys():
                count, first = unknown.get(name, (0, where))
                unknown[name] = count + 1, first


class NotRead:
    """Checks the keys of rows (check_keys), and counts those that nothing knows. also: keys that are read.
    columns: as in `renamed`; those that no row has are told too."""

    def __init__(self, also=(), columns=None):
        self.known, self.missing = READ | set(also), dict(columns or {})
        self.of_messages, self.of_rows = {}, {}         # {key: (count, first place)}

    def has_columns(self, row):
        """Note which of theirs in the columns a row has, before it is renamed."""
        self.missing = {ours: theirs for ours, theirs in self.missing.items() if theirs not in row}

    def look(self, row, where):
        check_keys(row, where, self.of_messages)
        # A row without a shape is refused later, by what wants one.
        for key in sorted(row.keys() - self.known) if shapes_in(row) else ():
            if not is_empty(row[key]):
                count, first = self.of_rows.get(key, (0, where))
                self.of_rows[key] = count + 1, first

    def lines(self):
        """[a text that names the keys of messages, one of rows, one for each column that no row has]."""
        texts = []
        for kind, found in (("of messages ", self.of_messages), ("", self.of_rows)):
            names = [f"{name!r} ({count} times, the first: {first})"
                     for name, (count, first) in found.items()]
            texts += [f"keys {kind}that are not read: {', '.join(names[:8])}"] if names else []
        return texts + [f"--columns {ours}={theirs}: no row has the key {theirs!r}; {ours!r} is read as it is"
                        for ours, theirs in self.missing.items()]


def shapes_in(row):
    """The keys of SHAPES that a row has and that are not empty."""
    return {key for key in row.keys() & SHAPES if not is_empty(row[key])}


def refuse_keys(found, kind, place, where):
    """ValueError at a key of `found` that is in REFUSED[kind] and not empty. place: of `found` in its row."""
    for key in found.keys() & REFUSED[kind].keys():
        reason = REFUSED[kind][key]
        # A parquet file may hold JSON as a text.
        empty = is_empty(found[key]) or found[key] in ("[]", "{}", "null")
        if not empty or (found[key] is False and reason == LOSS):
            raise ValueError(f"{where}: {place + key!r} cannot be honoured: {reason}; or remove the key")
