"""evaluate arena --protocol and evaluate leaderboard, as commands. The judge's weights are made by hand."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bad_server import KEY, Server, message, reply
from small import language_model, on_ranks, reward_model, tokenizer
from test_judges import sides_of

from aya_min import judges
from aya_min.evaluate_judges import check_judge_fits, judged_in
from aya_min.journal import Journal
from aya_min.judges import Judging, verdict_rows
from aya_min.command import guarded
from aya_min.evaluate import main
from aya_min.evaluate_leaderboard import against, apart, board, board_table, names_of, page_of, strengths
from aya_min.weights import save
from aya_min.world import gold_answer, make_question


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"judge": a language model that says [A>B] to everything, "silent": one that says AAAA..., "rm"}."""
    made = tmp_path_factory.mktemp("judges")
    for name, words in (("judge", "[A>B]"), ("silent", "AA")):
        model = language_model(tie_word_embeddings=False, hidden_size=128, max_position_embeddings=8192)
        says(model, words)
        save(made / name, model, tokenizer())
    save(made / "rm", reward_model(), tokenizer())
    return {path.name: str(path) for path in made.iterdir()}


def says(model, words):
    """Make the next token a function of the last one: after a prompt the first of words, and so on."""
    state = model.state_dict()
    ids = [tokenizer().encode_prompt("x")[-1], *tokenizer().encode(words), tokenizer().end_of_turn_id]
    with torch.no_grad():
        for name, weights in state.items():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                weights.zero_()
        embeddings = state["model.embed_tokens.weight"]
        for before, after in zip(ids, ids[1:]):
            if before != after:
                state["lm_head.weight"][after] += 10 * F.layer_norm(embeddings[before], (128,))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


TEXTS = {"en": ["The answer is nine, as every other number is smaller.", "I do not know this answer at all."],
         "de": ["Die Antwort ist neun, denn alle anderen Zahlen sind kleiner.",
                "Das weiß ich leider nicht genau."],
         "ja": ["答えは九です。ほかの数はもっと小さいです。", "残念ながらわかりません。"]}


def answers(which, num=4):
    """Answers to num questions in three languages; which(i, code) -> 0 (good) or 1."""
    return [{"question_id": i, "language": code, "prompt": f"{code} question {i}: which number is largest?",
             "completion": f"{texts[which(i, code)]} ({i})"}
            for i in range(num) for code, texts in TEXTS.items()]


@pytest.fixture
def files(tmp_path):
    a = write(tmp_path / "a.jsonl", answers(lambda i, code: i % 3 == 0))
    b = write(tmp_path / "b.jsonl", answers(lambda i, code: 1))
    return a, b


def arena(a, b, out, judge, *more):
    words = ("arena", "--answers", a, "--baseline", b, "--judge", judge, "--out", out, *more)
    main([str(word) for word in words])


