"""The denoising step of a U-Net: its transformer blocks compiled by torch.compile, and on a CUDA device its pictures in
channels-last (`pictures`) and the whole step captured as a CUDA graph.

B prompts, R = B * n rows of latents, L places of a picture, Lk tokens of a text, C channels. A block's compilation
serves every picture size, number of rows above one and length of padded texts; each width of the network has its own,
and each number of places for which attention's "auto" has measurements. A graph is captured for every shape of the
inputs. Graphs share one memory, so that together they take what the largest takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.models.compiled_steps import (
    captured,
    check_device,
    check_not_autocast,
    check_unwatched,
    compiling,
    mark_varying,
)
from mmattn.models.step_state import StepState
from mmattn.models.unet.block import TransformerBlock
from mmattn.models.unet.context import UNetContext
from mmattn.models.unet.model import UNet
from mmattn.models.unet.pictures import captured_pictures, lay_out_weights
from mmattn.nn.layer import TransformerLayer
from mmattn.nn.projected_attention import ProjectedAttention
from mmattn.ops.cache import ContextKV
from mmattn.ops.own_code import with_own_code
from mmattn.ops.registry import auto_queries, selected

_MOST_GRAPHS = 8
_TEXT_MULTIPLE = 16  # padded texts are lengthened to one, so that their graphs are few


class _Kind(NamedTuple):
    """What has a compilation of its own."""

    widths: tuple[int, ...]
    is_single: bool
    repeats: int
    places: int
    are_places_fixed: bool
    text_length: int | None
    backends: tuple[str, ...]


def block_step(block: TransformerBlock, hidden: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """A block on `[R, L, C]` and the keys and values `[B, G, Lk, D]` of its text."""
    return TransformerLayer.forward(block, hidden, context=ContextKV(key, value, key_mask))


class _Step:
    """A step for inputs of one shape: what it reads stays at its address."""

    def __init__(self, inputs: dict[str, Tensor], context: UNetContext) -> None:
        self.inputs = {name: torch.empty_like(each).copy_(each) for name, each in inputs.items()}
        self.context = context
        self.text: tuple[Any, ...] = ()
        self.run: Callable[[], Tensor] | None = None


class CompiledUNet:
    """Runs a U-Net's denoising steps compiled; it holds compiled functions and the buffers of its graphs.

    Inside `installed()` the U-Net's own forward is the compiled one, in whatever pipeline it is. It takes a sample, a
    timestep, a text (a tensor or a `UNetContext`), `class_labels`, `timestep_cond` and `added_cond_kwargs`; other
    inputs (ControlNet's residuals, attention masks, LoRA's `scale`) are refused. A text's keys and values are projected
    when it is first seen within each `installed()`. Weights, adapters and attention's backends may change between
    steps: what changed in place is seen, and what was replaced, added, chosen or scaled anew is compiled and captured
    anew. Only of a write through `tensor.data` a text's keys and values learn at the next `installed()`. Steps of one
    object run one at a time, on one stream.

    Args:
        unet: `mmattn.UNet`, in evaluation mode while it draws.
        backend: of torch.compile.
        use_graphs: capture the steps; None: on a CUDA device.

    Raises:
        UsageError: another network, a device other than a CPU or a CUDA device, or graphs on a CPU.
    """

    def __init__(self, unet: nn.Module, *, backend: str = "inductor", use_graphs: bool | None = None) -> None:
        if not isinstance(unet, UNet):
            raise UsageError(
                f"compile=True compiles mmattn.UNet, not a {type(unet).__name__}: open it with UNet.from_pretrained, or"
                " UNet.from_stock(unet)"
            )
        check_device(unet, use_graphs)
        self.unet = unet
        self._backend, self._use_graphs = backend, use_graphs
        self._compiled: dict[_Kind, Callable[..., Tensor]] = {}
        self._steps: OrderedDict[Any, _Step] = OrderedDict()
        self._watch = StepState(unet, "the U-Net", runs_own_hooks=True)
        self._structure: tuple[Any, ...] | None = None
        self._pool: Any = None
        self._lock = threading.RLock()

    @property
    def num_graphs(self) -> int:
        """Shapes of inputs that are kept."""
        return len(self._steps)

    def reset(self) -> None:
        """Forget all that was compiled and captured, and free its buffers: for a U-Net that has been moved."""
        with self._lock:
            self._forget(None)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, the U-Net's forward is the compiled one.

        Raises:
            UsageError: hooks or another forward on the U-Net or a part of it, such as those of offloading; or a device
                as for the class.
        """
        unet: Any = self.unet
        with self._lock:
            self._watch.check_forwards()
            check_device(self.unet, self._use_graphs)
            for step in self._steps.values():
                step.text = ()  # weights written to through `tensor.data` have the version that they had
            lay_out_weights(unet)
            unet.forward = self._forward
            try:
                yield
            finally:
                del unet.forward

    def _forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | UNetContext,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As `UNet.forward`.

        Raises:
            UsageError: an input that compiled steps do not take, gradients, training mode, autocast, or attention that
                somebody records or steers.
        """
        given = [name for name, value in others.items() if value is not None and value != {}]
        if given:
            raise UsageError(f"a compiled denoising step takes no {' or '.join(given)}: leave compile out for that")
        unet, device = self.unet, sample.device
        if torch.is_grad_enabled() or unet.training:
            raise UsageError("compiled denoising steps are for inference: call eval(), under torch.no_grad()")
        check_not_autocast(device)
        check_unwatched()
        unet._check_text(encoder_hidden_states, rows=sample.shape[0])
        inputs = {"sample": sample, "timestep": _as_tensor(timestep, device)}
        inputs |= {"class_labels": class_labels, "timestep_cond": timestep_cond} | {
            f"added.{name}": value for name, value in (added_cond_kwargs or {}).items()
        }
        tensors = {name: value for name, value in inputs.items() if value is not None}
        with self._lock:
            step = self._step_for(tensors, encoder_hidden_states)
            with torch.inference_mode():
                out = cast(Callable[[], Tensor], step.run)()
            out = out.clone()  # outside: no inference tensor, and the graph's own is overwritten by the next step
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    # Which step serves a call.

    def _step_for(self, inputs: dict[str, Tensor], given: Tensor | UNetContext) -> _Step:
        structure, versions = self._watch.read()
        if structure != self._structure:
            self._forget(structure)
        text = given.text if isinstance(given, UNetContext) else given
        key_mask = given.key_mask if isinstance(given, UNetContext) else None
        length = text.shape[1] if key_mask is None else -(-text.shape[1] // _TEXT_MULTIPLE) * _TEXT_MULTIPLE
        shapes = tuple((name, tuple(each.shape), each.dtype, each.device) for name, each in inputs.items())
        backends = (selected("self"), selected("cross"))
        wanted = (shapes, text.shape[0], length, text.dtype, key_mask is None, backends)
        step = self._steps.get(wanted)
        if step is None:
            step = self._new_step(inputs, self._projected(text, key_mask, length))
            self._steps[wanted] = step
            while len(self._steps) > _MOST_GRAPHS:
                self._steps.popitem(last=False)
        else:
            if not _is_same_text(step.text, text, key_mask, versions):
                _copy_context(step.context, self._projected(text, key_mask, length))
            for name, each in inputs.items():
                step.inputs[name].copy_(each)
        self._steps.move_to_end(wanted)
        step.text = _marks(text, key_mask, versions)
        return step

    def _forget(self, structure: tuple[Any, ...] | None) -> None:
        self._structure = structure
        self._steps.clear()
        self._compiled.clear()
        self._pool = None  # a pool whose graphs are all gone cannot be used again

    def _projected(self, text: Tensor, key_mask: Tensor | None, length: int) -> UNetContext:
        """A context of tensors of its own, contiguous, with every layer's keys and values."""
        missing = length - text.shape[1]
        if missing:
            text = nn.functional.pad(text, (0, 0, 0, missing))
            key_mask = None if key_mask is None else nn.functional.pad(key_mask, (0, missing))
        with torch.no_grad():
            made = self.unet.project_context(text, key_mask)
        own = UNetContext(_copy(made.text), None if made.key_mask is None else _copy(made.key_mask))
        for maker, kept in made._kept.items():
            if isinstance(kept, ContextKV):
                own._kept[maker] = ContextKV(_copy(kept.key), _copy(kept.value), own.key_mask)
            else:
                own._kept[maker] = _copy(kept)
        return own

    def _new_step(self, inputs: dict[str, Tensor], context: UNetContext) -> _Step:
        step = _Step(inputs, context)
        own = step.inputs
        added = {name.removeprefix("added."): own[name] for name in own if name.startswith("added.")}
        options: dict[str, Any] = {name: own[name] for name in ("class_labels", "timestep_cond") if name in own}

        def run() -> Tensor:
            with torch.inference_mode(), self._blocks(), captured_pictures(self.unet):
                out = UNet.forward(
                    self.unet,
                    own["sample"],
                    own["timestep"],
                    context,
                    added_cond_kwargs=added or None,
                    return_dict=False,
                    **options,
                )
            return cast("tuple[Tensor]", out)[0]

        device = own["sample"].device
        step.run = run
        if device.type == "cuda" if self._use_graphs is None else self._use_graphs:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            step.run = captured(run, (), device, self._pool)
        return step

    # The blocks.

    @contextlib.contextmanager
    def _blocks(self) -> Iterator[None]:
        """Within it, every transformer block's forward is the compiled one."""
        blocks: list[Any] = [module for module in self.unet.modules() if isinstance(module, TransformerBlock)]
        compiled = [block for block in blocks if len(block.cross_attentions) == 1]  # two where it has no self-attention
        for block in compiled:
            block.forward = _BlockForward(self, block)
        try:
            yield
        finally:
            for block in compiled:
                del block.forward

    def run_block(self, block: TransformerBlock, hidden: Tensor, kv: ContextKV) -> Tensor:
        """One block, compiled for its kind at first use."""
        attention = block.cross_attentions[0]
        widths = (
            hidden.shape[2],
            attention.num_heads,
            attention.head_dim,
            attention.num_kv_heads,
            kv.key.element_size(),
        )
        rows, places = hidden.shape[:2]
        repeats = rows // kv.batch_size
        numbers = auto_queries(hidden.device, hidden.dtype, attention.head_dim)
        # A picture's places are self-attention's queries, those of all pictures of a prompt cross-attention's.
        are_places_fixed = places == 1 or not numbers.isdisjoint((places, places * repeats))
        own = [part.backend for part in block.modules() if isinstance(part, ProjectedAttention)]
        kind = _Kind(
            widths,
            rows == 1,
            repeats,
            places if are_places_fixed else _alignment(places),
            are_places_fixed,
            kv.length if kv.key_mask is None else None,
            (selected("self"), selected("cross"), *own),
        )
        compiled = self._compiled.get(kind)
        if compiled is None:
            step = torch.compile(with_own_code(block_step), fullgraph=True, dynamic=False, backend=self._backend)
            with compiling():
                step(block, *_first_inputs(kind, hidden, kv))
            compiled = self._compiled[kind] = step
        return compiled(block, hidden.contiguous(), kv.key, kv.value, kv.key_mask)


