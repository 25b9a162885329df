"""Is each answer in its row's language: line-level and word-level pass rates, after the Language Confusion
Benchmark (Marchisio et al., arXiv 2406.20052, section 3; its code: compute_metrics.py of
for-ai/language-confusion).

    LPR   of the answers with a scored line, the share whose scored lines are all in the right language
    WPR   of those, the share without a word of another language; only languages in non-Latin script have one
    LCPR  the harmonic mean of LPR and WPR

As there, lines of fewer than five words are not scored, a line whose language has a confidence of at most 0.3
is in no language (and fails), words of up to three letters do not count, and averages are means over
languages. We depart from it so:
- the language of a line comes from language_id, not from fastText's lid.176, and the row's language is
  expected: another must be EXPECTED nats likelier;
- words are counted without a segmenter: two letters are a word where a script has no spaces;
- blocks and spans of code, formulas and links are left out; blocks and formulas are counted;
- English words are not looked up in a dictionary: a word of another script counts, if in Latin script only
  one of lower-case letters (names and abbreviations are none);
- each language in non-Latin script has a WPR, not six; traditional Chinese is a language.

Every scored answer is one of: "right" (each line), "partly" (some lines: for example an answer with its
translation), "wrong" (no line). Apart from that, right answers that are "code-switched" are counted: a
line has words of another script, or a run of at least RUN words in another language (a title is one too). A
right language that reads like a translation is right: nothing here measures style.

    python -m aya_min.evaluate languages --answers A.jsonl [--out F.json]
"""

import re
import unicodedata
from collections import Counter

from .command import Parser, is_spare_rank, printable
from .config import Reading, add_flags, settings_from
from .files import check_out, dumps, write_new
from .language_id import (CLOSE, GROUP, SCRIPTS, UNSPACED, codes_of, identify, identify_words, is_in_language,
                          known, profile_of, words_of)
from .languages import LANGUAGES
from .rows import read_jsonl

MIN_WORDS = 5           # of a line that is scored
RUN = 4                 # words; fewer may be a name

FENCED = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\$[^$\n]*\\[^$\n]*\$", re.DOTALL)
SPAN = re.compile(r"`[^`\n]+`|\bhttps?://\S+|\bwww\.\S+")
COUNTS = ("num", "empty", "short", "right", "partly", "wrong", "code_switched")


def lines_of(text):
    """(the lines that are scored, how many blocks of code and formulas were left out)."""
    text, blocks = FENCED.subn("\n", text)
    text, formulas = FORMULA.subn(" ", SPAN.sub(" ", text))
    return [line for line in text.split("\n") if num_words(line) >= MIN_WORDS], blocks + formulas


def num_words(line):
    return sum(len(word) / 2 if script in UNSPACED else 1 for word, script in words_of(line))


def scripts_of(code):
    """The scripts that a language is written in."""
    return {script for script in SCRIPTS if code in codes_of(GROUP.get(script, script))[0]}


def foreign_words(line, code):
    """The words of a line in a script that the language is not written in, without names and short ones."""
    own = scripts_of(code) | {"other"}
    found = []
    for word in re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", line)):
        for part, script in words_of(word):
            is_name = script == "Latin" and (len(part) <= 3 or not word.islower())
            if script not in own and not is_name:
                found.append(part)
    return found


def has_run(line, code):
    """Whether at least RUN words one after another are in another language, which is no close neighbour."""
    same = {code, None}.union(*(pair for pair in CLOSE if code in pair))
    length = 0
    for _, seen in identify_words(line):
        length = length + 1 if seen not in same else 0
        if length == RUN:
            return True
    return False


def verdict(text, code):
    """What an answer is: {"kind", "blocks", "seen": {code or "none": lines}, "foreign", "switched"}."""
    lines, blocks = lines_of(text)
    found = {"kind": "short" if text.strip() else "empty", "blocks": blocks, "seen": Counter(),
             "foreign": False, "switched": False}
    if not lines:
        return found
    passed = [is_in_language(line, code) for line in lines]
    found["kind"] = "right" if all(passed) else "partly" if any(passed) else "wrong"
    found["seen"].update(code if right else identify(line)[0] or "none"
                         for line, right in zip(lines, passed, strict=True))
    if found["kind"] == "right":
        found["foreign"] = any(foreign_words(line, code) for line in lines)
        found["switched"] = found["foreign"] or any(has_run(line, code) for line in lines)
    return found