def refusal(capsys, *words):
    """The one line of standard error with which a command of these words ends, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main([str(word) for word in words]), "aya_min.evaluate")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


PROTOCOL = ("--protocol", "arena-hard", "--max-new-tokens", "12")


def test_a_model_folder_judges_and_a_constant_one_is_named(tmp_path, files, folders, capsys):
    arena(*files, tmp_path / "e.json", folders["judge"], *PROTOCOL)
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert result["judge"] == "judge by the protocol arena-hard" and result["overall"]["num"] == 12
    assert result["overall"]["win_rate"] == 50.0 and result["overall"]["bounds"] == [50.0, 50.0]
    assert result["protocol"]["temperature"] == 0.0 and result["protocol"]["max_new_tokens"] == 12
    assert "WARNING: the judge is constant: its verdict is A>B in all 12 games" in printed
    lines = (tmp_path / "e.verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 24 and {row["said"][0] for row in rows} == {"[A>B]"}
    assert [row["score"] for row in rows[:2]] == [0.0, 1.0] and rows[0]["first"] == "baseline"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "e.json",
                                                                "e.verdicts.jsonl"]


def test_the_table_has_the_share_in_the_right_language(tmp_path, folders, capsys):
    right = answers(lambda i, code: 0)
    wrong = [row | {"completion": TEXTS["en"][0] if row["language"] == "de" else row["completion"]}
             for row in right]
    paths = write(tmp_path / "a.jsonl", right), write(tmp_path / "b.jsonl", wrong)
    arena(*paths, tmp_path / "e.json", folders["judge"], *PROTOCOL)
    table = capsys.readouterr().out
    assert re.search(r"^right language +1\.00 against 0\.67$", table, re.MULTILINE)
    assert re.search(r"^de .* 100/0$", table, re.MULTILINE)
    assert re.search(r"^ja .*100/100$", table, re.MULTILINE)
    arena(*paths, tmp_path / "rm.json", folders["rm"])
    assert "language %" in capsys.readouterr().out


def test_a_judge_that_says_no_verdict_leaves_all_unjudged_with_bounds_of_0_to_100(tmp_path, files, folders,
                                                                                  capsys):
    arena(*files, tmp_path / "e.json", folders["silent"], *PROTOCOL)
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    overall = result["overall"]
    assert (overall["win_rate"], overall["loss"], overall["unjudged"]) == (None, 0, 12)
    assert overall["bounds"] == [0.0, 100.0]
    assert result["about_judge"]["asked_again"] == 24
    assert "24 of 24 games are unjudged" in capsys.readouterr().out


def test_a_killed_arena_resumes_to_the_same_files(tmp_path, files, folders, monkeypatch, capsys):
    arena(*files, tmp_path / "whole.json", folders["silent"], *PROTOCOL, "--temperature", "1")
    real, made = judges.answer_rows, []

    def dies(*args, on_done, **more):
        def counted(i, group):
            on_done(i, group)
            made.append(i)
            if len(made) == 12:
                raise KeyboardInterrupt
        return real(*args, on_done=counted, **more)
    monkeypatch.setattr(judges, "answer_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        arena(*files, tmp_path / "e.json", folders["silent"], *PROTOCOL, "--temperature", "1")
    assert not (tmp_path / "e.json").exists() and (tmp_path / "e.json.partial").is_dir()
    said = refusal(capsys, "arena", "--answers", files[0], "--baseline", files[1], "--judge",
                   folders["silent"], "--out", tmp_path / "e.json", *PROTOCOL, "--temperature", "0.5")
    assert "unfinished run with other temperature" in said
    monkeypatch.setattr(judges, "answer_rows", real)
    # another batch size is not another judge
    arena(*files, tmp_path / "e.json", folders["silent"], *PROTOCOL, "--temperature", "1", "--batch-size",
          "3")
    assert "resumes: 12 verdicts on 24 games were there before" in capsys.readouterr().err
    for name in ("json", "verdicts.jsonl"):
        one, other = ((tmp_path / f"{stem}.{name}").read_text(encoding="utf-8") for stem in ("whole", "e"))
        assert other == one
    assert not (tmp_path / "e.json.partial").exists()


def test_an_arena_that_was_killed_when_its_files_were_there_only_prints_its_table(tmp_path, files, folders,
                                                                                 monkeypatch, capsys):
    def dies(journal):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "remove", dies)
        arena(*files, tmp_path / "e.json", folders["judge"], *PROTOCOL)
    before = (tmp_path / "e.json").read_bytes()
    capsys.readouterr()
    arena(*files, tmp_path / "e.json", folders["judge"], *PROTOCOL)
    assert "the judge is constant" in capsys.readouterr().out
    assert (tmp_path / "e.json").read_bytes() == before and not (tmp_path / "e.json.partial").exists()


@pytest.mark.parametrize("words, says", [
    (("--judge", "RM", "--protocol", "arena-hard"), "a reward model, which follows no protocol"),
    (("--judge", "oracle", "--protocol", "scores"), "--judge oracle follows no protocol"),
    (("--judge", "judge", "--protocol", "arena-harder"), "arena-harder: unknown; give one of arena-hard"),
    (("--judge", "judge"), "give --protocol arena-hard or scores"),
    (("--judge", "http://host/v1#m"), "give --protocol arena-hard or scores"),
    (("--judge", "RM", "--temperature", "0.5"), "--temperature goes with --protocol"),
    (("--judge", "RM", "--concurrency", "2"), "--concurrency goes with an endpoint"),
    (("--judge", "http://127.0.0.1:9/v1", "--protocol", "scores"), "no model is named"),
    (("--judge", "http://h:9/v1#m", "--protocol", "scores", "--dtype", "bfloat16"), "--dtype is for a model"),
    (("--judge", "http://h:9/v1#m", "--protocol", "scores", "--too-long", "skip"), "--too-long is for"),
    (("--judge", "judge", "--protocol", "scores", "--concurrency", "2"), "--concurrency goes with an end"),
    (("--judge", "short", "--protocol", "scores"), "leave such games unjudged with --too-long skip"),
    (("--judge", "judge", "--protocol", "scores", "--too-long", "cut-left"), "would cut the question away"),
    (("--judge", "judge", "--protocol", "scores", "--max-new-tokens", "0"), "at least 1"),
    (("--judge", "nowhere", "--protocol", "scores"), "nowhere")])
def test_a_judge_or_protocol_that_cannot_be_is_refused_in_one_line_and_nothing_is_written(
        words, says, tmp_path, folders, capsys):
    small = language_model()
    save(tmp_path / "short", small, tokenizer())
    names = folders | {"RM": folders["rm"], **{name: str(tmp_path / name) for name in ("nowhere", "short")}}
    rows = [{**make_question("largest", ["one", "two"], "en"), "question_id": "1", "completion": "two"}]
    path = write(tmp_path / "a.jsonl", rows)
    before = sorted(tmp_path.iterdir())
    given = [names.get(word, word) for word in words]
    assert says in refusal(capsys, "arena", "--answers", path, "--baseline", path, "--out",
                           tmp_path / "e.json", *given)
    assert sorted(tmp_path.iterdir()) == before


def test_answers_to_other_prompts_and_names_of_control_tokens_are_refused_with_the_place(tmp_path, folders,
                                                                                         capsys):
    rows = answers(lambda i, code: 0, 1)
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [{**rows[0], "prompt": "another"}, *rows[1:]])
    c = write(tmp_path / "c.jsonl", [{**rows[0], "completion": "<|USER_TOKEN|>"}, *rows[1:]])

    def refused(baseline):
        return refusal(capsys, "arena", "--answers", a, "--baseline", baseline, "--judge", folders["judge"],
                       "--out", tmp_path / "e.json", *PROTOCOL)
    assert "a.jsonl:1: question '0' (en) has another prompt in the baseline" in refused(b)
    assert "c.jsonl:1: a text spells the control token <|USER_TOKEN|>" in refused(c)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    arena(a, c, tmp_path / "e.json", folders["judge"], *PROTOCOL, "--allow-control-tokens")


def test_games_that_are_too_long_are_unjudged_and_counted_by_kind(tmp_path, folders):
    rows = answers(lambda i, code: 0, 2)
    long = [rows[0] | {"completion": "word " * 7000}, *rows[1:]]
    paths = write(tmp_path / "a.jsonl", long), write(tmp_path / "b.jsonl", rows)
    arena(*paths, tmp_path / "e.json", folders["judge"], *PROTOCOL, "--too-long", "skip")
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert (result["overall"]["unjudged"], result["overall"]["num"]) == (1, 5)
    assert result["about_judge"]["unjudged"] == {"too long": 2}


def test_a_recipes_judge_that_can_read_no_question_is_refused_before_any_work(tmp_path, folders):
    save(tmp_path / "short", language_model(), tokenizer())
    rows = [{"prompt_messages": [{"role": "user", "content": "eins"}], "prompt_where": "p.jsonl:1"}]
    for folder, said in ((str(tmp_path / "short"), "p.jsonl:1: .*--judge-max-new-tokens"),
                         (folders["rm"], "a reward model, which follows no protocol")):
        about = Judging(folder, "scores", None, max_new_tokens=64, too_long="skip")
        with pytest.raises(ValueError, match=said):
            check_judge_fits(about, rows)
    check_judge_fits(about._replace(judge=folders["judge"]), rows)


@pytest.mark.long
def test_two_ranks_give_the_verdicts_of_one(tmp_path, folders):
    rows = [{**row, "prompt_messages": [{"role": "user", "content": row["prompt"]}]}
            for row in answers(lambda i, code: 0, 2)]
    pairs = list(zip(rows, [row | {"completion": "other"} for row in rows]))
    about = Judging(folders["silent"], "arena-hard", None, max_new_tokens=6, temperature=1.0)

    def said(folder):
        torch.manual_seed(0)
        return verdict_rows(judged_in(tmp_path / folder, about, pairs, "cpu"))
    (one,), (two, other) = on_ranks(1, said, "one"), on_ranks(2, said, "two")
    assert one == two == other and len(one) == 12
    assert on_ranks(2, said, "two") == [one, one]           # from the journal


def test_a_verdict_file_that_exists_is_not_overwritten(tmp_path, files, folders, capsys):
    (tmp_path / "e.verdicts.jsonl").write_text("mine")
    said = refusal(capsys, "arena", "--answers", files[0], "--baseline", files[1], "--judge",
                   folders["judge"], "--out", tmp_path / "e.json", *PROTOCOL)
    assert "e.verdicts.jsonl exists" in said and (tmp_path / "e.verdicts.jsonl").read_text() == "mine"


# ---- an endpoint judges ------------------------------------------------------------------------------------

def by_endpoint(prefers):
    """A server's answer(body, times) that judges like `test_judges.judge_by`; of text it makes a reply."""
    def answer(body, times):
        found = prefers(*sides_of(body["messages"]), times)
        return found if isinstance(found, bytes) else reply(found)
    return answer


