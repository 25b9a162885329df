"""Critiques for reward models (arXiv 2405.20850): the reward model reads prompt, answer and a critique of the
answer, in training as in scoring.

The critique follows the end of the answer's turn, and the turn's end stands a second time after it:

    prompt, answer, end of turn, a blank line, the line [critique], the critique, end of turn

So an answer has the same ids and the same log-probs, which model.RewardModel reads, with a critique as
without, and no answer can write its own critique. The last token's state reads the critique. No loss is taken
on it.
Departure: we do not know how the paper joins the texts, nor its prompts.

A model folder that was trained so has "critiques": true in its config.json. It scores no answer without a
critique, and no other reward model reads one.
"""

MARKER = "[critique]"
JOIN = f"\n\n{MARKER}\n"
OF_PAIR = ("chosen_critique", "rejected_critique")
REMEDY = "generate.py critique writes them"


# ---- what a row says ---------------------------------------------------------------------------------------

def critique_in(row, key, where):
    """The critique of a row, None without one. ValueError if it is no text, or blank."""
    text = row.get(key)
    if text is None:
        return None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {key!r} must be a text that says something of the answer; fill it, or "
                         "remove the key")
    return text


def critiques_of_pair(row, where):
    """(critique of the chosen answer, of the rejected one) of a preference pair, or (None, None)."""
    found = [critique_in(row, key, where) for key in OF_PAIR]
    if None in found and any(found):
        missing, there = (OF_PAIR[(found[0] is None) == flip] for flip in (False, True))
        raise ValueError(f"{where}: {there!r} without {missing!r}; give both answers a critique ({REMEDY}), "
                         "or neither")
    return found


def encode(tokenizer, critique):
    """The ids of a critique, which follow the end of the answer."""
    return tokenizer.encode_inner(JOIN + critique.strip()) + tokenizer.ending + tokenizer.after


# ---- what a model reads ------------------------------------------------------------------------------------

def reads_critiques(model):
    """Whether a reward model was trained with critiques."""
    return bool(model.config.critiques)


def arrange(model, items, held_out, settings):
    """Stage.arrange of reward: mark the model if its pairs have critiques. -> items, held_out as they are.

    ValueError if some pairs have critiques and others not, and for pairs without, to train a model further
    that was trained with critiques.
    """
    places = {bool(pair.chosen.critique): pair.chosen.where for pair in reversed([*items, *held_out])}
    if len(places) == 2:
        raise ValueError(f"{places[False]}: a pair without critiques, and {places[True]} has them; give them "
                         f"to every pair of --data and --eval-data ({REMEDY}), or to none")
    if reads_critiques(model) and False in places:
        raise ValueError(f"{places[False]}: a pair without critiques, and the model to train was trained "
                         f"with them; give chosen_critique and rejected_critique ({REMEDY}), or another "
                         "--model")
    if True in places:
        model.config.critiques = True
    return items, held_out


def check(model, rows, name):
    """ValueError unless all rows have a "critique" to score, if the model reads them, or else none has."""
    key, wanted = "critique", reads_critiques(model)
    for i, row in enumerate(rows):
        where = row.get("prompt_where") or f"row {i}"
        if (critique_in(row, key, where) is not None) != wanted:
            raise ValueError(f"{where}: no {key!r} beside the answer, and {name} was trained with critiques; "
                             f"{REMEDY}" if wanted else
                             f"{where}: {key!r} beside the answer, and {name} was trained without critiques; "
                             "remove the key, or give a reward model that was trained with them")


def refuse_unread(model, where):
    """ValueError for a reward model that reads critiques where nobody writes them."""
    if reads_critiques(model):
        raise ValueError(f"{where}: this reward model was trained with critiques, and nothing writes them "
                         "here; give one that was trained without")
