"""The report's drawings: strings of HTML with inline SVG, made of plain numbers. report.py chooses them.

A track is one row of a chart: marks on a horizontal scale, x in percent of the width and y in pixels, so that
a phone gets a narrower chart instead of smaller letters. Its label and value are text beside it. `curves` and
`scatter` draw in a fixed box. Series differ by shape or dash as well as by colour, and the <title> of each
mark says its values.
"""

import html
import math

ROW = 26            # height of a track, pixels
BOX = 150, 80       # width and height of the plot in `curves`, in units of its view box
MAX_POINTS = 200    # of a curve
MAX_TICKS = 20      # of an axis

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b1f24; --dim: #59626e;
  --rule: #dde1e6; --a: #1f66b4; --b: #b4510a; --heat: 31 102 180; --full: .62 }
@media (prefers-color-scheme: dark) { :root { --paper: #12151a; --card: #1a1e25; --ink: #e8eaed;
  --dim: #a3abb6; --rule: #343a44; --a: #6cb0ff; --b: #ff9d57; --heat: 108 176 255; --full: .48 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Noto Sans", sans-serif }
main { max-width: 1120px; margin: auto; padding: 28px 16px 64px }
h1 { font-size: 15px; font-weight: 600; color: var(--dim); margin: 0 0 8px }
.headline { font-size: clamp(21px, 3.4vw, 31px); line-height: 1.28; font-weight: 600;
  letter-spacing: -.01em; margin: 0 0 12px }
.headline b { color: var(--a) }
.headline.sampled { font-size: 16px; font-weight: 400; letter-spacing: 0; color: var(--dim) }
h2 { font-size: 20px; margin: 44px 0 4px }
p { margin: 0 0 12px; max-width: 100ch; text-wrap: pretty }
.note, .legend { color: var(--dim); font-size: 13.5px }
.warning { border-left: 4px solid var(--b); padding: 8px 14px; background: var(--card); font-weight: 600 }
.legend span, .sign span { display: inline-flex; align-items: center; gap: 6px; margin-right: 18px }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  align-items: start }
.forest:first-child:nth-last-child(odd):not(:only-child) { grid-column: 1 / -1 }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)) }
.curves { gap: 10px 14px; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)) }
figure { margin: 0; min-width: 0 }
.card, .scroll, .answers { background: var(--card); border: 1px solid var(--rule); border-radius: 10px }
.card { padding: 14px 16px 10px; display: grid; grid-template-columns: fit-content(42%) 1fr max-content;
  gap: 0 12px; align-items: center }
.card > :not(.row) { grid-column: 1 / -1 }
figcaption { font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere }
.curve figcaption { font-size: 12.5px; line-height: 1.25; margin: 0 0 2px }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; width: 100% }
th, td { padding: 6px 8px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule) }
thead tr:first-child th { border-top: 0 }
thead th { color: var(--dim); font-weight: 600; font-size: 12.5px; vertical-align: bottom }
a { color: var(--a) } .claims .sign { text-align: left }
td.text, th.text { text-align: left; white-space: normal; min-width: 180px }
.claim { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 8px 0;
  padding: 8px 14px }
.claim summary { font-size: 15px; margin: 0; overflow: hidden } summary .sign { float: right }
.name { text-align: left; position: sticky; left: 0; background: var(--card); font-weight: 600;
  white-space: normal; min-width: 118px }
td small { display: block; font-weight: 400; color: var(--dim); font-size: 11.5px; line-height: 1.2 }
td.first, th.first { border-left: 1px solid var(--rule) }
td.clear { font-weight: 700 }
th.within { color: var(--dim); font-size: 12.5px; padding-top: 14px }
.heat td { background: rgb(var(--heat) / calc(var(--share, 0) * var(--full))); text-align: center;
  min-width: 52px; padding: 3px 8px }
