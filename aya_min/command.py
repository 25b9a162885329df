"""What every command line shares, without torch: the parser, numbers with a range, how errors are reported.

A user's mistake is a ValueError or an OSError. The command prints one line on standard error, which says
what is wrong, where, and what to do, and ends with exit code 2. Any other exception is a fault of this
program: the command says so, shows the traceback and ends with exit code 1.
"""

import argparse
import math
import os
import sys
import traceback
from dataclasses import field

from tqdm import tqdm

CONTROLS = {i: None for i in (*range(32), *range(127, 160))}        # for str.translate: removed
SHOWN = CONTROLS | {ord("\n"): "\n", ord("\t"): "    "}
OUR_FAULT = "this is a fault of aya_min, not of yours; please report it with the lines above"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on standard error and exit code 2."""

    def add_argument(self, *names, **more):
        if more.get("nargs") == "+" and names[0].startswith("-"):
            more.setdefault("action", Several)
        return super().add_argument(*names, **more)

    def parse_args(self, args=None, namespace=None):
        open_streams()
        given = sys.argv[1:] if args is None else args
        for text in given:
            if not is_text(text):
                self.error(f"the argument {text.encode('utf-8', 'replace').decode()!r} is not UTF-8")
        return super().parse_args(args, namespace)

    def parse_known_args(self, args=None, namespace=None):
        """Refuses an empty text, which as a path would be the working folder. An argument that may be empty
        has type=str."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action.type is None and "" in (value if isinstance(value, list) else [value]):
                name = " ".join(action.option_strings) or action.metavar or action.dest
                self.error(f"{name} is empty; give a value, or leave it out")
        return found, rest

    def exit(self, status=0, message=None):
        try:
            flush_output()                  # of --help
        except OSError as error:
            status, message = 2, f"error: {one_line(error)}\n"
        super().exit(status, message)

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


class Several(argparse.Action):
    """Stores the values of a flag that takes several; refuses the flag's second use, which argparse would let
    replace the first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(self, "namespace", None) is namespace:
            parser.error(f"{option_string} is given twice; give all its values in one place")
        self.namespace = namespace
        setattr(namespace, self.dest, values)


def is_text(text):
    """Whether a text encodes as UTF-8 and has no NUL. Bytes of the command line that are not UTF-8 do not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


# ---- numbers with a range ----------------------------------------------------------------------------------

def in_range(value, interval):
    """Whether a number is finite and lies in an interval, written as in mathematics: "[0, 1)", "(0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    try:
        if not math.isfinite(value):
            return False
    except OverflowError:                           # an int of hundreds of digits
        return False
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


WHOLE = "[0, 9223372036854775808)"          # seeds: 63 bits


def setting(default, interval=None, help=None, **more):
    """A dataclass field with its help, and the interval of its numbers ("[0, 1)") or its choices."""
    return field(default=default, metadata={"interval": interval, "help": help, **more})


def number(kind, interval):
    """An argparse type: an int or float within an interval. Its error names flag, value and interval."""
    def read(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not in_range(value, interval):
            raise argparse.ArgumentTypeError(f"{text!r} must be {describe(kind, interval)}")
        return value
    return read


def describe(kind, interval):
    """An interval in words, for example "a finite number above 0 and at most 1"."""
    low, high = (part.strip() for part in interval[1:-1].split(","))
    bounds = [] if low == "-inf" else [f"{'of at least' if interval[0] == '[' else 'above'} {low}"]
    bounds += [] if high == "inf" else [f"{'at most' if interval[-1] == ']' else 'below'} {high}"]
    return f"a {'whole' if kind is int else 'finite'} number {' and '.join(bounds)}".strip()


# ---- how a command ends ------------------------------------------------------------------------------------

def printable(text):
    """A text without control characters, so that no model or file can steer the terminal.

    Line ends stay, a tab becomes four spaces.
    """
    return str(text).translate(SHOWN)


def shortened(value):
    """The first 60 characters of a value's repr, for a message."""
    try:
        text = repr(value)
    except ValueError:                  # Python refuses to print an int of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error):
    """The message of an error in one line. That of an OSError names its file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return printable(" ".join(text.split("\n")))


def open_streams():
    """Give a command that was started with a closed standard stream (2>&-) the null device in its place.

    print(file=None) would write messages to standard output, and the next file that is opened would get the
    stream's number, so that a library's warning went into it."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))


def flush_output():
    """Write out what standard output still holds. An OSError names it, and then the rest is dropped, since
    Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


def named(error):
    """The error itself or, after a failed print, which names no file, one that names standard output."""
    try:
        flush_output()
    except OSError as of_output:
        if isinstance(error, OSError) and not error.filename:
            return of_output
    return error


def guarded(main, name):
    """Run main() and end the process: with its exit code, 2 or 1 after an error, 130 after Ctrl-C."""
    open_streams()
    try:
        code = main()
        flush_output()
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # Python flushes standard output at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    except (ValueError, OSError) as error:
        print(f"{name}: {one_line(named(error))}", file=sys.stderr)
        code = 2
    except Exception:
        traceback.print_exc()
        print(f"{name}: {OUR_FAULT}", file=sys.stderr)
        code = 1
    sys.exit(code)


def is_spare_rank():
    """Whether torchrun started this process beside a rank 0 that does all the work of the command.

    A RANK that something else set, for example a scheduler, does not count.
    """
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise ValueError(f"RANK is {rank!r} in the environment, not a whole number; leave it to torchrun, or "
                         "unset it")
    return int(rank) > 0 and "TORCHELASTIC_RUN_ID" in os.environ


# ---- progress ----------------------------------------------------------------------------------------------

QUIET = 30          # seconds between two lines of progress if standard error is not a terminal


class Lines:
    """A file for tqdm that prints each state of the bar as a line of its own."""

    def write(self, text):
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def progress(*items, **more):
    """A tqdm bar that vanishes at its end; without a terminal, a line every QUIET seconds."""
    if sys.stderr.isatty():
        return tqdm(*items, leave=False, mininterval=1, **more)
    return tqdm(*items, file=Lines(), leave=False, mininterval=QUIET, maxinterval=2 * QUIET, delay=QUIET,
                ncols=110, ascii=True, **more)
