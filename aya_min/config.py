"""The settings of each stage and of the recipe. Command-line flags are made from the fields of their
dataclasses. Later ones win: defaults, a preset, `--config FILE.json`, flags.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Optional

from .command import WHOLE, describe, in_range, number, setting
from .config_selection import Selecting
from .files import read_json
from .model_config import MODEL_PRESETS

TEMPERATURE = "[0, 1000]"       # 0 is greedy


@dataclass
class Reading:
    """How every command reads rows: renamed keys, texts that are too long, answers that were cut."""
    columns: Optional[dict] = setting(
        None, help="names of keys in the files, OURS=THEIRS, for example prompt=question completion=answer")
    too_long: str = setting(
        "refuse", help="what to do with texts beyond the model's positions or --max-length",
        choices=["refuse", "skip", "cut-left"])
    keep_cut: bool = setting(
        False,
        help="keep answers that were cut at their limit (finish_reason length); unset: they are counted and "
             "left out of training data and pairs")
    allow_control_tokens: bool = setting(
        False,
        help="read names of control tokens in the texts, for example <|USER_TOKEN|>, as letters; unset: such "
             "texts are refused")


@dataclass
class Training(Reading):
    """Settings that every stage shares. Counts of examples are over all ranks."""
    gradient_steps: ClassVar[int] = 1           # optimizer steps on each batch; a setting of rl
    # What the loss compares the model with, which has no dropout; so the model may have none either.
    compared_with: ClassVar[str] = ""
    too_long: str = setting(
        "skip",
        help="examples longer than --max-length or the model's positions: skip leaves them out and counts "
             "them, cut-left drops the oldest tokens of their prompts",
        choices=["refuse", "skip", "cut-left"])
    max_steps: int = setting(0, "[0, inf)", "optimizer steps; 0 = those of --epochs")
    epochs: float = setting(1.0, "(0, 1000000]", "passes over the data when --max-steps is 0")
    batch_size: int = setting(32, "[1, inf)", "examples (pairs, prompts) per step over all ranks")
    micro_batch_size: int = setting(
        0, "[0, inf)", "examples per forward on one rank; 0 = this rank's whole share")
    max_length: int = setting(1024, "[2, inf)", "tokens per example, see --too-long")
    learning_rate: float = setting(1e-5, "(0, inf)")
    warmup_steps: int = setting(10, "[0, inf)", "steps of linear warm-up")
    schedule: str = setting("cosine", help="after the warm-up", choices=["cosine", "constant"])
    final_learning_rate: float = setting(
        0.05, "[0, 1]", "end of the cosine as a share of the peak (1/20: Tiny Aya)")
    optimizer: str = setting(
        "adamw", help="adamw; or adafactor, which keeps one moment for each row and column of a matrix, and "
                      "whose --learning-rate is relative to a weight's own size (0.02 for a small "
                      "encoder-decoder)",
        choices=["adamw", "adafactor"])
    weight_decay: float = setting(0.0, "[0, inf)")
    adam_beta2: float = setting(0.98, "[0, 1)")
    max_grad_norm: float = setting(
        1.0, "[0, inf)", "gradients of a larger norm are scaled down to it; 0 = no clipping")
    attention_dropout: float = setting(
        0.0, "[0, 1)", "share of the attention probabilities that training drops; slower, as all of "
                       "them must be in memory")
    residual_dropout: float = setting(
        0.0, "[0, 1)", "share of what attention and MLP add to the residual stream that training drops")
    balance_weight: Optional[float] = setting(
        None, "[0, inf)", "mixtures of experts: weight of the loss that evens out how many tokens an expert "
                          "gets (unset: 0.05, arXiv 2408.15901)")
    router_z_weight: Optional[float] = setting(
        None, "[0, inf)", "mixtures of experts: weight of the loss that keeps the router's scores small "
                          "(unset: 0)")
    seed: int = setting(0, WHOLE)
    save_every: int = setting(0, "[0, inf)", "steps between saved states; 0 = only at the end")
    publish_every: int = setting(
        0, "[0, inf)",
        "steps between model folders RUN/checkpoints/step-N, for example to average the last ones; 0 = only "
        "RUN/model at the end")
    eval_every: int = setting(
        0, "[0, inf)", "steps between evaluations on --eval-data; 0 = before the first and after the last")
    dtype: str = setting(
        "float32", help="compute dtype; weights, optimizer and losses stay fp32; float16: with dynamic loss "
                        "scaling, and a step whose gradients overflow is skipped and counted",
        choices=["float32", "bfloat16", "float16"])
    packing: Optional[bool] = setting(
        None,
        help="compute no padding, and a prefix that rows share (a pair's prompt) only once; unset: yes on a "
             "CPU, no on a GPU (not measured there)")
    compile: Optional[bool] = setting(
        None, help="torch.compile the decoder blocks; unset: yes on a GPU, no on a CPU")
    activation_checkpointing: int = setting(
        0, "[0, inf)", "blocks that backward recomputes: 0 = none, 1 = all, n = every n-th")
    replicate: int = setting(
        1, "[1, inf)", "copies of the model, each sharded over an equal part of the ranks (HSDP)")
    cpu_offload: bool = setting(
        False, help="keep the shards of weights, gradients and optimizer in the CPU's memory")
    profile: Optional[int] = setting(
        None, "[0, inf)", "profile this step, counted from 0; writes RUN/profile.json and prints a table",
        const=2)


@dataclass
class Pretrain(Selecting, Training):
    learning_rate: float = setting(3e-3, "(0, inf)")


@dataclass
class SFT(Selecting, Training):
    epochs: float = setting(2.0, "(0, 1000000]", "passes over the data when --max-steps is 0")


@dataclass
class Reward(Training):
    lm_weight: float = setting(
        0.0, "[0, inf)", "weight of a next-token loss on the chosen answers beside the Bradley-Terry loss")
    head: str = setting(
        "log-probs",
        help="what the score reads. log-probs: the last token's state and the answer's log-probs; "
             "last-token: that state alone, as transformers' ForSequenceClassification does",
        choices=["log-probs", "last-token"])


@dataclass
class DPO(Training):
    loss: str = setting(
        "sigmoid",
        help="sigmoid: DPO; ipo: a squared distance, on sums of tokens as in the paper; cdpo: DPO with "
             "--label-smoothing; hinge: SLiC's, on DPO's margin; simpo: no reference, with --simpo-gamma",
        choices=["sigmoid", "ipo", "cdpo", "hinge", "simpo"])
    beta: float = setting(
        0.1, "(0, inf)",
        "strength of the pull to the reference, eq. 7 of arXiv 2305.18290 (ipo: its tau; simpo and "
        "--length-normalized, whose log-probs are means over tokens, want 1 to 10)")
    label_smoothing: Optional[float] = setting(
        None, "[0, 0.5)", "cdpo: the share of the pairs that are taken to be labelled the wrong way round")
    simpo_gamma: Optional[float] = setting(
        None, "[0, inf)", "simpo: the margin of rewards that is aimed at, eq. 6 of arXiv 2405.14734")
    length_normalized: bool = setting(
        False, help="divide log-probs by the answer's tokens: TRL's sigmoid_norm, and with ipo TRL's ipo")
    nll_weight: float = setting(
        0.0, "[0, inf)",
        "weight of the chosen answer's mean negative log-likelihood (nats per token) beside DPO")

    @property
    def compared_with(self):
        return "" if self.loss == "simpo" else "its reference"

    def __post_init__(self):
        """Refuse what the loss does not read, and the lack of what it needs."""
        for name, its_loss, example in (("label_smoothing", "cdpo", "0.1"), ("simpo_gamma", "simpo", "1")):
            value = getattr(self, name)
            if value is None and self.loss == its_loss:
                raise ValueError(f"--loss {its_loss} needs {flag_of(name)}, for example {example}")
            if value is not None and self.loss != its_loss:
                raise ValueError(f"{flag_of(name)} {value} goes with --loss {its_loss}; {self.loss} does not "
                                 "read it, leave it out")
        if self.length_normalized and self.loss == "simpo":
            raise ValueError("--length-normalized: simpo always divides by the answer's tokens; leave it out")


@dataclass
class KTO(Training):
    compared_with: ClassVar[str] = "its reference"
    beta: float = setting(0.1, "(0, inf)", "risk aversion: how soon the value saturates, arXiv 2402.01306")
    desirable_weight: float = setting(
        1.0, "(0, inf)",
        "lambda_D, the weight of wanted answers (label true); weight times number should be alike for both")
    undesirable_weight: float = setting(
        1.0, "(0, inf)", "lambda_U, the weight of unwanted answers (label false)")


WITH_CRITIC = ("vanilla-pg", "ppo")         # the algorithms of rl whose actions are tokens
# {setting of rl: (the algorithms that have it, its value there if it is unset)}
ONLY = {"clip": (("ppo",), 0.2), "gae_lambda": (("ppo",), 0.95), "critic_weight": (WITH_CRITIC, 0.1),
        "critic_learning_rate": (WITH_CRITIC, None), "normalize_advantages": (("grpo",), False)}


@dataclass
class RL(Training):
    compared_with: ClassVar[str] = "the policy that sampled and the reference"
    algorithm: str = setting(
        "rloo",
        help="rloo, grpo, reinforce: policy gradients on whole answers; the baseline is the mean of the "
             "prompt's other samples, of all its samples, or of all rewards so far; raft: cross-entropy on "
             "the best of k; vanilla-pg, ppo: tokens as actions, with a critic",
        choices=["rloo", "reinforce", "vanilla-pg", "ppo", "raft", "grpo"])
    too_long: str = setting(
        "refuse", help="prompts that leave no room for --max-new-tokens",
        choices=["refuse", "skip", "cut-left"])
    max_length: int = setting(
        1 << 30, "[2, inf)", "tokens of a prompt with its answer; the models' positions bound them too")
    schedule: str = setting("constant", help="after the warm-up", choices=["cosine", "constant"])
    num_samples: int = setting(
        4, "[1, 65536]", "completions per prompt, k; rloo, grpo and raft compare them and need 2")
    max_new_tokens: int = setting(64, "[1, inf)")
    beta: float = setting(
        0.03, "[0, inf)",
        "weight of the KL to the reference inside the reward (0.03: TL;DR setting of arXiv 2402.14740)")
    gradient_steps: int = setting(
        1, "[1, 1000]",
        "optimizer steps on each batch of samples (arXiv 2402.14740 takes 2); steps are counted one by one, "
        "and states are saved only after the last one on a batch")
    clip: Optional[float] = setting(
        None, "[0, inf)", "ppo: how far the ratio may go from 1 until it has no gradient (unset: 0.2; 0: no "
                          "clip)")
    gae_lambda: Optional[float] = setting(
        None, "[0, 1]", "ppo: lambda of generalised advantage estimation (unset: 0.95, as usual); 1 is best "
                        "in arXiv 2402.14740")
    critic_weight: Optional[float] = setting(
        None, "[0, inf)", "vanilla-pg, ppo: weight of the critic's loss (unset: 0.1, as in TRL)")
    critic_learning_rate: Optional[float] = setting(
        None, "(0, inf)", "vanilla-pg, ppo: the critic's peak (unset: --learning-rate), on the same schedule")
    normalize_advantages: bool = setting(
        False, help="grpo: divide advantages by the standard deviation of their group")
    cut_answers: str = setting(
        "keep",
        help="what to do with answers that are cut at --max-new-tokens: keep them and their rewards; "
             "penalize takes --cut-penalty off their rewards; drop leaves them out of the gradient and the "
             "baseline",
        choices=["keep", "penalize", "drop"])
    cut_penalty: Optional[float] = setting(
        None, "[0, inf)", "with --cut-answers penalize (unset: 1)")
    reward_noise: float = setting(
        0.0, "[0, inf)", "standard deviation of Gaussian noise that is added to the rewards of training, to "
                         "see what an algorithm makes of it")

    def __post_init__(self):
        """Refuse what the algorithm does not read, and fill in what is unset, so that config.json says it."""
        if self.algorithm in ("rloo", "grpo", "raft") and self.num_samples < 2:
            raise ValueError(f"--num-samples {self.num_samples}: {self.algorithm} compares the samples of a "
                             "prompt; give at least 2 samples, or another --algorithm")
        for name, (algorithms, default) in ONLY.items():
            value = getattr(self, name)
            if self.algorithm in algorithms:
                setattr(self, name, default if value is None else value)
            elif value is not None and value is not False:
                raise ValueError(f"{flag_of(name)} {value} is for {' and '.join(algorithms)}; "
                                 f"{self.algorithm} does not read it, leave it out")
        if self.cut_answers == "penalize":
            self.cut_penalty = 1.0 if self.cut_penalty is None else self.cut_penalty
        elif self.cut_penalty is not None:
            raise ValueError(f"--cut-penalty {self.cut_penalty} goes with --cut-answers penalize, not "
                             f"{self.cut_answers}")
        for name in ("max_steps", "save_every", "publish_every", "eval_every"):
            if getattr(self, name) % self.gradient_steps:
                raise ValueError(f"{flag_of(name)} {getattr(self, name)} is no multiple of --gradient-steps "
                                 f"{self.gradient_steps}: a run is saved and ends after all steps on a batch")


@dataclass
class Routing(Training):
    """The router of arXiv 2408.14960, which publishes none of these numbers."""
    epochs: float = setting(4.0, "(0, 1000000]", "passes over the data when --max-steps is 0")
    learning_rate: float = setting(1e-3, "(0, inf)")
    tau: float = setting(
        1.0, "(0, inf)", "temperature of the targets softmax(rewards / tau), in units of the reward")
    held_out: float = setting(
        0.1, "[0, 0.9]", "share of the rows, drawn by --seed, that is held out without --eval-data")


@dataclass
class Classify(Training):
    epochs: float = setting(3.0, "(0, 1000000]", "passes over the data when --max-steps is 0")
    labels: Optional[list] = setting(
        None, help="the classes, in the order of the head's rows; a text with another label is refused "
                   "(unset: those of --data, sorted)")
    head: str = setting(
        "mean", help="what the head reads: the mean of the last hidden states, or that of the last token, as "
                     "transformers' ForSequenceClassification does", choices=["mean", "last-token"])


@dataclass
class Side(Training):
    """The SideNet of arXiv 2007.13512, of which we know none of these numbers."""
    epochs: float = setting(10.0, "(0, 1000000]", "passes over the data when --max-steps is 0")
    learning_rate: float = setting(1e-3, "(0, inf)")
    layer: int = setting(
        1, "[0, 100000)", "the SideNet reads --model's hidden states after this layer; 0: the embeddings")
    hidden: int = setting(256, "[1, 1000000000)", "hidden units of the SideNet")

    def __post_init__(self):
        for name in ("attention_dropout", "residual_dropout"):
            if getattr(self, name):
                raise ValueError(f"{flag_of(name)} {getattr(self, name)}: the layers below a SideNet are "
                                 "frozen and drop nothing; leave it out")


@dataclass
class Recipe(Reading):
    """All settings of the recipe. The defaults, preset tiny, were chosen on the validation split (LOG.md)."""
    model: str = setting("tiny", help="size of base, teachers and students", choices=list(MODEL_PRESETS))
    level: str = setting(
        "tiny", help="tiny: five task families, fewer words; full: all ten", choices=["tiny", "full"])
    vocab_size: int = setting(6144, "[300, 10000000]")
    max_length: int = setting(128, "[2, inf)")
    max_new_tokens: int = setting(32, "[1, inf)")
    batch_size: int = setting(32, "[1, inf)")
    dtype: str = setting("float32", help="compute dtype", choices=["float32", "bfloat16"])
    corpus: int = setting(144000, "[1, inf)", "rows of noisy text that the base is pretrained on, once")
    base_learning_rate: float = setting(5e-3, "(0, inf)")
    lessons: int = setting(9600, "[1, inf)", "examples per teacher")
    teacher_learning_rate: float = setting(1.5e-3, "(0, inf)")
    arbiter_gold: int = setting(
        32000, "[1, inf)", "right answers that the arbiter reads before it sees pairs")
    arbiter_gold_learning_rate: float = setting(2e-3, "(0, inf)")
    arbiter_pairs: int = setting(24000, "[1, inf)")
    arbiter_learning_rate: float = setting(1e-3, "(0, inf)")
    arbiter_lm_weight: float = setting(0.1, "[0, inf)")
    num_prompts: int = setting(6000, "[1, inf)", "prompts of the arbitrage")
    teacher_temperature: float = setting(
        0.7, TEMPERATURE, "of the pool's answers; at 1.0 offline DPO learns nothing from the worst (LOG.md)")
    sft_epochs: float = setting(2.0, "(0, 1000000]")
    sft_learning_rate: float = setting(1.5e-3, "(0, inf)")
    cluster_scale: float = setting(
        2.0, "(0, inf)", "a cluster's learning rate as a multiple of one model's, as it takes fewer steps")
    cluster_spill: float = setting(
        0.4, "[0, 1]", "share of the other languages' examples that each cluster also trains on")
    offline_epochs: float = setting(2.0, "(0, 1000000]")
    offline_learning_rate: float = setting(3e-4, "(0, inf)")
    offline_beta: float = setting(0.1, "(0, inf)")
    offline_nll_weight: float = setting(0.2, "[0, inf)")
    offline_margin: float = setting(1.0, "[0, inf)")
    rounds: int = setting(3, "[0, inf)", "rounds of online DPO")
    online_prompts: int = setting(3000, "[1, inf)", "fresh prompts per online round")
    online_samples: int = setting(8, "[2, 65536]", "completions per prompt")
    online_temperature: float = setting(0.7, TEMPERATURE)
    online_epochs: float = setting(2.0, "(0, 1000000]")
    online_learning_rate: float = setting(6e-4, "(0, inf)")
    online_beta: float = setting(0.1, "(0, inf)")
    online_nll_weight: float = setting(0.1, "[0, inf)")
    online_margin: float = setting(1.0, "[0, inf)")
    rloo_samples: int = setting(4, "[2, 65536]")
    rloo_steps: int = setting(120, "[1, inf)")
    rloo_learning_rate: float = setting(5e-4, "(0, inf)")
    rloo_beta: float = setting(0.03, "[0, inf)")
    eval_count: int = setting(1440, "[1, inf)", "test questions")
    eval_split: str = setting(
        "test", help="split of the questions; choose settings on validation", choices=["test", "validation"])
    seed: int = setting(0, WHOLE)


RECIPES = {
    "tiny": {},
    # keep_cut: these models are hardly trained, so 85% of their answers are cut at 12 tokens; without those
    # answers no stage has enough to train on.
    "smoke": dict(keep_cut=True, model="smoke", vocab_size=1024, corpus=960, lessons=192, arbiter_gold=192,
                  arbiter_pairs=240, num_prompts=240, sft_epochs=1.0, rounds=3, online_prompts=96,
                  online_samples=2, max_new_tokens=12, eval_count=120, rloo_steps=2),
    "small": dict(model="small", level="full", vocab_size=16384, dtype="bfloat16", max_length=256,
                  max_new_tokens=64, batch_size=256, corpus=2_000_000, base_learning_rate=1e-3,
                  lessons=100_000, teacher_learning_rate=3e-4, arbiter_gold=100_000,
                  arbiter_gold_learning_rate=3e-4, arbiter_pairs=100_000, arbiter_learning_rate=1e-4,
                  num_prompts=50_000, sft_learning_rate=3e-4, offline_learning_rate=2e-5,
                  online_prompts=10_000, online_learning_rate=5e-5, rloo_learning_rate=5e-5,
                  eval_count=4800),
}


def kind(f):
    """The type of a field's values, without its None."""
    optional = {Optional[bool]: bool, Optional[int]: int, Optional[float]: float, Optional[str]: str,
                Optional[dict]: dict, Optional[list]: list}
    return optional.get(f.type, f.type)


