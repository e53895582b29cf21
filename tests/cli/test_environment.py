from __future__ import annotations

import platform

import pytest

from mmattn.cli.environment import Facts, devices, facts, known_problems, versions
from mmattn.cli.main import main


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Facts(torch=(2, 13), cudnn=None, capabilities=()), []),
        (Facts(torch=(2, 13), cudnn=(9, 19), capabilities=((8, 0),)), []),
        (Facts(torch=(2, 13), cudnn=(9, 19), capabilities=((9, 0),)), ["196678"]),
        (Facts(torch=(2, 13), cudnn=(9, 19), capabilities=((10, 0),)), ["193893"]),
        (Facts(torch=(2, 13), cudnn=(9, 8), capabilities=((9, 0),)), ["196678", "cuDNN 9.8 is older"]),
    ],
)
def test_known_problems(found: Facts, expected: list[str]):
    problems = known_problems(found)
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem


def test_this_machine():
    table = dict(versions())
    assert table["python"] == platform.python_version()
    assert table["torch"].startswith(".".join(map(str, facts().torch)))
    assert devices()[0].startswith("cpu: ")


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("Versions:", "torch", "Devices:", "Attention backends:", "eager", "sdpa", "flex", "Known problems:"):
        assert part in shown
