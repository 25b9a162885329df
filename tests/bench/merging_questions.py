"""The recipe's merging questions at small scale, from finished runs of several seeds (train.py --seed S
--arms all --out RUN).

    python tests/bench/merging_questions.py RUN [RUN ...] --out DIR          trains, answers, writes
    DIR/seed-S.json; the same again goes on
    python tests/bench/merging_questions.py --table DIR/seed-*.json          the Markdown tables

Every variant is a run of its own, DIR/seed-S/VARIANT/steps/NAME, with the recipe's settings and step names,
so that clusters draw the recipe's own
rows, and what is whole is not done again. The finished runs are only read. All arms of a stage take the same
number of optimizer steps (to rounding).

methods     the finished run's clusters of each stage merged by other methods; SLERP takes two models, so four
are merged as a tree of pairs
hard        SFT by cluster without the others' rows (cluster_spill 0), with and without the shared languages:
clusters that really differ
languages   SFT with one model per language, without others' rows or shared languages, merged
once        offline DPO of each cluster from its own SFT model, merged once at the end (also: DPO, then merge)
order       offline DPO as one model on the merged SFT model (merge, then DPO)
sizes       heads-N: base, one model on the mix, and merged clusters of a decoder with N heads as wide as the
recipe's, all else alike
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aya_min import config, distributed, weights  # noqa: E402
from aya_min.arbitrage import route  # noqa: E402
from aya_min.evaluate import join, win_rates  # noqa: E402
from aya_min.files import write_json  # noqa: E402
from aya_min.languages import LANGUAGES, SHARED  # noqa: E402
from aya_min.model import CohereForCausalLM, init_weights  # noqa: E402
from aya_min.pipeline import dpo_settings, sft_settings, train_clusters_and_merge  # noqa: E402
from aya_min.preferences import best_worst  # noqa: E402
from aya_min.pipeline_results import evaluate_model  # noqa: E402
from aya_min.merge_folders import merge_folders  # noqa: E402
from aya_min.runs import versions  # noqa: E402
from aya_min.stages import train_stage  # noqa: E402
from aya_min.pipeline_steps import Run, saved_rows, stage_settings, step, train_step  # noqa: E402
from aya_min.tokenizer import load_tokenizer  # noqa: E402

STARTS = {
    "sft": "base",
    "no-shared": "base",
    "offline": "sft",
    "online-1": "offline",
}  # merged stage of the recipe -> what its clusters started from
METHODS = (
    "slerp",
    "ties",
    "dare-ties",
    "model-stock",
)  # the settings of merge_config.py, the papers' where they give any
DECODINGS = ("greedy", "sampled")

# (question, what the papers say, [(A, B, what the win rate of A against B tells)]); a model is
# VARIANT/NAME, recipe/NAME the finished run's
QUESTIONS = [
    (
        "shared languages in every cluster",
        "Aya Expanse: English, Spanish and French in each cluster make merging more robust",
        [
            ("recipe/no-shared", "recipe/sft", "without against with, the recipe's clusters (spill 0.4)"),
            ("hard/no-shared", "hard/sft", "without against with, no spill"),
            ("methods/no-shared-ties", "methods/sft-ties", "without against with, merged by TIES"),
            (
                "methods/no-shared-dare-ties",
                "methods/sft-dare-ties",
                "without against with, merged by DARE-TIES",
            ),
        ],
    ),
    (
        "one model per language",
        (
            "Aya Expanse: merging one model per language does not achieve the benefits of cross-lingual"
            " transfer; Mix or Merge: six monolingual models merged beat the mix (71.2 against 67.4), three"
            " do better (77.0)"
        ),
        [
            ("languages/sft", "hard/sft", "against one per family, no spill"),
            ("languages/sft", "hard/no-shared", "against one per family, no spill, no shared languages"),
            ("languages/sft", "recipe/sft", "against one per family, the recipe's"),
            ("languages/sft", "recipe/mix", "against one model on the mix"),
            ("languages/sft", "recipe/base", "against the base"),
            ("hard/sft", "recipe/base", "one per family, no spill, against the base"),
        ],
    ),
    (
        "merging once, at the end",
        "Aya Expanse merges after every stage; no comparison given",
        [
            (
                "once/offline",
                "recipe/offline",
                "SFT and offline DPO by cluster, then merged, against merged after each",
            )
        ],
    ),
    (
        "merge and DPO, in which order",
        (
            "Mix or Merge (SLERP, against their base): DPO, then merge 78.0; merge, then DPO 74.0; merge"
            " without DPO 72.6"
        ),
        [
            ("once/offline", "order/offline", "DPO, then merge, against merge, then DPO"),
            ("recipe/offline", "order/offline", "merge, DPO by cluster, merge, against merge, then DPO"),
        ],
    ),
]
SIZES = (
    "merging gain and size",
    "Aya Expanse: gains from merging up to 3 times larger at 35B than at 8B",
    [
        ("sft", "mix", "clusters merged against the mix"),
        ("sft", "base", "clusters merged against the base"),
        ("mix", "base", "the mix against the base"),
    ],
)


# ---- the variants ------------------------------------------------------------------------------------------

@dataclass
class Seed:
    """A finished run of one seed, and where its variants go."""
    source: Path
    out: Path
    recipe: config.Recipe
    clusters: dict
    device: torch.device
    heads: list                             # of the models of other sizes

    def theirs(self, name):
        """The model of one of the finished run's steps."""
        return self.source / "steps" / name / "model"

    def variant(self, name, clusters=None, **changes):
        return Run(self.out / name, replace(self.recipe, **changes), self.device, clusters or self.clusters)

    def candidates(self):
        return saved_rows(self.source / "steps" / "arbitrage" / "candidates.jsonl")


