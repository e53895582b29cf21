"""Whole training steps beside stock's, alternating in one process; one ratio a row.

    python scripts/bench/train.py --threads 2 --json runs/train.json

Translator (Marian's size, random weights, sentence lengths lognormal with mean 25, batches of 32 sentences): target
tokens a second against `Seq2SeqTrainer` with `group_by_length`, sorted by the longer side, which pads least, and by the
source's length, which is its default. Ours keeps freed memory between steps, as the loop does; a row has stock with
that too. Then the held-out loss of a small model after equally many target tokens, and the memory that the loss takes
beside its inputs, each in a process of its own.
VLM and U-Net: see `train_pictures.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from results import facts, finish
from train_translator import translator_rows

import mmattn


def picture_rows(arguments: argparse.Namespace) -> list[Any]:
    """The VLM's and U-Net's rows; see `train_pictures.py`."""
    from train_pictures import all_rows  # needs diffusers

    return all_rows("tiny" if arguments.quick else "full", arguments.repeats, is_quick=arguments.quick)


PARTS = {"translator": translator_rows, "pictures": picture_rows}


def main() -> int:
    """Measure and print; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--quick", action="store_true", help="small models and two turns, to see that it works")
    parser.add_argument("--only", choices=PARTS, help="only this part")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.steps = 2, 2
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    about = facts(mmattn, torch, transformers, accelerate, quick=arguments.quick)
    print(json.dumps(about))
    rows = [row for name, part in PARTS.items() if arguments.only in (None, name) for row in part(arguments)]
    return finish(rows, about, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
