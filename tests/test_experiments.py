"""Claims: the rule of the verdict, arms that are made once and shared, a claim that was stopped, records."""

import json
from types import SimpleNamespace

import pytest
import torch
from small import CPU

import train
from aya_min import experiments, experiments_records
from aya_min.experiments import Claim, Comparison, Figure, Lab, side_of, together
from aya_min.experiments_records import BEGIN, END, RESULTS, result, run_claims, with_claims
from aya_min.pipeline_results import evaluate_model


# ---- the verdict -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side, ci95, expected", [
    ("above", [50.1, 53.0], "shown"), ("above", [50.0, 53.0], "not shown"),
    ("above", [45.0, 49.9], "reversed"), ("below", [45.0, 49.9], "shown"),
    ("below", [49.0, 51.0], "not shown"), ("below", [50.1, 52.0], "reversed"),
    ("level", [46.0, 54.0], "shown"), ("level", [46.0, 55.1], "not shown"),
    ("level", [55.1, 57.0], "reversed"), ("level", [40.0, 44.9], "reversed")])
def test_one_seed_shows_a_side_if_its_interval_is_clear_of_no_difference(side, ci95, expected):
    assert side_of(side, ci95, none=50.0, level=5.0) == expected


def test_several_agree_or_nothing_is_shown():
    assert together(["shown"] * 3) == "shown" and together(["reversed"] * 3) == "reversed"
    assert together(["shown", "shown", "reversed"]) == together(["shown", "not shown"]) == "not shown"


def test_a_claim_is_shown_only_if_every_comparison_is_in_every_seed():
    claim = Claim("c", "s", "t", (Comparison("a", "b"), Comparison("a", "c")))
    one = lambda verdict: {"value": 1.0, "ci95": [0.0, 2.0], "none": 0.0, "verdict": verdict}
    seeds = [[one("shown"), one("shown")], [one("shown"), one("not shown")]]
    found = result(claim, seeds)
    assert [row["verdict"] for row in found["comparisons"]] == ["shown", "not shown"]
    assert found["verdict"] == "not shown" and claim.arms == ["a", "b", "c"]
    assert result(claim, seeds[:1])["verdict"] == "shown"


# ---- arms --------------------------------------------------------------------------------------------------

def claim_file(**arms):
    """A claim file with these arms, the first against the second by win rate and by two more measures."""
    a, b = list(arms)[:2]
    comparisons = (Comparison(a, b), Comparison(a, b, "level", "length", "greedy", ("en", "fr")),
                   Comparison(a, b, "below", "marks", "greedy"),
                   Figure("losses", lambda lab: [row["loss"] for row in lab.metrics(a)], "above", 0.0))
    claims = (Claim("tried", "it", "1", comparisons),)
    measures = {"marks": lambda row: row["completion"].count("a")}
    return SimpleNamespace(PAPER="a paper", MINUTES=1, ARMS=arms, MEASURES=measures, CLAIMS=claims)


