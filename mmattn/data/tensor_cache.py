"""Tensors by key in a folder: computed once, complete or absent, read piece by piece by any number of workers.

`FOLDER/<hash>/` holds `NAME.bin` for each tensor of an entry, entries one after another, `index.jsonl` with a line an
entry, and `manifest.json`, written last. The hash is that of what made the entries and of their keys, so that nothing
stale can be opened. While it is built the folder has another name; the lines of its index are written after the tensors
they speak of have reached the disk, so a build that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmattn._durable import sync_folder
from mmattn.data.whole_files import build_lock
from mmattn.errors import DataError, RunError, UsageError

INDEX, MANIFEST = "index.jsonl", "manifest.json"
FORMAT = 1
_SYNC_SECONDS = 5.0
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
}

Entry = Mapping[str, Tensor]
Encode = Callable[[list[str]], Sequence[Entry]]


@dataclass(frozen=True)
class _Form:
    """Data type and rank of one tensor of every entry."""

    dtype: str
    rank: int

    @property
    def itemsize(self) -> int:
        return _DTYPES[self.dtype].itemsize


class TensorCache:
    """A folder of tensors by key; `cache[key]` is a dict of new CPU tensors. Pickled and forked as its path.

    Args:
        path: A complete cache's own folder.

    Raises:
        DataError: it is not complete, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._load()

    @classmethod
    def open_or_build(
        cls,
        folder: str | Path,
        fingerprint: Mapping[str, Any],
        keys: Sequence[str],
        encode: Encode,
        *,
        batch_size: int = 32,
        label: str = "caching",
    ) -> TensorCache:
        """The cache of these keys in `folder`, built if it is not there.

        Of several processes that ask at once one builds, and the others wait. A build that was cut short goes on.

        Args:
            folder: Holds caches of any number of fingerprints.
            fingerprint: All that decides what `encode` gives, as JSON values: weights, sizes, data.
            keys: All keys, each once.
            encode: A list of keys to an entry each: tensors by name. Names, data types and ranks are the same in all
                entries; shapes may differ.
            batch_size: Keys given to `encode` at once.
            label: Stands before the progress bar.

        Raises:
            RunError: the disk is full or cannot be written.
            UsageError: no keys, keys that repeat, or entries unlike one another.
        """
        path = Path(folder) / cache_name(fingerprint, keys)
        if (path / MANIFEST).exists():
            return cls(path)
        if not keys or len(set(keys)) < len(keys):
            raise UsageError("a tensor cache needs at least one key, and each key once")
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with _writing(path):
                stack.enter_context(build_lock(path))
            if not (path / MANIFEST).exists():
                _build(path, fingerprint, keys, encode, batch_size, label)
        return cls(path)

    @property
    def keys(self) -> list[str]:
        """All keys, in the order in which they were built."""
        return list(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __getitem__(self, key: str, /) -> dict[str, Tensor]:
        """The tensors of one key.

        Raises:
            UsageError: it was not among the keys.
        """
        row = self._rows.get(key)
        if row is None:
            raise UsageError(f"the cache {self.path} holds nothing for {key!r}: it was built for other data")
        return {name: self._read(name, row) for name in self._forms}

    def nbytes(self) -> int:
        """Size of all tensors."""
        return int(sum(offsets[-1] for offsets in self._offsets.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._load()

    def _load(self) -> None:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise DataError(f"the cache {self.path} has format {manifest['format']}, not {FORMAT}: delete it")
            self._forms = {name: _Form(**form) for name, form in manifest["tensors"].items()}
            lines = _index_lines(self.path)
            sizes = {name: (self.path / f"{name}.bin").stat().st_size for name in self._forms}
        except FileNotFoundError as error:
            raise DataError(f"{self.path} is not a complete tensor cache: {error.filename} is missing") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the cache {self.path} is damaged ({error}): delete it, and it is built again") from error
        self._rows = {key: row for row, (key, _) in enumerate(lines)}
        self._shapes = {name: [shapes[name] for _, shapes in lines] for name in self._forms}
        self._offsets = {name: _offsets(self._shapes[name], form) for name, form in self._forms.items()}
        wrong = [name for name, size in sizes.items() if size != self._offsets[name][-1]]
        if wrong or len(lines) != manifest["entries"]:
            what = f"{wrong[0]}.bin has not the size that its index says" if wrong else "its index has lost lines"
            raise DataError(f"the cache {self.path} is damaged ({what}): delete it, and it is built again")
        self._maps: dict[str, np.ndarray] = {}

    def _read(self, name: str, row: int) -> Tensor:
        start, end = self._offsets[name][row : row + 2].tolist()
        tensor = torch.empty(self._shapes[name][row], dtype=_DTYPES[self._forms[name].dtype])
        if end > start:  # neither an empty file can be mapped nor an empty tensor viewed as bytes
            if name not in self._maps:
                self._maps[name] = np.memmap(self.path / f"{name}.bin", mode="r")
            tensor.view(-1).view(torch.uint8).numpy()[:] = self._maps[name][start:end]
        return tensor


def cache_name(fingerprint: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The name of a cache: a hash of what made it and of its keys in their order."""
    text = json.dumps({"format": FORMAT, "fingerprint": fingerprint, "keys": list(keys)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _offsets(shapes: Sequence[list[int]], form: _Form) -> np.ndarray:
    """Where entries start and end in bytes, int64 [N + 1]."""
    sizes = [math.prod(shape) * form.itemsize for shape in shapes]
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def _index_lines(folder: Path) -> list[tuple[str, dict[str, list[int]]]]:
    with open(folder / INDEX, encoding="utf-8") as file:
        return [tuple(json.loads(line)) for line in file]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What fails while the cache is written becomes a `RunError`; what `encode` raises does not."""
    try:
        yield
    except OSError as error:
        is_full = error.errno == errno.ENOSPC
        reason, advice = ("the disk is full", "make room") if is_full else (error.strerror or str(error), "mend that")
        raise RunError(
            f"cannot write the cache {path}: {reason}; what was finished is kept in {_partial(path).name} there; "
            f"{advice} and start again: it goes on from there"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(f".building-{path.name}")


def _build(
    path: Path, fingerprint: Mapping[str, Any], keys: Sequence[str], encode: Encode, batch_size: int, label: str
) -> None:
    with _writing(path):
        writer = _Writer(_partial(path))
        done = writer.restore(keys)
    # tqdm leaves a bar out by itself, with None, where there is no terminal.
    with writer, tqdm(total=len(keys), initial=done, desc=label, unit="entry", disable=None) as bar:
        for start in range(done, len(keys), batch_size):
            batch = list(keys[start : start + batch_size])
            entries = encode(batch)
            if len(entries) != len(batch):
                raise UsageError(f"encode gave {len(entries)} entries for {len(batch)} keys")
            with _writing(path):
                for key, entry in zip(batch, entries, strict=True):
                    writer.add(key, entry)
            bar.update(len(batch))
        with _writing(path):
            writer.finish(fingerprint, len(keys))
            shutil.rmtree(path, ignore_errors=True)  # without a manifest, or it would have been opened
            os.rename(_partial(path), path)
            sync_folder(path.parent)


class _Writer:
    """Appends entries to the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.forms: dict[str, _Form] = {}
        self.files: dict[str, BinaryIO] = {}
        self.waiting: list[str] = []  # index lines whose tensors may not have reached the disk
        self.synced_at = time.monotonic()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        # On a full disk a file cannot even be closed without another error, which would hide the first.
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            if kind is not None and not issubclass(kind, RunError):  # what was encoded need not be made again
                self._sync()
            for file in self.files.values():
                file.close()

    def restore(self, keys: Sequence[str]) -> int:
        """Go on where an earlier build stopped: how many of `keys` are finished."""
        try:
            self.forms = {name: _Form(**form) for name, form in json.loads(self._forms_file.read_text()).items()}
            lines = self._whole_lines(keys)
            sizes = self._finished_sizes(lines)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._start_over()
            return 0
        for name, size in sizes.items():
            self._open(name)
            self.files[name].truncate(size)
            self.files[name].seek(size)
        return len(lines)

    def add(self, key: str, entry: Entry) -> None:
        """Append one entry."""
        forms = {name: _Form(str(tensor.dtype).removeprefix("torch."), tensor.dim()) for name, tensor in entry.items()}
        if not self.forms:
            self._begin(forms)
        if forms != self.forms:
            raise UsageError(f"the entry of {key!r} holds {_listed(forms)}, others hold {_listed(self.forms)}")
        for name, tensor in entry.items():
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            self.files[name].write(data.numpy().data)
        shapes = {name: list(tensor.shape) for name, tensor in entry.items()}
        self.waiting.append(json.dumps([key, shapes]) + "\n")
        if time.monotonic() - self.synced_at > _SYNC_SECONDS:
            self._sync()

    def finish(self, fingerprint: Mapping[str, Any], entries: int) -> None:
        """Write the manifest."""
        self._sync()
        self._forms_file.unlink()
        tensors = {name: vars(form) for name, form in self.forms.items()}
        content = {"format": FORMAT, "entries": entries, "tensors": tensors, "fingerprint": fingerprint}
        _write_synced(self.folder / MANIFEST, json.dumps(content, indent=1) + "\n", "w")
        sync_folder(self.folder)

    @property
    def _forms_file(self) -> Path:
        return self.folder / "tensors.json"

    def _begin(self, forms: dict[str, _Form]) -> None:
        unknown = [form.dtype for form in forms.values() if form.dtype not in _DTYPES]
        if unknown or not forms:
            raise UsageError(f"a tensor cache holds {', '.join(_DTYPES)}, not {', '.join(unknown) or 'empty entries'}")
        self.forms = forms
        content = json.dumps({name: vars(form) for name, form in forms.items()})
        _write_synced(self._forms_file, content, "w")
        for name in forms:
            self._open(name)

    def _open(self, name: str) -> None:
        path = self.folder / f"{name}.bin"
        path.touch()
        self.files[name] = open(path, "r+b")  # noqa: SIM115 (closed on exit)

    def _start_over(self) -> None:
        for leftover in self.folder.iterdir():
            leftover.unlink()
        self.forms = {}

    def _whole_lines(self, keys: Sequence[str]) -> list[tuple[str, dict[str, list[int]]]]:
        """The index without a line that was cut short."""
        text = (self.folder / INDEX).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = [tuple(json.loads(line)) for line in whole.splitlines()]
        if [key for key, _ in lines] != list(keys[: len(lines)]):
            raise ValueError("the index is not that of these keys")
        (self.folder / INDEX).write_text(whole, encoding="utf-8")
        return lines

    def _finished_sizes(self, lines: Sequence[tuple[str, dict[str, list[int]]]]) -> dict[str, int]:
        """Bytes of each tensor's file that the index speaks of. A file that has fewer was deleted to make room, say:
        made longer it would hold zeros."""
        sizes = {}
        for name, form in self.forms.items():
            sizes[name] = int(_offsets([shapes[name] for _, shapes in lines], form)[-1])
            if (self.folder / f"{name}.bin").stat().st_size < sizes[name]:
                raise ValueError(f"{name}.bin has lost entries")
        return sizes

    def _sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        _write_synced(self.folder / INDEX, "".join(self.waiting), "a")
        self.waiting, self.synced_at = [], time.monotonic()


def _listed(forms: Mapping[str, _Form]) -> str:
    return ", ".join(f"{name} ({form.dtype}, {form.rank} dimensions)" for name, form in forms.items()) or "nothing"


def _write_synced(path: Path, text: str, mode: str) -> None:
    with open(path, mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
