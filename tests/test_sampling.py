"""Logits to token by hand and by counting; the cached engine against the plain forward; what one request
gets, whoever else is in the batch.
And the scores of a reward model, which must not depend on the batch either."""

import time

import numpy as np
import pytest
import torch
from small import language_model, on_ranks, reward_model, tokenizer

from aya_min.reward import score_texts
from aya_min import model_config, sampling
from aya_min.engine import Engine, choose, filtered
from aya_min.fused import Fused
from aya_min.sampling import answer_rows, complete, engine_size, generate, stream
from aya_min.world import questions

VOCABULARY = tokenizer().vocab_size


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def prompts():
    """Twelve prompts of 1 to 300 tokens, in no order."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(13, VOCABULARY, size=size).tolist()
        for size in (5, 300, 1, 40, 7, 120, 2, 17, 64, 3, 200, 11)
    ]


def kept(probs, **filters):
    """The tokens that a filter leaves of these probabilities."""
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    return torch.isfinite(filtered(torch.tensor([probs]).log(), **settings))[0].nonzero()[:, 0].tolist()


# logits to token

def test_the_frequencies_of_chosen_tokens_are_the_probabilities_at_the_temperature():
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0]), 100_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens, logps = choose(logits.repeat(n, 1), uniforms, temperature=0.7)
    probs = (logits / 0.7).softmax(-1)
    frequencies = torch.bincount(tokens, minlength=6) / n
    assert ((frequencies - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt()).all()
    torch.testing.assert_close(logps, probs.log()[tokens])


def test_one_uniform_number_decides_by_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().repeat(6, 1)
    tokens, _ = choose(logits, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2 ** -24]), temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]


def test_tokens_that_are_filtered_out_are_never_chosen_at_either_end_of_the_uniform_numbers():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)).expand(3, 1000)
    for filters in (dict(top_k=5), dict(top_p=0.3), dict(min_p=0.5)):
        tokens, _ = choose(logits.clone(), torch.tensor([0.0, 0.5, 1 - 2 ** -24]), 1.0, **filters)
        allowed = torch.isfinite(filtered(logits[:1], **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}))[
            0
        ].nonzero()[:, 0]
        assert set(tokens.tolist()) <= set(allowed.tolist())


def test_temperature_0_is_greedy_with_log_probs_at_temperature_1():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    tokens, logps = choose(logits.clone(), torch.full((4,), 0.99), temperature=0, top_k=3)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logps, logits.log_softmax(-1).amax(-1))


def test_log_probs_are_of_the_whole_distribution_whatever_the_filter():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    tokens, logps = choose(logits.clone(), torch.tensor([0.1, 0.5, 0.9]), temperature=0.5, top_k=1)
    torch.testing.assert_close(logps, (logits / 0.5).log_softmax(-1).amax(-1))
    assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "top_k, tokens",
    [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])],
)
def test_top_k_keeps_the_k_most_likely_and_0_or_the_vocabulary_or_more_keep_all(top_k, tokens):
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=top_k) == tokens


@pytest.mark.parametrize(
    "top_p, tokens",
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, tokens):
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=top_p) == tokens


@pytest.mark.parametrize(
    "min_p, tokens", [(0.0, [0, 1, 2, 3]), (0.24, [0, 1, 2, 3]), (0.26, [1, 2, 3]), (0.6, [1, 3]), (1.0, [1])]
)
def test_min_p_is_a_share_of_the_likeliest_tokens_probability(min_p, tokens):
    assert kept([0.1, 0.4, 0.2, 0.3], min_p=min_p) == tokens


def test_top_p_counts_what_top_k_left():
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2, top_p=0.55) == [1]       # 4/7 of what is left
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.55) == [1, 3]


# the engine against the plain forward

SHAPES = [
    {},
    {"use_qk_norm": True},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"logit_scale": 0.25},
    {"head_dim": 6},
    {"model_type": "cohere2", "sliding_window": 8, "num_hidden_layers": 4},
    {"model_type": "cohere2", "sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]},
]


def teacher_forced(model, prompt, ids, temperature):
    """Log-probs (len(ids), V) of the plain forward over prompt and answer."""
    logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1].detach() / (temperature or 1)
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_log_prob_of_what_was_sampled_is_that_of_the_whole_forward(temperature, changes, prompts):
    """With and without a sliding window, whose ring is full after 8 or 40 tokens, and which is shorter and
    longer than the prompts."""
    model = language_model(**changes)
    for prompt, group in zip(
        prompts,
        generate(
            model, prompts, num_samples=2, max_new_tokens=60, temperature=temperature, stop_ids=[20, 30]
        ),
    ):
        for ids, logp, _ in group:
            logps = teacher_forced(model, prompt, ids, temperature)
            assert logp == pytest.approx(
                logps[torch.arange(len(ids)), torch.tensor(ids)].sum().item(), abs=1e-4
            )
            if temperature == 0:
                assert ids == logps.argmax(-1).tolist()


@pytest.mark.parametrize("prefill", [1, 2, 17])
def test_logits_token_by_token_with_the_cache_are_those_of_the_whole_forward(prefill, model):
    ids = torch.randint(13, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    whole, engine, seen = model(ids).detach(), Engine(Fused(model), 3, 24, 24, temperature=0), []
    engine.fused.head = lambda x, head=engine.fused.head: seen.append(head(x)) or seen[-1].clone()
    with torch.no_grad():
        logits, kept = engine.prefill(ids[:, :prefill].tolist())
        torch.testing.assert_close(logits, whole[:, prefill - 1], rtol=0, atol=1e-5)
        for slot in range(3):
            engine.place(slot, sampling.Row(slot, 0, prefill + 1, 24, None, [0]), kept, slot)
        for position in range(prefill, 24):
            engine.tokens[:] = ids[:, position]
            engine.step(3, position + 1)
            torch.testing.assert_close(
                seen[-1] * model.config.logit_scale, whole[:, position], rtol=0, atol=1e-5
            )


def test_a_layer_with_a_sliding_window_keeps_only_its_window():
    model = language_model(model_type="cohere2", sliding_window=8, num_hidden_layers=4)
    engine = Engine(Fused(model), 2, 100, 10)
    assert [keys.shape[2] for keys, _ in engine.cache] == [8, 8, 8, 128]
    per_token = 2 * 2 * 8 * 4                            # keys and values, 2 key heads of 8 numbers, fp32
    assert engine_size(model.config, [90], [10], 1, 2) == (1, 128, (3 * 8 + 128) * per_token)


def test_bfloat16_log_probs_are_those_of_the_bfloat16_forward_to_its_rounding(prompts):
    model = language_model().bfloat16()
    for prompt, [(ids, logp, _)] in zip(
        prompts, generate(model, prompts, max_new_tokens=10, temperature=0.7)
    ):
        assert logp == pytest.approx(
            teacher_forced(model, prompt, ids, 0.7)[torch.arange(10), torch.tensor(ids)].sum().item(),
            rel=0.02,
        )


def test_unpacked_joined_weights_answer_alike_and_are_the_parameters_themselves(model, prompts, monkeypatch):
    """Large models are not held twice: their parameters become views of the joined matrices, with the same
    values, and can be trained on."""
    packed, before = generate(model, prompts, max_new_tokens=12, temperature=0), {
        name: p.clone() for name, p in model.state_dict().items()
    }
    monkeypatch.setattr("aya_min.fused.PACK_BYTES", 0)
    fresh = language_model()
    plain = generate(fresh, prompts, max_new_tokens=12, temperature=0)
    assert [g[0].ids for g in plain] == [g[0].ids for g in packed]
    assert all(torch.equal(p, before[name]) for name, p in fresh.state_dict().items())
    attention, mlp = fresh.model.layers[0].self_attn, fresh.model.layers[0].mlp
    assert (
        attention.q_proj.weight.untyped_storage().data_ptr()
        == mlp.up_proj.weight.untyped_storage().data_ptr()
    )
    with torch.no_grad():
        attention.v_proj.weight.mul_(-1)
    changed = generate(fresh, prompts, max_new_tokens=12, temperature=0)
    assert [g[0].ids for g in changed] != [g[0].ids for g in plain]
    fresh(torch.tensor([prompts[0]])).sum().backward()
    assert all(p.grad is not None for p in fresh.parameters())


def test_weights_that_were_changed_in_place_are_seen_by_the_next_call(prompts):
    """RLOO loads the trained weights into its sampling copy before each step; packed weights of the step
    before must not be used."""
    model, other = language_model(0), language_model(5)
    first = generate(model, prompts[:3], max_new_tokens=8, temperature=0)
    model.load_state_dict(other.state_dict())
    assert (
        generate(model, prompts[:3], max_new_tokens=8, temperature=0)
        == generate(other, prompts[:3], max_new_tokens=8, temperature=0)
        != first
    )


# one request among others

def test_greedy_alone_is_greedy_in_a_batch_with_prompts_of_1_to_300_tokens(model, prompts):
    together = generate(model, prompts, max_new_tokens=20, temperature=0)
    alone = [generate(model, [prompt], max_new_tokens=20, temperature=0)[0] for prompt in prompts]
    assert [group[0].ids for group in together] == [group[0].ids for group in alone]
    assert len({tuple(group[0].ids) for group in alone}) == len(prompts)
    for prompt, [completion] in zip(prompts, alone):        # and greedy is the argmax of the whole forward
        assert (
            completion.ids
            == model(torch.tensor([prompt + completion.ids]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        )


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.long), 3, pytest.param(5, marks=pytest.mark.long), 1000]
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "cohere2", "sliding_window": 16, "num_hidden_layers": 4}],
    ids=["cohere", "cohere2"],
)
def test_what_a_request_samples_does_not_depend_on_the_batch_to_the_last_bit(changes, batch_size, prompts):
    """On the CPU in fp32 with packed weights: attention runs over whole blocks of keys, so that even the
    log-probs are equal."""
    model = language_model(**changes)
    settings = dict(num_samples=3, max_new_tokens=45, temperature=0.7, stop_ids=[20, 30, 40], seed=4)
    whole = generate(model, prompts, **settings)
    assert generate(model, prompts, batch_size=batch_size, **settings) == whole
    assert generate(model, prompts[4:6], numbers=[4, 5], batch_size=batch_size, **settings) == whole[4:6]


class AsOnGPU(Engine):
    """All slots over the whole cache at each step, idle rows too: the fixed shapes that a CUDA graph
    replays."""

    def step(self, n, longest):
        self.look_at(self.slots, self.max_tokens)
        tokens, logps = self.decode(self.slots, self.max_tokens)
        return tokens[:n].tolist(), logps[:n].tolist()


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "cohere2", "sliding_window": 16, "num_hidden_layers": 4}],
    ids=["cohere", "cohere2"],
)
def test_fixed_shapes_with_idle_rows_give_the_same_answers(changes, prompts, monkeypatch):
    model = language_model(**changes)
    settings = dict(num_samples=2, max_new_tokens=30, temperature=0.7, stop_ids=[20, 30, 40], batch_size=5)
    expected = generate(model, prompts, **settings)
    monkeypatch.setattr(sampling, "Engine", AsOnGPU)
    assert generate(model, prompts, **settings) == expected


class Counting(Engine):
    """Notes the rows of each step and the prompts that are prefilled."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rows_of_steps, self.prefilled = [], []

    def step(self, n, longest):
        self.rows_of_steps.append(n)
        return super().step(n, longest)

    def prefill(self, prompts):
        self.prefilled += prompts
        return super().prefill(prompts)


