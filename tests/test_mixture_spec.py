"""Mixtures by a spec: draws worked by hand, what the spec refuses, and the command."""

import json
from collections import Counter

import numpy as np
import pytest
from small import program

from aya_min.files import write_jsonl
from aya_min.mixture import main
from aya_min.mixture_draw import Cell, count_rows, draw, share_out
from aya_min.mixture_rows import open_mixture
from aya_min.mixture_spec import Source, Spec, read_spec


def cells_of(*rows):
    """Cells of (source, dataset, language, template, size)."""
    return [Cell(*row) for row in rows]


def counts(cells, name):
    found = Counter()
    for cell in cells:
        found[getattr(cell, name)] += cell.count
    return dict(found)


def spec_of(*sources, **more):
    sources = [Source(name=str(i), files=("f",), **about) for i, about in enumerate(sources)]
    return Spec("spec.json", tuple(sources), **more)


# ---- draws worked by hand

def test_shares_are_in_proportion_and_what_one_lacks_goes_to_the_others():
    assert share_out(8, [3, 1], [9, 9]).tolist() == [6, 2]
    assert share_out(8, [3, 1], [4, 9]).tolist() == [4, 4]
    assert share_out(7, [1, 1, 1], [9, 9, 9]).tolist() == [3, 2, 2]
    assert share_out(9, [2, 1, 0], [3, 4, 9]).tolist() == [3, 4, 0]
    assert share_out(10, [5, 2, 1], [1, 9, 9]).tolist() == [1, 6, 3]


