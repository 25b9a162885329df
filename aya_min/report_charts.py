"""The report's drawings: strings of HTML with inline SVG, made from plain numbers; report.py decides what is drawn.

Two kinds. A track is one row's marks on a horizontal scale: x in percent of whatever width the page gives it and y in pixels, so a
phone gets a narrower chart and not smaller letters; label and figure stand beside it as text. `lines` are curves in a fixed box.
Series differ by shape or dash as well as by colour (dot and diamond, full and broken line), and each mark's <title> says its numbers.
"""

import html
import math

ROW = 26            # height of a track, pixels
BOX = 150, 80        # width and height of the plot in `lines`, in units of its view box
MAX_POINTS = 200    # to a curve
MAX_TICKS = 20      # to an axis

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b1f24; --dim: #59626e; --rule: #dde1e6; --a: #1f66b4; --b: #b4510a;
  --heat: 31 102 180; --full: .62 }
@media (prefers-color-scheme: dark) { :root { --paper: #12151a; --card: #1a1e25; --ink: #e8eaed; --dim: #a3abb6; --rule: #343a44; --a: #6cb0ff;
  --b: #ff9d57; --heat: 108 176 255; --full: .48 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Noto Sans", sans-serif }
main { max-width: 1120px; margin: auto; padding: 28px 16px 64px }
h1 { font-size: 15px; font-weight: 600; color: var(--dim); margin: 0 0 8px }
.headline { font-size: clamp(21px, 3.4vw, 31px); line-height: 1.28; font-weight: 600; letter-spacing: -.01em; margin: 0 0 12px }
.headline b { color: var(--a) } .headline.sampled { font-size: 16px; font-weight: 400; letter-spacing: 0; color: var(--dim) }
h2 { font-size: 20px; margin: 44px 0 4px }
p { margin: 0 0 12px; max-width: 100ch; text-wrap: pretty }
.note, .legend { color: var(--dim); font-size: 13.5px }
.warning { border-left: 4px solid var(--b); padding: 8px 14px; background: var(--card); font-weight: 600 }
.legend span { display: inline-flex; align-items: center; gap: 6px; margin-right: 18px }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); align-items: start }
.forest:first-child:nth-last-child(odd):not(:only-child) { grid-column: 1 / -1 }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)) }
.curves { gap: 10px 14px; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)) }
figure { margin: 0; min-width: 0 }
.card, .scroll, .answers { background: var(--card); border: 1px solid var(--rule); border-radius: 10px }
.card { padding: 14px 16px 10px; display: grid; grid-template-columns: fit-content(42%) 1fr max-content; gap: 0 12px; align-items: center }
.card > :not(.row) { grid-column: 1 / -1 }
figcaption { font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere }
.curve figcaption { font-size: 12.5px; line-height: 1.25; margin: 0 0 2px }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; width: 100% }
th, td { padding: 6px 8px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule) }
thead tr:first-child th { border-top: 0 }
thead th { color: var(--dim); font-weight: 600; font-size: 12.5px; vertical-align: bottom }
.name { text-align: left; position: sticky; left: 0; background: var(--card); font-weight: 600;
  white-space: normal; min-width: 118px }
