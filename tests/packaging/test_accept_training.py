"""scripts/accept/training.py: what is trained on a card is read from the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"card": "NVIDIA H200, 140 GiB"}


@pytest.fixture
def accept(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "accept"))
    import card_page
    import lines
    import training

    monkeypatch.setattr(training, "has_card", lambda: True)
    monkeypatch.setattr(lines, "verdicts", [])

    def with_page(runs, parts, tables):
        monkeypatch.setattr(training, "card_page", lambda: card_page.CardPage(runs, parts, tables))
        training.card()
        return lines.verdicts

    yield with_page
    for name in ("card_page", "training", "lines"):
        sys.modules.pop(name)


def part(run, seconds=90.0, error=None):
    return {"run": run, "error": error, "seconds": seconds, "last_line": ""}


def row(recipe, mfu):
    return {"recipe": recipe, "parameters": "176.8 M", "MFU": mfu}


def test_each_recipe_counts_by_the_better_of_both_ways(accept, capsys):
    runs = [{"begun": "2026-11-27T01:00:00+00:00", "seconds": 500.0, "machine": MACHINE}]
    plain = [row("translate", "41.0%"), row("vlm", "35.0%"), row("diffusion", "20.0%")]
    compiled = [row("diffusion", "28.0%"), row("vlm", "44.1%")]
    tables = {
        "training": {"Plain": plain},
        "training_compiled": {"Compiled": compiled, "Compiled: cut off": [{"a": 1}]},
    }
    assert accept(runs, {"training": part(1), "training_compiled": part(1)}, tables) == [True, True, True, False]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 each recipe killed and resumed on a card (2026-11-27, H200)")
    assert "35.0% killed and resumed, 176.8 M; 44.1% torch_compile, 176.8 M" in lines[2]


def test_what_is_not_there_is_short(accept):
    assert accept([], {}, {}) == [False] * 4


def test_a_page_takes_what_its_runs_took_by_the_clock(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "accept"))
    import card_page

    run = {"begun": "2026-11-27T01:00:00+00:00", "machine": MACHINE}
    parts = {"tests": part(1, 150.0), "training": part(1, 400.0), "vlm": part(2, 30.0), "maps": part(2, 40.0)}
    page = card_page.CardPage([{**run, "seconds": 380.0}, run], parts, {})
    assert page.seconds == 380.0 + 30.0 + 40.0
    for name in ("card_page", "lines"):
        sys.modules.pop(name)
