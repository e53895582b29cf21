"""`caption` and `ask`, with a model that records how it is called."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path

import pytest

import mmattn.cli.models
import mmattn.maps.record
from mmattn.cli.main import main


class FakeModel:
    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.is_compiled = False

    def caption(self, images, prompt=None, **settings):
        self.calls.append((images, prompt, settings))
        return [f"caption of {image.stem}" for image in images]

    def ask(self, image, questions, **settings):
        self.calls.append((image, questions, settings))
        return ["yes"] * len(questions)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeModel:
    fake = FakeModel()
    opened = {"folder": fake}

    def open_vlm(name: str, *, compile: bool) -> FakeModel:
        opened[name].is_compiled = compile
        return opened[name]

    monkeypatch.setattr(mmattn.cli.models, "open_vlm", open_vlm)
    monkeypatch.chdir(tmp_path)
    return fake


def test_caption(model: FakeModel, capsys):
    assert main(["caption", "a.png", "b.png", "-m", "folder", "--prompt", "a photo of", "--num-beams", "3"]) == 0
    assert capsys.readouterr().out == "a.png: caption of a\nb.png: caption of b\n"
    assert model.calls == [([Path("a.png"), Path("b.png")], "a photo of", {"num_beams": 3})]


def test_caption_leaves_the_defaults_to_the_checkpoint(model: FakeModel, capsys):
    assert main(["caption", "a.png", "--model", "folder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"image": "a.png", "caption": "caption of a"}
    assert model.calls == [([Path("a.png")], None, {})]


@pytest.mark.parametrize("verb", [["caption", "a.png"], ["ask", "a.png", "is it red?"]], ids=lambda verb: verb[0])
def test_compiled(model: FakeModel, verb: list[str]):
    assert main([*verb, "-m", "folder"]) == 0
    assert not model.is_compiled
    assert main([*verb, "-m", "folder", "--compile"]) == 0
    assert model.is_compiled


def test_ask(model: FakeModel, capsys):
    assert main(["ask", "a.png", "is it red?", "is it big?", "-m", "folder"]) == 0
    assert capsys.readouterr().out == "is it red? yes\nis it big? yes\n"
    assert model.calls == [(Path("a.png"), ["is it red?", "is it big?"], {})]


@pytest.mark.parametrize(("options", "word"), [([], None), (["--word", "red"], "red")])
def test_ask_draws_a_map(model: FakeModel, capsys, monkeypatch: pytest.MonkeyPatch, options: list[str], word: str):
    class Maps:
        def heatmap(self, chosen):
            assert chosen == word
            return self

        def draw(self):
            return self

        def save(self, file, format):
            file.write(f"drawn as {format}".encode())

    @contextlib.contextmanager
    def record_attention(target):
        assert target is model
        yield Maps()

    monkeypatch.setattr(mmattn.maps.record, "record_attention", record_attention)
    assert main(["ask", "a.png", "is it red?", "-m", "folder", "--json", "--map", "m.png", *options]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"question": "is it red?", "answer": "yes"}
    assert printed.err == "wrote m.png\n"
    assert Path("m.png").read_text() == "drawn as PNG"
    Path("m.png").write_text("mine")
    asked = ["ask", "a.png", "is it red?", "-m", "folder", "--map", "m.png", *options]
    assert main(asked) == 2
    expected = "mmattn: m.png: exists already; nothing was written. Choose another name, or overwrite with --force\n"
    assert capsys.readouterr().err == expected
    assert Path("m.png").read_text() == "mine"
    assert main([*asked, "--force"]) == 0
    assert Path("m.png").read_text() == "drawn as PNG"


def test_a_full_disk_leaves_no_half_map(model: FakeModel, capsys, monkeypatch: pytest.MonkeyPatch):
    class Maps:
        def heatmap(self, chosen):
            return self

        def draw(self):
            return self

        def save(self, file, format):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mmattn.maps.record, "record_attention", lambda target: contextlib.nullcontext(Maps()))
    assert main(["ask", "a.png", "is it red?", "-m", "folder", "--map", "m.png"]) == 1
    said = "mmattn: m.png: not complete (No space left on device); what is done is in m.png.part\n"
    assert capsys.readouterr().err == said
    assert not Path("m.png").exists()


def test_a_folder_without_a_model(tmp_path: Path, capsys):
    assert main(["caption", "a.png", "-m", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"mmattn: {tmp_path}: no model here")
    assert printed.err.count("\n") == 1
