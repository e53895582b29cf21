"""Scores of pictures with known truth, and the metrics of torchmetrics."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from mmattn.data.scenes import SceneDataset
from mmattn.data.spec import DataConfig
from mmattn.errors import OptionalPackageError, RunError
from mmattn.inference.diffusion import scores as scores_module
from mmattn.inference.diffusion.scores import (
    EvalConfig,
    check_evaluation,
    require_scorable,
    sample_prompts,
    scene_scores,
    score_splits,
)
from mmattn.inference.diffusion.text_encoder_setup import TextEncoderConfig, new_text_encoder
from tests.inference.tiny_pipelines import WORDS

CAPTIONS = ["a red circle", "blue square below", "a green star"]


class _Knows:
    """Draws the true scene of each caption, or others; stands in for `TextToImage`."""

    def __init__(self, pictures: dict[str, np.ndarray]) -> None:
        self.pictures, self.calls = pictures, []
        self.pipeline, self.guidance_scale = SimpleNamespace(scheduler=None), 1.5

    def generate(self, prompts, *, seed, guidance_scale, **settings):
        self.calls.append((prompts, list(seed), guidance_scale))
        return [Image.fromarray(self.pictures[prompt]) for prompt in prompts]


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    source = SceneDataset("heldout", 60, 0, 32, 2)
    return {record.texts[0].text: record.image for record in source.records(range(60))}


def test_true_pictures_score_one_and_shuffled_ones_do_not(truth):
    captions = list(truth)
    images = [Image.fromarray(image) for image in truth.values()]
    scores = scene_scores(images, captions)
    assert min(scores.values()) >= 0.95
    assert scene_scores(images[1:] + images[:1], captions)["all"] < 0.2


def test_each_number_of_objects_and_scale_by_itself(truth):
    model = _Knows(truth)
    config = EvalConfig(splits=["heldout"], limit=7, guidance_scales=[1.0, 2.5], loss=False)
    scores = score_splits(model, DataConfig(kind="scenes", size=50, eval_size=60), config)
    assert {name.rpartition("/")[0] for name in scores} == {
        f"heldout/{number}_object/guidance_{scale}" for number in (1, 2) for scale in ("1", "2.5")
    }
    assert scores["heldout/2_object/guidance_1/relation"] >= 0.85
    assert [len(call[0]) for call in model.calls] == [7] * 4
    assert model.calls[0][1] == model.calls[1][1]  # the same seeds at every scale


def test_without_scales_it_is_the_models_own(truth):
    config = EvalConfig(splits=["heldout"], limit=7, objects=[1], loss=False)
    scores = score_splits(_Knows(truth), DataConfig(kind="scenes", size=50, eval_size=60), config)
    assert {name.rpartition("/")[0] for name in scores} == {"heldout/1_object/guidance_1.5"}


def test_sample_prompts_are_the_first_captions_unless_named():
    data = DataConfig(kind="scenes", size=50, eval_size=60)
    found = sample_prompts(EvalConfig(splits=["heldout"]), data)
    assert found == list(dict.fromkeys(found))
    assert found[0] == SceneDataset("heldout", 60, 0, 32, 2)[0].texts[0].text
    assert sample_prompts(EvalConfig(sample_prompts=["a"]), data) == ["a"]
    assert sample_prompts(EvalConfig(splits=[]), data) == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP model with random weights and a processor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = new_text_encoder(
        [WORDS], TextEncoderConfig(width=8, num_layers=0, num_heads=1, max_length=11)
    ).tokenizer
    text = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "max_position_embeddings": 11, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision |= {"image_size": 30, "patch_size": 10}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def _rows(folder: Path) -> DataConfig:
    draws = np.random.default_rng(0)
    lines = []
    for number, caption in enumerate(CAPTIONS):
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(f'{{"image": "{number}.png", "text": "{caption}"}}')
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return DataConfig(kind="files", path=str(folder / "rows.jsonl"), eval_path=str(folder / "rows.jsonl"))


def _noise() -> dict[str, np.ndarray]:
    draws = np.random.default_rng(1)
    return {caption: draws.integers(0, 256, (32, 32, 3), dtype=np.uint8) for caption in CAPTIONS}


def test_clip_score_by_a_model_in_a_folder(clip, tmp_path):
    pytest.importorskip("torchmetrics")
    config = EvalConfig(splits=["validation"], clip_score=str(clip), loss=False)
    require_scorable(_rows(tmp_path), config)
    scores = score_splits(_Knows(_noise()), _rows(tmp_path), config)
    assert -100 <= scores["validation/clip_score"] <= 100


def test_metrics_that_cannot_be_had_say_so(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    data = _rows(tmp_path)
    config = EvalConfig(splits=["validation"], clip_score=str(tmp_path / "nothing"), loss=False)
    with pytest.raises(RunError, match=r"clip_score=.*nothing needs that CLIP model, which cannot be had: .*go online"):
        score_splits(_Knows(_noise()), data, config)
    with pytest.raises(RunError, match=r"clip_score=.*nothing needs that CLIP model, which cannot be had: .*go online"):
        require_scorable(data, config)

    def missing(name: str, purpose: str) -> None:
        raise OptionalPackageError(f"{purpose} needs the package {name}")

    monkeypatch.setattr(scores_module, "require", missing)
    with pytest.raises(OptionalPackageError, match="evaluation.fid and evaluation.clip_score needs the package torchm"):
        score_splits(_Knows(_noise()), data, EvalConfig(splits=["validation"], fid=True, loss=False))


def test_fid_without_its_package_says_how_to_install_it(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # its import fails, installed or not
    config = EvalConfig(splits=["validation"], fid=True, loss=False)
    message = r"^evaluation.fid needs the package torch-fidelity, which is not .*: pip install 'mmattn\[metrics\]'$"
    with pytest.raises(OptionalPackageError, match=message):
        score_splits(_Knows(_noise()), _rows(tmp_path), config)
    with pytest.raises(OptionalPackageError, match=message):
        check_evaluation(_Knows(_noise()), config)
