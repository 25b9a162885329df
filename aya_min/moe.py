"""The layers of a mixture of experts, made of dense models of one seed: Nexus (arXiv 2408.15901) and BAM
(arXiv 2408.08274). model.MixtureBlock puts them into a block; balance.py has their losses.

    router      linear: x . w_i       nexus: x . e_i, e_i = W2 SwiGLU(W1 d_i) of the domain's embedding d_i
    MLP         s = softmax(scores) over all experts;  y = [shared(x) +] sum over the top k of s_i MLP_i(x)
    attention   g = softmax(scores) over all experts;  y = sum_i g_i attention_i(x)        (BAM, soft)

The gates of the top k are not normalised again, in either paper. No token is dropped: tokens are sorted by
expert, and one grouped product multiplies each group with its expert's matrix. Attention experts are more
heads of one attention, whose outputs are scaled by the gates: E experts of H heads are E H heads of queries,
and E K of keys and values, or K if they are shared.

Departures: with attention_top_k the experts that do not count for a token are computed all the same, because
other tokens need their keys and values. The query and key norms of a family that has them, which BAM's models
have not, are one for all experts. Scores and softmax are fp32.
N tokens, E experts, k top_k, h hidden_size, H heads, K key-value heads, D head width of one expert.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from .linear import Linear, grouped_linear, linear
from .losses import router_z


def scores_of(x, weight):
    """x W^T in fp32, under autocast too. (N, h), (E, h) -> (N, E)"""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


class LinearRouter(nn.Module):
    """A score for each expert: x . w_i."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(config.mixture.experts), config.hidden_size))

    def forward(self, x, domains=None):
        """(N, h) -> (N, E)"""
        return scores_of(x, self.weight)


class NexusRouter(nn.Module):
    """A score for each expert: x . e_i, where e_i is projected from the embedding of the expert's domain, so
    that a new expert has a score without training."""

    def __init__(self, config):
        super().__init__()
        self.w1 = Linear(config.mixture.domain_size, 2 * config.hidden_size, bias=False)
        self.w2 = Linear(config.hidden_size, config.hidden_size, bias=False)

    def embeddings(self, domains):
        """The experts' embeddings e = W2 SwiGLU(W1 d). (E, m) -> (E, h)"""
        gate, up = self.w1(domains.to(self.w1.weight.dtype)).chunk(2, -1)
        return self.w2(F.silu(gate) * up)

    def forward(self, x, domains):
        """(N, h), (E, m) -> (N, E)"""
        return scores_of(x, self.embeddings(domains))


def routing_sums(chosen, gates, scores, counted=None):
    """What the balance and z losses need of N tokens: how many are sent to each expert, the sum of each
    expert's gate, and the sum of logsumexp(scores)^2.

    chosen (N, k); gates, scores (N, E); counted (N,): how often each token counts, None: once -> (2 E + 1,)
    """
    experts = torch.arange(gates.shape[1], device=gates.device)
    sent = (chosen[:, :, None] == experts).any(1).float()                   # (N, E)
    each = torch.cat((sent, gates, router_z(scores)[:, None]), 1)
    return each.sum(0) if counted is None else (counted[:, None] * each).sum(0)


class Stacked(nn.Module):
    """The matrices of one projection of all experts, (E, out, in)."""

    def __init__(self, num_experts, size_in, size_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size_out, size_in))
        self.bias = nn.Parameter(torch.empty(num_experts, size_out)) if bias else None

    def forward(self, x):
        """All experts' outputs for the same input. (..., in) -> (..., E out)"""
        y = linear(x, self.weight.flatten(0, 1))
        return y if self.bias is None else y + self.bias.flatten().to(y.dtype)

    def grouped(self, x, ends):
        """Each expert's output for its own tokens: see linear.grouped_linear. (M, in) -> (M, out)"""
        return grouped_linear(x, self.weight, ends)


