"""Mixtures of experts: the layers against a slow reference and against the dense model, their config, and
that however a step is cut or computed its loss, gradient and balance losses are the same."""

import json
import shutil
import sys

import pytest
import torch
import train
from safetensors.torch import load_file, save_file
from small import (assert_close, language_model, loaded_sharded, logged, on_ranks, run, state_of,
                   tokenizer)
from torch._inductor import config as inductor
from torch.utils.flop_counter import FlopCounterMode

from aya_min import estimate, fused, linear, weights
from aya_min.config import SFT
from aya_min.engine import Engine
from aya_min.fused import Fused
from aya_min.flops import training_flops
from aya_min.loop import make_optimizer
from aya_min.losses import load_balance, router_z
from aya_min.model import CohereForCausalLM, RewardModel, init_weights
from aya_min.model_config import ModelConfig
from aya_min.rope import rotary
from aya_min.sampling import generate

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
            gate, up, down = (getattr(mlp.experts, f"{name}_proj").weight[i]
                              for name in ("gate", "up", "down"))
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
    """The summed log-probs of some rows, and {name: gradient}, those of experts added up."""
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
    attention.router.forward = lambda x: torch.tensor([-1e9, 0.0, -1e9]).expand(*x.shape[:-1], 3)
    torch.testing.assert_close(attention(x), experts[1])
    attention.router.forward = lambda x: torch.tensor([1.0, 0.0, 2.0]).expand(*x.shape[:-1], 3)
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
CUT = [("sft", "nexus"), ("pretrain", "bam top 2"), ("dpo", "top 2"), ("kto", "bam shared"), ("rl", "btx"),
       ("reward", "nexus"), ("router", "btx")]


pytestmark = pytest.mark.usefixtures("every_stage")


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
@pytest.mark.parametrize("changes", [dict(micro_batch_size=2),
                                     dict(activation_checkpointing=1, packing=False)], ids=str)
def test_however_a_step_is_cut_or_computed_it_has_the_same_loss_norm_and_balance(
        stage, kind, changes, world, plain, tmp_path):
    assert_close(plain(stage, kind), logged(trained(stage, kind, world, tmp_path / "run", **changes)),
                 rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("stage, kind, changes", [("sft", "nexus", dict()),
                                                  ("pretrain", "bam top 2", dict(micro_batch_size=2)),
                                                  ("sft", "nexus", dict(replicate=2, micro_batch_size=2))])
def test_two_ranks_have_the_loss_norm_balance_and_weights_of_one(
        stage, kind, changes, world, plain, tmp_path):
    """Three experts do not divide over two ranks: their matrices are cut along dimension 1."""
    on_ranks(2, lambda: trained(stage, kind, world, tmp_path / "run", **changes) and None)
    assert_close(plain(stage, kind), logged(tmp_path / "run"), rtol=2e-4, atol=2e-5)
    one, _ = weights.load(trained(stage, kind, world, tmp_path / "one") / "model")
    two, _ = weights.load(tmp_path / "run" / "model")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=0, atol=5e-5, msg=name)


@pytest.mark.parametrize("names", [NAMES, [*NAMES, "news"]], ids=["cut by rows", "cut by experts"])
def test_each_of_two_ranks_reads_and_holds_its_part_of_the_experts(names, tmp_path):
    model = mixture_model(names=names, shared=True, **NEXUS)
    for found in on_ranks(2, lambda: loaded_sharded(model, tmp_path / "model")):
        assert found["differ"] == found["not finite"] == []
        domains = 5 * len(names)                                    # whole on each rank
        held = [held - domains for held, _ in found["held and read"]]
        assert sum(held) + domains == found["all"] and min(held) > 0.48 * sum(held)
        assert all(held == read for held, read in found["held and read"])


def test_a_resumed_run_is_the_run_to_the_last_bit(world, tmp_path):
    more = dict(schedule="constant", micro_batch_size=4, save_every=1, warmup_steps=0)
    whole = trained("sft", "nexus", world, tmp_path / "whole", max_steps=3, **more)
    trained("sft", "nexus", world, tmp_path / "run", max_steps=1, **more)
    resumed = trained("sft", "nexus", world, tmp_path / "run", max_steps=3, resume=True, **more)
    assert logged(whole) == logged(resumed)
    one, two = state_of(whole), state_of(resumed)
    assert "model.domains" in one and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize("kind", ["nexus", "bam own"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 0.05)])
def test_compiled_blocks_have_the_loss_norm_and_balance_of_eager_ones(
        dtype, tolerance, kind, world, tmp_path):
    with inductor.patch(compile_threads=1):
        eager, compiled = (logged(trained("sft", kind, world, tmp_path / str(on), compile=on, max_steps=1,
                                          dtype=dtype)) for on in (False, True))
    assert_close(eager, compiled, rtol=tolerance, atol=tolerance / 10)


