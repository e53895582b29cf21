"""What a config says about parallel text: the `data:` section of the translation recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from mmattn._home import expand_home
from mmattn.data.stream_spec import StreamSettings
from mmattn.errors import ConfigError

KINDS = ("scenes", "office-help", "files", "aligned", "hub", "gettext")
SPLITS = ("train", "validation", "test", "heldout")
OFFICE_HELP_WORDS = (3, 40)
FILTERS = ("min_words", "max_words", "max_ratio", "drop_equal", "drop_duplicates")


@dataclass
class ParallelColumns:
    """Which column of your table holds what.

    Args:
        source: The sentence. None takes the source language's entry of a column `translation` ({"en": ..., "de": ...},
            the form of many hub data sets) where there is one, else `source`, or column 1 of a file without header.
        target: Its translation; None as for `source`, else `target`, or column 2.
        src_lang: The language of each row's sentence; None where all rows have that of the section above.
        tgt_lang: The language of each row's translation; None in the same way.
        alignment: Word alignment, as "0-0 1-2" or a list of pairs, over words split at white space.
        kind: Names the sort of sentence, for scores by kind.
    """

    source: str | None = None
    target: str | None = None
    src_lang: str | None = None
    tgt_lang: str | None = None
    alignment: str | None = None
    kind: str | None = None


@dataclass
class ParallelPart(StreamSettings):
    """One data set of sentence pairs.

    Args:
        kind: "scenes" (built in), "office-help" (LibreOffice help of Debian packages), "files" (JSONL, CSV, TSV or
            Parquet), "aligned" (two text files, line by line), "hub" (an id on the Hugging Face hub, or a folder in its
            layout or written by `save_to_disk`), "gettext" (.po or .mo catalogues); at the top also "parts" (several of
            these: setting `parts`).
        path: File, glob, folder or hub id. office-help: a folder with the unpacked packages; None looks where they are
            installed. gettext: a catalogue, or a folder that is searched for those of the target language.
        source_path: aligned: the file of the sentences, one a line.
        target_path: aligned: the file of their translations, one a line.
        eval_path: files, gettext: a file or folder of its own for scores.
        eval_source_path: aligned: a file of sentences of its own for scores.
        eval_target_path: aligned: the file of their translations.
        eval_fraction: Part of the source sentences that is put aside for scores where there is no split for them.
        seed: Seed of what is drawn (scenes) or put aside for scores.
        limit: Use only so many pairs of each split, the first; for trials.
        eval_limit: Use only so many pairs for scores, spread evenly.
        size: scenes: pairs for training.
        eval_size: scenes: pairs of each other split.
        src_lang: Language of the sentences. scenes: "en" or "de"; office-help: also "es" or "fr". None: "en" there, and
            elsewhere unknown.
        tgt_lang: Language of the translations, in the same way. None: "de" there.
        columns: Of data of kind files and hub.
        header: files: whether a CSV or TSV file starts with the names of its columns; else they are called 1, 2, 3.
        quoting: files: whether quote marks around fields of a CSV or TSV file have their usual meaning. Parallel
            corpora as TSV often mean them as text.
        hub_config: hub: the data set's configuration. None: its default.
        revision: hub: branch, tag or commit.
        train_split: hub: name of the split for training.
        eval_split: hub: name of the split for scores. None: "validation" or "test", whichever there is.
        min_words: Leave out pairs with fewer words on either side; None for no bound (3 for office-help).
        max_words: Leave out pairs with more words on either side; None for no bound (40 for office-help).
        max_ratio: Leave out pairs of which one side has more than so many times the words of the other.
        drop_equal: Leave out pairs whose sides are equal; None for no (yes for office-help).
        drop_duplicates: Leave out pairs that came before; None for no (yes for office-help).
        max_bad_fraction: More bad lines (not UTF-8, one side empty, damaged) than this part of the data are refused;
            fewer are named, counted and left out.
        max_bad: The same as a number of lines; wins over the fraction. 0 refuses any.
    """

    kind: str = "scenes"
    path: str | None = None
    source_path: str | None = None
    target_path: str | None = None
    eval_path: str | None = None
    eval_source_path: str | None = None
    eval_target_path: str | None = None
    eval_fraction: float = 0.05
    seed: int = 0
    limit: int | None = None
    eval_limit: int | None = None
    size: int = 100_000
    eval_size: int = 1000
    src_lang: str | None = None
    tgt_lang: str | None = None
    columns: ParallelColumns = field(default_factory=ParallelColumns)
    header: bool = True
    quoting: bool = True
    hub_config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    min_words: int | None = None
    max_words: int | None = None
    max_ratio: float | None = None
    drop_equal: bool | None = None
    drop_duplicates: bool | None = None
    max_bad_fraction: float = 0.05
    max_bad: int | None = None

    def __post_init__(self) -> None:
        expand_home(self, "path", "source_path", "target_path", "shards", "index_folder")
        expand_home(self, "eval_path", "eval_source_path", "eval_target_path")
        self._check_kind()
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction must be at least 0 and below 1, not {self.eval_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction must lie between 0 and 1, not {self.max_bad_fraction}")
        for key, least in (("limit", 1), ("eval_limit", 1), ("size", 1), ("eval_size", 1), ("min_words", 1)):
            _require_least(key, getattr(self, key), least)
        _require_least("max_words", self.max_words, self.min_words or 1)
        _require_least("max_ratio", self.max_ratio, 1)
        _require_least("max_bad", self.max_bad, 0)
        if self.path is not None and self.kind in ("scenes", "parts"):
            what = "sentences on them are made" if self.kind == "scenes" else "each part has a path of its own"
            raise ConfigError(
                f"data.path is {self.path}, but data.kind is {self.kind}: {what}; set data.kind, to files say, or "
                "leave the path out"
            )
        if self.eval_path is not None and self.kind not in ("files", "gettext"):
            raise ConfigError(f"data.eval_path is for kinds files and gettext, not {self.kind}")
        self._check_aligned()
        given = [key for key in FILTERS if getattr(self, key) is not None]
        if self.kind == "scenes" and given:
            raise ConfigError(f"data.{given[0]} is for other people's text, not for kind scenes")
        self.check_streaming(self.kind, ("files",), ("eval_fraction",))
        if self.streaming and self.drop_duplicates:
            raise ConfigError("data.drop_duplicates needs all pairs in memory: leave it out with data.streaming=true")

    def _check_kind(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"data.kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")

    def _check_aligned(self) -> None:
        paths = ("source_path", "target_path", "eval_source_path", "eval_target_path")
        given = [key for key in paths if getattr(self, key) is not None]
        if self.kind != "aligned":
            if given:
                raise ConfigError(f"data.{given[0]} is for kind aligned, not {self.kind}")
            return
        if self.path is not None:
            raise ConfigError(
                "data.kind=aligned has two files: set data.source_path and data.target_path, not data.path"
            )
        for key, other in (paths[:2], paths[2:]):
            if (getattr(self, key) is None) != (getattr(self, other) is None):
                raise ConfigError(f"data.{key} and data.{other} belong together: set both")


@dataclass
class ParallelConfig(ParallelPart):
    """A data set of sentence pairs, or several put together.

    Args:
        parts: For kind "parts": data sets to put together. Each has the settings of this section, such as
            {kind: files, path: a.jsonl, src_lang: en, tgt_lang: de}, which are then not set here; `language_codes` is.
        language_codes: What the model's tokenizer calls a language, where the data calls it otherwise: de: deu_Latn.
    """

    parts: list[ParallelPart] = field(default_factory=list)
    language_codes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.parts) != (self.kind == "parts"):
            raise ConfigError("data.kind=parts and data.parts belong together: set both, or neither")
        if any(part.streaming for part in self.parts):
            raise ConfigError(
                "data.parts cannot be streamed: put their pairs into the same shards, with columns for the languages "
                "(data.columns.src_lang, data.columns.tgt_lang)"
            )
        for item in dataclasses.fields(ParallelPart) if self.parts else ():
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            if item.name != "kind" and getattr(self, item.name) != default:
                raise ConfigError(f"data.{item.name} beside data.parts changes nothing: set it in each of the parts")

    def _check_kind(self) -> None:
        if self.kind != "parts":
            super()._check_kind()


def _require_least(key: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise ConfigError(f"data.{key} must be {least} or more, not {value}")
