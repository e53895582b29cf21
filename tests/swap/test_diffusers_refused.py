"""What is left alone, by name and with the reason; and input that cannot be, said clearly before anything changes."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel, UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models import attention_processor as stock
from diffusers.models.transformers.transformer_hidream_image import HiDreamAttention, HiDreamAttnProcessor
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Attention
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite.pipeline_stable_diffusion_attend_and_excite import (  # noqa: E501
    AttendExciteAttnProcessor,
)
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import CrossAttnStoreProcessor
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor2_0,
)
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import LEDITSCrossAttnProcessor
from torch import nn

import mmattn
from mmattn.errors import UsageError
from mmattn.swap import api
from mmattn.swap.diffusers.dispatcher import SET_IN_CODE
from mmattn.swap.diffusers.install import layer_of

from . import zoo_dits
from .diffusers_pieces import LAYERS, TINY, Picture, a_text, attentions, run_unet, tiny_pipeline, tiny_unet
from .zoo import FAMILIES
from .zoo_base import liven, seeded


@pytest.fixture
def unet():
    return tiny_unet()


class Unheard:
    """A processor that somebody wrote."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **named):
        return stock.AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)


class Subclass(stock.AttnProcessor2_0):
    """Of a known class, but its own."""


STORE = "an attention store belongs to its pipeline"
UNKNOWN = "not a class that mmattn knows"
PROCESSORS = {
    stock.PAGIdentitySelfAttnProcessor2_0: "perturbed-attention guidance depends on its own processors",
    stock.PAGCFGIdentitySelfAttnProcessor2_0: "perturbed-attention guidance depends on its own processors",
    stock.FusedAttnProcessor2_0: r"projections are fused: call unfuse_qkv_projections\(\) first",
    stock.CustomDiffusionAttnProcessor2_0: "a trained Custom Diffusion processor holds weights",
    stock.SanaLinearAttnProcessor2_0: "linear attention, not a softmax",
    CrossFrameAttnProcessor2_0: UNKNOWN,
    AttendExciteAttnProcessor: STORE,
    CrossAttnStoreProcessor: STORE,
    LEDITSCrossAttnProcessor: STORE,
    Unheard: UNKNOWN,
    Subclass: UNKNOWN,
}


def make(cls):
    if cls is AttendExciteAttnProcessor:
        return cls(None, "up")
    if cls is LEDITSCrossAttnProcessor:
        return cls(None, "up", False, 1)
    if cls is stock.CustomDiffusionAttnProcessor2_0:
        return cls(hidden_size=16, cross_attention_dim=16)
    return cls()


@pytest.mark.parametrize("cls", PROCESSORS, ids=lambda cls: cls.__name__)
def test_a_processor_of_another_kind_is_left_alone_by_name(unet, cls):
    name, attn = next(iter(attentions(unet, "attn1").items()))
    theirs = make(cls)
    attn.set_processor(theirs)
    before = Picture(unet)
    with mmattn.swap_attention(unet) as swapped:
        report = swapped.report()
        assert attn.processor is theirs
        assert (len(report.swapped), len(report.refused)) == (LAYERS - 1, 1)
        text = f"{cls.__name__}: {PROCESSORS[cls]}".replace("\\", "")
        assert report.refused[0].refused == text
        assert f"  model: 1 refused: {text}" in str(report)
        assert f"  model.{name} [self]: refused: {text}" in str(report)
    assert before.differences(Picture(unet)) == []
    with pytest.raises(
        UsageError, match=f"1 of 8 layers must be left alone: model.{name}: {cls.__name__}: {PROCESSORS[cls]}"
    ):
        mmattn.swap_attention(unet, strict=True)
    assert before.differences(Picture(unet)) == []


def test_a_known_neighbour_is_still_swapped_and_the_output_stays(unet):
    attn = next(iter(attentions(unet, "attn2").values()))
    attn.set_processor(Unheard())
    stock_output = run_unet(unet)
    with mmattn.swap_attention(unet) as swapped:
        assert torch.equal(run_unet(unet), stock_output)
        assert swapped.verify().is_ok


def test_a_model_that_takes_no_probe_is_named_and_its_layers_verified(unet):
    """Some processors of perturbed-attention guidance want a batch in three parts."""
    next(iter(attentions(unet, "attn1").values())).set_processor(stock.PAGCFGIdentitySelfAttnProcessor2_0())
    with mmattn.swap_attention(unet) as swapped:
        found = swapped.verify()
    assert found.is_ok
    assert (len(found.layers), found.models) == (LAYERS - 1, [])
    assert found.unprobed[0].startswith("model (it does not take the probe made from its config: ValueError: not")


