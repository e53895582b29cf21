"""BLIP in its base size beside stock transformers: captions, and five questions on one picture, in bfloat16."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
import transformers
from measure import Options, Status, read_options
from vlm_inference import Place, Row, caption_rows, compare, question_rows


def add(row: Row, options: Options) -> None:
    """A timed row into the table."""
    options.add(
        "Vision-language model (BLIP base size, bfloat16), ms",
        what=row.name,
        stock=f"{row.stock_ms:.1f} ±{(row.stock_spread or 0) / 2:.0%}",
        mmattn=f"{row.ours_ms:.1f} ±{(row.ours_spread or 0) / 2:.0%}",
        ratio=f"{row.value:.2f}",
        **{"same tokens": "yes" if row.same_tokens else "no"},
    )


def main() -> int:
    """Captions, then questions; each comparison in its turn, and its row as soon as it is there."""
    options, status = read_options(__doc__), Status()
    transformers.logging.set_verbosity_error()
    size, place = "tiny" if options.tiny else "base", Place(options.device, torch.bfloat16)

    def in_turn(*arguments: Any, **named: Any) -> Row:
        with options.turn():
            row = compare(*arguments, **named)
        add(row, options)
        return row

    with mock.patch("vlm_inference.compare", in_turn):
        with status.row("captions"):
            caption_rows(size, options.repeats, 20, place)
        with status.row("questions"):
            question_rows(size, options.repeats, 10, place)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
