"""What a search over merges found, as text and as a part of the page: the rows beside each other, the Pareto front over the tasks, the weights.

Reads what merge_search.py keeps in search.json and evaluations.jsonl, never a model. Tasks are numbers, the higher the better.
"""

import math

from .report_charts import axis, bar, chart, esc, grid, legend, number, scatter, section, track

KEY = legend(("dot", "a", "CMA-ES"), ("diamond", "b", "greedy soup, uniform soup"), ("ring", "b", "one checkpoint"), ("point", "a", "points that CMA-ES tried"))


def macro(tasks):
    """The mean over the tasks, each counting alike."""
    return sum(tasks.values()) / len(tasks)


def pareto(points):
    """For each point (a tuple of numbers) whether it is on the front: no other is as high everywhere and higher somewhere."""
    return [not any(other != point and all(a >= b for a, b in zip(other, point)) for other in points) for point in points]


def trade_off(measured):
    """The two tasks of [{task: number}] that go together least over the models (the lowest correlation), and that correlation; None for a single task."""
    def correlation(a, b):
        x, y = ([tasks[name] - sum(t[name] for t in measured) / len(measured) for tasks in measured] for name in (a, b))
        length = math.sqrt(sum(i * i for i in x) * sum(j * j for j in y))
        return sum(i * j for i, j in zip(x, y)) / length if length else 0.0
    tasks = list(measured[0])
    pairs = [(correlation(a, b), a, b) for i, a in enumerate(tasks) for b in tasks[i + 1:]]
    return (lambda r, a, b: (a, b, r))(*min(pairs)) if pairs else None


def contenders(result):
    """[(name, its row or model, on the front of the last split over all tasks)]: the four rows, then the checkpoints."""
    everyone = [(row["name"], row) for row in result["rows"]] + [(model["name"], model) for model in result["models"]]
    return [(name, row, on) for (name, row), on in zip(everyone, pareto([tuple(row["held-out"].values()) for _, row in everyone]))]


def cells(result):
    """(heading, rows) of the main table as text; the tasks are those of the held-out split, if there is one."""
    tasks = list(result["rows"][0]["fitness"])
    rows = []
    for name, row, on in contenders(result):
        shown = f"{name} ({result['best']})" if name == "best single" else name
        rows.append([("* " if on else "  ") + shown, f"{row['weight']:.4f}" if "weight" in row else "", number(macro(row["fitness"]), 4)]
                    + ([number(macro(row["held-out"]), 4)] if result["held-out"] else []) + [number(value, 3) for value in row["held-out"].values()]
                    + ([number(macro(row["without"]), 4) if "without" in row else ""] if "without" in result["models"][0] else []))
    heading = ["", "weight", "fitness"] + ["held-out"] * result["held-out"] + tasks + ["without it"] * ("without" in result["models"][0])
    return heading, rows


def notes(result):
    last, pair, weights = "held-out" if result["held-out"] else "fitness", trade_off([model["fitness"] for model in result["models"]]), result["rows"][-1]["weights"]
    lines = [f"fitness, held-out: macro average of the split; tasks: {last} split; *: on the Pareto front over all tasks of the {last} split",
             f"CMA-ES: {result['evaluations']} points of {result['popsize']} a generation; {sum(abs(w) > 0.01 for w in weights)} of {len(weights)} weights beyond 0.01"]
    if "without" in result["models"][0]:
        lines.append(f"without it: the CMA-ES merge without this checkpoint, the other weights divided by their sum, {last} macro average")
    if pair:
        lines.append(f"the checkpoints trade off most: {pair[0]} against {pair[1]}, correlation {pair[2]:.2f}" + (" (they go together: no trade-off in this pool)" if pair[2] > 0 else ""))
    ahead = max(result["rows"], key=lambda row: macro(row["fitness"]))
    if macro(ahead["fitness"]) > macro(result["rows"][-1]["fitness"]):
        lines.append(f"the {ahead['name']} is better on the fitness split than what CMA-ES found; more --evaluations may help")
    return lines


def table(result):
    """The terminal's table."""
    heading, rows = cells(result)
    widths = [max(map(len, column)) for column in zip(heading, *rows)]
    lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths))) for row in [heading, *rows]]
    return "\n".join([*lines, *notes(result)])


def scatters(result, history):
    """The two tasks that trade off most against each other, on the fitness split with all that was tried, and on the held-out split."""
    pair, drawn = trade_off([model["fitness"] for model in result["models"]]), []
    if not pair:
        return ""
    tried = [row["tasks"] for row in history if row["kind"] == "CMA-ES" and row["split"] == "fitness"]
    for split in ["fitness", "held-out"] if result["held-out"] else ["fitness"]:
        def points(rows):
            return [(row[split][pair[0]], row[split][pair[1]], row["name"]) for row in rows]
        series = [("point", "a", [(tasks[pair[0]], tasks[pair[1]], "tried") for tasks in tried] if split == "fitness" else []),
                  ("ring", "b", points(result["models"])), ("diamond", "b", points(result["rows"][1:3])), ("dot", "a", points(result["rows"][3:]))]
        everyone = [(x, y) for _, _, some in series for x, y, _ in some]
        front = {point for point, on in zip(everyone, pareto(everyone)) if on}
        drawn.append(scatter(f"{split} split", pair[:2], series, front))
    return section("The front", f"Of all pairs of tasks, {pair[0]} and {pair[1]} go together least over the checkpoints (correlation {pair[2]:.2f}). The broken line joins "
                   "what nothing else beats in both.", grid(drawn, key=KEY))


def search_part(result, history):
    """The page's part, "" where nothing was searched. result: search.json; history: the lines of evaluations.jsonl."""
    if not result:
        return ""
    heading, rows = cells(result)
    head = "".join(f'<th{" class=name" if not i else ""}>{esc(cell)}</th>' for i, cell in enumerate(heading))
    body = "".join(f'<tr><th scope="row" class="name">{esc(row[0].strip())}</th>' + "".join(f"<td>{esc(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    said = ", ".join(f"{esc(name)} <b>{number(macro(row['held-out']), 3)}</b>"
                     for name, row, _ in contenders(result)[3::-1])
    models = sorted(result["models"], key=lambda model: -model["weight"])
    scale = min(0.0, models[-1]["weight"]), models[0]["weight"]
    weights = [track(model["name"], bar(model["weight"], scale, tip=model["folder"]), f"{model['weight']:.3f}", scale) for model in models]
    return (f'<p class="headline">{"Held-out" if result["held-out"] else "Fitness"} macro average: {said}.</p>'
            + section("Merges and checkpoints", ". ".join(notes(result)) + ".",
                      f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
            + scatters(result, history) + section("The weights", "Of the CMA-ES merge; their sum is 1.", chart("weight", weights + [axis(scale, 0.05)])))
