"""The server, asked over real sockets: its answers are those of sampling.py, whole or streamed, alone or
beside others; a client that leaves, sends nonsense, or sends nothing costs a bounded time and space."""

import asyncio
import http.client
import json
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from family_templates import tokenizer_of
from small import ROOT, language_model, tokenizer

import generate as generate_command
from aya_min import serve, weights
from aya_min.sampling import answer_rows, cut_at, generate
from aya_min.serve import Server, listen
from aya_min.serve_batch import Batch, Request
from aya_min.serve_request import Text, token_as_json
from aya_min.world import questions

DEFAULTS = dict(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=24)
PROMPTS = [q["prompt"] for q in questions("test", 40, 0)][::3]
MANY = 19_000           # tokens of an answer that does not end within a test


@contextmanager
def running(*models):
    """A server of these models, m0 and so on, in a thread of this process. Yields its port."""
    batches = {f"m{i}": model if isinstance(model, Batch) else Batch(f"m{i}", model, tokenizer(), 8, 20_000)
               for i, model in enumerate(models)}
    bound = listen("127.0.0.1", 0)
    tasks, ready = [], threading.Event()

    async def run():
        tasks.extend([asyncio.get_running_loop(), asyncio.current_task()])
        ready.set()
        try:
            await Server(batches, DEFAULTS, seed=0).run(bound)
        except asyncio.CancelledError:
            pass
    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    ready.wait()
    try:
        port = bound.getsockname()[1]
        until(lambda: can_connect(port))
        yield port
    finally:
        tasks[0].call_soon_threadsafe(tasks[1].cancel)
        thread.join()
        bound.close()


