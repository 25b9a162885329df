"""generate.py route and --route learned: a router is trained from candidates that generate.py wrote, and then
only its teacher answers. What goes with arbitrage besides: samples, the language guard, length control."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from small import language_model, on_ranks, reward_model, router, tokenizer

import generate
from aya_min import generate_route, stages, weights
from aya_min.files import write_jsonl
from aya_min.world import questions

PROMPTS = [{"prompt": f"{word} {i}", "language": code, "id": f"{code}{i}"} for i in range(4)
           for word, code in [("red", "en"), ("rot", "de"), ("vert", "fr")]]
POOL = ("--models A B --prompts prompts.jsonl --out out.jsonl --max-new-tokens 12 --temperature 1 --keep-cut")
ROUTE = "route --train c.jsonl --model A --out R --batch-size 8 --max-steps 4 --held-out 0.25"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models A, B, C, a reward model RM, a router AB for A and B, and c.jsonl with candidates of both."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ABC"):
        weights.save(folder / name, language_model(seed, max_position_embeddings=64), tokenizer())
    weights.save(folder / "RM", reward_model(max_position_embeddings=96), tokenizer())
    weights.save(folder / "AB", router(11, teachers="AB", max_position_embeddings=64), tokenizer())
    rows = [{"prompt": f"{'red vert'.split()[i % 2]} {i}", "language": ("en", "fr")[i % 2], "candidates": [
        {"teacher": t, "completion": "x " * (1 + i % 3), "reward": float((t == "A") == (i % 2 == 0))}
        for t in "AB"]} for i in range(24)]
    write_jsonl(folder / "c.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", PROMPTS)
    return folder


@pytest.fixture
def here(tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def call(here, in_process):
    return lambda line: in_process(generate, *line.split())


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def refused(result, *says):
    code, out, err = result
    assert code == 2 and out == "" and all(text in err[-1] for text in says), err


def bits(folder):
    return load_file(folder / "model" / "model.safetensors")


# ---- route -------------------------------------------------------------------------------------------------

def test_a_router_is_trained_and_compared_on_held_out_prompts(call, here):
    code, out, err = call(ROUTE)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "6 held-out prompts (--held-out 0.25 of c.jsonl), 2 teachers"
    assert lines[-1] == "R/model"
    assert [line.split()[0] for line in lines[2:7]] == ["reward", "fixed", "learned", "random", "single"]
    about = json.loads((here / "R/model/config.json").read_text())
    assert about["teachers"] == ["A", "B"] and about["tau"] == 1.0
    found = json.loads((here / "R/routes.json").read_text())
    assert (found["items"], found["held_out"]) == (18, 6) and found["routes"]["reward"]["reward"] == 1
    evaluated = json.loads((here / "R/eval.json").read_text())
    for ours, theirs in (("agreement", "agreement"), ("regret", "regret"), ("reward", "reward")):
        assert found["routes"]["learned"][theirs] == pytest.approx(evaluated[ours])
    refused(call(ROUTE), "R exists; give a new file")


def test_held_out_rows_may_come_from_a_file(call, here):
    write_jsonl(here / "held.jsonl", read("c.jsonl")[:5])
    code, out, err = call(f"{ROUTE} --eval-data held.jsonl")
    assert code == 0 and out.splitlines()[0] == "5 held-out prompts (held.jsonl), 2 teachers", err
    assert json.loads((here / "R/routes.json").read_text())["items"] == 24
    code, out, err = call(ROUTE.replace("--out R", "--out S").replace("0.25", "0"))
    assert code == 0 and out.splitlines()[0].startswith("no prompts were held out"), err


def test_a_killed_route_goes_on_to_the_router_that_train_py_makes(call, here, in_process, monkeypatch):
    import train
    assert call(ROUTE)[0] == 0
    line = ROUTE.replace("route --train", "router --data").replace("--out R", "--out T")
    code, out, err = in_process(train, *line.split())
    assert code == 0 and out.strip() == "T/model", err
    whole = bits(here / "R")
    assert all(torch.equal(bits(here / "T")[name], t) for name, t in whole.items())
    monkeypatch.setattr(stages, "save_model", lambda *_: sys.exit(9))       # killed before it was published
    line = f"{ROUTE.replace('--out R', '--out S')} --save-every 2"
    assert call(line)[0] == 9 and not (here / "S/model").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    refused(call(line.replace("c.jsonl", "c.jsonl --tau 2")), "that run had tau 1.0, not 2.0")
    code, _, err = call(line)
    assert code == 0 and any("resumes after step 4" in text for text in err), err
    assert all(torch.equal(bits(here / "S")[name], t) for name, t in whole.items())


@pytest.mark.parametrize("change, says", [
    ("--model A>--model RM", None), ("--model A>--model none", "none"),
    ("--model A>--model ABC", "a router for other teachers (A B C) than those of the candidates (A B)"),
    ("c.jsonl>none.jsonl", "none.jsonl"), ("c.jsonl>prompts.jsonl", "prompts.jsonl:1: no 'candidates'"),
    ("c.jsonl>one.jsonl", "all candidates are of the teacher A"),
    ("c.jsonl>bare.jsonl", "no candidate has a reward"), ("c.jsonl>c.jsonl --tau 0", "--tau"),
    ("c.jsonl>c.jsonl --tau nan", "--tau"), ("--held-out 0.25>--held-out 1", "--held-out"),
    ("--held-out 0.25>--held-out 0.001", "holds out 0"), ("--batch-size 8>--batch-size 99", "fewer than one"),
    ("c.jsonl>c.jsonl --eval-data other.jsonl", "other.jsonl:1: its file has candidates of C"),
    ("--out R>--out A", "A/config.json: stage is not as a stage"),
    ("--model A>--model broken", "belong to different models")])
def test_what_makes_no_router_is_one_line_and_nothing_is_written(change, says, call, here):
    rows = read("c.jsonl")
    write_jsonl(here / "one.jsonl", [{**row, "candidates": row["candidates"][:1]} for row in rows])
    for name, other in (("bare", {"reward": None}), ("other", {"teacher": "C"})):
        write_jsonl(here / f"{name}.jsonl", [{**row, "candidates": [
            {**c, **other} if name == "bare" or c["teacher"] == "A" else c for c in row["candidates"]]}
            for row in rows])
    weights.save(here / "ABC", router(teachers="ABC"), tokenizer())
    weights.save(here / "broken", language_model(vocab_size=350), tokenizer())
    before, (old, new) = sorted(here.rglob("*")), change.split(">")
    result = call(ROUTE.replace(old, new))
    if says is None:                    # the decoder of a reward model is a decoder
        assert result[0] == 0
        return
    refused(result, says)
    assert len(result[2]) <= 2 and sorted(here.rglob("*")) == before


# ---- the learned route -------------------------------------------------------------------------------------

def test_only_the_chosen_teacher_answers_each_prompt_as_it_answers_all(call, here):
    """An answer depends on its teacher, prompt and seed, not on who else was asked."""
    code, out, err = call(f"{POOL} --route learned --router AB")
    assert code == 0, err
    rows = read("out.jsonl")
    assert len(rows) == 12 and {row["teacher"] for row in rows} == {"A", "B"}
    assert all(list(row["scores"].items()) == [(row["teacher"], None)] for row in rows)
    assert all(row["reward"] is None for row in rows)
    tokens = int(err[-1].split(", ")[1].split()[0])
    code, _, err = call(f"{POOL.replace('out.jsonl', 'all.jsonl')} --arbiter RM --candidates all-c.jsonl")
    assert code == 0 and int(err[-1].split(", ")[1].split()[0]) > 1.5 * tokens
    of_all = {(row["id"], c["teacher"]): c["completion"] for row in read("all-c.jsonl")
              for c in row["candidates"]}
    assert all(of_all[row["id"], row["teacher"]] == row["completion"] for row in rows)


def test_a_router_that_was_just_trained_is_found_in_its_run_folder(call, here):
    assert call(ROUTE)[0] == 0
    code, _, err = call(f"{POOL} --route learned --router R --arbiter RM --num-samples 2 --pairs p.jsonl")
    assert code == 0, err
    pairs = read("p.jsonl")
    assert pairs and all(p["chosen_reward"] > p["rejected_reward"] and p["chosen_teacher"] in "AB"
                         and p["chosen_teacher"] == p["rejected_teacher"] for p in pairs)


def test_a_stopped_learned_route_asks_only_for_what_is_left(call, here, monkeypatch):
    from aya_min.journal import Journal
    add, made = Journal.add, []

    def add_and_stop(journal, *given):
        add(journal, *given)
        made.append(given)
        if len(made) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(Journal, "add", add_and_stop)
    line = f"{POOL} --route learned --router AB"
    assert call(line)[0] == 130
    monkeypatch.setattr(Journal, "add", add)
    assert call(line)[2][0] == "resumes: 3 of 12 prompts were finished before"
    parts = read("out.jsonl")
    assert call(line.replace("out.jsonl", "whole.jsonl"))[0] == 0 and read("whole.jsonl") == parts


@pytest.mark.long
def test_ranks_route_alike(call, here):
    line = f"{POOL} --route learned --router AB"
    assert call(line)[0] == 0
    words = line.replace("out.jsonl", "two.jsonl").split()
    on_ranks(2, lambda: generate.run_command(generate.make_parser().parse_args(words), torch.device("cpu")))
    assert read("two.jsonl") == read("out.jsonl")


@pytest.mark.parametrize("flags, says", [
    ("--route learned", "--route learned needs --router DIR"),
    ("--route random --router AB", "--router goes with --route learned"),
    ("--route learned --router A", "--router A: a language model, not a router"),
    ("--route learned --router none", "none"),
    ("--route learned --router AB --models A C", "--router AB: it chooses among A B; give these as --models, "
                                                 "not A C"),
    ("--route learned --router AB --models A B C", "it chooses among A B"),
    ("--route learned --router AB --arbiter RM --pairs p.jsonl", "--num-samples 2 or more"),
    ("--route learned --router AB --length-control", "--arbiter RM"),
    ("--route random --candidates out.jsonl", "--candidates and --out are the same file"),
    ("--route random --candidates x --summary x", "--summary and --candidates are the same file"),
    ("--route random --models A AB", "AB: a router cannot generate"),
    ("--arbiter AB", "--arbiter AB: a router, not a reward model"),
    ("--route random --language-guard oracle", "prompts.jsonl:1: --language-guard oracle is for questions"),
    ("--route random --language-guard both", "--language-guard")])
def test_flags_that_do_not_fit_are_one_line_before_anything_is_made(flags, says, call, here):
    before = sorted(here.rglob("*"))
    flags, _, models = flags.partition(" --models ")
    refused(call(POOL.replace("--models A B", f"--models {models or 'A B'}") + f" {flags}"), says)
    assert sorted(here.rglob("*")) == before


# ---- samples, languages, lengths ---------------------------------------------------------------------------

def test_every_teacher_gives_k_samples_and_the_best_of_all_is_kept(call, here):
    code, out, err = call(f"{POOL} --arbiter RM --num-samples 3 --candidates c2.jsonl --summary s.json")
    assert code == 0, err
    kept = {row["id"]: row for row in read("out.jsonl")}
    for row in read("c2.jsonl"):
        assert [c["teacher"] for c in row["candidates"]] == ["A"] * 3 + ["B"] * 3
        usable = [c for c in row["candidates"] if c["completion"].strip()]
        assert kept[row["id"]]["reward"] == max(c["reward"] for c in usable)
        assert all(c["num_tokens"] == len(tokenizer().encode_answer(c["completion"])) for c in usable)
    found = json.loads((here / "s.json").read_text())
    assert found["text_statistics"]["all"]["answers"] == len(kept)
    assert found["reward_and_length"]["all"]["chosen"]["reward"] == pytest.approx(
        sum(row["reward"] for row in kept.values()) / len(kept))
    text = out.splitlines()
    assert "reward and length of the answers, in tokens" in text and any("MTLD" in line for line in text)
    code, out, err = call("route --train c2.jsonl --model A --out R2 --batch-size 4 --max-steps 1 "
                          "--keep-cut")
    assert code == 0 and "2 teachers" in out, err           # what was written is what route reads


def test_answers_in_the_wrong_language_are_dropped_before_they_are_scored(call, here, monkeypatch):
    """Real texts are looked at by language_id.identify; here a fake one knows a language by its length."""
    def identify(text):
        return [("en", 0.9), ("de", 0.8), (None, 0.1)][len(text) % 3]
    fake = types.ModuleType("aya_min.language_id")
    fake.identify = identify
    monkeypatch.setitem(sys.modules, "aya_min.language_id", fake)
    code, out, err = call(f"{POOL} --arbiter RM --language-guard --candidates c2.jsonl --summary s.json")
    assert code == 0, err
    dropped = {}
    for row in read("c2.jsonl"):
        for c in row["candidates"]:
            seen = identify(c["completion"])[0] if c["completion"].strip() else None
            assert c.get("wrong_language") == (seen if seen != row["language"] else None)
            assert (c["reward"] is None) == ("wrong_language" in c)
            if "wrong_language" in c:
                by = dropped.setdefault(row["language"], {})
                by[c["teacher"]] = by.get(c["teacher"], 0) + 1
    assert dropped and json.loads((here / "s.json").read_text())["language_guard"]["wrong"] == dropped
    assert all(identify(row["completion"])[0] in (None, row["language"]) for row in read("out.jsonl"))
    assert any(line.startswith(f"wrong language: {sum(sum(by.values()) for by in dropped.values())} answers")
               for line in out.splitlines())


def test_on_the_embedded_world_the_oracle_is_the_guard(call, here):
    write_jsonl(here / "world.jsonl", questions("train", 8, 0, level="tiny"))
    line = POOL.replace("prompts.jsonl", "world.jsonl")
    code, out, err = call(f"{line} --route random --language-guard oracle --too-long skip")
    assert code == 0 and any(text.startswith("wrong language: ") for text in out.splitlines()), err


def test_length_control_takes_the_regression_on_length_away_and_says_the_fit(call, here):
    code, out, err = call(f"{POOL} --arbiter RM --length-control --num-samples 3 --candidates c2.jsonl "
                          "--summary s.json")
    assert code == 0, err
    fit = json.loads((here / "s.json").read_text())["length_control"]
    assert set(fit) == {"de", "en", "fr"}
    for row in read("c2.jsonl"):
        line = fit[row["language"]]
        for c in row["candidates"]:
            expected = c["raw_reward"] - line["slope"] * (c["num_tokens"] - line["mean_length"])
            assert c["reward"] == pytest.approx(expected)
    assert any(text.startswith("length control: reward less slope") for text in out.splitlines())


def test_route_has_its_own_help(call):
    code, out, _ = call("route --help")
    assert code == 0 and "--tau" in out and "--held-out" in out
    assert generate_route.make_parser().prog == "generate.py route"
