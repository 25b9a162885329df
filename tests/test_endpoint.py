"""Endpoints as teachers, against a server made to misbehave. No test waits: the waits are recorded."""

import json
import socket
import threading
import time

import pytest
from bad_server import KEY, Server, error, message, reply

from aya_min import endpoint as endpoints
from aya_min import endpoint_http
from aya_min.endpoint import Endpoint, ask, is_endpoint
from aya_min.endpoint_http import backoff, check_there, wait_of


def questions(*texts):
    return [[{"role": "user", "content": text, "weight": 1}] for text in texts]


@pytest.fixture
def asked():
    """asked(answer, *texts, **more): (groups, the waits, the server) of asking a server that answers so."""
    def asked(answer, *texts, key=KEY, extra=None, **more):
        waits = []
        with Server(answer) as server:
            one = Endpoint.of(server.url + "#m", key=key, key_from="SECRET", extra=extra or {})
            more = {"max_new_tokens": 8, "temperature": 0.5, "concurrency": 1, **more}
            try:
                groups = ask(one, questions(*texts), sleep=waits.append, **more)
            except ValueError as found:
                assert KEY not in str(found) and "\n" not in str(found)
                groups = str(found)
            return groups, waits, server
    return asked


def texts_of(groups):
    return [answer["completion"] for group in groups for answer in group]


# ---- names -------------------------------------------------------------------------------------------------

def test_an_endpoint_is_a_url_with_a_model():
    one = Endpoint.of("HTTPS://Host.example:8000/v1/#org/name:free")
    assert (one.base_url, one.model) == ("https://host.example:8000/v1", "org/name:free")
    assert one.name == "host.example:8000/org/name:free" and one.host == "host.example:8000"
    assert is_endpoint("http://x/v1#m") and not is_endpoint("runs/http") and not is_endpoint("httpx")
    assert "sk-" not in repr(Endpoint.of("http://h/v1#m", key="sk-123"))


@pytest.mark.parametrize("text, says", [
    ("http://h/v1", "no model is named; give http://h/v1#model"), ("http://h/v1#", "no model"),
    ("http://h/v1# ", "no model"), ("http://h/v1#a\nb", "no model"), ("http://#m", "not the URL"),
    ("http:///v1#m", "not the URL"), ("http://h:port/v1#m", "not the URL"),
    ("http://h:99999/#m", "not the URL"), ("http://h\u00e9/v1#m", "not the URL"),
    ("http://h /v1#m", "not the URL"), ("http://[::1/v1#m", "not the URL"),
    ("http://user:secret@h/v1#m", "may hold a secret"), ("http://h/v1?key=secret#m", "may hold a secret")])
def test_a_url_that_is_written_wrongly_is_one_line_without_its_secrets(text, says):
    with pytest.raises(ValueError, match=says) as found:
        Endpoint.of(text)
    assert "secret@" not in str(found.value) and "=secret" not in str(found.value)