@pytest.mark.parametrize("seed", range(3))
def test_shares_add_up_and_stay_within_their_rooms(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        size = rng.integers(1, 9)
        weights, rooms = rng.random(size) * rng.integers(0, 2, size), rng.integers(0, 20, size)
        total = int(rng.integers(0, 60))
        given = share_out(total, weights, rooms)
        assert (given <= rooms).all() and (given >= 0).all() and not given[weights == 0].any()
        assert given.sum() == min(total, rooms[weights > 0].sum())


def test_sources_are_drawn_three_to_one_whatever_their_sizes():
    cells = cells_of((0, "a", "en", "", 60), (1, "b", "en", "", 1000))
    count_rows(cells, spec_of({"weight": 3}, {"weight": 1}, total=80))
    assert [cell.count for cell in cells] == [60, 20]
    # Without a total: as many as no source is too small for.
    count_rows(cells, spec_of({"weight": 3}, {"weight": 1}))
    assert [cell.count for cell in cells] == [60, 20]


def test_temperature_one_follows_sizes_and_zero_is_equal_and_datasets_follow_theirs():
    def drawn(temperature, total):
        cells = cells_of((0, "a", "en", "", 600), (0, "b", "en", "", 200), (0, "a", "tr", "", 50),
                         (0, "c", "hi", "", 150))
        count_rows(cells, spec_of({"weight": 1}, temperature=temperature, total=total))
        return [cell.count for cell in cells]
    assert drawn(1, 100) == [60, 20, 5, 15]
    assert drawn(0, 120) == [30, 10, 40, 40]
    assert drawn(0, 300) == [94, 31, 50, 125]      # tr has but 50 of 100; 93.75 and 31.25 of en are rounded
    assert sum(drawn(0.5, 101)) == 101


def test_caps_bound_datasets_and_languages_of_datasets_before_shares_are_taken():
    cells = cells_of((0, "a", "en", "", 9000), (0, "a", "tr", "", 1000), (0, "b", "en", "", 5000))
    count_rows(cells, spec_of({"weight": 1, "cap_dataset_language": 3000}))
    assert [cell.kept for cell in cells] == [3000, 1000, 3000] == [cell.count for cell in cells]
    count_rows(cells, spec_of({"weight": 1, "cap_dataset": 2000}))
    assert [cell.count for cell in cells] == [1800, 200, 2000]
    count_rows(cells, spec_of({"weight": 1, "cap_dataset": 1000, "cap_dataset_language": 1500}))
    assert [cell.count for cell in cells] == [600, 400, 1000]


def test_a_cap_on_a_language_leaves_sources_their_shares_of_it():
    cells = cells_of((0, "a", "en", "", 90), (0, "a", "tr", "", 90), (1, "b", "en", "", 9000))
    count_rows(cells, spec_of({"weight": 1}, {"weight": 1}, cap_language=30, total=40))
    assert cells[0].kept + cells[2].kept == 30 and cells[1].kept == 30
    assert counts(cells, "source") == {0: 20, 1: 20}


def test_template_weights_make_rows_likelier_and_zero_leaves_them_out():
    cells = cells_of((0, "a", "en", "", 100), (0, "a", "en", "t1", 100), (0, "a", "en", "t2", 100))
    weights = {"t1": 3, "t2": 0}
    count_rows(cells, spec_of({"weight": 1, "template_weights": weights}, total=40))
    assert [cell.count for cell in cells] == [10, 30, 0]


def test_rows_are_repeated_only_where_the_spec_says_epochs_and_all_equally_often():
    cells = cells_of((0, "a", "en", "", 10), (1, "b", "en", "", 100))
    with pytest.raises(ValueError, match="source '0' runs dry: the mixture needs 25 of its rows, and it has "
                                         "10; lower total to at most 20, allow repeats with epochs 2.5 in"):
        count_rows(cells, spec_of({"weight": 1}, {"weight": 1}, total=50))
    count_rows(cells, spec_of({"weight": 1, "epochs": 2.5}, {"weight": 1}, total=50))
    rows = draw(np.repeat([0, 1], [10, 100]), cells, seed=0)
    times = Counter(row for row in rows.tolist() if row < 10)
    assert len(rows) == 50 and sorted(times.values()) == [2] * 5 + [3] * 5


@pytest.mark.parametrize("epochs", [1, 1.5, 2.3, 7])
def test_a_source_of_many_small_parts_gives_all_that_its_epochs_allow(epochs):
    cells = cells_of(*((0, f"d{i % 3}", f"l{i % 7}", "", 1 + i % 2) for i in range(42)))
    cells = list({(cell.dataset, cell.language): cell for cell in cells}.values())
    size = sum(cell.size for cell in cells)
    count_rows(cells, spec_of({"weight": 1, "epochs": epochs}, total=int(size * epochs), temperature=0.3))
    assert sum(cell.count for cell in cells) == int(size * epochs)
    assert max(cell.count / cell.size for cell in cells) <= np.ceil(epochs)


def test_the_draw_takes_each_row_once_and_the_seed_decides_which():
    cells = cells_of((0, "a", "en", "", 500), (0, "a", "tr", "", 500))
    count_rows(cells, spec_of({"weight": 1}, total=400))
    cell_of_row = np.random.default_rng(0).permutation(np.repeat([0, 1], 500))
    first, again, other = (draw(cell_of_row, cells, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist() and first.dtype == np.int32
    assert len(set(first.tolist())) == 400
    assert Counter(cell_of_row[first].tolist()) == {0: 200, 1: 200}


def test_within_a_cell_every_row_is_as_likely():
    cells = cells_of((0, "a", "en", "", 10))
    count_rows(cells, spec_of({"weight": 1}, total=3))
    times = Counter(row for seed in range(500) for row in draw(np.zeros(10, int), cells, seed).tolist())
    assert len(times) == 10 and all(100 < count < 200 for count in times.values()), times


# ---- files

@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "language": "en" if i % 3 else "Turkish",
             "dataset_name": "da" if i % 2 else "db", "template_id": i % 4} for i in range(60)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{"question": f"q{i}", "answer": "x"} for i in range(20)])
    return tmp_path


def write(folder, value, name="spec.json"):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder / name


def of(**more):
    return {"sources": {"s": {"files": ["a.jsonl"], "weight": 1, **more}}}


BOTH = {"seed": 3, "total": 40, "sources": {
    "s": {"files": ["a.jsonl"], "weight": 3, "template_weights": {"0": 0}},
    "t": {"files": ["b.jsonl"], "weight": 1, "columns": {"prompt": "question", "completion": "answer"}}}}


def test_the_command_writes_the_rows_and_prints_them_by_source_language_and_dataset(folder, capsys):
    main([str(write(folder, BOTH)), "--out", str(folder / "out.jsonl")])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["s", "30", "75.0%", "60", "0.50"] in printed and ["t", "10", "25.0%", "20", "0.50"] in printed
    assert ["s:", "0", "0", "0.0%", "15", "0.00"] in printed
    assert ["all", "40", "100.0%", "80", "0.50"] in printed
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert Counter("template_id" in row for row in rows) == {True: 30, False: 10}
    assert {row["completion"] for row in rows} == {"c", "x"}
    assert not any(row.get("template_id") == 0 for row in rows)
    before, after = ((folder / name).read_text().splitlines() for name in ("a.jsonl", "out.jsonl"))
    assert len(set(before) & set(after)) == 30          # these lines are as they were
    assert len({row["prompt"] for row in rows}) == 40


