"""Claims: the rule of the verdict, arms that are made once and shared, a claim that was stopped, records."""

import html
import json
import re
from types import SimpleNamespace

import pytest
import torch
from small import CPU

import train
from aya_min import claims, experiments, experiments_matched, experiments_page, experiments_records
from aya_min.claims import __main__ as claims_command
from aya_min.experiments import Claim, Comparison, Figure, Lab, measured, side_of, together
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


def lab_of(answers, **measures):
    """A stand-in for a lab: {arm: rows} of answers, and what a claim file measures."""
    return SimpleNamespace(seed=1, answers=lambda arm, decoding, scored=False: answers[arm],
                           module=SimpleNamespace(MEASURES=measures))


def graded(grades, copies=1, **more):
    """Answers to len(grades) questions in `copies` languages."""
    return [{"question_id": f"q{i}", "language": code, "prompt": "p", "grade": grade, **more}
            for i, grade in enumerate(grades) for code in ("en", "fr", "de")[:copies]]


def test_a_win_rate_by_hand():
    """Of four questions one is won, two are ties, one is lost in English; in French all are won."""
    a, b = graded([3, 1, 1, 0]), graded([0, 1, 1, 3])
    fr = [{**row, "language": "fr"} for row in graded([3, 3, 3, 3])]
    lab = lab_of({"a": a + fr, "b": b + [{**row, "grade": 0} for row in fr]})
    english = measured(lab, Comparison("a", "b", languages=("en",)))
    assert (english["win"], english["tie"], english["loss"], english["value"]) == (1, 2, 1, 50.0)
    assert english["verdict"] == "not shown"
    french = measured(lab, Comparison("a", "b", languages=("fr",)))
    assert french["ci95"] == [100.0, 100.0] and french["verdict"] == "shown"
    assert measured(lab, Comparison("a", "b"))["value"] == 75.0
    with pytest.raises(ValueError, match="no question in these languages"):
        measured(lab, Comparison("a", "b", languages=("xx",)))


def test_level_in_another_measure_is_five_percent_of_the_second_arms_mean():
    marks = lambda row: row["marks"]
    lab = lab_of({"a": graded([0] * 9, marks=20.5), "b": graded([0] * 9, marks=20.0),
                  "c": graded([0] * 9, marks=22.0)}, marks=marks)
    level = measured(lab, Comparison("a", "b", "level", "marks"))
    assert (level["value"], level["of_a"], level["of_b"], level["verdict"]) == (0.5, 20.5, 20.0, "shown")
    assert measured(lab, Comparison("c", "b", "level", "marks"))["verdict"] == "reversed"
    assert measured(lab, Comparison("b", "c", "below", "marks"))["verdict"] == "shown"


def test_an_answer_without_a_score_leaves_its_question_out():
    lab = lab_of({"a": [{**row, "reward": i} for i, row in enumerate(graded([0] * 4))],
                  "b": [{**row, "reward": None if i == 3 else 0} for i, row in enumerate(graded([0] * 4))]})
    found = measured(lab, Comparison("a", "b", measure="reward"))
    assert (found["value"], found["num"]) == (1.0, 3)


def test_a_question_in_several_languages_is_one_draw_of_a_figures_interval():
    """A figure over questions resampled rows: its interval was narrower than its comparisons'."""
    values = [(f"q{i}", float(i % 3)) for i in range(30) for _ in range(4)]
    wide, narrow = (measured(None, Figure("f", lambda lab: some, "above", 0.5, ()))["ci95"]
                    for some in (values, [value for _, value in values]))
    assert 1.7 < (wide[1] - wide[0]) / (narrow[1] - narrow[0]) < 2.3
    with pytest.raises(ValueError, match="no values with seed 1"):
        measured(lab_of({}), Figure("f", lambda lab: [], "above", 0.5, ()))


# ---- arms --------------------------------------------------------------------------------------------------

