"""merge.py and aya_min/soups.py: whole folders in, a whole folder out, or one line that says why not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aya_min import merging
from aya_min.soups import METHODS, merge_folders
from merge import main

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def tensors(seed, dtype=torch.bfloat16):
    """The tensors of a small model near a common one, of no architecture we know."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    shapes = {"body.embed.weight": (60, 8), "body.layers.0.proj.weight": (8, 24), "body.layers.0.scale": (8,), "score.weight": (1, 8), "temperature": ()}
    made = {name: torch.randn(shape, generator=common) + 0.01 * torch.randn(shape, generator=own) for name, shape in shapes.items()}
    return {name: tensor.to(dtype) for name, tensor in made.items()} | {"positions": torch.arange(5), "mask": torch.tensor([True, False, True])}


def write(folder, state, num_shards=1, vocab_size=60, tokenizer="{}"):
    folder.mkdir(parents=True)
    names = sorted(state)
    parts = [names[i::num_shards] for i in range(num_shards)]
    files = [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)] if num_shards > 1 else ["model.safetensors"]
    for file, part in zip(files, parts):
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, part in zip(files, parts) for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "torch_dtype": "bfloat16", "architectures": ["Unknown"]}))
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text('{"of": "%s"}' % folder.name)
    return folder


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / name, tensors(seed)) for seed, name in enumerate("ABC", 1)]


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", tensors(9))


def run(*arguments):
    return subprocess.run([sys.executable, "merge.py", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]), name


# what comes out

def test_the_command_merges_and_leaves_a_whole_folder_with_its_provenance(folders, tmp_path):
    out = tmp_path / "made" / "out"
    done = run("linear", *folders, "--weights", 0.5, 0.3, 0.2, "--out", out)
    assert done.returncode == 0, done.stderr
    expected = {name: merging.linear([tensors(seed)[name] for seed in (1, 2, 3)], [0.5, 0.3, 0.2]).bfloat16()
                for name in tensors(1) if tensors(1)[name].is_floating_point()}
    assert_equal(load_file(out / "model.safetensors"), expected | {name: tensors(1)[name] for name in ("positions", "mask")})
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "merge.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert (out / "tokenizer_config.json").read_text() == '{"of": "A"}'
    assert json.loads((out / "config.json").read_text()) == json.loads((folders[0] / "config.json").read_text())
    record = json.loads((out / "merge.json").read_text())
    assert record["method"] == "linear" and record["settings"] == {"weights": [0.5, 0.3, 0.2]}
    digest = hashlib.sha256((folders[1] / "model.safetensors").read_bytes()).hexdigest()
    assert record["inputs"][1] == {"folder": str(folders[1]), "sha256": {"model.safetensors": digest}}


def test_tensors_of_several_widths_are_written_aligned(folders, tmp_path):
    merge_folders(folders, tmp_path / "out", "linear")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    widths = {"BF16": 2, "I64": 8, "BOOL": 1}
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_one_bf16_model_merge_to_exactly_that_model(method, base, tmp_path):
    model = write(tmp_path / "A", tensors(1))
    copies = [model] * (2 if method == "slerp" else 3)
    merge_folders(copies, tmp_path / "out", method, base=base, density=1.0, weights=[1 / 3] * 3)
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), tensors(1))


@pytest.mark.parametrize("method", METHODS)
def test_sharded_files_in_and_out_give_the_tensors_of_single_files(method, folders, base, tmp_path):
    sharded = [write(tmp_path / f"{name}-sharded", tensors(seed), num_shards=3) for seed, name in ((1, "A"), (2, "B"), (3, "C"))]
    num = 2 if method == "slerp" else 3
    merge_folders(folders[:num], tmp_path / "single", method, base=base)
    merge_folders(sharded[:num], tmp_path / "shards", method, base=base, shard_bytes=600)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    states = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, state in states.items() for name in state}
    together = {name: tensor for state in states.values() for name, tensor in state.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in together.values())
    assert_equal(load_file(tmp_path / "single" / "model.safetensors"), together)
    merge_folders([tmp_path / "shards"], tmp_path / "again", "linear")                  # what we write, we read
    assert_equal(load_file(tmp_path / "again" / "model.safetensors"), together)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "slerp"])
