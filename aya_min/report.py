"""One page of what a run recorded: RUN/report.html to look at, RUN/report.md for a README. Reads JSON files only, never a model.

Its order follows the argument of Aya Expanse (arXiv:2412.04261): what the recipe gained over its base and over the student of the single
best teacher, what each stage and arm did and in which languages, who taught what, whether the arbiter can be trusted, and where its
reward and the oracle's grade part ways. Whatever a run did not record is left out of the page.

    python -m aya_min.report RUN
"""

import sys
from pathlib import Path

from .report_charts import (STYLE, around, axis, bar, chart, clock, esc, finite, grid, heat_map, interval_text, join, legend, lines, mark,
                     number, section, track, within)
from .command import guarded, is_spare_rank
from .files import depth, own_file, parse_object, read_bytes, read_json, write_whole
from .merge_front import search_part
from .languages import LANGUAGES, SHARED

DECODINGS = ("greedy", "sampled")
KINDS = {"stage": "Stages", "arm": "Arms", "teacher": "Teachers"}
BOTH = legend(("dot", "a", "greedy"), ("diamond", "b", "sampled at temperature 1"))


# What was recorded, and the types of what the page reads: a file of another shape is refused, its key named

NUMBER, TEXT, FLAG, ANY = (int, float), (str,), (bool,), (object,)
PAIR = (NUMBER, NUMBER)
RATES = {"win_rate": NUMBER, "ci95": PAIR, "num": NUMBER, "unjudged": NUMBER}
FIGURES = {"num": NUMBER, "grade": NUMBER, "reward": NUMBER, "right_language": NUMBER, "length": NUMBER,
           "cut": NUMBER}
PART = FIGURES | {"grade_ci95": PAIR, "reward_ci95": PAIR, "by_language": {...: FIGURES},
                  "versus": {...: RATES | {"by_language": {...: RATES}}}}
MODEL = {"name!": TEXT, "title": ANY, "kind": TEXT, "greedy": PART, "sampled": PART}
ROUND = {"reward": NUMBER, "grade": NUMBER}
ANSWER = {"model": TEXT, "completion": ANY, "grade": NUMBER, "score": NUMBER}
COUNTS = {"cut": NUMBER, "cut_by_language": {...: NUMBER}}
SUMMARY = {
    "judge": TEXT, "models": [MODEL], "clusters": {...: [TEXT]}, "teacher_wins": {...: {...: NUMBER}},
    "arbitrage": COUNTS, "pairs": {...: COUNTS}, "total_seconds": NUMBER,
    "reward_model": {"num": NUMBER, "accuracy": NUMBER, "right_vs_wrong": NUMBER, "by_kind": {...: NUMBER},
                     "by_language": {...: NUMBER}},
    "online": [ROUND | {"round!": NUMBER, "greedy": ROUND, "sampled": ROUND}],
    "examples": [{"language": TEXT, "prompt": ANY, "answers": [ANSWER]}],
    "steps": [{"name!": TEXT, "title": ANY, "seconds": NUMBER, "tokens": NUMBER, "training_steps": NUMBER}]}
TASKS = {...: NUMBER}
MERGE = {"name!": TEXT, "fitness!": TASKS, "held-out!": TASKS, "weight": NUMBER, "without": TASKS}
SEARCH = {"best!": TEXT, "evaluations!": NUMBER, "popsize!": NUMBER, "held-out!": FLAG,
          "rows!": [MERGE | {"weights!": [NUMBER]}],
          "models!": [MERGE | {"folder!": TEXT, "weight!": NUMBER}]}
TRIED = {"kind!": TEXT, "split!": TEXT, "tasks!": TASKS}
LEVELS = 50             # of nesting: what we write has five