def rates(code, verdicts):
    """One language's counts and rates in percent; a rate without an answer to it is None."""
    kinds = Counter(found["kind"] for found in verdicts)
    right, scored = kinds["right"], kinds["right"] + kinds["partly"] + kinds["wrong"]
    seen = sum((found["seen"] for found in verdicts), Counter())
    lpr = 100 * right / scored if scored else None
    pure = right - sum(found["foreign"] for found in verdicts)
    wpr = 100 * pure / right if right and "Latin" not in scripts_of(code) else None
    lcpr = None if wpr is None else 2 * lpr * wpr / (lpr + wpr) if wpr else 0.0
    if lpr == 0 and "Latin" not in scripts_of(code):
        lcpr = 0.0                  # the limit, whatever the WPR of no answer is
    return {"num": len(verdicts), "empty": kinds["empty"], "short": kinds["short"], "right": right,
            "partly": kinds["partly"], "wrong": kinds["wrong"],
            "code_switched": sum(found["switched"] for found in verdicts),
            "blocks": sum(found["blocks"] for found in verdicts), "lines": sum(seen.values()),
            "seen": dict(sorted(seen.items())), "lpr": lpr, "wpr": wpr, "lcpr": lcpr}


def pass_rates(rows):
    """The rates of answers by language, their means over languages, and what was left out.

    rows: [(where, row), ...] with "completion", a text that may be empty. ValueError for a row without one.
    """
    of, without, unknown = {}, 0, Counter()
    for where, row in rows:
        if not isinstance(row.get("completion"), str):
            raise ValueError(f"{where}: 'completion' is missing or no text; give the answer, or name its key "
                             "with --columns completion=...")
        language = row.get("language")
        code = profile_of(language) if language else None
        if code:
            of.setdefault(code, []).append(verdict(row["completion"], code))
        else:
            without += not language
            unknown.update([language] if language else [])
    languages = {code: rates(code, of[code]) for code in known() if code in of}
    overall = {name: sum(some[name] for some in languages.values()) for name in COUNTS}
    for name in ("lpr", "wpr", "lcpr"):
        values = [some[name] for some in languages.values() if some[name] is not None]
        overall[name] = sum(values) / len(values) if values else None
    return {"overall": overall, "by_language": languages, "no_language": without,
            "no_profile": dict(sorted(unknown.items()))}


def table(path, result):
    """The terminal's table: rates in percent, then counts of answers."""
    def percent(value):
        return f"{value:7.1f}" if value is not None else f"{'-':>7}"

    titles = "".join(f"{name.replace('_', '-'):>{max(8, len(name) + 2)}}" for name in COUNTS)
    lines = [f"{path}: answers in their language",
             f"{'':30}{'LPR':>7}{'WPR':>7}{'LCPR':>7}{titles}  seen in lines"]
    for name, some in [("mean over languages", result["overall"]), *result["by_language"].items()]:
        title = f"{name:8}{LANGUAGES[name].name}" if name in LANGUAGES else name
        numbers = "".join(f"{some[key]:>{max(8, len(key) + 2)}}" for key in COUNTS)
        most = sorted(some.get("seen", {}).items(), key=lambda item: (-item[1], item[0]))[:4]
        lines.append(f"{title:30}" + "".join(percent(some[key]) for key in ("lpr", "wpr", "lcpr")) + numbers
                     + "  " + " ".join(f"{code} {n}" for code, n in most))
    if result["no_language"]:
        lines.append(f"left out: {result['no_language']} rows without a language")
    if result["no_profile"]:
        names = ", ".join(f"{code} ({n} rows)" for code, n in result["no_profile"].items())
        lines.append(f"left out: languages without a profile: {names}")
    return printable("\n".join(line.rstrip() for line in lines))


def main(argv):
    parser = Parser(prog="aya_min.evaluate languages", description="Is each answer in its row's language?")
    parser.add_argument("--answers", required=True, help="JSONL of the model's answers with their languages")
    parser.add_argument("--out", help="JSON file to write the figures to; must not exist")
    add_flags(parser, Reading, only=("columns",))
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    if args.out:
        check_out(args.out)
    rows = read_jsonl(args.answers, settings_from(Reading, flags=vars(args)))
    result = {"answers": str(args.answers)} | pass_rates(rows)
    if args.out:
        write_new({args.out: dumps(result, indent=1) + "\n"})
    print(table(args.answers, result))
