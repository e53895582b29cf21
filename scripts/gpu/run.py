"""Prove and measure mmattn on a CUDA card: tests, then measurements, one Markdown page; see scripts/gpu_check.sh.

Every part is one process or several, each with a time limit; one that fails costs its own rows only. They prepare side
by side and measure one at a time (`side_by_side`). What is kept of a run (`--keep`) can be joined into a later page
(`--join`): two short runs make one page. Exit status 0: all well, 1: a part failed or ran out
of time, 2: no CUDA card.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import usable_cores
from report import (
    FILE,
    ROOT,
    Outcome,
    Run,
    machine,
    now,
    page,
    read_run,
    read_runs,
    row_files,
    shown,
    sources,
    table_data,
)
from side_by_side import Ended, Job, SideBySide

HERE = Path(__file__).parent
RECIPES = ("translate", "vlm", "diffusion")


@dataclass(frozen=True)
class Part:
    """A script, and its place in the page.

    Attributes:
        script: in this folder; "pytest" for the tests; or a folder, which has a script for each job.
        seconds: each of its processes may run so long, generously: all together have `TOTAL`.
        jobs: what each of its processes does, "" where it is one; in this order they begin.
        gib: of the card's memory, for each job, or for all of them alike.
        is_extra: run only where it is named, and not wanting where it is not in the page.
    """

    script: str
    seconds: float
    jobs: tuple[str, ...] = ("",)
    gib: float | tuple[float, ...] = 8.0
    is_extra: bool = False

    @property
    def memory(self) -> dict[str, float]:
        """Of the card, in GiB, for each job."""
        each = self.gib if isinstance(self.gib, tuple) else (self.gib,) * len(self.jobs)
        return dict(zip(self.jobs, each, strict=True))


# Scripts of the folder `experiments`: kernels that get into the package only where a card shows a gain.
EXPERIMENTS = (
    "norm_projection",
    "residual_norm",
    "group_norm_silu",
    "channels_last_unet",
    "context_8bit",
    "folded_queries",
)
PROFILED = (*RECIPES, *(f"{name}-compiled" for name in RECIPES))
# What the steps were like before, and what they might be like: the longest to compile first.
PROFILED_CHANGES = (
    "diffusion-compiled-resnets",
    "diffusion-compiled-stock",
    "diffusion-compiled-benchmark",
    "translate-compiled-looked",
    "diffusion-stock",
    "diffusion-benchmark",
    "translate-looked-uncast",
    "vlm-looked-uncast",
)
# What was measured to be allocated (docs/gpu.json), a tenth more for what torch keeps besides, and 1 GiB for the
# process: a card of 80 GB prepares three or four parts at a time.
TRAINING_GIB = {
    "translate": 23.0,
    "vlm": 31.0,
    "diffusion": 46.0,
    "translate-compiled": 23.0,
    "vlm-compiled": 30.0,
    "diffusion-compiled": 44.0,
}


def training_gib(jobs: Iterable[str]) -> tuple[float, ...]:
    """Of the card's memory, for jobs that are named after a recipe and what is changed of it."""
    kept = (*RECIPES, "compiled")
    return tuple(TRAINING_GIB["-".join(word for word in job.split("-") if word in kept)] for job in jobs)