def shaped(value, shape, where, key=""):
    """The value without what is null, if it is of a shape: types, [shape of each], {key: shape} ("key!": must
    be there; ...: any key) or a tuple of two shapes, a pair. ValueError names the file and the key."""
    if isinstance(shape, dict) and isinstance(value, dict):
        shapes = {name.rstrip("!"): part for name, part in shape.items() if name is not ...}
        kept = {name: shaped(part, shapes.get(name, shape.get(..., ANY)), where, f"{key}.{name}")
                for name, part in value.items() if part is not None}
        missing = [name for name in shape if name is not ... and name.endswith("!") and name[:-1] not in kept]
        if missing:
            raise ValueError(f"{where}: {(key + '.' + missing[0][:-1])[1:]} is missing; {REMEDY}")
        return kept
    if isinstance(shape, list) and isinstance(value, list):
        return [shaped(part, shape[0], where, f"{key}[{i}]") for i, part in enumerate(value)]
    if shape is PAIR and isinstance(value, list) and len(value) == 2:
        return value
    if shape is NUMBER and type(value) in NUMBER and finite(value):
        return value
    if shape in (TEXT, ANY, FLAG) and isinstance(value, shape):
        return value
    wanted = "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else \
        {PAIR: "two numbers", NUMBER: "a finite number", TEXT: "a text"}.get(shape, "true or false")
    raise ValueError(f"{where}: {key.lstrip('.')} must be {wanted}, not {type(value).__name__}; {REMEDY}")


REMEDY = "run the step that wrote it again"


def read(run, name, shape):
    """The object in a file of the run folder, {} where there is no such file. A link out of the folder is
    refused."""
    path = own_file(run, name)
    return shaped(shallow(read_json(path), path), shape, path) if path else {}


def shallow(value, where):
    """The value, if it is not nested so deep that showing it would fail."""
    if depth(value) > LEVELS:
        raise ValueError(f"{where}: nested more than {LEVELS} levels deep; {REMEDY}")
    return value


def read_lines(run, name):
    """[(where, object), ...] of a file with one object a line. A last line without its end is being written,
    and is left out."""
    path, rows = own_file(run, name), []
    written = read_bytes(path) if path else b""
    for count, line in enumerate(written[:written.rfind(b"\n") + 1].splitlines(), 1):
        where = f"{path}:{count}"
        rows.append((where, shallow(parse_object(line, where, "remove the line"), where)))
    return rows


def read_metrics(run, name="metrics.jsonl"):
    """metrics.jsonl as {key: [(step, value), ...]}."""
    series = {}
    for where, row in read_lines(run, name):
        if not finite(row.get("step")):
            raise ValueError(f"{where}: step must be a number, got {str(row.get('step'))[:50]!r}; remove the "
                             "line")
        for key, value in row.items():
            if key != "step" and finite(value):
                series.setdefault(key, []).append((row["step"], value))
    return series


def read_search(run):
    """(search.json, the lines of evaluations.jsonl), whose tasks must be the same everywhere."""
    result, history = read(run, "search.json", SEARCH), []
    if result:
        parts = [row[split] for row in result["rows"] + result["models"]
                 for split in ("fitness", "held-out", "without")
                 if split in row]
        if len(result["rows"]) < 4 or not result["models"] or not parts[0] or any(
                part.keys() != parts[0].keys() for part in parts):
            raise ValueError(f"{run / 'search.json'}: rows and models must be four and more, with a number "
                             f"for each of the same tasks; {REMEDY}")
        for where, row in read_lines(run, "evaluations.jsonl"):
            history.append(shaped(row, TRIED, where))
            if not parts[0].keys() <= history[-1]["tasks"].keys():
                raise ValueError(f"{where}: lacks the tasks of search.json; {REMEDY}")
    return result, history


def judged_by(summary):
    """The sentence that a reader must see where no oracle judged; "" where one did."""
    judge = summary.get("judge", "judge not recorded")
    if judge.startswith("arbiter"):
        return "Scored by the arbiter that chose the training data: its score is not a win rate, and rises when a model learns to please it."
    return "" if judge == "oracle" else f"Judged by a reward model, not by people or an oracle ({judge})."


def has_win_rates(summary):
    return not summary.get("judge", "").startswith("arbiter")


def scored_by(summary):
    """(the key of the models' mean score, what to call it)."""
    parts = [model.get(decoding, {}) for model in summary.get("models", []) for decoding in DECODINGS]
    if has_win_rates(summary) and any("grade" in part for part in parts):
        return "grade", "oracle grade" if summary.get("judge") == "oracle" else "judge's score"
    return "reward", "arbiter's score"


def versus(part, opponent):
    """Win rates of these answers against another model's; {} where the two were not compared."""
    return part.get("versus", {}).get(opponent) or {}


def named(summary, name):
    """The model of that name, {} where there is none."""
    return next((model for model in summary.get("models", []) if model["name"] == name), {})


