"""The README and the pages of docs/: their links lead somewhere, and the commands that they show can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmattn.cli.main import app
from mmattn.config.resolve import list_configs, list_launcher_configs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SCRIPT = re.compile(r"(?<![\w./-])(?:scripts|recipes)/[\w./-]+\.(?:py|sh|txt)")
COMMAND = re.compile(r"^(?:\$ )?mmattn ([a-z]\S*)(.*)$", re.MULTILINE)
CONFIG = re.compile(r"(?<![\w./-])(?:vlm|translate|diffusion|accelerate)/[a-z][\w-]*(?![\w./-])")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    missing = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "`code`", prose(page))):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_are_named_are_there(page):
    named = set(SCRIPT.findall(page.read_text(encoding="utf-8")))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_known_verbs_and_configs(page):
    text = page.read_text(encoding="utf-8")
    typed = "\n".join([*FENCE.findall(text), *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)])
    verbs = {command.name for command in app.registered_commands}
    configs = {*list_configs(), *list_launcher_configs()}
    commands = COMMAND.findall(typed)
    assert not sorted({verb for verb, _ in commands} - verbs)
    assert not sorted({name for _, rest in commands for name in CONFIG.findall(rest)} - configs)


def test_what_is_looked_for_is_found():
    """The patterns above find something: pages that have changed their style are not passed over."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(LINK.findall(readme)) > 20
    assert "scripts/quickstart.sh" in SCRIPT.findall(readme)
    assert ("train", " diffusion/scenes                   # or") in [
        (verb, rest[:40]) for verb, rest in COMMAND.findall(readme)
    ]
    assert "1-fine-tune-from-the-command-line" in anchors(ROOT / "README.md")
