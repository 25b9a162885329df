"""Arbitrage and preference pairs by hand: which answer a route keeps, what is counted, which pairs come of
it, whose answer is joined to which prompt."""

import json
from collections import Counter

import pytest
from small import tokenizer

from aya_min.arbitrage import (candidates_from, control_length, fit_table, guard_table, language_guard,
                               length_fit, read_answers, route, wins_table, worth, worth_table)
from aya_min.data import load_prompts
from aya_min.preferences import best_worst, count_cut, cut_line
from aya_min.files import write_jsonl


def row(*candidates, **extra):
    """A prompt row with candidates: teacher, completion, reward and, it may be, finish reason of each."""
    keys = ("teacher", "completion", "reward", "finish_reason")
    made = [dict(zip(keys, values)) for values in candidates]
    return {"prompt": "p", "language": "fr", **extra, "candidates": made}


NONE_CUT = {"cut": 0, "cut_by_language": {}, "cut_prompts": 0}


# routes

def test_candidates_stand_in_the_order_of_the_teachers_with_their_rewards_and_how_they_ended():
    answers = {"T": [{"completion": "1", "finish_reason": "stop"}, {"completion": "2"}],
               "U": [{"completion": "3", "finish_reason": None},
                     {"completion": "4", "finish_reason": "length", "ids": [5]}]}
    rows = candidates_from([{"prompt": "a"}, {"prompt": "b"}], answers, {"T": [0.1, 0.2], "U": [0.3, None]})
    assert rows[1] == {"prompt": "b", "candidates": [
        {"teacher": "T", "completion": "2", "reward": 0.2, "finish_reason": None},
        {"teacher": "U", "completion": "4", "reward": None, "finish_reason": "length"}]}
    assert rows[0]["candidates"][0]["finish_reason"] == "stop"
    assert candidates_from([{"prompt": "a"}], {"T": answers["T"]})[0]["candidates"][0]["reward"] is None


def test_the_reward_route_keeps_the_best_answer_of_each_prompt_and_counts_who_won():
    rows = [
        row(("T", "a", 0.1), ("U", "b", 0.9), ("V", "c", -3.0), question_id="q1"),
        row(("T", "d", -1.0), ("U", "e", -2.0), language="de"),
        row(("T", "f", 0), ("U", "g", 1)),
    ]
    chosen, counts = route(rows, "reward")
    assert [(c["completion"], c["teacher"]) for c in chosen] == [("b", "U"), ("d", "T"), ("g", "U")]
    assert chosen[0] == {"prompt": "p", "language": "fr", "question_id": "q1", "completion": "b",
                         "teacher": "U", "finish_reason": None}
    assert counts == {"prompts": 3, "wins": {"fr": {"U": 2}, "de": {"T": 1}}, "ties": 0, "equal_texts": 0,
                      "empty": 0, "unscored": 0, **NONE_CUT}


def test_ties_and_equal_texts_are_counted_and_a_tie_is_broken_by_the_seed():
    tie, same, same_reward = (
        row(("T", "a", 1.0), ("U", "b", 1.0), ("V", "c", 0.0)),
        row(("T", "a", 1.0), ("U", "a", 0.9)),
        row(("T", "a", 1.0), ("U", "a", 1.0)),
    )
    _, counts = route([tie, same, same_reward], "reward")
    assert (counts["ties"], counts["equal_texts"]) == (1, 2)            # the same text twice is no tie
    winners = Counter(route([tie], "reward", seed)[0][0]["teacher"] for seed in range(60))
    assert set(winners) == {"T", "U"} and min(winners.values()) > 10


def test_the_same_seed_routes_the_same_way():
    rows = [row(*[(t, f"{t}{i}", 0.0) for t in "TUVW"]) for i in range(50)]
    for how in ("reward", "random"):
        first, again, other = (route(rows, how, seed)[0] for seed in (0, 0, 1))
        assert first == again != other


