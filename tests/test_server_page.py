"""The page at `/`: what the server sends, and what Chromium makes of it with a model whose answers are known."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from scripted import scripted_checkpoint, trigger
from serving import ServerProcess, serving, wait_for
from test_server_router import Router
from tiny import EOS_ID

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEY = "page-test-key"
CONTEXT = 65536
FOLDER = Path(__file__).parents[1] / "runtime" / "server" / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
[click](javascript:document.title='owned') [data](data:text/html,<script>1</script>) ![picture](http://example.invalid/x.png)

<style>body{display:none}</style>&lt;b&gt; </p><iframe src=/health>"""
ENDLESS = "on and on it goes, "


def talking_model(path: Path) -> Path:
    """A model with three answers, of which one has no end."""
    scripted_checkpoint(path, {"markdown": MARKDOWN, "hostile": HOSTILE, "endless": ENDLESS}, TEMPLATE)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    follows = weights["lm_head.weight"]
    tokens = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    start = next(token["id"] for token in tokens if token["content"] == trigger("endless"))
    first = last = int(follows[:, start].argmax())
    while (following := int(follows[:, last].argmax())) != EOS_ID:
        last = following
    follows[EOS_ID, last], follows[first, last] = 0, 2
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "keys").write_text(KEY)
    options = {"served_model_name": "scripted", "api_key_file": str(folder / "keys"), "kv_cache_memory": 2**26}
    with serving(folder / "log", talking_model(folder / "model"), KEY, **options) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A tab on the page that notes what it loads and what goes wrong."""

    def __init__(self, browser: Browser, server: ServerProcess, **context: Any) -> None:
        self.server = server
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.loaded: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.loaded.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.goto(server.url)

    def give_key(self, key: str = KEY) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Use it").click()
        self.page.locator("#model option").wait_for(state="attached")
        self.problems.clear()  # the 401 that asked for it is on the console

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_label("Message").press("Enter")

    def answer(self, text: str) -> Any:
        """The article of the answer to `text`, once it is complete."""
        self.ask(text)
        answer = self.page.locator("article.assistant").last
        answer.get_by_text("prompt tokens cached").wait_for()
        return answer


@pytest.fixture
def visit(browser: Browser, server: ServerProcess) -> Iterator[Visit]:
    made = Visit(browser, server)
    made.give_key()
    yield made
    assert made.problems == []
    assert [url for url in made.loaded if not url.startswith(server.url + "/")] == []
    made.context.close()


def test_the_page_needs_no_key_and_what_it_asks_for_does(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url) as stranger:
        for path in ("/", *(f"/page/{file.name}" for file in FOLDER.iterdir() if file.name != "index.html")):
            answer = stranger.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("/info", "/metrics", "/v1/models", "/page/", "/page/other.js", "/page/../app.py"):
            assert stranger.get(path).status_code == 401, path
        assert stranger.get("/", headers={"host": "rebound.example"}).status_code == 403


@pytest.mark.parametrize("path", ["/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/page/none.js"])
def test_no_other_file_is_served(server: ServerProcess, path: str) -> None:
    with server.client() as client:
        assert client.get(path).status_code == 404


def test_the_files_have_nothing_inline_and_name_nothing_elsewhere() -> None:
    html = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html) == []
    for file in FOLDER.iterdir():
        text = file.read_text()
        urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text)) - {"http://www.w3.org/2000/svg"}
        assert urls == set(), file.name
        assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text) == []


def test_a_wheel_has_all_files_of_the_page() -> None:
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    assert "page/*" in project["tool"]["setuptools"]["package-data"]["llmkit.runtime.server"]
    assert all(file.is_file() for file in FOLDER.iterdir())


def test_info_tells_what_is_served(server: ServerProcess) -> None:
    with server.client() as client:
        info = client.get("/info").json()
    assert info["model"] == "scripted"
    assert info["card"]["architecture"] == "LlamaForCausalLM"
    assert info["card"]["parameters"] == sum(
        tensor.numel() for tensor in load_file(server.log.parent / "model" / "model.safetensors").values()
    )
    assert info["card"]["quantization"] is None
    assert (info["layout"], info["replicas"]) == ({"tp": 1, "pp": 1, "ep": 1}, 1)
    assert (info["dtype"], info["device"], info["max_model_len"]) == ("float32", "cpu", CONTEXT)
    assert info["memory"]["weight_bytes"] > 0


@pytest.mark.browser
def test_a_wrong_key_is_told_and_the_right_one_is_kept_in_the_tab_only(browser: Browser, server: ServerProcess) -> None:
    visit = Visit(browser, server)
    page = visit.page
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    page.get_by_text("The server does not know that key.").wait_for()
    visit.give_key()
    assert page.locator("#key-form").is_hidden()
    assert KEY not in page.content()
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("document.cookie") == ""
    assert not any(KEY in url for url in visit.loaded)
    other = visit.context.new_page()
    other.goto(server.url)
    other.get_by_label("API key").wait_for(state="visible")
    visit.context.close()


@pytest.mark.browser
def test_an_answer_is_streamed_as_markdown_with_its_figures(visit: Visit) -> None:
    answer = visit.answer(f"tell me {trigger('markdown')}")
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
    assert re.fullmatch(r"first token .+ · .+ tokens/s · \d+ tokens · 0 of \d+ prompt tokens cached", figures), figures


@pytest.mark.browser
def test_what_a_hostile_answer_says_stays_text(visit: Visit) -> None:
    before = len(visit.loaded)
    answer = visit.answer(trigger("hostile"))
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
    assert visit.page.title() == "llmkit"
    assert [url.removeprefix(visit.server.url) for url in visit.loaded[before:]] == ["/v1/chat/completions"]


@pytest.mark.browser
@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_answer_here_and_in_the_engine(visit: Visit, how: str) -> None:
    visit.ask(trigger("endless"))
    page = visit.page
    page.get_by_text(ENDLESS * 2).wait_for()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.locator(".note", has_text="Stopped.").wait_for()
    wait_for(lambda: visit.server.metric("num_requests_running") == 0, timeout_s=10)
    assert page.locator("article.assistant .markdown").inner_text().startswith(ENDLESS)
    assert page.get_by_role("button", name="Send").is_visible()
    visit.answer(trigger("markdown"))


@pytest.mark.browser
def test_settings_are_sent_and_wrong_ones_are_told(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Most tokens").fill("2")
    page.get_by_label("Seed").fill("7")
    with page.expect_request("**/v1/chat/completions") as sent:
        answer = visit.answer(trigger("markdown"))
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": trigger("markdown")},
    ]
    assert (body["temperature"], body["max_tokens"], body["seed"], body["model"]) == (0.5, 2, 7, "scripted")
    assert "top_p" not in body
    answer.get_by_text("no more tokens were allowed").wait_for()
    page.get_by_label("Temperature").fill("3")
    visit.ask("not sent")
    assert page.get_by_label("Message").input_value() == "not sent"
    page.get_by_label("Temperature").fill("")
    page.get_by_label("Most tokens").fill("70000")
    visit.ask(trigger("markdown"))
    page.locator(".error", has_text=f"The context of {CONTEXT} tokens is too short").wait_for()
    visit.problems.clear()  # the 400 is on the console


@pytest.mark.browser
def test_an_answer_follows_the_json_schema_that_is_given(visit: Visit) -> None:
    page = visit.page
    schema = page.get_by_label("JSON schema")
    schema.fill('{"enum": ["it goes"')
    visit.ask("not sent")
    assert "This is not JSON" in str(schema.evaluate("(field) => field.validationMessage"))
    assert page.locator("article").count() == 0
    schema.fill('{"enum": ["it goes"]}')
    assert visit.answer("as it must").locator("pre").inner_text() == '"it goes"'
    schema.fill('{"type": "no such type"}')
    visit.ask("refused")
    page.locator(".error").wait_for()
    visit.problems.clear()  # the 400 is on the console


@pytest.mark.browser
def test_the_dashboard_shows_the_server_and_its_model(visit: Visit) -> None:
    page = visit.page
    visit.answer(trigger("markdown"))
    page.get_by_role("tab", name="Dashboard").click()
    page.get_by_text("LlamaForCausalLM").wait_for()
    figures = {
        name: page.locator("#tiles div", has_text=name).locator("dd") for name in ("Answered", "Tokens generated")
    }
    assert int(figures["Answered"].inner_text()) >= 1
    assert int(figures["Tokens generated"].inner_text().replace(",", "")) >= 20
    assert page.locator("#latency tbody tr", has_text="First token").locator("td").first.inner_text() != "\N{EN DASH}"
    assert page.get_by_role("img", name="Requests: 0 / 0 now").is_visible()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("tabpanel", name="Chat").wait_for()


@pytest.mark.browser
def test_the_dashboard_of_several_models_shows_which_are_loaded(browser: Browser, tmp_path: Path) -> None:
    models = {"one": talking_model(tmp_path / "model"), "two": tmp_path / "model"}
    server = Router(tmp_path / "log", models)
    try:
        visit = Visit(browser, server.wait_ready())
        page = visit.page
        page.locator("#model option").first.wait_for(state="attached")
        page.get_by_role("tab", name="Dashboard").click()
        page.locator("#card").get_by_text("unloaded").first.wait_for()
        assert not page.get_by_role("heading", name="How it runs").is_visible()
        assert "NaN" not in page.locator("main").inner_text()
        page.keyboard.press("ArrowLeft")
        visit.answer(trigger("markdown"))
        page.get_by_role("tab", name="Dashboard").click()
        page.locator("#card").get_by_text("loaded, requests of up to").wait_for()
        page.locator("#memory").get_by_text("Process: engine of one").wait_for()
        assert visit.problems == []
        visit.context.close()
    finally:
        server.stop()


@pytest.mark.browser
def test_everything_can_be_reached_and_used_with_the_keyboard(visit: Visit) -> None:
    page = visit.page
    page.reload()
    page.locator("#model option").wait_for(state="attached")
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
    wanted = [
        "tab-chat",
        "log",
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
    ]
    assert [name for name in reached if name in wanted] == wanted
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')]"
        ".filter((field) => !field.labels?.length && !field.textContent.trim() && !field.ariaLabel).map((f) => f.id)"
    )
    assert unnamed == []


@pytest.mark.browser
@pytest.mark.parametrize("view", ["chat", "dashboard"])
def test_nothing_is_wider_than_a_phone(browser: Browser, server: ServerProcess, view: str) -> None:
    visit = Visit(browser, server, viewport={"width": 390, "height": 844}, has_touch=True)
    visit.page.get_by_label("API key").wait_for()
    assert visit.page.evaluate("document.scrollingElement.scrollWidth") == 390
    visit.give_key()
    visit.answer(trigger("hostile"))
    visit.page.goto(f"{server.url}/#{view}")
    visit.page.locator(f"#{view}").wait_for(state="visible")
    if view == "dashboard":
        visit.page.get_by_text("LlamaForCausalLM").wait_for()
    assert visit.page.evaluate("document.scrollingElement.scrollWidth") == 390
    sizes = visit.page.evaluate(
        f"[document.getElementById('{view}').scrollWidth, document.getElementById('{view}').clientWidth]"
    )
    assert sizes[0] == sizes[1]
    assert visit.problems == []
    visit.context.close()


@pytest.mark.browser
def test_markdown_of_any_kind_is_shown_with_all_its_words(visit: Visit) -> None:
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
        shown = visit.page.evaluate(
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
def test_quantiles_are_those_that_prometheus_computes(visit: Visit) -> None:
    text = "".join(
        f'llmkit:t_bucket{{le="{le}"}} {n}\n' for le, n in (("1.0", 0), ("2.0", 5), ("4.0", 9), ("+Inf", 10))
    )
    found = visit.page.evaluate(
        """async (text) => {
            const { Reading, quantile } = await import("/page/metrics.js");
            const buckets = new Reading(text, 0).histogram("t");
            return [0.25, 0.5, 0.9, 0.99].map((share) => quantile(buckets, share)).concat(quantile([], 0.5) ? 1 : 0);
        }""",
        text,
    )
    assert found == [1.5, 2.0, 4.0, 4.0, 0]
