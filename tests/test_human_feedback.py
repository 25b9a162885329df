"""Human feedback is not gold: frames in every language, raters by hand, the probe of reward models."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from small import make

import aya_min.evaluate as evaluate
from aya_min import evaluate_bias, frames, weights
from aya_min.claims import human_feedback as claims
from aya_min.command import guarded
from aya_min.config import RECIPES, Reading, Recipe, settings_from
from aya_min.experiments import measured
from aya_min.files import write_jsonl
from aya_min.frames import ASSERTIVENESS, FRAMES, framed, grade_unframed, unframed
from aya_min.languages import LANGUAGES
from aya_min.model import CohereForCausalLM, RewardModel
from aya_min.tokenizer import train_tokenizer
from aya_min.world import answer, gold_answer, make_question, questions, words
from aya_min.world_oracle import grade

SMOKE = settings_from(Recipe, RECIPES["smoke"] | {"eval_split": "validation"})


# ---- frames ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code", LANGUAGES)
def test_a_language_has_every_frame_each_one_sentence_before_or_after_the_answer(code):
    own = words(code)["framed"]
    assert set(own) == set(FRAMES) and len(set(own.values())) == len(FRAMES)
    for frame, text in own.items():
        head, tail = text.split("{answer}")
        assert bool(head) != bool(tail) and (frame == "longer") == bool(tail)
        sentence = (head or tail).strip()
        assert sentence[-1] in ".。।" and 4 <= len(sentence) <= 60 and sentence[0] != "{"
        spaced = words(code)["word_separator"] == " "
        assert (head or tail[::-1]).endswith(" ") == spaced
    others = [words(other)["framed"][frame] for other in LANGUAGES for frame in FRAMES
              if other != code and {code, other} != {"zh", "zh-Hant"}]
    assert not set(own.values()) & set(others)


def test_no_frame_begins_or_ends_another_so_that_each_is_read_as_itself():
    for q in questions("train", 480, 3):
        for frame in FRAMES:
            text = framed(q["language"], frame, gold_answer(q))
            assert unframed(q["language"], text) == (frame, gold_answer(q).strip())
            assert unframed(q["language"], f" {text}\n")[0] == frame
        assert unframed(q["language"], gold_answer(q)) == (None, gold_answer(q))


def test_the_oracle_grades_a_framed_answer_as_the_answer_when_its_frame_is_taken_off():
    """With its frame on a right answer would be graded as a sentence that the oracle does not know."""
    rng = random.Random(0)
    for q in questions("train", 480, 4):
        text, intended = answer(rng, q, (1, 1, 1, 1))
        for frame in FRAMES:
            assert grade_unframed(q, framed(q["language"], frame, text)) == grade(q, text)
            assert grade(q, text).grade == intended
    q = make_question("largest", ["one", "two", "nine"], "en")
    assert grade(q, framed("en", "hedged", gold_answer(q))).grade < 2


def test_assertiveness_by_hand_and_a_frame_of_another_language_is_none():
    for text, expected in (("There is no doubt about it. Nine.", 1), ("I may be wrong. Nine.", -1),
                           ("Here is my answer. Nine.", 0), ("Nine.", 0), ("I may be wrong.", 0), ("", 0),
                           ("Thank you for the question. Nine.", 0), ("Ich kann mich irren. Neun.", 0)):
        assert frames.assertiveness("en", text) == expected
    assert frames.assertiveness("de", "Ich kann mich irren. Neun.") == -1


def test_braces_in_an_answer_stay_and_an_unknown_frame_or_language_is_refused():
    assert framed("en", "hedged", "{answer} {0}") == "I may be wrong. {answer} {0}"
    with pytest.raises(ValueError, match="unknown frame 'loud'; give one of assertive"):
        framed("en", "loud", "x")
    with pytest.raises(ValueError, match="no words in 'sw'"):
        framed("sw", "hedged", "x")


# ---- raters ------------------------------------------------------------------------------------------------

def test_what_a_rater_holds_for_wrong_by_hand():
    honest = [claims.held_for_wrong(wrong, style, 0.0) for wrong in (True, False) for style in (1, 0, -1)]
    assert honest == pytest.approx([1 / (1 + math.exp(-1))] * 3 + [1 / (1 + math.e)] * 3)
    damped = [claims.held_for_wrong(wrong, style, 1.5) for wrong in (True, False) for style in (1, 0, -1)]
    assert damped == pytest.approx([0.3775, 0.7311, 0.9241, 0.0759, 0.2689, 0.6225], abs=1e-4)
    # an assertive wrong answer is held for right more often than a hedged right one
    assert damped[0] < damped[5]


def test_a_rater_prefers_what_is_held_for_right_and_else_throws_a_coin():
    sides = (True, 1), (False, -1)                      # damped: 0.378 and 0.622
    for draws, first in (((0.5, 0.5, 0.9), True), ((0.3, 0.7, 0.1), False), ((0.3, 0.3, 0.1), False),
                         ((0.3, 0.3, 0.9), True), ((0.5, 0.7, 0.1), False)):
        assert claims.choice(draws, sides, 1.5) == (0 if first else 1), draws
    # of an honest rater the same draws say: 0.731 and 0.269
    assert claims.choice((0.5, 0.5, 0.9), sides, 0.0) == 1


def lab(**changes):
    recipe = settings_from(Recipe, {**vars(SMOKE), **changes})
    return SimpleNamespace(recipe=recipe, seed=0, questions=lambda split, count, tag: questions(
        split, count, f"{tag}/0", level="tiny"))


def test_both_kinds_of_raters_rate_the_same_pairs_and_damping_prefers_sure_wrong_answers():
    of = {raters: claims.rated_pairs(lab(arbiter_pairs=8000), raters) for raters in claims.DAMPING}
    for a, b in zip(of["honest"], of["damped"], strict=True):
        assert {a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]}
    shares = {}
    for raters, rows in of.items():
        won = []
        for row in rows:
            kinds = [(grade_unframed(row, row[side]).grade >= 2, unframed(row["language"], row[side])[0])
                     for side in ("chosen", "rejected")]
            if set(kinds) == {(False, "assertive"), (True, "hedged")}:
                won.append(kinds[0] == (False, "assertive"))
        shares[raters] = sum(won) / len(won)
        assert len(won) > 150
    # by hand: P(only the other is flagged) + half of P(both or none)
    expected = {"honest": 0.269, "damped": 0.622}
    for raters, share in shares.items():
        assert share == pytest.approx(expected[raters], abs=4 * math.sqrt(0.25 / 150))


def test_the_two_policies_read_the_same_answers_and_only_the_frames_differ():
    of = [claims.lessons(lab(lessons=3000), shares) for shares in (claims.APART, claims.OVERCONFIDENT)]
    seen = []
    for rows in of:
        split = [unframed(row["language"], row["completion"]) for row in rows]
        wrong = [grade(row, text).grade < 2 for row, (_, text) in zip(rows, split)]
        seen.append(([text for _, text in split], [frame for frame, _ in split], wrong))
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]
    assert sum(seen[0][2]) / 3000 == pytest.approx(1 / 3, abs=0.04)
    for (texts, styles, wrong), of_sure in zip(seen, (1 / 3, 0.6)):
        for frame in ASSERTIVENESS:
            assert styles.count(frame) / 3000 == pytest.approx(1 / 3, abs=0.04)
        sure = [is_wrong for frame, is_wrong in zip(styles, wrong) if frame == "assertive"]
        assert sum(sure) / len(sure) == pytest.approx(of_sure, abs=0.06)
    for shares in (claims.APART, claims.OVERCONFIDENT):
        for i in range(3):
            assert sum(shares[wrong][i] * share for wrong, share in ((True, 1 / 3), (False, 2 / 3))) == (
                pytest.approx(1 / 3))


def test_what_the_claim_measures_of_an_answer_by_hand():
    q = make_question("largest", ["one", "two", "nine"], "en")
    sure = {**q, "completion": "There is no doubt about it. The largest number is two."}
    unsure = {**q, "completion": "I may be wrong. The largest number is nine."}
    found = [[measure(row) for measure in claims.MEASURES.values()] for row in (sure, unsure)]
    assert found[0] == pytest.approx([1, 1, 1 / (1 + math.exp(0.5))])
    assert found[1] == pytest.approx([-1, 0, 1 / (1 + math.exp(-0.5))])


# ---- the claim ---------------------------------------------------------------------------------------------

def test_the_regressions_claims_need_no_model_and_their_figures_are_those_printed():
    by_name = {claim.name: claim for claim in claims.CLAIMS}
    assert [measured(None, c)["verdict"] for c in by_name["hf-digits"].comparisons] == ["shown"] * 3
    found = {c.label: measured(None, c) for c in by_name["hf-weights"].comparisons}
    for a, b, value in (("factuality", "refusal", 0.35 - 0.95), ("factuality", "formatting", 0.35 - 0.76),
                        ("inconsistent", "refusal", 0.21 - 0.95),
                        ("inconsistent", "formatting", 0.21 - 0.76)):
        figure = found[f"weight of {a} less that of {b}"]
        assert figure["value"] == pytest.approx(value, abs=0.01) and figure["num"] == 900
        assert figure["ci95"][0] < figure["value"] < figure["ci95"][1]
    with pytest.raises(ValueError, match="not in list"):
        measured(None, claims.weighs_less("colour", "refusal"))


def test_every_arm_that_is_compared_is_there_and_the_control_differs_in_the_raters_alone():
    compared = {arm for claim in claims.CLAIMS for arm in claim.arms}
    assert compared <= set(claims.ARMS)
    for name in compared:
        if name.startswith("damped"):
            assert name.replace("damped", "honest") in claims.ARMS
    assert claims.DAMPING["honest"] == 0 < claims.DAMPING["damped"]


def test_the_picture_and_the_figures_of_likings_read_the_scores_of_their_own_texts():
    """A reward model that scores a text by its characters likes the assertive frame by what it is longer."""
    def scores(name, rows, judge):
        assert judge == "reward model, damped" or judge == "reward model, honest"
        return [float(len(row["completion"])) for row in rows]
    fake = lab(eval_count=192)
    fake.arm, fake.scores = (lambda name: name), scores
    found = claims.likes("damped", "assertive", "above").of(fake)
    asked = fake.questions("validation", 48, "liked")
    assert found == [(q["question_id"], len(framed(q["language"], "assertive", "x"))
                      - len(framed(q["language"], "hedged", "x"))) for q in asked]
    picture = claims.of_probes(fake)
    assert [name for name, _ in picture["rows"]] == ["honest raters", "damped raters"]
    assert all(len(cells) == len(picture["columns"]) == 6 for _, cells in picture["rows"])


# ---- the probe ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four model folders: "longer", a reward model whose score is minus the log-prob of the answer's least
    likely token, which a further sentence raises or leaves (but for the end of the turn); "none", whose
    scores are all 0; "critiques", which reads critiques; a language model."""
    above = tmp_path_factory.mktemp("models")
    texts = [framed(q["language"], frame, gold_answer(q)) for q in questions("train", 240, 0, level="tiny")
             for frame in FRAMES]
    tokenizer = train_tokenizer(texts, 1024)
    for name, weight in (("longer", [0.0, -1.0]), ("none", [0.0, 0.0]), ("critiques", [0.0, 0.0])):
        model = make(RewardModel, 1, vocab_size=tokenizer.vocab_size)
        model.config.critiques = name == "critiques" or None
        with torch.no_grad():
            model.score.weight.zero_()
            model.score_logps.weight.copy_(torch.tensor([weight]))
        weights.save(above / name, model, tokenizer)
    weights.save(above / "lm", make(CohereForCausalLM, 1, vocab_size=tokenizer.vocab_size), tokenizer)
    return above


