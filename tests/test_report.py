"""The rooms report*.py: the page is whole, safe and honest about its judge, and leaves out what a run did
not record."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from aya_min import report, report_charts, report_data, report_table
from aya_min.command import guarded

VOID = {"meta", "br"}
HOSTILE = "<script>alert(\"x\")</script>'\" onload=alert(1) & <b>"


def rates(rate, low, high, **more):
    return {
        "win": 1,
        "tie": 0,
        "loss": 1,
        "unjudged": 0,
        "win_rate": rate,
        "ci95": [low, high],
        "num": 2,
        **more,
    }


def part(grade, **versus):
    languages = {
        code: {"num": 2, "grade": grade, "right_language": 1.0, "length": 9.0} for code in ("ar", "de", "en")
    }
    return {
        "num": 6,
        "grade": grade,
        "grade_ci95": [grade - 0.1, grade + 0.1],
        "right_language": 0.5,
        "length": 12.4,
        "by_language": languages,
        "by_task": {},
        "reward": -1.5,
        "versus": versus,
    }


def summary_of_a_run():
    by_language = {code: rates(80.0, 60.0, 95.0) for code in ("ar", "de", "en")}
    sft = {
        "base": rates(90.0, 85.0, 94.0, by_language=by_language),
        "previous": rates(90.0, 85.0, 94.0),
        "single": rates(51.0, 47.5, 54.5),
        "random": rates(45.0, 41.0, 49.0),
    }
    models = [
        ("base", "Base", "stage", {}),
        ("teacher-west", "Teacher west", "teacher", {"base": rates(60.0, 55.0, 65.0)}),
        ("single", "Single teacher", "arm", {"base": rates(70.0, 66.0, 74.0)}),
        ("random", "Random routing", "arm", {}),
        ("sft", "SFT", "stage", sft),
    ]
    return {
        "judge": "oracle",
        "models": [
            {
                "name": name,
                "title": title,
                "kind": kind,
                "previous": None,
                "steps": 3,
                "tokens": 10,
                "seconds": 1.0,
                "greedy": part(0.5 + i / 2, **versus),
                "sampled": part(0.4 + i / 2, **versus),
            }
            for i, (name, title, kind, versus) in enumerate(models)
        ],
        "clusters": {"west": ["de"], "east": ["ar"]},
        "teacher_wins": {"ar": {"teacher-west": 0.25}, "de": {"teacher-west": 1.0}},
        "arbitrage": {"prompts": 8, "ties": 1, "equal_texts": 0, "small_margin": 2},
        "reward_model": {
            "num": 40,
            "accuracy": 0.9,
            "right_vs_wrong": 0.875,
            "by_language": {"ar": 0.8, "de": 1.0},
            "by_kind": {"3 vs 1": 0.9},
        },
        "online": [
            {"round": 0, "greedy": {"reward": 0.0, "grade": 1.0}},
            {"round": 1, "greedy": {"reward": 1.0, "grade": 2.0}},
            {"round": 2, "greedy": {"reward": 2.0, "grade": 1.5}},
        ],
        "examples": [
            {
                "language": "ar",
                "prompt": "ما عاصمة مصر؟",
                "answers": [
                    {"model": "base", "completion": "", "grade": 0},
                    {"model": "sft", "completion": "القاهرة", "grade": 2},
                ],
            }
        ],
        "steps": [
            {"name": "base", "title": "Pretrain", "seconds": 75.0, "tokens": 1000, "training_steps": 3}
        ],
        "total_seconds": 80.0,
    }


def make_run(folder, summary=None):
    config = {
        "preset": "smoke",
        "seed": 7,
        "command": "train.py recipe",
        "recipe": {"dpo": {"beta": 0.1}},
        "versions": {"torch": "2.13"},
    }
    (folder / "steps" / "base").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "summary.json").write_text(
        json.dumps(summary_of_a_run() if summary is None else summary), encoding="utf-8"
    )
    rows = [{"step": 0, "eval/loss": 3.5}] + [{"step": i, "loss": 3.0 - i, "lr": .1} for i in range(3)]
    (folder / "steps" / "base" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def make_stage_run(folder):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"stage": "sft", "settings": {"seed": 3}}), encoding="utf-8"
    )
    rows = [
        {"step": i, "loss": 2.0 - 0.1 * i, "loss/fr": 2.0, "lr": 0.001, "tokens": 5, "seconds": 0.1}
        for i in range(4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "eval.json").write_text(
        json.dumps({"loss": 1.5, "loss/fr": 2.0, "loss/de": 1.0}), encoding="utf-8"
    )
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes; refuses an end tag that does not close the last open one."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())

    def handle_data(self, data):
        self.text += data


def page_of(run):
    return report.write_report(run).read_text(encoding="utf-8")


def section_titles(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_every_tag_of_the_page_is_closed_in_order(tmp_path):
    for run in (make_run(tmp_path / "recipe"), make_stage_run(tmp_path / "stage")):
        tags = Tags(page_of(run))
        assert {"html", "svg", "details"} <= {tag for tag, _ in tags.seen}


def test_the_page_has_all_its_parts_in_the_order_of_the_argument(tmp_path):
    text = page_of(make_run(tmp_path / "run"))
    assert section_titles(text) == [
        "Every model",
        "Win rate after each stage",
        "The arms beside it",
        "By language",
        "Who taught what: arbitrage over the pool",
        "How good is the arbiter",
        "Loss curves",
        "Arbiter&#x27;s reward and oracle&#x27;s grade over the online rounds",
        "Answers before and after",
        "What it cost",
    ]
    assert text.index('class="headline greedy"') < text.index("Every model") < text.index("<details>")
    assert "1 min 15 s" in text and "recipe.dpo.beta" in text


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    text = page_of(make_run(tmp_path / "run"))
    assert not re.search(r"https?:|//|url\(|@import|javascript:", text.replace("</", "<"), re.IGNORECASE)
    for tag, attributes in Tags(text).seen:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "use", "image", "a")
        assert not any(
            name in ("src", "href", "xlink:href", "srcset", "action") or name.startswith("on")
            for name in attributes
        ), attributes
    assert "default-src 'none'" in text


def hostile(value):
    """The same object with every text and every key that a model or a user chose made hostile; names that
    the report looks for stay."""
    if isinstance(value, dict):
        return {
            key: item if key in ("judge", "name", "kind", "model") else hostile(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_a_script_in_any_text_is_shown_and_not_run(tmp_path):
    summary = hostile(summary_of_a_run()) | {"judge": f"reward model: {HOSTILE}"}
    summary["clusters"] = {HOSTILE: ["de"]}
    summary["teacher_wins"]["de"] = {HOSTILE: .5}
    summary["reward_model"]["by_kind"] = {HOSTILE: .5}
    summary["reward_model"]["by_language"] = {HOSTILE: .5}
    summary["arbitrage"] = {HOSTILE: 4}
    summary["models"][4]["kind"] = summary["models"][4]["name"] = HOSTILE
    summary["models"][3]["greedy"]["versus"] = {HOSTILE: rates(50.0, 40.0, 60.0)}
    for model in summary["models"]:
        model["greedy"]["by_language"][HOSTILE] = {"grade": 1.0}
    run = make_run(tmp_path / "run", summary)
    (run / "config.json").write_text(json.dumps({"preset": HOSTILE, HOSTILE: HOSTILE}), encoding="utf-8")
    text = page_of(run)
    tags = Tags(text)
    known = {
        "class",
        "lang",
        "dir",
        "id",
        "style",
        "role",
        "aria-label",
        "aria-hidden",
        "scope",
        "colspan",
        "rowspan",
        "x",
        "y",
        "x1",
        "x2",
        "y1",
        "y2",
        "r",
        "rx",
        "d",
        "width",
        "height",
        "points",
        "viewbox",
        "charset",
        "name",
        "content",
        "http-equiv",
    }
    assert all(tag not in ("script", "b") or (tag == "b" and not attributes) for tag, attributes in tags.seen)
    assert {name for _, attributes in tags.seen for name in attributes} <= known
    assert tags.text.count("<script>alert") > 20 and "<script" not in text


def test_a_reward_model_as_the_judge_is_said_in_plain_words_on_page_and_table(tmp_path):
    summary = summary_of_a_run() | {"judge": "reward model: second-rm"}
    text = page_of(make_run(tmp_path / "run", summary))
    said = "Judged by a reward model, not by people or an oracle (reward model: second-rm)."
    assert (
        said in Tags(text).text
        and report_table.results_table(summary).endswith(said)
        and "oracle grade" not in text
    )


def test_the_arbiters_own_score_is_never_shown_as_a_win_rate(tmp_path):
    summary = summary_of_a_run() | {"judge": "arbiter (not a win rate)"}
    text = page_of(make_run(tmp_path / "run", summary))
    shown = Tags(text).text
    assert (
        "its score is not a win rate" in shown
        and "its score is not a win rate" in report_table.results_table(summary)
    )
    assert not re.search(
        r"vs (base|previous|single)|oracle grade|Win rate|it wins",
        shown + report_table.results_table(summary),
    )
    assert "arbiter's score" in shown and "-1.50" in report_table.results_table(summary)


def test_the_page_of_the_miniature_says_that_grades_near_0_are_expected(tmp_path):
    run = make_run(tmp_path / "run")
    assert "grades near 0" in page_of(run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(config | {"preset": "tiny"}), encoding="utf-8")
    assert "grades near 0" not in page_of(run)


def test_an_oracle_needs_no_warning(tmp_path):
    assert 'class="warning"' not in page_of(make_run(tmp_path / "run"))


@pytest.mark.parametrize("missing", sorted(summary_of_a_run()))
def test_a_part_that_was_not_recorded_is_left_out_without_error(tmp_path, missing):
    summary = summary_of_a_run()
    del summary[missing]
    page = page_of(make_run(tmp_path / "run", summary))
    Tags(page)                                          # well-formed
    assert page != page_of(make_run(tmp_path / "whole"))


@pytest.mark.parametrize(
    "missing", ["grade", "grade_ci95", "right_language", "length", "by_language", "reward", "versus"]
)
def test_a_figure_that_no_model_has_is_left_out_without_error(tmp_path, missing):
    summary = summary_of_a_run()
    for model in summary["models"]:
        model["greedy"].pop(missing), model["sampled"].pop(missing)
    Tags(page_of(make_run(tmp_path / "run", summary)))
    heading = {"right_language": "right language", "length": "length", "versus": "vs "}.get(missing)
    assert heading is None or heading not in report_table.results_table(summary)


def test_a_run_with_only_a_base_or_only_greedy_answers_makes_a_page(tmp_path):
    only_base, only_greedy, empty = summary_of_a_run(), summary_of_a_run(), rates(None, None, None, num=0)
    only_base["models"] = only_base["models"][:1]
    for model in only_greedy["models"]:
        del model["sampled"]
    only_greedy["models"][4]["greedy"]["versus"] = {
        "base": empty | {"by_language": {"de": empty}},
        "previous": empty,
    }
    for i, summary in enumerate((only_base, only_greedy, {})):
        Tags(page_of(make_run(tmp_path / str(i), summary)))
    assert 'class="headline' not in page_of(tmp_path / "0") and "sampled" not in report_table.results_table(
        only_greedy
    )


def test_report_md_is_the_table(tmp_path):
    run = make_run(tmp_path / "run")
    report.write_report(run)
    assert (run / "report.md").read_text(encoding="utf-8") == report_table.results_table(
        summary_of_a_run()
    ) + "\n"


def test_the_table_reads_as_worked_by_hand():
    summary = summary_of_a_run()
    summary["models"] = [summary["models"][4]]
    del summary["models"][0]["sampled"]
    assert report_table.results_table(summary) == "\n".join(
        [
            (
                "| model | decoding | oracle grade |           vs base |       vs previous |         vs"
                " single | right language % | length |"
            ),
            (
                "| ----- | -------- | -----------: | ----------------: | ----------------: |"
                " ----------------: | ---------------: | -----: |"
            ),
            (
                "| SFT   | greedy   |         2.50 | 90.0 [85.0, 94.0] | 90.0 [85.0, 94.0] | 51.0 [47.5,"
                " 54.5] |             50.0 |     12 |"
            ),
        ]
    )


def test_the_table_lists_stages_then_arms_then_teachers_and_keeps_pipes_in_names_apart():
    summary = summary_of_a_run()
    summary["models"][0]["title"] = "a|b"
    rows = report_table.results_table(summary).splitlines()[2::2]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "a\\|b",
        "SFT",
        "Single teacher",
        "Random routing",
        "Teacher west",
    ]
    assert report_table.results_table({}) == ""


def test_only_an_interval_clear_of_50_gets_an_arrow():
    text = report_table.table_part(summary_of_a_run())
    assert "▲ 90.0<small>[85.0, 94.0]" in text and ">51.0<small>[47.5, 54.5]" in text
    below = summary_of_a_run()
    below["models"][4]["greedy"]["versus"]["single"] = rates(45.0, 41.0, 49.0)
    assert "▼ 45.0<small>[41.0, 49.0]" in report_table.table_part(below)


def test_the_headline_names_the_gain_in_grade_and_both_win_rates():
    shown = Tags(report.headline(summary_of_a_run(), "greedy")).text.replace("\xa0", " ")
    assert (
        shown
        == "SFT, greedy: oracle grade 2.50 from the base's 0.50; it wins 90.0% [85.0, 94.0] against its base"
        " and 51.0% [47.5, 54.5] against the student of the single best teacher."
    )


def test_rounds_where_reward_rose_and_grade_fell_are_named():
    assert "please the arbiter): 2 (greedy)." in report.online_part(summary_of_a_run())
    flat = summary_of_a_run()
    flat["online"] = [{"round": 0, "reward": 0.0, "grade": 1.0}, {"round": 1, "reward": 1.0, "grade": 1.0}]
    assert "please the arbiter): none." in report.online_part(flat)


def test_prompts_and_answers_find_their_own_direction():
    tags = Tags(report.examples_part(summary_of_a_run()))
    texts = [
        attributes for tag, attributes in tags.seen if tag == "p" and attributes["class"].startswith("text")
    ]
    assert len(texts) == 3 and all(
        attributes["dir"] == "auto" and attributes["lang"] == "ar" for attributes in texts
    )
    assert "(empty)" in tags.text and "●●○ 2 of 3" in tags.text


def test_half_a_surrogate_pair_in_an_answer_is_refused_by_name_and_no_page_is_left_half_written(tmp_path):
    """json reads "\\ud83d" alone as a half of a pair, and writing it as UTF-8 raises."""
    summary = summary_of_a_run()
    summary["examples"][0]["answers"][0]["completion"] = "cut \ud83d"
    run = make_run(tmp_path / "run", summary)
    with pytest.raises(ValueError, match="summary.json: .*completion.* holds half a surrogate pair"):
        report.write_report(run)
    assert not (run / "report.html").exists()


def test_languages_stand_at_home_shared_or_other():
    clusters = {"west": ["de", "en"], "east": ["ar", "en"]}
    assert report_data.by_cluster(["ar", "en", "fr", "sw", "de"], clusters) == [
        ("west", ["de"]), ("east", ["ar"]), ("shared", ["en", "fr"]), ("other", ["sw"])]


def test_a_run_of_one_stage_shows_its_curves_and_each_languages_held_out_loss(tmp_path):
    text = page_of(make_stage_run(tmp_path / "run"))
    assert section_titles(text) == ["Training", "Held out, by language"]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == ["loss", "lr", "loss"]
    assert re.findall(r'class="label">(.*?)<', text) == ["all", "German", "French"]
    assert not (tmp_path / "run" / "report.md").exists()


def test_a_metrics_line_still_being_written_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 2.0, "grad_norm": "nan"}\n{"step": 1, "lo', encoding="utf-8")
    assert report_data.read_series(tmp_path) == {"loss": [(0, 2.0)]}
    path.write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
        report_data.read_series(tmp_path)


def test_a_long_curve_keeps_its_mean_in_at_most_200_points():
    points = [(i, float(i % 7)) for i in range(2003)]
    short = report_charts.downsample(points)
    assert (
        len(short) == report_charts.MAX_POINTS == 200
        and report_charts.downsample(points[:200]) == points[:200]
    )
    assert sum(y for _, y in report_charts.downsample(points[:2000])) / 200 == pytest.approx(
        sum(y for _, y in points[:2000]) / 2000
    )
    drawn = report_charts.curves("loss", [("loss", points, "a")])
    assert len(re.search(r'points="(.*?)"', drawn)[1].split()) == 200 and ">2002</text>" in drawn


def test_a_scale_holds_every_value_and_the_line_of_no_effect():
    assert report_charts.around(50, [52.0, None, float("nan")]) == (45, 55)
    assert report_charts.around(50, [81.2, 93.1]) == (45, 95) and report_charts.around(50, [12.0]) == (10, 55)
    assert report_charts.place(50, (45, 95)) == "10.00%" and report_charts.place(120, (0, 100)) == "100.00%"


def test_numbers_are_written_for_people():
    assert [report_charts.short(x) for x in (0, 3e-5, 0.6234, 12, 1196, 12345, 1234567)] == [
        "0",
        "3e-05",
        "0.623",
        "12",
        "1196",
        "12.35k",
        "1.235M",
    ]
    assert [report_charts.clock(x) for x in (7.49, 59.7, 200, 3725, None)] == [
        "7.5 s",
        "1 min 00 s",
        "3 min 20 s",
        "1 h 02 min",
        "–",
    ]
    assert [report_charts.number(x, 1) for x in (1234.56, None, float("nan"))] == ["1,234.6", "–", "–"]


def refusal(capsys, *arguments):
    """The one line of standard error with which the command ends, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        guarded(lambda: report.main([str(argument) for argument in arguments]), "aya_min.report")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    return error


