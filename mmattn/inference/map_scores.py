"""Do attention maps lie where the objects are? Scores on scenes, where every object's pixels are known.

A map scores by the pointing game (its strongest cell holds pixels of the object) and by the intersection over union of
its strong part with the object. Beside each stands chance: the same maps against the objects of other pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mmattn.data.scenes import SceneDataset
from mmattn.data.scenes.dataset import ObjectRegion
from mmattn.data.scenes.translation import SceneTranslations
from mmattn.data.translation_tokens import PairTokenizer
from mmattn.errors import UsageError
from mmattn.inference.alignment_scores import alignment_scores
from mmattn.inference.translator import Translator
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.maps.record import AttentionMaps, record_attention

THRESHOLD = 0.5  # of a map's strongest place; above it is its strong part
_SHARES = tuple(share / 100 for share in range(10, 75, 5))  # that are tried


class Spot(NamedTuple):
    """Where a map of an object is read: layer, head, and which of the object's words (0 size, 1 colour, 2 shape)."""

    layer: int
    head: int
    word: int

    def __str__(self) -> str:
        return f"layer {self.layer} head {self.head} at the {('size', 'colour', 'shape')[self.word]}"


class ScoredMap(NamedTuple):
    """What is known of one object: its picture's number, its pixels, bool `[H, W]`, and maps of its words, `[rows,
    columns]`, by spot."""

    picture: int
    mask: np.ndarray
    maps: dict[Spot, np.ndarray]


