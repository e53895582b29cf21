"""LibreOffice's help as parallel text: pages to pairs by paragraph, cleaned, split by page, without leaks."""

from __future__ import annotations

import datasets
import pytest

from mmattn.data import office_help
from mmattn.data.help_pages import aligned_sentences, cut_sentences, read_paragraphs
from mmattn.data.parallel import open_parallel
from mmattn.data.parallel_spec import ParallelConfig
from mmattn.errors import DataError

_PAGE = """<!DOCTYPE html><html><head><title>x</title></head><body>
<p dir="auto">LibreOffice Help</p>
<h1 id="hd_id1" dir="auto"><a name="top"></a>Positioning
 Objects</h1>
<p id="par_id2" class="paragraph">Choose <span class="emph">File &amp; <b>New</b></span>, or press
Shift+<span class="switchinline"><span hidden="true" id="MACtext" class="MAC">Command</span><span hidden="true"
id="defaulttext">Ctrl</span></span>+N<br>now <img src="x.svg"> .</p>
<p id="par_id3" class="bascode">Print 3</p>
<p id="par_id4" class="paragraph"><span hidden="true" id="WRITERtext" class="WRITER"><a href="x">Only
there</a></span></p>
<td><p id="par_id5">Never closed
<p id="par_id6">The next one</p> outside
<p id="par_id6">a second of that name</p></body></html>"""


def test_paragraphs_come_by_id_without_markup():
    assert read_paragraphs(_PAGE) == {
        "hd_id1": "Positioning Objects",
        "par_id2": "Choose File & New, or press Shift+Ctrl+N now .",
        "par_id5": "Never closed",
        "par_id6": "The next one",
    }


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("Use e.g. Calc, z. B. Writer, or No. 5. Then stop.", ["Use e.g. Calc, z. B. Writer, or No. 5. Then stop."]),
        ('He says "Stop." Then he goes.', ['He says "Stop."', "Then he goes."]),
        ("Am 3. Mai endet es. „Gut“ ist es.", ["Am 3. Mai endet es.", "„Gut“ ist es."]),
        ("the file a.txt. it ends", ["the file a.txt. it ends"]),
    ],
)
def test_sentences_are_cut(text, sentences):
    assert cut_sentences(text) == sentences


def test_sentences_are_paired_only_where_the_cuts_agree():
    assert list(aligned_sentences("One. Two.", "Eins. Zwei.")) == [("One.", "Eins."), ("Two.", "Zwei.")]
    assert list(aligned_sentences("One. Two.", "Eins, zwei.")) == [("One. Two.", "Eins, zwei.")]
    assert list(aligned_sentences("One? Two.", "Eins. Zwei?")) == [("One? Two.", "Eins. Zwei?")]


