"""Wrong pictures, captions and checkpoints for the diffusion recipe: one clear line, the right code, nothing lost."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from PIL import Image

from mmattn.cli.main import main
from tests.inference.tiny_pipelines import stable_diffusion


def _fails(capsys, arguments: list[str], code: int, message: str) -> None:
    capsys.readouterr()
    assert main(arguments) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmattn: ")]
    assert len(error) == 1, error
    assert re.search(message, error[0]), error[0]
    assert "unexpected" not in error[0]


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    """Four pictures of 32 x 32 in the test's folder."""
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 20, 90)).save(tmp_path / f"{number}.png")
    return [{"image": f"{number}.png", "text": "a red circle"} for number in range(4)]


def _train(folder: Path, rows: list[dict[str, str]], model: Path, *overrides: str) -> list[str]:
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *["train", "diffusion/finetune-sd-lora", f"data.path={folder / 'captions.jsonl'}", "data.eval_fraction=0"],
        *[f"model.from_pretrained={model}", f"training.output_dir={folder / 'run'}", "pictures.resolution=32"],
        *["pictures.buckets=false", "training.max_steps=1", "training.eval_every=0", "training.num_workers=0"],
        *["training.device=cpu", "evaluation.splits=[]", *overrides],
    ]


def test_missing_captions(sd, tmp_path, rows, capsys, caplog):
    rows[1]["text"] = rows[3]["text"] = "  "
    with caplog.at_level(logging.WARNING):
        assert main(["check", *_train(tmp_path, rows, sd)[1:]]) == 0
    assert "2 of 4 rows have no text in column 'text' and are left out, the first is row 2" in caplog.text
    for row in rows:
        row["text"] = ""
    _fails(capsys, _train(tmp_path, rows, sd), 2, r"column 'text' holds no text in any of 4 rows")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unreadable_picture_is_named_and_replaced(sd, tmp_path, rows, capsys, caplog):
    (tmp_path / "2.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        assert main(_train(tmp_path, rows, sd, "data.max_bad=1")) == 0
    assert "2.png: not a picture" in caplog.text


def test_tiny_pictures(sd, tmp_path, rows, capsys):
    for number in range(4):
        Image.new("RGB", (9, 30)).save(tmp_path / f"{number}.png")
    message = r"too many records cannot be read.*png: picture too small \(9 x 30 pixels\)"
    _fails(capsys, _train(tmp_path, rows, sd), 1, message)


def test_a_caption_longer_than_the_encoder_takes(sd, tmp_path, rows, caplog):
    rows[0]["text"] = " ".join(["a red circle"] * 20)
    with caplog.at_level(logging.WARNING):
        assert main(_train(tmp_path, rows, sd)) == 0
    said = [record.message for record in caplog.records if "it was cut" in record.message]
    assert len(said) == 1
    assert "longer than the 11 tokens that the text encoder takes; it was cut: 'a red circle" in said[0]


def test_a_folder_of_another_family(sd, tmp_path, rows, capsys):
    _fails(capsys, _train(tmp_path, rows, sd / "unet"), 2, r"a U-Net by itself")
    _fails(capsys, _train(tmp_path, rows, sd / "text_encoder"), 2, r"a model of transformers, CLIPTextModel")
    _fails(capsys, _train(tmp_path, rows, tmp_path / "nothing"), 2, r"no such folder")


def test_a_distilled_model(sd, tmp_path, rows, capsys):
    other = tmp_path / "distilled"
    stable_diffusion(time_cond_proj_dim=8).save_pretrained(other)
    _fails(capsys, _train(tmp_path, rows, other), 2, r"distilled with guidance as an input \(time_cond_proj_dim\)")


def test_text_of_another_width(sd, tmp_path, rows, capsys):
    other = tmp_path / "other"
    stable_diffusion(cross_attention_dim=24).save_pretrained(other)
    _fails(capsys, _train(tmp_path, rows, other), 2, r"24")


def test_a_new_token_that_no_caption_has(sd, tmp_path, rows, capsys):
    arguments = _train(tmp_path, rows, sd, "train_what=cross_attention_kv", "new_token.token=<new1>")
    _fails(capsys, [*arguments, "new_token.initializer=circle"], 2, r"no caption has the new token '<new1>'")
    _fails(capsys, [*arguments, "new_token.initializer=rhinoceros"], 2, r"'rhinoceros' is not one token")
    _fails(capsys, [*arguments, "new_token.token=circle"], 2, r".*'circle' is a token|not one token")


def test_a_new_token_that_is_cut_off(sd, tmp_path, rows, capsys):
    rows[0]["text"] = " ".join(["a red circle"] * 5) + " <new1>"
    arguments = _train(tmp_path, rows, sd, "train_what=cross_attention_kv", "new_token.token=<new1>")
    _fails(
        capsys, [*arguments, "new_token.initializer=circle"], 2, r"it was cut: .*, and the new token '<new1>' with it"
    )


def test_random_crops_of_cached_latents(sd, tmp_path, rows, capsys):
    _fails(capsys, _train(tmp_path, rows, sd, "pictures.crop=random"), 2, r"set pictures.crop=center or cache.latents")


def test_a_split_that_is_not_there_is_said_before_the_training(sd, tmp_path, rows, capsys):
    settings = ["evaluation.splits=[train,validation]", "training.eval_every=1"]
    _fails(capsys, _train(tmp_path, rows, sd, *settings), 2, r"no records for split 'validation': set data\.eval_path")
    assert not (tmp_path / "run").exists()
