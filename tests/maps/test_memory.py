"""Maps outlive what they were recorded of: they hold no model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import BartForConditionalGeneration

from mmattn import TextToImage, Translator, VisionLanguageModel, record_attention, steer_attention
from mmattn.errors import UsageError
from mmattn.maps import in_place
from tests.inference.tiny_models import pictures, save_own
from tests.inference.tiny_pipelines import stable_diffusion
from tests.inference.tiny_translators import ENGLISH, save_own_translator
from tests.maps import joint_pipelines
from tests.swap.zoo_transformers import FAMILIES

PROMPT = "a red circle"


def draw(pipe):
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    pipe(PROMPT, **size | ({"max_sequence_length": 13} if hasattr(pipe, "transformer") else {}))


@torch.no_grad()
def generate(model: BartForConditionalGeneration):
    model.generate(torch.tensor([[5, 6, 7, 2]]), max_new_tokens=3)


def vlm(folder):
    return VisionLanguageModel.from_pretrained(save_own(folder / "own"), device="cpu")


def translator(folder):
    (folder / "files").mkdir()
    return Translator.from_pretrained(save_own_translator(folder / "own", files=folder / "files"), device="cpu")


def text_to_image(folder):
    stable_diffusion().save_pretrained(folder)
    return TextToImage.from_pretrained(folder)


TARGETS = {
    "pipeline": (lambda folder: stable_diffusion(), draw),
    "joint": (lambda folder: joint_pipelines.flux(), draw),
    "transformers": (lambda folder: FAMILIES["bart"].build(), generate),
    "vlm": (vlm, lambda model: model.caption(pictures(1))),
    "translator": (translator, lambda model: model.translate(ENGLISH[0], max_new_tokens=3)),
    "text to image": (text_to_image, lambda model: model.generate(PROMPT, seed=0, num_inference_steps=1)),
}


def parameter_of(target) -> torch.Tensor:
    """Any weight, of wherever a target has its model."""
    parts = target.components.values() if hasattr(target, "components") else [target, *vars(target).values()]
    parts = [part for part in [*parts, *vars(getattr(target, "pipeline", target)).values()] if part is not None]
    return next(iter(next(part for part in parts if isinstance(part, torch.nn.Module)).parameters()))


@pytest.mark.parametrize("kind", TARGETS)
def test_maps_hold_no_model(kind, tmp_path):
    build, run = TARGETS[kind]
    target = build(tmp_path)
    with record_attention(target) as maps:
        run(target)
    with record_attention(target) as empty:
        pass
    gone = weakref.ref(parameter_of(target))
    del target
    gc.collect()
    assert gone() is None
    assert maps.array().ndim >= 2
    with pytest.raises(UsageError, match="nothing was recorded: the model"):
        empty.array()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_within_a_block_are_neither_recorded_nor_bound_to_it(copied):
    pipe, bart = stable_diffusion(), FAMILIES["bart"].build()
    with record_attention(pipe) as maps, record_attention(bart) as texts, steer_attention(pipe, weights={"red": 2}):
        others = copied(pipe.unet), copied(bart)
        draw(pipe)
        generate(bart)
    assert len(maps) == len(texts) == 1
    assert others[1].generate.__self__ is others[1]
    hooks = [hook for module in others[0].modules() for hook in module._forward_pre_hooks.values()]
    assert hooks
    assert all(hook._call is in_place._do_nothing for hook in hooks)
    pipe.unet = others[0]
    draw(pipe)
    generate(others[1])
    assert len(maps) == len(texts) == 1
