"""`to` of the three façades: what a moved model gives is what one that was opened there gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate.hooks
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmattn.errors import ConfigError, UsageError
from mmattn.inference import folders as model_folders
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.linear import FastHead, FastLinear, FastProduct, copied_bytes
from mmattn.inference.text_to_image import TextToImage
from mmattn.inference.traced_products import TracedProduct
from mmattn.inference.translator import Translator
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.models.unet.kv_file import save_cross_attention_kv
from mmattn.nn.projected_attention import ProjectedAttention
from tests.inference.tiny_models import pictures, save_own, save_stock
from tests.inference.tiny_pipelines import pixel_parts, stable_diffusion, stable_diffusion_xl
from tests.inference.tiny_text_encoders import save_t5
from tests.inference.tiny_translators import ENGLISH, LANGUAGES
from tests.swap.zoo_base import quiet

PROMPTS = ["a red circle", "a blue square above a green star"]
QUESTIONS = ["what colour is the cat ?", "how many dogs ?"]
PICTURES = pictures(2)


class Case(NamedTuple):
    """A façade of one kind: how it is opened, and what it gives."""

    open: Callable[..., Any]
    give: Callable[[Any], Any]


def drawn(t2i: TextToImage, prompts: Any = PROMPTS) -> list[list[int]]:
    images = t2i.generate(prompts, num_inference_steps=2, progress=False)
    return [np.asarray(image).ravel().tolist() for image in images]


def captions(vlm: VisionLanguageModel, images: Any = PICTURES) -> Any:
    return vlm.caption(images, return_scores=True, num_beams=2, max_new_tokens=6)


def answers(vlm: VisionLanguageModel, images: Any = PICTURES) -> Any:
    return vlm.ask(images, QUESTIONS, return_scores=True, max_new_tokens=4)


def matches(vlm: VisionLanguageModel, images: Any = PICTURES) -> Any:
    return vlm.match(images, QUESTIONS, return_cosine=True)


def translations(kind: str) -> Callable[..., Any]:
    def give(translator: Translator, texts: Any = ENGLISH) -> Any:
        asked = LANGUAGES.get(kind, {}) if texts is ENGLISH else {}
        return translator.translate(texts, return_scores=True, num_beams=2, max_new_tokens=9, **asked)

    return give


VLM_GIVES = {"captioning": captions, "question_answering": answers, "matching": matches, "own": captions}
TRANSLATORS = ("marian", "nllb", "own translator")
PIPELINES = ("sd", "xl", "pixels")
KINDS = (*VLM_GIVES, *TRANSLATORS, *PIPELINES)


@pytest.fixture(scope="module")
def paths(translator_folders, tmp_path_factory) -> dict[str, Path]:
    found = {kind: translator_folders[kind.split()[0]] for kind in TRANSLATORS}
    for kind in VLM_GIVES:
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = save_own(folder) if kind == "own" else save_stock(folder, kind)
    pipes = {"sd": stable_diffusion(), "xl": stable_diffusion_xl(), "pixels": quiet(PixelPipeline(**pixel_parts()))}
    for kind, pipe in pipes.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        pipe.save_pretrained(found[kind])
    return found


@pytest.fixture
def case(paths) -> Callable[[str], Case]:
    def made(kind: str) -> Case:
        cls: Any = TextToImage if kind in PIPELINES else Translator if kind in TRANSLATORS else VisionLanguageModel
        give = VLM_GIVES.get(kind) or (drawn if kind in PIPELINES else translations(kind))

        def opened(**options: Any) -> Any:
            return cls.from_pretrained(paths[kind], **{"device": "cpu", **options})

        return Case(opened, give)

    return made


def models_of(facade: Any) -> list[nn.Module]:
    return [facade.network] if hasattr(facade, "network") else list(facade._models())


def dtypes_of(facade: Any) -> set[torch.dtype]:
    return {tensor.dtype for model in models_of(facade) for tensor in model.parameters()}


def fast_products(network: nn.Module) -> list[FastProduct]:
    fast: list[Any] = [module.fast_product for module in network.modules() if isinstance(module, FastLinear | FastHead)]
    attentions: list[Any] = [module for module in network.modules() if isinstance(module, ProjectedAttention)]
    packed = [attention.packed.product for attention in attentions if attention.is_fused]
    return [product for product in (*fast, *packed) if product is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(case, kind):
    model, before = case(kind).open(), case(kind).open()
    expected = case(kind).give(before)
    assert case(kind).give(model) == expected  # so that products have been timed, and hold copies
    assert model.to(torch.float64) is model
    assert (model.dtype, dtypes_of(model)) == (torch.float64, {torch.float64})
    assert case(kind).give(model) == case(kind).give(case(kind).open(dtype=torch.float64))
    assert model.to("cpu", "float32") is model
    assert (model.dtype, dtypes_of(model)) == (torch.float32, {torch.float32})
    assert case(kind).give(model) == expected


@pytest.mark.parametrize("kind", ["captioning", "marian", "sd"])
def test_half_floats_are_those_of_a_model_opened_in_them(case, kind):
    asked = {"dtype": torch.bfloat16}
    assert case(kind).give(case(kind).open().to(**asked)) == case(kind).give(case(kind).open(**asked))


@pytest.mark.parametrize("kind", ["captioning", "marian"])
def test_products_are_fast_again(case, kind):
    model = case(kind).open()
    number = len(fast_products(model.network))
    case(kind).give(model)
    old = [weight.data_ptr() for weight in model.network.parameters()]
    model.to(torch.float64)
    assert copied_bytes(model.network) == 0
    model.to(torch.float32)
    products = fast_products(model.network)
    assert len(products) == number > 10
    assert all(isinstance(product, FastProduct) for product in products)
    held = {product._weight.data_ptr() for product in products if product._weight is not None}
    assert held <= {weight.data_ptr() for weight in model.network.parameters()}
    assert [weight.data_ptr() for weight in model.network.parameters()] != old


def test_a_network_that_nobody_prepared_stays_as_it_is(case):
    network = case("marian").open().network
    plain = Translator(type(network)(network.config).eval(), case("marian").open().tokenizer)
    plain.to(torch.float64).to(torch.float32)
    kinds = {type(module) for module in plain.network.modules()}
    assert nn.Linear in kinds
    assert FastLinear not in kinds
    assert not any(part.is_fused for part in plain.network.modules() if isinstance(part, ProjectedAttention))


@pytest.mark.parametrize("kind", ["captioning", "marian", "pixels"])
@pytest.mark.parametrize("asked", [(), (None, None), ("cpu",), (torch.float32,), (torch.device("cpu"), "float32")])
def test_where_it_is_already(case, kind, asked):
    model = case(kind).open()
    before = [tensor.data_ptr() for each in models_of(model) for tensor in each.parameters()]
    assert model.to(*asked) is model
    assert [tensor.data_ptr() for each in models_of(model) for tensor in each.parameters()] == before


@pytest.mark.parametrize("kind", ["captioning", "marian", "pixels"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("meta",), "device 'meta' holds no numbers: weights there would be lost"),
        (("cuda:99",), "device 'cuda:99' cannot be used here: .*; mmattn doctor names those there are"),
        (("float16",), "device 'float16' cannot be used here: Invalid device string: 'float16'"),
        ((1.5,), "device 1.5 cannot be used here: "),
        ((torch.float64, torch.float32), r"to\(torch.float64, torch.float32\): give a device and then a dtype"),
        ((None, "auto"), r"to\(\): dtype 'auto' is that of a file: name one"),
        ((torch.int8,), r"to\(\): weights are float32, float16, bfloat16, float64, not int8"),
        (("cpu", torch.complex64), r"to\(\): weights are float32, float16, bfloat16, float64, not complex64"),
        ((None, "half a float"), "dtype 'half a float' is unknown"),
    ],
)
def test_what_is_refused(case, kind, asked, message):
    model = case(kind).open()
    with pytest.raises((UsageError, ConfigError), match=message) as error:
        model.to(*asked)
    assert "\n" not in str(error.value)
    assert (model.device, dtypes_of(model)) == (torch.device("cpu"), {torch.float32})


@pytest.mark.parametrize("kind", ["captioning", "marian", "pixels"])
@pytest.mark.parametrize("device", ["meta", "cuda:99", "gpu"])
def test_opened_on_a_device_that_cannot_be_used(case, kind, device):
    with pytest.raises(UsageError, match=f"device '{device}' (holds no numbers|cannot be used here)"):
        case(kind).open(device=device)


def test_int8_stays_where_and_as_it_is(case):
    translator = case("marian").open(quantize="int8")
    expected = case("marian").give(translator)
    assert translator.to("cpu").to(torch.float32) is translator
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(UsageError, match=r'8 bits \(quantize="int8"\), which are for a CPU and have no'):
            translator.to(dtype)
    assert case("marian").give(translator) == expected


# What was encoded before.


@pytest.mark.parametrize("kind", [*VLM_GIVES, *TRANSLATORS])
def test_what_was_encoded_before(case, kind):
    model, what = case(kind).open(), "sources" if kind in TRANSLATORS else "pictures"
    encoded = model.encode(ENGLISH, **LANGUAGES.get(kind, {})) if kind in TRANSLATORS else model.encode(PICTURES)
    expected = case(kind).give(model, encoded)
    assert expected == case(kind).give(model)
    model.to(torch.float64)
    message = (
        f"these {what} were encoded on cpu in float32, and the model is on cpu in float64 now: give {what}"
        r".to\(model.device, model.dtype\), or encode them again"
    )
    with pytest.raises(UsageError, match=message):
        case(kind).give(model, encoded)
    there = encoded.to(model.device, model.dtype)
    assert texts_of(case(kind).give(model, there)) == texts_of(case(kind).give(model))
    assert there.nbytes > encoded.nbytes
    assert case(kind).give(model.to(torch.float32), encoded) == expected


def texts_of(given: Any) -> Any:
    """Without scores, which the rounding of what was encoded in float32 shows in."""
    if isinstance(given, list):
        return [texts_of(each) for each in given]
    return given[0] if isinstance(given[0], str) else [round(number, 4) for number in given]


def test_a_stream_of_sources_that_were_encoded_before(case):
    translator = case("marian").open()
    source = translator.encode(ENGLISH[0])
    translator.to(torch.float64)
    with pytest.raises(UsageError, match="these sources were encoded on cpu in float32"):
        translator.translate(source, stream=True)


def test_encoded_under_autocast_and_used_there(case):
    vlm = case("captioning").open()
    with torch.autocast("cpu", torch.bfloat16):
        encoded = vlm.encode(PICTURES)
        assert vlm.caption(encoded, max_new_tokens=3) == vlm.caption(PICTURES, max_new_tokens=3)
    with pytest.raises(UsageError, match="these pictures were encoded on cpu in bfloat16, and the model is .* float32"):
        vlm.caption(encoded, max_new_tokens=3)


@pytest.mark.parametrize("kind", PIPELINES)
def test_prompts_that_were_encoded_before_are_moved_as_they_are_used(case, kind):
    t2i = case(kind).open()
    prompts = t2i.encode(PROMPTS)
    expected = drawn(t2i, prompts)
    far = np.abs(np.subtract(drawn(t2i.to(torch.float64), prompts), drawn(t2i))).max()
    assert far <= 1  # of 255
    assert drawn(t2i.to(torch.float32), prompts) == expected


# With what else a façade has.


@pytest.mark.parametrize("kind", ["captioning", "question_answering", "marian", "pixels"])
def test_compiled_steps(case, kind):
    model, plain = case(kind).open(), case(kind).open()
    model.compile(backend="eager")
    compiled = model.compiled
    for dtype in (torch.float32, torch.float64):
        given, expected = case(kind).give(model.to(dtype)), case(kind).give(plain.to(dtype))
        assert near(given, expected)
        assert model.compiled is compiled
    if hasattr(model, "network"):
        products = fast_products(model.to(torch.float32).network)
        assert {type(product) for product in products} == {TracedProduct}


def near(given: Any, expected: Any) -> bool:
    """Equal, but for the rounding of compiled steps in scores and pictures."""
    if isinstance(given, list | tuple):
        return len(given) == len(expected) and all(map(near, given, expected))
    if given is None or isinstance(given, str):
        return given == expected
    return abs(given - expected) <= 1 if isinstance(given, int) else given == pytest.approx(expected, rel=1e-4)


def test_what_was_compiled_is_freed(case):
    translator, t2i = case("marian").open(), case("pixels").open()
    for model in (translator, t2i):
        model.compile(backend="eager")
    translator.compiled._idle_bytes = 2**24
    case("marian").give(translator)
    drawn(t2i)
    assert translator.compiled.idle
    assert t2i.compiled.num_graphs
    for model in (translator, t2i):
        model.to(torch.float32)  # where they are
    assert translator.compiled.idle
    assert t2i.compiled.num_graphs
    for model in (translator, t2i):
        model.to(torch.float64)
    assert not translator.compiled.idle
    assert not t2i.compiled.num_graphs


def test_a_compiled_stream_cannot_go_on(case):
    translator = case("marian").open()
    translator.compile(backend="eager")
    stream = translator.translate(ENGLISH[0], stream=True, num_beams=1, min_new_tokens=40)
    next(stream)
    assert translator.compiled.num_lent == 1
    translator.to(torch.float64)
    with pytest.raises(UsageError, match="the model was moved while this text was being decoded: start the text again"):
        list(stream)
    del stream
    assert translator.translate(ENGLISH[0])
    assert translator.compiled.num_lent == 0


@pytest.mark.parametrize("kind", ["captioning", "marian", "pixels"])
def test_compiled_steps_work_on_few_devices(case, kind, monkeypatch):
    model = case(kind).open()
    model.compile(backend="eager")
    monkeypatch.setattr(model_folders, "usable_device", torch.device)
    with pytest.raises(UsageError, match=r"to\(\): compiled steps work on cpu and cuda, not on xpu: set .comp"):
        model.to("xpu")


def test_lora_and_new_words(case, paths, lora_file, tmp_path):
    t2i = case("sd").open()
    token = torch.randn(t2i.pipeline.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    save_cross_attention_kv(t2i.pipeline.unet, tmp_path / "kv", tokens={"<new>": token})
    t2i.load_cross_attention_kv(tmp_path / "kv")
    plain = drawn(t2i, ["a red <new>"])
    t2i.load_lora(lora_file, 0.6)
    expected = drawn(t2i, ["a red <new>"])
    assert expected != plain
    t2i.to(torch.float64)
    assert dtypes_of(t2i) == {torch.float64}
    there = case("sd").open(dtype=torch.float64)
    there.load_cross_attention_kv(tmp_path / "kv")
    there.load_lora(lora_file, 0.6)
    far = np.abs(np.subtract(drawn(t2i, ["a red <new>"]), drawn(there, ["a red <new>"]))).max()
    assert far <= 1  # of 255: a scale is rounded where it is multiplied
    assert drawn(t2i.to(torch.float32), ["a red <new>"]) == expected
    t2i.unload_lora()
    assert drawn(t2i, ["a red <new>"]) == plain


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model_state_dict

    pipe, folder = stable_diffusion(), tmp_path_factory.mktemp("lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


def test_models_that_are_moved_otherwise(case):
    t2i = case("sd").open()
    accelerate.hooks.add_hook_to_module(t2i.pipeline.text_encoder, accelerate.hooks.ModelHook())
    with pytest.raises(UsageError, match=r"to\(\): the CLIPTextModel has hooks of accelerate or diffusers \(off"):
        t2i.to(torch.float64)
    assert dtypes_of(t2i) == {torch.float32}
    accelerate.hooks.remove_hook_from_module(t2i.pipeline.text_encoder, recurse=True)
    t2i.pipeline.unet.is_quantized = True
    with pytest.raises(UsageError, match=r"to\(\): the \w+ is quantised: open it where and in what it shall work"):
        t2i.to(torch.float64)


def test_nothing_is_warned_of(case, caplog):
    """Diffusers' own `to` names modules that should stay in float32, an empty list of them."""
    case("sd").open().to(torch.bfloat16).to("cpu", torch.float64)
    assert not caplog.records


