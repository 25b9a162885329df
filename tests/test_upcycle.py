"""merge_upcycle.py and merge_embed.py: dense models made into a mixture of experts, and one that grows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROOT, language_model, reward_model, run, tokenizer, write_world
from test_families import SMALL, small
from test_merge_command import peak

from aya_min import merge_folders, weights
from aya_min.command import guarded
from aya_min.files import write_json, write_jsonl
from aya_min.merge_embed import EMBEDDER, embed, embedder_of, read_domains
from aya_min.merge_fitness import of_models
from aya_min.merge_upcycle import KINDS, extend, upcycle
from aya_min.sampling import generate
from aya_min.tokenizer import train_tokenizer
from merge import main

NAMES = ["law", "code", "maths"]
VECTORS = {name: [1.0 * i, -0.5, 0.25 * i] for i, name in enumerate([*NAMES, "art"], 1)}
MLPS = ("gate_proj", "up_proj", "down_proj")


def published(folder, seed, dtype=torch.float32, **changes):
    weights.save(folder, language_model(seed, **changes), tokenizer(), dtype)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """{name: folder} of three models, the seed, and a new one."""
    place = tmp_path_factory.mktemp("dense")
    return {name: published(place / name, i) for i, name in enumerate([*NAMES, "seed", "art"])}


@pytest.fixture(scope="module")
def mixtures(dense, tmp_path_factory):
    """{kind: folder}"""
    place = tmp_path_factory.mktemp("mixtures")
    return {kind: made(dense, place / kind, kind) for kind in KINDS}


def made(dense, out, kind, **more):
    if kind == "nexus":
        more = {"domains": VECTORS} | more
    return upcycle({name: dense[name] for name in NAMES}, dense["seed"], out, kind, **more)


def state_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def logits(folder_or_model):
    model = weights.load(folder_or_model)[0] if isinstance(folder_or_model, Path) else folder_or_model
    with torch.no_grad():
        return model(torch.arange(5, 29).view(2, 12))


# ---- upcycle -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_models_the_seeds_or_a_mean_as_the_papers_say(dense, mixtures, kind):
    state, models = state_of(mixtures[kind]), {name: state_of(folder) for name, folder in dense.items()}
    experts = NAMES + ["seed"] * (kind in ("btx", "bam"))
    stacked = ["mlp."] + ["self_attn."] * (kind == "bam")
    left = dict(state)
    for name, of_seed in models["seed"].items():
        values = [models[expert][name] for expert in experts]
        if ".mlp." in name:
            torch.testing.assert_close(left.pop(name.replace("mlp.", "mlp.experts.")), torch.stack(values),
                                       rtol=0, atol=0)
            if kind in ("nexus", "linear"):
                assert torch.equal(left.pop(name.replace("mlp.", "mlp.shared.")), of_seed)
        elif any(f".{part}" in name for part in stacked):
            assert torch.equal(left.pop(name), torch.stack(values))
        else:
            torch.testing.assert_close(left.pop(name), sum(values) / len(values))
    if kind == "nexus":
        assert left.pop("model.domains").tolist() == [VECTORS[name] for name in NAMES]
    assert left and all(".router." in name for name in left)
    assert all(value.std() > 0.1 for value in left.values())                # initializer_range is 0.2
    config = json.loads((mixtures[kind] / "config.json").read_text())
    assert config["mixture"]["experts"] == experts and config["model_type"] == "mixture_of_cohere"


def test_shared_keys_and_values_are_the_mean_and_queries_and_outputs_the_models(dense, tmp_path):
    state = state_of(made(dense, tmp_path / "out", "bam", kv="shared"))
    models = [state_of(dense[name]) for name in (*NAMES, "seed")]
    for kind in "kvqo":
        name = f"model.layers.1.self_attn.{kind}_proj.weight"
        values = torch.stack([model[name] for model in models])
        torch.testing.assert_close(state[name], values.mean(0) if kind in "kv" else values)


def test_routers_depend_on_the_seed_alone(dense, mixtures, tmp_path):
    again, other = made(dense, tmp_path / "again", "nexus"), made(dense, tmp_path / "other", "nexus", seed=1)
    for name in ("config.json", "model.safetensors", "merge.json"):
        assert (again / name).read_bytes() == (mixtures["nexus"] / name).read_bytes()
    first, second = state_of(again), state_of(other)
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    assert differ and all(".router." in name for name in differ)


OTHERS = {"cohere": {}, "cohere2": dict(model_type="cohere2", sliding_window=4, num_hidden_layers=4)}


@pytest.mark.parametrize("family", [*OTHERS, *SMALL])
def test_of_copies_of_one_model_of_any_family_the_mixture_computes_what_the_gates_say(family, tmp_path):
    """Where all experts are used their gates add up to 1: bam and btx are the dense model, and with the
    shared MLP beside them it counts twice, as if down_proj were doubled."""
    model, own = small(family) if family in SMALL else (language_model(**OTHERS[family]), tokenizer())
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight, std=0.3)
    if model.config.family.qkv_bias:
        torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.bias)
    weights.save(tmp_path / "one", model, own)
    copies = dict.fromkeys(NAMES, tmp_path / "one")
    expected = logits(model)
    for kind, more in (("btx", {}), ("bam", dict(kv="own")), ("bam", dict(kv="shared"))):
        out = upcycle(copies, tmp_path / "one", tmp_path / f"{kind}{more}", kind, top_k=4, **more)
        torch.testing.assert_close(logits(out), expected, atol=2e-5, rtol=2e-5)
    for block in model.model.layers:
        block.mlp.down_proj.weight.data *= 2
    doubled = logits(model)
    # gemma's norm after the MLP undoes the doubling
    assert family.startswith("gemma") or not torch.allclose(doubled, expected, atol=1e-2)
    for kind, more in (("linear", {}), ("nexus", dict(domains=VECTORS))):
        out = upcycle(copies, tmp_path / "one", tmp_path / kind, kind, top_k=3, **more)
        torch.testing.assert_close(logits(out), doubled, atol=2e-5, rtol=2e-5)


def test_the_text_part_of_models_that_see_images_becomes_a_mixture_of_text_alone(tmp_path):
    model, own = small("gemma3")
    weights.save(tmp_path / "text", model, own)
    shutil.copytree(tmp_path / "text", tmp_path / "images")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    del config["architectures"]
    write_json(tmp_path / "images" / "config.json", {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config})
    state = {name.replace("model.", "model.language_model.", 1): tensor
             for name, tensor in state_of(tmp_path / "text").items()}
    save_file(state | {"vision_tower.x": torch.ones(2)}, tmp_path / "images" / "model.safetensors")
    both = [upcycle({"a": tmp_path / kind}, tmp_path / kind, tmp_path / f"of-{kind}", "bam")
            for kind in ("text", "images")]
    assert torch.equal(logits(both[0]), logits(both[1]))


def test_what_models_may_differ_in_is_named_and_the_seeds_is_taken(dense, tmp_path, capsys):
    other = published(tmp_path / "other", 0, eos_token_id=8)
    out = upcycle({"other": other}, dense["seed"], tmp_path / "out", "btx")
    assert f"{other} differs from {dense['seed']} in eos_token_id of config.json" in capsys.readouterr().err
    assert weights.load(out)[0].config.eos_token_id == tokenizer().end_of_turn_id != 8


def test_the_folder_is_whole_and_says_what_it_was_made_of(dense, mixtures, tmp_path):
    out = mixtures["bam"]
    about = json.loads((out / "merge.json").read_text())
    assert about["upcycle"]["kind"] == "bam" and about["upcycle"]["experts"]["law"] == str(dense["law"])
    assert [each["folder"] for each in about["inputs"]] == [str(dense[n]) for n in ("seed", *NAMES)]
    assert about["inputs"][0]["sha256"] == embedder_of(dense["seed"])["sha256"]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (dense["seed"] / name).read_bytes()
    model, its_tokenizer = weights.load(out)
    weights.save(tmp_path / "again", model, its_tokenizer)
    again = state_of(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in state_of(out).items())
    ((answer,),) = generate(model, [its_tokenizer.encode("a b")], max_new_tokens=4, temperature=0.0)
    assert answer.ids[0] == model(torch.tensor([its_tokenizer.encode("a b")]))[0, -1].argmax()


@pytest.mark.parametrize("given, dtype", [(None, torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_is_the_seeds_or_the_one_that_is_given(given, dtype, tmp_path):
    one, two = (published(tmp_path / name, i, torch.bfloat16) for i, name in enumerate(("one", "two")))
    state = state_of(upcycle({"two": two}, one, tmp_path / "out", "nexus", domains={"two": [1.0]},
                             dtype=given))
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    said = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
    assert said == str(dtype).removeprefix("torch.")
    weights.load(tmp_path / "out")


def test_sft_trains_the_result_and_its_domains_and_what_embedded_them_stay(dense, tmp_path):
    embedder = {"model": "M", "sha256": {"model.safetensors": "0"}}
    out = made(dense, tmp_path / "out", "nexus", embedder=embedder)
    trained = run("sft", write_world(tmp_path), tmp_path / "run", start=out, max_steps=1) / "model"
    before, after = state_of(out), state_of(trained)
    assert torch.equal(before.pop("model.domains"), after["model.domains"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.layers.1.mlp.router.w1.weight", "model.layers.1.mlp.experts.up_proj.weight"} <= moved
    assert json.loads((trained / EMBEDDER).read_text()) == embedder


def test_the_commands_of_the_readme_for_mixtures_work_as_pasted(dense, tmp_path, monkeypatch):
    """embed was given preference pairs, which it refuses."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    starts = tuple(f"python merge.py {name} " for name in ("embed", "upcycle", "extend"))
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith(starts)]
    world = tmp_path / "runs" / "world"
    world.mkdir(parents=True)
    write_jsonl(write_world(world) / "text.jsonl", [{"text": "a b"}])
    for run_folder, name in (("my-base", "seed"), ("my-sft", "law"), ("my-dpo", "code")):
        shutil.copytree(dense[name], tmp_path / "runs" / run_folder / "model")
    monkeypatch.chdir(tmp_path)
    assert [words[0] for words in commands] == ["embed", "upcycle"]
    assert all(main(words) == 0 for words in commands)


