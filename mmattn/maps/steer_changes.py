"""What steering does to one attention call: scores that are biased, maps that are taken from another row.

B rows of the text, H heads, G key/value heads, L places of the picture, n pictures a row (folded into the queries of
cross-attention, B * n rows in self-attention), Lk tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.maps.edits import Columns, PromptEdit, edit_columns, inside, phrase_positions
from mmattn.maps.layers import grid_of
from mmattn.maps.steer_regions import Region
from mmattn.maps.tokens import TextTokens
from mmattn.ops.observe import unobserved
from mmattn.ops.request import Request

Run = Callable[[Request], Tensor]


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """Weighted words and regions, as numbers that are added to the scores: softmax(S + log w) is the softmax of S with
    each weight multiplied by w and the row normalised again.

    Attributes:
        words: `[B, Lk]`, the logarithm of each token's weight.
        regions: each with the tokens that it is about, boolean `[B, Lk]`.
    """

    words: Tensor
    regions: Sequence[tuple[Region, Tensor]]
    _made: dict[tuple[int, int, int, tuple[int, int]], Tensor] = field(default_factory=dict)

    def apply(self, request: Request, run: Run, *, size: tuple[int, int], pictures: int, where: str) -> Tensor:
        """The biased attention.

        Args:
            request: cross-attention.
            run: computes one.
            size: height and width of the latents.
            pictures: n.
            where: the layer, for messages.
        """
        sizes = request.query.shape[2] // pictures, request.key.shape[2], pictures
        bias = self._made.get((*sizes, size))
        if bias is None:
            bias = self._made[*sizes, size] = self._bias(*sizes, size, where)
        return run(replace(request, attn_mask=_added(request.attn_mask, bias)))

    def _bias(self, num_queries: int, num_keys: int, pictures: int, size: tuple[int, int], where: str) -> Tensor:
        """`[B, 1, 1 or n * L, Lk]`."""
        bias = self.words[:, None, None, :num_keys]
        if not self.regions:
            return bias
        grid = grid_of(size, num_queries, where=f"steer_attention: {where}")
        for region, tokens in self.regions:
            share = region.coverage(*grid).flatten().log().to(bias)[:, None]
            bias = bias + torch.where(tokens[:, None, None, :num_keys], share, 0.0)
        return bias.repeat(1, 1, pictures, 1)


def _added(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else mask + bias


def score_bias(
    prompts: Sequence[TextTokens | None],
    length: int,
    weights: dict[str, float],
    regions: Sequence[Region],
    end_weight: float,
    like: Tensor,
) -> ScoreBias | None:
    """The bias of a text's rows; None when it changes nothing.

    Args:
        prompts: of each row; None for a row that is not steered.
        length: Lk.
        weights: words with their weights.
        regions: phrases with where they may be.
        end_weight: of the end token and padding where a region limits a phrase.
        like: the text.

    Raises:
        UsageError: a word that is not in a steered prompt, or a prompt of which nothing is left outside the regions.
    """
    regions = [region for region in regions if not region.is_everything]
    words = torch.zeros(len(prompts), length, dtype=torch.float64)
    tokens = torch.zeros(len(regions), len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if prompt is None:
            continue
        for word, weight in weights.items():
            positions = phrase_positions(prompt, word, "steer_attention: weights")
            words[row, positions] += torch.tensor(weight, dtype=torch.float64).log()
        for number, region in enumerate(regions):
            tokens[number, row, phrase_positions(prompt, region.phrase, "steer_attention: regions")] = True
        if regions:
            end = inside(prompt)[1]
            _check_rest(prompt, ~tokens[:, row, :end].any(0) & words[row, :end].isfinite(), end_weight)
            words[row, end:] += torch.tensor(end_weight, dtype=torch.float64).log()
    if not regions and not bool(words.any()):
        return None
    limited = [(region, tokens[number].to(like.device)) for number, region in enumerate(regions)]
    return ScoreBias(words.to(like.device, torch.promote_types(like.dtype, torch.float32)), limited)


def _check_rest(prompt: TextTokens, is_everywhere: Tensor, end_weight: float) -> None:
    """Raise `UsageError` where places outside the regions would have nothing to attend to."""
    if end_weight == 0 and not bool(is_everywhere.any()):
        raise UsageError(
            f"steer_attention: regions: all of {prompt.text!r} is limited to regions, so that other places would "
            "attend to nothing; add words, or give an end_weight above 0"
        )


@dataclass(frozen=True, eq=False)
class MapExchange:
    """Rows that take the maps of other rows: prompt-to-prompt.

    Attributes:
        rows: int64 `[B]`, for each row the one whose queries and keys it takes; itself where it is not edited.
        edited: the edited rows, E of them.
        taken: R of each edited row, float32 `[E, Lk, Lk]`; see `edits`.
        own: weight of the row's own map, float32 `[E, Lk]`; None where no row keeps columns of its own.
    """

    rows: Tensor
    edited: Tensor
    taken: Tensor
    own: Tensor | None

    def cross(self, request: Request, run: Run) -> Tensor:
        """Cross-attention with the source's maps."""
        num_keys = request.key.shape[2]
        taken = self.taken[:, None, :num_keys, :num_keys].to(request.value.dtype)
        values = request.value.index_select(0, self.edited)
        output = run(replace(_with_rows(request, self.rows), value=_placed(request.value, self.edited, taken @ values)))
        if self.own is None:
            return output
        own = _with_rows(request, self.edited)
        weight = self.own[:, None, :num_keys, None].to(values.dtype)
        with unobserved():  # a part of the same call
            added = run(replace(own, value=values * weight))
        return output.index_add(0, self.edited, added)

    def own_maps(self, request: Request, run: Run, *, pictures: int) -> Tensor:
        """Self-attention with the source's maps over each row's own values."""
        numbers = torch.arange(pictures, device=self.rows.device)
        rows = (self.rows[:, None] * pictures + numbers).flatten()
        return run(_with_rows(request, rows))

    def check_noise(self, sample: Tensor) -> None:
        """Raise `UsageError` when an edited picture starts from other noise than its source; sample `[B * n, ...]`."""
        pairs = sample.unflatten(0, (len(self.rows), -1))
        if not torch.equal(pairs, pairs.index_select(0, self.rows)):
            raise UsageError(
                "steer_attention: the source picture and the edited one start from different noise, so that no map of "
                "one fits the other; give both the same seed: generator=[torch.Generator().manual_seed(7) for _ in "
                "range(2)], or TextToImage.generate(seed=7)"
            )


