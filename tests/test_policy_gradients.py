"""The algorithms of rl: their equations by hand and against the enumerated gradient of a policy of two
tokens, their settings, and their runs. Two ranks against one: test_distributed.py."""

import hashlib
import json
import os
import signal
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import VARIANTS, assert_close, language_model, logged, reward_model, run, state_of, tokenizer

from aya_min import distributed, stages
from aya_min.config import RL
from aya_min.critic import Critic
from aya_min.losses import (
    critic_loss,
    gae,
    group_advantages,
    moving_average_advantages,
    ppo_loss,
    raft_weights,
    rloo_advantages,
    token_rewards,
    vanilla_pg_loss,
)
from aya_min.rollouts import Rollout, collate_rollouts

ALGORITHMS = {name.removeprefix("rl-"): changes for name, changes in VARIANTS.items()
              if "algorithm" in changes}


# ---- by hand -----------------------------------------------------------------------------------------------

def test_grpo_by_hand():
    """(1, 2, 6) has mean 3; the squares of (-2, -1, 3) sum to 14, over k - 1 = 2 that is 7."""
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert group_advantages(rewards).tolist() == [[-2.0, -1.0, 3.0]]
    divided = torch.tensor([[-2.0, -1.0, 3.0]]) / (7**0.5 + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, normalize=True), divided)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_grpos_advantage_is_rloos_times_k_minus_1_over_k(k):
    """r_i - mean(r) = (k-1)/k * (r_i - mean of the others)."""
    rewards = torch.randn(5, k, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards), (k - 1) / k * rloo_advantages(rewards))


def test_a_sample_that_is_left_out_is_as_if_it_had_not_been_drawn():
    """(1, 2, 6) without the 6: RLOO of (1, 2). One that is alone has no siblings to compare it with."""
    rewards, kept = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 9.0]]), torch.tensor([[1.0, 1, 0], [0, 1, 0]])
    assert rloo_advantages(rewards, kept).tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert group_advantages(rewards, kept).tolist() == [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert group_advantages(rewards, kept, True)[1].tolist() == [0.0, 0.0, 0.0]
    assert raft_weights(rewards, kept).tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert raft_weights(rewards, torch.zeros(2, 3)).sum() == 0


def test_raft_takes_the_best_and_of_equals_the_first():
    assert raft_weights(torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 1.0]])).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_the_moving_average_is_of_the_batches_before():
    """Rewards of 2, 3 and 7 came before: b = 4."""
    rewards = torch.tensor([[5.0, 1.0]])
    assert moving_average_advantages(rewards, 12.0, 3.0).tolist() == [[1.0, -3.0]]
    assert moving_average_advantages(rewards, 0.0, 0.0).tolist() == [[5.0, 1.0]]


def test_only_the_last_token_has_the_reward_and_every_token_has_its_kl():
    logps, ref = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-2.0, -1.0, -1.0])
    assert token_rewards(4.0, logps, ref, 0.5).tolist() == [-0.5, 0.5, 4.0]
    shaped = 4.0 - 0.5 * (logps.sum() - ref.sum())
    assert token_rewards(4.0, logps, ref, 0.5).sum() == shaped


def test_gae_by_hand():
    """r = (1, 0, 2), V = (3, 1, 4): deltas 1 + 1 - 3 = -1, 0 + 4 - 1 = 3, 2 - 4 = -2. At lambda 1/2 the
    advantages are -1 + (3 - 2/2)/2 = 0, 3 - 2/2 = 2, -2; at lambda 1 the rewards to come, 3, 2, 2, less V."""
    rewards, values = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3.0, 1.0, 4.0])
    assert gae(rewards, values, 0.0).tolist() == [-1.0, 3.0, -2.0]
    assert gae(rewards, values, 0.5).tolist() == [0.0, 2.0, -2.0]
    assert gae(rewards, values, 1.0).tolist() == [0.0, 1.0, -2.0]


def test_ppo_by_hand():
    """Ratios 2, 2, 1/2, 1/2, with advantages 1, -1, 1, -1: at clip 0.2 a good token counts up to 1.2, a bad
    one down to 0.8. Where the clip binds there is no gradient."""
    logps = torch.tensor([2.0, 2.0, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses, binds = ppo_loss(logps, torch.zeros(4), advantages, 0.2)
    torch.testing.assert_close(losses, torch.tensor([-1.2, 2.0, -0.5, 0.8]))
    assert binds.tolist() == [1.0, 0.0, 0.0, 1.0]
    losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 2.0, -0.5, 0.0]))
    losses, binds = ppo_loss(logps, torch.zeros(4), advantages)
    torch.testing.assert_close(losses, torch.tensor([-2.0, 2.0, -0.5, 0.5]))
    assert binds.sum() == 0


