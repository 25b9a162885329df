"""Reads from a chat template how it writes turns, by rendering conversations with it.

A template is followed if it renders every conversation of PROBES as exactly

    bos, for each turn opening[role] + text + closing[role], and, to ask for an answer, asks

Openings and closings are control tokens and fixed words, with at least one control token between two texts;
texts keep or lose their outer white space. The template may add a default system turn, and words around a
given system text. Any other template is refused. So are these, when a conversation has them: a system turn
where the template takes none or moves it, and a text with a word that the template looks for.

    Cohere (Aya, Command R)     <|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>
    Llama 3                     <|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>
    ChatML (Qwen)               <|im_start|>user\nhi<|im_end|>\n
    Gemma                       <start_of_turn>user\nhi<end_of_turn>\n  (the system text before the first hi)
    Mistral 0.3, Tekken         [INST] hi[/INST] ho</s>     [INST]hi[/INST]ho</s>

Qwen3 writes an empty thought before an answer that ends the conversation: that turn has the role "last".
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import dropwhile
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


ANSWERS = ("assistant", "last")
# How a template may strip a text, by name.
STRIPS = {"not": lambda text: text, "both sides": str.strip, "the left side": str.lstrip,
          "newlines on the left": lambda text: text.lstrip("\n"), "the right side": str.rstrip}


@dataclass(frozen=True)
class Turns:
    """The texts with which a template writes turns. Roles: user, assistant, system, and "last": the
    assistant's turn if it is the last message."""
    bos: str
    opening: dict               # {role: control tokens and words before the text}
    closing: dict               # {role: those after it}
    strips: dict                # {role: a key of STRIPS}
    asks: str                   # what asks for an answer; the rest of its opening is the answer's own
    no_system: str | None       # the default system turn's text; None: it has no such turn
    before: str                 # the template's words before a given system text
    after: str                  # and after it
    empty: bool                 # whether a system turn "" counts as given
    blank: bool                 # whether " " does
    folds: bool                 # whether the system text stands before the first user's, in that turn
    refuses: str                # why a system turn is refused, or ""
    words: frozenset            # that the template looks for in texts

    def texts(self, messages, where=""):
        """[(role, text), ...] of the turns, with each text as the template writes it. ValueError, with
        its place, for a conversation that is not followed."""
        place = where and f"{where}: "
        given = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        for message in messages if self.words else ():
            if found := next((word for word in self.words if word in message["content"]), None):
                raise ValueError(f"{place}the chat template treats a text with {found!r} in another way, "
                                 f"which is not known here: {message['content']!r:.60}; remove it from the "
                                 "text")
        turns = [(m["role"], m["content"]) for m in messages[given is not None:]]
        if turns and turns[-1][0] == "assistant":
            turns[-1] = "last", turns[-1][1]
        turns = [(role, self.text(role, text)) for role, text in turns]
        unset = given is None or (not given and not self.empty)
        if unset or (given and not given.strip() and not self.blank):
            return turns if self.no_system is None else [("system", self.no_system), *turns]
        if self.refuses:
            raise ValueError(f"{place}the chat template takes no system turn ({self.refuses}); put "
                             f"{given!r:.40} into the user's turn")
        system = self.before + self.text("system", given) + self.after
        if not self.folds:
            return [("system", system), *turns]
        return [(turns[0][0], system + turns[0][1]), *turns[1:]] if turns else []

    def text(self, role, content):
        """The content of a turn as the template writes it."""
        return STRIPS[self.strips[role]](content)

    def written(self, messages, generation_prompt=False):
        """A whole conversation as the template writes it."""
        return "".join(self.pieces(messages, generation_prompt))

    def pieces(self, messages, generation_prompt=False):
        """`written`, cut where answers begin."""
        pieces = [self.bos]
        for role, text in self.texts(messages):
            turn = self.opening[role] + text + self.closing[role]
            if role in ANSWERS:
                pieces[-1], turn = pieces[-1] + self.asks, turn.removeprefix(self.asks)
                pieces.append("")
            pieces[-1] += turn
        pieces[-1] += self.asks if generation_prompt else ""
        return pieces


@lru_cache(32)
def read_turns(source, tokens, control):
    """The Turns of a template. ValueError if they do not render the PROBES as it does.

    The error says what "it", the template, does.
    tokens: ((name, text), ...) such as bos_token. control: the names of control tokens.
    """
    template, words = Template(source), set()

    def render(messages, prompt=False):
        said = [{**m, "content": Said(m["content"], words)} for m in messages]
        given = {"messages": said, "add_generation_prompt": prompt, "tools": None, "documents": None}
        return template.render({**dict(tokens), **given})

    found = derive(render, control, dict(tokens).get("bos_token") or BOS)
    for messages, prompt in PROBES:
        if messages[0]["role"] == "system" and found.refuses:
            continue
        wanted, got = render(messages, prompt), found.written(messages, prompt)
        if wanted != got and messages[0]["role"] == "system" and found.folds:
            found = replace(found, refuses="it puts the system text into another turn than the first")
        elif wanted != got:
            at = max(0, len(commonprefix([wanted, got])) - 20)
            raise unknown(f"it writes {wanted[at:at + 60]!r}, where its turns in other conversations give "
                          f"{got[at:at + 60]!r}")
    return replace(found, words=frozenset(words))


