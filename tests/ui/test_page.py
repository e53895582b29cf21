"""The page in a real browser: what visitors do, what they may do wrong, and what they must not notice of each other."""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import mmattn
from tests.inference.tiny_models import pictures
from tests.inference.tiny_translators import ENGLISH
from tests.ui.conftest import MODEL_PATIENCE, shown_picture

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def vlm(models):
    return mmattn.VisionLanguageModel.from_pretrained(models["own-vlm"], device="cpu")


def send(page, path):
    page.locator(".given input[type=file]").first.set_input_files(path)


def test_caption_question_and_the_map_of_a_word(visit, vlm, tmp_path):
    image = pictures(1, seed=3)[0]
    image.save(tmp_path / "a.png")
    page = visit()
    send(page, tmp_path / "a.png")
    page.locator(".preview img").first.wait_for()
    page.get_by_role("button", name="Caption").click()
    page.get_by_role("radio", name="all words").wait_for(timeout=MODEL_PATIENCE)
    with mmattn.record_attention(vlm) as maps:
        caption = vlm.caption(image)
    assert page.get_by_label("The model says").first.input_value() == caption
    assert same(shown_picture(page, ".map"), maps.heatmap().draw(beside=False))

    page.get_by_label("Question").fill("is the red circle left ?")
    page.get_by_role("button", name="Ask").click()
    word = page.get_by_role("radio", name="circle").first
    word.wait_for(timeout=MODEL_PATIENCE)
    with mmattn.record_attention(vlm) as maps:
        answer = vlm.ask(image, "is the red circle left ?")
    assert page.get_by_label("The model says").first.input_value() == answer
    changes_map(page, word.click)
    assert same(shown_picture(page, ".map"), maps.heatmap("circle").draw(beside=False))

    page.get_by_role("button", name="Layer and head").first.click()
    page.get_by_label("Head").first.click()
    changes_map(page, page.get_by_role("option", name="head 1").click)
    assert same(shown_picture(page, ".map"), maps.heatmap("circle", head=1).draw(beside=False))


def changes_map(page, act):
    """Do something, and wait until another map is there."""
    before = page.locator(".map img >> visible=true").first.get_attribute("src")
    act()
    page.wait_for_function(
        "before => [...document.querySelectorAll('.map img')].some(i => i.offsetParent && i.src != before)",
        arg=before,
        timeout=MODEL_PATIENCE,
    )


def same(one, other):
    return one.size == other.size and bool((np.asarray(one) == np.asarray(other)).all())


def test_a_text_is_matched(visit, models, tmp_path):
    image = pictures(1, seed=5)[0]
    image.save(tmp_path / "a.png")
    page = visit(tab="blip-match")
    page.locator(".given input[type=file] >> nth=1").set_input_files(tmp_path / "a.png")
    page.get_by_label("Text", exact=True).last.fill("a red circle")
    page.get_by_role("button", name="Match").click()
    page.get_by_role("radio", name="circle").last.wait_for(timeout=MODEL_PATIENCE)
    matching = mmattn.VisionLanguageModel.from_pretrained(models["blip-match"], device="cpu")
    share = matching.match(image, "a red circle")
    assert page.get_by_label("The model says").last.input_value() == f"{share:.1%} that they belong together"


def test_a_translation_and_its_alignment(visit, models):
    translator = mmattn.Translator.from_pretrained(models["translator"], device="cpu")
    texts = f"{ENGLISH[0]}\n{ENGLISH[1]}"
    page = visit(tab="translator")
    page.get_by_placeholder("The cat sleeps.").fill(texts)
    page.get_by_role("button", name="Translate").click()
    page.get_by_label("Strongest source word").wait_for(timeout=MODEL_PATIENCE)
    with mmattn.record_attention(translator) as maps:
        translation = translator.translate(texts)
    assert page.get_by_label("Translation").input_value() == translation
    assert same(shown_picture(page, ".map"), maps.alignment(0).draw())
    first = page.get_by_label("Strongest source word").input_value()
    assert first == ", ".join(f"{target} ← {source}" for source, target in maps.alignment(0).words())

    page.get_by_label("Part of the text").click()
    changes_map(page, page.get_by_role("option", name=re.compile("^2: ")).click)
    assert same(shown_picture(page, ".map"), maps.alignment(1).draw())


