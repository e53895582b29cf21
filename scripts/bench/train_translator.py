"""The translator's rows: stock's trainer and our step on the same sentences, held-out loss, and the loss's memory."""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from opus_mt import EOS, PAD, VOCAB, random_opus_mt
from safetensors.torch import save_model
from torch import Tensor, nn
from train_rows import Row
from transformers import MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from mmattn.models.linear_cross_entropy import linear_cross_entropy
from mmattn.models.translator import TranslatorNetwork, open_network
from mmattn.ops.segments import Segments
from mmattn.training import Batch, Draw, Loss, Task, TrainingConfig
from mmattn.training.batches import step_batches
from mmattn.training.kept_memory import kept_memory
from mmattn.training.optim import make_optimizer
from mmattn.training.sampler import ExampleSampler
from mmattn.training.step import run_step, seed_draws

BATCH = 32
LEARNING_RATE = 1e-3
SPREAD, CORRELATION = 0.6, 0.9  # of the lengths' logarithms, and between source and target
SMALL_VOCAB, CLASSES = 67, 4
SMALL = {
    "d_model": 64,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 256,
}
SPECIAL = {
    "vocab_size": SMALL_VOCAB,
    "pad_token_id": SMALL_VOCAB - 1,
    "decoder_start_token_id": SMALL_VOCAB - 1,
}
Pairs = list[tuple[list[int], list[int]]]


def lengths(count: int, seed: int = 0) -> np.ndarray:
    """Source and target lengths `[count, 2]`, lognormal with mean 25, end token included."""
    generator = np.random.default_rng(seed)
    normal = generator.normal(size=(count, 2))
    normal[:, 1] = CORRELATION * normal[:, 0] + math.sqrt(1 - CORRELATION**2) * normal[:, 1]
    return np.clip(np.exp(math.log(25) - SPREAD**2 / 2 + SPREAD * normal).round(), 3, 200).astype(int)


def random_pairs(count: int, highest: int) -> Pairs:
    """Pairs of random tokens below `highest`."""
    generator = np.random.default_rng(1)
    return [
        (
            [*generator.integers(1, highest, source - 1).tolist(), EOS],
            [*generator.integers(1, highest, target - 1).tolist(), EOS],
        )
        for source, target in lengths(count)
    ]


def learnable_pairs(count: int, seed: int) -> Pairs:
    """Targets are Markov chains, one of a few kinds; which one, the source's tokens say. Some entropy remains."""
    tables = np.random.default_rng(2).permuted(
        np.tile(np.arange(1, SMALL_VOCAB - 1), (CLASSES, SMALL_VOCAB, 1)), axis=2
    )
    generator, pairs = np.random.default_rng(seed), []
    for source, target in lengths(count, seed):
        kind, chain = int(generator.integers(CLASSES)), [int(generator.integers(1, SMALL_VOCAB - 1))]
        for choice in generator.choice(4, size=target - 2, p=[0.6, 0.2, 0.1, 0.1]).tolist():
            chain.append(int(tables[kind, chain[-1], choice]))
        words = generator.integers(0, (SMALL_VOCAB - 2) // CLASSES, source - 1) * CLASSES + kind + 1
        pairs.append(([*np.minimum(words, SMALL_VOCAB - 2).tolist(), EOS], [*chain, EOS]))
    return pairs


class OurTask(Task):
    """Packed batches of pairs, as the translation recipe makes them."""

    def __init__(self, network: TranslatorNetwork, pairs: Pairs) -> None:
        self.model, self.pairs = network, pairs
        self.start = network.config.decoder_start_token_id

    def __len__(self) -> int:
        return len(self.pairs)

    def collate(self, draws: Sequence[Draw]) -> Batch:
        rows = sorted((self.pairs[example] for _, example in draws), key=lambda row: (len(row[1]), len(row[0])))
        sources, targets = zip(*rows, strict=True)
        read = [[self.start, *target[:-1]] for target in targets]
        return {
            **{
                name: torch.tensor(list(itertools.chain.from_iterable(texts)))
                for name, texts in (("source_ids", sources), ("target_ids", read), ("labels", targets))
            },
            "source_segments": Segments.of(map(len, sources)),
            "target_segments": Segments.of(map(len, targets)),
        }

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        output = model(**batch)
        return Loss(output.loss_sum, len(output.targets))

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, str(folder / "model.safetensors"))


