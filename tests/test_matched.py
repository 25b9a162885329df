"""The three encoders: what each sees, masking by hand, one size; the claim on matched conditions."""

import math
from types import SimpleNamespace

import pytest
import torch

from aya_min import real_text, text_encoders
from aya_min.claims import matched as claims
from aya_min.experiments import Figure, measured
from aya_min.files import write_jsonl
from aya_min.text_encoders import (KINDS, PARITY, WINDOW, Encoder, WithHead, batches, fit, mask_tokens,
                                   padded, turned)

V, W, P = 40, 16, 12


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(kind, **more):
    torch.manual_seed(0)
    return Encoder(kind, **{"num_ids": V, "width": W, "num_layers": 2, "num_places": P, **more})


def rows(seed=0, num=4):
    lengths = torch.randint(4, P + 1, (num,), generator=seeded(seed)).tolist()
    return padded([torch.randint(5, V, (n,), generator=seeded(seed + n)).tolist() for n in lengths], 0)


# ---- masking -----------------------------------------------------------------------------------------------

def test_masking_by_hand(monkeypatch):
    """Of the first row 0.1 hides and 0.2 does not; 0.79 becomes the mask, 0.85 a random token, 0.95 stays."""
    drawn = torch.tensor([[[0.1, 0.2, 0.149, 0.0, 0.0]], [[0.79, 0.0, 0.85, 0.95, 0.1]]])
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: drawn)
    monkeypatch.setattr(torch, "randint", lambda low, high, shape, generator: torch.full(shape, high - 1))
    ids = torch.tensor([[11, 12, 13, 14, 15]])
    seen, hidden = mask_tokens(ids, torch.tensor([[True] * 4 + [False]]), 4, V, 5, None)
    assert seen.tolist() == [[4, 12, V - 1, 14, 15]]
    assert hidden.tolist() == [[True, False, True, True, False]]


def test_of_many_tokens_as_many_are_hidden_and_changed_as_bert_says():
    ids, everywhere = torch.full((200, 500), 7), torch.ones(200, 500, dtype=torch.bool)
    seen, hidden = mask_tokens(ids, everywhere, 4, V, 5, seeded())
    assert hidden.float().mean().item() == pytest.approx(0.15, abs=0.005)
    assert (seen[hidden] == 4).float().mean().item() == pytest.approx(0.8, abs=0.01)
    # one random token in V - 5 is the old one
    assert (seen[hidden] == 7).float().mean().item() == pytest.approx(0.1 + 0.1 / (V - 5), abs=0.01)
    assert (seen[~hidden] == 7).all() and seen.min() >= 4


def test_neither_bos_nor_eos_nor_padding_is_ever_hidden(monkeypatch):
    monkeypatch.setattr(text_encoders, "MASKED", 1.0)
    model, (ids, lengths) = encoder("masked"), rows()
    _, count = model.loss(ids, lengths, seeded(), 4, 5)
    assert count == int((lengths - 2).sum())


# ---- what each sees ----------------------------------------------------------------------------------------

def changed(ids, row, place):
    other = ids.clone()
    other[row, place] = (ids[row, place] + 1 - 5) % (V - 5) + 5
    return other


def log_probs_of_all(model, ids, lengths):
    """(directions, B, T, V): the distribution of each token, whatever it is."""
    x = model.layers(model.embed(ids), lengths)
    x = model.project(x) if model.kind == "both-ways" else x[None]
    return (model.norm(x) @ model.embed.weight.T).log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["both-ways", "causal"])
def test_no_distribution_of_a_token_depends_on_that_token(kind):
    """The forward one of token t is that at t - 1, the backward one that at t + 1. Neither moves when token t
    is another; the next ones in each direction do."""
    model, (ids, lengths) = encoder(kind), rows()
    before = log_probs_of_all(model, ids, lengths)
    for row in range(len(ids)):
        for t in range(1, int(lengths[row]) - 1):
            after = log_probs_of_all(model, changed(ids, row, t), lengths)
            moved = (after - before).abs().amax(-1)[:, row]                 # (directions, T)
            assert (moved[0, :t] == 0).all() and (moved[0, t:lengths[row]] > 0).all()
            if kind == "both-ways":
                assert (moved[1, t + 1:lengths[row]] == 0).all() and (moved[1, :t + 1] > 0).all()


