"""The claims on early exit: labels, splits of real text, the rules on values worked by hand, and the whole
way from two nets to figures, with small random ones in place of those that are trained."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import CPU, make, tokenizer

import train
from aya_min import early_exit, experiments_records, real_text, weights
from aya_min.classifier import Classifier, ClassifierConfig, SideNet, SideNetConfig
from aya_min.claims import early_exit as claims
from aya_min.config import RECIPES, Recipe, settings_from
from aya_min.experiments import measured
from aya_min.files import write_jsonl
from aya_min.languages import LANGUAGES
from aya_min.world import SPLITS, split_named

SMOKE = settings_from(Recipe, RECIPES["smoke"] | {"eval_split": "validation", "lessons": 48})


# ---- labels ------------------------------------------------------------------------------------------------

def test_labels_of_the_world_by_hand():
    by_hand = [("largest", ["two", "nine", "five"], "numbers", "2"), ("opposite", ["hot"], "opposites", None),
               ("odd", ["red", "cat", "dog", "cow"], "colours", "1"), ("sum", ["two"], "numbers", None),
               ("translate", ["Monday", "fr"], "days", None), ("reverse", ["cat", "red"], "colours", None)]
    for task, args, kind, place in by_hand:
        question = {"task": task, "args": args}
        assert (claims.kind_of(question), claims.place_of(question)) == (kind, place), task


def test_every_task_has_as_many_texts_as_asked_of_its_labels_and_splits_share_no_id():
    lab = SimpleNamespace(recipe=SMOKE, seed=0)
    for task in claims.WORLD + claims.HARD:
        parts = {split: claims.TASKS[task](lab, split, 200) for split in SPLITS if split != "test"}
        assert {len(rows) for rows in parts.values()} == {200}
        assert {row["label"] for rows in parts.values() for row in rows} <= set(claims.LABELS[task])
        ids = [{row["id"] for row in rows} for rows in parts.values()]
        assert not ids[0] & ids[1] | ids[0] & ids[2] | ids[1] & ids[2]
        assert len({row["language"] for row in parts["train"]}) == len(LANGUAGES)
    assert {row["label"] for row in parts["train"]} == set("1234")


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Files of real text's form: 40 parallel sentences in three languages, 21 ids of two topics in two."""
    monkeypatch.setattr(real_text, "FOLDER", tmp_path)
    write_jsonl(tmp_path / "parallel.jsonl", [{"id": f"s/{i}", "language": code, "text": f"{code} {i}"}
                                              for i in range(40) for code in ("en", "de", "fr")])
    write_jsonl(tmp_path / "classification.jsonl", [
        {"id": f"t/{i}", "language": code, "text": f"{code} {i}", "label": "travel" if i % 3 else "health"}
        for i in range(21) for code in ("en", "de")])


def test_translations_of_a_real_text_are_in_one_split_and_languages_take_turns(real):
    parts = {split: real_text.sentences(split, 999, 0) for split in SPLITS}
    assert sum(map(len, parts.values())) == 120
    assert all(split_named(row["id"]) == split for split, rows in parts.items() for row in rows)
    some = claims.TASKS["language"](SimpleNamespace(seed=0), "train", 12)
    assert Counter(row["label"] for row in some) == {"en": 4, "de": 4, "fr": 4}
    assert all(row["label"] == row["language"] for row in some)


def test_each_topics_ids_are_dealt_to_the_splits(real):
    parts = {split: claims.TASKS["topic"](None, split, 99) for split in SPLITS}
    ids = {split: {row["id"] for row in rows} for split, rows in parts.items()}
    assert {split: len(found) for split, found in ids.items()} == {
        "train": 12, "preference": 3, "validation": 3, "test": 3}
    assert sum(map(len, parts.values())) == 42 and len(set.union(*ids.values())) == 21
    for rows in parts.values():                     # of 7 ids of health and 14 of travel
        labels = Counter(row["label"] for row in rows)
        assert labels["travel"] == 2 * labels["health"]


def test_real_text_that_is_not_there_is_refused_before_any_work_and_other_claims_run(in_process, tmp_path,
                                                                                     monkeypatch):
    monkeypatch.setattr(real_text, "FOLDER", tmp_path / "none")
    for name in ("early_exit", "exit-saves-real"):
        code, _, err = in_process(train, "claim", name, "--out", tmp_path / "out")
        assert code == 2 and len(err) == 1 and "parallel.jsonl: not there, and no part of this" in err[0]
    assert not list(tmp_path.iterdir())
    experiments_records.check("exit-saves", [1], "tiny", tmp_path / "out", False)


# ---- the rules ---------------------------------------------------------------------------------------------

# Four texts of two ids. The MainNet costs 100 each, the way to the SideNet's answer 10, 2 of them its own.
SEEN = dict(ids=np.array(["a", "a", "b", "b"]), labels=np.array(["1", "2", "1", "3"]),
            main=np.array([True, True, True, False]), side=np.array([True, False, True, False]),
            main_confidence=np.array([0.9, 0.9, 0.5, 0.7]), side_confidence=np.array([0.9, 0.6, 0.8, 0.4]),
            at_exit=np.full(4, 10.0), of_main=np.full(4, 100.0), side_head=np.array(2.0))


@pytest.fixture
def lab(monkeypatch):
    """On the other split the SideNet is right above 0.6, and three of four may leave for 33%. In W8 the
    MainNet is wrong on the first text, too."""
    def of_both(lab, task, layer, end, split):
        other = dict(side=np.array([True, False, True, True]), main=np.array([True] * 4),
                     side_confidence=np.array([0.9, 0.6, 0.8, 0.7]))
        changed = {"main": np.array([False, True, True, False])} if end else {}
        return SEEN | (other if split == "preference" else changed)
    monkeypatch.setattr(claims, "of_both", of_both)
    monkeypatch.setattr(claims, "trained_on", lambda lab, task: [{"label": each} for each in "3213"])
    return SimpleNamespace(recipe=SMOKE, seed=0, module=claims)


