"""Claims of papers, tried on the embedded world: arms that differ in one decision, comparisons with the side
that the paper expects, and a verdict by rule.

A claim file, claims/NAME.py, holds ARMS {name: function(lab) -> folder} and CLAIMS. A Lab is one seed's
run on disk: it makes the shared start with the recipe's own functions, and arms with the stages. What it
makes is a step of the seed's folder, named after everything that decides it (stage, settings, start, rows,
reward model). So claims share arms, and a killed claim goes on where it stopped. The seed's folder is named
after the recipe's settings and the code, so that no arm of other code is taken for one of this.

The verdict of a comparison in one seed: shown if its 95% interval, over questions, is clear of no difference
on the expected side, or within what counts as level; reversed on the other side; else not shown. A comparison
is shown, or reversed, if it is so in every seed; a claim, if all its comparisons are. Seed 0 answers the
validation questions, on which settings are chosen; all other seeds answer the test questions.
"""

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Callable, Optional

import torch

from . import (distributed, held_out, merge_embed, merge_quantize, merge_upcycle, real_text, weights,
               world_data)
from .arbitrage import route
from .config import RECIPES, Recipe, settings_from
from .evaluate_rates import bootstrap_mean, join, win_rates
from .languages import CLUSTERS, LANGUAGES, SHARED
from .merge_folders import merge_folders
from .merge_quantize import Calibration
from .model import CohereForCausalLM, init_weights
from .model_config import MODEL_PRESETS, ModelConfig, model_preset
from .pipeline import (arbitrage, build_arbiter, build_base, build_teachers,
                       train_clusters_and_merge)
from .pipeline_results import add_rewards, evaluate_model
from .preferences import best_worst
from .pipeline_steps import (Run, answers_of, data_file, read_done, saved_rows, scores_of, stage_settings,
                             step, train_step)
from .quantization import SCHEMES
from .stages import STAGES
from .tokenizer import load_tokenizer, train_tokenizer
from .world import questions

HERE = Path(__file__).parent
DATA = real_text.FOLDER                               # which the repository does not hold
# What a comparison of the side "level" may differ: points of a win rate, share of another measure's mean.
LEVEL_POINTS, LEVEL_SHARE = 5.0, 0.05
SIDES = ("above", "below", "level")
# Figures of an answer that any claim file may compare, besides its own MEASURES.
MEASURES = {"grade": lambda row: row["grade"], "length": lambda row: len(row["completion"]),
            "right_language": lambda row: float(row["seen_language"] == row["language"]),
            "reward": lambda row: row["reward"]}


@dataclass(frozen=True)
class Comparison:
    """a against b on the evaluation's questions.

    measure: "win rate" (percent by the oracle's grades, a tie is half a win; no difference is 50), or the
    name of a figure of each answer (MEASURES, here or in the claim file), whose mean over a's answers less
    that over b's is taken (no difference is 0), or "loss". side: what the paper expects of a. languages: only
    the questions in these; None: all. decoding: "greedy" or "sampled".

    "loss": of held-out rows instead, which HELD_OUT[held_out](lab) of the claim file gives. The mean over the
    rows of their nats per token under a less that under b, the log of the ratio of the perplexities.
    """
    a: str
    b: str
    side: str = "above"
    measure: str = "win rate"
    decoding: str = "sampled"
    languages: Optional[tuple] = None
    held_out: Optional[str] = None

    @property
    def pairs(self):
        return ((self.a, self.b),)

    @property
    def label(self):
        if self.measure == "loss":
            return f"{self.a} {self.side} {self.b}, loss, {self.held_out}"
        others = [code for code in LANGUAGES if code not in (self.languages or LANGUAGES)]
        where = f", {' '.join(self.languages or [])}" if len(others) > 6 else f", without {' '.join(others)}"
        where = where if self.languages else ""
        return f"{self.a} {self.side} {self.b}, {self.measure}, {self.decoding}{where}"


