"""A conversation in the terminal: answers appear as they are generated, turns are kept; two models answer side by side.

Two models share the questions, but each remembers its own answers only. On a terminal their answers grow in two columns; elsewhere they
follow each other. A known gap: a terminal that reorders right-to-left lines (Arabic, Hebrew, Persian) may swap the columns.
"""

import shutil
import sys
import time
import unicodedata
from functools import cache
from itertools import zip_longest

from .command import SHOWN, printable
from .files import bad_text, jsonl, write_new
from .languages import LANGUAGES, language_code
from .sampling import stream

HELP = """\
/reset             forget the turns
/system TEXT       set the system turn and start anew; without TEXT: remove it
/language CODE     answer in that language; without CODE: in any
/save FILE.jsonl   write the conversation, one {"messages": [...]} a model, to train on
/help  /quit       this list; leave, as Ctrl-D does. Ctrl-C stops an answer."""

MARKS = {None: "", "stop": "", "length": " [cut: no more tokens]", "interrupted": " [stopped]"}


# ---- what is said ------------------------------------------------------------------------------------------------------------------

class Conversation:
    """models: [(name, model, tokenizer, stop_ids), ...]; turns[i]: the messages of user and assistant as model i knows them."""

    def __init__(self, models):
        self.models, self.system, self.language = models, None, None
        self.reset()

    def reset(self):
        self.turns = [[] for _ in self.models]

    def system_turn(self):
        """[] or [the system message]: what the user set, then the wish for a language."""
        wish = self.language and f"Answer in {LANGUAGES[self.language].name}, whatever the language of the question."
        text = "\n\n".join(filter(None, [self.system, wish]))
        return [{"role": "system", "content": text}] if text else []

    def prompt(self, i, question, max_new_tokens):
        """(ids for model i, tokens that its answer may have, oldest turns dropped). Turns are dropped until there is room for max_new_tokens,
        or for a quarter of the model's positions if that is less."""
        name, model, tokenizer, _ = self.models[i]
        turns, limit = self.turns[i], model.config.max_position_embeddings
        for start in range(0, len(turns) + 1, 2):
            ids = tokenizer.encode_prompt(self.system_turn() + turns[start:] + [{"role": "user", "content": question}])
            if limit - len(ids) >= min(max_new_tokens, limit // 4):
                break
        if len(ids) >= limit:
            raise ValueError(f"{name}: the question and the system turn are {len(ids)} tokens, the model has {limit} positions; say it shorter")
        self.turns[i] = turns[start:]
        return ids, min(limit - len(ids), max_new_tokens), turns[:start]

    def save(self, path):
        """Write one row a model; returns their number. An existing file is refused."""
        language = {"language": self.language} if self.language else {}
        rows = [{"messages": [{**turn, "content": turn["content"].replace("\0", "\ufffd")}  # a NUL is no text
                              for turn in self.system_turn() + turns], "model": name, **language}
                for (name, *_), turns in zip(self.models, self.turns) if turns]
        if not rows:
            raise ValueError("nothing has been said yet")
        if fault := bad_text(rows, "the conversation"):
            raise ValueError(f"{fault}; no command here reads that, /reset and ask again")
        try:
            write_new({path: jsonl(rows)})
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
        return len(rows)


class Answer:
    """An answer as it grows. ending: None while it does, then "stop", "length" or "interrupted"."""

    def __init__(self, name, tokenizer, ids, stop_ids):
        self.name, self.text, self.ending, self.stop_ids, self.last = name, "", None, stop_ids, None
        self.pieces = tokenizer.stream(self.watch(ids))

    def watch(self, ids):
        for self.last in ids:
            yield self.last

    def grow(self):
        """Take the next token; returns what is new to see."""
        piece = next(self.pieces, None)
        if piece is None:
            self.ending = "stop" if self.last in self.stop_ids else "length"
            return MARKS[self.ending]
        self.text += piece
        return piece


def ask(conversation, question, out, max_new_tokens, **sampling):
    """Put a question to every model, show the answers, keep what was said as turns."""
    answers = []
    for i, (name, model, tokenizer, stop_ids) in enumerate(conversation.models):
        ids, room, dropped = conversation.prompt(i, question, max_new_tokens)
        if dropped:
            print(f"[{name}: its {model.config.max_position_embeddings} positions are full; forgot the oldest turns, {len(dropped) // 2}, "
                  f"from {dropped[0]['content'][:40]!r} on]", file=out)
        chosen = stream(model, ids, max_new_tokens=room, stop_ids=stop_ids, name=name, **sampling)
        answers.append(Answer(name, tokenizer, chosen, stop_ids))
    show(answers, out)
    for answer, turns in zip(answers, conversation.turns):
        if answer.text.strip():
            ending = {} if answer.ending == "stop" else {"finish_reason": answer.ending}
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text, **ending}]
        else:
            print(f"[{answer.name}: an empty answer; the question is not kept]", file=out)


# ---- what is seen ------------------------------------------------------------------------------------------------------------------

