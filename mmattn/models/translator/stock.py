"""Marian (OPUS-MT) and M2M100 (NLLB, arXiv 2207.04672) in transformers' format: configs and weights, both ways."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import M2M100Config, MarianConfig, PreTrainedConfig

from mmattn.errors import CheckpointError
from mmattn.models.checkpoints import Weight, WeightTable
from mmattn.models.sources import TensorFiles
from mmattn.models.translator.config import TranslatorConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_SHARED, _SOURCE, _TARGET = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
)


@dataclass(frozen=True)
class Family:
    """A stock architecture.

    Attributes:
        model_type: its name in `config.json`.
        stock_class: the class that opens it.
        config_class: its config.
        norm_first, positions: what tells it from the other.
        has_logits_bias: whether there is a `final_logits_bias`.
    """

    model_type: str
    stock_class: str
    config_class: type[PreTrainedConfig]
    norm_first: bool
    positions: str
    has_logits_bias: bool


MARIAN = Family("marian", "MarianMTModel", MarianConfig, False, "sinusoidal", True)
M2M100 = Family("m2m_100", "M2M100ForConditionalGeneration", M2M100Config, True, "tensor2tensor", False)
FAMILIES = (MARIAN, M2M100)


def family_of(config: TranslatorConfig) -> Family | None:
    """The stock architecture in which a network can be saved, or None: then only mmattn opens it."""
    plain = (
        config.encoder_kv_heads in (None, config.encoder_heads)
        and config.decoder_kv_heads in (None, config.decoder_heads)
        and config.activation in ACTIVATIONS.values()
        and config.norm_eps == 1e-5
    )
    for family in FAMILIES:
        offset = config.pad_token_id + 1 if family is M2M100 else 0
        if (
            plain
            and config.norm_first == family.norm_first
            and config.positions == family.positions
            and config.position_offset == offset
            and (config.logits_bias == family.has_logits_bias or family is MARIAN)
            and (config.shares_embedding or family is MARIAN)
        ):
            return family
    return None


def config_from_stock(values: dict[str, Any], family: Family) -> TranslatorConfig:
    """Our config of a Marian or M2M100 `config.json`.

    Raises:
        CheckpointError: an option that these networks do not have.
    """
    names = values.get("architectures") or [family.stock_class]
    if names[0] != family.stock_class:
        raise CheckpointError(f"config.json: {names[0]} is not supported, only {family.stock_class}")
    try:
        stock: Any = family.config_class.from_dict(copy.deepcopy(values))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: no {family.model_type} config ({' '.join(str(error).split())})") from error
    if stock.activation_function not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"config.json: activation_function {stock.activation_function}: only {known} can be used")
    has_own_target = family is MARIAN and not stock.share_encoder_decoder_embeddings
    pad = _token(stock, "pad_token_id")
    config = TranslatorConfig(
        vocab_size=stock.vocab_size,
        target_vocab_size=stock.decoder_vocab_size if has_own_target else None,
        embed_dim=stock.d_model,
        encoder_layers=stock.encoder_layers,
        decoder_layers=stock.decoder_layers,
        encoder_heads=stock.encoder_attention_heads,
        decoder_heads=stock.decoder_attention_heads,
        encoder_ffn_dim=stock.encoder_ffn_dim,
        decoder_ffn_dim=stock.decoder_ffn_dim,
        activation=ACTIVATIONS[stock.activation_function],
        norm_first=family.norm_first,
        positions=family.positions,
        position_offset=pad + 1 if family is M2M100 else 0,
        max_positions=stock.max_position_embeddings,
        scale_embedding=stock.scale_embedding,
        logits_bias=family.has_logits_bias,
        tie_word_embeddings=stock.tie_word_embeddings,
        dropout_p=float(stock.dropout),
        attention_dropout_p=float(stock.attention_dropout),
        activation_dropout_p=float(stock.activation_dropout),
        alignment_layer=values.get("alignment_layer"),
        alignment_heads=values.get("alignment_heads"),
        pad_token_id=pad,
        eos_token_id=_token(stock, "eos_token_id"),
        decoder_start_token_id=_token(stock, "decoder_start_token_id"),
        stock=values,
    )
    config.validate()
    return config


def _token(stock: Any, name: str) -> int:
    token = getattr(stock, name)
    if not isinstance(token, int):
        raise CheckpointError(f"config.json: {name} is {token}, one token id is needed")
    return token


def fit_to_files(config: TranslatorConfig, files: TensorFiles) -> None:
    """Leave out the logits bias when a Marian file has none: stock then takes zeros."""
    if config.logits_bias and "final_logits_bias" not in files.shapes():
        config.logits_bias = False


def config_to_stock(config: TranslatorConfig, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a network of this family, the stock fields without a use here included."""
    values = copy.deepcopy(config.stock) or family.config_class().to_dict()
    values.pop("torch_dtype", None)
    before = values.get("activation_function")
    names = [stock for stock, ours in ACTIVATIONS.items() if ours == config.activation]
    values.update(
        model_type=family.model_type,
        architectures=[family.stock_class],
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        d_model=config.embed_dim,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        num_hidden_layers=config.encoder_layers,
        encoder_attention_heads=config.encoder_heads,
        decoder_attention_heads=config.decoder_heads,
        encoder_ffn_dim=config.encoder_ffn_dim,
        decoder_ffn_dim=config.decoder_ffn_dim,
        activation_function=before if before in names else names[-1],
        max_position_embeddings=config.max_positions,
        scale_embedding=config.scale_embedding,
        tie_word_embeddings=config.tie_word_embeddings,
        dropout=config.dropout_p,
        attention_dropout=config.attention_dropout_p,
        activation_dropout=config.activation_dropout_p,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    if family is MARIAN:
        values["share_encoder_decoder_embeddings"] = config.shares_embedding
        values["decoder_vocab_size"] = config.output_size
        if not config.stock:
            # Generation settings live in generation_config.json; MarianConfig's defaults would say otherwise.
            values["forced_eos_token_id"] = config.eos_token_id
    for name in ("alignment_layer", "alignment_heads"):
        if getattr(config, name) is not None:
            values[name] = getattr(config, name)
    return values


def weight_table(config: TranslatorConfig) -> WeightTable:
    """The weights of a network of either family, stock names beside ours."""
    weights: list[Weight] = []
    copies: dict[str, str] = {}
    also_written: dict[str, str] = {}
    if config.shares_embedding:
        weights.append(Weight(("decoder.embedding.words.weight",), _SHARED))
        copies = {_SOURCE: _SHARED, _TARGET: _SHARED}
        if not config.tie_word_embeddings:  # then transformers 5 ties none of the three either
            also_written = copies.copy()
    else:
        weights.append(Weight(("encoder.embedding.words.weight",), _SOURCE))
        weights.append(Weight(("decoder.embedding.words.weight",), _TARGET))
    if config.tie_word_embeddings:
        copies["lm_head.weight"] = _SHARED if config.shares_embedding else _TARGET
    else:
        weights.append(Weight(("decoder.head.weight",), "lm_head.weight"))
    if config.logits_bias:
        weights.append(Weight(("decoder.head.bias",), "final_logits_bias", stock_lead=1))
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for index in range(count):
            weights += _layer_weights(side, index)
        if config.norm_first:
            weights += _pairs(f"{side}.norm", f"model.{side}.layer_norm")
    # Position tables follow from the config; older files hold them.
    ignored = (r"model\.(encoder|decoder)\.embed_positions\.weights?",)
    return WeightTable(tuple(weights), copies, also_written, ignored)


def _layer_weights(side: str, index: int) -> list[Weight]:
    ours, stock = f"{side}.layers.{index}", f"model.{side}.layers.{index}"
    attentions = [("self_attn", "self_attn")] + ([("cross_attn", "encoder_attn")] if side == "decoder" else [])
    weights: list[Weight] = []
    for our_name, stock_name in attentions:
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights += _pairs(f"{ours}.{our_name}.{projection}", f"{stock}.{stock_name}.{projection}")
        weights += _pairs(f"{ours}.{our_name}_norm", f"{stock}.{stock_name}_layer_norm")
    weights += _pairs(f"{ours}.ffn.up_proj", f"{stock}.fc1")
    weights += _pairs(f"{ours}.ffn.down_proj", f"{stock}.fc2")
    return weights + _pairs(f"{ours}.ffn_norm", f"{stock}.final_layer_norm")


def _pairs(ours: str, stock: str) -> list[Weight]:
    return [Weight((f"{ours}.{kind}",), f"{stock}.{kind}") for kind in ("weight", "bias")]