def test_a_finished_row_is_replaced_by_a_waiting_prompt_at_once(model):
    """One answer of 10 tokens and four of 3 on two rows: the long one takes 9 steps after its prefill, the
    others 2 each, one after the other."""
    engine, limits = Counting(Fused(model), 2, 32, 10, 0.0), [3, 3, 10, 3, 3]
    prompts = [[20 + i] for i in range(5)]
    rows = [
        row for _, ended in complete(engine, prompts, limits, 1, range(5), 0, set(), None) for row in ended
    ]
    assert engine.rows_of_steps == [2] * 8 + [1]
    assert [len(row.ids) for row in sorted(rows, key=lambda row: row.prompt)] == limits
    assert [row.ids for row in sorted(rows, key=lambda row: row.prompt)] == [
        g[0].ids for g in generate(model, prompts, max_new_tokens=limits, temperature=0)
    ]


def test_k_samples_share_the_prefill_of_their_prompt_even_with_fewer_rows_than_samples(model, prompts):
    engine = Counting(Fused(model), 3, 320, 9, 1.0)
    rows = [
        row
        for _, ended in complete(engine, prompts[:2] + prompts[4:5], [9] * 3, 8, range(3), 0, set(), None)
        for row in ended
    ]
    assert sorted(map(len, engine.prefilled)) == [5, 7, 300]
    assert len(rows) == 24 and max(engine.rows_of_steps) == 3


