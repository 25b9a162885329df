"""Code to put into a mixture: Python's standard library, verified small programs, and markup-like pages.

    python -m aya_min.code_data --kind verified --count 5000 --out code.jsonl

"To Code, or Not To Code?" (arXiv 2408.10914) mixes four kinds of code: code of the web, synthetic Python that
was run and checked, markup, and text about code. Its data are private. In their place:

stdlib      the standard library beside the Python that runs, cut into functions or whole files. Which text it
            is depends on the version of Python. Tests, installed packages and files that the machine's own
            build wrote are left out, and so is a text that names the library's folder on this machine.
verified    functions written by rule, and calls of them (code_shapes.py). Each call was executed, and its
            result stands in the row, in an assert.
markup      pages of HTML, JSON and Markdown with nested parts, made by rule (code_shapes.py).

A row is {"text", "source": "code", "dataset_name", "id", "kind"}; one of a program also has its "calls" and
"results". The id of a part of the library is module:name:line, so that modules can be held out; that of a
program is shape:body:name, where the body is a digest without the name, so that a body can be held out.
"""

import argparse
import ast
import hashlib
import io
import random
import re
import sysconfig
import textwrap
import tokenize
from functools import cache
from itertools import accumulate
from pathlib import Path

from .code_shapes import PAGES, PROGRAMS
from .command import WHOLE, Parser, guarded, is_spare_rank, number, printable
from .files import check_out, dumps, write_new
from .tokenizer import load_tokenizer

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef
WITH_DOCSTRINGS = ast.Module, ast.ClassDef, *DEFINITIONS
CALLS = 3                       # of a verified function
LONGEST_RESULT = 60             # characters
# What a verified program may use beside its own functions.
BUILTINS = {f.__name__: f for f in (abs, all, any, bool, dict, int, len, list, max, min, range, reversed, set,
                                    sorted, str, sum, zip)}


def row_of(text, dataset, name, kind, **more):
    return {"text": text, "source": "code", "dataset_name": dataset, "id": name, "kind": kind, **more}


# ---- the standard library ----------------------------------------------------------------------------------

def library():
    return Path(sysconfig.get_path("stdlib"))


def modules(folder):
    """[(dotted name, path), ...] of the library's modules in the order of their names."""
    found = []
    for path in folder.rglob("*.py"):
        place = path.relative_to(folder)
        of_build = place.parts[0].startswith(("config-", "_sysconfigdata", "sitecustomize"))
        if not of_build and not LEFT_OUT & set(place.parts) and not place.stem.startswith("test_"):
            found.append((".".join(place.with_suffix("").parts).removesuffix(".__init__"), path))
    return sorted(found)


def functions(text, tree):
    """[(name, line, text), ...] of a module's functions and methods, moved to the left margin."""
    lines, found = lines_of(text), []
    inside = [(node.name, node) for node in tree.body if hasattr(node, "name")]
    while inside:
        name, node = inside.pop(0)
        if isinstance(node, ast.ClassDef):
            inside += [(f"{name}.{each.name}", each) for each in node.body if hasattr(each, "name")]
        elif isinstance(node, DEFINITIONS):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found.append((name, first, textwrap.dedent("".join(lines[first - 1:node.end_lineno]))))
    return found


def lines_of(text):
    """The lines as Python counts them: other than for str.splitlines, only a line feed ends one."""
    return io.StringIO(text).readlines()


def is_python(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def docstrings(tree):
    """[(the docstring's statement, whether its body has another one), ...]"""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, WITH_DOCSTRINGS)]
    return [(body[0], len(body) > 1) for body in bodies if body and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)]


def stripped(text):
    """Python's text without docstrings and comments; `pass` stands where nothing else was. Lines that had
    nothing else go too. The rest stays letter for letter."""
    lines, tree, cuts = lines_of(text), ast.parse(text), []
    starts = [0, *accumulate(map(len, lines))]

    def place(line, column):                        # of a column in UTF-8 bytes, as ast counts them
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())
    for node, others in docstrings(tree):
        begin, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        end += re.match(r"(?:[ \t]*;[ \t]*)?", text[end:]).end()
        cuts.append((begin, end, "" if others or node in tree.body else "pass"))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            begin = starts[token.start[0] - 1] + token.start[1]
            cuts.append((begin, begin + len(token.string), ""))
    for begin, end, instead in sorted(cuts, reverse=True):
        before, after = text[:begin], text[end:]
        line = before[before.rfind("\n") + 1:]
        if not instead and not line.strip() and (after[:1] == "\n" or not after):
            before, after = before[:len(before) - len(line)], after[1:]         # the whole line
        elif not instead and after[:1] in ("\n", ""):
            before = before.rstrip(" \t")
        text = before + instead + after
    return text


@cache
def pieces(folder, unit):
    """[(id, text), ...] of the library in the order of modules. unit: function or file."""
    found = []
    for module, path in modules(folder):
        text, tree = source_of(path)
        parts = [("", 1, text)] if unit == "file" or not tree else functions(text, tree)
        found += [(f"{module}:{name}:{line}" if name else module, part) for name, line, part in parts]
    return found


def source_of(path):
    """(a module's text with plain line ends and no form feeds, its tree); ("", None) for one in another
    encoding or grammar."""
    try:
        text = path.read_text(encoding="utf-8").replace("\f", "")
        return text, ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return "", None


