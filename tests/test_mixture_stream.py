"""Mixtures that are read while a stage trains: the index, one row at a time, and exactness."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from small import (CPU, assert_close, language_model, logged, on_ranks, program, state_of, tokenizer,
                   write_world)

from aya_min import config, mixture_index, stages
from aya_min.data import load_examples
from aya_min.files import write_jsonl
from aya_min.mixture import main
from aya_min.mixture_index import index_of
from aya_min.mixture_rows import open_mixture, with_mixture
from aya_min.mixture_stream import load_or_stream


def write_spec(folder, sources, **more):
    (folder / "spec.json").write_text(json.dumps({"sources": sources, **more}))
    return folder / "spec.json"


@pytest.fixture
def world(tmp_path):
    """The world's conversations, some of them too long, and texts of up to several hundred tokens."""
    write_world(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    rows[5]["completion"] = rows[20]["completion"] = "word " * 300
    write_jsonl(tmp_path / "sft.jsonl", rows)
    write_jsonl(tmp_path / "texts.jsonl", [
        {"text": f"number {i} " * (1 + i * i), "language": "en", "task_type": "text"} for i in range(12)])
    sources = {"sft": {"files": ["sft.jsonl"], "weight": 3}, "texts": {"files": ["texts.jsonl"], "weight": 1}}
    write_spec(tmp_path, sources, seed=1)
    return tmp_path


# ---- one item is one example

def test_the_examples_are_those_of_the_file_that_the_command_writes(world):
    """But for the texts, whose parts end elsewhere."""
    main([str(world / "spec.json"), "--out", str(world / "mixed.jsonl")])
    stream = load_or_stream([open_mixture(world / "spec.json")], tokenizer(), 512)
    right = load_examples([world / "mixed.jsonl"], tokenizer(), 512)
    right = {example.ids.tobytes(): example for example in right}
    found = [stream.example(i) for i in range(len(stream)) if stream.parts[i] == 1]
    found = [example for example in found if example]
    assert len(found) > 30
    for example in found:
        other = right[example.ids.tobytes()]
        assert np.array_equal(example.mask, other.mask) and example.language == other.language


def test_the_parts_of_a_text_hold_each_of_its_tokens_once_and_fit(world):
    write_spec(world, {"texts": {"files": ["texts.jsonl"], "weight": 1}})
    stream = load_or_stream([open_mixture(world / "spec.json")], tokenizer(), 64)
    assert stream.parts.max() > 5
    texts = {}
    for i in range(len(stream)):
        example = stream.example(i)
        assert len(example.ids) <= 64
        texts.setdefault(example.where, []).append(example)
    for line, row in enumerate((world / "texts.jsonl").read_text().splitlines(), 1):
        examples = texts[f"{world / 'texts.jsonl'}:{line}"]
        ids = [int(each) for example in examples for each in example.ids[example.mask]]
        assert ids.count(tokenizer().end_of_turn_id) == 1 == (ids[-1] == tokenizer().end_of_turn_id)
        assert tokenizer().decode(ids[:-1]) == json.loads(row)["text"]
    assert not stream.left_out.places


def test_what_is_too_long_is_counted_and_the_next_drawn_row_stands_in(world, capsys):
    settings = config.SFT(max_length=200)
    stream = load_or_stream([open_mixture(world / "spec.json")], tokenizer(), 200, settings)
    left = [i for i in range(len(stream)) if stream.example(i) is None]
    assert len(left) == 2 and left[0] + 1 < left[1]
    stream.begin()
    for _ in range(2):                                  # two epochs
        assert np.array_equal(stream[left[0]].ids, stream[left[0] + 1].ids)
    stream.report()
    said = capsys.readouterr().err
    assert "1 rows, in 6 readings of rows, are longer than --max-length 200 tokens and" in said
    assert len(list(stream)) == len(stream)
    refusing = config.SFT(max_length=200, too_long="refuse")
    stream.reading = stream.left_out.reading = refusing
    with pytest.raises(ValueError, match="sft.jsonl:(6|21): [0-9]+ tokens, longer than --max-length 200"):
        stream[left[0]]


@pytest.mark.parametrize("row, message", [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, r"sft.jsonl:1: a preference pair .* \(1 of 4 drawn"),
    ({"prompt": "p", "completion": "<|im_start|> c"}, "1 of 4 rows spell control tokens .*sft.jsonl:1"),
    ({"messages": [{"role": "user", "content": "p"}]}, "sft.jsonl:1: the last message must be the")])
