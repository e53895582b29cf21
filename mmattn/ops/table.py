"""The table of backends for this machine, and why a call gets the backend that it gets: for people to read."""

from __future__ import annotations

from dataclasses import dataclass

from mmattn._optional import package_version
from mmattn.ops.limits import MASKS, Backend, KnownBad, dtype_name
from mmattn.ops.request import Traits


@dataclass(frozen=True)
class BackendRow:
    """One backend on this machine.

    Attributes:
        name: what to write for `backend`.
        usable_on: device types where it works here.
        reasons: device type to the reason for which it does not work here.
        auto_on: device types where "auto" may choose it.
        auto_note: why "auto" does not choose it elsewhere.
        supports: what it can do, in words.
        versions: package to version, None when it is not installed.
        known_bad: combinations with wrong results that it avoids.
    """

    name: str
    usable_on: tuple[str, ...]
    reasons: dict[str, str]
    auto_on: tuple[str, ...]
    auto_note: str
    supports: str
    versions: dict[str, str | None]
    known_bad: tuple[KnownBad, ...]

    @property
    def is_usable(self) -> bool:
        """Does it work on any device of this machine?"""
        return bool(self.usable_on)

    def __str__(self) -> str:
        usable = f"usable on {', '.join(self.usable_on)}" if self.usable_on else "not usable here"
        auto = f"auto: {', '.join(self.auto_on) or 'never'}" + (f" ({self.auto_note})" if self.auto_note else "")
        versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in self.versions.items())
        lines = [f"{self.name}: {usable}; {auto}; {versions}", f"  {self.supports}"]
        lines += [f"  not on {device}: {reason}" for device, reason in self.reasons.items()]
        lines += [f"  known bad: {b.what}: {b.effect}; {b.action} [{b.reference}]" for b in self.known_bad]
        return "\n".join(lines)


class BackendTable(tuple[BackendRow, ...]):
    """The rows of `mmattn.backends()`, in the order in which "auto" tries them; prints as text."""

    def __getitem__(self, index: int | str) -> BackendRow:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A row by position or by the backend's name."""
        if isinstance(index, str):
            for row in self:
                if row.name == index:
                    return row
            raise KeyError(f"no attention backend {index!r}; there are: {', '.join(row.name for row in self)}")
        return super().__getitem__(index)

    def __contains__(self, row: object) -> bool:
        """Is there such a row, or a row of such a name? (That does not say that it can be used here.)"""
        return any(each.name == row for each in self) if isinstance(row, str) else super().__contains__(row)

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self)

    __repr__ = __str__


@dataclass(frozen=True)
class Explanation:
    """Why a call gets the backend that it gets; prints as text.

    Attributes:
        asked: the name in force, and where it came from ("argument", "use_backend" or "auto").
        source: where that name came from.
        chosen: the backend that serves the call, None when every one must refuse.
        reasons: backend name to its reasons against this call; empty when it could serve.
        traits: the features of the call that decided.
    """

    asked: str
    source: str
    chosen: str | None
    reasons: dict[str, list[str]]
    traits: Traits

    def __str__(self) -> str:
        lines = [f"{self.chosen or 'no backend'} serves this call ({self.source}: {self.asked})"]
        for name, reasons in self.reasons.items():
            if name == self.chosen:
                lines.append(f"  {name}: chosen")
            else:
                lines.append(f"  {name}: {'; '.join(reasons) or 'could serve, but comes later in the table'}")
        return "\n".join(lines)


def describe(backend: Backend) -> BackendRow:
    """A backend's row for this machine."""
    reasons = {device: backend.unusable(device) for device in backend.limits.dtypes}
    return BackendRow(
        name=backend.name,
        usable_on=tuple(device for device, reason in reasons.items() if reason is None),
        reasons={device: reason for device, reason in reasons.items() if reason is not None},
        auto_on=backend.auto_devices,
        auto_note=backend.auto_note,
        supports=_supports(backend),
        versions={name: package_version(name) for name in backend.packages},
        known_bad=backend.known_bad,
    )


def _supports(backend: Backend) -> str:
    limits = backend.limits
    dtypes = "; ".join(f"{device} {'/'.join(map(dtype_name, kinds))}" for device, kinds in limits.dtypes.items())
    features = {
        "grouped heads": limits.has_groups,
        "dropout": limits.has_dropout,
        "weights": limits.has_weights,
        "packed sequences": backend.run_packed is not None,
        "gradient of a float mask": limits.has_mask_grad,
        "forward-mode or second derivatives": limits.has_any_derivative,
    }
    can = [name for name, is_there in features.items() if is_there]
    cannot = [f"no {name}" for name, is_there in features.items() if not is_there]
    head_dim = f"head_dim {limits.min_head_dim} to {limits.max_head_dim or 'any'}"
    if limits.head_dim_step > 1:
        head_dim += f" in steps of {limits.head_dim_step}"
    if limits.max_keys is not None:
        head_dim += f", at most {limits.max_keys} keys"
    if limits.max_queries is not None:
        head_dim += f", at most {limits.max_queries} queries"
    backward = f"backward on {', '.join(limits.grad_devices)}" if limits.grad_devices else "no backward"
    if limits.masks:
        masks = "; ".join(f"{device} {', '.join(limits.masks.get(device, MASKS))}" for device in limits.dtypes)
    else:
        masks = ", ".join(MASKS)
    if not limits.has_causal_key_mask:
        masks += " (not causal and key in one)"
    return "; ".join((dtypes, head_dim, f"masks: {masks}", backward, ", ".join(can + cannot)))
