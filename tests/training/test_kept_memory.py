"""Memory that stays with the process between the steps of a training on a CPU."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from mmattn.training import kept_memory as module
from mmattn.training.kept_memory import kept_memory, memory_remarks

IS_GLIBC = platform.libc_ver()[0] == "glibc"
PROGRAM = """
import json, os, resource, threading
import torch
from mmattn.training.kept_memory import kept_memory, stop_keeping_memory

def in_thread():
    with kept_memory(torch.device("cpu")) as is_kept:
        found["in a thread"] = is_kept

def faults(make=lambda: torch.ones(10_000_000)):  # 40 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(2)
found = {"before": [faults() for _ in range(3)]}
def many():
    return [torch.ones(10_000_000) for _ in range(30)]  # 1.2 GB

with kept_memory(torch.device("cpu")) as found["is_kept"]:
    with kept_memory(torch.device("cpu")):
        faults()
    found["inside"] = [faults() for _ in range(3)]
    found["many"] = [faults(many) for _ in range(2)][1]
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # as torch does in a data worker: those of its parent are not there
        stop_keeping_memory()
        found["in a worker"] = [faults() for _ in range(3)]
        print(json.dumps(found["in a worker"]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    most = resident()
found["after"] = [faults() for _ in range(3)]
found["given_back"] = most - resident()
print(json.dumps(found))
"""


def run(**environment: str) -> tuple[list, dict]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    )
    worker, found = map(json.loads, done.stdout.splitlines())
    return worker, found


@pytest.mark.skipif(not IS_GLIBC, reason="an allocator other than glibc's is left alone")
def test_freed_memory_is_found_again_and_given_back_at_the_end() -> None:
    worker, found = run()
    assert found["is_kept"]
    assert not found["in a thread"]
    # Pages of 4 KiB, cleared by the system; what is given back by and by may serve one more.
    assert min(*found["before"], *found["after"][:2], *worker[:2]) > 5000
    assert max(found["inside"][1:]) < 100
    assert found["many"] < 500
    assert found["given_back"] > 30_000_000


@pytest.mark.parametrize(
    "environment", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}, {"LD_PRELOAD": " "}]
)
def test_an_allocator_that_somebody_has_chosen_is_left_alone(environment, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with kept_memory(torch.device("cpu")) as is_kept:
        assert not is_kept
    said = [f"freed memory goes back to the system in every step, as {min(environment)} is set"]
    assert memory_remarks(torch.device("cpu")) == (said if IS_GLIBC else [])
    assert memory_remarks(torch.device("meta")) == []


def test_other_devices_and_other_libraries_are_left_alone(monkeypatch) -> None:
    with kept_memory(torch.device("meta")) as is_kept:
        assert not is_kept
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("", ""))
    with kept_memory(torch.device("cpu")) as is_kept:
        assert not is_kept


@pytest.mark.skipif(not IS_GLIBC, reason="an allocator other than glibc's is left alone")
def test_it_ends_when_a_run_fails(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: _Recorded(calls))
    with pytest.raises(RuntimeError, match="full"), kept_memory(torch.device("cpu")):
        raise RuntimeError("full")
    assert calls == [
        ("mallopt", -4, 0),
        ("mallopt", -1, -1),
        ("mallopt", -1, 64 << 20),
        ("mallopt", -3, 32 << 20),
        ("mallopt", -4, 65536),
        ("malloc_trim", 0),
    ]


class _Recorded:
    def __init__(self, calls: list) -> None:
        self.mallopt = lambda *arguments: calls.append(("mallopt", *arguments)) or 1
        self.malloc_trim = lambda *arguments: calls.append(("malloc_trim", *arguments))