def evaluated(run, name):
    """The model of a step answers the recipe's test questions, without the arbiter's scores."""
    evaluate_model(run, name, run.folder / "steps" / name / "model")


def methods(seed):
    run = seed.variant("methods")
    for stage, start in STARTS.items():
        for method in METHODS:
            merge_step(
                run,
                f"{stage}-{method}",
                method,
                [seed.theirs(f"{stage}-{cluster}") for cluster in seed.clusters],
                seed.theirs(start),
            )
            evaluated(run, f"{stage}-{method}")


def once(seed):
    run, starts = seed.variant("once"), {cluster: seed.theirs(f"sft-{cluster}") for cluster in seed.clusters}
    pairs, _ = best_worst(seed.candidates(), run.recipe.offline_margin)
    train_clusters_and_merge(
        run,
        "offline",
        "offline DPO on each cluster's SFT model",
        "dpo",
        starts,
        pairs,
        dpo_settings(run, "offline"),
        run.recipe.offline_epochs,
    )
    evaluated(run, "offline")


def order(seed):
    run = seed.variant("order")
    pairs, _ = best_worst(seed.candidates(), run.recipe.offline_margin)
    train_step(
        run,
        "offline",
        "offline DPO, one model",
        "dpo",
        seed.theirs("sft"),
        pairs,
        stage_settings(run, **dpo_settings(run, "offline"), epochs=run.recipe.offline_epochs),
    )
    evaluated(run, "offline")


def hard(seed):
    run = seed.variant("hard", cluster_spill=0.0)
    for name, shared in (("sft", SHARED), ("no-shared", [])):
        sft_by_cluster(run, seed, name, seed.theirs("base"), shared)


def languages(seed):
    sft_by_cluster(
        seed.variant("languages", {code: [code] for code in LANGUAGES}, cluster_spill=0.0),
        seed,
        "sft",
        seed.theirs("base"),
        [],
    )


def sizes(seed):
    for heads in seed.heads:
        run = seed.variant(f"heads-{heads}")
        base = base_with(run, heads, seed.source)
        rows, _ = route(seed.candidates(), "reward", run.recipe.seed)
        train_step(
            run,
            "mix",
            "SFT, one model on the mix",
            "sft",
            base,
            rows,
            stage_settings(run, **sft_settings(run), epochs=run.recipe.sft_epochs),
        )
        sft_by_cluster(run, seed, "sft", base, SHARED)
        for name in ("base", "mix"):
            evaluated(run, name)


