"""Logits to token by hand and by counting; the cached engine against the plain forward; what one request gets, whoever else is in the batch.
And the scores of a reward model, which must not depend on the batch either."""

import numpy as np
import pytest
import torch
from small import language_model, reward_model, tokenizer

from aya_min.reward import score_texts
from aya_min.sampling import KVCache, answer_rows, choose, filtered, generate
from aya_min.world import questions

VOCABULARY = tokenizer().vocab_size


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def prompts():
    """Twelve prompts of 1 to 300 tokens, in no order."""
    rng = np.random.default_rng(0)
    return [rng.integers(13, VOCABULARY, size=size).tolist() for size in (5, 300, 1, 40, 7, 120, 2, 17, 64, 3, 200, 11)]


def kept(probs, **filters):
    """The tokens that a filter leaves of these probabilities."""
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    return torch.isfinite(filtered(torch.tensor([probs]).log(), **settings))[0].nonzero()[:, 0].tolist()


# logits to token

def test_the_frequencies_of_chosen_tokens_are_the_probabilities_at_the_temperature():
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0]), 100_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens, logps = choose(logits.expand(n, 6), uniforms, temperature=0.7)
    probs = (logits / 0.7).softmax(-1)
    frequencies = torch.bincount(tokens, minlength=6) / n
    assert ((frequencies - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt()).all()
    torch.testing.assert_close(logps, probs.log()[tokens])


def test_one_uniform_number_decides_by_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    tokens, _ = choose(logits, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2 ** -24]), temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]


def test_tokens_that_are_filtered_out_are_never_chosen_at_either_end_of_the_uniform_numbers():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)).expand(3, 1000)
    for filters in (dict(top_k=5), dict(top_p=0.3), dict(min_p=0.5)):
        tokens, _ = choose(logits, torch.tensor([0.0, 0.5, 1 - 2 ** -24]), 1.0, **filters)
        allowed = torch.isfinite(filtered(logits[:1], **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}))[0].nonzero()[:, 0]
        assert set(tokens.tolist()) <= set(allowed.tolist())


def test_temperature_0_is_greedy_with_log_probs_at_temperature_1():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    tokens, logps = choose(logits, torch.full((4,), 0.99), temperature=0, top_k=3)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logps, logits.log_softmax(-1).amax(-1))


def test_log_probs_are_of_the_whole_distribution_whatever_the_filter():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    tokens, logps = choose(logits, torch.tensor([0.1, 0.5, 0.9]), temperature=0.5, top_k=1)
    torch.testing.assert_close(logps, (logits / 0.5).log_softmax(-1).amax(-1))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_bfloat16_logits_are_divided_and_normalized_in_fp32():
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(4)).bfloat16()
    _, logps = choose(logits, torch.tensor([0.3, 0.6]), temperature=0.7)
    assert logps.dtype == torch.float32
    tokens, expected = choose(logits.double().float(), torch.tensor([0.3, 0.6]), temperature=0.7)
    torch.testing.assert_close(logps, expected, rtol=0, atol=0)


@pytest.mark.parametrize("top_k, tokens", [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_most_likely_and_0_or_the_vocabulary_or_more_keep_all(top_k, tokens):
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=top_k) == tokens


@pytest.mark.parametrize("top_p, tokens", [(1e-6, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, tokens):
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=top_p) == tokens


@pytest.mark.parametrize("min_p, tokens", [(0.0, [0, 1, 2, 3]), (0.24, [0, 1, 2, 3]), (0.26, [1, 2, 3]), (0.6, [1, 3]), (1.0, [1])])
def test_min_p_is_a_share_of_the_likeliest_tokens_probability(min_p, tokens):
    assert kept([0.1, 0.4, 0.2, 0.3], min_p=min_p) == tokens


def test_top_p_counts_what_top_k_left():
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2, top_p=0.55) == [1]       # 4/7 of what is left
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.55) == [1, 3]


# the cache

@pytest.mark.parametrize("prefill", [1, 2, 17])
def test_logits_token_by_token_with_the_cache_are_those_of_the_whole_forward(prefill, model):
    rng = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(13, VOCABULARY, (3, 24), generator=rng), torch.tensor([prefill, max(1, prefill - 1), 1])
    whole = model(ids)
    cache = KVCache(model.config, 3, 24, "cpu", torch.float32)
    cache.start(prefill, prefill)
    with torch.no_grad():
        last = model(ids[:, :prefill], cache=cache, last=lengths - 1)
        cache.lengths = lengths.clone()
        for step in range(24 - prefill):
            torch.testing.assert_close(last, whole[torch.arange(3), cache.lengths - 1], rtol=0, atol=1e-5)
            cache.start(1, prefill + step + 1)
            last = model(ids[torch.arange(3), cache.lengths][:, None], cache=cache)[:, 0]
            cache.lengths = cache.lengths + 1


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": True}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"logit_scale": 0.25}])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_log_prob_of_what_was_sampled_is_that_of_the_whole_forward(temperature, changes, prompts):
    model = language_model(**changes)
    for prompt, group in zip(prompts, generate(model, prompts, num_samples=2, max_new_tokens=10, temperature=temperature, stop_ids=[20, 30])):
        for ids, logp, _ in group:
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1].detach() / (temperature or 1)
            expected = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
            assert logp == pytest.approx(expected.item(), abs=1e-4)


