"""`train.py recipe`: what is asked for and what a user brings are looked at before anything is made."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
from small import TORCHRUN, language_model, program, reward_model, tokenizer

import train
from aya_min import pipeline_checks, config, pipeline, report, pipeline_results, pipeline_steps, weights
from aya_min.evaluate_rates import summarize
from aya_min.files import write_jsonl
from aya_min.languages import CLUSTERS
from aya_min.tokenizer import train_tokenizer
from aya_min.world import questions


@pytest.fixture
def refusal(tmp_path, in_process):
    """refusal(*flags): the one line with which the recipe is refused, exit code 2, nothing left behind."""
    def refused(*flags):
        out = tmp_path / "new" / "run"
        code, printed, err = in_process(train, "recipe", "--preset", "smoke", "--out", out, *flags)
        assert code == 2 and printed == "" and len(err) == 1, (code, err)
        assert not out.parent.exists()
        return err[0]
    return refused


# ---- flags -------------------------------------------------------------------------------------------------

WRONG_FLAGS = [
    pytest.param("--eval-count", "100000", "different test questions", marks=pytest.mark.long),
    ("--eval-count", "0", "at least 1"),
    ("--max-new-tokens", "0", "at least 1"), ("--max-new-tokens", "5000", "1024 positions"),
    ("--max-length", "5", "fewer than one in ten fit"), ("--batch-size", "0", "at least 1"),
    ("--batch-size", "100000", "--corpus 960"), ("--model", "nope", "invalid choice"),
    ("--num-prompts", "0", "at least 1"),
    ("--num-prompts", "5", "--num-prompts 5"), ("--corpus", "3", "--corpus 3"),
    ("--lessons", "10", "--lessons 10"),
    ("--arbiter-gold", "1", "--arbiter-gold 1"), ("--arbiter-pairs", "8", "--arbiter-pairs 8"),
    ("--rloo-samples", "1", "at least 2"), ("--rloo-steps", "0", "at least 1"),
    ("--online-samples", "0", "at least 2"),
    ("--online-temperature", "nan", "finite"), ("--teacher-temperature", "inf", "finite"),
    ("--offline-beta", "-1", "above 0"), ("--online-beta", "nan", "above 0"),
    ("--rloo-beta", "-1", "at least 0"),
    ("--cluster-spill", "2", "at most 1"), ("--cluster-spill", "-1", "at least 0"),
    ("--cluster-scale", "0", "above 0"),
    ("--offline-margin", "nan", "finite"), ("--online-margin", "-1", "at least 0"),
    ("--rounds", "-1", "at least 0"),
    ("--online-prompts", "1", "one for each of 4 clusters"), ("--seed", "-1", "at least 0"),
    ("--seed", "9" * 400, "below 9223372036854775808"), ("--sft-epochs", "inf", "finite"),
    ("--sft-epochs", "1e-9", "less than one example"), ("--vocab-size", "10", "at least 300"),
    ("--vocab-size", "9" * 18, "at most 10000000"), ("--sft-epochs", "1e308", "at most 1000000"),
    ("--collective-timeout", "nan", "finite"), ("--collective-timeout", "0", "at least 0.001"),
    ("--columns", "prompt", "OURS=THEIRS"), ("--columns", "prompt=question", "go with --base"),
    ("--out", "runs/\udcff", "not UTF-8")]


@pytest.mark.parametrize("flag, value, says", WRONG_FLAGS)
def test_a_wrong_flag_is_refused_before_anything_is_made(flag, value, says, refusal):
    """--eval-count 100000 trained all the models first, and the folder could not be used again;
    --online-samples 0 never ended; --batch-size 0, --model nope, --max-new-tokens 0 and --eval-count 0 were
    tracebacks."""
    assert says in refusal(flag, value)


@pytest.mark.parametrize("name, value", [("online_samples", 0), ("offline_beta", -1), ("cluster_spill", 2),
                                         ("seed", -1),
                                         ("max_new_tokens", 10 ** 400), ("learning", 1), ("rounds", 1.5)])
def test_a_wrong_setting_in_a_file_is_refused_like_its_flag(name, value, refusal, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({name: value}))
    assert name in refusal("--config", tmp_path / "recipe.json")


@pytest.mark.parametrize("clusters, says", [
    ({}, "no cluster"), ({"a": ["en"]}, "1 clusters"), ({"a": [], "b": ["de"]}, "non-empty list"),
    ({"a": [["de"]], "b": ["fr"]}, "unknown language"), ({"a": ["de"], "b": "fr"}, "non-empty list"),
    ({"pairs": ["de"], "b": ["pl"]}, "'pairs' cannot be"),
    ({"other": ["de"], "b": ["pl"]}, "'other' cannot be"), ({"a\nb": ["de"], "b": ["pl"]}, "cannot be"),
    ({"a": ["de"], "b": ["sw"]}, "'sw' is no language of the embedded"),
    ({"a": ["de"], "b": ["de"]}, "in both"), ({"a": ["de"], "../b": ["pl"]}, "cannot name a folder")])
def test_clusters_that_cannot_be_trained_are_refused(clusters, says, refusal, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(clusters))
    assert says in refusal("--clusters", tmp_path / "c.json")


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"a": ["de"], "a": ["fr"]}', "[" * 100_000])
def test_a_file_of_clusters_that_is_no_object_is_named(text, refusal, tmp_path):
    (tmp_path / "c.json").write_text(text)
    assert "c.json: " in refusal("--clusters", tmp_path / "c.json")


def test_a_cluster_that_leaves_no_language_elsewhere_has_lessons_all_the_same():
    from aya_min.world_data import lessons
    clusters = {"most": sum(CLUSTERS.values(), [])[1:], "rest": ["it"]}
    clusters["most"].append(clusters.pop("rest")[0])
    assert len(lessons(clusters, "most", 100, 0, "tiny")) == 80


def test_sizes_are_counted_over_the_ranks():
    recipe = config.Recipe(**config.RECIPES["smoke"])
    pipeline_checks.check_sizes(recipe, CLUSTERS, 2)
    with pytest.raises(ValueError, match="--batch-size 32 does not divide over 3 ranks"):
        pipeline_checks.check_sizes(recipe, CLUSTERS, 3)
    with pytest.raises(ValueError, match="--prompts: 31 prompts are fewer than one batch of 32"):
        pipeline_checks.check_sizes(recipe, CLUSTERS, 1, 31)


def test_every_preset_passes_its_own_checks():
    for preset in config.RECIPES.values():
        recipe = config.settings_from(config.Recipe, preset)
        pipeline_checks.check_sizes(recipe, CLUSTERS, 2)
        pipeline_checks.check_world(recipe, CLUSTERS)


# ---- what a user brings ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Models A and B of 512 positions, a small one of 64, arbiters (one of another tokenizer, one that
    reads critiques), 40 prompts."""
    folder = tmp_path_factory.mktemp("own")
    for name, model in {"A": language_model(0), "B": language_model(1), "RM": reward_model(),
                        "short": language_model(2, max_position_embeddings=64),
                        "short-RM": reward_model(max_position_embeddings=64),
                        "critiques-RM": reward_model()}.items():
        if name == "critiques-RM":
            model.config.critiques = True
        weights.save(folder / name, model, tokenizer())
    weights.save(folder / "other-RM", reward_model(vocab_size=280),
                 train_tokenizer(["one two three"] * 9, 280))
    rows = [{"prompt": f"{i}?", "language": "de"} for i in range(40)]
    write_jsonl(folder / "p.jsonl", rows)
    for name, change in {"long": {"prompt": "w " * 600}, "nowhere": {"language": "sw"},
                         "spelled": {"prompt": "<|USER_TOKEN|>x"},
                         "half": {"prompt": "w " * 90}}.items():
        write_jsonl(folder / f"{name}.jsonl", [*rows[:-1], rows[-1] | change])
    answers = [{**row, "completion": "ja"} for row in rows]
    for name, change in {"answers": {}, "long-answer": {"completion": "w" * 100_000}, "few": None,
                         "spelled-answer": {"completion": "x<EOS_TOKEN><|END_OF_TURN_TOKEN|>"}}.items():
        write_jsonl(folder / f"{name}.jsonl", answers[:-1] + ([answers[-1] | change] if change is not None
                                                              else []))
    (folder / "same").mkdir()
    write_jsonl(folder / "same" / "answers.jsonl", answers)
    return folder


