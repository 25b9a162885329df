"""merge.py, aya_min/merge_folders.py and aya_min/merge_config.py: whole folders in, a whole folder out, or
one line that says why not."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small import ROOT, language_model, program, reward_model, tokenizer
from tqdm import tqdm

from aya_min import merge_methods, tensorfiles, weights
from aya_min.command import guarded
from aya_min.files import Digests, mark
from aya_min.merge_config import METHODS, Method, from_config, number_at
from aya_min.merge_folders import compare_folders, merge_folders
from merge import main, weight_files

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import make_mergekit                                                # noqa: E402
import make_transformers                                            # noqa: E402

WEIGHED = [method for method in METHODS if "weights" in METHODS[method].settings]


def tensors(seed, dtype=torch.bfloat16):
    """The tensors of a small model near a common one, of no architecture we know."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    shapes = {
        "body.embed.weight": (60, 8),
        "body.layers.0.proj.weight": (8, 24),
        "body.layers.0.scale": (8,),
        "score.weight": (1, 8),
        "temperature": (),
        "none": (0, 3),
    }
    made = {
        name: torch.randn(shape, generator=common) + 0.01 * torch.randn(shape, generator=own)
        for name, shape in shapes.items()
    }
    return {name: tensor.to(dtype) for name, tensor in made.items()} | {
        "positions": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
    }


def write(folder, state, num_shards=1, vocab_size=60, tokenizer="{}", **config):
    folder.mkdir(parents=True)
    names = sorted(state)
    parts = [names[i::num_shards] for i in range(num_shards)]
    files = (
        [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]
        if num_shards > 1
        else ["model.safetensors"]
    )
    for file, part in zip(files, parts):
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    if num_shards > 1:
        index = {
            "metadata": {},
            "weight_map": {name: file for file, part in zip(files, parts) for name in part},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps(
            {"vocab_size": vocab_size, "torch_dtype": "bfloat16", "architectures": ["Unknown"], **config}
        )
    )
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text('{"of": "%s"}' % folder.name)
    return folder


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / name, tensors(seed)) for seed, name in enumerate("ABC", 1)]


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", tensors(9))


def run(*arguments, **options):
    return program("merge.py", *arguments, **options)


def state_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def given(method, **settings):
    """Those of the given settings that the method takes."""
    return {key: value for key, value in settings.items() if key in METHODS[method].settings}


def in_memory(method, name, seeds=(1, 2, 3), **settings):
    """One tensor of the models of these seeds, merged whole, fp32."""
    more = ({"base": tensors(9)[name]} if "base" in METHODS[method].settings else {}) | (
        {"name": name} if "seed" in METHODS[method].settings else {}
    )
    return merge_methods.merge(
        getattr(merge_methods, method.replace("-", "_")),
        [tensors(seed)[name] for seed in seeds],
        **more,
        **settings,
    )


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]), name


# what comes out

def test_the_command_merges_and_leaves_a_whole_folder_with_its_provenance(folders, tmp_path):
    out = tmp_path / "made" / "out"
    done = run("linear", *folders, "--weights", 0.5, 0.3, 0.2, "--out", out)
    assert done.returncode == 0, done.stderr
    expected = {
        name: in_memory("linear", name, weights=[0.5, 0.3, 0.2]).bfloat16()
        for name in tensors(1)
        if tensors(1)[name].is_floating_point()
    }
    assert_equal(
        load_file(out / "model.safetensors"),
        expected | {name: tensors(1)[name] for name in ("positions", "mask")},
    )
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "tokenizer_config.json").read_text() == '{"of": "A"}'
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folders[0] / "config.json").read_text()
    )
    record = json.loads((out / "merge.json").read_text())
    assert record["config"] == {
        "merge_method": "linear",
        "parameters": {"normalize": True},
        "models": [
            {"model": str(folder), "parameters": {"weight": weight}}
            for folder, weight in zip(folders, (0.5, 0.3, 0.2))
        ],
    }
    digest = hashlib.sha256((folders[1] / "model.safetensors").read_bytes()).hexdigest()
    assert record["inputs"][1] == {"folder": str(folders[1]), "sha256": {"model.safetensors": digest}}


def test_without_hashes_the_merge_is_the_same_and_the_record_says_that_there_are_none(
    folders, tmp_path, monkeypatch
):
    assert main(["linear", *map(str, folders), "--out", str(tmp_path / "one")]) == 0
    hashed = []
    monkeypatch.setattr(Digests, "of", lambda _, path: hashed.append(path))
    assert main(["linear", *map(str, folders), "--no-hashes", "--out", str(tmp_path / "two")]) == 0
    assert_equal(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    records = [json.loads((tmp_path / name / "merge.json").read_text()) for name in ("one", "two")]
    assert records[1]["inputs"] == [
        {"folder": str(folder), "sha256": {"model.safetensors": None}} for folder in folders
    ]
    assert records[0]["config"] == records[1]["config"] and not hashed


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
    merge_folders(
        copies, tmp_path / "out", method, **given(method, base=base, density=1.0, weights=[1 / 3] * 3)
    )
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), tensors(1))


@pytest.mark.parametrize("method", METHODS)
def test_sharded_files_in_and_out_give_the_tensors_of_single_files(method, folders, base, tmp_path):
    sharded = [
        write(tmp_path / f"{name}-sharded", tensors(seed), num_shards=3)
        for seed, name in ((1, "A"), (2, "B"), (3, "C"))
    ]
    num = 2 if method == "slerp" else 3
    merge_folders(folders[:num], tmp_path / "single", method, **given(method, base=base))
    merge_folders(sharded[:num], tmp_path / "shards", method, **given(method, base=base), shard_bytes=600)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    states = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, state in states.items() for name in state}
    together = {name: tensor for state in states.values() for name, tensor in state.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in together.values())
    assert_equal(load_file(tmp_path / "single" / "model.safetensors"), together)
    merge_folders([tmp_path / "shards"], tmp_path / "again", "linear")  # what we write, we read
    assert_equal(load_file(tmp_path / "again" / "model.safetensors"), together)