def test_a_users_mistake_ends_with_one_line_and_exit_code_2(tmp_path, capsys):
    broken = make_run(tmp_path / "broken")
    (broken / "summary.json").write_text("{", encoding="utf-8")
    assert "not a run folder" in refusal(capsys, tmp_path / "nowhere")
    assert "give one run folder" in refusal(capsys)
    assert "summary.json: not JSON" in refusal(capsys, broken)


# ---- files that are not as we write them -------------------------------------------------------------------

def places(value, at=()):
    """The path of every value inside a JSON value."""
    yield at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*at, key))


def changed(value, at, new):
    """A copy of the value with `new` at a path; ... takes it away."""
    if not at:
        return new
    value = json.loads(json.dumps(value))
    inside = value
    for key in at[:-1]:
        inside = inside[key]
    if new is ...:
        del inside[at[-1]]
    else:
        inside[at[-1]] = new
    return value


WRONG = [None, [], {}, "x", True, 10 ** 400, 1e9, [[]], {"a": [1]}, json.loads("[" * 200 + "]" * 200), ...]


def draw_all(run, name, values):
    """(pages, refusals) of a run folder with each of the values in a file: one or the other, and no page is
    large."""
    path, pages = run / name, 0
    before = path.read_text(encoding="utf-8") if path.exists() else None
    for value in values:
        text = value if isinstance(value, str) else json.dumps(value) + "\n"
        path.write_text(text, encoding="utf-8")
        try:
            pages += len(report.page(run)) < 300_000
        except ValueError as error:
            assert type(error) is ValueError and path.name in str(error) and "\n" not in str(error), (value,
                                                                                                      error)
    if before is not None:
        path.write_text(before, encoding="utf-8")
    return pages, len(values) - pages


