"""scripts/gpu: parts prepare side by side, and measure alone."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = str(ROOT / "scripts" / "gpu")
NAMES = ("measure", "processes", "side_by_side", "training", "training_compiled", "kill_resume")
# What a part's process does, by letters: t asks for its turn, and gives it back; its log has what it did and when.
PLAYER = r"""
import os, sys, time
reads, writes = map(int, os.environ["MMATTN_TURN"].split(","))
def say(what):
    os.write(1, f"{what} {time.monotonic()}\n".encode())
say("begin")
for word in sys.argv[1].split():
    if word == "turn":
        os.write(writes, b"+")
        os.read(reads, 1)
        say("turn")
    elif word == "back":
        say("back")
        os.write(writes, b"-")
    elif word == "child":
        import subprocess
        subprocess.Popen([sys.executable, "-c", sys.argv[2]])
    else:
        end = time.monotonic() + float(word)
        while time.monotonic() < end:
            say("tick")
            time.sleep(0.01)
say("end")
"""
TICKS = r"""
import os, time
while True:
    os.write(1, f"tick {time.monotonic()}\n".encode())
    time.sleep(0.01)
"""

LINE = re.compile(r"(begin|turn|back|tick|end) [\d.]+")


@pytest.fixture
def scripts(monkeypatch):
    """Modules of scripts/gpu, as they are imported there."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "accept"))
    monkeypatch.syspath_prepend(GPU)
    path = list(sys.path)
    yield lambda name: importlib.import_module(name)
    sys.path[:] = path
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def crew(scripts, tmp_path):
    """Run jobs of (name, words, settings): what each said, [(what, when)], and how each ended."""
    side_by_side = scripts("side_by_side")

    def run(*plays, seconds=60.0, at_once=3, gib=100.0, longest_turn=math.inf):
        jobs, ended = [], {}
        for name, words, settings in plays:
            command = [sys.executable, "-c", PLAYER, words, TICKS]
            jobs.append(side_by_side.Job(name, "", command, {}, tmp_path / name, **{"seconds": 60.0, **settings}))
        side_by_side.SideBySide(
            jobs,
            end=time.monotonic() + seconds,
            at_once=at_once,
            gib=gib,
            longest_turn=longest_turn,
            cwd=tmp_path,
            on_end=lambda each: ended.__setitem__(each.job.part, each),
        ).run()
        logs = {job.part: job.log.read_text().splitlines() if job.log.is_file() else [] for job in jobs}
        # An interrupt leaves a traceback in there.
        words = {name: [line.split() for line in log if LINE.fullmatch(line)] for name, log in logs.items()}
        said = {name: [(word, float(at)) for word, at in lines] for name, lines in words.items()}
        return said, ended

    return run


def when(said, what):
    return next(at for word, at in said if word == what)


def test_nothing_runs_in_the_turn_of_another_nor_do_its_children(crew):
    said, ended = crew(("first", "0.5 turn 1.0 back 0.2", {}), ("second", "child 3.0 turn 0.1 back", {}))
    begin, end = when(said["first"], "turn"), when(said["first"], "back")
    ticks = [at for word, at in said["second"] if word == "tick"]
    assert len([at for at in ticks if at < begin]) > 5
    assert not [at for at in ticks if begin < at < end]
    assert len([at for at in ticks if end < at]) > 5
    assert {name: each.error for name, each in ended.items()} == {"first": None, "second": None}


def test_a_turn_is_waited_for(crew):
    said, _ = crew(("first", "turn 0.8 back 0.1", {}), ("second", "turn 0.3 back", {}))
    one, other = ((when(said[name], "turn"), when(said[name], "back")) for name in ("first", "second"))
    assert one[1] <= other[0] or other[1] <= one[0]


def test_being_stopped_costs_no_time_of_its_own(crew):
    _, ended = crew(("first", "0.3 turn 2.5 back", {}), ("second", "0.8", {"seconds": 2.3}))
    assert ended["second"].error is None
    assert ended["second"].seconds < 2.3


def test_one_that_takes_too_long_is_ended_and_its_turn_given_to_the_next(crew):
    said, ended = crew(("first", "turn 30 back", {"seconds": 1.0}), ("second", "0.1 turn 0.1 back", {}))
    assert (ended["first"].error, ended["first"].is_out_of_time) == ("not done in 1 s", True)
    assert (ended["second"].error, ended["second"].is_out_of_time) == (None, False)
    assert when(said["second"], "end")


