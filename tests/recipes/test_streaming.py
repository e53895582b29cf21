"""Each recipe from shards: trains, goes on exactly where it was stopped, and refuses shards that have changed."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from mmattn.config import load_config, load_recipe
from mmattn.errors import ConfigError, RunError, UsageError
from mmattn.training import train
from mmattn.training.metrics import read_metrics
from tests.data.shards import pair_rows, png, write_jsonl, write_parquet, write_tar
from tests.inference.tiny_pipelines import stable_diffusion


def _steps(folder: Path, steps: int, *overrides: str) -> list[str]:
    values = ["training.eval_every=0", "training.save_every=2", "evaluation.splits=[]", "evaluation.best=null"]
    return [f"training.output_dir={folder}", f"training.max_steps={steps}", *values, *overrides]


def _stream(folder: Path, path: Path, window: int = 40) -> list[str]:
    values = ["data.kind=files", "data.streaming=true", f"data.path={path}", f"data.index_folder={folder / 'index'}"]
    return [*values, f"data.window={window}", "data.blocks_at_once=4"]


def _pairs(folder: Path, kind: str) -> Path:
    for number in range(5):
        write = write_parquet if kind == "parquet" else write_jsonl
        write(folder / f"{number}.{kind}", pair_rows(20 * number, 20))
    return folder / f"*.{kind}"


def _translate(folder: Path, out: str, kind: str, *overrides: str, steps: int = 7):
    recipe = load_recipe("translate")
    data = ["data.size=100000", "data.eval_size=1000", "model.tokenizer=bpe", "model.max_vocab_size=300"]
    values = [*_stream(folder, folder / f"*.{kind}"), *_steps(folder / out, steps), *data]
    values += ["training.batch_tokens=90", "examples.guided_alignment_weight=0", *overrides]
    return recipe, load_config(recipe.Config, "translate/debug", values)


def _lines(folder: Path) -> list[dict]:
    lines = read_metrics(folder / "metrics.jsonl", kind="train")
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.parametrize("by", ["training.batch_tokens=90", "training.batch_tokens=null"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_translator_goes_on_exactly_whatever_the_workers(tmp_path, kind, by):
    _pairs(tmp_path, kind)
    options = (by, "training.batch_size=6")
    recipe, whole = _translate(tmp_path, "whole", kind, *options, "training.num_workers=2")
    recipe.train(whole)
    recipe.train(_translate(tmp_path, "pieces", kind, *options, steps=3)[1])
    recipe.train(_translate(tmp_path, "pieces", kind, *options)[1], resume=True)
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "pieces")
    assert len(_lines(tmp_path / "whole")) == 7
    check = "\n".join(recipe.check(whole))
    assert "100 pairs" in check
    assert "line 1: 'the number 0 stands here'" in check or "row 1: 'the number 0 stands here'" in check


def test_changed_shards_are_refused_by_name_and_moved_ones_are_not(tmp_path):
    (tmp_path / "one").mkdir()
    _pairs(tmp_path / "one", "jsonl")
    recipe, config = _translate(tmp_path, "run", "jsonl", f"data.path={tmp_path}/one", steps=2)
    recipe.train(config)
    (tmp_path / "one").rename(tmp_path / "two")
    moved = _translate(tmp_path, "run", "jsonl", f"data.path={tmp_path}/two", steps=4)[1]
    recipe.train(moved, resume=True)
    write_jsonl(tmp_path / "two" / "3.jsonl", pair_rows(7, 20))
    with pytest.raises(UsageError, match=r"cannot resume .*shard 3\.jsonl has changed"):
        recipe.train(moved, resume=True)
    other = _translate(tmp_path, "run", "jsonl", f"data.path={tmp_path}/two", "data.window=50", steps=4)[1]
    with pytest.raises(UsageError, match=r"cannot resume .*data\.window: 40 -> 50"):
        recipe.train(other, resume=True)


def test_filters_and_long_pairs_of_a_streamed_translator(tmp_path):
    rows = pair_rows(0, 90)
    rows[4]["source"] = "many words " * 60
    write_jsonl(tmp_path / "a.jsonl", rows)
    recipe, config = _translate(tmp_path, "run", "jsonl", "data.min_words=3")
    assert "90 pairs (1 left out)" in recipe.check(config)[0]
    by_size = ("training.batch_tokens=null", "training.batch_size=30", "data.max_bad=1")
    with pytest.raises(ConfigError, match=r"data\.min_words with data\.streaming=true needs training\.batch_tokens"):
        recipe.train(_translate(tmp_path, "run", "jsonl", "data.min_words=3", *by_size)[1])
    assert recipe.train(_translate(tmp_path, "sizes", "jsonl", *by_size)[1]).step == 7
    with pytest.raises(UsageError, match=r"a\.jsonl line 5 is too long"):
        recipe.train(_translate(tmp_path, "long", "jsonl", *by_size, "examples.refuse_long=true")[1])


def test_guided_alignment_from_shards(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{**row, "links": "0-0 1-1 2-2"} for row in pair_rows(0, 60)])
    guided = ("examples.guided_alignment_weight=0.05", "data.columns.alignment=links", "model.tokenizer=word")
    recipe, config = _translate(tmp_path, "run", "parquet", *guided, steps=2)
    recipe.train(config)
    assert _lines(tmp_path / "run")[0]["alignment"] > 0


def _vlm(folder: Path, out: str, path: Path, *overrides: str, steps: int = 5):
    recipe = load_recipe("vlm")
    values = [*_stream(folder, path, 20), *_steps(folder / out, steps), "training.batch_size=6", *overrides]
    return recipe, load_config(recipe.Config, "vlm/debug", values)


def test_a_vision_language_model_learns_from_tars(tmp_path):
    for shard in range(3):
        examples = [
            (f"{number}", {"png": png(number, 33), "txt": f"picture {number % 5}".encode()})
            for number in range(11 * shard, 11 * shard + 11)
        ]
        write_tar(tmp_path / f"part-{shard:03}.tar", examples)
    path = tmp_path / "part-{000..002}.tar"
    recipe, whole = _vlm(tmp_path, "whole", path, "training.num_workers=2")
    recipe.train(whole)
    recipe.train(_vlm(tmp_path, "pieces", path, steps=2)[1])
    recipe.train(_vlm(tmp_path, "pieces", path)[1], resume=True)
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "pieces")
    assert "33 pictures" in recipe.check(whole)[0]


def test_a_shard_that_disappears_while_training_ends_the_run_with_its_name(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"image": png(n, 33), "text": f"n {n % 5}"} for n in range(60)])
    recipe, config = _vlm(tmp_path, "run", path, "training.num_workers=1", steps=400)
    task = recipe.VLMTask(config)
    path.unlink()
    with pytest.raises(RunError, match=r"shard .*a\.parquet cannot be read any more \(No such file") as held:
        train(task, config.training)
    assert held.value is not None
    assert not multiprocessing.active_children()  # even while the error is held


def _diffusion(folder: Path, out: str, path: Path, *overrides: str, steps: int = 4):
    recipe = load_recipe("diffusion")
    values = [*_stream(folder, path, 20), *_steps(folder / out, steps), "training.batch_size=6", *overrides]
    return recipe, load_config(recipe.Config, "diffusion/debug", values)


def test_a_diffusion_model_learns_from_parquet(tmp_path):
    rows = [{"image": {"bytes": png(n, 33), "path": None}, "text": f"picture {n % 5}"} for n in range(40)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    recipe, whole = _diffusion(tmp_path, "whole", path, "training.num_workers=2")
    recipe.train(whole)
    recipe.train(_diffusion(tmp_path, "pieces", path, steps=2)[1])
    recipe.train(_diffusion(tmp_path, "pieces", path)[1], resume=True)
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "pieces")
    with pytest.raises(ConfigError, match=r"pictures\.buckets=true needs the size of every picture beforehand"):
        recipe.train(_diffusion(tmp_path, "buckets", path, "pictures.buckets=true", "pictures.step=32")[1])


def test_stable_diffusion_encodes_streamed_captions_in_every_step(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "sd")
    path = write_parquet(tmp_path / "a.parquet", [{"image": png(n, 70), "text": f"a red {n % 5}"} for n in range(20)])
    recipe = load_recipe("diffusion")

    def config(*overrides: str):
        values = [*_stream(tmp_path, path), *_steps(tmp_path / "run", 2), f"model.from_pretrained={tmp_path / 'sd'}"]
        values += [
            "training.batch_size=2",
            "training.num_workers=0",
            "pictures.resolution=64",
            "data.eval_fraction=0.1",
            *overrides,
        ]
        return load_config(recipe.Config, "diffusion/finetune-sd-lora", values)

    with pytest.raises(ConfigError, match=r"cache\.texts=true keeps the text states of every caption"):
        recipe.train(config())
    texts = ("cache.texts=false", "pictures.buckets=false")
    with pytest.raises(ConfigError, match=r"cache\.latents=true keeps the latents of every picture"):
        recipe.train(config(*texts))
    assert recipe.train(config(*texts, "cache.latents=false")).step == 2
