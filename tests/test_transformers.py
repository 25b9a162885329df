"""What we publish means the same in transformers 5: ids, rendered conversations, stop ids, logits and scores.

Nothing here runs without transformers, which is no dependency. test_tokenizer.py and test_golden.py hold
recorded values of it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import language_model, reward_model
from test_tokenizer import AYA, COMMAND_A, COMMAND_R7B, FOLLOWED, TINY_AYA, publish, turns

from aya_min import weights
from aya_min.reward import score_texts
from aya_min.sampling import generate
from aya_min.merge_folders import merge_folders
from aya_min.tokenizer import RESPONSE_TEMPLATE, load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed; only these "
    "comparisons need it")

WORDS = Path(__file__).parent.parent / "aya_min" / "words"
TEXTS = ["画像が、訪問した", "国連に対し、東京タワーへ行きます", "中国は大きい国です 2024", "我爱中国。漢字とかな", "naïve Việt 12345", " पानी और चाय\n",
    "a  b\n\n\nc",
         "<|endoftext|> is no token here", "שלום עולם 🙂👩‍🚀", "x" * 50]


def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def ids_of(their, messages, prompt=False):
    made = their.apply_chat_template(messages, add_generation_prompt=prompt)
    return made if isinstance(made, list) else made["input_ids"]


def assert_same_tokenizer(folder):
    """Plain texts, and conversations of all shapes, have our ids there."""
    own, their = load_tokenizer(folder), theirs(folder)
    for text in TEXTS:
        assert own.encode(text) == their(text, add_special_tokens=False)["input_ids"], text
        assert own.decode(own.encode(text)) == their.decode(own.encode(text), skip_special_tokens=True)
    for i, text in enumerate(TEXTS):
        for system in (None, "Be kind. 国", TEXTS[i - 1]):
            for said in ([text], [text, TEXTS[i - 1], TEXTS[i - 2]], [text, TEXTS[i - 1]]):
                messages = turns(*said, system=system)
                for prompt in (False, True):
                    assert own.encode_chat(messages, prompt)[0] == ids_of(their, messages, prompt)


def assert_same_model(folder):
    """Logits, stop ids and greedy answers are ours there."""
    model, own = weights.load(folder)
    their, other = theirs(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = own.encode_prompt(TEXTS[0])
    with torch.no_grad():
        torch.testing.assert_close(other(torch.tensor([ids])).logits, model(torch.tensor([ids])), atol=2e-5,
            rtol=1e-5)
    stops = other.generation_config.eos_token_id
    assert own.stop_ids == sorted(stops if isinstance(stops, list) else [stops])
    [[answer]] = generate(model, [ids], max_new_tokens=12, temperature=0, stop_ids=own.stop_ids)
    made = other.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):].tolist()
    assert answer.ids == made and own.decode(answer.ids) == their.decode(made, skip_special_tokens=True)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of ours that knows Han characters and merges around them, so that where text is cut
    shows."""
    text = [path.read_text(encoding="utf-8") for path in sorted(WORDS.glob("*.json"))] + TEXTS * 20
    # the last byte of 像 and 問, and merges on
    text += [kana + end for kana in "くハ" for end in "のがして"] * 100
    return train_tokenizer(text, 2000)


def save(folder, words, make=language_model, **changes):
    weights.save(folder, make(vocab_size=words.vocab_size, eos_token_id=words.end_of_turn_id, **changes),
        words)
    return folder


# ---- what we train and publish -----------------------------------------------------------------------------

def test_a_tokenizer_trained_here_and_its_model_are_the_same_in_transformers(words, tmp_path):
    """transformers rebuilt it as Cohere's, without our cut at Han characters: 117 of 698 Japanese sentences
    had other ids."""
    folder = save(tmp_path / "model", words)
    assert_same_tokenizer(folder)
    assert_same_model(folder)
    assert type(theirs(folder)).__name__ == "TokenizersBackend"


def test_one_loaded_and_saved_again_is_the_same_and_so_are_its_merge_and_its_parts_in_bfloat16(words,
        tmp_path):
    first, second = save(tmp_path / "a", words), save(tmp_path / "b", words, seed=5)
    model, own = weights.load(first)
    weights.save(tmp_path / "again", model, own)
    merge_folders([first, second], tmp_path / "merged", "linear", progress=False)
    weights.save(tmp_path / "shards", model, own, shard_bytes=20_000)
    for name in ("again", "merged", "shards"):
        assert_same_tokenizer(tmp_path / name)
        assert_same_model(tmp_path / name)


def test_an_older_folder_of_ours_that_calls_itself_coheres_is_put_right_when_it_is_saved_again(words,
        tmp_path):
    old = save(tmp_path / "old", words)
    about = json.loads((old / "tokenizer_config.json").read_text(encoding="utf-8"))
    about |= {"tokenizer_class": "CohereTokenizerFast", "legacy": True, "use_default_system_prompt": False}
    (old / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    as_it_was, own = theirs(old), load_tokenizer(old)
    assert any(as_it_was(text, add_special_tokens=False)["input_ids"] != own.encode(text) for text in TEXTS)
    weights.save(tmp_path / "new", *weights.load(old))
    assert_same_tokenizer(tmp_path / "new")
    assert_same_model(tmp_path / "new")


def test_a_conversation_has_one_bos_there_and_plain_text_has_one_too(words, tmp_path):
    their = theirs(save(tmp_path / "model", words))
    assert ids_of(their, turns("hi", "ho")).count(words.bos_id) == 1
    assert their("hi")["input_ids"] == [words.bos_id, *words.encode("hi")]


def test_several_stop_ids_and_the_settings_of_generation_go_through_training_and_are_heeded_there(words,
        tmp_path):
    folder = save(tmp_path / "model", words)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 300], "temperature": 0.3, "top_p": 0.75,
        "do_sample": True, "pad_token_id": 0}))
    model, own = weights.load(folder)
    weights.save(tmp_path / "again", model, own)
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "again")
    assert (read.eos_token_id, read.temperature, read.top_p, read.do_sample) == ([7, 9, 300], 0.3, 0.75, True)
    assert own.stop_ids == [7, 9, 300]
    assert_same_model(tmp_path / "again")


