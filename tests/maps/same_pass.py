"""A backend that gives maps from its own pass, wherever there is no card: the eager one, with the weights it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor

from mmattn.ops.backends import eager
from mmattn.ops.request import Request
from mmattn.ops.same_pass import MapsAsked, SamePassMaps


@dataclass
class Stand:
    """Attributes: what was asked of each call, and how often maps were computed again."""

    asked: list[MapsAsked] = field(default_factory=list)
    computed_again: int = 0


@contextlib.contextmanager
def giving_maps() -> Iterator[Stand]:
    """Within the block every call of `mmattn.attention` is served by that backend."""
    from mmattn.maps.weights import kept_weights

    stand = Stand()

    def run_with_maps(request: Request, asked: MapsAsked) -> tuple[Tensor, SamePassMaps]:
        stand.asked.append(asked)
        return with_maps(request, asked)

    def again(*args, **kwargs):
        stand.computed_again += 1
        return kept_weights(*args, **kwargs)

    backend = replace(eager.BACKEND, run_with_maps=run_with_maps)
    with (
        mock.patch("mmattn.ops.attention.choose", return_value=backend),
        mock.patch("mmattn.maps.capture.kept_weights", again),
    ):
        yield stand


def with_maps(request: Request, asked: MapsAsked) -> tuple[Tensor, SamePassMaps]:
    """As a backend's `run_with_maps`."""
    output, weights = eager.run(replace(request, return_weights=True))
    assert weights is not None
    keys, first_row = asked.table(request)
    weights = weights.detach().float()[first_row : first_row + len(keys)]
    weights = weights if asked.heads is None else weights[:, list(asked.heads)]
    is_there = (keys >= 0) & (keys < weights.shape[3])
    index = keys.long().clamp(0, weights.shape[3] - 1)[:, None, None].expand(*weights.shape[:3], -1)
    kept = weights.gather(3, index) * is_there[:, None, None]
    kept = kept.mean(1, keepdim=True) if asked.average else kept
    group = request.query.shape[1] // request.key.shape[1]
    scores = request.scale * request.query @ request.key.repeat_interleave(group, dim=1).mT
    if request.key_mask is not None:
        scores = scores.masked_fill(~request.key_mask[:, None, None], float("-inf"))
    return output, SamePassMaps(asked, kept, torch.logsumexp(scores.detach().float(), dim=-1))