def test_the_vanilla_policy_gradient_by_hand():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    losses = vanilla_pg_loss(logps, torch.tensor([3.0, -1.0]))
    losses.sum().backward()
    assert losses.tolist() == [-3.0, 1.0] and logps.grad.tolist() == [-3.0, 1.0]


def test_the_critics_loss_by_hand():
    assert critic_loss(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])).tolist() == [4.5, 0.0]


# ---- against the enumerated gradient -----------------------------------------------------------------------

class Enumerated:
    """A policy of answers of two tokens out of three, with all its answers: the second token's logits depend
    on the first one. r, and the log-probs of a reference, are drawn once."""
    beta, vocabulary = 0.3, 3

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.theta = draw(4, 3).requires_grad_()            # row 0: first token; row 1 + a: after token a
        self.answers = torch.tensor(list(product(range(3), repeat=2)))      # (9, 2)
        self.reward, self.ref = draw(9), self.logps_of(draw(4, 3))          # (9,), (9, 2)
        self.values = draw(9, 2)
        self.values[:, 0] = 0.7                             # before the first token all answers are the same
        self.values[:, 1] = draw(3)[self.answers[:, 0]]     # before the second: a function of the first
        self.old = self.logps_of(self.theta).detach()
        self.shaped = self.reward - self.beta * (self.old - self.ref).sum(1)
        self.p = self.old.sum(1).exp()

    def logps_of(self, theta):
        """(9, 2) log-probs of the tokens of each answer."""
        table, first = theta.log_softmax(-1), self.answers[:, 0]
        return torch.stack([table[0][first], table[1 + first, self.answers[:, 1]]], 1)

    def gradient(self, objective):
        return torch.autograd.grad(objective, self.theta)[0]

    def exact(self):
        """Of E[r] - beta KL(pi, ref) itself."""
        logps = self.logps_of(self.theta)
        total = logps.sum(1)
        return self.gradient((total.exp() * (self.reward - self.beta * (total - self.ref.sum(1)))).sum())

    def of_groups(self, advantages_of, k):
        """The expected gradient of sum_i A_i log pi(y_i) / k over all 9^k ways to draw a group."""
        draws = torch.tensor(list(product(range(9), repeat=k)))             # (9^k, k)
        advantages = advantages_of(self.shaped[draws])
        logps = self.logps_of(self.theta).sum(1)[draws]
        return self.gradient((self.p[draws].prod(1) * (advantages * logps).mean(1)).sum())

    def of_tokens(self, gae_lambda, values, loss=vanilla_pg_loss):
        """The expected gradient with tokens as actions."""
        rows = [token_rewards(r, old, ref, self.beta) for r, old, ref in zip(self.reward, self.old, self.ref)]
        advantages = torch.stack([gae(r, v, gae_lambda) for r, v in zip(rows, values)])         # (9, 2)
        return self.gradient(-(self.p * loss(self.logps_of(self.theta), advantages).sum(1)).sum())

    def true_values(self):
        """V before each token, under this policy."""
        logps, after = self.old, torch.zeros(9, dtype=torch.float64)
        to_come = torch.stack([token_rewards(r, old, ref, self.beta)
                               for r, old, ref in zip(self.reward, logps, self.ref)])           # (9, 2)
        for a in range(3):
            rows = self.answers[:, 0] == a
            after[rows] = (logps[rows, 1].exp() * to_come[rows, 1]).sum()
        return torch.stack([((to_come.sum(1)) * self.p).sum().expand(9), after], 1)


EXACT = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_rloo_is_unbiased_and_grpo_is_too_short_by_k_minus_1_over_k(k):
    policy = Enumerated()
    torch.testing.assert_close(policy.of_groups(rloo_advantages, k), policy.exact(), **EXACT)
    torch.testing.assert_close(policy.of_groups(group_advantages, k), (k - 1) / k * policy.exact(), **EXACT)


@pytest.mark.parametrize("total, count", [(0.0, 0.0), (12.0, 3.0), (-500.0, 2.0)])
def test_reinforce_is_unbiased_whatever_came_before(total, count):
    policy = Enumerated()
    found = policy.of_groups(lambda rewards: moving_average_advantages(rewards, total, count), 1)
    torch.testing.assert_close(found, policy.exact(), **EXACT)


