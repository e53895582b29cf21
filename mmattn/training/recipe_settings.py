"""A recipe's own settings (model, data, loss, ...) when a run is resumed: which of them have changed, and may they."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE = "config.yaml"
KEEPS_BEST = "!evaluation.best"
SCORES_AND_PATHS = (
    "evaluation.*",
    KEEPS_BEST,
    "data.*path",
    "data.shards*",  # their content is compared by itself
    "data.index_folder",
    "data.image_root",
    "data.*eval_size",
    "data.*eval_limit",
    "data.*max_bad*",
    "cache.folder",
)
"""For `Task.free_settings`: how scores are made, and where the same data lie."""

_ABSENT = object()
_Difference = tuple[str, Any, Any]


@dataclass
class RecipeChanges:
    """What differs between a checkpoint's recipe settings and those of the run that goes on from it.

    Attributes:
        changed: what changes the mathematics, as `key: old -> new`.
        remarks: what else there is to say.
    """

    changed: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def recipe_changes(
    checkpoint: Path, config: dict[str, Any] | None, free: Sequence[str], *, has_best: bool = True
) -> RecipeChanges:
    """Compare a checkpoint's `config.yaml` with a run's resolved config; `training` has rules of its own.

    Args:
        checkpoint: its folder.
        config: the recipe's whole configuration; None: there is nothing to compare.
        free: patterns of the keys that may change, `*` for any text; one that begins with `!` takes keys out again.
        has_best: a best evaluation was chosen; until then it may still be said by which score.
    """
    if not has_best:
        free = [pattern for pattern in free if pattern != KEEPS_BEST]
    if config is None:
        return RecipeChanges()
    file = checkpoint / CONFIG_FILE
    if not file.is_file():
        return RecipeChanges(remarks=[f"{checkpoint} has no {CONFIG_FILE}: only its training settings were compared"])
    old = yaml.safe_load(file.read_text(encoding="utf-8"))
    new = yaml.safe_load(yaml.safe_dump(config))  # tuples become lists, as in the file
    changes = RecipeChanges()
    for key, before, after in _differences(old, new):
        if key.partition(".")[0] == "training":
            continue
        if before is _ABSENT:
            changes.remarks.append(f"{checkpoint.name} was written before there was {key}, which is {after!r} now")
        elif after is _ABSENT:
            changes.remarks.append(f"{checkpoint.name} has a setting that there no longer is: {key}, {before!r}")
        elif _is_free(key, free):
            changes.remarks.append(f"changed, as this recipe allows: {key}: {before} -> {after}")
        else:
            changes.changed.append(f"{key}: {before} -> {after}")
    return changes


def _differences(old: Any, new: Any, key: str = "") -> Iterator[_Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{key}.{place}")
    elif old != new:
        yield key, old, new


def _is_free(key: str, patterns: Sequence[str]) -> bool:
    kept = any(fnmatchcase(key, pattern[1:]) for pattern in patterns if pattern.startswith("!"))
    return not kept and any(fnmatchcase(key, pattern) for pattern in patterns)
