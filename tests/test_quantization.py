"""Quantization after training: the numbers, the folders, the engine's products, the command."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import language_model, make, reward_model, tokenizer, write_world

import merge
from aya_min import evaluate, evaluate_quantized, quantized, tensorfiles, weights
from aya_min.config import Reading
from aya_min.data import load_examples
from aya_min.engine import Engine
from aya_min.fused import Fused
from aya_min.merge_quantize import READERS, Calibration, Work, quantize_folder, read_calibration
from aya_min.model import CohereForCausalLM
from aya_min.quantization import (NF4, SCHEMES, Scheme, dequantize, fixed_tensors, from_tensors, gptq, loss,
                                  nearest, pack, round_to_nearest, scales_of, smoothing, specs_of, tensors_of,
                                  unpack, values)
from aya_min.reward import score_texts
from aya_min.sampling import generate
from aya_min.world import gold_answer

EACH = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the numbers -------------------------------------------------------------------------------------------

def test_weights_of_four_bits_worked_by_hand():
    weight = torch.tensor([[7.0, -3.0, 0.6, -0.4], [0.0, 0.0, 0.0, 0.0], [-1.4, 0.5, 0.31, 0.29]])
    codes, scales = round_to_nearest(weight, SCHEMES["w4"])
    torch.testing.assert_close(scales, torch.tensor([[1.0], [1.0], [0.2]]))
    assert codes.tolist() == [[7, -3, 1, 0], [0, 0, 0, 0], [-7, 2, 2, 1]]
    found = dequantize(codes, scales, SCHEMES["w4"])
    torch.testing.assert_close(found[2], torch.tensor([-1.4, 0.4, 0.4, 0.2]))


@EACH
def test_weights_on_the_grid_are_kept_exactly(scheme):
    levels = values(torch.arange(16, dtype=torch.int8), scheme) if scheme.name == "nf4" else torch.arange(
        -scheme.largest, scheme.largest + 1.0)
    weight = torch.cat([levels[torch.randint(len(levels), (5, 256))], levels[-1:].expand(5, 128)], 1)
    weight[:, ::32] = levels[-1]                        # each group holds its largest number
    weight *= torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])[:, None]
    codes, scales = round_to_nearest(weight, scheme)
    assert torch.equal(dequantize(codes, scales, scheme), weight)


@EACH
def test_an_error_is_at_most_half_a_step(scheme):
    weight = normal(7, 384)
    codes, scales = round_to_nearest(weight, scheme)
    errors = ((dequantize(codes, scales, scheme) - weight).unflatten(1, (scales.shape[1], -1))
              / scales[..., None]).abs()
    levels = torch.tensor(NF4)
    step = levels.diff().max() if scheme.name == "nf4" else 1.0
    assert step / 2 * 0.95 < errors.max() <= step / 2 + 1e-4


def test_a_smaller_group_has_a_smaller_error_and_nf4_is_better_for_normal_weights():
    weight = normal(64, 384)
    errors = {name: (dequantize(*round_to_nearest(weight, scheme), scheme) - weight).square().mean().item()
              for name, scheme in SCHEMES.items()}
    assert errors["w8"] < errors["w4-g32"] < errors["w4-g64"] < errors["w4-g128"] < errors["w4"]
    assert errors["nf4"] < errors["w4-g64"]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_stand_in_the_lowest_bits_first(bits):
    codes = [[0, -4, -7, -5, -3, -1, 0, 1, -3, -2]] if bits == 4 else [[117, 115, 116, 115, -1]]
    codes = torch.tensor(codes, dtype=torch.int8)
    packed, raised = pack(codes, bits), codes[0].int() + 2 ** (bits - 1)
    each = 32 // bits
    whole = [sum(int(n) << bits * i for i, n in enumerate(raised[start:start + each]))
             for start in range(0, len(raised), each)]
    assert [word % 2 ** 32 for word in packed[0].tolist()] == whole
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@EACH
def test_what_is_written_is_what_is_read(scheme):
    weight = normal(6, 128)
    codes, scales = round_to_nearest(weight, scheme)
    found, specs = tensors_of("x", codes, scales, scheme), specs_of("x", weight.shape, scheme, "F32")
    found |= fixed_tensors("x", weight.shape, scheme)
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: s for name, (_, s) in specs.items()}
    again = from_tensors("x", found, weight.shape, scheme)
    assert torch.equal(again[0], codes)
    torch.testing.assert_close(again[1], scales, rtol=1e-6, atol=0)


def slow_gptq(weight, hessian, scheme):
    """One input after the other; the others make good its error by the inverse of what is left of the
    Hessian, inverted anew (the optimal brain surgeon, which GPTQ computes faster)."""
    W, H = weight.double().clone(), hessian.double().clone()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.double)
    codes, scales = torch.empty(W.shape), torch.empty(len(W), scheme.groups(len(H)))
    width = scheme.group or len(H)
    first = scales_of(W, scheme)
    for j in range(len(H)):
        if j % width == 0:
            of_group = scales_of(W[:, j:j + width], scheme) if scheme.group else first
            scales[:, j // width] = of_group[:, 0]
        inverse = torch.linalg.inv(H[j:, j:])
        scale = scales[:, j // width].double()
        codes[:, j] = nearest(W[:, j] / scale, scheme).float()
        error = W[:, j] - values(codes[:, j].to(torch.int8), scheme, torch.double) * scale
        W[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes.to(torch.int8), scales


def correlated(num, width):
    x = normal(num, width, seed=1) @ (normal(width, width, seed=2) * 0.3 + torch.eye(width))
    return x.T @ x


@pytest.mark.parametrize("name, block", [("w4", 24), ("w4-g32", 24), ("w4-g32", 128), ("nf4", 128),
                                         ("w8", 128)])
def test_gptq_is_the_slow_one(name, block):
    """block 24: groups that reach over the end of a block of inputs."""
    scheme, weight, H = SCHEMES[name], normal(6, 128), correlated(300, 128)
    codes, scales = gptq(weight, H.clone(), scheme, block=block)
    slow, slow_scales = slow_gptq(weight, H, scheme)
    won = loss(weight, dequantize(slow, slow_scales, scheme), H) < loss(
        weight, dequantize(*round_to_nearest(weight, scheme), scheme), H)
    assert won.any()
    # a number in the middle of a step may go elsewhere
    assert (codes == slow)[won].float().mean() > 0.99
    torch.testing.assert_close(scales[won], slow_scales[won], rtol=2e-2, atol=0)


@EACH
def test_gptq_is_never_worse_than_rounding_on_its_own_loss(scheme):
    for seed in range(3):
        weight, H = normal(16, 128, seed=seed), correlated(40 * (seed + 1), 128)
        of = {method: loss(weight, dequantize(*found, scheme), H) for method, found in (
            ("gptq", gptq(weight, H.clone(), scheme)), ("rtn", round_to_nearest(weight, scheme)))}
        assert (of["gptq"] <= of["rtn"] * (1 + 1e-5)).all() and of["gptq"].sum() < 0.95 * of["rtn"].sum()


@pytest.mark.parametrize("name", ["w4", "w4-g32", "nf4"])
def test_gptq_of_some_outputs_at_a_time_is_that_of_all(name):
    """So what it holds beside the Hessian does not grow with a layer's outputs."""
    weight, H = normal(13, 128), correlated(200, 128)
    for one, other in zip(gptq(weight, H.clone(), SCHEMES[name], piece=600), gptq(weight, H, SCHEMES[name])):
        torch.testing.assert_close(one, other)


