"""gettext catalogues as parallel text: finished messages, plural forms, contexts, accelerators."""

from __future__ import annotations

import polib
import pytest

from mmattn.data import gettext_catalogs
from mmattn.data.gettext_catalogs import find_catalogs, without_accelerators
from mmattn.data.parallel import open_parallel
from mmattn.data.parallel_spec import ParallelConfig
from mmattn.errors import DataError, OptionalPackageError

_PO = r"""
msgid ""
msgstr ""
"Language: {language}\n"
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: {plural}\n"

#: a.c:1
msgid "_Open %s"
msgstr "Ö_ffne %s"

msgctxt "menu"
msgid "Open"
msgstr "Offen"

msgctxt "verb"
msgid "Open"
msgstr "Öffnen"

msgid "%d file in %(folder_name)s"
msgid_plural "%d files in %(folder_name)s"
{forms}

#, fuzzy
msgid "Fuzzy"
msgstr "Unscharf"

msgid "Not yet"
msgstr ""

msgid ""
"A text that is\n"
"wrapped.\n"
"\n"
"And another.\n"
msgstr ""
"Ein Text, der\n"
"umbrochen\n"
"ist.\n"
"\n"
"Und noch einer.\n"

#~ msgid "Old"
#~ msgstr "Alt"
"""
_GERMAN = {"language": "de", "plural": "nplurals=2; plural=(n != 1);"}
_FORMS = 'msgstr[0] "%d Datei in %(folder_name)s"\nmsgstr[1] "%d Dateien in %(folder_name)s"'
_EXPECTED = [
    ("Open %s", "Öffne %s"),
    ("Open", "Offen"),
    ("Open", "Öffnen"),
    ("%d file in %(folder_name)s", "%d Datei in %(folder_name)s"),
    ("%d files in %(folder_name)s", "%d Dateien in %(folder_name)s"),
    ("A text that is wrapped.", "Ein Text, der umbrochen ist."),
    ("And another.", "Und noch einer."),
]


def _write(path, forms: str = _FORMS, **header) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _PO
    for key, value in {**_GERMAN, **header, "forms": forms}.items():
        text = text.replace(f"{{{key}}}", value)
    path.write_text(text, encoding="utf-8")
    return str(path)


def _open(path, **options):
    return open_parallel(ParallelConfig(kind="gettext", path=str(path), **{"eval_fraction": 0.0, **options}))


def _texts(source) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in source.pairs(range(len(source)))]


def test_finished_messages_of_a_po_file(tmp_path):
    source = _open(_write(tmp_path / "app.po"), src_lang="en")
    assert _texts(source) == _EXPECTED
    assert (source[0].src_lang, source[0].tgt_lang) == ("en", "de")
    assert source[1].id.endswith("app.po line 12")


def test_a_compiled_catalogue_gives_the_same(tmp_path):
    polib.pofile(_write(tmp_path / "app.po")).save_as_mofile(str(tmp_path / "app.mo"))
    source = _open(tmp_path / "app.mo")
    assert sorted(_texts(source)) == sorted(_EXPECTED)
    assert source[0].id.endswith("app.mo entry 1")


@pytest.mark.parametrize(
    ("plural", "forms", "expected"),
    [
        ("nplurals=1; plural=0;", ["dosya"], [("files", "dosya")]),
        (
            "nplurals=3; plural=(n==1 ? 0 : n%10>=2 && n%10<=4 && (n%100<10 || n%100>=20) ? 1 : 2);",
            ["plik", "pliki", "plików"],
            [("file", "plik"), ("files", "plików")],
        ),
        ("nplurals=2; plural=n==1;", ["viele", "eine"], [("file", "eine"), ("files", "viele")]),
        ("broken", ["Datei", "Dateien"], [("file", "Datei"), ("files", "Dateien")]),
        ("nplurals=2; plural=__import__('os');", ["Datei", "Dateien"], [("file", "Datei"), ("files", "Dateien")]),
    ],
)
def test_plural_forms_of_other_languages(tmp_path, plural, forms, expected):
    written = "\n".join(f'msgstr[{number}] "%d {form}"' for number, form in enumerate(forms))
    source = _open(_write(tmp_path / "x.po", written, plural=plural))
    found = [(one.split()[1], other.split()[1]) for one, other in _texts(source) if one.startswith("%d")]
    assert found == expected


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("_File", "_Datei", ("File", "Datei")),
        ("Save &as...", "Speichern &unter ...", ("Save as...", "Speichern unter ...")),
        ("S_ave", "Spei_chern", ("Save", "Speichern")),
        ("_OK", "_OK", ("OK", "OK")),
        ("&Open", "開く(&O)", ("Open", "開く")),
        ("Close (_W)", "Schließen", ("Close", "Schließen")),
        ("set file_name now", "setze file_name jetzt", ("set file_name now", "setze file_name jetzt")),
        ("AT&T and R&D", "AT&T und R&D", ("AT&T and R&D", "AT&T und R&D")),
        ("AT&T", "AT&T", ("AT&T", "AT&T")),
        ("Q & A", "Fragen & Antworten", ("Q & A", "Fragen & Antworten")),
        ("this &lt;b&gt; is", "das &lt;b&gt; ist", ("this &lt;b&gt; is", "das &lt;b&gt; ist")),
        ("%(user_name)s left", "%(user_name)s ging", ("%(user_name)s left", "%(user_name)s ging")),
        ("see http://x/a_b", "siehe http://x/de_b", ("see http://x/a_b", "siehe http://x/de_b")),
        ("__init__ a && b", "__init__ a && b", ("__init__ a && b", "__init__ a && b")),
    ],
)
def test_accelerators_go_and_names_stay(source, target, expected):
    assert without_accelerators(source, target) == expected


