"""The losses of a mixture of experts beside a stage's own (arXiv 2408.08274): the balance of the experts of
each layer, and the size of its router's scores.

    L = L_stage + sum over layers of (balance_weight N sum_i f_i P_i + router_z_weight mean of logsumexp^2)

f, P and the mean are over all tokens of a step that are no padding, on all ranks and in all micro-batches, so
that the loss and its gradient do not depend on how the step is cut. A micro-batch needs f of the whole step.
Where a rank has several, they first run forward without gradients to know it, which costs about a third of a
step more; with one, f is summed over the ranks between its forward and its backward. The sums P and of z are
linear, so that each micro-batch adds its part.

The attention experts of BAM have no such losses here: every token uses all of them.
"""

import torch

from . import distributed
from .losses import load_balance

# Nexus takes 0.05 and finds little difference to 0.0005 (arXiv 2408.15901). BAM says neither of its weights.
BALANCE_WEIGHT = 0.05


def weights_of(settings, model):
    """(balance weight, z weight) of a training. ValueError where a dense model is given one."""
    given = {"--balance-weight": settings.balance_weight, "--router-z-weight": settings.router_z_weight}
    if not trained_mixtures(model):
        for flag, value in given.items():
            if value is not None:
                kind = "dense, no mixture of experts"
                if any(part.config.mixture for part in distributed.parts(model)):
                    kind = "frozen, its experts too"
                raise ValueError(f"{flag} {value}: this model is {kind}; leave it out")
    balance, z = given.values()
    return BALANCE_WEIGHT if balance is None else balance, z or 0.0


def trained_mixtures(model):
    """The decoders that are mixtures of experts and are trained; that below a SideNet is frozen."""
    return [part.model for part in distributed.parts(model)
            if part.config.mixture and any(p.requires_grad for p in part.model.parameters())]


class Auxiliary:
    """The losses of one step.

    forward(batch): the stage's forward, after which each part of the model has its routing.
    """

    def __init__(self, model, micro_batches, settings, device, forward):
        self.decoders = trained_mixtures(model)
        if not self.decoders:
            return
        self.balance_weight, self.z_weight = weights_of(settings, model)
        tokens = torch.tensor(sum(int(b.lengths.sum()) for b in micro_batches), device=device,
                              dtype=torch.float64)
        self.tokens, self.sent = distributed.sum_over_ranks(tokens).item(), {}
        self.sums = [0.0] * len(self.decoders)          # of the step, this rank's so far
        if self.balance_weight and len(micro_batches) > 1:
            sums = [0.0] * len(self.decoders)
            with torch.no_grad():
                for batch in micro_batches:
                    forward(batch)
                    sums = [total + decoder.routing for total, decoder in zip(sums, self.decoders)]
            self.sent = dict(enumerate(map(distributed.sum_over_ranks, sums)))

    def loss(self):
        """The part of the micro-batch that has just run forward. Those of all micro-batches on all ranks add
        up to the losses of the step."""
        total = 0.0
        for i, decoder in enumerate(self.decoders):
            routing, decoder.routing = decoder.routing, None            # (layers, 2 E + 1)
            self.sums[i] = self.sums[i] + routing.detach()
            E = routing.shape[1] // 2
            if self.balance_weight:
                sent = self.sent.get(i)
                sent = distributed.sum_over_ranks(routing.detach().clone()) if sent is None else sent
                balance = load_balance(sent[:, :E] / self.tokens, routing[:, E:2 * E] / self.tokens)
                total = total + self.balance_weight * balance.sum()
            total = total + self.z_weight * routing[:, -1].sum() / self.tokens
        return total

    def logged(self):
        """{name: value} of the whole step: the two losses, summed over layers, not weighted, and the largest
        and the smallest share of the tokens that an expert of a layer has got. A collective."""
        if not self.decoders:
            return {}
        means = distributed.sum_over_ranks(self.sums[0].clone()) / self.tokens      # (layers, 2 E + 1)
        E = means.shape[1] // 2
        shares = means[:, :E]
        return {"balance_loss": load_balance(shares, means[:, E:2 * E]).sum().item(),
                "router_z_loss": means[:, -1].sum().item(),
                "expert_share/largest": shares.max().item(), "expert_share/smallest": shares.min().item()}