VARIANTS = {
    "methods": (methods, "no-shared"),
    "once": (once, "offline"),
    "order": (order, "offline"),
    "hard": (hard, "arbitrage"),
    "languages": (languages, "arbitrage"),
    "sizes": (sizes, "arbitrage"),
}  # and the last step of the finished run that each needs


def sft_by_cluster(run, seed, name, base, shared):
    rows, _ = route(seed.candidates(), "reward", run.recipe.seed)
    train_clusters_and_merge(
        run,
        name,
        f"SFT, {run.folder.name}",
        "sft",
        base,
        rows,
        sft_settings(run),
        run.recipe.sft_epochs,
        shared=shared,
    )
    evaluated(run, name)


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
    sides = [
        slerp_tree(part, out.with_name(f"{out.name}-{side}"))
        for part, side in ((folders[:half], "left"), (folders[half:], "right"))
    ]
    return merge_folders(sides, out, "slerp", t=1 - half / len(folders))


def base_with(run, heads, source):
    """A base with so many heads, pretrained as the finished run's on the same rows with the same
    tokenizer. -> its folder"""
    r, preset = run.recipe, config.MODEL_PRESETS[run.recipe.model]

    def make(folder, resume):
        tokenizer = load_tokenizer(source / "steps" / "base")
        size = {
            key: preset[key] * heads // preset["num_attention_heads"]
            for key in ("hidden_size", "intermediate_size", "num_attention_heads")
        }
        model = config.ModelConfig(
            **{**preset, **size, "vocab_size": tokenizer.vocab_size, "num_key_value_heads": None}
        )
        model = init_weights(CohereForCausalLM(model), torch.Generator().manual_seed(r.seed))
        its_settings = stage_settings(
            run, config.Pretrain, learning_rate=r.base_learning_rate, warmup_steps=50, save_every=500
        )
        train_stage(
            "pretrain",
            model,
            tokenizer,
            [source / "data" / "base.jsonl"],
            its_settings,
            folder,
            run.device,
            resume=resume,
        )
    step(run, "base", f"pretraining a base of {heads} heads", make)
    return run.folder / "steps" / "base" / "model"


# ---- figures -----------------------------------------------------------------------------------------------

def save(seed):
    """out.json: the figures of all variants that are done, so that a run which is stopped leaves some."""
    seconds = {}
    for path in seed.out.glob("*/steps/*/done.json"):
        seconds[path.parts[-4]] = (
            seconds.get(path.parts[-4], 0) + json.loads(path.read_text(encoding="utf-8"))["seconds"]
        )
    bases = {"recipe": seed.theirs("base")} | {
        path.parts[-4]: path for path in sorted(seed.out.glob("heads-*/steps/base/model"))
    }
    parameters = {
        name: sum(p.numel() for p in weights.load(folder)[0].parameters()) for name, folder in bases.items()
    }
    answers = {
        f"recipe/{path.parent.name[5:]}": path.parent for path in seed.source.glob("steps/eval-*/done.json")
    }
    answers |= {
        f"{path.parts[-4]}/{path.parent.name[5:]}": path.parent
        for path in seed.out.glob("*/steps/eval-*/done.json")
    }
    write_json(
        seed.out.with_name(seed.out.name + ".json"),
        {
            "seed": seed.recipe.seed,
            "versions": versions(),
            "recipe": asdict(seed.recipe),
            "seconds": seconds,
            "parameters": parameters,
            **numbers(answers, parameters),
        },
    )


