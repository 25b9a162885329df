"""The families of decoders beside Cohere's: logits that transformers recorded (tests/golden), and that every
way to compute them here says the same."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from family_templates import tokenizer_of
from small import CPU, assert_close, language_model, logged, on_ranks, tokenizer

from aya_min import config, estimate, model_config, stages, weights
from aya_min.alike import config_differences
from aya_min.engine import Engine
from aya_min.fused import Fused
from aya_min.families import FAMILIES
from aya_min.merge_folders import merge_folders
from aya_min.model import CohereForCausalLM, RewardModel, SequenceClassifier, init_weights
from aya_min.model_config import ModelConfig
from aya_min.reward import score_texts
from aya_min.sampling import answer_rows, generate

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_families import CASES, YARN, settings, weights_of
from make_golden import KEPT, tokens

CONFIGS = json.loads((GOLDEN / "families.json").read_text(encoding="utf-8"))
LENGTHS = torch.tensor([24, 17, 5])


def model_of(case, **changes):
    """The model of a golden case."""
    model = CohereForCausalLM(ModelConfig.from_published(CONFIGS[case] | changes))
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(t) for name, t in weights_of(case, shapes).items()})
    return model


def write(folder, case):
    """The model folder of a case, config.json as transformers wrote it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[case]), encoding="utf-8")
    save_file(model_of(case).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(case, tmp_path):
    model, _ = weights.load(write(tmp_path / "model", case))
    ids, mask = tokens(list(CASES).index(case))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).numpy()[mask][:, KEPT]
    with safe_open(GOLDEN / "families.safetensors", "numpy") as file:
        golden = file.get_tensor(case)
    assert golden.std() > 0.05 and np.abs(logits - golden).max() <= 1e-5


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not name.startswith("cohere")])
def test_every_family_has_golden_cases_and_what_a_config_leaves_out_has_transformers_default(model_type):
    assert sum(case["model_type"] == model_type for case in CASES.values()) > 1
    assert ModelConfig.from_published({"model_type": model_type}) == ModelConfig.from_published(
        CONFIGS[model_type])


@pytest.mark.parametrize("case", CASES)
def test_a_config_survives_publishing_and_reading_as_older_files_say_it_too(case):
    config = ModelConfig.from_published(CONFIGS[case])
    published = json.loads(json.dumps(config.published()))
    assert ModelConfig.from_published(published) == config
    assert ModelConfig.from_published(settings(case)) == ModelConfig.from_published(
        {**published, **{name: CONFIGS[case].get(name) for name in ("bos_token_id", "pad_token_id")}})
    del published["rope_parameters"]
    assert ModelConfig.from_published(published) == config


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_have_the_logits_log_probs_and_gradients_of_padded_ones(case):
    model = model_of(case)
    ids, mask = map(torch.from_numpy, tokens(0))
    mask[:, 0] = False
    model.model.packing = False
    padded = model(ids, mask=mask)
    torch.testing.assert_close(padded, model(ids).log_softmax(-1)[:, :-1].gather(
        2, ids[:, 1:, None])[..., 0][mask[:, 1:]], atol=2e-5, rtol=1e-5)
    of_padded = torch.autograd.grad(padded.sum(), list(model.parameters()))
    model.model.packing = True
    packed = model(ids, mask=mask, lengths=LENGTHS)
    torch.testing.assert_close(packed, padded)
    for one, two in zip(torch.autograd.grad(packed.sum(), list(model.parameters())), of_padded):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_says_what_the_model_says_without_a_cache_alone_and_beside_other_rows(case):
    """Beyond the window, and in any batch the same, to the last bit where a head has 8 numbers or more."""
    model = model_of(case)
    ids, _ = tokens(0)
    prompts = [ids[0, :9].tolist(), ids[1, :3].tolist(), ids[1, :17].tolist(), ids[2, :5].tolist()]
    together = generate(model, prompts, max_new_tokens=24, temperature=0, batch_size=3)
    for prompt, [answer] in zip(prompts, together):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer.ids])).log_softmax(-1)[0, len(prompt) - 1:-1]
        assert logps.argmax(-1).tolist() == answer.ids
        assert logps.amax(-1).sum().item() == pytest.approx(answer.logp, abs=2e-4)
        [[alone]] = generate(model, [prompt], max_new_tokens=24, temperature=0)
        assert alone.ids == answer.ids and alone.logp == (
            answer.logp if model.config.head_dim >= 8 else pytest.approx(answer.logp, abs=2e-5))


