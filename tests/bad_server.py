"""An OpenAI-compatible server in a thread of the tests, which can be made to misbehave."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789abcdef"


def reply(text="ja", finish="stop", usage=(3, 2), **changes):
    """The body of a success."""
    value = {"id": "1", "object": "chat.completion", "model": "served-name", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}} | changes
    return json.dumps(value).encode()


def message(**fields):
    """The body of a success whose message has these fields."""
    finish = fields.pop("finish", "stop")
    return reply(choices=[{"index": 0, "finish_reason": finish, "message": {"role": "assistant", **fields}}])


def error(text):
    return json.dumps({"error": {"message": text, "type": "x", "param": None, "code": None}}).encode()


class Server:
    """with Server(answer) as server: server.url + "#model" is an endpoint.

    answer(body, times): what the POST gets that asks for `body` for the times-th time (0, 1, ...): the bytes
    of a success, or (status, headers, bytes), or a function of the handler that writes what it likes.
    """

    def __init__(self, answer=lambda body, times: reply(), models=("m",)):
        self.answer, self.models, self.asked, self.lock = answer, models, [], threading.Lock()
        self.headers, self.end = [], threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                self.headers.append(dict(handler.headers))
                if callable(self.models):
                    return handler.give(self.models(handler.headers))
                handler.give(json.dumps({"data": [{"id": model} for model in self.models]}).encode())

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with self.lock:
                    times = sum(other["messages"][-1]["content"] == question for other in self.asked)
                    self.asked.append(body)
                    self.headers.append(dict(handler.headers))
                handler.give(self.answer(body, times))

            def give(handler, found):
                if callable(found):
                    return found(handler)
                status, headers, data = found if isinstance(found, tuple) else (200, {}, found)
                handler.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass                            # a client that has gone

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_port}"
        self.url = f"http://{self.host}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.end.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def questions(self):
        return [body["messages"][-1]["content"] for body in self.asked]
