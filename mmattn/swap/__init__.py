"""Installing our attention in other people's models, provably and reversibly."""

from mmattn.swap.api import plan_attention_swap as plan_attention_swap
from mmattn.swap.api import swap_attention as swap_attention
from mmattn.swap.swapped import Swap as Swap

__all__ = ["Swap", "plan_attention_swap", "swap_attention"]
