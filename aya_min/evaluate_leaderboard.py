"""Many models' answers to the same prompts: who is better, overall, by cluster and by language.

Without --baseline every model meets every other, and a Bradley-Terry model (1952; as in Chatbot Arena) gives
each a strength: P(i wins against j) = sigmoid(s_i - s_j), with a tie as half a win. It is shown as the win
rate that it means against the mean of the other models, and in Elo's units (400 / ln 10 points a unit, 0 in
the middle). With --baseline every model meets the baseline only, and its win rate is counted. Intervals
resample questions.

    python -m aya_min.evaluate leaderboard A.jsonl B.jsonl C.jsonl --judge oracle --out board.json

Beside the output stand a page with heat maps (board.html) and, with --protocol, what the judge said.
"""

import math
from itertools import combinations
from pathlib import Path

import numpy as np

from .command import Parser, is_spare_rank, printable
from .config import Reading, settings_from
from .evaluate_answers import answers_to_judge, matched, with_seen_language
from .evaluate_judges import add_judge_flags, check_out, judging_of, play, scored, verdicts_path
from .evaluate_rates import averages, bootstrap_mean, by_cluster_and_language, draws
from .files import dumps, jsonl, read_json, write_new
from .judges import verdict_rows
from .judges_rates import RESAMPLES, about_judge, fit, is_judged, percent, value_of, warnings
from .languages import CLUSTERS
from .report_charts import (around, axis, chart, esc, finite, grid, heat_map, html_page, html_table,
                            interval_text, mark, number, section, track)
from .report_data import by_cluster, language

ELO = 400 / math.log(10)
NOTHING = {"win_rate": None, "ci95": [None, None], "num": 0}


# ---- figures: of games (question id, language, model i, model j, i's value in [0, 1] or None) --------------

def strengths(games, names):
    """{model: {"win_rate" against the mean of the others, "ci95", "elo", "elo_ci95", "num" (judged games),
    "unjudged"}}, by Bradley-Terry. A model without a judged game has a win_rate of None; so have all where
    judged games do not join them, as one group's strengths say nothing of another's."""
    judged = [game for game in games if game[4] is not None]
    num, unjudged = counts(judged, names), counts([game for game in games if game[4] is None], names)
    met = [i for i, name in enumerate(names) if num[name]]
    found = {name: NOTHING | {"elo": None, "elo_ci95": [None, None], "unjudged": unjudged[name]}
             for name in names}
    if len(groups_of(judged, met)) != 1:
        return {name: each | {"num": num[name]} for name, each in found.items()}
    pairs, questions = list(combinations(range(len(names)), 2)), {}
    rows = [questions.setdefault(game[0], len(questions)) for game in judged]
    columns = [pairs.index((i, j)) for _, _, i, j, _ in judged]
    played, won = np.zeros((2, len(questions), len(pairs)))
    np.add.at(played, (rows, columns), 1.0)
    np.add.at(won, (rows, columns), [game[4] for game in judged])
    features = np.zeros((len(pairs), len(names)))
    for row, (i, j) in enumerate(pairs):
        features[row, [i, j]] = 1.0, -1.0
    start = fit(features, won.sum(axis=0)[None], played.sum(axis=0)[None])
    drawn = draws(len(questions), RESAMPLES, 0, 0)                                  # (resamples, questions)
    again = fit(features, drawn @ won, drawn @ played, start[0])                    # (resamples, models)

    def shown(coefs):
        """(win rates against the others, Elo), both (..., models)."""
        chances = percent(coefs[:, :, None] - coefs[:, None, :])[:, :, met]
        others = len(met) - 1
        return (chances.sum(axis=2) - 50.0) / others, ELO * coefs
    (rates, elos), (all_rates, all_elos) = shown(start), shown(again)
    for i in met:
        found[names[i]] |= {
            "win_rate": float(rates[0, i]), "ci95": ends(all_rates[:, i]), "elo": float(elos[0, i]),
            "elo_ci95": ends(all_elos[:, i]), "num": num[names[i]]}
    return found


