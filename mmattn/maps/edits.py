"""Prompt-to-prompt: which columns of a source prompt's attention maps an edited prompt takes (arXiv 2208.01626).

An edited map has a column for each token of the edited prompt, made of columns of the source's map: M' = M R, with R
[Lk, Lk] fixed by the two texts. The output is M R V, so that the source's queries and keys with the values R V give
it: on any fused backend, and no map is ever written out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Literal, get_args

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.maps.tokens import TextTokens

Kind = Literal["replace", "refine", "reweight"]


@dataclass(frozen=True)
class PromptEdit:
    """An edit of a picture by its prompt. The source prompt and the edited one are drawn together, from equal noise.

    Attributes:
        kind: "replace" swaps words one for one ("a red circle" to "a blue circle"), "refine" adds or drops words,
            "reweight" keeps the prompt and only scales words.
        cross_steps: share of the steps, from the first on, in which the edited picture takes the source's
            cross-attention maps.
        self_steps: likewise for self-attention, which keeps layout and shapes; 0: never.
        max_self_tokens: self-attention maps are taken in layers of at most so many places of the picture, 16 x 16 by
            default as the paper's authors do.
        weights: words of the edited prompt and what their columns are multiplied by in the edited maps. Unlike
            `steer_attention(weights=...)` the map is not normalised again, as in the paper; may be negative.

    Raises:
        UsageError: a value that cannot be.
    """

    kind: Kind = "replace"
    cross_steps: float = 0.8
    self_steps: float = 0.4
    max_self_tokens: int = 256
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"PromptEdit: kind is {self.kind!r}; choose one of {', '.join(get_args(Kind))}")
        for name in ("cross_steps", "self_steps"):
            check_share(getattr(self, name), f"PromptEdit: {name}")
        if isinstance(self.max_self_tokens, bool) or not isinstance(self.max_self_tokens, int):
            raise UsageError(f"PromptEdit: max_self_tokens is {self.max_self_tokens!r}; it must be a whole number")
        check_weights(self.weights, "PromptEdit")
        if self.kind == "reweight" and not self.weights:
            raise UsageError("PromptEdit: kind 'reweight' needs weights, such as {\"red\": 2}")


def check_share(share: object, what: str) -> float:
    """Raise `UsageError` for something that is no share of the steps."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise UsageError(f"{what} is {share!r}; it is a share of the steps, from 0 to 1")
    return float(share)


def check_weights(weights: object, what: str, *, least: float = -math.inf) -> dict[str, float]:
    """Words with their weights.

    Raises:
        UsageError: no mapping, an empty word, or a weight that is not finite or is below `least`.
    """
    if not isinstance(weights, Mapping):
        raise UsageError(f'{what}: weights is a {type(weights).__name__}; give words with numbers: {{"red": 1.6}}')
    for word, weight in weights.items():
        if not isinstance(word, str) or not word.strip():
            raise UsageError(f"{what}: weights has {word!r} for a word; give a word or phrase of the prompt")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or weight < least:
            bound = "" if least == -math.inf else f" of {least:g} or more"
            raise UsageError(f"{what}: the weight of {word!r} is {weight!r}; it must be a finite number{bound}")
    return {word: float(weight) for word, weight in weights.items()}


def phrase_positions(tokens: TextTokens, phrase: str, what: str) -> list[int]:
    """The positions of all tokens of a word or phrase, everywhere in a prompt.

    Raises:
        UsageError: it is not in the prompt; see `TextTokens.positions`.
    """
    try:
        return tokens.positions(phrase)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error


@dataclass(frozen=True, eq=False)
class Columns:
    """How an edited prompt's map is made, for texts of Lk tokens.

    Attributes:
        taken: R [Lk, Lk]: the weight of source column i in edited column j.
        own: [Lk]: the weight of the edited prompt's own map in column j; None where it has no part.
    """

    taken: Tensor
    own: Tensor | None