def test_the_random_route_takes_every_teacher_about_equally_often_whatever_the_rewards():
    rows = [row(*[(t, f"{t}{i}", float(ord(t))) for t in "TUVW"]) for i in range(400)]
    chosen, counts = route(rows, "random", 3)
    assert counts["wins"]["fr"].keys() == set("TUVW") and all(
        60 < n < 140 for n in counts["wins"]["fr"].values()
    )  # 4.6 sigma around 100
    assert counts["ties"] == 0 and len(chosen) == 400


def test_the_fixed_route_takes_the_teacher_of_the_language():
    rows = [row(("T", "a", 0.0), ("U", "b", 9.0)), row(("T", "c", 0.0), ("U", "d", 9.0), language="de")]
    chosen, counts = route(rows, "fixed", table={"fr": "T", "de": "U"})
    assert [c["completion"] for c in chosen] == ["a", "d"] and counts["wins"] == {
        "fr": {"T": 1},
        "de": {"U": 1},
    }


@pytest.mark.parametrize("how", ["reward", "random", "fixed"])
def test_empty_completions_are_never_chosen_and_a_prompt_with_nothing_else_is_left_out_and_counted(how):
    rows = [row(("T", "  \n", 5.0), ("U", "b", 0.0)), row(("T", "", 1.0), ("U", "", 2.0))] * 20
    chosen, counts = route(rows, how, table={"fr": "U"})
    assert {c["completion"] for c in chosen} == {"b"} and len(chosen) == counts["empty"] == 20


def test_a_prompt_without_a_language_counts_under_other():
    bare = row(("T", "a", 1.0), ("U", "b", 0.0))
    del bare["language"]
    assert route([bare], "reward")[1]["wins"] == {"other": {"T": 1}}


def test_the_table_of_wins_gives_percent_by_language():
    text = wins_table({"fr": {"T": 3, "U": 1}, "de": {"U": 2}}, ["T", "U"])
    assert [line.split() for line in text.splitlines()] == [
        ["language", "T", "U"],
        ["de", "0%", "100%"],
        ["fr", "75%", "25%"],
    ]


# cut answers

CUT = [row(("T", "a", 9.0, "length"), ("U", "b", 1.0, "stop"), ("V", "c", 0.0, None)),
       row(("T", "d", 2.0, "length"), ("U", "e", 1.0, "length"), language="de"),
       row(("T", "f", 2.0, "stop"), ("U", "g", 3.0, "interrupted"), ("V", "h", 1.0, "length"), language="de")]


def test_cut_answers_are_left_out_of_the_rows_and_counted_by_language():
    """Answers cut at the limit became SFT rows as if the model had ended there."""
    chosen, counts = route(CUT, "reward")
    assert [(c["completion"], c["finish_reason"]) for c in chosen] == [("b", "stop"), ("f", "stop")]
    assert (counts["cut"], counts["cut_by_language"], counts["cut_prompts"]) == (5, {"de": 4, "fr": 1}, 1)
    assert counts["empty"] == 0 and cut_line(CUT) == "cut: 5 of 8 (de 4, fr 1)"
    for seed in range(20):
        assert {c["completion"] for c in route(CUT, "random", seed)[0]} <= {"b", "c", "f"}
    assert [c["completion"] for c in route(CUT, "fixed", table={"fr": "T", "de": "T"})[0]] == ["f"]


def test_cut_answers_are_kept_if_asked_for_and_say_so_in_their_rows():
    chosen, counts = route(CUT, "reward", keep_cut=True)
    assert [(c["completion"], c["finish_reason"]) for c in chosen] == [
        ("a", "length"), ("d", "length"), ("g", "interrupted")]
    assert counts["cut"] == 5 and counts["cut_prompts"] == 0


def test_cut_answers_make_no_pairs_unless_asked_for():
    pairs, counts = best_worst(CUT)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("b", "c")]
    assert counts == {"pairs": 1, "equal_texts": 0, "small_margin": 0, "cut_prompts": 2, "cut": 5,
                      "cut_by_language": {"de": 4, "fr": 1}}
    pairs, counts = best_worst(CUT, keep_cut=True)
    keys = ("chosen", "chosen_finish_reason", "rejected", "rejected_finish_reason")
    assert [tuple(pair[key] for key in keys) for pair in pairs] == [
        ("a", "length", "c", None), ("d", "length", "e", "length"), ("g", "interrupted", "h", "length")]
    assert counts["cut"] == 5 and counts["cut_prompts"] == 0


