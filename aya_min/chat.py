"""A conversation in the terminal with one model, or with two that answer side by side.

Answers appear as they are generated, and turns are kept. Two models share the questions, but each remembers
only its own answers. A terminal shows their answers in two columns, other outputs one after the other. Known
gap: a terminal that reorders right-to-left lines (Arabic, Hebrew, Persian) may swap the columns.
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
/system TEXT       set the system turn and start a new conversation; without TEXT: no system turn
/language CODE     ask for answers in that language; without CODE: in any
/save FILE.jsonl   write the conversation as training data, one {"messages": [...]} for each model
/help  /quit       show this list; leave, as Ctrl-D does. Ctrl-C stops an answer."""

MIN_COLUMNS = 24        # of a terminal, for two answers side by side
MARKS = {None: "", "stop": "", "length": " [cut: no more tokens]", "interrupted": " [stopped]"}


# ---- what is said ------------------------------------------------------------------------------------------

class Conversation:
    """models: [(name, model, tokenizer, stop_ids), ...].

    turns[i]: the messages of user and assistant that model i remembers. system: the user's system turn.
    language: the code of the language to answer in. Both may be None.
    """

    def __init__(self, models):
        self.models = models
        self.system = None
        self.language = None
        self.reset()

    def reset(self):
        self.turns = [[] for _ in self.models]

    def system_turn(self):
        """[] or [the system message]: the user's text, then the request for a language."""
        wish = None
        if self.language:
            wish = f"Answer in {LANGUAGES[self.language].name}, whatever the language of the question."
        text = "\n\n".join(filter(None, [self.system, wish]))
        return [{"role": "system", "content": text}] if text else []

    def prompt(self, i, question, max_new_tokens):
        """(prompt ids for model i, tokens that its answer may have, turns that were dropped).

        The oldest turns are dropped until max_new_tokens positions are free, or a quarter of all positions if
        that is less. ValueError if the question does not fit without any turns.
        """
        name, model, tokenizer, _ = self.models[i]
        turns, limit = self.turns[i], model.config.max_position_embeddings
        asked = {"role": "user", "content": question}
        for start in range(0, len(turns) + 1, 2):
            ids = tokenizer.encode_prompt(self.system_turn() + turns[start:] + [asked])
            if limit - len(ids) >= min(max_new_tokens, limit // 4):
                break
        if len(ids) >= limit:
            raise ValueError(f"{name}: the question and the system turn are {len(ids)} tokens, the model "
                             f"has {limit} positions; say it shorter")
        self.turns[i] = turns[start:]
        return ids, min(limit - len(ids), max_new_tokens), turns[:start]

    def save(self, path):
        """Write one row for each model and return their number. ValueError for a file that exists."""
        language = {"language": self.language} if self.language else {}
        rows = []
        for (name, *_), turns in zip(self.models, self.turns):
            if turns:       # a model may write a NUL, which our readers refuse
                messages = [{**turn, "content": turn["content"].replace("\0", "\ufffd")}
                            for turn in self.system_turn() + turns]
                rows.append({"messages": messages, "model": name, **language})
        if not rows:
            raise ValueError("nothing has been said yet")
        if fault := bad_text(rows, "the conversation"):
            raise ValueError(f"{fault}; our commands refuse such a file: give /reset and ask again")
        try:
            write_new({path: jsonl(rows)})
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
        return len(rows)


class Answer:
    """An answer that grows token by token. ending: None, and in the end "stop", "length" or "interrupted"."""

    def __init__(self, name, tokenizer, ids, stop_ids):
        self.name = name
        self.stop_ids = stop_ids
        self.text, self.ending = "", None
        self.last = None                            # the last id
        self.pieces = tokenizer.stream(self.watch(ids))

    def watch(self, ids):
        for self.last in ids:
            yield self.last

    def grow(self):
        """Take the next token and return the text that it adds."""
        piece = next(self.pieces, None)
        if piece is None:
            self.ending = "stop" if self.last in self.stop_ids else "length"
            return MARKS[self.ending]
        self.text += piece
        return piece


def ask(conversation, question, out, max_new_tokens, **sampling):
    """Ask every model, show the answers, and keep question and answer as turns. sampling: as in `chat`."""
    answers = []
    for i, (name, model, tokenizer, stop_ids) in enumerate(conversation.models):
        ids, room, dropped = conversation.prompt(i, question, max_new_tokens)
        if dropped:
            positions = model.config.max_position_embeddings
            print(f"[{name}: its {positions} positions are full; forgot the oldest turns, "
                  f"{len(dropped) // 2}, from {dropped[0]['content'][:40]!r} on]", file=out)
        chosen = stream(model, ids, max_new_tokens=room, stop_ids=stop_ids, name=name, **sampling)
        answers.append(Answer(name, tokenizer, chosen, stop_ids))
    show(answers, out)
    for answer, turns in zip(answers, conversation.turns):
        if answer.text.strip():
            ending = {} if answer.ending == "stop" else {"finish_reason": answer.ending}
            turns += [{"role": "user", "content": question},
                      {"role": "assistant", "content": answer.text, **ending}]
        else:
            print(f"[{answer.name}: an empty answer; the question is not kept]", file=out)


# ---- what is seen ------------------------------------------------------------------------------------------

def show(answers, out):
    """Generate the answers and show them as they grow. Ctrl-C ends all of them."""
    if len(answers) == 2 and out.isatty() and shutil.get_terminal_size().columns >= MIN_COLUMNS:
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
    """Two columns, each half of the terminal. Rows that can still change are redrawn every 50 ms."""
    size = shutil.get_terminal_size()
    columns = (size.columns - 3) // 2
    num_final = 0           # rows that are printed and will not change
    num_redrawn = 0         # rows below them on the screen
    due = 0.0               # time of the next drawing, seconds
    over = False
    out.write(pad(answers[0].name[:columns], columns) + " | " + answers[1].name[:columns] + "\n")
    while not over:
        try:
            for answer in answers:
                if answer.ending is None:
                    answer.grow()
            over = all(answer.ending for answer in answers)
            if not over and time.monotonic() < due:
                continue
            texts = [wrap((answer.text + MARKS[answer.ending]).translate(SHOWN), columns)
                     for answer in answers]
            rows = [pad(left, columns) + " | " + right for left, right in zip_longest(*texts, fillvalue="")]
            growing = [len(text) - 1 for answer, text in zip(answers, texts) if answer.ending is None]
            final = min([len(rows)] + growing)
            # A row that has left the screen cannot be redrawn.
            last = min(len(rows), final + size.lines - 1)
            up = f"\x1b[{num_redrawn}A" if num_redrawn else ""
            out.write(up + "\r\x1b[J" + "".join(row + "\n" for row in rows[num_final:last]))
            out.flush()
            num_final, num_redrawn = final, last - final
            due = time.monotonic() + 0.05
        except KeyboardInterrupt:
            interrupt(answers)
            over = False                                        # draw once more, with the mark


@cache
def columns_of(character):
    """Terminal columns: 2 for wide characters (Chinese, Japanese, Korean, emoji), 0 for combining marks."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def pad(text, columns):
    return text + " " * (columns - sum(map(columns_of, text)))


def wrap(text, columns):
    """Rows of at most `columns` terminal columns, broken at a space if they hold one.

    Text that is appended later changes only the last row.
    """
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
            row += character
            used += columns_of(character)
        rows.append(row)
    return rows


# ---- what is typed -----------------------------------------------------------------------------------------

def slash_command(conversation, line):
    """Run a line that starts with /. Returns the text to print, None to leave; ValueError for a mistake."""
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
            raise ValueError("/save needs a file, for example /save talk.jsonl")
        return f"[wrote {argument}: {conversation.save(argument)} row(s)]"
    raise ValueError(f"unknown command {name}; /help lists them (with a space before the / it is a question)")


def chat(models, read=input, out=None, max_new_tokens=256, seed=0, **sampling):
    """Talk until Ctrl-D or /quit. models: one or two of (name, model, tokenizer, stop_ids).

    read(prompt): the next line, as `input` gives it. sampling: temperature, top_k, top_p, min_p. The answers
    to the first question have this seed, those to the second seed + 1, and so on.
    """
    try:
        import readline  # noqa: F401  arrow keys and history for input(), where the system has it
    except ImportError:
        pass
    conversation, out = Conversation(models), out or sys.stdout
    print(f"{' and '.join(name for name, *_ in models)}; /help lists the commands, Ctrl-D leaves", file=out)
    while True:
        try:
            # Bytes that are not UTF-8 become "?".
            line = read("> ").encode("utf-8", "replace").decode("utf-8")
            if line.startswith("/"):
                said = slash_command(conversation, line)
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