def generated(page):
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("radio", name="circle").last.wait_for(timeout=MODEL_PATIENCE)
    at_rest(page)


def at_rest(page):
    """Wait until nothing is being worked on: what is still to come would be taken for what the next act does."""
    page.wait_for_function("() => !document.querySelector('.eta-bar, .progress-text')", timeout=MODEL_PATIENCE)


def test_a_steered_picture_beside_the_plain_one(visit, models):
    t2i = mmattn.TextToImage.from_pretrained(models["drawing"], device="cpu")
    page = visit(tab="drawing")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("number input for Steps").fill("5")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Steer").click()
    page.get_by_label("Weights of words").fill("red = 3")
    changes_field(page, lambda: page.get_by_label("Regions of phrases").fill("a red circle = 0, 0, 1, 0.5"))
    draw_box(page, "a blue square", (0.1, 0.9), (0.9, 0.5))
    written = page.get_by_label("Regions of phrases").input_value()
    phrase, box = written.splitlines()[1].split(" = ")
    box = tuple(float(side) for side in box.split(","))
    assert phrase == "a blue square"
    assert np.abs(np.array(box) - (0.1, 0.5, 0.9, 0.9)).max() < 0.02
    generated(page)
    regions = {"a red circle": (0.0, 0.0, 1.0, 0.5), "a blue square": box}
    asked = {"num_inference_steps": 5, "guidance_scale": 5.0, "seed": 7}
    with (
        mmattn.record_attention(t2i) as maps,
        mmattn.steer_attention(t2i, weights={"red": 3.0}, regions=regions, steps=0.4),
    ):
        steered = t2i.generate(PROMPT, **asked)[0]
    plain = t2i.generate(PROMPT, **asked)[0]
    assert not same(steered, plain)
    assert same(shown_picture(page, ".drawn >> nth=0 >>"), steered)
    assert same(shown_picture(page, ".drawn >> nth=1 >>"), plain)
    changes_map(page, page.get_by_role("radio", name="circle").last.click)
    assert same(shown_picture(page, ".map"), maps.heatmap("circle").draw(beside=False))


def draw_box(page, phrase, one, other):
    """Click two corners; written regions are drawn by now."""
    page.get_by_label("Phrase of the next region").fill(phrase)
    changes_field(page, lambda: click_field(page, *one))
    at_rest(page)
    click_field(page, *other)
    page.wait_for_function(
        "phrase => [...document.querySelectorAll('textarea')].some(t => t.value.includes(phrase + ' ='))",
        arg=phrase,
        timeout=MODEL_PATIENCE,
    )


def click_field(page, x, y):
    field = page.locator(".field img")
    sides = field.bounding_box()
    field.click(position={"x": x * sides["width"], "y": y * sides["height"]})


def changes_field(page, act):
    at_rest(page)
    before = page.locator(".field img").get_attribute("src")
    act()
    page.wait_for_function(
        "before => document.querySelector('.field img').src != before", arg=before, timeout=MODEL_PATIENCE
    )


def test_an_edited_prompt(visit, models):
    t2i = mmattn.TextToImage.from_pretrained(models["drawing"], device="cpu")
    page = visit(tab="drawing")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("number input for Steps").fill("5")
    page.get_by_role("button", name="Steer").click()
    page.get_by_label("Edited prompt").fill(PROMPT.replace("red", "green"))
    generated(page)
    with mmattn.steer_attention(t2i, edit="replace"):
        images = t2i.generate([PROMPT, PROMPT.replace("red", "green")], num_inference_steps=5, guidance_scale=5.0)
    assert same(shown_picture(page, ".drawn >> nth=0 >>"), images[1])
    assert same(shown_picture(page, ".drawn >> nth=1 >>"), images[0])

    page.get_by_label("Edited prompt").fill("a circle")
    page.get_by_role("button", name="Generate").click()
    said = page.get_by_role("alert").last
    said.wait_for(timeout=MODEL_PATIENCE)
    assert "'replace' swaps words one for one" in said.inner_text()


