"""Features of a frozen image encoder, kept on disk: the same losses and gradients, for the same weights and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmattn.config import load_config, load_recipe
from mmattn.data.cached_features import read_features
from mmattn.errors import ConfigError
from tests.inference.tiny_models import pictures, save_stock

recipe = load_recipe("vlm")
DRAWS = [(0, 2), (0, 0), (1, 4), (1, 1)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP, and seven pictures of which number 3 is no picture."""
    folder = tmp_path_factory.mktemp("features")
    rows = []
    for number, picture in enumerate(pictures(7)):
        picture.save(folder / f"{number}.png")
        texts = [["red cat", "a picture of red cat"], "blue square", ["dog", "green dog", "the dog"]][number % 3]
        rows.append({"image": f"{number}.png", "text": texts})
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_stock(folder / "blip", "captioning")
    return folder


def _task(files: Path, run: Path, *overrides: str, is_preview: bool = False):
    values = [
        f"data.path={files / 'captions.jsonl'}",
        "data.eval_fraction=0",
        f"model.from_pretrained={files / 'blip'}",
        f"training.output_dir={run}",
        "training.batch_size=4",
        "training.micro_batch_size=null",
        "examples.texts_per_image=2",
        "evaluation.splits=[]",
        *overrides,
    ]
    return recipe.VLMTask(load_config(recipe.Config, "vlm/finetune-blip", values), is_preview=is_preview)


def _loss_and_gradients(task) -> tuple[Tensor, dict[str, Tensor]]:
    task.model.train()
    batch = task.collate(DRAWS)
    loss = task.loss(task.model, batch)
    assert loss.count == task.count(batch)
    loss.total.backward()
    return loss.total.detach(), {
        name: parameter.grad for name, parameter in task.model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("what", ["cross_attention", "lora"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_losses_and_gradients_are_those_without_the_cache_bit_for_bit(files, tmp_path, what, precision):
    options = [f"train_what={what}", f"training.mixed_precision='{precision}'"]
    cached, uncached = (_task(files, tmp_path, *options, f"cache.features={on}") for on in ("true", "false"))
    assert "features" in cached.collate(DRAWS)
    assert "features" not in uncached.collate(DRAWS)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        (loss, gradients), (other, others) = _loss_and_gradients(cached), _loss_and_gradients(uncached)
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_one_picture_alone_is_encoded_as_in_a_batch(files, tmp_path):
    one = _task(files, tmp_path / "one", "data.limit=1")
    many = _task(files, tmp_path / "many")
    assert torch.equal(read_features(one.features.cache, [0])[0], read_features(many.features.cache, [0])[0])


def test_a_picture_that_cannot_be_read_keeps_its_substitutes_texts(files, tmp_path):
    cached, uncached = (_task(files, tmp_path, f"cache.features={on}") for on in ("true", "false"))
    one, other = cached.collate([(0, 3), (0, 5)]), uncached.collate([(0, 3), (0, 5)])
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(cached.model.encode_images(other["pixel_values"]), one["features"])


def test_what_is_kept_is_good_for_the_same_weights_pictures_and_precision_only(files, tmp_path):
    folder = tmp_path / "cache"
    _task(files, tmp_path / "a", f"cache.folder={folder}")
    _task(files, tmp_path / "b", f"cache.folder={folder}", "training.seed=5", "train_what=lora")
    assert _num_caches(folder) == 1
    _task(files, tmp_path / "c", f"cache.folder={folder}", "training.mixed_precision=bf16")
    assert _num_caches(folder) == 2
    _task(files, tmp_path / "d", f"cache.folder={folder}", "data.limit=5")
    assert _num_caches(folder) == 3
    save_stock(tmp_path / "blip", "captioning", seed=1)
    _task(files, tmp_path / "e", f"cache.folder={folder}", f"model.from_pretrained={tmp_path / 'blip'}")
    assert _num_caches(folder) == 4


def _num_caches(folder: Path) -> int:
    return len(list(folder.glob("*/manifest.json")))


def test_the_log_says_that_features_are_kept_and_where(files, tmp_path):
    said = _task(files, tmp_path).describe()
    assert said.endswith(f"; the frozen image encoder runs once for each picture, 0.00 GiB in {tmp_path / 'cache'}")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["cache.features=false"], "cache.features is false"),
        (["examples.view_min_area=0.5"], "pictures are cropped or mirrored at random (examples.view_min_area, "),
        (["training.max_steps=1"], "the run draws 4 pictures, of 7 that there are"),
        (["cache.max_gib=1e-9"], "the features of 7 pictures take 0.0 GiB, more than cache.max_gib 1e-09"),
    ],
)
def test_where_the_encoder_runs_in_every_step_the_log_says_why(files, tmp_path, overrides, reason):
    task = _task(files, tmp_path, *overrides)
    assert f"; the frozen image encoder runs in every step: {reason}" in task.describe()
    assert task.features.cache is None
    assert not (tmp_path / "cache").exists()
    assert task.collate(DRAWS)["pixel_values"].shape == (4, 3, 24, 24)


def test_an_encoder_that_is_trained_is_not_cached(files, tmp_path):
    task = _task(files, tmp_path, "train_what=all")
    assert "image encoder" not in task.describe()
    assert task.features.cache is None


def test_a_preview_says_what_would_be_kept_and_writes_nothing(files, tmp_path):
    task = _task(files, tmp_path, is_preview=True)
    assert "the frozen image encoder runs once for each picture" in task.describe()
    assert not (tmp_path / "cache").exists()


def test_a_bound_of_nothing_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match=r"cache\.max_gib must be positive, not 0"):
        _task(files, tmp_path, "cache.max_gib=0")
