"""What claims found, drawn: the page of one claim file, and one page of all records in results/.

    python -m aya_min.claims page          writes runs/claims.html from the records

A record is what experiments_records keeps: {"claims", "paper", "seeds", "results", "arms", ...}.
"""

from collections import Counter

from .report_charts import (around, axis, chart, esc, grid, heat_map, html_page, html_table, legend, mark,
                            sign, track)

SHAPE_OF = {"shown": ("dot", "a"), "not shown": ("ring", "b"), "reversed": ("diamond", "b")}
KEY = legend(*((*mark, said) for said, mark in SHAPE_OF.items()))


# ---- one claim ---------------------------------------------------------------------------------------------

def shown(one, digits=1):
    """"53.6 [52.1, 55.0]" of what `measured` gave."""
    low, high = one["ci95"]
    digits = digits if max(map(abs, (one["value"], low, high))) >= 10 else 3
    return f"{one['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def labelled(row):
    """The label of a comparison; that of a figure says the side that is expected, too."""
    if row["measure"] != "figure":
        return row["label"]
    side = {"above": "above", "below": "below", "level": "level with"}[row["side"]]
    return f"{row['label']}, expected {side} {row['seeds'][0]['none']:g}"


def ours(claim):
    """The numbers of a claim's first comparison that is not shown, else of its first, seed by seed, and how
    many of its comparisons are shown."""
    rows = claim["comparisons"]
    row = next((row for row in rows if row["verdict"] != "shown"), rows[0])
    first = f"{labelled(row)}: {'; '.join(map(shown, row['seeds']))}"
    num = sum(row["verdict"] == "shown" for row in rows)
    return first if len(rows) == 1 else f"{first}. {num} of {len(rows)} comparisons are shown"


def preset_of(record):
    """"preset tiny", with the settings that --config changed."""
    changed = ", ".join(f"{name} {value}" for name, value in record.get("changed", {}).items())
    return f"preset {record['preset']}" + (f" with {changed}" if changed else "")


def forest(claim, seeds):
    """A claim's comparisons, each with one mark a seed; those with the same value of no difference share a
    chart."""
    charts = []
    for none in dict.fromkeys(row["seeds"][0]["none"] for row in claim["comparisons"]):
        rows = [row for row in claim["comparisons"] if row["seeds"][0]["none"] == none]
        bounds = [bound for row in rows for one in row["seeds"] for bound in one["ci95"]]
        wide = max(*bounds, none) - min(*bounds, none)
        step = 5 if none == 50 else float(f"{(wide or 1) / 4:.1g}")
        scale = around(none, bounds, step)
        drawn = [forest_row(row, seeds, scale, none) for row in rows] + [axis(scale, step)]
        charts.append(chart("win rate, %" if none == 50 else f"beside {none:g}", drawn, "card forest"))
    return "".join(charts)


def forest_row(row, seeds, scale, none):
    marks = ""
    for i, (seed, one) in enumerate(zip(seeds, row["seeds"])):
        tip = f"seed {seed}: {shown(one)}"
        shape, tone = SHAPE_OF[one["verdict"]]
        marks += mark(one["value"], scale, shape, 10 + 12 * i, tone, tip, one["ci95"])
    label, height = f"{labelled(row)}: {row['verdict']}", 12 * len(seeds) + 10
    return track(label, marks, " / ".join(f"{one['value']:.3g}" for one in row["seeds"]), scale, none, height)


def drawn(claim, seeds):
    """The pictures of a claim, one a seed."""
    maps = [f"<figure><figcaption>seed {esc(str(seed))}, %</figcaption>{heat_map(**picture)}</figure>"
            for seed, picture in zip(seeds, claim.get("pictures", ()))]
    return grid(maps)


def arms_table(record):
    """Steps, tokens and seconds of every arm, a column a seed."""
    names = dict.fromkeys(arm for arms in record["arms"].values() for arm in arms)
    body = ""
    for name in names:
        cells = (", ".join(f"{arms[name][key]:,}" for key in ("steps", "tokens", "seconds"))
                 if name in arms else "" for arms in record["arms"].values())
        body += f"<tr><th>{esc(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th>seed {esc(str(seed))}: steps, tokens, seconds</th>" for seed in record["seeds"])
    return html_table(f"<tr><th>arm</th>{head}</tr>", body)


# ---- pages -------------------------------------------------------------------------------------------------

TITLE = "aya_min: what papers say, tried"
HOW_TO_READ = ("Whiskers are 95% intervals over questions (of figures of training over its steps, as if "
               "these were independent; a figure that is one number has none); the dashed line is no "
               "difference, or what a figure is held against; the marks of a row, from top to bottom, are "
               "its seeds. A framed cell of a heat map is a task that is done, a width that is exact, the "
               "greatest of its row, a domain's own expert, or a learner that is not trained.")


