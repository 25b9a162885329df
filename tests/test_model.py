"""The decoder against a slow reference written from the description of the two architectures: numpy, fp64,
one head at a time,
rotary embedding as multiplication by complex numbers. It shares no code and no tensor layout trick with the
model.
"""

import inspect
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F

from aya_min.model_config import ModelConfig, model_preset
from aya_min.token_logps import sum_by_row
from aya_min.model import CohereForCausalLM, Line, RewardModel, init_weights, rotary

SMALL = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    logit_scale=0.5,
    rope_theta=100.0,
    initializer_range=0.3,
)
COHERE2 = dict(model_type="cohere2", sliding_window=5, layer_types=["sliding_attention", "full_attention"])
VARIANTS = {
    "grouped heads": {},
    "as many key-value heads as heads": dict(num_key_value_heads=4),
    "one key-value head": dict(num_key_value_heads=1),
    "query-key norm": dict(use_qk_norm=True),
    "untied head": dict(tie_word_embeddings=False),
    "a head width of its own": dict(head_dim=10),
    "sliding and full layers": dict(model_type="cohere2", sliding_window=5, sliding_window_pattern=2),
    "full and sliding layers": dict(
        model_type="cohere2",
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    ),
    "a window that is never reached": dict(
        model_type="cohere2", sliding_window=17, sliding_window_pattern=2, num_key_value_heads=4
    ),
    "everything": dict(
        use_qk_norm=True, tie_word_embeddings=False, head_dim=10, logit_scale=0.0625, layer_norm_eps=1e-3
    ),
}