def test_grpo_with_the_division_and_raft_follow_other_gradients():
    """They do not claim to be unbiased: not even the direction is that of the reward's gradient."""
    policy, exact = Enumerated(), Enumerated().exact().flatten()
    for advantages_of in (lambda rewards: group_advantages(rewards, normalize=True), raft_weights):
        found = policy.of_groups(advantages_of, 3).flatten()
        assert torch.nn.functional.cosine_similarity(found, exact, 0) < 0.999


def test_the_vanilla_policy_gradient_is_unbiased_with_any_critic_and_ppo_without_clip_is_the_same():
    policy = Enumerated()
    torch.testing.assert_close(policy.of_tokens(1.0, policy.values), policy.exact(), **EXACT)
    unclipped = lambda logps, advantages: ppo_loss(logps, policy.old, advantages)[0]
    torch.testing.assert_close(policy.of_tokens(1.0, policy.values, unclipped), policy.exact(), **EXACT)


def test_a_lambda_below_1_is_unbiased_with_the_true_values_only():
    policy = Enumerated()
    for gae_lambda in (0.0, 0.5, 1.0):
        found = policy.of_tokens(gae_lambda, policy.true_values())
        torch.testing.assert_close(found, policy.exact(), **EXACT)
    off = [(policy.of_tokens(gae_lambda, policy.values) - policy.exact()).norm()
           for gae_lambda in (1.0, 0.95, 0.5, 0.0)]
    assert off[0] < 1e-12 and off[0] < off[1] < off[2] < off[3]


# ---- the stage ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_of_one_prompt_are_the_whole_batch(algorithm, world, tmp_path):
    """In both steps on a batch, and in the batch after it. For rloo see test_loop.py."""
    changes = ALGORITHMS[algorithm]
    whole, cut = (logged(run("rl", world, tmp_path / str(size), micro_batch_size=size, **changes))
                  for size in (0, 1))
    assert_close(whole, cut, rtol=1e-4, atol=2e-5)


def assert_same_bits(one, other):
    assert logged(one) == logged(other)
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    digests = {hashlib.sha256((each / "model" / "model.safetensors").read_bytes()).digest()
               for each in (one, other)}
    assert len(digests) == 1


@pytest.mark.parametrize("algorithm", [
    pytest.param(name, marks=pytest.mark.long) if name in ("raft", "grpo") else name for name in ALGORITHMS])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(algorithm, world, tmp_path):
    always = ALGORITHMS[algorithm] | dict(schedule="constant")
    whole = run("rl", world, tmp_path / "whole", **always)
    for i, steps in enumerate((2, 4)):
        parts = run("rl", world, tmp_path / "parts", resume=i > 0, **always | dict(max_steps=steps))
    assert_same_bits(whole, parts)


def test_a_signal_within_a_batch_ends_the_run_after_all_its_steps(world, tmp_path, monkeypatch):
    """A state between two steps on a batch would need its samples."""
    always, calls, plain = dict(gradient_steps=2, schedule="constant"), [], stages.policy_gradient_loss
    whole = run("rl", world, tmp_path / "whole", max_steps=6, **always)

    def signalled(model, batch):
        calls.append(batch)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    monkeypatch.setattr(stages, "policy_gradient_loss", signalled)
    with pytest.raises(distributed.Stopped, match="after 4 of 6 steps. The last saved state is step-4"):
        run("rl", world, tmp_path / "parts", max_steps=6, **always)
    assert_same_bits(whole, run("rl", world, tmp_path / "parts", resume=True, max_steps=6, **always))


def test_ppo_with_lambda_1_and_no_clip_is_the_vanilla_policy_gradient(world, tmp_path):
    """As long as each batch has one gradient step."""
    plain = logged(run("rl", world, tmp_path / "plain", algorithm="vanilla-pg"))
    ppo = logged(run("rl", world, tmp_path / "ppo", algorithm="ppo", gae_lambda=1.0, clip=0.0))
    for row in ppo:
        assert row.pop("clip_fraction") == 0
    assert_close(plain, ppo, rtol=1e-4, atol=2e-5)


def test_grpo_with_two_samples_is_rloo_at_half_the_gradient(world, tmp_path):
    rloo, grpo = (logged(run("rl", world, tmp_path / name, algorithm=name, max_steps=1))[0]
                  for name in ("rloo", "grpo"))
    for key in ("loss", "grad_norm"):
        assert grpo[key] == pytest.approx(rloo[key] / 2, rel=1e-5)