# ---- extend ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_mixture_is_the_old_one_with_an_expert_and_a_blend_by_1_over_n_plus_1(
        dense, mixtures, kind, tmp_path):
    vector = {"vector": VECTORS["art"]} if kind == "nexus" else {}
    out = extend(mixtures[kind], dense["art"], tmp_path / "out", "art", **vector)
    before, after, new = state_of(mixtures[kind]), state_of(out), state_of(dense["art"])
    model, _ = weights.load(out)
    n = len(model.config.mixture.experts) - 1
    assert model.config.mixture.experts[-1] == "art" and n == (4 if kind in ("btx", "bam") else 3)
    assert before.keys() == after.keys()
    for name, value in after.items():
        old, fresh = before[name], new.get(name.replace("mlp.experts.", "mlp."))
        if name == "model.domains":
            assert value.tolist() == [*old.tolist(), VECTORS["art"]]
        elif name.endswith("router.weight"):                                # drawn anew
            assert len(value) == n + 1 and not torch.equal(value[:n], old)
        elif ".router." in name or ".shared." in name:
            assert torch.equal(value, old)
        elif value.dim() == 3:
            assert torch.equal(value[:n], old) and torch.equal(value[n], fresh)
        else:
            torch.testing.assert_close(value, n / (n + 1) * old + fresh / (n + 1))
    assert logits(out).isfinite().all()