def test_in_bf16_a_step_has_about_the_loss_of_fp32(world, plain, tmp_path):
    half = logged(trained("sft", "nexus", world, tmp_path / "run", dtype="bfloat16"))
    assert half[0]["loss"] == pytest.approx(plain("sft", "nexus")[0]["loss"], rel=0.02)
    assert half[0]["loss"] != plain("sft", "nexus")[0]["loss"]


def test_the_biases_of_stacked_experts_decay_no_more_than_a_dense_layers():
    model = mixture_model(attention="own", changes=dict(model_type="qwen2"))
    decayed, others = (group["params"] for group in make_optimizer(model, SFT(weight_decay=0.1)).param_groups)
    names = {p: name for name, p in model.named_parameters()}
    assert not [names[p] for p in decayed if "bias" in names[p]] and len(decayed) + len(others) == len(names)
    assert sum("bias" in names[p] for p in others) == 2 * 3


# ---- config and folder -------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, said", [
    (dict(experts=[]), "experts .* list of names"),
    (dict(experts=["law", "law"]), "experts .'law', 'law'. .*each once"),
    (dict(experts=["law", 3]), "experts"), (dict(router="random"), "router 'random' .*\"linear\" \"nexus\""),
    (dict(top_k=4), "top_k 4 .*at least 1 and at most 3; there are 3 experts"), (dict(top_k=0), "top_k 0"),
    (dict(top_k=True), "top_k True"), (dict(shared=1), "shared 1 must be one of true false"),
    (dict(attention="all"), "attention 'all' .*null \"own\" \"shared\""),
    (dict(attention="own", attention_top_k=4), "attention_top_k 4"),
    (dict(attention_top_k=1), "attention_top_k 1 goes with attention"),
    (dict(router="nexus"), "domain_size None"),
    (dict(domain_size=4), "domain_size 4 goes with router nexus, not linear"), (dict(k=2), "unknown key k")])
def test_a_wrong_mixture_is_refused_by_field_value_and_range(wrong, said):
    raw = {**language_model().config.published(), "mixture": {"experts": NAMES, **wrong}}
    with pytest.raises(ValueError, match=f"config.json: mixture: {said}"):
        ModelConfig.from_published(raw)


@pytest.mark.parametrize("raw, said", [([], "mixture \\[\\] must be an object"),
                                       ({}, "experts, the list of their names, is missing")])
def test_a_mixture_that_is_no_object_or_names_no_experts_is_refused(raw, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig.from_published({**language_model().config.published(), "mixture": raw})


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_survives_publishing_and_reading(kind, tmp_path):
    """The model_type is not the seed's: by that transformers would load a dense model with random MLPs."""
    model = mixture_model(**KINDS[kind])
    weights.save(tmp_path / "model", model, tokenizer())
    published = json.loads((tmp_path / "model" / "config.json").read_text())
    assert published["architectures"] == ["MixtureForCausalLM"]
    assert published["model_type"] == "mixture_of_cohere"
    loaded, _ = weights.load(tmp_path / "model")
    assert loaded.config == model.config
    ids, mask, lengths = rows(model)
    assert torch.equal(loaded(ids, mask, lengths), model(ids, mask, lengths))
    reward, _ = weights.load(tmp_path / "model", trunk=True)
    weights.save(tmp_path / "reward", reward, tokenizer())
    assert isinstance(weights.load(tmp_path / "reward")[0], RewardModel)


def test_a_mixtures_folder_says_which_tensor_does_not_fit_and_a_dense_class_does_not_read_it(tmp_path):
    folder = tmp_path / "model"
    weights.save(folder, mixture_model(shared=True, **NEXUS), tokenizer())
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    gate, w1 = (f"model.layers.0.mlp.{name}.weight" for name in ("experts.gate_proj", "router.w1"))
    cases = [({**tensors, gate: tensors[gate][:2]}, {}, f"{gate} has shape .2, 64, 32., .*.3, 64, 32."),
             ({k: v for k, v in tensors.items() if k != w1}, {}, f"{w1} is missing"),
             ({k: v for k, v in tensors.items() if k != "model.domains"}, {}, "model.domains is missing"),
             (tensors, dict(architectures=["CohereForCausalLM"]), "does not go with the key mixture"),
             (tensors, dict(mixture=None, model_type="cohere"), "without the key mixture"),
             (tensors, dict(mixture=None), "mixture_of_cohere")]
    for changed, keys, said in cases:
        save_file({k: v.contiguous() for k, v in changed.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **keys}))
        with pytest.raises(ValueError, match=said):
            weights.load(folder)


