"""`mmattn.swap_attention`: our attention in models that people already run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from mmattn._optional import package_version
from mmattn.errors import BackendError, UsageError
from mmattn.ops.registry import backends, check_name, explain
from mmattn.swap.layers import Layer, Options, Plan, check_role, head_dim
from mmattn.swap.parts import is_diffusers, is_transformers, parts_of
from mmattn.swap.report import SwapReport
from mmattn.swap.swapped import Swap

TESTED = {"diffusers": "0.42", "transformers": "5.24"}  # what the tests run on
OLDEST = {"diffusers": "0.42", "transformers": "5.17"}


def swap_attention(
    pipe_or_model: Any,
    backend: str = "auto",
    role: str | None = None,
    parts: Collection[str] | None = None,
    cache_context: bool = True,
    drop_padding: bool = True,
    strict: bool = False,
    gate: int | None = None,
) -> Swap:
    """Replace the attention of a diffusers pipeline, a diffusers model or a transformers model by `mmattn.attention`.

    Outputs stay the same within rounding. LoRA, IP-Adapter, ControlNet, offloading, quantised layers, gradient
    checkpointing and `torch.compile` keep working, and diffusers' own `set_attention_backend` starts to work on U-Nets.
    Layers that mmattn does not know are left alone, and named in the report. All or nothing: after an exception
    everything is as it was.

    Args:
        pipe_or_model: changed in place.
        backend: a name of `mmattn.backends()`; "auto" chooses call by call, and follows `mmattn.use_backend`.
        role: "cross" or "self" swaps only those layers.
        parts: names of the pipeline's components ("unet", "vae", "text_encoder", ...; "motion_modules" are the temporal
            layers of AnimateDiff). By default all its diffusers models.
        cache_context: project the text of cross-attention once and reuse its keys and values while the text, the
            weights and the adapters stay the same. This and the next are for diffusers models.
        drop_padding: in cross-attention, leave out text tokens that a mask says are padding: exact, and faster.
        strict: raise when a layer must be left alone.
        gate: T-GATE (arXiv 2404.02747), approximate: from the step after `gate` on, reuse the outputs of
            cross-attention and drop guidance. Pass `swap.gate` to the pipeline as `callback_on_step_end`.

    Returns:
        The handle: `report()`, `verify()`, `check()`, `restore()`; also a context manager.

    Raises:
        UsageError: for arguments that cannot be, a model without attention or without weights, an unsupported version,
            a layer already swapped; with `strict`, naming every layer that must be left alone.
        BackendError: when the named backend cannot serve a layer, with every reason.
    """
    opened_gate = None if gate is None else _gate(pipe_or_model, gate)
    options = Options(backend, role, _names(parts), cache_context, drop_padding, opened_gate)
    models, plan, versions = _plan_all(pipe_or_model, options, strict)
    for layer in plan.layers:
        if layer.is_swapped:
            _check_layer(layer)
    if opened_gate is not None:
        if not any(layer.is_swapped and layer.role == "cross" for layer in plan.layers):
            raise UsageError("gate is about cross-attention, and none is to be swapped here")
        plan.notes.append(f"gate={gate}: approximate; cross-attention outputs of step {gate} are reused after it")
    swap = Swap(pipe_or_model, models, plan, versions, opened_gate)
    swap.install()
    return swap


def plan_attention_swap(
    pipe_or_model: Any,
    backend: str = "auto",
    role: str | None = None,
    parts: Collection[str] | None = None,
    strict: bool = False,
) -> SwapReport:
    """What `swap_attention` would do with the same arguments. Nothing is changed, and no weights are needed: the model
    may be on meta.

    Raises:
        UsageError: as `swap_attention` does, but for weights and for layers that are swapped already.
        BackendError: when the named backend cannot serve a layer.
    """
    _, plan, versions = _plan_all(pipe_or_model, Options(backend, role, _names(parts)), strict)
    for layer in plan.layers:
        if layer.is_swapped:
            _check_layer(layer, needs_weights=False)
    return SwapReport(type(pipe_or_model).__name__, plan.layers, plan.notes, versions)


def _names(parts: Collection[str] | None) -> frozenset[str] | None:
    """The parts that are asked for; a string would be read letter by letter."""
    if isinstance(parts, str):
        raise UsageError(f'swap_attention: parts is a list of names: parts=["{parts}"]')
    return None if parts is None else frozenset(parts)


def _plan_all(target: Any, options: Options, strict: bool) -> tuple[dict[str, nn.Module], Plan, dict[str, str]]:
    """The models of a target by part, what would be done to them, and versions. Changes nothing."""
    check_role(options.role)
    _check_backend(options.backend)
    versions, notes = check_versions()
    models = parts_of(target, options.parts)
    plan = Plan(notes=notes)
    for part, model in models.items():
        plan.extend(_plan(part, model, options))
    _check_plan(plan, target, options.role, strict)
    return models, plan, versions


def _plan(part: str, model: nn.Module, options: Options) -> Plan:
    if is_diffusers(model):
        from mmattn.swap.diffusers.install import plan_model

        return plan_model(model, part, options)
    if is_transformers(model):
        from mmattn.swap.transformers.install import plan_model as plan_transformers

        return plan_transformers(model, part, options.backend, options.role)
    raise UsageError(
        f"swap_attention: {part} is a {type(model).__name__}, neither a diffusers nor a transformers model"
    )


def _check_backend(backend: str) -> None:
    """Raise for a backend that does not exist, saying which can be used here and why the others cannot."""
    try:
        check_name(backend)
    except UsageError as error:
        rows = backends()
        usable = ", ".join(row.name for row in rows if row.is_usable)
        reasons = [f"{row.name}: {'; '.join(row.reasons.values())}" for row in rows if not row.is_usable]
        raise UsageError(
            f"{error} (usable here: {usable}{'; not usable: ' if reasons else ''}{'; '.join(reasons)})"
        ) from error


def check_versions() -> tuple[dict[str, str], list[str]]:
    """Versions for the report, and a note for those that were never tested.

    Raises:
        UsageError: for a version that is too old.
    """
    import mmattn

    versions, notes = {"mmattn": mmattn.__version__, "torch": torch.__version__}, []
    for name, oldest in OLDEST.items():
        version = package_version(name)
        if version is None:
            continue
        versions[name] = version
        if Version(version).release < Version(oldest).release:
            raise UsageError(f"swap_attention needs {name} {oldest} or newer, found {version}: pip install -U {name}")
        if not version.startswith(TESTED[name] + "."):
            notes.append(f"{name} {version} is untested (tested: {TESTED[name]}); run verify()")
    return versions, notes


def _gate(pipe: Any, step: int) -> Any:
    from mmattn.swap.diffusers.gate import Gate

    return Gate(step, pipe)


def _check_plan(plan: Plan, target: Any, role: str | None, strict: bool) -> None:
    name = type(target).__name__
    if not plan.layers:
        is_ours = type(target).__module__.partition(".")[0] == "mmattn"
        why = ", which has mmattn's own already: choose its backend with mmattn.use_backend" if is_ours else ""
        raise UsageError(f"swap_attention: found no attention layer to swap in {name}{why}")
    chosen = [layer for layer in plan.layers if layer.chosen]
    if not chosen:
        raise UsageError(f"swap_attention: {name} has no {role or 'such'} attention in these parts")
    refused = [layer for layer in chosen if layer.refused is not None]
    if refused and (strict or len(refused) == len(chosen)):
        shown = "; ".join(f"{layer.full_name}: {layer.refused}" for layer in refused[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise UsageError(f"swap_attention: {len(refused)} of {len(chosen)} layers must be left alone: {shown}{more}")


def _check_layer(layer: Layer, *, needs_weights: bool = True) -> None:
    """Raise when a layer's weights are nowhere, or its backend cannot serve it (on the CPU, while they are nowhere)."""
    parameter = next(iter(layer.module.parameters()), None)
    if parameter is None:
        return
    if parameter.is_meta and needs_weights:
        if _is_offloaded(layer.module):
            return
        raise UsageError(f"swap_attention: the weights of {layer.full_name} are on meta; load the model first")
    if layer.backend == "auto" or not parameter.dtype.is_floating_point or parameter.dtype.itemsize == 1:
        return  # weights of eight bits are stored so, and computed with otherwise
    size = head_dim(layer.module)
    if size is None:
        return
    # Only traits count: nothing is computed.
    device = "cpu" if parameter.is_meta else parameter.device
    probe = torch.empty(1, 1, 2, size, dtype=parameter.dtype, device=device)
    explanation = explain(probe, probe, probe, backend=layer.backend)
    reasons = explanation.reasons[layer.backend]
    if reasons:
        raise BackendError(f"attention backend {layer.backend!r} cannot serve {layer.full_name}: {'; '.join(reasons)}")


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate or diffusers brings the weights when they are needed."""
    return any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in module.modules())