def edit_columns(edit: PromptEdit, source: TextTokens, edited: TextTokens, length: int) -> Columns | None:
    """The columns of an edit; None when it changes nothing: equal prompts and no weight other than 1.

    Args:
        edit: what is wanted.
        source: the source prompt.
        edited: the edited prompt.
        length: Lk, padding included.

    Raises:
        UsageError: words that cannot be matched, or a weighted word that is not in the edited prompt.
    """
    taken, own = torch.zeros(length, length), torch.zeros(length)
    for sources, targets in _matches(edit.kind, source, edited):
        _connect(taken, sources, targets)
    _connect_ends(taken, source, edited, is_replaced=edit.kind != "refine")
    if edit.kind == "refine":
        own += taken.sum(0) == 0
    scale = torch.ones(length)
    for word, weight in edit.weights.items():
        scale[phrase_positions(edited, word, "PromptEdit: weights")] = weight
    if source.ids == edited.ids and bool((scale == 1).all()):
        return None
    return Columns(taken * scale, own * scale if bool(own.any()) else None)


def _matches(kind: Kind, source: TextTokens, edited: TextTokens) -> list[tuple[list[int], list[int]]]:
    """Pairs of tokens of a source word and tokens of the edited word that takes its columns."""
    before, after = source.words(), edited.words()
    texts = [[word for word, _ in words] for words in (before, after)]
    if kind == "refine":
        blocks = SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks()
        pairs = [(block.a + step, block.b + step) for block in blocks for step in range(block.size)]
        if not pairs:
            raise UsageError(
                f"PromptEdit: {source.text!r} and {edited.text!r} have no word in common, so that 'refine' has "
                "nothing to keep; to swap words one for one, use 'replace'"
            )
        return [(before[a][1], after[b][1]) for a, b in pairs]
    if kind == "reweight" and texts[0] != texts[1]:
        raise UsageError(
            f"PromptEdit: 'reweight' is for two equal prompts, not {source.text!r} and {edited.text!r}; use "
            "'replace' or 'refine', which take weights too"
        )
    if len(before) != len(after):
        raise UsageError(
            f"PromptEdit: 'replace' swaps words one for one, but {source.text!r} has {len(before)} words and "
            f"{edited.text!r} has {len(after)}; use 'refine' to add or drop words"
        )
    return [(one[1], other[1]) for one, other in zip(before, after, strict=True)]


def _connect(taken: Tensor, sources: list[int], targets: list[int]) -> None:
    """Token for token where their numbers agree; else each source token is shared out among all targets."""
    if len(sources) == len(targets):
        taken[sources, targets] = 1.0
        return
    for token in sources:
        taken[token, targets] = 1.0 / len(targets)


def _connect_ends(taken: Tensor, source: TextTokens, edited: TextTokens, *, is_replaced: bool) -> None:
    """Special tokens before and behind the words, and padding, in their order."""
    (begin, end), (new_begin, new_end) = inside(source), inside(edited)
    _connect_in_order(taken, range(begin), range(new_begin))
    _connect_in_order(taken, range(end, len(source)), range(new_end, len(edited)))
    length = taken.shape[0]
    padding, new_padding = range(len(source), length), range(len(edited), length)
    _connect_in_order(taken, padding, new_padding)
    if is_replaced:  # what is left over must go somewhere, so that the map's rows still sum to 1
        for token in padding[len(new_padding) :]:
            taken[token, length - 1] = 1.0


def inside(tokens: TextTokens) -> tuple[int, int]:
    """The first token of the text itself, and the one after its last: what is outside is special."""
    places = [place for place, piece in enumerate(tokens.pieces) if piece.strip()]
    return (places[0], places[-1] + 1) if places else (len(tokens), len(tokens))


def _connect_in_order(taken: Tensor, sources: range, targets: range) -> None:
    for token, target in zip(sources, targets, strict=False):
        taken[token, target] = 1.0
