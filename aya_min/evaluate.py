"""Who answers better, and in the right language: per language, per cluster, overall.

Follows the evaluation of Aya Expanse (pairwise win rates on m-ArenaHard, 23 languages). The judge is the
embedded world's oracle, a reward model that had no part in training, or a language model that follows a
published protocol (judges.py). Intervals resample questions, not rows (evaluate_rates.py).

    python -m aya_min.evaluate arena --answers A.jsonl --baseline B.jsonl --judge oracle --out eval.json
    python -m aya_min.evaluate arena --answers A.jsonl --baseline B.jsonl --judge RM_FOLDER --out eval.json
    python -m aya_min.evaluate arena --answers A.jsonl --baseline B.jsonl --judge MODEL_FOLDER|URL#model
        --protocol arena-hard|scores --out eval.json
    python -m aya_min.evaluate leaderboard A.jsonl B.jsonl C.jsonl --judge ... --out board.json
    python -m aya_min.evaluate languages --answers A.jsonl          # evaluate_languages.py
    python -m aya_min.evaluate quantized --model A --against B --data F.jsonl       # evaluate_quantized.py
    python -m aya_min.evaluate early-exit --model MAIN --sidenet SIDE --data F.jsonl
    python -m aya_min.evaluate outliers --model DIR --data F.jsonl  # outliers.py
    python -m aya_min.evaluate bias --reward-model RM [--prompts F.jsonl]   # evaluate_bias.py

With --protocol, what the judge says is kept beside the output (eval.verdicts.jsonl). Until then it is in
OUT.partial, from which the same command resumes.
"""

import sys
from pathlib import Path

from . import (evaluate_bias, evaluate_early_exit, evaluate_languages, evaluate_leaderboard,
               evaluate_quantized, outliers)
from .command import Parser, guarded, is_spare_rank, printable
from .config import Reading, settings_from
from .evaluate_answers import answers_to_judge, matched, with_seen_language
from .evaluate_judges import add_judge_flags, check_out, judging_of, play, scored, verdicts_path
from .evaluate_rates import compare, summarize
from .files import dumps, jsonl, read_json, write_new
from .judges import verdict_rows
from .judges_rates import compared
from .languages import LANGUAGES


# ---- the terminal's table ----------------------------------------------------------------------------------

def rate(value):
    return "-" if value is None else f"{value:.1f}"


def interval(ends):
    return "-" if ends[0] is None else "[{:.1f}, {:.1f}]".format(*ends)


def table(rows, widths):
    """Lines of columns: the first is flush left, the others right."""
    return [(f"{row[0]:{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
             ).rstrip() for row in rows]


def win_rate_table(result):
    """The terminal's table of a comparison: overall, by cluster, by language."""
    judge, a, b = result["judge"], result["answers"], result["baseline"]
    lines = [f"{a['path']} against {b['path']}, judged by the {judge}"]
    if judge.startswith("reward model"):
        lines.append("A reward model's taste is not correctness: never judge a model by the reward model "
                     "that trained it.")
    lines += [f"WARNING: {each}" for each in result.get("warnings", ())]
    labels = {"grade": "mean grade 0-3", "right_language": "right language", "length": "characters"}
    for name, label in labels.items():
        if name in a and name in b:
            lines.append(f"{label:16}{a[name]:9.2f} against {b[name]:.2f}")
    overall, by_protocol = result["overall"], "bounds" in result["overall"]

    def both(r, name, digits):
        """"3/0": three answers of A and none of B were cut."""
        sides = [side if r is overall else side.get("by_language", {}).get(name) for side in (a, b)]
        values = [side.get(digits[0]) for side in sides if side]
        return "/".join("-" if value is None else digits[1](value) for value in values) if any(
            value is not None for value in values) else ""

    columns = [("win rate", 9, lambda name, r: rate(r["win_rate"])),
               ("95% interval", 16, lambda name, r: interval(r["ci95"]))]
    if by_protocol:
        columns.append(("bounds", 16, lambda name, r: interval(r["bounds"])))
    columns += [(key, 7, lambda name, r, key=key: str(r[key])) for key in ("win", "tie", "loss")]
    columns.append(("unjudged", 10, lambda name, r: str(r["unjudged"])))
    if "right_language" in a or "right_language" in b:
        columns.append(("language %", 12, lambda name, r: both(
            r, name, ("right_language", lambda value: f"{100 * value:.0f}"))))
    if "cut" in a or "cut" in b:
        columns.append(("cut", 10, lambda name, r: both(r, name, ("cut", str))))
    rows = [["", *(title for title, _, _ in columns)]]
    for name, r in [("overall", overall), *result["by_cluster"].items(), *result["by_language"].items()]:
        title = f"{name:8}{LANGUAGES[name].name}" if name in LANGUAGES else name
        rows.append([title, *(cell(name, r) for _, _, cell in columns)])
    lines += table(rows, [32, *(width for _, width, _ in columns)])
    return printable("\n".join(lines + (protocol_lines(result) if by_protocol else [])))