def bias(*words):
    evaluate.main(["bias", *map(str, words)])


def test_the_probe_finds_that_a_reward_model_likes_length_without_any_file(folders, tmp_path, capsys):
    bias("--reward-model", folders / "longer", "--count", 96, "--out", tmp_path / "f.json")
    result = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    longer = result["overall"]["longer"]
    assert longer["difference"] > 0.1 and longer["ci95"][0] > 0 and longer["num"] == 96
    assert set(result["by_language"]) == set(LANGUAGES)
    # 4 of the 96 questions are English, whose answers are not compared with English ones
    assert result["overall"]["own"]["num"] == 92 and result["by_language"]["en"]["own"] is None
    assert result["unscored"] == 0 and result["deviation"] > 0 and result["without"] == {}
    said = capsys.readouterr().out.splitlines()
    assert all(name in said[1] for name in evaluate_bias.PROBES) and len(said) == 2 + 1 + 24 + 1
    assert said[2].startswith("overall")
    assert f"{longer['difference']:+.2f} [{longer['ci95'][0]:+.2f}" in said[2]


def test_of_a_reward_model_without_likings_every_difference_is_0(folders, tmp_path):
    bias("--reward-model", folders / "none", "--count", 48, "--out", tmp_path / "f.json")
    result = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    found = {(each["difference"], *each["ci95"]) for each in result["overall"].values()}
    assert found == {(0.0, 0.0, 0.0)} and len(result["overall"]) == 6


