"""The recipe's merging questions at small scale, from finished runs of several seeds (train.py --seed S --arms all --out RUN).

    python tests/bench/merging_questions.py RUN [RUN ...] --out DIR [--heads 1]          trains, answers, writes DIR/seed-S.json
    python tests/bench/merging_questions.py --table DIR/seed-*.json                      the Markdown tables

Every variant is a run of its own, DIR/seed-S/VARIANT/steps/NAME, with the recipe's settings and step names, so that clusters draw the recipe's own
rows, and what is whole is not done again. The finished runs are only read. All variants of one stage take the same number of optimizer steps in all.

methods     the finished run's clusters of each stage merged by other methods; SLERP takes two models, so four are merged as a tree of pairs
hard        SFT by cluster without the others' rows (cluster_spill 0), with and without the shared languages: clusters that really differ
languages   SFT with one model per language, without others' rows or shared languages, merged
once        offline DPO of each cluster from its own SFT model, merged once at the end (also: DPO, then merge)
order       offline DPO as one model on the merged SFT model (merge, then DPO)
heads-N     base, one model on the mix and merged clusters for a decoder with N heads as wide as the recipe's, all else alike
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aya_min import config, distributed, stages, weights                                                        # noqa: E402
from aya_min.arbitrage import route                                                                             # noqa: E402
from aya_min.evaluate import join, win_rates                                                                    # noqa: E402
from aya_min.languages import LANGUAGES                                                                         # noqa: E402
from aya_min.model import CohereForCausalLM, init_weights                                                       # noqa: E402
from aya_min.pipeline import dpo_settings, sft_settings, train_clusters_and_merge                               # noqa: E402
from aya_min.preferences import best_worst                                                                      # noqa: E402
from aya_min.results import evaluate_model                                                                      # noqa: E402
from aya_min.soups import merge_folders                                                                         # noqa: E402
from aya_min.steps import Run, rows_of, settings, step, train_step, write_json                                  # noqa: E402
from aya_min.tokenizer import load_tokenizer                                                                    # noqa: E402

STARTS = {"sft": "base", "no-shared": "base", "offline": "sft", "online-1": "offline"}      # merged stage of the recipe -> what its clusters started from
METHODS = ("slerp", "ties", "dare-ties", "model-stock")      # the settings of mergeconfig.py, the papers' where they give any
DECODINGS = ("greedy", "sampled")

# (question, what the papers say, [(A, B, what the win rate of A against B tells)]); a model is VARIANT/NAME, recipe/NAME the finished run's
QUESTIONS = [
    ("shared languages in every cluster", "Aya Expanse: English, Spanish and French in each cluster make merging more robust",
     [("recipe/no-shared", "recipe/sft", "without against with, the recipe's clusters (spill 0.4)"), ("hard/no-shared", "hard/sft", "without against with, no spill"),
      ("methods/no-shared-ties", "methods/sft-ties", "without against with, merged by TIES"),
      ("methods/no-shared-dare-ties", "methods/sft-dare-ties", "without against with, merged by DARE-TIES")]),
    ("one model per language", "Aya Expanse: merging one model per language does not achieve the benefits of cross-lingual transfer; Mix or Merge: six monolingual "
     "models merged beat the mix (71.2 against 67.4), three do better (77.0)",
     [("languages/sft", "hard/sft", "against one per family, no spill"), ("languages/sft", "recipe/sft", "against one per family, the recipe's"),
      ("languages/sft", "recipe/mix", "against one model on the mix")]),
    ("merging once, at the end", "Aya Expanse merges after every stage; no comparison given",
     [("once/offline", "recipe/offline", "SFT and offline DPO by cluster, then merged, against merged after each")]),
    ("merge and DPO, in which order", "Mix or Merge (SLERP, against their base): DPO, then merge 78.0; merge, then DPO 74.0; merge without DPO 72.6",
     [("once/offline", "order/offline", "DPO, then merge, against merge, then DPO"), ("recipe/offline", "order/offline", "merge, DPO by cluster, merge, against merge, then DPO")]),
]
SIZES = ("merging gain and size", "Aya Expanse: gains from merging up to 3 times larger at 35B than at 8B")


# ---- the work ----------------------------------------------------------------------------------------------------------------------

def answer(source, out, all_heads):
    """All variants of one seed. source: the folder of a finished run. Leaves `out` and out.json."""
    if not (source / "summary.json").is_file() or not (source / "steps" / "no-shared" / "done.json").is_file():
        raise ValueError(f"{source} is not a finished run of the recipe with all arms; finish it with train.py --arms all --out {source}")
    about = json.loads((source / "config.json").read_text(encoding="utf-8"))
    r, clusters, device = config.Recipe(**about["recipe"]), about["clusters"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, models, theirs = time.time(), {}, lambda name: source / "steps" / name / "model"
    for name in [*STARTS, "base", "mix"]:
        models[f"recipe/{name}"] = source / "steps" / f"eval-{name}"
    sizes = {"recipe": num_parameters(theirs("base"))}

    def variant(name, clusters=clusters, **changes):
        print(f"-- seed {r.seed}, {name}: {time.time() - started:.0f} s", flush=True)
        return Run(out / name, replace(r, **changes), device, clusters)

    def save():
        """What there is so far: a run that is stopped leaves the figures of the variants that are done."""
        seconds = {folder.name: sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in folder.glob("steps/*/done.json")) for folder in sorted(out.iterdir())}
        write_json(out.with_name(out.name + ".json"), {"seed": r.seed, "versions": stages.versions(), "recipe": about["recipe"], "seconds": seconds,
                                                       "parameters": sizes, **numbers(models, sizes)})

    def evaluated(run, name):
        """The model of a step, answering the recipe's test questions."""
        folder = run.folder / "steps" / name / "model"
        evaluate_model(run, {"name": name, "folder": folder}, None)
        models[f"{run.folder.name}/{name}"] = run.folder / "steps" / f"eval-{name}"
        return folder

    candidates = rows_of(source / "steps" / "arbitrage" / "candidates.jsonl")
    rows, pairs = route(candidates, "reward", r.seed)[0], best_worst(candidates, r.offline_margin)[0]

    run = variant("methods")
    for stage, start in STARTS.items():
        for method in METHODS:
            merge_step(run, f"{stage}-{method}", method, [theirs(f"{stage}-{cluster}") for cluster in clusters], theirs(start))
            evaluated(run, f"{stage}-{method}")
    save()

    run = variant("once")
    starts = {cluster: theirs(f"sft-{cluster}") for cluster in clusters}
    train_clusters_and_merge(run, "offline", "offline DPO, each cluster from its own SFT model", stages.dpo, starts, pairs, dpo_settings(run, "offline"), r.offline_epochs)
    evaluated(run, "offline")
    run = variant("order")
    train_step(run, "offline", "offline DPO, one model", stages.dpo, theirs("sft"), pairs, settings(run, **dpo_settings(run, "offline"), epochs=r.offline_epochs))
    evaluated(run, "offline")
    save()

    run = variant("hard", cluster_spill=0.0)
    for name, shared in (("sft", {}), ("no-shared", {"shared": []})):
        train_clusters_and_merge(run, name, "SFT without spill", stages.sft, theirs("base"), rows, sft_settings(run), r.sft_epochs, **shared)
        evaluated(run, name)
    run = variant("languages", {code: [code] for code in LANGUAGES}, cluster_spill=0.0)
    train_clusters_and_merge(run, "sft", "SFT by language", stages.sft, theirs("base"), rows, sft_settings(run), r.sft_epochs, shared=[])
    evaluated(run, "sft")
    save()

    for heads in all_heads:
        run = variant(f"heads-{heads}")
        base = base_with(run, heads, source)
        train_step(run, "mix", "SFT, one model on the mix", stages.sft, base, rows, settings(run, **sft_settings(run), epochs=r.sft_epochs))
        train_clusters_and_merge(run, "sft", "SFT", stages.sft, base, rows, sft_settings(run), r.sft_epochs)
        for name in ("base", "mix", "sft"):
            evaluated(run, name)
        sizes[run.folder.name] = num_parameters(base)
        save()
    print(f"-- seed {r.seed}, done: {time.time() - started:.0f} s", flush=True)


