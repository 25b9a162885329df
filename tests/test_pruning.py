"""Pruning: what is planted is found and nothing else goes; each measure against a slow version or by hand."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from small import program

from aya_min.pruning import main
from aya_min.pruning_checks import GRAM, Prompts, edit_distance, edits, too_few_approvals, wrong_language
from aya_min.pruning_duplicates import (HASHES, SHINGLE, bands, jaccard, minima, near_duplicates, normalised,
                                        shingles)

EVAL = "When did the first railway across the Andes open, and which two cities did it connect at that time?"
WORDS = [a + b + c for a in "bdklmnprst" for b in "aeiou" for c in ("", "n", "sh", "rt")]


def sentence(rng, words=WORDS, count=30):
    return " ".join(rng.choice(words) for _ in range(count))


def row_of(prompt, answer="An answer.", **more):
    return {"inputs": prompt, "targets": f"{answer} {prompt[::-1][:60]}", "language": "en", **more}


@pytest.fixture
def prune(tmp_path):
    def prune(rows, *flags, **others):
        """(rows kept, rows removed) of a file of these rows; others: further files by name."""
        for name, some in {"a": rows, **others}.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        out, removed = tmp_path / "kept.jsonl", tmp_path / "removed.jsonl"
        for path in (out, removed):
            path.unlink(missing_ok=True)
        main([str(tmp_path / "a.jsonl"), "--out", str(out), "--removed", str(removed), *map(str, flags)])
        return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                for path in (out, removed)]

    return prune


def why(removed):
    return [(row["removed_because"], row["removed_from"].rpartition(":")[2],
             row.get("duplicate_of", "").rpartition("/")[2]) for row in removed]


# shingles, minima, bands

def test_the_jaccard_similarity_is_that_of_sets_of_five_characters():
    """abcdefgh has abcde bcdef cdefg defgh; bcdefghi has the last three of them and efghi: 3 of 5."""
    assert jaccard(shingles("abcdefgh"), shingles("bcdefghi")) == 3 / 5
    assert jaccard(shingles("aaaaaaaa"), shingles("aaaaa")) == 1 and len(shingles("ab")) == SHINGLE - 4
    assert jaccard(shingles("ab"), shingles("ba")) == 0
    assert (shingles("A  Dog\n runs") == shingles("a dog runs")).all()


def slow_set(text):
    text = normalised(text)
    return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}


@pytest.mark.parametrize("letters", ["abcdef", "猫狗鸟鱼马牛", "กขคงจฉ", "аб вг", "🙂é\u0301x1."])
def test_shingles_are_as_many_and_shared_as_slow_sets_in_any_script(letters):
    rng = random.Random(0)
    one, other = ("".join(rng.choice(letters) for _ in range(300)) for _ in range(2))
    sets = slow_set(one), slow_set(other)
    assert [len(shingles(one)), len(shingles(other))] == [*map(len, sets)]
    assert jaccard(shingles(one), shingles(other)) == len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_share_of_equal_minima_estimates_the_jaccard_similarity():
    """Over 200 pairs the mean error must vanish and each error stay within four standard deviations."""
    rng, errors = random.Random(1), []
    for _ in range(200):
        words = [rng.choice(WORDS) for _ in range(60)]
        kept = rng.randrange(20, 60)
        one, other = shingles(" ".join(words)), shingles(" ".join(words[:kept] + rng.choices(WORDS, k=9)))
        exact = jaccard(one, other)
        estimate = (minima(one) == minima(other)).mean()
        assert abs(estimate - exact) <= 4.5 * (exact * (1 - exact) / HASHES) ** 0.5 + 1e-9
        errors.append(estimate - exact)
    assert abs(np.mean(errors)) < 0.01


def test_the_bands_by_hand():
    """At 0.8, 25 bands of 5 miss a pair with (1 - 0.32768)^25 = 4.9e-5, 21 of 6 with 1.7e-3."""
    assert bands(0.8) == (25, 5) and bands(1.0) == (1, HASHES)
    assert (1 - 0.8**5) ** 25 < 1e-4 < (1 - 0.8**6) ** 21


def slow_near_duplicates(texts, groups, threshold):
    stay, gone = [], {}
    for row, text in enumerate(texts):
        for first in stay:
            a, b = slow_set(texts[first]), slow_set(text)
            if groups[first] == groups[row] and len(a & b) / len(a | b) >= threshold:
                gone[row] = first
                break
        else:
            stay.append(row)
    return gone


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("script", ["spaced", "unspaced"])
def test_near_duplicates_are_those_that_all_pairs_compared_give(threshold, script):
    """60 texts of which each has up to four altered copies, in two groups."""
    rng, texts = random.Random(2), []
    for _ in range(60):
        words = [rng.choice(WORDS) if script == "spaced" else chr(rng.randrange(0x4E00, 0x5E00))
                 for _ in range(40 if script == "spaced" else 80)]
        for _ in range(rng.randrange(1, 5)):
            copy = list(words)
            for _ in range(rng.choice([0, 0, 1, 2, 5])):
                copy[rng.randrange(len(copy))] = rng.choice(words)
            texts.append((" " if script == "spaced" else "").join(copy))
    rng.shuffle(texts)
    groups = np.array([rng.randrange(2) for _ in texts])
    sets = [*map(shingles, texts)]
    found = near_duplicates(np.array([*map(minima, sets)]), groups, threshold, sets.__getitem__)
    assert {row: first for row, (first, _) in found.items()} == slow_near_duplicates(texts, groups, threshold)
    assert all(similarity == jaccard(sets[row], sets[first]) >= threshold
               for row, (first, similarity) in found.items())
    assert threshold == 1.0 or len(found) > 5


# edits, approvals

def slow_distance(one, other):
    table = [[i + j if not i * j else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            table[i][j] = min(table[i - 1][j - 1] + (one[i - 1] != other[j - 1]), table[i - 1][j] + 1,
                              table[i][j - 1] + 1)
    return table[-1][-1]


def test_the_edit_distance_by_hand():
    assert [edit_distance(one, other, 9) for one, other in (
        ("kitten", "sitting"), ("", ""), ("", "abc"), ("ab", "ba"), ("猫が好き", "犬が好きだ"))] == [3, 0, 3, 2, 2]
    assert edit_distance("kitten", "sitting", 3) == 3 and edit_distance("kitten", "sitting", 2) == 2


def test_the_edit_distance_is_that_of_the_whole_table_up_to_its_limit():
    rng = random.Random(3)
    for _ in range(1500):
        one, other = ("".join(rng.choice("ab") for _ in range(rng.randrange(9))) for _ in range(2))
        limit = rng.randrange(1, 10)
        assert edit_distance(one, other, limit) == min(limit, slow_distance(one, other)), (one, other, limit)


def test_the_edit_distance_of_long_texts_takes_no_time():
    text = sentence(random.Random(0), count=20_000)
    assert edit_distance("a" + text + "b", "c" + text + "d", 5) == 2
    assert edit_distance("x" * 50_000 + "y", "z" * 50_000, 5) == 5


def test_re_annotations_with_few_edits_go_and_original_annotations_stay(prune):
    old = {"language": "en", "inputs": "What is the capital?", "targets": "It is Ankara."}
    of = {"original_inputs": old["inputs"], "original_targets": old["targets"],
          "annotation_type": "re-annotations"}
    rows = [old | {"annotation_type": "original-annotations"},
            old | of | {"targets": "It is Ankara!!"},                       # 2 edits
            old | of | {"targets": "It's Ankara, now."},                    # ' for " i", ", now": 2 + 5
            old | of | {"inputs": "What's a capital?", "targets": "It is Ankara!"}]     # 2 + 3 and 1
    kept, removed = prune(rows, "--edit-distance", 5)
    assert kept == [rows[0], rows[2], rows[3]]
    assert why(removed) == [("few edits", "2", "")] and removed[0]["details"] == "edit distance 2"


def test_what_cannot_be_compared_or_counted_is_refused_with_its_place():
    row = {"inputs": "a", "targets": "b", "annotation_type": "re-annotations"}
    with pytest.raises(ValueError, match="f:1: a re-annotation without its original; .* the published Aya"):
        edits(row, "f:1", 5)
    with pytest.raises(ValueError, match="f:1: --edit-distance compares original_targets with targets"):
        edits({"inputs": "a", "original_targets": "b"}, "f:1", 5)
    for wrong in (None, True, -1, "3", 1.5):
        with pytest.raises(ValueError, match="f:2: --approvals needs 'approvals', a whole number"):
            too_few_approvals({"approvals": wrong}, "f:2", 2)
    assert too_few_approvals({"approvals": 1}, "", 2) == "1 approvals"
    assert too_few_approvals({"approvals": 2}, "", 2) is None


# language

@pytest.mark.parametrize("row, said", [
    ({"language": "de", "targets": "This is the answer to the question that you asked."}, "in en, not in de"),
    ({"language": "ja", "targets": "这个问题的答案很简单，因为我们已经知道了。"}, "in zh, not in ja"),
    ({"language": "en", "targets": "This is the answer to the question that you asked."}, None),
    ({"language": "pt-BR", "targets": "Esta é a resposta para a pergunta que você fez."}, None),
    ({"language": "de", "targets": "Siehe:\n```\nfor the row in all of the rows that we have\n```"}, None),
    ({"language": "de", "targets": "New York Times"}, None),
    ({"language": "xh", "targets": "This is the answer to the question that you asked."}, None),
    ({"targets": "This is the answer to the question that you asked."}, None)])
def test_only_an_answer_that_is_clearly_in_another_language_is_wrong(row, said):
    row = {"inputs": "Diese Frage ist deutsch und lang genug?"} | row
    assert wrong_language(row, "", Counter()) == said


def test_of_a_pair_the_chosen_answer_is_judged(prune):
    english, german = "This is the answer that you asked for.", "Das ist die Antwort auf deine Frage."
    pair = {"prompt": "Frage?", "language": "de"}
    kept, removed = prune([pair | {"chosen": german, "rejected": english},
                           pair | {"chosen": english, "rejected": german}], "--wrong-language")
    assert len(kept) == 1 and why(removed) == [("wrong language", "2", "")]


# evaluation prompts

def test_thirteen_words_in_sequence_are_contamination_and_twelve_are_not(prune, tmp_path):
    rng = random.Random(4)
    prompt = sentence(rng, count=40).split()
    rows = [row_of(" ".join(["so", *prompt[5 : 5 + size], "well"]), answer=sentence(rng))
            for size in (GRAM - 1, GRAM)]
    kept, removed = prune(rows, "--against", tmp_path / "eval.jsonl",
                          eval=[{"inputs": "x"}, {"prompt": " ".join(prompt)}])
    assert kept == rows[:1] and why(removed) == [("contaminated", "2", "eval.jsonl:2")]


@pytest.mark.parametrize("prompt, text", [
    ("今天天气很好，我们一起去公园散步吧。", "他说今天天气很好我们一起去公园走走"),
    ("One two three four five six seven eight nine ten eleven twelve thirteen.",
     "And: ONE-two, three (four) five six seven eight nine ten 'eleven' twelve\nthirteen fourteen")])
def test_contamination_is_by_characters_without_spaces_and_regardless_of_case(prompt, text, tmp_path):
    """The Chinese texts share 13 characters; without the last shared one nothing is found."""
    (tmp_path / "e.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    prompts = Prompts([tmp_path / "e.jsonl"])
    assert prompts.seen_in(["other", text])[1] == f"{tmp_path}/e.jsonl:1"
    assert prompts.seen_in([text.replace("园", "路").replace("thirteen", "")]) is None


def test_a_short_prompt_is_found_only_as_a_whole_text(tmp_path):
    (tmp_path / "e.jsonl").write_text(json.dumps({"prompt": "Who are you?", "targets": "I am."}) + "\n")
    prompts = Prompts([tmp_path / "e.jsonl"])
    assert prompts.seen_in(["who are YOU"]) == ("the whole prompt", f"{tmp_path}/e.jsonl:1")
    assert prompts.seen_in(["Tell me, who are you?", "I am."]) is None


def test_answers_of_next_to_nothing_go(prune):
    rows = [{**row_of("Who is there, at this hour?"), "targets": text} for text in ("I", "It is me.")]
    kept, removed = prune(rows, "--min-answer", 3)
    assert [row["targets"] for row in kept] == ["It is me."]
    assert [(row["removed_because"], row["details"]) for row in removed] == [
        ("too short", "an answer of 1 characters")]


def test_an_empty_answer_is_short(prune):
    """It was left out of the row's texts, so that the prompt was taken for the answer."""
    row = {"prompt": "Who is there?", "completion": "", "language": "en"}
    kept, removed = prune([row], "--min-answer", 1)
    assert not kept and removed[0]["details"] == "an answer of 0 characters"