def test_a_threshold_is_chosen_on_other_texts_than_those_that_are_reported(lab):
    one = claims.Exit(lab, "kind")
    assert one.threshold == 0.6                                         # texts 1 and 3 leave
    assert one.right.tolist() == [True, True, True, False]
    assert one.cost.tolist() == pytest.approx([0.1, 1.02, 0.1, 1.02])


def values(figure, lab):
    return [value for _, value in figure.of(lab)]


def test_what_a_task_keeps_and_costs_by_hand(lab):
    """right - 0.95 x the MainNet's - 0.05 x whether the label is "3", the most frequent one of training."""
    assert values(claims.keeps("kind"), lab) == pytest.approx([0.05, 0.05, 0.05, -0.05])
    assert values(claims.keeps("kind", ", W8"), lab) == pytest.approx([0.05, 0.05, 0.05, -0.05])
    found = measured(lab, claims.costs("kind"))
    assert found["value"] == pytest.approx(0.56) and found["none"] == 0.7 and found["num"] == 4


def test_how_much_easier_the_surer_half_is_by_hand(lab):
    """The MainNet answers both of the surer half, texts 1 and 3, and one of the others."""
    assert np.mean(values(claims.easier("kind"), lab)) == pytest.approx(0.5)


def test_the_mean_of_the_gaps_is_the_calibration_error(lab):
    for net in ("side", "main"):
        found = measured(lab, claims.calibrated(net, "kind"))
        expected = early_exit.calibration_error(SEEN[f"{net}_confidence"], SEEN[net])
        assert found["value"] == pytest.approx(expected)


def test_both_together_against_each_alone_by_hand(lab):
    """In W8: texts 1 and 3 leave, right; text 2 is right, 4 is not: 3 of 4. Early exit alone has 3 of 4, the
    W8 MainNet alone 2 of 4."""
    assert np.mean(values(claims.as_good("early exit", "kind"), lab)) == pytest.approx(1.0)
    assert np.mean(values(claims.as_good("W8", "kind"), lab)) == pytest.approx(1.5)


# ---- the whole way -----------------------------------------------------------------------------------------

class Small(SimpleNamespace):
    """A lab whose arms are small random nets, and W8 of them."""

    def __init__(self, folder):
        super().__init__(recipe=SMOKE, seed=0, device=CPU, module=claims, folder=folder, steps={})

    def arm(self, name):
        if name.endswith(", W8"):
            return claims.ARMS[name](self)
        path = self.folder / name.split(",")[0].replace(" ", "-")
        if not path.exists():
            own = dict(labels=sorted(claims.LABELS["kind"]), pooling="mean")
            main = make(lambda config: Classifier(ClassifierConfig.of(config, **own)), 3)
            side = make(lambda config: SideNet(SideNetConfig.of(config, **own, sidenet_layer=1,
                                                                sidenet_size=8)), 4)
            torch.nn.init.normal_(side.out.weight, generator=torch.Generator().manual_seed(4))
            side.model.load_state_dict(main.model.state_dict(), strict=False)
            weights.save(path, main if name.startswith("MainNet") else side, tokenizer())
        return path

    def name_of(self, folder):
        return folder.name

    def step(self, name, make, *content):
        key = json.dumps([name, *content])
        if key not in self.steps:
            made = self.folder / f"step-{len(self.steps)}"
            made.mkdir()
            self.steps[key] = json.loads(json.dumps(make(made) or {})) | {"folder": made}
        return self.steps[key]


def test_from_two_small_nets_to_figures_and_a_picture(tmp_path, monkeypatch):
    lab = Small(tmp_path)
    monkeypatch.setattr(claims, "LAYERS", {"kind": (1, 2)})             # the model has no third layer
    monkeypatch.setattr(claims, "BUDGETS", (0.1, 0.65, 1.1))
    one = claims.Exit(lab, "kind")
    rows, other = (claims.evaluated(lab, "kind", split) for split in (None, "preference"))
    assert one.ids.tolist() == [row["id"] for row in rows] and len(rows) == SMOKE.eval_count
    assert not {row["id"] for row in rows} & {row["id"] for row in other}
    for figure in claims.each(("kind",), claims.keeps, claims.costs, claims.easier, *claims.CALIBRATED,
                              *claims.ADDS, claims.faster):
        assert set(measured(lab, figure)) >= {"value", "ci95", "verdict"}
    assert 0.25 < claims.lighter("kind").of(lab)[0] < 0.5
    shown = claims.picture(("kind",), lab)
    [(name, cells)] = shown["rows"]
    assert name == "kind, SideNet on layer 1" and len(cells) == len(shown["columns"]) == 4
    assert cells[0] == (None, False) and cells[1][0] == one.right.mean()
    assert cells[3] == (one.main.mean(), True)


def test_the_seconds_of_a_round_are_those_at_the_threshold_over_those_without_any(tmp_path, monkeypatch):
    """The first round warms up."""
    lab, rounds = Small(tmp_path), iter([[9.0, 1.0]] + [[1.0, 2.0]] * claims.ROUNDS)
    threshold = claims.Exit(lab, "kind").threshold

    def seconds_at(main, side, batches, thresholds, repeats):
        assert thresholds == [threshold, 1.0] and repeats == 1
        return next(rounds)
    monkeypatch.setattr(early_exit, "seconds_at", seconds_at)
    assert claims.faster("kind").of(lab) == [0.5] * claims.ROUNDS
