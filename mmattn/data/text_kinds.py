"""Kinds of texts by how often they are drawn: a training needs a text of every picture."""

from __future__ import annotations

from collections.abc import Mapping

from mmattn.data.records import ImageTextSource, read_texts
from mmattn.data.scenes import SceneDataset
from mmattn.data.stream_rows import sample_numbers
from mmattn.errors import ConfigError

_AT_ONCE = 1000
_SAMPLE = 20_000  # of a streamed source


def require_drawn_kinds(source: ImageTextSource, weights: Mapping[str, float]) -> None:
    """Find a record that has nothing to draw before the training that it would end.

    Pictures are not opened where the source knows its texts; of streamed data a part is looked at.

    Args:
        source: Of the training.
        weights: By kind; 1 for kinds that are not named, 0 for those that are never drawn.

    Raises:
        ConfigError: all kinds of a record's texts are never drawn.
    """
    if min(weights.values(), default=1.0) > 0:
        return
    size = min(len(source), _AT_ONCE) if isinstance(source, SceneDataset) else len(source)  # scenes have all kinds
    numbers = sample_numbers(source, _SAMPLE, range(size))
    for start in range(0, len(numbers), _AT_ONCE):
        chosen = numbers[start : start + _AT_ONCE]
        for number, items in zip(chosen, read_texts(source, chosen), strict=True):
            kinds = sorted({item.kind for item in items})
            if not any(weights.get(kind, 1.0) > 0 for kind in kinds):
                raise ConfigError(
                    f"examples.kind_weights: record {number + 1} of {source.name} has no text that is ever drawn, "
                    f"only {', '.join(kinds)}: give one of these a weight above 0, or leave such records out"
                )