def test_a_re_annotation_under_other_names_is_named(prune):
    row = {"prompt": "a", "completion": "b", "original_inputs": "c", "language": "en"}
    with pytest.raises(ValueError, match="original_inputs with inputs, which the row lacks"):
        prune([row], "--edit-distance", 5)


# the command

def test_what_is_planted_goes_and_all_else_stays_byte_for_byte_in_its_order(tmp_path, capsys):
    rng = random.Random(5)
    rows = [row_of(sentence(rng), answer=sentence(rng)) for _ in range(300)]
    chinese = ["".join(chr(rng.randrange(0x4E00, 0x6E00)) for _ in range(60)) for _ in range(50)]
    rows += [row_of(text, answer=text[::-1], language="zh") for text in chinese]
    lines = [json.dumps(row, ensure_ascii=bool(i % 2)) + " " * (i % 3) for i, row in enumerate(rows)]
    near = dict(rows[7], inputs=rows[7]["inputs"] + " so")
    planted = {20: rows[3] | {"inputs": "  " + rows[3]["inputs"].upper()}, 90: near,
               200: rows[305] | {"targets": rows[305]["targets"][:-1]},
               330: row_of("q " + rows[1]["inputs"], answer=sentence(rng), language="French"),
               351: row_of("Seen before: " + EVAL, answer=sentence(rng))}
    same_in_french = json.dumps(rows[5] | {"language": "fr"})
    for place, row in planted.items():
        lines.insert(place, json.dumps(row))
    data = "\r\n".join([*lines, same_in_french]).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + data)
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[11]) + "\n")
    (tmp_path / "e.jsonl").write_text(json.dumps({"question_id": "1", "prompt": EVAL}) + "\n")
    main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "kept.jsonl"),
          "--removed", str(tmp_path / "removed.jsonl"), "--duplicates", "0.8",
          "--against", str(tmp_path / "e.jsonl")])
    stays = [line.strip() for i, line in enumerate([*lines, same_in_french]) if i not in (20, 90, 308, 351)]
    assert (tmp_path / "kept.jsonl").read_bytes().decode() == "".join(line + "\n" for line in stays)
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert why(removed) == [
        ("duplicate", "21", "a.jsonl:4"), ("near duplicate", "91", "a.jsonl:8"),
        ("near duplicate", "309", "a.jsonl:201"), ("contaminated", "352", "e.jsonl:1"),
        ("duplicate", "1", "a.jsonl:12")]
    assert {key: removed[1][key] for key in near} == near
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == "language rows kept contaminated duplicate near duplicate".split()
    assert table[1:5] == [["en", "304", "300", "1", "2", "1"], ["zh", "51", "50", "0", "0", "1"],
                          ["fr", "2", "2", "0", "0", "0"], ["all", "357", "352", "1", "2", "2"]]


