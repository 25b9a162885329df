"""aya_min/alike.py: configurations and tokenizers compared by what they mean, and the files that go along
with a merge."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import language_model, tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers

from aya_min import weights
from aya_min.alike import config_differences, files_along, meaning, tokenizer_differences
from aya_min.command import guarded
from aya_min.merge_config import from_config
from aya_min.merge_folders import compare_folders, difference_table, merge_folders
from merge import main

COHERE = {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "vocab_size": 400,
          "hidden_size": 32, "intermediate_size": 64,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "logit_scale": 1.0,
          "rope_theta": 10000.0}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "rms_norm_eps": 1e-5, "rope_theta": 5e5}
GEMMA = {"model_type": "gemma3", "text_config": {"sliding_window": 512, "num_hidden_layers": 6,
                                                 "sliding_window_pattern": 6},
                                                 "vision_config": {"patch_size": 14}}


def edit(path, **changes):
    """The JSON object of a file with these keys; None takes one away."""
    value = {key: part for key, part in (json.loads(path.read_text()) | changes).items() if part is not None}
    path.write_text(json.dumps(value))


@pytest.fixture
def pair(tmp_path):
    """Two models of one kind, saved by us."""
    for name, seed in (("A", 1), ("B", 2)):
        weights.save(tmp_path / name, language_model(seed), tokenizer())
    return [tmp_path / "A", tmp_path / "B"]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main(list(map(str, arguments))), "merge.py")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


# ---- config.json -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("start, change", [
    (COHERE, {"logit_scale": 0.5}), (COHERE, {"rope_theta": 5e5}), (COHERE, {"layer_norm_eps": 1e-6}),
    (COHERE, {"use_qk_norm": True}),
    (COHERE, {"hidden_act": "gelu"}), (COHERE, {"head_dim": 16}),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"max_position_embeddings": 4096}),
    (COHERE, {"rope_theta": None}),
    (COHERE, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    (COHERE, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    (COHERE, {"attention_bias": True}), (COHERE, {"quantization_config": {"quant_method": "fp8"}}),
    (COHERE, {"something_new": 1}),
    (COHERE | {"model_type": "cohere2"}, {"sliding_window": 64}), (COHERE | {"model_type": "cohere2"},
                                                                   {"sliding_window_pattern": 2}),
    (COHERE | {"model_type": "cohere2"}, {"layer_types": ["full_attention"] * 2}),
    (LLAMA, {"rms_norm_eps": 1e-6}), (LLAMA, {"num_key_value_heads": 2}),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    (LLAMA, {"rope_theta": None}), (LLAMA, {"model_type": "mistral"}), (LLAMA, {"hidden_act": "gelu"}),
    (LLAMA, {"id2label": {"0": "no", "1": "yes"}}),
    (GEMMA, {"text_config": GEMMA["text_config"] | {"sliding_window": 1024}}),
    (GEMMA, {"vision_config": {"patch_size": 16}}),
    (GEMMA, {"text_config": GEMMA["text_config"] | {"sliding_window_pattern": 3}}),
    (GEMMA, {"text_config": GEMMA["text_config"] | {"query_pre_attn_scalar": 1}}),
], ids=lambda value: " ".join(value) if len(value) < 2 else value.get("model_type"))
def test_a_key_that_changes_the_computation_is_named(start, change):
    other = {key: value for key, value in (start | change).items() if value is not None}
    for first, second in ((start, other), (other, start)):
        found = config_differences("B", second, "A", first)
        assert found and all(text.startswith("B: ") and ", in A " in text for text in found)
        assert any(key.split("_")[0] in text or "rope" in text or "layer_types" in text for key in change
                   for text in found), found


@pytest.mark.parametrize(
    "start, change",
    [
        (
            COHERE,
            {
                "torch_dtype": "bfloat16",
                "dtype": "bfloat16",
                "use_cache": False,
                "transformers_version": "5.1",
                "_name_or_path": "x",
            },
        ),
        (COHERE, {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        (COHERE, {"rope_theta": 10000}),
        (COHERE, {"rope_theta": None, "rope_scaling": {"rope_theta": 10000, "type": "default"}}),
        (COHERE, {"rope_scaling": None}),
        (
            COHERE,
            {
                "layer_norm_eps": 1e-5,
                "head_dim": 8,
                "hidden_act": "silu",
                "attention_bias": False,
                "use_qk_norm": False,
                "attention_dropout": 0.1,
            },
        ),
        (
            COHERE,
            {
                "max_position_embeddings": 8192,
                "initializer_range": 0.5,
                "tie_word_embeddings": True,
                "temperature": 0.3,
                "architectures": None,
            },
        ),
        (COHERE, {"sliding_window": 64, "sliding_window_pattern": 4}),  # cohere has no windows
        (
            LLAMA
            | {"sliding_window": 131072, "use_sliding_window": False, "layer_types": ["full_attention"] * 2},
            {"sliding_window": None, "layer_types": None, "max_position_embeddings": 77},
        ),
        (LLAMA, {"router_aux_loss_coef": 0.02, "use_mrope": False, "is_decoder": False, "attention_bias": 0}),
        (
            COHERE | {"architectures": ["CohereForSequenceClassification"]},
            {"architectures": ["CohereRewardModel"]},
        ),
        (
            COHERE | {"model_type": "cohere2"},
            {"sliding_window_pattern": 4, "layer_types": ["sliding_attention"] * 2, "sliding_window": 4096},
        ),
        (
            LLAMA,
            {
                "num_key_value_heads": 4,
                "head_dim": 8,
                "attention_bias": False,
                "mlp_bias": False,
                "pretraining_tp": 1,
                "attention_dropout": 0.0,
            },
        ),
        (LLAMA, {"hidden_act": "silu", "intermediate_size": 11008, "tie_word_embeddings": False}),
        (
            LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4},
            {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": 131072},
        ),
        (LLAMA, {"rope_theta": None, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}),
        (
            LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}},
            {
                "rope_theta": None,
                "rope_scaling": None,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            },
        ),
        (
            LLAMA | {"use_sliding_window": False, "sliding_window": 4096},
            {"layer_types": ["full_attention"] * 2},
        ),
        (
            GEMMA,
            {
                "text_config": {
                    "sliding_window": 512,
                    "num_hidden_layers": 6,
                    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
                    "dtype": "float32",
                }
            },
        ),
    ],
    ids=lambda value: None,
)
def test_a_configuration_that_says_the_same_in_another_way_is_the_same(start, change):
    other = {key: value for key, value in (start | change).items() if value is not None}
    assert config_differences("B", other, "A", start) == config_differences("B", start, "A", other) == []


def test_the_old_configuration_of_aya_23_and_one_resaved_by_transformers_5_are_the_same():
    """The published config.json of CohereForAI/aya-23-8B, and what transformers 5 writes of it."""
    old = {"architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
           "bos_token_id": 5, "eos_token_id": 255001,
           "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
           "layer_norm_eps": 1e-05,
           "logit_scale": 0.0625, "max_position_embeddings": 8192, "model_type": "cohere",
           "num_attention_heads": 32, "num_hidden_layers": 32,
           "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta": 10000, "torch_dtype": "float16",
           "transformers_version": "4.40.0.dev0",
           "use_cache": True, "use_qk_norm": False, "vocab_size": 256000}
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "torch_dtype")} | {
        "dtype": "float16", "transformers_version": "5.0.0",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": True}
    assert config_differences("new", new, "old", old) == config_differences("old", old, "new", new) == []
    assert config_differences("new", new | {"logit_scale": 1.0}, "old",
                              old) == ["new: logit_scale is 1.0, in old 0.0625"]


@pytest.mark.parametrize("layers", [10 ** 12, -1, "many", 2.5, None, [3]])
def test_a_number_of_layers_that_no_model_has_builds_nothing(layers):
    for model_type in ("cohere2", "gemma2"):
        assert meaning({"model_type": model_type, "num_hidden_layers": layers, "sliding_window_pattern": 4})


def test_a_merge_of_models_that_compute_otherwise_is_refused_unless_asked_for(pair, tmp_path, capsys):
    """Merged with another logit_scale, the result hung on the order of the folders, and diff said 0."""
    edit(pair[1] / "config.json", logit_scale=0.5)
    line = refused(capsys, "linear", *pair, "--out", tmp_path / "out")
    assert (f"{pair[1]}: logit_scale is 0.5, in {pair[0]} 1.0 (--allow-config-differences takes that of "
            f"{pair[0]})") in line
    assert main(["linear", *map(str, pair), "--out", str(tmp_path / "out"),
                 "--allow-config-differences"]) == 0
    assert "logit_scale is 0.5" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["logit_scale"] == 1.0
    record = json.loads((tmp_path / "out" / "merge.json").read_text())["config"]
    # the record says that it was allowed
    merge_folders(out=tmp_path / "again", **from_config(record))
    capsys.readouterr()
    assert record["allow_config_differences"] is True
    assert "logit_scale" in refused(capsys, "ties", pair[0], "--base", pair[1], "--out", tmp_path / "o")


def test_diff_shows_the_configurations_that_differ(pair, tmp_path, capsys):
    shutil.copyfile(pair[0] / "model.safetensors", pair[1] / "model.safetensors")
    assert all("first" not in row for row in compare_folders(*pair))
    edit(pair[1] / "config.json", logit_scale=0.5, rope_theta=3.0, rope_parameters=None)
    rows = compare_folders(*pair)
    assert rows[0] == {"what": "config.json: logit_scale", "first": "1.0",
                       "second": "0.5"} and rows[1]["what"] == "config.json: rope_theta"
    assert (
        difference_table(rows).splitlines()[0]
        == "config.json: logit_scale is 1.0 in the first, 0.5 in the second"
    )
    assert main(["diff", *map(str, pair), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert {"base": "1.0"}.items() <= compare_folders(*pair, pair[0])[0].items()


def test_ends_and_generation_settings_that_differ_are_said_and_those_of_the_first_taken(pair, tmp_path,
                                                                                        capsys):
    edit(pair[1] / "config.json", eos_token_id=[7, 9], pad_token_id=3)
    edit(pair[1] / "generation_config.json", temperature=0.3)
    (pair[1] / "chat_template.jinja").write_text("{{ other }}")
    assert main(["linear", *map(str, pair), "--out", str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "%" not in line and line]
    assert said == [f"{pair[1]} differs from {pair[0]} in eos_token_id of config.json, pad_token_id of "
                    "config.json, generation_config.json, the chat template; the latter's is taken"]
    written, given = (folder / "generation_config.json" for folder in (tmp_path / "out", pair[0]))
    assert written.read_bytes() == given.read_bytes()
    assert main(["linear", str(pair[0]), str(pair[0]), "--out",
                 str(tmp_path / "same")]) == 0 and "differs" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ['[1]', '"x"', '{"a": ' * 900 + '1' + '}' * 900, '{"a": ' * 3000,
                                  '{"logit_scale": NaN}', '{"a": 1, "a": 2}', ''])
def test_a_config_that_is_no_configuration_is_one_line(text, pair, tmp_path, capsys):
    (pair[1] / "config.json").write_text(text)
    assert "B/config.json" in refused(capsys, "linear", *pair, "--out", tmp_path / "out")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10 ** 12}, {"rope_scaling": 5},
                                    {"rope_parameters": [1]}, {"layer_types": {"a": 1}}, {"hidden_size": "x"},
                                    {"num_attention_heads": 0}, {"eos_token_id": {"a": 1}},
                                    {"model_type": ["x"]}, {"logit_scale": 10 ** 400}])
def test_values_of_other_types_are_compared_too(change, pair, tmp_path, capsys):
    edit(pair[1] / "config.json", **change)
    if "eos_token_id" in change:
        assert main(["linear", *map(str, pair), "--out", str(tmp_path / "out")]) == 0
    else:
        assert "cannot be merged" in refused(capsys, "linear", *pair, "--out", tmp_path / "out")


# ---- tokenizers --------------------------------------------------------------------------------------------

def rewritten(folder, change):
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(value) or value, ensure_ascii=False), encoding="utf-8")


def as_strings(value):
    value["model"]["merges"] = [" ".join(merge) for merge in value["model"]["merges"]]


def padded(value):
    value["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
                        "pad_id": 0, "pad_type_id": 0, "pad_token": "<PAD>"}


def spelled_out(value):
    """As transformers 5 saves them: a template that adds nothing, no prefix as an empty one."""
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    value["post_processor"] = {"type": "TemplateProcessing", "single": [a], "pair": [a, b],
                               "special_tokens": {}}
    value["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}


def with_bos(value):
    spelled_out(value)
    name = "<BOS_TOKEN>"
    value["post_processor"]["single"].insert(0, {"SpecialToken": {"id": name, "type_id": 0}})
    value["post_processor"]["special_tokens"] = {name: {"id": name, "ids": [5], "tokens": [name]}}


def reordered(value):
    value["model"]["vocab"] = dict(reversed(value["model"]["vocab"].items()))
    return dict(reversed(value.items()))


@pytest.mark.parametrize("change", [lambda value: None, as_strings, padded, reordered, spelled_out,
                                    lambda value: value.update(version="1.0")],
                         ids=["no indentation", "merges as strings", "padding and truncation",
                              "another order", "transformers 5", "version"])
def test_tokenizers_of_one_meaning_merge_whatever_their_bytes(change, pair, tmp_path):
    rewritten(pair[1], change)
    assert (pair[0] / "tokenizer.json").read_bytes() != (pair[1] / "tokenizer.json").read_bytes()
    merge_folders(pair, tmp_path / "out", "linear")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pair[0] / "tokenizer.json").read_bytes()


def swap(value):
    vocab = value["model"]["vocab"]
    one, two = list(vocab)[50:52]
    vocab[one], vocab[two] = vocab[two], vocab[one]


def without_last(value):
    value["model"]["vocab"].popitem()
    value["model"]["merges"].pop()


def first_flag(value):
    value["added_tokens"][0]["lstrip"] = True


@pytest.mark.parametrize("change, how", [
    (swap, "ids of 2 tokens differ; the first is"), (without_last, "1 tokens only in"),
    (lambda value: value["model"]["merges"].reverse(), "merge 1 is the first that differs"),
    (lambda value: value.update(normalizer=None), "the normalizer differs"),
    (lambda value: value.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True,
                                               "trim_offsets": True, "use_regex": True}),
                                               "the pre_tokenizer differs"),
    (first_flag, "lstrip"), (lambda value: value["model"].update(ignore_merges=True),
                             "the model's ignore_merges differs"),
    (lambda value: value.update(decoder=None), "the decoder differs")])
def test_where_tokenizers_differ_the_message_says_how(change, how, pair, tmp_path, capsys):
    rewritten(pair[1], change)
    line = refused(capsys, "linear", *pair, "--out", tmp_path / "out")
    assert f"{pair[1]}: tokenizer.json is not that of {pair[0]} (" in line and how in line


def test_a_limit_of_positions_that_computes_nothing_is_said(pair, tmp_path, capsys):
    path = pair[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 77}))
    assert main(["linear", *map(str, pair), "--out", str(tmp_path / "out")]) == 0
    assert "max_position_embeddings of config.json" in capsys.readouterr().err


def test_what_is_added_around_a_plain_text_is_said_and_does_not_keep_two_models_from_merging(
    pair, tmp_path, capsys
):
    rewritten(pair[1], with_bos)
    assert main(["linear", *map(str, pair), "--out", str(tmp_path / "out")]) == 0
    assert "what tokenizer.json adds around a text (post_processor)" in capsys.readouterr().err


def test_other_models_of_tokenizers_are_compared_too(tmp_path):
    for name, score in (("A", -1.0), ("B", -2.0), ("C", -1.0)):
        made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", score), ("b", -3.0)], unk_id=0))
        made.normalizer = normalizers.NFKC() if name == "C" else normalizers.NFC()
        made.add_special_tokens([AddedToken("<x>", special=True)])
        (tmp_path / name).mkdir()
        made.save(str(tmp_path / name / "tokenizer.json"))
    assert "the scores of the tokens differ" in tokenizer_differences(tmp_path / "B", tmp_path / "A")[0]
    assert "the normalizer differs" in tokenizer_differences(tmp_path / "C", tmp_path / "A")[0]
    assert tokenizer_differences(tmp_path / "A", tmp_path / "A") == []



@pytest.mark.parametrize("name, one, two, how", [
    ("vocab.json", '{"a": 0, "b": 1}', '{"b": 1, "a": 0}', None), ("vocab.json", '{"a": 0, "b": 1}',
                                                                   '{"a": 1, "b": 0}',
                                                                   "ids of 2 tokens differ"),
    ("merges.txt", "#version: 0.2\na b\n", "a b\r\n", None), ("merges.txt", "a b\nb c\n", "b c\na b\n",
                                                              "line 1 is the first that differs"),
    ("tokenizer.model", "x", "y", "the bytes differ"), ("added_tokens.json", '{"<x>": 9}',
                                                        '{"<x>": 9, "<y>": 10}', "1 tokens only in"),
    ("tokenizer_config.json", '{"add_bos_token": true}', '{"add_bos_token": false}',
     "add_bos_token is False, in FIRST True"),
    ("tokenizer_config.json", '{"model_max_length": 5}', '{"model_max_length": 7, "add_bos_token": true}',
     None),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"content": "<x>"}}}',
     '{"added_tokens_decoder": {"4": {"content": "<x>"}}}', "ids of 1 tokens differ"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"content": "<x>"}}}',
     '{"added_tokens_decoder": {"3": {"content": "<x>"}, "4": {"content": "<y>"}}}', None),
    ("special_tokens_map.json", '{"eos_token": "<x>"}', '{"eos_token": "<y>"}', None),
    ("vocab.txt", "a\nb\n", "a\nc\n", "line 2 is the first")])
def test_all_files_of_a_tokenizer_are_compared(name, one, two, how, pair):
    for folder, text in zip(pair, (one, two)):
        (folder / name).write_text(text)
    found = tokenizer_differences(pair[1], pair[0])
    assert (found == []) if how is None else (
        f"{name} is not that of" in found[0] and how.replace("FIRST", str(pair[0])) in found[0])


def test_a_file_that_says_again_what_tokenizer_json_says_may_be_missing_but_not_all_of_them(pair):
    (pair[0] / "vocab.json").write_text('{"a": 0}')
    assert tokenizer_differences(*pair) == tokenizer_differences(*pair[::-1]) == []
    (pair[1] / "tokenizer.json").unlink()
    assert "B has no tokenizer.json or vocab.json, which" in tokenizer_differences(pair[1], pair[0])[0]
    assert "B has no tokenizer.json or vocab.json, which" in tokenizer_differences(pair[0], pair[1])[0]


@pytest.mark.parametrize("text", ["5", "[]", "{",
                                  '{"model": {"type": "BPE", "vocab": {}, "merges": [], '
                                  '"continuing_subword_prefix": "##"}}', "\xff",
                                  '{"a": ' * 900 + "1" + "}" * 900])
def test_a_tokenizer_that_cannot_be_read_is_one_line(text, pair, tmp_path, capsys):
    (pair[1] / "tokenizer.json").write_bytes(text.encode("latin-1"))
    assert "B" in refused(capsys, "linear", *pair, "--out", tmp_path / "out")


# ---- files -------------------------------------------------------------------------------------------------

def test_all_files_that_are_not_weights_go_along_from_the_first_model(pair, tmp_path):
    """vocab.json, merges.txt and *.py were left behind: transformers then loads a tokenizer of one token, or
    no model."""
    kept = ["vocab.json", "merges.txt", "tokenizer.model", "modeling_x.py", "README.md", "LICENSE",
            "1_Pooling/config.json", "additional_chat_templates/tool.jinja", "modules.json"]
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "onnx/model.onnx",
            "original/consolidated.00.pth", "tf_model.h5", "merge.json", "search.json",
            ".gitattributes", ".cache/x", "checkpoint-5/config.json", "checkpoint-5/model.safetensors",
            "training_args.bin", "adapter_config.json", "extra.safetensors", "Model.CKPT"]
    for name in kept + left:
        (pair[0] / name).parent.mkdir(exist_ok=True)
        (pair[0] / name).write_text("{}" if name.endswith("json") else name)
    (pair[1] / "only_in_the_second.txt").write_text("x")
    out = merge_folders(pair, tmp_path / "out", "linear")
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "model.safetensors", "merge.json"}
    assert files.keys() == {*kept, *own} and all(files[name].read_bytes() == (pair[0] / name).read_bytes()
                                                 for name in kept)
    assert "versions" in json.loads(files["merge.json"].read_text())


LINKED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "README.md", "vocab.json", "special_tokens_map.json", "model.safetensors"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder_is_refused_for_every_file_of_any_model(name, pair, tmp_path, capsys):
    """E1 of the hostile tests: generation_config.json -> /etc/passwd was copied into the merge."""
    secret = tmp_path / "secret"
    shutil.copyfile(pair[0] / name, secret) if (pair[0] / name).exists() else secret.write_text("{}")
    (pair[0] / name).unlink(missing_ok=True)
    (pair[0] / name).symlink_to(secret)
    assert f"A/{name}: a link out of the folder" in refused(capsys, "linear", *pair, "--out",
                                                            tmp_path / "out")
    # which only the first model gives
    if name != "README.md":
        if not (pair[1] / name).exists():
            (pair[1] / name).write_text("{}")
        assert f"A/{name}: a link out of the folder" in refused(capsys, "linear", *pair[::-1], "--out",
                                                                tmp_path / "out")


def test_links_to_folders_and_links_from_subfolders_are_refused(pair, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (pair[0] / "sub").symlink_to(tmp_path / "elsewhere")
    assert "A/sub: a link to a folder" in refused(capsys, "linear", *pair, "--out", tmp_path / "out")
    (pair[0] / "sub").unlink()
    (pair[0] / "sub").mkdir()
    (pair[0] / "sub" / "notes.txt").symlink_to("/etc/hostname")
    assert "notes.txt: a link out of the folder" in refused(capsys, "linear", *pair, "--out",
                                                            tmp_path / "out")


def test_the_links_of_the_hub_s_cache_are_copied_as_files(pair, tmp_path):
    cache = tmp_path / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "123"
    (pair[0] / "sub").mkdir()
    (pair[0] / "sub" / "notes.txt").write_text("hello")
    for i, path in enumerate(sorted(path for path in pair[0].rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(pair[0])
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, cache / "blobs" / str(i))
        link.symlink_to(os.path.relpath(cache / "blobs" / str(i), link.parent))
    out = merge_folders([snapshot, pair[1]], tmp_path / "out", "linear")
    assert (out / "sub" / "notes.txt").read_text() == "hello"
    assert not any(path.is_symlink() for path in out.rglob("*"))
    by_hand = merge_folders(pair, tmp_path / "by-hand", "linear")
    assert (out / "model.safetensors").read_bytes() == (by_hand / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json",
                                  "model.safetensors.index.json", "generation_config.json", "README.md",
                                  "chat_template.jinja"])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(name, pair, tmp_path, capsys):
    (pair[0] / name).unlink(missing_ok=True)
    os.mkfifo(pair[0] / name)
    assert f"A/{name}: not a plain file" in refused(capsys, "linear", *pair, "--out", tmp_path / "out")


def test_names_of_tensors_do_not_steer_the_terminal(tmp_path, capsys):
    for name in "AB":
        (tmp_path / name).mkdir()
        save_file({"w\n\x1b[31mred": torch.ones(3)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    assert main(["diff", str(tmp_path / "A"), str(tmp_path / "B")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "w [31mred" in shown
    save_file({"v\n\x1b[31mred": torch.ones(3)}, tmp_path / "B" / "model.safetensors")
    assert "\x1b" not in refused(capsys, "diff", tmp_path / "A", tmp_path / "B")


def test_a_base_and_its_fine_tune_saved_by_us_merge_without_a_word(pair, tmp_path, capsys):
    model, its_tokenizer = weights.load(pair[0])
    weights.save(tmp_path / "tuned", model, its_tokenizer, dtype=torch.bfloat16)
    assert main(["slerp", str(pair[0]), str(tmp_path / "tuned"), "--out", str(tmp_path / "out")]) == 0
    assert not [line for line in capsys.readouterr().err.splitlines() if "%" not in line and line]


def test_a_merge_of_one_model_has_all_of_its_files_and_tensors(pair, tmp_path):
    out = merge_folders(pair[:1], tmp_path / "out", "linear")
    own = {"config.json", "merge.json", "model.safetensors"}
    assert {str(path) for path in files_along(pair[0])} == {path.name for path in out.iterdir()} - own
    assert all(torch.equal(tensor, load_file(pair[0] / "model.safetensors")[name]) for name,
               tensor in load_file(out / "model.safetensors").items())
