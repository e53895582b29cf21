"""A recipe's own settings on a resume: what may change, what is said, and what is refused by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
import yaml

from mmattn.errors import UsageError
from mmattn.training import train
from mmattn.training.recipe_settings import SCORES_AND_PATHS, recipe_changes
from tests.training.toy import ToyTask, toy_config


@dataclass
class Part:
    path: str = "a.jsonl"
    size: int = 23


@dataclass
class Data:
    parts: list[Part] = field(default_factory=lambda: [Part(), Part()])
    path: str | None = None
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass
class Recipe:
    data: Data = field(default_factory=Data)
    evaluation: dict = field(default_factory=lambda: {"limit": 5, "best": "loss"})
    noise: dict = field(default_factory=lambda: {"offset_noise": 0.0})
    lora: dict | None = None


class FreeTask(ToyTask):
    free_settings = SCORES_AND_PATHS


def resolved(**changes):
    values = {"recipe": "toy", **dataclasses.asdict(Recipe()), "training": {"max_steps": 3}}
    for key, value in changes.items():
        target, *rest = key.split("__")
        inner = values
        for name in (target, *rest)[:-1]:
            inner = inner[int(name) if name.isdigit() else name]
        inner[(target, *rest)[-1]] = value
    return values


@pytest.fixture
def run(tmp_path):
    train(FreeTask(), toy_config(tmp_path, max_steps=2, eval_every=2), resolved_config=resolved())
    return tmp_path


def go_on(folder, config):
    return train(FreeTask(), toy_config(folder, max_steps=3), resume=True, resolved_config=config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"noise__offset_noise": 0.1}, "noise.offset_noise: 0.0 -> 0.1"),
        ({"data__parts__1__size": 29}, "data.parts.1.size: 23 -> 29"),
        ({"data__parts": []}, "data.parts: "),
        ({"lora": {"rank": 3}}, "lora: None -> {'rank': 3}"),
        ({"recipe": "other"}, "recipe: toy -> other"),
        ({"evaluation__best": "chrf"}, "evaluation.best: loss -> chrf"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(run, changes, named):
    with pytest.raises(UsageError) as caught:
        go_on(run, resolved(**changes))
    assert f"with other settings ({named}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_chooses_the_best_may_change_until_something_is_chosen(tmp_path, capsys):
    train(FreeTask(), toy_config(tmp_path, max_steps=2), resolved_config=resolved(evaluation__best="lsso"))
    go_on(tmp_path, resolved())
    assert "changed, as this recipe allows: evaluation.best: lsso -> loss\n" in capsys.readouterr().err


def test_what_a_recipe_frees_is_said(run, capsys):
    go_on(run, resolved(evaluation__limit=7, data__path="moved", data__parts__0__path="b", training={"x": 1}))
    said = capsys.readouterr().err
    for text in ("evaluation.limit: 5 -> 7", "data.path: None -> moved", "data.parts.0.path: a.jsonl -> b"):
        assert f"changed, as this recipe allows: {text}\n" in said


def test_by_default_every_setting_matters(tmp_path):
    train(ToyTask(), toy_config(tmp_path, max_steps=2), resolved_config=resolved())
    with pytest.raises(UsageError, match=r"evaluation.limit: 5 -> 7"):
        train(ToyTask(), toy_config(tmp_path, max_steps=3), resume=True, resolved_config=resolved(evaluation__limit=7))


def test_unchanged_settings_are_not_mentioned(run, capsys):
    capsys.readouterr()
    go_on(run, resolved())
    assert "config" not in capsys.readouterr().err.replace("resumed from", "")


def test_a_new_run_from_elsewhere_may_differ(run, tmp_path_factory, capsys):
    config = toy_config(tmp_path_factory.mktemp("other"), max_steps=3)
    train(FreeTask(), config, resume=run, resolved_config=resolved(noise__offset_noise=0.1))
    assert "differs from the checkpoint: noise.offset_noise: 0.0 -> 0.1" in capsys.readouterr().err


def test_checkpoints_of_older_versions(tmp_path):
    assert recipe_changes(tmp_path, None, ()).remarks == []
    (remark,) = recipe_changes(tmp_path, resolved(), ()).remarks
    assert "has no config.yaml: only its training settings were compared" in remark
    old = resolved(noise={"gone": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    changes = recipe_changes(tmp_path, resolved(), ())
    assert changes.changed == []
    assert any("a setting that there no longer is: noise.gone, 1" in remark for remark in changes.remarks)
    assert any("before there was noise.offset_noise, which is 0.0 now" in remark for remark in changes.remarks)
