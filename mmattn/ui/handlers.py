"""What stands between a visitor's click and a model: one at a time, and one line when something is wrong."""

from __future__ import annotations

import functools
import html
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from mmattn.errors import MmattnError, UsageError
from mmattn.maps.record import AttentionMaps

MOST_LETTERS = 5000
MAPS_KEPT = 3600  # seconds in a visitor's session
_log = logging.getLogger(__name__)
_AT_ONCE = 4  # drawings of maps, which need no model

# One computation at a time, whichever tab it comes from: the models share processor and memory. Gradio's queue keeps
# the order and tells visitors their place in it; the lock holds where a call comes past the queue.
_MODELS = threading.Lock()
_QUEUE = "models"


def message_line() -> gr.HTML:
    """Where a tab says what is wrong."""
    return gr.HTML(visible=False, elem_classes=["message"])


def on(
    events: Sequence[Callable[..., Any]],
    work: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    message: gr.HTML,
    *,
    uses_model: bool = False,
    otherwise: Callable[[], tuple[Any, ...]] | None = None,
) -> None:
    """Do `work` at every one of the events.

    `work` is a plain function, no generator: Gradio runs all of it in one thread and one context, as
    `record_attention` and `steer_attention` need.

    Args:
        events: such as `button.click`.
        work: takes the inputs' values and returns the outputs'.
        inputs: components.
        outputs: components.
        message: where it is said why it failed.
        uses_model: it waits for those before it.
        otherwise: gives the outputs' values where it fails; without it they stay as they are.
    """

    def failed(told: str) -> tuple[Any, ...]:
        values = [gr.skip()] * len(outputs) if otherwise is None else otherwise()
        return (*values, problem(told))

    @functools.wraps(work)
    def run(*given: Any) -> tuple[Any, ...]:
        try:
            if not uses_model:
                return (*work(*given), gr.HTML(visible=False))
            with _MODELS:
                return (*work(*given), gr.HTML(visible=False))
        except MmattnError as error:
            return failed(" ".join(str(error).split()))
        except Exception as error:
            _log.exception("the page's %s failed", work.__qualname__)
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return failed(f"unexpected, see the terminal that runs the page: {told}")

    limits: dict[str, Any] = (
        {"concurrency_limit": 1, "concurrency_id": _QUEUE} if uses_model else {"concurrency_limit": _AT_ONCE}
    )
    for event in events:
        event(run, list(inputs), [*outputs, message], api_visibility="private", **limits)


def still_there(maps: AttentionMaps | None) -> AttentionMaps:
    """The maps of a visitor's session.

    Raises:
        UsageError: they were forgotten.
    """
    if maps is None:
        raise UsageError("these maps are no longer kept: run the model again")
    return maps


def problem(text: str) -> gr.HTML:
    """One line that says what is wrong."""
    return gr.HTML(f'<p role="alert">{html.escape(text)}</p>', visible=True)


def written(text: str | None, what: str) -> str:
    """What a visitor wrote, without spaces around it.

    Raises:
        UsageError: nothing, or too much.
    """
    text = (text or "").strip()
    if not text:
        raise UsageError(f"no {what} yet: write one")
    return bounded(text, what)


def bounded(text: str, what: str) -> str:
    """What a visitor wrote, as it is.

    Raises:
        UsageError: too much.
    """
    if len(text) > MOST_LETTERS:
        raise UsageError(f"the {what} has {len(text)} letters; the page takes {MOST_LETTERS} at most")
    return text