def claim_file(**arms):
    """A claim file with these arms, the first against the second by win rate and by two more measures."""
    a, b = list(arms)[:2]
    comparisons = (Comparison(a, b), Comparison(a, b, "level", "length", "greedy", ("en", "fr")),
                   Comparison(a, b, "below", "marks", "greedy"),
                   Figure("losses", lambda lab: [row["loss"] for row in lab.metrics(a)], "above", 0.0,
                          ()))
    claims = (Claim("tried", "it", "1", comparisons),)
    measures = {"marks": lambda row: row["completion"].count("a")}
    return SimpleNamespace(PAPER="a paper", MINUTES=1, ARMS=arms, MEASURES=measures, CLAIMS=claims,
                           __file__=__file__)


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
    assert run(claim_file(one=short_sft(32), two=late)) == record       # minutes are those of the steps
    [claim] = record["results"]
    assert [row["measure"] for row in claim["comparisons"]] == ["win rate", "length", "marks", "figure"]
    assert claim["comparisons"][0]["seeds"][0]["num"] == 48 and claim["comparisons"][3]["verdict"] == "shown"
    path = tmp_path / "out" / "small" / "claim.json"
    assert experiments_records.read_record(path) == record
    text = path.read_text(encoding="utf-8")
    for wrong in (text.replace('"value": ', '"value": 1'), text.replace('"code"', '"cod"'),
                  text.replace('"seeds": [\n    1', '"seeds": [\n    2')):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="as a claim wrote it; move it elsewhere"):
            run(claim_file(one=short_sft(32), two=late))
    path.write_text(text, encoding="utf-8")
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


def test_other_steps_are_done_once_again_after_a_kill_and_anew_when_the_claim_file_changes(tmp_path):
    """A killed step was refused for the files of its own that it left, and a step without content went on
    with what an earlier version of its claim file had made."""
    file, calls = tmp_path / "claims.py", []
    file.write_text("1")
    lab = Lab(tmp_path, "smoke", 1, CPU, SimpleNamespace(__file__=file))

    def make(folder):
        calls.append(folder)
        (folder / "half").write_text("half")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"seconds": "of the object", "calls": len(calls)}
    with pytest.raises(KeyboardInterrupt):
        lab.step("a step", make)
    for _ in range(2):
        found = lab.step("a step", make)
        assert found == {"seconds": "of the object", "calls": 2, "folder": calls[0]}
    file.write_text("2")
    assert lab.step("a step", make)["calls"] == 3 and calls[2] != calls[1]
    assert lab.step("a step", make, "content")["calls"] == 4


@pytest.mark.parametrize("value, ticks", [(1.0, "0.88 0.9 0.92 0.94 0.96 0.98 1"), (0.9, "0.8 1 1.2")])
def test_values_that_are_all_alike_have_an_axis_from_what_they_are_held_against(value, ticks):
    """An axis of a millionth had labels over each other."""
    seeds = [{"value": value, "ci95": [value] * 2, "none": 0.9, "verdict": "shown"}]
    row = {"label": "f", "measure": "figure", "side": "above", "verdict": "shown", "seeds": seeds}
    claim = {"comparisons": [row]}
    drawn = experiments_page.forest(claim, [1])
    assert "f, expected above 0.9: shown" in drawn
    assert re.findall(r">([\d.]+)</text>", drawn[drawn.index("row axis"):]) == ticks.split()


def test_a_step_that_trains_is_an_arm_with_its_steps_and_tokens(tmp_path):
    (file := tmp_path / "claims.py").write_text("1")
    fit = lambda lab: lab.step("fit", lambda _: {"training_steps": 7, "tokens": 70, "right": [1]})["folder"]
    lab = Lab(tmp_path, "smoke", 1, CPU, SimpleNamespace(__file__=file, ARMS={"a": fit}))
    assert lab.made("a")["right"] == [1]
    about = experiments_records.arms_of(lab)["a"]
    assert (about["steps"], about["tokens"]) == (7, 70) and "start" not in about
    assert about["folder"] == lab.name_of(lab.arm("a").parent)


def test_a_figure_that_asks_for_two_arms_names_its_pairs(tmp_path):
    """What an arm asks for is not the Figure's: "b" is made of "a"."""
    file = SimpleNamespace(ARMS={"a": lambda lab: "a", "b": lambda lab: lab.arm("a") + "b"})
    lab = Lab(tmp_path, "smoke", 1, CPU, file)
    of = lambda *arms: lambda lab: [float(len(lab.arm(arm))) for arm in arms]
    for _ in range(2):                              # as it is where arms are there already
        assert experiments_records.with_pairs(lab, Figure("f", of("b", "b"), "above", 0.0, ()))["value"] == 2
        with pytest.raises(ValueError, match="'f' asks for the arms a and b; name the pairs"):
            experiments_records.with_pairs(lab, Figure("f", of("a", "b"), "above", 0.0, ()))
        named = Figure("f", of("a", "b"), "above", 0.0, (("a", "b"),))
        assert experiments_records.with_pairs(lab, named)["value"] == 1.5


