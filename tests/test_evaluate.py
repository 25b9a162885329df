import json
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import program, reward_model, tokenizer

from aya_min.command import guarded
from aya_min.config import Reading
from aya_min.model_config import model_preset
from aya_min.evaluate import main, win_rate_table
from aya_min.evaluate_answers import answers_to_judge, check_texts, grade_answers, score_answers
from aya_min.evaluate_rates import bootstrap_mean, compare, join, rank_correlation, summarize, win_rates
from aya_min.files import write_jsonl
from aya_min.languages import CLUSTERS, LANGUAGES, SHARED
from aya_min.model import RewardModel, init_weights
from aya_min.reward import score_texts
from aya_min.tokenizer import train_tokenizer
from aya_min.weights import save
from aya_min.world import TASKS, gold_answer, make_question

ROOT = Path(__file__).parents[1]


def toy_rows(rng, num_questions=20, **extra):
    """Graded answers to the same questions in every language."""
    return [
        {
            "question_id": f"q{q}",
            "language": code,
            "prompt": f"{code} {q}",
            "completion": "x" * int(rng.integers(1, 9)),
            "grade": int(rng.integers(4)),
            **extra,
        }
        for q in range(num_questions)
        for code in LANGUAGES
    ]


def test_win_rate_is_wins_and_half_the_ties_by_hand():
    rates = win_rates([3, 2, 1, 0, 2], [1, 2, 2, 0, 1], "abcde")
    assert (rates["win"], rates["tie"], rates["loss"], rates["unjudged"], rates["num"]) == (2, 2, 1, 0, 5)
    assert rates["win_rate"] == 60.0 and rates["ci95"][0] < 60 < rates["ci95"][1]


def test_reward_scores_tie_only_when_equal():
    rates = win_rates([0.1, 0.1 + 1e-9, -2.0], [0.1, 0.1, float("inf")], "abc")
    assert (rates["win"], rates["tie"], rates["loss"]) == (1, 1, 1)


