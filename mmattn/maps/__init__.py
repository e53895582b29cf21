"""Where a model looked: attention weights recorded beside the fused forward, as arrays and as pictures."""

from mmattn.maps.draw import Heatmap
from mmattn.maps.record import AttentionMaps, RecordedText, record_attention

__all__ = ["AttentionMaps", "Heatmap", "RecordedText", "record_attention"]
