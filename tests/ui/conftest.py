"""A page of small models in a process of its own, and a real browser to drive it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from tests.inference.tiny_models import save_own, save_stock
from tests.inference.tiny_pipelines import pixel_parts
from tests.inference.tiny_translators import save_own_translator
from tests.ui.chromium import PATIENCE, NoChromiumError, open_chromium

MODEL_PATIENCE = 180_000  # milliseconds, for what a model does on a busy machine
# Nothing of it may reach the page: files given away, a launch that never returns, a proxy that is not there.
MISLEADING = {
    "GRADIO_ALLOWED_PATHS": "/etc",
    "GRADIO_DEBUG": "1",
    "GRADIO_ROOT_PATH": "/elsewhere",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "NO_PROXY": "",
    "no_proxy": "",
}


class Server(NamedTuple):
    address: str
    process: subprocess.Popen[str]
    uploads: Path  # where it makes its folder of uploads


def start_server(models: list[Path], uploads: Path, host: str = "127.0.0.1") -> Server:
    command = [sys.executable, "-m", "mmattn", "ui", *map(str, models), "--port", "0", "--host", host]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | MISLEADING | {"TMPDIR": str(uploads)},
        start_new_session=True,
    )
    assert process.stdout is not None
    name = re.escape(f"[{host}]" if ":" in host else host)
    found = re.match(rf"(http://{name}:\d+/) ", process.stdout.readline())
    if found is None:
        process.kill()
        raise RuntimeError(process.communicate()[1])
    return Server(found[1], process, uploads)


def end_server(server: Server) -> tuple[int, str]:
    """The exit code, and what it wrote on stderr."""
    server.process.send_signal(signal.SIGTERM)
    try:
        said = server.process.communicate(timeout=30)[1]
    except subprocess.TimeoutExpired:
        server.process.kill()
        said = server.process.communicate()[1]
    return server.process.returncode, said


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("models")
    made = {name: folder / name for name in ("own-vlm", "translator", "drawing", "blip-match")}
    save_own(made["own-vlm"])
    save_own_translator(made["translator"], files=tmp_path_factory.mktemp("files"))
    PixelPipeline(**pixel_parts()).save_pretrained(made["drawing"])
    save_stock(made["blip-match"], "matching")
    return made


@pytest.fixture(scope="session")
def server(models) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as uploads:
        started = start_server(list(models.values()), Path(uploads))
        yield started
        code, said = end_server(started)
        assert (code, said) == (0, "")
        assert list(started.uploads.glob("mmattn-ui-*")) == []


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        try:
            opened = open_chromium(playwright)
        except NoChromiumError as error:
            pytest.skip(str(error))
        yield opened
        opened.close()


@pytest.fixture
def visit(server, browser) -> Iterator[Callable[..., Any]]:
    """Opens the page as a new visitor. At the end no console may show an error, and no request may have left here."""
    contexts, wrong = [], []

    def opened(width: int = 1280, height: int = 900, tab: str | None = None) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if is_local(asked.url) else wrong.append(asked.url))
        page.goto(server.address)
        page.get_by_role("button", name="Caption").wait_for()
        if tab is not None:
            page.get_by_role("tab", name=tab).click()
        return page

    def is_local(url: str) -> bool:
        return url.startswith((server.address, "data:", "blob:"))

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def shown_picture(page: Any, selector: str) -> Image.Image:
    """What an image of the page shows."""
    source = page.locator(f"{selector} img >> visible=true").first.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")