def test_a_summary_with_a_wrong_value_anywhere_makes_a_page_or_one_line_that_names_it(tmp_path):
    """39 of 66 malformed files were tracebacks; a grade of 1e9 made a page of 1.0 GB."""
    summary = summary_of_a_run() | {"pairs": {"online-1": {"cut": 3, "cut_by_language": {"de": 3}}}}
    summary["models"] = [summary["models"][0], summary["models"][4]]
    for model in summary["models"]:
        model["sampled"] = {"grade": 1.0}
    cases = [changed(summary, at, wrong) for i, at in enumerate(places(summary)) for wrong in WRONG[i % 4::4]]
    pages, refused = draw_all(make_run(tmp_path / "run"), "summary.json", cases)
    assert pages > 100 and refused > 100


def searched():
    def row(name, x):
        tasks = {"a": x, "b": 1 - x}
        return {"name": name, "fitness": tasks, "held-out": tasks, "without": tasks}

    rows = [row(name, i / 8) | {"weights": [.5, .5]} for i, name in enumerate(["best single", "a", "b",
                                                                               "CMA-ES"])]
    models = [row(name, .5) | {"folder": name, "weight": .5} for name in "xy"]
    return {"best": "x", "evaluations": 9, "popsize": 4, "held-out": True, "rows": rows, "models": models}


