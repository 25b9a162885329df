"""What a row means is honoured, or refused with its place; what is left out is counted and said.

The inputs are made after public bug reports of other tools."""

import json

import numpy as np
import pytest

from aya_min.config import SFT, Reading
from aya_min.data import load_examples, load_pairs, load_prompts, read_jsonl, without_added_keys
from aya_min.lengths import cut_left, fit_prompts
from aya_min.rows import conversation_of, texts_in
from aya_min.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["red or blue? hi hi hi wrong answer answer"], 320)


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        """A JSONL file of objects, or of bytes as they are."""
        path = tmp_path / name
        path.write_bytes(b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("row, code", [
    ({"language": "Standard Arabic", "language_code": "arb"}, "ar"),            # the Aya dataset
    ({"language": "Traditional Chinese", "language_code": "zho"}, "zh-Hant"),
    ({"language": "A name of its own", "language_code": "kmr"}, "ku"),
    ({"language_code": "plt", "script": "Latn"}, "mg"),                         # the Aya collection
    ({"language": "zho", "script": "Hant"}, "zh-Hant"), ({"language": "zho", "script": "Hans"}, "zh"),
    ({"language": "kas", "script": "Deva"}, "ks-Deva"), ({"language": "arb", "script": "Arab"}, "ar"),
    ({"language": "kor", "script": "Hang"}, "ko"), ({"language": "arb", "script": "Latn"}, "ar-Latn"),
    ({"language": "srp", "script": "Cyrl"}, "sr"), ({"language": "zh-Hant", "script": "Hans"}, "zh-Hant"),
    ({"language": "yor", "script": "Latin"}, "yo"), ({"script": "Latn"}, None), ({"language": None}, None),
])
def test_the_aya_data_sets_say_the_language_by_name_code_and_script(row, code, write):
    """Traditional Chinese of the collection was read as simplified; rows with a language_code had none."""
    (_, read), = read_jsonl(write({"inputs": "a", "targets": "b", **row}))
    assert read.get("language") == code


def test_rows_as_the_aya_data_sets_are_published_have_no_key_that_is_not_read(write, capsys):
    text = {"inputs": "a", "targets": "b"}
    read_jsonl(write(
        text | {"language": "Turkish", "language_code": "tur", "annotation_type": "re-annotations",
                "user_id": "u"},
        text | {"id": 1, "dataset_name": "d", "sub_dataset_name": "-", "task_type": "summarization",
                "template_id": 3, "language": "tur", "script": "Latn", "split": "train"},
        text | {"id": 1, "language": "tur", "script": "Latn", "source_id": 6060}))
    assert "not read" not in "".join(capsys.readouterr())


def system(text, **more):
    return {"role": "system", "content": text, **more}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def supervised(tokenizer, write):
    """The supervised texts of rows, one list of answers for each example."""
    def supervised(*rows, limit=512, **settings):
        examples = load_examples([write(*rows)], tokenizer, limit, SFT(**settings))
        return [answers(tokenizer, e.ids, e.mask) for e in examples]

    return supervised


def answers(tokenizer, ids, mask):
    """The supervised spans of an example, each without its end of turn."""
    starts = np.flatnonzero(np.diff(mask, prepend=False) & mask)
    spans = [ids[start:start + int(np.argmin(np.append(mask[start:], False)))] for start in starts]
    assert all(span[-1] == tokenizer.end_of_turn_id for span in spans)
    return [tokenizer.decode(span[:-1]) for span in spans]


GOOD = {"prompt": "red or blue?", "completion": "blue"}
PAIR = {"prompt": "red or blue?", "chosen": "blue", "rejected": "red"}
TALK = [user("red or blue?"), assistant("wrong answer"), user("again"), assistant("blue")]


def refused(load, *arguments):
    with pytest.raises(ValueError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what is supervised ------------------------------------------------------------------------------------


def test_the_loss_of_a_prompt_of_several_turns_is_on_the_completion_only(supervised):
    """An earlier assistant turn of the prompt was trained on, 15 tokens instead of 2."""
    prompt = TALK[:3]
    assert supervised({"prompt": prompt, "completion": "blue"}, {"inputs": prompt, "targets": "blue"},
                  {"prompt": prompt, "completion": [assistant("blue")]},
                  {"prompt": prompt, "completion": TALK}) == [["blue"]] * 4
    assert supervised({"messages": TALK}) == [["wrong answer", "blue"]]


@pytest.mark.parametrize("marks, expected", [(({"weight": 0}, {"weight": 1}), ["blue"]),
                                             (({"weight": 0}, {}), ["blue"]),
                                             (({"weight": 1}, {"weight": 0}), ["wrong answer"]),
                                             (({"train": False}, {"train": True}), ["blue"]),
                                             (({"train": False}, {}), ["blue"]),
                                             (({"weight": 0.0}, {"weight": 1.0}), ["blue"]),
                                             (({"weight": None}, {"train": None}), ["wrong answer", "blue"]),
                                             (({"weight": 0, "train": False}, {}), ["blue"])])
def test_only_the_turns_that_weight_or_train_leaves_are_learnt(marks, expected, supervised):
    talk = [TALK[0], {**TALK[1], **marks[0]}, TALK[2], {**TALK[3], **marks[1]}]
    assert supervised({"messages": talk}) == [expected] == supervised({"messages": [system("s"), *talk]})


@pytest.mark.parametrize(
    "row",
    [{"messages": [user("a"), assistant("b", weight=0)]}, {**GOOD, "weight": 0}, {**GOOD, "train": False},
     {"text": "hi", "weight": 0}, {"prompt": "a", "completion": [assistant("b", train=False)]}])
def test_a_row_of_which_nothing_is_learnt_is_left_out_and_counted(row, supervised, write, tokenizer, capsys):
    assert supervised(GOOD, row, GOOD) == [["blue"]] * 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "1 of 3 examples have no answer that is supervised" in err
    assert err.endswith("data.jsonl:2\n")
    assert "nothing to train on is left of 1 examples" in refused(load_examples, [write(row)], tokenizer,
                                                                  64, SFT())


@pytest.mark.parametrize(
    "row, says",
    [({"messages": [user("a"), assistant("b", weight=0.5)]}, "messages[1].weight must be 0 or 1, got 0.5"),
     ({"messages": [user("a"), assistant("b", weight="0")]}, "messages[1].weight must be 0 or 1"),
     ({"messages": [user("a"), assistant("b", weight=True)]}, "messages[1].weight must be 0 or 1"),
     ({"messages": [user("a"), assistant("b", train="no")]}, "messages[1].train must be true or false"),
     ({"messages": [user("a"), assistant("b", weight=0, train=True)]}, "contradict each other"),
     ({"messages": [user("a", weight=1), assistant("b")]
       }, "messages[0] is a turn of the user, and only the assistant's are supervised"),
     ({"messages": [system("s", train=True), user("a"), assistant("b")]
       }, "messages[0] is a turn of the system"),
     ({"prompt": [user("a"), assistant("b", weight=1), user("c")], "completion": "d"
       }, "only the answer after it is supervised"), ({**GOOD, "weight": 0.3}, "weight must be 0 or 1"),
     ({**GOOD, "train": "yes"}, "train must be true or false"),
     ({"messages": [user("a"), assistant("b", loss=False)]
       }, "'messages[1].loss' cannot be honoured: say what is supervised with weight"),
     ({**GOOD, "loss_mask": [0, 1]}, "'loss_mask' cannot be honoured")])
def test_what_is_said_of_the_loss_and_cannot_be_honoured_is_refused(row, says, write, tokenizer):
    path = write(GOOD, row)
    message = refused(load_examples, [path], tokenizer, 64, SFT())
    assert message.startswith(f"{path}:2: ") and says in message


def test_pairs_of_weight_0_are_left_out_and_of_an_answer_of_weight_0_refused(write, tokenizer, capsys):
    assert len(load_pairs([write(PAIR, {**PAIR, "weight": 0})], tokenizer, 64, SFT())) == 1
    assert "1 of 2 pairs have no answer that is supervised" in capsys.readouterr().err
    assert "weight 0 in a preference pair" in refused(
        load_pairs, [write({**PAIR, "rejected": [assistant("red", weight=0)]})], tokenizer, 64, SFT())


# ---- what the conversation is ------------------------------------------------------------------------------


def test_a_system_column_is_the_system_turn_in_every_shape(write, tokenizer):
    """It vanished in silence."""
    said = [system("In French."), user("red or blue?")]
    for row in (GOOD, {"inputs": "red or blue?",
                       "targets": "blue"}, {"messages": [said[1], assistant("blue")]},
                {"prompt": said, "completion": "blue"}, {"messages": [*said, assistant("blue")]},
                {"prompt": said[1:], "completion": [*said, assistant("blue")]}):
        [example] = load_examples([write({**row, "system": "In French."})], tokenizer, 512, SFT())
        assert example.ids.tolist() == tokenizer.encode_chat([*said, assistant("blue")])[0]
        assert conversation_of({**row, "system": "In French."}, "x:1")[0] == [*said, assistant("blue")]
        [prompt] = load_prompts([write({**row, "system": "In French."})])
        assert prompt["prompt_messages"] == prompt["prompt"] == said and "system" not in prompt
    [pair] = load_pairs([write({**PAIR, "system": "In French."})], tokenizer, 512, SFT())
    assert pair.chosen.ids.tolist() == tokenizer.encode_chat([*said, assistant("blue")])[0]
    for nothing in (None, "", " ", []):
        assert load_prompts([write({**GOOD, "system": nothing})])[0]["prompt"] == "red or blue?"


@pytest.mark.parametrize(
    "row, says",
    [({"messages": [system("other"), user("a"), assistant("b")], "system": "one"
       }, "'system' and the system turn of the messages differ"),
     ({**GOOD, "system": 5}, "'system' must be a string, got int"),
     ({**GOOD, "system": ["a"]}, "'system' must be a string, got list"),
     ({"text": "hi", "system": "s"}, "'system' goes with a conversation"),
     ({**GOOD, "system_prompt": "s"
       }, "'system_prompt' cannot be honoured: it is a system turn; give --columns system=system_prompt")])
def test_a_system_column_that_cannot_be_followed_is_refused(row, says, write, tokenizer):
    assert says in refused(load_examples, [write(row)], tokenizer, 64, SFT())


def test_a_developer_is_the_system_and_a_list_of_text_parts_is_a_text(write, tokenizer):
    parts = [{"type": "text", "text": "red "}, {"type": "text", "text": "or blue?"}]
    plain_row = {"messages": [system("s"), user("red or blue?"), assistant("blue")]}
    in_parts = {
        "messages": [{"role": "developer", "content": "s"},
                     user(parts),
                     assistant([{"type": "text", "text": "blue"}])]
    }
    one, other = load_examples([write(plain_row, in_parts)], tokenizer, 64, SFT())
    assert one.ids.tolist() == other.ids.tolist() and one.mask.tolist() == other.mask.tolist()
    assert load_prompts([write(in_parts)])[0]["prompt"] == [system("s"), user("red or blue?")]
    assert load_prompts([write({"prompt": parts})])[0]["prompt"] == "red or blue?"


@pytest.mark.parametrize("message, says",
                         [({"role": "tool", "content": "7"},
                           "needs a role of system, user or assistant, got 'tool': no tools are called here"),
                          ({"role": "function", "content": "7"}, "got 'function': no tools"),
                          ({"role": "ipython", "content": "7"}, "got 'ipython': no tools"),
                          ({"role": "human", "content": "7"}, "write user or assistant"),
                          ({"role": "User", "content": "7"}, "got 'User'"),
                          ({"role": 5, "content": "7"}, "got 5"),
                          ({"from": "human", "value": "7"}, "ShareGPT's .from, value.; write role"),
                          (user([{"type": "image_url", "image_url": {"url": "x"}}
                                 ]), "has a part of type 'image_url'; only text is read here"),
                          (user([{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}
                                 ]), "has a part of type 'input_audio'"),
                          (user([{"type": "text"}]), "has a part of type 'text'"),
                          (user(["a"]), "must be a string, got list"),
                          (user("a", tool_calls=[{"id": 1}]),
                           r"'messages\[0\].tool_calls' cannot be honoured: no tools are called here"),
                          (user("a", function_call={"name": "f"}), "function_call"),
                          (user("a", images=["x.png"]), "images' cannot be honoured: only text is read"),
                          (user("a", audio={"id": 1}), "audio"), (user("a", refusal="I cannot"), "refusal"),
                          (user("a", reasoning_content="hm"), "no thoughts"),
                          (user("a", thinking="hm"), "no thoughts"),
                          (user("a", prefix=True), "no answer is continued here"),
                          (user("a", documents=[{}]), "no documents")])
def test_a_turn_that_is_not_understood_is_refused_with_its_place_and_reason(message, says, write, tokenizer):
    path = write(GOOD, {"messages": [message, assistant("b")]})
    for load in (lambda: load_examples([path], tokenizer, 64, SFT()), lambda: load_prompts([path]),
                 lambda: read_jsonl(path) and load_prompts([path])):
        with pytest.raises(ValueError, match=f"^{path}:2: .*{says}"):
            load()


@pytest.mark.parametrize("key, value", [("tools", [{"type": "function"}]), ("functions", [{}]),
                                        ("tool_choice", "auto"), ("documents", [{"text": "a"}]),
                                        ("images", ["a.png"]), ("image", "a.png"), ("videos", ["a"]),
                                        ("audio", "a.wav"), ("audios", ["a"]),
                                        ("chat_template_kwargs", {"thinking": True}),
                                        ("history", [["a", "b"]]),
                                        ("conversations", [{"from": "human", "value": "a"}]),
                                        ("continue_final_message", True)])
def test_a_key_of_a_row_that_carries_meaning_is_refused_by_every_reader_and_an_empty_one_is_not(
        key, value, write, tokenizer):
    path, empty = write(GOOD, {**GOOD, key: value}), {**GOOD, key: type(value)()}
    for load in (read_jsonl, lambda path: load_prompts([path]),
                 lambda path: load_examples([path], tokenizer, 64, SFT())):
        with pytest.raises(ValueError, match=f"^{path}:2: '{key}' cannot be honoured: "):
            load(path)
    texts = [{**GOOD, key: text} for text in ("[]", "null", "")]
    assert len(load_examples([write(empty, {**GOOD, key: None}, *texts)], tokenizer, 64, SFT())) == 5
    pair = write({**PAIR, key: value}, name="pairs.jsonl")
    with pytest.raises(ValueError, match=f"^{pair}:1: '{key}' cannot be honoured: "):
        load_pairs([pair], tokenizer, 64, SFT())


def test_unknown_keys_of_messages_are_named_once_with_their_count_and_first_place(write, tokenizer, capsys):
    path = write(GOOD, *[{"messages": [user("a", name="Ann"), assistant("b", model="m", name="Bo")]}] * 2)
    assert len(load_examples([path], tokenizer, 64, SFT())) == 3
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: keys of messages that are not read: ") and err.count("\n") == 1
    assert f"'name' (4 times, the first: {path}:2)" in err
    assert f"'model' (2 times, the first: {path}:2)" in err


# ---- two shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [{"messages": [user("a"), assistant("b")], "text": "user: a assistant: b"
             }, {**GOOD, "text": "red or blue? blue"}, {"inputs": "a", "targets": "b", "text": "a b"}, {
                 **GOOD, "inputs": "a", "targets": "b"
             }, {**GOOD, "inputs": "other"}, {"messages": [user("a"), assistant("b")], **GOOD}, {
                 "messages": [user("a"), assistant("b")], "prompt": "c"
             }, {"messages": [user("a"), assistant("b")], "completion": "c"},
            {"text": "a", "instruction": "a", "input": "", "output": "b"}])
