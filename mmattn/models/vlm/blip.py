"""BLIP (arXiv 2201.12086) in transformers' format: its config to ours and back, and its weight tables."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from mmattn.errors import CheckpointError
from mmattn.models.checkpoints import Weight, WeightTable
from mmattn.models.sources import TensorFiles
from mmattn.models.vlm.config import ImageEncoderConfig, TextConfig, VLMConfig

_log = logging.getLogger(__name__)

STOCK_CLASSES = {
    "captioning": "BlipForConditionalGeneration",
    "question_answering": "BlipForQuestionAnswering",
    "matching": "BlipForImageTextRetrieval",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_HEAD = "text_decoder.cls.predictions"
_WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"


def config_from_stock(values: dict[str, Any]) -> VLMConfig:
    """Our config of a BLIP `config.json`.

    Raises:
        CheckpointError: a class or an option that these networks do not have.
    """
    names = values.get("architectures") or ["no class"]
    task = next((task for task, stock in STOCK_CLASSES.items() if stock == names[0]), None)
    if task is None:
        raise CheckpointError(f"config.json: {names[0]} is not supported, only {', '.join(STOCK_CLASSES.values())}")
    try:
        stock = BlipConfig.from_dict(copy.deepcopy(values))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: not a BLIP config ({' '.join(str(error).split())})") from error
    vision, text = cast(BlipVisionConfig, stock.vision_config), cast(BlipTextConfig, stock.text_config)
    config = VLMConfig(
        task=task,
        image=_image_config(vision),
        text=_text_config(text, tied=stock.tie_word_embeddings or text.tie_word_embeddings),
        image_text_dim=stock.image_text_hidden_size,
        stock=values,
    )
    config.validate()
    return config


def _image_config(vision: BlipVisionConfig) -> ImageEncoderConfig:
    return ImageEncoderConfig(
        kind="vit",
        image_size=_side(vision.image_size, "image_size"),
        patch_size=_side(vision.patch_size, "patch_size"),
        embed_dim=vision.hidden_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        ffn_dim=vision.intermediate_size,
        activation=_activation(vision.hidden_act),
        norm_eps=vision.layer_norm_eps,
        attention_dropout_p=vision.attention_dropout,
    )


def _text_config(text: BlipTextConfig, *, tied: bool) -> TextConfig:
    return TextConfig(
        vocab_size=text.vocab_size,
        embed_dim=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        ffn_dim=text.intermediate_size,
        max_positions=text.max_position_embeddings,
        activation=_activation(text.hidden_act),
        norm_first=False,
        norm_eps=text.layer_norm_eps,
        dropout_p=text.hidden_dropout_prob,
        attention_dropout_p=text.attention_probs_dropout_prob,
        embedding_norm=True,
        head_transform=True,
        tie_word_embeddings=tied,
        label_smoothing=text.label_smoothing,
        initializer_range=text.initializer_range,
        bos_token_id=_token(text, "bos_token_id"),
        eos_token_id=_token(text, "eos_token_id"),
        pad_token_id=_token(text, "pad_token_id"),
        sep_token_id=_token(text, "sep_token_id"),
        stop_token_id=_token(text, "sep_token_id"),
    )


def _token(text: BlipTextConfig, name: str) -> int:
    token = getattr(text, name)
    if not isinstance(token, int):
        raise CheckpointError(f"config.json: text {name} is {token}, one token id is needed")
    return token


def _side(size: Any, name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise CheckpointError(f"config.json: vision {name} {size} is not square, which is not supported")
    return sides.pop()


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act {name} is not supported, only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def is_blip(config: VLMConfig) -> bool:
    """Whether the architecture can be said in BLIP's config, so that stock classes open what is saved."""
    image, text = config.image, config.text
    return (
        image.kind == "vit"
        and not image.dropout_p
        and text.positions == "learned"
        and not text.norm_first
        and text.embedding_norm
        and text.head_transform
        and text.cross_attention_every == 1
        and not text.gated
        and text.num_kv_heads in (None, text.num_heads)
        and {image.activation, text.activation} <= set(_ACTIVATIONS.values())
        and text.sep_token_id is not None
        and config.stop_token_id == text.sep_token_id
        and (config.task != "question_answering" or image.embed_dim == text.embed_dim)
    )


