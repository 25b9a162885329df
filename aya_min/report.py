"""One page about a run, RUN/report.html, and its main table, RUN/report.md. Reads JSON files, never a model.

The page follows the argument of Aya Expanse (arXiv:2412.04261): what the recipe gained over its base and over
the student of the single best teacher, what each stage and arm did in which languages, which teacher taught
what, how good the arbiter is, and where the arbiter's reward and the oracle's grade diverge. A part that the
run did not record is left out.

    python -m aya_min.report RUN
"""

import sys
from pathlib import Path

from .command import guarded, is_spare_rank
from .files import write_whole
from .merge_front import search_part
from .report_charts import (STYLE, around, axis, bar, chart, clock, connector, curves, esc, finite, grid,
                            heat_map, html_table, interval_text, legend, mark, number, section, track, within)
from .report_data import (DECODINGS, SUMMARY, by_cluster, final_model, has_win_rates, judged_by, language,
                          named, read, read_search, read_series, scored_by, title, versus)
from .report_table import results_table, table_part

SHAPE_OF = {"greedy": "dot", "sampled": "diamond"}
TONE_OF = {"greedy": "a", "sampled": "b"}
MINIATURE = ("Preset smoke shows that every step runs. Its models are too small to answer, so grades near 0 "
             "and win rates near 50% are expected.")
BOTH = legend(("dot", "a", "greedy"), ("diamond", "b", "sampled at temperature 1"))


# ---- the parts of the page, from top to bottom; each is "" if the run did not record it --------------------

def headline(summary, decoding):
    """The final model's gain in one sentence."""
    last = final_model(summary)
    score, called = scored_by(summary)
    part = last.get(decoding, {})
    before = named(summary, "base").get(decoding, {})
    said, wins = [], []
    if finite(part.get(score)):
        start = f" from the base's <b>{number(before[score], 2)}</b>" if finite(before.get(score)) else ""
        said.append(f"{called} <b>{number(part[score], 2)}</b>{start}")
    opponents = {"base": "its base", "single": "the student of the single best teacher"}
    for name, who in opponents.items() if has_win_rates(summary) else ():
        rates = versus(part, name)
        if finite(rates.get("win_rate")):
            bounds = interval_text(rates.get("ci95")).replace(" ", "&nbsp;")
            wins.append(f"<b>{number(rates['win_rate'])}%</b> {bounds} against {who}")
    said += [f"it wins {' and '.join(wins)}"] if wins else []
    how = "greedy" if decoding == "greedy" else "sampled at temperature 1"
    sentence = f'<p class="headline {decoding}">{esc(title(last))}, {how}: {"; ".join(said)}.</p>'
    return sentence if said else ""


def win_rate_chart(heading, models, opponent):
    """A forest plot: each model's greedy and sampled win rate with whiskers, beside the line of 50%."""
    rates = {model["name"]: [versus(model.get(decoding, {}), opponent) for decoding in DECODINGS]
             for model in models}
    kept = [model for model in models if any(finite(part.get("win_rate")) for part in rates[model["name"]])]
    if not kept:
        return ""
    shown = [part for model in kept for part in rates[model["name"]]]
    scale = around(50, [value for part in shown for value in (part.get("win_rate"), *part.get("ci95", ()))])
    rows = []
    for model in kept:
        drawn, figures = "", []
        for part, decoding, y in zip(rates[model["name"]], DECODINGS, (10, 24)):
            figures.append(number(part.get("win_rate")))
            tip = f"{decoding}: {figures[-1]} {interval_text(part.get('ci95'))}"
            drawn += mark(part.get("win_rate"), scale, SHAPE_OF[decoding], y, TONE_OF[decoding], tip,
                          part.get("ci95"))
        rows.append(track(title(model), drawn, " / ".join(figures), scale, 50, height=34))
    rows.append(axis(scale, 5 if scale[1] - scale[0] <= 25 else 10, "%"))
    return chart(heading, rows, "card forest")


def win_rates_part(summary):
    """The stages in the recipe's order, then the arms; stages join the arms where the opponent is an arm."""
    models = summary.get("models", []) if has_win_rates(summary) else []
    stages = [model for model in models if model.get("kind") == "stage"]
    arms = [model for model in models if model.get("kind") == "arm"]
    opponents = dict.fromkeys(name for model in stages + arms for decoding in DECODINGS
                              for name in model.get(decoding, {}).get("versus", {}))

    def against(name, models):
        opponent = title(named(summary, name), name)
        heading = "Against the stage before" if name == "previous" else f"Against {opponent}"
        return win_rate_chart(heading, models, name)

    of_stages = [against(name, stages) for name in ("base", "previous", "single") if name in opponents]
    of_arms = [against(name, arms if name in ("base", "single") else stages + arms)
               for name in opponents if name != "previous"]
    note = ("Percent of questions on which the judge prefers this model's answer; a tie is half a win. "
            "Whiskers are 95% intervals, resampled over questions; the dashed line is 50%, no difference.")
    arms_note = "Other ways to train from the same start."
    return (section("Win rate after each stage", note, grid(of_stages, key=BOTH))
            + section("The arms beside it", arms_note, grid(of_arms, key=BOTH)))