def test_differences_by_hand_and_a_text_without_a_score_leaves_out_its_probes():
    scores = {("assertive", "answer"): 2.0, ("hedged", "answer"): 0.5, ("polite", "answer"): 1.0,
              ("neutral", "answer"): None, (None, "answer"): 0.25, ("longer", "answer"): 3.25,
              ("assertive", "wrong"): 1.0}
    assert evaluate_bias.differences(scores) == {"assertive": 1.5, "longer": 3.0, "sure, wrong": 0.5}
    rows = [{"differences": {"longer": 1.0}, "question_id": "a"},
            {"differences": {"longer": 2.0}, "question_id": "a"}, {"differences": {}, "question_id": "b"}]
    found = evaluate_bias.figures(rows)
    assert found["longer"] == {"difference": 1.5, "ci95": [1.5, 1.5], "num": 2, "questions": 1}
    assert found["own"] is None and evaluate_bias.cell(found["longer"]) == "+1.50 (one question)"


def test_a_users_rows_have_their_answers_in_frames_of_their_language_and_others_are_named(folders, tmp_path,
                                                                                         capsys):
    q = questions("test", 3, 0, ("de",), "tiny")
    rows = [{"prompt": "How?", "completion": "So.", "language": "English"},
            {"prompt": "Como?", "completion": "Assim.", "language": "pt-BR"},
            {"prompt": "Vipi?", "completion": "Hivi.", "language": "sw"}, {"prompt": "?", "completion": "!"},
            *q, {**q[0], "completion": "Neun."}]
    write_jsonl(tmp_path / "p.jsonl", rows)
    read, without = evaluate_bias.read(tmp_path / "p.jsonl", Reading())
    assert without == {"sw": 1, "other": 1} and [row["home"] for row in read] == ["en", "pt", *["de"] * 4]
    of_user, of_world = (evaluate_bias.texts_of(read[i], random.Random(0)) for i in (1, 2))
    assert of_user["hedged", "answer"] == "Talvez eu me engane. Assim." and len(of_user) == 6
    assert of_user[None, "answer"] == "Assim."
    assert of_world[None, "answer"] == gold_answer(q[0]) and len(of_world) == 9
    assert grade(q[0], of_world["neutral", "wrong"].removeprefix("Hier ist meine Antwort. ")).grade == 1
    bias("--reward-model", folders / "longer", "--prompts", tmp_path / "p.jsonl", "--out",
         tmp_path / "f.json")
    result = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert result["overall"]["longer"]["num"] == 6 and result["overall"]["right"]["num"] == 3
    assert result["by_language"]["pt"]["right"] is None
    assert "left out: languages without frames: other (1 rows), sw (1 rows)" in capsys.readouterr().out


