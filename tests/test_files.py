"""Plain files: strict JSON, files of a folder, what is ours to remove, publishing that overwrites nothing."""

import json
import multiprocessing
import os
import socket
import time

import pytest

from aya_min import files

# ---- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"b": {"a": 1, "a": 1}}', "the key 'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": [1, 1e999]}', "1e999 is beyond the range"),
        (b'{"a": -1e400}', "-1e400 is beyond the range"),
        (b'{"a": "cut \\ud83d"}', "'a' holds half a surrogate pair"),
        (b'{"b": {"c\\udc00": 1}}', "a key holds half a surrogate pair"),
        (b'{"b": ["x", {"c": "\\ud800"}]}', "half a surrogate pair"),
        (b'{"a": "nul \\u0000"}', "'a' holds a NUL"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"a": 1}}', "not JSON"),
        (b"", "not JSON"),
        (b"[1, 2", "not JSON"),
    ],
)
def test_json_that_could_not_be_written_again_as_it_came_is_refused_with_its_place(text, says):
    with pytest.raises(ValueError) as caught:
        files.parse_json(text, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ") and says in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_byte_order_mark_whole_surrogate_pairs_and_large_numbers_are_no_mistake():
    assert files.parse_json(
        b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": 12345678901234567890, "c": 1e308}', "x"
    ) == {"a": "\U0001f600", "b": 12345678901234567890, "c": 1e308}


@pytest.mark.parametrize("text", ["[1]", "5", "null", '"x"'])
def test_a_file_that_is_no_object_is_refused_by_name(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: a JSON .*, not an object"):
        files.read_json(tmp_path / "config.json")


def test_a_pipe_a_folder_and_a_missing_file_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, says in (
        ("pipe", "not a plain file"),
        ("folder", "not a plain file"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {says}"):
            files.read_json(tmp_path / name)
    with pytest.raises(ValueError, match="pipe: not a plain file"):
        files.sha256(tmp_path / "pipe")


def test_an_output_that_could_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    """`evaluate bias`, `in_context` and others found a missing folder when all was computed, and lost it."""
    (tmp_path / "taken").symlink_to("nowhere")
    for path, says in ((tmp_path / "taken", "exists; give a new file"),
                       (tmp_path / "none" / "f", "its folder does not exist; make it first")):
        with pytest.raises(ValueError, match=says):
            files.check_out(path)
    files.check_out(tmp_path / "new")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="its folder is not writable"):
        files.check_out(tmp_path / "new")


def test_numbers_that_are_no_json_are_never_written(tmp_path):
    with pytest.raises(ValueError):
        files.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1.0}, {"a": float("inf")}])
    assert list(tmp_path.iterdir()) == []


# ---- the files of a folder ---------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_refused_and_the_hub_cache_is_not(tmp_path):
    (tmp_path / "secret").write_text("x")
    model = tmp_path / "model"
    model.mkdir()
    (model / "in.json").symlink_to("config.json")
    (model / "config.json").write_text("{}")
    (model / "out.json").symlink_to("../secret")
    (model / "absolute.json").symlink_to(tmp_path / "secret")
    (model / "dangling.json").symlink_to("nowhere")
    assert files.own_file(model, "none.json") is None
    assert (
        files.own_file(model, "config.json")
        == model / "config.json"
        == files.own_file(model, "in.json").parent / "config.json"
    )
    for name in ("out.json", "absolute.json"):
        with pytest.raises(ValueError, match=f"{name}: a link out of the folder"):
            files.own_file(model, name)
    with pytest.raises(ValueError, match="dangling.json: not a plain file"):
        files.own_file(model, "dangling.json")
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert files.own_file(snapshot, "config.json") == snapshot / "config.json"
    (tmp_path / "alias").symlink_to(snapshot)
    assert files.own_file(tmp_path / "alias", "config.json")


# ---- what is ours to remove --------------------------------------------------------------------------------


def killed_in_scratch(path):
    with files.scratch(path) as folder:
        (folder / "half").write_text("half")
        os._exit(9)


def left_by_a_killed_process(path):
    process = multiprocessing.get_context("fork").Process(target=killed_in_scratch, args=(path,))
    process.start()
    process.join()
    return [one for one in path.parent.iterdir() if one.name.endswith(files.MARK)]


def test_what_a_killed_process_left_for_the_same_path_goes_with_the_next_and_nothing_else_does(tmp_path):
    (left,) = left_by_a_killed_process(tmp_path / "out")
    (other,) = set(left_by_a_killed_process(tmp_path / "another")) - {left}
    theirs = [
        tmp_path / "out.tmp",
        tmp_path / "out.tmp-2024",
        tmp_path / "out.partial",
        tmp_path / f".out.x{files.MARK}",
    ]
    for folder in theirs:
        folder.mkdir()
        (folder / "thesis.txt").write_text("thesis")
    with files.scratch(tmp_path / "out"):
        assert not left.exists() and other.exists()
    assert all((folder / "thesis.txt").read_text() == "thesis" for folder in theirs)
    assert {path for path in tmp_path.iterdir()} == {other, *theirs}


