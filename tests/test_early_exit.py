"""Classifiers, their SideNets and early exit: values by hand, limits, borders, the command and its page."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import CPU, LABELS, classifier, language_model, logged, reward_model, run, side_net, tokenizer
from test_families import small

import train
from aya_min import config, early_exit, evaluate, stages, weights
from aya_min.classifier import Classifier, ClassifierConfig, SideNetConfig, mean_of
from aya_min.classify import collate_texts, load_texts, numbered
from aya_min.command import guarded
from aya_min.evaluate_early_exit import sizes as early_exit_sizes
from aya_min.files import write_jsonl
from aya_min.flops import head_flops, layers_flops, training_flops
from aya_min.losses import classification_loss
from aya_min.merge_quantize import Calibration, quantize_folder
from aya_min.quantization import SCHEMES, dequantize, round_to_nearest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "classification.jsonl"


@pytest.fixture(scope="module")
def items(world):
    return numbered(load_texts([world / "classified.jsonl"], tokenizer(), 256), LABELS)


@pytest.fixture(scope="module")
def nets():
    """A MainNet, and a SideNet on each of its layers but the last."""
    main = classifier().eval()
    sides = [side_net(layer=layer).eval() for layer in (0, 1)]
    for side in sides:
        side.model.load_state_dict(main.model.state_dict(), strict=False)
    return main, sides


def ids_of(item):
    return torch.from_numpy(item.ids).long()[None]


# ---- the nets ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pooling", ["mean", "last-token"])
def test_a_classifier_reads_the_mean_or_the_last_of_the_hidden_states_whatever_the_batch(pooling, items):
    model, batch = classifier(pooling=pooling).eval(), collate_texts(items[:6])
    with torch.no_grad():
        logits = model(batch.input_ids, batch.lengths, batch.repeats)
        for item, row in zip(items, logits):
            states = model.model(ids_of(item))[0]
            pooled = states.mean(0) if pooling == "mean" else states[-1]
            torch.testing.assert_close(row, model.score.weight @ pooled, rtol=1e-5, atol=1e-5)


def test_a_text_has_bos_and_no_end(world, items):
    own, row = tokenizer(), json.loads((world / "classified.jsonl").read_text().splitlines()[0])
    assert items[0].ids.tolist() == [own.bos_id, *own.encode(row["text"])]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_sidenet_is_one_hidden_layer_on_the_normed_mean_of_a_layers_states(layer, nets, items):
    side = nets[1][layer]
    for item in items[:3]:
        with torch.no_grad():
            x = side.model.embed_tokens(ids_of(item))
            if layer:
                x = nets[0].model.through(x, last=1)
            mean = x[0].mean(0)
            mean = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
            expected = side.out(torch.relu(side.hidden(mean)))
            found = side(ids_of(item), torch.tensor([len(item.ids)]))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_in_the_mean():
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [float("nan"), 9.0]]])
    assert mean_of(x, torch.tensor([2])).tolist() == [[2.0, 4.0]]


def test_a_new_sidenet_holds_all_labels_equally_likely_and_only_its_two_layers_are_trained(world, tmp_path):
    build = stages.builder("sidenet", [world / "classified.jsonl"], config.Side(layer=1, hidden=8))
    weights.save(tmp_path / "main", classifier(), tokenizer())
    side, own = weights.load(tmp_path / "main", trunk=build)
    before = {name: tensor.clone() for name, tensor in side.state_dict().items()}
    settings = config.Side(batch_size=8, max_steps=3, learning_rate=1e-2, warmup_steps=0)
    data = [world / "classified.jsonl"]
    folder = stages.train_stage("sidenet", side, own, data, settings, tmp_path / "run", CPU)
    assert logged(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(len(LABELS)), abs=1e-6)
    made, _ = weights.load(folder)
    moved = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}
    whole = classifier().state_dict()
    assert all(torch.equal(before[name], whole[name]) for name in before if name.startswith("model."))
    assert not any(name.startswith(("model.layers.1", "model.norm")) for name in before)


def test_the_loss_is_the_summed_cross_entropy_by_hand(items):
    model, batch = classifier(), collate_texts(items[:5])
    loss, metrics = classification_loss(model, batch)
    logps = model(batch.input_ids, batch.lengths).log_softmax(1)
    expected = -sum(logps[i, item.number] for i, item in enumerate(items[:5]))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    right = sum(int(logps[i].argmax()) == item.number for i, item in enumerate(items[:5]))
    assert metrics["accuracy"].sum(1).tolist() == [right, 5]


def test_the_layers_in_two_parts_are_the_layers_at_once_bit_for_bit(items):
    model, batch = language_model().model, collate_texts(items[:6])
    with torch.no_grad():
        whole = model(batch.input_ids, batch.lengths)
        x = model.through(model.embedded(batch.input_ids), batch.lengths, last=1)
        assert torch.equal(model.through(x, batch.lengths, first=1), whole)


# ---- leaving -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layer", [0, 1])
def test_thresholds_0_and_above_1_are_the_sidenet_and_the_mainnet_alone_bit_for_bit(layer, nets, items):
    main, side = nets[0], nets[1][layer]
    batch = collate_texts(items[:9])
    with torch.no_grad():
        alone = {0.0: side(batch.input_ids, batch.lengths), 1.5: main(batch.input_ids, batch.lengths)}
    for threshold, expected in alone.items():
        logits, leaves = early_exit.answer(main, side, batch, threshold)
        assert torch.equal(logits, expected) and leaves.all() == leaves.any() == (threshold == 0)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_batch_from_which_some_leave_is_answered_row_by_row(layer, nets, items):
    main, side = nets[0], nets[1][layer]
    batch = collate_texts(items)
    with torch.no_grad():
        threshold = float(side(batch.input_ids, batch.lengths).softmax(1).amax(1).median())
    logits, leaves = early_exit.answer(main, side, batch, threshold)
    assert 0 < leaves.sum() < len(items)
    for i, item in enumerate(items):
        with torch.no_grad():
            alone = (side if leaves[i] else main)(ids_of(item), torch.tensor([len(item.ids)]))[0]
        torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-5)


def test_rows_that_leave_are_not_computed_further(nets, items, monkeypatch):
    main, side = nets[0], nets[1][1]
    batch, seen = collate_texts(items), []
    block = main.model.layers[1]
    handle = block.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        confidences = side(batch.input_ids, batch.lengths).softmax(1).amax(1)
    threshold = float(confidences.median())
    early_exit.answer(main, side, batch, threshold)
    early_exit.answer(main, side, batch, 0.0)
    handle.remove()
    assert seen == [int(batch.lengths[confidences <= threshold].sum())]         # packed: tokens; none at 0


# ---- figures by hand ---------------------------------------------------------------------------------------

def test_the_calibration_error_by_hand():
    """Two bins of (0, 0.5] and (0.5, 1]: one answer of 0.5, right; three of 0.9, 0.7 and 0.8, one right.
    ECE = 1/4 |1 - 0.5| + 3/4 |1/3 - 0.8| = 0.125 + 0.35."""
    confidences, right = np.array([0.5, 0.9, 0.7, 0.8]), np.array([True, True, False, False])
    assert early_exit.reliability(confidences, right, 2) == [
        (1, 0.5, 1.0), (3, pytest.approx(0.8), pytest.approx(1 / 3))]
    assert early_exit.calibration_error(confidences, right, 2) == pytest.approx(0.475)
    assert early_exit.calibration_error(np.ones(3), np.ones(3, bool)) == 0


# Four texts. The MainNet costs 100 each, the way to the SideNet's answer 10, of which 2 are its own.
CURVE = dict(confidences=np.array([0.9, 0.6, 0.6, 0.4]), side_right=np.array([True, False, True, False]),
             main_right=np.array([True, True, False, True]), at_exit=np.full(4, 10.0),
             of_main=np.full(4, 100.0), side_head=2.0)


def test_the_accuracy_and_cost_of_thresholds_by_hand():
    """0: all leave, 2 right, 40 of 400. 0.4: one stays, 102 + 30, 3 right. 0.6, a tie: three stay, 306 + 10,
    and the SideNet answers the first. 0.9: none leaves, 408."""
    curve = early_exit.tradeoff(**CURVE)
    assert curve["threshold"].tolist() == [0.0, 0.4, 0.6, 0.9]
    assert curve["left"].tolist() == [1.0, 0.75, 0.25, 0.0]
    assert curve["accuracy"].tolist() == [0.5, 0.75, 0.75, 0.75]
    assert curve["cost"].tolist() == pytest.approx([0.1, 0.33, 0.79, 1.02])
    found = [early_exit.at_threshold(curve, t) for t in (0, 0.39, 0.4, 0.59, 0.6, 0.95, 2)]
    assert found == [0, 0, 1, 1, 2, 3, 3]


def test_a_threshold_is_the_cheapest_of_an_accuracy_and_the_best_of_a_cost():
    curve = early_exit.tradeoff(**CURVE)
    assert early_exit.choose(curve, accuracy=0.5) == 0.0
    assert early_exit.choose(curve, accuracy=0.6) == early_exit.choose(curve, cost=1.0) == 0.4
    assert early_exit.choose(curve, cost=0.3) == 0.0
    blind = early_exit.tradeoff(**CURVE | dict(side_right=np.zeros(4, bool), main_right=np.ones(4, bool)))
    assert early_exit.choose(blind, accuracy=1.0) == 1.0                    # no text leaves, whatever its 0.9
    with pytest.raises(ValueError, match="--accuracy 0.8: no threshold reaches it .* best is 0.7500"):
        early_exit.choose(curve, accuracy=0.8)
    with pytest.raises(ValueError, match="--cost 0.05: the least on --validation, .* is 0.1000"):
        early_exit.choose(curve, cost=0.05)


def test_operations_by_hand_with_a_window():
    """A layer has 8 (8 + 4 + 4 + 8) + 3 x 8 x 16 = 576 weights, 2 operations each per token; of 4 tokens the
    layer with a window of 3 sees 9 pairs, the full one 10, 4 x 2 x 4 operations each."""
    sizes = dict(model_type="cohere2", vocab_size=10, hidden_size=8, intermediate_size=16,
                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=3,
                 layer_types=["sliding_attention", "full_attention"], labels=["a", "b", "c"])
    main = ClassifierConfig(**sizes)
    side = SideNetConfig(**sizes, sidenet_layer=1, sidenet_size=5)
    first, second = 2 * 576 * 4 + 32 * 9, 2 * 576 * 4 + 32 * 10
    at_exit, of_main = early_exit.operations(main, side, [4])
    assert head_flops(main) == 2 * 8 * 3 and head_flops(side) == 2 * (8 * 5 + 5 * 3)
    assert at_exit.tolist() == [first + 110] and of_main.tolist() == [first + second + 48]
    assert layers_flops(main, [4], first=1) == second and layers_flops(main, [4], last=0) == 0
    assert training_flops(side, [4], 0) == first + 3 * 110


def test_probabilities_are_those_of_the_nets_alone_in_the_order_of_the_items(nets, items):
    main, side = nets[0], nets[1][1]
    found = early_exit.probabilities(main, side, early_exit.batches_of(items, 0, "cpu"))
    for net, probabilities in zip((main, side), found):
        for item, row in zip(items, probabilities):
            with torch.no_grad():
                alone = net(ids_of(item), torch.tensor([len(item.ids)]))[0].softmax(0)
            assert row == pytest.approx(alone.tolist(), abs=1e-5)


# ---- folders -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("build, changes", [(classifier, {}), (classifier, dict(pooling="last-token")),
                                            (side_net, dict(layer=0)), (side_net, dict(layer=1))])
def test_a_folder_comes_back_as_it_was(build, changes, items, tmp_path):
    model = build(**changes)
    weights.save(tmp_path / "m", model, tokenizer())
    loaded, _ = weights.load(tmp_path / "m")
    assert type(loaded) is type(model) and loaded.config == model.config
    batch = collate_texts(items[:5])
    with torch.no_grad():
        assert torch.equal(loaded(batch.input_ids, batch.lengths), model(batch.input_ids, batch.lengths))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_a_last_token_classifiers_folder_is_transformers_own_with_its_labels_and_logits(family, tmp_path):
    model, own = small(family, lambda config: Classifier(ClassifierConfig.of(
        config, labels=["yes", "no", "it's \"maybe\""])), seed=3)
    weights.save(tmp_path / "m", model, own)
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    assert about["architectures"][0].endswith("ForSequenceClassification") and "labels" not in about
    assert about["id2label"] == {"0": "yes", "1": "no", "2": "it's \"maybe\""}
    assert about["label2id"]["no"] == 1
    loaded, its_tokenizer = weights.load(tmp_path / "m")
    assert type(loaded) is Classifier and loaded.config.labels == model.config.labels
    assert loaded.config.pooling == "last-token"
    write_jsonl(tmp_path / "f.jsonl", [{"text": text, "label": "no"}
                                       for text in ("red?", "how are you?", "x" * 40, "blue and green")])
    batch = collate_texts(numbered(load_texts([tmp_path / "f.jsonl"], its_tokenizer, 512), ["yes", "no"]))
    with torch.no_grad():
        logits = loaded(batch.input_ids, batch.lengths)
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "yes", 1: "no", 2: "it's \"maybe\""}
    with torch.no_grad():
        for ids, length, row in zip(batch.input_ids, batch.lengths, logits):
            assert row.tolist() == pytest.approx(theirs(ids[None, :length]).logits[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("change, says", [
    ({"labels": ["a"]}, "labels .'a'. must be two names or more"), ({"labels": ["a", "a"]}, "each once"),
    ({"pooling": "max"}, "pooling 'max' must be one of mean last-token"),
    ({"labels": ["a", "b"]}, "score.weight has shape")])
def test_a_classifiers_config_that_is_wrong_is_refused_with_its_file(change, says, tmp_path):
    weights.save(tmp_path / "m", classifier(), tokenizer())
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=says) as error:
        weights.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value)


@pytest.mark.parametrize("change, says", [
    ({"sidenet_layer": 2}, "from 0 .the embeddings. to 1: the model has 2 layers"),
    ({"sidenet_size": 0}, "sidenet_size 0 must be"), ({"sidenet_size": 17}, "hidden.weight has shape")])
def test_a_sidenets_config_that_is_wrong_is_refused_with_its_file(change, says, tmp_path):
    weights.save(tmp_path / "m", side_net(), tokenizer())
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=says):
        weights.load(tmp_path / "m")


# ---- the commands ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A, a language model; RM, a reward model; main, a MainNet; side and other: SideNets of it and of another
    one."""
    folder = tmp_path_factory.mktemp("exit")
    weights.save(folder / "A", language_model(), tokenizer())
    weights.save(folder / "RM", reward_model(), tokenizer())
    main, side = classifier(), side_net()
    side.model.load_state_dict(main.model.state_dict(), strict=False)
    weights.save(folder / "main", main, tokenizer())
    weights.save(folder / "side", side, tokenizer())
    weights.save(folder / "other", side_net(seed=9), tokenizer())
    for name in ("classified", "held-out-classified"):
        shutil.copy(world / f"{name}.jsonl", folder)
    row = {"text": "red", "label": "odd"}
    for name, rows in {"unknown": [row, {"text": "x", "label": "sum"}], "without": [row, {"text": "x"}],
                       "number": [{"text": "x", "label": 1}], "one": [row] * 9,
                       "pair": [{"prompt": "x", "chosen": "y", "rejected": "z", "label": "odd"}]}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def call(in_process, folder, monkeypatch):
    monkeypatch.chdir(folder)
    of_evaluate = SimpleNamespace(__name__="evaluate",
                                  main=lambda: guarded(evaluate.main, "aya_min.evaluate"))
    return lambda module, line: in_process(of_evaluate if module is evaluate else module, *line.split())