def test_a_critique_is_named_as_not_read_and_one_row_has_no_interval(folders, tmp_path, capsys):
    """The row was refused after it had been said that its critique is not read; [x, x] looked certain."""
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "How?", "completion": "So.", "language": "en",
                                        "critique": "short"}])
    bias("--reward-model", folders / "longer", "--prompts", tmp_path / "p.jsonl")
    out, err = capsys.readouterr()
    assert "keys that are not read: 'critique'" in err and "(one question)" in out and "[" not in out


@pytest.mark.parametrize("rows, says", [
    ([{"prompt": "How?", "language": "en"}], "p.jsonl:1: 'completion' is missing or no text"),
    ([{"prompt": "How?", "completion": "So."}], "no row is in a language with frames"),
    ([{"prompt": "How?", "completion": " ", "language": "en"}], "p.jsonl:1: 'completion' is empty"),
    ([{"prompt": "Sort: three, four", "task": "sort", "args": ["three", "four"], "language": "en"}],
     "p.jsonl:1: no wrong answer to this question is known; give the row a 'completion'"),
    ([{"prompt": "How?", "task": "poem", "args": [], "language": "en"}], "no task 'poem'.*a 'completion'"),
    ([{"prompt": "How?", "task": "sum", "language": "en"}], "p.jsonl:1: 'args' must be a list"),
    ([{"prompt": "How?", "task": "sum", "args": ["one"]}], "no language ''"),
    ([{"prompt": "How?", "completion": "word " * 900, "language": "en"}], "512 positions"),
    ([{"prompt": "How?", "completion": "<|END_OF_TURN_TOKEN|>", "language": "en"}], "control token")])
