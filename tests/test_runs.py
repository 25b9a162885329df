"""aya_min/runs.py: runs of older versions resume as they began."""

import json

import pytest
from small import assert_close, logged, run

from aya_min import linear, runs
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
