"""The weights of a plain model as the engine reads them: joined where products read the same input, and on a
CPU in oneDNN's own layout.
"""

import torch
import torch.nn.functional as F

from .families import NORMS
from .linear import packed
from .norms import rms_norm
from .patience import Patience
from .quantized import Packed

# Models of up to this size are kept a second time on the CPU, in oneDNN's layout (linear.packed).
PACK_BYTES = 4e9


def multiplier(weight, pack, bias=None):
    """The function x -> x W^T + bias. pack: with a copy of the weight in oneDNN's layout (linear.packed)."""
    return packed(weight, bias) if pack else lambda x: F.linear(x, weight, bias)


def fuse(projections, dim, pack, order=None):
    """One multiplier for projections that read the same input (dim 0), or whose outputs are added (dim 1).
    Without `pack` the parameters become views of the joined matrix, so that nothing is held twice. Those of
    attention experts do not, because theirs stand in another order: without `pack` they are held twice.

    order: with `pack`, the order in which its outputs stand, as indices of those of the projections.
    Quantized ones stay apart, because their kernels' layouts cannot be joined."""
    if isinstance(projections[0], Packed):
        return side_by_side(projections) if dim == 0 else added(projections)
    joined = torch.cat([p.weight.detach() for p in projections], dim)
    if not pack:
        for p, part in zip(projections, joined.split([p.weight.shape[dim] for p in projections], dim)):
            p.weight.data = part
    biases = [p.bias.detach() for p in projections if p.bias is not None]
    bias = torch.cat(biases) if biases else None
    if order is not None:
        joined, bias = joined[order], bias if bias is None else bias[order]
    return multiplier(joined, pack, bias)


def side_by_side(projections):
    if len(projections) == 1:
        return projections[0].forward
    return lambda x: torch.cat([p.forward(x) for p in projections], 1)


def added(projections):
    """The sum of products whose inputs stand side by side."""
    if len(projections) == 1:
        return projections[0].forward
    sizes = [p.shape[1] for p in projections]
    return lambda x: sum(p.forward(part) for p, part in zip(projections, x.split(sizes, 1)))


def normalizer(config, weight):
    """The function x -> the norm of the config's family with this weight, over the last dimension."""
    eps, D = config.norm_eps, weight.shape[-1]
    if config.family.norm == "layer" and weight.dim() == 1:
        return lambda x: F.layer_norm(x, (D,), weight, None, eps)
    if config.family.norm == "layer":               # one for each head, which torch's function cannot have
        return lambda x: F.layer_norm(x.float(), (D,), eps=eps) * weight.float()
    return rms_normalizer(weight, eps, int(config.family.norm == "rms + 1"))