def test_only_the_named_languages_are_drawn(folder):
    mixture = open_mixture(write(folder, {**of(), "languages": ["tr"]}))
    assert len(mixture) == 20 and {mixture.row(i)[1]["language"] for i in range(20)} == {"tr"}


@pytest.mark.parametrize("value, message", [
    (of(weight=-1), "source 's': weight must be a finite number of at least 0 and at most 1000000000, got"),
    (of(weight=1e308), "weight must be a finite number"), ({**of(), "total": 10 ** 30}, "total must be"),
    (of(template_weights={"a": 1e308}), "'a' must be a finite number"),
    (of(weight=0), "the weights of all sources are 0"), (of(weight="1"), "weight must be a finite number"),
    (of(wait=1), "unknown key 'wait'; known: files weight"), (of(files=[]), "one or more file names"),
    ({**of(), "temprature": 1}, "unknown key 'temprature'; known: seed total"),
    ({**of(), "temperature": 11}, "temperature must be .* at most 10"),
    (of(files=["none.jsonl"]), "none.jsonl does not exist"),
    (of(files=["a.jsonl", "a.jsonl"]), "a.jsonl is given twice"),
    ({"sources": {"s": {"files": ["a.jsonl"]}}}, "has no 'weight'"), ({"total": 5}, "no sources"),
    ({**of(), "total": 61}, "source 's' runs dry: the mixture needs 61 of its rows, and it has 60; lower "
                            "total to at most 60"),
    ({**of(), "total": 10 ** 9}, "total to at most 60, lower its weight, or give more rows"),
    ({**of(cap_dataset=10), "total": 21}, "it has 20 of 60 \\(caps.*or raise a cap"),
    (of(template_weights={"9": 1}), "no row has the template_id or task_type '9'"),
    (of(template_weights={"1": -2}), "template_weights: '1' must be"),
    (of(columns={"a": "b"}), "'a' is no key"),
    ({**of(), "languages": ["de"]}, "no row is in de; the rows are in en tr"),
    ({**of(), "languages": ["xx-none"]}, "unknown language"), (of(epochs=0.5), "epochs must be"),
    ({**of(), "sources": [1]}, "sources must be an object"), ("{", "not JSON"),
    (of(files="a.jsonl"), "files must be a list"),
])
def test_a_wrong_spec_is_refused_with_its_place(folder, value, message):
    with pytest.raises(ValueError, match=message):
        open_mixture(write(folder, value))


@pytest.mark.parametrize("lines, message", [
    ('{"prompt": "p"}\n{"prompt": 1, ]', "a.jsonl:2: not JSON"), ("", "a.jsonl: the file is empty"),
    ('{"prompt": "p", "language": "Klingonian"}', "a.jsonl:1: unknown language"),
    ("[\n{}\n]", "a JSON array over several lines"),
    ('{"prompt": "p", "tools": ["x"]}', "a.jsonl:1: 'tools'"),
])
def test_a_wrong_line_is_refused_when_the_spec_is_opened(folder, lines, message):
    (folder / "a.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        open_mixture(write(folder, of()))


@pytest.mark.parametrize("flags, message", [
    (["--total", "5"], "--total beside a spec"), (["--cap-source", "5"], "--cap-source beside a spec"),
    (["a.jsonl"], "another file beside a spec"), (["--out", "a.jsonl"], "exists; give a new file")])
def test_flags_beside_a_spec_are_refused(folder, flags, message, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder, BOTH)
    with pytest.raises(ValueError, match=message):
        main(["spec.json", *flags, *([] if "--out" in flags else ["--out", "out.jsonl"])])
    assert not (folder / "out.jsonl").exists()


def test_a_mistake_ends_a_stage_with_code_2_and_one_line_before_it_writes_anything(folder):
    spec = write(folder, {**of(), "total": 61})
    before = sorted(folder.iterdir())
    done = program("train.py", "sft", "--model", "smoke", "--data", spec, "--out", folder / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "runs dry" in done.stderr, done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_json_file_of_rows_is_no_spec(folder):
    (folder / "rows.json").write_text((folder / "a.jsonl").read_text())
    main([str(folder / "rows.json"), "--out", str(folder / "out.jsonl"), "--total", "60"])
    assert len((folder / "out.jsonl").read_text().splitlines()) == 60


def test_sources_of_weight_0_are_left_out(folder):
    value = {"sources": {**of()["sources"], "off": {"files": ["b.jsonl"], "weight": 0}}}
    assert [source.name for source in read_spec(write(folder, value)).sources] == ["s"]
