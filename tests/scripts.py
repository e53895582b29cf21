"""Opens a script of the repository as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def open_script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script at a path below `scripts/`, anew; other modules find it until `monkeypatch` is undone."""
    file = SCRIPTS / path
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module
