"""Filtering by likelihood: scores against a slow version, windows and percentiles by hand, the command."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small import CPU, classifier, language_model, on_ranks, program, tokenizer

from aya_min import weights
from aya_min.filtration import (from_medians, highest, holds_word, labels_of, parsed, quality, rank_of,
                                reasons, run, standing, thresholds_of)
from aya_min.filtration_scores import (ANY, batches_of, cut, phrase_ids, phrases_for, read_phrases, score,
                                       windows_of)

PHRASES = {"numbers": {ANY: ["seven, nine, one", "\nthree"]},
           "colours": {"de": ["rot und blau"], "en": ["red"]}}
DOCUMENTS = [("F:1", "What is the opposite of big?", "en"), ("F:2", "drei, vier, rot", "de"),
             ("F:3", "un deux trois " * 12, "fr"), ("F:4", "yes", None), ("F:5", "one " * 40, "en")]


def slow(model, text, phrase, size=None):
    """The largest mean log p of a phrase's tokens after each window: a full forward for each."""
    ids, after, found = tokenizer().encode(text), phrase_ids(tokenizer(), phrase), []
    for part in cut(ids, size or len(ids)):
        before = [tokenizer().bos_id, *part]
        logps = model(torch.tensor([before + after])).log_softmax(-1)[0]                # (T, V)
        places = range(len(before) - 1, len(before) + len(after) - 1)
        found.append(sum(logps[t, i].item() for t, i in zip(places, after)) / len(after))
    return found


def scored(model, documents=DOCUMENTS, phrases=PHRASES, size=None, **more):
    windows = windows_of(documents, tokenizer(), phrases, model.config.max_position_embeddings, size)
    return score(model, windows, len(documents), len(phrases), tokenizer().pad_id, CPU, **more)[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [None, 16])
def test_scores_are_those_of_a_slow_forward_of_each_document_and_phrase_alone(size):
    model = language_model().eval()
    found = scored(model, size=size)
    for d, (_, text, language) in enumerate(DOCUMENTS):
        both = [slow(model, text, phrase, size) for phrase in PHRASES["numbers"][ANY]]
        assert found[d, 0] == pytest.approx(max((x + y) / 2 for x, y in zip(*both)), abs=1e-4)
        own = PHRASES["colours"].get(language)
        assert np.isnan(found[d, 1]) if not own else found[d, 1] == pytest.approx(
            max(slow(model, text, own[0], size)), abs=1e-4)
    assert np.nanstd(found) > 0.1


@pytest.mark.parametrize("architecture", [
    {}, {"model_type": "cohere2", "sliding_window": 8}, {"tie_word_embeddings": False}])
def test_scores_in_batches_are_those_of_documents_alone(architecture):
    model = language_model(**architecture)
    together = scored(model, num_tokens=4096)
    for d, document in enumerate(DOCUMENTS):
        np.testing.assert_allclose(together[d], scored(model, [document], num_tokens=1)[0], atol=1e-5)


def test_ranks_share_the_documents_and_find_the_same_scores():
    alone, both = scored(language_model()), on_ranks(2, lambda: scored(language_model(), num_tokens=64))
    for one in both:
        np.testing.assert_allclose(one, alone, atol=1e-5)


def test_windows_overlap_by_a_quarter_and_the_last_one_ends_with_the_document():
    assert cut(list(range(4)), 4) == [[0, 1, 2, 3]]
    assert cut(list(range(10)), 4) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut(list(range(11)), 4) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [7, 8, 9, 10]]
    assert cut(list(range(3)), 2) == [[0, 1], [1, 2]]


def test_a_long_document_leaves_room_for_the_longest_phrase():
    longest = len(phrase_ids(tokenizer(), "rot und blau"))
    phrases = {"a": {"de": ["rot und blau"], "en": ["red"]}}
    windows = windows_of([("F:1", "one " * 200, "en")], tokenizer(), phrases, 64)
    assert max(len(window.ids) for window in windows) + longest == 64
    with pytest.raises(ValueError, match="leaves 0 of the model's 4 positions for a document; shorten it$"):
        windows_of(DOCUMENTS, tokenizer(), phrases, 4)
    with pytest.raises(ValueError, match="or lower --window 60"):
        windows_of(DOCUMENTS, tokenizer(), phrases, 64, 60)


