"""`mmattn swap`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder or hub id, of diffusers or transformers; or a training run."),
]
BackendOption = Annotated[str, typer.Option("--backend", metavar="NAME", help="One that `mmattn doctor` lists.")]
RoleOption = Annotated[Literal["cross", "self"] | None, typer.Option("--role", help="Only these layers.")]
PartOption = Annotated[
    list[str] | None, typer.Option("--part", metavar="NAME", help="Only this part of a pipeline (unet, vae, ...).")
]


def swap(
    model: ModelArgument,
    backend: BackendOption = "auto",
    role: RoleOption = None,
    part: PartOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan, where possible without weights.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare outputs; exit code 1 if they differ.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="An error if a layer must be left alone.")] = False,
) -> None:
    """Show what swapping attention does to a model.

    A swap lives in a process and writes nothing: this shows what `mmattn.swap_attention` replaces, keeps and refuses,
    and proves that the output stays the same. To use it, call that function in your program.
    """
    from mmattn.errors import RunError, UsageError

    if dry_run and verify:
        raise UsageError("--verify compares a swapped model: leave out --dry-run")
    from mmattn.cli.stock_models import open_model, outline_model
    from mmattn.inference.trained import model_source
    from mmattn.swap import plan_attention_swap, swap_attention
    from mmattn.swap.parts import MOTION

    # Wrong usage is found before any weights are read, and only the parts concerned are read.
    source = str(model_source(model))
    plan = plan_attention_swap(outline_model(source), backend, role, part, strict)
    if dry_run:
        print(f"dry run, nothing is swapped; a swap would do this:\n{plan}")
        return
    parts = {"unet" if layer.part == MOTION else layer.part for layer in plan.swapped} | set(part or ())
    with swap_attention(open_model(source, parts), backend, role, part, strict=strict) as swapped:
        print(swapped.report())
        if verify:
            verification = swapped.verify()
            print(verification)
            if not verification.is_ok:
                raise RunError(f"{model}: the output is not the same")
