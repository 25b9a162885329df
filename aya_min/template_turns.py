"""Reads from a chat template how it writes turns, by rendering conversations with it.

A template is followed if it renders every conversation of PROBES as exactly

    bos, for each turn opening[role] + text + closing[role], and, to ask for an answer, opening["assistant"]

where openings and closings are control tokens and texts keep or lose their outer white space. The template
may add a default system turn, and words around a given system text. Any other template is refused.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from os.path import commonprefix

from .template import Template
from .template_expressions import Said

BOS = "<BOS_TOKEN>"
USER, ANSWER, AGAIN, SYSTEM = "Zq1", "Zq2", "Zq3", "Zq0"


def as_messages(*texts, system=None):
    """Messages: an optional system turn, then user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


_TEXTS = ["hi", "  two\n lines \n", "\n\tनमस्ते 世界 \u200b ", "4 < 5 & {{ x }} 'it's'\n", " a", "b\n\n"]
PROBES = [(as_messages(*texts, system=system), prompt)
          for texts in (_TEXTS[:1], _TEXTS[1:2], _TEXTS[:2], _TEXTS[2:5], _TEXTS[1:5], _TEXTS[::-1] * 4)
          for system in (None, "Be kind.", " Two\n\nlines\t\n", "", " \n") for prompt in (False, True)]


@dataclass(frozen=True)
class Turns:
    """The texts with which a template writes turns."""
    bos: str
    opening: dict               # {role: control tokens before the text}
    closing: dict               # {role: control tokens after it}
    strips: dict                # {role: whether the text loses its outer white space}
    no_system: str | None       # the default system turn's text; None: it has no such turn
    before: str                 # the template's words before a given system text
    after: str                  # and after it
    empty: bool                 # whether a system turn "" counts as given
    blank: bool                 # whether " " does

    def texts(self, messages):
        """[(role, text), ...] of the turns, with each text as the template writes it."""
        given = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        turns = [(m["role"], self.text(m["role"], m["content"])) for m in messages[given is not None:]]
        unset = given is None or (not given and not self.empty)
        if unset or (given and not given.strip() and not self.blank):
            return turns if self.no_system is None else [("system", self.no_system), *turns]
        return [("system", self.before + self.text("system", given) + self.after), *turns]

    def text(self, role, content):
        """The content of a turn as the template writes it."""
        return content.strip() if self.strips[role] else content

    def written(self, messages, generation_prompt=False):
        """A whole conversation as the template writes it."""
        parts = [self.opening[role] + text + self.closing[role] for role, text in self.texts(messages)]
        return self.bos + "".join(parts) + (self.opening["assistant"] if generation_prompt else "")


@lru_cache(32)
def read_turns(source, tokens, control):
    """The Turns of a template. ValueError if they do not render the PROBES as it does.

    The error says what "it", the template, does.
    tokens: ((name, text), ...) such as bos_token. control: the names of control tokens.
    """
    template = Template(source)

    def render(messages, prompt=False):
        said = [{**m, "content": Said(m["content"])} for m in messages]
        given = {"messages": said, "add_generation_prompt": prompt, "tools": None, "documents": None}
        return template.render({**dict(tokens), **given})

    found = derive(render, control)
    for messages, prompt in PROBES:
        wanted, got = render(messages, prompt), found.written(messages, prompt)
        if wanted != got:
            at = max(0, len(commonprefix([wanted, got])) - 20)
            raise unknown(f"it writes {wanted[at:at + 60]!r}, where its turns in other conversations give "
                          f"{got[at:at + 60]!r}")
    return found


def derive(render, control):
    """The Turns that a few short conversations show."""
    first, two = render(as_messages(USER)), render(as_messages(USER, ANSWER))
    opening, closing = {}, {}
    opening["assistant"], closing["assistant"] = around(ANSWER, within(two, first))
    opening["user"], closing["user"] = around(AGAIN, within(render(as_messages(USER, ANSWER, AGAIN)), two))
    asked = within(render(as_messages(USER), True), first)
    if asked != opening["assistant"]:
        raise unknown(f"it asks for an answer with {asked!r:.80}, and opens answers with "
                      f"{opening['assistant']!r:.80}")
    user_turn = opening["user"] + USER + closing["user"]
    head = within(first, end=user_turn)
    before, after = around(SYSTEM, within(render(as_messages(USER, system=SYSTEM)), end=user_turn))
    bos = BOS if head.startswith(BOS) else ""
    head, before = head.removeprefix(bos), before.removeprefix(bos)

    split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")
    opening["system"] = "".join(takewhile(control.__contains__, filter(None, split.split(before))))
    ending = [*takewhile(control.__contains__, filter(None, split.split(after)[::-1]))]
    closing["system"] = "".join(ending[::-1])
    before, after = before.removeprefix(opening["system"]), after.removesuffix(closing["system"])
    no_system = within(head, opening["system"], closing["system"]) if head else None
    for role in opening:
        for text in (opening[role], closing[role]):
            if split.sub("", text):
                raise unknown(f"it writes {text!r:.80} around a turn of the {role}, which is not control "
                              "tokens alone")
        if not opening[role] or role == "assistant" and not closing[role]:
            raise unknown(f"a turn of the {role} has no control token that opens or ends it")

    loose = render(as_messages(f"\n {USER} \n", f"\n {ANSWER} \n", system=f"\n {SYSTEM} \n"))
    strips = {role: f"\n {text} \n" not in loose
              for role, text in (("user", USER), ("assistant", ANSWER), ("system", SYSTEM))}
    empty, blank = (render(as_messages(USER, system=text)) != first for text in ("", " "))
    return Turns(bos, opening, closing, strips, no_system, before, after, empty, blank)


def unknown(why):
    return ValueError(f"it has a turn format not known here: {why}; known are those of Aya, Command R, R7B "
                      "and A, Tiny Aya")


def within(text, start="", end=""):
    """The part of a text between its start and its end. ValueError if it does not begin and end with them."""
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start + end)):
        raise unknown(f"it writes {text!r:.80}, not a text that starts with {start!r:.80} and ends with "
                      f"{end!r:.80}")
    return text[len(start):len(text) - len(end)]


def around(word, text):
    """(before, after): the parts of a text around a word, which it must contain exactly once (ValueError)."""
    before, found, after = text.partition(word)
    if not found or word in after:
        raise unknown(f"it writes {text!r:.80}, which does not hold the turn's text ({word}) once")
    return before, after
