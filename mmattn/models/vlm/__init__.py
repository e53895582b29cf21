"""Vision-language networks: an image encoder, and a text network that attends to its features."""

from mmattn.models.decoding import DecoderState, LayerContexts
from mmattn.models.scoring import TextOutput
from mmattn.models.vlm.compiled import CompiledDecoder
from mmattn.models.vlm.config import ImageEncoderConfig, TextConfig, VLMConfig
from mmattn.models.vlm.folders import open_network, save_network
from mmattn.models.vlm.model import (
    CaptioningNetwork,
    MatchingNetwork,
    MatchScores,
    QuestionAnsweringNetwork,
    QuestionStates,
    VisionLanguageNetwork,
    build_network,
    cross_attention_parameters,
)
from mmattn.models.vlm.vision import ImageEncoder

__all__ = [
    "CaptioningNetwork",
    "CompiledDecoder",
    "DecoderState",
    "ImageEncoder",
    "ImageEncoderConfig",
    "LayerContexts",
    "MatchScores",
    "MatchingNetwork",
    "QuestionAnsweringNetwork",
    "QuestionStates",
    "TextConfig",
    "TextOutput",
    "VLMConfig",
    "VisionLanguageNetwork",
    "build_network",
    "cross_attention_parameters",
    "open_network",
    "save_network",
]
