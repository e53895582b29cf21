"""Runs compared in one picture, from their `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmattn._optional import require
from mmattn.errors import UsageError
from mmattn.training.metrics import METRICS_FILE, read_metrics

_PER_SECOND = "tokens_per_s"
DEFAULT_METRICS = ("loss", "learning_rate", _PER_SECOND)
MOST_EVALUATIONS = 6  # drawn without being asked for
_LABELS = {
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
    _PER_SECOND: "units per second",
    "data_share": "share of time waiting for data",
    "peak_memory_gib": "peak memory, GiB",
    "mfu": "MFU",
}
_EXACT = ("learning_rate", "peak_memory_gib")
_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass
class Series:
    """A metric of a run: `values` at `steps`, both [N]; `is_evaluation` where they are few and exact."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    is_evaluation: bool = False


@dataclass
class RunMetrics:
    """A run by the name that it is shown under, its metrics by name, and how many steps it skipped."""

    name: str
    series: dict[str, Series]
    skipped: int = 0


def load_runs(paths: Sequence[Path]) -> list[RunMetrics]:
    """The metrics of runs: output folders, or metrics files themselves.

    A metric of evaluations that is called like one of the steps (`loss`) is `eval/loss`.

    Raises:
        UsageError: no metrics there, or none yet.
    """
    files = [path / METRICS_FILE if path.is_dir() else path for path in paths]
    for path, file in zip(paths, files, strict=True):
        if not file.is_file():
            raise UsageError(f"{path}: no {METRICS_FILE} there; give the output_dir of a training run")
    return [_load_run(file, name) for file, name in zip(files, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parent.parts if path.name == METRICS_FILE else path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return ["/".join(part) for part in parts]


def _load_run(file: Path, name: str) -> RunMetrics:
    try:
        lines = read_metrics(file)
        run = RunMetrics(name, {}, sum(line["kind"] == "skipped" for line in lines))
        trained = [_trained(line) for line in lines if line["kind"] == "train"]
        scored = [(line["step"], line["metrics"]) for line in lines if line["kind"] in ("eval", "final")]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not a metrics file of mmattn ({type(error).__name__}: {error})") from error
    if not trained and not scored:
        raise UsageError(f"{file}: holds no steps yet")
    taken = {metric for _, values in trained for metric in values}
    renamed = [(step, {_scored_name(key, taken): value for key, value in values.items()}) for step, values in scored]
    for is_evaluation, group in ((False, trained), (True, renamed)):
        for step, values in group:
            for metric, value in values.items():
                series = run.series.setdefault(metric, Series(is_evaluation=is_evaluation))
                series.steps.append(step)
                series.values.append(float(value))
    return run


def _scored_name(metric: str, taken: set[str]) -> str:
    return f"eval/{metric}" if metric in taken else metric


def _trained(line: dict[str, Any]) -> tuple[int, dict[str, float]]:
    clock = line["time"]
    own = {key: value for key, value in line.items() if key not in ("kind", "step", "time", "examples", "tokens")}
    derived = {
        _PER_SECOND: clock[_PER_SECOND],
        "data_share": clock["data_s"] / max(clock["step_s"], 1e-9),
        **({"peak_memory_gib": clock["peak_memory_bytes"] / 2**30} if "peak_memory_bytes" in clock else {}),
        **({"mfu": clock["mfu"]} if "mfu" in clock else {}),
    }
    return line["step"], {**own, **derived}


def choose_metrics(runs: Sequence[RunMetrics], wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The metrics to draw, and those of evaluations that there was no room for.

    Args:
        runs: what there is.
        wanted: names; empty: loss, learning rate, speed and the first `MOST_EVALUATIONS` of the evaluations'.

    Raises:
        UsageError: none of the runs has a metric of that name; names those that are there.
    """
    known = list(dict.fromkeys(metric for run in runs for metric in run.series))
    for metric in wanted:
        if metric not in known:
            raise UsageError(f"no run has the metric {metric!r}: there are {', '.join(known)}")
    if wanted:
        return list(dict.fromkeys(wanted)), []
    scores = [metric for metric in known if any(r.series[metric].is_evaluation for r in runs if metric in r.series)]
    shown = [metric for metric in DEFAULT_METRICS if metric in known]
    return [*shown, *scores[:MOST_EVALUATIONS]], scores[MOST_EVALUATIONS:]


def draw_runs(runs: Sequence[RunMetrics], metrics: Sequence[str], path: Path) -> None:
    """Draw a panel for each metric, with a line for each run, into a PNG.

    Raises:
        OptionalPackageError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require("matplotlib", "mmattn plot")
    from matplotlib.figure import Figure

    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    legend_rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows + 0.4 + 0.22 * legend_rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for panel, metric in zip(panels, metrics, strict=False):
        for place, run in enumerate(runs):
            if metric in run.series:
                style = {"color": f"C{place % 10}", "linestyle": _LINE_STYLES[place // 10 % len(_LINE_STYLES)]}
                line = _draw_series(panel, run.series[metric], style, is_noisy=metric not in _EXACT)
                handles.setdefault(_legend_name(run), line)
        _label(panel, metric, [run.series[metric] for run in runs if metric in run.series])
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=110)


def _legend_name(run: RunMetrics) -> str:
    return f"{run.name} ({run.skipped} steps skipped)" if run.skipped else run.name


def _draw_series(panel: Any, series: Series, style: dict[str, Any], *, is_noisy: bool) -> Any:
    values = np.array(series.values)
    if series.is_evaluation:
        return panel.plot(series.steps, values, marker="o", markersize=3.5, linewidth=1.4, **style)[0]
    if is_noisy and len(values) >= 20:
        panel.plot(series.steps, values, linewidth=0.6, alpha=0.25, color=style["color"])
        values = smoothed(values, len(values) // 30)
    return panel.plot(series.steps, values, linewidth=1.6, **style)[0]


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """The mean of the finite ones of about `span` values around each, [N] to [N]; fewer, evenly, near both ends."""
    is_finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    numbers = np.concatenate([[0], np.cumsum(is_finite)])
    places = np.arange(len(values))
    half = np.minimum(span // 2, np.minimum(places, len(values) - 1 - places))
    first, end = places - half, places + half + 1
    number = numbers[end] - numbers[first]
    return np.where(number > 0, (sums[end] - sums[first]) / np.maximum(number, 1), np.nan)


def _label(panel: Any, metric: str, shown: Sequence[Series]) -> None:
    panel.set_title(_LABELS.get(metric, metric), fontsize=11)
    panel.set_xlabel("step", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    values = [value for series in shown for value in series.values if math.isfinite(value)]
    if metric == "learning_rate":
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    elif values and min(values) > 0 and max(values) > 30 * min(values):
        panel.set_yscale("log")
