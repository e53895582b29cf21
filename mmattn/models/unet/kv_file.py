"""The text side of a U-Net's cross-attention as a file: Custom Diffusion (arXiv 2212.04488).

Only the key and value projections of cross-attention are in it, and beside it a file for every new token. The file is
the one that stock diffusers opens:

    pipe.unet.load_attn_procs(folder, weight_name=WEIGHTS_FILE, _pipeline=pipe)
    pipe.load_textual_inversion(folder, weight_name="<new1>.safetensors")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mmattn
from mmattn.errors import CheckpointError, UsageError
from mmattn.models.checkpoints import fault, first_names, replacing
from mmattn.nn import CrossAttention

WEIGHTS_FILE = "pytorch_custom_diffusion_weights.safetensors"

_PROJECTIONS = ("to_k", "to_v")


@dataclass(frozen=True)
class CrossAttentionKV:
    """What a file of `save_cross_attention_kv` holds.

    Attributes:
        weights: by parameter name in a stock U-Net (`....attn2.to_k.weight`), `[C_out, C_text]`, on the CPU.
        tokens: embeddings of new tokens, `[C]` or `[n, C]`, on the CPU.
        base_model: name or folder of the U-Net that was trained; "" when it is not said.
        mmattn_version: that wrote the file; "" for a file of diffusers itself.
    """

    weights: dict[str, Tensor]
    tokens: dict[str, Tensor]
    base_model: str = ""
    mmattn_version: str = ""


def cross_attention_kv_names(unet: nn.Module) -> list[str]:
    """Names of the key and value weights of every layer that attends to the text, as `named_parameters` has them.

    Those are the layers `attn2`, and `attn1` of blocks that have cross-attention only. Under an adapter it is the
    name of the weight that the adapter stands on.

    Args:
        unet: `mmattn.UNet` or a stock `UNet2DConditionModel`.

    Raises:
        UsageError: the module has no such layers, or layers of another kind (added keys and values).
    """
    return [f"{name}.weight" for name in _kv_linears(unet).values()]


def save_cross_attention_kv(unet: nn.Module, folder: str | Path, *, tokens: Mapping[str, Tensor] | None = None) -> Path:
    """Write the key and value weights of a U-Net's cross-attention, and new tokens, for stock diffusers to open.

    Args:
        unet: `mmattn.UNet` or a stock `UNet2DConditionModel`, without adapters on these layers.
        folder: made when it is not there; files of an earlier save are replaced.
        tokens: token to its input embedding, `[C]` or `[n, C]` for several vectors; a file each, `TOKEN.safetensors`.

    Returns:
        The file of the weights.

    Raises:
        UsageError: no cross-attention, an adapter on it, or a token that cannot be a file's name.
        CheckpointError: the disk refuses.
    """
    folder, tokens = Path(folder), tokens or {}
    for token, embedding in tokens.items():
        _check_token(token, embedding)
    tensors: dict[str, Tensor] = {}
    for stock_name, name in _kv_linears(unet).items():
        if name != stock_name:
            raise UsageError(f"{stock_name} holds an adapter: merge or remove it, then save keys and values")
        layer, _, projection = name.rpartition(".")
        tensors[f"{layer}.processor.{projection}_custom_diffusion.weight"] = unet.get_parameter(f"{name}.weight")
    cross_layers = {name.partition(".processor.")[0] for name in tensors}
    # diffusers installs the file's layers as the processors of the whole U-Net, so that each has to have an entry.
    for layer, _ in _attentions(unet):
        if layer not in cross_layers:
            tensors[f"{layer}.processor"] = torch.empty(0)
    base_model = str(getattr(unet.config, "_name_or_path", "") or "")
    metadata = {
        "mmattn_version": mmattn.__version__,
        "base_model": base_model,
        "tokens": json.dumps(list(tokens)),
    }
    for token, embedding in tokens.items():
        _write(folder / _token_file(token), {token: embedding}, {"base_model": base_model})
    _write(folder / WEIGHTS_FILE, tensors, metadata)
    return folder / WEIGHTS_FILE


def read_cross_attention_kv(folder: str | Path) -> CrossAttentionKV:
    """Read what `save_cross_attention_kv`, or diffusers' `save_attn_procs` with safetensors, wrote.

    Args:
        folder: or the file of the weights itself.

    Raises:
        CheckpointError: no such file, a damaged one, or one that holds other weights too (all listed).
    """
    path = Path(folder)
    if path.suffix != ".safetensors":
        path = path / WEIGHTS_FILE
    tensors, metadata = _read(path)
    weights: dict[str, Tensor] = {}
    others: list[str] = []
    for name, tensor in tensors.items():
        layer, _, projection = name.removesuffix("_custom_diffusion.weight").rpartition(".processor.")
        if projection in _PROJECTIONS:
            weights[f"{layer}.{projection}.weight"] = tensor
        elif not (name.endswith(".processor") and tensor.numel() == 0):
            others.append(name)
    if others:
        raise CheckpointError(
            f"{path}: not a file of cross-attention keys and values only, it holds {first_names(others)} as well"
        )
    tokens: dict[str, Tensor] = {}
    for token in _token_names(path, metadata):
        file = path.parent / _token_file(token)
        held, _ = _read(file)
        if list(held) != [token]:
            raise CheckpointError(f"{file}: holds {first_names(held)}, not the embedding of {token}")
        tokens |= held
    return CrossAttentionKV(weights, tokens, metadata.get("base_model", ""), metadata.get("mmattn_version", ""))


@torch.no_grad()
def merge_cross_attention_kv(unet: nn.Module, folder: str | Path) -> CrossAttentionKV:
    """Write a file's key and value weights into a U-Net, in place; either all of them or, on an error, none.

    The embeddings of new tokens go to the text encoder, not to the U-Net: they are returned, and
    `pipe.load_textual_inversion` opens their files.

    Args:
        unet: `mmattn.UNet` or a stock `UNet2DConditionModel`; weights keep its dtype and device. Under an adapter, it
            is the weight below the adapter that changes.
        folder: as in `read_cross_attention_kv`.

    Raises:
        UsageError: the module is no such U-Net.
        CheckpointError: weights missing, not known to this U-Net, or of another shape (all listed).
    """
    kv = read_cross_attention_kv(folder)
    linears = _kv_linears(unet)
    targets = {f"{stock_name}.weight": unet.get_parameter(f"{name}.weight") for stock_name, name in linears.items()}
    faults = {
        "missing": [name for name in targets if name not in kv.weights],
        "not known": [name for name in kv.weights if name not in targets],
        "of another shape": [
            f"{name} is {list(kv.weights[name].shape)}, not {list(target.shape)}"
            for name, target in targets.items()
            if name in kv.weights and kv.weights[name].shape != target.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(fault(what, names) for what, names in faults.items() if names)
        origin = f" (made from {kv.base_model})" if kv.base_model else ""
        raise CheckpointError(f"{folder}: keys and values of another U-Net{origin}: {listed}")
    for name, target in targets.items():
        target.copy_(kv.weights[name])
    return kv


def _attentions(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every attention layer of a U-Net, stock's and ours, by name."""
    return [
        (name, module)
        for name, module in unet.named_modules()
        if isinstance(getattr(module, "to_q", None), nn.Module) and hasattr(module, "to_v")
    ]


