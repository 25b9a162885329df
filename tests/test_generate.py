"""generate.py at its borders: flags, long prompts, cut answers, whose files there are, kills at the end.

Calls run `main` in this process, to save its start.
"""

import json
import multiprocessing
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import language_model, on_ranks, reward_model, tokenizer

import generate
from aya_min import files, weights
from aya_min.journal import Journal


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models A, B, a reward model RM, and of A and RM copies with a NaN; prompts in two languages."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("AB"):
        weights.save(folder / name, language_model(seed, max_position_embeddings=64), tokenizer())
    weights.save(folder / "RM", reward_model(max_position_embeddings=96), tokenizer())
    for name in ("A", "RM"):
        shutil.copytree(folder / name, folder / f"nan-{name}")
        state = load_file(folder / name / "model.safetensors")
        state["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
        save_file(state, folder / f"nan-{name}" / "model.safetensors")
    return folder


PROMPTS = [{"prompt": word, "language": code, "id": i} for i, (word, code) in enumerate(
    [("red", "en"), ("blue", "en"), ("rot", "de"), ("vert", "fr"), ("one", "en"), ("zwei", "de")])]


@pytest.fixture
def here(tmp_path, models, monkeypatch):
    """A new working folder with prompts.jsonl and links to the models' folders."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    write("prompts.jsonl", PROMPTS)
    return tmp_path


@pytest.fixture
def call(here, in_process):
    """The first text is split at its spaces."""
    return lambda *words: in_process(generate, *words[0].split(), *words[1:])


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8", newline="\n")]


def tree(folder):
    paths = sorted([*folder.glob("*"), *folder.glob("*/*")])
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refused(result, *says):
    """A mistake: exit code 2, no output, and a last line on standard error that holds these texts."""
    code, out, err = result
    assert (code, out) == (2, "") and all(text in err[-1] for text in says), err


ASK = "--model A --prompts prompts.jsonl --out out.jsonl --max-new-tokens 8 --temperature 1"
POOL = "--models A B --arbiter RM --prompts prompts.jsonl --out out.jsonl --max-new-tokens 12 --temperature 1"


# flags

FLAGS = {
    "--seed -1": "argument --seed: '-1' must be a whole number of at least 0",
    "--seed 9223372036854775808": "argument --seed",
    "--seed 1.5": "argument --seed",
    "--temperature -0.1": "argument --temperature",
    "--temperature inf": "argument --temperature",
    "--temperature 1e-40": "temperature 1e-40 must be 0 (greedy) or at least 1e-06",
    "--top-k -1": "argument --top-k",
    "--top-k 1e3": "argument --top-k",
    "--top-p 1.01": "argument --top-p",
    "--top-p nan": "argument --top-p",
    "--min-p -0.1": "argument --min-p",
    "--min-p nan": "argument --min-p",
    "--max-new-tokens 0": "argument --max-new-tokens: '0' must be a whole number of at least 1",
    "--max-new-tokens -3": "argument --max-new-tokens",
    "--num-samples 0": "argument --num-samples",
    "--num-samples 1000000000000": "argument --num-samples",
    "--batch-size 0": "argument --batch-size",
    "--too-long drop": "argument --too-long: invalid choice",
    "--columns prompt": "argument --columns: 'prompt' must be OURS=THEIRS",
    "--margin 1.0": "and so does --margin",
    "--route reward": "go with --models A B ... --prompts F.jsonl, and so does --route",
    "--keep-cut": "and so does --keep-cut",
    "--pairs pairs.jsonl": "and so does --pairs",
}
POOL_FLAGS = {
    "--margin -1 --pairs pairs.jsonl": "argument --margin: '-1' must be a finite number of at least 0",
    "--margin nan --pairs pairs.jsonl": "argument --margin",
    "--margin inf --pairs pairs.jsonl": "argument --margin",
    "--margin 1": "--margin goes with --pairs",
    "--table table.json": "--table goes with --route fixed",
    "--pairs none/pairs.jsonl": "none/pairs.jsonl: its folder does not exist; make it first",
    "--pairs out.jsonl.partial": "--pairs and --out are the same file",
    "--pairs ./out.jsonl": "--pairs and --out are the same file",
    "--models A A": "--models is given twice",
}


@pytest.mark.parametrize("flags", [*FLAGS, *POOL_FLAGS])
def test_a_flag_out_of_its_range_is_refused_by_its_name_before_anything_is_read_or_made(flags, call, here):
    before = tree(here)
    (here / "prompts.jsonl").write_text("not read")
    code, out, err = call(f"{ASK if flags in FLAGS else POOL} {flags}")
    (here / "prompts.jsonl").write_bytes(before["prompts.jsonl"])
    assert (code, out, len(err)) == (2, "", 1) and {**FLAGS, **POOL_FLAGS}[flags] in err[0], err
    assert tree(here) == before


def test_a_model_that_is_named_twice_is_refused(call, here):
    before = tree(here)
    code, _, err = call(POOL.replace("--models A B", "--models A A"))
    assert (code, len(err)) == (2, 1) and "--models names A twice" in err[0] and tree(here) == before
    for line in (POOL.replace("--models A B", "--models A ./A/"), "--models A A --serve"):
        code, _, err = call(line)
        assert (code, len(err)) == (2, 1) and " twice" in err[0] and tree(here) == before, err


@pytest.mark.parametrize("words, says", [
    (["--stop", ""], "argument --stop: '' must be a text of at least one character"),
    (["--stop", "a", ""], "argument --stop: ''"), (["--stop", "\udcff"], "is not UTF-8"),
    (["--out", "\udcff"], "is not UTF-8")])
def test_texts_of_the_command_line_are_checked(words, says, call, here):
    """--stop "" gave only empty answers, exit code 0."""
    before = tree(here)
    code, out, err = call(ASK, *words)
    assert (code, out, len(err)) == (2, "", 1) and says in err[0], err
    assert tree(here) == before


@pytest.mark.parametrize("text, says", [("\udcff", "is not UTF-8"), ("a\udc80b", "is not UTF-8"),
                                        ("", "--prompt is empty"), (" \n", "--prompt is empty")])
def test_a_prompt_that_is_no_text_is_one_line(text, says, call):
    code, out, err = call("--model A --max-new-tokens 4", "--prompt", text)
    assert (code, out, len(err)) == (2, "", 1) and says in err[0], err


def test_a_stop_text_may_be_white_space_or_any_script(call):
    code, _, err = call(ASK, "--stop", "\n", " ", "。")
    assert code == 0, err
    assert not any("\n" in row["completion"] or " " in row["completion"] for row in read("out.jsonl"))


@pytest.mark.parametrize("text, says", [
    ("[]", "a JSON list"), ("[" * 100000, "not JSON"), ("5", "a JSON int"),
    ('{"en": "A", "de": "B"}', "names none of --models for fr"), ('{"en": 1e999}', "table.json"),
    ('{"en": "A", "eng": "B"}', "'eng' is en, which has another model already"),
    ('{"en": "A", "en": "B"}', "occurs twice"), ('{"xx-nope": "A"}', "unknown language"),
    ('{"en": ["A"], "de": "A", "fr": "A"}', "names none of --models for en")])
def test_a_table_that_cannot_be_used_is_one_line_with_its_name(text, says, call, here):
    (here / "table.json").write_text(text)
    before = tree(here)
    code, out, err = call(f"{POOL} --route fixed --table table.json")
    assert (code, out, len(err)) == (2, "", 1) and says in err[0] and "table.json" in err[0], err
    assert tree(here) == before


def test_a_tables_languages_may_be_spelled_in_any_known_way(call, here):
    (here / "table.json").write_text(json.dumps({"eng": "A", "German": "B", "fr": "A", "other": "B"}))
    write("prompts.jsonl", [*PROMPTS, {"prompt": "sans langue"}])
    code, _, err = call("--models A B --prompts prompts.jsonl --out out.jsonl --max-new-tokens 12 "
                        "--route fixed --table table.json --keep-cut")
    assert code == 0, err
    assert [row["teacher"] for row in read("out.jsonl")] == ["A", "A", "B", "A", "A", "B", "B"]


def test_other_names_of_the_keys_are_mapped(call):
    write("prompts.jsonl", [{"question": "red", "lang": "en", "answer": "x"}])
    assert call(ASK)[0] == 2
    assert call(ASK, "--columns", "prompt=question", "language=lang")[0] == 0
    [row] = read("out.jsonl")
    assert row["prompt"] == "red" and row["language"] == "en" and "prompt_where" not in row


# files

@pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "link"])
def test_what_is_called_out_partial_and_is_not_ours_is_neither_adopted_nor_removed(kind, call, here):
    """The folder was taken for a journal and removed with all that was in it, exit code 0."""
    partial = here / "out.jsonl.partial"
    if kind == "file":
        partial.write_text("thesis")
    elif kind == "link":
        (here / "elsewhere").mkdir()
        (here / "elsewhere" / "thesis.txt").write_text("thesis")
        partial.symlink_to(here / "elsewhere")
    else:
        partial.mkdir()
        if kind == "folder":
            (partial / "thesis.txt").write_text("thesis")
            (partial / "notes.jsonl").write_text("[1, 2]\n")
    before = tree(here)
    code, out, err = call(ASK)
    assert (code, out) == (2, "") and err[-1].startswith("error: out.jsonl.partial is in the way"), err
    assert tree(here) == before


def test_files_with_the_names_of_our_temporary_ones_stay(call, here):
    """OUT.tmp was overwritten and renamed away."""
    for name in ("out.jsonl.tmp", ".out.jsonl", ".out.jsonl.tmp", "settings.json"):
        (here / name).write_text("thesis")
    before = tree(here)
    assert call(ASK)[0] == 0
    assert {name: text for name, text in tree(here).items() if name != "out.jsonl"} == before


@pytest.mark.parametrize("target", ["nowhere", "prompts.jsonl"])
def test_an_output_that_is_a_link_is_refused_whether_or_not_it_leads_anywhere(target, call, here):
    (here / "out.jsonl").symlink_to(here / target)
    before = (here / "prompts.jsonl").read_bytes()
    code, _, err = call(ASK)
    assert code == 2 and err == ["error: out.jsonl exists; give a new file, nothing is overwritten"]
    assert not (here / "nowhere").exists() and (here / "prompts.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["out.jsonl", "pairs.jsonl"])
def test_an_output_that_appears_meanwhile_is_kept_and_no_answer_is_lost(name, call, here, monkeypatch):
    """--out was looked at in the beginning and written by a rename at the end: of two runs one was lost."""
    publish = Journal.publish

    def late(journal, *given):
        (here / name).write_text("theirs")
        publish(journal, *given)
    monkeypatch.setattr(Journal, "publish", late)
    line = f"{POOL} --pairs pairs.jsonl --keep-cut"
    refused(call(line), f"error: {name} exists; give a new file, nothing is overwritten")
    assert {path.name for path in here.glob("*.jsonl")} == {"prompts.jsonl", name}
    assert (here / name).read_text() == "theirs"
    assert len(list((here / "out.jsonl.partial").glob("*.jsonl"))) == 1
    monkeypatch.setattr(Journal, "publish", publish)
    assert call(line)[2] == [f"error: {name} exists; give a new file, nothing is overwritten"]
    (here / name).unlink()
    code, _, err = call(line)
    assert code == 0 and "had been finished before" in err[0], err
    assert len(read("out.jsonl")) == 6 and read("pairs.jsonl") and not (here / "out.jsonl.partial").exists()


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_at_any_step_of_the_end_is_finished_by_the_same_command(every, call, here, monkeypatch):
    """After a kill between publication and clean-up the command said that the output exists; after one
    between --out and --pairs the pairs were lost."""
    line = f"{POOL} --pairs pairs.jsonl --keep-cut"
    assert call(line)[0] == 0
    whole = [(here / name).read_bytes() for name in ("out.jsonl", "pairs.jsonl")]
    names = sorted(path.name for path in here.iterdir())
    monkeypatch.setattr(sys, "argv", ["generate.py", *line.split()])

    def killed_at(steps):
        """Run the command in a process of its own that dies at one of these steps. -> its exit code"""
        def counting(function):
            def step(*given, **more):
                count.append(function)
                if len(count) == steps:
                    os._exit(9)
                return function(*given, **more)
            return step

        def run():
            for place, name in ((os, "link"), (os, "replace"), (os, "fsync"), (files.Path, "unlink"),
                                (files.Path, "rmdir"), (files.Path, "replace"), (shutil, "rmtree")):
                setattr(place, name, counting(getattr(place, name)))
            generate.main()
        count, process = [], multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        return process.exitcode
    for steps in range(1, 60, every):
        for name in ("out.jsonl", "pairs.jsonl"):
            os.remove(here / name)
        if killed_at(steps) == 0:
            break
        partial = here / "out.jsonl.partial"
        if partial.exists() and not any(partial.iterdir()):     # only the empty folder is left, and nobody's
            partial.rmdir()
        elif partial.exists() or not (here / "out.jsonl").exists():
            code, _, err = call(line)
            assert code == 0, (steps, err)
        assert [(here / name).read_bytes() for name in ("out.jsonl", "pairs.jsonl")] == whole
        assert sorted(path.name for path in here.iterdir()) == names
    assert 15 < steps < 59


def interrupted(call, monkeypatch, line, after=3):
    """Call and be stopped after so many prompts."""
    add, made = Journal.add, []

    def add_and_stop(journal, *given):
        add(journal, *given)
        made.append(given)
        if len(made) == after:
            raise KeyboardInterrupt
    monkeypatch.setattr(Journal, "add", add_and_stop)
    assert call(line)[0] == 130
    monkeypatch.setattr(Journal, "add", add)


def test_answers_of_another_run_are_not_taken_from_a_half_removed_journal(call, here, monkeypatch):
    """Killed while it removed its settings first, a journal gave 238 of 240 answers of another seed."""
    interrupted(call, monkeypatch, ASK)
    (here / "out.jsonl.partial" / "settings.json").unlink()
    refused(call(f"{ASK} --seed 5"), "holds answers but not the settings that made them; remove it")


CHANGES = {"chat_template.jinja": None, "tokenizer.json": None, "tokenizer_config.json": {"more": 1},
           "generation_config.json": {"eos_token_id": [9, 30]}, "config.json": {"logit_scale": 0.5}}


@pytest.mark.parametrize("name", CHANGES)
def test_a_journal_knows_every_file_that_makes_the_answers(name, call, here, monkeypatch):
    """The chat template and the stop ids were changed and the run went on with both kinds of answers."""
    shutil.copytree(here / "A", here / "M")
    line = ASK.replace("--model A", "--model M")
    interrupted(call, monkeypatch, line)
    path, change = here / "M" / name, CHANGES[name]
    if name == "chat_template.jinja":
        path.write_text(json.loads((here / "M" / "tokenizer_config.json").read_text())["chat_template"])
    elif name == "tokenizer.json":
        path.write_text(path.read_text() + " ")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(call(line), f"holds an unfinished run with other model files (M/{name})")


@pytest.mark.parametrize("flags", ["--seed 1", "--temperature 0.9", "--top-k 5", "--top-p 0.9", "--min-p 0.1",
                                   "--stop a", "--ignore-eos", "--num-samples 2", "--dtype bfloat16",
                                   "--max-new-tokens 9", "--too-long cut-left"])
def test_a_journal_knows_every_setting_that_makes_the_answers(flags, call, here, monkeypatch):
    interrupted(call, monkeypatch, ASK)
    refused(call(f"{ASK} {flags}"), "holds an unfinished run with other")


def test_what_makes_no_answers_may_change_before_a_run_goes_on(call, here, monkeypatch):
    interrupted(call, monkeypatch, POOL)
    more = "--batch-size 2 --keep-cut --pairs pairs.jsonl --margin 0.001 --too-long skip"
    code, _, err = call(f"{POOL} {more}")
    assert code == 0 and err[0] == "resumes: 3 of 12 prompts were finished before", err


@pytest.mark.parametrize("line", [
    "x", '["A 0", []]', '["A 0", [{"completion": 5}]]', '["A 0", {}]',
    '["A 0", [{"completion": "a", "ids": [], "finish_reason": "stop", "logp": NaN}]]'])
def test_damaged_answers_are_one_line_with_file_and_number(line, call, here, monkeypatch):
    interrupted(call, monkeypatch, ASK)
    with open(here / "out.jsonl.partial" / "0000-0000.jsonl", "a") as file:
        file.write(line + "\n")
    code, out, err = call(ASK)
    assert (code, out, len(err)) == (2, "", 1) and "out.jsonl.partial/0000-0000.jsonl:4: " in err[0], err


# what is not finite

@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_a_model_with_a_nan_is_named_with_row_and_parameter_and_nothing_is_written(temperature, call, here):
    before = tree(here)
    refused(call(f"{ASK} --model nan-A --temperature {temperature}"),
            "error: nan-A: the logits of new token 1 of prompts.jsonl:", "are not finite; its parameter "
            "model.layers.1.mlp.down_proj.weight holds values that are not finite: copy or train it again")
    assert tree(here) == before


def test_a_nan_ends_an_answer_on_standard_output_too(call):
    refused(call("--model nan-A --max-new-tokens 8", "--prompt", "red"),
            "nan-A: the logits of new token 1 of the prompt are not finite")


@pytest.mark.parametrize("route", ["reward", "random"])
def test_an_arbiter_with_a_nan_is_named_with_the_row_and_nothing_is_published(route, call, here):
    refused(call(f"{POOL} --arbiter nan-RM --route {route} --keep-cut"),
            "error: nan-RM: its score of the answer of prompts.jsonl:", "down_proj")
    assert not (here / "out.jsonl").exists()


# too long

@pytest.fixture
def long(here):
    """Six prompts, of which the third and the fifth are too long for 64 positions."""
    rows = [dict(row) for row in PROMPTS]
    rows[2]["prompt"], rows[4]["prompt"] = "rot " * 70, "blue " * 90
    write("prompts.jsonl", rows)
    return rows


@pytest.mark.parametrize("line", [ASK, POOL])
def test_one_prompt_that_is_too_long_is_named_before_any_work_with_the_ways_on(line, call, long, here):
    """One long prompt among 3,520 of m-ArenaHard ended all, by the name prompt 1297."""
    before = tree(here)
    code, out, err = call(line)
    assert (code, out, len(err)) == (2, "", 1) and err[0].startswith("error: prompts.jsonl:3: "), err
    assert all(text in err[0] for text in ("64", "A", "--too-long", "skip", "cut-left"))
    assert tree(here) == before


def test_prompts_that_are_too_long_are_left_out_of_all_models_work_alike_and_counted(call, long):
    code, _, err = call(f"{POOL} --too-long skip --keep-cut")
    assert code == 0 and "prompts.jsonl:3" in err[0] and "2" in err[0], err
    assert [row["id"] for row in read("out.jsonl")] == [0, 1, 3, 5] and err[-1].startswith("4 prompts, ")


def test_prompts_that_are_too_long_lose_their_oldest_tokens(call, long):
    code, _, err = call(f"{ASK} --too-long cut-left --temperature 0")
    assert code == 0 and "prompts.jsonl:3" in err[0], err
    rows = read("out.jsonl")
    ids = tokenizer().encode_prompt(long[2]["prompt"])
    model, _ = weights.load("A")
    [[alone]] = generate.answer_rows.__globals__["generate"](model, [ids[:1] + ids[-55:]], max_new_tokens=8,
                                                             temperature=0, stop_ids=tokenizer().stop_ids)
    assert len(rows) == 6 and rows[2]["completion"] == tokenizer().decode(alone.ids).replace("\0", "\ufffd")
    assert rows[2]["prompt"] == long[2]["prompt"]


def test_the_arbiters_positions_are_looked_at_before_any_work_too(call, here):
    weights.save(here / "short", reward_model(max_position_embeddings=32), tokenizer())
    write("prompts.jsonl", [{"prompt": "red"}, {"prompt": "rot " * 8}])
    line = f"{POOL} --arbiter short --keep-cut"
    before = tree(here)
    refused(call(line), "prompts.jsonl:2", "short (32 positions")
    assert tree(here) == before
    code, _, err = call(f"{line} --too-long skip --ignore-eos")
    assert code == 0 and len(read("out.jsonl")) == 1, err


def test_a_single_prompt_is_cut_or_refused_as_well(call):
    line = "--model A --max-new-tokens 4 --temperature 0"
    refused(call(line, "--prompt", "red " * 90), "64", "--prompt")
    code, out, err = call(f"{line} --too-long cut-left", "--prompt", "red " * 90)
    assert code == 0 and out, err


# cut answers

def test_cut_answers_are_counted_by_language_and_left_out_of_rows_and_pairs(call, here):
    line = f"{POOL} --pairs pairs.jsonl --max-new-tokens 30 --ignore-eos"
    code, out, err = call(f"{line} --keep-cut --out all.jsonl")
    assert code == 0 and "cut: 12 of 12 (de 4, en 6, fr 2)" in out.splitlines(), (out, err)
    rows, pairs = read("all.jsonl"), read("pairs.jsonl")
    assert len(rows) == 6 and {row["finish_reason"] for row in rows} == {"length"}
    ends = {pair[f"{side}_finish_reason"] for pair in pairs for side in ("chosen", "rejected")}
    assert ends == {"length"}
    os.remove("pairs.jsonl")
    code, out, err = call(line)
    assert code == 2 and "out.jsonl: not a row is left" in err[-1] and "give --keep-cut" in err[-1], err
    assert "cut: 12 of 12 (de 4, en 6, fr 2)" in err[-1] and (here / "out.jsonl.partial").is_dir()
    assert not (here / "out.jsonl").exists() and not (here / "pairs.jsonl").exists()
    code, _, err = call(f"{line} --keep-cut")           # the answers were kept
    assert code == 0 and err[0] == "resumes: 12 of 12 prompts were finished before", err
    assert read("out.jsonl") == rows


def test_an_answer_that_a_stop_text_ended_is_not_cut(call, here):
    line = f"{POOL} --max-new-tokens 30 --pairs pairs.jsonl"
    code, out, err = call(line, "--stop", *"abcdefghijklmnopqrstuvwxyz", " ", "\n")
    assert code == 0, err
    rows = read("out.jsonl")
    assert rows and {row["finish_reason"] for row in rows} == {"stop"}


def test_plain_generation_keeps_cut_answers_and_says_how_many_there_are_by_language(call):
    code, _, err = call(f"{ASK} --num-samples 3 --max-new-tokens 20")
    rows = read("out.jsonl")
    cut = [row for row in rows if row["finish_reason"] == "length"]
    by_language = {code: sum(row["language"] == code for row in cut) for code in ("de", "en", "fr")}
    said = ", ".join(f"{code} {n}" for code, n in by_language.items() if n)
    assert code == 0 and len(rows) == 18 and 0 < len(cut)
    assert f"cut: {len(cut)} of 18 ({said}) answers, at --max-new-tokens 20" in err, err


def test_an_answer_on_standard_output_says_that_it_was_cut(call):
    _, _, err = call("--model A --max-new-tokens 3 --temperature 0", "--prompt", "red")
    assert "cut: the answer was not finished after --max-new-tokens 3" in err
    _, _, err = call("--model A --max-new-tokens 3 --temperature 0 --ignore-eos", "--prompt", "red")
    assert not any(line.startswith("cut") for line in err)


def test_pairs_without_a_pair_are_refused_and_nothing_is_written(call, here):
    refused(call(f"{POOL} --keep-cut --pairs pairs.jsonl --margin 1000000"),
            "pairs.jsonl: not a row is left", "lower --margin")
    assert not (here / "out.jsonl").exists() and not (here / "pairs.jsonl").exists()
    code, _, err = call(f"{POOL} --keep-cut")
    assert code == 0 and err[0].startswith("resumes: 12 of 12"), err


# what is written and shown

def test_control_characters_of_a_model_do_not_reach_the_terminal(call, monkeypatch):
    """chat.py filtered them, --prompt did not."""
    class Speaking(type(tokenizer())):
        def decode(self, ids):
            return "a\x1b[31m\x07\x9b\nb"

        def stream(self, ids):
            return ["a\x1b[31m", *("" for _ in ids), "\x07\x9b\nb"]
    monkeypatch.setattr(tokenizer().__class__, "stream", Speaking.stream)
    monkeypatch.setattr(tokenizer().__class__, "decode", Speaking.decode)
    assert call("--model A --max-new-tokens 3", "--prompt", "red")[1] == "a[31m\nb\n"
    twice = call("--model A --max-new-tokens 3 --num-samples 2", "--prompt", "red")[1]
    assert twice == 2 * "a[31m\nb\n"


def test_every_line_that_is_written_is_json_that_our_own_reader_takes(call, monkeypatch):
    """A NUL, which a model may say, was written and then refused by every command that reads."""
    monkeypatch.setattr(tokenizer().__class__, "decode", lambda self, ids: "a\0b\u2028\x85c")
    assert call(f"{ASK} --num-samples 2")[0] == 0
    lines = open("out.jsonl", "rb").read().split(b"\n")[:-1]
    assert len(lines) == 12
    assert {files.parse_json(line, "x")["completion"] for line in lines} == {"a\ufffdb\u2028\x85c"}


def test_the_languages_of_the_answers_and_other_keys_are_those_of_the_prompts(call):
    assert call(ASK)[0] == 0
    made = [(row["language"], row["id"]) for row in read("out.jsonl")]
    assert made == [(row["language"], row["id"]) for row in PROMPTS]


def test_prompts_that_carry_other_answers_give_rows_of_one_shape(call):
    write("prompts.jsonl", [{**row, "completion": "old", "finish_reason": "length"} for row in PROMPTS[:3]]
          + [{"prompt": "red", "chosen": "a", "rejected": "b", "language": "en"}])
    assert call(f"{POOL} --keep-cut --pairs pairs.jsonl")[0] == 0
    assert all("chosen" not in row and row["completion"] != "old" for row in read("out.jsonl"))
    assert all(not row.keys() & {"completion", "finish_reason"} for row in read("pairs.jsonl"))
    assert call(f"{ASK} --out plain.jsonl")[0] == 0
    assert all("chosen" not in row for row in read("plain.jsonl"))


def test_a_full_disk_is_one_line_that_names_the_file(call, here, monkeypatch):
    def full(journal, *_):
        journal.file.close()
        journal.file = open("/dev/full", "w")
        real(journal, "A 0", [{"completion": "x" * 100_000}])
    real = Journal.add
    monkeypatch.setattr(Journal, "add", full)
    refused(call(ASK), "error: out.jsonl.partial/0000-0000.jsonl: No space left on device")


# several ranks

def on_a_rank(line):
    """What a rank of torchrun does -> the mistake that it ends with, or None."""
    try:
        generate.run_command(generate.make_parser().parse_args(line.split()), torch.device("cpu"))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("line", [f"{ASK} --num-samples 2", f"{POOL} --keep-cut --pairs pairs.jsonl"])
def test_one_two_and_three_ranks_write_the_same_and_leave_the_same_out(line, long, here):
    made = {}
    for ranks in (1, 2, 3):
        assert on_ranks(ranks, on_a_rank, f"{line} --too-long skip") == [None] * ranks
        made[ranks] = []
        for name in sorted({"out.jsonl", "pairs.jsonl"} & set(os.listdir(here))):
            made[ranks] += [{k: v for k, v in row.items() if "reward" not in k and k != "scores"}
                            for row in read(name)]
            os.remove(name)
        assert not (here / "out.jsonl.partial").exists()
    assert made[1] == made[2] == made[3] and made[1][0]


def test_a_mistake_ends_all_ranks_alike_and_leaves_nothing(here, long):
    before = tree(here)
    skip = f"{ASK} --too-long skip"
    for ranks, line, says in ((2, ASK, "prompts.jsonl:3"), (3, f"{skip} --model nan-A", "down_proj"),
                              (2, skip.replace("prompts.jsonl", "prompts.jsonl none"), "none: ")):
        errors = on_ranks(ranks, on_a_rank, line)
        assert len(set(errors)) == 1 and says in errors[0], errors
        assert tree(here) == before


def test_ranks_refuse_together_an_output_that_appeared_meanwhile(here, monkeypatch):
    publish = Journal.publish

    def late(journal, *given):
        (here / "out.jsonl").write_text("theirs")
        publish(journal, *given)
    monkeypatch.setattr(Journal, "publish", late)
    assert on_ranks(2, on_a_rank, ASK) == ["out.jsonl exists; give a new file, nothing is overwritten"] * 2
    monkeypatch.setattr(Journal, "publish", publish)
    os.remove("out.jsonl")
    assert on_ranks(3, on_a_rank, ASK) == [None] * 3 and len(read("out.jsonl")) == 6