def languages_part(summary, decoding="greedy"):
    """The final model by language: win rate against its base, and mean score beside the base's."""
    last = final_model(summary)
    score, called = scored_by(summary)
    rates = versus(last.get(decoding, {}), "base").get("by_language", {}) if has_win_rates(summary) else {}
    after = last.get(decoding, {}).get("by_language", {})
    before = named(summary, "base").get(decoding, {}).get("by_language", {})
    values = [part[score] for part in (*after.values(), *before.values()) if finite(part.get(score))]
    scale = (0, 3) if called == "oracle grade" else around(0, values, step=1)
    percent = (0, 100)
    bars = []
    scores = [legend(("ring", "b", "base"), ("dot", "a", title(last)))]
    for cluster, codes in by_cluster(dict.fromkeys([*rates, *after]), summary.get("clusters", {})):
        bars.append(within(cluster))
        scores.append(within(cluster))
        for code in codes:
            rate = rates.get(code, {})
            win = rate.get("win_rate")
            tip = f"{interval_text(rate.get('ci95'))}, {rate.get('num')} questions"
            win_bar = bar(win, percent, tip=tip, interval=rate.get("ci95"))
            bars.append(track(language(code), win_bar, number(win), percent, 50))
            a = after.get(code, {}).get(score)
            b = before.get(code, {}).get(score)
            drawn = connector(a, b, scale) + mark(b, scale, "ring", tone="b", tip="base")
            drawn += mark(a, scale, tip=title(last))
            scores.append(track(language(code), drawn, f"{number(b, 2)} → {number(a, 2)}", scale))
    bars = chart("Win rate against the base", bars + [axis(percent, 50, "%")]) if rates else ""
    scores = chart(called.capitalize(), scores + [axis(scale, 1)]) if values and after else ""
    return section("By language", f"{title(last)}, {decoding}, languages by cluster.", grid([bars, scores]))


def teachers_part(summary):
    """Whose answers the arbiter kept, in percent of the language's prompts; home clusters are outlined."""
    wins = summary.get("teacher_wins", {})
    teachers = list(dict.fromkeys(teacher for shares in wins.values() for teacher in shares))
    homes = {teacher: teacher.removeprefix("teacher-") for teacher in teachers}
    rows = []
    for cluster, codes in by_cluster(wins, summary.get("clusters", {})):
        rows.append(cluster)
        for code in codes:
            cells = [(wins[code].get(teacher), homes[teacher] == cluster) for teacher in teachers]
            rows.append((language(code), cells))
    note = "Percent of the language's prompts for which the arbiter kept this teacher's answer."
    if set(homes.values()) & set(summary.get("clusters", {})):
        note += " Outlined: the teacher's own languages."
    counts = [f"{value:,} {key.replace('_', ' ')}" for key, value in summary.get("arbitrage", {}).items()
              if finite(value)]
    note += f" Counted: {', '.join(counts)}." if counts else ""
    names = [title(named(summary, teacher), teacher) for teacher in teachers]
    return section("Who taught what: arbitrage over the pool", note, heat_map(names, rows) if rows else "")


def reward_part(summary):
    """Accuracy of the arbiter on held-out pairs, in percent."""
    model = summary.get("reward_model", {})
    scale = (0, 100)

    def drawn(heading, values):
        rows = [track(name, bar(100 * value, scale), f"{100 * value:.1f}", scale, 50)
                for name, value in values.items() if finite(value)]
        return chart(heading, rows + [axis(scale, 50, "%")]) if rows else ""

    overall = {"all pairs": model.get("accuracy"), "right vs wrong": model.get("right_vs_wrong")}
    charts = [drawn("Overall", overall), drawn("By kind of pair", model.get("by_kind", {}))]
    accuracies = model.get("by_language", {})
    for cluster, codes in by_cluster(accuracies, summary.get("clusters", {})):
        charts.append(drawn(cluster, {language(code): accuracies[code] for code in codes}))
    pairs = f"{model['num']:,} held-out pairs" if finite(model.get("num")) else "held-out pairs"
    note = f"Percent of {pairs} in which the reward model scores the better answer higher; 50% is chance."
    return section("How good is the arbiter", note, grid(charts, "small"))