def test_batches_hold_as_many_padded_tokens_as_they_may():
    windows = windows_of([("", "x " * n, None) for n in (9, 1, 5, 3, 9, 40)], tokenizer(),
                         {"a": {ANY: ["y", "z"]}}, 512)
    batches = batches_of(windows, 48)
    assert sorted(sum(batches, [])) == list(range(6)) and batches[-1] == [5]
    for batch in batches[:-1]:
        assert 2 * len(batch) * max(windows[i].width for i in batch) <= 48
    assert len(batches) < 6


def test_a_phrase_goes_with_its_language_and_its_regions_and_any_with_all():
    by_code = {"pt": ["a"], "pt-BR": ["b"], ANY: ["c"]}
    assert phrases_for(by_code, "pt") == ["c", "a"] and phrases_for(by_code, "pt-BR") == ["c", "b"]
    assert phrases_for(by_code, "pt-PT") == ["c", "a"]
    assert phrases_for(by_code, "fr") == phrases_for(by_code, None) == ["c"]
    assert phrases_for({"de": ["x"]}, None) == []


def test_a_phrase_has_the_same_tokens_after_every_document():
    ids = phrase_ids(tokenizer(), "red")
    assert tokenizer().decode(ids) == " red"
    assert tokenizer().decode(phrase_ids(tokenizer(), "\nred")) == "\nred"
    windows = windows_of([("", text, None) for text in ("a", "b r", "?")], tokenizer(), {"x": {ANY: ["red"]}},
                         512)
    assert {tuple(window.phrases[0][1]) for window in windows} == {tuple(ids)}


# ---- thresholds --------------------------------------------------------------------------------------------

def removed(scores, percentile, groups=None):
    scores = np.array(scores, np.float32).reshape(len(scores), -1)
    groups = groups or [None] * len(scores)
    found = [bool(why) for why in reasons("ab", scores, thresholds_of(scores, percentile, groups))]
    assert found == list(standing(scores, groups) >= percentile / 100 - 1e-9)
    return found


def test_a_percentile_keeps_so_many_percent_and_of_equal_scores_all_or_none():
    assert removed([1, 2, 3, 4], 75) == [False, False, False, True]
    assert removed([1, 2, 3, 4], 50) == [False, False, True, True]
    assert removed([1, 2, 3, 4], 51) == [False, False, False, True]         # the third rank holds 75%
    assert removed([1, 3, 3, 3], 50) == [False] * 4 and removed([1, 3, 3, 3], 25) == [False, True, True, True]
    assert removed([5, 5, 5], 1) == [False] * 3 and removed([1, 2, 3], 100) == [False] * 3
    assert sum(removed(range(1000), 99.9)) == 1 and rank_of(99.9, 1000) == 999


def test_any_axis_removes_and_a_document_without_a_score_is_not_counted():
    nan = np.nan
    assert removed([[9, 0], [0, 9], [1, 1], [2, 2]], 75) == [True, True, False, False]
    # of the second axis's three scores the median is 2
    assert removed([[0, nan], [0, 1], [0, 2], [0, 3]], 50) == [False, False, False, True]
    assert removed([[nan, nan], [1, nan]], 1) == [False, False]


def test_each_language_has_thresholds_of_its_own_when_asked():
    scores, groups = [1, 2, 11, 12], ["en", "en", "ja", "ja"]
    assert removed(scores, 50) == [False, False, True, True]
    assert removed(scores, 50, groups) == [False, True, False, True]


def test_scores_are_counted_from_the_median_of_their_language_when_asked():
    scores = np.array([[1], [1.1], [0.9], [1], [1], [8], [8], [8], [8], [9], [9.5], [np.nan]], np.float32)
    groups = ["en"] * 5 + ["ja"] * 7
    found = from_medians(scores, groups)
    np.testing.assert_allclose(found[:-1, 0], [0, 0.1, -0.1, 0, 0, 0, 0, 0, 0, 1, 1.5], atol=1e-6)
    assert np.isnan(found[-1, 0]) and scores[0, 0] == 1
    # One threshold removes the upper half, which is Japanese; from the medians English has its share.
    assert removed(scores, 40) == [False] * 5 + [True] * 6 + [False]
    assert removed(found, 40) == [False, True] + [False] * 7 + [True] * 2 + [False]