def flag_of(name):
    """The command-line flag of a setting: --learning-rate for learning_rate."""
    return "--" + name.replace("_", "-")


def column(text):
    """An argparse type: OURS=THEIRS as a pair."""
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} must be OURS=THEIRS, for example prompt=question")
    return ours, theirs


def add_flags(parser, settings_class, only=None):
    """Add one flag per field; only: the names of the fields that get one.

    A flag that is not given is None, so that `settings_from` takes the preset's or --config's value.
    """
    for f in fields(settings_class):
        if only and f.name not in only:
            continue
        meta, choices = f.metadata, f.metadata.get("choices")
        text = f"{meta['help'] or f.name.replace('_', ' ')} (default {f.default})".replace("%", "%%")
        more = {"default": None, "help": text}
        if kind(f) is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif kind(f) is dict:
            more |= {"type": column, "nargs": "+", "metavar": "OURS=THEIRS"}
        elif kind(f) is list:
            more |= {"nargs": "+", "metavar": "NAME"}
        else:
            more["type"] = number(kind(f), meta["interval"]) if meta["interval"] else kind(f)
            more |= {"choices": choices, "metavar": None if choices else meta.get("metavar", "N")}
            more |= {"nargs": "?", "const": meta["const"]} if "const" in meta else {}
        parser.add_argument(flag_of(f.name), **more)


