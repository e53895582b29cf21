"""Attention maps: the true weights, on results that do not change, drawn where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmattn.errors import UsageError
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.maps import Heatmap, record_attention
from mmattn.maps.draw import viridis
from tests.inference.tiny_models import STOCK, blip_processor, pictures, save_own, save_stock

QUESTION = "is the red circle left of the cats ?"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return VisionLanguageModel.from_pretrained(save_own(tmp_path_factory.mktemp("own")), device="cpu")


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    return save_stock(tmp_path_factory.mktemp("stock"), "captioning")


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3, "max_new_tokens": 9}], ids=str)
def test_results_stay_the_same(own, generation):
    images = pictures(3)
    plain = own.ask(images, [[QUESTION, "what ?"]] * 3, return_scores=True, **generation)
    with record_attention(own) as maps:
        recorded = own.ask(images, [[QUESTION, "what ?"]] * 3, return_scores=True, **generation)
    assert recorded == plain
    assert len(maps) == 6
    own.caption(images)
    assert len(maps) == 6, "what happens after the block isn't recorded"


def test_weights_equal_stock(stock_folder):
    model = VisionLanguageModel.from_pretrained(stock_folder, device="cpu")
    image = pictures(1)[0]
    with record_attention(model) as maps, record_attention(model, role="self") as self_maps:
        model.caption(image, prompt="a picture of", min_new_tokens=6)
    stock = STOCK["captioning"].from_pretrained(stock_folder, attn_implementation="eager").eval()
    inputs = blip_processor()(images=image, text="a picture of", return_tensors="pt")
    with torch.no_grad():
        tokens = stock.generate(**inputs, min_new_tokens=6)
        tokens = tokens[:, :-1] if tokens[0, -1] == 3 else tokens
        features = stock.vision_model(inputs["pixel_values"]).last_hidden_state
        output = stock.text_decoder(tokens, encoder_hidden_states=features, output_attentions=True)
    for layer in range(2):
        expected = output.cross_attentions[layer][0]
        assert torch.allclose(maps.texts[0].weights[layer], expected, atol=1e-6)
        assert torch.allclose(self_maps.texts[0].weights[layer], output.attentions[layer][0], atol=1e-6)
    mean = torch.stack(output.cross_attentions)[:, 0].mean(dim=(0, 1)).numpy()
    assert np.allclose(maps.array(), mean, atol=1e-6)
    assert np.allclose(maps.array(layer=1, head=0), output.cross_attentions[1][0, 0].numpy(), atol=1e-6)
    # "picture" was given: its own query; the first new token was chosen by the query of "of".
    assert np.allclose(maps.heatmap("picture").values.flatten(), mean[2, 1:], atol=1e-6)
    generated = maps.texts[0].text.pieces[4:]
    first = next(place for place, piece in enumerate(generated) if piece)
    spoken = generated[first]
    if spoken not in ["a", "picture", "of"]:
        assert np.allclose(maps.heatmap(spoken).values.flatten(), mean[3 + first, 1:], atol=1e-6)
        assert np.allclose(maps.heatmap(spoken, place="reading").values.flatten(), mean[4 + first, 1:], atol=1e-6)


@pytest.mark.parametrize(("task", "verb"), [("question_answering", "ask"), ("matching", "match")])
def test_questions_and_matched_texts_are_recorded(task, verb, tmp_path):
    model = VisionLanguageModel.from_pretrained(save_stock(tmp_path, task), device="cpu")
    with record_attention(model, layers=1, heads=[1]) as maps:
        getattr(model, verb)(pictures(2), QUESTION)
    assert len(maps) == 2
    assert set(maps.texts[0].weights) == {1}
    heat = maps.heatmap("red circle", text=1)
    assert heat.values.shape == (3, 3)
    whole_word = maps.heatmap("cats", text=1).values
    pieces = maps.texts[1].weights[1][0, 8:10, 1:].mean(dim=0).reshape(3, 3)
    assert np.allclose(whole_word, pieces.numpy(), atol=1e-6)


def test_long_texts_are_computed_in_chunks(own, monkeypatch):
    image = pictures(1)[0]
    with record_attention(own, role="self") as whole:
        own.ask(image, QUESTION)
    monkeypatch.setattr("mmattn.maps.weights._CHUNK_BYTES", 300)
    with record_attention(own, role="self") as cut:
        own.ask(image, QUESTION)
    assert np.allclose(whole.array(), cut.array(), atol=1e-6)
    assert np.allclose(np.triu(cut.array(), 1), 0)


def test_peak_is_in_the_pictures_own_pixels(tmp_path):
    values = np.zeros((4, 5))
    values[2, 4] = 1.0
    heat = Heatmap(values, Image.new("RGB", (100, 40), "grey"), "dog", "a dog on the right")
    assert heat.peak() == (90.0, 25.0)
    heat.save(tmp_path / "dog.png")
    with Image.open(tmp_path / "dog.png") as drawn:
        assert drawn.width >= 640
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    yellow = np.argwhere((pixels[..., 0] > 190) & (pixels[..., 1] > 170) & (pixels[..., 2] < 110))
    inside = yellow[yellow[:, 0] < drawn.height - 40]  # not the legend
    assert np.median(inside[:, 1]) > 0.85 * drawn.width


def test_an_even_map_can_be_drawn(tmp_path):
    Heatmap(np.full((2, 2), 0.25), Image.new("RGB", (31, 17)), "all " * 40, "").save(tmp_path / "even.png")
    with Image.open(tmp_path / "even.png") as drawn:
        assert drawn.mode == "RGB"
        assert min(drawn.size) > 100


def test_colours_are_even():
    colours = viridis(np.linspace(0, 1, 256)).astype(float)
    assert colours[0].tolist() == [68, 1, 84]
    assert colours[-1].tolist() == [253, 231, 37]
    brightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > -0.5).all()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda maps: maps.heatmap("zebra"), "'zebra' is not in the recorded text 'is the red circle"),
        (lambda maps: maps.heatmap("the", occurrence=2), "'the' is 2 times in"),
        (lambda maps: maps.array(layer=7), r"layers \[7\] were not recorded, only \[0, 1\]"),
        (lambda maps: maps.array(head=[5]), r"heads \[5\] were asked for, 2 were recorded"),
        (lambda maps: maps.array(3), "text 3 was asked for, 1 were recorded"),
    ],
)
def test_wrong_questions_to_the_maps(own, use, message):
    with record_attention(own) as maps:
        own.ask(pictures(1)[0], QUESTION)
    with pytest.raises(UsageError, match=message):
        use(maps)


def test_wrong_use_is_named(own):
    with (
        pytest.raises(UsageError, match="takes a VisionLanguageModel, a Translator, .* not a Linear"),
        record_attention(torch.nn.Linear(1, 1)),
    ):
        pass
    with pytest.raises(UsageError, match="role is 'both'"), record_attention(own, role="both"):  # type: ignore[arg-type]
        pass
    with pytest.raises(UsageError, match="prompts is empty"), record_attention(own, prompts=[]):
        pass
    with record_attention(own, role="self") as maps:
        with pytest.raises(UsageError, match="nothing was recorded"):
            maps.array()
        own.caption(pictures(1))
        with pytest.raises(UsageError, match="needs record_attention"):
            maps.heatmap()
    with record_attention(own, layers=9), pytest.raises(UsageError, match="layers has 9, and there are 2 with cross"):
        own.caption(pictures(1))
    with record_attention(own, heads=9), pytest.raises(UsageError, match=r"heads=\[9\], but there are 2 heads"):
        own.caption(pictures(1))