def test_as_many_rows_as_the_list_removes_are_those_of_the_highest_standing():
    assert highest(np.array([0.5, 0.9, 0.5, 0.1]), 2).tolist() == [True, True, False, False]
    assert not highest(np.array([0.5, 0.9]), 0).any()


# ---- the list of words -------------------------------------------------------------------------------------

def test_words_are_whole_words_in_any_case_and_parts_of_scripts_without_spaces():
    keywords = {"bad": {"en": ["Ugly thing"], "de": ["doof"], "zh": ["\u7b28"], "fr": ["b\u00eate"]}}
    texts = [("an ugly thing!", "en", True), ("ugly things", "en", False), ("so DOOF.", "de", True),
             ("doofe", "de", False), ("doof", "en", False), ("\u4f60\u5f88\u7b28\u554a", "zh", True),
             ("be\u0302te", "fr", True), ("doof", None, False)]
    found = holds_word([("", text, code) for text, code, _ in texts], keywords)
    assert found.tolist() == [expected for *_, expected in texts]


def test_precision_and_recall_are_of_labelled_rows():
    found = quality([True, True, True, False, True], [True, False, True, True, None])
    assert (found["right"], found["removed"], found["unwanted"]) == (2, 3, 3)
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(2 / 3)
    assert quality([False], [False])["precision"] is None
    rows = [("F:1", {"bad": 1}), ("F:2", {}), ("F:3", {"bad": False})]
    assert labels_of(rows, "bad") == [True, None, False]
    with pytest.raises(ValueError, match="F:1: 'bad' must be true .unwanted. or false, got 'yes'"):
        labels_of([("F:1", {"bad": "yes"})], "bad")
    with pytest.raises(ValueError, match="--label-key bad: no row has this key"):
        labels_of([("F:1", {})], "bad")


# ---- the command -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, said", [
    ("[]", "not an object"), ("{}", "no axis"), ('{"a": []}', "axis 'a': .. is no list"),
    ('{"": ["x"]}', "no name"), ('{"a": ["x", " "]}', "one of them is empty"),
    ('{"a": "x"}', "no list of texts"),
    ('{"a": {"klingonish": ["x"]}}', "unknown language 'klingonish'"), ('{"a": {}}', "no phrases"),
    ('{"a": {"de": ["x"], "German": ["y"]}}', "is de, which is there already"),
    ('{"a": ["x", "x"]}', "'x' is there twice"), ('{"a": ["x"], "a": ["y"]}', "occurs twice")])
def test_triggers_that_cannot_be_meant_are_refused(tmp_path, text, said):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_phrases(tmp_path / "t.json")


LINES = ['{"text": "one, two, three", "language": "English", "bad": true}',
         '  {"language":"de",  "text": "rot, gr\u00fcn", "bad": false}\r',
         '', '{"prompt": "What is red?", "completion": "a colour", "language": "en", "n": 1.50, "bad": 0}',
         '{"text": "vier", "language": "de"}']


@pytest.fixture
def place(tmp_path):
    weights.save(tmp_path / "model", language_model(), tokenizer())
    weights.save(tmp_path / "classifier", classifier(), tokenizer())
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(LINES).encode())
    for name, value in [("triggers", {"a": ["seven"], "b": {"de": ["blau", "\nrot"]}}),
                        ("other", {"a": ["nine"]}), ("fr", {"a": {"fr": ["sept"]}}),
                        ("words", {"a": ["three", "vier"]})]:
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def flags_of(place, out="kept", **changed):
    """The command line in this folder, with these flags changed or added."""
    files = {"model": "model", "data": "data.jsonl", "triggers": "triggers.json", "out": f"{out}.jsonl",
             "removed": f"{out}-removed.jsonl"}
    other = {name: changed.pop(name) for name in ("percentile", "label_key", "window", "dtype")
             if name in changed}
    given = {name: str(place / value) for name, value in (files | changed).items()}
    given = {"percentile": "60"} | given | other
    return [each for name, value in given.items() for each in (f"--{name.replace('_', '-')}", value)]


