"""Figures have one place: the README's are those of docs/measured.md, the table of families is that of its script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.scripts import open_script

ROOT = Path(__file__).resolve().parents[2]
# 1.55x, 42.9 %, 28.6; not the 4 of "4 beams".
FIGURE = re.compile(r"\d+\.\d+x|\d+(?:\.\d+)? %|\d+\.\d+(?![\d.x])")


def readme_rows() -> list[list[str]]:
    """The cells of the README's table of figures, without its head."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Measured\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_the_readme_has_the_figures_of_the_page():
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    have, rows = set(FIGURE.findall(page)), readme_rows()
    assert len(rows) > 15
    for what, beside, figure, _ in rows:
        missing = [each for each in FIGURE.findall(f"{beside} {figure}") if each not in have]
        assert not missing, (what, missing)


def test_every_row_names_its_command():
    assert all(re.match(r"`|the same$", row[3]) for row in readme_rows())


@pytest.fixture
def swap_table(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT))
    return open_script("swap_table.py", monkeypatch)


def test_the_table_of_families_has_every_family_in_its_place(swap_table):
    script, page = swap_table, ROOT / "docs" / "swap.md"
    before, after = script.around_table(page)
    text = page.read_text(encoding="utf-8")
    lines = text.removeprefix(before).removesuffix(after).strip().splitlines()
    assert "\n".join(lines[:2]) == script.HEAD
    rows = [line for line in lines[2:] if line.startswith("| ") and not line.startswith("| **")]
    names = [script.NAMES.get(key, family.name) for group in script.GROUPS.values() for key, family in group.items()]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == names
    assert len(names) == len(script.FAMILIES)
    assert "**no**" not in text
    # What the README says of it.
    (row,) = [row for row in readme_rows() if "scripts/swap_table.py" in row[3]]
    assert row[0].startswith(f"swapped: {len(rows)} model families")
    is_within = sum(row.endswith("| yes | yes |") for row in rows)
    assert row[2].startswith(f"{is_within} within tolerance")
    assert all(row.endswith("| yes |") for row in rows)
