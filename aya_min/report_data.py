"""What the report reads: the JSON files of a run folder, checked for their shape, and what summary.json says.

A file of another shape is refused, and the message names the key; a null counts as not recorded.
"""

from .files import depth, own_file, parse_object, read_bytes, read_json
from .languages import LANGUAGES, SHARED
from .report_charts import finite

DECODINGS = ("greedy", "sampled")
KINDS = {"stage": "Stages", "arm": "Arms", "teacher": "Teachers"}
REMEDY = "run the step that wrote it again"
MAX_LEVELS = 50         # of nesting; our own files stay far below

# ---- shapes of the files -----------------------------------------------------------------------------------

# A shape is a tuple of types, [shape of each item], {key: shape} or PAIR. A key with "!" is required, other
# keys may be missing; the key ... gives the shape of all keys that are not named.
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


def shaped(value, shape, where, key=""):
    """The value without its nulls. ValueError, which names file (where) and key, if it has another shape."""
    if isinstance(shape, dict) and isinstance(value, dict):
        shapes = {name.rstrip("!"): part for name, part in shape.items() if name is not ...}
        rest = shape.get(..., ANY)
        kept = {name: shaped(part, shapes.get(name, rest), where, f"{key}.{name}")
                for name, part in value.items() if part is not None}
        required = [name[:-1] for name in shape if name is not ... and name.endswith("!")]
        missing = [name for name in required if name not in kept]
        if missing:
            raise ValueError(f"{where}: {f'{key}.{missing[0]}'.lstrip('.')} is missing; {REMEDY}")
        return kept
    if isinstance(shape, list) and isinstance(value, list):
        return [shaped(part, shape[0], where, f"{key}[{i}]") for i, part in enumerate(value)]
    if shape is PAIR and isinstance(value, list) and len(value) == 2:
        return value
    if shape is NUMBER and type(value) in NUMBER and finite(value):
        return value
    if shape in (TEXT, ANY, FLAG) and isinstance(value, shape):
        return value
    raise ValueError(f"{where}: {key.lstrip('.')} must be {in_words(shape)}, not {type(value).__name__}; "
                     f"{REMEDY}")


def in_words(shape):
    if isinstance(shape, (dict, list)):
        return "an object" if isinstance(shape, dict) else "a list"
    return {PAIR: "two numbers", NUMBER: "a finite number", TEXT: "a text"}.get(shape, "true or false")


# ---- the files ---------------------------------------------------------------------------------------------

def read(folder, name, shape):
    """The object in a file of the run folder, {} if the file does not exist.

    ValueError for another shape, and for a link that leads out of the folder.
    """
    path = own_file(folder, name)
    return shaped(shallow(read_json(path, REMEDY), path), shape, path) if path else {}


def shallow(value, where):
    """The value; ValueError if it is nested so deeply that drawing it would fail."""
    if depth(value) > MAX_LEVELS:
        raise ValueError(f"{where}: nested more than {MAX_LEVELS} levels deep; {REMEDY}")
    return value


def read_lines(folder, name):
    """[("file:line", object), ...] of a file with one object a line.

    A last line without a line end is still being written and is left out.
    """
    path = own_file(folder, name)
    written = read_bytes(path) if path else b""
    whole_lines = written[:written.rfind(b"\n") + 1].splitlines()
    rows = []
    for number, line in enumerate(whole_lines, 1):
        where = f"{path}:{number}"
        rows.append((where, shallow(parse_object(line, where, "remove the line"), where)))
    return rows


def read_series(folder, name="metrics.jsonl"):
    """metrics.jsonl as {key: [(step, value), ...]}; values that are not finite are left out."""
    series = {}
    for where, row in read_lines(folder, name):
        if not finite(row.get("step")):
            raise ValueError(f"{where}: step must be a number, got {str(row.get('step'))[:50]!r}; remove the "
                             "line")
        for key, value in row.items():
            if key != "step" and finite(value):
                series.setdefault(key, []).append((row["step"], value))
    return series


def read_search(folder):
    """(search.json, the rows of evaluations.jsonl) of a merge search; ({}, []) if the run has none.

    ValueError if they do not all measure the same tasks.
    """
    result = read(folder, "search.json", SEARCH)
    if not result:
        return {}, []
    splits = ("fitness", "held-out", "without")
    measured = [row[split] for row in result["rows"] + result["models"] for split in splits if split in row]
    enough = len(result["rows"]) >= 4 and result["models"] and measured[0]
    if not enough or any(tasks.keys() != measured[0].keys() for tasks in measured):
        raise ValueError(f"{folder / 'search.json'}: needs at least four rows and one model, with a number "
                         f"for each of the same tasks; {REMEDY}")
    history = []
    for where, row in read_lines(folder, "evaluations.jsonl"):
        history.append(shaped(row, TRIED, where))
        if not measured[0].keys() <= history[-1]["tasks"].keys():
            raise ValueError(f"{where}: lacks tasks of search.json; {REMEDY}")
    return result, history


# ---- what summary.json says --------------------------------------------------------------------------------

def judged_by(summary):
    """The sentence that a reader must see if no oracle judged; "" if one did."""
    judge = summary.get("judge", "judge not recorded")
    if judge.startswith("arbiter"):
        return ("Scored by the arbiter that chose the training data: its score is not a win rate, and rises "
                "when a model learns to please it.")
    return "" if judge == "oracle" else f"Judged by a reward model, not by people or an oracle ({judge})."


def has_win_rates(summary):
    """Whether the judge may be quoted with win rates: the arbiter that chose the training data may not."""
    return not summary.get("judge", "").startswith("arbiter")


def parts_of(summary):
    """Every model's figures under every decoding."""
    return [model[decoding] for model in summary.get("models", []) for decoding in DECODINGS
            if decoding in model]


def scored_by(summary):
    """(the key of the models' mean score, its name on the page)."""
    if has_win_rates(summary) and any("grade" in part for part in parts_of(summary)):
        return "grade", "oracle grade" if summary.get("judge") == "oracle" else "judge's score"
    return "reward", "arbiter's score"


def versus(part, opponent):
    """Win rates of these answers against another model's; {} if the two were not compared."""
    return part.get("versus", {}).get(opponent, {})


def named(summary, name):
    """The model of that name; {} if the summary has none."""
    return next((model for model in summary.get("models", []) if model["name"] == name), {})


def title(model, name=""):
    return str(model.get("title", model.get("name", name)))


def final_model(summary):
    """The last stage, with which the recipe ends; {} while the base is the only one."""
    stages = [model for model in summary.get("models", []) if model.get("kind") == "stage"]
    return stages[-1] if len(stages) > 1 else {}


def language(code):
    return LANGUAGES[code].name if code in LANGUAGES else code


def by_cluster(codes, clusters):
    """[(cluster, its codes)]; codes of several clusters are under "shared", codes of none under "other"."""
    groups = {name: [] for name in [*clusters, "shared", "other"]}
    for code in codes:
        homes = [name for name, members in clusters.items() if code in members]
        if len(homes) == 1:
            groups[homes[0]].append(code)
        else:
            groups["shared" if homes or code in SHARED else "other"].append(code)
    return [(name, members) for name, members in groups.items() if members]


def by_kind(summary):
    """[(kind, its models)]: stages, arms, teachers, then kinds that we do not know."""
    groups = {kind: [] for kind in KINDS}
    for model in summary.get("models", []):
        groups.setdefault(model.get("kind", ""), []).append(model)
    return [(kind, members) for kind, members in groups.items() if members]