def test_rows_that_are_no_examples_are_refused_before_anything_trains(tmp_path, row, message):
    write_jsonl(tmp_path / "sft.jsonl", [row, *({"prompt": f"p{i}", "completion": "c"} for i in range(3))])
    spec = write_spec(tmp_path, {"a": {"files": ["sft.jsonl"], "weight": 1}})
    with pytest.raises(ValueError, match=message):
        load_or_stream([open_mixture(spec)], tokenizer(), 64)


def test_where_nothing_fits_the_stream_is_refused(world):
    with pytest.raises(ValueError, match="nothing to train on is left"):
        write_spec(world, {"sft": {"files": ["sft.jsonl"], "weight": 1}})
        load_or_stream([open_mixture(world / "spec.json")], tokenizer(), 3)


# ---- exactness

def run(world, out, resume=False, limit=100, **changes):
    settings = config.SFT(**{**dict(batch_size=8, max_steps=6, learning_rate=1e-3, warmup_steps=2,
                                    max_length=limit, schedule="constant"), **changes})
    data = with_mixture([world / "spec.json"], settings, show=lambda line: None)
    stages.train_stage("sft", language_model(), tokenizer(), data, settings, out, CPU, resume=resume)
    return out


def test_micro_batches_ranks_and_a_resume_train_the_same(world, tmp_path, capsys):
    """On loss and gradient norm; rows are left out on the way, and others stand in."""
    whole = logged(run(world, tmp_path / "whole"))
    said = capsys.readouterr().err
    assert "readings of rows, are longer than --max-length 100 tokens and are left out" in said
    assert_close(logged(run(world, tmp_path / "ones", micro_batch_size=1)), whole, rtol=2e-5, atol=1e-6)
    on_ranks(2, run, world, tmp_path / "ranks")
    assert_close(logged(tmp_path / "ranks"), whole, rtol=2e-5, atol=1e-6)
    run(world, tmp_path / "stopped", max_steps=3)
    assert logged(run(world, tmp_path / "stopped", resume=True)) == whole
    assert {name: tensor.tolist() for name, tensor in state_of(tmp_path / "stopped").items()} == \
        {name: tensor.tolist() for name, tensor in state_of(tmp_path / "whole").items()}


