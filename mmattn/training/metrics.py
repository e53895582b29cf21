"""Where a run's figures go: metrics.jsonl always, the console, and trackers."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image
from tqdm import tqdm

from mmattn.errors import RunError, UsageError
from mmattn.training.config import SAMPLES_FOLDER, TrainingConfig, config_dict
from mmattn.training.devices import on_main
from mmattn.training.state import LoopState

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, with `kind` (train, eval, skipped, final) and `step`.

    What depends on the clock or the machine stands under the one key `time`: without it, the file of a resumed run
    equals that of an unbroken one.
    """

    def __init__(self, output_dir: Path, *, keep_to_step: int, is_evaluation_due: bool = False) -> None:
        """Open the file to append, without the lines beyond step `keep_to_step`, and without an end (`final`), or
        where that step's evaluation is to be made again without that."""
        self.path = output_dir / METRICS_FILE
        if self.path.exists():
            os.truncate(self.path, _length_to_step(self.path, keep_to_step, is_evaluation_due))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; non-finite numbers become strings, for JSON has none.

        Raises:
            RunError: when it cannot be written, on a full disk for instance.
        """
        try:
            self._file.write(json.dumps(_finite(line)) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}; make room, then go on with --resume"
            ) from error

    def sync(self) -> None:
        """Bring everything written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        # A line that did not fit on the disk is still in its buffer, and would fail again: `write` has said it.
        with contextlib.suppress(OSError):
            self._file.close()


def read_metrics(path: Path | str, *, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file, or those of one kind; a last line that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):
                lines.append(json.loads(text))
    return [line for line in lines if kind is None or line["kind"] == kind]


def _length_to_step(path: Path, last_step: int, is_evaluation_due: bool) -> int:
    length = 0
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
                is_kept = raw.endswith(b"\n") and line["step"] <= last_step and line["kind"] != "final"
                is_kept &= not (is_evaluation_due and line["kind"] == "eval" and line["step"] == last_step)
            except (ValueError, KeyError, TypeError):
                is_kept = False
            if not is_kept:
                break
            length += len(raw)
    return length


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class RunLog:
    """All three places of a run; on other processes than the main one nothing is written.

    A tracker that fails in the run is left out from then on, which is said: `metrics.jsonl` has all that it gets.

    Raises:
        UsageError: a tracker cannot be started.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingConfig,
        state: LoopState,
        *,
        unit: str = "tokens",
        is_continued: bool = True,
    ) -> None:
        """Open them, to go on from `state`; `unit` is what a step counts, and `is_continued` whether lines that are
        there are of the same run."""
        first_step = state.step
        self.accelerator, self.has_trackers = accelerator, bool(config.trackers)
        self.samples = Path(config.output_dir) / SAMPLES_FOLDER
        is_main = accelerator.is_main_process
        self.progress = Progress(first_step, config.max_steps, log_every=config.log_every, enabled=is_main, unit=unit)
        self.metrics = None
        kept = first_step if is_continued else 0
        if is_main:
            folder, is_due = Path(config.output_dir), state.is_evaluation_due
            self.metrics = MetricsLog(folder, keep_to_step=kept, is_evaluation_due=is_due)
        if self.has_trackers:
            settings = {key: "none" if value is None else value for key, value in config_dict(config).items()}
            flat = {key: str(value) if isinstance(value, list) else value for key, value in settings.items()}
            on_main(accelerator, lambda: self._start_trackers(config.trackers, flat, kept))

    def _start_trackers(self, names: Sequence[str], settings: dict[str, Any], kept: int) -> None:
        # Steps that a killed run took after its last checkpoint are taken again: TensorBoard would draw them twice.
        options = {"tensorboard": {"purge_step": kept + 1}}
        try:
            self.accelerator.init_trackers("mmattn", config=settings, init_kwargs=options)
        except Exception as error:
            raise UsageError(
                f"training.trackers={','.join(names)} cannot be started ({_in_a_line(error)}): "
                "mend that, or leave it out"
            ) from error

    def _tell_trackers(self, tell: Callable[[Any], object]) -> None:
        for tracker in list(self.accelerator.trackers) if self.has_trackers else ():
            try:
                tell(tracker)
            except Exception as error:  # of a service, a disk: whatever its package raises
                self.accelerator.trackers.remove(tracker)
                self.say(
                    f"{tracker.name} gets no more figures of this run ({_in_a_line(error)}): all of them stand in "
                    f"{METRICS_FILE}"
                )

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.metrics is not None:
            self.metrics.write(line)

    def track(self, kind: str, figures: Mapping[str, float], step: int) -> None:
        """Send figures to the trackers, as `kind/name`."""
        named = {f"{kind}/{key}": value for key, value in figures.items()}
        self._tell_trackers(lambda tracker: tracker.log(named, step=step))

    def show(self, pictures: Mapping[str, Image], step: int) -> None:
        """Write pictures to `samples/`, and send them to the trackers that take pictures.

        Raises:
            RunError: when they cannot be written, on a full disk for instance.
        """
        for name, picture in pictures.items():
            path = self.samples / f"step-{step:08d}-{name}.png"
            try:
                self.samples.mkdir(exist_ok=True)
                picture.save(path)
            except OSError as error:
                reason = error.strerror or str(error)
                raise RunError(f"cannot write {path}: {reason}; make room, then go on with --resume") from error
        if pictures:
            images = {f"samples/{name}": np.asarray(picture)[None] for name, picture in pictures.items()}
            self._tell_trackers(lambda tracker: _show_images(tracker, images, step))

    def sync(self) -> None:
        """Bring every line to the disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        """End the bar, the file and the trackers."""
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.has_trackers:
            self._tell_trackers(lambda tracker: tracker.finish())
            self.accelerator.trackers.clear()
            self.accelerator.end_training()


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_images(tracker: Any, images: Mapping[str, np.ndarray], step: int) -> None:
    if hasattr(tracker, "log_images"):  # accelerate's trackers for TensorBoard and W&B have it
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(images, step=step, **layout)