def huge_png(side):
    """A picture of one colour, which says that it has side x side pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD_FILES = [
    ("text.png", b"this is a text", "text.png: not a picture; give one of PNG, JPEG"),
    ("post.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "post.png: not a picture"),
    ("huge.png", huge_png(30_000), "huge.png: picture too large"),
    ("cut.png", huge_png(64)[:50], "cut.png: damaged picture"),
    ("<b>x.png", b"no", "bx.png: not a picture"),
]


def test_a_bad_file_is_told_and_taken_away(visit, tmp_path):
    page = visit()
    for name, content, message in BAD_FILES:
        (tmp_path / name).write_bytes(content)
        send(page, tmp_path / name)
        page.get_by_role("alert").filter(has_text=message).wait_for()
        page.locator(".preview img").wait_for(state="hidden")
    page.get_by_role("button", name="Caption").click()
    page.get_by_text("no picture yet").wait_for()
    pictures(1)[0].save(tmp_path / "good.png")
    send(page, tmp_path / "good.png")
    page.get_by_role("alert").first.wait_for(state="detached")
    page.get_by_role("button", name="Caption").click()
    page.get_by_role("radio", name="all words").wait_for(timeout=MODEL_PATIENCE)


def test_a_file_of_too_many_bytes_is_not_taken(visit, tmp_path):
    (tmp_path / "big.png").write_bytes(bytes(21 * 2**20))
    page = visit()
    send(page, tmp_path / "big.png")
    page.get_by_text(re.compile("exceed", re.IGNORECASE)).first.wait_for()
    assert page.locator(".preview img").count() == 0


def test_two_visitors_do_not_mix(visit, vlm, tmp_path):
    first, second = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue"))
    one, other = vlm.caption([first, second])
    assert one != other
    pages = [visit(), visit()]
    for number, (page, image) in enumerate(zip(pages, (first, second), strict=True)):
        image.save(tmp_path / f"{number}.png")
        send(page, tmp_path / f"{number}.png")
        page.locator(".preview img").first.wait_for()
    for page in pages:
        page.get_by_role("button", name="Caption").click()
    for page, caption, image in zip(pages, (one, other), (first, second), strict=True):
        page.get_by_role("radio", name="all words").wait_for(timeout=MODEL_PATIENCE)
        assert page.get_by_label("The model says").first.input_value() == caption
        assert same(shown_picture(page, ".map"), map_of(vlm, image))
    word = other.split()[0]
    changes_map(pages[1], pages[1].get_by_role("radio", name=word, exact=True).first.click)
    assert same(shown_picture(pages[1], ".map"), map_of(vlm, second, word))
    assert same(shown_picture(pages[0], ".map"), map_of(vlm, first))


def map_of(vlm, image, word=None):
    with mmattn.record_attention(vlm) as maps:
        vlm.caption(image)
    return maps.heatmap(word).draw(beside=False)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(visit, width, tmp_path):
    pictures(1)[0].save(tmp_path / "a.png")
    page = visit(width=width, height=844)
    send(page, tmp_path / "a.png")
    page.get_by_role("button", name="Caption").click()
    page.get_by_role("radio", name="all words").wait_for(timeout=MODEL_PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    size = page.locator(".map img").first.bounding_box()
    assert 250 < size["width"] <= width


def test_what_is_missing_is_told(visit):
    page = visit()
    page.get_by_role("button", name="Caption").click()
    page.get_by_text("no picture yet: drop one on the field").wait_for()
    page.get_by_role("tab", name="translator").click()
    page.get_by_role("button", name="Translate").click()
    page.get_by_text("no text yet: write one").wait_for()
    page.get_by_role("tab", name="drawing").click()
    page.get_by_role("button", name="Steer").click()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Weights of words").fill("dog = 2")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("'dog' is not in 'a red circle above a blue square'").wait_for(timeout=MODEL_PATIENCE)
    page.get_by_label("Weights of words").fill("red is 2")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("weights, line 1, 'red is 2': write it as in red = 1.6").wait_for()
