"""Where a model comes from: a folder or a hub id, its config, and the tensors of its weight files."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmattn.errors import CheckpointError

_log = logging.getLogger(__name__)

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja")


def find_folder(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: the folder itself, or the hub's cache after a download.

    Of a hub repository the small files (configs, tokenizer) are fetched, and one form of the weights.

    Args:
        id_or_folder: a folder, or a hub id such as `Salesforce/blip-image-captioning-base`.
        revision: branch, tag or commit on the hub.
        token: hub token; None: the one stored by `hf auth login`.
        variant: infix of the weight files, such as `fp16`.
        local_files_only: never go to the network.

    Raises:
        CheckpointError: no such folder, id, revision or weight file, or the hub cannot be reached.
    """
    folder = Path(id_or_folder).expanduser()
    if folder.is_dir():
        return folder
    name = str(id_or_folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"no such folder: {name}")
    place = f"{name} at revision {revision}" if revision else name
    options = {"token": token, "local_files_only": local_files_only}
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=list(_SMALL_FILES), **options))
        # The snapshot's name is its commit: a branch that moves meanwhile cannot mix two states.
        _download_weights(name, found.name, variant, options)
    except (HFValidationError, OSError) as error:
        where = "in the local hub cache" if local_files_only else "on the hub (or the hub cannot be reached)"
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(
            f"{place}: neither a folder nor found {where}: check the spelling, the revision and, for a private or"
            f" gated model, the token ({reason})"
        ) from error
    return found


def _download_weights(repo_id: str, commit: str, variant: str | None, options: dict[str, Any]) -> None:
    unreachable: LocalEntryNotFoundError | None = None
    for name in _weight_names(variant):
        try:
            path = Path(hf_hub_download(repo_id, name, revision=commit, **options))
        except LocalEntryNotFoundError as error:  # not in the cache, and the hub not asked or not reached
            unreachable = error
            continue
        except EntryNotFoundError:
            continue
        if path.suffix == ".json":
            for shard in sorted(set(read_json(path)["weight_map"].values())):
                hf_hub_download(repo_id, shard, revision=commit, **options)
        return
    if unreachable is not None:
        raise unreachable


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        CheckpointError: the file is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json, so this is not a model folder")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def _weight_names(variant: str | None) -> list[str]:
    infix = f".{variant}" if variant else ""
    return [
        f"model{infix}.safetensors",
        f"model.safetensors.index{infix}.json",
        f"pytorch_model{infix}.bin",
        f"pytorch_model.bin.index{infix}.json",
    ]


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    for name in _weight_names(variant):
        path = folder / name
        if not path.exists():
            continue
        if path.suffix != ".json":
            return [path]
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: no weight_map in it")
        shards = [folder / shard for shard in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise CheckpointError(f"{folder}: the index {name} names files that are missing: {', '.join(missing)}")
        return shards
    raise CheckpointError(f"{folder}: no weights, looked for {', '.join(_weight_names(variant))}")


class TensorFiles:
    """The tensors in a folder's weight files: shapes at once, values on demand. A context manager.

    Safetensors are read tensor by tensor. A `.bin` is a pickle: it is announced, and read by
    `torch.load(weights_only=True)`, which runs no code from it.

    Args:
        folder: the model folder.
        variant: infix of the weight files, such as `fp16`.

    Raises:
        CheckpointError: no weight file, a damaged one, or a pickle that holds code.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        self.folder = folder
        self._open_files = ExitStack()
        self._handles: dict[str, Any] = {}  # tensor name to its open safetensors file
        self._loaded: dict[str, Tensor] = {}
        try:
            for path in _weight_files(folder, variant):
                self._open(path)
        except BaseException:
            self._open_files.close()
            raise

    def _open(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            self._loaded.update(_load_pickle(path))
            return
        try:
            handle = self._open_files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged, not readable as safetensors ({error})") from error
        self._handles.update(dict.fromkeys(handle.keys(), handle))

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name."""
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}
        return shapes | {name: tuple(tensor.shape) for name, tensor in self._loaded.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype."""
        handle = self._handles.get(name)
        return self._loaded[name] if handle is None else handle.get_tensor(name)


def _load_pickle(path: Path) -> Mapping[str, Tensor]:
    _log.warning("%s is a pickle, not safetensors: reading it with torch.load(weights_only=True)", path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: this pickle holds more than tensors (it could run code), so it is refused:"
            " ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged, not readable as a torch file ({reason})") from error
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise CheckpointError(f"{path}: not a table of tensors by name, so not a model's weights")
    return value
