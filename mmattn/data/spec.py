"""What a config says about data: the `data:` section of the vision-language recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmattn._home import expand_home
from mmattn.data.images import MAX_PIXELS
from mmattn.data.stream_spec import StreamSettings
from mmattn.errors import ConfigError

KINDS = ("scenes", "stamps", "files", "imagefolder", "hub")
SPLITS = ("train", "validation", "test", "heldout")


@dataclass
class ColumnConfig:
    """Which column of your table holds what.

    Args:
        image: A path (relative to the file, or to `image_root`), the file's bytes, or an embedded image. None takes
            "file_name" in an image folder and "image" elsewhere.
        text: A caption or an answer, or a list of them.
        question: The question that `text` answers; None for captions.
        kind: Names the sort of text, for scores by kind. None: "caption", and "answer" where there is a question.
        group: Rows that agree here show the same picture: they become one record and stay on one side of a split.
            None goes by the image's path; embedded images stay apart.
    """

    image: str | None = None
    text: str = "text"
    question: str | None = None
    kind: str | None = None
    group: str | None = None


@dataclass
class DataConfig(StreamSettings):
    """A data set of pictures with texts.

    Args:
        kind: "scenes" (built in), "stamps" (the Debian package tuxpaint-stamps-default), "files" (JSONL, CSV or
            Parquet), "imagefolder" (a folder with metadata.csv, .jsonl or .parquet), "hub" (an id on the Hugging Face
            hub, or a folder in its layout or written by `save_to_disk`).
        path: File, glob, folder or hub id. stamps: the unpacked package; None looks where it is installed.
        eval_path: files, imagefolder: a file or folder of its own for scores.
        eval_fraction: Part that is put aside for scores where there is no split for them.
        seed: Seed of what is drawn (scenes) or put aside for scores.
        limit: Use only so many records of each split, the first; for trials.
        size: scenes: pictures for training.
        eval_size: scenes: pictures of each other split.
        image_size: scenes: side of the pictures in pixels, 24 or more.
        max_objects: scenes: how many objects a picture shows at most: 1, 2 or 3.
        columns: Of data of kind files, imagefolder and hub.
        image_root: files, imagefolder: folder that relative image paths start from. None: that of the table.
        hub_config: hub: the data set's configuration. None: its default.
        revision: hub: branch, tag or commit.
        train_split: hub: name of the split for training.
        eval_split: hub: name of the split for scores. None: "validation" or "test", whichever there is.
        max_bad_fraction: The run stops when more than this part of the pictures cannot be read (one always may);
            fewer are named, counted and replaced by others.
        max_bad: The same as a number of pictures; wins over the fraction. 0 refuses any.
        max_pixels: Pictures with more pixels count as unreadable.
    """

    kind: str = "scenes"
    path: str | None = None
    eval_path: str | None = None
    eval_fraction: float = 0.1
    seed: int = 0
    limit: int | None = None
    size: int = 100_000
    eval_size: int = 500
    image_size: int = 32
    max_objects: int = 2
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    image_root: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    max_bad_fraction: float = 0.05
    max_bad: int | None = None
    max_pixels: int = MAX_PIXELS
    # A row group of pictures is large: fewer are shuffled together than of texts.
    window: int = field(default=1000, kw_only=True)

    def __post_init__(self) -> None:
        expand_home(self, "path", "eval_path", "image_root", "shards", "index_folder")
        if self.kind not in KINDS:
            raise ConfigError(f"data.kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction must be at least 0 and below 1, not {self.eval_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction must lie between 0 and 1, not {self.max_bad_fraction}")
        if self.path is not None and self.kind == "scenes":
            raise ConfigError(
                f"data.path is {self.path}, but data.kind is scenes, which are drawn: set data.kind, to files say, or "
                "leave the path out"
            )
        if self.eval_path is not None and self.kind not in ("files", "imagefolder"):
            raise ConfigError(f"data.eval_path is for kinds files and imagefolder, not {self.kind}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"data.limit must be 1 or more, not {self.limit}")
        self.check_streaming(self.kind, ("files", "imagefolder"), ("eval_fraction",))
        if self.streaming and self.columns.group is not None:
            raise ConfigError("data.columns.group changes nothing with data.streaming=true: every row is a record")
