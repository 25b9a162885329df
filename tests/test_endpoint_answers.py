"""Endpoints among the teachers of generate.py and of the recipe: flags, keys, resume, what is counted."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
from bad_server import KEY, Server, error, message, reply
from small import CPU, ROOT, TORCHRUN, language_model, on_ranks, reward_model, tokenizer

import generate
import train
from aya_min import config, endpoint_answers, pipeline, pipeline_steps, weights
from aya_min.endpoint import Endpoint
from aya_min.endpoint_answers import (answer_rows, endpoints_of, extra_fields, share, tally,
                                      tally_line)
from aya_min.files import write_jsonl
from aya_min.journal import Journal
from aya_min.pipeline_checks import teacher_name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model A, a reward model RM of 96 positions."""
    folder = tmp_path_factory.mktemp("models")
    weights.save(folder / "A", language_model(0, max_position_embeddings=64), tokenizer())
    weights.save(folder / "RM", reward_model(max_position_embeddings=96), tokenizer())
    return folder


PROMPTS = [{"prompt": word, "language": code, "id": i} for i, (word, code) in enumerate(
    [("red", "en"), ("blue", "en"), ("rot", "de"), ("vert", "fr"), ("one", "en"), ("zwei", "de")])]
FLAGS = ("--arbiter RM --prompts prompts.jsonl --out out.jsonl --candidates all.jsonl --summary s.json "
         "--max-new-tokens 8 --temperature 1 --keep-cut").split()


