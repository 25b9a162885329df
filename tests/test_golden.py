"""The decoder and the tokenizer against transformers' own: recorded logits and ids (tests/golden), and, where
transformers is installed, folders that it loads as we save them."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import tokenizer

from aya_min import weights
from aya_min.model_config import ModelConfig
from aya_min.model import CohereForCausalLM
from aya_min.tokenizer import load_tokenizer, train_tokenizer

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_golden import CASES, KEPT, tensors, tokens

CONFIGS = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))


def write(folder, case):
    """The model folder of a case: config.json as transformers wrote it, weights from the function that
    made them there."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[case]), encoding="utf-8")
    with torch.device("meta"):
        shapes = {
            name: tuple(p.shape)
            for name, p in CohereForCausalLM(ModelConfig.from_published(CONFIGS[case])).state_dict().items()
        }
    made = tensors(shapes, list(CASES).index(case))
    save_file(
        {name: torch.from_numpy(t) for name, t in made.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer().save(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(case, tmp_path):
    model, _ = weights.load(write(tmp_path / "model", case))
    ids, mask = tokens(list(CASES).index(case))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).numpy()[mask][:, KEPT]
    with safe_open(GOLDEN / "golden.safetensors", "numpy") as file:
        assert file.metadata()["transformers"] == "5.23.0"
        golden = file.get_tensor(case)
    assert golden.std() > 0.05 and np.abs(logits - golden).max() <= 1e-5


def test_there_are_as_many_golden_cases_as_recorded_ones_and_both_architectures_are_among_them():
    with safe_open(GOLDEN / "golden.safetensors", "numpy") as file:
        assert set(file.keys()) == set(CASES) == set(CONFIGS) - {"cohere", "cohere2"}
    assert {CONFIGS[case]["architectures"][0] for case in CASES} == {
        "CohereForCausalLM",
        "Cohere2ForCausalLM",
    }


@pytest.mark.parametrize("model_type", ["cohere", "cohere2"])
def test_what_a_config_leaves_out_has_transformers_default(model_type):
    assert ModelConfig.from_published({"model_type": model_type}) == ModelConfig.from_published(
        CONFIGS[model_type]
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_save_unchanged_and_computes_the_same(case, shard_bytes, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; it is needed by this comparison only"
    )
    model, its_tokenizer = weights.load(write(tmp_path / "model", case))
    weights.save(tmp_path / "saved", model, its_tokenizer, shard_bytes=shard_bytes)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1 or shard_bytes < 10**9
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values()), report
    ids, mask = map(torch.from_numpy, tokens(0))
    with torch.no_grad():
        difference = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask] - model(ids)[mask]
    assert difference.abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    for name, tensor in load_file(tmp_path / "theirs" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


# ---- the tokenizer -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recorded():
    return json.loads(gzip.decompress((GOLDEN / "tokenizer.json.gz").read_bytes()))


@pytest.fixture
def published(recorded, tmp_path):
    for name, text in recorded["files"].items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return tmp_path


def test_a_tokenizer_that_was_trained_here_has_the_ids_that_transformers_has_for_it(recorded, published):
    own = load_tokenizer(published)
    assert recorded["transformers"].startswith("5.") and len(recorded["texts"]) > 25
    for text, ids in recorded["texts"]:
        assert own.encode(text) == ids
    for messages, prompt, text, ids in recorded["conversations"]:
        assert own.encode_chat(messages, prompt)[0] == ids and own.turns.written(messages, prompt) == text


def test_it_is_saved_again_as_it_was_and_one_that_is_trained_now_has_the_same_settings(recorded, published):
    (published / "again").mkdir()
    load_tokenizer(published).save(published / "again")
    train_tokenizer(["hi hi"], 270).save(published)
    for name, text in recorded["files"].items():
        assert (published / "again" / name).read_text(encoding="utf-8") == text
        then, now = json.loads(text), json.loads((published / name).read_text(encoding="utf-8"))
        assert {k: v for k, v in then.items() if k != "model"} == {k: v for k,
            v in now.items() if k != "model"}


def test_a_folder_of_before_that_names_coheres_class_is_saved_under_the_one_that_reads_our_file(recorded,
        published):
    """transformers 5 rebuilds CohereTokenizerFast, without our cut at Han characters."""
    path = published / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")),
        "tokenizer_class": "CohereTokenizerFast", "legacy": True}))
    (published / "again").mkdir()
    load_tokenizer(published).save(published / "again")
    about = json.loads((published / "again" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast" and about["legacy"] is True
    assert (published / "again" / "tokenizer.json").read_text(encoding="utf-8") == recorded["files"]["tokeni"
        "zer.json"]
