import json
import math
from itertools import product

import pytest
import torch

from aya_min.losses import bradley_terry_loss, dpo_loss, kl_shaped_rewards, rloo_advantages
from aya_min.token_logps import TokenLogps, sum_by_row, token_logps

# ---- token log-probs ---------------------------------------------------------------------------------------

def problem(N=50, D=16, V=301, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = scale * torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(V, (N,), generator=generator),
        torch.randn(N, generator=generator),
    )


def exact(hidden, weight, targets, logit_scale, upstream):
    """The textbook: all logits at once, log_softmax, fp64. Log-probs and the gradients of their weighted
    sum."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logps = (hidden @ weight.T * logit_scale).log_softmax(-1)[range(len(targets)), targets]
    return logps.detach(), *torch.autograd.grad((logps * upstream).sum(), (hidden, weight))


@pytest.mark.parametrize("chunk_size", [1, 7, 49, 50, 4096])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625])
def test_token_logps_and_their_gradients_equal_an_unchunked_fp64_log_softmax(chunk_size, logit_scale):
    hidden, weight, targets, upstream = problem()
    logps = token_logps(hidden, weight, targets, logit_scale, chunk_size)
    grads = torch.autograd.grad((logps * upstream).sum(), (hidden, weight))
    for ours, theirs in zip((logps, *grads), exact(hidden, weight, targets, logit_scale, upstream)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_chunked_log_probs_equal_unchunked_ones():
    hidden, weight, targets, upstream = problem(N=64)
    results = []
    for chunk_size in (64, 16):
        logps = token_logps(hidden, weight, targets, 0.5, chunk_size)
        results.append((logps, *torch.autograd.grad((logps * upstream).sum(), (hidden, weight))))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)


def peak_bytes(function, folder):
    """The most bytes that tensors made by a function took at once, by torch's own profiler."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return max(totals) - totals[0]


@pytest.mark.parametrize("N, V", [(2048, 3000), (4096, 3000), (2048, 6000)])
def test_peak_memory_grows_with_the_chunk_and_not_with_tokens_times_vocabulary(N, V, tmp_path):
    """Forward and backward hold one chunk of logits (and a few vectors, the hidden states and the
    gradients), where all of them would be N x V."""
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    targets = torch.randint(V, (N,))
    peak = peak_bytes(lambda: token_logps(hidden, weight, targets, chunk_size=128).sum().backward(), tmp_path)
    chunk, all_logits = 4 * 128 * V, 4 * N * V
    assert chunk < peak < 2.5 * chunk + 4 * 8 * 6 * (N + V) + 200_000 < all_logits / 3
    assert (
        peak_bytes(lambda: token_logps(hidden, weight, targets, chunk_size=N).sum().backward(), tmp_path)
        > all_logits
    )


@pytest.mark.parametrize("chunk_size", [None, 128], ids=["one chunk", "chunks"])
def test_capped_logits_have_the_log_probs_and_gradients_of_their_formula(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    targets = torch.randint(50, (300,), generator=generator)
    made = token_logps(hidden, weight, targets, 0.5, chunk_size, cap=2.0)
    expected = (2 * torch.tanh(hidden @ weight.T / 4)).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(made, expected)
    for one, two in zip(*(torch.autograd.grad((logps * hidden[:, 0].detach()).sum(), (hidden, weight))
                          for logps in (made, expected))):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_the_default_chunk_is_half_a_gigabyte_of_fp32_logits_for_any_vocabulary(monkeypatch):
    rows = []
    monkeypatch.setattr(TokenLogps, "apply", lambda *args: rows.append(args[-2]) or args[0].sum(1))
    for V in (4096, 256_000, 2_000_000):
        token_logps(torch.zeros(10, 2), torch.zeros(1, 2).expand(V, 2), torch.zeros(10, dtype=torch.long))
    assert rows == [32768, 512, 128] and 512 * 256_000 * 4 < 0.55e9


def test_log_probs_of_bf16_weights_are_fp32_and_of_huge_logits_finite():
    hidden, weight, targets, _ = problem()
    assert token_logps(hidden.bfloat16(), weight.bfloat16(), targets).dtype == torch.float32
    hidden, weight, targets, _ = problem(scale=1e4)
    logps = token_logps(hidden, weight, targets)
    assert logps.isfinite().all() and (logps <= 0).all()


def test_log_probs_of_no_token_are_none():
    hidden, weight, targets, _ = problem(N=0)
    assert token_logps(hidden, weight, targets).shape == (0,)


def test_sums_by_row_are_the_sums_of_each_rows_masked_tokens():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    assert sum_by_row(torch.tensor([1.0, 2.0, 4.0, 8.0]), mask).tolist() == [3.0, 0.0, 12.0]


# ---- preferences -------------------------------------------------------------------------------------------

def test_dpo_loss_is_log2_per_pair_and_the_rewards_zero_when_policy_equals_reference():
    logps = -100 * torch.rand(2, 8)
    losses, rewards = dpo_loss(logps, logps, beta=0.1)
    torch.testing.assert_close(losses, torch.full((8,), math.log(2)))
    assert (rewards == 0).all()


def test_dpo_by_hand():
    """beta 0.5; chosen +1, rejected -1 nat against the reference: rewards +-0.5, their difference 1, -log
    sigmoid(1) = log(1 + 1/e)."""
    policy, reference = torch.tensor([[-1.0], [-3.0]]), torch.tensor([[-2.0], [-2.0]])
    losses, rewards = dpo_loss(policy, reference, beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([math.log(1 + math.exp(-1))]))
    assert rewards.tolist() == [[0.5], [-0.5]] and not rewards.requires_grad
    torch.testing.assert_close(
        dpo_loss(policy.flip(0), reference, beta=0.5)[0], torch.tensor([math.log(1 + math.e)])
    )


def test_dpo_pushes_chosen_up_and_rejected_down_by_beta_times_the_wrong_probability():
    """Eq. 7's gradient: -beta * sigmoid(r_rejected - r_chosen) on the chosen log-prob, the opposite on the
    rejected one."""
    policy = torch.tensor([[-1.0], [-3.0]], requires_grad=True)
    dpo_loss(policy, torch.tensor([[-2.0], [-2.0]]), beta=0.5)[0].sum().backward()
    wrong = 0.5 / (1 + math.e)
    torch.testing.assert_close(policy.grad, torch.tensor([[-wrong], [wrong]]))


def test_dpo_sees_only_log_ratios():
    policy, reference, shift = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(
        dpo_loss(policy, reference, 0.1), dpo_loss(policy + shift, reference + shift, 0.1)
    )


def test_bradley_terry_by_hand():
    """Equal scores: ln 2. One point apart: log(1 + 1/e). Odds of 3 to 1: log(4/3). Hopeless: the margin
    itself, not infinity."""
    chosen, rejected = torch.tensor([5.0, 2.0, math.log(3), -500.0]), torch.tensor([5.0, 1.0, 0.0, 500.0])
    expected = torch.tensor([math.log(2), math.log(1 + math.exp(-1)), math.log(4 / 3), 1000.0])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), expected)


