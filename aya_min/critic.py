"""What rl trains beside the policy: the critic of vanilla-pg and ppo, and reinforce's mean of the rewards so
far. One module, Learner, holds them, so that one optimizer trains them, one state keeps them and a resumed
run has them to the last bit; model/ publishes the policy alone.

The critic is a reward model's trunk with a value for each token. It starts as the reward model, as in arXiv
2009.01325 (section 3.4), whose code later PPO trainers follow. The paper that is reproduced (arXiv
2402.14740) does not say how its critic starts. Of the reward model's two heads it takes the one on hidden
states; the other reads a whole answer's log-probs, which no single token has.
"""

import torch
from torch import nn

from .linear import Linear
from .model import Decoder


class Critic(nn.Module):
    """V(x, y_<t) for each token t of an answer, in fp32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids, mask, lengths, repeats=None):
        """The values (N,) of the masked tokens, in the order of mask.nonzero(), as the log-probs of
        CohereForCausalLM.forward: each sees the tokens before it."""
        x = self.model(input_ids, lengths, repeats)
        before = x[:, :-1][mask[:, 1:]]                                     # (N, hidden_size)
        # A product of tensors, because autocast would compute F.linear in bf16.
        return (before.float() * self.score.weight.float()).sum(-1)


class Learner(nn.Module):
    """A policy with its critic, or with rewards_so_far: the sum and the number of the rewards of all batches.

    Each part is sharded by itself (distributed.parts), because FSDP gathers weights around the forward of its
    root, and critic and policy are called apart."""

    def __init__(self, policy, critic=None):
        super().__init__()
        self.policy, self.critic = policy, critic
        if critic is None:
            device = next(policy.parameters()).device
            self.register_buffer("rewards_so_far", torch.zeros(2, dtype=torch.float64, device=device))

    @property
    def config(self):
        return self.policy.config

    @property
    def parts(self):
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def set_requires_all_reduce(self, required):
        for part in self.parts:
            part.set_requires_all_reduce(required)

    def forward(self, *inputs):
        return self.policy(*inputs)