def test_nothing_cut_is_said_in_a_line_without_languages():
    assert cut_line([row(("T", "a", 1.0, "stop"))]) == "cut: 0 of 1"
    assert count_cut([]) == {"cut": 0, "cut_by_language": {}}


# what is equal, and what is no number

def test_answers_with_equal_ids_are_equal():
    """Texts were compared before white space and the normalizer were taken off: 16 of 16 pairs made it."""
    same = tokenizer().key
    alike = (("b c", " b c "), ("\u00e9", "e\u0301"), ("a\n", "a"), ("\u1112\u1161\u11ab", "\ud55c"))
    for one, other in alike:
        twice = row(("T", one, 2.0), ("U", other, 1.0))
        pairs, counts = best_worst([twice], same=same)
        assert pairs == [] and counts["equal_texts"] == 1
        assert route([twice], "reward", same=same)[1]["equal_texts"] == 1
        tie = row(("T", one, 2.0), ("U", other, 2.0))
        assert route([tie], "reward", same=same)[1]["ties"] == 0
        third = row(("T", one, 2.0), ("U", other, 1.0), ("V", "z", 1.5))
        assert best_worst([third], same=same)[1]["small_margin"] == 1       # best and worst say the same
    assert best_worst([row(("T", "b c", 2.0), ("U", " b c ", 1.0))])[1]["equal_texts"] == 1     # as texts too
    assert best_worst([row(("T", "b c", 2.0), ("U", "b  c", 1.0))], same=same)[1]["pairs"] == 1


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_reward_that_is_not_finite_is_refused_wherever_it_stands(reward, place):
    """[1, nan, .5] gave a pair and [nan, 1, .5] none."""
    rewards = [1.0, 0.5, 0.2]
    rewards[place] = reward
    rows = [row(*zip("TUV", "abc", rewards))]
    for choose in (lambda: route(rows, "reward"), lambda: route(rows, "random"), lambda: best_worst(rows),
                   lambda: route(rows, "fixed", table={"fr": "TUV"[place]})):
        with pytest.raises(ValueError, match=f"the reward {reward} of {'TUV'[place]} for the prompt 'p' is"):
            choose()


def test_an_answer_without_a_score_is_neither_chosen_by_reward_nor_paired_and_is_counted():
    rows = [row(("T", "a", None), ("U", "b", -5.0)), row(("T", "a", None), ("U", "b", None))]
    chosen, counts = route(rows, "reward")
    assert [c["completion"] for c in chosen] == ["b"] and counts["unscored"] == 1
    assert len(route(rows, "random")[0]) == 2
    assert best_worst(rows)[0] == []


def test_what_a_prompts_row_carried_of_another_answer_does_not_travel_into_the_new_rows():
    old = {"completion": "old", "chosen": "old", "rejected": "older", "finish_reason": "length", "id": 7}
    rows = [row(("T", "a", 1.0, "stop"), ("U", "b", 0.0, "stop"), **old)]
    [chosen], [pair] = route(rows, "reward")[0], best_worst(rows)[0]
    assert chosen == {"prompt": "p", "language": "fr", "id": 7, "completion": "a", "teacher": "T",
                      "finish_reason": "stop"}
    assert pair.keys() >= {"id", "chosen", "rejected"} and not pair.keys() & {"completion", "finish_reason"}


# teachers' files

@pytest.fixture
def prompts(tmp_path):
    write_jsonl(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "7", "language": "fr"},
            {"prompt": "7", "language": "de"},
            {"prompt": "8", "language": "de"},
            {"prompt": "9"},
        ],
    )
    return load_prompts([tmp_path / "prompts.jsonl"])


def answers(tmp_path, rows):
    write_jsonl(tmp_path / "teacher.jsonl", rows)
    return tmp_path / "teacher.jsonl"


