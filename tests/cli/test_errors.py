"""Exit codes and messages."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmattn.cli.guard import run_guarded, split_debug
from mmattn.cli.main import main

UNEXPECTED = "mmattn: IndexError: list index out of range (unexpected; --debug shows the traceback)\n"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("run", 1, "mmattn: training.loss: not finite at step 3; lower learning_rate\n"),
        ("data", 2, "mmattn: pictures.jsonl: no column 'image'; columns are a, b\n"),
        ("bug", 1, UNEXPECTED),
        ("interrupt", 130, ""),
        ("exit", 0, ""),
    ],
)
def test_failures_while_training(toy_tree: Path, capsys, failure: str, code: int, message: str):
    assert main(["train", "toy/debug", f"failure={failure}"]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err.strip()) == ("", message.strip())


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_debug_shows_the_traceback_wherever_it_stands(toy_tree: Path, capsys, position: int):
    arguments = ["train", "toy/debug", "failure=bug"]
    arguments.insert(position, "--debug")
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.endswith("mmattn: IndexError: list index out of range\n")


def test_debug_after_two_dashes_is_an_argument():
    assert split_debug(["ask", "--debug", "--", "--debug"]) == (["ask", "--", "--debug"], True)
    assert split_debug(["ask", "--", "--debug"]) == (["ask", "--", "--debug"], False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["train"], "Missing argument 'CONFIG'"),
        (["ls", "--all"], "No such option: --all"),
        (["caption", "a.png"], "Missing option '--model'"),
        (["caption", "a.png", "--model", "x", "--num-beams", "0"], "Invalid value for '--num-beams'"),
        (["train", "nowhere.yaml"], "mmattn: nowhere.yaml: no such file. `mmattn cp NAME nowhere.yaml` makes one"),
        (["train", "toy/debugg"], "mmattn: toy/debugg: no such file or shipped config. Did you mean 'toy/debug'?"),
        (["train", "toy/debug", "training.max_step=3"], "unknown key 'training.max_step'. Did you mean"),
        (["train", "toy/debug", "training.max_steps=x"], "training.max_steps: Value 'x' of type 'str' could not"),
        (["check", "toy/debug", "training"], "mmattn: override 'training': must be key.path=value"),
        (["train", "toy/debug", "--training.max_steps=3"], "set without dashes: training.max_steps=VALUE"),
        (["ask", "a.png", "one?", "two?", "--model", "x", "--map", "m.png"], "but 2 questions were given; ask one"),
        (["ask", "a.png", "one?", "--model", "x", "--map", "m.svg"], "mmattn: --map m.svg: must end in .png"),
        (["ask", "a.png", "one?", "--model", "x", "--map", "no/m.png"], "the folder no does not exist; make it first"),
        (["ask", "a.png", "one?", "--model", "x", "--force"], "--force: needs --map PNG, the file to overwrite"),
        (["ask", "a.png", "one?", "--model", "x", "--word", "cat"], "mmattn: --word cat: needs --map PNG to draw on"),
    ],
)
def test_wrong_usage(toy_tree: Path, capsys, arguments: list[str], message: str):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert list(Path().iterdir()) == []


def test_an_output_that_cannot_hold_a_text_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run_guarded(lambda: print("Kätzchen"), debug=False) == 1
    message = "mmattn: this output is written as ascii, which has no '\\xe4': set PYTHONIOENCODING=utf-8\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), "the output: cannot be written (No space left); make room, or"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), "a/b: cannot be written (No space left); make room, or write"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "out of memory (CUDA out of memory. Tried): take smaller",
        ),
        (
            RuntimeError("[x] can't allocate memory: 9 bytes"),
            "out of memory ([x] can't allocate memory: 9 bytes): take",
        ),
        (MemoryError(), "out of memory: take smaller batches or pictures"),
    ],
)
def test_no_room_is_nothing_unexpected(capsys, error: Exception, message: str):
    def fail() -> None:
        raise error

    assert run_guarded(fail, debug=False) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"mmattn: {message}")
    assert "unexpected" not in said


def test_no_reader_is_no_traceback():
    """`mmattn ls | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "mmattn", "ls"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