class _BlockForward:
    """Takes a block's call as the U-Net makes it."""

    def __init__(self, owner: CompiledUNet, block: TransformerBlock) -> None:
        self._owner, self._block = owner, block

    def __call__(self, hidden_states: Tensor, encoder_hidden_states: UNetContext, **_: Any) -> Tensor:
        """What else the U-Net passes is for blocks of other kinds, or was refused."""
        kv = encoder_hidden_states.keys_and_values(self._block.cross_attentions[0])
        return self._owner.run_block(self._block, hidden_states, kv)


def _first_inputs(kind: _Kind, hidden: Tensor, kv: ContextKV) -> tuple[Tensor | None, ...]:
    """Inputs to trace a block on: sizes that vary differ from one another, as equal ones would be taken for one."""
    batch = 1 if kind.is_single else 3
    rows, places = batch * kind.repeats, kind.places if kind.are_places_fixed else 3 * 16 + kind.places % 16
    first = hidden.new_zeros(rows, places, hidden.shape[2])
    with torch.inference_mode(False):  # as contexts are made
        length = 5 * _TEXT_MULTIPLE if kind.text_length is None else kind.text_length
        key = kv.key.new_zeros(batch, kv.key.shape[1], length, kv.key.shape[3])
        value = torch.zeros_like(key)
        key_mask = None if kv.key_mask is None else kv.key_mask.new_ones(batch, key.shape[2])
    batch_axes, row_axes = () if batch == 1 else (0,), () if rows == 1 else (0,)
    text_axes = () if kind.text_length is not None else (2,)
    place_axes = () if kind.are_places_fixed else (1,)
    varying = [(first, (*row_axes, *place_axes)), *((each, (*batch_axes, *text_axes)) for each in (key, value))]
    mark_varying(varying if key_mask is None else [*varying, (key_mask, (*batch_axes, 1))])
    return first, key, value, key_mask


