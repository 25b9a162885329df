"""Policy gradients on whole answers against tokens, critics and clips: "Back to Basics", arXiv 2402.14740.

Tested: the order of the algorithms at matched samples; lambda of generalised advantage estimation; whether
the clip binds; RLOO with 2 samples against 4; RAFT and RLOO under a larger beta and under noise on the
rewards; online DPO on the same samples. "reward" is the arbiter's score of an answer, which training raises;
win rates are by the oracle's grade, which it does not see.

Matched conditions: all arms start from lab.sft with the same arbiter, prompts, learning rate of the policy,
number of samples (batches of P prompts with 4 samples, or of 2 P prompts with 2) and number of optimizer
steps (GRADIENT_STEPS on each batch, 2 in the paper for every algorithm).
Departures: the paper takes for each algorithm the checkpoint with the best reward on its test set, and here
the last one counts; GPT-4 judged, here the oracle. Its PPO's lambda is not known for the table of win rates;
here PPO has the usual 0.95 unless an arm says otherwise. Online DPO makes pairs of the best and the worst of
4 samples of the start and takes as many prompts and as many optimizer steps of the same batch size, but its
samples are all drawn before the first step.
"""

from ..config import WITH_CRITIC
from ..experiments import Claim, Comparison, Figure
from ..preferences import best_worst

PAPER = "Back to Basics, arXiv 2402.14740"
MINUTES = 14
GRADIENT_STEPS = 2
CRITIC_SCALE = 10           # the critic's learning rate over the policy's; at 1 it hardly explains variance
LARGE_BETA = 0.3            # ten times the recipe's
NOISE = 2.0                 # points of reward; the samples of a prompt differ by about one


def prompts(lab):
    """As many as the arms with 2 samples a prompt take; those with 4 take the first half of the epoch."""
    r = lab.recipe
    return lab.questions("preference", 2 * num_batches(lab) * r.batch_size, "policy-gradients")