# ---- RLOO --------------------------------------------------------------------------------------------------

def test_rloo_advantages_by_hand():
    """(1, 2, 6): the others' means are 4, 3.5 and 1.5."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert rloo_advantages(rewards).tolist() == [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_advantages_sum_to_zero_per_prompt_and_ignore_the_other_prompts(k):
    rewards = torch.randn(5, k, dtype=torch.float64)
    advantages = rloo_advantages(rewards)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(5, dtype=torch.float64))
    shift = torch.arange(5.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(rloo_advantages(rewards + shift), advantages)
    torch.testing.assert_close(rloo_advantages(rewards[2:3])[0], advantages[2])


def test_equal_rewards_give_no_advantage():
    assert (rloo_advantages(torch.full((2, 4), 0.7)).abs() < 1e-6).all()


def test_one_sample_a_prompt_is_refused():
    with pytest.raises(ValueError, match="RLOO needs at least 2 samples a prompt for its baseline, got 1"):
        rloo_advantages(torch.randn(3, 1))


def test_kl_shaped_rewards_by_hand():
    """2 nats above the reference at beta 0.5 cost one point; below it they pay."""
    shaped = kl_shaped_rewards(
        torch.tensor([1.0, 1.0]), torch.tensor([-3.0, -5.0]), torch.tensor([-5.0, -3.0]), beta=0.5
    )
    assert shaped.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_expected_rloo_gradient_is_the_exact_gradient_of_reward_minus_kl(k, beta):
    """A policy over 3 actions: all 3^k ways to draw k of them, each weighted by its probability, against
    autograd on
    E[r] - beta * KL(pi, ref) itself. An unbiased estimator gives equality, not closeness."""
    theta = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64).log_softmax(0)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logp = theta.log_softmax(0)
    [expected] = torch.autograd.grad((logp.exp() * (reward - beta * (logp - ref))).sum(), theta)

    logp = theta.log_softmax(0)
    draws = torch.tensor(list(product(range(3), repeat=k)))                                     # (3^k, k)
    probability = logp.detach()[draws].sum(1).exp()                                             # (3^k,)
    advantages = rloo_advantages(kl_shaped_rewards(reward[draws], logp.detach()[draws], ref[draws], beta))
    objective = (probability * (advantages * logp[draws]).mean(1)).sum()
    [estimated] = torch.autograd.grad(objective, theta)
    torch.testing.assert_close(estimated, expected, rtol=1e-12, atol=1e-12)


def test_grpos_baseline_would_shrink_that_gradient_and_leaving_the_baseline_out_would_add_variance():
    """What the leave-one-out baseline is for, on the same 3 actions with k = 2."""
    theta = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)
    p, reward = theta.softmax(0), torch.tensor([11.0, 8.0, 10.5], dtype=torch.float64)
    draws = torch.tensor(list(product(range(3), repeat=2)))
    probability = p[draws].prod(1)[:, None]
    scores = torch.eye(3, dtype=torch.float64)[draws] - p  # d log p(draw) / d theta, (9, 2, 3)
    estimate = lambda advantages: (advantages[..., None] * scores).mean(1)                      # (9, 3)
    mean = lambda estimates: (probability * estimates).sum(0)
    variance = lambda estimates: (probability * (estimates - mean(estimates)) ** 2).sum()
    rloo, plain = estimate(rloo_advantages(reward[draws])), estimate(reward[draws])
    grpo = estimate(reward[draws] - reward[draws].mean(1, keepdim=True))
    torch.testing.assert_close(mean(rloo), mean(plain))
    torch.testing.assert_close(mean(grpo), mean(rloo) / 2)
    assert variance(rloo) < 0.05 * variance(plain)
