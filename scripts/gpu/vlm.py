"""BLIP in its base size beside stock transformers: captions, and five questions on one picture, in bfloat16."""

from __future__ import annotations

import sys

import torch
import transformers
from measure import Options, read_options
from vlm_inference import Place, Row, caption_rows, question_rows


def add(rows: list[Row], options: Options) -> None:
    """The timed rows into the table."""
    for row in rows:
        if row.stock_ms is None or row.ours_ms is None:
            continue
        options.add(
            "Vision-language model (BLIP base size, bfloat16), ms",
            what=row.name,
            stock=f"{row.stock_ms:.1f} ±{(row.stock_spread or 0) / 2:.0%}",
            mmattn=f"{row.ours_ms:.1f} ±{(row.ours_spread or 0) / 2:.0%}",
            ratio=f"{row.value:.2f}",
            **{"same tokens": "yes" if row.same_tokens else "no"},
        )


def main() -> int:
    """Captions, then questions."""
    options = read_options(__doc__)
    transformers.logging.set_verbosity_error()
    size, place = "tiny" if options.tiny else "base", Place(options.device, torch.bfloat16)
    add(caption_rows(size, options.repeats, 20, place)[0], options)
    add(question_rows(size, options.repeats, 10, place), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
