"""Where a model looked: attention weights recorded beside the fused forward, as arrays and as pictures."""

from mmattn.maps.alignment import Alignment
from mmattn.maps.draw import Heatmap, HeatmapGrid
from mmattn.maps.edits import PromptEdit
from mmattn.maps.record import AttentionMaps, record_attention
from mmattn.maps.recordings import RecordedPair, RecordedPicture, RecordedText

__all__ = [
    "Alignment",
    "AttentionMaps",
    "Heatmap",
    "HeatmapGrid",
    "PromptEdit",
    "RecordedPair",
    "RecordedPicture",
    "RecordedText",
    "record_attention",
]
