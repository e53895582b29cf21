"""Finding a U-Net in a folder or on the hub, and opening it strictly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from mmattn.errors import CheckpointError
from mmattn.models.checkpoints import fault
from mmattn.models.saving import weights_dtype
from mmattn.models.sources import read_json

_log = logging.getLogger(__name__)

STOCK_CLASS = "UNet2DConditionModel"
_STEM = "diffusion_pytorch_model"


def open_unet(
    load_config: Callable[..., Any],
    load: Callable[..., Any],
    id_or_folder: str | Path,
    subfolder: str | None,
    *,
    variant: str | None,
    dtype: torch.dtype | str | None,
    place: dict[str, Any],
) -> Any:
    """Open a U-Net with diffusers' loader, and refuse what the loader only warns of.

    Args:
        load_config: diffusers' reader of configs.
        load: diffusers' `from_pretrained`, of the class to open.
        id_or_folder: a folder or a hub id.
        subfolder: of the U-Net in it, or None.
        variant: infix of the weight files.
        dtype: as `models.saving.weights_dtype`.
        place: revision, token and local_files_only.

    Raises:
        CheckpointError: nothing there, a model of another kind, or weights that do not fit the config.
    """
    wanted = weights_dtype(dtype)
    folder = Path(id_or_folder).expanduser()
    source = str(folder) if folder.is_dir() else str(id_or_folder)
    if not folder.is_dir():
        _check_hub_id(source)
    subfolder = _find_config(load_config, source, subfolder, place)
    where = f"{source}/{subfolder}" if subfolder else source
    weights = _find_weights(source, subfolder, variant, place)
    if ".bin" in weights.name:
        _log.warning("%s is a pickle, not safetensors: reading it with torch.load(weights_only=True)", weights)
    if wanted is None:
        wanted = _stored_dtype(weights)
    options = {"use_safetensors": ".safetensors" in weights.name, "low_cpu_mem_usage": True, "torch_dtype": wanted}
    try:
        # Mis-shaped tensors are let through here only to be listed with the others below.
        unet, found = load(
            source,
            subfolder=subfolder,
            variant=variant,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
            **place,
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{weights}: not readable: damaged or incomplete, or a pickle with more than tensors ({_first_line(error)})"
        ) from error
    _check_fit(where, found)
    return unet


def _check_fit(where: str, found: dict[str, list[Any]]) -> None:
    mis_shaped = [f"{name} is {list(shape)}, not {list(wanted)}" for name, shape, wanted in found["mismatched_keys"]]
    faults = [
        fault("missing", sorted(found["missing_keys"])),
        fault("not known", sorted(found["unexpected_keys"])),
        fault("of another shape", sorted(mis_shaped)),
        fault("not loaded", found["error_msgs"]),
    ]
    if any(faults):
        raise CheckpointError(f"{where}: the weights do not fit its config: {'; '.join(filter(None, faults))}")


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(f"no such folder: {name}") from error


def _find_config(
    load_config: Callable[..., Any], source: str, subfolder: str | None, place: dict[str, Any]
) -> str | None:
    """The subfolder whose config is a U-Net's: the one given, else the top, or `unet` below a pipeline's."""
    folder = Path(source)
    if folder.is_dir():
        if subfolder is None and not (folder / "config.json").is_file() and (folder / "unet/config.json").is_file():
            subfolder = "unet"
        path = folder / (subfolder or "") / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{path.parent}: no config.json, so this is not a U-Net's folder{_inside(folder)}")
        _check_family(str(path.parent), read_json(path))
        return subfolder
    reasons = []
    for tried in [subfolder] if subfolder else [None, "unet"]:
        try:
            config = load_config(source, subfolder=tried, **place)
        except (OSError, ValueError) as error:
            reasons.append(_first_line(error))
            continue
        _check_family(f"{source}/{tried}" if tried else source, config)
        return tried
    raise CheckpointError(
        f"{source}: neither a folder nor a U-Net on the hub (or in its cache): check the spelling, subfolder, revision"
        f" and, for a private or gated model, the token ({reasons[0]})"
    )


def _inside(folder: Path) -> str:
    configs = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f" (subfolders with one: {', '.join(configs)})" if configs else ""


def _check_family(where: str, config: dict[str, Any]) -> None:
    found = config.get("_class_name") or config.get("model_type") or "no known model"
    if found != STOCK_CLASS:
        raise CheckpointError(f"{where}: this is {found}, not {STOCK_CLASS}: is another `subfolder` meant?")


def _find_weights(source: str, subfolder: str | None, variant: str | None, place: dict[str, Any]) -> Path:
    """The weight file that diffusers will read, or its index."""
    infix = f".{variant}" if variant else ""
    names = [name for kind in ("safetensors", "bin") for name in _weight_names(kind, infix)]
    for name in names:
        path = _file(source, f"{subfolder}/{name}" if subfolder else name, place)
        if path is not None:
            return path
    raise CheckpointError(f"{source}/{subfolder or ''}: no weights, looked for {', '.join(names)}")


def _weight_names(kind: str, infix: str) -> list[str]:
    return [f"{_STEM}.{kind}.index{infix}.json", f"{_STEM}{infix}.{kind}"]


def _file(source: str, name: str, place: dict[str, Any]) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, **place))
    except EntryNotFoundError:  # also: not in the cache, and the hub not asked or not reached
        return None


def _stored_dtype(weights: Path) -> torch.dtype:
    """The dtype of the first floating-point tensor, which is the one that diffusers calls the network's."""
    if weights.suffix == ".json":
        shards = sorted(set(read_json(weights).get("weight_map", {}).values()))
        weights = weights.parent / (shards[0] if shards else "no shard")
    try:
        if weights.suffix == ".safetensors":
            with safe_open(weights, framework="pt") as handle:
                tensors = (handle.get_tensor(name) for name in handle.offset_keys())
                return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
        table = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        return next(tensor.dtype for tensor in table.values() if tensor.is_floating_point())
    except (OSError, RuntimeError, SafetensorError, StopIteration, ValueError) as error:
        raise CheckpointError(f"{weights}: no dtype to be read in it ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
