"""Critiques for reward models: what is encoded, refused and scored, with critiques and without."""

import json

import numpy as np
import pytest
import torch
from small import CPU, language_model, reward_model, run, tokenizer, write_world

from aya_min import config, critiques, weights
from aya_min.data import collate_pairs, load_examples, load_prompts
from aya_min.files import write_jsonl
from aya_min.kto import load_labelled
from aya_min.losses import reward_loss
from aya_min.model_config import RewardConfig
from aya_min.reward import score_texts
from aya_min.stages import STAGES, train_stage

ROW = {"prompt": "hi", "chosen": "yes yes", "rejected": "no", "chosen_critique": "right",
       "rejected_critique": " wrong word\n"}
PLAIN = {key: ROW[key] for key in ("prompt", "chosen", "rejected")}
HALF = {key: ROW[key] for key in ROW if key != "rejected_critique"}


@pytest.fixture
def write(tmp_path):
    def to_file(*rows, name="rows.jsonl"):
        write_jsonl(tmp_path / name, rows)
        return tmp_path / name
    return to_file


def pairs_of(path, stage="reward", limit=400, **settings):
    return STAGES[stage].load([path], tokenizer(), limit, STAGES[stage].settings(**settings))


def trained_with_critiques(**changes):
    model = reward_model(**changes)
    model.config.critiques = True
    return model


# ---- what is encoded ---------------------------------------------------------------------------------------

def test_a_critique_follows_the_end_of_the_answer_and_is_not_supervised(write):
    [pair] = pairs_of(write(ROW))
    t = tokenizer()
    prompt = t.encode_prompt("hi")
    yes, no = t.encode("yes yes") + [t.end_of_turn_id], t.encode("no") + [t.end_of_turn_id]
    right, wrong = (t.encode(f"\n\n[critique]\n{text}") + [t.end_of_turn_id]
                    for text in ("right", "wrong word"))
    assert pair.chosen.ids.tolist() == prompt + yes + right
    assert pair.rejected.ids.tolist() == prompt + no + wrong
    assert pair.chosen.mask.tolist() == [False] * len(prompt) + [True] * len(yes) + [False] * len(right)
    assert (pair.chosen.critique, pair.rejected.critique) == (len(right), len(wrong))


def test_a_pair_of_equal_answers_is_left_out_whatever_their_critiques(write, capsys):
    """Such pairs were trained in silence where the two critiques said different things."""
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no",
           "chosen_critique": "a", "rejected_critique": "b"}
    pairs = pairs_of(write(*[row] * 4, {**row, "rejected": "yes "}))
    assert len(pairs) == 4 and "1 of 5 pairs have the same answer" in capsys.readouterr().err


def test_without_critiques_nothing_changes_and_other_stages_leave_them_unread(write, capsys):
    """In dpo, kto and sft a critique is no part of the answer: the ids are those of the row without it, and
    the key is named on standard error."""
    [plain] = pairs_of(write(PLAIN, name="plain.jsonl"))
    [other] = pairs_of(write(ROW), "dpo")
    for one, two in zip(plain.sides, other.sides):
        assert one.ids.tolist() == two.ids.tolist() and two.critique == 0
    assert "'chosen_critique' (1 times" in capsys.readouterr().err
    rows = [{"prompt": text, "completion": text} for text in ("yes", "no")]
    bare = load_examples([write(*rows, name="bare.jsonl")], tokenizer(), 64, config.SFT())
    path = write(*({**row, "critique": "good"} for row in rows), name="answers.jsonl")
    told = load_examples([path], tokenizer(), 64, config.SFT())
    assert "'critique' (2 times" in capsys.readouterr().err
    path = write(*({**row, "critique": "good", "label": row["prompt"] == "yes"} for row in rows),
                 name="kto.jsonl")
    kto = load_labelled([path], tokenizer(), 64, config.KTO())
    assert "'critique' (2 times" in capsys.readouterr().err
    for one, two, three in zip(bare, told, kto):
        assert one.ids.tolist() == two.ids.tolist()
        assert three.example.ids.tolist() == one.ids[:len(three.example.ids)].tolist()


def test_a_pair_read_for_reward_names_no_critique_as_unread(write, capsys):
    pairs_of(write(ROW))
    assert "not read" not in capsys.readouterr().err