@torch.no_grad()
def test_a_token_s_own_log_prob_is_read_from_the_distribution_without_it():
    """next_logps holds the forward log-prob of token t + 1 and the backward one of token t at place t."""
    model, (ids, lengths) = encoder("both-ways"), rows()
    every, found = log_probs_of_all(model, ids, lengths), model.next_logps(ids, lengths)
    for row, n in enumerate(lengths.tolist()):
        for t in range(n - 1):
            assert found[0, row, t] == pytest.approx(every[0, row, t, ids[row, t + 1]].item(), abs=1e-5)
            assert found[1, row, t] == pytest.approx(every[1, row, t + 1, ids[row, t]].item(), abs=1e-5)
        assert (found[:, row, n - 1:] == 0).all()


@torch.no_grad()
def test_a_hidden_token_speaks_for_nothing_and_all_others_do():
    model, (ids, lengths) = encoder("masked"), rows(num=1)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[0, 2] = True
    seen = ids.masked_fill(hidden, 4)
    states = lambda given: model.layers(model.embed(given), lengths)[0, 2]
    first = model.masked_logps(seen, hidden, ids, lengths)
    assert first.item() == pytest.approx(
        (model.norm(states(seen)) @ model.embed.weight.T).log_softmax(-1)[ids[0, 2]].item(), abs=1e-5)
    for place in set(range(int(lengths[0]))) - {2}:
        assert (states(changed(seen, 0, place)) != states(seen)).any()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    model, (ids, lengths) = encoder(kind), rows()
    whole = model.states(ids, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = model.states(ids[row:row + 1, :n], lengths[row:row + 1])[0]
        torch.testing.assert_close(whole[row, :n], alone, rtol=1e-4, atol=1e-5)
    head = WithHead(model, 3)
    torch.nn.init.normal_(head.head.weight)
    more = torch.cat((ids, ids.new_zeros(len(ids), 1)), 1)[:, :P]
    torch.testing.assert_close(head(ids, lengths), head(more, lengths), rtol=1e-4, atol=1e-5)


def test_turning_by_hand():
    x, lengths = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([3, 4])
    assert turned(x, lengths).tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]
    both = torch.stack((x, 10 * x), -1)
    assert torch.equal(turned(turned(both, lengths), lengths), both)
    assert torch.equal(turned(both, lengths)[..., 1], 10 * turned(x, lengths))