def points_at(values: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the strongest cell of a map `[rows, columns]` holds pixels of an object, bool `[H, W]`."""
    (rows, columns), (height, width) = values.shape, mask.shape
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    cell = mask[
        row * height // rows : -(-(row + 1) * height // rows),
        column * width // columns : -(-(column + 1) * width // columns),
    ]
    return bool(cell.any())


def overlap(values: np.ndarray, mask: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Intersection over union of an object's pixels, bool `[H, W]`, with the part of a map, interpolated to them, that
    is above a share of the way from its least to its most."""
    return _overlap(_resized(values, mask.shape), mask, threshold)


def _resized(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    grid = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))[None, None]
    return F.interpolate(grid, size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()


def _overlap(full: np.ndarray, mask: np.ndarray, threshold: float) -> float:
    low, high = float(full.min()), float(full.max())
    strong = full > low + threshold * (high - low) if high > low else np.zeros_like(mask)
    union = int((strong | mask).sum())
    return float((strong & mask).sum() / union) if union else 0.0


def map_scores(objects: Sequence[ScoredMap], spots: Sequence[Spot], threshold: float = THRESHOLD) -> dict[str, float]:
    """`maps/pointing` and `maps/iou` of the mean of some spots' maps, each with `/chance` beside it.

    Args:
        objects: of any number of pictures, in their order.
        spots: whose maps are averaged.
        threshold: see `overlap`.

    Raises:
        UsageError: there are no objects, or those of one picture only, which have nothing to be compared with.
    """
    if not objects:
        raise UsageError("no map to score: the model named no object right")
    if len({scored.picture for scored in objects}) < 2:
        raise UsageError("no chance level: the model named objects of one picture only; score more scenes")
    means = [_mean(scored, spots) for scored in objects]
    masks = [scored.mask for scored in objects]
    others = _masks_of_others(objects)
    scores = {}
    for name, against in (("", masks), ("/chance", others)):
        pairs = list(zip(means, against, strict=True))
        scores[f"maps/pointing{name}"] = float(np.mean([points_at(*pair) for pair in pairs]))
        scores[f"maps/iou{name}"] = float(np.mean([overlap(*pair, threshold) for pair in pairs]))
    return scores


def _masks_of_others(objects: Sequence[ScoredMap]) -> list[np.ndarray]:
    """For each object one of another picture: the first from half-way round on."""
    count = len(objects)
    found = []
    for number, scored in enumerate(objects):
        places = ((number + count // 2 + step) % count for step in range(count))
        found.append(next(objects[place].mask for place in places if objects[place].picture != scored.picture))
    return found


def best_spots(objects: Sequence[ScoredMap], most: int = 6) -> tuple[list[Spot], float]:
    """The layers, heads and words whose mean map overlaps the objects most, taken one after the other while it gains,
    and the threshold at which it does.

    Args:
        objects: on which they are chosen; score on others.
        most: spots at most.
    """
    found, threshold, best = [], THRESHOLD, -1.0
    candidates = sorted(objects[0].maps) if objects else []
    while len(found) < min(most, len(candidates)):
        trials = [
            (score, spot, share)
            for spot in candidates
            if spot not in found
            for share, score in zip(_SHARES, _mean_overlaps(objects, [*found, spot]), strict=True)
        ]
        score, spot, share = max(trials)
        if score <= best:
            break
        best, threshold = score, share
        found.append(spot)
    return found, threshold


def _mean_overlaps(objects: Sequence[ScoredMap], spots: Sequence[Spot]) -> list[float]:
    """Of the spots' mean maps, for each of the thresholds."""
    overlaps = []
    for scored in objects:
        full = _resized(_mean(scored, spots), scored.mask.shape)
        overlaps.append([_overlap(full, scored.mask, share) for share in _SHARES])
    return [float(each) for each in np.mean(overlaps, axis=0)]


def _mean(scored: ScoredMap, spots: Sequence[Spot]) -> np.ndarray:
    """At the finest grid among them, each map scaled to a sum of 1."""
    shape = max((scored.maps[spot].shape for spot in spots), key=lambda sizes: sizes[0] * sizes[1])
    parts = []
    for spot in spots:
        full = _resized(scored.maps[spot], shape)
        parts.append(full / max(float(full.sum()), 1e-12))
    return np.mean(parts, axis=0)


def caption_maps(vlm: VisionLanguageModel, source: SceneDataset, numbers: Sequence[int]) -> list[ScoredMap]:
    """Maps of the objects that captions name, by layer and head; pictures that are captioned wrongly are left out."""
    found: list[ScoredMap] = []
    for number in numbers:
        record = source[number]
        with record_attention(vlm) as maps:
            caption = vlm.caption(record.image)
        if caption != record.texts[0].text:
            continue
        found += object_maps(maps, 0, caption, source.regions(number), number)
    return found


def object_maps(
    maps: AttentionMaps, text: int, caption: str, regions: Sequence[ObjectRegion], picture: int
) -> list[ScoredMap]:
    """Maps of the objects that a caption names, by each of their words: a model that says "a large red circle" looks at
    the object for all of them, by other heads and at other parts of it.

    Args:
        maps: what was recorded.
        text: number of the caption in `maps.texts`.
        caption: what was said, a space between words.
        regions: the objects.
        picture: their picture's number.
    """
    words, found = caption.split(), []
    for region in regions:
        by_spot: dict[Spot, np.ndarray] = {}
        for number, word in enumerate(region.words):
            occurrence = words[: region.start + number].count(word)
            by_spot |= maps_by_spot(maps, text, word, occurrence, number)
        found.append(ScoredMap(picture, region.mask, by_spot))
    return found


def maps_by_spot(maps: AttentionMaps, text: int, word: str, occurrence: int, number: int) -> dict[Spot, np.ndarray]:
    """A word's map of every recorded layer and head; it is the object's word of that number."""
    return {
        Spot(layer, head, number): maps.heatmap(word, text, layer=layer, head=head, occurrence=occurrence).values
        for layer, weights in maps.texts[text].weights.items()
        for head in range(weights.shape[-3])
    }


def scored_scenes(
    read: Callable[[Sequence[int]], list[ScoredMap]], count: int, tuning: int
) -> tuple[dict[str, float], list[Spot], float]:
    """Choose layers, heads, words and threshold on some scenes, and score them on others.

    Args:
        read: numbers of scenes to the maps of their objects.
        count: scenes that are scored.
        tuning: further scenes on which is chosen.

    Returns:
        As `map_scores`, the spots and the threshold.

    Raises:
        UsageError: nothing to choose on, or to score.
    """
    chosen_on = read(range(count, count + tuning))
    if not chosen_on:
        raise UsageError("no map to choose layers by: the model named no object right; has it been trained on scenes?")
    spots, threshold = best_spots(chosen_on)
    return map_scores(read(range(count)), spots, threshold), spots, threshold


def translation_scores(translator: Translator, count: int) -> dict[str, float]:
    """`alignment/precision`, `/recall` and `/f1` on scenes sentences of the test split, and the F1 of links to random
    source words as `alignment/f1/chance`.

    Raises:
        UsageError: the model does not translate scenes, or none of them is aligned.
    """
    pairs = list(SceneTranslations("test", size=count))
    tokenizer = PairTokenizer(translator.tokenizer, language_codes={})
    scores = alignment_scores(translator.network, tokenizer, pairs)
    if not scores:
        raise UsageError("no sentence has an alignment to compare with")
    # A random source word is right for a target word once in as many words as the source has.
    right = sum(len(pair.alignment or ()) / len(pair.source.split()) for pair in pairs)
    given = sum(len(pair.target.split()) for pair in pairs)
    gold = sum(len(pair.alignment or ()) for pair in pairs)
    return scores | {"alignment/f1/chance": 2 * right / (given + gold)}
