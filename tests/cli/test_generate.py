"""`mmattn generate` on a tiny pixel pipeline: files, names, what each file says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmattn import __version__
from mmattn.cli.main import main
from mmattn.errors import UsageError
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.files import check_new_file
from mmattn.inference.text_to_image import TextToImage
from mmattn.models.unet import UNet
from mmattn.models.unet.kv_file import save_cross_attention_kv
from tests.inference.tiny_pipelines import pixel_parts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run's folder with a model in it."""
    folder = tmp_path_factory.mktemp("run")
    PixelPipeline(**pixel_parts()).save_pretrained(folder / "final")
    return folder


@pytest.fixture
def command(run):
    return ["generate", "--model", str(run), "--steps", "2"]


def test_guidance_is_the_models_own_by_default(tmp_path, capsys):
    PixelPipeline(**pixel_parts(), guidance_scale=2).save_pretrained(tmp_path / "model")
    asked = ["generate", "--model", str(tmp_path / "model"), "--steps", "2", "a red circle"]
    assert main([*asked, "-o", str(tmp_path / "a.png")]) == 0
    assert main([*asked, "-o", str(tmp_path / "b.png"), "--guidance", "2"]) == 0
    assert main([*asked, "-o", str(tmp_path / "c.png"), "--guidance", "5"]) == 0
    capsys.readouterr()
    a, b, c = (Image.open(tmp_path / f"{name}.png") for name in "abc")
    assert a.text["guidance_scale"] == "2.0"
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert (np.asarray(a) != np.asarray(c)).any()


def test_pictures_of_several_prompts(command, run, tmp_path, capsys):
    out = tmp_path / "new" / "pictures"
    asked = ["a red circle", "a blue square", "-o", str(out), "-n", "2", "--seed", "5", "--guidance", "3"]
    assert main([*command, *asked, "--grid", str(tmp_path / "grid.png"), "--negative", "no star"]) == 0
    names = [f"{name}-seed{seed}.png" for name in ("a-red-circle", "a-blue-square") for seed in (5, 6)]
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [str(out / name) for name in names]
    assert f"wrote {tmp_path / 'grid.png'}" in shown.err
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    t2i = TextToImage.from_pretrained(run / "final", device="cpu")
    expected = t2i.generate(
        ["a red circle", "a blue square"],
        negative_prompts="no star",
        num_inference_steps=2,
        guidance_scale=3,
        num_images_per_prompt=2,
        seed=5,
    )
    for name, picture in zip(names, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), np.asarray(picture))
    assert Image.open(out / names[1]).text == {
        "prompt": "a red circle",
        "seed": "6",
        "steps": "2",
        "guidance_scale": "3.0",
        "model": str(run),
        "scheduler": "DDIMScheduler",
        "mmattn": __version__,
        "negative_prompt": "no star",
    }
    assert Image.open(tmp_path / "grid.png").size[0] == 2 * 11 * 8 + 3 * 8


def test_one_file_size_scheduler_and_json(command, tmp_path, capsys):
    file = tmp_path / "one.png"
    asked = [*command, "a red circle", "-o", str(file), "--size", "16x10", "--scheduler", "euler"]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "prompt": "a red circle", "seed": 0}
    assert Image.open(file).size == (10, 16)
    assert Image.open(file).text["scheduler"] == "EulerDiscreteScheduler"
    assert main(asked) == 2
    assert (
        f"{file}: exists already; nothing was drawn. Choose another --output, or overwrite" in capsys.readouterr().err
    )
    assert main([*asked, "--force", "--seed", "1"]) == 0
    assert Image.open(file).text["seed"] == "1"


def test_prompts_from_a_file(command, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a green star \n", encoding="utf-8-sig")  # with a byte order mark
    assert main([*command, "--file", str(prompts), "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "a-red-circle-seed0.png"),
        str(tmp_path / "a-green-star-seed0.png"),
    ]


def test_keys_and_values_of_a_run(command, run, tmp_path):
    unet = UNet.from_pretrained(run / "final", subfolder="unet")
    for name, weight in unet.named_parameters():
        if "attn2.to_v" in name:
            weight.data.mul_(-3)
    save_cross_attention_kv(unet, tmp_path / "kv" / "final")  # as a training run does
    for name, extra in (("plain", []), ("kv", ["--kv", str(tmp_path / "kv")])):
        assert main([*command, "a red circle", "-o", str(tmp_path / f"{name}.png"), *extra]) == 0
    plain, changed = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "kv"))
    assert np.abs(np.asarray(plain, dtype=int) - np.asarray(changed, dtype=int)).max() > 2
    assert changed.text["kv"] == str(tmp_path / "kv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt: give one or several, or --file with one a line"),
        (["a", "--file", "x.txt"], "--file x.txt: prompts are given as well; leave one of them out"),
        (["--file", "missing.txt"], "--file missing.txt: No such file or directory"),
        (["a", "--size", "16"], "--size 16: give height and width in pixels, such as 512x768"),
        (["a", "b", "-o", "x.png"], "--output x.png: is one file, but 2 pictures are to be drawn: name a folder"),
        (["a", "-o", "x.jpg"], "--output x.jpg: pictures are written as PNG"),
        (["a", "--grid", "grid.gif"], "--grid grid.gif: must end in .png"),
        (["a", "-o", "a.png", "--grid", "./a.png"], "--grid a.png: is the file of a picture; choose another name"),
        (["a", "--grid", "no/grid.png"], "--grid no/grid.png: the folder no does not exist; make it first"),
        (["a", "-o", "prompts.txt/deeper/still"], "a-seed0.png: cannot be made, prompts.txt is a file; choose another"),
        (["a", "--lora", "x=1.2.3"], "--lora x=1.2.3: the scale after = is no number"),
    ],
)
def test_refused_before_a_model_is_opened(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a\n")
    assert main(["generate", "--model", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_told_before_a_model_is_opened(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for output in ("new/a.png", "new"):
        assert main(["generate", "a", "--model", "nowhere", "-o", str(tmp_path / output)]) == 2
        assert f"the folder {tmp_path} cannot be written to; choose another" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot be written to"):
        check_new_file(tmp_path / "maps.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "0.5"], "guidance_scale is 0.5, which would be ignored"),
        (["--guidance", "1", "--negative", "b"], "the negative prompts would be ignored"),
        (["--size", "13x8"], "height is 13, but this model draws multiples of 2: take 12 or 14"),
        (["--scheduler", "quick"], "scheduler 'quick' is unknown: use ddim"),
        (["--lora", "nothing.safetensors=0.5"], "nothing.safetensors: no such file or folder"),
        (["--kv", "nothing"], "no such file"),
    ],
)
def test_refused(command, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "a red circle", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())
