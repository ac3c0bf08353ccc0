"""The page in a browser, against a small server that says what a test wants, when it wants."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parent.parent / "smollm2" / "serving" / "page.html"
CONTEXT = 2048


class StandIn(ThreadingHTTPServer):
    """What the page sees of the server: its own text, the model, and answers in pieces."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/"
        self.pieces = ["Hello", " world", "."]
        self.hold: int | None = None  # pieces before the answer waits for `go`
        self.go, self.client_left = threading.Event(), threading.Event()
        self.breaks = False  # the connection ends in the middle of the answer
        self.refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None
        self.key = ""
        self.finish, self.read = "stop", 30
        self.asked: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def end(self) -> None:
        self.go.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Connection": "close", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), "application/json", headers)

    def allowed(self) -> bool:
        return not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models" and self.allowed():
            self.answer_json(200, {"data": [{"id": "tiny/SmolLM2", "max_model_len": CONTEXT}]})
        else:
            self.answer_json(401 if self.path == "/v1/models" else 404, {"error": {"message": "no"}})

    def do_POST(self) -> None:
        server = self.server
        server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if not self.allowed():
            return self.answer_json(401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
        if server.refusal:
            status, error, headers = server.refusal
            return self.answer_json(status, {"error": error}, headers)
        stream_headers = {"Transfer-Encoding": "chunked"}
        try:
            self.answer(200, b"", "text/event-stream", stream_headers)
            for index, piece in enumerate(server.pieces):
                if index == server.hold:
                    while not server.go.wait(0.01):
                        self.wfile.write(b"3\r\n: \n\r\n")  # a comment, to notice that the reader has left
                if index and server.breaks:
                    return
                self.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": server.finish}]})
            count = len(server.pieces)
            usage = {"prompt_tokens": server.read, "completion_tokens": count}
            usage["total_tokens"] = server.read + count
            self.event({"choices": [], "usage": usage})
            self.chunk("data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            server.client_left.set()

    def event(self, value: Any) -> None:
        self.chunk(f"data: {json.dumps(value)}\n\n")

    def chunk(self, text: str) -> None:
        content = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium or google-chrome on the path")
    arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.end()


@pytest.fixture
def page(browser: Any, server: StandIn) -> Iterator[Any]:
    """The page, open; at the end it must have made no mistake and asked nobody but its server."""
    yield from opened(browser, server)


def opened(browser: Any, server: StandIn, **options: Any) -> Iterator[Any]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
    context.set_default_timeout(20_000)
    page, faults, requests = context.new_page(), [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.address)
    yield page
    context.close()
    assert not faults
    assert {url for url in requests if not url.startswith((server.address, "data:"))} == set()


@pytest.fixture(scope="module")
def still_page(browser: Any) -> Iterator[Any]:
    """A page for tests of its functions alone."""
    server = StandIn()
    yield from opened(browser, server)
    server.end()


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answered(page: Any, text: str) -> None:
    """Waits until the newest answer is complete, and is this."""
    page.get_by_role("button", name="Retry").wait_for()
    sees(page.locator("article .body").last, text)


def sees(locator: Any, text: str | re.Pattern[str]) -> None:
    from playwright.sync_api import expect

    expect(locator).to_have_text(text, timeout=20_000)


def test_only_the_pages_own_script_and_style_are_allowed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert content and page.count(f"<{tag}") == 1
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        allowed = re.search(f"{kind} 'sha256-(.*?)'", page)
        assert allowed and allowed[1] == digest, f"{PAGE.name}: {kind} is now 'sha256-{digest}'"


def test_an_answer_arrives_piece_by_piece(page: Any, server: StandIn) -> None:
    server.hold = 2
    ask(page, "Say hello.")
    sees(page.locator(".running .body"), "Hello world")
    assert page.get_by_role("button", name="Stop").is_visible()
    server.go.set()
    answered(page, "Hello world.")
    sees(page.locator(".assistant .foot"), re.compile(r"3 tokens · .* tokens/s · first after \d+\.\d\d s"))
    sees(page.locator("#context"), "33 of 2,048 tokens of context")
    ask(page, "Again.")
    answered(page, "Hello world.")
    first, second = server.asked
    assert first["messages"] == [{"role": "user", "content": "Say hello."}]
    assert (first["model"], first["stream"]) == ("tiny/SmolLM2", True)
    assert "temperature" not in first  # the server's own is taken
    assert [one["content"] for one in second["messages"]] == ["Say hello.", "Hello world.", "Again."]


def test_an_answer_that_is_stopped_is_kept(page: Any, server: StandIn) -> None:
    server.hold = 1
    ask(page, "Say hello.")
    sees(page.locator(".running .body"), "Hello")
    page.keyboard.press("Escape")
    answered(page, "Hello")
    assert server.client_left.wait(20)
    assert "stopped" in page.locator(".assistant .foot").inner_text()
    server.hold = None
    ask(page, "Go on.")
    answered(page, "Hello world.")
    assert server.asked[-1]["messages"][1] == {"role": "assistant", "content": "Hello"}


def test_a_reload_keeps_the_conversation_and_the_settings(page: Any, server: StandIn) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Save").click()
    ask(page, "Say hello.")
    answered(page, "Hello world.")
    page.reload()
    answered(page, "Hello world.")
    ask(page, "Again.")
    answered(page, "Hello world.")
    assert server.asked[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (server.asked[-1]["temperature"], server.asked[-1]["seed"]) == (0, 7)
    server.hold, server.pieces = 1, ["Half", " an answer"]
    ask(page, "More.")
    sees(page.locator(".running .body"), "Half")
    page.reload()
    answered(page, "Half")


def test_retry_and_edit_ask_again(page: Any, server: StandIn) -> None:
    ask(page, "First.")
    answered(page, "Hello world.")
    ask(page, "Second.")
    answered(page, "Hello world.")
    server.pieces = ["Other."]
    page.get_by_role("button", name="Retry").click()
    answered(page, "Other.")
    assert [one["content"] for one in server.asked[-1]["messages"]] == ["First.", "Hello world.", "Second."]
    page.get_by_role("button", name="Edit").first.click()
    assert page.get_by_label("Message").input_value() == "First."
    page.keyboard.press("Escape")
    assert page.locator("article").count() == 4
    page.get_by_label("Message").press("ArrowUp")
    assert page.get_by_label("Message").input_value() == "Second."
    ask(page, "Third.")
    answered(page, "Other.")
    assert [one["content"] for one in server.asked[-1]["messages"]] == ["First.", "Hello world.", "Third."]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="Undo").click()
    assert page.locator("article").count() == 4


def test_text_never_becomes_html(page: Any, server: StandIn) -> None:
    attack = (
        "<script>window.hit=1</script> <img src=x onerror='window.hit=2'> [a](javascript:window.hit=3) "
        "`<b onclick=x>` **<svg onload=window.hit=4>**\n\n```<i>\n<script>window.hit=5</script>\n```\n"
    )
    server.pieces = [attack[i : i + 7] for i in range(0, len(attack), 7)]
    ask(page, attack)
    page.get_by_role("button", name="Retry").wait_for()
    page.reload()
    page.get_by_role("button", name="Retry").wait_for()
    assert page.evaluate("window.hit") is None
    assert page.locator("article").locator("script, img, a, b, i, svg").count() == 0
    assert "<script>window.hit=5</script>" in page.locator(".assistant pre").inner_text()
    refused = "(html) => { try { document.body.innerHTML = html; } catch (error) { return error.name; } }"
    assert page.evaluate(refused, attack) == "TypeError"  # a mistake in the script would not help either


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (
            "a *b* **c _d_** `e*` snake_case_name 2 * 3 * 4",
            "<p>a <em>b</em> <strong>c <em>d</em></strong> <code>e*</code> snake_case_name 2 * 3 * 4</p>",
        ),
        (
            "[a](https://b.c/d_e)",
            '<p><a href="https://b.c/d_e" target="_blank" rel="noopener noreferrer">a</a></p>',
        ),
        ("# One #\n### Two\ntext", "<h3>One</h3><h5>Two</h5><p>text</p>"),
        ("- a\n  - b\n\n- c\nd", "<ul><li>a<ul><li>b</li></ul></li><li>c<br>d</li></ul>"),
        ("3. a\n\n   b\n4. c", '<ol start="3"><li>a<p>b</p></li><li>c</li></ol>'),
        ("> a\nb\n\n---\n\\*c\\*", "<blockquote><p>a<br>b</p></blockquote><hr><p>*c*</p>"),
        ("* *a*\n\nb", "<ul><li><em>a</em></li></ul><p>b</p>"),
        ("**open `and *unclosed", "<p>**open `and *unclosed</p>"),
    ],
)
def test_markdown(still_page: Any, text: str, html: str) -> None:
    assert still_page.evaluate("(text) => make('div', {}, ...elements(text)).innerHTML", text) == html