# ---- one size, one loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("width,num_layers,num_places", [(16, 2, 96), (64, 2, 192), (96, 3, 192)])
def test_all_have_one_size(width, num_layers, num_places):
    sizes = [sum(p.numel() for p in encoder(kind, num_ids=1000, width=width, num_layers=num_layers,
                                            num_places=num_places).parameters()) for kind in KINDS]
    assert max(sizes) <= (1 + PARITY) * min(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_loss_is_about_that_of_chance_and_counts_every_prediction(kind):
    model, (ids, lengths) = encoder(kind), rows(num=30)
    nats, count = model.loss(ids, lengths, seeded(), 4, 5)
    predicted = int((lengths - 1).sum())
    assert count == {"both-ways": 2 * predicted, "causal": predicted}.get(kind, count)
    assert nats.item() / count == pytest.approx(math.log(V), abs=0.3)


def test_a_batch_is_the_sum_of_its_rows_in_loss_and_gradient():
    for kind in ("both-ways", "causal"):
        model, (ids, lengths) = encoder(kind), rows()
        found = []
        for parts in ([slice(0, 4)], [slice(i, i + 1) for i in range(4)]):
            model.zero_grad()
            losses = [model.loss(ids[part], lengths[part], None, 4, 5)[0] for part in parts]
            sum(losses).backward()
            found.append((sum(losses).item(), sum(p.grad.square().sum().item() for p in model.parameters())))
        assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_learns_a_rule_of_its_own_text(kind):
    """Texts in which every token is the one before it plus 1: what is learned is far below chance."""
    def batch(generator):
        first = torch.randint(5, V - P, (16, 1), generator=generator)
        return first + torch.arange(P), torch.full((16,), P)
    model, generator = encoder(kind), seeded()
    steps = [lambda: model.loss(*batch(generator), generator, 4, 5)] * 150
    assert fit(model, steps, 1e-2) < 0.5 * math.log(V - 5)


def test_a_frozen_encoder_stays_and_its_head_learns():
    model = WithHead(encoder("both-ways"), 2, frozen=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, lengths = rows(num=8)
    labels = ids[:, 1] % 2
    loss = lambda: (torch.nn.functional.cross_entropy(model(ids, lengths), labels, reduction="sum"), 8)
    fit(model, [loss] * 5, 1e-2)
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert set(before) - set(same) == {"head.weight", "head.bias"}


def test_batches_pass_over_all_rows_before_any_comes_again_and_hold_similar_lengths():
    lengths = torch.randint(1, 50, (4 * WINDOW,), generator=seeded()).tolist()
    found = list(batches(lengths, 4, 2 * WINDOW + 3, seeded()))
    assert len(found) == 2 * WINDOW + 3 and {len(batch) for batch in found} == {4}
    for each in (found[:WINDOW], found[WINDOW:2 * WINDOW]):
        assert sorted(row for batch in each for row in batch) == list(range(4 * WINDOW))
        of = [[lengths[row] for row in batch] for batch in each]
        ends = sorted((min(some), max(some)) for some in of)
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))
    assert found[:WINDOW] != found[WINDOW:2 * WINDOW] == list(batches(lengths, 4, 32, seeded()))[WINDOW:]