@pytest.mark.parametrize("method", WEIGHED)
def test_the_order_of_the_folders_does_not_matter(method, folders, base, tmp_path):
    merge_folders(
        folders,
        tmp_path / "one",
        method,
        **given(method, base=base),
        weights=[0.5, 0.3, 0.2],
        dtype="float32",
    )
    merge_folders(
        folders[::-1],
        tmp_path / "two",
        method,
        **given(method, base=base),
        weights=[0.2, 0.3, 0.5],
        dtype="float32",
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


FLAGS = {
    "weights": ("1 0.5 0.25", [1.0, 0.5, 0.25]),
    "density": ("0.3", [0.3] * 3),
    "lambda": ("0.7", 0.7),
    "seed": ("5", 5),
    "t": ("0.2", 0.2),
    "convention": ("mergekit", "mergekit"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_reaches_the_method_and_changes_the_result(method, folders, base, tmp_path):
    name, num = "body.embed.weight", 2 if method == "slerp" else 3
    takes = {{"lam": "lambda"}.get(setting, setting) for setting in METHODS[method].settings} & FLAGS.keys()
    common = [
        method,
        *folders[:num],
        "--dtype",
        "float32",
        *(["--base", base] if "base" in METHODS[method].settings else []),
    ]

    def result(out, *flags):
        assert main([*map(str, common), *flags, "--out", str(tmp_path / out)]) == 0
        return load_file(tmp_path / out / "model.safetensors")[name]

    all_of_them = [word for flag in sorted(takes) for word in [f"--{flag}", *FLAGS[flag][0].split()]]
    settings = {{"lambda": "lam"}.get(flag, flag): FLAGS[flag][1] for flag in takes}
    assert torch.equal(result("all", *all_of_them), in_memory(method, name, (1, 2, 3)[:num], **settings))
    plain = result("plain", *(["--weights", "1", "0.5", "0.25"] if "weights" in takes else []))
    for flag in takes - {"weights", "convention"}:
        assert not torch.equal(
            result(
                flag,
                *(["--weights", "1", "0.5", "0.25"] if "weights" in takes else []),
                f"--{flag}",
                *FLAGS[flag][0].split(),
            ),
            plain,
        ), flag
    if "normalize" in METHODS[method].settings:
        other = "--no-normalize" if METHODS[method].settings["normalize"] else "--normalize"
        assert not torch.equal(result("normalize", "--weights", "1", "0.5", "0.25", other), plain)


def test_the_paper_s_ties_trims_the_task_vector_of_the_whole_model_and_mergekit_s_each_tensor(base, tmp_path):
    state = tensors(9)
    names = [name for name in state if state[name].is_floating_point()]
    scales = {"temperature": 10.0, "body.layers.0.scale": 1e-3}
    moved = {
        name: (
            state[name]
            + scales.get(name, 0.1)
            * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(i))
        ).bfloat16()
        for i, name in enumerate(names)
    }
    model = write(tmp_path / "moved", state | moved)

    def kept(convention):
        merged = state_of(
            merge_folders(
                [model],
                tmp_path / convention,
                "ties",
                base=base,
                density=0.25,
                dtype="float32",
                convention=convention,
            )
        )
        return {name: merged[name] != state[name].float() for name in names}
    deltas = torch.cat([(moved[name].float() - state[name].float()).flatten() for name in names])
    threshold = deltas.abs().sort(descending=True).values[int(0.25 * len(deltas)) - 1]
    whole, each = kept("paper"), kept("mergekit")
    assert torch.equal(torch.cat([mask.flatten() for mask in whole.values()]), deltas.abs() >= threshold)
    assert (
        whole["temperature"].all()
        and not whole["body.layers.0.scale"].any()
        and each["body.layers.0.scale"].sum() == 2
    )


@pytest.mark.parametrize(
    "method, settings",
    [
        ("linear", {"weights": [1, 2, 3]}),
        ("slerp", {"t": 0.3}),
        ("model-stock", {}),
        ("ties", {"weights": [1, 2, 3], "density": [0.4] * 3, "convention": "mergekit"}),
    ],
)
def test_tensors_larger_than_a_piece_merge_as_in_memory(
    method, settings, folders, base, tmp_path, monkeypatch
):
    monkeypatch.setattr("aya_min.merge_folders.PIECE", 64)
    num = 2 if method == "slerp" else 3
    state = state_of(
        merge_folders(
            folders[:num], tmp_path / "out", method, **settings, **given(method, base=base), dtype="float32"
        )
    )
    for name in ("body.embed.weight", "body.layers.0.proj.weight", "temperature"):
        torch.testing.assert_close(state[name], in_memory(method, name, (1, 2, 3)[:num], **settings))


def layered(value, num_layers=5):
    """Tensors of one number in layers, in front of them and behind."""
    names = ["model.embed.weight", "model.norm.weight"] + [
        f"model.layers.{i}.{part}.weight" for i in range(num_layers) for part in ("self_attn.q", "mlp.up")
    ]
    return {name: torch.full((3,), value) for name in names}


def test_a_gradient_runs_over_the_layers_and_a_filter_picks_by_name(tmp_path):
    zeros, ones = write(tmp_path / "zeros", layered(0.0)), write(tmp_path / "ones", layered(1.0))
    filters = [
        {"filter": "self_attn", "value": [0, 1, 0]},
        {"filter": "layers.2", "value": 7},
        {"value": 0.5},
    ]
    state = state_of(
        merge_folders([zeros, ones], tmp_path / "out", "linear", weights=[1.0, filters], normalize=False)
    )
    assert [state[f"model.layers.{i}.self_attn.q.weight"][0].item() for i in range(5)] == [0, 0.5, 1, 0.5, 0]
    assert [state[f"model.layers.{i}.mlp.up.weight"][0].item() for i in range(5)] == [
        0.5,
        0.5,
        7,
        0.5,
        0.5,
    ] and state["model.norm.weight"][0] == 0.5
    assert (
        main(["slerp", str(zeros), str(ones), "--t", "0", "0.5", "1", "--out", str(tmp_path / "slerp")]) == 0
    )
    state = state_of(tmp_path / "slerp")
    assert [state[f"model.layers.{i}.mlp.up.weight"][0].item() for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert (
        state["model.embed.weight"][0] == state["model.norm.weight"][0] == 0
    )  # outside the layers: the first value, as in mergekit
    assert [number_at([0, 1, 0.5], "", depth) for depth in (0, 0.25, 0.75, 1)] == [
        0,
        0.5,
        0.75,
        0.5,
    ] and number_at([3], "", 0.9) == number_at(3, "", 0.1) == 3


def test_the_output_has_the_dtype_of_the_first_model_or_the_one_asked_for_and_config_says_so(tmp_path):
    first, second, third = (
        write(tmp_path / "A", tensors(1)),
        write(tmp_path / "B", tensors(2, torch.float32)),
        write(tmp_path / "C", tensors(3, torch.float16)),
    )
    expected = merge_methods.merge(
        merge_methods.linear,
        [
            tensors(1)["score.weight"],
            tensors(2, torch.float32)["score.weight"],
            tensors(3, torch.float16)["score.weight"],
        ],
        weights=[1, 1, 1],
    )
    for out, dtype in (("own", torch.bfloat16), ("asked", torch.float16)):
        merge_folders(
            [first, second, third], tmp_path / out, "linear", dtype=None if out == "own" else "float16"
        )
        state = load_file(tmp_path / out / "model.safetensors")
        assert (
            state["score.weight"].dtype == dtype
            and state["positions"].dtype == torch.int64
            and torch.equal(state["score.weight"], expected.to(dtype))
        )
        assert json.loads((tmp_path / out / "config.json").read_text())["torch_dtype"] == str(
            dtype
        ).removeprefix("torch.")


def test_a_head_that_is_tied_and_written_all_the_same_is_left_out(tmp_path):
    """Merged by itself it would not be the embedding's merge any more: DARE's masks go by the tensor's
    name."""
    states = [
        {"model.embed_tokens.weight": torch.full((6, 2), value), "model.norm.weight": torch.ones(2)}
        for value in (1.0, 3.0)
    ]
    tied = write(
        tmp_path / "tied",
        states[0] | {"lm_head.weight": states[0]["model.embed_tokens.weight"].clone()},
        tie_word_embeddings=True,
    )
    plain = write(tmp_path / "plain", states[1], tie_word_embeddings=True)
    for models in ([tied, plain], [plain, tied]):
        assert (
            state_of(merge_folders(models, tmp_path / models[0].name / "out", "linear")).keys()
            == states[0].keys()
        )
    untied = [
        write(
            tmp_path / f"untied-{i}", state | {"lm_head.weight": torch.ones(6, 2)}, tie_word_embeddings=False
        )
        for i, state in enumerate(states)
    ]
    assert "lm_head.weight" in state_of(merge_folders(untied, tmp_path / "out", "linear"))


def test_the_inputs_are_left_as_they_are(folders, base, tmp_path):
    """By every method, by a comparison, and by merges that are refused or fail in the middle."""
    other = write(tmp_path / "other", {**tensors(2), "score.weight": torch.ones(1, 9)})
    nan = write(tmp_path / "nan", {**tensors(2), "score.weight": torch.full((1, 8), torch.nan)})

    def state():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for folder in [*folders, base, other, nan]
            for path in folder.iterdir()
        }
    before = state()
    for method in METHODS:
        merge_folders(folders[:2], tmp_path / method, method, **given(method, base=base))
        for bad in (other, nan):
            with pytest.raises(ValueError):
                merge_folders([folders[0], bad], tmp_path / "out", method, **given(method, base=base))
    compare_folders(*folders[:2], base)
    with pytest.raises(ValueError):
        merge_folders(folders, folders[1], "linear")
    assert state() == before


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_task_vectors_that_are_equal_or_opposite_have_a_merge(method, base, tmp_path):
    """F23: what has no angle, no sign or no length. The base itself merges to the base, and so do opposite
    moves of one length."""
    start = {"w": torch.arange(1.0, 9.0)}
    states = {
        "start": start,
        "there": {"w": start["w"] + 0.5},
        "back": {"w": start["w"] - 0.5},
        "zeros": {"w": torch.zeros(8)},
    }
    place = {name: write(tmp_path / "in" / name, state) for name, state in states.items()}

    def merged(one, two, out, base="start"):
        settings = given(method, base=place[base], density=1.0, weights=[0.5, 0.5])
        return state_of(merge_folders([place[one], place[two]], tmp_path / out, method, **settings))["w"]
    torch.testing.assert_close(merged("start", "start", "none"), start["w"])
    torch.testing.assert_close(merged("there", "there", "alike"), states["there"]["w"])
    torch.testing.assert_close(merged("there", "back", "opposite"), start["w"], rtol=1e-2, atol=1e-2)
    assert (merged("zeros", "zeros", "zeros", base="zeros") == 0).all()


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("method", METHODS)
def test_the_bar_ends_at_all_bytes_of_all_passes(method, convention, folders, base, tmp_path, monkeypatch):
    """The scans that a method declares in METHODS are those that it makes."""
    ends = []

    class Bar(tqdm):
        def close(self):
            ends.append((self.n, self.total))
            super().close()
    monkeypatch.setattr("aya_min.command.tqdm", Bar)
    merge_folders(folders[:2], tmp_path / "out", method, **given(method, base=base, convention=convention))
    done, total = ends[0]
    assert done == total > 0


def test_a_new_method_is_a_function_and_an_entry(folders, base, tmp_path, monkeypatch):
    """A method whose scan of the whole model gives it the largest move of all, which it adds to the base."""
    def largest_move(over, seed, **others):
        largest = max(
            over(lambda start, tensors: (tensors[0].float() - tensors[1].float()).abs().max().item())
        )
        return {"move": largest + seed}

    def shift(over, move, seed, name):
        return lambda start, tensors: tensors[1].float() + move
    monkeypatch.setattr(merge_methods, "largest_move", largest_move, raising=False)
    monkeypatch.setattr(merge_methods, "shift_all", shift, raising=False)
    entry = Method({"base": None, "seed": 0}, model_scans={"paper": "largest_move"})
    monkeypatch.setitem(METHODS, "shift-all", entry)
    out = merge_folders(folders[:1], tmp_path / "out", "shift-all", base=base, seed=2, dtype="float32")
    moved, started, merged = state_of(folders[0]), state_of(base), state_of(out)
    floats = [name for name in started if started[name].is_floating_point() and started[name].numel()]
    move = max((moved[name].float() - started[name].float()).abs().max().item() for name in floats) + 2
    assert_equal(
        {name: merged[name] for name in floats}, {name: started[name].float() + move for name in floats}
    )
    assert from_config(json.loads((out / "merge.json").read_text())["config"])["method"] == "shift-all"


def test_torch_has_its_threads_back_after_a_merge(folders, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        one = state_of(merge_folders(folders, tmp_path / "three", "linear"))
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError):
            merge_folders(
                [write(tmp_path / "nan", tensors(1) | {"score.weight": torch.full((1, 8), torch.nan)})],
                tmp_path / "none",
                "linear",
            )
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        assert_equal(one, state_of(merge_folders(folders, tmp_path / "one", "linear")))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [language_model, reward_model])
def test_models_of_this_project_merge_and_load(make, tmp_path):
    for seed in (1, 2):
        weights.save(tmp_path / str(seed), make(seed), tokenizer(), dtype=torch.bfloat16, shard_bytes=20_000)
    out = merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "out", "slerp")
    merged, _ = weights.load(out)
    assert type(merged) is type(make(1)) and merged.state_dict().keys() == state_of(out).keys()


