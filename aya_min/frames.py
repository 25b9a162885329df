"""The same answer in other words: sure of itself, neutral or unsure, polite, or longer by a sentence that
says nothing. "Human feedback is not gold standard" (arXiv 2309.16349) finds that assertive phrasing hides
errors.

The frames of a language are data that a speaker can mend: "framed" in words/CODE.json, whole sentences before
or after the answer, so that no answer has to be inflected and the speaker has no gender. The oracle
(world_oracle.py) does not know them; `grade_unframed` takes off the frame first.
"""

import unicodedata

from .world import words
from .world_oracle import grade

ASSERTIVENESS = {"assertive": 1, "neutral": 0, "hedged": -1}
FRAMES = (*ASSERTIVENESS, "polite", "longer")


def framed(code, frame, text):
    """The text in a language's frame. ValueError for a language or a frame that is not there."""
    if frame not in FRAMES:
        raise ValueError(f"unknown frame {frame!r}; give one of {' '.join(FRAMES)}")
    return words(code)["framed"][frame].replace("{answer}", text)


def unframed(code, text):
    """(frame, text without it) of a text in one of the language's frames, else (None, text). The frame must
    be spelled as in the file."""
    text = unicodedata.normalize("NFC", text).strip()
    for frame in FRAMES:
        head, tail = words(code)["framed"][frame].split("{answer}")
        if text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail):
            return frame, text[len(head):len(text) - len(tail)].strip()
    return None, text


def grade_unframed(question, completion):
    """The oracle's Grade of a completion without its frame."""
    return grade(question, unframed(question["language"], completion)[1])


def assertiveness(code, text):
    """1 of an assertive text, -1 of a hedged one, 0 of any other."""
    return ASSERTIVENESS.get(unframed(code, text)[0], 0)
