"""The command line frozen: a new or changed verb or option must be a decision, made here."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer.main

from mmattn import __version__
from mmattn.cli.main import app, main

SURFACE = {
    "ls": [],
    "cp": ["name", "target"],
    "show": ["config", "overrides", "--explain", "--only"],
    "check": ["config", "overrides"],
    "train": ["config", "overrides", "--resume", "--resume-from", "--processes -n"],
    "eval": ["folder", "overrides", "--data", "--output -o", "--json"],
    "translate": [
        *["model", "texts", "--input -i", "--output -o", "--src-lang", "--tgt-lang", "--num-beams", "--max-new-tokens"],
        *["--alignment", "--scores", "--quantize", "--compile", "--on-bad", "--json"],
    ],
    "caption": ["images", "--model -m", "--prompt", "--num-beams", "--compile", "--json"],
    "ask": ["image", "questions", "--model -m", "--map", "--word", "--num-beams", "--compile", "--force", "--json"],
    "generate": [
        *["--model -m", "prompts", "--file -f", "--output -o", "--negative", "--steps", "--guidance", "--seed"],
        *["--num-images -n", "--size", "--scheduler", "--batch-size", "--lora", "--kv", "--compile"],
        *["--grid", "--force", "--json"],
    ],
    "swap": ["model", "--backend", "--role", "--part", "--dry-run", "--verify", "--strict"],
    "export": ["source", "target", "overrides"],
    "maps": [
        *["--model -m", "text", "--image", "--word -w", "--output -o", "--save", "--layer", "--head", "--steps"],
        *["--seed", "--src-lang", "--tgt-lang", "--score", "--force", "--json"],
    ],
    "ui": ["models", "--host", "--port -p", "--share"],
    "plot": ["runs", "--output -o", "--metric", "--force"],
    "doctor": [],
    "demo": ["--output-dir -o"],
}


def _name(parameter: Any) -> str:
    return " ".join(sorted(parameter.opts)) if parameter.param_type_name == "option" else parameter.name


def test_verbs_and_options():
    group: Any = typer.main.get_command(app)
    assert {name: [_name(p) for p in command.params] for name, command in group.commands.items()} == SURFACE
    assert [_name(p) for p in group.params] == ["--version", "--debug"]


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == shown
    assert shown.startswith("Usage: mmattn [OPTIONS] COMMAND [ARGS]...\n\n  Train, score and use models")
    assert len(shown.splitlines()) < 33
    assert "..." not in shown.partition("Commands:")[2]  # no description is cut short
    for verb in SURFACE:
        assert f"\n  {verb} " in shown


@pytest.mark.parametrize("verb", SURFACE)
def test_help_of_a_verb_is_short_and_whole(verb: str, capsys):
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: mmattn {verb} ")
    # A terminal's 24 lines, with the prompt; a verb with more options than that has one line for each.
    assert len(shown.splitlines()) <= max(23, 9 + len(SURFACE[verb]))
    for name in SURFACE[verb]:
        if name.startswith("-"):
            assert name.split()[0] in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "mmattn", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
