"""The page at `/`: its files, and its behaviour in Chromium with a model of known answers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from support.router_process import LlmkitRouter
from support.scripted_model import scripted_checkpoint, trigger
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import EOS_ID

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEY = "page-test-key"
CONTEXT = 65536
FOLDER = Path(__file__).parents[2] / "runtime" / "server" / "page"
VENDOR = FOLDER / "vendor"
OWN_FILES = [file for file in sorted(FOLDER.iterdir()) if file.is_file()]
# The files that the server answers with, relative to the folder.
SERVED_FILES = [file.name for file in OWN_FILES] + ["vendor/markdown-it.esm.min.mjs"]
TEMPLATE = "{{ messages[-1]['content'] }}"  # so that the end of the question decides
MARKDOWN = """# Sharding

A *model* is **split by heads** over `tp` ranks:

1. queries
2. keys
   - and values

| rank | heads |
|---|--:|
| 0 | 8 |

> quoted

```python
x = '<b>'
```

See https://example.org/a_b and [the docs](https://example.org/docs)."""
HOSTILE = """<img src=x onerror="document.title='owned'">

<script>document.title='stolen'</script>
[click](javascript:document.title='owned') [data](data:text/html,<script>1</script>) \
![picture](http://example.invalid/x.png)

<style>body{display:none}</style>&lt;b&gt; </p><iframe src=/health>"""
ENDLESS = "on and on it goes, "


def talking_model(path: Path) -> Path:
    """A model with three answers, of which one has no end."""
    scripted_checkpoint(
        path, {"markdown": MARKDOWN, "hostile": HOSTILE, "endless": ENDLESS}, TEMPLATE
    )
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    follows = weights["lm_head.weight"]
    tokens = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    start = next(token["id"] for token in tokens if token["content"] == trigger("endless"))
    first = last = int(follows[:, start].argmax())
    while (following := int(follows[:, last].argmax())) != EOS_ID:
        last = following
    follows[EOS_ID, last] = 0
    follows[first, last] = 2
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "keys").write_text(KEY)
    options = {
        "served_model_name": "scripted",
        "api_key_file": str(folder / "keys"),
        "kv_cache_memory": 2**26,
    }
    with serving(folder / "log", talking_model(folder / "model"), KEY, **options) as running:
        yield running


class PageTab:
    """A tab on the page that notes what it loads and what goes wrong."""

    def __init__(self, browser: Browser, page_server: LlmkitServer, **context: Any) -> None:
        self.server = page_server
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.loaded: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.loaded.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.goto(page_server.url)

    def give_key(self, key: str = KEY) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Use key").click()
        self.page.locator("#model option").wait_for(state="attached")
        self.problems.clear()  # the 401 that asked for it is on the console

    @property
    def message(self) -> Any:
        """The field for a message."""
        return self.page.get_by_label("Message", exact=True)

    def ask(self, text: str) -> None:
        self.message.fill(text)
        self.message.press("Enter")

    def answer(self, text: str) -> Any:
        """The article of the answer to `text`, once it is complete."""
        self.ask(text)
        answer = self.page.locator("article.assistant").last
        answer.get_by_text("prompt tokens cached").wait_for()
        return answer


@pytest.fixture
def tab(browser: Browser, page_server: LlmkitServer) -> Iterator[PageTab]:
    made = PageTab(browser, page_server)
    made.give_key()
    yield made
    assert made.problems == []
    assert [url for url in made.loaded if not url.startswith(page_server.url + "/")] == []
    made.context.close()


def test_page_files_need_no_key_and_its_data_does(page_server: LlmkitServer) -> None:
    with httpx.Client(base_url=page_server.url) as stranger:
        for path in (
            "/",
            "/docs",
            *(f"/page/{name}" for name in SERVED_FILES if not name.endswith(".html")),
        ):
            answer = stranger.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in (
            "/info",
            "/metrics",
            "/v1/models",
            "/page/",
            "/page/other.js",
            "/page/../app.py",
            "/page/vendor",
            "/page/vendor/VENDORED.md",
        ):
            assert stranger.get(path).status_code == 401, path
        assert stranger.get("/", headers={"host": "rebound.example"}).status_code == 403