def _kv_linears(unet: nn.Module) -> dict[str, str]:
    """Name of each key and value projection in a stock U-Net to the name of the plain Linear that it is, or holds."""
    found: dict[str, str] = {}
    for layer, attention in _attentions(unet):
        if getattr(attention, "added_kv_proj_dim", None) is not None:
            raise UsageError(f"{layer} has added keys and values, so it has no text side of its own: unknown U-Net")
        if not (isinstance(attention, CrossAttention) or getattr(attention, "is_cross_attention", False)):
            continue
        for projection in _PROJECTIONS:
            module = attention.get_submodule(projection)
            is_adapted = isinstance(getattr(module, "base_layer", None), nn.Module)
            found[f"{layer}.{projection}"] = f"{layer}.{projection}" + (".base_layer" if is_adapted else "")
    if not found:
        raise UsageError(f"{type(unet).__name__} has no cross-attention layers with to_k and to_v: a U-Net is wanted")
    return found


def _check_token(token: str, embedding: Tensor) -> None:
    if not token or any(character.isspace() or character in "/\\" for character in token):
        raise UsageError(f"token {token!r}: a new token is one word without spaces and slashes, such as <new1>")
    if embedding.ndim not in (1, 2) or not embedding.is_floating_point():
        raise UsageError(f"token {token!r}: its embedding must be [C] or [n, C], not {list(embedding.shape)}")


def _token_file(token: str) -> str:
    return f"{token}.safetensors"


def _token_names(path: Path, metadata: Mapping[str, str]) -> list[str]:
    try:
        names = json.loads(metadata.get("tokens", "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: damaged, its header's list of tokens is not readable")
    return names


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; it is written by save_cross_attention_kv")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, not readable as safetensors ({error})") from error


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # Cloned: projections that are packed for inference share one storage.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        save_file(copies, part, metadata={"format": "pt", **metadata})
