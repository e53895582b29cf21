"""Opening a vision-language network from a folder or a hub id, and saving it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from mmattn.errors import CheckpointError, ConfigError
from mmattn.models.checkpoints import WeightTable, identity_table, load_weights, stock_weights, write_folder
from mmattn.models.saving import check_sizes, weights_dtype
from mmattn.models.sources import TensorFiles, find_folder, read_config
from mmattn.models.vlm import blip
from mmattn.models.vlm.config import VLMConfig
from mmattn.models.vlm.model import VisionLanguageNetwork, build_network

MODEL_TYPE = "mmattn_vlm"
_OWN_FIELDS = tuple(entry.name for entry in dataclasses.fields(VLMConfig) if entry.name != "stock")


def open_network(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    local_files_only: bool = False,
) -> VisionLanguageNetwork:
    """Open a network, in evaluation mode: BLIP in transformers' format, or what `save_network` wrote.

    Args:
        id_or_folder: a folder or a hub id.
        revision: branch, tag or commit on the hub.
        token: hub token; None: the stored one.
        variant: infix of the weight files, such as `fp16`.
        dtype: of the floating-point weights; None: float32 whatever the file holds; `"auto"`: as in the file.
        device: where to put it; None: the CPU.
        local_files_only: never go to the network.

    Raises:
        CheckpointError: nothing there, a model of another kind, or weights that do not fit the config.
    """
    folder = find_folder(
        id_or_folder, revision=revision, token=token, variant=variant, local_files_only=local_files_only
    )
    config, is_stock = _read_config(folder)
    with TensorFiles(folder, variant) as files:
        if is_stock:
            blip.untie_if_different(config, files)
        # On the meta device no weights are drawn that the checkpoint would overwrite.
        with torch.device("meta"):
            network = build_network(config)
        load_weights(network, _table(config, network, is_stock), files, dtype=weights_dtype(dtype))
    return network.to(device or "cpu").eval()


def save_network(network: VisionLanguageNetwork, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`: in BLIP's format, under the stock class name, where it can be said.

    Raises:
        CheckpointError: a network that is no longer what its config says, or a disk that refuses.
    """
    config, is_stock = network.config, blip.is_blip(network.config)
    with torch.device("meta"):
        expected = build_network(config)
    check_sizes(network, expected)
    tensors = stock_weights(network, _table(config, expected, is_stock))
    dtype = next(network.parameters()).dtype
    if is_stock:
        values = blip.config_to_stock(config, dtype)
    else:
        own = config.to_dict()
        values = {name: own[name] for name in _OWN_FIELDS}
        values |= {"model_type": MODEL_TYPE, "architectures": [type(network).__name__]}
        values |= {"dtype": str(dtype).removeprefix("torch.")}
    write_folder(Path(folder), values, tensors)


def _read_config(folder: Path) -> tuple[VLMConfig, bool]:
    values = read_config(folder)
    kind = values.get("model_type")
    try:
        if kind == "blip":
            return blip.config_from_stock(values), True
        if kind == MODEL_TYPE:
            about_the_file = ("model_type", "architectures", "dtype")
            own = {name: value for name, value in values.items() if name not in about_the_file}
            return VLMConfig.from_dict(own), False
    except (ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    raise CheckpointError(
        f"{folder}: model_type {kind} is not a vision-language model that can be opened here: blip and {MODEL_TYPE} can"
    )


def _table(config: VLMConfig, network: nn.Module, is_stock: bool) -> WeightTable:
    return blip.weight_table(config) if is_stock else identity_table(network)