def test_a_turn_that_does_not_end_costs_the_others_no_more_than_the_longest_may_take(crew):
    plays = (("first", "turn 30 back", {}), ("second", "0.1 turn 0.1 back turn 0.1 back", {}))
    said, ended = crew(*plays, longest_turn=1.0)
    assert (ended["first"].error, ended["first"].is_out_of_time) == ("had its turn for 1 s, all others waiting", True)
    # Turns are counted one by one.
    assert ended["second"].error is None
    assert when(said["second"], "end")


def test_all_is_ended_at_the_end_and_nothing_begun_after_it(crew):
    begin = time.monotonic()
    said, ended = crew(("first", "30", {}), ("second", "turn 30 back", {}), ("third", "30", {}), seconds=2, at_once=2)
    assert time.monotonic() - begin < 2 + 6
    assert ended["first"].error is not None
    assert ended["third"].error == "not begun: no time was left"
    assert said["third"] == []


def test_what_does_not_fit_beside_is_passed_over(crew):
    plays = (("first", "1.0", {"gib": 60.0}), ("second", "0.1", {"gib": 60.0}), ("third", "0.1", {"gib": 30.0}))
    said, _ = crew(*plays)
    assert when(said["first"], "end") <= when(said["second"], "begin")
    assert when(said["third"], "begin") < when(said["first"], "end")


def test_those_that_were_stopped_already_stay_so(scripts):
    processes = scripts("processes")
    words = [sys.executable, "-c", PLAYER, "child 60", TICKS]
    environment = os.environ | {"MMATTN_TURN": "0,1"}
    parent = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
    try:
        own = psutil.Process(parent.pid)
        wait_for(lambda: own.children())
        child = own.children()[0]
        child.suspend()
        wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
        stopped = processes.freeze(parent.pid)
        assert [each.pid for each in stopped] == [parent.pid]
        wait_for(lambda: own.status() == psutil.STATUS_STOPPED)
        processes.thaw(stopped)
        wait_for(lambda: own.status() != psutil.STATUS_STOPPED)
        assert child.status() == psutil.STATUS_STOPPED
    finally:
        for each in (*psutil.Process(parent.pid).children(), parent):
            each.kill()
        parent.wait()


def wait_for(is_so, seconds=30):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_options_ask_for_the_turn_and_give_it_back(scripts, monkeypatch):
    measure = scripts("measure")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    monkeypatch.setenv("MMATTN_TURN", f"{theirs_in},{theirs_out}")
    monkeypatch.setattr(sys, "argv", ["part", "--device", "cpu", "--tiny", "--only", "b"])
    options = measure.read_options("", ["a", "b"])
    assert (options.only, options.turns) == ("b", (theirs_in, theirs_out))
    os.write(ours_out, b"!")
    with options.turn():
        assert os.read(ours_in, 9) == b"+"
    assert os.read(ours_in, 9) == b"-"
    os.close(ours_out)  # the check has ended
    with pytest.raises(SystemExit, match="has ended"), options.turn():
        pass


def test_a_turn_is_given_back_though_the_card_fails(scripts, monkeypatch):
    measure = scripts("measure")
    reads, writes = os.pipe()
    os.write(writes, b"!")
    theirs_in, theirs_out = os.pipe()
    options = measure.Options("cuda", True, None, turns=(reads, theirs_out))
    waits = iter((None, RuntimeError("an illegal memory access")))

    def wait(device):
        if (problem := next(waits)) is not None:
            raise problem

    monkeypatch.setattr(measure, "wait", wait)
    with pytest.raises(RuntimeError, match="illegal"), options.turn():
        pass
    assert os.read(theirs_in, 9) == b"+-"


def test_a_row_that_fails_or_is_left_out_costs_no_other_and_is_in_the_status(scripts, capsys):
    measure = scripts("measure")
    status = measure.Status()
    with status.row("one"):
        pass
    assert status.code == 0
    status.skip("two")
    assert status.code == sys.modules["side_by_side"].OUT_OF_TIME
    with status.row("three"):
        raise ValueError("no kernel")
    assert status.code == 1
    printed = capsys.readouterr()
    assert "out of time: two not measured\nfailed: three\n" in printed.out
    assert "ValueError: no kernel" in printed.err


