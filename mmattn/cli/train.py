"""`mmattn train`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mmattn.cli.options import ConfigArgument, OverridesArgument, ResumeFromOption, ResumeOption


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    resume: ResumeOption = False,
    resume_from: ResumeFromOption = None,
    processes: Annotated[
        int | None, typer.Option("--processes", "-n", min=1, help="Processes on this machine: one a GPU, or on a CPU.")
    ] = None,
) -> None:
    """Train from a config."""
    from mmattn.cli.recipe_main import starting_point, train_recipe
    from mmattn.config import load_config, load_recipe, recipe_of
    from mmattn.errors import UsageError

    if processes is not None and "RANK" in os.environ:
        raise UsageError(
            f"-n {processes}: another launcher has started this process (RANK is set): leave -n out, and give the "
            "number of processes to the launcher"
        )
    start = starting_point(resume, resume_from)
    recipe = load_recipe(recipe_of(config))
    if processes is not None and processes > 1:
        from mmattn.training.launch import launch

        settings = load_config(recipe.Config, config, overrides or ())  # what is wrong with it is said once
        debug = ["--debug"] if "--debug" in sys.argv else []  # taken off the command line before it comes here
        going_on = ["--resume-from", start] if isinstance(start, str) else ["--resume"] * start
        arguments = [*debug, "train", config, *(overrides or ()), *going_on]
        launch(arguments, processes, settings.training.device)
        return
    train_recipe(recipe, config, overrides or (), resume=start)