def build(model_class=CohereForCausalLM, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(model_class(ModelConfig(**{**SMALL, **changes})), generator)
    with torch.no_grad():  # norms that are all ones would hide a forgotten weight
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
    return model


def tokens(*shape, seed=1):
    return torch.randint(SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# ---- against the reference ---------------------------------------------------------------------------------

def layer_norm(x, weight, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + eps) * weight


def reference_logits(model, ids):
    """ids (T,) of one sequence -> logits (T, V)."""
    c, W = model.config, {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    T, H, K, D = len(ids), c.num_attention_heads, c.num_key_value_heads, c.head_dim
    turn = np.exp(
        1j * np.outer(np.arange(T), c.rope_theta ** (-2 * np.arange(D // 2) / D))
    )  # (T, D/2) unit complex numbers
    x = W["model.embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        w = lambda name: W[f"model.layers.{i}.{name}.weight"]
        h = layer_norm(x, w("input_layernorm"), c.layer_norm_eps)
        q, k, v = ((h @ w(f"self_attn.{name}_proj").T).reshape(T, -1, D) for name in "qkv")
        if c.use_qk_norm:
            q, k = layer_norm(q, w("self_attn.q_norm"), c.layer_norm_eps), layer_norm(
                k, w("self_attn.k_norm"), c.layer_norm_eps
            )
        heads = []
        for head in range(H):
            group = head // (H // K)  # consecutive heads share keys and values
            zq, zk = (
                (z[:, n, 0::2] + 1j * z[:, n, 1::2]) * (turn if c.rope(i) else 1)
                for z, n in ((q, head), (k, group))
            )  # neighbours are one number
            scores = (zq @ zk.conj().T).real / np.sqrt(D)
            for place in range(T):
                scores[place, place + 1:] = -np.inf
                scores[place, :max(0, place + 1 - (c.window(i) or T))] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, group])
        gate = h @ w("mlp.gate_proj").T
        mlp = (gate / (1 + np.exp(-gate)) * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
        x = x + np.concatenate(heads, -1) @ w("self_attn.o_proj").T + mlp  # in parallel, from the same norm
    head = W["model.embed_tokens.weight"] if c.tie_word_embeddings else W["lm_head.weight"]
    return layer_norm(x, W["model.norm.weight"], c.layer_norm_eps) @ head.T * c.logit_scale


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_logits_equal_an_independent_slow_reference(changes):
    model, ids = build(**changes), tokens(3, 17)
    logits = model(ids).detach().numpy()
    for row, sequence in zip(logits, ids.numpy()):
        expected = reference_logits(model, sequence)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5 * expected.std())


def test_rotary_angles_are_fp32_and_no_two_positions_look_alike():
    """In bf16 positions above 256 collide."""
    config = model_preset("aya-expanse-8b")
    cos, sin = rotary(config, torch.arange(8192)[None])
    assert cos.dtype == torch.float32 and cos.shape == (1, 8192, 1, 64)
    assert len(np.unique(np.concatenate([cos[0, :, 0], sin[0, :, 0]], -1), axis=0)) == 8192
    exact = np.outer(np.arange(8192), 10000.0 ** (-np.arange(64) / 64))
    np.testing.assert_allclose(cos[0, :, 0], np.cos(exact), atol=2e-3)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(exact), atol=2e-3)


def test_attention_depends_on_distances_and_not_on_places():
    """Rotary: the same tokens behind 5 more positions attend to each other alike. Seen on one head's
    scores q.k."""
    attention = build().model.layers[0].self_attn
    x = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(0))
    outputs = [
        attention(x, *rotary(build().config, torch.arange(start, start + 6)[None])) for start in (0, 5)
    ]
    torch.testing.assert_close(*outputs)


# ---- who sees whom -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", [1, 9, 16])
def test_changing_a_token_changes_no_earlier_logit(place):
    model, ids = build(), tokens(2, 17)
    changed = ids.clone()
    changed[:, place] = (ids[:, place] + 1) % SMALL["vocab_size"]
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place:], after[:, place:]).all(-1).any()


@pytest.mark.parametrize("place", [0, 3, 10])
def test_a_token_is_seen_through_one_window_a_layer_and_no_further(place):
    """Two sliding layers of 3 tokens: it reaches the 4 tokens after it. A full layer would carry it to the
    end."""
    model, ids = build(model_type="cohere2", sliding_window=3, layer_types=["sliding_attention"] * 2), tokens(
        1, 17
    )
    changed = ids.clone()
    changed[:, place] = (ids[:, place] + 1) % SMALL["vocab_size"]
    differs = ~torch.isclose(model(ids), model(changed), rtol=0, atol=1e-6).all(-1)[0]
    assert differs.nonzero()[:, 0].tolist() == list(range(place, place + 5))


def test_full_layers_of_cohere2_see_no_order_and_sliding_ones_do():
    """Without rotary embeddings the last token's logits are the same whatever the order of those before
    it, in one layer."""
    ids = tokens(1, 9)
    turned = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], 1)
    full, sliding = (
        build(model_type="cohere2", num_hidden_layers=1, layer_types=[kind])
        for kind in ("full_attention", "sliding_attention")
    )
    torch.testing.assert_close(full(ids)[:, -1], full(turned)[:, -1])
    assert not torch.isclose(sliding(ids)[:, -1], sliding(turned)[:, -1], rtol=1e-3, atol=1e-3).any(-1).all()


@pytest.mark.parametrize("padding", [1, 7, 64])
@pytest.mark.parametrize("pad_id", [0, 9])
@pytest.mark.parametrize("changes", [{}, COHERE2], ids=["cohere", "cohere2"])
def test_right_padding_changes_no_logit_no_log_prob_no_gradient_and_no_score(changes, padding, pad_id):
    ids, lengths = tokens(2, 12), torch.tensor([12, 7])
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 0], mask[:, 6] = False, True
    padded, padded_mask = F.pad(ids, (0, padding), value=pad_id), F.pad(mask, (0, padding))
    model, reward_model = build(**changes), build(RewardModel, **changes)
    torch.testing.assert_close(model(padded)[:, :12], model(ids))
    torch.testing.assert_close(reward_model(padded, lengths, padded_mask), reward_model(ids, lengths, mask))
    results = []
    for inputs, its_mask in ((ids, mask), (padded, padded_mask)):
        logps = model(inputs, mask=its_mask)
        results.append(
            (sum_by_row(logps, its_mask), *torch.autograd.grad(-logps.sum(), list(model.parameters())))
        )
    for alone, with_padding in zip(*results):
        torch.testing.assert_close(with_padding, alone, rtol=1e-5, atol=1e-5)


