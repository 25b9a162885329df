"""The page of the server in a real browser: Chromium, headless, driven over its debugging pipe. Nothing here
runs without chromium."""

import base64
import json
import os
import shutil
import subprocess

import pytest
from small import language_model
from test_serve import running, until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.long, pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")]


class Browser:
    """Chromium with one tab. Commands and replies are JSON, each ended by a NUL (--remote-debugging-pipe)."""

    def __init__(self, folder):
        to_read, self.to_write = os.pipe()
        self.to_read, to_write = os.pipe()

        def pipes():
            """The browser reads from 3 and writes to 4. dup2 twice, as 3 and 4 may be taken by the pipes."""
            ends = os.dup(to_read), os.dup(to_write)
            high = [os.dup2(end, 200 + i) for i, end in enumerate(ends)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={folder}", "about:blank"], preexec_fn=pipes, close_fds=False,
            stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.number, self.session, self.rest, self.events = 0, None, b"", []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.number += 1
        about = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": params, **about}
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        while (reply := self.next()).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def next(self):
        while b"\0" not in self.rest:
            data = os.read(self.to_read, 1 << 16)
            assert data, "the browser has ended"
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        made = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def open(self, url, width=1100, height=750, mobile=False, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
             mobile=mobile)
        self("Emulation.setEmulatedMedia",
             features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self("Page.navigate", url=url)
        until(lambda: self.run("document.readyState === 'complete' && typeof models !== 'undefined' "
                               "&& models.length > 0"))

    def key(self, name, **more):
        text = {"text": "\r"} if name == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, windowsVirtualKeyCode={
            "Enter": 13, "Escape": 27}.get(name, 78), **text, **more)
        self("Input.dispatchKeyEvent", type="keyUp", key=name, code=name, **more)

    def say(self, text):
        """Type a text as a user does, and Enter."""
        self.run("id('said').focus()")
        self("Input.insertText", text=text)
        self.key("Enter")

    def picture(self, path):
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def complaints(self):
        """What the console and the network would show in red."""
        self.run("1")
        return [e["params"] for e in self.events if e.get("method") in ("Runtime.exceptionThrown",)
                or e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to_read)
        os.close(self.to_write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def port():
    sizes = dict(max_position_embeddings=20_000)
    with running(language_model(**sizes), language_model(1, **sizes)) as port:
        yield port


ANSWERS = "[...document.querySelectorAll('article')].map(a => a.innerText.split('\\n')[0])"
IDLE = "running === null"


def test_a_message_gets_an_answer_of_each_model_and_turns_are_kept(browser, port):
    browser.open(f"http://127.0.0.1:{port}/")
    browser.say("red or blue?")
    until(lambda: browser.run(IDLE))
    assert browser.run(ANSWERS) == ["m0", "m1"]
    turns = browser.run("models.map(m => m.turns)")
    assert all([t["role"] for t in each] == ["user", "assistant"] for each in turns)
    shown = browser.run("[...document.querySelectorAll('article .text')].map(n => n.textContent)")
    assert shown == [each[1]["content"] for each in turns] and shown[0] != shown[1]
    browser.say("مرحبا بالعالم")
    until(lambda: browser.run(IDLE))
    assert browser.run("models.map(m => m.turns.length)") == [4, 4]
    directions = browser.run(
        "[...document.querySelectorAll('.asked')].map(n => getComputedStyle(n).direction)")
    assert directions == ["ltr", "rtl"]
    assert browser.complaints() == []


def test_escape_stops_an_answer_and_alt_n_begins_anew(browser, port):
    browser.open(f"http://127.0.0.1:{port}/")
    browser.run("id('limit').value = 19000; id('temperature').value = 1")
    browser.say("red?")
    until(lambda: browser.run("document.querySelector('article .text')?.textContent.length > 20"))
    assert browser.run("id('send').hidden && !id('stop').hidden")
    browser.key("Escape")
    until(lambda: browser.run(IDLE))
    notes = browser.run("[...document.querySelectorAll('article .note')].map(n => n.textContent)")
    assert notes == ["stopped"] * 2
    browser.key("KeyN", modifiers=1)
    assert browser.run("document.querySelectorAll('.turn').length") == 0
    assert browser.run("models.map(m => m.turns.length)") == [0, 0]


def test_an_error_is_shown_and_the_question_is_not_kept(browser, port):
    browser.open(f"http://127.0.0.1:{port}/")
    browser.run("id('limit').value = 30000")
    browser.say("red?")
    until(lambda: browser.run(IDLE))
    assert "max_tokens 30000" in browser.run("document.querySelector('.note.bad').textContent")
    assert browser.run("models.map(m => m.turns.length)") == [0, 0]


def test_nothing_is_wider_than_a_phone(browser, port):
    browser.open(f"http://127.0.0.1:{port}/", width=360, height=640, mobile=True)
    browser.say("w" * 300)
    until(lambda: browser.run(IDLE))
    assert browser.run("document.documentElement.scrollWidth") == 360
    browser("Input.insertText", text="a line\n" * 9)
    until(lambda: browser.run("log.scrollHeight - log.scrollTop - log.clientHeight < 2"))