def groups_of(judged, met):
    """The models in met, as sets of those that judged games join, directly or through others."""
    groups = [{i} for i in met]
    for i, j in {game[2:4] for game in judged}:
        joined = [group for group in groups if group & {i, j}]
        groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return groups


def apart(games, names):
    """The warning, in a list, that judged games do not join all models that have any."""
    judged = [game for game in games if game[4] is not None]
    groups = groups_of(judged, {i for game in judged for i in game[2:4]})
    said = "; ".join(" ".join(names[i] for i in sorted(group)) for group in groups)
    return [f"no judged game joins these groups of models, so that none has a strength: {said}"] * (
        len(groups) > 1)


def ends(values):
    return [float(end) for end in np.percentile(values, [2.5, 97.5])]


def counts(games, names):
    return {name: sum(i in game[2:4] for game in games) for i, name in enumerate(names)}


def against(games, names, baseline):
    """{model: {"win_rate" against the baseline, "ci95", "num" (judged questions), "unjudged"}}."""
    found = {}
    for i, name in enumerate(names):
        if i != baseline:
            mine = [game for game in games if game[2] == i]
            judged = [game for game in mine if game[4] is not None]
            found[name] = NOTHING | {"unjudged": len(mine) - len(judged)}
            if judged:
                rate, ci95 = bootstrap_mean([100 * game[4] for game in judged], [game[0] for game in judged])
                found[name] |= {"win_rate": rate, "ci95": ci95, "num": len(judged)}
    return found


def met_pairs(games, names):
    """{model: {other: {"win_rate", "ci95", "num"}}} of every pair that met, counted, from both sides."""
    found = {}
    for i, j in sorted({game[2:4] for game in games}):
        mine = [game for game in games if game[2:4] == (i, j) and game[4] is not None]
        if mine:
            rate, (low, high) = bootstrap_mean([100 * game[4] for game in mine], [game[0] for game in mine])
            for one, other, value, ci95 in ((i, j, rate, [low, high]),
                                            (j, i, 100 - rate, [100 - high, 100 - low])):
                found.setdefault(names[one], {})[names[other]] = {"win_rate": value, "ci95": ci95,
                                                                  "num": len(mine)}
    return found


def board(games, names, baseline):
    def figures(part):
        return strengths(part, names) if baseline is None else against(part, names, baseline)
    return {"overall": figures(games), **by_cluster_and_language(games, lambda game: game[1], figures),
            "pairs": met_pairs(games, names)}


# ---- the games ---------------------------------------------------------------------------------------------

def value(a, b, key):
    """1, 0.5 or 0: whether a's score is above b's; None if one has none."""
    if a[key] is None or b[key] is None:
        return None
    return 1.0 if a[key] > b[key] else 0.5 if a[key] == b[key] else 0.0


