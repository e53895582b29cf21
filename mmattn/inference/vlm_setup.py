"""A vision-language model ready to be trained: opened or new, with its tokenizer and image processor, and its LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from transformers import PreTrainedTokenizerBase
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mmattn.data.collate import ImageTextCollator
from mmattn.data.images import PixelTransform, RandomView
from mmattn.data.tensor_cache import TensorCache
from mmattn.data.tokenizer import train_tokenizer
from mmattn.errors import ConfigError
from mmattn.inference import folders, trained
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.models.sources import find_folder
from mmattn.models.vlm import (
    CaptioningNetwork,
    VisionLanguageNetwork,
    VLMConfig,
    build_network,
    cross_attention_parameters,
    open_network,
)
from mmattn.models.vlm.blip import is_blip, weight_table
from mmattn.training.selection import LoRAConfig, lora_config, merged_copy


@dataclass
class ModelConfig:
    """The model: a checkpoint to start from, or the form of a new one.

    Args:
        from_pretrained: Hub id or folder of a captioning checkpoint. None makes a new model; beside it,
            `network` may not contradict the checkpoint, which has a tokenizer of its own.
        revision: Branch, tag or commit on the hub.
        tokenizer: Of a new model, trained on its texts: "word" for small closed vocabularies, "bpe" for natural text.
        max_vocab_size: Of a new model: upper bound of that tokenizer's vocabulary.
        lowercase: Of a new model: whether that tokenizer folds case.
        network: Only for a new model.
    """

    from_pretrained: Optional[str] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    revision: Optional[str] = None  # noqa: UP045
    tokenizer: str = "word"
    max_vocab_size: int = 8000
    lowercase: bool = False
    network: VLMConfig = field(default_factory=VLMConfig)


@dataclass
class ExampleConfig:
    """How pictures and their texts become training examples.

    Args:
        texts_per_image: Texts learned per picture and step; they share its features.
        kind_weights: How likely a kind of text is drawn, such as {caption: 2, answer: 0}: 1 for kinds that are not
            named, 0 leaves one out.
        max_length: Tokens of a text at most, with its prompt or question; 4 or more. What is longer is cut.
        prompt: Stands before every caption, in scores too, and is not scored, such as "a picture of".
        packing: Put the texts of a batch one after the other, without padding between them; the losses are the same.
        token_dropout: Part of the text that the decoder does not see while it learns, so that it has to look.
        view_min_area: Crop pictures at random, down to this part of their area; 1 for whole pictures.
        view_flip: Mirror half of the pictures; not where captions speak of left and right.
    """

    texts_per_image: int = 1
    kind_weights: dict[str, float] = field(default_factory=dict)
    max_length: int = 32
    prompt: str = ""
    packing: bool = True
    token_dropout: float = 0.0
    view_min_area: float = 1.0
    view_flip: bool = False

    @property
    def has_view(self) -> bool:
        """Whether pictures are changed at random."""
        return self.view_min_area < 1 or self.view_flip


def make_vlm(config: ModelConfig, texts: Iterable[str]) -> VisionLanguageModel:
    """Open the checkpoint that is to be trained, or make a new model.

    Args:
        config: The model.
        texts: Of the training split; a new model's tokenizer is made from them.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ConfigError: a form that does not fit together, or not the checkpoint; a checkpoint that does not caption.
    """
    trained.require_source(config, ["revision"])
    if config.from_pretrained is not None:
        trained.warn_of_unused(config, ("tokenizer", "max_vocab_size", "lowercase"))
        vlm = _open_vlm(config.from_pretrained, config.revision)
        trained.check_form(config.network, vlm.network.config, config.from_pretrained)
        return vlm
    tokenizer = train_tokenizer(texts, config.tokenizer, vocab_size=config.max_vocab_size, lowercase=config.lowercase)
    network = build_network(_with_vocabulary(config.network, tokenizer))
    if not isinstance(network, CaptioningNetwork):
        raise ConfigError(f"model.network.task={config.network.task}: this recipe makes captioning models")
    side = network.config.image.image_size
    processor = BlipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    return VisionLanguageModel(network, tokenizer, processor)


def _open_vlm(id_or_folder: str, revision: str | None) -> VisionLanguageModel:
    """As `VisionLanguageModel.from_pretrained`, in float32 and without what is done there for inference."""
    folder = find_folder(id_or_folder, revision=revision)
    network = open_network(folder)
    if not isinstance(network, CaptioningNetwork):
        raise ConfigError(
            f"model.from_pretrained={id_or_folder}: this recipe trains captioning checkpoints, and that is one for "
            f"{network.config.task}"
        )
    tokenizer = folders.open_tokenizer(folder, is_stock=is_blip(network.config))
    processor = folders.open_image_processor(folder)
    return VisionLanguageModel(network, tokenizer, processor, folders.read_generation_config(folder))


def _with_vocabulary(config: VLMConfig, tokenizer: PreTrainedTokenizerBase) -> VLMConfig:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "sep", "pad")}
    text = dataclasses.replace(config.text, vocab_size=len(tokenizer), **special)
    return dataclasses.replace(config, text=text)


def require_positions(vlm: VisionLanguageModel, examples: ExampleConfig) -> None:
    """Raise `ConfigError` for texts that are longer than the model takes: a training would end where one comes."""
    most = vlm.network.config.text.max_positions
    if examples.max_length > most:
        raise ConfigError(
            f"examples.max_length={examples.max_length} is more than the {most} positions that the model has: lower "
            "it, or raise model.network.text.max_positions of a new model"
        )


def make_collator(
    vlm: VisionLanguageModel, examples: ExampleConfig, seed: int, features: TensorCache | None = None
) -> ImageTextCollator:
    """Batches in the layout that the model was made for; see `ImageTextCollator`."""
    config = vlm.network.config
    return ImageTextCollator(
        PixelTransform.from_processor(vlm.processor),
        vlm.tokenizer,
        examples.texts_per_image,
        examples.max_length,
        seed,
        prompt=examples.prompt,
        kind_weights=examples.kind_weights,
        token_dropout=examples.token_dropout,
        view=RandomView(examples.view_min_area, examples.view_flip) if examples.has_view else None,
        features=features,
        packed=examples.packing,
        bos_id=config.bos_token_id,
        sep_id=config.sep_token_id,
        eos_id=config.stop_token_id,
        pad_id=config.pad_token_id,
    )


def choose_trained(network: VisionLanguageNetwork, what: str, lora: LoRAConfig) -> None:
    """Freeze what is not to be trained.

    Args:
        network: the network, changed in place.
        what: one of `TRAIN_WHAT`.
        lora: used for "lora".

    Raises:
        ConfigError: nothing is left to train.
    """
    trained.choose_trained(
        network,
        what,
        lora,
        cross_attention=cross_attention_parameters(network),
        stock_names=_stock_module_names(network),
        refusal="is joined with others in the stock checkpoint, so that an adapter on it could not be opened there: "
        "name modules of the text decoder only",
    )


def save_trained(vlm: VisionLanguageModel, folder: Path) -> None:
    """Save a trained model; one with LoRA merged, with the adapter beside it in `adapter/` (PEFT's format)."""
    network = vlm.network
    if lora_config(network) is None:
        vlm.save_pretrained(folder)
        return
    merged = VisionLanguageModel(merged_copy(network), vlm.tokenizer, vlm.processor, vlm.generation_config)
    merged.save_pretrained(folder)
    trained.save_adapter(network, folder / "adapter", _stock_module_names(network))


def _stock_module_names(network: VisionLanguageNetwork) -> dict[str, str]:
    """Our module names to those of the checkpoint's own format, for modules that are one and the same in both."""
    if not is_blip(network.config):
        return {name: name for name, _ in network.named_modules()}
    return trained.stock_module_names(weight_table(network.config))