class Progress:
    """The console: a tqdm bar on a terminal, plain lines elsewhere, nothing on other processes than the main one."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        *,
        log_every: int,
        enabled: bool,
        stream: TextIO | None = None,
        unit: str = "tokens",
    ) -> None:
        self.stream, self.unit = stream or sys.stderr, unit
        self.last_step, self.log_every, self.enabled = last_step, log_every, enabled
        self._bar: tqdm | None = None
        if enabled and self.stream.isatty():
            self._bar = tqdm(total=last_step, initial=first_step, file=self.stream, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one. A terminal or a pipe that is gone, or a full disk that the lines
        go to, does not end a run."""
        if not self.enabled:
            return
        try:
            if self._bar is not None:
                self._bar.write(text, file=self.stream)
            else:
                print(text, file=self.stream, flush=True)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                self.enabled = False
                self._let_go()

    def _let_go(self) -> None:
        """What still lies in the stream's buffer would fail again, at exit at the latest."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def step(self, step: int, *, loss: float, learning_rate: float, clock: Mapping[str, float]) -> None:
        """Show the end of a step: every step in the bar, every `log_every`-th as a line; `clock` is that of `Rates`."""
        if not self.enabled:
            return
        data_share = clock["data_s"] / max(clock["step_s"], 1e-9)
        figures = (
            f"loss {loss:.4f} | lr {learning_rate:.2e} | {clock['tokens_per_s']:,.0f} {self.unit}/s | "
            f"data {data_share:.0%} | {_size(clock['peak_memory_bytes'])}"
        )
        if "mfu" in clock:
            figures += f" | MFU {clock['mfu']:.0%}"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self.log_every == 0 or step == self.last_step:
            left = _duration(clock["left_s"])
            self.say(f"step {step}/{self.last_step} | {figures} | {clock['steps_per_s']:.2f} steps/s | {left} left")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