def test_the_order_of_the_folders_does_not_matter(method, folders, base, tmp_path):
    merge_folders(folders, tmp_path / "one", method, base=base, weights=[0.5, 0.3, 0.2], dtype="float32")
    merge_folders(folders[::-1], tmp_path / "two", method, base=base, weights=[0.2, 0.3, 0.5], dtype="float32")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_the_settings_reach_the_method(folders, base, tmp_path):
    name, (a, b, c) = "body.embed.weight", [tensors(seed)["body.embed.weight"] for seed in (1, 2, 3)]
    of_base, weights = tensors(9)["body.embed.weight"], [1.0, 0.5, 0.25]
    expected = {"task-arithmetic": merging.task_arithmetic([a, b, c], of_base, weights, 0.7),
                "ties": merging.ties([a, b, c], of_base, weights, 0.3, 0.7),
                "dare-linear": merging.dare_linear([a, b, c], of_base, weights, 0.3, 0.7, 5, name),
                "dare-ties": merging.dare_ties([a, b, c], of_base, weights, 0.3, 0.7, 5, name)}
    for method, tensor in expected.items():
        flags = ["--weights", "1", "0.5", "0.25", "--lambda", "0.7", "--dtype", "float32"]
        flags += ["--density", "0.3"] if method != "task-arithmetic" else []
        flags += ["--seed", "5"] if method.startswith("dare") else []
        assert main([method, *map(str, folders), "--base", str(base), "--out", str(tmp_path / method), *flags]) == 0
        assert torch.equal(load_file(tmp_path / method / "model.safetensors")[name], tensor), method
    assert main(["slerp", *map(str, folders[:2]), "--t", "0.2", "--out", str(tmp_path / "slerp"), "--dtype", "float32"]) == 0
    assert torch.equal(load_file(tmp_path / "slerp" / "model.safetensors")[name], merging.slerp(a, b, 0.2))