def test_k_samples_of_a_prompt_are_k_separate_requests(model, prompts):
    together = generate(model, prompts[:4], num_samples=3, max_new_tokens=12, seed=1)
    apart = generate(model, [prompt for prompt in prompts[:4] for _ in range(3)], max_new_tokens=12, seed=1)
    assert [c.ids for group in together for c in group] == [group[0].ids for group in apart]
    assert all(len({tuple(c.ids) for c in group}) == 3 for group in together)


def test_two_calls_are_independent_and_another_seed_gives_other_samples(model, prompts):
    first = generate(model, prompts[:3], max_new_tokens=12, seed=1)
    generate(model, prompts[5:9], max_new_tokens=30, seed=2)
    assert (
        generate(model, prompts[:3], max_new_tokens=12, seed=1)
        == first
        != generate(model, prompts[:3], max_new_tokens=12, seed=2)
    )


def test_the_global_random_state_is_neither_used_nor_moved(model, prompts):
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), generate(model, prompts[:2], max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert generate(model, prompts[:2], max_new_tokens=5) == first


# ends

def test_a_row_ends_with_its_first_stop_token_and_the_others_go_on(model, prompts):
    free = generate(model, prompts, num_samples=4, max_new_tokens=25, seed=2)
    counts = np.bincount([i for group in free for c in group for i in c.ids], minlength=VOCABULARY)
    stops = np.argsort(-counts)[:12].tolist()                           # tokens that do come
    ended = generate(model, prompts, num_samples=4, max_new_tokens=25, seed=2, stop_ids=stops)
    lengths = []
    for whole, cut in zip(sum(free, []), sum(ended, [])):
        first = next((n for n, i in enumerate(whole.ids, 1) if i in stops), None)
        assert cut.ids == whole.ids[:first] and cut.finish_reason == ("stop" if first else "length")
        lengths.append(len(cut.ids))
    assert min(lengths) == 1 and max(lengths) == 25 and len(set(lengths)) > 5


def test_a_stop_token_at_the_last_allowed_step_is_a_stop(model, prompts):
    [[whole]] = generate(model, prompts[:1], max_new_tokens=6, temperature=0)
    first = whole.ids.index(whole.ids[5]) + 1
    [[cut]] = generate(model, prompts[:1], max_new_tokens=first, temperature=0, stop_ids=[whole.ids[5]])
    assert cut.ids == whole.ids[:first] and cut.finish_reason == "stop"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9])
