"""Model folders: what is written is what is read, under the published names; anything less than a whole
and fitting folder is refused by name."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import language_model, reward_model, tokenizer

from aya_min import weights
from aya_min.model import RewardModel, SequenceClassifier
from aya_min.reward import score_texts

BLOCK = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
]
COHERE2 = dict(model_type="cohere2", sliding_window=4, layer_types=["full_attention", "sliding_attention"])
NAMES = [
    "model.embed_tokens.weight",
    *[f"model.layers.{i}.{name}" for i in (0, 1) for name in BLOCK],
    "model.norm.weight",
]


@pytest.fixture
def folder(tmp_path):
    weights.save(tmp_path / "model", language_model(), tokenizer())
    return tmp_path / "model"


def rewrite(folder, change):
    """Change the tensors of a folder's single file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder, num_shards=3):
    """Cut the single file into shards with an index; {tensor: file}."""
    state = load_file(folder / "model.safetensors")
    weight_map = {
        name: f"model-{i % num_shards + 1:05d}-of-{num_shards:05d}.safetensors"
        for i, name in enumerate(sorted(state))
    }
    for file in set(weight_map.values()):
        save_file(
            {name: t for name, t in state.items() if weight_map[name] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()
    return weight_map


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# there and back


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"use_qk_norm": True},
        {"head_dim": 16},
        COHERE2,
        {"eos_token_id": [9, 3]},
    ],
)
@pytest.mark.parametrize("make", [language_model, reward_model])
def test_a_saved_model_is_loaded_bit_for_bit(make, changes, tmp_path):
    if make is reward_model:
        changes = {k: v for k, v in changes.items() if k != "tie_word_embeddings"}
    model = make(**changes)
    weights.save(tmp_path / "model", model, tokenizer())
    loaded, its_tokenizer = weights.load(tmp_path / "model")
    assert type(loaded) is type(model) and loaded.config == model.config
    assert_same(loaded, model)
    assert its_tokenizer.encode_prompt("red 7 <PAD>") == tokenizer().encode_prompt("red 7 <PAD>")


@pytest.mark.parametrize(
    "make, changes, more",
    [
        (language_model, {}, []),
        (language_model, COHERE2, []),
        (language_model, {"tie_word_embeddings": False}, ["lm_head.weight"]),
        (reward_model, {}, ["score.weight", "score_logps.weight"]),
        (
            language_model,
            {"use_qk_norm": True},
            [f"model.layers.{i}.self_attn.{x}_norm.weight" for i in (0, 1) for x in "qk"],
        ),
    ],
)
def test_the_tensors_have_the_names_of_the_published_checkpoints(make, changes, more, tmp_path):
    """With tied embeddings the head is not written a second time."""
    weights.save(tmp_path / "model", make(**changes), tokenizer())
    assert sorted(load_file(tmp_path / "model" / "model.safetensors")) == sorted(NAMES + more)


def test_a_folder_has_the_five_files_and_says_what_loaders_look_for(folder):
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["architectures"] == ["CohereForCausalLM"]
        and config["model_type"] == "cohere"
        and config["torch_dtype"] == "float32"
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 5,
        "eos_token_id": 9,
        "pad_token_id": 0,
    }


def test_published_in_bfloat16_it_is_half_the_size_and_says_so(tmp_path):
    for name, dtype in (("whole", torch.float32), ("half", torch.bfloat16)):
        weights.save(tmp_path / name, language_model(), tokenizer(), dtype)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded, _ = weights.load(tmp_path / "half")
    assert torch.equal(loaded.model.norm.weight, language_model().model.norm.weight.bfloat16().float())
    assert next(loaded.parameters()).dtype == torch.float32


def test_a_folder_is_replaced_whole_and_leaves_nothing_beside_it(folder):
    weights.save(folder, language_model(seed=7), tokenizer())
    assert_same(weights.load(folder)[0], language_model(seed=7))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_shards_with_an_index_are_read_as_one_file(folder):
    split(folder)
    assert_same(weights.load(folder)[0], language_model())


