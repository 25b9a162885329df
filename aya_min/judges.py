"""Language models as judges of two answers, by two published protocols. A judge is any function ask, so that
an endpoint, a model folder and a test's fake look alike.

    arena-hard   labels from [[A>>B]] to [[B>>A]]: arena-hard-auto, commit 196f6b8 (github.com/lmarena)
    scores       two scores of 0 to 10, the higher wins: JudgeArena, commit 1cec1c0 (github.com/OpenEuroLLM)

Every question is two games, in both orders: in game 1 the baseline stands first, in game 2 the answers. Equal
conversations are asked once, so that a model against itself is 50 and swapped sides give 100 - x whatever the
judge is. A verdict that cannot be read is asked for once more, with another seed and never greedy. Then the
game is unjudged: counted, never a loss.

Both messages are as published; both system prompts are copied from there (Apache License 2.0). We depart so:
- a label must be one of the published map, and a score within 0 to 10 (arena-hard-auto's table fails on
  [[A]]; JudgeArena reads 8.5 as 8, and the first score where we read the last);
- what was cut at its limit or by a filter has no verdict, as its last label need not be the judge's last;
- thoughts in <think> are not read, closed or not;
- a conversation is written out turn by turn where a single prompt would stand, and answers are never cut.
"""

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from . import distributed, weights
from .alike import identity
from .encoder_decoder import EncoderDecoder
from .endpoint import Endpoint
from .endpoint import ask as ask_endpoint
from .evaluate_rates import prefix_of
from .files import dumps
from .model import CohereForCausalLM
from .rows import is_cut
from .sampling import answer_rows

# ---- protocols ---------------------------------------------------------------------------------------------

# arena-hard-auto, utils/judge_utils.py, OG_ARENA_HARD_PROMPT; Apache License 2.0.
ARENA_HARD = """\
Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to \
the user prompt displayed below. You will be given assistant A's answer and assistant B's answer. Your job \
is to evaluate which assistant's answer is better.

Begin your evaluation by generating your own answer to the prompt. You must provide your answers before \
judging any answers.

When evaluating the assistants' answers, compare both assistants' answers with your answer. You must \
identify and correct any mistakes or inaccurate information.

Then consider if the assistant's answers are helpful, relevant, and concise. Helpful means the answer \
correctly responds to the prompt or follows the instructions. Note when user prompt has any ambiguity or \
more than one interpretation, it is more helpful and appropriate to ask for clarifications or more \
information from the user than providing an answer based on assumptions. Relevant means all parts of the \
response closely connect or are appropriate to what is being asked. Concise means the response is clear and \
not verbose or excessive.

Then consider the creativity and novelty of the assistant's answers when needed. Finally, identify any \
missing important information in the assistants' answers that would be beneficial to include when \
responding to the user prompt.

After providing your explanation, you must output only one of the following choices as your final verdict \
with a label:

1. Assistant A is significantly better: [[A>>B]]
2. Assistant A is slightly better: [[A>B]]
3. Tie, relatively the same: [[A=B]]
4. Assistant B is slightly better: [[B>A]]
5. Assistant B is significantly better: [[B>>A]]

Example output: "My final verdict is tie: [[A=B]]"."""

TWO_ANSWERS = """\
<|User Prompt|>
{question}

<|The Start of Assistant A's Answer|>
{a}
<|The End of Assistant A's Answer|>

<|The Start of Assistant B's Answer|>
{b}
<|The End of Assistant B's Answer|>"""

# JudgeArena, judgearena/prompts/system-prompt.txt and prompt.txt; Apache License 2.0.
SCORES = """\
You are a highly efficient assistant, who evaluates and selects the best large language model based on the \
quality of their responses to a given instruction.
You will be shown one instruction and the output of Assistant A and Assistant B and will have to decide \
which one was best.
Make sure to not over-confidently prefer one assistant or the other and also make sure to not bias your \
preference based on the ordering or on the length of the answers."""

TWO_SCORES = TWO_ANSWERS + """

# Your output

## Format description
Your output should follow this format:
```
score_A: <a number between 0 and 10 to indicate the quality of Assistant A's answer>
score_B: <a number between 0 and 10 to indicate the quality of Assistant B's answer>
```

## Your output, do not repeat the input above
```
"""

