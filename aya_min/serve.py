"""The server: OpenAI's chat completions over HTTP/1.1, and a page to chat in the browser.

    GET  /                          the page (serve_page.html)
    GET  /v1/models, /health        what is served; how busy it is
    POST /v1/chat/completions       whole answers, or a stream of server-sent events

One connection is one request ("Connection: close"), so that nothing of one can be read as the next. An event
loop reads and writes them all, and one thread owns the models (serve_batch.py). Whatever a client does costs
a bounded time and space: the head, the body, the number of connections and of open answers, and the waits for
a client that neither sends nor reads. When connections run out, the oldest that has not asked yet is closed.
A client that closes its half of the connection has gone: nothing tells it from one that leaves.

Pages of every site may ask and read the answers (Access-Control-Allow-Origin: *): a page that is open in a
browser which reaches this address can use the models, but nothing else, as there are no files, accounts or
conversations here. For the same reason nothing checks the Host. Put a proxy in front where that is too much.
"""

import asyncio
import base64
import hashlib
import re
import socket
import time
import traceback
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote

import torch

from . import weights
from .command import OUR_FAULT, printable, shortened
from .distributed import say
from .files import dumps
from .patience import in_own_thread
from .sampling import engine_size
from .serve_batch import Batch, Worker
from .serve_request import Refused, Reply, error_as_json, event, read_request

PAGE = Path(__file__).with_name("serve_page.html")
MAX_LENGTH = 8192               # tokens of a row, where a model has more positions
DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")     # what a request may leave out
MAX_HEAD, MAX_BODY = 16 << 10, 1 << 20          # bytes; MAX_BODY grows with the rows, see Server
BYTES_PER_TOKEN = 64                            # of a body at most: JSON may write a character in 12 bytes
HEAD_SECONDS, BODY_SECONDS, WRITE_SECONDS, LINGER_SECONDS = 10, 30, 30, 2
# A process may open 1,024 files on most systems.
MAX_CONNECTIONS, MAX_REFUSED, MAX_BACKLOG = 512, 256, 128
# Answers that wait for a row. Beyond them a client is asked to come back.
MAX_WAITING = 512
MAX_NAMES = 100                                 # unknown fields that are told of
CORS = {"Access-Control-Allow-Origin": "*"}
PREFLIGHT = {"Access-Control-Allow-Methods": "GET, POST, OPTIONS", "Access-Control-Max-Age": "86400",
             "Access-Control-Allow-Headers": "Authorization, Content-Type, *"}


# ---- HTTP --------------------------------------------------------------------------------------------------

def parse_head(data):
    """(method, path, {lower-case name: value}) of the head of a request."""
    first, *lines = data.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Refused(f"{shortened(first)} is not a request line of HTTP/1.1")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or name.lower() in headers and name.lower() in (
                "content-length", "transfer-encoding"):
            raise Refused(f"the header {shortened(line)} is not of HTTP/1.1")
        headers[name.lower()] = value.strip()
    return words[0], unquote(words[1].partition("?")[0]), headers


def body_length(headers, most):
    text = headers.get("content-length")
    if "transfer-encoding" in headers or text is None:
        raise Refused("send the body with a Content-Length, not in chunks", 411)
    if not (text.isascii() and text.isdecimal()):
        raise Refused(f"Content-Length {shortened(text)} is not a number")
    if len(text) > 18 or int(text) > most:
        raise Refused(f"the body has {text[:18]} bytes, at most {most} are read", 413)
    return int(text)