def test_never_more_than_max_new_tokens(max_new_tokens, model, prompts):
    groups = generate(model, prompts, max_new_tokens=max_new_tokens)
    assert {len(c.ids) for group in groups for c in group} == {max_new_tokens} and groups[0][
        0
    ].finish_reason == "length"


def test_the_last_position_of_the_model_can_be_used_and_one_more_is_refused(model):
    prompt = [20] * 500
    assert len(generate(model, [prompt], max_new_tokens=12)[0][0].ids) == 12
    with pytest.raises(
        ValueError,
        match=(
            "prompt 1 has 500 tokens; with 13 new ones it passes the model's 512; shorten it or lower"
            " --max-new-tokens"
        ),
    ):
        generate(model, [[20], prompt], max_new_tokens=13)


NAN = float("nan")


@pytest.mark.parametrize("changes, says", [
    (dict(temperature=-1), "temperature -1 must be 0"), (dict(temperature=1e-40), "at least 1e-06"),
    (dict(temperature=NAN), "temperature nan must"), (dict(temperature=float("inf")), "temperature inf must"),
    (dict(top_p=0.0), "top-p 0.0 must be above 0 and at most 1"), (dict(top_p=1.5), "top-p 1.5 must"),
    (dict(top_p=NAN), "top-p nan must"), (dict(top_k=-1), "top-k -1 must be at least 0"),
    (dict(min_p=1.1), "min-p 1.1 must be at least 0 and at most 1"), (dict(min_p=NAN), "min-p nan must"),
    (dict(num_samples=0), "num_samples 0 must be at least 1"), (dict(batch_size=0), "batch_size 0 must be"),
    (dict(max_new_tokens=0), "max_new_tokens 0 must be at"), (dict(max_new_tokens=-3), "max_new_tokens -3"),
    (dict(max_new_tokens=[2, 0]), "max_new_tokens 0 must"), (dict(seed=-1), "seed -1 must be at least 0"),
    (dict(stop_strings=[""]), "none of them empty"), (dict(stop_strings=["a", ""]), "none of them empty"),
    (dict(stop_strings="ab"), "must be a list of texts"), (dict(stop_strings=[5]), "must be a list of")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_settings_out_of_range_are_refused_by_name_with_their_range(changes, says, temperature, model):
    """max_new_tokens or num_samples of 0 once ran for ever."""
    with pytest.raises(ValueError, match=says):
        generate(model, [[20], [21]], decode=tokenizer().decode, **{"temperature": temperature, **changes})


def test_a_prompt_of_no_tokens_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, [[20], []])
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        next(stream(model, []))


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1000.0])
def test_the_coldest_and_the_hottest_temperature_are_finite(temperature, model, prompts):
    for [completion] in generate(model, prompts[:3], max_new_tokens=8, temperature=temperature):
        assert np.isfinite(completion.logp)


