"""What the caller of `record_attention` asked for, checked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mmattn.errors import UsageError
from mmattn.maps.layers import Layers, Numbers, Role, as_layers, as_numbers

View = Literal["head", "step"]
Guidance = Literal["conditional", "unconditional", "both"]
Tokens = str | int | Sequence[str | int] | None
Prompts = str | Sequence[str] | None


@dataclass(frozen=True)
class Wanted:
    """See `record_attention` for the fields."""

    role: Role = "cross"
    layers: Layers = None
    heads: list[int] | None = None
    steps: list[int] | None = None
    tokens: list[str | int] | None = None
    views: frozenset[View] = frozenset()
    guidance: Guidance = "conditional"
    prompts: list[str] | None = None
    tokenizer: Any = None

    @classmethod
    def checked(
        cls,
        role: Role,
        layers: Layers,
        heads: Numbers,
        steps: Numbers,
        tokens: Tokens,
        views: Collection[View],
        guidance: Guidance,
        prompts: Prompts,
        tokenizer: Any,
    ) -> Wanted:
        """The arguments of `record_attention`.

        Raises:
            UsageError: one that cannot be.
        """
        for name, value, known in (("role", role, Role), ("guidance", guidance, Guidance)):
            if value not in get_args(known):
                choices = " or ".join(map(repr, get_args(known)))
                raise UsageError(f"record_attention: {name} is {value!r}; it must be {choices}")
        if prompts is not None and not prompts:
            raise UsageError("record_attention: prompts is empty; leave it out, or give the texts that are drawn")
        views = (views,) if isinstance(views, str) else views  # pyright: ignore[reportAssignmentType]
        unknown = set(views) - set(get_args(View))
        if unknown:
            raise UsageError(f"record_attention: views has {sorted(unknown)[0]!r}; there are 'head' and 'step'")
        numbers = {"heads": as_numbers(heads), "steps": as_numbers(steps)}
        for name, chosen in numbers.items():
            if chosen is not None and (not chosen or not all(map(_is_number, chosen))):
                raise UsageError(f"record_attention: {name} is {chosen}; give numbers of 0 or more")
        _check_layers(layers)
        listed = [tokens] if isinstance(tokens, str | int) else None if tokens is None else list(tokens)
        _check_tokens(listed, role)
        texts = [prompts] if isinstance(prompts, str) else None if prompts is None else list(prompts)
        return cls(
            role, layers, numbers["heads"], numbers["steps"], listed, frozenset(views), guidance, texts, tokenizer
        )

    def refuse_for(self, kind: str, names: Collection[str]) -> None:
        """Raise `UsageError` for an argument that means nothing for this kind of target."""
        for name in names:
            if getattr(self, name):
                raise UsageError(f"record_attention: {name} means nothing for a {kind}; leave it out")

    def numbered_layers(self, count: int) -> list[int]:
        """Numbers of the layers that are wanted among so many that have no names.

        Raises:
            UsageError: one that is not there.
        """
        if not count:
            raise UsageError(
                f"record_attention: no {self.role}-attention was seen: the model has none, or it is compiled "
                "(torch.compile), where nothing can be seen"
            )
        if self.layers is None:
            return list(range(count))
        wanted = as_layers(self.layers)
        for layer in wanted:
            if not isinstance(layer, int):
                raise UsageError(f"record_attention: layers has {layer!r}; these layers go by number, 0 to {count - 1}")
            if layer >= count:
                raise UsageError(
                    f"record_attention: layers has {layer}, and there are {count} with {self.role}-attention, 0 to "
                    f"{count - 1}"
                )
        return [number for number in range(count) if number in wanted]


def _is_number(one: object) -> bool:
    return isinstance(one, int) and not isinstance(one, bool) and one >= 0


def _check_layers(layers: Layers) -> None:
    for layer in [] if layers is None else as_layers(layers) or [""]:
        if not _is_number(layer) and not (isinstance(layer, str) and layer.strip()):
            raise UsageError(
                f"record_attention: layers is {layers!r}; give numbers of 0 or more, or parts of the layers' names"
            )


def _check_tokens(tokens: list[str | int] | None, role: Role) -> None:
    if tokens is None:
        return
    if not tokens or role == "self":
        why = "is empty" if not tokens else "is about cross-attention, and role is 'self'"
        raise UsageError(f"record_attention: tokens {why}")
    for token in tokens:
        if not _is_number(token) and not (isinstance(token, str) and token.strip()):
            raise UsageError(f"record_attention: tokens has {token!r}; give words, or positions of 0 or more")