def test_catalogues_of_a_language_are_found_in_folders(tmp_path):
    names = (
        "de/LC_MESSAGES/a.mo",
        "de_AT/LC_MESSAGES/a.mo",
        "po/de.po",
        "po/fr.po",
        "app-de.po",
        "coded.po",
        "de/readme.txt",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = [file.relative_to(tmp_path).as_posix() for file in find_catalogs(tmp_path, "de")]
    assert found == ["app-de.po", "de/LC_MESSAGES/a.mo", "po/de.po"]
    assert len(find_catalogs(tmp_path / "po/*.po", None)) == 2
    with pytest.raises(DataError, match="holds no .po or .mo catalogues in es, of 6 that it holds"):
        find_catalogs(tmp_path, "es")
    with pytest.raises(DataError, match="is a folder: set data.tgt_lang to the language"):
        find_catalogs(tmp_path, None)
    with pytest.raises(DataError, match="readme.txt is no gettext catalogue: give .po or .mo files"):
        find_catalogs(tmp_path / "de/readme.txt", "de")
    with pytest.raises(DataError, match="none.po: no such file; set data.path"):
        find_catalogs(tmp_path / "none.po", "de")


def test_a_damaged_catalogue_is_named_and_left_out(tmp_path, caplog):
    for number in range(3):
        _write(tmp_path / f"{number}/de.po")
    (tmp_path / "1/de.po").write_bytes(
        b'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\nmsgid "caf\xe9"\n'
    )
    (tmp_path / "3").mkdir()
    (tmp_path / "3/de.mo").write_bytes(b"not a catalogue")
    source = _open(tmp_path, tgt_lang="de", max_bad=2)
    assert len(source) == 2 * len(_EXPECTED)
    assert "1/de.po: cannot be read ('utf-8' codec can't decode byte 0xe9" in caplog.text
    assert "3/de.mo: cannot be read (" in caplog.text
    with pytest.raises(
        DataError, match=r"0 allowed \(data.max_bad, data.max_bad_fraction\); the last: .*1/de\.po: cannot"
    ):
        _open(tmp_path, tgt_lang="de", max_bad=0)
    with pytest.raises(DataError, match=r"1 of 1 lines so far are bad"):
        _open(tmp_path / "3/de.mo")


def test_scores_come_from_a_part_or_a_file_of_their_own(tmp_path):
    path = _write(tmp_path / "de.po")
    spec = ParallelConfig(kind="gettext", path=path, eval_fraction=0.3)
    train, test = (_texts(open_parallel(spec, split)) for split in ("train", "test"))
    assert sorted(train + test) == sorted(_EXPECTED)
    assert {pair[0] for pair in train}.isdisjoint(pair[0] for pair in test)
    own = ParallelConfig(kind="gettext", path=path, eval_path=_write(tmp_path / "own.po"))
    assert [len(open_parallel(own, split)) for split in ("train", "test")] == [7, 7]
    with pytest.raises(DataError, match="data.kind=gettext needs data.path"):
        open_parallel(ParallelConfig(kind="gettext"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def missing(name: str, purpose: str):
        raise OptionalPackageError(f"{purpose} needs the package {name}")

    monkeypatch.setattr(gettext_catalogs, "require", missing)
    with pytest.raises(OptionalPackageError, match="reading gettext catalogues needs the package polib"):
        _open(_write(tmp_path / "de.po"))
