"""What a swap is made of: the attention layers of a model, and steps that can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from mmattn.errors import UsageError

JOINT = "joint"  # text and image in one softmax: neither self- nor cross-attention


class Step(Protocol):
    """One change to somebody else's object. `undo` after `do` leaves it as it was, by identity."""

    def do(self) -> None:
        """Make the change; an exception means that nothing was changed."""
        ...

    def undo(self, *, force: bool = False) -> str | None:
        """Take the change back. Returns None, or why it was left alone: somebody has changed the same thing since.
        `force` takes it back all the same."""
        ...

    def problem(self) -> str | None:
        """Why the change is no longer in place; None while it is."""
        ...


@dataclass(frozen=True)
class Options:
    """What the caller of `swap_attention` asked for; see there.

    Attributes:
        gate: the opened gate, None without one.
    """

    backend: str = "auto"
    role: str | None = None
    parts: frozenset[str] | None = None
    cache_context: bool = True
    drop_padding: bool = True
    gate: Any = None


class Cache(Protocol):
    """Something that keeps tensors between calls."""

    def clear(self) -> None:
        """Forget them."""
        ...

    @property
    def nbytes(self) -> int:
        """Their memory."""
        ...


@dataclass(eq=False)
class Layer:
    """One attention layer, as the report shows it.

    Attributes:
        part: the component of the pipeline, or "model".
        name: the module's path within its part.
        module: the attention module.
        role: "self", "cross" or "joint".
        old_class: class of the processor, or of the attention function, that was found.
        step: installs our attention; None where the layer is left alone.
        features: what the layer has that our attention keeps, in a word or two each.
        refused: why it is left alone; None when it is swapped.
        chosen: whether `parts` and `role` ask for it; a layer that nobody asked for is neither swapped nor refused.
        backend: the backend's name.
        probe: runs the layer's attention on fixed random inputs; `verify` calls it with the swap in place, in place
            with a reference, and undone. None where a layer cannot be run by itself.
    """

    part: str
    name: str
    module: nn.Module
    role: str
    old_class: str
    step: Step | None = None
    features: list[str] = field(default_factory=list)
    refused: str | None = None
    chosen: bool = True
    backend: str = "auto"
    probe: Callable[[], Tensor] | None = None

    @property
    def is_swapped(self) -> bool:
        """Whether a swap replaces its attention."""
        return self.step is not None and self.refused is None and self.chosen

    @property
    def full_name(self) -> str:
        """Part and path, as messages name it."""
        return f"{self.part}.{self.name}" if self.name else self.part


@dataclass(eq=False)
class Plan:
    """Everything that one swap would do, before any of it is done.

    Attributes:
        layers: every attention layer found.
        shared: steps that belong to no single layer (registries, process defaults); taken first, undone last.
        notes: lines for the report.
        probes: part to a function that runs its whole model on a probe made from its config, and returns its output.
        caches: what keeps projected contexts.
    """

    layers: list[Layer] = field(default_factory=list)
    shared: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probes: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)

    def extend(self, other: Plan) -> None:
        """Add another part's plan."""
        self.layers += other.layers
        self.shared += other.shared
        self.notes += [note for note in other.notes if note not in self.notes]
        self.probes |= other.probes
        self.caches += other.caches

    def steps(self) -> list[Step]:
        """In the order in which they are taken."""
        return [*self.shared, *(layer.step for layer in self.layers if layer.is_swapped and layer.step is not None)]


def take(steps: list[Step]) -> None:
    """Take all steps or none: when one fails, those before it are undone and its exception goes on."""
    done: list[Step] = []
    try:
        for step in steps:
            step.do()
            done.append(step)
    except BaseException:
        for step in reversed(done):
            step.undo(force=True)
        raise


@dataclass(eq=False)
class SetAttribute:
    """Sets an attribute in an object's own `__dict__`, and puts back what was there, absence included."""

    target: Any
    name: str
    value: Any
    _before: Any = None
    _was_there: bool = False

    def do(self) -> None:
        """Set it."""
        self._was_there = self.name in vars(self.target)
        self._before = vars(self.target).get(self.name)
        setattr(self.target, self.name, self.value)

    def undo(self, *, force: bool = False) -> str | None:
        """Put back the old value, or delete the attribute."""
        problem = self.problem()
        if problem is not None and not force:
            return problem
        if self._was_there:
            setattr(self.target, self.name, self._before)
        elif self.name in vars(self.target):
            delattr(self.target, self.name)
        return None

    def problem(self) -> str | None:
        """Whether somebody else has set it since."""
        if vars(self.target).get(self.name) is self.value:
            return None
        return f"{type(self.target).__name__}.{self.name} was set to something else since"


def head_count(module: nn.Module) -> int | None:
    """How many query heads an attention module of either library has, where it says so."""
    return _number(module, ("heads", "num_heads", "num_attention_heads"))


def head_dim(module: nn.Module) -> int | None:
    """The head size of such a module: as it says, or by the width of its queries."""
    size, heads = _number(module, ("head_dim", "dim_head", "dim_heads", "attention_head_dim")), head_count(module)
    if size is not None or not heads:
        return size
    width = _number(module, ("inner_dim",))
    for name, parts in (("to_q", 1), ("to_query", 1), ("to_qkv", 3), ("qkv", 3)):
        if width is None and (whole := _number(getattr(module, name, None), ("out_features",))) is not None:
            width = whole // parts
    return None if width is None else width // heads


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def check_role(role: str | None) -> None:
    """Raise `UsageError` for a role that cannot be swapped by itself."""
    if role not in (None, "self", "cross"):
        raise UsageError(f'swap_attention: role is {role!r}; use "self", "cross", or None for every layer')
