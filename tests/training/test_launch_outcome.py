"""Which of several failed processes is told about, and the reports that they leave."""

from __future__ import annotations

import json
import signal
import types

import pytest

from mmattn.cli.guard import run_guarded
from mmattn.errors import DataError, RunError
from mmattn.training import launch, rank_report
from mmattn.training.devices import PROCESSES_VARIABLE
from mmattn.training.peers import LostProcessError


@pytest.fixture
def ranks(tmp_path):
    """`_Ranks` without processes: reports can be left for three of them, which have not met unless `keys` says so."""
    made = launch._Ranks.__new__(launch._Ranks)
    made.num_processes, made.signals, made.keys = 3, [], 0
    made.store = types.SimpleNamespace(num_keys=lambda: made.keys)
    made.context = types.SimpleNamespace(error_files={rank: str(tmp_path / f"{rank}.json") for rank in range(3)})
    return made


def leave(ranks, rank, message, exit_code, *, at, is_consequence=False):
    extra = {"timestamp": str(int(at)), "at": at, "exit_code": exit_code, "is_consequence": is_consequence}
    with open(ranks.context.error_files[rank], "w") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def told(ranks, dead, codes):
    error = ranks._outcome(dead, codes)
    return str(error), error.exit_code


def test_the_first_that_failed_by_itself(ranks):
    leave(ranks, 0, "lost another", 1, at=1.0, is_consequence=True)
    leave(ranks, 1, "no column 'image'", 2, at=3.0)
    leave(ranks, 2, "no column 'text'", 2, at=2.0)
    assert told(ranks, {0: 1}, {0: 1, 1: 2, 2: 2}) == ("no column 'text'", 2)


def test_a_process_that_somebody_killed_comes_first(ranks):
    leave(ranks, 0, "lost another", 1, at=1.0, is_consequence=True)
    message, code = told(ranks, {0: 1, 2: -signal.SIGKILL}, {0: 1, 1: -signal.SIGTERM, 2: -signal.SIGKILL})
    assert message.startswith("process 2 of 3 was killed by SIGKILL (out of memory?), and the others were ended")
    assert code == 1


def test_a_stop_is_told_even_if_one_was_ended_before_its_report(ranks):
    ranks.signals = [signal.SIGTERM]
    leave(ranks, 1, "stopped by SIGTERM after step 3", 143, at=1.0, is_consequence=True)
    assert told(ranks, {1: 143}, {0: -signal.SIGTERM, 1: 143}) == ("stopped by SIGTERM after step 3", 143)


def test_a_stop_before_anything_was_begun(ranks):
    ranks.signals = [signal.SIGINT]
    codes = {rank: -signal.SIGINT for rank in range(3)}
    assert told(ranks, codes, codes) == ("stopped by SIGINT before the first step", 130)


@pytest.mark.parametrize(
    ("signals", "keys", "said"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 3, ("SIGTERM", 143)),
        ([signal.SIGTERM, signal.SIGINT], 3, ("SIGINT", 130)),
        ([signal.SIGINT, signal.SIGINT], 0, ("SIGINT", 130)),
        ([signal.SIGTERM], 3, ("SIGTERM", 143)),  # after the last step
    ],
)
def test_a_second_signal_or_one_after_training_has_begun(ranks, signals, keys, said):
    ranks.signals, ranks.keys = signals, keys
    codes = {rank: -signals[-1] for rank in range(3)}
    name, code = said
    assert told(ranks, codes, codes) == (
        f"ended at once by {name}; go on with --resume from the last checkpoint",
        code,
    )
    leave(ranks, 1, "stopped by SIGTERM after step 3", 143, at=1.0, is_consequence=True)  # it came in time
    assert told(ranks, codes, codes) == ("stopped by SIGTERM after step 3", 143)


def test_one_that_ended_without_a_word(ranks):
    message, code = told(ranks, {1: 7}, {1: 7})
    assert message.startswith("process 1 of 3 ended with exit code 7, and the others were ended: go on with --resume")
    assert code == 1


def fail(error):
    def action():
        raise error

    return action


@pytest.fixture
def in_rank(tmp_path, monkeypatch):
    def enter(rank, *, ours):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        if ours:
            monkeypatch.setenv(PROCESSES_VARIABLE, "2")
        return tmp_path / "error.json"

    return enter


def test_a_launched_process_leaves_its_line_to_the_launcher(in_rank, capsys):
    file = in_rank(1, ours=True)
    assert run_guarded(fail(DataError("pictures.jsonl: no column\n'image'")), debug=False) == 2
    assert capsys.readouterr().err == ""
    report = rank_report.read_report(file)
    assert report is not None
    assert (report.message, report.exit_code, report.is_consequence) == ("pictures.jsonl: no column 'image'", 2, False)
    assert run_guarded(fail(IndexError("list index")), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err
    report = rank_report.read_report(file)
    assert report is not None
    assert report.message == "IndexError: list index"
    assert run_guarded(fail(LostProcessError("lost")), debug=False) == 1
    assert rank_report.read_report(file).is_consequence  # pyright: ignore[reportOptionalMemberAccess]


def test_under_torchrun_what_all_raise_is_said_by_the_first(in_rank, capsys):
    error = RunError("the disk is full")
    error.is_everywhere = True
    file = in_rank(1, ours=False)
    assert run_guarded(fail(error), debug=False) == 1
    assert capsys.readouterr().err == ""
    assert rank_report.read_report(file).is_consequence  # pyright: ignore[reportOptionalMemberAccess]
    in_rank(0, ours=False)
    assert run_guarded(fail(error), debug=False) == 1
    assert capsys.readouterr().err == "mmattn: the disk is full\n"
    in_rank(1, ours=False)
    assert run_guarded(fail(RunError("only here")), debug=False) == 1
    assert capsys.readouterr().err == "mmattn: only here\n"


def test_torchrun_reads_our_reports(in_rank):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = in_rank(1, ours=False)
    run_guarded(fail(RunError("the disk is full")), debug=False)
    failure = ProcessFailure(local_rank=1, pid=997, exitcode=1, error_file=str(file))
    assert "the disk is full" in ChildFailedError("recipes/vlm.py", {1: failure}).format_msg()


def test_no_report_is_none(tmp_path):
    assert rank_report.read_report(tmp_path / "absent.json") is None
    (tmp_path / "half.json").write_text('{"message"')
    assert rank_report.read_report(tmp_path / "half.json") is None


def test_cores_are_shared(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)), raising=False)
    assert [launch._threads_per_rank(number) for number in (1, 2, 3, 8)] == [7, 3, 2, 1]
