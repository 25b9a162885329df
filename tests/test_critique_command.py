"""generate.py critique: critiques of pairs, of completions and of candidates, asked in the row's language."""

import json

import pytest
from bad_server import Server, reply
from small import language_model, reward_model, tokenizer

import generate
from aya_min import generate_critique, generate_pool, weights
from aya_min.config import Reading
from aya_min.files import write_jsonl
from aya_min.language_id import identify
from aya_min.languages import LANGUAGES
from aya_min.reward import score_texts

PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no", "language": "de", "id": "p"}
ANSWER = {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                     {"role": "user", "content": "c"}], "completion": "d", "label": False}
POOL = {"prompt": "hi", "language": "tlh", "candidates": [{"teacher": "A", "completion": "yes"},
                                                          {"teacher": "B", "completion": ""}]}
LINE = "critique --model C --answers F.jsonl --out G.jsonl --max-new-tokens 8 --temperature 1"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights.save(tmp_path / "C", language_model(), tokenizer())
    write_jsonl(tmp_path / "F.jsonl", [PAIR, ANSWER, POOL])
    return tmp_path


@pytest.fixture
def call(here, in_process):
    return lambda line: in_process(generate, *line.split())


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# ---- the texts that ask ------------------------------------------------------------------------------------

def test_every_language_has_a_text_with_one_place_for_the_prompt_and_one_for_the_answer():
    texts = generate_critique.prompts()
    assert texts.keys() == LANGUAGES.keys() and len(set(texts.values())) == len(LANGUAGES)
    for text in texts.values():
        assert text.count("{prompt}") == text.count("{answer}") == 1 and text.count("{") == 2


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_text_of_a_language_is_in_that_language(code):
    text = generate_critique.prompts()[code].replace("{prompt}", "").replace("{answer}", "")
    # Malay and Indonesian share most of their words
    assert identify(text)[0] in ({"id", "ms"} if code == "id" else {code})


def test_an_answer_that_spells_a_place_is_not_filled_in():
    text = generate_critique.request([{"role": "user", "content": "say {answer}"}], "{prompt}", "en")
    assert "\nsay {answer}\n" in text and "\n{prompt}\n" in text


def test_what_is_asked_of_pairs_completions_and_candidates(here, capsys):
    asked = generate_critique.requests_of(here / "F.jsonl", Reading(), tokenizer())
    assert [(each["prompt_where"].split(":")[-1].split(",")[0], each["key"]) for each in asked] == [
        ("1", "chosen_critique"), ("1", "rejected_critique"), ("2", "critique"), ("3", "critique"),
        ("3", "critique")]
    assert "Anfrage:\nhi\n\nAntwort:\nno\n" in asked[1]["prompt"]
    assert "Request:\nUser: a\n\nAssistant: b\n\nUser: c\n\nAnswer:\nd\n" in asked[2]["prompt"]
    assert "2 of 3 rows are asked in English" in capsys.readouterr().err


def test_a_region_is_asked_in_its_language_and_what_is_asked_in_english_is_told(capsys):
    """pt-BR was asked in English, and counted with those that have no text."""
    messages = [{"role": "user", "content": "oi"}]
    assert generate_critique.request(messages, "a", "pt-BR") == generate_critique.request(messages, "a", "pt")
    assert generate_critique.in_english(["pt-BR", "en", "tlh", "tlh", None], "rows") == [
        "3 of 5 rows are asked in English, as there is no text in their language (none 1, tlh 2)"]
    assert generate_critique.in_english(["pt-BR", "en"], "rows") == []


# ---- the command -------------------------------------------------------------------------------------------

def test_critiques_are_written_into_pairs_completions_and_candidates(call, here):
    code, out, err = call(LINE)
    assert code == 0, err
    pair, answer, pool = read("G.jsonl")
    assert {**PAIR, "critic": "C"} == {key: pair[key] for key in pair if not key.endswith("_critique")}
    assert pair["chosen_critique"].strip() and pair["rejected_critique"].strip()
    assert answer == {**ANSWER, "critique": answer["critique"], "critic": "C"}
    assert [c["teacher"] for c in pool["candidates"]] == ["A", "B"]
    assert all(c["critique"].strip() for c in pool["candidates"])
    assert "5 critiques" in out and "3 rows, 0 left out" in out
    assert not (here / "G.jsonl.partial").exists()


def test_a_pair_of_which_one_request_is_too_long_is_left_out_and_counted(call, here):
    """It was written with one critique, which `train.py reward` refuses, and counted as whole."""
    (here / "F.jsonl").unlink()
    long = "no " * 600
    write_jsonl(here / "F.jsonl", [PAIR, {**PAIR, "rejected": long}, {**ANSWER, "completion": long}])
    code, out, err = call(f"{LINE} --too-long skip")
    assert code == 0, err
    assert "3 critiques" in out and "1 rows, 2 left out" in out and "the first: F.jsonl:2\n" in out, out
    assert "F.jsonl:2, the request for its rejected_critique" in "".join(err)
    assert [row["id"] for row in read("G.jsonl")] == ["p"]