def test_the_copy_of_a_near_duplicate_is_a_near_duplicate_of_the_row_that_stays(prune):
    text = sentence(random.Random(6))
    kept, removed = prune([{"text": text + end, "language": "en"} for end in ("", " so", " so")],
                          "--duplicates", 0.8)
    assert len(kept) == 1 and why(removed) == [("near duplicate", "2", "a.jsonl:1"),
                                               ("near duplicate", "3", "a.jsonl:1")]


def test_a_row_that_went_for_another_reason_is_no_first(prune):
    rows = [row_of("the same prompt", approvals=n) for n in (0, 2, 3)]
    kept, removed = prune(rows, "--approvals", 2)
    assert kept == rows[1:2] and why(removed) == [("few approvals", "1", ""), ("duplicate", "3", "a.jsonl:2")]


def test_lengths_count_the_characters_of_prompt_and_answer_and_small_languages_go_last(prune):
    rows = [{"prompt": "ab", "completion": "c" * n, "language": code}
            for n, code in ((1, "en"), (2, "en"), (3, "en"), (4, "en"), (2, "yo"), (9, "yo"))]
    kept, removed = prune(rows, "--min-length", 4, "--max-length", 5)
    assert kept == [rows[1], rows[2], rows[4]] and len(removed) == 3
    kept, removed = prune(rows, "--min-length", 4, "--max-length", 5, "--least-rows", 2)
    assert kept == rows[1:3] and [row["removed_because"] for row in removed] == [
        "too short", "too long", "small language", "too long"]