def short_sft(count, **settings):
    """An arm: SFT of the base on `count` of the base's own texts."""
    def arm(lab):
        rows = [{"prompt": q["prompt"], "completion": "a b"} for q in lab.questions("train", count, "arm")]
        return lab.train(f"{count} rows", "sft", lab.base, rows, max_steps=2, **settings)
    return arm


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(file, out="out"): its record, at preset smoke reduced to a base of one step and few questions."""
    small = {**experiments.RECIPES["smoke"], "corpus": 96, "eval_count": 48}
    monkeypatch.setitem(experiments.RECIPES, "smoke", small)

    def run(file, out="out", seeds=(1,)):
        monkeypatch.setattr(experiments, "claim_files", lambda: {"small": file})
        return run_claims("small", seeds, "smoke", tmp_path / out, CPU)
    return run


def without_times(record):
    arms = {seed: {name: {**arm, "seconds": 0} for name, arm in arms.items()}
            for seed, arms in record["arms"].items()}
    return {**record, "arms": arms, "minutes": 0}


def test_a_claim_that_was_stopped_goes_on_where_it_stopped_to_the_same_record(run, tmp_path):
    stops = [True]

    def late(lab):
        if stops.pop() if stops else False:
            raise KeyboardInterrupt
        return short_sft(64)(lab)
    first = run(claim_file(one=short_sft(32), two=short_sft(64)), "whole")
    with pytest.raises(KeyboardInterrupt):
        run(claim_file(one=short_sft(32), two=late))
    [seed] = (tmp_path / "out").glob("seed-1-*")
    made = {path: path.stat().st_mtime_ns for path in seed.glob("steps/*/done.json")}
    record = run(claim_file(one=short_sft(32), two=late))
    assert len(made) == 3 and all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert without_times(record) == without_times(first)
    [claim] = record["results"]
    assert [row["measure"] for row in claim["comparisons"]] == ["win rate", "length", "marks", "figure"]
    assert claim["comparisons"][0]["seeds"][0]["num"] == 48 and claim["comparisons"][3]["verdict"] == "shown"
    assert json.loads((tmp_path / "out" / "small" / "claim.json").read_text(encoding="utf-8")) == record
    page = (tmp_path / "out" / "small" / "report.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page and "one above two, win rate, sampled" in page
    assert "tried: it" in experiments_records.table(record)


def test_arms_are_shared_by_content_and_another_setting_or_start_makes_another(run, tmp_path):
    record = run(claim_file(one=short_sft(32), same=short_sft(32), more=short_sft(64),
                            faster=short_sft(32, learning_rate=1e-2)))
    lab = Lab(tmp_path / "out", "smoke", 1, CPU, claim_file(one=short_sft(32), same=short_sft(32)))
    one = record["arms"]["1"]["one"]["folder"]
    assert one == record["arms"]["1"]["same"]["folder"] == lab.name_of(lab.arm("one").parent)
    rows = [{"prompt": "p", "completion": "a"}] * 32
    folders = {lab.train("n", "sft", lab.base, rows, max_steps=1),
               lab.train("other name", "sft", lab.base, rows, max_steps=1),
               lab.train("n", "sft", lab.base, rows, max_steps=1, learning_rate=1e-2),
               lab.train("n", "sft", lab.arm("one"), rows, max_steps=1),
               lab.train("n", "pretrain", lab.base, rows, max_steps=1)}
    assert len(folders) == 4
    assert Lab(tmp_path / "out", "smoke", 2, CPU, None).folder != lab.folder


def test_an_arms_answers_are_those_of_its_model(run, tmp_path):
    run(file := claim_file(one=short_sft(32), two=short_sft(64)))
    lab = Lab(tmp_path / "out", "smoke", 1, CPU, file)
    elsewhere = SimpleNamespace(**{**vars(lab.run), "folder": tmp_path / "again", "embedded": True})
    again = evaluate_model(elsewhere, "x", lab.arm("two"))
    assert [row["completion"] for row in lab.answers("two", "sampled")] == [
        row["completion"] for row in again["sampled"]]


# ---- commands and records ----------------------------------------------------------------------------------

@pytest.mark.parametrize("words, said", [
    ("claim nothing", "unknown claim 'nothing'"), ("claim expanse --seeds 1 1", "a seed is given twice"),
    ("claim expanse --seeds -1", "seeds"), ("claim expanse --preset huge", "preset")])
def test_a_mistake_is_one_line_and_nothing_is_made(words, said, in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(train, *words.split())
    assert code == 2 and said in err[-1] and not list(tmp_path.iterdir())


def test_the_list_names_every_claim_with_its_paper(capsys):
    experiments_records.listing()
    text = experiments_records.listing()
    for module in experiments.claim_files().values():
        assert module.PAPER in text and all(claim.statement in text for claim in module.CLAIMS)


def test_every_claim_file_names_arms_that_it_has():
    for module in experiments.claim_files().values():
        for claim in module.CLAIMS:
            experiments_records.check_claim(claim, module)


def test_the_page_of_results_is_what_the_records_give():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert with_claims(text) == text


def test_a_record_gives_a_row_and_its_comparisons(tmp_path):
    claim = Claim("c", "says", "theirs", (Comparison("a", "b"),))
    one = {"value": 53.25, "ci95": [51.0, 55.0], "none": 50.0, "verdict": "shown"}
    record = {"claims": "file", "paper": "P", "preset": "tiny", "seeds": [1, 2], "minutes": [3.0, 4.0],
              "versions": {"commit": "abc", "torch": "2"}, "machine": {"processor": "X", "threads": 2},
              "results": [result(claim, [[one], [one]])]}
    (tmp_path / "file.json").write_text(json.dumps(record), encoding="utf-8")
    text = with_claims(f"before\n{BEGIN}old\n{END}after\n", tmp_path)
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| c | P | says | theirs | 53.2 [51.0, 55.0]; 53.2 [51.0, 55.0] | shown |" in text
    with pytest.raises(ValueError, match="lacks the lines"):
        with_claims("nothing")


def test_torch_threads_are_said_in_the_record():
    assert experiments_records.machine()["threads"] == torch.get_num_threads()


def test_no_two_claims_or_files_share_a_name():
    files = experiments.claim_files()
    names = [*files, *(claim.name for module in files.values() for claim in module.CLAIMS)]
    assert len(set(names)) == len(names) and all(" " not in name for name in names)