@pytest.fixture
def here(tmp_path, models, monkeypatch):
    """A new working folder with prompts.jsonl, links to the models, and a key in the environment."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    monkeypatch.setenv("AYA_MIN_API_KEY", KEY)
    for name in ("ask", "check_there"):
        monkeypatch.setattr(endpoint_answers, name, without_waits(getattr(endpoint_answers, name)))
    return tmp_path


def without_waits(function):
    return lambda *words, **more: function(*words, **more, sleep=lambda seconds: None)


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8", newline="\n")]


def assert_no_key(folder, *texts):
    """The key is in no file below the folder and in none of the texts."""
    for text in texts:
        assert KEY not in str(text)
    for path in folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def shout(body, times):
    return reply(f"{body['messages'][-1]['content']}!", usage=(3, 5))


# ---- flags and keys ----------------------------------------------------------------------------------------

def given(key_from=None, concurrency=None, extra=None):
    return types.SimpleNamespace(key_from=key_from, concurrency=concurrency, extra=extra)


TWO = ["http://one:80/v1#m", "http://two/v1#n"]


def test_each_host_gets_the_key_that_is_named_for_it_and_no_other():
    environment = {"AYA_MIN_API_KEY": "k0", "K1": "k1\n", "K2": "k2"}
    [one] = endpoints_of(["A", TWO[0]], given(), environment).values()
    assert (one.key, one.key_from) == ("k0", "AYA_MIN_API_KEY")
    assert endpoints_of(TWO[:1], given(["K1"]), environment)[TWO[0]].key == "k1"
    made = endpoints_of(TWO, given(["one:80=K1", "TWO=K2"]), environment)
    assert [made[text].key for text in TWO] == ["k1", "k2"]
    made = endpoints_of(TWO, given(["two=K2"]), environment)
    assert [made[text].key for text in TWO] == [None, "k2"]
    assert [e.key for e in endpoints_of(TWO, given(), {"AYA_MIN_API_KEY": ""}).values()] == [None, None]
    same_host = ["http://one/v1#m", "http://one/v1#n"]
    assert {e.key for e in endpoints_of(same_host, given(), environment).values()} == {"k0"}


@pytest.mark.parametrize("texts, words, says", [
    (TWO, None, "several hosts (one:80 two); say whose"), (TWO, ["K1"], "say whose the key is"),
    (TWO, ["three=K1"], "no endpoint is on the host"), (TWO, ["two=K1", "two=K1"], "two is given twice"),
    (TWO[:1], ["NO_SUCH"], "NO_SUCH is not set"), (TWO[:1], ["EMPTY"], "EMPTY is not set"),
    (TWO[:1], [KEY], "the variable it names is not set"),
    (TWO[:1], [f"{KEY}="], "no endpoint is on the host"), (TWO[:1], ["SPACE"], "the key in SPACE"),
    (TWO[:1], [f"one:80={KEY}"], "the variable it names is not set"),
    (["A"], ["K1"], "--key-from goes with an endpoint")])
def test_a_key_that_is_not_there_is_one_line_that_does_not_show_it(texts, words, says):
    environment = {"AYA_MIN_API_KEY": "k0", "K1": "k1", "EMPTY": " ", "SPACE": "a b"}
    with pytest.raises(ValueError) as found:
        endpoints_of(texts, given(words), environment)
    assert says in str(found.value) and KEY not in str(found.value)


@pytest.mark.parametrize("text, says", [
    ("", "not JSON"), ("{", "not JSON"), ("[]", "a JSON list"), ('{"a": NaN}', "finite"),
    ('{"a": 1, "a": 2}', "twice"), ('{"model": null}', "'model' is set by"), ('{"n": 3}', "'n' is set by"),
    ('{"stream": true}', "'stream' is set by nothing"), ('{"temperature": 1}', "null leaves a field out")])
def test_extra_fields_are_checked(text, says, here, in_process):
    with Server() as server:
        code, out, err = in_process(generate, "--models", "A", server.url + "#m", *FLAGS, "--extra", text)
        assert (code, out, len(err)) == (2, "", 1) and "argument --extra: " in err[0] and says in err[0], err
    assert extra_fields('{"top_k": 4, "seed": null}') == {"top_k": 4, "seed": None}


WRONG = {"--top-k 4": "--top-k: the endpoint", "--min-p 0.1": "--min-p: the endpoint",
         "--ignore-eos": "--ignore-eos: the endpoint", "--concurrency 0": "argument --concurrency",
         "--concurrency 300": "at most 256", "--key-from NO_SUCH_KEY": "NO_SUCH_KEY is not set"}


@pytest.mark.parametrize("flags", WRONG)
def test_what_an_endpoint_cannot_be_asked_for_is_refused_before_it_is_asked(flags, here, in_process):
    with Server() as server:
        code, out, err = in_process(generate, "--models", "A", server.url + "#m", *FLAGS, *flags.split())
        assert (code, out, len(err)) == (2, "", 1) and WRONG[flags] in err[0], err
        assert not server.headers and not (here / "out.jsonl.partial").exists()


@pytest.mark.parametrize("words, says", [
    ("--model URL --prompts prompts.jsonl --out out.jsonl", "--model, --chat and --serve take model folders"),
    ("--model URL --prompt x", "--model, --chat and --serve take"),
    ("--models A URL --chat", "--serve take model folders"),
    ("--models A URL --serve", "--serve take model folders"),
    ("--models URL --route random --prompts prompts.jsonl --out out.jsonl", "no tokenizer to count lengths"),
    ("--models A http://h/v1 --route random --prompts prompts.jsonl --out o.jsonl", "no model is named"),
    ("--models A --route random --prompts prompts.jsonl --out o --concurrency 2", "goes with an endpoint"),
    ("--models A URL URL --route random --prompts prompts.jsonl --out o.jsonl", "twice")])
def test_where_an_endpoint_cannot_stand_it_is_refused_by_name(words, says, here, in_process):
    with Server() as server:
        code, out, err = in_process(generate, *words.replace("URL", server.url + "#m").split())
        assert (code, out, len(err)) == (2, "", 1) and says in err[0], err
        assert not server.headers


def test_a_key_over_plain_http_is_said_once_and_not_on_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(endpoint_answers, "check_there", lambda one: None)
    for url, says in (("http://h/v1#m", True), ("https://h/v1#m", False), ("http://localhost:1/v1#m", False),
                      ("http://[::1]:1/v1#m", False), ("http://127.0.0.1/v1#m", False)):
        for key in (KEY, None):
            endpoint_answers.check_all_there({url: Endpoint.of(url, key=key)})
            assert ("without encryption" in capsys.readouterr().err) == bool(says and key)


# ---- generate.py -------------------------------------------------------------------------------------------

def test_a_folder_and_an_endpoint_are_one_pool(here, in_process):
    def answer(body, times):
        text = body["messages"][-1]["content"]
        return {"blue": message(content=None), "rot": reply("halb", "length", (3, 8)),
                "vert": reply("vert<|im_end|>"), "one": message(content="<think>x</think>uno")}.get(
                    text) or shout(body, times)
    with Server(answer) as server:
        url = server.url + "#m"
        code, out, err = in_process(generate, "--models", "A", url, *FLAGS, "--stop", "§")
    assert code == 0, err
    rows, summary = read("all.jsonl"), json.loads((here / "s.json").read_text())
    theirs = {row["prompt"]: [c["completion"] for c in row["candidates"] if c["teacher"] == url]
              for row in rows}
    assert theirs == {"red": ["red!"], "blue": [], "rot": ["halb"], "vert": [], "one": ["uno"],
                      "zwei": ["zwei!"]}
    assert all([c["teacher"] for c in row["candidates"]][0] == "A" for row in rows)
    assert all(c["reward"] is not None for row in rows for c in row["candidates"])
    [found] = summary["endpoints"].values()
    assert found["missing"] == {"control tokens": {"fr": 1}, "null content": {"en": 1}}
    assert (found["answers"], found["of"], found["requests"]) == (4, 6, 8)
    assert found["cut"] == {"length": {"de": 1}} and found["reasoning"] == {"en": 1}
    assert found["usage"] == {"prompt_tokens": 24, "completion_tokens": 28}
    assert found["models_returned"] == {"served-name": 4} and len(found["date"]) == 10
    assert (found["host"], found["model"]) == (server.host, "m")
    assert "4 of 6 answers; no answer, left out: control tokens 1 (fr 1), null content 1 (en 1)" in out
    assert all(body["stop"] == ["§"] for body in server.asked)
    assert {row["teacher"] for row in read("out.jsonl")} <= {"A", url}
    [vert] = [row for row in read("out.jsonl") if row["prompt"] == "vert"]
    assert vert["teacher"] == "A" and vert["scores"].keys() == {"A"}
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert_no_key(here, out, err)


def test_endpoints_alone_make_a_pool_with_an_arbiter(here, in_process):
    def long(body, times):
        return reply("word " * 90)                      # longer than the arbiter's positions
    with Server(shout, models=("m", "n")) as one, Server(long, models=("other",)) as two:
        code, out, err = in_process(
            generate, "--models", one.url + "#m", one.url + "#n", two.url + "#o", *FLAGS, "--num-samples",
            "2", "--key-from", f"{one.host}=AYA_MIN_API_KEY", "--pairs", "p.jsonl", "--concurrency", "3")
        assert code in (0, 2), err
    if code == 2:                                       # equal answers make no pairs
        assert "p.jsonl: not a row is left" in err[-1]
    assert any("does not list this model (1: other), and may not have it" in line for line in err)
    assert all("Authorization" not in headers for headers in two.headers)
    assert any("not scored" in line for line in err)
    assert sorted(one.questions) == sorted(two.questions * 2) and len(two.questions) == 12


def test_a_stopped_command_asks_only_for_what_is_missing(here, in_process):
    """The first run's server stops taking the key at the fourth question; one answer is missing."""
    def answer(body, times):
        with_key = server.answers < 4
        server.answers += 1
        if not with_key:
            return 401, {}, error("expired")
        return message(content=None, finish="length") if server.answers == 2 else shout(body, times)
    words = ["--concurrency", "1", "--seed", "3"]
    with Server(answer) as server:
        server.answers = 0
        url = server.url + "#m"
        code, out, err = in_process(generate, "--models", "A", url, *FLAGS, *words)
        assert (code, out) == (2, "") and "HTTP 401: the key in AYA_MIN_API_KEY does not open m" in err[-1]
        assert not (here / "out.jsonl").exists() and (here / "out.jsonl.partial").is_dir()
        assert_no_key(here, err)
        for changed in (["--seed", "4"], ["--temperature", "0.5"], ["--extra", '{"a": 1}'],
                        ["--max-new-tokens", "9"]):
            code, _, err = in_process(generate, "--models", "A", url, *FLAGS, *words[:2], *changed)
            assert code == 2 and "holds an unfinished run with other" in err[-1], err
        for changed in (url + "2", f"http://localhost:{server.http.server_port}/v1#m"):
            code, _, err = in_process(generate, "--models", "A", changed, *FLAGS, *words)
            assert code == 2 and "other models" in err[-1], err
        before, server.answer = list(server.asked), shout
        code, out, err = in_process(generate, "--models", "A", url, *FLAGS, *words)
        assert code == 0 and "resumes: 3 of 12 prompts were finished before" in " ".join(err), err
        assert server.questions[len(before):] == ["blue", "one", "zwei"]
        resumed = (here / "all.jsonl").read_bytes()
        assert json.loads((here / "s.json").read_text())["endpoints"][url]["usage"] == {
            "prompt_tokens": 18, "completion_tokens": 30}
        for name in ("out.jsonl", "all.jsonl", "s.json"):
            (here / name).unlink()
        server.asked.clear()
        assert in_process(generate, "--models", "A", url, *FLAGS, *words)[0] == 0
        assert (here / "all.jsonl").read_bytes() == resumed and len(server.asked) == 6
        assert [body["seed"] for body in server.asked][:1] == [before[0]["seed"]]