CLASSIFY = "classify --model A --out run --batch-size 2 --max-steps 1"
SIDE = "sidenet --model main --out run --batch-size 2 --max-steps 1 --data classified.jsonl"
EXIT = "early-exit --model main --sidenet side --repeats 0 --data classified.jsonl"
MISTAKES = [
    (train, f"{CLASSIFY} --data unknown.jsonl --labels odd largest", "unknown.jsonl:2: label 'sum' is none"),
    (train, f"{CLASSIFY} --data without.jsonl", "without.jsonl:2: label must be a text, the name of a class, "
                                                "got none"),
    (train, f"{CLASSIFY} --data number.jsonl", "number.jsonl:1: label must be a text, the name of a "
                                                "class, got 1; put it into quotes"),
    (train, f"{CLASSIFY} --data pair.jsonl", "pair.jsonl:1: no text in keys"),
    (train, f"{CLASSIFY} --data one.jsonl", "one.jsonl: all labels are 'odd'"),
    (train, f"{CLASSIFY} --data one.jsonl --labels odd largest", "all 9 texts have the label 'odd'"),
    (train, f"{CLASSIFY} --data classified.jsonl --labels odd", "labels ['odd'] must be two names or more"),
    (train, f"{CLASSIFY} --data classified.jsonl --labels odd odd", "each once"),
    (train, f"{CLASSIFY} --data classified.jsonl".replace("model A", "model RM"), "score.weight has shape"),
    (train, f"{CLASSIFY} --data classified.jsonl --labels a b".replace("model A", "model main"),
     "--model is a classifier of other labels"),
    (train, f"{SIDE} --layer 2", "--layer 2: --model has 2 layers; give one from 0 (the embeddings) to 1"),
    (train, SIDE.replace("model main", "model A"), "--model is no classifier"),
    (train, SIDE.replace("model main", "model side"), "side: a SideNet, which has only the first layers"),
    (train, f"{CLASSIFY} --data classified.jsonl".replace("model A", "model side"), "side: a SideNet, which"),
    (train, f"{CLASSIFY} --data classified.jsonl --head last-token --labels {' '.join(LABELS)}".replace(
        "model A", "model main"),
     "--model is a classifier whose head reads mean, not last-token; give --head mean"),
    (train, SIDE.replace("classified.jsonl", "unknown.jsonl"), "unknown.jsonl:2: label 'sum' is none of"),
    (train, SIDE.replace("classified.jsonl", "one.jsonl"), "all 9 texts have the label 'odd'"),
    (evaluate, EXIT.replace("sidenet side", "sidenet other"), "not a SideNet of --model main: model.embed"),
    (evaluate, EXIT.replace("sidenet side", "sidenet main"), "--sidenet main: a classifier, not a SideNet"),
    (evaluate, EXIT.replace("model main", "model A"), "--model A: a language model, not a classifier"),
    (evaluate, EXIT.replace("classified.jsonl", "without.jsonl"), "without.jsonl:2: label must be a text"),
    (evaluate, EXIT.replace("classified.jsonl", "unknown.jsonl"), "unknown.jsonl:2: label 'sum' is none of"),
    (evaluate, f"{EXIT} --accuracy 0.5", "--accuracy needs --validation"),
    (evaluate, f"{EXIT} --cost 0.5 --validation classified.jsonl", "--validation and --data share a file"),
    (evaluate, f"{EXIT} --threshold 0.5 --validation held-out-classified.jsonl", "--validation goes with"),
    (evaluate, f"{EXIT} --threshold 0.5 --cost 1", "--threshold and --cost both name a threshold"),
    (evaluate, f"{EXIT} --cost 0.0001 --validation held-out-classified.jsonl", "--cost 0.0001: the least on"),
    (evaluate, f"{EXIT} --out main", "main exists"),
]