def merge_step(run, name, method, folders, start):
    def make(folder, resume):
        folder.mkdir(parents=True, exist_ok=True)
        if method == "slerp":
            slerp_tree(folders, folder / "model")
        else:
            seed = {"seed": run.recipe.seed} if method.startswith("dare") else {}
            merge_folders(folders, folder / "model", method, base=start, **seed)
    step(run, name, f"{len(folders)} clusters merged by {method}", make)


def slerp_tree(folders, out):
    """SLERP of the SLERPs of both halves, each weighing as many models as it holds. -> a model folder"""
    if len(folders) == 1:
        return folders[0]
    half = len(folders) // 2
    sides = [slerp_tree(part, out.with_name(f"{out.name}-{side}")) for part, side in ((folders[:half], "left"), (folders[half:], "right"))]
    return merge_folders(sides, out, "slerp", t=1 - half / len(folders))


def base_with(run, heads, source):
    """A base with so many heads, pretrained as the finished run's on the same rows with the same tokenizer. -> its folder"""
    r, preset = run.recipe, config.MODEL_PRESETS[run.recipe.model]

    def make(folder, resume):
        tokenizer = load_tokenizer(source / "steps" / "base")
        size = {key: preset[key] * heads // preset["num_attention_heads"] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
        model = config.ModelConfig(**{**preset, **size, "vocab_size": tokenizer.vocab_size, "num_key_value_heads": None})
        model = init_weights(CohereForCausalLM(model), torch.Generator().manual_seed(r.seed))
        its_settings = settings(run, config.Pretrain, learning_rate=r.base_learning_rate, warmup_steps=50, save_every=500)
        stages.pretrain(model, tokenizer, [source / "data" / "base.jsonl"], its_settings, folder, run.device, resume=resume)
    step(run, "base", f"pretraining a base of {heads} heads", make)
    return run.folder / "steps" / "base" / "model"


def num_parameters(folder):
    return sum(p.numel() for p in weights.load(folder)[0].parameters())


def numbers(models, sizes):
    """Mean grades, and the win rates of all pairs that the tables show and that are there: {"A against B": {decoding: win_rates}}."""
    answers = {name: {d: rows_of(folder / f"{d}.jsonl") for d in DECODINGS} for name, folder in models.items()}
    grades = {name: {d: statistics.mean(row["grade"] for row in rows) for d, rows in by_decoding.items()} for name, by_decoding in answers.items()}
    pairs = [(a, b) for _, _, comparisons in QUESTIONS for a, b, _ in comparisons]
    pairs += [(f"{size}/{a}", f"{size}/{b}") for size in sizes for a, b in (("sft", "mix"), ("sft", "base"), ("mix", "base"))]
    for stage, start in STARTS.items():
        names = [f"recipe/{stage}"] + [f"methods/{stage}-{method}" for method in METHODS]
        pairs += [(name, f"recipe/{start}") for name in names] + [(name, names[0]) for name in names[1:]]

    def rates(a, b, decoding):
        joined = join(answers[a][decoding], answers[b][decoding])
        return win_rates([x["grade"] for x, _ in joined], [y["grade"] for _, y in joined], [x["question_id"] for x, _ in joined])
    return {"grades": grades, "win_rates": {f"{a} against {b}": {d: rates(a, b, d) for d in DECODINGS} for a, b in dict.fromkeys(pairs) if a in models and b in models}}


# ---- the tables --------------------------------------------------------------------------------------------------------------------

def cell(rates):
    return f"{rates['win_rate']:.1f} [{rates['ci95'][0]:.1f}, {rates['ci95'][1]:.1f}]"


def verdict(seeds, pair):
    """better or worse: the intervals of all seeds are above or below 50, by decoding; anything else is not shown."""
    if not all(pair in seed["win_rates"] for seed in seeds):
        return "not done"
    said = {}
    for decoding in DECODINGS:
        bounds = [seed["win_rates"][pair][decoding]["ci95"] for seed in seeds]
        said[decoding] = "better" if all(low > 50 for low, _ in bounds) else "worse" if all(high < 50 for _, high in bounds) else "not shown"
    return said["greedy"] if len(set(said.values())) == 1 else ", ".join(f"{word} {decoding}" for decoding, word in said.items())


def cells(seeds, pair):
    found = [seed["win_rates"].get(pair) for seed in seeds]
    return " | ".join("; ".join(cell(rates[d]) for d in DECODINGS) if rates else "-" for rates in found) + f" | {verdict(seeds, pair)}"


def size_verdict(seeds, names):
    """larger with size: in all seeds the interval of clusters against mix is, for the largest model, above that of the smallest; smaller likewise."""
    said = []
    for decoding in DECODINGS:
        ends = [[seed["win_rates"][f"{name}/sft against {name}/mix"][decoding]["ci95"] for name in (names[0], names[-1])] for seed in seeds]
        said.append("larger" if all(large[0] > small[1] for small, large in ends) else "smaller" if all(large[1] < small[0] for small, large in ends) else "not shown to change")
    return f"gain with size: {said[0]} greedy, {said[1]} sampled"


def tables(seeds):
    """Win rates of A against B, greedy; sampled, one column for each seed; then the methods, then how consistent they are."""
    head = " | ".join(f"seed {seed['seed']}: greedy; sampled" for seed in seeds)
    lines = [f"| question | the papers | {head} | found |", "|---|---|" + "---|" * (len(seeds) + 1)]
    for question, claim, comparisons in QUESTIONS:
        for i, (a, b, title) in enumerate(comparisons):
            lines.append(f"| {question}: {title} | {'' if i else claim} | {cells(seeds, f'{a} against {b}')} |")
    sizes = sorted(((name, size) for name, size in seeds[0]["parameters"].items() if all(name in seed["parameters"] for seed in seeds)), key=lambda item: item[1])
    for i, (name, size) in enumerate(sizes):
        for a, b, title in (("sft", "mix", "clusters merged against the mix"), ("sft", "base", "clusters merged against the base"), ("mix", "base", "the mix against the base")):
            lines.append(f"| {SIZES[0]}, {size / 1e6:.2f}M: {title} | {SIZES[1] if (i, a, b) == (0, 'sft', 'mix') else ''} | {cells(seeds, f'{name}/{a} against {name}/{b}')} |")
    lines += ["", size_verdict(seeds, [name for name, _ in sizes]), "",
              f"| merged otherwise, against the linear merge | {head} | found |", "|---|" + "---|" * (len(seeds) + 1)]
    for stage in STARTS:
        lines += [f"| {stage}: {method} | {cells(seeds, f'methods/{stage}-{method} against recipe/{stage}')} |" for method in METHODS]
    lines += ["", "| method, against the stage's start | spread over seeds, greedy; sampled | mean win rate, greedy; sampled | largest shortfall from the best method, greedy; sampled |", "|---|---|---|---|"]
    consistent = consistency(seeds)
    for method, by_decoding in consistent.items():
        lines.append(f"| {method} | " + " | ".join("; ".join(f"{by_decoding[d][i]:.1f}" for d in DECODINGS) for i in range(3)) + " |")
    best = [min(consistent, key=lambda method: consistent[method][d][2]) for d in DECODINGS]
    return "\n".join(lines + ["", f"most consistent (smallest largest shortfall over all stages and seeds): {best[0]} greedy, {best[1]} sampled"])


def consistency(seeds):
    """{method: {decoding: (points)}}: the range over seeds of its win rate against the stage's start, a mean over stages; the mean win rate;
    and by how much it is worse than the best method at its worst stage and seed."""
    def rate(seed, stage, method, decoding):
        name = f"recipe/{stage}" if method == "linear" else f"methods/{stage}-{method}"
        return seed["win_rates"][f"{name} against recipe/{STARTS[stage]}"][decoding]["win_rate"]
    found = {method: {} for method in ["linear", *METHODS]}
    for decoding in DECODINGS:
        rates = {method: {stage: [rate(seed, stage, method, decoding) for seed in seeds] for stage in STARTS} for method in found}
        for method, by_stage in rates.items():
            short = [max(rates[other][stage][i] for other in rates) - by_stage[stage][i] for stage in STARTS for i in range(len(seeds))]
            found[method][decoding] = (statistics.mean(max(row) - min(row) for row in by_stage.values()), statistics.mean(sum(by_stage.values(), [])), max(short))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, one for each seed")
    parser.add_argument("--out", type=Path, help="where the variants and the figures go; the same command goes on with what is there")
    parser.add_argument("--heads", nargs="*", type=int, default=[1], help="the other sizes, in heads of the recipe's width (the preset tiny has 3; default 1)")
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="print the tables of these figures")
    args = parser.parse_args()
    if args.table:
        print(tables([json.loads(path.read_text(encoding="utf-8")) for path in args.table]))
    elif not args.runs or not args.out:
        parser.error("give finished runs and --out, or --table")
    for source in args.runs:
        seed = json.loads((source / "config.json").read_text(encoding="utf-8"))["seed"]
        answer(source, args.out / f"seed-{seed}", args.heads)


if __name__ == "__main__":
    distributed.launch(lambda device: main())