# what is not finite

def broken(name, value, place=(0, 0), **changes):
    """A model with one value that is not finite in a parameter."""
    model = language_model(**changes)
    with torch.no_grad():
        dict(model.named_parameters())[name][place] = value
    return model


FAULTS = [("model.layers.1.mlp.down_proj.weight", NAN, (0, 0)), ("model.norm.weight", float("inf"), (3,)),
          ("model.layers.0.self_attn.q_proj.weight", float("-inf"), (2, 1)),
          ("model.embed_tokens.weight", NAN, (25, 0)),
          ("model.layers.0.input_layernorm.weight", float("inf"), (0,))]


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("name, value, place", FAULTS)
def test_weights_that_are_not_finite_are_named_with_model_row_and_step(name, value, place, temperature):
    """The last word of the vocabulary was said for NaN, and a log-prob of NaN written."""
    rows = [{"prompt": "colours?", "prompt_where": "asked.jsonl:7"}, {"prompt": "red?"}]
    with pytest.raises(
        ValueError,
        match=r"^nanlm: the (logits|log-prob) of new token \d+ of (asked.jsonl:7|pro"
        rf"mpt 1) (are|is) not finite; its parameter {name} holds values that are not finite",
    ):
        answer_rows(broken(name, value, place), tokenizer(), rows, 2, 8, temperature, name="nanlm")


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_token_that_breaks_the_model_later_is_named_with_its_step(temperature, model, prompts):
    [[whole]] = generate(model, prompts[:1], max_new_tokens=8, temperature=temperature)
    step = next(n for n, i in enumerate(whole.ids, 1) if i not in prompts[0])
    untied = language_model(tie_word_embeddings=False)
    head = model.model.embed_tokens.weight.detach().clone()
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": head})
    with torch.no_grad():
        untied.model.embed_tokens.weight[whole.ids[step - 1]] = NAN
    with pytest.raises(ValueError, match=f"model: the log-prob of new token {step + 1} of prompt 0 is not"):
        generate(untied, prompts[:1], max_new_tokens=8, temperature=temperature)
    with pytest.raises(ValueError, match=f"B: the log-prob of new token {step + 1} of the prompt is not"):
        list(stream(untied, prompts[0], 8, temperature, name="B"))


def test_logits_that_overflow_without_a_parameter_to_blame_are_refused_too():
    model = language_model(logit_scale=1e38)
    with pytest.raises(ValueError, match="prompt 0 are not finite$"):
        generate(model, [[20]], max_new_tokens=3)