def numbers(answers, sizes):
    """Mean grades, and the win rates of all pairs that the tables show and that are there: {"A against B":
    {decoding: win_rates}}."""
    pairs = [(a, b) for _, _, comparisons in QUESTIONS for a, b, _ in comparisons]
    pairs += [(f"{size}/{a}", f"{size}/{b}") for size in sizes for a, b, _ in SIZES[2]]
    for stage, start in STARTS.items():
        names = [f"recipe/{stage}"] + [f"methods/{stage}-{method}" for method in METHODS]
        pairs += [(name, f"recipe/{start}") for name in names] + [(name, names[0]) for name in names[1:]]
    pairs = [(a, b) for a, b in dict.fromkeys(pairs) if a in answers and b in answers]
    rows = {
        name: {d: saved_rows(answers[name] / f"{d}.jsonl") for d in DECODINGS}
        for name in dict.fromkeys(sum(pairs, ()))
    }

    def rates(a, b, decoding):
        joined = join(rows[a][decoding], rows[b][decoding])
        return win_rates(
            [x["grade"] for x, _ in joined],
            [y["grade"] for _, y in joined],
            [x["question_id"] for x, _ in joined],
        )
    return {
        "grades": {
            name: {d: statistics.mean(row["grade"] for row in rows[name][d]) for d in DECODINGS}
            for name in rows
        },
        "win_rates": {f"{a} against {b}": {d: rates(a, b, d) for d in DECODINGS} for a, b in pairs},
    }


# ---- the tables --------------------------------------------------------------------------------------------

def cell(rates):
    return f"{rates['win_rate']:.1f} [{rates['ci95'][0]:.1f}, {rates['ci95'][1]:.1f}]"


def verdict(seeds, pair):
    """better or worse: the intervals of all seeds are above or below 50, by decoding; anything else is not
    shown."""
    if not all(pair in seed["win_rates"] for seed in seeds):
        return "not done"
    said = {}
    for decoding in DECODINGS:
        bounds = [seed["win_rates"][pair][decoding]["ci95"] for seed in seeds]
        said[decoding] = (
            "better"
            if all(low > 50 for low, _ in bounds)
            else "worse" if all(high < 50 for _, high in bounds) else "not shown"
        )
    return (
        said["greedy"]
        if len(set(said.values())) == 1
        else ", ".join(f"{word} {decoding}" for decoding, word in said.items())
    )


def cells(seeds, pair):
    found = [seed["win_rates"].get(pair) for seed in seeds]
    return (
        " | ".join("; ".join(cell(rates[d]) for d in DECODINGS) if rates else "-" for rates in found)
        + f" | {verdict(seeds, pair)}"
    )


def size_verdict(seeds, names):
    """larger with size: in all seeds the interval of clusters against mix is, for the largest model, above
    that of the smallest; smaller likewise."""
    if len(names) < 2 or not all(
        f"{name}/sft against {name}/mix" in seed["win_rates"] for seed in seeds for name in names
    ):
        return "gain with size: not done"
    said = []
    for decoding in DECODINGS:
        ends = [
            [
                seed["win_rates"][f"{name}/sft against {name}/mix"][decoding]["ci95"]
                for name in (names[0], names[-1])
            ]
            for seed in seeds
        ]
        said.append(
            "larger"
            if all(large[0] > small[1] for small, large in ends)
            else "smaller" if all(large[1] < small[0] for small, large in ends) else "not shown to change"
        )
    return f"gain with size: {said[0]} greedy, {said[1]} sampled"