def settings_from(settings_class, preset=None, config_file=None, flags=None):
    """The settings from the defaults, then `preset`, then the JSON file, then the flags that were given.

    preset, flags: {name: value}. ValueError for an unknown setting or a wrong value.
    """
    known = {f.name for f in fields(settings_class)}
    values = dict(preset or {})
    if config_file:
        loaded = read_json(Path(config_file), "give a JSON object of settings")
        if unknown := sorted(set(loaded) - known):
            raise ValueError(f"--config {config_file}: unknown setting {' '.join(unknown)}; "
                             f"known: {' '.join(sorted(known))}")
        values.update(loaded)
    values.update({k: v for k, v in (flags or {}).items() if k in known and v is not None})
    for f in fields(settings_class):
        value = values.get(f.name, f.default)
        if kind(f) is dict and isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):
            if twice := {ours for ours, _ in value if [pair[0] for pair in value].count(ours) > 1}:
                raise ValueError(f"{flag_of(f.name)}: {' '.join(sorted(twice))} is given twice; give it once")
            values[f.name] = value = dict(value)
        check_value(f, value)
    return settings_class(**{k: v for k, v in values.items() if k in known})


def check_value(f, value):
    """Raise ValueError if a value has another type than its field, or is outside its interval or choices."""
    right, interval, choices = kind(f), f.metadata.get("interval"), f.metadata.get("choices")
    if value is None and f.default is None:
        return
    fits = type(value) is right or right is float and type(value) is int
    if fits and right is dict:
        fits = all(isinstance(name, str) for name in value.values())
    if fits and right is list:
        fits = all(isinstance(name, str) for name in value)
    if not fits or (interval and not in_range(value, interval)) or (choices and value not in choices):
        wanted = describe(right, interval) if interval else f"of type {right.__name__}"
        wanted = f"one of {' '.join(choices)}" if choices else wanted
        raise ValueError(f"setting {f.name} ({flag_of(f.name)}) must be {wanted}, got {value!r}")


