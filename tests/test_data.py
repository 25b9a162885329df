import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from aya_min.config import SFT
from aya_min.data import (Example, Pair, Sampler, batches_in_order, collate, collate_pairs, encode_example,
                          load_examples, load_pairs, load_prompts, make_batches, read_jsonl, slots_of)
from aya_min.losses import by_language
from aya_min.rows import conversation_of, preference
from aya_min.tokenizer import train_tokenizer

REAL = Path(__file__).parent.parent.parent / "shared" / "data"

# Ids as in test_tokenizer.py: 0-12 special tokens, then bytes (ASCII c is ord(c) - 20), 269 = "hi".
BOS, START, END, USER, CHATBOT, HI, MARK = 5, 8, 9, 10, 11, 269, ord("!") - 20
USER_HI, CHATBOT_TURN = [START, USER, HI, END], [START, CHATBOT]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hi hi hi hi"], 270)


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        """A JSONL file of objects, or of bytes as they are."""
        path = tmp_path / "data.jsonl"
        path.write_bytes(
            b"".join(
                (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()) + b"\n"
                for row in rows
            )
        )
        return path
    return write


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def supervised(example):
    return example.ids[example.mask].tolist()


# ---- shapes of a line --------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", [
    {"messages": [user("hi"), assistant("hi!")]},
    {"prompt": "hi", "completion": "hi!"},
    {"inputs": "hi", "targets": "hi!"},
    {"prompt": [user("hi")], "completion": [assistant("hi!")]},
    {"prompt": "hi", "completion": [user("hi"), assistant("hi!")]},
])
def test_every_shape_of_an_example_gives_the_same_ids(row, tokenizer, write):
    [example] = load_examples([write({**row, "source": "kept", "id": 7})], tokenizer, 64, SFT())
    assert example.ids.tolist() == [BOS, *USER_HI, *CHATBOT_TURN, HI, MARK, END]
    assert supervised(example) == [HI, MARK, END]


def test_an_aya_row_keeps_its_language(tokenizer, write):
    """The Aya collection writes "fra" or "French"."""
    path = write(
        *({"inputs": "hi", "targets": "hi", "language": name} for name in ("fr", "fra", "French")),
        {"inputs": "hi", "targets": "hi"},
    )
    examples = load_examples([path], tokenizer, 64, SFT())
    assert [e.language for e in examples] == ["fr", "fr", "fr", "other"]


def test_every_assistant_turn_of_a_conversation_is_supervised(tokenizer, write):
    conversation = [user("hi"), assistant("!"), user("!"), assistant("hi")]
    for system in ([], [{"role": "system", "content": "hi hi"}]):
        [example] = load_examples([write({"messages": system + conversation})], tokenizer, 64, SFT())
        assert supervised(example) == [MARK, END, HI, END]


def test_only_the_last_answer_of_a_preference_pair_is_supervised(tokenizer, write):
    prompt = [user("hi"), assistant("!"), user("!")]
    [pair] = load_pairs([write({"prompt": prompt, "chosen": "hi", "rejected": "!!"})], tokenizer, 64, SFT())
    assert supervised(pair.chosen) == [HI, END] and supervised(pair.rejected) == [MARK, MARK, END]
    assert pair.chosen.ids[:-2].tolist() == pair.rejected.ids[:-3].tolist() == tokenizer.encode_prompt(prompt)


