"""The page of all settings: made from the code, and up to date."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from mmattn.config import list_recipes
from tests.scripts import open_script

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "settings.md"


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    return open_script("settings_page.py", monkeypatch)


def test_it_is_up_to_date(script: ModuleType):
    is_same = PAGE.read_text(encoding="utf-8") == script.page()
    assert is_same, "run `python scripts/settings_page.py --write docs/settings.md`"


def test_every_link_leads_to_a_heading(script: ModuleType):
    text = PAGE.read_text(encoding="utf-8")
    headings = [script.slug(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    links = re.findall(r"\(#([^)]*)\)", text)
    assert len(headings) == len(set(headings))
    assert set(links) <= set(headings)
    assert set(list_recipes()) <= set(links)


def test_shared_sections_stand_there_once():
    text = PAGE.read_text(encoding="utf-8")
    assert [text.count(f"| `{name}` |") for name in ("max_grad_norm", "alpha", "max_objects", "kv_heads")] == [
        1,
        1,
        1,
        0,
    ]
    assert "vlm: `runs/vlm` |" in text


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_it_is_linked(page: str):
    assert re.search(r"\((docs/)?settings\.md\)", (ROOT / page).read_text(encoding="utf-8"))