def test_the_output_has_the_dtype_of_the_first_model_or_the_one_asked_for_and_config_says_so(tmp_path):
    first, second = write(tmp_path / "A", tensors(1)), write(tmp_path / "B", tensors(2, torch.float32))
    merge_folders([first, second], tmp_path / "own", "linear")
    merge_folders([first, second], tmp_path / "asked", "linear", dtype="float16")
    for out, dtype in (("own", torch.bfloat16), ("asked", torch.float16)):
        state = load_file(tmp_path / out / "model.safetensors")
        assert state["score.weight"].dtype == dtype and state["positions"].dtype == torch.int64
        assert json.loads((tmp_path / out / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_inputs_are_left_as_they_are(folders, base, tmp_path):
    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for folder in [*folders, base] for path in folder.iterdir()}
    before = state()
    merge_folders(folders, tmp_path / "out", "dare-ties", base=base)
    assert state() == before


def test_only_rank_zero_shows_the_progress_bar(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    merge_folders(folders, tmp_path / "one", "linear")
    assert "merge: 100%" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    merge_folders(folders, tmp_path / "two", "linear")
    assert capsys.readouterr().err == ""


# what is refused

def refused(capsys, *arguments):
    """The one line on standard error of a command that was refused."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured
    return captured.err


def test_a_refusal_is_exit_code_2_and_one_line_on_standard_error(folders, tmp_path):
    state = tensors(2)
    del state["score.weight"]
    write(tmp_path / "headless", state)
    for bad, words in (("headless", ["headless lacks score.weight"]), ("nowhere", ["nowhere: not a model folder"])):
        done = run("linear", folders[0], tmp_path / bad, "--out", tmp_path / "out")
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done
        assert all(word in done.stderr for word in words)
        assert not (tmp_path / "out").exists()


def test_all_differences_are_named_at_once(folders, tmp_path, capsys):
    state = tensors(2)
    state["body.layers.0.scale"] = torch.ones(9).bfloat16()
    state["lm_head.weight"] = torch.ones(60, 8).bfloat16()
    state["positions"] = torch.arange(5) + 1
    del state["score.weight"]
    other = write(tmp_path / "other", state, vocab_size=61, tokenizer="{ }")
    line = refused(capsys, "linear", *folders, other, "--out", tmp_path / "out")
    for words in (f"{other} lacks score.weight", f"{other} has lm_head.weight, which {folders[0]} lacks", "body.layers.0.scale is [9], in",
                  "positions is I64, has no average, and differs", "tokenizer.json is not that of", "vocab_size is 61, in"):
        assert words in line
    assert str(folders[1]) not in line and not (tmp_path / "out").exists()


def test_of_many_differences_twenty_are_named(tmp_path, capsys):
    one, other = write(tmp_path / "A", tensors(1)), write(tmp_path / "B", tensors(1) | {f"extra.{i:02d}": torch.ones(1) for i in range(50)})
    line = refused(capsys, "linear", one, other, "--out", tmp_path / "out")
    assert "extra.19" in line and "extra.20" not in line and "and 30 more" in line


def test_the_base_must_match_too(folders, tmp_path, capsys):
    base = write(tmp_path / "base", {name: tensor for name, tensor in tensors(9).items() if name != "temperature"})
    assert "base lacks temperature" in refused(capsys, "ties", *folders, "--base", base, "--out", tmp_path / "out")


def test_quantized_weights_are_refused(tmp_path, capsys):
    models = [write(tmp_path / name, tensors(1) | {"w": torch.ones(4).to(torch.float8_e4m3fn)}) for name in "AB"]
    assert "w is F8_E4M3, which cannot be merged" in refused(capsys, "linear", *models, "--out", tmp_path / "out")


def test_an_output_that_exists_or_is_an_input_is_refused_and_left_alone(folders, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(folders[1])
    assert "taken exists already" in refused(capsys, "linear", *folders, "--out", tmp_path / "taken")
    assert "A is one of the models to merge" in refused(capsys, "linear", *folders, "--out", folders[0])
    assert "link is one of the models to merge" in refused(capsys, "linear", *folders, "--out", tmp_path / "link")
    assert (tmp_path / "taken" / "file").read_text() == "mine" and len(list(folders[0].iterdir())) == 4


def test_a_shard_name_that_leaves_the_folder_is_refused(folders, tmp_path, capsys):
    sharded = write(tmp_path / "sharded", tensors(1), num_shards=2)
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", "../A/model.safetensors"))
    assert "'../A/model.safetensors' is not the name of a safetensors file in its own folder" in refused(capsys, "linear", sharded, folders[0], "--out", tmp_path / "o")


def test_files_that_are_not_whole_are_refused(folders, tmp_path, capsys):
    sharded = write(tmp_path / "sharded", tensors(1), num_shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: not a whole safetensors file" in refused(capsys, "linear", sharded, "--out", tmp_path / "o")
    sharded = write(tmp_path / "stale", tensors(1), num_shards=2)
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"score.weight"', '"score.wait"'))
    assert "the shards disagree on score.wait score.weight" in refused(capsys, "linear", sharded, "--out", tmp_path / "o")
    index.write_text("{")
    assert "index.json: not JSON" in refused(capsys, "linear", sharded, "--out", tmp_path / "o")
    whole = folders[1] / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-10])
    assert "B/model.safetensors: not a whole safetensors file" in refused(capsys, "linear", *folders, "--out", tmp_path / "o")


@pytest.mark.parametrize("arguments, words", [
    ("linear A B --weights 1", "1 weights for 2 models"),
    ("linear A B --weights 1 -1", "sum to 0"),
    ("linear A B --weights 1 nan", "not all finite"),
    ("linear A B --density 0.5", "unrecognized arguments: --density 0.5"),
    ("linear A B --dtype int8", "invalid choice: 'int8'"),
    ("slerp A B C", "slerp merges exactly two models, not 3"),
    ("slerp A B --t 1.5", "t is 1.5"),
    ("ties A B", "required: --base"),
    ("ties A B --base C --density 0", "density is 0.0"),
    ("ties A B --base C --weights 1 -1", "must not be negative"),
    ("dare-ties A B --base C --lambda inf", "lambda is inf"),
    ("bogus A B", "invalid choice: 'bogus'"),
])
def test_settings_without_a_meaning_are_refused(arguments, words, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments.split(), "--out", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B", "C"]


# what an interruption leaves

def test_a_merge_that_fails_in_the_middle_leaves_nothing(folders, tmp_path, capsys):
    state = tensors(2)
    state["temperature"] = torch.tensor(float("nan")).bfloat16()
    nan = write(tmp_path / "nan", state)
    large = write(tmp_path / "large", tensors(3) | {"temperature": torch.tensor(1e6).bfloat16()})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="temperature in .*nan/model.safetensors holds NaN"):
        merge_folders([folders[0], nan], tmp_path / "out", "linear")
    with pytest.raises(ValueError, match="temperature, merged, as torch.float16 holds NaN or infinite"):
        merge_folders([large], tmp_path / "out", "linear", dtype="float16")
    assert sorted(tmp_path.iterdir()) == before


def test_a_merge_killed_in_the_middle_leaves_no_folder_and_the_next_one_is_whole(tmp_path):
    state = {f"layers.{i}": torch.randn(1000, 1000, generator=torch.Generator().manual_seed(i)) for i in range(10)}
    folder, out, partial = write(tmp_path / "A", state), tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "merge.py", "dare-ties", folder, folder, folder, "--base", folder, "--out", out]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not partial.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists() and partial.exists() and not (partial / "config.json").exists()
    merge_folders([folder], out, "linear")
    assert_equal(load_file(out / "model.safetensors"), state)
    assert not partial.exists()
