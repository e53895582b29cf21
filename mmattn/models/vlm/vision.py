"""Image encoders: pictures `[B, 3, H, W]` to features `[B, Lk, C]`.

B batch, H and W sides of the picture in pixels, Lk features of a picture, C channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.models.vlm.config import ImageEncoderConfig
from mmattn.nn import TransformerLayer
from mmattn.nn.feed_forward import ActivationName


class PatchEmbedding(nn.Module):
    """Patches as tokens after a class token, with learned positions (ViT, arXiv 2010.11929 eq. 1)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_proj = nn.Conv2d(3, config.embed_dim, kernel_size=size, stride=size)
        self.class_token = nn.Parameter(torch.empty(config.embed_dim).normal_(std=config.position_std))
        self.positions = nn.Parameter(
            torch.empty(config.num_features, config.embed_dim).normal_(std=config.position_std)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, Lk, C]`."""
        patches = self.patch_proj(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.positions.to(patches.dtype)


class ConvEmbedding(nn.Module):
    """Convolutions down to a grid of tokens, each told its row and its column.

    The row and column tables are added, not concatenated, so that attention can read "left of" and "above" off them.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_stages(config.conv_channels, config.convs_per_stage))
        self.channel_proj = nn.Linear(config.conv_channels[-1], config.embed_dim)
        self.row_positions = nn.Parameter(torch.empty(config.grid, config.embed_dim).normal_(std=config.position_std))
        self.column_positions = nn.Parameter(
            torch.empty(config.grid, config.embed_dim).normal_(std=config.position_std)
        )

    def train(self, mode: bool = True) -> ConvEmbedding:
        """As `nn.Module.train`, but a frozen stem stays in evaluation mode: its statistics are frozen too."""
        super().train(mode)
        self.stem.train(mode and any(parameter.requires_grad for parameter in self.stem.parameters()))
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, grid * grid, C]`, row after row."""
        # Channels last is how the convolutions are fastest and how the tokens are read afterwards.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        cells = self.channel_proj(self.stem(pixel_values).movedim(1, -1))  # [B, grid, grid, C]
        positions = self.row_positions[:, None] + self.column_positions[None]
        return (cells + positions.to(cells.dtype)).flatten(1, 2)


def _conv_stages(channels: list[int], convs_per_stage: list[int]) -> list[nn.Module]:
    modules: list[nn.Module] = []
    previous = 3
    for stage, (width, count) in enumerate(zip(channels, convs_per_stage, strict=True)):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            # The norm that follows takes the mean away, so a bias here would have no effect.
            modules += [
                nn.Conv2d(previous, width, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.GELU(),
            ]
            previous = width
    return modules


class ImageEncoder(nn.Module):
    """A picture's features: an embedding (`vit` or `conv`), pre-norm transformer layers, a last norm."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.embedding = ConvEmbedding(config) if config.kind == "conv" else PatchEmbedding(config)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.embed_dim,
                config.num_heads,
                config.ffn_dim,
                activation=cast("ActivationName", config.activation),
                norm_eps=config.norm_eps,
                dropout_p=config.dropout_p,
                attention_dropout_p=config.attention_dropout_p,
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            pixel_values: `[B, 3, image_size, image_size]`, normalised as the model's processor does.

        Returns:
            `[B, Lk, C]`.

        Raises:
            UsageError: pictures of another size.
        """
        expected = (3, self.image_size, self.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise UsageError(
                f"pixel_values has shape {list(pixel_values.shape)}, this image encoder takes"
                f" [B, 3, {self.image_size}, {self.image_size}]: resize the pictures with the model's processor"
            )
        hidden = self.embedding(pixel_values.to(self.norm.weight.dtype))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)