def texts(answers):
    return [answer["completion"] for answer in answers]


def test_an_answer_keeps_what_its_file_says_about_its_end(prompts, tmp_path):
    """Of a completion in messages it was dropped, and "messages": null was a traceback."""
    turns = [{"role": "user", "content": "9"},
             {"role": "assistant", "content": "nine", "finish_reason": "interrupted"}]
    path = answers(tmp_path, [{"prompt": "7", "completion": "a", "finish_reason": "length"},
                              {"messages": turns}, {"prompt": "8", "completion": "b", "finish_reason": None}])
    made = read_answers(path, prompts)
    assert [answer["finish_reason"] for answer in made] == ["length", "length", None, "interrupted"]
    said = {"role": "assistant", "content": "a", "finish_reason": "length"}
    path = answers(tmp_path, [{"prompt": "7", "messages": None, "completion": [said]},
                              {"prompt": "8", "completion": "b", "stop_reason": "max_tokens"},
                              {"prompt": "9", "completion": "c"}])
    assert [a["finish_reason"] for a in read_answers(path, prompts)] == [
        "length",
        "length",
        "max_tokens",
        None,
    ]
    for wrong in (5, ["stop"], {}):
        path = answers(tmp_path, [{"prompt": "7", "completion": "a", "finish_reason": wrong}])
        with pytest.raises(ValueError, match="teacher.jsonl:1: 'finish_reason' must be a text"):
            read_answers(path, prompts)


def test_answers_are_joined_by_prompt_and_language_in_the_prompts_order(prompts, tmp_path):
    path = answers(
        tmp_path,
        [
            {"prompt": "9", "completion": "neun"},
            {"prompt": "8", "language": "deu", "completion": "acht"},
            {"prompt": "7", "language": "German", "completion": "sieben"},
            {"prompt": "7", "language": "fr", "completion": "sept"},
        ],
    )
    assert texts(read_answers(path, prompts)) == ["sept", "sieben", "acht", "neun"]


def test_an_answer_without_a_language_answers_its_prompt_in_any(prompts, tmp_path):
    path = answers(tmp_path, [{"prompt": p, "completion": p * 2} for p in "789"])
    assert texts(read_answers(path, prompts)) == ["77", "77", "88", "99"]


def test_a_prompt_without_a_language_takes_the_answer_in_any(prompts, tmp_path):
    path = answers(
        tmp_path,
        [
            {"prompt": "7", "completion": "a"},
            {"prompt": "8", "completion": "b"},
            {"prompt": "9", "language": "it", "completion": "nove"},
        ],
    )
    assert texts(read_answers(path, prompts)) == ["a", "a", "b", "nove"]


def test_an_answer_in_another_language_is_not_taken_for_the_prompts(prompts, tmp_path):
    """Without an answer in its own language a prompt used to get one in another, which the file said was
    another."""
    path = answers(
        tmp_path,
        [
            {"prompt": "7", "language": "de", "completion": "sieben"},
            {"prompt": "8", "completion": "acht"},
            {"prompt": "9", "completion": "neun"},
        ],
    )
    with pytest.raises(
        ValueError, match="teacher.jsonl: no answer for 1 of 4 prompts, the first: .* '7' in fr"
    ):
        read_answers(path, prompts)


def test_a_missing_answer_is_refused_with_the_prompt(prompts, tmp_path):
    with pytest.raises(
        ValueError, match="no answer for 2 of 4 prompts, the first: .* '8' in .*one line for each prompt"
    ):
        read_answers(answers(tmp_path, [{"prompt": "7", "completion": "a"}]), prompts)


def test_the_first_of_two_answers_to_a_prompt_counts(prompts, tmp_path):
    path = answers(
        tmp_path, [{"prompt": p, "completion": p + suffix} for suffix in ("first", "second") for p in "789"]
    )
    assert texts(read_answers(path, prompts)) == ["7first", "7first", "8first", "9first"]