def test_a_new_answer_to_a_prompt_has_no_critique_of_an_older_answer(write):
    [row] = load_prompts([write({"prompt": "hi", "completion": "yes", "critique": "good"})])
    assert "critique" not in row


def test_columns_rename_critiques(write):
    path = write({**PLAIN, "a": "right", "b": "wrong word"})
    [pair] = pairs_of(path, columns={"chosen_critique": "a", "rejected_critique": "b"})
    [same] = pairs_of(write(ROW, name="same.jsonl"))
    assert pair.chosen.ids.tolist() == same.chosen.ids.tolist()


def test_a_pair_that_is_too_long_keeps_answer_and_critique_and_loses_its_prompts_oldest_tokens(write):
    path = write({**ROW, "prompt": "hi " * 50})
    [whole], room = pairs_of(path), 60
    [cut] = pairs_of(path, limit=room, too_long="cut-left")
    removed = max(len(side.ids) for side in whole.sides) - room
    assert removed > 0
    for one, other in zip(cut.sides, whole.sides):
        assert one.ids.tolist() == [other.ids[0], *other.ids[1 + removed:]]
    need = 1 + max(int((~side.mask)[side.mask.argmax():].sum() + side.mask.sum()) for side in whole.sides)
    need += len(tokenizer().asks)
    assert pairs_of(path, limit=need, too_long="cut-left")
    with pytest.raises(ValueError, match="nothing to train on is left"):
        pairs_of(path, limit=need - 1, too_long="cut-left")


# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, said", [
    (HALF, "rows.jsonl:1: 'chosen_critique' without 'rejected_critique'"),
    ({**PLAIN, "rejected_critique": "wrong"}, "'rejected_critique' without 'chosen_critique'"),
    ({**ROW, "chosen_critique": " "}, "'chosen_critique' must be a text"),
    ({**ROW, "rejected_critique": ["wrong"]}, "'rejected_critique' must be a text"),
])
def test_a_pair_with_one_critique_or_an_empty_one_is_refused_with_its_place(row, said, write):
    with pytest.raises(ValueError, match="rows.jsonl:1: ") as error:
        pairs_of(write(row))
    assert said in str(error.value)


def test_a_critique_that_spells_a_control_token_is_refused(write):
    with pytest.raises(ValueError, match="spell control tokens"):
        pairs_of(write({**ROW, "chosen_critique": "right<|END_OF_TURN_TOKEN|>"}))


def test_pairs_with_and_without_critiques_do_not_mix(write):
    other = {**PLAIN, "prompt": "hello"}
    with_them, without = pairs_of(write(ROW)), pairs_of(write(other, name="plain.jsonl"))
    for items, held_out in ((with_them + without, []), (with_them, without), (without, with_them)):
        with pytest.raises(ValueError, match="plain.jsonl:1: a pair without critiques, .*rows.jsonl:1 has"):
            critiques.arrange(reward_model(), items, held_out, None)
    more = pairs_of(write(other, {**other, "prompt": "again"}, name="plain.jsonl"))
    with pytest.raises(ValueError, match="plain.jsonl:1: a pair without"):          # the first of them
        critiques.arrange(reward_model(), with_them + more, [], None)


def test_a_model_trained_with_critiques_is_not_trained_further_without(write):
    with pytest.raises(ValueError, match="rows.jsonl:1: a pair without critiques, and the model to train"):
        critiques.arrange(trained_with_critiques(), pairs_of(write(PLAIN)), [], None)


def test_rl_refuses_a_reward_model_that_reads_critiques(tmp_path):
    write_world(tmp_path)
    settings = config.RL(batch_size=4, max_steps=1, max_new_tokens=4)
    with pytest.raises(ValueError, match="--reward-model: .* nothing writes them here"):
        train_stage("rl", language_model(), tokenizer(), [tmp_path / "prompts.jsonl"], settings,
                    tmp_path / "run", CPU, reward_model=trained_with_critiques())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["yes", 1, []])
def test_a_config_with_a_wrong_mark_is_refused(wrong):
    with pytest.raises(ValueError, match="critiques .* must be true or false"):
        RewardConfig.of(language_model().config, critiques=wrong)


# ---- scores ------------------------------------------------------------------------------------------------

ANSWER = {"prompt": "hi", "completion": "yes yes"}