def test_the_critic_begins_as_the_reward_model_learns_and_is_not_published(world, tmp_path):
    folder = run("rl", world, tmp_path / "run", algorithm="vanilla-pg", max_steps=12, learning_rate=3e-3,
                 warmup_steps=0, max_new_tokens=4, save_every=1)
    rows, state = logged(folder), state_of(folder)
    assert load_file(folder / "model" / "model.safetensors").keys() == language_model().state_dict().keys()
    critic = {name.removeprefix("critic."): t for name, t in state.items()
              if name.startswith("critic.") and "|" not in name}
    start = reward_model().state_dict()
    assert critic.keys() == start.keys() - {"score_logps.weight"}
    moved = max((critic[name] - start[name]).abs().max() for name in critic)
    assert 1e-3 < moved < 12 * 3e-3 + 1e-6                  # of 12 steps of Adam from the reward model
    assert rows[-1]["critic_loss"] < 0.5 * rows[0]["critic_loss"]
    assert rows[0]["explained_variance"] < rows[-1]["explained_variance"] < 1


def test_the_critic_has_its_own_learning_rate(world, tmp_path):
    """The first step of Adam is as long as the learning rate, but where a gradient is near 0."""
    folder = run("rl", world, tmp_path / "run", algorithm="ppo", max_steps=1, warmup_steps=0,
                 critic_learning_rate=1e-2)
    state, policy, critic = state_of(folder), language_model().state_dict(), reward_model().state_dict()
    del critic["score_logps.weight"]
    moved = {part: max((state[f"{part}.{name}"] - t).abs().max().item() for name, t in start.items())
             for part, start in (("policy", policy), ("critic", critic))}
    assert moved == {"policy": pytest.approx(1e-3, rel=1e-2), "critic": pytest.approx(1e-2, rel=1e-2)}


def test_a_value_sees_the_tokens_before_its_own():
    critic, ids = Critic(reward_model().config), torch.tensor([[5, 6, 7, 8]])
    mask, lengths = torch.tensor([[False, False, True, True]]), torch.tensor([4])
    of_reward = reward_model().state_dict()
    critic.load_state_dict({name: of_reward[name] for name in critic.state_dict()})
    values = critic(ids, mask, lengths)
    x = critic.model(ids)
    torch.testing.assert_close(values, (x[0, 1:3] @ critic.score.weight[0]).detach())
    torch.testing.assert_close(critic(torch.tensor([[5, 6, 7, 9]]), mask, lengths), values)
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(ids, mask, lengths).dtype == torch.float32


def test_reinforces_baseline_is_the_mean_of_all_rewards_before(world, tmp_path):
    """beta 0, so that the logged rewards are those of the baseline."""
    folder = run("rl", world, tmp_path / "run", algorithm="reinforce", max_steps=3, beta=0.0)
    total, count = state_of(folder)["rewards_so_far"].tolist()
    assert count == 3 * 8 * 2
    assert total == pytest.approx(16 * sum(row["reward"] for row in logged(folder)), rel=1e-5)


def test_the_clip_binds_where_steps_are_large_and_not_in_the_first_of_a_batch(world, tmp_path):
    rows = logged(run("rl", world, tmp_path / "run", algorithm="ppo", max_steps=6, gradient_steps=3, clip=0.1,
                      learning_rate=1e-2, warmup_steps=0))
    shares = [row["clip_fraction"] for row in rows]
    assert shares[0] == shares[3] == 0 and min(shares[1], shares[2], shares[4], shares[5]) > 0.1
    assert rows[0]["reward"] == rows[2]["reward"] != rows[3]["reward"]      # the same samples


# ---- answers that were cut ---------------------------------------------------------------------------------

@pytest.fixture
def stops_soon(monkeypatch):
    """One token in ten ends an answer."""
    monkeypatch.setattr(tokenizer(), "stop_ids", sorted({*tokenizer().stop_ids, *range(20, 400, 10)}))


def test_a_cut_answer_is_kept_loses_the_penalty_or_is_left_out(world, tmp_path, stops_soon):
    """What is logged as reward is the reward model's."""
    rows = {what: logged(run("rl", world, tmp_path / what, algorithm="reinforce", max_steps=1,
                             max_new_tokens=6, cut_answers=what, beta=0.0))[0]
            for what in ("keep", "penalize", "drop")}
    keep, penalize, drop = rows.values()
    assert 0 < keep["cut"] < 1 and keep["cut"] == drop["cut"]
    assert keep["reward"] == penalize["reward"] == drop["reward"]
    so_far = {what: state_of(tmp_path / what)["rewards_so_far"].tolist() for what in rows}
    assert so_far["penalize"][0] == pytest.approx(so_far["keep"][0] - 16 * keep["cut"], rel=1e-5)
    assert so_far["drop"][1] == 16 * (1 - keep["cut"])