class Ours:
    """Our network with its optimiser: the loop's steps, without what it writes."""

    def __init__(self, network: TranslatorNetwork, pairs: Pairs) -> None:
        self.task, self.accelerator, self.step = OurTask(network.train(), pairs), Accelerator(cpu=True), 0
        config = TrainingConfig(
            "unused", learning_rate=LEARNING_RATE, weight_decay=0.0, schedule="constant", device="cpu"
        )
        optimizer = make_optimizer(network, config, torch.device("cpu"))
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.sampler = ExampleSampler(len(pairs), BATCH, seed=0)

    def run(self, steps: int, uncounted: int = 0) -> tuple[float, int]:
        """Seconds and target tokens of so many steps, after some that are not counted."""
        tokens, start, counted = 0, time.perf_counter(), self.step + uncounted
        batches = step_batches(self.task, self.sampler, rank=0, first_step=self.step, last_step=counted + steps)
        for micro_batches in batches:
            seed_draws(0, self.step, 0, torch.device("cpu"))
            result = run_step(self.task, self.model, self.optimizer, self.accelerator, micro_batches, max_grad_norm=1.0)
            self.step += 1
            if self.step == counted:
                start = time.perf_counter()
            elif self.step > counted:
                tokens += result.count
        return time.perf_counter() - start, tokens


