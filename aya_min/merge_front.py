"""The results of a search over merges as text and as a part of the page: the table of merges and checkpoints,
the Pareto front over the tasks, the weights.

It reads what merge_search.py keeps in search.json and evaluations.jsonl, never a model. Tasks are numbers;
higher is better.
"""

import math

from .report_charts import axis, bar, chart, esc, grid, legend, number, scatter, section, track

KEY = legend(("dot", "a", "CMA-ES"), ("diamond", "b", "greedy soup, uniform soup"),
             ("ring", "b", "one checkpoint"), ("point", "a", "points that CMA-ES tried"))


def macro(tasks):
    """The mean over the tasks, each with the same weight. tasks: {task: number}."""
    return sum(tasks.values()) / len(tasks)


def pareto(points):
    """For each point (a tuple of numbers), whether it is on the front: no other point is at least as high in
    every number and higher in one."""
    return [not any(other != point and all(a >= b for a, b in zip(other, point)) for other in points)
            for point in points]


def trade_off(measured):
    """(task, task, correlation) of the two tasks with the lowest correlation over the models; None for one
    task.

    measured: [{task: number}], one for each model.
    """
    def deviations(task):
        mean = sum(tasks[task] for tasks in measured) / len(measured)
        return [tasks[task] - mean for tasks in measured]

    def correlation(a, b):
        x, y = deviations(a), deviations(b)
        length = math.sqrt(sum(i * i for i in x) * sum(j * j for j in y))
        return sum(i * j for i, j in zip(x, y)) / length if length else 0.0

    tasks = list(measured[0])
    pairs = [(correlation(a, b), a, b) for i, a in enumerate(tasks) for b in tasks[i + 1:]]
    if not pairs:
        return None
    lowest, a, b = min(pairs)
    return a, b, lowest


def contenders(result):
    """[(name, row or model, whether it is on the front)]: the four rows, then the checkpoints.

    The front is over all tasks of the last split.
    """
    everyone = [(row["name"], row) for row in result["rows"] + result["models"]]
    front = pareto([tuple(row["held-out"].values()) for _, row in everyone])
    return [(name, row, on) for (name, row), on in zip(everyone, front)]


def cells(result):
    """(heading, rows) of the main table as text. The tasks are those of the held-out split, if it exists."""
    left_out = "without" in result["models"][0]
    heading = ["", "weight", "fitness"] + ["held-out"] * result["held-out"]
    heading += [*result["rows"][0]["fitness"]] + ["without it"] * left_out
    rows = []
    for name, row, on in contenders(result):
        shown = f"{name} ({result['best']})" if name == "best single" else name
        line = [("* " if on else "  ") + shown, f"{row['weight']:.4f}" if "weight" in row else ""]
        line.append(number(macro(row["fitness"]), 4))
        if result["held-out"]:
            line.append(number(macro(row["held-out"]), 4))
        line += [number(value, 3) for value in row["held-out"].values()]
        if left_out:
            line.append(number(macro(row["without"]), 4) if "without" in row else "")
        rows.append(line)
    return heading, rows


def notes(result):
    """The sentences below the table."""
    last = "held-out" if result["held-out"] else "fitness"
    pair = trade_off([model["fitness"] for model in result["models"]])
    found = result["rows"][-1]
    used = sum(abs(weight) > 0.01 for weight in found["weights"])
    lines = [f"fitness, held-out: macro average of the split; tasks: {last} split; "
             f"*: on the Pareto front over all tasks of the {last} split",
             f"CMA-ES: {result['evaluations']} points of {result['popsize']} a generation; "
             f"{used} of {len(found['weights'])} weights beyond 0.01"]
    if "without" in result["models"][0]:
        lines.append("without it: the CMA-ES merge without this checkpoint, the other weights divided by "
                     f"their sum, {last} macro average")
    if pair:
        together = " (they rise together: no trade-off in this pool)" if pair[2] > 0 else ""
        lines.append(f"the checkpoints trade off most: {pair[0]} against {pair[1]}, "
                     f"correlation {pair[2]:.2f}{together}")
    ahead = max(result["rows"], key=lambda row: macro(row["fitness"]))
    if macro(ahead["fitness"]) > macro(found["fitness"]):
        lines.append(f"the {ahead['name']} is better on the fitness split than what CMA-ES found; "
                     "more --evaluations may help")
    return lines


def search_table(result):
    """The table and the notes for the terminal, as text."""
    heading, rows = cells(result)
    widths = [max(map(len, column)) for column in zip(heading, *rows)]
    lines = []
    for name, *values in [heading, *rows]:
        aligned = [f"{value:>{width}}" for value, width in zip(values, widths[1:])]
        lines.append("  ".join([f"{name:<{widths[0]}}", *aligned]))
    return "\n".join([*lines, *notes(result)])


def scatters(result, history):
    """Charts of the two tasks that trade off most: the fitness split with all points that CMA-ES tried, then
    the held-out split. "" for a single task."""
    pair = trade_off([model["fitness"] for model in result["models"]])
    if not pair:
        return ""
    across, up, correlation = pair
    tried = [(row["tasks"][across], row["tasks"][up], "tried") for row in history
             if row["kind"] == "CMA-ES" and row["split"] == "fitness"]
    drawn = []
    for split in ["fitness", "held-out"] if result["held-out"] else ["fitness"]:
        def points(rows):
            return [(row[split][across], row[split][up], row["name"]) for row in rows]
        series = [("point", "a", tried if split == "fitness" else []),
                  ("ring", "b", points(result["models"])),
                  ("diamond", "b", points(result["rows"][1:3])),
                  ("dot", "a", points(result["rows"][3:]))]
        everyone = [(x, y) for _, _, some in series for x, y, _ in some]
        front = {point for point, on in zip(everyone, pareto(everyone)) if on}
        drawn.append(scatter(f"{split} split", (across, up), series, front))
    note = (f"Of all pairs of tasks, {across} and {up} have the lowest correlation over the checkpoints "
            f"({correlation:.2f}). The broken line joins the points that no other point beats in both.")
    return section("The front", note, grid(drawn, key=KEY))


def search_part(result, history):
    """The search's part of the page as HTML; "" if nothing was searched.

    result: search.json; history: the lines of evaluations.jsonl.
    """
    if not result:
        return ""
    heading, rows = cells(result)
    head = "".join(f'<th{"" if i else " class=name"}>{esc(cell)}</th>' for i, cell in enumerate(heading))
    body = ""
    for name, *values in rows:
        columns = "".join(f"<td>{esc(cell)}</td>" for cell in values)
        body += f'<tr><th scope="row" class="name">{esc(name.strip())}</th>{columns}</tr>'
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    averages = ", ".join(f"{esc(name)} <b>{number(macro(row['held-out']), 3)}</b>"
                         for name, row, _ in contenders(result)[3::-1])
    models = sorted(result["models"], key=lambda model: -model["weight"])
    scale = min(0.0, models[-1]["weight"]), models[0]["weight"]
    weights = [track(model["name"], bar(model["weight"], scale, tip=model["folder"]),
                     f"{model['weight']:.3f}", scale) for model in models]
    split = "Held-out" if result["held-out"] else "Fitness"
    return (f'<p class="headline">{split} macro average: {averages}.</p>'
            + section("Merges and checkpoints", ". ".join(notes(result)) + ".", table)
            + scatters(result, history)
            + section("The weights", "Of the CMA-ES merge; their sum is 1.",
                      chart("weight", weights + [axis(scale, 0.05)])))