@pytest.mark.parametrize("name", ["eval.json", "config.json", "metrics.jsonl", "search.json",
                                  "evaluations.jsonl"])
def test_a_wrong_value_in_any_other_file_makes_a_page_or_one_line_that_names_it(name, tmp_path):
    whole = {"eval.json": {"loss": 1.5, "loss/fr": 2.0, "loss/de": 1.0},
             "metrics.jsonl": {"step": 1, "loss": 2.0},
             "config.json": {"stage": "sft", "settings": {"seed": 3}}, "search.json": searched(),
             "evaluations.jsonl": {"kind": "CMA-ES", "split": "fitness", "tasks": {"a": .1, "b": .2}}}[name]
    run = make_stage_run(tmp_path / "run")
    (run / "search.json").write_text(json.dumps(searched()), encoding="utf-8")
    cases = [changed(whole, at, wrong) for i, at in enumerate(places(whole))
             for wrong in (WRONG if i < 9 else WRONG[i % 4::4])
             if at or wrong is not ...]
    raw = ["{", "[]\n", "null\n", "5\n", '{"a": 1, "a": 2}\n', "[" * 100_000 + "\n", '{"step": NaN}\n',
           '{"a": 1e999}\n',
           '{"a": ' + "9" * 5000 + "}\n", '{"a": "\\ud800"}\n', "\0\n",
           '{"a":' * 900 + "1" + "}" * 900 + "\n"]
    pages, refused = draw_all(run, name, cases + raw)
    assert pages and refused >= len(raw) - 1