def test_batches_of_fewer_rows_than_a_window_repeat_them_equally():
    found = [row for batch in batches([5, 6, 7], 6, WINDOW, seeded()) for row in batch]
    assert all(found.count(row) == 6 * WINDOW // 3 for row in range(3))


# ---- the claim ---------------------------------------------------------------------------------------------

CODES = "en", "de", "hi"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Two topics of 14 ids each, in three languages."""
    monkeypatch.setattr(real_text, "FOLDER", tmp_path)
    write_jsonl(tmp_path / "classification.jsonl", [
        {"id": f"{topic}/{n}", "language": code, "text": f"{topic} {n}", "label": topic}
        for code in CODES for topic in real_text.TOPICS[:2] for n in range(14)])
    return lambda seed: SimpleNamespace(seed=seed, recipe=SimpleNamespace(
        corpus=960, eval_split="test" if seed else "validation"))


def ids(rows):
    return {row["id"] for row in rows}


@pytest.mark.parametrize("seed,num", [(0, 4), (1, 20)])
def test_every_reported_id_is_in_one_fold_which_trains_on_all_others(lab, seed, num):
    found = claims.folds(lab(seed))
    reported = [ids(test) for _, test in found]
    assert sum(map(len, reported)) == len(set().union(*reported)) == num
    for train, test in found:
        assert not ids(train) & ids(test) and len(test) == len(CODES) * len(ids(test))
        assert len(ids(train) | ids(test)) == 20
    other = ids(real_text.topics("preference"))
    assert not any(ids(rows) & other for pair in found for rows in pair)
    assert set().union(*reported) >= ids(real_text.topics("test" if seed else "validation"))


def with_arms(lab):
    """A lab whose arms are made anew each time."""
    lab.arm, lab.made = lambda name: claims.ARMS[name](lab), lambda name: {"folder": "made"}
    return lab


def test_matched_arms_choose_both_rates_and_untuned_ones_none(lab, monkeypatch):
    """Pre-training is best at 3e-3 in the short run, fine-tuning at 1e-2."""
    loss = {**dict.fromkeys(claims.RATES, 2.0), 3e-3: 1.0}
    monkeypatch.setattr(claims, "pretrained", lambda lab, kind, rate, share=1.0: {
        "loss": loss[rate], "folder": (kind, rate, share)})
    lab_of = lambda seed: with_arms(lab(seed))
    monkeypatch.setattr(claims, "right", lambda lab, task, kind, before, rate, *rest: [float(rate == 1e-2)])
    for arm in claims.MATCHED:
        kind, before, rate, frozen = claims.chosen(lab_of(1), arm, claims.TOPICS)
        assert before["folder"] == (claims.KIND[arm], 3e-3, 1.0) and rate == 1e-2 and not frozen
    for arm, name in claims.UNTUNED.items():
        kind, before, rate, frozen = claims.chosen(lab_of(1), arm, claims.TOPICS)
        assert before["folder"] == (claims.KIND[name], claims.RATES[0], claims.SHORT)
        assert rate == claims.RATES[0] and frozen == (name == claims.ELMO)


def test_a_condition_that_differs_loses_the_comparison(lab, monkeypatch):
    same = {"sentences": 5, "training_steps": 4, "tokens": 90, "tuned": 6, "frozen": False,
            "parameters": 1000}
    found = {arm: dict(same) for arm in claims.MATCHED}
    monkeypatch.setattr(claims, "conditions", lambda lab, arm: dict(found[arm]))
    figure = Figure("", claims.differing, "below", 0.5, ())
    found[claims.GPT]["parameters"] = 1029
    assert measured(lab(1), figure)["value"] == 0.0
    found[claims.GPT]["parameters"] = 1031
    assert measured(lab(1), figure)["value"] == pytest.approx(1 / 6)
    found[claims.BERT]["tuned"] = 7
    assert measured(lab(1), figure)["value"] == pytest.approx(2 / 6)
    assert measured(lab(1), figure)["verdict"] != "shown"


def test_competitive_is_within_the_margin(lab, monkeypatch):
    """Of 40 texts 20 and 21 are right, at a difference of 0.025."""
    right = {claims.ELMO: 20, claims.BERT: 21}
    monkeypatch.setattr(claims, "answers", lambda lab, arm, task: [
        (str(i), "en", float(i < right[arm])) for i in range(40)])
    found = measured(lab(1), claims.less(claims.ELMO, claims.BERT, claims.TOPICS, -claims.MARGIN))
    assert found["value"] == pytest.approx(-1 / 40) and found["none"] == -claims.MARGIN


def test_learned_is_better_than_the_most_frequent_label(lab, monkeypatch):
    """Of 60 texts 30 are of either topic, of which one is always said: 0.5. 33 are right: 0.05 more."""
    monkeypatch.setattr(claims, "answers", lambda lab, arm, task: [
        (str(i), "en", float(i < 33)) for i in range(60)])
    for figure in claims.learned(claims.TOPICS):
        found = measured(lab(1), figure)
        assert found["value"] == pytest.approx(0.05) and found["none"] == 0
        assert found["verdict"] == "not shown"


def test_sentences_of_all_codes_are_told_apart_and_no_id_is_both_trained_on_and_reported(lab, tmp_path):
    write_jsonl(tmp_path / "parallel.jsonl", [
        {"id": f"{n}", "language": code, "text": f"{code} {n}"} for code in CODES for n in range(400)])
    labels, parts, tuning = claims.TASKS[claims.CODES]
    some = lab(1)
    some.recipe.corpus = 144000
    (train, test), = parts(some)
    assert {row["label"] for row in test} == set(CODES) < set(labels)
    assert not ids(train) & ids(test) and not (ids(train) | ids(test)) & ids(tuning(some)[1])


def test_tuning_is_counted():
    assert set(claims.TUNED.values()) == {2 * len(claims.RATES)} and set(claims.TUNED) == set(claims.MATCHED)