@pytest.mark.parametrize("row", [
    {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    {"prompt": [user("hi")], "chosen": "yes", "rejected": "no"},
    {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    {"prompt": "hi", "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
    {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
])
def test_every_shape_of_a_pair_with_trls_implicit_prompt_too_gives_the_same_pair(row):
    assert preference(row, "f:1") == ([user("hi")], "yes", "no")


def test_an_implicit_prompt_may_be_a_long_conversation():
    before = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    assert preference(
        {"chosen": before + [assistant("yes")], "rejected": before + [assistant("no")]}, "f:1"
    ) == (before, "yes", "no")


def test_the_prompt_of_any_shape_is_what_comes_before_the_answer(write):
    rows = [
        {"prompt": "hi"},
        {"inputs": "hi"},
        {"prompt": [user("hi")]},
        {"messages": [user("hi")]},
        {"messages": [user("hi"), assistant("x")]},
        {"prompt": "hi", "completion": "x", "question_id": "q1", "cluster": "c"},
    ]
    loaded = load_prompts([write(*rows)])
    assert [row["prompt_messages"] for row in loaded] == [[user("hi")]] * len(rows)
    assert loaded[-1]["question_id"] == "q1" and loaded[-1]["cluster"] == "c"


def test_a_long_text_is_cut_into_pieces_that_lose_and_repeat_no_token(tokenizer, write):
    text = "!hi" * 10                                                    # 20 tokens and the end
    pieces = load_examples([write({"text": text})], tokenizer, 8, SFT())
    assert [len(p.ids) for p in pieces] == [8, 8, 8]
    assert all(p.ids[0] == BOS and not p.mask[0] and p.mask[1:].all() for p in pieces)
    assert sum((supervised(p) for p in pieces), []) == [MARK, HI] * 10 + [END]


def test_windows_line_ends_and_a_missing_last_line_end_are_read(write, tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "b\xe2\x80\xa8c"}')
    assert [(where, row["prompt"]) for where, row in read_jsonl(path)] == [
        (f"{path}:1", "a"),
        (f"{path}:2", "b\u2028c"),
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")
def test_real_files_of_every_shape_load_whole(tokenizer, tmp_path):
    """inputs/targets, prompt/chosen/rejected and text, in all languages."""
    count = lambda path: len(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    some = tmp_path / "instructions.jsonl"
    some.write_text(
        "".join((REAL / "instructions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[::20]),
        encoding="utf-8",
    )
    for path, load in (
        (some, load_examples),
        (REAL / "preferences.jsonl", load_pairs),
        (REAL / "classification.jsonl", load_examples),
    ):
        assert len(load([path], tokenizer, 1_000_000, SFT())) == count(path)


# ---- what a user can get wrong -----------------------------------------------------------------------------

GOOD = {"prompt": "hi", "completion": "hi"}
MALFORMED = [
    ("bad JSON", b'{"prompt": "hi", }', "not JSON .*one whole object a line"),
    ("a line cut short", b'{"prompt": "hi", "comp', "not JSON .*one whole object a line"),
    ("an array", b'["hi", "hi"]', "a JSON list, not an object; one whole object a line"),
    ("a number", b"7", "a JSON int, not an object"),
    (
        "not UTF-8",
        b'{"prompt": "\xff", "completion": "hi"}',
        "not UTF-8 .byte 12.; convert the file to UTF-8",
    ),
    (
        "missing field",
        {"prompt": "hi"},
        r"no example in keys \['prompt'\]; needs messages, or prompt . completion",
    ),
    ("unknown shape", {"instruction": "hi", "output": "hi"}, r"no example in keys .*needs messages"),
    ("empty answer", {"prompt": "hi", "completion": ""}, "'completion' is empty; remove the line or fill it"),
    ("blank answer", {"inputs": "hi", "targets": " \n"}, "'targets' is empty; remove the line or fill it"),
    ("empty turn", {"messages": [user("hi"), assistant("")]}, r"'messages\[1\].content' is empty"),
    ("empty text", {"text": " "}, "'text' is empty; remove the line or fill it"),
    (
        "an answer that is a number",
        {"prompt": "hi", "completion": 5},
        "'completion' must be a string, got int",
    ),
    ("no answer", {"prompt": "hi", "completion": None}, "'completion' must be a string, got NoneType"),
    (
        "an empty list as answer",
        {"prompt": "hi", "completion": []},
        "'completion' must be one assistant turn",
    ),
    (
        "a user's turn as answer",
        {"prompt": "hi", "completion": [user("hi")]},
        "'completion' must be one assistant turn",
    ),
    (
        "three turns as answer",
        {"prompt": "hi", "completion": [assistant("a"), user("b"), assistant("c")]},
        "got 3 turns; put earlier turns in the prompt",
    ),
    (
        "unknown language",
        {**GOOD, "language": "xx"},
        "unknown language 'xx'; give a BCP 47 tag .*leave the key out",
    ),
    ("a language that is a list", {**GOOD, "language": ["en"]}, "unknown language"),
    (
        "lone surrogate",
        b'{"prompt": "hi", "completion": "a\\ud83d"}',
        "'completion' holds half a surrogate pair, which is not text; remove it",
    ),
    (
        "two users in a row",
        {"messages": [user("a"), user("b"), assistant("c")]},
        "user and assistant must alternate, user first",
    ),
    (
        "assistant first",
        {"messages": [assistant("a"), user("b")]},
        "user and assistant must alternate, user first",
    ),
    (
        "system in the middle",
        {"messages": [user("a"), {"role": "system", "content": "b"}, assistant("c")]},
        "must alternate",
    ),
    (
        "unknown role",
        {"messages": [{"role": "tool", "content": "a"}]},
        r"messages\[0\] needs a role of system, user or assistant",
    ),
    ("messages that are strings", {"messages": ["hi", "hi"]}, r"messages\[0\] needs a role"),
    ("no messages", {"messages": []}, "'messages' must be a non-empty list of {role, content}"),
    (
        "no assistant's turn at the end",
        {"messages": [user("a")]},
        "the last message must be the assistant's answer, got 'user'",
    ),
    (
        "a prompt that ends with an answer",
        {"prompt": [user("a"), assistant("b")], "completion": "c"},
        "the prompt must end with a user turn, got 'assistant'",
    ),
    (
        "a prompt of a system turn only",
        {"prompt": [{"role": "system", "content": "a"}], "completion": "c"},
        "the prompt must end with a user turn, got 'system'",
    ),
]


@pytest.mark.parametrize(
    "line, message", [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_a_malformed_line_is_refused_with_file_line_and_remedy(line, message, tokenizer, write):
    path = write(GOOD, line, GOOD)
    with pytest.raises(ValueError, match=message) as error:
        load_examples([path], tokenizer, 64, SFT())
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": "a", "rejected": "b"}, "needs prompt, chosen, rejected"),
        ({"prompt": "hi", "chosen": "a"}, "needs prompt, chosen, rejected"),
        ({"prompt": "hi", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ({"prompt": "hi", "chosen": "a", "rejected": 3}, "'rejected' must be a string, got int"),
        ({"prompt": "hi", "chosen": [], "rejected": "b"}, "'chosen' must be one assistant turn"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("other"), assistant("c")]},
            "'rejected' must be one assistant turn, alone or after the same prompt",
        ),
        ({"chosen": [user("a"), assistant("b")], "rejected": 3}, "'rejected' must be a string"),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "'prompt' must be a non-empty list"),
        (
            {
                "chosen": [{"role": "system", "content": "a"}, user("b")],
                "rejected": [{"role": "system", "content": "a"}, user("c")],
            },
            "must end with a user turn, got 'system'",
        ),
    ],
)
def test_a_malformed_pair_is_refused_with_file_line_and_remedy(row, message, tokenizer, write):
    """An empty list as an answer was once trained on as "?", and a user's turn after a system turn as the
    answer."""
    path = write({"prompt": "hi", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(ValueError, match=message) as error:
        load_pairs([path], tokenizer, 64, SFT())
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "hi"},
        {"messages": [{"role": "system", "content": "hi"}]},
        {"prompt": [user("a"), assistant("b")]},
        {"prompt": ""},
        {"prompt": 3},
    ],
)
def test_a_malformed_prompt_is_refused_with_file_and_line(row, write):
    path = write(row)
    with pytest.raises(ValueError, match=f"^{path}:1: .*prompt"):
        load_prompts([path])


def test_a_byte_order_mark_is_taken_off_and_utf_16_is_refused_by_name(write):
    path = write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_jsonl(path) == [(f"{path}:1", GOOD)]
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(ValueError, match=f"^{path}:1: not UTF-8 .*convert the file to UTF-8"):
        read_jsonl(path)


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_file_is_refused(content, tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="empty.jsonl:?1?: .*one (whole|JSON) object a line"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    for path, says in (
        (tmp_path / "absent.jsonl", "cannot be read .*give an existing file"),
        (tmp_path, "not a plain file"),
    ):
        with pytest.raises(ValueError, match=f"^{path}: {says}"):
            read_jsonl(path)


def test_examples_that_are_too_long_are_left_out_and_counted_on_standard_error(tokenizer, write, capsys):
    path = write(GOOD, {"prompt": "hi" * 50, "completion": "hi"}, {"prompt": "hi", "completion": "hi" * 50})
    assert len(load_examples([path], tokenizer, 9, SFT(max_length=9))) == 1  # 9 tokens exactly
    assert (
        capsys.readouterr().err
        == f"{path}: 2 of 3 examples are longer than --max-length 9 tokens and are left out; the first:"
        f" {path}:2\n"
    )
    assert len(load_examples([path], tokenizer, 1000, SFT())) == 3
    assert capsys.readouterr().err == ""


def test_a_pair_is_left_out_when_either_side_is_too_long(tokenizer, write, capsys):
    path = write(
        {"prompt": "hi", "chosen": "hi" * 50, "rejected": "!"},
        {"prompt": "hi", "chosen": "!", "rejected": "hi" * 50},
        {"prompt": "hi", "chosen": "!", "rejected": "hi"},
    )
    assert len(load_pairs([path], tokenizer, 9, SFT())) == 1
    assert "2 of 3 pairs are longer than the model's 9 positions" in capsys.readouterr().err


def test_data_of_which_nothing_fits_is_refused(tokenizer, write):
    with pytest.raises(
        ValueError,
        match=(
            "nothing to train on is left of 1 examples: 1 of 1 examples are longer than --max-length 8 tokens"
        ),
    ):
        load_examples([write(GOOD)], tokenizer, 8, SFT(max_length=8))
    with pytest.raises(
        ValueError,
        match="nothing to train on is left of 1 pairs: 1 of 1 pairs are longer than the model's 8 positions",
    ):
        load_pairs([write({"prompt": "hi", "chosen": "hi", "rejected": "!"})], tokenizer, 8, SFT())


# ---- batches -----------------------------------------------------------------------------------------------

LANGUAGES = ["ar", "fr", "other"]


def numbered(lengths):
    """Examples that carry their number as second token."""
    return [
        Example(np.array([BOS, i] + [HI] * (n - 2), np.int32), np.arange(n) > 0, LANGUAGES[i % 3])
        for i, n in enumerate(lengths)
    ]


def test_masks_come_from_lengths_and_not_from_ids(tokenizer, write):
    """With pad = end of turn, a mask made by comparing ids would hide every end token, and the model would
    never learn to stop."""
    path = write(GOOD, {"prompt": "hi", "completion": "hi hi hi!"})
    examples = load_examples([path], tokenizer, 64, SFT())
    for pad_id in (tokenizer.end_of_turn_id, tokenizer.pad_id, HI):
        batch = collate(examples, pad_id)
        for row, mask, example in zip(batch.input_ids, batch.mask, examples):
            assert row[mask].tolist() == supervised(example) and row[mask][-1] == tokenizer.end_of_turn_id
            assert (row[len(example.ids):] == pad_id).all()
        assert batch.lengths.tolist() == [len(e.ids) for e in examples]
        assert batch.count == sum(e.mask.sum() for e in examples) == batch.mask.sum()


def test_a_padded_batch_is_exactly_this():
    batch = collate(
        [
            Example(np.array([5, 7, 9]), np.array([False, True, True]), "tlh"),
            Example(np.array([5]), np.array([False]), "ar"),
        ],
        slots=("ar", "fr", "tlh", "other"),
    )
    assert (
        batch.input_ids.tolist() == [[5, 7, 9] + [0] * 13, [5] + [0] * 15]
        and batch.input_ids.dtype == torch.int64
    )
    assert batch.mask.tolist() == [[False, True, True] + [False] * 13, [False] * 16]
    assert (batch.count, batch.num_tokens, batch.languages.tolist()) == (2, 4, [2, 0])


def test_pairs_stand_chosen_first_and_keep_their_own_reference():
    pairs = [
        Pair(*numbered([4, 6]), ref_logps=np.array([-1.0, -2.0])),
        Pair(*numbered([3, 3]), ref_logps=np.array([-3.0, -4.0])),
    ]
    batch = collate_pairs(pairs)
    assert batch.lengths.tolist() == [4, 3, 6, 3] and batch.count == 2
    assert batch.ref_logps.tolist() == [[-1.0, -3.0], [-2.0, -4.0]]


def test_sums_by_language_put_each_row_where_its_language_is():
    examples = numbered([3, 4, 5, 6])                                   # ar fr other ar
    assert slots_of(examples) == slots_of(examples[::-1]) == ("ar", "fr", "other")
    batch = collate(examples, slots=("ar", "de", "fr", "other"))
    out = by_language(batch, torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1, 1, 1, 3]))
    assert out.tolist() == [[9.0, 0.0, 2.0, 4.0], [4.0, 0.0, 1.0, 1.0]]


def test_an_encoded_example_of_one_turn_equals_the_loaded_one(tokenizer, write):
    messages = [user("hi"), assistant("hi!")]
    [loaded] = load_examples([write({"messages": messages})], tokenizer, 64, SFT())
    encoded = encode_example(tokenizer, messages, {})
    assert loaded.ids.tolist() == encoded.ids.tolist() and loaded.mask.tolist() == encoded.mask.tolist()


# ---- the order ---------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(0).integers(2, 60, 103)


@contextmanager
def as_rank(rank, num_ranks):
    """Be one rank of several without the others: torch's own fake process group, whose collectives do
    nothing."""
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("batch_size", [1, 8, 103])
def test_every_example_comes_exactly_once_an_epoch(batch_size):
    sampler = Sampler(LENGTHS, batch_size, seed=3)
    for epoch in range(3):
        assert sorted(sampler.take(epoch * 103, 103)) == list(range(103))


def test_epochs_and_seeds_have_orders_of_their_own():
    a, b = Sampler(LENGTHS, 8, seed=3), Sampler(LENGTHS, 8, seed=4)
    assert a.take(0, 103).tolist() != a.take(103, 103).tolist()
    assert a.take(0, 103).tolist() != b.take(0, 103).tolist()


def test_the_order_is_a_pure_function_of_seed_and_position():
    """Stopped and resumed twice, over epoch borders, in any order of asking: the same examples."""
    whole = Sampler(LENGTHS, 8, seed=3).take(0, 400)
    for cut in (1, 64, 103, 206, 311):
        fresh = Sampler(LENGTHS, 8, seed=3)
        assert fresh.take(cut, 400 - cut).tolist() == whole[cut:].tolist()
        assert fresh.take(0, cut).tolist() == whole[:cut].tolist()
    parts = [Sampler(LENGTHS, 8, seed=3).take(start, 8) for start in range(0, 400, 8)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_neighbours_have_similar_lengths():
    """Padding is what this order is for: a batch's lengths spread less than those of a random batch."""
    lengths = np.random.default_rng(1).integers(2, 500, 1024)
    order = Sampler(lengths, 8, seed=0).take(0, 1024)
    spread = lambda indices: np.ptp(lengths[indices].reshape(-1, 8), axis=1).mean()
    assert spread(order) < 0.2 * spread(np.random.default_rng(2).permutation(1024))


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2])
def test_the_slices_of_1_2_and_4_ranks_put_back_together_are_the_same_order(micro_batch_size):
    items, settings = numbered(LENGTHS), SFT(
        batch_size=8, micro_batch_size=micro_batch_size, seed=5, epochs=2.0
    )
    orders = []
    for num_ranks in (1, 2, 4):
        steps = [[None] * 8 for _ in range(26)]
        for rank in range(num_ranks):
            with as_rank(rank, num_ranks):
                num_steps, batches = make_batches(
                    items, lambda micro: [int(e.ids[1]) for e in micro], settings
                )
                assert num_steps == 26  # 206 examples in steps of 8, the last one reaching into epoch 3
                for step in range(num_steps):
                    micros = batches(step)
                    assert all(len(micro) == (micro_batch_size or 8 // num_ranks) for micro in micros)
                    steps[step][rank::num_ranks] = sum(micros, [])
        orders.append(steps)
    assert orders[0] == orders[1] == orders[2]
    assert sum(orders[0], []) == Sampler(LENGTHS, 8, 5).take(0, 208).tolist()


def test_the_count_of_a_step_does_not_depend_on_ranks_or_micro_batches():
    items, counts = numbered(LENGTHS), []
    for num_ranks, micro in ((1, 0), (1, 1), (2, 2), (4, 1)):
        total = 0
        for rank in range(num_ranks):
            with as_rank(rank, num_ranks):
                _, batches = make_batches(items, collate, SFT(batch_size=8, micro_batch_size=micro))
                total += sum(batch.count for batch in batches(4))
        counts.append(total)
    assert len(set(counts)) == 1


def test_max_steps_overrules_epochs():
    items = numbered(LENGTHS)
    assert make_batches(items, collate, SFT(batch_size=8, max_steps=5, epochs=9.0))[0] == 5
    assert make_batches(items, collate, SFT(batch_size=8, epochs=1.0))[0] == 13


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ValueError, match="7 examples are fewer than one batch of 8; lower --batch-size or give more data"
    ):
        make_batches(numbered(LENGTHS[:7]), collate, SFT(batch_size=8))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_an_evaluation_visits_every_example_once_over_all_ranks(num_ranks):
    items, seen = numbered(LENGTHS), []
    for rank in range(num_ranks):
        with as_rank(rank, num_ranks):
            for indices, batch in batches_in_order(items, collate, size=10):
                assert batch.input_ids[:, 1].tolist() == indices
                seen += indices
    assert sorted(seen) == list(range(103))


def test_a_rank_without_items_gets_one_batch_that_stands_for_none():
    """A sharded forward takes all ranks, so a rank that has nothing to evaluate must have something to
    run."""
    with as_rank(3, 4):
        [(indices, batch)] = batches_in_order(numbered(LENGTHS[:3]), collate)
    assert indices == [] and len(batch.input_ids) == 1
    assert batches_in_order([], collate) == []


def test_a_batch_moves_its_tensors_and_keeps_its_count():
    batch = replace(collate(numbered([3, 5])), advantages=torch.ones(2))
    moved = batch.to("meta")
    assert moved.count == batch.count and {
        t.device.type for t in vars(moved).values() if torch.is_tensor(t)
    } == {"meta"}


def test_prompts_of_every_shape_can_be_trained_on_once_answered(tmp_path):
    """Prompts in Aya's {"inputs"} or in messages, answered in the pipeline, were refused (or trained on
    their old answer) as SFT rows."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    shapes = [
        {"inputs": "hello", "targets": "old"},
        {"messages": turns + [{"role": "assistant", "content": "old"}]},
        {"prompt": "hello", "id": 7},
        {"prompt": turns},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in shapes), encoding="utf-8")
    for row, expected in zip(load_prompts([path]), ([turns[1]], turns, [turns[1]], turns)):
        assert row["prompt_messages"] == expected
        assert conversation_of({**row, "completion": "new"}, "here")[0] == expected + [
            {"role": "assistant", "content": "new"}
        ]


def test_a_batch_says_which_rows_begin_alike_and_for_how_long():
    """Only examples with one prompt_key are compared: a pair's two sides, an example that was drawn twice."""
    def example(ids, key):
        return Example(np.array(ids, np.int32), np.arange(len(ids)) > 2, "other", prompt_key=key)
    pairs = [
        Pair(example([1, 2, 3, 4], "a:1"), example([1, 2, 3, 5, 6], "a:1")),
        Pair(example([1, 2, 3, 7, 8], "a:2"), example([1, 2, 3, 7], "a:2")),
    ]
    assert collate_pairs(pairs).repeats.tolist() == [[0, 1, 0, 1], [0, 0, 3, 4]]
    assert collate([pairs[0].chosen, pairs[1].chosen]).repeats is None
    assert collate([pairs[0].chosen, pairs[1].chosen, pairs[0].chosen]).repeats.tolist() == [
        [0, 1, 0],
        [0, 0, 4],
    ]
    assert collate([example([1, 2], ""), example([1, 2], "")]).repeats is None


def test_examples_of_one_line_with_different_keys_share_no_prompt(tokenizer, write):
    """The line of the file, which messages name, was the key as well."""
    twins = [
        Example(np.array([1, 2, 3, 4]), np.arange(4) > 2, "other", "a:1", prompt_key=key) for key in "xy"
    ]
    assert collate(twins).repeats is None and collate(twins).where == ("a:1", "a:1")
    twins[1].prompt_key = "x"
    assert collate(twins).repeats.tolist() == [[0, 0], [0, 4]]
    [pair] = load_pairs([write({"prompt": "hi", "chosen": "hi", "rejected": "!"})], tokenizer, 64, SFT())
    assert collate_pairs([pair]).repeats.tolist() == [[0, 0], [0, len(tokenizer.encode_prompt("hi"))]]
