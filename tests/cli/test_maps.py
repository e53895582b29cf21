"""`mmattn maps`: a picture of each kind of model, and what is said of wrong usage."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mmattn.cli.main import main
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from tests.inference.tiny_models import pictures, save_own
from tests.inference.tiny_pipelines import pixel_parts
from tests.inference.tiny_translators import ENGLISH, save_own_translator, save_stock_translator


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    translator = save_own_translator(tmp_path_factory.mktemp("translator"), files=tmp_path_factory.mktemp("files"))
    drawing = tmp_path_factory.mktemp("drawing")
    PixelPipeline(**pixel_parts()).save_pretrained(drawing)
    return {"translator": translator, "vlm": save_own(tmp_path_factory.mktemp("vlm")), "diffusion": drawing}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    pictures(1)[0].save(path)
    return str(path)


def test_a_picture_for_every_kind_of_model(folders, image, tmp_path, capsys):
    calls = {
        "translator": [ENGLISH[0], "--save", str(tmp_path / "maps.npz")],
        "vlm": ["is the red circle left ?", "--image", image, "-w", "red", "-w", "circle"],
        "diffusion": ["a red circle", "--steps", "2", "--json"],
    }
    for kind, arguments in calls.items():
        output = tmp_path / f"{kind}.png"
        assert main(["maps", "-m", str(folders[kind]), *arguments, "-o", str(output)]) == 0
        with Image.open(output) as picture:
            assert min(picture.size) > 80
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1]) == {"file": str(tmp_path / "diffusion.png"), "text": "a red circle"}
    assert (tmp_path / "maps.npz").is_file()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("translator", [], "no text: give a text to translate"),
        ("diffusion", [], "no text: give a prompt"),
        ("vlm", ["what ?"], "give one with --image"),
        ("diffusion", ["a", "--image", "x.png"], r"--image x.png: this model (diffusion) looks at no pictures"),
        (
            "translator",
            ["a", "-w", "a"],
            "--word a: this model (translator) has the alignment of all words drawn; leave",
        ),
        ("translator", ["a", "--steps", "3"], "--steps 3: this model (translator) draws no pictures; leave it out"),
        ("vlm", ["--image", "x.png", "--seed", "0"], "--seed 0: this model (vlm) draws no pictures; leave it out"),
        ("diffusion", ["a", "--tgt-lang", "de"], "--tgt-lang de: this model (diffusion) does not translate; leave it"),
        ("translator", ["a", "--tgt-lang", "de"], "this model translates one pair of languages, leave tgt_lang out"),
        ("translator", ["a", "-o", "maps.jpg"], "--output maps.jpg: must end in .png"),
        ("translator", ["a", "--save", "maps.txt"], "--save maps.txt: must end in .npz"),
        ("translator", ["a", "--layer", "²"], "layers has '²'; these layers go by number, 0 to"),
        ("diffusion", ["a", "--score", "4", "-w", "a"], "leave out TEXT, --word"),
        ("diffusion", ["--score", "4", "--seed", "0", "--steps", "2"], "leave out --steps, --seed"),
        ("vlm", ["--score", "4", "-o", "x.png", "--force"], "leave out --output, --force"),
        ("diffusion", ["a red circle", "--steps", "1", "-w", "dog"], "'dog' is not in 'a red circle'; its words are"),
        ("diffusion", ["a", "--steps", "1", "--layer", "nowhere"], "layers has 'nowhere', which is not there"),
    ],
)
def test_wrong_usage_is_one_line(folders, kind, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["maps", "-m", str(folders[kind]), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert list(tmp_path.iterdir()) == []


def test_every_line_of_a_translation_is_drawn(folders, tmp_path):
    heights = []
    for number, text in enumerate([ENGLISH[0], f"{ENGLISH[0]}\n\n{ENGLISH[0]}"]):
        output = tmp_path / f"{number}.png"
        assert main(["maps", "-m", str(folders["translator"]), text, "-o", str(output)]) == 0
        with Image.open(output) as picture:
            heights.append(picture.height)
    assert heights[1] == 2 * heights[0]


def test_files_are_not_overwritten(folders, tmp_path, capsys):
    output = tmp_path / "maps.png"
    output.write_bytes(b"mine")
    call = ["maps", "-m", str(folders["translator"]), ENGLISH[0], "-o", str(output)]
    assert main(call) == 2
    expected = "exists already; nothing was written. Choose another name, or overwrite with --force"
    assert expected in capsys.readouterr().err
    assert output.read_bytes() == b"mine"
    assert main([*call, "--force"]) == 0


def test_scores_of_a_translator(folders, capsys):
    assert main(["maps", "-m", str(folders["translator"]), "--score", "5", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 < scores["alignment/f1/chance"] < 1


def test_languages_of_a_translation(tmp_path, capsys):
    (tmp_path / "files").mkdir()
    model = save_stock_translator(tmp_path / "model", "nllb", files=tmp_path / "files")
    asked = ["maps", "-m", str(model), ENGLISH[0], "-o", str(tmp_path / "maps.png"), "--tgt-lang", "deu_Latn"]
    assert main([*asked, "--src-lang", "eng_Latn"]) == 0
    assert (tmp_path / "maps.png").is_file()
