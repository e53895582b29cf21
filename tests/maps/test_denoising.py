"""Maps of diffusion models: the true weights of the right rows, on pictures that do not change."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor
from PIL import Image

from mmattn import TextToImage, UNet, record_attention, swap_attention
from mmattn.errors import RunError, UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.maps.recordings import RecordedPicture
from tests.inference.tiny_pipelines import pixel_parts, stable_diffusion, stable_diffusion_xl
from tests.maps.oracle import eager_weights
from tests.swap import zoo_sd, zoo_unets
from tests.swap.diffusers_pieces import draw as embeddings
from tests.swap.diffusers_pieces import run_tiny, tiny_pipeline
from tests.swap.zoo_base import quiet
from tests.tolerance import check_within

PROMPTS = ["a red circle", "a blue star below"]
STEPS = 3
FAMILIES = ["sd1", "sd2", "sdxl", "sd1_controlnet", "sd1_ip_adapter", "sd1_lora"]


def draw(pipe, prompts=PROMPTS, **changes):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": 48, "width": 32}
    settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe(prompts, **settings | changes).images


def state_of(model):
    """Everything that recording might leave behind."""
    return {
        name: (dict(module._forward_hooks), dict(module._forward_pre_hooks), set(vars(module)))
        for name, module in model.named_modules()
    }


def check_maps(maps, run, model, *, rows, tokens=None, steps=None):
    """Recorded weights beside the eager ones in float64 and in float32, averaged as the recorder does."""
    names = maps.layer_names
    with eager_weights(model, names, torch.float64) as reference, eager_weights(model, names, torch.float32) as eager:
        run()
    # Scores are rounded as they are, and weights know them no better.
    slack = 2 * torch.finfo(torch.float32).eps * (1 + reference.largest_score)
    for number in maps.layer_names:
        kept = slice(None) if steps is None else steps
        for picture, row in zip(maps.texts, rows, strict=True):
            columns = slice(None) if picture.kept is None else picture.kept
            expected, low = (
                torch.stack(found[number])[kept, row].mean(dim=(0, 1))[:, columns] for found in (reference, eager)
            )
            got = picture.weights[number][0, 0]
            check_within(got, low, expected, factor=2, what=f"layer {number}", unavoidable=slack)


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_true_weights_and_the_same_pictures(name, swapped):
    family = zoo_sd.FAMILIES[name]
    pipe = family.build()
    # Guidance puts the negative half before: rows 2 and 3 of 4 follow the prompts.
    handle = swap_attention(pipe, parts=["unet"]) if swapped else None
    plain, before = family.run(pipe), state_of(pipe.unet)
    names = set(vars(pipe))
    with record_attention(pipe) as maps:
        recorded = family.run(pipe)
    assert torch.equal(plain, recorded)
    assert state_of(pipe.unet) == before
    assert set(vars(pipe)) == names
    assert len(maps) == 2
    assert maps.array(1).shape[2] == 77
    assert np.allclose(maps.array(1).sum(-1), 1, atol=1e-5)
    if handle is not None:
        assert handle.check() == []
        handle.restore()
    check_maps(maps, lambda: family.run(pipe), pipe.unet, rows=[2, 3])


def test_words_of_prompts_and_the_halves_of_guidance(pipe):
    plain = draw(pipe)
    negatives = ["no green square", "nothing"]
    with record_attention(pipe, tokens=["red circle", "star"]) as maps:
        assert torch.equal(draw(pipe), plain)
    first, second = maps.texts
    assert (first.kept, second.kept) == ([2, 3], [3])
    assert first.words == ["red", "circle"]
    check_maps(maps, lambda: draw(pipe), pipe.unet, rows=[2, 3])
    with record_attention(pipe, guidance="unconditional") as maps:
        draw(pipe, negative_prompt=negatives)
    assert maps.texts[0].prompt.text == negatives[0]
    check_maps(maps, lambda: draw(pipe, negative_prompt=negatives), pipe.unet, rows=[0, 1])
    with record_attention(pipe, guidance="both") as maps:
        draw(pipe, negative_prompt=negatives)
    assert [picture.prompt.text for picture in maps.texts] == negatives + PROMPTS
    with record_attention(pipe) as maps:
        draw(pipe, guidance_scale=1.0, num_images_per_prompt=2)
    assert [picture.prompt.text for picture in maps.texts] == [text for text in PROMPTS for _ in range(2)]


def test_views_by_layer_head_and_step(pipe):
    with record_attention(pipe, views=["head", "step"], layers=[0, "mid_block"], steps=[0, 2]) as maps:
        draw(pipe)
    with eager_weights(pipe.unet, maps.layer_names, torch.float64) as found:
        draw(pipe)
    assert list(maps.layer_names) == [0, 3]
    assert maps.texts[0].weights[0].shape == (2, 2, 24, 11)
    got = maps.array(1, layer=0, head=1, step=2)
    assert np.allclose(got.reshape(24, 11), found[0][2][3, 1], atol=1e-6)
    # Several layers at the finest grid: 6 x 4 rows and columns, the picture is 48 x 32.
    coarse = maps.array(1, layer=3, step=[0, 2])
    assert coarse.shape == (1, 1, 11)
    both = maps.array(1, layer=[0, 3])
    assert both.shape == (6, 4, 11)
    expected = (maps.array(1, layer=0) + coarse) / 2
    assert np.allclose(both, expected, atol=1e-6)
    heat = maps.heatmap("star", 1)
    assert heat.values.shape == (6, 4)
    assert np.allclose(heat.values, both[..., 3], atol=1e-6)


@pytest.mark.parametrize("kind", ["sd", "xl", "pixels"])
def test_our_text_to_image(kind):
    made = {
        "sd": stable_diffusion,
        "xl": stable_diffusion_xl,
        "pixels": lambda: quiet(PixelPipeline(**pixel_parts())),
    }[kind]()
    made.unet = UNet.from_stock(made.unet)
    t2i = TextToImage(made)
    settings = {"num_inference_steps": STEPS, "num_images_per_prompt": 2, "batch_size": 3}
    plain = t2i.generate(PROMPTS, **settings)
    with record_attention(t2i) as maps:
        drawn = t2i.generate(PROMPTS, **settings)
    assert [np.asarray(image).tolist() for image in plain] == [np.asarray(image).tolist() for image in drawn]
    assert [picture.prompt.text for picture in maps.texts] == [text for text in PROMPTS for _ in range(2)]
    assert [picture.image for picture in maps.texts] == drawn
    assert np.allclose(maps.array(2).sum(-1), 1, atol=1e-5)
    assert maps.heatmap("star", 3).image is drawn[3]
    with record_attention(t2i) as maps:
        t2i.generate(PROMPTS, num_inference_steps=STEPS)
    check_maps(maps, lambda: t2i.generate(PROMPTS, num_inference_steps=STEPS), made.unet, rows=[2, 3])


def test_a_pixel_pipeline_by_itself():
    pipe = quiet(PixelPipeline(**pixel_parts()))
    with record_attention(pipe, guidance="both") as maps:
        pipe(PROMPTS, negative_prompt="nothing", num_inference_steps=2, num_images_per_prompt=2)
    texts = [picture.prompt.text for picture in maps.texts]
    assert texts == ["nothing"] * 4 + [text for text in PROMPTS for _ in range(2)]
    assert maps.heatmap("star", 7).values.shape == (3, 2)


def test_a_unet_by_itself(pipe):
    unet, draws = pipe.unet, torch.Generator().manual_seed(3)
    sample, text = (torch.randn(*shape, generator=draws) for shape in ((2, 4, 6, 4), (2, 11, zoo_sd.TEXT)))
    with record_attention(unet, tokens=["star"], prompts=PROMPTS, tokenizer=pipe.tokenizer) as maps, torch.no_grad():
        plain = [unet(sample, time, text).sample for time in (900, 500, 700)]
    assert len(maps) == 4, "a later time begins anew"
    with torch.no_grad():
        assert torch.equal(plain[0], unet(sample, 900, text).sample)
    assert maps.texts[1].counts[(0, -1)] == 2
    assert maps.texts[3].counts[(0, -1)] == 1


def test_training_with_gradient_checkpointing_is_recorded_once(pipe):
    unet = stable_diffusion().unet.train()
    unet.enable_gradient_checkpointing()
    draws = torch.Generator().manual_seed(3)
    sample, text = (torch.randn(*shape, generator=draws) for shape in ((2, 4, 6, 4), (2, 11, zoo_sd.TEXT)))
    unet(sample, 500, text).sample.sum().backward()
    gradients = [parameter.grad.clone() for parameter in unet.parameters()]
    unet.zero_grad()
    with record_attention(unet) as maps:
        unet(sample, 500, text).sample.sum().backward()
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(gradients, unet.parameters(), strict=True))
    assert len(maps) == 2
    assert set(maps.texts[0].counts.values()) == {1}


def test_eager_and_sliced_processors_are_seen_too(pipe):
    with record_attention(pipe) as fused:
        draw(pipe)
    for change in (lambda: pipe.unet.set_attn_processor(AttnProcessor()), lambda: pipe.enable_attention_slicing(1)):
        made = pipe.unet.attn_processors
        change()
        try:
            plain = draw(pipe)
            with record_attention(pipe) as maps:
                assert torch.equal(draw(pipe), plain)
        finally:
            pipe.unet.set_attn_processor(made)
        assert np.allclose(maps.array(1), fused.array(1), atol=1e-5)


def test_two_calls_and_nested_recorders(pipe):
    with record_attention(pipe) as outer:
        draw(pipe, PROMPTS[:1])
        with record_attention(pipe, layers=0) as inner:
            draw(pipe, PROMPTS[1:], num_inference_steps=1)
        draw(pipe, PROMPTS[1:], num_inference_steps=1)
    assert [len(outer), len(inner)] == [3, 1]
    assert np.array_equal(outer.array(1, layer=0), inner.array())
    assert np.array_equal(outer.array(1), outer.array(2))


def test_other_threads_are_not_recorded(pipe):
    with record_attention(pipe) as maps:
        thread = threading.Thread(target=lambda: draw(pipe))
        thread.start()
        thread.join()
    with pytest.raises(UsageError, match=r"nothing was recorded: the model did not run .*in this thread"):
        maps.array()


def test_a_second_prompt_of_xl_and_higher_order_schedulers():
    pipe = stable_diffusion_xl()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with record_attention(pipe) as maps:
        draw(pipe, PROMPTS[:1], prompt_2=["a green square"])
    assert maps.texts[0]._places("green", 0) == [2]
    assert maps.texts[0]._places("red", 0) == [2]


def test_pictures_are_drawn_and_saved(pipe, tmp_path, monkeypatch):
    with record_attention(pipe) as maps:
        images = draw(pipe, output_type="pil")
    maps.heatmap("red", image=images[0]).save(tmp_path / "red.png")
    maps.grid(image=images[0]).save(tmp_path / "grid.png")
    maps.grid(["a", "star"], 1).save(tmp_path / "words.png")
    for name in ("red", "grid", "words"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100
    maps.save(tmp_path / "maps.npz")
    with np.load(tmp_path / "maps.npz") as saved:
        assert np.array_equal(saved["1/3"], maps.texts[1].weights[3].numpy())
        about = saved["about"].item()
    assert '"prompt": "a red circle"' in about
    with pytest.raises(UsageError, match=r"x\.json: maps are saved as NumPy's \.npz"):
        maps.save(tmp_path / "x.json")
    before = (tmp_path / "maps.npz").read_bytes()
    monkeypatch.setattr(np, "savez_compressed", lambda file, **arrays: file.write(b"half") and file.read())
    with pytest.raises(RunError, match=r"maps\.npz: cannot be written"):
        maps.save(tmp_path / "maps.npz")
    assert (tmp_path / "maps.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 99}, r"layers has 99, which is not there: there are 0 \(down_blocks"),
        ({"layers": ["nowhere"]}, "layers has 'nowhere', which is not there"),
        ({"heads": 7}, r"heads=\[7\], but there are 2 heads"),
        ({"heads": -1}, r"heads is \[-1\]; give numbers of 0 or more"),
        ({"tokens": "dog"}, "'dog' is not in 'a red circle'; its words are 'a', 'red', 'circle'"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": "a", "role": "self"}, "tokens is about cross-attention"),
        ({"views": ["layer"]}, "views has 'layer'; there are 'head' and 'step'"),
        ({"guidance": "all"}, "guidance is 'all'; it must be 'conditional' or 'unconditional' or 'both'"),
        ({"prompts": ["one", "two", "three"]}, "3 prompts for 2 pictures"),
        ({"tokenizer": 1}, "tokenizer means nothing for a pipeline"),
    ],
)
def test_wrong_arguments_are_named(pipe, arguments, message):
    before = state_of(pipe.unet)
    with pytest.raises(UsageError, match=message), record_attention(pipe, **arguments):
        draw(pipe)
    assert state_of(pipe.unet) == before
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda maps: maps.heatmap("dog"), "'dog' is not in 'a red circle'; its words are"),
        (lambda maps: maps.heatmap(), "needs a word: 'red'"),
        (lambda maps: maps.heatmap("circle"), "'circle' was not recorded: tokens="),
        (lambda maps: maps.array(head=0), r"views=\['head'\]"),
        (lambda maps: maps.array(step=0), r"views=\['step'\]"),
        (lambda maps: maps.array(layer=12), r"layers \[12\] were not recorded, only \[0, 1"),
        (lambda maps: maps.alignment(), r"alignment\(\) is for translations"),
        (lambda maps: maps.heatmap("red", place="near"), "place is 'near'"),
        (lambda maps: maps.heatmap("red", image=np.zeros((8, 8))), "image is a ndarray; give a picture of Pillow"),
    ],
)
def test_wrong_questions_are_answered(pipe, ask, message):
    with record_attention(pipe, tokens="red") as maps:
        draw(pipe, num_inference_steps=1)
    with pytest.raises(UsageError, match=message):
        ask(maps)


def test_layers_that_attend_to_different_things():
    family = zoo_unets.FAMILIES["kandinsky3"]
    model = family.build()
    with record_attention(model) as maps:
        family.run(model)
    widths = {number: weights.shape[-1] for number, weights in maps.texts[0].weights.items()}
    with pytest.raises(UsageError, match="61 keys in layers .*; choose with layer="):
        maps.array()
    layers = [number for number, width in widths.items() if width == 61]
    assert np.allclose(maps.array(layer=layers).sum(-1), 1, atol=1e-5)


def test_nothing_recorded_says_why(pipe):
    with record_attention(pipe.unet, steps=[7]) as maps:
        draw(pipe)
    with pytest.raises(UsageError, match=r"there were 3 steps, 0 to 2, and steps=\[7\]"):
        maps.array()
    with record_attention(pipe) as maps:
        draw(
            pipe,
            None,
            prompt_embeds=torch.randn(1, 11, zoo_sd.TEXT),
            negative_prompt_embeds=torch.zeros(1, 11, zoo_sd.TEXT),
        )
    assert maps.array().shape == (6, 4, 11)
    with pytest.raises(UsageError, match=r"only its embeddings: record_attention\(\.\.\., prompts=\[\.\.\.\]\)"):
        maps.heatmap("red")


def test_a_compiled_model_is_refused(pipe):
    unet = stable_diffusion().unet
    for compiled in (torch.compile(unet), unet):
        if compiled is unet:
            unet.mid_block.compile()
        with (
            pytest.raises(UsageError, match="is compiled, and inside torch.compile nothing"),
            record_attention(compiled),
        ):
            pass


def test_attention_that_cannot_be_seen_is_named(pipe, monkeypatch):
    class Unseen(XFormersAttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    made = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Unseen())
    try:
        with record_attention(pipe) as maps:
            draw(pipe)
    finally:
        pipe.unet.set_attn_processor(made)
    with pytest.raises(UsageError, match=r"ran under Unseen, whose attention cannot be seen"):
        maps.array()


def test_a_layer_that_cannot_be_seen_beside_others_is_said_to_be_missing(pipe, caplog):
    class Unseen(XFormersAttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    made = pipe.unet.attn_processors
    name = next(name for name in made if "attn2" in name)
    pipe.unet.set_attn_processor(made | {name: Unseen()})
    try:
        with caplog.at_level(logging.WARNING), record_attention(pipe) as maps:
            draw(pipe)
    finally:
        pipe.unet.set_attn_processor(made)
    number = next(number for number, layer in maps.layer_names.items() if name.startswith(layer))
    assert set(maps.texts[0].weights) == set(maps.layer_names) - {number}
    assert caplog.messages == [
        "record_attention: in no map, because it cannot be seen how Unseen attends: " + maps.layer_names[number]
    ]


def test_layers_of_an_ip_adapter_itself_are_none_of_the_pictures():
    """Those of the richer kind attend, too, over the tokens that they make of its picture."""
    plain, pipe = tiny_pipeline(), tiny_pipeline()
    with record_attention(plain, role="self") as maps:
        run_tiny(plain, steps=1)
    names, images = maps.layer_names, [embeddings(2, 1, 17, 52)]
    zoo_sd.load_adapters(pipe, [zoo_sd.plus_projection()], [0.5])
    with record_attention(pipe, role="self") as maps:
        run_tiny(pipe, steps=1, ip_adapter_image_embeds=images)
    assert maps.layer_names == names
    assert maps.array(layer=0).shape == (8, 8, 64)


def test_self_attention(pipe):
    with record_attention(pipe, role="self", layers=0) as maps:
        draw(pipe)
    assert isinstance(maps.texts[0], RecordedPicture)
    assert maps.array().shape == (6, 4, 24)
    assert np.allclose(maps.array().sum(-1), 1, atol=1e-5)
