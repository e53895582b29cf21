"""One door to every data set of pictures with texts that a config can name."""

from __future__ import annotations

from pathlib import Path

from mmattn.data.records import ImageTextSource
from mmattn.data.scenes import SceneDataset
from mmattn.data.skipping import SkippingSource
from mmattn.data.spec import SPLITS, DataConfig
from mmattn.data.stamps import StampsSource
from mmattn.data.stream_pictures import StreamedPictures
from mmattn.data.stream_rows import StreamedRows
from mmattn.data.tables import TableSource, hub_split, load_hub, read_table
from mmattn.errors import DataError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def open_image_text(spec: DataConfig, split: str = "train") -> ImageTextSource:
    """Opens a data set; columns and files are checked now, pictures when they are asked for.

    Args:
        spec: The `data:` section of a config.
        split: "train", "validation", "test"; scenes also have "heldout". Data with only one other split, or none,
            gives that, or a part put aside, for both "validation" and "test".

    Raises:
        DataError: missing, empty, unreadable or with other columns; the message says what to set.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if split == "heldout" and spec.kind != "scenes":
        raise DataError(f"data.kind={spec.kind} has no split 'heldout': use train, validation or test")
    if spec.kind == "scenes":
        size = min(spec.size if split == "train" else spec.eval_size, spec.limit or spec.size)
        return SceneDataset(split, size, spec.seed, spec.image_size, spec.max_objects)
    if spec.kind == "stamps":
        stamps = StampsSource(spec.path, split, spec.seed)
        stamps.stamps = stamps.stamps[: spec.limit]
        return _skipping(stamps, spec)
    if spec.streaming and (split == "train" or _is_tar(spec)):
        return _skipping(_open_stream(spec, split), spec)
    if spec.streaming and spec.eval_path is None:
        raise DataError(f"streamed data has no records for split {split!r}: set data.eval_path")
    if spec.path is None and not spec.streaming:
        raise DataError(f"data.kind={spec.kind} needs data.path")
    opener = {"files": _open_files, "imagefolder": _open_folder, "hub": _open_hub}[spec.kind]
    source = opener(spec, spec.path or "", split)
    if spec.limit is not None:
        source = source.keep(range(min(spec.limit, len(source))))
    return _skipping(source, spec)


def _is_tar(spec: DataConfig) -> bool:
    return spec.eval_path is not None and Path(spec.eval_path).suffix.lower() == ".tar"


def _open_stream(spec: DataConfig, split: str) -> StreamedPictures:
    paths = spec.shard_paths if split == "train" else [str(spec.eval_path)]
    if spec.kind == "imagefolder":
        paths = [_metadata_file(Path(path)) for path in paths]
    rows = StreamedRows(spec, limit=spec.limit, paths=paths)
    return StreamedPictures(rows, spec, default_image="file_name" if spec.kind == "imagefolder" else "image")


def _skipping(source: ImageTextSource, spec: DataConfig) -> SkippingSource:
    return SkippingSource(source, seed=spec.seed, max_bad_fraction=spec.max_bad_fraction, max_bad=spec.max_bad)


def _open_files(spec: DataConfig, path: str, split: str, default_image: str = "image") -> TableSource:
    has_own = split != "train" and spec.eval_path is not None
    file = spec.eval_path if has_own and spec.eval_path is not None else path
    source = _table_file(spec, file, default_image)
    return source if has_own else _part(source, spec, split)


def _part(source: TableSource, spec: DataConfig, split: str) -> TableSource:
    """Training or evaluation records of a table that is the only one there is."""
    if spec.eval_path is not None or (spec.eval_fraction == 0 and split == "train"):
        return source
    if spec.eval_fraction == 0:
        raise DataError(f"{source.name} has no records for split {split!r}: set data.eval_path or data.eval_fraction")
    return source.split_off(spec.eval_fraction, spec.seed, wants_rest=split == "train")


def _table_file(spec: DataConfig, path: str, default_image: str) -> TableSource:
    table, folder = read_table(path)
    root = Path(spec.image_root) if spec.image_root is not None else folder
    return TableSource(
        table,
        spec.columns,
        name=path,
        image_root=root,
        max_pixels=spec.max_pixels,
        default_image=default_image,
    )


def _open_folder(spec: DataConfig, path: str, split: str) -> TableSource:
    if split != "train" and spec.eval_path is not None:
        return _table_file(spec, _metadata_file(Path(spec.eval_path)), "file_name")
    found = {
        name: Path(path) / folder
        for name, folders in _SPLIT_FOLDERS.items()
        for folder in folders
        if any((Path(path) / folder / metadata).is_file() for metadata in _METADATA)
    }
    others = [found[name] for name in (split, "validation", "test") if name in found and name != "train"]
    if split != "train" and others:
        return _table_file(spec, _metadata_file(others[0]), "file_name")
    source = _table_file(spec, _metadata_file(found.get("train", Path(path))), "file_name")
    return source if others else _part(source, spec, split)


def _metadata_file(folder: Path) -> str:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set data.path to a folder of pictures with metadata")
    for name in _METADATA:
        if (folder / name).is_file():
            return str(folder / name)
    raise DataError(f"{folder} holds none of {', '.join(_METADATA)}: a table with the columns file_name and text")


def _open_hub(spec: DataConfig, path: str, split: str) -> TableSource:
    tables = load_hub(path, spec.hub_config, spec.revision)
    name, has_own = hub_split(tables, path, split, spec.train_split, spec.eval_split)
    source = TableSource(tables[name], spec.columns, name=f"{path}/{name}", max_pixels=spec.max_pixels)
    return source if has_own else _part(source, spec, split)