# The one that compiles longest begins first.
COMPILED = ("diffusion", "translate", "vlm")
# The most important first: a page that is cut off lacks the last. Memory of what does not train is an estimate: of its
# weights, in float32 where they are drawn, and of its inputs.
PARTS = {
    "tests": Part("pytest", 280, gib=16),
    "training": Part("training.py", 300, RECIPES, gib=training_gib(RECIPES)),
    "training_compiled": Part(
        "training_compiled.py", 310, COMPILED, gib=training_gib(f"{name}-compiled" for name in COMPILED)
    ),
    "short_keys": Part("short_keys.py", 140),
    "compiled": Part("compiled.py", 260, ("translator", "unet", "vlm"), gib=(6, 12, 6)),
    "decode": Part("decode.py", 150, gib=4),
    "packed": Part("packed.py", 150, gib=16),
    "varlen": Part("varlen.py", 120, gib=4),
    "maps": Part("map_output.py", 120),
    "attention": Part("attention.py", 270, gib=12),
    "translator": Part("translator.py", 200, gib=5),
    "vlm": Part("vlm.py", 130, gib=5),
    "diffusion": Part("diffusion.py", 240, ("compiled-2", "compiled-1", "unets", "pixart"), gib=(24, 10, 20, 10)),
    "experiments": Part("experiments", 270, EXPERIMENTS, gib=10, is_extra=True),
    "profile": Part("profile_training.py", 280, PROFILED, gib=training_gib(PROFILED), is_extra=True),
    "profile_changes": Part(
        "profile_training.py", 280, PROFILED_CHANGES, gib=training_gib(PROFILED_CHANGES), is_extra=True
    ),
}
TOTAL = 885
CARD_SHARE = 0.9
# While one has its turn all others stand still. Those that measure for long begin nothing new after 90 s.
LONGEST_TURN = 120
PAGE = ROOT / "docs" / "gpu.md"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tests only; writes no page")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (docs/gpu.md, when it has every part)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each part's output and rows here")
    extra = ", ".join(part for part in PARTS if PARTS[part].is_extra) or "none"
    parser.add_argument(
        "--part",
        choices=PARTS,
        action="append",
        help=f"only this one (may be repeated); run only where it is named: {extra}",
    )
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all parts together (default {TOTAL})")
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        default=max(1, min(6, usable_cores() * 3 // 8)),
        help="so many processes prepare side by side; they measure one at a time (default: three for eight cores, at "
        "most 6; here %(default)s)",
    )
    parser.add_argument(
        "--join",
        type=Path,
        action="append",
        default=[],
        metavar="KEPT",
        help="a folder that an earlier run kept, or the JSON file of an earlier page: the page gets its parts too, of "
        "each part the latest in which all was well, else the one with most rows (may be repeated). Without --part "
        "nothing is run, and no card is needed",
    )
    # To see on a CPU that every script runs: sizes that mean nothing.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once}: it has to be at least 1")
    if options.keep is not None and (lost := lost_in(options.keep, parts_of(options))):
        parser.error(f"--keep {options.keep}: an earlier run is kept there, whose {', '.join(lost)} would be lost")
    for kept in options.join:
        if not (kept / FILE if kept.suffix != ".json" else kept).is_file():
            parser.error(f"--join {kept}: no {FILE} there; give a folder that --keep has filled, or a page's JSON file")
    return options


def parts_of(options: argparse.Namespace) -> list[str]:
    """What is run."""
    return list(dict.fromkeys(options.part or ())) or (["tests"] if options.quick else [] if options.join else whole())


def lost_in(folder: Path, parts: list[str]) -> list[str]:
    """Parts of the run that a folder keeps which a run of these parts would take the place of."""
    if not parts or not (folder / FILE).is_file():
        return []
    return [outcome.part for outcome in read_run(folder).outcomes if outcome.part not in parts]


def whole() -> list[str]:
    """The parts of a whole page."""
    return [part for part in PARTS if not PARTS[part].is_extra]


def script_of(part: str, job: str) -> Path:
    """The script that a job of a part runs."""
    path = HERE / PARTS[part].script
    return path / f"{job}.py" if path.is_dir() else path


def test_files() -> list[str]:
    """Where tests are marked `gpu`: their folder, and single files beside other tests."""
    single = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.parent.name != "gpu" and "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    return ["tests/gpu", *(str(path.relative_to(ROOT)) for path in single)]


def command(part: str, job: str, options: argparse.Namespace, rows: Path) -> list[str]:
    """What a job of a part runs."""
    if part != "tests":
        words = ["--device", options.device, "--rows", str(rows), *["--tiny"] * options.tiny]
        script = script_of(part, job)
        return [sys.executable, str(script), *words, *(["--only", job] if job and script.stem != job else [])]
    workers = str(max(1, min(12, usable_cores() // 2)))
    # Quiet once, which the settings of the project are already: twice there is no line of how many have passed.
    words = ["-m", "gpu", "-n", workers, "--dist", "worksteal", "--tb=short", "--show-capture=no", "-rN"]
    words += ["--durations=10", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "failures"]
    return [sys.executable, "-m", "pytest", *words, *test_files()]


def environment(part: str, options: argparse.Namespace, caches: Path) -> dict[str, str]:
    """Variables of a part's processes."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    settings |= {"MMATTN_TEST_DEVICE": options.device, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]))
    if part == "tests":  # in processes side by side
        return settings | {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    if options.at_once > 1:
        cores = usable_cores()
        # Of those that are there few compile at once, and one that does waits for it after every graph.
        settings |= {"OMP_NUM_THREADS": str(max(2, cores // options.at_once))}
        settings |= {"TORCHINDUCTOR_COMPILE_THREADS": str(max(2, cores // 2))}
        # Of its own: one that is stopped may hold a lock in there. (Our own kernels' cache has none, and is shared.)
        settings["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=caches)
    return settings


def jobs_of(parts: list[str], options: argparse.Namespace, folder: Path, caches: Path) -> list[Job]:
    """The processes of all parts, in their order; what earlier runs have left of them is removed."""
    jobs = []
    for part in parts:
        for file in row_files(folder, part):
            file.unlink()
        for number, name in enumerate(PARTS[part].jobs):
            # The number keeps rows in order.
            stem = f"{part}.{number}-{name}" if name else part
            words, log = command(part, name, options, folder / f"{stem}.jsonl"), folder / f"{stem}.log"
            log.unlink(missing_ok=True)
            own = (PARTS[part].seconds, PARTS[part].memory[name])
            jobs.append(Job(part, name, words, environment(part, options, caches), log, *own))
    return jobs


def outcome(part: str, ended: list[Ended]) -> Outcome:
    """Of a part, so far: what has not ended yet stays so where the whole check is cut off."""
    said = [(each, each.job.log.read_text(encoding="utf-8", errors="replace") if _ran(each) else "") for each in ended]
    failed = [name for _, text in said for name in re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", text, re.MULTILINE)]
    errors = [_named(each, each.error) for each in ended if each.error is not None]
    if len(ended) < len(PARTS[part].jobs):
        errors.append("cut off with the whole check")
    are_late = all(each.is_out_of_time for each in ended if each.error is not None)
    last = [_named(each, _last_line(text)) for each, text in said if _ran(each)]
    return Outcome(
        part,
        sum(each.seconds for each in ended),
        "; ".join(errors) or None,
        "; ".join(last)[:150],
        list(dict.fromkeys(failed))[:40],
        bool(errors) and are_late and not failed,
    )


def _ran(each: Ended) -> bool:
    return each.job.log.is_file()


def _named(each: Ended, text: str | None) -> str:
    return f"{each.job.name}: {text}" if each.job.name else str(text)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:150] if lines else "no output"


def show(each: Ended) -> None:
    """A line for a process; for one that failed what it said, tests by their names."""
    text = each.job.log.read_text(encoding="utf-8", errors="replace") if _ran(each) else ""
    result = "ok" if each.error is None else f"{'OUT OF TIME' if each.is_out_of_time else 'FAILED'} ({each.error})"
    name = f"{each.job.part} {each.job.name}".strip()
    print(f"== {name}: {result}, {each.seconds:.0f} s: {_last_line(text) if text else ''}", flush=True)
    if each.error is not None and text:
        failed = re.findall(r"^(?:FAILED|ERROR) .*$", text, flags=re.MULTILINE)
        print("\n".join(f"   {line[:300]}" for line in failed or text.splitlines()[-15:]), flush=True)


def card_gib(device: str) -> float:
    """What all parts together may take of the card's memory."""
    return CARD_SHARE * torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else math.inf


def run_parts(parts: list[str], options: argparse.Namespace, folder: Path) -> Run:
    """All of them; what is known is kept whenever a process has ended."""
    begin, run = time.monotonic(), Run(now(), machine(options.device), [])
    found: dict[str, list[Ended]] = {part: [] for part in parts}

    def on_end(each: Ended) -> None:
        show(each)
        found[each.job.part].append(each)
        run.outcomes[:] = [outcome(part, found[part]) for part in parts]
        run.seconds = time.monotonic() - begin
        run.write(folder)

    run.outcomes[:] = [outcome(part, []) for part in parts]
    run.write(folder)
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as caches:
        crew = SideBySide(
            jobs_of(parts, options, folder, Path(caches)),
            end=begin + options.seconds,
            at_once=options.at_once,
            gib=card_gib(options.device),
            longest_turn=LONGEST_TURN if options.device == "cuda" else math.inf,
            cwd=ROOT,
            on_end=on_end,
        )
        crew.run()
    return run


def main() -> int:
    """Every part, then the page."""
    options = arguments()
    parts = parts_of(options)
    if parts and options.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu_check.sh: no CUDA card here (torch {torch.__version__} sees none): nothing was checked")
        return 2
    # Before anything is run: what cannot be read would cost the page of it.
    try:
        joined = [run for each in options.join for run in read_runs(each)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"gpu_check.sh: --join: what is there was not written by this script ({type(error).__name__}: {error})")
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        own = [run_parts(parts, options, folder)] if parts else []
        runs, kept = shown([*joined, *(read_run(folder) for _ in own)], list(PARTS))
        missing = [part for part in whole() if part not in kept]
        output = options.output or (None if missing else PAGE)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(page(runs, kept), encoding="utf-8")
            output.with_suffix(".json").write_text(table_data(runs, kept), encoding="utf-8")
            print(f"written: {output} and {output.with_suffix('.json')}")
            print("\n".join(sources([*joined, *own], runs, kept)))
        elif not options.quick:
            print(
                f"no page: without {', '.join(missing)} it would not be whole "
                "(--output FILE writes what there is, --join FOLDER adds an earlier run)"
            )
    return 1 if any(outcome.error for run in own for outcome in run.outcomes) else 0


if __name__ == "__main__":
    # Processes learn by an interrupt that their time is over: also where a shell has this one in the background, and
    # has it ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A part is ended with its processes, whoever ends this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
