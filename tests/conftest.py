"""Set-up that all tests share: one thread per process, `support` on the path, common fixtures."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx
    import openai
    from playwright.sync_api import Browser
    from support.server_process import LlmkitServer

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests start hundreds of processes. Compiling llmkit takes each of them about a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The servers of tests are not those that `llmkit ps` shows to who runs the tests.
os.environ["XDG_STATE_HOME"] = str(Path(tempfile.gettempdir()) / f"llmkit-tests-{os.getuid()}")

sys.path.insert(0, str(Path(__file__).parent))

# Hypothesis tries the same examples in every run, and an example may take as long as it needs on a
# busy machine. GPU machines may lack it.
with suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("llmkit", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("llmkit")

# Tests compile kernels for GPUs. llmkit itself imports Triton only where there is a GPU.
with suppress(ImportError):
    import triton  # noqa: F401


@pytest.fixture(scope="module")
def short_builtin_text() -> Iterator[None]:
    """Use a tenth of the built-in text: tokenizing all of it takes longer than quantizing."""
    from llmkit.quant import calibration_text as text

    with pytest.MonkeyPatch.context() as patch:
        short = text.builtin_text()[:50_000]
        patch.setattr(text, "builtin_text", lambda: short)
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for tests of pages. They are skipped without it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint.

    A module's `MODEL` holds arguments of `tiny_checkpoint`; its `edit_model(path)` changes files.
    """
    from support.tiny_models import tiny_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    path = tiny_checkpoint(folder / "model", **getattr(request.module, "MODEL", {}))
    edit_model = getattr(request.module, "edit_model", None)
    if edit_model is not None:
        edit_model(path)
    return path


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """As `model`, but made anew for each test, which may change its files."""
    from support.tiny_models import tiny_checkpoint

    return tiny_checkpoint(tmp_path / "model", **getattr(request.module, "MODEL", {}))


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitServer]:
    """A server of `model`.

    A module's `SERVER` holds its options, `API_KEYS` the keys that it accepts.
    """
    from support.server_process import serving

    folder = tmp_path_factory.mktemp("server")
    options = dict(getattr(request.module, "SERVER", {}))
    keys = getattr(request.module, "API_KEYS", ())
    if keys:
        (folder / "keys").write_text("".join(f"{key}\n" for key in keys))
        options["api_key_file"] = str(folder / "keys")
    with serving(folder / "log", model, *keys[:1], **options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LlmkitServer) -> Iterator[openai.OpenAI]:
    """The real OpenAI client, connected to `server`."""
    import openai

    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture
def http(server: LlmkitServer) -> Iterator[httpx.Client]:
    """A plain HTTP client, connected to `server`."""
    with server.client() as client:
        yield client
