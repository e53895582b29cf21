"""`mmattn plot`: one picture of several runs, and what is said when it cannot be drawn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from mmattn.cli.main import main
from mmattn.training.plot import MOST_EVALUATIONS, choose_metrics, load_runs, smoothed

pytest.importorskip("matplotlib")


def write_run(folder, steps=53, *, scale=1.0, scores=2, skipped=()):
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            clock = {"step_s": 0.5, "data_s": 0.1, "tokens_per_s": 100.0 + step, "peak_memory_bytes": 2**30}
            loss = "nan" if step == 7 else scale * (1 + 1 / step)
            line = {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3 / step, "grad_norm": 1.0}
            line |= {"count": 11, "examples": 3 * step, "tokens": 11 * step, "time": clock}
            if step in skipped:
                line = {"kind": "skipped", "step": step, "reason": "x", "draws": [], "time": clock}
            file.write(json.dumps(line) + "\n")
            if step % 13 == 0:
                metrics = {"loss": 2.0 * scale, **{f"test/score_{n}": step / 100 for n in range(scores)}}
                file.write(json.dumps({"kind": "eval", "step": step, "metrics": metrics, "time": {}}) + "\n")
    return folder


def test_runs_are_drawn_and_compared(tmp_path, capsys):
    one, two = write_run(tmp_path / "a/one"), write_run(tmp_path / "b/one", 101, scale=0.7, skipped=[3, 5])
    picture = tmp_path / "out.png"
    assert main(["plot", str(one), str(two / "metrics.jsonl"), "-o", str(picture)]) == 0
    assert capsys.readouterr().out == (
        f"{picture}: loss, learning_rate, tokens_per_s, eval/loss, test/score_0, test/score_1\n"
    )
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1500
    for color in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two
        assert (abs(pixels - color).sum(-1) < 12).sum() > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out.png"]
    names = [run.name for run in load_runs([one, two])]
    assert names == ["a/one", "b/one"]
    assert [run.skipped for run in load_runs([one, two])] == [0, 2]


def test_one_metric_can_be_chosen(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    arguments = ["plot", str(run), "-o", str(tmp_path / "x.png"), "--metric", "grad_norm", "--metric", "data_share"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path}/x.png: grad_norm, data_share\n"
    assert main(arguments) == 2
    expected = "x.png: exists already; nothing was written. Choose another name, or overwrite with --force"
    assert expected in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_many_scores_are_left_out_and_named(tmp_path):
    runs = load_runs([write_run(tmp_path / "run", scores=9)])
    chosen, left_out = choose_metrics(runs, ())
    assert chosen == ["loss", "learning_rate", "tokens_per_s", "eval/loss", *(f"test/score_{n}" for n in range(5))]
    assert len(chosen) == 3 + MOST_EVALUATIONS
    assert left_out == [f"test/score_{n}" for n in range(5, 9)]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "run: no metrics.jsonl there; give the output_dir of a training run"),
        ("", [], "metrics.jsonl: holds no steps yet"),
        ("[1, 2]\n", [], "metrics.jsonl: not a metrics file of mmattn"),
        ("{]\n", [], "metrics.jsonl: not a metrics file of mmattn"),
        ("fine", ["--metric", "los"], "no run has the metric 'los': there are loss, learning_rate, grad_norm, count,"),
        ("fine", ["-o", "x.pdf"], "--output x.pdf: a PNG is drawn, so give a name that ends in .png"),
        ("fine", ["-o", "absent/x.png"], "absent/x.png: the folder absent does not exist; make it first"),
    ],
)
def test_what_cannot_be_drawn_is_said(content, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content == "fine":
        write_run(tmp_path / "run", 3)
    elif content is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text(content)
    assert main(["plot", "run", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["plot", str(write_run(tmp_path / "run")), "-o", str(tmp_path / "x.png")]) == 2
    assert "pip install 'mmattn[plot]'" in capsys.readouterr().err


def test_smoothing_is_a_centred_mean_that_passes_over_what_is_not_finite():
    values = np.array([3.0, math.nan, 5.0, 7.0, 11.0, 13.0])
    np.testing.assert_allclose(smoothed(values, 1), values)
    np.testing.assert_allclose(smoothed(values, 5), [3, 4, 26 / 4, 36 / 4, 31 / 3, 13])
