"""The encoder-decoder: logits, losses and gradients that transformers recorded (tests/golden), folders, and
that every way to compute it says the same."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
import train
from small import CPU, assert_close, logged, on_ranks, state_of, write_world
from small_t5 import FILES, plain_logps, run_t5, t5, tokenizer, write_texts

from aya_min import config, data, flops, sampling, stages, weights
from aya_min.data import collate, load_examples, load_pairs
from aya_min.encoder_decoder import EncoderDecoder, buckets
from aya_min.encoder_decoder_config import PRESETS, EncoderDecoderConfig
from aya_min.engine import round_up
from aya_min.losses import sft_loss, supervised_logps
from aya_min.reference import answer_logps
from aya_min.sampling import answer_rows, generate

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_encoder_decoder import CASES, SOURCES, TARGETS, tokens, weights_of

CONFIGS = json.loads((GOLDEN / "encoder_decoder.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_texts(write_world(tmp_path_factory.mktemp("world")))


def model_of(case):
    made = EncoderDecoderConfig.from_published(CONFIGS[case])
    made.tie_word_embeddings = CASES[case].get("tie_word_embeddings", True)
    model = EncoderDecoder(made)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(t) for name, t in weights_of(case, shapes).items()})
    return model


def as_batch(case):
    """A Batch of a case's sources and targets."""
    examples = []
    for source, target, S, U in zip(*tokens(case), SOURCES, TARGETS):
        ids = np.concatenate([source[:S], target[:U]])
        examples.append(data.Example(ids, np.arange(S + U) >= S, "other"))
    return collate(examples)


# ---- as transformers computes it ---------------------------------------------------------------------------

@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(case, packing):
    model, batch = model_of(case).train(), as_batch(case)
    model.packing = packing
    sources, targets = map(torch.from_numpy, tokens(case))
    with torch.no_grad():
        logits = model.logits(sources, torch.tensor(SOURCES), targets, torch.tensor(TARGETS))[targets > 0]
    loss, _ = sft_loss(model, batch)
    loss.backward()
    with safe_open(GOLDEN / "encoder_decoder.safetensors", "pt") as file:
        golden = {name.removeprefix(f"{case}|"): file.get_tensor(name) for name in file.keys()
                  if name.startswith(f"{case}|")}
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.detach()[None], golden["loss"], rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        norm = golden[f"norm of {name}"]
        torch.testing.assert_close(p.grad.norm()[None], norm, rtol=1e-4, atol=1e-6, msg=name)
        if f"gradient of {name}" in golden:
            torch.testing.assert_close(p.grad, golden[f"gradient of {name}"], rtol=1e-4, atol=1e-4, msg=name)


def test_distances_have_the_buckets_of_the_paper():
    """8 buckets up to a distance of 16. A decoder: 0 to 3 alone, then 4 + [4 log(d/4) / log 4]. An encoder:
    half of them for each side, 0 and 1 alone, then 2 + [2 log(d/2) / log 8]."""
    back = torch.tensor([0, -1, -3, -4, -5, -6, -8, -12, -15, -16, -400, 3])
    assert buckets(back, False, 8, 16).tolist() == [0, 1, 3, 4, 4, 5, 6, 7, 7, 7, 7, 0]
    both = torch.tensor([0, -1, -2, -5, -6, -100, 1, 2, 5, 6, 100])
    assert buckets(both, True, 8, 16).tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]


def test_aya_101_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = EncoderDecoder(EncoderDecoderConfig(**PRESETS["aya-101"]))
    assert sum(p.numel() for p in model.parameters()) == 12_921_057_280


@pytest.mark.parametrize("name, billions", [("mt5-small", 0.300), ("mt5-base", 0.582), ("mt5-large", 1.230),
                                            ("mt5-xl", 3.743), ("mt5-xxl", 12.921)])