def num_batches(lab):
    return max(1, lab.recipe.rloo_steps // GRADIENT_STEPS)


def arm(name, batches_of=1, **settings):
    """An arm of stage rl; batches_of: prompts in a batch, as a multiple of the recipe's."""
    def train(lab):
        r = lab.recipe
        values = {"batch_size": batches_of * r.batch_size, "num_samples": 4, "beta": r.rloo_beta,
                  "learning_rate": r.rloo_learning_rate, "max_new_tokens": r.max_new_tokens,
                  "gradient_steps": GRADIENT_STEPS, "max_steps": GRADIENT_STEPS * num_batches(lab),
                  "keep_cut": False}
        if settings.get("algorithm") in WITH_CRITIC:
            values["critic_learning_rate"] = CRITIC_SCALE * r.rloo_learning_rate
        return lab.train(f"rl-{name}", "rl", lab.sft, prompts(lab), reward_model=lab.arbiter,
                         **values | settings)
    return train


def online_dpo(lab):
    """Best against worst of 4 samples of the start, for as many prompts and steps as the other arms take."""
    r = lab.recipe
    rows = prompts(lab)[:num_batches(lab) * r.batch_size]
    pairs, _ = best_worst(lab.scored_samples("of-sft", lab.sft, rows, 4, 1.0), keep_cut=True)
    return lab.train("online-dpo", "dpo", lab.sft, pairs, beta=r.online_beta, nll_weight=r.online_nll_weight,
                     learning_rate=r.online_learning_rate, batch_size=lab.batch_of(pairs, "online-dpo"),
                     max_steps=GRADIENT_STEPS * num_batches(lab))


ARMS = {
    "sft": lambda lab: lab.sft,
    "rloo": arm("rloo"),
    "rloo-k2": arm("rloo-k2", batches_of=2, num_samples=2),
    "raft": arm("raft", algorithm="raft"),
    "reinforce": arm("reinforce", algorithm="reinforce"),
    "vanilla-pg": arm("vanilla-pg", algorithm="vanilla-pg"),
    "ppo": arm("ppo", algorithm="ppo", gae_lambda=0.95),
    "ppo-lambda-1": arm("ppo-lambda-1", algorithm="ppo", gae_lambda=1.0),
    "ppo-lambda-0.5": arm("ppo-lambda-0.5", algorithm="ppo", gae_lambda=0.5),
    "ppo-lambda-0": arm("ppo-lambda-0", algorithm="ppo", gae_lambda=0.0),
    "rloo-large-beta": arm("rloo-large-beta", beta=LARGE_BETA),
    "raft-large-beta": arm("raft-large-beta", algorithm="raft", beta=LARGE_BETA),
    "rloo-noise": arm("rloo-noise", reward_noise=NOISE),
    "raft-noise": arm("raft-noise", algorithm="raft", reward_noise=NOISE),
    "online-dpo": online_dpo}


def clip_fractions(lab):
    """Of the steps after the first on each batch; on that one no ratio has moved."""
    return [row["clip_fraction"] for row in lab.metrics("ppo")
            if "clip_fraction" in row and row["step"] % GRADIENT_STEPS]


def losses_by_question(lab, before, after):
    """Question by question, the reward of the arm `before` less that of the arm `after`."""
    both = zip(*(lab.answers(arm, "sampled", scored=True) for arm in (before, after)), strict=True)
    return [(a["question_id"], a["reward"] - b["reward"]) for a, b in both]


def raft_loses_more(change):
    """By how much more RAFT's reward falls under a change than RLOO's, question by question."""
    def of(lab):
        raft, rloo = (losses_by_question(lab, name, f"{name}-{change}") for name in ("raft", "rloo"))
        return [(question, a - b) for (question, a), (_, b) in zip(raft, rloo, strict=True)]
    pairs = ("raft", "rloo"), (f"raft-{change}", f"rloo-{change}"), ("raft", f"raft-{change}")
    return Figure("RAFT's loss of reward less RLOO's", of, "above", 0.0, pairs)


def higher_reward(a, b, side="above"):
    return Comparison(a, b, side, measure="reward")


CLAIMS = (
    Claim("pg-order",
          "RLOO >= RAFT > REINFORCE with baseline ~ vanilla policy gradient > PPO at matched samples",
          "TL;DR win rates 77.9, 73.2, 70.7, 70.4, 67.6",
          (Comparison("rloo", "sft"), Comparison("rloo", "raft"), Comparison("raft", "reinforce"),
           Comparison("reinforce", "vanilla-pg", "level"), Comparison("vanilla-pg", "ppo"),
           Comparison("rloo", "ppo"), higher_reward("rloo", "ppo"))),
    Claim("pg-lambda", "The reward falls as lambda falls: 1, 0.95, 0.5, 0",
          "the reward falls monotonically with lambda",
          (higher_reward("ppo-lambda-1", "ppo"), higher_reward("ppo", "ppo-lambda-0.5"),
           higher_reward("ppo-lambda-0.5", "ppo-lambda-0"), higher_reward("ppo-lambda-1", "ppo-lambda-0"))),
    Claim("pg-clip", "PPO's clip hardly ever binds", "under 5% of a batch",
          (Figure("share of tokens whose gradient is clipped", clip_fractions, "below", 0.05, ()),)),
    Claim("pg-k", "RLOO gains from 4 samples a prompt over 2 at the same number of samples",
          "TL;DR 77.9 against 74.2; HH 43.7 against 47.6 (Pythia), 64.1 against 62.2 (Llama)",
          (Comparison("rloo", "rloo-k2"), higher_reward("rloo", "rloo-k2"))),
    Claim("pg-beta", "A larger beta costs RAFT more reward than RLOO", "RAFT degrades more at beta 0.25 to 1",
          (raft_loses_more("large-beta"),)),
    Claim("pg-noise", "Noise on the rewards costs RAFT more than RLOO", "RAFT degrades more under noise",
          (raft_loses_more("noise"),)),
    Claim("pg-dpo", "RLOO beats DPO", "TL;DR 77.9 against 66.6, HH 43.7 against 39.0 and 64.1 against 61.9",
          (Comparison("rloo", "online-dpo"), higher_reward("rloo", "online-dpo"))))

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = {
    "pg-order": "one comparison is with the start",
    "pg-dpo": "DPO trains on two of the four samples; prompts, samples and steps are equal",
}