def test_docs_page_lists_every_route_and_field(browser: Browser, page_server: LlmkitServer) -> None:
    made = PageTab(browser, page_server)
    made.page.goto(f"{page_server.url}/docs")
    made.page.get_by_label("API key").fill(KEY)
    made.page.get_by_role("button", name="Use key").click()
    made.page.locator("#routes details").first.wait_for()
    made.problems.clear()  # the 401s that asked for the key are on the console
    with page_server.client() as client:
        document = client.get("/openapi.json").json()
    summaries = made.page.locator("#routes summary").all_inner_texts()
    api = [
        path for path in document["paths"] if path not in ("/", "/docs") and "/page/" not in path
    ]
    assert {text.split()[1] for text in summaries if " " in text} == set(api)
    # A link to /openapi.json would be followed without the key.
    assert made.page.locator("#routes a[href='/openapi.json']").count() == 0
    with made.page.expect_download() as download:
        made.page.get_by_role("link", name="save it").click()
    assert download.value.suggested_filename == "openapi.json"
    assert json.loads(Path(download.value.path()).read_text()) == document
    chat = made.page.locator("details", has=made.page.get_by_text("POST /v1/chat/completions"))
    chat.first.locator("summary").click()
    fields = chat.first.locator("td:first-child").all_inner_texts()
    assert set(fields) == document["components"]["schemas"]["ChatBody"]["properties"].keys()
    info = made.page.locator("details", has=made.page.get_by_text("GET /tokenizer_info"))
    info.first.locator("summary").click()
    assert info.first.locator("td").all_inner_texts()[:2] == ["model", "string"]
    assert made.problems == []
    loaded = [url.removeprefix("blob:") for url in made.loaded]
    assert [url for url in loaded if not url.startswith(page_server.url + "/")] == []
    made.context.close()


@pytest.mark.parametrize(
    "path", ["/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/page/none.js"]
)
def test_page_serves_no_other_file(page_server: LlmkitServer, path: str) -> None:
    with page_server.client() as client:
        assert client.get(path).status_code == 404


def test_page_files_have_nothing_inline_and_no_foreign_urls() -> None:
    for page in FOLDER.glob("*.html"):
        html = page.read_text()
        assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html) == []
    for file in OWN_FILES:
        text = file.read_text()
        urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text)) - {
            "http://www.w3.org/2000/svg"
        }
        assert urls == set(), file.name
        assert (
            re.findall(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function",
                text,
            )
            == []
        )


def test_vendored_library_has_its_checksums_and_licences() -> None:
    text = (VENDOR / "VENDORED.md").read_text()
    checksums = dict(re.findall(r"\| `([^`]+)` \| ([0-9a-f]{64}) \|", text))
    files = {file.name for file in VENDOR.iterdir()} - {"VENDORED.md"}
    assert checksums.keys() == files
    for name, checksum in checksums.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == checksum, name
    libraries = re.findall(r"\| ([\w.-]+) \| [\d.]+ \| [\w-]+ \| ", text)
    assert {"markdown-it", "linkify-it", "mdurl", "entities"} <= set(libraries)
    licences = {name.removeprefix("LICENSE.") for name in files if name.startswith("LICENSE.")}
    assert {name.removesuffix(".js") for name in libraries} == licences