def test_two_shapes_in_one_row_are_refused(row, write, tokenizer):
    """One of them was dropped in silence: the plain text beat the messages, and all of it was supervised."""
    path = write(GOOD, row)
    assert refused(load_examples, [path], tokenizer, 64,
                   SFT()).startswith(f"{path}:2: two shapes in one row, ")


def test_a_second_prompt_that_says_the_same_is_no_second_shape(write, tokenizer):
    """Data sets on the hub have messages and their first question, or the chosen conversation."""
    talk = {"messages": [system("s"), *TALK]}
    path = write({**talk, "prompt": "red or blue?"}, {**talk, "prompt": TALK[:3]},
                 {**GOOD, "text": "", "messages": None, "chosen": None})
    assert len(load_examples([path], tokenizer, 512, SFT())) == 3 and len(load_prompts([path])) == 3
    sides = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    path = write({"prompt": "a", **sides, "messages": sides["chosen"]}, {**PAIR, "chosen": "other"})
    assert len(load_pairs([path], tokenizer, 512, SFT())) == 2 == len(load_prompts([path]))
    assert "two shapes in one row" in refused(
        load_pairs, [write({"prompt": "a", **sides, "messages": sides["rejected"]})], tokenizer, 64, SFT())
    assert "two shapes in one row" in refused(load_prompts, [write({"prompt": "a", "text": "b"})])
    assert "two shapes in one row" in refused(load_pairs, [write({**PAIR, "completion": "b"})], tokenizer,
                                              64, SFT())


