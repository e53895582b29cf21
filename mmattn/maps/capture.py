"""Seeing what attention modules attend with while they run, whoever wrote them, without touching what they compute.

Within a module's forward the calls that it makes are looked at: mmattn's own attention tells its observers, torch's
fused attention is seen with its arguments and the log-sum-exp that its kernel returns, and a softmax written out by
hand is seen as it is. Nothing is replaced, so outputs are those of a run that nobody looks at, bit for bit.

B batch, R rows of a module's input, H heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmattn.maps.in_place import Hook
from mmattn.maps.layers import check_not_compiling
from mmattn.maps.weights import RowCall, kept_weights
from mmattn.ops.masks import as_four_dim, causal_mask
from mmattn.ops.observe import AttentionCall, observing
from mmattn.ops.request import Request
from mmattn.ops.same_pass import MapsAsked, SamePassMaps
from mmattn.swap.layers import head_count

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True, eq=False)
class SeenAttention:
    """What one forward of an attention module attended with: queries and keys, or weights where it made them itself.

    Attributes:
        rows: R, rows of the module's input.
        query: [B, H, n * Lq, D], where each of the B keys serves n rows (B * n = R).
        key: [B, G, Lk, D].
        scale: factor of the scores.
        mask: broadcastable to [B, H, n * Lq, Lk].
        log_sum_exp: [B, H, n * Lq].
        weights: [R, H, Lq, Lk].
        maps: weights that were asked for and that the call's own pass has given.
    """

    rows: int
    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0
    mask: Tensor | None = None
    log_sum_exp: Tensor | None = None
    weights: Tensor | None = None
    maps: SamePassMaps | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, Lq and Lk."""
        if self.weights is not None:
            return self.weights.shape[1], self.weights.shape[2], self.weights.shape[3]
        query, key = self._operands
        return query.shape[1], query.shape[2] * query.shape[0] // self.rows, key.shape[2]

    def kept(self, row: int, keys: Tensor | None, heads: Sequence[int] | None, *, average: bool) -> Tensor:
        """A row's weights, float32 [H', Lq, T] or [1, Lq, T]; see `kept_weights`."""
        if self.weights is not None:
            weights = self.weights[row].detach()
            weights = weights if heads is None else weights[list(heads)]
            weights = weights if keys is None else weights.index_select(2, keys)
            return (weights.float().mean(dim=0, keepdim=True) if average else weights.float()).clone()
        return kept_weights(self._row(row), keys=keys, heads=heads, average=average)

    def asked_for(self, row: int) -> Tensor | None:
        """A row's weights of the keys and heads that were asked for before the call, float32 [H' or 1, Lq, T]; None
        where its pass has not given them."""
        if self.maps is None:
            return None
        number, part = self._place(row)
        # Not in inference mode: what is kept is added to later, outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self.maps.of_row(number)[:, part].clone()

    @property
    def _operands(self) -> tuple[Tensor, Tensor]:
        assert self.query is not None
        assert self.key is not None
        return self.query, self.key

    def _row(self, row: int) -> RowCall:
        query, key = self._operands
        number, part = self._place(row)
        mask, lse = self.mask, self.log_sum_exp
        if mask is not None:
            mask = mask[number if mask.shape[0] > 1 else 0]
            mask = mask if mask.shape[1] == 1 else mask[:, part]
        return RowCall(
            query[number, :, part],
            key[number],
            self.scale,
            mask,
            None if lse is None else lse[number, :, part],
        )

    def _place(self, row: int) -> tuple[int, slice]:
        """The row of the keys that a row of the module's input attends to, and where its queries stand."""
        length = self.sizes[1]
        number, place = divmod(row, self.rows // self._operands[0].shape[0])
        return number, slice(place * length, (place + 1) * length)


@contextlib.contextmanager
def watching(
    modules: Sequence[nn.Module],
    wants: Callable[[], bool],
    see: Callable[[nn.Module, SeenAttention | None], None],
    ask: Callable[[nn.Module], MapsAsked | None] = lambda module: None,
) -> Iterator[None]:
    """Within the block `see` is told of every finished forward of these modules, with None where nothing was seen.

    A forward that is run again in a backward pass (gradient checkpointing) is not told of a second time.

    Args:
        modules: attention modules.
        wants: whether a forward that is about to begin is of interest.
        see: called after a module's forward.
        ask: which weights `see` is going to read of a module's forward that has begun, rows being those of its input: a
            backend that can give them from the same pass does (`SeenAttention.asked_for`).
    """
    frames = _OpenFrames()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_not_compiling()
        if is_recomputing() or not wants():
            return
        states = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        frames.enter(_Frame(module, states.shape[0] if isinstance(states, Tensor) else 0, ask))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if is_recomputing():
            return
        frame = frames.leave(module)
        if frame is not None and output is not None:  # None: the forward has failed
            see(module, frame.seen())

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(Hook(before), with_kwargs=True).remove)
            # Of several watchers the last to come in is the first to go.
            hook = module.register_forward_hook(Hook(after), with_kwargs=True, always_call=True, prepend=True)
            stack.callback(hook.remove)
        # Hooks are not called where a forward ends with an interrupt.
        stack.callback(frames.leave_all)
        yield