KEPT = ("completion", "finish_reason", "model", "usage")    # of an answer; a folder's has the first two
WEIGHT = 3      # how often arena-hard-auto counts a verdict of ">>"
# {label: (score of the first answer, its weight)}
LABELS = {"A>>B": (1.0, WEIGHT), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, WEIGHT)}
SPELLED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"} | {x: x for x in LABELS}
THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
# What an answer must not hold, as it would end the answer for the judge, or give the verdict itself.
MARKS = re.compile(r"<\|The (?:Start|End) of Assistant [AB]'s Answer\|>|<\|User Prompt\|>"
                   r"|\[\[[AB][<>=]{1,2}[AB]\]\]|\bscore_[AB]\s*:", re.IGNORECASE)


def read_label(text):
    """The label in the last [[...]] of a text, in its last [...] if it has none; None if that is no label."""
    text = THOUGHTS.sub("", text).upper()
    found = re.findall(r"\[\[([AB<>=]+)\]\]", text) or re.findall(r"\[([AB<>=]+)\]", text)
    return SPELLED.get(found[-1]) if found else None


def read_scores(text):
    """The label that the last two scores of a text amount to, or None without two scores of 0 to 10."""
    scores, text = [], THOUGHTS.sub("", text)
    for name in "AB":
        found = re.findall(rf"score[ _]?{name}[\"'*`: =<\n]*(-?\d+(?:\.\d+)?)", text, re.IGNORECASE)
        if not found or not 0 <= float(found[-1]) <= 10:
            return None
        scores.append(float(found[-1]))
    a, b = scores
    return "A>B" if a > b else "B>A" if a < b else "A=B"


class Protocol(NamedTuple):
    system: str
    message: str                                    # with {question}, {a} and {b}
    read: Callable                                  # text -> label or None
    max_new_tokens: int                             # as published


PROTOCOLS = {"arena-hard": Protocol(ARENA_HARD, TWO_ANSWERS, read_label, 16000),
             "scores": Protocol(SCORES, TWO_SCORES, read_scores, 32768)}


def question_text(messages):
    """The question as the judge reads it: a single prompt as it is, else turn by turn."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def conversation(protocol, row, a, b):
    """The messages that ask for a verdict on the answers a and b to a row's question."""
    about = PROTOCOLS[protocol]
    # by hand: an answer may hold {a}
    parts = {"{question}": question_text(row["prompt_messages"]), "{a}": a, "{b}": b}
    message = re.sub(r"\{question\}|\{a\}|\{b\}", lambda found: parts[found[0]], about.message)
    return [{"role": "system", "content": about.system}, {"role": "user", "content": message}]


# ---- games -------------------------------------------------------------------------------------------------

def key_of(messages):
    return hashlib.sha256(dumps(messages).encode("utf-8")).hexdigest()


def orders(protocol, a, b):
    """The conversations of the two games of a pair of rows: the baseline b first, then the answers a."""
    return (conversation(protocol, a, b["completion"], a["completion"]),
            conversation(protocol, a, a["completion"], b["completion"]))


def answers_to(asked, ask, attempt, journal):
    """{key: {"completion", "finish_reason"}} of {key: conversation}; those in the journal are not asked. A
    missing answer is not kept there, so that the next command asks for it. A collective, if `ask` is one."""
    done = {key: journal.done[f"{attempt} {key}"] for key in asked
            if journal and f"{attempt} {key}" in journal.done}
    left, whole = [key for key in asked if key not in done], False

    def keep(i, answer):
        kept = {name: answer[name] for name in KEPT if name in answer}
        if left[i] not in done:
            done[left[i]] = kept
            if journal and kept["completion"] is not None and (distributed.is_main() or not whole):
                journal.add(f"{attempt} {left[i]}", kept)
    if left:
        answers = ask([asked[key] for key in left], attempt, keep)
        whole = True                    # a rank writes what it was told meanwhile, the main one the rest
        for i, answer in enumerate(answers):
            keep(i, answer)
    return done