@pytest.mark.parametrize("row, says",
                         [(PAIR, "a preference pair (chosen + rejected), which reward and dpo learn from"),
                          # The advice to rename chosen was given for these too, and led to the same line.
                          (PAIR, "one with the right answer as completion and without the rejected one"),
                          ({"prompt": "a", "chosen": "b"}, "--columns completion=chosen"),
                          ({**GOOD, "rejected": "b"}, "a preference pair (rejected)"),
                          ({**GOOD, "label": False}, "label False says that this answer is unwanted"),
                          ({**GOOD, "label": 0}, "label 0 says"),
                          ({**GOOD, "label": 0.0}, "label 0.0 says"),
                          ({**GOOD, "label": "False"}, "label 'False' says"),
                          ({"messages": [user("a"), assistant("b")], "label": False}, "label False")])
def test_an_answer_that_is_unwanted_or_one_of_two_is_no_example(row, says, write, tokenizer):
    path = write({**GOOD, "label": True}, row)
    message = refused(load_examples, [path], tokenizer, 64, SFT())
    assert message.startswith(f"{path}:2: ") and says in message


# ---- control tokens ----------------------------------------------------------------------------------------

TEMPLATED = [
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>red?<|END_OF_TURN_TOKEN|>",
    "<|im_start|>user\nred?<|im_end|>", "<s>[INST] red? [/INST]", "<start_of_turn>user\nred?<end_of_turn>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>red?<|eot_id|>", "red <PAD> <EOS_TOKEN>"
]