def rms_normalizer(weight, eps, plus=0):
    """The function x -> the RMS norm with this weight, plus 1 if the family says so, over the last
    dimension."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: rms_norm(x, weight, eps, plus)
    # x w / sqrt(|x|^2 / D + eps) in four passes. F.rms_norm takes twice as many on a CPU, and the time.
    D = weight.shape[-1]
    lengthened, least = (weight + plus) * D ** 0.5, weight.new_tensor((D * eps) ** 0.5)
    return lambda x: (x * lengthened).div_(
        torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least))


class FusedBlock:
    """The weights of a block as the engine reads them: the parallel block has two matmuls, because q, k, v,
    gate and up read the same normed input, and the outputs of o and down are added; others have four.

    Of a mixture of experts: weigh, (heads' outputs, input) -> those times the gates of the attention experts,
    where there are some; routed, its RoutedMLP. Else None."""

    def __init__(self, block, config, pack, domains=None):
        attention, mlp, self.kind = block.self_attn, block.mlp, block.kind
        self.weigh = self.routed = None
        if config.mixture:
            self.routed = RoutedMLP(mlp, domains, pack)
        if config.mixture and config.mixture.attention:
            experts, scores = attention, multiplier(attention.router.weight.detach().float(), pack)
            attention = experts.side_by_side()
            self.weigh = lambda y, h: experts.weigh(y, scores(h.float())).flatten(1)
        H, K, D = attention.H, attention.K, attention.D
        self.norms = [normalizer(config, getattr(block, name).weight.detach()) for name in NORMS[self.kind]]
        order = torch.arange((H + 2 * K) * D, device=attention.q_proj.weight.device).view(-1, D)
        if has_pairs(config, pack) and not config.family.interleaved:
            # A number of the first half of a query or key, then the one D/2 behind it, then the next.
            order[:H + K] = order[:H + K].unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        self.qk_norm = None
        if attention.has_qk_norm:
            weights = [norm.weight.detach().expand(num, D) for norm, num in
                       ((attention.q_norm, H), (attention.k_norm, K))]
            self.qk_norm = normalizer(config, torch.cat(weights)[:, order[0]])          # (H + K, D)
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        if self.routed:
            self.qkv = fuse(qkv, 0, pack, order.flatten() if pack else None)
            self.o = fuse([attention.o_proj], 1, pack)
        elif self.kind == "parallel":
            self.project_in = fuse([*qkv, mlp.gate_proj, mlp.up_proj], 0, pack)
            self.project_out = fuse([attention.o_proj, mlp.down_proj], 1, pack)
        else:
            self.qkv = fuse(qkv, 0, pack, order.flatten() if pack else None)
            self.gate_up = fuse([mlp.gate_proj, mlp.up_proj], 0, pack)
            self.o, self.down = fuse([attention.o_proj], 1, pack), fuse([mlp.down_proj], 1, pack)


class RoutedMLP:
    """The MLPs of a mixture as the engine reads them. With `pack` each expert's products are its own, so that
    a token's bits do not depend on how many tokens it shares an expert with."""

    def __init__(self, mlp, domains, pack):
        router, self.mlp, self.top_k, self.act = mlp.router, mlp, mlp.top_k, mlp.experts.act
        vectors = router.weight if domains is None else router.embeddings(domains)      # (E, h)
        self.scores, self.experts = multiplier(vectors.detach().float(), pack), None
        if pack:
            of_all = (getattr(mlp.experts, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))
            self.experts = [(packed(torch.cat((gate, up))), packed(down)) for gate, up, down in zip(*of_all)]
        shared = mlp.shared
        self.shared = shared and (fuse([shared.gate_proj, shared.up_proj], 0, pack),
                                  fuse([shared.down_proj], 1, pack))

    def __call__(self, x):
        """(N, h) -> (N, h)"""
        gates, chosen = self.scores(x.float()).softmax(-1).topk(self.top_k, -1)         # (N, k)
        y = self.mlp.experts(x, chosen, gates) if self.experts is None else self.by_expert(x, chosen, gates)
        return y + self.product(x, *self.shared) if self.shared else y

    def by_expert(self, x, chosen, gates):
        """What moe.Experts computes, with few operations for few tokens."""
        gates, groups = gates.to(x.dtype), {}
        for place, i in enumerate(chosen.flatten().tolist()):
            groups.setdefault(i, []).append(place)
        if len(groups) == self.top_k == 1:
            return self.product(x, *self.experts[i]).mul_(gates)
        order = torch.tensor(sum(groups.values(), []))                      # (N k,) places by expert
        parts = x[order // self.top_k].split([len(places) for places in groups.values()])
        y = torch.cat([self.product(part, *self.experts[i]) for i, part in zip(groups, parts)])
        y = torch.empty_like(y).index_copy_(0, order, y).view(len(x), self.top_k, -1)
        return y.mul_(gates[:, :, None]).sum(1)

    def product(self, x, gate_up, down):
        gate, up = gate_up(x).chunk(2, -1)
        return down(self.act(gate).mul_(up))


def has_pairs(config, pack):
    """Whether the engine has neighbours as rotary pairs: where the family has, and where weights are copied
    anyhow, with the rows of queries and keys in that order. Scores do not depend on the order within a head,
    and complex numbers turn neighbours in place."""
    return config.family.interleaved or pack


class Fused:
    """The weights of a plain model as the engine reads them. It can serve many calls, but must be made again
    when the weights have changed.
    """

    def __init__(self, model):
        parameters, packed = list(model.parameters()), getattr(model, "packed", {})
        self.config, self.device, self.dtype = model.config, parameters[0].device, parameters[0].dtype
        pack = can_pack(self.device, self.dtype, sum(p.nbytes for p in parameters)) and not packed
        self.patience = Patience(self.device)
        self.pairs = has_pairs(self.config, pack)
        domains = getattr(model.model, "domains", None)         # of a mixture of experts
        self.layers = [FusedBlock(block, self.config, pack, domains) for block in model.model.layers]
        self.embed = model.model.embed_tokens.forward
        self.norm = normalizer(self.config, model.model.norm.weight.detach())
        if "lm_head" in packed:
            self.head = model.lm_head.forward
        else:
            head = model.head_weight.detach()
            can = can_pack(self.device, self.dtype, head.nbytes)
            self.head = multiplier(head, pack or bool(packed) and can)


def can_pack(device, dtype, nbytes):
    """Whether weights of this size are kept a second time, in oneDNN's layout."""
    if device.type != "cpu" or nbytes > PACK_BYTES or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
