"""What a run of the recipe shows for itself: every model answers the same questions, greedy and sampled, a
judge grades the answers, and win rates are taken against the stage before, the base and the arms. The judge
is the oracle of the embedded world or a user's second reward model, never the arbiter.
"""

import time

from . import distributed
from .command import printable
from .data import without_added_keys
from .evaluate import compare, grade_answers, summarize
from .files import write_json
from .languages import cluster_languages
from .pipeline_steps import answers_of, read_done, refresh_page, saved_rows, scores_of, step, write_rows
from .world import questions

DECODINGS = {"greedy": 0.0, "sampled": 1.0}                 # and their temperatures
OPPONENTS = ("base", "single", "random", "mix", "sft", "offline")


def judge_arbiter(run, folder, pairs):
    """Held-out accuracy of a reward model on clean pairs: overall, right against wrong answers, by kind of
    pair and by language."""
    chosen, rejected = (scores_of(run, folder, [{**p, "completion": p[side]} for p in pairs])
                        for side in ("chosen", "rejected"))
    right = [a > b for a, b in zip(chosen, rejected)]

    def share(keep):
        return sum(x for x, p in zip(right, pairs) if keep(p)) / max(1, sum(map(keep, pairs)))

    def by(key):
        return {value: share(lambda p: p[key] == value) for value in sorted({p[key] for p in pairs})}

    return {"num": len(pairs), "accuracy": share(lambda p: True),
            "right_vs_wrong": share(lambda p: p["kind"] in ("3 vs 1", "2 vs 1")),
            "by_kind": by("kind"), "by_language": by("language")}


def eval_rows(run):
    """The questions that every model answers. A user's rows get a question_id, with which they are unique."""
    r = run.recipe
    if run.embedded:
        return questions(r.eval_split, r.eval_count, f"eval/{r.seed}", level=r.level, unique=True)
    rows, seen = [dict(row) for row in run.eval_prompts or run.prompts], set()
    for i, row in enumerate(rows):
        row["language"] = row.get("language") or "other"
        question = str(next((row[key] for key in ("question_id", "id") if row.get(key) is not None), i))
        row["question_id"] = question if (question, row["language"]) not in seen else f"{question}#{i}"
        seen.add((row["question_id"], row["language"]))
    return rows


def evaluate_model(run, name, folder):
    """A model's answers to the evaluation's questions, graded by the oracle or the judge, in
    steps/eval-<name>. Returns {decoding: rows}."""
    def make(own, resume):
        rows = eval_rows(run)
        for decoding, temperature in DECODINGS.items():
            answers = answers_of(run, folder, rows, temperature=temperature, seed=run.recipe.seed)
            answered = [{**row, **answer} for row, (answer,) in zip(rows, answers)]
            judged = grade_answers(answered) if run.embedded else answered
            if run.judge:
                scores = scores_of(run, run.judge, answered)
                # rounded: padding moves the last bits, and equal texts must tie
                judged = [{**row, "grade": None if score is None else round(score, 4)}
                          for row, score in zip(judged, scores)]
            write_rows(own / f"{decoding}.jsonl", map(without_added_keys, judged))

    asked = f"the {run.recipe.eval_split} questions" if run.embedded else "the evaluation prompts"
    step(run, f"eval-{name}", f"{name} answers {asked}", make)
    return {decoding: saved_rows(run.folder / "steps" / f"eval-{name}" / f"{decoding}.jsonl")
            for decoding in DECODINGS}


def add_rewards(run, name, answers, arbiter):
    """Put the arbiter's score beside each of a model's answers ({decoding: rows}), in place."""
    if all("reward" in row for rows in answers.values() for row in rows):       # a run of an older version
        return
    record = step(run, f"score-{name}", f"the arbiter scores the answers of {name}", lambda own, resume: {
        "rewards": {decoding: scores_of(run, arbiter, rows) for decoding, rows in answers.items()}})
    for decoding, rows in answers.items():
        for row, reward in zip(rows, record["rewards"][decoding], strict=True):
            row["reward"] = reward


def judge_name(run):
    if run.embedded:
        return "oracle"
    return f"reward model: {run.judge}" if run.judge else "arbiter (not a win rate)"


def mean_reward(rows):
    """The arbiter's mean score; None if it has scored no row."""
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    return sum(rewards) / len(rewards) if rewards else None