@pytest.mark.parametrize("key", ["", " ", "a b", "a\nb", "sch\u00f6n", "x\0"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key):
    with pytest.raises(ValueError, match="the key in SECRET") as found:
        Endpoint.of("http://h/v1#m", key=key, key_from="SECRET")
    assert "sch" not in str(found.value) and "a b" not in str(found.value)


# ---- what is sent ------------------------------------------------------------------------------------------

def test_only_what_is_set_is_sent(asked):
    _, _, server = asked(lambda body, times: reply(), "q")
    [body] = server.asked
    assert body.pop("seed") < 2 ** 31
    assert body == {"model": "m", "messages": [{"role": "user", "content": "q"}], "max_tokens": 8,
                    "temperature": 0.5}
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    extra = {"seed": None, "temperature": None, "top_k": 4}
    _, _, server = asked(lambda body, times: reply(), "q", extra=extra, top_p=0.9, stop=["\n"], key=None)
    assert server.asked == [{"model": "m", "messages": [{"role": "user", "content": "q"}], "max_tokens": 8,
                             "top_p": 0.9, "stop": ["\n"], "top_k": 4}]
    assert "Authorization" not in server.headers[0]


def test_answers_come_in_the_order_of_the_questions_and_kept_gets_whole_groups(asked):
    """The later a question, the earlier its answer: each waits until the one after it has been answered."""
    order, done = [str(i) for i in range(8)], {str(i): threading.Event() for i in range(9)}
    done["8"].set()

    def backwards(body, times):
        text = body["messages"][-1]["content"]
        assert done[str(int(text) + 1)].wait(30)
        done[text].set()
        return reply(f"answer to {text}")
    kept = []
    groups, _, _ = asked(backwards, *order, concurrency=8, kept=lambda i, group: kept.append((i, group)))
    assert texts_of(groups) == [f"answer to {text}" for text in order]
    assert sorted(i for i, _ in kept) == list(range(8)) and all(groups[i] == group for i, group in kept)


def test_the_samples_of_a_prompt_have_seeds_of_their_own_that_do_not_depend_on_the_others(asked):
    def echo(body, times):
        return reply(str(body["seed"]))
    kept = []
    groups, _, _ = asked(echo, "a", "b", num_samples=3, concurrency=4,
                         kept=lambda i, group: kept.append((i, list(group))))
    assert len(set(texts_of(groups))) == 6 and sorted(kept) == list(enumerate(groups))
    assert asked(echo, "b", num_samples=3, numbers=[1])[0] == groups[1:]
    assert not set(texts_of(asked(echo, "b", num_samples=3, numbers=[1], seed=1)[0])) & set(texts_of(groups))


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(asked, monkeypatch):
    with Server() as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert texts_of(asked(lambda body, times: reply("direct"), "q")[0]) == ["direct"]
        assert not proxy.asked
        one = Endpoint.of("http://elsewhere.invalid/v1#m")
        assert texts_of(ask(one, questions("q"), max_new_tokens=4, temperature=0)) == ["ja"]
        assert proxy.questions == ["q"]


def test_no_more_requests_are_open_than_asked_for(asked):
    open_now, most, lock, full = 0, 0, threading.Lock(), threading.Event()

    def answer(body, times):
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
            if open_now == 3:
                full.set()
        assert full.wait(30)                    # the first three wait for one another
        with lock:
            open_now -= 1
        return reply()
    asked(answer, *"abcdefgh", concurrency=3)
    assert most == 3


# ---- busy and broken servers -------------------------------------------------------------------------------

def flaky(*bad):
    """The first requests for a question get `bad`, the next a success."""
    return lambda body, times: bad[times] if times < len(bad) else reply()


def bad_gets(found):
    """The question "bad" gets `found`, others a success."""
    return lambda body, times: found if body["messages"][0]["content"] == "bad" else reply()


@pytest.mark.parametrize("headers, wait", [
    ({"Retry-After": "7"}, 7), ({"Retry-After": "0.5", "retry-after-ms": "9000"}, 9),
    ({"Retry-After": "x"}, 0), ({"Retry-After": "-5"}, 0), ({"Retry-After": "nan"}, 0), ({}, 0)])
def test_429_waits_as_long_as_the_server_says(headers, wait, asked):
    groups, waits, server = asked(flaky((429, headers, error("slow down"))), "q")
    assert texts_of(groups) == ["ja"] and groups[0][0]["tries"] == len(server.asked) == 2
    assert len(waits) == 1 and max(wait, 0.375) <= waits[0] <= max(wait, 0.5)


def test_retry_after_may_be_a_date():
    now = 1_700_000_000
    assert wait_of({"retry-after": "Tue, 14 Nov 2023 22:14:20 GMT"}, now) == 60
    assert wait_of({"retry-after": "Tue, 14 Nov 2000 22:14:20 GMT"}, now) == 0
    for nonsense in ("soon", "Tue, 99 Nov 2023", "\u0663", "1e999999", ""):
        wait = wait_of({"retry-after": nonsense}, now)
        assert wait is None or wait >= 0


def test_a_server_that_asks_to_wait_for_hours_ends_the_command(asked):
    for headers in ({"Retry-After": "3600"}, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"},
                    {"Retry-After": "inf"}):
        said, waits, _ = asked(lambda body, times: (429, headers, error("tomorrow")), "q")
        assert "HTTP 429: it asks to wait" in said and "tomorrow" in said and not waits


def test_waits_grow_and_are_bounded(asked):
    groups, waits, server = asked(flaky(*[(500, {}, b"<html>oops")] * 7), "q")
    assert texts_of(groups) == ["ja"] and len(server.asked) == 8
    for wait, most in zip(waits, [0.5, 1, 2, 4, 8, 16, 32], strict=True):
        assert 0.75 * most <= wait <= most
    assert 45 <= backoff(50) <= 60


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 529])
def test_a_question_that_breaks_the_server_is_missing_and_the_others_go_on(status, asked):
    groups, waits, server = asked(bad_gets((status, {}, error("boom"))), "a", "bad", "b")
    assert texts_of(groups) == ["ja", None, "ja"] and len(waits) == 7 and len(server.asked) == 10
    missing = {"completion": None, "finish_reason": None, "missing": f"HTTP {status}", "said": "boom",
               "usage": {}, "tries": 8}
    assert groups[1][0] == missing


