"""Shows a page to browsers, on this machine alone unless asked for more."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from mmattn._environment import changed_environment
from mmattn.errors import RunError, UsageError
from mmattn.ui.look import CSS, theme
from mmattn.ui.page import PageModel, build_page

MAX_UPLOAD = 20 * 2**20  # bytes of a file
_SESSIONS = 64  # visitors whose maps are kept at a time


def free_address(host: str, port: int) -> int:
    """The port to use: `port`, or any free one for 0.

    Raises:
        UsageError: it is in use, needs more rights, or `host` is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: no such address: {error.strerror}") from error
    except OverflowError as error:
        raise UsageError(f"--port {port}: ports are numbers up to 65535") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"--port {port}: in use on {host}; end the program that has it, give another, or 0 for any free one"
            ) from error
        raise UsageError(f"--host {host} --port {port}: cannot be used: {error.strerror}") from error


@contextlib.contextmanager
def serving(models: Sequence[PageModel], *, host: str, port: int, share: bool) -> Iterator[str]:
    """Show the page of some models while the block lasts; gives its address. Files that visitors send lie in a folder
    of their own, which is deleted at the end.

    Args:
        models: a tab for each.
        host: address to listen on; "127.0.0.1" and "::1" are reached from this machine only.
        port: from `free_address`.
        share: let Gradio's servers pass on a public address, too.

    Raises:
        UsageError: the port was taken meanwhile.
        RunError: the page could not be reached, or no public address could be had.
    """
    with tempfile.TemporaryDirectory(prefix="mmattn-ui-") as folder, changed_environment(_for_gradio(folder)):
        page = build_page(models)
        try:
            _launch(page, host, port, share)
            yield str(page.share_url or page.local_url)
        finally:
            page.close(verbose=False)


def _launch(page: gr.Blocks, host: str, port: int, share: bool) -> None:
    name = f"[{host}]" if ":" in host else host  # as in an address of a page
    with changed_environment(_past_proxies(host, share)):
        try:
            page.launch(server_name=name, server_port=port, share=share, **_settings())
        except OSError as error:
            raise UsageError(f"--host {host} --port {port}: cannot be used: {error}") from error
        except Exception as error:  # Gradio asks its own page, and raises what its client raises
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise RunError(
                f"--host {host} --port {port}: the page could not be opened, or not be reached from this machine; "
                f"give another --host, and check the proxy settings if there are any ({told})"
            ) from error
    if share and not page.share_url:
        raise RunError("--share: no public address could be had; without it the page works on this machine")


def _for_gradio(folder: str) -> dict[str, str | None]:
    """Nothing of Gradio's variables counts: some give files away, some have no argument that is stronger. It takes the
    place of its files from them as components are made, and again while it serves."""
    changes: dict[str, str | None] = {name: None for name in os.environ if name.startswith("GRADIO_")}
    return changes | {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}


def _past_proxies(host: str, share: bool) -> dict[str, str | None]:
    """Gradio asks its own page while it starts; only for a public address it asks others."""
    own = [host, "127.0.0.1", "localhost"] if share else ["*"]
    given = [os.environ[name] for name in ("NO_PROXY", "no_proxy") if os.environ.get(name)]
    value = ",".join([*given, *own])
    return {"NO_PROXY": value, "no_proxy": value}


def _settings() -> dict[str, Any]:
    """What Gradio would otherwise offer to visitors or do by itself."""
    return {
        "prevent_thread_lock": True,
        "quiet": True,
        "inline": False,
        "show_error": True,
        "max_file_size": MAX_UPLOAD,
        "state_session_capacity": _SESSIONS,
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "num_workers": 0,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "theme": theme(),
        "css": CSS,
    }