def is_answer(value):
    """Whether a journal's value has the shape that `judge` adds."""
    return (isinstance(value, dict) and value.keys() in (set(KEPT[:2]), set(KEPT))
            and all(isinstance(value[name], str) for name in KEPT[:2])
            and isinstance(value.get("usage", {}), dict))


def judge(rows_a, rows_b, ask, protocol, journal=None):
    """What a judge says of the answers a to the questions of the baseline's b, row by row.

    ask(conversations, attempt, keep) -> [{"completion", "finish_reason"}, ...]. attempt 1 asks once more for
    verdicts that could not be read; keep(i, answer) may be called as soon as one is there. A completion of
    None is missing, and its finish_reason says why. Returns [{"a", "b" (the rows), "games": (game 1, game
    2)}, ...]; a game is {"label" or None, "score" of the answers (1, 0.5, 0) or None, "weight", "first",
    "tries": [{"completion", "finish_reason"}, ...]}. A try of an endpoint also has "model" and "usage".
    """
    read = PROTOCOLS[protocol].read
    games = [orders(protocol, a, b) for a, b in zip(rows_a, rows_b, strict=True)]
    asked = {key_of(each): each for pair in games for each in pair}
    first = answers_to(asked, ask, 0, journal)

    def label_of(answer):
        return None if answer["completion"] is None or is_cut(answer) else read(answer["completion"])
    again = {key: each for key, each in asked.items() if label_of(first[key]) is None}
    second = answers_to(again, ask, 1, journal)

    def game(key, side):
        tries = [first[key], *([second[key]] if key in second else [])]
        label = label_of(tries[-1])
        score, weight = LABELS[label] if label else (None, None)
        if label and side == "baseline":
            score = 1 - score
        return {"first": side, "label": label, "score": score, "weight": weight, "tries": tries}
    return [{"a": a, "b": b, "games": (game(key_of(one), "baseline"), game(key_of(two), "answers"))}
            for a, b, (one, two) in zip(rows_a, rows_b, games, strict=True)]


def why_unjudged(game):
    """Why a game is unjudged: the judge's answer was cut, had no verdict, or is missing."""
    last = game["tries"][-1]
    if last["completion"] is None:
        return last["finish_reason"]
    return "cut" if is_cut(last) else "no verdict"


def used(verdicts):
    """{"models_returned": {name: replies}, "usage": {kind of tokens: number}} of an endpoint's verdicts, {}
    of other judges. What was asked once counts once."""
    tries = {id(each): each for v in verdicts for game in v["games"] for each in game["tries"]
             if "usage" in each}
    usage, models = Counter(), Counter(each["model"] for each in tries.values())
    for each in tries.values():
        usage.update(each["usage"])
    return {"models_returned": dict(models), "usage": dict(usage)} if tries else {}


def verdict_rows(verdicts, **more):
    """The verdicts as lines of a file: one a game, with all that the judge said. more: keys for all lines."""
    return [{"question_id": v["a"]["question_id"], "language": v["a"]["language"], **more,
             "game": number, "first": game["first"], "verdict": game["label"], "score": game["score"],
             "said": [each["completion"] for each in game["tries"]],
             "finish_reason": [each["finish_reason"] for each in game["tries"]]}
            for v in verdicts for number, game in enumerate(v["games"], 1)]


# ---- who is asked ------------------------------------------------------------------------------------------

class Judging(NamedTuple):
    """What the flags say about a judge that is a language model, a folder or an endpoint."""
    judge: str
    protocol: str
    endpoint: Endpoint | None
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    batch_size: int = 256
    concurrency: int = 8
    too_long: str = "refuse"
    allow_control_tokens: bool = False

    def heat(self, attempt):
        """The temperature of an attempt: a greedy judge would only say the same again."""
        return self.temperature or float(attempt)

    @property
    def name(self):
        """What records and tables call the judge."""
        who = self.endpoint.name if self.endpoint else Path(self.judge).name
        return f"{who} by the protocol {self.protocol}"

    def record(self):
        """A JSON object of what decides the verdicts, without the endpoint's key."""
        return {key: value for key, value in self._asdict().items()
                if key not in ("endpoint", "batch_size", "concurrency")} | (
            {"extra": self.endpoint.extra} if self.endpoint else {})


