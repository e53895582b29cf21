"""scripts/accept/kernels.py without a card: figures come from the committed page, and can be short."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def accept(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "accept"))
    import card_page
    import kernels
    import lines

    monkeypatch.setattr(card_page, "has_card", lambda: False)
    monkeypatch.setattr(card_page, "COMMITTED", tmp_path / "gpu.json")
    monkeypatch.setattr(lines, "verdicts", [])
    card_page.card_page.cache_clear()
    yield kernels
    card_page.card_page.cache_clear()
    for name in ("card_page", "kernels", "lines"):
        sys.modules.pop(name)


def test_without_a_page_it_is_short(accept, capsys):
    accept.on_a_card()
    accept.speed()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.endswith(" short") and "no docs/gpu.json" in line for line in lines)


def test_figures_say_when_and_on_which_card(accept, capsys, tmp_path):
    def row(shape, batch, kind, ratio):
        return {"shape": shape, "batch": batch, "pass": kind, "best of torch / ours": ratio}

    rows = [
        row("SD 1.5 cross, 64 x 64", 2, "forward", "1.45"),
        row("SD 1.5 cross, 32 x 32", 4, "forward + backward", "1.84"),
        row("SDXL cross, 32 x 32", 4, "forward + backward", "1.15"),
        row("SDXL cross, 32 x 32", 16, "forward + backward", "0.50"),
        row("PixArt cross, text mask", 2, "forward", "0.83"),
        row("SDXL cross, 64 x 64", 2, "forward", "-"),
    ]
    steps = [
        {"what": f"translator, batch {batch}", "eager / graphed": cell} for batch, cell in ((1, "6.10"), (8, "4.9"))
    ]
    content = {
        "runs": [{"begun": "2026-11-26T12:00:00+00:00", "machine": {"card": "NVIDIA H200, 140 GiB", "driver": "580"}}],
        "parts": {
            "tests": {"run": 1, "error": None, "seconds": 90.0, "last_line": "202 passed in 92 s"},
            "decode": {"run": 1, "error": "not done in 9 s", "seconds": 9.0, "last_line": ""},
            "short_keys": {"run": 1, "error": None, "seconds": 50.0, "last_line": ""},
            "compiled": {"run": 1, "error": None, "seconds": 50.0, "last_line": ""},
        },
        "tables": {
            "decode": {"Decode": [{"triton_decode": "-", "cuDNN": "9.1", "floor": "2.0"}]},
            "short_keys": {"Short": rows},
            "compiled": {"Steps": steps},
        },
    }
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    accept.on_a_card()
    accept.speed()
    lines = capsys.readouterr().out.splitlines()
    found = {line[:66].strip(): line[66:].split() for line in lines}
    where = "(2026-11-26, H200)"
    assert found[f"3 tests on a card {where}"][-1] == "ok"
    assert found[f"3 decode on a card {where}"][-1] == "short"
    assert found["3 vlm on a card (not measured)"][-1] == "short"
    assert found["3 all parts together"] == ["3.3", "min", "15", "min", "ok"]
    assert found["3 card, driver and versions in the page"][-1] == "short"
    assert found[f"3 decoding beside torch's kernels {where}"][:2] == ["0", "rows"]
    assert found[f"4 graphed translator step over eager {where}"] == ["6.10", "5", "ok"]
    judged = {tuple(line.split()[-3:]) for line in lines if line.startswith("4 SD")}
    assert judged == {("1.45", "1.2", "ok"), ("1.84", "2.0", "short"), ("1.15", "1.0", "ok"), ("nan", "1.2", "short")}
