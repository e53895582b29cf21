"""A text decoder's step, compiled once by torch.compile and, on a CUDA device, captured as a CUDA graph.

Symbols as in `mmattn.models.static_decoding`. One compilation serves every length of texts and, where they vary, of
contexts, and every number of contexts above one; another is made for a single context, for another number of rows per
context and where weights are read. A graph is captured for every bucket of these sizes and replayed in buffers of its
own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.models.compiled_steps import (
    captured,
    check_device,
    check_not_autocast,
    compiling,
    mark_varying,
)
from mmattn.models.decoding import LayerContexts, StepDecoder
from mmattn.models.static_decoding import (
    SHORTEST_SOURCE,
    SMALLEST_CAPACITY,
    StaticState,
    StepBuffers,
    StepShape,
)
from mmattn.models.step_state import StepState
from mmattn.ops.cache import ContextKV, WatchedContextKV
from mmattn.ops.own_code import with_own_code
from mmattn.ops.registry import selected
from mmattn.ops.replay import replayed
from mmattn.ops.static_cache import StaticKVCache, visible_places

_IDLE_SHARE = 8  # at most so small a part of a CUDA device's memory is kept in buffers that nobody uses

Outputs = tuple[Tensor, Tensor | None]
Step = Callable[..., Outputs]  # takes the tensors of `StepBuffers`


class WeightReader(Protocol):
    """Makes an attention's weights of its queries and keys."""

    def weights(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor:
        """`[B, n, Ls]` of queries `[B, H, n, D]` and keys `[B, G, Ls, D]`."""
        ...


class Watched(NamedTuple):
    """The layer whose attention to the context is read, and what reads it."""

    layer: int
    reader: WeightReader


class _Kind(NamedTuple):
    """What has a compilation of its own."""

    is_single: bool
    rows: int
    reads_alignment: bool
    source: int | None
    self_backend: str
    cross_backend: str


def decoding_step(
    decoder: StepDecoder,
    watched: Watched | None,
    ids: Tensor,
    position: Tensor,
    window: Tensor,
    caches: Sequence[Tensor],
    contexts: Sequence[Tensor | None],
    key_mask: Tensor | None,
) -> Outputs:
    """Read one token per row: logits `[B * n, V]`, and the weights `[B * n, Ls]` that are watched.

    The tensors are those of `StepBuffers`; the caches are written to.
    """
    rows = [StaticKVCache(cache, position) for cache in caches]
    sources: list[ContextKV | None] = []
    for index, held in enumerate(contexts):
        if held is None:
            sources.append(None)
            continue
        kind = ContextKV if watched is None or index != watched.layer else WatchedContextKV
        key, value = held.chunk(2, dim=1)
        sources.append(kind(key, value, key_mask))
    seen = visible_places(position, window, caches[0].shape[3])
    hidden = decoder(ids.view(-1, 1), tuple(sources), caches=rows, attn_mask=seen)
    logits = decoder.logits(hidden[:, -1])
    if watched is None:
        return logits, None
    source = sources[watched.layer]
    assert isinstance(source, WatchedContextKV)
    return logits, watched.reader.weights(source.queries[-1], source.key, key_mask).flatten(0, 1)


class CompiledSteps:
    """Decodes in compiled steps; a `StepSource`. It holds compiled functions and idle buffers, never a text.

    Several threads may decode with it, each in buffers of its own; what compiles or captures makes the others wait.

    Args:
        decoder: in evaluation mode while it decodes. Weights changed in place are seen; what was replaced, added or
            chosen anew (weights, adapters and their scales, attention's backends) is compiled anew for the next text.
        backend: of torch.compile.
        idle_bytes: most bytes of buffers kept for later texts; None: a part of the memory of a CUDA device, none
            where nothing is captured in them.
        use_graphs: capture the steps; None: on a CUDA device.
        context_length: tokens of every context, where all have as many and no padding; None: that varies.

    Attributes:
        idle: buffers that wait for a text, those given back last at the end.

    Raises:
        UsageError: a device other than a CPU or a CUDA device, or graphs on a CPU.
    """

    def __init__(
        self,
        decoder: StepDecoder,
        *,
        backend: str = "inductor",
        idle_bytes: int | None = None,
        use_graphs: bool | None = None,
        context_length: int | None = None,
    ) -> None:
        self.decoder, self.context_length = decoder, context_length
        check_device(self._module, use_graphs)
        self._backend, self._use_graphs, self._idle_bytes = backend, use_graphs, idle_bytes
        self._steps: dict[_Kind, Step] = {}
        self.idle: list[StepBuffers] = []
        self._lent: weakref.WeakSet[StepBuffers] = weakref.WeakSet()
        self._watch = StepState(self._module, "the decoder")
        self._structure: tuple[Any, ...] | None = None
        self._generation = 0
        self._lock = threading.Lock()
        self._returned: deque[StepBuffers] = deque()

    @property
    def num_lent(self) -> int:
        """How many buffers are in use."""
        return len(self._lent)

    def start(self, contexts: LayerContexts, **arguments: Any) -> StaticState:
        """Begin decoding; arguments as in `StaticState`.

        Raises:
            UsageError: a call under autocast, a device as for the class, or as in `lend` and `StaticState`.
            RunError: as in `lend`.
        """
        check_not_autocast(check_device(self._module, self._use_graphs))
        return StaticState(self, contexts, **arguments)

    def reset(self) -> None:
        """Forget all that was compiled and captured, and free what is idle; a text that is being decoded can't go on.

        For a network that has been moved: what was captured would read where its weights were.
        """
        with self._lock:
            self._forget(None)
            for buffers in self._lent:
                buffers.run = _cannot_go_on
        self._take_back()

    def lend(self, shape: StepShape) -> StepBuffers:
        """See `StepSource`.

        Raises:
            UsageError: forward hooks or another forward on the decoder or a part of it, such as those of offloading.
            RunError: the step cannot be compiled on this machine.
        """
        try:
            with self._lock:
                self._file_returned()
                self._look_for_changes()
                buffers = self._ready(shape)
                self._lent.add(buffers)
                return buffers
        finally:
            self._take_back()  # what came back meanwhile

    def give_back(self, buffers: StepBuffers) -> None:
        """See `StepSource`. It never waits: the garbage collector may call it in any thread, also in one that has a
        lock which another needs to finish `lend`."""
        self._returned.append(buffers)
        self._take_back()

    def _take_back(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._file_returned()
            finally:
                self._lock.release()

    # Under the lock.

    def _file_returned(self) -> None:
        while self._returned:
            buffers = self._returned.popleft()
            self._lent.discard(buffers)
            if buffers.made_for[2] == self._generation:
                self.idle.append(buffers)
            most = self._most_idle(buffers.ids.device)
            while sum(each.nbytes for each in self.idle) > most:
                del self.idle[0]

    def _look_for_changes(self) -> None:
        self._watch.check_forwards()
        structure, _ = self._watch.read()
        if structure != self._structure:  # what was compiled or captured would go on as it was
            self._forget(structure)

    def _forget(self, structure: tuple[Any, ...] | None) -> None:
        self._structure = structure
        self._generation += 1
        self._steps.clear()
        self.idle.clear()

    def _ready(self, shape: StepShape) -> StepBuffers:
        source = None if shape.is_masked else shape.source
        chosen = (selected("self"), selected("cross"))
        kind = _Kind(shape.batch == 1, shape.rows, shape.reads_alignment, source, *chosen)
        made_for = (shape, kind, self._generation)
        for buffers in self.idle:
            if buffers.made_for == made_for:
                self.idle.remove(buffers)  # compared by identity
                return buffers
        step = self._steps.get(kind)
        if step is None:
            step = self._steps[kind] = self._compiled(kind)
        buffers = StepBuffers(shape, self.decoder)
        buffers.made_for = made_for
        # Neither holds the buffers, only their tensors: a cycle would keep them until the garbage collector comes.
        tensors = buffers.tensors
        if self._captures(buffers.ids.device):
            buffers.run = captured(step, tensors, buffers.ids.device)
        else:
            buffers.run = functools.partial(step, *tensors)
        return buffers

    # What is asked for.

    def _captures(self, device: torch.device) -> bool:
        return device.type == "cuda" if self._use_graphs is None else self._use_graphs

    def _most_idle(self, device: torch.device) -> int:
        if self._idle_bytes is not None:
            return self._idle_bytes
        return torch.cuda.get_device_properties(device).total_memory // _IDLE_SHARE if self._captures(device) else 0

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.decoder, nn.Module)
        return self.decoder

    def _watched(self) -> Watched | None:
        """What a step that `reads_alignment` reads."""
        return None

    def _prepare(self, buffers: StepBuffers) -> None:
        """Make what the decoder makes when it first runs, so that it is no part of what is compiled."""

    def _compiled(self, kind: _Kind) -> Step:
        decoder, watched = self.decoder, self._watched() if kind.reads_alignment else None
        compiled = torch.compile(with_own_code(decoding_step), fullgraph=True, dynamic=False, backend=self._backend)

        def step(*tensors: Any) -> Outputs:
            # One mode for all callers: the compiled code is guarded by it.
            with torch.inference_mode():
                return compiled(decoder, watched, *tensors)

        # Sizes that are equal when it is traced are taken to be one: here no two are. Each is a multiple of the
        # smallest of its bucket, so that what is found about divisors holds for all.
        batch, is_masked = 1 if kind.is_single else 3, kind.source is None
        length = 3 * SHORTEST_SOURCE if kind.source is None else kind.source
        shape = StepShape(batch, kind.rows, length, 3 * SMALLEST_CAPACITY, is_masked=is_masked)
        buffers = StepBuffers(shape, decoder)
        _mark_sizes(buffers, is_single=kind.is_single)
        self._prepare(buffers)
        is_replayed = self._captures(buffers.ids.device)
        with compiling(), replayed() if is_replayed else contextlib.nullcontext():
            step(*buffers.tensors)
        return step


def _cannot_go_on() -> Outputs:
    raise UsageError("the model was moved while this text was being decoded: start the text again")


def _mark_sizes(buffers: StepBuffers, *, is_single: bool) -> None:
    """Tell torch.compile which sizes vary. A batch of one does not: it would be taken for a constant anyway."""
    batch = () if is_single else (0,)
    varying = [(buffers.ids, batch)]
    varying += [(cache, (*batch, 3)) for cache in buffers.caches]
    source = () if buffers.key_mask is None else (2,)
    varying += [(context, (*batch, *source)) for context in buffers.contexts if context is not None]
    if buffers.key_mask is not None:
        varying.append((buffers.key_mask, (*batch, 1)))
    mark_varying(varying)