def head_of(status, kind, **headers):
    """The head of a response, as bytes. headers: "_" in a name stands for "-"."""
    lines = {"Content-Type": kind, "Connection": "close", "X-Content-Type-Options": "nosniff", **CORS,
             **{name.replace("_", "-"): value for name, value in headers.items()}}
    first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return (first + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n").encode()


async def send(writer, data):
    """Write bytes and wait until the system has taken them; TimeoutError if the client does not read."""
    writer.write(data)
    async with asyncio.timeout(WRITE_SECONDS):
        await writer.drain()


async def respond(writer, status, body, kind="application/json", **headers):
    data = body if isinstance(body, bytes) else dumps(body).encode()
    await send(writer, head_of(status, kind, Content_Length=len(data), **headers) + data)


async def linger(reader, writer):
    """Close a connection once the client has read the response: to one that still sends, closing at once
    would take away the response too."""
    with suppress(ConnectionError, TimeoutError, OSError):
        writer.write_eof()
        async with asyncio.timeout(LINGER_SECONDS):
            while await reader.read(1 << 16):
                pass


async def while_there(reader, work):
    """Await a coroutine; cancel it when the client closes the connection."""
    async def gone():
        with suppress(ConnectionError):
            while await reader.read(1 << 12):
                pass
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---- the server --------------------------------------------------------------------------------------------

def read_page():
    """(the page as bytes, its Content-Security-Policy: its own style and script, and nothing else)."""
    text = PAGE.read_text(encoding="utf-8")
    allowed = {"script": [], "style": []}
    for name, inside in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        allowed[name].append(f"'sha256-{digest}'")
    sources = "; ".join(f"{name}-src {' '.join(hashes)}" for name, hashes in allowed.items())
    return text.encode(), (f"default-src 'none'; {sources}; connect-src 'self'; base-uri 'none'; "
                           "form-action 'none'; frame-ancestors 'none'")


class Server:
    """batches: {name: Batch} of the models that are served. defaults: see read_request. seed: of the first
    request without one; each later one has the next."""

    def __init__(self, batches, defaults, seed):
        self.batches, self.defaults, self.seed = batches, defaults, seed
        self.page, self.policy = read_page()
        self.max_body = max(MAX_BODY, BYTES_PER_TOKEN * max(b.max_tokens for b in batches.values()))
        self.started, self.num_requests = int(time.time()), 0
        self.connections = set()        # tasks
        self.idle = {}                  # {task of a connection that has not asked yet: None}, oldest first
        self.news = {}                  # {open request: the event that wakes its connection}
        self.num_open = dict.fromkeys(batches, 0)       # answers that are decoded or wait
        self.ignored = set()            # names of fields that were told of

    async def run(self, listening):
        """Serve on a bound socket until the task is cancelled."""
        loop = asyncio.get_running_loop()
        self.worker = Worker(list(self.batches.values()),
                             lambda news: loop.call_soon_threadsafe(self.wake, news))
        self.worker.start()
        try:
            # Its wait_closed would wait for every open connection, from Python 3.12 on.
            server = await asyncio.start_server(self.connected, sock=listening, limit=MAX_HEAD,
                                                backlog=MAX_BACKLOG)
            say(f"serves {' and '.join(self.batches)} at {url_of(listening)} (Ctrl-C ends it)")
            await loop.create_future()          # for ever; `server` must not be collected meanwhile
            server.close()
        finally:
            self.worker.close()

    def wake(self, news):
        for request in news:
            if request in self.news:
                self.news[request].set()

    async def connected(self, reader, writer):
        """One connection, which is one request."""
        task = asyncio.current_task()
        self.connections.add(task)
        self.idle[task] = None
        writer.transport.set_write_buffer_limits(0)
        try:
            try:
                self.make_room(task)
                asked = await self.read(reader, writer)
                self.idle.pop(task, None)
                await while_there(reader, self.answer(*asked, writer))
            except Refused as error:
                await respond(writer, error.status, error_as_json(error, error.status, error.code),
                              **error.headers)
            await linger(reader, writer)
        except (asyncio.CancelledError, asyncio.IncompleteReadError, OSError, TimeoutError):
            pass                        # the client has gone, does not read, or had to make room
        finally:
            self.connections.discard(task)
            self.idle.pop(task, None)
            writer.transport.abort()

    def make_room(self, task):
        """Close the oldest connection that has not asked, if there are too many; Refused if all have."""
        if len(self.connections) > MAX_CONNECTIONS + MAX_REFUSED:
            raise ConnectionAbortedError        # even those that are told so are too many
        if len(self.connections) > MAX_CONNECTIONS:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            if oldest is task:
                raise busy(f"{MAX_CONNECTIONS} connections are open")
            self.connections.discard(oldest)
            oldest.cancel()

    async def read(self, reader, writer):
        """(method, path, body) of a request."""
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                method, path, headers = parse_head(await reader.readuntil(b"\r\n\r\n"))
            if method != "POST":
                return method, path, b""
            length = body_length(headers, self.max_body)
            if headers.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            async with asyncio.timeout(BODY_SECONDS):
                return method, path, await reader.readexactly(length)
        except asyncio.LimitOverrunError:
            raise Refused(f"the head of the request is longer than {MAX_HEAD} bytes", 431) from None
        except TimeoutError:
            raise Refused(f"the request was not there in {HEAD_SECONDS} s (head) and {BODY_SECONDS} s (body)",
                          408) from None

    async def answer(self, method, path, body, writer):
        routes = {"/": ("GET", self.send_page), "/health": ("GET", self.health),
                  "/v1/models": ("GET", self.models), "/v1/chat/completions": ("POST", self.chat)}
        if method == "OPTIONS":
            return await respond(writer, 200, b"", "text/plain", **PREFLIGHT)
        name = path.removeprefix("/v1/models/")
        if name in self.batches and name != path:
            routes[path] = "GET", lambda body, writer: respond(writer, 200, self.about(name))
        if path not in routes:
            raise Refused(f"no {shortened(path)} here; there are {' '.join(routes)}", 404)
        wanted, route = routes[path]
        if method != wanted:
            raise Refused(f"{shortened(method)} {path}: this path takes {wanted}", 405,
                          Allow=f"{wanted}, OPTIONS")
        try:
            await route(body, writer)
        except (Refused, OSError):
            raise
        except Exception as error:
            raise fault_of_ours(error) from None

    async def send_page(self, body, writer):
        await respond(writer, 200, self.page, "text/html; charset=utf-8", Cache_Control="no-cache",
                      Referrer_Policy="no-referrer", Content_Security_Policy=self.policy)

    async def health(self, body, writer):
        """Open answers and rows by model; 503 if the models' thread has ended."""
        about = {name: {"rows": batch.slots, "rows_in_use": len(batch.rows), "open": self.num_open[name]}
                 for name, batch in self.batches.items()}
        is_well = self.worker.is_alive()
        await respond(writer, 200 if is_well else 503,
                      {"status": "ok" if is_well else "the models' thread has ended", "models": about})

    def about(self, name):
        return {"id": name, "object": "model", "created": self.started, "owned_by": "aya_min",
                "max_model_len": self.batches[name].max_tokens}

    async def models(self, body, writer):
        await respond(writer, 200, {"object": "list", "data": [self.about(name) for name in self.batches]})

    # ---- chat completions

    async def chat(self, body, writer):
        number, ignored = self.num_requests, set()
        self.num_requests += 1
        seed = (self.seed + number) % (1 << 63)
        try:
            batch, request, with_usage = await asyncio.to_thread(
                read_request, body, self.batches, self.defaults, seed, ignored)
        except Refused:
            raise
        except ValueError as error:
            raise Refused(error) from None
        self.tell_ignored(ignored)
        if self.num_open[batch.name] + request.num_samples > batch.slots + MAX_WAITING:
            raise busy(f"{self.num_open[batch.name]} answers are open")
        self.num_open[batch.name] += request.num_samples
        self.news[request] = asyncio.Event()
        try:
            self.worker.add(batch, request)
            reply = Reply(f"{self.started:x}-{number}", batch, request)
            await (self.stream if request.is_streamed else self.whole)(reply, writer, with_usage)
        finally:
            request.is_left = True
            del self.news[request]
            self.num_open[batch.name] -= request.num_samples

    def tell_ignored(self, names):
        """One line for the names of fields that were not told of before."""
        new = sorted(names - self.ignored)[:max(0, MAX_NAMES - len(self.ignored))]
        if new:
            self.ignored.update(new)
            say(printable(f"fields of requests that are not read: {', '.join(map(shortened, new))} (said "
                          "once)"))

    async def whole(self, reply, writer, with_usage):
        while not reply.request.is_done():
            await self.news[reply.request].wait()
            self.news[reply.request].clear()
        if reply.request.error:
            raise Refused(reply.request.error, 500)
        # In a thread: many answers with log-probs take their time.
        await respond(writer, 200, await asyncio.to_thread(lambda: dumps(reply.whole()).encode()))

    async def stream(self, reply, writer, with_usage):
        """Errors too are events once the head has been sent."""
        request, is_done = reply.request, False
        await send(writer, head_of(200, "text/event-stream", Cache_Control="no-cache") + reply.opening())
        try:
            while not is_done:
                await self.news[request].wait()
                self.news[request].clear()
                is_done = request.is_done()         # before the news, of which the last is then sent
                if request.error:
                    raise Refused(request.error, 500)
                if news := reply.news():
                    await send(writer, news)
            await send(writer, reply.ending(with_usage))
        except OSError:
            raise
        except Exception as error:
            error = error if isinstance(error, Refused) else fault_of_ours(error)
            await send(writer, event(error_as_json(error, 500)))


def fault_of_ours(error):
    """Show an exception in full. Returns what the client is told of it."""
    traceback.print_exception(error)
    say(f"{OUR_FAULT}; the server goes on")
    return Refused(f"{type(error).__name__}: a fault of the server, which shows it in full", 500)


def busy(why):
    return Refused(f"{why}; ask again in a while", 503, Retry_After="1")


def listen(host, port):
    """A bound socket, which does not listen before the models are loaded. ValueError names the flags."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; give others") from None
    return bound


def url_of(bound):
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def plan_rows(folder, config, args, device):
    """(tokens per row, bytes of the KV cache). ValueError if that does not fit model or memory."""
    positions = config.max_position_embeddings
    tokens = args.max_length or min(positions, MAX_LENGTH)
    if tokens > positions:
        raise ValueError(f"--max-length {tokens}: {folder} has {positions} positions; give fewer")
    return tokens, engine_size(config, [tokens - 1], [1], args.batch_size, args.batch_size, device,
                               getattr(torch, args.dtype), "lower --max-length")[2]


def serve_models(args, metas, device):
    """Serve the models of these folders until Ctrl-C, which raises KeyboardInterrupt."""
    bound = listen(args.host or "127.0.0.1", 8000 if args.port is None else args.port)
    for folder, (model, *_) in metas.items():
        plan_rows(folder, model.config, args, device)           # before any weights are read
    names = [weights.name_of(folder) for folder in metas]
    names = names if len({*names}) == len(names) else list(metas)
    batches = in_own_thread(lambda: {name: load_batch(name, folder, args, device)
                                   for name, folder in zip(names, metas)})
    defaults = {name: getattr(args, name) for name in DEFAULTS}
    asyncio.run(Server(batches, defaults, args.seed).run(bound))


def load_batch(name, folder, args, device):
    model, tokenizer = weights.load(folder, device, getattr(torch, args.dtype), packed=True)
    tokens, size = plan_rows(folder, model.config, args, device)
    say(f"{name}: KV cache of {args.batch_size} rows x {tokens} tokens, {size / 1e6:,.1f} MB")
    return Batch(name, model, tokenizer, args.batch_size, tokens)
