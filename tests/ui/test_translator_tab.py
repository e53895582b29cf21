"""A translator of several languages."""

from __future__ import annotations

import pytest

from mmattn.errors import UsageError
from mmattn.inference.translator import Translator
from tests.inference.tiny_translators import ENGLISH, save_stock_translator

pytest.importorskip("gradio")
tab = pytest.importorskip("mmattn.ui.translator_tab")
page = pytest.importorskip("mmattn.ui.page")


def opened(tmp_path_factory, kind):
    folder = save_stock_translator(tmp_path_factory.mktemp(kind), kind, files=tmp_path_factory.mktemp("files"))
    return Translator.from_pretrained(folder, device="cpu")


def dropdowns(translator):
    parts = page.build_page([page.PageModel("x", translator)]).blocks.values()
    return {part.label: part for part in parts if getattr(part, "label", None) in ("From", "Into")}


def test_both_languages_are_chosen(tmp_path_factory):
    translator = opened(tmp_path_factory, "nllb")
    found = dropdowns(translator)
    assert found["From"].visible
    assert [name for name, _ in found["Into"].choices] == list(translator.languages)
    work = tab._Work(translator)
    said, maps, *_ = work.translate(ENGLISH[0], "eng_Latn", "deu_Latn")
    assert said == translator.translate(ENGLISH[0], src_lang="eng_Latn", tgt_lang="deu_Latn")
    assert len(maps) == 1
    with pytest.raises(UsageError, match="no longer kept: run the model again"):
        tab.draw_part(None, 0)
    with pytest.raises(UsageError, match=r"^choose the languages first"):
        work.translate(ENGLISH[0], "eng_Latn", None)


def test_only_the_target_is_chosen(tmp_path_factory):
    translator = opened(tmp_path_factory, "tags")
    assert not dropdowns(translator)["From"].visible
    work = tab._Work(translator)
    assert work.translate(ENGLISH[0], None, "fra")[0] == translator.translate(ENGLISH[0], tgt_lang="fra")
    with pytest.raises(UsageError, match=r"^choose the language first"):
        work.translate(ENGLISH[0], None, None)
