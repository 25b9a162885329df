"""A model behind an OpenAI-compatible endpoint, `http(s)://host/v1#model`, which is asked for answers.

    POST {base_url}/chat/completions   {"model", "messages", "temperature", "max_tokens", "seed", ...}

Threads ask for one answer each, and the results come in the order of the conversations. Busy and broken
servers are asked again with growing waits, as openai-python does (_base_client.py), but more often, as a
teacher's answers are hours of work. A reply without an answer is never an empty answer: its kind is said.
"""

import queue
import random
import threading
from collections import Counter

from .command import progress as progress_bar
from .endpoint_http import (AGAIN, TIMEOUT, Endpoint, Wrong, backoff, check_status, is_endpoint, message_in,
                            send)
from .files import dumps, parse_object

__all__ = ["Endpoint", "ask", "is_endpoint"]
TRIES = 8               # of a request that a busy or broken server does not answer; the waits sum to 64 s
SHAPE_TRIES = 3         # of a request that is answered with something that is no answer
IN_A_ROW = 8            # so many requests that fail after all their tries, one after the other, end the work
FIRST_MISSING = 16      # so many requests without an answer end the work if no request has got one
LIMITS = ("max_tokens", "max_completion_tokens")    # servers know one of them or both
USAGE = ("prompt_tokens", "completion_tokens")


# ---- what a reply holds ------------------------------------------------------------------------------------

def after_thinking(text):
    """(the text after its <think> block, whether it had one). Some templates open the block in the prompt, so
    that the text only closes it; a block that is not closed was cut, and nothing is left."""
    before, closes, rest = text.partition("</think>")
    if text.lstrip().startswith("<think>"):
        return rest.lstrip(), True
    if closes and "<think>" not in before:
        return rest.lstrip(), True
    return text, False


def text_in(message):
    """(the text of a message or None, whether it came with reasoning). The text may be a list of parts:
    {"type": "text", "text"}, and for reasoning {"type": "thinking"}."""
    content, thought = message.get("content"), bool(message.get("reasoning_content")
                                                    or message.get("reasoning"))
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        thought = thought or any(part.get("type") == "thinking" for part in parts)
        content = "".join(part["text"] for part in parts
                          if part.get("type") == "text" and isinstance(part.get("text"), str))
    if not isinstance(content, str):
        return None, thought
    text, block = after_thinking(content)
    return text, thought or block


def kind_without_text(text, thought, reason, message):
    """Why a message has no text."""
    if reason == "content_filter":
        return "content_filter"
    if message.get("refusal"):
        return "refusal"
    if thought:
        return "only reasoning"
    return "null content" if text is None else "empty text"


def answer_in(endpoint, data, used):
    """{"completion", "finish_reason", "model", "thought"} of the body of a success. Adds its usage to the
    Counter `used`. `Wrong` if it holds no answer."""
    try:
        reply = endpoint.hidden(parse_object(data, "the reply"))
    except ValueError as error:
        raise Wrong("not JSON", endpoint.line(str(error))) from None
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    counts = {name: usage[name] for name in USAGE
              if type(usage.get(name)) is int and 0 <= usage[name] < 2 ** 40}
    used.update(counts or {"unknown": 1})
    if reply.get("error"):
        raise Wrong("error in 200", message_in(endpoint, data))
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Wrong("no choices", "a reply without a message")
    reason = choice.get("finish_reason")
    reason = endpoint.line(reason) if isinstance(reason, str) else None
    if reason == "error":
        raise Wrong("error in 200", endpoint.line(dumps(choice.get("error") or "finish_reason error")))
    text, thought = text_in(message)
    if not (text or "").strip():
        said = endpoint.line(str(message.get("refusal") or f"finish_reason {reason}"))
        raise Wrong(kind_without_text(text, thought, reason, message), said,
                    again=reason not in ("content_filter", "length"))
    named = reply.get("model")
    return {"completion": text, "finish_reason": reason, "thought": thought,
            "model": endpoint.line(named) if isinstance(named, str) else None}


# ---- many conversations ------------------------------------------------------------------------------------

