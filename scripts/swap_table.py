"""The table of model families with stock, swapped and restored attention, from runs of all of them.

    python scripts/swap_table.py                         print it; exit code 1 when a row is bad
    python scripts/swap_table.py --write docs/swap.md    and put it between the two markers of a file

Every family of tests/swap/zoo (real classes of diffusers and transformers, shrunken real configurations, random
weights) runs stock, swapped, swapped with attention by the specification in its own precision and in float64, and
restored. A row is good when
- our output differs from the float64 one by no more than the tolerance rule allows, and from stock's by no more than
  twice that,
- `Swap.verify()` says the same of every layer and of the whole model,
- after `restore()` the output equals stock's bit for bit.
A family of which every layer is left alone is good when nothing has changed.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mmattn.errors import UsageError  # noqa: E402
from mmattn.ops.observe import AttentionCall, observing  # noqa: E402
from mmattn.ops.tolerance import deviation  # noqa: E402
from mmattn.swap import Swap, swap_attention  # noqa: E402
from mmattn.swap.attend import computing_reference  # noqa: E402
from mmattn.swap.report import SwapReport  # noqa: E402
from tests.swap import zoo_dits, zoo_sd, zoo_transformers, zoo_unets  # noqa: E402
from tests.swap.zoo import FAMILIES, Family  # noqa: E402

BEGIN, END = "<!-- swap table -->", "<!-- end of swap table -->"
GROUPS = {
    "Stable Diffusion": zoo_sd.FAMILIES,
    "Other U-Nets and autoencoders": zoo_unets.FAMILIES,
    "Diffusion transformers": zoo_dits.FAMILIES,
    "transformers": zoo_transformers.FAMILIES,
}
HEAD = (
    "| family | layers swapped | left alone | calls in the run | largest difference to stock | within tolerance "
    "| restored exactly |\n|---|---|---|---|---|---|---|"
)


def run_lora_scales(pipe: Any) -> Tensor:
    """LoRA at scale 0.5, then changed to 1.0."""
    outputs = [zoo_sd.run_pipeline(pipe, cross_attention_kwargs={"scale": scale}) for scale in (0.5, 1.0)]
    if torch.equal(*outputs):
        raise RuntimeError("the scale of the LoRA does not count")
    return torch.stack(outputs)


RUNS: dict[str, Callable[[Any], Tensor]] = {"sd1_lora": run_lora_scales}
NAMES = {"sd1_lora": "Stable Diffusion 1.x with LoRA, scale 0.5 changed to 1.0"}


@dataclass
class Row:
    """What was found of one family.

    Attributes:
        calls: attention calls that our code served in the swapped run.
        relative: largest difference to stock, by the largest output; None where nothing was swapped.
        error: what went wrong besides.
    """

    name: str
    swapped: str = ""
    refused: str = "none"
    calls: int = 0
    relative: float | None = None
    is_within: bool = False
    is_restored: bool = False
    error: str = ""

    @property
    def is_good(self) -> bool:
        is_same = self.relative is None or (self.is_within and self.calls > 0)
        return is_same and self.is_restored and not self.error

    def __str__(self) -> str:
        within, restored = ("yes" if fact else "**no**" for fact in (self.is_within, self.is_restored))
        difference = "" if self.relative is None else "0" if self.relative == 0 else f"{self.relative:.0e}"
        cells = [self.name, self.swapped, self.error or self.refused, str(self.calls), difference]
        return f"| {' | '.join([*cells, '' if self.relative is None else within, restored])} |"


def try_family(key: str, family: Family, backend: str) -> Row:
    """Run one family in every way."""
    row = Row(NAMES.get(key, family.name))
    built = family.build()
    run = functools.partial(RUNS.get(key, family.run), built)
    stock = run()
    try:
        swapped = swap_attention(built, backend)
    except UsageError as error:
        describe_refusal(row, error)
        row.is_restored = torch.equal(run(), stock)
        return row
    try:
        describe(row, swapped.report())
        compare(row, swapped, run, stock)
        row.error = "; ".join(swapped.check())
    finally:
        left = swapped.restore()
    row.is_restored = torch.equal(run(), stock) and not left
    return row


def compare(row: Row, swapped: Swap, run: Callable[[], Tensor], stock: Tensor) -> None:
    """Ours beside stock, in the family's run and by `verify`."""
    calls: list[AttentionCall] = []
    with observing(calls.append):
        ours = run()
    with computing_reference("eager"):
        eager = run()
    with computing_reference("float64"):
        reference = run()
    found = deviation(ours, eager, reference)
    to_stock = (ours.double() - stock.double()).abs().max().item()
    row.calls = len(calls)
    row.relative = to_stock / stock.abs().max().item()
    row.is_within = found.is_within and to_stock <= 2 * found.bound and swapped.verify().is_ok


def describe(row: Row, report: SwapReport) -> None:
    """How many layers, and why others were left alone: in short, without the class where the reason says enough."""
    row.swapped = f"{len(report.swapped)} of {len(report.swapped) + len(report.refused)}"
    reasons = Counter((layer.refused or "").partition(": ")[2] or layer.refused for layer in report.refused)
    row.refused = "; ".join(f"{count}: {reason}" for reason, count in reasons.items()) or "none"


def describe_refusal(row: Row, error: UsageError) -> None:
    """The same where every layer was left alone: the first layer's reason."""
    found = re.search(r"(\d+) of \1 layers must be left alone: \S+: ([^;]*)", str(error))
    if found is None:
        row.error = str(error)
    else:
        row.swapped, row.refused = f"0 of {found.group(1)}", f"{found.group(1)}: {found.group(2)}"


def table(chosen: list[str], backend: str) -> Iterator[tuple[str, Row | None]]:
    """The lines of the table, each with its row if it has one."""
    grouped = {key for families in GROUPS.values() for key in families}
    groups = {**GROUPS, "More": {key: family for key, family in FAMILIES.items() if key not in grouped}}
    yield HEAD, None
    for group, families in groups.items():
        wanted = {key: family for key, family in families.items() if not chosen or key in chosen}
        if wanted:
            yield f"| **{group}** | | | | | | |", None
        for key, family in wanted.items():
            row = try_family(key, family, backend)
            yield str(row), row


def around_table(path: Path) -> tuple[str, str]:
    """What stands before and after the table in a file, markers included; exits when it has no place for one."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN) if path.is_file() else ("", "", "")
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{path}: no place for the table; it needs a line {BEGIN} and, below, a line {END}")
    return before + begin, end + after


def main() -> int:
    """Print the table; exit code 1 when a row is bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"only these of {' '.join(FAMILIES)}")
    parser.add_argument("--write", type=Path, default=None, metavar="FILE")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="one of mmattn.backends()")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.families) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {' '.join(unknown)}; there are {' '.join(FAMILIES)}")
    if arguments.write and arguments.families:
        parser.error("--write takes the whole table: name no families")
    place = around_table(arguments.write) if arguments.write else None
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    lines, rows = [], []
    for line, row in table(arguments.families, arguments.backend):
        print(line, flush=True)
        lines.append(line)
        rows += [] if row is None else [row]
    libraries = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    versions = ", ".join(f"{name} {library.__version__.partition('+')[0]}" for name, library in libraries.items())
    lines += ["", f"float32, {versions}; random weights in the real classes at small sizes."]
    bad = sum(not row.is_good for row in rows)
    print(f"\n{versions}\n{len(rows)} families, {bad} bad")
    if place is not None:
        text = "\n".join(["", *lines, ""])
        arguments.write.write_text(text.join(place), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
