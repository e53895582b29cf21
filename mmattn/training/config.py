"""The settings of one training run, the same for every recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from os import PathLike, fspath

from mmattn._home import expand_home
from mmattn.errors import ConfigError

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "no", "bf16", "fp16")
DEVICES = ("auto", "cpu")
SHARDINGS = ("auto", "none", "fsdp2", "zero3")
TRACKERS = ("tensorboard", "wandb", "trackio")
TRACKER_FOLDER = "trackers"
SAMPLES_FOLDER = "samples"  # pictures drawn at evaluations
CACHE_FOLDER = "cache"  # what a task computes once, before the first step; good for any run

# A run may be continued in its own folder only when these are unchanged: its promise is to equal an unbroken run.
MATHS_KEYS = (
    "batch_size",
    "batch_tokens",
    "learning_rate",
    "betas",
    "eps",
    "weight_decay",
    "warmup_steps",
    "schedule",
    "min_learning_rate_ratio",
    "max_grad_norm",
    "ema_decay",
    "seed",
)
# These change rounding or dropout draws only (a smaller card, another number of processes): allowed, and said.
ROUNDING_KEYS = ("micro_batch_size", "micro_batch_tokens", "mixed_precision", "device", "torch_compile")


@dataclass
class TrainingConfig:
    """How a run goes: steps, optimiser, precision, processes, evaluations, checkpoints and logs.

    Steps are optimiser steps everywhere.

    Args:
        output_dir: Folder of the run, for all that it writes. Without --resume it must be new or empty.
        max_steps: Steps of the whole run, those before a resume included.
        batch_size: Examples of one step, over all processes and micro-batches. Not used with `batch_tokens`.
        micro_batch_size: Examples that go through the model at once in one process; fewer need less memory, and the
            result is the same but for rounding. None: the whole share of the process.
        batch_tokens: Padded tokens of one step at most, instead of `batch_size`: examples times the longest of them, on
            the side (source, target) where that is most. For data whose token counts are known: recipe `translate`.
        micro_batch_tokens: As `micro_batch_size`, in padded tokens; for `batch_tokens`.
        learning_rate: Learning rate of AdamW at its highest, after the warm-up.
        betas: AdamW's decay rates of the running means of gradients and of their squares.
        eps: AdamW's addition to the denominator.
        weight_decay: AdamW's weight decay; not on biases, norms, gates, embeddings and positions.
        warmup_steps: Steps in which the learning rate rises from 0 in a line.
        schedule: Learning rate after the warm-up: "cosine" (falls until `max_steps`) or "constant".
        min_learning_rate_ratio: Where "cosine" ends, as a part of `learning_rate`.
        max_grad_norm: Gradients of a larger norm are scaled down to it; None: never.
        mixed_precision: "auto" (bf16 on a CUDA GPU that has it, else none), "no" (float32; YAML needs the quotes),
            "bf16", or "fp16" (CUDA only, not with a `sharding`).
        device: "auto" (a GPU where there is one) or "cpu".
        sharding: How several processes hold the model: "none" (each the whole, DDP), "fsdp2" or "zero3" (each a part,
            for models that do not fit on one GPU), "auto" (as the launcher's config says, else "none").
        sharded_checkpoints: With "fsdp2": each process writes its part of a checkpoint, and `mmattn export` makes the
            model of them. For models that are too large to be gathered in the main process.
        activation_checkpointing: Run the layers again in the backward pass: less memory, the forward pass twice.
        torch_compile: Compile the repeated layers by torch.compile; the first steps take minutes. For long runs on a
            GPU.
        ema_decay: Keep an exponential moving average of the weights with this decay a step, such as 0.999; evaluations,
            best/ and final/ use it. None: no average.
        average_last: final/ gets the mean weights of so many checkpoints, the last ones at multiples of `save_every`.
            0: those of the last step.
        eval_every: Steps between evaluations; the last step has one, too. 0: no evaluations.
        save_every: Steps between checkpoints. After the last step, at a best evaluation and at a signal to stop there
            is one in any case; 0: only then.
        keep_last: How many of the newest checkpoints stay; the best and those for `average_last` stay besides.
        log_every: Steps between lines on the console and in trackers; metrics.jsonl has every step.
        num_workers: Processes that prepare batches ahead, for each training process. 0: none, between the steps.
        trackers: Where figures go besides metrics.jsonl: "tensorboard", "wandb", "trackio", packages of their own.
        max_bad_steps: So many steps in a row whose loss or gradient is not finite stop the run; each is skipped.
        seed: Seed of new weights, the order of examples, what is drawn for them, and dropout.
    """

    output_dir: str
    max_steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: str = "cosine"
    min_learning_rate_ratio: float = 0.0
    max_grad_norm: float | None = 1.0
    mixed_precision: str = "auto"
    device: str = "auto"
    sharding: str = "auto"
    sharded_checkpoints: bool = False
    activation_checkpointing: bool = False
    torch_compile: bool = False
    ema_decay: float | None = None
    average_last: int = 0
    eval_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    log_every: int = 10
    num_workers: int = 0
    trackers: list[str] = field(default_factory=list)
    max_bad_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """A path is welcome as `output_dir`; settings are written as JSON, which knows strings."""
        if isinstance(self.output_dir, PathLike):
            self.output_dir = fspath(self.output_dir)
        expand_home(self, "output_dir")

    def validate(self) -> None:
        """Raise `ConfigError` naming every setting that cannot be used."""
        problems = [text for is_wrong, text in [*self._rules(), *self._joint_rules()] if is_wrong]
        if problems:
            raise ConfigError("training settings: " + "; ".join(problems))

    def _rules(self) -> list[tuple[bool, str]]:
        at_least_one = ("max_steps", "batch_size", "keep_last", "log_every", "max_bad_steps")
        at_least_zero = ("warmup_steps", "eval_every", "save_every", "average_last", "num_workers", "seed")
        at_least_zero += ("weight_decay", "eps")
        optional_counts = ("micro_batch_size", "batch_tokens", "micro_batch_tokens")
        return [
            (not self.output_dir, "output_dir is empty"),
            *[(getattr(self, key) < 1, f"{key} must be at least 1, not {getattr(self, key)}") for key in at_least_one],
            *[
                (getattr(self, key) < 0, f"{key} must not be negative, is {getattr(self, key)}")
                for key in at_least_zero
            ],
            *[
                (value is not None and value < 1, f"{key} must be at least 1 or null, not {value}")
                for key, value in ((key, getattr(self, key)) for key in optional_counts)
            ],
            (self.seed >= 2**63, f"seed must be below 2**63, is {self.seed}"),
            (not self.learning_rate > 0, f"learning_rate must be positive, not {self.learning_rate}"),
            (
                len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas),
                f"betas must be two numbers in [0, 1), not {self.betas}",
            ),
            (
                not 0 <= self.min_learning_rate_ratio <= 1,
                f"min_learning_rate_ratio must be in [0, 1], is {self.min_learning_rate_ratio}",
            ),
            (
                self.max_grad_norm is not None and not self.max_grad_norm > 0,
                f"max_grad_norm must be positive or null, not {self.max_grad_norm}",
            ),
            (
                self.ema_decay is not None and not 0 < self.ema_decay < 1,
                f"ema_decay must be in (0, 1) or null, not {self.ema_decay}",
            ),
            _not_one_of("schedule", self.schedule, SCHEDULES),
            _not_one_of("mixed_precision", self.mixed_precision, PRECISIONS),
            _not_one_of("device", self.device, DEVICES),
            _not_one_of("sharding", self.sharding, SHARDINGS),
            *[_not_one_of("trackers", name, TRACKERS) for name in self.trackers],
        ]

    def _joint_rules(self) -> list[tuple[bool, str]]:
        last, periodic = self.average_last, self.max_steps // max(self.save_every, 1)
        return [
            (
                self.sharded_checkpoints and self.sharding == "none",
                "sharded_checkpoints needs sharding fsdp2 (or auto, under a launcher that shards)",
            ),
            (
                self.sharded_checkpoints and last > 0,
                f"average_last {last} averages whole checkpoints, and sharded_checkpoints writes none: set one of them",
            ),
            *((True, text) for text in sharding_problems(self, self.sharding, self.mixed_precision)),
            (
                self.batch_tokens is not None and self.micro_batch_size is not None,
                "micro_batch_size counts examples, and batch_tokens is set: use micro_batch_tokens",
            ),
            (
                self.batch_tokens is None and self.micro_batch_tokens is not None,
                "micro_batch_tokens needs batch_tokens: set it, or use micro_batch_size",
            ),
            (
                last > 0 and self.ema_decay is not None,
                f"average_last {last} and ema_decay {self.ema_decay} both say what final/ holds: set one of them",
            ),
            (
                last > 0 and self.save_every == 0,
                f"average_last {last} averages the checkpoints of every save_every steps: set save_every",
            ),
            (
                last > self.keep_last,
                f"average_last {last} needs that many checkpoints, but keep_last {self.keep_last} keeps fewer: "
                f"set keep_last to {last} or more",
            ),
            (
                self.save_every > 0 and last > periodic,
                f"average_last {last} needs that many checkpoints, but save_every {self.save_every} makes {periodic} "
                f"in max_steps {self.max_steps}",
            ),
        ]


def sharding_problems(config: TrainingConfig, sharding: str, precision: str) -> list[str]:
    """What of the settings does not go with a sharding and a precision, a line each."""
    is_sharded, is_zero3 = sharding in ("fsdp2", "zero3"), sharding == "zero3"
    rules = [
        (is_sharded and precision == "fp16", f"mixed_precision fp16 is not for sharding {sharding}: use bf16, or no"),
        (
            is_zero3 and config.sharded_checkpoints,
            "sharded_checkpoints are not for sharding zero3: use fsdp2, or whole checkpoints",
        ),
        (is_zero3 and config.torch_compile, "torch_compile is not for sharding zero3: use fsdp2, or set it to false"),
    ]
    return [text for is_wrong, text in rules if is_wrong]


def _not_one_of(key: str, value: str, allowed: tuple[str, ...]) -> tuple[bool, str]:
    return value not in allowed, f"{key} must be one of {', '.join(allowed)}, not {value!r}"


def config_dict(config: TrainingConfig) -> dict:
    """The settings as JSON has them (tuples become lists)."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def maths_keys(config: TrainingConfig) -> tuple[str, ...]:
    """The settings that a continued run must not change."""
    return MATHS_KEYS if config.batch_tokens is None else tuple(key for key in MATHS_KEYS if key != "batch_size")


def config_differences(old: dict, new: dict, keys: tuple[str, ...]) -> list[str]:
    """`key: old -> new` for each of `keys` whose values differ between two `config_dict` results."""
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
