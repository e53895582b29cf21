"""diffusers' text-conditioned U-Net with its transformer blocks on mmattn's shared layer (arXiv 2112.10752)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as _Stock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.models.unet.block import TransformerBlock, adopt_parameters, block_refusal, check_attention_kwargs
from mmattn.models.unet.context import UNetContext
from mmattn.models.unet.folders import open_unet
from mmattn.models.unet.pictures import adopt_picture_layers, are_wanted_channels_last, channels_last
from mmattn.models.unet.stock_settings import StockAttentionSettings
from mmattn.nn.cross_attention import CrossAttention

_FREEU = ("s1", "s2", "b1", "b2")


class UNet2DConditionModel(StockAttentionSettings, _Stock):
    """`diffusers.UNet2DConditionModel` with self-attention, cross-attention and feed-forward of mmattn.

    ResNets, samplers and embeddings are diffusers', in training on a card by kernels of mmattn's (`pictures`).
    Parameters have stock's names, and the class stock's name: folders, pipelines, LoRA files and peft targets are the
    same for both, and what is saved opens in stock diffusers. The settings are stock's, as are `forward`'s arguments.
    SD 1.x, SD 2.x and SDXL; blocks with attention of another kind (GLIGEN, DeepFloyd IF, Kandinsky) are refused.
    `upcast_attention` changes nothing, as with stock's default processor: fused kernels accumulate in float32.

    Args:
        *arguments: as stock.
        **settings: as stock.

    Raises:
        UsageError: a setting that asks for what the blocks cannot do.
    """

    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    _repeated_blocks: ClassVar[list[str]] = ["TransformerBlock"]

    @functools.wraps(_Stock.__init__)
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        # Read by `DiffusionPipeline.save_pretrained`: the saved pipeline must open where mmattn is not installed.
        self.__module__ = _Stock.__module__
        if self.config["dual_cross_attention"]:
            raise UsageError("UNet: dual_cross_attention=True has two text attentions side by side, which it cannot do")
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, BasicTransformerBlock)}
        for name, block in blocks.items():
            self.set_submodule(name, TransformerBlock(block, name), strict=True)
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                holder = type(self.get_submodule(".".join(name.split(".")[:2]))).__name__
                raise UsageError(
                    f"UNet: {name} in a {holder} is attention of another kind than mmattn's blocks: use diffusers'"
                    " class, with mmattn.swap_attention where it can be swapped"
                )
        adopt_picture_layers(self)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        id_or_folder: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Open a U-Net, in evaluation mode.

        Args:
            id_or_folder: a folder or a hub id, of a U-Net or of a whole pipeline.
            subfolder: of the U-Net in it; None: the top, or `unet` where the top is a pipeline.
            revision: branch, tag or commit on the hub.
            token: hub token; None: the stored one.
            variant: infix of the weight files, such as `fp16`.
            dtype: of the floating-point weights; None: float32 whatever the file holds; `"auto"`: as in the file.
            device: where to put it; None: the CPU.
            local_files_only: never go to the network.

        Raises:
            CheckpointError: nothing there, a model of another kind, or weights that do not fit the config.
            UsageError: a U-Net with blocks that mmattn's cannot stand for.
        """
        load, place = super().from_pretrained, {"revision": revision, "token": token}
        place |= {"local_files_only": local_files_only}
        unet = open_unet(cls.load_config, load, id_or_folder, subfolder, variant=variant, dtype=dtype, place=place)
        return unet.to(device or "cpu").eval()

    @classmethod
    def from_stock(cls, unet: _Stock) -> Self:
        """A U-Net with the very parameters of a stock one: nothing is copied, training one trains both.

        Raises:
            UsageError: adapters, IP-Adapters, other attention processors or offloading hooks on it, or blocks that
                mmattn's cannot stand for.
        """
        if isinstance(unet, cls):
            return unet
        for name, module in unet.named_modules():
            refusal = block_refusal(module) if isinstance(module, BasicTransformerBlock) else None
            if refusal is None and (hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")):
                refusal = "has hooks of accelerate or diffusers (offloading, casting): remove them first"
            if refusal is not None:
                raise UsageError(f"UNet.from_stock: {name or type(unet).__name__} {refusal}")
        with torch.device("meta"):
            ours = cast(Self, cls.from_config(unet.config))
        adopt_parameters(ours, unet, type(unet).__name__)
        for own, stock in zip(ours.up_blocks, unet.up_blocks, strict=True):
            for key in _FREEU:
                if getattr(stock, key, None) is not None:
                    setattr(own, key, getattr(stock, key))
        if unet.is_gradient_checkpointing:
            ours.enable_gradient_checkpointing()
        return ours.train(unet.training)

    @property
    def cross_attentions(self) -> dict[str, CrossAttention]:
        """The attentions to the text by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, CrossAttention)}

    def project_context(self, text: Tensor, key_mask: Tensor | None = None) -> UNetContext:
        """A prompt's keys and values for every layer, once for all steps of a generation.

        Args:
            text: `[B, Lk, C]`, the text encoder's states.
            key_mask: boolean `[B, Lk]`, True = may attend; None: every token.

        Raises:
            UsageError: on a wrong shape, or the width of another text encoder.
        """
        context = UNetContext(text, key_mask)
        self._check_text(context)
        bound = self._with_projected_text(context)
        for attention in self.cross_attentions.values():
            bound.keys_and_values(attention)
        return context

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | UNetContext,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As stock's `forward`, whose docstring has the arguments that are not here.

        Args:
            sample: noisy latents `[B * n, C, height, width]`.
            timestep: one, or `[B * n]`.
            encoder_hidden_states: the text `[B * n, Lk, C]`, or a `UNetContext` of B prompts, whose row i // n serves
                row i.
            attention_mask: `[B * n, keys]`, 1 = keep, as stock: only for networks of a single resolution.
            cross_attention_kwargs: only `scale`, of LoRA.
            encoder_attention_mask: `[B * n, Lk]`, 1 = keep. A `UNetContext` has its own `key_mask`, which is faster.
            return_dict: whether to return an object with `sample`, or a tuple.

        Raises:
            UsageError: a text of another width or number of rows, or an unknown entry of `cross_attention_kwargs`.
        """
        check_attention_kwargs({key: each for key, each in (cross_attention_kwargs or {}).items() if key != "scale"})
        self._check_text(encoder_hidden_states, rows=sample.shape[0])
        is_laid_out = are_wanted_channels_last(self, sample)
        out = super().forward(
            channels_last(sample) if is_laid_out else sample,
            timestep,
            encoder_hidden_states,  # pyright: ignore[reportArgumentType]
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            added_cond_kwargs=added_cond_kwargs,  # pyright: ignore[reportArgumentType]
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )
        if not is_laid_out:
            return out
        picture = (out[0] if isinstance(out, tuple) else out.sample).contiguous()
        return UNet2DConditionOutput(sample=picture) if return_dict else (picture,)

    def get_aug_embed(self, emb: Tensor, encoder_hidden_states: Any, added_cond_kwargs: Any) -> Any:
        """As stock; the text itself where a `UNetContext` was given."""
        text = encoder_hidden_states.text if isinstance(encoder_hidden_states, UNetContext) else encoder_hidden_states
        return super().get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)

    def process_encoder_hidden_states(self, encoder_hidden_states: Any, added_cond_kwargs: Any) -> Any:
        """As stock; a `UNetContext`'s text is projected once."""
        if isinstance(encoder_hidden_states, UNetContext):
            return self._with_projected_text(encoder_hidden_states)
        return super().process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As stock's, in stock's format.

        Raises:
            UsageError: adapters are attached: stock would write a folder that nothing opens.
        """
        if getattr(self, "peft_config", None):
            raise UsageError(
                "UNet.save_pretrained: adapters are attached: save them with save_lora_adapter (or the pipeline's"
                " save_lora_weights), or merge with fuse_lora and unload them first"
            )
        super().save_pretrained(save_directory, *arguments, **options)

    def _with_projected_text(self, context: UNetContext) -> UNetContext:
        if self.encoder_hid_proj is None:
            return context
        if self.config["encoder_hid_dim_type"] != "text_proj":
            raise UsageError(
                f"UNet: encoder_hid_dim_type {self.config['encoder_hid_dim_type']!r} makes the text from more than the"
                " text: pass encoder_hidden_states as a tensor"
            )
        return context.through(self.encoder_hid_proj)

    def _check_text(self, given: Any, rows: int | None = None) -> None:
        """Raise on a text that cannot be attended to, where the cause is plain; `rows` of the sample."""
        text = given.text if isinstance(given, UNetContext) else given
        if not isinstance(text, Tensor):  # None, where no block attends to a text
            return
        dims = self.config["encoder_hid_dim"] or self.config["cross_attention_dim"]
        widths = {dims} if isinstance(dims, int) else set(dims)
        if text.shape[-1] not in widths:
            wanted = " or ".join(str(width) for width in sorted(widths))
            raise UsageError(
                f"UNet: the text is {list(text.shape)}, this U-Net takes a width of {wanted}: it was made for another"
                " text encoder"
            )
        if rows is not None and (text.shape[0] == 0 or rows % text.shape[0]):
            raise UsageError(f"UNet: {rows} samples and {text.shape[0]} texts: a multiple of the texts is needed")

    def _get_name(self) -> str:
        return "mmattn.UNet"


UNet = UNet2DConditionModel