def test_merged_clusters_say_what_their_models_started_from(tmp_path, monkeypatch):
    lab = Lab(tmp_path, "smoke", 1, CPU, None)
    monkeypatch.setattr(experiments, "train_clusters_and_merge",
                        lambda run, name, *_: lab.folder / "steps" / name / "model")
    start = {"a": lab.folder / "steps/one/model", "b": lab.folder / "steps/two/model"}
    names = {"a": ["en"], "b": ["fr"]}
    made = [lab.clusters("n", "sft", each, [], {}, 1.0, names) for each in (start, start["a"])]
    assert [lab.starts[lab.name_of(one)] for one in made] == ["steps/one/model steps/two/model",
                                                             "steps/one/model"]


def test_seed_0_answers_the_validation_questions_and_others_those_of_the_test(tmp_path):
    splits = [Lab(tmp_path, "smoke", seed, CPU, None).recipe.eval_split for seed in (0, 1, 2)]
    assert splits == ["validation", "test", "test"]


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
    ("claim recipe --record", "a whole claim file"),
    ("claim expanse --seeds 1 2 --record", "3 seeds or more"),
    ("claim expanse --seeds 0 1 2 --record", "without seed 0"),
    ("claim expanse --preset smoke --record", "at preset tiny"),
    ("claim expanse --seeds -1", "seeds"), ("claim expanse --preset huge", "preset")])
def test_a_mistake_is_one_line_and_nothing_is_made(words, said, in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(train, *words.split())
    assert code == 2 and said in err[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, said", [('{"seed": 3}', "chosen by --seeds"), ('{"rounds": -1}', "rounds"),
                                        ('{"epoch": 1}', "unknown setting epoch"), ("[]", "not an object"),
                                        ('{"batch_size": 100000}', "fewer than one batch"),
                                        ('{"max_new_tokens": 100000}', "positions")])
def test_settings_to_try_a_claim_under_are_checked_and_are_no_record(text, said, in_process, tmp_path):
    (tmp_path / "c.json").write_text(text)
    words = "claim", "expanse", "--out", tmp_path / "out", "--config", tmp_path / "c.json"
    code, _, err = in_process(train, *words)
    assert code == 2 and len(err) == 1 and said in err[0]
    (tmp_path / "c.json").write_text('{"rounds": 2}')
    code, _, err = in_process(train, *words, "--record")
    assert code == 2 and "as it is" in err[0] and not (tmp_path / "out").exists()


def test_a_command_of_other_code_that_is_stopped_leaves_the_record_and_its_folder_usable(run, tmp_path,
                                                                                         monkeypatch):
    """The record got its other name before any work: after a stop the folder was refused for good."""
    def stopped(lab):
        raise KeyboardInterrupt
    first, folder = claim_file(one=short_sft(32), two=short_sft(64)), tmp_path / "out" / "small"
    run(first)
    before = (folder / "claim.json").read_bytes()
    monkeypatch.setattr(experiments_records, "code_version", lambda: "other")
    with pytest.raises(KeyboardInterrupt):
        run(claim_file(one=stopped, two=stopped))
    assert (folder / "claim.json").read_bytes() == before
    (folder / "claim.json").rename(folder / "claim-0123456789.json")       # stopped between both names
    experiments_records.check("small", [1], "smoke", tmp_path / "out", False)


def test_a_record_of_another_claim_is_refused_before_any_work(run, tmp_path):
    """A copied folder was read at the end, after all the training."""
    run(claim_file(one=short_sft(32), two=short_sft(64)))
    (tmp_path / "out" / "small").rename(tmp_path / "out" / "other")
    other = claim_file(one=short_sft(32), two=short_sft(64))
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError, match="record of claims small"):
        patched.setattr(experiments, "claim_files", lambda: {"other": other})
        experiments_records.check("other", [1], "smoke", tmp_path / "out", False)


