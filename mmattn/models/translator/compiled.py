"""The decoder's step, compiled once by torch.compile and, on a CUDA device, captured as a CUDA graph.

Symbols as in `mmattn.models.static_decoding`. One compilation serves every length of sources and targets, and every
number of sources above one; another is made for a single source, for another number of rows per source and for
alignments. A graph is captured for every bucket of these sizes and replayed in buffers of its own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmattn.errors import MmattnError, RunError, UsageError
from mmattn.models.decoding import LayerContexts
from mmattn.models.static_decoding import (
    SHORTEST_SOURCE,
    SMALLEST_CAPACITY,
    StaticState,
    StepBuffers,
    StepShape,
)
from mmattn.models.translator.alignment import AlignmentReader
from mmattn.models.translator.model import Decoder, TranslatorNetwork
from mmattn.nn import SinusoidalPositions
from mmattn.ops.cache import ContextKV, WatchedContextKV
from mmattn.ops.registry import selected
from mmattn.ops.static_cache import StaticKVCache, visible_places

DEVICES = ("cpu", "cuda")
_IDLE_SHARE = 8  # at most so small a part of a CUDA device's memory is kept in buffers that nobody uses
_WARM_UPS = 2  # runs before a capture, in which libraries set themselves up


class _Kind(NamedTuple):
    """What has a compilation of its own."""

    is_single: bool
    rows: int
    reads_alignment: bool
    self_backend: str
    cross_backend: str


Outputs = tuple[Tensor, Tensor | None]
Step = Callable[..., Outputs]  # takes the tensors of `StepBuffers`


def decoding_step(
    decoder: Decoder,
    layer_index: int,
    reader: AlignmentReader | None,
    ids: Tensor,
    position: Tensor,
    window: Tensor,
    caches: Sequence[Tensor],
    contexts: Sequence[Tensor],
    key_mask: Tensor,
) -> Outputs:
    """Read one token per row: logits `[B * n, V]`, and the reader's weights `[B * n, Ls]` in layer `layer_index`.

    The tensors are those of `StepBuffers`; the caches are written to.
    """
    rows = [StaticKVCache(cache, position) for cache in caches]
    sources: list[ContextKV] = []
    for index, held in enumerate(contexts):
        kind = ContextKV if reader is None or index != layer_index else WatchedContextKV
        key, value = held.chunk(2, dim=1)
        sources.append(kind(key, value, key_mask))
    seen = visible_places(position, window, caches[0].shape[3])
    hidden = decoder(ids.view(-1, 1), tuple(sources), caches=rows, attn_mask=seen)
    logits = decoder.logits(hidden[:, -1])
    watched = sources[layer_index]
    if reader is None or not isinstance(watched, WatchedContextKV):
        return logits, None
    return logits, reader.weights(watched.queries[-1], watched.key, key_mask).flatten(0, 1)


class CompiledDecoder:
    """Decodes in compiled steps; a `StepSource`. It holds compiled functions and idle buffers, never a text.

    Args:
        network: in evaluation mode while it decodes. Weights changed in place are seen; replaced ones are compiled
            anew.
        backend: of torch.compile.
        idle_bytes: most bytes of buffers kept for later texts; None: a part of the memory of a CUDA device, none on a
            CPU, where nothing is captured in them.

    Attributes:
        idle: buffers that wait for a text, those given back last at the end.
        num_lent: how many are in use.

    Raises:
        UsageError: a device other than a CPU or a CUDA device.
    """

    def __init__(self, network: TranslatorNetwork, *, backend: str = "inductor", idle_bytes: int | None = None) -> None:
        device = next(network.parameters()).device
        if device.type not in DEVICES:
            raise UsageError(f"compile=True works on {' and '.join(DEVICES)}, the network is on {device}: leave it out")
        self.decoder = network.decoder
        self._network, self._backend = network, backend
        self._steps: dict[_Kind, Step] = {}
        self.idle: list[StepBuffers] = []
        self.num_lent = 0
        self._addresses, self._generation = _addresses(self.decoder), 0
        if idle_bytes is None:
            is_cuda = device.type == "cuda"
            idle_bytes = torch.cuda.get_device_properties(device).total_memory // _IDLE_SHARE if is_cuda else 0
        self._idle_bytes = idle_bytes

    def start(self, contexts: LayerContexts, **arguments: Any) -> StaticState:
        """Begin decoding; arguments as in `StaticState`.

        Raises:
            UsageError: a call under autocast, or as in `StaticState`.
        """
        device = next(self.decoder.parameters()).device
        if torch.is_autocast_enabled(device.type):
            raise UsageError("compile=True does not go with autocast: open the translator with dtype= instead")
        addresses = _addresses(self.decoder)
        if addresses != self._addresses:  # graphs would go on reading the old weights
            self._addresses = addresses
            self._generation += 1
            self._steps.clear()
            self.idle.clear()
        return StaticState(self, contexts, **arguments)

    def lend(self, shape: StepShape) -> StepBuffers:
        """See `StepSource`.

        Raises:
            RunError: the step cannot be compiled on this machine.
        """
        kind = _Kind(shape.batch == 1, shape.rows, shape.reads_alignment, selected("self"), selected("cross"))
        made_for = (shape, kind, self._generation)
        for place, buffers in enumerate(self.idle):
            if buffers.made_for == made_for:
                self.num_lent += 1
                return self.idle.pop(place)
        step = self._steps.get(kind)
        if step is None:
            step = self._steps[kind] = self._compiled(kind)
        buffers = StepBuffers(shape, self.decoder)
        buffers.made_for = made_for
        # Neither holds the buffers, only their tensors: a cycle would keep them until the garbage collector comes.
        tensors = _tensors(buffers)
        buffers.run = _captured(step, tensors) if buffers.ids.is_cuda else functools.partial(step, *tensors)
        self.num_lent += 1
        return buffers

    def give_back(self, buffers: StepBuffers) -> None:
        """See `StepSource`."""
        self.num_lent -= 1
        if buffers.made_for[2] == self._generation:
            self.idle.append(buffers)
        while sum(each.nbytes for each in self.idle) > self._idle_bytes:
            del self.idle[0]

    def _compiled(self, kind: _Kind) -> Step:
        decoder, layer = self.decoder, self._network.config.chosen_alignment_layer
        reader = self._network.alignment_reader() if kind.reads_alignment else None
        compiled = torch.compile(_with_own_code(decoding_step), fullgraph=True, dynamic=False, backend=self._backend)

        def step(*tensors: Any) -> Outputs:
            # One mode for all callers: the compiled code is guarded by it.
            with torch.inference_mode():
                return compiled(decoder, layer, reader, *tensors)

        # Sizes that are equal when it is traced are taken to be one: here no two are. Each is a multiple of the
        # smallest of its bucket, so that what is found about divisors holds for all.
        shape = StepShape(1 if kind.is_single else 3, kind.rows, 3 * SHORTEST_SOURCE, 3 * SMALLEST_CAPACITY)
        buffers = StepBuffers(shape, decoder)
        _mark_sizes(buffers, is_single=kind.is_single)
        if isinstance(decoder.embedding.positions, SinusoidalPositions):  # its table is made when first asked for
            decoder.embedding.positions(buffers.position, buffers.caches[0].dtype)
        try:
            step(*_tensors(buffers))
        except MmattnError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(f"compile=True: the step cannot be compiled here: {reason}; leave compile out") from error
        return step


def _tensors(buffers: StepBuffers) -> tuple[Any, ...]:
    return (
        buffers.ids,
        buffers.position,
        buffers.window,
        buffers.caches,
        buffers.contexts,
        buffers.key_mask,
    )


def _mark_sizes(buffers: StepBuffers, *, is_single: bool) -> None:
    """Tell torch.compile which sizes vary. A batch of one does not: it would be taken for a constant anyway."""
    batch = () if is_single else (0,)
    varying = [(buffers.ids, batch), (buffers.key_mask, (*batch, 1))]
    varying += [(cache, (*batch, 3)) for cache in buffers.caches]
    varying += [(context, (*batch, 2)) for context in buffers.contexts]
    for tensor, axes in varying:
        torch._dynamo.maybe_mark_dynamic(tensor, list(axes))


def _captured(step: Step, tensors: tuple[Any, ...]) -> Callable[[], Outputs]:
    """The step as a CUDA graph over the tensors of buffers."""
    with torch.cuda.device(tensors[0].device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step(*tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = step(*tensors)

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def _with_own_code(function: types.FunctionType) -> types.FunctionType:
    """A copy with a code object of its own: dynamo keeps and limits what it compiles by code object, so that models
    would count against one another."""
    code = function.__code__.replace(co_name=f"compiled_{function.__name__}")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def _addresses(decoder: Decoder) -> tuple[int, ...]:
    """Where the weights are, and the packed ones with them, of which they are views."""
    return tuple(tensor.data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers()))