def test_a_report_replaces_a_link_and_leaves_what_it_leads_to(tmp_path):
    """report.html -> FILE overwrote FILE, outside the run."""
    run = make_run(tmp_path / "run")
    for name in ("report.html", "report.md"):
        (tmp_path / name).write_text("mine")
        (run / name).symlink_to(tmp_path / name)
    report.write_report(run)
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_text() == "mine" and not (run / name).is_symlink()
    assert {path.name for path in run.iterdir()} == {"config.json", "summary.json", "steps", "report.html",
                                                     "report.md"}


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl", "eval.json",
                                  "steps/base/metrics.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_link_out_of_the_run_or_what_is_no_plain_file_is_refused_and_not_waited_for(name, kind, tmp_path,
                                                                                      capsys):
    run = make_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    if kind == "link":
        (tmp_path / "outside").write_text('{"secret": 1}\n', encoding="utf-8")
        (run / name).symlink_to(tmp_path / "outside")
    elif kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).mkdir()
    assert name in refusal(capsys, run) and not (run / "report.html").exists()


def test_a_pipe_named_report_html_is_replaced_and_not_waited_for(tmp_path):
    run = make_run(tmp_path / "run")
    os.mkfifo(run / "report.html")
    assert report.write_report(run).is_file()


@pytest.mark.parametrize("value, dots", [(0, "○○○"), (2.4, "●●○"), (3, "●●●"), (1e9, ""), (-1, ""),
                                         (3.4, "")])
