"""Checkpoint folders that are complete or absent.

A checkpoint is written into a temporary folder, its files are synced, a manifest with their sizes and SHA-256 is
written last, and one rename gives the folder its name. Whatever has no valid manifest is not a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mmattn._durable import sync_file, sync_folder, sync_tree
from mmattn.errors import CheckpointError, RunError

MANIFEST = "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced"  # the end of a checkpoint's name while another of the same step takes its place


class CheckpointStore:
    """The `checkpoints/` of one output folder: `step-00001000/` and so on."""

    def __init__(self, output_dir: Path | str) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / "checkpoints"

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def prepare(self) -> None:
        """Make the folder, and `clean` it.

        Raises:
            RunError: when the disk does not let it.
        """
        with self._failing_in_a_line(f"make {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()

    def clean(self) -> int:
        """Remove what an interrupted save left behind, and put back what it was about to replace.

        Returns:
            The number of folders removed.

        Raises:
            RunError: when the disk does not let it.
        """
        replaced = {path: path.with_suffix("") for path in self.folder.glob(f"step-*{_REPLACED}")}
        lost = {path: final for path, final in replaced.items() if not final.exists()}
        for path, final in lost.items():
            with self._failing_in_a_line(f"rename {path}"):
                os.rename(path, final)
        leftovers = [
            *(replaced.keys() - lost.keys()),
            *self.folder.glob(f"{_TEMPORARY}*"),
            *(path for path in self.output_dir.glob(f"{_TEMPORARY}*") if path.is_dir()),
        ]
        for leftover in leftovers:
            with self._failing_in_a_line(f"delete {leftover}"):
                _remove(leftover)
        return len(leftovers)

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Make a checkpoint from what `write(folder)` puts into a folder.

        Raises:
            RunError: when the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        temporary = self.begin(step)
        with self.failing_as_a_whole(step):
            write(temporary)
        return self.finish(step)

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into, which several processes may do; `finish` makes it one.

        Raises:
            RunError: as `save`.
        """
        temporary = self._temporary(step)
        with self.failing_as_a_whole(step):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        return temporary

    def finish(self, step: int) -> Path:
        """Sync what lies in the folder that `begin` gave, write its manifest and give it its name.

        Raises:
            RunError: as `save`.
        """
        final, temporary = self.path(step), self._temporary(step)
        with self.failing_as_a_whole(step):
            _complete(temporary, {"step": step})
            replaced = final.with_name(final.name + _REPLACED)
            if final.exists():
                # One that is not a checkpoint is kept for whoever wants to look.
                is_whole = _problem(final, hashes=True) is None
                os.rename(final, replaced if is_whole else _free_name(final.with_name(f"{final.name}.damaged")))
            os.rename(temporary, final)
            sync_folder(self.folder)
            _remove(replaced, ignore_errors=True)
        return final

    def abandon(self, step: int) -> None:
        """Remove what was written since `begin`."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{_TEMPORARY}step-{step:08d}"

    @contextmanager
    def failing_as_a_whole(self, step: int) -> Iterator[None]:
        """Inside, a file operation that fails takes what was written since `begin` with it.

        Raises:
            RunError: as `save`.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.abandon(step)
            raise RunError(self.failure(self.path(step), error)) from error

    def publish(self, source: Path, name: str) -> Path:
        """Copy a folder of a checkpoint to `<output_dir>/<name>`, in place of what is there.

        Raises:
            RunError: when the disk is full or cannot be written.
        """
        return self.publish_new(name, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))

    def publish_new(self, name: str, write: Callable[[Path], object]) -> Path:
        """Put what `write(folder)` puts into a folder at `<output_dir>/<name>`, in place of what is there.

        Raises:
            RunError: when the disk is full or cannot be written.
        """
        final, temporary, old = (
            self.output_dir / name,
            *(self.output_dir / f"{_TEMPORARY}{name}{suffix}" for suffix in ("", "-old")),
        )
        try:
            for leftover in (temporary, old):
                _remove(leftover, ignore_errors=True)
            temporary.mkdir()
            write(temporary)
            sync_tree(temporary)
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            sync_folder(self.output_dir)
            _remove(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(self.failure(final, error)) from error
        return final

    def steps(self) -> list[int]:
        """Steps of the checkpoints whose files all have the size that their manifest says, in order."""
        found = [
            int(match[1])
            for path in self.folder.glob("step-*")
            if (match := _STEP_NAME.fullmatch(path.name)) is not None
        ]
        return sorted(step for step in found if _problem(self.path(step), hashes=False) is None)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that passes `verify_checkpoint`, and what is wrong with newer folders."""
        problems: list[str] = []
        names = [path for path in self.folder.glob("step-*") if _STEP_NAME.fullmatch(path.name)]
        for path in sorted(names, key=lambda path: int(path.name[5:]), reverse=True):
            problem = _problem(path, hashes=True)
            if problem is None:
                return path, problems
            problems.append(f"{path}: {problem}")
        return None, problems

    def prune(self, keep_last: int, keep: Collection[int]) -> None:
        """Delete all but the newest `keep_last` checkpoints and those of the steps in `keep`.

        Raises:
            RunError: when one cannot be deleted; the others are untouched.
        """
        for step in self.steps()[:-keep_last]:
            if step not in keep:
                # Under its own name a half-deleted folder would look damaged instead of deleted.
                doomed = self.folder / f"{_TEMPORARY}delete-{step:08d}"
                with self._failing_in_a_line(f"delete {self.path(step)}"):
                    os.rename(self.path(step), doomed)
                    _remove(doomed)

    @contextmanager
    def _failing_in_a_line(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot {what}: {' '.join(str(error).split())}; {self._kept()}; look at the disk and its "
                "permissions, then go on with --resume"
            ) from error

    def failure(self, final: Path, error: Exception) -> str:
        """One line about a save that failed."""
        text = str(error)
        is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
        reason = "the disk is full" if is_full else " ".join(text.split())
        return f"cannot save {final}: {reason}; {self._kept()}; make room, then go on with --resume"

    def _kept(self) -> str:
        kept = self.steps()
        return f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no earlier checkpoint"


def _remove(folder: Path, *, ignore_errors: bool = False) -> None:
    """Of a link, which somebody put in place of a folder that was moved to another disk, the link only."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=ignore_errors)


def model_folder(checkpoint: Path) -> Path | None:
    """The model's own folder in a checkpoint; a sharded one has none."""
    folder = checkpoint / "model"
    return folder if folder.is_dir() else None


def latest_checkpoint(output_dir: Path | str) -> Path | None:
    """The newest complete checkpoint of a run's output folder, or None."""
    return CheckpointStore(output_dir).latest()[0]


def verify_checkpoint(folder: Path | str) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, cut or changed, or that there is no manifest.
    """
    problem = _problem(Path(folder), hashes=True)
    if problem is not None:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {problem}")


def _problem(folder: Path, *, hashes: bool) -> str | None:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        entries = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size, sha256 in entries:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if hashes and _sha256(path) != sha256:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def _complete(folder: Path, facts: dict) -> None:
    sync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n")
    sync_file(folder / MANIFEST)
    sync_folder(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_name(path: Path) -> Path:
    candidates = (path.with_name(f"{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(1, 1000))))
    return next(candidate for candidate in candidates if not candidate.exists())
