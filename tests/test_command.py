"""What every command line shares: text that is text, numbers with a range, how a mistake is told."""

import math
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from aya_min import command, config

SETTINGS = [
    config.Reading,
    config.Pretrain,
    config.SFT,
    config.Reward,
    config.DPO,
    config.RL,
    config.Recipe,
]


@pytest.mark.parametrize(
    "interval, inside, outside",
    [
        ("[0, 1]", [0, 1, 0.5], [-1e-9, 1.1, math.nan, math.inf]),
        ("(0, inf)", [1e-300, 1e300], [0, -1, math.inf, 10**400]),
        ("[2, inf)", [2, 10], [1, 0, -5]),
        (command.WHOLE, [0, 2**62], [-1, 2**63, 10**400]),
    ],
)
def test_a_number_is_in_its_range_or_not(interval, inside, outside):
    assert all(command.in_range(value, interval) for value in inside)
    assert not any(command.in_range(value, interval) for value in outside)


@pytest.mark.parametrize(
    "kind, interval, words",
    [
        (int, "[1, inf)", "a whole number of at least 1"),
        (float, "(0, 1]", "a finite number above 0 and at most 1"),
        (float, "(-inf, inf)", "a finite number"),
    ],
)
def test_a_range_is_told_in_words(kind, interval, words):
    assert command.describe(kind, interval) == words


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.__name__)
def test_every_number_among_the_settings_has_a_range_that_holds_its_default(settings):
    for f in fields(settings):
        if config.kind(f) in (int, float):
            assert f.metadata["interval"], f.name
            assert f.default is None or command.in_range(f.default, f.metadata["interval"]), f.name


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.__name__)
def test_a_number_out_of_its_range_is_refused_by_name_from_flags_files_and_presets(settings, tmp_path):
    for f in fields(settings):
        if config.kind(f) in (int, float):
            low = f.metadata["interval"].split(",")[0]
            wrong = float(low[1:]) - 1
            for value in (
                config.kind(f)(wrong),
                10**400,
                "1",
                [1],
                True,
                *([math.nan, math.inf] if config.kind(f) is float else []),
            ):
                with pytest.raises(
                    ValueError, match=f"setting {f.name} \\({config.flag_of(f.name)}\\) must be"
                ):
                    config.settings_from(settings, preset={f.name: value})
            (tmp_path / "settings.json").write_text(f'{{"{f.name}": {config.kind(f)(wrong)}}}')
            with pytest.raises(ValueError, match=f"setting {f.name} "):
                config.settings_from(settings, config_file=tmp_path / "settings.json")
            parser = command.Parser(prog="x")
            config.add_flags(parser, settings)
            with pytest.raises(SystemExit):
                parser.parse_args([config.flag_of(f.name), str(wrong)])


def test_columns_come_as_pairs_from_flags_and_as_an_object_from_files():
    parser = command.Parser(prog="x")
    config.add_flags(parser, config.Reading)
    given = vars(parser.parse_args(["--columns", "prompt=question", "completion=answer"]))
    assert config.settings_from(config.Reading, flags=given).columns == {
        "prompt": "question",
        "completion": "answer",
    }
    assert config.settings_from(config.Reading, preset={"columns": {"prompt": "q"}}).columns == {
        "prompt": "q"
    }
    twice = vars(parser.parse_args(["--columns", "prompt=a", "prompt=b"]))
    with pytest.raises(ValueError, match="--columns: prompt is given twice"):
        config.settings_from(config.Reading, flags=twice)
    for wrong in (["prompt"], ["=x"], ["prompt="]):
        with pytest.raises(SystemExit):
            parser.parse_args(["--columns", *wrong])
    for wrong in ({"prompt": 1}, "prompt=q", ["prompt"]):
        with pytest.raises(ValueError):
            config.settings_from(config.Reading, preset={"columns": wrong})


PROGRAM = """
import sys
from aya_min import command
def main():
    error = {"value": ValueError("bad\\x1b[31m\\nthing"),
             "file": OSError(28, "No space left on device", "/a/b"), "key": KeyError("x"),
             "stop": KeyboardInterrupt()}[sys.argv[1]]
    raise error
command.guarded(main, "prog")
"""