def derive(render, control, bos):
    """The Turns that a few short conversations show."""
    first, two = render(as_messages(USER)), render(as_messages(USER, ANSWER))
    opening, closing = {}, {}
    opening["last"], closing["last"] = around(ANSWER, within(two, first))
    asks = within(render(as_messages(USER), True), first)
    opening["assistant"], rest = around(ANSWER, within(render(as_messages(USER, ANSWER, AGAIN)), first))
    closing["assistant"] = closing["last"]
    opening["user"], closing["user"] = around(AGAIN, within(rest, closing["last"]))
    if not all(opening[role].startswith(asks) for role in ANSWERS):
        raise unknown(f"it asks for an answer with {asks!r:.80}, and opens answers with "
                      f"{opening['assistant']!r:.80}")
    head = within(first, end=opening["user"] + USER + closing["user"])
    bos = bos if head.startswith(bos) else ""
    split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")
    if found := next((opening[role] for role in ANSWERS if split.search(opening[role], len(asks))), None):
        raise unknown(f"it asks for an answer with {asks!r:.80}, and opens answers with {found!r:.80}")
    system = system_turn(render, split, bos, head, opening["user"], closing["user"])
    opening["system"], closing["system"] = system.pop("opening"), system.pop("closing")
    for before, after in (("user", "assistant"), ("assistant", "user")):
        if not split.search(closing[before] + opening[after]):
            raise unknown(f"it writes {closing[before] + opening[after]!r:.80} between the texts of the "
                          f"{before} and the {after}, which holds no control token")
    if not split.match(closing["assistant"]):
        raise unknown(f"a turn of the assistant has no control token that ends it, but "
                      f"{closing['assistant']!r:.80}")
    strips = {role: strip_of(role, render, system["refuses"]) for role in opening}
    return Turns(bos, opening, closing, strips, asks, **system, words=frozenset())


def system_turn(render, split, bos, head, opening, closing):
    """The fields of Turns that a template's system turn has, and its opening and closing.

    opening, closing: of the user's turn. head: what stands before the first one, bos included, without a
    given system text.
    """
    user_turn, head = opening + USER + closing, head.removeprefix(bos)
    found = dict(opening="", closing="", before="", after="", empty=True, blank=True, folds=False, refuses="",
                 no_system=None)
    try:
        made = within(render(as_messages(USER, system=SYSTEM)), start=bos)
        empty, blank = (render(as_messages(USER, system=text)) != bos + head + user_turn
                        for text in ("", " "))
    except ValueError as error:
        if head:
            raise
        return found | dict(refuses=str(error))
    found |= dict(empty=empty, blank=blank)
    if not made.endswith(user_turn) and not head:
        before, rest = around(SYSTEM, within(made, opening, closing))
        return found | dict(before=before, after=around(USER, rest)[0], folds=True)
    before, after = around(SYSTEM, within(made, end=user_turn))
    tokens, ending = (list(filter(None, split.split(text))) for text in (before, after))
    # Words between control tokens, such as the role's name, belong to the opening, later ones to the text.
    last = max((i for i, part in enumerate(tokens) if split.fullmatch(part)), default=-1)
    opening = "".join(tokens[:last + 1])
    closing = "".join(dropwhile(lambda part: not split.fullmatch(part), ending))
    if not opening or not closing:
        raise unknown(f"a turn of the system has no control token that opens or ends it: {made!r:.80}")
    no_system = within(head, opening, closing) if head else None
    return found | dict(opening=opening, closing=closing, before=before.removeprefix(opening),
                        after=after.removesuffix(closing), no_system=no_system)


def strip_of(role, render, refuses):
    """The key of STRIPS by which a template strips the texts of a role."""
    texts, system = [USER, ANSWER, AGAIN][:2 if role == "last" else 3], None if refuses else SYSTEM
    name = {"user": USER, "assistant": ANSWER, "system": SYSTEM, "last": ANSWER}[role]
    loose = f"\n \n{name} \n "
    if role == "system" and refuses:
        return "not"
    wanted = render(as_messages(*texts, system=system))
    made = render(as_messages(*[text.replace(name, loose) for text in texts],
                              system=system and system.replace(name, loose)))
    for key, strip in STRIPS.items():
        if made == wanted.replace(name, strip(loose)):
            return key
    raise unknown(f"it changes the texts of the {role} in a way that is not known here")


def unknown(why):
    return ValueError(f"it has a turn format not known here: {why}; known are those of Aya, Command R, R7B "
                      "and A, Tiny Aya, Llama 3, ChatML (Qwen), Gemma, Mistral")


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