def config_to_stock(config: VLMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a network for which `is_blip` holds, the stock fields without a use here included."""
    values = copy.deepcopy(config.stock) or BlipConfig().to_dict()
    values.pop("torch_dtype", None)
    values.update(
        model_type="blip",
        architectures=[STOCK_CLASSES[config.task]],
        dtype=str(dtype).removeprefix("torch."),
        image_text_hidden_size=config.image_text_dim,
        tie_word_embeddings=config.text.tie_word_embeddings,
    )
    image, text = config.image, config.text
    vision_values = values.setdefault("vision_config", {})
    vision_values.update(
        image_size=image.image_size,
        patch_size=image.patch_size,
        hidden_size=image.embed_dim,
        num_hidden_layers=image.num_layers,
        num_attention_heads=image.num_heads,
        intermediate_size=image.ffn_dim,
        layer_norm_eps=image.norm_eps,
        attention_dropout=image.attention_dropout_p,
        hidden_act=_stock_activation(image.activation, vision_values.get("hidden_act")),
    )
    text_values = values.setdefault("text_config", {})
    text_values.update(
        vocab_size=text.vocab_size,
        hidden_size=text.embed_dim,
        encoder_hidden_size=image.embed_dim,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        intermediate_size=text.ffn_dim,
        max_position_embeddings=text.max_positions,
        hidden_act=_stock_activation(text.activation, text_values.get("hidden_act")),
        layer_norm_eps=text.norm_eps,
        hidden_dropout_prob=text.dropout_p,
        attention_probs_dropout_prob=text.attention_dropout_p,
        tie_word_embeddings=text.tie_word_embeddings,
        label_smoothing=text.label_smoothing,
        initializer_range=text.initializer_range,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        sep_token_id=text.sep_token_id,
    )
    return values


def _stock_activation(ours: str, before: str | None) -> str:
    if before is not None and _ACTIVATIONS.get(before) == ours:
        return before
    return next(stock for stock, name in _ACTIVATIONS.items() if name == ours)


def untie_if_different(config: VLMConfig, files: TensorFiles) -> None:
    """Say in the config that the vocabulary matrix stands alone when the file holds another one than the embeddings.

    Stock does the same: a checkpoint that holds both, and not equal, is not tied whatever its config says.
    """
    if not config.text.tie_word_embeddings or config.task == "matching":
        return
    present = files.shapes()
    for name, source in ((f"{_HEAD}.decoder.weight", _WORDS), (f"{_HEAD}.decoder.bias", f"{_HEAD}.bias")):
        if name in present and source in present and not torch.equal(files.read(name), files.read(source)):
            _log.warning("%s: %s differs from %s, so they are not tied", files.folder, name, source)
            config.text.tie_word_embeddings = False
            return


def weight_table(config: VLMConfig) -> WeightTable:
    """The weights of a BLIP network, stock names beside ours."""
    weights = _vision_weights(config.image.num_layers)
    copies: dict[str, str] = {}
    also_written: dict[str, str] = {}
    if config.task == "captioning":
        weights += _text_weights("decoder.body", "text_decoder.bert", config.text.num_layers)
    elif config.task == "question_answering":
        weights += _text_weights("question_encoder", "text_encoder", config.text.num_layers)
        weights += _text_weights("decoder.body", "text_decoder.bert", config.text.num_layers)
    else:
        weights += _text_weights("text_encoder", "text_encoder", config.text.num_layers)
        weights += _pairs("image_proj", "vision_proj") + _pairs("text_proj", "text_proj")
        weights += _pairs("match_head", "itm_head")
    if config.task != "matching":
        weights += _pairs("decoder.head.dense", f"{_HEAD}.transform.dense")
        weights += _pairs("decoder.head.norm", f"{_HEAD}.transform.LayerNorm")
        if config.text.tie_word_embeddings:
            weights.append(Weight(("decoder.head.bias",), f"{_HEAD}.bias"))
            copies = {f"{_HEAD}.decoder.bias": f"{_HEAD}.bias", f"{_HEAD}.decoder.weight": _WORDS}
        else:
            weights += _pairs("decoder.head", f"{_HEAD}.decoder")
            also_written = {f"{_HEAD}.bias": f"{_HEAD}.decoder.bias"}
    # Older versions of transformers stored the row of position numbers.
    return WeightTable(tuple(weights), copies, also_written, ignored=(r".*\.position_ids",))


def _pairs(ours: str, stock: str) -> list[Weight]:
    return [Weight((f"{ours}.{kind}",), f"{stock}.{kind}") for kind in ("weight", "bias")]


def _vision_weights(num_layers: int) -> list[Weight]:
    weights = [
        Weight(("image.embedding.class_token",), "vision_model.embeddings.class_embedding", stock_lead=2),
        Weight(("image.embedding.positions",), "vision_model.embeddings.position_embedding", stock_lead=1),
        *_pairs("image.embedding.patch_proj", "vision_model.embeddings.patch_embedding"),
        *_pairs("image.norm", "vision_model.post_layernorm"),
    ]
    for index in range(num_layers):
        ours, stock = f"image.layers.{index}", f"vision_model.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            projections = tuple(f"{ours}.self_attn.{name}_proj.{kind}" for name in "qkv")
            weights.append(Weight(projections, f"{stock}.self_attn.qkv.{kind}"))
        weights += _pairs(f"{ours}.self_attn.out_proj", f"{stock}.self_attn.projection")
        weights += _pairs(f"{ours}.self_attn_norm", f"{stock}.layer_norm1")
        weights += _pairs(f"{ours}.ffn.up_proj", f"{stock}.mlp.fc1")
        weights += _pairs(f"{ours}.ffn.down_proj", f"{stock}.mlp.fc2")
        weights += _pairs(f"{ours}.ffn_norm", f"{stock}.layer_norm2")
    return weights


def _text_weights(ours_prefix: str, stock_prefix: str, num_layers: int) -> list[Weight]:
    weights = [
        Weight((f"{ours_prefix}.embedding.words.weight",), f"{stock_prefix}.embeddings.word_embeddings.weight"),
        Weight((f"{ours_prefix}.embedding.positions.weight",), f"{stock_prefix}.embeddings.position_embeddings.weight"),
        *_pairs(f"{ours_prefix}.embedding.norm", f"{stock_prefix}.embeddings.LayerNorm"),
    ]
    for index in range(num_layers):
        ours, stock = f"{ours_prefix}.layers.{index}", f"{stock_prefix}.encoder.layer.{index}"
        for our_attention, stock_attention in (("self_attn", "attention"), ("cross_attn", "crossattention")):
            for our_name, stock_name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                weights += _pairs(f"{ours}.{our_attention}.{our_name}", f"{stock}.{stock_attention}.self.{stock_name}")
            weights += _pairs(f"{ours}.{our_attention}.out_proj", f"{stock}.{stock_attention}.output.dense")
            weights += _pairs(f"{ours}.{our_attention}_norm", f"{stock}.{stock_attention}.output.LayerNorm")
        weights += _pairs(f"{ours}.ffn.up_proj", f"{stock}.intermediate.dense")
        weights += _pairs(f"{ours}.ffn.down_proj", f"{stock}.output.dense")
        weights += _pairs(f"{ours}.ffn_norm", f"{stock}.output.LayerNorm")
    return weights
