"""The Aya Expanse recipe (arXiv 2412.04261 and its launch blog), written to be read beside them.

    base -> teachers, one per language cluster -> arbiter (a reward model)
    -> arbitrage: every teacher answers every prompt, the arbiter keeps the best answer
    -> SFT per cluster -> merge
    -> offline DPO on the pool's best against its worst, per cluster -> merge
    -> three rounds of online DPO: sample, rank, train per cluster, merge

Beside it run arms: models that differ in one decision, from the same start with the same number of examples
and steps, so that a gain can be told from more training. Every step leaves a folder RUN/steps/<name>: a rerun
skips the steps that are whole, a killed run resumes at the step where it stopped.
"""

import random
from pathlib import Path

import torch

from . import distributed, weights, world_data
from .arbitrage import candidates_from, read_answers, route
from .report_charts import finite
from .pipeline_checks import teacher_name
from .command import printable
from .config import DPO, RL, SFT, Pretrain, Reward
from .model_config import model_preset
from .data import without_added_keys
from .endpoint import is_endpoint
from .endpoint_answers import num_missing, tally, tally_line
from .languages import LANGUAGES, SHARED, cluster_languages, home_language
from .model import CohereForCausalLM, init_weights
from .preferences import best_worst
from .stages import train_stage
from .pipeline_results import Results, judge_arbiter
from .merge_folders import merge_folders
from .pipeline_steps import (answers_of, answers_of_endpoint, data_file, read_done, saved_rows, scores_of,
                             stage_settings, step, train_step, write_rows)
from .tokenizer import load_tokenizer, train_tokenizer
from .world import gold_answer, questions


# ---- base, teachers, arbiter -------------------------------------------------------------------------------