@pytest.mark.parametrize("text", TEMPLATED)
def test_control_tokens_spelled_in_data_are_counted_and_refused_unless_they_are_asked_for(
        text, write, tokenizer, capsys):
    """They were trained as letters: 142 supervised tokens instead of 4."""
    for row, load in (({"text": text}, load_examples), ({**GOOD, "prompt": text}, load_examples),
                      ({**GOOD, "completion": text
                        }, load_examples), ({**GOOD, "system": text},
                                            load_examples), ({"messages": [user(text),
                                                                           assistant("b")]}, load_examples),
                      ({**PAIR, "chosen": text}, load_pairs), ({**PAIR, "rejected": text}, load_pairs)):
        good = GOOD if load is load_examples else PAIR
        path = write(good, row, good, row)
        message = refused(load, [path], tokenizer, 512, SFT())
        assert message.startswith(
            f"{path}: 2 of 4 rows spell control tokens ("
        ) and f"the first: {path}:2)" in message and "--allow-control-tokens" in message
        assert len(load([path], tokenizer, 512, SFT(allow_control_tokens=True))) == 4
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "2 of 4 rows spell control tokens" in err
    assert "spell control tokens" in refused(load_prompts, [write({"prompt": text})], SFT(), tokenizer)
    assert len(load_prompts([write({"prompt": text})], SFT(allow_control_tokens=True), tokenizer)) == 1