.heat th { padding: 3px 10px } .heat thead th { text-align: center; white-space: normal; padding: 8px 6px }
.heat td.home { box-shadow: inset 0 0 0 2px var(--ink) }
.row { display: contents; font-size: 13.5px }
.label { line-height: 1.15; overflow-wrap: anywhere }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.within { color: var(--dim); font-size: 12.5px; font-weight: 600; padding-top: 8px }
svg { display: block; overflow: visible } .track { width: 100% }
svg text { font-size: 11px; fill: var(--dim); text-anchor: middle }
svg .left { text-anchor: end }
svg .begin { text-anchor: start }
.a { --tone: var(--a) } .b { --tone: var(--b) }
g line { stroke: var(--tone); stroke-width: 1.5 }
g rect { fill: var(--tone); opacity: .6 }
g .whisker { stroke: var(--ink) }
.point { fill: var(--tone); opacity: .5 }
.dot { fill: var(--tone); stroke: var(--tone) }
.ring, .diamond { fill: var(--card); stroke: var(--tone); stroke-width: 2 }
.reference { stroke: var(--dim); stroke-dasharray: 3 3 }
.connector { stroke: var(--dim) }
.frame { fill: none; stroke: var(--rule) }
polyline { fill: none; stroke: var(--tone); stroke-width: 1.6; stroke-linejoin: round }
.b polyline { stroke-dasharray: 4 3 }
.answers { padding: 12px 16px } .answers header { color: var(--dim); font-size: 13px; margin-bottom: 4px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto;
  max-width: none; margin: 0 }
.prompt { font-weight: 600 }
.answer { border-top: 1px solid var(--rule); padding-top: 7px; margin-top: 9px }
.answer span { color: var(--dim); font-size: 13px }
.answer i { font-style: normal; letter-spacing: 1px; color: var(--a) }
@media (max-width: 560px) {
  .forest { grid-template-columns: 1fr max-content }
  .forest .row > :first-child { grid-column: 1 / -1; margin-top: 5px } }
details { margin-top: 44px }
summary { cursor: pointer; font-weight: 600; font-size: 20px; margin-bottom: 8px }
details td { text-align: left; white-space: normal; overflow-wrap: anywhere }
code { font-size: 13px; overflow-wrap: anywhere }
"""

SHAPES = {          # around (0, 0); a nested <svg x="37%"> moves each to its place
    "dot": '<circle r="4"/>',
    "ring": '<circle r="4"/>',
    "diamond": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0Z"/>',
    "point": '<circle r="2"/>',
}


# ---- texts -------------------------------------------------------------------------------------------------

def esc(text):
    """Any text as HTML text or attribute value; what is shown comes from models and from users' files."""
    return html.escape(str(text), quote=True)


def finite(value):
    """Whether a value is a number that can be drawn; nothing that is measured is beyond 1e100."""
    return isinstance(value, (int, float)) and -1e100 < value < 1e100


def number(value, digits=1):
    """'1,234.5', or a dash for what was not measured (None, NaN)."""
    return f"{value:,.{digits}f}" if finite(value) else "–"


def short(value):
    """A few digits, for axes and counts: 0.6234 -> 0.623, 12345 -> 12.35k, 1234567 -> 1.235M."""
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval_text(interval, digits=1):
    """'[48.2, 53.1]'; "" for no interval."""
    if not has_ends(interval):
        return ""
    return f"[{number(interval[0], digits)}, {number(interval[1], digits)}]"


def has_ends(interval):
    return bool(interval) and all(map(finite, interval))


def clock(seconds):
    """'7.5 s', '3 min 20 s' or '1 h 02 min'."""
    if not finite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ---- tracks ------------------------------------------------------------------------------------------------

def around(middle, values, step=5):
    """A scale (low, high) in whole steps that holds all values and one step on each side of `middle`.

    middle: the value of no effect.
    """
    values = [value for value in values if finite(value)] + [middle - step, middle + step]
    return step * math.floor(min(values) / step), step * math.ceil(max(values) / step)


def place(value, scale):
    """Where a value lies on the scale, in percent of the width."""
    low, high = scale
    return f"{100 * min(1, max(0, (value - low) / (high - low))):.2f}%"


