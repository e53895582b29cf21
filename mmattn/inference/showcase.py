"""What a trained model says about scenes, and where it looked: the last part of `mmattn demo`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from mmattn.data.records import ImageTextRecord
from mmattn.data.scenes import SceneDataset
from mmattn.inference.map_scores import points_at
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.maps.record import AttentionMaps, record_attention

Spot = tuple[int, int]  # layer, head


def print_scores(scores: Mapping[str, float]) -> None:
    """Print each score beside that of the baseline that sees no picture."""
    names = [name for name in scores if not name.endswith("/blind")]
    width = max(map(len, names))
    print(f"{'':{width}}  model  without the picture")
    for name in names:
        blind = scores.get(f"{name}/blind")
        print(f"{name:{width}}  {scores[name]:5.1%}  {'' if blind is None else f'{blind:5.1%}'}")


def show(vlm: VisionLanguageModel, source: SceneDataset, folder: Path, *, count: int = 3, trials: int = 60) -> bool:
    """Caption and question some pictures, and draw where the model looked for the object that it named first.

    Args:
        vlm: a model trained on scenes.
        source: scenes that it never saw; the first `count` are shown, later ones choose the layer and head to draw.
        folder: gets `captions.txt` and for each picture `NUMBER.png` and `NUMBER_WORD.png`.
        count: pictures shown.
        trials: pictures on which the layer and head that point best are found.

    Returns:
        Whether the brightest spot lay on the named object in the first picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spot, rate = best_spot(vlm, source, range(count, count + trials))
    lines: list[str] = []
    hits: list[bool] = []
    for index in range(count):
        record = source[index]
        lines += _speak(vlm, record)
        picture = Image.fromarray(record.image)
        picture.resize((256, 256), Image.Resampling.NEAREST).save(folder / f"{index}.png")
        hit = _draw(vlm, source, index, spot, folder)
        if hit is not None:
            word, path, is_hit = hit
            hits.append(is_hit)
            lines.append(f"  looked for {word!r}: {path} (peak {'on' if is_hit else 'off'} the object: {is_hit})")
    lines.append(
        f"over {trials} other pictures the peak lay on the object in {rate:.0%} (layer {spot[0]}, head {spot[1]})"
    )
    text = "\n".join(lines)
    (folder / "captions.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return bool(hits) and hits[0]


def best_spot(vlm: VisionLanguageModel, source: SceneDataset, numbers: range) -> tuple[Spot, float]:
    """The layer and head whose most attended cell lies most often on the object that the caption names first.

    Args:
        vlm: a model trained on scenes.
        source: scenes.
        numbers: which of its pictures to try; those that the model captions wrongly do not count.

    Returns:
        (layer, head), and the share of pictures in which it points right; (0, 0) and 0.0 when no caption was right.
    """
    hits: dict[Spot, int] = {}
    tried = 0
    for index in numbers:
        maps = _record(vlm, source[index])
        if maps is None:
            continue
        tried += 1
        for layer, weights in maps.texts[0].weights.items():
            for head in range(weights.shape[0]):
                hits[layer, head] = hits.get((layer, head), 0) + points_right(maps, source, index, (layer, head))
    if not hits:
        return (0, 0), 0.0
    spot = max(hits, key=lambda key: hits[key])
    return spot, hits[spot] / tried


def points_right(maps: AttentionMaps, source: SceneDataset, index: int, spot: Spot) -> bool:
    """Whether the most attended cell of the picture's grid holds pixels of the object that the caption names first."""
    region = source.regions(index)[0]
    heatmap = maps.heatmap(region.words[2], layer=spot[0], head=spot[1])
    return points_at(heatmap.values, region.mask)


def _record(vlm: VisionLanguageModel, record: ImageTextRecord) -> AttentionMaps | None:
    """The maps of a caption, or None when the caption is wrong."""
    with record_attention(vlm) as maps:
        caption = vlm.caption(record.image)
    return maps if caption == record.texts[0].text else None


def _speak(vlm: VisionLanguageModel, record: ImageTextRecord) -> list[str]:
    pictures = vlm.encode(record.image)
    asked = [item for item in record.texts if item.question is not None][:5]
    lines = [f"{record.id}", f"  caption: {vlm.caption(pictures)}   (true: {record.texts[0].text})"]
    answers = vlm.ask(pictures, [item.question or "" for item in asked])
    for item, answer in zip(asked, answers, strict=True):
        lines.append(f"  {item.question} {answer}" + ("" if answer == item.text else f"   (true: {item.text})"))
    return lines


def _draw(
    vlm: VisionLanguageModel, source: SceneDataset, index: int, spot: Spot, folder: Path
) -> tuple[str, Path, bool] | None:
    """Draw the map of the first object's noun; its word, file, and whether the peak lies on the object."""
    maps = _record(vlm, source[index])
    if maps is None:
        return None
    word = source.regions(index)[0].words[2]
    path = folder / f"{index}_{word}.png"
    maps.heatmap(word, layer=spot[0], head=spot[1]).save(path)
    return word, path, points_right(maps, source, index, spot)