@pytest.mark.parametrize("algorithm", ["rloo", "raft", "ppo"])
def test_answers_that_are_dropped_are_not_in_the_count(algorithm, world, tmp_path, stops_soon):
    """However they fall into micro-batches: the same loss and norm."""
    whole, cut = (logged(run("rl", world, tmp_path / str(size), micro_batch_size=size, algorithm=algorithm,
                             num_samples=4, cut_answers="drop", max_new_tokens=6, max_steps=2))
                  for size in (0, 1))
    assert 0.1 < whole[0]["cut"] < 0.9
    assert_close(whole, cut, rtol=1e-4, atol=2e-5)


def test_the_count_of_a_batch_is_of_the_answers_that_have_a_gradient():
    ids, mask = np.zeros(4, np.int32), np.arange(4) > 1
    rollouts = [Rollout(ids, mask, "other", trained=trained) for trained in (1.0, 0.0, 1.0)]
    assert collate_rollouts(rollouts).count == 2


def test_a_batch_of_which_all_is_dropped_is_refused_by_name(world, tmp_path):
    with pytest.raises(ValueError, match="batch 0: all answers were cut at --max-new-tokens 1"):
        run("rl", world, tmp_path / "run", cut_answers="drop", max_new_tokens=1, max_steps=1)


# ---- settings ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, says", [
    (dict(algorithm="grpo", num_samples=1), "--num-samples 1: grpo compares .* at least 2 samples"),
    (dict(algorithm="raft", num_samples=1), "--num-samples 1: raft compares"),
    (dict(algorithm="rloo", gae_lambda=0.0), "--gae-lambda 0.0 is for ppo; rloo does not read it"),
    (dict(algorithm="vanilla-pg", gae_lambda=1.0), "--gae-lambda 1.0 is for ppo; vanilla-pg"),
    (dict(algorithm="reinforce", clip=0.2), "--clip 0.2 is for ppo; reinforce"),
    (dict(algorithm="raft", critic_weight=0.1), "--critic-weight 0.1 is for vanilla-pg and ppo; raft"),
    (dict(algorithm="ppo", normalize_advantages=True), "--normalize-advantages True is for grpo; ppo"),
    (dict(cut_penalty=1.0), "--cut-penalty 1.0 goes with --cut-answers penalize, not keep"),
    (dict(gradient_steps=2, save_every=3), "--save-every 3 is no multiple of --gradient-steps 2"),
    (dict(gradient_steps=2, max_steps=5), "--max-steps 5 is no multiple of --gradient-steps 2")])
def test_what_an_algorithm_does_not_read_is_refused_by_name(changes, says):
    with pytest.raises(ValueError, match=says):
        RL(**changes)


def test_settings_that_are_unset_take_the_value_that_config_json_says(world, tmp_path):
    assert (RL(algorithm="ppo").clip, RL(algorithm="ppo").gae_lambda, RL().clip) == (0.2, 0.95, None)
    folder = run("rl", world, tmp_path / "run", algorithm="ppo", max_steps=1, cut_answers="penalize")
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert (settings["critic_weight"], settings["cut_penalty"]) == (0.1, 1.0)


def test_noise_on_the_rewards_changes_the_gradient_and_not_the_rewards_that_are_logged(world, tmp_path):
    plain, noisy, again = (logged(run("rl", world, tmp_path / name, max_steps=1, reward_noise=noise))[0]
                           for name, noise in (("plain", 0.0), ("noisy", 1.0), ("again", 1.0)))
    assert noisy == again and noisy["reward"] == plain["reward"] and noisy["grad_norm"] != plain["grad_norm"]


def test_a_run_of_the_old_name_goes_on_under_it_and_under_the_new_one(world, tmp_path):
    """rloo was a stage; its runs say so in config.json and know no --algorithm."""
    always = dict(schedule="constant")
    whole, old = (run("rl", world, tmp_path / name, **always | dict(max_steps=2)) for name in ("a", "b"))
    path = old / "config.json"
    about = json.loads(path.read_text())
    about["stage"] = "rloo"
    for name in ("algorithm", "gradient_steps", "clip", "gae_lambda", "critic_weight", "critic_learning_rate",
                 "normalize_advantages", "cut_answers", "cut_penalty", "reward_noise"):
        del about["settings"][name]
    path.write_text(json.dumps(about))
    for folder in (whole, old):
        run("rl", world, folder, resume=True, **always | dict(max_steps=3))
    assert_same_bits(whole, old)