def test_fewer_rounds_than_are_compared_are_refused_before_any_work(tmp_path, in_process):
    (tmp_path / "c.json").write_text('{"rounds": 2}')
    words = "claim", "expanse", "--preset", "smoke", "--config", tmp_path / "c.json", "--out"
    code, _, err = in_process(train, *words, tmp_path / "new")
    assert code == 2 and err == ["error: --config: rounds 2, and 3 are compared; give as many"]


def test_an_arm_without_rows_is_named(tmp_path):
    lab = Lab(tmp_path, "smoke", 1, CPU, None)
    assert lab.batch_of(range(1000), "arm x") == lab.recipe.batch_size
    with pytest.raises(ValueError, match="arm x: no row is left to train on with seed 1; .*offline_margin"):
        lab.batch_of([], "arm x")


def test_the_words_of_the_world_are_code(monkeypatch, tmp_path):
    """Arms of other words were taken for those of these."""
    (tmp_path / "words").mkdir()
    (tmp_path / "profiles").mkdir()
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    before = experiments.code_version()
    (tmp_path / "words" / "tr.json").write_text("{}")
    assert experiments.code_version() != before


def test_a_run_under_other_settings_says_so_and_what_it_replaces_stays(run, tmp_path, monkeypatch):
    file, folder = claim_file(one=short_sft(32), two=short_sft(64)), tmp_path / "out" / "small"
    code = run(file, seeds=(1,))["code"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    changed = run_claims("small", (2,), "smoke", tmp_path / "out", CPU, {"sft_epochs": 0.5})
    assert "preset smoke with sft_epochs 0.5" in experiments_records.table(changed)
    assert "Preset smoke with sft_epochs 0.5" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / f"report-{code}.html").read_text(encoding="utf-8") == page
    assert changed["command"] == "train.py claim small --seeds 2 --preset smoke"


def test_a_claim_whose_real_text_is_not_there_is_skipped_and_says_so(run, tmp_path, monkeypatch):
    """Without the text its arms are not made; the record of before does not stand for one with the text."""
    monkeypatch.setattr(experiments, "DATA", tmp_path / "data")
    figure = Figure("f", lambda lab: [1.0, 2.0], "above", 0.0, ())
    file = claim_file(one=short_sft(32), two=short_sft(64))
    file.CLAIMS = (Claim("here", "it", "1", (figure,)),
                   Claim("away", "it", "1", (Comparison("one", "two"),), needs="a.jsonl"))
    record = run(file)
    assert [claim["name"] for claim in record["results"]] == ["here"] and record["arms"]["1"] == {}
    assert "away: skipped, needs a.jsonl" in experiments_records.table(record)
    for name, kept in (("away", False), ("small", True)):
        with pytest.raises(ValueError, match="needs a.jsonl in the folder"):
            experiments_records.check(name, (1, 2, 3), "tiny", tmp_path / "other", kept)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    found = run(file)
    assert [claim["name"] for claim in found["results"]] == ["here", "away"] and found["skipped"] == {}
    assert found["code"] != record["code"]


def test_a_figure_that_is_no_mean_brings_its_own_interval():
    figure = Figure("f", lambda lab: {"value": 0.5, "ci95": [0.1, 0.9], "num": 7}, "above", 0, ())
    found = measured(None, figure)
    assert (found["value"], found["verdict"], found["none"], found["num"]) == (0.5, "shown", 0, 7)


def test_other_settings_of_the_recipe_make_another_start(tmp_path):
    changes = {}, None, {"lessons": 96}
    folders = {Lab(tmp_path, "smoke", 1, CPU, None, changed).folder for changed in changes}
    assert len(folders) == 2