def test_a_score_with_a_critique_is_that_of_the_ids_by_hand():
    model, t = trained_with_critiques(), tokenizer()
    prompt, said = t.encode_prompt("hi"), t.encode("yes yes") + [t.end_of_turn_id]
    ids = torch.tensor([prompt + said + t.encode("\n\n[critique]\nright") + [t.end_of_turn_id]])
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[0, len(prompt):len(prompt) + len(said)] = True
    by_hand = model(ids, torch.tensor([ids.shape[1]]), mask)[0].item()
    found = score_texts(model, t, [{**ANSWER, "critique": "right"}, {**ANSWER, "critique": "wrong"}])
    assert found[0] == pytest.approx(by_hand, abs=1e-5) and abs(found[0] - found[1]) > 1e-3


def test_the_log_probs_that_the_score_reads_are_those_without_a_critique():
    """With the last token's state switched off, a critique changes nothing."""
    plain, reads = reward_model(), trained_with_critiques()
    for model in (plain, reads):
        torch.nn.init.zeros_(model.score.weight)
        torch.nn.init.ones_(model.score_logps.weight)
    [one] = score_texts(plain, tokenizer(), [ANSWER])
    [two] = score_texts(reads, tokenizer(), [{**ANSWER, "critique": "what a strange answer"}])
    assert one == pytest.approx(two, abs=1e-5)


def test_scoring_without_the_critique_that_a_model_needs_or_with_one_that_it_cannot_read_is_refused():
    with pytest.raises(ValueError, match="row 1: no 'critique' beside the answer, and RM was trained with"):
        score_texts(trained_with_critiques(), tokenizer(), [{**ANSWER, "critique": "right"}, ANSWER],
                    name="RM")
    with pytest.raises(ValueError, match="row 0: 'critique' beside the answer, and RM was trained without"):
        score_texts(reward_model(), tokenizer(), [{**ANSWER, "critique": "right"}], name="RM")
    with pytest.raises(ValueError, match="row 0: 'critique' must be a text"):
        score_texts(trained_with_critiques(), tokenizer(), [{**ANSWER, "critique": ""}])


def test_an_empty_answer_with_a_critique_has_a_finite_score():
    row = {**ANSWER, "completion": "", "critique": "empty"}
    assert all(np.isfinite(score_texts(trained_with_critiques(), tokenizer(), [row])))


# ---- training ----------------------------------------------------------------------------------------------

@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    for name in ("pairs.jsonl", "held-out-pairs.jsonl"):
        path = tmp_path / name
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.unlink()
        write_jsonl(path, [{**row, "chosen_critique": "right", "rejected_critique": "wrong"} for row in rows])
    return tmp_path


@pytest.mark.parametrize("head", ["log-probs", "last-token"])
def test_the_folder_of_a_model_trained_with_critiques_says_so(head, world):
    weight = 0.3 if head == "log-probs" else 0.0
    build = {"log-probs": {}, "last-token": dict(start=world / "start")}[head]
    if build:
        weights.save(world / "start", reward_model(), tokenizer())
    out = run("reward", world, world / "run", held_out=True, head=head, lm_weight=weight, **build)
    assert json.loads((out / "model" / "config.json").read_text())["critiques"] is True
    model, its_tokenizer = weights.load(out / "model")
    assert critiques.reads_critiques(model)
    with pytest.raises(ValueError, match="was trained with critiques"):
        score_texts(model, its_tokenizer, [ANSWER])


def test_a_plain_models_config_has_no_such_key(tmp_path):
    weights.save(tmp_path / "rm", reward_model(), tokenizer())
    assert "critiques" not in json.loads((tmp_path / "rm" / "config.json").read_text())
    assert not critiques.reads_critiques(weights.load(tmp_path / "rm")[0])


def test_the_loss_on_the_chosen_answer_is_that_without_critiques(write):
    """lm_weight is of the answer alone, so its loss does not see the critique."""
    model, values = reward_model(), []
    for row in (ROW, PLAIN):
        [pair] = pairs_of(write(row, name=f"{len(row)}-keys.jsonl"))
        values.append(reward_loss(1.0)(model, collate_pairs([pair], tokenizer().pad_id))[1])
    torch.testing.assert_close(values[0]["lm_loss"], values[1]["lm_loss"])
    assert not torch.equal(values[0]["margin"], values[1]["margin"])