@pytest.mark.parametrize(
    "change",
    [
        {"host": "another-host"},
        {"process": os.getpid()},
        {"for": "to make something else"},
        {"made by": "somebody"},
        {"process": "x"},
    ],
)
def test_a_marked_folder_of_another_host_purpose_or_living_process_stays(change, tmp_path):
    (left,) = left_by_a_killed_process(tmp_path / "out")
    about = json.loads((left / files.MARK).read_text())
    (left / files.MARK).write_text(json.dumps(about | change))
    files.write_whole(tmp_path / "out", "new")
    assert (left / "half").read_text() == "half" and (tmp_path / "out").read_text() == "new"


def test_what_was_left_before_the_machine_started_anew_goes_even_if_the_number_is_taken_again(tmp_path):
    (left,) = left_by_a_killed_process(tmp_path / "out")
    about = json.loads((left / files.MARK).read_text())
    assert about["host"] == socket.gethostname()
    (left / files.MARK).write_text(json.dumps(about | {"boot": "before", "process": os.getpid()}))
    files.write_whole(tmp_path / "out", "new")
    assert not left.exists()


# ---- publishing --------------------------------------------------------------------------------------------


def test_new_files_appear_together_or_not_at_all_and_replace_nothing(tmp_path):
    out, pairs = tmp_path / "out.jsonl", tmp_path / "pairs.jsonl"
    out.write_text("theirs")
    with pytest.raises(ValueError, match="out.jsonl exists; .*nothing is overwritten"):
        files.write_new({pairs: "pairs", out: "out"})
    assert out.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="out.jsonl exists"):
        files.write_new({pairs: "pairs", out: "out"})
    assert not (tmp_path / "elsewhere").exists() and not pairs.exists()
    out.unlink()
    files.write_new({pairs: "pairs", out: "out"})
    assert (out.read_text(), pairs.read_text(), len(list(tmp_path.iterdir()))) == ("out", "pairs", 2)


def publish_at(path, text, begin, results):
    time.sleep(max(0, begin - time.monotonic()))
    try:
        files.write_new({path: text})
        results.put(text)
    except ValueError:
        results.put(None)


def test_of_processes_that_publish_one_file_at_the_same_moment_one_wins_and_the_others_are_told(tmp_path):
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        results, path = fork.SimpleQueue(), tmp_path / f"out-{attempt}"
        begin = time.monotonic() + 0.2
        processes = [
            fork.Process(target=publish_at, args=(path, f"text {i}", begin, results)) for i in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        won = [text for text in (results.get() for _ in processes) if text]
        assert [path.read_text()] == won


def test_a_file_is_published_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    files.write_new({tmp_path / "a": "text"})
    assert (tmp_path / "a").read_text() == "text"
    with pytest.raises(ValueError, match="a exists"):
        files.write_new({tmp_path / "a": "other"})
    assert (tmp_path / "a").read_text() == "text"


def test_a_folder_never_takes_the_place_of_anything_but_an_empty_one(tmp_path):
    for name in ("full", "file", "empty"):
        made = tmp_path / "made"
        made.mkdir()
        (made / "model").write_text("new")
        path = tmp_path / name
        path.write_text("theirs") if name == "file" else path.mkdir()
        if name == "full":
            (path / "thesis.txt").write_text("thesis")
        if name == "empty":
            files.publish_folder(made, path)
            assert (path / "model").read_text() == "new"
            continue
        with pytest.raises(ValueError, match=f"{name} exists"):
            files.publish_folder(made, path)
        assert (made / "model").exists()
        (made / "model").unlink()
        made.rmdir()
    assert (tmp_path / "full" / "thesis.txt").exists() and (tmp_path / "file").read_text() == "theirs"


def test_writing_again_replaces_a_link_and_does_not_follow_it(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "report.html").symlink_to(tmp_path / "theirs")
    files.write_whole(tmp_path / "report.html", "page")
    assert (tmp_path / "theirs").read_text() == "theirs" and (tmp_path / "report.html").read_text() == "page"
    assert not (tmp_path / "report.html").is_symlink()


def test_a_full_disk_is_told_with_the_files_name_and_leaves_nothing(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError) as caught:
        files.write_and_sync("/dev/full", "x" * 100_000)
    assert caught.value.filename == "/dev/full" and "No space left" in str(caught.value)