def test_a_folder_that_holds_what_no_claim_made_is_refused_and_stays(in_process, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "1.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, said in ((tmp_path, "which no claim made"), (tmp_path / "file", "not a folder")):
        code, _, err = in_process(train, "claim", "expanse", "--preset", "smoke", "--out", out)
        assert code == 2 and len(err) == 1 and said in err[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


def test_a_record_of_another_preset_or_a_users_own_file_is_not_replaced(in_process, tmp_path):
    (tmp_path / "expanse").mkdir()
    record = tmp_path / "expanse" / "claim.json"
    of_tiny = json.dumps({"preset": "tiny", "seeds": [], "arms": {}, "minutes": [], "results": []})
    for text, said in ((of_tiny, "a record of preset tiny"), ('{"mine": 1}', "not the record of a claim"),
                       ('{"seeds": [1], "arms": {}, "results": 5}', "move it elsewhere"), ("[", "move it")):
        record.write_text(text, encoding="utf-8")
        code, _, err = in_process(train, "claim", "expanse", "--preset", "smoke", "--out", tmp_path)
        assert code == 2 and len(err) == 1 and said in err[0]
        assert record.read_text(encoding="utf-8") == text


def test_seeds_of_one_after_the_other_are_in_one_record_and_other_code_keeps_its_own(run, tmp_path,
                                                                                     monkeypatch):
    """Seed 2 after seed 1 left a record of seed 2 alone."""
    file, folder = claim_file(one=short_sft(32), two=short_sft(64)), tmp_path / "out" / "small"
    both = run(file, "both", seeds=(1, 2))
    assert run(file, seeds=(2,))["seeds"] == [2]
    assert run(file, seeds=(1,))["seeds"] == [1]
    joined = experiments_records.read_record(folder / "claim.json")
    assert without_times(joined) == without_times(both) and joined["seeds"] == [1, 2]
    monkeypatch.setattr(experiments_records, "code_version", lambda: "other")
    assert run(file, seeds=(3,))["seeds"] == [3]
    kept = experiments_records.read_record(folder / f"claim-{joined['code']}.json")
    assert kept == joined
    monkeypatch.undo()
    assert experiments_records.earlier_seeds(folder, joined["code"]).keys() == {1, 2}


def test_the_list_names_every_claim_with_its_paper(capsys):
    experiments_records.listing()
    text = experiments_records.listing()
    for module in experiments.claim_files().values():
        assert module.PAPER in text and all(claim.statement in text for claim in module.CLAIMS)


@pytest.mark.parametrize("comparison, said", [
    (Comparison("a", "gone"), "the arm 'gone' is not in ARMS"),
    (Comparison("a", "b", "larger"), "unknown side 'larger'; give one of above, below, level"),
    (Comparison("a", "b", measure="nosuch"), "unknown measure 'nosuch'"),
    (Comparison("a", "b", decoding="beam"), "unknown decoding 'beam'; give one of greedy, sampled"),
    (Comparison("a", "b", measure="loss", held_out="x"), "unknown held_out 'x'"),
    (Figure("f", None, "above", 0.0, ("a", "b")), "are no pairs; give"),
    (Figure("f", None, "above", 0.0, (("a", "gone"),)), "the arm 'gone' is not in ARMS")])
def test_a_claim_that_names_what_is_not_there_is_refused_before_any_arm_is_made(comparison, said):
    with pytest.raises(ValueError, match=said):
        experiments_records.check_claim(Claim("c", "s", "t", (comparison,)),
                                        SimpleNamespace(ARMS={"a": None, "b": None}))


@pytest.mark.parametrize("name, record", experiments_records.records().items())
def test_a_record_says_what_the_claim_file_says(name, record):
    """A record said "after SFT and DPO" of comparisons after SFT."""
    says = {claim.name: (claim.statement, claim.theirs) for claim in experiments.claim_files()[name].CLAIMS}
    for claim in record["results"]:
        assert says[claim["name"]] == (claim["statement"], claim["theirs"])


@pytest.mark.parametrize("name", experiments.claim_files())
def test_reasons_for_unmatched_arms_are_of_claims_that_there_are(name):
    module = experiments.claim_files()[name]
    assert set(getattr(module, "UNMATCHED", {})) <= {claim.name for claim in module.CLAIMS}


@pytest.mark.long
@pytest.mark.parametrize("name", experiments.claim_files())
def test_every_claim_file_runs_at_preset_smoke(name, in_process, tmp_path_factory):
    """Also: arms that started from different models have a reason."""
    out = tmp_path_factory.getbasetemp() / "claims"         # all files share it, and with it the start
    code, printed, err = in_process(train, "claim", name, "--preset", "smoke", "--seeds", "1", "--out", out)
    if code == 2 and ("no part of this repository" in err[-1] or "../shared/data" in err[-1]):
        pytest.skip("the real text is not here")
    assert code == 0, err
    record = json.loads((out / name / "claim.json").read_text(encoding="utf-8"))
    there = [claim.name for claim in experiments.claim_files()[name].CLAIMS if not claim.skipped]
    assert [claim["name"] for claim in record["results"]] == there
    assert printed.strip().endswith(str(out / name / "report.html")) and len(record["minutes"]) == 1
    module = experiments.claim_files()[name]
    differ = experiments_matched.unmatched(record, module)
    assert {claim for claim, pairs in differ.items() if any("start" in what for *_, what in pairs)} \
        <= getattr(module, "UNMATCHED", {}).keys()


def test_every_claim_file_names_arms_that_it_has():
    for module in experiments.claim_files().values():
        for claim in module.CLAIMS:
            experiments_records.check_claim(claim, module)


def test_the_page_of_results_is_what_the_records_give():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert with_claims(text) == text


def test_a_record_gives_a_row_and_its_comparisons(tmp_path):
    claim = Claim("c", "says | so", "theirs", (Comparison("a", "b"),))
    one = {"value": 53.25, "ci95": [51.0, 55.0], "none": 50.0, "verdict": "shown"}
    record = {"claims": "file", "paper": "P", "preset": "tiny", "seeds": [1, 2], "minutes": [3.0, 4.0],
              "arms": {"1": {}, "2": {}},
              "versions": {"commit": "abc", "torch": "2"}, "machine": {"processor": "X", "threads": 2},
              "results": [result(claim, [[one], [one]])]}
    (tmp_path / "file.json").write_text(json.dumps(record), encoding="utf-8")
    text = with_claims(f"before\n{BEGIN}old\n{END}after\n", tmp_path)
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    both = "a above b, win rate, sampled: 53.2 [51.0, 55.0]; 53.2 [51.0, 55.0]"
    assert f"| c | P | says \\| so | theirs | {both} | shown |" in text
    with pytest.raises(ValueError, match="lacks the lines"):
        with_claims("nothing")


def test_every_seeds_mark_has_a_colour_of_the_page():
    """That of the third had none: it was black, also on a dark page."""
    one = lambda verdict: {"value": 1.0, "ci95": [0.5, 2.0], "none": 0.0, "verdict": verdict}
    seeds = [[one(verdict)] for verdict in ("shown", "not shown", "reversed", "shown")]
    claim = result(Claim("c", "s", "t", (Comparison("a", "b"),)), seeds)
    drawn = experiments_page.forest(claim, [1, 2, 3, 4])
    assert sorted(re.findall('<g class="(.*?)">', drawn)) == ["a", "a", "b", "b"]


def test_torch_threads_are_said_in_the_record():
    assert experiments_records.machine()["threads"] == torch.get_num_threads()


def test_no_two_claims_or_files_share_a_name():
    files = experiments.claim_files()
    names = [*files, *(claim.name for module in files.values() for claim in module.CLAIMS)]
    assert len(set(names)) == len(names) and all(" " not in name for name in names)


@pytest.mark.parametrize("text, said", [("def broken(", "SyntaxError"), ("PAPER = 'x'", "without MINUTES"),
                                        ("import nothing_of_that_name", "ModuleNotFoundError")])
def test_a_half_written_claim_file_is_refused_by_name(text, said, tmp_path, monkeypatch):
    """`train.py claims` and `train.py claim` showed its traceback."""
    name = f"half_{experiments.hash_of(text)}"
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / f"{name}.py").write_text(text)
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(claims, "__path__", [str(tmp_path / "claims")])
    with pytest.raises(ValueError, match=f"{name}.py: a claim file without.*; finish it") as refused:
        experiments.claim_files()
    assert said in str(refused.value)


def test_the_list_of_claims_is_guarded_and_printed_by_one_rank(in_process, monkeypatch):
    """A broken record gave a traceback, and two ranks printed the list twice."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    assert in_process(train, "claims") == (None, "", [])
    monkeypatch.setenv("RANK", "0")
    assert "dense-weights: " in in_process(train, "claims")[1]

    def broken():
        raise ValueError("results/x.json: not JSON")
    monkeypatch.setattr(experiments_records, "listing", broken)
    assert in_process(train, "claims") == (2, "", ["train.py: results/x.json: not JSON"])


def test_the_page_of_all_claims_says_each_verdict_and_needs_no_other_file(tmp_path):
    kept = experiments_records.records()
    differ = {name: experiments_matched.differing(record, experiments.claim_files()[name])
              for name, record in kept.items()}
    text = experiments_page.all_claims(kept, differ, ["exit-quantized-hard"])
    assert "Without a record: exit-quantized-hard." in text
    for file, record in kept.items():
        for claim in record["results"]:
            assert text.count(html.escape(claim["statement"])) >= 2
            assert html.escape(differ[file].get(claim["name"], "")) in text
    points, share = experiments.LEVEL_POINTS, experiments.LEVEL_SHARE
    assert f"within {points:g} points of a win rate of 50, or within {share:.0%} of what" in text
    assert "Arms differ in steps, tokens: equal operations are compared" in text
    verdicts = experiments_records.last_verdicts()
    assert f"{list(verdicts.values()).count('shown')} shown" in text.replace("\n", " ")
    assert not re.search(r'(src|href)="(?!#)', text) and "<script" not in text


def test_the_page_of_all_claims_does_not_replace_what_it_did_not_write(tmp_path):
    page = tmp_path / "claims.html"
    for _ in range(2):
        claims_command.main(["page", "--out", str(page)])
    assert page.read_text(encoding="utf-8").count("<h1>") == 1
    page.write_text("mine")
    with pytest.raises(ValueError, match="no earlier page of claims"):
        claims_command.main(["page", "--out", str(page)])
    assert page.read_text() == "mine"


# ---- matched conditions ------------------------------------------------------------------------------------

SAME = {"steps": 100, "tokens": 1000, "start": "steps/base/model"}


@pytest.mark.parametrize("change, found", [
    ({}, []), ({"steps": 101, "tokens": 1050}, []), ({"steps": 102}, ["steps"]),
    ({"tokens": 1200}, ["tokens"]),
    ({"start": "steps/other/model"}, ["start"]), ({"tuned": 3}, ["tuning"])])
def test_arms_differ_in_start_steps_tokens_or_tuning(change, found):
    assert experiments_matched.differences(SAME, {**SAME, **change}) == found


def test_a_record_of_arms_that_differ_needs_a_reason(tmp_path):
    one = {"value": 1.0, "ci95": [0.5, 2.0], "none": 0.0, "verdict": "shown"}
    claim = Claim("c", "s", "t", (Comparison("a", "b"),))
    results = [result(claim, [[one]])]
    record = {"claims": "f", "results": results, "arms": {"1": {"a": SAME, "b": {**SAME, "steps": 300}}}}
    module = SimpleNamespace(CLAIMS=(claim,))
    with pytest.raises(ValueError, match="'a' and 'b' differ in steps"):
        experiments_matched.check_matched(record, module)
    assert experiments_matched.differing(record, module) == {
        "c": "Arms differ in steps: the claim file gives no reason."}
    module.UNMATCHED = {"c": ""}
    with pytest.raises(ValueError, match="'a' and 'b' differ in steps"):
        experiments_matched.check_matched(record, module)
    module.UNMATCHED = {"c": "more steps are what is asked"}
    assert experiments_matched.check_matched(record, module) == {"c": [("a", "b", ["steps"])]}
    figure = Figure("f", None, "above", 0.0, (("b", "a"),))
    module.CLAIMS = (Claim("c", "s", "t", (figure,)), Claim("other", "s", "t", (Comparison("a", "gone"),)))
    assert experiments_matched.check_matched(record, module) == {"c": [("b", "a", ["steps"])]}
    module.CLAIMS = (Claim("c", "s", "t", (Comparison("a", "gone"),)),)
    with pytest.raises(ValueError, match="f, claim c, seed 1: .* how the arm 'gone' was trained"):
        experiments_matched.check_matched(record, module)


# {file: claims whose arms differ in their start alone, which their older record does not say}
OLDER = {"bam": {"bam-data", "bam-soft", "bam-large"}, "early_exit": {"exit-saves-hard"},
         "merging": {"order", "merge-after-each"}, "preference_losses": {"pref-proxy", "pref-weak"},
         "nexus": {"nexus-router", "nexus-mixture", "nexus-large", "nexus-tasks", "nexus-new"}}


@pytest.mark.parametrize("name, record", experiments_records.records().items())
def test_every_record_is_of_matched_arms_or_says_why_not(name, record):
    module = experiments.claim_files()[name]
    found, reasons = experiments_matched.check_matched(record, module), getattr(module, "UNMATCHED", {})
    recorded = {claim["name"] for claim in record["results"]}
    assert reasons.keys() & recorded - found.keys() == OLDER.get(name, set())