def cut_part(summary):
    """How many answers ended at the limit of new tokens, wherever answers became training data."""
    rows = ""
    for name, counts in ({"arbitrage": summary.get("arbitrage", {})} | summary.get("pairs", {})).items():
        if counts.get("cut"):
            by_language = ", ".join(f"{code} {number(num, 0)}"
                                    for code, num in counts.get("cut_by_language", {}).items())
            rows += (f'<tr><th scope="row" class="name">{esc(name)}</th><td>{number(counts["cut"], 0)}</td>'
                     f'<td class="name">{esc(by_language)}</td></tr>')
    head = '<tr><th class="name">answers of</th><th>cut</th><th class="name">by language</th></tr>'
    return section("Answers that were cut at the limit", "Not trained on unless keep cut is set.",
                   html_table(head, rows) if rows else "")


def online_part(summary):
    """Reward and grade by online round, and the rounds in which the reward rose while the grade fell."""
    rounds = [row if "greedy" in row or "sampled" in row else {"round": row["round"], "greedy": row}
              for row in summary.get("online", [])]
    grade = "oracle's grade" if summary.get("judge") == "oracle" else "judge's score"
    charts = []
    for key, called in (("reward", "arbiter's reward"), ("grade", grade)):
        series = []
        for decoding in DECODINGS:
            points = [(row["round"], row.get(decoding, {}).get(key)) for row in rounds]
            series.append((decoding, points, TONE_OF[decoding]))
        charts.append(curves(f"{called.capitalize()} by round", series, marks=True, box=(400, 150)))
    diverging = []
    for before, after in zip(rounds, rounds[1:]):
        for decoding in DECODINGS:
            a, b = before.get(decoding, {}), after.get(decoding, {})
            measured = all(finite(part.get(key)) for part in (a, b) for key in ("reward", "grade"))
            if measured and b["reward"] > a["reward"] and b["grade"] < a["grade"]:
                diverging.append(f"{after['round']} ({decoding})")
    note = ("Means over the evaluation's answers; round 0 is the start. Rounds in which the reward rose and "
            f"the {grade} fell (the model may only please the arbiter): {', '.join(diverging) or 'none'}.")
    return section(f"Arbiter's reward and {grade} over the online rounds", note, grid(charts, key=BOTH))


def examples_part(summary):
    """A few prompts with each model's answer.

    dir=auto aligns right-to-left scripts to the right; lang selects the region's Han glyphs.
    """
    graded = summary.get("judge") == "oracle"
    cards = []
    for example in summary.get("examples", []):
        code = esc(example.get("language", ""))
        card = (f'<header>{esc(language(example.get("language", "")))}</header>'
                f'<p class="text prompt" dir="auto" lang="{code}">{esc(example.get("prompt", ""))}</p>')
        for answer in example.get("answers", []):
            who = esc(title(named(summary, answer.get("model")), answer.get("model")))
            said = esc(answer.get("completion", "")) or "(empty)"
            card += (f'<div class="answer"><span>{who} {score_text(answer, graded)}</span>'
                     f'<p class="text" dir="auto" lang="{code}">{said}</p></div>')
        cards.append(f'<article class="answers">{card}</article>')
    note = ("Grades: 0 wrong language or garbage, 1 wrong answer, 2 right answer, 3 right answer in a proper "
            "sentence.") if graded else ""
    return section("Answers before and after", note, grid(cards, "small"))


def score_text(answer, graded):
    value = answer.get("grade", answer.get("score"))
    if not finite(value):
        return ""
    if not graded:
        return f"score {value:.2f}"
    dots = "●" * round(value) + "○" * (3 - round(value)) if 0 <= value <= 3 else ""
    return f'<i aria-hidden="true">{dots}</i> {value:g} of 3'


def costs_part(summary):
    """Time, tokens and training steps of each step of the recipe."""
    total = summary.get("total_seconds")
    rows = ""
    for step in summary.get("steps", []):
        rows += (f'<tr><th scope="row" class="name">{esc(title(step))}</th>'
                 f'<td>{clock(step.get("seconds"))}</td><td>{number(step.get("tokens"), 0)}</td>'
                 f'<td>{number(step.get("training_steps"), 0)}</td></tr>')
    head = '<tr><th class="name">step</th><th>time</th><th>tokens</th><th>training steps</th></tr>'
    return section("What it cost", f"{clock(total)} in all." if finite(total) else "",
                   html_table(head, rows) if rows else "")


