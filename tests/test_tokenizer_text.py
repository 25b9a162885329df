"""The tokenizer of an encoder-decoder: what it encodes, how a conversation becomes a text, folders."""

import json

import pytest
from small_t5 import tokenizer
from tokenizers import Tokenizer as Unigram, models

from aya_min.tokenizer_text import TextTokenizer, as_text, load_text_tokenizer, train_text_tokenizer


def turns(*texts, system=None):
    made = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return made if system is None else [{"role": "system", "content": system}, *made]


@pytest.mark.parametrize("messages, text", [
    (turns(" hi \n"), "hi"),
    (turns("hi", system="Be kind."), "Be kind.\n\nhi"),
    (turns("hi", system=" "), "hi"),
    (turns("a", "b", "c"), "User: a\nAssistant: b\nUser: c"),
    (turns("a", "b", " c", system="S"), "S\n\nUser: a\nAssistant: b\nUser: c")])
def test_a_conversation_becomes_a_text_by_the_rule(messages, text):
    assert as_text(messages) == text
    own = tokenizer()
    assert own.encode_chat(messages, generation_prompt=True) == (own.encode(text) + [1], [False] * (
        1 + len(own.encode(text))))


def test_an_answer_is_the_target_with_its_end():
    own = tokenizer()
    ids, mask = own.encode_chat(turns("a", "b c"))
    assert ids == own.encode("a") + [1] + own.encode("b c") + [1]
    assert mask == [False] * (1 + len(own.encode("a"))) + [True] * (1 + len(own.encode("b c")))


@pytest.mark.parametrize("text", [
    "two  spaces\n\nand lines\t1234", "日本語 🙂 𐍈", "शुभ नाम", "<0x41> ▁", "e\u0301"])
def test_any_text_comes_back_as_nfc(text):
    import unicodedata
    own, wanted = tokenizer(), unicodedata.normalize("NFC", text).replace("\u2581", " ").rstrip(" ")
    assert own.decode(own.encode(text)).rstrip(" ") == wanted
    assert "".join(own.stream(own.encode(text))).rstrip(" ") == wanted


def test_special_tokens_that_a_user_types_are_letters():
    own = tokenizer()
    for name in ("</s>", "<pad>", "<extra_id_0>", "<unk>", "<0x0A>"):
        ids = own.encode(f"a {name} b")
        assert not {0, 1, 2, *own.sentinels} & set(ids) and own.decode(ids) == f"a {name} b"
    assert own.spelled("see <extra_id_7>") == "<extra_id_7>" and own.spelled("a < b") is None


def test_sentinels_count_down_from_the_last_id():
    own = tokenizer()
    assert own.vocab_size == 700 and own.sentinels == list(range(699, 599, -1))
    assert (own.pad_id, own.end_of_turn_id, own.stop_ids) == (0, 1, [1])
    assert own.decode([0, 699, *own.encode("hi"), 1]) == "hi"


def test_a_saved_tokenizer_is_loaded_again(tmp_path):
    own = tokenizer()
    own.save(tmp_path)
    loaded = load_text_tokenizer(tmp_path)
    assert loaded.meaning == own.meaning and loaded.encode("hi </s>") == own.encode("hi </s>")
    first = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == first
    # other tools append the end by the file's post_processor
    assert Unigram.from_file(str(tmp_path / "tokenizer.json")).encode("hi").ids == own.encode("hi") + [1]


def test_a_folder_without_a_tokenizer_that_fits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json .*save_pretrained"):
        load_text_tokenizer(tmp_path)
    Unigram(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="is a BPE; an encoder-decoder has a Unigram"):
        load_text_tokenizer(tmp_path)
    Unigram(models.Unigram([("a", 0.0), ("b", -1.0)], 0)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no end token, </s>"):
        load_text_tokenizer(tmp_path)
    named = json.dumps({"eos_token": {"content": "b"}})
    (tmp_path / "tokenizer_config.json").write_text(named, encoding="utf-8")
    assert load_text_tokenizer(tmp_path).stop_ids == [1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match="eos_token cannot be a int"):
        load_text_tokenizer(tmp_path)


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 300 is too small: 359"):
        train_text_tokenizer(["a"], 300)


def test_two_trainings_have_the_same_pieces():
    texts = ["one two three", "two and four", "three and one"] * 3
    first, second = (train_text_tokenizer(texts, 400).bpe.get_vocab() for _ in range(2))
    assert first == second and isinstance(TextTokenizer(tokenizer().bpe), TextTokenizer)