def test_a_sequence_has_the_same_loss_alone_as_beside_a_longer_one():
    model, long, short = build(), tokens(1, 40), tokens(1, 9, seed=5)
    batch = torch.cat([long, F.pad(short, (0, 31))])
    mask = torch.arange(40)[None] < torch.tensor([40, 9])[:, None]
    mask[:, 0] = False
    together = sum_by_row(model(batch, mask=mask), mask)
    alone = [model(ids, mask=mask[i:i + 1, :ids.shape[1]]).sum() for i, ids in enumerate((long, short))]
    torch.testing.assert_close(together, torch.stack(alone))


# ---- the ways to call it -----------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False)], ids=["tied", "untied"])
def test_masked_log_probs_are_the_log_softmax_of_the_logits_at_the_token_before(changes):
    model, ids = build(**changes), tokens(3, 11)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[:, 0] = False
    mask[0] = False                                                     # a row without supervised tokens
    logps = model(ids).log_softmax(-1)
    expected = [logps[b, t - 1, ids[b, t]] for b, t in mask.nonzero().tolist()]
    torch.testing.assert_close(model(ids, mask=mask), torch.stack(expected))


def answers(lengths, width):
    """The mask of answers that are each row's last tokens, at most three."""
    places, lengths = torch.arange(width)[None], lengths[:, None]
    return (places < lengths) & (places >= (lengths - 3).clamp(min=1))


def test_a_score_is_read_at_the_answers_last_token_whatever_stands_after_or_inside():
    """Found by length: the pad id inside the text does not move it, and neither does a batch mate."""
    model, ids, lengths = build(RewardModel), tokens(3, 15), torch.tensor([15, 6, 2])
    ids[0, 4] = ids[1, 2] = 0                                           # the pad id, typed
    mask = answers(lengths, 15)
    scores, _ = model(ids, lengths, mask)
    assert scores.dtype == torch.float32 and len(scores.unique()) == 3
    for i, length in enumerate(lengths):
        alone, _ = model(ids[i:i + 1, :length], length[None], mask[i:i + 1, :length])
        torch.testing.assert_close(alone, scores[i:i + 1])


@pytest.mark.parametrize("changes", [{}, COHERE2], ids=["cohere", "cohere2"])
def test_a_score_is_the_head_at_the_last_token_plus_the_weighted_mean_and_least_log_prob_of_the_answer(
    changes,
):
    language_model, model, ids, lengths = (
        build(**changes),
        build(RewardModel, **changes),
        tokens(3, 15),
        torch.tensor([15, 6, 2]),
    )
    language_model.model = model.model                                  # the log-probs are the trunk's own
    with torch.no_grad():
        model.score_logps.weight.copy_(torch.tensor([[0.7, -0.2]]))
    mask = answers(lengths, 15)
    scores, logps = model(ids, lengths, mask)
    torch.testing.assert_close(logps, language_model(ids, mask=mask))
    for i, (length, its) in enumerate(zip(lengths, logps.split(mask.sum(1).tolist()))):
        expected = (
            model.model(ids[i : i + 1, :length])[0, -1] @ model.score.weight[0]
            + 0.7 * its.mean()
            - 0.2 * its.min()
        )
        torch.testing.assert_close(scores[i], expected)


@pytest.mark.parametrize("changes", [{}, COHERE2], ids=["cohere", "cohere2"])
@pytest.mark.parametrize("model_class", [CohereForCausalLM, RewardModel])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(model_class, changes):
    ids, mask = tokens(2, 12), torch.arange(12)[None].expand(2, 12) > 2
    results, calls = [], []
    for checkpointing in (False, True):
        model = build(model_class, **changes).train()
        model.model.activation_checkpointing = checkpointing
        calls.append([])
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls[-1].append(1))
        loss = (
            -model(ids, mask=mask).sum()
            if model_class is CohereForCausalLM
            else model(ids, torch.tensor([12, 7]), mask)[0].square().sum()
        )
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters())))
    assert [len(c) for c in calls] == [1, 2]  # the block is computed once more in backward
    for off, on in zip(*results):
        torch.testing.assert_close(on, off, rtol=0, atol=0)