def test_columns_rename_for_the_reading_and_what_is_written_keeps_its_keys(prune, tmp_path):
    rows = [{"frage": sentence(random.Random(i)), "antwort": "b", "n": i} for i in range(3)]
    rows += [{**rows[0], "n": 3}, {**rows[1], "frage": rows[1]["frage"] + " x", "n": 4}]
    with pytest.raises(ValueError, match="no prompt in keys .*--columns OURS=THEIRS renames"):
        prune(rows)
    columns = "--columns", "prompt=frage", "completion=antwort"
    kept, removed = prune(rows, *columns, "--duplicates", "0.8", "--against", tmp_path / "e.jsonl",
                          e=[{"frage": rows[2]["frage"]}])
    assert kept == rows[:2] and all("frage" in row for row in removed)
    assert why(removed) == [("contaminated", "3", "e.jsonl:1"), ("duplicate", "4", "a.jsonl:1"),
                            ("near duplicate", "5", "a.jsonl:2")]


def test_all_shapes_of_rows_are_pruned(prune):
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    rows = [{"messages": turns}, {"text": "a text"}, {"prompt": "only a prompt"},
            {"prompt": "p", "chosen": "c", "rejected": "r"}, {"text": "a text", "label": "sports"}]
    kept, removed = prune(rows + rows, "--duplicates", 0.9)
    assert kept == rows[:4] and [row["removed_because"] for row in removed] == ["duplicate"] * 6


