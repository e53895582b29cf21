"""Bad input through the real command line: one clear line, the right exit code, nothing half-written."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmattn.cli.main import main
from tests.inference.tiny_models import pictures, save_stock


def _fails(capsys, arguments: list[str], code: int, message: str) -> None:
    capsys.readouterr()
    assert main(arguments) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmattn: ")]
    assert len(error) == 1, error
    assert re.search(message, error[0]), error[0]
    assert "unexpected" not in error[0]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Six pictures with captions, and a tiny stock BLIP in `blip/`."""
    for number, picture in enumerate(pictures(6)):
        picture.save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "text": "red cat"} for number in range(6)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_stock(tmp_path / "blip", "captioning")
    return tmp_path


def _train(folder: Path, *overrides: str) -> list[str]:
    return [
        *["train", "vlm/finetune-blip", f"data.path={folder / 'captions.jsonl'}"],
        *[f"model.from_pretrained={folder / 'blip'}", f"training.output_dir={folder / 'run'}"],
        *["training.max_steps=2", "training.batch_size=2", "training.num_workers=0", "training.eval_every=0"],
        *overrides,
    ]


def test_a_wrong_key_names_the_nearest(captions, capsys):
    nearest = r"learning_rat'.*Did you mean 'training.learning_rate'"
    _fails(capsys, _train(captions, "training.learning_rat=1"), 2, nearest)
    (captions / "my.yaml").write_text("recipe: vlm\ntraning: {max_steps: 3}\n")
    _fails(capsys, ["train", str(captions / "my.yaml")], 2, r"my.yaml.*traning.*Did you mean 'training'")
    assert not (captions / "run").exists()


