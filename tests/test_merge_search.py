"""merge_search.py, merge_fitness.py and merge_front.py: the weights that are found, what is measured, what
a killed search leaves, and what is refused."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import language_model, reward_model, run, tokenizer

from aya_min import files, merge_front, merge_search, weights
from aya_min.command import guarded
from aya_min.config import Reading
from aya_min.evaluate_rates import summarize
from aya_min.merge_fitness import (by_loss, by_oracle, graded, halves, loss_splits, of_folders, of_models,
                             read_questions, together)
from aya_min.merge_search import (
    affine,
    average,
    greedy_soup,
    optimise,
    search,
    search_folders,
    softmax,
    without,
)
from aya_min.merge_folders import merge_folders
from aya_min.files import write_jsonl
from aya_min.world import gold_answer, questions
from merge import main

TARGET = np.array([0.5, 0.3, 0.15, 0.05])


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Four language models around a common one."""
    folder, common = tmp_path_factory.mktemp("pool"), language_model(0)
    for i in range(4):
        model = language_model(0)
        generator = torch.Generator().manual_seed(i)
        for parameter, first in zip(model.parameters(), common.parameters()):
            parameter.data = first.data + 0.02 * torch.randn(first.shape, generator=generator)
        weights.save(folder / f"run-{i}" / "model", model, tokenizer())
    return [folder / f"run-{i}" / "model" for i in range(4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model folder, questions that it has learnt, some of them wrongly)."""
    folder = tmp_path_factory.mktemp("trained")
    rows = questions("validation", 8, 0, languages=("en", "fr"), level="tiny", unique=True)
    write_jsonl(folder / "sft.jsonl", [{**row, "completion": gold_answer(row)} for row in rows])
    run(
        "sft",
        folder,
        folder / "run",
        max_steps=25,
        batch_size=8,
        learning_rate=1e-2,
        warmup_steps=5,
        schedule="constant",
    )
    return folder / "run" / "model", rows


def toy(weights, split):
    """Two tasks that trade off: each is best at its own mixture; the held-out numbers are a little off."""
    found = np.array(weights) + (0.01 if split == "held-out" else 0)
    return {
        "left": float(-((found - TARGET) ** 2).sum()),
        "right": float(-((found - TARGET[::-1]) ** 2).sum()) / 2,
    }


def exit_code(*arguments):
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main(list(map(str, arguments))), "merge.py")
    return stop.value.code


def everything(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# ---- the search --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weights_of", [softmax, affine])
def test_weights_sum_to_one_and_start_at_the_uniform_soup_with_one_slope(weights_of):
    assert (
        sum(weights_of(np.array([0.3, -2.0, 5.0]))) == pytest.approx(1)
        and weights_of(np.zeros(4)) == [0.25] * 4
    )
    assert weights_of(np.array([1e-6, 0, 0, 0])) == pytest.approx(
        [0.25 + 0.75 * 0.25e-6] + [0.25 - 0.25 * 0.25e-6] * 3, abs=1e-12
    )


def test_only_the_affine_weights_may_be_negative():
    assert min(softmax(np.array([30.0, -30.0]))) > 0 > min(affine(np.array([30.0, -30.0])))


def test_the_greedy_soup_takes_the_best_first_and_keeps_what_does_not_lower_it():
    """Alone 3, 4, 1, 2: the order is 1, 0, 3, 2. With 0: 5, kept. With 3: 5, kept. With 2: 4.9, left out."""
    known = {
        (1, 0, 0, 0): 3,
        (0, 1, 0, 0): 4,
        (0, 0, 1, 0): 1,
        (0, 0, 0, 1): 2,
        (1, 1, 0, 0): 5,
        (1, 1, 0, 1): 5,
        (1, 1, 1, 1): 4.9,
    }
    assert (
        greedy_soup(lambda w: known[tuple(int(x > 0) for x in w)], 4)
        == average([0, 1, 3], 4)
        == [1 / 3, 1 / 3, 0, 1 / 3]
    )


def test_cma_es_finds_the_mixture_that_is_best():
    found = optimise(lambda w: -((np.array(w) - TARGET) ** 2).sum(), [0.25] * 4, 500, seed=0)
    np.testing.assert_allclose(found, TARGET, atol=2e-3)


@pytest.mark.parametrize(
    "weights_of, first", [(softmax, [10 / 22, 10 / 22, 1 / 22, 1 / 22]), (affine, [0.5, 0.5, 0, 0])]
)
def test_the_first_point_is_the_soup_that_the_search_begins_from(weights_of, first):
    """A softmax reaches no 0: 0.05, a fifth of an equal share, stands for it, and the weights are divided
    by their sum, 1.1."""
    tried = []
    optimise(lambda w: tried.append(w) or 0.0, [0.5, 0.5, 0.0, 0.0], 1, 0, weights_of)
    assert (
        tried[0] == pytest.approx(first) and len(tried) == 1 + 8 + 1
    )  # and one generation of 8 with its mean


def test_a_mixture_with_a_negative_weight_needs_leave_to_be_negative():
    target = np.array([0.8, 0.5, -0.3])
    loss = lambda w: ((np.array(w) - target) ** 2).sum()                                    # noqa: E731
    free, above = (
        optimise(lambda w: -loss(w), [1 / 3] * 3, 400, 0, weights_of) for weights_of in (affine, softmax)
    )
    np.testing.assert_allclose(free, target, atol=2e-3)
    assert loss(above) > 0.05


def test_the_weights_without_one_are_the_others_divided_by_their_sum():
    assert without([0.5, 0.3, 0.2], 0) == pytest.approx([0, 0.6, 0.4])
    with pytest.raises(ValueError, match="sum to 0"):
        without([1.0, 0.5, -0.5], 0)


def test_a_search_leaves_the_merge_of_its_weights_its_rows_and_every_measurement(pool, tmp_path):
    result = search(pool, tmp_path / "out", toy, evaluations=160, leave_one_out=True)
    rows = {row["name"]: row for row in result["rows"]}
    assert (
        list(rows) == ["best single", "uniform soup", "greedy soup", "CMA-ES"]
        and rows["uniform soup"]["weights"] == [0.25] * 4
    )
    numbers = [merge_front.macro(row["fitness"]) for row in result["rows"]]
    assert numbers[3] > numbers[2] >= numbers[0] and numbers[2] >= numbers[1]
    assert rows["CMA-ES"]["fitness"] == toy(rows["CMA-ES"]["weights"], "fitness") and rows["CMA-ES"][
        "held-out"
    ] == toy(rows["CMA-ES"]["weights"], "held-out")
    assert [model["name"] for model in result["models"]] == ["run-0", "run-1", "run-2", "run-3"]
    assert result["models"][2]["without"] == toy(
        without(rows["CMA-ES"]["weights"], 2), "held-out"
    ) and result["models"][2]["held-out"] == toy(average([2], 4), "held-out")
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == result
    history = [json.loads(line) for line in (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert (
        all(row["tasks"] == toy(row["weights"], row["split"]) for row in history)
        and sum((row["kind"], row["split"]) == ("CMA-ES", "fitness") for row in history)
        == 17 * 9
        == result["evaluations"]
    )
    assert len({json.dumps([row["split"], row["weights"]]) for row in history}) == len(history)
    merged = load_file(
        merge_folders(pool, tmp_path / "by-hand", "linear", weights=rows["CMA-ES"]["weights"])
        / "model.safetensors"
    )
    assert all(
        torch.equal(tensor, merged[name])
        for name, tensor in load_file(tmp_path / "out" / "model" / "model.safetensors").items()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out", "by-hand"}


def test_a_search_that_was_stopped_goes_on_and_ends_with_the_same_bytes(pool, tmp_path):
    search(pool, tmp_path / "whole-run", toy, evaluations=24, leave_one_out=True, about="toy")
    made = []

    def stopped(after):
        def evaluate(weights, split):
            if len(made) == after:
                raise KeyboardInterrupt
            made.append((tuple(weights), split))
            return toy(weights, split)
        return evaluate
    for after in (3, 11, 25, 33):
        with pytest.raises(KeyboardInterrupt):
            search(
                pool,
                tmp_path / "stopped-run",
                stopped(after),
                evaluations=24,
                leave_one_out=True,
                about="toy",
            )
        with open(sorted((tmp_path / "stopped-run.partial").glob("*.jsonl"))[-1], "a") as file:
            file.write('["a line that a kill cut sh')
        assert not (tmp_path / "stopped-run").exists()
    search(pool, tmp_path / "stopped-run", stopped(None), evaluations=24, leave_one_out=True, about="toy")
    assert (
        len(made)
        == len(set(made))
        == len((tmp_path / "whole-run" / "evaluations.jsonl").read_text().splitlines())
    )
    whole, again = everything(tmp_path / "whole-run"), everything(tmp_path / "stopped-run")
    page = Path("report.html")
    assert whole.pop(page).replace(b"whole-run", b"") == again.pop(page).replace(b"stopped-run", b"")
    assert whole == again and not (tmp_path / "stopped-run.partial").exists()


def test_what_another_search_left_is_not_taken_for_this_one_s(pool, tmp_path):
    def stop(weights, split):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        search(pool, tmp_path / "out", stop, about="one thing")
    with pytest.raises(ValueError, match="other what is measured"):
        search(pool, tmp_path / "out", toy, about="another")


def test_a_search_killed_after_it_published_its_folder_goes_on_and_ends(pool, tmp_path, monkeypatch):
    """F2 of the hostile tests: it said that OUT exists, and left OUT.partial and no report.html."""
    def killed(journal):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(merge_search.Journal, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            search(pool, tmp_path / "out", toy, evaluations=16, about="toy")
    before = everything(tmp_path / "out")
    assert (tmp_path / "out.partial").is_dir() and Path("report.html") in before
    # nothing is measured again
    result = search(pool, tmp_path / "out", None, evaluations=16, about="toy")
    assert result == json.loads(before[Path("search.json")]) and everything(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # it was finished, and is not made twice
    with pytest.raises(ValueError, match="out exists already"):
        search(pool, tmp_path / "out", toy, evaluations=16, about="toy")


@pytest.mark.parametrize("left", ["nothing", "settings", "all"])
def test_what_a_kill_during_the_clean_up_left_is_cleaned_up(left, pool, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merge_search.Journal, "remove", lambda journal: None)
        search(pool, tmp_path / "out", toy, evaluations=16)
    for path in (tmp_path / "out.partial").iterdir():
        if left == "nothing" or left == "settings" and path.suffix == ".jsonl":
            path.unlink()
    search(pool, tmp_path / "out", None, evaluations=16)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_search_killed_before_it_published_its_folder_goes_on_and_ends(pool, tmp_path, monkeypatch):
    def killed(made, path):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(files, "publish_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            search(pool, tmp_path / "out", toy, evaluations=16)
    search(pool, tmp_path / "out", None if (tmp_path / "out").exists() else toy, evaluations=16)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", [{"evaluations": 30}, {"seed": 1}, {"about": "other"},
                                    {"leave_one_out": True}])
def test_another_search_s_folder_is_not_taken_for_this_one_s(change, pool, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merge_search.Journal, "remove", lambda journal: None)
        search(pool, tmp_path / "out", toy, evaluations=16)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="out exists already"):
        search(pool, tmp_path / "out", toy, **{"evaluations": 16} | change)
    assert {path: text for path, text in everything(tmp_path).items() if path in before} == before


@pytest.mark.parametrize("there", ["empty", "theirs", "file", "link", "foreign search.json"])
def test_an_output_that_is_not_this_search_s_is_refused_and_left_alone(there, pool, tmp_path):
    def stop(weights, split):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        search(pool, tmp_path / "out", stop)
    out = tmp_path / "out"
    if there == "file":
        out.write_text("x")
    elif there == "link":
        out.symlink_to(tmp_path / "gone")
    else:
        out.mkdir()
    if there in ("theirs", "foreign search.json"):
        (out / ("notes.txt" if there == "theirs" else "search.json")).write_text("[]")
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="out exists already"):
        search(pool, out, toy)
    assert {path: text for path, text in everything(tmp_path).items() if path in before} == before


def test_a_tokenizer_that_changed_since_the_kill_is_another_search(pool, tmp_path):
    copies = [tmp_path / f"copy-{i}" for i in range(2)]
    for copy, folder in zip(copies, pool):
        shutil.copytree(folder, copy)

    def stop(weights, split):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        search(copies, tmp_path / "out", stop)
    for copy in copies:
        (copy / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(ValueError, match="other model files"):
        search(copies, tmp_path / "out", toy)


@pytest.mark.parametrize("found, said", [({"a": math.nan}, "finite"), ({"a": 1e308, "b": 1e308}, "finite"),
                                         ([1.0], "finite"), ({"a": 10 ** 400}, "finite"), ({}, "finite"),
                                         ({"a": "1"}, "finite"), ({"b": 1.0}, "first had a")])
def test_measurements_without_meaning_stop_the_search(found, said, pool, tmp_path):
    answers = iter([{"a": 1.0}, found])
    with pytest.raises(ValueError, match=said):
        search(pool, tmp_path / "out", lambda weights, split: next(answers))


# ---- what is measured --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_model_that_is_measured_in_memory_is_the_one_that_is_written(dtype, pool, tmp_path):
    chosen = [0.4, 0.0, 0.35, 0.25]
    seen = []
    evaluate = of_models(
        pool,
        lambda model, tokenizer, split: seen.append({k: v.clone() for k, v in model.state_dict().items()})
        or {"x": 0.0},
        dtype,
    )
    evaluate([0.25] * 4, "fitness")
    evaluate(chosen, "fitness")  # over what the one before left
    model, _ = weights.load(merge_folders(pool, tmp_path / "merged", "linear", weights=chosen, dtype=dtype))
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in model.state_dict().items())


def test_a_model_of_the_pool_that_holds_nan_is_named_with_its_tensor(pool, tmp_path):
    shutil.copytree(pool[1], tmp_path / "nan")
    state = load_file(tmp_path / "nan" / "model.safetensors")
    state["model.norm.weight"][3] = math.nan
    save_file(state, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    evaluate = of_models([pool[0], tmp_path / "nan"], lambda model, tokenizer, split: {"x": 0.0})
    assert evaluate([1.0, 0.0], "fitness") == {"x": 0.0}                                    # without it
    with pytest.raises(ValueError, match="model.norm.weight in .*nan/model.safetensors holds NaN"):
        evaluate([0.5, 0.5], "fitness")


def test_a_measure_of_folders_sees_a_whole_model_folder_that_goes_after(pool, tmp_path):
    def measure(folder, split):
        return {split: weights.load(folder)[0].model.norm.weight.sum().item()}
    found = of_folders(pool, measure, tmp_path / "scratch")([0.1, 0.2, 0.3, 0.4], "held-out")
    apart = [weights.load(folder)[0].model.norm.weight.sum().item() for folder in pool]
    assert (
        found["held-out"] == pytest.approx(np.dot([0.1, 0.2, 0.3, 0.4], apart), rel=1e-5)
        and not (tmp_path / "scratch").exists()
    )


def test_the_oracle_s_numbers_are_the_mean_grades_of_the_answers_by_task_or_language(trained):
    (model, its_tokenizer), rows = weights.load(trained[0]), trained[1]
    summary = summarize(graded(model, its_tokenizer, rows, 24))
    assert summary["grade"] > 0.5
    for by, key in (("task", "by_task"), ("language", "by_language")):
        found = by_oracle({"fitness": rows}, [by], 24)(model, its_tokenizer, "fitness")
        assert found == pytest.approx({name: part["grade"] for name, part in summary[key].items()})
    both = by_oracle({"fitness": rows}, ["task", "cluster"], 24)(model, its_tokenizer, "fitness")
    assert set(both) == {f"{row['task']} shared" for row in rows}


def test_the_held_out_loss_is_by_language_of_one_file_and_by_file_of_several(trained, tmp_path):
    folder, rows = trained
    for code in ("en", "fr"):
        write_jsonl(
            tmp_path / f"{code}.jsonl",
            [{**row, "completion": gold_answer(row)} for row in rows if row["language"] == code],
        )
    both = tmp_path / "both.jsonl"
    both.write_bytes((tmp_path / "en.jsonl").read_bytes() + (tmp_path / "fr.jsonl").read_bytes())
    model, its_tokenizer = weights.load(folder)
    by_file, by_language = (
        by_loss(loss_splits(folder, paths, paths, 512, 0))(model, its_tokenizer, "held-out")
        for paths in ([tmp_path / "en.jsonl", tmp_path / "fr.jsonl"], [both])
    )
    assert (
        by_file == pytest.approx(by_language) and set(by_file) == {"en", "fr"} and max(by_file.values()) < 0
    )
    ids, mask = its_tokenizer.encode_chat(
        [
            {"role": "user", "content": rows[0]["prompt"]},
            {"role": "assistant", "content": gold_answer(rows[0])},
        ]
    )
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": rows[0]["prompt"], "completion": gold_answer(rows[0])}])
    found = by_loss(loss_splits(folder, [tmp_path / "one.jsonl"], [tmp_path / "one.jsonl"], 512, 0))(
        model, its_tokenizer, "fitness"
    )
    logps = model(torch.tensor([ids]))[0].log_softmax(-1)                                   # (T, V)
    right = [logps[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t]]
    assert found == pytest.approx({"loss": np.mean(right)}, rel=1e-4)


def test_halves_keep_a_question_s_languages_together_and_depend_on_the_seed_alone():
    rows = questions("validation", 200, 0, level="tiny")
    one, two = halves(rows, 0, lambda row: row["question_id"])
    assert (
        not {row["question_id"] for row in one} & {row["question_id"] for row in two}
        and len(one) + len(two) == 200
        and abs(len(one) - len(two)) < 40
    )
    shuffled = halves(rows[::-1], 0, lambda row: row["question_id"])[0]
    assert (
        sorted(map(str, shuffled))
        == sorted(map(str, one))
        != sorted(map(str, halves(rows, 1, lambda row: row["question_id"])[0]))
    )


# ---- what is shown -----------------------------------------------------------------------------------------

def test_the_front_is_what_nothing_else_beats_everywhere():
    assert merge_front.pareto([(3, 1), (2, 2), (1, 3), (2, 1), (2, 2), (1, 1)]) == [
        True,
        True,
        True,
        False,
        True,
        False,
    ]


def test_the_trade_off_is_the_pair_of_tasks_with_the_lowest_correlation():
    found = merge_front.trade_off(
        [{"a": 1, "b": 5, "c": 1}, {"a": 2, "b": 4, "c": 1}, {"a": 3, "b": 3, "c": 4}]
    )
    assert found == ("a", "b", pytest.approx(-1)) and merge_front.trade_off([{"a": 1}, {"a": 2}]) is None


def test_the_page_and_the_table_show_every_row_and_run_nothing(pool, tmp_path):
    hostile = tmp_path / "<script>alert(1)" / "model"
    shutil.copytree(pool[0], hostile)
    result = search([hostile, *pool[1:]], tmp_path / "out", toy, evaluations=16, leave_one_out=True)
    page, text = (tmp_path / "out" / "report.html").read_text(), merge_front.search_table(result)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and page.count("<polyline") == 2
    for name in ("uniform soup", "greedy soup", "CMA-ES", "run-1", "without it", "left", "right"):
        assert name in page and name in text
    assert f"{merge_front.macro(result['rows'][-1]['held-out']):.4f}" in page and "correlation" in text
    assert {model["name"] for name, model, on in merge_front.contenders(result) if on} <= {
        row["name"] for row in result["rows"] + result["models"]
    }


# ---- the command -------------------------------------------------------------------------------------------

SCRIPT = """import array, json, sys
text = open(sys.argv[1] + "/model.safetensors", "rb").read()
length = int.from_bytes(text[:8], "little")
begin, end = json.loads(text[8:8 + length])["model.norm.weight"]["data_offsets"]
total = sum(array.array("f", text[8 + length + begin:8 + length + end]))
print("noise")
print(json.dumps({"low": -total, "high": total + (sys.argv[2:] == ["held-out"])}))
"""


def test_a_command_measures_a_folder_and_is_told_the_split(pool, tmp_path, capsys):
    (tmp_path / "measure.py").write_text(SCRIPT)
    command = f"{sys.executable} -IS {tmp_path / 'measure.py'} {{model}}"
    arguments = ["search", *map(str, pool[:2]), "--evaluations", "4", "--command"]
    assert main([*arguments, f"{command} {{split}}", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert (
        "held-out" in shown
        and "noise" not in shown
        and (tmp_path / "out" / "model" / "config.json").is_file()
    )
    rows = json.loads((tmp_path / "out" / "search.json").read_text())["rows"]
    assert all(row["held-out"]["high"] - row["fitness"]["high"] == pytest.approx(1) for row in rows)
    assert main([*arguments, command, "--out", str(tmp_path / "no-split")]) == 0
    assert json.loads((tmp_path / "no-split" / "search.json").read_text())["held-out"] is False


def test_the_command_searches_by_the_oracle_and_by_the_loss(trained, pool, tmp_path, capsys):
    folder, rows = trained
    near = tmp_path / "near"
    model, its_tokenizer = weights.load(folder)
    for parameter in model.parameters():
        parameter.data *= 1.02
    weights.save(near, model, its_tokenizer)
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    write_jsonl(tmp_path / "sft.jsonl", [{**row, "completion": gold_answer(row)} for row in rows])
    common = ["search", str(folder), str(near), "--evaluations", "4", "--out"]
    assert (
        main(
            [
                *common,
                str(tmp_path / "a"),
                "--prompts",
                str(tmp_path / "prompts.jsonl"),
                "--max-new-tokens",
                "24",
                "--by",
                "language",
            ]
        )
        == 0
    )
    assert main([*common, str(tmp_path / "b"), "--eval-data", str(tmp_path / "sft.jsonl")]) == 0
    for out in ("a", "b"):
        result = json.loads((tmp_path / out / "search.json").read_text())
        assert set(result["rows"][0]["fitness"]) == {"en", "fr"} and weights.load(tmp_path / out / "model")
    assert capsys.readouterr().out.count("CMA-ES: ") == 2


def test_lines_of_a_command_that_are_no_text_and_colours_in_its_tasks_do_no_harm(pool, tmp_path, capsys):
    (tmp_path / "measure.py").write_text(SCRIPT.replace('print("noise")',
                                                        'sys.stdout.flush(); '
                                                        'sys.stdout.buffer.write(bytes([255, 10])); '
                                                        'sys.stdout.flush()')
                                         .replace('"low"', '"\\x1b[31mlow"'))
    command = f"{sys.executable} -IS {tmp_path / 'measure.py'} {{model}}"
    assert main(["search", *map(str, pool[:2]), "--evaluations", "4", "--command", command, "--out",
                 str(tmp_path / "out")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_held_out_data_that_shares_examples_with_the_fitness_data_is_refused_by_place(pool, tmp_path, capsys):
    rows = questions("validation", 8, 0, languages=("en",), level="tiny", unique=True)
    sft = [{"prompt": f"question {i}", "completion": "b"} for i in range(8)]
    write_jsonl(tmp_path / "fit.jsonl", rows[:4])
    write_jsonl(tmp_path / "other-id.jsonl", rows[4:7] + [{**rows[0], "question_id": "renamed"}])
    write_jsonl(tmp_path / "sft.jsonl", sft[:4])
    write_jsonl(tmp_path / "more.jsonl", sft[5:7] + [{"messages": [{"role": "user", "content": "question 1"},
                                                                   {"role": "assistant", "content": " b "}]}])
    models = ["search", *pool[:2], "--evaluations", "4", "--out", tmp_path / "out"]
    assert exit_code(*models, "--prompts", tmp_path / "fit.jsonl", "--held-out", tmp_path / "other-id.jsonl",
                     "--by", "language") == 2
    assert "1 of 4 held-out questions are among the fitness data" in capsys.readouterr().err
    assert exit_code(*models, "--eval-data", tmp_path / "sft.jsonl", "--held-out",
                     tmp_path / "more.jsonl") == 2
    said = f"1 of 3 held-out examples are among the fitness data, the first is {tmp_path / 'more.jsonl'}:3"
    assert said in capsys.readouterr().err
    write_jsonl(tmp_path / "disjoint.jsonl", sft[5:7])
    assert exit_code(*models, "--eval-data", tmp_path / "sft.jsonl", tmp_path / "more.jsonl", "--held-out",
                     tmp_path / "disjoint.jsonl", tmp_path / "sft.jsonl") == 2
    assert "6 of 6 held-out examples" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_questions_with_one_prompt_and_two_ids_lie_in_one_half():
    rows = [{"question_id": f"q{i}", "prompt_messages": [{"role": "user", "content": f"prompt {i // 2}"}]}
            for i in range(40)]
    rows.append({"question_id": "q0", "prompt_messages": [{"role": "user", "content": "prompt 7"}]})
    one, two = halves(rows, 0, together(rows))
    assert one and two and not {str(row["prompt_messages"])
                                for row in one} & {str(row["prompt_messages"]) for row in two}
    apart = [row | {"prompt_messages": [{"content": str(i)}]} for i, row in enumerate(rows[:40])]
    # as ever
    assert halves(apart, 3, together(apart)) == halves(apart, 3, lambda row: row["question_id"])


def test_a_question_that_the_oracle_cannot_answer_is_refused_before_any_merge(trained, tmp_path):
    """A word that the world does not have was a KeyError in the middle of the search."""
    folder, rows = trained
    write_jsonl(tmp_path / "f.jsonl", [rows[0], {**rows[1], "task": "translate", "args": ["xyzzy", "fr"]}])
    with pytest.raises(ValueError, match="f.jsonl:2: not a question .*'xyzzy'"):
        read_questions([tmp_path / "f.jsonl"], Reading(), folder)


def test_one_name_for_a_column_is_asked_of_a_search_too(pool, tmp_path, capsys):
    """The second of two was taken in silence, in merge.py search alone."""
    with pytest.raises(ValueError, match="--columns: prompt is given twice"):
        main(["search", *map(str, pool), "--prompts", "f.jsonl", "--out", str(tmp_path / "out"),
              "--columns", "prompt=a", "prompt=b"])


def test_files_of_one_name_in_two_folders_are_two_tasks(trained, tmp_path):
    folder, rows = trained
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", [{**row, "completion": gold_answer(row)} for row in rows])
    paths = [tmp_path / "one" / "x.jsonl", tmp_path / "two" / "x.jsonl"]
    assert list(loss_splits(folder, paths, paths, 512, 0)["fitness"]) == list(map(str, paths))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give one of --prompts"),
        (["--prompts", "{prompts}", "--command", "x {model}"], "give one of --prompts"),
        (["--prompts", "{plain}"], "1: not a question of the embedded world"),
        (["--prompts", "{missing}"], "cannot be read"),
        (
            ["--prompts", "{prompts}", "--held-out", "{prompts}"],
            "6 of 6 held-out questions are among the fitness data, the first is",
        ),
        (["--eval-data", "{sft}", "--held-out", "{sft}", "{sft}"], "one for each"),
        (["--command", "true"], "needs {model}"),
        (["--command", "true {model}", "--held-out", "{prompts}"], "takes no --held-out"),
        (["--command", "false {model}"], "exit code 1"),
        (["--command", "echo {model}"], "JSON object"),
        (["--command", "no-such-program {model}"], "no-such-program"),
        (
            ["--eval-data", "{sft}", "--held-out", "{sft}"],
            "2 of 2 held-out examples are among the fitness data, the first is {sft}:1",
        ),
        (["--eval-data", "{sft}", "--held-out", "{other}", "{reward}"], "reward model"),
        (["--eval-data", "{sft}"], "not of the same languages"),
        (
            ["--prompts", "{prompts}", "--evaluations", "0"],
            "argument --evaluations: '0' must be a whole " "number of at least 1",
        ),
        (["--prompts", "{prompts}", "--max-new-tokens", "0"], "argument --max-new-tokens: '0' must be"),
        (["--prompts", "{prompts}", "--max-new-tokens", "-3"], "argument --max-new-tokens: '-3' must be"),
        (["--eval-data", "{sft}", "--max-length", "1"], "argument --max-length"),
        (["--prompts", "{prompts}", "--seed", "-1"], "argument --seed: '-1' must be"),
        (["--prompts", "{prompts}", "--device", "meta"], "'meta' cannot be used here"),
        (["--command", "'echo {model}"], "No closing quotation"),
        (["--command", "echo {model}", "--columns", "prompt=q"], "no flag that says how rows are read"),
        (
            [
                "--command",
                sys.executable
                + " -c \"print(chr(123) + chr(34) + 'a' + chr(34) + ':' + '1' * 401 + chr(125))\" {model}",
            ],
            "finite numbers by task",
        ),
        (["--command", "printf '{{\"a\": true}}' {model}"], "finite numbers by task"),
        (["--command", "printf '[%.0s' {deep} {model}"], "JSON object"),
        (["--command", "printf '\\377' {model}"], "JSON object"),
        (["--command", 'printf \'{{"a": 1, "a": 2}}\' {model}'], "JSON object"),
        (["--command", "printf '{{\"a\": NaN}}' {model}"], "JSON object"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, pool, tmp_path, capsys):
    rows = questions("validation", 6, 0, languages=("en",), level="tiny", unique=True)
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "Hello"}])
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "c", "completion": "b"}])
    models = [str(pool[0]), str(pool[1])]
    if "{reward}" in arguments:
        arguments = arguments[:-1]
        for i in range(2):
            weights.save(tmp_path / f"reward-{i}", reward_model(i), tokenizer())
        models = [str(tmp_path / f"reward-{i}") for i in range(2)]
    arguments = [word.replace("{{", "{").replace("}}", "}").replace("{deep}", "x " * 5000)
                 for word in arguments]
    filled = [
        word.replace("{prompts}", str(tmp_path / "prompts.jsonl"))
        .replace("{plain}", str(tmp_path / "plain.jsonl"))
        .replace("{sft}", str(tmp_path / "sft.jsonl"))
        .replace("{missing}", str(tmp_path / "missing.jsonl"))
        .replace("{other}", str(tmp_path / "other.jsonl"))
        for word in arguments
    ]
    code = exit_code("search", *models, "--out", tmp_path / "out", *filled)
    error = capsys.readouterr().err.strip().splitlines()
    said = said.replace("{sft}", str(tmp_path / "sft.jsonl"))
    assert code == 2 and error[-1].startswith(("merge.py: ", "error: ")) and said in error[-1]
    assert not (tmp_path / "out").exists() and len([line for line in error if "evaluation/s" not in line
                                                    and "?" not in line]) == 1, error


def test_a_pool_of_one_or_of_models_that_differ_is_refused_before_anything_is_measured(pool, tmp_path):
    with pytest.raises(ValueError, match="two models or more"):
        search_folders(pool[:1], tmp_path / "out", command="true {model}")
    weights.save(tmp_path / "other", language_model(0, num_hidden_layers=1), tokenizer())
    with pytest.raises(ValueError, match="cannot be merged"):
        search_folders([pool[0], tmp_path / "other"], tmp_path / "out", command="true {model}")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        search_folders(pool, tmp_path / "there", command="true {model}")
    assert not (tmp_path / "out.partial").exists()
