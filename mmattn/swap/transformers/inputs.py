"""Inputs for a whole transformers model, made from its config: what `verify` runs old and new attention on.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

_BATCH, _LENGTHS, _TARGETS, _FRAMES = 2, (11, 7), (7, 5), 4000


def make_inputs(model: Any) -> dict[str, Any] | None:
    """Padded rows of random tokens, pictures, sound: whatever the model's forward takes and must have."""
    parameter = next(iter(model.parameters()), None)
    if parameter is None or parameter.is_meta:
        return None
    draw = _Draw(model, parameter)
    names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    makers = {
        "input_ids": _texts,
        "pixel_values": _pictures,
        "input_features": _features,
        "input_values": _sound,
    }
    main = getattr(model, "main_input_name", "input_ids")
    if main not in makers or main not in names:
        return None
    wanted = [name for name in makers if name == main or (name in names and _is_needed(model, name))]
    inputs: dict[str, Any] = {}
    for name in wanted:
        made = makers[name](draw)
        if made is None:
            return None
        inputs |= made
    if "aspect_ratio_ids" in names:
        inputs |= _tiles(draw, inputs)
    if "decoder_input_ids" in names:
        inputs |= _targets(draw)
    return {name: value for name, value in inputs.items() if name in names}


class _Draw:
    """Random inputs from one seed, on a model's device and of its type."""

    def __init__(self, model: Any, parameter: Tensor) -> None:
        self.model, self.config = model, model.config
        self.device = parameter.device
        self.dtype = parameter.dtype if parameter.dtype.is_floating_point and parameter.element_size() > 1 else None
        self.generator = torch.Generator().manual_seed(0)
        self.text = _text_config(self.config)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype or torch.float32)

    def rows(self, lengths: tuple[int, ...], config: Any) -> tuple[Tensor, Tensor] | None:
        """Rows of tokens that mean nothing special, and their padding mask."""
        vocabulary = getattr(config, "vocab_size", None)
        if not isinstance(vocabulary, int) or vocabulary < 4:
            return None
        special = {value for name, value in vars(config).items() if name.endswith("_token_id")}
        special |= {value for name, value in vars(self.config).items() if name.endswith(("_token_id", "_token_index"))}
        special = {value for value in special if isinstance(value, int)}
        ordinary = torch.tensor([token for token in range(min(vocabulary, 5000)) if token not in special])
        places = torch.randint(len(ordinary), (len(lengths), max(lengths)), generator=self.generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        pad = getattr(config, "pad_token_id", None)
        tokens = ordinary[places].masked_fill(mask == 0, pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0)
        return tokens.to(self.device), mask.to(self.device)


def _text_config(config: Any) -> Any:
    """The part of a config that says what tokens there are; of models with two such parts (MusicGen) the encoder's."""
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(encoder=True)


def _is_needed(model: Any, name: str) -> bool:
    """Whether a model that reads texts, say, needs pictures too: by its config."""
    if name == "pixel_values":
        return hasattr(model.config, "vision_config")
    return name == "input_ids" and hasattr(model.config, "text_config")


def _texts(draw: _Draw) -> dict[str, Any] | None:
    rows = draw.rows(_LENGTHS, draw.text)
    return None if rows is None else {"input_ids": rows[0], "attention_mask": rows[1]}


def _targets(draw: _Draw) -> dict[str, Any]:
    rows = draw.rows(_TARGETS, getattr(draw.config, "decoder", None) or draw.text)
    if rows is None:
        return {}
    tokens, mask = rows
    start = getattr(draw.config, "decoder_start_token_id", None)
    if isinstance(start, int):
        tokens[:, 0] = start
    return {"decoder_input_ids": tokens, "decoder_attention_mask": mask}


def _pictures(draw: _Draw) -> dict[str, Any] | None:
    config = getattr(draw.config, "vision_config", None) or getattr(draw.config, "encoder", None) or draw.config
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size if isinstance(size, tuple | list) else (None, None)
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return {"pixel_values": draw.normal(_BATCH, channels, height, width)}


def _features(draw: _Draw) -> dict[str, Any] | None:
    bins, places = (getattr(draw.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not isinstance(bins, int) or not isinstance(places, int):
        return None
    return {"input_features": draw.normal(_BATCH, bins, 2 * places)}


def _sound(draw: _Draw) -> dict[str, Any]:
    return {"input_values": draw.normal(_BATCH, _FRAMES)}


def _tiles(draw: _Draw, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pictures in tiles, as Mllama has them: one picture a row, whose text sees it from the second token on; the last
    row's picture has only one tile."""
    pictures, tokens = inputs["pixel_values"], inputs["input_ids"]
    tiles = draw.config.vision_config.max_num_tiles
    batch, length = tokens.shape
    pixel_values = draw.normal(batch, 1, tiles, *pictures.shape[1:])
    seen = torch.ones(batch, tiles, dtype=torch.long, device=draw.device)
    seen[-1, 1:] = 0
    aspects = torch.ones(batch, 1, dtype=torch.long, device=draw.device)  # id 1 is one tile
    aspects[:-1] = draw.config.vision_config.max_aspect_ratio_id
    sees = torch.zeros(batch, length, 1, tiles, dtype=torch.long, device=draw.device)
    sees[:, 1:, 0] = seen[:, None]
    return {
        "pixel_values": pixel_values,
        "aspect_ratio_ids": aspects,
        "aspect_ratio_mask": seen[:, None],
        "cross_attention_mask": sees,
    }