def test_a_server_that_has_gone_ends_the_work_instead_of_failing_every_question(asked):
    def answer(body, times):
        return reply() if body["messages"][0]["content"] < "03" else (503, {}, error("gone"))
    kept = []
    said, _, server = asked(answer, *[f"{i:02}" for i in range(40)], kept=lambda i, group: kept.append(i))
    assert "8 requests in a row failed after 8 tries (HTTP 503: gone)" in said and kept == [0, 1, 2]
    assert len(server.asked) <= 3 + 8 * 9


def test_failures_between_answers_do_not_end_the_work(asked):
    def answer(body, times):
        return (500, {}, b"") if int(body["messages"][0]["content"]) % 2 else reply()
    groups, _, _ = asked(answer, *map(str, range(24)))
    assert texts_of(groups) == ["ja", None] * 12


def test_a_server_that_is_not_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    waits, one = [], Endpoint.of(f"http://127.0.0.1:{port}/v1#m", key=KEY)
    with pytest.raises(ValueError, match="none of 2 requests got an answer .connection: ConnectionRefused"):
        ask(one, questions("a", "b"), max_new_tokens=4, temperature=0, sleep=waits.append)
    assert len(waits) == 14
    with pytest.raises(ValueError, match="/v1/models gives no reply .connection: .*start the server"):
        check_there(one, waits.append)