def test_what_is_too_narrow_for_half_floats_stays(tmp_path):
    folder = pixel_folder_with_t5(tmp_path)
    asked = {"device": "cpu", "dtype": torch.float16}
    opened, moved = TextToImage.from_pretrained(folder, **asked), TextToImage.from_pretrained(folder, device="cpu")
    moved.to(torch.float16)
    for mine, theirs in zip(models_of(moved), models_of(opened), strict=True):
        found = {name: tensor.dtype for name, tensor in mine.named_parameters()}
        assert found == {name: tensor.dtype for name, tensor in theirs.named_parameters()}
    kept = moved.pipeline.text_encoder.encoder.block[0].layer[-1].DenseReluDense.wo.weight
    assert kept.dtype == torch.float32
    assert torch.equal(kept, opened.pipeline.text_encoder.encoder.block[0].layer[-1].DenseReluDense.wo.weight)


def pixel_folder_with_t5(root: Path) -> Path:
    from transformers import AutoTokenizer, T5EncoderModel

    t5 = save_t5(root / "t5")
    parts = pixel_parts(cross_attention_dim=12)
    parts |= {"text_encoder": T5EncoderModel.from_pretrained(t5), "tokenizer": AutoTokenizer.from_pretrained(t5)}
    quiet(PixelPipeline(**parts)).save_pretrained(root / "pixels")
    return root / "pixels"


@pytest.mark.parametrize("kind", ["captioning", "marian"])
def test_on_a_card_products_are_ordinary_ones(case, kind):
    """Tensors that only say where they are stand for a card's."""
    model = case(kind).open()
    case(kind).give(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda", torch.float16)
    assert (model.device.type, model.dtype) == ("cuda", torch.float16)
    assert fast_products(model.network) == []


@pytest.mark.parametrize("kind", ["captioning", "marian", "pixels"])
@pytest.mark.parametrize("opened_in", [False, True])
def test_in_inference_mode(case, kind, opened_in):
    """A model that was moved in it can be trained, unless it was opened in it."""
    with torch.inference_mode(opened_in):
        model = case(kind).open()
    with torch.inference_mode():
        expected = case(kind).give(case(kind).open(dtype=torch.float64))
        assert case(kind).give(model.to(torch.float64)) == expected
    assert case(kind).give(model) == expected
    weights = [weight for each in models_of(model) for weight in each.parameters()]
    assert any(weight.is_inference() for weight in weights) == opened_in