def filtered(place, **changed):
    run(parsed(flags_of(place, **changed)), CPU)


def test_the_command_keeps_lines_as_they_came_and_says_why_others_went(place):
    done = program("-m", "aya_min.filtration", *flags_of(
        place, label_key="bad", keywords="words.json", scores="s.safetensors"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in LINES if line]
    scores = load_file(place / "s.safetensors")["scores"]
    because = reasons("ab", scores, thresholds_of(scores, 60.0, [None] * 4))
    assert any(because) and not all(because)
    kept = "".join(line + "\n" for line, why in zip(lines, because) if not why)
    assert (place / "kept.jsonl").read_bytes().decode() == kept
    gone = [json.loads(line) for line in (place / "kept-removed.jsonl").read_text().splitlines()]
    assert gone == [{**json.loads(line), "removed_because": why} for line, why in zip(lines, because) if why]
    assert "4 of 4 documents scored, in 4 windows and" in done.stderr and " documents and " in done.stderr
    said = done.stdout.splitlines()
    assert [line.split()[:2] for line in said[1:4]] == [["all", "4"], ["de", "2"], ["en", "2"]]
    assert said[4].startswith("axis a: 1 of 4 scored rows are over the threshold")
    assert said[5].startswith("axis b: 0 of 2 scored rows")         # at rank 2 of 2
    assert said[6].startswith("the 2 rows of highest scores")


def test_a_file_of_scores_serves_another_percentile_and_no_other_model_data_or_phrases(place, capfd):
    filtered(place, scores="s.safetensors")
    assert "4 windows and" in capfd.readouterr().err
    filtered(place, scores="s.safetensors", percentile="100", out="all")
    said = capfd.readouterr().err
    assert "not computed again" in said and "windows" not in said
    assert (place / "all-removed.jsonl").read_text() == ""
    (place / "more.jsonl").write_text("\n".join(LINES[:2]) + "\n")
    weights.save(place / "another", language_model(seed=1), tokenizer())
    for changed, said in [({"data": "more.jsonl"}, "data"), ({"triggers": "other.json"}, "triggers"),
                          ({"model": "another"}, "model"), ({"window": "9"}, "window"),
                          ({"dtype": "bfloat16", "triggers": "other.json"}, "triggers and dtype")]:
        with pytest.raises(ValueError, match=f"s.safetensors: scores of another {said};"):
            filtered(place, scores="s.safetensors", out="again", **changed)
    (place / "s.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match="not a file of scores, or damaged"):
        filtered(place, scores="s.safetensors", out="again")
    assert not (place / "again.jsonl").exists()


@pytest.mark.parametrize("changed, said", [
    ({"model": "classifier"}, "classifier: a classifier; give a language model"),
    ({"out": "data"}, "data.jsonl exists; give a new file"),
    ({"removed": "no/r.jsonl"}, "its folder does not exist"),
    ({"removed": "kept.jsonl"}, "are one file; give each a name"),
    ({"triggers": "fr.json"}, "no phrase goes with any document of .*, whose languages are de en; write"),
    ({"label_key": "worse"}, "no row has this key"),
    ({"scores": "no/s.safetensors"}, "s.safetensors: its folder does not exist"),
    ({"window": "512"}, "or lower --window 512"),
    ({"data": "again.jsonl"}, "again.jsonl:1: the row has 'removed_because' already")])
def test_a_mistake_is_one_line_and_nothing_is_written(place, changed, said):
    (place / "again.jsonl").write_text(json.dumps({"text": "x", "removed_because": []}) + "\n")
    before = sorted(place.iterdir())
    with pytest.raises(ValueError, match=said) as error:
        filtered(place, **changed)
    assert "\n" not in str(error.value) and sorted(place.iterdir()) == before


def test_a_mistake_ends_the_command_with_exit_code_2(place, capsys):
    done = program("-m", "aya_min.filtration", *flags_of(place, data="none.jsonl"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "none.jsonl: cannot be read" in done.stderr
    with pytest.raises(SystemExit) as ended:
        parsed(flags_of(place, percentile="0"))
    assert ended.value.code == 2
    assert "--percentile: '0' must be a finite number above 0" in capsys.readouterr().err