def test_the_same_command_writes_the_same_critiques_and_never_over_a_file(call, here):
    assert call(LINE)[0] == 0
    assert call(LINE.replace("G.jsonl", "H.jsonl"))[0] == 0
    assert read("G.jsonl") == read("H.jsonl")
    code, _, err = call(LINE)
    assert code == 2 and "G.jsonl exists" in err[-1]


@pytest.mark.parametrize("line, said", [
    ("critique --answers F.jsonl --out G.jsonl", "--model is missing"),
    ("critique --model C --out G.jsonl", "--answers is missing"),
    ("critique --model C --answers F.jsonl", "--out is missing"),
    (f"{LINE} --num-samples 2", "--num-samples does not go with critique"),
    (f"{LINE} --arbiter RM", "--arbiter does not go with critique"),
    (f"{LINE} --prompts F.jsonl", "--prompts does not go with critique"),
    (f"{LINE} --concurrency 2", "--concurrency goes with an endpoint"),
    (LINE.replace("--model C", "--model http://127.0.0.1:1/v1#m") + " --top-k 3", "--top-k: the endpoint"),
])
def test_flags_that_do_not_fit_are_refused_before_anything_is_read(line, said, call):
    code, out, err = call(line)
    assert code == 2 and out == "" and said in err[-1], err


@pytest.mark.parametrize("row, said", [
    ({**PAIR, "chosen_critique": "old"}, "F.jsonl:1: 'chosen_critique' is there already"),
    ({"prompt": "hi", "candidates": ["yes"]}, "F.jsonl:1: 'candidates' must be a list of objects"),
    ({"prompt": "hi"}, "F.jsonl:1: no example in keys"),
    ({**PAIR, "critic": "mine"}, "F.jsonl:1: 'critic' is there already"),
    ({**POOL, "critique": "old"}, "F.jsonl:1: 'critique' is there already"),
    ({"prompt": "hi", "candidates": []}, "F.jsonl:1: 'candidates' is empty; fill it, or remove the line"),
    ({"prompt": "hi", "candidates": None}, "F.jsonl:1: 'candidates' is empty"),
    ({"prompt": "hi", "candidates": 5}, "F.jsonl:1: 'candidates' must be a list of objects"),
    ({"prompt": "hi", "candidates": {"completion": "yes"}}, "F.jsonl:1: 'candidates' must be a list"),
    ({**PAIR, "candidates": [{"completion": "yes"}]}, "F.jsonl:1: 'candidates' and 'chosen' in one row"),
    ({"prompt": "hi", "completion": "yes", "candidates": [{"completion": "no"}]}, "and 'completion' in one"),
    ({"question": "hi", "answer": "yes"}, "no example in keys ['answer', 'question']"),
    ({"prompt": "hi", "completion": "<|END_OF_TURN_TOKEN|>"}, "spell control tokens"),
])
def test_rows_that_cannot_be_criticised_are_refused_with_their_place(row, said, call, here):
    (here / "F.jsonl").unlink()
    write_jsonl(here / "F.jsonl", [row])
    code, out, err = call(LINE)
    assert code == 2 and said in err[-1], err
    assert not (here / "G.jsonl").exists()


def test_a_reward_model_is_no_critic(call, here):
    weights.save(here / "RM", reward_model(), tokenizer())
    code, _, err = call(LINE.replace("--model C", "--model RM"))
    assert code == 2 and "a reward model cannot generate" in err[-1]


def test_critiques_that_are_all_missing_are_refused_with_the_reason_and_the_way_to_ask_anew(call, here):
    """The reason was lost, and as the journal held the answers the same command failed for ever."""
    with Server(lambda body, times: reply("<|im_end|>")) as server:
        code, _, err = call(LINE.replace("--model C", f"--model {server.url}#m"))
    assert code == 2 and "control tokens 5" in err[-1], err
    assert "remove G.jsonl.partial to have it asked anew" in err[-1]


# ---- arbitrage ---------------------------------------------------------------------------------------------

ARBITRAGE = ("--models C D --arbiter RM --critic C --prompts prompts.jsonl --out out.jsonl "
             "--candidates all.jsonl --max-new-tokens 8 --temperature 1 --keep-cut --num-samples 2")


@pytest.fixture
def pool(here):
    weights.save(here / "D", language_model(1), tokenizer())
    judge = reward_model()
    weights.save(here / "plain", judge, tokenizer())
    judge.config.critiques = True
    weights.save(here / "RM", judge, tokenizer())
    write_jsonl(here / "prompts.jsonl",
                [{"prompt": f"hi {i}", "language": "de", "critique": "of an older answer"} for i in range(3)])
    return here


