"""The Aya Expanse recipe (arXiv 2412.04261 and its launch blog), from a base to the final model, written to be read beside them.

    base -> teachers, one per language cluster -> arbiter (reward model) -> arbitrage: every teacher answers every prompt, the arbiter keeps
    the best -> SFT per cluster -> merge -> offline DPO on best against worst of the pool, per cluster -> merge -> three rounds of online DPO:
    sample, rank, train per cluster, merge

Beside it the arms that make each gain mean something, from the same start with the same number of examples and steps. Every step leaves a folder
RUN/steps/<name>: a rerun skips what is whole, a killed run goes on at the step where it stopped.
"""

import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from . import distributed, stages, weights, world_data
from .arbitrage import candidates_from, read_answers, route
from .config import DPO, RLOO, SFT, Pretrain, Recipe, Reward, model_preset
from .data import load_prompts, read_jsonl
from .evaluate import compare, grade_answers, summarize
from .languages import CLUSTERS, LANGUAGES, SHARED, cluster_languages
from .model import CohereForCausalLM, RewardModel, init_weights
from .preferences import best_worst
from .reward import score_texts
from .sampling import answer_rows
from .soups import merge_folders
from .tokenizer import train_tokenizer
from .world import gold_answer, questions, write_jsonl


@dataclass
class Run:
    """One run of the recipe: where it lives, its settings, and what a user brought instead of the embedded world."""
    folder: Path
    recipe: Recipe
    device: torch.device
    clusters: dict
    arms: str = "main"                      # "main" or "all"
    base: Optional[Path] = None             # a user's own: model folder,
    prompts: Optional[list] = None          #   prompt files,
    teachers: Optional[list] = None         #   model folders or files of completions,
    arbiter: Optional[Path] = None          #   reward model folder,
    judge: Optional[Path] = None            #   a second reward model,
    eval_prompts: Optional[list] = None     #   prompts to be judged on

    @property
    def embedded(self):
        return self.base is None


# ---- steps on disk -----------------------------------------------------------------------------------------------------------------

def step(run, name, title, make):
    """Do a step once. make(folder, resume) fills steps/<name> and returns a JSON object; a later run finds it in done.json."""
    folder = run.folder / "steps" / name
    if not distributed.from_main(lambda: (folder / "done.json").is_file()):
        resume = distributed.from_main(lambda: _clear(folder))
        if distributed.is_main():
            print(f"[{name}] {title}{', resumed' if resume else ''}", flush=True)
        started = time.perf_counter()
        result = make(folder, resume) or {}
        steps, tokens = distributed.from_main(lambda: _training_totals(folder))
        record = {"name": name, "title": title, "seconds": time.perf_counter() - started, "training_steps": steps, "tokens": tokens, **result}
        if distributed.is_main():
            write_json(folder / "done.json", record)
        distributed.barrier()
    return json.loads((folder / "done.json").read_text(encoding="utf-8"))


def _clear(folder):
    """Remove what a killed step left, unless it saved a state to resume from. -> whether to resume."""
    if (folder / "state").is_dir() and not (folder / "model").exists():
        return True
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return False