def test_a_large_model_is_saved_in_shards_with_an_index_that_says_what_is_where(folder, tmp_path):
    weights.save(tmp_path / "shards", language_model(), tokenizer(), shard_bytes=20_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    states = {path.name: load_file(path) for path in (tmp_path / "shards").glob("*.safetensors")}
    assert len(states) > 2 and all(
        len(state) == 1 or sum(t.nbytes for t in state.values()) <= 20_000 for state in states.values()
    )
    assert index["weight_map"] == {name: file for file, state in states.items() for name in state}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in language_model().state_dict().values())
    assert_same(weights.load(tmp_path / "shards")[0], language_model())
    assert not (folder / "model.safetensors.index.json").exists()       # none beside a single file


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_rounded_once_to_the_dtype_that_is_stored_and_once_to_that_asked_for(
    stored, wanted, tmp_path
):
    weights.save(tmp_path / "model", language_model(), tokenizer(), stored)
    loaded, _ = weights.load(tmp_path / "model", dtype=wanted)
    for name, t in loaded.state_dict().items():
        assert torch.equal(t, language_model().state_dict()[name].to(stored).to(wanted)), name


@pytest.fixture
def nan_where_nothing_is_written():
    """torch fills new memory with NaN instead of leaving what was there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("make", [language_model, reward_model])
def test_no_parameter_is_left_as_memory_happened_to_be(make, trunk, nan_where_nothing_is_written, tmp_path):
    assert torch.empty(3).isnan().all()
    weights.save(tmp_path / "model", make(**COHERE2), tokenizer())
    loaded, _ = weights.load(tmp_path / "model", trunk=trunk)
    assert all(t.isfinite().all() for t in loaded.state_dict().values())


def test_an_answer_s_several_ends_are_all_in_the_generation_config(folder, tmp_path):
    """Command R7B's answers end with <|END_RESPONSE|>; one that only knows <|END_OF_TURN_TOKEN|> would
    print it."""
    model, words = weights.load(folder)
    words.stop_ids = [words.end_of_turn_id, 7]
    weights.save(tmp_path / "saved", model, words)
    assert (
        json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
        == weights.read_stop_ids(tmp_path / "saved")
        == [7, 9]
    )


def test_the_stop_ids_are_those_of_generation_config_and_config_and_the_template(folder, tmp_path):
    """Of two eos ids in generation_config.json one used to be lost on the way through training."""
    assert weights.read_stop_ids(folder) == [9]
    edit_json(folder / "generation_config.json", eos_token_id=[12, 9, 12])
    assert weights.read_stop_ids(folder) == [9, 12]
    edit_json(folder / "config.json", eos_token_id=[8, 6])
    assert weights.read_stop_ids(folder) == [6, 8, 9, 12]
    edit_json(folder / "generation_config.json", eos_token_id=[12], temperature=0.3, top_p=0.9,
        transformers_version="4.44.0")
    model, words = weights.load(folder)
    # 9: the end of turn
    assert words.stop_ids == weights.load_meta(folder)[1].stop_ids == [6, 8, 9, 12]
    weights.save(tmp_path / "saved", model, words)
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {
        "bos_token_id": 5, "pad_token_id": 0, "eos_token_id": [6, 8, 9, 12], "temperature": 0.3, "top_p": 0.9,
        "transformers_version": "4.44.0"}
    edit_json(folder / "generation_config.json", eos_token_id=None)
    assert weights.read_stop_ids(folder) == weights.load(folder)[0].config.eos_token_id == [6, 8]
    (folder / "generation_config.json").unlink()
    assert weights.read_stop_ids(folder) == [6, 8]
    edit_json(folder / "config.json", eos_token_id=None)
    assert weights.read_stop_ids(folder) == [] and weights.load(folder)[1].stop_ids == [9]


@pytest.mark.parametrize("eos", ["9", [], [1.5], -1, True])
def test_a_stop_id_that_is_no_token_is_refused(eos, folder):
    edit_json(folder / "generation_config.json", eos_token_id=eos)
    with pytest.raises(
        ValueError, match="generation_config.json: eos_token_id .* must be a token's number or a list of them"
    ):
        weights.read_stop_ids(folder)


# trunks and heads

def test_a_trunk_is_the_language_models_decoder_under_the_same_new_head_each_time(folder):
    first, again = weights.load(folder, trunk=True)[0], weights.load(folder, trunk=True)[0]
    assert isinstance(first, RewardModel)
    assert_same(first, again)
    assert_same(first.model, language_model().model)
    assert (first.score.weight != 0).all()


def test_a_reward_model_keeps_an_untied_head_for_its_log_probs_and_a_classifier_leaves_it_behind(tmp_path):
    """The log-probs were once read off the embeddings."""
    start = language_model(tie_word_embeddings=False)
    weights.save(tmp_path / "model", start, tokenizer())
    reward = weights.load(tmp_path / "model", trunk=True)[0]
    assert_same(reward.model, start.model)
    assert torch.equal(reward.lm_head.weight, start.lm_head.weight)
    weights.save(tmp_path / "rm", reward, tokenizer())
    assert_same(weights.load(tmp_path / "rm")[0], reward)
    plain = weights.load(tmp_path / "model", trunk=SequenceClassifier)[0]
    assert plain.state_dict().keys() == reward.state_dict().keys() - {"lm_head.weight", "score_logps.weight"}


def test_the_trunk_of_a_reward_model_is_that_reward_model(tmp_path):
    weights.save(tmp_path / "rm", reward_model(), tokenizer())
    assert_same(weights.load(tmp_path / "rm", trunk=True)[0], reward_model())


def test_a_reward_model_without_score_logps_is_the_usual_last_token_head(
    nan_where_nothing_is_written, tmp_path
):
    """Its folder was refused, against the docstring of RewardModel."""
    weights.save(tmp_path / "rm", reward_model(), tokenizer())
    rewrite(tmp_path / "rm", lambda state: state.pop("score_logps.weight"))
    loaded, _ = weights.load(tmp_path / "rm")
    ids = tokenizer().encode_chat(
        [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]
    )[0]
    expected = reward_model().model(torch.tensor([ids]))[0, -1] @ reward_model().score.weight[0]
    assert score_texts(loaded, tokenizer(), [{"prompt": "red?", "completion": "blue"}]) == pytest.approx(
        [expected.item()], abs=1e-5
    )


# what is refused

def refused(folder, function=weights.load):
    """The one line with which a folder is refused."""
    with pytest.raises(ValueError) as caught:
        function(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tied_head_that_is_written_all_the_same_loads_if_it_is_the_embedding_and_is_refused_if_not(folder):
    """merge.py took such folders, and weights.load called the head extra."""
    plain = weights.load(folder)[0].state_dict()
    rewrite(
        folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    )
    loaded = weights.load(folder)[0].state_dict()
    assert loaded.keys() == plain.keys() and all(torch.equal(loaded[name], plain[name]) for name in plain)
    rewrite(folder, lambda state: state["lm_head.weight"][3].add_(1))
    assert "lm_head.weight is not model.embed_tokens.weight, to which config.json ties it" in refused(folder)


@pytest.mark.parametrize("function", [weights.load, weights.load_meta])
def test_all_that_does_not_fit_config_json_is_named_before_any_weight_is_read(function, folder):
    changed = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(64, 16),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(2),
        "lm_head.weight": torch.zeros(3),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(32, 64),
    }  # as many numbers, but transposed
    rewrite(
        folder,
        lambda state: [
            state.pop("model.layers.1.self_attn.o_proj.weight"),
            state.pop("model.norm.weight"),
            state.update(changed),
        ],
    )
    line = refused(folder, function)
    for words in (
        "model.layers.1.self_attn.o_proj.weight is missing",
        "model.norm.weight is missing",
        "lm_head.weight is not model.embed_tokens.weight, to which",
        "model.layers.2.mlp.up_proj.weight is extra",
        "model.layers.0.mlp.up_proj.weight has shape (64, 16), config.json says (64, 32)",
        "model.layers.1.mlp.up_proj.weight has shape (32, 64), config.json says (64, 32)",
    ):
        assert words in line


def test_of_many_things_that_do_not_fit_twenty_are_named(folder):
    rewrite(folder, lambda state: state.update({f"extra.{i:02d}": torch.zeros(1) for i in range(50)}))
    line = refused(folder)
    assert "extra.19 is extra" in line and "extra.20" not in line and line.endswith("and 30 more")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_by_name(dtype, folder):
    """Copied as they are, they would be other numbers."""
    rewrite(folder, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].to(dtype)}))
    assert "model.norm.weight is " in (line := refused(folder)) and "quantized weights are not read" in line


def damaged(raw):
    """{how: the bytes of a file that is not whole}"""
    length = int.from_bytes(raw[:8], "little")
    cuts = {f"{n} bytes": raw[:n] for n in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length, len(raw) - 1)}
    return {
        **cuts,
        "one byte more": raw + b"0",
        "no header": b"0" * 8 + raw[8:],
        "length 2^63": (2**63).to_bytes(8, "little") + raw[8:],
        "length 2^64-1": b"\xff" * 8 + raw[8:],
        "not UTF-8": raw[:9] + b"\xff" + raw[10:],
        "a pickle": b"\x80\x02}q\x00.",
    }


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_truncated_or_corrupt_file_is_refused_at_once_with_its_name(sharded, folder):
    """A truncated shard used to end in a traceback of the safetensors library."""
    path = folder / (split(folder)["model.norm.weight"] if sharded else "model.safetensors")
    raw = path.read_bytes()
    for how, damage in damaged(raw).items():
        path.write_bytes(damage)
        started = time.perf_counter()
        line = refused(folder)
        assert f"{path.name}: not a whole safetensors file (" in line and line.endswith(
            "copy or download it again"
        ), how
        assert time.perf_counter() - started < 1, how
    path.write_bytes(raw)
    assert_same(weights.load(folder)[0], language_model())


@pytest.mark.parametrize(
    "header",
    [
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]},
        },  # overlap
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
        },  # hole
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
    ],
    ids=["overlap", "hole", "negative", "dtype", "overflow"],
)
def test_a_header_that_lies_is_refused(header, folder):
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    assert "not a whole safetensors file" in refused(folder)


def test_a_shard_that_lacks_what_the_index_promises_is_refused_by_name(folder):
    """The tensor used to keep whatever was in memory."""
    file = folder / split(folder)["model.norm.weight"]
    state = load_file(file)
    state.pop("model.norm.weight")
    save_file(state, file)
    assert "the shards disagree on model.norm.weight;" in refused(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused_by_name(folder):
    weight_map = split(folder)
    names = sorted(weight_map)
    edit_json(
        folder / "model.safetensors.index.json", weight_map={**weight_map, names[0]: weight_map[names[1]]}
    )
    assert f"the shards disagree on {names[0]};" in refused(folder)


def test_a_tensor_that_is_in_two_shards_is_refused_by_name(folder):
    weight_map = split(folder)
    name = "model.norm.weight"
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[name])
    for file in (weight_map[name], other):  # whichever comes first
        state = load_file(folder / file)
        save_file({**state, name: torch.ones(32)}, folder / file)
    assert f"the shards disagree on {name};" in refused(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map={**weight_map, name: other})
    assert f"the shards disagree on {name};" in refused(folder)


def test_a_missing_shard_is_refused(folder):
    file = folder / split(folder)["model.norm.weight"]
    file.unlink()
    assert f"{file.name}: not a whole safetensors file (No such file" in refused(folder)


@pytest.mark.parametrize(
    "outside",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "model.safetensors\0",
        "model\0.safetensors",
        "pytorch_model.bin",
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(outside, folder):
    weight_map = split(folder)
    for place in (folder / "sub", folder.parent / "other"):  # whole and fitting, were they opened
        place.mkdir()
        save_file({"model.norm.weight": torch.ones(32)}, place / "model.safetensors")
    edit_json(
        folder / "model.safetensors.index.json", weight_map={**weight_map, "model.norm.weight": outside}
    )
    said = "is not the name of a safetensors file in its own folder; do not use this model"
    assert ("holds a NUL character" if "\0" in outside else said) in refused(folder)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_link_out_of_the_folder_is_refused(sharded, folder):
    file = folder / (split(folder)["model.norm.weight"] if sharded else "model.safetensors")
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to(folder.parent / "elsewhere.safetensors")
    assert "a link out of the folder" in refused(folder)


def test_the_links_of_the_hubs_cache_are_followed(folder):
    """snapshots/REVISION/model.safetensors -> ../../blobs/HASH; also through a link to the folder."""
    hub = folder.parent / "models--a--b"
    (hub / "snapshots").mkdir(parents=True)
    (hub / "blobs").mkdir()
    folder = folder.rename(hub / "snapshots" / "0123")
    for path in list(folder.iterdir()):
        path.rename(hub / "blobs" / path.name.replace(".", ""))
        path.symlink_to(f"../../blobs/{path.name.replace('.', '')}")
    (hub.parent / "short").symlink_to(folder)
    for place in (folder, hub.parent / "short"):
        assert_same(weights.load(place)[0], language_model())


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"model.norm.weight": 3}}',
        '{"weight_map": ["model.norm.weight"]}',
    ],
)
def test_an_index_without_names_of_tensors_and_files_is_refused(text, folder):
    split(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: no weight_map of tensor names and file names" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@pytest.mark.parametrize("text, says", [("{", "not JSON"), ("[]", "a JSON list, not an object"),
    ("[" * 100_000, "not JSON"), (b"\xff", "not UTF-8")])
def test_a_description_that_is_no_json_object_is_refused_with_its_name(name, text, says, folder):
    split(folder)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{name}: {says}" in refused(
        folder, weights.read_stop_ids if name.startswith("generation") else weights.load
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            (
                "architecture 'GPT2LMHeadModel' is not supported; supported: CohereForCausalLM"
                " Cohere2ForCausalLM"
            ),
        ),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"model_type": "cohere3"}, "model_type 'cohere3' is not supported; supported: cohere cohere2"),
        ({"model_type": "cohere2"}, "architecture CohereForCausalLM does not go with model_type cohere2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rope"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"hidden_size": "32"}, "hidden_size '32'"),
    ],
)
def test_an_unknown_architecture_or_variant_is_refused(changes, says, folder):
    edit_json(folder / "config.json", **changes)
    assert says in (line := refused(folder)) and str(folder / "config.json") in line


def test_a_single_file_beside_an_index_is_refused(folder):
    """Which of the two is meant cannot be known."""
    whole = (folder / "model.safetensors").read_bytes()
    split(folder)
    (folder / "model.safetensors").write_bytes(whole)
    assert "both model.safetensors and model.safetensors.index.json" in refused(folder)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    weights.save(tmp_path / "model", language_model(vocab_size=300), tokenizer())
    with pytest.raises(
        ValueError,
        match="tokenizer.json has 400 tokens, the largest id is 399, config.json has " "a vocabulary of 300",
    ):
        weights.load(tmp_path / "model")


@pytest.mark.parametrize(
    "name, says",
    [
        ("config.json", "not a model folder"),
        ("tokenizer.json", "no tokenizer.json"),
        ("model.safetensors", "never pickles"),
    ],
)
def test_a_folder_without_one_of_its_files_is_refused(name, says, folder):
    (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=says):
        weights.load(folder)


def test_a_broken_tokenizer_is_refused_with_its_name(folder):
    (folder / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        weights.load(folder)


def test_a_save_that_fails_leaves_no_folder_of_that_name(tmp_path):
    with pytest.raises(AttributeError):
        weights.save(tmp_path / "model", language_model(), None)
    assert not (tmp_path / "model").exists()


# ---- descriptions that say something else, and files that are not the folder's own -------------------------

COHERE2_NAMES = {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"]}


@pytest.mark.parametrize("changes", [
    {"architectures": 5}, {"architectures": {"0": "x"}}, {"architectures": [["x"]]},
    {"architectures": "CohereForCausalLM"}, {"model_type": ["cohere"]},
    {"model_type": {}}, {"num_hidden_layers": 10 ** 12}, {"num_hidden_layers": 0}, {"hidden_size": 2 ** 63},
    {"vocab_size": 2 ** 70}, {"num_key_value_heads": []},
    {"max_position_embeddings": 10 ** 30}, {"layer_norm_eps": 10 ** 400}, {"logit_scale": 10 ** 400},
    {"logit_scale": -1}, {"initializer_range": 0}, {"head_dim": True},
    {"tie_word_embeddings": "no"}, {"tie_word_embeddings": 1}, {"use_qk_norm": "false"}, {"use_qk_norm": []},
    {"rope_parameters": 5}, {"rope_parameters": [1]},
    {"rope_parameters": {"rope_theta": "x"}}, {"rope_parameters": {"rope_type": ["yarn"]}},
    {"eos_token_id": "9"}, {"eos_token_id": [[9]]}, {"eos_token_id": {}},
    {"pad_token_id": "0"}, {"pad_token_id": [0]}, {"bos_token_id": 1.5}, {**COHERE2_NAMES,
    "layer_types": {"sliding_attention": 1, "full_attention": 2}},
    {**COHERE2_NAMES, "layer_types": [["a"], {}]}, {**COHERE2_NAMES, "sliding_window_pattern": 0},
    {**COHERE2_NAMES, "sliding_window_pattern": {}},
    {**COHERE2_NAMES, "sliding_window": [4]}], ids=lambda changes: str(changes)[:60])
def test_a_value_of_config_json_of_another_type_or_size_is_refused_with_its_file_at_once(changes, folder):
    edit_json(folder / "config.json", **changes)
    started = time.perf_counter()
    assert str(folder / "config.json") in refused(folder, weights.load_meta)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("changes, says", [
    ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"), ({"partial_rotary_factor": 0.5},
    "partial_rotary_factor 0.5"), ({"rotary_pct": 0.25}, "rotary_pct"),
    ({"attention_bias": True}, "attention_bias"), ({"hidden_act": None}, "hidden_act None"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "scaled rope"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "scaled rope"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaled rope"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 5e4}}},
    "for each layer type")])
def test_what_transformers_heeds_in_a_config_and_we_do_not_is_refused_by_name(changes, says, folder):
    """A quantization_config left behind beside whole weights was read past."""
    edit_json(folder / "config.json", **changes)
    assert says in refused(folder, weights.read_config)


def test_what_means_nothing_in_a_config_is_taken(folder):
    edit_json(folder / "config.json", quantization_config=None, attention_bias=None, attention_dropout=0,
        rope_scaling=None, rotary_pct=1.0, use_cache=False, head_dim=None,
              rope_parameters={"rope_type": "default", "rope_theta": 500000, "partial_rotary_factor": 1.0},
              logit_scale=1, _name_or_path="x/y", pretraining_tp=1)
    model, _ = weights.load(folder)
    assert_same(model, language_model())
    published = model.config.published()
    # transformers takes no 1 for 1.0
    assert type(published["logit_scale"]) is float and type(published["rope_theta"]) is float


def test_more_layers_than_the_file_has_are_refused_before_they_are_made(folder):
    """num_hidden_layers 10^12 built modules until memory was full."""
    edit_json(folder / "config.json", num_hidden_layers=99_999)
    started = time.perf_counter()
    assert "they are of 2 layers, num_hidden_layers is 99999" in refused(folder, weights.load_meta)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("text", ["5", "null", '"x"', "[]", "[" * 100_000, '{"a":' * 100_000,
    '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', b"\xff", b""],
                         ids=lambda text: str(text)[:12])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.json"])
def test_a_description_that_is_no_json_object_of_sound_values_is_refused_with_its_name(name, text, folder):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(folder)
    assert name in line and str(folder) in line and len(line) < 500


@pytest.mark.parametrize("changes", [{"chat_template": 5}, {"chat_template": [5]}, {"chat_template": [{}]},
    {"chat_template": {"default": "x"}}, {"chat_template": True},
                                     {"chat_template": [{"name": "default", "template": 5}]},
                                     {"chat_template": []}, {"bos_token": 5}, {"bos_token": {}},
                                     {"eos_token": [1]},
                                     {"tokenizer_class": 5}, {"added_tokens_decoder": 5},
                                     {"added_tokens_decoder": {"x": {}}},
                                     {"added_tokens_decoder": {"400": {"content": "more"}}},
                                     {"added_tokens_decoder": {"7": {"content": "<PAD>"}}}])
def test_a_value_of_tokenizer_config_json_of_another_type_is_refused(changes, folder):
    """And one that transformers would add tokens for, beside those of tokenizer.json."""
    edit_json(folder / "tokenizer_config.json", **changes)
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("changes", [{"eos_token_id": "9"}, {"eos_token_id": []}, {"pad_token_id": "x"},
    {"bos_token_id": {}}])
def test_a_token_of_generation_config_json_of_another_type_is_refused(changes, folder):
    edit_json(folder / "generation_config.json", **changes)
    assert "generation_config.json: " + next(iter(changes)) in refused(folder)


@pytest.mark.parametrize("change", [lambda model: model["vocab"].update(H=5000),
    lambda model: model["vocab"].update(H=400)])
def test_the_largest_id_of_the_tokenizer_is_compared_with_the_vocabulary_not_the_number_of_tokens_alone(
        change, folder):
    """The letter H with the id 5000 of 400 ended in an IndexError of the embedding."""
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(text["model"])
    (folder / "tokenizer.json").write_text(json.dumps(text))
    assert "tokens, the largest id" in refused(folder, weights.load_meta)


@pytest.mark.parametrize("changes", [{"continuing_subword_prefix": "##"}, {"vocab": {"a": -1}}, {"merges": 5},
    {"type": "Unigram"}])
def test_a_tokenizer_that_the_library_cannot_read_is_refused_with_its_name_whatever_it_raises(changes,
        folder):
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    text["model"].update(changes)
    (folder / "tokenizer.json").write_text(json.dumps(text))
    assert "tokenizer.json: not a readable tokenizer.json" in refused(folder)


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "model.safetensors", "model.safetensors.index.json", "README.md",
         "LICENSE", "modeling_x.py"]


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_a_pipe_and_a_folder_are_refused_at_once_for_every_file(name, folder):
    """Only weights were held to the folder: chat_template.jinja -> /etc/passwd was published in the
    settings."""
    secret = folder.parent / "secret"
    secret.write_text("{}")

    def link(path):
        path.symlink_to(secret)

    for make, says in ((link, "a link out of the folder"), (os.mkfifo, "not a plain file"),
            (lambda path: path.symlink_to("nowhere"), "not a plain file")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        started = time.perf_counter()
        assert says in (line := refused(folder)) and str(folder / name) in line
        assert time.perf_counter() - started < 2


def test_whatever_else_a_folder_holds_that_is_not_weights_goes_along(folder, tmp_path):
    kept = {"LICENSE": b"free\xff", "README.md": b"# A model", "vocab.json": b"{}", "merges.txt": b"#version",
        "tokenizer.model": b"\x0a", "special_tokens_map.json": b"{}",
            "added_tokens.json": b'{"<PAD>": 0}', "modeling_x.py": b"x = 1",
            "preprocessor_config.json": b"{}", "notes": b"", "tokenizer.py": b""}
    left = ["pytorch_model.bin", "model.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx", "x.npz",
        "x.pt", "x.pth", "x.ckpt", "other.safetensors",
            "pytorch_model.bin.index.json", ".hidden", "merge.json", "search.json", "metrics.jsonl",
            "eval.json", "report.html"]
    for name in [*kept, *left]:
        (folder / name).write_bytes(kept.get(name, b"?"))
    (folder / ".cache").mkdir()
    (folder / "original").mkdir()
    files = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors"}
    for trunk in (False, True):
        weights.save(saved := tmp_path / f"saved-{trunk}", *weights.load(folder, trunk=trunk))
        assert {path.name for path in saved.iterdir()} == files | kept.keys()
        assert all((saved / name).read_bytes() == data for name, data in kept.items())


def test_a_reward_model_names_a_class_of_ours_and_one_that_names_the_older_class_is_read(tmp_path):
    """There is no CohereForSequenceClassification in transformers."""
    for changes, name in (({}, "Cohere"), (COHERE2, "Cohere2")):
        model = reward_model(**changes)
        weights.save(tmp_path / name, model, tokenizer())
        about = json.loads((tmp_path / name / "config.json").read_text())
        assert about["architectures"] == [f"{name}RewardModel"] and not {"num_labels",
            "id2label"} & about.keys()
        edit_json(tmp_path / name / "config.json", architectures=[f"{name}ForSequenceClassification"])
        assert_same(weights.load(tmp_path / name)[0], model)


def test_without_architectures_a_folder_is_the_language_model_of_its_model_type(folder):
    edit_json(folder / "config.json", architectures=None)
    assert type(weights.load(folder)[0]).__name__ == "CohereForCausalLM"


def test_a_models_place_is_looked_at_before_the_work_and_an_older_model_of_its_own_is_replaced(
    folder, tmp_path
):
    """A user's README in RUN/model was found in the way after all the training."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    model, tokenizer = weights.load(folder)
    weights.save(tmp_path / "model", model, tokenizer)
    assert (tmp_path / "model" / "1_Pooling" / "config.json").exists()
    weights.check_place(tmp_path / "model", model, tokenizer)
    weights.save(tmp_path / "model", model, tokenizer)
    for name in ("thesis.txt", "1_Pooling/thesis.txt"):
        (tmp_path / "model" / name).write_text("thesis")
        with pytest.raises(ValueError, match=f"{name} is in the way"):
            weights.check_place(tmp_path / "model", model, tokenizer)
        with pytest.raises(ValueError, match="in the way"):
            weights.save(tmp_path / "model", model, tokenizer)
        assert (tmp_path / "model" / name).read_text() == "thesis"
        (tmp_path / "model" / name).unlink()


def test_a_folder_has_a_name_however_it_is_written(tmp_path, monkeypatch):
    """`--model model` and `--model .` had none."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "model")
    written = [".", "../model", "../../run", f"{tmp_path}/run/model/"]
    assert [weights.name_of(folder) for folder in written] == ["run"] * 4


def test_a_runs_folder_in_place_of_its_model_is_refused_with_the_models_place(tmp_path):
    weights.save(tmp_path / "run" / "model", language_model(), tokenizer())
    (tmp_path / "run" / "config.json").write_text(json.dumps({"stage": "sft", "settings": {}}))
    for read in (weights.read_config, weights.load):
        with pytest.raises(ValueError, match=f"is the folder of a run; give its model, {tmp_path}/run/model"):
            read(tmp_path / "run")
