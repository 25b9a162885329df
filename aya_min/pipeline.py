"""The Aya Expanse recipe (arXiv 2412.04261 and its launch blog), from a base to the final model, written to be read beside them.

    base -> teachers, one per language cluster -> arbiter (reward model) -> arbitrage: every teacher answers every prompt, the arbiter keeps
    the best -> SFT per cluster -> merge -> offline DPO on best against worst of the pool, per cluster -> merge -> three rounds of online DPO:
    sample, rank, train per cluster, merge

Beside it the arms that make each gain mean something, from the same start with the same number of examples and steps. Every step leaves a folder
RUN/steps/<name>: a rerun skips what is whole, a killed run goes on at the step where it stopped.
"""

import random
import time
from pathlib import Path

import torch

from . import distributed, weights, world_data
from .arbitrage import candidates_from, read_answers, route
from .report_charts import finite
from .pipeline_checks import teacher_name
from .command import printable
from .config import DPO, RLOO, SFT, Pretrain, Reward, model_preset
from .data import without_added_keys
from .files import write_json, write_jsonl
from .languages import LANGUAGES, SHARED, cluster_languages, home_language
from .model import CohereForCausalLM, init_weights
from .preferences import best_worst
from .stages import train_stage
from .report import write_report
from .pipeline_results import evaluate_model, judge_arbiter, summarize_run
from .merge_folders import merge_folders
from .pipeline_steps import answers_of, data_file, rows_of, scores_of, settings, step, train_step
from .tokenizer import load_tokenizer, train_tokenizer
from .world import gold_answer, questions


# ---- base, teachers, arbiter -----------------------------------------------------------------------------------------------------

def build_base(run):
    """Tokenizer and base model, pretrained from scratch on noisy multilingual text."""
    r = run.recipe

    def make(folder, resume):
        rows = world_data.corpus(r.corpus, r.seed, r.level)
        data = data_file(run, "base", rows)
        some = [q for q in rows if "prompt" in q][:20000]
        tokenizer = train_tokenizer([q["prompt"] for q in some] + [gold_answer(q) for q in some], r.vocab_size)
        model = init_weights(CohereForCausalLM(model_preset(r.model, tokenizer.vocab_size)), torch.Generator().manual_seed(r.seed))
        train_stage("pretrain", model, tokenizer, [data], settings(run, Pretrain, learning_rate=r.base_learning_rate, warmup_steps=50, batch_size=r.batch_size),
                        folder, run.device, resume=resume)
    step(run, "base", f"pretraining a base on {r.corpus} rows of noisy text in 23 languages", make)
    return run.folder / "steps" / "base" / "model"


def build_teachers(run, base):
    """The pool: one teacher per language cluster, strong at home and weak elsewhere. -> {name: model folder}"""
    r = run.recipe
    return {name: train_step(run, f"teacher-{name}", f"the teacher of {name}", "sft", base,
                             lambda name=name: world_data.lessons(run.clusters, name, r.lessons, r.seed, r.level),
                             settings(run, SFT, learning_rate=r.teacher_learning_rate, epochs=1.0)) for name in run.clusters}