def protocol_lines(result):
    """What stands below the table of a judge that follows a protocol."""
    about, weighted = result["about_judge"], result["weighted"]
    controls = [("length held equal", result["length_controlled"]),
                ("length, headers, lists, bold held equal", result["style_controlled"]),
                ("games as their labels weigh", weighted)]
    lines = ["Two games a question, in both orders; win, tie and loss count games. Bounds: if all unjudged "
             "games were lost, or won.",
             *table([*([name, rate(each["win_rate"]), interval(each["ci95"])] for name, each in controls),
                     ["  arena-hard-auto's own 90% interval", "", interval(weighted["arena_hard_ci90"])]],
                    [42, 7, 16])]
    names = {"first_wins": "decided games that the first answer wins (50: no love of a position)",
             "agrees": "questions whose two games agree", "ties": "games that are ties",
             "longer_wins": "decided questions that the longer answer wins"}
    lines += table([[f"% of {name}", rate(about[key]["percent"]), interval(about[key]["ci95"])]
                    for key, name in names.items()], [74, 7, 16])
    lines.append(f"{about['asked_again']} games were asked for once more; {about['equal_answers']} questions "
                 "with equal answers say nothing of the judge and are left out of these four")
    if "usage" in about:
        tokens = ", ".join(f"{kind} {number:,}" for kind, number in sorted(about["usage"].items()))
        models = ", ".join(f"{name} {number}" for name, number in about["models_returned"].items())
        lines.append(f"usage: {tokens}; replies of {models}")
    return lines


# ---- the arena ---------------------------------------------------------------------------------------------

def arena(args, reading):
    """Compare two files of answers, write the figures to --out, print the table."""
    about, out, paths = judging_of(args, reading), args.out, (args.answers, args.baseline)
    outputs = [out, verdicts_path(out)] if about else [out]
    for path in outputs:
        check_out(path, f"{out}.partial" if about else None)
    sides = [answers_to_judge(path, args.judge, reading, args.protocol) for path in paths]
    # refuses rows that do not match before a model is loaded
    pairs = matched(*sides, args.judge)

    def result_of(sides, judge, figures):
        summaries = [{"path": str(path)} | summarize(rows) for path, rows in zip(paths, sides)]
        return {"judge": judge, "answers": summaries[0], "baseline": summaries[1]} | figures

    def make(verdicts):
        figures = compared(verdicts) | {"protocol": about.record()}
        result = result_of([with_seen_language(rows) for rows in sides], about.name, figures)
        return {out: dumps(result, indent=1) + "\n", outputs[1]: jsonl(verdict_rows(verdicts))}
    if about:
        play(out, outputs, about, pairs, make)
    else:
        sides, key, judge = scored(sides, args.judge, reading)
        result = result_of(sides, judge, compare(*sides, key=key))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_new({out: dumps(result, indent=1) + "\n"})
    print(win_rate_table(read_json(out)), printable(f"written: {' '.join(outputs)}"), sep="\n")


COMMANDS = {"languages": evaluate_languages.main, "leaderboard": evaluate_leaderboard.main,
            "quantized": evaluate_quantized.main, "early-exit": evaluate_early_exit.main,
            "outliers": outliers.main, "bias": evaluate_bias.main}


def main(argv=None):
    given = sys.argv[1:] if argv is None else argv
    if given[:1] and given[0] in COMMANDS:
        return COMMANDS[given[0]](given[1:])
    parser = Parser(prog="aya_min.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["arena", *COMMANDS],
                        help="all but arena have flags of their own: evaluate leaderboard --help")
    parser.add_argument("--answers", required=True, help="JSONL of the model's answers")
    parser.add_argument("--baseline", required=True, help="JSONL of the answers to compare with")
    parser.add_argument("--out", required=True, help="JSON file to write the figures to; must not exist")
    add_judge_flags(parser)
    args = parser.parse_args(given)
    if not is_spare_rank():
        arena(args, settings_from(Reading, flags=vars(args)))


if __name__ == "__main__":
    guarded(main, "aya_min.evaluate")