def nan_on_each_rank(rows):
    try:
        return answer_rows(broken(*FAULTS[3], tie_word_embeddings=False), tokenizer(), rows, 1, 1, 0)
    except ValueError as error:
        return str(error)


def test_what_is_not_finite_on_one_rank_ends_all_of_them_together(model):
    """The last rank's prompt has a token whose embedding is NaN, but no other rank's."""
    word = tokenizer().decode([25])
    rows = [{"prompt": "red"}, {"prompt": word}, {"prompt": "red"}]
    assert [25 in tokenizer().encode_prompt(row["prompt"]) for row in rows] == [False, True, False]
    one, two = on_ranks(2, nan_on_each_rank, rows)
    assert one == two and "prompt 1 are not finite; its parameter model.embed_tokens.weight" in one


# prompts that are too long

def test_prompts_that_are_too_long_are_refused_by_their_place_or_lose_their_oldest_tokens(model):
    rows = [{"prompt": "red"}, {"prompt": "blue " * 600, "prompt_where": "f.jsonl:2"}]
    with pytest.raises(ValueError, match="f.jsonl:2 has .* tokens; with 12 new ones it passes the model's"):
        answer_rows(model, tokenizer(), rows, 1, 12)
    _, [cut] = answer_rows(model, tokenizer(), rows, 1, 12, 0, cut_left=True)
    ids = tokenizer().encode_prompt(rows[1]["prompt"])
    assert cut["ids"] == generate(model, [ids[:1] + ids[-499:]], max_new_tokens=12, temperature=0,
                                  stop_ids=tokenizer().stop_ids)[0][0].ids


def test_a_nul_in_an_answer_is_written_as_what_is_no_text():
    """Our own reader refuses a NUL, so a file of answers must not hold one."""
    class Naught:
        stop_ids = []
        encode_prompt, decode = staticmethod(lambda text, where: [20]), staticmethod(lambda ids: "a\0b")
    [[answer]] = answer_rows(language_model(), Naught, [{"prompt": "x"}], 1, 2)
    assert answer["completion"] == "a\ufffdb"


def test_fused_weights_serve_many_calls(model, prompts):
    fused = Fused(model)
    for seed in (0, 1):
        assert generate(fused, prompts[:3], max_new_tokens=5, seed=seed) == generate(
            model, prompts[:3], max_new_tokens=5, seed=seed
        )
    assert list(stream(fused, prompts[0], 5, 1.0)) == generate(model, prompts[:1], max_new_tokens=5)[0][0].ids


def test_no_prompts_give_no_completions(model):
    assert generate(model, []) == []


@pytest.mark.parametrize("stop_strings", [["e"], ["zzzz"], ["an", "th", "1"]])
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(stop_strings, model, prompts):
    decode = tokenizer().decode
    free = generate(model, prompts, num_samples=2, max_new_tokens=25, seed=2)
    ended = generate(
        model, prompts, num_samples=2, max_new_tokens=25, seed=2, stop_strings=stop_strings, decode=decode
    )
    for whole, cut in zip(sum(free, []), sum(ended, [])):
        first = next((n for n in range(1, 26) if any(s in decode(whole.ids[:n]) for s in stop_strings)), None)
        assert cut.ids == whole.ids[:first] and cut.finish_reason == ("stop" if first else "length")


def test_each_prompt_may_have_its_own_number_of_new_tokens(model, prompts):
    limits = [1 + 3 * i for i in range(len(prompts))]
    free = generate(model, prompts, max_new_tokens=40, seed=1, batch_size=4)
    assert [g[0].ids for g in generate(model, prompts, max_new_tokens=limits, seed=1, batch_size=4)] == [
        g[0].ids[:n] for g, n in zip(free, limits)
    ]


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_stream_gives_the_ids_of_the_completion_one_by_one(temperature, model, prompts):
    [[whole]] = generate(
        model, prompts[:1], max_new_tokens=30, temperature=temperature, stop_ids=[20, 30, 40], seed=3
    )
    ids = stream(model, prompts[0], 30, temperature, stop_ids=[20, 30, 40], seed=3)
    assert next(ids) == whole.ids[0] and [whole.ids[0], *ids] == whole.ids