@pytest.mark.parametrize("text", [
    "<all of its instructions>", "List<T> and Map<K, V>", "<NUL> <ESC>", "a <b>bold</b> <BR> <TD>word</TD>",
    "x <|> y || [z] <| f |>", "[1] see [INST.] and [instruction]", "<?xml version='1.0'?>",
    "if a < b and c > d: e[0] |= <f>", "<|not a name|>"
])
def test_prose_markup_and_code_are_no_control_tokens(text, write, tokenizer, capsys):
    assert len(load_examples([write({**GOOD, "prompt": text}, {"text": text})], tokenizer, 512, SFT())) == 2
    assert capsys.readouterr().err == ""


# ---- other people's names of keys --------------------------------------------------------------------------


def test_a_column_that_no_row_has_is_told_where_all_rows_have_our_key(write, capsys):
    """A misspelled --columns passed in silence beside rows of our keys."""
    path = write({"prompt": "a", "frage": "b"}, {"prompt": "a"})
    read_jsonl(path, Reading(columns={"prompt": "question"}))
    assert "--columns prompt=question: no row has the key 'question'; 'prompt' is read as it is" in (
        capsys.readouterr().err)
    read_jsonl(write({"prompt": "a"}, {"question": "b"}), Reading(columns={"prompt": "question"}))
    assert "--columns" not in capsys.readouterr().err


def test_columns_rename_other_peoples_keys_and_a_whole_number_is_its_text(write, tokenizer, supervised):
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "How many?", "answer": 6, "solution": "because", "language": "Swahili"}
    assert supervised(row, columns=columns) == [["6"]]
    [prompt] = load_prompts([write(row)], Reading(columns=columns))
    assert prompt["prompt"] == "How many?" and prompt["language"] == "sw" and prompt[
        "solution"] == "because" and "answer" not in prompt
    assert without_added_keys(prompt) == {"solution": "because", "language": "sw", "prompt": "How many?"}
    row = {"q": "a", "good": "b", "bad": "c", "sys": "s", "lang": "fra_Latn"}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "sys", "language": "lang"}
    [pair] = load_pairs([write(row)], tokenizer, 64, SFT(columns=columns))
    assert pair.chosen.language == "fr" and pair.chosen.ids.tolist() == tokenizer.encode_chat(
        [system("s"), user("a"), assistant("b")])[0]
    assert supervised({"dialogue": TALK}, columns={"messages": "dialogue"}) == [["wrong answer", "blue"]]
    assert supervised({"prompt": "b", "completion": "a"},
                  columns={"prompt": "completion", "completion": "prompt"}) == [["b"]]


@pytest.mark.parametrize(
    "columns, row, says",
    [
        (
            {"prompt": "question"},
            {"completion": "b"},
            ":1: no key 'question', which --columns prompt=question names; it has completion",
        ),
        (
            {"prompt": "question"},
            {**GOOD, "question": "b"},
            ":1: both 'prompt' and 'question', which --columns prompt=question would rename",
        ),
        (
            {"promt": "question"},
            GOOD,
            "--columns promt=question: 'promt' is no key that is read here; known: messages prompt",
        ),
        (
            {"completion": "answer"},
            {"prompt": "a", "answer": 1.5},
            ":1: 'completion' must be a string, got float",
        ),
        (
            {"prompt": "q", "completion": "q"},
            {"q": "a"},
            "--columns prompt=q completion=q: a key has two names",
        ),
        (
            {"completion": "answer"},
            {"prompt": "a", "answer": True},
            ":1: 'completion' must be a string, got bool",
        ),
        (
            {"prompt": "instruction", "completion": "output"},
            {"instruction": "a", "input": "b", "output": "c"},
            ":1: 'input' is part of what 'instruction' asks",
        ),
    ],
)
def test_a_column_that_cannot_be_renamed_is_refused_with_its_place(columns, row, says, write, tokenizer):
    assert says in refused(load_examples, [write(row)], tokenizer, 64, SFT(columns=columns))