# one request among others

def test_greedy_alone_is_greedy_in_a_batch_with_prompts_of_1_to_300_tokens(model, prompts):
    together = generate(model, prompts, max_new_tokens=20, temperature=0)
    alone = [generate(model, [prompt], max_new_tokens=20, temperature=0)[0] for prompt in prompts]
    assert [group[0].ids for group in together] == [group[0].ids for group in alone]
    assert len({tuple(group[0].ids) for group in alone}) == len(prompts)
    for prompt, [completion] in zip(prompts, alone):        # and greedy is the argmax of the whole forward
        assert completion.ids == model(torch.tensor([prompt + completion.ids]))[0, len(prompt) - 1:-1].argmax(-1).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 5, 1000])
def test_what_a_request_samples_does_not_depend_on_the_batch(batch_size, model, prompts):
    whole = generate(model, prompts, num_samples=3, max_new_tokens=15, temperature=0.7, stop_ids=[20, 30, 40], seed=4)
    cut = generate(model, prompts, num_samples=3, max_new_tokens=15, temperature=0.7, stop_ids=[20, 30, 40], seed=4, batch_size=batch_size)
    assert [[c.ids for c in group] for group in cut] == [[c.ids for c in group] for group in whole]
    part = generate(model, prompts[4:6], num_samples=3, max_new_tokens=15, temperature=0.7, stop_ids=[20, 30, 40], seed=4, numbers=[4, 5])
    assert [[c.ids for c in group] for group in part] == [[c.ids for c in group] for group in whole[4:6]]


def test_k_samples_of_a_prompt_are_k_separate_requests(model, prompts):
    together = generate(model, prompts[:4], num_samples=3, max_new_tokens=12, seed=1)
    apart = generate(model, [prompt for prompt in prompts[:4] for _ in range(3)], max_new_tokens=12, seed=1)
    assert [c.ids for group in together for c in group] == [group[0].ids for group in apart]
    assert all(len({tuple(c.ids) for c in group}) == 3 for group in together)


def test_two_calls_are_independent_and_another_seed_gives_other_samples(model, prompts):
    first = generate(model, prompts[:3], max_new_tokens=12, seed=1)
    generate(model, prompts[5:9], max_new_tokens=30, seed=2)
    assert generate(model, prompts[:3], max_new_tokens=12, seed=1) == first != generate(model, prompts[:3], max_new_tokens=12, seed=2)


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
    assert {len(c.ids) for group in groups for c in group} == {max_new_tokens} and groups[0][0].finish_reason == "length"


def test_the_last_position_of_the_model_can_be_used_and_one_more_is_refused(model):
    prompt = [20] * 500
    assert len(generate(model, [prompt], max_new_tokens=12)[0][0].ids) == 12
    with pytest.raises(ValueError, match="prompt 1 has 500 tokens; with 13 new ones it passes the model's 512; shorten it or lower --max-new-tokens"):
        generate(model, [[20], prompt], max_new_tokens=13)


@pytest.mark.parametrize("changes", [dict(temperature=-1), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1), dict(min_p=1.1)])
def test_settings_out_of_range_are_refused_with_their_range(changes, model):
    with pytest.raises(ValueError, match=r"temperature .* must be >= 0, top-p .* in \(0, 1\], top-k .* >= 0, min-p .* in \[0, 1\]"):
        generate(model, [[20]], **changes)


def test_a_training_model_is_handed_back_in_training(model):
    model.train()
    generate(model, [[20]], max_new_tokens=1)
    assert model.training
    model.eval()


def test_no_prompts_give_no_completions(model):
    assert generate(model, []) == []


# rows of text

def test_answers_are_decoded_without_the_end_token_and_keep_their_ids_and_reason(model):
    rows = questions("train", 5, 0, level="tiny")
    groups = answer_rows(model, tokenizer(), rows, 2, max_new_tokens=60, seed=0)
    for group in groups:
        for a in group:
            assert (a["ids"][-1] == tokenizer().end_of_turn_id) == (a["finish_reason"] == "stop")
            assert tokenizer().end_of_turn_id not in a["ids"][:-1] and "END_OF_TURN" not in a["completion"]
            assert a["completion"] == tokenizer().decode(a["ids"])
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


def test_a_score_depends_on_the_prompt_on_the_last_word_and_on_no_special_name_in_the_text(scored):
    judge, row = reward_model(), scored[0]
    variants = [row, {**row, "prompt": row["prompt"] + "!"}, {**row, "completion": row["completion"] + " blue"}, {**row, "completion": "<PAD>"}]
    scores = score_texts(judge, tokenizer(), variants)
    assert len({round(score, 4) for score in scores}) == 4 and all(np.isfinite(scores))


def test_an_empty_completion_is_scored_like_any_other(scored):
    [score] = score_texts(reward_model(), tokenizer(), [{**scored[0], "completion": ""}])
    assert np.isfinite(score)
