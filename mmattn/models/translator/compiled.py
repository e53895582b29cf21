"""The translator's compiled decoding step, which may read alignments."""

from __future__ import annotations

from typing import Any

from mmattn.models.compiled_decoder import CompiledSteps, Watched
from mmattn.models.static_decoding import StepBuffers
from mmattn.models.translator.model import TranslatorNetwork
from mmattn.nn import SinusoidalPositions


class CompiledDecoder(CompiledSteps):
    """`CompiledSteps` of a translation network's decoder.

    Args:
        network: the network.
        **options: of `CompiledSteps`.
    """

    def __init__(self, network: TranslatorNetwork, **options: Any) -> None:
        super().__init__(network.decoder, **options)
        self._network = network

    def _watched(self) -> Watched:
        return Watched(self._network.config.chosen_alignment_layer, self._network.alignment_reader())

    def _prepare(self, buffers: StepBuffers) -> None:
        embedding = self._network.decoder.embedding
        if isinstance(embedding.positions, SinusoidalPositions):  # its table is made when first asked for
            embedding.positions(buffers.position, buffers.caches[0].dtype)
