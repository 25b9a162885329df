"""An OpenAI-compatible endpoint as one HTTP request sees it: its URL and key, and what a status means.

The key is sent to the endpoint's own host and goes nowhere else: it is in no message, even if the server
repeats it, and redirects are named and not followed. Standard library alone.
"""

import email.utils
import math
import queue
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.parse import urlsplit

from .command import printable, shortened
from .files import dumps, parse_object

LOOK_TRIES = 3          # of the request that sees whether the server is there
LONGEST_WAIT = 600      # seconds: a server that asks to wait longer stops the command
TIMEOUT = 600           # seconds for one request, as in openai-python
MAX_BODY = 1 << 24      # bytes of a reply
HIDDEN = 12             # a key of fewer characters might be a word of an answer, where it is left
HIDDEN_IN_MESSAGES = 4
LOOPBACK = ("localhost", "127.0.0.1", "::1")
AGAIN = (408, 409, 429)                             # and 500 to 599


def is_endpoint(text):
    return str(text).lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked. extra: {field: value} beside the fields that are sent; None takes one away.

    key_from: the environment variable that `key` came from, for messages.
    """
    base_url: str
    model: str
    key: str = field(default=None, repr=False, compare=False)
    key_from: str = field(default="", compare=False)
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise ValueError(f"the key in {self.key_from} is empty, or holds a space or a character that no "
                             "HTTP header can hold; set it again")

    @classmethod
    def of(cls, text, **more):
        """The endpoint of "http(s)://host/v1#model". ValueError if it is written otherwise."""
        url, _, model = text.partition("#")
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port        # reading the port checks it
        except ValueError:
            host = None
        # what may hold a password is not repeated
        if host and ("@" in parts.netloc or "?" in url):
            raise ValueError(f"the endpoint at {host}: its URL has a user or a query, which may hold a "
                             "secret; give http(s)://host/v1#model, and a key by --key-from")
        if not host or not re.fullmatch(r"[!-~]+", url):
            raise ValueError(f"{shortened(text)}: not the URL of an endpoint; give http(s)://host/v1#model")
        if not model.strip() or not model.isprintable():
            raise ValueError(f"{url}: no model is named; give {url}#model")
        return cls(f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}", model, **more)

    @property
    def host(self):
        """Host and port."""
        return urlsplit(self.base_url).netloc

    @property
    def name(self):
        """What records and messages call it."""
        return f"{self.host}/{self.model}"

    def hidden(self, value, least=HIDDEN):
        """A text or a JSON value in which the key, should the server repeat it, is replaced. least: a key of
        fewer characters is no secret."""
        if isinstance(value, str) and self.key and len(self.key) >= least:
            return value.replace(self.key, "[the key]")
        if isinstance(value, list):
            return [self.hidden(part) for part in value]
        if isinstance(value, dict):
            return {self.hidden(name): self.hidden(part) for name, part in value.items()}
        return value

    def line(self, text):
        """What the server says as one line of at most 200 characters. The key is hidden first, as a cut key
        would not be found."""
        return " ".join(printable(self.hidden(text, HIDDEN_IN_MESSAGES)).split())[:200]


# ---- one request -------------------------------------------------------------------------------------------

class Wrong(Exception):
    """What a request got instead of an answer. kind: in two words; said: what the server said of it; again:
    whether to ask again; wait: the seconds that the server asks for, or None."""

    def __init__(self, kind, said="", again=True, wait=None):
        super().__init__(kind)
        self.kind, self.said, self.again, self.wait = kind, said, again, wait


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def send(endpoint, path, body=None, timeout=TIMEOUT):
    """(status, headers, bytes) of one request: a POST of the JSON value `body`, or a GET without one.

    `Wrong` if the server is not reached, is too slow, or breaks off. ValueError for a certificate that is not
    trusted. The request has a thread, as a slow name server, or a server that sends a byte now and then,
    never meets the socket's own timeout.
    """
    found = queue.SimpleQueue()

    def work():
        try:
            found.put(exchange(endpoint, path, body, timeout))
        except Exception as error:                      # it is raised below
            found.put(error)
    threading.Thread(target=work, daemon=True).start()
    try:
        reply = found.get(timeout=timeout)
    except queue.Empty:
        reply = TimeoutError()
    if not isinstance(reply, Exception):
        return reply
    cause = getattr(reply, "reason", reply)
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise ValueError(f"{endpoint.name}: its certificate is not trusted ({cause.verify_message}); look at "
                         "the URL, or set SSL_CERT_FILE")
    if isinstance(cause, TimeoutError):
        raise Wrong("timeout", f"no whole reply in {timeout:g} s")
    if isinstance(reply, (OSError, HTTPException)):
        raise Wrong("connection", endpoint.line(f"{type(cause).__name__}: {cause}"))
    raise reply


def exchange(endpoint, path, body, timeout):
    """(status, headers, bytes) of a request, or what urllib raises. timeout: seconds of each wait for the
    socket."""
    headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "aya_min"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(endpoint.base_url + path, body and dumps(body).encode(), headers)
    # the environment's proxies, but for this machine itself
    of_this_machine = urlsplit(endpoint.base_url).hostname in LOOPBACK
    proxies = urllib.request.ProxyHandler({} if of_this_machine else None)
    try:
        reply = urllib.request.build_opener(proxies, NoRedirect).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:             # a status that is no success has a reply too
        reply = error
    with reply:
        if (coding := reply.headers.get("content-encoding", "identity")) != "identity":
            raise Wrong("compressed", f"a reply of {endpoint.line(coding)}, which was not asked for",
                        again=False)
        return reply.status, reply.headers, read_all(reply)


def read_all(reply):
    """The bytes of a reply, MAX_BODY at most."""
    data, announced = bytearray(), getattr(reply, "length", None)       # Content-Length
    while len(data) != announced and (part := reply.read1(1 << 16)):
        data += part
        if len(data) > MAX_BODY:
            raise Wrong("too large", f"a reply of more than {MAX_BODY >> 20} MiB", again=False)
    if announced and len(data) < announced:
        raise HTTPException(f"the reply broke off after {len(data)} of {announced} bytes")
    return bytes(data)


def wait_of(headers, now):
    """The seconds that Retry-After (seconds or a date) or retry-after-ms asks for, None without one. now: the
    time in seconds since 1970."""
    try:
        if headers.get("retry-after-ms"):
            wait = float(headers["retry-after-ms"]) / 1000
        else:
            wait = float(headers.get("retry-after") or "")
    except ValueError:
        try:
            wait = email.utils.mktime_tz(email.utils.parsedate_tz(headers.get("retry-after"))) - now
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, wait) if not math.isnan(wait) else None


def backoff(tries):
    """Seconds to wait after this number of tries: 0.5, 1, 2, ... 60, less up to a quarter, so that threads do
    not come back together."""
    return min(60, 0.5 * 2 ** (tries - 1)) * (1 - 0.25 * random.random())


def message_in(endpoint, data):
    """What the body of an error says, in one line of at most 200 characters."""
    try:
        found = parse_object(data, "")
        error = found.get("error") or found.get("message") or found.get("detail") or found
        text = error.get("message") or error.get("code") or error if isinstance(error, dict) else error
    except ValueError:
        text = data.decode("utf-8", "replace")
    text = text if isinstance(text, str) else dumps(text)
    return endpoint.line(text) or "it says nothing"


def check_status(endpoint, status, headers, data):
    """Raise what a status that is no success means: ValueError where asking again or asking something else
    cannot help (a wrong key, model or URL), else `Wrong`."""
    if 200 <= status < 300:
        return
    said, again = message_in(endpoint, data), f"{endpoint.name}: HTTP {status}"
    key = f"the key in {endpoint.key_from}" if endpoint.key else "no key, as none is set,"
    if 300 <= status < 400:
        parts = urlsplit(headers.get("location") or "elsewhere")
        place = endpoint.line(f"{parts.scheme}://{parts.netloc}{parts.path}" if parts.netloc else parts.path)
        raise ValueError(f"{again}: it sends on to {place}, which is not followed, as the key is for "
                         f"{endpoint.host}; give the URL itself")
    if status == 402 or status == 429 and b"insufficient_quota" in data:
        raise ValueError(f"{again}: its account is used up ({said}); give another, or wait")
    if status in (401, 403):
        remedy = f"set {endpoint.key_from or 'a variable'} to a key for {endpoint.host}, or name another "
        raise ValueError(f"{again}: {key} does not open {endpoint.model} ({said}); {remedy}variable by "
                         "--key-from")
    if status in (404, 405):
        raise ValueError(f"{again}: no model {endpoint.model!r}, or no such path ({said}); give the URL as "
                         "the server names it, often ending in /v1, and a model of "
                         f"{endpoint.base_url}/models")
    if status not in AGAIN and status < 500:
        raise Wrong(f"HTTP {status}", said, again=False)
    wait = wait_of(headers, time.time())
    if wait is not None and wait > LONGEST_WAIT:
        raise ValueError(f"{again}: it asks to wait {wait:.0f} s ({said}); give the command again then")
    raise Wrong(f"HTTP {status}", said, wait=wait)


def check_there(endpoint, sleep=time.sleep):
    """The names that GET /models lists, None if the server has no such list. ValueError if it is not there,
    or does not take the key."""
    for tries in range(1, LOOK_TRIES + 1):
        try:
            status, headers, data = send(endpoint, "/models", timeout=20)
            if status in (404, 405, 501):
                return None
            check_status(endpoint, status, headers, data)
            break
        except Wrong as wrong:
            if tries == LOOK_TRIES or not wrong.again:
                raise ValueError(f"{endpoint.name}: GET {endpoint.base_url}/models gives no reply "
                                 f"({wrong.kind}: {wrong.said}); start the server, or look at the "
                                 "URL") from None
            sleep(min(20, max(backoff(tries), wrong.wait or 0)))
    try:
        return [endpoint.hidden(str(model["id"])) for model in parse_object(data, "")["data"]]
    except (ValueError, TypeError, KeyError):
        return None