@pytest.fixture(scope="module")
def by_transformers(tmp_path_factory):
    place = tmp_path_factory.mktemp("transformers")
    with zipfile.ZipFile(make_transformers.ZIP) as packed:
        packed.extractall(place)
    return place


@pytest.mark.parametrize("case", make_transformers.CASES)
def test_sharded_folders_that_transformers_wrote_merge_to_what_a_hand_merge_of_them_gives(
    case, by_transformers, tmp_path
):
    """make_transformers.py, which made them, also loaded every outcome with transformers: no tensor
    missing or unexpected, the logits of the merge by hand."""
    place, (_, dtype, _) = by_transformers / case, make_transformers.CASES[case]
    states = [make_transformers.state_of(place / name) for name in ("A", "B", "base")]
    assert len(list((place / "A").glob("*.safetensors"))) > 2 and {
        tensor.dtype for tensor in states[0].values()
    } == {dtype}
    for method in make_transformers.FLAGS:
        assert main(make_transformers.command(method, place, tmp_path / method)) == 0
        merged, expected = state_of(tmp_path / method), make_transformers.by_hand(method, *states)
        assert merged.keys() == expected.keys() == states[0].keys()
        for name, tensor in merged.items():
            assert tensor.dtype == dtype and tensor.shape == states[0][name].shape
            torch.testing.assert_close(
                tensor, expected[name].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6
            )
        assert any(not torch.equal(merged[name], states[0][name]) for name in merged)
        assert json.loads((tmp_path / method / "config.json").read_text()) == json.loads(
            (place / "A" / "config.json").read_text()
        )
        assert (tmp_path / method / "generation_config.json").read_bytes() == (
            place / "A" / "generation_config.json"
        ).read_bytes()


