"""The report's main table, every model under every decoding: as markdown (terminal, report.md) and HTML."""

from .report_charts import esc, finite, html_table, interval_text, number, section
from .report_data import (DECODINGS, KINDS, by_kind, has_win_rates, judged_by, parts_of, scored_by, title,
                          versus)


def columns(summary):
    """[(heading, digits, cell)] of the columns for which some model has a value.

    cell(part) gives (value, interval or None) of a model's figures under one decoding.
    """
    score, heading = scored_by(summary)

    def mean_score(part):
        return part.get(score), part.get(f"{score}_ci95")

    def win_rate(opponent):
        return lambda part: (versus(part, opponent).get("win_rate"), versus(part, opponent).get("ci95"))

    def right_language(part):
        share = part.get("right_language")
        return (100 * share if finite(share) else None), None

    def figure(name):
        return lambda part: (part.get(name), None)

    opponents = ("base", "previous", "single") if has_win_rates(summary) else ()
    found = [(heading, 2, mean_score),
             *((f"vs {name}", 1, win_rate(name)) for name in opponents),
             ("right language %", 1, right_language),
             ("length", 0, figure("length")), ("cut", 0, figure("cut"))]
    return [column for column in found if any(finite(column[2](part)[0]) for part in parts_of(summary))]


def results_table(summary):
    """The main table as aligned markdown, one row for each model and decoding; "" without models.

    Win rates are in percent, a tie counts as half a win.
    """
    shown = columns(summary)
    rows = [["model", "decoding"] + [heading for heading, _, _ in shown]]
    for _, models in by_kind(summary):
        for model in models:
            rows += [table_row(model, decoding, shown) for decoding in DECODINGS if decoding in model]
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    rows.insert(1, rule)
    lines = []
    for row in rows:
        cells = [f"{cell:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("| " + " | ".join(cells) + " |")
    note = judged_by(summary)
    return "\n".join(lines) + (f"\n\n{note}" if note else "")


def table_row(model, decoding, shown):
    row = [title(model).replace("|", "\\|").replace("\n", " "), decoding]
    for heading, digits, cell in shown:
        value, ci = cell(model[decoding])
        bounds = interval_text(ci, digits) if heading.startswith("vs ") else ""
        row.append(f"{number(value, digits)} {bounds}".strip())
    return row


def table_part(summary):
    """The same table as HTML: greedy beside sampled, intervals below the values, arrows if clear of 50."""
    shown = columns(summary)
    if not shown:
        return ""
    decodings = [d for d in DECODINGS if any(d in model for model in summary.get("models", []))]
    body = ""
    for kind, models in by_kind(summary):
        width = 1 + len(shown) * len(decodings)
        body += f'<tr><th class="name within" colspan="{width}">{esc(KINDS.get(kind, kind))}</th></tr>'
        for model in models:
            cells = "".join(table_cell(model.get(d, {}), column, d == decodings[0])
                            for column in shown for d in decodings)
            body += f'<tr><th scope="row" class="name">{esc(title(model))}</th>{cells}</tr>'
    head = "".join(f'<th scope="colgroup" colspan="{len(decodings)}" class="first">{esc(heading)}</th>'
                   for heading, _, _ in shown)
    below = "".join(f'<th class="{"first" if d == decodings[0] else ""}">{d}</th>'
                    for _ in shown for d in decodings)
    head = f'<tr><th rowspan="2" class="name">model</th>{head}</tr><tr>{below}</tr>'
    return section("Every model", table_note(summary), html_table(head, body))


def table_cell(part, column, is_first):
    heading, digits, cell = column
    value, ci = cell(part)
    bounds = interval_text(ci, digits)
    arrow = ""
    if bounds and heading.startswith("vs "):
        arrow = "▲ " if ci[0] > 50 else "▼ " if ci[1] < 50 else ""
    name = ("first" if is_first else "") + (" clear" if arrow else "")
    return f'<td class="{name}">{arrow}{number(value, digits)}<small>{bounds}</small></td>'


def table_note(summary):
    note = ""
    if has_win_rates(summary):
        note = "Win rates in percent with 95% intervals; ▲ ▼: the whole interval is above or below 50. "
    note += "Length in characters; cut: answers that ended at the limit of new tokens."
    compared = [rates for part in parts_of(summary) for rates in part.get("versus", {}).values()]
    unjudged = sum(rates["unjudged"] for rates in compared if finite(rates.get("unjudged")))
    return note + (f" {unjudged} comparisons could not be judged and are left out." if unjudged else "")