def test_gptq_bears_inputs_that_are_always_zero_and_no_inputs_at_all():
    weight, H = normal(4, 64), correlated(100, 64)
    H[3], H[:, 3] = 0, 0
    codes, scales = gptq(weight, H, SCHEMES["w4"])
    assert dequantize(codes, scales, SCHEMES["w4"]).isfinite().all()
    codes, scales = gptq(weight, torch.zeros(64, 64), SCHEMES["w4"])
    assert torch.equal(codes, round_to_nearest(weight, SCHEMES["w4"])[0])


def test_weights_below_what_the_scale_s_dtype_holds_are_zeros():
    """Their scale was 0 in fp16, and what is divided by it no number."""
    weight = torch.tensor([[1e-7, 0.0, -1e-7, 0.0], [1.0, 0.0, -1.0, 0.5]])
    codes, scales = round_to_nearest(weight, SCHEMES["w8"], torch.float16)
    assert codes.tolist() == [[0] * 4, [127, 0, -127, 64]] and scales[0] == 1


def test_smoothing_moves_what_is_large_from_inputs_to_weights():
    """alpha 0.5 gives both the same largest number, sqrt(a b); 1 gives all inputs 1; by hand."""
    inputs, weights = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    factors = smoothing(inputs, weights, 0.5)
    torch.testing.assert_close(factors, torch.tensor([4.0, 0.5, 1.0]))
    torch.testing.assert_close(inputs[:2] / factors[:2], weights[:2] * factors[:2])
    torch.testing.assert_close((inputs / smoothing(inputs, weights, 1.0))[:2], torch.ones(2))
    assert math.isclose(smoothing(inputs, weights, 0.75)[0].item(), 8.0)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="x.weight has 96 inputs, which groups of 64 do not divide"):
        specs_of("x", (8, 96), SCHEMES["w4-g64"], "F32")