class _TimedTrainer(Seq2SeqTrainer):
    """Counts target tokens, and notes when each step ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        # A step ends where the next begins: the optimiser runs after this method.
        self.ends.append(time.perf_counter())
        self.tokens.append(int((inputs["labels"] != -100).sum()))
        return super().training_step(model, inputs, *args, **kwargs)


class Stock:
    """transformers' model and trainer; `key` says which length sorts: "longer" side or "source", or none: "random"."""

    def __init__(self, model: MarianMTModel, pairs: Pairs, key: str) -> None:
        self.model, self.folder, self.turn = model, tempfile.mkdtemp(), 0
        self.order = "random" if key == "random" else "group_by_length"
        columns: dict[str, Any] = {
            "input_ids": [source for source, _ in pairs],
            "labels": [target for _, target in pairs],
        }
        if key == "longer":
            columns["length"] = [max(map(len, pair)) for pair in pairs]
        self.data = datasets.Dataset.from_dict(columns)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """What `DataCollatorForSeq2Seq` makes: padded to the longest, labels with -100."""

        def padded(name: str, value: int) -> Tensor:
            rows = [torch.tensor(feature[name]) for feature in features]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = padded("input_ids", cast(int, self.model.config.pad_token_id))
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(feature["input_ids"]), dtype=torch.int64) for feature in features], batch_first=True
        )
        return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}

    def run(self, steps: int, uncounted: int = 1) -> tuple[float, int]:
        """Seconds and target tokens of so many steps; those before them and one after are not counted."""
        self.turn += 1
        trainer = self._trainer(max_steps=steps + uncounted + 1, seed=self.turn)
        trainer.train()
        last = steps + uncounted
        return trainer.ends[last] - trainer.ends[uncounted], sum(trainer.tokens[uncounted:last])

    def train(self, epochs: int) -> int:
        """Train for whole epochs; the target tokens seen."""
        trainer = self._trainer(num_train_epochs=epochs, seed=0)
        trainer.train()
        return sum(trainer.tokens)

    def _trainer(self, **settings: Any) -> _TimedTrainer:
        arguments = Seq2SeqTrainingArguments(
            output_dir=self.folder,
            use_cpu=True,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy=self.order,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        return _TimedTrainer(self.model, arguments, train_dataset=self.data, data_collator=self.collate)


def stock_model(**sizes: Any) -> MarianMTModel:
    """Marian in training mode, with the dropout that both use."""
    return random_opus_mt(**{"dropout": 0.1, "init_std": 0.02} | sizes).train()


def same_network(model: MarianMTModel) -> TranslatorNetwork:
    """Our network with a stock model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return open_network(folder)


def speed_rows(arguments: argparse.Namespace) -> list[Row]:
    """Target tokens a second of whole steps."""
    sizes = SMALL | SPECIAL if arguments.quick else {}
    pairs = random_pairs(50 * BATCH, SMALL_VOCAB - 1 if arguments.quick else PAD)
    models = [stock_model(**sizes) for _ in range(2)]
    runs: dict[str, Any] = {
        "longer side": Stock(models[0], pairs, "longer"),
        "source": Stock(models[1], pairs, "source"),
        "ours": Ours(same_network(models[0]), pairs),
    }
    turns = {name: (run, name == "ours") for name, run in runs.items()}
    turns["longer side, memory kept"] = (runs["longer side"], True)
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(arguments.repeats):
        for name, (run, is_kept) in turns.items():
            with kept_memory(torch.device("cpu")) if is_kept else nullcontext():
                seconds, tokens = run.run(arguments.steps, uncounted=1)
            rates[name].append(tokens / seconds)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    spread = max((max(found) - min(found)) / 2 / medians[name] for name, found in rates.items())
    notes = {
        "longer side": "packed, float32, freed memory kept as the loop does",
        "source": "stock's default length",
        "longer side, memory kept": "stock's memory kept too",
    }
    return [
        Row(
            f"translator step, target tokens/s (grouped by {key})",
            medians["ours"] / medians[key],
            1.4 if key == "longer side" and not arguments.quick else None,
            medians[key],
            medians["ours"],
            "tokens/s",
            spread,
            note=note,
        )
        for key, note in notes.items()
    ]


@torch.no_grad()
def held_out_loss(model: nn.Module, task: OurTask, is_stock: bool) -> float:
    """Mean loss of a target token."""
    model.eval()
    if not is_stock:
        output = model(**task.collate([(0, example) for example in range(len(task))]))
        return float(output.loss_sum / output.num_tokens)
    total, count = 0.0, 0
    for source, target in task.pairs:
        labels = torch.tensor([target])
        logits = model(input_ids=torch.tensor([source]), labels=labels).logits
        total += float(F.cross_entropy(logits[0], labels[0], reduction="sum"))
        count += len(target)
    return total / count


def held_out_rows(arguments: argparse.Namespace) -> list[Row]:
    """A small model from the same weights on the same sentences, as often each: the losses on others.

    Batches of like length have fewer tokens or more, and learn worse here; ours are random, and packed.
    """
    sizes = SMALL | SPECIAL
    models = {"random": stock_model(**sizes), "longer": stock_model(**sizes)}
    models["longer"].load_state_dict(models["random"].state_dict())
    pairs = learnable_pairs((10 if arguments.quick else 150) * BATCH, seed=3)
    ours = Ours(same_network(models["random"]), pairs)
    epochs = 1 if arguments.quick else 3
    _, tokens = ours.run(epochs * len(pairs) // BATCH)
    network = cast(TranslatorNetwork, ours.task.model)
    held_out = OurTask(network, learnable_pairs(200, seed=4))
    own, rows = held_out_loss(network, held_out, False), []
    for key, model in models.items():
        assert Stock(model, pairs, key).train(epochs) == tokens
        stock = held_out_loss(model, held_out, True)
        order = "random order" if key == "random" else "grouped by longer side"
        what = f"held-out loss after {tokens:,} target tokens ({order})"
        goal = None if arguments.quick else 1.01
        rows.append(Row(what, own / stock, goal, stock, own, "nats", is_bound=True))
    return rows


def _loss_memory(is_stock: bool, tokens: int, vocabulary: int, queue: Any) -> None:
    """Peak bytes of a loss and its gradients, beside hidden states and weight."""
    hidden = torch.randn(tokens, 512, requires_grad=True)
    weight = torch.randn(vocabulary, 512).mul_(0.05).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    before = psutil.Process().memory_info().rss
    if is_stock:
        loss = F.cross_entropy(F.linear(hidden, weight), targets)
    else:
        loss = linear_cross_entropy(hidden, weight, None, targets) / tokens
    loss.backward()
    queue.put(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def memory_row(arguments: argparse.Namespace) -> Row:
    """Memory of the loss at Marian's vocabulary, for as many tokens as a batch holds."""
    context, tokens = multiprocessing.get_context("spawn"), BATCH * 25
    peaks = []
    for is_stock in (True, False):
        queue = context.Queue()
        process = context.Process(target=_loss_memory, args=(is_stock, tokens, VOCAB, queue))
        process.start()
        peaks.append(queue.get(timeout=300) / 2**20)
        process.join()
    return Row(
        f"loss's extra memory, {tokens} tokens, {VOCAB:,} words",
        peaks[1] / peaks[0],
        1 / 3,
        peaks[0],
        peaks[1],
        "MiB",
        is_bound=True,
        note="gradients of states and weight included",
    )


def translator_rows(arguments: argparse.Namespace) -> list[Row]:
    """All rows, printed as they come."""
    rows = []
    for part in (lambda: [memory_row(arguments)], lambda: speed_rows(arguments), lambda: held_out_rows(arguments)):
        for row in part():
            row.show()
            rows.append(row)
    return rows