def build_arbiter(run, base, teachers):
    """The reward model: first right answers read as language (it must know more than its pool), then Bradley-Terry on preference pairs."""
    r = run.recipe
    reader = train_step(run, "arbiter-start", "the arbiter reads right answers", "sft", base, lambda: world_data.gold(r.arbiter_gold, r.seed, r.level),
                        settings(run, SFT, learning_rate=r.arbiter_gold_learning_rate, epochs=1.0))

    def pairs(split, count, flip):
        rows = questions(split, count, f"arbiter/{r.seed}", level=r.level)
        half = rows[:len(rows) // 2]                                        # half the questions carry teachers' samples, half corruptions
        samples = [answers_of(run, folder, half, seed=r.seed + i) for i, folder in enumerate(teachers.values())]
        sampled = [[answer["completion"] for (answer,) in of_teachers]
                   for of_teachers in zip(*samples)] + [None] * (len(rows) - len(half))
        return world_data.graded_pairs(rows, sampled, r.seed, flip)

    def make(folder, resume):
        data = data_file(run, "arbiter", pairs("train", r.arbiter_pairs, 0.05))
        held_out = pairs(r.eval_split, max(240, r.arbiter_pairs // 12), 0.0)
        model, tokenizer = weights.load(reader, run.device, trunk=True, sharded=True, compute_dtype=getattr(torch, r.dtype))
        its_settings = settings(run, Reward, learning_rate=r.arbiter_learning_rate, lm_weight=r.arbiter_lm_weight, epochs=1.0, warmup_steps=20)
        reward_folder = train_stage("reward", model, tokenizer, [data], its_settings, folder, run.device, resume=resume)
        return {"reward_model": judge_arbiter(run, reward_folder, held_out)}
    record = step(run, "arbiter", "the arbiter: a reward model on preference pairs", make)
    return run.folder / "steps" / "arbiter" / "model", record["reward_model"]


# ---- arbitrage -------------------------------------------------------------------------------------------------------------------

def arbitrage(run, teachers, arbiter):
    """Every teacher answers every prompt, the arbiter scores all. -> rows with "candidates", kept in steps/arbitrage/candidates.jsonl"""
    r = run.recipe

    def make(folder, resume):
        rows = run.prompts or questions("train", r.num_prompts, f"prompts/{r.seed}", level=r.level)
        answers, scores = {}, {}
        for i, (name, source) in enumerate(teachers.items()):
            sampled = read_answers(source, rows, r) if Path(source).is_file() else \
                [g[0] for g in answers_of(run, source, rows, temperature=r.teacher_temperature, seed=1000 * r.seed + i, progress=f"{name} answers")]
            answers[name] = sampled
            scores[name] = scores_of(run, arbiter, [{**row, **answer} for row, answer in zip(rows, sampled)])
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "candidates.jsonl", map(scored, candidates_from(rows, answers, scores)))
    step(run, "arbitrage", f"arbitrage: {len(teachers)} teachers answer every prompt, the arbiter scores them", make)
    return rows_of(run.folder / "steps" / "arbitrage" / "candidates.jsonl")


def scored(row):
    """A row of candidates without those that the arbiter could not score, as it goes to a file."""
    return {**without_added_keys(row), "candidates": [c for c in row["candidates"] if c["reward"] is not None]}


def best_teacher(rows):
    """The single teacher with the highest mean reward over all prompts."""
    rewards = {}
    for row in rows:
        for c in row["candidates"]:
            if not finite(c["reward"]):
                raise ValueError(f"the reward of an answer of {c['teacher']} is {c['reward']}, no finite "
                                 "number; look at the arbiter")
            rewards.setdefault(c["teacher"], []).append(c["reward"])
    if not rewards:
        raise ValueError("the arbiter has scored no answer; take --too-long cut-left, or shorter prompts")
    return max(rewards, key=lambda teacher: sum(rewards[teacher]) / len(rewards[teacher]))


def print_counts(title, counts):
    """One line of counts on rank 0: numbers, and those by language."""
    if distributed.is_main():
        shown = [f"{key.replace('_', ' ')} {value}" for key, value in counts.items() if finite(value)]
        cut = ", ".join(f"{code} {n}" for code, n in counts.get("cut_by_language", {}).items())
        print(printable(f"{title}: {', '.join(shown)}{f' (cut by language: {cut})' if cut else ''}"),
              flush=True)


def family_table(run, teachers):
    """The world's languages -> teacher by family: the cluster's own; the shared ones go to the first."""
    return {code: next((name for name, codes in run.clusters.items() if code in codes), next(iter(teachers))) for code in LANGUAGES}


# ---- train per cluster, merge; online DPO ----------------------------------------------------------------------------------------

def train_clusters_and_merge(run, name, title, stage, start, rows, its_settings, epochs, shared=SHARED):
    """One model per language cluster, all from `start` ({cluster: folder}: each from its own), then their plain average (weighted linear
    merging, launch blog).

    All clusters together take as many optimizer steps as one model would on all rows, shared out equally; `cluster_spill` of the other
    languages' rows keep the clusters from drifting apart (LOG.md: hard clusters this small do not average well).
    """
    r, folders, known = run.recipe, [], SHARED + sum(run.clusters.values(), [])
    total = max(len(run.clusters), round(epochs * len(rows) / r.batch_size))
    for cluster in run.clusters:
        codes = cluster_languages(run.clusters, cluster, shared)
        rng = random.Random(f"{name}/{cluster}/{r.seed}")
        # None, in all: without a language
        home = [home_language(row.get("language"), known) for row in rows]
        mine = [row for row, code in zip(rows, home)
                if code in (None, *codes) or rng.random() < r.cluster_spill]
        batch_size = min(r.batch_size, len(mine)) // distributed.num_ranks() * distributed.num_ranks()      # a small cluster takes small batches
        if not batch_size:
            raise ValueError(f"cluster {cluster!r} has {len(mine)} examples at {name}, too few to train on; give more prompts in its languages, or fewer clusters")
        steps = max(1, round(total / len(run.clusters)))
        cluster_settings = {**its_settings, "batch_size": batch_size, "max_steps": steps, "warmup_steps": max(1, steps // 10),
                            "learning_rate": r.cluster_scale * its_settings["learning_rate"]}
        folders.append(train_step(run, f"{name}-{cluster}", f"{title}: {cluster}", stage, start[cluster] if isinstance(start, dict) else start, mine,
                                  settings(run, **cluster_settings)))

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


def online_pairs(run, name, round_number, current, arbiter, same):
    """k samples per fresh prompt from the current model, ranked by the arbiter; best against worst."""
    r = run.recipe

    def make(folder, resume):
        if run.embedded:
            rows = questions("preference", r.online_prompts, f"online/{r.seed}/{round_number}", level=r.level)
        else:
            rng = random.Random(f"online/{r.seed}/{round_number}")
            rows = rng.sample(run.prompts, min(r.online_prompts, len(run.prompts)))
        samples = answers_of(run, current, rows, r.online_samples, r.online_temperature, seed=7919 * round_number + r.seed, progress=f"sampling, round {round_number}")
        by_sample = {f"sample-{i}": [group[i] for group in samples] for i in range(r.online_samples)}
        flat = [{**row, **answer} for row, group in zip(rows, samples) for answer in group]
        scores = iter(scores_of(run, arbiter, flat))
        rewards = [[next(scores) for _ in group] for group in samples]
        of_sample = {f"sample-{i}": [group[i] for group in rewards] for i in range(r.online_samples)}
        candidates = list(map(scored, candidates_from(rows, by_sample, of_sample)))
        pairs, counts = best_worst(candidates, r.online_margin, r.keep_cut, same)
        print_counts(f"{name}, pairs of {len(rows)} prompts", counts)
        if not pairs:
            raise ValueError(f"{name}: no pair in {len(rows)} prompts ({counts}); lower --online-margin, "
                             "raise --online-samples, --online-temperature or --online-prompts, and start "
                             "the same run again"
                             + ("; cut answers are left out, see --keep-cut" if counts["cut"] else ""))
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "pairs.jsonl", pairs)
        return {"pairs": counts}
    step(run, f"{name}-pairs", f"online round {round_number}: {r.online_samples} samples a prompt, ranked by the arbiter", make)
    return rows_of(run.folder / "steps" / f"{name}-pairs" / "pairs.jsonl")


def online_rounds(run, prefix, start, arbiter, same):
    """Rounds of online DPO from `start`; the reference of each round is the model it starts from. -> [(name, model folder), ...]"""
    r, done, current = run.recipe, [], start
    for t in range(1, r.rounds + 1):
        name = f"{prefix}-{t}"
        pairs = online_pairs(run, name, t, current, arbiter, same)
        current = train_clusters_and_merge(run, name, f"online DPO, round {t}", "dpo", current, pairs, dpo_settings(run, "online"), r.online_epochs)
        done.append((name, current))
    return done


# ---- the recipe ------------------------------------------------------------------------------------------------------------------

def run_recipe(run):
    """The whole recipe. Returns the summary that report.py draws; everything else is on disk."""
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
        teachers, arbiter, arbiter_record = {teacher_name(t): Path(t) for t in run.teachers}, run.arbiter, None
    candidates = arbitrage(run, teachers, arbiter)

    # Arbitrage -> SFT: the student of the best answers, and the students of one teacher, of random ones, of each family's own
    # two answers are the same if their ids are
    same = load_tokenizer(base).key
    single = best_teacher(candidates)

    def routed(how, table=None):
        return route(candidates, how, r.seed, table, r.keep_cut, same)

    reward_rows, arbitrage_counts = routed("reward")
    unscored = len(teachers) * len(candidates) - sum(len(row["candidates"]) for row in candidates)
    arbitrage_counts |= {"unscored": unscored} if unscored else {}          # too long for the arbiter
    print_counts(f"arbitrage of {len(teachers)} teachers", arbitrage_counts)
    to_single = {row.get("language"): single for row in candidates}
    arms = [("single", f"SFT: single best teacher ({single})", routed("fixed", to_single)[0]),
            ("random", "SFT: random routing", routed("random")[0])]
    if run.embedded:
        arms.append(("family", "SFT: family routing", routed("fixed", family_table(run, teachers))[0]))
    arms.append(("mix", "SFT: reward routing, one model on the mix", reward_rows))
    for name, title, rows in arms:
        if len(rows) < r.batch_size:
            raise ValueError(f"{title}: {len(rows)} of {len(candidates)} prompts have an answer to train on, "
                             f"fewer than one batch of {r.batch_size}; give more prompts, raise "
                             "--max-new-tokens, or take cut answers with --keep-cut, and give another --out")
        keep(name, title, "arm", train_step(run, name, title, "sft", base, rows, settings(run, **sft_settings(run), epochs=r.sft_epochs)), "base")
    sft = keep("sft", "SFT on the arbitrage, per cluster, merged", "stage",
               train_clusters_and_merge(run, "sft", "SFT", "sft", base, reward_rows, sft_settings(run), r.sft_epochs), "base")

    # Offline DPO: the pool's best against its worst
    pairs, offline_counts = best_worst(candidates, r.offline_margin, r.keep_cut, same)
    print_counts("offline pairs", offline_counts)
    offline = keep("offline", "Offline DPO, per cluster, merged", "stage",
                   train_clusters_and_merge(run, "offline", "offline DPO", "dpo", sft, pairs, dpo_settings(run, "offline"), r.offline_epochs), "sft")

    # Online DPO: three rounds
    previous = "offline"
    for t, (name, folder) in enumerate(online_rounds(run, "online", offline, arbiter, same), 1):
        keep(name, f"Online DPO, round {t}, merged", "stage", folder, previous)
        previous = name

    if run.arms == "all":
        more_arms(run, keep, base, sft, reward_rows, arbiter, same)

    for model in models:
        evaluate_model(run, model, arbiter)
    summary = summarize_run(run, models, arbiter_record, arbitrage_counts | {"offline_pairs": offline_counts}, started)
    if distributed.is_main():
        write_json(run.folder / "summary.json", summary)
        write_report(run.folder)
    distributed.barrier()
    return summary


def more_arms(run, keep, base, sft, reward_rows, arbiter, same):
    """--arms all: online without offline (offline only is the stage itself), RLOO from the same SFT model, clusters without shared languages."""
    r, previous = run.recipe, "sft"
    for t, (name, folder) in enumerate(online_rounds(run, "online-only", sft, arbiter, same), 1):
        keep(name, f"SFT + online DPO only, round {t}", "arm", folder, previous)
        previous = name
    reward_model, _ = weights.load(arbiter, run.device)
    prompts = questions("preference", r.rloo_steps * r.batch_size, f"rloo/{r.seed}", level=r.level) if run.embedded else \
        list(map(without_added_keys, run.prompts))
    its_settings = settings(run, RLOO, learning_rate=r.rloo_learning_rate, beta=r.rloo_beta,
                            num_samples=r.rloo_samples, max_steps=r.rloo_steps, too_long=r.too_long,
                            max_new_tokens=r.max_new_tokens, keep_cut=False)
    rloo = train_step(run, "rloo", "RLOO from the SFT model", "rloo", sft, prompts, its_settings,
                      reward_model=reward_model)
    keep("rloo", "SFT + RLOO", "arm", rloo, "sft")
    no_shared = train_clusters_and_merge(run, "no-shared", "SFT without shared languages", "sft", base,
                                         reward_rows, sft_settings(run), r.sft_epochs, shared=[])
    keep("no-shared", "SFT per cluster without shared languages, merged", "arm", no_shared, "base")
