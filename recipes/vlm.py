"""Vision-language model: captions and answers from pictures, from scratch or from a BLIP checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mmattn.config import load_config
from mmattn.data.counted import counted
from mmattn.data.readers import open_image_text
from mmattn.data.scenes import SceneDataset
from mmattn.data.skipping import preview
from mmattn.data.spec import DataConfig
from mmattn.data.stream_rows import stream_layout
from mmattn.data.text_kinds import require_drawn_kinds
from mmattn.data.tokenizer import item_texts
from mmattn.errors import ConfigError
from mmattn.inference import showcase
from mmattn.inference.trained import TrainChoice, trained_model
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.inference.vlm_features import FeatureCacheConfig, open_features
from mmattn.inference.vlm_score_checks import require_scorable
from mmattn.inference.vlm_scores import EvalConfig, PictureBlindBaseline, can_answer, sample_items, score_splits
from mmattn.inference.vlm_setup import (
    ExampleConfig,
    ModelConfig,
    choose_trained,
    make_collator,
    make_vlm,
    require_positions,
    save_trained,
)
from mmattn.nn import GatedCrossAttention, TransformerLayer
from mmattn.training import Batch, Draw, Loss, Task, TrainingConfig, TrainingResult
from mmattn.training import train as run_loop
from mmattn.training.memory import estimate_run
from mmattn.training.recipe_settings import SCORES_AND_PATHS
from mmattn.training.selection import LoRAConfig, selection

_TARGETS = [r"decoder\..*(q_proj|k_proj|v_proj|out_proj)"]  # what every checkpoint format can name


@dataclass
class Config(TrainChoice):
    """The whole configuration of the recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(targets=list(_TARGETS)))
    examples: ExampleConfig = field(default_factory=ExampleConfig)
    cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output_dir="runs/vlm"))


class VLMTask(Task):
    """Captions and answers as next-token prediction; texts share a picture's keys and values. A preview caches none."""

    free_settings = (*SCORES_AND_PATHS, "cache.*", "examples.packing")
    repeated_layers = (TransformerLayer, GatedCrossAttention)
    not_for_workers = ("model", "vlm")

    def __init__(self, config: Config, *, is_preview: bool = False) -> None:
        self.config = config
        self.source = open_image_text(config.data, "train")
        require_drawn_kinds(self.source, config.examples.kind_weights)
        self.stream = stream_layout(self.source)
        items = sample_items(self.source)
        with torch.random.fork_rng(devices=[]):  # new weights and adapters are a function of the seed
            torch.manual_seed(config.training.seed)
            self.vlm = make_vlm(config.model, item_texts(items))
            _require_askable(self.vlm, config.data)
            require_positions(self.vlm, config.examples)
            choose_trained(self.vlm.network, config.train_what, config.lora)
        if not is_preview:  # before anything is encoded, which may take long
            self.require_scorable()
        self.model = self.vlm.network
        self.baseline = PictureBlindBaseline(items)
        self.best = config.evaluation.best
        self.features = open_features(
            self.vlm, self.source, config.cache, config.training, config.examples, is_preview=is_preview
        )
        self._collate = make_collator(self.vlm, config.examples, config.training.seed, self.features.cache)

    def require_scorable(self) -> None:
        """Raise where an evaluation would end the training."""
        config = self.config
        if config.training.eval_every:
            require_scorable(self.vlm, config.data, config.evaluation, config.examples.prompt)

    def __len__(self) -> int:
        return len(self.source)

    def collate(self, draws: Sequence[Draw]) -> Batch:
        batch = self._collate(self.source, draws)
        batch.pop("attention_mask", None)  # padding stands on the right, and the decoder is causal
        return batch

    def count(self, batch: Batch) -> int:
        labels = batch["labels"] if "segments" in batch else batch["labels"][:, 1:]
        return int((labels >= 0).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        output = model(**batch)
        return Loss(output.loss_sum, len(output.targets))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        config = self.config
        scores = score_splits(self.vlm, config.data, config.evaluation, self.baseline, config.examples.prompt)
        return {name: value for name, value in scores.items() if not name.endswith("/blind")}

    def save(self, model: nn.Module, folder: Path) -> None:
        save_trained(self.vlm, folder)

    def describe(self) -> str:
        what = f"training {self.config.train_what}: {selection(self.model)}"
        size = f"{self.source.name}: {counted(len(self), 'picture')}"
        return "; ".join(filter(None, (size, what, self.features.remark)))


def _require_askable(vlm: VisionLanguageModel, data: DataConfig) -> None:
    if data.columns.question is not None and not can_answer(vlm):
        raise ConfigError(
            "data.columns.question: a BLIP captioning checkpoint is never asked: leave the column out, and rows whose "
            "texts are answers, or train a model of our own (model.from_pretrained=null)"
        )


open_task = functools.partial(VLMTask, is_preview=True)  # for `mmattn export`


def train(config: Config, *, resume: bool | str = False) -> TrainingResult:
    """Train as the config says; the result opens with `VisionLanguageModel.from_pretrained(output_dir / "final")`."""
    values = {"recipe": "vlm", **dataclasses.asdict(config)}
    return run_loop(VLMTask(config), config.training, resume=resume, command=" ".join(sys.argv), resolved_config=values)


def check(config: Config) -> list[str]:
    """What training with this config would do: data, parameters, memory. Reads data, trains nothing."""
    config.training.validate()
    task = VLMTask(config, is_preview=True)
    lines = [task.describe()]
    task.require_scorable()
    for split in config.evaluation.splits:
        source = open_image_text(config.data, split)
        lines.append(f"{source.name}: {counted(len(source), 'picture')} for scores")
    memory = estimate_run(task, config.training)
    return [*lines, *preview(task.source), f"memory of training, float32, one process: {memory}"]


def evaluate(folder: str | Path, config: Config) -> dict[str, float]:
    """Scores of a trained folder (its `best/` or else `final/`, or a model folder itself) on the config's data."""
    vlm = VisionLanguageModel.from_pretrained(trained_model(Path(folder)))
    baseline = PictureBlindBaseline(sample_items(open_image_text(config.data, "train")))
    return score_splits(vlm, config.data, config.evaluation, baseline, config.examples.prompt)


def demo(output_dir: Path) -> None:
    """Train on scenes for some minutes, then print scores, captions and answers, and draw where the model looked."""
    config = load_config(Config, "vlm/demo", [f"training.output_dir={output_dir}"])
    train(config)
    print("\nScores on pictures that it never saw")
    showcase.print_scores(evaluate(output_dir, config))
    vlm = VisionLanguageModel.from_pretrained(trained_model(output_dir))
    scenes = SceneDataset("test", config.data.eval_size, config.data.seed, config.data.image_size)
    showcase.show(vlm, scenes, output_dir / "show")


if __name__ == "__main__":
    from mmattn.cli.recipe_main import run_recipe

    sys.exit(run_recipe(sys.modules[__name__]))