def check_batch_size(size, num_ranks):
    """Raise ValueError if a batch does not divide over the ranks."""
    if size % num_ranks:
        raise ValueError(f"--batch-size {size} does not divide over {num_ranks} ranks; use a multiple of "
                         f"{num_ranks}")


def check_training(settings, num_ranks):
    """Raise ValueError for settings that do not fit together, before any work begins."""
    if num_ranks % settings.replicate:
        raise ValueError(f"--replicate {settings.replicate} does not divide {num_ranks} ranks; use a divisor "
                         f"of {num_ranks}")
    check_batch_size(settings.batch_size, num_ranks)
    if settings.optimizer != "adamw" and settings.adam_beta2 != Training.adam_beta2:
        raise ValueError(f"--adam-beta2 {settings.adam_beta2} goes with --optimizer adamw; "
                         f"{settings.optimizer} does not read it, leave it out")
    for name in ("attention_dropout", "residual_dropout"):
        if getattr(settings, name) and settings.compared_with:
            raise ValueError(f"{flag_of(name)} {getattr(settings, name)}: this loss compares the model with "
                             f"{settings.compared_with}, which has no dropout, so that masks would count as "
                             "a difference; leave it out")
    share = settings.batch_size // num_ranks
    if settings.micro_batch_size and share % settings.micro_batch_size:
        raise ValueError(f"--micro-batch-size {settings.micro_batch_size} does not divide a rank's share of "
                         f"{share} examples; use a divisor of {share}")
