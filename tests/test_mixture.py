"""Mixtures by hand: how many rows of each language and source come out, and what the command refuses."""

import json
import random
from collections import Counter

import pytest
from small import program

from aya_min.mixture import main, mix


def rows_of(**sizes):
    """Rows of languages, in a shuffled order: rows_of(en=3) has three of English."""
    rows = [{"language": code, "source": f"{code}-{i % 2}", "n": i}
            for code, size in sizes.items() for i in range(size)]
    random.Random(0).shuffle(rows)
    return rows


def languages(rows):
    return dict(Counter(row["language"] for row in rows))


def test_temperature_one_is_proportional_and_zero_is_equal_and_half_is_the_square_root():
    rows = rows_of(en=900, tr=100, hi=400)
    assert languages(mix(rows, 140)) == {"en": 90, "tr": 10, "hi": 40}
    assert languages(mix(rows, 90, temperature=0)) == {"en": 30, "tr": 30, "hi": 30}
    assert languages(mix(rows, 120, temperature=0.5)) == {"en": 60, "tr": 20, "hi": 40}


def test_what_a_language_lacks_goes_to_the_others_in_proportion():
    drawn = mix(rows_of(en=400, tr=10, hi=200), 310, temperature=0)
    assert languages(drawn) == {"en": 150, "tr": 10, "hi": 150}
    drawn = mix(rows_of(en=800, tr=100, hi=100), 100, cap_language=40)
    assert languages(drawn) == {"en": 40, "tr": 30, "hi": 30}


def test_a_source_gives_no_more_than_its_cap():
    drawn = mix(rows_of(en=100, tr=100), 40, cap_source=10)
    assert set(Counter(row["source"] for row in drawn).values()) == {10}
    drawn = mix([{"language": "en", "dataset_name": name} for name in "aaaaaaab"], 3, cap_source=2)
    assert Counter(row["dataset_name"] for row in drawn) == {"a": 2, "b": 1}


def test_each_row_is_drawn_once_and_the_seed_decides_which():
    rows = rows_of(en=50, tr=50)
    first, again, other = (mix(rows, 60, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({(row["language"], row["n"]) for row in first}) == 60
    everything = mix(rows, 100)
    assert sorted(map(str, everything)) == sorted(map(str, rows)) and everything != rows


def test_within_a_language_every_row_is_as_likely():
    rows = rows_of(en=10)
    counts = Counter(row["n"] for seed in range(500) for row in mix(rows, 3, seed=seed))
    assert len(counts) == 10 and all(100 < count < 200 for count in counts.values()), counts


def test_only_the_named_languages_are_drawn_and_other_stands_for_rows_without_one():
    rows = rows_of(en=5, tr=5) + [{"n": 0}, {"language": None, "n": 1}]
    assert languages(mix(rows, 5, languages=["tr"])) == {"tr": 5}
    assert [row["n"] for row in sorted(mix(rows, 2, languages=["other"]), key=lambda r: r["n"])] == [0, 1]


@pytest.mark.parametrize("more, message", [
    (dict(languages=["en", "de"]), "no row is in de; the rows are in en tr"),
    (dict(total=11), "only 10 of 11 rows can be drawn"),
    (dict(total=9, cap_language=4), "only 8 of 9 rows .* caps of 4 rows a language"),
    (dict(total=5, cap_source=1), "only 4 of 5 rows .* caps of 1 rows a source"),
])
def test_what_cannot_be_drawn_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        mix(rows_of(en=5, tr=5), **{"total": 4, **more})


# the command

LINES = [
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant","content":"\\u00e9"}], '
    '"language": "English"}',
    '{"prompt":"p",  "chosen":"c","rejected":"r","language":"tr","dataset_name":"d"}',
    '{"text": "plain", "language": "tur", "extra": 1.50}',
    '{"prompt": "p", "candidates": []}',
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(LINES[:2]).encode() + b"\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(LINES[2:]))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def test_the_command_keeps_the_lines_as_they_are_and_prints_what_came_out(files, tmp_path, capsys):
    out = tmp_path / "mixed.jsonl"
    main([*files, "--out", str(out), "--total", "4"])
    assert sorted(out.read_text(encoding="utf-8").splitlines()) == sorted(LINES)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tr", "2", "50.0%", "2"] in printed and ["other", "1", "25.0%", "1"] in printed
    assert ["d", "1", "25.0%", "1"] in printed and [files[1], "2", "50.0%", "2"] in printed
    main([*files, "--out", str(tmp_path / "two.jsonl"), "--total", "2", "--languages", "Turkish"])
    assert sorted((tmp_path / "two.jsonl").read_text().splitlines()) == sorted(LINES[1:3])


@pytest.mark.parametrize("flags, message", [
    (["--languages", "en", "Klingonian"], "unknown language 'Klingonian'"),
    (["--languages", "de"], "no row is in de"),
    (["--total", "5"], "only 4 of 5 rows can be drawn"),
    (["--total", "0"], "a whole number of at least 1"),
    (["--temperature", "-1"], "of at least 0 and at most 10"),
    (["--out", "a.jsonl"], "exists; give a new file"),
    (["--out", "none/mixed.jsonl"], "its folder does not exist"),
    (["b.jsonl"], "given twice"), (["--languages", "en", "English"], "one is given twice"),
])
def test_the_command_refuses_in_one_line_with_code_2_and_writes_nothing(files, tmp_path, flags, message,
                                                                        capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    try:
        more = ["--out", "mixed.jsonl", "--total", "4"]
        main([*files, *flags, *(more[:2] if "--out" not in flags else []),
              *(more[2:] if "--total" not in flags else [])])
    except SystemExit as end:
        assert end.code == 2
        error = capsys.readouterr().err
    except ValueError as fault:
        error = str(fault)
    assert message in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_mistake_ends_the_process_with_code_2_and_one_line(files, tmp_path):
    done = program("-m", "aya_min.mixture", *files, "--out", tmp_path / "mixed.jsonl", "--total", "99")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr
    assert json.loads(LINES[0])["language"] == "English" and not (tmp_path / "mixed.jsonl").exists()


def test_a_row_of_two_shapes_is_refused_with_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"prompt": "a", "completion": "b", "text": "c"}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: two shapes in one row"):
        main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--total", "1"])
    assert not (tmp_path / "out.jsonl").exists()
