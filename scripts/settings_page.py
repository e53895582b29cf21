"""The page of all settings (docs/settings.md), from the docstrings of the recipes' config dataclasses.

python scripts/settings_page.py                            print it
python scripts/settings_page.py --write docs/settings.md   write it
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mmattn.config import list_recipes, load_config, load_recipe, settings_of  # noqa: E402
from mmattn.config.dump import yaml_words  # noqa: E402
from mmattn.config.resolve import describe_recipe  # noqa: E402
from mmattn.config.schema import type_words  # noqa: E402
from mmattn.config.settings import Setting  # noqa: E402

HEAD = """# Settings

Every setting of the recipes' configs, with its default. `mmattn show my.yaml --explain` prints a config of yours
with the same texts as comments, and `mmattn show my.yaml --explain --only training` a part of it. A setting is set in
the file, or by its path on the command line, as in `mmattn train my.yaml training.max_steps=500`:

```yaml
training:
  max_steps: 500
```

This page is made from the code: `python scripts/settings_page.py --write docs/settings.md`.
"""


@dataclass
class Section:
    """A section of the config, in the recipes that have it.

    Attributes:
        key: its path; '' for the top of a config.
        text: what it is.
        recipes: which have it, in one and the same form.
        rows: each of its settings as those recipes have it, by name.
    """

    key: str
    text: str
    recipes: list[str]
    rows: dict[str, list[Setting]]

    @property
    def title(self) -> str:
        """Its heading, the same for no other."""
        whose = "every recipe" if self.recipes == list_recipes() else " and ".join(self.recipes)
        return f"{self.key} ({whose})" if self.key else whose


def sections() -> list[Section]:
    """Every section once, those of several recipes first."""
    found: dict[tuple[str, type], Section] = {}
    for recipe in list_recipes():
        defaults = load_config(load_recipe(recipe).Config, None)
        texts = {"": describe_recipe(recipe)}
        for setting in settings_of(defaults, defaults):
            if setting.is_section:
                texts[setting.key] = setting.text
                continue
            key, _, name = setting.key.rpartition(".")
            section = found.setdefault((key, setting.owner), Section(key, texts[key], [], defaultdict(list)))
            if recipe not in section.recipes:
                section.recipes.append(recipe)
            section.rows[name].append(setting)
    return sorted(found.values(), key=lambda section: -len(section.recipes))


def page() -> str:
    """The whole page."""
    found = sections()
    shared = [section for section in found if len(section.recipes) > 1]
    lines = [HEAD, *_contents(found), ""]
    lines += ["## Sections that recipes share", ""]
    for section in shared:
        lines += [f"### {section.title}", "", *_section(section)]
    for recipe in list_recipes():
        for section in found:
            if section.recipes == [recipe]:
                lines += ["##" + "#" * bool(section.key) + f" {section.title}", "", *_section(section)]
    return "\n".join(lines)


def _contents(found: Sequence[Section]) -> Iterator[str]:
    yield "| recipe | sections |"
    yield "|---|---|"
    for recipe in list_recipes():
        own = sorted((section for section in found if recipe in section.recipes), key=lambda section: section.key)
        links = ", ".join(f"[{section.key or 'top'}](#{slug(section.title)})" for section in own)
        yield f"| `{recipe}` | {links} |"


def _section(section: Section) -> Iterator[str]:
    yield section.text
    yield ""
    yield "| setting | type | default | |"
    yield "|---|---|---|---|"
    for name, settings in section.rows.items():
        cells = [f"`{name}`", type_words(settings[0].kind), _default(section.recipes, settings), settings[0].text]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _default(recipes: Sequence[str], settings: Sequence[Setting]) -> str:
    words = [f"`{yaml_words(setting.value)}`" for setting in settings]
    if len(set(words)) == 1:
        return words[0]
    return ", ".join(f"{recipe}: {word}" for recipe, word in zip(recipes, words, strict=True))


def slug(title: str) -> str:
    """What a link to a heading is called, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, default=None, metavar="FILE")
    file = parser.parse_args().write
    if file is None:
        print(page(), end="")
    else:
        file.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