# ---- the folder --------------------------------------------------------------------------------------------

SIZES = dict(hidden_size=128, intermediate_size=256)
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tied and an untied model, one with biases, and the embedded world's files."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("tied", language_model(**SIZES)),
                        ("untied", language_model(tie_word_embeddings=False, **SIZES)),
                        ("qwen", make(CohereForCausalLM, 0, **SIZES, model_type="qwen2", head_dim=32))):
        weights.save(folder / name, model, tokenizer())
    return write_world(folder)


def dense(model, folder):
    """The model of a folder with its packed layers unpacked, in fp32."""
    plain, _ = weights.load(folder)
    for name, module in model.packed.items():
        plain.get_submodule(name).weight.data = module.weight.float()
    return plain


@EACH
def test_a_folder_is_read_as_the_model_of_its_rounded_weights(scheme, models, tmp_path):
    for name in ("tied", "qwen"):
        out = quantize_folder(models / name, tmp_path / f"{name}-q", scheme.name, progress=False)
        model, _ = weights.load(out, packed=True)
        plain = dense(quantize_by_hand(models / name, scheme), models / name)
        if scheme.activations:
            continue                        # tests below
        # w8 computes by digits, nearer to fp64 than fp32 is, which is up to 3.4e-5 away
        atol = 5e-5 if scheme.bits == 8 else 1e-5
        torch.testing.assert_close(model(IDS), plain(IDS), atol=atol, rtol=1e-4)
        torch.testing.assert_close(logits_of_engine(model), plain(IDS)[0, -1:], atol=1e-4, rtol=1e-4)


def quantize_by_hand(folder, scheme):
    """A model whose packed layers were filled without a folder between."""
    plain, _ = weights.load(folder)
    with torch.device("meta"):
        model = CohereForCausalLM(plain.config)
    model.packed = quantized.put_packed(model, scheme, False, False)
    for name, module in model.packed.items():
        rounded = round_to_nearest(plain.get_submodule(name).weight.detach(), scheme)
        found = tensors_of(name, *rounded, scheme) | fixed_tensors(name, module.shape, scheme)
        module.fill(name, found, torch.float32, "cpu")
    return model


def logits_of_engine(model):
    engine = Engine(Fused(model), 1, 64, 1)
    return engine.prefill([IDS[0].tolist()])[0]


@pytest.mark.parametrize("outliers", [None, 1.5])
def test_inputs_of_eight_bits_are_rounded_by_token_and_outliers_kept(outliers):
    """Beside a slow product in fp64; a token's result does not depend on the others."""
    name = "llm-int8" if outliers else "w8a8"
    scheme = quantized.replace(SCHEMES[name], outliers=outliers)
    weight, x = normal(24, 64), normal(9, 64, seed=1)
    x[4] = 0
    module = quantized.PackedLinear(scheme, weight.shape)
    codes, scales = round_to_nearest(weight, scheme)
    module.keep(codes, scales)
    rounded = dequantize(codes, scales, scheme).double()
    slow = []
    for token in x.double():
        kept = token * (token.abs() >= (outliers or math.inf))
        rest = token - kept
        step = rest.abs().max() / (127 if outliers else 127.5) or 1.0
        slow.append(rounded @ ((rest / step).round().clamp(-128, 127) * step + kept))
    torch.testing.assert_close(module(x), torch.stack(slow).float(), atol=1e-5, rtol=1e-5)
    alone = torch.cat([module(row[None]) for row in x])
    torch.testing.assert_close(alone, module(x), atol=1e-5 if outliers else 0, rtol=0)
    exact = x @ rounded.float().T
    assert 1e-4 < (module(x) - exact).abs().max() < 0.2


