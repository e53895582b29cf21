"""The verbs themselves, on a recipe for tests."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mmattn.cli.main import main
from tests.toy_recipe import CONFIG, RECIPE


def test_ls(toy_tree: Path, capsys):
    assert main(["ls"]) == 0
    expected = "Recipes:\n  toy        A recipe for tests.\nConfigs:\n  toy/debug  A config for tests\n"
    assert capsys.readouterr().out == expected


def test_cp_then_train(toy_tree: Path, capsys):
    assert main(["cp", "toy/debug", "my.yaml"]) == 0
    explains = "`mmattn show my.yaml --explain` says what each setting means"
    assert capsys.readouterr().out == f"wrote my.yaml: edit it ({explains}), then run `mmattn train my.yaml`\n"
    Path("my.yaml").write_text(CONFIG.replace("11", "13"))
    assert main(["train", "my.yaml"]) == 0
    assert capsys.readouterr().out == "done: step 13; written to runs/toy\n"


def test_cp_refuses_to_overwrite(toy_tree: Path, capsys):
    Path("my.yaml").write_text("mine")
    assert main(["cp", "toy/debug", "my.yaml"]) == 2
    assert "my.yaml: exists already; nothing was written" in capsys.readouterr().err
    assert Path("my.yaml").read_text() == "mine"


def test_show_prints_every_value_and_reads_back(toy_tree: Path, capsys):
    assert main(["show", "toy/debug", "training.learning_rate=0.5"]) == 0
    shown = capsys.readouterr().out
    assert shown == (
        "recipe: toy\nname: from the file\nfailure: ''\noutput_dir: runs/toy\n"
        "training:\n  max_steps: 11\n  learning_rate: 0.5\n"
    )
    Path("shown.yaml").write_text(shown)
    assert main(["show", "shown.yaml"]) == 0
    assert capsys.readouterr().out == shown


def test_show_explains_every_setting(toy_tree: Path, capsys):
    assert main(["show", "toy/debug", "training.learning_rate=0.5", "--explain"]) == 0
    shown = capsys.readouterr().out
    assert shown == (
        "# What is trained; `mmattn ls` lists the recipes.\nrecipe: toy\n"
        "# [default from the defaults]\nname: from the file\nfailure: ''\noutput_dir: runs/toy\n\n"
        "# How long, and how fast.\ntraining:\n"
        "  # Steps of the whole run. [default 7]\n  max_steps: 11\n  # [default 0.001]\n  learning_rate: 0.5\n"
    )
    Path("shown.yaml").write_text(shown)
    assert main(["show", "shown.yaml", "--explain"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["check", "shown.yaml"]) == 0
    assert main(["train", "shown.yaml"]) == 0
    assert capsys.readouterr().out.endswith("done: step 11; written to runs/toy\n")


def test_show_a_part(toy_tree: Path, capsys):
    assert main(["show", "toy/debug", "--only", "training"]) == 0
    assert capsys.readouterr().out == "training:\n  max_steps: 11\n  learning_rate: 0.001\n"
    assert main(["show", "toy/debug", "--only", "training.max_steps", "--explain"]) == 0
    expected = "training:\n  # Steps of the whole run. [default 7]\n  max_steps: 11\n"
    assert capsys.readouterr().out == expected
    assert main(["show", "toy/debug", "--only", "training.max_step"]) == 2
    expected = "mmattn: unknown key 'training.max_step'. Did you mean 'training.max_steps'?\n"
    assert capsys.readouterr().err == expected


def test_show_without_docstrings_says_so(toy_tree: Path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-OO", "-m", "mmattn", "show", "vlm/debug", "--explain"]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    message = "mmattn: --explain reads docstrings, and python -OO leaves them out: run without -OO (PYTHONOPTIMIZE)\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_check_prints_what_the_recipe_says(toy_tree: Path, capsys):
    assert main(["check", "toy/debug", "training.max_steps=17"]) == 0
    assert capsys.readouterr().out == "config: valid\nsteps: 17\n"


def test_train_takes_overrides_and_resume(toy_tree: Path, capsys):
    assert main(["train", "toy/debug", "training.max_steps=17", "--resume", "output_dir=out"]) == 0
    assert capsys.readouterr().out == "resumed\ndone: step 17; written to out\n"


def test_train_starts_from_another_run(toy_tree: Path, capsys):
    assert main(["train", "toy/debug", "--resume-from", "run/checkpoints/step-00000013", "output_dir=out"]) == 0
    assert capsys.readouterr().out == "resumed from run/checkpoints/step-00000013\ndone: step 11; written to out\n"
    assert main(["train", "toy/debug", "--resume", "--resume-from", "run"]) == 2
    expected = "mmattn: --resume goes on in output_dir, --resume-from run starts from there in a new one: give one of"
    assert capsys.readouterr().err.startswith(expected)


def test_only_the_first_process_reports(toy_tree: Path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "toy/debug"]) == 0
    assert capsys.readouterr().out == ""


def test_eval_uses_the_config_beside_the_model(toy_tree: Path, capsys):
    Path("run/best").mkdir(parents=True)
    Path("run/checkpoints/step-00000013").mkdir(parents=True)
    Path("run/checkpoints/step-00000013/config.yaml").write_text(CONFIG.replace("11", "13"))
    assert main(["eval", "run"]) == 0
    assert capsys.readouterr().out == "accuracy  0.7500\nsteps     13.0000\n"
    assert main(["eval", "run", "--json", "--data", "toy/debug", "training.max_steps=3"]) == 0
    assert capsys.readouterr().out == '{"accuracy": 0.75, "steps": 3.0}\n'


@pytest.mark.filterwarnings("always::UserWarning")
def test_eval_says_which_settings_there_no_longer_are(toy_tree: Path, capsys):
    Path("run/checkpoints/step-00000013").mkdir(parents=True)
    Path("run/checkpoints/step-00000013/config.yaml").write_text(CONFIG + "speed: 3\n")
    assert main(["eval", "run"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("accuracy  0.7500\n")
    assert said.err.startswith("mmattn: warning: ")
    assert said.err.endswith("has a setting that there no longer is, which is left out: speed, 3\n")


def test_eval_writes_hypotheses_where_the_recipe_has_any(toy_tree: Path, capsys):
    arguments = ["eval", "run", "--data", "toy/debug", "--output", "said.jsonl"]
    Path("run").mkdir()
    assert main(arguments) == 2
    expected = "mmattn: --output said.jsonl: the recipe 'toy' writes no hypotheses, leave it out\n"
    assert capsys.readouterr().err == expected
    recipe = toy_tree / "recipes" / "toy.py"
    writes = "def evaluate(folder, config, *, hypotheses=None):\n    return {'said': str(hypotheses), 'accuracy': 1.0}"
    recipe.write_text(RECIPE.replace("def evaluate(folder, config):", f"{writes}\n\n\ndef unused(folder, config):"))
    sys.modules.pop("mmattn._recipes.toy")
    assert main(arguments) == 0
    assert capsys.readouterr().out == "said      said.jsonl\naccuracy  1.0000\n"


def test_eval_names_what_is_wrong(toy_tree: Path, capsys):
    assert main(["eval", "nowhere"]) == 2
    assert capsys.readouterr().err == "mmattn: nowhere: no such folder; give the output_dir of a training run\n"
    Path("empty").mkdir()
    assert main(["eval", "empty"]) == 2
    assert "empty: no checkpoints with a config.yaml here or above" in capsys.readouterr().err


def test_the_recipe_runs_as_a_script(toy_tree: Path, capsys, monkeypatch):
    script = str(toy_tree / "recipes" / "toy.py")
    monkeypatch.setattr(sys, "argv", [script, "--config", "toy/debug", "training.max_steps=3", "--resume"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == "resumed\ndone: step 3; written to runs/toy\n"


def test_the_script_fails_as_the_command_does(toy_tree: Path):
    Path("my.yaml").write_text(CONFIG)
    Path("other.yaml").write_text("recipe: other")
    script = toy_tree / "recipes" / "toy.py"

    def run(*arguments: str) -> tuple[int, str]:
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert run("--config", "my.yaml", "failure=run") == (
        1,
        "mmattn: training.loss: not finite at step 3; lower learning_rate\n",
    )
    assert run("--config", "other.yaml") == (
        2,
        "mmattn: other.yaml: is for the recipe 'other', but this is 'toy': launch recipes/other.py\n",
    )
    code, message = run()
    assert code == 2
    assert "Missing option '--config'" in message
