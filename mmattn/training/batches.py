"""From settings to a run's sampler, and from its draws to batches, in data workers or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from mmattn.errors import MmattnError, UsageError
from mmattn.training.config import TrainingConfig
from mmattn.training.group_sampler import GroupSampler, example_groups
from mmattn.training.kept_memory import stop_keeping_memory
from mmattn.training.sampler import ExampleSampler, StepSampler
from mmattn.training.signals import ignore_stop_signals
from mmattn.training.task import Batch, Task
from mmattn.training.token_sampler import TokenSampler, token_lengths
from mmattn.training.window_sampler import WindowSampler, WindowTokenSampler, make_window_sampler

Key = tuple[int, int]
"""(step, micro-batch)."""


def make_sampler(
    task: Task, config: TrainingConfig, num_processes: int = 1
) -> ExampleSampler | GroupSampler | TokenSampler | WindowSampler | WindowTokenSampler:
    """Batches by `config.batch_tokens` where that is set, else by `config.batch_size`, of one of `task.groups` each;
    in windows where `task.stream` says that examples are read from shards.

    Raises:
        DataError: when there are no examples, or one is longer than `batch_tokens` or `micro_batch_tokens`.
        UsageError: when the processes cannot share `batch_size`, or a task without `lengths`, or with `groups`, is to
            use `batch_tokens`.
    """
    if task.stream is not None:
        return make_window_sampler(task, task.stream, config, num_processes)
    groups = example_groups(task)
    if groups is not None:
        if config.batch_tokens is not None:
            raise UsageError(
                f"{type(task).__name__} puts its examples into groups that cannot share a batch, which "
                "training.batch_tokens does not keep: use batch_size, with batch_tokens null"
            )
        return GroupSampler(groups, config.batch_size, config.seed, num_processes, config.micro_batch_size)
    if config.batch_tokens is None:
        return ExampleSampler(len(task), config.batch_size, config.seed, num_processes, config.micro_batch_size)
    lengths = token_lengths(task)
    return TokenSampler(lengths, config.batch_tokens, config.seed, num_processes, config.micro_batch_tokens)


class _MicroBatches(Dataset[Any]):
    """Micro-batches by (step, index). An expected failure is handed over as a value, to keep its one-line message."""

    def __init__(self, task: Task, sampler: StepSampler, rank: int) -> None:
        self.task, self.sampler, self.rank = task, sampler, rank

    def __getitem__(self, key: Key) -> Batch | MmattnError:
        try:
            return self.task.collate(self.sampler.micro_draws(key[0], self.rank, key[1]))
        except MmattnError as error:
            return error


class _Keys(Sampler[Key]):
    def __init__(self, sampler: StepSampler, steps: range) -> None:
        self.sampler, self.steps = sampler, steps

    def __iter__(self) -> Iterator[Key]:
        return ((step, index) for step in self.steps for index in range(self.sampler.num_micro_batches(step)))


def step_batches(
    task: Task,
    sampler: StepSampler,
    *,
    rank: int,
    first_step: int,
    last_step: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Sequence[Batch]]:
    """Yield the micro-batches of a process, step by step from `first_step` up to but not `last_step`.

    Workers only prefetch: what a step holds does not depend on their number.

    Raises:
        MmattnError: what `Task.collate` raised, in a worker too.
    """
    steps = range(first_step, last_step)
    loader = DataLoader(
        _MicroBatches(task, sampler, rank),
        batch_size=None,
        sampler=_Keys(sampler, steps),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
    )
    if steps:
        sampler.num_draws(first_step)  # finds the place once, for the workers too
    loaded = iter(loader)
    try:
        for step in steps:
            batches: list[Batch] = []
            for _ in range(sampler.num_micro_batches(step)):
                batch = _next(loaded, num_workers)
                if isinstance(batch, MmattnError):
                    raise batch
                batches.append(batch)
            yield batches
    finally:
        _end_workers(loaded)


def _begin_worker(number: int) -> None:
    ignore_stop_signals(number)
    stop_keeping_memory()


def _next(loaded: Iterator[Batch | MmattnError], num_workers: int) -> Batch | MmattnError:
    try:
        return next(loaded)
    except (ConnectionError, EOFError) as error:
        if num_workers == 0 or "in DataLoader worker process" in str(error):  # the task's own
            raise
        # It handed a batch over, and torch, whose words these are, does not see yet that it has ended.
        raise RuntimeError(f"DataLoader worker exited unexpectedly while it handed over a batch: {error!r}") from error


def _end_workers(loaded: Any) -> None:
    # They end with `loaded`, which the traceback of an error that came out of there may keep alive. The interpreter's
    # exit would then wait for them for ever: it asks them by a signal that they ignore.
    if hasattr(loaded, "_workers"):
        loaded._shutdown_workers()