def number_of(messages):
    """What a game's random numbers are drawn by: they are its own, whatever was judged before a kill."""
    return int(key_of(messages)[:12], 16)


def endpoint_judge(about):
    """(what identifies the judge, (device, answered) -> ask) of an endpoint. answered: the number of verdicts
    that were there before."""
    def ready(device, answered):
        def as_kept(answer):
            missing = answer["completion"] is None
            return {"completion": answer["completion"], "usage": answer["usage"],
                    "model": "no answer" if missing else answer["model"] or "not named",
                    "finish_reason": answer["missing"] if missing else answer["finish_reason"] or "not said"}

        def ask(conversations, attempt, keep):
            nonlocal answered
            groups = distributed.patiently(lambda: distributed.is_main() and ask_endpoint(
                about.endpoint, conversations, max_new_tokens=about.max_new_tokens,
                temperature=about.heat(attempt), seed=about.seed + attempt, concurrency=about.concurrency,
                numbers=list(map(number_of, conversations)), answered=answered, progress="verdicts",
                kept=lambda i, group: keep(i, as_kept(group[0]))))[0]
            answers = [as_kept(answer) for (answer,) in groups]
            answered += sum(answer["completion"] is not None for answer in answers)
            return answers
        return ask
    endpoint = about.endpoint
    return {"judge": f"{endpoint.base_url}#{endpoint.model}", "extra": endpoint.extra}, ready


def folder_judge(about, sides):
    """(what identifies the judge, (device, answered) -> ask) of a language model's folder. sides: pairs of
    rows whose answers it shall read.

    ValueError, before any weights are read, for another kind of model or a text that it cannot read.
    """
    model, tokenizer, header = weights.load_meta(about.judge)
    if not isinstance(model, CohereForCausalLM):
        raise ValueError(f"--judge {about.judge}: {weights.ONE[type(model)]}, which follows no protocol; "
                         + ("" if isinstance(model, EncoderDecoder) else "leave --protocol out, or ")
                         + "give a language model of a decoder alone")
    if about.too_long == "cut-left":
        raise ValueError("--too-long cut-left would cut the question away from its answers; leave such games "
                         "unjudged with --too-long skip")
    room = model.config.max_position_embeddings - about.max_new_tokens
    unfit = set()
    for row_a, row_b in sides:
        for row in (row_a, row_b):
            texts = [message["content"] for message in row["prompt_messages"]] + [row["completion"]]
            name = next(filter(None, map(tokenizer.spelled, texts)), None)
            if name and not about.allow_control_tokens:
                raise ValueError(f"{prefix_of(row)}a text spells the control token {name}; give the text "
                                 "without the template, or read it as letters with --allow-control-tokens")
        for each in orders(about.protocol, row_a, row_b):
            size = len(tokenizer.encode_prompt(each))
            if size > room and about.too_long == "refuse":
                raise ValueError(f"{prefix_of(row_a)}the question with both answers has {size} tokens, the "
                                 f"judge {max(room, 0)} positions beside the {about.max_new_tokens} new ones "
                                 "of a verdict; lower --max-new-tokens (of a recipe --judge-max-new-tokens), "
                                 "or leave such games unjudged with --too-long skip")
            unfit |= {key_of(each)} if size > room else set()

    def ready(device, answered):
        model, tokenizer = weights.load(about.judge, device, getattr(torch, about.dtype))

        def ask(conversations, attempt, keep):
            fit = [i for i, each in enumerate(conversations) if key_of(each) not in unfit]
            rows = [{"prompt_messages": conversations[i], "prompt_where": f"game {i + 1}"} for i in fit]
            answers = [{"completion": None, "finish_reason": "too long"}] * len(conversations)
            groups = answer_rows(
                model, tokenizer, rows, 1, about.max_new_tokens, about.heat(attempt), about.seed + attempt,
                about.batch_size, progress="verdicts",
                numbers=[number_of(conversations[i]) for i in fit],
                on_done=lambda j, group: keep(fit[j], group[0]), name=f"--judge {about.judge}")
            for i, (answer,) in zip(fit, groups, strict=True):
                answers[i] = answer
            return answers
        return ask
    return {"judge": about.judge, "files": identity(about.judge, header)}, ready