def test_vendored_library_runs_under_the_policy_and_loads_nothing() -> None:
    (library,) = VENDOR.glob("*.mjs")
    text = library.read_text()
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\b|\beval\(|new Function|\bfetch\("
        r"|XMLHttpRequest|WebSocket|\bimport\b|localStorage|sessionStorage"
    )
    assert re.findall(forbidden, text) == []


def test_wheel_has_all_files_of_the_page() -> None:
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["llmkit.runtime.server"]
    assert "page/*" in patterns
    assert "page/vendor/*" in patterns
    assert all(file.is_file() or file == VENDOR for file in FOLDER.iterdir())
    assert all(file.is_file() for file in VENDOR.iterdir())


def test_info_describes_the_model(page_server: LlmkitServer) -> None:
    with page_server.client() as client:
        info = client.get("/info").json()
    assert info["model"] == "scripted"
    assert info["card"]["architecture"] == "LlamaForCausalLM"
    assert info["card"]["parameters"] == sum(
        tensor.numel()
        for tensor in load_file(page_server.log.parent / "model" / "model.safetensors").values()
    )
    assert info["card"]["quantization"] is None
    assert (info["layout"], info["replicas"]) == ({"tp": 1, "pp": 1, "ep": 1}, 1)
    assert (info["dtype"], info["device"], info["max_model_len"]) == ("float32", "cpu", CONTEXT)
    assert info["memory"]["weight_bytes"] > 0


@pytest.mark.browser
def test_page_reports_a_wrong_key_and_keeps_the_right_one_in_its_tab(
    browser: Browser, page_server: LlmkitServer
) -> None:
    tab = PageTab(browser, page_server)
    page = tab.page
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use key").click()
    page.get_by_text("The server does not know that key.").wait_for()
    tab.give_key()
    assert page.locator("#key-form").is_hidden()
    assert KEY not in page.content()
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("document.cookie") == ""
    assert not any(KEY in url for url in tab.loaded)
    other = tab.context.new_page()
    other.goto(page_server.url)
    other.get_by_label("API key").wait_for(state="visible")
    tab.context.close()


@pytest.mark.browser
def test_page_streams_an_answer_as_markdown_with_figures(tab: PageTab) -> None:
    answer = tab.answer(f"tell me {trigger('markdown')}")
    content = answer.locator(".markdown")
    assert content.locator("h3").inner_text() == "Sharding"
    assert content.locator("p strong").inner_text() == "split by heads"
    assert content.locator("ol > li").count() == 2
    assert content.locator("ol ul li").inner_text() == "and values"
    assert content.locator("td").all_inner_texts() == ["0", "8"]
    assert content.locator("blockquote").inner_text() == "quoted"
    assert content.locator("pre").inner_text() == "x = '<b>'"
    assert [link.get_attribute("href") for link in content.locator("a").all()] == [
        "https://example.org/a_b",
        "https://example.org/docs",
    ]
    figures = answer.locator(".figures").inner_text()
    assert re.fullmatch(
        r"first token .+ · .+ tokens/s · \d+ tokens · 0 of \d+ prompt tokens cached", figures
    ), figures


@pytest.mark.browser
def test_page_shows_a_hostile_answer_as_text(tab: PageTab) -> None:
    before = len(tab.loaded)
    answer = tab.answer(trigger("hostile"))
    content = answer.locator(".markdown")
    for text in (
        "<img src=x onerror=",
        "<script>",
        "[click](javascript:",
        "![picture](http://",
        "<style>",
        "&lt;b&gt;",
    ):
        assert text in content.inner_text()
    assert content.locator("img, script, style, iframe, a").count() == 0
    assert tab.page.title() == "llmkit"
    assert [url.removeprefix(tab.server.url) for url in tab.loaded[before:]] == [
        "/v1/chat/completions"
    ]


@pytest.mark.browser
@pytest.mark.parametrize("how", ["button", "key"])
def test_page_stop_ends_the_answer_in_the_engine_too(tab: PageTab, how: str) -> None:
    tab.ask(trigger("endless"))
    page = tab.page
    page.get_by_text(ENDLESS * 2).wait_for()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.locator(".note", has_text="Stopped.").wait_for()
    wait_for(lambda: tab.server.metric("num_requests_running") == 0)
    assert page.locator("article.assistant .markdown").inner_text().startswith(ENDLESS)
    assert page.get_by_role("button", name="Send").is_visible()
    tab.answer(trigger("markdown"))


@pytest.mark.browser
def test_page_sends_settings_and_reports_wrong_ones(tab: PageTab) -> None:
    page = tab.page
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max tokens").fill("2")
    page.get_by_label("Seed").fill("7")
    with page.expect_request("**/v1/chat/completions") as sent:
        answer = tab.answer(trigger("markdown"))
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": trigger("markdown")},
    ]
    assert (body["temperature"], body["max_tokens"], body["seed"], body["model"]) == (
        0.5,
        2,
        7,
        "scripted",
    )
    assert "top_p" not in body
    note = answer.get_by_text("no more tokens were allowed")
    assert note.evaluate("(it) => parseFloat(getComputedStyle(it).marginTop)") >= 8
    page.get_by_label("Temperature").fill("3")
    tab.ask("not sent")
    assert tab.message.input_value() == "not sent"
    page.get_by_label("Temperature").fill("")
    page.get_by_label("Max tokens").fill("70000")
    tab.ask(trigger("markdown"))
    page.locator(".error", has_text=f"The context of {CONTEXT} tokens is too short").wait_for()
    tab.problems.clear()  # the 400 is on the console