@pytest.mark.long
def test_a_killed_command_asks_only_for_what_is_missing(here):
    def answer(body, times):
        if len(server.asked) == 4 and times == 0 and running:
            running.pop().send_signal(signal.SIGKILL)
            server.end.wait(30)
        return shout(body, times)
    with Server(answer) as server:
        words = [sys.executable, ROOT / "generate.py", "--models", "A", server.url + "#m", *FLAGS,
                 "--concurrency", "1"]
        running = [process := subprocess.Popen(words, stderr=subprocess.DEVNULL)]
        assert process.wait() == -signal.SIGKILL
        kept = server.questions[:3]
        server.asked.clear()
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(server.questions + kept) == sorted(row["prompt"] for row in PROMPTS)
    assert_no_key(here, done.stdout, done.stderr)


def test_a_server_that_is_not_there_is_seen_before_any_work(here, in_process):
    with Server() as server:
        url = server.url + "#m"
    code, out, err = in_process(generate, "--models", "A", url, *FLAGS)
    assert (code, out) == (2, "") and "gives no reply (connection: " in err[-1], err
    assert "start the server" in err[-1]
    assert not (here / "out.jsonl.partial").exists()


# ---- ranks -------------------------------------------------------------------------------------------------

def rows_of(prompts=PROMPTS):
    return [{**row, "prompt_messages": [{"role": "user", "content": row["prompt"]}]} for row in prompts]