def can_connect(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def until(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model():
    return language_model(max_position_embeddings=20_000)


@pytest.fixture(scope="module")
def port(model):
    with running(model, language_model(1, max_position_embeddings=20_000)) as port:
        yield port


def call(port, method, path, body=None, **headers):
    """(status, headers, body as bytes) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    made = response.status, response.headers, response.read()
    connection.close()
    return made


def post(port, prompt="red?", **fields):
    fields.setdefault("messages", [{"role": "user", "content": prompt}])
    return call(port, "POST", "/v1/chat/completions", json.dumps(fields))


def ask(port, prompt="red?", **fields):
    """The JSON of an answer that must come."""
    status, headers, body = post(port, prompt, **fields)
    assert status == 200, body
    assert headers["Content-Type"] == "application/json"
    return json.loads(body)


def events_of(body):
    *events, last = body.decode().split("\n\n")
    assert last == "" and all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def streamed(port, prompt="red?", **fields):
    """The answers of a stream as a whole answer's choices: [{"message", "finish_reason", "logprobs"}, ...],
    and its chunks."""
    status, headers, body = post(port, prompt, stream=True, **fields)
    assert (status, headers["Content-Type"]) == (200, "text/event-stream"), body
    *events, done = events_of(body)
    assert done == "[DONE]"
    chunks, choices = [json.loads(event) for event in events], {}
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    for chunk in chunks:
        for choice in chunk["choices"]:
            i, delta = choice["index"], choice["delta"]
            if i not in choices:
                assert delta == {"role": "assistant", "content": ""}
                choices[i] = {"index": i, "message": delta, "logprobs": None, "finish_reason": None}
                continue
            whole = choices[i]
            assert whole["finish_reason"] is None, "news after the end"
            whole["message"]["content"] += delta.get("content", "")
            whole["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"]:
                whole["logprobs"] = whole["logprobs"] or {"content": []}
                whole["logprobs"]["content"] += choice["logprobs"]["content"]
    return [choices[i] for i in sorted(choices)], chunks


def own_answers(model, prompt, num_samples=1, **settings):
    [group] = answer_rows(model, tokenizer(), [{"prompt": prompt}], num_samples, **settings)
    return group


# ---- answers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", PROMPTS[:6])
def test_an_answer_is_sampling_pys_own_whole_and_streamed(prompt, port, model):
    [own] = own_answers(model, prompt, max_new_tokens=40, temperature=0)
    got = ask(port, prompt, max_tokens=40, temperature=0)
    [choice] = got["choices"]
    assert choice == {"index": 0, "message": {"role": "assistant", "content": own["completion"]},
                      "logprobs": None, "finish_reason": own["finish_reason"]}
    read, new = len(tokenizer().encode_prompt(prompt)), len(own["ids"])
    assert got["usage"] == {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
    assert (got["model"], got["object"]) == ("m0", "chat.completion")
    choices, chunks = streamed(port, prompt, max_tokens=40, temperature=0,
                               stream_options={"include_usage": True})
    assert choices == [choice]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == got["usage"]


def test_seed_and_samples_and_filters_are_those_of_generate(port, model):
    settings = dict(temperature=0.9, top_p=0.8, top_k=30, seed=7)
    own = own_answers(model, PROMPTS[0], 3, max_new_tokens=30, **settings)
    assert len({a["completion"] for a in own}) == 3
    got = ask(port, PROMPTS[0], max_completion_tokens=30, n=3, **settings)
    assert [c["message"]["content"] for c in got["choices"]] == [a["completion"] for a in own]
    assert got["usage"]["completion_tokens"] == sum(len(a["ids"]) for a in own)
    choices, _ = streamed(port, PROMPTS[0], max_tokens=30, n=3, **settings)
    assert choices == got["choices"]


def test_without_a_seed_answers_differ_and_without_a_limit_the_commands_holds(port):
    first, second = (ask(port, temperature=1.0) for _ in range(2))
    assert first["choices"] != second["choices"] and first["id"] != second["id"]
    assert max(first["usage"]["completion_tokens"], second["usage"]["completion_tokens"]) <= 24


@pytest.mark.parametrize("as_list", [False, True])
def test_an_answer_ends_before_a_stop_string_which_a_stream_never_shows(as_list, port, model):
    [own] = own_answers(model, PROMPTS[1], max_new_tokens=60, temperature=0)
    text = own["completion"]
    stop = text[20:23]
    [cut] = own_answers(model, PROMPTS[1], max_new_tokens=60, temperature=0, stop_strings=[stop])
    asked = dict(max_tokens=60, temperature=0, stop=["no such text", stop] if as_list else stop)
    [choice] = ask(port, PROMPTS[1], **asked)["choices"]
    assert choice["message"]["content"] == cut["completion"] == text[:text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert streamed(port, PROMPTS[1], **asked)[0] == [choice]


@pytest.mark.parametrize("stop", [None, []])
def test_no_stop_is_none_and_empty_fields_are_absent(stop, port):
    asked = dict(max_tokens=8, temperature=0, seed=1)
    plain = ask(port, **asked)["choices"]
    empty = ask(port, stop=stop, stream_options=None, n=None, top_p=None, logprobs=None, tools=[],
                logit_bias={}, response_format={"type": "text"}, frequency_penalty=0, tool_choice="auto",
                **asked)
    assert empty["choices"] == plain


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_log_probs_are_the_models_at_temperature_1(temperature, port, model):
    asked = dict(max_tokens=20, temperature=temperature, seed=3, logprobs=True, top_logprobs=4, top_k=50)
    [choice] = ask(port, PROMPTS[2], **asked)["choices"]
    assert streamed(port, PROMPTS[2], **asked)[0] == [choice]
    own = own_answers(model, PROMPTS[2], max_new_tokens=20, temperature=temperature, seed=3, top_k=50)[0]
    prompt = tokenizer().encode_prompt(PROMPTS[2])
    with torch.no_grad():
        logps = model(torch.tensor([prompt + own["ids"]]))[0, len(prompt) - 1:-1].log_softmax(-1)
    text_ids = [i for i in own["ids"] if i not in tokenizer().stop_ids]
    entries = choice["logprobs"]["content"]
    assert len(entries) == len(text_ids)
    for entry, token, row in zip(entries, text_ids, logps):
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
        likely = row.topk(4)
        got = [e["logprob"] for e in entry["top_logprobs"]]
        assert got == pytest.approx(likely.values.tolist(), abs=1e-4)
        assert [e["token"] for e in entry["top_logprobs"]] == [
            tokenizer().decode([i]) or tokenizer().bpe.id_to_token(i) for i in likely.indices.tolist()]
    whole = bytes(b for entry in entries for b in entry["bytes"] or ())
    assert whole.decode("utf-8", "replace") == choice["message"]["content"]


def test_system_turns_earlier_turns_and_parts_are_what_the_template_writes(port, model):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "red?"},
                {"role": "assistant", "content": "blue"}, {"role": "user", "content": "two"}]
    halves = [{"type": "text", "text": "re"}, {"type": "text", "text": "d?"}]
    parts = [{**m, "content": halves} if m["content"] == "red?" else m for m in messages]
    [[own]] = answer_rows(model, tokenizer(), [{"prompt_messages": messages}], 1, 16, temperature=0)
    for said in (messages, parts, [{**messages[0], "role": "developer"}, *messages[1:]]):
        [choice] = ask(port, messages=said, max_tokens=16, temperature=0)["choices"]
        assert choice["message"]["content"] == own["completion"]


def test_requests_at_once_are_answered_as_each_alone(port):
    """With different settings, lengths, limits and models, and more answers than rows."""
    rng = random.Random(0)
    asked = [dict(prompt=rng.choice(PROMPTS), model=rng.choice(["m0", "m1"]), n=rng.choice([1, 1, 3]), seed=i,
                  temperature=rng.choice([0, 0.5, 1.0]), top_p=rng.choice([1.0, 0.9]),
                  max_tokens=rng.randint(1, 50), logprobs=rng.random() < 0.3, stop=rng.choice([None, "a"]))
             for i in range(24)]
    alone = [ask(port, **one)["choices"] for one in asked]
    together = [None] * len(asked)

    def one(i):
        how = streamed if i % 2 else lambda *a, **k: [ask(*a, **k)["choices"]]
        together[i] = how(port, **asked[i])[0]
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_request_joins_the_batch_while_another_runs_and_gives_its_row_back(model):
    def request(prompt, limit):
        return Request(tokenizer().encode_prompt(prompt), 1, limit, (0, 0, 1.0, 0.0), 0, (), None, True)
    batch = Batch("m", model, tokenizer(), 2, 400)
    first, second, third = request("red?", 30), request(PROMPTS[3], 8), request("two", 20)
    with torch.inference_mode():
        batch.add(first)
        for _ in range(4):
            batch.step()
        assert len(first.rows[0].ids) == 5
        batch.add(second)
        batch.add(third)
        batch.step()
        assert [row.prompt for row in batch.rows] == [first, second] and len(third.rows[0].ids) == 1
        first.is_left = True
        batch.step()
        batch.step()
        assert [row.prompt for row in batch.rows] == [second, third] and len(first.rows[0].ids) == 6
        while batch.is_busy():
            batch.step()
    for asked, prompt, limit in ((second, PROMPTS[3], 8), (third, "two", 20)):
        [[own]] = generate(model, [tokenizer().encode_prompt(prompt)], 1, limit, 0,
                           stop_ids=tokenizer().stop_ids)
        assert (asked.rows[0].ids, asked.rows[0].finish_reason) == (own.ids, own.finish_reason)


def told(ids, stops=(), tokenizer=tokenizer):
    """What Text tells as tokens arrive one by one, piece by piece."""
    request = Request([1], 1, len(ids), (0, 0, 1.0, 0.0), 0, tuple(stops), None, True)
    batch, pieces = type("", (), {"tokenizer": tokenizer(), "stop_ids": set()}), []
    text = Text(request.rows[0], batch)
    for i, token in enumerate(ids):
        request.rows[0].ids.append(token)
        if i == len(ids) - 1:
            request.rows[0].finish_reason = "length"
        pieces.append(text.take()[0])
    return pieces


def test_a_stream_sends_whole_characters_only():
    text = "नमस्ते 世界, שלום 🙂👩‍🚀 tiếng Việt\n"
    pieces = told(tokenizer().encode(text))
    assert "".join(pieces) == text and len(pieces) > len(text)      # most tokens are parts of characters
    assert "\ufffd" not in "".join(pieces) and "🙂" in pieces
    broken = tokenizer().encode("a🙂")[:-1]
    assert "".join(told(broken)) == tokenizer().decode(broken) == "a\ufffd"


@pytest.mark.parametrize("name", ["gemma 2", "mistral 0.3", "nemo"])
def test_a_stream_of_another_family_is_its_text_and_log_probs_hold_its_bytes(name):
    """Of a token <0xF0> the five letters were told as its bytes, and spaces that begin a token were lost."""
    other, text = tokenizer_of(name), "red and blue 🙂 世界"
    ids = other.encode(text)
    pieces = told(ids, tokenizer=lambda: other)
    assert "".join(pieces) == other.decode(ids) and not any("\ufffd" in piece for piece in pieces)
    entries = [token_as_json(i, -1.0, other) for i in ids]
    assert bytes(b for entry in entries for b in entry["bytes"]).decode().strip() == text


@pytest.mark.parametrize("seed", range(8))
def test_no_piece_of_a_stop_string_is_ever_sent(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("aab é世") for _ in range(60))
    stops = ["".join(rng.choice("aab é世") for _ in range(rng.randint(1, 5))) for _ in range(2)]
    ids = tokenizer().encode(text)
    end = next(n for n in range(1, len(ids) + 1)
               if n == len(ids) or any(s in tokenizer().decode(ids[:n]) for s in stops))
    assert "".join(told(ids[:end], stops)) == cut_at(tokenizer().decode(ids[:end]), stops)


# ---- clients that leave, send nonsense, or too much --------------------------------------------------------

def in_use(port):
    about = json.loads(call(port, "GET", "/health")[2])["models"]["m0"]
    return about["rows_in_use"], about["open"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(stream, port):
    with socket.create_connection(("127.0.0.1", port)) as client:
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": MANY, "n": 3,
                           "temperature": 1.0, "seed": 1, "stream": stream, "top_k": 20}).encode()
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: in_use(port)[0])
    until(lambda: in_use(port) == (0, 0), 5)


MISTAKES = {
    '{"messages": ': (400, "not JSON"),
    "[]": (400, "a JSON list, not an object"),
    "\x00\xff": (400, "not UTF-8"),
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': (400, "half a surrogate pair"),
    '{"messages": [{"role": "user", "content": "a\\u0000"}]}': (400, "holds a NUL"),
    '{"temperature": NaN}': (400, "temperature"),
    "[" * 5000: (400, "not JSON"),
    '{"messages": []}': (400, "'messages' must be a non-empty list"),
    '{"messages": "hello"}': (400, "'messages' must be a non-empty list"),
    '{"prompt": "x"}': (400, "prompt 'x' cannot be honoured"),
    '{}': (400, "'messages' must be a non-empty list"),
    '{"messages": [{"role": "tool", "content": "x"}]}': (400, "got 'tool': no tools are called here"),
    '{"messages": [{"role": "king", "content": "x"}]}': (400, "got 'king'"),
    '{"messages": [{"role": "user", "content": ""}]}': (400, "'messages[0].content' is empty"),
    '{"messages": [{"role": "user", "content": null}]}': (400, "'messages[0].content' must be a string"),
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': (400, "type 'image_url'"),
    '{"messages": [{"role": "assistant", "content": "x"}]}': (400, "user and assistant must alternate"),
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}': (
        400, "must end with a user turn"),
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1]}]}': (
        400, "tool_calls' cannot be honoured"),
}
WRONG = {
    "temperature": [-1, "1", True, 1e-9, 1001], "top_p": [0, 1.5], "n": [0, 129, 1.5, "2"], "seed": [-1, 1.5],
    "max_tokens": [0, -3, 2.5], "stop": ["", [""], 5, ["a"] * 17, ["a" * 201], {}], "stream": [1, "true"],
    "top_logprobs": [5, 21], "logprobs": [3], "stream_options": [True], "response_format": [{"type": "json"}],
    "tools": [[{"type": "function"}]], "functions": [[{}]], "logit_bias": [{"5": 1}], "system": ["be kind"],
    "presence_penalty": [0.5], "tool_choice": ["required"], "chat_template": ["x"],
    "continue_final_message": [True], "echo": [True], "best_of": [2], "reasoning_effort": ["low"]}


@pytest.mark.parametrize("body", MISTAKES, ids=lambda body: body[:40])
def test_a_body_that_cannot_be_honoured_is_a_400_that_names_it(body, port):
    status, says = MISTAKES[body]
    got, _, data = call(port, "POST", "/v1/chat/completions", body.encode("latin-1"))
    error = json.loads(data)["error"]
    assert (got, error["type"]) == (status, "invalid_request_error") and says in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_a_400_that_names_its_field(name, port):
    for value in WRONG[name]:
        status, _, body = post(port, **{name: value})
        assert status == 400 and name in json.loads(body)["error"]["message"], (value, body)


def test_a_prompt_that_is_too_long_is_a_400_with_the_numbers(port):
    status, _, body = post(port, "word " * 30_000)
    error = json.loads(body)["error"]
    assert status == 400 and error["code"] == "context_length_exceeded"
    length = len(tokenizer().encode_prompt("word " * 30_000))
    assert f"the prompt has {length} tokens; m0 holds 20000" in error["message"]
    status, _, body = post(port, max_tokens=20_000)
    assert status == 400 and "max_tokens 20000; m0 holds 20000" in json.loads(body)["error"]["message"]


def test_limits_that_differ_and_millions_of_log_probs_are_refused(port):
    """max_tokens was ignored beside the other; 4 million log-probs kept all other clients waiting."""
    status, _, body = post(port, max_tokens=5, max_completion_tokens=6)
    assert status == 400 and b"max_completion_tokens 6 and max_tokens 5 differ" in body
    assert ask(port, max_tokens=3, max_completion_tokens=3)["choices"]
    status, _, body = post(port, n=100, max_tokens=200, logprobs=True, top_logprobs=10)
    assert status == 400 and b"are 220000 log-probs, at most 200000" in body


def test_fields_that_nothing_knows_are_ignored_and_told_of_once(port, capfd):
    for _ in range(2):
        ask(port, user="me", metadata={"a": 1}, max_tokens=1, store=False,
            messages=[{"role": "user", "content": "x", "name": "me"}])
    assert capfd.readouterr().err.splitlines() == [
        "fields of requests that are not read: 'messages[].name', 'metadata', 'user' (said once)"]


def test_other_paths_methods_and_models_are_refused(port):
    for method, path, status in (("GET", "/v1/completions", 404), ("POST", "/", 405), ("PUT", "/health", 405),
                                 ("GET", "/v1/chat/completions", 405), ("GET", "/../etc/passwd", 404)):
        got, headers, body = call(port, method, path, "" if method == "POST" else None)
        assert got == status and json.loads(body)["error"]["message"]
        assert status != 405 or "OPTIONS" in headers["Allow"]
    status, _, body = post(port, model="gpt-4")
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (404, "model_not_found") and "served: m0, m1" in error["message"]


def test_models_health_and_what_a_browser_asks_first(port):
    listed = json.loads(call(port, "GET", "/v1/models")[2])
    assert [m["id"] for m in listed["data"]] == ["m0", "m1"] and listed["object"] == "list"
    assert json.loads(call(port, "GET", "/v1/models/m1?x=1")[2]) == listed["data"][1]
    assert call(port, "GET", "/health")[0] == 200
    status, headers, _ = call(port, "OPTIONS", "/v1/chat/completions", Origin="http://elsewhere")
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "*"
    assert "Authorization" in headers["Access-Control-Allow-Headers"]
    assert "POST" in headers["Access-Control-Allow-Methods"]


def test_the_page_fetches_nothing_from_elsewhere(port):
    status, headers, body = call(port, "GET", "/")
    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert not re.search(r"https?://|\ssrc=|@import|innerHTML|\sstyle=|\son\w+=", page)
    assert 'dir="auto"' in page


def raw(port, data, close=False):
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(data)
        if close:
            client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\n"
NONSENSE = {
    b"hello\r\n\r\n": 400, b"\x16\x03\x01\x02\x00\r\n\r\n": 400, b"GET / HTTP/1.1\r\nno colon\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nA: " + b"x" * 40_000 + b"\r\n\r\n": 431, HEAD + b"\r\n": 411,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 411,
    HEAD + b"Content-Length: 9999999999\r\n\r\n": 413,
    HEAD + b"Content-Length: -1\r\n\r\n": 400, HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n": 400,
    HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n": 413,
    HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}": 100}


@pytest.mark.parametrize("data", NONSENSE, ids=lambda data: repr(data[:60]))
def test_a_request_that_is_not_http_or_too_large_gets_its_status(data, port):
    assert raw(port, data).startswith(b"HTTP/1.1 %d " % NONSENSE[data])


def test_a_client_that_sends_a_huge_body_reads_why_it_is_refused(port):
    status, _, body = call(port, "POST", "/v1/chat/completions", b"x" * 3_000_000)
    assert status == 413 and "at most " in json.loads(body)["error"]["message"]


def test_a_client_that_sends_slowly_is_refused_and_one_that_closes_is_forgotten(port, monkeypatch):
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    for data in (b"", b"GET / HT", HEAD + b"Content-Length: 50\r\n\r\n{"):
        assert raw(port, data).startswith(b"HTTP/1.1 408 ")
    assert raw(port, b"GET / HT", close=True) == b""
    assert raw(port, HEAD + b"Content-Length: 50\r\n\r\n{", close=True) == b""


def test_a_client_that_does_not_read_is_dropped(port, monkeypatch):
    monkeypatch.setattr(serve, "WRITE_SECONDS", 0.3)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1190, "n": 8,
                       "temperature": 1.0, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: in_use(port)[0] == 8)
    until(lambda: in_use(port) == (0, 0), 30)
    client.close()


def test_idle_connections_beyond_the_limit_give_way_to_those_that_ask(port, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 20)
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    try:
        for _ in range(5):
            assert ask(port, max_tokens=2)["choices"]
        idle[0].settimeout(10)
        with suppress(ConnectionError):
            assert idle[0].recv(1) == b""           # the oldest has been closed
    finally:
        for client in idle:
            client.close()


def test_when_all_connections_or_rows_are_taken_a_client_is_asked_to_come_back(port, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 0)
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": MANY, "n": 8,
                       "temperature": 1.0, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: in_use(port)[0] == 8)
        status, headers, answer = post(port)
        assert (status, headers["Retry-After"]) == (503, "1") and b"8 answers are open" in answer
        monkeypatch.setattr(serve, "MAX_CONNECTIONS", 1)
        status, headers, answer = call(port, "GET", "/health")
        assert (status, headers["Retry-After"]) == (503, "1") and b"connections are open" in answer
        monkeypatch.undo()
    until(lambda: in_use(port) == (0, 0))


# ---- faults ------------------------------------------------------------------------------------------------

def test_a_model_that_is_not_finite_is_an_error_and_the_other_model_goes_on(model):
    broken = language_model(1, max_position_embeddings=20_000)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with running(model, broken) as port:
        status, _, body = post(port, model="m1")
        error = json.loads(body)["error"]
        assert (status, error["type"]) == (500, "server_error")
        assert "m1: the log-prob of new token 1 of the prompt is not finite" in error["message"]
        _, _, body = post(port, model="m1", stream=True)
        assert json.loads(events_of(body)[-1])["error"]["message"] == error["message"]
        assert ask(port, max_tokens=3)["choices"]


def test_a_fault_of_ours_ends_the_requests_with_an_error_and_the_server_goes_on(model, capfd):
    """As when the memory is full in a step, or in a prefill."""
    batch, faults = Batch("m0", model, tokenizer(), 8, 400), ["step", "prefill"]
    for name in ("step", "prefill"):
        def fails(*args, name=name, function=getattr(batch.engine, name)):
            if name in faults:
                faults.remove(name)
                raise RuntimeError(f"no memory to {name}")
            return function(*args)
        setattr(batch.engine, name, fails)
    with running(batch) as port:
        for stream in (False, True):
            status, _, body = post(port, max_tokens=9, temperature=0, stream=stream)
            data = events_of(body)[-1] if stream else body
            assert status == (200 if stream else 500)
            assert "RuntimeError" in json.loads(data)["error"]["message"]
        assert ask(port, max_tokens=9, temperature=0)["choices"] and in_use(port) == (0, 0)
    shown = capfd.readouterr().err
    assert "RuntimeError: no memory to step" in shown and "RuntimeError: no memory to prefill" in shown


# ---- the command -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("served")
    weights.save(folder / "A", model, tokenizer())
    return folder


@contextmanager
def command(*words, **options):
    """generate.py --serve as a process of its own. Yields it and its port."""
    child = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", *map(str, words), "--serve", "--port", "0"],
        stderr=subprocess.PIPE, text=True, **options)
    try:
        for line in child.stderr:
            if found := re.match(r"serves (.*) at http://127.0.0.1:(\d+)/ \(Ctrl-C ends it\)", line):
                break
        yield child, int(found[2])
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def test_ctrl_c_ends_the_command_with_one_line_whatever_is_open(folder):
    with command("--model", folder / "A", "--batch-size", 4, "--temperature", 0, "--max-new-tokens", 7) as (
            child, port):
        assert ask(port, "two")["usage"]["completion_tokens"] <= 7
        body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 8000, "stream": true}'
        with socket.create_connection(("127.0.0.1", port)) as asking, socket.create_connection(
                ("127.0.0.1", port)):
            asking.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert asking.recv(100)
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 130
        assert child.stderr.read() == "stopped\n"


def test_a_row_has_the_tokens_that_were_asked_for(model):
    """They were rounded up to a multiple of 32, beyond the positions of some models."""
    flags = dict(max_length=None, batch_size=2, dtype="float32")
    config = replace(model.config, max_position_embeddings=100)
    assert serve.plan_rows("A", config, SimpleNamespace(**flags), "cpu")[0] == 100
    flags["max_length"] = 50
    assert serve.plan_rows("A", config, SimpleNamespace(**flags), "cpu")[0] == 50


def test_a_port_in_use_is_one_line(folder, in_process):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = in_process(generate_command, "--model", folder / "A", "--serve", "--port", port)
    assert code == 2 and out == "" and len(err) == 1
    assert f"--host 127.0.0.1 --port {port}: Address already in use" in err[0]


@pytest.mark.long
def test_a_thousand_idle_connections_do_not_take_the_server_down(folder):
    """The server may open 1,024 files, as on most systems."""
    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    with command("--model", folder / "A", "--batch-size", 4, "--temperature", 0, preexec_fn=few_files) as (
            child, port):
        alone, idle = ask(port, "two", max_tokens=5)["choices"], []
        before, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, 2048), resource.getrlimit(
            resource.RLIMIT_NOFILE)[1]))
        try:
            for _ in range(5):
                idle += [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
                assert [ask(port, "two", max_tokens=5)["choices"] for _ in range(10)] == [alone] * 10
        finally:
            for client in idle:
                client.close()
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130 and child.stderr.read() == "stopped\n"


def test_the_openai_client_talks_to_it(port, model):
    openai = pytest.importorskip("openai", reason="openai is not installed; only this test needs it")
    [own] = own_answers(model, PROMPTS[0], max_new_tokens=20, temperature=0)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["m0", "m1"] and client.models.retrieve("m1").id == "m1"
    asked = dict(model="m0", messages=[{"role": "user", "content": PROMPTS[0]}], temperature=0, max_tokens=20)
    got = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, n=2)
    assert [c.message.content for c in got.choices] == [own["completion"]] * 2
    assert got.usage.completion_tokens == 2 * len(own["ids"])
    assert len(got.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**asked, stream=True,
                                                 stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == own["completion"] and chunks[-1].usage.completion_tokens == len(own["ids"])
    with pytest.raises(openai.NotFoundError, match="no model 'x' here"):
        client.chat.completions.create(**{**asked, "model": "x"})
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
    endless = {**asked, "max_tokens": MANY, "temperature": 1}
    with client.chat.completions.create(**endless, stream=True) as stream:
        next(iter(stream))
    until(lambda: in_use(port) == (0, 0), 10)