def test_digits_of_the_inputs_are_the_product_in_fp32():
    """w8: closer to fp64 than torch's own product; rows of 0 and of one huge number; no row depends on
    another; what is not finite stays so."""
    weight, x = normal(24, 512), normal(9, 512, seed=1)
    x[4], x[5, 3] = 0, 1e6
    codes, scales = round_to_nearest(weight, SCHEMES["w8"])
    module = quantized.PackedLinear(SCHEMES["w8"], weight.shape)
    module.keep(codes, scales)
    rounded = dequantize(codes, scales, SCHEMES["w8"])
    exact, own = x.double() @ rounded.double().T, x @ rounded.T
    size = (x.abs().amax(1, keepdim=True) * rounded.abs().amax(1)).clamp_min(1e-9)
    error = lambda y: ((y - exact).abs() / size).max()
    assert module.multiply != module.by_pieces and error(module(x)) < max(error(own), 2e-6)
    assert torch.equal(torch.cat([module(row[None]) for row in x]), module(x))
    assert torch.equal(module.weight, rounded) and module(x)[4].eq(0).all()
    for wrong in (math.nan, math.inf):
        x[0, 0] = wrong
        assert not module(x)[0].isfinite().any() and module(x)[1:].isfinite().all()


@EACH
def test_torch_s_kernels_compute_the_rounded_weights_product(scheme):
    """bf16, shapes that kernels take and one that they do not; no row depends on another."""
    for N, K in ((48, 256), (40, 128)):
        weight, x = normal(N, K) / 8, normal(5, K, seed=1).bfloat16()
        module = quantized.PackedLinear(scheme, weight.shape)
        codes, scales = round_to_nearest(weight, scheme, torch.bfloat16)
        module.keep(codes, scales.bfloat16())
        exact = x.float() @ dequantize(codes, scales, scheme).T
        torch.testing.assert_close(module(x).float(), exact, atol=0.15 if scheme.activations else 0.04,
                                   rtol=0.02)
        if not scheme.activations:
            torch.testing.assert_close(module.weight.float(), dequantize(codes, scales, scheme), rtol=8e-3,
                                       atol=1e-6)
        wider = torch.cat([x, x], 1)
        assert torch.equal(module(wider[:, :K]), module(x))
        has_kernel = module.multiply != module.by_pieces
        assert has_kernel == (scheme.name != "nf4" and (scheme.bits == 8 or N == 48))


