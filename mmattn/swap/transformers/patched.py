"""Attention classes that go through no interface: their forward, with our attention in its middle.

Projections, caches, masks and dropout are stock's, in stock's order. A class whose forward takes other arguments than
the one rewritten here is not patched.

Shapes: B batch, L queries, Lk keys, C channels, H heads, D head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import __version__
from transformers.cache_utils import EncoderDecoderCache

from mmattn.swap.transformers.interface import compute, split_mask
from mmattn.swap.transformers.settings import Settings, attached
from mmattn.swap.transformers.weights import are_weights_recorded

_FORWARD, _HOOKED = "forward", "_old_forward"  # accelerate's hooks call the second, which they keep the first in
_ABSENT = "absent"  # equal, not identical, in a copy


def blip_text(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    cache: Any = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`BlipTextSelfAttention.forward`: self-attention, or cross-attention to [B, Lk, C]. As in stock, whose callers do
    not hand it `encoder_attention_mask`, cross-attention is masked by nothing else."""
    head_dim, is_cross = module.attention_head_size, encoder_hidden_states is not None
    query = _heads(module.query(hidden_states), head_dim)
    key, value = _keys_values(
        module, module.key, module.value, hidden_states, encoder_hidden_states, head_dim, cache, keywords
    )
    output, weights = _attend(
        module,
        query,
        key,
        value,
        encoder_attention_mask if is_cross else attention_mask,
        dropout_p=module.dropout.p,
        with_weights=are_weights_recorded(),
    )
    return output, weights


def blip_vision(module: Any, hidden_states: Tensor, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    """`BlipAttention.forward`: self-attention over [B, L, C], query, key and value from one projection."""
    query, key, value = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    output, weights = _attend(
        module,
        query,
        key,
        value,
        None,
        scale=module.scale,
        dropout_p=module.dropout.p,
        with_weights=are_weights_recorded(),
    )
    return module.projection(output), weights


def trocr(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """`TrOCRAttention.forward`: self-attention, or cross-attention to [B, Lk, C]."""
    query = _heads(module.q_proj(hidden_states) * module.scaling, module.head_dim)
    key, value = _keys_values(
        module, module.k_proj, module.v_proj, hidden_states, key_value_states, module.head_dim, cache, keywords
    )
    output, weights = _attend(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=1.0,
        dropout_p=module.dropout,
        with_weights=bool(output_attentions),
    )
    return module.out_proj(output), weights


def _heads(states: Tensor, head_dim: int) -> Tensor:
    """[B, L, H x D] to [B, H, L, D]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _keys_values(
    module: Any,
    project_key: nn.Module,
    project_value: nn.Module,
    states: Tensor,
    context: Tensor | None,
    head_dim: int,
    cache: Any,
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, Lk, D] of the context, or of the states themselves, through transformers' caches: those
    of the context are projected once, and read after that."""
    is_cross, part = context is not None, cache
    if isinstance(cache, EncoderDecoderCache):
        part = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if is_cross and cache.is_updated.get(module.layer_idx):
            return part.layers[module.layer_idx].keys, part.layers[module.layer_idx].values
    source = states if context is None else context
    key, value = _heads(project_key(source), head_dim), _heads(project_value(source), head_dim)
    if part is not None:
        key, value = part.update(key, value, module.layer_idx, kwargs=keywords)
        if is_cross and isinstance(cache, EncoderDecoderCache):
            cache.is_updated[module.layer_idx] = True
    return key, value


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float,
    with_weights: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over [B, H, L, D], joined to [B, L, H x D], and the weights if wanted."""
    attn_mask, key_mask = split_mask(mask, key)
    output, weights = compute(
        module,
        query,
        key,
        value,
        attn_mask=attn_mask,
        key_mask=key_mask,
        scale=scale,
        dropout_p=dropout_p if module.training else 0.0,
        with_weights=with_weights,
    )
    return output.transpose(1, 2).flatten(2), weights


FORWARDS: dict[tuple[str, str], Callable[..., Any]] = {
    ("transformers.models.blip.modeling_blip_text", "BlipTextSelfAttention"): blip_text,
    ("transformers.models.blip.modeling_blip", "BlipAttention"): blip_vision,
    ("transformers.models.trocr.modeling_trocr", "TrOCRAttention"): trocr,
}


def forward_for(module: nn.Module) -> Callable[..., Any] | None:
    """Our forward for a module's class, exactly; None for any other class."""
    return FORWARDS.get((type(module).__module__, type(module).__name__))


def refusal(module: nn.Module) -> str | None:
    """Why a module with a forward of ours must be left alone, or None."""
    ours, cls = forward_for(module), type(module)
    assert ours is not None
    stock = inspect.signature(inspect.unwrap(cls.forward)).parameters
    if list(stock)[1:-1] != list(inspect.signature(ours).parameters)[1:-1]:
        return f"{cls.__name__}: its forward is not the one of transformers 5.24 (found {__version__})"
    own = vars(module).get(_slot(module))
    if own is not None and attached(module) is None and _slot(module) == _FORWARD:
        return f"{cls.__name__}: somebody has replaced its forward by {type(own).__name__}"
    return None


class Forward:
    """A module's forward, replaced for this instance alone. An object, and not a closure, so that a copy of the module
    gets one that belongs to the copy."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.module = module
        self.function = function

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Run it."""
        return self.function(self.module, *args, **keywords)


@dataclass(eq=False)
class PatchForward:
    """Gives one module our forward, under accelerate's hooks if it has any."""

    module: nn.Module
    settings: Settings
    forward: Forward

    def do(self) -> None:
        """Replace."""
        vars(self.module)[_slot(self.module)] = self.forward
        self.settings.attach(self.module)

    def undo(self, *, force: bool = False) -> str | None:
        """Put back what was there, absence included."""
        problem = self.problem()
        if problem is not None and not force:
            return problem
        if self.settings.stock == _ABSENT:
            vars(self.module).pop(_slot(self.module), None)
        else:
            vars(self.module)[_slot(self.module)] = self.settings.stock
        self.settings.detach(self.module)
        return None

    def problem(self) -> str | None:
        """Whether another forward is in its place."""
        if vars(self.module).get(_slot(self.module)) is self.forward and attached(self.module) is self.settings:
            return None
        return f"{type(self.module).__name__}.forward was replaced by something else since"


def patch(module: nn.Module, settings: Settings) -> PatchForward:
    """The step that gives a module our forward."""
    function, earlier = forward_for(module), attached(module)
    assert function is not None
    settings.stock = vars(module).get(_slot(module), _ABSENT) if earlier is None else earlier.stock
    return PatchForward(module, settings, Forward(module, function))


def _slot(module: nn.Module) -> str:
    """The attribute that is called when the module is."""
    return _HOOKED if _HOOKED in vars(module) else _FORWARD