def test_bf16_weights_give_bf16_logits_and_fp32_log_probs_near_the_fp32_models():
    model, ids = build(), tokens(2, 12)
    mask = torch.arange(12)[None].expand(2, 12) > 0
    expected = model(ids, mask=mask)
    half = model.bfloat16()
    assert half(ids).dtype == torch.bfloat16
    logps = half(ids, mask=mask)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=0.05, atol=0.1)


# ---- sizes, names, initial weights -------------------------------------------------------------------------

def by_hand(vocabulary, hidden, ffn, layers, heads, key_value_heads):
    """Parameters of a model with heads of 128 and a tied head: in each layer q and o, k and v, three
    matrices of the MLP, one norm."""
    return (
        vocabulary * hidden
        + layers * (2 * hidden * heads * 128 + 2 * hidden * key_value_heads * 128 + 3 * hidden * ffn + hidden)
        + hidden
    )


@pytest.mark.parametrize(
    "preset, count, sizes",
    [
        ("aya-expanse-8b", 8_028_033_024, (256_000, 4096, 14336, 32, 32, 8)),
        ("aya-expanse-32b", 32_296_476_672, (256_000, 8192, 24576, 40, 64, 8)),
        ("aya-23-8b", 8_028_033_024, (256_000, 4096, 14336, 32, 32, 8)),
        ("aya-23-35b", 34_980_831_232, (256_000, 8192, 22528, 40, 64, 64)),
        ("command-r7b", 8_028_033_024, (256_000, 4096, 14336, 32, 32, 8)),
        ("tiny-aya", 3_349_227_520, (262_144, 2048, 11008, 36, 16, 4)),
    ],
)
def test_the_presets_have_the_published_number_of_parameters(preset, count, sizes):
    with torch.device("meta"):
        model = CohereForCausalLM(model_preset(preset))
    assert sum(p.numel() for p in model.parameters()) == by_hand(*sizes) == count


@pytest.mark.parametrize("preset", ["command-r7b", "tiny-aya"])
def test_three_layers_of_four_slide_in_the_cohere2_presets(preset):
    config = model_preset(preset)
    assert [config.window(i) for i in range(8)] == [4096, 4096, 4096, None] * 2
    assert [bool(config.rope(i)) for i in range(8)] == [True, True, True, False] * 2
    config = model_preset("aya-expanse-8b")
    assert not any(map(config.window, range(32))) and all(map(config.rope, range(32)))


LAYER = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
]


def test_parameter_names_are_the_published_ones():
    published = ["model.embed_tokens.weight", "model.norm.weight"] + [
        f"model.layers.{i}.{name}" for i in range(2) for name in LAYER
    ]
    assert sorted(build().state_dict()) == sorted(build(**COHERE2).state_dict()) == sorted(published)
    assert sorted(build(RewardModel).state_dict()) == sorted(
        published + ["score.weight", "score_logps.weight"]
    )
    assert sorted(build(tie_word_embeddings=False).state_dict()) == sorted(published + ["lm_head.weight"])
    norms = [f"model.layers.{i}.self_attn.{x}_norm.weight" for i in range(2) for x in "qk"]
    model = build(use_qk_norm=True)
    assert sorted(model.state_dict()) == sorted(published + norms)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (4, 6) and model.model.layers[
        0
    ].self_attn.k_norm.weight.shape == (2, 6)