@dataclass(frozen=True)
class Figure:
    """A figure of one seed that is no answer's. of(lab) gives its values, one per step or example, or pairs
    (question id, value): a question in several languages is one draw of the bootstrap. Their mean, with its
    interval, is compared with `bound`. What is no mean is given as {"value", "ci95", "num"}. pairs: of arms
    that it holds against each other, or takes as one system, whose conditions are checked as those of a
    Comparison are; () of one that asks for no second arm. A difference of differences names those of each
    difference, and across."""
    label: str
    of: Callable
    side: str
    bound: float
    pairs: tuple


@dataclass(frozen=True)
class Claim:
    """statement: what the paper says. theirs: its number or sentence. comparisons: of Comparison, Figure.

    picture: None, or picture(lab) -> {"columns", "rows"} of report_charts.heat_map for a seed, as JSON has
    them, to be shown beside the comparisons. needs: None, or a file of real text, below DATA; without it the
    claim is skipped, and says so."""
    name: str
    statement: str
    theirs: str
    comparisons: tuple
    picture: Optional[Callable] = None
    needs: Optional[str] = None

    @property
    def skipped(self):
        """Why the claim cannot be tried here, None if it can."""
        there = self.needs is None or (DATA / self.needs).is_file()
        return None if there else f"needs {self.needs} in the folder ../shared/data beside the repository"

    @property
    def arms(self):
        """The names of the arms that its comparisons hold against each other, in order."""
        return list(dict.fromkeys(arm for c in self.comparisons for pair in c.pairs for arm in pair))


# ---- claim files -------------------------------------------------------------------------------------------

def claim_files():
    """{name: module} of claims/*.py. ValueError for a file that is not finished."""
    found = {}
    for path in sorted((HERE / "claims").glob("*.py")):
        if path.stem.startswith("__"):
            continue
        try:
            found[path.stem] = module = importlib.import_module(f"{__package__}.claims.{path.stem}")
            wrong = [name for name in ("PAPER", "MINUTES", "ARMS", "CLAIMS") if not hasattr(module, name)]
        except Exception as error:
            wrong = [f"what Python can import ({type(error).__name__}: {error})"]
        if wrong:
            raise ValueError(f"{path}: a claim file without {wrong[0]}; finish it, or move it elsewhere")
    return found


def find_claims(name):
    """(the claim file's name, its module, claims) of a file, or of one claim in a file. ValueError for any
    other name."""
    files = claim_files()
    if name in files:
        return name, files[name], files[name].CLAIMS
    for file, module in files.items():
        for claim in module.CLAIMS:
            if claim.name == name:
                return file, module, (claim,)
    raise ValueError(f"unknown claim {name!r:.80}; train.py claims lists them: {' '.join(files)}")


# ---- one seed ----------------------------------------------------------------------------------------------

def hash_of(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:10]


def code_version():
    """A hash of the package's source, words and profiles, without the claim files and what only shows
    results."""
    paths = [path for path in sorted(HERE.glob("*.py")) if not path.stem.startswith(("report", "chat"))]
    paths += [path for name in ("words", "profiles") for path in sorted((HERE / name).iterdir())
              if path.is_file()]
    return hash_of(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths))