def title(model, name=""):
    return str(model.get("title", model.get("name", name)))


def final_model(summary):
    """The last stage: what the recipe ends with. {} while there is only a base."""
    stages = [model for model in summary.get("models", []) if model.get("kind") == "stage"]
    return stages[-1] if len(stages) > 1 else {}


def language(code):
    return LANGUAGES[code].name if code in LANGUAGES else code


def by_cluster(codes, clusters):
    """[(cluster, those of the codes that are at home in it alone)], then the languages of several clusters as "shared", of none as "other"."""
    homes = {code: [name for name, members in clusters.items() if code in members] for code in codes}
    place = {code: names[0] if len(names) == 1 else "shared" if names or code in SHARED else "other" for code, names in homes.items()}
    order = dict.fromkeys([*clusters, "shared", "other"])
    return [(name, members) for name in order if (members := [code for code in codes if place[code] == name])]


def by_kind(summary):
    """[(kind, its models)]: stages, arms, teachers, then kinds that we do not know."""
    models = summary.get("models", [])
    kinds = dict.fromkeys([*KINDS, *(model.get("kind", "") for model in models)])
    return [(kind, members) for kind in kinds if (members := [model for model in models if model.get("kind", "") == kind])]


# The table: on the terminal, in report.md and on the page

def columns(summary):
    """[(heading, digits, a model's part -> (value, interval or None))]: those that some model has a value for."""
    score, heading = scored_by(summary)
    made = [(heading, 2, lambda part: (part.get(score), part.get(f"{score}_ci95")))]
    for name in ("base", "previous", "single") if has_win_rates(summary) else ():
        made.append((f"vs {name}", 1, lambda part, name=name: (versus(part, name).get("win_rate"), versus(part, name).get("ci95"))))
    def right_language(part):
        share = part.get("right_language")
        return (100 * share if finite(share) else None), None
    made.append(("right language %", 1, right_language))
    made += [(name, 0, lambda part, name=name: (part.get(name), None)) for name in ("length", "cut")]
    parts = [model.get(decoding, {}) for model in summary.get("models", []) for decoding in DECODINGS]
    return [column for column in made if any(finite(column[2](part)[0]) for part in parts)]


