"""Rows of answers as judges read them, and the scores of the oracle and of reward models.

Answers are JSONL rows: the question's keys and "completion". Rows of two files are matched by ("question_id",
"language"). Ids are compared as text; a row without "question_id" is identified by its "id" or its prompt,
and a row without a language counts as "other". An answer that was cut at its limit (rows.CUT) is judged as it
is, and counted.
"""

from . import critiques, distributed
from .evaluate_rates import asked, join, prefix_of
from .files import dumps
from .language_id import identify, is_in_language, profile_of
from .model import RewardModel
from .reward import score_texts
from .rows import finish_reason, prompt_of, read_jsonl
from .weights import ONE, CohereForCausalLM, load_meta, read_config
from .world_oracle import check_question, grade

VERDICT = ["grade", "seen_language", "why", "score", "reward"]          # keys that a judge adds to a row


# ---- rows --------------------------------------------------------------------------------------------------

def answers_to_judge(path, judge, reading=None, protocol=None):
    """The rows of a JSONL file as the judge reads them, by a published protocol if one is named. Empty
    answers are judged, and counted aloud."""
    also = () if judge == "oracle" or protocol else ("critique",)       # which only reward models read
    rows = [checked(where, row, judge) for where, row in read_jsonl(path, reading, also)]
    if empty := sum(not row["completion"].strip() for row in rows):
        distributed.say(f"{empty} of {len(rows)} answers are empty; they are judged as they are", [path])
    return rows


def checked(where, row, judge):
    """The row without an earlier judge's verdict, with "question_id" (a text), "language" and "prompt_where".

    ValueError, which names file and line (where), if the judge cannot read it.
    """
    row = {key: value for key, value in row.items() if key not in VERDICT} | {"prompt_where": where}
    row["language"] = row.get("language") or "other"
    if not isinstance(row.get("completion"), str):
        raise ValueError(f"{where}: 'completion' is missing or no text; give the answer, or name its key "
                         "with --columns completion=...")
    row["finish_reason"] = finish_reason(row, where)
    if judge == "oracle":
        missing = [key for key in ("task", "args") if row.get(key) is None]
        if missing:
            raise ValueError(f"{where}: {missing[0]!r} is missing; --judge oracle grades only the embedded "
                             "world's questions, judge others with a reward model")
        try:
            check_question(row)
        except ValueError as error:
            remedy = "judge questions from elsewhere with a reward model"
            raise ValueError(f"{where}: {error}; {remedy}") from None
    else:
        question = {key: value for key, value in row.items() if key != "completion"}
        row["prompt_messages"] = prompt_of(question, where)
    row["question_id"] = question_of(where, row)
    return row


def matched(rows_a, rows_b, judge, sides=("answers", "baseline")):
    """[(a, b), ...] of `join`, whose questions are also the same for the oracle if that is the judge."""
    pairs = join(rows_a, rows_b, sides)
    for a, b in pairs if judge == "oracle" else ():
        if (a["task"], a["args"]) != (b["task"], b["args"]):
            raise ValueError(f"{prefix_of(b)}question {b['question_id']!r} ({b['language']}) has another "
                             f"task or other args than in the {sides[0]}, so another right answer: generate "
                             "both files from the same prompts")
    return pairs


def question_of(where, row):
    """The id of a row's question as text: its "question_id", else its "id", else its prompt."""
    name = next((row[key] for key in ("question_id", "id") if row.get(key) is not None), None)
    if name is None and asked(row) is not None:
        return dumps(asked(row))
    if type(name) not in (str, int, float):
        raise ValueError(f"{where}: 'question_id' must be a text or a number, got {name!r}")
    return str(name)


# ---- the oracle and reward models --------------------------------------------------------------------------

def grade_answers(rows):
    """The rows with the oracle's verdict: "grade" 0-3, "seen_language", "why"."""
    graded = []
    for row in rows:
        verdict = grade(row, row["completion"])
        graded.append({**row, "grade": verdict.grade, "seen_language": verdict.language, "why": verdict.why})
    return graded


def judged_ids(tokenizer, row):
    """(prompt ids, answer ids), which a reward model reads of a row."""
    prompt = row.get("prompt_messages") or row["prompt"]
    answer = tokenizer.encode_answer(row["completion"])
    if row.get("critique") is not None:
        answer += critiques.encode(tokenizer, row["critique"])
    return tuple(tokenizer.encode_prompt(prompt)), tuple(answer)


def score_answers(model, tokenizer, sides, name="the reward model", too_long="refuse"):
    """Each side's rows with a reward model's "score", None for a row that --too-long skip leaves out.

    Answers with the same ids are scored once, on whichever side they are. Padding to another length changes
    the last bits of a score, so that equal answers in different batches would win or lose by chance.
    """
    keys = [[judged_ids(tokenizer, row) for row in rows] for rows in sides]
    different = {key: row for side, rows in zip(keys, sides) for key, row in zip(side, rows)}
    scored = score_texts(model, tokenizer, list(different.values()), name=name, too_long=too_long)
    scores = dict(zip(different, scored))
    return [[{**row, "score": scores[key]} for key, row in zip(side, rows)]
            for side, rows in zip(keys, sides)]


def check_texts(rows, folder, reading, flag="--judge", with_critiques=True, may_cut=True):
    """Refuse texts that the judge cannot score, before its weights are read. flag: that named the folder.
    with_critiques: whether such rows can bring critiques of their answers. may_cut: whether --too-long
    cut-left is a remedy.

    ValueError for a folder without a reward model, a text that spells a control token, or more tokens than
    the judge has positions, and for a critique that is missing or cannot be read.
    """
    if not issubclass(kind := read_config(folder)[1], RewardModel):
        remedy = "give a folder that the reward stage wrote"
        if flag == "--judge" and kind is CohereForCausalLM:
            remedy = "a language model judges by a published protocol, give --protocol arena-hard or scores"
        raise ValueError(f"{flag} {folder}: {ONE[kind]}, not a reward model; {remedy}")
    model, tokenizer, _ = load_meta(folder)
    if not with_critiques:
        critiques.refuse_unread(model, f"{flag} {folder}")
    critiques.check(model, rows, f"{flag} {folder}")
    room = model.config.max_position_embeddings
    for row in rows:
        texts = [message["content"] for message in row["prompt_messages"]]
        texts += [row["completion"], row.get("critique") or ""]
        name = next(filter(None, map(tokenizer.spelled, texts)), None)
        if name and not reading.allow_control_tokens:
            raise ValueError(f"{prefix_of(row)}a text spells the control token {name}; give the text without "
                             "the template, or read it as letters with --allow-control-tokens")
        size = sum(map(len, judged_ids(tokenizer, row)))
        if size > room and reading.too_long == "refuse":
            more = ", or drop the oldest tokens of their prompts with --too-long cut-left" if may_cut else ""
            raise ValueError(f"{prefix_of(row)}question and answer have {size} tokens, the judge {room} "
                             f"positions; leave such answers unjudged with --too-long skip{more}")


# ---- languages ---------------------------------------------------------------------------------------------

def with_seen_language(rows):
    """The rows with "seen_language" by the text alone (language_id.py), for judges that look at no language.

    It is the row's own language where that fits (`is_in_language`). The key is left out where nothing can be
    told: a row whose language has no profile, an answer without enough letters.
    """
    found = []
    for row in rows:
        code = profile_of(row["language"])
        fits = code is not None and is_in_language(row["completion"], code)
        seen = row["language"] if fits else identify(row["completion"])[0] if code else None
        found.append(row | ({"seen_language": seen} if seen else {}))
    return found
