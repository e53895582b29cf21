"""`~` in settings: shells leave it as it is in `training.output_dir=~/runs/a`, and YAML knows nothing of it."""

from __future__ import annotations

import os


def expand_home(settings: object, *names: str) -> None:
    """Put the home folder in place of a leading `~` in settings that are paths, or lists of paths, or None."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, list):
            setattr(settings, name, [os.path.expanduser(path) for path in value])
        elif value is not None:
            setattr(settings, name, os.path.expanduser(value))