def test_only_a_grade_from_0_to_3_has_dots(value, dots):
    summary = summary_of_a_run()
    summary["examples"][0]["answers"][0]["grade"] = value
    assert f">{dots}</i>" in report.examples_part(summary)


def test_a_script_in_a_search_is_shown_and_not_run(tmp_path):
    """The headline's row names went into the page as they stood."""
    run, result = make_stage_run(tmp_path / "run"), searched()
    for part in result["rows"] + result["models"]:
        part["name"] = HOSTILE
        for split in ("fitness", "held-out", "without"):
            part[split] = {HOSTILE: .5, "b": .5}
    (run / "search.json").write_text(json.dumps(result | {"best": HOSTILE}), encoding="utf-8")
    text = page_of(run)
    assert "<script" not in text and Tags(text).text.count("<script>alert") >= 10
    assert not any("onload" in attributes for _, attributes in Tags(text).seen)


def test_an_axis_has_few_numbers_however_long_its_scale_is():
    assert len(re.findall("<text", report_charts.axis((0, 3), 1))) == 4
    for high in (100, 1e9, 1e99):
        assert 2 <= len(re.findall("<text", report_charts.axis((0, high), 1))) <= report_charts.MAX_TICKS + 1


def test_answers_cut_at_their_limit_are_counted_in_table_and_page(tmp_path):
    summary = summary_of_a_run()
    summary["models"][4]["greedy"]["cut"] = 4
    summary["arbitrage"] |= {"cut": 7, "cut_by_language": {"de": 7}}
    summary["pairs"] = {"online-1": {"cut": 3, "cut_by_language": {"ar": 1, "fr": 2}}}
    shown = Tags(page_of(make_run(tmp_path / "run", summary))).text
    assert "Answers that were cut at the limit" in shown and "ar 1, fr 2" in shown and "de 7" in shown
    assert report_table.results_table(summary).splitlines()[0].endswith("| cut |")
