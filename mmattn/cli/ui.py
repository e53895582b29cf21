"""`mmattn ui`."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmattn.ui.page import PageModel

ModelsArgument = Annotated[list[str], typer.Argument(metavar="MODEL", help="Trained folders, or hub ids.")]
HostOption = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Who may open it: this machine alone.")]
PortOption = Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0: any free one.")]
ShareOption = Annotated[bool, typer.Option("--share", help="A public address too, through Gradio's servers.")]

_PARTS = ("best", "final", "model")  # folders within a run, which say little


def ui(
    models: ModelsArgument, host: HostOption = "127.0.0.1", port: PortOption = 7860, share: ShareOption = False
) -> None:
    """Open a page: what models say and draw, where they look.

    A vision-language model captions and answers, a translator shows which words belong together, a text-to-image
    model draws and can be steered. Ctrl-C ends it.
    """
    from mmattn._optional import require

    require("gradio", "mmattn ui")
    from mmattn.ui.server import free_address, serving

    free_address(host, port)  # known before models are opened, which may take long
    opened = _opened(models)
    with _asked_to_end() as ended, serving(opened, host=host, port=free_address(host, port), share=share) as address:
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if share or not _is_this_machine(host):
            print("others can reach this page too: there is no password", file=sys.stderr)
        while not ended.wait(0.5):
            pass


def _is_this_machine(host: str) -> bool:
    """The address reaches no further; of a name other than localhost that is not known."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _opened(models: list[str]) -> list[PageModel]:
    from mmattn.cli.kinds import kind_of_model
    from mmattn.cli.models import open_text_to_image, open_translator, open_vlm
    from mmattn.ui.page import PageModel

    openers: dict[str, Any] = {"translator": open_translator, "vlm": open_vlm, "diffusion": open_text_to_image}
    kinds = [kind_of_model(model) for model in models]  # all are looked at before one is opened
    names = [_short_name(model) for model in models]
    found = []
    for model, kind, name in zip(models, kinds, names, strict=True):
        found.append(PageModel(name if names.count(name) == 1 else model, openers[kind](model)))
    return found


def _short_name(model: str) -> str:
    parts = [part for part in Path(model).parts if part not in _PARTS]
    return parts[-1] if parts else model


@contextlib.contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Set by Ctrl-C, or when the process is asked to end: from before the page opens, or whoever ends it as soon as it
    has said its address would leave its files behind."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
