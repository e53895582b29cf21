from __future__ import annotations

from pathlib import Path

import pytest

from mmattn.inference.translator import Translator
from tests.inference.tiny_translators import KINDS, save_own_translator, save_stock_translator


@pytest.fixture(scope="session")
def translator_folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of every kind; copy it before you change it."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        save_stock_translator(found[kind], kind, files=tmp_path_factory.mktemp("files"))
    found["own"] = save_own_translator(tmp_path_factory.mktemp("own"), files=tmp_path_factory.mktemp("files"))
    return found


@pytest.fixture(scope="session")
def translators(translator_folders) -> dict[str, Translator]:
    return {kind: Translator.from_pretrained(folder, device="cpu") for kind, folder in translator_folders.items()}