class Lab:
    """One seed's run: the shared start, arms, answers. Everything is done once, on all ranks together.

    out: the folder of all claims. module: the claim file. changed: settings of the recipe that differ from
    the preset's."""

    def __init__(self, out, preset, seed, device, module, changed=None):
        split = "test" if seed else "validation"
        self.recipe = settings_from(Recipe, {**RECIPES[preset], **(changed or {}), "seed": seed,
                                             "eval_split": split})
        key = hash_of(asdict(self.recipe), code_version())
        self.folder, self.seed, self.device, self.module = out / f"seed-{seed}-{key}", seed, device, module
        self.run = Run(self.folder, self.recipe, device, CLUSTERS)
        self.arms, self.evaluated = {}, {}
        self.asked = set()      # names of arms, since a Figure was begun
        self.starts = {}        # {trained model: what its training, or that of its parts, started from}

    @cached_property
    def base(self):
        return build_base(self.run)

    def base_of_width(self, times, share=1):
        """A base of `times` the width and heads, as wide each, pretrained as the base on the first `share` of
        its rows. -> its folder"""
        r, preset = self.recipe, MODEL_PRESETS[self.recipe.model]

        def make(folder):
            sizes = "hidden_size", "intermediate_size", "num_attention_heads"
            other = {key: int(preset[key] * times) for key in sizes}
            config = ModelConfig(**{**preset, **other, "vocab_size": self.tokenizer.vocab_size})
            model = init_weights(CohereForCausalLM(config), torch.Generator().manual_seed(r.seed))
            weights.save(folder / "model", model, self.tokenizer)
        start = self.step(f"start-of-width-{times}", make)["folder"] / "model"
        rows = world_data.corpus(round(r.corpus * share), r.seed, r.level)
        return self.train(f"a base of {times} times the width", "pretrain", start, rows, warmup_steps=50,
                          learning_rate=r.base_learning_rate)

    def untrained(self, texts, vocab_size=None):
        """The recipe's model as it is initialized, with a tokenizer trained on texts. -> its folder"""
        r = self.recipe

        def make(folder):
            tokenizer = train_tokenizer(texts, vocab_size or r.vocab_size)
            model = CohereForCausalLM(model_preset(r.model, tokenizer.vocab_size))
            weights.save(folder / "model", init_weights(model, torch.Generator().manual_seed(r.seed)),
                         tokenizer)
        return self.step("start", make, texts, vocab_size)["folder"] / "model"

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.base)

    @cached_property
    def teachers(self):
        return build_teachers(self.run, self.base)

    @cached_property
    def arbiter(self):
        return build_arbiter(self.run, self.base, self.teachers)[0]

    @cached_property
    def candidates(self):
        """The rows of the arbitrage: prompts with each teacher's answer and its reward."""
        return arbitrage(self.run, self.teachers, self.arbiter)

    @cached_property
    def best_answers(self):
        """The arbitrage's rows, each with the answer that the arbiter keeps."""
        r = self.recipe
        return route(self.candidates, "reward", r.seed, None, r.keep_cut, self.tokenizer.key)[0]

    @cached_property
    def pool_pairs(self):
        """The pool's best answer against its worst, for each prompt where they differ enough."""
        r = self.recipe
        return best_worst(self.candidates, r.offline_margin, r.keep_cut, self.tokenizer.key)[0]

    @cached_property
    def sft(self):
        """One model, SFT on the answers that the arbiter keeps: where most arms start."""
        r = self.recipe
        return self.train("SFT on the arbitrage", "sft", self.base, self.best_answers, epochs=r.sft_epochs,
                          learning_rate=r.sft_learning_rate)

    def questions(self, split, count, tag):
        return questions(split, count, f"{tag}/{self.seed}", level=self.recipe.level)

    def train(self, name, stage, start, rows, reward_model=None, **settings):
        """Train a stage of stages.STAGES from a model folder on rows. -> the new model folder"""
        r, entry = self.recipe, STAGES[stage]
        if entry.samples:
            settings = {"max_new_tokens": r.max_new_tokens, "keep_cut": False, **settings}
        settings = stage_settings(self.run, entry.settings, **settings)
        key = hash_of(stage, asdict(settings), self.name_of(start), rows, str(reward_model and
                                                                             self.name_of(reward_model)))
        more = {}
        if reward_model:
            more["reward_model"], _ = weights.load(reward_model, self.device)
        made = train_step(self.run, f"{stage}-{key}", name, stage, start, rows, settings, **more)
        self.starts[self.name_of(made)] = self.name_of(start)
        return made

    def batch_of(self, rows, name):
        """The batch size of an arm that trains on rows. ValueError without rows."""
        if not rows:
            raise ValueError(f"{name}: no row is left to train on with seed {self.seed}; of the settings, "
                             "lower offline_margin or online_margin, or raise num_prompts or online_prompts")
        return min(self.recipe.batch_size, len(rows))

    def clusters(self, name, stage, start, rows, settings, epochs, clusters=CLUSTERS, shared=SHARED,
                 spill=None):
        """Train one model per cluster of languages and average them: pipeline.train_clusters_and_merge.

        start: a model folder, or {cluster: folder}. spill: the share of the other languages' rows that each
        cluster also trains on; None: the recipe's."""
        spill = self.recipe.cluster_spill if spill is None else spill
        run = replace(self.run, recipe=replace(self.recipe, cluster_spill=spill), clusters=clusters)
        starts = start if isinstance(start, dict) else dict.fromkeys(clusters, start)
        begun = {cluster: self.name_of(starts[cluster]) for cluster in clusters}
        plain = {key: value for key, value in settings.items() if key != "kind"}
        key = hash_of("clusters", stage, plain, begun, rows, epochs, clusters, shared, spill)
        made = train_clusters_and_merge(run, f"{stage}-{key}", name, stage, start, rows, settings, epochs,
                                        shared)
        self.starts[self.name_of(made)] = " ".join(dict.fromkeys(begun.values()))
        return made

    def parts(self, merged, clusters=CLUSTERS):
        """{cluster: folder} of the models that `clusters` averaged into this one."""
        return {c: merged.parent.with_name(f"{merged.parent.name}-{c}") / "model" for c in clusters}

    def merge(self, name, folders, method, base=None, **settings):
        """A merge of model folders by a method of merge_config.METHODS. -> its folder"""
        content = [self.name_of(folder) for folder in folders], method, base and self.name_of(base), settings
        more = {**settings, **({"base": base} if base else {})}

        build = lambda out: merge_folders(folders, out, method, **more)
        return self._built(f"merge-{method}", build, *content)

    def quantize(self, folder, scheme, rows=(), languages=(), tokens=0, **settings):
        """A model folder in a scheme's numbers, by merge_quantize.quantize_folder with these settings.

        scheme: a name of quantization.SCHEMES, or a Scheme. rows: of the calibration text, of which `tokens`
        tokens are read, as many of each of `languages`. -> its folder"""
        scheme = SCHEMES.get(scheme, scheme)
        content = self.name_of(folder), asdict(scheme), rows, languages, tokens, settings
        text = Calibration([str(self._file(rows))], list(languages), tokens) if rows else None
        build = lambda out: merge_quantize.quantize_folder(folder, out, scheme, calibration=text,
                                                           device=self.device, progress=False, **settings)
        return self._built(f"quantize-{scheme.name}", build, *content)

    def upcycle(self, experts, kind, seed_model=None, **settings):
        """A mixture of the experts {name: model folder}, with these settings of merge_upcycle.upcycle and the
        recipe's seed. seed_model: None is the base. -> its folder"""
        seed_model, settings = seed_model or self.base, {"seed": self.recipe.seed, **settings}
        content = kind, {n: self.name_of(f) for n, f in experts.items()}, self.name_of(seed_model), settings
        build = lambda out: merge_upcycle.upcycle(experts, seed_model, out, kind, **settings)
        return self._built(f"upcycle-{kind}", build, *content)

    def extend(self, mixture, new, name, vector=None):
        """A mixture with the model folder `new` as one more expert: merge_upcycle.extend. -> its folder"""
        seed = self.recipe.seed
        content = self.name_of(mixture), self.name_of(new), name, vector, seed
        build = lambda out: merge_upcycle.extend(mixture, new, out, name, vector=vector, seed=seed)
        return self._built(f"extend-{name}", build, *content)

    def embeddings(self, model, domains):
        """{name: vector} of the domains {name: rows}: merge_embed.embed."""
        def make(folder):
            paths = {name: self._file(rows) for name, rows in domains.items()}
            return {"domains": merge_embed.embed(model, paths, held_out.WHOLE, device=self.device)}
        return self._done("embeddings", make, "embeddings", self.name_of(model), domains)["domains"]

    def _built(self, name, build, *content):
        """A model folder that build(out) writes on one rank, once for this name and content. -> the folder"""
        def on_main(folder):
            folder.mkdir(parents=True, exist_ok=True)
            build(folder / "model")
        self._done(name, lambda folder: distributed.from_main(lambda: on_main(folder)), *content)
        return self.folder / "steps" / f"{name}-{hash_of(*content)}" / "model"

    def _file(self, rows):
        """A JSONL file of the rows, named after them."""
        return data_file(self.run, f"rows-{hash_of(rows)}", rows)

    def name_of(self, folder):
        """What a model folder of this seed is called: its path below the seed's folder."""
        return Path(folder).relative_to(self.folder).as_posix()

    def step(self, name, make, *content):
        """Do make(folder) once for this name, content and text of the claim file, since make is code of it.
        -> the JSON object that make returned, with "folder", which make fills as it likes. One that trains
        says "training_steps" and "tokens" in its object, for the record of arms."""
        source = Path(self.module.__file__).read_text(encoding="utf-8")
        folder = self.folder / "steps" / f"{name}-{hash_of(source, *content)}" / "made"

        def fill(above):
            distributed.from_main(lambda: folder.mkdir(parents=True))
            made = make(folder) or {}
            return {"made": made, **{key: made[key] for key in ("training_steps", "tokens") if key in made}}
        return self._done(name, fill, source, *content)["made"] | {"folder": folder}

    def _done(self, name, make, *content):
        """Do make(folder) once for this name and content, which must be all that it depends on."""
        return step(self.run, f"{name}-{hash_of(*content)}", name, lambda folder, resume: make(folder))

    def sample(self, name, model, rows, num_samples, temperature, seed=0):
        """For each row its num_samples answers {"completion", "finish_reason"}."""
        def make(folder):
            return {"groups": answers_of(self.run, model, rows, num_samples, temperature, seed, name)}
        content = "sample", self.name_of(model), rows, num_samples, temperature, seed
        return self._done(f"{name}-samples", make, *content)["groups"]

    def scored_samples(self, name, model, rows, num_samples, temperature, seed=0, reward_model=None):
        """The rows with num_samples answers of a model as candidates, each with its reward."""
        groups = self.sample(name, model, rows, num_samples, temperature, seed)
        flat = [{**row, **answer} for row, group in zip(rows, groups) for answer in group]
        rewards = iter(self.scores(name, flat, reward_model))
        return [{**row, "candidates": [{**answer, "reward": next(rewards)} for answer in group]}
                for row, group in zip(rows, groups)]

    def scores(self, name, rows, reward_model=None):
        """The reward model's (default: the arbiter's) scores of rows with a "completion"."""
        judge = reward_model or self.arbiter
        return self._done(f"{name}-scores", lambda folder: {"scores": scores_of(self.run, judge, rows)},
                          "scores", self.name_of(judge), rows)["scores"]

    def losses(self, model, rows):
        """[nats per token of each row] under a model folder: held_out.losses."""
        return self._of_rows("losses", held_out.losses, model, rows)

    def routing(self, mixture, rows):
        """Which share of each row's tokens goes where in a mixture: held_out.routing. (rows, layers, E)"""
        return self._of_rows("routing", held_out.routing, mixture, rows)

    def _of_rows(self, name, measure, model, rows):
        def make(folder):
            loaded = weights.load(model, self.device, packed=True)
            return {"values": measure(*loaded, self._file(rows), self.device)}
        return self._done(name, make, self.name_of(model), rows)["values"]

    def arm(self, name):
        """The folder of an arm of the claim file: a model's, or that of a step of the file's own."""
        if name not in self.arms:
            asked = set(self.asked)
            self.arms[name] = self.module.ARMS[name](self)
            self.asked = asked              # what the arm asked for is its own
        self.asked.add(name)
        return self.arms[name]

    def made(self, name):
        """What the step returned that an arm of the claim file is the folder of."""
        return read_done(self.arm(name).parent)["made"]

    def metrics(self, name):
        """The rows of an arm's metrics.jsonl."""
        return saved_rows(self.arm(name).parent / "metrics.jsonl")

    def answers(self, name, decoding, scored=False):
        """An arm's answers to the evaluation's questions, graded by the oracle. scored: with the arbiter's
        "reward"."""
        folder = self.arm(name)
        own = self.name_of(folder).split("/")[1]
        if own not in self.evaluated:
            self.evaluated[own] = evaluate_model(self.run, own, folder)
        if scored:
            add_rewards(self.run, own, self.evaluated[own], self.arbiter)
        return self.evaluated[own][decoding]