def test_generation_from_packed_weights_is_that_of_the_unpacked_ones(models, tmp_path):
    out = quantize_folder(models / "tied", tmp_path / "q", "w4-g32", progress=False)
    model, _ = weights.load(out, packed=True)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    made = [generate(each, prompts, temperature=0, max_new_tokens=12) for each in
            (model, dense(model, models / "tied"))]
    assert [c.ids for (c,) in made[0]] == [c.ids for (c,) in made[1]]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_head_and_embedding_are_quantized_as_asked(name, models, tmp_path):
    out = quantize_folder(models / name, tmp_path / "q", "w8", head=True, embedding=True, progress=False)
    model, _ = weights.load(out, packed=True)
    assert {"lm_head", "model.embed_tokens"} < model.packed.keys() and not model.config.tie_word_embeddings
    plain = dense(quantize_by_hand(models / name, SCHEMES["w8"]), models / name)
    source, _ = weights.load(models / name)
    head = dequantize(*round_to_nearest(source.head_weight.detach(), SCHEMES["w8"]), SCHEMES["w8"])
    embedding = source.model.embed_tokens.weight.detach()
    embedding = dequantize(*round_to_nearest(embedding, SCHEMES["w8"]), SCHEMES["w8"])
    plain.model.embed_tokens.weight.data = embedding
    expected = plain.model(IDS) @ head.T * plain.config.logit_scale
    torch.testing.assert_close(model(IDS), expected, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(logits_of_engine(model), expected[0, -1:], atol=1e-4, rtol=1e-4)
    assert tensorfiles.read_config(out)["quantization_config"]["ignore"] == []


def test_bf16_scales_are_those_that_the_codes_were_made_for(models, tmp_path):
    source, its = weights.load(models / "tied")
    weights.save(tmp_path / "half", source, its, torch.bfloat16)
    out = quantize_folder(tmp_path / "half", tmp_path / "q", "w4-g32", progress=False)
    header = tensorfiles.read_header(out)
    name = "model.layers.0.mlp.up_proj"
    assert header[f"{name}.weight_scale"][1] == "BF16"
    weight = tensorfiles.read(tensorfiles.read_header(tmp_path / "half"), f"{name}.weight").float()
    model, _ = weights.load(out, packed=True)
    codes, scales = round_to_nearest(weight, SCHEMES["w4-g32"], torch.bfloat16)
    torch.testing.assert_close(model.get_submodule(name).weight, dequantize(codes, scales, SCHEMES["w4-g32"]))


# ---- with a text -------------------------------------------------------------------------------------------

def calibration(models, tokens=600, languages=()):
    return Calibration([str(models / "sft.jsonl")], list(languages), tokens)


def outputs_differ(folder, out, texts):
    """sum |logits - logits of the source|^2 over the texts."""
    (one, _), (other, _) = weights.load(folder), weights.load(out, packed=True)
    return sum((one(ids[None]) - other(ids[None])).square().sum().item() for ids in texts)


@pytest.mark.parametrize("group", [None, 32])
def test_a_rounded_folder_is_a_plain_one_of_what_the_codes_stand_for(group, models, tmp_path):
    scheme = Scheme("w3", 3, "rounded", group)
    out = quantize_folder(models / "tied", tmp_path / "q", scheme, progress=False)
    (plain, _), (model, _) = weights.load(models / "tied"), weights.load(out)
    for name, layer in quantized.linears(plain).items():
        found = model.get_submodule(name).weight
        assert torch.equal(found, dequantize(*round_to_nearest(layer.weight, scheme), scheme))
        assert found[0, :group].unique().numel() <= 7           # 3 bits, -3 to 3
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(plain.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_gptq_on_a_folder_is_better_than_rounding_and_writes_where_it_came_from(models, tmp_path):
    text = calibration(models)
    texts = sum(read_calibration(text, tokenizer(), language_model().config).values(), [])
    for name in ("tied", "qwen"):
        made = {method: quantize_folder(models / name, tmp_path / f"{name}-{method}", "w4", method=method,
                                        calibration=text if method == "gptq" else None, progress=False)
                for method in ("rtn", "gptq")}
        errors = {method: outputs_differ(models / name, out, texts) for method, out in made.items()}
        assert errors["gptq"] < 0.8 * errors["rtn"]
    about = json.loads((made["gptq"] / "quantize.json").read_text())
    share = 600 // len(about["tokens"])
    assert about["config"]["method"] == "gptq" and set(about["tokens"].values()) == {share}
    assert len(about["inputs"][0]["sha256"]["model.safetensors"]) == 64


def test_what_a_layer_reads_is_what_the_model_gives_it(models):
    """The streamed layers give the states of the whole model: of all families' blocks, by the logits."""
    for name in ("tied", "qwen"):
        model, _, header = weights.load_meta(models / name)
        work = Work(model, header, SCHEMES["w8"], "rtn", None, False, False, "cpu")
        whole, _ = weights.load(models / name)
        with torch.no_grad():
            states = [whole.model.embed_tokens(IDS[0])]
            for i, block in enumerate(whole.model.layers):
                states = list(work.run(i, block, states))
            torch.testing.assert_close(whole.model.norm(states[0]), whole.model(IDS)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tied", "qwen"])
def test_what_smoothing_takes_from_a_norm_it_gives_the_weights_that_are_rounded(
        name, dtype, models, tmp_path):
    """So the product before rounding is that of the source, also where the norm's gains are rounded: in bf16
    the weights were multiplied by factors by which the gains on disk were not divided."""
    text = calibration(models)
    weights.save(tmp_path / "source", *weights.load(models / name), dtype)
    out = quantize_folder(tmp_path / "source", tmp_path / "smooth", "w8", smooth=0.5, calibration=text,
                          progress=False)
    source, smooth = weights.load(tmp_path / "source")[0], weights.load(out, packed=True)[0]
    for before, after in zip(source.model.layers, smooth.model.layers):
        for norm, readers in READERS[before.kind]:
            factors = before.get_submodule(norm).weight / after.get_submodule(norm).weight      # (K,)
            assert factors.max() > 1.2 * factors.min()
            for reader in readers:
                weight = before.get_submodule(reader).weight * factors
                found = after.get_submodule(reader)
                # the largest weight may be a little beyond 127 rounded steps
                excess = (weight.abs().amax(1, keepdim=True) / found.scales - 127).clamp_min(0)
                half_a_step = found.scales * (0.5001 + excess)
                assert ((found.weight - weight).abs() <= half_a_step).all()


def test_calibration_takes_equally_many_tokens_of_each_language(models):
    config = language_model().config
    found = read_calibration(calibration(models), tokenizer(), config)
    languages = {e.language for e in load_examples([str(models / "sft.jsonl")], tokenizer(), 512)}
    assert found.keys() == languages and {sum(map(len, texts)) for texts in found.values()} == {
        600 // len(languages)}
    found = read_calibration(calibration(models, 50, ["en"]), tokenizer(), config)
    assert list(found) == ["en"] and sum(map(len, found["en"])) == 50
    again = read_calibration(calibration(models, 50, ["en", "en"]), tokenizer(), config)
    assert sum(map(len, again["en"])) == 50


# ---- the commands ------------------------------------------------------------------------------------------

def quantize(capsys, *words):
    """(exit code, standard error) of merge.py quantize."""
    try:
        code = merge.main(["quantize", *map(str, words)])
    except SystemExit as end:
        code = end.code
    except ValueError as error:
        return 2, str(error)
    return code, capsys.readouterr().err


def test_bad_input_is_refused_in_one_line(models, tmp_path, capsys):
    out, text = tmp_path / "out", models / "sft.jsonl"
    done = quantize_folder(models / "tied", tmp_path / "done", "w8", progress=False)
    narrow = tmp_path / "narrow"
    weights.save(narrow, language_model(hidden_size=96, num_attention_heads=6), tokenizer())
    mixture = tmp_path / "mixture"
    weights.save(mixture, language_model(mixture={"experts": ["A", "B"]}), tokenizer())
    for folder, words, says in [
            (narrow, ["--scheme", "w4-g64"], "has 96 inputs, which groups of 64 do not divide"),
            (done, ["--scheme", "w4"], "is quantized already"),
            (mixture, ["--scheme", "w8"], "a mixture of experts is not quantized here"),
            (models / "tied", ["--scheme", "w4", "--method", "gptq"], "--method gptq needs a text"),
            (models / "tied", ["--scheme", "w8a8", "--smooth", "0.5"], "--smooth needs a text"),
            (models / "tied", ["--scheme", "w4", "--calibration", text], "changes nothing of rounding"),
            (models / "tied", ["--scheme", "w4", "--method", "gptq", "--calibration", text],
             "text is too short"),
            (models / "tied", ["--scheme", "w4", "--method", "gptq", "--calibration", text,
                               "--calibration-languages", "Swahili"], "0 tokens of 'sw'"),
            (models / "tied", ["--scheme", "w4", "--method", "gptq", "--calibration", text,
                               "--calibration-tokens", "1", "--calibration-languages", "en", "tr"],
             "are no token for each of 2 languages"),
            (models / "tied", ["--scheme", "w4", "--method", "gptq", "--calibration", text,
                               "--calibration-languages", "Klingonish"], "unknown language 'Klingonish'"),
            (models / "tied", ["--scheme", "w4", "--columns", "text=t"], "go with --calibration"),
            (models / "tied", ["--scheme", "nf4", "--head"], "not with nf4"),
            (models / "tied", ["--scheme", "w4", "--embedding"], "give --head too"),
            (models / "tied", ["--scheme", "w5"], "invalid choice"),
            (models / "tied", ["--scheme", "w4", "--calibration-tokens", "9"], "go with --calibration")]:
        code, line = quantize(capsys, folder, *words, "--out", out)
        assert code == 2 and says in line and not out.exists(), (says, line)


def test_of_a_quantized_embedding_it_is_said_that_transformers_does_not_read_it(models, tmp_path, capsys):
    for name, flags in (("with", ["--embedding"]), ("without", [])):
        assert merge.main(["quantize", str(models / "untied"), "--scheme", "w8", *flags, "--out",
                           str(tmp_path / name)]) == 0
        assert ("transformers does not" in capsys.readouterr().out) == (name == "with")


def test_a_quantized_folder_is_neither_trained_nor_merged_nor_saved(models, tmp_path):
    out = quantize_folder(models / "tied", tmp_path / "q", "w4-g32", progress=False)
    with pytest.raises(ValueError, match=r"is quantized \(w4-g32\), .* give the model that it was made of"):
        weights.load_meta(out)
    for words in (["linear", "--out", str(tmp_path / "m")], ["diff"]):
        with pytest.raises(ValueError) as error:
            merge.main([words[0], str(models / "tied"), str(out), *words[1:]])
        assert str(error.value) == (f"{out} is quantized: its codes can be neither merged nor compared; give "
                                    "the model that it was made of")
    with pytest.raises(ValueError, match="q is quantized, and is copied, not saved"):
        weights.save(tmp_path / "saved", *weights.load(out, packed=True))
    assert not (tmp_path / "saved").exists()


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("scheme, name, change", [
    ("w8", "weight_scale", lambda t: t.fill_(float("nan"))), ("w8a8", "weight_scale", lambda t: t.neg_()),
    ("w4-g32", "weight_scale", lambda t: t.fill_(float("inf"))), ("llm-int8", "SCB", lambda t: t.neg_()),
    ("nf4", "weight.absmax", lambda t: t.neg_()), ("w4", "weight_shape", lambda t: t.flip(0)),
    ("nf4", "weight.quant_map", lambda t: t.flip(0)), ("llm-int8", "weight_format", lambda t: t + 1),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda t: t.flip(0))])
def test_a_packed_tensor_that_says_something_else_is_refused(scheme, name, change, models, tmp_path):
    """What a reader of compressed-tensors or bitsandbytes would follow was not looked at here."""
    out = quantize_folder(models / "tied", tmp_path / "q", scheme, progress=False)
    altered(out, f"{UP}.{name}", change)
    with pytest.raises(ValueError, match=f"q: {UP}.{name} (holds scales|does not say)"):
        weights.load(out, packed=True)


def altered(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors")


def test_an_nf4_folder_may_say_that_its_weights_were_bf16(models, tmp_path):
    """As bitsandbytes writes of a model in bf16. It is the dtype of what is unpacked."""
    out = quantize_folder(models / "tied", tmp_path / "q", "nf4", progress=False)
    before = weights.load(out, packed=True)[0](IDS)
    altered(out, f"{UP}.weight.quant_state.bitsandbytes__nf4", lambda state: torch.tensor(
        list(bytes(state.tolist()).replace(b"float32", b"bfloat16")), dtype=torch.uint8))
    assert torch.equal(weights.load(out, packed=True)[0](IDS), before)


def test_a_config_that_says_something_else_is_refused(models, tmp_path):
    out = quantize_folder(models / "tied", tmp_path / "q", "w4-g32", progress=False)
    path = out / "config.json"
    config = json.loads(path.read_text())
    for change in ({"symmetric": False}, {"num_bits": 3}, {"group_size": 64}, {"strategy": "tensor"}):
        changed = json.loads(json.dumps(config))
        changed["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="quantization_config|its scheme says"):
            weights.load_meta(out, packed=True)


# ---- what is lost ------------------------------------------------------------------------------------------

def evaluated(capsys, *words):
    evaluate.main(["quantized", *map(str, words)])
    return capsys.readouterr().out


def test_the_loss_is_measured_by_language_script_and_task(models, tmp_path, capsys):
    """Beside sums made here. A model against itself loses nothing."""
    out = quantize_folder(models / "tied", tmp_path / "q", "w4", progress=False)
    data, figures = models / "held-out-sft.jsonl", tmp_path / "f.json"
    words = "--against", models / "tied", "--data", data, "--max-new-tokens", 4
    printed = evaluated(capsys, "--model", out, *words, "--out", figures)
    by = json.loads(figures.read_text())["by"]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert by["language"].keys() == {row["language"] for row in rows}
    assert by["task"].keys() == {row["task"] for row in rows} and "Latin" in by["script"]
    assert by["overall"]["overall"]["texts"] == by["overall"]["overall"]["answers"] == len(rows)
    code = rows[0]["language"]
    examples = [e for e in load_examples([str(data)], tokenizer(), 512) if e.language == code]
    sums = []
    for folder in (out, models / "tied"):
        model, _ = weights.load(folder, packed=True)
        logps = [model(torch.tensor(e.ids)[None].long())[0].log_softmax(-1)[:-1].gather(
            1, torch.tensor(e.ids)[1:, None].long())[torch.tensor(e.mask)[1:]].sum().item() for e in examples]
        sums.append(sum(logps))
    found = by["language"][code]
    assert math.isclose(found["change"], 100 * (sums[0] - sums[1]) / -sums[1], rel_tol=1e-3)
    tokens = sum(int(e.mask.sum()) for e in examples)
    assert math.isclose(found["nats_per_token"], sums[0] / tokens, rel_tol=1e-4)
    assert f"language {code}" in printed and "change %" in printed
    evaluated(capsys, "--model", models / "tied", *words, "--out", tmp_path / "same.json")
    same = json.loads((tmp_path / "same.json").read_text())["by"]["overall"]["overall"]
    assert same["change"] == 0 and same["same"] == 100 and same["grade"] == same["grade_against"]


def test_a_group_s_figures_worked_by_hand():
    row = {"language": "en", "task": "sum", "args": ["one", "two"], "prompt": "?"}
    right, wrong = ({**row, "completion": gold_answer(row)}, {**row, "completion": "xyzzy"})
    right, wrong = ({**each, "grade": evaluate_quantized.graded(each)} for each in (right, wrong))
    found = evaluate_quantized.figures([{"where": "a"}, {"where": "b"}],
                                       [(right, right), (wrong, right)],
                                       ({"a": (2, -3.0), "b": (4, -9.0)}, {"a": (2, -2.0), "b": (4, -8.0)}))
    assert found["texts"] == 2 and found["nats_per_token"] == -2 and found["change"] == -20
    assert found["same"] == 50 and found["grade"] == 1.5 and found["grade_against"] == 3


def test_a_reward_model_grades_answers_in_place_of_the_oracle(models, tmp_path, capsys, monkeypatch):
    weights.save(tmp_path / "rm", reward_model(), tokenizer())
    reads = reward_model()
    reads.config.critiques = True
    weights.save(tmp_path / "reads", reads, tokenizer())
    words = ("--against", models / "tied", "--data", models / "sft.jsonl", "--max-new-tokens", 4)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="--judge .* trained with crit"):
        patched.setattr(evaluate_quantized, "measured", lambda *_: 1 / 0)       # before anything is answered
        evaluated(capsys, "--model", models / "tied", *words, "--judge", tmp_path / "reads")
    with pytest.raises(ValueError, match="is no reward model's folder; a language model judges by"):
        evaluated(capsys, "--model", models / "tied", *words, "--judge", models / "tied")
    evaluated(capsys, "--model", models / "tied", *words, "--judge", tmp_path / "rm", "--out", tmp_path / "r")
    rows = evaluate_quantized.measured(models / "tied", str(models / "sft.jsonl"), Reading(),
                                       torch.float32, 4)[1]
    scores = score_texts(reward_model(), tokenizer(), rows)
    found = json.loads((tmp_path / "r").read_text())["by"]["overall"]["overall"]
    assert found["grade"] == found["grade_against"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_evaluating_a_reward_model_or_another_tokenizer_is_refused(models, tmp_path):
    weights.save(tmp_path / "rm", reward_model(), tokenizer())
    with pytest.raises(ValueError, match="a reward model; give a language model of a decoder alone"):
        evaluate.main(["quantized", "--model", str(tmp_path / "rm"), "--against", str(models / "tied"),
                       "--data", str(models / "prompts.jsonl")])


# ---- other programs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme", ["w8", "w8a8", "w4", "w4-g32", "w4-g128"])
@pytest.mark.parametrize("name", ["tied", "qwen"])
@torch.no_grad()
def test_transformers_with_compressed_tensors_computes_our_logits(scheme, name, models, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    for more in ({}, {"head": True}) if scheme != "w8a8" else ({},):
        out = quantize_folder(models / name, tmp_path / f"q{len(more)}", scheme, progress=False, **more)
        their = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            logits, ours = their(IDS).logits, weights.load(out, packed=True)[0](IDS)
        if scheme == "w8a8":    # inputs that differ in their last bit may round to the next code
            assert torch.isclose(ours, logits, atol=5e-5, rtol=1e-4).float().mean() > 0.8
            model, _ = weights.load(out, packed=True)
            for at, module in model.packed.items():
                x = normal(1, 5, module.shape[1])       # tokens of a row
                torch.testing.assert_close(their.get_submodule(at)(x), module(x), atol=5e-5, rtol=1e-4)
            continue
        torch.testing.assert_close(ours, logits, atol=5e-5, rtol=1e-4)


def test_transformers_with_bitsandbytes_reads_our_weights(models, tmp_path):
    """NF4: the same numbers. 8 bits: its inputs are fp16 there, so that some round to the next code."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for scheme in ("nf4", "llm-int8"):
        out = quantize_folder(models / "tied", tmp_path / scheme, scheme, progress=False)
        their = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        model, _ = weights.load(out, packed=True)
        for name, module in model.packed.items():
            other, x = their.get_submodule(name), normal(5, module.shape[1]).half().float()
            if scheme == "nf4":
                found = bitsandbytes.functional.dequantize_4bit(other.weight.data, other.weight.quant_state)
                assert torch.equal(found, module.weight)
            else:
                with torch.no_grad():
                    torch.testing.assert_close(other(x), module(x), atol=0.05, rtol=0.01)