def flags_of(own, **change):
    """The flags of a user's own pipeline, those of the folder's files made paths."""
    given = {"base": "A", "prompts": "p.jsonl", "teachers": "A B", "arbiter": "RM"} | change
    words = [f"--{flag.replace('_', '-')} {value}" for flag, value in given.items()]
    return [str(own / word) if (own / word).exists() else word for word in " ".join(words).split()]


@pytest.mark.parametrize("change, says", [
    ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl:40: language 'sw' is in no cluster"),
    ({"prompts": "long.jsonl"}, "long.jsonl:40: "), ({"eval_prompts": "long.jsonl"}, "long.jsonl:40: "),
    ({"prompts": "half.jsonl", "teachers": "A short"}, "half.jsonl:40: "),
    ({"prompts": "half.jsonl", "arbiter": "short-RM"}, "half.jsonl:40: "),
    ({"eval_prompts": "half.jsonl", "judge": "short-RM"}, "half.jsonl:40: "),
    ({"max_new_tokens": "600"}, "--max-new-tokens 600 leaves no room"),
    ({"teachers": "A answers.jsonl same/answers.jsonl"}, "two have the same name"),
    ({"teachers": "A few.jsonl"}, "no answer for 1 of 40"), ({"teachers": "A"}, "two teachers or more"),
    ({"teachers": "A long-answer.jsonl"}, "the arbiter 512 positions"),
    ({"teachers": "A spelled-answer.jsonl"}, "spell control tokens"),
    ({"teachers": "A RM"}, "not a language model"),
    ({"cluster_spill": "0"}, "'slavic' has no prompt in its languages"),
    ({"arbiter": "B"}, "not a reward model"), ({"judge": "B"}, "not a reward model"),
    ({"arbiter": "critiques-RM"}, "critiques-RM: this reward model was trained with critiques"),
    ({"judge": "critiques-RM"}, "critiques-RM: this reward model was trained with critiques"),
    ({"base": "RM"}, "not a language"),
    ({"arbiter": "other-RM", "arms": "all"}, "share a tokenizer"),
    ({"batch_size": "48"}, "fewer than one batch of 48"),
    ({"base": "p.jsonl"}, "p.jsonl"), ({"judge": "RM"}, "must not be")])