def _write_help(root, pages: int = 60, own_folders: bool = False):
    for code, word in (("en-US", "number"), ("de", "Nummer"), ("fr", "numéro")):
        base = root / code if own_folders else root
        for page in range(pages):
            file = base / f"usr/share/libreoffice/help/{code}/text/shared/{page:02}.html"
            file.parent.mkdir(parents=True, exist_ok=True)
            unique = " ".join(f"{word}{page}{letter}" for letter in "abcdefg")
            paragraphs = (
                f'<p id="par_id1">{unique} is the {word}. It {word} ends {page}.</p>',
                '<p id="par_id2">LibreOffice Calc of equal</p>',
                f'<p id="par_id3">too short {word}</p>',
                f'<h2 id="hd_id4">the same {word} on all pages</h2>',
                f'<p id="par_{code}">only here {word} {page}</p>',
            )
            file.write_text("".join(paragraphs), encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _open(root, split, **options):
    return open_parallel(ParallelConfig(kind="office-help", path=str(root), **options), split)


def test_pairs_are_cleaned_and_split_by_page(tmp_path):
    root = _write_help(tmp_path)
    parts = {split: _open(root, split, min_words=4) for split in ("train", "validation", "test")}
    train = parts["train"]
    texts = {pair.source: pair for pair in train.pairs(range(len(train)))}
    assert all(len(part) for part in parts.values())
    assert "LibreOffice Calc of equal" not in texts
    assert "too short number" not in texts
    assert not any("only here" in text for text in texts)
    same = texts["the same number on all pages"]
    assert (same.target, same.src_lang, same.tgt_lang) == ("the same Nummer on all pages", "en", "de")
    assert same.id == "office-help text/shared/00.html#hd_id4/1"
    pages = {split: {pair.id.split("#")[0] for pair in part.pairs(range(len(part)))} for split, part in parts.items()}
    assert not pages["train"] & pages["test"]
    assert not pages["train"] & pages["validation"]
    assert not pages["test"] & pages["validation"]
    assert train.dropped["with equal sides"] == 60
    assert train.dropped["that came before"] == 59
    assert train.dropped["of fewer than 4 words"] == 60
    assert [pair.id for pair in _open(root, "test", min_words=4).pairs([0])] == [parts["test"][0].id]
    other = _open(root, "test", min_words=4, seed=5)
    assert {pair.id for pair in other.pairs(range(len(other)))} != {
        pair.id for pair in parts["test"].pairs(range(len(parts["test"])))
    }


def test_what_training_knows_is_not_tested(tmp_path):
    root = _write_help(tmp_path)
    plain = _open(root, "test")
    leaked = plain[0]
    page = next(
        name
        for name in sorted((root / "usr/share/libreoffice/help/en-US/text/shared").iterdir())
        if office_help._split_of(f"text/shared/{name.name}", 0) == "train"
    )
    for code, text in (("en-US", leaked.source), ("de", leaked.target)):
        file = root / f"usr/share/libreoffice/help/{code}/text/shared/{page.name}"
        file.write_text(file.read_text(encoding="utf-8") + f'<p id="par_id9">Also {text}</p>', encoding="utf-8")
    cleaned = _open(root, "test")
    assert leaked.source not in {pair.source for pair in cleaned.pairs(range(len(cleaned)))}
    assert cleaned.dropped["known from training"] == plain.dropped["known from training"] + 1


def test_other_languages_and_folders_of_packages(tmp_path):
    root = _write_help(tmp_path, own_folders=True)
    assert _open(root, "train", tgt_lang="fr")[0].tgt_lang == "fr"
    turned = _open(root, "train", src_lang="de")
    assert (turned[0].src_lang, turned[0].tgt_lang) == ("de", "en")
    assert "Nummer" in turned[0].source


def test_pages_are_read_once(tmp_path, monkeypatch):
    root = _write_help(tmp_path)
    first = _open(root, "train")
    monkeypatch.setattr(office_help, "read_paragraphs", lambda html: pytest.fail("read again"))
    assert _open(root, "train").pairs(range(9)) == first.pairs(range(9))
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    changed = root / "usr/share/libreoffice/help/de/text/shared/00.html"
    table = office_help.read_office_help(root, "en", "de")
    changed.write_text('<p id="par_id1">ganz anders</p>', encoding="utf-8")
    assert office_help.read_office_help(root, "en", "de").num_rows < table.num_rows
    assert len(list((tmp_path / "cache/mmattn-office-help").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tgt_lang": "it"}, "office-help has no language 'it': use one of en, de, es, fr"),
        ({"tgt_lang": "es"}, r"holds no help in es: install it \(apt-get install libreoffice-help-es\), or unpack it"),
        ({"src_lang": "de", "tgt_lang": "de"}, "office-help needs two languages, not de twice"),
        ({"seed": 1, "min_words": 30}, "nothing is left"),
    ],
)
def test_what_is_missing_is_named(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        _open(_write_help(tmp_path), "train", **options)


def test_missing_packages_and_damaged_pages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(office_help, "INSTALLED", tmp_path / "none")
    with pytest.raises(DataError, match=r"the package libreoffice-help-en-us is not installed: .* set data\.path=help"):
        open_parallel(ParallelConfig(kind="office-help"))
    root = _write_help(tmp_path, pages=1)
    with pytest.raises(DataError, match=r"nothing falls to split 'test'; use another data\.seed"):
        _open(root, "test")
    page = root / "usr/share/libreoffice/help/de/text/shared/00.html"
    page.write_bytes(b'<p id="par_id1">caf\xe9</p>')
    with pytest.raises(DataError, match=r"00\.html: not UTF-8 \(invalid continuation byte at byte 19\)"):
        _open(root, "train")
    page.rename(page.with_name("other.html"))
    with pytest.raises(DataError, match="have no pages in common: are they of one version"):
        _open(root, "train")