@pytest.mark.parametrize("changes", [{}, {"model_type": "cohere2", "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"]}, {"logit_scale": 1}])
def test_a_reward_models_score_is_what_the_two_heads_say_of_the_language_model_that_transformers_loads(
        changes, words, tmp_path):
    """There is no such class there; config.json used to name one all the same."""
    folder = save(tmp_path / "rm", words, reward_model, **changes)
    assert "RewardModel" in json.loads((folder / "config.json").read_text())["architectures"][0]
    other, heads = transformers.AutoModelForCausalLM.from_pretrained(folder), load_file(folder / "model.safe"
        "tensors")
    row = {"prompt": "red?", "completion": TEXTS[1]}
    ids = torch.tensor([words.encode_chat(turns("red?", TEXTS[1]))[0]])
    answer = len(words.encode_prompt("red?"))
    with torch.no_grad():
        out = other(ids, output_hidden_states=True)
    logps = out.logits[0, answer - 1:-1].log_softmax(-1).gather(1, ids[0, answer:, None])[:, 0]
    score = out.hidden_states[-1][0,
        -1] @ heads["score.weight"][0] + heads["score_logps.weight"][0] @ torch.stack((logps.mean(),
        logps.min()))
    assert score_texts(weights.load(folder)[0], words, [row]) == pytest.approx([score.item()], abs=1e-4)


# ---- what others publish -----------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("template", [AYA, COMMAND_R7B, COMMAND_A, TINY_AYA], ids=["aya", "r7b", "a",
    "tiny-aya"])
def test_a_tokenizer_shaped_as_coheres_keeps_its_files_and_has_the_same_ids_there(template, where, tmp_path):
    publish(tmp_path / "model", template, where)
    (tmp_path / "again").mkdir()
    load_tokenizer(tmp_path / "model").save(tmp_path / "again")
    for name in ("model", "again"):
        assert_same_tokenizer(tmp_path / name)
    assert type(theirs(tmp_path / "again")).__name__ == "CohereTokenizer"


# nor is it Jinja
@pytest.mark.parametrize("name", FOLLOWED.keys() - {"a branch for tools that is not known here"})
def test_a_template_that_is_followed_has_the_same_ids_there(name, tmp_path):
    assert_same_tokenizer(publish(tmp_path / "model", FOLLOWED[name]))


@pytest.mark.parametrize("config", [
    {}, {"bos_token": {"__type": "AddedToken", "content": "<BOS_TOKEN>", "lstrip": False, "normalized": False,
                       "rstrip": False, "single_word": False}},
    {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<BOS_TOKEN>"}, {"bos_token": None},
    {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": None},
    {"tokenizer_class": "CohereTokenizerFast"},
    {"add_bos_token": False}, {"added_tokens_decoder": {"5": {
        "content": "<BOS_TOKEN>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        "special": True}}}], ids=lambda config: "-".join(config))
@pytest.mark.parametrize("map_of_tokens", [None, {"bos_token": "<BOS_TOKEN>"}])
def test_a_template_gets_the_same_special_tokens_there(config, map_of_tokens, tmp_path):
    folder = publish(tmp_path / "model", FOLLOWED["texts as they are"])
    (folder / "config.json").write_text('{"model_type": "cohere"}')
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if map_of_tokens:
        (folder / "special_tokens_map.json").write_text(json.dumps(map_of_tokens))
    (tmp_path / "again").mkdir()
    load_tokenizer(folder).save(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text('{"model_type": "cohere"}')
    assert_same_tokenizer(tmp_path / "again")
    # with that one alone, Cohere's class loses all other tokens
    if "added_tokens_decoder" not in config:
        assert_same_tokenizer(folder)


def test_the_tokens_that_are_supervised_are_those_between_the_generation_tags_there(words, tmp_path):
    folder = save(tmp_path / "model", words)
    for text in TEXTS:
        messages = turns(text, text + " ", text, f"\n{text}", system=text)
        made = theirs(folder).apply_chat_template(messages, return_dict=True,
            return_assistant_tokens_mask=True)
        ids, mask = words.encode_chat(messages)
        assert made["input_ids"] == ids and made["assistant_masks"] == [int(each) for each in mask]


def test_a_folder_without_a_template_gets_one_that_has_our_ids_there(tmp_path):
    (tmp_path / "again").mkdir()
    load_tokenizer(publish(tmp_path / "model")).save(tmp_path / "again")
    assert json.loads((tmp_path / "again" /
        "tokenizer_config.json").read_text())["chat_template"] == RESPONSE_TEMPLATE
    assert_same_tokenizer(tmp_path / "again")


def test_a_mixture_of_experts_is_refused_by_name_and_not_loaded_with_random_mlps(tmp_path):
    """By the seed's model_type it was loaded, with a warning."""
    model = language_model(mixture=dict(experts=["law", "code"]))
    tokenizer = train_tokenizer(TEXTS, 320)
    weights.save(tmp_path / "model", model, tokenizer)
    with pytest.raises(ValueError, match="mixture_of_cohere"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