# ---- whole rows are checked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"prompt": "a", "note": "cut \\ud83d"}', "'note' holds half a surrogate pair"),
        (b'{"prompt": "a", "\\udc00": 1}', "a key holds half a surrogate pair"),
        (b'{"prompt": "a", "score": 1e999}', "'score' is not a finite number: not JSON (1e999"),
        (b'{"prompt": "a", "x": {"y": [-1e400]}}', "'x'['y'][0] is not a finite number: not JSON"),
        (b'{"prompt": "a", "score": NaN}', "'score' is not a finite number: not JSON (NaN"),
        (b'{"prompt": "a", "score": -Infinity}', "-Infinity is not JSON"),
        (b'{"prompt": "a\\u0000b"}', "'prompt' holds a NUL"),
        (b'{"prompt": "a", "meta": {"x": ["\\u0000"]}}', "holds a NUL character"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
        (b'{"prompt": "a", "m": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        (b'{"prompt": "a", "id": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b'"prompt"', "a JSON str, not an object"),
    ],
)
def test_a_row_that_could_not_be_written_again_is_refused_when_it_is_read(line, says, write):
    """1e999 was written as Infinity, and half a surrogate pair failed at the last write, after the work."""
    path = write(GOOD, line, GOOD)
    message = refused(read_jsonl, path)
    assert message.startswith(f"{path}:2: ") and says in message and len(message) < 400


def test_whole_surrogate_pairs_escaped_backslashes_and_a_byte_order_mark_are_read(write):
    path = write(b'\xef\xbb\xbf{"prompt": "\\ud83d\\ude00 \\\\u0000"}', b'{"prompt": "\xef\xbb\xbfa"}')
    assert [row["prompt"] for _, row in read_jsonl(path)] == ["\U0001f600 \\u0000", "\ufeffa"]


# ---- cut answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [{"finish_reason": "length"}, {"finish_reason": "max_tokens"}, {"finish_reason": "MAX_TOKENS"},
            {"stop_reason": "max_tokens"}, {"finish_reason": "interrupted"}])
def test_a_cut_answer_is_left_out_and_counted_by_language_unless_it_is_kept(cut, write, tokenizer, capsys):
    rows = [{**GOOD, "finish_reason": "stop", "language": "fr"}, {**GOOD, **cut, "language": "fr"},
            {**GOOD, **cut}, {"messages": [user("a"), assistant("b", **cut)], "language": "sw"},
            {"prompt": "a", "completion": [assistant("b", **cut)], "language": "fr"}]
    path = write(*rows)
    assert len(load_examples([path], tokenizer, 64, SFT())) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: 4 of 5 examples have an answer that was cut at its limit (finish_reason)")
    assert err.endswith(f" keeps them; by language: fr 2, other 1, sw 1; the first: {path}:2\n")
    assert err.count("\n") == 1
    assert len(load_examples([path], tokenizer, 64,
                             SFT(keep_cut=True))) == 5 and capsys.readouterr().err == ""
    assert "nothing to train on is left" in refused(load_examples, [write(*rows[1:])], tokenizer, 64, SFT())


def test_an_earlier_answer_that_was_cut_is_context_only(supervised, capsys):
    talk = [TALK[0], {**TALK[1], "finish_reason": "interrupted"}, *TALK[2:]]
    assert supervised({"messages": talk}) == [["blue"]]
    assert "1 of 1 examples have an earlier answer that was cut at its limit" in capsys.readouterr().err
    assert supervised({"messages": talk}, keep_cut=True) == [["wrong answer", "blue"]]


@pytest.mark.parametrize("cut", [{"chosen_finish_reason": "length"}, {"rejected_finish_reason": "length"},
                                 {"rejected": [assistant("red", finish_reason="length")]}])
def test_a_pair_of_which_an_answer_was_cut_is_left_out_and_counted(cut, write, tokenizer, capsys):
    path = write({**PAIR, "chosen_finish_reason": "stop", "rejected_finish_reason": "stop"},
                 {**PAIR, **cut, "language": "fr"})
    assert len(load_pairs([path], tokenizer, 64, SFT())) == 1
    err = capsys.readouterr().err
    assert "1 of 2 pairs have an answer that was cut" in err and "by language: fr 1; " in err
    assert len(load_pairs([path], tokenizer, 64, SFT(keep_cut=True))) == 2