def test_sana_keeps_its_linear_attention():
    model = FAMILIES["sana"].build()
    with mmattn.swap_attention(model) as swapped:
        refused = swapped.report().refused
        assert [layer.name for layer in refused] == [f"transformer_blocks.{number}.attn1" for number in range(3)]
        assert {layer.refused for layer in refused} == {"SanaLinearAttnProcessor2_0: linear attention, not a softmax"}
    with pytest.raises(UsageError, match="3 of 3 layers must be left alone"):
        mmattn.swap_attention(model, role="self")
    with mmattn.swap_attention(model, role="cross", strict=True) as swapped:
        assert len(swapped.report().swapped) == 3


def test_sana_with_norms_of_queries_and_keys():
    config = zoo_dits.SANA | {"qk_norm": "rms_norm_across_heads"}
    model = seeded(lambda: liven(SanaTransformer2DModel(**config)))()
    expected = FAMILIES["sana"].run(model)
    with mmattn.swap_attention(model) as swapped:
        assert (FAMILIES["sana"].run(model) - expected).abs().max() < 1e-5
        assert swapped.verify().is_ok
        assert "qk_norm" in swapped.report().swapped[0].features


def test_an_attention_of_another_build_is_left_alone_by_name():
    layer = HiDreamAttention(8, 2, 4, processor=HiDreamAttnProcessor())
    with pytest.raises(UsageError, match=f"HiDreamAttnProcessor: {UNKNOWN}"):
        mmattn.swap_attention(layer)


def test_more_than_five_refusals_are_counted():
    unet = tiny_unet()
    unet.set_attn_processor(Unheard())
    with pytest.raises(UsageError, match=r"8 of 8 layers must be left alone: .*; and 3 more$"):
        mmattn.swap_attention(unet)


def test_an_unknown_backend_lists_those_that_work(unet):
    with pytest.raises(UsageError) as caught:
        mmattn.swap_attention(unet, backend="fast")
    text = str(caught.value)
    assert text.startswith("unknown attention backend 'fast'; use one of: auto, ")
    for row in mmattn.backends():
        assert row.name in text
    assert "usable here: " in text
    assert "eager" in text.split("usable here: ")[1]


@pytest.mark.parametrize("role", ["crosss", "joint", "both", ""])
def test_a_role_that_does_not_exist(unet, role):
    with pytest.raises(UsageError, match=rf"role is '{role}'; use \"self\", \"cross\", or None for every layer"):
        mmattn.swap_attention(unet, role=role)


def test_a_role_that_a_model_does_not_have():
    with pytest.raises(UsageError, match="AutoencoderKL has no cross attention in these parts"):
        mmattn.swap_attention(FAMILIES["vae"].build(), role="cross")
    with pytest.raises(UsageError, match="SD3Transformer2DModel has no cross attention"):
        mmattn.swap_attention(FAMILIES["sd3"].build(), role="cross")


def test_things_without_attention():
    plain = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    unet = UNet2DConditionModel(**plain, **blocks)
    with pytest.raises(UsageError, match="found no attention layer to swap in UNet2DConditionModel"):
        mmattn.swap_attention(unet)
    with pytest.raises(UsageError, match="model is a Linear, neither a diffusers nor a transformers model"):
        mmattn.swap_attention(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="str is neither a diffusers pipeline nor a diffusers or transformers model"):
        mmattn.swap_attention("runwayml/stable-diffusion-v1-5")


def test_a_model_without_weights():
    with init_empty_weights():
        unet = UNet2DConditionModel(**TINY)
    before = Picture(unet)
    with pytest.raises(UsageError, match=r"the weights of model\.down_blocks.*attn1 are on meta; load the model first"):
        mmattn.swap_attention(unet)
    assert before.differences(Picture(unet)) == []
    assert len(mmattn.swap.plan_attention_swap(unet).swapped) == LAYERS  # a plan needs none


def test_weights_stored_in_eight_bits_do_not_rule_a_backend_out(unet):
    apply_layerwise_casting(unet, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = run_unet(unet)
    with mmattn.swap_attention(unet, backend="sdpa"):
        assert torch.equal(run_unet(unet), expected)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.41.2", "swap_attention needs diffusers 0.42 or newer, found 0.41.2: pip install -U diffusers"),
        ("0.9", "0.9"),
    ],
)
def test_a_version_that_is_too_old(unet, monkeypatch, version, message):
    before = Picture(unet)
    find = api.package_version
    monkeypatch.setattr(api, "package_version", lambda name: version if name == "diffusers" else find(name))
    with pytest.raises(UsageError, match=message):
        mmattn.swap_attention(unet)
    assert before.differences(Picture(unet)) == []