# ---- comparisons and verdicts ------------------------------------------------------------------------------

def side_of(side, ci95, none, level):
    """"shown", "reversed" or "not shown" of one seed's interval. none: the value of no difference; level: how
    far from it still counts as level."""
    low, high = ci95
    if side == "level":
        if none - level <= low and high <= none + level:
            return "shown"
        return "reversed" if low > none + level or high < none - level else "not shown"
    above, below = low > none, high < none
    if side == "below":
        above, below = below, above
    return "shown" if above else "reversed" if below else "not shown"


def together(verdicts):
    """The verdict of several: theirs if they all agree, else "not shown"."""
    verdicts = set(verdicts)
    return verdicts.pop() if len(verdicts) == 1 else "not shown"


def measured(lab, c):
    """{"value", "ci95", "none", "verdict", ...} of a Comparison or Figure in one seed."""
    if isinstance(c, Figure):
        found = c.of(lab)
        if not isinstance(found, dict):
            values = [each if isinstance(each, tuple) else (i, each) for i, each in enumerate(found)]
            if not values:
                raise ValueError(f"{c.label}: no values with seed {lab.seed}")
            value, ci95 = bootstrap_mean([each for _, each in values], [question for question, _ in values])
            found = {"value": value, "ci95": ci95, "num": len(values)}
        return {**found, "none": c.bound,
                "verdict": side_of(c.side, found["ci95"], c.bound, LEVEL_SHARE * abs(c.bound))}
    if c.measure == "loss":
        rows = lab.module.HELD_OUT[c.held_out](lab)
        a, b = (lab.losses(lab.arm(arm), rows) for arm in (c.a, c.b))
        return difference(lab, c, [*zip(a, b, (str(row["question_id"]) for row in rows))])
    pairs = [(a, b) for a, b in join(*(lab.answers(arm, c.decoding, c.measure == "reward")
                                       for arm in (c.a, c.b)))
             if c.languages is None or a["language"] in c.languages]
    if not pairs:
        raise ValueError(f"{c.label}: the evaluation has no question in these languages")
    ids = [str(a["question_id"]) for a, _ in pairs]
    if c.measure == "win rate":
        found = win_rates([a["grade"] for a, _ in pairs], [b["grade"] for _, b in pairs], ids)
        counts = {key: found[key] for key in ("win", "tie", "loss", "num")}
        return {"value": found["win_rate"], "ci95": found["ci95"], "none": 50.0, **counts,
                "verdict": side_of(c.side, found["ci95"], 50.0, LEVEL_POINTS)}
    measure = (MEASURES | getattr(lab.module, "MEASURES", {}))[c.measure]
    both = [(measure(a), measure(b), name) for (a, b), name in zip(pairs, ids)]
    return difference(lab, c, [(x, y, name) for x, y, name in both if x is not None and y is not None])


def difference(lab, c, both):
    """What `measured` returns of a measure's values [(a's, b's, question id), ...]."""
    if not both:                        # all texts were too long to score
        raise ValueError(f"{c.label}: no values with seed {lab.seed}")
    value, ci95 = bootstrap_mean([x - y for x, y, _ in both], [name for _, _, name in both])
    mean = float(sum(y for _, y, _ in both) / len(both))
    return {"value": value, "ci95": ci95, "none": 0.0, "num": len(both), "of_a": mean + value, "of_b": mean,
            "verdict": side_of(c.side, ci95, 0.0, LEVEL_SHARE * abs(mean))}
