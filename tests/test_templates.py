"""Templates: what the files hold, what rows become of structured ones, and what is refused with its place."""

import json
from pathlib import Path

import pytest

from aya_min import language_id
from aya_min.files import read_json
from aya_min.languages import LANGUAGES, language_code
from aya_min.rows import conversation_of, read_jsonl
from aya_min.templates import (FIELD, FOLDER, TASKS, apply_templates, examples_of, fill, main, name_labels,
                               published, read_labels, read_templates)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CODES = [*LANGUAGES, "yo"]
EN = {"id": "e", "prompt": "Q: {question}", "answer": "{answer}"}


@pytest.fixture
def convert(tmp_path):
    def convert(rows, *flags, name="rows.jsonl"):
        """The rows that the command makes of these."""
        path, out = tmp_path / name, tmp_path / f"out-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        main([str(path), "--out", str(out), *map(str, flags)])
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    return convert


# the files that a speaker can mend

@pytest.mark.parametrize("task", TASKS)
def test_each_language_has_three_templates_a_task_and_all_ids_differ(task):
    """`read_templates` checks the fields and the ids."""
    templates = read_templates(FOLDER / f"{task}.json", task)
    assert list(templates) == CODES
    assert all(len({each["prompt"] for each in some}) == len(some) >= 3 for some in templates.values())


def test_a_question_has_three_templates_with_a_context_and_two_without():
    for some in read_templates(FOLDER / "qa.json", "qa").values():
        assert sum("{context}" in each["prompt"] for each in some) == 3 and len(some) == 5


@pytest.mark.parametrize("code", CODES)
def test_templates_are_in_their_language_and_its_script(code):
    """language_id has no profile of Yoruba; a task alone has too few words."""
    script, found = LANGUAGES[code].script if code != "yo" else "Latin", ""
    for task in TASKS:
        for template in read_templates(FOLDER / f"{task}.json", task)[code]:
            text = FIELD.sub(" ", f"{template['prompt']} {template['answer']}\n")
            scripts = {script for _, script in language_id.words_of(text)}
            assert scripts <= ({"Han", "Kana"} if code == "ja" else {script}), template
            found += text
    assert code == "yo" or language_id.is_in_language(found, code), language_id.identify(found)


def test_the_labels_have_names_of_their_own_in_every_language_but_english():
    names = read_labels(FOLDER / "labels.json")
    assert [*names] == [code for code in CODES if code != "en"]
    for code, some in names.items():
        assert some.keys() == names["ar"].keys() and len(set(some.values())) == 9, code
        if code != "yo":
            scripts = {script for _, script in language_id.words_of(" ".join(some.values()))}
            assert scripts <= ({"Han", "Kana"} if code == "ja" else {LANGUAGES[code].script})


# rows

def test_a_row_comes_out_with_the_collections_fields_by_hand(convert):
    rows = convert([{"id": 7, "language": "Turkish", "question": "2 + 2?", "answer": 4, "split": "test"}],
                   "--task", "qa")
    template = {each["id"]: each for each in read_json(FOLDER / "qa.json")["tr"]}[rows[0]["template_id"]]
    assert rows == [{"id": "7", "inputs": template["prompt"].replace("{question}", "2 + 2?"), "targets": "4",
                     "dataset_name": "rows", "task_type": "question-answering", "template_id": template["id"],
                     "language": "tur", "script": "Latn", "split": "test"}]


def test_a_context_is_shown_and_a_row_without_one_gets_a_template_without(convert):
    rows = convert([{"id": n, "language": "el", "question": "ποιος;", "answer": "α", "context": text}
                    for n in range(40) for text in ("", "κείμενο")], "--task", "qa")
    shown = ["κείμενο" in row["inputs"] for row in rows]
    assert shown == [False, True] * 40 and len({row["template_id"] for row in rows}) == 5


def test_labels_are_named_in_the_language_and_those_without_a_name_are_kept_and_told(convert, capsys):
    rows = [{"language": "fr", "text": text, "label": label}
            for text, label in (("t", "health"), ("u", "x-y"), ("v", "santé"))]
    rows.append({"language": "ar", "text": "w", "label": "travel"})
    found = convert(rows, "--task", "classification")
    assert [row["targets"].removeprefix("Catégorie : ").removeprefix("الفئة: ") for row in found] == [
        "santé", "x-y", "santé", "سفر"]
    assert all("santé, x-y" in row["inputs"] for row in found[:3])
    assert "labels kept as they are in fr: x-y\n" in capsys.readouterr().out