def cut_body(handler):
    """It announces more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(reply())


def cut_chunks(handler):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"40\r\n{\"choices\": ")


def nothing(handler):
    handler.wfile.flush()


def no_http(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")


@pytest.mark.parametrize("broken", [cut_body, cut_chunks, nothing, no_http])
def test_a_broken_connection_is_tried_again(broken, asked):
    groups, waits, _ = asked(flaky(broken, broken), "q")
    assert texts_of(groups) == ["ja"] and len(waits) == 2
    groups, _, _ = asked(bad_gets(broken), "a", "bad")
    assert texts_of(groups) == ["ja", None] and groups[1][0]["missing"] == "connection"


def test_a_server_that_is_too_slow_is_left_though_it_sends_a_byte_now_and_then(asked):
    """The first waits for ever, the others send bytes for ever; all are left at the time limit."""
    release = threading.Event()

    def silent(handler):
        release.wait(30)

    def dripping(handler):
        handler.send_response(200)
        handler.end_headers()
        while not release.is_set():
            handler.wfile.write(b" ")

    def dripping_headers(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
        for number in range(90):
            if not release.wait(0.05):
                handler.wfile.write(b"X: y\r\n")
    started = time.monotonic()
    groups, waits, _ = asked(flaky(silent, dripping, dripping_headers), "q", timeout=0.1)
    release.set()
    assert texts_of(groups) == ["ja"] and len(waits) == 3 and time.monotonic() - started < 4


def status_line(text):
    return lambda handler: handler.wfile.write(text.encode() + b"\r\n\r\n")


@pytest.mark.parametrize("key, found", [
    ("hunter2", (401, {}, error("Incorrect key hunter2"))), (KEY, (500, {}, b" " * 1990 + KEY.encode())),
    (KEY, status_line("Bearer " + KEY)), (KEY, status_line("HTTP/1.0 " + "a" * 175 + KEY)),
    (KEY, error(KEY)), (KEY, message(content=None, refusal="x" * 195 + KEY))])
def test_a_key_that_the_server_says_again_is_hidden_before_the_message_is_cut(key, found, asked):
    """The beginning of a cut key stood in messages, and a key of fewer than 12 characters all of it."""
    said, _, _ = asked(lambda body, times: found, "q", key=key)
    assert key[:6] not in said and "\n" not in said


def test_a_compressed_reply_is_named(asked):
    said, waits, _ = asked(lambda body, times: (200, {"Content-Encoding": "gzip"}, b"x"), "q")
    assert "(compressed: a reply of gzip, which was not asked for)" in said and not waits


def test_a_huge_body_is_not_read_to_its_end(asked, monkeypatch):
    monkeypatch.setattr(endpoint_http, "MAX_BODY", 100_000)
    sent = 0

    def huge(handler):
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while sent < 1 << 30:
            sent += handler.wfile.write(b"x" * 65536)
    groups, _, server = asked(bad_gets(huge), "a", "bad", "b")
    assert texts_of(groups) == ["ja", None, "ja"] and groups[1][0]["missing"] == "too large"
    assert sent < 1 << 25 and len(server.asked) == 3


# ---- replies without an answer -----------------------------------------------------------------------------

CASES = {
    "no choices": [reply(choices=[]), reply(choices=None), reply(choices=5), reply(choices=[None]),
                   reply(choices=[{"message": None}]), b"{}", reply(choices=[{"text": "old"}])],
    "null content": [message(content=None), message(), message(content=5)],
    "empty text": [message(content=""), message(content=" \n"), message(content=[])],
    "only reasoning": [message(content=None, reasoning_content="hm"), message(content="", reasoning="hm"),
                       message(content="<think>hm, cut here"), message(content="<think>hm</think>\n"),
                       message(content=[{"type": "thinking", "thinking": []}])],
    "refusal": [message(content=None, refusal="I cannot")],
    "content_filter": [message(content=None, finish="content_filter"),
                       message(content="", finish="content_filter")],
    "error in 200": [error("boom"), b'{"error": "boom"}', b'{"error": {"code": 502}, "choices": []}',
                     reply(finish="error")],
    "not JSON": [b"", b"<html>", b'{"choices": [', b"[]", b"null", b"data: {}\n\n", b"\x1f\x8b\x08",
                 reply("x").replace(b'"x"', b'"\xff\xfe"'), reply("\ud800"), reply("a\0b"),
                 b'{"a": NaN}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]}


@pytest.mark.parametrize("kind, body", [(kind, body) for kind, bodies in CASES.items() for body in bodies])
def test_a_reply_without_an_answer_is_named_and_never_an_empty_answer(kind, body, asked):
    groups, _, server = asked(bad_gets(body), "a", "bad", "b")
    assert texts_of(groups) == ["ja", None, "ja"] and groups[1][0]["missing"] == kind
    assert groups[1][0]["tries"] == (1 if kind == "content_filter" else 3)
    assert len(groups[1][0]["said"]) <= 200
    seeds = [asks["seed"] for asks in server.asked if asks["messages"][0]["content"] == "bad"]
    assert len(set(seeds)) == len(seeds)                # the same question is asked with another seed
    again = texts_of(asked(flaky(body), "q", answered=1)[0])
    assert again == [None if kind == "content_filter" else "ja"]


@pytest.mark.parametrize("fields, text, thought", [
    (dict(content="<think>\nhm\n</think>\n\nja"), "ja", True), (dict(content="hm</think>ja"), "ja", True),
    (dict(content="ja", reasoning_content="hm"), "ja", True),
    (dict(content="ja", reasoning="hm"), "ja", True),
    (dict(content=" ja\n"), " ja\n", False), (dict(content="a <think> b"), "a <think> b", False),
    (dict(content="the tags <think> and </think>"), "the tags <think> and </think>", False),
    (dict(content=[{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "j"},
                   {"type": "text", "text": "a"}]), "ja", True)])
def test_reasoning_is_left_out_and_said(fields, text, thought, asked):
    [[answer]], _, _ = asked(lambda body, times: message(**fields), "q")
    assert (answer["completion"], answer["thought"]) == (text, thought)


def test_cut_answers_usage_and_the_models_own_name_are_kept(asked):
    def answer(body, times):
        return {"a": reply("half", "length", (5, 8)), "b": reply("half", "content_filter", (1, 1)),
                "c": (reply(None, usage=(10, 20)), reply(usage=(10, 30)))[min(times, 1)],
                "d": reply(usage=("x", -1)), "e": reply(usage=None or (1, True), model=None)}[
                    body["messages"][0]["content"]]
    groups, _, _ = asked(answer, *"abcde")
    a, b, c, d, e = (group[0] for group in groups)
    assert (a["finish_reason"], b["finish_reason"], a["usage"]) == (
        "length", "content_filter", {"prompt_tokens": 5, "completion_tokens": 8})
    assert c["usage"] == {"prompt_tokens": 20, "completion_tokens": 50} and c["tries"] == 2
    assert d["usage"] == {"unknown": 1} and e["usage"] == {"prompt_tokens": 1}
    assert (a["model"], e["model"]) == ("served-name", None)


def test_a_model_that_only_reasons_ends_the_work_before_all_is_spent(asked):
    hm = message(content=None, reasoning_content="hm", finish="length")
    said, _, server = asked(lambda body, times: hm, *map(str, range(100)))
    assert "none of 16 requests got an answer (only reasoning: finish_reason length)" in said
    assert "--max-new-tokens" in said and 16 <= len(server.asked) <= 17
    groups, _, _ = asked(lambda body, times: message(content=None, finish="length"), *map(str, range(40)),
                         answered=1)            # others have been answered before: it may be these questions
    assert texts_of(groups) == [None] * 40


# ---- what cannot be helped ---------------------------------------------------------------------------------

@pytest.mark.parametrize("status, headers, data, says", [
    (401, {}, error(f"Incorrect API key provided: {KEY}"), "the key in SECRET does not open m (Incorrect API "
     "key provided: [the key]); set SECRET to a key for 127.0.0.1"),
    (403, {}, error("no"), "does not open m (no)"),
    (404, {}, error("model m does not exist"), "no model 'm', or no such path (model m does not exist)"),
    (404, {}, b"<html>\x1b[2J not found", "<html>[2J not found"),
    (402, {}, error("pay"), "its account is used up (pay)"),
    (429, {}, b'{"error": {"message": "quota", "code": "insufficient_quota"}}', "account is used up (quota)"),
    (301, {"Location": "https://other.example/v1/chat/completions?k=v"}, b"", "it sends on to https://other."
     "example/v1/chat/completions, which is not followed"),
    (307, {"Location": "/v2/x"}, b"", "it sends on to /v2/x, which"),
    (302, {}, b"", "it sends on to elsewhere")])
def test_a_wrong_key_model_or_url_stops_at_once_with_one_line(status, headers, data, says, asked):
    said, waits, server = asked(lambda body, times: (status, headers, data), *"abcdefgh")
    assert said.startswith("127.0.0.1:") and f"/m: HTTP {status}: " in said and says in said
    assert not waits and len(server.asked) <= 2


def test_without_a_key_the_line_says_which_variable_to_set(asked):
    said, _, _ = asked(lambda body, times: (401, {}, error("no key")), "q", key=None)
    assert "no key, as none is set, does not open m" in said and "--key-from" in said


def test_the_key_does_not_go_along_to_another_host(asked):
    with Server() as other:
        for status in (301, 302, 303, 307, 308):
            place = {"Location": other.url + "/chat/completions"}
            said, _, _ = asked(lambda body, times: (status, place, b""), "q")
            assert f"sends on to {other.url}/chat/completions" in said
        assert other.headers == []


def test_a_400_is_said_and_the_work_goes_on_unless_nothing_is_ever_answered(asked):
    groups, waits, _ = asked(bad_gets((400, {}, error("too long for me"))), "a", "bad", "b")
    assert texts_of(groups) == ["ja", None, "ja"] and groups[1][0]["said"] == "too long for me" and not waits
    wrong = 400, {}, error("unknown field 'seed'")
    said, _, server = asked(lambda body, times: wrong, *map(str, range(99)))
    assert "HTTP 400: unknown field 'seed'" in said and '{"FIELD": null}' in said and len(server.asked) <= 17


def test_a_server_that_wants_the_other_name_of_the_token_limit_gets_it(asked):
    def strict(body, times):
        if "max_tokens" in body:
            return 400, {}, error("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return reply(str(body["max_completion_tokens"]))
    groups, waits, server = asked(strict, "a", "b", "c")
    assert texts_of(groups) == ["8"] * 3 and not waits and len(server.asked) == 4       # learned at the first

    def old(body, times):
        return (422, {}, error("extra field max_completion_tokens")) if "max_completion_tokens" in body else (
            reply(str(body.get("max_tokens"))))
    said, _, server = asked(old, "a", extra={"max_completion_tokens": 99})
    assert "extra field" in said and len(server.asked) == 1         # what the user chose is not changed
    assert "max_tokens" not in server.asked[0]
    assert texts_of(asked(old, "a", extra={"max_tokens": 99})[0]) == ["99"]
    assert texts_of(asked(old, "a", extra={"max_tokens": None})[0]) == ["None"]
    both = asked(lambda body, times: (400, {}, error("max_tokens and max_completion_tokens: no")), "a")
    assert len(both[2].asked) == 2


def test_a_server_that_says_the_key_in_an_answer_is_not_written_down(asked):
    [[answer]], _, _ = asked(lambda body, times: reply(f"your key is {KEY}", model=KEY), "q")
    assert answer["completion"] == "your key is [the key]" and answer["model"] == "[the key]"
    spelled = reply(KEY).replace(b"sk-test", b"sk\\u002dtest")
    assert texts_of(asked(lambda body, times: spelled, "q")[0]) == ["[the key]"]
    [[answer]], _, _ = asked(lambda body, times: reply("EMPTY glass"), "q", key="EMPTY")
    assert answer["completion"] == "EMPTY glass"                    # no secret


def test_the_list_of_models_is_read_where_there_is_one():
    with Server(models=("m", "n")) as server:
        one = Endpoint.of(server.url + "#m", key=KEY)
        assert check_there(one) == ["m", "n"] and server.headers[0]["Authorization"] == f"Bearer {KEY}"
        for body in (b"{}", b"[]", b"<html>", b'{"data": null}', b'{"data": [1]}', (404, {}, b"")):
            server.models = lambda headers: body
            assert check_there(one) is None
        server.models = lambda headers: (401, {}, error("who?"))
        with pytest.raises(ValueError, match=r"HTTP 401: the key in .* \(who\?\)"):
            check_there(one)
        times, waits = [], []
        server.models = lambda headers: times.append(1) or ((503, {}, error("loading")) if len(times) < 3 else
                                                            json.dumps({"data": [{"id": "m"}]}).encode())
        assert check_there(one, waits.append) == ["m"] and len(waits) == 2


def test_an_error_of_our_own_in_a_thread_is_raised(asked, monkeypatch):
    monkeypatch.setattr(endpoints, "answer_in", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked(lambda body, times: reply(), "q")