@pytest.mark.parametrize("module, line, says", MISTAKES)
def test_a_mistake_is_one_line_that_says_where_and_nothing_is_written(module, line, says, call, folder):
    before = sorted(folder.rglob("*"))
    code, out, err = call(module, line)
    assert code == 2 and out == "" and says in err[-1] and len(err) == 1, (code, out, err)
    assert sorted(folder.rglob("*")) == before


def test_a_router_begins_from_the_decoder_of_a_classifier_and_no_model_from_a_sidenets(folder):
    """Of the first, the labels were handed to the router's config; of the second, the layers that it lacks
    were drawn at random without a word."""
    build = stages.builder("router", [], config.Routing())
    made, _ = weights.load(folder / "main", trunk=build)
    assert made.config.teachers == ["A", "B"] and not hasattr(made.config, "labels")
    for trunk in (True, build):
        with pytest.raises(ValueError, match="side: a SideNet, which has only the first layers"):
            weights.load_meta(folder / "side", trunk)


def test_labels_are_those_asked_for_in_their_order_else_those_of_the_data_sorted(call, folder, tmp_path):
    for name, more, expected in (("own", "", ["largest", "reverse"]),
                                 ("asked", "--labels reverse odd largest", ["reverse", "odd", "largest"])):
        line = f"classify --model A --data classified.jsonl --batch-size 8 --max-steps 1 {more}"
        code, _, err = call(train, f"{line} --out {tmp_path}/{name}")
        assert code == 0, err
        assert weights.read_config(tmp_path / name / "model")[0].labels == expected


