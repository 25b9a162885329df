"""How many rows of which kind a mixture has, and which rows these are: numbers of rows only, no rows.

A cell is what the draw does not tell apart: the rows of one source, dataset, language and template. First the
caps make a smaller corpus. Then the rows of one pass go to the sources by weight, of a source to its
languages by size^T, of a language to its datasets by size, and of a dataset to its templates by size times
template weight (Aya 101, arXiv 2402.07827, samples the source, then the dataset; shares of languages as in
multilingual pre-training). What a part cannot give, because it has too few rows, goes to its siblings in
proportion; only a source may not run dry.

Departures: Aya 101 draws each row independently, here the counts are exact. Within a cell no row comes twice
before all have come once.
"""

import math
from dataclasses import dataclass

import numpy as np

from .command import in_range, shortened

EPOCHS = "[1, 1000000]"     # of a source in one pass over the mixture


@dataclass
class Cell:
    source: int             # its number in Spec.sources
    dataset: str
    language: str
    template: str           # "" without one
    size: int               # rows that it has
    kept: int = 0           # rows that may be drawn under the caps
    count: int = 0          # rows of one pass; above `kept` rows are repeated


def share_out(total, weights, rooms):
    """(K,) whole numbers that add up to `total`, in proportion to weights, none above its room.

    What one cannot take goes to the others in proportion. Fractions are given to the largest, the first of
    equal ones. A weight of 0 gets nothing. The sum is smaller if there is no more room.
    """
    weights, rooms = np.asarray(weights, float), np.asarray(rooms, np.int64)
    given, open_ = np.zeros(len(rooms), np.int64), (weights > 0) & (rooms > 0)
    left = int(total)
    while open_.any() and left > 0:
        quotas = np.where(open_, left * (weights / weights[open_].sum()), 0)        # (K,)
        full = open_ & (quotas >= rooms)
        if full.any():
            given[full] = rooms[full]
            left -= int(rooms[full].sum())
            open_ &= ~full
            continue
        given[open_] = np.floor(quotas[open_])
        rest = left - int(given[open_].sum())
        # Rounded, so that equal fractions are equal whatever the order of the sums.
        fractions = np.where(open_, np.round(quotas - np.floor(quotas), 9), -1)
        given[np.argsort(-fractions, kind="stable")[:rest]] += 1
        break
    return given


# ---- the corpus under caps ---------------------------------------------------------------------------------

def by(cells, *names):
    """{values of these fields: [cells]}, in the order of the cells."""
    found = {}
    for cell in cells:
        found.setdefault(tuple(getattr(cell, name) for name in names), []).append(cell)
    return found


def thin(cells, cap, weights=None):
    """Lower `kept` so that these cells keep at most `cap` rows, in proportion to weights (default: kept)."""
    kept = [cell.kept for cell in cells]
    if cap and sum(kept) > cap:
        for cell, count in zip(cells, share_out(cap, weights or kept, kept)):
            cell.kept = int(count)


def template_weight(cell, spec):
    return (spec.sources[cell.source].template_weights or {}).get(cell.template, 1.0)


def language_shares(cells, temperature):
    """{language: its share ~ size^T} of cells of one source, by the rows that are kept."""
    sizes = {code: sum(cell.kept for cell in some) for (code,), some in by(cells, "language").items()}
    powers = {code: float(size) ** temperature if size else 0.0 for code, size in sizes.items()}
    total = sum(powers.values()) or 1.0
    return {code: power / total for code, power in powers.items()}


def apply_caps(cells, spec):
    """Set `kept` of all cells: languages, template weights of 0, then the caps."""
    for cell in cells:
        wanted = spec.languages is None or cell.language in spec.languages
        cell.kept = cell.size if wanted and template_weight(cell, spec) > 0 else 0
    for (number, _, _), some in by(cells, "source", "dataset", "language").items():
        weights = [cell.kept * template_weight(cell, spec) for cell in some]
        thin(some, spec.sources[number].cap_dataset_language, weights)
    for (number, _), some in by(cells, "source", "dataset").items():
        thin(some, spec.sources[number].cap_dataset)
    shares = {number: language_shares(some, spec.temperature) for (number,), some in
              by(cells, "source").items()}
    for (code,), some in by(cells, "language").items():
        # By what the mixture would take of each, so that a large source does not take a small one's place.
        rows = {number: max(1, sum(cell.kept for cell in of_one)) for (number,), of_one in
                by(some, "source").items()}
        thin(some, spec.cap_language, [spec.sources[cell.source].weight * shares[cell.source][code]
                                       * cell.kept / rows[cell.source] for cell in some])


# ---- the counts --------------------------------------------------------------------------------------------

def rooms_of(groups, epochs):
    """The most rows that each list of cells gives in so many epochs, rounded up: only of a source they are
    rounded down, so that its parts have room for all of them."""
    return [math.ceil(sum(cell.kept for cell in some) * epochs) for some in groups]


def count_rows(cells, spec):
    """Set `count` of all cells. ValueError for a source that has too few rows, or none."""
    apply_caps(cells, spec)
    if spec.languages:
        refuse_missing(cells, spec)
    groups = by(cells, "source")
    groups = [groups.get((number,), []) for number in range(len(spec.sources))]
    rooms = [int(sum(cell.kept for cell in some) * source.epochs)
             for some, source in zip(groups, spec.sources)]
    weights = np.array([source.weight for source in spec.sources])
    shares = weights / weights.sum()
    most = int(np.floor(np.min(np.array(rooms) / shares) * (1 + 1e-12)))
    while most and (share_out(most, shares, [most] * len(rooms)) > rooms).any():
        most -= 1                                   # rounding up gave a source one row more than it has
    needs = share_out(spec.total or max(most, 1), shares, [spec.total or max(most, 1)] * len(rooms))
    for source, some, need, room in zip(spec.sources, groups, needs, rooms):
        if need > room or not room:
            refuse_dry(spec, source, some, max(need, 1), room, most)
    for source, some, need in zip(spec.sources, groups, needs):
        fill(some, int(need), source.epochs, spec)