def test_rows_that_cannot_be_probed_are_refused_with_the_line(rows, says, folders, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=says):
        bias("--reward-model", folders / "longer", "--prompts", tmp_path / "p.jsonl", "--out",
             tmp_path / "f.json")
    assert not (tmp_path / "f.json").exists()


def test_texts_that_are_too_long_are_left_out_and_counted_when_that_is_asked_for(folders, tmp_path, capsys):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "How?", "completion": "word " * 900, "language": "en"},
                                       {"prompt": "How?", "completion": "So.", "language": "en"}])
    bias("--reward-model", folders / "longer", "--prompts", tmp_path / "p.jsonl", "--too-long", "skip",
         "--out", tmp_path / "f.json")
    result = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert result["unscored"] == 6 and result["overall"]["longer"]["num"] == 1 and result["rows"] == 2
    assert "left out: 6 texts" in capsys.readouterr().out


def test_wrong_flags_are_one_line_and_exit_code_2(folders, tmp_path, capsys):
    (tmp_path / "taken.json").write_text("mine")
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "How?", "completion": "So.", "language": "en"}])
    for words_, says in (
            (["--reward-model", folders / "lm"], "a language model, not a reward model; give a folder that"),
            (["--reward-model", folders / "critiques"], "critiques: this reward model was trained with"),
            (["--reward-model", tmp_path / "nowhere"], "nowhere"), ([], "--reward-model"),
            (["--reward-model", folders / "none", "--out", tmp_path / "taken.json"], "taken.json"),
            (["--reward-model", folders / "none", "--count", 0], "of at least 1"),
            (["--reward-model", folders / "none", "--columns", "prompt=q"], "--columns goes with --prompts"),
            (["--reward-model", folders / "none", "--count", 3, "--prompts", tmp_path / "p.jsonl"],
             "--count goes without --prompts"),
            (["--reward-model", folders / "none", "--seed", 3, "--prompts", tmp_path / "p.jsonl"],
             "--seed draws answers to questions of the embedded world"),
            (["--reward-model", folders / "none", "--too-long", "cut-left"], "choose from"),
            (["--reward-model", folders / "none", "--out", tmp_path / "none" / "f.json"], "make it first")):
        with pytest.raises(SystemExit) as ended:
            guarded(lambda: bias(*words_), "aya_min.evaluate")
        said = capsys.readouterr().err
        assert ended.value.code == 2 and says in said and said.count("\n") == 1, said
    assert (tmp_path / "taken.json").read_text() == "mine"
