"""aya_min/runs.py: runs of older versions resume as they began; folders that cannot be written."""

import json
import os

import pytest
from small import assert_close, logged, run

import train
from aya_min import linear, loop, pipeline_results, pipeline_steps, runs
from aya_min.config import SFT


@pytest.mark.parametrize("without", ["packing", "too_long", "profile", "products"])
def test_a_run_whose_config_lacks_a_younger_key_resumes_to_the_same_numbers(world, tmp_path, without):
    """A setting that was added would have orphaned every run that was made before."""
    common = dict(schedule="constant", save_every=1)
    run("sft", world, tmp_path / "whole", max_steps=3, **common)
    run("sft", world, tmp_path / "run", max_steps=2, **common)
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    assert without in about or without in about["settings"]
    about.pop(without, None)
    about["settings"].pop(without, None)
    path.write_text(json.dumps(about), encoding="utf-8")
    run("sft", world, tmp_path / "run", resume=True, max_steps=3, **common)
    assert_close(logged(tmp_path / "run"), logged(tmp_path / "whole"), rtol=1e-6, atol=1e-6)


def test_a_younger_setting_takes_the_value_that_does_what_the_older_version_did(monkeypatch):
    monkeypatch.setattr(runs, "AS_BEFORE", {"packing": False})
    assert runs.settings_before({"settings": {}}, SFT).packing is False
    assert runs.settings_before({"settings": {"packing": True}}, SFT).packing is True


def test_a_resumed_run_takes_the_library_of_products_that_it_began_with(world, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "_chosen", "default")
    run("sft", world, tmp_path / "run", max_steps=2, schedule="constant", save_every=1)
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    assert about["products"] == "default"
    path.write_text(json.dumps({**about, "products": "onednn"}), encoding="utf-8")
    run("sft", world, tmp_path / "run", resume=True, max_steps=3, schedule="constant")
    assert linear.chosen() == "onednn"
    assert runs.products_before(path) == "onednn"
    path.write_text("{}", encoding="utf-8")
    assert runs.products_before(path) in linear.LIBRARIES
    path.write_text('{"products": ["onednn"]}', encoding="utf-8")
    with pytest.raises(ValueError, match="config.json: products .* known: default onednn; write one of them"):
        runs.products_before(path)


def test_a_setting_that_a_config_has_lost_is_named_at_a_resume(world, tmp_path, capsys):
    """Today's default was taken without a word."""
    run("sft", world, tmp_path / "run", max_steps=2, schedule="constant", save_every=1, learning_rate=1e-4)
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    del about["settings"]["learning_rate"]
    path.write_text(json.dumps(about), encoding="utf-8")
    run("sft", world, tmp_path / "run", resume=True, max_steps=3, schedule="constant")
    said = f"config.json does not hold learning_rate {SFT().learning_rate}: today's default is taken"
    assert said in capsys.readouterr().err




def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, in_process, monkeypatch):
    """A recipe or claim told it with the name of a temporary file, or after its base was trained."""
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    (tmp_path / "taken" / "config.json").write_text("{}")
    for words in (["recipe", "--preset", "smoke"], ["claim", "expanse", "--preset", "smoke"]):
        code, out, err = in_process(train, *words, "--out", tmp_path / "file" / "run")
        assert code == 2 and out == "" and len(err) == 1, (words, err)
        assert f"{tmp_path / 'file'} is no folder that can be written; give another --out" in err[0]
    code, _, err = in_process(train, "recipe", "--preset", "smoke", "--out", tmp_path / "taken")
    assert code == 2 and len(err) == 1 and "move it elsewhere" in err[0]
    assert err[0].startswith(f"error: {tmp_path / 'taken' / 'report.html'} is no file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for words in (["recipe", "--preset", "smoke"], ["claim", "expanse", "--preset", "smoke"]):
        code, out, err = in_process(train, *words, "--out", tmp_path / "read-only")
        assert (code, out) == (2, "") and f"{tmp_path} is no folder that can be written" in err[0]
    assert not (tmp_path / "read-only").exists()


def test_a_page_that_cannot_be_written_is_said_and_stops_no_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "report.html").mkdir()
    pipeline_steps.refresh_page(tmp_path, every=0)
    assert capsys.readouterr().err == f"the page is not written: {tmp_path / 'report.html'}: Is a directory\n"


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}'])
def test_a_record_of_ours_that_is_not_json_is_refused_with_what_to_do(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: .*; copy it again, or start anew with another --out"):
        runs.read_run(tmp_path, "sft", SFT)
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl:1: .*; remove the line"):
        loop.read_metrics(tmp_path / "metrics.jsonl")
    step = tmp_path / "steps" / "base"
    step.mkdir(parents=True)
    (step / "done.json").write_text(text)
    run = pipeline_steps.Run(tmp_path, None, None, {})
    with pytest.raises(ValueError, match="base/done.json: .*remove .*base, and the same command"):
        pipeline_results.step_totals(run, "base")