@pytest.mark.parametrize(
    "what, code, last",
    [
        ("value", 2, "prog: bad[31m thing"),
        ("file", 2, "prog: /a/b: No space left on device"),
        ("stop", 130, "prog: stopped"),
        ("key", 1, f"prog: {command.OUR_FAULT}"),
    ],
)
def test_a_mistake_is_one_line_and_a_fault_of_ours_says_so_with_its_traceback(what, code, last):
    done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[-1]) == (code, last)
    assert (len(lines) == 1) == (what != "key") and ("Traceback" in done.stderr) == (what == "key")


def test_an_argument_that_is_no_utf_8_is_refused_in_one_line():
    program = (
        "from aya_min.command import Parser; p = Parser(prog='prog'); p.add_argument('--prompt');"
        " p.parse_args()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--prompt", b"a\xff"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "error: the argument 'a?' is not UTF-8 (see prog --help)\n"


def test_a_flag_of_several_values_that_is_given_twice_is_refused(capsys):
    """The second one silently dropped the files of the first."""
    for argv in (["--data", "a", "b", "--data", "c"], ["--data=a", "--seed", "1", "--data", "b"]):
        parser = command.Parser(prog="prog")
        parser.add_argument("--data", nargs="+")
        parser.add_argument("--seed", type=int)
        with pytest.raises(SystemExit):
            parser.parse_args(argv)
        assert capsys.readouterr().err.startswith("error: --data is given twice")
        assert parser.parse_args(["--data", "a", "b", "--seed", "1", "--seed", "2"]).data == ["a", "b"]


@pytest.mark.parametrize("value", ["--out=", "--model", "--data", "--judge", "name"])
def test_an_empty_text_is_refused_by_the_name_of_its_flag(value, capsys):
    """Path("") is the working folder: `--out ""` wrote there."""
    parser = command.Parser(prog="prog")
    inner = parser.add_subparsers().add_parser("do")
    inner.add_argument("name")
    inner.add_argument("--out")
    inner.add_argument("--data", nargs="+")
    inner.add_argument("--text", type=str)
    group = inner.add_mutually_exclusive_group()
    group.add_argument("--model")
    group.add_argument("--judge")
    assert parser.parse_args(["do", "x", "--text", ""]).text == ""
    given = {
        "--out=": ["x", "--out="],
        "--data": ["x", "--data", "a", ""],
        "name": [""],
    }.get(value, ["x", value, ""])
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["do", *given])
    name = value.rstrip("=")
    assert stopped.value.code == 2
    said = f"error: {name} is empty; give a value, or leave it out (see prog do --help)\n"
    assert capsys.readouterr().err == said


STREAMS = """
import os, sys
from aya_min import command
def main():
    command.Parser(prog="prog").parse_args(sys.argv[1:])
    for _ in command.progress(range(2)):
        print("message", file=sys.stderr)
    print("result")
    with open(os.environ["FILE"], "w") as file:
        assert file.fileno() > 2
        os.write(2, b"a library's warning")
command.guarded(main, "prog")
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", ">&- 2>&-"])
def test_a_command_works_with_a_closed_standard_stream(closed, tmp_path):
    """progress() asked None.isatty(); messages went to standard output, and a library's warnings would have
    gone into the first file that was opened."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, STREAMS],
        capture_output=True,
        text=True,
        env={**os.environ, "FILE": str(tmp_path / "f")},
    )
    assert done.returncode == 0
    assert done.stdout == ("" if ">&-" in closed.split() else "result\n")
    assert done.stderr == ("" if "2>&-" in closed else "message\nmessage\na library's warning")
    assert (tmp_path / "f").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("flags", ["", "--help"])
def test_a_standard_output_that_is_full_is_one_line_that_names_it(flags):
    """Python told it at exit, in two lines and with code 120, or the line named no file."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {flags} >/dev/full', sys.executable, STREAMS.replace('"message"', "0")],
        capture_output=True,
        text=True,
        env={**os.environ, "FILE": os.devnull, "PYTHONUNBUFFERED": ""},
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[-1].endswith("standard output: No space left on device"), lines
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
