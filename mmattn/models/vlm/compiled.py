"""The text decoder's compiled step of the networks that write: captions and answers."""

from __future__ import annotations

from typing import Any

from mmattn.errors import UsageError
from mmattn.models.compiled_decoder import CompiledSteps
from mmattn.models.vlm.model import CaptioningNetwork, QuestionAnsweringNetwork, VisionLanguageNetwork


class CompiledDecoder(CompiledSteps):
    """`CompiledSteps` of a captioning or question-answering network's decoder.

    Args:
        network: the network.
        **options: of `CompiledSteps`.

    Raises:
        UsageError: a network that writes no text, or as `CompiledSteps`.
    """

    def __init__(self, network: VisionLanguageNetwork, **options: Any) -> None:
        if not isinstance(network, CaptioningNetwork | QuestionAnsweringNetwork):
            raise UsageError(
                f"compile=True compiles the steps of decoding, and a {type(network).__name__} decodes nothing: leave"
                " it out"
            )
        # The context of a caption is a picture, whose size is fixed; that of an answer the question, which varies.
        length = network.config.image.num_features if isinstance(network, CaptioningNetwork) else None
        super().__init__(network.decoder, context_length=length, **options)
