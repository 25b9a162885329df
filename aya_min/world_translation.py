"""A translator from English that leaves marks, for the answers of the embedded world (world.py).

"RLHF Can Speak Many Languages" (arXiv 2407.02552) prefers answers written in a language to a weaker model's
English answers after machine translation, so that the policy is pushed away from what translation leaves.
Here the English answer is taken apart and written again in the words of the language, with up to three marks:
the sentence follows the English one in its words and their order ("translated" in words/<code>.json, which a
speaker can mend), a list is separated as in English, a word stays English. world_oracle.naturalness finds
them. An answer that is a single word can have none but the last.
"""

import random

from .world import answer_language, listed, make_question, say, words
from .world_oracle import concepts, read_items, vocabulary

# How often a mark is left where it can be. A sentence that would have none follows the English one.
SENTENCE, LIST, WORD = 0.9, 0.7, 0.15


def in_english(question):
    """The same question in English; to translate a word, from English."""
    return make_question(question["task"], question["args"], "en")


def translated(question, english, seed=0):
    """An English answer to `in_english(question)` in the question's language, as a translation reads.

    What the translator does not know stays as it is. For a question in English it is the answer itself.
    """
    language = question["language"]
    if language == "en":
        return english
    rng = random.Random(f"translated/{seed}/{language}/{question['question_id']}/{english}")
    follows, in_english_commas, stays = (rng.random() < share for share in (SENTENCE, LIST, WORD))
    task, items = read_items(in_english(question), english)
    # The word that was asked for is in another language, and is not translated once more.
    foreign = question["task"] == "translate"
    source, target = [answer_language(question)] * 2 if foreign else ("en", language)
    said = [say(target, [concepts(source)[item]])[0] if item in concepts(source) else item for item in items]
    plain = listed(language, said)
    place = rng.randrange(len(items))
    if stays and not foreign and items[place] in concepts("en") and items[place] not in vocabulary(language):
        said[place] = say("en", [concepts("en")[items[place]]])[0]
    text = english_list(language, said) if in_english_commas else listed(language, said)
    if not task:
        return text
    sentences, own = words(language)["tasks"][task], words(language)["language_names"][source]
    name = words("en")["language_names"][source] if stays and foreign else own
    marked = text != plain or name != own and "{language}" in sentences["answer"]
    kind = "translated" if follows or not marked else "answer"
    return sentences[kind].format(answer=text, language=name)


def english_list(language, items):
    """The items with the commas of English, and one before the last "and" of more than two."""
    if len(items) < 3:
        return ", ".join(items)
    last = words(language)["and"] + words(language)["word_separator"] + items[-1]
    return ", ".join([*items[:-1], last])