def test_what_a_user_brings_that_cannot_be_used_is_refused_before_any_work(change, says, own, refusal):
    """A teacher's file with one answer of 100,000 letters took more than 60 s; the rest was seen after
    training."""
    assert says in refusal(*flags_of(own, **change))


def checked(own, **settings):
    recipe = config.Recipe(**{**config.RECIPES["smoke"], **settings})
    folders = {name: own / name for name in ("A", "B", "RM")}
    return lambda prompts, teachers=(), **more: pipeline_checks.check_own(
        recipe, CLUSTERS, "main", base=folders["A"], prompts=[own / prompts], arbiter=folders["RM"],
        teachers=[folders["A"], folders["B"], *(own / t for t in teachers)], **more)


def test_prompts_that_are_too_long_are_left_out_or_kept_to_be_cut_as_asked(own, capfd):
    skipped, evaluated = checked(own, too_long="skip")("long.jsonl")
    assert len(skipped) == len(evaluated) == 39 and "long.jsonl:40" in capfd.readouterr().err
    kept, _ = checked(own, too_long="cut-left")("long.jsonl", ["long-answer.jsonl"][:0])
    assert len(kept) == 40


def test_a_column_of_the_users_is_never_taken_for_a_verdict(own, tmp_path):
    """{"prompt": ..., "grade": 7} without --judge gave grade 7.0 for all models; "grade": "y" ended the run
    at its end."""
    theirs = {"grade": 7, "score": 1, "reward": "y", "why": 1, "seen_language": "de",
              "finish_reason": "length",
              "completion": "c", "chosen": 1, "teacher": "me", "candidates": []}
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i}?", "id": i, "language": "de", **theirs}
                                       for i in range(3)])
    rows, _ = checked(own)(tmp_path / "p.jsonl")
    assert all(row.keys() == {"id", "language", "prompt", "prompt_messages", "prompt_where"} for row in rows)


# ---- the run folder ----------------------------------------------------------------------------------------

def record_of(**changes):
    recipe = asdict(config.Recipe(**{**config.RECIPES["smoke"], **changes}))
    return {"preset": "smoke", "arms": "main", "seed": recipe["seed"], "recipe": recipe, "clusters": CLUSTERS}


def look(folder, before, now):
    (folder / "config.json").write_text(before if isinstance(before, str) else json.dumps(before),
                                        encoding="utf-8")
    train.check_run_folder(folder, now, config.RECIPES["smoke"])


def test_a_run_of_before_a_setting_was_known_goes_on(tmp_path):
    before = record_of() | {"versions": {"torch": "2"}, "command": "x"}
    for name in ("columns", "too_long", "keep_cut", "allow_control_tokens"):
        del before["recipe"][name]
    look(tmp_path, before, record_of())
    with pytest.raises(ValueError, match=r"--keep-cut \(True\); give another --out"):
        look(tmp_path, before, record_of(keep_cut=False))