def build_base(run):
    """Tokenizer and base model, pretrained from scratch on noisy multilingual text."""
    r = run.recipe

    def make(folder, resume):
        rows = world_data.corpus(r.corpus, r.seed, r.level)
        data = data_file(run, "base", rows)
        some = [q for q in rows if "prompt" in q][:20000]
        texts = [q["prompt"] for q in some] + [gold_answer(q) for q in some]
        tokenizer = train_tokenizer(texts, r.vocab_size)
        model = CohereForCausalLM(model_preset(r.model, tokenizer.vocab_size))
        model = init_weights(model, torch.Generator().manual_seed(r.seed))
        held_out = [{**q, "completion": gold_answer(q)}
                    for q in questions("validation", min(240, r.corpus), f"base/{r.seed}", level=r.level)]
        # four looks on the way, since the base takes the longest
        every = max(1, r.corpus // r.batch_size // 4)
        its_settings = stage_settings(run, Pretrain, learning_rate=r.base_learning_rate, warmup_steps=50,
                                      eval_every=every)
        train_stage("pretrain", model, tokenizer, [data], its_settings, folder, run.device,
                    [data_file(run, "base-held-out", held_out)], resume)
    step(run, "base", f"pretraining a base on {r.corpus} rows of noisy text in 23 languages", make)
    return run.folder / "steps" / "base" / "model"


def build_teachers(run, base):
    """The pool: one teacher per language cluster, strong at home and weak elsewhere. -> {name: folder}"""
    r = run.recipe
    its_settings = stage_settings(run, SFT, learning_rate=r.teacher_learning_rate, epochs=1.0)

    def lessons(name):
        return lambda: world_data.lessons(run.clusters, name, r.lessons, r.seed, r.level)
    return {name: train_step(run, f"teacher-{name}", f"the teacher of {name}", "sft", base, lessons(name),
                             its_settings) for name in run.clusters}


def build_arbiter(run, base, teachers):
    """The reward model: it first reads right answers as language (it must know more than its pool), then
    Bradley-Terry on preference pairs. -> (its folder, what it is worth on held-out pairs)"""
    r = run.recipe
    reading = stage_settings(run, SFT, learning_rate=r.arbiter_gold_learning_rate, epochs=1.0)
    reader = train_step(run, "arbiter-start", "the arbiter reads right answers", "sft", base,
                        lambda: world_data.gold(r.arbiter_gold, r.seed, r.level), reading)

    def pairs(split, count, flip):
        rows = questions(split, count, f"arbiter/{r.seed}", level=r.level)
        half = rows[:len(rows) // 2]        # these carry teachers' samples, the others corruptions
        samples = [answers_of(run, folder, half, seed=r.seed + i)
                   for i, folder in enumerate(teachers.values())]
        sampled = [[answer["completion"] for (answer,) in of_teachers]
                   for of_teachers in zip(*samples)] + [None] * (len(rows) - len(half))
        return world_data.graded_pairs(rows, sampled, r.seed, flip)

    def make(folder, resume):
        data = data_file(run, "arbiter", pairs("train", r.arbiter_pairs, 0.05))
        held_out = pairs(r.eval_split, max(240, r.arbiter_pairs // 12), 0.0)
        model, tokenizer = weights.load(reader, run.device, trunk=True, sharded=True,
                                        compute_dtype=getattr(torch, r.dtype))
        its_settings = stage_settings(run, Reward, learning_rate=r.arbiter_learning_rate,
                                      lm_weight=r.arbiter_lm_weight, epochs=1.0, warmup_steps=20)
        reward_folder = train_stage("reward", model, tokenizer, [data], its_settings, folder, run.device,
                                    resume=resume)
        return {"reward_model": judge_arbiter(run, reward_folder, held_out)}
    record = step(run, "arbiter", "the arbiter: a reward model on preference pairs", make)
    return run.folder / "steps" / "arbiter" / "model", record["reward_model"]


# ---- arbitrage ---------------------------------------------------------------------------------------------

def arbitrage(run, teachers, arbiter):
    """Every teacher answers every prompt, the arbiter scores all answers. -> rows with "candidates", kept in
    steps/arbitrage/candidates.jsonl"""
    r = run.recipe

    def make(folder, resume):
        rows = run.prompts or questions("train", r.num_prompts, f"prompts/{r.seed}", level=r.level)
        # endpoints first: a wrong key is seen before a model has answered for hours
        order = sorted(enumerate(teachers.items()), key=lambda item: item[1][1] not in run.endpoints)
        answers = {name: answers_of_teacher(run, i, name, source, rows) for i, (name, source) in order}
        answers = {name: answers[name] for name in teachers}
        tallies = {name: tally(run.endpoints[source], rows, [[answer] for answer in answers[name]])
                   for name, source in teachers.items() if source in run.endpoints}
        for found in tallies.values():
            distributed.say(tally_line(found))
        scores = {name: scores_of_teacher(run, arbiter, rows, answers[name], name in tallies)
                  for name in teachers}
        write_rows(folder / "candidates.jsonl", map(scored, candidates_from(rows, answers, scores)))
        return {"endpoints": tallies} if tallies else {}
    step(run, "arbitrage",
         f"arbitrage: {len(teachers)} teachers answer every prompt, the arbiter scores them", make)
    return saved_rows(run.folder / "steps" / "arbitrage" / "candidates.jsonl")


def answers_of_teacher(run, i, name, source, rows):
    """One answer of teacher number i to each row: from its file of completions, its endpoint or its model."""
    temperature, seed = run.recipe.teacher_temperature, 1000 * run.recipe.seed + i
    if source in run.endpoints:
        return answers_of_endpoint(run, i, run.endpoints[source], rows, temperature, seed)
    if Path(source).is_file():
        return read_answers(source, rows, run.recipe)
    groups = answers_of(run, source, rows, temperature=temperature, seed=seed, progress=f"{name} answers")
    return [answer for (answer,) in groups]


def scores_of_teacher(run, arbiter, rows, answers, of_endpoint):
    """The arbiter's score of each answer, None where it is missing or too long. An endpoint's limit is in its
    own tokens and nobody can shorten what it said, so that --too-long refuse leaves such answers out too."""
    there = [i for i, answer in enumerate(answers) if answer["completion"] is not None]
    too_long = "skip" if of_endpoint and run.recipe.too_long == "refuse" else None
    scores = dict(zip(there, scores_of(run, arbiter, [{**rows[i], **answers[i]} for i in there], too_long)))
    return [scores.get(i) for i in range(len(rows))]


def scored(row):
    """A row of candidates without those that the arbiter could not score, as it goes to a file."""
    kept = [candidate for candidate in row["candidates"] if candidate["reward"] is not None]
    return {**without_added_keys(row), "candidates": kept}


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
    shown = [f"{key.replace('_', ' ')} {value}" for key, value in counts.items() if finite(value)]
    cut = ", ".join(f"{code} {n}" for code, n in counts.get("cut_by_language", {}).items())
    said = printable(f"{title}: {', '.join(shown)}{f' (cut by language: {cut})' if cut else ''}")
    distributed.from_main(lambda: print(said, flush=True))


def teacher_of_family(run, teachers):
    """{language: its cluster's own teacher}; the languages of all clusters go to the first one."""
    home = {code: name for name, codes in reversed(run.clusters.items()) for code in codes}
    return {code: home.get(code, next(iter(teachers))) for code in LANGUAGES}


# ---- train per cluster, merge; online DPO ------------------------------------------------------------------

def train_clusters_and_merge(run, name, title, stage, start, rows, its_settings, epochs, shared=SHARED):
    """One model per language cluster, all from `start` ({cluster: folder}: each from its own), then their
    plain average (weighted linear merging, launch blog). -> the merged model's folder

    All clusters together take as many optimizer steps as one model would take on all rows, in equal shares.
    Each also trains on the share `cluster_spill` of the other languages' rows, which keeps the clusters from
    drifting apart (LOG.md: clusters this small do not average well without).
    """
    r, folders, known = run.recipe, [], SHARED + sum(run.clusters.values(), [])
    total = max(len(run.clusters), round(epochs * len(rows) / r.batch_size))
    for cluster in run.clusters:
        codes = cluster_languages(run.clusters, cluster, shared)
        rng = random.Random(f"{name}/{cluster}/{r.seed}")
        # None: a row without a language, which all clusters train on
        home = [home_language(row.get("language"), known) for row in rows]
        mine = [row for row, code in zip(rows, home)
                if code in (None, *codes) or rng.random() < r.cluster_spill]
        ranks = distributed.num_ranks()
        batch_size = min(r.batch_size, len(mine)) // ranks * ranks      # a small cluster takes small batches
        if not batch_size:
            raise ValueError(f"cluster {cluster!r} has {len(mine)} examples at {name}, too few to train on; "
                             "give more prompts in its languages, or fewer clusters")
        steps = max(1, round(total / len(run.clusters)))
        cluster_settings = {**its_settings, "batch_size": batch_size, "max_steps": steps,
                            "warmup_steps": max(1, steps // 10),
                            "learning_rate": r.cluster_scale * its_settings["learning_rate"]}
        own = start[cluster] if isinstance(start, dict) else start
        folders.append(train_step(run, f"{name}-{cluster}", f"{title}: {cluster}", stage, own, mine,
                                  stage_settings(run, **cluster_settings), smaller_batches=True))

    def merge(folder):
        folder.mkdir(parents=True, exist_ok=True)
        merge_folders(folders, folder / "model", "linear")

    def make(folder, resume):
        distributed.from_main(lambda: merge(folder))
    step(run, name, f"{title}: the average of {len(folders)} clusters", make)
    return run.folder / "steps" / name / "model"


def sft_settings(run):
    return dict(kind=SFT, learning_rate=run.recipe.sft_learning_rate)


def dpo_settings(run, stage):
    r = run.recipe
    return dict(kind=DPO, learning_rate=getattr(r, f"{stage}_learning_rate"),
                beta=getattr(r, f"{stage}_beta"), nll_weight=getattr(r, f"{stage}_nll_weight"))


def online_pairs(run, name, round_number, current, arbiter, same):
    """k samples per fresh prompt from the current model, ranked by the arbiter; best against worst."""
    r = run.recipe

    def make(folder, resume):
        if run.embedded:
            rows = questions("preference", r.online_prompts, f"online/{r.seed}/{round_number}", level=r.level)
        else:
            rng = random.Random(f"online/{r.seed}/{round_number}")
            rows = rng.sample(run.prompts, min(r.online_prompts, len(run.prompts)))
        samples = answers_of(run, current, rows, r.online_samples, r.online_temperature,
                             seed=7919 * round_number + r.seed, progress=f"sampling, round {round_number}")
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
        write_rows(folder / "pairs.jsonl", pairs)
        return {"pairs": counts}
    step(run, f"{name}-pairs",
         f"online round {round_number}: {r.online_samples} samples a prompt, ranked by the arbiter", make)
    return saved_rows(run.folder / "steps" / f"{name}-pairs" / "pairs.jsonl")


def online_rounds(run, prefix, start, arbiter, same):
    """Rounds of online DPO from `start`, one after the other: yields (name, model folder). The reference of
    each round is the model that it starts from."""
    r, current = run.recipe, start
    for t in range(1, r.rounds + 1):
        name = f"{prefix}-{t}"
        pairs = online_pairs(run, name, t, current, arbiter, same)
        current = train_clusters_and_merge(run, name, f"online DPO, round {t}", "dpo", current, pairs,
                                           dpo_settings(run, "online"), r.online_epochs)
        yield name, current


# ---- the recipe --------------------------------------------------------------------------------------------

def run_recipe(run):
    """The whole recipe. Returns the summary that the report draws; everything else is on disk."""
    results, r = Results(run), run.recipe
    base = results.keep("base", "Base", "stage", run.base or build_base(run))
    if run.embedded:
        teachers = build_teachers(run, base)
        for name, folder in teachers.items():
            results.keep(f"teacher-{name}", f"Teacher {name}", "teacher", folder)
        results.show()
        results.trust(*build_arbiter(run, base, teachers))
    else:
        teachers = {teacher_name(t): t if is_endpoint(t) else Path(t) for t in run.teachers}
        results.trust(run.arbiter)
    arbiter = results.arbiter
    candidates = arbitrage(run, teachers, arbiter)

    # Arbitrage -> SFT, with the arms beside it
    same = load_tokenizer(base).key                 # two answers are the same if their ids are
    reward_rows = sft_arms(run, results, base, teachers, candidates, same)
    sft = results.keep("sft", "SFT on the arbitrage, per cluster, merged", "stage", train_clusters_and_merge(
        run, "sft", "SFT", "sft", base, reward_rows, sft_settings(run), r.sft_epochs), "base")
    results.show()

    # Offline DPO: the pool's best against its worst
    pairs, counts = best_worst(candidates, r.offline_margin, r.keep_cut, same)
    print_counts("offline pairs", counts)
    results.about["arbitrage"]["offline_pairs"] = counts
    its_settings = dpo_settings(run, "offline")
    offline = results.keep("offline", "Offline DPO, per cluster, merged", "stage", train_clusters_and_merge(
        run, "offline", "offline DPO", "dpo", sft, pairs, its_settings, r.offline_epochs), "sft")
    results.show()

    # Online DPO: three rounds
    previous = "offline"
    for t, (name, folder) in enumerate(online_rounds(run, "online", offline, arbiter, same), 1):
        results.keep(name, f"Online DPO, round {t}, merged", "stage", folder, previous)
        results.show()
        previous = name

    if run.arms == "all":
        more_arms(run, results, base, sft, reward_rows, same)
    return results.show()


def sft_arms(run, results, base, teachers, candidates, same):
    """The students that SFT on the arbitrage is compared with: of the single best teacher, of random ones, of
    each family's own, and one model on the whole mix. Returns the rows of reward routing."""
    r, single = run.recipe, best_teacher(candidates)

    def routed(how, teacher_of=None):
        return route(candidates, how, r.seed, teacher_of, r.keep_cut, same)

    reward_rows, counts = routed("reward")
    tallies = read_done(run.folder / "steps" / "arbitrage").get("endpoints", {})
    missing = sum(map(num_missing, tallies.values()))
    # too long for the arbiter
    unscored = len(teachers) * len(candidates) - sum(len(row["candidates"]) for row in candidates) - missing
    results.about["arbitrage"] = counts | ({"unscored": unscored} if unscored else {})
    if tallies:
        results.about["arbitrage"] |= {"missing": missing, "endpoints": tallies}
    print_counts(f"arbitrage of {len(teachers)} teachers", results.about["arbitrage"])
    to_single = {row.get("language"): single for row in candidates}
    arms = [("single", f"SFT: single best teacher ({single})", routed("fixed", to_single)[0]),
            ("random", "SFT: random routing", routed("random")[0])]
    if run.embedded:
        to_family = teacher_of_family(run, teachers)
        arms.append(("family", "SFT: family routing", routed("fixed", to_family)[0]))
    arms.append(("mix", "SFT: reward routing, one model on the mix", reward_rows))
    for name, title, rows in arms:
        if len(rows) < r.batch_size:
            raise ValueError(f"{title}: {len(rows)} of {len(candidates)} prompts have an answer to train on, "
                             f"fewer than one batch of {r.batch_size}; give more prompts, raise "
                             "--max-new-tokens, or take cut answers with --keep-cut, and give another --out "
                             f"(the answers are in {run.folder / 'steps' / 'arbitrage'})")
        its_settings = stage_settings(run, **sft_settings(run), epochs=r.sft_epochs)
        folder = train_step(run, name, title, "sft", base, rows, its_settings)
        results.keep(name, title, "arm", folder, "base")
    return reward_rows


def more_arms(run, results, base, sft, reward_rows, same):
    """--arms all: online without offline (offline alone is the stage itself), RLOO from the same SFT model,
    clusters without shared languages."""
    r, previous, arbiter = run.recipe, "sft", results.arbiter
    for t, (name, folder) in enumerate(online_rounds(run, "online-only", sft, arbiter, same), 1):
        results.keep(name, f"SFT + online DPO only, round {t}", "arm", folder, previous)
        previous = name
    reward_model, _ = weights.load(arbiter, run.device)
    if run.embedded:
        prompts = questions("preference", r.rloo_steps * r.batch_size, f"rloo/{r.seed}", level=r.level)
    else:
        prompts = list(map(without_added_keys, run.prompts))
    its_settings = stage_settings(run, RL, learning_rate=r.rloo_learning_rate, beta=r.rloo_beta,
                                  num_samples=r.rloo_samples, max_steps=r.rloo_steps, too_long=r.too_long,
                                  max_new_tokens=r.max_new_tokens, keep_cut=False)
    rloo = train_step(run, "rloo", "RLOO from the SFT model", "rl", sft, prompts, its_settings,
                      reward_model=reward_model)
    results.keep("rloo", "SFT + RLOO", "arm", rloo, "sft")
    no_shared = train_clusters_and_merge(run, "no-shared", "SFT without shared languages", "sft", base,
                                         reward_rows, sft_settings(run), r.sft_epochs, shared=[])
    results.keep("no-shared", "SFT per cluster without shared languages, merged", "arm", no_shared, "base")