@pytest.mark.browser
def test_page_keeps_the_conversation_over_a_reload(tab: PageTab) -> None:
    page = tab.page
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Max tokens").fill("2")
    first = tab.answer(trigger("markdown"))
    shown = first.inner_text()
    assert "no more tokens were allowed" in shown
    page.reload()
    assert page.locator("article.assistant").inner_text() == shown
    assert page.get_by_label("Max tokens").input_value() == "2"
    page.locator("#model option").wait_for(state="attached")
    with page.expect_request("**/v1/chat/completions") as sent:
        tab.answer(trigger("markdown"))
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    stored = "JSON.stringify([{...localStorage}, Object.keys(sessionStorage)])"
    assert KEY not in page.evaluate(stored)
    new_tab = tab.context.new_page()
    new_tab.goto(tab.server.url)
    assert new_tab.locator("article").count() == 4, "a new tab begins with the last conversation"
    new_tab.close()
    new = page.get_by_role("button", name="New conversation")
    assert new.evaluate("(it) => getComputedStyle(it).borderTopStyle") == "solid"
    new.click()
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    page.get_by_text("Ask the model something").wait_for()


@pytest.mark.browser
def test_page_keeps_nothing_when_its_switch_is_off(tab: PageTab) -> None:
    page = tab.page
    tab.answer(trigger("markdown"))
    assert "Sharding" in page.evaluate("localStorage.getItem('llmkit-conversation')")
    page.get_by_label("Keep the conversation").uncheck()
    kept = "[localStorage, sessionStorage].map((it) => it.getItem('llmkit-conversation'))"
    assert page.evaluate(kept) == [None, None]
    tab.answer(trigger("markdown"))
    assert page.evaluate(kept) == [None, None]
    page.reload()
    assert page.locator("article").count() == 0
    assert not page.get_by_label("Keep the conversation").is_checked()


@pytest.mark.browser
@pytest.mark.parametrize("stored", ["{", "null", '{"turns": 3}', '{"turns": [{"user": 1}]}'])
def test_page_ignores_a_stored_conversation_that_it_cannot_read(tab: PageTab, stored: str) -> None:
    page = tab.page
    page.evaluate("(text) => sessionStorage.setItem('llmkit-conversation', text)", stored)
    page.reload()
    page.get_by_text("Ask the model something").wait_for()
    page.locator("#model option").wait_for(state="attached")
    assert page.locator("article").count() == 0


@pytest.mark.browser
def test_page_edits_a_message_and_regenerates_an_answer(tab: PageTab) -> None:
    page = tab.page
    page.get_by_label("Max tokens").fill("2")
    for text in ("one", "two"):
        tab.answer(f"{text} {trigger('markdown')}")
    answers = page.locator("article.assistant")
    assert answers.first.get_by_role("button", name="Regenerate").is_hidden()
    page.get_by_label("Max tokens").fill("3")
    with page.expect_request("**/v1/chat/completions") as sent:
        answers.last.get_by_role("button", name="Regenerate").click()
    texts = [message["content"] for message in sent.value.post_data_json["messages"]]
    assert [texts[0], texts[-1], len(texts)] == [
        f"one {trigger('markdown')}",
        f"two {trigger('markdown')}",
        3,
    ]
    answers.last.get_by_text("3 tokens").wait_for()
    assert answers.count() == 2
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edited text")
    assert field.input_value() == f"one {trigger('markdown')}"
    field.press("Escape")
    assert answers.count() == 2, "nothing is lost by looking"
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    field.fill(f"three {trigger('markdown')}")
    with page.expect_request("**/v1/chat/completions") as sent:
        field.press("Enter")
    assert [message["content"] for message in sent.value.post_data_json["messages"]] == [
        f"three {trigger('markdown')}"
    ]
    answers.last.get_by_text("prompt tokens cached").wait_for()
    assert page.locator("article").count() == 2
    assert page.locator("article.user .body").inner_text() == f"three {trigger('markdown')}"