def _training_totals(folder):
    if not (folder / "metrics.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        return 0, 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = [line["tokens"] for line in lines if "tokens" in line]
    return len(tokens), sum(tokens)


def write_json(path, value):
    temporary = path.with_name(path.name + ".tmp-0")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.rename(path)


def data_file(run, name, rows):
    """RUN/data/<name>.jsonl with the rows, written by rank 0."""
    path = run.folder / "data" / f"{name}.jsonl"
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
    distributed.barrier()
    return path


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def settings(run, kind, **values):
    """A stage's settings from the recipe's."""
    r = run.recipe
    return kind(**{"batch_size": r.batch_size, "max_length": r.max_length, "dtype": r.dtype, "seed": r.seed, **values})


def train_step(run, name, title, stage, start, rows, its_settings, **more):
    """Train `stage` from the model folder `start` on rows (a list, or a function that makes it). -> the new model folder."""
    def make(folder, resume):
        data = data_file(run, name, rows() if callable(rows) else rows)
        model, tokenizer = (weights.load_trunk if stage is stages.reward else weights.load)(start)
        stage(model, tokenizer, [data], its_settings, folder, run.device, resume=resume, **more)
    step(run, name, title, make)
    return run.folder / "steps" / name / "model"


# ---- base, teachers, arbiter ---------------------------------------------------------------------------------------------------------

def build_base(run):
    """Tokenizer and base model, pretrained from scratch on noisy multilingual text."""
    r = run.recipe

    def make(folder, resume):
        rows = world_data.corpus(r.corpus, r.seed, r.level)
        data = data_file(run, "base", rows)
        some = [q for q in rows if "prompt" in q][:20000]
        tokenizer = train_tokenizer([q["prompt"] for q in some] + [gold_answer(q) for q in some], r.vocab_size)
        model = init_weights(CohereForCausalLM(model_preset(r.model, tokenizer.vocab_size)), torch.Generator().manual_seed(r.seed))
        stages.pretrain(model, tokenizer, [data], settings(run, Pretrain, learning_rate=r.base_learning_rate, warmup_steps=50, batch_size=r.batch_size),
                        folder, run.device, resume=resume)
    step(run, "base", f"pretraining a base on {r.corpus} rows of noisy text in 23 languages", make)
    return run.folder / "steps" / "base" / "model"


def build_teachers(run, base):
    """The pool: one teacher per language cluster, strong at home and weak elsewhere. -> {name: model folder}"""
    r = run.recipe
    return {name: train_step(run, f"teacher-{name}", f"the teacher of {name}", stages.sft, base,
                             lambda name=name: world_data.lessons(run.clusters, name, r.lessons, r.seed, r.level),
                             settings(run, SFT, learning_rate=r.teacher_learning_rate, epochs=1.0)) for name in run.clusters}


def answers_of(run, model_folder, rows, num_samples=1, temperature=1.0, seed=0, progress=None):
    """For each row a list of num_samples completions by a model folder, on every rank."""
    model, tokenizer = weights.load(model_folder, run.device)
    groups = answer_rows(model, tokenizer, rows, num_samples, run.recipe.max_new_tokens, temperature, seed, progress=progress)
    return [[a["completion"] for a in group] for group in groups]


def scores_of(run, reward_folder, rows):
    model, tokenizer = weights.load(reward_folder, run.device)
    if not isinstance(model, RewardModel):
        raise ValueError(f"{reward_folder}: a language model, not a reward model; give a folder that the reward stage wrote")
    return score_texts(model, tokenizer, rows)


def build_arbiter(run, base, teachers):
    """The reward model: first right answers read as language (it must know more than its pool), then Bradley-Terry on preference pairs."""
    r = run.recipe
    reader = train_step(run, "arbiter-start", "the arbiter reads right answers", stages.sft, base, lambda: world_data.gold(r.arbiter_gold, r.seed, r.level),
                        settings(run, SFT, learning_rate=r.arbiter_gold_learning_rate, epochs=1.0))

    def pairs(split, count, flip):
        rows = questions(split, count, f"arbiter/{r.seed}", level=r.level)
        half = rows[:len(rows) // 2]                                        # half the questions carry teachers' samples, half corruptions
        samples = [answers_of(run, folder, half, seed=r.seed + i) for i, folder in enumerate(teachers.values())]
        sampled = [[text for group in teacher_answers for text in group] for teacher_answers in zip(*samples)] + [None] * (len(rows) - len(half))
        return world_data.graded_pairs(rows, sampled, r.seed, flip)

    def make(folder, resume):
        data = data_file(run, "arbiter", pairs("train", r.arbiter_pairs, 0.05))
        held_out = pairs(r.eval_split, max(240, r.arbiter_pairs // 12), 0.0)
        model, tokenizer = weights.load_trunk(reader)
        its_settings = settings(run, Reward, learning_rate=r.arbiter_learning_rate, lm_weight=r.arbiter_lm_weight, epochs=1.0, warmup_steps=20)
        reward_folder = stages.reward(model, tokenizer, [data], its_settings, folder, run.device, resume=resume)
        return {"reward_model": judge_arbiter(run, reward_folder, held_out)}
    record = step(run, "arbiter", "the arbiter: a reward model on preference pairs", make)
    return run.folder / "steps" / "arbiter" / "model", record["reward_model"]


def judge_arbiter(run, folder, pairs):
    """Held-out accuracy of a reward model on clean pairs: overall, right against wrong answers, per language and kind."""
    chosen, rejected = (scores_of(run, folder, [{**p, "completion": p[side]} for p in pairs]) for side in ("chosen", "rejected"))
    right = [a > b for a, b in zip(chosen, rejected)]
    share = lambda keep: sum(x for x, p in zip(right, pairs) if keep(p)) / max(1, sum(map(keep, pairs)))
    return {"num": len(pairs), "accuracy": share(lambda p: True), "right_vs_wrong": share(lambda p: p["kind"] in ("3 vs 1", "2 vs 1")),
            "by_kind": {k: share(lambda p: p["kind"] == k) for k in sorted({p["kind"] for p in pairs})},
            "by_language": {c: share(lambda p: p["language"] == c) for c in sorted({p["language"] for p in pairs})}}


# ---- arbitrage -----------------------------------------------------------------------------------------------------------------------

def arbitrage(run, teachers, arbiter):
    """Every teacher answers every prompt, the arbiter scores all. -> rows with "candidates", kept in steps/arbitrage/candidates.jsonl"""
    r = run.recipe

    def make(folder, resume):
        rows = questions("train", r.num_prompts, f"prompts/{r.seed}", level=r.level) if run.embedded else load_prompts(run.prompts)
        answers, scores = {}, {}
        for i, (name, source) in enumerate(teachers.items()):
            sampled = read_answers(source, rows) if Path(source).is_file() else \
                [g[0] for g in answers_of(run, source, rows, temperature=r.teacher_temperature, seed=1000 * r.seed + i, progress=f"{name} answers")]
            answers[name] = sampled
            scores[name] = scores_of(run, arbiter, [{**row, "completion": text} for row, text in zip(rows, sampled)])
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "candidates.jsonl", candidates_from(rows, answers, scores))
    step(run, "arbitrage", f"arbitrage: {len(teachers)} teachers answer every prompt, the arbiter scores them", make)
    return rows_of(run.folder / "steps" / "arbitrage" / "candidates.jsonl")


def best_teacher(rows):
    """The single teacher with the highest mean reward over all prompts."""
    totals = {}
    for row in rows:
        for c in row["candidates"]:
            totals[c["teacher"]] = totals.get(c["teacher"], 0.0) + c["reward"]
    return max(totals, key=totals.get)


def family_table(run, teachers):
    """Language -> teacher by family: the cluster's own; the shared languages go to the first."""
    return {code: next((name for name, codes in run.clusters.items() if code in codes), next(iter(teachers))) for code in LANGUAGES}


# ---- train per cluster, merge ----------------------------------------------------------------------------------------------------------

def train_clusters_and_merge(run, name, title, stage, start, rows, its_settings, epochs, shared=SHARED):
    """One model per language cluster, all from `start`, then their plain average (weighted linear merging, launch blog).

    All clusters together take as many optimizer steps as one model would on all rows, shared out equally; `cluster_spill` of the other
    languages' rows keep the clusters from drifting apart (LOG.md: hard clusters this small do not average well).
    """
    r, folders = run.recipe, []
    total = max(len(run.clusters), round(epochs * len(rows) / r.batch_size))
    for cluster in run.clusters:
        codes = cluster_languages(run.clusters, cluster, shared)
        rng = random.Random(f"{name}/{cluster}/{r.seed}")
        mine = [row for row in rows if row.get("language") in (None, *codes) or rng.random() < r.cluster_spill]    # without a language: in all
        batch_size = min(r.batch_size, len(mine)) // distributed.num_ranks() * distributed.num_ranks()      # a small cluster takes small batches
        if not batch_size:
            raise ValueError(f"cluster {cluster!r} has {len(mine)} examples at {name}, too few to train on; give more prompts in its languages, or fewer clusters")
        steps = max(1, round(total / len(run.clusters)))
        cluster_settings = {**its_settings, "batch_size": batch_size, "max_steps": steps, "warmup_steps": max(1, steps // 10), "learning_rate": r.cluster_scale * its_settings["learning_rate"]}
        folders.append(train_step(run, f"{name}-{cluster}", f"{title}: {cluster}", stage, start, mine, settings(run, **cluster_settings)))

    def make(folder, resume):
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            merge_folders(folders, folder / "model", "linear")
        distributed.barrier()
    step(run, name, f"{title}: the average of {len(folders)} clusters", make)
    return run.folder / "steps" / name / "model"


def sft_settings(run):
    return dict(kind=SFT, learning_rate=run.recipe.sft_learning_rate)


def dpo_settings(run, stage):
    r = run.recipe
    return dict(kind=DPO, learning_rate=getattr(r, f"{stage}_learning_rate"), beta=getattr(r, f"{stage}_beta"), nll_weight=getattr(r, f"{stage}_nll_weight"))


def online_pairs(run, name, round_number, current, arbiter):
    """k samples per fresh prompt from the current model, ranked by the arbiter; best against worst."""
    r = run.recipe

    def make(folder, resume):
        if run.embedded:
            rows = questions("preference", r.online_prompts, f"online/{r.seed}/{round_number}", level=r.level)
        else:
            everything = load_prompts(run.prompts)
            rows = random.Random(f"online/{r.seed}/{round_number}").sample(everything, min(r.online_prompts, len(everything)))
        samples = answers_of(run, current, rows, r.online_samples, r.online_temperature, seed=7919 * round_number + r.seed, progress=f"sampling, round {round_number}")
        flat = [{**row, "completion": text} for row, group in zip(rows, samples) for text in group]
        scores = iter(scores_of(run, arbiter, flat))
        scored = [{**row, "candidates": [{"teacher": f"sample-{i}", "completion": text, "reward": next(scores)} for i, text in enumerate(group)]}
                  for row, group in zip(rows, samples)]
        pairs, counts = best_worst(scored, r.online_margin)
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "pairs.jsonl", pairs)
        return {"pairs": counts}
    step(run, f"{name}-pairs", f"online round {round_number}: {r.online_samples} samples a prompt, ranked by the arbiter", make)
    return rows_of(run.folder / "steps" / f"{name}-pairs" / "pairs.jsonl")


def online_rounds(run, prefix, start, arbiter):
    """Rounds of online DPO from `start`; the reference of each round is the model it starts from. -> [(name, model folder), ...]"""
    r, done, current = run.recipe, [], start
    for t in range(1, r.rounds + 1):
        name = f"{prefix}-{t}"
        pairs = online_pairs(run, name, t, current, arbiter)
        current = train_clusters_and_merge(run, name, f"online DPO, round {t}", stages.dpo, current, pairs, dpo_settings(run, "online"), r.online_epochs)
        done.append((name, current))
    return done


# ---- the recipe -------------------------------------------------------------------------------------------------------------------------

def run_recipe(run):
    """The whole recipe. Returns the summary that report.py draws; everything else is on disk."""
    from .report import write_report
    r, started, models = run.recipe, time.time(), []

    def keep(name, title, kind, folder, previous=None):
        models.append({"name": name, "title": title, "kind": kind, "folder": folder, "previous": previous})
        return folder

    base = keep("base", "Base", "stage", run.base or build_base(run))
    if run.embedded:
        teachers = build_teachers(run, base)
        arbiter, arbiter_record = build_arbiter(run, base, teachers)
        for name, folder in teachers.items():
            keep(f"teacher-{name}", f"Teacher {name}", "teacher", folder)
    else:
        teachers, arbiter, arbiter_record = {Path(t).resolve().name if Path(t).is_file() else Path(t).resolve().as_posix().split("/")[-1] +
                                             ("" if Path(t).resolve().name != "model" else ":" + Path(t).resolve().parent.name): Path(t)
                                             for t in run.teachers}, run.arbiter, None
    candidates = arbitrage(run, teachers, arbiter)

    # Arbitrage -> SFT: the student of the best answers, and the students of one teacher, of random ones, of each family's own
    single = best_teacher(candidates)
    reward_rows, arbitrage_counts = route(candidates, "reward", r.seed)
    arms = [("single", f"SFT: single best teacher ({single})", route(candidates, "fixed", r.seed, {code: single for code in [*LANGUAGES, None]})[0]),
            ("random", "SFT: random routing", route(candidates, "random", r.seed)[0])]
    if run.embedded:
        arms.append(("family", "SFT: family routing", route(candidates, "fixed", r.seed, family_table(run, teachers))[0]))
    arms.append(("mix", "SFT: reward routing, one model on the mix", reward_rows))
    for name, title, rows in arms:
        keep(name, title, "arm", train_step(run, name, title, stages.sft, base, rows, settings(run, **sft_settings(run), epochs=r.sft_epochs)), "base")
    sft = keep("sft", "SFT on the arbitrage, per cluster, merged", "stage",
               train_clusters_and_merge(run, "sft", "SFT", stages.sft, base, reward_rows, sft_settings(run), r.sft_epochs), "base")

    # Offline DPO: the pool's best against its worst
    pairs, offline_counts = best_worst(candidates, r.offline_margin)
    offline = keep("offline", "+ offline DPO, per cluster, merged", "stage",
                   train_clusters_and_merge(run, "offline", "offline DPO", stages.dpo, sft, pairs, dpo_settings(run, "offline"), r.offline_epochs), "sft")

    # Online DPO: three rounds
    previous = "offline"
    for t, (name, folder) in enumerate(online_rounds(run, "online", offline, arbiter), 1):
        keep(name, f"+ online DPO, round {t}, merged", "stage", folder, previous)
        previous = name

    if run.arms == "all":
        more_arms(run, keep, base, sft, reward_rows, arbiter)

    for model in models:
        evaluate_model(run, model, arbiter)
    summary = summarize_run(run, models, arbiter_record, arbitrage_counts | {"offline_pairs": offline_counts}, started)
    if distributed.is_main():
        write_json(run.folder / "summary.json", summary)
        write_report(run.folder)
    distributed.barrier()
    return summary


def more_arms(run, keep, base, sft, reward_rows, arbiter):
    """--arms all: online without offline (offline only is the stage itself), RLOO from the same SFT model, clusters without shared languages."""
    r, previous = run.recipe, "sft"
    for t, (name, folder) in enumerate(online_rounds(run, "online-only", sft, arbiter), 1):
        keep(name, f"SFT + online DPO only, round {t}", "arm", folder, previous)
        previous = name
    reward_model, _ = weights.load(arbiter, run.device)
    prompts = questions("preference", r.rloo_steps * r.batch_size, f"rloo/{r.seed}", level=r.level) if run.embedded else \
        [{k: v for k, v in row.items() if k != "prompt_messages"} for row in load_prompts(run.prompts)]
    rloo = train_step(run, "rloo", "RLOO from the SFT model", stages.rloo, sft, prompts,
                      settings(run, RLOO, learning_rate=r.rloo_learning_rate, beta=r.rloo_beta, num_samples=r.rloo_samples, max_steps=r.rloo_steps,
                               max_new_tokens=r.max_new_tokens), reward_model=reward_model)
    keep("rloo", "SFT + RLOO", "arm", rloo, "sft")
    no_shared = train_clusters_and_merge(run, "no-shared", "SFT without shared languages", stages.sft, base,
                                         reward_rows, sft_settings(run), r.sft_epochs, shared=[])
    keep("no-shared", "SFT per cluster without shared languages, merged", "arm", no_shared, "base")


# ---- evaluation -----------------------------------------------------------------------------------------------------------------------

def eval_rows(run):
    r = run.recipe
    if run.embedded:
        return questions(r.eval_split, r.eval_count, f"eval/{r.seed}", level=r.level, unique=True)
    rows = load_prompts(run.eval_prompts or run.prompts)
    for i, row in enumerate(rows):
        row.setdefault("question_id", str(row.get("id", i)))
    return rows


def evaluate_model(run, model, arbiter):
    """Answers of a model to the evaluation prompts, greedy and at temperature 1, graded by the oracle (or the judge), in steps/eval-<name>/."""
    name = model["name"]

    def make(folder, resume):
        rows = eval_rows(run)
        for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            answers = [group[0] for group in answers_of(run, model["folder"], rows, temperature=temperature, seed=run.recipe.seed)]
            answered = [{**row, "completion": text} for row, text in zip(rows, answers)]
            rewards = scores_of(run, arbiter, answered)
            judged = [{**row, "reward": reward} for row, reward in zip(grade_answers(answered) if run.embedded else answered, rewards)]
            if run.judge:
                judged = [{**row, "grade": score} for row, score in zip(judged, scores_of(run, run.judge, answered))]
            if distributed.is_main():
                folder.mkdir(parents=True, exist_ok=True)
                write_jsonl(folder / f"{decoding}.jsonl", judged)
    step(run, f"eval-{name}", f"{name} answers {'the ' + run.recipe.eval_split + ' questions' if run.embedded else 'the evaluation prompts'}", make)


def judge_name(run):
    if run.embedded:
        return "oracle"
    return f"reward model: {run.judge}" if run.judge else "arbiter (not a win rate)"


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
            entry[decoding] = {**summarize(rows), "reward": sum(row["reward"] for row in rows) / len(rows), "versus": versus}
        entry |= step_totals(run, m["name"])
        out.append(entry)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((run.folder / "steps").glob("*/done.json"), key=lambda p: p.stat().st_mtime)]
    online = [{"round": i, **{d: {"reward": e[d]["reward"], "grade": e[d].get("grade")} for d in ("greedy", "sampled")}}
              for i, e in enumerate(e for e in out if e["name"] in ("offline", *(f"online-{t}" for t in range(1, run.recipe.rounds + 1))))]
    wins = arbitrage_counts.pop("wins")
    return {"judge": judge_name(run), "models": out, "clusters": {name: cluster_languages(run.clusters, name) for name in run.clusters},
            "teacher_wins": {code: {t: n / sum(w.values()) for t, n in w.items()} for code, w in wins.items()}, "arbitrage": arbitrage_counts,
            "reward_model": arbiter_record or {}, "online": online, "examples": examples(answers),
            "steps": [{k: rec[k] for k in ("name", "title", "seconds", "tokens", "training_steps")} for rec in records],
            "total_seconds": sum(rec["seconds"] for rec in records), "wall_seconds": time.time() - started}


def step_totals(run, name):
    """Steps, tokens and seconds that went into a model by itself (a merged stage: its clusters)."""
    names = [name] + [f"{name}-{cluster}" for cluster in run.clusters] + [f"{name}-pairs"]
    paths = [run.folder / "steps" / n / "done.json" for n in names]
    records = [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.is_file()]
    return {"steps": sum(rec["training_steps"] for rec in records), "tokens": sum(rec["tokens"] for rec in records), "seconds": sum(rec["seconds"] for rec in records)}


def examples(answers, codes=("en", "ar", "zh", "hi", "ru", "el", "he", "ko")):
    """The first evaluation question of some languages, with the answers of base, SFT and final model: not chosen by result."""
    stages_shown = [name for name in ("base", "sft", "offline", *sorted(n for n in answers if n.startswith("online-") and n[7:].isdigit())[-1:]) if name in answers]
    shown = []
    for code in codes:
        index = next((i for i, row in enumerate(answers["base"]["greedy"]) if row.get("language") == code), None)
        if index is not None:
            rows = {name: answers[name]["greedy"][index] for name in stages_shown}
            prompt = rows["base"].get("prompt") or rows["base"]["prompt_messages"][-1]["content"]
            shown.append({"language": code, "prompt": prompt, "answers": [{"model": n, "completion": row["completion"], "grade": row.get("grade")} for n, row in rows.items()]})
    return shown
