"""Score steering on a trained model of scenes: what a region and an edit do, read back by the checker.

    python scripts/accept/scenes_steer.py MODEL_RUN [PICTURES]

Each score stands beside the same prompts and seeds without steering. Regions: each object has a quarter of the picture,
and is right when it is there, alone of its kind, with its colour and shape and its middle in its quarter, and nothing
else is in the picture. Regions count in the first steps, with their phrases strengthened and, of two objects, the
words of the relation hidden. Edits: a colour is replaced; the edited picture has the new colour, the shape of its
source, and its middle within a tenth of the picture of where it was. Only edits whose source picture shows its own
prompt are counted. Prints a line for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lines import report, verdicts
from PIL import Image

import mmattn
from mmattn.data.scenes.checker import read_objects
from mmattn.data.scenes.layout import SIZES, TRAINED_PAIRS, SceneObject
from mmattn.inference.text_to_image import TextToImage
from mmattn.inference.trained import trained_model
from mmattn.maps import PromptEdit

GUIDANCE, STEPS, AT_ONCE = 2.0, 25, 32
NEAR = 0.1  # of the picture's side
EDIT = PromptEdit("replace", cross_steps=0.8, self_steps=0.4)
QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))
# Boxes of the first and the second object that agree with the relation.
PLACES = {
    "left of": ((0, 2), (1, 3)),
    "right of": ((1, 3), (0, 2)),
    "above": ((0, 1), (2, 3)),
    "below": ((2, 3), (0, 1)),
}

STRENGTH, FIRST_STEPS = 4.0, 0.4

Pair = tuple[str, str]
Box = tuple[float, float, float, float]


class Wanted(NamedTuple):
    """An object and where it is to be."""

    pair: Pair
    phrase: str
    box: Box


Case = tuple[str, list[Wanted]]


def phrase_of(size: str, pair: Pair) -> str:
    return f"a {size} {pair[0]} {pair[1]}"


def draw(model: TextToImage, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[SceneObject, ...]]:
    """What is in the pictures of some prompts."""
    drawn: list[Image.Image] = model.generate(
        list(prompts),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=list(seeds),
        batch_size=AT_ONCE,
        progress=False,
    )
    return [read_objects(np.asarray(picture)) for picture in drawn]


def is_placed(objects: Sequence[SceneObject], wanted: Sequence[Wanted]) -> bool:
    """Whether each object is there, once, with its middle in its box, and nothing else is."""
    found = [[item for item in objects if item.pair == want.pair] for want in wanted]
    return len(objects) == len(wanted) and all(
        len(items) == 1 and want.box[0] <= items[0].x <= want.box[2] and want.box[1] <= items[0].y <= want.box[3]
        for items, want in zip(found, wanted, strict=True)
    )


def is_right(objects: Sequence[SceneObject], wanted: Sequence[Wanted]) -> bool:
    """Whether the objects are those wanted, wherever they are."""
    return sorted(item.pair for item in objects) == sorted(want.pair for want in wanted)


def share(
    rule: Callable[[Sequence[SceneObject], Sequence[Wanted]], bool],
    found: Sequence[Sequence[SceneObject]],
    cases: Sequence[Case],
) -> float:
    """Of the pictures that keep a rule."""
    return float(np.mean([rule(objects, wanted) for objects, (_, wanted) in zip(found, cases, strict=True)]))


def one_object(count: int) -> list[Case]:
    """Prompts of one object, and a quarter of the picture for it."""
    cases = []
    for number in range(count):
        pair = TRAINED_PAIRS[7 * number % len(TRAINED_PAIRS)]
        phrase = phrase_of(SIZES[number % 2], pair)
        cases.append((phrase, [Wanted(pair, phrase, QUARTERS[number % 4])]))
    return cases


def two_objects(count: int) -> list[Case]:
    """Prompts of two small objects in a relation, and a quarter of the picture for each."""
    cases = []
    for number in range(count):
        pairs = sorted({TRAINED_PAIRS[(7 * number + step) % len(TRAINED_PAIRS)] for step in (0, 11)})
        relation = list(PLACES)[number % 4]
        corners = [corners[number // 4 % 2] for corners in PLACES[relation]]
        phrases = [phrase_of("small", pair) for pair in pairs]
        wanted = [Wanted(*item) for item in zip(pairs, phrases, [QUARTERS[c] for c in corners], strict=True)]
        cases.append((f"{phrases[0]} {relation} {phrases[1]}", wanted))
    return cases


def steering(prompt: str, wanted: Sequence[Wanted]) -> dict[str, Any]:
    """Boxes, in the first steps, with their phrases strengthened and the relation hidden."""
    weights = {want.phrase: STRENGTH for want in wanted} | {name: 0.0 for name in PLACES if name in prompt}
    return {"regions": {want.phrase: want.box for want in wanted}, "weights": weights, "steps": FIRST_STEPS}


def score_regions(model: TextToImage, what: str, cases: Sequence[Case], goal: float | None) -> None:
    """One call for each case: a region is one for all prompts of a call. Without a goal: better than without."""
    plain = draw(model, [prompt for prompt, _ in cases], range(len(cases)))
    steered: list[tuple[SceneObject, ...]] = []
    for number, (prompt, wanted) in enumerate(cases):
        with mmattn.steer_attention(model, **steering(prompt, wanted)):
            steered += draw(model, [prompt], [number])
    before, after = (share(is_placed, found, cases) for found in (plain, steered))
    is_ok = after > before if goal is None else after >= goal
    shown = "more than without" if goal is None else f"at least {goal:.0%}"
    report(f"regions, {what}: in their boxes, without and with", f"{before:.0%} -> {after:.0%}", shown, is_ok)
    before, after = (share(is_right, found, cases) for found in (plain, steered))
    report(f"regions, {what}: the right objects anywhere", f"{before:.0%} -> {after:.0%}", "reported", True)


def score_edits(model: TextToImage, count: int) -> None:
    """A colour is replaced: [source, edited] pairs, with and without the edit."""
    prompts, seeds, changes = [], [], []
    for number in range(count):
        source = TRAINED_PAIRS[7 * number % len(TRAINED_PAIRS)]
        others = [pair for pair in TRAINED_PAIRS if pair[1] == source[1] and pair != source]
        edited = others[number % len(others)]
        prompts += [phrase_of(SIZES[number % 2], pair) for pair in (source, edited)]
        seeds += [number, number]
        changes.append((source, edited))
    plain = draw(model, prompts, seeds)
    with mmattn.steer_attention(model, edit=EDIT):
        edited = draw(model, prompts, seeds)
    counted = [
        number
        for number, (source, _) in enumerate(changes)
        if len(plain[2 * number]) == 1 and plain[2 * number][0].pair == source
    ]
    rows = {"colour": [], "shape": [], "place": [], "all three": []}
    for found in (plain, edited):
        judged = [judge(found[2 * number], found[2 * number + 1], changes[number][1][0]) for number in counted]
        for name, share in zip(rows, np.mean(judged, axis=0), strict=True):
            rows[name].append(share)
    report("edits counted, of all", f"{len(counted)} of {count}", "reported", True)
    for name, (without, with_edit) in rows.items():
        goal = 0.8 if name == "all three" else None
        shown = "reported" if goal is None else f"at least {goal:.0%}"
        what = f"edit of a colour: {name} as wanted, without and with"
        report(what, f"{without:.0%} -> {with_edit:.0%}", shown, goal is None or with_edit >= goal)


def judge(source: Sequence[SceneObject], edited: Sequence[SceneObject], color: str) -> tuple[bool, bool, bool, bool]:
    """New colour, old shape, old place, and all three."""
    if len(edited) != 1:
        return False, False, False, False
    before, after = source[0], edited[0]
    is_near = max(abs(before.x - after.x), abs(before.y - after.y)) <= NEAR
    found = (after.color == color, after.shape == before.shape, is_near)
    return (*found, all(found))


def main() -> int:
    """Score everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="MODEL_RUN")
    parser.add_argument("pictures", type=int, nargs="?", default=96, metavar="PICTURES")
    options = parser.parse_args()
    count = options.pictures
    model = TextToImage.from_pretrained(trained_model(options.run), device="cpu")
    score_regions(model, "one object", one_object(count), 0.8)
    score_regions(model, "two objects", two_objects(count), None)
    score_edits(model, count)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