@pytest.mark.parametrize("text", [">" * 20_000, "- " * 20_000, "**a " * 9_000, "[" * 30_000, "```\n" * 5_001])
def test_markdown_of_a_model_that_repeats_itself(still_page: Any, text: str) -> None:
    assert still_page.evaluate("(text) => make('div', {}, ...elements(text)).childElementCount", text) > 0


def test_copies_answers_and_code(page: Any, server: StandIn) -> None:
    server.pieces = ["See **this**:\n\n```python\n", "print(1)\nprint(2)", "\n```"]
    ask(page, "Code?")
    page.get_by_role("button", name="Copy code").click()
    sees(page.get_by_role("button", name="Copy code"), "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)\nprint(2)"
    page.locator(".assistant .foot").get_by_role("button", name="Copy").click()
    sees(page.locator(".assistant .foot button").first, "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "".join(server.pieces)


def test_a_server_that_goes_away_and_comes_back(browser: Any, server: StandIn) -> None:
    for page in opened(browser, server):
        server.breaks, server.hold = True, 1
        ask(page, "Say hello.")
        sees(page.locator(".running .body"), "Hello")
        server.go.set()
        sees(page.locator(".notice p"), "The server has gone away.")
        sees(page.locator(".assistant .body"), "Hello")
        sees(page.locator("#toast"), "The server is back.")
        server.end()
        page.get_by_role("button", name="Try again").click()
        sees(page.locator("#banner"), "The server does not answer. Trying again …")
        again = StandIn(server.server_port)
        try:
            page.locator("#banner").wait_for(state="hidden")
            page.get_by_role("button", name="Try again").click()
            answered(page, "Hello world.")
            assert page.locator(".notice").count() == 0
        finally:
            again.end()


def test_refusals_in_words(page: Any, server: StandIn) -> None:
    server.refusal = 429, {"message": "queue full"}, {"Retry-After": "3"}
    ask(page, "First.")
    sees(page.locator(".notice p"), "The server has too much to do; it asks for 3 seconds of patience.")
    server.refusal = 400, {"message": "temperature: expected 0 to 2"}, {}
    page.get_by_role("button", name="Try again").click()
    sees(page.locator(".notice p"), "The server says: temperature: expected 0 to 2")
    server.refusal = None
    page.get_by_role("button", name="Try again").click()
    answered(page, "Hello world.")
    ask(page, "Second.")
    answered(page, "Hello world.")
    server.refusal = 400, {"message": "too long", "code": "context_length_exceeded"}, {}
    ask(page, "Third.")
    sees(page.locator(".notice p"), "The conversation no longer fits into the model's context.")
    server.refusal = None
    page.get_by_role("button", name="Go on without the oldest turns").click()
    answered(page, "Hello world.")
    assert [one["content"] for one in server.asked[-1]["messages"]] == ["Third."]
    assert page.locator(".out").count() == 4
    server.finish = "length"
    for read, why in ((30, "stopped at the limit of 3 tokens"), (CONTEXT - 3, "the context is full")):
        server.read = read
        page.get_by_role("button", name="Retry").click()
        sees(page.locator(".assistant .foot").last, re.compile(why))


def test_a_key_is_asked_for(page: Any, server: StandIn) -> None:
    server.key = "secret"
    page.reload()
    ask(page, "Say hello.")
    sees(page.locator(".notice p"), "The server asks for an API key.")
    for key, then in (("wrong", "The server does not accept this API key."), ("secret", None)):
        page.get_by_role("button", name="Enter the key").click()
        page.keyboard.type(key)  # its field has the focus
        page.keyboard.press("Enter")
        if then:
            sees(page.locator(".notice p"), then)
    answered(page, "Hello world.")
    sees(page.locator("#model"), "tiny/SmolLM2")


def test_dark_and_light(page: Any) -> None:
    def is_dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return max(map(int, re.findall(r"\d+", colour))) < 128

    page.emulate_media(color_scheme="light")
    assert not is_dark()
    page.get_by_role("button", name="Light or dark").click()
    assert is_dark()
    page.reload()
    assert is_dark()
    page.emulate_media(color_scheme="dark")
    page.get_by_role("button", name="Light or dark").click()
    assert not is_dark()
    page.get_by_role("button", name="Light or dark").click()
    assert is_dark()
    page.emulate_media(color_scheme="light")
    assert not is_dark()  # the last choice was the system's own, which is followed


def test_fits_on_a_phone(browser: Any, server: StandIn) -> None:
    word = "supercalifragilistic" * 12
    server.pieces = [f"{word}\n\n```\n{word} {word}\n```\n", f"- {word}\n- `{word}`\n\n# {word}"]
    for page in opened(browser, server, viewport={"width": 360, "height": 640}, has_touch=True):
        ask(page, word)
        page.get_by_role("button", name="Retry").wait_for()
        page.get_by_role("button", name="Settings").click()
        widths = (
            "[document.documentElement, document.querySelector('main'), document.querySelector('dialog')]"
        )
        assert max(page.evaluate(f"{widths}.map((one) => one.scrollWidth)")) <= 360
        assert page.evaluate("document.querySelector('pre').scrollWidth") > 360  # code scrolls by itself