def test_merges_load_in_transformers_and_merge_from_what_it_saves(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; run by hand where it is"
    )
    config = transformers.CohereConfig(
        vocab_size=400,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    for seed, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        torch.manual_seed(seed)
        transformers.CohereForCausalLM(config).to(dtype).save_pretrained(
            tmp_path / str(seed), max_shard_size="20KB"
        )
        tokenizer().save(tmp_path / str(seed))
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1
    out = merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "out", "linear")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == torch.bfloat16
    one, two = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "12"
    )
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(
            tensor,
            merge_methods.merge(merge_methods.linear, [one[name], two[name]], weights=[1, 1]).bfloat16(),
        ), name


# before torch

def test_the_settings_are_read_and_the_models_hashed_before_torch_is_there(folders):
    """Importing torch takes as long as hashing a gigabyte or more: merge.py does both at once."""
    code = (
        "import merge, sys; from aya_min.files import Digests; merge.main(sys.argv[1:]); digests = Digests();"
        " files = merge.weight_files(sys.argv[2:4]); digests.begin(files); print([digests[file] for file in"
        " files], 'torch' in sys.modules)"
    )
    done = program("-c", code, "linear", *folders[:2], "--print-config", check=True)
    expected = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in folders[:2]
    ]
    assert done.stdout.splitlines()[-1] == f"{expected} False"


def test_what_a_link_leads_to_is_not_hashed_before_it_is_known_where_it_leads(folders, tmp_path):
    (folders[0] / "model-x.safetensors").symlink_to(tmp_path / "elsewhere")
    assert weight_files(folders) == [folder / "model.safetensors" for folder in folders]


def test_a_refusal_does_not_wait_for_the_hash_of_a_large_file(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 36)                          # 64 GB of nothing: a minute at least
    started = time.monotonic()
    with Digests() as digests:
        digests.begin([tmp_path / "large"])
    assert time.monotonic() - started < 5


# mergekit