def test_self_against_self_is_exactly_50_with_no_width():
    scores = np.random.default_rng(0).normal(size=333)
    rates = win_rates(scores, scores, [i // 3 for i in range(333)])
    assert rates["win_rate"] == 50.0 and rates["ci95"] == [50.0, 50.0] and rates["tie"] == 333


def test_swapped_sides_give_the_mirrored_rate_and_interval():
    rng = np.random.default_rng(0)
    a, b, ids = rng.integers(4, size=600), rng.integers(4, size=600), np.arange(600) // 3
    one, other = win_rates(a, b, ids), win_rates(b, a, ids, seed=1)     # another seed: other resamples
    assert (one["win"], one["tie"], one["loss"]) == (other["loss"], other["tie"], other["win"])
    np.testing.assert_allclose(one["win_rate"], 100 - other["win_rate"])
    width = one["ci95"][1] - one["ci95"][0]
    np.testing.assert_allclose(
        one["ci95"], [100 - other["ci95"][1], 100 - other["ci95"][0]], atol=0.1 * width
    )
    np.testing.assert_allclose(
        one["ci95"], [100 - x for x in win_rates(b, a, ids)["ci95"]][::-1]
    )  # same seed: exact


def test_question_bootstrap_covers_the_truth_and_a_row_bootstrap_would_not():
    """60 questions in 23 languages, half of a score's variance is the question's (true mean 0). The binomial
    noise of 500
    trials at 95% is 1 point; the design effect of a row bootstrap is sqrt(1 + 22 / 2) = 3.5."""
    rng, Q, L, trials = np.random.default_rng(0), 60, 23, 500
    ids, covered, ratio = np.repeat(np.arange(Q), L), [], []
    for trial in range(trials):
        values = (rng.normal(size=(Q, 1)) + rng.normal(size=(Q, L))).ravel() / 2 ** 0.5
        _, (lo, hi) = bootstrap_mean(values, ids, num_resamples=500, seed=trial)
        covered.append(lo < 0 < hi)
        if trial < 10:
            _, (row_lo, row_hi) = bootstrap_mean(values, np.arange(Q * L), num_resamples=500)
            ratio.append((hi - lo) / (row_hi - row_lo))
    assert 0.92 < np.mean(covered) < 0.975, np.mean(covered)
    assert 3.0 < np.mean(ratio) < 4.0, np.mean(ratio)


def test_bootstrap_agrees_with_the_standard_error_when_questions_are_unequal():
    """Resampled questions bring all their rows: the ratio estimator's standard error, by the linearised
    formula."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, size=400)
    ids = np.repeat(np.arange(400), sizes)
    values = rng.normal(size=400)[ids] + rng.normal(size=len(ids))
    mean, (lo, hi) = bootstrap_mean(values, ids, num_resamples=4000)
    assert mean == pytest.approx(values.mean())
    error = np.sqrt((np.bincount(ids, weights=values - mean) ** 2).sum()) / len(ids)
    assert (hi - lo) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_bootstrap_depends_only_on_the_seed():
    values, ids = np.random.default_rng(0).random(200), [i // 2 for i in range(200)]
    assert bootstrap_mean(values, ids) == bootstrap_mean(values, ids) != bootstrap_mean(values, ids, seed=1)
    assert bootstrap_mean([2.5], ["only"]) == (2.5, [2.5, 2.5])


def test_two_thousand_resamples_of_1500_questions_take_well_under_a_third_of_a_second():
    values, ids = np.random.default_rng(0).random(1500), [f"q{i}" for i in range(1500)]
    seconds = []
    for _ in range(3):  # the best of three: the machine is shared
        start = time.perf_counter()
        bootstrap_mean(values, ids)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3, seconds


def test_unjudged_rows_are_counted_and_left_out():
    rates = win_rates([3, None, 1, float("nan"), 2], [1, 2, None, 0, 2], "abcde")
    assert (rates["win"], rates["tie"], rates["loss"], rates["unjudged"], rates["num"]) == (1, 1, 0, 3, 2)
    assert rates == win_rates([3, 2], [1, 2], "ae") | {"unjudged": 3}
    nothing = win_rates([None, 1], [1, None], "ab")
    assert (
        nothing["win_rate"] is None
        and nothing["ci95"] == [None, None]
        and (nothing["num"], nothing["unjudged"]) == (0, 2)
    )
    rng = np.random.default_rng(0)
    rows = toy_rows(rng, 2)
    rows[0]["grade"] = None
    assert compare(rows, rows)["overall"]["unjudged"] == 1
    assert "unjudged" in win_rate_table(
        {
            "judge": "oracle",
            "answers": {"path": "A", "length": 1.0},
            "baseline": {"path": "B", "length": 1.0},
            **compare(rows[:1], rows[:1]),
        }
    )


def test_unmatched_answers_are_refused_with_the_question_named():
    rows = toy_rows(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match=r"'q2' \(uk\) has no row in the baseline"):
        compare(rows, [row for row in rows if (row["question_id"], row["language"]) != ("q2", "uk")])
    with pytest.raises(ValueError, match=r"'q0' \(ar\) has no row in the answers"):
        compare(rows[1:], rows)
    with pytest.raises(ValueError, match=r"'q0' \(ar\) is answered twice"):
        join(rows, rows + rows[:1])
    with pytest.raises(ValueError, match=r"'q0' \(ar\) has another prompt"):
        join(rows, [{**rows[0], "prompt": "another world's"}, *rows[1:]])


def test_answers_without_the_judges_verdict_are_refused_and_the_other_judges_is_not_taken_for_it():
    rows = toy_rows(np.random.default_rng(0), 1)
    with pytest.raises(ValueError, match="has no 'score'"):
        compare(rows, rows, key="score")


def test_rows_are_matched_by_question_and_language_whatever_their_order():
    rng = np.random.default_rng(0)
    a, b = toy_rows(rng), toy_rows(rng)
    shuffled = [b[i] for i in rng.permutation(len(b))]
    assert compare(a, b, num_resamples=50) == compare(a, shuffled, num_resamples=50)


def test_languages_and_clusters_add_up_to_the_overall_counts():
    rng = np.random.default_rng(0)
    a, b = toy_rows(rng), toy_rows(rng)
    a[0]["grade"] = None
    result = compare(a, b, num_resamples=50)
    assert set(result["by_language"]) == set(LANGUAGES) and set(result["by_cluster"]) == {*CLUSTERS, "shared"}
    assert result["by_cluster"]["shared"]["num"] == len(SHARED) * 20
    own = compare(
        a, b, clusters={"latin": ["fr", "es"], "rest": ["ar"]}, num_resamples=50
    )  # a user's, that names few languages
    assert set(own["by_cluster"]) == {"latin", "rest", "shared", "other"}
    for parts in (result["by_language"], result["by_cluster"], own["by_cluster"]):
        for count in ("win", "tie", "loss", "unjudged", "num"):
            assert sum(part[count] for part in parts.values()) == result["overall"][count]
        assert sum(part["win_rate"] * part["num"] for part in parts.values()) == pytest.approx(
            result["overall"]["win_rate"] * result["overall"]["num"])


def test_summary_by_hand():
    rows = [
        {
            "question_id": "1",
            "language": "fr",
            "task": "sum",
            "completion": "trois",
            "grade": 3,
            "seen_language": "fr",
        },
        {
            "question_id": "2",
            "language": "fr",
            "task": "odd",
            "completion": "ok",
            "grade": 0,
            "seen_language": None,
        },
        {
            "question_id": "1",
            "language": "de",
            "task": "sum",
            "completion": "drei",
            "grade": 2,
            "seen_language": "de",
        },
        {
            "question_id": "2",
            "language": "de",
            "task": "odd",
            "completion": "x",
            "grade": None,
            "seen_language": "fr",
        },
    ]
    summary = summarize(rows)
    assert (summary["num"], summary["right_language"], summary["length"]) == (4, 0.5, 3.0)
    assert summary["grade"] == pytest.approx(5 / 3)                     # the unjudged answer is left out
    assert summary["grade_ci95"] == [0.0, 2.5]                          # the two questions' own means
    assert summary["by_language"]["fr"] == {"num": 2, "grade": 1.5, "right_language": 0.5, "length": 3.5}
    assert summary["by_task"]["sum"] == {"num": 2, "grade": 2.5, "right_language": 1.0, "length": 4.5}
    bare = [{"question_id": "1", "language": "fr", "completion": "trois"}]  # no oracle: nothing is made up
    assert summarize(bare) == {
        "num": 1,
        "length": 5.0,
        "by_language": {"fr": {"num": 1, "length": 5.0}},
        "by_task": {},
    }


def test_figures_are_json_that_any_reader_takes():
    rows = toy_rows(np.random.default_rng(0), 2, task="sum", seen_language="fr")
    figures = summarize(rows) | compare(rows, rows)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def world_answers(tmp_path):
    """Two answer files on the embedded world's questions: A right in a sentence; B the same, but garbage
    to two of three tasks."""
    args = {"largest": ["three", "nine", "five"], "opposite": ["big", "hot"], "translate": ["dog", "de"]}
    questions = [make_question(task, args[task], code) for task in args for code in ("en", "ja", "ar")]
    good = [{**q, "completion": gold_answer(q)} for q in questions]
    bad = [
        {**row, "completion": row["completion"] if row["task"] == "largest" else "qxz qxz"} for row in good
    ]
    paths = tmp_path / "good answers.jsonl", tmp_path / "bad.jsonl"
    for path, rows in zip(paths, (good, bad)):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return (good, bad), [str(path) for path in paths]


def arena(a, b, out, judge="oracle", *more):
    command = ["arena", "--answers", a, "--baseline", b, "--judge", judge, "--out", out, *more]
    main([str(word) for word in command])


def refusal(capsys, *arguments):
    """The one line of standard error with which the command ends, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: arena(*arguments), "aya_min.evaluate")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


def test_the_oracle_grades_answers_and_keeps_their_keys(tmp_path):
    (good, bad), _ = world_answers(tmp_path)
    graded = grade_answers(good + bad)
    assert [row["grade"] for row in graded] == [3] * 12 + [0] * 6
    assert all(row["seen_language"] == row["language"] for row in graded[:12]) and all(
        row["why"] for row in graded
    )
    assert [{k: row[k] for k in good[0]} for row in graded] == good + bad


def test_the_arena_command_writes_and_prints_the_oracles_win_rates(tmp_path, capsys):
    _, (a, b) = world_answers(tmp_path)
    arena(a, b, tmp_path / "new folder" / "eval.json")
    result = json.loads((tmp_path / "new folder" / "eval.json").read_text(encoding="utf-8"))
    assert (
        result["judge"] == "oracle"
        and result["answers"]["grade"] == 3.0
        and result["baseline"]["grade"] == 1.0
    )
    assert {k: result["overall"][k] for k in ("win", "tie", "loss", "num")} == {
        "win": 6,
        "tie": 3,
        "loss": 0,
        "num": 9,
    }
    assert result["overall"]["win_rate"] == pytest.approx(250 / 3)
    assert set(result["by_language"]) == {"en", "ja", "ar"} and set(result["by_cluster"]) == {
        "shared",
        "east-asia",
        "west-asia",
    }
    lines = capsys.readouterr().out.splitlines()
    assert "oracle" in lines[0] and any(line.startswith("overall") and "83.3" in line for line in lines)
    assert lines[-1].endswith("eval.json")


def test_a_reward_models_verdict_is_its_scores_and_says_whose_they_are(tmp_path, capsys):
    (good, bad), (a, b) = world_answers(tmp_path)
    tokenizer = train_tokenizer([row["prompt"] for row in good], 512)
    model = init_weights(
        RewardModel(model_preset("smoke", tokenizer.vocab_size)), torch.Generator().manual_seed(0)
    )
    save(tmp_path / "judge-7", model, tokenizer)
    Path(a).write_text(
        "".join(json.dumps(row) + "\n" for row in grade_answers(good)), encoding="utf-8"
    )  # an earlier verdict: not this judge's
    arena(a, b, tmp_path / "eval.json", tmp_path / "judge-7")
    result = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    scores = [score_texts(model, tokenizer, rows) for rows in (good, bad)]
    wins = [a > b for a, b, one, other in zip(*scores, good, bad) if one != other]
    assert (result["overall"]["win"], result["overall"]["loss"]) == (sum(wins), 6 - sum(wins))
    assert result["judge"] == "reward model: judge-7" and "grade" not in result["answers"]
    assert "judged by the reward model: judge-7" in capsys.readouterr().out


def test_equal_answers_tie_under_a_reward_model_though_their_batches_differ(tmp_path):
    """Scoring each file by itself gave 2 ties of 3 here: another padding length moves a score's last bits."""
    (good, bad), _ = world_answers(tmp_path)
    tokenizer = train_tokenizer([row["prompt"] for row in good], 512)
    model = init_weights(
        RewardModel(model_preset("smoke", tokenizer.vocab_size)), torch.Generator().manual_seed(0)
    )
    overall = compare(*score_answers(model, tokenizer, [good, bad]), key="score")["overall"]
    assert overall["tie"] == 3


def test_the_oracle_refuses_a_baseline_that_asks_for_another_right_answer(tmp_path, capsys):
    """The same ids, prompts and answers with other args gave a win rate of 90."""
    (good, _), (a, _) = world_answers(tmp_path)
    for changed in ({"args": ["one", "two", "three"]}, {"task": "reverse"}):
        rows = [{**row, **(changed if i == 0 else {})} for i, row in enumerate(good)]
        other = tmp_path / "other.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        error = refusal(capsys, a, other, tmp_path / "eval.json")
        assert "other.jsonl:1: " in error and "another right answer" in error
    assert not (tmp_path / "eval.json").exists()


def test_the_arena_runs_as_a_module(tmp_path):
    _, (a, b) = world_answers(tmp_path)
    done = program("-m", "aya_min.evaluate", "arena", "--answers", a, "--baseline", b, "--judge", "oracle",
                   "--out", tmp_path / "e.json")
    assert done.returncode == 0 and done.stderr == "" and "83.3" in done.stdout, done


def test_a_users_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(tmp_path, capsys):
    (good, _), (a, b) = world_answers(tmp_path)
    out, broken = tmp_path / "eval.json", tmp_path / "broken.jsonl"

    def refused(said, answers=a, baseline=b, judge="oracle", where=out):
        assert said in refusal(capsys, answers, baseline, where, judge)
        assert not out.exists()

    def broken_by(change):
        broken.write_text(
            "".join(json.dumps(row) + "\n" for row in [good[0], change(good[1])]), encoding="utf-8"
        )
        return broken

    refused("nowhere.jsonl", answers=tmp_path / "nowhere.jsonl")
    refused(
        "broken.jsonl:2: 'completion' is missing",
        answers=broken_by(lambda row: {k: v for k, v in row.items() if k != "completion"}),
    )
    refused("broken.jsonl:2: 'args' is missing", answers=broken_by(lambda row: row | {"args": None}))
    refused(
        "broken.jsonl:2: the oracle knows no task 'poem'",
        answers=broken_by(lambda row: row | {"task": "poem"}),
    )
    refused(
        f"question {good[2]['question_id']!r} (ar) has no row in the answers",
        answers=broken_by(lambda row: row),
    )
    refused("not a model folder", judge=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model_preset("smoke").published()), encoding="utf-8")
    refused("a language model, not a reward model", judge=tmp_path)
    refused("exists", where=a)
    with pytest.raises(SystemExit) as stop:
        main(["arena", "--answers", a, "--jugde", "oracle"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert "poem" not in TASKS


# ---- what other people's files hold ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model's folder, of 64 positions."""
    folder = tmp_path_factory.mktemp("judge") / "rm"
    tokenizer = train_tokenizer([gold_answer(make_question("largest", ["one", "two"], code))
                                 for code in LANGUAGES], 512)
    config = model_preset("smoke", tokenizer.vocab_size)
    config.max_position_embeddings = 64
    save(folder, init_weights(RewardModel(config), torch.Generator().manual_seed(0)), tokenizer)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two or nine?"}]
TURNS = [{"role": "user", "content": "two or nine?"}, {"role": "assistant", "content": "nine"},
         {"role": "user", "content": "And the smallest?"}]


def result_of(tmp_path, rows, others, judge, *more):
    arena(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", others), tmp_path / "e.json", judge,
          *more)
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    (tmp_path / "e.json").unlink()
    return result


def test_conversations_numeric_ids_and_rows_without_a_language_are_judged(tmp_path, judge, capsys):
    """The arena refused what generate.py wrote: only texts were taken for prompt, question_id and
    language."""
    rows = [{"question_id": 1, "language": "en", "prompt": ASKED}, {"question_id": "2", "prompt": TURNS},
            {"question_id": 2.5, "language": None, "prompt": "eins"},
            {"id": 7, "prompt": "zwei", "task": None},
            {"prompt": "drei", "task": ["a"]}, {"prompt": "vier", "language": "sw", "task": {"a": 1}}]
    a = [{**row, "completion": f"answer {i}"} for i, row in enumerate(rows)]
    b = [{**row, "completion": "other"} for row in rows]
    b[0]["question_id"], b[1]["question_id"] = "1", 2
    result = result_of(tmp_path, a, b[::-1], judge)
    assert result["overall"]["num"] == 6 and set(result["by_language"]) == {"en", "other", "sw"}
    assert set(result["by_cluster"]) == {"shared", "other"} and result["answers"]["by_task"] == {}
    assert "other" in capsys.readouterr().out
    own = result_of(tmp_path, a, a, judge)["overall"]
    assert (own["tie"], own["win_rate"]) == (6, 50.0)


def test_other_peoples_names_of_keys_are_mapped(tmp_path, judge):
    rows = [{"uid": i, "question": f"q{i}", "lang": code, "answer": "x" * i} for i,
            code in ((1, "fr"), (2, "pt-BR"))]
    columns = ["--columns", "question_id=uid", "prompt=question", "language=lang", "completion=answer"]
    result = result_of(tmp_path, rows, rows, judge, *columns)
    assert result["overall"]["tie"] == 2 and set(result["by_language"]) == {"fr", "pt-BR"}
    # pt-BR is at home where pt is
    assert set(result["by_cluster"]) == {"shared", "west-europe"}


def test_a_language_is_at_home_in_its_own_cluster_before_that_of_the_language_it_is_a_kind_of():
    rows = [{"question_id": str(i), "language": code, "completion": "", "grade": 1}
            for i, code in enumerate(["pt", "pt-BR", "zh-Hant-TW", "zh-Hans", "sw", "other"])]
    clusters = {"lusitania": ["pt"], "brazil": ["pt-BR"], "han": ["zh"], "taiwan": ["zh-Hant"]}
    counts = {name: part["num"] for name, part in compare(rows, rows,
                                                          clusters=clusters)["by_cluster"].items()}
    assert counts == {"lusitania": 1, "brazil": 1, "han": 1, "taiwan": 1, "other": 2}


def test_answers_cut_at_their_limit_are_judged_and_counted_for_each_side_and_language(tmp_path, judge,
                                                                                      capsys):
    rows = [{"question_id": str(i), "language": code, "prompt": "p", "completion": f"c{i}",
             "finish_reason": reason}
            for i, (code, reason) in enumerate([("fr", "length"), ("fr", "stop"), ("de", "max_tokens"),
                                                ("de", None)])]
    stopped = [{**row, "completion": "d", "finish_reason": "stop"} for row in rows]
    result = result_of(tmp_path, rows, stopped, judge)
    assert result["overall"]["num"] == 4 and (result["answers"]["cut"], result["baseline"]["cut"]) == (2, 0)
    assert {code: part["cut"] for code, part in result["answers"]["by_language"].items()} == {"fr": 1,
                                                                                              "de": 1}
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[-5][-1:] == ["2/0"] or any(line[:1] == ["overall"] and line[-1] == "2/0" for line in shown)
    assert any(line[:2] == ["fr", "French"] and line[-1] == "1/0" for line in shown)


def test_an_earlier_judges_verdict_is_taken_from_no_row(tmp_path, judge):
    rows = [{"question_id": "1", "language": "fr", "prompt": "p", "completion": "c", "grade": "y", "score": 9,
             "reward": [], "why": 1, "seen_language": "de"}]
    side = result_of(tmp_path, rows, rows, judge)["answers"]
    assert "grade" not in side and "right_language" not in side


@pytest.mark.parametrize("long", [{"prompt": "w " * 60, "completion": "c"},
                                  {"prompt": "p", "completion": "w" * 500},
                                  {"prompt": [*TURNS[:1], {"role": "assistant", "content": "w " * 70},
                                              TURNS[2]],
                                   "completion": "c"}])
def test_what_passes_the_judges_positions_is_refused_before_work_or_left_unjudged_or_cut(long, tmp_path,
                                                                                         judge, capsys):
    """A reward model of 1,024 positions scored 3,000 tokens, exit code 0; one of 1 MB took 2.5 GB."""
    rows = [{"question_id": "1", "language": "fr", "prompt": "p", "completion": "c"},
            {"question_id": "2", **long}]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])
    said = refusal(capsys, a, b, tmp_path / "e.json", judge)
    assert "a.jsonl:2: question and answer have" in said and "the judge 64 positions" in said
    skipped = result_of(tmp_path, rows, rows, judge, "--too-long", "skip")["overall"]
    assert (skipped["unjudged"], skipped["num"]) == (1, 1)
    cut = result_of(tmp_path, rows, rows, judge, "--too-long", "cut-left")["overall"]
    alone = len(long["completion"]) == 500          # an answer that passes the positions without its question
    assert (cut["unjudged"], cut["num"], cut["tie"]) == ((1, 1, 1) if alone else (0, 2, 2))