def ask_on_a_rank(url, folder):
    with Journal(folder, {"url": url}) as journal:
        one = Endpoint.of(url)
        keys = [f"key {i}" for i in range(6)]
        return answer_rows(one, keys, rows_of(), [5, 0, 1, 3], journal, 4, max_new_tokens=4, temperature=0)


def test_ranks_share_the_requests_and_each_gets_all_answers_in_order(tmp_path):
    with Server(shout) as server:
        first, second = on_ranks(2, ask_on_a_rank, server.url + "#m", tmp_path / "two")
        assert first == second and [answer["completion"] for [answer] in first] == [
            "zwei!", "red!", "blue!", "vert!"]
        assert sorted(server.questions) == ["blue", "red", "vert", "zwei"]
        assert ask_on_a_rank(server.url + "#m", tmp_path / "one") == first
        assert len(server.asked) == 8
        assert ask_on_a_rank(server.url + "#m", tmp_path / "two") == first      # all from the journal
        assert len(server.asked) == 8


def refused_on_a_rank(url, folder):
    try:
        ask_on_a_rank(url, folder)
    except ValueError as found:
        return str(found)


@pytest.mark.long
def test_a_rank_may_wait_for_another_longer_than_in_a_collective(tmp_path):
    """It was taken for dead: half an hour of answers, which the other rank still waits for, ended the run."""
    def slow(body, times):
        if body["messages"][-1]["content"] == "zwei":
            time.sleep(9)
        return shout(body, times)
    with Server(slow) as server:
        first, second = on_ranks(2, ask_on_a_rank, server.url + "#m", tmp_path / "two", timeout=5)
    assert first == second and [answer["completion"] for [answer] in first][0] == "zwei!"