td small { display: block; font-weight: 400; color: var(--dim); font-size: 11.5px; line-height: 1.2 }
td.first, th.first { border-left: 1px solid var(--rule) }
td.clear { font-weight: 700 }
th.within { color: var(--dim); font-size: 12.5px; padding-top: 14px }
.heat td { background: rgb(var(--heat) / calc(var(--share, 0) * var(--full))); text-align: center; min-width: 52px; padding: 3px 8px }
.heat th { padding: 3px 10px } .heat thead th { text-align: center; white-space: normal; padding: 8px 6px }
.heat td.home { box-shadow: inset 0 0 0 2px var(--ink) }
.row { display: contents; font-size: 13.5px }
.label { line-height: 1.15; overflow-wrap: anywhere }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.within { color: var(--dim); font-size: 12.5px; font-weight: 600; padding-top: 8px }
svg { display: block; overflow: visible } .track { width: 100% }
svg text { font-size: 11px; fill: var(--dim); text-anchor: middle } svg .left { text-anchor: end } svg .begin { text-anchor: start }
.a { --tone: var(--a) } .b { --tone: var(--b) }
g line { stroke: var(--tone); stroke-width: 1.5 } g rect { fill: var(--tone); opacity: .6 } g .whisker { stroke: var(--ink) }
.point { fill: var(--tone); opacity: .5 } .dot { fill: var(--tone); stroke: var(--tone) } .ring, .diamond { fill: var(--card); stroke: var(--tone); stroke-width: 2 }
.reference { stroke: var(--dim); stroke-dasharray: 3 3 } .join { stroke: var(--dim) } .frame { fill: none; stroke: var(--rule) }
polyline { fill: none; stroke: var(--tone); stroke-width: 1.6; stroke-linejoin: round } .b polyline { stroke-dasharray: 4 3 }
.answers { padding: 12px 16px } .answers header { color: var(--dim); font-size: 13px; margin-bottom: 4px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto; max-width: none; margin: 0 }
.prompt { font-weight: 600 }
.answer { border-top: 1px solid var(--rule); padding-top: 7px; margin-top: 9px }
.answer span { color: var(--dim); font-size: 13px } .answer i { font-style: normal; letter-spacing: 1px; color: var(--a) }
@media (max-width: 560px) {
  .forest { grid-template-columns: 1fr max-content }
  .forest .row > :first-child { grid-column: 1 / -1; margin-top: 5px } }
details { margin-top: 44px } summary { cursor: pointer; font-weight: 600; font-size: 20px; margin-bottom: 8px }
details td { text-align: left; white-space: normal; overflow-wrap: anywhere } code { font-size: 13px; overflow-wrap: anywhere }
"""

SHAPES = {          # around (0, 0); a nested <svg x="37%"> carries each to its place
    "dot": '<circle r="4"/>',
    "ring": '<circle r="4"/>',
    "diamond": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0Z"/>',
    "point": '<circle r="2"/>',
}


def esc(text):
    """Any text as HTML text or attribute value: what is shown comes from models and from users' files."""
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
    """'[48.2, 53.1]', "" where there is none."""
    return f"[{number(interval[0], digits)}, {number(interval[1], digits)}]" if interval and all(map(finite, interval)) else ""