def test_on_done_hears_of_each_prompt_once_with_all_its_samples(model, prompts):
    heard = {}
    groups = generate(
        model,
        prompts,
        num_samples=3,
        max_new_tokens=10,
        stop_ids=[20, 30, 40],
        batch_size=4,
        on_done=lambda i, group: heard.setdefault(i, []).append(group),
    )
    assert heard == {i: [group] for i, group in enumerate(groups)}


def test_a_cache_that_does_not_fit_is_refused_with_the_batch_size_that_does():
    model = model_config.model_preset("aya-expanse-32b")
    with pytest.raises(
        ValueError,
        match=(
            r"the KV cache of 1000000 rows of 8192 tokens needs 1342178.6 GB, .* GB are free; (lower"
            r" --batch-size to \d+ or less|shorten the prompts)"
        ),
    ):
        engine_size(model, [8000] * 1_000_000, [192] * 1_000_000, 1, 1_000_000, dtype=torch.bfloat16)
    assert engine_size(model_config.model_preset("smoke"), [10, 20], [5, 5], 2, 3) == (
        3,
        32,
        3 * 32 * 2 * 2 * 32 * 4,
    )


# rows of text

def test_an_answer_is_cut_before_its_stop_string_and_keeps_the_ids_that_were_sampled(model):
    rows = questions("train", 5, 0, level="tiny")
    groups = answer_rows(model, tokenizer(), rows, 2, max_new_tokens=60, seed=0, stop_strings=["a", "i"])
    stopped = [a for group in groups for a in group if set("ai") & set(tokenizer().decode(a["ids"]))]
    assert stopped and all(
        not set("ai") & set(a["completion"]) and tokenizer().decode(a["ids"]).startswith(a["completion"])
        for a in stopped
    )