def table(summary):
    """The main table as aligned markdown: a row for each model and decoding. Win rates in percent, a tie half a win."""
    shown = columns(summary)
    rows = [["model", "decoding"] + [heading for heading, _, _ in shown]]
    for model, decoding in ((m, d) for _, models in by_kind(summary) for m in models for d in DECODINGS if d in m):
        rows.append([title(model).replace("|", "\\|").replace("\n", " "), decoding])
        for heading, digits, cell in shown:
            value, ci = cell(model[decoding])
            rows[-1].append(f"{number(value, digits)} {interval_text(ci, digits) if heading.startswith('vs ') else ''}".strip())
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    aligned = [[f"{cell:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths))] for row in rows]
    note = f"\n\n{judged_by(summary)}" if judged_by(summary) else ""
    return "\n".join("| " + " | ".join(row) + " |" for row in aligned) + note


def table_part(summary):
    """The same table for the page: greedy and sampled side by side, intervals under the figures, an arrow where one is clear of 50."""
    shown = columns(summary)
    found = [d for d in DECODINGS if any(d in model for model in summary.get("models", []))]
    edge = {decoding: "first" if decoding == found[0] else "" for decoding in found}
    body = ""
    for kind, models in by_kind(summary):
        body += f'<tr><th class="name within" colspan="{1 + len(shown) * len(found)}">{esc(KINDS.get(kind, kind))}</th></tr>'
        for model in models:
            body += f'<tr><th scope="row" class="name">{esc(title(model))}</th>'
            for heading, digits, cell, decoding in ((*column, decoding) for column in shown for decoding in found):
                value, ci = cell(model.get(decoding, {}))
                bounds = interval_text(ci, digits)
                arrow = "" if not (bounds and heading.startswith("vs ")) else "▲ " if ci[0] > 50 else "▼ " if ci[1] < 50 else ""
                clear = " clear" if arrow else ""
                body += f'<td class="{edge[decoding]}{clear}">{arrow}{number(value, digits)}<small>{bounds}</small></td>'
            body += "</tr>"
    head = "".join(f'<th scope="colgroup" colspan="{len(found)}" class="first">{esc(heading)}</th>' for heading, _, _ in shown)
    below = "".join(f'<th class="{edge[decoding]}">{decoding}</th>' for _ in shown for decoding in found)
    drawn = (f'<div class="scroll"><table><thead><tr><th rowspan="2" class="name">model</th>{head}</tr><tr>{below}</tr></thead>'
             f"<tbody>{body}</tbody></table></div>")
    note = "Win rates in percent with 95% intervals; ▲ ▼: the whole interval is above or below 50. " if has_win_rates(summary) else ""
    unjudged = sum(rates["unjudged"] for model in summary.get("models", []) for d in DECODINGS
                   for rates in model.get(d, {}).get("versus", {}).values() if finite(rates.get("unjudged")))
    left_out = f" {unjudged} comparisons could not be judged and are left out." if unjudged else ""
    note += "Length in characters; cut: answers that ended at the limit of new tokens."
    return section("Every model", note + left_out,
                   drawn if shown else "")


# The rest of the page, from its top to its foot: each function draws one part, "" where nothing was recorded

def headline(summary, decoding):
    """The sentence with the numbers; "" where the run has no final model to speak of."""
    last, (score, called) = final_model(summary), scored_by(summary)
    part, before, said = last.get(decoding, {}), named(summary, "base").get(decoding, {}), []
    if finite(part.get(score)):
        start = f" from the base's <b>{number(before[score], 2)}</b>" if finite(before.get(score)) else ""
        said.append(f"{called} <b>{number(part[score], 2)}</b>{start}")
    wins = []
    for name, who in (("base", "its base"), ("single", "the student of the single best teacher")) if has_win_rates(summary) else ():
        rates = versus(part, name)
        if finite(rates.get("win_rate")):
            bounds = interval_text(rates.get("ci95")).replace(" ", "&nbsp;")
            wins.append(f"<b>{number(rates['win_rate'])}%</b> {bounds} against {who}")
    said += [f"it wins {' and '.join(wins)}"] if wins else []
    how = "greedy" if decoding == "greedy" else "sampled at temperature 1"
    return f'<p class="headline {decoding}">{esc(title(last))}, {how}: {"; ".join(said)}.</p>' if said else ""


def win_rate_chart(heading, models, opponent):
    """A forest plot: for each model its greedy and its sampled win rate with whiskers, beside the line of 50%."""
    rates = {model["name"]: [versus(model.get(decoding, {}), opponent) for decoding in DECODINGS] for model in models}
    kept = [model for model in models if any(finite(part.get("win_rate")) for part in rates[model["name"]])]
    if not kept:
        return ""
    scale = around(50, [x for model in kept for part in rates[model["name"]] for x in (part.get("win_rate"), *(part.get("ci95") or ()))])
    rows = []
    for model in kept:
        drawn, figures = "", []
        for part, decoding, shape, tone, y in zip(rates[model["name"]], DECODINGS, ("dot", "diamond"), "ab", (10, 24)):
            figures.append(number(part.get("win_rate")))
            tip = f"{decoding}: {figures[-1]} {interval_text(part.get('ci95'))}"
            drawn += mark(part.get("win_rate"), scale, shape, y, tone, tip, part.get("ci95"))
        rows.append(track(title(model), drawn, " / ".join(figures), scale, 50, height=34))
    return chart(heading, rows + [axis(scale, 5 if scale[1] - scale[0] <= 25 else 10, "%")], "card forest")


def win_rates_part(summary):
    """The stages in the recipe's order; then the arms, with the stages beside them where the opponent is itself an arm."""
    models = summary.get("models", []) if has_win_rates(summary) else []
    stages, arms = ([model for model in models if model.get("kind") == kind] for kind in ("stage", "arm"))
    opponents = dict.fromkeys(name for model in stages + arms for d in DECODINGS for name in model.get(d, {}).get("versus", {}))
    against = {name: f"Against {title(named(summary, name), name)}" for name in opponents} | {"previous": "Against the stage before"}
    of_stages = [win_rate_chart(against[name], stages, name) for name in ("base", "previous", "single") if name in opponents]
    of_arms = [win_rate_chart(against[name], arms if name in ("base", "single") else stages + arms, name)
               for name in opponents if name != "previous"]
    return (section("Win rate after each stage", "Percent of questions where the judge prefers this model's answer, a tie half a win; whiskers "
                    "are 95% intervals, resampled over questions; the dashed line is 50%: no difference.", grid(of_stages, key=BOTH))
            + section("The arms beside it", "Other ways to train from the same start.", grid(of_arms, key=BOTH)))


def languages_part(summary, decoding="greedy"):
    """The final model's win rate against its base as bars, and its mean score beside the base's, for each language."""
    last, (score, called) = final_model(summary), scored_by(summary)
    rates = versus(last.get(decoding, {}), "base").get("by_language", {}) if has_win_rates(summary) else {}
    after, before = (model.get(decoding, {}).get("by_language", {}) for model in (last, named(summary, "base")))
    values = [part[score] for part in (*after.values(), *before.values()) if finite(part.get(score))]
    scale, percent = (0, 3) if called == "oracle grade" else around(0, values, step=1), (0, 100)
    bars, scores = [], [legend(("ring", "b", "base"), ("dot", "a", title(last)))]
    for cluster, codes in by_cluster(dict.fromkeys([*rates, *after]), summary.get("clusters", {})):
        bars.append(within(cluster))
        scores.append(within(cluster))
        for code in codes:
            rate, a, b = rates.get(code, {}), after.get(code, {}).get(score), before.get(code, {}).get(score)
            win, tip = rate.get("win_rate"), f"{interval_text(rate.get('ci95'))}, {rate.get('num')} questions"
            bars.append(track(language(code), bar(win, percent, tip=tip, interval=rate.get("ci95")), number(win), percent, 50))
            drawn = join(a, b, scale) + mark(b, scale, "ring", tone="b", tip="base") + mark(a, scale, tip=title(last))
            scores.append(track(language(code), drawn, f"{number(b, 2)} → {number(a, 2)}", scale))
    bars = chart("Win rate against the base", bars + [axis(percent, 50, "%")]) if rates else ""
    scores = chart(called.capitalize(), scores + [axis(scale, 1)]) if values and after else ""
    return section("By language", f"{title(last)}, {decoding}, languages by cluster.", grid([bars, scores]))


def teachers_part(summary):
    """Whose answers the arbiter kept, in percent of the language's prompts; a teacher's home cluster is outlined."""
    wins = summary.get("teacher_wins", {})
    teachers = list(dict.fromkeys(teacher for shares in wins.values() for teacher in shares))
    homes = {teacher: teacher.removeprefix("teacher-") for teacher in teachers}
    rows = []
    for cluster, codes in by_cluster(wins, summary.get("clusters", {})):
        rows += [cluster, *((language(code), [(wins[code].get(teacher), homes[teacher] == cluster) for teacher in teachers]) for code in codes)]
    note = "Percent of the language's prompts for which the arbiter kept this teacher's answer."
    note += " Outlined: the teacher's own languages." if set(homes.values()) & set(summary.get("clusters", {})) else ""
    counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in summary.get("arbitrage", {}).items() if finite(value))
    return section("Who taught what: arbitrage over the pool", note + (f" Counted: {counts}." if counts else ""),
                   heat_map([title(named(summary, teacher), teacher) for teacher in teachers], rows) if rows else "")


def reward_part(summary):
    """Held-out pair accuracy of the arbiter, in percent."""
    model, scale = summary.get("reward_model", {}), (0, 100)

    def drawn(heading, values):
        rows = [track(name, bar(100 * value, scale), f"{100 * value:.1f}", scale, 50) for name, value in values.items() if finite(value)]
        return chart(heading, rows + [axis(scale, 50, "%")]) if rows else ""

    languages = model.get("by_language", {})
    charts = [drawn("Overall", {"all pairs": model.get("accuracy"), "right vs wrong": model.get("right_vs_wrong")}),
              drawn("By kind of pair", model.get("by_kind", {})),
              *(drawn(cluster, {language(code): languages[code] for code in codes})
                for cluster, codes in by_cluster(languages, summary.get("clusters", {})))]
    pairs = f"{model['num']:,} held-out pairs" if finite(model.get("num")) else "held-out pairs"
    return section("How good is the arbiter", f"Percent of {pairs} where the reward model scores the better answer higher; 50% is chance.",
                   grid(charts, "small"))


def cut_part(summary):
    """How many answers were cut at the limit of new tokens, where answers became data."""
    def by_language(counts):
        return ", ".join(f"{code} {number(n, 0)}" for code, n in counts.get("cut_by_language", {}).items())

    counted = {"arbitrage": summary.get("arbitrage", {})} | summary.get("pairs", {})
    rows = "".join(f'<tr><th scope="row" class="name">{esc(name)}</th><td>{number(counts["cut"], 0)}</td>'
                   f'<td class="name">{esc(by_language(counts))}</td></tr>'
                   for name, counts in counted.items() if counts.get("cut"))
    head = ('<thead><tr><th class="name">answers of</th><th>cut</th><th class="name">by language</th></tr>'
            "</thead>")
    return section("Answers that were cut at the limit", "Not trained on unless keep cut is set.",
                   f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else "")


def online_part(summary):
    """The arbiter's reward and the oracle's grade by online round: where they part ways, it is the arbiter that is being pleased."""
    rounds = [row if "greedy" in row or "sampled" in row else {"round": row["round"], "greedy": row} for row in summary.get("online", [])]
    score = "oracle's grade" if summary.get("judge") == "oracle" else "judge's score"
    charts = [lines(f"{called.capitalize()} by round", [(d, [(row["round"], row.get(d, {}).get(key)) for row in rounds], tone)
                                                        for d, tone in zip(DECODINGS, "ab")], marks=True, box=(400, 150))
              for key, called in (("reward", "arbiter's reward"), ("grade", score))]
    parted = [f"{after['round']} ({d})" for before, after in zip(rounds, rounds[1:]) for d in DECODINGS
              if all(finite(row.get(d, {}).get(key)) for row in (before, after) for key in ("reward", "grade"))
              and after[d]["reward"] > before[d]["reward"] and after[d]["grade"] < before[d]["grade"]]
    return section(f"Arbiter's reward and {score} over the online rounds", f"Means over the evaluation's answers; round 0 is the start. Rounds "
                   f"in which the reward rose and the {score} fell (pleasing the arbiter alone looks so): {', '.join(parted) or 'none'}.",
                   grid(charts, key=BOTH))


def examples_part(summary):
    """A few prompts with each model's answer. dir=auto sets right-to-left scripts right; lang picks the Han glyphs of the region."""
    graded, cards = summary.get("judge") == "oracle", []
    for example in summary.get("examples", []):
        code, card = esc(example.get("language", "")), ""
        for answer in example.get("answers", []):
            value, said = answer.get("grade", answer.get("score")), ""
            if finite(value):
                dots = "●" * round(value) + "○" * (3 - round(value)) if 0 <= value <= 3 else ""
                said = f'<i aria-hidden="true">{dots}</i> {value:g} of 3' if graded else f"score {value:.2f}"
            card += (f'<div class="answer"><span>{esc(title(named(summary, answer.get("model")), answer.get("model")))} {said}</span>'
                     f'<p class="text" dir="auto" lang="{code}">{esc(answer.get("completion", "")) or "(empty)"}</p></div>')
        cards.append(f'<article class="answers"><header>{esc(language(example.get("language", "")))}</header>'
                     f'<p class="text prompt" dir="auto" lang="{code}">{esc(example.get("prompt", ""))}</p>{card}</article>')
    note = "Grades: 0 wrong language or garbage, 1 wrong answer, 2 right answer, 3 right answer in a proper sentence." if graded else ""
    return section("Answers before and after", note, grid(cards, "small"))


def costs_part(summary):
    """Time, tokens and training steps of each step of the recipe."""
    steps, total = summary.get("steps", []), summary.get("total_seconds")
    rows = "".join(f'<tr><th scope="row" class="name">{esc(title(step))}</th><td>{clock(step.get("seconds"))}</td>'
                   f'<td>{number(step.get("tokens"), 0)}</td><td>{number(step.get("training_steps"), 0)}</td></tr>' for step in steps)
    head = '<thead><tr><th class="name">step</th><th>time</th><th>tokens</th><th>training steps</th></tr></thead>'
    return section("What it cost", f"{clock(total)} in all." if finite(total) else "",
                   f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else "")


def curves_part(run, summary):
    """Loss of every training step of the recipe, in small multiples."""
    titles = {step["name"]: title(step) for step in summary.get("steps", [])}
    found = {path.parent.name: read_metrics(run, path.relative_to(run))
             for path in sorted(run.glob("steps/*/metrics.jsonl"))}
    names = [name for name in titles if name in found] + [name for name in found if name not in titles]
    return section("Loss curves", "Loss by training step, each on its own scale; dashed with points: held-out loss.", grid(
        [lines(titles.get(name, name), [("loss", found[name].get("loss", []), "a"), ("held-out loss", found[name].get("eval/loss", []), "b")])
         for name in names], "curves"))


def stage_part(run):
    """A run of one stage: a curve for everything that it logged, and its held-out figures for each language."""
    series, evaluation = read_metrics(run), read(run, "eval.json", {})
    keys = [key for key in series if not key.startswith("eval/") and key not in ("tokens", "seconds") and key.rpartition("/")[0] not in series]
    curves = [lines(key, [(key, series[key], "a"), (f"held-out {key}", series.get(f"eval/{key}", []), "b")], box=(240, 100)) for key in keys]
    charts, of_key = [], {}
    for name, value in evaluation.items():
        key, _, code = name.rpartition("/")
        if finite(value):
            of_key.setdefault(key, {})[code] = value
    for key, overall in evaluation.items():
        each = of_key.get(key)
        if each and finite(overall):
            scale = (0, max([overall, *each.values()]) or 1)
            ordered = [("all", overall), *((language(code), each[code]) for code in sorted(each, key=each.get))]
            charts.append(chart(key, [track(name, bar(value, scale), f"{value:.3f}", scale, overall) for name, value in ordered]))
    return (section("Training", "By training step, each on its own scale; dashed with points: held-out.", grid(curves, "small"))
            + section("Held out, by language", "Bars start at 0; the dashed line is the figure over all languages.", grid(charts)))


def flat(settings, prefix=""):
    """[(dotted key, value)] of nested settings."""
    return [pair for key, value in settings.items()
            for pair in (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)])]