def show(answers, out):
    """Let the answers grow token by token, and show them. Ctrl-C ends them all."""
    if len(answers) == 2 and out.isatty() and shutil.get_terminal_size().columns >= 24:
        return show_side_by_side(answers, out)
    for answer in answers:
        if len(answers) > 1:
            print(f"--- {answer.name}", file=out)
        try:
            while answer.ending is None:
                print(answer.grow().translate(SHOWN), end="", file=out, flush=True)
        except KeyboardInterrupt:
            interrupt(answers)
        print(MARKS["interrupted"] if answer.ending == "interrupted" else "", file=out, flush=True)


def interrupt(answers):
    for answer in answers:
        answer.ending = answer.ending or "interrupted"


def show_side_by_side(answers, out):
    """Two columns, each half of the terminal. A row that neither answer will change is printed for good, the rows below it are redrawn."""
    size = shutil.get_terminal_size()
    columns = (size.columns - 3) // 2
    for_good, below, due, over = 0, 0, 0.0, False       # rows printed for good, rows under them on the screen, when to redraw (seconds)
    out.write(pad(answers[0].name[:columns], columns) + " | " + answers[1].name[:columns] + "\n")
    while not over:
        try:
            for answer in answers:
                if answer.ending is None:
                    answer.grow()
            over = all(answer.ending for answer in answers)
            if not over and time.monotonic() < due:
                continue
            texts = [wrap((answer.text + MARKS[answer.ending]).translate(SHOWN), columns) for answer in answers]
            rows = [pad(left, columns) + " | " + right for left, right in zip_longest(*texts, fillvalue="")]
            final = min([len(rows)] + [len(text) - 1 for answer, text in zip(answers, texts) if answer.ending is None])
            last = min(len(rows), final + size.lines - 1)       # a row that has left the screen cannot be redrawn
            out.write((f"\x1b[{below}A" if below else "") + "\r\x1b[J" + "".join(row + "\n" for row in rows[for_good:last]))
            out.flush()
            for_good, below, due = final, last - final, time.monotonic() + 0.05
        except KeyboardInterrupt:
            interrupt(answers)
            over = False                                        # draw once more, with the mark


@cache
def columns_of(character):
    """Terminal columns: 2 for wide characters (Chinese, Japanese, Korean, emoji), 0 for marks that sit on the one before."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def pad(text, columns):
    return text + " " * (columns - sum(map(columns_of, text)))


def wrap(text, columns):
    """Rows of at most `columns` terminal columns, broken at a space where there is one. More text changes only the last row."""
    rows = []
    for line in text.split("\n"):
        row, used = "", 0
        for character in line:
            if used + columns_of(character) > columns:
                head, _, tail = (row, "", "") if character == " " else row.rpartition(" ")
                head, row = (head, tail) if head.strip() else (row, "")
                rows.append(head)
                used = sum(map(columns_of, row))
                if character == " ":
                    continue
            row, used = row + character, used + columns_of(character)
        rows.append(row)
    return rows


# ---- what is typed -----------------------------------------------------------------------------------------------------------------

def command(conversation, line):
    """Do what a line that starts with / says; returns the line to print, None to leave. A mistake is a ValueError."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/quit":
        return None
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "[the turns are forgotten]"
    if name == "/system":
        conversation.system = argument or None
        conversation.reset()
        return "[a new conversation, " + ("with this system turn]" if argument else "without system turn]")
    if name == "/language":
        code = language_code(argument)
        if argument and code not in LANGUAGES:
            raise ValueError(f"unknown language {argument!r}; known: {' '.join(LANGUAGES)}")
        conversation.language = code
        return f"[answers in {LANGUAGES[code].name}]" if code else "[answers in any language]"
    if name == "/save":
        if not argument:
            raise ValueError("/save needs a file, as in /save talk.jsonl")
        return f"[wrote {argument}: {conversation.save(argument)} row(s)]"
    raise ValueError(f"unknown command {name}; /help lists them (with a space before the / it is a question)")


def chat(models, read=input, out=None, max_new_tokens=256, seed=0, **sampling):
    """Talk until Ctrl-D or /quit. models: [(name, model, tokenizer, stop_ids), ...], one or two; read(prompt): the next line, as `input` gives it;
    sampling: temperature, top_k, top_p, min_p. Each answer has a seed of its own: seed, seed + 1, ..."""
    try:
        import readline  # noqa: F401  arrow keys and history for input(), where the system has it
    except ImportError:
        pass
    conversation, out = Conversation(models), out or sys.stdout
    print(f"{' and '.join(name for name, *_ in models)}; /help lists the commands, Ctrl-D leaves", file=out)
    while True:
        try:
            line = read("> ").encode("utf-8", "replace").decode("utf-8")        # a terminal's broken bytes become "?"
            if line.startswith("/"):
                said = command(conversation, line)
                if said is None:
                    return
                print(said, file=out)
            elif line.strip():
                ask(conversation, line.strip(), out, max_new_tokens, seed=seed, **sampling)
                seed += 1
        except ValueError as error:
            print(printable(f"[{error}]"), file=out)
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /quit leaves]", file=out)
        except EOFError:
            print(file=out)
            return