def test_from_a_classifier_to_its_sidenet_to_figures_and_a_page(call, folder, tmp_path):
    """The threshold is chosen on other texts than those that are reported."""
    steps = "--batch-size 8 --max-steps 12 --learning-rate 1e-2 --warmup-steps 0"
    data = "--data classified.jsonl --eval-data held-out-classified.jsonl"
    assert call(train, f"classify --model A {data} {steps} --out {tmp_path}/main")[0] == 0
    assert call(train, f"sidenet --model {tmp_path}/main/model --layer 1 --hidden 8 {data} {steps} "
                       f"--out {tmp_path}/side")[0] == 0
    assert any(key.startswith("eval/accuracy/") for key in logged(tmp_path / "side")[-1])
    code, out, err = call(evaluate, f"early-exit --model {tmp_path}/main/model --sidenet "
                                    f"{tmp_path}/side/model --data held-out-classified.jsonl --validation "
                                    f"classified.jsonl --cost 0.9 --repeats 1 --out {tmp_path}/exit.json")
    assert not code, err
    found = json.loads((tmp_path / "exit.json").read_text())
    assert found["num"] == 10 and sum(part["num"] for part in found["by_language"].values()) == 10
    curve = found["curve"]
    assert curve[0]["left"] == 1 and curve[-1]["left"] == 0 and curve[-1]["cost"] > 1 > curve[0]["cost"]
    assert curve[0]["accuracy"] == found["sidenet"]["accuracy"]
    assert curve[-1]["accuracy"] == found["main"]["accuracy"]
    assert all(part["seconds"] > 0 for part in curve)
    for part in (found["main"], found["sidenet"]):
        assert sum(num for num, _, _ in part["bins"]) == 10 and 0 <= part["ece"] <= 1
    assert "MainNet alone" in out and "asked for" in out
    page = (tmp_path / "exit.html").read_text()
    assert "Accuracy against operations" in page and "ECE" in page and "By language" in page


