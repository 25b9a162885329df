"""What a recipe's run shows for itself: every model answers the same questions, greedy and sampled, a judge grades them, and win rates are
taken against the stage before, the base and the arms. The judge is the world's oracle, or a user's second reward model, never the arbiter."""

import time

from . import distributed
from .data import without_added_keys
from .evaluate import compare, grade_answers, summarize
from .files import read_json, write_jsonl
from .languages import cluster_languages
from .pipeline_steps import answers_of, rows_of, scores_of, step
from .world import questions


def judge_arbiter(run, folder, pairs):
    """Held-out accuracy of a reward model on clean pairs: overall, right against wrong answers, per language and kind."""
    chosen, rejected = (scores_of(run, folder, [{**p, "completion": p[side]} for p in pairs]) for side in ("chosen", "rejected"))
    right = [a > b for a, b in zip(chosen, rejected)]
    share = lambda keep: sum(x for x, p in zip(right, pairs) if keep(p)) / max(1, sum(map(keep, pairs)))
    return {"num": len(pairs), "accuracy": share(lambda p: True), "right_vs_wrong": share(lambda p: p["kind"] in ("3 vs 1", "2 vs 1")),
            "by_kind": {k: share(lambda p: p["kind"] == k) for k in sorted({p["kind"] for p in pairs})},
            "by_language": {c: share(lambda p: p["language"] == c) for c in sorted({p["language"] for p in pairs})}}


def eval_rows(run):
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


def evaluate_model(run, model, arbiter):
    """Answers of a model to the evaluation prompts, greedy and at temperature 1, graded by the oracle (or the judge), in steps/eval-<name>/.

    arbiter: the reward model whose score goes beside each answer; None: no score."""
    name = model["name"]

    def make(folder, resume):
        rows = eval_rows(run)
        for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            answers = answers_of(run, model["folder"], rows, temperature=temperature, seed=run.recipe.seed)
            answered = [{**row, **answer} for row, (answer,) in zip(rows, answers)]
            judged = grade_answers(answered) if run.embedded else answered
            if arbiter:
                judged = [{**row, "reward": reward} for row, reward in zip(judged, scores_of(run, arbiter, answered))]
            if run.judge:
                scores = scores_of(run, run.judge, answered)            # rounded: padding moves the last bits, and equal texts must tie
                judged = [{**row, "grade": None if score is None else round(score, 4)}
                          for row, score in zip(judged, scores)]
            if distributed.is_main():
                folder.mkdir(parents=True, exist_ok=True)
                write_jsonl(folder / f"{decoding}.jsonl", map(without_added_keys, judged))
    step(run, f"eval-{name}", f"{name} answers {'the ' + run.recipe.eval_split + ' questions' if run.embedded else 'the evaluation prompts'}", make)


def judge_name(run):
    if run.embedded:
        return "oracle"
    return f"reward model: {run.judge}" if run.judge else "arbiter (not a win rate)"


def mean_reward(rows):
    """The arbiter's mean score; None if it has scored none."""
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    return sum(rewards) / len(rewards) if rewards else None


def summarize_run(run, models, arbiter_record, arbitrage_counts, started):
    """What the report draws. Win rates of each model against its base, the stage before it, and the arms, by the judge."""
    answers = {m["name"]: {d: rows_of(run.folder / "steps" / f"eval-{m['name']}" / f"{d}.jsonl") for d in ("greedy", "sampled")} for m in models}
    key = "grade" if run.embedded or run.judge else "reward"
    out = []
    for m in models:
        entry = {k: m[k] for k in ("name", "title", "kind", "previous")}
        for decoding, rows in answers[m["name"]].items():
            against = {"base": "base", "previous": m["previous"], "single": "single", "random": "random", "mix": "mix", "sft": "sft", "offline": "offline"}
            against = {label: other for label, other in against.items() if other in answers and other != m["name"]}
            versus = {}
            for label, other in against.items():
                result = compare(rows, answers[other][decoding], key=key, clusters=run.clusters)
                versus[label] = {**result["overall"], "by_language": result["by_language"], "by_cluster": result["by_cluster"]}
            entry[decoding] = {**summarize(rows), "reward": mean_reward(rows), "versus": versus}
        entry |= step_totals(run, m["name"])
        out.append(entry)
    paths = sorted((run.folder / "steps").glob("*/done.json"), key=lambda p: p.stat().st_mtime)
    records = [read_json(path) for path in paths]
    online = [{"round": i, **{d: {"reward": e[d]["reward"], "grade": e[d].get("grade")} for d in ("greedy", "sampled")}}
              for i, e in enumerate(e for e in out if e["name"] in ("offline", *(f"online-{t}" for t in range(1, run.recipe.rounds + 1))))]
    wins, offline = arbitrage_counts.pop("wins"), arbitrage_counts["offline_pairs"]
    pairs = {"offline": offline} | {rec["name"].removesuffix("-pairs"): rec["pairs"] for rec in records
                                    if "pairs" in rec}
    return {"judge": judge_name(run), "models": out, "clusters": {name: cluster_languages(run.clusters, name) for name in run.clusters},
            "teacher_wins": {code: {t: n / sum(w.values()) for t, n in w.items()}
                             for code, w in wins.items()},
            "arbitrage": arbitrage_counts, "pairs": pairs,
            "reward_model": arbiter_record or {}, "online": online, "examples": examples(answers),
            "steps": [{k: rec[k] for k in ("name", "title", "seconds", "tokens", "training_steps")} for rec in records],
            "total_seconds": sum(rec["seconds"] for rec in records), "wall_seconds": time.time() - started}


def step_totals(run, name):
    """Steps, tokens and seconds that went into a model by itself (a merged stage: its clusters)."""
    names = [name] + [f"{name}-{cluster}" for cluster in run.clusters] + [f"{name}-pairs"]
    paths = [run.folder / "steps" / n / "done.json" for n in names]
    records = [read_json(p) for p in paths if p.is_file()]
    return {"steps": sum(rec["training_steps"] for rec in records), "tokens": sum(rec["tokens"] for rec in records), "seconds": sum(rec["seconds"] for rec in records)}


def examples(answers, codes=("en", "ar", "zh", "hi", "ru", "el", "he", "ko")):
    """The first evaluation question of some languages, with the answers of base, SFT and final model: not chosen by result."""
    stages_shown = [name for name in ("base", "sft", "offline", *sorted(n for n in answers if n.startswith("online-") and n[7:].isdigit())[-1:]) if name in answers]
    shown, there = [], dict.fromkeys(row["language"] for row in answers["base"]["greedy"])
    for code in [*codes, *(code for code in there if code not in codes)][:max(len(codes), 8)]:
        index = next((i for i, row in enumerate(answers["base"]["greedy"]) if row.get("language") == code), None)
        if index is not None:
            rows = {name: answers[name]["greedy"][index] for name in stages_shown}
            prompt = rows["base"]["prompt"] if isinstance(rows["base"]["prompt"], str) else rows["base"]["prompt"][-1]["content"]
            shown.append({"language": code, "prompt": prompt, "answers": [{"model": n, "completion": row["completion"], "grade": row.get("grade")} for n, row in rows.items()]})
    return shown