# ---- too long ----------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_is_refused_skipped_or_cut_at_the_left(write, tokenizer, capsys):
    row = {"prompt": "hi " * 40, "completion": "blue"}
    path = write(GOOD, row)
    message = refused(load_examples, [path], tokenizer, 32, SFT(too_long="refuse", max_length=32))
    assert message.startswith(f"{path}:2: ") and "longer than --max-length 32 tokens" in message
    assert "longer than the model's 32 positions" in refused(load_examples, [path], tokenizer,
                                                             32, SFT(too_long="refuse"))
    assert len(load_examples([path], tokenizer, 32, SFT(max_length=32))) == 1
    says = f"1 of 2 examples are longer than --max-length 32 tokens and are left out; the first: {path}:2\n"
    assert says in capsys.readouterr().err
    whole = tokenizer.encode_chat(conversation_of(row, "x")[0])[0]
    _, example = load_examples([path], tokenizer, 32, SFT(too_long="cut-left"))
    assert example.ids.tolist() == [tokenizer.bos_id, *whole[-31:]] and answers(
        tokenizer, example.ids, example.mask) == ["blue"]
    assert (
        "1 of 2 examples are longer than the model's 32 positions and lose the oldest"
        in capsys.readouterr().err
    )
    path = write(GOOD, {"prompt": "hi", "completion": "hi " * 60})
    assert len(load_examples([path], tokenizer, 32, SFT(too_long="cut-left"))) == 1
    assert "even with their prompts cut, and are left out" in capsys.readouterr().err


def test_of_an_earlier_answer_that_the_cut_goes_through_nothing_is_learnt(write, tokenizer):
    talk = [
        user("hi"),
        assistant("wrong answer " * 20),
        user("hi"),
        assistant("red"),
        user("hi"),
        assistant("blue")
    ]
    ids, mask = tokenizer.encode_chat(talk)
    for limit in range(20, len(ids)):
        [example] = load_examples([write({"messages": talk})], tokenizer, limit, SFT(too_long="cut-left"))
        assert len(example.ids) == limit and answers(tokenizer, example.ids,
                                                     example.mask)[-2:] in (["red", "blue"], ["blue"])
        supervised = answers(tokenizer, example.ids, example.mask)
        assert len(supervised) < 3 or supervised[0] == ("wrong answer " * 20).strip()


def test_both_sides_of_a_pair_have_the_same_cut_prompt(write, tokenizer, capsys):
    path = write({"prompt": "hi " * 40, "chosen": "blue blue blue", "rejected": "red"},
                 {"prompt": "hi", "chosen": "b " * 60, "rejected": "red"})
    [pair] = load_pairs([path], tokenizer, 32, SFT(too_long="cut-left"))
    prompts = [side.ids[~side.mask].tolist() for side in (pair.chosen, pair.rejected)]
    assert prompts[0] == prompts[1] and len(pair.chosen.ids) == 32 and prompts[0][0] == tokenizer.bos_id
    assert [answers(tokenizer, side.ids, side.mask)
            for side in (pair.chosen, pair.rejected)] == [["blue blue blue"], ["red"]]
    assert "1 of 2 pairs are longer than" in capsys.readouterr().err
    assert "tokens, longer than the model's 32 positions" in refused(load_pairs, [path], tokenizer,
                                                                     32, SFT(too_long="refuse"))


def test_prompts_that_are_too_long_are_refused_skipped_or_cut_by_the_policy(write, capsys):
    path = write({"prompt": "a"}, {"prompt": "a" * 9}, {"prompt": "b" * 7})
    rows, length = load_prompts([path]), lambda row: len(row["prompt"])
    message = refused(fit_prompts, rows, length, 5, "refuse", "the room")
    assert message.startswith(f"{path}:2: the prompt has 9 tokens; the room: 5 (2 of 3 prompts are longer)")
    assert [row["prompt"] for row in fit_prompts(rows, length, 5, "skip", "the room")] == ["a"]
    says = "prompts: 2 of 3 are longer than 5 tokens (the room) and are left out; "
    assert capsys.readouterr().err == f"{says}the first: {path}:2, 9 tokens\n"
    assert fit_prompts(rows, length, 5, "cut-left", "the room") == rows
    assert "lose their oldest tokens" in capsys.readouterr().err
    assert fit_prompts(rows, length, 9, "refuse", "the room") == rows and capsys.readouterr().err == ""
    assert "(2 of 2 prompts are longer)" in refused(fit_prompts, rows[1:], length, 5, "skip", "the room")
    assert "prompt 1: " in refused(fit_prompts, [{"prompt": "a" * 9}], length, 5, "refuse", "the room")
    assert "no room for a prompt" in refused(fit_prompts, rows, length, 0, "skip", "the room")
    assert cut_left([1, 2, 3, 4, 5], 3) == [1, 4, 5] and cut_left([1, 2, 3], 3) == [1, 2, 3] and cut_left(
        [1, 2, 3], 1) == [1]