@pytest.mark.parametrize("case", CASES)
def test_the_engine_without_packed_weights_as_on_a_gpu_says_the_same(case, monkeypatch):
    """There q and k keep the order of the folder, and halves are turned; packed they are pairs."""
    model, (ids, _) = model_of(case), tokens(0)
    fused = [Fused(model)]
    monkeypatch.setattr("aya_min.fused.PACK_BYTES", 0)
    fused.append(Fused(model))
    assert [each.pairs for each in fused] == [True, False]
    [[one]], [[two]] = (generate(each, [ids[0, :9].tolist()], max_new_tokens=24, temperature=0)
                        for each in fused)
    assert one.ids == two.ids and one.logp == pytest.approx(two.logp, abs=2e-5)


@pytest.mark.parametrize("case", ["llama: untied", "qwen2: yarn", "qwen3: the second layer slides, tied",
                                  "gemma2: both kinds of layers",
                                  "gemma3_text: both kinds of layers, linear"])
def test_in_bf16_the_engine_and_the_model_agree_with_fp32(case):
    model, (ids, _) = model_of(case), tokens(0)
    prompt = ids[0, :9].tolist()
    with torch.no_grad():
        exact = model(torch.tensor([prompt]))[0]
        half = model.bfloat16()
        torch.testing.assert_close(half(torch.tensor([prompt]))[0].float(), exact, rtol=0.1, atol=0.5)
    logits, _ = Engine(Fused(half), 1, 32, 8, 0).prefill([prompt])
    torch.testing.assert_close(logits[0], exact[-1], rtol=0.1, atol=0.5)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_save_unchanged_and_computes_the_same(case, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; it is needed by this comparison only")
    model, its_tokenizer = weights.load(write(tmp_path / "model", case))
    weights.save(tmp_path / "saved", model, its_tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    ids, mask = map(torch.from_numpy, tokens(0))
    with torch.no_grad():
        difference = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask] - model(ids)[mask]
    assert difference.abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = model_config.ModelConfig.from_published(
        json.loads((tmp_path / "theirs" / "config.json").read_text()))
    assert again == model.config


@pytest.mark.parametrize("case", CASES)
def test_a_config_as_older_files_say_it_and_resaved_by_transformers_or_us_is_one_to_a_merge(case):
    """Defaults were known of Cohere's families alone; a merge of a published Gemma 3 with its fine-tune saved
    by transformers 5 was refused."""
    old, new = settings(case), CONFIGS[case]
    ours = json.loads(json.dumps(ModelConfig.from_published(new).published()))
    same = {"max_position_embeddings": new["max_position_embeddings"]}
    for one, two in ((old, new), (new, ours), (ours, old)):
        assert config_differences("B", two | same, "A", one | same) == []
    assert config_differences("B", ours | {"rms_norm_eps": 0.5}, "A", old) == [
        f"B: rms_norm_eps is 0.5, in A {ModelConfig.from_published(old).rms_norm_eps}"]
    assert config_differences("B", ours | {"num_key_value_heads": 1}, "A", old)


LLAMA, GEMMA3 = dict(model_type="llama"), dict(model_type="gemma3_text")


@pytest.mark.parametrize("raw, says", [
    (LLAMA | {"attention_bias": True}, "attention_bias True"), (LLAMA | {"mlp_bias": True}, "mlp_bias True"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "only linear llama3 yarn"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "no factor"),
    (LLAMA | {"rope_scaling": YARN | {"beta_middle": 3}}, "with beta_middle"),
    (LLAMA | {"rope_scaling": YARN | {"factor": 0.5}}, "with factor"),
    (LLAMA | {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "with partial_rotary_factor"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                               "high_freq_factor": 4.0}}, "low_freq_factor must be below"),
    (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "for each layer type"),
    (GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "scaled rope of sliding layers"),
    (GEMMA3 | {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
    (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3 | {"final_logit_softcapping": -1.0}, "final_logit_softcapping -1.0"),
    (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
    ({"model_type": "gemma2", "sliding_window_pattern": 3}, "sliding_window_pattern 3 is not supported"),
    ({"model_type": "qwen2", "use_sliding_window": "yes"}, "use_sliding_window 'yes'"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0"),
    ({"model_type": "ministral3", "rope_parameters": YARN}, "no llama_4_scaling_beta"),
    ({"model_type": "ministral3", "rope_parameters": {"rope_theta": 5.0}}, "only yarn"),
    (LLAMA | {"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "with llama_4_scaling_beta"),
    ({"model_type": "gemma4_text"}, "model_type 'gemma4_text' is not supported")])
def test_what_would_be_computed_wrongly_is_refused_by_name(raw, says):
    with pytest.raises(ValueError, match="^config.json: ") as error:
        ModelConfig.from_published(raw)
    assert says in str(error.value)


# ---- folders of other shapes -------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [("language_model.model.", "language_model.lm_head."),
                                   ("model.language_model.", "lm_head.")], ids=["older", "newer"])
@pytest.mark.parametrize("case", ["gemma3_text: both kinds of layers, linear", "mistral: all layers slide",
                                  "ministral3: queries grow"])
def test_the_text_part_of_a_model_that_sees_images_is_read_and_published_as_a_language_model(
        case, names, tmp_path, capsys):
    folder, model = write(tmp_path / "model", case), model_of(case)
    outer = "Gemma3" if model.config.model_type == "gemma3_text" else "Mistral3"
    (folder / "config.json").write_text(json.dumps({
        "architectures": [f"{outer}ForConditionalGeneration"], "model_type": outer.lower(),
        "text_config": {k: v for k, v in CONFIGS[case].items() if k != "architectures"}}))
    state = {name.replace("model.", names[0], 1) if name.startswith("model.") else
             name.replace("lm_head.", names[1]): tensor for name, tensor in model.state_dict().items()}
    save_file(state | {"vision_tower.x": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    loaded, its_tokenizer = weights.load(folder)
    assert "1 tensors of images are left out" in capsys.readouterr().err
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    weights.save(tmp_path / "text", loaded, its_tokenizer)
    published = json.loads((tmp_path / "text" / "config.json").read_text())["architectures"]
    assert published == [CONFIGS[case]["architectures"][0]]
    assert weights.load(tmp_path / "text")[0].config == model.config


SMALL = {"llama": dict(model_type="llama", tie_word_embeddings=False, head_dim=10, rope_scaling={
             "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 32}),
         "qwen2": dict(model_type="qwen2", tie_word_embeddings=False),
         "qwen3": dict(model_type="qwen3", tie_word_embeddings=True, head_dim=10),
         "mistral": dict(model_type="mistral", tie_word_embeddings=False, head_dim=10, sliding_window=9),
         "ministral3": dict(model_type="ministral3", head_dim=10, rope_scaling=dict(
             YARN, original_max_position_embeddings=8, llama_4_scaling_beta=0.5)),
         "gemma2": dict(model_type="gemma2", head_dim=10, sliding_window=9, query_pre_attn_scalar=8),
         "gemma3": dict(model_type="gemma3_text", head_dim=10, sliding_window=9, sliding_window_pattern=2,
                        query_pre_attn_scalar=8)}
FORMAT = {"llama": "llama 3.1", "qwen2": "qwen 2.5", "qwen3": "qwen 3", "mistral": "mistral 0.3",
          "ministral3": "mistral small",
          "gemma2": "gemma 2", "gemma3": "gemma 3"}


def small(family, architecture=CohereForCausalLM, seed=0):
    """(a small model of a family, a tokenizer with its turns)"""
    own = tokenizer_of(FORMAT[family])
    changes = dict(SMALL[family], vocab_size=own.largest_id + 1, eos_token_id=own.stop_ids)
    made = language_model(**changes)
    return init_weights(architecture(made.config), torch.Generator().manual_seed(seed)), own


ROWS = [{"prompt": "red?", "completion": "blue and green"}, {"prompt": "how are you?", "completion": "fine"},
        {"prompt": "x" * 40, "completion": "y"}]


@pytest.mark.parametrize("family", SMALL)
def test_a_classifiers_scores_are_those_of_transformers_for_the_chat_template_in_one_batch(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, own = small(family, SequenceClassifier, seed=3)
    weights.save(tmp_path / "rm", model, own)
    loaded, its_tokenizer = weights.load(tmp_path / "rm")
    assert type(loaded) is SequenceClassifier
    scores = score_texts(loaded, its_tokenizer, ROWS)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    their = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    texts = [their.apply_chat_template([{"role": "user", "content": row["prompt"]},
                                        {"role": "assistant", "content": row["completion"]}], tokenize=False)
             for row in ROWS]
    bos = their.bos_token or "no bos"
    batch = their([text.removeprefix(bos) for text in texts], padding=True, padding_side="right",
                  return_tensors="pt", add_special_tokens=False)
    if their.bos_token:
        start = torch.full((len(ROWS), 1), their.bos_token_id)
        batch = {"input_ids": torch.cat([start, batch["input_ids"]], 1),
                 "attention_mask": torch.cat([torch.ones_like(start), batch["attention_mask"]], 1)}
    with torch.no_grad():
        logits = theirs(**batch).logits[:, 0]
    assert logits.std() > 0.01 and scores == pytest.approx(logits.tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_published_classifier_whose_pad_token_ends_its_texts_is_read_before_it_as_in_transformers(
        family, tmp_path):
    """It was read at the last token. transformers looks for the last one that is not the pad token, so its
    scores, which the head was trained for, are those before."""
    model, own = small(family, SequenceClassifier, seed=3)
    weights.save(tmp_path / "rm", model, own)
    path, [pad] = tmp_path / "rm" / "config.json", (own.ending + own.after)[-1:]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": pad}))
    ids = [own.encode_chat([{"role": "user", "content": row["prompt"]},
                            {"role": "assistant", "content": row["completion"]}])[0] for row in ROWS]
    assert all(each[-1] == pad != each[-2] for each in ids)
    scores = score_texts(*weights.load(tmp_path / "rm"), ROWS)
    for each, score in zip(ids, scores):
        with torch.no_grad():
            expected = model.model(torch.tensor([each]))[0, -2] @ model.score.weight[0]
        assert score == pytest.approx(expected.item(), abs=1e-5)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", attn_implementation="eager")
    with torch.no_grad():
        logits = [theirs(input_ids=torch.tensor([each])).logits.item() for each in ids]
    assert scores == pytest.approx(logits, abs=1e-5)


@pytest.mark.parametrize("family", SMALL)
def test_a_classifier_reads_the_last_token_alone_and_comes_back_from_its_folder(family, tmp_path):
    model, own = small(family, SequenceClassifier, seed=3)
    weights.save(tmp_path / "rm", model, own)
    loaded, its_tokenizer = weights.load(tmp_path / "rm")
    scores = score_texts(loaded, its_tokenizer, ROWS)
    for row, score in zip(ROWS, scores):
        ids = own.encode_chat([{"role": "user", "content": row["prompt"]},
                               {"role": "assistant", "content": row["completion"]}])[0]
        assert ids.count(own.bos_id) == (own.bos_id is not None)
        with torch.no_grad():
            expected = model.model(torch.tensor([ids]))[0, -1] @ model.score.weight[0]
        assert score == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("damage, says", [
    ({"id2label": {"0": "a", "1": "b"}}, r"score.weight has shape \(1, 32\), config.json says \(2, 32\)"),
    ({"id2label": None}, r"score.weight has shape \(1, 32\), config.json says \(2, 32\)"),
    ({"id2label": {"0": "a", "2": "b"}}, "must name the labels 0, 1, ..."),
    ({"id2label": {"0": "a", "1": "b"}, "problem_type": "regression"}, "problem_type 'regression'"),
    ("score.weight", "score.weight is missing")])
def test_a_classifier_without_its_head_or_with_labels_that_it_does_not_fit_is_refused(damage, says, tmp_path):
    weights.save(tmp_path / "rm", *small("llama", SequenceClassifier))
    if isinstance(damage, dict):
        path = tmp_path / "rm" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    else:
        state = small("llama", SequenceClassifier)[0].state_dict()
        del state[damage]
        save_file(state, tmp_path / "rm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=says):
        weights.load(tmp_path / "rm")


# The example of its model card, and the scores that it and sglang#17992 print.
JANE = ("Jane has 12 apples. She gives 4 apples to her friend Mark, then buys 1 more apple, and finally "
        "splits all her apples equally among herself and her 2 siblings. How many apples does each person "
        "get?")
STEPS = ("1. Jane starts with 12 apples and gives 4 to Mark. 12 - 4 = 8. Jane now has 8 apples.\n2. Jane "
         "buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n3. Jane splits the 9 apples equally among ")
ENDS = ("herself and her 2 siblings (3 people in total). 9 ÷ 3 = 3 apples each. Each person gets 3 apples.",
        "her 2 siblings (2 people in total). 9 ÷ 2 = 4.5 apples each. Each person gets 4 apples.")
PRINTED = {("llama", 4096): (23.0, 3.59375), ("qwen3", 1024): (7.875, 0.9453)}


@pytest.mark.skipif("AYA_MIN_SKYWORK" not in os.environ, reason="AYA_MIN_SKYWORK names no folder of "
                    "Skywork-Reward-V2-Llama-3.1-8B or -Qwen3-0.6B")
def test_skyworks_reward_model_gives_the_scores_of_its_model_card():
    model, own = weights.load(os.environ["AYA_MIN_SKYWORK"], dtype=torch.bfloat16)
    rows = [{"prompt": JANE, "completion": STEPS + end} for end in ENDS]
    printed = PRINTED[model.config.model_type, model.config.hidden_size]
    assert score_texts(model, own, rows) == pytest.approx(printed, abs=0.25)


# ---- stages ------------------------------------------------------------------------------------------------

BESIDE = {"sft": {}, "dpo": {}, "reward": {}, "reward, last-token": dict(head="last-token"),
          "rl": dict(num_samples=2, max_new_tokens=6)}
FILE = {"sft": "sft.jsonl", "dpo": "pairs.jsonl", "reward": "pairs.jsonl", "rl": "prompts.jsonl"}


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.long)])
@pytest.mark.parametrize("what", BESIDE)
def test_a_stage_trains_a_family_stops_and_goes_on_and_its_folder_is_read(family, what, world, tmp_path):
    stage = what.partition(",")[0]
    settings_class = stages.STAGES[stage].settings

    def train(out, max_steps, resume=False):
        settings = settings_class(**dict(batch_size=4, max_steps=max_steps, learning_rate=1e-3,
                                         schedule="constant", max_length=256, warmup_steps=0, **BESIDE[what]))
        weights.save(tmp_path / "start", *small(family))
        build = stages.builder(stage, [], settings)
        model, own = weights.load(tmp_path / "start", trunk=None if build is CohereForCausalLM else build,
                                  sharded=True)
        beside = {"reward_model": small(family, RewardModel, 1)[0]} if stage == "rl" else {}
        return stages.train_stage(stage, model, own, [world / FILE[stage]], settings, out, CPU,
                                  resume=resume, **beside), own
    whole, own = train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 2)
    parts, _ = train(tmp_path / "parts", 3, resume=True)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") and len(logged(tmp_path / "parts")) == 3
    model, again = weights.load(whole)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert isinstance(model, RewardModel) == (stage == "reward")
    assert type(model) is SequenceClassifier or "last" not in what
    if stage == "sft":
        [[answer]] = answer_rows(model, again, [{"prompt": "red?"}], max_new_tokens=8)
        assert len(answer["ids"]) <= 8


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.long)])
def test_two_ranks_train_and_answer_as_one_does(family, world, tmp_path):
    weights.save(tmp_path / "start", *small(family))

    def trained(out):
        settings = config.SFT(batch_size=4, max_steps=2, learning_rate=1e-3, warmup_steps=0, max_length=256)
        model, own = weights.load(tmp_path / "start", sharded=True)
        folder = stages.train_stage("sft", model, own, [world / "sft.jsonl"], settings, tmp_path / out, CPU)
        model, own = weights.load(folder)
        prompts = [{"prompt": f"red? {i}"} for i in range(3)]
        return [answer["ids"] for [answer] in answer_rows(model, own, prompts, max_new_tokens=8)]
    alone = trained("alone")
    assert on_ranks(2, trained, "two") == [alone, alone]
    assert_close(logged(tmp_path / "two"), logged(tmp_path / "alone"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_dry_run_knows_a_familys_parameters_and_a_merge_of_two_is_their_mean(family, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        weights.save(tmp_path / name, *small(family, seed=seed))
    model, own = weights.load_meta(tmp_path / "a")[:2]
    text = estimate.dry_run("sft", "a", model, config.SFT(batch_size=4, max_length=64), None, [], own, 1)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", "linear", progress=False)
    states = [weights.load(tmp_path / name)[0].state_dict() for name in ("a", "b", "merged")]
    for name, tensor in states[2].items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_a_system_turn_that_a_familys_template_refuses_is_refused_with_its_line(tmp_path):
    from aya_min.data import load_examples
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "Be kind."},
                                             {"role": "user", "content": "hi"},
                                             {"role": "assistant", "content": "ho"}]}) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat template takes no system turn"):
        load_examples([path], tokenizer_of("gemma 2"), 100)
