"""Opens what the model argument or `--model` names: a training run's folder, a model's own folder, or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmattn.inference.text_to_image import TextToImage
    from mmattn.inference.translator import Translator
    from mmattn.inference.vlm import VisionLanguageModel


def open_vlm(model: str, *, compile: bool = False) -> VisionLanguageModel:
    """A vision-language model."""
    from mmattn.inference.trained import model_source
    from mmattn.inference.vlm import VisionLanguageModel

    return VisionLanguageModel.from_pretrained(model_source(model), compile=compile)


def open_translator(model: str, quantize: str | None = None, *, compile: bool = False) -> Translator:
    """A translator."""
    from mmattn.inference.trained import model_source
    from mmattn.inference.translator import Translator

    return Translator.from_pretrained(model_source(model), quantize=quantize, compile=compile)


def open_text_to_image(model: str, scheduler: str | None = None, *, compile: bool = False) -> TextToImage:
    """A text-to-image pipeline."""
    from mmattn.inference.text_to_image import TextToImage
    from mmattn.inference.trained import model_source

    return TextToImage.from_pretrained(model_source(model), scheduler=scheduler, compile=compile)