def clock(seconds):
    """'7.5 s', '3 min 20 s' or '1 h 02 min'."""
    if not finite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def downsample(points, limit=MAX_POINTS):
    """At most `limit` points: each the mean of one of `limit` even stretches of [(x, y)]."""
    if len(points) <= limit:
        return points
    cuts = [len(points) * i // limit for i in range(limit + 1)]
    return [tuple(sum(values) / len(values) for values in zip(*points[a:b])) for a, b in zip(cuts, cuts[1:])]


def around(middle, values, step=5):
    """The scale (low, high) that holds all values and a step on either side of `middle`, the value of no effect, in whole steps."""
    values = [value for value in values if finite(value)] + [middle - step, middle + step]
    return step * math.floor(min(values) / step), step * math.ceil(max(values) / step)


def place(value, scale):
    """Where a value lies on the scale, as percent of the width."""
    low, high = scale
    return f"{100 * min(1, max(0, (value - low) / (high - low))):.2f}%"


def mark(value, scale, shape="dot", y=ROW // 2, tone="a", tip="", interval=None):
    """One value as a shape, its interval as a whisker under it. tone: the colour's class, "a" or "b"."""
    if not finite(value):
        return ""
    whisker = ""
    if interval and all(map(finite, interval)):
        low, high = (place(end, scale) for end in interval)
        whisker = f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>' + "".join(
            f'<line x1="{x}" x2="{x}" y1="{y - 3}" y2="{y + 3}"/>' for x in (low, high))
    drawn = f'<svg x="{place(value, scale)}" y="{y}" class="{shape}">{SHAPES[shape]}</svg>'
    return f'<g class="{tone}"><title>{esc(tip)}</title>{whisker}{drawn}</g>'


def bar(value, scale, tip="", interval=None):
    """A bar from the scale's low end, with a whisker."""
    if not finite(value):
        return ""
    whisker = ""
    if interval and all(map(finite, interval)):
        whisker = f'<line class="whisker" x1="{place(interval[0], scale)}" x2="{place(interval[1], scale)}" y1="13" y2="13"/>'
    return f'<g class="a"><title>{esc(tip)}</title><rect y="6" height="14" rx="2" width="{place(value, scale)}"/>{whisker}</g>'


def join(start, end, scale):
    """The thin line from one mark to another of the same row."""
    if not (finite(start) and finite(end)):
        return ""
    return f'<line class="join" x1="{place(start, scale)}" x2="{place(end, scale)}" y1="13" y2="13"/>'


def track(label, drawn, figure, scale, reference=None, height=ROW):
    """One row: what it is, its marks, its number. The reference line runs on from row to row."""
    line = ""
    if reference is not None:
        at = place(reference, scale)
        line = f'<line class="reference" x1="{at}" x2="{at}" y1="0" y2="{height}"/>'
    return (f'<div class="row"><span class="label">{esc(label)}</span><svg class="track" height="{height}" role="img" '
            f'aria-label="{esc(label)}: {esc(figure)}">{line}{drawn}</svg><span class="figure">{esc(figure)}</span></div>')


def axis(scale, step, unit=""):
    """The numbers under a chart of tracks: the multiples of `step` on its scale, of a larger step where they
    are many."""
    while scale[1] - scale[0] > MAX_TICKS * step:
        step *= 2
    ticks = [step * i for i in range(math.ceil(scale[0] / step), math.floor(scale[1] / step) + 1)]
    texts = "".join(f'<text x="{place(tick, scale)}" y="12">{tick:g}{unit if tick == ticks[-1] else ""}</text>' for tick in ticks)
    return f'<div class="row axis"><span></span><svg class="track" height="16" aria-hidden="true">{texts}</svg><span></span></div>'


def within(text):
    """A heading between the rows of a chart."""
    return f'<div class="within">{esc(text)}</div>'


def chart(title, rows, kind="card"):
    """Tracks, headings between them and an axis, under a title."""
    return f'<figure class="{kind}"><figcaption>{esc(title)}</figcaption>{"".join(rows)}</figure>'


def legend(*entries):
    """entries: (shape, tone, what it means)."""
    keys = [f'<span><svg width="14" height="14" class="key" aria-hidden="true"><g class="{tone}"><svg x="7" y="7" class="{shape}">'
            f'{SHAPES[shape]}</svg></g></svg> {esc(meaning)}</span>' for shape, tone, meaning in entries]
    return f'<p class="legend">{"".join(keys)}</p>'


def lines(title, series, marks=False, box=BOX):
    """Curves over steps or rounds. series: [(name, [(x, y), ...], tone)], tone "b" is drawn broken; marks: a shape on every point.

    The vertical scale is the data's own (a loss has no natural zero) and is written at its two ends.
    """
    series = [(name, [(x, y) for x, y in points if finite(x) and finite(y)], tone) for name, points, tone in series]
    xs = [x for _, points, _ in series for x, _ in points]
    if not xs:
        return ""
    series = [(name, downsample(points), tone) for name, points, tone in series]
    (width, height), ys = box, [y for _, points, _ in series for _, y in points]
    wide, tall = max(xs) - min(xs) or 1, max(ys) - min(ys) or 1
    drawn = ""
    for name, some, tone in series:
        at = [(4 + (width - 8) * (x - min(xs)) / wide, 4 + (height - 8) * (max(ys) - y) / tall) for x, y in some]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        shape = "diamond" if tone == "b" else "dot"
        drawing = SHAPES[shape] if marks else '<circle r="2"/>'
        dots = zip(at, some) if marks or tone == "b" or len(at) == 1 else ()
        drawn += f'<g class="{tone}"><title>{esc(name)}</title><polyline points="{path}"/>' + "".join(
            f'<svg x="{x:.1f}" y="{y:.1f}" class="{shape}"><title>{esc(name)} at {short(step)}: {short(value)}</title>'
            f'{drawing}</svg>' for (x, y), (step, value) in dots) + "</g>"
    ends = "; ".join(f"{name} {short(some[0][1])} to {short(some[-1][1])}" for name, some, _ in series if some)
    return (f'<figure class="curve"><figcaption>{esc(title)}</figcaption>'
            f'<svg viewBox="-36 -2 {width + 40} {height + 18}" role="img" aria-label="{esc(title)}: {esc(ends)}">'
            f'<path class="frame" d="M0 0V{height}H{width}"/>{drawn}<text class="left" x="-3" y="9">{short(max(ys))}</text>'
            f'<text class="left" x="-3" y="{height}">{short(min(ys)) if max(ys) > min(ys) else ""}</text>'
            f'<text class="begin" x="0" y="{height + 13}">{short(min(xs))}</text>'
            f'<text class="left" x="{width}" y="{height + 13}">{short(max(xs)) if max(xs) > min(xs) else ""}</text></svg></figure>')


def scatter(title, labels, series, front, box=(400, 260)):
    """Points (x, y) in a plane, more is better on both axes. labels: of x and y. series: [(shape, tone, [(x, y, tip), ...])]; front: [(x, y), ...], joined.

    Both scales are the data's own and are written at their ends.
    """
    xs, ys = ([point[i] for _, _, points in series for point in points] for i in (0, 1))
    if not xs:
        return ""
    (width, height), wide, tall = box, max(xs) - min(xs) or 1, max(ys) - min(ys) or 1

    def at(x, y):
        return 8 + (width - 16) * (x - min(xs)) / wide, 8 + (height - 16) * (max(ys) - y) / tall

    path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in sorted(front))
    drawn = f'<g class="b"><polyline points="{path}"/></g>' + "".join(
        f'<g class="{tone}">' + "".join(f'<svg x="{at(x, y)[0]:.1f}" y="{at(x, y)[1]:.1f}" class="{shape}"><title>{esc(tip)}: {short(x)}, {short(y)}</title>'
                                        f'{SHAPES[shape]}</svg>' for x, y, tip in points) + "</g>" for shape, tone, points in series)
    said = f"{labels[0]} from {short(min(xs))} to {short(max(xs))}, {labels[1]} from {short(min(ys))} to {short(max(ys))}"
    return (f'<figure class="curve"><figcaption>{esc(title)}</figcaption>'
            f'<svg viewBox="-44 -16 {width + 48} {height + 34}" role="img" aria-label="{esc(title)}: {esc(said)}"><path class="frame" d="M0 0V{height}H{width}"/>'
            f'{drawn}<text class="begin" x="-40" y="-5">{esc(labels[1])}</text><text class="left" x="-3" y="12">{short(max(ys))}</text>'
            f'<text class="left" x="-3" y="{height}">{short(min(ys))}</text><text class="begin" x="0" y="{height + 14}">{short(min(xs))}</text>'
            f'<text x="{width // 2}" y="{height + 14}">{esc(labels[0])}</text><text class="left" x="{width}" y="{height + 14}">{short(max(xs))}</text></svg></figure>')