def test_the_new_domain_is_embedded_by_the_model_that_embedded_the_others(dense, tmp_path, capsys):
    rows = write_world(tmp_path) / "sft.jsonl"
    data = [f"law={rows}", f"art={tmp_path / 'held-out-sft.jsonl'}"]
    moved = shutil.copytree(dense["seed"], tmp_path / "moved")
    assert main(["embed", "--model", str(moved), "--data", *data, "--out", str(tmp_path / "E.json")]) == 0
    vectors, embedder = read_domains(tmp_path / "E.json")
    assert embedder["model"] == str(moved)
    words = ["--seed-model", dense["seed"], "--kind", "nexus", "--domains", tmp_path / "E.json", "--out"]
    assert main(list(map(str, ["upcycle", dense["law"], *words, tmp_path / "moe"]))) == 0
    words = ["extend", tmp_path / "moe", dense["art"], "--domain", data[1], "--out"]
    assert main(list(map(str, [*words, tmp_path / "grown"]))) == 0
    expected = torch.tensor([vectors["law"], vectors["art"]])
    torch.testing.assert_close(state_of(tmp_path / "grown")["model.domains"], expected)
    moved.rename(tmp_path / "elsewhere")
    line = refused(capsys, *words, tmp_path / "again")
    assert "moved, which embedded the domains of" in line and "--model" in line
    assert "were embedded by" in refused(capsys, *words, tmp_path / "again", "--model", dense["law"])
    write_json(tmp_path / "F.json", {"domains": {"art": vectors["art"]}, **embedder_of(dense["law"])})
    assert "were embedded by" in refused(capsys, *words[:3], "--domains", tmp_path / "F.json", "--out",
                                         tmp_path / "again")
    again = list(map(str, [*words, tmp_path / "again", "--model", tmp_path / "elsewhere"]))
    assert main(again) == 0
    (tmp_path / "moe" / EMBEDDER).unlink()
    assert "does not say which model embedded its domains" in refused(capsys, *words, tmp_path / "third")