def test_a_sidenets_figures_are_counted_from_the_answers_of_the_real_run(folder, world):
    """At each threshold of the table the answers are those of texts that really leave."""
    from aya_min.evaluate_early_exit import Measured, load_nets
    main, side, own = load_nets(folder / "main", folder / "side", "cpu")
    measured = Measured(main, side, own, [world / "classified.jsonl"], config.Reading(), "cpu")
    curve = measured.curve()
    for i in range(0, len(curve["threshold"]), 5):
        right = left = 0
        for indices, batch in measured.batches:
            logits, leaves = early_exit.answer(main, side, batch, float(curve["threshold"][i]))
            right += int((logits.argmax(1) == batch.labels).sum())
            left += int(leaves.sum())
        N = len(measured.items)
        assert (right, left) == (round(curve["accuracy"][i] * N), round(curve["left"][i] * N))


# ---- fewer bits --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def packed(folder):
    """quantized(name, scheme, ...): a folder of `folder` in fewer bits."""
    def quantized(name, scheme, **more):
        out = folder / f"{name}-{scheme}{'-'.join(map(str, more))}"
        return out if out.exists() else quantize_folder(folder / name, out, scheme, progress=False, **more)
    return quantized


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("name", ["main", "side"])
def test_a_quantized_classifier_answers_as_the_one_of_its_rounded_weights(name, embedding, folder, packed,
                                                                         items):
    path = packed(name, "w8", **({"embedding": True} if embedding else {}))
    (rounded, _), (model, _) = weights.load(folder / name), weights.load(path, packed=True)
    changed = [each for each in rounded.model.layers.modules() if isinstance(each, torch.nn.Linear)]
    for each in changed + ([rounded.model.embed_tokens] if embedding else []):
        each.weight.data = dequantize(*round_to_nearest(each.weight.data, SCHEMES["w8"]), SCHEMES["w8"])
    assert type(model) is type(rounded) and model.config == rounded.config
    assert len(model.packed) == len(changed) + embedding and len(changed) == (14 if name == "main" else 7)
    batch = collate_texts(items[:9])
    with torch.no_grad():
        torch.testing.assert_close(model(batch.input_ids, batch.lengths),
                                   rounded(batch.input_ids, batch.lengths), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is quantized .w8., which is for answering alone"):
        weights.load(path)


@pytest.mark.parametrize("scheme, more", [
    ("w8", {}), ("w8", {"embedding": True}), ("w8a8", {"smooth": 0.5}), ("w4-g32", {"method": "gptq"}),
    ("llm-int8", {})])
def test_early_exit_of_quantized_nets_leaves_their_shared_layers_alike(scheme, more, call, folder, packed,
                                                                       tmp_path):
    if more.keys() & {"smooth", "method"}:
        more = more | {"calibration": Calibration([str(folder / "texts.jsonl")], tokens=200)}
        texts = [json.loads(line) for line in (folder / "classified.jsonl").read_text().splitlines()]
        write_jsonl(folder / "texts.jsonl", [{"text": row["text"]} for row in texts])
    main, side = (packed(name, scheme, **more) for name in ("main", "side"))
    code, out, err = call(evaluate, f"early-exit --model {main} --sidenet {side} --data classified.jsonl "
                                    f"--threshold 0.5 --repeats 1 --out {tmp_path}/exit.json")
    assert not code, err
    found = json.loads((tmp_path / "exit.json").read_text())
    assert found["about"]["scheme"] == scheme and f"weights ({scheme}): " in out
    whole = early_exit_sizes(folder / "main", folder / "side")
    assert found["bytes"] == early_exit_sizes(main, side) and found["bytes"]["both"] < whole["both"]
    assert found["curve"][0]["left"] == 1 and found["curve"][0]["accuracy"] == found["sidenet"]["accuracy"]


@torch.no_grad()
def test_transformers_with_compressed_tensors_computes_a_quantized_classifiers_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model, own = small("llama", lambda config: Classifier(ClassifierConfig.of(config, labels=["a", "b"])),
                       seed=3)
    weights.save(tmp_path / "m", model, own)
    out = quantize_folder(tmp_path / "m", tmp_path / "w8", "w8", progress=False)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 30, 7]])
    logits = weights.load(out, packed=True)[0](ids, torch.tensor([4]))
    assert not torch.equal(logits, model(ids, torch.tensor([4])))
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=5e-5)