def settings_part(config):
    first = {key: config[key] for key in ("command", "stage", "preset", "seed", "versions") if key in config}
    rows = "".join(f'<tr><th scope="row" class="name">{esc(key)}</th>'
                   f'<td><code>{esc(str(value)[:5000])}</code></td></tr>'
                   for key, value in flat(first | config))
    return f'<details><summary>Settings, seed, versions</summary><div class="scroll"><table>{rows}</table></div></details>' if rows else ""


def page(run):
    """The whole of report.html. The policy in its head lets nothing be fetched and no script run, whatever a model wrote."""
    summary, config = read(run, "summary.json", SUMMARY), read(run, "config.json", {})
    warning = f'<p class="warning">{esc(judged_by(summary))}</p>' if summary.get("models") and judged_by(summary) else ""
    parts = [search_part(*read_search(run)),
             *(headline(summary, decoding) for decoding in DECODINGS), warning, table_part(summary), win_rates_part(summary),
             languages_part(summary), teachers_part(summary), reward_part(summary), cut_part(summary),
             stage_part(run),
             curves_part(run, summary), online_part(summary), examples_part(summary), costs_part(summary)]
    body = "\n".join(filter(None, parts)) or "<p>Nothing is recorded here yet but the settings.</p>"
    name = " · ".join(["aya_min", *(str(config[key]) for key in ("stage", "preset") if key in config), run.resolve().name])
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
            f"<title>{esc(name)}</title><style>{STYLE}</style></head>\n<body><main><h1>{esc(name)}</h1>\n{body}\n{settings_part(config)}"
            "</main></body></html>\n")


def write_report(run):
    """Writes RUN/report.html and, where there are models to compare, RUN/report.md. Returns the page's path."""
    run = Path(run)
    if not any((run / name).is_file() for name in ("config.json", "summary.json", "metrics.jsonl", "search.json")):
        raise ValueError(f"{run} is not a run folder: it holds no config.json, summary.json, metrics.jsonl or search.json; give the --out of a run")
    write_whole(run / "report.html", page(run))
    if text := table(read(run, "summary.json", SUMMARY)):
        write_whole(run / "report.md", text + "\n")
    return run / "report.html"


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError("give one run folder: python -m aya_min.report RUN")
    if not is_spare_rank():
        print(write_report(arguments[0]))


if __name__ == "__main__":
    guarded(main, "aya_min.report")