class Experts(nn.Module):
    """The MLPs of the experts. act: the function of their gates (model.activation)."""

    def __init__(self, config, act):
        super().__init__()
        E, h, size = len(config.mixture.experts), config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Stacked(E, h, size), Stacked(E, h, size)
        self.down_proj = Stacked(E, size, h)
        self.num_experts, self.act = E, act

    def forward(self, x, chosen, gates):
        """The sum of each token's experts, times their gates. x (N, h), chosen and gates (N, k) -> (N, h)"""
        k, chosen = chosen.shape[1], chosen.flatten()                       # (N k,)
        order = chosen.argsort(stable=True)                                 # (N k,) those of expert 0 first
        experts = torch.arange(self.num_experts, device=x.device)
        ends = (chosen[:, None] == experts).sum(0).cumsum(0).int()          # (E,)
        h = x.index_select(0, order // k)                                   # (N k, h)
        h = self.act(self.gate_proj.grouped(h, ends)) * self.up_proj.grouped(h, ends)
        h = self.down_proj.grouped(h, ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        y = h.index_select(0, back) * gates.flatten()[:, None].to(h.dtype)
        return y.view(-1, k, y.shape[1]).sum(1) if k > 1 else y


class MixtureMLP(nn.Module):
    """The routed MLPs, and the shared one if there is. mlp: a function that makes a dense MLP."""

    def __init__(self, config, mlp, act):
        super().__init__()
        self.top_k = config.mixture.top_k
        self.router = (NexusRouter if config.mixture.router == "nexus" else LinearRouter)(config)
        self.experts = Experts(config, act)
        self.shared = mlp(config) if config.mixture.shared else None

    def forward(self, x, counted=None, domains=None):
        """x (..., h) -> the same shape, and routing_sums (2 E + 1,).

        counted: how often each token counts in the sums, flat, or None. domains (E, m): of nexus.
        """
        flat = x.flatten(0, -2)
        scores = self.router(flat, domains)                                 # (N, E)
        probs = scores.softmax(-1)
        gates, chosen = probs.topk(self.top_k, -1)                          # (N, k)
        y = self.experts(flat, chosen, gates).view(x.shape)
        y = y if self.shared is None else y + self.shared(x)
        return y, routing_sums(chosen, probs, scores, counted)


class AttentionExperts:
    """What model.Attention does otherwise where it has experts. Their heads stand side by side: the H of the
    first expert, then those of the second. With shared keys the heads that read one key head stand together.
    """

    def set_experts(self, config):
        """Put the experts' projections in place of the dense ones."""
        E, h, bias = len(config.mixture.experts), config.hidden_size, config.family.qkv_bias
        self.own, self.num_experts = config.mixture.attention == "own", E
        self.top_k = config.mixture.attention_top_k or E
        self.q_proj = Stacked(E, h, self.H * self.D, bias)
        if self.own:
            self.k_proj, self.v_proj = (Stacked(E, h, self.K * self.D, bias) for _ in range(2))
        self.o_proj = Stacked(E, self.H * self.D, h)
        self.router = LinearRouter(config)

    def heads(self, x):
        """Queries (..., E H, D), keys and values (..., E K, D) or (..., K, D), normed as in a dense layer."""
        per_key = self.H // self.K
        q = self.q_proj(x).unflatten(-1, (self.num_experts, self.H, self.D))
        k, v = (proj(x).unflatten(-1, (-1, self.K, self.D)) for proj in (self.k_proj, self.v_proj))
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.own:
            q = q.unflatten(-2, (self.K, per_key)).transpose(-4, -3).flatten(-4, -3)
        return q.flatten(-3, -2), k.flatten(-3, -2), v.flatten(-3, -2)

    def output(self, y, x):
        """sum_i g_i W_i y_i of the heads' outputs y (..., E H D) for the input x (..., h)."""
        # One product with the experts' matrices side by side, (h, E H D).
        matrix = self.o_proj.weight.transpose(0, 1).flatten(1)
        return linear(self.weigh(y, self.router(x)).flatten(-2), matrix)

    def weigh(self, y, scores):
        """The heads' outputs y (..., E H D) times the gates of the scores (..., E), 0 outside the top k ->
        (..., E, H D)"""
        gates = scores.softmax(-1)
        if self.top_k < self.num_experts:
            kept, chosen = gates.topk(self.top_k, -1)
            gates = torch.zeros_like(gates).scatter(-1, chosen, kept)
        if self.own:
            y = y.unflatten(-1, (self.num_experts, -1))
        else:
            y = y.unflatten(-1, (self.K, self.num_experts, -1)).transpose(-3, -2).flatten(-2)
        return y * gates.to(y.dtype)[..., None]

    def side_by_side(self):
        """The attributes of a dense attention with the same heads, for the engine. Its output's matrix
        (h, E H D) is that of what `weigh` gives."""
        E, K, D = self.num_experts, self.K, self.D

        def rows(stacked):
            """The rows of all queries (E, H D, ...), as `heads` has them."""
            if self.own:
                return stacked.flatten(0, 1)
            return stacked.unflatten(1, (K, -1)).transpose(0, 1).flatten(0, 2)

        def all_of(projection, rows):
            weight, bias = projection.weight.detach(), projection.bias
            return SimpleNamespace(weight=rows(weight), bias=None if bias is None else rows(bias.detach()))
        of_keys = rows if self.own else lambda weight: weight
        dense = SimpleNamespace(
            H=E * self.H, K=E * K if self.own else K, D=D, has_qk_norm=self.has_qk_norm,
            q_proj=all_of(self.q_proj, rows), k_proj=all_of(self.k_proj, of_keys),
            v_proj=all_of(self.v_proj, of_keys),
            o_proj=SimpleNamespace(weight=self.o_proj.weight.detach().transpose(0, 1).flatten(1), bias=None))
        if self.has_qk_norm:
            q = self.q_norm.weight.detach().expand(self.H, D).repeat(E, 1, 1).flatten(1)        # (E, H D)
            k = self.k_norm.weight.detach().expand(K, D).repeat(E if self.own else 1, 1)
            dense.q_norm = SimpleNamespace(weight=rows(q).view(-1, D))
            dense.k_norm = SimpleNamespace(weight=k)
        return dense