def names_of(paths):
    """Each file's name without its ending. ValueError if two are the same."""
    names = [Path(path).stem for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two files of answers are named {twice[0]}; rename one, as names stand for models")
    return names


def check_files(args):
    """(paths of all models, index of the baseline or None)."""
    paths = list(args.answers)
    if args.baseline and args.baseline not in paths:
        paths.append(args.baseline)
    if len(paths) < 2:
        raise ValueError("a leaderboard needs two files of answers or more; give another")
    return paths, paths.index(args.baseline) if args.baseline else None


def leaderboard(args, reading):
    """Compare the files of answers, write figures and page, print the table."""
    about, out = judging_of(args, reading), args.out
    paths, baseline = check_files(args)
    names, page = names_of(paths), str(out).removesuffix(".json") + ".html"
    outputs = [out, page, verdicts_path(out)] if about else [out, page]
    for path in outputs:
        check_out(path, f"{out}.partial" if about else None)
    sides = [answers_to_judge(path, args.judge, reading, args.protocol) for path in paths]
    matches = list(combinations(range(len(paths)), 2)) if baseline is None else [
        (i, baseline) for i in range(len(paths)) if i != baseline]
    pairs = {(i, j): matched(sides[i], sides[j], args.judge, (paths[i], paths[j])) for i, j in matches}

    def texts_of(sides, games, judge, said=(), **more):
        models = {name: {"path": str(path)} | averages(rows) for name, path, rows in zip(names, paths, sides)}
        said = [*said, *(apart(games, names) if baseline is None else [])]
        result = {"judge": judge, "baseline": None if baseline is None else names[baseline], "models": models,
                  **board(games, names, baseline), "warnings": said, **more}
        return {out: dumps(result, indent=1) + "\n", page: page_of(result)}

    def make(verdicts):
        verdicts, rows, games = iter(verdicts), [], []
        kept = []
        for (i, j), each in pairs.items():
            mine = [next(verdicts) for _ in each]
            rows += verdict_rows(mine, answers=names[i], baseline=names[j])
            kept += mine
            games += [(v["a"]["question_id"], v["a"]["language"], i, j,
                       value_of(v) if is_judged(v) else None) for v in mine]
        found = about_judge(kept)
        said = warnings(found, {name: [row["completion"] for row in side]
                                for name, side in zip(names, sides)})
        texts = texts_of([with_seen_language(side) for side in sides], games, about.name, said,
                         about_judge=found, protocol=about.record())
        return texts | {outputs[2]: jsonl(rows)}
    if about:
        play(out, outputs, about, sum(pairs.values(), []), make)
    else:
        with_scores, key, judge = scored(sides, args.judge, reading)
        of = [{(row["question_id"], row["language"]): row for row in side} for side in with_scores]
        games = [(a["question_id"], a["language"], i, j, value(*(
            of[k][a["question_id"], a["language"]] for k in (i, j)), key)) for (i, j), each in pairs.items()
            for a, _ in each]
        texts = texts_of(with_scores, games, judge)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_new(texts)
    print(board_table(read_json(out)), printable(f"written: {' '.join(map(str, outputs))}"), sep="\n")


# ---- what is shown -----------------------------------------------------------------------------------------

def order_of(result):
    """The models from best to worst; those without a win rate come last."""
    rates = {name: each["win_rate"] for name, each in result["overall"].items()}
    return sorted(rates, key=lambda name: (rates[name] is None, -(rates[name] or 0), name))


def meaning(result):
    if result["baseline"]:
        return f"win rate against {result['baseline']}, %"
    return "win rate against the mean of the others (Bradley-Terry), %"


def board_table(result):
    """The terminal's table: the models from best to worst, then win rates by cluster and language."""
    order, with_elo = order_of(result), result["baseline"] is None
    width = max(12, *(min(24, len(name) + 2) for name in order))
    lines = [f"{meaning(result)}, judged by the {result['judge']}",
             *(f"WARNING: {each}" for each in result["warnings"]),
             f"{'':{width}}{'win rate':>9}{'95% interval':>16}{'Elo' if with_elo else '':>8}{'judged':>8}"
             f"{'unjudged':>10}{'language %':>12}{'characters':>12}"]
    for name in order:
        each, about = result["overall"][name], result["models"][name]
        share = about.get("right_language")
        lines.append(f"{name[:22]:{width}}{number(each['win_rate']):>9}{interval_text(each['ci95']):>16}"
                     f"{number(each['elo'], 0) if with_elo else '':>8}{each['num']:>8}{each['unjudged']:>10}"
                     f"{number(100 * share, 0) if finite(share) else '–':>12}{about['length']:>12.0f}")
    lines.append(f"{'':24}" + "".join(f"{name[:14]:>16}" for name in order))
    for part in ("by_cluster", "by_language"):
        for name, each in result[part].items():
            lines.append(f"{language(name):24}" + "".join(f"{number(each[model]['win_rate']):>16}"
                                                          for model in order))
    return printable("\n".join(line.rstrip() for line in lines))


def shares(figures, order):
    """The cells of a row of a heat map; outlined: the whole interval is above 50."""
    found = []
    for name in order:
        each = figures.get(name) or NOTHING
        clear = finite(each["ci95"][0]) and each["ci95"][0] > 50
        found.append((each["win_rate"] / 100 if finite(each["win_rate"]) else None, clear))
    return found


def around_half(rows):
    """The ends of the shading of a heat map's rows: as far from 50% as the cell that is farthest."""
    far = max((abs(share - 0.5) for row in rows if not isinstance(row, str) for share, _ in row[1]
               if share is not None), default=0)
    return 0.5 - max(far, 0.05), 0.5 + max(far, 0.05)


def page_of(result):
    """The whole text of the page."""
    order, overall = order_of(result), result["overall"]
    scale = around(50, [end for each in overall.values() for end in each["ci95"]])
    rows = [track(name, mark(overall[name]["win_rate"], scale, tip=interval_text(overall[name]["ci95"]),
                             interval=overall[name]["ci95"]), number(overall[name]["win_rate"]), scale, 50)
            for name in order]
    rows.append(axis(scale, 5 if scale[1] - scale[0] <= 25 else 10, "%"))
    cells = []
    for cluster, codes in by_cluster(result["by_language"], CLUSTERS):
        cells.append(cluster)
        if cluster in result["by_cluster"] and len(codes) > 1:
            cells.append((f"all of {cluster}", shares(result["by_cluster"][cluster], order)))
        cells += [(language(code), shares(result["by_language"][code], order)) for code in codes]
    outlined = "Outlined: the whole 95% interval over questions is above 50."
    pair_rows = [(name, shares(result["pairs"].get(name, {}), order)) for name in order]
    told = "The oracle says" if result["judge"] == "oracle" else "The text alone says"
    parts = [*(f'<p class="warning">{esc(each)}</p>' for each in result["warnings"]),
             section("All languages", f"{meaning(result)[0].upper()}{meaning(result)[1:]}; judged by the "
                     f"{result['judge']}. Whiskers are 95% intervals over questions.",
                     grid([chart("Win rate", rows)])),
             section("By language", f"{meaning(result)[0].upper()}{meaning(result)[1:]}. {outlined}",
                     heat_map(order, cells, around_half(cells))),
             section("Who beats whom", "Counted win rate of the row's model against the column's, %; a tie "
                     f"is half a win. {outlined}",
                     # against a baseline, the first chart has said it
                     "" if result["baseline"] else heat_map(order, pair_rows, around_half(pair_rows))),
             section("The answers", f"{told} which answers are in the right language; length in characters.",
                     models_table(result, order))]
    return html_page("aya_min · leaderboard", "\n".join(filter(None, parts)))


def models_table(result, order):
    names = order + [name for name in result["models"] if name not in order]
    rows = ""
    for name in names:
        about = result["models"][name]
        share = about.get("right_language")
        values = [number(about["num"], 0), number(100 * share if finite(share) else None),
                  number(about["length"], 0), number(about.get("cut"), 0)]
        rows += f'<tr><th scope="row" class="name">{esc(name)}</th>' + "".join(
            f"<td>{each}</td>" for each in values) + "</tr>"
    head = '<tr><th class="name">model</th><th>answers</th><th>right language %</th><th>length</th>' \
           "<th>cut</th></tr>"
    return html_table(head, rows)


def main(argv):
    parser = Parser(prog="aya_min.evaluate leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("answers", nargs="+", help="JSONL files of answers, one a model")
    parser.add_argument("--baseline", help="JSONL file of the answers that every model is compared with; "
                                           "without it every model meets every other")
    parser.add_argument("--out", required=True, help="JSON file to write the figures to; must not exist")
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    if not is_spare_rank():
        leaderboard(args, settings_from(Reading, flags=vars(args)))