def test_the_8b_presets_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = CohereForCausalLM(model_preset("aya-expanse-8b")).state_dict()
    assert len(state) == 32 * 8 + 2
    shapes = {
        name.removeprefix("model.layers.31."): tuple(t.shape)
        for name, t in state.items()
        if "layers.31" in name or "layers" not in name
    }
    assert shapes == {
        "model.embed_tokens.weight": (256000, 4096),
        "model.norm.weight": (4096,),
        "input_layernorm.weight": (4096,),
        "self_attn.q_proj.weight": (4096, 4096),
        "self_attn.k_proj.weight": (1024, 4096),
        "self_attn.v_proj.weight": (1024, 4096),
        "self_attn.o_proj.weight": (4096, 4096),
        "mlp.gate_proj.weight": (14336, 4096),
        "mlp.up_proj.weight": (14336, 4096),
        "mlp.down_proj.weight": (4096, 14336),
    }


@pytest.mark.parametrize("model_class", [CohereForCausalLM, RewardModel])
def test_initial_weights_reach_every_parameter_and_depend_only_on_the_seed(model_class):
    config = ModelConfig(**{**SMALL, "use_qk_norm": True, "tie_word_embeddings": False})

    def made(seed):
        model = model_class(config)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
        return init_weights(model, torch.Generator().manual_seed(seed)).state_dict()
    a, again, b = made(0), made(0), made(1)
    assert all(t.isfinite().all() for t in a.values())
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert all(
        (t == 1).all() if "norm" in name else not torch.equal(t, b[name])
        for name, t in a.items()
        if name != "score_logps.weight"
    )


def test_initial_spreads_are_those_of_the_docstring():
    config = ModelConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    state = init_weights(RewardModel(config), torch.Generator().manual_seed(0)).state_dict()
    spread = {name: state[name].std().item() for name in state}
    assert spread["model.embed_tokens.weight"] == pytest.approx(0.02, rel=0.03)
    assert spread["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.03)
    assert spread["model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.02 / 2, rel=0.03)
    assert spread["score.weight"] == pytest.approx(257 ** -0.5, rel=0.2)


# ---- config.json -------------------------------------------------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 10, "rope_theta": 4e6},
        {"eos_token_id": [7, 3]},
        {"use_qk_norm": True, "tie_word_embeddings": False},
        COHERE2,
        {**COHERE2, "layer_types": [FULL, FULL]},
        {**COHERE2, "layer_types": [SLIDING, SLIDING], "rope_theta": None},
    ],
)
def test_a_config_survives_publishing_and_reading(changes):
    config = ModelConfig(**{**SMALL, **changes})
    assert ModelConfig.from_published(json.loads(json.dumps(config.published()))) == config