def test_parallel_texts_are_each_a_target_once_in_a_prompt_of_its_language(convert):
    texts = {"en": "A dog.", "tr": "Bir köpek.", "ja": "犬。"}
    rows = [{"id": "s", "language": code, "text": text} for code, text in texts.items()]
    found = convert([*rows, {"id": "alone", "language": "en", "text": "No pair."}], "--task", "translation")
    assert [row["targets"] for row in found] == [*texts.values()]
    for row, code in zip(found, texts):
        other = row["id"].removeprefix("s/").removesuffix(f"-{code}")
        assert other in texts.keys() - {code} and texts[other] in row["inputs"]
        assert row["template_id"].startswith(f"translation-{code}-")
    found = convert(rows, "--task", "translation", "--source", "eng")
    assert [row["id"] for row in found] == ["s/en-tr", "s/en-ja"]
    found = convert(rows, "--task", "translation", "--languages", "ja", "tr", "--source", "ja")
    assert [row["id"] for row in found] == ["s/ja-tr"]


def test_a_source_and_a_target_are_a_translation_into_the_rows_language(convert):
    found = convert([{"source": "A dog.", "target": "Ajá kan.", "language": "yor"}], "--task", "translation")
    assert "A dog." in found[0]["inputs"] and "Yorùbá" in found[0]["inputs"]
    assert found[0]["targets"] == "Ajá kan."


def test_a_summarys_text_is_its_document_and_braces_in_texts_stay(convert):
    for key in ("document", "text"):
        row, = convert([{key: "f{x} {summary} {0}", "summary": "{document}"}], "--task", "summarization",
                       "--language", "de")
        assert "f{x} {summary} {0}" in row["inputs"] and row["targets"] == "{document}"


def test_a_regional_variety_has_the_templates_of_its_language_and_keeps_its_code():
    templates = read_templates(FOLDER / "qa.json", "qa")
    example = {"where": "", "id": "1", "language": "pt-BR", "fields": {"question": "q", "answer": "a"}}
    row, = apply_templates([example], templates, "qa")
    assert row["template_id"].startswith("qa-pt") and row["language"] == "por"


def test_the_seed_decides_the_template_and_other_rows_do_not():
    lines = [(f"f:{n}", {"id": n, "language": "en", "question": f"q{n}", "answer": "a"}) for n in range(60)]
    templates = read_templates(FOLDER / "qa.json", "qa")
    first, again, other = (apply_templates(examples_of(lines, "qa")[0], templates, "qa", seed)
                           for seed in (0, 0, 1))
    assert first == again != other
    assert apply_templates(examples_of(lines[30:], "qa")[0], templates, "qa") == first[30:]


def test_a_published_code_is_read_as_the_same_language():
    assert [published(code) for code in ("ar", "fa", "zh", "zh-Hant", "sr-Latn", "yo", "ceb")] == [
        ("arb", "Arab"), ("pes", "Arab"), ("zho", "Hans"), ("zho", "Hant"), ("srp", "Latn"), ("yor", "Latn"),
        ("ceb", "Latn")]
    assert all(language_code("_".join(published(code))) == code for code in CODES)


def test_labels_are_separated_as_the_language_writes_them():
    examples = [{"language": "zh", "fields": {"label": label}} for label in ("health", "travel")]
    assert name_labels(examples, read_labels(FOLDER / "labels.json")) == {}
    assert examples[0]["fields"] == {"label": "健康", "labels": "健康、旅游"}
    assert fill("{labels}?", examples[0]["fields"]) == "健康、旅游?"


def test_english_labels_that_nothing_names_are_told(convert, capsys):
    convert([{"text": "a", "label": "sports"}, {"text": "b", "label": "0"}], "--task", "classification",
            "--language", "en")
    assert "labels kept as they are in en: 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("source", [(), ("--source", "de")])
def test_parallel_texts_without_a_pair_are_counted(convert, capsys, source):
    rows = [{"id": 1, "language": "en", "text": "a"}, {"id": 1, "language": "de", "text": "b"},
            {"id": 2, "language": "de", "text": "c"}, {"id": 3, "language": "en", "text": "d"},
            {"id": 3, "language": "tr", "text": "e"}]
    made = convert(rows, "--task", "translation", *source)
    assert len(made) == (1 if source else 4)
    assert f"left out: {2 if source else 1} ids of parallel texts" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("task, name", [("classification", "classification.jsonl"),
                                        ("translation", "parallel.jsonl"), ("qa", "math.jsonl")])
