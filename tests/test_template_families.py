"""Turn formats of other families: ids and loss mask against templates rendered by jinja2."""

import random
from datetime import datetime

import pytest
from family_templates import FORMATS, source_of, tokenizer_of
from test_tokenizer import environment, supervised, turns
from tokenizers import Tokenizer as BPE

PIECES = ["a", "red", " ", "\n", "\t", "नमस्ते", "世界", "{{ x }}", "'", "12", "<", "\r\n", "\n\n"]
END = {"llama": "<|eot_id|>", "qwen ": "<|im_end|>", "gemma": "<end_of_turn>", "mistr": "</s>",
       "nemo": "</s>"}


def rendered(name):
    """A function (messages, generation prompt) -> the text of a format's template, by jinja2 as transformers
    sets it."""
    jinja2 = pytest.importorskip("jinja2")
    env, about = environment(jinja2), source_of(name)[1]

    def refuse(message):
        raise jinja2.TemplateError(message)
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    template = env.from_string(about["chat_template"])
    tokens = {key: value for key, value in about.items() if key.endswith("_token") and value}
    return lambda messages, prompt: template.render(messages=messages, add_generation_prompt=prompt,
                                                    tools=None, documents=None, **tokens)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_are_those_of_the_template_rendered_by_jinja_and_the_mask_holds_the_answers_and_their_ends(name):
    tokenizer, render, rng = tokenizer_of(name), rendered(name), random.Random(name)
    bpe, end = BPE.from_str(source_of(name)[0]), END[name[:5]]
    assert tokenizer.pad_id == bpe.token_to_id(FORMATS[name][1][-1])
    assert tokenizer.stop_ids == [bpe.token_to_id(end)] and tokenizer.ending == tokenizer.stop_ids
    for n in range(60):
        said = ["".join(rng.choices(PIECES, k=rng.randint(1, 9))) or "a" for _ in range(rng.randint(1, 7))]
        # Answers that begin with white space are encoded by themselves, unlike there.
        said = [text.lstrip() + "a" if i % 2 else text for i, text in enumerate(said)]
        system = None if tokenizer.turns.refuses else rng.choice([None, "Be kind.", "", " ", said[0]])
        messages, prompt = turns(*said, system=system), n % 2 == 0 and len(said) % 2 == 1
        text = render(messages, prompt)
        assert tokenizer.turns.written(messages, prompt) == text
        ids, mask = tokenizer.encode_chat(messages, prompt)
        assert ids == bpe.encode(text, add_special_tokens=False).ids
        assert supervised(ids, mask).count(tokenizer.stop_ids[0]) == len(said) // 2
        answers = bpe.decode(supervised(ids, mask), skip_special_tokens=False).split(end)[:-1]
        for answer, wanted in zip(answers, said[1::2], strict=True):
            assert answer.replace("<think>\n\n</think>\n\n", "").strip() == wanted.strip()


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_and_an_answer_are_the_conversation_that_they_make(name):
    tokenizer = tokenizer_of(name)
    for said in (["red?", "yes "], ["red?", "no", " why?\n", "a\n\nb"]):
        prompt = tokenizer.encode_prompt(turns(*said[:-1]))
        whole = prompt + tokenizer.encode_answer(said[-1]) + tokenizer.after
        assert tokenizer.encode_chat(turns(*said))[0] == whole
        assert tokenizer.decode(tokenizer.encode_answer(said[-1])).strip().endswith(said[-1].strip())
        # white space at the beginning of an answer takes no letter of the prompt
        assert tokenizer.encode_chat(turns(*said[:-1], "\n b"))[0][:len(prompt)] == prompt


@pytest.mark.parametrize("name", FORMATS)
def test_a_user_cannot_forge_a_turn_and_control_tokens_in_texts_are_told(name):
    tokenizer = tokenizer_of(name)
    for token in filter(None, FORMATS[name][1]):
        plain, forged = (tokenizer.encode_chat(turns(text))[0] for text in ("a b", f"a {token} b"))
        number = tokenizer.bpe.token_to_id(token)
        assert forged.count(number) == plain.count(number) and tokenizer.spelled(f"a {token}") == token
    assert tokenizer.spelled("a < b [1]") is None


@pytest.mark.parametrize("name, says", [("gemma 2", "System role not supported"),
                                        ("mistral 0.3", "another turn than the first"),
                                        ("nemo", "another turn than the first")])
def test_a_system_turn_that_the_template_does_not_take_or_moves_is_refused_by_name(name, says):
    tokenizer = tokenizer_of(name)
    with pytest.raises(ValueError, match=f"takes no system turn .*{says}.*; put 'Be kind.' into"):
        tokenizer.encode_chat(turns("a", system="Be kind."))
    assert tokenizer.encode_chat(turns("a"))[0]


def test_a_text_with_a_word_that_the_template_looks_for_is_refused_by_name():
    tokenizer = tokenizer_of("qwen 3")
    assert tokenizer.turns.words == {"</think>", "<tool>"}         # what the template asks first
    with pytest.raises(ValueError, match="treats a text with '</think>' in another way"):
        tokenizer.encode_chat(turns("a", "<think>b</think>c"))


def test_a_template_that_asks_for_the_date_gets_todays():
    assert datetime.now().strftime("Today: %d %b %Y") in tokenizer_of("llama 3.2").turns.written(turns("a"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_tokenizer_is_saved_and_read_again_as_it_was(name, tmp_path):
    from aya_min.tokenizer import load_tokenizer
    own = tokenizer_of(name)
    own.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.turns == own.turns and again.encode_chat(turns("a", "b")) == own.encode_chat(turns("a", "b"))
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == source_of(name)[0]


def test_in_transformers_the_ids_are_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in FORMATS:
        (tmp_path / name).mkdir()
        tokenizer_of(name).save(tmp_path / name)
        own, their = tokenizer_of(name), transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for said in (["red?"], [" a\n", "b"], ["a", "b c", "d\n\ne"]):
            made = their.apply_chat_template(turns(*said), add_generation_prompt=len(said) == 1)
            assert (made if isinstance(made, list) else made["input_ids"]) == own.encode_chat(
                turns(*said), len(said) == 1)[0], name