@pytest.mark.browser
def test_page_without_a_conversation_shows_an_example_and_the_api(tab: PageTab) -> None:
    page = tab.page
    example = page.locator(".example").first
    example.click()
    assert tab.message.input_value() == example.inner_text()
    assert page.locator("#api-address").inner_text() == f"{tab.server.url}/v1"
    command = page.locator("#api-command").inner_text()
    assert "Authorization: Bearer $API_KEY" in command and KEY not in command
    answer = subprocess.run(
        ["bash", "-c", command.replace('"Hello"}]', f'"{trigger("markdown")}"}}]')],
        env=os.environ | {"API_KEY": KEY},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Sharding" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


@pytest.mark.browser
def test_page_answer_follows_its_json_schema(tab: PageTab) -> None:
    page = tab.page
    schema = page.get_by_label("JSON schema")
    schema.fill('{"enum": ["it goes"')
    tab.ask("not sent")
    assert "This is not JSON" in str(schema.evaluate("(field) => field.validationMessage"))
    assert page.locator("article").count() == 0
    schema.fill('{"enum": ["it goes"]}')
    assert tab.answer("as it must").locator("pre").inner_text() == '"it goes"'
    schema.fill('{"type": "no such type"}')
    tab.ask("refused")
    page.locator("article .error").wait_for()
    tab.problems.clear()  # the 400 is on the console


@pytest.mark.browser
def test_dashboard_shows_the_server_and_its_model(tab: PageTab) -> None:
    page = tab.page
    tab.answer(trigger("markdown"))
    page.get_by_role("tab", name="Dashboard").click()
    page.get_by_text("LlamaForCausalLM").wait_for()
    figures = {
        name: page.locator("#tiles div", has_text=name).locator("dd")
        for name in ("Answered", "Tokens generated")
    }
    assert int(figures["Answered"].inner_text()) >= 1
    assert int(figures["Tokens generated"].inner_text().replace(",", "")) >= 20
    assert (
        page.locator("#latency tbody tr", has_text="First token").locator("td").first.inner_text()
        != "\N{EN DASH}"
    )
    assert page.get_by_role("img", name="Requests: 0 running, 0 waiting now").is_visible()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("tabpanel", name="Chat").wait_for()


@pytest.mark.browser
def test_dashboard_charts_fill_from_the_left_and_show_times_of_day(tab: PageTab) -> None:
    drawn = tab.page.evaluate(
        """async (readings) => {
            const { Chart } = await import("/page/chart.js");
            const parent = document.createElement("div");
            const span = { windowMs: 300_000, gapMs: 20_000 };
            const chart = new Chart(parent, "Load", ["running", "waiting"], String, 4, span);
            const start = new Date(2030, 0, 1, 13, 59, 30).getTime();
            const drawn = [];
            for (const [seconds, running, waiting] of readings) {
                chart.add([running ?? NaN, waiting ?? NaN], start + seconds * 1000);
                const all = (name) => [...parent.querySelectorAll(name)];
                drawn.push({
                    paths: all("path").map((path) => path.getAttribute("d")),
                    times: all("text").map((text) => text.textContent),
                    x: parent.querySelector("text").getAttribute("x"),
                    legend: parent.querySelector(".legend").textContent,
                    label: parent.querySelector("[role=img]").ariaLabel,
                });
            }
            return drawn;
        }""",
        [(0, 2, None), (15, 4, 0), (150, 1, 1), (160, 10, 0), (330, 8, 0)],
    )
    first, second, third, fourth, last = drawn
    assert first["paths"] == ["M0.0,36.0h0", ""], "at the left edge; nothing for what is unknown"
    assert first["times"] == ["14:00", "14:01", "14:02", "14:03", "14:04"]
    assert first["x"] == "10.00%"
    assert second["paths"] == ["M0.0,36.0h0L15.0,2.0", "M15.0,70.0h0"]
    assert third["paths"][0].count("M") == 2, "the line breaks where nothing was read"
    assert fourth["legend"] == "running 10waiting 0"
    assert fourth["label"] == ("Load: 10 running, 0 waiting now; at most 10 in the last 5 minutes")
    assert last["times"][0] == "14:00" and last["x"] == "0.00%", "a full axis moves with the time"
    assert last["paths"][0].endswith("M300.0,15.6h0")


@pytest.mark.browser
def test_dashboard_of_several_models_shows_which_are_loaded(
    browser: Browser, tmp_path: Path
) -> None:
    models = {"one": talking_model(tmp_path / "model"), "two": tmp_path / "model"}
    router = LlmkitRouter(tmp_path / "log", models)
    try:
        tab = PageTab(browser, router.wait_ready())
        page = tab.page
        page.locator("#model option").first.wait_for(state="attached")
        page.get_by_role("tab", name="Dashboard").click()
        page.locator("#card").get_by_text("unloaded").first.wait_for()
        assert not page.get_by_role("heading", name="How it runs").is_visible()
        assert "NaN" not in page.locator("main").inner_text()
        page.keyboard.press("ArrowLeft")
        tab.answer(trigger("markdown"))
        page.get_by_role("tab", name="Dashboard").click()
        page.locator("#card").get_by_text("loaded, requests of up to").wait_for()
        page.locator("#memory").get_by_text("Process: engine of one").wait_for()
        assert tab.problems == []
        tab.context.close()
    finally:
        router.stop()


@pytest.mark.browser
def test_page_is_usable_with_the_keyboard(tab: PageTab) -> None:
    page = tab.page
    page.reload()
    page.locator("#model option").wait_for(state="attached")
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "[document.activeElement].map((it) => it.id || it.className || it.tagName)[0]"
            )
        )
    expected = [
        "tab-chat",
        "log",
        "example",
        "api-command",
        "prompt",
        "send",
        "clear",
        "SUMMARY",
        "model",
        "system",
        "temperature",
        "top_p",
        "seed",
        "schema",
        "keep",
    ]
    found = [name for name in reached if name in expected]
    assert list(dict.fromkeys(found)) == expected
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')]"
        ".filter((field) => !field.labels?.length && !field.textContent.trim())"
        ".filter((field) => !field.ariaLabel).map((field) => field.id)"
    )
    assert unnamed == []