def test_the_bytes_of_both_nets_by_hand(folder, packed):
    """fp32: 4 bytes a number. The SideNet adds 32 x 16 + 16 + 16 x 5 + 5 = 613 numbers to the MainNet. W8 of
    the layers: a matrix (N, K) takes N K bytes, N scales of 4 and its shape, 16."""
    numbers = sum(p.numel() for p in classifier().parameters())
    assert early_exit_sizes(folder / "main", folder / "side") == {
        "main": 4 * numbers, "both": 4 * (numbers + 613)}
    matrices = [each.weight.shape for each in classifier().model.layers.modules()
                if isinstance(each, torch.nn.Linear)]
    found = early_exit_sizes(packed("main", "w8"), packed("side", "w8"))
    assert found["main"] == 4 * numbers - sum(3 * N * K - 4 * N - 16 for N, K in matrices)
    assert found["both"] == found["main"] + 4 * 613


def test_nets_that_do_not_share_their_layers_are_refused_with_the_remedy(call, folder, packed):
    other = packed("other", "w8")
    for main, side, says in [
            (packed("main", "w8"), "side", "side is not quantized, --model .* quantized .w8.; merge.py qua"),
            ("main", packed("side", "w8"), "is quantized .w8., --model main is not quantized; merge.py qua"),
            (packed("main", "w8"), packed("side", "w4"), "is quantized .w4., --model .* is quantized .w8.;"),
            (packed("main", "w8"), other, "model.embed_tokens.weight differs; quantize both with the same")]:
        code, out, err = call(evaluate, f"early-exit --model {main} --sidenet {side} --data classified.jsonl")
        assert code == 2 and out == "" and len(err) == 1 and re.search(says, err[0]), err