def test_a_judge_whose_scores_are_not_finite_is_named_and_nothing_is_written(tmp_path, judge, capsys):
    from aya_min.weights import load
    model, tokenizer = load(judge)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    save(tmp_path / "nan", model, tokenizer)
    rows = write(tmp_path / "a.jsonl", [{"question_id": "1", "prompt": "p", "completion": "c"}])
    assert "nan" in refusal(capsys, rows, rows, tmp_path / "e.json", tmp_path / "nan")
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("change, says", [
    ({"question_id": True}, "'question_id' must be a text or a number"),
    ({"question_id": ["q"]}, "'question_id' must be"),
    ({"completion": None}, "'completion' is missing or no text"),
    ({"completion": ["c"]}, "'completion' is missing"),
    ({"prompt": 5}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": [{"role": "user"}]}, "prompt"),
    ({"finish_reason": 1}, "'finish_reason' must be a text"),
    ({"prompt": "<|USER_TOKEN|>hi"}, "<|USER_TOKEN|>"),
    ({"completion": "x<BOS_TOKEN>"}, "<BOS_TOKEN>"), ({"question_id": "1"}, "is answered twice")])
def test_a_row_that_the_arena_cannot_judge_is_named_with_file_and_line(change, says, tmp_path, judge, capsys):
    rows = [{"question_id": i, "prompt": "p", "completion": "c"} for i in (1, 2)]
    bad = write(tmp_path / "bad.jsonl", [rows[0], rows[1] | change])
    said = refusal(capsys, bad, bad, tmp_path / "e.json", judge)
    assert "bad.jsonl:2: " in said and says in said


@pytest.mark.parametrize("change, says", [
    ({"args": ["one", "nix"]}, "'nix'"), ({"args": [1, 2]}, "English words"),
    ({"args": {"one": 1}}, "English words"),
    ({"args": []}, "more args"), ({"task": "translate", "args": ["one", "../../../etc"]}, "'../../../etc'"),
    ({"language": "sw"}, "no language 'sw'"), ({"language": None}, "no language 'other'"),
    ({"task": 5}, "no task 5"),
    ({"task": ["largest"]}, "no task ['largest']"), ({"task": None}, "'task' is missing"),
    ({"task": "sum", "args": ["twelve", "nine"]}, "above twelve")])
def test_a_question_that_is_not_the_oracles_is_named_with_file_and_line(change, says, tmp_path, capsys):
    row = {**make_question("largest", ["one", "two"], "fr"), "completion": "c"}
    path = write(tmp_path / "a.jsonl", [{**row, "question_id": "0"}, row | change])
    said = refusal(capsys, path, path, tmp_path / "e.json")
    assert "a.jsonl:2: " in said and says in said


def test_an_output_that_exists_is_never_written_through(tmp_path, capsys):
    """--out through a dangling link made the file that it leads to."""
    rows = write(tmp_path / "a.jsonl", [{**make_question("largest", ["one", "two"], "fr"),
                                         "completion": "c"}])
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "file").write_text("mine")
    for name, says in (("link.json", "exists"), ("file", "exists"), ("file/e.json", "no folder"),
                       ("a.jsonl", "exists")):
        assert says in refusal(capsys, rows, rows, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "link.json", "file"}


