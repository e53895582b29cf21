"""A source of noise for every picture, so that none depends on what it is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from mmattn.errors import UsageError

NoiseSource = int | torch.Generator


def noise_sources(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    num_prompts: int,
    num_images: int,
) -> list[NoiseSource]:
    """A seed or generator for each picture, those of the first prompt first.

    Args:
        seed: one for all prompts, or one for each; picture j of a prompt gets `seed + j`. None: 0.
        generator: in place of seeds, one for the only picture, or one for each.
        num_prompts: prompts.
        num_images: pictures of each.

    Raises:
        UsageError: seed and generator together, another number of them, or something that is none.
    """
    count = num_prompts * num_images
    if generator is not None:
        if seed is not None:
            raise UsageError("seed and generator are given together: leave one of them out")
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if not all(isinstance(each, torch.Generator) for each in generators):
            raise UsageError("generator must be a torch.Generator, or a list of them")
        if len(generators) != count:
            raise UsageError(
                f"{len(generators)} generators for {count} pictures: give one for each, so that a picture does not "
                "depend on the others; or a seed"
            )
        return list(generators)
    seeds: list[Any] = list(seed) if isinstance(seed, list | tuple) else [0 if seed is None else seed] * num_prompts
    if len(seeds) != num_prompts:
        raise UsageError(f"{len(seeds)} seeds for {num_prompts} prompts: give one, or one for each")
    for each in seeds:
        if isinstance(each, bool) or not isinstance(each, Integral) or not 0 <= int(each) < 2**63 - num_images:
            raise UsageError(f"seed is {each!r}: it must be a whole number from 0 to 2**63 - 1")
    return [int(each) + number for each in seeds for number in range(num_images)]


def make_generators(sources: Sequence[NoiseSource]) -> list[torch.Generator]:
    """Generators on the CPU, so that a seed means the same on every device; those given are taken as they are."""
    return [
        source if isinstance(source, torch.Generator) else torch.Generator().manual_seed(source) for source in sources
    ]