# ---- embed -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded, as on a GPU"])
def test_an_embedding_is_the_mean_over_texts_of_the_mean_over_their_tokens(
        dense, tmp_path, packing, monkeypatch):
    texts = ["a", "what is the capital of France", "a b"]
    write_jsonl(tmp_path / "F.jsonl", [{"text": text} for text in texts])
    model, own = weights.load(dense["law"])
    begin = [] if own.bos_id is None else [own.bos_id]
    means = [model.model(torch.tensor([begin + own.encode(text) + [own.end_of_turn_id]]))[0].mean(0)
             for text in texts]
    model.model.packing = packing
    monkeypatch.setattr(weights, "load", lambda *_: (model, own))
    for batch_size in (1, 3):
        found = embed(dense["law"], {"x": tmp_path / "F.jsonl"}, batch_size=batch_size)["x"]
        torch.testing.assert_close(torch.tensor(found), sum(means) / 3, atol=1e-5, rtol=1e-5)


# ---- merges of mixtures ------------------------------------------------------------------------------------

def test_mixtures_of_one_shape_merge_and_keep_their_domains_bit_for_bit(dense, tmp_path):
    vectors = {name: [0.1, 0.7 / i, 1e-3] for i, name in enumerate(NAMES, 1)}
    pair = [made(dense, tmp_path / str(i), "nexus", seed=i, domains=vectors) for i in (1, 2)]
    one, two = map(state_of, pair)
    out = merge_folders.merge_folders(pair, tmp_path / "out", "linear", weights=[0.3, 0.4], dtype="bfloat16",
                                      progress=False)
    merged = state_of(out)
    assert torch.equal(merged["model.domains"], one["model.domains"])
    router = "model.layers.0.mlp.router.w1.weight"
    torch.testing.assert_close(merged[router], ((0.3 * one[router] + 0.4 * two[router]) / 0.7).bfloat16())
    rows = {row["what"]: row for row in merge_folders.compare_folders(*pair)}
    assert rows["model.embed_tokens.weight"]["distance"] == 0 < rows[router]["distance"]
    assert "model.domains" not in rows

    def measure(model, tokenizer, split):
        return {name: value.clone() for name, value in model.state_dict().items()}
    found = of_models(pair, measure, "bfloat16")([0.3, 0.4], "fitness")
    assert all(torch.equal(found[name], value.float()) for name, value in merged.items())