class Results:
    """The models of a run in the order in which they are made, their answers and win rates. The summary and
    the page are written anew whenever `show` is called, so that a run can be watched."""

    def __init__(self, run):
        self.run, self.models, self.answers, self.rates, self.figures = run, [], {}, {}, {}
        self.arbiter, self.about, self.started = None, {}, time.time()

    def keep(self, name, title, kind, folder, previous=None):
        """Evaluate a model, say how it does, and keep it. previous: the name of the model that it started
        from. Returns the folder."""
        self.models.append({"name": name, "title": title, "kind": kind, "previous": previous})
        self.answers[name] = evaluate_model(self.run, name, folder)
        if self.arbiter:
            add_rewards(self.run, name, self.answers[name], self.arbiter)
        said = printable(f"    {name}: {self.said_of(name)}")
        distributed.from_main(lambda: print(said, flush=True))
        return folder

    def said_of(self, name):
        rows = self.answers[name]["greedy"]
        figures, reward = self.summarized(name, "greedy"), mean_reward(rows)
        said = []
        if figures.get("grade") is not None:
            of = " of 3" if self.run.embedded else ""
            said.append(f"{'oracle grade' if of else 'score of the judge'} {figures['grade']:.2f}{of}")
        if reward is not None:
            said.append(f"score of the arbiter {reward:.2f}")
        if figures.get("right_language") is not None:
            said.append(f"{100 * figures['right_language']:.0f}% in the right language")
        return ", ".join(said + [f"{len(rows):,} answers, greedy"])

    def trust(self, arbiter, record=None):
        """From now on answers are scored by this arbiter, and those of the earlier models too."""
        self.arbiter, self.about["reward_model"] = arbiter, record or {}
        for name, answers in self.answers.items():
            add_rewards(self.run, name, answers, arbiter)

    def show(self):
        """Write summary.json and the page with what is there by now. Returns the summary."""
        summary = self.summary()

        def write():
            write_json(self.run.folder / "summary.json", summary)
            refresh_page(self.run.folder, every=0)
        distributed.from_main(write)
        return summary

    def summarized(self, name, decoding):
        """evaluate.summarize of a model's answers, computed once."""
        key = name, decoding
        if key not in self.figures:
            self.figures[key] = summarize(self.answers[name][decoding])
        return self.figures[key]

    def compared(self, name, opponent, decoding):
        """evaluate.compare of two models' answers, computed once."""
        key = name, opponent, decoding
        if key not in self.rates:
            by = "grade" if self.run.embedded or self.run.judge else "reward"
            sides = self.answers[name][decoding], self.answers[opponent][decoding]
            found = compare(*sides, key=by, clusters=self.run.clusters)
            self.rates[key] = {**found["overall"], "by_language": found["by_language"],
                               "by_cluster": found["by_cluster"]}
        return self.rates[key]

    def entry(self, model):
        """What the report draws of one model."""
        name, judged = model["name"], self.run.embedded or self.run.judge or self.arbiter
        against = {other: other for other in OPPONENTS} | {"previous": model["previous"]}
        against = {label: other for label, other in against.items()
                   if other in self.answers and other != name}
        found = {decoding: {**self.summarized(name, decoding), "reward": mean_reward(rows),
                            "versus": {label: self.compared(name, other, decoding)
                                       for label, other in against.items()} if judged else {}}
                 for decoding, rows in self.answers[name].items()}
        return {**model, **found, **step_totals(self.run, name)}

    def summary(self):
        run, entries = self.run, [self.entry(model) for model in self.models]
        paths = sorted((run.folder / "steps").glob("*/done.json"), key=lambda p: p.stat().st_mtime)
        records = [read_done(path.parent) for path in paths]
        rounds = ("offline", *(f"online-{t}" for t in range(1, run.recipe.rounds + 1)))
        online = [{d: {"reward": e[d]["reward"], "grade": e[d].get("grade")} for d in DECODINGS}
                  for e in entries if e["name"] in rounds]
        counts = {key: value for key, value in self.about.get("arbitrage", {}).items() if key != "wins"}
        wins = self.about.get("arbitrage", {}).get("wins", {})
        pairs = {"offline": counts["offline_pairs"]} if "offline_pairs" in counts else {}
        pairs |= {rec["name"].removesuffix("-pairs"): rec["pairs"] for rec in records if "pairs" in rec}
        return {"judge": judge_name(run), "models": entries,
                "clusters": {name: cluster_languages(run.clusters, name) for name in run.clusters},
                "teacher_wins": {code: {t: n / sum(w.values()) for t, n in w.items()}
                                 for code, w in wins.items()},
                "arbitrage": counts, "pairs": pairs, "reward_model": self.about.get("reward_model", {}),
                "online": [{"round": i, **row} for i, row in enumerate(online)],
                "examples": examples(self.answers),
                "steps": [{k: rec[k] for k in ("name", "title", "seconds", "tokens", "training_steps")}
                          for rec in records],
                "total_seconds": sum(rec["seconds"] for rec in records),
                "wall_seconds": time.time() - self.started}


def step_totals(run, name):
    """Steps, tokens and seconds that went into a model by itself (a merged stage: its clusters)."""
    names = [name] + [f"{name}-{cluster}" for cluster in run.clusters] + [f"{name}-pairs"]
    folders = [run.folder / "steps" / n for n in names]
    records = [read_done(folder) for folder in folders if (folder / "done.json").is_file()]
    keys = {"steps": "training_steps", "tokens": "tokens", "seconds": "seconds"}
    return {name: sum(rec[key] for rec in records) for name, key in keys.items()}


def examples(answers, codes=("en", "ar", "zh", "hi", "ru", "el", "he", "ko")):
    """The first evaluation question of some languages, with the answers of base, SFT and final model: not
    chosen by result."""
    online = sorted(n for n in answers if n.startswith("online-") and n[7:].isdigit())
    names = [name for name in ("base", "sft", "offline", *online[-1:]) if name in answers]
    asked = answers["base"]["greedy"]
    found, shown = dict.fromkeys(row["language"] for row in asked), []
    for code in [*codes, *(code for code in found if code not in codes)][:max(len(codes), 8)]:
        index = next((i for i, row in enumerate(asked) if row.get("language") == code), None)
        if index is None:
            continue
        rows = {name: answers[name]["greedy"][index] for name in names}
        prompt = rows["base"]["prompt"]
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        shown.append({"language": code, "prompt": prompt,
                      "answers": [{"model": name, "completion": row["completion"], "grade": row.get("grade")}
                                  for name, row in rows.items()]})
    return shown