@pytest.mark.browser
@pytest.mark.parametrize("view", ["chat", "dashboard"])
def test_page_fits_a_phone(browser: Browser, page_server: LlmkitServer, view: str) -> None:
    tab = PageTab(browser, page_server, viewport={"width": 390, "height": 844}, has_touch=True)
    tab.page.get_by_label("API key").wait_for()
    assert tab.page.evaluate("document.scrollingElement.scrollWidth") == 390
    tab.give_key()
    tab.answer(trigger("hostile"))
    tab.page.goto(f"{page_server.url}/#{view}")
    tab.page.locator(f"#{view}").wait_for(state="visible")
    if view == "dashboard":
        tab.page.get_by_text("LlamaForCausalLM").wait_for()
    assert tab.page.evaluate("document.scrollingElement.scrollWidth") == 390
    sizes = tab.page.evaluate(
        f"[document.getElementById('{view}')]"
        ".flatMap((panel) => [panel.scrollWidth, panel.clientWidth])"
    )
    assert sizes[0] == sizes[1]
    assert tab.problems == []
    tab.context.close()


@pytest.mark.browser
def test_markdown_view_shows_all_words_of_any_text(tab: PageTab) -> None:
    texts = [
        "*" * 20000,
        "[" * 20000,
        "`" * 20001 + "x",
        "> " * 5000 + "deep",
        "_a " * 9000,
        "**a " * 9000,
        "- " * 5000,
        "|" * 20000 + "\n|-|",
    ]
    texts += [
        "[a](" * 8000,
        "https://" * 8000,
        "~~~",
        "```js",
        "1. a\n\n\n  b\n2) c",
        "\\",
        "![",
        "a\n===\n",
        "| a |\n|---|",
    ]
    for text in texts:
        shown = tab.page.evaluate(
            """async (text) => {
                const { MarkdownView } = await import("/page/markdown.js");
                const parent = document.createElement("div");
                const view = new MarkdownView(parent);
                const step = Math.max(1, Math.floor(text.length / 3));
                for (let end = 1; end <= text.length; end += step) view.show(text.slice(0, end));
                view.show(text);
                const whole = document.createElement("div");
                new MarkdownView(whole).show(text);
                return [parent.textContent === whole.textContent, whole.textContent];
            }""",
            text,
        )
        assert shown[0], text[:20]
        assert [word for word in re.findall(r"[^\W\d]+", text)[:50] if word not in shown[1]] == []


@pytest.mark.browser
def test_page_quantiles_equal_prometheus(tab: PageTab) -> None:
    text = "".join(
        f'llmkit:t_bucket{{le="{le}"}} {n}\n'
        for le, n in (("1.0", 0), ("2.0", 5), ("4.0", 9), ("+Inf", 10))
    )
    found = tab.page.evaluate(
        """async (text) => {
            const { Reading, quantile } = await import("/page/metrics.js");
            const buckets = new Reading(text, 0).histogram("t");
            const found = [0.25, 0.5, 0.9, 0.99].map((share) => quantile(buckets, share));
            return found.concat(quantile([], 0.5) ? 1 : 0);
        }""",
        text,
    )
    assert found == [1.5, 2.0, 4.0, 4.0, 0]