def mark(value, scale, shape="dot", y=ROW // 2, tone="a", tip="", interval=None):
    """One value as a shape, with its interval as a whisker. tone: the class of its colour, "a" or "b"."""
    if not finite(value):
        return ""
    whisker = ""
    if has_ends(interval):
        low, high = (place(end, scale) for end in interval)
        ends = "".join(f'<line x1="{x}" x2="{x}" y1="{y - 3}" y2="{y + 3}"/>' for x in (low, high))
        whisker = f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>{ends}'
    drawn = f'<svg x="{place(value, scale)}" y="{y}" class="{shape}">{SHAPES[shape]}</svg>'
    return f'<g class="{tone}"><title>{esc(tip)}</title>{whisker}{drawn}</g>'


def bar(value, scale, tip="", interval=None):
    """A bar from the scale's low end to the value, with its interval as a whisker."""
    if not finite(value):
        return ""
    whisker = ""
    if has_ends(interval):
        low, high = (place(end, scale) for end in interval)
        whisker = f'<line class="whisker" x1="{low}" x2="{high}" y1="13" y2="13"/>'
    drawn = f'<rect y="6" height="14" rx="2" width="{place(value, scale)}"/>'
    return f'<g class="a"><title>{esc(tip)}</title>{drawn}{whisker}</g>'


def connector(start, end, scale):
    """The thin line between two marks of one row."""
    if not (finite(start) and finite(end)):
        return ""
    return f'<line class="connector" x1="{place(start, scale)}" x2="{place(end, scale)}" y1="13" y2="13"/>'


def track(label, drawn, figure, scale, reference=None, height=ROW):
    """One row: its label, its marks, its value as text. The reference line runs through all rows."""
    line = ""
    if reference is not None:
        at = place(reference, scale)
        line = f'<line class="reference" x1="{at}" x2="{at}" y1="0" y2="{height}"/>'
    return (f'<div class="row"><span class="label">{esc(label)}</span>'
            f'<svg class="track" height="{height}" role="img" aria-label="{esc(label)}: {esc(figure)}">'
            f'{line}{drawn}</svg><span class="figure">{esc(figure)}</span></div>')


def axis(scale, step, unit=""):
    """The numbers below a chart: multiples of `step`, which is doubled until about MAX_TICKS are left."""
    while scale[1] - scale[0] > MAX_TICKS * step:
        step *= 2
    ticks = [step * i for i in range(math.ceil(scale[0] / step), math.floor(scale[1] / step) + 1)]
    units = [""] * (len(ticks) - 1) + [unit]        # only the last number has its unit
    texts = "".join(f'<text x="{place(tick, scale)}" y="12">{tick:g}{shown}</text>'
                    for tick, shown in zip(ticks, units))
    return ('<div class="row axis"><span></span><svg class="track" height="16" aria-hidden="true">'
            f'{texts}</svg><span></span></div>')


def within(text):
    """A heading between the rows of a chart."""
    return f'<div class="within">{esc(text)}</div>'


def chart(title, rows, kind="card"):
    """Tracks, the headings between them and an axis, under a title."""
    return f'<figure class="{kind}"><figcaption>{esc(title)}</figcaption>{"".join(rows)}</figure>'


def legend(*entries):
    """What the shapes mean. entries: (shape, tone, meaning)."""
    return f'<p class="legend">{"".join(sign(*entry) for entry in entries)}</p>'


def sign(shape, tone, meaning):
    """A shape and what it means."""
    return (f'<span><svg width="14" height="14" class="key" aria-hidden="true"><g class="{tone}">'
            f'<svg x="7" y="7" class="{shape}">{SHAPES[shape]}</svg></g></svg> {esc(meaning)}</span>')


# ---- curves and points in a box ----------------------------------------------------------------------------

def downsample(points, limit=MAX_POINTS):
    """At most `limit` points: [(x, y)] is divided into `limit` even stretches, and each gives its mean."""
    if len(points) <= limit:
        return points
    cuts = [len(points) * i // limit for i in range(limit + 1)]
    return [tuple(sum(values) / len(values) for values in zip(*points[a:b])) for a, b in zip(cuts, cuts[1:])]


def box_scale(xs, ys, box, margin):
    """at(x, y), a point's coordinates in a box (width, height) that just holds xs and ys inside its margin.

    Both scales are the data's own: a loss has no natural zero.
    """
    width, height = box
    left, top = min(xs), max(ys)
    wide = max(xs) - left or 1
    tall = top - min(ys) or 1

    def at(x, y):
        return (margin + (width - 2 * margin) * (x - left) / wide,
                margin + (height - 2 * margin) * (top - y) / tall)
    return at


def curves(title, series, marks=False, box=BOX):
    """Curves over steps or rounds; the ends of both scales are written beside them. "" without points.

    series: [(name, [(x, y), ...], tone)]; tone "b" is drawn dashed. marks: whether every point gets a shape.
    """
    series = [(name, [(x, y) for x, y in points if finite(x) and finite(y)], tone)
              for name, points, tone in series]
    xs = [x for _, points, _ in series for x, _ in points]
    if not xs:
        return ""
    series = [(name, downsample(points), tone) for name, points, tone in series]
    ys = [y for _, points, _ in series for _, y in points]
    at = box_scale(xs, ys, box, 4)
    drawn = ""
    for name, points, tone in series:
        shape = "diamond" if tone == "b" else "dot"
        drawing = SHAPES[shape] if marks else '<circle r="2"/>'
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
        dots = ""
        for x, y in points if marks or tone == "b" or len(points) == 1 else ():
            left, top = at(x, y)
            dots += (f'<svg x="{left:.1f}" y="{top:.1f}" class="{shape}">'
                     f'<title>{esc(name)} at {short(x)}: {short(y)}</title>{drawing}</svg>')
        drawn += f'<g class="{tone}"><title>{esc(name)}</title><polyline points="{path}"/>{dots}</g>'
    ends = "; ".join(f"{name} {short(points[0][1])} to {short(points[-1][1])}"
                     for name, points, _ in series if points)
    width, height = box
    first, last, low, high = min(xs), max(xs), min(ys), max(ys)
    return (f'<figure class="curve"><figcaption>{esc(title)}</figcaption>'
            f'<svg viewBox="-36 -2 {width + 40} {height + 18}" role="img" '
            f'aria-label="{esc(title)}: {esc(ends)}">'
            f'<path class="frame" d="M0 0V{height}H{width}"/>{drawn}'
            f'<text class="left" x="-3" y="9">{short(high)}</text>'
            f'<text class="left" x="-3" y="{height}">{short(low) if high > low else ""}</text>'
            f'<text class="begin" x="0" y="{height + 13}">{short(first)}</text>'
            f'<text class="left" x="{width}" y="{height + 13}">{short(last) if last > first else ""}</text>'
            '</svg></figure>')


def scatter(title, labels, series, front, box=(400, 260)):
    """Points in a plane, better to the right and to the top; the ends of both scales are written beside them.

    labels: of x and y. series: [(shape, tone, [(x, y, tip), ...])]. front: [(x, y), ...], joined by a dashed
    line. "" without points.
    """
    xs = [x for _, _, points in series for x, _, _ in points]
    ys = [y for _, _, points in series for _, y, _ in points]
    if not xs:
        return ""
    at = box_scale(xs, ys, box, 8)
    path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in sorted(front))
    drawn = f'<g class="b"><polyline points="{path}"/></g>'
    for shape, tone, points in series:
        shapes = ""
        for x, y, tip in points:
            left, top = at(x, y)
            shapes += (f'<svg x="{left:.1f}" y="{top:.1f}" class="{shape}">'
                       f'<title>{esc(tip)}: {short(x)}, {short(y)}</title>{SHAPES[shape]}</svg>')
        drawn += f'<g class="{tone}">{shapes}</g>'
    width, height = box
    first, last, low, high = (short(end) for end in (min(xs), max(xs), min(ys), max(ys)))
    said = f"{labels[0]} from {first} to {last}, {labels[1]} from {low} to {high}"
    return (f'<figure class="curve"><figcaption>{esc(title)}</figcaption>'
            f'<svg viewBox="-44 -16 {width + 48} {height + 34}" role="img" '
            f'aria-label="{esc(title)}: {esc(said)}">'
            f'<path class="frame" d="M0 0V{height}H{width}"/>{drawn}'
            f'<text class="begin" x="-40" y="-5">{esc(labels[1])}</text>'
            f'<text class="left" x="-3" y="12">{high}</text>'
            f'<text class="left" x="-3" y="{height}">{low}</text>'
            f'<text class="begin" x="0" y="{height + 14}">{first}</text>'
            f'<text x="{width // 2}" y="{height + 14}">{esc(labels[0])}</text>'
            f'<text class="left" x="{width}" y="{height + 14}">{last}</text></svg></figure>')


def reliability(title, name, bins, tone="a", box=(220, 220)):
    """A net's accuracy against its confidence, both from 0 to 1, beside the diagonal, on which a calibrated
    net lies.

    bins: [(number of answers, mean confidence, accuracy), ...]; the area of a point is its share of them.
    """
    (width, height), total = box, sum(num for num, _, _ in bins)
    points = [(f"{width * x:.1f}", f"{height * (1 - y):.1f}") for _, x, y in bins]
    dots = "".join(
        f'<circle class="point" cx="{left}" cy="{top}" r="{2 + 14 * (num / total) ** 0.5:.1f}">'
        f"<title>{esc(name)}: {num} answers of confidence {x:.3f}, {100 * y:.1f}% right</title></circle>"
        for (left, top), (num, x, y) in zip(points, bins))
    said = ", ".join(f"{x:.2f} {y:.2f}" for _, x, y in bins)
    return (f'<figure class="curve"><figcaption>{esc(title)}</figcaption>'
            f'<svg viewBox="-44 -16 {width + 48} {height + 34}" role="img" '
            f'aria-label="{esc(title)}; confidence and accuracy: {esc(said)}">'
            f'<path class="frame" d="M0 0V{height}H{width}"/>'
            f'<line class="reference" x1="0" y1="{height}" x2="{width}" y2="0"/>'
            f'<g class="{tone}"><polyline points="{" ".join(map(",".join, points))}"/>{dots}</g>'
            '<text class="begin" x="-40" y="-5">accuracy</text><text class="left" x="-3" y="12">1</text>'
            f'<text class="left" x="-3" y="{height}">0</text>'
            f'<text class="begin" x="0" y="{height + 14}">0</text>'
            f'<text x="{width // 2}" y="{height + 14}">confidence</text>'
            f'<text class="left" x="{width}" y="{height + 14}">1</text></svg></figure>')


# ---- parts of the page -------------------------------------------------------------------------------------

def html_page(title, body):
    """A whole page. Its policy forbids fetching and scripts, whatever a model wrote."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{esc(title)}</h1>\n"
            f"{body}</main></body></html>\n")


def grid(charts, kind="", key=""):
    """As many charts side by side as fit the page, under the key to their marks; "" without charts."""
    drawn = "".join(charts)
    return f'{key}<div class="grid {kind}">{drawn}</div>' if drawn else ""


def section(title, note, body):
    """A part of the page; "" without a body."""
    return f'<section><h2>{esc(title)}</h2><p class="note">{esc(note)}</p>{body}</section>' if body else ""


def html_table(head, body, kind=""):
    """Rows of HTML as a table that scrolls sideways on a narrow page. kind: its class."""
    name = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{name}><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def heat_map(columns, rows, ends=(0, 1)):
    """A table whose cells are shaded by their share, between the shares `ends`.

    rows: (label, [(share from 0 to 1 or None, whether to outline it), ...]), or a text, which is a heading.
    """
    body, (low, high) = "", ends
    for row in rows:
        if isinstance(row, str):
            width = len(columns) + 1
            body += f'<tr><th class="name within" colspan="{width}" scope="rowgroup">{esc(row)}</th></tr>'
            continue
        label, cells = row
        body += f'<tr><th scope="row" class="name">{esc(label)}</th>'
        for share, home in cells:
            name = " class=home" if home else ""
            if finite(share):
                shade = min(1, max(0, (share - low) / (high - low)))
                body += f'<td style="--share:{shade:.3f}"{name}>{100 * share:.0f}</td>'
            else:
                body += "<td>–</td>"
        body += "</tr>"
    head = "".join(f'<th scope="col">{esc(column)}</th>' for column in columns)
    return html_table(f'<tr><th class="name"></th>{head}</tr>', body, "heat")