class Client:
    """The requests of one `ask`, and what its threads share."""

    def __init__(self, endpoint, fields, limit, seed, sleep, timeout):
        self.endpoint, self.seed, self.timeout, self.tokens = endpoint, seed, timeout, limit
        self.fields = fields
        self.limit = next((name for name in LIMITS if name in endpoint.extra), LIMITS[0])
        self.stopped = threading.Event()
        self.sleep = sleep or self.stopped.wait
        self.jobs, self.results = queue.SimpleQueue(), queue.SimpleQueue()

    def body(self, messages, number, sample, asked, limit):
        """The fields of a request, without those that are None."""
        seed = random.Random(f"{self.seed}/{number}/{sample}/{asked}").getrandbits(31)
        body = {"model": self.endpoint.model, "messages": messages, **self.fields, limit: self.tokens,
                "seed": seed, **self.endpoint.extra}
        return {name: value for name, value in body.items() if value is not None}

    def answer(self, messages, number, sample):
        """One answer, or what became of it after all tries: see `ask`."""
        used, limit, swapped, tries, shapes = Counter(), self.limit, False, 0, 0
        while True:
            tries += 1
            try:
                body = self.body(messages, number, sample, shapes, limit)
                status, headers, data = send(self.endpoint, "/chat/completions", body, self.timeout)
                check_status(self.endpoint, status, headers, data)
                found = answer_in(self.endpoint, data, used)
                self.limit = limit
                return {**found, "usage": dict(used), "tries": tries}
            except Wrong as wrong:
                if wrong.kind in ("HTTP 400", "HTTP 422") and limit in wrong.said and not (
                        swapped or self.endpoint.extra.keys() & set(LIMITS)):
                    limit, swapped = LIMITS[limit == LIMITS[0]], True
                    continue
                shapes += not is_of_transport(wrong.kind)
                if not wrong.again or shapes == SHAPE_TRIES or tries >= TRIES or self.stopped.is_set():
                    return {"completion": None, "finish_reason": None, "missing": wrong.kind,
                            "said": wrong.said, "usage": dict(used), "tries": tries}
                self.sleep(max(backoff(tries), wrong.wait or 0))

    def work(self):
        """What a thread does: answer the waiting questions, until none is left or all threads shall stop."""
        while not self.stopped.is_set():
            try:
                i, sample, question = self.jobs.get_nowait()
            except queue.Empty:
                return
            try:
                self.results.put((i, sample, self.answer(*question, sample)))
            except Exception as error:              # it is raised by `ask`
                self.results.put((i, sample, error))


def is_of_transport(kind):
    """Whether a kind of missing answer says that the server was busy or broken, not what it replied."""
    status = int(kind[5:]) if kind.startswith("HTTP ") else 0
    return kind in ("timeout", "connection") or status in AGAIN or status >= 500


class Watch:
    """Ends the work, by a ValueError, where the server answers nothing: a wrong setting or a server that has
    gone would cost all the requests. answered: the answers that there are already."""

    def __init__(self, name, answered):
        self.name, self.answered, self.missing, self.in_a_row, self.last = name, answered, 0, 0, None

    def see(self, found):
        if found["completion"] is not None:
            self.answered, self.in_a_row = self.answered + 1, 0
            return
        self.missing, self.last = self.missing + 1, f"{found['missing']}: {found['said']}"
        self.in_a_row += is_of_transport(found["missing"])
        if self.in_a_row >= IN_A_ROW:
            raise ValueError(f"{self.name}: {self.in_a_row} requests in a row failed after {found['tries']} "
                             f"tries ({self.last}); look at the server, then give the command again")
        if not self.answered and self.missing >= FIRST_MISSING:
            self.end()

    def end(self):
        if self.missing and not self.answered:
            raise ValueError(f"{self.name}: none of {self.missing} requests got an answer ({self.last}); "
                             "look at the server, or at what it is sent: --extra '{\"FIELD\": null}' leaves "
                             "a field out, and a higher --max-new-tokens leaves room after reasoning")


def ask(endpoint, conversations, *, num_samples=1, max_new_tokens, temperature, top_p=1.0, seed=0, stop=(),
        concurrency=8, progress=None, kept=None, numbers=None, answered=0, sleep=None, timeout=TIMEOUT):
    """The answers of an endpoint: for each conversation, in order, a list of num_samples dicts

        {"completion", "finish_reason", "model" (as the server names it), "thought", "usage", "tries"}

    A missing answer has the completion None, and "missing" (its kind) with "said" (the server's words).
    "thought": whether it came with reasoning, which is left out. "usage": tokens, of all tries.

    conversations: lists of {"role", "content"}. Each answer is a request of its own, as many servers ignore
    `n`, with its own seed, which numbers (default the index) and `seed` decide. progress: the text of a bar.
    kept(i, group): called in this thread as soon as all answers to conversation i are there and none is
    missing. answered: the number of answers that the caller has from before. sleep(seconds): how to wait.
    ValueError if the key, model or URL is wrong, and where the server answers nothing (`Watch`).
    """
    fields = {"temperature": temperature} | ({"top_p": top_p} if top_p != 1 else {})
    fields |= {"stop": list(stop)} if stop else {}
    client = Client(endpoint, fields, max_new_tokens, seed, sleep, timeout)
    groups = [[None] * num_samples for _ in conversations]
    numbers = range(len(conversations)) if numbers is None else numbers
    for i, (messages, number) in enumerate(zip(conversations, numbers)):
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        for sample in range(num_samples):
            client.jobs.put((i, sample, (plain, number)))
    total, watch = len(conversations) * num_samples, Watch(endpoint.name, answered)
    # daemons: after Ctrl-C the process does not wait for replies
    for _ in range(min(concurrency, total)):
        threading.Thread(target=client.work, daemon=True).start()
    try:
        with progress_bar(total=total, desc=progress, unit="answer", disable=progress is None) as bar:
            for _ in range(total):
                i, sample, found = client.results.get()
                if isinstance(found, Exception):
                    raise found
                groups[i][sample] = found
                watch.see(found)
                bar.update()
                if kept and all(found and found["completion"] is not None for found in groups[i]):
                    kept(i, groups[i])
        watch.end()
    finally:
        client.stopped.set()
    return groups
