"""Mixtures of experts: the layers against a slow reference and against the dense model, their config, and
that however a step is cut or computed its loss, gradient and balance losses are the same."""

import json

import pytest
import torch
from small import CPU, assert_close, language_model, logged, on_ranks, run, tokenizer

from aya_min import linear, model_config, weights
from aya_min.families import FAMILIES
from aya_min.losses import load_balance, router_z, sft_loss
from aya_min.model import CohereForCausalLM, init_weights
from aya_min.model_config import Mixture, ModelConfig

NAMES = ["law", "code", "maths"]
NEXUS = dict(router="nexus", domain_size=5)
KINDS = {"btx": dict(), "top 2": dict(top_k=2), "nexus": dict(shared=True, **NEXUS),
         "bam own": dict(attention="own"), "bam shared": dict(attention="shared", shared=True),
         "bam top 2": dict(attention="own", attention_top_k=2, top_k=2)}


def mixture_model(seed=0, names=NAMES, changes={}, **kind):
    return language_model(seed, mixture=dict(experts=names, **kind), **changes)


def rows(model, seed=0, B=3, T=12):
    """ids (B, T), the mask of supervised tokens, and lengths."""
    ids = torch.randint(5, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([T, T - 5, T - 3])
    mask = torch.arange(T) < lengths[:, None]
    mask[:, 0] = False
    return ids, mask, lengths


# ---- a slow reference --------------------------------------------------------------------------------------

def slow_mlp(mlp, x, domains, top_k):
    """Token by token, expert by expert. x (N, h)"""
    if domains is None:
        vectors = mlp.router.weight
    else:
        both = domains @ mlp.router.w1.weight.T
        h = both.shape[1] // 2
        vectors = (torch.nn.functional.silu(both[:, :h]) * both[:, h:]) @ mlp.router.w2.weight.T
    out = []
    for token in x:
        probs = torch.softmax(torch.stack([token @ vector for vector in vectors]), 0)
        y = 0
        for i in probs.argsort(descending=True)[:top_k].tolist():
            gate, up, down = (getattr(mlp.experts, f"{name}_proj").weight[i] for name in ("gate", "up", "down"))
            y = y + probs[i] * (down @ (torch.nn.functional.silu(gate @ token) * (up @ token)))
        if mlp.shared is not None:
            y = y + mlp.shared(token)
        out.append(y)
    return torch.stack(out)


def slow_attention(attention, x, cos, sin, top_k, config):
    """Expert by expert, as dense attentions. x (B, T, h)"""
    dense = language_model().model.layers[0].self_attn
    gates = torch.softmax(x @ attention.router.weight.T, -1)
    total = 0
    for i in range(len(config.mixture.experts)):
        weights = {f"{name}.weight": weight[i] if weight.dim() == 3 else weight for name in
                   ("q_proj", "k_proj", "v_proj", "o_proj")
                   for weight in [getattr(attention, name).weight]}
        y = torch.func.functional_call(dense, weights, (x, cos, sin))
        rank = (gates > gates[..., i:i + 1]).sum(-1)
        total = total + (gates[..., i] * (rank < top_k))[..., None] * y
    return total


@pytest.mark.parametrize("library", linear.LIBRARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_and_its_gradients_are_those_of_a_slow_reference(kind, library):
    model, before = mixture_model(**KINDS[kind]), linear.chosen()
    block, config = model.model.layers[0], model.config
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    from aya_min.rope import rotary
    cos, sin = rotary(config, torch.arange(7)[None], "rope_theta")
    domains = getattr(model.model, "domains", None)
    linear.choose(library)
    try:
        y, sums = block(x, None, domains, cos, sin)
        parameters = [x, *block.parameters()]
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        ours = torch.autograd.grad((y * weight).sum(), parameters, retain_graph=True)
    finally:
        linear.choose(before)
    h = block.input_layernorm(x)
    mixture = config.mixture
    attended = slow_attention(block.self_attn, h, cos, sin, mixture.attention_top_k or 3, config) \
        if mixture.attention else block.self_attn(h, cos, sin)
    slow = x + attended + slow_mlp(block.mlp, h.flatten(0, 1), domains, mixture.top_k).view(x.shape)
    torch.testing.assert_close(y, slow, atol=1e-5, rtol=1e-5)
    for one, two in zip(ours, torch.autograd.grad((slow * weight).sum(), parameters)):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert sums.shape == (7,) and sums[:3].sum() == 14 * mixture.top_k
    torch.testing.assert_close(sums[3:6].sum(), torch.tensor(14.0))


# ---- what it is made of ------------------------------------------------------------------------------------

def upcycled(dense, names=NAMES, seed=1, **kind):
    """A mixture whose experts are all the dense model, the routers random."""
    config = ModelConfig.from_published({**dense.config.published(), "mixture": dict(experts=names, **kind)})
    model = init_weights(CohereForCausalLM(config), torch.Generator().manual_seed(seed))
    state, own = model.state_dict(), dense.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            source = own.get(name.replace("mlp.experts.", "mlp.").replace("mlp.shared.", "mlp."))
            if source is not None:
                tensor.copy_(source)                # of all experts where it is stacked
    return model


def loss_and_gradients(model, seed=3):
    """The summed log-probs of some rows, and {name: gradient}, those of experts summed as their dense one's."""
    ids, mask, lengths = rows(model, seed)
    loss = -model(ids, mask, lengths).sum()
    loss.backward()
    found = {}
    for name, p in model.named_parameters():
        if "router" not in name:
            name = name.replace("mlp.experts.", "mlp.").replace("mlp.shared.", "mlp.")
            extra = p.dim() - dict(dense_shapes(model))[name]
            gradient = p.grad.sum(0) if extra else p.grad
            found[name] = found.get(name, 0) + gradient
        p.grad = None
    return loss.detach(), found


def dense_shapes(model):
    config = ModelConfig.from_published({**model.config.published(), "mixture": None,
                                         "model_type": model.config.model_type})
    with torch.device("meta"):
        return {name: p.dim() for name, p in CohereForCausalLM(config).named_parameters()}


FAMILY = {"cohere": dict(), "cohere with norms": dict(use_qk_norm=True),
          "cohere2": dict(model_type="cohere2", sliding_window=4, num_hidden_layers=4),
          "qwen2": dict(model_type="qwen2"), "qwen3": dict(model_type="qwen3", head_dim=8),
          "gemma2": dict(model_type="gemma2", head_dim=8, sliding_window=4)}
ALL_OF_THEM = [("cohere", dict(top_k=3)), ("cohere", dict(top_k=3, **NEXUS)),
               *((family, dict(top_k=3, attention=kv)) for family in FAMILY for kv in ("own", "shared"))]


@pytest.mark.parametrize("family, kind", ALL_OF_THEM, ids=str)
def test_where_all_of_n_identical_experts_are_used_the_mixture_is_the_dense_model(family, kind):
    """The gates of all experts add up to 1. Those of fewer do not, see below."""
    dense = language_model(**FAMILY[family])
    torch.nn.init.normal_(dense.model.layers[0].input_layernorm.weight, std=0.2)
    if family == "qwen2":
        torch.nn.init.normal_(dense.model.layers[0].self_attn.k_proj.bias)
    loss, gradients = loss_and_gradients(dense)
    mixed, of_mixed = loss_and_gradients(upcycled(dense, **kind))
    torch.testing.assert_close(mixed, loss)
    assert of_mixed.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(of_mixed[name], gradients[name], atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("kind", [dict(), NEXUS, dict(attention="own"), dict(attention="shared")], ids=str)
def test_one_expert_is_the_dense_model(kind):
    dense = language_model()
    loss, gradients = loss_and_gradients(dense)
    mixed, of_mixed = loss_and_gradients(upcycled(dense, ["law"], **kind))
    torch.testing.assert_close(mixed, loss)
    for name in gradients:
        torch.testing.assert_close(of_mixed[name], gradients[name], atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("router", [dict(), NEXUS], ids=["linear", "nexus"])
def test_the_top_k_of_identical_experts_count_as_much_as_their_gates_and_the_shared_one_once(router):
    """y = shared(x) + (sum of the top k gates) MLP(x): neither paper normalises the gates again, so that a
    mixture fresh from identical experts is not the dense model where some are left out or one is shared."""
    dense = language_model()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for k, shared in ((1, False), (2, False), (1, True), (3, True)):
        model = upcycled(dense, top_k=k, shared=shared, **router).model
        mlp, domains = model.layers[0].mlp, getattr(model, "domains", None)
        top = mlp.router(x, domains).softmax(-1).topk(k).values.sum(-1, keepdim=True)
        expected = (shared + top) * dense.model.layers[0].mlp(x)
        torch.testing.assert_close(mlp(x, None, domains)[0], expected, atol=1e-5, rtol=1e-5)


def test_soft_attention_with_the_gate_of_one_expert_is_that_expert_and_top_1_its_gate_times_it():
    model = mixture_model(attention="own", changes=dict(num_hidden_layers=1))
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    dense = language_model().model.layers[0].self_attn
    experts = [torch.func.functional_call(dense, {
        f"{name}_proj.weight": getattr(attention, f"{name}_proj").weight[i] for name in "qkvo"}, (x,))
        for i in range(3)]
    attention.router.forward = lambda x, domains=None: torch.tensor([-1e9, 0.0, -1e9]).expand(*x.shape[:-1], 3)
    torch.testing.assert_close(attention(x), experts[1])
    attention.router.forward = lambda x, domains=None: torch.tensor([1.0, 0.0, 2.0]).expand(*x.shape[:-1], 3)
    gates = torch.tensor([1.0, 0.0, 2.0]).softmax(0)
    torch.testing.assert_close(attention(x), sum(g * y for g, y in zip(gates, experts)), atol=1e-5, rtol=1e-5)
    attention.top_k = 1
    torch.testing.assert_close(attention(x), gates[2] * experts[2], atol=1e-5, rtol=1e-5)


def test_shared_keys_of_equal_experts_are_own_keys():
    """Queries and outputs differ by expert, keys and values are equal."""
    shared, own = mixture_model(attention="shared"), mixture_model(attention="own")
    with torch.no_grad():
        own.load_state_dict({name: tensor.expand_as(own.state_dict()[name])
                             for name, tensor in shared.state_dict().items()})
    ids, mask, lengths = rows(own)
    one, two = own(ids, mask, lengths), shared(ids, mask, lengths)
    torch.testing.assert_close(one, two)
    one, two = (dict(zip(dict(m.named_parameters()), torch.autograd.grad(y.sum(), list(m.parameters()))))
                for m, y in ((own, one), (shared, two)))
    for name in one:
        summed = one[name].sum(0) if one[name].dim() > two[name].dim() else one[name]
        torch.testing.assert_close(summed, two[name], atol=1e-4, rtol=1e-4, msg=name)


# ---- packed, padded, recomputed ----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_with_a_shared_prefix_have_the_log_probs_gradients_and_routing_of_padded_ones(kind):
    """A token that stands in two rows is computed once and counts twice; padding does not count."""
    model = mixture_model(**KINDS[kind])
    ids, mask, lengths = rows(model)
    ids[1, :4] = ids[0, :4]
    repeats = torch.tensor([[0, 0, 2], [0, 4, 0]])
    mask[1, :4] = False
    found = []
    for packing, again in ((False, None), (True, None), (True, repeats)):
        model.model.packing = packing
        logps = model(ids, mask, lengths, again)
        routing = model.model.routing
        gradients = torch.autograd.grad(logps.sum() + routing.square().sum() / 1e3, [
            p for p in model.parameters()])
        found.append((logps, routing, gradients))
    for logps, routing, gradients in found[1:]:
        torch.testing.assert_close(logps, found[0][0])
        torch.testing.assert_close(routing, found[0][1])
        for one, two in zip(gradients, found[0][2]):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    top_k = model.config.mixture.top_k
    assert found[0][1][:, :3].sum(1).tolist() == [lengths.sum() * top_k] * 2


# ---- the losses --------------------------------------------------------------------------------------------

def test_the_balance_loss_is_1_where_all_is_even_and_n_where_all_goes_to_one_expert():
    even = torch.full((4,), 0.25)
    assert load_balance(even, even) == 1 and load_balance(torch.eye(4)[0], torch.eye(4)[0]) == 4
    assert load_balance(torch.tensor([0.5, 0.5, 0]), torch.tensor([0.2, 0.3, 0.5])) == pytest.approx(0.75)


def test_the_z_loss_is_the_square_of_logsumexp():
    assert router_z(torch.zeros(2, 4)).tolist() == pytest.approx([1.921812] * 2)       # (ln 4)^2


AUXILIARY = dict(balance_weight=0.5, router_z_weight=0.05, max_steps=2)
CUT = [("sft", "nexus"), ("pretrain", "bam top 2"), ("dpo", "top 2")]


@pytest.fixture(scope="module", autouse=True)
def every_stage():
    from small import EVERY, STAGES
    STAGES.update(EVERY)
    yield
    STAGES.pop("pretrain")


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """(stage, kind) -> the rows of two steps by one rank, each batch of 8 at once."""
    folder, found = tmp_path_factory.mktemp("plain"), {}

    def of(stage, kind):
        if (stage, kind) not in found:
            found[stage, kind] = logged(trained(stage, kind, world, folder / stage / kind))
        return found[stage, kind]
    return of


def trained(stage, kind, world, out, **changes):
    architecture = dict(mixture=dict(experts=NAMES, **KINDS[kind]))
    return run(stage, world, out, architecture=architecture, **{**AUXILIARY, **changes})


def test_the_losses_are_those_of_the_equations_worked_out_from_the_routers(world, tmp_path):
    one, two = (logged(trained("sft", "nexus", world, tmp_path / str(w), balance_weight=w, router_z_weight=z,
                               max_steps=1))[0] for w, z in ((0.0, 0.0), (0.5, 0.25)))
    assert two["loss"] - one["loss"] == pytest.approx(
        0.5 * two["balance_loss"] + 0.25 * two["router_z_loss"], rel=1e-4)
    assert one["balance_loss"] == two["balance_loss"] > 1.9 and two["router_z_loss"] > 0
    assert 1 / 3 < two["expert_share/largest"] < 1 and 0 <= two["expert_share/smallest"] < 1 / 3
    assert one["grad_norm"] != two["grad_norm"]


@pytest.mark.parametrize("stage, kind", CUT)
@pytest.mark.parametrize("changes", [dict(micro_batch_size=1), dict(micro_batch_size=4),
                                     dict(activation_checkpointing=1, packing=True), dict(packing=False)],
                         ids=str)
def test_however_a_step_is_cut_or_computed_it_has_the_same_loss_norm_and_balance(
        stage, kind, changes, world, plain, tmp_path):
    assert_close(plain(stage, kind), logged(trained(stage, kind, world, tmp_path / "run", **changes)),
                 rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("stage, kind, changes", [("sft", "nexus", dict()),
                                                  ("pretrain", "bam top 2", dict(micro_batch_size=2)),
                                                  ("sft", "nexus", dict(replicate=2, micro_batch_size=2))])
def test_two_ranks_have_the_loss_norm_balance_and_weights_of_one(stage, kind, changes, world, plain, tmp_path):
    """Three experts do not divide over two ranks: their matrices are cut along dimension 1."""
    on_ranks(2, lambda: trained(stage, kind, world, tmp_path / "run", **changes) and None)
    assert_close(plain(stage, kind), logged(tmp_path / "run"), rtol=2e-4, atol=2e-5)
    one, _ = weights.load(trained(stage, kind, world, tmp_path / "one") / "model")
    two, _ = weights.load(tmp_path / "run" / "model")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=0, atol=5e-5, msg=name)