def test_an_endpoint_judges_both_orders_and_its_key_is_written_nowhere(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Server(by_endpoint(lambda question, a, b, times: "[[A>>B]]" if "nine" in a or "neun" in a or "九" in a
                            else "[[B>A]]")) as server:
        arena(*files, tmp_path / "e.json", server.url + "#m", "--protocol", "arena-hard", "--key-from",
              "JUDGE_KEY", "--concurrency", "3")
        asked, printed = server.asked, capsys.readouterr().out
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert result["judge"] == f"{server.host}/m by the protocol arena-hard"
    # of four questions a language two are won in both games; of two the answers are equal
    assert result["overall"]["win_rate"] == 75.0 and result["overall"]["unjudged"] == 0
    assert result["weighted"]["win_rate"] == pytest.approx(100 * (6 * 4 + 6 * 0.5 * 2) / (6 * 4 + 6 * 2))
    assert {(body["temperature"], body["max_tokens"]) for body in asked} == {(0.0, 16000)}
    assert len(asked) == 18
    # what was asked once is paid once
    assert result["about_judge"]["usage"] == {"prompt_tokens": 54, "completion_tokens": 36}
    assert result["about_judge"]["models_returned"] == {"served-name": 18}
    assert "usage: completion_tokens 36, prompt_tokens 54; replies of served-name 18" in printed
    assert asked[0]["messages"][0]["role"] == "system" and asked[0]["seed"] != asked[1]["seed"]
    assert all(KEY not in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert KEY not in printed


def test_what_an_endpoint_does_not_answer_is_asked_again_then_unjudged_by_kind(tmp_path, files):
    def prefers(question, a, b, times):
        if question.startswith("de"):
            return message(content=None, finish="content_filter")
        if question.startswith("ja"):
            return "I cannot say" if times == 0 else "[[B>A]]"
        return "[[A>B]]"
    with Server(by_endpoint(prefers)) as server:
        arena(*files, tmp_path / "e.json", server.url + "#m", "--protocol", "arena-hard")
        temperatures = [body["temperature"] for body in server.asked
                        if "ja question" in body["messages"][1]["content"]]
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert result["by_language"]["de"]["unjudged"] == 4 and result["by_language"]["de"]["bounds"] == [0, 100]
    assert result["by_language"]["ja"]["num"] == 4 and sorted(temperatures) == [0.0] * 6 + [1.0] * 6
    assert result["about_judge"]["unjudged"] == {"content_filter": 8}


def test_an_endpoint_that_is_gone_or_refuses_the_key_is_refused_before_any_work(tmp_path, files, capsys):
    def refused(url):
        return refusal(capsys, "arena", "--answers", files[0], "--baseline", files[1], "--judge", url,
                       "--protocol", "scores", "--out", tmp_path / "e.json")
    with Server(models=lambda headers: (401, {}, b'{"error": {"message": "wrong key"}}')) as server:
        assert "key" in refused(server.url + "#m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


# ---- the leaderboard ---------------------------------------------------------------------------------------

def games_of(wins, num=50):
    """wins: {(i, j): share of num questions that i wins against j}."""
    return [(str(q), "en", i, j, float(q < share * num))
            for (i, j), share in wins.items() for q in range(num)]


def test_two_models_have_the_counted_rate_and_its_elo():
    found = strengths(games_of({(0, 1): 0.8}), ["a", "b"])
    assert found["a"]["win_rate"] == pytest.approx(80, abs=0.3)
    assert found["b"]["win_rate"] == pytest.approx(100 - found["a"]["win_rate"])
    assert found["a"]["elo"] - found["b"]["elo"] == pytest.approx(400 * np.log10(4), abs=8)
    assert found["a"]["ci95"][0] < 80 < found["a"]["ci95"][1] and found["a"]["num"] == 50


def test_bradley_terry_finds_known_strengths_from_uneven_games():
    """Model 2 never meets model 0, yet its place is known by model 1."""
    rng, true = np.random.default_rng(0), np.array([1.0, 0.0, -0.5])
    games = [(str(q), "en", i, j, float(rng.random() < 1 / (1 + np.exp(true[j] - true[i]))))
             for i, j in ((0, 1), (1, 2)) for q in range(4000)]
    found = strengths(games, ["a", "b", "c"])
    elos = np.array([found[name]["elo"] for name in "abc"])
    assert (elos - elos.mean()) * np.log(10) / 400 == pytest.approx(true - true.mean(), abs=0.1)
    chance = 50 * (1 / (1 + np.exp(-1.0)) + 1 / (1 + np.exp(-1.5)))
    assert found["a"]["ci95"][0] < chance < found["a"]["ci95"][1]


def test_a_model_that_wins_all_has_a_finite_strength_and_one_without_games_none():
    games = games_of({(0, 1): 1.0}) + [("0", "en", 0, 2, None)]
    found = strengths(games, ["a", "b", "c"])
    assert 95 < found["a"]["win_rate"] < 100 and abs(found["a"]["elo"]) < 2000
    assert found["c"]["win_rate"] is None and found["c"]["unjudged"] == 1 and found["a"]["unjudged"] == 1


def test_models_that_no_judged_game_joins_have_no_strength_and_are_named():
    """The best of each group had the same strength, as if they had met."""
    games = games_of({(0, 1): 0.9, (2, 3): 0.6}) + [("0", "en", 1, 2, None)]
    found = strengths(games, list("abcd"))
    assert {each["win_rate"] for each in found.values()} == {None} and found["a"]["num"] == 50
    assert apart(games, list("abcd")) == [
        "no judged game joins these groups of models, so that none has a strength: a b; c d"]
    joined = games + [("1", "en", 1, 2, 0.5)]
    assert strengths(joined, list("abcd"))["a"]["elo"] > 0 and apart(joined, list("abcd")) == []


def test_three_strengths_are_those_of_a_search_over_a_grid():
    """The penalty moves them by less than the grid's step of 3 points."""
    games = games_of({(0, 1): 0.7, (1, 2): 0.6, (0, 2): 0.8})
    won = {(0, 1): 35, (1, 2): 30, (0, 2): 40}

    def likelihood(elos):
        return sum(w * math.log(1 / (1 + 10 ** ((elos[j] - elos[i]) / 400)))
                   + (50 - w) * math.log(1 / (1 + 10 ** ((elos[i] - elos[j]) / 400)))
                   for (i, j), w in won.items())
    best = max(((a, b, -a - b) for a in range(0, 200, 3) for b in range(-60, 61, 3)), key=likelihood)
    found = strengths(games, list("abc"))
    assert [found[name]["elo"] for name in "abc"] == pytest.approx(best, abs=4)


def test_against_a_baseline_the_win_rates_are_counted():
    found = against(games_of({(0, 2): 0.8, (1, 2): 0.5}) + [("x", "en", 0, 2, None)], ["a", "b", "c"], 2)
    assert found["a"]["win_rate"] == 80.0 and found["b"]["win_rate"] == 50.0 and "c" not in found
    assert (found["a"]["num"], found["a"]["unjudged"]) == (50, 1)


@pytest.fixture(scope="module")
def world_files(tmp_path_factory):
    """Answers of three models to the embedded world's questions: right in 90%, 60%, 20% of them."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    questions = [make_question("largest", rng.sample(numbers, 3), code)
                 for code in ("en", "de", "ja", "ar", "ru") for _ in range(20)]
    questions = [{**q, "question_id": f"q{i}"} for i, q in enumerate(questions)]
    return [write(folder / f"{name}.jsonl", [
        {**q, "completion": gold_answer(q) if rng.random() < share else "qxz"} for q in questions])
        for name, share in (("strong", 0.9), ("middling", 0.6), ("weak", 0.2))]


def test_the_leaderboard_orders_models_writes_a_page_and_prints_a_table(world_files, tmp_path, capsys):
    main(["leaderboard", *world_files[::-1], "--judge", "oracle", "--out", str(tmp_path / "board.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "board.json").read_text(encoding="utf-8"))
    page = (tmp_path / "board.html").read_text(encoding="utf-8")
    names = ["strong", "middling", "weak"]
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == names
    rates = [result["overall"][name]["win_rate"] for name in names]
    assert rates == sorted(rates, reverse=True) and sum(rates) == pytest.approx(150, abs=0.5)
    assert result["models"]["strong"]["num"] == 100
    assert set(result["by_language"]) == {"en", "de", "ja", "ar", "ru"}
    assert "default-src 'none'" in page and "<script" not in page
    assert "Japanese" in page and "east-asia" in page
    pair = result["pairs"]["strong"]["weak"]
    assert pair["win_rate"] == 100 - result["pairs"]["weak"]["strong"]["win_rate"] > 70
    main(["leaderboard", *world_files[:2], "--baseline", world_files[2], "--judge", "oracle", "--out",
          str(tmp_path / "against.json")])
    result = json.loads((tmp_path / "against.json").read_text(encoding="utf-8"))
    assert result["baseline"] == "weak" and set(result["overall"]) == {"strong", "middling"}
    assert result["overall"]["strong"]["win_rate"] == pytest.approx(pair["win_rate"])
    assert "win rate against weak" in capsys.readouterr().out


@pytest.mark.long
def test_a_leaderboard_by_a_language_model_keeps_what_it_said(files, folders, tmp_path, capsys):
    c = write(tmp_path / "c.jsonl", answers(lambda i, code: 0))
    out = tmp_path / "b.json"
    main(["leaderboard", *files, c, "--judge", folders["judge"], *PROTOCOL, "--out", str(out)])
    result = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert {each["win_rate"] for each in result["overall"].values()} == {50.0}
    assert any("the judge is constant" in each for each in result["warnings"])
    rows = [json.loads(line) for line in open(tmp_path / "b.verdicts.jsonl", encoding="utf-8")]
    assert len(rows) == 3 * 12 * 2 and {(row["answers"], row["baseline"]) for row in rows} == {
        ("a", "b"), ("a", "c"), ("b", "c")}
    assert "right language" in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_what_a_leaderboard_cannot_compare_is_refused(world_files, tmp_path, capsys):
    def refused(*paths, more=()):
        return refusal(capsys, "leaderboard", *paths, "--judge", "oracle", "--out", tmp_path / "o.json",
                       *more)
    assert "two files of answers or more" in refused(world_files[0])
    other = tmp_path / "strong.jsonl"
    other.write_bytes(open(world_files[0], "rb").read())
    assert "two files of answers are named strong" in refused(world_files[0], other)
    rows = [json.loads(line) for line in open(world_files[1], encoding="utf-8")]
    less = write(tmp_path / "less.jsonl", rows[:-1])
    assert f"has no row in the {less}" in refused(world_files[0], less)
    (tmp_path / "o.html").write_text("mine")
    assert "o.html exists" in refused(*world_files)
    assert not (tmp_path / "o.json").exists()


def test_a_name_from_a_file_cannot_write_into_the_page(world_files, tmp_path):
    games = games_of({(0, 1): 0.8})
    names = ["<b>x</b>", 'y" onload="z']
    models = {name: {"num": 1, "length": 3.0} for name in names}
    result = {"judge": "<i>j</i>", "baseline": None, "models": models, **board(games, names, None),
              "warnings": ["<u>w</u>"]}
    page = page_of(result)
    assert not any(tag in page for tag in ("<b>x", "<i>j", "<u>w", 'onload="z'))
    assert "&lt;b&gt;x" in page and "79.9" in board_table(result)
    with pytest.raises(ValueError, match="are named x"):
        names_of(["a/x.jsonl", "b/x.jsonl"])
