"""The learned router by hand: its targets and their limits, its items, what is held out, whom it chooses,
and what a choice is worth."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CPU, language_model, reward_model, router, run, tokenizer

from aya_min import stages, weights
from aya_min import router as routing
from aya_min.config import Routing
from aya_min.data import slots_of
from aya_min.files import write_jsonl
from aya_min.losses import router_kl, router_loss, router_targets
from aya_min.model import Router

NONE = -math.inf


def row(*candidates, prompt="red", **more):
    """A row of candidates: teacher, completion, reward and, it may be, finish reason of each."""
    keys = ("teacher", "completion", "reward", "finish_reason")
    return {"prompt": prompt, "candidates": [dict(zip(keys, c)) for c in candidates], **more}


def load(path, rows, **changes):
    write_jsonl(path, rows)
    return routing.load_candidates([path], tokenizer(), 64, Routing(**changes))


# ---- targets and loss --------------------------------------------------------------------------------------

def test_the_kl_by_hand():
    """Targets (3/4, 1/4) against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)."""
    targets = router_targets(torch.tensor([[2 * math.log(3), 0.0]]), 2.0)
    torch.testing.assert_close(targets, torch.tensor([[0.75, 0.25]]))
    found = router_kl(targets, torch.tensor([[0.5, 0.5]]).log())
    assert found.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert router_kl(targets, targets.log()).item() == pytest.approx(0, abs=1e-7)


def test_with_tau_to_zero_the_kl_is_the_cross_entropy_on_the_best_and_with_tau_to_infinity_uniform():
    rewards = torch.tensor([[0.3, 0.5, -1.0], [4.0, NONE, 1.0]])
    logps = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    torch.testing.assert_close(router_kl(router_targets(rewards, 1e-3), logps), -logps[[0, 1], [1, 0]])
    assert router_targets(rewards, 1e9).tolist() == [pytest.approx([1 / 3] * 3), pytest.approx([0.5, 0, 0.5])]


def test_a_teacher_without_an_answer_gets_no_probability_and_leaves_a_finite_gradient():
    logits = torch.zeros(1, 3, requires_grad=True)
    targets = router_targets(torch.tensor([[1.0, NONE, 1.0]]), 1.0)
    router_kl(targets, logits.log_softmax(1)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3 - 1 / 2, 1 / 3, 1 / 3 - 1 / 2]]))


def test_the_loss_says_what_the_choice_is_worth(tmp_path):
    rows = [row(("T", "a", 1.0), ("U", "b", 3.0), ("V", "c", 0.5), language="fr"),
            row(("T", "a", 2.0), ("U", "", 1.0), ("V", "c", -1.0), language="de")]
    items, model = load(tmp_path / "c.jsonl", rows), router()
    with torch.no_grad():
        model.router.weight.zero_()                     # all are equally likely: the first is chosen
    batch = routing.collate_routed(items, 0, slots_of(items))
    loss, metrics = router_loss(1.0)(model, batch)
    targets = router_targets(batch.rewards, 1.0)
    uniform = torch.full((2, 3), 1 / 3).log()
    torch.testing.assert_close(loss, router_kl(targets, uniform).sum())
    means = {name: (sums / counts.clamp(min=1)).tolist() for name, (sums, counts) in metrics.items()}
    assert means["agreement"][:2] == [1, 0] and means["regret"][:2] == [0, 2]       # de, fr
    assert means["reward"][:2] == [2, 1] and means["answered"][:2] == [1, 1]


def test_a_choice_without_an_answer_counts_in_answered_alone(tmp_path):
    [item] = load(tmp_path / "c.jsonl", [row(("T", " ", 5.0), ("U", "b", 3.0), ("V", "c", 0.5))])
    model = router()
    torch.nn.init.zeros_(model.router.weight)
    _, metrics = router_loss(1.0)(model, routing.collate_routed([item]))
    assert {name: value.flatten().tolist() for name, value in metrics.items() if name != "loss"} == {
        "agreement": [0, 1], "answered": [0, 1], "reward": [0, 0], "regret": [0, 0]}


def test_a_new_router_begins_with_all_teachers_equally_likely(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [row(("T", "a", 1.0), ("U", "b", 3.0))])
    weights.save(tmp_path / "A", language_model(), tokenizer())
    build = stages.builder("router", [tmp_path / "c.jsonl"], Routing(tau=0.5))
    model, _ = weights.load(tmp_path / "A", trunk=build)
    assert model.config.teachers == ["T", "U"] and model.config.tau == 0.5
    torch.testing.assert_close(model.model.state_dict(), language_model().model.state_dict())
    logps = model(torch.tensor([[5, 20, 30], [5, 21, 0]]), torch.tensor([3, 2]))
    torch.testing.assert_close(logps, torch.full((2, 2), 0.5).log())


# ---- items -------------------------------------------------------------------------------------------------

def test_a_teachers_reward_is_the_mean_of_its_usable_answers(tmp_path):
    rows = [row(("U", "a", 1.0), ("T", "b c", 2.0), ("U", "d", 4.0), ("U", "e", None),
                ("T", "f", 9, "length"), ("V", "", 7.0)),
            row(("U", "", 1.0), ("T", "b", None)), row(("V", "g", 1))]
    items = load(tmp_path / "c.jsonl", rows)
    assert [item.rewards for item in items] == [(2.0, 2.5, NONE), (NONE, NONE, 1.0)]
    assert items[0].teachers == ("T", "U", "V") and items[0].samples == 2
    assert load(tmp_path / "d.jsonl", rows, keep_cut=True)[0].rewards == (5.5, 2.5, NONE)
    assert items[0].ids.tolist() == tokenizer().encode_prompt("red") and not items[0].mask.any()
    assert items[0].where.endswith("c.jsonl:1")


def test_prompts_that_nobody_answered_are_counted_and_left_out(tmp_path, capsys):
    rows = [row(("U", "", 1.0), ("T", "b", None)), row(("U", "a", 1.0), ("T", "b", 2.0))]
    assert len(load(tmp_path / "c.jsonl", rows)) == 1
    assert "1 of 2 prompts have no usable answer with a reward and are left out" in capsys.readouterr().err


@pytest.mark.parametrize("rows, says", [
    ([{"prompt": "red"}], r"c.jsonl:1: no 'candidates' in keys"),
    ([{"prompt": "red", "candidates": []}], r"c.jsonl:1: no 'candidates'"),
    ([row(("T", "a", 1.0), ("U", "b", "3"))], r"c.jsonl:1: candidates\[1\] .* needs a teacher, a completion"),
    ([row(("T", "a", True), ("U", "b", 3))], r"c.jsonl:1: candidates\[0\]"),
    ([row(("T", 5, 1.0), ("U", "b", 3))], r"c.jsonl:1: candidates\[0\]"),
    ([row(("T", "a", 1.0)), row(("T", "b", 3))], "all candidates are of the teacher T; a router chooses"),
    ([row(("T", "a", None), ("U", "b", None))], "no candidate has a reward; score them"),
    ([row(("T", "", 1.0), ("U", "b", None))], "1 of 1 prompts have no usable answer with a reward; nothing")])
def test_candidates_that_teach_nothing_are_refused_with_their_place(rows, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "c.jsonl", rows)


def test_the_held_out_share_is_drawn_by_the_seed_and_no_row_is_lost(tmp_path):
    rows = [row(("T", "a", 1.0), ("U", "b", 3.0), prompt=f"p {i}") for i in range(30)]
    items, model = load(tmp_path / "c.jsonl", rows), router(teachers="TU")

    def held_out(**changes):
        kept, held = routing.arrange(model, items, [], Routing(**changes))
        assert sorted(i.where for i in kept + held) == sorted(i.where for i in items)
        return [i.where for i in held]
    assert len(held_out()) == 3 and held_out() == held_out(seed=0) != held_out(seed=1)
    assert held_out(held_out=0.0) == []
    assert routing.arrange(model, items, items[:2], Routing())[0] == items
    with pytest.raises(ValueError, match="--held-out 0.01 of 30 prompts holds out 0"):
        held_out(held_out=0.01)


def test_no_prompt_is_held_out_and_learned_from(tmp_path):
    rows = [row(("T", f"a {i}", 1.0), ("U", "b", 3.0), prompt=f"p {i % 4}") for i in range(40)]
    kept, held = routing.arrange(router(teachers="TU"), load(tmp_path / "c.jsonl", rows), [],
                                 Routing(held_out=0.25))
    assert len(kept) == 30 and not {i.ids.tobytes() for i in kept} & {i.ids.tobytes() for i in held}


def test_held_out_rows_of_fewer_teachers_get_the_routers_order_and_unknown_ones_are_refused(tmp_path):
    [item] = load(tmp_path / "c.jsonl", [row(("V", "a", 1.0), ("T", "b", 3.0))])
    [fitted], _ = routing.arrange(router(), [item], [item], Routing())
    assert fitted.teachers == ("T", "U", "V") and fitted.rewards == (3.0, NONE, 1.0)
    with pytest.raises(ValueError, match="c.jsonl:1: its file has candidates of V, for which the router is"):
        routing.arrange(router(teachers="TU"), [item], [], Routing())


# ---- at work -----------------------------------------------------------------------------------------------

def test_the_choice_is_the_likeliest_teacher_whatever_the_batch(tmp_path):
    rows = [row(("T", "a", 1.0), ("U", "b", 3.0), ("V", "c", 2.0), prompt=f"{word} " * (1 + i))
            for i, word in enumerate("red blau vert rojo nine drei quatre uno what".split())]
    items, model = load(tmp_path / "c.jsonl", rows), router()
    alone = [model(torch.from_numpy(i.ids).long()[None], torch.tensor([len(i.ids)])).argmax().item()
             for i in items]
    assert len(set(alone)) > 1
    for size in (1, 4, 64):
        assert routing.choices(model, items, batch_size=size) == ["TUV"[i] for i in alone]


def test_routes_are_compared_by_hand(tmp_path):
    """Trained on: T is best in fr and over all, U in de."""
    before = load(tmp_path / "a.jsonl", [row(("T", "a", 9.0), ("U", "b", 0.0), language="fr"),
                                         row(("T", "a", 0.0), ("U", "b", 2.0), language="de")])
    items = load(tmp_path / "b.jsonl", [row(("T", "a", 1.0), ("U", "b", 3.0), language="fr"),
                                        row(("T", "a", 4.0), ("U", "", 9.0), language="de")])
    found = routing.compare_routes(before, items, ["U", "T"])
    about = {route: [f[key] for key in ("reward", "regret", "answered", "agreement")]
             for route, f in found.items()}
    assert about == {"reward": [3.5, 0, 1, 1], "fixed": [1, 2, 0.5, 0], "learned": [3.5, 0, 1, 1],
                     "random": [8 / 3, 2 / 3, 0.75, 0.5], "single": [2.5, 1, 1, 0.5]}
    sizes = [len(tokenizer().encode_answer(text)) for text in ("a", "b", "a", "")]
    assert found["reward"]["tokens"] == sum(sizes) / 2
    assert found["learned"]["tokens"] == (sizes[1] + sizes[2]) / 2
    assert found["random"]["tokens"] == sum(sizes) / 4
    table = routing.routes_table(found)
    assert [line.split()[0] for line in table] == ["route", "reward", "fixed", "learned", "random", "single"]


def test_a_router_learns_which_teacher_knows_which_language(tmp_path):
    """Each teacher is good at one kind of prompt, which the router tells on prompts that it has not seen."""
    def rows(start, count):
        return [row(("T", "a", float(i % 2)), ("U", "b", float(1 - i % 2)),
                    prompt=f"{('red', 'vert')[i % 2]} {'one two three four'.split()[i // 2 % 4]} {i}")
                for i in range(start, start + count)]
    write_jsonl(tmp_path / "data.jsonl", rows(0, 64))
    write_jsonl(tmp_path / "held.jsonl", rows(64, 16))
    model = router(teachers="TU")
    torch.nn.init.zeros_(model.router.weight)
    settings = Routing(batch_size=16, max_steps=20, learning_rate=3e-3, warmup_steps=2, tau=0.2)
    out = stages.train_stage("router", model, tokenizer(), [tmp_path / "data.jsonl"], settings,
                             tmp_path / "run", CPU, eval_data=[tmp_path / "held.jsonl"])
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["agreement"] == 1 and found["regret"] == 0 and found["reward"] == 1
    about = json.loads((out / "config.json").read_text())
    assert about["architectures"] == ["CohereRouter"] and about["teachers"] == ["T", "U"]


# ---- folders -----------------------------------------------------------------------------------------------

def test_a_routers_folder_comes_back_as_it_was_with_its_teachers_in_order(tmp_path):
    model = router(teachers=["runs/b", "runs/a"])
    weights.save(tmp_path / "R", model, tokenizer())
    loaded, its_tokenizer = weights.load(tmp_path / "R")
    assert isinstance(loaded, Router) and its_tokenizer.meaning == tokenizer().meaning
    assert loaded.config == model.config and loaded.config.teachers == ["runs/b", "runs/a"]
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("change, says", [
    ({"teachers": ["T"]}, "teachers"), ({"teachers": ["T", "T"]}, "teachers"),
    ({"teachers": "TU"}, "teachers"), ({"teachers": None}, "teachers"),
    ({"tau": 0}, "tau"), ({"tau": "1"}, "tau"),
    ({"teachers": ["T", "U", "V", "W"]}, "router.weight has shape")])
def test_a_config_that_does_not_fit_the_router_is_refused_with_its_file(change, says, tmp_path):
    weights.save(tmp_path / "R", router(), tokenizer())
    path = tmp_path / "R" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=says) as error:
        weights.load_meta(tmp_path / "R")
    assert str(tmp_path / "R") in str(error.value)


def test_the_decoder_of_any_model_folder_can_be_the_trunk_but_no_router_for_other_teachers(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [row(("T", "a", 1.0), ("U", "b", 3.0))])
    build = stages.builder("router", [tmp_path / "c.jsonl"], Routing())
    for name, model in (("RM", reward_model()), ("same", router(teachers="TU")), ("other", router())):
        weights.save(tmp_path / name, model, tokenizer())
    loaded, _ = weights.load(tmp_path / "RM", trunk=build)
    torch.testing.assert_close(loaded.model.state_dict(), reward_model().model.state_dict())
    loaded, _ = weights.load(tmp_path / "same", trunk=build)
    torch.testing.assert_close(loaded.state_dict(), router(teachers="TU").state_dict())
    with pytest.raises(ValueError, match=r"a router for other teachers \(T U V\) than those of .* \(T U\)"):
        weights.load(tmp_path / "other", trunk=build)


def test_a_router_with_a_nan_names_its_parameter(tmp_path):
    weights.save(tmp_path / "R", router(), tokenizer())
    state = load_file(tmp_path / "R" / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, tmp_path / "R" / "model.safetensors")
    model, _ = weights.load(tmp_path / "R")
    with pytest.raises(ValueError, match="not finite; its parameter model.norm.weight"):
        routing.choices(model, [routing.prompt_example(tokenizer(), {"prompt_messages": "red"}, 64)])


def test_a_stopped_router_goes_on_to_the_same_weights(world, tmp_path):
    whole = run("router", world, tmp_path / "whole", max_steps=4, schedule="constant")
    parts = run("router", world, tmp_path / "parts", max_steps=2, schedule="constant")
    run("router", world, parts, resume=True, max_steps=4, schedule="constant")
    states = [load_file(folder / "model" / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