def test_prompts_of_several_turns_are_joined_by_all_of_them(tmp_path):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "7"},
    ]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": turns}, {"prompt": "7"}])
    path = answers(
        tmp_path,
        [
            {"messages": turns + [{"role": "assistant", "content": "long"}]},
            {"inputs": "7", "targets": "short"},
        ],
    )
    assert texts(read_answers(path, load_prompts([tmp_path / "prompts.jsonl"]))) == ["long", "short"]


def test_an_empty_answer_of_a_teacher_is_refused_with_its_line(prompts, tmp_path):
    with pytest.raises(ValueError, match="teacher.jsonl:2: 'completion' is empty"):
        read_answers(
            answers(tmp_path, [{"prompt": "7", "completion": "a"}, {"prompt": "8", "completion": " "}]),
            prompts,
        )


# preference pairs

def test_the_best_answer_is_chosen_and_the_worst_rejected():
    pairs, counts = best_worst(
        [row(("T", "a", 0.5), ("U", "b", 2.0), ("V", "c", -1.0), ("W", "d", 1.0), question_id="q")]
    )
    assert pairs == [
        {
            "prompt": "p",
            "language": "fr",
            "question_id": "q",
            "chosen": "b",
            "rejected": "c",
            "chosen_reward": 2.0,
            "rejected_reward": -1.0,
            "chosen_teacher": "U",
            "rejected_teacher": "V",
            "chosen_finish_reason": None,
            "rejected_finish_reason": None,
        }
    ]
    assert counts == {"pairs": 1, "equal_texts": 0, "small_margin": 0, **NONE_CUT}


def test_a_pair_needs_two_texts_and_a_difference_above_the_margin():
    rows = [
        row(("T", "a", 1.0), ("U", "a", 0.0)),
        row(("T", "a", 1.0), ("U", "b", 1.0)),
        row(("T", "a", 1.5), ("U", "b", 1.0)),
        row(("T", "a", 1.6), ("U", "b", 1.0)),
    ]
    assert best_worst(rows)[1] == {"pairs": 2, "equal_texts": 1, "small_margin": 1, **NONE_CUT}
    pairs, counts = best_worst(rows, margin=0.5)
    assert counts == {"pairs": 1, "equal_texts": 1, "small_margin": 2, **NONE_CUT}
    assert pairs[0]["chosen_reward"] == 1.6


def test_empty_completions_make_no_pair_though_they_are_the_worst():
    nothing = {"pairs": 0, "equal_texts": 1, "small_margin": 0, **NONE_CUT}
    assert best_worst([row(("T", "a", 1.0), ("U", " ", -5.0))]) == ([], nothing)
    [pair], _ = best_worst([row(("T", "a", 1.0), ("U", "", -5.0), ("V", "c", 0.0))])
    assert (pair["chosen"], pair["rejected"]) == ("a", "c")


def test_samples_of_one_model_need_no_teacher():
    own = {
        "prompt": "p",
        "candidates": [{"completion": "a", "reward": 1.0}, {"completion": "b", "reward": 0.0}],
    }
    [pair], _ = best_worst([own])
    assert pair["chosen"] == "a" and pair["chosen_teacher"] is None


def test_neither_routes_nor_pairs_change_the_rows_they_read():
    rows = [row(("T", "a", 1.0), ("U", "b", 0.0)) for _ in range(3)]
    before = json.dumps(rows)
    route(rows, "reward"), route(rows, "random"), best_worst(rows)
    assert json.dumps(rows) == before


# language and length

def measured(*candidates, **extra):
    """A row whose candidates have a teacher, a reward and a number of tokens."""
    made = row(*[(t, "x" * n, reward) for t, reward, n in candidates], **extra)
    for c, (_, _, n) in zip(made["candidates"], candidates):
        c["num_tokens"] = n
    return made