@pytest.mark.parametrize("version", ["0.43.0", "0.43.0.dev0", "1.0.0"])
def test_a_version_that_was_never_tested_is_said(unet, monkeypatch, version):
    find = api.package_version
    monkeypatch.setattr(api, "package_version", lambda name: version if name == "diffusers" else find(name))
    with mmattn.swap_attention(unet) as swapped:
        text = str(swapped.report())
    assert f"note: diffusers {version} is untested (tested: 0.42); run verify()" in text
    assert f"diffusers {version}" in text.splitlines()[1]


def test_the_tested_version_needs_no_note(unet):
    with mmattn.swap_attention(unet) as swapped:
        assert "untested" not in str(swapped.report())


def test_a_report_that_people_can_read():
    pipe = tiny_pipeline()
    name, attn = next(iter(attentions(pipe.unet, "attn1").items()))
    attn.set_processor(Unheard())
    with mmattn.swap_attention(pipe, role="self") as swapped:
        lines = str(swapped.report()).splitlines()
        text = repr(swapped)
    assert lines[0] == ("StableDiffusionPipeline: 5 of 6 attention layers swapped, 1 refused, 4 not asked for")
    assert lines[1].startswith("versions: mmattn ")
    assert "torch 2" in lines[1]
    assert lines[2:5] == [
        "  vae: 2 self, was AttnProcessor2_0, now auto",
        "  unet: 3 self, was AttnProcessor2_0, now auto",
        "  unet: 1 refused: Unheard: not a class that mmattn knows",
    ]
    assert "layers:" in lines
    assert f"  unet.{name} [self]: refused: Unheard: not a class that mmattn knows" in lines
    assert any(line.endswith("[cross]: AttnProcessor2_0, not asked for") for line in lines)
    kept = (
        "was AttnProcessor2_0, now auto; keeps group_norm, residual_connection, upcast (scores and softmax in float32)"
    )
    assert f"  vae.encoder.mid_block.attentions.0 [self]: {kept}" in lines
    assert text == f"<Swap {lines[0]}>"


def test_a_verification_that_people_can_read(unet):
    with mmattn.swap_attention(unet) as swapped:
        lines = str(swapped.verify()).splitlines()
    assert lines[0].startswith("whole model: to stock 0, to float64 ")
    assert lines[0].endswith(" ok")
    assert lines[1].startswith("8 layers, 8 within tolerance; worst model.")
    assert lines[-1] == "same output"


def test_bad_masks_name_the_layer(unet):
    with mmattn.swap_attention(unet):
        for length in (5, 9):
            mask = torch.ones(2, length, dtype=torch.long)
            mask[:, -1] = 0
            with pytest.raises(
                UsageError, match=rf"attention_mask \[2, 1, {length}\] does not fit model\..*attn2 .*7 keys"
            ):
                run_unet(unet, a_text(), encoder_attention_mask=mask)
        with pytest.raises(UsageError, match=r"does not fit model\..*attn1 \(self-attention\)"):
            run_unet(unet, attention_mask=torch.ones(2, 64))


def test_processors_that_name_a_backend_themselves():
    """What they are set to, ours among it, does not count for these calls: so they are not said to be swapped."""
    layer = layer_of(QwenImage21Attention(8, 2, 4), "attn", "transformer")
    assert layer is not None
    assert layer.refused == "QwenImage21AttnProcessor: names a backend of diffusers in its code, whatever it is set to"


def test_all_of_them_are_known():
    """Of this diffusers. One without `_attention_backend` is left alone in any case."""
    found = set()
    for file in Path(diffusers.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "dispatch_attention_fn" in text and "_attention_backend = None" in text:
            classes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef))
            found |= {node.name for node in classes if "_attention_backend = None" in ast.unparse(node) and fixed(node)}
    assert found == SET_IN_CODE


def fixed(node: ast.ClassDef) -> bool:
    """Whether the class calls the dispatcher with something else than what it is set to, or with nothing."""
    calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
    asked = [each for each in calls if isinstance(each.func, ast.Name) and each.func.id == "dispatch_attention_fn"]
    given = [[ast.unparse(word.value) for word in each.keywords if word.arg == "backend"] for each in asked]
    # ACE-Step's has it in a variable.
    return any(words not in (["self._attention_backend"], ["dispatch_backend"]) for words in given)
