"""Model folders: what is written is what is read, under the published names; anything less than a whole and fitting folder is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import language_model, reward_model, tokenizer

from aya_min import weights
from aya_min.model import RewardModel
from aya_min.reward import score_texts

BLOCK = ["input_layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "self_attn.k_proj.weight",
         "self_attn.o_proj.weight", "self_attn.q_proj.weight", "self_attn.v_proj.weight"]
NAMES = ["model.embed_tokens.weight", *[f"model.layers.{i}.{name}" for i in (0, 1) for name in BLOCK], "model.norm.weight"]


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
    weight_map = {name: f"model-{i % num_shards + 1:05d}-of-{num_shards:05d}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in state.items() if weight_map[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return weight_map


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# there and back

@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"use_qk_norm": True}, {"head_dim": 16}])
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


@pytest.mark.parametrize("make, changes, more", [
    (language_model, {}, []), (language_model, {"tie_word_embeddings": False}, ["lm_head.weight"]), (reward_model, {}, ["score.weight", "score_logps.weight"]),
    (language_model, {"use_qk_norm": True}, [f"model.layers.{i}.self_attn.{x}_norm.weight" for i in (0, 1) for x in "qk"])])
def test_the_tensors_have_the_names_of_the_published_checkpoints(make, changes, more, tmp_path):
    """With tied embeddings the head is not written a second time."""
    weights.save(tmp_path / "model", make(**changes), tokenizer())
    assert sorted(load_file(tmp_path / "model" / "model.safetensors")) == sorted(NAMES + more)


def test_a_folder_has_the_five_files_and_says_what_loaders_look_for(folder):
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["CohereForCausalLM"] and config["model_type"] == "cohere" and config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 5, "eos_token_id": 9, "pad_token_id": 0}


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


def test_loaded_in_bfloat16_every_weight_is_rounded_once(folder):
    loaded, _ = weights.load(folder, dtype=torch.bfloat16)
    for name, t in loaded.state_dict().items():
        assert torch.equal(t, language_model().state_dict()[name].bfloat16()), name


# trunks and heads

def test_a_trunk_is_the_language_models_decoder_under_the_same_new_head_each_time(folder):
    first, again = weights.load_trunk(folder)[0], weights.load_trunk(folder)[0]
    assert isinstance(first, RewardModel)
    assert_same(first, again)
    assert_same(first.model, language_model().model)
    assert (first.score.weight != 0).all()


def test_the_trunk_of_a_reward_model_is_that_reward_model(tmp_path):
    weights.save(tmp_path / "rm", reward_model(), tokenizer())
    assert_same(weights.load_trunk(tmp_path / "rm")[0], reward_model())


def test_a_reward_model_without_score_logps_is_the_usual_last_token_head(tmp_path):
    """Its folder was refused, against the docstring of RewardModel."""
    weights.save(tmp_path / "rm", reward_model(), tokenizer())
    rewrite(tmp_path / "rm", lambda state: state.pop("score_logps.weight"))
    loaded, _ = weights.load(tmp_path / "rm")
    ids = tokenizer().encode_chat([{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}])[0]
    expected = reward_model().model(torch.tensor([ids]))[0, -1] @ reward_model().score.weight[0]
    assert score_texts(loaded, tokenizer(), [{"prompt": "red?", "completion": "blue"}]) == pytest.approx([expected.item()], abs=1e-5)


# what is refused

def test_a_missing_tensor_is_refused_by_name(folder):
    rewrite(folder, lambda state: [state.pop("model.layers.1.self_attn.o_proj.weight"), state.pop("model.norm.weight")])
    with pytest.raises(ValueError, match="2 missing: model.layers.1.self_attn.o_proj.weight model.norm.weight"):
        weights.load(folder)


def test_an_extra_tensor_is_refused_by_name(folder):
    rewrite(folder, lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2), "lm_head.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match="2 extra: lm_head.weight model.layers.2.mlp.up_proj.weight"):
        weights.load(folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folder):
    rewrite(folder, lambda state: state.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 16)}))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight has shape \(64, 16\), config.json wants \(64, 32\)"):
        weights.load(folder)


def test_a_transposed_matrix_is_refused_though_it_has_as_many_numbers(folder):
    rewrite(folder, lambda state: state.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 64)}))
    with pytest.raises(ValueError, match=r"has shape \(32, 64\)"):
        weights.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_a_truncated_file_is_refused(keep, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file .*copy or download it again"):
        weights.load(folder)


def test_a_truncated_shard_is_refused(folder):
    """It used to end in a traceback of the safetensors library."""
    file = folder / split(folder)["model.norm.weight"]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{file.name}: not a whole safetensors file"):
        weights.load(folder)


def test_a_shard_that_lacks_what_the_index_promises_is_refused_by_name(folder):
    """The tensor used to keep whatever was in memory."""
    file = folder / split(folder)["model.norm.weight"]
    state = load_file(file)
    state.pop("model.norm.weight")
    save_file(state, file)
    with pytest.raises(ValueError, match=f"{file.name}: does not hold what the index says: model.norm.weight"):
        weights.load(folder)


def test_a_missing_shard_is_refused(folder):
    file = folder / split(folder)["model.norm.weight"]
    file.unlink()
    with pytest.raises(ValueError, match=f"shard '{file.name}' is not a file in the folder"):
        weights.load(folder)


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(outside, folder):
    weight_map = split(folder)
    (folder / "sub").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "sub" / "model.safetensors")
    edit_json(folder / "model.safetensors.index.json", weight_map={**weight_map, "model.norm.weight": outside})
    with pytest.raises(ValueError, match="is not a file in the folder"):
        weights.load(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json: no weight_map"):
        weights.load(folder)


@pytest.mark.parametrize("changes, says", [
    ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM' is not supported; supported: CohereForCausalLM CohereForSequenceClassification"),
    ({"architectures": None}, "architecture '[?]' is not supported"), ({"model_type": "cohere2"}, "model_type 'cohere2' is not supported"),
    ({"attention_bias": True}, "attention_bias"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rope"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3")])
def test_an_unknown_architecture_or_variant_is_refused(changes, says, folder):
    if "rope_scaling" in changes:
        changes = {**changes, "rope_parameters": None}
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=says):
        weights.load(folder)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    weights.save(tmp_path / "model", language_model(vocab_size=300), tokenizer())
    with pytest.raises(ValueError, match="tokenizer.json has 400 tokens, config.json a vocabulary of 300"):
        weights.load(tmp_path / "model")


@pytest.mark.parametrize("name, says", [("config.json", "not a model folder"), ("tokenizer.json", "no tokenizer.json"), ("model.safetensors", "never pickles")])
def test_a_folder_without_one_of_its_files_is_refused(name, says, folder):
    (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=says):
        weights.load(folder)


@pytest.mark.parametrize("name, says", [("config.json", "config.json: not JSON"), ("tokenizer.json", "not a readable tokenizer.json")])
def test_a_broken_description_is_refused_with_its_name(name, says, folder):
    (folder / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=says):
        weights.load(folder)


def test_a_save_that_fails_leaves_no_folder_of_that_name(tmp_path):
    with pytest.raises(AttributeError):
        weights.save(tmp_path / "model", language_model(), None)
    assert not (tmp_path / "model").exists()
