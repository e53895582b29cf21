"""Where the page can be opened, and the command that opens it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import pytest

from mmattn.cli import ui as ui_verb
from mmattn.cli.main import main
from mmattn.cli.ui import _is_this_machine as is_this_machine
from mmattn.errors import RunError, UsageError
from tests.ui.conftest import end_server, start_server

gradio = pytest.importorskip("gradio")
handlers = pytest.importorskip("mmattn.ui.handlers")
page = pytest.importorskip("mmattn.ui.page")
serving = pytest.importorskip("mmattn.ui.server")


def test_a_free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"^--port {port}: in use on 127.0.0.1; end the program"):
            serving.free_address("127.0.0.1", port)
        assert serving.free_address("127.0.0.1", 0) not in (0, port)


def test_addresses_that_cannot_be():
    with pytest.raises(UsageError, match=r"^--host nowhere.invalid: no such address"):
        serving.free_address("nowhere.invalid", 7860)
    with pytest.raises(UsageError, match=r"^--host 192.0.2.1 --port 7860: cannot be used"):
        serving.free_address("192.0.2.1", 7860)


def test_a_taken_port_is_told_before_models_are_opened(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", str(tmp_path / "nothing"), "--port", str(port)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"mmattn: --port {port}: in use on 127.0.0.1; end the program that has it, give another, or 0 for any free one"
    ]


def test_models_that_are_not_there(tmp_path, capsys):
    assert main(["ui", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["ui"]) == 2
    assert "Missing argument 'MODEL'" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_install_it():
    code = "import sys; sys.modules['gradio'] = None; from mmattn.cli.main import main; sys.exit(main(['ui', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "mmattn: mmattn ui needs the package gradio, which is not installed: pip install 'mmattn[ui]'\n"
    )


class Page:
    """What `serving` asks of a page."""

    share_url: str | None = None
    local_url = "http://x/"

    def __init__(self, fails=None):
        self.fails, self.closed, self.given, self.seen = fails, 0, {}, {}

    def launch(self, **given):
        self.given, self.seen = given, dict(os.environ)
        if self.fails is not None:
            raise self.fails

    def close(self, verbose):
        self.closed += 1


def shown(monkeypatch, page, host="127.0.0.1", share=False):
    monkeypatch.setattr(serving, "build_page", lambda models: page)
    return serving.serving([], host=host, port=7, share=share)


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        (OSError("no port"), UsageError, "--host 127.0.0.1 --port 7: cannot be used: no port"),
        (httpx.ConnectError("refused\nby all"), RunError, "could not be opened.*ConnectError: refused by all"),
        (httpx.InvalidURL("what"), RunError, "could not be opened.*InvalidURL: what"),
        (ImportError("no socksio"), RunError, "check the proxy settings.*ImportError: no socksio"),
    ],
)
def test_a_page_that_cannot_be_opened_is_closed_and_told_in_one_line(monkeypatch, fails, kind, message):
    page, before = Page(fails), dict(os.environ)
    with pytest.raises(kind, match=message) as told, shown(monkeypatch, page):
        pass
    assert "\n" not in str(told.value)
    assert page.closed == 1
    assert dict(os.environ) == before


def test_no_public_address(monkeypatch):
    page = Page()
    with pytest.raises(RunError, match="^--share: no public address"), shown(monkeypatch, page, share=True):
        pass
    assert page.closed == 1


def test_variables_of_gradio_do_not_count(monkeypatch):
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/etc")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "mine")
    before = dict(os.environ)
    page = Page()
    with shown(monkeypatch, page) as address:
        assert address == "http://x/"
        found = {name for name in os.environ if name.startswith("GRADIO_")}
        assert found == {"GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"}
        assert os.environ["GRADIO_TEMP_DIR"] != "mine"
    assert dict(os.environ) == before


def test_gradio_asks_its_own_page_past_proxies(monkeypatch):
    for name, value in {"NO_PROXY": "one.example", "no_proxy": ""}.items():
        monkeypatch.setenv(name, value)
    alone, shared = Page(), Page()
    with shown(monkeypatch, alone):
        assert os.environ["NO_PROXY"] == "one.example"  # for a while only
    shared.share_url = "https://y/"
    with shown(monkeypatch, shared, host="::1", share=True):
        pass
    assert alone.seen["NO_PROXY"] == alone.seen["no_proxy"] == "one.example,*"
    assert shared.seen["NO_PROXY"] == shared.seen["no_proxy"] == "one.example,::1,127.0.0.1,localhost"
    assert (alone.given["server_name"], shared.given["server_name"]) == ("127.0.0.1", "[::1]")


def test_who_can_reach_an_address():
    assert all(map(is_this_machine, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_this_machine, ["0.0.0.0", "::", "::1234", "192.0.2.1", "localhost.example"]))


def test_an_address_of_version_six(models, tmp_path):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("needs ::1")
    started = start_server([models["translator"]], tmp_path, host="::1")
    code = answer_code(started.address)
    assert (code, *end_server(started)) == (200, 0, "")


def test_asked_to_end_while_the_page_opens(monkeypatch, capsys):
    """It ends as it always does, whenever that is: nothing is left behind."""
    told = []

    @contextlib.contextmanager
    def opening(models, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        yield "http://127.0.0.1:1/"
        told.append("closed")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(serving, "serving", opening)
    monkeypatch.setattr(ui_verb, "_opened", lambda models: models)
    ui_verb.ui(["m"], host="127.0.0.1", port=0, share=False)
    assert told == ["closed"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_models_with_a_tab():
    with pytest.raises(UsageError, match="x: a int has no page"):
        page.build_page([page.PageModel("x", 3)])
    with pytest.raises(UsageError, match="no model"):
        page.build_page([])


def test_nothing_is_written_beside_the_code():
    assert list(Path(handlers.__file__).parent.glob("*.pyi")) == []


def test_an_unexpected_error_is_one_line_in_the_page_and_a_traceback_in_the_log(caplog):
    caught = []

    def fails(text):
        raise RuntimeError("first\nsecond <b>")

    with gradio.Blocks():
        box, message = gradio.Textbox(), handlers.message_line()
        handlers.on([lambda run, *_, **__: caught.append(run)], fails, [box], [box], message)
    kept, told = caught[0]("x")
    assert kept == gradio.skip()
    assert "RuntimeError: first second &lt;b&gt;" in told.value
    assert "Traceback" in caplog.text


def test_uploads_are_bounded():
    assert serving.MAX_UPLOAD == 20 * 2**20
    with pytest.raises(UsageError, match="has 5001 letters; the page takes 5000"):
        handlers.written("x" * 5001, "text")


def test_the_page_of_an_own_folder_is_private(server):
    folders = list(Path(server.uploads).glob("mmattn-ui-*"))
    assert len(folders) == 1
    assert stat.S_IMODE(os.stat(folders[0]).st_mode) == 0o700


def answer_code(address, data=None, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_files_of_this_machine_are_not_given_out(server):
    """Even where a variable of Gradio's says so: see MISLEADING."""
    for path in ("/etc/passwd", str(Path("pyproject.toml").resolve()), "pyproject.toml"):
        assert answer_code(f"{server.address}gradio_api/file={path}") in (403, 404)


def test_a_large_file_is_refused_by_the_server_as_well(server):
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    address = f"{server.address}gradio_api/upload"
    assert answer_code(address, head + bytes(100) + b"\r\n--x--\r\n", **kind) == 200
    assert answer_code(address, head + bytes(serving.MAX_UPLOAD + 1) + b"\r\n--x--\r\n", **kind) == 413


def test_handlers_are_no_public_interface(server):
    with urllib.request.urlopen(f"{server.address}gradio_api/info", timeout=30) as answer:
        assert json.load(answer) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_nobody_else_can_open_it(server):
    port = int(server.address.rstrip("/").rsplit(":", 1)[1])
    listening = Path("/proc/net/tcp")
    if not listening.exists():
        pytest.skip("needs /proc/net/tcp")
    found = [line.split()[1] for line in listening.read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [place for place in found if place.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
