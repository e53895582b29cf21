"""Translation: Marian-shaped models from scratch, or fine-tuned OPUS-MT, M2M100 and NLLB checkpoints."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmattn.data.counted import counted
from mmattn.data.parallel import open_parallel
from mmattn.data.parallel_spec import ParallelConfig
from mmattn.data.stream_rows import stream_layout
from mmattn.errors import ConfigError
from mmattn.inference.alignment_choice import choose_alignment_heads
from mmattn.inference.trained import TrainChoice, trained_model
from mmattn.inference.translator import Translator
from mmattn.inference.translator_scores import EvalConfig, full_report, require_scorable, sample_pairs, score_splits
from mmattn.inference.translator_setup import (
    ExampleConfig,
    ModelConfig,
    choose_trained,
    make_translator,
    preview_pairs,
    save_trained,
    training_pairs,
)
from mmattn.nn import TransformerLayer
from mmattn.training import Batch, Draw, Loss, Task, TrainingConfig, TrainingResult
from mmattn.training import train as run_loop
from mmattn.training.memory import estimate_run
from mmattn.training.recipe_settings import SCORES_AND_PATHS
from mmattn.training.selection import LoRAConfig, selection


@dataclass
class Config(TrainChoice):
    """The whole configuration of the recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    examples: ExampleConfig = field(default_factory=ExampleConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output_dir="runs/translate"))


class TranslateTask(Task):
    """Translations as next-token prediction, and where gold alignments are to be learned, where to look for them."""

    free_settings = SCORES_AND_PATHS
    repeated_layers = (TransformerLayer,)
    not_for_workers = ("model", "translator")

    def __init__(self, config: Config) -> None:
        if config.evaluation.quantize is not None:
            raise ConfigError("evaluation.quantize is for `mmattn eval`: leave it out of training")
        self.config = config
        source = open_parallel(config.data, "train")
        codes = config.data.language_codes
        with torch.random.fork_rng(devices=[]):  # new weights and adapters are a function of the seed
            torch.manual_seed(config.training.seed)
            self.translator = make_translator(config.model, config.examples, sample_pairs(source), codes)
            choose_trained(self.translator.network, config.train_what, config.lora)
        self.model = self.translator.network
        self.best = config.evaluation.best
        by_tokens = config.training.batch_tokens is not None
        self.pairs = training_pairs(self.translator, source, config.examples, codes, by_tokens=by_tokens)
        self.lengths, self.stream = self.pairs.lengths, stream_layout(source)
        self.chooses_heads = self.pairs.num_aligned > 0 and self.model.config.alignment_layer is None

    def __len__(self) -> int:
        return len(self.pairs.source)

    def collate(self, draws: Sequence[Draw]) -> Batch:
        batch: Batch = dict(self.pairs.collate(self.pairs.source, draws))
        if "source_mask" in batch and batch["source_mask"].all():  # attention is faster without a mask
            del batch["source_mask"]
        return batch

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] >= 0).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        output = model(**batch)
        if output.alignment_sum is None:
            return Loss(output.loss_sum, len(output.targets))
        total = output.loss_sum + self.config.examples.guided_alignment_weight * output.alignment_sum
        return Loss(total, len(output.targets), {"alignment": (output.alignment_sum, int(output.num_aligned))})

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.chooses_heads:
            choose_alignment_heads(self.translator, self.pairs.source, self.config.data.language_codes)
        return score_splits(self.translator, self.config.data, self.config.evaluation)[0]

    def save(self, model: nn.Module, folder: Path) -> None:
        if self.chooses_heads:
            choose_alignment_heads(self.translator, self.pairs.source, self.config.data.language_codes)
        save_trained(self.translator, folder)

    def describe(self) -> str:
        pairs, config = self.pairs, self.translator.network.config
        reason = "too long, left out" if self.stream is None else "left out"
        left_out = f" ({pairs.num_left_out:,} {reason})" if pairs.num_left_out else ""
        return (
            f"{pairs.source.name}: {counted(len(self), 'pair')}{left_out}; vocabulary of {config.vocab_size:,}; "
            f"training {self.config.train_what}: {selection(self.model)}"
        )


open_task = TranslateTask  # for `mmattn export`


def train(config: Config, *, resume: bool | str = False) -> TrainingResult:
    """Train as the config says; the result opens with `Translator.from_pretrained(output_dir / "final")`."""
    task, values = TranslateTask(config), {"recipe": "translate", **dataclasses.asdict(config)}
    if config.training.eval_every:
        require_scorable(task.translator, config.data, config.evaluation)
    return run_loop(task, config.training, resume=resume, command=" ".join(sys.argv), resolved_config=values)


def check(config: Config) -> list[str]:
    """What training with this config would do: data, parameters, memory. Reads data, trains nothing."""
    config.training.validate()
    task = TranslateTask(config)
    lines = [task.describe()]
    if config.training.eval_every:
        require_scorable(task.translator, config.data, config.evaluation)
    for split in config.evaluation.splits:
        source = open_parallel(config.data, split)
        lines.append(f"{source.name}: {counted(len(source), 'pair')} for scores ({split})")
    memory = estimate_run(task, config.training)
    return [*lines, *preview_pairs(task.pairs), f"memory of training, float32, one process: {memory}"]


def evaluate(folder: str | Path, config: Config, *, hypotheses: Path | None = None) -> dict[str, Any]:
    """Scores of a trained folder (its `best/` or else `final/`, or a model folder itself) on the config's data."""
    translator = Translator.from_pretrained(trained_model(Path(folder)), quantize=config.evaluation.quantize)
    return full_report(translator, config.data, config.evaluation, hypotheses=hypotheses)


if __name__ == "__main__":
    from mmattn.cli.recipe_main import run_recipe

    sys.exit(run_recipe(sys.modules[__name__]))
