"""Opening a translation network from a folder or a hub id, and saving it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmattn.errors import CheckpointError, ConfigError
from mmattn.models.checkpoints import WeightTable, identity_table, load_weights, stock_weights, write_folder
from mmattn.models.saving import check_sizes, weights_dtype
from mmattn.models.sources import TensorFiles, find_folder, read_config
from mmattn.models.translator import stock
from mmattn.models.translator.config import TranslatorConfig
from mmattn.models.translator.model import TranslatorNetwork

MODEL_TYPE = "mmattn_translator"
_ABOUT_THE_FILE = ("model_type", "architectures", "dtype")


def open_network(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    local_files_only: bool = False,
) -> TranslatorNetwork:
    """Open a network, in evaluation mode: Marian, M2M100 / NLLB in transformers' format, or what `save_network` wrote.

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
    config, family = _read_config(folder)
    with TensorFiles(folder, variant) as files:
        if family is not None:
            stock.fit_to_files(config, files)
        # On the meta device no weights are drawn that the checkpoint would overwrite.
        with torch.device("meta"):
            network = TranslatorNetwork(config)
        load_weights(network, _table(network, family), files, dtype=weights_dtype(dtype))
    return network.to(device or "cpu").eval()


def save_network(network: TranslatorNetwork, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`: as Marian or M2M100 where they can say it, under the stock name.

    Raises:
        CheckpointError: a network that is no longer what its config says, or a disk that refuses.
    """
    config, family = network.config, stock.family_of(network.config)
    with torch.device("meta"):
        expected = TranslatorNetwork(config)
    check_sizes(network, expected)
    tensors = stock_weights(network, _table(expected, family))
    dtype = next(network.parameters()).dtype
    if family is not None:
        values = stock.config_to_stock(config, family, dtype)
    else:
        values = {name: value for name, value in config.to_dict().items() if name != "stock"}
        values |= {"model_type": MODEL_TYPE, "architectures": [type(network).__name__]}
        values |= {"dtype": str(dtype).removeprefix("torch.")}
    write_folder(Path(folder), values, tensors)


def _read_config(folder: Path) -> tuple[TranslatorConfig, stock.Family | None]:
    values = read_config(folder)
    kind = values.get("model_type")
    try:
        for family in stock.FAMILIES:
            if kind == family.model_type:
                return stock.config_from_stock(values, family), family
        if kind == MODEL_TYPE:
            own: dict[str, Any] = {name: value for name, value in values.items() if name not in _ABOUT_THE_FILE}
            return TranslatorConfig.from_dict(own), None
    except (ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    known = ", ".join(family.model_type for family in stock.FAMILIES)
    raise CheckpointError(
        f"{folder}: model_type {kind} is not a translator that can be opened here: {known} and {MODEL_TYPE} can"
    )


def _table(network: TranslatorNetwork, family: stock.Family | None) -> WeightTable:
    return identity_table(network) if family is None else stock.weight_table(network.config)