def _with_rows(request: Request, rows: Tensor) -> Request:
    """The queries, keys and masks of other rows; the values stay where the rows are as many."""
    mask, key_mask = request.attn_mask, request.key_mask
    return replace(
        request,
        query=request.query.index_select(0, rows),
        key=request.key.index_select(0, rows),
        attn_mask=mask if mask is None or mask.shape[0] == 1 else mask.index_select(0, rows),
        key_mask=None if key_mask is None else key_mask.index_select(0, rows),
    )


def _placed(values: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return values.index_copy(0, rows, new.to(values.dtype))


def map_exchange(
    prompts: Sequence[TextTokens | None], length: int, edit: PromptEdit, device: torch.device
) -> MapExchange | None:
    """The exchange between a text's rows; None when it changes nothing.

    Args:
        prompts: of each row; None for a row that is not steered.
        length: Lk.
        edit: what is wanted.
        device: of the text.

    Raises:
        UsageError: rows that are no pairs, or prompts that cannot be matched.
    """
    steered = [(row, prompt) for row, prompt in enumerate(prompts) if prompt is not None]
    pairs: list[tuple[int, int, Columns]] = []
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Columns | None] = {}
    for (source_row, source), (edited_row, edited) in _pairs(steered, edit):
        texts = source.ids, edited.ids
        if texts not in known:
            known[texts] = edit_columns(edit, source, edited, length)
        columns = known[texts]
        if columns is not None:
            pairs.append((source_row, edited_row, columns))
    if not pairs:
        return None
    rows = torch.arange(len(prompts))
    for source_row, edited_row, _ in pairs:
        rows[edited_row] = source_row
    taken = torch.stack([columns.taken for _, _, columns in pairs])
    none = torch.zeros(length)
    own = [none if columns.own is None else columns.own for _, _, columns in pairs]
    has_own = any(columns.own is not None for _, _, columns in pairs)
    edited_rows = torch.tensor([edited_row for _, edited_row, _ in pairs])
    return MapExchange(
        rows.to(device), edited_rows.to(device), taken.to(device), torch.stack(own).to(device) if has_own else None
    )


_Row = tuple[int, TextTokens]


def _pairs(steered: Sequence[_Row], edit: PromptEdit) -> list[tuple[_Row, _Row]]:
    """Source and edited rows: runs of equal prompts by turns, or halves of a run where both prompts are equal."""
    runs: list[list[_Row]] = []
    for row in steered:
        if runs and runs[-1][0][1].text == row[1].text:
            runs[-1].append(row)
        else:
            runs.append([row])
    by_turns = list(zip(runs[::2], runs[1::2], strict=False))
    if len(runs) % 2 == 0 and all(len(one) == len(other) for one, other in by_turns) and edit.kind != "reweight":
        return [pair for one, other in by_turns for pair in zip(one, other, strict=True)]
    halves = [(run[: len(run) // 2], run[len(run) // 2 :]) for run in runs]
    if all(len(one) == len(other) for one, other in halves):
        return [pair for one, other in halves for pair in zip(one, other, strict=True)]
    raise UsageError(
        f"steer_attention: an edit takes prompts in pairs, [source, edited], drawn in one batch; here are "
        f"{len(steered)}: {', '.join(repr(run[0][1].text) for run in runs[:3])}"
    )