def fill(cells, total, epochs, spec):
    """Set `count` of the cells of one source: `total` rows by language, dataset and template."""
    shares, languages = language_shares(cells, spec.temperature), by(cells, "language")
    counts = share_out(total, [shares[code] for code, in languages], rooms_of(languages.values(), epochs))
    for some, count in zip(languages.values(), counts):
        datasets = list(by(some, "dataset").values())
        sizes = [sum(cell.kept for cell in each) for each in datasets]
        for each, number in zip(datasets, share_out(count, sizes, rooms_of(datasets, epochs))):
            weights = [cell.kept * template_weight(cell, spec) for cell in each]
            rooms = rooms_of([[cell] for cell in each], epochs)
            for cell, rows in zip(each, share_out(number, weights, rooms)):
                cell.count = int(rows)
    found = sum(cell.count for cell in cells)
    assert found == total, (found, total)


def refuse_missing(cells, spec):
    there = {cell.language for cell in cells}
    if missing := [code for code in spec.languages if code not in there]:
        raise ValueError(f"{spec.path}: languages: no row is in {' '.join(missing)}; the rows are in "
                         f"{' '.join(sorted(there))}")


def refuse_dry(spec, source, cells, need, room, most):
    """ValueError for a source that would run dry, with what it has, what it would need, and the remedy."""
    kept, size = sum(cell.kept for cell in cells), sum(cell.size for cell in cells)
    capped = f" of {size:,} (caps, languages and template weights leave that many)" if kept < size else ""
    repeated = f", {room:,} in {source.epochs:g} epochs" if kept < room else ""
    remedies = [f"lower total to at most {most:,}"] if most else []
    epochs = -(-100 * need // kept) / 100 if kept else math.inf
    if in_range(epochs, EPOCHS):
        remedies += [f"allow repeats with epochs {epochs:g} in this source"]
    remedies += ["lower its weight" if kept else "set its weight to 0"]
    raise ValueError(f"{spec.path}: source {source.name!r} runs dry: the mixture needs {need:,} of its rows, "
                     f"and it has {kept:,}{capped}{repeated}; {', '.join(remedies)}"
                     f"{', or raise a cap' if capped else ''}, or give more rows")


# ---- the rows ----------------------------------------------------------------------------------------------

def draw(cell_of_row, cells, seed):
    """(N,) int32 the numbers of the drawn rows, in a seeded order.

    cell_of_row: (R,) the cell of each row. Of a cell all rows come equally often, but for a random part of
    them that comes once more.
    """
    order = np.argsort(cell_of_row, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(cell_of_row, minlength=len(cells)))                # (cells,)
    drawn = []
    for number, cell in enumerate(cells):
        if not cell.count:
            continue
        rng = np.random.default_rng([seed, number])
        rows = rng.permutation(order[ends[number] - cell.size:ends[number]])[:cell.kept]
        whole, rest = divmod(cell.count, len(rows))
        drawn += [np.tile(rows, whole), rng.permutation(rows)[:rest]]
    return np.random.default_rng([seed, len(cells)]).permutation(np.concatenate(drawn))


# ---- the table ---------------------------------------------------------------------------------------------

MOST_LINES = 60                 # of one kind in the table; the others are counted


def table(cells, spec):
    """Text lines: the rows of one pass over the mixture by source, dataset, language and template."""
    total, lines = sum(cell.count for cell in cells), []
    names = {number: source.name for number, source in enumerate(spec.sources)}
    kinds = {"source": lambda cell: names[cell.source], "language": lambda cell: cell.language,
             "dataset": lambda cell: f"{names[cell.source]}: {cell.dataset}"}
    if any(source.template_weights for source in spec.sources):
        kinds["template"] = lambda cell: f"{names[cell.source]}: {cell.template or '(none)'}"
    for title, key in kinds.items():
        groups = {}
        for cell in cells:
            groups.setdefault(key(cell), []).append(cell)
        rows = [(name, sum(cell.count for cell in some), sum(cell.size for cell in some))
                for name, some in groups.items()]
        rows.sort(key=lambda row: (-row[1], row[0]))
        shown = rows[:MOST_LINES]
        width = max(len(title), 3, *(len(shorter(name)) for name, *_ in shown))
        lines.append(f"{title:<{width}}  {'rows':>11}  {'share':>6}  {'of':>11}  {'epochs':>7}")
        lines += [f"{shorter(name):<{width}}  {count:11,}  {count / total:6.1%}  {size:11,}  "
                  f"{count / size:7.2f}" for name, count, size in shown]
        if len(rows) > len(shown):
            lines.append(f"and {len(rows) - len(shown)} more of {sum(row[1] for row in rows[MOST_LINES:]):,} "
                         "rows")
        size = sum(row[2] for row in rows)
        lines.append(f"{'all':<{width}}  {total:11,}  {1:6.1%}  {size:11,}  {total / size:7.2f}")
    return lines


def shorter(name):
    return name if len(name) <= 60 else shortened(name)[1:]