def curves_part(folder, summary):
    """Training and held-out loss of every step of the recipe, in small multiples."""
    titles = {step["name"]: title(step) for step in summary.get("steps", [])}
    found = {path.parent.name: read_series(folder, path.relative_to(folder))
             for path in sorted(folder.glob("steps/*/metrics.jsonl"))}
    names = [name for name in titles if name in found] + [name for name in found if name not in titles]
    charts = []
    for name in names:
        series = [("loss", found[name].get("loss", []), "a"),
                  ("held-out loss", found[name].get("eval/loss", []), "b")]
        charts.append(curves(titles.get(name, name), series))
    note = "Loss by training step, each on its own scale; dashed with points: held-out loss."
    return section("Loss curves", note, grid(charts, "curves"))


def stage_part(folder):
    """A run of one stage: a curve of everything that it logged, and its held-out figures by language."""
    series = read_series(folder)
    keys = [key for key in series if not key.startswith("eval/") and key not in ("tokens", "seconds")
            and key.rpartition("/")[0] not in series]
    training = []
    for key in keys:
        both = [(key, series[key], "a"), (f"held-out {key}", series.get(f"eval/{key}", []), "b")]
        training.append(curves(key, both, box=(240, 100)))
    evaluation = read(folder, "eval.json", {})
    by_language = {}            # key -> {language code: value}; eval.json has "key/code" beside "key"
    for name, value in evaluation.items():
        key, _, code = name.rpartition("/")
        if finite(value):
            by_language.setdefault(key, {})[code] = value
    held_out = []
    for key, overall in evaluation.items():
        each = by_language.get(key)
        if each and finite(overall):
            scale = (0, max([overall, *each.values()]) or 1)
            bars = [("all", overall)] + [(language(code), each[code]) for code in sorted(each, key=each.get)]
            held_out.append(chart(key, [track(name, bar(value, scale), f"{value:.3f}", scale, overall)
                                        for name, value in bars]))
    training_note = "By training step, each on its own scale; dashed with points: held-out."
    held_out_note = "Bars start at 0; the dashed line is the figure over all languages."
    return (section("Training", training_note, grid(training, "small"))
            + section("Held out, by language", held_out_note, grid(held_out)))


# ---- the page ----------------------------------------------------------------------------------------------

def flat(values, prefix=""):
    """[(dotted key, value)] of a nested object."""
    pairs = []
    for key, value in values.items():
        pairs += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def config_part(config):
    first = {key: config[key] for key in ("command", "stage", "preset", "seed", "versions") if key in config}
    rows = "".join(f'<tr><th scope="row" class="name">{esc(key)}</th>'
                   f'<td><code>{esc(str(value)[:5000])}</code></td></tr>'
                   for key, value in flat(first | config))
    drawn = f'<div class="scroll"><table>{rows}</table></div>'
    return f'<details><summary>Settings, seed, versions</summary>{drawn}</details>' if rows else ""


def page(folder):
    """The whole text of report.html. Its policy forbids fetching and scripts, whatever a model wrote."""
    summary = read(folder, "summary.json", SUMMARY)
    config = read(folder, "config.json", {})
    warning = judged_by(summary) if summary.get("models") else ""
    is_miniature = config.get("preset") == "smoke" and summary.get("judge") == "oracle"
    parts = [search_part(*read_search(folder)),
             *(headline(summary, decoding) for decoding in DECODINGS),
             f'<p class="warning">{esc(warning)}</p>' if warning else "",
             f"<p>{MINIATURE}</p>" if is_miniature else "",
             table_part(summary), win_rates_part(summary), languages_part(summary), teachers_part(summary),
             reward_part(summary), cut_part(summary), stage_part(folder), curves_part(folder, summary),
             online_part(summary), examples_part(summary), costs_part(summary)]
    body = "\n".join(filter(None, parts)) or "<p>This run has recorded only its settings so far.</p>"
    about = [str(config[key]) for key in ("stage", "preset") if key in config]
    name = esc(" · ".join(["aya_min", *about, folder.resolve().name]))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{name}</title><style>{STYLE}</style></head>\n<body><main><h1>{name}</h1>\n{body}\n"
            f"{config_part(config)}</main></body></html>\n")


def write_report(folder):
    """Write report.html and, if the run compares models, report.md into the folder. Returns the page's path.

    ValueError if the folder holds none of the files of a run, or one that cannot be read.
    """
    folder = Path(folder)
    names = ("config.json", "summary.json", "metrics.jsonl", "search.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{folder} is not a run folder: it holds none of {', '.join(names)}; give the --out "
                         "of a run")
    write_whole(folder / "report.html", page(folder))
    if text := results_table(read(folder, "summary.json", SUMMARY)):
        write_whole(folder / "report.md", text + "\n")
    return folder / "report.html"


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not arguments[0] or arguments[0].startswith("-"):
        raise ValueError("give one run folder: python -m aya_min.report RUN")
    if not is_spare_rank():
        print(write_report(arguments[0]))


if __name__ == "__main__":
    guarded(main, "aya_min.report")
