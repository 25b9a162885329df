"""What a client of the server asks, and how it is told: OpenAI's chat completions as JSON.

What a request says is honoured, or refused with its name. A field that nothing here knows is ignored, which
the server says once. Texts are sent in whole characters, and without what may still become a stop string.
"""

import re
import time
from collections import deque

from .command import describe, in_range, shortened
from .config import TEMPERATURE
from .engine import check_sampling
from .files import dumps, parse_object
from .rows import alternating, ends_with_user, turns_of
from .rows_keys import check_keys, is_empty
from .sampling import cut_at
from .serve_batch import Request

WHERE = "the request"
# Fields that are read here, and fields that would change the answer and are honoured only at these values.
READ = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
        "seed", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs"}
ONLY = {"presence_penalty": [0], "frequency_penalty": [0], "repetition_penalty": [1], "min_tokens": [0],
        "response_format": [{"type": "text"}], "modalities": [["text"]], "tool_choice": ["none", "auto"],
        "repeat_penalty": [1], "length_penalty": [1], "typical_p": [1], "best_of": [1],
        "reasoning_effort": ["none"], "skip_special_tokens": [True], "add_generation_prompt": [True],
        **{name: [] for name in ("system", "prompt", "logit_bias", "ignore_eos", "stop_token_ids",
                                 "web_search_options", "guided_json", "guided_regex", "guided_choice",
                                 "structured_outputs", "grammar", "json_schema", "bad_words",
                                 "allowed_token_ids", "use_beam_search", "truncate_prompt_tokens", "echo",
                                 "include_stop_str_in_output", "prompt_logprobs", "prediction")}}
LEAST_LOGP = -9999.0         # in place of minus infinity, which JSON cannot write; as OpenAI has it
MAX_SAMPLES, MAX_TOP, MAX_STOPS, MAX_STOP_LENGTH = 128, 20, 16, 200
MAX_LOGPS = 200_000         # log-probs of a request: about 5 MB of JSON, made in half a second


class Refused(ValueError):
    """A request that gets an error. headers: more lines of the response, such as {"Retry-After": "1"}."""

    def __init__(self, message, status=400, code=None, **headers):
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


# ---- what is asked -----------------------------------------------------------------------------------------

def number_of(body, key, kind, interval, default):
    """The number of a field within an interval; the default for null and without the field."""
    value = body.get(key)
    if value is None:
        return default
    is_kind = type(value) is int or kind is float and type(value) is float
    if not is_kind or not in_range(value, interval):
        raise Refused(f"{key} must be {describe(kind, interval)}, got {shortened(value)}")
    return value


def flag_of(body, key):
    value = body.get(key)
    if not isinstance(value, (bool, type(None))):
        raise Refused(f"{key} must be true or false, got {shortened(value)}")
    return bool(value)


def stops_of(body):
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(
            isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in stops):
        raise Refused(f"stop must be a text or a list of at most {MAX_STOPS} texts, each of 1 to "
                      f"{MAX_STOP_LENGTH} characters, got {shortened(value)}")
    return tuple(stops)


def model_of(body, batches):
    """The Batch that a request names. batches: {name: Batch}; the first one answers if none is named."""
    name = body.get("model")
    if name is None or name == "":
        return next(iter(batches.values()))
    if not isinstance(name, str) or name not in batches:
        raise Refused(f"no model {shortened(name)} here; served: {', '.join(batches)}", 404,
                      "model_not_found")
    return batches[name]


def messages_of(body, ignored):
    """The messages of a request. ignored: a set, to which the names of the fields are added that nothing
    reads. ValueError for what cannot be honoured: images, tools, roles, an order of turns."""
    for name, values in ONLY.items():
        if not is_empty(body.get(name)) and body[name] not in values:
            raise Refused(f"{name} {shortened(body[name])} cannot be honoured; remove it")
    ours = READ | ONLY.keys()
    others = {key: value for key, value in body.items() if key not in ours and not is_empty(value)}
    unknown = {}
    check_keys({**others, "messages": body.get("messages")}, WHERE, unknown)
    ignored.update(others, (f"messages[].{name}" for name in unknown))
    turns = alternating(turns_of(body.get("messages"), "messages", WHERE), "messages", WHERE)
    return ends_with_user(turns, WHERE)