def source(claim):
    """What the paper says of a claim, or that the claim is ours."""
    theirs = claim["theirs"]
    return theirs if theirs.startswith(("ours", "not in")) else f"the paper: {theirs}"


def page(record, differing):
    """The whole text of a claim file's report.html. differing: of experiments_matched.py."""
    body = (f"<p>{esc(record['paper'])}. P{esc(preset_of(record)[1:])}, "
            f"seeds {esc(' '.join(map(str, record['seeds'])))}. {HOW_TO_READ}</p>{KEY}")
    for claim in record["results"]:
        body += (f"<h2>{esc(claim['name'])}: {esc(claim['verdict'])}</h2><p>{esc(claim['statement'])}. "
                 f"({esc(source(claim))}) {esc(differing.get(claim['name'], ''))}</p>"
                 + forest(claim, record["seeds"])
                 + drawn(claim, record["seeds"]))
    body += f"<h2>Arms</h2>{arms_table(record)}<p><code>{esc(record['command'])}</code></p>"
    return html_page(record["claims"], body)


def all_claims(records, differing, without=()):
    """The whole text of one page of records, {file: record}: a table of verdicts, then each claim, folded.
    differing: {file: what experiments_matched.differing gives of its record}. without: names of claims that
    have no record."""
    verdicts = Counter(claim["verdict"] for record in records.values() for claim in record["results"])
    num, files = sum(verdicts.values()), len(records)
    counts = ", ".join(f"{verdicts[name]} {name}" for name in SHAPE_OF)
    rest = f" Without a record: {', '.join(without)}." if without else ""
    body = (f'<p class="headline">What papers say, tried: {num} claims of {files} files, {counts}.</p>'
            "<p>A claim is shown if the 95% interval of every comparison, in every seed, is clear of no "
            "difference on the side that the paper expects; reversed, if all are on the other side. Where "
            "the paper expects a level, the interval must lie within 5 points of a win rate of 50, or within "
            "5% of what any other figure is held against. Models are small and the embedded world is simple: "
            "a claim that is not shown here may hold at the paper's size. Arms that are compared have the "
            f"same start, steps, tokens and tuning, or the claim says what differs, and why.{esc(rest)}</p>"
            f"{KEY}{overview(records)}<p>{HOW_TO_READ}</p>")
    for file, record in records.items():
        versions, machine = record["versions"], record["machine"]
        body += (f'<section id="{esc(file)}"><h2>{esc(record["paper"])}</h2><p class="note"><code>'
                 f"{esc(record['command'])}</code>, {esc(preset_of(record))}, commit "
                 f"{esc(versions['commit'])}, torch {esc(versions['torch'])}, {esc(machine['processor'])}, "
                 f"{esc(machine['threads'])} threads, {sum(record['minutes']):.0f} minutes</p>"
                 + "".join(folded(claim, record["seeds"], differing[file].get(claim["name"], ""))
                           for claim in record["results"])
                 + f"<details class=claim><summary>Arms: steps, tokens, seconds</summary>{arms_table(record)}"
                 + "</details>"
                 + "</section>")
    return html_page(TITLE, body)


def overview(records):
    """A row a claim: its paper, statement, their figure, ours by seed, the verdict."""
    body = ""
    for file, record in records.items():
        body += (f'<tr><th class="name within" colspan="4" scope="rowgroup"><a href="#{esc(file)}">'
                 f"{esc(record['paper'])}</a></th></tr>")
        for claim in record["results"]:
            verdict = sign(*SHAPE_OF[claim["verdict"]], claim["verdict"])
            body += (f'<tr><th class="name" scope="row">{esc(claim["statement"])}</th>'
                     f'<td class="text">{esc(claim["theirs"])}</td>'
                     f'<td class="text"><small>{esc(ours(claim))}</small></td>'
                     f'<td class="sign">{verdict}</td></tr>')
    head = ('<tr><th class="name">claim</th><th class="text">the paper\'s figure</th>'
            '<th class="text">ours, by seed</th><th class="sign">verdict</th></tr>')
    return html_table(head, body, "claims")


def folded(claim, seeds, differing):
    """A claim under its statement and verdict, opened by a click. differing: what its arms differ in."""
    verdict = sign(*SHAPE_OF[claim["verdict"]], claim["verdict"])
    return (f"<details class=claim><summary>{esc(claim['statement'])} <span class=sign>{verdict}</span>"
            "</summary>"
            f"<p>({esc(source(claim))}) {esc(differing)}</p>{forest(claim, seeds)}{drawn(claim, seeds)}"
            "</details>")
