"""The text-conditioned U-Net of latent (and pixel) diffusion, on the shared blocks."""

from mmattn.models.unet.block import TransformerBlock
from mmattn.models.unet.compiled import CompiledUNet
from mmattn.models.unet.context import UNetContext
from mmattn.models.unet.model import UNet, UNet2DConditionModel

__all__ = ["CompiledUNet", "TransformerBlock", "UNet", "UNet2DConditionModel", "UNetContext"]