def tables(seeds):
    """Win rates of A against B, greedy; sampled, one column for each seed; then the methods, then how
    consistent they are."""
    head = " | ".join(f"seed {seed['seed']}: greedy; sampled" for seed in seeds)
    lines = [f"| question | the papers | {head} | found |", "|---|---|" + "---|" * (len(seeds) + 1)]
    for question, claim, comparisons in QUESTIONS:
        for i, (a, b, title) in enumerate(comparisons):
            lines.append(
                f"| {question}: {title} | {'' if i else claim} | {cells(seeds, f'{a} against {b}')} |"
            )
    question, claim, comparisons = SIZES
    sizes = sorted((size, name) for name, size in seeds[0]["parameters"].items())
    for size, name in sizes:
        for a, b, title in comparisons:
            lines.append(
                f"| {question}, {size / 1e6:.2f}M: {title} | {claim} |"
                f" {cells(seeds, f'{name}/{a} against {name}/{b}')} |"
            )
            claim = ""
    lines += [
        "",
        size_verdict(seeds, [name for _, name in sizes]),
        "",
        f"| merged otherwise, against the linear merge | {head} | found |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for stage in STARTS:
        lines += [
            f"| {stage}: {method} | {cells(seeds, f'methods/{stage}-{method} against recipe/{stage}')} |"
            for method in METHODS
        ]
    consistent = consistency(seeds)
    lines += [
        "",
        (
            "| method, against the stage's start | range over seeds, greedy; sampled | mean win rate |"
            " largest shortfall from the best method |"
        ),
        "|---|---|---|---|",
    ]
    lines += [
        f"| {method} | "
        + " | ".join("; ".join(f"{found[d][i]:.1f}" for d in DECODINGS) for i in range(3))
        + " |"
        for method, found in consistent.items()
    ]
    best = [min(consistent, key=lambda method: consistent[method][d][2]) for d in DECODINGS if consistent]
    return "\n".join(
        lines
        + [
            "",
            (
                "most consistent, by its largest shortfall over all stages and seeds (greedy; sampled):"
                f" {'; '.join(best) or 'not done'}"
            ),
            "",
            (
                "better, worse: the 95% intervals of all seeds are above, or below, 50; anything else is not"
                " shown"
            ),
        ]
    )


def consistency(seeds):
    """{method: {decoding: (points)}}: the range over seeds of its win rate against the stage's start, a mean
    over stages; the mean win rate;
    and by how much it is behind the best method at its worst stage and seed."""
    def rate(seed, stage, method, decoding):
        name = f"recipe/{stage}" if method == "linear" else f"methods/{stage}-{method}"
        return seed["win_rates"][f"{name} against recipe/{STARTS[stage]}"][decoding]["win_rate"]
    if not all(
        f"methods/{stage}-{method} against recipe/{start}" in seed["win_rates"]
        for seed in seeds
        for stage, start in STARTS.items()
        for method in METHODS
    ):
        return {}
    found = {method: {} for method in ["linear", *METHODS]}
    for d in DECODINGS:
        rates = {
            method: [[rate(seed, stage, method, d) for seed in seeds] for stage in STARTS] for method in found
        }  # stages x seeds
        best = [[max(same) for same in zip(*rows)] for rows in zip(*rates.values())]
        for method, rows in rates.items():
            short = [top - own for tops, row in zip(best, rows) for top, own in zip(tops, row)]
            found[method][d] = (
                statistics.mean(max(row) - min(row) for row in rows),
                statistics.mean(sum(rows, [])),
                max(short),
            )
    return found


def main(device):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, one for each seed")
    parser.add_argument(
        "--out",
        type=Path,
        help="where the variants and the figures go; the same command goes on with what is there",
    )
    parser.add_argument(
        "--heads",
        nargs="*",
        type=int,
        default=[1],
        help="the other sizes, in heads of the recipe's width (the preset tiny has 3; default 1)",
    )
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="which (default: all)"
    )
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="JSON", help="print the tables of these figures"
    )
    args = parser.parse_args()
    if args.table:
        print(tables([json.loads(path.read_text(encoding="utf-8")) for path in args.table]))
        return
    if not args.runs or not args.out:
        parser.error("give finished runs and --out, or --table")
    seeds = []
    for source in args.runs:
        about = json.loads((source / "config.json").read_text(encoding="utf-8"))
        seeds.append(
            Seed(
                source,
                args.out / f"seed-{about['seed']}",
                config.Recipe(**about["recipe"]),
                about["clusters"],
                device,
                args.heads,
            )
        )
        for name, (_, needed) in VARIANTS.items():
            if name in args.variants and not (source / "steps" / needed / "done.json").is_file():
                raise ValueError(
                    f"{source} has not finished the step {needed}, which {name} needs; finish it with"
                    f" train.py --arms all --out {source}"
                )
    started = time.time()
    for seed in seeds:
        for name in args.variants:
            print(f"-- {time.time() - started:.0f} s: seed {seed.recipe.seed}, {name}", flush=True)
            VARIANTS[name][0](seed)
            save(seed)
    print(f"-- {time.time() - started:.0f} s: done", flush=True)


if __name__ == "__main__":
    distributed.launch(main)
