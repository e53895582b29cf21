"""The page: a tab for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mmattn.errors import UsageError
from mmattn.inference.text_to_image import TextToImage
from mmattn.inference.translator import Translator
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.ui.text_to_image_tab import text_to_image_tab
from mmattn.ui.translator_tab import translator_tab
from mmattn.ui.vlm_tab import vlm_tab

TITLE = "mmattn: see where models look"
_FORGOTTEN = (600, 3600)  # how often, and after how many seconds, pictures that were sent or drawn are deleted
_MOST_WAITING = 32
_TABS: dict[type, Any] = {Translator: translator_tab, VisionLanguageModel: vlm_tab, TextToImage: text_to_image_tab}


@dataclass(frozen=True, eq=False)
class PageModel:
    """A model, and what its tab is called."""

    name: str
    model: Translator | VisionLanguageModel | TextToImage


def build_page(models: Sequence[PageModel]) -> gr.Blocks:
    """The page, which `mmattn.ui.server` shows.

    Raises:
        UsageError: no model, or one of a kind that has no tab.
    """
    if not models:
        raise UsageError("no model to make a page of")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=_FORGOTTEN) as page:
        gr.Markdown("# mmattn\nSee where models look.", elem_classes=["head"])
        with gr.Tabs():
            for number, each in enumerate(models):
                tab = next((tab for cls, tab in _TABS.items() if isinstance(each.model, cls)), None)
                if tab is None:
                    raise UsageError(f"{each.name}: a {type(each.model).__name__} has no page")
                with gr.Tab(each.name, id=number):
                    tab(each.model)
    page.queue(max_size=_MOST_WAITING, api_open=False)
    return page