def grid(charts, kind="", key=""):
    """Charts beside each other as far as the page is wide, under the key to their marks. "" where there are none."""
    drawn = "".join(charts)
    return f'{key}<div class="grid {kind}">{drawn}</div>' if drawn else ""


def section(title, note, body):
    """A part of the page, "" where it has no body."""
    return f'<section><h2>{esc(title)}</h2><p class="note">{esc(note)}</p>{body}</section>' if body else ""


def heat_map(columns, rows):
    """A table whose cells are shaded by their share. rows: [(label, [(share 0-1 or None, outlined), ...])] or a text: a heading."""
    body = ""
    for row in rows:
        if isinstance(row, str):
            body += f'<tr><th class="name within" colspan="{len(columns) + 1}" scope="rowgroup">{esc(row)}</th></tr>'
            continue
        label, cells = row
        body += f'<tr><th scope="row" class="name">{esc(label)}</th>' + "".join(
            f'<td style="--share:{share:.3f}"{" class=home" if home else ""}>{100 * share:.0f}</td>' if finite(share) else "<td>–</td>"
            for share, home in cells) + "</tr>"
    head = "".join(f'<th scope="col">{esc(column)}</th>' for column in columns)
    return f'<div class="scroll"><table class="heat"><thead><tr><th class="name"></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