def test_the_language_guard_marks_answers_that_no_route_and_no_pair_then_takes():
    rows = [row(("T", "en", 9.0), ("U", "fr", 1.0), ("V", "??", 0.0)),
            row(("T", "en", 3.0), ("U", "de", 2.0)), row(("T", "en", 5.0), language=None)]
    counts = language_guard(rows, lambda row, text: None if text == "??" else text)
    assert counts == {"wrong": {"fr": {"T": 2, "U": 1}}, "unknown": 1}
    assert [c.get("wrong_language") for c in rows[0]["candidates"]] == ["en", None, None]
    chosen, counted = route(rows, "reward")
    assert [c["completion"] for c in chosen] == ["fr", "en"]            # without a language no guard
    assert counted["wrong_language"] == 1 and counted["empty"] == 0
    for seed in range(9):
        assert route(rows, "random", seed)[0][0]["completion"] in ("fr", "??")
    assert [(p["chosen"], p["rejected"]) for p in best_worst(rows)[0]] == [("fr", "??")]
    table = guard_table(counts, ["T", "U", "V"])
    assert table[0] == "wrong language: 3 answers, language unknown: 1"
    assert table[2].split() == ["fr", "2", "1", "0"]


def test_the_language_guard_sees_the_row_since_a_translation_is_right_in_another_language():
    question = row(("T", "rot", 1.0), task="translate")
    assert language_guard([question], lambda row, text: row["language"])["wrong"] == {}


def test_length_control_by_hand():
    """fr: rewards 1, 2, 6 at 1, 2, 3 tokens: slope 2.5 around 2 tokens. en: two answers allow no line."""
    rows = [measured(("T", 1.0, 1), ("U", 2.0, 2)), measured(("T", 6.0, 3), ("U", None, 50)),
            measured(("T", 1.0, 1), ("U", 3.0, 9), language="en")]
    fit = length_fit(rows)
    assert fit["fr"] == {"slope": pytest.approx(2.5), "mean_length": 2, "answers": 3,
                         "correlation": pytest.approx(2.5 / 7 ** 0.5)}
    assert fit["en"] == {"slope": 0, "mean_length": 5, "correlation": 0, "answers": 2}
    control_length(rows, fit)
    assert [c["reward"] for row in rows for c in row["candidates"]] == [
        pytest.approx(3.5), 2, pytest.approx(3.5), None, 1, 3]
    assert rows[0]["candidates"][0]["raw_reward"] == 1 and "raw_reward" not in rows[1]["candidates"][1]
    assert length_fit(rows)["fr"]["slope"] == pytest.approx(0)          # nothing is left of the length
    assert len(fit_table(fit)) == 4


def test_length_control_changes_who_wins_where_length_was_the_reason():
    rows = [measured(("T", float(n), n), ("U", n / 2 + 1, n // 2)) for n in (4, 8, 12)]
    assert {c["teacher"] for c in route(rows, "reward")[0]} == {"T"}
    control_length(rows, length_fit(rows))
    assert {c["teacher"] for c in route(rows, "reward")[0]} == {"U"}


def test_the_reward_stands_beside_the_length_for_each_teacher_and_for_the_chosen_answers():
    rows = [measured(("T", 1.0, 2), ("U", 3.0, 8)), measured(("T", 2.0, 4), ("U", None, 6), language="de")]
    chosen, _ = route(rows, "reward")
    assert [(c["reward"], c["num_tokens"]) for c in chosen] == [(3.0, 8), (2.0, 4)]
    found = worth(rows, chosen)
    assert list(found) == ["de", "fr", "all"]
    assert found["all"]["T"] == {"reward": 1.5, "length": 3, "answers": 2}
    assert found["all"]["chosen"] == {"reward": 2.5, "length": 6, "answers": 2}
    assert found["de"]["U"] == {"reward": None, "length": 6, "answers": 1}
    text = worth_table(found, ["T", "U"])
    assert text[2].split() == ["de", "2.00", "4.0", "-", "6.0", "2.00", "4.0"]


def test_the_learned_route_takes_what_its_only_teacher_answered():
    rows = [row(("T", "a", None)), row(("U", "", None)), {"prompt": "p", "candidates": []}]
    chosen, counts = route(rows, "learned")
    assert [c["teacher"] for c in chosen] == ["T"] and counts["empty"] == counts["no_answer"] == 1