def test_in_arbitrage_each_candidate_is_criticised_and_scored_with_its_critique(call, pool):
    """The scores are those of the reward model on the written candidates with their critiques."""
    code, out, err = call(ARBITRAGE)
    assert code == 0, err
    assert "critiques: 12 of 12 candidates have one" in out
    judge, its_tokenizer = weights.load(pool / "RM")
    for row in read("all.jsonl"):
        assert [c["teacher"] for c in row["candidates"]] == ["C", "C", "D", "D"] and "critique" not in row
        assert row["critic"] == ARBITRAGE.split("--critic ")[1].split()[0]
        texts = [{"prompt": row["prompt"], **c} for c in row["candidates"]]
        assert [c["reward"] for c in row["candidates"]] == pytest.approx(
            score_texts(judge, its_tokenizer, texts), abs=1e-4)


def test_arbitrage_refuses_prompts_with_a_critic_of_their_own_before_it_asks(call, pool):
    file = ARBITRAGE.split("--prompts ")[1].split()[0]
    rows = read(file)
    write_jsonl(pool / file, [rows[0], {**rows[1], "critic": "mine"}, *rows[2:]])
    code, out, err = call(ARBITRAGE)
    assert code == 2 and out == "" and f"{file}:2: 'critic' is there already" in err[-1], err


def test_arbitrage_that_was_stopped_after_the_critiques_resumes_with_them(call, pool, monkeypatch):
    assert call(ARBITRAGE)[0] == 0
    first = read("all.jsonl")
    for name in ("out.jsonl", "all.jsonl"):
        (pool / name).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(generate_pool, "score_texts", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(ARBITRAGE)
    with monkeypatch.context() as patched:
        patched.setattr(generate, "answer_rows", lambda *_, **__: 1 / 0)          # nothing is sampled again
        code, _, err = call(ARBITRAGE)
    assert code == 0 and read("all.jsonl") == first
    assert any("resumes: 6 of 6 prompts" in line for line in err)


def test_a_critique_stays_with_its_answer_when_another_start_asks_for_others(call, pool, monkeypatch):
    """The journal kept critiques by their number. Where an endpoint answered a prompt that it had left out,
    or a language guard dropped an answer, all later candidates got the critique of another one."""
    def teacher(body, times):
        content = body["messages"][-1]["content"]
        late = content == "hi 0" and not is_back
        return reply("" if late else f"answer to {content}")

    def critic(body, times):
        return reply("of " + body["messages"][-1]["content"].split("Antwort:\n")[1].split("\n")[0])
    is_back = False
    with Server(teacher) as one, Server(critic) as two:
        line = ARBITRAGE.replace("C D", f"C {one.url}#t").replace("--critic C", f"--critic {two.url}#c")
        with monkeypatch.context() as patched:
            patched.setattr(generate_pool, "score_texts", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call(line)
        is_back, asked_before = True, len(two.asked)
        code, _, err = call(line)
        assert code == 0, err
    found = [c for row in read("all.jsonl") for c in row["candidates"] if c["teacher"].startswith("http")]
    assert len(found) == 6 and {c["critique"] for c in found} == {f"of answer to hi {i}" for i in range(3)}
    assert all(c["critique"] == f"of {c['completion']}" for c in found)
    assert len(two.asked) == asked_before + 2               # the others were there


@pytest.mark.parametrize("large, said", [
    ("critic", "room in RM (512 positions, --max-new-tokens 8)"),
    ("arbiter", "room in critic (512 positions, --max-new-tokens 8) for the critic"),
])
def test_a_prompt_without_room_for_a_critique_is_refused_before_any_teacher_answers(large, said, call, pool,
                                                                                    monkeypatch):
    """The arbiter or the critic refused it when all teachers had answered."""
    positions = {name: 1024 if name == large else 512 for name in ("critic", "arbiter")}
    weights.save(pool / "critic", language_model(2, max_position_embeddings=positions["critic"]), tokenizer())
    if large == "arbiter":
        judge = reward_model(max_position_embeddings=1024)
        judge.config.critiques = True
        weights.save(pool / "large", judge, tokenizer())
    text = "hi"
    while len(tokenizer().encode_prompt(text)) < 512 - 8 - 4:
        text += " a"
    (pool / "prompts.jsonl").unlink()
    write_jsonl(pool / "prompts.jsonl", [{"prompt": text, "language": "de"}])
    monkeypatch.setattr(generate, "answer_rows", lambda *_, **__: 1 / 0)
    line = ARBITRAGE.replace("--critic C", "--critic critic")
    code, out, err = call(line.replace("--arbiter RM", "--arbiter large") if large == "arbiter" else line)
    assert code == 2 and out == "" and said in err[-1], err


@pytest.mark.parametrize("before, after, said", [
    (" --critic C", "", "was trained with critiques; give --critic C"),
    ("--arbiter RM", "--arbiter plain", "was trained without critiques and reads none; leave --critic out"),
    ("--arbiter RM", "--route random", "--critic writes critiques for an arbiter to read"),
    ("--critic C", "--critic plain", "plain: a reward model cannot generate"),
])
def test_an_arbiter_and_a_critic_that_do_not_fit_are_refused_before_any_work(before, after, said, call, pool):
    code, out, err = call(ARBITRAGE.replace(before, after))
    assert code == 2 and out == "" and said in err[-1], err
    assert not (pool / "out.jsonl.partial").exists()