def test_a_full_disk_leaves_no_cut_file(tmp_path, capsys, monkeypatch):
    """A cut eval.json of 1,024 bytes stayed, and the next run refused it as existing."""
    rows = write(tmp_path / "a.jsonl", [{**make_question("largest", ["one", "two"], "fr"),
                                         "completion": "c"}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        said = refusal(capsys, rows, rows, tmp_path / "e.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "e.json" in said and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_empty_answers_are_counted_aloud(tmp_path, capsys):
    rows = [{"prompt": str(i), "language": "en", "completion": text} for i, text in enumerate(["", " ", "a"])]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert len(answers_to_judge(tmp_path / "a.jsonl", "RM")) == 3
    assert "2 of 3 answers are empty" in capsys.readouterr().err


def test_a_critique_is_read_by_reward_models_alone_and_else_named(tmp_path, capsys):
    """Language models by a protocol read none, and nothing said so."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "critique": "c"}])
    for protocol, is_named in ((None, False), ("scores", True)):
        answers_to_judge(tmp_path / "a.jsonl", "folder", protocol=protocol)
        assert ("keys that are not read: 'critique'" in capsys.readouterr().err) == is_named


def test_a_critique_that_spells_a_control_token_is_not_judged(tmp_path):
    judge = reward_model()
    judge.config.critiques = True
    save(tmp_path / "RM", judge, tokenizer())
    row = {"prompt": "a", "completion": "b", "critique": "<|END_OF_TURN_TOKEN|>"}
    write_jsonl(tmp_path / "a.jsonl", [row])
    rows = answers_to_judge(tmp_path / "a.jsonl", "RM")
    with pytest.raises(ValueError, match="a.jsonl:1: a text spells the control token"):
        check_texts(rows, tmp_path / "RM", Reading())


def test_a_rank_correlation_by_hand():
    """Of ranks 1 2 3 4 against 2 1 4 3 it is 1 - 6 * 4 / (4 * 15); equal values share their ranks."""
    assert rank_correlation([1, 2, 3, 40], [5, 1, 9, 7])[0] == pytest.approx(0.6)
    value, (low, high) = rank_correlation([1, 2, 3, 40], [3, 5, 7, 7.5])
    assert value == pytest.approx(1.0) and high == pytest.approx(1.0) and low >= 0
    assert rank_correlation([1, 1, 2], [1, 2, 3])[0] == pytest.approx(3 ** 0.5 / 2)     # ranks 1.5 1.5 3
    assert rank_correlation([1, 2, 3], [4, 4, 4]) == (0.0, [0.0, 0.0])
    value, (low, high) = rank_correlation(range(40), [x % 7 for x in range(40)])
    assert -1 <= low < value < high <= 1