@pytest.mark.parametrize("concurrency, ranks", [(1, 1), (8, 3), (3, 2), (1, 2), (2, 4)])
def test_the_ranks_together_ask_as_much_at_a_time_as_is_said_and_every_question_once(concurrency, ranks):
    """--concurrency 1 on two ranks asked two questions at a time."""
    parts = [share(list(range(10)), concurrency, rank, ranks) for rank in range(ranks)]
    assert sum(threads for threads, _ in parts) == concurrency
    assert sorted(i for _, items in parts for i in items) == list(range(10))
    assert all(bool(items) == bool(threads) for threads, items in parts)


def test_a_wrong_key_is_refused_by_all_ranks(tmp_path):
    with Server(lambda body, times: (401, {}, error("no"))) as server:
        both = on_ranks(2, refused_on_a_rank, server.url + "#m", tmp_path / "j")
    assert all("HTTP 401" in said for said in both)


# ---- counts ------------------------------------------------------------------------------------------------

def test_the_tally_by_hand():
    def made(text=None, **more):
        found = {"completion": text, "finish_reason": "stop", "model": "x", "thought": False,
                 "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "tries": 1} | more
        return found if text else found | {"missing": "HTTP 500", "said": "boom", "tries": 8, "usage": {}}
    one = Endpoint.of("http://h/v1#m", key=KEY, key_from="K", extra={"top_k": 1})
    groups = [[made("a"), made()], [made("b", finish_reason="length", thought=True), made("c", model=None)],
              [made(), made("d", usage={"unknown": 1})]]
    found = tally(one, [{"language": "de"}, {"language": "fr"}, {}], groups)
    assert found == {
        "host": "h", "model": "m", "models_returned": {"x": 3, "not named": 1}, "date": found["date"],
        "extra": {"top_k": 1}, "answers": 4, "of": 6, "requests": 20,
        "missing": {"HTTP 500": {"de": 1, "other": 1}}, "said": {"HTTP 500": "boom"},
        "cut": {"length": {"fr": 1}}, "reasoning": {"fr": 1},
        "usage": {"prompt_tokens": 3, "completion_tokens": 6, "unknown": 1}}
    assert tally_line(found) == (
        "h/m: 4 of 6 answers; no answer, left out: HTTP 500 2 (de 1 other 1); cut: length 1 (fr 1); "
        "reasoning left out of 1; 20 requests, 3 + 6 tokens (prompts + answers, 1 replies do not tell)")


# ---- the recipe --------------------------------------------------------------------------------------------

@pytest.fixture
def own(here):
    """The flags of a small recipe of a user's own: 64 prompts, a folder, a file, and room for an endpoint."""
    rows = [{"prompt": f"wort {i}", "language": "de"} for i in range(64)]
    write_jsonl(here / "prompts.jsonl", rows)
    write_jsonl(here / "file.jsonl", [{**row, "completion": f"antwort {i}"} for i, row in enumerate(rows)])
    (here / "clusters.json").write_text('{"west": ["de"]}')
    return ("recipe --preset smoke --base A --arbiter RM --prompts prompts.jsonl --clusters clusters.json "
            "--batch-size 8 --rounds 0 --max-new-tokens 8 --keep-cut --out run --teachers A "
            "file.jsonl").split()


def of_recipe(body, times):
    number = int(body["messages"][-1]["content"].split()[1])
    return message(content=None) if number % 16 == 7 else reply(f"{number} " * 3, usage=(2, 3))


def test_an_endpoint_is_a_teacher_of_the_arbitrage_step(here, own):
    """Answers that are missing are no candidates, and a second call after a kill asks for these alone."""
    rows = rows_of([{"prompt": f"wort {i}", "language": "de"} for i in range(32)])
    with Server(of_recipe) as server:
        url = server.url + "#m"
        run = pipeline_steps.Run(
            here / "run", config.Recipe(max_new_tokens=8, too_long="skip"), CPU, {}, base=here / "A",
            prompts=rows, arbiter=here / "RM", endpoints={url: Endpoint.of(url, key=KEY)}, concurrency=2)
        teachers = {"A": here / "A", teacher_name(url): url}
        made = pipeline.arbitrage(run, teachers, here / "RM")
        assert len(server.asked) == 32 + 2 * 2
        names = [[c["teacher"] for c in row["candidates"]] for row in made]
        both = ["A", f"{server.host}/m"]
        assert names == [["A"] if i % 16 == 7 else both for i in range(32)]
        assert made[3]["candidates"][1]["completion"] == "3 3 3 "
        record = json.loads((here / "run" / "steps" / "arbitrage" / "done.json").read_text())
        assert record["endpoints"][both[1]]["missing"] == {"null content": {"de": 2}}
        (here / "run" / "steps" / "arbitrage" / "done.json").unlink()           # as after a kill
        server.asked.clear()
        assert pipeline.arbitrage(run, teachers, here / "RM") == made
        assert set(server.questions) == {"wort 7", "wort 23"}
    assert_no_key(here / "run")


@pytest.mark.parametrize("url, says", [
    ("http://h/v1", "no model is named"), ("http://a:b@h/v1#m", "may hold a secret"),
    ("GONE", "gives no reply"), ("LOCKED", "HTTP 401: the key in AYA_MIN_API_KEY")])
def test_the_recipe_looks_at_its_endpoints_before_any_work(url, says, own, here, in_process):
    with Server(models=lambda headers: (401, {}, error("no"))) as locked:
        with Server() as gone:
            pass
        url = {"GONE": gone.url + "#m", "LOCKED": locked.url + "#m"}.get(url, url)
        code, out, err = in_process(train, *own, url)
    assert (code, out) == (2, "") and says in err[-1] and not (here / "run").exists(), err
    code, out, err = in_process(train, *own, "--concurrency", "2")
    assert code == 2 and "--concurrency goes with an endpoint" in err[-1]


@pytest.mark.long
def test_a_recipe_on_two_ranks_that_is_killed_asks_only_for_what_is_missing(own, here):
    def answered():
        lines = [line for path in here.glob("run/data/answers-2/*.jsonl") for line in path.open()]
        return {"wort " + json.loads(line)[0].split()[1] for line in lines if line.endswith("\n")}
    with Server(of_recipe) as server:
        words = [sys.executable, *TORCHRUN, ROOT / "train.py", *own, server.url + "#m", "--concurrency", "2"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(answered()) < 20 and process.poll() is None:
            time.sleep(0.01)
        ranks = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        for pid in [process.pid, *map(int, ranks)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        kept = answered()
        assert 20 <= len(kept) < 60 and len(ranks) == 2
        first = len(server.asked)
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert set(server.questions[first:]) == {f"wort {i}" for i in range(64)} - kept
    assert_no_key(here / "run", done.stdout, done.stderr)


@pytest.mark.long
def test_a_recipe_with_an_endpoint_that_stops_goes_on_where_it_was(own, here, in_process):
    def answer(body, times):
        return (403, {}, error("enough")) if len(server.asked) > 20 else of_recipe(body, times)
    with Server(answer) as server:
        words = [*own, server.url + "#m"]
        code, _, err = in_process(train, *words)
        assert code == 2 and "HTTP 403" in err[-1] and "(enough)" in err[-1]
        first, server.answer = len(server.asked), of_recipe
        code, out, err = in_process(train, *words)
        assert code == 0, err
        assert first + len(server.asked[first:]) < 64 + 2 * 4 + 20
        assert len(set(server.questions)) == 64 and any("were answered before" in line for line in err)
        asked = len(server.asked)
        summary = json.loads((here / "run" / "summary.json").read_text())
        name = f"{server.host}/m"
        found = summary["arbitrage"]["endpoints"][name]
        assert (found["answers"], found["of"], summary["arbitrage"]["missing"]) == (60, 64, 4)
        assert summary["arbitrage"]["unscored"] == 0
        assert name in summary["teacher_wins"]["de"]
        assert f"{name}: 60 of 64 answers; no answer, left out: null content 4 (de 4)" in " ".join(err)
    # without its server: the arbitrage is whole
    code, _, err = in_process(train, *words)
    assert code == 0 and len(server.asked) == asked, err
    assert name in (here / "run" / "report.html").read_text()
    assert_no_key(here / "run", out, err)
    code, _, err = in_process(train, *words, "--extra", '{"top_k": 1}')
    assert code == 2 and "holds a run with other extra" in err[-1]
