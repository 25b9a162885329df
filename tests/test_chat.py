"""The conversation in the terminal, driven line by line; the last test is a real terminal."""

import errno
import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from small import ROOT, language_model, tokenizer

from aya_min.chat import HELP, MARKS, SHOWN, Conversation, chat, columns_of, wrap
from aya_min.config import SFT
from aya_min.data import load_examples
from aya_min.files import parse_json
from aya_min.languages import LANGUAGES
from aya_min.sampling import stream
from aya_min.world import questions

STOP = tokenizer().stop_ids


def models(count=1, **changes):
    return [
        (name, language_model(seed, **changes), tokenizer(), STOP) for seed, name in enumerate("AB"[:count])
    ]


class Out(io.StringIO):
    """Standard output; Ctrl-C is pressed, once, when `interrupt` is true of all that has been written."""

    def __init__(self, interrupt=lambda written: False):
        super().__init__()
        self.interrupt = interrupt

    def write(self, text):
        super().write(text)
        if self.interrupt(self.getvalue()):
            self.interrupt = lambda written: False
            signal.raise_signal(signal.SIGINT)


def talk(lines, models, out=None, **settings):
    """What is printed when these lines are typed, one text for each line; an exception among them is what
    `input` raises."""
    out, typed, printed = out or Out(), iter([*lines, EOFError]), []

    def read(prompt):
        assert prompt == "> "
        printed.append(out.getvalue()[sum(map(len, printed)):])
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    chat(models, read, out, **{"max_new_tokens": 12, "temperature": 0, **settings})
    return printed[1:]


