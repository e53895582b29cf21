"""When a text ends, and how finished texts leave a running decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmattn.inference.decode.state import DecoderState


def ends(tokens: torch.Tensor, eos_ids: Sequence[int]) -> torch.Tensor:
    """True where a token is one that ends a text; same shape as `tokens`."""
    if len(eos_ids) == 1:
        return tokens == eos_ids[0]
    return torch.isin(tokens, torch.tensor(eos_ids, device=tokens.device, dtype=tokens.dtype))


def cut(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens up to and with the first that ends a text."""
    for place, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: place + 1]
    return tokens


@dataclass(frozen=True)
class Kept:
    """What stays when finished texts leave: contexts, and slots (one a text), both counted before the change."""

    contexts: list[int]
    slots: list[int]


class Roster:
    """Which text each slot of a running decoder works on.

    Slots lie context by context, equally many for each. A context whose texts are all finished leaves with its slots.
    Of the others each keeps as many slots as the busiest needs, so that the batch stays rectangular; a finished
    text that stays for that reason is decoded on, unread.
    """

    def __init__(self, num_texts: int, per_context: int) -> None:
        self.texts = list(range(num_texts))
        self.per_context = per_context

    def retire(self, is_done: Sequence[bool]) -> Kept | None:
        """Drop finished texts, given a flag for each slot; None when the slots stay as they are."""
        contexts: list[int] = []
        orders: list[list[int]] = []
        width = 0
        for context in range(len(self.texts) // self.per_context):
            slots = range(context * self.per_context, (context + 1) * self.per_context)
            live = [slot for slot in slots if not is_done[slot]]
            if live:
                contexts.append(context)
                orders.append(live + [slot for slot in slots if is_done[slot]])
                width = max(width, len(live))
        if len(orders) * width == len(self.texts):
            return None
        kept = [slot for order in orders for slot in order[:width]]
        self.texts = [self.texts[slot] for slot in kept]
        self.per_context = width
        return Kept(contexts, kept)


def shrink(state: DecoderState, rows: torch.Tensor, contexts: Sequence[int], num_contexts: int, num_rows: int) -> None:
    """Leave only some contexts in a decoder of `num_contexts` contexts and `num_rows` rows, and of them these `rows`.

    `rows` are counted before the change; those of one context lie together, in the order of `contexts`.
    """
    if len(contexts) < num_contexts:
        state.select_contexts(rows.new_tensor(contexts))
        per_context = num_rows // num_contexts
        place = rows.new_zeros(num_contexts)
        place[rows.new_tensor(contexts)] = torch.arange(len(contexts), device=rows.device)
        rows = place[rows // per_context] * per_context + rows % per_context
    state.reorder(rows)