def test_answers_are_decoded_without_the_end_token_and_keep_their_ids_and_reason(model):
    rows = questions("train", 5, 0, level="tiny")
    groups = answer_rows(model, tokenizer(), rows, 2, max_new_tokens=60, seed=0)
    for group in groups:
        for a in group:
            assert (a["ids"][-1] == tokenizer().end_of_turn_id) == (a["finish_reason"] == "stop")
            assert tokenizer().end_of_turn_id not in a["ids"][:-1] and "END_OF_TURN" not in a["completion"]
            assert a["completion"] == tokenizer().decode(a["ids"]).replace("\0", "\ufffd")
    with_messages = [{"prompt_messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    assert answer_rows(model, tokenizer(), with_messages, 2, max_new_tokens=60, seed=0) == groups


# scores

@pytest.fixture(scope="module")
def scored():
    rows = questions("train", 20, 0, level="tiny")
    return [{**row, "completion": "red " * (1 + 7 * (i % 5))} for i, row in enumerate(rows)]


def test_a_text_alone_scores_as_in_a_batch_with_longer_ones(scored):
    judge = reward_model()
    together = score_texts(judge, tokenizer(), scored)
    assert together == pytest.approx([score_texts(judge, tokenizer(), [row])[0] for row in scored], abs=1e-5)
    assert together == pytest.approx(score_texts(judge, tokenizer(), scored, batch_size=3), abs=1e-5)
    assert len({round(score, 4) for score in together}) == 20


def test_the_prompt_of_several_samples_is_computed_once_and_their_scores_are_those_of_each_alone(scored):
    judge, seen = reward_model(), []
    rows = [
        {**scored[i], "completion": word * n}
        for i, word, n in ((0, "red ", 9), (1, "red ", 4), (0, "blue ", 5), (0, "green ", 2))
    ]
    alone = [score_texts(judge, tokenizer(), [row])[0] for row in rows]
    judge.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    together = score_texts(judge, tokenizer(), rows)
    prompts = [len(tokenizer().encode_prompt(scored[i]["prompt"])) for i in (0, 1)]
    answers = [len(tokenizer().encode_answer(row["completion"])) for row in rows]
    assert together == pytest.approx(alone, abs=1e-5) and sum(prompts) + sum(answers) - 4 <= seen[0] <= sum(
        prompts
    ) + sum(
        answers
    )  # answers may begin alike


def test_a_score_depends_on_the_prompt_on_the_last_word_and_on_no_special_name_in_the_text(scored):
    judge, row = reward_model(), scored[0]
    variants = [
        row,
        {**row, "prompt": row["prompt"] + "!"},
        {**row, "completion": row["completion"] + " blue"},
        {**row, "completion": "<PAD>"},
    ]
    scores = score_texts(judge, tokenizer(), variants)
    assert len({round(score, 4) for score in scores}) == 4 and all(np.isfinite(scores))


def test_an_empty_completion_is_scored_like_any_other(scored):
    [score] = score_texts(reward_model(), tokenizer(), [{**scored[0], "completion": ""}])
    assert np.isfinite(score)


@pytest.mark.parametrize("name, value, place", FAULTS)
def test_a_score_that_is_not_finite_is_refused_with_model_row_and_parameter(name, value, place, scored):
    """A NaN arbiter ended in an IndexError after all sampling, or its NaN was written into the file."""
    judge = reward_model()
    with torch.no_grad():
        dict(judge.named_parameters())[name][place] = value
    rows = [{**row, "prompt_where": f"f.jsonl:{i}", "completion": tokenizer().decode([25])}
            for i, row in enumerate(scored, 1)]
    with pytest.raises(
        ValueError,
        match=r"^judge: its score of the answer of f.jsonl:1 is (nan|-?inf), not fin"
        rf"ite; its parameter {name} holds values",
    ):
        score_texts(judge, tokenizer(), rows, name="judge")


def test_texts_beyond_the_positions_are_refused_left_out_or_cut(scored, capfd):
    """A reward model of 512 positions scored 3,000 tokens in silence, and one text of 1 MB took minutes."""
    judge = reward_model()
    rows = [scored[0], {**scored[1], "completion": "red " * 600, "prompt_where": "f.jsonl:2"}, scored[2],
            {**scored[3], "prompt": "blue " * 600}]
    with pytest.raises(
        ValueError,
        match="RM: 2 of 4 texts to score pass its 512 positions .the first, of "
        "f.jsonl:2, has 18[0-9][0-9] tokens.; shorten them, or give --too-long skip or cut-left",
    ):
        score_texts(judge, tokenizer(), rows, name="RM")
    assert score_texts(judge, tokenizer(), rows, name="RM", too_long="cut-left")[1] is None
    assert "1 lose the oldest tokens of their prompts, 1 are not scored" in capfd.readouterr().err
    skipped = score_texts(judge, tokenizer(), rows, name="RM", too_long="skip")
    alone = score_texts(judge, tokenizer(), [rows[0], rows[2]])
    assert skipped[1] is skipped[3] is None and [skipped[0], skipped[2]] == pytest.approx(alone, abs=1e-5)
    assert "RM: 2 of 4 texts to score pass its 512 positions" in capfd.readouterr().err
    cut = score_texts(judge, tokenizer(), [rows[3], rows[0]], too_long="cut-left")
    assert cut[1] == pytest.approx(skipped[0], abs=1e-5)
    ids, _ = tokenizer().encode_chat([{"role": "user", "content": rows[3]["prompt"]},
                                      {"role": "assistant", "content": rows[3]["completion"].strip()}])
    from aya_min.data import Example, collate
    by_hand = collate([Example(np.array(ids[:1] + ids[-511:], np.int32), np.ones(512, bool), 0)])
    by_hand.mask[0, :-len(tokenizer().encode_answer(rows[3]["completion"]))] = False
    with torch.no_grad():
        expected = judge(by_hand.input_ids, by_hand.lengths, by_hand.mask, None)[0].item()
    assert cut[0] == pytest.approx(expected, abs=1e-5)


def test_a_text_of_a_megabyte_is_refused_before_anything_is_computed(scored):
    judge, started = reward_model(), time.perf_counter()
    for text in ("word " * 200_000, "x" * 1_000_000):
        with pytest.raises(ValueError, match="pass its 512 positions"):
            score_texts(judge, tokenizer(), [{**scored[0], "completion": text}])
    assert time.perf_counter() - started < 20


def test_no_texts_have_no_scores_also_when_all_are_too_long(scored):
    judge = reward_model()
    assert score_texts(judge, tokenizer(), []) == []
    long = {**scored[0], "completion": "red " * 600}
    assert score_texts(judge, tokenizer(), [long], too_long="skip") == [None]