@pytest.mark.parametrize("rows, flags, message", [
    ([row_of("a")], ["--duplicates", "0.3"], "0.3' must be a finite number of at least 0.5 and at most 1"),
    ([row_of("a")], ["--min-length", "0"], "a whole number of at least 1"),
    ([row_of("a")], ["--min-length", "9", "--max-length", "8"], "--min-length 9 is above --max-length 8"),
    ([row_of("a")], ["--edit-distance", "5"], "no row has original_inputs or original_targets"),
    ([row_of("a")], ["--approvals", "2"], "a.jsonl:1: --approvals needs 'approvals'"),
    ([row_of("a")], ["--against", "none.jsonl"], "none.jsonl"),
    ([row_of("a"), {"question": "q"}], [], "a.jsonl:2: no prompt in keys"),
    ([row_of("a") | {"language": "qq"}], [], "a.jsonl:1: unknown language 'qq'"),
    ([row_of("a", removed_from="x"), row_of("a", removed_from="x")], [],
     "a.jsonl:2: the row has a key 'removed_from' already"),
    ([row_of("a")], ["--removed", "kept.jsonl", "--out", "kept.jsonl"], "--out and --removed are one file"),
    ([row_of("a")], ["--out", "a.jsonl"], "exists; give a new file"),
    ([row_of("a")], ["--out", "none/k.jsonl"], "its folder does not exist"),
    ([row_of("a")], ["a.jsonl"], "a file is given twice"),
])
def test_bad_input_is_one_line_with_its_place_and_nothing_is_written(rows, flags, message, tmp_path, capsys,
                                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = [] if "--out" in flags else ["--out", "kept.jsonl"]
    begin += [] if "--removed" in flags else ["--removed", "removed.jsonl"]
    try:
        main(["a.jsonl", *flags, *begin])
    except SystemExit as end:
        assert end.code == 2
        error = capsys.readouterr().err
    except (ValueError, OSError) as fault:
        error = str(fault)
    assert message in error and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_mistake_ends_the_process_with_code_2_and_one_line(tmp_path):
    done = program("-m", "aya_min.pruning", tmp_path / "a.jsonl", "--out", tmp_path / "k", "--removed",
                   tmp_path / "r")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "a.jsonl" in done.stderr
