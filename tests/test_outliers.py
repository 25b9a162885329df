"""aya_min/outliers.py: what `evaluate outliers` measures, by hand and against slow versions."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from small import CPU, language_model, make, side_net, tokenizer

from aya_min import evaluate, weights
from aya_min.data import batches_in_order, collate, load_examples
from aya_min.config import SFT
from aya_min.model import CohereForCausalLM
from aya_min.outliers import (Seen, figures_of, gains, look, outlier_dimensions, page, quantized_products,
                              spectral_norm, table)


@pytest.fixture(scope="module")
def found(world):
    model = language_model()
    examples = load_examples([world / "held-out-sft.jsonl"], tokenizer(), 256, SFT())
    batches = batches_in_order(examples, collate, size=4)
    return model, examples, batches, figures_of(model, batches, CPU)


def test_int8_and_int4_products_worked_by_hand():
    x, weight = torch.tensor([[1.0, 0.5]]), torch.tensor([[7.0, 2.4], [0.0, -3.5]])
    found = quantized_products(x, weight)
    # int4: steps of 1 and 0.5, so 2.4 becomes 2. int8: x is 127, 64 (of 63.5) in steps of 1/127; the weights
    # are 127, 44 (of 43.54) in steps of 7/127, and 0, -127 in steps of 3.5/127.
    assert found["int4"].tolist() == [[8.0, -1.75]]
    first, second = (127 * 127 + 64 * 44) * 7 / 127 ** 2, -64 * 127 * 3.5 / 127 ** 2
    torch.testing.assert_close(found["int8"], torch.tensor([[first, second]]))


def test_the_error_of_products_is_the_root_mean_square_over_all_that_was_read():
    seen, weight = Seen(), torch.tensor([[7.0, 2.4]])
    for x in ([[1.0, 1.0]], [[0.0, 2.0], [3.0, 0.0]]):
        seen.read(torch.tensor(x))
        seen.multiply(torch.tensor(x), weight)
    figures = seen.figures()
    # int4 takes 2 for 2.4: errors 0.4, 0.8, 0 of the outputs 9.4, 4.8, 21
    assert figures["int4"]["rmse"] == pytest.approx(math.sqrt((0.16 + 0.64) / 3), rel=1e-5)
    assert figures["int4"]["relative"] == pytest.approx(math.sqrt(0.8 / (9.4 ** 2 + 4.8 ** 2 + 21 ** 2)),
                                                        rel=1e-5)
    assert figures["std"] == pytest.approx(torch.tensor([1.0, 1, 0, 2, 3, 0]).std(correction=0).item())
    assert figures["largest"] == 3


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (1, 4)])
def test_the_spectral_norm_is_the_largest_singular_value(shape):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    expected = torch.linalg.matrix_norm(weight, 2).item()
    assert spectral_norm(weight, generator) == pytest.approx(expected, rel=1e-4)
    assert spectral_norm(torch.diag(torch.tensor([3.0, -5.0, 0.0])), generator) == pytest.approx(5)
    assert spectral_norm(torch.zeros(shape), generator) == 0


def test_an_outlier_dimension_is_large_in_a_quarter_of_the_layers_and_for_six_percent_of_the_tokens():
    above = torch.zeros(8, 5, dtype=torch.long)             # of 100 tokens
    above[0, 0] = above[1, 0] = 24                          # 2 of 8 layers, 48 of 800: is one
    above[0, 1] = above[1, 1] = 23                          # 46 of 800: too few tokens
    above[3, 2] = 100                                       # 1 of 8 layers: too few
    above[:, 3] = 100
    found = outlier_dimensions(above, above / 10, 100)
    assert found == [{"dimension": 0, "layers": 0.25, "tokens": 0.06, "largest": pytest.approx(2.4)},
                     {"dimension": 3, "layers": 1.0, "tokens": 1.0, "largest": 10.0}]


def test_a_magnitude_of_exactly_6_is_not_above_6():
    seen = Seen()
    seen.read(torch.tensor([[6.0, -6.5], [-7.0, 1.0]]))
    seen.read(torch.tensor([[8.0, 0.0]]))
    assert seen.above.tolist() == [2, 1] and seen.most.tolist() == [8.0, 6.5] and seen.tokens == 3


def test_gains_are_what_a_norm_multiplies_by():
    model = make(CohereForCausalLM, 0, model_type="gemma2", query_pre_attn_scalar=8)
    norm = model.model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -4.0] * 16))
    assert gains(norm) == {"mean": -0.5, "std": 2.5, "largest": 3.0}        # 2 and -3


def test_what_the_layers_read_is_counted_for_each_token_and_not_for_padding(found):
    model, examples, batches, figures = found
    assert figures["tokens"] == sum(len(e.ids) for e in examples)
    inputs = []
    for e in examples:                                      # one text at a time, by the plain forward
        ids = torch.from_numpy(e.ids).long()[None]
        with torch.no_grad():
            x = model.model.embed_tokens(ids)
            inputs.append(model.model.layers[0].input_layernorm(x)[0])
    x, weight = torch.cat(inputs), model.model.layers[0].self_attn.v_proj.weight.detach()
    first = figures["layers"][0]["projections"]["self_attn.v_proj"]
    assert first["std"] == pytest.approx(x.std(correction=0).item(), rel=1e-5)
    assert first["largest"] == pytest.approx(x.abs().max().item(), rel=1e-5)
    error = (quantized_products(x, weight)["int8"] - F.linear(x, weight)).square().mean().sqrt().item()
    assert first["int8"]["rmse"] == pytest.approx(error, rel=1e-3)
    assert 0 < first["int8"]["relative"] < first["int4"]["relative"] < 0.5


def test_a_dimension_that_a_norm_makes_large_is_found(world):
    model = language_model()
    for block in model.model.layers:
        block.input_layernorm.weight.data[5] = 40.0
    examples = load_examples([world / "held-out-sft.jsonl"], tokenizer(), 256, SFT())
    batches = batches_in_order(examples, collate)
    plain, loud = figures_of(language_model(), batches, CPU), figures_of(model, batches, CPU)
    assert plain["outlier_dimensions"] == [] and [d["dimension"] for d in loud["outlier_dimensions"]] == [5]
    error = [f["layers"][0]["projections"]["mlp.gate_proj"]["int8"]["relative"] for f in (plain, loud)]
    assert loud["layers"][0]["norms"]["input_layernorm"]["largest"] == 40 and error[1] > 0


def test_the_hooks_are_gone_afterwards(found):
    model, _, batches, _ = found
    look(model, batches[:1], CPU)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_with_values_that_are_not_finite_is_refused(found):
    model = language_model()
    model.model.embed_tokens.weight.data[:] = math.nan
    with pytest.raises(ValueError, match="what layer 0 reads is not finite.*model.embed_tokens.weight"):
        figures_of(model, found[2], CPU)


def test_table_and_page_show_every_layer_and_the_page_runs_nothing(found):
    figures = found[3]
    text, drawn = table("M", figures), page("Outliers of <M>", figures)
    assert text.count("self_attn.q_proj") == 2 and "0 outlier dimensions" in text and "final" in text
    assert "<script" not in drawn and "Outliers of &lt;M&gt;" in drawn
    assert drawn.count("<polyline") == 2 + 4 * 7 + 3
    assert "1 mlp.down_proj" in drawn


def test_the_command_writes_figures_and_page_and_refuses_what_is_no_whole_dense_model(world, tmp_path,
                                                                                     capsys):
    weights.save(tmp_path / "model", language_model(), tokenizer())
    data = ["outliers", "--data", str(world / "held-out-sft.jsonl"), "--model"]
    files = ["--out", str(tmp_path / "f.json"), "--page", str(tmp_path / "f.html")]
    evaluate.main([*data, str(tmp_path / "model"), *files])
    assert "self_attn.q_proj" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert len(figures["layers"]) == 2 and (tmp_path / "f.html").read_text(encoding="utf-8").startswith("<!D")
    with pytest.raises(ValueError, match="f.json"):
        evaluate.main([*data, str(tmp_path / "model"), *files])
    one = ["--out", str(tmp_path / "one"), "--page", str(tmp_path / "." / "model" / ".." / "one")]
    with pytest.raises(ValueError, match="are one file; give each a name of its own"):
        evaluate.main([*data, str(tmp_path / "model"), *one])
    mixture = language_model(mixture=dict(experts=["a", "b"], top_k=1, shared=True))
    weights.save(tmp_path / "mixture", mixture, tokenizer())
    weights.save(tmp_path / "side", side_net(), tokenizer())
    for name, says in (("mixture", "a mixture of experts, and outliers measures dense"),
                       ("side", "a SideNet, which has only the first layers of a model; give its MainNet")):
        with pytest.raises(ValueError, match=says):
            evaluate.main([*data, str(tmp_path / name)])