def test_what_of_a_classifier_is_not_quantized_is_refused(folder, packed, tmp_path):
    for name in ("main", "side"):
        with pytest.raises(ValueError, match="--head is for language models"):
            quantize_folder(folder / name, tmp_path / "q", "w8", head=True, progress=False)
    with pytest.raises(ValueError, match="a reward model is not quantized here; give a plain language"):
        quantize_folder(folder / "RM", tmp_path / "q", "w8", progress=False)
    shutil.copytree(packed("main", "w8"), tmp_path / "headed")
    path = tmp_path / "headed" / "config.json"
    about = json.loads(path.read_text())
    assert about["quantization_config"]["ignore"] == ["score"]
    for ignored, says in ([], "classifiers and SideNets but for their heads"), (["lm_head"], "not supported"):
        about["quantization_config"]["ignore"] = ignored
        path.write_text(json.dumps(about))
        with pytest.raises(ValueError, match=says):
            weights.load_meta(tmp_path / "headed", packed=True)


@pytest.mark.parametrize("stage", ["classify", "sidenet"])
def test_a_run_resumed_is_one_never_stopped_bit_for_bit(stage, world, tmp_path):
    whole = run(stage, world, tmp_path / "whole", max_steps=6, schedule="constant")
    run(stage, world, tmp_path / "parts", max_steps=3, schedule="constant")
    parts = run(stage, world, tmp_path / "parts", resume=True, max_steps=6, schedule="constant")
    one, two = ((each / "model" / "model.safetensors").read_bytes() for each in (whole, parts))
    assert one == two and logged(whole) == logged(parts)


