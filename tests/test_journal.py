"""The journal of a long run: whose folder it is, what it takes for finished, how its output is published."""

import multiprocessing
import os

import pytest
from small import on_ranks

from aya_min import files, journal
from aya_min.journal import Journal


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.partial"


def left_behind(folder, **values):
    """A journal that a killed process left, with these values."""
    with Journal(folder, {"seed": 1}) as made:
        for key, value in values.items():
            made.add(key, value)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# whose folder it is

@pytest.mark.parametrize("names", [[], ["thesis.txt"], ["notes.jsonl"], ["settings.json"],
                                   ["0000-0000.jsonl"], ["settings.json", "0000-0000.jsonl"]])
def test_a_folder_that_is_not_ours_is_refused_by_name_and_stays_as_it_is(folder, names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text('{"seed": 1}\n')
    before = contents(folder)
    with pytest.raises(ValueError, match="out.partial is in the way: it was not made by this program"):
        Journal(folder, {"seed": 1})
    assert contents(folder) == before


def test_a_file_a_link_and_a_foreign_mark_in_its_place_are_refused_and_stay(folder, tmp_path):
    folder.write_text("thesis")
    with pytest.raises(ValueError, match="is in the way"):
        Journal(folder, {})
    assert folder.read_text() == "thesis"
    folder.unlink()
    left_behind(tmp_path / "other", a=1)
    for target in (tmp_path / "other", tmp_path / "nowhere"):
        folder.symlink_to(target)
        with pytest.raises(ValueError, match="is in the way"):
            Journal(folder, {"seed": 1})
        folder.unlink()
    folder.mkdir()
    files.mark(folder, "another purpose")
    with pytest.raises(ValueError, match="is in the way"):
        Journal(folder, {})


def test_a_file_that_others_put_into_it_stays_and_is_named(folder, capfd):
    with Journal(folder, {"seed": 1}) as made:
        made.add("a", 1)
        (folder / "thesis.txt").write_text("mine")
        made.remove()
    assert contents(folder) == {"thesis.txt": b"mine"}
    assert f"{folder} stays: thesis.txt was not made by this program" in capfd.readouterr().err
    with pytest.raises(ValueError, match="is in the way"):
        Journal(folder, {"seed": 1})


def test_a_users_jsonl_in_it_is_neither_read_nor_removed(folder):
    left_behind(folder, a=1)
    (folder / "notes.jsonl").write_text("no JSON\n")
    with Journal(folder, {"seed": 1}) as again:
        assert again.done == {"a": 1}
        again.remove()
    assert contents(folder) == {"notes.jsonl": b"no JSON\n"}


def test_nothing_is_left_of_a_run_that_was_refused_and_had_finished_nothing(folder, tmp_path):
    with pytest.raises(ValueError, match="no way on"), Journal(folder, {}):
        raise ValueError("no way on")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["none/out.partial", "x" * 300, "file/out.partial"])
