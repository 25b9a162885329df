"""The training stages in one table: pretrain, sft, reward, dpo, kto, rl, router, classify, sidenet.

A row's way to the loss, for example of {"messages"}: rows.conversation_of says what it means, data.py makes
ids and loss mask of it (tokenizer.encode_chat) and batches in a seeded order, model.py gives the log-probs of
the supervised tokens, losses.sft_loss adds them up, loop.gradients divides by the step's count.

An entry says what differs between stages: settings, items, how they become a batch, the loss, and what the
stage needs besides the model. loop.train does the rest. Each stage takes a model with its tokenizer, JSONL
files, settings and a run folder, writes config.json, metrics.jsonl, eval.json, state/ and model/ into the
folder, and returns the path of model/.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import torch

from . import balance, classify, config, critiques, distributed, router, selection, weights
from .classifier import Classifier, SideNet
from .data import (Example, Pair, batches_in_order, collate, collate_pairs, count_steps, load_pairs,
                   make_batches, slots_of)
from .encoder_decoder import EncoderDecoder
from .files import write_json
from .kto import Labelled, collate_labelled, load_labelled, measure_kl
from .loop import evaluate, read_metrics, spread, train
from .losses import (actor_critic_loss, classification_loss, policy_gradient_loss, preference_loss,
                     reward_loss, router_loss, sft_loss, unpaired_loss)
from .mixture_stream import Stream, load_or_stream
from .model import CohereForCausalLM, RewardModel, Router, SequenceClassifier
from .reference import store_reference
from .rollouts import Rollout, Rollouts, collate_rollouts, load_fitting_prompts
from .runs import OLD_STAGES, open_run


@dataclass(frozen=True)
class Stage:
    """What differs between stages.

    about: the help of its command. settings: the class of its settings.
    load: (paths, tokenizer, limit in tokens, settings) -> items: examples, pairs or prompts.
    blank: (an item or None, limit, settings) -> the example, pair or rollout that stands for it in a dry run.
    collate: (examples, pairs or rollouts, pad_id, slots) -> Batch.
    loss: settings -> loss_fn(model, batch) -> (sum, metrics).
    start: called before the first step, see keep_reference.
    check_first: (metrics of the first step, settings); may raise ValueError.
    prepare: called with the batches of a step, or of an evaluation, before their loss; see kto.measure_kl.
    variant: settings -> the architecture, where it depends on them; a subclass of `architecture`.
    beside: {what the stage takes besides the model: the help of its flag}. needs: those that are required.
    samples: whether it trains on the policy's own samples (rollouts.py).
    decoders_only: why it trains no encoder-decoder, or "".
    head: (paths, settings) -> function config -> config, where the model's head depends on the data.
    arrange: (model, items, held-out items, settings) -> both lists as they fit the model.
    """
    about: str
    settings: type
    load: Callable
    blank: Callable
    collate: Callable
    loss: Callable
    start: Optional[Callable] = None
    check_first: Optional[Callable] = None
    prepare: Optional[Callable] = None
    architecture: type = CohereForCausalLM
    variant: Optional[Callable] = None
    beside: dict = field(default_factory=dict)
    needs: tuple = ()
    samples: bool = False
    decoders_only: str = ""
    head: Optional[Callable] = None
    arrange: Optional[Callable] = None


def builder(name, data, settings):
    """The function config -> the stage's model, by which a preset, or the decoder of a model folder
    (weights.load's trunk), becomes it. data: paths, which may be needed to know the head."""
    stage = stage_named(name)
    if stage.variant:
        return stage.variant(settings)
    if not stage.head:
        return stage.architecture
    to_config = stage.head(data, settings)
    return lambda config: stage.architecture(to_config(config))


def check_encoder_decoder(name, settings):
    """ValueError for a stage that trains no encoder-decoder, and for a setting that it cannot honour
    there."""
    if why := stage_named(name).decoders_only:
        raise ValueError(f"{name} trains decoders only, not an encoder-decoder: {why}; pretrain, sft, dpo "
                         "and kto do")
    if settings.dtype == "float16":
        raise ValueError("--dtype float16: the activations of T5-like models pass 65504, the largest number "
                         "of float16; take bfloat16")
    for flag in ("attention_dropout", "residual_dropout"):
        if getattr(settings, flag):
            raise ValueError(f"{config.flag_of(flag)} {getattr(settings, flag)}: an encoder-decoder has no "
                             "dropout here; leave it out")
    if getattr(settings, "chooses", False):
        raise ValueError("--select and --replay score decoders only, not an encoder-decoder; leave them out")


def fitting(settings, *models):
    """The most tokens that an example may have: --max-length, or the models' positions if they are fewer."""
    return min(settings.max_length, *(model.config.max_position_embeddings for model in models))


def train_stage(name, model, tokenizer, data, settings, out, device, eval_data=(), resume=False, source=None,
                smaller_batches=False, **beside):
    """Train a stage of STAGES on JSONL files in the run folder `out`. Returns the path of its model folder.

    eval_data: held-out files, reported by language; for a stage that samples, prompts that are answered once.
    source: the paths that a resume needs besides the data. smaller_batches: where the examples are fewer than
    --batch-size, a batch is all of them. beside: what the stage takes besides the model
    (Stage.beside): reward_model, a model; reference_logps, a path.
    Raises ValueError for what a user can mend, and distributed.Stopped after a signal."""
    stage, name = stage_named(name), OLD_STAGES.get(name, name)
    if isinstance(model, EncoderDecoder):
        check_encoder_decoder(name, settings)
    balance.weights_of(settings, model)
    reward_model = beside.pop("reward_model", None)
    models = {"model": model} | ({"reward_model": reward_model} if reward_model else {})
    if reward_model:
        critiques.refuse_unread(reward_model, "--reward-model")
    limit = fitting(settings, *models.values())
    if stage.samples and settings.keep_cut:
        raise ValueError(f"{name} keeps answers that are cut and scores them as they are; leave keep_cut out")
    items = stage.load(data, tokenizer, limit, settings)
    held_out = stage.load(eval_data, tokenizer, limit, settings) if eval_data else []
    if smaller_batches and len(items) < settings.batch_size:
        ranks = distributed.num_ranks()
        settings = replace(settings, batch_size=max(ranks, len(items) // ranks * ranks))
    if stage.arrange:
        items, held_out = stage.arrange(model, items, held_out, settings)
    loss_fn, stop, selector, files = stage.loss(settings), distributed.Signals(), None, {}
    if stage.samples:
        num_steps = count_steps(len(items), settings)
    else:
        slots = slots_of(items, held_out)
        pad = lambda some: stage.collate(some, tokenizer.pad_id, slots)
        num_steps, batches = make_batches(items, pad, settings)
        if getattr(settings, "chooses", False):
            selector = selection.Selector(items, tokenizer, limit, settings, num_steps)
            files = selector.files

    with open_run(out, name, settings, data, resume, tokenizer, source, models, len(items), files) as folder:
        model = spread(model, settings, device)
        if stage.start:
            stage.start(model, items + held_out, tokenizer.pad_id, device, settings, folder, **beside)
        if stage.samples:
            rollouts = Rollouts(model, reward_model, tokenizer, items, held_out, limit, settings, device,
                                stop)
            model, batches, evaluation = rollouts.learner, rollouts.batches, rollouts.evaluation
        else:
            in_order = batches_in_order(held_out, pad) if held_out else []
            prepare = lambda some: stage.prepare(model, some, settings, device) if stage.prepare else None
            if selector:
                batches, loss_fn = selection.begin(selector, model, loss_fn, pad, slots, device, folder)
            batches = prepared(batches, prepare)

            def evaluation():
                prepare(in_order)
                return evaluate(model, loss_fn, in_order, device, stop, settings)
        check = (lambda metrics: stage.check_first(metrics, settings)) if stage.check_first else None
        with items.reported() if isinstance(items, Stream) else nullcontext():
            return train_and_publish(name, model, tokenizer, num_steps, batches, loss_fn, settings, folder,
                                     device, stop, evaluation if held_out else None, check)


def train_and_publish(name, model, tokenizer, num_steps, batches, loss_fn, settings, folder, device,
                      stop=None, evaluation=None, check_first=None):
    """Train in a RunFolder, write the last evaluation to eval.json and the model to model/, whose path is
    returned."""
    path, stop = folder.path, stop or distributed.Signals()
    policy = distributed.parts(model)[0]
    distributed.from_main(lambda: weights.check_place(path / "model", policy, tokenizer))
    with stop:
        publish = lambda model, step: save_model(path / "checkpoints" / f"step-{step}", model, tokenizer)
        model = train(model, num_steps, batches, loss_fn, settings, path, device, evaluation, folder.state,
                      check_first, name, stop, publish)
        if evaluation:
            distributed.from_main(lambda: write_evaluation(path))
        save_model(path / "model", model, tokenizer)
        if stop.any_rank(device):
            raise distributed.Stopped(f"stopped by a signal; {path / 'model'} is finished", stop.agreed())
    return path / "model"


def write_evaluation(folder):
    """Write the last evaluation in metrics.jsonl to eval.json."""
    rows = [row for _, row in read_metrics(folder / "metrics.jsonl")]
    last = [row for row in rows if any(key.startswith("eval/") for key in row)][-1]
    found = {k.removeprefix("eval/"): v for k, v in last.items() if k.startswith("eval/")}
    write_json(folder / "eval.json", found)


def save_model(folder, model, tokenizer):
    """Write a model folder, of a critic.Learner that of its policy. An OSError becomes a ValueError that
    names the folder and the remedy."""
    try:
        weights.save(folder, distributed.parts(model)[0], tokenizer)
    except OSError as error:
        about = f"{folder}: the model could not be written ({error}); make room and --resume"
        raise ValueError(about) from None


# ---- functions of the table --------------------------------------------------------------------------------

def prepared(batches, prepare):
    """batches(step), prepared."""
    def of_step(step):
        micro_batches = batches(step)
        prepare([([i], batch) for i, batch in enumerate(micro_batches)])
        return micro_batches
    return of_step


def has_reference(settings, reference_logps=None):
    """Whether the loss of dpo or kto has a reference. ValueError for a file of log-probs if it has none."""
    has = getattr(settings, "loss", None) != "simpo"
    if reference_logps and not has:
        raise ValueError(f"--reference-logps {reference_logps}: --loss simpo has no reference; leave it out")
    return has


def keep_reference(model, items, pad_id, device, settings, folder, reference_logps=None):
    """The reference of DPO and KTO is the model before training. Its log-probs are computed once and stored
    in RUN/reference.safetensors, or in the file `reference_logps`, which several runs can share."""
    if has_reference(settings, reference_logps):
        path = Path(reference_logps or folder.path / "reference.safetensors")
        store_reference(model, items, pad_id, device, settings, path, folder.prints["model"])


def check_first_loss(metrics, settings):
    """Raise ValueError unless the first loss of dpo is that of a margin of 0: policy and reference are still
    the same model. simpo, which has no reference, may start anywhere."""
    beta = settings.beta
    # {loss: (its name, the first loss, that as a number, by how much a nat of margin changes it)}
    first = {"sigmoid": ("DPO", "ln 2", math.log(2), beta / 2),
             "cdpo": ("cDPO", "ln 2", math.log(2), beta / 2), "hinge": ("hinge", "1", 1.0, beta),
             "ipo": ("IPO", "(1 / (2 beta))^2", 1 / (2 * beta) ** 2, 1 / beta)}
    if settings.loss in first:
        name, *right = first[settings.loss]
        refuse_start(f"{name} loss", metrics["dpo_loss"], *right, settings)


def check_first_value(metrics, settings):
    """Raise ValueError unless the first value of kto, without its weights, is sigmoid(0)."""
    refuse_start("KTO value", metrics["kto_value"], "sigmoid(0)", 0.5, settings.beta / 4, settings)


def refuse_start(what, found, text, right, slope, settings):
    """Raise ValueError if the first loss or value is not what it is where policy and reference agree, but for
    rounding: that of the log-probs, in nats, times the slope of the loss there."""
    nats = 2e-3 if settings.dtype == "float32" else 0.2
    if abs(found - right) > slope * nats:
        raise ValueError(f"the first {what} is {found:.6f}, not {text} = {right:.6f}: policy and reference "
                         "differ at the start")


def blank_example(item, limit, settings):
    """The item, or an example of `limit` tokens, all supervised except the first."""
    return item or Example(np.zeros(limit, np.int32), np.arange(limit) > 0, "other")


def blank_pair(item, limit, settings):
    """The item, or a pair of two blank examples, with reference log-probs of 0."""
    pair = item or Pair(blank_example(None, limit, settings), blank_example(None, limit, settings))
    return replace(pair, ref_logps=np.zeros(2))


def blank_labelled(item, limit, settings):
    """The item, or a wanted blank example with a blank partner, with reference log-probs of 0."""
    item = item or Labelled(blank_example(None, limit, settings), True, blank_example(None, limit, settings))
    return replace(item, ref_logps=np.zeros(2))


def blank_rollout(item, limit, settings):
    """The prompt with an answer of --max-new-tokens, or a rollout of `limit` tokens that ends with one."""
    length = len(item["prompt_ids"]) + settings.max_new_tokens if item else limit
    mask = np.arange(length) >= length - settings.max_new_tokens
    rollout = Rollout(np.zeros(length, np.int32), mask, "other")
    if settings.algorithm in config.WITH_CRITIC:
        zeros = torch.zeros(int(mask.sum()))
        rollout.tokens = {"advantages": zeros, "returns": zeros, "old_logps": zeros}
    return rollout


def reward_head(settings):
    """The class of --head. ValueError for one without log-probs beside a loss of them."""
    if settings.head == "last-token" and settings.lm_weight:
        raise ValueError(f"--lm-weight {settings.lm_weight} needs --head log-probs; last-token has no head "
                         "for words")
    return SequenceClassifier if settings.head == "last-token" else RewardModel


def rl_loss(settings):
    """The loss of --algorithm."""
    if settings.algorithm in config.WITH_CRITIC:
        return actor_critic_loss(settings.clip, settings.critic_weight)
    return policy_gradient_loss


REFERENCE_FILE = {"reference_logps": "file of the reference's log-probs, which several runs can share "
                                     "(default RUN/reference.safetensors)"}
STAGES = {
    "pretrain": Stage(
        "Next-token training on texts (every token) and on conversations (answers only); an encoder-decoder "
        "fills in missing spans of texts.",
        config.Pretrain, load_or_stream, blank_example, collate, lambda settings: sft_loss),
    "sft": Stage(
        "Supervised fine-tuning on conversations.",
        config.SFT, load_or_stream, blank_example, collate, lambda settings: sft_loss),
    "reward": Stage(
        "Bradley-Terry training of a reward model on preference pairs; accuracy by language in the metrics.",
        config.Reward, partial(load_pairs, with_critiques=True), blank_pair, collate_pairs,
        lambda settings: reward_loss(settings.lm_weight), architecture=RewardModel, variant=reward_head,
        arrange=critiques.arrange, decoders_only="its score reads a decoder's last state"),
    "dpo": Stage(
        "DPO, or another loss on preference pairs, against the model as it is at the start.",
        config.DPO, load_pairs, blank_pair, collate_pairs,
        lambda settings: preference_loss(settings.beta, settings.nll_weight, settings.loss,
                                         settings.label_smoothing, settings.simpo_gamma,
                                         settings.length_normalized),
        start=keep_reference, check_first=check_first_loss, beside=REFERENCE_FILE),
    "kto": Stage(
        "KTO on answers that are labelled as wanted or unwanted, against the model as it is at the start.",
        config.KTO, load_labelled, blank_labelled, collate_labelled,
        lambda settings: unpaired_loss(settings.beta, settings.desirable_weight, settings.undesirable_weight),
        start=keep_reference, check_first=check_first_value, prepare=measure_kl, beside=REFERENCE_FILE),
    "rl": Stage(
        "Online policy gradients: sample answers to a batch of prompts, score them, take a step.",
        config.RL, load_fitting_prompts, blank_rollout, collate_rollouts, rl_loss,
        beside={"reward_model": "reward model folder with the same tokenizer"}, needs=("reward_model",),
        samples=True,
        decoders_only="a reward model with the policy's tokenizer, which scores it, is a decoder"),
    "router": Stage(
        "A router, which chooses a teacher for a prompt, on candidates with rewards (arXiv 2408.14960).",
        config.Routing, router.load_candidates, router.blank, router.collate_routed,
        lambda settings: router_loss(settings.tau), architecture=Router, head=router.head,
        arrange=router.arrange, decoders_only="it reads a decoder's last state"),
    "classify": Stage(
        "A classifier of texts with labels; accuracy by language in the metrics.",
        config.Classify, classify.load_texts, classify.blank, classify.collate_texts,
        lambda settings: classification_loss, architecture=Classifier, head=classify.head,
        arrange=classify.arrange, decoders_only="its head reads a decoder's states"),
    "sidenet": Stage(
        "A SideNet, which may answer before a classifier, whose layers are frozen (arXiv 2007.13512).",
        config.Side, classify.load_texts, classify.blank, classify.collate_texts,
        lambda settings: classification_loss, architecture=SideNet, head=classify.sidenet_head,
        arrange=classify.arrange, decoders_only="it reads the states between a decoder's layers")}


def stage_named(name):
    name = OLD_STAGES.get(name, name)
    if name not in STAGES:
        raise ValueError(f"unknown stage {name!r}; known: {' '.join(STAGES)}")
    return STAGES[name]