def test_another_run_is_refused_with_the_settings_that_differ(tmp_path):
    with pytest.raises(ValueError, match=r"other seed --num-prompts \(240\) --seed \(0\); give another"):
        look(tmp_path, record_of(), record_of(num_prompts=24, seed=1))
    with pytest.raises(ValueError, match="other clusters"):
        look(tmp_path, record_of(), record_of() | {"clusters": {"a": ["de"]}})
    with pytest.raises(ValueError, match="other arbiter"):
        look(tmp_path, record_of() | {"arbiter": "a"}, record_of() | {"arbiter": "b"})


@pytest.mark.parametrize("name, path, flag", [
    ("A/model.safetensors", "A", "--base"), ("RM/config.json", "RM", "--arbiter"),
    ("B/tokenizer.json", "B", "--teachers"), ("p.jsonl", None, "--prompts"),
    ("answers.jsonl", None, "--teachers")])
def test_a_run_goes_on_only_with_what_its_users_files_held_when_it_began(name, path, flag, own, tmp_path,
                                                                         capsys):
    """Its paths were compared, not what they held: half of a run was of one model, half of another."""
    copy = shutil.copytree(own, tmp_path / "own")
    brought = {"base": copy / "A", "prompts": [copy / "p.jsonl"], "arbiter": copy / "RM",
               "teachers": [copy / "A", copy / "B", copy / "answers.jsonl"]}
    before, out = pipeline_checks.contents(**brought), tmp_path / "run"
    out.mkdir()
    pipeline_checks.check_contents(out, before)             # a new run
    (out / "config.json").write_text(json.dumps({"sha256": before}))
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))                              # copied, or moved: the same contents
    pipeline_checks.check_contents(out, pipeline_checks.contents(**brought))
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data.replace(data[-40:], bytes(40)) if path == "A" else data + b" ")
    with pytest.raises(ValueError, match=f"{name} does not hold what it held"):
        pipeline_checks.check_contents(out, pipeline_checks.contents(**brought))
    (out / "config.json").write_text("{}")                  # of an older version
    pipeline_checks.check_contents(out, {})
    assert "are not compared" in capsys.readouterr().err
    for damaged in ("[]", "5", '{"--base": 5}', '{"--base": {}}'):
        (out / "config.json").write_text(f'{{"sha256": {damaged}}}')
        with pytest.raises(ValueError, match="does not hold what it held"):
            pipeline_checks.check_contents(out, before)


def test_the_recipe_refuses_another_content_before_any_work(own, tmp_path, in_process):
    out = tmp_path / "run"
    out.mkdir()
    flags = flags_of(own, rounds="1", teachers="A B")
    record = record_of(rounds=1)
    brought = {"base": str(own / "A"), "prompts": [str(own / "p.jsonl")], "arbiter": str(own / "RM"),
               "teachers": [str(own / "A"), str(own / "B")]}
    record["recipe"].pop("keep_cut")
    digests = pipeline_checks.contents(**brought)
    digests["--arbiter"] = dict.fromkeys(digests["--arbiter"], "0" * 64)
    (out / "config.json").write_text(json.dumps({**record, **brought, "sha256": digests}))
    code, _, err = in_process(train, "recipe", "--preset", "smoke", "--out", out, *flags)
    assert code == 2 and "does not hold what it held" in err[-1] and "--arbiter" in err[-1]
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_settings_that_a_config_has_lost_are_named_with_what_they_take(tmp_path, capsys):
    """Today's default was taken without a word."""
    before = record_of()
    del before["recipe"]["columns"]
    look(tmp_path, before, record_of())
    assert "config.json does not hold columns None: today's default is taken" in capsys.readouterr().err
    look(tmp_path, record_of(), record_of())
    assert capsys.readouterr().err == ""


def test_a_setting_of_a_step_not_yet_begun_may_change_so_that_a_late_failure_does_not_cost_the_run(tmp_path):
    look(tmp_path, record_of(), record_of(online_margin=0.1, eval_count=24, rloo_steps=9, rounds=1,
                                          offline_beta=0.2))
    for step, name, value in (("online-1-pairs", "online_margin", 0.1), ("eval-base", "eval_count", 24),
                              ("offline-slavic", "offline_beta", 0.3), ("rloo", "rloo_steps", 1)):
        (tmp_path / "steps" / step).mkdir(parents=True)
        look(tmp_path, record_of(), record_of(**{name: value}))
        (tmp_path / "steps" / step / "done.json").write_text("{}")
        with pytest.raises(ValueError, match="holds a run with other --" + name.replace("_", "-")):
            look(tmp_path, record_of(), record_of(**{name: value}))
    with pytest.raises(ValueError, match="--online-samples"):
        look(tmp_path, record_of(), record_of(online_samples=4))