def test_texts_that_are_too_long_or_not_to_be_learned_are_left_out_by_count(tmp_path, capsys):
    write_jsonl(tmp_path / "f.jsonl", [
        {"text": "red"}, {"text": "word " * 60}, {"text": "blue", "weight": 0},
        {"text": "green", "finish_reason": "length"}])
    rows = [json.loads(line) | {"label": "a"} for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "f.jsonl", rows)
    skip = load_texts([tmp_path / "f.jsonl"], tokenizer(), 20, config.Classify())
    said = capsys.readouterr().err
    assert len(skip) == 1 and "f.jsonl:2" in said and "f.jsonl:3" in said and "f.jsonl:4" in said
    cut = load_texts([tmp_path / "f.jsonl"], tokenizer(), 20, config.Classify(too_long="cut-left"))
    assert [len(item.ids) for item in cut][1] == 20 and cut[1].ids[0] == tokenizer().bos_id
    with pytest.raises(ValueError, match="f.jsonl:2: .* longer than"):
        load_texts([tmp_path / "f.jsonl"], tokenizer(), 20)


@pytest.mark.skipif(not SHARED.is_file(), reason="needs ../shared/data/classification.jsonl")
def test_sib_200_is_read_as_it_is():
    items = load_texts([SHARED], tokenizer(), 100_000)
    assert len(items) == 1680 and len({item.language for item in items}) == 24
    assert len({item.label for item in items}) == 7 and len({item.id for item in items}) == 70