class _OpenFrames:
    """The forwards that are under way, by thread, outermost first."""

    def __init__(self) -> None:
        self._open: dict[int, list[_Frame]] = {}

    def enter(self, frame: _Frame) -> None:
        """A forward begins; one of the same module that is open was interrupted."""
        self.leave(frame.module)
        frame.enter()
        self._open.setdefault(threading.get_ident(), []).append(frame)

    def leave(self, module: nn.Module) -> _Frame | None:
        """A module's forward has ended, with all that began within it; None: none was open here."""
        mine = self._open.get(threading.get_ident(), [])
        first = next((number for number, frame in enumerate(mine) if frame.module is module), None)
        if first is None:
            return None
        found = mine[first]
        while len(mine) > first:
            mine.pop().leave()
        return found

    def leave_all(self) -> None:
        """Nothing runs any more in this thread."""
        mine = self._open.pop(threading.get_ident(), [])
        while mine:
            mine.pop().leave()


def is_recomputing() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


class _Frame(TorchFunctionMode):
    """Looks at one forward of one module."""

    def __init__(self, module: nn.Module, rows: int, ask: Callable[[nn.Module], MapsAsked | None]) -> None:
        super().__init__()
        self.module, self._rows, self._wanted = module, rows, ask
        self._stack = contextlib.ExitStack()
        self._asked: MapsAsked | None = None
        self._told: AttentionCall | None = None
        self._fused: dict[str, Any] | None = None
        self._num_fused = 0
        self._weights: list[Tensor] = []

    def enter(self) -> None:
        self._stack.enter_context(observing(self._tell, self._ask))
        self._stack.enter_context(self)

    def leave(self) -> None:
        self._stack.close()

    def seen(self) -> SeenAttention | None:
        if self._told is not None:
            return self._of_ours(self._told)
        if self._fused is not None:
            return self._of_fused(**self._fused)
        return self._of_weights()

    def _ask(self, request: Request, caller: Any) -> MapsAsked | None:
        """What is wanted of a call that is the first of this module, with rows of the call's batch."""
        batch = request.query.shape[0]
        if self._told is not None or caller is not self.module or batch == 0 or self._rows % batch:
            return None
        asked = self._wanted(self.module)
        self._asked = None if asked is None else asked.for_shared_keys(max(1, self._rows // batch))
        return self._asked

    def _tell(self, call: AttentionCall) -> None:
        # An IP-Adapter's attention to its picture comes after the text's.
        if self._told is None and call.caller is self.module:
            self._told = call
            if self._num_fused != 1:  # rows of different lengths one after the other
                self._fused = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._num_fused += 1
            if self._num_fused > 1:
                return func(*args, **kwargs)
            with _LogSumExp() as reader:
                output = func(*args, **kwargs)
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            self._fused = dict(zip(names, args, strict=False)) | kwargs | {"log_sum_exp": reader.found}
            return output
        output = func(*args, **kwargs)
        if func in _SOFTMAX and self._num_fused == 0 and isinstance(output, Tensor) and output.dim() in (3, 4):
            self._weights.append(output)
        return output

    def _of_ours(self, call: AttentionCall) -> SeenAttention:
        lse = None if self._fused is None else self._fused["log_sum_exp"]
        return seen_call(call, self._rows, lse, self._asked)

    def _of_fused(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        log_sum_exp: Tensor | None = None,
        **others: Any,
    ) -> SeenAttention | None:
        if query.dim() != 4:
            return None
        batch, heads, length, head_dim = query.shape
        mask = None if attn_mask is None else as_four_dim(attn_mask, batch, heads, length, key.shape[2])
        if is_causal:  # torch counts from the first query and key
            causal = causal_mask(length, key.shape[2], offset=0, device=query.device)[None, None]
            mask = _both(mask, causal)
        if log_sum_exp is not None and log_sum_exp.shape != query.shape[:3]:
            log_sum_exp = None
        factor: float = head_dim**-0.5 if scale is None else scale
        return SeenAttention(_rows_of(self._rows, batch), query, key, factor, mask, log_sum_exp)

    def _of_weights(self) -> SeenAttention | None:
        """The first that fit: [R, H, Lq, Lk], or [R * H, Lq, Lk] in any number of slices."""
        if not self._weights:
            return None
        if self._weights[0].dim() == 4:
            return SeenAttention(self._weights[0].shape[0], weights=self._weights[0])
        heads, parts, total = head_count(self.module) or 0, [], 0
        for part in self._weights:
            parts.append(part)
            total += part.shape[0]
            if total >= self._rows * heads:
                break
        if not heads or total != self._rows * heads:
            return None
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return SeenAttention(self._rows, weights=joined.unflatten(0, (self._rows, heads)))


def seen_call(
    call: AttentionCall, rows: int = 0, log_sum_exp: Tensor | None = None, asked: MapsAsked | None = None
) -> SeenAttention:
    """A call of mmattn's own attention, with its masks as one.

    Args:
        call: what an observer was told.
        rows: R of the module's input, of which several may share keys; 0: each has its own.
        log_sum_exp: what the fused kernel said, with any split of the heads.
        asked: what was asked for before the call.
    """
    query, key, maps, lse = call.query, call.key, call.maps, log_sum_exp
    if lse is None and maps is not None:  # whoever asked
        lse = maps.log_sum_exp
    if lse is not None:  # grouped heads may be folded into the queries
        lse = lse.reshape(query.shape[:3]) if lse.numel() == math.prod(query.shape[:3]) else None
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    if call.is_causal:
        causal = causal_mask(query.shape[2], key.shape[2], device=query.device)[None, None]
        mask = causal if mask is None else mask & causal
    mask = _both(call.attn_mask, mask)
    own = maps if maps is not None and maps.asked is asked else None
    return SeenAttention(_rows_of(rows, query.shape[0]), query, key, call.scale, mask, lse, maps=own)


def _rows_of(rows: int, batch: int) -> int:
    """Rows of a call: those of the module's input where they share the call's, else the call's own: a module may cut
    its input into windows."""
    return rows if rows and batch and rows % batch == 0 else batch


class _LogSumExp(TorchDispatchMode):
    """Reads the log-sum-exp that torch's fused kernels give beside their output."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "_scaled_dot_product" in func.__name__ and isinstance(result, tuple) and len(result) > 1:
            second = result[1]
            # Some kernels leave it empty while no gradients are wanted.
            if isinstance(second, Tensor) and second.is_floating_point() and second.dim() == 3 and second.numel():
                self.found = second
        return result


def _both(mask: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    """A mask of either kind and a boolean one."""
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    return mask & allowed if mask.dtype is torch.bool else mask.masked_fill(~allowed, float("-inf"))