@pytest.mark.parametrize("method", ["linear", "diff"])
def test_a_merge_of_mixtures_names_other_experts_other_domains_and_a_dense_model(
        dense, mixtures, method, tmp_path, capsys):
    out = [] if method == "diff" else ["--out", tmp_path / "out", "--allow-config-differences"]

    def line(*folders):
        return refused(capsys, method, *folders, *out)
    assert "bam is a mixture of ['law', 'code', 'maths', 'seed']" in line(mixtures["nexus"], mixtures["bam"])
    assert f"{dense['law']} a dense model" in line(dense["law"], mixtures["btx"])
    other = made(dense, tmp_path / "other", "nexus", domains=VECTORS | {"code": [0.0, 0.0, 1.0]})
    assert "model.domains is F32, has no average, and differs" in line(mixtures["nexus"], other)
    renamed = upcycle({"law": dense["law"], "code": dense["code"], "tax": dense["maths"]}, dense["seed"],
                      tmp_path / "renamed", "btx")
    assert "'tax'" in line(mixtures["btx"], renamed)


def test_mixtures_with_another_top_k_or_other_experts_late_in_a_long_list_do_not_merge(
        dense, mixtures, tmp_path, capsys):
    """top_k was taken for the setting of sampling, which merges ignore, and experts were compared by the 80
    characters that a message shows."""
    copies, words = {}, ["--out", tmp_path / "out"]
    long = ["x" * 40 + letter for letter in "abc"]
    for name, changes in (("top_k", {"top_k": 2}), ("one", {"experts": [*long, "d"]}),
                          ("two", {"experts": [*long, "e"]})):
        copies[name] = shutil.copytree(mixtures["btx"], tmp_path / name)
        config = json.loads((copies[name] / "config.json").read_text())
        write_json(copies[name] / "config.json", config | {"mixture": config["mixture"] | changes})
    assert "mixture.top_k is 2, in" in refused(capsys, "linear", mixtures["btx"], copies["top_k"], *words)
    line = refused(capsys, "linear", copies["one"], copies["two"], *words, "--allow-config-differences")
    assert "is a mixture of" in line and not (tmp_path / "out").exists()


# ---- bad input ---------------------------------------------------------------------------------------------