def test_a_resume_with_another_spec_or_another_file_is_refused(world, tmp_path):
    run(world, tmp_path / "run", max_steps=1)
    before = (world / "spec.json").read_text()
    (world / "spec.json").write_text(before.replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ValueError, match="other data: .*spec.json"):
        run(world, tmp_path / "run", resume=True)
    (world / "spec.json").write_text(before)
    with open(world / "texts.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match="other data: .*spec.json"):
        run(world, tmp_path / "run", resume=True)


def test_other_stages_read_the_drawn_rows_into_memory_and_say_so(world, tmp_path, capsys):
    spec = write_spec(world, {"pairs": {"files": ["pairs.jsonl"], "weight": 1}}, total=20)
    settings = config.DPO(batch_size=8, max_steps=2, max_length=256)
    data = with_mixture([spec], settings)
    stages.train_stage("dpo", language_model(), tokenizer(), data, settings, tmp_path / "dpo", CPU)
    err = capsys.readouterr().err
    assert "20 rows, 0 MB, are read into memory" in err and "makes 0.8 passes over these 20 rows," in err
    assert len(logged(tmp_path / "dpo")) == 2


def test_columns_and_other_files_beside_a_spec_are_refused(world):
    with pytest.raises(ValueError, match="--columns beside the spec"):
        with_mixture([world / "spec.json"], config.SFT(columns={"prompt": "q"}))
    with pytest.raises(ValueError, match="a spec stands alone"):
        with_mixture([world / "spec.json", world / "sft.jsonl"], config.SFT())


def test_a_folder_at_fault_is_said_before_the_files_are_indexed(world, tmp_path):
    done = program("train.py", "sft", "--model", tmp_path, "--data", world / "spec.json", "--out",
                   tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "not a model folder" in done.stderr


@pytest.mark.long
def test_the_command_trains_a_tokenizer_and_a_model_on_a_spec_and_resumes(world, tmp_path):
    flags = "--model", "smoke", "--data", world / "spec.json", "--batch-size", 4, "--max-length", 100
    done = program("train.py", "pretrain", *flags, "--out", tmp_path / "run", "--max-steps", 2)
    assert done.returncode == 0 and "texts" in done.stderr and "epochs" in done.stderr, done.stderr
    done = program("train.py", "pretrain", "--resume", tmp_path / "run", "--max-steps", 2)
    assert done.returncode == 0, done.stderr
    done = program("train.py", "sft", *flags, "--dry-run")
    assert done.returncode == 0 and "at most 1,000 of" in done.stderr, done.stderr
    done = program("train.py", "sft", *flags, "--eval-data", world / "spec.json", "--out", tmp_path / "no")
    assert done.returncode == 2 and "--eval-data takes JSONL files" in done.stderr


# ---- the index

@pytest.fixture
def kept(world, monkeypatch):
    """The world, where indexes are kept beside files of any size."""
    monkeypatch.setattr(mixture_index, "KEPT", 1)
    return world


def indexes(folder):
    return sorted(folder.glob("*.index.safetensors"))


def test_a_kept_index_is_read_again_and_says_the_same(kept, monkeypatch):
    first = index_of(kept / "sft.jsonl")
    assert len(indexes(kept)) == 1
    monkeypatch.setattr(mixture_index, "make_index", None)
    again = index_of(kept / "sft.jsonl")
    assert (first.sha256, first.groups, first.stamp) == (again.sha256, again.groups, again.stamp)
    for name in mixture_index.ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(again, name))
    lines = (kept / "sft.jsonl").read_bytes().split(b"\n")
    data = (kept / "sft.jsonl").read_bytes()
    for start, size, line in zip(again.start, again.size, again.line):
        assert data[start:start + size].strip() == lines[line - 1]


def test_a_changed_file_is_indexed_anew_and_the_stale_index_is_named(kept, capsys):
    index_of(kept / "sft.jsonl")
    with open(kept / "sft.jsonl", "a") as file:
        file.write('\n{"text": "more"}\n')
    old = indexes(kept)[0]
    index = index_of(kept / "sft.jsonl")
    assert str(old) in capsys.readouterr().err and len(indexes(kept)) == 2
    assert len(index.start) == 37 and index.line[-1] == 38
    os.utime(kept / "sft.jsonl", ns=(1, 1))
    index_of(kept / "sft.jsonl")
    assert len(indexes(kept)) == 3


def test_a_foreign_or_damaged_index_is_refused_and_never_overwritten(kept):
    index_of(kept / "sft.jsonl")
    index_of(kept / "texts.jsonl")
    mine, other = indexes(kept)
    for content in (other.read_bytes(), mine.read_bytes()[:-1] + b"\xff", b"notes"):
        mine.write_bytes(content)
        with pytest.raises(ValueError, match="not the index of .*remove it"):
            index_of(kept / "sft.jsonl")
        assert mine.read_bytes() == content


def test_where_an_index_cannot_be_written_it_is_not_kept_and_a_line_says_so(kept, capsys, monkeypatch):
    def full(*_):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(mixture_index, "save_file", full)
    assert len(index_of(kept / "sft.jsonl").start) == 36
    err = capsys.readouterr().err
    assert "cannot be kept" in err and "Read-only" in err and not indexes(kept)


def test_a_file_that_changes_while_it_is_read_is_refused(world):
    mixture = open_mixture(world / "spec.json")
    mixture.row(0)
    text = (world / "sft.jsonl").read_text()
    (world / "sft.jsonl").write_text(text + " ")
    with pytest.raises(ValueError, match="sft.jsonl: it changed while it was read"):
        [mixture.row(i) for i in range(len(mixture))]


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """8 MB of rows are indexed, drawn and read within 1 MB."""
    text = "a word or two " * 280
    with open(tmp_path / "large.jsonl", "w") as file:
        for i in range(2000):
            file.write(json.dumps({"prompt": f"question {i}", "completion": text, "language": "en"}) + "\n")
    spec = write_spec(tmp_path, {"large": {"files": ["large.jsonl"], "weight": 1}})
    open_mixture(spec)                                  # what is imported and cached on first use
    tracemalloc.start()
    mixture = open_mixture(spec)
    for i in range(len(mixture)):
        assert len(mixture.row(i)[1]["completion"]) == len(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert os.path.getsize(tmp_path / "large.jsonl") > 7_500_000 and peak < 1_000_000, peak
