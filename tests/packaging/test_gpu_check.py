"""scripts/gpu_check.sh: no card is said in a line, and a part that fails or hangs costs its own rows only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.scripts import open_script

ROOT = Path(__file__).resolve().parents[2]
ADD = "import json, sys; print(json.dumps({'table': 'T', 'cells': {'a': 1, 'b': 'x|y'}}), file=open(sys.argv[1], 'a'))"
PARTS = {
    "tests": ADD,
    "attention": f"{ADD}; raise ValueError('no kernel')",
    "translator": "import time; print('begun', flush=True); time.sleep(60)",
    "vlm": f"{ADD}; print('FAILED tests/a.py::test_b[1] - wrong'); print('1 failed, 3 passed')",
}
LIMITS = {"tests": 30, "attention": 30, "translator": 2, "vlm": 30}  # seconds


@pytest.fixture
def unchanged(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu"))
    yield open_script("gpu/run.py", monkeypatch)
    for name in ("report", "processes", "side_by_side"):
        sys.modules.pop(name, None)


@pytest.fixture
def runner(unchanged, monkeypatch, tmp_path):
    module = unchanged
    monkeypatch.setattr(module, "PARTS", {part: module.Part(f"{part}.py", LIMITS[part]) for part in PARTS})
    monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "gpu.md")
    monkeypatch.setattr(
        module, "command", lambda part, job, _, rows: [sys.executable, "-c", PARTS[part], str(rows), job]
    )
    return module


def test_a_full_page_even_if_parts_fail(runner, monkeypatch, tmp_path, capsys):
    output = tmp_path / "new" / "gpu.md"
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--output", str(output), "--seconds", "35"])
    assert runner.main() == 1
    printed = capsys.readouterr().out
    assert "== attention: FAILED (exit status 1)" in printed
    assert "ValueError: no kernel" in printed
    assert "== translator: OUT OF TIME (not done in " in printed
    assert "== vlm: ok" in printed  # its status says so
    assert "Failed:\n\n- `tests/a.py::test_b[1]`\n" in output.read_text()
    text = output.read_text()
    assert text.count("| 1 | x/y |\n") == 3
    assert "| attention | 1 | " in text
    assert "**failed: exit status 1** |" in text
    assert re.search(r"\| translator \| 1 \| .* \| \*\*out of time: not done in \d+ s\*\* \|", text)
    assert "Part `attention`, run 1, " in text
    assert "; **not complete: exit status 1**." in text
    assert "`ValueError: no kernel`" in text
    assert "| torch |" in text
    assert "scripts/gpu_check.sh --quick" in text


def test_all_well_is_status_0(runner, monkeypatch, tmp_path):
    arguments = ["run.py", "--device", "cpu", "--output", str(tmp_path / "gpu.md"), "--part", "vlm"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert runner.main() == 0


def run(runner, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", *map(str, words)])
    return runner.main()


def test_two_short_runs_make_one_page(runner, monkeypatch, tmp_path, capsys):
    one, two, whole = tmp_path / "one", tmp_path / "two", tmp_path / "docs" / "gpu.md"
    assert run(runner, monkeypatch, "--part", "vlm", "--part", "attention", "--keep", one) == 1
    assert "no page: without tests, translator it would not be whole" in capsys.readouterr().out
    assert not whole.exists()
    monkeypatch.setitem(PARTS, "attention", PARTS["vlm"])
    monkeypatch.setitem(PARTS, "translator", PARTS["vlm"])
    words = ["--part", "tests", "--part", "attention", "--part", "translator", "--keep", two, "--join", one]
    assert run(runner, monkeypatch, *words) == 0
    joined = whole.read_text()
    assert "|  | run 1 | run 2 |" in joined
    for part, number in (("vlm", 1), ("attention", 2), ("translator", 2), ("tests", 2)):
        assert f"| {part} | {number} | " in joined
    data = json.loads(whole.with_suffix(".json").read_text())
    assert data["tables"]["attention"] == {"T": [{"a": 1, "b": "x|y"}]}
    assert data["parts"]["attention"]["run"] == 2
    assert data["parts"]["vlm"]["error"] is None
    assert data["runs"][0]["machine"]["torch"]
    # The same without running anything, in the other order: what went well stays.
    whole.unlink()
    assert run(runner, monkeypatch, "--join", two, "--join", one) == 0
    again = json.loads(whole.with_suffix(".json").read_text())
    assert (again["parts"]["attention"]["run"], again["parts"]["attention"]["error"]) == (1, None)


def test_a_page_keeps_what_a_later_run_has_not_done(runner, monkeypatch, tmp_path):
    old, new, whole = tmp_path / "old.json", tmp_path / "new", tmp_path / "docs" / "gpu.json"
    days = iter(("2026-01-01", "2026-01-02", "2026-01-03"))
    monkeypatch.setattr(runner, "now", lambda: next(days))
    for part in ("attention", "translator"):
        monkeypatch.setitem(PARTS, part, PARTS["vlm"])
    assert run(runner, monkeypatch, "--output", old.with_suffix(".md")) == 0
    monkeypatch.setitem(PARTS, "attention", "raise SystemExit(1)")
    monkeypatch.setitem(PARTS, "tests", PARTS["vlm"].replace("'a': 1", "'a': 2"))
    assert run(runner, monkeypatch, "--part", "tests", "--part", "attention", "--keep", new, "--join", old) == 1
    data = json.loads(whole.read_text())
    assert [data["parts"][part]["run"] for part in PARTS] == [2, 1, 1, 1]
    assert [data["tables"][part]["T"][0]["a"] for part in ("tests", "attention")] == [2, 1]
    # A run that nothing is taken from any more is not shown.
    monkeypatch.setitem(PARTS, "attention", PARTS["tests"])
    every = [word for part in PARTS for word in ("--part", part)]
    assert run(runner, monkeypatch, *every, "--keep", new, "--join", whole) == 0
    assert [each["begun"] for each in json.loads(whole.read_text())["runs"]] == ["2026-01-03"]


def keep(folder, day, **parts):
    """A run as a folder keeps it: of each part its error, and how many rows it has."""
    report = sys.modules["report"]
    folder.mkdir()
    outcomes = [
        report.Outcome(part, 3.0, error, "", is_out_of_time=bool(error) and "not done" in error)
        for part, (error, _) in parts.items()
    ]
    report.Run(f"2026-01-0{day}T10:00:00+00:00", {"card": f"card {day}, 1 GiB"}, outcomes, 9.0).write(folder)
    for part, (_, number) in parts.items():
        rows = [json.dumps({"table": "T", "cells": {"day": day, "row": row}}) + "\n" for row in range(number)]
        (folder / f"{part}.jsonl").write_text("".join(rows))


def test_of_each_part_the_newest_whole_run_is_taken_and_said(runner, monkeypatch, tmp_path, capsys):
    late, wrong = "not done in 9 s", "exit status 1"
    keep(tmp_path / "1", 1, tests=(None, 0), attention=(None, 3), translator=(late, 5), vlm=(wrong, 2))
    keep(tmp_path / "2", 2, tests=(wrong, 0), attention=(late, 9), translator=(late, 4), vlm=(late, 2))
    keep(tmp_path / "3", 3, attention=(None, 2))
    page = tmp_path / "page.md"
    assert run(runner, monkeypatch, "--join", tmp_path / "2", "--join", tmp_path / "1", "--output", page) == 0
    capsys.readouterr()
    joined = ("--join", tmp_path / "3", "--join", page.with_suffix(".json"))
    assert run(runner, monkeypatch, *joined, "--output", tmp_path / "new.md") == 0
    data = json.loads((tmp_path / "new.json").read_text())
    days = {part: data["runs"][facts["run"] - 1]["begun"][9:10] for part, facts in data["parts"].items()}
    # The newest that is whole, though it has fewer rows; of two that are not, that with more rows, or the newer.
    assert days == {"tests": "1", "attention": "3", "translator": "1", "vlm": "2"}
    assert [row["day"] for row in data["tables"]["translator"]["T"]] == [1] * 5
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("run ")] == [
        "run 1, 2026-01-03 10:00, card 3: attention",
        "run 2, 2026-01-02 10:00, card 2: vlm (not complete)",
        "run 3, 2026-01-01 10:00, card 1: tests, translator (not complete)",
    ]


def test_that_a_later_run_was_not_whole_is_said_where_an_earlier_one_is_shown(runner, monkeypatch, tmp_path, capsys):
    keep(tmp_path / "1", 1, tests=(None, 0))
    keep(tmp_path / "2", 2, tests=("exit status 1", 0))
    joined = ("--join", tmp_path / "1", "--join", tmp_path / "2", "--output", tmp_path / "page.md")
    assert run(runner, monkeypatch, *joined) == 0
    said = capsys.readouterr().out
    assert "run 1, 2026-01-01 10:00, card 1: tests\n" in said
    assert "left out: tests of 2026-01-02 10:00, failed: exit status 1\n" in said


def test_what_cannot_be_joined_is_said_before_anything_is_run(runner, monkeypatch, tmp_path, capsys):
    (tmp_path / "page.json").write_text('{"runs": []}')
    assert run(runner, monkeypatch, "--part", "vlm", "--join", tmp_path / "page.json") == 1
    assert capsys.readouterr().out == (
        "gpu_check.sh: --join: what is there was not written by this script (KeyError: 'parts')\n"
    )


def test_a_kept_run_is_not_lost_to_one_of_other_parts(runner, monkeypatch, tmp_path, capsys):
    keep(tmp_path / "one", 1, tests=(None, 0), vlm=(None, 1))
    with pytest.raises(SystemExit) as caught:
        run(runner, monkeypatch, "--part", "vlm", "--keep", tmp_path / "one")
    assert caught.value.code == 2
    assert "one: an earlier run is kept there, whose tests would be lost" in capsys.readouterr().err
    assert (tmp_path / "one" / "vlm.jsonl").stat().st_size
    # The same again, and more, takes its place.
    assert run(runner, monkeypatch, "--part", "vlm", "--part", "tests", "--keep", tmp_path / "one") == 0


def test_a_folder_without_a_run_is_refused(runner, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(runner, monkeypatch, "--join", tmp_path)
    assert caught.value.code == 2
    assert "no run.json there; give a folder that --keep has filled, or a page's JSON file" in capsys.readouterr().err


def test_what_has_no_time_left_is_not_begun(runner, monkeypatch, tmp_path, capsys):
    assert run(runner, monkeypatch, "--part", "translator", "--part", "vlm", "--seconds", "0.5") == 1
    printed = capsys.readouterr().out
    assert "== translator: OUT OF TIME (not begun: no time was left)" in printed
    assert "== vlm: OUT OF TIME (not begun: no time was left)" in printed


@pytest.mark.parametrize(
    ("ends", "result"),
    [
        ({"a": None}, "out of time: a: not done in 3 s; cut off with the whole check"),
        ({"a": 124, "b": 0}, "out of time: a: not done in 3 s"),
        ({"a": None, "b": 2}, "failed: a: not done in 3 s; b: exit status 2"),
        ({"a": 0, "b": 0}, "ok"),
        ({}, "out of time: cut off with the whole check"),
    ],
)
def test_a_part_has_failed_if_more_than_time_was_wanting(runner, monkeypatch, tmp_path, ends, result):
    monkeypatch.setitem(runner.PARTS, "vlm", runner.Part("vlm.py", 30, ("a", "b")))
    jobs = {name: runner.Job("vlm", name, [], {}, tmp_path / name, 30) for name in ends}
    found = runner.outcome("vlm", [runner.Ended.of(jobs[name], 3.0, code) for name, code in ends.items()])
    assert found.result == result


def test_tests_that_are_cut_off_have_failed_if_one_has(runner, tmp_path):
    job = runner.Job("tests", "", [], {}, tmp_path / "log", 30)
    job.log.write_text("FAILED tests/a.py::test_b - wrong\nno tests ran in 3 s\n")
    found = runner.outcome("tests", [runner.Ended.of(job, 3.0, None)])
    assert (found.result, found.failed) == ("failed: not done in 3 s", ["tests/a.py::test_b"])
    job.log.write_text("212 passed\n")
    assert runner.outcome("tests", [runner.Ended.of(job, 3.0, None)]).result == "out of time: not done in 3 s"


def test_the_page_says_of_each_part_what_its_figures_for_programs_do(unchanged):
    report = sys.modules["report"]
    data = json.loads((ROOT / "docs" / "gpu.json").read_text(encoding="utf-8"))
    runs = [report.Run(each["begun"], each["machine"], []) for each in data["runs"]]
    kept = {}
    for name, fields in data["parts"].items():
        kept[name] = (fields.pop("run"), report.Outcome(**fields))
    assert report.table(report.results(runs, kept)) in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_every_part_has_its_script(unchanged):
    for name, part in unchanged.PARTS.items():
        for job in part.jobs:
            assert name == "tests" or unchanged.script_of(name, job).is_file(), (name, job)
        assert part.seconds < unchanged.TOTAL
        assert list(part.memory) == list(part.jobs)
    assert unchanged.TOTAL + sys.modules["side_by_side"].LAST_WORDS_S < 15 * 60


def test_training_has_the_memory_that_it_was_measured_to_take(unchanged):
    import training  # from the folder that `unchanged` has put on the path

    def takes_as_much(row):  # or was it measured before a batch was made larger?
        return row.get("batch") == training.batch(row["recipe"], SimpleNamespace(tiny=False))

    tables = json.loads((ROOT / "docs" / "gpu.json").read_text(encoding="utf-8"))["tables"]
    for name in ("training", "training_compiled"):
        rows = [row for table in tables[name].values() for row in table]
        assert {row["recipe"] for row in rows} == set(unchanged.RECIPES)
        for row in rows:
            if not takes_as_much(row):
                continue
            peak = float(next(cell for column, cell in row.items() if column.startswith("peak memory")).split()[0])
            assert 1.05 * peak + 1 <= unchanged.PARTS[name].memory[row["recipe"]] <= 1.2 * peak + 1, row
    assert all(map(takes_as_much, next(iter(tables["training_compiled"].values()))))
    # Beside the tests two recipes are prepared on a card of 80 GB.
    memory = unchanged.PARTS["training"].memory
    assert unchanged.PARTS["tests"].memory[""] + memory["translate"] + memory["vlm"] < unchanged.CARD_SHARE * 78


def test_an_experiment_is_run_only_where_it_is_named(unchanged, tmp_path):
    assert "experiments" not in unchanged.whole()
    options = unchanged.argparse.Namespace(device="cpu", tiny=True)
    words = unchanged.command("experiments", "residual_norm", options, tmp_path / "rows")
    assert words[1] == str(ROOT / "scripts" / "gpu" / "experiments" / "residual_norm.py")
    assert "--only" not in words


@pytest.mark.parametrize("name", ["training", "training_compiled", "compiled", "diffusion"])
def test_the_jobs_of_a_part_are_those_that_its_script_knows(unchanged, name):
    part = unchanged.PARTS[name]
    words = [sys.executable, str(ROOT / "scripts" / "gpu" / part.script), "--help"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    choices = re.search(r"--only \{(.+?)\}", done.stdout)
    assert choices is not None, done.stderr
    assert sorted(choices[1].split(",")) == sorted(part.jobs)


def test_a_part_of_several_processes(runner, monkeypatch, tmp_path, capsys):
    add = ADD.replace("{'a': 1, 'b': 'x|y'}", "{'job': sys.argv[2]}")
    monkeypatch.setitem(PARTS, "vlm", f"{add}; sys.exit(3 * (sys.argv[2] == 'b')); print('end')")
    monkeypatch.setitem(runner.PARTS, "vlm", runner.Part("vlm.py", 30, ("b", "a")))
    (tmp_path / "vlm.0-old.jsonl").write_text('{"table": "T", "cells": {"job": "old"}}\n')
    words = ("--part", "vlm", "--keep", tmp_path, "--output", tmp_path / "gpu.md", "--at-once", 2)
    assert run(runner, monkeypatch, *words) == 1
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["tables"]["vlm"] == {"T": [{"job": "b"}, {"job": "a"}]}
    assert data["parts"]["vlm"]["error"] == "b: exit status 3"
    assert data["runs"][0]["seconds"] > 0
    printed = capsys.readouterr().out
    assert "== vlm b: FAILED (exit status 3)" in printed
    assert "== vlm a: ok" in printed


def test_what_was_done_is_kept_when_the_check_itself_is_ended(runner, monkeypatch, tmp_path):
    monkeypatch.setitem(PARTS, "vlm", f"{ADD}; import os, signal; os.kill(os.getppid(), signal.SIGTERM)")
    with pytest.raises(SystemExit):
        with_sigterm(lambda: run(runner, monkeypatch, "--part", "tests", "--part", "vlm", "--keep", tmp_path))
    kept = runner.read_run(tmp_path)
    assert [outcome.result for outcome in kept.outcomes] == ["ok", "out of time: cut off with the whole check"]
    assert kept.tables["vlm"] == {"T": [{"a": 1, "b": "x|y"}]}


def with_sigterm(function):
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        function()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_marked_tests_are_found(runner):
    assert "tests/gpu" in runner.test_files()
    assert "tests/training/test_gpu.py" in runner.test_files()


@pytest.mark.parametrize("chosen", ["", sys.executable])
def test_no_card_is_one_line_and_status_2(chosen, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment["MMATTN_PYTHON"] = chosen
    done = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu_check.sh: no CUDA card here")
    assert done.stdout.count("\n") == 1


def test_a_python_that_is_not_there_is_said():
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh"],
        cwd=ROOT,
        env=os.environ | {"MMATTN_PYTHON": "/no/python"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: MMATTN_PYTHON=/no/python cannot import torch (or is not there)\n",
    )


def test_the_tests_say_how_many_have_passed(unchanged, monkeypatch, tmp_path):
    monkeypatch.setattr(unchanged, "test_files", lambda: ["tests/training/test_gpu.py"])
    monkeypatch.setattr(unchanged, "usable_cores", lambda: 2)
    words = unchanged.command("tests", "", None, tmp_path / "rows.jsonl")
    words[words.index("-m", 3) + 1] = "not gpu"  # what runs here
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "gpu"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    last = [line for line in done.stdout.splitlines() if line.strip()][-1]
    assert re.match(r"\d+ passed", last), done.stdout


def test_interrupted_tests_say_at_once_how_many_have_ended(tmp_path):
    tests = ["passes(): pass", "fails(): assert 1 == 2", "hangs(): raise KeyboardInterrupt", "last(): pass"]
    (tmp_path / "test_it.py").write_text("".join(f"def test_{each}\n" for each in tests))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "failures", "-p", "no:cacheprovider", "test_it.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts" / "gpu")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "\nFAILED test_it.py::test_fails - assert 1 == 2\n" in done.stdout
    assert "\ninterrupted: 1 passed, 1 failed\n" in done.stdout
