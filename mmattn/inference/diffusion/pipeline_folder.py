"""Opens text-to-image folders: Stable Diffusion of any version, and pipelines of our own, with U-Nets of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

from mmattn.errors import CheckpointError, MmattnError, UsageError
from mmattn.inference import folders
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.models.saving import weights_dtype
from mmattn.models.sources import read_json
from mmattn.models.unet import UNet

INDEX_FILE = "model_index.json"
UNET_CLASS = "UNet2DConditionModel"
PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    "PixelPipeline": PixelPipeline,
}
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_CANNOT = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


def open_pipeline(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    local_files_only: bool = False,
) -> Any:
    """The pipeline of a folder or hub repository, its U-Net a `mmattn.UNet`, in evaluation mode.

    Arguments as in `TextToImage.from_pretrained`.

    Raises:
        CheckpointError: nothing there, a model of another family, or weights that are missing.
        UsageError: a dtype that is none.
    """
    device = folders.usable_device(device)
    dtype = weights_dtype(folders.default_dtype(device) if dtype is None else dtype)
    if dtype is None:
        raise UsageError("dtype 'auto' is not offered here, since a pipeline's parts must agree: name one")
    options = {"revision": revision, "token": token, "local_files_only": local_files_only}
    index_file = _find_index(id_or_folder, options)
    index = read_json(index_file)
    cls = _pipeline_class(index, id_or_folder)
    folder = index_file.parent
    if not Path(id_or_folder).expanduser().is_dir():
        with _saying(f"{id_or_folder}"):
            folder = Path(cls.download(str(id_or_folder), variant=variant, **options))
    with _without_bars():
        parts = _open_models(folder, index, variant, dtype)
        unet = UNet.from_pretrained(folder, subfolder="unet", variant=variant, dtype=dtype)
        _check_channels(id_or_folder, unet, parts.get("vae"))
        with _saying(str(folder)):
            pipeline = cls.from_pretrained(str(folder), unet=unet, **parts, variant=variant, dtype=dtype)
    return pipeline.to(device)


def _find_index(id_or_folder: str | Path, options: dict[str, Any]) -> Path:
    folder, name = Path(id_or_folder).expanduser(), str(id_or_folder)
    if folder.is_dir():
        if not (folder / INDEX_FILE).is_file():
            raise CheckpointError(f"{name}: {_what_it_is(folder)}")
        return folder / INDEX_FILE
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"no such folder: {name}")
    try:
        return Path(hf_hub_download(name, INDEX_FILE, **options))
    except (HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: neither a folder nor a diffusers pipeline ({INDEX_FILE}) on the hub, or the hub cannot be reached"
            f" ({type(error).__name__}): check the spelling, the revision and, for a gated model, the token"
        ) from error


def _what_it_is(folder: Path) -> str:
    """What a folder without an index holds, and what opens it."""
    wanted = f"a text-to-image folder has {INDEX_FILE} and the parts beside it"
    if not (folder / "config.json").is_file():
        return f"no {INDEX_FILE}, so this is no diffusers pipeline; {wanted}"
    config = read_json(folder / "config.json")
    if config.get("_class_name") == UNET_CLASS:
        return f"a U-Net by itself, which mmattn.UNet.from_pretrained opens; {wanted}"
    if "_class_name" in config:
        return f"a single model of diffusers, {config['_class_name']}; {wanted}"
    kind = (config.get("architectures") or [config.get("model_type", "an unknown model")])[0]
    return f"a model of transformers, {kind}, which draws no pictures; {wanted}"


def _pipeline_class(index: dict[str, Any], name: str | Path) -> Any:
    kind = str(index.get("_class_name"))
    if kind in PIPELINES:
        return PIPELINES[kind]
    unet = index.get("unet")
    if isinstance(unet, list) and unet[-1] == UNET_CLASS:
        raise CheckpointError(
            f"{name}: a {kind}, not text to image by Stable Diffusion; open it by diffusers, with unet=mmattn.UNet"
            ".from_pretrained(...) in its parts"
        )
    raise CheckpointError(
        f"{name}: a {kind}, whose model is no {UNET_CLASS}; TextToImage opens Stable Diffusion 1.x, 2.x and XL: open it"
        " by diffusers and, for our attention in it, call mmattn.swap_attention(pipe)"
    )


def _open_models(folder: Path, index: dict[str, Any], variant: str | None, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Every model of the folder but the U-Net."""
    models = {}
    for name, entry in index.items():
        if name == "unet" or not isinstance(entry, list) or len(entry) != 2:
            continue
        cls = getattr(_LIBRARIES.get(str(entry[0])), str(entry[1]), None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            models[name] = _open_strictly(cls, folder / name, variant, dtype)
    return models


def _open_strictly(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """A model with all of its weights: the libraries would fill in what is missing at random, with a warning."""
    if variant is not None and not any(folder.glob(f"*.{variant}*")):
        variant = None  # as diffusers has it: a variant is of those parts that have it
    with _saying(str(folder)):
        model, facts = cls.from_pretrained(str(folder), variant=variant, dtype=dtype, output_loading_info=True)
    missing = sorted(facts.get("missing_keys") or [])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder}: weights are missing: {', '.join(missing[:3])}{more}; save or download it again"
        )
    return model.eval()


def _check_channels(name: str | Path, unet: Any, vae: Any) -> None:
    """Refuse a U-Net that needs more than noise: that of an inpainting or editing model, under an ordinary name."""
    if vae is not None and unet.config.in_channels != vae.config.latent_channels:
        raise CheckpointError(
            f"{name}: its U-Net takes {unet.config.in_channels} channels and its autoencoder has "
            f"{vae.config.latent_channels}: an inpainting or editing model, which needs a picture too; "
            "use it in diffusers' pipeline with unet=mmattn.UNet"
        )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without the libraries' bar for each part, as for the other models; that of a download stays."""
    loggers = [each.utils.logging for each in _LIBRARIES.values()]
    shown = [each for each in loggers if each.is_progress_bar_enabled()]
    try:
        for each in shown:
            each.disable_progress_bar()
        yield
    finally:
        for each in shown:
            each.enable_progress_bar()


@contextlib.contextmanager
def _saying(place: str) -> Iterator[None]:
    """Turn what goes wrong while something is opened into one line."""
    try:
        yield
    except MmattnError:
        raise
    except _CANNOT as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(f"{place}: cannot be opened: {reason}") from error