def read_request(data, batches, defaults, seed, ignored):
    """(Batch, Request, whether the stream ends with its usage) of a request's body (bytes).

    defaults: temperature, top_k, top_p, min_p, max_new_tokens. seed: for a request without one.
    ignored: see messages_of. ValueError says what is wrong; a Refused has its own status.
    """
    body = parse_object(data, WHERE, "send one JSON object")
    batch = model_of(body, batches)
    messages = messages_of(body, ignored)
    sampling = (number_of(body, "temperature", float, TEMPERATURE, defaults["temperature"]),
                number_of(body, "top_k", int, "[0, inf)", defaults["top_k"]),
                number_of(body, "top_p", float, "(0, 1]", defaults["top_p"]),
                number_of(body, "min_p", float, "[0, 1]", defaults["min_p"]))
    check_sampling(*sampling)
    num_top = number_of(body, "top_logprobs", int, f"[0, {MAX_TOP}]", None)
    if not flag_of(body, "logprobs"):
        if num_top:
            raise Refused("top_logprobs goes with logprobs true")
        num_top = None
    elif num_top is None:
        num_top = 0
    options = body.get("stream_options")
    if not isinstance(options, (dict, type(None))):
        raise Refused(f"stream_options must be an object, got {shortened(options)}")
    stops, is_streamed = stops_of(body), flag_of(body, "stream")
    num_samples = number_of(body, "n", int, f"[1, {MAX_SAMPLES}]", 1)
    seed = number_of(body, "seed", int, "[0, 9223372036854775808)", seed)
    prompt = batch.tokenizer.encode_prompt(messages)
    limit = limit_of(body, len(prompt), batch, defaults["max_new_tokens"])
    if num_top is not None and (count := num_samples * limit * (1 + num_top)) > MAX_LOGPS:
        raise Refused(f"{num_samples} answers of {limit} tokens with top_logprobs {num_top} are {count} "
                      f"log-probs, at most {MAX_LOGPS} are told; lower n, max_tokens or top_logprobs")
    request = Request(prompt, num_samples, limit, sampling, seed, stops, num_top, is_streamed)
    return batch, request, flag_of(options or {}, "include_usage")


def limit_of(body, length, batch, default):
    """The most new tokens for a prompt of this length. Refused if they do not fit the rows of the batch."""
    given = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    limits = [number_of(body, name, int, "[1, inf)", None) for name in given]
    if len({*limits}) > 1:
        raise Refused(f"max_completion_tokens {limits[0]} and max_tokens {limits[1]} differ; give one")
    room = batch.max_tokens - length
    if room < 1 or limits and limits[0] > room:
        wanted = f" and {given[0]} {limits[0]}" if limits else ""
        raise Refused(f"the prompt has {length} tokens{wanted}; {batch.name} holds {batch.max_tokens} with "
                      "the answer; send fewer or shorter messages" + (", or ask for less" if limits else ""),
                      code="context_length_exceeded")
    return limits[0] if limits else min(default, room)


# ---- what is told ------------------------------------------------------------------------------------------