def test_a_place_where_it_cannot_be_made_is_named_as_it_was_given(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{name}: cannot be made .*; give another name for the output"):
        Journal(tmp_path / name, {})


# settings

def test_other_settings_are_named_with_their_parts(folder):
    with Journal(folder, {"seed": 1, "files": {"a": "x", "b": "y"}}) as made:
        made.add("a", 1)
    with pytest.raises(ValueError, match=r"an unfinished run with other files \(b c\), seed; give the same"):
        Journal(folder, {"seed": 2, "files": {"a": "x", "b": "z", "c": ""}})
    with pytest.raises(ValueError, match="other new, seed"):
        Journal(folder, {"new": None, "files": {"a": "x", "b": "y"}})


def test_answers_without_the_settings_that_made_them_are_refused(folder):
    """A half removed journal gave another run's answers for those of this one."""
    left_behind(folder, a=1)
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds answers but not the settings that made them; remove it"):
        Journal(folder, {"seed": 2})
    assert (folder / "0000-0000.jsonl").exists()


def test_what_is_removed_goes_before_the_settings_and_the_mark(folder, monkeypatch):
    left_behind(folder, a=1)
    gone, unlink = [], journal.Path.unlink
    monkeypatch.setattr(journal.Path, "unlink",
                        lambda path, **how: gone.append(path.name) or unlink(path, **how))
    with Journal(folder, {"seed": 1}) as again:
        again.finishing([1])
        again.remove()
    assert gone[-2:] == ["settings.json", files.MARK] and {"0000-0000.jsonl", "0001-0000.jsonl"} < set(gone)
    assert not folder.exists()


@pytest.mark.parametrize("steps", range(4))
def test_a_kill_at_any_step_of_the_removal_leaves_what_the_next_run_takes_up(steps, folder, monkeypatch):
    unlink, done = journal.Path.unlink, []

    def dying(path, **how):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(path)
        unlink(path, **how)
    left_behind(folder, a=1)
    monkeypatch.setattr(journal.Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt), Journal(folder, {"seed": 1}) as dies:
        dies.remove()
    monkeypatch.setattr(journal.Path, "unlink", unlink)
    with Journal(folder, {"seed": 1 if steps < 3 else 2}) as again:     # without answers any settings will do
        assert again.done == ({} if steps else {"a": 1})
        again.remove()
    assert not folder.exists()


@pytest.mark.parametrize("text", ["[]", "5", "null", '{"seed": NaN}', "{", '{"seed": 1, "seed": 2}', ""])
def test_damaged_settings_are_one_line_with_the_file_and_what_to_do(folder, text):
    left_behind(folder, a=1)
    (folder / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings.json: [^\n]*remove [^\n]*out.partial to start anew$"):
        Journal(folder, {"seed": 1})


@pytest.mark.parametrize("line", ["", "x", "[1, 2]", '["a"]', '["a", 1, 2]', '{"a": 1}', '["a", NaN]',
                                  "[" * 100000, '["a", 1e999]', '["a", "text"]', '["\\ud800", 1]'])
def test_a_damaged_line_is_one_line_with_file_number_and_what_to_do(folder, line):
    left_behind(folder, a=1)
    with open(folder / "0000-0000.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"0000-0000.jsonl:2: .{0,200}remove the line, or [^\n]*out.partial"):
        Journal(folder, {"seed": 1}, lambda value: isinstance(value, int))


def test_a_line_that_a_kill_cut_short_is_not_read(folder):
    left_behind(folder, a=1)
    with open(folder / "0000-0000.jsonl", "a") as file:
        file.write('["b", 2')
    with Journal(folder, {"seed": 1}) as again:
        assert again.done == {"a": 1}


# two processes

def open_it(folder, results):
    try:
        Journal(folder, {"seed": 1})
        results.put("opened")
    except ValueError as error:
        results.put(str(error))


def test_a_second_live_process_is_refused_and_the_next_one_after_it_goes_on(folder):
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    with Journal(folder, {"seed": 1}) as made:
        made.add("a", 1)
        other = fork.Process(target=open_it, args=(folder, results))
        other.start()
        other.join()
        assert "another process is at work on it" in results.get()
    with Journal(folder, {"seed": 1}) as again:
        assert again.done == {"a": 1}


def test_a_process_that_was_killed_holds_no_lock(folder):
    def die():
        made = Journal(folder, {"seed": 1})
        made.add("a", 1)
        os._exit(9)
    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    with Journal(folder, {"seed": 1}) as again:
        assert again.done == {"a": 1}


def on_each_rank(folder):
    from aya_min import distributed
    with Journal(folder, {"seed": 1}) as made:
        before = sorted(made.done)
        made.add(f"rank {distributed.rank()} {len(before)}", 1)
    distributed.barrier()
    return before


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_share_one_journal_and_know_what_each_had_finished(folder, ranks):
    assert on_ranks(ranks, on_each_rank, folder) == [[]] * ranks
    names = [f"rank {rank} 0" for rank in range(ranks)]
    assert on_ranks(ranks, on_each_rank, folder) == [names] * ranks


# publishing

def test_outputs_appear_together_and_the_next_start_completes_them(folder, tmp_path, monkeypatch):
    texts = {str(tmp_path / "one"): "a\r\n\u2028b", str(tmp_path / "two"): "c"}
    link, made = files.publish_file, []

    def dying(source, path):
        if made:
            os._exit(9)                                 # between the first and the second
        made.append(link(source, path))

    def die():
        monkeypatch.setattr(files, "publish_file", dying)
        with Journal(folder, {"seed": 1}) as first:
            first.add("a", 1)
            first.publish(texts, "about")
    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == 9 and (tmp_path / "one").exists() and not (tmp_path / "two").exists()
    with Journal(folder, {"seed": 1}) as again:
        assert not again.finish_publishing(list(texts), "about something else")
        assert again.finish_publishing(list(texts), "about")
        again.remove()
    assert {path: open(path, newline="").read() for path in texts} == texts and not folder.exists()


def test_an_output_that_appeared_meanwhile_is_not_overwritten_and_the_other_not_written(folder, tmp_path):
    paths = [str(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(ValueError, match="two exists"), Journal(folder, {"seed": 1}) as made:
        made.add("a", 1)
        (tmp_path / "two").write_text("mine")
        made.publish(dict.fromkeys(paths, "ours"), None)
    assert not (tmp_path / "one").exists() and (tmp_path / "two").read_text() == "mine"
    (tmp_path / "two").unlink()
    with Journal(folder, {"seed": 1}) as again:
        assert again.done == {"a": 1} and again.finish_publishing(paths, None)
    assert (tmp_path / "two").read_text() == "ours"


def test_a_value_told_before_the_end_is_there_at_the_next_start(folder):
    with Journal(folder, {"seed": 1}) as made:
        assert made.finished is None
        made.add("a", 1)
        made.finishing({"sha256": "x"})
    with Journal(folder, {"seed": 1}) as again:
        assert again.finished == {"sha256": "x"} and not again.finish_publishing([], "generate's")
    for name in ("0000-0000.jsonl", "settings.json"):
        (folder / name).unlink()
    with Journal(folder, {"seed": 2}) as other:                 # after a kill in the clean-up, of another run
        assert other.finished is None and other.done == {}


def test_an_output_that_was_taken_away_after_a_kill_in_the_clean_up_is_made_again(folder, tmp_path):
    with Journal(folder, {"seed": 1}) as made:
        made.add("a", 1)
        made.publish({str(tmp_path / "one"): "a"}, None)
    (tmp_path / "one").unlink()
    (folder / "output-0").unlink()
    with Journal(folder, {"seed": 1}) as again:
        assert not again.finish_publishing([str(tmp_path / "one")], None) and again.done == {"a": 1}


def test_a_full_disk_names_the_file(folder):
    with Journal(folder, {"seed": 1}) as made:
        made.file.close()
        made.file = open("/dev/full", "w")
        with pytest.raises(OSError, match="0000-0000.jsonl"):
            made.add("a", "x" * 100_000)
        try:
            made.file.close()
        except OSError:
            pass


def test_values_that_are_no_json_are_refused_when_they_are_added(folder):
    with pytest.raises(ValueError), Journal(folder, {"seed": 1}) as made:
        made.add("a", float("nan"))
    assert not folder.exists()


def test_of_two_that_make_it_at_once_one_is_told_that_the_other_is_at_work(folder, monkeypatch):
    first = []

    def overtaken(made, path, publish=journal.publish_folder):
        if not first:
            first.append(None)
            first[0] = Journal(folder, {"seed": 1})
        publish(made, path)
    monkeypatch.setattr(journal, "publish_folder", overtaken)
    with pytest.raises(ValueError, match="another process is at work on it"):
        Journal(folder, {"seed": 2})
    first[0].add("a", 1)
    first[0].remove()
    assert list(folder.parent.iterdir()) == []


def test_a_full_disk_is_told_with_the_journals_file(tmp_path):
    """Closing the file failed a second time, without its name, and that was all that was said."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError) as caught, Journal(tmp_path / "out.partial", {}) as journal:
        journal.file.close()
        journal.file = open("/dev/full", "w", encoding="utf-8")
        journal.add("key", [{"completion": "x" * 100_000}])
    assert str(journal.path) == caught.value.filename and "No space left" in str(caught.value)