def test_real_files_become_rows_that_sft_reads(task, name, tmp_path):
    main([str(SHARED / name), "--task", task, "--out", str(tmp_path / "out.jsonl")])
    rows = read_jsonl(tmp_path / "out.jsonl")
    count = len((SHARED / name).read_bytes().splitlines())
    assert len(rows) == count and len({row["id"] + row["language"] for _, row in rows}) == count
    assert all(len(conversation_of(row, where)[0]) == 2 and row["language"] in CODES for where, row in rows)


# what is refused

QA = {"language": "en", "question": "q", "answer": "a"}


@pytest.mark.parametrize("rows, flags, message", [
    ([QA, {"language": "en", "question": "q"}], [],
     "rows.jsonl:2: qa needs 'answer', a text; got keys language question"),
    ([QA | {"answer": ["a"]}], [], "rows.jsonl:1: qa needs 'answer', a text; got a list"),
    ([QA | {"answer": True}], [], "got a bool"), ([QA | {"question": "  "}], [], "qa needs 'question'"),
    ([{"question": "q", "answer": "a"}], [], "rows.jsonl:1: the row has no language"),
    ([QA | {"language": "sw"}], [], "rows.jsonl:1: no template in sw; give --templates"),
    ([QA | {"language": "qq"}], [], "unknown language 'qq'"), ([QA], ["--languages", "fr"], "no row is left"),
    ([QA], ["--source", "en"], "--source is for --task translation"),
    ([QA], ["--labels", "l.json"], "--labels is for --task classification"),
    ([QA], ["--templates", "none.json"], "none.json: cannot be read"),
    ([{"id": 1, "language": "en", "text": "a"}] * 2, ["--task", "translation"],
     "rows.jsonl:2: parallel texts need an 'id' that they share, each in another language; two are in en"),
    ([{"language": "en", "text": "a"}], ["--task", "translation"], "there is none"),
    ([{"id": 1, "language": "en", "text": "a"}], ["--task", "translation"], "no row is left"),
    ([{"text": "a", "language": "en"}], ["--task", "summarization"],
     "rows.jsonl:1: summarization needs 'summary'"),
    ([{"text": "a", "language": "en", "label": ""}], ["--task", "classification"], "needs 'label'"),
])
def test_what_cannot_be_used_is_named_with_its_place(rows, flags, message, convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as fault:
        convert(rows, *(flags if "--task" in flags else ["--task", "qa", *flags]))
    assert message in str(fault.value) and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("templates, message", [
    ({"en": [EN | {"prompt": "Q: {qestion}"}]}, "en[0]: 'e': the prompt has {qestion}; it may have {context} "
     "{question}"),
    ({"en": [EN, EN | {"id": "f", "prompt": "Q?"}]}, "en[1]: 'f': the prompt has no {question}; add it"),
    ({"en": [EN | {"prompt": "{question} {answer}"}]}, "the prompt has {answer}"),
    ({"en": [EN | {"answer": "yes"}]}, "the answer has no {answer}"),
    ({"en": [EN], "de": [EN]}, "de[0]: the id 'e' occurs twice"),
    ({"en": []}, "en: needs a list of templates"),
    ({"en": [{"id": "e", "prompt": "{question}"}]}, "en[0]: a template is {id, prompt, answer}"),
    ({"en": [EN | {"id": 3}]}, "three texts"), ({"xx": [EN]}, "unknown language 'xx'"), ({}, "no language"),
    ({"en": [EN], "eng": [EN]}, "two entries for language 'eng'"), ([EN], "a JSON list, not an object"),
    ({"en": [EN | {"prompt": "{context} {question}"}]},
     "rows.jsonl:1: the templates in en all need a context"),
])
def test_a_wrong_template_is_named_with_its_place(templates, message, convert, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(templates))
    with pytest.raises(ValueError) as fault:
        convert([QA], "--task", "qa", "--templates", tmp_path / "t.json")
    assert message in str(fault.value) and not list(tmp_path.glob("out*"))


def test_own_templates_and_labels_replace_those_of_the_project(convert, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"sw": [{"id": "a", "prompt": "{text}: {labels}?",
                                                         "answer": "ni {label}"}]}))
    (tmp_path / "l.json").write_text(json.dumps({"swa": {"health": "afya"}}))
    row, = convert([{"language": "sw", "text": "t", "label": "health"}], "--task", "classification",
                   "--templates", tmp_path / "t.json", "--labels", tmp_path / "l.json",
                   "--dataset-name", "mine")
    assert (row["inputs"], row["targets"], row["dataset_name"]) == ("t: afya?", "ni afya", "mine")