def refused(capsys, *words):
    """The one line with which merge.py ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        guarded(lambda: main(list(map(str, words))), "merge.py")
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def says(dense, tmp_path, capsys):
    """says(text, experts, flag=value, ...): what the line of a refused upcycle holds; nothing is left."""
    def line(text, experts=NAMES, kind="btx", **flags):
        flags = {"seed_model": dense["seed"], "kind": kind, "out": tmp_path / "out"} | flags
        words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
        before = sorted(tmp_path.rglob("*"))
        assert text in refused(capsys, "upcycle", *(dense.get(name, name) for name in experts), *words)
        assert sorted(tmp_path.rglob("*")) == before
    return line


def test_models_that_do_not_fit_together_are_refused(says, dense, mixtures, tmp_path):
    says("hidden_size is 48, in", ["law", published(tmp_path / "wide", 0, hidden_size=48, eos_token_id=8)])
    says("rope_theta is 7.0, in", ["law", published(tmp_path / "rope", 0, rope_theta=7.0)])
    weights.save(tmp_path / "reward", reward_model(), tokenizer())
    says("is a reward model", ["law", tmp_path / "reward"])
    other = language_model(vocab_size=400)
    weights.save(tmp_path / "words", other, train_tokenizer(["other words than those"] * 40, 400))
    says("tokenizer.json is not that of", ["law", tmp_path / "words"])
    says("is a mixture of experts already", ["law", mixtures["btx"]])
    says("is a mixture of experts already", ["law"], seed_model=mixtures["btx"])
    says("no config.json", ["law", tmp_path / "nowhere"])


def test_names_and_numbers_without_a_meaning_are_refused(says, dense, mixtures, tmp_path):
    says("law is given twice", ["law", f"law={dense['code']}"])
    says("an expert is named seed", ["law", f"seed={dense['code']}"])
    says("top_k 5 must be", top_k=5)
    says("attention_top_k 9 must be", kind="bam", attention_top_k=9)
    says("attention_top_k 1 goes with attention", attention_top_k=1)
    says("--kv shared goes with kind bam, not btx", kv="shared")
    says("exists already", out=mixtures["btx"])
    state = state_of(dense["law"])
    shutil.copytree(dense["law"], tmp_path / "nan")
    state["model.norm.weight"] /= 0
    save_file(state, tmp_path / "nan" / "model.safetensors")
    says("holds NaN or infinite values", ["law", tmp_path / "nan"])


def test_embeddings_that_do_not_fit_are_refused(says, tmp_path):
    file = tmp_path / "E.json"

    def domains(text, vectors, **more):
        file.write_text(vectors if isinstance(vectors, str) else json.dumps({"domains": vectors}))
        says(text, **{"kind": "nexus", "domains": file} | more)
    says("nexus needs the domains' embeddings", kind="nexus")
    domains("go with kind nexus, not linear", VECTORS, kind="linear")
    domains("domain code: an embedding of 2 numbers, where the others have 3", VECTORS | {"code": [1, 2]})
    domains("no embedding of the domain maths", {"law": [1.0], "code": [1.0]})
    domains("the key 'law' occurs twice", '{"domains": {"law": [1], "law": [1]}}')
    domains("domain law: [True] is not a list of finite numbers", VECTORS | {"law": [True]})
    domains("domain law: [] is not", VECTORS | {"law": []})
    # The mixture's logits were NaN, and of experts with equal scores only the first was ever chosen.
    domains("is not a list of finite numbers of at most 1e6", VECTORS | {"law": [1e30, 0, 0]})
    domains("domain code: an embedding of zeros", VECTORS | {"code": [0, 0.0, 0]})
    domains("the domains law and code have the same embedding", VECTORS | {"code": VECTORS["law"]})
    domains('no "domains" in it', "{}")
    # It was written as infinity.
    domains("model.domains, as torch.float16, holds NaN or infinite", VECTORS | {"law": [1e6, 0, 0]},
            dtype="float16")


def test_an_expert_may_stand_in_a_folder_whose_path_has_an_equals_sign(dense, tmp_path):
    """The part of the path before the sign was taken for the expert's name."""
    place = shutil.copytree(dense["law"], tmp_path / "lr=1" / "law")
    words = ["upcycle", place, f"code={place}", "--seed-model", dense["seed"], "--kind", "linear", "--out"]
    assert main(list(map(str, [*words, tmp_path / "out"]))) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mixture"]["experts"] == ["law", "code"]


def test_a_mixture_that_cannot_grow_is_refused(dense, mixtures, tmp_path, capsys):
    def line(*words, out=tmp_path / "out"):
        found = refused(capsys, "extend", *words, "--out", out)
        assert not (tmp_path / "out").exists()
        return found
    write_json(tmp_path / "E.json", {"domains": {"art": [1.0, 2.0]}})
    rows = write_world(tmp_path) / "sft.jsonl"
    nexus, btx, art = mixtures["nexus"], mixtures["btx"], dense["art"]
    assert "is nexus, which needs an embedding" in line(nexus, art)
    short = "--domains", tmp_path / "E.json"
    assert "an embedding of 2 numbers, where the others have 3" in line(nexus, art, *short)
    assert "no embedding of the domain tax" in line(nexus, f"tax={art}", *short)
    texts = "--domain", f"art={rows}"
    assert "takes no embedding" in line(btx, art, *texts)
    assert "the new expert is named tax, --domain is of art" in line(btx, f"tax={art}", *texts)
    assert "has an expert named law already" in line(btx, dense["law"])
    assert "is a dense model; give a mixture" in line(dense["law"], art)
    assert "is a mixture of experts already" in line(btx, f"new={btx}")
    assert "exists already" in line(btx, art, out=btx)
    assert "hidden_size is 48, in" in line(btx, published(tmp_path / "wide", 0, hidden_size=48))
    write_json(tmp_path / "F.json", {"domains": {"art": VECTORS["law"]}})
    assert "the domains law and art have the same" in line(nexus, art, "--domains", tmp_path / "F.json")
    assert "--domain NAME=F.jsonl" in line(nexus, art, *short, "--columns", "prompt=question")


