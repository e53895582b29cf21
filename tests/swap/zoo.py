"""Model families with random weights at shrunken real configurations, from stock libraries only."""

from __future__ import annotations

from . import zoo_dits, zoo_sd, zoo_transformers, zoo_unets
from .zoo_base import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = zoo_sd.FAMILIES | zoo_unets.FAMILIES | zoo_dits.FAMILIES | zoo_transformers.FAMILIES