@pytest.mark.parametrize("text", ["[]", "null", "{", "5", '{"recipe": 5}', '{"recipe": []}', "{}",
                                  "[" * 100_000])
def test_a_malformed_config_of_a_run_folder_is_one_line_that_names_it(text, tmp_path):
    with pytest.raises(ValueError, match=tmp_path.name):
        look(tmp_path, text, record_of())


# ---- cut answers, scores -----------------------------------------------------------------------------------

def test_the_best_teacher_is_not_chosen_by_rewards_that_are_none_or_not_finite():
    """totals of [1, nan, .5] depended on the order of the rows."""
    def row(*rewards):
        return {"candidates": [{"teacher": t, "reward": r} for t, r in zip("ab", rewards)]}

    assert pipeline.best_teacher([row(1.0, 0.5), row(0.0, 0.6)]) == "b"
    # one answer of b could not be scored
    assert pipeline.best_teacher([row(1.0), row(0.0, 0.6)]) == "b"
    for wrong in (None, float("nan"), float("inf"), "x"):
        with pytest.raises(ValueError, match="the reward of an answer of b"):
            pipeline.best_teacher([row(1.0, 0.5), row(0.0, wrong)])
    with pytest.raises(ValueError, match="scored no answer"):
        pipeline.best_teacher([row(), row()])


def test_candidates_that_the_arbiter_could_not_score_are_left_out():
    row = {"prompt": "p", "prompt_where": "f:1", "candidates": [{"teacher": "a", "reward": None},
                                                                {"teacher": "b", "reward": 0.0}]}
    assert pipeline.scored(row) == {"prompt": "p", "candidates": [{"teacher": "b", "reward": 0.0}]}
    assert (
        pipeline_results.mean_reward([{"reward": None}, {"reward": 2.0}]) == 2.0
        and pipeline_results.mean_reward([{"reward": None}]) is None
    )


def test_cut_answers_are_counted_for_each_language():
    rows = [{"question_id": str(i), "language": code, "completion": "x", "finish_reason": reason}
            for i, (code, reason) in enumerate([("sw", "length"), ("sw", "stop"), ("de", "stop")])]
    summary = summarize(rows)
    assert summary["cut"] == 1
    assert {code: part["cut"] for code, part in summary["by_language"].items()} == {"de": 0, "sw": 1}


def test_an_answer_carries_its_finish_reason_and_never_a_nul(own, monkeypatch):
    run = pipeline_steps.Run(own, config.Recipe(max_new_tokens=4), "cpu", CLUSTERS)
    rows = questions("train", 3, 0, level="tiny")
    answers = pipeline_steps.answers_of(run, own / "A", rows, num_samples=2)
    assert all(set(a) == {"completion", "finish_reason"} for group in answers for a in group)
    nul = [[{"completion": "a\0b", "finish_reason": "length", "ids": [], "logp": 0.0}]]
    monkeypatch.setattr(pipeline_steps, "answer_rows", lambda *args, **more: nul)
    assert pipeline_steps.answers_of(run, own / "A", rows[:1]) == [[{"completion": "a\ufffdb",
                                                            "finish_reason": "length"}]]


def test_the_counts_are_printed_in_one_line(capsys):
    pipeline.print_counts("pairs", {"pairs": 3, "equal_texts": 1, "wins": {"de": {}}, "cut": 2,
                           "cut_by_language": {"de": 2}})
    assert capsys.readouterr().out == "pairs: pairs 3, equal texts 1, cut 2 (cut by language: de 2)\n"


def test_the_page_of_a_recipe_that_has_scored_nothing_is_drawn(tmp_path):
    summary = {"judge": "arbiter", "models": [{"name": "base", "title": "B", "kind": "stage",
                                               "previous": None,
                                               "greedy": {"reward": None, "versus": {}, "num": 3}}]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert report.write_report(tmp_path).is_file()


@pytest.mark.long
def test_a_refused_recipe_of_two_ranks_is_refused_by_both_and_leaves_nothing(tmp_path):
    done = program(*TORCHRUN, "train.py", "recipe", "--preset", "smoke", "--out", tmp_path / "run",
                   "--batch-size", "33")
    assert done.returncode and "--batch-size 33 does not divide over 2 ranks" in done.stderr
    assert list(tmp_path.iterdir()) == []
