"""Encoder-decoder translation networks: Marian (OPUS-MT), M2M100 / NLLB, and forms of our own."""

from mmattn.models.decoding import DecoderState, LayerContexts
from mmattn.models.translator.compiled import CompiledDecoder
from mmattn.models.translator.config import TranslatorConfig
from mmattn.models.translator.folders import open_network, save_network
from mmattn.models.translator.model import TranslationOutput, TranslatorNetwork, cross_attention_parameters
from mmattn.models.translator.state import TranslationState
from mmattn.models.translator.stock import Family, family_of

__all__ = [
    "CompiledDecoder",
    "DecoderState",
    "Family",
    "LayerContexts",
    "TranslationOutput",
    "TranslationState",
    "TranslatorConfig",
    "TranslatorNetwork",
    "cross_attention_parameters",
    "family_of",
    "open_network",
    "save_network",
]
