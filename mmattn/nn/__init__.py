"""Fused transformer blocks on `mmattn.attention`, with separate projections under the ordinary names."""

from mmattn.nn.cross_attention import CrossAttention
from mmattn.nn.feed_forward import FeedForward
from mmattn.nn.fusion import fuse, unfuse
from mmattn.nn.gated_cross_attention import GatedCrossAttention
from mmattn.nn.kv_heads import convert_kv_heads
from mmattn.nn.layer import TransformerLayer
from mmattn.nn.norms import RMSNorm, make_norm
from mmattn.nn.positions import LearnedPositions, RotaryEmbedding, SinusoidalPositions
from mmattn.nn.self_attention import SelfAttention

__all__ = [
    "CrossAttention",
    "FeedForward",
    "GatedCrossAttention",
    "LearnedPositions",
    "RMSNorm",
    "RotaryEmbedding",
    "SelfAttention",
    "SinusoidalPositions",
    "TransformerLayer",
    "convert_kv_heads",
    "fuse",
    "make_norm",
    "unfuse",
]