def test_questions_to_a_checkpoint_that_is_never_asked(captions, capsys):
    rows = [{"image": "0.png", "text": "two", "q": "how many ?"}, {"image": "1.png", "text": "cat", "q": None}]
    (captions / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = r"data\.columns\.question: a BLIP captioning checkpoint is never asked: leave the column out"
    _fails(capsys, _train(captions, "data.columns.question=q"), 2, asked)
    assert not (captions / "run").exists()


def test_what_would_end_an_evaluation_is_said_before_the_training(captions, capsys):
    folder = captions
    rows = [{"image": f"{number}.png", "text": "two", "q": f"how{' many' * (5 * number)} ?"} for number in range(6)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["vlm/debug", "data.kind=files", f"data.path={folder / 'captions.jsonl'}", "data.columns.question=q"]
    settings += [f"data.eval_path={folder / 'captions.jsonl'}", f"training.output_dir={folder / 'run'}"]
    # bos, how, 25 x many, space, ?, sep, and 20 new ones; in the first four pictures 15 x many is the most.
    question = (
        r"question 'how many .*\.\.\.' takes 30 tokens, .* may say 50, more than its 48 positions: shorten it, or"
    )
    for verb in ("check", "train"):
        _fails(capsys, [verb, *settings], 2, question)
        _fails(capsys, [verb, *settings, f"data.eval_path={folder / 'gone.jsonl'}"], 2, r"gone\.jsonl: no such file")
        _fails(capsys, [verb, *settings, "evaluation.limit=4", "evaluation.num_beams=99"], 2, "num_beams is 99; .*many")
        longest = r"examples\.max_length=49 is more than the 48 positions that the model has: lower it, or raise model"
        _fails(capsys, [verb, *settings, "evaluation.splits=[]", "examples.max_length=49"], 2, longest)
    assert main(["check", *settings, "evaluation.limit=4"]) == 0
    _fails(
        capsys, ["check", *settings, "evaluation.limit=0"], 2, r"evaluation\.limit must be at least 1 or null, not 0"
    )
    assert not (folder / "run").exists()


def test_a_record_without_a_text_that_is_drawn_is_said_before_the_training(captions, capsys):
    rows = [{"image": f"{number}.png", "text": "two", "sort": "b" if number == 4 else "a"} for number in range(6)]
    (captions / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = _train(captions, "data.columns.kind=sort", "data.eval_fraction=0", "evaluation.splits=[]")
    message = r"kind_weights: record 5 of \S*captions\.jsonl has no text that is ever drawn, only b: give"
    for verb in ("check", "train"):
        _fails(capsys, [verb, *settings[1:], "examples.kind_weights={b: 0}"], 2, message)
    assert not (captions / "run").exists()
    assert main(["check", *settings[1:], "examples.kind_weights={c: 0}"]) == 0


def test_a_missing_file(captions, capsys):
    missing = captions / "gone.jsonl"
    _fails(capsys, _train(captions, f"data.path={missing}"), 2, r"gone\.jsonl")
    _fails(capsys, ["train", str(captions / "gone.yaml")], 2, r"gone\.yaml: no such file")
    _fails(capsys, _train(captions, f"model.from_pretrained={captions / 'gone'}"), 2, r"gone")
    assert not (captions / "run").exists()


def test_a_form_that_is_not_the_checkpoint_s(captions, capsys):
    message = (
        r"^mmattn: model\.network\.image\.image_size is 480, but \S+blip has \d+: it is for a new model, and "
        r"model\.from_pretrained opens one: leave it out$"
    )
    for verb in ("train", "check"):
        _fails(capsys, [verb, *_train(captions, "model.network.image.image_size=480")[1:]], 2, message)
    revision = r"model\.revision: of model\.from_pretrained, which is not set"
    _fails(
        capsys, ["train", "vlm/debug", "model.revision=main", f"training.output_dir={captions / 'run'}"], 2, revision
    )
    assert not (captions / "run").exists()


def test_a_wrong_column_names_those_that_are_there(captions, capsys):
    for verb in ("train", "check"):
        arguments = [verb, *_train(captions, "data.columns.text=txt")[1:]]
        _fails(capsys, arguments, 2, r"captions\.jsonl has no column 'txt', it has 'image', 'text'")
    assert not (captions / "run").exists()


def test_an_empty_data_set(captions, capsys):
    (captions / "captions.jsonl").write_text("")
    _fails(capsys, _train(captions), 2, r"captions\.jsonl.*(empty|no rows|nothing)")
    assert not (captions / "run").exists()


def test_a_text_file_named_png_is_skipped_and_too_many_stop_the_run(captions, capsys):
    (captions / "0.png").write_text("no picture")
    assert main(_train(captions, "data.max_bad=3", "data.eval_fraction=0")) == 0
    for number in range(6):
        (captions / f"{number}.png").write_text("no picture")
    again = f"training.output_dir={captions / 'again'}"
    _fails(
        capsys, _train(captions, "data.max_bad=3", "data.eval_fraction=0", again), 1, r"too many .*\.png: not a picture"
    )
    assert not list((captions / "again").glob("checkpoints/*"))


def _edit(captions: Path, change) -> None:
    file = captions / "blip" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


_NAME = "text_decoder.bert.encoder.layer.1.crossattention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(_NAME), rf"1 missing: {_NAME}"),
        (lambda tensors: tensors.update(stray=torch.ones(2)), r"1 not known: stray"),
        (lambda tensors: tensors.update({_NAME: torch.ones(3, 5)}), rf"of another shape: {_NAME} is \[3, 5\]"),
    ],
)
def test_a_checkpoint_whose_tensors_do_not_fit(captions, capsys, change, message):
    _edit(captions, change)
    _fails(capsys, _train(captions), 2, message)
    _fails(capsys, ["caption", str(captions / "0.png"), "--model", str(captions / "blip")], 2, message)
    assert not (captions / "run").exists()


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(captions, capsys):
    (captions / "blip" / "model.safetensors").unlink()
    mark = captions / "executed"
    torch.save({"weight": _Bomb(mark)}, captions / "blip" / "pytorch_model.bin")
    _fails(capsys, _train(captions), 2, r"pytorch_model\.bin")
    (captions / "blip" / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
    _fails(capsys, _train(captions), 2, r"pytorch_model\.bin")
    assert not mark.exists()


def test_a_cut_off_checkpoint(captions, capsys):
    file = captions / "blip" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    _fails(capsys, _train(captions), 2, r"model\.safetensors")


def test_a_second_run_into_the_same_folder_loses_nothing(captions, capsys):
    assert main(_train(captions)) == 0
    before = (captions / "run" / "final" / "model.safetensors").read_bytes()
    _fails(capsys, _train(captions), 2, r"run.*resume")
    assert (captions / "run" / "final" / "model.safetensors").read_bytes() == before


def test_pictures_that_are_none_when_captioning(captions, capsys):
    (captions / "note.png").write_text("no picture")
    model = str(captions / "blip")
    _fails(capsys, ["caption", str(captions / "note.png"), "--model", model], 2, r"note\.png: not a picture")
    _fails(capsys, ["caption", str(captions / "gone.png"), "--model", model], 2, r"gone\.png: no such file")
    _fails(capsys, ["ask", str(captions / "0.png"), "what colour ?", "--model", model], 2, r"caption")
