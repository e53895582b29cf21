"""A row of the training benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Row:
    """One ratio or figure: `value` should be at least `goal`, or at most where `is_bound`; None is printed only."""

    name: str
    value: float
    goal: float | None
    peer: float
    ours: float
    unit: str
    spread: float = 0.0
    is_bound: bool = False
    note: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the goal is reached."""
        if self.goal is None:
            return True
        return self.value <= self.goal if self.is_bound else self.value >= self.goal

    def show(self) -> None:
        """Print the row."""
        wanted = "" if self.goal is None else f"{'at most' if self.is_bound else 'at least'} {self.goal:g}"
        verdict = "" if self.goal is None else ("ok" if self.is_ok else "short")
        print(
            f"{self.name:58} stock {self.peer:9.4g} ours {self.ours:9.4g} {self.unit:12} {self.value:7.3f} {wanted:13} "
            f"{verdict:5} ±{self.spread:.0%} {self.note}",
            flush=True,
        )