def test_the_presets_have_the_papers_sizes(name, billions):
    with torch.device("meta"):
        model = EncoderDecoder(EncoderDecoderConfig(**PRESETS[name]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions


# ---- config.json and folders -------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_a_config_that_is_published_is_read_back(case):
    made = model_of(case).config
    assert EncoderDecoderConfig.from_published(made.published()) == replace(
        made, tie_word_embeddings=made.published()["tie_word_embeddings"])


@pytest.mark.parametrize("changes, message", [
    (dict(feed_forward_proj="gated-tanh"), "feed_forward_proj 'gated-tanh' is not supported"),
    (dict(is_decoder=True), "is_decoder True is not supported, only False"),
    (dict(is_encoder_decoder=False), "is_encoder_decoder False is not supported"),
    (dict(quantization_config={"bits": 4}), "quantization_config .* is not supported"),
    (dict(d_model=-1), "d_model -1: must be"),
    (dict(d_model=True), "d_model True: must be"),
    (dict(num_layers="2"), "num_layers '2': must be"),
    (dict(relative_attention_num_buckets=2), "relative_attention_num_buckets 2: must be"),
    (dict(relative_attention_max_distance=4), "relative_attention_max_distance 4 must be above 4"),
    (dict(decoder_start_token_id=60), "decoder_start_token_id 60 must be a token's number"),
    (dict(eos_token_id="x"), "eos_token_id 'x' must be"),
    (dict(scale_decoder_outputs=3), "scale_decoder_outputs 3 must be true or false"),
    (dict(dense_act_fn="relu"), "dense_act_fn 'relu' does not go with the rest, which says 'gelu_new'"),
    (dict(hidden_size=8), "hidden_size 8 does not go with the rest, which says 16"),
])
def test_a_wrong_config_is_refused_with_its_key(changes, message):
    raw = CONFIGS["t5: v1.1, as Aya 101"] | changes
    with pytest.raises(ValueError, match=f"F/config.json: {message}"):
        EncoderDecoderConfig.from_published(raw, "F/config.json")


def write(folder, model, dtype=torch.float32, extra={}, **raw):
    """A model folder as it is published elsewhere, with extra tensors and other values in its config.json."""
    folder.mkdir()
    about = {k: v for k, v in model.config.published().items() if k != "dtype"} | raw
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    tensors = {name: t.to(dtype).clone() for name, t in {**model.state_dict(), **extra}.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(folder)
    return folder


def same_weights(model, other, dtype=torch.float32):
    ours, theirs = model.state_dict(), other.state_dict()
    same = (torch.equal(ours[name].to(dtype).float(), theirs[name]) for name in ours)
    return ours.keys() == theirs.keys() and all(same)


@pytest.mark.parametrize("changes", [dict(), dict(tie_word_embeddings=True), dict(model_type="umt5"),
                                     dict(model_type="mt5", tie_word_embeddings=True),
                                     dict(feed_forward_proj="relu", tie_word_embeddings=True)])
def test_a_saved_model_is_loaded_again(changes, tmp_path):
    model = t5(**changes)
    weights.save(tmp_path / "one", model, tokenizer())
    weights.save(tmp_path / "shards", model, tokenizer(), shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for folder in ("one", "shards"):
        loaded, its = weights.load(tmp_path / folder)
        assert same_weights(model, loaded) and loaded.config == model.config
        assert its.meaning == tokenizer().meaning and its.stop_ids == [1]
    said = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert said == {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


def test_bfloat16_files_are_read(tmp_path):
    model = t5()
    loaded, _ = weights.load(write(tmp_path / "m", model, torch.bfloat16))
    assert same_weights(model, loaded, torch.bfloat16)


def test_what_repeats_the_embedding_or_is_never_read_is_ignored(tmp_path):
    model = t5(tie_word_embeddings=True)
    shared = model.shared.weight.detach()
    stray = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.randn(8, 4)}
    names = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"
    extra = dict.fromkeys(names, shared)
    loaded, _ = weights.load(write(tmp_path / "m", model, extra=extra | stray))
    assert same_weights(model, loaded)
    other = {"encoder.embed_tokens.weight": shared + 1}
    with pytest.raises(ValueError, match="encoder.embed_tokens.weight is not shared.weight"):
        weights.load(write(tmp_path / "other", model, extra=other))
    with pytest.raises(ValueError, match="decoder.block.1.layer.1.EncDecAttention.*bias.weight is extra"):
        weights.load(write(tmp_path / "more", model, extra={next(iter(stray)).replace("0", "1", 1): shared}))


def test_a_head_of_its_own_is_the_head_whatever_config_json_says(tmp_path):
    """transformers 5 writes tie_word_embeddings true for a mT5 whose head is not its embedding."""
    model = t5(model_type="mt5")
    loaded, _ = weights.load(write(tmp_path / "m", model, tie_word_embeddings=True))
    assert same_weights(model, loaded) and not loaded.config.tie_word_embeddings
    model = t5()
    raw = dict(tie_word_embeddings=True, scale_decoder_outputs=False)
    loaded, _ = weights.load(write(tmp_path / "t5", model, **raw))
    assert same_weights(model, loaded) and loaded.config == model.config


@pytest.mark.parametrize("raw, message", [
    (dict(architectures=["T5EncoderModel"]), "architecture 'T5EncoderModel' is not supported"),
    (dict(num_layers=90000), "they are of 2 layers, num_layers is 90000"),
    (dict(num_decoder_layers=90000), "they are of 2 layers, num_decoder_layers is 90000"),
    (dict(tokenizer_class="ByT5Tokenizer"), "config.json: a ByT5, whose tokens are bytes by a rule"),
    (dict(model_type="byt5"), "config.json: a ByT5, whose tokens are bytes by a rule"),
    (dict(num_layers=1), "encoder.block.1.layer.0.SelfAttention.k.weight is extra"),
    (dict(d_ff=40), "decoder.block.0.layer.2.DenseReluDense.wi_0.weight has shape"),
    (dict(vocab_size=500), "tokenizer.json has 700 tokens"),
])
def test_a_folder_whose_parts_do_not_fit_is_refused(raw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.load(write(tmp_path / "m", t5(), **raw))


# ---- every way to compute it -------------------------------------------------------------------------------

PROMPTS = ["one two three", "a", "what is the largest number of these: eight, nine, one? " * 3,
           "opposite of big", "reverse", "x y z " * 12]


def prompts_of(texts=PROMPTS):
    return [tokenizer().encode_prompt(text) for text in texts]


KINDS = [dict(), dict(model_type="umt5", tie_word_embeddings=True), dict(feed_forward_proj="relu"),
         dict(model_type="mt5", num_decoder_layers=3, num_layers=1, decoder_start_token_id=2)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_with_caches_has_the_log_probs_of_the_model_without_one(kind):
    """Answers of 40 tokens pass the largest distance and a block of keys, and so does a source."""
    model = t5(**kind)
    for temperature in (0, 0.8):
        groups = generate(model, prompts_of(), 2, 40, temperature, seed=5, batch_size=5)
        for prompt, group in zip(prompts_of(), groups):
            for made in group:
                logps = plain_logps(model, prompt, made.ids, temperature or 1)
                torch.testing.assert_close(float(logps.sum()), made.logp, rtol=1e-4, atol=1e-3)
    assert len({tuple(made.ids) for group in groups for made in group}) > 8


def test_greedy_takes_the_likeliest_token_of_the_model_without_a_cache():
    model, prompt = t5(), prompts_of()[2]
    made = generate(model, [prompt], 1, 20, 0)[0][0].ids
    for n in range(len(made)):
        logits = model.logits(torch.tensor([prompt]), torch.tensor([len(prompt)]),
                              torch.tensor([made[:n] + [0]]), torch.tensor([n + 1]))
        assert int(logits[0, n].argmax()) == made[n]


def test_an_answer_does_not_depend_on_the_batch():
    """Not even the last bit of a log-prob does, in fp32 on a CPU: other rows, their number, their lengths."""
    model = t5()
    alone = [generate(model, [prompt], 3, 24, 0.9, seed=2, numbers=[i], stop_ids=[1], batch_size=1)[0]
             for i, prompt in enumerate(prompts_of())]
    for batch_size in (2, 7, 64):
        assert generate(model, prompts_of(), 3, 24, 0.9, seed=2, stop_ids=[1], batch_size=batch_size) == alone


def test_the_samples_of_a_prompt_share_one_pass_of_the_encoder(monkeypatch):
    from aya_min import encoder_decoder_engine
    encoded, prefill = [], encoder_decoder_engine.EncoderDecoderEngine.prefill
    monkeypatch.setattr(encoder_decoder_engine.EncoderDecoderEngine, "prefill",
                        lambda self, prompts: (encoded.extend(prompts), prefill(self, prompts))[1])
    generate(t5(), prompts_of(), 5, 8, 1.0, batch_size=4)
    assert sorted(encoded) == sorted(prompts_of())


@pytest.mark.parametrize("new", [7, 40, 200])
def test_caches_grow_no_further_than_was_checked_against_the_free_memory(new, monkeypatch):
    """Answers of 200 tokens double their cache of 32 until it would pass 200."""
    engines, made = [], sampling.engine_of
    monkeypatch.setattr(sampling, "engine_of", lambda *given: engines.append(made(*given)) or engines[0])
    generate(t5(), prompts_of(), 2, new, 1.0, batch_size=4)
    own, cross = ({cache.size for cache in caches} for caches in (engines[0].own, engines[0].cross))
    assert own == {round_up(new)} and cross == {round_up(max(map(len, prompts_of())))}


def test_log_probs_are_those_of_each_text_alone(world):
    """Packed or padded, of pairs whose sources are equal (encoded once) or not."""
    pairs = load_pairs([world / "pairs.jsonl"], tokenizer(), 256)[:6]
    batch = data.collate_pairs(pairs)
    assert batch.repeats is not None
    model, alone = t5(), []
    for example in data.rows_of(pairs):
        source, target = example.ids[~example.mask], example.ids[example.mask]
        alone.append(plain_logps(model, source.tolist(), target.tolist()))
    for packing in (True, False):
        for repeats in (batch.repeats, None):
            model.packing = packing
            with torch.no_grad():
                logps = supervised_logps(model, replace(batch, repeats=repeats))
            torch.testing.assert_close(logps, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_gradients_do_not_depend_on_shared_sources_packing_or_recomputation(world):
    pairs = load_pairs([world / "pairs.jsonl"], tokenizer(), 256)[:4]
    batch, found = data.collate_pairs(pairs), []
    for changes in (dict(), dict(repeats=None), dict(packing=False), dict(recompute=1), dict(recompute=2)):
        model = t5().train()
        model.packing, model.activation_checkpointing = changes.get("packing"), changes.get("recompute", 0)
        loss, _ = sft_loss(model, replace(batch, repeats=changes.get("repeats", batch.repeats)))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("stage", FILES)
def test_a_batch_of_8_is_8_micro_batches_of_1(stage, world, tmp_path):
    one, eight = (run_t5(stage, world, tmp_path / str(size), micro_batch_size=size) for size in (8, 1))
    assert_close(logged(one), logged(eight), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("stage", FILES)
def test_two_ranks_train_and_evaluate_as_one(stage, world, tmp_path):
    run_t5(stage, world, tmp_path / "one", held_out=stage in ("pretrain", "sft"))
    on_ranks(2, lambda: run_t5(stage, world, tmp_path / "two", held_out=stage in ("pretrain", "sft"),
                               micro_batch_size=2) and None)
    assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=2e-3, atol=1e-4)
    for name, tensor in state_of(tmp_path / "one").items():
        torch.testing.assert_close(state_of(tmp_path / "two")[name], tensor, rtol=0.1, atol=2e-3, msg=name)


def test_umt5_and_adafactor_train_on_two_ranks_as_on_one(world, tmp_path):
    more = dict(architecture=dict(model_type="umt5", tie_word_embeddings=True), optimizer="adafactor",
                learning_rate=0.01, activation_checkpointing=1)
    run_t5("sft", world, tmp_path / "one", **more)
    on_ranks(2, lambda: run_t5("sft", world, tmp_path / "two", **more) and None)
    assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_a_resumed_run_is_one_that_never_stopped(stage, world, tmp_path):
    run_t5(stage, world, tmp_path / "whole", schedule="constant", max_steps=4)
    run_t5(stage, world, tmp_path / "part", schedule="constant", max_steps=2)
    run_t5(stage, world, tmp_path / "part", schedule="constant", max_steps=4, resume=True)
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")
    whole, part = (weights.load(tmp_path / name / "model")[0] for name in ("whole", "part"))
    assert same_weights(whole, part)


@pytest.mark.long
def test_compiled_blocks_compute_the_same(world):
    batch = collate(load_examples([world / "sft.jsonl"], tokenizer(), 256)[:4])
    losses = []
    for compiled in (False, True):
        model = t5(num_layers=1, num_decoder_layers=1).train()
        for block in model.layers if compiled else ():
            block.compile(dynamic=True, backend="aot_eager")
        loss, _ = sft_loss(model, batch)
        loss.backward()
        losses.append((loss.item(), model.shared.weight.grad.norm().item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_answers_on_two_ranks_are_those_on_one():
    rows = [{"prompt": text} for text in PROMPTS[:5]]
    one = answer_rows(t5(), tokenizer(), rows, 2, 12, temperature=0.7, seed=3, stop_strings=("e",))
    assert on_ranks(2, lambda: answer_rows(t5(), tokenizer(), rows, 2, 12, temperature=0.7, seed=3,
                                           stop_strings=("e",))) == [one, one]


# ---- stages ------------------------------------------------------------------------------------------------

def test_each_supervised_answer_is_an_example_with_the_turns_before_it(tmp_path):
    turns = [{"role": "system", "content": "S"}, *({"role": ("user", "assistant")[i % 2], "content": text}
                                                  for i, text in enumerate("abcdef"))]
    turns[4]["train"] = False
    (tmp_path / "f.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    examples = load_examples([tmp_path / "f.jsonl"], tokenizer(), 256)
    texts = [(tokenizer().decode(e.ids[~e.mask]), tokenizer().decode(e.ids[e.mask])) for e in examples]
    assert texts == [("S\n\na", "b"), ("S\n\nUser: a\nAssistant: b\nUser: c\nAssistant: d\nUser: e", "f")]
    assert all(e.ids[-1] == 1 and e.ids[~e.mask][-1] == 1 and e.mask[-1] for e in examples)


@pytest.mark.parametrize("stage", ["reward", "rl", "router", "classify", "sidenet"])
def test_other_stages_refuse_it_by_name(stage, world, tmp_path):
    with pytest.raises(ValueError, match=f"{stage} trains decoders only, not an encoder-decoder"):
        stages.train_stage(stage, t5(), tokenizer(), [world / "pairs.jsonl"], stages.STAGES[stage].settings(),
                           tmp_path / "out", CPU)


@pytest.mark.parametrize("changes, message", [
    (dict(select="uniform"), "--select and --replay score decoders only"),
    (dict(dtype="float16"), "--dtype float16: the activations of T5-like models pass 65504"),
    (dict(residual_dropout=0.1), "--residual-dropout 0.1: an encoder-decoder has no dropout here"),
    (dict(attention_dropout=0.1), "--attention-dropout 0.1: an encoder-decoder has no dropout here"),
    (dict(balance_weight=0.1), "--balance-weight 0.1: this model is dense")])
def test_a_setting_that_it_cannot_honour_is_refused(changes, message, world, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_t5("sft", world, tmp_path / "out", **changes)


def test_bfloat16_trains(world, tmp_path):
    single = logged(run_t5("sft", world, tmp_path / "single"))
    half = logged(run_t5("sft", world, tmp_path / "half", dtype="bfloat16"))
    assert_close([{"step": r["step"], "loss": r["loss"]} for r in half],
                 [{"step": r["step"], "loss": r["loss"]} for r in single], rtol=2e-2, atol=0)


def test_the_references_log_probs_are_those_of_the_answers(world):
    pairs = load_pairs([world / "pairs.jsonl"], tokenizer(), 256)[:3]
    model = t5()
    found = answer_logps(model, pairs, 0, CPU, config.DPO())
    for pair, both in zip(pairs, found):
        for side, logp in zip(pair.sides, both):
            alone = plain_logps(model, side.ids[~side.mask].tolist(), side.ids[side.mask].tolist()).sum()
            torch.testing.assert_close(float(logp), float(alone), rtol=1e-4, atol=1e-4)


def test_operations_are_two_for_each_weight_and_token_and_the_attentions():
    """One text of 5 source and 3 target tokens, by hand: d 4, 2 heads of 3, MLP 8, vocabulary 10, one layer
    each."""
    made = EncoderDecoderConfig(vocab_size=10, d_model=4, d_kv=3, d_ff=8, num_layers=1, num_heads=2,
                                feed_forward_proj="gated-gelu")
    encoder, decoder = 5 * (4 * 24 + 3 * 32), 3 * (4 * 24 + 3 * 32 + 2 * 24) + 5 * 2 * 24
    attention = 4 * 6 * (5 * 5 + 3 * 3 / 2 + 3 * 5)
    assert flops.training_flops(made, [8], 3) == 3 * (2 * (encoder + decoder) + attention + 2 * 4 * 10 * 3)


def test_a_stage_of_decoders_refuses_an_encoder_decoder_before_its_data_are_read(tmp_path):
    """classify asked for labels first, of rows that it would not have trained on."""
    t5_folder = write(tmp_path / "m", t5())
    with pytest.raises(ValueError, match="classify trains decoders only"):
        train.load_model(SimpleNamespace(command="classify", model=str(t5_folder), data=["none.jsonl"]), CPU,
                         stages.STAGES["classify"].settings())


COMMANDS = {
    "evaluate outliers": "-m aya_min.evaluate outliers --model M --data ROWS --out OUT",
    "evaluate quantized": "-m aya_min.evaluate quantized --model M --against M --data ROWS",
    "a judge": "-m aya_min.evaluate arena --answers ROWS --baseline ROWS --judge M --out OUT",
    "a judge by a protocol":
        "-m aya_min.evaluate arena --answers ROWS --baseline ROWS --judge M --protocol scores --out OUT",
    "merge embed": "merge.py embed --model M --data a=ROWS --out OUT",
    "merge quantize": "merge.py quantize M --scheme w8 --out OUT"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_decoders_refuses_an_encoder_decoder_in_one_line(name, tmp_path):
    """outliers looked for the longest text by counting down from a thousand million, embed ended with a
    traceback, a judge was told to take a protocol, and with one to leave it out."""
    write(tmp_path / "m", t5())
    row = {"prompt": "one two three", "completion": "two", "language": "en"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    places = {"M": tmp_path / "m", "ROWS": tmp_path / "rows.jsonl", "OUT": tmp_path / "out",
              "a=ROWS": f"a={tmp_path / 'rows.jsonl'}"}
    argv = [str(places.get(word, word)) for word in COMMANDS[name].split()]
    done = subprocess.run([sys.executable, *argv], cwd=GOLDEN.parents[1], capture_output=True, text=True,
                          timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "an encoder-decoder" in last and "Traceback" not in done.stderr
    assert "--protocol" not in last and not (tmp_path / "out").exists()