@pytest.mark.parametrize("flag", ["--balance-weight", "--router-z-weight"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_a_weight_of_a_mixtures_loss_is_refused_for_a_dense_model(flag, more, world, tmp_path, monkeypatch,
                                                                  capsys):
    weights.save(tmp_path / "model", language_model(), tokenizer())
    monkeypatch.setattr(sys, "argv", ["train.py", "sft", "--model", str(tmp_path / "model"), "--data",
                                      str(world / "sft.jsonl"), "--out", str(tmp_path / "run"), flag, "0.1",
                                      *more])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert f"{flag} 0.1: this model is dense" in capsys.readouterr().err


# ---- the engine --------------------------------------------------------------------------------------------

OF_FAMILIES = [("cohere", kind) for kind in KINDS]
OF_FAMILIES += [(family, f"bam {kv}") for family in FAMILY if family != "cohere" for kv in ("own", "shared")]


@pytest.mark.parametrize("family, kind", OF_FAMILIES)
def test_the_engine_says_what_the_model_says_without_a_cache_alone_and_beside_other_rows(family, kind):
    """And to the last bit the same in any batch."""
    model = mixture_model(changes=FAMILY[family], **KINDS[kind])
    if model.config.has_qk_norm:
        for attention in (block.self_attn for block in model.model.layers):
            torch.nn.init.normal_(attention.q_norm.weight, generator=torch.Generator().manual_seed(4))
    ids, _, _ = rows(model)
    prompts = [ids[0, :9].tolist(), ids[1, :3].tolist(), ids[2].tolist()]
    together = generate(model, prompts, max_new_tokens=12, temperature=0, batch_size=3)
    for prompt, [answer] in zip(prompts, together):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer.ids])).log_softmax(-1)[0, len(prompt) - 1:-1]
        assert logps.argmax(-1).tolist() == answer.ids
        assert logps.amax(-1).sum().item() == pytest.approx(answer.logp, abs=2e-4)
        [[alone]] = generate(model, [prompt], max_new_tokens=12, temperature=0)
        assert alone.ids == answer.ids and alone.logp == answer.logp


def test_the_cache_holds_the_keys_of_all_own_attention_experts_and_shared_ones_once():
    for kv, num in (("own", 3 * 2), ("shared", 2)):
        engine = Engine(Fused(mixture_model(attention=kv)), 2, 32, 8, 0)
        assert [tuple(keys.shape) for keys, _ in engine.cache] == [(2, num, 32, 8)] * 2


@pytest.mark.parametrize("kind", ["nexus", "bam shared"])
def test_without_weights_packed_as_on_a_gpu_the_engine_says_the_same(kind, monkeypatch):
    model = mixture_model(**KINDS[kind])
    prompt = rows(model)[0][0].tolist()
    with torch.no_grad():
        exact = model(torch.tensor([prompt]))[0, -1]
    monkeypatch.setattr(fused, "can_pack", lambda device, dtype, nbytes: False)
    logits, _ = Engine(Fused(model), 1, 32, 8, 0).prefill([prompt])
    torch.testing.assert_close(logits[0], exact, atol=1e-4, rtol=1e-4)


# ---- what it costs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_are_those_that_torch_counts(kind):
    """Every layer's, without attention's scores, which torch counts over all pairs, and Nexus' projection."""
    def of_groups(x, w, *_, **more):
        """2 for each number of each row's matrix; of the weight's gradient (x and w flat) the same."""
        return 2 * x[0] * x[1] * w[-1]

    model = mixture_model(**KINDS[kind]).bfloat16()         # in fp32 products may be oneDNN's, not counted
    ids = torch.ones(2, 129, dtype=torch.int64)
    mask = torch.arange(129).expand(2, 129) > 0
    mapping = {torch.ops.aten._grouped_mm: of_groups}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(ids, mask).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    of_attention = 12 * 8 * model.config.num_heads[0] * 2 * 2 * 129 * 130 // 2
    once = 2 * 6 * 3 * 32 * (2 * 5 + 32) if kind == "nexus" else 0
    assert counted == pytest.approx(
        training_flops(model.config, [129, 129], 256) - of_attention + once, rel=0.02)


def test_the_dry_run_counts_total_and_active_parameters_and_the_kv_cache_of_all_attention_experts():
    def told(**kind):
        settings = SFT(batch_size=4, max_length=32)
        # of one rank: torch remembers a mesh's coordinates, and ranks that are forked later would take them
        return estimate.dry_run("sft", "M", mixture_model(**kind).to("meta"), settings, None, None, None, 1)
    dense = sum(p.numel() for p in language_model().parameters())
    mlps, routers = 2 * 3 * 32 * 64, 2 * 3 * 32
    assert f"{dense + 2 * mlps + routers:,} parameters, {dense + routers:,} of them active" in told()
    assert f"{dense + 2 * mlps + routers:,} parameters on 1 ranks" in told(top_k=3)
    assert [mixture_model(attention=kv).config.num_heads for kv in ("own", "shared")] == [(12, 6), (12, 2)]