def test_a_call_that_cannot_be_captured_is_timed_with_its_launches_and_leaves_no_trace(scripts, monkeypatch):
    measure, torch, calls = scripts("measure"), mock.MagicMock(), []
    torch.cuda.graph.return_value.__exit__.side_effect = RuntimeError("invalidated\nby a wait")
    torch.cuda.stream.return_value.__exit__.return_value = False
    monkeypatch.setattr(measure, "torch", torch)
    monkeypatch.setattr(
        measure, "_event_us", lambda replays: {name: (replay(), 6.0)[1] for name, replay in replays.items()}
    )
    assert measure.card_us([lambda: calls.append(1), lambda: calls.append(2)], "cuda") == (3.0, False)
    assert calls[-2:] == [1, 2]
    # Streams are entered once to warm up, once around the capture, and left as often.
    assert torch.cuda.stream.return_value.__exit__.call_count == 2
    torch.cuda.default_generators.__getitem__.return_value.graphsafe_set_state.assert_called_once()
    # Beside others it has no figure: theirs are without launches.
    assert measure.alternating_us({"one": [lambda: None], "two": []}, "cuda") == {"one": math.inf, "two": math.inf}


# A recipe's stand-in: a line of metrics every 20 ms; resumed it takes a while, then cuts the lines after step 12 off.
RECIPE = """
import json, pathlib, sys, time
folder, steps, is_resumed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), "--resume" in sys.argv
folder.mkdir(exist_ok=True)
file, first = folder / "metrics.jsonl", 1
if is_resumed:
    time.sleep(1)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:12]))
    print("resumed from x/step-00000012", flush=True)
    first = 13
print("training 1,500,000 of 1,500,000 parameters, steps", flush=True)
for step in range(first, steps + 1):
    before = time.perf_counter()
    time.sleep(0.02)
    clock = {"step_s": time.perf_counter() - before, "data_s": 0.0, "tokens_per_s": 5.0, "peak_memory_bytes": 2**30}
    clock |= {"mfu": 0.25} if step != first else {}
    with file.open("a") as lines:
        lines.write(json.dumps({"kind": "train", "step": step, "loss": 1 / step, "time": clock}) + "\\n")
"""


@pytest.fixture
def training(scripts, monkeypatch):
    module = scripts("training")

    def launch(recipe, folder, steps, options, *, resume=False, **settings):
        with open(folder.with_suffix(".log"), "ab") as log:
            words = [str(folder), str(steps), *["--resume"] * resume]
            return subprocess.Popen([sys.executable, "-c", RECIPE, *words], stdout=log, stderr=log)

    monkeypatch.setattr(module, "launch", launch)
    return module


def test_a_recipe_is_killed_resumed_and_measured_to_its_end(training, tmp_path):
    options = sys.modules["measure"].Options("cpu", False, tmp_path / "rows.jsonl", "translate")
    # Its metrics are those of the first piece until it has begun: no reason to measure.
    assert training.rows("T", lambda *call: training.measured(*call, 64, options), options) == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text())["cells"]
    assert (row["recipe"], row["killed at"], row["resumed from"]) == ("translate", 40, 12)
    assert (row["parameters"], row["MFU"], row["peak memory"]) == ("1.5 M", "25.0%", "1.0 GiB")
    assert 18 <= int(row["ms a step"]) < 500


def test_a_recipe_that_is_cut_off_says_how_far_it_came(training, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LIMIT_ON_CPU_S", 3.0)
    options = sys.modules["measure"].Options("cpu", False, tmp_path / "rows.jsonl", "translate")
    code = training.rows("T", lambda *call: training.measured(*call, 100_000, options), options)
    assert code == sys.modules["side_by_side"].OUT_OF_TIME
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["table"] == "T: cut off"
    assert row["cells"]["MFU, so far"] == "25.0%"
    assert "MFU" not in row["cells"]
    assert row["cells"]["reached"] > 20


def test_a_compiled_recipe_is_not_waited_for_after_its_last_step(training, scripts, monkeypatch, tmp_path):
    compiled = scripts("training_compiled")
    monkeypatch.setattr(compiled, "launch", training.launch)
    monkeypatch.setitem(globals(), "RECIPE", RECIPE + "time.sleep(60)\n")
    options, begin = sys.modules["measure"].Options("cpu", False, None, "translate"), time.monotonic()
    cells = compiled.measured("translate", tmp_path / "translate", 40, options)
    assert cells["MFU"] == "25.0%"
    assert time.monotonic() - begin < 40


def test_a_limit_does_not_run_while_the_process_is_stopped(training):
    code = "import sys; sys.path[:0] = sys.argv[1:]; import training, time; clock = training.Clock(3.0)\n"
    code += "print('go', flush=True)\nfor _ in range(20): clock.tick()\nprint(clock.left)"
    words = [sys.executable, "-c", code, GPU, str(ROOT)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert float(process.communicate()[0]) > 0
    assert process.returncode == 0