def stdlib(seed, docstring, unit):
    """Yield the rows of the library once, in a seeded order. docstring: keep or strip. A function that a text
    at the margin keeps from being moved there is left out."""
    own_folder, found = str(library()), pieces(library(), unit)
    for name, text in random.Random(f"stdlib/{seed}").sample(found, len(found)):
        if text.strip() and own_folder not in text and is_python(text):
            text = stripped(text) if docstring == "strip" else text
            yield row_of(text, "python-stdlib", name, unit)


# ---- what is made by rule ----------------------------------------------------------------------------------

def verified(seed, docstring):
    """Yield rows of programs in which shapes take turns. No two have the same function, which its name is a
    part of; a shape that finds no other one leaves the turns."""
    rng, seen, turns, misses = random.Random(f"verified/{seed}"), set(), list(PROGRAMS), 0
    while turns:
        kind = turns[0]
        name, function, calls = PROGRAMS[kind](rng, CALLS)
        function = stripped(function) if docstring == "strip" else function
        results = run(function, calls) if function not in seen else None
        misses += 1
        if results or misses > 1000:
            turns, misses = turns[1:] + [kind] * bool(results), 0
        if results:
            seen.add(function)
            asserts = "".join(f"assert {call} == {result}\n" for call, result in zip(calls, results))
            body = hashlib.sha256(function.replace(name, "f").encode()).hexdigest()[:12]
            yield row_of(f"{function}\n{asserts}", "verified-programs", f"{kind}:{body}:{name}", kind,
                         calls=calls, results=results)


def run(function, calls):
    """[repr of each call's result] of a function of ours, really executed with BUILTINS alone. None if a
    result is too long to be read, or all are the same, as they say too little."""
    space = {"__builtins__": BUILTINS}
    exec(function, space)
    results = [repr(eval(call, space)) for call in calls]
    if max(map(len, results)) > LONGEST_RESULT or len(set(results)) == 1:
        return None
    return results


def markup(seed):
    """Rows of pages without end, of which no two are the same."""
    rng, seen, kinds = random.Random(f"markup/{seed}"), set(), list(PAGES)
    while True:
        kind = kinds[len(seen) % len(kinds)]
        if (text := PAGES[kind](rng)) not in seen:
            seen.add(text)
            yield row_of(text, "markup", f"{kind}:{len(seen)}", kind)


# ---- rows --------------------------------------------------------------------------------------------------

def rows_of(kind, seed, docstring="keep", unit="function", longest=2000):
    """Yield a kind's rows of at most `longest` characters in a seeded order; those of the library once."""
    rows = {"stdlib": lambda: stdlib(seed, docstring, unit), "verified": lambda: verified(seed, docstring),
            "markup": lambda: markup(seed)}[kind]()
    yield from (row for row in rows if len(row["text"]) <= longest)


def taken_rows(rows, count=None, tokens=None, size_of=None):
    """The first `count` rows, or the first ones that have `tokens` tokens together. size_of: row -> its
    tokens. ValueError if there are fewer."""
    drawn, total = [], 0
    for row in rows:
        drawn.append(row)
        total += size_of(row) if tokens else 1
        if total >= (tokens or count):
            return drawn
    what = "tokens" if tokens else "rows"
    raise ValueError(f"only {total} {what} are there with these flags, not {tokens or count}; ask for fewer, "
                     "or raise --max-characters")


# ---- the command -------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(prog="python -m aya_min.code_data", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", required=True, choices=["stdlib", "verified", "markup"])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--count", type=number(int, "[1, inf)"), metavar="N", help="rows to write")
    size.add_argument("--tokens", type=number(int, "[1, inf)"), metavar="N",
                      help="rows until they have so many tokens of --tokenizer")
    add("--tokenizer", metavar="MODEL", help="model folder whose tokens --tokens counts")
    add("--out", required=True, help="JSONL file to write; must not exist")
    add("--seed", type=number(int, WHOLE), default=0, metavar="N")
    add("--docstrings", choices=["keep", "strip"],
        help="strip leaves out docstrings and comments; stdlib and verified (default keep)")
    add("--unit", choices=["function", "file"], help="stdlib: what a row is (default function)")
    add("--max-characters", type=number(int, "[100, inf)"), default=2000, metavar="N",
        help="rows that are longer are left out (default 2000)")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    check(args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    rows = rows_of(args.kind, args.seed, args.docstrings or "keep", args.unit or "function",
                   args.max_characters)
    size_of = lambda row: len(tokenizer.encode(row["text"]))
    drawn = taken_rows(rows, args.count, args.tokens, size_of)
    write_new({args.out: "".join(dumps(row) + "\n" for row in drawn)})
    characters = sum(len(row["text"]) for row in drawn)
    counted = f", {sum(map(size_of, drawn))} tokens" if tokenizer else ""
    print(printable(f"{args.out}  {len(drawn)} rows of {drawn[0]['dataset_name']}, {characters} characters"
                    f"{counted}"))


def check(args):
    """Refuse flags that the kind does not read, and a place that cannot be written."""
    if bool(args.tokens) != bool(args.tokenizer):
        raise ValueError("--tokens and --tokenizer go together: tokens are counted by a model's tokenizer; "
                         "give both, or --count")
    if args.docstrings and args.kind == "markup":
        raise ValueError("--docstrings: markup has none; leave it out")
    if args.unit and args.kind != "stdlib":
        raise ValueError(f"--unit goes with --kind stdlib; {args.kind} does not read it, leave it out")
    check_out(args.out)


if __name__ == "__main__":
    guarded(main, "aya_min.code_data")