class Text:
    """The text of a row as its tokens arrive. `take` gives what is new in it."""

    def __init__(self, row, batch):
        self.row, self.batch, self.stops = row, batch, row.prompt.stop_strings
        self.pending, self.text = deque(), ""
        self.pieces = batch.tokenizer.stream(iter(self.pending.popleft, None))
        self.starts = []                            # of each token in the text, in characters
        self.num_told = self.num_logps_told = 0     # characters and tokens
        self.has_ended = False

    def grow(self, token):
        """Take a token, or None for the end."""
        self.pending.append(token)
        self.text += next(self.pieces).replace("\0", "\ufffd")      # as in sampling.answer_rows

    def take(self):
        """(new text, the log-probs of its tokens or None). has_ended then says whether it was the last."""
        has_ended = self.row.finish_reason is not None              # before the ids, which come first
        if has_ended and not self.starts and self.row.prompt.num_top is None:
            # All at once, in a tenth of the time.
            self.text = self.batch.tokenizer.decode(self.row.ids).replace("\0", "\ufffd")
            self.has_ended = True
            return cut_at(self.text, self.stops), None
        for token in self.row.ids[len(self.starts):]:
            self.starts.append(len(self.text))
            self.grow(token)
        if has_ended and not self.has_ended:
            self.grow(None)
        self.has_ended = has_ended
        told = cut_at(self.text, self.stops)
        if not has_ended and len(told) == len(self.text):
            told = told[:len(told) - may_be_stop(told, self.stops)]
        new, self.num_told = told[self.num_told:], max(self.num_told, len(told))
        return new, self.logps() if self.row.prompt.num_top is not None else None

    def logps(self):
        """The log-probs of the tokens that begin in what has been told. The stop token is no text."""
        first, found = self.num_logps_told, self.row.prompt.logps[self.row.sample]
        while self.num_logps_told < len(self.starts) and self.starts[self.num_logps_told] < self.num_told:
            self.num_logps_told += 1
        made, tokenizer = [], self.batch.tokenizer
        for i in range(first, self.num_logps_told):
            if self.row.ids[i] not in self.batch.stop_ids:
                logp, likely = found[i]
                made.append({**token_as_json(self.row.ids[i], logp, tokenizer),
                             "top_logprobs": [token_as_json(*pair, tokenizer) for pair in likely]})
        return {"content": made}


def may_be_stop(text, stops):
    """The characters at the end of a text that more text could complete to a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def letters():
    """{character: byte} of byte-level vocabularies: printable Latin-1 is itself, other bytes stand from 256
    on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in shown]
    return {chr(i): i for i in shown} | {chr(256 + n): i for n, i in enumerate(others)}


LETTERS = letters()
BYTE = re.compile("<0x[0-9A-F]{2}>")        # a byte in SentencePiece's vocabularies


def token_as_json(token, logp, tokenizer):
    """A token with its log-prob in nats. bytes: those of a part of a character too; null for a control token,
    which is no text, and where they are not known."""
    name, text = tokenizer.bpe.id_to_token(token) or "", tokenizer.decode([token])
    if BYTE.fullmatch(name):
        data = [int(name[3:5], 16)]
    elif "\ufffd" in text:
        data = [LETTERS[c] for c in name] if LETTERS.keys() >= set(name) else None
    else:
        # A second time, as it follows another: some tokenizers take the space from the beginning of a text.
        text = tokenizer.decode([token, token])[len(text):]
        data = list(text.encode()) or None
    return {"token": text or name, "logprob": max(logp, LEAST_LOGP), "bytes": data}


class Reply:
    """The JSON of the answers to one request."""

    def __init__(self, number, batch, request):
        self.request = request
        self.head = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": batch.name}
        self.texts = [Text(row, batch) for row in request.rows]

    def usage(self):
        read, new = len(self.request.prompt), sum(len(row.ids) for row in self.request.rows)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def whole(self):
        choices = []
        for i, text in enumerate(self.texts):
            said, logps = text.take()
            choices.append({"index": i, "message": {"role": "assistant", "content": said}, "logprobs": logps,
                            "finish_reason": text.row.finish_reason})
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def chunk(self, choices, **more):
        return event({**self.head, "object": "chat.completion.chunk", "choices": choices, **more})

    def piece(self, i, delta, logps=None, finish_reason=None):
        return self.chunk([{"index": i, "delta": delta, "logprobs": logps, "finish_reason": finish_reason}])

    def opening(self):
        return b"".join(self.piece(i, {"role": "assistant", "content": ""}) for i in range(len(self.texts)))

    def news(self):
        """The events of what is new in all answers."""
        made = []
        for i, text in enumerate(self.texts):
            if text.has_ended:
                continue
            said, logps = text.take()
            if said or logps and logps["content"]:
                made.append(self.piece(i, {"content": said}, logps))
            if text.has_ended:
                made.append(self.piece(i, {}, None, text.row.finish_reason))
        return b"".join(made)

    def ending(self, with_usage):
        usage = self.chunk([], usage=self.usage()) if with_usage else b""
        return usage + b"data: [DONE]\n\n"


def event(value):
    """A server-sent event."""
    return f"data: {dumps(value)}\n\n".encode()


def error_as_json(message, status=400, code=None):
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": str(message), "type": kind, "param": None, "code": code}}