# ---- equal means equal in ids ------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen, rejected", [("yes", "yes "), ("caf\u00e9", "cafe\u0301"), ("ok\n", "ok"),
                                              (" b c", "b c"), ("\u1e9b\u0323", "\u017f\u0323\u0307")])
def test_a_pair_of_answers_with_equal_ids_is_named_and_left_out(chosen, rejected, write, tokenizer, capsys):
    """Such pairs were trained on at ln 2, and AdamW moved the weights all the same."""
    equal = {"prompt": "a", "chosen": chosen, "rejected": rejected}
    path = write(*[PAIR] * 30, equal)
    assert len(load_pairs([path], tokenizer, 64, SFT())) == 30
    says = "1 of 31 pairs have the same answer as chosen and rejected"
    assert capsys.readouterr().err == f"{path}: {says}: {path}:31; they are left out\n"
    assert "1 of 1 pairs have the same answer" in refused(load_pairs, [write(equal)], tokenizer, 64, SFT())


# ---- what other commands write is read ---------------------------------------------------------------------


def test_prompts_forget_the_answers_that_their_rows_had(write):
    row = {**PAIR, "chosen_finish_reason": "length", "question_id": "q", "label": False, "weight": 0}
    [prompt] = load_prompts([write(row)])
    assert without_added_keys(prompt) == {"prompt": "red or blue?", "question_id": "q"
                             } and prompt["prompt_where"].endswith("data.jsonl:1")
    [prompt] = load_prompts([write({"prompt": "a", "label": "geography"})])
    assert without_added_keys(prompt) == {"prompt": "a", "label": "geography"}


def test_a_tokenizer_is_trained_on_all_texts_of_every_shape(write):
    columns = {"prompt": "question", "completion": "answer"}
    rows = [(PAIR, ["red or blue?", "blue", "red"]), ({"text": "hi"}, ["hi"]), ({"prompt": "a"}, ["a"]),
            ({"messages": TALK[:2], "system": "s"}, ["s", "red or blue?", "wrong answer"]),
            ({"messages": TALK[:1]}, ["red or blue?"])]
    for row, texts in rows:
        assert texts_in(row, "x:1") == texts
    [(where, row)] = read_jsonl(write({"question": "How many?", "answer": 6}), Reading(columns=columns))
    assert texts_in(row, where) == ["How many?", "6"]


# ---- what a newcomer's files were refused for, or lost in silence ------------------------------------------


def test_lines_without_a_row_are_passed_over_and_places_stay(write, tokenizer):
    path = write(b"\xef\xbb\xbf", b"", GOOD, b"  \r", {"prompt": "a"}, b"", b"")
    assert refused(load_examples, [path], tokenizer, 64).startswith(f"{path}:5: no example")


@pytest.mark.parametrize(
    "data, says", [(b"\x1f\x8b\x08", "gzip"), (b"PAR1\0", "parquet"), (b"[\n{}\n]", "array")]
)
def test_a_file_of_another_kind_is_named(data, says, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(data)
    assert says in refused(read_jsonl, tmp_path / "rows.jsonl")


def test_keys_of_rows_that_are_not_read_are_named_once_with_count_and_first_place(write, tokenizer, capsys):
    """With --columns prompt=question the context of a question was dropped without a word."""
    path = write(*[{"question": "a", "answer": 3, "context": "c", "margin": 2, "id": 1, "source": "x"}] * 2)
    columns = {"prompt": "question", "completion": "answer"}
    assert len(load_examples([path], tokenizer, 64, SFT(columns=columns))) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"keys that are not read: 'context' (2 times, the first: {path}:1)" in err
    assert "'margin'" in err and "'id'" not in err and "'source'" not in err


def test_a_file_that_has_our_names_already_is_read_as_it_is_beside_one_that_has_others(write, tokenizer):
    path = write({"question": "a", "completion": "b"}, {"prompt": "a", "completion": "b"})
    one, other = load_examples([path], tokenizer, 64, SFT(columns={"prompt": "question"}))
    assert one.ids.tolist() == other.ids.tolist()


def test_a_system_turn_may_be_empty(write, tokenizer):
    [example] = load_examples(
        [write({"messages": [{"role": "system", "content": ""}, user("a"), assistant("b")]})], tokenizer, 64
    )
    assert answers(tokenizer, example.ids, example.mask) == ["b"]


@pytest.mark.parametrize("key, value", [("loss_weight", 0.1), ("preamble", "p"), ("reasoning", "r"),
                                        ("conversation", [{}])])
def test_more_keys_that_carry_meaning_are_refused(key, value, write, tokenizer):
    assert f"{key!r} cannot be honoured" in refused(
        load_examples, [write({**GOOD, key: value})], tokenizer, 64
    )