def test_domains_that_are_not_finite_are_named_by_folder(dense, mixtures, tmp_path, capsys):
    """A merge copied them, extend spoke of a flag that it does not have, and sft of its learning rate."""
    state = state_of(mixtures["nexus"])
    broken = shutil.copytree(mixtures["nexus"], tmp_path / "broken")
    state["model.domains"][1, 2] = float("inf")
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    out = ["--out", tmp_path / "out"]
    write_json(tmp_path / "E.json", {"domains": VECTORS})
    words = ["extend", broken, dense["art"], "--domains", tmp_path / "E.json"]
    assert f"{broken}: model.domains holds NaN" in refused(capsys, *words, *out)
    assert f"model.domains in {broken}" in refused(capsys, "linear", broken, broken, *out)
    with pytest.raises(ValueError, match="model.domains is not finite"):
        run("sft", write_world(tmp_path), tmp_path / "run", start=broken, max_steps=1)


def test_the_texts_of_a_new_domain_are_read_under_other_names_of_keys_too(dense, tmp_path):
    """A row with other keys was refused with the advice to give --columns, which extend did not have."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "grown"
    write_jsonl(rows, [{"question": "a b", "answer": "c"}])
    write_json(tmp_path / "E.json", {"domains": {"law": [0.1] * 32}, **embedder_of(dense["seed"])})
    moe = ["upcycle", dense["law"], "--seed-model", dense["seed"], "--kind", "nexus", "--domains",
           tmp_path / "E.json", "--out", tmp_path / "moe"]
    assert main(list(map(str, moe))) == 0
    moe = ["extend", tmp_path / "moe", dense["art"], "--domain", f"art={rows}", "--model",
           dense["seed"], "--columns", "prompt=question", "completion=answer", "--out", out]
    assert main(list(map(str, moe))) == 0 and len(state_of(out)["model.domains"]) == 2


def test_a_mixture_of_mergekits_is_refused_by_the_name_of_its_class(says, dense, tmp_path):
    """mergekit writes a mixture of Llama or Mistral models as a Mixtral: other names for the tensors, and
    gates that are normalised again."""
    folder = shutil.copytree(dense["law"], tmp_path / "mixtral")
    write_json(folder / "config.json", {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
                                        "num_local_experts": 4, "num_experts_per_tok": 2})
    says("architecture 'MixtralForCausalLM' is not supported", ["law", folder])
    with pytest.raises(ValueError, match="architecture 'MixtralForCausalLM' is not supported"):
        weights.load(folder)


# ---- memory ------------------------------------------------------------------------------------------------

@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_experts(tmp_path):
    """One MLP matrix of an expert is 67 MB in fp32, the mixture of three models and their seed 0.8 GB."""
    sizes = dict(hidden_size=1024, intermediate_size=16384, num_hidden_layers=1, num_attention_heads=8,
                 num_key_value_heads=8)
    folders = [published(tmp_path / name, i, **sizes) for i, name in enumerate(NAMES)]
    words = ["--seed-model", folders[0], "--kind", "bam"]
    few = ["upcycle", folders[0], *words, "--out", tmp_path / "few"]
    many = ["upcycle", *folders, *words, "--out", tmp_path / "many"]
    imports, of_few, of_many = peak([]), peak([few]), peak([many])
    assert (tmp_path / "many" / "model.safetensors").stat().st_size > 800e6
    assert of_many - imports < 400e6 and of_many - of_few < 60e6, (imports, of_few, of_many)