def expected(model, turns, system=None, max_new_tokens=12):
    """(the greedy answer to turns of user and assistant, how it ends), asked of the engine itself."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    ids = tokenizer().encode_prompt(([{"role": "system", "content": system}] if system else []) + messages)
    new = list(stream(model, ids, max_new_tokens=max_new_tokens, temperature=0, stop_ids=STOP))
    return tokenizer().decode(new), "stop" if new[-1] in STOP else "length"


def shown(answer):
    return answer[0].translate(SHOWN) + MARKS[answer[1]] + "\n"


def saved(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- turns -------------------------------------------------------------------------------------------------

def test_an_answer_is_the_models_and_the_next_one_knows_the_turns_before():
    (_, model, *_), = one = models()
    first, second = talk(["red?", "why?"], one)
    answer = expected(model, ["red?"])
    assert first == shown(answer)
    assert second == shown(expected(model, ["red?", answer[0], "why?"])) != shown(expected(model, ["why?"]))


def test_reset_forgets_the_turns():
    first, reset, again, other = talk(["red?", "/reset", "red?", "red?"], models())
    assert reset == "[the turns are forgotten]\n" and again == first != other


def test_system_sets_the_system_turn_and_starts_anew_and_without_text_removes_it():
    (_, model, *_), = one = models()
    plain, _, kind, removed, again = talk(["red?", "/system  Be kind. ", "red?", "/system", "red?"], one)
    assert kind == shown(expected(model, ["red?"], system="Be kind.")) != plain
    assert removed == "[a new conversation, without system turn]\n" and again == plain


@pytest.mark.parametrize("spelling", ["fr", "French", "fra"])
def test_a_language_is_asked_for_in_the_system_turn_and_the_turns_stay(spelling):
    (_, model, *_), = one = models()
    first, on, second, off, third = talk(["red?", f"/language {spelling}", "why?", "/language", "so?"], one)
    turns = ["red?", expected(model, ["red?"])[0], "why?"]
    wish = "Answer in French, whatever the language of the question."
    assert on == "[answers in French]\n" and second == shown(expected(model, turns, system=wish)) != shown(
        expected(model, turns)
    )
    turns += [expected(model, turns, system=wish)[0], "so?"]
    assert off == "[answers in any language]\n" and third == shown(expected(model, turns))


def test_the_wish_for_a_language_follows_the_users_system_turn():
    (_, model, *_), = one = models()
    *_, answer = talk(["/system Be kind.", "/language zh", "red?"], one)
    assert answer == shown(
        expected(
            model,
            ["red?"],
            system="Be kind.\n\nAnswer in Chinese (simplified), whatever the language of the question.",
        )
    )


@pytest.mark.parametrize("code", ["xx", "other", "tlh"])
def test_an_unknown_language_is_one_line_with_the_known_ones(code):
    (line,) = talk([f"/language {code}"], models())
    assert line == f"[unknown language {code!r}; known: {' '.join(LANGUAGES)}]\n"


def test_sampled_answers_have_seeds_of_their_own_and_the_same_conversation_again_is_the_same():
    settings = dict(temperature=1.0, top_k=50, seed=3)
    first, _, second = talk(["red?", "/reset", "red?"], models(), **settings)
    assert first != second
    assert talk(["red?", "/reset", "red?"], models(), **settings) == [
        first,
        "[the turns are forgotten]\n",
        second,
    ]


def test_two_models_answer_one_after_another_and_remember_only_their_own_answers():
    two = models(2)
    first, second = talk(["red?", "why?"], two)
    answers = [expected(model, ["red?"]) for _, model, *_ in two]
    assert first == f"--- A\n{shown(answers[0])}--- B\n{shown(answers[1])}" and answers[0] != answers[1]
    answers = [expected(model, ["red?", answer[0], "why?"]) for (_, model, *_), answer in zip(two, answers)]
    assert second == f"--- A\n{shown(answers[0])}--- B\n{shown(answers[1])}"


# ---- the model's positions ---------------------------------------------------------------------------------

def test_when_the_positions_are_full_the_oldest_turns_go_one_line_says_so_and_the_talk_goes_on(tmp_path):
    (_, model, *_), = one = models(max_position_embeddings=128)
    lines = [q["prompt"] for q in itertools.islice(questions("train", 48, 0, level="tiny"), 9)]
    printed = talk([*lines, f"/save {tmp_path}/talk.jsonl"], one)
    notes = [
        text
        for text in printed
        if text.startswith("[A: its 128 positions are full; forgot the oldest turns, ")
    ]
    assert len(notes) >= 2 and f"from {lines[0][:40]!r} on]\n" in notes[0]
    assert all(text.count("\n") <= 2 for text in printed)
    (row,) = saved(tmp_path / "talk.jsonl")
    contents = [message["content"] for message in row["messages"]]
    assert 2 <= len(contents) < 18 and contents[-2] == lines[-1]  # what is left is the latest, whole turns
    assert contents[::2] == lines[-len(contents) // 2:]
    assert printed[8].endswith(shown(expected(model, contents[:-1])))


def test_no_more_turns_are_dropped_than_an_answer_needs_and_a_very_long_one_may_take_a_quarter():
    for max_new_tokens, needed in ((12, 12), (1000, 32)):
        conversation, forgotten = Conversation(models(max_position_embeddings=128)), 0
        for q in itertools.islice(questions("train", 48, 0, level="tiny"), 12):
            before = conversation.turns[0]
            ids, room, dropped = conversation.prompt(0, q["prompt"], max_new_tokens)
            assert (
                needed <= room == min(128 - len(ids), max_new_tokens)
                and dropped + conversation.turns[0] == before
            )
            forgotten += len(dropped)
            if dropped:
                one_more = dropped[-2:] + conversation.turns[0] + [{"role": "user", "content": q["prompt"]}]
                assert len(tokenizer().encode_prompt(one_more)) + needed > 128
            conversation.turns[0] = conversation.turns[0] + [
                {"role": "user", "content": q["prompt"]},
                {"role": "assistant", "content": "red"},
            ]
        assert forgotten >= 4


def test_a_question_longer_than_the_positions_is_one_line_and_nothing_is_forgotten():
    one = models(max_position_embeddings=64)
    first, refused, second = talk(["red?", "why " * 90, "so?"], one)
    assert re.fullmatch(
        r"\[A: the question and the system turn are \d+ tokens, the model has 64 positions; say it"
        r" shorter]\n",
        refused,
    )
    assert second == talk(["red?", "so?"], one)[1]


def test_an_answer_may_use_the_positions_that_are_left():
    (_, model, *_), = one = models(max_position_embeddings=64)
    assert talk(["red?"], one, max_new_tokens=1000) == [
        shown(expected(model, ["red?"], max_new_tokens=64 - len(tokenizer().encode_prompt("red?"))))
    ]


# ---- files -------------------------------------------------------------------------------------------------

def test_a_saved_conversation_is_one_row_a_model_that_can_be_trained_on(tmp_path):
    two, path = models(2), tmp_path / "talk.jsonl"
    *_, line = talk(["/system Be kind.", "/language de", "red?", "why?", f"/save {path}"], two)
    assert line == f"[wrote {path}: 2 row(s)]\n"
    rows = saved(path)
    assert [row["model"] for row in rows] == ["A", "B"] and all(row["language"] == "de" for row in rows)
    for row, (_, model, *_) in zip(rows, two):
        system, *turns = row["messages"]
        assert system == {
            "role": "system",
            "content": "Be kind.\n\nAnswer in German, whatever the language of the question.",
        }
        assert [m["role"] for m in turns] == ["user", "assistant"] * 2 and [
            m["content"] for m in turns[::2]
        ] == ["red?", "why?"]
        assert turns[1]["content"] == expected(model, ["red?"], system["content"])[0]
        assert turns[1].get("finish_reason", "stop") == expected(model, ["red?"], system["content"])[1]
    examples = load_examples([path], tokenizer(), 512, SFT(keep_cut=True))
    for example, row in zip(examples, rows, strict=True):
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert example.ids[example.mask].tolist() == sum(map(tokenizer().encode_answer, answers), [])


def test_save_refuses_a_file_that_exists_a_folder_that_does_not_no_name_and_no_conversation(tmp_path):
    path = tmp_path / "taken.jsonl"
    path.write_text("mine\n")
    printed = talk(
        [f"/save {path}", "red?", f"/save {path}", f"/save {tmp_path}/none/talk.jsonl", "/save"], models()
    )
    assert (
        printed[0] == "[nothing has been said yet]\n"
        and printed[2] == f"[{path} exists; give a new file, nothing is overwritten]\n"
    )
    assert printed[
        3
    ] == f"[{tmp_path}/none/talk.jsonl: cannot be written (No such file or directory)]\n" and printed[
        4
    ].startswith(
        "[/save needs a file"
    )
    assert path.read_text() == "mine\n"


# ---- what is typed -----------------------------------------------------------------------------------------

def test_help_lists_every_command_quit_and_ctrl_d_leave_and_empty_lines_are_nothing():
    assert talk(["/help", "", "  "], models()) == [HELP + "\n", "", ""]
    assert all(
        name in HELP
        for name in ("/reset", "/system", "/language", "/save", "/help", "/quit", "Ctrl-C", "Ctrl-D")
    )
    assert talk(["/quit", "not read"], models()) == []


def test_an_unknown_command_is_one_line_and_a_space_before_it_makes_it_a_question():
    (_, model, *_), = one = models()
    line, answer = talk(["/usr/bin what", " /usr/bin what"], one)
    assert (
        line == "[unknown command /usr/bin; /help lists them (with a space before the / it is a question)]\n"
    )
    assert answer == shown(expected(model, ["/usr/bin what"]))


def test_bytes_that_are_no_text_become_question_marks():
    (_, model, *_), = one = models()
    assert talk(["caf\udce9"], one) == [shown(expected(model, ["caf?"]))]


def test_ctrl_c_at_the_prompt_does_not_leave():
    first, hint, second = talk(["red?", KeyboardInterrupt, "why?"], models())
    assert hint == "\n[Ctrl-D or /quit leaves]\n" and [first, second] == talk(["red?", "why?"], models())


def test_ctrl_c_stops_the_answer_and_what_was_said_stays_as_a_marked_turn(tmp_path):
    (_, model, *_), = one = models()
    ids, path = tokenizer().encode_prompt("red?"), tmp_path / "talk.jsonl"
    pieces = list(tokenizer().stream(stream(model, ids, max_new_tokens=12, temperature=0, stop_ids=STOP)))
    part = "".join(pieces[:6])
    assert part.strip() and len("".join(pieces)) > len(part)
    out = Out(lambda written: written.endswith("leaves\n" + part.translate(SHOWN)))
    first, second, _ = talk(["red?", "why?", f"/save {path}"], one, out)
    assert first == part.translate(SHOWN) + " [stopped]\n"
    kept = saved(path)[0]["messages"][1]
    assert kept["finish_reason"] == "interrupted" and kept["content"] == part.replace("\0", "\ufffd")
    assert second == shown(expected(model, ["red?", part, "why?"]))


def test_a_question_without_an_answer_is_not_kept(tmp_path):
    """An empty turn could neither be trained on nor be shown to the model."""
    silent, (_, model, *_) = language_model(), models()[0]
    silent.model.norm.weight.data.zero_()  # all logits are 0, and the first token is <PAD>
    first, line = talk(["red?", f"/save {tmp_path}/talk.jsonl"], [("A", silent, tokenizer(), STOP)])
    assert (
        first == " [cut: no more tokens]\n[A: an empty answer; the question is not kept]\n"
        and line == "[nothing has been said yet]\n"
    )
    talk(
        ["red?", f"/save {tmp_path}/talk.jsonl"],
        [("A", silent, tokenizer(), STOP), ("B", model, tokenizer(), STOP)],
    )
    assert [row["model"] for row in saved(tmp_path / "talk.jsonl")] == ["B"]


# ---- two columns -------------------------------------------------------------------------------------------

class Screen(Out):
    """A terminal: what `text` shows is what a person sees, scrolled-off lines above it included."""

    def __init__(self, height, interrupt=lambda written: False):
        super().__init__(interrupt)
        self.height = height

    def isatty(self):
        return True

    def text(self, value):
        rows, at = [""], 0
        for part in re.split(r"(\x1b\[\d*[AJ]|\n|\r)", value):
            if part == "\n":
                at += 1
                rows += [""] * (at == len(rows))
            elif part.endswith("A") and part.startswith("\x1b["):
                at -= int(part[2:-1])
                assert at >= max(
                    0, len(rows) - self.height
                ), "a row that has scrolled off the screen was to be changed"
            elif part == "\x1b[J":
                del rows[at + 1:]
                rows[at] = ""
            elif part not in ("", "\r"):
                assert "\x1b" not in part and rows[at] == ""
                rows[at] = part
        return rows


@pytest.mark.parametrize("height", [6, 40])
@pytest.mark.parametrize("count, silent", [(5, False), (120, False), (120, True)])
def test_on_a_terminal_two_answers_grow_in_two_columns(height, count, silent, monkeypatch):
    monkeypatch.setenv("COLUMNS", "43")
    monkeypatch.setenv("LINES", str(height))
    two, screen = models(2), Screen(height)
    if silent:  # one model says nothing while the other fills screens
        two[1][1].model.norm.weight.data.zero_()
    (printed,) = talk(["red?"], two, screen, max_new_tokens=count)
    heading, *rows, end = screen.text(
        printed.removesuffix("[B: an empty answer; the question is not kept]\n")
    )
    assert heading == f"{'A':20} | B" and end == ""
    texts = [wrap(shown(expected(model, ["red?"], max_new_tokens=count))[:-1], 20) for _, model, *_ in two]
    assert len(rows) == max(map(len, texts))
    for row, left, right in itertools.zip_longest(rows, *texts, fillvalue=""):
        assert row.rstrip() == (left + " " * (20 - sum(map(columns_of, left))) + " | " + right).rstrip()


def test_ctrl_c_stops_both_columns_and_both_turns_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen(24, lambda written: written.count("\x1b[J") == 3)
    printed, _ = talk(
        ["red?", f"/save {tmp_path}/talk.jsonl"],
        models(2, max_position_embeddings=10000),
        screen,
        max_new_tokens=9000,
    )
    assert "".join(screen.text(printed)).count("[stopped]") == 2
    rows = saved(tmp_path / "talk.jsonl")
    assert [row["messages"][1]["finish_reason"] for row in rows] == ["interrupted"] * 2


@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_terminal_too_narrow_for_two_columns_shows_one_answer_after_another(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    (printed,) = talk(["red?"], models(2), Screen(24))
    assert ("--- A\n" in printed) == (columns == "20")


def test_rows_break_at_spaces_and_wide_characters_take_two_columns():
    assert wrap("one two three", 8) == ["one two", "three"]
    assert wrap("one two", 7) == ["one two"] and wrap("one two", 6) == ["one", "two"]
    assert wrap("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert wrap("one\n\ntwo", 8) == ["one", "", "two"] and wrap("", 8) == [""]
    assert wrap("你好世界", 5) == ["你好", "世界"] and wrap("a你好", 4) == ["a你", "好"]
    assert wrap("e\u0301" * 4, 4) == ["e\u0301" * 4]  # an accent of its own takes no column
    assert wrap("नमस्ते दुनिया", 6) == ["नमस्ते", "दुनिया"]
    assert [columns_of(c) for c in "a你가あ🙂é\u0301\u200d"] == [1, 2, 2, 2, 2, 1, 0, 0]


@pytest.mark.parametrize("code", LANGUAGES)
def test_wrapped_rows_fit_say_everything_and_more_text_changes_only_the_last(code):
    text = " ".join(q["prompt"] for q in questions("train", 960, 0) if q["language"] == code)[:400]
    assert len(text) > 100
    for columns in (10, 33):
        rows = wrap(text, columns)
        assert all(sum(map(columns_of, row)) <= columns for row in rows)
        assert "".join(rows).replace(" ", "") == text.replace(" ", "").replace("\n", "")
        for n in range(0, len(text), 7):
            part = wrap(text[:n], columns)
            assert part[:-1] == rows[:len(part) - 1]


def test_control_characters_of_a_model_are_kept_in_the_turn_but_not_sent_to_the_terminal():
    assert "a\x1b[2Jb\rc\x07\x9b1A\td\ne".translate(SHOWN) == "a[2Jbc1A    d\ne"


# ---- a real terminal ---------------------------------------------------------------------------------------

def test_in_a_real_terminal_ctrl_c_stops_an_endless_answer_and_ctrl_d_leaves():
    script = (
        "from small import language_model, tokenizer\nfrom aya_min.chat import chat\nchat([('A',"
        " language_model(max_position_embeddings=100000), tokenizer(), [])], max_new_tokens=90000,"
        " temperature=1.0)"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": f"{ROOT}", "TERM": "dumb"},
    )
    os.close(theirs)
    seen = bytearray()

    def wait_for(what, deadline=60):
        end = time.monotonic() + deadline
        start = len(seen)
        while not what(bytes(seen[start:])):
            assert select.select([ours], [], [], max(0, end - time.monotonic()))[
                0
            ], f"the terminal shows only {bytes(seen)!r}"
            try:
                seen.extend(os.read(ours, 4096))
            except OSError as error:                # what Linux says when the other side has closed
                assert error.errno == errno.EIO
                return

    try:
        wait_for(lambda new: new.endswith(b"> "))
        os.write(ours, b"hi\n")
        wait_for(lambda new: len(new) > 40)
        os.write(ours, b"\x03")
        wait_for(lambda new: b"[stopped]" in new and new.endswith(b"> "))
        os.write(ours, b"x")
        wait_for(lambda new: new.endswith(b"x"))
        time.sleep(
            0.2
        )  # CPython's input() notices a signal between its prompt and its select() only at the next key
        os.write(ours, b"\x03")
        wait_for(lambda new: b"/quit leaves]" in new and new.endswith(b"> "))
        os.write(ours, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert b"Traceback" not in seen


def test_what_is_saved_is_text_that_our_own_reader_takes_and_half_a_character_is_refused(tmp_path):
    """A model may say a NUL, and then every command refused the file."""
    conversation = Conversation(models())
    conversation.turns[0] = [{"role": "user", "content": "red?"},
                             {"role": "assistant", "content": "a\0b\u2028", "finish_reason": "length"}]
    conversation.save(tmp_path / "talk.jsonl")
    [line] = (tmp_path / "talk.jsonl").read_bytes().split(b"\n")[:-1]
    kept = parse_json(line, "talk")["messages"][1]
    assert kept == {"role": "assistant", "content": "a\ufffdb\u2028", "finish_reason": "length"}
    conversation.turns[0][1]["content"] = "\ud800"
    with pytest.raises(ValueError, match="half a surrogate pair"):
        conversation.save(tmp_path / "other.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


@pytest.mark.parametrize("target", ["nowhere", "taken"])
def test_a_conversation_is_saved_through_no_link(target, tmp_path):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "talk.jsonl").symlink_to(tmp_path / target)
    conversation = Conversation(models())
    conversation.turns[0] = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="talk.jsonl exists"):
        conversation.save(tmp_path / "talk.jsonl")
    assert (tmp_path / "taken").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_a_model_that_is_not_finite_is_one_line_with_its_name_and_the_talk_goes_on():
    [(_, model, *rest)] = models()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    first, second = talk(["red?", "/language de"], [("nanlm", model, *rest)])
    assert first.startswith("[nanlm: the logits of new token 1 of the prompt are not finite; its parameter ")
    assert "model.norm.weight" in first
    assert "answers in German" in second


def test_mistakes_are_shown_without_control_characters():
    printed = talk(["/\x1b[31mred"], models())
    assert "\x1b" not in "".join(printed) and "unknown command /[31mred" in printed[0]