@pytest.mark.parametrize(
    "raw, theta",
    [
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0),
        ({"rope_scaling": {"rope_theta": 7.0, "type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}, "rope_scaling": {"rope_theta": 7.0}},
            7.0,
        ),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
        ({}, 500000.0),
        ({"model_type": "cohere2"}, 10000.0),
    ],
)
def test_rope_theta_is_read_where_old_and_new_files_keep_it_in_transformers_order(raw, theta):
    assert ModelConfig.from_published(raw).rope_theta == theta


def test_as_many_key_value_heads_as_heads_unless_a_file_says_otherwise():
    """As in transformers; the 8 of Aya Expanse was once taken for any file that says nothing."""
    assert ModelConfig.from_published({"num_attention_heads": 16}).num_key_value_heads == 16
    assert (
        ModelConfig.from_published(
            {"num_attention_heads": 16, "num_key_value_heads": None}
        ).num_key_value_heads
        == 16
    )


@pytest.mark.parametrize(
    "raw, types",
    [
        ({}, [SLIDING, SLIDING, SLIDING, FULL, SLIDING]),
        ({"sliding_window_pattern": 2}, [SLIDING, FULL, SLIDING, FULL, SLIDING]),
        ({"sliding_window_pattern": 1}, [FULL] * 5),
        ({"sliding_window_pattern": 9}, [SLIDING] * 5),
        (
            {"sliding_window_pattern": 2, "layer_types": [FULL, SLIDING, FULL, FULL, FULL]},
            [FULL, SLIDING, FULL, FULL, FULL],
        ),
    ],
)
def test_which_layers_slide_is_read_from_layer_types_or_the_older_pattern_and_published_as_both(
    raw, types
):
    config = ModelConfig.from_published(
        {"model_type": "cohere2", "num_hidden_layers": 5, "sliding_window": 6, **raw}
    )
    assert config.layer_types == types and [config.window(i) for i in range(5)] == [
        6 if t == SLIDING else None for t in types
    ]
    published = config.published()
    assert published["layer_types"] == types and published["sliding_window"] == 6
    assert ("sliding_window_pattern" in published) == (types.count(FULL) != 4)
    if "sliding_window_pattern" in published:
        del published["layer_types"]
        assert ModelConfig.from_published(published) == config


def test_a_cohere_config_has_no_window_whatever_its_file_says():
    config = ModelConfig.from_published(
        {"model_type": "cohere", "num_hidden_layers": 2, "sliding_window": 6, "layer_types": [SLIDING, FULL]}
    )
    assert (
        config.window(0) is None
        and not {"sliding_window", "layer_types", "sliding_window_pattern"} & config.published().keys()
    )


@pytest.mark.parametrize(
    "raw, says",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "scaled rope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rope"),
        ({"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}}, "scaled rope"),
        ({"rope_parameters": {SLIDING: {"rope_theta": 7.0}}}, "scaled rope"),
        ({"rope_scaling": "yarn"}, "scaled rope"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads 6"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"hidden_size": -8}, "hidden_size -8"),
        ({"num_hidden_layers": 2.5, "rope_theta": "1e4"}, "num_hidden_layers 2.5, rope_theta '1e4'"),
        ({"logit_scale": True}, "logit_scale True"),
        ({"eos_token_id": ["9"]}, "eos_token_id"),
        ({"model_type": "cohere2", "use_qk_norm": True}, "use_qk_norm"),
        ({"model_type": "cohere2", "num_hidden_layers": 2, "layer_types": [FULL]}, "layer_types"),
        (
            {"model_type": "cohere2", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "layer_types",
        ),
        ({"model_type": "cohere2", "layer_types": 3}, "config.json: "),
        ({"model_type": "cohere2", "sliding_window_pattern": 0}, "sliding_window_pattern 0"),
        ({"model_type": "cohere2", "sliding_window": None}, "sliding_window None"),
        ({"model_type": "cohere2", "sliding_window": 0}, "sliding_window 0"),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(raw, says):
    """rope_scaling, the older spelling, was once ignored."""
    with pytest.raises(
        ValueError, match=f"^config.json: .*{re.escape(says)}" if not says.startswith("config") else says
    ):
        ModelConfig.from_published({"model_type": "cohere", **raw})


# packing

SHAPES = [
    {},
    {"use_qk_norm": True, "tie_word_embeddings": False},
    {"model_type": "cohere2", "sliding_window": 5, "num_hidden_layers": 4},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_packed_documents_have_the_loss_and_gradients_of_padded_and_of_separate_ones(changes, checkpointing):
    """Very different lengths, a document of one token among them; with and without recomputation."""
    lengths = torch.tensor([17, 1, 9, 16, 3])
    ids, mask = tokens(5, 20), torch.arange(20) < lengths[:, None]
    mask[:, :2] = False
    results = []
    for packing in (True, False, None):
        model = build(**changes).train()
        model.model.packing, model.model.activation_checkpointing = bool(packing), checkpointing
        if packing is None:
            parts = [
                model(ids[i : i + 1, :n], mask[i : i + 1, :n])
                for i, n in enumerate(lengths.tolist())
                if n > 2
            ]
            logps = torch.cat(parts)
        else:
            logps = model(ids, mask, lengths)
        logps.square().sum().backward()
        results.append((logps.detach(), [p.grad for p in model.parameters()]))
    for logps, grads in results[1:]:
        torch.testing.assert_close(results[0][0], logps, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(results[0][1], grads):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packing", [True, None], ids=["asked for", "on a CPU"])
def test_packing_computes_no_padding(packing):
    """The MLP sees the real tokens in one line; what stands in the padding changes nothing, not even a
    bit."""
    model, seen = build(), []
    model.model.packing = packing
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    ids, lengths = tokens(3, 12), torch.tensor([12, 2, 5])
    hidden = model.model(ids, lengths)
    other = torch.where(torch.arange(12) < lengths[:, None], ids, 7)
    assert (
        seen == [(19, model.config.hidden_size)]
        and torch.equal(model.model(other, lengths), hidden)
        and (hidden[1, 2:] == 0).all()
    )


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_what_rows_begin_with_alike_is_computed_once_with_the_loss_and_gradients_of_separate_rows(
    changes, checkpointing
):
    """A prompt of 7 tokens with two answers, one of 9 with three (two of them equal), and a row by itself;
    windows of 5 end inside the prompts."""
    first, shared, lengths = (
        torch.tensor([0, 1, 0, 1, 1, 5]),
        torch.tensor([0, 0, 7, 9, 15, 0]),
        torch.tensor([17, 15, 8, 20, 15, 4]),
    )
    ids, results, seen = tokens(6, 20), [], []
    for row in (2, 3, 4):
        ids[row, :shared[row]] = ids[first[row], :shared[row]]
    mask = (torch.arange(20) < lengths[:, None]) & (
        torch.arange(20) >= torch.tensor([7, 9, 7, 9, 9, 1])[:, None]
    )
    for packing in (True, False):
        model = build(**changes).train()
        model.model.packing, model.model.activation_checkpointing = packing, checkpointing
        model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, out: seen.append(args[0].shape[:-1].numel())
        )
        logps = model(ids, mask, lengths, torch.stack((first, shared)))
        logps.square().sum().backward()
        results.append((logps.detach(), [p.grad for p in model.parameters()]))
    assert seen[0] == lengths.sum() - shared.sum() and seen[-1] == 120
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def slow_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa,
                     scale=None):
    """What torch says that its varlen_attn computes, token by token: (W, 0) is causal with W keys to the
    left, -1 all of them."""
    assert (
        enable_gqa == (query.shape[1] != key.shape[1])
        and cu_seq_q.dtype == torch.int32
        and torch.equal(cu_seq_q, cu_seq_k)
        and window_size[1] == 0
    )
    assert max_q == max_k >= cu_seq_q.diff().max() and cu_seq_q[-1] == len(query) == len(key) == len(value)
    group, out = query.shape[1] // key.shape[1], torch.empty_like(query)
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:]):
        for t in range(start, end):
            seen = slice(start if window_size[0] < 0 else max(start, t - window_size[0]), t + 1)
            for h in range(query.shape[1]):
                scores = key[seen, h // group] @ query[t, h] * query.shape[2] ** -0.5
                out[t, h] = scores.softmax(0) @ value[seen, h // group]
    return out


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("once", [True, False], ids=["rows by themselves", "rows that begin alike"])
def test_the_gpus_variable_length_attention_is_given_what_the_padded_one_sees(window, once, monkeypatch):
    """No GPU in the tests: its kernel is a slow stand-in with the kernel's own signature."""
    real = torch.nn.attention.varlen.varlen_attn
    monkeypatch.setattr(
        torch.nn.attention.varlen,
        "varlen_attn",
        lambda *args, **named: inspect.signature(real).bind(*args, **named)
        and slow_varlen_attn(*args, **named),
    )
    lengths, repeats = torch.tensor([9, 1, 12, 8]), (
        None if once else torch.tensor([[0, 1, 0, 0], [0, 0, 6, 8]])
    )
    line, generator = Line(lengths, 14, repeats), torch.Generator().manual_seed(0)
    N = int(lengths.sum()) - (0 if once else 14)
    q, k, v = (torch.randn(N, heads, 8, generator=generator) for heads in (4, 2, 2))
    padded = [line.unpack(x).transpose(1, 2) for x in (q, k, v)]
    back = torch.arange(14)[:, None] - torch.arange(14)
    expected = F.scaled_dot_product_attention(
        *padded, attn_mask=(back >= 0) & (back < (window or 14)), enable_gqa=True
    )
    torch.testing.assert_close(line.attend(q, k, v, window), line.pack(expected.transpose(1, 2)))
