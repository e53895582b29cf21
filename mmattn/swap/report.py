"""What a swap did, layer by layer: for people to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mmattn.swap.layers import Layer


@dataclass(frozen=True, eq=False)
class SwapReport:
    """Every attention layer of a target; prints as text.

    Attributes:
        target: class of the pipeline or model.
        layers: all layers found.
        notes: lines on the whole: untested versions, what is cached.
        versions: package to version.
    """

    target: str
    layers: list[Layer]
    notes: list[str]
    versions: dict[str, str]

    @property
    def swapped(self) -> list[Layer]:
        """The layers that compute our attention."""
        return [layer for layer in self.layers if layer.is_swapped]

    @property
    def refused(self) -> list[Layer]:
        """The layers that were asked for and left alone; `Layer.refused` says why."""
        return [layer for layer in self.layers if layer.refused is not None and layer.chosen]

    def summary(self) -> str:
        """One line."""
        asked = [layer for layer in self.layers if layer.chosen]
        line = (
            f"{self.target}: {len(self.swapped)} of {len(asked)} attention layers swapped, {len(self.refused)} refused"
        )
        others = len(self.layers) - len(asked)
        return line + (f", {others} not asked for" if others else "")

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [self.summary(), f"versions: {versions}"]
        by_kind = Counter((layer.part, layer.role, layer.old_class, layer.backend) for layer in self.swapped)
        lines += [
            f"  {part}: {count} {role}, was {old}, now {backend}"
            for (part, role, old, backend), count in by_kind.items()
        ]
        by_reason = Counter((layer.part, layer.refused) for layer in self.refused)
        lines += [f"  {part}: {count} refused: {reason}" for (part, reason), count in by_reason.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("layers:")
        for layer in self.layers:
            if layer.refused is not None and layer.chosen:
                state = f"refused: {layer.refused}"
            elif layer.is_swapped:
                kept = f"; keeps {', '.join(layer.features)}" if layer.features else ""
                state = f"was {layer.old_class}, now {layer.backend}{kept}"
            else:
                state = f"{layer.old_class}, not asked for"
            lines.append(f"  {layer.full_name} [{layer.role}]: {state}")
        return "\n".join(lines)