@pytest.mark.parametrize("name", make_mergekit.CASES)
def test_mergekit_s_configuration_gives_mergekit_s_result(name, tmp_path):
    make_mergekit.write(tmp_path)
    state = state_of(
        merge_folders(out=tmp_path / "out", **from_config(make_mergekit.located(name, tmp_path)))
    )
    with safe_open(GOLDEN / "mergekit.safetensors", "pt") as file:
        assert file.metadata() == {"mergekit": "0.1.5"}
        for tensor in state:
            torch.testing.assert_close(
                state[tensor], file.get_tensor(f"{name}|{tensor}"), rtol=1e-6, atol=1e-6
            )
    assert len(state) == len(make_mergekit.checkpoints()["base"])


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_that_is_printed_makes_the_same_merge(method, folders, base, tmp_path, capsys):
    command = [
        method,
        *folders[:2],
        "--dtype",
        "float16",
        *(["--base", base] if "base" in METHODS[method].settings else []),
        *(["--density", 0.3, 0.6] if "density" in METHODS[method].settings else []),
        *(["--weights", 3, 1, "--normalize"] if method in WEIGHED else ["--convention", "paper"]),
    ]
    command = list(map(str, command))
    assert main([*command, "--print-config"]) == 0 and not (tmp_path / "one").exists()
    printed = capsys.readouterr().out
    (tmp_path / "config.json").write_text(printed)
    assert (
        main([*command, "--out", str(tmp_path / "one")]) == 0
        and main(["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "two")]) == 0
    )
    assert_equal(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    records = [json.loads((tmp_path / name / "merge.json").read_text()) for name in ("one", "two")]
    assert records[0] == records[1] and records[0]["config"] == json.loads(printed)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"merge_method": "della"},
            "merge_method 'della' is not supported; supported: linear, slerp, task_arithmetic",
        ),
        ({"slices": []}, "ties cannot honour slices"),
        ({"models": [{"model": "A", "weight": 1}]}, "ties cannot honour models.weight"),
        ({"parameters": {"epsilon": 1, "t": 1}}, "ties cannot honour parameters.epsilon, parameters.t"),
        (
            {"models": [{"model": "A", "parameters": {"weight": 1, "gamma": 1}}]},
            "ties cannot honour parameters.gamma",
        ),
        ({"models": [{"model": "A", "parameters": [1]}]}, "parameters is not an object"),
        ({"models": {"A": 1}}, "models is not a list"),
        ({"models": [{"model": "A"}]}, "ties needs a weight for each model"),
        ({"merge_method": "slerp", "models": [{"model": "A"}, {"model": "C"}]}, "slerp needs a t"),
        ({"tokenizer_source": "union"}, "tokenizer_source other than base"),
        ({"base_model": None}, "ties needs a base_model"),
        ({"merge_method": "linear"}, "linear takes no base_model"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"parameters": {"lambda": "much"}}, "'much' is not a number"),
        ({"parameters": {"normalize": 3}}, "normalize is 3; choose one of True, False"),
        (
            {"models": [{"model": "A", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
            "no filter of",
        ),
        (
            {"models": [{"model": "A", "parameters": {"weight": [1, {"value": 1}]}}]},
            "is not a number, a list of numbers over the layers, or a list of filters",
        ),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(
    change, words, folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = {
        "merge_method": "ties",
        "models": [{"model": "A", "parameters": {"weight": 1}}, {"model": "B", "parameters": {"weight": 1}}],
        "base_model": "C",
        "dtype": "float32",
    }
    Path("config.json").write_text(json.dumps({**config, **change}))
    assert words in refused(capsys, "--config", "config.json", "--out", "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("change, words", [
    ({"base_model": 5}, "base_model is 5, not the name of a folder"),
    ({"base_model": []}, "base_model is [], not"), ({"base_model": {"a": 1}}, "base_model is"),
    ({"models": [{"model": "A", "parameters": {"weight": [{"filter": 5, "value": 1}]}}]},
     'is not {"filter": TEXT, "value": NUMBER}'),
    ({"models": [{"model": "A", "parameters": {"weight": [{"fliter": "mlp", "value": 1}]}}]},
     'is not {"filter": TEXT'),
    ({"models": [{"model": "A", "parameters": {"weight": 10 ** 400}}]},
     "weights (--weights) must be a finite number"),
    ({"models": [{"model": "A", "parameters": {"weight": True}}]},
     "weights (--weights): True is not a number"),
    ({"models": [{"model": "A", "parameters": {"weight": [0, [1, 1e30]]}}]},
     "weights (--weights) must be a finite number"),
    ({"parameters": {"density": 1.5}},
     "density (--density) must be a finite number above 0 and at most 1, got 1.5"),
    ({"parameters": {"density": [0.5, {"value": 0}]}}, "density (--density) must be"),
    ({"parameters": {"lambda": -1e300}}, "lam (--lambda) must be"), ({"parameters": {"lambda": {"a": 1}}},
                                                                     "lam (--lambda): {'a': 1} is not a "
                                                                     "number"),
    ({"merge_method": "dare_ties", "parameters": {"seed": -1}},
     "seed (--seed) must be a whole number of at least 0"),
    ({"merge_method": "dare_ties", "parameters": {"seed": 1.5}}, "seed (--seed): 1.5 is not a whole number"),
    ({"merge_method": "dare_ties", "parameters": {"seed": [1]}}, "seed (--seed): [1] is not a whole number"),
    ({"merge_method": "slerp", "base_model": "A", "models": [{"model": "A"}, {"model": "B"}],
      "parameters": {"t": [0, 2]}}, "t (--t) must be a finite number of at least 0 and at most 1, got 2"),
    ({"merge_method": ["ties"]}, "is not supported"), ({"parameters": "x"}, "parameters is not an object"),
    ({"models": []}, "models is not a list"),
    ({"models": [{"model": 5}]}, "models is not a list of"), ({"dtype": ["x"]}, "unknown dtype ['x']"),
    ({"out_dtype": 5}, "unknown dtype 5"),
    ({"parameters": {"convention": [1]}}, "convention is [1]"), ({"allow_config_differences": "yes"},
                                                                 "allow_config_differences is 'yes'"),
    ({"tokenizer_source": {"a": 1}}, "tokenizer_source other than base"),
])
def test_a_configuration_of_wrong_types_or_numbers_is_one_line_and_nothing_is_read(change, words, tmp_path,
                                                                                         capsys, monkeypatch):
    """C1 of the hostile tests. The models of the configuration are not there: nothing looks for them."""
    monkeypatch.chdir(tmp_path)
    config = {"merge_method": "ties", "models": [{"model": "A", "parameters": {"weight": 1}},
                                                 {"model": "B", "parameters": {"weight": 1}}],
                                                 "base_model": "C"}
    Path("config.json").write_text(json.dumps({**config, **change}))
    assert words in refused(capsys, "--config", "config.json", "--out", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '{"models": ' + "[" * 900 + "]" * 900 + "}",
                                  '{"merge_method": ' + '{"a": ' * 900 + "1" + "}" * 901, "[" * 100_000,
                                  '{"parameters": {"lambda": 1e999}}',
                                  '{"merge_method": "ties", "merge_method": "linear"}', "5", "\xff"])
def test_a_configuration_that_is_deep_or_no_json_is_one_line(text, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(capsys, "--config", tmp_path / "config.json", "--out", tmp_path / "out")


@pytest.mark.parametrize("settings, words", [({"weights": [1, float("nan")]}, "weights"),
                                             ({"weights": [1e308, 1e308]}, "weights"),
                                             ({"weights": 1.0}, "must be a list"),
                                             ({"weights": ["1", 2]}, "'1' is not a number")])
def test_python_callers_have_the_same_ranges(settings, words, folders, tmp_path):
    with pytest.raises(ValueError, match=words):
        merge_folders(folders[:2], tmp_path / "out", "linear", **settings)
    assert not (tmp_path / "out").exists()


def test_the_largest_numbers_that_are_taken_do_not_overflow(base, tmp_path):
    """Their products stay within fp32; what does not fit the weights is named."""
    model = write(tmp_path / "A", {"w": torch.ones(8)})
    for method in WEIGHED:
        settings = given(method, base=model, weights=[1e20, 1e20], lam=1e10,
                         density=1e-4 if method.startswith("dare") else 1.0)
        state = state_of(merge_folders([model, model], tmp_path / method, method, **settings))
        assert state["w"].isfinite().all()


def test_under_torchrun_one_rank_merges_and_the_others_end_well(folders, tmp_path, monkeypatch, capsys):
    """F1 of the hostile tests: each rank did all the work, and the second found the output there."""
    command = ["linear", *map(str, folders), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("1", "3"):
        monkeypatch.setenv("RANK", rank)
        assert main(command) == 0 and not (tmp_path / "out").exists() and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 0 and (tmp_path / "out").is_dir()


def test_a_rank_that_no_launcher_gave_does_the_work(folders, tmp_path, monkeypatch):
    """A RANK that was left in a shell made merge.py end with 0, and nothing was there."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["linear", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("rank", ["one", "-1", "", "1.5"])
def test_a_rank_that_is_no_number_is_one_line(rank, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    assert "RANK is" in refused(capsys, "linear", *folders, "--out", tmp_path / "out")


def test_a_text_of_the_command_line_that_is_not_utf_8_is_one_line(folders, tmp_path):
    done = run("linear", folders[0], os.fsdecode(b"\xff"), "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is not UTF-8" in done.stderr


def test_a_fault_of_ours_says_so(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aya_min.merge_folders.write_the_rest", None)
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main(["linear", *map(str, folders), "--out", str(tmp_path / "out")]), "merge.py")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" in error and "a fault of aya_min, not of yours" in error
    assert not (tmp_path / "out").exists()


# what is refused

def refused(capsys, *arguments):
    """The one line on standard error of a command that was refused."""
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main(list(map(str, arguments))), "merge.py")
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured
    return captured.err


def test_a_refusal_is_exit_code_2_and_one_line_on_standard_error(folders, tmp_path):
    state = tensors(2)
    del state["score.weight"]
    write(tmp_path / "headless", state)
    for bad, words in (
        ("headless", ["headless lacks score.weight"]),
        ("nowhere", ["nowhere: not a model folder"]),
    ):
        done = run("linear", folders[0], tmp_path / bad, "--out", tmp_path / "out")
        assert (
            done.returncode == 2
            and done.stdout == ""
            and done.stderr.count("\n") == 1
            and "Traceback" not in done.stderr
        ), done
        assert all(word in done.stderr for word in words)
        assert not (tmp_path / "out").exists()


def test_all_differences_are_named_at_once(tmp_path, capsys):
    folders = [
        write(tmp_path / name, tensors(seed), num_attention_heads=4) for seed, name in enumerate("AB", 1)
    ]
    state = tensors(2)
    state["body.layers.0.scale"] = torch.ones(9).bfloat16()
    state["lm_head.weight"] = torch.ones(60, 8).bfloat16()
    state["positions"] = torch.arange(5) + 1
    state["mask"] = torch.ones(3).bfloat16()
    del state["score.weight"]
    other = write(tmp_path / "other", state, vocab_size=61, tokenizer='{"model": 1}', num_attention_heads=2)
    line = refused(capsys, "linear", *folders, other, "--out", tmp_path / "out")
    for words in (
        f"{other} lacks score.weight",
        f"{other} has lm_head.weight, which {folders[0]} lacks",
        "body.layers.0.scale is [9], in",
        "positions is I64, has no average, and differs",
        "mask is BF16, has no average, and differs",
        "tokenizer.json is not that of",
        "vocab_size is 61, in",
        "num_attention_heads is 2, in",
    ):
        assert words in line
    assert str(folders[1]) not in line and not (tmp_path / "out").exists()


def test_of_many_differences_twenty_are_named(tmp_path, capsys):
    one, other = write(tmp_path / "A", tensors(1)), write(
        tmp_path / "B", tensors(1) | {f"extra.{i:02d}": torch.ones(1) for i in range(50)}
    )
    line = refused(capsys, "linear", one, other, "--out", tmp_path / "out")
    assert "extra.19" in line and "extra.20" not in line and "and 30 more" in line


def test_the_base_must_match_too(folders, tmp_path, capsys):
    base = write(
        tmp_path / "base", {name: tensor for name, tensor in tensors(9).items() if name != "temperature"}
    )
    assert "base lacks temperature" in refused(
        capsys, "ties", *folders, "--base", base, "--out", tmp_path / "out"
    )
    assert "base lacks temperature" in refused(capsys, "diff", *folders[:2], "--base", base)


def test_a_head_that_is_not_what_it_is_tied_to_is_refused(tmp_path, capsys):
    state = {"model.embed_tokens.weight": torch.ones(6, 2), "lm_head.weight": torch.ones(6, 2)}
    tied = write(tmp_path / "tied", state, tie_word_embeddings=True)
    torn = write(tmp_path / "torn", state | {"lm_head.weight": torch.zeros(6, 2)}, tie_word_embeddings=True)
    untied = write(tmp_path / "untied", state, tie_word_embeddings=False)
    assert (
        "torn: lm_head.weight is not model.embed_tokens.weight, to which its config.json ties it"
        in refused(capsys, "linear", tied, torn, "--out", tmp_path / "o")
    )
    line = refused(capsys, "linear", tied, untied, "--out", tmp_path / "o")
    assert "untied has lm_head.weight, which" in line and "tie_word_embeddings is False, in" in line


def test_quantized_weights_are_refused(tmp_path, capsys):
    models = [
        write(tmp_path / name, tensors(1) | {"w": torch.ones(4).to(torch.float8_e4m3fn)}) for name in "AB"
    ]
    assert "w is F8_E4M3, which cannot be merged" in refused(
        capsys, "linear", *models, "--out", tmp_path / "out"
    )


def test_an_output_that_exists_or_is_an_input_is_refused_and_left_alone(folders, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(folders[1])
    assert "taken exists already" in refused(capsys, "linear", *folders, "--out", tmp_path / "taken")
    assert "A is one of the models to merge" in refused(capsys, "linear", *folders, "--out", folders[0])
    assert "link is one of the models to merge" in refused(
        capsys, "linear", *folders, "--out", tmp_path / "link"
    )
    assert (tmp_path / "taken" / "file").read_text() == "mine" and len(list(folders[0].iterdir())) == 4


def test_a_shard_name_that_leaves_the_folder_is_refused(folders, tmp_path, capsys):
    sharded = write(tmp_path / "sharded", tensors(1), num_shards=2)
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", "../A/model.safetensors"))
    assert "'../A/model.safetensors' is not the name of a safetensors file in its own folder" in refused(
        capsys, "linear", sharded, folders[0], "--out", tmp_path / "o"
    )


def test_files_that_are_not_whole_are_refused(folders, tmp_path, capsys):
    sharded = write(tmp_path / "sharded", tensors(1), num_shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: not a whole safetensors file" in refused(
        capsys, "linear", sharded, "--out", tmp_path / "o"
    )
    sharded = write(tmp_path / "stale", tensors(1), num_shards=2)
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"score.weight"', '"score.wait"'))
    assert "the shards disagree on score.wait score.weight" in refused(
        capsys, "linear", sharded, "--out", tmp_path / "o"
    )
    index.write_text("{")
    assert "index.json: not JSON" in refused(capsys, "linear", sharded, "--out", tmp_path / "o")
    whole = folders[1] / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-10])
    assert "B/model.safetensors: not a whole safetensors file" in refused(
        capsys, "linear", *folders, "--out", tmp_path / "o"
    )


@pytest.mark.parametrize("arguments, words", [
    ("linear A B --weights 1", "1 weights for 2 models"),
    ("linear A B --weights 1 -1", "sum to 0"),
    ("linear A B --weights 1 nan",
     "argument --weights: 'nan' must be a finite number of at least -1e20 and at most 1e20"),
    ("linear A B --weights 1e308 1e308", "argument --weights: '1e308' must be"),
    ("ties A B --base C --weights 1e300 1e300", "argument --weights: '1e300' must be"),
    ("linear A B --density 0.5", "unrecognized arguments: --density 0.5"),
    ("linear A B --dtype int8", "invalid choice: 'int8'"),
    ("linear A B --device nonsense", "'nonsense' cannot be used here"),
    ("slerp A B C", "slerp merges exactly two models, not 3"),
    ("linear A B --device meta", "'meta' cannot be used here"),
    ("slerp A B --t 1.5", "argument --t: '1.5' must be a finite number of at least 0 and at most 1"),
    ("slerp A B --t 0 nan", "argument --t: 'nan' must be"),
    ("dare-ties A B --base C --seed -1", "argument --seed: '-1' must be a whole number of at least 0"),
    ("dare-ties A B --base C --seed 1.5", "argument --seed: '1.5' must be a whole number"),
    ("dare-ties A B --base C --seed 18446744073709551616", "argument --seed"),
    ("task-arithmetic A B --base C --lambda 1e300", "argument --lambda: '1e300' must be"),
    ("ties A B", "required: --base"),
    ("ties A B --base C --density 0",
     "argument --density: '0' must be a finite number above 0 and at most 1"),
    ("ties A B --base C --density 0.1 0.2 0.3", "3 density for 2 models"),
    ("ties A B --base C --weights 1 -1", "must not be negative"),
    ("ties A B --base C --convention ours", "invalid choice: 'ours'"),
    ("dare-ties A B --base C --lambda inf", "argument --lambda: 'inf' must be a finite number"),
    ("bogus A B", "invalid choice: 'bogus'"),
    ("--config c.json linear A B", "give a method, or --config FILE, and not both"),
    ("--config c.json", "c.json: cannot be read"),
    ("", "give a method, or --config FILE, and not both"),
])
def test_settings_without_a_meaning_are_refused(arguments, words, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments.split(), "--out", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B", "C"]


def test_flags_of_a_merge_before_diff_or_search_are_refused(folders, tmp_path, capsys):
    """--print-config diff was a fault of ours, a NameError; so was --no-hashes search."""
    refusal = "takes neither --print-config nor --no-hashes"
    assert refusal in refused(capsys, "--print-config", "diff", *folders[:2])
    assert refusal in refused(capsys, "--no-hashes", "search", *folders[:2], "--command", "true {model}",
                              "--out", tmp_path / "out")


def test_settings_that_a_method_does_not_take_and_an_output_left_out_are_refused(
    folders, base, tmp_path, capsys
):
    with pytest.raises(ValueError, match="slerp takes no base, weights; it takes t, convention"):
        merge_folders(folders[:2], tmp_path / "out", "slerp", base=base, weights=[1, 1])
    with pytest.raises(ValueError, match="trimmed one by one"):
        merge_folders(folders, tmp_path / "out", "ties", base=base, density=[[0.1, 0.9], 0.5, 0.5])
    assert "required: --out" in refused(capsys, "linear", *folders)


# what an interruption leaves

@pytest.mark.parametrize("method", METHODS)
def test_a_merge_that_fails_in_the_middle_leaves_nothing(method, folders, base, tmp_path):
    state = tensors(2)
    state["temperature"] = torch.tensor(float("nan")).bfloat16()
    state["body.embed.weight"][7, 3] = float("inf")
    nan = write(tmp_path / "nan", state)
    large = write(tmp_path / "large", tensors(3) | {"temperature": torch.tensor(1e6).bfloat16()})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="body.embed.weight in .*nan/model.safetensors holds NaN or infinite values"
    ):
        merge_folders([folders[0], nan], tmp_path / "out", method, **given(method, base=base))
    with pytest.raises(
        ValueError, match="body.embed.weight in .*nan/model.safetensors holds NaN or infinite values"
    ):
        compare_folders(folders[0], nan)
    with pytest.raises(ValueError, match="temperature, merged, as torch.float16, holds NaN or infinite"):
        merge_folders(
            [large] * 2, tmp_path / "out", method, **given(method, base=base, density=1.0), dtype="float16"
        )
    assert sorted(tmp_path.iterdir()) == before


def test_finite_numbers_whose_sum_overflows_are_no_infinity(tmp_path):
    model = write(tmp_path / "A", {"w": torch.full((8,), 2e38)})
    assert_equal(state_of(merge_folders([model, model], tmp_path / "out", "linear")), state_of(model))


def test_a_full_disk_is_said_before_the_work_and_survived_during_it(folders, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 500, 500))
        patch.setattr(tensorfiles, "create", None)                              # nothing is begun
        assert "out needs 0.0 GB, its disk has 0.0 GB free" in refused(
            capsys, "linear", *folders, "--out", tmp_path / "out"
        )
    written, write_piece = [], tensorfiles.write_piece

    def until_full(*arguments):
        written.append(arguments)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_piece(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(tensorfiles, "write_piece", until_full)
        with pytest.raises(
            ValueError, match="out could not be made .*No space left on device.*; nothing of it was kept"
        ):
            merge_folders(folders, tmp_path / "out", "linear")
    assert sorted(tmp_path.iterdir()) == before
    assert run("linear", *folders, "--out", tmp_path / "out").returncode == 0


def test_a_file_that_may_not_grow_is_one_line_and_leaves_nothing(folders, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = run(
        "linear",
        *folders,
        "--out",
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr, done
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_written_cannot_be_read_before_all_of_it_is(folders, tmp_path):
    files = tensorfiles.assign_files({"w": ("F32", (3,)), "v": ("F32", (2,))})
    places = tensorfiles.create(tmp_path, files)
    tensorfiles.write_piece(places["w"], 0, torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")
    tensorfiles.write_piece(places["v"], 1, torch.tensor([5.0]))
    tensorfiles.seal(tmp_path, files)
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "model.safetensors").items()} == {
        "w": [1, 2, 3],
        "v": [0, 5],
    }


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_merge_killed_at_any_moment_leaves_no_folder_or_a_whole_one(num_kills, tmp_path):
    """F25."""
    state = {
        f"layers.{i}": torch.randn(1500, 1000, generator=torch.Generator().manual_seed(i)).bfloat16()
        for i in range(8)
    }
    folder, out = write(tmp_path / "A", state), tmp_path / "out"
    inputs = {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
    }
    command = [sys.executable, "merge.py", "dare-ties", *[folder] * 3, "--base", folder, "--out", out]
    draws, killed = random.Random(3), 0
    for _ in range(num_kills):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(".out*")) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if out.exists():
            assert_equal(state_of(out), state)
            assert {"config.json", "merge.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
            shutil.rmtree(out)
        assert {
            path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in folder.iterdir()
        } == inputs
    assert killed and list(tmp_path.glob(".out.*.aya_min"))
    merge_folders([folder], out, "linear")
    assert_equal(state_of(out), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "out"]         # the remains went


def test_the_remains_of_a_merge_that_still_runs_stay_and_of_another_host_too(folders, tmp_path):
    kept = [tmp_path / f".out.{name}.aya_min" for name in ("running", "elsewhere")]
    for folder, change in zip(kept, ({"process": os.getppid()}, {"host": "another", "process": 1 << 22})):
        folder.mkdir()
        mark(folder, "to make out")
        (folder / ".aya_min").write_text(json.dumps(json.loads((folder / ".aya_min").read_text()) | change))
    merge_folders(folders, tmp_path / "out", "linear")
    assert all(folder.exists() for folder in kept)


@pytest.mark.parametrize("name", ["out.tmp-2024", ".out.2024.aya_min", "out.partial", "out.tmp"])
def test_a_folder_of_the_user_s_is_not_removed_whatever_its_name(name, folders, tmp_path):
    """A2 of the hostile tests: m.tmp-2024 was taken for what a dead merge left, and went."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years")
    assert main(["linear", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / name / "thesis.txt").read_text() == "years"


def test_a_merge_that_loses_a_race_for_its_output_leaves_nothing_and_says_so(folders, tmp_path, monkeypatch):
    out, rest = tmp_path / "new" / "out", sys.modules[merge_folders.__module__].write_the_rest

    def other_first(*arguments):
        rest(*arguments)
        out.mkdir()
        (out / "theirs").write_text("whole")
    monkeypatch.setattr("aya_min.merge_folders.write_the_rest", other_first)
    with pytest.raises(ValueError, match="out exists; give another folder, nothing is overwritten"):
        merge_folders(folders, out, "linear")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["out", "theirs"]


@pytest.mark.parametrize("arguments", ["linear A nowhere", "linear A B --weights 1 -1", "--config c.json"])
def test_a_refused_command_makes_no_folder_not_even_those_above_its_output(arguments, folders, tmp_path,
                                                                           capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *arguments.split(), "--out", "some/where/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B", "C"]


def test_a_merge_that_fails_in_the_middle_takes_the_folders_above_its_output_with_it(folders, tmp_path):
    nan = write(tmp_path / "nan", tensors(1) | {"score.weight": torch.full((1, 8), torch.nan)})
    with pytest.raises(ValueError, match="holds NaN"):
        merge_folders([folders[0], nan], tmp_path / "some" / "where" / "out", "linear")
    assert not (tmp_path / "some").exists()


# memory

def peak(commands):
    """Bytes of resident memory at most, mapped pages included, of a process that runs merge.py with these
    arguments one after the other."""
    code = (
        "import json, merge, sys, aya_min.merge_folders; [merge.main(command) for command in"
        " json.loads(sys.argv[1])]; print(open('/proc/self/status').read())"
    )
    words = json.dumps([list(map(str, command)) for command in commands])
    done = program("-c", code, words, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)
    assert done.stdout.count(" of ") == sum("--out" in command for command in commands), done.stderr
    return next(int(line.split()[1]) * 1024 for line in done.stdout.splitlines() if line.startswith("VmHWM"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.long
@pytest.mark.parametrize("method_names", [["linear"], [*METHODS]], ids=["linear", "all methods and diff"])
def test_memory_does_not_grow_with_the_model_or_its_largest_tensor(method_names, tmp_path):
    """F24, 3 models of 8 shards: far below (N + 2) x largest tensor + 300 MB. One tensor of one model is
    240 MB in fp32."""
    rows = {"large": 60_000} | {f"small.{i}": 1_000 for i in range(20)}
    for name, seed in zip("ABC", range(3)):
        draws = torch.Generator().manual_seed(seed)
        write(
            tmp_path / name,
            {
                part: (torch.ones(1000) + 0.01 * torch.randn(num, 1, generator=draws)).bfloat16()
                for part, num in rows.items()
            },
            num_shards=8,
        )
    a, b, c = (tmp_path / name for name in "ABC")
    methods = [
        [
            method,
            *([b, c] if method == "slerp" else [a, b, c]),
            *(["--base", a] if "base" in METHODS[method].settings else []),
            "--out",
            tmp_path / method,
        ]
        for method in method_names
    ]
    diff = [["diff", b, c, "--base", a]] if len(methods) > 1 else []
    imports, used = peak([]), peak(methods + diff)
    assert used < (3 + 2) * 120e6 + 300e6 and used - imports < 600e6, (used, imports)


# diff

def test_diff_gives_distance_cosine_and_agreement_worked_by_hand(tmp_path, capsys):
    base = {
        "m.layers.0.w": torch.tensor([1.0, 1.0, 1.0, 1.0]),
        "m.layers.1.w": torch.tensor([0.0, 0.0]),
        "n": torch.tensor([2.0]),
    }
    a = {
        "m.layers.0.w": torch.tensor([3.0, 2.0, 1.0, 0.0]),
        "m.layers.1.w": torch.tensor([3.0, 4.0]),
        "n": torch.tensor([2.0]),
    }
    b = {
        "m.layers.0.w": torch.tensor([3.0, 0.0, 1.0, 1.0]),
        "m.layers.1.w": torch.tensor([-3.0, -4.0]),
        "n": torch.tensor([2.0]),
    }
    folders = [write(tmp_path / name, state) for name, state in (("a", a), ("b", b), ("base", base))]
    rows = {row["what"]: row for row in compare_folders(*folders[:2])}
    first = {"what": "m.layers.0.w", "distance": 5 ** 0.5 / 14 ** 0.5, "cosine": 10 / 154 ** 0.5}
    assert rows["m.layers.0.w"] == pytest.approx(first) and rows["m.layers.0"] == pytest.approx(
        {**first, "what": "m.layers.0"}
    )
    assert rows["m.layers.1.w"] == pytest.approx({"what": "m.layers.1.w", "distance": 2.0, "cosine": -1.0})
    assert rows["m.layers.*.w"] == pytest.approx(
        {"what": "m.layers.*.w", "distance": (105 / 39) ** 0.5, "cosine": -15 / (39 * 36) ** 0.5}
    )
    assert rows["all"] == pytest.approx(
        {"what": "all", "distance": (105 / 43) ** 0.5, "cosine": -11 / (43 * 40) ** 0.5}
    )
    assert list(rows) == [
        "m.layers.0.w",
        "m.layers.1.w",
        "n",
        "m.layers.*.w",
        "m.layers.0",
        "m.layers.1",
        "all",
    ]
    assert main(["diff", *map(str, folders[:2]), "--base", str(folders[2]), "--json"]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    # task vectors (2, 1, 0, -1) and (2, -1, 0, 0): of the two parameters that both moved, one went the same
    # way
    assert rows["m.layers.0.w"] == pytest.approx(
        {**first, "task_cosine": 3 / (6 * 5) ** 0.5, "same_sign": 0.5}
    )
    assert (
        rows["n"] == {"what": "n", "distance": 0.0, "cosine": 1.0, "task_cosine": None, "same_sign": None}
        and rows["all"]["same_sign"] == 0.25
    )


def test_diff_prints_a_table(folders, base, tmp_path, capsys):
    assert main(["diff", *map(str, folders[:2]), "--base", str(base)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].split() == ["distance", "cosine", "task", "cosine", "same", "sign"]
        and lines[-1].split()[-1] == "all"
        and len(lines) == 10
    )
    row = next(row for row in compare_folders(*folders[:2], base) if row["what"] == "body.embed.weight")
    assert next(line for line in lines if "embed" in line).split() == [
        f"{row[key]:.6f}" for key in ("distance", "cosine", "task_cosine", "same_sign")
    ] + ["body.embed.weight"]
    a, b, start = (tensors(seed)["body.embed.weight"].double().flatten() for seed in (1, 2, 9))
    assert row["distance"] == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-6)
    assert row["task_cosine"] == pytest.approx(
        torch.nn.functional.cosine_similarity(a - start, b - start, dim=0).item(), rel=1e-6
    )