def _alignment(places: int) -> int:
    """16 where a picture's places are a multiple, as they are in real sizes; 3 where they are not."""
    return 16 if places % 16 == 0 else 3


def _as_tensor(timestep: Tensor | float | int, device: torch.device) -> Tensor:
    if isinstance(timestep, Tensor):
        return timestep.to(device)
    return torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64, device=device)


def _copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _copy_context(held: UNetContext, fresh: UNetContext) -> None:
    """Put the tensors of a context of the same shape into one that a graph reads."""
    held.text.copy_(fresh.text)
    if held.key_mask is not None and fresh.key_mask is not None:
        held.key_mask.copy_(fresh.key_mask)
    for maker, kept in held._kept.items():
        new = fresh._kept[maker]
        if isinstance(kept, ContextKV) and isinstance(new, ContextKV):
            kept.key.copy_(new.key)
            kept.value.copy_(new.value)
        elif isinstance(kept, Tensor) and isinstance(new, Tensor):
            kept.copy_(new)


def _marks(text: Tensor, key_mask: Tensor | None, versions: Any) -> tuple[Any, ...]:
    """What says that a text's keys and values are still good; the tensors are held, lest others take their places."""
    tensors = [each for each in (text, key_mask) if each is not None]
    if any(each.is_inference() for each in tensors):  # they have no version
        return ()
    return (text, key_mask, [each._version for each in tensors], versions)


def _is_same_text(marks: tuple[Any, ...], text: Tensor, key_mask: Tensor | None, versions: Any) -> bool:
    now = _marks(text, key_mask, versions)
    return bool(marks) and bool(now) and marks[0] is now[0] and marks[1] is now[1] and marks[2:] == now[2:]
